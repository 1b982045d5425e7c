"""Where adapters go on a mesh, given where their base is."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jpeft.boxes import same_box
from jpeft.leaf import is_leaf, leaf_specs, map_fields, named
from jpeft.tree.paths import slots
from jpeft.types import PyTree


def shardings(params: PyTree, base_shardings: PyTree) -> PyTree:
    """Shardings of an adapted tree, from those of its base.

    params: the adapted tree, or its `jax.eval_shape`.  base_shardings: a tree of
    `NamedSharding` of the base's structure.  Every array of a leaf is sharded as the
    weight's axes that it has; the rank is never sharded.
    """
    flat = slots(params)
    given = jax.tree.leaves(
        base_shardings, is_leaf=lambda x: isinstance(x, jax.sharding.Sharding)
    )
    if len(given) != len(flat.values):
        raise ValueError(
            f"shardings: {len(given)} shardings for {len(flat.values)} weights; pass a "
            "tree of the base's structure"
        )

    def one(path: str, slot: Any, sharding: Any) -> Any:
        if not is_leaf(slot):
            return same_box(slot, sharding)
        if not isinstance(sharding, NamedSharding):
            raise ValueError(
                f"{path}: expected a NamedSharding, got {type(sharding).__name__}"
            )
        specs = leaf_specs(named(slot, path).replace(path=slot.path), sharding.spec)
        place = lambda spec: NamedSharding(sharding.mesh, spec)
        return _boxed(slot, map_fields(place, specs))

    return flat.rebuild(
        one(p, x, s) for (p, x), s in zip(flat.items(), given, strict=True)
    )


def _boxed(like: Any, leaf: Any) -> Any:
    """The boxes of `like` around the fields of `leaf`."""
    treedef = jax.tree.structure(like)
    values = jax.tree.leaves(
        leaf, is_leaf=lambda x: isinstance(x, (NamedSharding, PartitionSpec))
    )
    return jax.tree.unflatten(treedef, values)
