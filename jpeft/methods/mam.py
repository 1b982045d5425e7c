"""Mix-and-match adapter: prefixes in attention, a parallel adapter beside feed-forward.

He et al. 2021, arXiv:2110.04366.

    attention       o = softmax(q [P_k; K]^T / sqrt(d)) [P_v; V]     `jpeft.prefix`
    feed-forward    y' = y + s (relu(x D + d) U + u)                 `jpeft.adapter`

Nothing but those two in a row, with the paper's sizes: 30 virtual positions, s = 4.

Where we depart from the paper: the prefix itself trains unless reparametrization="mlp"
makes it with the network the paper used while training.
"""

from __future__ import annotations

import dataclasses

from jpeft.checks import Count, Floating, Positive
from jpeft.methods.adapter import Scale, adapter
from jpeft.methods.prefix import Network, prefix
from jpeft.transform import Recipe, Transform, chain, method
from jpeft.tree.where import Where


@method("mam")
@dataclasses.dataclass(frozen=True)
class MixAndMatch(Recipe):
    """A transform of both: prefixes in attention and parallel adapters.

    He et al. 2021, arXiv:2110.04366.

    prefix_length, reparametrization, width: see `jpeft.prefix`.
    bottleneck, reduction, scale: of the adapters, see `jpeft.adapter`.
    attention, mlp: which sub-layers get prefixes, which adapters.
    dtype: of all that trains; None means float32, or float64 beside float64.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> w = lambda *shape: {"kernel": jnp.ones(shape)}
    >>> attn = {n: w(8, 8) for n in ("query", "key", "value", "out")}
    >>> params = {"attn": attn, "mlp": {"fc1": w(8, 16), "fc2": w(16, 8)}}
    >>> params = jpeft.mam(5, bottleneck=4)(jax.random.key(0), params)
    >>> params["attn"]["key"]["kernel"].keys.shape
    (5, 8)
    """

    prefix_length: Count = 30
    bottleneck: Count | None = None
    reduction: Positive | None = None
    _: dataclasses.KW_ONLY
    scale: Scale = 4.0
    reparametrization: Network | None = None
    width: Count = 800
    attention: Where = "attention"
    mlp: Where = "mlp"
    dtype: Floating | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.composed()  # each part checks how its fields go together

    def composed(self) -> Transform:
        return chain(
            prefix(
                self.prefix_length,
                where=self.attention,
                reparametrization=self.reparametrization,
                width=self.width,
                dtype=self.dtype,
            ),
            adapter(
                self.bottleneck,
                self.reduction,
                placement="parallel",
                scale=self.scale,
                where=self.mlp,
                dtype=self.dtype,
            ),
        )


mam = MixAndMatch
