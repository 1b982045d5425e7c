"""GGUF's own formats against its library, gguf, whose codes and values they have."""

import functools

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.formats import blocks
from jpeft.formats.blocks import FORMATS

KINDS = [f for f in FORMATS if FORMATS[f].of_gguf]
pytestmark = pytest.mark.float16
run = jax.jit(functools.partial(jpeft.quant.quantize, axis=0), static_argnames="format")
value = jax.jit(jpeft.quant.dequantize)


def inputs():
    """(96, 40), what rounding meets: all sizes, ties, one sign, zeros, constants."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((96, 40)).astype(np.float32)
    x *= np.float32(10) ** rng.uniform(-4, 3, 40).astype(np.float32)
    x[:, 8:16] = np.round(4 * x[:, 8:16]) / 4  # the largest is there with both signs
    x[:, 16:20] = np.round(2 * rng.standard_normal((96, 4)))
    x[:, 20:24] = np.abs(x[:, 20:24])
    x[::7, 24:28] = 0
    x[:32, 28], x[:, 29], x[:, 30] = 0, 0.7, -1.3
    return x


def parts(raw, format):
    """(codes, scales, least values or None) of GGUF's rows, each (in, out)."""
    bytes_ = {"q4_0": 18, "q4_1": 20, "q8_0": 34}[format]
    block = raw.reshape(raw.shape[0], -1, bytes_)
    halves = 2 if format == "q4_1" else 1
    floats = np.ascontiguousarray(block[..., : 2 * halves]).view(np.float16)
    codes = block[..., 2 * halves :]
    if format == "q8_0":
        codes = codes.view(np.int8)
    else:
        codes = np.concatenate([codes & 15, codes >> 4], -1)
    least = floats[..., 1].T if halves == 2 else None
    return codes.reshape(raw.shape[0], -1).T, floats[..., 0].T, least


def logical(q):
    """The codes one by one along axis 0, unpacked by hand."""
    codes = np.asarray(q.codes)
    if not q.kind.packed:
        return codes
    groups = codes.reshape(-1, 32, codes.shape[1])
    return np.concatenate([groups & 15, groups >> 4], 1).reshape(-1, codes.shape[1])


@pytest.mark.parametrize("format", KINDS)
def test_codes_scales_and_values_are_those_of_gguf(format):
    """In float32, bit for bit: a code times a scale needs fewer bits than it has."""
    x, kind = inputs(), gguf.GGMLQuantizationType[format.upper()]
    with np.errstate(all="ignore"):  # it divides by steps of zero
        raw = gguf.quants.quantize(np.ascontiguousarray(x.T), kind)
    codes, scales, least = parts(raw, format)
    q = run(x, format)
    np.testing.assert_array_equal(logical(q)[:96], codes)
    assert q.scales.dtype == jnp.float16 and q.nested is None
    np.testing.assert_array_equal(q.scales, scales)
    if least is not None:
        assert q.zeros.dtype == jnp.float16
        np.testing.assert_array_equal(q.zeros, least)
    np.testing.assert_array_equal(value(q), gguf.quants.dequantize(raw, kind).T)


@pytest.mark.parametrize("format", KINDS)
def test_a_last_block_that_is_not_full_is_filled_with_zeros(format):
    x = inputs()[:77]
    q, whole = run(x, format), run(np.pad(x, ((0, 19), (0, 0))), format)
    np.testing.assert_array_equal(logical(q)[:77], logical(whole)[:77])
    np.testing.assert_array_equal(q.scales, whole.scales)
    np.testing.assert_array_equal(value(q), value(whole)[:77])


@pytest.mark.parametrize("format", KINDS)
def test_a_book_is_what_codes_stand_for(format):
    if format == "q4_1":
        return  # refused, see tests/quant/test_arrays.py
    book = jpeft.quant.codebook(format)
    q = run(inputs(), format)
    codes = logical(q)[:96].astype(np.int32) + (128 if format == "q8_0" else 0)
    scales = np.repeat(np.asarray(q.scales, np.float32), 32, 0)
    np.testing.assert_array_equal(book[codes] * scales, value(q))


def test_the_block_size_is_the_formats_own():
    t = jpeft.quantize("q4_0")
    assert t.block_size == 32 and jpeft.quantize().block_size == 64
    assert jpeft.from_config({"method": "quantize", "format": "q4_0"}) == t
    assert jpeft.from_config(t.to_config()) == t
    loftq = {"method": "loftq", "format": "q8_0", "rank": 2}
    assert jpeft.from_config(loftq) == jpeft.loftq(2, format="q8_0")
    for make in (jpeft.quantize, functools.partial(jpeft.loftq, 2)):
        with pytest.raises(ValueError, match="block_size='channel' does not fit"):
            make(format="q4_1", block_size="channel")
    with pytest.raises(ValueError, match="block_size=64 does not fit format='q4_1'"):
        jpeft.from_config({"method": "quantize", "format": "q4_1", "block_size": 64})


def test_a_weight_beyond_float16_is_refused_where_it_is_met():
    params = {"dense": {"kernel": jnp.full((32, 3), 6e5)}}
    with pytest.raises(ValueError, match=r"dense/kernel.* holds 6e\+05.*of q4_0"):
        jpeft.quantize("q4_0")(jax.random.key(0), params)
    assert blocks.FORMATS["q8_0"].largest > 6e5
    leaf = jpeft.quantize("q8_0")(jax.random.key(0), params)["dense"]["kernel"]
    assert bool(jnp.all(jnp.isfinite(leaf.materialize())))
