"""What an equation does, said once: the verbs that a weight may meet.

    Contract, LookUp, Convolve, Route    it is consumed
    Scale, Add, Sum, Cast                its values change
    Join                                 several become one
    Move                                 its axes are moved about

`read` turns an equation into one of them.  Rules answer verbs, so what a primitive is
called, and where its parameters are, stands here and nowhere else.

A movement is data: which axes of the operand each axis of the result holds, and what
happens along one (`Step`).  Four readers go by it: arrays that have some of the
operand's axes (`Move.done_to`), labels of those axes (`Move.labels`), whatever else is
kept for each axis (`Move.carried`), and the NumPy columns of a prefix
(`Move.done_to_columns`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jpeft.leaf import is_leaf

T = TypeVar("T")
Label = Hashable
Labels = Sequence[Label]


@dataclasses.dataclass(frozen=True, eq=False)
class Verb:
    """An equation, and what it does."""

    eqn: Any

    def carried(
        self, axes: Sequence[frozenset[T]]
    ) -> list[tuple[frozenset[T], ...]] | None:
        """What is kept for each axis of the first operand, as it is for each axis of
        every result.  None where they are not that operand's any longer."""
        return None


class Change(Verb):
    """The values change; the axes at most become fewer."""


class _OfOne(Change):
    """One operand, whose axes stay."""

    def carried(self, axes: Sequence[frozenset[T]]) -> list[tuple[frozenset[T], ...]]:
        return [tuple(axes)] * len(self.eqn.outvars)


class Cast(_OfOne):
    """To another dtype."""

    @property
    def dtype(self) -> Any:
        return self.eqn.params["new_dtype"]


class Negate(_OfOne):
    pass


class Barrier(Verb):
    """Each operand as it is, once all of them are there."""

    def carried(self, axes: Sequence[frozenset[T]]) -> list[tuple[frozenset[T], ...]]:
        return [tuple(axes)] * len(self.eqn.outvars)


class Scale(Change):
    """The product or quotient of two."""

    @property
    def divides(self) -> bool:
        return self.eqn.primitive.name == "div"


class Add(Verb):
    """The sum of two."""


class Compute(Verb):
    """Something else that is made of each value, of two, or of all along an axis."""


class Sum(Change):
    """Over some axes."""

    @property
    def axes(self) -> tuple[int, ...]:
        return tuple(self.eqn.params["axes"])


@dataclasses.dataclass(frozen=True, eq=False)
class Join(Verb):
    """Operands side by side.  new: along an axis that they do not have."""

    axis: int
    new: bool


# --- consumption ---------------------------------------------------------------------


class Consume(Verb):
    """A weight meets what is no weight."""


@dataclasses.dataclass(frozen=True, eq=False)
class Contract(Consume):
    """The sum of products of two operands, over the axes that are contracted.

    contracting, batch: of either operand, its axes.
    """

    contracting: tuple[tuple[int, ...], tuple[int, ...]]
    batch: tuple[tuple[int, ...], tuple[int, ...]]

    @property
    def options(self) -> dict[str, Any]:
        """How the product is to be computed, and where it goes."""
        names = ("precision", "preferred_element_type", "out_sharding")
        return {n: self.eqn.params.get(n) for n in names}

    def role(self, side: int, axis: int) -> str:
        """What an axis of an operand is in it: "i", "s" or "o"."""
        summed, each = axis in self.contracting[side], axis in self.batch[side]
        return "i" if summed else "s" if each else "o"

    def labels(self, side: int, ndim: int, x_ndim: int) -> tuple[list[Label], ...]:
        """Labels of the other operand and of the result.

        The operand `side` has `ndim` axes, which are their own labels; those of the
        other one that are free are labelled ("x", k).
        """
        other = 1 - side
        labels: list[Label] = [("x", k) for k in range(x_ndim)]
        for q, k in zip(
            (*self.contracting[other], *self.batch[other]),
            (*self.contracting[side], *self.batch[side]),
            strict=True,
        ):
            labels[q] = k
        mine: list[Label] = [k for k in range(ndim) if self.role(side, k) == "o"]
        theirs = [k for k in labels if isinstance(k, tuple)]
        free = mine + theirs if side == 0 else theirs + mine
        return labels, [*self.batch[side], *free]

    def of(self, ins: Sequence[Any]) -> Product:
        """With one of the operands for the weight."""
        side = 0 if is_leaf(ins[0]) else 1
        leaf, x = ins[side], ins[1 - side]
        return Product(self, side, leaf, x, *self.labels(side, leaf.ndim, jnp.ndim(x)))


