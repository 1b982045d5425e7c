"""Rules of the primitives that hold programs: they are re-entered with the leaves.

Leaves and carried values are pytrees, so they pass into jit, checkpoint, scan, while,
cond and shard_map as they are.  They come out of jit and checkpoint too; out of the
others they come as values.  So do links (see `channel`), which start and end in the
bodies of the others.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jpeft import compat
from jpeft.adapt.channel import Channel, Links, Rows, crossing, knows_rows
from jpeft.adapt.handed import handed_on, handed_through
from jpeft.adapt.interpreter import Interpreter, control_rule, has_tracer, settled
from jpeft.leaf import fold_key, has_key, is_leaf, is_node
from jpeft.sharding.specs import leaf_specs

_STEP = 2
_OUT_OF_LOOP = "and an adapted weight cannot leave a loop, a branch or a shard_map"


@control_rule("jit")
def _jit(it: Interpreter, eqn: Any, ins: list[Any]) -> list[Any]:
    params = eqn.params
    closed = params["jaxpr"]
    constrain = _constraints(params)
    if params.get("name") in compat.INLINED:
        it.enter_in_place(closed.jaxpr, eqn.invars)
        return constrain(it, it.run(closed.jaxpr, closed.consts, ins))
    if not has_tracer(ins):
        # Called eagerly: a jit made here would be compiled anew at every call.
        return constrain(it, it.run(closed.jaxpr, closed.consts, ins))
    # Two layers whose links stay inside are one program; a link that crosses has a
    # name, and each name is another program.  Inside of a derivative more is refused.
    which = id(closed), it.in_derivative(), *crossing(ins)
    if which not in it.memo:

        def inner(channel: Any, *xs: Any) -> tuple[list[Any], Any]:
            with _entered(it, channel, ins):
                outs = constrain(it, it.run(closed.jaxpr, closed.consts, xs))
                return outs, _left(it, ins)

        inner.__name__ = inner.__qualname__ = str(params.get("name", "jit"))
        options = dict(params.get("compiler_options_kvs") or ())
        it.memo[which] = (
            closed,
            jax.jit(
                inner,
                inline=params.get("inline", False),  # since 0.12 more than a bool
                compiler_options=options or None,
            ),
        )
    outs, left = it.memo[which][1](_handed_in(it, ins), *ins)
    _take_up(it, ins, left)
    return _handed_back(closed.jaxpr, ins, outs)


# An inner program receives the links and rows that its leaves ask for, and returns
# those that its leaves make: (links by name, rows).


def _handed_in(it: Interpreter, ins: Sequence[Any]) -> tuple[Links, Rows]:
    wanted, _ = crossing(ins)
    links = {n: it.channel.links[n] for n in wanted if n in it.channel.links}
    return links, it.rows if knows_rows(ins) else ()


@contextlib.contextmanager
def _entered(it: Interpreter, given: tuple[Links, Rows], ins: Sequence[Any]):
    links, rows = given
    with it.using(Channel(dict(links), tuple(rows))):
        yield


def _left(it: Interpreter, ins: Sequence[Any]) -> tuple[Links, Rows]:
    return it.channel.links, it.rows if knows_rows(ins) else ()


def _take_up(it: Interpreter, ins: Sequence[Any], left: tuple[Links, Rows]) -> None:
    wanted, _ = crossing(ins)
    kept = {n: x for n, x in it.channel.links.items() if n not in wanted}
    links, rows = left
    it.channel.links = {**kept, **links}
    if knows_rows(ins):
        it.channel.rows = tuple(rows)


def _constraints(params: dict[str, Any]):
    """An inner jit's out_shardings as constraints.  (Its in_shardings say where inputs
    are, which inside one program is the compiler's business; donation likewise.)"""
    wanted = params.get("out_shardings") or ()

    def constrain(it: Interpreter, outs: list[Any]) -> list[Any]:
        if not any(isinstance(s, jax.sharding.Sharding) for s in wanted):
            return outs
        return [
            lax.with_sharding_constraint(o, s)
            if isinstance(s, jax.sharding.Sharding) and not is_leaf(o)
            else o
            for o, s in zip(outs, wanted, strict=True)
        ]

    return constrain


@control_rule("closed_call")
def _call(it: Interpreter, eqn: Any, ins: list[Any]) -> list[Any]:
    return it.run(*compat.open_jaxpr(eqn.params["call_jaxpr"]), ins)


