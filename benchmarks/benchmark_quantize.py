"""What 4-bit weights cost on a CPU: jpeft beside bitsandbytes, in one process.

    python benchmarks/benchmark_quantize.py [--size K N] [--format nf4|fp4]
        [--block-size B] [--tokens M ...] [--repeats R] [--peer auto|none]
        [--keep-pages] [--markdown FILE]

Quantises a K x N matrix of N(0, 1), dequantises it, and multiplies M tokens in bfloat16
by it.  bitsandbytes has the same matrix as [out, in], so both make the same blocks; the
codes and the dequantised values are compared in the same run.  Without bitsandbytes
(`pip install bitsandbytes`, which brings torch) the table is of jpeft alone.

The competitors of a row take turns, so that what else the machine does hits all of
them, and the least of R times counts.  Two times are given:

    CPU     time of all threads of the process, over the number of cores: what it would
            take on a quiet machine if the threads were evenly loaded
    wall    what the clock says, which on a shared machine is more

A result of more than 32 MiB comes in fresh memory from the kernel, whose pages cost
more than the decoding that fills them, in both libraries.  That is so in a user's
program too, but it hides the kernels; with --keep-pages (glibc only) freed memory is
used again.

The products, where W is 4 bits:

    jpeft, fused                 `four_bit.matmul`: decodes a part of W at a time
    jpeft, dequantise + matmul   W whole in bfloat16, then x @ W
    bitsandbytes, matmul_4bit    its entry point, as a Linear4bit in training calls it
    bitsandbytes, dequantize     `dequantize_4bit`, then torch's matmul
    bitsandbytes, Linear4bit     in evaluation, where it repacks W for AVX-512 if it can

and, for comparison, x @ W with W decoded beforehand.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.metadata
import importlib.util
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.formats import packing
from jpeft.formats.codebooks import CODEBOOKS
from jpeft.kernels import four_bit

Run = Callable[[], Any]
JPEFT, PEER = "jpeft", "bitsandbytes"
# Between two measurements, so that all threads of the one before have gone to sleep.
PAUSE_S = 0.01


@dataclasses.dataclass(frozen=True)
class Sizes:
    k: int = 4096
    n: int = 4096
    tokens: tuple[int, ...] = (1, 16, 256, 1024)
    block_size: int = 64
    format: str = "nf4"


@dataclasses.dataclass
class Times:
    """The least seconds so far."""

    cpu: float = float("inf")  # over the cores
    wall: float = float("inf")


@dataclasses.dataclass(frozen=True)
class Contest:
    """One operation; the first of its runs is the one the others are compared with.

    exact: what a product should be, about.
    """

    name: str
    runs: dict[str, Run]
    exact: np.ndarray | None = None


# What has glibc's malloc ask the kernel once and give nothing back.
KEEP_PAGES = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_ARENA_MAX": "1",
}


# --- jpeft ---------------------------------------------------------------------------


class Ours:
    """The matrix as [in, out], and what jpeft does with it."""

    def __init__(self, w: np.ndarray, sizes: Sizes):
        self.sizes = sizes
        self.w = jnp.asarray(w)
        self.book = jnp.asarray(CODEBOOKS[sizes.format])
        how = {"format": sizes.format, "block_size": sizes.block_size}
        self._quantize = jax.jit(functools.partial(four_bit.quantize, **how))
        self.codes, self.scales = self._quantize(self.w)
        self.packed = (self.codes, self.scales, self.book)
        self.decoded = self.dequantize("bfloat16")()

    def quantize(self, dtype: str) -> Run:
        w = self.w.astype(dtype)
        return self._ready(self._quantize, w)

    def dequantize(self, dtype: str) -> Run:
        return self._ready(self._dequantizer(dtype), *self.packed)

    def products(self, x: np.ndarray) -> dict[str, Run]:
        tokens = jnp.asarray(x).astype(jnp.bfloat16)
        matmul = functools.partial(four_bit.matmul, block_size=self.sizes.block_size)
        dequantize = self._dequantizer("bfloat16")
        whole = lambda x, *packed: dot(x, dequantize(*packed))
        return {
            f"{JPEFT}, fused": self._ready(jax.jit(matmul), tokens, *self.packed),
            f"{JPEFT}, dequantise + matmul": self._ready(
                jax.jit(whole), tokens, *self.packed
            ),
            "XLA, decoded before": self._ready(jax.jit(dot), tokens, self.decoded),
        }

    def values(self) -> np.ndarray:
        """What the codes stand for, before scaling, as [in, out]."""
        codes = packing.unpack(self.codes, 0).reshape(self.sizes.k, self.sizes.n)
        return np.asarray(self.book)[np.asarray(codes)]

    def _dequantizer(self, dtype: str) -> Callable[..., jax.Array]:
        how = {"block_size": self.sizes.block_size, "dtype": jnp.dtype(dtype)}
        return jax.jit(functools.partial(four_bit.dequantize, **how))

    @staticmethod
    def _ready(f: Callable[..., Any], *arguments: jax.Array) -> Run:
        return lambda: jax.block_until_ready(f(*arguments))


def dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """x @ W in x's dtype, with sums in float32."""
    return jnp.dot(x, w, preferred_element_type=jnp.float32).astype(x.dtype)


