"""Compiles every 4-bit kernel for an H200 and runs what came out on the CPU; prints a
line of JSON each.

    python tests/kernels/_compile_gpu.py

A process of its own: the CUDA plugin is loaded into it, and JAX's CPU may not work any
more beside that, so that what is expected comes from NumPy.
"""

import functools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import _gpu_compiler  # noqa: E402
import _ptx  # noqa: E402
import _reference  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from jpeft.formats.codebooks import CODEBOOKS  # noqa: E402
from jpeft.kernels import four_bit  # noqa: E402
from jpeft.kernels.gpu import cells, few_rows, mosaic, route  # noqa: E402

BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32
CASES = {}
compiler = _gpu_compiler.Compiler()


def case(check):
    CASES[check.__name__.replace("_", " ")] = check


def shaped(*arrays):
    return [(x.shape, x.dtype) for x in arrays]


def numbers(*shape, dtype=F32):
    return np.random.default_rng(shape).standard_normal(shape, F32).astype(dtype)


def weight(k, n, block, format="nf4"):
    """(codes, scales, book) and the matrix they mean, in float32."""
    codes, scales = _reference.quantize(numbers(k, n), format, block)
    book = CODEBOOKS[format]
    whole = _reference.dequantize(codes, scales, book, block)
    return [codes, scales, book], whole


def only(kernels):
    (kernel,) = kernels
    assert not kernel.spilled, f"{kernel.spilled} bytes spilled"
    return kernel.ptx


