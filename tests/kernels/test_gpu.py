"""The kernels for NVIDIA GPUs: numbers by interpreter, programs by lowering.

And, slowly, what the compiler for an H200 makes of them, run on the CPU instruction by
instruction (`_ptx`).  How fast that is, and whether threads race, no test here sees.
"""

import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import PartitionSpec as P

from jpeft.formats import codebooks
from jpeft.kernels import four_bit
from jpeft.kernels.gpu import cells, few_rows, mosaic, route, triton

sys.path.insert(0, str(Path(__file__).parent))
import _reference  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
HOPPER, AMPERE = (9, 0), (8, 0)
TRITON_LOWERS = jax.__version_info__ < (0, 11)
BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32
SELECT = dataclasses.replace(triton.CONFIG, look_up="select")


def normal(*shape, dtype=F32):
    return jnp.asarray(np.random.default_rng(shape).standard_normal(shape), dtype)


def weight(k, n, block, format="nf4"):
    """(codes, scales, book) and W in float32."""
    codes, scales = _reference.quantize(np.asarray(normal(k, n)), format, block)
    book = codebooks.CODEBOOKS[format]
    whole = _reference.dequantize(codes, scales, book, block)
    return [jnp.asarray(x) for x in (codes, scales, book)], whole


# --- Triton's numbers ----------------------------------------------------------------


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "k, n, block, format, dtype, config",
    [
        (64, 5, 64, "nf4", F32, triton.CONFIG),
        (192, 131, 32, "fp4", BF16, triton.CONFIG),
        (192, 7, 128, "int4", F16, triton.CONFIG),
        (64, 5, 4096, "nf4", F32, SELECT),
    ],
)
def test_triton_quantises_and_dequantises_as_the_definition(
    k, n, block, format, dtype, config
):
    w = normal(k, n, dtype=dtype)
    codes, scales = _reference.quantize(np.asarray(w), format, block)
    got, got_scales = triton.quantize(
        w, format=format, block_size=block, config=config, interpret=True
    )
    np.testing.assert_array_equal(got_scales, scales)
    np.testing.assert_array_equal(got, codes)
    book = codebooks.CODEBOOKS[format]
    back = triton.dequantize(
        got,
        got_scales,
        jnp.asarray(book),
        block_size=block,
        dtype=dtype,
        config=config,
        interpret=True,
    )
    assert back.dtype == dtype
    whole = _reference.dequantize(codes, scales, book, block)
    np.testing.assert_array_equal(back, jnp.asarray(whole).astype(dtype))


# Splitting among programs: 1 leaves sums whole, 5 makes parts of unequal size.
@pytest.mark.sample(1)
@pytest.mark.parametrize("programs", [1, 5])
@pytest.mark.parametrize("op", ["matmul", "matmul_transposed"])
def test_triton_multiplies_few_tokens(op, programs):
    m, k, n, block = 3, 192, 131, 32
    (parts, w), dtype = weight(k, n, block), BF16
    w = np.asarray(jnp.asarray(w).astype(dtype).astype(F32))
    w = w.T if op == "matmul_transposed" else w
    x = normal(m, w.shape[0], dtype=dtype)
    config = dataclasses.replace(triton.CONFIG, programs=programs)
    out = getattr(triton, op)(
        x, *parts, block_size=block, dtype=F32, config=config, interpret=True
    )
    # Sums of float32 in another order.
    np.testing.assert_allclose(out, x.astype(F32) @ w, rtol=1e-5, atol=1e-4)


def test_triton_maps_over_experts():
    (codes, scales, book), whole = weight(64, 10, 64)
    halves = lambda x: jnp.stack([x[:, :5], x[:, 5:]])
    stacked = halves(codes), halves(scales), jnp.stack([book, book])
    run = lambda *parts: triton.dequantize(
        *parts, block_size=64, dtype=F32, interpret=True
    )
    np.testing.assert_array_equal(jax.vmap(run)(*stacked), halves(whole))


