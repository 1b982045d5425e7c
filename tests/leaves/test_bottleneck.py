"""Bottleneck adapters against the same network written into the model by hand."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import noisy, normal
from flax import linen as nn
from flax import nnx
from speed import slow_but

import jpeft
from jpeft.leaf import is_leaf
from jpeft.tree.paths import slots

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
import zoo

D, F, R, LAYERS, KEEP = 8, 12, 3, 2, 0.7
KEY = jax.random.key(0)
X = normal(4, 2, 5, D)
RNGS = {"dropout": jax.random.key(9)}


# --- the model, with adapters by hand ------------------------------------------------


def by_hand(a, h, act, scale=1.0):
    """s (act(h D + d) U + u), times a gate if there is one."""
    wide = lambda b: b.reshape(*(1,) * (h.ndim - 1), -1)
    y = act(h @ a["down"] + wide(a["down_bias"])) @ a["up"] + wide(a["up_bias"])
    if "gate" in a:
        g = jax.nn.sigmoid(h @ a["gate"] + a["gate_bias"])
        y = g.mean(-1, keepdims=True)[..., None] * y
    return a.get("gain", jnp.ones(())) * scale * y


@dataclasses.dataclass(frozen=True)
class Case:
    """A way to build the model, and the adapter on it."""

    placement: str = "houlsby"
    form: str = "plain"
    gated: bool = False
    bias: bool = True
    dropout: bool = False
    late: bool = True
    gate: bool = False
    learned: bool = False
    remat_dense: bool = False

    def transform(self, **kwargs):
        options = {
            "placement": self.placement,
            "activation": "tanh",
            "late": self.late,
            "gate": self.gate,
            "scale": "learned" if self.learned else None,
            **kwargs,
        }
        return jpeft.adapter(R, **options)


def name_of(case):
    """What is not the default, for the tests' names."""
    given = dataclasses.asdict(case)
    return " ".join(
        v if isinstance(v, str) else k if v else f"no {k}"
        for k, v in given.items()
        if v != getattr(Case(), k) or k == "placement"
    )


class Layer(nn.Module):
    case: Case

    @nn.compact
    def __call__(self, x, hand=None):
        c = self.case
        dense = nn.remat(nn.Dense) if c.remat_dense else nn.Dense
        drop = lambda y: nn.Dropout(1 - KEEP, deterministic=not c.dropout)(y)
        sequential = c.placement != "parallel"

        def end(y, h, name):
            a = None if hand is None else hand.get(name)
            if a is None:
                return drop(y)
            scale = 4.0 if c.placement == "parallel" and not c.learned else 1.0
            added = lambda y: by_hand(a, y if sequential else h, jnp.tanh, scale)
            if not c.late:
                return drop(y + added(y))
            y = drop(y)
            return y + added(y)

        h = nn.LayerNorm(name="ln_1")(x)
        q, k, v = (nn.Dense(D, name=n)(h) for n in ("query", "key", "value"))
        w = jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", q, k) / D**0.5)
        y = dense(D, use_bias=c.bias, name="out")(jnp.einsum("bqk,bkd->bqd", w, v))
        x = x + end(y, h, "attention")
        h = nn.LayerNorm(name="ln_2")(x)
        if c.gated:
            gate, up = (
                dense(F, use_bias=False, name=n)(h) for n in ("gate_proj", "up_proj")
            )
            y = dense(D, use_bias=c.bias, name="down_proj")(nn.silu(gate) * up)
        else:
            y = dense(F, name="fc1")(h)
            y = dense(D, use_bias=c.bias, name="fc2")(nn.gelu(y))
        return x + end(y, h, "mlp"), None


class Net(nn.Module):
    case: Case

    @nn.compact
    def __call__(self, x, hand=None):
        layer = nn.remat(Layer) if "remat" in self.case.form else Layer
        if "scan" in self.case.form:
            stack = nn.scan(
                layer,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                length=LAYERS,
            )
            return stack(self.case, name="layers")(x, hand)[0]
        for k in range(LAYERS):
            one = None if hand is None else hand[k]
            x, _ = layer(self.case, name=f"layer_{k}")(x, one)
        return x


