"""Which variables of an NNX model train, as Flax asks for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any

import jax

from jpeft.boxes import is_box
from jpeft.tree.partition import trainable_mask
from jpeft.tree.paths import segment_key
from jpeft.types import PyTree


@dataclasses.dataclass(frozen=True)
class TrainableFilter:
    """See `trainable_filter`.  paths: of the variables that train."""

    paths: frozenset[tuple[Hashable, ...]]

    def __call__(self, path: Sequence[Hashable], value: Any) -> bool:
        return tuple(path) in self.paths


def trainable_filter(params: PyTree) -> TrainableFilter:
    """An NNX filter of the adapters' own variables, wherever NNX takes a filter.

    params: an adapted model, or its adapted state.  Raises ValueError if nothing is
    trainable.

        wrt = jpeft.trainable_filter(model)
        optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=wrt)   # no `freeze`
        grads = nnx.grad(loss, argnums=nnx.DiffState(0, wrt))(model, batch)
        optimizer.update(model, grads)

    where `loss` calls the model through `jpeft.adapt`.  It names the variables of this
    tree by their paths: of a tree with other adapters make another one.

    >>> import jax, jax.numpy as jnp, jpeft, optax
    >>> from flax import nnx
    >>> model, x = nnx.Linear(6, 4, rngs=nnx.Rngs(0)), jnp.ones((2, 6))
    >>> uses = jpeft.find_uses(lambda m, x: m(x), model, x)
    >>> model = jpeft.lora(rank=2)(jax.random.key(0), model, uses=uses)
    >>> adapters = nnx.state(model, jpeft.trainable_filter(model))
    >>> sorted(adapters["kernel"])
    ['a', 'b']
    """
    mask, _ = jax.tree_util.tree_flatten_with_path(
        trainable_mask(params), is_leaf=is_box
    )
    trains = lambda x: any(jax.tree.leaves(x))
    return TrainableFilter(
        frozenset(tuple(map(segment_key, p)) for p, x in mask if trains(x))
    )
