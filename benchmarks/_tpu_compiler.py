"""The real TPU compiler on a machine without a TPU, and its estimate of cycles.

Needs `pip install "jax[tpu]"`, which brings libtpu.  Import this before anything that
starts JAX's TPU client: libtpu reads its flags once a process.
"""

from __future__ import annotations

import dataclasses
import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# A compiler only: nothing is asked of a TPU, and several processes may do so at once.
os.environ.update(
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    TPU_STDERR_LOG_LEVEL="3",
    TPU_MIN_LOG_LEVEL="3",
)

import jax  # noqa: E402  reads the variables above
import numpy as np  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

TOPOLOGIES = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "v7x": "tpu7x:2x2x1",
}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """seconds: that compiling took.  cycles: of all operations, as the compiler
    estimates them, or None if it was not asked for them."""

    seconds: float
    cycles: int | None


class Compiler:
    """Compiles for one device of a generation of TPU.

    estimate: of cycles; not for v4, where libtpu aborts the process.  It is a flag of
    the process, so compilers that want it and others do not mix.
    """

    def __init__(self, generation: str, *, estimate: bool = False):
        self._profiles = _profiles() if estimate else None
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=TOPOLOGIES[generation]
        )
        self._mesh = Mesh(np.array(topology.devices[:1]), ("chip",))

    def __call__(
        self, f: Callable[..., Any], *arguments: tuple[tuple[int, ...], Any]
    ) -> Compiled:
        """arguments: (shape, dtype) each."""
        whole = NamedSharding(self._mesh, PartitionSpec())
        shaped = [
            jax.ShapeDtypeStruct(shape, dtype, sharding=whole)
            for shape, dtype in arguments
        ]
        for old in self._files():
            old.unlink()
        start = time.perf_counter()
        with jax.set_mesh(self._mesh):  # says to Pallas which TPU it is
            jax.jit(f).lower(*shaped).compile()
        seconds = time.perf_counter() - start
        return Compiled(seconds, self._cycles() if self._profiles else None)

    def _files(self) -> list[Path]:
        return sorted(self._profiles.glob("*")) if self._profiles else []

    def _cycles(self) -> int:
        found = {}
        for file in self._files():
            text = file.read_text(errors="replace")
            name = re.search(r'hlo_op_name: "([^"]+)"', text)
            cycles = re.search(r"estimated_cycles: (\d+)", text)
            if name and cycles:
                found[name[1]] = int(cycles[1])
        if not found:
            raise RuntimeError(
                "libtpu wrote no estimates; was it loaded before with other flags?"
            )
        return sum(found.values())


def _profiles() -> Path:
    """Where libtpu writes its estimates, for the life of the process."""
    global _folder
    if _folder is None:
        _folder = tempfile.TemporaryDirectory(prefix="tpu-estimates-")
        flag = f"--xla_jf_dump_static_llo_profile_to={_folder.name}"
        old = os.environ.get("LIBTPU_INIT_ARGS", "")
        os.environ["LIBTPU_INIT_ARGS"] = f"{old} {flag}".strip()
    return Path(_folder.name)


_folder: tempfile.TemporaryDirectory[str] | None = None