@dataclasses.dataclass(frozen=True, eq=False)
class Product:
    """A weight, and what is multiplied by it.

    side: which operand the weight is.  xl, out: labels of x's axes and of the
    result's, where the weight's axes are their own and x's are ("x", k).
    """

    verb: Contract
    side: int
    leaf: Any
    x: Any
    xl: list[Label]
    out: list[Label]

    @property
    def eqn(self) -> Any:
        return self.verb.eqn

    @property
    def options(self) -> dict[str, Any]:
        return self.verb.options

    def ins(self, leaf: Any = None, x: Any = None) -> list[Any]:
        """The operands, with another leaf or another x."""
        pair = [self.leaf if leaf is None else leaf, self.x if x is None else x]
        return pair if self.side == 0 else pair[::-1]


class Convolve(Consume):
    """A convolution with the weight.  axes: of the weight."""

    @property
    def numbers(self) -> Any:
        return self.eqn.params["dimension_numbers"]

    @property
    def out(self) -> int:
        """The weight's axis of outputs."""
        return self.numbers.rhs_spec[0]

    @property
    def channel(self) -> int:
        """The weight's axis of inputs."""
        return self.numbers.rhs_spec[1]

    @property
    def groups(self) -> tuple[int, int]:
        """Of features, and of the batch."""
        p = self.eqn.params
        return p["feature_group_count"], p["batch_group_count"]


class LookUp(Consume):
    """Parts of the weight, of one size, from where indices say."""

    @property
    def numbers(self) -> Any:
        return self.eqn.params["dimension_numbers"]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the parts, along each of the weight's axes."""
        return tuple(self.eqn.params["slice_sizes"])

    @property
    def batching(self) -> dict[int, int]:
        """Axes that the weight and the indices share."""
        numbers = self.numbers
        pair = numbers.operand_batching_dims, numbers.start_indices_batching_dims
        return dict(zip(*pair, strict=True))

    @property
    def kept(self) -> list[int]:
        """The weight's axes that the parts have."""
        gone = {*self.numbers.collapsed_slice_dims, *self.batching}
        return [k for k in range(len(self.sizes)) if k not in gone]

    @property
    def rows(self) -> list[Label]:
        """A label for each axis of the indices."""
        return [("n", k) for k in range(len(self.eqn.invars[1].aval.shape) - 1)]

    @property
    def out(self) -> list[Label]:
        """Labels of the result: axes of the weight, and `rows`."""
        kept, rows = iter(self.kept), iter(self.rows)
        axes = range(len(self.eqn.outvars[0].aval.shape))
        of_part = self.numbers.offset_dims
        return [next(kept) if k in of_part else next(rows) for k in axes]

    def done_to(
        self, x: jax.Array, labels: Labels, indices: jax.Array, fill: float = 0
    ) -> tuple[jax.Array, list[Label]]:
        """The same lookup in an array that has some of the weight's axes, by those
        index columns that speak of them; and the labels of what comes out.

        fill: what stands for rows out of range.  The base says what such a row is; its
        delta is nothing.
        """
        p, numbers, rows = self.eqn.params, self.numbers, self.rows
        batching, labels = self.batching, list(labels)
        sizes = [
            self.sizes[k] if isinstance(k, int) else n
            for k, n in zip(labels, x.shape, strict=True)
        ]
        columns = [c for c, k in enumerate(numbers.start_index_map) if k in labels]
        shared = [k for k in batching if k in labels]
        gone = [k for k in labels if k in numbers.collapsed_slice_dims]
        left = [k for k in labels if k not in gone and k not in shared]
        if not columns and not shared:
            whole = lax.slice(x, [0] * x.ndim, sizes)
            return lax.squeeze(whole, [labels.index(k) for k in gone]), left
        mine = lax.GatherDimensionNumbers(
            offset_dims=tuple(range(len(rows), len(rows) + len(left))),
            collapsed_slice_dims=tuple(sorted(labels.index(k) for k in gone)),
            start_index_map=tuple(
                labels.index(numbers.start_index_map[c]) for c in columns
            ),
            operand_batching_dims=tuple(labels.index(k) for k in shared),
            start_indices_batching_dims=tuple(batching[k] for k in shared),
        )
        out = lax.gather(
            x,
            indices[..., np.array(columns, np.int32)],
            mine,
            sizes,
            mode=p["mode"],
            fill_value=fill,
            indices_are_sorted=p["indices_are_sorted"] and not batching,
            unique_indices=p["unique_indices"]
            and len(columns) == len(numbers.start_index_map),
        )
        return out, rows + left


