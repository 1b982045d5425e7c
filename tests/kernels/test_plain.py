"""The checked entry points of the 4-bit kernels, and their meaning on a CPU."""

import functools
import itertools

import _reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jpeft.formats.blocks import BLOCK_SIZES
from jpeft.formats.codebooks import CODEBOOKS
from jpeft.kernels import four_bit

# k, n, block, m: two scales a group, blocks that end within the last, one for all rows;
# columns that fill no lane, and one or several tiles of either axis.
SHAPES = [
    (64, 1, 64, 1),
    (192, 37, 32, 5),
    (320, 130, 128, 3),
    (448, 7, 256, 33),
    (128, 65, 4096, 2),
]
FORMATS = ("nf4", "fp4", "int4")
CASES = [
    pytest.param(*shape, format, marks=[] if format == "nf4" else [pytest.mark.slow])
    for shape, format in itertools.product(SHAPES, FORMATS)
]
cases = pytest.mark.parametrize(("k", "n", "block", "m", "format"), CASES)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@functools.cache
def quantised(k, n, block, format="nf4"):
    """(codes, scales, book) by NumPy, and W in float64."""
    codes, scales = _reference.quantize(normal(k, n, seed=k + n), format, block)
    book = CODEBOOKS[format]
    w = _reference.dequantize(codes, scales, book, block)
    return (jnp.asarray(codes), jnp.asarray(scales), jnp.asarray(book)), w


