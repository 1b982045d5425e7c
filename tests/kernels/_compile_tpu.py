"""Compiles every 4-bit kernel for one generation of TPU; prints a line of JSON each.

    python tests/kernels/_compile_tpu.py v5e        every case
    python tests/kernels/_compile_tpu.py v5e few    each kernel once, and the largest

A process of its own: libtpu is loaded into it, and one crash is one generation's.
"""

import functools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import _tpu_compiler  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from jpeft.kernels import tpu  # noqa: E402

BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32
MATMUL, TRANSPOSED = tpu.matmul, tpu.matmul_transposed


def weight(k, n, block):
    shapes = ((k // 2, n), jnp.uint8), ((-(-k // block), n), F32), ((16,), F32)
    return list(shapes)


def quantize(k, n, block, dtype, format="nf4"):
    f = functools.partial(tpu.quantize, format=format, block_size=block)
    return f, [((k, n), dtype)]


def dequantize(k, n, block, dtype):
    f = functools.partial(tpu.dequantize, block_size=block, dtype=dtype)
    return f, weight(k, n, block)


def product(op, m, k, n, block, dtype, out=None):
    f = functools.partial(op, block_size=block, dtype=out or dtype)
    return f, [((m, k if op is MATMUL else n), dtype), *weight(k, n, block)]


def experts(case, count, axes):
    f, shapes = case
    batched = [
        ((count, *shape) if axis == 0 else shape, dtype)
        for (shape, dtype), axis in zip(shapes, axes, strict=True)
    ]
    return jax.vmap(f, in_axes=axes), batched


def highest(case):
    f, shapes = case

    def g(*arrays):
        with jax.default_matmul_precision("highest"):
            return f(*arrays)

    return g, shapes


CASES = {
    "quantize": quantize(1024, 640, 64, BF16),
    "quantize fp4, blocks of 32": quantize(192, 130, 32, F32, "fp4"),
    "quantize int4, blocks over tiles": quantize(11008, 256, 4096, BF16, "int4"),
    "quantize float16": quantize(128, 128, 128, F16),
    "dequantize": dequantize(1024, 640, 64, BF16),
    "dequantize a thin matrix": dequantize(64, 7, 4096, F32),
    "dequantize, uneven": dequantize(1728, 1300, 32, F32),
    "dequantize to float16": dequantize(128, 256, 512, F16),
    "matmul": product(MATMUL, 1024, 1024, 640, 64, BF16),
    "matmul, uneven": product(MATMUL, 700, 1728, 1300, 32, BF16, F32),
    "matmul, float32": product(MATMUL, 40, 192, 130, 128, F32),
    "matmul, float32 in full": highest(product(MATMUL, 40, 192, 130, 128, F32)),
    "matmul, float16": product(MATMUL, 16, 128, 128, 64, F16),
    "matmul, one token": product(MATMUL, 1, 2048, 1024, 64, BF16),
    "matmul, one token, uneven": product(MATMUL, 1, 1728, 1300, 4096, F32, BF16),
    "transposed": product(TRANSPOSED, 1024, 640, 1024, 64, BF16),
    "transposed, uneven": product(TRANSPOSED, 700, 1728, 1300, 32, BF16, F32),
    "transposed, float32": product(TRANSPOSED, 40, 192, 130, 128, F32),
    "transposed, one token": product(TRANSPOSED, 1, 1728, 1300, 4096, BF16),
    "experts": experts(product(MATMUL, 600, 256, 384, 64, BF16), 3, (0, 0, 0, None)),
    "experts with a book each": experts(
        product(TRANSPOSED, 5, 256, 384, 64, BF16), 3, (0, 0, 0, 0)
    ),
    # The largest of today's dense models: tiles must be cut to what fits into VMEM.
    "down projection of 405B": product(MATMUL, 2048, 53248, 16384, 64, BF16),
    "the same, one token, float32": product(MATMUL, 1, 53248, 16384, 64, F32),
    "its transpose": product(TRANSPOSED, 2048, 16384, 53248, 64, BF16),
}
FEW = [
    *("quantize", "dequantize", "matmul", "matmul, one token"),
    *("transposed", "transposed, one token", "experts", "down projection of 405B"),
]


if __name__ == "__main__":
    compiler = _tpu_compiler.Compiler(sys.argv[1])
    for name in FEW if sys.argv[2:] == ["few"] else CASES:
        f, arguments = CASES[name]
        line = {"case": name}
        try:
            line["seconds"] = round(compiler(f, *arguments).seconds, 1)
        except Exception as error:  # told to the test, which fails
            line["error"] = str(error)[:2000]
        print(json.dumps(line), flush=True)
