"""Scales of blocks, quantised in turn."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpeft.formats import double
from jpeft.formats.codebooks import dynamic_map
from jpeft.formats.double import NESTED_BLOCK


def scales(*shape, seed=0):
    """Like the absmax of blocks of a normal."""
    return np.random.default_rng(seed).gamma(9, 0.3, shape).astype(np.float32)


def quantize(s, axis, stack=0):
    return jax.jit(double.quantize_scales, static_argnums=(1, 2))(s, axis, stack)


def dequantize(nested, axis, stack=0):
    return jax.jit(double.dequantize_scales, static_argnums=(1, 2))(nested, axis, stack)


@pytest.mark.sample(3)
@pytest.mark.parametrize("shape", [(5, 7), (4, 64), (3, 171), (256, 2)])
@pytest.mark.parametrize("axis", [0, 1])
def test_groups_of_256_run_along_the_blocks_of_one_output_first(shape, axis):
    s = scales(*shape)
    nested = quantize(s, axis)
    assert nested.codes.shape == s.shape and nested.codes.dtype == jnp.uint8
    flat = (s.T if axis == 0 else s).reshape(-1)
    codes = np.asarray(nested.codes)
    codes = (codes.T if axis == 0 else codes).reshape(-1)
    centred = flat - np.asarray(nested.offset)
    np.testing.assert_allclose(nested.offset, flat.astype("f8").mean(), rtol=1e-7)
    groups = range(0, flat.size, NESTED_BLOCK)
    absmax = np.array([np.abs(centred[g : g + NESTED_BLOCK]).max() for g in groups])
    np.testing.assert_array_equal(nested.absmax, absmax)
    each = np.repeat(absmax, NESTED_BLOCK)[: flat.size]
    book = dynamic_map()
    distance = np.abs((centred / each)[:, None] - book.astype("f8"))
    # The nearest value of x rounded to a step of 2 / 65535.
    chosen = distance[np.arange(flat.size), codes]
    assert (chosen <= distance.min(1) + 2 / 65535 + 1e-6).all()
    # A product, rounded, and then a sum.
    want = book[codes] * each + np.asarray(nested.offset)
    got = np.asarray(dequantize(nested, axis))
    np.testing.assert_array_equal((got.T if axis == 0 else got).reshape(-1), want)


def test_scales_come_back_within_the_steps_of_the_map():
    s = scales(8, 96)
    nested = quantize(s, 0)
    got = np.asarray(dequantize(nested, 0))
    # Where it is coarsest, two values are 1 / 71 apart.
    assert np.abs(got - s).max() <= np.asarray(nested.absmax).max() / 140 + 1e-4
    assert np.abs(got - s).max() > 0


@pytest.mark.parametrize("axis", [1, 2])
def test_a_stack_has_offsets_of_its_own(axis):
    s = scales(3, 5, 77) * np.float32([1, 4, 0.1])[:, None, None]
    nested = quantize(s, axis, 1)
    assert nested.offset.shape == (3,) and nested.absmax.shape == (3, 2)
    values = dequantize(nested, axis, 1)
    for k in range(3):
        one = quantize(s[k], axis - 1)
        for a, b in zip(nested, one, strict=True):
            np.testing.assert_array_equal(a[k], b)
        np.testing.assert_array_equal(values[k], dequantize(one, axis - 1))


def test_two_stack_axes():
    s = scales(2, 3, 4, 5)
    nested = quantize(s, 2, 2)
    assert nested.offset.shape == (2, 3) and nested.absmax.shape == (2, 3, 1)
    one = quantize(s[1, 2], 0)
    for a, b in zip(nested, one, strict=True):
        np.testing.assert_array_equal(a[1, 2], b)


@pytest.mark.parametrize("value", [0.0, 0.7])
def test_equal_scales_are_exact_and_get_code_0(value):
    s = np.full((4, 100), value, np.float32)
    nested = quantize(s, 0)
    np.testing.assert_array_equal(nested.codes, 0)
    np.testing.assert_array_equal(nested.absmax, 0)
    np.testing.assert_array_equal(dequantize(nested, 0), s)


@pytest.mark.parametrize("n", [1, 2, 3, 64, 1000, 4097])
def test_the_mean_is_the_exact_sum_rounded_once_and_divided(n):
    rng = np.random.default_rng(n)
    x = (rng.gamma(2, 1, n) * 10.0 ** rng.integers(-6, 6, n)).astype(np.float32)
    want = np.float32(math.fsum(x.tolist())) / np.float32(n)
    mean = jax.jit(double.exact_mean)
    assert mean(x) == want
    assert mean(rng.permutation(x)) == want


def test_the_mean_keeps_what_float32_sums_lose():
    x = np.ones(1 << 12, np.float32)
    x[0] = 2.0**30
    assert np.asarray(jax.jit(double.exact_mean)(x)) == np.float32(2.0**18 + 1)


@pytest.mark.slow
def test_the_mean_of_the_largest_numbers_does_not_overflow():
    most = np.finfo(np.float32).max
    x = jnp.full(512, most)
    assert double.exact_mean(x) == most
    nested = double.quantize_scales(x[None, :, None], 1, 1)
    np.testing.assert_array_equal(double.dequantize_scales(nested, 1, 1), most)
    x = most * jax.random.uniform(jax.random.key(0), (1, 512, 1))
    nested = double.quantize_scales(x, 1, 1)
    back = double.dequantize_scales(nested, 1, 1)
    assert float(jnp.max(jnp.abs(back / most - x / most))) < 0.02
    some = jnp.array([most, 1.0, most / 2])
    want = np.asarray(some, np.float64).mean()
    assert float(double.exact_mean(some)) == np.float32(want)