def built(case):
    """(fn(params, x), params, twin(hand, x)) of the model."""
    model = Net(case)
    params = noisy(jax.jit(model.init)({"params": KEY, **RNGS}, X)["params"], 0.3)
    fn = lambda p, x: model.apply({"params": p}, x, rngs=RNGS)
    twin = lambda hand, x: model.apply({"params": params}, x, hand, rngs=RNGS)
    return fn, params, twin


FIELDS = ("down", "down_bias", "up", "up_bias", "gain", "gate", "gate_bias")


def handed(params, case):
    """The adapter's arrays, as the twin takes them."""
    one = {}
    for path, leaf in slots(params).items():
        if not is_leaf(leaf):
            continue
        layer, name, _ = path.split("/")
        kind = "attention" if name in ("out", "query") else "mlp"
        mine = one.setdefault(layer, {}).setdefault(kind, {})
        arrays = {n: getattr(leaf, n, None) for n in FIELDS}
        mine.update({n: x for n, x in arrays.items() if x is not None})
    return one["layers"] if "scan" in case.form else [one[k] for k in sorted(one)]


def adapted(case, fn, params, **kwargs):
    uses = jpeft.find_uses(fn, params, X)
    params = case.transform(**kwargs)(KEY, params, uses=uses)
    trainable, frozen = jpeft.partition(params)
    return noisy(trainable, 0.3), frozen


CASES = [
    Case(),
    Case(form="scan+remat", dropout=True),
    Case(form="scan", dropout=True, late=False),
    Case(form="remat", bias=False, dropout=True, remat_dense=True),
    Case("pfeiffer", gated=True, bias=False, learned=True),
    Case("pfeiffer", form="scan", gate=True),
    Case("parallel", form="scan+remat", gated=True, bias=False, learned=True),
    Case("parallel", form="remat", gate=True, remat_dense=True, dropout=True),
    Case("parallel", form="scan", gate=True, dropout=True, late=False),
]


@pytest.mark.sample(1)
@pytest.mark.parametrize("case", slow_but(CASES[::8], CASES), ids=name_of)
def test_values_and_gradients_are_those_of_the_network_by_hand(case):
    fn, params, twin = built(case)
    trainable, frozen = adapted(case, fn, params)
    square = lambda y: jnp.mean(jnp.square(y))
    apply = jpeft.adapt(fn)
    ours = lambda t: square(apply(jpeft.combine(t, frozen), X))
    hand = lambda t: square(twin(handed(jpeft.combine(t, frozen), case), X))
    a, ga = jax.jit(jax.value_and_grad(hand))(trainable)
    b, gb = jax.jit(jax.value_and_grad(ours))(trainable)
    base = square(fn(params, X))
    assert abs(float(a - base)) > 1e-3  # the adapters act
    assert float(b) == pytest.approx(float(a), rel=1e-6)
    largest = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(ga))
    for x, y in zip(jax.tree.leaves(ga), jax.tree.leaves(gb), strict=True):
        assert float(jnp.max(jnp.abs(x))) > 0.0
        # float32, sums of some hundred terms in another order
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6 * largest)


@pytest.mark.parametrize("case", slow_but(CASES[1:2], CASES[1:8:3]), ids=name_of)
def test_the_start_is_the_base_bit_for_bit(case):
    fn, params, _ = built(case)
    params_ = case.transform()(KEY, params, uses=jpeft.find_uses(fn, params, X))
    np.testing.assert_array_equal(jpeft.adapt(fn)(params_, X), fn(params, X))


# --- closed forms --------------------------------------------------------------------


def mlp(p, x):
    h = jax.nn.relu(x @ p["up"]["kernel"])
    return h @ p["down"]["kernel"] + p["down"]["bias"][None]


SHAPES = {"up": {"kernel": (7, 5)}, "down": {"kernel": (5, 3), "bias": (3,)}}


