"""`ScaledOutput`, `ScaledInput`: the leaves of weights rescaled by a vector, W * l.

    output:  x (W * l) = (x W) * l     l (*stack, *out)
    input:   x (W * l) = (x * l) W     l (*stack, *in)

Where a model consumes the weight, its base acts and the result or the activation is
scaled.  Where a model uses the weight transposed (a tied table), `ScaledOutput` scales
the activation and `ScaledInput` the result, so each is exact in either direction.  The
scaling is done in float32 and rounded once: beside bfloat16 activations a vector near
one would lose what it learned.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jpeft import compat
from jpeft.adapt.equations import (
    Cast,
    Convolve,
    Join,
    Label,
    LookUp,
    Move,
    Negate,
    Pad,
    Product,
    Route,
    Scale,
    Sum,
    align,
    smaller_as_value,
)
from jpeft.adapt.interpreter import Interpreter, acts, contracts
from jpeft.adapt.labels import Labelled, moved
from jpeft.leaf import (
    Sharing,
    adapted_leaf,
    is_carried,
    is_leaf,
    labels_of,
    static,
    trainable,
    wide_dtype,
)

# --- the leaves ----------------------------------------------------------------------


@adapted_leaf
class Scaled(Labelled, Sharing):
    """W * scale, where scale has some of W's axes.

    link: the name under which a bias beside the weight borrows the vector, or "".
    """

    scale: Any = trainable(off=1)
    link: str = static(default="")

    def effective(self, w: jax.Array) -> jax.Array:
        every = list(range(self.ndim))
        return w * spread(self.scale, self.labels()["scale"], every).astype(w.dtype)

    def lends(self) -> Mapping[str, Any] | None:
        return {self.link: self.scale} if self.link else None

    def borrow(self, lent: Mapping[str, Any]) -> Self:
        # Trap: names that differ from layer to layer make each layer its own program.
        return self.replace(link="")

    def wide_labels(self) -> set[Label]:
        """The vector's axes along which it may vary."""
        return {k for k in self.labels()["scale"] if self.shape[k] > 1}  # type: ignore[index]


@adapted_leaf
class ScaledOutput(Scaled):
    """scale: (*stack, *out)."""

    scale: Any = trainable("so", off=1)


@adapted_leaf
class ScaledInput(Scaled):
    """scale: (*stack, *in)."""

    scale: Any = trainable("si", off=1)


# --- rules: where a model consumes the weight ----------------------------------------


@contracts(kind=Scaled, two=smaller_as_value)
def _contract(it: Interpreter, at: Product) -> Any:
    leaf, x = at.leaf, at.x
    labels, varies = leaf.labels()["scale"], leaf.wide_labels()
    if varies <= set(at.out):
        return times(it.base(at.eqn, at.ins()), spread(leaf.scale, labels, at.out))
    if varies <= set(at.xl):
        if jnp.dtype(x.dtype).itemsize < jnp.dtype(leaf.dtype).itemsize:
            x = x.astype(leaf.dtype)  # int8 or bfloat16 beside a wider weight
        x = times(x, spread(leaf.scale, labels, at.xl))
        return it.base(at.eqn, at.ins(x=x))
    return None  # one of its axes is contracted and another one is not


@acts(Convolve, kind=Scaled)
def _conv(it: Interpreter, conv: Convolve, ins: list[Any]) -> Any:
    x, leaf = ins
    if is_leaf(x) or not is_leaf(leaf):
        return None
    numbers, varies = conv.numbers, leaf.wide_labels()
    labels, out, channel = leaf.labels()["scale"], conv.out, conv.channel
    if varies <= {out}:
        wanted: list[Label] = [None] * len(numbers.out_spec)
        wanted[numbers.out_spec[1]] = out
        return times(it.base(conv.eqn, ins), spread(leaf.scale, labels, wanted))
    if varies <= {channel} and conv.groups == (1, 1):
        wanted = [None] * len(numbers.lhs_spec)
        wanted[numbers.lhs_spec[1]] = channel
        x = times(x, spread(leaf.scale, labels, wanted))
        return it.base(conv.eqn, [x, leaf])
    return None


