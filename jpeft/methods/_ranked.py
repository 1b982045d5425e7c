"""What all methods with a rank share: the rank and the scale of each weight."""

from __future__ import annotations

import dataclasses

from jpeft.transform import (
    LeafMethod,
    Pattern,
    check_float,
    check_pattern,
    check_positive,
    matched,
)
from jpeft.tree.layout import LeafUse
from jpeft.tree.where import Where, check_where


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranked(LeafMethod):
    """rank, alpha: of weights whose path no regular expression of rank_pattern and
    alpha_pattern matches.  dtype: of the method's arrays."""

    rank: int
    alpha: float | None = None
    dtype: str | None = None
    rank_pattern: Pattern = ()
    alpha_pattern: Pattern = ()
    where: Where = "linear"
    exclude: Where = ()

    def __post_init__(self) -> None:
        name = self.name
        check_positive(name, "rank", self.rank, integer=True)
        if self.alpha is not None:
            check_positive(name, "alpha", self.alpha)
        check_float(name, self.dtype)
        ranks = check_pattern(name, "rank_pattern", self.rank_pattern, integer=True)
        alphas = check_pattern(name, "alpha_pattern", self.alpha_pattern)
        self._set(
            rank_pattern=ranks,
            alpha_pattern=alphas,
            where=check_where(self.where),
            exclude=check_where(self.exclude, "exclude"),
        )

    def _set(self, **fields: object) -> None:
        """Of a frozen dataclass that is being made."""
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def selection(self) -> tuple[Where, Where]:
        return self.where, self.exclude

    def accepts(self, use: LeafUse) -> bool:
        return use.is_weight

    def rank_of(self, path: str) -> int:
        return matched(self.rank_pattern, path, self.rank)

    def alpha_of(self, path: str) -> float | None:
        return matched(self.alpha_pattern, path, self.alpha)
