"""What PPO and GRPO share: answers written by the model that trains, and one base for
all roles.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import _lm
import _sampling
import jax
import jax.numpy as jnp

import jpeft

PyTree = Any


class Rollout(NamedTuple):
    """Questions and the answers that were written to them.

    ids: (batch, prompt + answer) int32.  mask: bool, what is real.  answer: (batch,
    answer) bool, the tokens that were written, a stop token included.  stopped:
    (batch,) bool, false where the answer was cut off.
    """

    ids: jax.Array
    mask: jax.Array
    answer: jax.Array
    stopped: jax.Array


def roll(
    language: _lm.Language,
    how: _sampling.Sampling,
    tokens: int,
    params: PyTree,
    ids: jax.Array,
    mask: jax.Array,
    key: jax.Array,
) -> Rollout:
    """Answers of up to so many tokens.  ids, mask: (batch, prompt), padded on the left.

    The model writes with the weights that train, in the program that trains them.
    """
    t = language.tokenizer
    writer = _sampling.Writer(
        jpeft.adapt(language.model.apply), language.config, t.stop, t.pad, tokens, how
    )
    written = writer.write(params, ids, mask, key)
    return Rollout(
        ids=jnp.concatenate([ids, written.tokens], axis=1),
        mask=jnp.concatenate([mask, written.mask], axis=1),
        answer=written.mask,
        stopped=written.done,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Shared:
    """Trees that hold the same arrays, with each array once.

    `jax.jit` takes every leaf of its arguments for an array of its own: a base in two
    trees would be passed, and counted, twice.

        shared = Shared.of(policy, critic)
        step(shared.arrays)         # inside: policy, critic = shared.trees(arrays)
    """

    arrays: list[jax.Array]
    places: tuple[int, ...]
    structure: Any

    @classmethod
    def of(cls, *trees: PyTree) -> Shared:
        leaves, structure = jax.tree.flatten(trees)
        first = {id(x): k for k, x in reversed(list(enumerate(leaves)))}
        kept = sorted(set(first.values()))
        number = {k: n for n, k in enumerate(kept)}
        places = tuple(number[first[id(x)]] for x in leaves)
        return cls([leaves[k] for k in kept], places, structure)

    def trees(self, arrays: list[jax.Array]) -> tuple[PyTree, ...]:
        return jax.tree.unflatten(self.structure, [arrays[k] for k in self.places])


def in_parts(f: Callable[..., Any], count: int, *arrays: Any) -> Any:
    """f of so many equal parts of the batch, one after the other, joined again: less
    memory, and the shapes that training has."""
    part = lambda x: x.reshape(count, x.shape[0] // count, *x.shape[1:])
    found = jax.lax.map(lambda xs: f(*xs), jax.tree.map(part, arrays))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)
