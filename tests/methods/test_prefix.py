"""Prefix tuning in mode "kv": equal to keys and values put before the real ones."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from draws import normal
from flax import nnx
from models import attention as A
from speed import slow_but

import jpeft
from jpeft.leaves.prefix import Prefix
from jpeft.tree.paths import slots

LENGTH = 5
KEY = jax.random.key(0)
GROUPED = ("jax", "repeat", "grouped", "window", "bias")
CASES = [
    ("jax", "half"),
    ("jax", "rotate_half"),
    ("jax", "partial"),
    ("repeat", "half"),
    ("repeat", "interleaved"),
    ("grouped", "rotate_half"),
    ("folded", "rotate_half"),
    ("norms", "half"),
    ("window", "half"),
    ("bias", "half"),
    ("mla", "half"),
    ("fused", "rotate_half"),
    ("fused_flat", "rotate_half"),
    ("fused_heads", "rotate_half"),
]


def groups(kind):
    return A.GROUPS if kind in GROUPED else A.HEADS


def learned(kind, length=LENGTH, dtype=jnp.float32):
    """(keys, values), (layers, length, heads, head) each."""
    shape = (A.LAYERS, length, groups(kind), A.HEAD)
    return tuple(
        jax.random.normal(jax.random.fold_in(KEY, k), shape, dtype) for k in (1, 2)
    )


def put(params, prefix):
    """The tree with these learned keys and values."""
    keys, values = prefix
    flat = slots(params)

    def one(path, x):
        if not isinstance(x, Prefix):
            return x
        layer = None if path.startswith("layers/") else int(path[len("layer_")])
        mine = lambda t: t if layer is None else t[layer]
        rows = lambda t: mine(t).reshape(*mine(t).shape[:-2], -1)
        return x.replace(
            keys=None if x.keys is None else rows(keys),
            values=None if x.values is None else rows(values),
        )

    return flat.rebuild(one(p, x) for p, x in flat.items())


def both(kind, style, mode, **options):
    """(ours, by hand): functions of (keys, values)."""
    module, params = A.model(kind, style, mode, **options)
    heads = A.HEADS if kind == "fused_heads" else None
    adapted = jpeft.prefix(LENGTH, heads=heads)(KEY, params)
    apply = lambda p, prefix=None: module.apply({"params": p}, A.IDS, A.PAD, prefix)
    ours = lambda prefix: jpeft.adapt(apply)(put(adapted, prefix))
    return ours, lambda prefix: apply(params, prefix)


def value_and_grads(f, prefix):
    """(logits, gradients) of one compiled program."""

    def loss(p):
        out = f(p)
        return jnp.sum(jnp.square(out) * A.PAD[..., None].astype(out.dtype)), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(prefix)
    return out, grads


def assert_same(got, want):
    np.testing.assert_allclose(got[0], want[0], atol=2e-5, rtol=1e-5)
    for g, w in zip(got[1], want[1], strict=True):
        np.testing.assert_allclose(g, w, atol=1e-5 * float(jnp.max(jnp.abs(w))))


QUICK = {
    ("jax", "half", "scan remat"),
    ("repeat", "interleaved", "scan remat"),
    ("folded", "rotate_half", ""),
    ("mla", "half", ""),
    ("fused_flat", "rotate_half", "scan remat"),
}
EVERY = [(*c, "scan remat" if k % 4 == 0 else "") for k, c in enumerate(CASES)]


@pytest.mark.sample(1)
@pytest.mark.parametrize("case", slow_but(QUICK, EVERY))
def test_equals_keys_and_values_put_before_the_real_ones(case):
    kind, style, mode = case
    ours, hand = both(kind, style, mode)
    prefix = learned(kind)
    assert_same(value_and_grads(ours, prefix), value_and_grads(hand, prefix))


@pytest.mark.parametrize(
    "shapes",
    [
        {"qkv": (8, 24), "out": (8, 8)},
        {"q": (8, 2, 4), "kv": (8, 2, 2, 4), "out": (2, 4, 8)},
        {"q": (8, 8), "k": (8, 8), "v": (8, 8), "out": (8, 8)},
    ],
    ids=["all three", "keys and values", "apart"],
)
def test_a_fused_kernel_makes_keys_and_values_of_its_own_columns(shapes):
    attn = {n: {"kernel": jnp.ones(s)} for n, s in shapes.items()}
    made = jpeft.prefix(LENGTH)(KEY, {"attn": attn})["attn"]
    rows = lambda x: [n for n in ("keys", "values") if getattr(x, n, None) is not None]
    found = {n: (rows(x["kernel"]), x["kernel"]) for n, x in made.items()}
    for names, leaf in found.values():
        assert all(getattr(leaf, n).shape == (LENGTH, 8) for n in names)
    want = {"k": ["keys"], "v": ["values"]}
    want |= dict.fromkeys(("qkv", "kv"), ["keys", "values"])
    assert {n: names for n, (names, _) in found.items()} == {
        n: want.get(n, []) for n in shapes
    }


# ------------------------------------------------------------------- other attentions


def rows(shape, *ks):
    return tuple(0.5 * jax.random.normal(jax.random.fold_in(KEY, k), shape) for k in ks)


def flax_attention(**options):
    """(module, params) of Flax's own attention, biases moved."""
    module = nn.MultiHeadDotProductAttention(A.HEADS, **options)
    x = jnp.zeros((2, 7, A.WIDTH))
    params = module.init(jax.random.key(0), x)["params"]
    return module, jax.tree.map(lambda p: p + 0.1, params)