@control_rule("remat2")
def _checkpoint(it: Interpreter, eqn: Any, ins: list[Any]) -> list[Any]:
    jaxpr, consts = compat.open_jaxpr(eqn.params["jaxpr"])

    # Leaves may share an array; handed in twice, it would be two arrays inside, and
    # what is made of it would be made twice.
    values, treedef = jax.tree.flatten((_handed_in(it, ins), ins))
    once = list({id(x): x for x in values}.values())
    at = {id(x): k for k, x in enumerate(once)}
    places = [at[id(x)] for x in values]

    def inner(*once: Any) -> tuple[list[Any], Any]:
        channel, xs = treedef.unflatten(once[k] for k in places)
        with _entered(it, channel, ins):
            return it.run(jaxpr, consts, xs), _left(it, ins)

    body = jax.checkpoint(
        inner,
        policy=eqn.params["policy"],
        prevent_cse=eqn.params["prevent_cse"],
    )
    outs, left = body(*once)
    _take_up(it, ins, left)
    return _handed_back(jaxpr, ins, outs)


def _handed_back(jaxpr: Any, ins: Sequence[Any], outs: Sequence[Any]) -> list[Any]:
    """Leaves returned as they came are the very objects that came in."""
    return _put_back(outs, ins, handed_on(jaxpr))


def _put_back(
    outs: Sequence[Any], ins: Sequence[Any], on: Sequence[int | None]
) -> list[Any]:
    """`on`: which operand each output is, if it is one; see `handed_on`."""
    return [
        ins[k] if k is not None and is_node(ins[k]) else o
        for o, k in zip(outs, on, strict=True)
    ]


def _left_out(outs: Sequence[Any], ins: Sequence[Any], on: Sequence[int | None]):
    """None for what `_put_back` will put there, so that it need not be a value."""
    return [
        None if k is not None and is_node(ins[k]) else o
        for o, k in zip(outs, on, strict=True)
    ]


@control_rule("custom_jvp_call", "custom_vjp_call")
def _custom(it: Interpreter, eqn: Any, ins: list[Any]) -> Any:
    """A gradient rule of the user's own that receives the weight.

    Entering its program would silently replace the rule by autodiff, so the rule gets
    the weight's full value.

    What is owed on a carried value is owed inside, so there the rule is left out and
    its program differentiated.
    """
    if not any(map(is_leaf, ins)):
        name = compat.CALLS[eqn.primitive.name]
        return it.run(*compat.open_jaxpr(eqn.params[name]), ins)
    why = (
        "whose own gradient rule receives the weight, so that only a plain one keeps "
        "that rule. What takes adapted weights itself, such as "
        "jpeft.objectives.linear_cross_entropy, is called outside of jpeft.adapt: "
        "let the adapted function return its input"
    )
    return it.bind(eqn, it.plain(eqn, ins, why))


def _hoist(
    it: Interpreter, eqn: Any, carry: Sequence[Any], jaxpr: Any, before: int
) -> tuple[list[bool], list[Any]]:
    """Leaves in a carry: one that the body hands back untouched is a constant, any
    other becomes a value."""
    on = handed_on(jaxpr)
    same = [is_node(x) and on[k] == before + k for k, x in enumerate(carry)]
    why = "in a loop's carry, where the loop changes it"
    return same, [
        x if s else it.densify(x, eqn, why) for x, s in zip(carry, same, strict=True)
    ]


def _moving(values: Sequence[Any], same: Sequence[bool]) -> list[Any]:
    return [v for v, s in zip(values, same, strict=True) if not s]


def _whole(carry: Sequence[Any], fixed: Sequence[Any], same: Sequence[bool]) -> list:
    rest = iter(carry)
    return [v if s else next(rest) for v, s in zip(fixed, same, strict=True)]


def _folded(values: Sequence[Any], step: Any) -> list[Any]:
    """Each step of a loop draws dropout masks of its own."""
    return [fold_key(x, _STEP, step) for x in values]


def _any_key(values: Sequence[Any]) -> bool:
    return any(map(has_key, values))


@control_rule("scan")
def _scan(it: Interpreter, eqn: Any, ins: list[Any]) -> list[Any]:
    p = eqn.params
    n_consts, n_carry = compat.scan_counts(eqn)
    jaxpr, closed = compat.open_jaxpr(p["jaxpr"])
    consts, xs = ins[:n_consts], ins[n_consts + n_carry :]
    same, init = _hoist(it, eqn, ins[n_consts : n_consts + n_carry], jaxpr, n_consts)
    xs = [_with_rows(it, eqn, settled(x)) for x in xs]
    parts = [x.unstack() if is_leaf(x) else (x, None, _first) for x in xs]
    # The scanned part of a leaf enters the body as it is: JAX recognises a scanned
    # input handed on unchanged and saves no copy of it for the backward pass.
    steps = jnp.arange(p["length"]) if _any_key([*consts, *init, *xs]) else None
    # A body may hand its layer back (nnx.scan returns the module's state): stacked
    # again, that is the leaf that was scanned.
    given = [*consts, *init, *xs]
    on = handed_through(eqn)[n_carry:]

    def body(carry: list[Any], x: tuple[list[Any], Any]):
        scanned, step = x
        joined = [join(s, k) for (_, k, join), s in zip(parts, scanned, strict=True)]
        args = [*consts, *_whole(carry, init, same), *joined]
        if step is not None:
            args = _folded(args, step)
        with it.body(eqn):
            out = it.run(jaxpr, closed, args)
        moved = it.plain(eqn, _moving(out[:n_carry], same), _OUT_OF_LOOP)
        ys = _left_out(out[n_carry:], given, on)
        return moved, it.plain(eqn, ys, _OUT_OF_LOOP)

    carry, ys = lax.scan(
        body,
        _moving(init, same),
        ([s for s, _, _ in parts], steps),
        length=p["length"],
        reverse=p["reverse"],
        unroll=p["unroll"],
    )
    return _whole(carry, init, same) + _put_back(ys, given, on)


