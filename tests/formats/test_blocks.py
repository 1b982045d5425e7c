"""Every format in every granularity, against its formula in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from speed import slow_but

import jpeft
from jpeft.formats import blocks
from jpeft.formats.blocks import BLOCK_SIZES, FORMATS

COLUMNS = 3
# What is said of scales in float32; for GGUF's formats there is `test_gguf.py`.
OWN = [f for f in FORMATS if not FORMATS[f].of_gguf]
SIZED = [(f, 32 if FORMATS[f].of_gguf else 64) for f in FORMATS]
# Sizes beyond these repeat what they show: for most formats they are slow.
COMMON = (32, 64, "channel", "tensor")
GRID = [
    pytest.param(
        format,
        size,
        id=f"{format}-{size}",
        marks=[] if size in COMMON else [pytest.mark.slow],
    )
    for format in OWN
    for size in (*BLOCK_SIZES, "channel", "tensor")
]


@functools.partial(jax.jit, static_argnames=("format", "size", "axis", "stack"))
def quantize(x, format, size, axis=0, stack=0):
    return blocks.quantize(x, FORMATS[format], size, axis, stack)


@functools.partial(
    jax.jit, static_argnames=("format", "size", "axis", "length", "stack", "dtype")
)
def dequantize(q, format, size, length, axis=0, stack=0, dtype=jnp.float32):
    return blocks.dequantize(q, FORMATS[format], size, axis, length, stack, dtype)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def logical(q, format):
    """The codes one by one along axis 0, unpacked by hand."""
    codes = np.asarray(q.codes)
    if not FORMATS[format].packed:
        return codes
    groups = codes.reshape(-1, 32, codes.shape[1])
    return np.concatenate([groups & 15, groups >> 4], 1).reshape(-1, codes.shape[1])


def of_elements(s, k, size):
    """Scales or zero points (blocks, n or 1), one for each of (k, n) elements."""
    s = np.asarray(s)
    if isinstance(size, int):
        s = np.repeat(s, size, 0)[:k]
    return np.broadcast_to(s, (k, COLUMNS))


def reduced(f, x, size):
    """f of each block, as the scales are laid out."""
    if size == "tensor":
        return f(x).reshape(1, 1)
    size = len(x) if size == "channel" else size
    return np.stack([f(x[i : i + size], axis=0) for i in range(0, len(x), size)])


def book_of(q, format):
    return np.asarray(FORMATS[format].book() if q.book is None else q.book)


@pytest.mark.sample(6)
@pytest.mark.parametrize(("format", "size"), GRID)
def test_codes_and_values_are_those_of_the_formula(format, size):
    """The last block is not full and K is odd."""
    k = size + 45 if isinstance(size, int) else 77
    x = normal(k, COLUMNS, seed=k)
    q = quantize(x, format, size)
    codes = logical(q, format)[:k]
    got = np.asarray(dequantize(q, format, size, k))
    assert got.shape == x.shape and got.dtype == np.float32
    assert q.scales.dtype == jnp.float32
    scale, exact = of_elements(q.scales, k, size), x.astype(np.float64)
    kind = FORMATS[format]
    if kind.zero_point:
        top = 2**kind.bits - 1
        low, high = (reduced(f, exact, size) for f in (np.min, np.max))
        step = (np.maximum(high, 0) - np.minimum(low, 0)) / top
        np.testing.assert_allclose(q.scales, step, rtol=5e-7)  # a product and a sum
        zero = of_elements(q.zeros, k, size).astype(np.int32)
        np.testing.assert_array_equal(
            got, (codes.astype(np.int32) - zero).astype(np.float32) * scale
        )
        assert codes.max() <= top
        # Nearest, and zero is one of the values.
        assert (np.abs(got - exact) <= scale * (0.5 + 1e-4)).all()
        return
    np.testing.assert_array_equal(q.scales, reduced(np.max, np.abs(x), size))
    unit = exact / scale
    if format == "int8":
        # Codes are rounded products, so one beside a half may go either way.
        assert (np.abs(codes - unit * 127) <= 0.5 + 1e-4).all()
        np.testing.assert_allclose(got, codes * scale.astype("f8") / 127, rtol=5e-7)
        return
    book = book_of(q, format)
    np.testing.assert_array_equal(got, book[codes] * scale)
    # dynamic8 rounds to a step of 2 / 65535 first.
    room = 1e-6 + (2 / 65535 if format == "dynamic8" else 0)
    nearest = np.abs(unit[..., None] - book.astype(np.float64)).min(-1)
    assert (np.abs(unit - book[codes]) <= nearest + room).all()


@pytest.mark.sample(5)
@pytest.mark.parametrize("size", [32, 128, "channel"])
@pytest.mark.parametrize("format", [f for f in OWN if FORMATS[f].packed])
def test_what_fills_the_last_group_decodes_to_zero(format, size):
    q = quantize(normal(77, COLUMNS) + 2, format, size)
    stored = np.asarray(dequantize(q, format, size, 128))
    np.testing.assert_array_equal(stored[77:], 0)
    assert np.abs(stored[:77]).max() > 2


@pytest.mark.sample(4)
@pytest.mark.parametrize("format", FORMATS)
def test_an_array_along_its_last_axis_is_its_transpose_along_the_first(format):
    x = normal(77, COLUMNS)
    a, b = quantize(x, format, 32), quantize(x.T, format, 32, axis=1)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(one, other.T)
    np.testing.assert_array_equal(
        dequantize(a, format, 32, 77), dequantize(b, format, 32, 77, axis=1).T
    )


@pytest.mark.sample(3)
@pytest.mark.parametrize(("format", "size"), [*SIZED, ("nf4", "tensor")])
def test_a_stack_is_its_matrices_one_by_one(format, size):
    x = normal(2, 77, COLUMNS) * np.float32([1, 3])[:, None, None]
    q = quantize(x, format, size, axis=1, stack=1)
    values = dequantize(q, format, size, 77, axis=1, stack=1)
    for k in range(2):
        one = quantize(x[k], format, size)
        for field, a, b in zip(q._fields, q, one, strict=True):
            assert (a is None) == (b is None), field
            if a is not None:
                np.testing.assert_array_equal(a[k], b, err_msg=field)
        np.testing.assert_array_equal(values[k], dequantize(one, format, size, 77))


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("format", "size", "dtype"),
    [*((*one, "bfloat16") for one in SIZED), ("nf4", 64, "float16")],
)
def test_arithmetic_is_float32_and_rounded_once(format, size, dtype):
    x = jnp.asarray(normal(77, COLUMNS), dtype)
    q, wide = quantize(x, format, size), quantize(x.astype(jnp.float32), format, size)
    jax.tree.map(np.testing.assert_array_equal, q, wide)
    got = dequantize(q, format, size, 77, dtype=dtype)
    assert got.dtype == dtype
    want = dequantize(q, format, size, 77).astype(dtype)
    np.testing.assert_array_equal(got.astype("float32"), want.astype("float32"))


# --- what is special -----------------------------------------------------------------


@pytest.mark.sample(5)
@pytest.mark.parametrize("size", [32, "channel"])
@pytest.mark.parametrize("format", OWN)
def test_zeros_come_back_as_zeros_and_constants_as_themselves(format, size):
    x = np.zeros((77, 5), np.float32)
    x[:, 1:] = 0.7, -1.3, 1e30, -1e-30
    q = quantize(x, format, size)
    assert (np.asarray(q.scales)[:, 0] == 0).all()
    got = np.asarray(dequantize(q, format, size, 77))
    np.testing.assert_array_equal(got[:, 0], 0)
    # Two roundings; the dynamic map ends at -0.9929687, as bitsandbytes' does.
    room = np.where(x < 0, 8e-3, 5e-7) if format == "dynamic8" else 5e-7
    assert (np.abs(got - x) <= room * np.abs(x)).all()


@pytest.mark.parametrize("format", [f for f in FORMATS if not FORMATS[f].least])
def test_zero_comes_back_among_other_numbers(format):
    x = normal(77, COLUMNS)
    x[::3] = 0
    got = np.asarray(dequantize(quantize(x, format, 32), format, 32, 77))
    # bitsandbytes on a CPU rounds to 65,536 steps first, none of which is zero.
    room = 2.2e-5 * np.abs(x).max() if format == "dynamic8" else 0
    assert np.abs(got[::3]).max() <= room


@pytest.mark.parametrize("format", [f for f in OWN if not FORMATS[f].zero_point])
def test_the_largest_of_a_block_comes_back(format):
    """1 is a value of every book; -1 is not."""
    x = normal(64, 4)
    x[7] = 5
    got = np.asarray(dequantize(quantize(x, format, 64), format, 64, 64))
    np.testing.assert_allclose(got[7], 5, rtol=5e-7)


@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_one_element_that_is_not_finite_spoils_its_block_alone(format, bad):
    x = normal(77, 2)
    clean = dequantize(quantize(x, format, 32), format, 32, 77)
    x[40, 1] = bad
    got = np.asarray(dequantize(quantize(x, format, 32), format, 32, 77))
    # An infinity comes back positive.
    assert np.isnan(got[40, 1]) if np.isnan(bad) else got[40, 1] == np.inf
    spoilt = np.zeros(x.shape, bool)
    spoilt[32:64, 1] = True
    spoilt[40, 1] = False
    assert np.isnan(got[spoilt]).all()
    spoilt[40, 1] = True
    np.testing.assert_array_equal(got[~spoilt], np.asarray(clean)[~spoilt])


@pytest.mark.parametrize(("format", "size"), SIZED)
def test_nothing_finite_is_left_in_a_block_that_is_not(format, size):
    x = normal(size, COLUMNS)
    x[11] = np.inf, -np.inf, np.nan
    got = np.asarray(dequantize(quantize(x, format, size), format, size, size))
    assert not np.isfinite(got).any()


@pytest.mark.parametrize("power", [-121, -60, 110, 127])
def test_a_power_of_two_scales_the_values_and_not_the_codes(power):
    """Near both ends of float32, where the reciprocal of absmax would be subnormal."""
    x = normal(64, COLUMNS)
    x = (x / np.abs(x).max()).astype(np.float32)
    scaled = x * np.float32(2.0) ** np.float32(power)
    a, b = quantize(x, "nf4", 64), quantize(scaled, "nf4", 64)
    differ = (logical(a, "nf4") != logical(b, "nf4")).mean()
    assert differ < 0.01  # a reciprocal may round differently
    back = np.asarray(dequantize(b, "nf4", 64, 64), np.float64) / 2.0**power
    np.testing.assert_allclose(back, dequantize(a, "nf4", 64, 64), atol=0.32)


LARGEST = float(np.finfo(np.float32).max)


@pytest.mark.parametrize("format", ["int4_asymmetric", "int8_asymmetric"])
def test_a_block_that_spans_more_than_float32_holds_stays_finite(format):
    """As `finfo.min` in a mask beside positive numbers, and what is near to it."""
    x = normal(64, 5) / 4
    x[:, 0] = LARGEST * np.where(np.arange(64) % 3, 1, -1)
    x[7, 1], x[8, 1] = -LARGEST, 1.0
    x[7, 2], x[8, 2] = LARGEST, -2.0
    x[:, 3] = x[:, 3].astype(np.float64) / np.abs(x[:, 3]).max() * LARGEST
    q = quantize(x, format, 64)
    got = np.asarray(dequantize(q, format, 64, 64), np.float64)
    assert np.isfinite(got).all()
    # Half a step; where that would lead beyond float32 one, and the room that is left.
    span = np.maximum(x.max(0), 0).astype(np.float64) - np.minimum(x.min(0), 0)
    step = span / (2 ** FORMATS[format].bits - 1)
    assert (np.abs(got - x) <= 1.01 * step + 0.04 * np.abs(x)).all()
    # Where nothing is large, nothing is changed.
    np.testing.assert_array_equal(
        got[:, 4], dequantize(quantize(x[:, 4:], format, 64), format, 64, 64)[:, 0]
    )


# --- code books learned from the data ------------------------------------------------


def learned(sample, unit, n):
    """The book in float64: of a sample, with the ends of all."""
    end = 1 - (1 / (2 * n) + 1 / (2 * n - 2)) / 2
    lower = np.linspace(1 - end, 0.5, n // 2)[:-1]
    upper = np.linspace(0.5, end, n // 2 + 1)[1:]
    at = np.concatenate([lower, [0.5], upper])
    book = np.quantile(sample.astype(np.float64), at)
    book /= np.abs(book).max()
    book[np.abs(book).argmin()] = 0
    book[0], book[-1] = unit.min(), unit.max()
    return np.sort(book)


@pytest.mark.parametrize("format", ["quantile4", "quantile8"])
def test_a_learned_book_holds_the_quantiles_of_the_data(format):
    x = normal(448, COLUMNS)
    q = quantize(x, format, 64)
    n = 2 ** FORMATS[format].bits
    book = np.asarray(q.book)
    unit = x / of_elements(q.scales, 448, 64)
    np.testing.assert_allclose(book, learned(unit, unit, n), atol=1e-5)
    assert book.shape == (n,) and (book == 0).sum() == 1
    assert (np.diff(book) >= 0).all()


@pytest.mark.parametrize(("format", "size"), [("quantile4", 64), ("quantile8", 4096)])
def test_what_fills_up_a_block_is_not_learned_from(format, size):
    x = normal(size + 1, COLUMNS)
    q = quantize(x, format, size)
    unit = x / of_elements(q.scales, size + 1, size)
    book = learned(unit, unit, 2 ** FORMATS[format].bits)
    np.testing.assert_allclose(q.book, book, atol=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
def test_zero_is_exact_where_one_sign_is_rare(sign):
    x = np.linspace(0.2, 1.0, 4096).astype(np.float32)
    x[:20], x[20:40] = 0, -np.linspace(0.2, 1.0, 20)
    x = sign * np.random.default_rng(0).permutation(x).reshape(64, 64)
    for format in ("quantile4", "quantile8"):
        got = np.asarray(dequantize(quantize(x, format, 64), format, 64, 64))
        assert (got[x == 0] == 0).all()


def test_a_learned_book_follows_the_data():
    """Of a lopsided distribution it wins over the normal's quantiles."""
    x = np.exp(normal(512, 64))
    error = {
        f: np.mean((np.asarray(dequantize(quantize(x, f, 64), f, 64, 512)) - x) ** 2)
        for f in ("nf4", "quantile4")
    }
    assert error["quantile4"] < 0.7 * error["nf4"]


