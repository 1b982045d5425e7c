"""`ScaledOutput`, `ScaledInput`: the leaves of weights rescaled by a vector, W * l.

    output:  x (W * l) = (x W) * l     l (*stack, *out)
    input:   x (W * l) = (x * l) W     l (*stack, *in)

Where a model consumes the weight, its base acts and the result or the activation is
scaled.  Used the other way round (a tied table) the two change places, so either leaf
is exact in either direction.  The scaling is done in float32 and rounded once: beside
bfloat16 activations a vector near one would lose what it learned.
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
from jpeft.adapt.interpreter import Interpreter, rule
from jpeft.adapt.labels import Label, Labelled, align, operand_labels
from jpeft.leaf import (
    Sharing,
    adapted_leaf,
    is_carried,
    is_leaf,
    static,
    trainable,
    wide_dtype,
)
from jpeft.methods._low_rank import gather_factor

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
        # Names that differ from layer to layer would make each layer its own program.
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


@rule("dot_general", kind=Scaled)
def _dot_general(it: Interpreter, eqn: Any, ins: list[Any]) -> Any:
    if all(map(is_leaf, ins)):
        # Two adapted weights meet: the smaller one is this equation's activation.
        k = 0 if ins[0].size <= ins[1].size else 1
        ins = [x.materialize() if j == k else x for j, x in enumerate(ins)]
        return it.bind(eqn, ins)
    side = 0 if is_leaf(ins[0]) else 1
    leaf, x = ins[side], ins[1 - side]
    xl, out = operand_labels(eqn, side, leaf.ndim, jnp.ndim(x))
    labels, varies = leaf.labels()["scale"], leaf.wide_labels()
    if varies <= set(out):
        return times(it.base(eqn, ins), spread(leaf.scale, labels, out))
    if varies <= set(xl):
        if jnp.dtype(x.dtype).itemsize < jnp.dtype(leaf.dtype).itemsize:
            x = x.astype(leaf.dtype)  # int8 or bfloat16 beside a wider weight
        x = times(x, spread(leaf.scale, labels, xl))
        return it.base(eqn, [x if j != side else leaf for j in (0, 1)])
    return None  # one of its axes is contracted and another one is not


@rule("conv_general_dilated", kind=Scaled)
def _conv(it: Interpreter, eqn: Any, ins: list[Any]) -> Any:
    x, leaf = ins
    if is_leaf(x) or not is_leaf(leaf):
        return None
    numbers, varies = eqn.params["dimension_numbers"], leaf.wide_labels()
    labels = leaf.labels()["scale"]
    out, channel, *_ = numbers.rhs_spec
    one_group = (eqn.params["feature_group_count"], eqn.params["batch_group_count"])
    if varies <= {out}:
        wanted: list[Label] = [None] * len(numbers.out_spec)
        wanted[numbers.out_spec[1]] = out
        return times(it.base(eqn, ins), spread(leaf.scale, labels, wanted))
    if varies <= {channel} and one_group == (1, 1):
        wanted = [None] * len(numbers.lhs_spec)
        wanted[numbers.lhs_spec[1]] = channel
        return it.base(eqn, [times(x, spread(leaf.scale, labels, wanted)), leaf])
    return None


@rule("gather", kind=Scaled)
def _gather(it: Interpreter, eqn: Any, ins: list[Any]) -> Any:
    """The same rows of the vector, beside those of the weight."""
    leaf, indices = ins
    if is_leaf(indices) or not is_leaf(leaf):
        return None
    p, numbers = eqn.params, eqn.params["dimension_numbers"]
    batching = dict(
        zip(
            numbers.operand_batching_dims,
            numbers.start_indices_batching_dims,
            strict=True,
        )
    )
    collapsed = {*numbers.collapsed_slice_dims, *batching}
    each_kept = iter(k for k in range(leaf.ndim) if k not in collapsed)
    rows: list[Label] = [("n", k) for k in range(jnp.ndim(indices) - 1)]
    each_row = iter(rows)
    out = [
        next(each_kept) if k in numbers.offset_dims else next(each_row)
        for k in range(len(eqn.outvars[0].aval.shape))
    ]
    labels = leaf.labels()["scale"]
    s, sl = gather_factor(p, leaf.scale, labels, indices, rows, batching, fill=1)
    y = it.base(eqn, ins)
    if not is_leaf(y):
        scale = spread(s, sl, out)
        inside = _inside(leaf, p, indices, rows, batching)
        if inside is not None:
            inside = spread(inside, rows, out)
            scale = jnp.where(inside > 0, scale, jnp.ones_like(scale))
        return times(y, scale)
    axes = "".join("s" if isinstance(k, tuple) else leaf.axes[k] for k in out)  # type: ignore[index]
    wanted = type(leaf).labels_of(axes)["scale"]
    place = {k: n for n, k in enumerate(out)}
    s = spread(s, [place[k] for k in sl], wanted)
    sizes = [eqn.outvars[0].aval.shape[k] for k in wanted]  # type: ignore[index]
    return leaf.replace(base=y, axes=axes, scale=jnp.broadcast_to(s, sizes))


def _inside(
    leaf: Scaled,
    p: Mapping[str, Any],
    indices: jax.Array,
    rows: list[Label],
    batching: dict[int, int],
) -> jax.Array | None:
    """Where rows out of range are filled with a number, which is not the weight's: one
    for each row that is in range, else zero."""
    fill = p["fill_value"]
    is_nan = fill is None or np.isnan(fill)
    if p["mode"] != lax.GatherScatterMode.FILL_OR_DROP or is_nan:
        return None
    looked_up = {*p["dimension_numbers"].start_index_map, *batching}
    only = lambda sizes: [n if k in looked_up else 1 for k, n in enumerate(sizes)]
    every: list[Label] = list(range(leaf.ndim))
    found, labels = gather_factor(
        {**p, "slice_sizes": only(p["slice_sizes"])},
        jnp.ones(only(leaf.shape), jnp.float32),
        every,
        indices,
        rows,
        batching,
    )
    return jnp.min(found, [n for n, k in enumerate(labels) if k not in rows])


@rule("ragged_dot_general", kind=Scaled)
def _ragged_dot(it: Interpreter, eqn: Any, ins: list[Any]) -> Any:
    """Experts on sorted tokens: each token's row is scaled by its expert's vector."""
    x, leaf, sizes, *_ = ins
    if is_leaf(x) or not is_leaf(leaf) or len(ins) != 3:
        return None
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    contracting, batch = numbers.dot_dimension_numbers
    group = tuple(numbers.rhs_group_dimensions)
    plain = (
        (batch, len(group), jnp.ndim(x), leaf.ndim) == (((), ()), 1, 2, 3)
        and tuple(numbers.lhs_ragged_dimensions) != tuple(contracting[0])
        and eqn.params["group_offset"] is None
    )
    if not plain:
        return None
    g, i = group[0], contracting[1][0]
    o = next(k for k in range(3) if k not in (g, i))
    token = 1 - contracting[0][0]
    n = x.shape[token]
    each = lambda axis: jnp.repeat(
        jnp.broadcast_to(
            spread(leaf.scale, leaf.labels()["scale"], [g, axis]),
            (leaf.shape[g], leaf.shape[axis]),
        ),
        sizes,
        axis=0,
        total_repeat_length=n,
    )
    varies = leaf.wide_labels()
    if varies <= {g, o}:
        return times(it.base(eqn, ins), each(o))
    if varies <= {g, i}:
        scale = each(i) if token == 0 else each(i).T
        return it.base(eqn, [times(x, scale), leaf, sizes])
    return None


# --- rules: what happens to the weight before it is consumed -------------------------


@rule("mul", "div", "neg", kind=Scaled)
def _below(it: Interpreter, eqn: Any, ins: list[Any]) -> Any:
    """What scales the weight scales its base."""
    leaves = list(filter(is_leaf, ins))
    if len(leaves) > 1 or eqn.outvars[0].aval.shape != leaves[0].shape:
        return None
    if eqn.primitive.name == "div" and is_leaf(ins[1]):
        return None
    return leaves[0].replace(base=it.base(eqn, ins))


@rule("convert_element_type", kind=Scaled)
def _convert(it: Interpreter, eqn: Any, ins: list[Any]) -> Any:
    if not jnp.issubdtype(eqn.params["new_dtype"], jnp.floating):
        return None
    return ins[0].replace(
        base=it.base(eqn, ins)
    )  # the vector stays as precise as it is


@rule("pad", kind=Scaled)
def _pad(it: Interpreter, eqn: Any, ins: list[Any]) -> Any:
    leaf, value = ins
    if not is_leaf(leaf) or is_leaf(value):
        return None
    config = eqn.params["padding_config"]
    others = [k for k in range(leaf.ndim) if k not in leaf.labels()["scale"]]
    if any(config[k] != (0, 0, 0) for k in others) and not _is_zero(eqn.invars[1]):
        return None  # what is put beside the weight would be rescaled with it

    def f(x: jax.Array, old: list[Label], _: list[Label]) -> jax.Array:
        rows = [config[k] for k in old]  # type: ignore[index]
        return lax.pad(x, jnp.ones((), x.dtype), rows)

    return leaf.move(it.base(eqn, ins), f)


def _is_zero(var: Any) -> bool:
    return isinstance(var, compat.Literal) and not np.any(var.val)


@rule("reduce_sum", kind=Scaled)
def _reduce_sum(it: Interpreter, eqn: Any, ins: list[Any]) -> Any:
    """jnp.einsum sums a lone axis of the weight before the product."""
    leaf, gone = ins[0], eqn.params["axes"]
    if leaf.wide_labels() & set(gone):
        return None
    axes = "".join(c for k, c in enumerate(leaf.axes) if k not in gone)
    return leaf.move(
        it.base(eqn, ins),
        lambda x, old, _: lax.squeeze(x, [old.index(k) for k in old if k in gone]),
        axes,
    )


@rule("concatenate", kind=Scaled, joins=True)
def _concatenate(it: Interpreter, eqn: Any, ins: list[Any]) -> Any:
    """Weights side by side along an axis that the vector has; others get ones."""
    axis = eqn.params["dimension"]
    leaves = [x for x in ins if isinstance(x, Scaled)]
    first = leaves[0]
    if any(type(x) is not type(first) or x.axes != first.axes for x in leaves):
        return None
    labels = first.labels()["scale"]
    if axis not in labels:
        return None

    def scale(x: Any) -> jax.Array:
        if isinstance(x, Scaled):
            return x.scale
        return jnp.ones([x.shape[k] for k in labels], first.scale.dtype)  # type: ignore[index]

    whole = jnp.concatenate(list(map(scale, ins)), labels.index(axis))
    return first.replace(base=it.base(eqn, ins, kind=Scaled), scale=whole)


@rule("stack", kind=Scaled, joins=True)
def _stack(it: Interpreter, eqn: Any, ins: list[Any]) -> Any:
    """`jnp.stack`, a primitive since jax 0.10: weights become a stack."""
    axis = eqn.params.get("axis", eqn.params.get("dimension"))
    leaves = [x for x in ins if isinstance(x, Scaled)]
    first = leaves[0]
    if axis is None or any(
        type(x) is not type(first) or x.axes != first.axes for x in leaves
    ):
        return None
    axes = first.axes[:axis] + "s" + first.axes[axis:]
    labels = first.labels()["scale"]
    moved = [k if k < axis else k + 1 for k in labels]  # type: ignore[operator]
    ones = jnp.ones_like(first.scale)
    whole = jnp.stack([x.scale if isinstance(x, Scaled) else ones for x in ins])
    scale = align(whole, [axis, *moved], type(first).labels_of(axes)["scale"])
    return first.replace(base=it.base(eqn, ins, kind=Scaled), axes=axes, scale=scale)


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
