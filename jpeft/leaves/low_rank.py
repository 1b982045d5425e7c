"""`LowRank`: the leaf of LoRA and its kin, W + scale * A.B, and how it acts.

    x W  ->  x W + scale (x A) B     A (*stack, *in, rank)   B (*stack, rank, *out)

Where a model consumes the weight, the delta acts as two small contractions beside the
base's own.  An equation that moves the weight before that moves the factors.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Num

from jpeft import compat
from jpeft.adapt.equations import (
    Change,
    Consume,
    Convolve,
    Join,
    Label,
    LookUp,
    Negate,
    Product,
    Route,
    Scale,
    Sum,
    align,
    smaller_as_value,
)
from jpeft.adapt.interpreter import Interpreter, acts, acts_as, contracts
from jpeft.adapt.labels import (
    Labelled,
    R,
    as_matrices_here,
    contract,
    expanded,
    factor_along,
    factor_of,
    relabel,
)
from jpeft.leaf import (
    adapted_leaf,
    is_leaf,
    labels_of,
    static,
    trainable,
)
from jpeft.sharding.explicit import Places, places, places_of

# --- the leaf ------------------------------------------------------------------------


@adapted_leaf
class LowRank(Labelled):
    """W + scale * A.B, never computed unless asked for.

    a: (*stack, *in, rank); b: (*stack, rank, *out), axes in the weight's order.
    dropout: rate on the activation that enters A; active only where `adapt` has a key.
    """

    a: Any = trainable("sir")
    b: Any = trainable("sro", off=0)
    scale: float = static(default=1.0)
    dropout: float = static(default=0.0)

    @property
    def rank(self) -> int:
        return self.b.shape[self.labels()["b"].index(R)]

    def effective(self, w: jax.Array) -> jax.Array:
        return w + self.scale * low_rank_product(self.a, self.b, self.axes, w.dtype)


@adapted_leaf
class ActsAsLowRank(Labelled):
    """A leaf whose delta is one product, made of other arrays than a `LowRank`'s.

    Equations that move the weight move these arrays.  Where the weight is consumed,
    changed or joined, the leaf acts as the `LowRank` that it makes.
    """

    def as_low_rank(self) -> LowRank:
        raise NotImplementedError

    def effective(self, w: jax.Array) -> jax.Array:
        return self.as_low_rank().effective(w)


def as_low_rank(ins: Sequence[Any]) -> list[Any]:
    return [x.as_low_rank() if isinstance(x, ActsAsLowRank) else x for x in ins]


acts_as("as_low_rank", Consume, Change, Join, kind=ActsAsLowRank)


# --- rules: where a model consumes the weight ----------------------------------------


@contracts(kind=LowRank, two=smaller_as_value)
def _contract(it: Interpreter, at: Product) -> Any:
    x = dropped(at.leaf, at.x)
    return it.with_delta(at, through(at.leaf, x, at.xl, at.out, **at.options))


@acts(Convolve, kind=LowRank)
def _conv(it: Interpreter, conv: Convolve, ins: list[Any]) -> Any:
    """A convolution with A's kernels, then B as a 1x1 convolution."""
    x, leaf = ins
    if is_leaf(x) or not is_leaf(leaf):
        return None
    p, numbers, out_axis = conv.eqn.params, conv.numbers, conv.out
    groups, of_batch = conv.groups
    a, b, rest = leaf.a, leaf.b, leaf.axes[:out_axis] + leaf.axes[out_axis + 1 :]
    if leaf.axes[out_axis] == "i" and set(rest) == {"o"}:
        # Labels in the other direction: the same two factors, in the other order.
        a, b, rest = jnp.moveaxis(leaf.b, 0, -1), leaf.a.T, "i" * len(rest)
    elif leaf.axes[out_axis] != "o":
        return None
    if set(rest) != {"i"} or of_batch != 1:
        return None
    y = it.base(conv.eqn, ins)
    kernel = jnp.moveaxis(a, -1, out_axis).astype(x.dtype)
    if groups > 1:  # every group reads its own channels with the same A
        kernel = jnp.concatenate([kernel] * groups, out_axis)
    h = lax.conv_general_dilated(
        dropped(leaf, x),
        kernel,
        p["window_strides"],
        p["padding"],
        p["lhs_dilation"],
        p["rhs_dilation"],
        numbers,
        groups,
        precision=p["precision"],
        preferred_element_type=p["preferred_element_type"],
    )
    features = numbers.out_spec[1]
    h = jnp.moveaxis(h, features, -1)
    h = h.reshape(*h.shape[:-1], groups, -1).astype(x.dtype)
    b = b.astype(x.dtype).reshape(b.shape[0], groups, -1)
    d = jnp.einsum("...gr,rgo->...go", h, b)
    d = d.reshape(*h.shape[:-2], -1)
    return y + (leaf.scale * jnp.moveaxis(d, -1, features)).astype(y.dtype)


