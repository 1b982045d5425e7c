"""BitFit: only biases train.  Ben Zaken et al. 2021, arXiv:2106.10199.

    b' = b + delta                        on every bias the model has
    y' = x W + bias                       on request, where it has none

delta and bias start at zero, so the model starts as its base.

Where we depart from the paper: the frozen bias is kept and a delta trains, so that one
base serves many tasks; and a bias can be given to projections that have none (as in
Llama), which cannot be merged into the weights of such a model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp

from jpeft.adapt.equations import Product, align
from jpeft.adapt.interpreter import Interpreter, contracts
from jpeft.adapt.labels import Labelled
from jpeft.attach import LeafMethod
from jpeft.checks import Floating
from jpeft.leaf import (
    AdaptedLeaf,
    adapted_leaf,
    shapes_beside,
    trainable,
)
from jpeft.leaves.draw import filled
from jpeft.transform import method
from jpeft.tree.layout import BIAS, LINEAR, MATRIX, LeafUse
from jpeft.tree.paths import Slots
from jpeft.tree.where import Where, check_where_or_nothing


@adapted_leaf
class Delta(AdaptedLeaf):
    """base + delta.  delta: of the base's shape."""

    delta: Any = trainable("*", off=0)

    is_value: ClassVar[bool] = True

    def effective(self, w: jax.Array) -> jax.Array:
        return w + jnp.asarray(self.delta).astype(w.dtype)


@adapted_leaf
class AddedBias(Labelled):
    """A bias on the output of a weight that has none.  bias: (*stack, *out)."""

    bias: Any = trainable("so", off=0)


@contracts(kind=AddedBias)
def _contract(it: Interpreter, at: Product) -> Any:
    leaf, out = at.leaf, at.out
    labels = leaf.labels()["bias"]
    inputs = [k for k, c in enumerate(leaf.axes) if c == "i" and leaf.shape[k] > 1]
    if not set(labels) <= set(out) or set(inputs) & set(out):
        return None  # used the other way round: there is no output to add to
    y = it.base(at.eqn, at.ins())
    order = [k for k in out if k in labels]
    bias = align(leaf.bias, labels, order)
    shape = [leaf.shape[k] if k in labels else 1 for k in out]  # type: ignore[index]
    return y + bias.reshape(shape).astype(y.dtype)


def check_existing(method: str, name: str, where: Any) -> Any:
    """None, no bias that the model has, is kept as (): a recipe has no None."""
    return check_where_or_nothing(method, name, () if where is None else where)


@method("bitfit")
@dataclasses.dataclass(frozen=True, kw_only=True)
class BitFit(LeafMethod):
    """A transform that trains the model's biases, and on request adds some.

    Ben Zaken et al. 2021, arXiv:2106.10199.

    where: which of the model's biases; None for none of them.
    add: weights without a bias that get one, such as "linear"; such a bias has no place
        in the model, so `merge` refuses it.
    exclude: what neither touches.  dtype: of the deltas; None means float32.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = {"dense": {"kernel": jnp.ones((7, 5)), "bias": jnp.zeros(5)}}
    >>> params = jpeft.bitfit()(jax.random.key(0), params)
    >>> jpeft.count(params)
    Count(trainable=5, frozen=40)
    """

    where: Annotated[Any, check_existing] = "bias"
    add: Where | None = None
    exclude: Where = ()
    dtype: Floating | None = None

    needs_axes: ClassVar[bool] = False
    otherwise: ClassVar[str] = (
        "jpeft.bitfit(where=None, add='linear') gives projections a bias"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.where == () and self.add is None:
            raise ValueError(
                "bitfit: where=None and add=None leave nothing to train; where= "
                "selects biases the model has, add= weights that get one"
            )

    def selection(self) -> tuple[Where, Where]:
        return self.where, self.exclude

    def accepts(self, use: LeafUse) -> bool:
        return use.kind == BIAS

    def attach(self, key: jax.Array, path: str, base: Any, use: LeafUse) -> AdaptedLeaf:
        return Delta(base=base, delta=filled(use.shape, 0, self.adapter_dtype(base)))

    def targets(
        self, flat: Slots, uses: Mapping[str, LeafUse] | None
    ) -> dict[str, LeafUse]:
        if self.where == ():
            return {}
        return super().targets(flat, uses)

    def __call__(
        self, key: jax.Array, params: Any, *, uses: Mapping[str, LeafUse] | None = None
    ) -> Any:
        params = super().__call__(key, params, uses=uses)
        return params if self.add is None else self._added()(key, params, uses=uses)

    def origins(self) -> frozenset[str]:
        own = super().origins()
        return own if self.add is None else own | self._added().origins()

    def _added(self) -> _AddBias:
        assert self.add is not None
        return _AddBias(where=self.add, exclude=self.exclude, dtype=self.dtype)


bitfit = BitFit


@dataclasses.dataclass(frozen=True, kw_only=True)
class _AddBias(LeafMethod):
    """The second half of `bitfit(add=...)`."""

    where: Where
    exclude: Where
    dtype: str | None

    name: ClassVar[str] = "bitfit"
    has_value: ClassVar[bool] = False

    def selection(self) -> tuple[Where, Where]:
        return self.where, self.exclude

    def accepts(self, use: LeafUse) -> bool:
        return use.kind in (LINEAR, MATRIX) and not use.tied

    def targets(
        self, flat: Slots, uses: Mapping[str, LeafUse] | None
    ) -> dict[str, LeafUse]:
        found = super().targets(flat, uses)
        bare = {p: u for p, u in found.items() if u.bias is None}
        if not bare:
            raise ValueError(
                f"bitfit: every weight of add={self.where!r} has a bias already; "
                "add= is for projections without one"
            )
        return bare

    def attach(self, key: jax.Array, path: str, base: Any, use: LeafUse) -> AddedBias:
        assert use.axes is not None
        shape = shapes_beside(AddedBias, use.shape, use.axes)["bias"]
        bias = filled(shape, 0, self.adapter_dtype(base))
        return AddedBias(base=base, axes=use.axes, bias=bias)
