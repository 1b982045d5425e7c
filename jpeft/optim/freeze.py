"""Freezing for code that keeps one parameter tree.

`jpeft.partition` is the recommended way: two trees, gradients and state for one.  Here
are the two others, on Optax's own partitioning.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jpeft.boxes import unbox
from jpeft.compat import is_key_array
from jpeft.leaf import innermost
from jpeft.tree.paths import slots
from jpeft.tree.split import combine, partition, trainable_mask
from jpeft.types import PyTree

_is_none = lambda x: x is None


def freeze(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`tx` for the adapters; zero updates and no state for everything frozen.

    For a whole adapted tree: `opt_state = freeze(tx).init(params)`.  Gradients may have
    the structure of the parameters (from `jax.grad`) or None where it is frozen (from
    `jpeft.value_and_grad`); the updates have the structure of the parameters, so that
    `optax.apply_updates(params, updates)` leaves frozen leaves bit for bit alone.

    It goes outermost: `freeze(optax.MultiSteps(tx, 4))`, not the other way round, so
    that nothing meets what is frozen.
    """
    inner = optax.with_extra_args_support(
        optax.partition({True: tx, False: _hold_still()}, trainable_mask)
    )

    def update(
        updates: PyTree, state: Any, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, Any]:
        if params is None:
            raise ValueError(
                "freeze(tx).update needs the parameters: update(grads, state, params)"
            )
        whole = jax.tree.map(_filled, updates, params, is_leaf=_is_none)
        return inner.update(whole, state, params, **extra)

    def init(params: PyTree) -> Any:
        for path, slot in slots(params).items():
            if is_key_array(unbox(innermost(slot))):
                raise ValueError(
                    f"{path}: a random key, which Optax cannot update; keep "
                    "it out of the parameters (nnx.split(model, nnx.Param, ...)) or "
                    "use jpeft.partition"
                )
        return inner.init(params)

    return optax.GradientTransformationExtraArgs(init, update)


def _filled(grad: Any, param: Any) -> Any:
    """A gradient for a frozen leaf that has none, or one of dtype float0."""
    if param is None:
        return None
    if grad is None or grad.dtype == jax.dtypes.float0:
        return _nothing(param)
    return grad


def _nothing(x: Any) -> jax.Array:
    """What can be added to x without changing a bit of it.

    For floats that is -0.0: x + 0.0 would make +0.0 of -0.0.
    """
    zero = jnp.zeros(jnp.shape(x), jnp.result_type(x))
    return -zero if jnp.issubdtype(zero.dtype, jnp.floating) else zero


def _hold_still() -> optax.GradientTransformation:
    def update(
        updates: PyTree, state: Any, params: PyTree = None
    ) -> tuple[PyTree, Any]:
        return jax.tree.map(_nothing, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def value_and_grad(
    loss: Callable[..., Any], has_aux: bool = False
) -> Callable[..., tuple[Any, PyTree]]:
    """As `jax.value_and_grad`, for the adapters of the first argument only.

    `loss(params, *args, **kwargs)` gets the whole tree.  The gradients have the
    structure of `jpeft.partition(params)[0]`: None where a leaf is frozen, whatever its
    dtype, so nothing of the base's size is computed.  Raises ValueError if nothing is
    trainable.
    """

    @functools.wraps(loss)
    def run(params: PyTree, *args: Any, **kwargs: Any) -> tuple[Any, PyTree]:
        trainable, frozen = partition(params)

        def of_trainable(t: PyTree) -> Any:
            return loss(combine(t, frozen), *args, **kwargs)

        return jax.value_and_grad(of_trainable, has_aux=has_aux)(trainable)

    return run
