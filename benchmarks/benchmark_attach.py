"""What attaching a method costs: CPU-seconds of a fresh process, and compilations.

    python benchmarks/benchmark_attach.py [--method lora] [--rank 8] [--layers 30]

The seven stacked kernels are those of a decoder of 135 million parameters (SmolLM2's
sizes).  Nothing is taken from a compilation cache; what counts is the time of all
threads from the call of the transform until its arrays are there, once, and once more
in the same process.
"""

from __future__ import annotations

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

import jpeft
from jpeft.tree.layout import LINEAR, LeafUse

WIDTH, HIDDEN, HEADS, KEYS, HEAD = 576, 1536, 9, 3, 64
# Of one layer: the axes of the kernel, and which of them are input and output.
KERNELS = {
    "query": ((WIDTH, HEADS, HEAD), "ioo"),
    "key": ((WIDTH, KEYS, HEAD), "ioo"),
    "value": ((WIDTH, KEYS, HEAD), "ioo"),
    "out": ((HEADS, HEAD, WIDTH), "iio"),
    "gate": ((WIDTH, HIDDEN), "io"),
    "up": ((WIDTH, HIDDEN), "io"),
    "down": ((HIDDEN, WIDTH), "io"),
}


def stacked(layers: int) -> tuple[dict, dict[str, LeafUse]]:
    """The kernels, and what `jpeft.find_uses` says of them in a scanned model."""
    rng = np.random.default_rng(0)
    params, uses = {}, {}
    for name, (sizes, axes) in KERNELS.items():
        shape, path = (layers, *sizes), f"{name}/kernel"
        drawn = rng.standard_normal(shape, np.float32)
        params[name] = {"kernel": jnp.asarray(drawn)}
        uses[path] = LeafUse(path, shape, LINEAR, "s" + axes)
    return params, uses


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--method", default="lora")
    arguments.add_argument("--rank", type=int, default=8)
    arguments.add_argument("--layers", type=int, default=30)
    given = arguments.parse_args()
    transform = getattr(jpeft, given.method)(rank=given.rank)
    params, uses = stacked(given.layers)
    key = jax.block_until_ready(jax.random.key(0))

    compiled = []
    note = lambda event, _, **more: (
        compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    jax.monitoring.register_event_duration_secs_listener(note)
    for when in ("first time", "second time"):
        compiled.clear()
        start = time.process_time()
        jax.block_until_ready(transform(key, params, uses=uses))
        spent = time.process_time() - start
        print(f"{when}: {spent:.2f} CPU-seconds, {len(compiled)} compilations")


if __name__ == "__main__":
    jax.config.update("jax_enable_compilation_cache", False)
    main()
