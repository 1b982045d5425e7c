"""The shardings of adapted trees, from those of their base; and `declare`, which tells
them to products that are compiled for TPUs."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jpeft.boxes import same_box, unbox
from jpeft.leaf import (
    array_fields,
    innermost,
    is_leaf,
    map_fields,
    named,
)
from jpeft.quant.leaf import Quantized
from jpeft.sharding import plan
from jpeft.sharding.plan import whole_shards
from jpeft.sharding.specs import leaf_specs
from jpeft.tree.paths import is_array, slots, suggest, weight
from jpeft.types import PyTree


def shardings(params: PyTree, base_shardings: PyTree) -> PyTree:
    """Shardings of an adapted tree, from those of its base.

    params: the adapted tree, or its `jax.eval_shape`.  base_shardings: one sharding for
    all, or a tree of them with the base's paths; each a `NamedSharding` or a
    `SingleDeviceSharding`.  Every array of a leaf is sharded as the weight's axes that
    it has; the rank is never sharded, nor what does not divide, such as the scales of a
    few blocks.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> from jax.sharding import Mesh, NamedSharding, PartitionSpec
    >>> mesh = Mesh(jax.devices()[:1], "model")
    >>> columns = NamedSharding(mesh, PartitionSpec(None, "model"))
    >>> params = jpeft.lora(rank=2)(jax.random.key(0), {"kernel": jnp.ones((5, 4))})
    >>> leaf = jpeft.sharding.shardings(params, columns)["kernel"]
    >>> [*leaf.base.spec], [*leaf.a.spec], [*leaf.b.spec]
    ([None, 'model'], [None, None], [None, 'model'])
    """
    flat, told = slots(params), slots(base_shardings)
    given = dict(zip(told.paths, map(unbox, told.values), strict=True))
    if isinstance(base_shardings, Sharding):
        given = dict.fromkeys(flat.paths, base_shardings)
    if odd := [p for p, x in flat.items() if is_array(weight(x)) and p not in given]:
        raise ValueError(
            f"shardings: {odd[0]} has none among {len(given)} shardings for "
            f"{len(flat.values)} weights, nearest: {suggest(told.paths, odd[0])}; pass "
            "a tree of the base's structure"
        )

    def one(path: str, slot: Any, sharding: Any) -> Any:
        if not is_leaf(slot):
            return same_box(slot, sharding)
        if isinstance(sharding, SingleDeviceSharding):
            return jax.tree.map(lambda _: sharding, slot)
        if not isinstance(sharding, NamedSharding):
            raise ValueError(
                f"{path}: expected a NamedSharding, got {type(sharding).__name__}"
            )
        specs = leaf_specs(named(slot, path).replace(path=slot.path), sharding.spec)
        specs = _whole(specs, slot, sharding.mesh)
        place = lambda spec: NamedSharding(sharding.mesh, spec)
        return _boxed(slot, map_fields(place, specs))

    return flat.rebuild(one(p, x, given.get(p)) for p, x in flat.items())


def declare(
    params: PyTree, *, batch: str | Sequence[str]
) -> contextlib.AbstractContextManager[None]:
    """Inside, each product with a quantised weight knows where its operands are.

    params: the adapted tree, on a mesh; arrays, or `jax.ShapeDtypeStruct`s with
        shardings.
    batch: the mesh axes that cut activations along their first axis.

    For programs that are compiled for several TPUs: without it (and on a mesh without
    explicit axes) quantised weights are decoded by XLA, and where they are cut along
    `batch`, sent as decoded.  With it every device runs the kernels on its part, and
    only codes are sent.  A wrong declaration costs time, never the result.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> from jax.sharding import Mesh, NamedSharding, PartitionSpec
    >>> mesh = Mesh(jax.devices()[:1], "data")
    >>> kernel = jax.device_put(jnp.ones((64, 4)), NamedSharding(mesh, PartitionSpec()))
    >>> params = jpeft.quantize("nf4")(jax.random.key(0), {"kernel": kernel})
    >>> apply = jax.jit(jpeft.adapt(lambda params, x: x @ params["kernel"]))
    >>> with jpeft.sharding.declare(params, batch="data"):
    ...     y = apply(params, jnp.ones((2, 64)))
    >>> y.shape
    (2, 4)
    """
    found, mesh = [], None
    for path, slot in slots(params).items():
        leaf = innermost(slot)
        codes = unbox(leaf.codes) if isinstance(leaf, Quantized) else None
        sharding = getattr(codes, "sharding", None)
        if codes is None or not isinstance(sharding, NamedSharding):
            continue
        mesh = sharding.mesh
        spec = plan.spec_of(sharding, codes.shape, mesh)
        found.append((path, tuple(codes.shape), spec))
    if mesh is None:
        raise ValueError(
            "sharding.declare: no quantised weight of params is on a mesh; pass what "
            "jax.device_put(params, shardings) returned"
        )
    # A path in a call may have more in front, so the longest that ends it is meant.
    found.sort(key=lambda weight: -len(weight[0]))
    axes = (batch,) if isinstance(batch, str) else tuple(batch)
    for axis in axes:
        if axis not in mesh.axis_names:
            raise ValueError(
                f"sharding.declare: batch={batch!r}: the mesh of params has the axes "
                f"{tuple(mesh.axis_names)}"
            )
    return plan.declare(plan.Declared(mesh, axes, tuple(found)))


def _whole(specs: Any, leaf: Any, mesh: Any) -> Any:
    """The specifications without the axes that do not divide."""
    fields = {
        n: whole_shards(getattr(specs, n), unbox(x).shape, mesh)
        for n, x in array_fields(leaf).items()
    }
    if is_leaf(leaf.base):
        fields["base"] = _whole(specs.base, leaf.base, mesh)
    return specs.replace(**fields)


def _boxed(like: Any, leaf: Any) -> Any:
    """The boxes of `like` around the fields of `leaf`."""
    treedef = jax.tree.structure(like)
    values = jax.tree.leaves(
        leaf, is_leaf=lambda x: isinstance(x, (NamedSharding, PartitionSpec))
    )
    return jax.tree.unflatten(treedef, values)
