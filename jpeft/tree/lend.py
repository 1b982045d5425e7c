"""Arrays that all leaves of one transform share and one of them holds.

VeRA's random matrices, or the network that makes every layer's prefix.  One leaf holds
and lends them: there they are trained, counted and saved, once.  Before any leaf acts,
`adapt` puts them into transient fields of every leaf of the same transform.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jpeft.leaf import AdaptedLeaf, Sharing, is_leaf, layers, named, unboxed
from jpeft.tree.paths import Slots


def resolve(values: Sequence[Any]) -> list[Any]:
    """The same values; each leaf now has what the leaves of its transform share."""
    lent: dict[str, dict[str, Any]] = {}
    for x in values:
        for leaf in layers(x):
            given = unboxed(leaf).lends() if isinstance(leaf, Sharing) else None
            if given is not None:
                lent.setdefault(leaf.origin, {}).update(given)
    if not lent:
        return list(values)
    return [_borrowed(x, lent) if is_leaf(x) else x for x in values]


def _borrowed(leaf: AdaptedLeaf, lent: Mapping[str, Mapping[str, Any]]) -> AdaptedLeaf:
    if is_leaf(leaf.base):
        leaf = leaf.replace(base=_borrowed(leaf.base, lent))
    if not isinstance(leaf, Sharing) or leaf.origin not in lent:
        return leaf
    return leaf.borrow(lent[leaf.origin])


def acting(flat: Slots) -> list[Any]:
    """Every slot, its leaf out of its boxes, knowing its path and what it shares."""
    return resolve([named(x, p) if is_leaf(x) else x for p, x in flat.items()])