def _with_rows(it: Interpreter, eqn: Any, x: Any) -> Any:
    if not is_leaf(x) or x.unstack() is not None:
        return x
    why = (
        "as a stack of layers, but its first axis does not count layers, or the stack "
        "was changed before (scan over the weight itself, and change each layer's row)"
    )
    return it.densify(x, eqn, why)


def _first(scanned: Any, constant: Any) -> Any:
    return scanned


@control_rule("while")
def _while(it: Interpreter, eqn: Any, ins: list[Any]) -> list[Any]:
    p = eqn.params
    n_cond, n_body = p["cond_nconsts"], p["body_nconsts"]
    cond, cond_consts = compat.open_jaxpr(p["cond_jaxpr"])
    loop, loop_consts = compat.open_jaxpr(p["body_jaxpr"])
    of_cond, of_body = ins[:n_cond], ins[n_cond : n_cond + n_body]
    same, init = _hoist(it, eqn, ins[n_cond + n_body :], loop, n_body)
    start = jnp.int32(0) if _any_key([*of_cond, *of_body, *init]) else None

    def go_on(state: tuple[Any, list[Any]]) -> Any:
        _, carry = state
        with it.body(eqn):
            args = [*of_cond, *_whole(carry, init, same)]
            return settled(it.run(cond, cond_consts, args)[0])

    def body(state: tuple[Any, list[Any]]):
        step, carry = state
        args = [*of_body, *_whole(carry, init, same)]
        if step is not None:
            args, step = _folded(args, step), step + 1
        with it.body(eqn):
            out = it.run(loop, loop_consts, args)
        return step, it.plain(eqn, _moving(out, same), _OUT_OF_LOOP)

    _, carry = lax.while_loop(go_on, body, (start, _moving(init, same)))
    return _whole(carry, init, same)


@control_rule("cond")
def _cond(it: Interpreter, eqn: Any, ins: list[Any]) -> list[Any]:
    on = handed_through(eqn)

    def branch(closed: Any):
        jaxpr, consts = compat.open_jaxpr(closed)

        def run(*xs: Any) -> list[Any]:
            with it.body(eqn):
                outs = _left_out(it.run(jaxpr, consts, xs), ins, on)
                return it.plain(eqn, outs, _OUT_OF_LOOP)

        return run

    index = it.densify(ins[0], eqn)
    outs = lax.switch(index, [branch(b) for b in eqn.params["branches"]], *ins[1:])
    return _put_back(outs, ins, on)


@control_rule("shard_map")
def _shard_map(it: Interpreter, eqn: Any, ins: list[Any]) -> list[Any]:
    p = eqn.params
    jaxpr, consts = compat.open_jaxpr(p["jaxpr"])
    why = "which cuts it where it cannot be cut"
    whole = list(map(settled, ins))
    on = handed_through(eqn)
    here = [k is None or not is_node(whole[k]) for k in on]
    ins = [
        it.densify(x, eqn, why) if is_leaf(x) and cut is None else cut
        for x, s in zip(whole, p["in_specs"], strict=True)
        for cut in [x.for_shards(s, p["mesh"]) if is_leaf(x) else x]
    ]
    specs = tuple(
        leaf_specs(x, s) if is_leaf(x) else s
        for x, s in zip(ins, p["in_specs"], strict=True)
    )

    def run(*xs: Any) -> tuple[Any, ...]:
        with it.body(eqn, rows=False):
            outs = it.run(jaxpr, consts, xs)
            outs = list(itertools.compress(outs, here))
            return tuple(it.plain(eqn, outs, _OUT_OF_LOOP))

    f = jax.shard_map(
        run,
        mesh=p["mesh"],
        in_specs=specs,
        out_specs=tuple(itertools.compress(p["out_specs"], here)),
        axis_names=compat.manual_axes(p),
        check_vma=p["check_vma"],
    )
    outs = iter(f(*ins))
    return [next(outs) if h else whole[k] for h, k in zip(here, on, strict=True)]  # type: ignore[index]
