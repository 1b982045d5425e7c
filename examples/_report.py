"""What a run shows: tables, sizes on disk, and the picture of its curves."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib
import numpy as np

matplotlib.use("Agg")  # draws into files, needs no display

from matplotlib import pyplot  # noqa: E402

MOST_ROWS = 16
BLUE, ORANGE, GRAY = "#3b6ea8", "#d1762c", "#8a8a8a"


def table(summary: str, *, full: bool) -> str:
    """The adapted rows of ``jpeft.summary`` and its totals; or all of it."""
    if full:
        return summary
    head, rule, *rows, last_rule, total = summary.splitlines()
    adapted = [row for row in rows if re.split(r"  +", row)[2] != "-"]
    shown = adapted
    if len(adapted) > MOST_ROWS:
        shown = [*adapted[: MOST_ROWS - 4], "...", *adapted[-4:]]
    lines = [head, rule, *shown, last_rule, total]
    if hidden := len(rows) - min(len(adapted), MOST_ROWS):
        lines.append(f"({hidden} weights not shown; --full-summary shows them)")
    return "\n".join(lines)


def results(scores: Mapping[str, Mapping[str, float]]) -> str:
    """A table of accuracy and macro-F1, a row for each entry."""
    rows = [f"{'held out':<9}{'accuracy':>9}{'macro-F1':>10}"]
    rows += [
        f"{name:<9}{row['accuracy']:>9.3f}{row['macro_f1']:>10.3f}"
        for name, row in scores.items()
    ]
    return "\n".join(rows)


def size(path: Path) -> int:
    """The bytes of a file, or of all files below a folder."""
    files = [path] if path.is_file() else [x for x in path.rglob("*") if x.is_file()]
    return sum(file.stat().st_size for file in files)


def weights_size(folder: Path) -> int:
    """The bytes of a checkpoint's weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


class Stored(NamedTuple):
    """Weights: how many parameters, their bytes, and those of plain arrays instead."""

    parameters: int
    bytes: int
    plain_bytes: int

    @property
    def bits(self) -> float:
        """Of a parameter, scales and all."""
        return 8 * self.bytes / self.parameters if self.parameters else 0.0


def stored(weights: Iterable[Any]) -> Stored:
    """Counted from the arrays that the weights, quantised or not, consist of."""
    weights = list(weights)
    return Stored(
        sum(x.size for x in weights),
        sum(array.nbytes for array in jax.tree.leaves(weights)),
        sum(x.size * x.dtype.itemsize for x in weights),
    )


def quantized(part: Stored, whole: Stored) -> str:
    """A line on a base of which a part is quantised."""
    instead = lambda x: f"{megabytes(x.bytes)} instead of {megabytes(x.plain_bytes)}"
    return (
        f"base     in memory: {instead(whole)}; its {part.parameters / 1e6:.1f}M "
        f"quantised parameters, {part.bits:.3f} bits each: {instead(part)}"
    )


def rounding(over_change: Mapping[str, float]) -> str:
    """A line on what merging into a coarse dtype would cost."""
    return (
        "rounding of merged weights, over what the adapter changed: up to "
        f"{over_change['bfloat16']:.2g} in bfloat16, "
        f"{over_change['requantized']:.2g} if quantised again"
    )


def megabytes(size: int) -> str:
    """A size in MB (10^6 bytes), or in kB below one."""
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"


def curves(path: Path, metrics: Mapping[str, Any], steps_per_epoch: int) -> None:
    """Draws the loss of every step, and the held-out accuracy, against the epochs."""
    losses = np.array(metrics["history"]["loss"])
    points = metrics["history"]["accuracy"]
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(9, 3.4), layout="constrained"
    )
    epochs = np.arange(1, len(losses) + 1) / steps_per_epoch
    left.plot(epochs, losses, color=BLUE, alpha=0.25, linewidth=1)
    left.plot(epochs, _smooth(losses), color=BLUE, linewidth=2)
    left.set(title="training loss", xlabel="epoch", ylim=(0, None))

    after, majority = metrics["after"]["accuracy"], metrics["majority"]["accuracy"]
    right.plot(
        [0, *(step / steps_per_epoch for step, _ in points)],
        [metrics["before"]["accuracy"], *(value for _, value in points)],
        color=BLUE,
        linewidth=2,
        marker="o",
        markersize=4,
        label="during training, on a part",
    )
    right.plot(
        *([len(losses) / steps_per_epoch], [after]),
        color=ORANGE,
        marker="D",
        linestyle="none",
        label=f"at the end, on all: {after:.3f}",
    )
    right.axhline(
        majority, color=GRAY, linestyle="--", label=f"majority class: {majority:.3f}"
    )
    right.set(title="held-out accuracy", xlabel="epoch", ylim=(0, 1))
    right.legend(
        loc="center right", bbox_to_anchor=(1, 0.32), frameon=False, fontsize=9
    )
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e6e6")
    trainable = metrics["parameters"]["trainable"]
    total = trainable + metrics["parameters"]["frozen"]
    figure.suptitle(f"{metrics['recipe']}: {trainable:,} of {total:,} parameters train")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _smooth(values: np.ndarray, weight: float = 0.9) -> np.ndarray:
    """The exponential mean, started without a pull towards 0."""
    out, mean, norm = [], 0.0, 0.0
    for value in values:
        mean = weight * mean + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        out.append(mean / norm)
    return np.array(out)