def random(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: jnp.asarray(rng.standard_normal(s), jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


NUMPY = {
    "relu": lambda x: np.maximum(x, 0),
    "tanh": np.tanh,
    "swish": lambda x: x / (1 + np.exp(-x)),
    "identity": lambda x: x,
}


@pytest.mark.sample(4)
@pytest.mark.parametrize("activation", NUMPY)
@pytest.mark.parametrize("placement", ["houlsby", "parallel"])
def test_the_formula_in_float64(placement, activation):
    params, x = random(SHAPES), np.asarray(random((4, 7), 1))
    method = jpeft.adapter(2, placement=placement, activation=activation, scale=0.5)
    trainable, frozen = jpeft.partition(method(KEY, params))
    params_ = jpeft.combine(noisy(trainable, 0.3), frozen)
    got = jpeft.adapt(mlp)(params_, jnp.asarray(x))
    wide = lambda x: np.asarray(x, np.float64)
    w = jax.tree.map(wide, params)
    y = np.maximum(wide(x) @ w["up"]["kernel"], 0) @ w["down"]["kernel"]
    y = y + w["down"]["bias"]
    last = params_["down"]["bias"]
    first = last if placement == "houlsby" else params_["up"]["kernel"]
    h = wide(x) if placement == "parallel" else y
    h = NUMPY[activation](h @ wide(first.down) + wide(first.down_bias))
    want = y + 0.5 * (h @ wide(last.up) + wide(last.up_bias))
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)


@pytest.mark.slow
def test_a_gate_is_one_number_an_example():
    params, x = random(SHAPES), random((2, 4, 7), 1)
    fn = lambda p, x: jax.nn.relu(x @ p["up"]["kernel"]) @ p["down"]["kernel"]
    del params["down"]["bias"]
    method = jpeft.adapter(2, placement="parallel", gate=True, activation="identity")
    trainable, frozen = jpeft.partition(method(KEY, params))
    params_ = jpeft.combine(noisy(trainable, 0.3), frozen)
    a, b = params_["up"]["kernel"], params_["down"]["kernel"]
    bias = lambda v: v[None, None]
    g = jax.nn.sigmoid(x @ a.gate + a.gate_bias).mean(1)[:, None, None]
    more = (x @ a.down + bias(a.down_bias)) @ b.up + bias(b.up_bias)
    got = jpeft.adapt(fn)(params_, x)
    np.testing.assert_allclose(got, fn(params, x) + 4 * g * more, rtol=1e-5, atol=1e-5)
    # and does not mix examples
    alone = jpeft.adapt(fn)(params_, x[1:])
    np.testing.assert_allclose(got[1:], alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("init", "identity"),
    [("near_identity", True), ("lora", True), ("houlsby", False), ("bert", False)],
)
def test_the_first_values(init, identity):
    params = random({"up": {"kernel": (64, 9)}, "down": {"kernel": (9, 80)}})
    leaf = jpeft.adapter(16, init=init)(KEY, params)["down"]["kernel"]
    spread = {"lora": (3 * 80) ** -0.5, "bert": 0.02}.get(init, 0.0088)
    assert float(jnp.std(leaf.down)) == pytest.approx(spread, rel=0.1)
    if init == "houlsby":  # cut at two deviations of 0.01
        assert float(jnp.max(jnp.abs(leaf.down))) <= 0.02
    assert (not jnp.any(leaf.up)) == identity
    assert not jnp.any(leaf.down_bias) and not jnp.any(leaf.up_bias)


def test_defaults_are_those_of_the_papers():
    params = random({"up": {"kernel": (64, 96)}, "down": {"kernel": (96, 64)}})
    for placement, rank, scale in (("houlsby", 4, 1.0), ("parallel", 32, 4.0)):
        leaf = jpeft.adapter(placement=placement)(KEY, params)["down"]["kernel"]
        assert leaf.up.shape == (rank, 64) and leaf.scale == scale
    wide = jpeft.adapter(2, bottleneck_pattern={"mlp": 7})(KEY, params)
    assert wide["down"]["kernel"].up.shape == (7, 64)


# --- dropout -------------------------------------------------------------------------


def dropped_by(how):
    mask = jnp.asarray(np.random.default_rng(3).random((4, 3)) < KEEP)

    def fn(p, x):
        y = mlp(p, x)
        if how == "select":
            return x[:, :3] + jax.lax.select(mask, y / KEEP, jnp.zeros_like(y))
        if how == "product":
            return x[:, :3] + mask.astype(y.dtype) * y / KEEP
        if how == "branch scale":
            return x[:, :3] + 0.5 * y
        return x[:, :3] + jnp.exp(y)

    return fn


@pytest.mark.sample(3)
@pytest.mark.parametrize("how", ["select", "product", "branch scale", "exp"])
@pytest.mark.parametrize("placement", ["houlsby", "parallel"])
def test_it_waits_while_the_output_is_only_dropped(how, placement):
    params, x = random(SHAPES), random((4, 7), 1)
    fn = dropped_by(how)
    got = {}
    for late in (True, False):
        method = jpeft.adapter(2, placement=placement, late=late)
        trainable, frozen = jpeft.partition(method(KEY, params))
        params_ = jpeft.combine(noisy(trainable, 0.3), frozen)
        got[late] = jpeft.adapt(fn)(params_, x)
    waits = how != "exp"
    assert bool(jnp.allclose(got[True], got[False], rtol=1e-6)) != waits
    last = params_["down"]["bias"]
    y = fn(params, x) - x[:, :3]
    h = y
    if placement == "parallel":
        h, last = x, (params_["up"]["kernel"], last)
    start, end = last if placement == "parallel" else (last, last)
    more = jax.nn.gelu if placement == "houlsby" else jax.nn.relu
    if waits:
        added = more(h @ start.down + start.down_bias[None]) @ end.up
        added = end.scale * (added + end.up_bias[None])
        np.testing.assert_allclose(
            got[True], fn(params, x) + added, rtol=1e-5, atol=1e-5
        )


# --- other models --------------------------------------------------------------------


class Attention(nnx.Module):
    def __init__(self, rngs):
        self.attn = nnx.MultiHeadAttention(2, in_features=D, decode=False, rngs=rngs)
        self.fc1 = nnx.Linear(D, F, rngs=rngs)
        self.fc2 = nnx.Linear(F, D, rngs=rngs)

    def __call__(self, x, hand=None):
        y = self.attn(x)
        if hand is not None:
            y = y + by_hand(hand["attn"], y, jnp.tanh)
        x = x + y
        y = self.fc2(nnx.gelu(self.fc1(x)))
        return x + (y if hand is None else y + by_hand(hand["mlp"], y, jnp.tanh))


@pytest.mark.slow
def test_nnx_equals_the_network_by_hand():
    graph, params = nnx.split(Attention(nnx.Rngs(0)))
    params = noisy(params, 0.3)
    fn = lambda p, x: nnx.merge(graph, p)(x)
    method = jpeft.adapter(R, activation="tanh")
    params_ = method(KEY, params, uses=jpeft.find_uses(fn, params, X))
    trainable, frozen = jpeft.partition(params_)
    params_ = jpeft.combine(noisy(trainable, 0.3), frozen)
    leaves = {p: x for p, x in slots(params_).items() if is_leaf(x)}
    assert list(leaves) == ["attn/out/bias", "fc2/bias"]
    array = lambda x: jax.tree.leaves(x)[0]
    hand = {
        name: {n: array(getattr(leaf, n)) for n in FIELDS[:4]}
        for name, leaf in zip(("attn", "mlp"), leaves.values(), strict=True)
    }
    want = nnx.merge(graph, params)(X, hand)
    got = jax.jit(jpeft.adapt(fn))(params_, X)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


ZOO = {
    "bert_remat": "parallel",
    "llama": "parallel",
    "gpt2": "houlsby",
    "t5": "houlsby",
    "jimm_vit": "parallel",
    "jimm_dinov3": "houlsby",
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "placement"), ZOO.items())
def test_public_models(name, placement):
    """Every sub-layer of models nobody wrote for jpeft: the start is the base, and all
    adapters get a gradient."""
    try:
        with (
            jax.numpy_rank_promotion("allow"),
            jax.numpy_dtype_promotion("standard"),
        ):
            s = {**zoo.LINEN, **zoo.NNX}[name]()
            uses = jpeft.find_uses(s.fn, s.params, *s.args)
            method = jpeft.adapter(
                R, placement=placement, where="all", activation="tanh"
            )
            params = method(KEY, s.params, uses=uses)
            trainable, frozen = jpeft.partition(params)
            apply = jpeft.adapt(s.fn)
            run = jax.jit(lambda t: apply(jpeft.combine(t, frozen), *s.args))
            base = jax.jit(s.fn)(s.params, *s.args)
            np.testing.assert_allclose(run(trainable), base, rtol=1e-5, atol=1e-5)
            moved = noisy(trainable, 0.1)
            loss = lambda t: jnp.mean(jnp.sin(run(t)))
            for g in jax.tree.leaves(jax.grad(loss)(moved)):
                assert float(jnp.max(jnp.abs(g))) > 0.0
    except ImportError as error:
        pytest.skip(f"{zoo.REQUIRES[name]} is not installed: {error}")


