"""Digests of arrays: 64 bits that do not depend on how an array is sharded.

    digest_k(x) = sum_i word_i * odd_k(i)   mod 2^32      k = 1, 2

The words are the array's bits, the weights two sequences of odd numbers.  Odd numbers
have inverses modulo 2^32, so a single changed word always shows.  Everything is integer
arithmetic on the device, with no gather.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Shaped, UInt32

from jpeft.compat import is_key_array

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}
_SEEDS = (1, 0x7F4A7C15)


@jax.jit
def digest(x: Shaped[Array, "..."]) -> UInt32[Array, "2"]:
    """Two uint32 words of an array of any shape and dtype."""
    if is_key_array(x):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], -1)
    if jnp.iinfo(x.dtype).bits < 8 if jnp.issubdtype(x.dtype, jnp.integer) else False:
        x = x.astype(jnp.int8)
    # A 64-bit number becomes two words along a new last axis.
    words = lax.bitcast_convert_type(x, _WORDS[x.dtype.itemsize]).astype(jnp.uint32)
    index = jnp.zeros(words.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(words.ndim)):
        step = jnp.uint32(stride % 2**32)
        index = index + lax.broadcasted_iota(jnp.uint32, words.shape, axis) * step
        stride *= words.shape[axis]
    sums = [jnp.sum(words * _odd(index, s), dtype=jnp.uint32) for s in _SEEDS]
    return jnp.stack(sums)


def _odd(index: UInt32[Array, "..."], seed: int) -> UInt32[Array, "..."]:
    h = (index + jnp.uint32(seed)) * jnp.uint32(0x9E3779B1)
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    return (h ^ (h >> 13)) | jnp.uint32(1)


def words(x: Any) -> Any:
    """What a digest is taken of: of 64 bits JAX alone would take the lower half."""
    if isinstance(x, np.ndarray) and x.dtype.itemsize in (8, 16):
        return np.atleast_1d(np.ascontiguousarray(x)).view(np.uint32)
    return x


def digests(arrays: Mapping[str, Any]) -> dict[str, str]:
    """{name: 16 hexadecimal digits}.

    Arrays in the host's memory (`optim.offload`) are fetched one after the other.
    """
    found: dict[str, Any] = {}
    for n, x in arrays.items():
        x = jnp.asarray(x)
        if jax.typeof(x).memory_space == jax.memory.Space.Host:
            here = digest(jax.device_put(x, jax.memory.Space.Device))
            found[n] = jax.block_until_ready(here)
        else:
            found[n] = digest(x)
    found = jax.device_get(found)
    return {
        n: "".join(f"{int(w):08x}" for w in np.asarray(d)) for n, d in found.items()
    }
