"""What every objective asks of its arrays: shapes, dtypes, and masks that hold.

All is computed in float32, or in float64 where that came in.  What a mask leaves out is
put to zero before anything is made of it, so that neither a NaN there nor the gradient
of one reaches what counts.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.checks import refusal
from jpeft.leaf import wide_dtype
from jpeft.tree.paths import suggest


def numbers(where: str, *, whole: bool = False, **arrays: Any) -> list[jax.Array]:
    """The arrays in float32 or more, of one dtype; raises where shapes differ.

    whole: integers are numbers too (rewards are often 0 and 1).
    """
    first, *_ = arrays
    shape = np.shape(arrays[first])
    for name, x in arrays.items():
        kinds = (jnp.floating, jnp.integer) if whole else (jnp.floating,)
        dtype = jnp.asarray(x).dtype
        if not any(jnp.issubdtype(dtype, k) for k in kinds):
            raise ValueError(
                f"{where}: {name} is {dtype}: expected floating-point numbers"
                + ("" if whole else "; are these ids in place of log-probabilities?")
            )
        check_shape(where, name, x, shape, f"that of {first}")
    out = [jnp.asarray(x) for x in arrays.values()]
    dtype = max((wide_dtype(x.dtype) for x in out), key=lambda d: d.itemsize)
    return [x.astype(dtype) for x in out]


def check_shape(where: str, name: str, x: Any, shape: Any, why: str) -> None:
    if np.shape(x) != tuple(shape):
        raise ValueError(
            f"{where}: {name} has shape {np.shape(x)}: expected {tuple(shape)}, {why}"
        )


def integers(where: str, name: str, x: Any) -> jax.Array:
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{where}: {name} is {x.dtype}: expected integers")
    return x


def weights(where: str, mask: Any, like: jax.Array, name: str = "mask") -> jax.Array:
    """The mask as numbers: 0 for what does not count, else its weight."""
    if mask is None:
        raise ValueError(
            f"{where}: {name} is None: expected an array of shape {like.shape}, 1 for "
            "what counts; jnp.ones_like if all does"
        )
    mask = jnp.asarray(mask)
    if not any(
        jnp.issubdtype(mask.dtype, kind)
        for kind in (jnp.bool_, jnp.integer, jnp.floating)
    ):
        raise ValueError(f"{where}: {name} is {mask.dtype}: expected bool or numbers")
    check_shape(where, name, mask, like.shape, "one for each entry")
    return jax.lax.stop_gradient(mask.astype(wide_dtype(like.dtype)))


def held(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x, and zero where it does not count."""
    return jnp.where(weight != 0, x, jnp.zeros((), x.dtype))


def ratio(total: jax.Array, count: jax.Array) -> jax.Array:
    """total / count, and 0 with zero gradients where nothing counts."""
    some = count > 0
    one, zero = jnp.ones((), count.dtype), jnp.zeros((), total.dtype)
    return jnp.where(some, total, zero) / jnp.where(some, count, one)


def last_position(weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(positions along the last axis, (..., 1) the last one that counts or -1)."""
    at = jnp.arange(weight.shape[-1], dtype=jnp.int32)
    at = jnp.broadcast_to(at, weight.shape)
    return at, jnp.max(jnp.where(weight != 0, at, -1), axis=-1, keepdims=True)


def choose(where: str, name: str, value: Any, known: Any) -> Any:
    """`known[value]`, or the refusal that names what is near."""
    if not isinstance(value, str) or value not in known:
        near = suggest(list(known), str(value))
        raise refusal(
            where,
            name,
            value,
            f"one of {tuple(known)}; near it: {', '.join(map(repr, near))}",
        )
    return known[value]
