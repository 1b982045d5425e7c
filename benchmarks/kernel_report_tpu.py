"""What the 4-bit kernels cost on TPU, as the TPU's own compiler estimates it.

    python benchmarks/kernel_report_tpu.py [--only v5e v5p v6e] [--size K N]
        [--tokens M] [--markdown FILE] [--json FILE]

Compiles ahead of time for each generation of TPU; needs `pip install "jax[tpu]"` and no
TPU.  The compiler (libtpu) writes, for each kernel, the cycles it expects: the
instructions as scheduled, times the loops' trips, and a model of the latency of copies.
IT IS NO MEASUREMENT.  Cycles become microseconds with an assumed clock, and each row is
set beside what it cannot or should not exceed by much:

    dequantise, quantise   the memory's floor: bytes read and written over the nominal
        bandwidth.  The model knows latency better than bandwidth, so an estimate below
        the floor means that memory decides; the ratio is then that of the floor, 1.00.
    products               XLA's own product of bfloat16 matrices, by the same model
        (for few tokens: at least the floor of reading a bfloat16 W)
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import _tpu_compiler
import jax
import jax.numpy as jnp

from jpeft.kernels import tpu

BLOCK = 64
FEW_TOKENS = 16


@dataclasses.dataclass(frozen=True)
class Chip:
    """clock: assumed, in GHz.  bandwidth: nominal, in GB/s."""

    clock: float
    bandwidth: float


CHIPS = {
    "v5e": Chip(clock=1.5, bandwidth=819),
    "v5p": Chip(clock=1.75, bandwidth=2765),
    "v6e": Chip(clock=1.75, bandwidth=1640),
}


@dataclasses.dataclass(frozen=True)
class Row:
    operation: str
    generation: str
    estimate_us: float
    yardstick: str
    yardstick_us: float

    @property
    def ratio(self) -> float:
        """1 is as fast as the yardstick; no estimate beats a floor of memory."""
        ratio = self.estimate_us / self.yardstick_us
        return max(ratio, 1.0) if self.yardstick == MEMORY else ratio


MEMORY, XLA = "memory", "XLA's dot"


def rows(generation: str, k: int, n: int, m: int) -> Iterator[Row]:
    chip = CHIPS[generation]
    compiler = _tpu_compiler.Compiler(generation, estimate=True)

    def estimate(f, *arguments) -> float:
        return compiler(f, *arguments).cycles / chip.clock / 1e3

    bf16, f32, u8 = jnp.bfloat16, jnp.float32, jnp.uint8
    packed = ((k // 2, n), u8), ((-(-k // BLOCK), n), f32), ((16,), f32)
    packed_bytes = k * n // 2 + 4 * -(-k // BLOCK) * n
    floor = lambda size: size / chip.bandwidth / 1e3

    dequantize = lambda *w: tpu.dequantize(*w, block_size=BLOCK, dtype=bf16)
    once = floor(packed_bytes + 2 * k * n)
    yield Row("dequantise", generation, estimate(dequantize, *packed), MEMORY, once)
    quantize = lambda w: tpu.quantize(w, format="nf4", block_size=BLOCK)
    us = estimate(quantize, ((k, n), bf16))
    yield Row("quantise", generation, us, MEMORY, once)

    for tokens in (m, FEW_TOKENS):
        for name, width, product, dot in (
            ("x @ W", k, tpu.matmul, _dot),
            ("g @ W.T", n, tpu.matmul_transposed, _dot_transposed),
        ):
            x = (tokens, width), bf16
            fused = lambda *a, f=product: f(*a, block_size=BLOCK, dtype=bf16)
            plain = max(estimate(dot, x, ((k, n), bf16)), floor(2 * k * n))
            us = estimate(fused, x, *packed)
            yield Row(f"{name}, {tokens} rows", generation, us, XLA, plain)


def _dot(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.dot(x, w, preferred_element_type=jnp.float32).astype(x.dtype)


def _dot_transposed(g: jax.Array, w: jax.Array) -> jax.Array:
    return _dot(g, w.T)


def table(results: list[Row], k: int, n: int) -> str:
    """Markdown: operations down, generations across."""
    generations = list(dict.fromkeys(row.generation for row in results))
    at = {(row.operation, row.generation): row for row in results}
    assumed = ", ".join(
        f"{g} {CHIPS[g].clock} GHz, {CHIPS[g].bandwidth} GB/s" for g in generations
    )
    lines = [
        f"W is {k} x {n}, nf4 in blocks of {BLOCK}; bfloat16.  Microseconds, estimated "
        "by the compiler, not measured: estimate / yardstick = ratio.  "
        f"Assumed: {assumed}.",
        "",
        "| operation | beside | " + " | ".join(generations) + " |",
        "|---" * (2 + len(generations)) + "|",
    ]
    for operation in dict.fromkeys(row.operation for row in results):
        found = [at[operation, g] for g in generations]
        cells = [
            f"{r.estimate_us:.0f} / {r.yardstick_us:.0f} = {r.ratio:.2f}" for r in found
        ]
        lines.append(
            f"| {operation} | {found[0].yardstick} | " + " | ".join(cells) + " |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=sorted(CHIPS), default=list(CHIPS))
    parser.add_argument("--size", nargs=2, type=int, default=(4096, 4096))
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    (k, n), results = arguments.size, []
    for generation in arguments.only:
        for row in rows(generation, k, n, arguments.tokens):
            print(
                f"{row.generation}  {row.operation:20} {row.estimate_us:7.1f} us"
                f"   {row.yardstick} {row.yardstick_us:7.1f} us   {row.ratio:.2f}",
                flush=True,
            )
            results.append(row)
    text = table(results, k, n)
    print("\n" + text)
    if arguments.markdown:
        arguments.markdown.write_text(text + "\n")
    if arguments.json:
        arguments.json.write_text(
            json.dumps([{**dataclasses.asdict(r), "ratio": r.ratio} for r in results])
        )


if __name__ == "__main__":
    main()
