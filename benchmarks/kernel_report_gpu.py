"""What the 4-bit kernels cost on an NVIDIA GPU.

    python benchmarks/kernel_report_gpu.py [--sizes KxN ...] [--markdown FILE]

On a machine with a GPU it measures: the bandwidth of a copy, then each operation beside
what it cannot or should not exceed by much, and bitsandbytes on a matrix of that size
if torch and bitsandbytes with CUDA can be imported.  First it compares every kernel's
result with plain JAX's on the same GPU.

    dequantise, quantise   the memory's floor: bytes read and written, at the bandwidth
                           of the copy
    many tokens            XLA's product of bfloat16 matrices
    few tokens             the same, which takes as long as reading a bfloat16 W

A time is what the kernels of one jitted program take on the GPU, as its profiler says:
the gaps between kernels and the host's part are not in it.  The program is called with
one matrix after the other, together more than the GPU's cache holds; the median of
several rounds counts.  bitsandbytes' calls are recorded as a CUDA graph and played
back, but for its quantising, which cannot be recorded and is timed as it is called.

Without a GPU it says so, and counts instead: instructions, registers and spills of what
the compiler makes for an H200 (`_gpu_compiler` says what must be installed).  THESE ARE
NO TIMES.  A multiprocessor issues at most 128 instructions a clock, each for one
thread; the last column is how many elements that makes if nothing else is in the way.
To dequantise to bfloat16 at 4.3 TB/s, the 132 of an H200 must each do 7.3 a clock, at
1.75 GHz; to read W in 4 bits at that rate 33, and in bfloat16 9.3.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.metadata
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

BLOCK = 64
SIZES = ["4096x4096", "4096x11008", "4096x14336", "8192x8192", "8192x28672"]
MANY, FEW = (2048, 8192), (1, 4, 16, 64)
ROUNDS = 10
# So that nothing is found in a cache (60 MB on an H200).
WORKING_SET = 128 * 2**20
ISSUED_PER_CLOCK = 128


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="KxN")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    sizes = [tuple(map(int, size.split("x"))) for size in arguments.sizes]
    lines = []
    for line in measured(sizes) if _has_gpu() else counted():
        print(line, flush=True)
        lines.append(line)
    if arguments.markdown:
        arguments.markdown.write_text("\n".join(lines) + "\n")


def _has_gpu() -> bool:
    """Asked of the system: JAX, once asked, could not compile for another device."""
    return any(Path("/proc/driver/nvidia/gpus").glob("*")) or any(
        Path("/dev").glob("nvidia[0-9]*")
    )


def table(*cells: Any) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


# --- measured ------------------------------------------------------------------------


class Weight(NamedTuple):
    """One matrix in its two forms."""

    whole: Any
    packed: tuple[Any, Any, Any]  # codes, scales, book


def measured(sizes: list[tuple[int, int]]) -> Iterator[str]:
    import jax

    from jpeft.kernels.gpu import route

    device = jax.devices()[0]
    yield f"{device.device_kind}, jax {jax.__version__}, dialect: {route.route()}"
    bandwidth = copy_bandwidth()
    yield f"Copying at {bandwidth / 1e9:.0f} GB/s, read and written."
    yield ""
    yield table("operation", "W", "us", "beside", "us", "ratio", "bitsandbytes us")
    yield table(*["---"] * 7)
    for k, n in sizes:
        yield from of_size(k, n, bandwidth)


def of_size(k: int, n: int, bandwidth: float) -> Iterator[str]:
    import jax
    import jax.numpy as jnp

    from jpeft.formats.codebooks import CODEBOOKS
    from jpeft.kernels.gpu import route

    bf16, how = jnp.bfloat16, {"block_size": BLOCK}
    book, key = jnp.asarray(CODEBOOKS["nf4"]), jax.random.key(0)
    normal = lambda i, *shape: jax.random.normal(
        jax.random.fold_in(key, i), shape, bf16
    )
    quantize = functools.partial(route.quantize, format="nf4", **how)
    weights = []
    for i in range(max(3, math.ceil(WORKING_SET / (k * n // 2)))):
        w = normal(i, k, n)
        weights.append(Weight(w, (*jax.jit(quantize)(w), book)))
    peer = Peer.of(k, n)

    def row(name: str, us: float, beside: str, other: float, peers: Any) -> str:
        theirs = "" if peers is None else f"{peers:.1f}"
        times = f"{us:.1f}", beside, f"{other:.1f}", f"{us / other:.2f}"
        return table(name, f"{k}x{n}", *times, theirs)

    yield from differences(weights[0])
    floor = (2 * k * n + k * n // 2 + 4 * k * n // BLOCK) / bandwidth * 1e6
    us = best(functools.partial(route.dequantize, dtype=bf16, **how), packed(weights))
    yield row("dequantise", us, "memory", floor, _of_peer(peer, "dequantize"))
    us = best(quantize, [(w.whole,) for w in weights])
    yield row("quantise", us, "memory", floor, _of_peer(peer, "quantize"))
    for m in MANY + FEW:
        # What is quick needs many, what is large has no room for them.
        some = weights if m in FEW else weights[: max(2, len(weights) // 4)]
        x, g = normal(0, m, k), normal(1, m, n)
        xla = best(lambda w, x: x @ w, [(w.whole, x) for w in some])
        f = functools.partial(route.matmul, dtype=bf16, **how)
        us = best(f, packed(some, x))
        yield row(f"x @ W, {m}", us, "XLA", xla, _of_peer(peer, "multiply", m))
        xla = best(lambda w, g: g @ w.T, [(w.whole, g) for w in some])
        f = functools.partial(route.matmul_transposed, dtype=bf16, **how)
        yield row(f"g @ W.T, {m}", best(f, packed(some, g)), "XLA", xla, None)


def packed(weights: list[Weight], *first: Any) -> list[tuple[Any, ...]]:
    return [(*first, *w.packed) for w in weights]


def differences(w: Weight) -> Iterator[str]:
    """Nothing, or what is wrong: the kernels beside plain JAX on the same GPU."""
    import jax
    import jax.numpy as jnp

    from jpeft.kernels import plain
    from jpeft.kernels.gpu import route

    shape = "x".join(map(str, w.whole.shape))
    wrong = lambda name, what: table(f"{name} IS WRONG", shape, what, *[""] * 4)
    how, f32 = {"block_size": BLOCK}, jnp.float32
    quantize = functools.partial(plain.quantize, format="nf4", **how)
    codes, scales = jax.jit(quantize)(w.whole)
    share = float(jnp.mean(codes != w.packed[0]))
    # An approximate reciprocal moves what lies within a unit of a threshold.
    if share > 1e-5 or not bool(jnp.array_equal(scales, w.packed[1])):
        yield wrong("quantise", f"{share:.1e} of bytes")
    whole, got = (
        jax.jit(functools.partial(module.dequantize, dtype=jnp.bfloat16, **how))(
            *w.packed
        )
        for module in (plain, route)
    )
    if not bool(jnp.array_equal(whole, got)):
        yield wrong("dequantise", f"by {jnp.max(jnp.abs(whole - got)):.1e}")
    for name, w_ in (("matmul", whole), ("matmul_transposed", whole.T)):
        x = jax.random.normal(jax.random.key(1), (5, w_.shape[0]), jnp.bfloat16)
        run = functools.partial(getattr(route, name), dtype=f32, **how)
        with jax.default_matmul_precision("highest"):
            wanted = x.astype(f32) @ w_.astype(f32)
        error = float(jnp.max(jnp.abs(jax.jit(run)(x, *w.packed) - wanted)))
        # With few tokens it is the book, or g, that is rounded to bfloat16, not W.
        if not error < 4e-3 * float(jnp.max(jnp.abs(wanted))):
            yield wrong(name, f"by {error:.1e}")


def best(f: Callable[..., Any], arguments: list[tuple[Any, ...]]) -> float:
    """Microseconds of f on the GPU, called with each of `arguments` in turn."""
    import jax

    program = jax.jit(f)
    jax.block_until_ready([program(*each) for each in arguments])
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(ROUNDS):
                for each in arguments:
                    out = program(*each)
                jax.block_until_ready(out)
        (file,) = Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(file)).planes
        events = sorted(
            (event.start_ns, event.duration_ns)
            for plane in planes
            if plane.name.startswith("/device:GPU")
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
        )
    each, rest = divmod(len(events), ROUNDS)
    assert each and not rest, f"{len(events)} kernels in {ROUNDS} rounds"
    nanoseconds = [
        sum(duration for _, duration in events[i : i + each])
        for i in range(0, len(events), each)
    ]
    return statistics.median(nanoseconds) / len(arguments) / 1e3


def copy_bandwidth() -> float:
    """Bytes a second, read and written: the driver's copy, or XLA's kernel."""
    import jax.numpy as jnp

    xs = [(jnp.full((2**28,), i, jnp.bfloat16),) for i in range(4)]
    return 2 * xs[0][0].nbytes / min(best(jnp.copy, xs), best(lambda x: -x, xs)) * 1e6


@dataclasses.dataclass(frozen=True)
class Peer:
    """bitsandbytes on one matrix, which stays in the cache as far as it fits: to its
    advantage."""

    torch: Any
    functional: Any
    w: Any

    @classmethod
    def of(cls, k: int, n: int) -> Peer | None:
        try:
            import bitsandbytes.functional as functional
            import torch
        except ImportError:
            return None
        if not torch.cuda.is_available():
            return None
        return cls(
            torch, functional, torch.randn(n, k, dtype=torch.bfloat16, device="cuda")
        )

    def best(self, f: Callable[[], Any], recorded: bool = True) -> float:
        """Microseconds."""
        cuda, calls = self.torch.cuda, 20

        def run() -> None:
            for _ in range(calls):
                f()

        f()
        cuda.synchronize()
        if recorded:
            graph = cuda.CUDAGraph()
            with cuda.graph(graph):
                run()
            run = graph.replay
        times = []
        for _ in range(ROUNDS):
            start, stop = (cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop) / calls * 1e3)
        return statistics.median(times)

    def quantized(self) -> tuple[Any, Any]:
        return self.functional.quantize_4bit(self.w, quant_type="nf4", blocksize=BLOCK)

    def quantize(self) -> float:
        return self.best(self.quantized, recorded=False)

    def dequantize(self) -> float:
        packed, state = self.quantized()
        return self.best(lambda: self.functional.dequantize_4bit(packed, state))

    def multiply(self, m: int) -> float:
        import bitsandbytes

        packed, state = self.quantized()
        x = self.torch.randn(m, self.w.shape[1], dtype=self.w.dtype, device="cuda")
        with self.torch.no_grad():
            return self.best(
                lambda: bitsandbytes.matmul_4bit(x, packed.t(), quant_state=state)
            )


def _of_peer(peer: Peer | None, what: str, *arguments: Any) -> float | None:
    """Its microseconds; None, and a word on why, if it cannot do it here."""
    if peer is None:
        return None
    try:
        return getattr(peer, what)(*arguments)
    except RuntimeError as error:
        print(f"bitsandbytes, {what}: {error}", file=sys.stderr)
        return None


# --- counted -------------------------------------------------------------------------


def counted() -> Iterator[str]:
    yield "No NVIDIA GPU here: nothing is measured."
    import _gpu_compiler

    if not _gpu_compiler.available():
        version = importlib.metadata.version("jax")
        yield (
            "To count what the compiler makes for an H200: pip install --no-deps "
            f"jax-cuda12-plugin=={version} jax-cuda12-pjrt=={version}"
        )
        return
    import jax

    compiler = _gpu_compiler.Compiler()
    yield f"Counted for an H200, jax {jax.__version__}, 4096 x 4096, nf4, blocks of 64:"
    yield ""
    yield table(
        "kernel", "registers", "spilled", "instructions", "an element", "most of them",
        "elements a clock, at most",
    )  # fmt: skip
    yield table(*["---"] * 7)
    for name, f, shapes in _programs():
        for kernel in compiler(f, *shapes):
            # A thread does 64 elements: in one go, or in a pass of a product's loop,
            # where it does 32 in Triton.
            counts, elements = kernel.instructions, 64
            if kernel.loop:
                counts, elements = kernel.loop, 64 if "Mosaic" in name else 32
            each = counts.total() / elements
            yield table(
                name,
                kernel.registers,
                kernel.spilled,
                f"{counts.total()} (loop)" if kernel.loop else counts.total(),
                f"{each:.1f}",
                ", ".join(f"{kind} {n}" for kind, n in counts.most_common(5)),
                f"{ISSUED_PER_CLOCK / each:.1f}" if each else "no nvdisasm",
            )


def _programs() -> Iterator[tuple[str, Callable[..., Any], list[Any]]]:
    """(name, operation, shapes)."""
    import jax
    import jax.numpy as jnp

    from jpeft.kernels.gpu import few_rows, mosaic

    k = n = 4096
    bf16, f32 = jnp.bfloat16, jnp.float32
    weight = [((k // 2, n), jnp.uint8), ((k // BLOCK, n), f32), ((16,), f32)]
    how = {"block_size": BLOCK}
    part = functools.partial
    dialects: list[tuple[str, Any, dict[str, Any]]] = [("Mosaic", mosaic, {})]
    if jax.__version_info__ < (0, 11):  # later, Triton asks for a GPU
        from jpeft.kernels.gpu import triton

        for look_up in ("gather", "select"):
            config = dataclasses.replace(triton.CONFIG, look_up=look_up)
            dialects.append((f"Triton, {look_up}", triton, {"config": config}))
    for dialect, module, more in dialects:
        for dtype in (bf16, f32):
            f = part(module.dequantize, dtype=dtype, **how, **more)
            name = f"{dialect}: dequantise to {jnp.dtype(dtype).name}"
            yield name, f, weight
        for format in ("nf4", "fp4", "int4"):
            f = part(module.quantize, format=format, **how, **more)
            yield f"{dialect}: quantise, {format}", f, [((k, n), bf16)]
        if dialect == "Triton, select":
            continue
        if dialect == "Mosaic":
            module = few_rows
        for m in (1, 16, 64) if dialect == "Mosaic" else (1, 16, 32):
            for op in (module.matmul, module.matmul_transposed):
                f = part(op, dtype=bf16, **how, **more)
                name = f"{dialect}: {op.__name__}, {m} rows"
                yield name, f, [((m, k), bf16), *weight]


if __name__ == "__main__":
    main()
