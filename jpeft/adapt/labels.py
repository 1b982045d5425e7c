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
from collections.abc import Callable
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jax import lax

from jpeft import compat
from jpeft.adapt.equations import (
    Barrier,
    Cast,
    Label,
    Labels,
    Move,
    Pad,
    Said,
    Same,
    Scale,
)
from jpeft.adapt.equations import align as align
from jpeft.adapt.interpreter import Interpreter, acts
from jpeft.leaf import AdaptedLeaf, adapted_leaf, is_leaf, labels_of, static, transients

R = "r"  # the label of the rank
# f(array, its labels, the labels wanted) -> array
Moving = Callable[[jax.Array, list[Label], list[Label]], jax.Array]


@adapted_leaf
class Labelled(AdaptedLeaf):
    """A leaf whose arrays are described by labels.

    axes: one of "s", "i", "o" for each axis of the weight.
    """

    axes: str = static()

    # The label of a new axis of size 1.
    spare: ClassVar[str] = "o"

    def move(self, base: Any, f: Moving, axes: str | None = None) -> Self:
        """The leaf over `base` with `f` done to every array."""
        old = self.labels()
        axes = self.axes if axes is None else axes
        new = labels_of(type(self), axes)
        arrays = {n: f(getattr(self, n), old[n], new[n]) for n in old}
        return self.replace(base=base, axes=axes, **arrays)

    def unstack(self) -> tuple[Any, Any, Callable[[Any, Any], Any]] | None:
        """An array that lacks axis 0 is the same in every step."""
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

    Labels come back in the order of `dot_general`: batch, x's own, y's own.
    place: a function from these labels to the result's sharding, on an explicit mesh.
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
    """Whether products with a rank become products of matrices: on a CPU they do.

    There XLA copies a gradient of several axes before it multiplies it by the rank's
    few columns, which takes ten times as long as the product.  Elsewhere it does not,
    and axes that are cut over devices had better stay apart.
    """
    return jax.default_backend() == "cpu" and compat.typed_sharding(x) is None


def _sum_lone(
    x: jax.Array, xl: list[Label], yl: Labels, keep: set[Label]
) -> tuple[jax.Array, list[Label]]:
    """Sums first over the labels that only one operand has and the result lacks."""
    lone = [k for k, n in enumerate(xl) if n not in yl and n not in keep]
    if not lone:
        return x, xl
    return jnp.sum(x, lone), [n for k, n in enumerate(xl) if k not in lone]


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


# --- movement ------------------------------------------------------------------------


@acts(Move, kind=Labelled)
def moved(it: Interpreter, move: Move, ins: list[Any], *, fill: float = 0) -> Any:
    """The weight's axes moved about, and so those of each array that has some.

    fill: what a padding puts beside the arrays where it puts something beside the
        weight.  For a delta that is zero, whatever the base is padded with.
    """
    leaf, *more = ins
    if not is_leaf(leaf) or any(map(is_leaf, more)):
        return None
    if isinstance(move, Said):  # of the base: the small arrays stay where they are
        return leaf.replace(base=it.base(move.eqn, ins))
    if isinstance(move, Same):
        return leaf.move(it.base(move.eqn, ins), lambda x, *_: it.like(move.eqn, x))
    axes = move.labels(leaf.axes, leaf.spare)
    if axes is None:
        return None  # inputs and outputs in one axis: the rank would grow
    bases = it.base(move.eqn, ins)
    done: dict[Any, Any] = {}

    def f(x: jax.Array, old: list[Label], new: list[Label]) -> Any:
        given = [jnp.asarray(fill, x.dtype)] if move.step is Pad else more
        return move.done_to(x, old, new, given)

    if not move.eqn.primitive.multiple_results:
        return leaf.move(bases, f, axes)

    def part(k: int) -> Any:
        def f_k(x: jax.Array, old: list[Label], new: list[Label]) -> jax.Array:
            which = id(x), *old
            if which not in done:  # split once, for all the parts
                done[which] = x, f(x, old, new)
            return done[which][1][k]

        return f_k

    return [leaf.move(b, part(k), axes) for k, b in enumerate(bases)]


@acts(Cast, kind=Labelled)
def _cast(it: Interpreter, cast: Cast, ins: list[Any]) -> Any:
    if not jnp.issubdtype(cast.dtype, jnp.floating):
        return None
    return ins[0].move(it.base(cast.eqn, ins), lambda x, *_: x.astype(cast.dtype))


@acts(Barrier, kind=AdaptedLeaf)
def _barrier(it: Interpreter, barrier: Barrier, ins: list[Any]) -> list[Any]:
    return list(lax.optimization_barrier(ins))


# --- scaling by a vector -------------------------------------------------------------


def factor_of(
    it: Interpreter, by: Scale, ins: list[Any]
) -> tuple[Any, jax.Array, set[int]] | None:
    """(leaf, what scales it, the axes along which the scale varies).

    None unless exactly one operand is a weight, is no divisor and keeps its shape.
    """
    side = 0 if is_leaf(ins[0]) else 1
    if all(map(is_leaf, ins)) or (side == 1 and by.divides):
        return None
    leaf = ins[side]
    if by.eqn.outvars[0].aval.shape != leaf.shape:
        return None  # the weight itself is broadcast
    wide = it.varying(by.eqn.invars[1 - side])
    return leaf, jnp.broadcast_to(ins[1 - side], leaf.shape), wide


def factor_along(x: jax.Array, wide: set[int], labels: list[Label]) -> jax.Array:
    """The operand cut down to the axes it varies along, shaped to scale an array that
    has `labels`."""
    index = tuple(slice(None) if k in wide else 0 for k in range(x.ndim))
    x = x[index]
    kept = sorted(wide)
    order = [k for k in labels if k in wide]
    x = align(x, kept, order)
    return x.reshape([x.shape[order.index(k)] if k in order else 1 for k in labels])
