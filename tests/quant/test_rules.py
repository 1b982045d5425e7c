"""Every idiom of `tests/adapt/test_idioms.py` over a quantised base, with LoRA on top.

Value and gradients (of the factors, and of the activation, which flows through the
codes) against the plain model on `jpeft.merge` of the same tree.
"""

import dataclasses
import itertools
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from speed import slow_but

import jpeft
from jpeft.leaf import is_leaf
from jpeft.quant import Quantized
from jpeft.tree.layout import layouts
from jpeft.tree.paths import map_slots, slots

sys.path.insert(0, str(Path(__file__).parents[1] / "adapt"))
import test_idioms as idioms  # noqa: E402  the table of idioms

# The activations' own dtype, so that both sides multiply the same numbers.
FORMATS = {
    "nf4": jpeft.quantize("nf4", block_size=32, compute_dtype=None),
    "int8": jpeft.quantize("int8", block_size="channel", compute_dtype=None),
    "q4_1": jpeft.quantize("q4_1", compute_dtype=None),
}
# What takes a full value though LoRA alone does not: a block is not cut.
CUT = "four shards of eight rows, and no shard holds a whole block"
WHOLE_VALUE = {
    "scan over an input axis": "each step's slice goes through every block",
    "shard_map by rows with psum": CUT,
    "shard_map that gathers the weight": CUT,
}


def quantised(params, uses, axes, transform):
    """Everything with input and output axes."""
    known = layouts(slots(params), uses)

    def one(path, slot):
        use, forced = known.get(path), (axes or {}).get(path)
        labels = forced or (use.axes if use and use.is_weight else None)
        if labels is None or (use.doubt and not forced):
            return slot
        kind = "linear" if forced else use.kind
        use = dataclasses.replace(use, axes=labels, doubt="", kind=kind)
        return transform.adapted(jax.random.key(0), path, slot, use)

    return map_slots(one, params)


def first_float(args):
    """Where the activation is among the arguments, if one has gradients."""
    found = [
        k
        for k, x in enumerate(args)
        if jnp.issubdtype(jnp.result_type(x), jnp.floating)
    ]
    return found[0] if found else None


def check(name, c, format, tolerance=2e-5):
    uses = jpeft.find_uses(c.fn, c.params, *c.args)
    base = quantised(c.params, uses, c.axes, FORMATS[format])
    leaves = [x for x in slots(base).values if is_leaf(x)]
    assert leaves and all(isinstance(x, Quantized) for x in leaves)
    params = idioms.low_rank(base, uses, c.axes)
    whole = bool(c.densified) or name in WHOLE_VALUE
    apply = jpeft.adapt(c.fn, materialize="allow" if whole else "refuse")
    trainable, frozen = jpeft.partition(params)
    at = first_float(c.args)
    put = lambda x: [x if k == at else a for k, a in enumerate(c.args)]

    def loss(t, x):
        return idioms.total(apply(jpeft.combine(t, frozen), *put(x)))

    def reference(t, x):
        merged = jpeft.merge(jpeft.combine(t, frozen))
        return idioms.total(c.fn(merged, *put(x)))

    grad = lambda f: f
    if c.differentiable:
        wanted = (0,) if at is None else (0, 1)
        grad = lambda f: jax.value_and_grad(f, wanted)
    x = None if at is None else c.args[at]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = jax.jit(grad(loss))(trainable, x)
    said = {w.message.args[0] for w in caught if w.category is jpeft.DensifyWarning}
    assert bool(said) == whole, said
    want = jax.jit(grad(reference))(trainable, x)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        # float32, sums in another order
        error = jnp.linalg.norm(a - b) / (jnp.linalg.norm(b) + 1e-3)
        assert error < 2 * tolerance, (jax.tree_util.keystr(path), error)