@pytest.mark.slow
def test_a_book_of_millions_is_learned_from_every_kth():
    x = normal(1024, 2048)
    book = np.asarray(quantize(x, "quantile4", "channel").book)
    unit = x / np.abs(x).max(0)
    every_second = unit.reshape(-1)[::2]
    np.testing.assert_allclose(book, learned(every_second, unit, 16), atol=1e-5)
    assert np.abs(book - learned(unit, unit, 16)).max() > 1e-4


# --- how good they are ---------------------------------------------------------------

# Of 2^18 values of N(0, 1) in blocks of 64: squared error, and with double scales.
ERROR = {
    "nf4": (8.463e-3, 8.468e-3),
    "fp4": (1.486e-2, 1.487e-2),
    "int4": (1.155e-2, 1.155e-2),
    "int4_asymmetric": (8.251e-3, 8.254e-3),
    "quantile4": (8.874e-3, 8.880e-3),
    "int8": (3.510e-5, 3.986e-5),
    "int8_asymmetric": (2.860e-5, 3.145e-5),
    "dynamic8": (9.029e-5, 9.526e-5),
    "quantile8": (6.138e-5, 6.612e-5),
    # Blocks of 32, whose scales are not quantised.
    "q4_0": (7.385e-3, 7.385e-3),
    "q4_1": (6.118e-3, 6.118e-3),
    "q8_0": (2.869e-5, 2.869e-5),
}


