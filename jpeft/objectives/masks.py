"""Which tokens of a generated text are the answer.

By position, never by id: a padding id that is also the end of text (as it often is)
would make every end of an answer padding, or every padding an end.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.checks import refusal
from jpeft.objectives._arrays import check_shape, integers


def answer_mask(ids: Any, stop_ids: Any, start: Any) -> jax.Array:
    """bool, True from the answer's start up to and including its first stop.

    ids: (*batch, tokens), integers.
    stop_ids: an id or several (end of text, end of turn).
    start: where answers begin: one position for all, or (*batch,) of them, or a bool
        array of the shape of `ids` that is True from there on.

    A stop in the prompt is none.  Without a stop the answer reaches the last token:
    `truncated`.

    >>> import jax, numpy as np
    >>> from jpeft.objectives import answer_mask
    >>> jax.jit(answer_mask)(np.array([[2, 5, 6, 2, 2, 2]]), 2, 1).astype(int).tolist()
    [[0, 1, 1, 1, 0, 0]]
    """
    answer, stops = _answer_and_stops("answer_mask", ids, stop_ids, start)
    before = jnp.cumsum(stops, axis=-1, dtype=jnp.int32) - stops.astype(jnp.int32)
    return answer & (before == 0)


def truncated(ids: Any, stop_ids: Any, start: Any) -> jax.Array:
    """(*batch,) bool: the answer has no stop.  Arguments as for `answer_mask`.

    >>> import numpy as np
    >>> from jpeft.objectives import truncated
    >>> ids = np.array([[4, 5, 6, 2], [4, 5, 6, 7]])
    >>> truncated(ids, 2, 1).tolist()
    [False, True]
    """
    _, stops = _answer_and_stops("truncated", ids, stop_ids, start)
    return ~jnp.any(stops, axis=-1)


def _answer_and_stops(
    where: str, ids: Any, stop_ids: Any, start: Any
) -> tuple[jax.Array, jax.Array]:
    ids = integers(where, "ids", ids)
    if ids.ndim < 1:
        raise refusal(where, "ids", ids, "an array (..., tokens)")
    stops = jnp.atleast_1d(integers(where, "stop_ids", stop_ids)).astype(ids.dtype)
    answer = _from_start(where, ids, jnp.asarray(start))
    is_stop = jnp.any(ids[..., None] == stops.reshape((1,) * ids.ndim + (-1,)), axis=-1)
    return answer, answer & is_stop


def _from_start(where: str, ids: jax.Array, start: jax.Array) -> jax.Array:
    if start.dtype == jnp.bool_:
        check_shape(where, "start", start, ids.shape, "that of ids")
        # From the first True on, whatever comes after it.
        return jnp.cumsum(start, axis=-1, dtype=jnp.int32) > 0
    start = integers(where, "start", start)
    if start.ndim:
        check_shape(where, "start", start, np.shape(ids)[:-1], "one for each text")
    at = jnp.arange(ids.shape[-1], dtype=jnp.int32)
    start = jnp.broadcast_to(start, ids.shape[:-1]).astype(jnp.int32)
    return at.reshape((1,) * (ids.ndim - 1) + (-1,)) >= start[..., None]