def reference(params, x, y, prefix, mask):
    """Attention over concatenated keys and values, in float64."""
    f64 = lambda t: np.asarray(t, np.float64)
    p = jax.tree.map(f64, params)
    project = lambda t, n: np.einsum("bsd,dhe->bshe", t, p[n]["kernel"]) + p[n]["bias"]
    q, k, v = (project(f64(t), n) for t, n in ((x, "query"), (y, "key"), (y, "value")))
    k, v = (
        np.concatenate([np.broadcast_to(f64(r), (len(t), *r.shape)), t], 1)
        for r, t in zip(prefix, (k, v), strict=True)
    )
    s = np.einsum("bqhe,bkhe->bhqk", q, k) / np.sqrt(A.HEAD)
    mask = np.concatenate([np.ones((*mask.shape[:-1], LENGTH), bool), mask], -1)
    s = np.where(mask, s, -np.inf)
    w = np.exp(s - s.max(-1, keepdims=True))
    o = np.einsum("bhqk,bkhe->bqhe", w / w.sum(-1, keepdims=True), v)
    return np.einsum("bqhe,hed->bqd", o, p["out"]["kernel"]) + p["out"]["bias"]


def with_rows(params, prefix, **options):
    adapted = jpeft.prefix(LENGTH, where="attn", **options)(KEY, {"attn": params})
    keys, values = (r.reshape(LENGTH, -1) for r in prefix)
    attn = adapted["attn"]
    attn["key"]["kernel"] = attn["key"]["kernel"].replace(keys=keys)
    attn["value"]["kernel"] = attn["value"]["kernel"].replace(values=values)
    return attn


X = normal(6, 2, 7, A.WIDTH)
CAUSAL = np.tril(np.ones((7, 7), bool))[None, None]


@pytest.mark.sample(2)
@pytest.mark.parametrize("options", [{}, {"force_fp32_for_softmax": True}])
@pytest.mark.parametrize("crossed", [False, True])
def test_flax_attention_equals_the_formula_in_float64(options, crossed):
    module, params = flax_attention(**options)
    prefix = rows((LENGTH, A.HEADS, A.HEAD), 1, 2)
    adapted = with_rows(params, prefix)
    y = X[:, ::-1] * 0.5 if crossed else X
    fn = lambda p: module.apply({"params": p}, X, y, mask=jnp.asarray(CAUSAL))
    got = jax.jit(jpeft.adapt(fn))(adapted)
    want = reference(params, X, y, prefix, CAUSAL)
    np.testing.assert_allclose(got, want, atol=2e-6)


@pytest.mark.slow
def test_flax_attention_in_a_scan():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + nn.MultiHeadDotProductAttention(A.HEADS, name="attn")(x), None

    stack = nn.scan(
        Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2
    )()
    params = stack.init(jax.random.key(0), X, None)["params"]
    uses = jpeft.find_uses(lambda p: stack.apply({"params": p}, X, None)[0], params)
    adapted = jpeft.prefix(LENGTH, init="unit")(KEY, params, uses=uses)
    got = jpeft.adapt(lambda p: stack.apply({"params": p}, X, None)[0])(adapted)
    x, one = X, lambda t: t.reshape(LENGTH, A.HEADS, A.HEAD)
    for k in range(2):
        mine = jax.tree.map(lambda p: p[k], params)["attn"]  # noqa: B023
        attn = adapted["attn"]
        prefix = (
            one(attn["key"]["kernel"].keys[k]),
            one(attn["value"]["kernel"].values[k]),
        )
        x = x + reference(mine, x, x, prefix, np.ones((1, 1, 7, 7), bool))
    np.testing.assert_allclose(got, x, atol=2e-5)


@pytest.mark.slow
def test_nnx_attention_equals_the_formula():
    module = nnx.MultiHeadAttention(A.HEADS, A.WIDTH, decode=False, rngs=nnx.Rngs(0))
    graph, params = nnx.split(module)
    prefix = rows((LENGTH, A.HEADS, A.HEAD), 1, 2)
    uses = jpeft.find_uses(lambda p: nnx.merge(graph, p)(X), params)
    where = "attention: (query|)/?query/kernel key/kernel value/kernel -> out/kernel"
    adapted = jpeft.prefix(LENGTH, where=where)(KEY, params, uses=uses)
    put = lambda leaf, name, x: leaf.replace(
        **{name: jax.tree.map(lambda _: x.reshape(LENGTH, -1), getattr(leaf, name))}
    )
    adapted["key"]["kernel"] = put(adapted["key"]["kernel"], "keys", prefix[0])
    adapted["value"]["kernel"] = put(adapted["value"]["kernel"], "values", prefix[1])
    got = jpeft.adapt(lambda p: nnx.merge(graph, p)(X))(adapted)
    plain = {
        n: {k: v[...] for k, v in params[n].items()}
        for n in ("query", "key", "value", "out")
    }
    want = reference(plain, X, X, prefix, np.ones((1, 1, 7, 7), bool))
    np.testing.assert_allclose(got, want, atol=2e-6)