class Route(Consume):
    """Each row of x times the matrix of its group (`ragged_dot`)."""

    @property
    def numbers(self) -> Any:
        return self.eqn.params["ragged_dot_dimension_numbers"]

    @property
    def options(self) -> dict[str, Any]:
        names = ("precision", "preferred_element_type")
        return {n: self.eqn.params[n] for n in names}

    def role(self, axis: int) -> str:
        """What an axis of the weight is in it: "i", "s" or "o"."""
        (_, summed), (_, batch) = self.numbers.dot_dimension_numbers
        each = axis in (*batch, *self.numbers.rhs_group_dimensions)
        return "i" if axis in summed else "s" if each else "o"

    def axes(self) -> tuple[int, int, int, int] | None:
        """Its axes (group, summed, kept), and that of x which counts rows; None where
        there are more."""
        numbers = self.numbers
        (of_x, of_weight), batch = numbers.dot_dimension_numbers
        ranks = [len(v.aval.shape) for v in self.eqn.invars]
        counts = len(of_x), len(batch[0]), len(numbers.rhs_group_dimensions)
        plain = ranks[:2] == [2, 3] and len(ranks) == 3 and counts == (1, 0, 1)
        ragged = tuple(numbers.lhs_ragged_dimensions) == tuple(of_x)
        if not plain or ragged or self.eqn.params["group_offset"] is not None:
            return None
        (q,), (i,), (g,) = of_x, of_weight, numbers.rhs_group_dimensions
        return g, i, 3 - g - i, 1 - q


def smaller_as_value(ins: Sequence[Any]) -> list[Any]:
    """Of two weights that meet (learned queries times a projection) the smaller one is
    the activation, which exists in any case."""
    k = 0 if ins[0].size <= ins[1].size else 1
    return [x.materialize() if j == k else x for j, x in enumerate(ins)]


# --- movement ------------------------------------------------------------------------


class Step:
    """What happens along one axis of the operand."""

    @staticmethod
    def done(x: jax.Array, steps: Mapping[int, Any], more: Sequence[Any]) -> Any:
        """The steps along these axes of an array.  more: the other operands."""
        raise NotImplementedError

    def taken(self, a: np.ndarray, axis: int, result: int) -> np.ndarray | None:
        """The same of a NumPy array, for that one of the results; None: it cannot be
        told before the program runs."""
        return None


@dataclasses.dataclass(frozen=True)
class Slice(Step):
    start: int
    stop: int
    step: int

    @staticmethod
    def done(x: jax.Array, steps: Mapping[int, Any], more: Sequence[Any]) -> Any:
        whole = [Slice(0, n, 1) for n in x.shape]
        each = [steps.get(k, s) for k, s in enumerate(whole)]
        starts, stops, by = zip(*((s.start, s.stop, s.step) for s in each), strict=True)
        return lax.slice(x, starts, stops, by)

    def taken(self, a: np.ndarray, axis: int, result: int) -> np.ndarray:
        return _cut(a, axis, slice(self.start, self.stop, self.step))


@dataclasses.dataclass(frozen=True)
class SliceAt(Step):
    """From an index that is computed.  operand: which of the others it is."""

    size: int
    operand: int

    @staticmethod
    def done(x: jax.Array, steps: Mapping[int, Any], more: Sequence[Any]) -> Any:
        zero = jnp.result_type(more[0]).type(0)  # a number: no wrapping of indices
        at = [more[steps[k].operand] if k in steps else zero for k in range(x.ndim)]
        size = [steps[k].size if k in steps else n for k, n in enumerate(x.shape)]
        return lax.dynamic_slice(x, at, size)


@dataclasses.dataclass(frozen=True)
class Split(Step):
    """Into several results."""

    sizes: tuple[int, ...]

    @staticmethod
    def done(x: jax.Array, steps: Mapping[int, Any], more: Sequence[Any]) -> Any:
        ((axis, step),) = steps.items()
        return lax.split(x, step.sizes, axis)

    def taken(self, a: np.ndarray, axis: int, result: int) -> np.ndarray:
        start = sum(self.sizes[:result])
        return _cut(a, axis, slice(start, start + self.sizes[result]))


