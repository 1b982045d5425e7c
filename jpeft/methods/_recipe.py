"""Methods that are other methods in a row: a name and its defaults, no code of their
own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from jpeft.transform import Transform
from jpeft.tree.layout import LeafUse


@dataclasses.dataclass(frozen=True)
class Recipe(Transform):
    """A transform that is what `composed` says."""

    def composed(self) -> Transform:
        raise NotImplementedError

    def __call__(
        self,
        key: jax.Array,
        params: Any,
        *,
        uses: Mapping[str, LeafUse] | None = None,
    ) -> Any:
        return self.composed()(key, params, uses=uses)

    def origins(self) -> frozenset[str]:
        return self.composed().origins()