# --------------------------------------------------------------------------- decoding


@pytest.mark.slow
def test_single_token_steps_with_a_cache_equal_the_whole_text():
    """Flax's cache: what is read from it owes the prefix, which takes no slot."""
    module, params = flax_attention(decode=True)
    whole, _ = flax_attention()
    adapted = with_rows(params, rows((LENGTH, A.HEADS, A.HEAD), 1, 2))
    want = jpeft.adapt(
        lambda p: whole.apply({"params": p}, X, mask=jnp.asarray(CAUSAL))
    )(adapted)
    cache = module.init(jax.random.key(0), X)["cache"]

    @jax.jit
    def step(p, cache, x):
        fn = lambda p: module.apply({"params": p, "cache": cache}, x, mutable=["cache"])
        return jpeft.adapt(fn)(p)

    for k in range(7):
        got, state = step(adapted, cache, X[:, k : k + 1])
        cache = state["cache"]
        assert cache["cached_key"].shape[1] == 7
        np.testing.assert_allclose(got[:, 0], want[:, k], atol=2e-6)
    assert step._cache_size() == 1


@pytest.mark.slow
def test_prefill_then_single_tokens():
    """A cache that takes many positions at once, written by hand."""
    w = {
        n: {"kernel": jax.random.normal(jax.random.fold_in(KEY, k), (8, 2, 4))}
        for k, n in enumerate(("query", "key", "value"))
    }
    w["out"] = {"kernel": jnp.ones((2, 4, 8))}
    x = jax.random.normal(KEY, (1, 7, 8))

    def fn(p, x, cache, start):
        project = lambda n: jnp.einsum("bsd,dhe->bshe", x, p["attn"][n]["kernel"])
        q, k, v = map(project, ("query", "key", "value"))
        k, v = (
            jax.lax.dynamic_update_slice(c, new, (0, start, 0, 0))
            for c, new in zip(cache, (k, v), strict=True)
        )
        s = jnp.einsum("bqhe,bkhe->bhqk", q, k)
        at = start + jnp.arange(x.shape[1])
        s = jnp.where((at[:, None] >= jnp.arange(7)[None])[None, None], s, -1e9)
        o = jnp.einsum("bhqk,bkhe->bqhe", jax.nn.softmax(s), v)
        return jnp.einsum("bqhe,hed->bqd", o, p["attn"]["out"]["kernel"]), (k, v)

    params = jpeft.prefix(LENGTH, init="unit")(KEY, {"attn": w})
    empty = tuple(jnp.zeros((1, 7, 2, 4)) for _ in range(2))
    apply = jpeft.adapt(fn)
    want, _ = apply(params, x, empty, 0)
    got, cache = apply(params, x[:, :4], empty, 0)
    np.testing.assert_allclose(got, want[:, :4], atol=1e-5)
    for k in range(4, 7):
        got, cache = apply(params, x[:, k : k + 1], cache, k)
        np.testing.assert_allclose(got[:, 0], want[:, k], atol=1e-5)


# ----------------------------------------------------------- tasks, networks, a start


@pytest.mark.slow
def test_each_example_has_the_prefix_of_its_task():
    module, params = A.model("grouped", "rotate_half", "scan remat")
    apply = jpeft.adapt(lambda p, ids: module.apply({"params": p}, ids))
    tasks = jpeft.prefix(LENGTH, tasks=3, init="unit")(KEY, params)
    ids = jax.random.randint(KEY, (4, 7), 0, A.VOCAB)
    which = jnp.array([2, 0, 2, 1])
    got = jax.jit(apply)(jpeft.select(tasks, which), ids)
    for k, task in enumerate(which):
        alone = jpeft.select(tasks, task[None])
        want = apply(alone, ids[k : k + 1])
        np.testing.assert_allclose(got[k : k + 1], want, atol=2e-5)


@pytest.mark.slow
def test_select_says_what_is_wrong():
    module, params = A.model()
    tasks = jpeft.prefix(LENGTH, tasks=3)(KEY, params)
    apply = jpeft.adapt(lambda p: module.apply({"params": p}, A.IDS))
    with pytest.raises(ValueError, match="holds 3 tasks; say which one"):
        apply(tasks)
    with pytest.raises(ValueError, match="ids from 0 to 3, but there are 3 adapters"):
        jpeft.select(tasks, jnp.array([0, 3]))
    ids = jnp.array([0, 3])
    with pytest.raises(ValueError, match="from 0 to 3"):  # a constant of a program
        jax.eval_shape(lambda: jpeft.select(tasks, ids))
    with pytest.raises(ValueError, match="expected integers of shape"):
        jpeft.select(tasks, jnp.array([0.5]))
    with pytest.raises(ValueError, match="no leaf of this tree holds several"):
        jpeft.select(jpeft.prefix(LENGTH)(KEY, params), jnp.array([0, 0]))
    with pytest.raises(ValueError, match="1 task ids were selected"):
        apply(jpeft.select(tasks, jnp.array([0])))


