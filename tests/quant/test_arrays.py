"""Single arrays through `jpeft.quant`: axes, dtypes, transformations, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.formats.blocks import FORMATS
from jpeft.quant import codebook, dequantize, quantize


def normal(*shape, seed=0):
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return jnp.asarray(x)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.sample(1)
@pytest.mark.parametrize("shape", [(), (1,), (101,), (7, 5), (2, 3, 43)])
@pytest.mark.parametrize("double", [True, False])
def test_an_array_is_cut_in_its_memory_order(shape, double):
    x = normal(*shape)
    q = quantize(x, "nf4", block_size=32, double=double)
    flat = quantize(x.reshape(-1), "nf4", block_size=32, double=double)
    np.testing.assert_array_equal(q.codes, flat.codes)
    np.testing.assert_array_equal(q.scales, flat.scales)
    assert q.shape == shape and q.size == x.size and q.dtype == x.dtype
    got = dequantize(q)
    assert got.shape == shape
    np.testing.assert_array_equal(got.reshape(-1), dequantize(flat))
    # Half the widest gap of NF4, and what nesting adds.
    assert float(jnp.abs(got - x).max()) <= 0.17 * float(jnp.abs(x).max())


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("axis", "order"),
    [
        (0, (0, 1, 2)),
        (1, (1, 0, 2)),
        (2, (2, 0, 1)),
        (-1, (2, 0, 1)),
        ((0, 1), (0, 1, 2)),
        ((1, 0), (1, 0, 2)),
        ((1, 2), (1, 2, 0)),
        ((2, 0), (2, 0, 1)),
        ((0, 1, 2), (0, 1, 2)),
    ],
)
@pytest.mark.parametrize("format", ["nf4", "int8_asymmetric"])
def test_blocks_run_along_the_axes_asked_for(format, axis, order):
    """The same as of the matrix with these axes flat and in front."""
    x = normal(5, 7, 3)
    n = np.size(axis)
    moved = jnp.transpose(x, order)
    flat = moved.reshape(int(np.prod(moved.shape[:n])), -1)
    want = dequantize(quantize(flat, format, block_size=32, double=False, axis=0))
    got = dequantize(quantize(x, format, block_size=32, double=False, axis=axis))
    np.testing.assert_array_equal(jnp.transpose(got, order).reshape(flat.shape), want)


@pytest.mark.sample(2)
@pytest.mark.parametrize("format", FORMATS)
def test_each_format_keeps_its_promise_on_an_uneven_array(format):
    """Error against the largest of a block: what half of the widest gap allows."""
    x = normal(3, 77)
    kind = FORMATS[format]
    bound = {4: 0.18, 8: 0.03}[kind.bits]
    bound = 0.25 if kind.learned else bound  # gaps in 231 values' tails
    for size in (32,) if kind.of_gguf else (32, "channel", "tensor"):
        q = quantize(x, format, block_size=size, axis=1)
        assert q.codes.dtype == (jnp.int8 if kind.signed else jnp.uint8)
        error = jnp.abs(dequantize(q) - x).max() / jnp.abs(x).max()
        assert 0 < float(error) < bound


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_values_have_the_dtype_that_went_in_or_is_asked_for(dtype):
    x = normal(7, 5).astype(dtype)
    q = quantize(x, double=False)
    assert q.dtype == dtype and dequantize(q).dtype == dtype
    wide = dequantize(q, jnp.float32)
    assert wide.dtype == jnp.float32
    np.testing.assert_array_equal(
        wide.astype(dtype).astype("float32"), dequantize(q).astype("float32")
    )
    same(quantize(x.astype(jnp.float32), double=False).codes, q.codes)


@pytest.mark.parametrize("size", ["channel", "tensor"])
def test_scales_that_are_few_stay_float32(size):
    q = quantize(normal(7, 5), "int8", block_size=size, axis=0)
    assert q.nested is None and q.scales.dtype == jnp.float32
    assert q.scales.shape == ((1, 5) if size == "channel" else (1, 1))


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "format", ["nf4", "int8", "int4_asymmetric", "quantile4", "q4_0", "q4_1"]
)
def test_inside_jit_the_same_comes_out_bit_for_bit(format):
    x = normal(77, 5)
    run = lambda x: quantize(x, format, axis=0)
    same(jax.jit(run)(x), run(x))
    same(jax.jit(lambda x: dequantize(run(x)))(x), jax.jit(dequantize)(run(x)))


@pytest.mark.slow
def test_vmap_quantises_one_by_one():
    x = normal(3, 77, 5)
    run = lambda x: dequantize(quantize(x, "nf4", axis=0))
    np.testing.assert_array_equal(
        jax.vmap(run)(x), jnp.stack([run(x[k]) for k in range(3)])
    )


def test_nan_is_refused_outside_jit_and_spoils_its_block_inside():
    x = normal(64, 2).at[5, 1].set(jnp.nan)
    with pytest.raises(ValueError, match=r"shape \(64, 2\) holds NaN"):
        quantize(x)
    run = jax.jit(lambda x: dequantize(quantize(x, axis=0, double=False)))
    got = run(x)
    assert bool(jnp.isnan(got[:, 1]).all()) and bool(jnp.isfinite(got[:, 0]).all())


def test_an_infinity_comes_back():
    x = normal(128).at[5].set(jnp.inf)
    got = dequantize(quantize(x, double=False))
    assert got[5] == jnp.inf and bool(jnp.isnan(got[6:64]).all())
    assert bool(jnp.isfinite(got[64:]).all())


def test_it_stands_in_a_tree_as_the_transform_would_put_it():
    w, x = normal(77, 5), normal(3, 77, seed=1)
    params = {"dense": {"kernel": w}}
    params = jpeft.quantize("nf4", compute_dtype=None)(jax.random.key(0), params)
    alone = quantize(w, "nf4", axis=0)
    made = params["dense"]["kernel"]
    np.testing.assert_array_equal(made.codes, alone.codes)
    np.testing.assert_array_equal(made.scales, alone.scales)
    got = jpeft.adapt(lambda p, x: x @ p["w"])({"w": alone}, x)
    np.testing.assert_allclose(got, x @ dequantize(alone), rtol=2e-5, atol=2e-5)


@pytest.mark.sample(1)
@pytest.mark.parametrize("make", [jpeft.quantize, lambda: jpeft.loftq(rank=2)])
def test_a_weight_that_waits_on_the_host_is_quantised_on_the_device(make):
    key, w = jax.random.key(0), normal(77, 5)
    host = jax.device_put(w, jax.memory.Space.Host)
    same(make()(key, {"w": host}), make()(key, {"w": w}))
    made = jax.tree.leaves((make()(key, {"w": host}), quantize(host)))
    assert {x.sharding.memory_kind for x in made} == {"device"}


def test_a_block_size_may_be_a_number_of_numpys():
    size, x = np.int64(32), normal(101)
    for t in (jpeft.quantize(block_size=size), jpeft.loftq(2, block_size=size)):
        assert type(t.block_size) is int
    same(quantize(x, block_size=size), quantize(x, block_size=32))


def test_float64_beyond_float32_is_refused():
    with jax.enable_x64(True):
        x = jnp.full(64, 1e300).at[0].set(1.0)
        with pytest.raises(ValueError, match=r"holds 1e\+300, which float32 cannot"):
            quantize(x)
        for t in (jpeft.quantize(), jpeft.loftq(rank=1)):
            with pytest.raises(ValueError, match="kernel: the weight holds 1e"):
                t(jax.random.key(0), {"kernel": x[:, None]})


def test_its_repr_is_short():
    text = repr(quantize(normal(77, 5), axis=0))
    assert "codes=uint8[64,5]" in text and len(text) < 200


# --- code books ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nf4", "fp4", "int4", "int8", "dynamic8"])
def test_a_code_book_decodes(name):
    book = codebook(name)
    assert book.dtype == np.float32 and book.shape == (2 ** FORMATS[name].bits,)
    assert book.max() == 1 and (book == 0).any()
    book[:] = 0  # a copy
    assert codebook(name).max() == 1
    x = normal(64)
    q = quantize(x, name, double=False)
    parts = np.asarray(dequantize(q)) / np.asarray(q.scales)
    near = np.abs(parts[:, None] - codebook(name)).min(1)
    assert near.max() < 1e-6


# --- errors --------------------------------------------------------------------------

X = np.ones((2, 3), np.float32)
CALLS = {
    "format": (
        lambda: quantize(X, "nf5"),
        ValueError,
        ["quant.quantize: format='nf5': did you mean 'nf4'?", "quantile8"],
    ),
    "block size": (
        lambda: quantize(X, block_size=48),
        ValueError,
        ["block_size=48 does not fit", "32, 64", "'channel' or 'tensor'"],
    ),
    "axis": (
        lambda: quantize(X, axis=2),
        ValueError,
        ["axis=2 for an array of 2 axes"],
    ),
    "axis twice": (
        lambda: quantize(X, axis=(0, -2)),
        ValueError,
        ["names one axis twice"],
    ),
    "integers": (
        lambda: quantize(X.astype(np.int8)),
        TypeError,
        ["expected a real floating-point array, got int8"],
    ),
    "complex": (lambda: quantize(X + 1j), TypeError, ["got complex"]),
    "empty": (
        lambda: quantize(np.ones((0, 3), np.float32)),
        ValueError,
        ["the array of shape (0, 3) is empty"],
    ),
    "quantised": (
        lambda: quantize(quantize(X)),
        ValueError,
        ["is an adapted leaf already", "jpeft.merge(params)"],
    ),
    "dequantised": (
        lambda: dequantize(jnp.asarray(X)),
        TypeError,
        ["expected what quant.quantize returns, got ArrayImpl", "jpeft.merge(params)"],
    ),
    "learned book": (
        lambda: codebook("quantile4"),
        ValueError,
        ["'quantile4' has no fixed code book: it is learned, see q.book"],
    ),
    "range": (
        lambda: codebook("int8_asymmetric"),
        ValueError,
        ["has no fixed code book: blocks have a range"],
    ),
    "least": (
        lambda: codebook("q4_1"),
        ValueError,
        ["has no fixed code book: blocks have a range"],
    ),
    "GGUF's blocks": (
        lambda: quantize(X, "q4_0", block_size=64),
        ValueError,
        ["block_size=64 does not fit format='q4_0'", "32 elements; leave block_size"],
    ),
    "beyond float16": (
        lambda: quantize(1e5 * np.ones((3, 32), np.float32), "q4_1"),
        ValueError,
        ["shape (3, 32) holds 1e+05", "q4_1, in float16, reach 6.55e+04"],
    ),
    "book": (lambda: codebook("nf3"), ValueError, ["did you mean 'nf4'?"]),
}


@pytest.mark.parametrize("what", CALLS)
def test_a_wrong_call_is_answered_with_the_right_one(what):
    call, kind, parts = CALLS[what]
    with pytest.raises(kind) as error:
        call()
    for part in parts:
        assert part in str(error.value)


def test_a_scale_a_channel_is_one_for_each_output():
    w = jax.random.normal(jax.random.key(0), (96, 5))
    for format in ("nf4", "int8", "int4_asymmetric"):
        q = jpeft.quant.quantize(w, format, block_size="channel")
        kernel = jpeft.quantize(format, block_size="channel")(
            jax.random.key(0), {"kernel": w}
        )["kernel"]
        np.testing.assert_array_equal(q.scales, kernel.scales)
        np.testing.assert_array_equal(q.codes, kernel.codes)
    whole = jpeft.quant.quantize(w[:, 0], "int8", block_size="channel")
    assert whole.scales.size == 1


def test_values_are_floating_point():
    q = jpeft.quant.quantize(jnp.ones(64), "int8")
    with pytest.raises(ValueError, match="dtype=.*int8.*expected a floating-point"):
        jpeft.quant.dequantize(q, jnp.int8)
