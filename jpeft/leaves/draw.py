"""First values of a method's arrays, made with few and small compilations.

Run by itself, a random draw compiles a program for each shape, and for three axes XLA
for CPU takes three to six times as long as for one.  JAX's default generator numbers
the entries of an array in order, whatever its shape, and what an entry becomes depends
on its position alone (`jax_threefry_partitionable`).  So the same bits come out of a
longer flat draw, whose length many arrays share.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft import compat

_COUNTS = "threefry2x32"  # the generator of which the above is known
_ROOMS = tuple(2048 * 4**k for k in range(6))  # a longer draw costs what it compiles


def drawn(
    draw: Callable[[jax.Array, tuple[int, ...]], jax.Array],
    key: jax.Array,
    shape: tuple[int, ...],
) -> jax.Array:
    """`draw(key, shape)`, bit for bit.

    draw: a function such as `jax.random.normal`, which may also change each entry by
        itself: scale it, cast it.
    """
    n = math.prod(shape)
    if jax.random.key_impl(key) != _COUNTS:
        return draw(key, shape)
    if isinstance(key, compat.Tracer) or not compat.draws_by_number():
        return draw(key, (n,)).reshape(shape)
    room = next((r for r in _ROOMS if r >= n), n)
    x = draw(key, (room,))
    if _is_free(x):
        return jax.device_put(np.array(np.asarray(x)[:n]).reshape(shape))
    return x[:n].reshape(shape)


def filled(shape: tuple[int, ...], value: float, dtype: Any) -> jax.Array:
    """`jnp.full(shape, value, dtype)`."""
    x = jnp.full((), value, dtype)
    if _is_free(x):
        return jax.device_put(np.full(shape, np.asarray(x)))
    return jnp.full(shape, value, dtype)


def _is_free(x: jax.Array) -> bool:
    """Whether NumPy may go on with it: an array on a CPU, not traced, of no declared
    sharding."""
    if isinstance(x, compat.Tracer) or x.committed:
        return False
    return all(d.platform == "cpu" for d in x.devices())
