"""LoRA: a low-rank delta beside a weight.  Hu et al. 2021, arXiv:2106.09685.

    W' = W + s A B     A (*stack, *in, rank)   B (*stack, rank, *out)   s = alpha / rank

A is Gaussian and B zero, so the model starts as its base.  Nothing of W's size is made:
wherever the model consumes W, the delta acts as two small contractions.
Rank-stabilised scaling, s = alpha / sqrt(rank), is Kalajdzievski 2023,
arXiv:2312.03732.

Where we depart from the paper: the delta works on any weight with an input and an
output axis (embeddings, convolutions, experts, projections of several axes), not on
attention matrices only.  On a tied table it moves the head as well as the embedding.

PiSSA (Meng et al. 2024, arXiv:2404.02948) and OLoRA (Buyukakyuz 2024, arXiv:2406.01775)
take A's and B's first values A0, B0 from W itself and train on from there:

    W' = (W - s A0 B0) + s A B = W + s (A B - A0 B0)

Where we depart from those papers: W is not overwritten by its residual, A0 and B0 are
kept beside A and B.  So the base stays the base, for `unload`, for other adapters and
for the checkpoint, and the start is the base bit for bit in every dtype.  The price is
a second pair of factors, which do not train.  Dropout acts on the whole delta, not on
A B alone, whose start is most of the weight.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from jpeft.adapt.labels import R
from jpeft.attach import Ranked
from jpeft.checks import Rate
from jpeft.leaf import (
    adapted_leaf,
    frozen,
    is_leaf,
    is_stored,
    shapes_beside,
    static,
    trainable,
)
from jpeft.leaves import first_factors
from jpeft.leaves.draw import filled
from jpeft.leaves.low_rank import ActsAsLowRank, LowRank
from jpeft.transform import method
from jpeft.tree.layout import CONV, EMBEDDING, LeafUse

# --- the leaf of a delta that does not start at zero ---------------------------------


@adapted_leaf
class ShiftedLowRank(ActsAsLowRank):
    """W + scale * (A.B - A0.B0), where A and B started at A0 and B0.

    a, b, scale, dropout: as `LowRank`'s; a0, b0 have the shapes of a and b.
    """

    a: Any = trainable("sir")
    b: Any = trainable("sro", off=0)
    a0: Any = frozen("sir")
    b0: Any = frozen("sro", off=0)
    scale: float = static(default=1.0)
    dropout: float = static(default=0.0)

    @property
    def rank(self) -> int:
        return self.b.shape[self.labels()["b"].index(R)]

    def as_low_rank(self) -> LowRank:
        """The same delta as one product of twice the rank, [A - A0, A0] [B; B - B0].

        This way of writing A.B - A0.B0 subtracts nothing large from anything large: it
        is exactly zero at the start, and what is cast to bfloat16 later is the change.
        """
        labels = self.labels()
        join = lambda x, y, n: jnp.concatenate([x, y], labels[n].index(R))
        return LowRank(
            base=self.base,
            axes=self.axes,
            a=join(self.a - self.a0, self.a0, "a"),
            b=join(self.b, self.b - self.b0, "b"),
            scale=self.scale,
            dropout=self.dropout,
            origin=self.origin,
            path=self.path,
            key=self.key,
        )


# --- the method ----------------------------------------------------------------------


Init = Annotated[str, first_factors.check_init]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRankMethod(Ranked):
    """A method whose delta is s A B; see `lora` for the fields."""

    rank_stabilized: bool = False
    dropout: Rate = 0.0

    def scale_of(self, path: str) -> float:
        rank, alpha = self.rank_of(path), self.alpha_of(path)
        alpha = rank if alpha is None else alpha
        return float(alpha / (math.sqrt(rank) if self.rank_stabilized else rank))


@method("lora")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA(LowRankMethod):
    """A transform that puts a low-rank delta beside each selected weight.

        W' = W + s A B       s = alpha / rank, or alpha / sqrt(rank) if rank_stabilized

    Hu et al. 2021, arXiv:2106.09685; rank-stabilised: arXiv:2312.03732.

    rank: of the delta; from 1 to the smaller side of the matrix.
    alpha: numerator of the scale; None means the weight's rank, that is a scale of 1
        (rank_stabilized: of sqrt(rank)).
    where, exclude: which weights; see `jpeft.tree.where`.
    dropout: rate on the activations that enter A, drawn where `adapt` is given a key.
    init: "gaussian": A ~ N(0, 1/in) (N(0, 1) for embeddings, whose input is one row),
        B zero.  "kaiming": A uniform with variance 1/(3 in), B zero.  "pissa": the
        leading singular vectors of the weight; "pissa_niter_4" finds them by 4 rounds
        of a randomised method, much faster for large matrices.  "olora": the first
        columns of its QR decomposition.  The last three need the plain weight, not a
        quantised one.
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

    init: Init = "gaussian"

    def _instead(self, base: Any) -> str:
        if is_stored(base):
            return (
                "over a quantised weight init='gaussian', or jpeft.loftq, which "
                "quantises and starts A and B from the error"
            )
        return "apply it to the plain array first, or use init='gaussian'"

    def attach(
        self, key: jax.Array, path: str, base: Any, use: LeafUse
    ) -> LowRank | ShiftedLowRank:
        rank = self.rank_of(path)
        check_rank(path, rank, use)
        dtype = self.adapter_dtype(base)
        assert use.axes is not None
        common: dict[str, Any] = {
            "base": base,
            "axes": use.axes,
            "scale": self.scale_of(path),
            "dropout": float(self.dropout),
        }
        if self.init in first_factors.DRAWN:
            shapes = shapes_beside(LowRank, use.shape, use.axes, r=rank)
            fan_in = 1 if use.kind == EMBEDDING else math.prod(use.sizes("i"))
            a = first_factors.draw_a(key, shapes["a"], fan_in, self.init, dtype)
            return LowRank(a=a, b=filled(shapes["b"], 0, dtype), **common)
        if is_leaf(base) or isinstance(base, jax.ShapeDtypeStruct):
            raise ValueError(
                f"{path}: init={self.init!r} takes A and B from the weight itself, and "
                f"here stands a {type(base).__name__}; {self._instead(base)}, or "
                f"exclude={path!r}"
            )
        a, b = first_factors.factors_of(
            key,
            path,
            base,
            use.axes,
            rank=rank,
            scale=self.scale_of(path),
            init=self.init,
        )
        a, b = a.astype(dtype), b.astype(dtype)
        # Copies: the step that trains A may be given its buffer.
        return ShiftedLowRank(a=a, b=b, a0=jnp.copy(a), b0=jnp.copy(b), **common)


lora = LoRA


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
