"""Products with a matrix that is made tile by tile."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jpeft.kernels import tiled
from jpeft.kernels.tiled import Tiles


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def tiles_of(w, axis, unit=1):
    """Tiles of an array that is there, of float32."""

    def cut(start, count):
        assert count % unit == 0 or count == w.shape[axis] % unit
        return lax.dynamic_slice_in_dim(w, start, count, axis)

    return Tiles(cut, lambda part, count: part, unit)


@pytest.fixture
def small(monkeypatch):
    """Tiles of a few values, so that small matrices have many."""
    monkeypatch.setattr(tiled, "_VALUES", 200)


# m, k, n: tiles that divide the axis, a remainder, fewer columns than a tile
SIZES = [(3, 20, 60), (1, 20, 61), (2, 50, 7), (5, 300, 3), (4, 1, 1)]


@pytest.mark.sample(4)
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("m", "k", "n"), SIZES)
def test_products_over_tiles_of_columns_and_of_rows(m, k, n):
    w, x, g = jnp.asarray(normal(k, n)), normal(m, k, seed=1), normal(m, n, seed=2)
    got = jax.jit(lambda x: tiled.matmul(x, n, tiles_of(w, 1), jnp.float32))
    want = x.astype("f8") @ np.asarray(w, "f8")
    np.testing.assert_allclose(got(x), want, rtol=1e-5, atol=1e-5)
    turned = jax.jit(
        lambda g: tiled.matmul_transposed(g, k, tiles_of(w, 0), jnp.float32)
    )
    want = g.astype("f8") @ np.asarray(w, "f8").T
    np.testing.assert_allclose(turned(g), want, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("small")
def test_sums_of_bfloat16_are_float32_and_rounded_once():
    w = jnp.asarray(normal(300, 7), jnp.bfloat16)
    x = jnp.asarray(normal(3, 300, seed=1), jnp.bfloat16)
    wide = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    got = tiled.matmul(x, 7, tiles_of(w, 1), jnp.float32)
    np.testing.assert_allclose(got, wide, rtol=1e-5, atol=1e-4)
    low = tiled.matmul(x, 7, tiles_of(w, 1), jnp.bfloat16)
    want = got.astype(jnp.bfloat16)
    np.testing.assert_array_equal(low.astype("f4"), want.astype("f4"))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("shared", [False, True])
def test_vmap_over_matrices(shared):
    w, x = jnp.asarray(normal(2, 20, 61)), jnp.asarray(normal(2, 3, 20, seed=1))
    x = x[0] if shared else x
    run = lambda w, x: tiled.matmul(x, 61, tiles_of(w, 1), jnp.float32)
    got = jax.jit(jax.vmap(run, (0, None if shared else 0)))(w, x)
    want = np.einsum("...mk,...kn->...mn", x, w)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("unit", [1, 64])
def test_a_tile_is_whole_units_and_there_are_two_where_there_is_room(unit):
    for size, depth in itertools.product(
        (unit, 2 * unit, 3 * unit, 7 * unit, 4096, 11008), (1, 64, 4096, 1 << 22)
    ):
        count = tiled.tile_size(size, depth, unit)
        assert 1 <= count <= size and count % unit == 0
        if size >= 2 * unit:
            assert size // count >= 2, (size, depth)
        # Twice what is wanted at most, or one unit where that is more.
        assert count == unit or count * depth <= 2 * tiled._VALUES


def test_a_tile_divides_the_axis_if_a_divisor_is_near():
    assert 11008 % tiled.tile_size(11008, 4096, 64) == 0
    assert 4096 % tiled.tile_size(4096, 4096, 1) == 0
    assert tiled.tile_size(4093, 4096, 1) == 512  # a prime: a remainder


def test_nothing_of_the_size_of_the_matrix_is_made(monkeypatch):
    """The program's own temporaries: a few tiles and the result."""
    k = n = 2048
    monkeypatch.setattr(tiled, "_VALUES", k * 128)
    book = jnp.linspace(-1, 1, 16)
    tiles = lambda codes: Tiles(
        lambda start, count: lax.dynamic_slice_in_dim(codes, start, count, 1),
        lambda part, count: jnp.take(book, part.astype(jnp.int32), mode="clip"),
        1,
    )
    run = lambda x, codes: tiled.matmul(x, n, tiles(codes), jnp.float32)
    x = jax.ShapeDtypeStruct((3, k), "float32")
    codes = jax.ShapeDtypeStruct((k, n), "uint8")
    memory = jax.jit(run).lower(x, codes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < k * n  # a quarter of W in float32
