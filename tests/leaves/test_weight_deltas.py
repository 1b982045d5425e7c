"""Methods that change a weight, and every way a model uses one.

Each case runs `fn(w, *args)` with random arrays in the leaf over `w` and compares it
with `fn` of the merged weight.  What a method cannot do it refuses.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import every_method
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import drawn_like, moved
from jax import lax
from jax.sharding import PartitionSpec as P
from speed import slow_but

import jpeft
from jpeft.methods.dora import norm_of
from jpeft.tree.layout import LeafUse


def n(*shape, k=0):
    return 0.5 * jax.random.normal(jax.random.key(k), shape)


METHODS = {
    f"{name} {part}".strip(): alone
    for name, method in every_method.METHODS.items()
    for part, alone in method.alone.items()
}


@dataclasses.dataclass(frozen=True)
class Case:
    fn: Any
    w: Any
    args: tuple
    axes: str


X, H = n(3, 5, 8, k=1), n(3, 5, 2, 4, k=2)
IDS = jnp.array([[1, 2, 5], [10, 0, 2]])
SIZES = jnp.array([2, 0, 5], jnp.int32)
CONV = ("NWC", "WIO", "NWC")


def scanned(w, x):
    return lax.scan(lambda h, row: (jnp.tanh(h @ row), None), x, w)[0]


def conv(w, x, groups=1):
    return lax.conv_general_dilated(
        x, w, (2,), "SAME", dimension_numbers=CONV, feature_group_count=groups
    )


def by_rows(w, x):
    mesh = jax.make_mesh((2,), ("m",), axis_types=(jax.sharding.AxisType.Auto,))
    f = lambda x, w: lax.psum(x @ w, "m")
    return jax.shard_map(
        f, mesh=mesh, in_specs=(P(None, "m"), P("m", None)), out_specs=P()
    )(x, w)


CASES = {
    "x @ w": Case(lambda w, x: x @ w, n(8, 6), (X,), "io"),
    "w on the left": Case(lambda w, x: w @ x, n(6, 8), (n(8, 5),), "oi"),
    "heads out": Case(
        lambda w, x: jnp.einsum("btd,dhk->bhtk", x, w), n(8, 2, 3), (X,), "ioo"
    ),
    "heads in": Case(
        lambda w, x: jnp.einsum("bthk,hkd->btd", x, w), n(2, 4, 6), (H,), "iio"
    ),
    "the other way round": Case(
        lambda w, x: jnp.einsum("btd,dhk->bthk", x, w) @ jnp.swapaxes(w, 0, 1)[0].T,
        n(8, 1, 6),
        (X,),
        "ioo",
    ),
    "reshaped": Case(lambda w, x: x @ w.reshape(8, 6), n(8, 2, 3), (X,), "ioo"),
    "a stack, batched": Case(
        lambda w, x: jnp.einsum("btd,bdf->btf", x, w), n(3, 8, 6), (X,), "sio"
    ),
    "a stack, free": Case(
        lambda w, x: jnp.einsum("btd,edf->ebtf", x, w),
        n(4, 8, 6),
        (X,),
        "sio",
    ),
    "a stack, scanned": Case(scanned, n(3, 8, 8), (X,), "sio"),
    "a stack, indexed": Case(lambda w, x: x @ w[1], n(3, 8, 6), (X,), "sio"),
    "experts, sorted": Case(
        lambda w, x: lax.ragged_dot(x, w, SIZES), n(3, 8, 6), (n(7, 8),), "sio"
    ),
    "experts, gathered": Case(
        lambda w, x: jnp.einsum("td,tdf->tf", x[0], w[jnp.array([2, 0, 0, 1, 2])]),
        n(3, 8, 6),
        (X,),
        "sio",
    ),
    "sliced outputs": Case(lambda w, x: x @ w[:, 1:4], n(8, 6), (X,), "io"),
    "sliced inputs": Case(lambda w, x: x[..., 2:] @ w[2:], n(8, 6), (X,), "io"),
    "beside a plain one": Case(
        lambda w, x: x @ jnp.concatenate([w, jnp.ones((8, 2))], 1),
        n(8, 6),
        (X,),
        "io",
    ),
    "stacked": Case(
        lambda w, x: jnp.einsum("btd,kdf->kbtf", x, jnp.stack([w, jnp.ones((8, 6))])),
        n(8, 6),
        (X,),
        "io",
    ),
    "padded": Case(
        lambda w, x: x @ lax.pad(w, 0.7, [(0, 0, 0), (1, 2, 0)]),
        n(8, 6),
        (X,),
        "io",
    ),
    "scaled by a vector": Case(
        lambda w, x, v: x @ (-w * v[None] / v[0]), n(8, 6), (X, n(6, k=3) + 2), "io"
    ),
    "table, tied": Case(lambda w, ids: w[ids] @ w.T, n(11, 8), (IDS,), "io"),
    "table, out of range": Case(
        lambda w, ids: jnp.take(w, ids, axis=0, mode="fill", fill_value=3.0),
        n(7, 8),
        (IDS,),
        "io",
    ),
    "convolution": Case(conv, n(3, 8, 6), (X,), "iio"),
    "convolution in groups": Case(lambda w, x: conv(w, x, 2), n(3, 4, 6), (X,), "iio"),
    "shards by rows": Case(by_rows, n(8, 6), (n(5, 8),), "io"),
    "remat in vmap": Case(
        lambda w, x: jax.vmap(jax.checkpoint(lambda x: jnp.sin(x @ w)))(x),
        n(8, 6),
        (X,),
        "io",
    ),
}


def attached(method, w, axes, move=True):
    use = LeafUse("w", w.shape, "linear", axes)
    transform = METHODS[method].make()
    tree = transform(jax.random.key(4), {"w": w}, uses={"w": use})
    return moved(tree) if move else tree


@pytest.mark.parametrize("method", METHODS)
def test_every_use_is_that_of_the_merged_weight_or_is_refused(method):
    """In one program, which compiles sooner than many."""
    trees = {}
    for name, c in CASES.items():
        attach = lambda w, axes=c.axes: attached(method, w, axes, move=False)
        trees[name] = drawn_like(jax.eval_shape(attach, c.w), {"w": c.w})

    @jax.jit
    def run(trees):
        both = {}
        for name, c in CASES.items():
            tree = trees[name]
            if method == "dora":
                tree = {"w": tree["w"].replace(norm=norm_of(c.w, c.axes))}
            apply = jpeft.adapt(lambda p, *args, f=c.fn: f(p["w"], *args))
            if name in METHODS[method].refused:
                with pytest.raises(jpeft.DensifyError, match="w: "):
                    apply(tree, *c.args)
                continue
            both[name] = apply(tree, *c.args), c.fn(jpeft.merge(tree)["w"], *c.args)
        return both

    for name, (got, want) in run(trees).items():
        # Sums in another order.
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=5e-5, err_msg=name)


@pytest.mark.sample(2)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", slow_but([*CASES][:4], CASES))
def test_it_acts_as_its_merged_weight_or_is_refused(name, method):
    case = CASES[name]
    params = attached(method, case.w, case.axes)
    apply = jax.jit(jpeft.adapt(lambda p, *args: case.fn(p["w"], *args)))
    if name in METHODS[method].refused:
        with pytest.raises(jpeft.DensifyError, match="w: "):
            apply(params, *case.args)
        return
    got = apply(params, *case.args)
    merged = jpeft.merge(params)["w"]
    assert float(jnp.max(jnp.abs(merged - case.w))) > 0.02
    want = case.fn(merged, *case.args)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)  # sums in another order


@pytest.mark.sample(2)
@pytest.mark.parametrize("method", METHODS)
def test_beside_bfloat16_it_stays_as_close_as_the_rounding(method):
    w = n(8, 6).astype(jnp.bfloat16)
    params = attached(method, w, "io")
    got = jpeft.adapt(lambda p, x: x @ p["w"])(params, X.astype(jnp.bfloat16))
    assert got.dtype == jnp.bfloat16
    want = X @ jpeft.merge(params, dtype=jnp.float32)["w"]
    error = jnp.linalg.norm(got.astype(jnp.float32) - want) / jnp.linalg.norm(want)
    assert error < 3 * 2**-8, error  # a few roundings to 8 bits


@pytest.mark.parametrize("method", [m for m in METHODS if m != "dora"])
def test_gradients_are_those_of_the_merged_weight(method):
    """To DoRA's gradient the norm is a constant: see test_dora."""
    params = attached(method, n(8, 6), "io")
    trainable, frozen = jpeft.partition(params)

    def through(weight_of):
        f = lambda t: jnp.sum(jnp.sin(weight_of(jpeft.combine(t, frozen))))
        return jax.jit(jax.grad(f))(trainable)

    got = through(lambda p: jpeft.adapt(lambda p, x: x @ p["w"])(p, X))
    want = through(lambda p: X @ jpeft.merge(p)["w"])
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


@pytest.mark.sample(2)
@pytest.mark.parametrize("method", [m for m in METHODS if m != "pissa"])
@pytest.mark.parametrize("format", slow_but(["nf4"], ["nf4", "int8"]))
def test_over_a_quantised_weight(method, format):
    q = jpeft.quantize(format, compute_dtype=None, block_size=32, double=False)
    base = q(jax.random.key(0), {"w": n(64, 48)}, uses=None)["w"]
    params = attached(method, base, "io")
    x = n(5, 64, k=3)
    got = jax.jit(jpeft.adapt(lambda p, x: x @ p["w"]))(params, x)
    want = x @ jpeft.merge(params)["w"]
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-4)  # summed in tiles