# --- Mosaic's numbers ----------------------------------------------------------------

interpreted = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"),
    reason="Pallas has a public interpreter of Mosaic GPU since jax 0.11",
)


@interpreted
@pytest.mark.parametrize(
    "k, n, block, format, dtype",
    [(128, 131, 64, "nf4", BF16), (64, 5, 32, "fp4", F32), (192, 7, 128, "int4", F16)],
)
def test_mosaic_quantises_and_dequantises_as_the_definition(k, n, block, format, dtype):
    """But for the shuffles, which have no interpreter: indexing stands in for them."""
    how = plgpu.InterpretGPUParams()
    w = normal(k, n, dtype=dtype)
    codes, scales = _reference.quantize(np.asarray(w), format, block)
    got, got_scales = mosaic.quantize(w, format=format, block_size=block, interpret=how)
    np.testing.assert_array_equal(got_scales, scales)
    np.testing.assert_array_equal(got, codes)
    book = codebooks.CODEBOOKS[format]
    back = mosaic.dequantize(
        got, got_scales, jnp.asarray(book), block_size=block, dtype=dtype, interpret=how
    )
    whole = _reference.dequantize(codes, scales, book, block)
    np.testing.assert_array_equal(back, jnp.asarray(whole).astype(dtype))


@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_cells_encode_as_the_code_book_does(format):
    """On a fine grid, at every threshold and at its neighbours."""
    book = np.sort(codebooks.CODEBOOKS[format])
    at = codebooks.midpoints(book)
    x = [np.linspace(-1, 1, 200_001, dtype=np.float32), at, book]
    x += [np.nextafter(at, np.float32(side)) for side in (-1, 1)]
    x = np.concatenate(x)
    table = cells.Cells.of(format)
    tables = table.tables(64)
    got = table.encode(jnp.asarray(x), lambda cell: [t[cell & 31] for t in tables])
    np.testing.assert_array_equal(got, codebooks.encode(jnp.asarray(x), format))


def test_an_unknown_format_has_no_cells():
    with pytest.raises(ValueError, match="no fixed 4-bit code book is named 'nf5'"):
        cells.Cells.of("nf5")


# --- which kernel --------------------------------------------------------------------


def test_the_capability_decides():
    with route.gpu_capability(*HOPPER):
        assert route.route() == "mosaic"
        with route.gpu_capability(10, 3):
            assert route.route() == "mosaic"
    with route.gpu_capability(*AMPERE):
        assert route.route() == ("triton" if TRITON_LOWERS else "plain")
    with route.gpu_capability(7, 5):
        assert route.route() == "plain"


def test_an_unknown_gpu_gets_what_compiles_for_any():
    assert route.route() == ("triton" if TRITON_LOWERS else "plain")


def lowered(f, capability, *arrays):
    """For CUDA, as text."""
    with route.gpu_capability(*capability):
        return jax.jit(f).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


def kernels(text):
    """(Mosaic GPU's, Triton's) calls."""
    return text.count("@mosaic_gpu"), text.count("@__gpu$xla.gpu.triton")


def test_dequantised_once_and_multiplied_by_xla_for_many_tokens():
    parts, _ = weight(128, 256, 64)
    x = normal(few_rows.MOST + 1, 128, dtype=BF16)
    text = lowered(four_bit.matmul, HOPPER, x, *parts)
    assert kernels(text) == (1, 0)
    assert "stablehlo.dot_general" in text
    assert "stablehlo.optimization_barrier" in text
    assert kernels(lowered(four_bit.matmul, AMPERE, x, *parts)) == (0, TRITON_LOWERS)


