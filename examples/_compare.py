"""What the tables that compare whole runs of the main job have in common."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Iterable, Sequence

import finetune
import jax
import numpy as np

# What a run is given by such a table, one by one.
OWN_OPTIONS = ("--seed", "--out", "--resume", "--overwrite", "--full-summary")
SMALL = ("--epochs", "1", "--max-train", "96", "--max-eval", "64")


def refuse(
    parser: argparse.ArgumentParser, options: Iterable[str], own: Iterable[str]
) -> None:
    """Ends the command if an option is one of its own."""
    if given := [x for x in options if x.split("=")[0] in own]:
        parser.error(f"{given[0]} is set for each run; the seeds by --seeds")


def cores() -> int:
    """What the process may use."""
    return len(os.sched_getaffinity(0))


def machine() -> str:
    """Where the figures come from."""
    python = ".".join(platform.python_version_tuple()[:2])
    device = jax.devices()[0].platform
    return f"Python {python}, jax {jax.__version__} on {device}, {cores()} cores"


def examples(run: finetune.Run) -> str:
    """The data and the length of a run."""
    return (
        f"{len(run.train)} examples to train on, {len(run.held_out)} held out, "
        f"{len(run.classes)} classes, {run.recipe.epochs} x {run.steps_per_epoch} steps"
    )


def seeds(numbers: Sequence[int]) -> str:
    """In words."""
    return f"seed{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


def spread(values: Sequence[float]) -> str:
    """The mean, and the lowest and highest beside it if there are several."""
    mean, lowest, highest = np.mean(values), min(values), max(values)
    some = f" ({lowest:.3f} to {highest:.3f})" if len(values) > 1 else ""
    return f"{mean:.3f}{some}"


def markdown(head: Sequence[str], table: Iterable[Sequence[str]]) -> str:
    """With a head, as a README has it."""
    lines = [head, tuple("---" for _ in head), *table]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
