"""Paths: `layers/0/attn/query/kernel`, boxes and `.value` stripped.

No two places of a tree have the same path.  Where two would read alike, such as the key
`a/b` beside `a: {b}`, the slash that belongs to a key is written `/%/`: `a/%/b`.

A *slot* is a place in a parameter tree where one weight stands: an array, a box around
an array, or an adapted leaf.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
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

    @functools.cached_property
    def paths(self) -> tuple[str, ...]:
        return spelled(self.keys)

    def items(self) -> Iterable[tuple[str, Any]]:
        return zip(self.paths, self.values, strict=True)

    def rebuild(self, values: Iterable[Any]) -> PyTree:
        return jax.tree.unflatten(self.treedef, list(values))


def is_slot(x: Any) -> bool:
    return is_leaf(x) or is_box(x)


def slots(tree: PyTree) -> Slots:
    """The weights of `tree` in JAX's order of leaves."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_slot)
    return Slots(segments([p for p, _ in flat]), tuple(x for _, x in flat), treedef)


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


# --- how places are spelled ----------------------------------------------------------

Keys = tuple[str, ...]


def segment(key: Any) -> str:
    return str(segment_key(key))


def segment_key(key: Any) -> Any:
    """What the tree itself calls a child: a name, a number, a key of a dict."""
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return getattr(key, attribute)
    return key


def segments(paths: Sequence[Sequence[Any]]) -> tuple[Keys, ...]:
    """JAX's key paths as strings.  Of keys in one node that read alike (1 and "1" of
    an ordered dict), all but the first are numbered: "1%2"."""
    keys = tuple(tuple(map(segment, p)) for p in paths)
    if len(set(keys)) == len(keys):
        return keys
    alike: dict[Any, list[Any]] = {}

    def one(path: tuple[Any, ...], n: int) -> str:
        same = alike.setdefault((path[:n], segment(path[n])), [])
        if path[n] not in same:
            same.append(path[n])
        number = same.index(path[n])
        return segment(path[n]) + (f"%{number + 1}" if number else "")

    return tuple(tuple(one(tuple(p), n) for n in range(len(p))) for p in paths)


def spelled(keys: Sequence[Keys]) -> tuple[str, ...]:
    """The path of each slot: its keys with '/' between them.  No two are equal.

    Nodes that would read alike get different paths too, and everything below a node
    begins with the node's path: so a bias is found beside its own kernel.  Slots with
    the same keys, which a user's own node class may have, are numbered.
    """
    marked: set[Keys] = set()  # the nodes in whose keys a slash is written /%/
    if any("/" in x for k in keys for x in k):
        nodes = {k[:n] for k in keys for n in range(1, len(k))}
        while new := _alike(nodes, marked) | _alike(keys, marked):
            marked |= new
    return tuple(_numbered(_spelled(k, marked) for k in keys))


def _alike(places: Iterable[Keys], marked: Collection[Keys]) -> set[Keys]:
    """The nodes that need a mark and have none, among slots that are spelled alike."""
    met: dict[str, set[Keys]] = {}
    for k in places:
        met.setdefault(_spelled(k, marked), set()).add(k)
    alike = (k for group in met.values() if len(group) > 1 for k in group)
    return {k[: _odd_keys(k)] for k in alike} - {()} - {*marked}


def _numbered(paths: Iterable[str]) -> Iterator[str]:
    met: dict[str, int] = {}
    for path in paths:
        met[path] = met.get(path, 0) + 1
        yield path if met[path] == 1 else f"{path}%{met[path]}"


def _odd_keys(keys: Keys) -> int:
    """How many keys there are up to the last one that holds a slash or a mark."""
    return max((n + 1 for n, k in enumerate(keys) if "/" in k or "%" in k), default=0)


def _spelled(keys: Keys, marked: Collection[Keys]) -> str:
    n = max((n for n in range(1, len(keys) + 1) if keys[:n] in marked), default=0)
    own = (k.replace("%", "%%").replace("/", "/%/") for k in keys[:n])
    return "/".join([*own, *keys[n:]])