NAMES = [*idioms.CASES]


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("name", "format"),
    [
        # Each idiom once, two of three over codes that have a kernel.
        *(pytest.param(n, "nf4", marks=()) for n in NAMES[::3]),
        *(pytest.param(n, "nf4", marks=pytest.mark.slow) for n in NAMES[2::3]),
        *(pytest.param(n, "int8", marks=pytest.mark.slow) for n in NAMES[1::3]),
        *(pytest.param(n, "q4_1", marks=pytest.mark.slow) for n in NAMES[2::18]),
    ],
)
def test_a_quantised_base_under_lora_is_exact(name, format):
    check(name, idioms.idiom(name), format)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("features", "format"), [(96, "nf4"), (130, "nf4"), (96, "q4_1"), (130, "q4_1")]
)
def test_a_tied_table_whose_features_fill_no_group(features, format):
    """Codes are stored in groups of 64; of the last one a part is wanted."""
    c = dataclasses.replace(
        idioms.CASES["tied"],
        fn=lambda p, x, ids: jnp.tanh(p["w0"][ids] + x) @ p["w0"].T,
        params={"w0": idioms.n(11, features)},
        args=(idioms.n(*idioms.IDS.shape, features, k=1), idioms.IDS),
    )
    check("tied", c, format)


@pytest.mark.sample(2)
@pytest.mark.parametrize("ids", ["uint8", "int8", "uint16", "int32"])
@pytest.mark.parametrize(
    ("rows", "format", "block_size", "double"),
    [
        (120, "nf4", 64, True),
        (256, "nf4", 64, False),
        (300, "nf4", 64, False),
        (1, "nf4", 64, True),
        (1, "int8", "tensor", False),
        (120, "q4_1", 32, True),
        (300, "q8_0", 32, True),
        (5, "int4_asymmetric", "tensor", False),
    ],
)
def test_a_lookup_by_ids_of_any_dtype_and_in_a_table_of_any_size(
    rows, format, block_size, double, ids
):
    table = {"embedding": idioms.n(rows, 512) * jnp.arange(1.0, rows + 1)[:, None]}
    how = jpeft.quantize(format, double, block_size, where="embedding")
    params = how(jax.random.key(0), table)
    fn = lambda p, ids: jnp.take(p["embedding"], ids, axis=0)
    ids = jnp.array([0, rows // 2, min(rows - 1, 119), 0]).astype(ids)
    got, want = jpeft.adapt(fn)(params, ids), fn(jpeft.merge(params), ids)
    assert got.dtype == want.dtype and got.tobytes() == want.tobytes()


def test_rows_beyond_the_tables_width_have_their_own_nested_scales():
    table = {"embedding": idioms.n(300, 64) * jnp.arange(1.0, 301)[:, None]}
    params = jpeft.quantize("nf4", True, 32, where="embedding")(
        jax.random.key(0), table
    )
    fn = lambda p, ids: jnp.take(p["embedding"], ids, axis=0)
    ids = jnp.array([0, 40, 150, 299])
    got, want = jpeft.adapt(fn)(params, ids), fn(jpeft.merge(params), ids)
    assert got.tobytes() == want.tobytes()


@pytest.mark.sample(1)
@pytest.mark.parametrize("program", ["jit", "checkpoint", "scan"])
def test_groups_of_a_ragged_product_whose_sizes_are_data(program):
    """Found inside a scan or a checkpoint, whose backward pass is traced apart."""

    def one(w, x):
        first = jnp.sum(x[:, 0] > 0, dtype=jnp.int32)
        sizes = jnp.stack([first, 10 - first])
        return jnp.tanh(jax.lax.ragged_dot(x, w, sizes))

    fn = {
        "jit": lambda p, x: one(p["w"][1], x),
        "checkpoint": lambda p, x: jax.checkpoint(one)(p["w"][1], x),
        "scan": lambda p, x: jax.lax.scan(lambda x, w: (one(w, x), None), x, p["w"])[0],
    }[program]
    c = idioms.Case(fn, {"w": idioms.n(3, 2, 8, 8)}, (idioms.n(10, 8, k=1),))
    check(program, c, "nf4")


@pytest.mark.sample(1)
@pytest.mark.parametrize("format", slow_but(["nf4"], FORMATS))
@pytest.mark.parametrize("shape", [(5, 2), (1, 2), (5, 2, 3)])
def test_the_experts_picked_for_each_token_stay_codes(shape, format):
    """Several ids a token, as in a choice of the best k."""
    ids = jax.random.randint(jax.random.key(2), shape, 0, 6)
    fn = lambda p, x, i: jnp.einsum("...d,...df->...f", x, p["w"][i])
    c = idioms.Case(fn, {"w": idioms.n(6, 70, 7)}, (idioms.n(*shape, 70, k=1), ids))
    check("experts", c, format)


def layer(x, w):
    return jnp.tanh(x @ w), None


PUT_TOGETHER = {
    "stacked": lambda p, x: jax.lax.scan(layer, x, jnp.stack([p["a"], p["b"]]))[0],
    "stacked last": lambda p, x: jnp.einsum(
        "bd,dfk->bfk", x, jnp.stack([p["a"], p["b"]], 2)
    ),
    "longer": lambda p, x: jax.lax.scan(
        layer, x, jnp.concatenate([p["stack"], p["stack"][:2]])
    )[0],
    "turned": lambda p, x: jax.lax.scan(layer, x, p["stack"][::-1])[0],
    "halved": lambda p, x: jax.lax.scan(layer, x, 0.5 * p["stack"])[0],
    "each scaled": lambda p, x: jax.lax.scan(
        layer, x, p["stack"] * jnp.arange(1.0, 4.0)[:, None, None]
    )[0],
    "all scaled": lambda p, x: jax.lax.scan(
        layer, x, p["stack"] * jnp.linspace(1.0, 2.0, 64)[None, None]
    )[0],
    "beside a larger one": lambda p, x: x @ jnp.concatenate([p["a"], p["wide"]], 1),
}


BY_ELEMENT = {
    "bent": jnp.tanh,
    "a power of two": jnp.exp2,
    "kept between two": lambda w: jax.lax.clamp(-0.2, w, 0.3),
}


@pytest.mark.parametrize("name", BY_ELEMENT)
def test_what_is_done_to_each_value_waits_for_the_product(name):
    f, w, x = BY_ELEMENT[name], idioms.n(64, 64), idioms.n(5, 64, k=1)
    uses = jpeft.find_uses(lambda p, x: x @ p["w"], {"w": w}, x)
    params = FORMATS["nf4"](jax.random.key(0), {"w": w}, uses=uses)
    fn = lambda p, x: jnp.sum(jnp.sin(x @ f(p["w"])))
    got = jax.value_and_grad(jpeft.adapt(fn), 1)(params, x)
    want = jax.value_and_grad(fn, 1)(jpeft.merge(params), x)
    for a, b in zip(got, want, strict=True):
        assert jnp.linalg.norm(a - b) < 4e-5 * jnp.linalg.norm(b)


@pytest.mark.slow
@pytest.mark.parametrize("format", slow_but(["nf4"], FORMATS))
@pytest.mark.parametrize("name", PUT_TOGETHER)
def test_weights_put_together_before_they_are_used(name, format):
    fn = PUT_TOGETHER[name]
    weights = {
        "a": idioms.n(64, 64),
        "b": idioms.n(64, 64, k=1),
        "stack": idioms.n(3, 64, 64, k=2),
        "wide": idioms.n(64, 200, k=3),
    }
    x = idioms.n(5, 64, k=4)
    uses = jpeft.find_uses(fn, weights, x)
    used = {p: w for p, w in weights.items() if uses[p].is_weight}
    params = FORMATS[format](
        jax.random.key(0),
        used,
        uses=uses,
    )
    if "wide" in used:  # larger, and not quantised
        params["wide"] = weights["wide"]
    params = jpeft.lora(rank=2)(jax.random.key(1), params, uses=uses)
    trainable, frozen = jpeft.partition(params)
    trainable = jax.tree.map(lambda x: x + 0.1, trainable)
    params = jpeft.combine(trainable, frozen)
    total = lambda f: lambda p, x: jnp.sum(jnp.sin(f(p, x)))
    got = jax.value_and_grad(total(jpeft.adapt(fn)), 1)(params, x)
    want = jax.value_and_grad(total(fn), 1)(jpeft.merge(params), x)
    for a, b in zip(got, want, strict=True):
        assert jnp.linalg.norm(a - b) < 4e-5 * jnp.linalg.norm(b)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "program"),
    # A fifth of them: the interpreter is the one that the plain leaves test with all.
    [*itertools.product(idioms.IDIOMS, idioms.PROGRAMS)][::5],
)
def test_each_idiom_inside_each_program(name, program):
    if (name, program) == ("ragged_dot", "vmap"):
        pytest.skip("JAX itself has no rule for this one")
    check(name, idioms.PROGRAMS[program](idioms.idiom(name)), "nf4")
