"""What a tree holds: counted, and as a table."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from jpeft.boxes import unbox
from jpeft.leaf import (
    FROZEN,
    TRAINABLE,
    array_fields,
    check_whole,
    innermost,
    is_leaf,
    is_stored,
    layers,
    roles,
)
from jpeft.tree.paths import Slots, is_array, slots
from jpeft.tree.state import states
from jpeft.types import PyTree


def is_adapted(params: PyTree) -> bool:
    """Whether a method has changed a weight.  A quantised weight alone is a base."""
    return any(is_leaf(x) and not is_stored(x) for x in slots(params).values)


class Count(NamedTuple):
    """Numbers of parameters."""

    trainable: int
    frozen: int

    @property
    def total(self) -> int:
        return self.trainable + self.frozen

    @property
    def percent(self) -> float:
        """Trainable parameters in percent of all."""
        return 100.0 * self.trainable / max(1, self.total)


def count(params: PyTree) -> Count:
    """How many parameters train and how many do not.

    The old value that a `full` leaf keeps for `unload` is part of neither: the model
    does not use it.  Random keys, counters, caches and running statistics are no
    parameters; see `jpeft.tree.state`.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = jpeft.lora(rank=2)(jax.random.key(0), {"kernel": jnp.ones((5, 3))})
    >>> jpeft.count(params)
    Count(trainable=16, frozen=15)
    """
    total = {TRAINABLE: 0, FROZEN: 0}
    for _, slot in _weights(slots(params)):
        for role, n, _ in _arrays(slot):
            total[role] += n
    return Count(total[TRAINABLE], total[FROZEN])


def _weights(flat: Slots) -> list[tuple[str, Any]]:
    no_weights = states(flat)
    return [(p, x) for p, x in flat.items() if p not in no_weights]


def _arrays(slot: Any) -> list[tuple[str, int, int]]:
    """(role, parameters, bytes) of every array of a slot that the model uses."""
    out = []
    for leaf in layers(slot):
        if is_stored(leaf):  # counted as the weight that it stores
            size = sum(_bytes(unbox(x)) for x in array_fields(leaf).values())
            return [*out, (FROZEN, leaf.size, size)]
        for name, role in roles(leaf).items():
            x = unbox(getattr(leaf, name)) if role in (TRAINABLE, FROZEN) else None
            if name != "base" and x is not None:
                out.append((role, math.prod(x.shape), _bytes(x)))
        if leaf.replaces_base:
            return out
    base = unbox(innermost(slot))
    if is_array(base):
        out.append((FROZEN, math.prod(base.shape), _bytes(base)))
    return out


def _bytes(x: Any) -> int:
    return math.prod(x.shape) * x.dtype.itemsize


def summary(params: PyTree) -> str:
    """A table: path, shape, method, trainable and frozen parameters, bytes; totals.

    It lists parameters only, as `count` counts them.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> base = {"bias": jnp.ones(3), "kernel": jnp.ones((5, 3))}
    >>> print(jpeft.summary(jpeft.lora(rank=2)(jax.random.key(0), base)))
    path    shape  method            trainable  frozen  bytes
    ---------------------------------------------------------
    bias    3      -                         0       3     12
    kernel  5x3    LowRank                  16      15    124
    ---------------------------------------------------------
    total          trainable 47.06%         16      18    136
    """
    rows, sums = [], [0, 0, 0]
    for path, slot in _weights(slots(params)):
        check_whole(slot, path, "summary")
        arrays = _arrays(slot)
        trains = sum(n for r, n, _ in arrays if r == TRAINABLE)
        still = sum(n for r, n, _ in arrays if r == FROZEN)
        size = sum(b for *_, b in arrays)
        if not arrays:
            continue
        method = " over ".join(type(x).__name__ for x in layers(slot)) or "-"
        shape = "x".join(map(str, unbox(innermost(slot)).shape)) or "scalar"
        rows.append((path, shape, method, f"{trains:,}", f"{still:,}", f"{size:,}"))
        sums = [a + b for a, b in zip(sums, (trains, still, size), strict=True)]
    percent = 100 * sums[0] / max(1, sums[0] + sums[1])
    total = ("total", "", f"trainable {percent:.4g}%", *(f"{n:,}" for n in sums))
    head = ("path", "shape", "method", "trainable", "frozen", "bytes")
    return _table([head, *rows, total])


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(r[k]) for r in rows) for k in range(len(rows[0]))]
    line = lambda r: "  ".join(
        x.ljust(w) if k < 3 else x.rjust(w)
        for k, (x, w) in enumerate(zip(r, widths, strict=True))
    ).rstrip()
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    lines = [line(r) for r in rows]
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])
