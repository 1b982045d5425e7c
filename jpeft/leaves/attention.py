"""Learned keys and values carried through a model's own attention.

A prefix is P more keys and values in every attention.  They are never put beside the
real ones: the projection's output is `Tagged` with them, and where it is scored the
scores are kept in two parts (`Extended`), until the product with the values:

    s = [q.K | q.P_k]     w = softmax(s)     o = w_real.V + w_prefix.P_v

What the model does to real keys (rotary positions, norms, biases, caches) is done to
them alone; learned keys enter after it, as in Li & Liang's cache.  What it does to the
scores (scales, soft caps, softmax) is done to both parts; a mask or a position bias has
no column for the prefix, whose scores it leaves as they are.

`columns` says which feature of the payload each feature of the value is: an integer
array that broadcasts to the value, moved about by NumPy as the value is by JAX.  So
fused projections, grouped heads, heads folded into the batch and partial rotary parts
need no case of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jpeft import compat
from jpeft.adapt.equations import (
    Add,
    Barrier,
    ByElement,
    Contract,
    Gather,
    Join,
    Label,
    Look,
    Move,
    Pad,
    Placed,
    Pool,
    Reduce,
    Same,
    Scale,
    Select,
    Slice,
    Split,
    Subtract,
    Verb,
    Write,
    align,
    read,
)
from jpeft.adapt.interpreter import Interpreter, settled
from jpeft.adapt.labels import contract
from jpeft.leaf import Carried, carried, frozen, is_carried, static
from jpeft.types import PromiseError

KEY, VALUE = "keys", "values"
BOTH = "keys and values"  # of one projection that makes the two
ELSEWHERE = (
    "; a model of token ids may take jpeft.prefix(..., mode='tokens'), any other "
    "exclude= the sub-layer"
)


def where_on(on: Any, x: Any, off: Any) -> Any:
    """x, or the number `off` where a prefix is switched off: nothing of x is there,
    neither its value nor its gradient, be they infinite.

    By one predicate: a mask of the size of x would be kept for the backward pass.
    """
    return x if on is None else lax.select_n(on > 0, jnp.full_like(x, off), x)


class Index:
    """A small integer array as static data: hashed and compared by content."""

    __slots__ = ("array", "_hash")

    def __init__(self, array: Any):
        self.array = np.asarray(array, np.int32)
        self._hash = hash((self.array.shape, self.array.tobytes()))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Index) and np.array_equal(self.array, other.array)

    def __repr__(self) -> str:
        return f"Index{self.array.shape}"


# --- keys and values that owe a prefix -----------------------------------------------


@carried
class Tagged(Carried):
    """A key or a value (or a fused projection not yet cut) that owes a prefix.

    main: the real ones.  keys, values: (P, features), or (examples, P, features).
    columns: for each feature of `main`: the payload's feature, those of `values`
    counted after those of `keys`; -1 for others (queries).  whole: `columns` before
    each cut along the features, for when the pieces are put together again.
    examples: for each element of `main`, its example, if each has a prefix of its own.
    order: for each element of `main`, its place along the axis that stood before the
    features where it was made, as far as that is known.
    shared: keys and values are the same features.
    on: 1, or 0 where the prefix is switched off.
    """

    main: Any = frozen()
    keys: Any = frozen()
    values: Any = frozen()
    on: Any = frozen()
    columns: Index = static()
    whole: tuple[Index, ...] = static(default=())
    examples: Index | None = static(default=None)
    order: Index | None = static(default=None)
    shared: bool = static(default=False)
    name: str = static(default="")

    def settle(self) -> Any:
        return self.main

    def as_constant(self, it: Interpreter, eqn: Any) -> Any:
        raise it.no_derivative(eqn, self.name, f"a prefix owed by {self.role or KEY}")

    def on_value(self, f: Callable[[Any], Any]) -> Any:
        return self.replace(main=f(self.main))

    @property
    def role(self) -> str | None:
        """KEY, VALUE or BOTH; None while it holds more than that."""
        n = self.first(VALUE)
        low, high = self.columns.array.min(), self.columns.array.max()
        if low < 0:
            return None
        if self.shared:
            return BOTH
        return KEY if high < n else VALUE if low >= n else None

    def first(self, role: str) -> int:
        """Where the features of this role begin in `columns`."""
        if role == KEY or self.shared or self.keys is None:
            return 0
        return self.keys.shape[-1]

    def moved(self, main: Any, f: Callable[[np.ndarray], np.ndarray]) -> Any:
        """Over `main`, which was moved as `f` moves an array that broadcasts to it."""
        columns = Index(f(self.columns.array))
        if (columns.array < 0).all():
            return main
        whole = self.whole
        if columns.array.size != self.columns.array.size and self.role is not None:
            whole = (*whole, self.columns)
        examples = self.examples and Index(f(self.examples.array))
        return self.replace(
            main=main,
            columns=columns,
            whole=whole,
            examples=examples,
            order=self._followed(f),
        )

    def _followed(self, f: Callable[[np.ndarray], np.ndarray]) -> Index | None:
        """`order` as it is moved.  It is a hint: where it is lost it is given up."""
        if self.order is None or not _fits(self.order.array, self.main):
            return None
        try:
            return Index(f(self.order.array))
        except (PromiseError, _Lost):
            return None

    def through(self, it: Interpreter, eqn: Any, ins: list[Any]) -> Any:
        verb = read(eqn)
        if isinstance(verb, Contract):
            return _attend(it, verb, ins)
        if isinstance(verb, Look):  # a norm's mean, a check, a log
            return None
        tagged = [x for x in ins if isinstance(x, Tagged)]
        if any(isinstance(x, Extended) for x in ins) or any(
            x.role != self.role for x in tagged
        ):
            return self._lost(it, eqn)
        plain = [settled(x) for x in ins]
        if isinstance(verb, Barrier):
            return [
                x.replace(main=y) if is_carried(x) else y
                for x, y in zip(ins, it.native(eqn)(*plain), strict=True)
            ]
        pads = isinstance(verb, Move) and verb.step is Pad
        if pads or isinstance(verb, (ByElement, Same)):
            y = it.native(eqn)(*plain)
            return self.replace(main=y) if _spans(self, y) else self._lost(it, eqn)
        if isinstance(verb, Write) and verb.replaces:
            return self._into(it, verb, ins, plain) or self._lost(it, eqn)
        if isinstance(verb, Join):
            return self._together(it, verb, ins, plain) or self._lost(it, eqn)
        if isinstance(verb, Reduce):
            gone = verb.axes
            if any(self.main.shape[k] != 1 for k in gone):
                return None
            # einsum sums an axis of size 1
            return self.moved(it.native(eqn)(*plain), lambda a: a.squeeze(gone))
        if isinstance(verb, Pool):
            return None
        if not isinstance(verb, Move) or verb.step is Gather:
            return self._lost(it, eqn)
        y, move = it.native(eqn)(*plain), verb
        if not eqn.primitive.multiple_results:
            return self.moved(y, lambda a: _columns_after(move, a, 0))
        return [
            self.moved(part, lambda a, k=k: _columns_after(move, a, k))
            for k, part in enumerate(y)
        ]

    def _lost(self, it: Interpreter, eqn: Any) -> Any:
        role = self.role or "keys or values"
        raise PromiseError(
            f"{self.name}: prefix in mode 'kv': the model's {role} go into "
            f"`{eqn.primitive.name}` at {it.site(eqn)}, where a prefix cannot be "
            f"carried along{ELSEWHERE}"
        )

    def _into(
        self, it: Interpreter, write: Write, ins: list[Any], plain: list[Any]
    ) -> Any:
        """Written into a cache: what is read from there owes the prefix."""
        y, along = it.native(write.eqn)(*plain), write.axes

        def f(a: np.ndarray) -> np.ndarray:
            if any(n > 1 and k not in along for k, n in enumerate(a.shape)):
                raise _Lost
            sizes = {along[k]: a.shape[k] for k in along}
            return a.reshape([sizes.get(k, 1) for k in range(y.ndim)])

        try:
            made = self.replace(main=y) if ins[0] is self else self.moved(y, f)
        except _Lost:
            return None
        return made if _spans(made, y) else None

    def _together(
        self, it: Interpreter, join: Join, ins: list[Any], plain: list[Any]
    ) -> Any:
        """Pieces side by side: halves of rotated keys, a cache and what is new."""
        parts = [x for x in ins if isinstance(x, Tagged)]
        y = it.native(join.eqn)(*plain)
        axis, stacked = join.axis % y.ndim, join.new
        lift = lambda a: np.expand_dims(a, axis) if stacked else a
        columns = [lift(x.columns.array) for x in parts]
        examples = self.examples and Index(lift(self.examples.array))
        kept = {"main": y, "examples": examples, "order": self._followed(lift)}
        alike = all(np.array_equal(a, columns[0]) for a in columns)
        if alike and not stacked and columns[0].shape[axis] == 1:
            return self.replace(**kept, columns=Index(columns[0]))
        # Along the features.
        if len(parts) < len(ins):
            return None
        a = columns[0]
        shape = [
            y.shape[k] if k == axis or a.shape[k] > 1 else 1 for k in range(y.ndim)
        ]
        for k in reversed(range(len(self.whole))):
            if self.whole[k].array.size == math.prod(shape):
                # All that was cut is there again, in its places.
                back = Index(self.whole[k].array.reshape(shape))
                return self.replace(**kept, columns=back, whole=self.whole[:k])
        if stacked:
            return self.replace(**kept) if alike else None
        wide = [
            np.broadcast_to(
                a,
                [x.shape[axis] if k == axis else n for k, n in enumerate(a.shape)],
            )
            for a, x in zip(columns, parts, strict=True)
        ]
        joined = Index(np.concatenate(wide, axis))
        return self.replace(**kept, columns=joined)


class _Lost(Exception):
    """Features were spread where columns cannot follow."""


def _spans(t: Tagged, y: Any) -> bool:
    """Whether the columns still describe `y`."""
    return _fits(t.columns.array, y)


def _fits(a: np.ndarray, y: Any) -> bool:
    """Whether an array broadcasts to `y`."""
    return a.ndim == jnp.ndim(y) and all(
        n in (1, m) for n, m in zip(a.shape, y.shape, strict=True)
    )


def _columns_after(move: Move, a: np.ndarray, result: int) -> np.ndarray:
    moved = move.done_to_columns(a, result)
    if moved is None:
        raise PromiseError(
            "a prefix in mode 'kv' met a dynamic slice along the features of a key; "
            "use jpeft.prefix(..., mode='tokens')"
        )
    return moved


# --- scores in two parts -------------------------------------------------------------


@carried
class Extended(Carried):
    """Scores (or weights) of the real keys, and beside them those of the prefix.

    main, extra: equal shapes but for `axis`, the axis of the keys.  sinks: how many
    scores of no key stand before and behind those of the keys in `main`.

    Where the prefix is switched off (`on` 0) extra starts at one and meets ones, so
    that it stays finite whatever the model does to its scores, and nothing of it is
    joined to the others.
    """

    main: Any = frozen()
    extra: Any = frozen()
    on: Any = frozen()
    axis: int = static()
    sinks: tuple[int, int] = static(default=(0, 0))
    name: str = static(default="")

    def settle(self) -> Any:
        return self.main

    def as_constant(self, it: Interpreter, eqn: Any) -> Any:
        raise it.no_derivative(eqn, self.name, "the scores of a prefix")

    def through(self, it: Interpreter, eqn: Any, ins: list[Any]) -> Any:
        verb = read(eqn)
        if isinstance(verb, Contract):
            return _attend(it, verb, ins)
        if isinstance(verb, Barrier):
            return list(lax.optimization_barrier(ins))
        if isinstance(verb, Select):
            return self._select(it, eqn, ins)
        if isinstance(verb, (ByElement, Same)):
            return self._elementwise(it, verb, ins)
        if isinstance(verb, Reduce):
            return self._reduce(it, verb)
        if isinstance(verb, Move) and verb.step is None:
            return self._reshape(it, verb) if verb.regroups else self._moved(it, verb)
        if isinstance(verb, Join) and not verb.new:
            return self._beside(it, verb, ins)
        if isinstance(verb, Move) and verb.step is Pad:
            return self._padded(it, verb, ins)
        if isinstance(verb, Move) and verb.step in (Slice, Split):
            return self._cut(it, verb)
        return self._refuse(it, eqn, "has no meaning for scores in two parts")

    def _refuse(self, it: Interpreter, eqn: Any, why: str) -> Any:
        raise PromiseError(
            f"{self.name}: prefix in mode 'kv': `{eqn.primitive.name}` on attention "
            f"scores at {it.site(eqn)} {why}{ELSEWHERE}"
        )

    def _moved(self, it: Interpreter, move: Move) -> Any:
        axis = next((k for k, held in enumerate(move.of) if self.axis in held), None)
        if axis is None:
            return self._refuse(it, move.eqn, "drops the axis of the keys")
        if move.shape[axis] != self.main.shape[self.axis]:
            return self._refuse(it, move.eqn, "repeats the axis of the keys")
        # The prefix's keys are counted along an axis of their own.
        old: list[Label] = list(range(self.main.ndim))
        new: list[Label] = list(range(len(move.shape)))
        old[self.axis] = new[axis] = KEY
        extra = move.done_to(self.extra, old, new)
        return self.replace(main=it.native(move.eqn)(self.main), extra=extra, axis=axis)

    def _constant(self, it: Interpreter, var: Any, x: Any) -> Any:
        """An operand that is one value along the keys (softmax's maximum and sum), cut
        down to it; None if it is not."""
        if jnp.ndim(x) == 0:
            return x
        if self.axis in it.varying(var):
            return None
        return lax.slice_in_dim(x, 0, 1, axis=self.axis)

    def _elementwise(self, it: Interpreter, verb: Verb, ins: list[Any]) -> Any:
        eqn = verb.eqn
        main = it.native(eqn)(*map(settled, ins))
        others = []
        for k, x in enumerate(ins):
            if isinstance(x, Extended):
                others.append(x.extra)
                continue
            one = self._constant(it, eqn.invars[k], settled(x))
            if one is None:
                # A mask, a position bias, a dropout mask: nothing to the prefix.
                first = ins[0] is self
                times = isinstance(verb, Scale) and not verb.divides
                less = first and isinstance(verb, (Subtract, Scale))
                if not (times or less or isinstance(verb, Add)):
                    return self._refuse(it, eqn, "has no neutral value for the prefix")
                extra = self.extra.astype(main.dtype)
                return self.replace(main=main, extra=extra)
            others.append(self._met(eqn.invars[k], one))
        # As wide as the model had them: a sum spread over the keys would be kept so for
        # the backward pass.
        wide = [
            x if jnp.shape(y) == jnp.shape(x) else self._spread(x)
            for x, y in zip(others, map(settled, ins), strict=True)
        ]
        # The prefix's part has another shape, which may not fit on those devices.
        extra = wide[0] if isinstance(verb, Placed) else it.native(eqn)(*wide)
        return self.replace(main=main, extra=extra)

    def _met(self, var: Any, x: Any) -> Any:
        """A value that meets the prefix's scores; they may not spoil its gradient."""
        return x if isinstance(var, compat.Literal) else where_on(self.on, x, 1)

    def _spread(self, x: Any) -> Any:
        """One value along the keys, repeated for the prefix's."""
        if jnp.ndim(x) == 0 or x.shape == self.extra.shape:
            return x
        shape = list(x.shape)
        shape[self.axis] = self.extra.shape[self.axis]
        return jnp.broadcast_to(x, shape)

    def _select(self, it: Interpreter, eqn: Any, ins: list[Any]) -> Any:
        main = it.native(eqn)(*map(settled, ins))
        which, *cases = ins
        mine = [x for x in cases if isinstance(x, Extended)]
        if not isinstance(which, Extended):
            if len(mine) == 1:
                return self.replace(main=main, extra=mine[0].extra)
            one = self._constant(it, eqn.invars[0], which)
            if one is None:
                return self._refuse(it, eqn, "chooses between two scores by key")
            pick = jnp.broadcast_to(one, self.extra.shape)
            return self.replace(
                main=main, extra=lax.select_n(pick, *(x.extra for x in mine))
            )
        found = []
        for k, x in enumerate(cases):
            if isinstance(x, Extended):
                found.append(x.extra)
                continue
            one = self._constant(it, eqn.invars[k + 1], settled(x))
            if one is None:
                return self._refuse(it, eqn, "takes another value for each key")
            one = self._met(eqn.invars[k + 1], one)
            found.append(jnp.broadcast_to(one, which.extra.shape))
        return self.replace(main=main, extra=lax.select_n(which.extra, *found))

    def _reduce(self, it: Interpreter, over: Reduce) -> Any:
        eqn, gone = over.eqn, over.axes
        main, extra = it.native(eqn)(self.main), self.extra
        if self.axis not in gone:
            axis = self.axis - sum(k < self.axis for k in gone)
            return self.replace(main=main, extra=it.native(eqn)(extra), axis=axis)
        other = it.native(eqn)(extra)
        other = where_on(self.on, other, over.nothing(other.dtype))
        return over.join(main, other)

    def _beside(self, it: Interpreter, join: Join, ins: list[Any]) -> Any:
        """Columns that are no keys' (sinks, scores of nothing) are of the real part."""
        at = next(k for k, x in enumerate(ins) if x is self)
        size = lambda xs: sum(jnp.shape(x)[self.axis] for x in xs)
        alone = sum(isinstance(x, Extended) for x in ins) == 1
        fits = alone and join.axis == self.axis
        more = (size(ins[:at]), size(ins[at + 1 :])) if fits else None
        return self._with_sinks(it, join.eqn, ins, more)

    def _padded(self, it: Interpreter, move: Move, ins: list[Any]) -> Any:
        pad = move.along.get(self.axis, Pad(0, 0, 0))
        fits = set(move.along) <= {self.axis} and not pad.inner
        fits = fits and ins[0] is self and not isinstance(ins[1], Extended)
        more = (pad.low, pad.high) if fits and min(pad.low, pad.high) >= 0 else None
        return self._with_sinks(it, move.eqn, ins, more)

    def _with_sinks(
        self, it: Interpreter, eqn: Any, ins: list[Any], more: tuple[int, int] | None
    ) -> Any:
        """more: how many come before and behind; None where they lie elsewhere."""
        if more is None:
            return self._refuse(it, eqn, "has no meaning for scores in two parts")
        main = it.native(eqn)(*map(settled, ins))
        sinks = (self.sinks[0] + more[0], self.sinks[1] + more[1])
        return self.replace(main=main, extra=self.extra.astype(main.dtype), sinks=sinks)

    def _cut(self, it: Interpreter, move: Move) -> Any:
        """Sinks are cut off again, before the sum with the values."""
        eqn, own = move.eqn, move.along.get(self.axis)
        if move.step is Split:
            mains = it.native(eqn)(self.main)
            if own is None:
                pairs = zip(mains, it.native(eqn)(self.extra), strict=True)
                return [self.replace(main=x, extra=y) for x, y in pairs]
            ends = np.cumsum((0, *own.sizes)).tolist()
            pieces = zip(mains, ends[:-1], ends[1:], strict=True)
            return [self._piece(it, eqn, x, a, b, 1) for x, a, b in pieces]
        others = {k: step for k, step in move.along.items() if k != self.axis}
        cut = self.replace(extra=Slice.done(self.extra, others, ()))
        main = it.native(eqn)(self.main)
        if own is None:
            return cut.replace(main=main)
        return cut._piece(it, eqn, main, own.start, own.stop, own.step)

    def _piece(
        self, it: Interpreter, eqn: Any, main: Any, start: int, limit: int, stride: int
    ) -> Any:
        """What scores from `start` to `limit` are: those of all keys, or of none."""
        first, end = self.sinks[0], self.main.shape[self.axis] - self.sinks[1]
        if limit <= first or start >= end:
            return main
        if (start, limit, stride) != (first, end, 1):
            return self._refuse(it, eqn, "keeps the scores of some keys only")
        return self.replace(main=main, sinks=(0, 0))

    def _reshape(self, it: Interpreter, move: Move) -> Any:
        src, dst = self.main.shape, move.shape
        before = math.prod(src[: self.axis])
        fits = [
            k
            for k, n in enumerate(dst)
            if n == src[self.axis] and math.prod(dst[:k]) == before
        ]
        if not fits or move.order != sorted(move.order):
            return self._refuse(it, move.eqn, "merges the axis of the keys")
        axis = fits[-1] if src[self.axis] > 1 else min(fits, key=self._near)
        shape = list(dst)
        shape[axis] = self.extra.shape[self.axis]
        main, extra = it.native(move.eqn)(self.main), self.extra.reshape(shape)
        return self.replace(main=main, extra=extra, axis=axis)

    def _near(self, k: int) -> int:
        return abs(k - self.axis)


# --- where they meet -----------------------------------------------------------------


def _attend(it: Interpreter, verb: Contract, ins: list[Any]) -> Any:
    """The scores of a tagged key, or the sum of tagged values."""
    if any(isinstance(x, Extended) for x in ins):
        side = 0 if isinstance(ins[0], Extended) else 1
        return _sum_values(it, verb, ins, side)
    for side, t in enumerate(ins):
        if isinstance(t, Tagged) and t.role in (KEY, BOTH):
            return _scores(it, verb, ins, side) or t._lost(it, verb.eqn)
    return next(t for t in ins if isinstance(t, Tagged))._lost(it, verb.eqn)


def _scores(it: Interpreter, verb: Contract, ins: list[Any], side: int) -> Any:
    t, q = ins[side], settled(ins[1 - side])
    if not all(_features(t, k) for k in verb.contracting[side]):
        return None  # not over the features of the keys
    free = [k for k in range(t.main.ndim) if verb.role(side, k) == "o"]
    seq = [k for k in free if _still(t, k)]
    if len(seq) > 1 and t.order is not None and _fits(t.order.array, t.main):
        # Queries of all examples alike: the sum with the values will tell if not so.
        seq = [k for k in seq if t.order.array.shape[k] > 1]
    if len(seq) != 1:
        return None
    ql, out = verb.labels(side, t.main.ndim, q.ndim)
    each = [k for k in free if k not in seq and _still(t, k)]
    each = (*verb.batch[side], *each)
    payload, labels = _for_each(t, each, *_payload(t, KEY, seq[0]))
    main = it.native(verb.eqn)(*map(settled, ins))
    extra, xl = contract(q, ql, payload.astype(t.main.dtype), labels, out, **_how(verb))
    it.ledger.pay((str.__str__(t.name), KEY))
    it.noted(KEY, t, seq[0])
    return Extended(
        main=main,
        extra=where_on(t.on, align(extra, xl, out).astype(main.dtype), 1),
        on=t.on,
        axis=out.index(seq[0]),
        name=t.name,
    )


def _sum_values(it: Interpreter, verb: Contract, ins: list[Any], side: int) -> Any:
    w, t = ins[side], ins[1 - side]
    eqn, sums, batch = verb.eqn, verb.contracting, verb.batch
    if isinstance(t, Extended):
        return w._refuse(it, eqn, "multiplies two tables of scores")
    if w.axis not in sums[side]:
        if w.axis in batch[side]:
            return w._refuse(it, eqn, "has the keys as a batch axis")
        # Scores times something else (a relative position): each part by itself.
        other = settled(t)
        ol, out = verb.labels(side, w.main.ndim, other.ndim)
        main = it.native(eqn)(*map(settled, ins))
        extra, xl = contract(
            w.extra, list(range(w.main.ndim)), other, ol, out, **_how(verb)
        )
        extra = align(extra, xl, out).astype(main.dtype)
        return w.replace(main=main, extra=extra, axis=out.index(w.axis))
    if not isinstance(t, Tagged) or t.role not in (VALUE, BOTH):
        return w._refuse(it, eqn, "sums values that carry no prefix")
    seq = sums[1 - side][sums[side].index(w.axis)]
    if not _still(t, seq):
        return w._refuse(it, eqn, "sums over the features of the values")
    wl, out = verb.labels(1 - side, t.main.ndim, w.main.ndim)
    payload, labels = _for_each(t, batch[1 - side], *_payload(t, VALUE, seq))
    main = it.native(eqn)(*map(settled, ins))
    extra, xl = contract(
        w.extra.astype(w.main.dtype),
        wl,
        payload.astype(t.main.dtype),
        labels,
        out,
        **_how(verb),
    )
    it.ledger.pay((str.__str__(t.name), VALUE))
    it.noted(VALUE, t, seq)
    # Along an axis of `main` that only repeats the values, so are the prefix's.
    order = [k for k in out if k in xl]
    sizes = dict(zip(xl, extra.shape, strict=True))
    extra = align(extra, xl, order).reshape([sizes.get(k, 1) for k in out])
    extra = where_on(t.on, extra.astype(main.dtype), -0.0)
    return main + jnp.broadcast_to(extra, main.shape)


def _how(verb: Contract) -> dict[str, Any]:
    return {k: v for k, v in verb.options.items() if k != "out_sharding"}


def _features(t: Tagged, axis: int) -> bool:
    return t.columns.array.shape[axis] > 1 or t.main.shape[axis] == 1


def _still(t: Tagged, axis: int) -> bool:
    """Whether neither features nor examples vary along an axis."""
    arrays = [t.columns.array] + ([t.examples.array] if t.examples else [])
    return all(a.shape[axis] == 1 for a in arrays)


def _payload(t: Tagged, role: str, seq: int) -> tuple[jax.Array, list[Label]]:
    """The prefix laid out as `t.main` is, with P positions along `seq`, and the axes it
    has: axes along which it would only be repeated are left out."""
    table = where_on(t.on, t.keys if role == KEY else t.values, 0)
    axes: Sequence[int] = [k for k in range(t.main.ndim) if not _still(t, k)]
    squeeze = lambda a: a.reshape([a.shape[k] for k in axes])
    columns = squeeze(t.columns.array) - t.first(role)
    if t.examples is None:
        out = _columns_of(table, columns)  # (P, ...)
    else:
        out = _rows_of_each(jnp.moveaxis(table, 1, 0), t.examples.array, axes, columns)
    return out, [seq, *axes]


def _for_each(
    t: Tagged, batch: Sequence[int], payload: jax.Array, labels: list[Label]
) -> tuple[jax.Array, list[Label]]:
    """The prefix repeated along the axes that the product goes through one by one.

    It is small.  Without it, the product would go through fewer axes than that with the
    real keys, and want queries and weights in a layout of its own: a copy of them.
    """
    spec = jax.typeof(t.main).sharding.spec  # of an explicit mesh: left as it is there
    new = [k for k in batch if k not in labels and spec[k] is None]
    sizes = [t.main.shape[k] for k in new]
    return jnp.broadcast_to(payload, (*sizes, *payload.shape)), [*new, *labels]


def rows_of(t: Tagged, role: str, seq: int) -> jax.Array:
    """What the real keys or values of the first example are, laid out as a prefix:
    (positions, features)."""
    table = t.keys if role == KEY else t.values
    axes = [k for k in range(t.main.ndim) if not _still(t, k)]
    x = t.main[
        tuple(slice(None) if k in (seq, *axes) else 0 for k in range(t.main.ndim))
    ]
    order = sorted((seq, *axes))
    x = jnp.moveaxis(x, order.index(seq), 0).reshape(t.main.shape[seq], -1)
    columns = t.columns.array.reshape(-1) - t.first(role)
    places = np.searchsorted(
        np.sort(columns, kind="stable"), np.arange(table.shape[-1])
    )
    return x[:, np.argsort(columns, kind="stable")[places]]


def _rows_of_each(
    table: jax.Array, examples: np.ndarray, axes: Sequence[int], columns: np.ndarray
) -> jax.Array:
    """table[:, examples, columns], as a reshape where examples lead and columns are in
    their order."""
    index = examples.reshape([examples.shape[k] for k in axes])
    n = table.shape[1]
    if index.size == n == len(index) and columns.shape[:1] == (1,):
        in_order = np.array_equal(index.reshape(-1), np.arange(n))
        m = table.shape[2]
        if in_order and np.array_equal(columns.reshape(-1), np.arange(m)):
            return table.reshape(table.shape[0], n, *columns.shape[1:])
    return table[:, index, columns]


def _columns_of(table: jax.Array, columns: np.ndarray) -> jax.Array:
    """table[:, columns], as a reshape where it is one."""
    n = table.shape[-1]
    if columns.size == n and np.array_equal(columns.reshape(-1), np.arange(n)):
        return table.reshape(table.shape[0], *columns.shape)
    return table[:, columns]
