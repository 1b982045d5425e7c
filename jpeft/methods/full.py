"""Full fine-tuning of chosen leaves: new heads, norms, whatever must train whole.

    W' = value        value starts as W, and W is kept for `unload`

The value trains, not a delta to it, so weight decay and the optimiser see what they
would see without jpeft.  Where the base is not float32, the value is: small steps would
vanish in bfloat16.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jpeft.attach import LeafMethod
from jpeft.checks import Floating
from jpeft.leaf import AdaptedLeaf, adapted_leaf, is_leaf, trainable
from jpeft.transform import method
from jpeft.tree.layout import LeafUse
from jpeft.tree.where import Where


@adapted_leaf
class Whole(AdaptedLeaf):
    """value: the weight that is used, of the base's shape."""

    value: Any = trainable("*", off="base")

    is_value: ClassVar[bool] = True
    replaces_base: ClassVar[bool] = True

    def effective(self, w: jax.Array) -> jax.Array:
        return jnp.asarray(self.value)


@method("full")
@dataclasses.dataclass(frozen=True)
class Full(LeafMethod):
    """A transform that makes the selected leaves train whole.

    where, exclude: which leaves, any floating-point array; see `jpeft.tree.where`.
    dtype: of the trained value; None means float32, or float64 beside float64.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = {"classifier": {"kernel": jnp.ones((7, 2)), "bias": jnp.zeros(2)}}
    >>> params = jpeft.full("classifier/.*")(jax.random.key(0), params)
    >>> jpeft.count(params).trainable
    16
    """

    where: Where
    _: dataclasses.KW_ONLY
    exclude: Where = ()
    dtype: Floating | None = None

    needs_axes: ClassVar[bool] = False

    def selection(self) -> tuple[Where, Where]:
        return self.where, self.exclude

    def accepts(self, use: LeafUse) -> bool:
        return True

    def attach(self, key: jax.Array, path: str, base: Any, use: LeafUse) -> Whole:
        if is_leaf(base):
            raise ValueError(
                f"{path}: already carries {type(base).__name__}; a weight "
                "trains either whole or through an adapter: "
                f"exclude={path!r} in one of the two"
            )
        # Not the base's own buffer: a training step may donate the one and not the
        # other.
        value = jnp.array(base, dtype=self.adapter_dtype(base), copy=True)
        return Whole(base=base, value=value)


full = Full
