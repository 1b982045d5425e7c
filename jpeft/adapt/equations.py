"""What an equation does, said once: the verbs that a value may meet.

    Contract, LookUp, Convolve, Route    a weight is consumed
    ByElement                            each value changes: Scale, Add, Cast, ...
    Reduce, Sum                          all values along an axis become one
    Join, Write                          several arrays become one
    Move                                 axes are moved about
    Call, Scan, While, Branch            there is a program inside

`read` turns an equation into one of them.  Rules answer verbs, and whoever follows a
value through a program asks for them, so what a primitive is called, and where its
parameters are, stands here and nowhere else.

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

from jpeft import compat
from jpeft.leaf import is_leaf

T = TypeVar("T")
Label = Hashable
Labels = Sequence[Label]


@dataclasses.dataclass(frozen=True, eq=False)
class Verb:
    """An equation, and what it does."""

    eqn: Any

    @property
    def only_moves(self) -> bool:
        """Whether the result has the values of the first operand, all of them, moved
        about or cast."""
        return False

    def carried(
        self, axes: Sequence[frozenset[T]]
    ) -> list[tuple[frozenset[T], ...]] | None:
        """What is kept for each axis of the first operand, as it is for each axis of
        every result.  None where they are not that operand's any longer."""
        return None


class Change(Verb):
    """Linear in what changes; its axes at most become fewer."""


class ByElement(Verb):
    """Each value is made of those that the operands have in its place."""


class _OfOne(Change, ByElement):
    """One operand, whose axes stay."""

    def carried(self, axes: Sequence[frozenset[T]]) -> list[tuple[frozenset[T], ...]]:
        return [tuple(axes)] * len(self.eqn.outvars)


class Cast(_OfOne):
    """To another dtype."""

    @property
    def only_moves(self) -> bool:
        return True

    @property
    def dtype(self) -> Any:
        return self.eqn.params["new_dtype"]


class Negate(_OfOne):
    pass


class Scale(Change, ByElement):
    """The product or quotient of two."""

    @property
    def divides(self) -> bool:
        return self.eqn.primitive.name == "div"


class Add(ByElement):
    """The sum of two."""


class Subtract(ByElement):
    """The first less the second."""


class Root(ByElement):
    """The square root, or one over it."""


class Bound(ByElement):
    """At most, or at least, what another operand is."""


class Order(ByElement):
    """Whether the first is less, or more, than the second."""


class Select(ByElement):
    """One of the other operands, as the first says."""


class Barrier(Verb):
    """Each operand as it is, once all of them are there."""

    def carried(self, axes: Sequence[frozenset[T]]) -> list[tuple[frozenset[T], ...]]:
        return [tuple(axes)] * len(self.eqn.outvars)


class SumOfShards(Verb):
    """Of each operand, over a mesh."""


class Pool(Verb):
    """Many values as one: those of a window, or (`Reduce`) all along some axes."""


@dataclasses.dataclass(frozen=True, eq=False)
class Reduce(Pool):
    """join: does the same to two values.  nothing: of a dtype, what may be joined to
    any value without a change of a single bit."""

    join: Callable[[Any, Any], Any]
    nothing: Callable[[Any], Any]

    @property
    def axes(self) -> tuple[int, ...]:
        return tuple(self.eqn.params["axes"])


class Sum(Change, Reduce):
    """Over some axes."""


class Look(Verb):
    """Something is told of the operand that is none of its values: where the largest
    is, what a callback is shown."""


class Draw(Verb):
    """Random bits."""


@dataclasses.dataclass(frozen=True, eq=False)
class Write(Verb):
    """Values put into the first operand, where indices say.

    replaces: whether they stand for those that were there.
    """

    replaces: bool

    @property
    def axes(self) -> dict[int, int]:
        """Of axes of what is written, those of the first operand it lies along."""
        ndim, numbers = len(_source(self.eqn)), self.eqn.params.get("dimension_numbers")
        if numbers is None:
            return {k: k for k in range(ndim)}
        gone = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
        window = [k for k in range(ndim) if k not in gone]
        return dict(zip(numbers.update_window_dims, window, strict=True))