@pytest.mark.slow
@pytest.mark.parametrize(("network", "mode"), [("mlp", ""), ("lstm", "scan remat")])
def test_a_network_is_shared_and_dropped_after_the_training(network, mode, tmp_path):
    module, params = A.model(mode=mode)
    transform = jpeft.prefix(LENGTH, reparametrization=network, width=6)
    made = transform(KEY, params)
    holders = [x for x in slots(made).values if getattr(x, "w1", None) is not None]
    assert len(holders) == 1 and holders[0].embedding.shape == (LENGTH, A.WIDTH)
    apply = jax.jit(jpeft.adapt(lambda p: module.apply({"params": p}, A.IDS)))
    grads = jax.jit(
        jax.grad(
            lambda t, f: jnp.sum(
                jpeft.adapt(lambda p: module.apply({"params": p}, A.IDS))(
                    jpeft.combine(t, f)
                )
            )
        )
    )(*jpeft.partition(made))
    assert all(float(jnp.max(jnp.abs(g))) > 0 for g in jax.tree.leaves(grads))
    done = jpeft.finalize(made)
    assert all(
        not hasattr(x, "w1") for x in slots(done).values if jpeft.leaf.is_leaf(x)
    )
    np.testing.assert_allclose(apply(done), apply(made), atol=1e-5)
    features = A.LAYERS * LENGTH * 2 * A.GROUPS * A.HEAD
    assert jpeft.count(done).trainable == features
    jpeft.save(tmp_path / "a", done, transform)
    again = jpeft.load(tmp_path / "a", params)
    np.testing.assert_array_equal(apply(again), apply(done))


def test_first_values_are_as_wide_as_they_should_be():
    w = {"kernel": jnp.ones((64, 64))}
    tree = {"attn": dict.fromkeys(("q", "k", "v", "out"), w)}
    for init, std in (("gaussian", 0.02), ("unit", 1.0)):
        leaf = jpeft.prefix(50, init=init)(KEY, tree)["attn"]["k"]["kernel"]
        np.testing.assert_allclose(np.std(leaf.keys), std, rtol=0.05)
    leaf = jpeft.prefix(50, reparametrization="mlp", width=40)(KEY, tree)
    leaf = leaf["attn"]["k"]["kernel"]
    np.testing.assert_allclose(np.std(leaf.embedding), 1.0, rtol=0.05)
    # U(-1, 1) / sqrt(inputs) has a third of the variance.
    for x, inputs in ((leaf.w1, 64), (leaf.w, 40)):
        np.testing.assert_allclose(np.std(x), (3 * inputs) ** -0.5, rtol=0.05)
        np.testing.assert_allclose(np.max(np.abs(x)), inputs**-0.5, rtol=0.01)


def test_a_network_equals_its_formula():
    w = lambda *shape: {"kernel": jnp.ones(shape)}
    attn = {n: w(8, 2, 4) for n in ("query", "key", "value")} | {"out": w(2, 4, 8)}
    layers = {f"layer_{k}": {"attention": attn} for k in range(2)}
    made = jpeft.prefix(LENGTH, reparametrization="mlp", width=6)(KEY, layers)
    done = jpeft.finalize(made)
    leaf = made["layer_0"]["attention"]["key"]["kernel"]
    other = made["layer_1"]["attention"]["value"]["kernel"]
    f64 = lambda x: np.asarray(x, np.float64)
    hidden = np.tanh(f64(leaf.embedding) @ f64(leaf.w1) + f64(leaf.b1))
    want = hidden @ f64(other.w) + f64(other.c)
    got = done["layer_1"]["attention"]["value"]["kernel"].values
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("mode", slow_but(["scan remat"], ["", "scan remat"]))
def test_a_start_from_a_text_has_its_keys_and_values(mode):
    """A text that is attended in front of nothing: the prefix acts as that text would,
    seen by every position."""
    module, params = A.model("norms", mode=mode)
    apply = lambda p: module.apply({"params": p}, A.IDS)
    started = jpeft.prefix_from_text(apply, jpeft.prefix(LENGTH)(KEY, params))
    path = ("layers" if mode else "layer_0", "attention")
    leaf = started[path[0]][path[1]]["value"]["kernel"]
    first = lambda x: x[0] if mode else x
    w = jax.tree.map(first, params[path[0]])
    x = params["tok"]["embedding"][A.IDS[0]]
    norm = w["norm_1"]
    x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)
    x = x * norm["scale"][None] + norm["bias"][None]
    values = jnp.einsum("sd,dhe->she", x, w["attention"]["value"]["kernel"])
    got = first(leaf.values)
    np.testing.assert_allclose(got, values[:LENGTH].reshape(LENGTH, -1), atol=1e-5)
    keys = jnp.einsum("sd,dhe->she", x, w["attention"]["key"]["kernel"])
    k = w["attention"]["k_norm"]
    keys = (keys - keys.mean(-1, keepdims=True)) / jnp.sqrt(
        keys.var(-1, keepdims=True) + 1e-6
    )
    keys = keys * k["scale"][None, None] + k["bias"][None, None]
    leaf = started[path[0]][path[1]]["key"]["kernel"]
    np.testing.assert_allclose(
        first(leaf.keys), keys[:LENGTH].reshape(LENGTH, -1), atol=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "mode"), [("lstm", ""), ("mlp", "scan remat"), ("mlp", "fused")]
)
def test_a_network_may_start_from_a_text(network, mode, tmp_path):
    """It begins as the same start without a network, and every part of it trains."""
    kind = {"kind": "fused"} if mode == "fused" else {"mode": mode}
    module, params = A.model(**kind)
    fn = lambda p: module.apply({"params": p}, A.IDS)
    plain = jpeft.prefix(LENGTH)
    transform = jpeft.prefix(LENGTH, reparametrization=network, width=6)
    want = jpeft.prefix_from_text(fn, plain(KEY, params))
    made = jpeft.prefix_from_text(fn, transform(KEY, params))
    apply = jax.jit(jpeft.adapt(fn))
    np.testing.assert_array_equal(apply(made), apply(want))
    assert float(jnp.max(jnp.abs(apply(made) - apply(jpeft.disable(made))))) > 1e-3

    trainable, frozen = jpeft.partition(made)
    tx = optax.sgd(0.1)
    loss = lambda t: jnp.mean(jpeft.adapt(fn)(jpeft.combine(t, frozen)) ** 2)
    grad, after, state = jax.jit(jax.grad(loss)), trainable, tx.init(trainable)
    for _ in range(2):  # the last layer moves first, then what is below it
        updates, state = tx.update(grad(after), state)
        after = optax.apply_updates(after, updates)
    for a, b in zip(jax.tree.leaves(trainable), jax.tree.leaves(after), strict=True):
        assert not np.array_equal(a, b)

    moved = jpeft.combine(after, frozen)
    jpeft.save(tmp_path / "network", moved, transform)
    again = jpeft.load(tmp_path / "network", params)
    np.testing.assert_array_equal(apply(again), apply(moved))
    done = jpeft.finalize(moved)
    assert jpeft.count(done).trainable == jpeft.count(want).trainable
    np.testing.assert_allclose(apply(done), apply(moved), atol=1e-5)


