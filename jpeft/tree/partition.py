"""Trainable and frozen: the tree taken apart and put together."""

from __future__ import annotations

from typing import Any

import jax

from jpeft.boxes import is_nnx_state
from jpeft.leaf import FROZEN, STATIC, TRAINABLE, is_leaf, roles
from jpeft.tree.paths import slots
from jpeft.types import PyTree

NOTHING_TRAINS = (
    "nothing in this tree is trainable: no leaf was adapted. Apply a transform first: "
    "params = jpeft.lora(rank=8, alpha=16)(jax.random.key(0), params)"
)
NOTHING_IN_STATE = (
    "nothing in this nnx.State is trainable: no leaf was adapted, or nnx.Optimizer "
    "took the variables out of their leaves; there pass the optimiser as it is, "
    "without jpeft.freeze: nnx.Optimizer(model, optax.adam(1e-3), "
    "wrt=jpeft.trainable_filter(model))"
)


def _marked(x: Any, role: str) -> Any:
    """The tree below a slot with its role in place of every array."""
    if is_leaf(x):
        return x.replace(
            **{n: _marked(getattr(x, n), r) for n, r in roles(x).items() if r != STATIC}
        )
    return jax.tree.map(lambda _: role, x)


def _role_tree(tree: PyTree) -> PyTree:
    flat = slots(tree)
    return flat.rebuild(_marked(x, FROZEN) for x in flat.values)


def trainable_mask(params: PyTree) -> PyTree:
    """A tree of bools of the same structure: True where an array trains.

    Beware of `optax.masked(tx, mask)`: it passes the raw gradient through to what it
    masks out.  `jpeft.freeze(tx)` does what is wanted.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = jpeft.lora(rank=2)(jax.random.key(0), {"kernel": jnp.ones((5, 3))})
    >>> mask = jpeft.trainable_mask(params)["kernel"]
    >>> mask.a, mask.b, mask.base
    (True, True, False)
    """
    if is_placeholder(params):
        return params
    mask = jax.tree.map(lambda r: r == TRAINABLE, _role_tree(params))
    if not any(jax.tree.leaves(mask)):
        of_nnx = is_nnx_state(params)
        raise ValueError(NOTHING_IN_STATE if of_nnx else NOTHING_TRAINS)
    return mask


def is_placeholder(tree: PyTree) -> bool:
    """Whether it is the placeholder with which `optax.tree_map_params` calls `init`, to
    learn where a state holds parameters: a node of Optax' own without an array."""
    return type(tree).__module__.startswith("optax.") and not jax.tree.leaves(tree)


def beside(params: PyTree) -> str:
    """How the message ends when an optimiser needs adapted leaves and gets none, as
    inside `nnx.Optimizer`, which takes them away."""
    if not is_nnx_state(params):
        return ""
    return (
        " (nnx.Optimizer took the variables out of their leaves: use the optimiser "
        "without it, state = tx.init(jpeft.partition(model)[0]))"
    )


def partition(params: PyTree) -> tuple[PyTree, PyTree]:
    """`(trainable, frozen)`: two trees of one structure, None where the other has it.

    Gradients and optimiser state of the first exist for the adapters only.  Raises
    ValueError if nothing is trainable.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = jpeft.lora(rank=2)(jax.random.key(0), {"kernel": jnp.ones((5, 3))})
    >>> trainable, frozen = jpeft.partition(params)
    >>> trainable["kernel"].a.shape, trainable["kernel"].base
    ((5, 2), None)
    >>> frozen["kernel"].a, frozen["kernel"].base.shape
    (None, (5, 3))
    """
    mask = trainable_mask(params)
    pick = lambda side: jax.tree.map(
        lambda m, x: x if m is side else None, mask, params
    )
    return pick(True), pick(False)


def combine(trainable: PyTree, frozen: PyTree) -> PyTree:
    """The tree again: `combine(*partition(params))` is `params`.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = jpeft.lora(rank=2)(jax.random.key(0), {"kernel": jnp.ones((5, 3))})
    >>> trainable, frozen = jpeft.partition(params)
    >>> half = jax.tree.map(lambda a: a / 2, trainable)  # what an optimiser makes of it
    >>> jpeft.combine(half, frozen)["kernel"].base is params["kernel"].base
    True
    """

    def one(t: Any, f: Any) -> Any:
        if t is not None and f is not None:
            raise ValueError(
                "combine: both trees hold an array in the same place; pass the two "
                "trees of one jpeft.partition(params)"
            )
        return f if t is None else t

    is_none = lambda x: x is None
    of_t, of_f = (jax.tree.structure(t, is_leaf=is_none) for t in (trainable, frozen))
    if of_t != of_f:
        raise ValueError(
            f"combine: the trees differ in structure: {of_t.num_leaves} places against "
            f"{of_f.num_leaves}; pass the two trees of one jpeft.partition(params)"
        )
    return jax.tree.map(one, trainable, frozen, is_leaf=is_none)
