"""`find_uses`: which equations consume each weight, and what its axes mean there.

The function is traced once.  A tag follows each weight through the equations that only
move it about, until one consumes it: the axes a `dot_general` contracts are input, the
free ones output, its batch axes and the axes that a scan or a slice takes one row of
are stack.  What is computed from weights alone (a normalised kernel) keeps a blurred
tag, so that a matrix product with it is reported rather than missed.

A vector is what it does to the value it meets (see `values`): a scale of what was
normalised is a norm's, what is added to a product is a bias.  Names decide where that
leaves a doubt.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jpeft import compat, conventions
from jpeft.adapt.entry import Program
from jpeft.adapt.equations import (
    Barrier,
    Branch,
    Call,
    Consume,
    Contract,
    Convolve,
    Jit,
    Join,
    LookUp,
    Move,
    Route,
    Scale,
    Scan,
    Select,
    SliceAt,
    Sum,
    Verb,
    While,
    Write,
    read,
    varying,
)
from jpeft.adapt.lookups import CONSTANT, DIRECT, Lookups
from jpeft.adapt.values import Operand, Values, part_of
from jpeft.tree.layout import (
    BIAS,
    CONV,
    EMBEDDING,
    LATE_BIAS,
    LAYER_SCALE,
    LINEAR,
    MAYBE_BIAS,
    MAYBE_SCALE,
    NEUTRAL,
    NORM,
    NORM_BIAS,
    NORM_SCALE,
    OTHER,
    UNUSED,
    LeafUse,
    Use,
    Uses,
    by_name,
    state_of,
)
from jpeft.tree.paths import is_array, slots, weight
from jpeft.types import PyTree

_KINDS: dict[type, str] = {
    Contract: LINEAR,
    Route: LINEAR,
    Convolve: CONV,
    LookUp: EMBEDDING,
}
_FLIP = str.maketrans("io", "oi")
_NOTHING: frozenset[int] = frozenset()


@dataclasses.dataclass(frozen=True)
class Tag:
    """A value that is a moved-about piece of one weight.

    axes: for each axis of the value, the weight's axes it holds.
    gone: (axis, label) of axes that left the value on the way.
    blurred: it was computed from the weight.  row: a row that ids chose, which is no
        weight but where it is a norm or a bias.  picked: the axes put in another order.
    """

    leaf: int
    axes: tuple[frozenset[int], ...]
    gone: frozenset[tuple[int, str]] = frozenset()
    blurred: bool = False
    row: bool = False
    picked: frozenset[int] = frozenset()

    def moved(
        self,
        axes: Sequence[frozenset[int]],
        gone: Iterable[int] = (),
        label: str = "s",
    ) -> Tag:
        """With other axes.  gone: places of those that left the value, which `label`
        says what for."""
        lost = {(a, label) for k in gone for a in self.axes[k]}
        return dataclasses.replace(self, axes=tuple(axes), gone=self.gone | lost)


Tags = list[Tag]


def _blurred(tags: Iterable[Tag]) -> Tags:
    return [dataclasses.replace(t, blurred=True) for t in tags]


class At(NamedTuple):
    """One equation of a program.  context: the programs around it."""

    eqn: Any
    verb: Verb | None
    context: tuple[str, ...]


def find_uses(
    fn: Callable[..., Any], params: PyTree, *args: Any, **kwargs: Any
) -> Uses:
    """What each weight of `params` is to `fn`: path -> `LeafUse`.

    Traces `fn(params, *args, **kwargs)` once; nothing is computed, and arguments may be
    `jax.ShapeDtypeStruct`s.  Pass the answer to transforms as `uses=`.  Data may be
    closed over too, if all of it is.

    >>> import jax.numpy as jnp, jpeft
    >>> params = {"w": jnp.ones((5, 7))}
    >>> uses = jpeft.find_uses(lambda p, x: x @ p["w"].T, params, jnp.ones((3, 7)))
    >>> uses["w"].kind, uses["w"].axes
    ('linear', 'oi')
    """
    flat = slots(params)
    arrays = [k for k, x in enumerate(flat.values) if is_array(weight(x))]
    shapes = [tuple(weight(flat.values[k]).shape) for k in arrays]
    program = Program(fn, (params, *args), kwargs)
    names, state = by_name(flat), state_of(flat)
    paths = [flat.paths[k] for k in arrays]
    finder = _Finder(shapes, [names[p] for p in paths])
    finder.start(program, len(arrays))
    found = {}
    for path, shape, seen in zip(paths, shapes, finder.uses, strict=True):
        uses = [u for u, _ in seen]
        found[path] = _verdict(path, shape, uses, names[path], path in state)
    return Uses(_with_biases(found, paths, finder.uses, names))


# --- the walk ------------------------------------------------------------------------


class _Finder:
    """uses: of each weight, each with the weights whose product it is added to."""

    def __init__(self, shapes: list[tuple[int, ...]], names: list[LeafUse]):
        self.shapes = shapes
        self.names = names
        self.uses: list[list[tuple[Use, frozenset[int]]]] = [[] for _ in shapes]
        self.made_by: dict[Any, Verb | None] = {}
        self.values = Values()

    def start(self, program: Program, n: int) -> None:
        """The first `n` inputs are the weights, the others depend on the data."""
        tags: list[Tags] = [
            [Tag(k, tuple(frozenset([a]) for a in range(len(s))))]
            for k, s in enumerate(self.shapes)
        ]
        assert len(program.inputs) >= n
        data = [False] * n + [True] * (len(program.inputs) - n)
        # A function of the weights alone has its data around it.
        self.closed_over = not any(data)
        tags += [[] for _ in range(len(program.inputs) - n)]
        jaxpr, consts = compat.open_jaxpr(program.closed)
        self.lookups = Lookups(jaxpr, jaxpr.invars, n)
        self.lookups.enter(jaxpr, consts, jaxpr.invars)
        self.walk(jaxpr, tags, data, ())

    def walk(
        self,
        jaxpr: Any,
        args: Sequence[Tags],
        data: Sequence[bool],
        context: tuple[str, ...],
    ) -> tuple[list[Tags], list[bool]]:
        """Tags of the outputs, and whether each depends on the data."""
        tags = dict(zip(jaxpr.invars, args, strict=True))
        fed = dict(zip(jaxpr.invars, data, strict=True))
        read = lambda v: [] if isinstance(v, compat.Literal) else tags.get(v, [])
        fed.update(dict.fromkeys(jaxpr.constvars, self.closed_over))
        depends = lambda v: (
            self.closed_over and bool(getattr(v.aval, "shape", ()))
            if isinstance(v, compat.Literal)
            else fed.get(v, False)
        )
        several = _read_often(jaxpr)
        self.values.share(v for v in jaxpr.invars if v in several)
        for eqn in jaxpr.eqns:
            self.lookups.add(eqn)
            ins = [read(v) for v in eqn.invars]
            from_data = [depends(v) for v in eqn.invars]
            outs, outs_fed = self.equation(eqn, ins, from_data, context)
            self.values.share(v for v in eqn.outvars if v in several)
            tags.update(zip(eqn.outvars, outs, strict=True))
            fed.update(zip(eqn.outvars, outs_fed, strict=True))
        return list(map(read, jaxpr.outvars)), list(map(depends, jaxpr.outvars))

    def equation(
        self, eqn: Any, ins: list[Tags], fed: list[bool], context: tuple[str, ...]
    ) -> tuple[list[Tags], list[bool]]:
        name, verb = eqn.primitive.name, read(eqn)
        self.made_by.update(dict.fromkeys(eqn.outvars, verb))
        if isinstance(verb, Call):
            jaxpr, skip = verb.jaxpr, verb.first
            self.lookups.enter(jaxpr, verb.consts, verb.given)
            self.values.enter(jaxpr.invars, verb.given)
            label = f"jit:{verb.name}" if isinstance(verb, Jit) else name
            outs = self.walk(jaxpr, ins[skip:], fed[skip:], (*context, label))
            self.values.enter(eqn.outvars, jaxpr.outvars)
            return outs
        operands = [self.operand(eqn, k, ins[k], fed[k]) for k in range(len(ins))]
        self.values.add(eqn, verb, operands)
        if not any(ins):
            return [[] for _ in eqn.outvars], [any(fed)] * len(eqn.outvars)
        for kind, enter in _PROGRAMS.items():
            if isinstance(verb, kind):
                return enter(self, At(eqn, verb, (*context, name)), ins, fed)
        at = At(eqn, verb, context)
        if isinstance(verb, Join) and not (verb.new or all(ins)):
            for tags in ins:
                self.record(at, tags)
            if any(fed):  # class tokens or queries beside the text: an activation
                return [[]], [True]
        outs = self.consumed(at, ins, fed)
        if outs is None:
            outs = self.moved(at, ins, operands)
        if outs is None:
            outs = self.computed(at, ins, operands, any(fed))
        return outs, [any(fed)] * len(eqn.outvars)

    def operand(self, eqn: Any, k: int, tags: Tags, fed: bool) -> Operand:
        var = eqn.invars[k]
        value = self.values[var]
        weight = bool(tags) and (not fed or any(t.row for t in tags))
        number = not value.kind and not self.varying(var)
        vector = weight and all(self.is_vector(t) for t in tags)
        leaves = frozenset(t.leaf for t in tags)
        return Operand(value, weight, vector, number, leaves)

    def is_vector(self, t: Tag) -> bool:
        """Whether one axis of the weight is left, a stack aside."""
        left = frozenset().union(*t.axes)
        return sum(self.shapes[t.leaf][a] > 1 for a in left) <= 1

    # -- programs inside ---------------------------------------------------------------

    def scan(self, at: At, ins: list[Tags], fed: list[bool]):
        assert isinstance(at.verb, Scan)
        jaxpr, (n_consts, n_carry) = at.verb.body, at.verb.counts
        carry, same = self._carry(at, ins, jaxpr, n_consts, n_carry)
        scanned = ins[n_consts + n_carry :]
        rows = [[t.moved(t.axes[1:], [0]) for t in tags] for tags in scanned]
        # A carry may come to depend on the data in a later step.
        carried = [any(fed)] * n_carry
        inner_fed = [*fed[:n_consts], *carried, *fed[n_consts + n_carry :]]
        self.values.forget(jaxpr.invars)
        inner, _ = self.walk(
            jaxpr, [*ins[:n_consts], *carry, *rows], inner_fed, at.context
        )
        outs: list[Tags] = [c if s else [] for c, s in zip(carry, same, strict=True)]
        for tags in inner[n_carry:]:  # stacked again, but no rule takes them further
            row = lambda t: frozenset(k for k, label in t.gone if label == "s")
            stacked = [t.moved([row(t), *t.axes]) for t in tags]
            self.record(at, stacked)
            outs.append(_blurred(stacked))
        return outs, [any(fed)] * len(outs)

    def loop(self, at: At, ins: list[Tags], fed: list[bool]):
        assert isinstance(at.verb, While)
        test, body, (n_test, n_body) = at.verb.test, at.verb.body, at.verb.counts
        first = n_test + n_body
        n_carry = len(ins) - first
        carry, same = self._carry(at, ins[n_test:], body, n_body, n_carry)
        carried = [any(fed)] * n_carry
        self.values.forget([*test.invars, *body.invars])
        context = at.context
        self.walk(test, [*ins[:n_test], *carry], [*fed[:n_test], *carried], context)
        self.walk(
            body, [*ins[n_test:first], *carry], [*fed[n_test:first], *carried], context
        )
        return [c if s else [] for c, s in zip(carry, same, strict=True)], carried

    def _carry(
        self, at: At, ins: list[Tags], jaxpr: Any, before: int, n_carry: int
    ) -> tuple[list[Tags], list[bool]]:
        """A weight in a carry is a constant if the body hands it back untouched."""
        same = [jaxpr.outvars[k] is jaxpr.invars[before + k] for k in range(n_carry)]
        carry = ins[before : before + n_carry]
        for tags, s in zip(carry, same, strict=True):
            if not s:
                self.record(at, tags)
        return [c if s else _blurred(c) for c, s in zip(carry, same, strict=True)], same

    def branch(self, at: At, ins: list[Tags], fed: list[bool]):
        assert isinstance(at.verb, Branch)
        found: list[Tags] = [[] for _ in at.eqn.outvars]
        for jaxpr, consts in at.verb.branches:
            self.lookups.enter(jaxpr, consts, at.eqn.invars[1:])
            self.values.enter(jaxpr.invars, at.eqn.invars[1:])
            outs, _ = self.walk(jaxpr, ins[1:], fed[1:], at.context)
            for k, tags in enumerate(outs):
                self.record(at, tags)
                found[k] += _blurred(tags)
        return found, [any(fed)] * len(found)

    # -- what an equation does ---------------------------------------------------------

    def consumed(self, at: At, ins: list[Tags], fed: list[bool]) -> list[Tags] | None:
        """Records the use if this equation consumes a weight."""
        verb = at.verb
        if isinstance(verb, LookUp):
            self.record(at, ins[1])
            return self._looked_up(at, verb, ins[0], fed[1]) if ins[0] else None
        if not isinstance(verb, Consume):
            return None
        of = []
        for k, tags in enumerate(ins):
            acts = isinstance(verb, Contract) and self.is_activation(ins, fed, k)
            roles = None if acts else verb.roles(k)
            self.record(at, tags, roles)
            of.append([t for t in tags if roles and not t.row])
        self.product(at.eqn, of, verb.made_of)
        return [[]]

    def product(
        self,
        eqn: Any,
        of: Sequence[Tags],
        out: Sequence[Sequence[tuple[int, int]]],
    ) -> None:
        """Notes whose product it is, if a weight's.

        of: the tags of either operand.  out: for each axis of the result, the axes of
        the operands, (operand, axis), that it is.
        """
        leaves = frozenset(t.leaf for tags in of for t in tags)
        if leaves:
            own = lambda w, k: any(t.axes[k] for t in of[w])
            axes = [
                frozenset({0}) if any(own(*x) for x in at) else _NOTHING for at in out
            ]
            self.values.product(eqn, leaves, tuple(axes))

    def is_activation(self, ins: list[Tags], fed: list[bool], w: int) -> bool:
        """Of a product of weights alone: whether this side is what the other one, a
        kernel, acts on: latents, positions, what a norm made of them."""
        if any(fed) or not all(ins):
            return False
        plain = lambda t: not (t.blurred or t.picked or self.is_token(t))
        return not any(map(plain, ins[w])) and any(map(plain, ins[1 - w]))

    def is_token(self, t: Tag) -> bool:
        return self.names[t.leaf].kind in (OTHER, EMBEDDING)

    def _looked_up(self, at: At, verb: LookUp, tags: Tags, by_data: bool) -> list[Tags]:
        numbers, sizes = verb.numbers, verb.sizes
        batching, kept, labels = verb.batching, verb.kept, verb.out
        src = _shape(at.eqn, 0)
        one = [q for q in numbers.start_index_map if sizes[q] == 1]

        def taken(t: Tag, chosen: frozenset[int]) -> list[frozenset[int]]:
            """Its axes afterwards; chosen: what stands where the ids stood."""
            return [t.axes[k] if isinstance(k, int) else chosen for k in labels]

        # Features in another order, or some of them: the axis stays what it is.
        picks = not by_data and len(one) == len(numbers.start_index_map) == 1
        picks = picks and not batching and len(labels) == len(src)
        if sum(sizes[k] > 1 for k in kept) < 2:
            roles = [
                "s"
                if k in batching
                # A batched slice gives an index, which is 0, to whole axes too.
                else "i"
                if k in numbers.start_index_map and sizes[k] < max(src[k], 2)
                else "o"
                for k in range(len(src))
            ]
            lookup = self._lookup(verb) if by_data else (CONSTANT, ())
            self.record(at, tags, roles, lookup)
            if not picks:
                rows = [t.moved(taken(t, _NOTHING)) for t in tags if not t.blurred]
                return [[dataclasses.replace(t, row=True) for t in rows]]
        if picks:
            of = lambda t: t.moved(taken(t, t.axes[one[0]]))
            own = lambda t: t.picked | t.axes[one[0]]
            return [[dataclasses.replace(of(t), picked=own(t)) for t in tags]]
        # The rows gathered are matrices still (experts): stack, and still a weight.
        gone = (*one, *batching)
        return [[t.moved(taken(t, _NOTHING), gone) for t in tags]]

    def _lookup(self, verb: LookUp) -> tuple[str, tuple[int, ...]]:
        """Of a lookup of single rows: what becomes of ids beyond the table, and which
        inputs they come from."""
        shape, ids = _shape(verb.eqn, 0), verb.eqn.invars[1]
        rows = [
            (column, shape[k])
            for column, k in enumerate(verb.numbers.start_index_map)
            if verb.sizes[k] < shape[k]
        ]
        if len(rows) != 1:
            return "", ()
        return self.lookups.fate(ids, *rows[0]), self.lookups.sources(ids)

    def moved(
        self, at: At, ins: list[Tags], operands: list[Operand]
    ) -> list[Tags] | None:
        """Tags of the outputs if this equation only moves a weight about."""
        eqn, verb, _ = at
        if isinstance(verb, Sum):  # jnp.einsum sums an axis that only the weight has
            kept = [k for k in range(len(_shape(eqn, 0))) if k not in verb.axes]
            return [
                [t.moved([t.axes[k] for k in kept], verb.axes, "i") for t in ins[0]]
            ]
        if isinstance(verb, Barrier):
            return ins
        if isinstance(verb, Join):
            new = [_NOTHING] if verb.new else []
            put = lambda a: [*a[: verb.axis], *new, *a[verb.axis :]]
            return [[t.moved(put(t.axes)) for tags in ins for t in tags]]
        if isinstance(verb, Scale):
            for side in (0,) if verb.divides else (0, 1):
                whole = eqn.invars[side].aval.shape == eqn.outvars[0].aval.shape
                other = eqn.invars[1 - side]
                # What was computed from a weight needs that weight's full value.
                plain = not any(t.blurred for t in ins[1 - side])
                # A vector that meets an activation scales it, whatever its shape.
                small = all(len(t.axes) < 2 for t in ins[side])
                if small and not operands[1 - side].number:
                    continue
                if ins[side] and whole and plain and len(self.varying(other)) <= 1:
                    self.meets(at, ins, 1 - side, operands)
                    return [ins[side]]
            return None
        at_index = isinstance(verb, Move) and verb.step is SliceAt
        if verb is None or (any(ins[1:]) and not at_index):
            return None
        rows = lambda k: verb.rows_taken(k) if isinstance(verb, Move) else []
        moved = [(t, verb.carried(t.axes)) for t in ins[0]]
        if any(axes is None for _, axes in moved):
            return None
        return [
            [_cut(t.moved(axes[k]), rows(k)) for t, axes in moved if axes is not None]
            for k in range(len(eqn.outvars))
        ]

    def varying(self, var: Any) -> set[int]:
        """The axes along which a value really varies: a number, or a vector that jnp
        has broadcast, scales one factor of a delta."""
        return varying(var, self.made_by.get)

    def computed(
        self, at: At, ins: list[Tags], operands: list[Operand], fed: bool
    ) -> list[Tags]:
        """Anything else: a use; a blurred piece of the weight if no data entered."""
        for k in range(len(ins)):
            self.meets(at, ins, k, operands)
        out = []
        edits = isinstance(at.verb, _EDITS)
        for v in at.eqn.outvars:
            tags = []
            for k, own in enumerate(ins):
                shape = _shape(at.eqn, k)
                alone = all(x.number for j, x in enumerate(operands) if j != k)
                for t in own:
                    stays = edits and _keeps_its_shape(t, shape, v.aval.shape)
                    if fed and not (stays or (t.row and alone)):
                        continue
                    axes = _axes_after(t, shape, v.aval.shape)
                    tags.append(dataclasses.replace(t.moved(axes), blurred=True))
            out.append(list(dict.fromkeys(tags)))
        return out

    def record(
        self,
        at: At,
        tags: Tags,
        roles: Sequence[str] | None = None,
        lookup: tuple[str, tuple[int, ...]] = ("", ()),
        part: str = "",
        of: frozenset[int] = _NOTHING,
    ) -> None:
        """Notes a use.

        roles: a label for each axis of the value, None for no role.  lookup, part: see
        `Use`.  of: the weights whose product, or scaled value, it is added to.
        """
        opaque = any(c in compat.CUSTOM_RULES for c in at.context)
        for t in tags:
            labels = ""
            if roles is not None:
                if t.blurred and not any(t.axes):
                    continue  # a norm or a mean of the weight, not the weight
                seen: list[set[str]] = [set() for _ in self.shapes[t.leaf]]
                for k, label in t.gone:
                    seen[k].add(label)
                for axes, label in zip(t.axes, roles, strict=True):
                    for k in axes:
                        seen[k].add(label)
                labels = "".join(map(_one_label, seen, self.shapes[t.leaf]))
            if t.row and not part:
                continue
            use = Use(
                at.eqn.primitive.name,
                labels,
                compat.source_line(at.eqn),
                at.context,
                opaque,
                t.blurred,
                *lookup,
                part,
                _KINDS.get(type(at.verb), ""),
            )
            self.uses[t.leaf].append((use, of))

    def meets(
        self, at: At, ins: list[Tags], k: int, operands: Sequence[Operand]
    ) -> None:
        """Notes the use of operand k in an equation of activations, and the part that
        it plays there.  What was computed from a weight is noted only if it plays one.
        """
        shape = at.eqn.outvars[0].aval.shape if at.eqn.outvars else ()
        for t in ins[k]:
            part, of = "", _NOTHING
            if operands[k].weight and len(t.axes) == len(shape):
                own = self.shapes[t.leaf]
                wide = [any(own[q] > 1 for q in axes - t.picked) for axes in t.axes]
                part, of = part_of(at.verb, operands, k, wide)
            if part or not t.blurred:
                self.record(at, [t], part=part, of=of)


_PROGRAMS: dict[type[Verb], Callable[..., tuple[list[Tags], list[bool]]]] = {
    Scan: _Finder.scan,
    While: _Finder.loop,
    Branch: _Finder.branch,
}
# With data these make another weight of a weight: a mask, a gate, a row written.  A sum
# does not: a position table added to the text is the common case, and a weight with
# noise added the rare one.
_EDITS = (Scale, Select, Write)


def _keeps_its_shape(t: Tag, src: Sequence[int], dst: Sequence[int]) -> bool:
    """Whether it is as large as before, and was not spread over a batch."""
    wide = [bool(ks) for ks, n in zip(t.axes, src, strict=True) if n > 1]
    return tuple(src) == tuple(dst) and len(wide) > 1 and all(wide)


def _axes_after(t: Tag, src: Sequence[int], dst: Sequence[int]) -> Sequence[Any]:
    """Where a computed value has the weight's axes: where they were, if it kept its
    shape; anywhere, if it is as large as a matrix of another shape; else nowhere."""
    if tuple(src) == tuple(dst):
        return t.axes
    wide = [n > 1 for n in dst]
    held = frozenset().union(*t.axes) if sum(wide) > 1 else _NOTHING
    return [held if w else _NOTHING for w in wide]


def _one_label(seen: set[str], size: int) -> str:
    """in and out beat stack where an axis has both (fused storage, then sliced)."""
    if not seen:
        return "o" if size == 1 else "?"
    if len(seen) == 1:
        return next(iter(seen))
    rest = seen - {"s"}
    return next(iter(rest)) if len(rest) == 1 else "x"


def _cut(t: Tag, rows: Sequence[int]) -> Tag:
    """An axis of which one row is taken leaves the value: a stack axis."""
    return t.moved([_NOTHING if k in rows else a for k, a in enumerate(t.axes)], rows)


def _shape(eqn: Any, operand: int) -> tuple[int, ...]:
    return tuple(eqn.invars[operand].aval.shape)


def _read_often(jaxpr: Any) -> set[Any]:
    """The variables that more than one equation reads, or one and the outside."""
    literal = lambda v: isinstance(v, compat.Literal)
    read = collections.Counter(v for v in jaxpr.outvars if not literal(v))
    for eqn in jaxpr.eqns:
        read.update({v for v in eqn.invars if not literal(v)})
    return {v for v, n in read.items() if n > 1}


# --- the verdict ---------------------------------------------------------------------


def _verdict(
    path: str, shape: tuple[int, ...], uses: list[Use], name: LeafUse, state: bool
) -> LeafUse:
    """state: whether the model keeps it and no optimiser trains it."""
    made = LeafUse(path, shape, uses=tuple(uses))
    if not uses:
        return dataclasses.replace(made, kind=UNUSED)
    small = OTHER if state else _small_kind(path, name, uses, shape)
    parts = {u.part for u in uses}
    of_product = parts & {BIAS, LATE_BIAS, MAYBE_BIAS}
    of_norm = name.of_norm and (conventions.in_norm(path) or not of_product)
    as_small = dataclasses.replace(
        made,
        kind=small,
        of_norm=small == BIAS and of_norm,
        state=state,
        late=small == BIAS and any(u.part == LATE_BIAS for u in uses),
    )
    eaten = [u for u in uses if u.kind and u.roles]
    fit = [u for u in eaten if not u.blurred and _is_matrix(u.roles, shape, name)]
    if any(u.kind != EMBEDDING for u in fit):
        # Features picked by constants are a product's, if there is one.
        fit = [u for u in fit if u.kind != EMBEDDING or u.lookup != CONSTANT]
    elif fit and small != OTHER:
        return as_small
    if not fit:
        changed = [u for u in eaten if u.kind != EMBEDDING and _wide(u, shape)]
        if changed and name.kind not in (BIAS, NORM):
            u = changed[0]
            axes = u.roles if _is_matrix(u.roles, shape, name) else None
            return dataclasses.replace(
                made,
                kind=u.kind,
                axes=axes,
                changed_axes=axes,
                doubt=f"the model changes it before `{u.primitive}` at "
                f"{u.site or 'a library line'}",
            )
        return as_small
    # A tied table is parametrised as a table: (vocabulary, width).
    fit.sort(key=lambda u: u.kind != EMBEDDING)
    kind, axes = fit[0].kind, fit[0].roles
    seen = {_canonical(u.roles, shape) for u in fit}
    both = {_canonical(axes, shape), _canonical(axes, shape).translate(_FLIP)}
    notes = []
    if not seen <= both:
        notes.append("grouped as " + " and ".join(sorted(seen)))
    rest = sorted({u.primitive for u in uses if u not in fit and not u.part})
    if rest:
        notes.append("also consumed by " + ", ".join(rest))
    opaque = [u for u in fit if u.opaque]
    doubt = ""
    if opaque:
        doubt = (
            f"its use at {opaque[0].site or 'a library line'} is behind a "
            "gradient rule of the model's own (custom_jvp or custom_vjp), which a "
            "low-rank delta would bypass"
        )
    return dataclasses.replace(
        made,
        kind=kind,
        axes=axes,
        tied=len(seen) > 1 and seen <= both,
        conflict="; ".join(notes),
        doubt=doubt,
    )


def _is_matrix(roles: str, shape: tuple[int, ...], name: LeafUse) -> bool:
    """An input and an output axis, both wider than 1.

    Class tokens and probes, which are contracted too, are not matrices; a kernel by its
    name is one, if the layer has but one output (a reward) or input.
    """
    if set(roles) & {"?", "x"}:
        return False
    named = name.kind in (LINEAR, CONV)
    wide = {c for c, n in zip(roles, shape, strict=True) if n > 1 or named}
    return {"i", "o"} <= wide


def _wide(use: Use, shape: tuple[int, ...]) -> bool:
    """Whether it is as wide as a matrix, a stack aside."""
    wide = [c for c, n in zip(use.roles, shape, strict=True) if n > 1 and c != "s"]
    return {"i", "o"} <= set(wide) or ("x" in wide and len(wide) > 1)


def _canonical(roles: str, shape: tuple[int, ...]) -> str:
    return "".join("-" if n == 1 else c for c, n in zip(roles, shape, strict=True))


_BIAS_PARTS = frozenset({BIAS, LATE_BIAS, NORM_BIAS})


def _small_kind(
    path: str, name: LeafUse, uses: list[Use], shape: tuple[int, ...]
) -> str:
    """A bias, a norm's scale, or neither: by what it does, and where that is in doubt
    by its name."""
    table = sum(n > 1 for n in shape) > 1
    looked_up = [u for u in uses if table and u.kind == EMBEDDING]
    computed = lambda u: u.blurred and u.kind
    met = [u for u in uses if u.kind != EMBEDDING and not computed(u)]
    parts = {u.part for u in met} - {NEUTRAL}
    if name.kind == NORM:
        # What scales a product is a layer's scale, unless a norm is so called.
        scales = parts == {LAYER_SCALE} and not conventions.in_norm(path)
        return OTHER if scales else NORM
    if name.kind == BIAS:
        return BIAS
    if not parts or sum(n > 1 for n in shape) < 1 or name.kind == EMBEDDING:
        return OTHER
    makes_a_weight = any(u.roles and u.blurred for u in uses)
    if parts == {NORM_SCALE} and not makes_a_weight:
        return NORM
    if looked_up:
        # Rows that the text's own ids choose are embeddings, wherever they are added.
        chosen = any(u.lookup in (DIRECT, CONSTANT) for u in looked_up)
        named = conventions.may_be_bias(path)
        return BIAS if parts <= _BIAS_PARTS and (named or not chosen) else OTHER
    if parts <= _BIAS_PARTS:
        return OTHER if conventions.never_a_bias(path) else BIAS
    if parts <= _BIAS_PARTS | {MAYBE_BIAS} and conventions.may_be_bias(path):
        return BIAS
    if parts <= {NORM_SCALE, MAYBE_SCALE} and conventions.may_be_scale(path):
        return NORM
    return OTHER


def _with_biases(
    found: Mapping[str, LeafUse],
    paths: Sequence[str],
    uses: Sequence[Sequence[tuple[Use, frozenset[int]]]],
    names: Mapping[str, LeafUse],
) -> dict[str, LeafUse]:
    """The same, where each weight knows the bias that is added to its product: to no
    other weight's product, and always the same.  A bias added to a norm is the norm's
    if it stands beside the norm's scale."""
    beside: dict[str, set[str]] = {}
    out = dict(found)
    module = lambda p: p.rpartition("/")[0]
    for path, seen in zip(paths, uses, strict=True):
        if found[path].kind != BIAS:
            continue
        for use, of in seen:
            if use.part in (BIAS, LATE_BIAS, MAYBE_BIAS) and len(of) == 1:
                (k,) = of
                beside.setdefault(paths[k], set()).add(path)
            if use.part == NORM_BIAS and module(path) in {module(paths[k]) for k in of}:
                out[path] = dataclasses.replace(found[path], of_norm=True)
    for path, use in found.items():
        bias = names[path].bias
        if bias is not None and found[bias].kind != BIAS:
            bias = None
        if len(own := beside.get(path, set())) == 1:
            (bias,) = own
        elif bias is not None and any(bias in b for b in beside.values()):
            bias = bias if bias in own else None
        if use.is_weight and bias is not None:
            out[path] = dataclasses.replace(use, bias=bias)
    return out
