"""The plain form of the 4-bit kernels: what they mean, and what runs on a CPU.

Its formulation is the fast one there: codes stay uint8 (four times the lanes), planar
nibbles need no interleaving, a tree of selects beats a gather, products go tile by
tile.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float, UInt8

from jpeft.formats import blocks
from jpeft.formats.blocks import FORMATS, Blocks
from jpeft.kernels import tiled

# Decodes by the code book that it is given.
_ANY_BOOK = FORMATS["quantile4"]


def quantize(
    w: Float[Array, "k n"], *, format: str, block_size: int
) -> tuple[UInt8[Array, "half n"], Float[Array, "blocks n"]]:
    q = blocks.quantize(w, FORMATS[format], block_size, 0)
    return q.codes, q.scales


def dequantize(
    codes: UInt8[Array, "half n"],
    scales: Float[Array, "blocks n"],
    book: Float[Array, " 16"],
    *,
    block_size: int,
    dtype: Any,
) -> Float[Array, "k n"]:
    q = Blocks(codes, scales, book=book)
    return blocks.dequantize(
        q, _ANY_BOOK, block_size, 0, 2 * codes.shape[0], dtype=dtype
    )


def matmul(
    x: Float[Array, "m k"],
    codes: UInt8[Array, "half n"],
    scales: Float[Array, "blocks n"],
    book: Float[Array, " 16"],
    *,
    block_size: int,
    dtype: Any,
) -> Float[Array, "m n"]:
    q = Blocks(codes, scales, book=book)
    columns = blocks.across(q, _ANY_BOOK, block_size, 0, 2 * codes.shape[0], x.dtype)
    return tiled.matmul(x, codes.shape[1], tiled.Tiles(*columns), dtype)


def matmul_transposed(
    g: Float[Array, "m n"],
    codes: UInt8[Array, "half n"],
    scales: Float[Array, "blocks n"],
    book: Float[Array, " 16"],
    *,
    block_size: int,
    dtype: Any,
) -> Float[Array, "m k"]:
    q = Blocks(codes, scales, book=book)
    rows = blocks.along(q, _ANY_BOOK, block_size, 0, g.dtype)
    return tiled.matmul_transposed(g, 2 * codes.shape[0], tiled.Tiles(*rows), dtype)