def test_equal_layers_stay_one_inner_jit():
    """Twelve layers, each a call of one jitted function: still one program."""

    @jax.jit
    def one_layer(p, x):
        return x + mlp(p, x)

    def fn(params, x):
        for p in params:
            x = one_layer(p, x)
        return x

    shapes = {"up": {"kernel": (4, 5)}, "down": {"kernel": (5, 4), "bias": (4,)}}
    params = [random(shapes, k) for k in range(12)]
    for placement in ("houlsby", "parallel"):
        params_ = jpeft.adapter(2, placement=placement)(KEY, params)
        text = jax.jit(jpeft.adapt(fn)).lower(params_, jnp.ones((3, 4))).as_text()
        assert text.count("func.func private @one_layer") == 1


@pytest.mark.slow
def test_bfloat16_models_keep_their_dtype():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random(SHAPES))
    x = random((4, 7), 1).astype(jnp.bfloat16)
    for placement in ("houlsby", "parallel"):
        trainable, frozen = jpeft.partition(
            jpeft.adapter(2, placement=placement)(KEY, params)
        )
        assert {a.dtype for a in jax.tree.leaves(trainable)} == {jnp.float32.dtype}
        got = jpeft.adapt(mlp)(jpeft.combine(noisy(trainable, 0.3), frozen), x)
        assert got.dtype == jnp.bfloat16


