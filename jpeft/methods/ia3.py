"""IA3: learned vectors rescale activations.  Liu et al. 2022, arXiv:2205.05638.

    k' = l_k * k      v' = l_v * v      l (*stack, *out)   keys and values
    y = (l_ff * h) W                    l (*stack, *in)    h enters the last FFN weight

Every l starts at one, so the model starts as its base.  A vector stands beside a
weight: those of keys and values scale its output, that of the feed-forward its input.
All of it merges into the weights.

    k = x W + b      k' = x (W * l) + b * l

So the bias beside a rescaled output is rescaled by the same vector, which trains once,
at the weight.

Where we depart from the paper: a projection that makes queries, keys and values in one
is rescaled whole, as Hugging Face PEFT does.  Rescaled queries add nothing that
rescaled keys could not do (rotary positions and shared keys apart), since only their
products count.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from jpeft.attach import LeafMethod
from jpeft.checks import Floating
from jpeft.leaf import (
    AdaptedLeaf,
    Sharing,
    adapted_leaf,
    shapes_beside,
    static,
    transient,
    whose,
    wide_dtype,
)
from jpeft.leaves.draw import filled
from jpeft.leaves.scaled import ScaledInput, ScaledOutput
from jpeft.transform import Transform, method
from jpeft.tree.layout import BIAS, CONV, LINEAR, MATRIX, LeafUse, layouts
from jpeft.tree.paths import Slots, slots, suggest
from jpeft.tree.sublayers import MLP, SubLayer, sublayers
from jpeft.tree.where import Where, WhereOrNothing
from jpeft.types import PyTree

# --- the bias beside a rescaled weight -----------------------------------------------


@adapted_leaf
class ScaledBias(AdaptedLeaf, Sharing):
    """bias * l, with the vector of the weight beside it."""

    link: str = static()
    scale: Any = transient()

    is_value: ClassVar[bool] = True

    def borrow(self, lent: Mapping[str, Any]) -> Self:
        return self.replace(scale=lent.get(self.link), link="")

    def effective(self, w: jax.Array) -> jax.Array:
        if self.scale is None:
            raise ValueError(
                f"{whose(self)}this bias is rescaled by the vector that trains at "
                f"{self.link!r}, and that weight is not in the tree; pass both"
            )
        if jnp.shape(self.scale) != self.shape:
            raise ValueError(
                f"{whose(self)}this bias has shape {self.shape} and the outputs it is "
                f"added to {jnp.shape(self.scale)}: ia3 cannot rescale it"
            )
        return w * jnp.asarray(self.scale).astype(w.dtype)


# --- the method ----------------------------------------------------------------------


@method("ia3")
@dataclasses.dataclass(frozen=True, kw_only=True)
class IA3(Transform):
    """A transform that rescales keys, values and what enters a feed-forward's last
    weight.

        k' = l_k * k     v' = l_v * v     y = (l_ff * h) W

    Liu et al. 2022, arXiv:2205.05638.

    where: weights whose output is rescaled, the bias beside them included; None means
        the keys and values of every attention that the names show (a projection that
        makes queries as well is rescaled whole), () means none.
    feedforward: weights whose input is rescaled; None means the last weight of every
        feed-forward that the names show, () means none.
    exclude: weights that neither touches.
    dtype: of the vectors; None means float32, or float64 beside float64.

    Raises ValueError where the names do not show such weights, a selection matches
    nothing or is in both.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = {"value": {"kernel": jnp.ones((7, 5)), "bias": jnp.zeros(5)}}
    >>> ia3 = jpeft.ia3(where=".*value/kernel", feedforward=())
    >>> jpeft.count(ia3(jax.random.key(0), params)).trainable
    5
    """

    where: WhereOrNothing | None = None
    feedforward: WhereOrNothing | None = None
    exclude: Where = ()
    dtype: Floating | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.where == () and self.feedforward == ():
            raise ValueError("ia3: where=() and feedforward=() leave nothing to train")

    def __call__(
        self,
        key: jax.Array,
        params: PyTree,
        *,
        uses: Mapping[str, LeafUse] | None = None,
    ) -> PyTree:
        flat = slots(params)
        where, feedforward = self.selected(flat, uses)
        parts = {OUTPUT: where, INPUT: feedforward}
        steps = {
            part: _Rescale(whole=self, part=part, where=chosen)
            for part, chosen in parts.items()
            if chosen != ()
        }
        found = {part: step.targets(flat, uses) for part, step in steps.items()}
        if len(found) == 2 and (both := set(found[OUTPUT]) & set(found[INPUT])):
            raise ValueError(
                f"{min(both)}: ia3: selected by where=, which rescales its output, and "
                "by feedforward=, which rescales its input; choose one of the two"
            )
        if biases := beside(found.get(OUTPUT, {})):
            links = tuple((k, k) for k in biases.values())
            steps[OUTPUT] = dataclasses.replace(steps[OUTPUT], links=links)
            steps[BIAS] = _Rescale(
                whole=self,
                part=BIAS,
                where=exactly(biases),
                links=tuple(biases.items()),
            )
        for step in steps.values():
            params = step(key, params, uses=uses)
        return params

    def selected(
        self, flat: Slots, uses: Mapping[str, LeafUse] | None
    ) -> tuple[Where, Where]:
        """What rescales outputs and what rescales inputs, the defaults filled in."""
        if self.where is not None and self.feedforward is not None:
            return self.where, self.feedforward
        found = sublayers(flat, uses)
        where, feedforward = self.where, self.feedforward
        if where is None:
            parts = [s for s in found if s.kind != MLP]
            names = _named(parts, lambda s: (*s.key, *s.value))
            what = "keys and values of an attention"
            mlps = [s for s in found if s.kind == MLP and s.last]
            # Who names these is not to be told of the others next.
            alone = feedforward is None and not mlps
            where = _some(names, "where", what, "value/kernel", flat, uses, alone)
        if feedforward is None:
            parts = [s for s in found if s.kind == MLP]
            names = _named(parts, lambda s: (s.last,) if s.last else ())
            what = "last weight of a feed-forward"
            feedforward = _some(names, "feedforward", what, "down/kernel", flat, uses)
        return where, feedforward


ia3 = IA3


def _named(parts: list[SubLayer], of: Any) -> list[str]:
    for s in parts:
        if s.doubt and not of(s):
            raise ValueError(
                f"{s.path}: ia3 cannot tell which weights it means here: {s.doubt}; "
                "name the weights whose output is rescaled in where=, and those whose "
                "input is in feedforward="
            )
    return [p for s in parts for p in of(s)]


def _some(
    names: list[str],
    argument: str,
    what: str,
    like: str,
    flat: Slots,
    uses: Mapping[str, LeafUse] | None,
    alone: bool = False,
) -> Where:
    """like: how such a weight is called where the names do show it.  alone: whether no
    name shows the last weight of a feed-forward either."""
    if not names:
        known = layouts(flat, uses)
        matrices = [p for p, u in known.items() if u.kind in (LINEAR, MATRIX)]
        near = suggest(matrices or list(known), like, 1)
        as_in = f"{argument}={next(iter(near), like)!r}"
        raise ValueError(
            f"ia3: no name in this tree shows the {what}"
            + (
                ", nor the last weight of a feed-forward; name the weights of either, "
                f"with {argument}=() or feedforward=() for none, as in {as_in}, "
                "feedforward=()"
                if alone
                else f"; name the weights, as in {as_in}, or leave them out with "
                f"{argument}=()"
            )
        )
    return exactly(names)


def exactly(paths: Any) -> tuple[str, ...]:
    return tuple(map(re.escape, dict.fromkeys(paths)))


def beside(kernels: Mapping[str, LeafUse]) -> dict[str, str]:
    """bias -> kernel, for those that have one."""
    return {use.bias: path for path, use in kernels.items() if use.bias is not None}


# --- its three parts -----------------------------------------------------------------

OUTPUT, INPUT = "output", "input"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Rescale(LeafMethod):
    """Outputs, inputs, or the biases beside the outputs.

    links: path -> the name under which the vector is shared.
    """

    whole: IA3
    part: str
    where: Where
    links: tuple[tuple[str, str], ...] = ()

    name: ClassVar[str] = "ia3"

    @property
    def needs_axes(self) -> bool:  # type: ignore[override]
        return self.part != BIAS

    def origin(self) -> str:
        return self.whole.origin()

    def selection(self) -> tuple[Where, Where]:
        # A bias goes with its weight.
        return self.where, () if self.part == BIAS else self.whole.exclude

    def accepts(self, use: LeafUse) -> bool:
        if self.part == BIAS:
            return use.kind == BIAS
        return use.kind in (LINEAR, MATRIX) or (
            use.kind == CONV and self.part == OUTPUT
        )

    def adapter_dtype(self, base: Any) -> Any:
        asked = self.whole.dtype
        return wide_dtype(base.dtype) if asked is None else jnp.dtype(asked)

    def attach(self, key: jax.Array, path: str, base: Any, use: LeafUse) -> AdaptedLeaf:
        link = dict(self.links).get(path, "")
        if self.part == BIAS:
            return ScaledBias(base=base, link=link, scale=None)
        assert use.axes is not None
        kind = ScaledOutput if self.part == OUTPUT else ScaledInput
        shape = shapes_beside(kind, use.shape, use.axes)["scale"]
        scale = filled(shape, 1, self.adapter_dtype(base))
        return kind(base=base, axes=use.axes, scale=scale, link=link)
