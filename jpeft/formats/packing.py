"""Two 4-bit codes a byte, planar: no code crosses to another place on the minor axis.

In groups of 64 along the packed axis, byte g*32 + r holds code g*64 + r in its low
nibble and code g*64 + 32 + r in its high one.  So unpacking is two masks side by side,
and a shard of whole groups is a shard of the array.

bitsandbytes packs neighbours, the first in the high nibble; `pairs` and `from_pairs`
read and write that.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt8

GROUP = 64


def padded(n: int) -> int:
    """Codes along a packed axis: n rounded up to whole groups."""
    return -(-n // GROUP) * GROUP


def split_axis(x: jax.Array, axis: int, *sizes: int) -> jax.Array:
    """One axis as several."""
    return x.reshape(*x.shape[:axis], *sizes, *x.shape[axis + 1 :])


def pack(codes: UInt8[Array, "..."], axis: int) -> UInt8[Array, "..."]:
    """Codes 0..15, a multiple of 64 along `axis`, as half as many bytes."""
    groups = codes.shape[axis] // GROUP
    c = split_axis(codes, axis, groups, 2, GROUP // 2)
    low = jax.lax.index_in_dim(c, 0, axis + 1, keepdims=False)
    high = jax.lax.index_in_dim(c, 1, axis + 1, keepdims=False)
    both = low | (high << 4)
    return both.reshape(*codes.shape[:axis], -1, *codes.shape[axis + 1 :])


def groups(packed: UInt8[Array, "..."], axis: int) -> UInt8[Array, "..."]:
    """The bytes with their groups apart: (..., groups, 32, ...)."""
    return split_axis(packed, axis, -1, GROUP // 2)


def nibbles(
    bytes: UInt8[Array, "..."], *, whole: bool = False
) -> list[tuple[UInt8[Array, "..."], int]]:
    """[(low ones, lowest bit), (high ones, lowest bit)].

    They stay where they are, among the byte's other bits, unless `whole`.
    """
    if whole:
        return [(bytes & 15, 0), (bytes >> 4, 0)]
    return [(bytes, 0), (bytes, 4)]


def unpack(packed: UInt8[Array, "..."], axis: int) -> UInt8[Array, "..."]:
    """The codes again, with their groups apart: (..., groups, 64, ...)."""
    c = groups(packed, axis)
    return jnp.concatenate([code for code, _ in nibbles(c, whole=True)], axis + 1)


def pairs(codes: UInt8[Array, " n"], zero: int) -> UInt8[Array, " half"]:
    """bitsandbytes' bytes of a flat run of codes; an odd end gets the code `zero`."""
    codes = jnp.pad(codes, (0, codes.shape[0] % 2), constant_values=zero)
    codes = codes.reshape(-1, 2)
    return (codes[:, 0] << 4) | codes[:, 1]


def from_pairs(packed: UInt8[Array, " half"], n: int) -> UInt8[Array, " n"]:
    """The n codes in bitsandbytes' bytes."""
    return jnp.stack([packed >> 4, packed & 15], -1).reshape(-1)[:n]