@pytest.mark.parametrize("op", [four_bit.matmul, four_bit.matmul_transposed])
def test_one_kernel_for_few_tokens(op):
    parts, _ = weight(128, 128, 64)
    tokens = {HOPPER: few_rows.MOST, AMPERE: route.FEW}
    for capability, calls in ((HOPPER, (1, 0)), (AMPERE, (0, 1))):
        text = lowered(
            op, capability, normal(tokens[capability], 128, dtype=BF16), *parts
        )
        if capability == HOPPER or TRITON_LOWERS:
            assert kernels(text) == calls
            assert "stablehlo.dot_general" not in text


@pytest.mark.parametrize("block, dtype", [(32, BF16), (64, F16)])
def test_few_tokens_that_only_triton_has_a_kernel_for(block, dtype):
    parts, _ = weight(128, 128, block)
    f = functools.partial(four_bit.matmul, block_size=block)
    text = lowered(f, HOPPER, normal(route.FEW, 128, dtype=dtype), *parts)
    assert kernels(text) == ((0, 1) if TRITON_LOWERS else (1, 0))
    assert ("stablehlo.dot_general" in text) != TRITON_LOWERS


def test_experts_of_few_tokens_are_one_call():
    parts, _ = weight(128, 200, 64)
    codes, scales = (jnp.stack([x] * 3) for x in parts[:2])
    f = jax.vmap(four_bit.matmul, (0, 0, 0, None))
    text = lowered(f, HOPPER, normal(3, 5, 128, dtype=BF16), codes, scales, parts[2])
    assert kernels(text) == (1, 0)
    assert "stablehlo.dot_general" not in text


def test_float32_is_multiplied_by_xla_however_few():
    parts, _ = weight(128, 256, 64)
    text = lowered(four_bit.matmul, HOPPER, normal(1, 128), *parts)
    assert kernels(text) == (1, 0)
    assert "stablehlo.dot_general" in text


@pytest.mark.parametrize("n", [256, 200])
def test_experts_are_one_call(n):
    parts, _ = weight(128, n, 64)
    codes, scales = (jnp.stack([x] * 3) for x in parts[:2])
    f = jax.vmap(four_bit.dequantize, (0, 0, None))
    for capability in (HOPPER, AMPERE):
        calls = kernels(lowered(f, capability, codes, scales, parts[2]))
        assert sum(calls) == (1 if capability == HOPPER or TRITON_LOWERS else 0)


@pytest.mark.parametrize("tokens", [4, 400])
@pytest.mark.parametrize("capability", [HOPPER, AMPERE])
def test_gradients_inside_shard_map(capability, tokens):
    """Of checked replication: a kernel's results vary where its operands do."""
    parts, _ = weight(128, 256, 64)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def gradient(x, *parts):
        loss = lambda x: jnp.sum(four_bit.matmul(x, *parts).astype(F32))
        return jax.grad(loss)(x)

    f = jax.shard_map(
        gradient, mesh=mesh, in_specs=(P("data"), P(), P(), P()), out_specs=P("data")
    )
    x = normal(2 * tokens, 128, dtype=BF16)
    calls = kernels(lowered(f, capability, x, *parts))
    assert sum(calls) == (1 if capability == HOPPER or TRITON_LOWERS else 0)


# --- the GPU's compiler --------------------------------------------------------------

has_plugin = importlib.util.find_spec("jax_plugins") is not None and any(
    importlib.util.find_spec(f"jax_plugins.xla_cuda{v}") for v in (12, 13)
)


@pytest.mark.skipif(
    not has_plugin,
    reason="needs JAX's CUDA plugin (no GPU): pip install --no-deps "
    f"jax-cuda12-plugin=={jax.__version__} jax-cuda12-pjrt=={jax.__version__}",
)
@pytest.mark.slow
def test_what_is_compiled_for_an_h200_computes_the_definition():
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # The tests' own flags take optimisation away.
    rest = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, ROOT / "tests/kernels/_compile_gpu.py"],
        env={**rest, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"after {lines[-1:]}: {done.stderr[-3000:]}"
    assert {x["case"]: x["error"] for x in lines if "error" in x} == {}
    assert len(lines) == (24 if TRITON_LOWERS else 14)
