"""What becomes of token ids on their way to a lookup.

A model may clip its ids to the vocabulary, wrap them around it, or replace those it
does not know.  Nothing in the shapes tells, and virtual tokens, whose ids begin where
the vocabulary ends, would be lost in silence.  So the computation of an index, and that
alone, is carried out with ids of just that size in the place of the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jpeft import compat
from jpeft.adapt.equations import (
    Add,
    Bound,
    Call,
    Jit,
    Join,
    LookUp,
    Order,
    Scale,
    Select,
    only_moves,
    read,
)

DIRECT, CONSTANT, UNKNOWN = "direct", "constant", ""
CLIPPED, WRAPPED, SHIFTED, REPLACED = "clipped", "wrapped", "shifted", "replaced"
LOST = frozenset({CLIPPED, WRAPPED, SHIFTED, REPLACED})
# Masks of scores are larger; indices of a text are not.
_LARGEST = 1 << 20


class Lookups:
    """The programs entered so far, as far as indices need them."""

    def __init__(self, program: Any, inputs: Sequence[Any], weights: int):
        """inputs: of the whole program; the first `weights` are not data."""
        self._host = program
        self._made: dict[Any, Any] = {}
        self._outer: dict[Any, Any] = {}
        self._consts: dict[Any, Any] = {}
        self._data = {v: k for k, v in enumerate(inputs[weights:])}
        self._depends: dict[Any, frozenset[Any]] = {}

    def enter(self, jaxpr: Any, consts: Sequence[Any], given: Sequence[Any]) -> None:
        """An inner program called with these variables; None: of no known value."""
        self._outer.update(
            (v, x) for v, x in zip(jaxpr.invars, given, strict=True) if v is not x
        )
        self._consts.update(zip(jaxpr.constvars, consts, strict=False))
        # Entered again from elsewhere, the same program depends on other data.
        self._depends.clear()

    def add(self, eqn: Any) -> None:
        self._made.update(dict.fromkeys(eqn.outvars, eqn))

    def fate(self, indices: Any, column: int, size: int) -> str:
        """What ids equal to `size`, the table's rows, are when they are looked up."""
        data = self._data_of(indices)
        if data is None:
            return UNKNOWN
        ids = [v for v in data if np.issubdtype(v.aval.dtype, np.integer)]
        if not ids:
            return CONSTANT
        largest = None
        # All at once; then one after the other, for one of them may be a mask.
        for probed in [ids, *([v] for v in ids if len(ids) > 1)]:
            found = self._value(indices, frozenset(probed), size, {})
            if found is None or not found.size:
                return UNKNOWN
            rows = found[..., column]
            if np.any(rows == size):
                return DIRECT
            largest = int(rows.max()) if largest is None else largest
        if largest == size - 1:
            return CLIPPED
        return WRAPPED if not largest else SHIFTED if largest > size else REPLACED

    def sources(self, indices: Any) -> tuple[int, ...]:
        """Which inputs of data the indices are made of, by number."""
        data = self._data_of(indices) or ()
        kind = lambda v: np.issubdtype(v.aval.dtype, np.integer)
        return tuple(sorted(self._data[v] for v in data if kind(v)))

    def _data_of(self, var: Any) -> frozenset[Any] | None:
        """The data a value depends on; None: on something of no known value."""
        if isinstance(var, compat.Literal) or var in self._consts:
            return frozenset()
        if var in self._data:
            kind = var.aval.dtype
            known = np.issubdtype(kind, np.integer) or kind == np.bool_
            return frozenset({var}) if known else None
        if var not in self._depends:
            if var in self._outer:
                outer = self._outer[var]
                found = None if outer is None else self._data_of(outer)
            elif var in self._made:
                found = self._data_of_all(self._made[var].invars)
            else:
                found = None
            self._depends[var] = found  # type: ignore[assignment]
        return self._depends[var]

    def _data_of_all(self, variables: Sequence[Any]) -> frozenset[Any] | None:
        parts = [self._data_of(v) for v in variables]
        if any(p is None for p in parts):
            return None
        return frozenset().union(*(p for p in parts if p is not None))

    def _value(
        self, var: Any, probed: frozenset[Any], size: int, known: dict[Any, Any]
    ) -> Any:
        """A value with `size` in place of the probed data; None: too large to be an
        index, or not to be had."""
        if isinstance(var, compat.Literal):
            return np.asarray(var.val)
        if var in self._consts:
            return self._consts[var]
        if var in self._data:
            kind = var.aval.dtype
            fill = size if var in probed else 1
            if kind != np.bool_ and fill > np.iinfo(kind).max:
                return None
            return np.full(var.aval.shape, fill, kind)
        if var in self._outer:
            return self._value(self._outer[var], probed, size, known)
        if var not in known:
            eqn = self._made[var]
            ins = [self._value(v, probed, size, known) for v in eqn.invars]
            wide = any(v.aval.size > _LARGEST for v in eqn.outvars)
            if wide or eqn.effects or any(x is None for x in ins):
                return None
            known.update(zip(eqn.outvars, self._computed(eqn, ins), strict=True))
        return known[var]

    def _computed(self, eqn: Any, ins: Sequence[Any]) -> list[Any]:
        given = {
            v: x
            for v, x in zip(eqn.invars, ins, strict=True)
            if not isinstance(v, compat.Literal)
        }
        program = compat.sub_jaxpr(self._host, [eqn], list(given), eqn.outvars)
        with jax.ensure_compile_time_eval():
            outs = compat.jaxpr_as_fun(program)(*given.values())
        return [np.asarray(x) for x in outs]