@dataclasses.dataclass(frozen=True, eq=False)
class Join(Verb):
    """Operands side by side.  new: along an axis that they do not have."""

    axis: int
    new: bool


# --- consumption ---------------------------------------------------------------------


class Consume(Verb):
    """A weight meets what is no weight."""

    def roles(self, operand: int) -> list[str] | None:
        """What each axis of an operand is in it, "i", "s" or "o"; None if that operand
        is never a weight."""
        return None

    @property
    def made_of(self) -> list[tuple[tuple[int, int], ...]]:
        """The axes of operands, as (operand, axis), that each of the result's is."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, eq=False)
class Contract(Consume):
    """The sum of products of two operands, over the axes that are contracted.

    contracting, batch: of either operand, its axes.
    """

    contracting: tuple[tuple[int, ...], tuple[int, ...]]
    batch: tuple[tuple[int, ...], tuple[int, ...]]

    @property
    def sums_all(self) -> bool:
        """Whether nothing is left of one operand: the mean of squares as a product."""
        pairs = zip(self.contracting, self.batch, self.eqn.invars, strict=True)
        return any(s and len(s) + len(b) == len(v.aval.shape) for s, b, v in pairs)

    @property
    def options(self) -> dict[str, Any]:
        """How the product is to be computed, and where it goes."""
        names = ("precision", "preferred_element_type", "out_sharding")
        return {n: self.eqn.params.get(n) for n in names}

    def role(self, side: int, axis: int) -> str:
        """What an axis of an operand is in it: "i", "s" or "o"."""
        summed, each = axis in self.contracting[side], axis in self.batch[side]
        return "i" if summed else "s" if each else "o"

    def roles(self, operand: int) -> list[str]:
        axes = range(len(self.eqn.invars[operand].aval.shape))
        return [self.role(operand, k) for k in axes]

    @property
    def made_of(self) -> list[tuple[tuple[int, int], ...]]:
        pairs = zip(*self.batch, strict=True)
        free = [((w, k),) for w in (0, 1) for k in _at("o", self.roles(w))]
        return [*(((0, j), (1, k)) for j, k in pairs), *free]

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

    def roles(self, operand: int) -> list[str] | None:
        axes = range(len(self.eqn.invars[1].aval.shape))
        return ["o" if k == self.out else "i" for k in axes] if operand == 1 else None

    @property
    def made_of(self) -> list[tuple[tuple[int, int], ...]]:
        axes, feature = range(len(_source(self.eqn))), self.numbers.out_spec[1]
        return [((1, self.out),) if k == feature else () for k in axes]

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

    def roles(self, operand: int) -> list[str] | None:
        axes = range(len(self.eqn.invars[1].aval.shape))
        return list(map(self.role, axes)) if operand == 1 else None

    @property
    def made_of(self) -> list[tuple[tuple[int, int], ...]]:
        own = [((1, k),) for k in _at("o", self.roles(1) or [])]
        return [()] * (len(self.eqn.outvars[0].aval.shape) - len(own)) + own

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


def _at(role: str, roles: Sequence[str]) -> list[int]:
    return [k for k, r in enumerate(roles) if r == role]


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
    def only_moves(self) -> bool:
        return self.step is None

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
    """The operand as it is, or a copy."""

    @property
    def is_operand(self) -> bool:
        """Whether the operand may stand for the result.  A mesh may give the result a
        type of its own."""
        return self.eqn.invars[0].aval == self.eqn.outvars[0].aval


@dataclasses.dataclass(frozen=True, eq=False)
class Said(Same):
    """Something is said of the operand alone: a name, where it is to be."""


@dataclasses.dataclass(frozen=True, eq=False)
class Placed(Said):
    """The devices that it is to be on, which is a wish."""


@dataclasses.dataclass(frozen=True, eq=False)
class Stop(Same):
    """Without its gradient."""

    @property
    def is_operand(self) -> bool:
        return False


@dataclasses.dataclass(frozen=True, eq=False)
class Round(Same):
    """Fewer bits, the same dtype."""

    @property
    def is_operand(self) -> bool:
        return False


# --- programs inside -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Call(Verb):
    """A program on the last operands, whose outputs are the equation's."""

    jaxpr: Any
    consts: Sequence[Any]

    @property
    def first(self) -> int:
        """Of the operands that enter."""
        return len(self.eqn.invars) - len(self.jaxpr.invars)

    @property
    def given(self) -> Sequence[Any]:
        """The variables that enter."""
        return self.eqn.invars[self.first :]