@dataclasses.dataclass(frozen=True)
class Repeat(Step):
    times: int

    @staticmethod
    def done(x: jax.Array, steps: Mapping[int, Any], more: Sequence[Any]) -> Any:
        times = [steps[k].times if k in steps else 1 for k in range(x.ndim)]
        return jnp.tile(x, times)

    def taken(self, a: np.ndarray, axis: int, result: int) -> np.ndarray:
        return np.tile(a, [self.times if k == axis else 1 for k in range(a.ndim)])


@dataclasses.dataclass(frozen=True)
class Reverse(Step):
    @staticmethod
    def done(x: jax.Array, steps: Mapping[int, Any], more: Sequence[Any]) -> Any:
        return lax.rev(x, list(steps))

    def taken(self, a: np.ndarray, axis: int, result: int) -> np.ndarray:
        return np.flip(a, axis)


@dataclasses.dataclass(frozen=True)
class Pad(Step):
    """more: the value to fill with."""

    low: int
    high: int
    inner: int

    @staticmethod
    def done(x: jax.Array, steps: Mapping[int, Any], more: Sequence[Any]) -> Any:
        none = Pad(0, 0, 0)
        each = [steps.get(k, none) for k in range(x.ndim)]
        return lax.pad(x, more[0], [(s.low, s.high, s.inner) for s in each])


@dataclasses.dataclass(frozen=True)
class Gather(Step):
    """Put together from the shards of a mesh."""

    mesh_axes: Any
    groups: Any
    times: int

    @staticmethod
    def done(x: jax.Array, steps: Mapping[int, Any], more: Sequence[Any]) -> Any:
        ((axis, step),) = steps.items()
        return lax.all_gather(
            x, step.mesh_axes, axis_index_groups=step.groups, axis=axis, tiled=True
        )


def _cut(a: np.ndarray, axis: int, part: slice) -> np.ndarray:
    return a[tuple(part if k == axis else slice(None) for k in range(a.ndim))]


