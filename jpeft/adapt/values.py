"""What an activation is, as far as the vectors that meet it need to know.

A vector that a model multiplies is a norm's scale if the other factor was divided by
the root of a statistic; one that it adds is a bias if the other summand is the product
of a weight, or such a norm.  So each value of a program is followed from there:

    statistic     a sum or maximum over some axes, and what is made of such alone
    root          of a statistic, or of a weight by itself (a running variance)
    normalised    times or divided by a root; `scaled`: and times a vector since
    product       of one weight or several, where nothing else was added yet
    joined        a product and something else, such as the residual stream
    weighted      a product or sum of these times a vector;  biased: plus a vector
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from jpeft import compat
from jpeft.adapt.equations import (
    Add,
    Barrier,
    ByElement,
    Cast,
    Contract,
    Join,
    Move,
    Negate,
    Pad,
    Pool,
    Root,
    Scale,
    Select,
    Subtract,
    SumOfShards,
    Verb,
)
from jpeft.tree.layout import (
    BIAS,
    LATE_BIAS,
    LAYER_SCALE,
    MAYBE_BIAS,
    MAYBE_SCALE,
    NEUTRAL,
    NORM_BIAS,
    NORM_SCALE,
)

STATISTIC, ROOT, SCALED_ROOT = "statistic", "root", "scaled root"
NORMALISED, SCALED = "normalised", "scaled"
PRODUCT, JOINED, WEIGHTED, BIASED = "product", "joined", "weighted", "biased"
_OF_WEIGHTS = frozenset({PRODUCT, JOINED, WEIGHTED, BIASED})
_OF_DATA_ALONE = frozenset({STATISTIC, ROOT})

Axes = tuple[frozenset[int], ...]
_NOTHING: frozenset[int] = frozenset()
_OWN = frozenset({0})


@dataclasses.dataclass(frozen=True)
class Value:
    """kind: see above, or "".

    of: of products, the weights' numbers; of what is scaled, that of its scale.
    out: for each axis, empty unless it is an axis of those weights.
    shared: of products, whether they have another reader.
    """

    kind: str = ""
    of: frozenset[int] = _NOTHING
    out: Axes = ()
    shared: bool = False

    def now(self, kind: str) -> Value:
        return dataclasses.replace(self, kind=kind)


UNKNOWN = Value()


@dataclasses.dataclass(frozen=True)
class Operand:
    """One operand of an equation.

    weight: it is made of weights alone, or a row of one.  vector: and has one axis.
    number: it is the same everywhere.  leaves: the weights' numbers.
    """

    value: Value
    weight: bool
    vector: bool
    number: bool
    leaves: frozenset[int] = _NOTHING


class Values:
    """The values of the programs entered so far."""

    def __init__(self) -> None:
        self._known: dict[Any, Value] = {}

    def __getitem__(self, var: Any) -> Value:
        if isinstance(var, compat.Literal):
            return UNKNOWN
        return self._known.get(var, UNKNOWN)

    def enter(self, inner: Sequence[Any], given: Sequence[Any]) -> None:
        """The variables `inner` are what `given` are: of a program called with them,
        of an equation that gives its program's outputs."""
        found = [self[v] for v in given]
        for v, x in zip(inner, found, strict=True):
            self._known[v] = x

    def forget(self, variables: Sequence[Any]) -> None:
        for v in variables:
            self._known.pop(v, None)

    def share(self, variables: Iterable[Any]) -> None:
        """These have more than one reader."""
        for v in variables:
            if v in self._known:
                self._known[v] = dataclasses.replace(self._known[v], shared=True)

    def product(self, eqn: Any, of: frozenset[int], out: Axes) -> None:
        """The equation's output is a product of weights, with these axes of theirs."""
        self._known[eqn.outvars[0]] = Value(PRODUCT, of, out)

    def add(self, eqn: Any, verb: Verb | None, ins: Sequence[Operand]) -> None:
        """What an equation makes of its operands."""
        for v, x in zip(eqn.outvars, self._made(eqn, verb, ins), strict=True):
            self._known[v] = x

    def _made(self, eqn: Any, verb: Verb | None, ins: Sequence[Operand]) -> list[Value]:
        none = [UNKNOWN] * len(eqn.outvars)
        if not ins or verb is None:
            return none
        first = ins[0].value
        if isinstance(verb, Pool) or (isinstance(verb, Contract) and verb.sums_all):
            return [Value(STATISTIC)]
        if isinstance(verb, (Barrier, SumOfShards)):
            return [x.value for x in ins]
        if isinstance(verb, Join):
            same = {x.value.kind for x in ins} == {PRODUCT} and not verb.new
            return [_together([x.value for x in ins])] if same else none
        if isinstance(verb, ByElement) and not isinstance(verb, (Cast, Negate)):
            return [_by_element(verb, ins)]
        if isinstance(verb, Move) and verb.step is Pad:
            return none  # something stands beside it
        if first == UNKNOWN:
            return none
        own = first.out or (_NOTHING,) * len(eqn.invars[0].aval.shape)
        axes = verb.carried(own) or []
        out = [dataclasses.replace(first, out=a if first.out else ()) for a in axes]
        return out or none