@pytest.mark.slow
def test_over_a_quantised_weight_and_lora():
    shapes = {"up": {"kernel": (64, 64)}, "down": {"kernel": (64, 64)}}
    params, x = random(shapes), random((4, 64), 1)
    fn = lambda p, x: jnp.tanh(x @ p["up"]["kernel"]) @ p["down"]["kernel"]
    below = jpeft.chain(jpeft.quantize("nf4", compute_dtype=None), jpeft.lora(rank=2))
    base = below(KEY, params)
    trainable, frozen = jpeft.partition(base)
    base = jpeft.combine(noisy(trainable, 0.05), frozen)
    plain = jpeft.merge(base)
    method = jpeft.adapter(3, placement="parallel")
    one, two = method(KEY, base), method(KEY, plain)
    np.testing.assert_allclose(
        jpeft.adapt(fn)(one, x), jpeft.adapt(fn)(two, x), rtol=1e-4, atol=1e-3
    )


# --- refusals ------------------------------------------------------------------------


def parallel(params, **kwargs):
    return jpeft.adapter(2, placement="parallel", **kwargs)(KEY, params)


def test_a_link_that_is_not_closed_or_not_open_is_an_error():
    params, x = random({"up": {"kernel": (7, 5)}, "down": {"kernel": (5, 3)}}), X[0]
    x = random((4, 7), 1)
    params_ = parallel(params)
    with pytest.raises(jpeft.PromiseError, match="'mlp of adapter-.*' .*never closed"):
        jpeft.adapt(lambda p, x: x @ p["up"]["kernel"])(params_, x)
    with pytest.raises(jpeft.PromiseError, match="is not open"):
        jpeft.adapt(lambda p, h: h @ p["down"]["kernel"])(params_, x[:, :5])

    def twice(p, x):
        h = jax.nn.relu(x @ p["up"]["kernel"])
        return h @ p["down"]["kernel"] + (2 * h) @ p["down"]["kernel"]

    with pytest.raises(jpeft.PromiseError, match="is not open"):
        jpeft.adapt(twice)(params_, x)