@acts(LookUp, kind=Scaled)
def _look_up(it: Interpreter, at: LookUp, ins: list[Any]) -> Any:
    """The same rows of the vector, beside those of the weight."""
    leaf, indices = ins
    if is_leaf(indices) or not is_leaf(leaf):
        return None
    out = at.out
    s, sl = at.done_to(leaf.scale, leaf.labels()["scale"], indices, fill=1)
    y = it.base(at.eqn, ins)
    if not is_leaf(y):
        scale = spread(s, sl, out)
        inside = _inside(leaf, at, indices)
        if inside is not None:
            inside = spread(inside, at.rows, out)
            scale = jnp.where(inside > 0, scale, jnp.ones_like(scale))
        return times(y, scale)
    axes = "".join("s" if isinstance(k, tuple) else leaf.axes[k] for k in out)  # type: ignore[index]
    wanted = labels_of(type(leaf), axes)["scale"]
    place = {k: n for n, k in enumerate(out)}
    s = spread(s, [place[k] for k in sl], wanted)
    sizes = [at.eqn.outvars[0].aval.shape[k] for k in wanted]  # type: ignore[index]
    return leaf.replace(base=y, axes=axes, scale=jnp.broadcast_to(s, sizes))


def _inside(leaf: Scaled, at: LookUp, indices: jax.Array) -> jax.Array | None:
    """1 for each row in range, 0 for one out of range.

    For lookups that fill rows out of range with a number, which must not be scaled.
    """
    p, fill = at.eqn.params, at.eqn.params["fill_value"]
    is_nan = fill is None or np.isnan(fill)
    if p["mode"] != lax.GatherScatterMode.FILL_OR_DROP or is_nan:
        return None
    looked_up = {*at.numbers.start_index_map, *at.batching}
    only = lambda sizes: [n if k in looked_up else 1 for k, n in enumerate(sizes)]
    one = LookUp(at.eqn.replace(params={**p, "slice_sizes": only(at.sizes)}))
    every: list[Label] = list(range(leaf.ndim))
    found, labels = one.done_to(jnp.ones(only(leaf.shape), jnp.float32), every, indices)
    return jnp.min(found, [n for n, k in enumerate(labels) if k not in at.rows])


@acts(Route, kind=Scaled)
def _route(it: Interpreter, at: Route, ins: list[Any]) -> Any:
    """Experts on sorted tokens: each token's row is scaled by its expert's vector."""
    x, leaf, *sizes = ins
    axes = at.axes()
    if is_leaf(x) or not is_leaf(leaf) or axes is None:
        return None
    g, i, o, token = axes
    each = lambda axis: jnp.repeat(
        jnp.broadcast_to(
            spread(leaf.scale, leaf.labels()["scale"], [g, axis]),
            (leaf.shape[g], leaf.shape[axis]),
        ),
        *sizes,
        axis=0,
        total_repeat_length=x.shape[token],
    )
    varies = leaf.wide_labels()
    if varies <= {g, o}:
        return times(it.base(at.eqn, ins), each(o))
    if varies <= {g, i}:
        scale = each(i) if token == 0 else each(i).T
        return it.base(at.eqn, [times(x, scale), leaf, *sizes])
    return None


# --- rules: what happens to the weight before it is consumed -------------------------


@acts(Scale, Negate, kind=Scaled)
def _below(it: Interpreter, by: Scale | Negate, ins: list[Any]) -> Any:
    """Scales the base, where an equation scales the weight."""
    leaves = list(filter(is_leaf, ins))
    if len(leaves) > 1 or by.eqn.outvars[0].aval.shape != leaves[0].shape:
        return None
    if isinstance(by, Scale) and by.divides and is_leaf(ins[1]):
        return None
    return leaves[0].replace(base=it.base(by.eqn, ins))