@acts(LookUp, kind=LowRank)
def _look_up(it: Interpreter, at: LookUp, ins: list[Any]) -> Any:
    """Gathers rows of A (or columns of B), and makes the product of those rows only."""
    leaf, indices = ins
    if is_leaf(indices) or not is_leaf(leaf):
        return None
    labels, out = leaf.labels(), at.out
    a, al = at.done_to(leaf.a, labels["a"], indices)
    b, bl = at.done_to(leaf.b, labels["b"], indices)
    y = it.base(at.eqn, ins)
    wide = {leaf.axes[k] for k in at.kept if at.sizes[k] > 1}
    if {"i", "o"} <= wide:  # what was gathered are weights: W[expert_ids]
        return _gathered_weight(leaf, y, a, al, b, bl, out)
    z, zl = contract(a, al, b, bl, out)
    return y + (leaf.scale * align(z, zl, out)).astype(y.dtype)


def _gathered_weight(
    leaf: LowRank,
    base: Any,
    a: jax.Array,
    al: list[Label],
    b: jax.Array,
    bl: list[Label],
    out: list[Label],
) -> LowRank:
    row: list[Label] = [k for k in out if isinstance(k, tuple)]
    in_a, in_b = (not row or row[0] in labels for labels in (al, bl))
    group = "s" if row and in_a and in_b else "i" if in_a else "o"
    axes = "".join(group if isinstance(k, tuple) else leaf.axes[k] for k in out)  # type: ignore[index]
    place = lambda labels: [R if k == R else out.index(k) for k in labels]
    new = labels_of(LowRank, axes)
    return leaf.replace(
        base=base,
        axes=axes,
        a=align(a, place(al), new["a"]),
        b=align(b, place(bl), new["b"]),
    )


@acts(Route, kind=LowRank)
def _route(it: Interpreter, at: Route, ins: list[Any]) -> Any:
    """Experts on sorted tokens: a ragged dot with A, then one with B."""
    x, leaf, *sizes = ins
    axes = at.axes()
    if is_leaf(x) or not is_leaf(leaf) or axes is None:
        return None
    g, i, o, token = axes
    if leaf.axes[g] != "s" or {leaf.axes[i], leaf.axes[o]} != {"i", "o"}:
        return None
    y = it.base(at.eqn, ins)
    first, second = (f.astype(leaf.dtype) for f in _as_stack(leaf, g, i, o))
    x = dropped(leaf, x)
    h = lax.ragged_dot(x if token == 0 else x.T, first, *sizes, **at.options)
    h = _scaled(h.astype(leaf.dtype), leaf.scale)
    d = lax.ragged_dot(h, second, *sizes, **at.options)
    return y + d.astype(y.dtype)


def _as_stack(leaf: LowRank, g: int, i: int, o: int) -> tuple[jax.Array, jax.Array]:
    """The factors as (group, in, rank) and (group, rank, out) for this use."""
    labels = leaf.labels()
    f = {n: (getattr(leaf, n), labels[n]) for n in ("a", "b")}
    first, second = ("a", "b") if leaf.axes[i] == "i" else ("b", "a")
    return align(*f[first], [g, i, R]), align(*f[second], [g, R, o])


# --- rules: what happens to the weight before it is consumed -------------------------


@acts(Negate, kind=LowRank)
def _negate(it: Interpreter, verb: Negate, ins: list[Any]) -> Any:
    return ins[0].replace(base=it.base(verb.eqn, ins), b=-ins[0].b)