# --- which tables one text looks up --------------------------------------------------

# What happens to ids on the way that leaves them the text's own.
_TO_AN_INDEX = (Add, Bound, Join, Order, Select)


def _makes_an_index(eqn: Any) -> bool:
    verb = read(eqn)
    if isinstance(verb, Jit):  # jnp.where
        return all(map(_makes_an_index, verb.jaxpr.eqns))
    return isinstance(verb, _TO_AN_INDEX) or only_moves(eqn)


def tables_looked_up(jaxpr: Any) -> list[tuple[int, frozenset[int]]]:
    """Of each lookup of rows, in order: the number of the program's input that is the
    table, and those of the inputs that are the ids, as they come."""
    inputs = {v: k for k, v in enumerate(jaxpr.invars)}
    found: list[tuple[int, frozenset[int]]] = []
    _look_into(jaxpr, inputs, {}, found)
    return found


def _look_into(
    jaxpr: Any,
    inputs: dict[Any, int],
    outer: dict[Any, tuple[Any, Any]],
    found: list[tuple[int, frozenset[int]]],
) -> None:
    """outer: for the variables of an inner program, the table and the ids they are."""
    made = {v: e for e in jaxpr.eqns for v in e.outvars}

    def table(v: Any) -> int | None:
        if isinstance(v, compat.Literal):
            return None
        if v in outer:
            return outer[v][0]
        if v in made and (only_moves(made[v]) or isinstance(read(made[v]), Scale)):
            return table(made[v].invars[0])
        return inputs.get(v)

    def ids(v: Any) -> frozenset[int] | None:
        """None: of something else than integers that enter."""
        if isinstance(v, compat.Literal) or v in jaxpr.constvars:
            return frozenset()
        if v in outer:
            return outer[v][1]
        if v in inputs:
            whole = np.issubdtype(v.aval.dtype, np.integer)
            return frozenset({inputs[v]}) if whole else None
        if v not in made or not _makes_an_index(made[v]):
            return None
        parts = list(map(ids, made[v].invars))
        if any(p is None for p in parts):
            return None
        return frozenset().union(*(p for p in parts if p is not None))

    for eqn in jaxpr.eqns:
        verb = read(eqn)
        if isinstance(verb, LookUp):
            at, by = table(eqn.invars[0]), ids(eqn.invars[1])
            if at is not None and by:
                found.append((at, by))
        elif isinstance(verb, Call):
            pairs = zip(verb.jaxpr.invars, verb.given, strict=True)
            known = {v: (table(x), ids(x)) for v, x in pairs}
            _look_into(verb.jaxpr, {}, known, found)