@acts(Cast, kind=Scaled)
def _cast(it: Interpreter, cast: Cast, ins: list[Any]) -> Any:
    if not jnp.issubdtype(cast.dtype, jnp.floating):
        return None
    # The vector stays as precise as it is.
    return ins[0].replace(base=it.base(cast.eqn, ins))


@acts(Move, kind=Scaled)
def _moved(it: Interpreter, move: Move, ins: list[Any]) -> Any:
    if move.step is Pad and is_leaf(ins[0]):
        others = set(move.along) - set(ins[0].labels()["scale"])
        if others and not _is_zero(move.eqn.invars[1]):
            return None  # what is put beside the weight would be rescaled with it
    return moved(it, move, ins, fill=1)


def _is_zero(var: Any) -> bool:
    return isinstance(var, compat.Literal) and not np.any(var.val)


@acts(Sum, kind=Scaled)
def _sum(it: Interpreter, over: Sum, ins: list[Any]) -> Any:
    """jnp.einsum first sums an axis that only the weight has."""
    leaf, gone = ins[0], over.axes
    if leaf.wide_labels() & set(gone):
        return None
    axes = "".join(c for k, c in enumerate(leaf.axes) if k not in gone)
    return leaf.move(
        it.base(over.eqn, ins),
        lambda x, old, _: lax.squeeze(x, [old.index(k) for k in old if k in gone]),
        axes,
    )


@acts(Join, kind=Scaled, joins=True)
def _join(it: Interpreter, join: Join, ins: list[Any]) -> Any:
    """Joins weights to a stack, or along an axis that the vector has.

    A weight without a vector gets one of ones."""
    axis, leaves = join.axis, [x for x in ins if isinstance(x, Scaled)]
    first, axes = leaves[0], leaves[0].axes
    if any(type(x) is not type(first) or x.axes != axes for x in leaves):
        return None
    labels = first.labels()["scale"]
    if not join.new and axis not in labels:
        return None

    def scale(x: Any) -> jax.Array:
        if isinstance(x, Scaled):
            return x.scale
        return jnp.ones([x.shape[k] for k in labels], first.scale.dtype)  # type: ignore[index]

    scales = list(map(scale, ins))
    if join.new:
        axes = axes[:axis] + "s" + axes[axis:]
        moved = [k if k < axis else k + 1 for k in labels]  # type: ignore[operator]
        wanted = labels_of(type(first), axes)["scale"]
        whole = align(jnp.stack(scales), [axis, *moved], wanted)
    else:
        whole = jnp.concatenate(scales, labels.index(axis))
    base = it.base(join.eqn, ins, kind=Scaled)
    return first.replace(base=base, axes=axes, scale=whole)


# --- the mathematics -----------------------------------------------------------------


def spread(
    scale: Float[Array, "..."], labels: Sequence[Label], wanted: Sequence[Label]
) -> Float[Array, "..."]:
    """The vector shaped to scale an array whose axes are `wanted`.

    A label that is not wanted has size 1.
    """
    gone = [n for n, k in enumerate(labels) if k not in wanted]
    left = [k for k in labels if k in wanted]
    x = align(lax.squeeze(scale, gone), left, [k for k in wanted if k in left])
    sizes = dict(zip([k for k in wanted if k in left], x.shape, strict=True))
    return x.reshape([sizes.get(k, 1) for k in wanted])


def times(y: Float[Array, "..."], scale: Float[Array, "..."]) -> Float[Array, "..."]:
    """y * scale, multiplied in the wider of the two dtypes and rounded to y's."""
    if is_carried(y):
        return y.on_value(lambda v: times(v, scale))  # type: ignore[attr-defined]
    if y.dtype == scale.dtype:
        return y * scale
    return _times(y, scale)


@functools.partial(jax.checkpoint, prevent_cse=False)
def _times(y: Float[Array, "..."], scale: Float[Array, "..."]) -> Float[Array, "..."]:
    """Kept for the backward pass: y as it is, not widened."""
    wide = wide_dtype(max(y.dtype, scale.dtype, key=lambda dtype: dtype.itemsize))
    return (y.astype(wide) * scale.astype(wide)).astype(y.dtype)
