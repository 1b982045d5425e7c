"""The TPU kernels: their numbers in TPU interpret mode, and the real TPU compiler.

The compiler needs no TPU but libtpu (`pip install "jax[tpu]"`), and runs in processes
of its own.  That the numbers are the same on a TPU is not tested here: none is at hand.
"""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import _reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from speed import every_nth

from jpeft.formats import codebooks
from jpeft.kernels import tpu

ROOT = Path(__file__).resolve().parents[2]
BF16, F32 = jnp.bfloat16, jnp.float32
# What nobody has written is NaN, so that a sum over too much shows.
INTERPRET = pltpu.InterpretParams(uninitialized_memory="nan")
# The smallest tiles, so that small matrices have edges and several tiles.
TILES = tpu.Config(
    "nothing",
    tile_rows=128,
    tile_columns=128,
    tokens=16,
    outputs=128,
    inputs=128,
    few_outputs=128,
    few_inputs=128,
)
SMALL = {"interpret": INTERPRET, "config": TILES}
# k, n, block: an odd number of groups, more blocks than tiles and fewer, one block
# beyond the matrix, eight rows of scales shared by tiles or not.
MATRICES = [(192, 130, 32), (320, 257, 64), (448, 5, 128), (64, 7, 4096)]


def data(seed, shape, dtype=F32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


# --- data ----------------------------------------------------------------------------


def matrix(k, n, block, seed=0):
    """(codes, scales, book) with a book that is no standard one, and out of order."""
    codes = jax.random.randint(jax.random.key(seed), (k // 2, n), 0, 256, jnp.uint8)
    scales = 0.5 + jnp.abs(data(seed + 1, (-(-k // block), n)))
    return codes, scales, data(seed + 2, (16,))


def exact_product(x, w, transposed):
    x, w = (np.asarray(a.astype(F32), np.float64) for a in (x, w))
    return x @ (w.T if transposed else w)


# --- numbers -------------------------------------------------------------------------


@pytest.mark.sample(1)
@pytest.mark.parametrize("format", ["nf4", "fp4", "int4"])
def test_quantize_gives_the_bits_that_the_contract_says(format):
    k, n, block = MATRICES[("nf4", "fp4", "int4").index(format)]
    w = data(3, (k, n), BF16 if format == "fp4" else F32).at[:, 1].set(0)
    codes, scales = tpu.quantize(w, format=format, block_size=block, **SMALL)
    wanted = _reference.quantize(np.asarray(w), format, block)
    np.testing.assert_array_equal(scales, wanted[1])
    np.testing.assert_array_equal(codes, wanted[0])


@pytest.mark.sample(1)
@pytest.mark.parametrize("k, block, config", [(704, 256, TILES), (192, 128, None)])
def test_blocks_longer_than_a_tile_and_a_last_one_that_ends_early(k, block, config):
    w = data(4, (k, 3))
    codes, scales = tpu.quantize(
        w, format="nf4", block_size=block, interpret=INTERPRET, config=config
    )
    wanted = _reference.quantize(np.asarray(w), "nf4", block)
    assert scales.shape == (-(-k // block), 3)
    np.testing.assert_array_equal(scales, wanted[1])
    np.testing.assert_array_equal(codes, wanted[0])


@pytest.mark.sample(1)
@pytest.mark.parametrize("format", ["nf4", "fp4", "int4"])
def test_encoding_in_32_bits_is_that_of_the_code_books(format):
    book = codebooks.CODEBOOKS[format]
    middle = codebooks.midpoints(np.sort(book))
    near = [np.nextafter(middle, np.float32(to)) for to in (-2, 2)]
    x = jnp.asarray(np.concatenate([book, middle, *near, [-1.0, 1.0]]).astype(F32))
    found = tpu._encode(x[:, None], format)
    np.testing.assert_array_equal(found[:, 0], codebooks.encode(x, format))


@pytest.mark.slow
def test_wide_tiles_are_decoded_in_pieces():
    k, n = 64, 4500  # two pieces, and a third that is narrower
    weight = matrix(k, n, 32)
    wide = dataclasses.replace(TILES, tile_columns=4608, few_inputs=4608)
    call = {"block_size": 32, "dtype": F32, "interpret": INTERPRET, "config": wide}
    w = _reference.dequantize(*map(np.asarray, weight), 32)
    np.testing.assert_array_equal(tpu.dequantize(*weight, **call), w)
    g = data(9, (3, n))
    wanted = exact_product(g, jnp.asarray(w), True)
    found = tpu.matmul_transposed(g, *weight, **call)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.sample(1)
@pytest.mark.parametrize("look_up", ["sublane", "select"])
@pytest.mark.parametrize("k, n, block", MATRICES)
def test_dequantize_is_exact(k, n, block, look_up):
    weight = matrix(k, n, block)
    wanted = _reference.dequantize(*map(np.asarray, weight), block)
    dtype = F32 if look_up == "sublane" else BF16
    found = tpu.dequantize(
        *weight, block_size=block, dtype=dtype, look_up=look_up, **SMALL
    )
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, jnp.asarray(wanted).astype(dtype))


@pytest.mark.sample(1)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "m, k, n, block, dtype",
    every_nth(
        2,
        [
            (1, 320, 257, 64, BF16),
            (5, 192, 130, 32, F32),
            (40, 192, 130, 4096, F32),
            (33, 320, 257, 64, BF16),
        ],
    ),
)
def test_products_are_those_of_the_dequantized_matrix(
    m, k, n, block, dtype, transposed
):
    weight = matrix(k, n, block)
    x = data(9, (m, n if transposed else k), dtype)
    op = tpu.matmul_transposed if transposed else tpu.matmul
    found = op(x, *weight, block_size=block, dtype=F32, **SMALL)
    w = jnp.asarray(_reference.dequantize(*map(np.asarray, weight), block)).astype(
        dtype
    )
    wanted = exact_product(x, w, transposed)
    # Operands are the same to the last bit, so only float32 sums differ.
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.sample(1)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_strip_too_long_to_keep_is_decoded_again(transposed):
    k, n, m = 384, 256, 80
    weight, x = matrix(k, n, 64), data(9, (m, n if transposed else k), BF16)
    plan = lambda c: tpu._plan(
        m, k, n, transposed, 64, jnp.dtype(BF16), jnp.dtype(F32), c
    )
    tight = dataclasses.replace(TILES, vmem_bytes=plan(TILES).vmem_bytes - 1)
    assert plan(TILES).keep and not plan(tight).keep
    op = tpu.matmul_transposed if transposed else tpu.matmul
    found = op(x, *weight, block_size=64, dtype=F32, interpret=INTERPRET, config=tight)
    w = jnp.asarray(_reference.dequantize(*map(np.asarray, weight), 64)).astype(BF16)
    wanted = exact_product(x, w, transposed)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.sample(1)
@pytest.mark.parametrize("books", [None, 0])
def test_experts_come_by_vmap(books):
    many = [matrix(128, 130, 64, seed) for seed in (0, 10, 20)]
    codes, scales, book = (jnp.stack(part) for part in zip(*many, strict=True))
    book = book if books == 0 else book[0]
    x = data(9, (3, 20, 128), BF16)
    op = lambda *a: tpu.matmul(*a, block_size=64, dtype=BF16, **SMALL)
    found = jax.vmap(op, in_axes=(0, 0, 0, books))(x, codes, scales, book)
    for e in range(3):
        weight = codes[e], scales[e], book[e] if books == 0 else book
        w = jnp.asarray(_reference.dequantize(*map(np.asarray, weight), 64)).astype(
            BF16
        )
        wanted = exact_product(x[e], w, False)
        # One rounding to bfloat16's eight bits, on top of float32 sums.
        np.testing.assert_allclose(
            found[e].astype(F32), wanted, rtol=2**-8, atol=1e-4 * np.abs(wanted).max()
        )


@pytest.mark.float16
def test_other_dtypes_are_left_to_xla():
    weight, x = matrix(64, 7, 64), data(9, (3, 64), jnp.float16)
    found = tpu.matmul(x, *weight, block_size=64, dtype=F32, **SMALL)
    w = jnp.asarray(_reference.dequantize(*map(np.asarray, weight), 64)).astype(
        jnp.float16
    )
    wanted = exact_product(x, w, False)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_every_operation_is_traced_where_floats_have_64_bits():
    """`platform_dependent` traces the TPU's branch on every machine."""
    with jax.enable_x64(True):
        codes, scales, book = matrix(320, 130, 64)
        x = data(9, (40, 320), jnp.float64)
        call = {"block_size": 64, "config": TILES}
        product = lambda x: tpu.matmul(x, codes, scales, book, dtype=x.dtype, **call)
        assert jax.eval_shape(product, x).dtype == jnp.float64
        assert jax.eval_shape(product, x.astype(F32)).dtype == F32
        quantize = lambda x: tpu.quantize(x, format="nf4", block_size=64)
        assert jax.eval_shape(quantize, x.T)[1].dtype == F32


# --- plans ---------------------------------------------------------------------------


@pytest.mark.parametrize("generation", sorted(tpu.CONFIGS))
@pytest.mark.parametrize("transposed", [False, True])
def test_tiles_of_the_largest_models_fit_into_the_memory(generation, transposed):
    config = tpu.CONFIGS[generation]
    for k, n in [(4096, 11008), (28672, 8192), (53248, 16384), (16384, 53248)]:
        for m in (1, 16, 2048, 5000):
            for dtype in (BF16, F32):
                dtype = jnp.dtype(dtype)
                plan = tpu._plan(m, k, n, transposed, 64, dtype, dtype, config)
                assert plan.vmem_bytes <= config.vmem_bytes
                out, summed = (k, n) if transposed else (n, k)
                assert plan.tokens * plan.token_tiles >= m
                assert plan.outputs * plan.output_tiles >= out
                assert plan.inputs * plan.steps >= summed
                assert plan.outputs % 128 == plan.inputs % 128 == 0


def test_what_fits_in_no_way_is_refused():
    config = dataclasses.replace(TILES, vmem_bytes=100_000)
    shapes = (16, 64), (32, 128), (1, 128), (16,)
    x, *weight = (jnp.zeros(shape) for shape in shapes)
    weight[0] = weight[0].astype(jnp.uint8)
    with pytest.raises(ValueError, match=r"\(64, 128\) need .* MiB of VMEM"):
        tpu.matmul(x, *weight, block_size=64, dtype=F32, config=config)


def look_ups(f, *arguments):
    text = str(jax.make_jaxpr(f)(*arguments))
    return "gather" in text


def test_the_generation_is_part_of_what_jit_remembers():
    weight = matrix(64, 128, 64)
    f = jax.jit(lambda *w: tpu.dequantize(*w, block_size=64, dtype=BF16))
    assert look_ups(f, *weight)
    with tpu.tpu_generation("v4"):
        assert not look_ups(f, *weight)
        with tpu.tpu_generation("v6e"):
            assert look_ups(f, *weight)
    assert look_ups(f, *weight)


def test_an_unknown_generation_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'v9': expected one of \['v4', 'v5e'"):
        tpu.tpu_generation("v9")


# --- the real compiler ---------------------------------------------------------------

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason='the TPU compiler is not installed: pip install "jax[tpu]"',
)


def run(*command, timeout):
    python_path = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, python_path))},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    # v4 looks codes up in a way of its own; the others differ in sizes of tiles.
    ("generation", "cases"),
    [("v4", []), ("v5e", []), ("v5p", ["few"]), ("v6e", ["few"]), ("v7x", ["few"])],
)
def test_every_kernel_compiles_for_every_tpu(generation, cases):
    assert {*tpu.CONFIGS} <= {"v4", "v5e", "v5p", "v6e"}
    script = ROOT / "tests/kernels/_compile_tpu.py"
    done = run(script, generation, *cases, timeout=300)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"after {lines[-1:]}: {done.stderr[-3000:]}"
    assert {x["case"]: x["error"] for x in lines if "error" in x} == {}
    assert len(lines) == (8 if cases else 24)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("generation", ["v5p"])  # v5e takes the compiler twice as long
def test_decoding_keeps_up_with_memory_and_hides_behind_products(generation, tmp_path):
    """By the compiler's estimate: close to the floor of memory, and within a tenth of
    XLA's product of bfloat16 matrices."""
    report = ROOT / "benchmarks/kernel_report_tpu.py"
    options = ["--only", generation, "--json", tmp_path / "rows"]
    done = run(report, *options, "--size", 2048, 2048, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / "rows").read_text())
    ratio = {row["operation"]: row["ratio"] for row in rows}
    for operation in ("x @ W, 2048 rows", "g @ W.T, 2048 rows"):
        assert ratio[operation] < 1.1, ratio
    # Here the latency of the first tiles is a quarter of the whole.
    assert ratio["dequantise"] < 1.3, ratio
