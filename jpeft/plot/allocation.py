"""Where the ranks went: a heat map by layer and matrix."""

from __future__ import annotations

import dataclasses
import itertools
import re
from typing import Any

import numpy as np

from jpeft.boxes import unbox
from jpeft.leaf import layers, unboxed
from jpeft.methods.adalora import Triplets
from jpeft.tree.paths import slots
from jpeft.types import PyTree

# A segment of a path that counts layers: "3", "layer_3", "h3".
_LAYER = re.compile(r"(.*?)_?(\d+)")


@dataclasses.dataclass(frozen=True)
class RankTable:
    """values (matrices, layers): ranks, NaN where a layer has no such matrix."""

    matrices: tuple[str, ...]
    layers: tuple[str, ...]
    values: np.ndarray


def ranks(params: PyTree) -> Any:
    """A matplotlib Figure: the rank of every adapted matrix, by layer.

    Of AdaLoRA's leaves those triplets count whose lam is not zero, of other low-rank
    leaves all.  A row is a matrix's path without the number of its layer; the layers of
    a scanned stack are its rows.  Where several adapters stand on one weight, their
    ranks add up.

    Nothing of pyplot's global state is touched; `figure.savefig("ranks.png")` needs no
    display.  Raises ValueError if no leaf has a rank, and ModuleNotFoundError without
    matplotlib.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = {f"layer_{k}": {"kernel": jnp.ones((7, 5))} for k in range(2)}
    >>> params = jpeft.lora(rank=3)(jax.random.key(0), params)
    >>> jpeft.plot.allocation.rank_table(params).values
    array([[3., 3.]])
    """
    table = rank_table(params)
    try:
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            "plot.ranks draws with matplotlib, which is not installed; type: "
            "pip install 'jpeft[plots]'"
        ) from missing
    rows, columns = table.values.shape
    figure = Figure(
        figsize=(3.5 + 0.45 * columns, 1.5 + 0.35 * rows), layout="constrained"
    )
    axes = figure.add_subplot()
    most = max(1.0, float(np.nanmax(table.values)))
    image = axes.imshow(table.values, cmap="viridis", vmin=0, vmax=most, aspect="auto")
    axes.set_xticks(range(columns), table.layers)
    axes.set_yticks(range(rows), table.matrices)
    axes.set_xlabel("layer")
    axes.set_title("rank")
    for i, j in itertools.product(range(rows), range(columns)):
        rank = table.values[i, j]
        if np.isfinite(rank):
            dark = rank < 0.6 * most
            color = "white" if dark else "black"
            axes.text(j, i, f"{rank:g}", ha="center", va="center", color=color)
    figure.colorbar(image, ax=axes)
    return figure


def rank_table(params: PyTree) -> RankTable:
    """What `ranks` draws."""
    found: dict[tuple[str, int | None], float] = {}
    for path, slot in slots(params).items():
        for row, rank in _ranks_of(slot).items():
            place = _place(path, row)
            found[place] = found.get(place, 0.0) + rank
    if not found:
        raise ValueError(
            "plot.ranks: no leaf of this tree has a rank; apply a low-rank transform "
            "first: params = jpeft.adalora(rank=12)(jax.random.key(0), params)"
        )
    matrices = tuple(dict.fromkeys(name for name, _ in found))
    numbers = {layer for _, layer in found}
    order = sorted(numbers, key=lambda n: (n is None, n or 0))  # others come last
    values = np.full((len(matrices), len(order)), np.nan)
    for (name, layer), rank in found.items():
        values[matrices.index(name), order.index(layer)] = rank
    return RankTable(
        matrices, tuple("-" if n is None else str(n) for n in order), values
    )


def _ranks_of(slot: Any) -> dict[tuple[int, ...], float]:
    """{row of the stack: rank}, all adapters of the weight together."""
    out: dict[tuple[int, ...], float] = {}
    for leaf in layers(slot):
        if isinstance(leaf, Triplets):
            kept = np.asarray(unbox(leaf.lam)) != 0
            counts = dict(np.ndenumerate(kept.sum(-1)))
        elif isinstance(rank := getattr(unboxed(leaf), "rank", None), int):
            axes = getattr(leaf, "axes", "")
            stack = [n for n, c in zip(leaf.shape, axes, strict=False) if c == "s"]
            counts = dict.fromkeys(np.ndindex(*stack), rank)
        else:
            continue
        for row, rank in counts.items():
            out[row] = out.get(row, 0.0) + float(rank)
    return out


def _place(path: str, row: tuple[int, ...]) -> tuple[str, int | None]:
    """(name of the matrix, number of its layer): the first number in the path, else in
    the stack; what is left over tells matrices apart."""
    names, layer = [], None
    for segment in path.split("/"):
        found = _LAYER.fullmatch(segment)
        if layer is None and found:
            layer = int(found[2])
            names += [found[1]] if found[1] else []
        else:
            names.append(segment)
    if layer is None and row:
        layer, row = row[0], row[1:]
    return "/".join(names) + "".join(f"[{k}]" for k in row), layer