@pytest.mark.slow
def test_a_start_says_what_is_wrong():
    module, params = A.model()
    apply = lambda p: module.apply({"params": p}, A.IDS)
    with pytest.raises(ValueError, match="text has 7 positions, the prefix 9"):
        jpeft.prefix_from_text(apply, jpeft.prefix(9)(KEY, params))
    with pytest.raises(ValueError, match="no prefix to set"):
        jpeft.prefix_from_text(apply, jpeft.bitfit()(KEY, params))
    made = jpeft.prefix(3, reparametrization="mlp", width=6)(KEY, params)
    for layer in made.values():  # the part that holds the network is left out
        for kernel in layer.get("attention", {}).values():
            if getattr(kernel["kernel"], "embedding", None) is not None:
                kernel["kernel"] = kernel["kernel"].base
    with pytest.raises(ValueError, match="held by another weight .* the whole tree"):
        jpeft.prefix_from_text(apply, made)


@pytest.mark.slow
def test_a_start_from_a_text_stays_on_its_devices():
    module, params = A.model()
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    there = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    params = jax.device_put(params, there)
    apply = lambda p: module.apply({"params": p}, A.IDS)
    for network in (None, "mlp"):
        transform = jpeft.prefix(3, reparametrization=network, width=6)
        made = jpeft.prefix_from_text(apply, transform(KEY, params))
        for x in jax.tree.leaves(made):
            assert x.sharding.is_equivalent_to(there, x.ndim)


# --------------------------------------------------------------------- chosen layers


@pytest.mark.slow
@pytest.mark.parametrize("mode", slow_but(["scan"], ["", "scan"]))
def test_chosen_layers_alone_have_prompts(mode):
    module, params = A.model(mode=mode)
    apply = jax.jit(jpeft.adapt(lambda p: module.apply({"params": p}, A.IDS)))
    made = jpeft.p_tuning_v2(LENGTH, layers=[-1], init="unit")(KEY, params)
    prefix = learned("jax")
    if mode:
        on = made["layers"]["attention"]["key"]["kernel"].on
        np.testing.assert_array_equal(on, [0.0, 1.0])
        made = put(made, prefix)
    else:
        assert not jpeft.leaf.is_leaf(made["layer_0"]["attention"]["key"]["kernel"])
        attn = made["layer_1"]["attention"]
        for n, x, r in zip(("key", "value"), ("keys", "values"), prefix, strict=True):
            attn[n]["kernel"] = attn[n]["kernel"].replace(
                **{x: r[1].reshape(LENGTH, -1)}
            )
    everywhere = put(jpeft.prefix(LENGTH)(KEY, params), prefix)
    got, base = apply(made), apply(jpeft.disable(made))
    assert float(jnp.max(jnp.abs(got - base))) > 0.1
    assert float(jnp.max(jnp.abs(got - apply(everywhere)))) > 0.1
    if mode:  # the same two layers, unrolled
        row = lambda k: jax.tree.map(lambda x: x[k], params["layers"])
        flat = {f"layer_{k}": row(k) for k in range(2)}
        other, _ = A.model()
        rest = {n: x for n, x in params.items() if n != "layers"}
        one = jpeft.p_tuning_v2(LENGTH, layers=[1])(KEY, {**rest, **flat})
        attn = one["layer_1"]["attention"]
        for n, x, r in zip(("key", "value"), ("keys", "values"), prefix, strict=True):
            attn[n]["kernel"] = attn[n]["kernel"].replace(
                **{x: r[1].reshape(LENGTH, -1)}
            )
        want = jpeft.adapt(lambda p: other.apply({"params": p}, A.IDS))(one)
        np.testing.assert_allclose(got, want, atol=2e-5)


