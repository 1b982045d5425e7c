"""Which outputs of a program are inputs that it hands on untouched.

A training step returns its state, a loop its carry.  The weights among them stay
adapted, whatever they pass through: their values alone would be another tree.
"""

from __future__ import annotations

from typing import Any

from jpeft import compat
from jpeft.adapt.equations import (
    Barrier,
    Branch,
    Call,
    OnShards,
    Same,
    Scan,
    Stop,
    While,
    read,
)


def handed_on(jaxpr: Any, stopped: bool = False) -> list[int | None]:
    """For each output of a program the number of the input that it is, or None.

    stopped: counts those too whose gradient the program stops.
    """
    found = _Origins(stopped)
    return [found.of_output(jaxpr, n) for n in range(len(jaxpr.outvars))]


def handed_through(eqn: Any) -> list[int | None]:
    """For each output of an equation the number of the operand that it is, or None."""
    found = _Origins(False)
    return [found.of_equation(eqn, n) for n in range(len(eqn.outvars))]


class _Origins:
    def __init__(self, stopped: bool):
        self.stopped = stopped
        self.known: dict[int, tuple[dict[Any, int], dict[Any, tuple[Any, int]]]] = {}

    def of_output(self, jaxpr: Any, n: int) -> int | None:
        if id(jaxpr) not in self.known:
            place = {v: k for k, v in enumerate(jaxpr.invars)}
            made = {v: (e, j) for e in jaxpr.eqns for j, v in enumerate(e.outvars)}
            self.known[id(jaxpr)] = place, made
        place, made = self.known[id(jaxpr)]
        var = jaxpr.outvars[n]
        while not isinstance(var, compat.Literal):
            if var in place:
                return place[var]
            if var not in made:
                return None  # a constant
            eqn, j = made[var]
            k = self.of_equation(eqn, j)
            if k is None:
                return None
            var = eqn.invars[k]
        return None

    def of_equation(self, eqn: Any, n: int) -> int | None:
        verb = read(eqn)
        if isinstance(verb, Same):
            same = verb.is_operand or (isinstance(verb, Stop) and self.stopped)
            return 0 if same else None
        if isinstance(verb, Barrier):
            return n
        if isinstance(verb, Call):
            k = self.of_output(verb.jaxpr, n)
            if k is None:
                return None
            k += verb.first
            cut = isinstance(verb, OnShards) and not verb.as_cut(k, n)
            return None if cut else k
        if isinstance(verb, Scan):
            n_consts, n_carry = verb.counts
            k = self.of_output(verb.body, n)
            if n < n_carry:  # each step hands on what the step before did
                return k if k == n_consts + n else None
            return k if k is not None and k >= n_consts + n_carry else None
        if isinstance(verb, While):
            of_test, of_body = verb.counts
            k = self.of_output(verb.body, n)
            return of_test + of_body + n if k == of_body + n else None
        if isinstance(verb, Branch):
            first, *others = (self.of_output(b, n) for b, _ in verb.branches)
            alike = all(k == first for k in others)
            return 1 + first if alike and first is not None else None
        return None
