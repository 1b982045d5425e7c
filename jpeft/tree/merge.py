"""Leaving the adapters: merged into the weights, taken off, or without what only
trained them."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from jpeft.boxes import same_box
from jpeft.checks import check_flag, check_float
from jpeft.leaf import (
    box_of,
    boxed_like,
    check_whole,
    innermost,
    is_leaf,
    is_stored,
    transients,
)
from jpeft.tree.lend import acting
from jpeft.tree.paths import Slots, slots
from jpeft.types import PyTree


def check_adapted(flat: Slots, verb: str) -> None:
    if not any(is_leaf(x) for x in flat.values):
        raise ValueError(f"{verb}: no leaf of this tree is adapted")
    for path, x in flat.items():
        check_whole(x, path, verb)


def merge(params: PyTree, *, dtype: Any = None, requantize: bool = False) -> PyTree:
    """Plain arrays again: every adapted leaf becomes its effective weight.

    Computed in float32 (float64 for float64 weights) and cast once.  dtype: of the
    merged weights; default each base's own.  Weights that were not adapted stay as
    they are.

    A quantised base is dequantised.  requantize: True stores the result of such a base
    in its own format again, which rounds once more: `jpeft.quant.rounding` says by how
    much, beside what the adapter changed.  Matrices that it left as they were keep
    their codes.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = jpeft.lora(rank=2)(jax.random.key(0), {"kernel": jnp.ones((5, 3))})
    >>> merged = jpeft.merge(params)
    >>> merged["kernel"].shape, isinstance(merged["kernel"], jax.Array)
    ((5, 3), True)
    """
    check_merge("merge", dtype, requantize)

    def one(slot: Any, leaf: Any) -> Any:
        if not is_leaf(slot):
            return slot
        base = innermost(slot)
        if requantize and is_leaf(base):
            return (
                base if base is slot else base.with_value(leaf.materialize(jnp.float32))
            )
        return same_box(box_of(slot), leaf.materialize(dtype))

    flat = slots(params)
    check_adapted(flat, "merge")
    return flat.rebuild(map(one, flat.values, acting(flat)))


def check_merge(name: str, dtype: Any, requantize: bool) -> None:
    check_float(name, dtype)
    check_flag(name, "requantize", requantize)
    if requantize and dtype is not None:
        raise ValueError(
            f"{name}: requantize=True keeps the base's own format, and "
            f"dtype={dtype!r} is of plain arrays: give one of the two"
        )


def unload(params: PyTree) -> PyTree:
    """The base, bit for bit: every adapter is taken off.

    A quantised weight is the base of what was trained on it, and stays as it is;
    `merge` makes arrays of it.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> base = {"kernel": jnp.ones((5, 3))}
    >>> params = jpeft.lora(rank=2)(jax.random.key(0), base)
    >>> jpeft.unload(params)["kernel"] is base["kernel"]
    True
    """
    flat = slots(params)
    check_adapted(flat, "unload")
    return flat.rebuild(innermost(x) for x in flat.values)


def finalize(params: PyTree) -> PyTree:
    """The same adapters without what was only there to train them.

    The vectors that they make replace the encoder of `p_tuning` and the network of a
    reparametrised `prefix`.  From here on those vectors are trained and saved.
    Everything else stays as it is.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> table = {"embed": {"embedding": jnp.ones((11, 6))}}
    >>> params = jpeft.p_tuning(length=4)(jax.random.key(0), table)
    >>> kind = lambda params: type(params["embed"]["embedding"]).__name__
    >>> kind(params), kind(jpeft.finalize(params))
    ('LstmPrompt', 'Prompt')
    """
    flat = slots(params)
    check_adapted(flat, "finalize")
    return flat.rebuild(map(_finalized, flat.values, acting(flat)))


def _finalized(slot: Any, leaf: Any) -> Any:
    """slot: as it is stored; leaf: the same one, ready to act."""
    if not is_leaf(slot) or is_stored(slot):
        return slot
    base = _finalized(slot.base, leaf.base)
    done = leaf.finalize()  # Trap: borrowing may already have made another kind of leaf
    if type(done) is type(slot):
        return slot.replace(base=base)
    changes = {"base": base, "path": slot.path, **dict.fromkeys(transients(done))}
    return boxed_like(box_of(slot), done.replace(**changes))
