"""UniPELT: LoRA, prefixes and adapters at once, each behind a gate.

Mao et al. 2022, arXiv:2110.07577.

    queries, values    y' = x W + g s x A B               `jpeft.gated(jpeft.lora)`
    attention          P_k, P_v -> g P_k, g P_v           `jpeft.gated(jpeft.prefix)`
    feed-forward       y' = y + g f(y)                    `jpeft.gated(jpeft.adapter)`

Nothing but those three in a row, with the paper's sizes: rank 8, 10 virtual positions,
a bottleneck 16 times narrower than the model.  rank=0 is the paper's UniPELT (AP).
"""

from __future__ import annotations

import dataclasses

from jpeft.checks import Count, CountOrZero, Floating, Positive
from jpeft.conventions import QUERY_VALUE
from jpeft.methods.adapter import adapter
from jpeft.methods.gated import gated
from jpeft.methods.lora import lora
from jpeft.methods.prefix import prefix
from jpeft.transform import Recipe, Transform, chain, method
from jpeft.tree.where import Where


@method("unipelt")
@dataclasses.dataclass(frozen=True)
class UniPELT(Recipe):
    """A transform of all three: gated LoRA, prefixes and adapters.

    Mao et al. 2022, arXiv:2110.07577.

    rank, alpha: of LoRA; rank=0 leaves LoRA out.  replace_scale: see `jpeft.gated`.
    prefix_length: see `jpeft.prefix`; 0 leaves prefixes out.
    bottleneck, reduction: of the adapters after feed-forward, see `jpeft.adapter`.
    projections: the weights that get LoRA, by name those of queries and values.
    attention, mlp: which sub-layers get prefixes, which adapters.
    dtype: of all that trains; None means float32, or float64 beside float64.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> w = lambda *shape: {"kernel": jnp.ones(shape)}
    >>> attn = {n: w(8, 8) for n in ("query", "key", "value", "out")}
    >>> params = {"attn": attn, "mlp": {"fc1": w(8, 16), "fc2": w(16, 8)}}
    >>> params = jpeft.unipelt(2, 5, bottleneck=4)(jax.random.key(0), params)
    >>> params["attn"]["key"]["kernel"].gate.shape
    (8,)
    """

    rank: CountOrZero = 8
    prefix_length: CountOrZero = 10
    bottleneck: Count | None = None
    reduction: Positive | None = None
    _: dataclasses.KW_ONLY
    alpha: Positive = 16
    replace_scale: bool = False
    projections: Where = QUERY_VALUE
    attention: Where = "attention"
    mlp: Where = "mlp"
    dtype: Floating | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.composed()  # each part checks how its fields go together

    def composed(self) -> Transform:
        parts: list[Transform] = []
        if self.rank != 0:
            low_rank = lora(
                self.rank, self.alpha, where=self.projections, dtype=self.dtype
            )
            parts.append(gated(low_rank, replace_scale=self.replace_scale))
        if self.prefix_length != 0:
            of_attention = {"where": self.attention, "dtype": self.dtype}
            parts.append(gated(prefix(self.prefix_length, **of_attention)))
        bottleneck = adapter(
            self.bottleneck,
            self.reduction,
            placement="pfeiffer",
            where=self.mlp,
            dtype=self.dtype,
        )
        return chain(*parts, gated(bottleneck))


unipelt = UniPELT