def _by_element(verb: ByElement, ins: Sequence[Operand]) -> Value:
    a = ins[0]
    if isinstance(verb, Root):
        of_weight = a.weight and a.value.kind != ROOT
        return Value(ROOT) if a.value.kind == STATISTIC or of_weight else UNKNOWN
    kinds = {x.value.kind for x in ins if not x.number}
    if kinds and kinds <= _OF_DATA_ALONE:
        return Value(ROOT if ROOT in kinds else STATISTIC)
    if isinstance(verb, Select):
        kinds = {x.value.kind for x in ins[1:] if not x.number}
        return Value(kinds.pop()) if kinds in ({STATISTIC}, {ROOT}) else UNKNOWN
    if isinstance(verb, Scale):
        if ins[1].number:
            return a.value
        if a.number and not verb.divides:
            return ins[1].value
        return _scaled(verb, *ins)
    if isinstance(verb, Subtract) and ins[1].value.kind == STATISTIC:
        return Value(out=a.value.out)
    return _added(*ins) if isinstance(verb, Add) else UNKNOWN


def _scaled(verb: Scale, a: Operand, b: Operand) -> Value:
    for x, y in ((a, b),) if verb.divides else ((a, b), (b, a)):
        if y.value.kind in (ROOT, SCALED_ROOT) and x.value.kind not in _OF_DATA_ALONE:
            if x.vector and not x.value.kind:
                once = y.value.kind == ROOT
                return Value(SCALED_ROOT, x.leaves) if once else UNKNOWN
            whole = NORMALISED if y.value.kind == ROOT else SCALED
            return Value(whole, y.value.of, x.value.out)
        if y.weight and not y.value.kind and x.value.kind == NORMALISED:
            return Value(SCALED, y.leaves, x.value.out)
        if y.weight and x.value.kind in _OF_WEIGHTS:
            return x.value.now(WEIGHTED)
    return UNKNOWN


def _added(a: Operand, b: Operand) -> Value:
    for x, y in ((a, b), (b, a)):
        if y.weight and y.value.kind != PRODUCT:
            known = x.value.kind in (PRODUCT, JOINED, WEIGHTED)
            return x.value.now(BIASED) if known else UNKNOWN
    products = [x.value for x in (a, b) if x.value.kind == PRODUCT]
    if len(products) == 2:
        return _together(products)
    return products[0].now(JOINED) if products else UNKNOWN


def _together(values: Sequence[Value]) -> Value:
    of = _NOTHING.union(*(x.of for x in values))
    each = zip(*(x.out for x in values), strict=True)
    out = tuple(_OWN if all(axis) else _NOTHING for axis in each)
    return Value(PRODUCT, of, out, any(x.shared for x in values))


# --- the part of a weight ------------------------------------------------------------


def part_of(
    verb: Verb | None, ins: Sequence[Operand], k: int, wide: Sequence[bool]
) -> tuple[str, frozenset[int]]:
    """What operand k, made of a weight, does to the other one, and whose product, or
    scaled by what, that is.

    wide: along which axes the operand has the weight's own values.
    """
    if not isinstance(verb, (Add, Scale)):
        return "", _NOTHING
    other = ins[1 - k]
    value = other.value
    if isinstance(verb, Add):
        if other.number:
            return NEUTRAL, _NOTHING
        if value.kind in (NORMALISED, SCALED):
            return NORM_BIAS, value.of
        own = all(out for out, w in zip(value.out, wide, strict=False) if w)
        if value.kind in (PRODUCT, JOINED, WEIGHTED, BIASED):
            if not own:
                return "", _NOTHING
            if value.shared or value.kind in (WEIGHTED, BIASED):
                return MAYBE_BIAS, value.of
            return (BIAS if value.kind == PRODUCT else LATE_BIAS), value.of
        return ("" if value.kind or other.weight else MAYBE_BIAS), _NOTHING
    if value.kind == ROOT or (value.kind == NORMALISED and not verb.divides):
        return NORM_SCALE, _NOTHING
    if verb.divides:
        return (NEUTRAL if k == 0 and other.number else ""), _NOTHING
    if other.number:
        return NEUTRAL, _NOTHING
    if value.kind in (*_OF_WEIGHTS, SCALED):
        return LAYER_SCALE, value.of
    return ("" if value.kind or other.weight else MAYBE_SCALE), _NOTHING