def test_opened_in_one_step_and_closed_in_another_is_an_error():
    params = random({"up": {"kernel": (2, 7, 7)}, "down": {"kernel": (7, 3)}})

    def across(p, x):
        x, _ = jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["up"]["kernel"])
        return x @ p["down"]["kernel"]

    x = random((4, 7), 1)
    uses = jpeft.find_uses(across, params, x)
    params_ = jpeft.adapter(2, placement="parallel")(KEY, params, uses=uses)
    with pytest.raises(jpeft.PromiseError, match="never closed in the `scan`"):
        jpeft.adapt(across)(params_, x)


def test_shapes_that_do_not_fit_are_named():
    params, x = random({"up": {"kernel": (7, 5)}, "down": {"kernel": (5, 3)}}), None
    x = random((4, 7), 1)
    pooled = lambda p, x: (x @ p["up"]["kernel"]).sum(0)[None] @ p["down"]["kernel"]
    with pytest.raises(ValueError, match=r"'mlp' reads activations \(4,\).*to \(1,\)"):
        jpeft.adapt(pooled)(parallel(params), x)


def test_a_kernel_stored_the_other_way_round_needs_uses():
    params = random(
        {"c_fc": {"kernel": (5, 7)}, "c_proj": {"kernel": (7, 5), "bias": (7,)}}
    )

    def fn(p, x):
        h = jax.nn.relu(x @ p["c_fc"]["kernel"].T)
        return h @ p["c_proj"]["kernel"].T + p["c_proj"]["bias"][None]

    x = random((4, 7), 1)
    with pytest.raises(ValueError, match="do not fit its bias.*find_uses"):
        jpeft.adapter(2)(KEY, params)
    bare = {"c_fc": params["c_fc"], "c_proj": {"kernel": params["c_proj"]["kernel"]}}
    with_bias = lambda p, x: fn(
        {**p, "c_proj": {**p["c_proj"], "bias": jnp.zeros(7)}}, x
    )
    for placement in ("houlsby", "parallel"):
        method = jpeft.adapter(2, placement=placement)
        with pytest.raises(ValueError, match="taken for its .*find_uses"):
            jpeft.adapt(with_bias)(method(KEY, bare), x)
        uses = jpeft.find_uses(fn, params, x)
        got = jpeft.adapt(fn)(method(KEY, params, uses=uses), x)
        np.testing.assert_array_equal(got, fn(params, x))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"bottleneck": 0}, "bottleneck=0: expected an integer of at least 1"),
        ({"bottleneck": 2, "reduction": 4}, "both say how wide"),
        ({"reduction": -1}, "reduction=-1: expected a number above 0"),
        ({"placement": "houlsbi"}, "expected one of .'houlsby', 'pfeiffer'"),
        ({"activation": "gelo"}, "activation='gelo': expected one of"),
        ({"scale": "learnt"}, "scale='learnt': expected a number above 0 or 'learned'"),
        ({"init": "zero"}, "init='zero': expected one of"),
        ({"late": "yes"}, "late='yes': expected True or False"),
        ({"dtype": "int8"}, "expected a floating-point dtype"),
        ({"where": ["("]}, "where"),
        ({"bottleneck_pattern": {"mlp": 0}}, "expected an integer of at least 1"),
    ],
)
def test_a_wrong_argument_is_one_clear_sentence(kwargs, message):
    with pytest.raises(ValueError, match=message):
        jpeft.adapter(**kwargs)


def test_a_pattern_of_no_sub_layer_and_a_missing_sub_layer():
    params = random(SHAPES)
    with pytest.raises(ValueError, match="'attn' matches none of the selected sub-la"):
        jpeft.adapter(2, bottleneck_pattern={"attn": 3})(KEY, params)
    with pytest.raises(ValueError, match="adapter: where='attention' matches no sub"):
        jpeft.adapter(2, where="attention")(KEY, params)
    with pytest.raises(TypeError, match="no merged value"):
        jpeft.merge(jpeft.adapter(2)(KEY, params))


