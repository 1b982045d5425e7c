"""x @ W for a W that is made tile by tile and never whole.

    x @ W      over tiles of columns, each with all rows: nothing is accumulated
    g @ W.T    over tiles of rows, for the same reason

One tile is decoded and used in each step of a loop, so nothing of W's size exists, in
the forward pass or between it and the backward pass.  (Decoded whole, W would: XLA
finds that both passes compute the same thing and keeps the first.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

# Values in a tile.  On two Zen 4 cores, of a 4096 x 4096 matrix, from half to twice as
# many do as well.
_VALUES = 1 << 21


class Tiles(NamedTuple):
    """One axis of a matrix in tiles.

    cut: (start, count) -> that part of the stored arrays; start may be traced.
    decode: (part, count) -> its values, with both axes of the matrix.
    unit: starts and counts are multiples of it.
    """

    cut: Callable[[Any, int], Any]
    decode: Callable[[Any, int], jax.Array]
    unit: int


def matmul(
    x: Float[Array, "m k"],
    n: int,
    columns: Tiles,
    dtype: Any,
) -> Float[Array, "m n"]:
    """x @ W: tiles have x's dtype, sums are float32."""
    return _over(x, n, x.shape[1], columns, 0, dtype)


def matmul_transposed(
    g: Float[Array, "m n"],
    k: int,
    rows: Tiles,
    dtype: Any,
) -> Float[Array, "m k"]:
    """g @ W.T: tiles have g's dtype, sums are float32."""
    return _over(g, k, g.shape[1], rows, 1, dtype)


def _over(
    x: jax.Array,
    size: int,
    depth: int,
    tiles: Tiles,
    summed: int,
    dtype: Any,
) -> jax.Array:
    """The product tile by tile along its last axis.  summed: the axis of a tile that is
    contracted."""

    def one(i: Any, start: Any, count: int) -> jax.Array:
        w = tiles.decode(_apart(i, tiles.cut(start, count)), count)
        y = lax.dot_general(
            x, w, (((1,), (summed,)), ((), ())), preferred_element_type=_wide(x.dtype)
        )
        return y.astype(dtype)

    count = tile_size(size, depth, tiles.unit)
    whole = size // count

    def put(i: Any, done: jax.Array) -> jax.Array:
        return lax.dynamic_update_index_in_dim(done, one(i, i * count, count), i, 0)

    # Room for the tiles, to be overwritten.  Zeros (as in `lax.map`) would depend on
    # nothing: XLA makes them when the program starts and keeps them until the product.
    room = jnp.broadcast_to(x[:1, :1, None].astype(dtype), (whole, x.shape[0], count))
    y = lax.fori_loop(jnp.int32(0), jnp.int32(whole), put, room)
    y = y.swapaxes(0, 1).reshape(x.shape[0], whole * count)
    if size % count == 0:
        return y
    last = one(jnp.int32(0), whole * count, size % count)
    return jnp.concatenate([y, last], 1)


def tile_size(size: int, depth: int, unit: int) -> int:
    """How much of an axis a step takes.

    At least two steps where there is room for two, since XLA inlines a loop of one; and
    a divisor of the axis if one is near, since a remainder costs a copy of the result.
    """
    wanted = max(unit, min(_VALUES // depth, size // 2) // unit * unit)
    near = [
        t
        for t in range(unit, min(2 * wanted, max(unit, size // 2)) + 1, unit)
        if size % t == 0 and 2 * t >= wanted
    ]
    return min(near, key=lambda t: abs(t - wanted), default=min(wanted, size))


def _apart(i: Any, tree: Any) -> Any:
    """The same arrays, in buffers of their own.

    XLA fuses nothing across a conditional, and does not know that i >= 0.  On a CPU it
    would otherwise fuse the cut into the decoding, which then takes three times as
    long.
    """
    nothing = lambda t: jax.tree.map(jnp.zeros_like, t)
    return lax.cond(i >= 0, lambda t: t, nothing, tree)


def _wide(dtype: Any) -> Any:
    return jnp.float64 if dtype == jnp.float64 else jnp.float32