@dataclasses.dataclass(frozen=True, eq=False)
class Move(Verb):
    """The first operand, moved about.

    of: for each axis of a result, the axes of the operand that it holds: one, or none
        where it is new.  Where axes are split or merged (`regroups`), all that a group
        of them is made of; those of size 1 are in none.
    along: what happens along axes of the operand, before they are moved; the same kind
        of step along all of them.
    """

    of: tuple[tuple[int, ...], ...]
    along: Mapping[int, Any] = dataclasses.field(default_factory=dict)
    regroups: bool = False

    @classmethod
    def whole(cls, eqn: Any, along: Mapping[int, Any] | None = None) -> Self:
        """Every axis stays in its place."""
        return cls(eqn, tuple((k,) for k in range(len(_source(eqn)))), along or {})

    @property
    def source(self) -> tuple[int, ...]:
        return _source(self.eqn)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the result; of the first, if there are several."""
        return tuple(self.eqn.outvars[0].aval.shape)

    @property
    def step(self) -> type[Step] | None:
        """The kind of what happens along axes."""
        return next((type(s) for s in self.along.values()), None)

    @property
    def order(self) -> list[int]:
        """The operand's axes, but for those that are in no axis of the result, in the
        order in which the result has them."""
        return list(dict.fromkeys(q for held in self.of for q in held))

    @property
    def spreads(self) -> bool:
        """Whether the result repeats the operand along axes that are new or were 1."""
        was = [self.source[held[0]] if held else 1 for held in self.of]
        return self.step is None and not self.regroups and was != list(self.shape)

    def carried(self, axes: Sequence[frozenset[T]]) -> list[tuple[frozenset[T], ...]]:
        none: frozenset[T] = frozenset()
        moved = tuple(none.union(*(axes[k] for k in held)) for held in self.of)
        return [moved] * len(self.eqn.outvars)

    def rows_taken(self, result: int) -> list[int]:
        """The axes of which that result has one row, of several."""
        if self.step not in (Slice, SliceAt, Split):
            return []
        shape = self.eqn.outvars[result].aval.shape
        return [k for k in self.along if shape[k] == 1 < self.source[k]]

    def labels(self, axes: str, spare: str) -> str | None:
        """A letter for each axis of a result.  spare: of a new one.  None where axes of
        two letters become one."""
        if self.regroups and 0 in self.shape:
            return None
        found = [{axes[k] for k in held} or {spare} for held in self.of]
        return None if any(len(f) > 1 for f in found) else "".join(map("".join, found))

    def done_to(
        self, x: jax.Array, old: Labels, new: Labels, more: Sequence[Any] = ()
    ) -> Any:
        """The movement done to an array that has some of the operand's axes.

        old: its axes, in the operand's numbers, or labels of its own.  new: those of
        what comes out, in the result's numbers.  more: the other operands.  A list
        where there are several results.
        """
        at = {old.index(k): step for k, step in self.along.items() if k in old}
        if at:
            assert self.step is not None
            x = self.step.done(x, at, more)
        elif self.step is Split:
            x = [x] * len(self.eqn.outvars)  # type: ignore[assignment]
        if self.step is not None:
            return x
        old = list(old)
        held = lambda k: self.of[k] if isinstance(k, int) else (k,)
        wanted = list(dict.fromkeys(q for k in new for q in held(k)))
        gone = [k for k in old if k not in wanted]  # of size 1
        sizes = [
            self.shape[k] if isinstance(k, int) else x.shape[old.index(k)] for k in new
        ]
        if self.regroups:
            return align(x, old, [*wanted, *gone], loose=gone).reshape(sizes)
        x = lax.squeeze(x, [old.index(k) for k in gone])
        x = align(x, [k for k in old if k not in gone], wanted)
        if not self.spreads and len(wanted) == len(new):
            return x
        return lax.broadcast_in_dim(x, sizes, [n for n, k in enumerate(new) if held(k)])

    def done_to_columns(self, a: np.ndarray, result: int = 0) -> np.ndarray | None:
        """The movement done to an array that broadcasts to the operand.  None where it
        cannot be told before the program runs."""
        for k, step in self.along.items():
            if a.shape[k] > 1:
                a = step.taken(a, k, result)
                if a is None:
                    return None
        if self.step is not None:
            return a
        gone = [k for k in range(a.ndim) if k not in self.order]
        if not self.regroups:
            a = a.transpose([*self.order, *gone])
            return a.reshape(
                [a.shape[self.order.index(h[0])] if h else 1 for h in self.of]
            )
        # Axes along which it does not vary stay of size 1, unless they are merged with
        # one along which it does.
        varies = [any(a.shape[q] > 1 for q in held) for held in self.of]
        wide = {q for held, v in zip(self.of, varies, strict=True) if v for q in held}
        a = np.broadcast_to(
            a, [self.source[k] if k in wide else n for k, n in enumerate(a.shape)]
        )
        shape = [n if v else 1 for n, v in zip(self.shape, varies, strict=True)]
        return a.transpose([*self.order, *gone]).reshape(shape)


@dataclasses.dataclass(frozen=True, eq=False)
class Same(Move):
    """The operand as it is, or a copy, or without its gradient."""


@dataclasses.dataclass(frozen=True, eq=False)
class Said(Same):
    """Something is said of the operand alone: a name, where it is to be."""


@dataclasses.dataclass(frozen=True, eq=False)
class Round(Same):
    """Fewer bits, the same dtype."""


# --- what each primitive is ----------------------------------------------------------


def read(eqn: Any) -> Verb | None:
    """What the equation does; None if it is none of the verbs."""
    reader = _VERBS.get(eqn.primitive.name)
    return None if reader is None else reader(eqn)


def only_moves(eqn: Any) -> bool:
    """Whether the result has the values of the first operand, all of them, moved about
    or cast."""
    verb = read(eqn)
    return isinstance(verb, Cast) or (isinstance(verb, Move) and verb.step is None)


def _source(eqn: Any) -> tuple[int, ...]:
    return tuple(eqn.invars[0].aval.shape)


def _along(eqn: Any, steps: Sequence[Step], idle: Sequence[Step]) -> Move:
    """steps: one for each axis; idle: one that does nothing for each."""
    each = enumerate(zip(steps, idle, strict=True))
    return Move.whole(eqn, {k: step for k, (step, none) in each if step != none})


def _squeeze(eqn: Any) -> Move:
    gone = eqn.params["dimensions"]
    return Move(eqn, tuple((k,) for k in range(len(_source(eqn))) if k not in gone))


def _broadcast(eqn: Any) -> Move | None:
    to = list(eqn.params["broadcast_dimensions"])
    held = lambda k: (to.index(k),) if k in to else ()
    of = tuple(map(held, range(len(eqn.outvars[0].aval.shape))))
    return Move(eqn, of) if len(eqn.invars) == 1 else None  # sizes known later


def _reshape(eqn: Any) -> Move | None:
    src, dst = _source(eqn), eqn.outvars[0].aval.shape
    turn = eqn.params.get("dimensions") or range(len(src))
    of: list[tuple[int, ...]] = [()] * len(dst)
    for s, d in axis_groups([src[k] for k in turn], dst):
        for k in d:
            of[k] = tuple(turn[q] for q in s)
    return Move(eqn, tuple(of), regroups=True) if len(eqn.invars) == 1 else None


def _slice(eqn: Any) -> Move:
    p, src = eqn.params, _source(eqn)
    by = p["strides"] or (1,) * len(src)
    cuts = list(map(Slice, p["start_indices"], p["limit_indices"], by))
    return _along(eqn, cuts, [Slice(0, n, 1) for n in src])


def _slice_at(eqn: Any) -> Move:
    at = lambda sizes: [SliceAt(n, k) for k, n in enumerate(sizes)]
    return _along(eqn, at(eqn.params["slice_sizes"]), at(_source(eqn)))


def _split(eqn: Any) -> Move:
    return Move.whole(eqn, {eqn.params["axis"]: Split(tuple(eqn.params["sizes"]))})


def _tile(eqn: Any) -> Move | None:
    times, src = eqn.params["reps"], _source(eqn)
    if len(times) != len(src):
        return None
    return _along(eqn, list(map(Repeat, times)), [Repeat(1)] * len(src))


def _pad(eqn: Any) -> Move:
    rows = [Pad(*row) for row in eqn.params["padding_config"]]
    return _along(eqn, rows, [Pad(0, 0, 0)] * len(rows))


def _all_gather(eqn: Any) -> Move | None:
    p = eqn.params
    step = Gather(p["axis_name"], p["axis_index_groups"], p["axis_size"])
    plain = p["tiled"] and len(eqn.invars) == 1
    along = {p["all_gather_dimension"]: step}
    return Move.whole(eqn, along) if plain else None


_VERBS: dict[str, Callable[[Any], Verb | None]] = {
    "dot_general": lambda e: Contract(e, *e.params["dimension_numbers"]),
    "ragged_dot_general": Route,
    "conv_general_dilated": Convolve,
    "gather": LookUp,
    "convert_element_type": Cast,
    "neg": Negate,
    "mul": Scale,
    "div": Scale,
    "reduce_sum": Sum,
    "add": Add,
    "add_any": Add,
    "concatenate": lambda e: Join(e, e.params["dimension"], new=False),
    # `jnp.stack`, a primitive since jax 0.10
    "stack": lambda e: Join(e, e.params["axis"], new=True),
    "optimization_barrier": Barrier,
    "copy": Same.whole,
    "stop_gradient": Same.whole,
    "pvary": Same.whole,
    "reduce_precision": Round.whole,
    "sharding_constraint": Said.whole,
    "name": Said.whole,
    "reshard": Said.whole,
    "layout_constraint": Said.whole,
    "transpose": lambda e: Move(e, tuple((k,) for k in e.params["permutation"])),
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "slice": _slice,
    "dynamic_slice": _slice_at,
    "split": _split,
    "tile": _tile,
    "rev": lambda e: Move.whole(e, dict.fromkeys(e.params["dimensions"], Reverse())),
    "pad": _pad,
    "all_gather": _all_gather,
    **dict.fromkeys(
        "abs integer_pow max min reduce_max rsqrt select_n sqrt square sub".split(),
        Compute,
    ),
}


# --- axes ----------------------------------------------------------------------------


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


def align(
    x: jax.Array, labels: Labels, wanted: Labels, loose: Labels = ()
) -> jax.Array:
    """Transposes to the wanted order of labels.  loose: those of size 1, which may as
    well stay where they are."""
    labels, wanted = list(labels), list(wanted)
    firm = lambda names: [k for k in names if k not in loose]
    if firm(labels) == firm(wanted):
        return x
    return lax.transpose(x, [labels.index(k) for k in wanted])
