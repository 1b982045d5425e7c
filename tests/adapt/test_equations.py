"""What a movement is said to do is what JAX does."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jpeft.adapt.equations import Move, read

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
