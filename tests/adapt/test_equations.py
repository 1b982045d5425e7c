"""What an equation is said to do is what JAX does."""

from __future__ import annotations

import sys

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jpeft import compat
from jpeft.adapt import equations
from jpeft.adapt.equations import (
    ByElement,
    Call,
    Draw,
    Jit,
    Move,
    Reduce,
    Root,
    Same,
    Sum,
    Write,
    read,
    varying,
)

X = np.arange(4 * 3 * 6, dtype=np.float32).reshape(4, 3, 6)
MOVES = {
    "transpose": lambda x: lax.transpose(x, (2, 0, 1)),
    "squeeze": lambda x: lax.squeeze(x, (1,)),
    "broadcast_in_dim": lambda x: lax.broadcast_in_dim(x, (2, 4, 3, 1, 6), (1, 2, 4)),
    "spread": lambda x: lax.broadcast_in_dim(x, (4, 5, 6), (0, 1, 2)),
    "merged": lambda x: lax.reshape(x, (12, 1, 6)),
    "split up": lambda x: lax.reshape(x, (2, 2, 3, 3, 2)),
    "turned and merged": lambda x: lax.reshape(x, (6, 12), (2, 0, 1)),
    "slice": lambda x: lax.slice(x, (1, 0, 1), (4, 3, 6), (2, 1, 3)),
    "row": lambda x: lax.slice(x, (1, 0, 0), (2, 3, 6)),
    "dynamic_slice": lambda x: lax.dynamic_slice(x, (1, 0, 2), (1, 3, 3)),
    "split": lambda x: lax.split(x, (1, 2, 3), 2),
    "tile": lambda x: lax.tile(x, (2, 1, 3)),
    "rev": lambda x: lax.rev(x, (0, 2)),
    "pad": lambda x: lax.pad(x, np.float32(0), ((1, 0, 0), (0, 0, 0), (0, 2, 1))),
    "name": lambda x: checkpoint_name(x, "x"),
    "reduce_precision": lambda x: lax.reduce_precision(x, 8, 23),
}
THIN = {"squeeze", "spread"}  # of an operand whose middle axis has size 1


def traced(name):
    """(operand, other operands, movement, results)."""
    x, f = X[:, :1] if name in THIN else X, MOVES[name]
    (eqn,) = jax.make_jaxpr(f)(x).eqns
    move = read(eqn)
    assert isinstance(move, Move)
    out = f(x)
    more = [v.val for v in eqn.invars[1:]]
    return x, more, move, list(map(np.asarray, out if type(out) is list else [out]))


def done(move, x, old, new, more):
    made = move.done_to(x, old, new, more)
    return list(map(np.asarray, made if type(made) is list else [made]))