def dequantizes(k, n, block, dtype, backend):
    parts, whole = weight(k, n, block)
    f = functools.partial(backend.dequantize, block_size=block, dtype=dtype)
    ptx = only(compiler(f, *shaped(*parts)))
    grid = (-(-n // 128), k // 64)
    *_, out = _ptx.launch(ptx, grid, *parts, np.zeros((k, n), dtype))
    np.testing.assert_array_equal(
        out.view(np.uint8), np.asarray(whole, dtype).view(np.uint8)
    )


def quantizes(k, n, block, dtype, format, backend):
    w = numbers(k, n, dtype=dtype)
    codes, scales = _reference.quantize(w, format, block)
    f = functools.partial(backend.quantize, format=format, block_size=block)
    ptx = only(compiler(f, *shaped(w)))
    table = cells.Cells.of(format)
    columns = 64 if backend is mosaic and dtype == F32 else 128
    grid = (-(-n // columns), -(-k // max(min(block, k), 64)))
    tables = [table.thresholds, table.codes] if table else []
    tables = [np.array(t, d) for t, d in zip(tables, (F32, np.int32), strict=False)]
    empty = [np.zeros_like(codes), np.zeros_like(scales)]
    if backend is mosaic:  # a kernel's operands come in the order of their use
        tables = [np.tile(t, 4) for t in tables]
        *_, got_scales, got = _ptx.launch(ptx, grid, *tables, w, *reversed(empty))
    else:
        *_, got, got_scales = _ptx.launch(ptx, grid, w, *tables, *empty)
    np.testing.assert_array_equal(got_scales, scales)
    # An approximate reciprocal may move what lies within a unit of a threshold.
    assert np.mean(got != codes) < 1e-3


@case
def mosaic_dequantize():
    dequantizes(128, 256, 64, BF16, mosaic)


@case
def mosaic_dequantize_float32_blocks_of_32():
    dequantizes(128, 128, 32, F32, mosaic)


@case
def mosaic_dequantize_float16_blocks_of_128():
    dequantizes(192, 128, 128, F16, mosaic)


@case
def mosaic_quantize():
    quantizes(128, 256, 64, BF16, "nf4", mosaic)


@case
def mosaic_quantize_float32_fp4_last_block_half():
    quantizes(192, 128, 128, F32, "fp4", mosaic)


@case
def mosaic_quantize_float16_int4_blocks_of_32():
    quantizes(128, 128, 32, F16, "int4", mosaic)


@case
def mosaic_with_columns_left_over_and_experts():
    f = functools.partial(mosaic.dequantize, block_size=64, dtype=BF16)
    only(compiler(jax.vmap(f, (0, 0, None)), *experts(3, 128, 200)))


def multiplies_few(m, k, n, block, dtype, config, transposed):
    (codes, scales, book), _ = weight(k, n, block)
    # It is the book that is multiplied in bfloat16.
    w = _reference.dequantize(codes, scales, book.astype(BF16).astype(F32), block)
    w = w.T if transposed else w
    x = numbers(m, w.shape[0], dtype=BF16)
    op = few_rows.matmul_transposed if transposed else few_rows.matmul
    f = functools.partial(op, block_size=block, dtype=dtype, config=config)
    ptx = only(compiler(f, *shaped(x, codes, scales, book)))
    out = np.full((m, w.shape[1]), np.nan, dtype)
    blocks = w.shape[1] // (2 * config.rows if transposed else config.columns)
    *_, out = _ptx.launch(ptx, (blocks,), x, codes, scales, book, out)
    wanted = x.astype(np.float64) @ w
    # g times its scale is rounded to bfloat16, and so may be the result.
    rough = transposed or dtype == BF16
    error = np.abs(out.astype(np.float64) - wanted).max() / np.abs(wanted).max()
    assert error < (4e-3 if rough else 1e-6), error


@case
def few_rows_in_one_step_each():
    multiplies_few(3, 256, 128, 64, F32, few_rows.Config(columns=32, warps=4), False)


@case
def few_rows_and_steps_left_over_to_bfloat16():
    multiplies_few(8, 320, 128, 128, BF16, few_rows.Config(columns=64, warps=4), False)


@case
def few_rows_more_than_eight():
    multiplies_few(19, 128, 128, 64, F32, few_rows.Config(columns=128, warps=8), False)


@case
def few_rows_transposed():
    multiplies_few(3, 128, 256, 64, F32, few_rows.Config(rows=16, warps=4), True)


@case
def few_rows_transposed_and_steps_left_over():
    multiplies_few(11, 192, 384, 128, F32, few_rows.Config(rows=32, warps=4), True)


@case
def few_rows_transposed_a_quarter_of_a_group():
    multiplies_few(1, 64, 128, 4096, BF16, few_rows.Config(rows=8, warps=8), True)


def experts(count, k, n):
    return ((count, k // 2, n), jnp.uint8), ((count, k // 64, n), F32), ((16,), F32)


if jax.__version_info__ < (0, 11):  # later, Triton asks for a GPU
    from jpeft.kernels.gpu import triton

    @case
    def triton_dequantize_columns_left_over():
        dequantizes(128, 200, 64, BF16, triton)

    @case
    def triton_dequantize_odd_float32():
        dequantizes(64, 37, 32, F32, triton)

    @case
    def triton_quantize_columns_left_over():
        quantizes(128, 200, 64, BF16, "nf4", triton)

    @case
    def triton_quantize_fp4():
        quantizes(64, 128, 32, F32, "fp4", triton)

    @case
    def triton_quantize_int4_last_block_half():
        quantizes(192, 128, 128, F16, "int4", triton)

    def multiplies(m, k, n, block, dtype, transposed):
        parts, whole = weight(k, n, block)
        w = np.asarray(whole, dtype).astype(np.float32)
        w = w.T if transposed else w
        x = numbers(m, w.shape[0], dtype=dtype)
        config = triton.Config(programs=1)  # nothing is split
        op = triton.matmul_transposed if transposed else triton.matmul
        f = functools.partial(op, block_size=block, dtype=F32, config=config)
        ptx = only(compiler(f, *shaped(x, *parts)))
        out = np.full((m, w.shape[1]), np.nan, np.float32)
        grid = (-(-w.shape[1] // 64), 1)
        *_, out = _ptx.launch(ptx, grid, x, *parts, out)
        # Sums of float32 in another order.
        np.testing.assert_allclose(out, x.astype(np.float32) @ w, rtol=1e-5, atol=1e-4)

    @case
    def triton_matmul():
        multiplies(3, 128, 200, 64, BF16, False)

    @case
    def triton_matmul_float16_blocks_of_32():
        multiplies(20, 192, 64, 32, F16, False)

    @case
    def triton_matmul_transposed():
        multiplies(3, 128, 200, 64, BF16, True)

    @case
    def triton_matmul_transposed_blocks_of_128():
        multiplies(17, 192, 128, 128, BF16, True)

    @case
    def triton_tensor_cores_of_hopper():
        parts, _ = weight(128, 128, 64)
        for op in (triton.matmul, triton.matmul_transposed):
            f = functools.partial(op, block_size=64, dtype=BF16)
            x = numbers(100, 128, dtype=BF16)
            assert "wgmma" in only(compiler(f, *shaped(x, *parts)))


@case
def backward_pass_decodes_anew():
    """Or else XLA would keep every W from the forward pass to the backward pass."""
    k = n = 1024
    m = 512

    def loss(x, book, *layers):
        for codes, scales in zip(layers[::2], layers[1::2], strict=True):
            x = jnp.tanh(four_bit.matmul(x, codes, scales, book))
        return jnp.sum(x.astype(jnp.float32))

    codes, scales, book = ((k // 2, n), jnp.uint8), ((k // 64, n), F32), ((16,), F32)
    count = 6
    with route.gpu_capability(9, 0):
        done = compiler.program(
            jax.grad(loss), ((m, k), BF16), book, *[codes, scales] * count
        )
    calls = done.as_text().count('custom_call_target="mosaic_gpu')
    assert calls == 2 * count, calls


if __name__ == "__main__":
    for name, check in CASES.items():
        line = {"case": name}
        try:
            check()
        except Exception as error:  # told to the test, which fails
            line["error"] = f"{type(error).__name__}: {error}"[:2000]
        print(json.dumps(line), flush=True)