# ------------------------------------------------ other scores, other queries


def with_sink(put, cut):
    """Attention with scores beside those of the keys, which are cut off again."""

    def attend(q, k, v):
        s = put(q @ k.transpose(0, 2, 1))
        return cut(jax.nn.softmax(s)) @ v

    return attend


def sink(s, n=1):
    return jnp.full((*s.shape[:-1], n), 0.3)


def slopes(s):
    """A factor for each query, small enough that no score is alone."""
    return jnp.arange(1.0, 1 + s.shape[1]) / 50


def latent(q):
    """Queries of all examples alike."""
    return q[0, :3]


def pooled(q, k, v):
    s = jax.nn.softmax(jnp.einsum("nd,btd->bnt", latent(q), k))
    return jnp.einsum("bnt,btd->bnd", s, v)


def pooled_heads(q, k, v):
    heads = lambda x: x.reshape(*x.shape[:-1], 2, 4)
    s = jnp.einsum("nhd,bthd->bhnt", heads(latent(q)), heads(k))
    y = jnp.einsum("bhnt,bthd->bnhd", jax.nn.softmax(s), heads(v))
    return y.reshape(len(k), 3, 8)


READ = {
    "a sink behind": with_sink(
        lambda s: jnp.concatenate([s, sink(s)], -1), lambda w: w[..., :-1]
    ),
    "a sink before": with_sink(
        lambda s: jnp.concatenate([sink(s), s], -1), lambda w: w[..., 1:]
    ),
    "sinks on both sides": with_sink(
        lambda s: jnp.concatenate([sink(s, 2), s, sink(s)], -1),
        lambda w: jnp.split(w, [2, w.shape[-1] - 1], -1)[1],
    ),
    "a padded column": with_sink(
        lambda s: jnp.pad(s, ((0, 0), (0, 0), (0, 1))), lambda w: w[..., :-1]
    ),
    "a value of zeros for the sink": lambda q, k, v: with_sink(
        lambda s: jnp.concatenate([s, sink(s)], -1), lambda w: w
    )(q, k, jnp.concatenate([v, jnp.zeros_like(v[:, :1])], 1)),
    "some of the queries": with_sink(lambda s: s[:, 1:4], lambda w: w),
    "clipped": with_sink(lambda s: jnp.clip(s, -0.1, 0.2), lambda w: w),
    "bent": with_sink(lambda s: 3 * jnp.arctan(s), lambda w: w),
    "times what was repeated, then turned": with_sink(
        lambda s: s * jnp.swapaxes(jnp.broadcast_to(slopes(s), s.mT.shape), 1, 2),
        lambda w: w,
    ),
    "queries of no example": pooled,
    "heads of no example": pooled_heads,
}


def compared(attend):
    """(ours, by hand) of the learned rows."""
    apply, params, x = simple(attend, LENGTH)
    attn = params["attn"]
    kernels = {n: attn[n]["kernel"] for n in ("key", "value")}
    base = jpeft.unload(attn)

    def ours(rows):
        own = {
            "key": {"kernel": kernels["key"].replace(keys=rows[0])},
            "value": {"kernel": kernels["value"].replace(values=rows[1])},
        }
        return apply({"attn": {**attn, **own}}, x)

    def hand(rows):
        q, k, v = (x @ base[n]["kernel"] for n in ("query", "key", "value"))
        before = lambda r, y: jnp.concatenate([jnp.stack([r] * len(y)), y], 1)
        k, v = before(rows[0], k), before(rows[1], v)
        return attend(q, k, v) @ base["out"]["kernel"]

    return ours, hand, rows((LENGTH, 8), 1, 2)


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", READ)
def test_other_scores_and_other_queries_are_read(name):
    ours, hand, prefix = compared(READ[name])

    def run(f):
        loss = lambda r: (lambda y: (jnp.sum(jnp.sin(y)), y))(f(r))
        return jax.value_and_grad(loss, has_aux=True)

    (_, got), grads = jax.jit(run(ours))(prefix)
    (_, want), expected = jax.jit(run(hand))(prefix)
    assert_same((got, grads), (want, expected))


def shared_attention(p, x, prefix=None):
    """One projection makes keys, which are turned, and values, which are scaled."""
    q, k = (x @ p[n]["kernel"] for n in ("q_proj", "k_proj"))
    k, v = jnp.roll(k, 1, -1), 2.0 * k
    if prefix is not None:
        before = lambda r, y: jnp.concatenate([jnp.stack([r] * len(y)), y], 1)
        k, v = before(prefix[0], k), before(prefix[1], v)
    y = jax.nn.softmax(q @ k.transpose(0, 2, 1)) @ v
    return y @ p["o_proj"]["kernel"]


SHARED = {
    n: {"kernel": jax.random.normal(jax.random.fold_in(KEY, k), (8, 8))}
    for k, n in enumerate(("q_proj", "k_proj", "o_proj"))
}


