"""LoRA: a low-rank delta beside a weight.  Hu et al. 2021, arXiv:2106.09685.

    W' = W + s A B     A (*stack, *in, rank)   B (*stack, rank, *out)   s = alpha / rank

A is Gaussian and B zero, so the model starts as its base.  Nothing of W's size is made:
wherever the model consumes W, the delta acts as two small contractions.
Rank-stabilised scaling, s = alpha / sqrt(rank), is Kalajdzievski 2023,
arXiv:2312.03732.

Where we depart from the paper: the delta works on any weight with an input and an
output axis (embeddings, convolutions, experts, projections of several axes), not on
attention matrices only.  On a tied table it moves the head as well as the embedding.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jpeft.adapt.labels import R
from jpeft.methods._low_rank import LowRank
from jpeft.transform import (
    LeafMethod,
    Pattern,
    check_float,
    check_pattern,
    check_positive,
    matched,
    method,
)
from jpeft.tree.layout import CONV, EMBEDDING, LeafUse
from jpeft.tree.where import Where, check_where

INITS = ("gaussian", "kaiming")


@method("lora")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA(LeafMethod):
    """See `lora`."""

    rank: int
    alpha: float | None = None
    rank_stabilized: bool = False
    dropout: float = 0.0
    init: str = "gaussian"
    dtype: str | None = None
    rank_pattern: Pattern = ()
    alpha_pattern: Pattern = ()
    where: Where = "linear"
    exclude: Where = ()

    def __post_init__(self) -> None:
        check_positive("lora", "rank", self.rank, integer=True)
        if self.alpha is not None:
            check_positive("lora", "alpha", self.alpha)
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(
                f"lora: dropout={self.dropout!r}: expected a rate from 0 up to, not "
                "including, 1"
            )
        if self.init not in INITS:
            raise ValueError(f"lora: init={self.init!r}: expected one of {INITS}")
        check_float("lora", self.dtype)
        patterns = {
            "rank_pattern": check_pattern(
                "lora", "rank_pattern", self.rank_pattern, integer=True
            ),
            "alpha_pattern": check_pattern("lora", "alpha_pattern", self.alpha_pattern),
        }
        selection = {
            "where": check_where(self.where),
            "exclude": check_where(self.exclude, "exclude"),
        }
        for name, value in {**patterns, **selection}.items():
            object.__setattr__(self, name, value)

    def selection(self) -> tuple[Where, Where]:
        return self.where, self.exclude

    def accepts(self, use: LeafUse) -> bool:
        return use.is_weight

    def rank_of(self, path: str) -> int:
        return matched(self.rank_pattern, path, self.rank)

    def scale_of(self, path: str) -> float:
        rank = self.rank_of(path)
        alpha = matched(self.alpha_pattern, path, self.alpha)
        alpha = self.rank if alpha is None else alpha
        return float(alpha / (math.sqrt(rank) if self.rank_stabilized else rank))

    def attach(self, key: jax.Array, path: str, base: Any, use: LeafUse) -> LowRank:
        rank = self.rank_of(path)
        check_rank(path, rank, use)
        dtype = self.adapter_dtype(base)
        assert use.axes is not None
        shapes = factor_shapes(use.shape, use.axes, rank)
        fan_in = 1 if use.kind == EMBEDDING else math.prod(use.sizes("i"))
        return LowRank(
            base=base,
            axes=use.axes,
            a=init_a(key, shapes["a"], fan_in, self.init, dtype),
            b=jnp.zeros(shapes["b"], dtype),
            scale=self.scale_of(path),
            dropout=float(self.dropout),
        )


def lora(
    rank: int,
    alpha: float | None = None,
    *,
    where: Where = "linear",
    exclude: Where = (),
    rank_stabilized: bool = False,
    dropout: float = 0.0,
    init: str = "gaussian",
    dtype: Any = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
) -> LoRA:
    """A transform that puts a low-rank delta beside each selected weight.

        W' = W + s A B       s = alpha / rank, or alpha / sqrt(rank) if rank_stabilized

    Hu et al. 2021, arXiv:2106.09685; rank-stabilised: arXiv:2312.03732.

    rank: of the delta; from 1 to the smaller side of the matrix.
    alpha: numerator of the scale; None means `rank`, that is a scale of 1.
    where, exclude: which weights; see `jpeft.tree.where`.
    dropout: rate on the activations that enter A, drawn where `adapt` is given a key.
    init: of A; "gaussian" N(0, 1/in) (N(0, 1) for embeddings, whose input is one row)
    or
        "kaiming", uniform with variance 1/(3 in).  B is zero.
    dtype: of A and B; None means float32, or float64 beside float64.
    rank_pattern, alpha_pattern: {regular expression for the whole path: value}.

    Raises ValueError for a rank below 1 or above the matrix, a selection that matches
    nothing, a weight whose axes are in doubt, that is not floating, or holds NaN.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = {"dense": {"kernel": jnp.ones((7, 5))}}
    >>> params = jpeft.lora(rank=3, alpha=6)(jax.random.key(0), params)
    >>> params["dense"]["kernel"].a.shape, params["dense"]["kernel"].b.shape
    ((7, 3), (3, 5))
    """
    return LoRA(
        rank=rank,
        alpha=alpha,
        rank_stabilized=rank_stabilized,
        dropout=dropout,
        init=init,
        dtype=None if dtype is None else jnp.dtype(dtype).name,
        rank_pattern=tuple((rank_pattern or {}).items()),
        alpha_pattern=tuple((alpha_pattern or {}).items()),
        where=where,
        exclude=exclude,
    )


def check_rank(path: str, rank: int, use: LeafUse) -> None:
    """Raises if a matrix has no room for a delta of this rank."""
    n_in, n_out = math.prod(use.sizes("i")), math.prod(use.sizes("o"))
    if rank > min(n_in, n_out):
        kind = "convolution " if use.kind == CONV else ""
        raise ValueError(
            f"{path}: rank {rank} is larger than the {kind}matrix {n_in} x {n_out} of "
            f"shape {use.shape}; use rank <= {min(n_in, n_out)} "
            f"(rank_pattern={{{path!r}: {min(n_in, n_out)}}}) or exclude={path!r}"
        )


def factor_shapes(
    shape: tuple[int, ...], axes: str, rank: int
) -> dict[str, tuple[int, ...]]:
    """Shapes of A and B beside a weight."""
    size = lambda k: rank if k == R else shape[k]  # type: ignore[index]
    return {n: tuple(map(size, k)) for n, k in LowRank.labels_of(axes).items()}


def init_a(
    key: jax.Array, shape: tuple[int, ...], fan_in: int, init: str, dtype: Any
) -> jax.Array:
    """A's first values, drawn in float32."""
    if init == "gaussian":
        x = jax.random.normal(key, shape, jnp.float32) / math.sqrt(fan_in)
    else:
        limit = 1.0 / math.sqrt(fan_in)
        x = jax.random.uniform(key, shape, jnp.float32, -limit, limit)
    return x.astype(dtype)