# --- bitsandbytes --------------------------------------------------------------------


class Theirs:
    """The matrix as [out, in], and what bitsandbytes does with it."""

    def __init__(self, w: np.ndarray, sizes: Sizes, cores: int):
        # OpenMP's threads spin while they wait, which would count as CPU time.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        # It says at import that a package for faster products is missing.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        import bitsandbytes
        import bitsandbytes.functional as functional
        import torch

        torch.set_num_threads(cores)
        torch.set_grad_enabled(False)
        self.torch, self.package, self.functional = torch, bitsandbytes, functional
        self.sizes = sizes
        self.w = torch.from_numpy(np.ascontiguousarray(w.T))
        self.packed, self.state = self._quantize(self.w)
        self.decoded = self.dequantize("bfloat16")()

    def quantize(self, dtype: str) -> Run:
        w = self.w.to(getattr(self.torch, dtype))
        return lambda: self._quantize(w)

    def dequantize(self, dtype: str) -> Run:
        state = self._state(dtype)
        return lambda: self.functional.dequantize_4bit(self.packed, state)

    def products(self, x: np.ndarray) -> dict[str, Run]:
        tokens = self.torch.from_numpy(x).bfloat16()
        state, linear = self._state("bfloat16"), self.torch.nn.functional.linear
        dequantize = self.functional.dequantize_4bit
        layer = self._layer
        layer(tokens)  # repacks the weight, once
        return {
            f"{PEER}, matmul_4bit": lambda: self.package.matmul_4bit(
                tokens, self.packed, quant_state=state
            ),
            f"{PEER}, dequantize + matmul": lambda: linear(
                tokens, dequantize(self.packed, state)
            ),
            f"{PEER}, Linear4bit": lambda: layer(tokens),
            "torch, decoded before": lambda: linear(tokens, self.decoded),
        }

    def values(self) -> np.ndarray:
        """What the codes stand for, before scaling, as [in, out]."""
        packed = self.packed.numpy().reshape(-1)
        codes = np.stack([packed >> 4, packed & 15], 1)
        return self.state.code.numpy()[codes].reshape(self.sizes.n, self.sizes.k).T

    @functools.cached_property
    def _layer(self) -> Any:
        sizes = self.sizes
        layer = self.package.nn.Linear4bit(
            sizes.k,
            sizes.n,
            bias=False,
            compute_dtype=self.torch.bfloat16,
            compress_statistics=False,
            quant_type=sizes.format,
        )
        layer.weight = self.package.nn.Params4bit(
            self.w,
            requires_grad=False,
            compress_statistics=False,
            blocksize=sizes.block_size,
            quant_type=sizes.format,
            module=layer,
        )
        return layer.to("cpu").eval()

    def _quantize(self, w: Any) -> Any:
        return self.functional.quantize_4bit(
            w, blocksize=self.sizes.block_size, quant_type=self.sizes.format
        )

    def _state(self, dtype: str) -> Any:
        """The state, whose dtype is the one dequantised to."""
        _, state = self._quantize(self.w)
        state.dtype = getattr(self.torch, dtype)
        return state


# --- times ---------------------------------------------------------------------------


def contests(ours: Ours, theirs: Theirs | None, sizes: Sizes) -> Iterator[Contest]:
    sides = {JPEFT: ours} | ({PEER: theirs} if theirs else {})
    for name, preposition in (("quantize", "from"), ("dequantize", "to")):
        for dtype in ("bfloat16", "float32"):
            runs = {who: getattr(side, name)(dtype) for who, side in sides.items()}
            yield Contest(f"{name} {preposition} {dtype}", runs)
    w = np.asarray(ours.dequantize("float32")())
    for m in sizes.tokens:
        x = np.random.default_rng(m).standard_normal((m, sizes.k), np.float32)
        runs = {}
        for side in sides.values():
            runs |= side.products(x)
        yield Contest(f"x @ W, M = {m}", runs, x @ w)


