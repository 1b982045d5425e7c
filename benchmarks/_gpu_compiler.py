"""The real GPU compiler on a machine without a GPU, and counts of what it makes.

Needs JAX's CUDA plugin, alone: `pip install --no-deps jax-cuda12-plugin==V
jax-cuda12-pjrt==V` with V the version of jax, and absl-py.  `ptxas`, from a CUDA
toolkit or `pip install nvidia-cuda-nvcc-cu12`, adds registers and spills; `nvdisasm`,
from a toolkit or `pip install triton`, the instructions of the machine itself.  Import
this before anything that starts a client of JAX: XLA reads its flags once a process.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

_dumps = tempfile.TemporaryDirectory(prefix="gpu-kernels-")
_flags = f"--xla_dump_to={_dumps.name} --xla_dump_emitter_re=.*"
os.environ.update(
    JAX_PLATFORMS="cpu",
    XLA_FLAGS=f"{os.environ.get('XLA_FLAGS', '')} {_flags}".strip(),
    MOSAIC_GPU_DUMP_PTX="1",
    MOSAIC_GPU_DUMP_TO=_dumps.name,
    TF_CPP_MIN_LOG_LEVEL="3",
    # A status that nobody reads would have its stack looked up, some seconds each.
    LLVM_DISABLE_SYMBOLIZATION="1",
)

import jax  # noqa: E402  reads the variables above
from jax.experimental import topologies  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402

# What XLA asks of a device: an H200.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132
  fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 151397597184
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation" platform_version: "Compute Capability 9.0a"
  device_address_bits: 64 ecc_enabled: true name: "NVIDIA H200 141GB HBM3e"
  driver_version: "13.0.0" runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0" dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200 141GB HBM3e"
"""


def available() -> bool:
    """Whether the plugin is installed."""
    return any(
        importlib.util.find_spec(f"jax_plugins.xla_cuda{v}") is not None
        for v in (12, 13)
        if importlib.util.find_spec("jax_plugins") is not None
    )


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One of a program's kernels.

    instructions: of the machine by kind; empty without `nvdisasm`.
    loop: those of the longest loop; empty if there is none.
    registers, spilled (bytes): None without `ptxas`.
    """

    name: str
    ptx: str
    registers: int | None
    spilled: int | None
    instructions: collections.Counter[str]
    loop: collections.Counter[str]


class Compiler:
    """Compiles for one H200."""

    def __init__(self) -> None:
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=H200, topology="1x1x1"
        )
        mesh = topologies.make_mesh(topology, (1,), ("gpu",))
        self._whole = NamedSharding(mesh, PartitionSpec())

    def __call__(
        self, f: Callable[..., Any], *arguments: tuple[tuple[int, ...], Any]
    ) -> list[Kernel]:
        """The kernels written in Pallas; arguments: (shape, dtype) each."""
        self.program(f, *arguments)
        found = {}
        for file in sorted(Path(_dumps.name).glob("*.ptx")):
            ptx = file.read_text()
            for name in re.findall(r"\.entry (\w+)", ptx):
                if "4bit" in name or "mosaic_gpu" in name:
                    found[name.removesuffix("_mosaic_gpu_kernel")] = ptx
        return [_examine(name, ptx) for name, ptx in found.items()]

    def program(
        self, f: Callable[..., Any], *arguments: tuple[tuple[int, ...], Any]
    ) -> Any:
        """The compiled program, as JAX gives it."""
        for old in Path(_dumps.name).glob("*.ptx"):
            old.unlink()
        shaped = [
            jax.ShapeDtypeStruct(shape, dtype, sharding=self._whole)
            for shape, dtype in arguments
        ]
        return jax.jit(f).lower(*shaped).compile()


def _examine(name: str, ptx: str) -> Kernel:
    registers = spilled = None
    text = ""
    arch = re.search(r"\.target (\w+)", ptx)
    if arch and (ptxas := _assembler(ptx)):
        with tempfile.TemporaryDirectory() as folder:
            source, binary = Path(folder, "a.ptx"), Path(folder, "a.cubin")
            source.write_text(ptx)
            told = _run(ptxas, "-v", f"-arch={arch[1]}", str(source), "-o", str(binary))
            if found := re.search(r"Used (\d+) registers", told.stderr):
                registers = int(found[1])
            if found := re.search(r"(\d+) bytes spill stores", told.stderr):
                spilled = int(found[1])
            if (disassembler := _tool("nvdisasm")) and binary.exists():
                text = _run(disassembler, "-c", str(binary)).stdout
    return Kernel(name, ptx, registers, spilled, _count(text), _longest_loop(text))


def _count(text: str) -> collections.Counter[str]:
    """Instructions by kind, without those that fill the end."""
    pattern = r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)"
    kinds = re.findall(pattern, text, flags=re.M)
    return collections.Counter(kind for kind in kinds if kind != "NOP")


def _longest_loop(text: str) -> collections.Counter[str]:
    """Of the branches backward: what lies between one and its target.  (The last one of
    a program leads to itself.)"""
    targets = {m[1]: m.end() for m in re.finditer(r"^\s*(\.L_\w+):", text, flags=re.M)}
    loops = [
        _count(text[targets[m[1]] : m.end()])
        for m in re.finditer(r"BRA[^\n]*`\((\.L_\w+)\)", text)
        if targets.get(m[1], m.end()) < m.start()
    ]
    loops = [counts for counts in loops if counts.total() > 1]
    return max(loops, key=lambda counts: counts.total(), default=_count(""))


def _assembler(ptx: str) -> str | None:
    """A ptxas that knows the version of the PTX."""
    version = re.search(r"\.version \S+", ptx)
    probe = f"{version[0] if version else ''}\n.target sm_90a\n.address_size 64\n"
    return next((path for path in _tools("ptxas") if _assembles(path, probe)), None)


@functools.cache
def _assembles(ptxas: str, probe: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "a.ptx")
        source.write_text(probe)
        done = _run(
            ptxas, "-arch=sm_90a", str(source), "-o", str(Path(folder, "a.cubin"))
        )
        return done.returncode == 0


def _tool(name: str) -> str | None:
    return next(iter(_tools(name)), None)


@functools.cache
def _tools(name: str) -> tuple[str, ...]:
    """From PATH, then from Python packages."""
    found = [shutil.which(name)]
    for package in ("nvidia", "triton"):
        spec = importlib.util.find_spec(package)
        for root in (spec.submodule_search_locations or []) if spec else []:
            found += sorted(map(str, Path(root).rglob(f"bin/{name}*")))
    return tuple(path for path in found if path)


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=120)