class Jit(Call):
    """One that could as well stand in the program around it."""

    @property
    def name(self) -> str:
        return str(self.eqn.params.get("name"))


class OnShards(Call):
    """One on the shards of a mesh."""

    def as_cut(self, operand: int, result: int) -> bool:
        """Whether an operand is cut as a result is put together."""
        p = self.eqn.params
        return p["in_specs"][operand] == p["out_specs"][result]


class Scan(Verb):
    """A program on each row of some operands, one after the other.

    Operands: constants, what a step hands to the next one, what has rows.  Results: the
    latter two.
    """

    @property
    def counts(self) -> tuple[int, int]:
        """Of constants, and of what is handed on."""
        return compat.scan_counts(self.eqn)

    @property
    def body(self) -> Any:
        return compat.open_jaxpr(self.eqn.params["jaxpr"])[0]


class While(Verb):
    """A program for as long as another one says.

    Operands: constants of the test, those of the body, what a step hands to the next.
    """

    @property
    def counts(self) -> tuple[int, int]:
        """Of the constants."""
        return self.eqn.params["cond_nconsts"], self.eqn.params["body_nconsts"]

    @property
    def test(self) -> Any:
        return compat.open_jaxpr(self.eqn.params["cond_jaxpr"])[0]

    @property
    def body(self) -> Any:
        return compat.open_jaxpr(self.eqn.params["body_jaxpr"])[0]


class Branch(Verb):
    """One of several programs on the other operands, as the first says."""

    @property
    def branches(self) -> list[tuple[Any, Sequence[Any]]]:
        """Programs, and their constants."""
        return list(map(compat.open_jaxpr, self.eqn.params["branches"]))


# --- what each primitive is ----------------------------------------------------------


def read(eqn: Any) -> Verb | None:
    """What the equation does; None if it is none of the verbs."""
    reader = _VERBS.get(eqn.primitive.name)
    return None if reader is None else reader(eqn)


def only_moves(eqn: Any) -> bool:
    """See `Verb.only_moves`."""
    verb = read(eqn)
    return verb is not None and verb.only_moves


def adds(eqn: Any) -> bool:
    """Whether it is an `Add`, without reading all the others of a program."""
    return _VERBS.get(eqn.primitive.name) is Add


def varying(var: Any, made_by: Callable[[Any], Verb | None]) -> set[int]:
    """The axes along which a value really varies: not those along which it was repeated
    before.  made_by: what made a variable, where that is known."""
    verb = None if isinstance(var, compat.Literal) else made_by(var)
    if verb is None or not verb.only_moves:
        shape = getattr(var.aval, "shape", ())  # a token has none
        return {k for k, n in enumerate(shape) if n > 1}
    was = varying(verb.eqn.invars[0], made_by)
    axes = [frozenset({k} & was) for k in range(len(_source(verb.eqn)))]
    (moved,) = verb.carried(axes)  # type: ignore[misc]
    return {k for k, held in enumerate(moved) if held}


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


def _power(eqn: Any) -> Verb:
    by = eqn.invars[1]
    half = isinstance(by, compat.Literal) and abs(float(by.val)) == 0.5
    return Root(eqn) if half else ByElement(eqn)