@acts(Scale, kind=LowRank)
def _scale(it: Interpreter, by: Scale, ins: list[Any]) -> Any:
    """Scales by a number, or by a vector along axes that only one factor has."""
    at = factor_of(it, by, ins)
    if at is None:
        return None
    leaf, v, varying = at
    for name, labels in reversed(leaf.labels().items()):
        if varying <= set(labels):
            x = getattr(leaf, name)
            f = factor_along(v, varying, labels).astype(x.dtype)
            x = x / f if by.divides else x * f
            return leaf.replace(base=it.base(by.eqn, ins), **{name: x})
    return None


@acts(Sum, kind=LowRank)
def _sum(it: Interpreter, over: Sum, ins: list[Any]) -> Any:
    """jnp.einsum first sums an axis that only the weight has."""
    leaf, gone = ins[0], over.axes
    if any(leaf.axes[k] == "s" for k in gone):
        return None
    axes = "".join(c for k, c in enumerate(leaf.axes) if k not in gone)
    return leaf.move(
        it.base(over.eqn, ins),
        lambda x, old, _: jnp.sum(x, tuple(old.index(k) for k in gone if k in old)),
        axes,
    )


@acts(Join, kind=LowRank, joins=True)
def _join(it: Interpreter, join: Join, ins: list[Any]) -> Any:
    """Joins weights; leaves of other kinds have joined below.

    Along an input or output axis the ranks add up and one factor is block diagonal.
    Along a stack axis, new or not, both factors are stacked.
    """
    axis, leaves = join.axis, [x for x in ins if isinstance(x, LowRank)]
    if join.new:
        if len({x.axes for x in leaves}) > 1:
            return None
        same = [_lifted(x, axis) for x in ins]
    else:
        wanted = next((x.axes for x in leaves if x.shape[axis] > 1), leaves[0].axes)
        same = [_fit(x, axis, wanted) if isinstance(x, LowRank) else x for x in ins]
        if any(isinstance(x, LowRank) and x.axes != wanted for x in same):
            return None
    return _joined(it.base(join.eqn, ins, kind=LowRank), same, axis)


def _fit(leaf: LowRank, axis: int, axes: str) -> LowRank:
    if leaf.shape[axis] == 1 and leaf.axes[axis] != axes[axis]:
        return relabel(leaf, axis, axes[axis])  # type: ignore[return-value]
    return leaf


def _lifted(x: Any, axis: int) -> Any:
    """The leaf with a new stack axis of size 1; of an operand without factors only the
    shape is used."""
    plain = jax.ShapeDtypeStruct(_with(jnp.shape(x), axis), x.dtype)
    if not isinstance(x, LowRank):
        return plain
    shift = lambda k: k if not isinstance(k, int) or k < axis else k + 1

    def f(y: jax.Array, had: list[Label], new: list[Label]) -> jax.Array:
        return align(jnp.expand_dims(y, 0), [axis, *map(shift, had)], new)

    return x.move(plain, f, x.axes[:axis] + "s" + x.axes[axis:])


def _with(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], 1, *shape[axis:])


def _joined(base: Any, parts: list[Any], axis: int) -> LowRank:
    """Around the joined base, the factors of all parts that have some."""
    first = next(x for x in parts if isinstance(x, LowRank))
    labels, ends = first.labels(), np.cumsum([0] + [x.shape[axis] for x in parts])
    ranks = [x.rank if isinstance(x, LowRank) else 0 for x in parts]
    stacked = first.axes[axis] == "s"
    out: dict[str, list[jax.Array]] = {"a": [], "b": []}
    for k, x in enumerate(parts):
        if not isinstance(x, LowRank):
            continue
        for n, f in (("a", x.a), ("b", _scaled(x.b, x.scale))):
            pads = [(0, 0, 0)] * f.ndim
            if axis in labels[n]:
                pads[labels[n].index(axis)] = (
                    int(ends[k]),
                    int(ends[-1] - ends[k + 1]),
                    0,
                )
            if stacked:
                pads[labels[n].index(R)] = (0, max(ranks) - ranks[k], 0)
            out[n].append(lax.pad(f, jnp.zeros((), f.dtype), pads))
    if stacked:
        a, b = (sum(out[n][1:], out[n][0]) for n in ("a", "b"))
    else:
        a, b = (jnp.concatenate(out[n], labels[n].index(R)) for n in ("a", "b"))
    return first.replace(base=base, a=a, b=b, scale=1.0)