def measure(contest: Contest, repeats: int, cores: int) -> dict[str, Times]:
    best = {name: Times() for name in contest.runs}
    for run in contest.runs.values():
        run()  # compiles, allocates
    for _ in range(repeats):
        for name, run in contest.runs.items():
            time.sleep(PAUSE_S)
            cpu, wall = time.process_time(), time.perf_counter()
            run()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            best[name].cpu = min(best[name].cpu, cpu / cores)
            best[name].wall = min(best[name].wall, wall)
    return best


# --- the same numbers ----------------------------------------------------------------


def checks(ours: Ours, theirs: Theirs) -> Iterator[str]:
    """What both agree on; a sentence each."""
    same = ours.values() == theirs.values()
    yield f"Codes: {int((~same).sum())} of {same.size} stand for another value."
    scales = np.asarray(ours.scales).T.reshape(-1)
    differ = int((scales != theirs.state.absmax.numpy()).sum())
    yield f"Scales: {differ} of {scales.size} differ."
    for dtype in ("float32", "bfloat16"):
        # bfloat16 as float32, which holds it exactly; -0 equals 0.
        mine = np.asarray(ours.dequantize(dtype)()).astype(np.float32)
        other = theirs.dequantize(dtype)().float().numpy().T
        differ = int((mine != other).sum())
        yield f"Dequantised to {dtype}: {differ} of {mine.size} differ."


def error(run: Run, exact: np.ndarray) -> float:
    """Of a product, relative to the one in float32."""
    out = run()
    out = np.asarray(out, np.float32) if isinstance(out, jax.Array) else out.float()
    return float(np.linalg.norm(np.asarray(out) - exact) / np.linalg.norm(exact))


# --- the table -----------------------------------------------------------------------

HEAD = ("operation", "by", "CPU ms", "wall ms", "of the first's CPU", "error")


def rows(contest: Contest, times: dict[str, Times]) -> Iterator[tuple[str, ...]]:
    first = next(iter(times.values()))
    exact = contest.exact
    for name, t in times.items():
        yield (
            contest.name,
            f"**{name}**" if t is first else name,
            f"{t.cpu * 1e3:.2f}",
            f"{t.wall * 1e3:.2f}",
            f"{t.cpu / first.cpu:.2f}x",
            "" if exact is None else f"{error(contest.runs[name], exact):.1e}",
        )


def markdown(table: list[tuple[str, ...]]) -> str:
    lines = [HEAD, tuple("---" for _ in HEAD), *table]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def report(sizes: Sizes, repeats: int, cores: int, peer: bool) -> str:
    w = np.random.default_rng(0).standard_normal((sizes.k, sizes.n), np.float32)
    ours = Ours(w, sizes)
    theirs = Theirs(w, sizes, cores) if peer else None
    table = [
        row
        for contest in contests(ours, theirs, sizes)
        for row in rows(contest, measure(contest, repeats, cores))
    ]
    packages = ("jax", "torch", "bitsandbytes") if theirs else ("jax",)
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in packages)
    agreement = "bitsandbytes is not installed, or was left out: jpeft alone."
    if theirs:
        agreement = " ".join(checks(ours, theirs))
    return "\n\n".join(
        [
            f"{sizes.k} x {sizes.n}, {sizes.format} in blocks of {sizes.block_size}; "
            f"{cores} cores, the least of {repeats} times; {versions}.",
            markdown(table),
            agreement,
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    add = parser.add_argument
    add("--size", type=int, nargs=2, default=(4096, 4096), metavar=("K", "N"))
    add("--format", choices=("nf4", "fp4"), default="nf4")
    add("--block-size", type=int, default=64)
    add("--tokens", type=int, nargs="+", default=[1, 16, 256, 1024], metavar="M")
    add("--repeats", type=int, default=10, help="times each operation is timed")
    add("--peer", choices=("auto", "none"), default="auto", help="bitsandbytes")
    add("--keep-pages", action="store_true", help="use freed memory again")
    add("--markdown", metavar="FILE", help="write the report there too")
    args = parser.parse_args()
    k, n = args.size
    if k % args.block_size or k % packing.GROUP:
        parser.error(
            f"K={k}: expected a multiple of {packing.GROUP} and of the block size "
            f"{args.block_size}, so that both libraries make the same blocks"
        )
    if args.keep_pages and not KEEP_PAGES.items() <= os.environ.items():
        # malloc reads its settings when a process starts.
        os.execve(
            sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_PAGES}
        )
    sizes = Sizes(k, n, tuple(args.tokens), args.block_size, args.format)
    cores = len(os.sched_getaffinity(0))
    peer = args.peer == "auto" and importlib.util.find_spec(PEER) is not None
    text = report(sizes, args.repeats, cores, peer)
    if args.keep_pages:
        text = text.replace(" cores,", " cores, memory used again,", 1)
    print(text)
    if args.markdown:
        with open(args.markdown, "w", encoding="utf-8") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