# --- cost ----------------------------------------------------------------------------

COSTS = [
    Case(form="scan+remat"),
    Case("parallel", form="scan", gated=True, bias=False),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", slow_but(COSTS[:1], COSTS), ids=name_of)
def test_no_more_flops_or_temporaries_than_by_hand(case):
    fn, params, twin = built(case)
    trainable, frozen = adapted(case, fn, params)
    x = jax.random.normal(KEY, (8, 16, D))
    apply = jpeft.adapt(fn)
    square = lambda y: jnp.mean(jnp.square(y))

    def cost(f):
        program = jax.jit(jax.value_and_grad(f)).lower(trainable, frozen, x).compile()
        return (
            program.cost_analysis()["flops"],
            program.memory_analysis().temp_size_in_bytes,
        )

    ours = cost(lambda t, f, x: square(apply(jpeft.combine(t, f), x)))
    model = Net(case)

    def by_twin(t, f, x):
        whole = jpeft.combine(t, f)
        base = jpeft.unload(whole)
        hand = handed(whole, case)
        return square(model.apply({"params": base}, x, hand, rngs=RNGS))

    hand = cost(by_twin)
    assert 0 < ours[0] <= 1.02 * hand[0]
    assert 0 < ours[1] <= 1.02 * hand[1]


# --- where the output is -------------------------------------------------------------


def product(p, x):
    return jax.nn.gelu(x @ p["mlp"]["fc1"]) @ p["mlp"]["fc2"]


BIAS = lambda p: p["mlp"]["fc2_bias"][None, None]
LATE_BIASES = {
    "x + h w + b": lambda p, x: x + product(p, x) + BIAS(p),
    "b + (h w + x)": lambda p, x: BIAS(p) + (product(p, x) + x),
    "an einsum": lambda p, x: (
        x
        + jnp.einsum("btf,fd->btd", jax.nn.gelu(x @ p["mlp"]["fc1"]), p["mlp"]["fc2"])
        + BIAS(p)
    ),
    "in a loop": lambda p, x: jax.lax.scan(
        lambda c, _: (c + product(p, c) + BIAS(p), None), x, None, length=1
    )[0],
    "a stream that is a product": lambda p, x: (lambda y: y + product(p, y) + BIAS(p))(
        x @ jnp.eye(D)
    ),
}


def flat_mlp():
    rng = np.random.default_rng(5)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape) * 0.4, jnp.float32)
    return {"mlp": {"fc1": draw(D, F), "fc2": draw(F, D), "fc2_bias": draw(D)}}


def with_values(fn, params, *args, uses=True):
    """The tree with an adapter that does something, and its leaf."""
    known = jpeft.find_uses(fn, params, *args) if uses else None
    tree = jpeft.adapter(R, where="mlp")(KEY, params, uses=known)
    t, f = jpeft.partition(tree)
    tree = jpeft.combine(noisy(t), f)
    (leaf,) = [x for x in jax.tree.leaves(tree, is_leaf=is_leaf) if is_leaf(x)]
    return tree, leaf


def added(leaf, y):
    names = ("down", "down_bias", "up", "up_bias")
    return by_hand({n: getattr(leaf, n) for n in names}, y, jax.nn.gelu)


@pytest.mark.sample(3)
@pytest.mark.parametrize("how", LATE_BIASES)
@pytest.mark.parametrize("uses", [True, False])
def test_a_bias_after_the_residual_is_part_of_the_output_that_is_read(how, uses):
    fn, params = LATE_BIASES[how], flat_mlp()
    tree, leaf = with_values(fn, params, X, uses=uses)
    y = fn(params, X) - X
    got = jax.jit(jpeft.adapt(fn))(tree, X)
    np.testing.assert_allclose(got, X + y + added(leaf, y), rtol=1e-5, atol=1e-5)


