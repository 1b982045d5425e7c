"""Which kernels make keys and values, and which of their features are which."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jpeft.attach import check_new
from jpeft.leaf import layers
from jpeft.leaves.attention import BOTH, ELSEWHERE, KEY, VALUE
from jpeft.transform import Transform
from jpeft.tree.layout import LeafUse
from jpeft.tree.sublayers import SubLayer

OTHER = "other"
# What a projection makes, as runs of its output features: (("keys", 64), ...).
Runs = tuple[tuple[str, int], ...]


def targets(
    parts: Sequence[SubLayer],
    known: dict[str, LeafUse],
    heads: int | None,
) -> dict[str, tuple[str, Runs]]:
    """For each kernel that makes keys or values: (which, what its features are).

    known: how the weights are used; this function adds what it finds out about axes.
    """
    out: dict[str, tuple[str, Runs]] = {}
    for part in parts:
        for path in dict.fromkeys((*part.key, *part.value)):
            use = known[path] = axes_from_output(part, path, known)
            if use.axes is None or use.doubt:
                raise ValueError(in_doubt(path, use, part))
            shape = use.sizes("o")
            makes = [r for r in ("key", "value") if path in getattr(part, r)]
            if not part.fused and len(makes) == 2:
                out[path] = (BOTH, ())
                continue
            marks = {r: part.features(r, shape, heads=heads).ravel() for r in makes}
            if len(makes) == 1 and marks[makes[0]].all():
                out[path] = (KEY if makes[0] == "key" else VALUE, ())
                continue
            each = np.full(math.prod(shape), OTHER, object)
            for r, mark in marks.items():
                each[mark] = KEY if r == "key" else VALUE
            runs = tuple((r, len(list(g))) for r, g in itertools.groupby(each.tolist()))
            out[path] = (KEY, runs)
    return out


def check_apart(name: str, parts: Sequence[SubLayer]) -> None:
    """Raises where queries and keys are the same features."""
    for part in parts:
        if not part.fused and set(part.query) & set(part.key):
            raise ValueError(
                f"{part.key[0]}: {name}: one projection makes queries and keys, so "
                "nothing tells which of the two a product of them scores"
                + ELSEWHERE.replace("exclude= the sub-layer", f"exclude={part.path!r}")
            )


def in_doubt(path: str, use: LeafUse, part: SubLayer) -> str:
    """The refusal of a projection whose axes are unknown, or that is changed first."""
    asking = "" if use.uses else "pass uses=jpeft.find_uses(fn, params, *args), or "
    return (
        f"{path}: prefix cannot tell input from output axes of shape {use.shape} "
        f"({use.doubt}); {asking}exclude={part.path!r}"
    )


def chosen_layers(
    name: str,
    chosen: Sequence[int] | None,
    parts: Sequence[SubLayer],
    known: Mapping[str, LeafUse],
) -> dict[str, np.ndarray]:
    """For each kernel: 1 or 0 for each of its layers (one, or a stack)."""
    stacks = {
        p: tuple(known[p].sizes("s"))
        for part in parts
        for p in (*part.key, *part.value)
    }
    on = {p: np.ones(shape, np.float32) for p, shape in stacks.items()}
    if chosen is None:
        return on
    places = [
        (part, index) for part in parts for index in np.ndindex(*stacks[part.key[0]])
    ]
    n = len(places)
    bad = [k for k in chosen if not -n <= k < n]
    if bad:
        raise ValueError(
            f"{name}: layers={chosen!r}: there are {n} attentions "
            f"here, numbered 0 to {n - 1}; {bad[0]} is none of them"
        )
    wanted = {k % n for k in chosen}
    for k, (part, index) in enumerate(places):
        for p in (*part.key, *part.value):
            on[p][index] = float(k in wanted)
    return on


def axes_from_output(
    part: SubLayer, path: str, known: Mapping[str, LeafUse]
) -> LeafUse:
    """The use of a projection whose own shape leaves its axes in doubt.

    The kernel of queries (*stack, in, *out) and that of the output (*stack, *out, in)
    have the same sizes in opposite order, which tells the axes of both."""
    use = known[path]
    if use.uses or not use.doubt or not part.last or not part.query:
        return use
    q, o = known[part.query[0]].shape, known[part.last].shape
    fits = [
        n
        for n in range(len(q) - 1)
        if q[:n] == o[:n] and q[n] == o[-1] and q[n + 1 :] == o[n:-1]
    ]
    if len(fits) != 1 or use.shape[: fits[0] + 1] != q[: fits[0] + 1]:
        return use
    n = fits[0]
    axes = "s" * n + "i" + "o" * (len(use.shape) - n - 1)
    return dataclasses.replace(use, axes=axes, doubt="")


def check_free(transform: Transform, path: str, slot: Any) -> None:
    check_new(transform, path, slot)
    for leaf in layers(slot):
        if leaf.replaces_base:
            raise ValueError(
                f"{path}: this leaf trains whole ({type(leaf).__name__}); train it "
                f"beside a prefix by applying {transform.name} first"
            )