def test_keys_and_values_of_one_projection_have_rows_of_their_own():
    with pytest.raises(ValueError, match="k_proj/kernel makes keys and values") as e:
        jpeft.prefix(LENGTH)(KEY, {"attn": SHARED})
    where = str(e.value).split("write where='")[1].split("'")[0]
    params = jpeft.prefix(LENGTH, where=where)(KEY, {"attn": SHARED})
    prefix, x = rows((LENGTH, 8), 1, 2), jax.random.normal(KEY, (2, 7, 8))
    leaf = params["attn"]["k_proj"]["kernel"]

    def ours(r):
        own = {"k_proj": {"kernel": leaf.replace(keys=r[0], values=r[1])}}
        fn = lambda p, x: shared_attention(p["attn"], x)
        return jpeft.adapt(fn)({"attn": {**params["attn"], **own}}, x)

    # The learned keys enter after the model turned its own.
    hand = lambda r: shared_attention(SHARED, x, r)
    np.testing.assert_allclose(ours(prefix), hand(prefix), atol=2e-5)
    fn = lambda p, x: shared_attention(p["attn"], x)
    off = jpeft.adapt(fn)(jpeft.disable(params), x)
    np.testing.assert_array_equal(off, fn({"attn": SHARED}, x))
    text = jpeft.prefix_from_text(fn, params, x)
    found = text["attn"]["k_proj"]["kernel"]
    k = (x[0] @ SHARED["k_proj"]["kernel"])[:LENGTH]
    np.testing.assert_allclose(found.keys, jnp.roll(k, 1, -1), atol=1e-5)
    np.testing.assert_allclose(found.values, 2.0 * k, atol=1e-5)


def test_queries_and_keys_of_one_projection_are_refused_by_name():
    where = "attention: a/kernel a/kernel b/kernel -> c/kernel"
    base = {n: {"kernel": jnp.ones((8, 8))} for n in "abc"}
    with pytest.raises(ValueError, match="a/kernel: prefix: one projection makes quer"):
        jpeft.prefix(LENGTH, where=where)(KEY, base)


def test_keys_whose_axis_is_in_doubt_are_refused():
    """Texts that stand side by side: it is not the axis before the features."""
    attend = lambda q, k, v: jnp.einsum(
        "bnt,tbd->bnd", jax.nn.softmax(jnp.einsum("nd,tbd->bnt", latent(q), k)), v
    )
    apply, params, x = simple(attend)
    with pytest.raises(jpeft.PromiseError, match="attn/.*exclude="):
        apply(params, x)


# ------------------------------------------------------------------------- refusals


def simple(attend, length=LENGTH):
    """An attention of one head around `attend(q, k, v)`, with a prefix."""
    names = ("query", "key", "value", "out")
    w = {
        n: {"kernel": jax.random.normal(jax.random.fold_in(KEY, k), (8, 8))}
        for k, n in enumerate(names)
    }
    params = jpeft.prefix(length)(KEY, {"attn": w})

    def fn(p, x):
        q, k, v = (x @ p["attn"][n]["kernel"] for n in names[:3])
        return attend(q, k, v) @ p["attn"]["out"]["kernel"]

    return jpeft.adapt(fn), params, jax.random.normal(KEY, (2, 7, 8))


def softmax_attention(q, k, v):
    return jax.nn.softmax(q @ k.transpose(0, 2, 1)) @ v


def opaque(q, k, v):
    shape = jax.ShapeDtypeStruct(q.shape, q.dtype)
    return jax.pure_callback(lambda q, k, v: q, shape, q, k, v)


def in_blocks(q, k, v):
    def block(carry, kv):
        s = jnp.exp(q @ kv[0].transpose(0, 2, 1))
        return (carry[0] + s @ kv[1], carry[1] + s.sum(-1, keepdims=True)), None

    blocks = tuple(jnp.moveaxis(x[:, :6].reshape(2, 3, 2, 8), 1, 0) for x in (k, v))
    (o, n), _ = jax.lax.scan(block, (0 * q, 0 * q[..., :1]), blocks)
    return o / n


