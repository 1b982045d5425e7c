"""Double quantisation: the scales of blocks, quantised in turn.

    scale ~ dynamic8[code] * nested[group of 256] + offset      offset = mean(scale)

Dettmers et al. 2023, arXiv:2305.14314, section 3, as bitsandbytes does it.  At blocks
of 64 it takes the 0.5 bits a parameter of float32 scales to 0.127.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from jpeft.formats.blocks import scaled
from jpeft.formats.codebooks import dynamic_map, encode_dynamic

NESTED_BLOCK = 256


class Nested(NamedTuple):
    """Quantised scales.

    codes: one byte a scale, in the shape of the scales.
    absmax: float32 (*stack, groups), of each group of 256 scales.
    offset: float32 (*stack,), the mean.
    """

    codes: UInt8[Array, "*shape"]
    absmax: Float[Array, "*stack groups"]
    offset: Float[Array, "*stack"]


def quantize_scales(scales: Float[Array, "*shape"], axis: int, stack: int) -> Nested:
    """Scales as bytes, a matrix at a time.

    axis: which axis counts the blocks.  stack: how many leading axes count matrices.
    Groups run along the blocks of one output first, as bitsandbytes' do.
    """
    lead, flat, restore = _in_order(scales, axis, stack)
    n = flat.shape[1]
    offset = jax.vmap(exact_mean)(flat)
    centred = flat - offset[:, None]
    groups = -(-n // NESTED_BLOCK)
    padded = jnp.pad(centred, ((0, 0), (0, groups * NESTED_BLOCK - n)))
    padded = padded.reshape(-1, groups, NESTED_BLOCK)
    absmax = jnp.max(jnp.abs(padded), -1)
    codes = encode_dynamic(scaled(padded, absmax[..., None]))
    codes = jnp.where(absmax[..., None] > 0, codes, jnp.uint8(0))
    codes = restore(codes.reshape(flat.shape[0], -1)[:, :n])
    return Nested(codes, absmax.reshape(*lead, groups), offset.reshape(lead))


def dequantize_scales(nested: Nested, axis: int, stack: int) -> Float[Array, "*shape"]:
    """The scales in float32."""
    # Of a tree that Flax has read they are NumPy's.
    codes, absmax, offset = map(jnp.asarray, nested)
    _, flat, restore = _in_order(codes, axis, stack)
    n = flat.shape[1]
    each = jnp.repeat(absmax.reshape(flat.shape[0], -1), NESTED_BLOCK, axis=1)[:, :n]
    return restore(dequantize_codes(flat, each, offset.reshape(-1, 1)))


def dequantize_codes(
    codes: UInt8[Array, "*shape"],
    absmax: Float[Array, "*shape"],
    offset: Float[Array, "..."],
) -> Float[Array, "*shape"]:
    """Scales, each given the absmax of its group.

    The product is rounded before the sum, as bitsandbytes rounds it.  The compiler
    would fuse the two and differ in the last bit, but for the maximum between them; a
    barrier, or a rounding to float32, it removes.
    """
    unit = jnp.take(jnp.asarray(dynamic_map()), codes.astype(jnp.int32), mode="clip")
    return jnp.maximum(unit * absmax, np.finfo(np.float32).min) + offset


def exact_mean(x: Float[Array, " n"]) -> Float[Array, ""]:
    """The mean of float32 values: their exact sum, rounded once, over n.

    Summed in a tree in which each addition keeps its own error (Knuth's two-sum), so
    that the result depends on neither the order nor the device.
    """
    n = x.shape[0]
    # Sums of the largest numbers must not overflow.
    big = jnp.max(jnp.abs(x)) > 2.0**64
    x = x * jnp.where(big, np.float32(2.0**-64), np.float32(1.0))
    high = jnp.pad(x, (0, (1 << (n - 1).bit_length()) - n))
    low = jnp.zeros_like(high)
    while high.shape[0] > 1:
        a, b = high[::2], high[1::2]
        total = a + b
        kept = total - a
        error = (a - (total - kept)) + (b - kept)
        high, low = total, low[::2] + low[1::2] + error
    # Counted, since a division by a constant becomes a product with its reciprocal.
    count = jnp.sum((x >= 0) | (x < 0), dtype=jnp.float32)
    mean = (high[0] + low[0]) / count
    mean = mean * jnp.where(big, np.float32(2.0**64), np.float32(1.0))
    return jnp.minimum(mean, np.finfo(np.float32).max)


def _in_order(x: jax.Array, axis: int, stack: int):
    """(stack's shape, each matrix' scales in bitsandbytes' order, the way back)."""
    moved = jnp.moveaxis(x, axis, -1)
    lead = x.shape[:stack]

    def restore(flat: jax.Array) -> jax.Array:
        return jnp.moveaxis(flat.reshape(moved.shape), -1, axis)

    return lead, moved.reshape(math.prod(lead), -1), restore
