"""Explicit meshes, on which an array's sharding is part of its type: the sharding of a
product, from the labels of its axes.

JAX asks of every product whose operands are cut along an axis that it sums, or along
axes that it merges, where the result goes (`out_sharding=`).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import jax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jpeft import compat
from jpeft.sharding.plan import whole_shards


@dataclasses.dataclass(frozen=True)
class Places:
    """Labels of axes -> the sharding of an array with these axes.

    axes: (label, the mesh axes along which such an axis is cut) for each.
    """

    mesh: Any
    axes: tuple[tuple[Hashable, Any], ...]

    def __call__(self, labels: Iterable[Hashable]) -> NamedSharding:
        axes = dict(self.axes)
        return NamedSharding(self.mesh, PartitionSpec(*map(axes.get, labels)))


def places(sharding: Any, labels: Sequence[Hashable]) -> Places | None:
    """For each label the mesh axes that cut it in an array with this sharding and these
    labels; None without a sharding."""
    if sharding is None:
        return None
    return Places(sharding.mesh, tuple(itertools.zip_longest(labels, sharding.spec)))


def places_of(
    x: jax.Array,
    labels: Sequence[Hashable],
    result: Any,
    kept: Sequence[Hashable] | None = None,
) -> Places | None:
    """Every label where x has it, if the sharding `result` of what is made of x is
    known.  kept: the labels that stay cut, all by default."""
    if result is None:
        return None
    pairs = itertools.zip_longest(labels, jax.typeof(x).sharding.spec)
    return Places(
        result.mesh, tuple((k, v) for k, v in pairs if kept is None or k in kept)
    )


def cut(x: jax.Array) -> Any:
    """The sharding of an array's type, or None where it is cut along no axis."""
    sharding = jax.typeof(x).sharding
    return None if all(names is None for names in sharding.spec) else sharding


def whole(x: jax.Array) -> jax.Array:
    """The full array on every device, which matrix decompositions need.

    On an automatic mesh the compiler gathers what it needs, a matrix at a time.
    """
    sharding = cut(x)
    if sharding is None:
        return x
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec()))


def reshaped(
    x: jax.Array, sizes: Sequence[int], spec: Callable[[Any], Iterable[Any]]
) -> jax.Array:
    """x.reshape(sizes), cut as `spec` says of the specification of x."""
    sharding = compat.typed_sharding(x)
    if sharding is None:
        return x.reshape(sizes)
    new = whole_shards(PartitionSpec(*spec(sharding.spec)), tuple(sizes), sharding.mesh)
    return lax.reshape(x, sizes, out_sharding=NamedSharding(sharding.mesh, new))
