"""HiRA: a weight times a low-rank matrix, element by element.  Huang et al. 2025,
OpenReview TwJrTz9cRS (ICLR).

    W' = W * (1 + s A B)     A (*stack, *in, rank)   B (*stack, rank, *out)

s = alpha / rank.  A is Gaussian and B zero, so the model starts as its base.  The delta
W * (s A B) has a rank of up to rank(W) * rank; it is no product of two narrow matrices,
so W' is made for each use of the weight and once more for the backward pass.

Where we depart from the paper: it has no s; alpha=None is a scale of 1, the paper's.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

from jpeft.adapt.equations import Negate, Scale, Verb
from jpeft.adapt.interpreter import Interpreter, acts
from jpeft.adapt.labels import factor_of
from jpeft.attach import Ranked, check_rank
from jpeft.leaf import adapted_leaf, is_leaf, shapes_beside, static, trainable
from jpeft.leaves.draw import filled
from jpeft.leaves.first_factors import draw_a
from jpeft.leaves.low_rank import low_rank_product
from jpeft.leaves.value import MadeInUse
from jpeft.transform import method
from jpeft.tree.layout import CONV, LINEAR, MATRIX, LeafUse


@adapted_leaf
class HadamardLowRank(MadeInUse):
    """W * (1 + scale * A.B)."""

    a: Any = trainable("sir")
    b: Any = trainable("sro", off=0)
    scale: float = static(default=1.0)

    def effective(self, w: jax.Array) -> jax.Array:
        delta = low_rank_product(self.a, self.b, self.axes, w.dtype)
        return w * (1 + self.scale * delta)


@acts(Scale, Negate, kind=HadamardLowRank)
def _scale(it: Interpreter, verb: Verb, ins: list[Any]) -> Any:
    """A weight that is scaled element by element may be scaled below as well."""
    if isinstance(verb, Scale) and factor_of(it, verb, ins) is None:
        return None
    leaf = next(filter(is_leaf, ins))
    return leaf.replace(base=it.base(verb.eqn, ins))


@method("hira")
@dataclasses.dataclass(frozen=True, kw_only=True)
class HiRA(Ranked):
    """A transform that multiplies each selected weight by 1 + a low-rank matrix.

        W' = W * (1 + s A B)     s = alpha / rank

    Huang et al. 2025, OpenReview TwJrTz9cRS.

    rank: of A B; from 1 to the smaller side of the matrix.
    alpha: numerator of the scale; None means `rank`, that is a scale of 1.
    where, exclude: which weights, linear ones or convolutions.
    dtype: of A and B; None means float32, or float64 beside float64.
    rank_pattern, alpha_pattern: {regular expression for the whole path: value}.

    Raises ValueError for a rank below 1 or above the matrix, and as `jpeft.lora` does.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = {"dense": {"kernel": jnp.ones((7, 5))}}
    >>> params = jpeft.hira(rank=2)(jax.random.key(0), params)
    >>> jpeft.count(params).trainable
    24
    """

    def accepts(self, use: LeafUse) -> bool:
        return use.kind in (LINEAR, MATRIX, CONV)

    def attach(self, key: jax.Array, path: str, base: Any, use: LeafUse) -> Any:
        rank, alpha = self.rank_of(path), self.alpha_of(path)
        check_rank(path, rank, use)
        assert use.axes is not None
        shapes = shapes_beside(HadamardLowRank, use.shape, use.axes, r=rank)
        dtype, fan_in = self.adapter_dtype(base), math.prod(use.sizes("i"))
        return HadamardLowRank(
            base=base,
            axes=use.axes,
            a=draw_a(key, shapes["a"], fan_in, "gaussian", dtype),
            b=filled(shapes["b"], 0, dtype),
            scale=1.0 if alpha is None else float(alpha / rank),
        )


hira = HiRA
