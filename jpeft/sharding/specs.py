"""Where what stands beside a weight goes: to its devices, sharded as the axes that the
two share."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import (
    Mesh,
    NamedSharding,
    PartitionSpec,
    Sharding,
    SingleDeviceSharding,
)

from jpeft import compat
from jpeft.boxes import unbox
from jpeft.leaf import (
    AdaptedLeaf,
    array_fields,
    field_axes,
    is_leaf,
    is_stored,
    transients,
)


def place_of(base: Any) -> Sharding | None:
    """The devices of a weight and what is cut along which axis; None if it was put
    nowhere for certain, so that JAX may move it."""
    place = getattr(base, "sharding", None)
    if isinstance(place, NamedSharding):
        return place if isinstance(place.mesh, Mesh) else None
    arrays = [x for x in jax.tree.leaves(base) if isinstance(x, jax.Array)]
    if place is None or not any(x.committed for x in arrays):
        return None
    devices = sorted(place.device_set, key=lambda d: d.id)
    if len(devices) == 1:
        return SingleDeviceSharding(devices[0])
    return NamedSharding(Mesh(np.array(devices), ("all",)), PartitionSpec())


def beside(leaf: AdaptedLeaf, base: Any) -> dict[str, Sharding]:
    """The place of each array of a leaf over `base`; nothing if the base has none.

    leaf: of arrays or of their shapes.  What does not divide is not cut.
    """
    place, arrays = place_of(base), array_fields(leaf)
    if place is None:
        return {}
    if not isinstance(place, NamedSharding):
        return dict.fromkeys(arrays, place)
    specs, mesh = leaf_specs(leaf, place.spec), place.mesh
    whole = lambda n, x: whole_shards(getattr(specs, n), unbox(x).shape, mesh)
    return {n: NamedSharding(mesh, whole(n, x)) for n, x in arrays.items()}


def place_beside(leaf: AdaptedLeaf, base: Any) -> AdaptedLeaf:
    """New arrays on the devices of their base, sharded as the axes they share with
    it."""
    if isinstance(base, (compat.Tracer, jax.ShapeDtypeStruct)):
        return leaf
    places = beside(leaf, base)
    arrays = array_fields(leaf)
    return leaf.replace(**{n: jax.device_put(arrays[n], p) for n, p in places.items()})


def leaf_specs(leaf: AdaptedLeaf, spec: PartitionSpec) -> Any:
    """Partition specifications of a leaf's arrays, from that of its weight.

    Each array is sharded as the weight's axes it inherits; the rank never is.
    """
    names = tuple(spec) + (None,) * (leaf.ndim - len(spec))
    changes: dict[str, Any] = {
        n: PartitionSpec(*(None if k is None else names[k] for k in axes))
        for n, axes in field_axes(leaf).items()
    }
    if not is_stored(leaf):
        changes["base"] = leaf_specs(leaf.base, spec) if is_leaf(leaf.base) else spec
    for n, x in transients(leaf).items():
        changes[n] = jax.tree.map(lambda _: PartitionSpec(), x)
    return leaf.replace(**changes)


def whole_shards(
    spec: PartitionSpec, shape: tuple[int, ...], mesh: Any
) -> PartitionSpec:
    """The specification without the axes that do not divide evenly: replicated there.

    Scales of blocks are few, and a handful over many devices does not divide.
    """
    out = []
    for names, n in zip(tuple(spec), shape, strict=False):
        each = names if isinstance(names, tuple) else (names,)
        parts = math.prod(mesh.shape[a] for a in each if a is not None)
        out.append(names if n % parts == 0 else None)
    return PartitionSpec(*out)