REFUSED = {
    "opaque": opaque,
    "in_blocks": in_blocks,
    "linear": lambda q, k, v: jnp.tanh(q) @ (jnp.tanh(k).transpose(0, 2, 1) @ v),
    "top_k": lambda q, k, v: (
        jax.nn.softmax(jax.lax.top_k(q @ k.transpose(0, 2, 1), 7)[0]) @ v
    ),
    "keys_alone": lambda q, k, v: jax.nn.softmax(q @ k.transpose(0, 2, 1)) @ q,
    "half of the keys": lambda q, k, v: (
        jax.nn.softmax((q @ k.transpose(0, 2, 1))[..., 3:]) @ v[:, 3:]
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_attention_that_is_not_recognised_is_refused(name):
    apply, params, x = simple(REFUSED[name])
    with pytest.raises(jpeft.PromiseError, match="mode='tokens'"):
        apply(params, x)


def test_a_custom_gradient_around_attention_is_looked_into():
    @jax.custom_vjp
    def attend(q, k, v):
        return softmax_attention(q, k, v)

    attend.defvjp(
        lambda *x: (attend(*x), x), lambda x, g: jax.vjp(softmax_attention, *x)[1](g)
    )
    got, params, x = simple(attend)
    want, _, _ = simple(softmax_attention)
    np.testing.assert_allclose(got(params, x), want(params, x), atol=1e-6)


@pytest.mark.slow
def test_a_prefix_in_bfloat16_is_the_float32_one_rounded():
    apply, params, x = simple(softmax_attention)
    half = jax.tree.map(lambda t: t.astype(jnp.bfloat16), params)
    got = apply(half, x.astype(jnp.bfloat16))
    assert got.dtype == jnp.bfloat16
    want = apply(jax.tree.map(lambda t: t.astype(jnp.float32), half), x)
    # Scores of order 10 in 8 bits.
    error = jnp.linalg.norm(got.astype(jnp.float32) - want) / jnp.linalg.norm(want)
    base = jpeft.unload(half)
    plain = jnp.linalg.norm(
        simple(softmax_attention)[0](base, x.astype(jnp.bfloat16)).astype(jnp.float32)
        - simple(softmax_attention)[0](jpeft.unload(params), x)
    ) / jnp.linalg.norm(want)
    assert float(error) < 1.5 * float(plain) + 0.01


def test_examples_may_be_spread_over_an_explicit_mesh():
    apply, params, x = simple(softmax_attention)
    want = jax.jit(apply)(params, x)
    explicit = (jax.sharding.AxisType.Explicit,)
    mesh = jax.make_mesh((2,), ("data",), axis_types=explicit)
    place = lambda x, *spec: jax.device_put(
        x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    )
    with jax.set_mesh(mesh):
        got = jax.jit(apply)(place(params), place(x, "data"))
    assert got.sharding.spec[0] == "data"
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_lora_over_and_under_a_prefix_is_the_same():
    apply, _, x = simple(softmax_attention)
    _, params, _ = simple(softmax_attention)
    base = jpeft.unload(params)
    lora, prefix = (
        jpeft.lora(rank=2, init="gaussian"),
        jpeft.prefix(LENGTH, init="unit"),
    )
    one = lora(KEY, prefix(KEY, base))
    two = prefix(KEY, lora(KEY, base))
    moved = lambda p: jax.tree.map(lambda t: t + 0.1, p)
    combined = lambda p: jpeft.combine(
        moved(jpeft.partition(p)[0]), jpeft.partition(p)[1]
    )
    np.testing.assert_allclose(
        apply(combined(one), x), apply(combined(two), x), atol=1e-5
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "length=0: expected an integer of at least 1"),
        ({"length": 3, "mode": "vk"}, "mode='vk': expected one of"),
        ({"length": 3, "init": "ones"}, "init='ones': expected one of"),
        ({"length": 3, "reparametrization": "cnn"}, "reparametrization='cnn'"),
        ({"length": 3, "layers": []}, r"layers=\(\): expected layer numbers"),
        ({"length": 3, "reparametrization": "lstm", "width": 7}, "an even width"),
        ({"length": 3, "tasks": 2, "reparametrization": "mlp"}, "exclude each other"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        jpeft.prefix(**options)


def test_a_layer_that_is_not_there_is_named():
    _, params = A.model()
    with pytest.raises(
        ValueError, match="there are 2 attentions here, numbered 0 to 1"
    ):
        jpeft.p_tuning_v2(LENGTH, layers=[2])(KEY, params)


def test_a_fused_kernel_whose_heads_are_unknown_asks_for_them():
    _, params = A.model("fused_heads", "rotate_half")
    with pytest.raises(ValueError, match="pass heads="):
        jpeft.prefix(LENGTH)(KEY, params)


# ------------------------------------------------------------------------------ cost


@pytest.mark.slow
@pytest.mark.parametrize("mode", slow_but(["scan"], ["remat", "scan", "scan remat"]))
def test_costs_no_more_than_keys_and_values_put_before_the_real_ones(mode):
    """FLOPs and temporary bytes of forward and gradient; heads wide enough that
    products, and not the scores' elementwise work, are what is counted."""
    sizes = {"WIDTH": 128, "HEADS": 4, "GROUPS": 2, "HEAD": 32, "VOCAB": 31}
    length, ids = 16, jax.random.randint(KEY, (4, 128), 0, 31)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in sizes.items():
            patch.setattr(A, name, value)
        attention = functools.partial(A.Attention, kind="jax", style="half")
        module = A.LM(attention, mode)
        params = jax.jit(module.init)(KEY, ids)["params"]
        trainable, frozen = jpeft.partition(jpeft.prefix(length)(KEY, params))
        pad = jnp.ones(ids.shape)
        loss = lambda p, prefix=None: jnp.mean(
            jnp.square(module.apply({"params": p}, ids, pad, prefix))
        )
        ours = lambda t, f: jpeft.adapt(loss)(jpeft.combine(t, f))
        hand = lambda prefix, p: loss(p, prefix)
        rows = tuple(jnp.ones((A.LAYERS, length, 2, 32)) for _ in range(2))
        for f in (lambda g: g, jax.grad):
            found = []
            for g, args in ((ours, (trainable, frozen)), (hand, (rows, params))):
                made = jax.jit(f(g)).lower(*args).compile()
                temporary = made.memory_analysis().temp_size_in_bytes
                found.append((made.cost_analysis()["flops"], temporary))
            for mine, theirs in zip(*found, strict=True):
                assert 0 < mine <= 1.02 * theirs
