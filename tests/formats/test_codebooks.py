"""The code books: where their values come from, and the nearest code of a number."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpeft.formats import codebooks
from jpeft.formats.codebooks import CODEBOOKS, FP4, INT4, NF4

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "bitsandbytes_golden.npz")
UP, DOWN = np.float32(2), np.float32(-2)
# A float32 near 1 is known to 6e-8, so a difference of two of them to some 1e-7.
ROUNDING = 5e-7


def encode(x, format):
    return np.asarray(jax.jit(codebooks.encode, static_argnums=1)(x, format))


def bits(x):
    return np.asarray(x, np.float32).view(np.uint32)


# --- the values ----------------------------------------------------------------------


def test_nf4_follows_from_the_quantiles_of_the_normal():
    derived = codebooks.normal_float()
    np.testing.assert_allclose(derived, NF4, rtol=0, atol=5e-7)
    assert derived[15] == 1 and derived[0] == -1 and derived[7] == 0
    # Another outermost probability shows: 0.97 is as good as none.
    assert np.abs(codebooks.normal_float(0.97) - NF4).max() > 1e-3


def test_nf4_is_sorted_and_leans_to_the_positive():
    assert (np.diff(NF4) > 0).all()
    assert (NF4 > 0).sum() == 8 and (NF4 < 0).sum() == 7


def test_fp4_is_its_twelfths_with_the_sign_in_bit_3():
    twelfths = np.array([0, 1 / 16, 8, 12, 4, 6, 2, 3]) / 12
    np.testing.assert_allclose(FP4[:8], twelfths, rtol=1e-7)
    np.testing.assert_array_equal(bits(FP4[8:]), bits(-FP4[:8]))


def test_int4_is_the_sevenths():
    np.testing.assert_array_equal(INT4[1:], np.arange(-7, 8, dtype=np.float32) / 7)
    assert INT4[8] == 0 and INT4[15] == 1


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("quant_map/nf4", NF4),
        ("quant_map/fp4", FP4),
        ("nested_quant_map", codebooks.dynamic_map()),
    ],
)
def test_code_books_are_those_of_bitsandbytes_bit_for_bit(name, values):
    np.testing.assert_array_equal(values, GOLDEN[name])
    nonzero = values != 0  # -0 has another name in fp4
    np.testing.assert_array_equal(bits(values)[nonzero], bits(GOLDEN[name])[nonzero])


def test_the_dynamic_map_is_256_sorted_values_around_zero():
    values = codebooks.dynamic_map()
    assert values.shape == (256,) and values.dtype == np.float32
    assert (np.diff(values) > 0).all() and values[127] == 0
    assert values[255] == 1 and abs(values[0] + 0.9929687) < 1e-7
    # 1 and 0 alone have no negative twin.
    np.testing.assert_array_equal(values[128:255], -values[126::-1])


def test_each_decade_of_the_dynamic_map_has_twice_the_values_of_the_one_below():
    values = codebooks.dynamic_map()[128:255]
    decades = np.floor(np.log10(values)).astype(int)
    counts = [(decades == k).sum() for k in range(-7, 0)]
    assert counts == [2**k for k in range(7)]
    # Within one, the centres of equal parts.
    step = np.diff(values[decades == -1].astype(np.float64))
    np.testing.assert_allclose(step, 0.9 / 64, rtol=1e-5)


# --- the nearest code ----------------------------------------------------------------


@pytest.mark.parametrize("format", ["nf4", "fp4", "int4"])
def test_the_code_is_that_of_the_nearest_value(format):
    """By brute force in float64.  Within rounding of a midpoint either will do."""
    x = np.random.default_rng(0).uniform(-1, 1, (211, 97)).astype(np.float32)
    book = CODEBOOKS[format].astype(np.float64)
    distance = np.abs(x[..., None].astype(np.float64) - book)
    code = encode(x, format)
    assert code.dtype == np.uint8
    chosen = np.take_along_axis(distance, code[..., None].astype(int), -1)[..., 0]
    # Two codes of fp4 are zero, so distances are compared, not codes.
    assert (chosen <= distance.min(-1) + ROUNDING).all()
    assert len(np.unique(code)) == (15 if format == "int4" else 16)


@pytest.mark.parametrize("format", ["nf4", "fp4", "int4"])
def test_values_of_the_book_are_their_own_codes(format):
    book = CODEBOOKS[format]
    book = book[1:] if format == "int4" else book  # code 0 is not made
    np.testing.assert_array_equal(CODEBOOKS[format][encode(book, format)], book)


@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_a_tie_goes_to_the_lower_value_and_one_ulp_beside_it_decides(format):
    values = np.unique(CODEBOOKS[format])
    middle = codebooks.midpoints(values)
    assert middle.dtype == np.float32 and middle.size == values.size - 1
    book = CODEBOOKS[format]
    around = [np.nextafter(middle, DOWN), middle, np.nextafter(middle, UP)]
    below, at, above = (book[encode(m, format)] for m in around)
    np.testing.assert_array_equal(below, values[:-1])
    np.testing.assert_array_equal(at, values[:-1])
    np.testing.assert_array_equal(above, values[1:])


def test_int4_rounds_ties_to_even():
    x = np.array([0.5, -0.5], np.float32)  # 3.5 sevenths, exactly
    np.testing.assert_array_equal(encode(x, "int4"), [8 + 4, 8 - 4])


def test_fp4_calls_zero_0_and_what_is_rounded_down_to_it_8():
    x = np.array([-1e-3, -0.0, 0.0, 1e-3], np.float32)
    np.testing.assert_array_equal(encode(x, "fp4"), [0, 0, 0, 8])


@pytest.mark.parametrize(("format", "code"), [("nf4", 15), ("fp4", 3)])
def test_nan_gets_the_code_of_the_largest(format, code):
    assert encode(np.array([np.nan], np.float32), format)[0] == code
    assert CODEBOOKS[format][code] == 1


def test_the_ends_and_both_zeros_of_nf4():
    x = np.array([-1, -0.0, 0.0, 1], np.float32)
    np.testing.assert_array_equal(encode(x, "nf4"), [0, 7, 7, 15])


def test_dynamic_codes_are_the_nearest_of_65536_steps():
    x = np.random.default_rng(1).uniform(-1, 1, 9973).astype(np.float32)
    x[:4] = -1, -0.9929687, 0, 1
    book = codebooks.dynamic_map().astype(np.float64)
    step = np.floor((1 + x.astype(np.float64)) / 2 * 65535 + 0.5)
    rounded = step * 2 / 65535 - 1
    code = np.asarray(jax.jit(codebooks.encode_dynamic)(x))
    assert code.dtype == np.uint8
    # A step may round to its neighbour, and a value beside a midpoint either way.
    distance = np.abs(rounded[:, None] - book)
    chosen = distance[np.arange(x.size), code]
    assert (chosen <= distance.min(1) + ROUNDING).mean() > 0.999
    assert (chosen <= distance.min(1) + 2 / 65535 + ROUNDING).all()
    assert code[0] == 0 and code[3] == 255


def test_an_unknown_book_is_named():
    with pytest.raises(ValueError, match="no fixed 4-bit code book is named 'nf5'"):
        codebooks.encode(jnp.zeros(3), "nf5")


# --- bisection and selection ---------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
def test_bisection_counts_the_thresholds_below(bits):
    rng = np.random.default_rng(bits)
    thresholds = np.sort(rng.standard_normal(2**bits - 1)).astype(np.float32)
    x = np.concatenate([rng.standard_normal(101).astype(np.float32), thresholds])
    got = jax.jit(lambda x: codebooks.count_above(x, thresholds.tolist()))(x)
    np.testing.assert_array_equal(got, (x[:, None] > thresholds).sum(1))


@pytest.mark.parametrize("bits", [1, 3, 4])
@pytest.mark.parametrize("first", [0, 4])
def test_look_up_reads_its_bits_and_no_others(bits, first):
    values = np.random.default_rng(2).standard_normal(2**bits).astype(np.float32)
    byte = np.arange(256, dtype=np.uint8)
    code = (byte >> first) & (2**bits - 1)
    got = jax.jit(lambda c: codebooks.look_up(c, list(values), first))(byte)
    np.testing.assert_array_equal(got, values[code])


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_places_in_a_table_are_those_of_a_sorted_search(bits):
    thresholds = np.sort(np.random.default_rng(bits).normal(size=2**bits - 1))
    thresholds = thresholds.astype(np.float32)
    thresholds[len(thresholds) // 2 :][:2] = thresholds[len(thresholds) // 2]  # equal
    beside = [np.nextafter(thresholds, np.float32(s)) for s in (-9, 9)]
    x = np.concatenate([thresholds, *beside, [-np.inf, np.inf, np.nan, 0.0]])
    found = jax.jit(codebooks.place)(x.astype(np.float32), thresholds)
    assert found.dtype == jnp.uint8
    np.testing.assert_array_equal(found, np.searchsorted(thresholds, x))