def _call(eqn: Any) -> Verb | None:
    name, kinds = eqn.primitive.name, {compat.JIT: Jit, "shard_map": OnShards}
    if compat.CALLS[name] not in eqn.params:
        return None
    program = compat.open_jaxpr(eqn.params[compat.CALLS[name]])
    return kinds.get(name, Call)(eqn, *program)


def _least(dtype: Any) -> Any:
    if jnp.issubdtype(dtype, jnp.floating):
        return -jnp.inf
    return dtype != jnp.bool_ and jnp.iinfo(dtype).min


def _most(dtype: Any) -> Any:
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.inf
    return dtype == jnp.bool_ or jnp.iinfo(dtype).max


def _reduces(
    join: Callable[[Any, Any], Any],
    nothing: Callable[[Any], Any],
    verb: type[Reduce] = Reduce,
) -> Callable[[Any], Verb]:
    return lambda eqn: verb(eqn, join, nothing)


_Reader = Callable[[Any], Verb | None]


def _all(names: str, reader: _Reader) -> dict[str, _Reader]:
    return dict.fromkeys(names.split(), reader)


_VERBS: dict[str, _Reader] = {
    "dot_general": lambda e: Contract(e, *e.params["dimension_numbers"]),
    "ragged_dot_general": Route,
    "conv_general_dilated": Convolve,
    "gather": LookUp,
    # by element: not what takes complex numbers apart, whose halves are two features
    **_all(
        "abs acos acosh and asin asinh atan atan2 atanh cbrt ceil cos cosh digamma eq "
        "erf erf_inv erfc exp exp2 expm1 floor integer_pow is_finite lgamma log log1p "
        "logistic ne nextafter not or rem round sign sin sinh square tan tanh xor",
        ByElement,
    ),
    "convert_element_type": Cast,
    "neg": Negate,
    **_all("mul div", Scale),
    **_all("add add_any", Add),
    "sub": Subtract,
    **_all("sqrt rsqrt", Root),
    "pow": _power,
    **_all("max min clamp", Bound),
    **_all("lt le gt ge", Order),
    "select_n": Select,
    # many as one
    "reduce_sum": _reduces(lax.add, lambda _: -0.0, Sum),
    "reduce_prod": _reduces(lax.mul, lambda _: 1),
    "reduce_max": _reduces(lax.max, _least),
    "reduce_min": _reduces(lax.min, _most),
    "reduce_and": _reduces(lax.bitwise_and, lambda _: -1),
    "reduce_or": _reduces(lax.bitwise_or, lambda _: 0),
    "reduce_xor": _reduces(lax.bitwise_xor, lambda _: 0),
    **_all("reduce_window_sum reduce_window_max reduce_window_min", Pool),
    **_all("psum psum_invariant", SumOfShards),
    **_all("argmax argmin debug_callback debug_print", Look),
    **_all("random_bits threefry2x32 rng_bit_generator rng_uniform", Draw),
    # several as one
    "concatenate": lambda e: Join(e, e.params["dimension"], new=False),
    # `jnp.stack`, a primitive since jax 0.10
    "stack": lambda e: Join(e, e.params["axis"], new=True),
    **_all("dynamic_update_slice scatter", lambda e: Write(e, replaces=True)),
    **_all(
        "scatter-add scatter-sub scatter-mul scatter-min scatter-max",
        lambda e: Write(e, replaces=False),
    ),
    # as it is
    "optimization_barrier": Barrier,
    **_all("copy pvary", Same.whole),
    "stop_gradient": Stop.whole,
    "reduce_precision": Round.whole,
    "sharding_constraint": Placed.whole,
    **_all("name reshard layout_constraint", Said.whole),
    # moved about
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
    # programs inside
    **dict.fromkeys(compat.CALLS, _call),
    "scan": Scan,
    "while": While,
    "cond": Branch,
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
