"""Evaluates a jaxpr in which some values are adapted leaves, or carried values.

Runs of equations that touch none of them go back to JAX's own evaluator, whole.  The
others are looked up in one table of rules, (verb, kind of leaf) -> function.  An
equation without a rule is refused by name, or given the leaf's full value where that
was allowed.  A carried value knows itself what goes through it, and settles into a
plain array where nothing does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jpeft import compat
from jpeft.adapt.channel import Channel, Ledger, Rows
from jpeft.adapt.equations import (
    Contract,
    Join,
    Product,
    Route,
    Verb,
    adds,
    read,
    varying,
)
from jpeft.leaf import (
    AdaptedLeaf,
    Path,
    fold_key,
    has_key,
    is_carried,
    is_leaf,
    is_node,
    layers,
    merges,
    title,
)
from jpeft.types import DensifyError, DerivativeError

# (interpreter, verb, operands) -> the equation's output (a list for several), or None:
# no cheap form.  Of a primitive that holds a program it gets the equation.
Rule = Callable[["Interpreter", Any, list[Any]], Any]

_RULES: dict[tuple[type[Verb], type], Rule] = {}
_CONTROL: dict[str, Rule] = {}
_JOINS: set[Any] = set()
# What a dropout key folds in: the number of a use, or of a call that holds uses (a
# loop's step folds `control._STEP`).
_USE, _CALL = 1, 3


def acts(
    *verbs: type[Verb], kind: type[AdaptedLeaf], joins: bool = False
) -> Callable[[Any], Any]:
    """Enters a function (interpreter, verb, operands) in the table: for leaves of
    `kind` and its subclasses, in these verbs and all that are of their kind.

    joins: it is asked too where a leaf of another kind comes first, and has no answer.
    """

    def enter(f: Any) -> Any:
        if joins:
            _JOINS.add(f)
        for verb in verbs:
            _RULES[verb, kind] = f
        return f

    return enter


def acts_as(method: str, *verbs: type[Verb], kind: type[AdaptedLeaf]) -> None:
    """In these verbs a leaf of `kind` acts as the leaf that this method of its own
    makes, where that one has a rule.  No verbs: in all."""

    def as_another(it: Interpreter, verb: Verb, ins: list[Any]) -> Any:
        made = [getattr(x, method)() if isinstance(x, kind) else x for x in ins]
        pairs = zip(made, ins, strict=True)
        known = all(find_rule(verb, x) for x, was in pairs if x is not was)
        return it.bind(verb.eqn, made) if known else None

    acts(*verbs or (Verb,), kind=kind, joins=True)(as_another)


def contracts(
    *, kind: type[AdaptedLeaf], two: Callable[..., Any] | None = None
) -> Callable[[Any], Any]:
    """Enters a function (interpreter, product) for a leaf of `kind` that is contracted
    with something else.

    two: operands -> those that stand for them where both are leaves.  None: there is
        no answer then.
    """

    def enter(f: Any) -> Any:
        @acts(Contract, kind=kind)
        def of_operands(it: Interpreter, verb: Contract, ins: list[Any]) -> Any:
            if not all(map(is_leaf, ins)):
                return f(it, verb.of(ins))
            return None if two is None else it.bind(verb.eqn, two(ins))

        return f

    return enter


def control_rule(*primitives: str) -> Callable[[Rule], Rule]:
    """Enters a function for a primitive that holds a program, for every kind."""

    def enter(f: Rule) -> Rule:
        for name in primitives:
            _CONTROL[name] = f
        return f

    return enter


def find_rule(verb: Verb | None, leaf: AdaptedLeaf) -> Rule | None:
    """That of the nearest kind, and there of the nearest verb."""
    verbs = () if verb is None else type(verb).__mro__
    for kind in type(leaf).__mro__:
        for each in verbs:
            if (each, kind) in _RULES:
                return _RULES[each, kind]
    return None


class Interpreter:
    """One call of an adapted function.

    allow: give the full value of a leaf to equations without a rule.
    densified: (path, primitive, source line) of each time that happened.
    memo: inner jits by the identity of their program, so that one layer jitted once and
    called twelve times stays one program.
    """

    def __init__(self, allow: bool):
        self.allow = allow
        self.densified: list[tuple[str, str, str]] = []
        self.memo: dict[Any, tuple[Any, Callable[..., Any]]] = {}
        self.ledger = Ledger()
        # noted(role, value, axis): told of each key and value a prefix stands before.
        self.noted: Callable[[str, Any, int], None] = lambda *_: None
        self.channel = Channel()
        self._host: Any = None
        self._outer: Any = None
        self._stack: list[Any] = []
        self._env: dict[Any, Any] = {}
        self._producer: dict[Any, Any] = {}
        self._given: dict[Any, Any] = {}

    # -- values -----------------------------------------------------------------------

    def densify(self, x: Any, eqn: Any, why: str = "") -> Any:
        """The plain value: a carried one settled, the full value of a leaf, which
        raises DensifyError unless that was allowed."""
        if not is_leaf(x):
            return settled(x)
        site = self.site(eqn)
        name = str.__str__(x.path) or "a leaf"
        if not self.allow or not all(merges(leaf) for leaf in layers(x)):
            kind = title(x)
            raise DensifyError(
                f"{name}: {kind} {x.shape} reaches `{eqn.primitive.name}` at {site}, "
                f"{why or f'where {kind} has no cheap form'}. {x.instead(name)}"
            )
        self.densified.append((name, eqn.primitive.name, site))
        return x.materialize()

    def plain(self, eqn: Any, values: Sequence[Any], why: str = "") -> list[Any]:
        return [self.densify(v, eqn, why) for v in values]

    def site(self, eqn: Any) -> str:
        """The user's source line; inside jnp's own jits that of the caller."""
        lines = map(compat.source_line, [eqn, *reversed(self._stack)])
        return next((line for line in lines if line), "an unknown line")

    def producer(self, var: Any) -> Any:
        """The equation that made `var`, in the present program or around it where this
        one was entered in place; or None."""
        var = self.source(var)
        return None if isinstance(var, compat.Literal) else self._producer.get(var)

    def varying(self, var: Any) -> set[int]:
        """See `equations.varying`."""

        def made_by(v: Any) -> Verb | None:
            eqn = self.producer(v)
            return None if eqn is None else read(eqn)

        return varying(var, made_by)

    def source(self, var: Any) -> Any:
        """The variable or literal that stands for `var` outside of a program that was
        entered in place."""
        while not isinstance(var, compat.Literal) and var in self._given:
            var = self._given[var]
        return var

    def enter_in_place(self, jaxpr: Any, given: Sequence[Any]) -> None:
        """The next program is part of this one: its inputs are these variables."""
        self._given.update(zip(jaxpr.invars, given, strict=True))

    def is_constant(self, var: Any) -> bool:
        """Whether the present program holds the value, whatever enters it."""
        return var in self._host.constvars

    def readers(self, var: Any) -> int:
        """How many equations of the present program read `var`."""
        return sum(var in _vars(e) for e in self._host.eqns)

    def read(self, var: Any) -> Any:
        """The value of a variable that is already computed (None if it is not yet)."""
        if isinstance(var, compat.Literal):
            return var.val
        return self._env.get(var)

    # -- derivatives that the function takes itself -----------------------------------

    def in_derivative(self) -> bool:
        """Whether the present equation is one of a derivative taken in the function."""
        return compat.differentiates(self._stack)

    def _allowed(self, eqn: Any, ins: list[Any]) -> list[Any]:
        """The operands, where the equation is of a derivative as they may stand there.

        It was written for the plain model.  A weight is right in it, in whatever
        direction; anything else would act on tangents as it does on values, and have
        no derivative of its own.
        """
        name = eqn.primitive.name
        if name in _CONTROL and name not in compat.CUSTOM_RULES:
            return ins  # what is inside tells
        if all(map(_is_weight, ins)) or not self.in_derivative():
            return ins
        for x in filter(is_leaf, ins):
            for leaf in layers(x):
                if not merges(leaf):
                    raise self.no_derivative(eqn, x.path, title(leaf))
                if leaf.key is not None:
                    raise self.no_derivative(eqn, x.path, f"dropout in {title(leaf)}")
        return [x.as_constant(self, eqn) if is_carried(x) else x for x in ins]

    def no_derivative(self, eqn: Any, path: str, what: str) -> DerivativeError:
        return DerivativeError(
            f"{str.__str__(path) or 'a leaf'}: {what} meets `{eqn.primitive.name}` at "
            f"{self.site(eqn)} inside of a derivative that the adapted function takes "
            "itself, where jpeft is exact for changes of a weight without dropout "
            "only; take the derivative outside of adapt: jax.grad(jpeft.adapt(fn)) "
            "instead of jpeft.adapt(jax.grad(fn))"
        )

    # -- links and rows ---------------------------------------------------------------

    def open_link(self, eqn: Any, name: str, value: Any) -> None:
        """Leaves `value`, a tree of arrays, for the leaf that closes `name`."""
        self.channel.open(name, value, self.site(eqn))

    def close_link(self, eqn: Any, name: str) -> Any:
        return self.channel.close(name, self.site(eqn))

    @property
    def rows(self) -> Rows:
        """Which positions are virtual tokens; see `Channel`."""
        return self.channel.rows

    def add_rows(self, at: jax.Array) -> None:
        self.channel.rows = (*self.channel.rows, at)

    @contextlib.contextmanager
    def using(self, channel: Channel) -> Iterator[Channel]:
        """Evaluates an inner program with a channel of its own."""
        saved, self.channel = self.channel, channel
        try:
            yield channel
        finally:
            self.channel = saved

    @contextlib.contextmanager
    def body(self, eqn: Any, rows: bool = True) -> Iterator[None]:
        """A body in which links start and end; rows enter it if they can."""
        with self.using(Channel(rows=self.rows if rows else ())) as channel:
            yield
        channel.end(f"the `{eqn.primitive.name}` at {self.site(eqn)}")

    # -- one equation -----------------------------------------------------------------

    def bind(self, eqn: Any, ins: Sequence[Any]) -> Any:
        """The equation on these values, leaves included.  A list if it has several
        outputs."""
        ins = list(ins)
        if not any(map(is_node, ins)):
            return self.native(eqn)(*ins)
        name = eqn.primitive.name
        if name in _CONTROL:
            out = _CONTROL[name](self, eqn, ins)
            return self.native(eqn)(*self.plain(eqn, ins)) if out is None else out
        verb = read(eqn)
        leaves = list(filter(is_leaf, ins))
        multiplies = isinstance(verb, (Contract, Route))
        if leaves and multiplies and any(map(_is_complex, ins)):
            out = self._real_and_imaginary(eqn, list(map(settled, ins)))
        elif leaves:
            first, *others = dict.fromkeys(find_rule(verb, x) for x in leaves)
            ins = list(map(settled, ins))
            out = first(self, verb, ins) if first else None
            for found in others:
                if out is None and found is not None and found in _JOINS:
                    out = found(self, verb, ins)
            if out is not None and isinstance(verb, Join) and is_leaf(out):
                out = _named_together(out, leaves)
        else:
            out = self._carry(eqn, ins)
        return self.native(eqn)(*self.plain(eqn, ins)) if out is None else out

    def _real_and_imaginary(self, eqn: Any, ins: list[Any]) -> Any:
        """A product of a weight, which is real, with something complex: two of real
        things, so that no rule needs to know."""
        real = {
            n: jnp.finfo(v).dtype if _is_complex_dtype(v) else v
            for n, v in eqn.params.items()
        }
        avals = [
            v.aval if is_leaf(x) else jax.typeof(jnp.real(x))
            for v, x in zip(eqn.invars, ins, strict=True)
        ]
        program = jax.make_jaxpr(lambda *a: eqn.primitive.bind(*a, **real))(*avals)
        parts = []
        for part in (jnp.real, jnp.imag):
            of = [part(x) if _is_complex(x) else x for x in ins]
            parts += self.run(program.jaxpr, program.consts, of)
        return lax.complex(*map(settled, parts))

    def _carry(self, eqn: Any, ins: list[Any]) -> Any:
        """What the first carried operand that knows the equation makes of it."""
        for x in filter(is_carried, ins):
            out = x.through(self, eqn, ins)
            if out is not None:
                return out
        return None

    def base(
        self,
        eqn: Any,
        ins: Sequence[Any],
        *,
        kind: type[AdaptedLeaf] = AdaptedLeaf,
    ) -> Any:
        """The equation with every leaf of `kind` replaced by its base."""
        return self.bind(eqn, [x.base if isinstance(x, kind) else x for x in ins])

    def with_delta(self, product: Product, delta: jax.Array) -> Any:
        """What the base makes, and a summand, in the dtype of that."""
        y = self.base(product.eqn, product.ins())
        return y + delta.astype(y.dtype)

    def native(self, eqn: Any) -> Callable[..., Any]:
        """The equation as JAX evaluates it (custom rules and effects included)."""
        invars = [v for v in eqn.invars if not isinstance(v, compat.Literal)]
        unique = list(dict.fromkeys(invars))
        program = compat.sub_jaxpr(self._host, [eqn], unique, eqn.outvars)
        f, outer = compat.jaxpr_as_fun(program), self._outer

        def call(*ins: Any) -> Any:
            value = {
                v: x
                for v, x in zip(eqn.invars, ins, strict=True)
                if not isinstance(v, compat.Literal)
            }
            # The evaluator adds the equation's own name stack to the current one.
            with compat.under_name_stack(outer):
                out = f(*(value[v] for v in unique))
            return out if eqn.primitive.multiple_results else out[0]

        return call

    def like(self, eqn: Any, x: Any) -> Any:
        """A one-operand equation on another array of the same rank."""
        return self.native(eqn)(x)

    # -- a program --------------------------------------------------------------------

    def run(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        """Evaluates a program; outputs may be leaves or carried values."""
        saved = self._host, self._outer, self._env
        self._host, self._outer = jaxpr, compat.name_stack()
        env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))
        self._env = env
        try:
            return self._run(jaxpr, env)
        finally:
            self._host, self._outer, self._env = saved

    def _run(self, jaxpr: Any, env: dict[Any, Any]) -> list[Any]:
        is_literal = lambda v: isinstance(v, compat.Literal)
        last: dict[Any, int] = {}
        for k, e in enumerate(jaxpr.eqns):
            for v in e.invars:
                if not is_literal(v):
                    last[v] = k
        end = len(jaxpr.eqns)
        last.update((v, end) for v in jaxpr.outvars if not is_literal(v))
        _keep_summands(jaxpr, last)
        ours = {v for v, x in env.items() if is_node(x)}
        waiting: list[Any] = []
        owed: set[Any] = set()
        reads: dict[Any, int] = {}

        def flush(now: int) -> None:
            """Hands the waiting run of untouched equations to JAX."""
            if not waiting:
                return
            outs = [v for e in waiting for v in e.outvars if last.get(v, -1) >= now]
            used = dict.fromkeys(
                v for e in waiting for v in e.invars if not is_literal(v)
            )
            ins = [v for v in used if v not in owed]
            program = compat.sub_jaxpr(jaxpr, waiting, ins, outs)
            values = compat.jaxpr_as_fun(program)(*(env[v] for v in ins))
            env.update(zip(outs, values, strict=True))
            waiting.clear()
            owed.clear()

        def read(e: Any, v: Any) -> Any:
            if is_literal(v):
                return v.val
            x = env[v]
            if v in ours and has_key(x):
                # Two uses of one weight draw two dropout masks.
                return _keyed(x, e, v, reads)
            return x

        for k, e in enumerate(jaxpr.eqns):
            for v in e.outvars:
                self._producer[v] = e
            if not any(v in ours for v in e.invars if not is_literal(v)):
                waiting.append(e)
                owed.update(e.outvars)
                continue
            # In the program's own order, for gradients are summed in it: what is
            # switched off must not change a bit of them.
            flush(k)
            self._stack.append(e)
            with compat.at_equation(e):
                out = self.bind(e, self._allowed(e, [read(e, v) for v in e.invars]))
            self._stack.pop()
            outs = out if e.primitive.multiple_results else [out]
            env.update(zip(e.outvars, outs, strict=True))
            ours.update(v for v, x in zip(e.outvars, outs, strict=True) if is_node(x))
        flush(end)
        return [v.val if is_literal(v) else env[v] for v in jaxpr.outvars]


def _is_weight(x: Any) -> bool:
    """Whether a value acts as an array would in every equation."""
    if is_leaf(x):
        return all(merges(leaf) and leaf.key is None for leaf in layers(x))
    return not is_carried(x)


def _keep_summands(jaxpr: Any, last: dict[Any, int]) -> None:
    """What a sum was made of is there still where something is added to the sum: a
    leaf may stand for that (`adds_to`)."""
    sums: dict[Any, Any] = {}
    for k, e in enumerate(jaxpr.eqns):
        if not adds(e):
            continue
        for v in _vars(e):
            for summand in sums.get(v, ()):
                last[summand] = max(last[summand], k)
        sums[e.outvars[0]] = _vars(e)


def _is_complex(x: Any) -> bool:
    return not is_node(x) and _is_complex_dtype(jnp.result_type(x))


def _is_complex_dtype(x: Any) -> bool:
    return isinstance(x, np.dtype) and jnp.issubdtype(x, jnp.complexfloating)


def _named_together(leaf: AdaptedLeaf, parts: Sequence[AdaptedLeaf]) -> AdaptedLeaf:
    """A leaf made of several has all their paths, as one pattern that matches each."""
    names = dict.fromkeys(str.__str__(x.path) for x in parts)
    base = leaf.base
    if is_leaf(base):
        base = _named_together(base, parts)
    return leaf.replace(path=Path("|".join(names)), base=base)


def settled(x: Any) -> Any:
    """A carried value as a plain one; anything else as it is."""
    while is_carried(x):
        x = x.settle()
    return x


def _keyed(leaf: AdaptedLeaf, eqn: Any, var: Any, reads: dict[Any, int]) -> AdaptedLeaf:
    """The leaf with the key of its next use: two uses draw two dropout masks.

    A checkpoint is no level of its own: what is rematerialised, and what is not, draw
    the same masks.
    """
    n = reads[var] = reads.get(var, -1) + 1
    name = eqn.primitive.name
    if name == compat.CHECKPOINT:
        jaxpr, _ = compat.open_jaxpr(eqn.params[compat.CALLS[name]])
        inside = {
            inner
            for outer, inner in zip(eqn.invars, jaxpr.invars, strict=True)
            if outer is var
        }
        uses = sum(any(v in inside for v in _vars(e)) for e in jaxpr.eqns)
        reads[var] += max(0, uses - 1)
        return fold_key(leaf, _CALL, n) if n else leaf
    return fold_key(leaf, _CALL if name in _CONTROL else _USE, n)


def _vars(eqn: Any) -> list[Any]:
    return [v for v in eqn.invars if not isinstance(v, compat.Literal)]


def has_tracer(values: Sequence[Any]) -> bool:
    return any(isinstance(x, compat.Tracer) for x in jax.tree.leaves(list(values)))
