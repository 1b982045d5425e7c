"""Paths: `layers/0/attn/query/kernel`, boxes and `.value` stripped.

A *slot* is a place in a parameter tree where one weight stands: an array, a box around
an array, or an adapted leaf.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from jpeft.boxes import is_box, unbox
from jpeft.leaf import AdaptedLeaf, is_leaf
from jpeft.types import PyTree


@dataclasses.dataclass(frozen=True)
class Slots:
    """A parameter tree seen as weights: parallel tuples, and the way back."""

    keys: tuple[tuple[str, ...], ...]
    values: tuple[Any, ...]
    treedef: Any

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple("/".join(k) for k in self.keys)

    def items(self) -> Iterable[tuple[str, Any]]:
        return zip(self.paths, self.values, strict=True)

    def rebuild(self, values: Iterable[Any]) -> PyTree:
        return jax.tree.unflatten(self.treedef, list(values))


def is_slot(x: Any) -> bool:
    return is_leaf(x) or is_box(x)


def slots(tree: PyTree) -> Slots:
    """The weights of `tree` in JAX's order of leaves."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_slot)
    keys = tuple(tuple(segment(k) for k in path) for path, _ in flat)
    return Slots(keys, tuple(x for _, x in flat), treedef)


def map_slots(f: Callable[[str, Any], Any], tree: PyTree) -> PyTree:
    """`f(path, slot)` at every slot."""
    flat = slots(tree)
    return flat.rebuild(f(p, x) for p, x in flat.items())


def weight(slot: Any) -> Any:
    """What a model sees in a slot: the array or adapted leaf, out of its box."""
    return slot if isinstance(slot, AdaptedLeaf) else unbox(slot)


def is_array(x: Any) -> bool:
    """True of what JAX can trace; Equinox-style trees also hold functions and the like.

    Python numbers are not weights: JAX makes constants of them.
    """
    return is_leaf(x) or isinstance(x, (jax.Array, np.ndarray, jax.ShapeDtypeStruct))


def suggest(names: Sequence[str], wanted: str, most: int = 3) -> list[str]:
    """The names nearest to what was typed; if none is near, the first ones."""
    near = difflib.get_close_matches(wanted, names, n=most, cutoff=0.4)
    return near or list(names[:most])


def segment(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
