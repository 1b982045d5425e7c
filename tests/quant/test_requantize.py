"""`merge(requantize=True)`: what an adapter did not change stays as it is stored."""

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from speed import slow_but

import jpeft
from jpeft.formats.blocks import FORMATS
from jpeft.leaf import array_fields, innermost

KEY = jax.random.key(0)
W = np.random.default_rng(0).normal(size=(130, 7)).astype(np.float32)


def stored(leaf):
    return {n: np.asarray(jax.tree.leaves(x)[0]) for n, x in array_fields(leaf).items()}


def assert_stored_alike(a, b):
    a, b = stored(a), stored(b)
    assert a.keys() == b.keys()
    for n, x in a.items():
        assert x.dtype == b[n].dtype
        np.testing.assert_array_equal(x, b[n], err_msg=n)


@pytest.mark.sample(1)
@pytest.mark.parametrize("double", slow_but([True], [False, True]))
@pytest.mark.parametrize(
    "format", slow_but(["quantile4", "dynamic8", "int4_asymmetric"], FORMATS)
)
def test_an_adapter_that_learned_nothing_leaves_every_bit(format, double):
    """Codes, scales and book; DoRA's values are its base's but for rounding."""
    quantize = jpeft.quantize(format, double)
    for method in (jpeft.lora(rank=2), jpeft.dora(rank=2)):
        params = jpeft.chain(quantize, method)(KEY, {"a": {"kernel": W}})
        merged = jpeft.merge(params, requantize=True)["a"]["kernel"]
        assert_stored_alike(merged, innermost(params["a"]["kernel"]))


def learned(leaf, b):
    """A `LowRank` whose B is this."""
    return leaf.replace(b=jnp.broadcast_to(b, leaf.b.shape).astype(leaf.b.dtype))


@pytest.mark.slow
@pytest.mark.parametrize("double", slow_but([True], [False, True]))
@pytest.mark.parametrize(
    "format", slow_but(["quantile4"], ["nf4", "quantile4", "dynamic8", "int8"])
)
def test_of_a_stack_the_matrices_that_learned_nothing_stay(format, double):
    w = jnp.asarray(np.stack([W, 3 * W, W[::-1]]))
    f = lambda p, x: jnp.einsum("ecd,edf->ecf", x, p["kernel"])
    uses = jpeft.find_uses(f, {"kernel": w}, jnp.ones((3, 2, 130)))
    both = jpeft.chain(jpeft.quantize(format, double), jpeft.lora(rank=2))
    leaf = both(KEY, {"kernel": w}, uses=uses)["kernel"]
    moved = learned(leaf, jnp.asarray([0.0, 8.0, 0.0])[:, None, None])
    merged = jpeft.merge({"kernel": moved}, requantize=True)["kernel"]
    for n, x in stored(merged).items():
        same = [
            np.array_equal(a, b) for a, b in zip(x, stored(leaf.base)[n], strict=True)
        ]
        assert same[0] and same[2], n
    want = moved.materialize()
    error = lambda x: float(jnp.sqrt(jnp.mean((x[1] - want[1]) ** 2)))
    assert error(merged.materialize()) < 0.5 * error(leaf.base.materialize())


@pytest.mark.parametrize("format", slow_but(["quantile8"], ["quantile4", "quantile8"]))
def test_a_learned_book_is_used_again_and_holds_what_was_learned(format):
    """It is as near as a new book, or the book is new."""
    quantize = jpeft.quantize(format, double=False)
    one_sided = np.abs(W)  # no block's largest is negative: the book ends above -1
    leaf = jpeft.chain(quantize, jpeft.lora(rank=2))(KEY, {"kernel": one_sided})
    moved = learned(leaf["kernel"], -2.0)
    want = moved.materialize()
    again = jpeft.merge({"kernel": moved}, requantize=True)["kernel"]
    anew = quantize(KEY, {"kernel": want})["kernel"]
    error = lambda q: float(jnp.mean((q.materialize() - want) ** 2))
    assert error(again) <= error(anew)
    little = learned(leaf["kernel"], 1e-3)
    again = jpeft.merge({"kernel": little}, requantize=True)["kernel"]
    assert np.array_equal(again.book[1:-1], leaf["kernel"].base.book[1:-1])


def test_rounds_of_nothing_lose_nothing():
    base = jpeft.quantize("quantile4", double=False)(KEY, {"kernel": W})
    params = base
    for k in range(3):
        params = jpeft.lora(rank=2)(jax.random.key(k), params)
        params = jpeft.merge(params, requantize=True)
    assert_stored_alike(params["kernel"], base["kernel"])


def test_a_boxed_weight_keeps_its_boxes():
    boxed = {"kernel": nn.Partitioned(jnp.asarray(W), ("in", "out"))}
    base = jpeft.quantize("quantile4")(KEY, boxed)
    params = jpeft.lora(rank=2)(KEY, base)
    merged = jpeft.merge(params, requantize=True)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    assert_stored_alike(merged["kernel"], base["kernel"])


def test_it_runs_inside_jit():
    params = jpeft.chain(jpeft.quantize("quantile4"), jpeft.lora(2))(KEY, {"kernel": W})
    merged = jax.jit(lambda p: jpeft.merge(p, requantize=True))(params)
    assert_stored_alike(merged["kernel"], params["kernel"].base)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh_it_stays_where_it_is(kind):
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(kind,) * 2)
    w = np.stack([W[:128], W[2:]])[..., :6]
    f = lambda p, x: jnp.einsum("ecd,edf->ecf", x, p["kernel"])
    uses = jpeft.find_uses(f, {"kernel": jnp.asarray(w)}, jnp.ones((2, 2, 128)))
    explicit = jax.set_mesh(mesh) if kind == AxisType.Explicit else nullcontext()
    with explicit:
        placed = jax.device_put(w, NamedSharding(mesh, PartitionSpec("a", None, "b")))
        both = jpeft.chain(jpeft.quantize("quantile4"), jpeft.lora(2))
        leaf = both(KEY, {"kernel": placed}, uses=uses)["kernel"]
        merged = jpeft.merge({"kernel": leaf}, requantize=True)["kernel"]
    assert_stored_alike(merged, leaf.base)
    assert merged.codes.sharding == leaf.base.codes.sharding