def measured(format, double, size=None):
    x = jax.random.normal(jax.random.key(0), (512, 512))
    q = jpeft.quant.quantize(x, format, double=double, block_size=size, axis=0)
    return float(jnp.mean(jnp.square(jpeft.quant.dequantize(q) - x)))


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_the_squared_error_of_a_normal_is_as_pinned(format):
    """The samples alone vary by 0.3 %."""
    plain, double = ERROR[format]
    assert measured(format, False) == pytest.approx(plain, rel=0.02)
    assert measured(format, True) == pytest.approx(double, rel=0.02)


def test_the_order_of_the_4_bit_formats():
    """A zero point costs 1/8 bit a parameter, and pays in small blocks only."""
    order = ["int4_asymmetric", "nf4", "int4", "fp4"]
    assert sorted(order, key=lambda f: measured(f, False)) == order
    assert measured("nf4", False, 128) < measured("int4_asymmetric", False, 128)


@pytest.mark.parametrize(
    ("format", "size", "double", "bits"),
    [
        ("nf4", 64, True, 4.127),
        ("nf4", 64, False, 4.5),
        ("nf4", 32, True, 4.254),
        ("nf4", 4096, False, 4.0625),  # rows of 512: a block is 512
        ("int4_asymmetric", 64, True, 4.252),  # a byte for the zero point
        ("int8", 64, True, 8.127),
        ("int8", "channel", True, 8.0625),  # such scales stay float32
        ("int8", "tensor", True, 8.000122),
        ("q4_0", None, True, 4.5),  # scales of two bytes, and they stay so
        ("q4_1", None, True, 5.0),
        ("q8_0", 32, False, 8.5),
    ],
)
def test_bits_per_parameter(format, size, double, bits):
    x = jnp.zeros((512, 512))
    q = jpeft.quant.quantize(x, format, block_size=size, double=double, axis=0)
    assert q.bits_per_parameter == pytest.approx(bits, abs=2e-3 if size == 64 else 1e-3)


