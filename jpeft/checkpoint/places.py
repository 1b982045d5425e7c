"""`shardings=`: the shardings that a caller asks for, for the arrays of an adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from jax.sharding import Sharding

from jpeft.boxes import unbox
from jpeft.leaf import array_fields, is_leaf, layers
from jpeft.tree.paths import slots
from jpeft.types import PyTree

Place = tuple[str, int, str]  # path, layer, field


@dataclasses.dataclass(frozen=True)
class Told:
    """What `shardings=` says.

    every: the one for all arrays.  fields: of the arrays of leaves.  plain: of others.
    """

    every: Sharding | None
    fields: Mapping[Place, Sharding]
    plain: Mapping[str, Sharding]

    def of(self, path: str, layer: int, field: str) -> Sharding | None:
        found = self.fields.get((path, layer, field), self.every)
        # A tree of dicts may hold a leaf's fields below its path.
        return found or self.plain.get(f"{path}/{field}")

    def names(self) -> list[str]:
        return [*self.plain, *(f"{p}/{field}" for p, _, field in self.fields)]


def placed_by(shardings: PyTree) -> Told:
    """shardings: None, one for all, or a tree as the adapted one."""
    if shardings is None or isinstance(shardings, Sharding):
        return Told(shardings, {}, {})
    fields, plain = {}, {}
    for path, slot in slots(shardings).items():
        for k, layer in enumerate(layers(slot)):
            for field, x in array_fields(layer).items():
                if isinstance(place := unbox(x), Sharding):
                    fields[path, k, field] = place
        if not is_leaf(slot) and isinstance(place := unbox(slot), Sharding):
            plain[path] = place
    return Told(None, fields, plain)
