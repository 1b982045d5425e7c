"""What each weight is to a model: by what the traced program does with it.

Nothing is computed here, models are only traced.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax

import jpeft
from jpeft.tree.layout import layouts
from jpeft.tree.paths import slots

D, EPS = 8, 1e-6
X = jnp.ones((2, 5, D))
T = jnp.array([0, 2])  # one task an example
IDS = jnp.array([[1, 2, 5, 1, 0], [10, 0, 2, 3, 3]])
PERM = np.array([0, 2, 4, 6, 1, 3, 5, 7])


def a(*shape):
    return jnp.ones(shape)


def kinds(fn, params, *args):
    return {p: u.kind for p, u in jpeft.find_uses(fn, params, *args).items()}


# --- norms: what scales a normalised value, whatever it is called --------------------


def flax_norm(x, g, c):  # the scale meets the root first
    mean = jnp.mean(x, -1, keepdims=True)
    var = jnp.maximum(jnp.mean(x * x, -1, keepdims=True) - mean * mean, 0.0)
    return (x - mean) * (lax.rsqrt(var + EPS) * g) + c


def one_vector(x, g, c):
    h = (x - x.mean()) / jnp.sqrt(x.var() + EPS)
    return g * h + c


@jax.custom_vjp
def with_a_rule(x, g):
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + EPS) * g


with_a_rule.defvjp(lambda x, g: (with_a_rule(x, g), x), lambda x, y: (y, y.sum((0, 1))))


def of_groups(x, g, c):
    h = x.reshape(*x.shape[:-1], 2, 4)
    h = (h - h.mean(-1, keepdims=True)) / (h.std(-1, keepdims=True) + EPS)
    return h.reshape(x.shape) * g + c


def in_bfloat16(x, g, c):
    h = x.astype(jnp.float32)
    h = h * (jnp.mean(h**2, -1, keepdims=True) + EPS) ** -0.5
    return h.astype(jnp.bfloat16) * (1 + g.astype(jnp.bfloat16)) + c.astype("bfloat16")


def squares_by_a_product(x, g, c):
    n = jnp.einsum("btd,btd->bt", x, x)[..., None] / D
    return x / jnp.sqrt(n + EPS) * g + c


NORMS = {
    "the scale on the root": flax_norm,
    "one vector, mapped": lambda x, g, c: jax.vmap(
        jax.vmap(one_vector, (0, None, None)), (0, None, None)
    )(x, g, c),
    "one vector": lambda x, g, c: one_vector(x[0, 0], g, c),
    "a gradient of its own": lambda x, g, c: with_a_rule(x, g) + c,
    "rematerialised": jax.checkpoint(flax_norm),
    "groups": of_groups,
    "a scale that starts at zero": in_bfloat16,
    "squares by a product": squares_by_a_product,
    "length one": lambda x, g, c: (
        x / jnp.linalg.norm(x, axis=-1, keepdims=True) * g + c
    ),
    "jax.nn": lambda x, g, c: g * jax.nn.standardize(x) + c,
    "over the batch": lambda x, g, c: (
        (x - x.mean((0, 1))) * lax.rsqrt(x.var((0, 1)) + EPS) * g + c
    ),
}


@pytest.mark.parametrize("name", NORMS)
def test_what_scales_a_normalised_value_is_a_norm(name):
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        fn = lambda p, x: NORMS[name](x, p["u"], p["v"]) @ p["w"]
        params = {"u": a(D), "v": a(D), "w": a(D, 3)}
        uses = jpeft.find_uses(fn, params, X)
    assert {p: u.kind for p, u in uses.items()} == {
        "u": "norm",
        "v": "bias",
        "w": "linear",
    }
    assert uses["v"].of_norm


def test_a_norm_of_each_head_and_one_of_each_layer():
    def fn(p, x):
        def body(x, w):
            q = (x @ w["q"]).reshape(*x.shape[:-1], 2, 4)
            q = q * lax.rsqrt(jnp.mean(q * q, -1, keepdims=True) + EPS)
            q = q * w["a"][None, None] + w["c"][None, None]
            return x + q.reshape(x.shape) @ w["o"] + w["e"][None, None], None

        x = lax.scan(body, x, p["layers"])[0]
        return lax.fori_loop(
            0, 3, lambda k, x: flax_norm(x, jnp.take(p["g"], k, axis=0), 0.0), x
        )

    layers = {n: a(3, D, D) for n in "qo"} | {"e": a(3, D)}
    layers |= {"a": a(3, 2, 4), "c": a(3, 2, 4)}
    with jax.numpy_rank_promotion("allow"):
        got = kinds(fn, {"layers": layers, "g": a(3, D)}, X)
    assert got == {
        "layers/a": "norm",
        "layers/c": "bias",
        "layers/e": "bias",
        "layers/q": "linear",
        "layers/o": "linear",
        "g": "norm",
    }


# --- what is no norm and no bias -----------------------------------------------------


def rms(x, g):
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + EPS) * g


OTHERS = {
    "a skip of a state": lambda x, w, v: x + rms(x, 1.0) @ w + jnp.cumsum(x, 1) * v,
    "a scale of a layer": lambda x, w, v: x + (x @ w) * v,
    "a scale of a layer with a bias": lambda x, w, v: x + (x @ w + 1.0) * v,
    "a second scale": lambda x, w, v: rms(x, w[0]) * v,
    "a mix with the last token": lambda x, w, v: (x * v + (1 - v) * (2 * x)) @ w,
    "a bonus of the present token": lambda x, w, v: (
        lambda k: jnp.exp(v + k) + jnp.exp(k)
    )(x @ w),
    "a type added to the input": lambda x, w, v: (x + v) @ w,
    "a type added to both": lambda x, w, v: x @ w + w @ v + v,
    "a shifted input": lambda x, w, v: (x - v) @ w,
    "a decay": lambda x, w, v: jnp.exp(-jnp.exp(v)) * (x @ w),
    "a length of a weight": lambda x, w, v: x @ (w * (v / jnp.linalg.norm(w, axis=0))),
    "a length and a product": lambda x, w, v: x @ w / jnp.linalg.norm(w, axis=0) / v,
    "a running variance": lambda x, w, v: (x @ w) * lax.rsqrt(v + EPS),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_vectors_are_neither_norm_nor_bias(name):
    with jax.numpy_rank_promotion("allow"):
        fn = lambda p, x: OTHERS[name](x, p["w"], p["v"])
        got = kinds(fn, {"w": a(D, D), "v": a(D)}, X)
    assert got["v"] == "other"


def test_names_decide_where_the_use_leaves_a_doubt():
    """Nobody knows whether what enters was normalised, or is a product."""
    with jax.numpy_rank_promotion("allow"):
        fn = lambda p, x: x * p["gain"] * p["D"] + p["offset_1"] + p["modality"]
        got = kinds(fn, {n: a(D) for n in ("gain", "D", "offset_1", "modality")}, X)
    assert got == {
        "gain": "norm",
        "D": "other",
        "offset_1": "bias",
        "modality": "other",
    }
    with jax.numpy_rank_promotion("allow"):
        fn = lambda p, x: x @ p["w"] + p["modality"]
        assert kinds(fn, {"w": a(D, D), "modality": a(D)}, X)["modality"] == "other"


# --- biases --------------------------------------------------------------------------


def gates(x, w, v):
    def step(h, x):
        h = jnp.tanh(x @ w + h @ w + v)
        return h, h

    return lax.scan(step, x[:, 0], jnp.moveaxis(x, 1, 0))[1]


BIASES = {
    "of a product": lambda x, w, v: x @ w + v,
    "after the residual": lambda x, w, v: x + jax.nn.relu(x) @ w + v,
    "of a part of a sum": lambda x, w, v: x @ w + jnp.tanh(x) @ w + v,
    "of heads": lambda x, w, v: (
        jnp.einsum("btd,dhf->bthf", x, w.reshape(D, 2, 4)) + v.reshape(2, 4)
    ),
    "of a convolution": lambda x, w, v: (
        lax.conv_general_dilated(
            x, w[None], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )
        + v
    ),
    "of a cast product": lambda x, w, v: (
        (x.astype("bfloat16") @ w.astype("bfloat16")) + v.astype("bfloat16")
    ),
    "in a jit": lambda x, w, v: jax.jit(lambda x: x @ w + v)(x),
    "in a loop": gates,
    "of a network over positions": lambda x, w, v: x + jnp.sin(w[:5] @ w + v) @ w,
}


@pytest.mark.parametrize("name", BIASES)
def test_what_is_added_to_a_product_is_a_bias(name):
    with jax.numpy_rank_promotion("allow"):
        fn = lambda p, x: BIASES[name](x, p["w"], p["v"])
        uses = jpeft.find_uses(fn, {"w": a(D, D), "v": a(D)}, X)
    assert uses["v"].kind == "bias" and not uses["v"].of_norm
    assert uses["v"].late == (name == "after the residual")
    assert uses["w"].bias == "v"


def test_each_weight_knows_its_own_bias():
    def fn(p, x):
        q, k = (x @ p["w" + n] + p["b" + n] for n in "qk")
        return x + (q * k) @ p["wo"] + p["shared"]

    names = {n: a(D, D) for n in ("wq", "wk", "wo")}
    params = names | {n: a(D) for n in ("bq", "bk", "shared")}
    with jax.numpy_rank_promotion("allow"):
        uses = jpeft.find_uses(fn, params, X)
    found = {n: uses[n].bias for n in names}
    assert found == {"wq": "bq", "wk": "bk", "wo": "shared"}
    # The transform may be called one level below, or above, of what was traced.
    above = lambda p, x: fn(p["params"], x)
    with jax.numpy_rank_promotion("allow"):
        one_more = jpeft.find_uses(above, {"params": params}, X)
    assert layouts(slots(params), one_more)["wq"].bias == "bq"
    assert layouts(slots({"params": params}), uses)["params/wq"].bias == "params/bq"


def test_a_bias_of_another_module_is_no_part_of_the_norm_before_it():
    fn = lambda p, x: rms(x, p["norm"]["g"][None, None]) + p["head"]["c"][None, None]
    uses = jpeft.find_uses(fn, {"norm": {"g": a(D)}, "head": {"c": a(D)}}, X)
    assert uses["head/c"].kind == "bias" and not uses["head/c"].of_norm


def test_a_bias_beside_a_quantised_weights_scale_is_of_no_norm():
    fn = lambda p, x: (x @ p["q"]) * p["scale"][None, None] + p["bias"][None, None]
    params = {"q": a(D, D), "scale": a(D), "bias": a(D)}
    for known in (jpeft.find_uses(fn, params, X), layouts(slots(params), None)):
        assert known["bias"].kind == "bias" and not known["bias"].of_norm


def test_a_products_bias_beside_its_scale_is_of_no_norm():
    at = lambda v: v[None, None]
    fn = lambda p, x: (x @ p["w"]) * at(p["m"]["scale"]) + at(p["m"]["bias"])
    uses = jpeft.find_uses(fn, {"w": a(D, D), "m": {"scale": a(D), "bias": a(D)}}, X)
    assert uses["m/bias"].kind == "bias" and not uses["m/bias"].of_norm


def test_a_bias_repeated_for_the_tokens_of_each_expert():
    def fn(p, x):
        sizes = jnp.bincount(jnp.argmax(x @ p["router"], -1), length=3)
        up, c = (jax.lax.ragged_dot(x, p["up"], sizes), p["c"])
        return up + jnp.repeat(c, sizes, axis=0, total_repeat_length=5)

    params = {"router": a(D, 3), "up": a(3, D, 6), "c": a(3, 6)}
    assert kinds(fn, params, X[0])["c"] == "bias"


def test_a_bias_is_known_by_a_flat_name_without_uses():
    params = {
        "w1": a(D, 12),
        "b1": a(12),
        "up_proj": a(D, 12),
        "up_proj_bias": a(12),
        "out_kernel": a(12, D),
        "out_bias": a(D),
        "wo": a(D, D),
        "bo": a(3),  # of no size that fits
    }
    known = layouts(slots(params), None)
    assert {p: u.bias for p, u in known.items() if u.bias} == {
        "w1": "b1",
        "up_proj": "up_proj_bias",
        "out_kernel": "out_bias",
    }
    assert [p for p, u in known.items() if u.kind == "bias"] == [
        *("b1", "out_bias", "up_proj_bias")
    ]


# --- statistics ----------------------------------------------------------------------


def batch_norm(x, mean, var, scale, bias):
    return (x - mean) * lax.rsqrt(var + 1e-5) * scale + bias


@pytest.mark.parametrize(
    "names", [("mean", "var"), ("running_mean", "running_var"), ("m", "s2")]
)
@pytest.mark.parametrize("training", [False, True])
def test_running_statistics_are_neither_biases_nor_scales(names, training):
    def fn(p, x):
        b, (m, v) = p["bn"], (p["bn"][n] for n in names)
        x = x @ p["w"]
        if training:
            mean, var = x.mean((0, 1)), x.var((0, 1))
            new = 0.9 * m + 0.1 * mean, 0.9 * v + 0.1 * var
            return batch_norm(x, mean, var, b["scale"], b["bias"]), new
        return batch_norm(x, m, v, b["scale"], b["bias"])

    bn = {n: a(D) for n in (*names, "scale", "bias")}
    with jax.numpy_rank_promotion("allow"):
        uses = jpeft.find_uses(fn, {"bn": bn, "w": a(D, D)}, X)
    for known in (uses, layouts(slots({"bn": bn, "w": a(D, D)}), None)):
        got = {p: u.kind for p, u in known.items()}
        assert got == {
            "bn/bias": "bias",
            "bn/scale": "norm",
            **{f"bn/{n}": "other" for n in names},
            "w": "linear",
        }
        assert known["bn/bias"].of_norm


def test_statistics_of_flax_and_haiku_do_not_train():
    class Net(nnx.Module):
        def __init__(self, r):
            self.l1, self.first = nnx.Linear(D, 4, rngs=r), nnx.BatchNorm(4, rngs=r)

        def __call__(self, x):
            return self.first(self.l1(x))

    graph, state = nnx.split(Net(nnx.Rngs(0)))
    uses = jpeft.find_uses(lambda s, x: nnx.merge(graph, s)(x), state, X)
    for known in (None, uses):
        trained = [m.targets(slots(state), known) for m in (BITFIT, NORMS_TRAIN)]
        assert [list(t) for t in trained] == [
            ["first/bias", "l1/bias"],
            ["first/bias", "first/scale"],
        ]

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=True, name="n1")(nn.Dense(3)(x))

    variables = jax.eval_shape(lambda: Linen().init(jax.random.key(0), X))
    uses = jpeft.find_uses(Linen().apply, variables, X)
    for known in (None, uses):
        trained = [*BITFIT.targets(slots(variables), known)]
        assert trained == ["params/Dense_0/bias", "params/n1/bias"]
        trained = [*NORMS_TRAIN.targets(slots(variables), known)]
        assert trained == ["params/n1/bias", "params/n1/scale"]
    everything = jpeft.diff_pruning().targets(slots(variables), uses)
    assert [p for p in everything if "params/" not in p] == []
    ema = {"net/batch_norm/~/mean_ema": {"average": a(3), "hidden": a(3)}}
    haiku = {
        "params": {"net/batch_norm": {"scale": a(3), "offset": a(3)}},
        "state": ema,
    }
    known = layouts(slots(haiku), None)
    assert [p for p, u in known.items() if u.kind in ("bias", "norm")] == [
        "params/net/batch_norm/offset",
        "params/net/batch_norm/scale",
    ]


BITFIT, NORMS_TRAIN = jpeft.bitfit(), jpeft.norm_tuning()


# --- rows and features that are picked -----------------------------------------------


def test_rows_of_a_norm_or_a_bias_are_no_embedding():
    def fn(p, x, t):
        h = rms(x, p["u"][t][:, None]) + p["shift"][t][:, None]
        h = rms(x + h @ p["w"], 1 + p["y"][t][:, None])
        ids = jnp.argmax(h @ p["router"], -1)
        return jnp.einsum("btd,btdf->btf", h, p["up"][ids]) + p["c"][ids]

    params = {"u": a(4, D), "shift": a(4, D), "y": a(4, D), "w": a(D, D)}
    params |= {"router": a(D, 3), "up": a(3, D, 6), "c": a(3, 6)}
    with jax.numpy_rank_promotion("allow"):
        got = kinds(fn, params, X, T)
    assert got == {
        **{"u": "norm", "shift": "bias", "y": "norm", "w": "linear"},
        **{"router": "linear", "up": "linear", "c": "bias"},
    }


def test_rows_that_the_text_chooses_stay_embeddings():
    """Also where they are added to a product, as value embeddings are."""

    def fn(p, ids):
        x = p["wte"][ids] + p["wpe"][jnp.arange(5)]
        return x @ p["wv"] + p["values"][ids]

    params = {"wte": a(11, D), "wpe": a(5, D), "wv": a(D, D), "values": a(11, D)}
    with jax.numpy_rank_promotion("allow"):
        got = kinds(fn, params, IDS)
    assert got == {
        **{"wte": "embedding", "wpe": "embedding"},
        **{"wv": "linear", "values": "embedding"},
    }


PICKED = {
    "columns": lambda x, w: x @ w[:, PERM],
    "rows": lambda x, w: x @ w[PERM],
    "some columns": lambda x, w: x @ jnp.take(w, jnp.array([1, 3]), axis=1),
    "turned": lambda x, w: x @ w[::-1, ::2],
    "by an array of the tree": lambda x, w, keep: x @ w[:, keep],
    "turned over first": lambda x, w: x @ w.T[PERM].T,
    "and a bias with it": lambda x, w: x @ w[:, PERM],
}


@pytest.mark.parametrize("name", PICKED)
def test_features_in_another_order_are_a_kernel_still(name):
    fn, more = PICKED[name], {}
    if "array" in name:
        more = {"keep": jnp.array(PERM)}
    model = lambda p, x: fn(x, p["w"], *(p[n] for n in more))
    uses = jpeft.find_uses(model, {"w": a(D, D), **more}, X)
    assert (uses["w"].kind, uses["w"].axes) == ("linear", "io")


def test_features_of_a_stack_in_another_order():
    fn = lambda p, x: jnp.einsum("btd,edf->ebtf", x, p["w"][..., PERM])
    assert jpeft.find_uses(fn, {"w": a(3, D, D)}, X)["w"].axes == "oio"
    bias = lambda p, x: x @ p["w"][:, PERM] + p["v"][PERM][None, None]
    got = jpeft.find_uses(bias, {"w": a(D, D), "v": a(D)}, X)
    assert got["v"].kind == "bias" and got["w"].bias == "v"


# --- what is computed from weights alone ---------------------------------------------


def test_latents_and_what_a_norm_makes_of_them_are_no_kernels():
    def fn(p, x):
        latents = rms(p["latents"], p["u"][None]) + p["c"][None]
        q = latents @ p["q"] + p["v"][None]
        plain = p["queries"] @ p["q2"]
        s = jax.nn.softmax(jnp.einsum("nd,btd->bnt", q + plain, x @ p["k"]))
        return jnp.einsum("bnt,btd->bnd", s, x) @ p["o"]

    params = {n: a(D, D) for n in ("q", "q2", "k", "o")}
    params |= {"latents": a(4, D), "queries": a(4, D)}
    params |= {n: a(D) for n in "ucv"}
    got = kinds(fn, params, X)
    linear = {n: "linear" for n in ("q", "q2", "k", "o")}
    assert {n: got[n] for n in linear} == linear
    assert (got["latents"], got["queries"], got["v"]) == ("other", "other", "bias")
    assert (got["u"], got["c"]) == ("norm", "bias")
    jpeft.lora(rank=2)(jax.random.key(0), params, uses=jpeft.find_uses(fn, params, X))


def test_a_row_written_changes_a_weight_and_a_sum_makes_none():
    x = X[0]
    written = lambda p, x: x @ p["w"].at[2].set(x[0])
    use = jpeft.find_uses(written, {"w": a(D, D)}, x)["w"]
    assert use.kind == "linear" and "the model changes it" in use.doubt
    summed = lambda p, x: (x + p["table"]) @ p["w"]
    params = {"table": a(*x.shape), "w": a(D, D)}
    assert kinds(summed, params, x) == {"table": "other", "w": "linear"}


def test_a_changed_weight_may_be_named_and_then_gives_its_full_value():
    def fn(p, x):
        w = p["w"] * (p["v"] / jnp.linalg.norm(p["w"], axis=0))[None]
        return x @ w

    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(D, 6)), "float32"), "v": a(6)}
    uses = jpeft.find_uses(fn, params, X)
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="name it in where= and call jpeft.adapt"):
        jpeft.lora(rank=2)(key, params, uses=uses)
    tree = jpeft.lora(rank=2, where="w")(key, params, uses=uses)
    t, f = jpeft.partition(tree)
    tree = jpeft.combine(jax.tree.map(lambda z: z + 0.1, t), f)
    with pytest.raises(jpeft.DensifyError, match='materialize="allow"'):
        jpeft.adapt(fn)(tree, X)
    with pytest.warns(jpeft.DensifyWarning):
        got = jpeft.adapt(fn, materialize="allow")(tree, X)
    np.testing.assert_allclose(got, fn(jpeft.merge(tree), X), rtol=1e-5)