@pytest.mark.parametrize("name", MOVES)
def test_an_array_with_all_axes_becomes_what_the_operand_becomes(name):
    x, more, move, wanted = traced(name)
    new = list(range(len(move.of)))
    for got, want in zip(done(move, x, [0, 1, 2], new, more), wanted, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", MOVES)
@pytest.mark.parametrize("axis", [0, 2])
def test_an_array_with_one_axis_and_one_of_its_own_follows_it(name, axis):
    """As a factor does: it broadcasts to the operand, and so does what comes out."""
    x, more, move, wanted = traced(name)
    where = [k for k, held in enumerate(move.of) if axis in held]
    if {q for k in where for q in move.of[k]} != {axis}:
        return  # it is merged with an axis that this array has not
    line = np.arange(x.shape[axis] * 2, dtype=np.float32).reshape(-1, 2)
    along = line[:, 0].reshape([-1 if k == axis else 1 for k in range(3)])
    results = [np.asarray(r) for r in _as_list(MOVES[name](along + 0 * x))]
    for got, want in zip(
        done(move, line, [axis, "r"], [*where, "r"], more), results, strict=True
    ):
        shape = [n if k in where else 1 for k, n in enumerate(want.shape)]
        if name != "pad":  # beside other axes stands nothing of this one
            np.testing.assert_array_equal(
                np.broadcast_to(got[..., 0].reshape(shape), want.shape), want
            )
        assert got.shape[-1] == 2


def _as_list(out):
    return out if type(out) is list else [out]


@pytest.mark.parametrize("name", [n for n in MOVES if n != "pad"])
def test_columns_follow_as_far_as_they_can_be_known(name):
    x, _, move, wanted = traced(name)
    for n, want in enumerate(wanted):
        got = move.done_to_columns(x, n)
        if name == "dynamic_slice":
            assert got is None
        else:
            np.testing.assert_array_equal(np.broadcast_to(got, want.shape), want)


@pytest.mark.parametrize("name", [n for n in MOVES if n != "pad"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_result_varies_where_it_is_said_to_hold_the_axis(name, axis):
    x, _, move, _ = traced(name)
    along = np.arange(x.shape[axis], dtype=np.float32)
    along = along.reshape([-1 if k == axis else 1 for k in range(3)])
    tags = [frozenset({k}) for k in range(3)]
    held = move.carried(tags)
    for n, want in enumerate(map(np.asarray, _as_list(MOVES[name](along + 0 * x)))):
        varies = {k for k in range(want.ndim) if np.ptp(want, axis=k).any()}
        assert varies <= {k for k, axes in enumerate(held[n]) if axis in axes}
        taken = [k for k in move.rows_taken(n) if k == axis]
        assert not taken or not varies


# --- what is done to values ----------------------------------------------------------


def only(f, *args):
    (eqn,) = jax.make_jaxpr(f)(*args).eqns
    return eqn


def test_each_name_is_that_of_a_primitive():
    modules = [m for n, m in sorted(sys.modules.items()) if n.startswith("jax.")]
    values = [x for m in modules for x in vars(m).values()]
    names = {x.name for x in values if isinstance(x, jex.Primitive)}
    # Which calls there are depends on JAX's version, as `compat` says.
    assert {*equations._VERBS} - {*compat.CALLS} <= names


BY_ELEMENT = sorted(n for n, verb in equations._VERBS.items() if verb is ByElement)
CALLED = {
    "and": lax.bitwise_and,
    "or": lax.bitwise_or,
    "xor": lax.bitwise_xor,
    "not": lax.bitwise_not,
    "integer_pow": lambda x: lax.integer_pow(x, 3),
}
OF_TWO = {"and", "or", "xor", "atan2", "eq", "ne", "nextafter", "rem"}


@pytest.mark.parametrize("name", BY_ELEMENT)
def test_what_is_said_to_act_by_element_does(name):
    f = CALLED.get(name) or getattr(lax, name)
    bits = name in ("and", "or", "xor", "not")
    x = np.linspace(0.1, 0.9, 15, dtype=np.float32).reshape(3, 5)
    x = (x * 100).astype(np.int32) if bits else x
    given = [x, x[::-1]] if name in OF_TWO else [x]
    assert type(read(only(f, *given))) is ByElement
    turn = lambda a: np.roll(np.asarray(a), (1, 2), (0, 1))
    np.testing.assert_array_equal(turn(f(*given)), f(*map(turn, given)))


REDUCED = {
    "reduce_sum": ("float32", "bfloat16", "int8"),
    "reduce_prod": ("float32", "int8"),
    "reduce_max": ("float32", "bfloat16", "int8", "bool"),
    "reduce_min": ("float32", "bfloat16", "int8", "bool"),
    "reduce_and": ("int8", "bool"),
    "reduce_or": ("int8", "bool"),
    "reduce_xor": ("int8", "bool"),
}


@pytest.mark.parametrize(
    ("name", "dtype"), [(n, d) for n, dtypes in REDUCED.items() for d in dtypes]
)
def test_a_reduction_is_known_in_parts(name, dtype):
    """Of two halves joined, and with what changes no bit of a value, be it -0.0."""
    values = [[-0.0, 3, -2, 1], [0.0, 1, 4, 1], [-3, 2, 1, 0]]
    x = jnp.asarray(values).astype(dtype)
    f = lambda x: getattr(lax, name)(x, (1,))
    over = read(only(f, x))
    assert isinstance(over, Reduce) and over.axes == (1,)
    assert isinstance(over, Sum) == (name == "reduce_sum")
    bits = lambda a: np.asarray(a).tobytes()
    assert bits(over.join(f(x[:, :2]), f(x[:, 2:]))) == bits(f(x))
    assert bits(over.join(x, jnp.full_like(x, over.nothing(x.dtype)))) == bits(x)


def test_a_power_of_a_half_is_a_root():
    x = jnp.ones(3)
    root = lambda f: isinstance(read(only(f, x)), Root)
    assert root(jnp.sqrt) and root(lax.rsqrt)
    assert root(lambda x: lax.pow(x, 0.5)) and root(lambda x: lax.pow(x, -0.5))
    assert not root(lambda x: lax.pow(x, 0.25))
    assert not isinstance(read(only(lax.pow, x, x)), Root)


def test_a_value_varies_where_it_was_not_repeated():
    def f(x, y):
        wide = lax.broadcast_in_dim(x, (4, 3, 5), (1,)).astype(jnp.bfloat16)
        turned = lax.reshape(lax.transpose(wide, (1, 0, 2)), (3, 20))
        return turned, turned * y

    jaxpr = jax.make_jaxpr(f)(jnp.ones(3), jnp.ones((3, 20), jnp.bfloat16)).jaxpr
    made = {v: read(e) for e in jaxpr.eqns for v in e.outvars}
    turned, product = jaxpr.outvars
    assert varying(turned, made.get) == {0}
    assert varying(product, made.get) == {0, 1}
    assert varying(turned, lambda v: None) == {0, 1}


def test_where_what_is_written_lies():
    x, block = np.zeros((4, 3, 5), np.float32), np.ones((2, 3, 1), np.float32)
    write = read(only(lambda x, b: lax.dynamic_update_slice(x, b, (1, 0, 2)), x, block))
    assert isinstance(write, Write) and write.replaces
    assert write.axes == {0: 0, 1: 1, 2: 2}
    rows = np.ones((2, 5, 3), np.float32)  # of two places, turned
    f = lambda x, rows: x.at[jnp.array([0, 2])].set(rows.transpose(0, 2, 1))
    (e,) = [e for e in jax.make_jaxpr(f)(x, rows).eqns if isinstance(read(e), Write)]
    assert read(e).axes == {1: 1, 2: 2}
    f = lambda x, rows: x.at[:, 1].add(rows)
    (e,) = [
        e
        for e in jax.make_jaxpr(f)(x, np.ones((4, 5), np.float32)).eqns
        if isinstance(read(e), Write)
    ]
    assert read(e).axes == {0: 0, 1: 2} and not read(e).replaces


def test_what_the_operand_may_stand_for():
    x = jnp.ones((2, 3))
    stands = lambda f: read(only(f, x)).is_operand
    assert stands(jnp.copy) and stands(lambda x: checkpoint_name(x, "x"))
    assert not stands(lax.stop_gradient)
    assert not stands(lambda x: lax.reduce_precision(x, 8, 7))
    assert isinstance(read(only(lax.stop_gradient, x)), Same)


CONSUMED = {
    "batched": (
        lambda x, w: lax.dot_general(x, w, (((2,), (1,)), ((0,), (2,)))),
        (2, 4, 3),
        (5, 3, 2),
    ),
    "convolved": (
        lambda x, w: lax.conv_general_dilated(
            x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        ),
        (2, 4, 3),
        (1, 3, 5),
    ),
    "routed": (
        lambda x, w: lax.ragged_dot(x, w, np.array([1, 3], np.int32)),
        (4, 3),
        (2, 3, 5),
    ),
}


@pytest.mark.parametrize("name", CONSUMED)
def test_a_product_varies_where_it_is_made_of_what_varies(name):
    f, *shapes = CONSUMED[name]
    x, w = (np.ones(s, np.float32) for s in shapes)
    verb = read(jax.make_jaxpr(f)(x, w).eqns[-1])
    roles = verb.roles(1)
    for axis in range(w.ndim):
        line = np.arange(1, w.shape[axis] + 1, dtype=np.float32)
        out = np.asarray(
            f(x, w * np.expand_dims(line, [k for k in range(3) if k != axis]))
        )
        wide = {k for k in range(out.ndim) if np.ptp(out, axis=k).any()}
        said = {k for k, of in enumerate(verb.made_of) if (1, axis) in of}
        if name == "routed" and roles[axis] == "s":
            assert wide and not said  # each row is of one group
        else:
            assert wide == said and bool(said) == (roles[axis] != "i")


def test_a_program_inside_is_known_with_what_enters():
    f = jax.jit(lambda x, y: x * y + jnp.sin(x))
    call = read(only(lambda x: f(x, 2 * np.ones(3, np.float32)), jnp.ones(3)))
    assert isinstance(call, Jit) and len(call.given) == len(call.jaxpr.invars) == 2
    call = read(only(jax.checkpoint(lambda x: jnp.sin(x) * 2), jnp.ones(3)))
    assert isinstance(call, Call) and not isinstance(call, Jit)


def test_random_bits_are_drawn():
    eqn = only(lambda k: jax.random.key_data(k), jax.random.key(0))
    assert not isinstance(read(eqn), Draw)
    f = lambda key: jax.random.bits(key, (3,))
    assert isinstance(read(jax.make_jaxpr(f)(jax.random.key(0)).eqns[-1]), Draw)
