"""Labelled leaves: moving a weight about is moving labels about.

Every axis of the weight is labelled `s` (stack), `i` (input) or `o` (output); see
`jpeft.tree.layout`.  An array of the method has some of the weight's axes and perhaps
axes of its own (the rank, `R`).  A movement equation (transpose, reshape, slice, ...)
does to each array what it does to the weight, on the axes that array has.  So no rule
asks whether an axis is the first of the right operand, and the labels decide
parametrisation and cost, never correctness.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jax import lax

from jpeft import compat
from jpeft.adapt.interpreter import Interpreter, rule
from jpeft.leaf import AdaptedLeaf, adapted_leaf, is_leaf, static, transients

R = "r"  # the label of the rank
Label = Hashable
Labels = Sequence[Label]
# f(array, its labels, the labels wanted) -> array
Move = Callable[[jax.Array, list[Label], list[Label]], jax.Array]


@adapted_leaf
class Labelled(AdaptedLeaf):
    """A leaf whose arrays are described by labels.

    axes: one of "s", "i", "o" for each axis of the weight.
    """

    axes: str = static()

    # The label of an axis that a movement makes of nothing.
    spare: ClassVar[str] = "o"

    @classmethod
    def labels_of(cls, axes: str) -> dict[str, list[Label]]:
        """For each array: its labels, where a label is an axis of the weight or `R`."""
        raise NotImplementedError

    def labels(self) -> dict[str, list[Label]]:
        return type(self).labels_of(self.axes)

    def field_axes(self) -> Mapping[str, tuple[int | None, ...]]:
        return {
            n: tuple(k if isinstance(k, int) else None for k in labels)
            for n, labels in self.labels().items()
        }

    def move(self, base: Any, f: Move, axes: str | None = None) -> Self:
        """The leaf over `base` with `f` done to every array."""
        old = self.labels()
        axes = self.axes if axes is None else axes
        new = type(self).labels_of(axes)
        arrays = {n: f(getattr(self, n), old[n], new[n]) for n in old}
        return self.replace(base=base, axes=axes, **arrays)

    def unstack(self) -> tuple[Any, Any, Callable[[Any, Any], Any]] | None:
        """An array without axis 0 is the same in every step."""
        labels = self.labels()
        scanned = {
            n: jnp.moveaxis(getattr(self, n), k.index(0), 0)
            for n, k in labels.items()
            if 0 in k
        }
        constant = {n: getattr(self, n) for n, k in labels.items() if 0 not in k}
        if is_leaf(self.base):
            rows = self.base.unstack()
            if rows is None:
                return None
            below, kept, join_below = rows
        else:
            below, kept, join_below = self.base, None, lambda row, _: row
        given = transients(self)  # one for all rows: the key, what is shared
        template = self.replace(base=None, **dict.fromkeys([*labels, *given]))

        def join(row: Any, rest: Any) -> Any:
            (base, arrays), (base_rest, others, given) = row, rest
            return template.replace(
                base=join_below(base, base_rest),
                axes=self.axes[1:],
                **arrays,
                **others,
                **given,
            )

        return (below, scanned), (kept, constant, given), join


# --- the algebra ---------------------------------------------------------------------


def contract(
    x: jax.Array,
    xl: Labels,
    y: jax.Array,
    yl: Labels,
    keep: Any,
    *,
    place: Callable[[Labels], Any] | None = None,
    **kwargs: Any,
) -> tuple[jax.Array, list[Label]]:
    """Sums x*y over the labels that are not in `keep`.

    Labels come back in the order of `dot_general`: batch, x's own, y's own.  place: the
    sharding of a result with these labels, where the mesh is explicit.
    """
    keep = set(keep)
    x, xl = _sum_lone(x, list(xl), yl, keep)
    y, yl = _sum_lone(y, list(yl), xl, keep)
    shared = [k for k in xl if k in yl]
    batch = [k for k in shared if k in keep]
    summed = [k for k in shared if k not in keep]
    at = lambda labels, which: tuple(labels.index(k) for k in which)
    numbers = ((at(xl, summed), at(yl, summed)), (at(xl, batch), at(yl, batch)))
    own = [k for k in xl if k not in shared] + [k for k in yl if k not in shared]
    labels = batch + own
    if place is not None:
        kwargs["out_sharding"] = place(labels)
    return lax.dot_general(x, y, numbers, **kwargs), labels


def expanded(
    h: jax.Array,
    hl: Labels,
    g: jax.Array,
    gl: Labels,
    out: Labels,
    *,
    matrices: bool,
    **options: Any,
) -> jax.Array:
    """Sums h*g over the rank and every label not in `out`; the axes come as `out`.

    matrices: as a product of two matrices where it is one (see `as_matrices_here`).
    """
    hl, gl, out = list(hl), list(gl), list(out)
    free, made = hl[:-1], [k for k in gl if k != R]
    sizes = None
    if matrices and free and hl == [*free, R] and out == free + made:
        g = align(g, gl, [R, *made])
        sizes = *h.shape[:-1], *g.shape[1:]
        h = h.reshape(math.prod(h.shape[:-1]), h.shape[-1])
        g = g.reshape(g.shape[0], math.prod(g.shape[1:]))
        hl, gl, out = [0, R], [R, 1], [0, 1]
    tail = [k for k in gl if k not in hl]
    if tail and out[-len(tail) :] != tail:  # the operand order that spares a transpose
        h, hl, g, gl = g, gl, h, hl
    y, yl = contract(h, hl, g, gl, out, **options)
    y = align(y, yl, out)
    return y if sizes is None else y.reshape(sizes)


def as_matrices_here(x: Any) -> bool:
    """Whether products with a rank are to be those of matrices: on a CPU.

    There XLA copies a gradient of several axes before it multiplies it by the rank's
    few columns, which takes ten times as long as the product.  Elsewhere it does not,
    and axes that are cut over devices had better stay apart.
    """
    return jax.default_backend() == "cpu" and compat.typed_sharding(x) is None


def _sum_lone(
    x: jax.Array, xl: list[Label], yl: Labels, keep: set[Label]
) -> tuple[jax.Array, list[Label]]:
    """A label of one operand that nobody needs is summed first."""
    lone = [k for k, n in enumerate(xl) if n not in yl and n not in keep]
    if not lone:
        return x, xl
    return jnp.sum(x, lone), [n for k, n in enumerate(xl) if k not in lone]


def align(x: jax.Array, labels: Labels, wanted: Labels) -> jax.Array:
    """Transposes to the wanted order of labels."""
    labels, wanted = list(labels), list(wanted)
    if labels == wanted:
        return x
    return lax.transpose(x, [labels.index(k) for k in wanted])


def axis_groups(
    src: Sequence[int], dst: Sequence[int]
) -> list[tuple[list[int], list[int]]]:
    """The smallest groups of axes that a reshape maps onto each other.

    Axes of size 1 are left out.  Both shapes have the same size.
    """
    s = [k for k, n in enumerate(src) if n != 1]
    d = [k for k, n in enumerate(dst) if n != 1]
    out, i, j = [], 0, 0
    while i < len(s) and j < len(d):
        a, b = [s[i]], [d[j]]
        m, n = src[s[i]], dst[d[j]]
        i, j = i + 1, j + 1
        while m != n:
            if m < n:
                a.append(s[i])
                m *= src[s[i]]
                i += 1
            else:
                b.append(d[j])
                n *= dst[d[j]]
                j += 1
        out.append((a, b))
    return out


def relabel(leaf: Labelled, axis: int, label: str) -> Labelled:
    """Another label for an axis of size 1, which any label fits."""
    assert leaf.shape[axis] == 1
    axes = leaf.axes[:axis] + label + leaf.axes[axis + 1 :]

    def f(x: jax.Array, old: list[Label], new: list[Label]) -> jax.Array:
        if axis in old and axis not in new:
            return lax.squeeze(x, [old.index(axis)])
        if axis in new and axis not in old:
            return jnp.expand_dims(x, new.index(axis))
        return x

    return leaf.move(leaf.base, f, axes)


def operand_labels(
    eqn: Any, side: int, ndim: int, x_ndim: int
) -> tuple[list[Label], list[Label]]:
    """Labels of the activation and of the output of a `dot_general`.

    The weight is operand `side` and its axes are their own labels; the activation's
    free axes are labelled ("x", k).
    """
    contracting, batch = eqn.params["dimension_numbers"]
    labels: list[Label] = [("x", k) for k in range(x_ndim)]
    other = 1 - side
    for q, k in zip(
        (*contracting[other], *batch[other]),
        (*contracting[side], *batch[side]),
        strict=True,
    ):
        labels[q] = k
    used = {*contracting[side], *batch[side]}
    mine: list[Label] = [k for k in range(ndim) if k not in used]
    theirs = [k for k in labels if isinstance(k, tuple)]
    free = mine + theirs if side == 0 else theirs + mine
    return labels, [*batch[side], *free]


# --- movement ------------------------------------------------------------------------


@rule("transpose", kind=Labelled)
def _transpose(it: Interpreter, eqn: Any, ins: list[Any]) -> Any:
    return _transposed(ins[0], it.base(eqn, ins), eqn.params["permutation"])


def _transposed(leaf: Labelled, base: Any, perm: Sequence[int]) -> Labelled:
    def f(x: jax.Array, old: list[Label], new: list[Label]) -> jax.Array:
        return align(x, old, [perm[k] if isinstance(k, int) else k for k in new])

    return leaf.move(base, f, "".join(leaf.axes[k] for k in perm))


@rule("reshape", kind=Labelled)
def _reshape(it: Interpreter, eqn: Any, ins: list[Any]) -> Any:
    leaf, dst = ins[0], eqn.outvars[0].aval.shape
    if 0 in dst:
        return None
    new_base = it.base(eqn, ins)
    if (perm := eqn.params.get("dimensions")) is not None:
        # Transposed first, as vmap of a convolution writes it.
        shape = jax.ShapeDtypeStruct([leaf.shape[k] for k in perm], leaf.dtype)
        leaf = _transposed(leaf, shape, perm)
    return reshaped(leaf, new_base, dst)


def reshaped(leaf: Labelled, base: Any, dst: Sequence[int]) -> Labelled | None:
    """The leaf over its reshaped base; None where input and output axes would join."""
    axes = [leaf.spare] * len(dst)  # axes of size 1 may have any label
    for src_group, dst_group in axis_groups(leaf.shape, dst):
        if len({leaf.axes[k] for k in src_group}) > 1:
            return None  # input and output axes in one: the rank would have to grow
        for k in dst_group:
            axes[k] = leaf.axes[src_group[0]]

    def f(x: jax.Array, old: list[Label], new: list[Label]) -> jax.Array:
        return x.reshape(
            [dst[k] if isinstance(k, int) else x.shape[old.index(k)] for k in new]
        )

    return leaf.move(base, f, "".join(axes))


@rule("broadcast_in_dim", kind=Labelled)
def _broadcast(it: Interpreter, eqn: Any, ins: list[Any]) -> Any:
    leaf, to = ins[0], eqn.params["broadcast_dimensions"]
    dst = eqn.outvars[0].aval.shape
    axes = "".join(
        leaf.axes[to.index(k)] if k in to else leaf.spare for k in range(len(dst))
    )

    def f(x: jax.Array, old: list[Label], new: list[Label]) -> jax.Array:
        shape = [dst[k] if isinstance(k, int) else x.shape[old.index(k)] for k in new]
        where = [new.index(to[k] if isinstance(k, int) else k) for k in old]
        return lax.broadcast_in_dim(x, shape, where)

    return leaf.move(it.base(eqn, ins), f, axes)


@rule("squeeze", kind=Labelled)
def _squeeze(it: Interpreter, eqn: Any, ins: list[Any]) -> Any:
    leaf, gone = ins[0], eqn.params["dimensions"]
    axes = "".join(c for k, c in enumerate(leaf.axes) if k not in gone)
    return leaf.move(
        it.base(eqn, ins),
        lambda x, old, _: lax.squeeze(x, [old.index(k) for k in old if k in gone]),
        axes,
    )


@rule("slice", kind=Labelled)
def _slice(it: Interpreter, eqn: Any, ins: list[Any]) -> Any:
    leaf, p = ins[0], eqn.params
    start, limit = p["start_indices"], p["limit_indices"]
    strides = p["strides"] or (1,) * leaf.ndim

    def f(x: jax.Array, old: list[Label], _: list[Label]) -> jax.Array:
        own = [not isinstance(k, int) for k in old]
        return lax.slice(
            x,
            [0 if o else start[k] for k, o in zip(old, own, strict=True)],
            [n if o else limit[k] for k, o, n in zip(old, own, x.shape, strict=True)],
            [1 if o else strides[k] for k, o in zip(old, own, strict=True)],
        )

    return leaf.move(it.base(eqn, ins), f)


@rule("dynamic_slice", kind=Labelled)
def _dynamic_slice(it: Interpreter, eqn: Any, ins: list[Any]) -> Any:
    leaf, *start = ins
    if not is_leaf(leaf) or any(map(is_leaf, start)):
        return None
    sizes = eqn.params["slice_sizes"]

    def f(x: jax.Array, old: list[Label], _: list[Label]) -> jax.Array:
        zero = jnp.zeros_like(start[0])
        return lax.dynamic_slice(
            x,
            [start[k] if isinstance(k, int) else zero for k in old],
            [
                sizes[k] if isinstance(k, int) else n
                for k, n in zip(old, x.shape, strict=True)
            ],
        )

    return leaf.move(it.base(eqn, ins), f)


@rule("split", kind=Labelled)
def _split(it: Interpreter, eqn: Any, ins: list[Any]) -> list[Any]:
    leaf, axis, sizes = ins[0], eqn.params["axis"], eqn.params["sizes"]
    cut = {
        n: lax.split(getattr(leaf, n), sizes, labels.index(axis))
        if axis in labels
        else [getattr(leaf, n)] * len(sizes)
        for n, labels in leaf.labels().items()
    }
    return [
        leaf.replace(base=b, **{n: parts[k] for n, parts in cut.items()})
        for k, b in enumerate(it.base(eqn, ins))
    ]


@rule("tile", kind=Labelled)
def _tile(it: Interpreter, eqn: Any, ins: list[Any]) -> Any:
    reps = eqn.params["reps"]
    if len(reps) != ins[0].ndim:
        return None

    def f(x: jax.Array, old: list[Label], _: list[Label]) -> jax.Array:
        return jnp.tile(x, [reps[k] if isinstance(k, int) else 1 for k in old])

    return ins[0].move(it.base(eqn, ins), f)


@rule("all_gather", kind=Labelled)
def _all_gather(it: Interpreter, eqn: Any, ins: list[Any]) -> Any:
    """A weight put together from its shards: so is each array that has the axis."""
    p = eqn.params
    axis = p["all_gather_dimension"]
    if not p["tiled"] or len(ins) != 1:
        return None

    def f(x: jax.Array, old: list[Label], _: list[Label]) -> jax.Array:
        if axis not in old:
            return x
        return lax.all_gather(
            x,
            p["axis_name"],
            axis_index_groups=p["axis_index_groups"],
            axis=old.index(axis),
            tiled=True,
        )

    return ins[0].move(it.base(eqn, ins), f)


@rule("rev", kind=Labelled)
def _rev(it: Interpreter, eqn: Any, ins: list[Any]) -> Any:
    turned = eqn.params["dimensions"]
    return ins[0].move(
        it.base(eqn, ins),
        lambda x, old, _: lax.rev(x, [old.index(k) for k in turned if k in old]),
    )


@rule("pad", kind=Labelled)
def _pad(it: Interpreter, eqn: Any, ins: list[Any]) -> Any:
    leaf, value = ins
    if not is_leaf(leaf) or is_leaf(value):
        return None
    config = eqn.params["padding_config"]

    def f(x: jax.Array, old: list[Label], _: list[Label]) -> jax.Array:
        zero = jnp.zeros((), x.dtype)  # a delta of nothing, whatever the base gets
        rows = [config[k] if isinstance(k, int) else (0, 0, 0) for k in old]
        return lax.pad(x, zero, rows)

    return leaf.move(it.base(eqn, ins), f)


@rule("convert_element_type", kind=Labelled)
def _convert(it: Interpreter, eqn: Any, ins: list[Any]) -> Any:
    dtype = eqn.params["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.floating):
        return None
    return ins[0].move(it.base(eqn, ins), lambda x, *_: x.astype(dtype))


@rule("copy", "stop_gradient", "reduce_precision", kind=Labelled)
def _each(it: Interpreter, eqn: Any, ins: list[Any]) -> Any:
    return ins[0].move(it.base(eqn, ins), lambda x, *_: it.like(eqn, x))


@rule(
    "sharding_constraint",
    "name",
    "reshard",
    "layout_constraint",
    kind=Labelled,
)
def _annotate(it: Interpreter, eqn: Any, ins: list[Any]) -> Any:
    """The annotation is of the base; the small arrays stay where they are."""
    return ins[0].replace(base=it.base(eqn, ins))


@rule("pvary", kind=Labelled)
def _vary(it: Interpreter, eqn: Any, ins: list[Any]) -> Any:
    return ins[0].move(it.base(eqn, ins), lambda x, *_: it.like(eqn, x))


@rule("optimization_barrier", kind=Labelled)
def _barrier(it: Interpreter, eqn: Any, ins: list[Any]) -> list[Any]:
    return list(lax.optimization_barrier(ins))


# --- scaling by a vector -------------------------------------------------------------


def broadcast_axes(it: Interpreter, eqn: Any, operand: int) -> set[int]:
    """The axes along which an operand really varies.

    Some are broadcast to the weight's shape by an equation before, which is asked.
    """
    var = eqn.invars[operand]
    found = it.producer(var)
    if found is not None and found.primitive.name == "broadcast_in_dim":
        to = found.params["broadcast_dimensions"]
        source = found.invars[0].aval.shape
        return {k for k, n in zip(to, source, strict=True) if n > 1}
    return {k for k, n in enumerate(var.aval.shape) if n > 1}


def factor_along(x: jax.Array, varying: set[int], labels: list[Label]) -> jax.Array:
    """The operand cut down to the axes it varies along, shaped to scale an array that
    has `labels`."""
    index = tuple(slice(None) if k in varying else 0 for k in range(x.ndim))
    x = x[index]
    kept = sorted(varying)
    order = [k for k in labels if k in varying]
    x = align(x, kept, order)
    return x.reshape([x.shape[order.index(k)] if k in order else 1 for k in labels])
