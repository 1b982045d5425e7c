"""What all methods with a rank share: the rank and the scale of each weight."""

from __future__ import annotations

import dataclasses

from jpeft.checks import Count, Counts, Floating, Positive, Positives
from jpeft.transform import LeafMethod, matched
from jpeft.tree.layout import LeafUse
from jpeft.tree.where import Where


@dataclasses.dataclass(frozen=True)
class Ranked(LeafMethod):
    """rank, alpha: of weights whose path no regular expression of rank_pattern and
    alpha_pattern matches.  dtype: of the method's arrays."""

    rank: Count
    alpha: Positive | None = None
    _: dataclasses.KW_ONLY
    dtype: Floating | None = None
    rank_pattern: Counts = ()
    alpha_pattern: Positives = ()
    where: Where = "linear"
    exclude: Where = ()

    def selection(self) -> tuple[Where, Where]:
        return self.where, self.exclude

    def accepts(self, use: LeafUse) -> bool:
        return use.is_weight

    def rank_of(self, path: str) -> int:
        return matched(self.rank_pattern, path, self.rank)

    def alpha_of(self, path: str) -> float | None:
        return matched(self.alpha_pattern, path, self.alpha)