def test_an_output_that_is_no_summand_of_its_own_is_refused():
    fn = lambda p, x: jax.jit(jnp.add)(x, product(p, x)) + BIAS(p)
    params = flat_mlp()
    tree, _ = with_values(fn, params, X)
    with pytest.raises(ValueError, match=r"mlp/fc2_bias: .* x \+ \(h @ w \+ b\)"):
        jpeft.adapt(fn)(tree, X)
    first = lambda p, x: x + (product(p, x) + BIAS(p))  # as it says
    assert jpeft.adapt(first)(with_values(first, params, X)[0], X).shape == X.shape


PADS = {
    "product": lambda y, m: y * m[..., None].astype(y.dtype),
    "where": lambda y, m: jnp.where(m[..., None], y, 0.0),
    "select": lambda y, m: jax.lax.select(
        jnp.broadcast_to(m[..., None], y.shape), y, jnp.zeros_like(y)
    ),
    "in a jit": lambda y, m: jax.jit(lambda y, m: y * m[..., None].astype(y.dtype))(
        y, m
    ),
    "after dropout": lambda y, m: (
        jnp.where(jax.random.bernoulli(KEY, KEEP, y.shape), y / KEEP, 0.0)
        * m[..., None].astype(y.dtype)
    ),
    "beside dropout": lambda y, m: (
        y * (m[..., None] & bernoulli(KEY, y.shape)).astype(y.dtype)
    ),
    "a constant": lambda y, m: y * jnp.asarray(MASK)[..., None].astype(y.dtype),
}
MASK = np.arange(5)[None] < np.array([[3], [5]])


@pytest.mark.sample(3)
@pytest.mark.parametrize("how", PADS)
def test_padded_positions_stay_zero(how):
    def fn(p, x, mask):
        return x + PADS[how](product(p, x) + BIAS(p), mask)

    mask = jnp.asarray(MASK)
    tree, _ = with_values(fn, flat_mlp(), X, mask)
    change = jpeft.adapt(fn)(tree, X, mask) - X
    assert not jnp.any(change[0, 3:]) and jnp.all(jnp.any(change[1] != 0, -1))


DROPS = {
    "where": lambda y, k: jnp.where(bernoulli(k, y.shape), y / KEEP, 0.0),
    "select": lambda y, k: jax.lax.select(
        bernoulli(k, y.shape), y / KEEP, jnp.zeros_like(y)
    ),
    "a whole branch": lambda y, k: y * bernoulli(k, (2, 1, 1)).astype(y.dtype) / KEEP,
    "uniform": lambda y, k: y * (jax.random.uniform(k, y.shape) < KEEP).astype(y.dtype),
    "an old key": lambda y, k: (
        y * bernoulli(jax.random.PRNGKey(1), y.shape).astype(y.dtype)
    ),
}


def bernoulli(key, shape):
    return jax.random.bernoulli(key, KEEP, shape)


@pytest.mark.parametrize("how", DROPS)
def test_a_mask_that_is_drawn_is_waited_for(how):
    fn = lambda p, x, k: x + DROPS[how](product(p, x) + BIAS(p), k)
    params, key = flat_mlp(), jax.random.key(8)
    tree, leaf = with_values(fn, params, X, key)
    y = fn(params, X, key) - X
    got = jpeft.adapt(fn)(tree, X, key)
    np.testing.assert_allclose(got, X + y + added(leaf, y), rtol=1e-5, atol=1e-5)


def test_what_has_no_merged_value_is_offered_none():
    def fn(p, x):
        groups = jnp.array([2, 2, 1])
        h = jax.lax.ragged_dot(x, p["experts"]["up_proj"], groups)
        return jax.lax.ragged_dot(jax.nn.relu(h), p["experts"]["down_proj"], groups)

    params = {"experts": {"up_proj": jnp.ones((3, D, F))}}
    params["experts"]["down_proj"] = jnp.ones((3, F, D))
    uses = jpeft.find_uses(fn, params, X[0])
    tree = jpeft.adapter(R, where="mlp")(KEY, params, uses=uses)
    for materialize in ("refuse", "allow"):
        with pytest.raises(
            jpeft.DensifyError, match="exclude='experts/down_proj'"
        ) as e:
            jpeft.adapt(fn, materialize=materialize)(tree, X[0])
        assert "materialize" not in str(e.value)