def close(got, want, depth, rtol=2e-6):
    """Sums of `depth` float32 products in any order: some ulps of their magnitude."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    room = rtol * np.sqrt(depth) * np.abs(want).max()
    assert np.abs(got - want).max() <= room


@cases
def test_codes_and_scales_are_those_of_the_reference(k, n, block, m, format):
    w = normal(k, n, seed=k + n)
    codes, scales = four_bit.quantize(jnp.asarray(w), format=format, block_size=block)
    (want, want_scales, _), _ = quantised(k, n, block, format)
    np.testing.assert_array_equal(scales, want_scales)
    np.testing.assert_array_equal(codes, want)


@pytest.mark.sample(3)
@cases
def test_values_are_a_product_rounded_once(k, n, block, m, format):
    weight, w = quantised(k, n, block, format)
    for dtype in (jnp.float32, jnp.bfloat16):
        got = four_bit.dequantize(*weight, block_size=block, dtype=dtype)
        assert got.dtype == dtype
        want = jnp.asarray(w).astype(dtype)
        np.testing.assert_array_equal(got.astype("f4"), want.astype("f4"))


@pytest.mark.sample(3)
@cases
def test_products_are_those_of_float64(k, n, block, m, format):
    weight, w = quantised(k, n, block, format)
    w = w.astype(np.float64)
    x, g = normal(m, k), normal(m, n, seed=1)
    got = four_bit.matmul(jnp.asarray(x), *weight, block_size=block)
    assert got.dtype == jnp.float32
    close(got, x @ w, k)
    close(
        four_bit.matmul_transposed(jnp.asarray(g), *weight, block_size=block),
        g @ w.T,
        n,
    )


@pytest.mark.parametrize("transposed", [False, True])
def test_bfloat16_is_multiplied_as_it_is_and_summed_in_float32(transposed):
    weight, w = quantised(320, 130, 128)
    low = np.asarray(jnp.asarray(w, jnp.bfloat16), np.float64)
    low = low.T if transposed else low
    x = jnp.asarray(normal(3, low.shape[0]), jnp.bfloat16)
    run = four_bit.matmul_transposed if transposed else four_bit.matmul
    want = np.asarray(x, np.float64) @ low
    wide = run(x, *weight, block_size=128, dtype=jnp.float32)
    assert wide.dtype == jnp.float32
    close(wide, want, low.shape[0])
    narrow = run(x, *weight, block_size=128)
    assert narrow.dtype == jnp.bfloat16
    # One rounding to 8 bits.
    np.testing.assert_allclose(
        np.asarray(narrow, np.float64), want, rtol=2**-8, atol=1e-4
    )


@pytest.mark.sample(3)
@pytest.mark.parametrize("block", BLOCK_SIZES)
def test_every_block_size(block):
    weight, w = quantised(320, 5, block)
    x = normal(3, 320)
    close(four_bit.matmul(jnp.asarray(x), *weight, block_size=block), x @ w, 320)


@pytest.mark.sample(1)
@pytest.mark.parametrize("over", ["x and weight", "weight", "x"])
def test_vmap_is_one_by_one(over):
    """Experts come as a leading axis of x, codes and scales."""
    (codes, scales, book), _ = quantised(192, 37, 32)
    other = jax.tree.map(jnp.asarray, _reference.quantize(normal(192, 37), "nf4", 32))
    codes, scales = jnp.stack([codes, other[0]]), jnp.stack([scales, other[1]])
    x = jnp.asarray(normal(2, 5, 192))
    of_x, of_w = (0 if name in over else None for name in ("x", "weight"))
    x = x if of_x == 0 else x[0]
    codes, scales = (codes, scales) if of_w == 0 else (codes[0], scales[0])
    run = functools.partial(four_bit.matmul, block_size=32)
    got = jax.jit(jax.vmap(run, (of_x, of_w, of_w, None)))(x, codes, scales, book)
    for e in range(2):
        pick = lambda a, axis, e=e: a[e] if axis == 0 else a
        want = run(pick(x, of_x), pick(codes, of_w), pick(scales, of_w), book)
        np.testing.assert_allclose(got[e], want, rtol=1e-5, atol=1e-5)


# --- gradients -----------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
def test_the_gradient_of_x_is_the_other_product(transposed):
    weight, w = quantised(192, 37, 32)
    w = (w.T if transposed else w).astype(np.float64)
    run = four_bit.matmul_transposed if transposed else four_bit.matmul
    x, g = normal(5, w.shape[0]), normal(5, w.shape[1], seed=3)
    _, pull = jax.vjp(lambda x: run(x, *weight, block_size=32), jnp.asarray(x))
    (dx,) = pull(jnp.asarray(g))
    close(dx, g @ w.T, w.shape[1])


@pytest.mark.float16
def test_the_gradient_of_x_has_its_dtype():
    weight, _ = quantised(192, 37, 32)
    x = jnp.ones((2, 192), jnp.bfloat16)
    f = lambda x: four_bit.matmul(x, *weight, block_size=32, dtype=jnp.float32)
    y, pull = jax.vjp(f, x)
    (dx,) = pull(jnp.ones_like(y))
    assert (y.dtype, dx.dtype) == (jnp.float32, x.dtype)


def test_it_is_linear_so_gradients_of_gradients_are_right():
    weight, _ = quantised(64, 7, 64)
    f = lambda x: jnp.sum(jnp.tanh(four_bit.matmul(jnp.asarray(x), *weight)))
    check_grads(f, (jnp.asarray(0.1 * normal(2, 64)),), 2, modes=["rev"], rtol=2e-2)


def test_only_codes_and_scales_wait_for_the_backward_pass():
    weight, _ = quantised(192, 37, 32)

    def kept(x, *weight):
        _, pull = jax.vjp(lambda x: four_bit.matmul(x, *weight, block_size=32), x)
        return jax.tree.leaves(pull)

    found = jax.eval_shape(kept, jnp.ones((5, 192)), *weight)
    shapes = sorted((x.shape, x.dtype.name) for x in found if x.ndim)
    want = sorted((x.shape, x.dtype.name) for x in weight)
    assert shapes == want


def test_weights_are_constants():
    (codes, scales, book), _ = quantised(64, 7, 64)
    f = lambda scales, book: jnp.sum(
        four_bit.matmul(jnp.ones((2, 64)), codes, scales, book)
    )
    for g in jax.grad(f, (0, 1))(scales, book):
        np.testing.assert_array_equal(g, 0)


# --- the checked entry ---------------------------------------------------------------

CODES, SCALES, BOOK = jnp.zeros((96, 5), jnp.uint8), jnp.ones((3, 5)), jnp.zeros(16)


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (
            lambda: four_bit.quantize(jnp.ones((64, 3)), format="int8"),
            ["format='int8'", "['fp4', 'int4', 'nf4']"],
        ),
        (lambda: four_bit.quantize(jnp.ones((64, 3), int)), ["w is int32, expected"]),
        (lambda: four_bit.quantize(jnp.ones(64)), ["shape (64,)", "expected (k, n)"]),
        (lambda: four_bit.quantize(jnp.ones((64, 0))), ["shape (64, 0)"]),
        (
            lambda: four_bit.quantize(jnp.ones((64, 3)), block_size=48),
            ["block_size=48", "32, 64, 128"],
        ),
        (
            lambda: four_bit.dequantize(CODES, SCALES[:2], BOOK),
            ["scales have shape (2, 5)", "expected (3, 5)", "each block of 64 rows"],
        ),
        (
            lambda: four_bit.matmul(jnp.ones((2, 96)), CODES, SCALES, BOOK),
            ["x has shape (2, 96)", "expected (..., 192), or from 129 on"],
        ),
        (
            lambda: four_bit.matmul(jnp.float32(2), CODES, SCALES, BOOK),
            ["x has shape (), expected (..., 192)"],
        ),
        (
            lambda: four_bit.matmul(jnp.ones((2, 192), int), CODES, SCALES, BOOK),
            ["x is int32, expected real floating-point numbers"],
        ),
        (
            lambda: four_bit.matmul(
                jnp.ones((2, 192)), CODES[None], SCALES[None], BOOK
            ),
            ["x has shape (2, 192) for a stack of 1 matrices", "(1, ..., features)"],
        ),
        (
            lambda: four_bit.dequantize(CODES, SCALES, BOOK, rows=128),
            ["rows=128: expected 129 to 192"],
        ),
        (
            lambda: four_bit.matmul_transposed(jnp.ones((2, 7)), CODES, SCALES, BOOK),
            ["g has shape (2, 7)", "expected (..., 5)"],
        ),
    ],
)
def test_a_wrong_shape_is_answered_with_the_right_one(call, parts, unchecked):
    with pytest.raises(ValueError) as error:
        call()
    for part in parts:
        assert part in str(error.value)


@pytest.mark.sample(1)
@pytest.mark.parametrize("k", [7, 100])
@pytest.mark.parametrize("stack", [(), (2, 3)])
@pytest.mark.parametrize("batch", [(), (2, 3), (4, 0)])
def test_matrices_of_any_size_in_stacks_and_batches_of_any_shape(k, stack, batch):
    if stack and not batch:
        batch = (1,)  # a row of x for each matrix
    n = 5
    w = jax.random.normal(jax.random.key(0), (*stack, k, n))
    x = jax.random.normal(jax.random.key(1), (*stack, *batch, k))
    codes, scales = four_bit.quantize(w, block_size=32)
    arrays = codes, scales, CODEBOOKS["nf4"]
    of = {"block_size": 32, "dtype": jnp.float32}
    value = four_bit.dequantize(*arrays, rows=k, **of)
    assert value.shape == w.shape and float(jnp.max(jnp.abs(value - w))) < 0.5
    assert four_bit.dequantize(*arrays, **of).shape == (*stack, -(-k // 64) * 64, n)
    y = four_bit.matmul(x, *arrays, **of)
    rows = x.reshape(*stack, -1, k)
    want = (rows @ value).reshape(*stack, *batch, n)
    assert y.shape == want.shape
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
    dx = four_bit.matmul_transposed(y, *arrays, rows=k, **of)
    back = y.reshape(*stack, -1, n) @ jnp.swapaxes(value, -1, -2)
    np.testing.assert_allclose(dx, back.reshape(x.shape), rtol=1e-4, atol=1e-4)
