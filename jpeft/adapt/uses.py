"""`find_uses`: which equations consume each weight, and what its axes mean there.

The function is traced once.  A tag follows each weight through the equations that only
move it about, until one consumes it: the axes a `dot_general` contracts are input, the
free ones output, its batch axes and the axes that a scan or a slice takes one row of
are stack.  What is computed from weights alone (a normalised kernel) keeps a blurred
tag, so that a matrix product with it is reported rather than missed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jpeft import compat
from jpeft.adapt.entry import Program
from jpeft.adapt.labels import axis_groups
from jpeft.adapt.lookups import Lookups
from jpeft.tree.layout import (
    BIAS,
    CONV,
    EMBEDDING,
    LINEAR,
    NORM,
    OTHER,
    UNUSED,
    LeafUse,
    Use,
    Uses,
    by_name,
)
from jpeft.tree.paths import is_array, slots, weight
from jpeft.types import PyTree

CONSUMERS = {
    "dot_general": LINEAR,
    "ragged_dot_general": LINEAR,
    "conv_general_dilated": CONV,
    "gather": EMBEDDING,
}
_FLIP = str.maketrans("io", "oi")
_SAME_SHAPE = frozenset(
    "convert_element_type copy copy_p stop_gradient reduce_precision neg "
    "sharding_constraint layout_constraint name mesh_cast reshard pvary pcast rev "
    "optimization_barrier".split()
)
_NOTHING: frozenset[int] = frozenset()


@dataclasses.dataclass(frozen=True)
class Tag:
    """A value that is a moved-about piece of one weight.

    axes: for each axis of the value, the weight's axes it holds.
    gone: (axis, label) of axes that left the value on the way.
    """

    leaf: int
    axes: tuple[frozenset[int], ...]
    gone: frozenset[tuple[int, str]] = frozenset()
    blurred: bool = False

    def moved(self, axes: Sequence[frozenset[int]]) -> Tag:
        return dataclasses.replace(self, axes=tuple(axes))


Tags = list[Tag]


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
    finder = _Finder(shapes)
    finder.start(program, len(arrays))
    names = by_name(flat)
    found = {}
    for n, k in enumerate(arrays):
        path = flat.paths[k]
        found[path] = _verdict(path, shapes[n], finder.uses[n], names[path])
    return Uses(found)


# --- the walk ------------------------------------------------------------------------


class _Finder:
    def __init__(self, shapes: list[tuple[int, ...]]):
        self.shapes = shapes
        self.uses: list[list[Use]] = [[] for _ in shapes]
        self.made_by: dict[Any, Any] = {}

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
        for eqn in jaxpr.eqns:
            self.made_by.update(dict.fromkeys(eqn.outvars, eqn))
            self.lookups.add(eqn)
            ins = [read(v) for v in eqn.invars]
            from_data = [depends(v) for v in eqn.invars]
            outs: list[Tags]
            if any(ins):
                outs, outs_fed = self.equation(eqn, ins, from_data, context)
            else:
                outs = [[] for _ in eqn.outvars]
                outs_fed = [any(from_data)] * len(eqn.outvars)
            tags.update(zip(eqn.outvars, outs, strict=True))
            fed.update(zip(eqn.outvars, outs_fed, strict=True))
        return list(map(read, jaxpr.outvars)), list(map(depends, jaxpr.outvars))

    def equation(
        self, eqn: Any, ins: list[Tags], fed: list[bool], context: tuple[str, ...]
    ) -> tuple[list[Tags], list[bool]]:
        name, params = eqn.primitive.name, eqn.params
        if name in compat.CALLS and compat.CALLS[name] in params:
            jaxpr, consts = compat.open_jaxpr(params[compat.CALLS[name]])
            skip = len(ins) - len(jaxpr.invars)
            self.lookups.enter(jaxpr, consts, eqn.invars[skip:])
            label = f"jit:{params.get('name')}" if name in compat.JITS else name
            return self.walk(jaxpr, ins[skip:], fed[skip:], (*context, label))
        if name in ("scan", "while", "cond"):
            return getattr(self, f"_{name}")(eqn, ins, fed, (*context, name))
        if name == "concatenate" and not all(ins):
            for tags in ins:
                self.record(eqn, tags, None, context)
            if any(fed):  # class tokens or queries beside the text: an activation
                return [[]], [True]
        outs = self.consumed(eqn, ins, context)
        if outs is None:
            outs = self.moved(eqn, ins, context)
        if outs is None:
            outs = self.computed(eqn, ins, any(fed), context)
        return outs, [any(fed)] * len(eqn.outvars)

    # -- programs inside ---------------------------------------------------------------

    def _scan(self, eqn: Any, ins: list[Tags], fed: list[bool], context: Any):
        n_consts, n_carry = compat.scan_counts(eqn)
        jaxpr, _ = compat.open_jaxpr(eqn.params["jaxpr"])
        carry, same = self._carry(eqn, ins, jaxpr, n_consts, n_carry, context)
        rows = [
            [
                dataclasses.replace(
                    t,
                    axes=t.axes[1:],
                    gone=t.gone | {(k, "s") for k in t.axes[0]},
                )
                for t in tags
            ]
            for tags in ins[n_consts + n_carry :]
        ]
        # A carry may come to depend on the data in a later step.
        carried = [any(fed)] * n_carry
        inner_fed = [*fed[:n_consts], *carried, *fed[n_consts + n_carry :]]
        inner, _ = self.walk(
            jaxpr, [*ins[:n_consts], *carry, *rows], inner_fed, context
        )
        outs: list[Tags] = [c if s else [] for c, s in zip(carry, same, strict=True)]
        for tags in inner[n_carry:]:  # stacked again, but no rule takes them further
            row = lambda t: frozenset(k for k, label in t.gone if label == "s")
            stacked = [t.moved([row(t), *t.axes]) for t in tags]
            self.record(eqn, stacked, None, context)
            outs.append([dataclasses.replace(t, blurred=True) for t in stacked])
        return outs, [any(fed)] * len(eqn.outvars)

    def _while(self, eqn: Any, ins: list[Tags], fed: list[bool], context: Any):
        n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        body, _ = compat.open_jaxpr(eqn.params["body_jaxpr"])
        test, _ = compat.open_jaxpr(eqn.params["cond_jaxpr"])
        first = n_cond + n_body
        n_carry = len(ins) - first
        carry, same = self._carry(eqn, ins[n_cond:], body, n_body, n_carry, context)
        carried = [any(fed)] * n_carry
        self.walk(test, [*ins[:n_cond], *carry], [*fed[:n_cond], *carried], context)
        self.walk(
            body, [*ins[n_cond:first], *carry], [*fed[n_cond:first], *carried], context
        )
        return [c if s else [] for c, s in zip(carry, same, strict=True)], carried

    def _carry(
        self,
        eqn: Any,
        ins: list[Tags],
        jaxpr: Any,
        before: int,
        n_carry: int,
        context: Any,
    ) -> tuple[list[Tags], list[bool]]:
        """A weight in a carry is a constant if the body hands it back untouched."""
        same = [jaxpr.outvars[k] is jaxpr.invars[before + k] for k in range(n_carry)]
        carry = ins[before : before + n_carry]
        for tags, s in zip(carry, same, strict=True):
            if not s:
                self.record(eqn, tags, None, context)
        blur = lambda tags: [dataclasses.replace(t, blurred=True) for t in tags]
        return [c if s else blur(c) for c, s in zip(carry, same, strict=True)], same

    def _cond(self, eqn: Any, ins: list[Tags], fed: list[bool], context: Any):
        found: list[Tags] = [[] for _ in eqn.outvars]
        for branch in eqn.params["branches"]:
            jaxpr, consts = compat.open_jaxpr(branch)
            self.lookups.enter(jaxpr, consts, eqn.invars[1:])
            outs, _ = self.walk(jaxpr, ins[1:], fed[1:], context)
            for k, tags in enumerate(outs):
                self.record(eqn, tags, None, context)
                found[k] += [dataclasses.replace(t, blurred=True) for t in tags]
        return found, [any(fed)] * len(eqn.outvars)

    # -- what an equation does ---------------------------------------------------------

    def consumed(
        self, eqn: Any, ins: list[Tags], context: tuple[str, ...]
    ) -> list[Tags] | None:
        """Records the use if this equation consumes a weight."""
        name, p = eqn.primitive.name, eqn.params
        ndim = lambda k: len(eqn.invars[k].aval.shape)
        if name == "dot_general":
            contracting, batch = p["dimension_numbers"]
            for w in (0, 1):
                roles = [
                    "i" if k in contracting[w] else "s" if k in batch[w] else "o"
                    for k in range(ndim(w))
                ]
                self.record(eqn, ins[w], roles, context)
            return [[]]
        if name == "ragged_dot_general":
            numbers = p["ragged_dot_dimension_numbers"]
            contracting, batch = numbers.dot_dimension_numbers
            groups = numbers.rhs_group_dimensions
            roles = [
                "i"
                if k in contracting[1]
                else "s"
                if k in (*batch[1], *groups)
                else "o"
                for k in range(ndim(1))
            ]
            self.record(eqn, ins[0], None, context)
            self.record(eqn, ins[1], roles, context)
            return [[]]
        if name == "conv_general_dilated":
            out = p["dimension_numbers"].rhs_spec[0]
            roles = ["o" if k == out else "i" for k in range(ndim(1))]
            self.record(eqn, ins[0], None, context)
            self.record(eqn, ins[1], roles, context)
            return [[]]
        if name == "gather" and not ins[1]:
            return self._gather(eqn, ins[0], context)
        return None

    def _gather(self, eqn: Any, tags: Tags, context: tuple[str, ...]) -> list[Tags]:
        p, numbers = eqn.params, eqn.params["dimension_numbers"]
        batching = tuple(numbers.operand_batching_dims)
        src = eqn.invars[0].aval.shape
        sizes = p["slice_sizes"]
        kept = [
            k
            for k in range(len(src))
            if k not in numbers.collapsed_slice_dims and k not in batching
        ]
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
            self.record(eqn, tags, roles, context, self._lookup(eqn))
            return [[]]
        # The rows gathered are matrices still (experts): stack, and still a weight.
        out = []
        for t in tags:
            rows = iter(kept)
            axes = [
                t.axes[next(rows)] if k in numbers.offset_dims else _NOTHING
                for k in range(len(eqn.outvars[0].aval.shape))
            ]
            one = [q for q in numbers.start_index_map if sizes[q] == 1]
            gone = {(a, "s") for q in (*one, *batching) for a in t.axes[q]}
            out.append(dataclasses.replace(t.moved(axes), gone=t.gone | gone))
        return [out]

    def _lookup(self, eqn: Any) -> str:
        """Of a gather of single rows: what becomes of ids beyond the table."""
        sizes, shape = eqn.params["slice_sizes"], eqn.invars[0].aval.shape
        rows = [
            (column, shape[k])
            for column, k in enumerate(eqn.params["dimension_numbers"].start_index_map)
            if sizes[k] < shape[k]
        ]
        return self.lookups.fate(eqn.invars[1], *rows[0]) if len(rows) == 1 else ""

    def moved(
        self, eqn: Any, ins: list[Tags], context: tuple[str, ...]
    ) -> list[Tags] | None:
        """Tags of the outputs if this equation only moves a weight about."""
        name, p = eqn.primitive.name, eqn.params
        src = eqn.invars[0].aval.shape
        dst = eqn.outvars[0].aval.shape if eqn.outvars else ()

        def each(f: Callable[[tuple[frozenset[int], ...]], Sequence[frozenset[int]]]):
            return [[t.moved(f(t.axes)) for t in ins[0]]]

        if name == "transpose":
            return each(lambda a: [a[k] for k in p["permutation"]])
        if name == "reshape":
            turn = p.get("dimensions") or range(len(src))
            source = {
                k: [turn[q] for q in s]
                for s, d in axis_groups([src[q] for q in turn], dst)
                for k in d
            }
            return each(
                lambda a: [
                    frozenset().union(*(a[s] for s in source.get(k, ())))
                    for k in range(len(dst))
                ]
            )
        if name == "reduce_sum":  # jnp.einsum sums an axis that only the weight has
            gone = p["axes"]
            return [
                [
                    dataclasses.replace(
                        t.moved([a for k, a in enumerate(t.axes) if k not in gone]),
                        gone=t.gone | {(a, "i") for k in gone for a in t.axes[k]},
                    )
                    for t in ins[0]
                ]
            ]
        if name == "tile" and len(p["reps"]) == len(src):
            return [ins[0]]
        if name == "all_gather" and p["tiled"]:
            return [ins[0]]
        if name == "broadcast_in_dim":
            to = p["broadcast_dimensions"]
            return each(
                lambda a: [
                    a[to.index(k)] if k in to else _NOTHING for k in range(len(dst))
                ]
            )
        if name == "expand_dims":
            kept = [k for k in range(len(dst)) if k not in p["dimensions"]]
            return each(
                lambda a: [
                    a[kept.index(k)] if k in kept else _NOTHING for k in range(len(dst))
                ]
            )
        if name == "squeeze":
            return each(
                lambda a: [x for k, x in enumerate(a) if k not in p["dimensions"]]
            )
        if name in ("slice", "dynamic_slice", "split"):
            return [[_cut(t, src, v.aval.shape) for t in ins[0]] for v in eqn.outvars]
        if name == "stack":
            axis = p.get("axis", p.get("dimension"))
            if axis is None:
                return None
            at = lambda a: [*a[:axis], _NOTHING, *a[axis:]]
            return [[t.moved(at(t.axes)) for tags in ins for t in tags]]
        if name == "optimization_barrier":
            return ins
        if name in _SAME_SHAPE or name in ("pad", "concatenate"):
            return [[t for tags in ins for t in tags]]
        if name in ("mul", "div"):
            for side in (0, 1) if name == "mul" else (0,):
                whole = eqn.invars[side].aval.shape == dst  # not itself broadcast
                other = eqn.invars[1 - side]
                # What was computed from a weight needs that weight's full value.
                plain = not any(t.blurred for t in ins[1 - side])
                if ins[side] and whole and plain and self.varies_along(other) <= 1:
                    self.record(eqn, ins[1 - side], None, context)
                    return [ins[side]]
        return None

    def varies_along(self, var: Any) -> int:
        """The number of axes along which a value really varies: a number, or a vector
        that jnp has broadcast, scales one factor of a delta."""
        shape = var.aval.shape
        found = None if isinstance(var, compat.Literal) else self.made_by.get(var)
        if found is not None and found.primitive.name == "broadcast_in_dim":
            shape = found.invars[0].aval.shape
        return sum(n > 1 for n in shape)

    def computed(
        self, eqn: Any, ins: list[Tags], fed: bool, context: tuple[str, ...]
    ) -> list[Tags]:
        """Anything else: a use; a blurred piece of the weight if no data entered."""
        for tags in ins:
            self.record(eqn, [t for t in tags if not t.blurred], None, context)
        out = []
        for v in eqn.outvars:
            tags = []
            for k, own in enumerate(ins):
                shape = eqn.invars[k].aval.shape
                for t in own:
                    if fed and not _is_edit(eqn, t, shape, v.aval.shape):
                        continue
                    axes = _axes_after(t, shape, v.aval.shape)
                    tags.append(dataclasses.replace(t.moved(axes), blurred=True))
            out.append(list(dict.fromkeys(tags)))
        return out

    def record(
        self,
        eqn: Any,
        tags: Tags,
        roles: Sequence[str] | None,
        context: tuple[str, ...],
        lookup: str = "",
    ) -> None:
        """Notes a use; roles: a label for each axis of the value, None for no role."""
        opaque = any(c in compat.CUSTOM_RULES for c in context)
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
            self.uses[t.leaf].append(
                Use(
                    eqn.primitive.name,
                    labels,
                    compat.source_line(eqn),
                    context,
                    opaque,
                    t.blurred,
                    lookup,
                )
            )


# With data these make another weight of a weight: a mask, a gate, a row written.
_EDITS = frozenset({"mul", "div", "select_n", "dynamic_update_slice"})


def _is_edit(eqn: Any, t: Tag, src: Sequence[int], dst: Sequence[int]) -> bool:
    """Whether an equation that data enters still gives a weight of the same shape.

    A sum does not count: a position table added to the text is the common case, and
    a weight with noise added the rare one.  Nor does what was spread over a batch.
    """
    name = eqn.primitive.name
    if name not in _EDITS and not name.startswith("scatter"):
        return False
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


def _cut(t: Tag, src: Sequence[int], dst: Sequence[int]) -> Tag:
    """An axis sliced down to one row leaves the value: a stack axis."""
    rows = [b == 1 < a for a, b in zip(src, dst, strict=True)]
    lost = {(k, "s") for ks, r in zip(t.axes, rows, strict=True) if r for k in ks}
    axes = [_NOTHING if r else ks for ks, r in zip(t.axes, rows, strict=True)]
    return dataclasses.replace(t.moved(axes), gone=t.gone | lost)


# --- the verdict ---------------------------------------------------------------------


def _verdict(
    path: str, shape: tuple[int, ...], uses: list[Use], name: LeafUse
) -> LeafUse:
    made = LeafUse(path, shape, uses=tuple(uses))
    if not uses:
        return dataclasses.replace(made, kind=UNUSED)
    eaten = [u for u in uses if u.primitive in CONSUMERS and u.roles]
    fit = [u for u in eaten if not u.blurred and _is_matrix(u.roles, shape, name)]
    if not fit:
        changed = [u for u in eaten if u.primitive != "gather" and _wide(u, shape)]
        if changed:
            u = changed[0]
            return dataclasses.replace(
                made,
                kind=CONSUMERS[u.primitive],
                changed_axes=u.roles if _is_matrix(u.roles, shape, name) else None,
                doubt=f"the model changes it before `{u.primitive}` at "
                f"{u.site or 'a library line'}",
            )
        return dataclasses.replace(made, kind=_small_kind(name, uses, shape))
    # A tied table is parametrised as a table: (vocabulary, width).
    fit.sort(key=lambda u: u.primitive != "gather")
    kind, axes = CONSUMERS[fit[0].primitive], fit[0].roles
    seen = {_canonical(u.roles, shape) for u in fit}
    both = {_canonical(axes, shape), _canonical(axes, shape).translate(_FLIP)}
    notes = []
    if not seen <= both:
        notes.append("grouped as " + " and ".join(sorted(seen)))
    rest = sorted({u.primitive for u in uses if u not in fit})
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
    wide = {c for c, n in zip(use.roles, shape, strict=True) if n > 1}
    return {"i", "o"} <= wide or ("x" in wide)


def _canonical(roles: str, shape: tuple[int, ...]) -> str:
    return "".join("-" if n == 1 else c for c, n in zip(roles, shape, strict=True))


def _small_kind(name: LeafUse, uses: list[Use], shape: tuple[int, ...]) -> str:
    """Biases and scales: by name first, else one real axis that is added or scales."""
    if name.kind in (BIAS, NORM):
        return name.kind
    if sum(n > 1 for n in shape) == 1:
        primitives = {u.primitive for u in uses}
        if primitives <= {"add", "add_any"}:
            return BIAS
        if primitives <= {"mul"}:
            return NORM
    return OTHER