# --- parts of a matrix ---------------------------------------------------------------


@pytest.mark.sample(4)
@pytest.mark.parametrize("size", slow_but([64], [32, 64, 256, "channel", "tensor"]))
@pytest.mark.parametrize(
    "format", ["nf4", "int8", "int4_asymmetric", "quantile4", "q4_1", "q8_0"]
)
@pytest.mark.parametrize("axis", [0, 1])
def test_parts_of_a_matrix_are_parts_of_its_values(format, size, axis):
    """Rows between groups of 64, and columns anywhere."""
    kind, x = FORMATS[format], normal(333, 37)
    x = x if axis == 0 else x.T
    q = blocks.filled(quantize(x, format, size, axis), kind, size, axis)
    stored = q.codes.shape[axis] * (2 if kind.packed else 1)
    starts = (0, 64, 256)

    def both(q):
        whole = blocks.dequantize(q, kind, size, axis, stored)
        cut, decode, unit = blocks.along(q, kind, size, axis, jnp.float32)
        assert unit == 64
        along = [decode(cut(jnp.int32(s), 64), 64) for s in starts]
        cut, decode, unit = blocks.across(q, kind, size, axis, stored, jnp.float32)
        assert unit == 1
        across = [decode(cut(jnp.int32(s), 5), 5) for s in (0, 7, 32)]
        return whole, along, across

    whole, along, across = jax.jit(both)(q)
    for start, part in zip(starts, along, strict=True):
        rows = jax.lax.slice_in_dim(whole, start, start + 64, axis=axis)
        np.testing.assert_array_equal(part, rows)
    for start, part in zip((0, 7, 32), across, strict=True):
        columns = jax.lax.slice_in_dim(whole, start, start + 5, axis=1 - axis)
        np.testing.assert_array_equal(part, columns)
