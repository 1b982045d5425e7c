"""Freezing for code that keeps one parameter tree.

`jpeft.partition` is the recommended way: two trees, with gradients and state for
one.  Here are two other ways, `freeze` and `value_and_grad`, on Optax's partitioning.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jpeft.boxes import unbox
from jpeft.checks import check_flag
from jpeft.compat import is_key_array
from jpeft.late import Late
from jpeft.leaf import innermost
from jpeft.tree.partition import combine, is_placeholder, partition, trainable_mask
from jpeft.tree.paths import slots
from jpeft.types import PyTree

if TYPE_CHECKING:
    import optax
else:
    optax = Late("optax")

_is_none = lambda x: x is None


def freeze(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`tx` for the adapters; zero updates and no state for everything frozen.

    For a whole adapted tree: `opt_state = freeze(tx).init(params)`.  Gradients may have
    the structure of the parameters (from `jax.grad`) or None where it is frozen (from
    `jpeft.value_and_grad`); the updates have the structure of the parameters, so that
    `optax.apply_updates(params, updates)` leaves frozen leaves bit for bit alone.

    Extra arguments are for the whole tree, as for `tx` alone.  `tx` sees the adapters'
    part of those that have its structure, and calls functions among them (the
    `value_fn` of `optax.lbfgs`) with whole trees.  (`optax.value_and_grad_from_state`
    reads a gradient out of the state, which holds the adapters' only: with it take
    `jpeft.partition`.)

    It goes outermost: `freeze(optax.MultiSteps(tx, 4))`, not the other way round, so
    that nothing meets what is frozen.

    The state has `optax.MaskedNode()` where a leaf is frozen, as that of
    `optax.masked`: give `optax.tree_map_params` with further trees the same `is_leaf=`.

    >>> import jax, jax.numpy as jnp, jpeft, optax
    >>> params = jpeft.lora(rank=2)(jax.random.key(0), {"kernel": jnp.ones((7, 5))})
    >>> tx = jpeft.freeze(optax.adam(1e-3))
    >>> dtypes = optax.tree_map_params(
    ...     tx,
    ...     lambda x, like: x if isinstance(x, optax.MaskedNode) else like.dtype,
    ...     tx.init(params),
    ...     params,
    ...     is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    ... )
    """
    inner = optax.with_extra_args_support(tx)

    def init(params: PyTree) -> Any:
        if is_placeholder(params):
            return _state(inner.init(params))
        for path, slot in slots(params).items():
            if is_key_array(unbox(innermost(slot))):
                raise ValueError(
                    f"{path}: a random key, which Optax cannot update; keep "
                    "it out of the parameters (nnx.split(model, nnx.Param, ...)) or "
                    "use jpeft.partition"
                )
        return _state(inner.init(_Halves(params).own(params)))

    def update(
        updates: PyTree, state: Any, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, Any]:
        if params is None:
            raise ValueError(
                "freeze(tx).update needs the parameters: update(grads, state, params)"
            )
        halves = _Halves(params)
        new, of_inner = inner.update(
            halves.own(updates),
            state.inner_states[True].inner_state,
            halves.own(params),
            **{name: halves.given(x) for name, x in extra.items()},
        )
        return halves.whole(new, _nothing), _state(of_inner)

    return optax.GradientTransformationExtraArgs(init, update)


def _state(inner: Any) -> Any:
    """`optax.partition`'s state: checkpoints hold its structure, so it must stay."""
    still = optax.MaskedState(optax.EmptyState())
    states: Any = {True: optax.MaskedState(inner), False: still}
    return optax.transforms.PartitionState(states)


class _Halves:
    """Trees of the parameters' structure, and those that `tx` sees: the same, with
    `optax.MaskedNode()` in place of what is frozen."""

    def __init__(self, params: PyTree):
        self.params = params
        self.flat, self.treedef = jax.tree.flatten(params)
        self.trains = jax.tree.leaves(trainable_mask(params))
        self.own_treedef = jax.tree.structure(self.own(params))

    def own(self, whole: PyTree) -> PyTree:
        """whole: may have None where it is frozen, as gradients have."""
        flat = zip(
            self.trains, self.treedef.flatten_up_to(whole), self.flat, strict=True
        )
        return self.treedef.unflatten(
            (_nothing(p) if _is_none(x) else x) if t else optax.MaskedNode()
            for t, x, p in flat
        )

    def whole(self, own: PyTree, frozen: Callable[[Any], Any]) -> PyTree:
        """frozen: makes what stands where a parameter is frozen."""
        mine = iter(jax.tree.leaves(own))
        pairs = zip(self.trains, self.flat, strict=True)
        return self.treedef.unflatten(next(mine) if t else frozen(p) for t, p in pairs)

    def given(self, x: Any) -> Any:
        """An extra argument of the whole tree, as `tx` is to see it."""
        if not callable(x):
            return self.back(x)

        @functools.wraps(x)  # Optax reads its signature
        def of_own(*args: Any, **kwargs: Any) -> Any:
            named = {name: self.shown(y) for name, y in kwargs.items()}
            return self.back(x(*map(self.shown, args), **named))

        return of_own

    def shown(self, x: Any) -> Any:
        """What `tx` hands to a function of the whole tree."""
        if jax.tree.structure(x) != self.own_treedef:
            return x
        return self.whole(x, lambda p: p)

    def back(self, x: Any) -> Any:
        """What such a function, or a caller, hands to `tx`: a tree, or a tuple (as
        `jax.value_and_grad` returns)."""
        if type(x) is tuple:
            return tuple(map(self.back, x))
        if _places(x) != _places(self.params):
            return x
        return self.own(x)


def _places(tree: PyTree) -> Any:
    return jax.tree.structure(tree, is_leaf=_is_none)


def _nothing(x: Any) -> jax.Array:
    """What can be added to x without changing a bit of it.

    For floats that is -0.0: x + 0.0 would make +0.0 of -0.0.
    """
    zero = jnp.zeros(jnp.shape(x), jnp.result_type(x))
    return -zero if jnp.issubdtype(zero.dtype, jnp.floating) else zero


def value_and_grad(
    loss: Callable[..., Any], has_aux: bool = False
) -> Callable[..., tuple[Any, PyTree]]:
    """As `jax.value_and_grad`, for the adapters of the first argument only.

    `loss(params, *args, **kwargs)` gets the whole tree.  The gradients have the
    structure of `jpeft.partition(params)[0]`: None where a leaf is frozen, whatever its
    dtype, so nothing of the base's size is computed.  Raises ValueError if nothing is
    trainable.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = jpeft.lora(rank=2)(jax.random.key(0), {"kernel": jnp.ones((5, 3))})
    >>> apply = jpeft.adapt(lambda params, x: jnp.sum(x @ params["kernel"]))
    >>> value, grads = jpeft.value_and_grad(apply)(params, jnp.ones((2, 5)))
    >>> float(value), grads["kernel"].b.shape, grads["kernel"].base
    (30.0, (2, 3), None)
    """
    check_flag("value_and_grad", "has_aux", has_aux)

    @functools.wraps(loss)
    def run(params: PyTree, *args: Any, **kwargs: Any) -> tuple[Any, PyTree]:
        trainable, frozen = partition(params)

        def of_trainable(t: PyTree) -> Any:
            return loss(combine(t, frozen), *args, **kwargs)

        return jax.value_and_grad(of_trainable, has_aux=has_aux)(trainable)

    return run
