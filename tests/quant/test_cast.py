"""What is done to every array of a tree: codes are no numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from speed import slow_but

import jpeft
from jpeft.leaf import is_leaf

KEY = jax.random.key(3)
X = jnp.ones((2, 64))
BASE = {"up": {"kernel": jax.random.normal(KEY, (64, 5)), "bias": jnp.zeros(5)}}
model = jpeft.adapt(lambda p, x: x @ p["up"]["kernel"] + p["up"]["bias"][None])
FORMATS = {
    "nf4": jpeft.quantize("nf4", block_size=32),
    "nf4_plain": jpeft.quantize("nf4", block_size=32, double=False),
    "int8": jpeft.quantize("int8", block_size=32),
    "int4_asymmetric": jpeft.quantize("int4_asymmetric", block_size=32, double=False),
    "quantile4": jpeft.quantize("quantile4", block_size=32, double=False),
    "q4_1": jpeft.quantize("q4_1"),
}
QUICK = ("nf4", "nf4_plain", "int8")


def qlora(format="nf4"):
    return jpeft.chain(FORMATS[format], jpeft.lora(rank=2))(KEY, BASE)


half = jnp.bfloat16
floats_only = lambda x: x.astype(half) if jnp.issubdtype(x.dtype, jnp.floating) else x
MAPS = {
    "cast": lambda p: jax.tree.map(lambda x: x.astype(half), p),
    "cast to float32": lambda p: jax.tree.map(lambda x: x.astype(jnp.float32), p),
    "half policy": lambda p: jax.tree.map(floats_only, p),
    "optax": lambda p: optax.tree.cast(p, half),
    "average": lambda p: optax.incremental_update(p, p, 0.5),
    "ema": lambda p: jax.tree.map(lambda x: 0.9 * x + 0.1 * x, p),
}


@pytest.mark.sample(10)
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("format", slow_but(QUICK, FORMATS))
def test_arithmetic_on_every_array_is_refused_where_the_tree_is_used(name, format):
    with jax.numpy_dtype_promotion("standard"):
        params = MAPS[name](qlora(format))
    for use in (lambda: model(params, X), lambda: jpeft.merge(params)):
        with pytest.raises(
            ValueError, match="up/kernel: the (codes|scales|nested)"
        ) as e:
            use()
        assert 'jpeft.cast(params, "bfloat16")' in str(e.value)
        assert "jpeft.partition(params)[0]" in str(e.value)


@pytest.mark.slow
@pytest.mark.parametrize("format", slow_but(QUICK, FORMATS))
def test_cast_keeps_codes_and_scales(format):
    params = qlora(format)
    got = jpeft.cast(params, "bfloat16")
    leaf, old = got["up"]["kernel"], params["up"]["kernel"]
    assert leaf.dtype == leaf.a.dtype == leaf.b.dtype == got["up"]["bias"].dtype == half
    for x, y in zip(jax.tree.leaves(leaf.base), jax.tree.leaves(old.base), strict=True):
        assert x is y
    y = model(got, X.astype(half))
    assert y.dtype == half
    # One product of 64 terms of the same weights, rounded to 8 bits once more or twice.
    np.testing.assert_allclose(
        y.astype(jnp.float32), model(params, X), rtol=0.02, atol=0.1
    )
    merged = jpeft.merge(got)["up"]["kernel"]
    assert merged.dtype == half
    with jax.numpy_dtype_promotion("standard"):
        np.testing.assert_allclose(
            merged.astype(jnp.float32), jpeft.merge(params)["up"]["kernel"], rtol=2**-8
        )


@pytest.mark.float16
def test_cast_is_what_astype_does_to_plain_arrays():
    base = {**BASE, "count": jnp.arange(3), "key": jax.random.key(0)}
    transform = jpeft.chain(jpeft.lora(rank=2), jpeft.full("up/bias"))
    params = transform(KEY, base)
    got = jpeft.cast(params, jnp.float16)
    want = jax.tree.map(
        lambda x: x.astype(jnp.float16) if jnp.issubdtype(x.dtype, jnp.floating) else x,
        params,
    )
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert x.dtype == y.dtype and bool((x == y).all())
    assert is_leaf(got["up"]["bias"])
    for bad in ("int8", None, "half of it"):
        with pytest.raises(ValueError, match="cast: dtype="):
            jpeft.cast(params, bad)


def test_the_adapters_alone_may_be_averaged():
    one, two = qlora(), qlora()
    (t1, frozen), (t2, _) = jpeft.partition(one), jpeft.partition(two)
    with jax.numpy_dtype_promotion("standard"):
        mean = jpeft.combine(optax.incremental_update(t1, t2, 0.5), frozen)
    np.testing.assert_allclose(model(mean, X), model(one, X), rtol=1e-6)