# --- the mathematics -----------------------------------------------------------------


def low_rank_product(
    a: Float[Array, "..."], b: Float[Array, "..."], axes: str, dtype: Any
) -> Float[Array, "..."]:
    """A.B as an array with the weight's axes, multiplied and summed in `dtype`."""
    labels = labels_of(LowRank, axes)
    z, zl = contract(
        jnp.asarray(a).astype(dtype),
        labels["a"],
        jnp.asarray(b).astype(dtype),
        labels["b"],
        range(len(axes)),
        precision=lax.Precision.HIGHEST,
    )
    return align(z, zl, range(len(axes)))


def through(
    leaf: LowRank,
    x: jax.Array,
    xl: list[Label],
    out: list[Label],
    *,
    out_sharding: Any = None,
    **options: Any,
) -> jax.Array:
    """scale * (sum of x * A.B over every label not in `out`), through the rank.

    The factor that makes the sum cheaper comes first.  Factors have the dtype the
    weight has in this product, whatever the activation's: beside a bfloat16 weight they
    are cast to bfloat16, beside a float32 weight that meets int8 or bfloat16 they stay
    float32.
    """
    labels = leaf.labels()
    size: dict[Label, int] = {
        **dict(zip(xl, jnp.shape(x), strict=True)),
        **dict(enumerate(leaf.shape)),
        R: leaf.rank,
    }
    plans = []
    for first, second in (("a", "b"), ("b", "a")):
        fl, gl = labels[first], labels[second]
        hl = [k for k in dict.fromkeys([*xl, *fl]) if k in gl or k in out or k == R]
        cost = math.prod(size[k] for k in {*xl, *fl}) + math.prod(
            size[k] for k in {*hl, *gl}
        )
        plans.append((cost, first, second, hl))
    _, first, second, keep = min(plans, key=lambda plan: plan[0])
    return _two_steps(
        x,
        getattr(leaf, first),
        getattr(leaf, second),
        scale=leaf.scale,
        dtype=jnp.dtype(leaf.dtype),
        labels=tuple(map(tuple, (xl, labels[first], labels[second], keep, out))),
        options=tuple(options.items()),
        places=(places_of(x, xl, out_sharding), places(out_sharding, out)),
        matrices=as_matrices_here(x),
    )


@functools.partial(
    jax.jit,
    static_argnames=("scale", "dtype", "labels", "options", "places", "matrices"),
    inline=True,
)
def _two_steps(
    x: Num[Array, "..."],
    f: Float[Array, "..."],
    g: Float[Array, "..."],
    *,
    scale: float,
    dtype: Any,
    labels: tuple[tuple[Label, ...], ...],
    options: tuple[tuple[str, Any], ...],
    places: tuple[Places | None, Places | None],
    matrices: bool,
) -> jax.Array:
    """scale * (x.f).g.

    Inlined, so no program shows it.  The `jit` is there because JAX then traces and
    differentiates it once for each shape, not once for each weight.
    """
    xl, fl, gl, keep, out = map(list, labels)
    f, g = f.astype(dtype), g.astype(dtype)
    h, hl = contract(x, xl, f, fl, keep, place=places[0], **dict(options))
    h = _scaled(h.astype(dtype), scale)
    more = dict(options)
    return expanded(h, hl, g, gl, out, matrices=matrices, place=places[1], **more)


def dropped(leaf: Labelled, x: Num[Array, "*shape"]) -> Num[Array, "*shape"]:
    """The activation that enters A, with inverted dropout where there is a key."""
    rate = getattr(leaf, "dropout", 0.0)
    if leaf.key is None or rate == 0.0:
        return x
    key = leaf.key
    for axis in compat.varying_axes(x):  # shards draw masks of their own
        key = jax.random.fold_in(key, lax.axis_index(axis))
    keep = 1.0 - rate
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        x = x.astype(leaf.dtype)
    mask = jax.random.bernoulli(key, keep, jnp.shape(x))
    return jnp.where(mask, x / jnp.asarray(keep, x.dtype), jnp.zeros((), x.dtype))


def _scaled(x: jax.Array, scale: float) -> jax.Array:
    return x if scale == 1.0 else x * jnp.asarray(scale, x.dtype)
