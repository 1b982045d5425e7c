"""Norm tuning: only normalisation layers train.  Zhao et al. 2023, arXiv:2312.11420.

    scale' = scale + delta_scale      bias' = bias + delta_bias      in every norm

The deltas start at zero, so the model starts as its base.

Where we depart from the paper: the frozen scale and bias are kept and deltas train, so
that one base serves many tasks; decay then pulls towards the base, not towards zero.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax

from jpeft.attach import LeafMethod
from jpeft.checks import Floating
from jpeft.leaves.draw import filled
from jpeft.methods.bitfit import Delta
from jpeft.transform import method
from jpeft.tree.layout import NORM, LeafUse
from jpeft.tree.where import Where


@method("norm_tuning")
@dataclasses.dataclass(frozen=True, kw_only=True)
class NormTuning(LeafMethod):
    """A transform that trains the scale and bias of normalisation layers.

    Zhao et al. 2023, arXiv:2312.11420.

    where, exclude: which of them; every norm by default.
    dtype: of the deltas; None means float32, or float64 beside float64.

    Raises ValueError where the tree has no norm, by name or by `uses`.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = {"norm": {"scale": jnp.ones(7)}, "dense": {"bias": jnp.zeros(5)}}
    >>> jpeft.count(jpeft.norm_tuning()(jax.random.key(0), params))
    Count(trainable=7, frozen=12)
    """

    where: Where = "norm"
    exclude: Where = ()
    dtype: Floating | None = None

    needs_axes: ClassVar[bool] = False

    def selection(self) -> tuple[Where, Where]:
        return self.where, self.exclude

    def accepts(self, use: LeafUse) -> bool:
        return use.kind == NORM or use.of_norm

    def attach(self, key: jax.Array, path: str, base: Any, use: LeafUse) -> Delta:
        return Delta(base=base, delta=filled(use.shape, 0, self.adapter_dtype(base)))


norm_tuning = NormTuning
