"""How a language model writes: one prefill, then one compiled loop, a token a turn.

    z -> z / temperature -> only the k likeliest -> only those at least min_p times as
    likely as the likeliest -> the likeliest that make up top_p together -> one is drawn

top-k: Fan et al. 2018, arXiv:1805.04833; top-p: Holtzman et al. 2020,
arXiv:1904.09751; min-p: Nguyen et al. 2024, arXiv:2407.01082.

The loop is compiled once for all answers up to its bucket: how many tokens are wanted
is an argument, and it ends when every row has stopped.  It can be left and entered
again (`until`), which is how an answer is shown while it is written.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import llm

PyTree = Any
OUT = -jnp.inf


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn; temperature 0 takes the likeliest."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 or more, found {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (all) or more, found {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(
                f"top_p must lie above 0 and up to 1 (all), found {self.top_p}"
            )
        if not 0 <= self.min_p < 1:
            raise ValueError(
                f"min_p must lie between 0 (all) and 1, found {self.min_p}"
            )


GREEDY = Sampling(temperature=0.0)


def restrict(logits: jax.Array, how: Sampling) -> jax.Array:
    """(batch, vocab) float32 logits of what may be drawn; the rest is -infinity.

    The likeliest token always may.
    """
    z = logits.astype(jnp.float32) / how.temperature
    if how.top_k and how.top_k < z.shape[-1]:
        least = jax.lax.top_k(z, how.top_k)[0][:, -1:]
        z = jnp.where(z < least, OUT, z)
    if how.min_p:
        least = jnp.max(z, axis=-1, keepdims=True) + math.log(how.min_p)
        z = jnp.where(z < least, OUT, z)
    if how.top_p < 1:
        down = -jnp.sort(-z, axis=-1)
        shares = jax.nn.softmax(down, axis=-1)
        # What stands before a token must not reach top_p yet.
        before = jnp.cumsum(shares, axis=-1) - shares
        least = jnp.min(jnp.where(before < how.top_p, down, jnp.inf), -1, keepdims=True)
        z = jnp.where(z < least, OUT, z)
    return z


def draw(key: jax.Array, logits: jax.Array, how: Sampling) -> jax.Array:
    """(batch,) int32, a token for each row of logits (batch, vocab)."""
    if how.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, restrict(logits, how), axis=-1).astype(jnp.int32)


class State(NamedTuple):
    """Between two turns of the loop.

    tokens: (batch, bucket) int32, what was written; beyond the end of a row, `pad`.
    count: () int32, turns so far.  lengths: (batch,) int32, tokens of each row, its
    stop token counted.  done: (batch,) bool, stopped (not: cut off).
    logits: (batch, vocab), what the next token is drawn from.
    """

    tokens: jax.Array
    count: jax.Array
    lengths: jax.Array
    done: jax.Array
    logits: jax.Array
    cache: llm.Cache
    key: jax.Array

    @property
    def mask(self) -> jax.Array:
        """(batch, bucket) bool: the tokens that were written, stop tokens too."""
        places = jnp.arange(self.tokens.shape[1], dtype=jnp.int32)[None]
        return places < self.lengths[:, None]


@dataclasses.dataclass(frozen=True)
class Writer:
    """Writes answers with one model.

    apply: `model.apply`, adapted or not.
    stop: ids that end a row.  pad: fills a row behind its end.
    bucket: tokens that an answer can have at most.
    """

    apply: Callable[..., llm.Output]
    config: llm.Config
    stop: tuple[int, ...]
    pad: int
    bucket: int
    how: Sampling = Sampling()

    def begin(
        self, params: PyTree, ids: jax.Array, mask: jax.Array, key: jax.Array
    ) -> State:
        """Reads the prompts: (batch, tokens), padded on the left."""
        batch, tokens = ids.shape
        cache = llm.empty_cache(self.config, batch, tokens + self.bucket)
        out = self.apply({"params": params}, ids, mask, cache=cache, logits_from=-1)
        return State(
            tokens=jnp.full((batch, self.bucket), self.pad, jnp.int32),
            count=jnp.int32(0),
            lengths=jnp.zeros(batch, jnp.int32),
            done=jnp.zeros(batch, bool),
            logits=out.logits[:, 0],
            cache=out.cache,
            key=key,
        )

    def go_on(self, params: PyTree, state: State, until: jax.Array | int) -> State:
        """Writes until so many tokens are there, or every row has stopped."""
        stop = jnp.asarray(self.stop, jnp.int32)

        def turn(s: State) -> State:
            token = draw(jax.random.fold_in(s.key, s.count), s.logits, self.how)
            token = jnp.where(s.done, self.pad, token)
            out = self.apply(
                {"params": params}, token[:, None], ~s.done[:, None], cache=s.cache
            )
            return State(
                tokens=jax.lax.dynamic_update_slice(
                    s.tokens, token[:, None], (0, s.count)
                ),
                count=s.count + 1,
                lengths=s.lengths + (~s.done).astype(jnp.int32),
                done=s.done | jnp.isin(token, stop),
                logits=out.logits[:, 0],
                cache=out.cache,
                key=s.key,
            )

        until = jnp.minimum(jnp.int32(until), self.bucket)
        return jax.lax.while_loop(
            lambda s: (s.count < until) & ~jnp.all(s.done), turn, state
        )

    def write(
        self,
        params: PyTree,
        ids: jax.Array,
        mask: jax.Array,
        key: jax.Array,
        until: jax.Array | int | None = None,
    ) -> State:
        """Both: the answers to the prompts."""
        until = self.bucket if until is None else until
        return self.go_on(params, self.begin(params, ids, mask, key), until)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A writer whose two programs are compiled, once for each shape of prompts."""

    writer: Writer
    begin: Callable[..., State]
    go_on: Callable[..., State]

    @classmethod
    def of(cls, writer: Writer) -> Compiled:
        # The state is given away: the cache is written where it stands.
        return cls(
            writer, jax.jit(writer.begin), jax.jit(writer.go_on, donate_argnums=1)
        )
