"""4-bit matrices on NVIDIA GPUs, in Pallas' Triton dialect.

    W[k, n] = book[code[k, n]] * scale[k // block, n]

A *block* is what shares a scale, a *tile* what one program works on, a *group* the 64
rows whose codes are packed together.  `_plain` is the meaning of everything here.

What costs is the table, not the memory: sixteen float32 values make a tree of fifteen
selects for each element, and a GPU that copies 4 TB/s has time for half of it.  So the
table is gathered from ("gather"): its 64 bytes are half a cache line, each word in a
bank of its own, and whatever 32 codes a warp asks for comes in one pass.  A table of
256 pairs, one look-up for a whole byte, would save two instructions of seven and lie on
sixteen lines that a warp's bytes hit at random.

Encoding has a table too, of 32 cells, see `Cells` ("gather"); the alternative is a
bisection whose thresholds are chosen by selects ("select").
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int32, UInt8

from jpeft import compat
from jpeft.formats import codebooks
from jpeft.formats.packing import GROUP
from jpeft.kernels.gpu.cells import Cells, round_to_bits

LookUp = Literal["gather", "select"]
HALF = GROUP // 2


@dataclasses.dataclass(frozen=True)
class Config:
    """Tiles and warps.

    tuned_on: by what.  No GPU was at hand: counts of instructions and registers decided
        (`benchmarks/kernel_report_gpu.py`), and the arithmetic of bytes in flight.
    columns, warps: of a tile in `dequantize` and `quantize`; its rows are one group, or
        one block.
    product_columns, product_warps, stages: the same in a product, and how many groups
        are on their way from memory.
    programs: a product is split along the axis it sums over until there are so many.
    """

    tuned_on: str = "ptxas 12.9 for sm_90a"
    look_up: LookUp = "gather"
    columns: int = 128
    warps: int = 4
    product_columns: int = 64
    product_warps: int = 4
    stages: int = 1
    programs: int = 4 * 132


CONFIG = Config()


# --- the operations ------------------------------------------------------------------
# Of a grid the first axis moves fastest: along rows, as memory lies.


def quantize(
    w: Float[Array, "k n"],
    *,
    format: str,
    block_size: int,
    config: Config = CONFIG,
    interpret: bool = False,
) -> tuple[UInt8[Array, "half n"], Float[Array, "blocks n"]]:
    k, n = w.shape
    # A program owns whole blocks and whole groups: two blocks if they are small.
    rows = min(max(block_size, GROUP), k)
    scales = max(GROUP // block_size, 1)
    cells = Cells.of(format) if config.look_up == "gather" else None
    tables = cells.tables() if cells else ()
    columns = config.columns
    codes, scales = pl.pallas_call(
        _Quantize(format, k, n, rows, block_size, columns, cells),
        grid=(pl.cdiv(n, columns), pl.cdiv(k, rows)),
        in_specs=[
            pl.BlockSpec((rows, columns), lambda j, i: (i, j)),
            *(pl.BlockSpec(t.shape, lambda j, i: (0,)) for t in tables),
        ],
        out_specs=[
            pl.BlockSpec((rows // 2, columns), lambda j, i: (i, j)),
            pl.BlockSpec((scales, columns), lambda j, i: (i, j)),
        ],
        out_shape=[
            compat.output_like((k // 2, n), jnp.uint8, w),
            compat.output_like((pl.cdiv(k, block_size), n), jnp.float32, w),
        ],
        compiler_params=plt.CompilerParams(num_warps=config.warps),
        interpret=interpret,
        name="quantize_4bit",
    )(w, *tables)
    return codes, scales


def dequantize(
    codes: UInt8[Array, "half n"],
    scales: Float[Array, "blocks n"],
    book: Float[Array, " 16"],
    *,
    block_size: int,
    dtype: Any,
    config: Config = CONFIG,
    interpret: bool = False,
) -> Float[Array, "k n"]:
    k, n = 2 * codes.shape[0], codes.shape[1]
    columns = config.columns

    def kernel(codes_ref: Any, scales_ref: Any, book_ref: Any, out_ref: Any) -> None:
        mask = _inside(pl.program_id(0), columns, n)
        packed = _load(codes_ref, mask)
        scale = [
            _load(scales_ref.at[pl.ds(r, 1)], mask) for r in _scale_rows(block_size)
        ]
        halves = _decode(packed, scale, book_ref, config.look_up)
        for half, values in enumerate(halves):
            place = out_ref.at[pl.ds(half * HALF, HALF)]
            plt.store(place, values.astype(dtype), mask=mask)

    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(n, columns), k // GROUP),
        in_specs=[
            pl.BlockSpec((HALF, columns), lambda j, i: (i, j)),
            _scales_spec(block_size, columns, lambda j, i: (i, j)),
            pl.BlockSpec((16,), lambda j, i: (0,)),
        ],
        out_specs=pl.BlockSpec((GROUP, columns), lambda j, i: (i, j)),
        out_shape=compat.output_like((k, n), dtype, codes, scales, book),
        compiler_params=plt.CompilerParams(num_warps=config.warps),
        interpret=interpret,
        name="dequantize_4bit",
    )(codes, scales, book)


def matmul(
    x: Float[Array, "m k"],
    codes: UInt8[Array, "half n"],
    scales: Float[Array, "blocks n"],
    book: Float[Array, " 16"],
    *,
    block_size: int,
    dtype: Any,
    config: Config = CONFIG,
    interpret: bool = False,
) -> Float[Array, "m n"]:
    """x @ W for few rows of x (at most 128), in bfloat16 or float16: W is decoded on
    its way from memory to the tensor cores."""
    m, (k, n) = x.shape[0], (2 * codes.shape[0], codes.shape[1])
    tokens, columns = _tokens(m), config.product_columns
    groups, tiles = k // GROUP, pl.cdiv(n, columns)
    # Every part has the same number of groups, but for the last.
    per = pl.cdiv(groups, min(groups, pl.cdiv(config.programs, tiles)))
    parts = pl.cdiv(groups, per)
    written = jnp.dtype(dtype) if parts == 1 else jnp.dtype(jnp.float32)

    def kernel(
        x_ref: Any, codes_ref: Any, scales_ref: Any, book_ref: Any, out_ref: Any
    ) -> None:
        tile, part = pl.program_id(0), pl.program_id(1)
        mask = _inside(tile, columns, n)
        rows = _inside(0, tokens, m, axis=0)

        def fetch(g: Any) -> tuple[jax.Array, ...]:
            packed = _load(codes_ref.at[pl.ds(g * HALF, HALF)], mask)
            return packed, *_load_scales(scales_ref, g, block_size, mask)

        def group(g: Any, carry: Any) -> Any:
            total, (packed, *scale) = carry
            fetched = fetch(jnp.minimum(g + 1, last - 1))
            halves = _decode(packed, scale, book_ref, config.look_up)
            for half, values in enumerate(halves):
                x = _load(x_ref.at[:, pl.ds(g * GROUP + half * HALF, HALF)], rows)
                total += jnp.dot(
                    x, values.astype(x.dtype), preferred_element_type=jnp.float32
                )
            return total, fetched

        first, last = part * per, (part + 1) * per
        last = jnp.minimum(last, groups) if groups % per else last
        zero = jnp.zeros((tokens, columns), jnp.float32)
        total, _ = lax.fori_loop(first, last, group, (zero, fetch(first)))
        both = _both(rows, mask)
        plt.store(out_ref, total.astype(written), mask=both)

    out = pl.pallas_call(
        kernel,
        grid=(tiles, parts),
        in_specs=[
            pl.BlockSpec((tokens, k), lambda j, s: (0, 0)),
            pl.BlockSpec((k // 2, columns), lambda j, s: (0, j)),
            pl.BlockSpec((scales.shape[0], columns), lambda j, s: (0, j)),
            pl.BlockSpec((16,), lambda j, s: (0,)),
        ],
        out_specs=pl.BlockSpec((None, tokens, columns), lambda j, s: (s, 0, j)),
        out_shape=compat.output_like((parts, m, n), written, x, codes, scales, book),
        compiler_params=plt.CompilerParams(
            num_warps=config.product_warps, num_stages=config.stages
        ),
        interpret=interpret,
        name="matmul_4bit",
    )(x, codes, scales, book)
    return out[0] if parts == 1 else jnp.sum(out, axis=0).astype(dtype)


def matmul_transposed(
    g: Float[Array, "m n"],
    codes: UInt8[Array, "half n"],
    scales: Float[Array, "blocks n"],
    book: Float[Array, " 16"],
    *,
    block_size: int,
    dtype: Any,
    config: Config = CONFIG,
    interpret: bool = False,
) -> Float[Array, "m k"]:
    """g @ W.T, as `matmul`; a program makes the 64 columns of one group."""
    m, (k, n) = g.shape[0], (2 * codes.shape[0], codes.shape[1])
    tokens, columns = _tokens(m), config.product_columns
    groups, tiles = k // GROUP, pl.cdiv(n, columns)
    per = pl.cdiv(tiles, min(tiles, pl.cdiv(config.programs, groups)))
    parts = pl.cdiv(tiles, per)
    written = jnp.dtype(dtype) if parts == 1 else jnp.dtype(jnp.float32)

    def kernel(
        g_ref: Any, codes_ref: Any, scales_ref: Any, book_ref: Any, out_ref: Any
    ) -> None:
        part = pl.program_id(1)
        rows = _inside(0, tokens, m, axis=0)

        def fetch(j: Any) -> tuple[jax.Array, ...]:
            at, mask = pl.ds(j * columns, columns), _inside(j, columns, n)
            rows = [pl.ds(r, 1) for r in _scale_rows(block_size)]
            packed = _load(codes_ref.at[:, at], mask)
            return packed, *(_load(scales_ref.at[r, at], mask) for r in rows)

        def tile(j: Any, carry: Any) -> Any:
            totals, (packed, *scale) = carry
            fetched = fetch(jnp.minimum(j + 1, last - 1))
            at, mask = pl.ds(j * columns, columns), _inside(j, columns, n)
            halves = _decode(packed, scale, book_ref, config.look_up)
            g = _load(g_ref.at[:, at], _both(rows, mask))
            products = (
                jnp.dot(g, w.astype(g.dtype).T, preferred_element_type=jnp.float32)
                for w in halves
            )
            return tuple(map(jnp.add, totals, products)), fetched

        first, last = part * per, (part + 1) * per
        last = jnp.minimum(last, tiles) if tiles % per else last
        zero = jnp.zeros((tokens, HALF), jnp.float32)
        totals, _ = lax.fori_loop(first, last, tile, ((zero, zero), fetch(first)))
        for half, total in enumerate(totals):
            place = out_ref.at[:, pl.ds(half * HALF, HALF)]
            plt.store(place, total.astype(written), mask=rows)

    # In interpret mode a slice that ends beyond the array is moved back inside.
    whole = tiles * columns
    out = pl.pallas_call(
        kernel,
        grid=(groups, parts),
        in_specs=[
            pl.BlockSpec((tokens, whole), lambda i, s: (0, 0)),
            pl.BlockSpec((HALF, whole), lambda i, s: (i, 0)),
            _scales_spec(block_size, whole, lambda i, s: (i, 0)),
            pl.BlockSpec((16,), lambda i, s: (0,)),
        ],
        out_specs=pl.BlockSpec((None, tokens, GROUP), lambda i, s: (s, 0, i)),
        out_shape=compat.output_like((parts, m, k), written, g, codes, scales, book),
        compiler_params=plt.CompilerParams(
            num_warps=config.product_warps, num_stages=config.stages
        ),
        interpret=interpret,
        name="matmul_transposed_4bit",
    )(g, codes, scales, book)
    return out[0] if parts == 1 else jnp.sum(out, axis=0).astype(dtype)


# --- decoding ------------------------------------------------------------------------


def _decode(
    packed: UInt8[Array, "32 columns"],
    scales: list[Float[Array, "1 columns"]],
    book_ref: Any,
    look_up: LookUp,
) -> list[Float[Array, "32 columns"]]:
    """The lower and the upper 32 rows of a group.  scales: one for both, or two."""
    packed = packed.astype(jnp.int32)
    codes = packed & 15, lax.shift_right_logical(packed, jnp.int32(4))
    both = zip(codes, (scales[0], scales[-1]), strict=True)
    return [_look_up(c, book_ref, look_up) * s for c, s in both]


def _look_up(
    codes: Int32[Array, "32 columns"], book_ref: Any, how: LookUp
) -> Float[Array, "32 columns"]:
    if how == "gather":
        return plt.load(book_ref.at[codes])
    entries = [jnp.broadcast_to(book_ref[k], codes.shape) for k in range(16)]
    return codebooks.look_up(codes, entries)


# --- encoding ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Quantize:
    """The kernel of `quantize`; a tile is `rows` x `columns`."""

    format: str
    k: int
    n: int
    rows: int
    block_size: int
    columns: int
    cells: Cells | None

    def __call__(self, w_ref: Any, *refs: Any) -> None:
        *tables, codes_ref, scales_ref = refs
        mask = _inside(pl.program_id(0), self.columns, self.n)
        halves_of = lambda g: [
            _load(w_ref.at[pl.ds(g * GROUP + half * HALF, HALF)], mask).astype(
                jnp.float32
            )
            for half in (0, 1)
        ]
        largest = lambda halves: jnp.max(
            jnp.maximum(*map(jnp.abs, halves)), axis=0, keepdims=True
        )

        def store(g: Any, halves: list[jax.Array], scales: list[jax.Array]) -> None:
            low, high = (
                self._encode(x * _inverse(s), tables)
                for x, s in zip(halves, scales, strict=True)
            )
            packed = (low | lax.shift_left(high, jnp.int32(4))).astype(jnp.uint8)
            plt.store(codes_ref.at[pl.ds(g * HALF, HALF)], packed, mask=mask)

        if self.rows == GROUP:
            halves = halves_of(0)
            if self.block_size < GROUP:
                scales = [jnp.max(jnp.abs(x), axis=0, keepdims=True) for x in halves]
            else:
                scales = [largest(halves)]
            for row, scale in enumerate(scales):
                plt.store(scales_ref.at[pl.ds(row, 1)], scale, mask=mask)
            store(0, halves, [scales[0], scales[-1]])
            return

        # The last block may end early.
        groups = self.rows // GROUP
        if self.k % self.rows:
            groups = jnp.minimum(groups, self.k // GROUP - pl.program_id(1) * groups)
        zero = jnp.zeros((1, self.columns), jnp.float32)
        widest = lambda g, so_far: jnp.maximum(so_far, largest(halves_of(g)))
        scale = lax.fori_loop(0, groups, widest, zero)
        plt.store(scales_ref, scale, mask=mask)
        lax.fori_loop(0, groups, lambda g, _: store(g, halves_of(g), [scale] * 2), None)

    def _encode(self, x: jax.Array, tables: list[Any]) -> jax.Array:
        if self.cells is not None:
            look_up = lambda cell: [plt.load(t.at[cell & 31]) for t in tables]
            return self.cells.encode(x, look_up)
        even = codebooks.fixed(self.format).even
        if even is not None:
            return round_to_bits(x, even, 8) & 15
        return codebooks.encode(x, self.format).astype(jnp.int32)


def _inverse(scale: jax.Array) -> jax.Array:
    return 1.0 / jnp.maximum(scale, np.float32(1e-38))


# --- scales, edges, sizes ------------------------------------------------------------


def _scale_rows(block_size: int) -> range:
    """Rows of scales that a group has."""
    return range(max(GROUP // block_size, 1))


def _scales_spec(block_size: int, columns: int, place: Any) -> pl.BlockSpec:
    """The scales of group i, where place(...) = (i, j)."""
    groups_per_block = max(block_size // GROUP, 1)

    def at(*step: Any) -> tuple[Any, Any]:
        i, j = place(*step)
        return _divide(i, groups_per_block), j

    return pl.BlockSpec((len(_scale_rows(block_size)), columns), at)


def _load_scales(
    scales_ref: Any, g: Any, block_size: int, mask: jax.Array | None
) -> list[jax.Array]:
    """Those of group g, from all scales of a strip."""
    if block_size < GROUP:
        rows = [2 * g, 2 * g + 1]
    else:
        rows = [_divide(g, block_size // GROUP)]
    return [_load(scales_ref.at[pl.ds(row, 1)], mask) for row in rows]


def _inside(tile: Any, size: int, n: int, axis: int = 1) -> jax.Array | None:
    """What of a tile is not beyond the edge; None if no tile crosses it."""
    if n % size == 0:
        return None
    shape = (1, size) if axis == 1 else (size, 1)
    return tile * size + lax.broadcasted_iota(jnp.int32, shape, axis) < n


def _both(rows: jax.Array | None, columns: jax.Array | None) -> jax.Array | None:
    if rows is None or columns is None:
        return columns if rows is None else rows
    shape = (rows.shape[0], columns.shape[1])
    return jnp.broadcast_to(rows, shape) & jnp.broadcast_to(columns, shape)


def _load(ref: Any, mask: jax.Array | None) -> jax.Array:
    """Zeros beyond the edge."""
    if mask is None:
        return plt.load(ref)
    return plt.load(ref, mask=jnp.broadcast_to(mask, ref.shape), other=0)


def _tokens(m: int) -> int:
    """Rows of a tile: the tensor cores take sixteen at least."""
    return max(16, pl.next_power_of_2(m))


def _divide(a: Any, b: int) -> Any:
    """a // b for a >= 0, without the sign tests that a traced // has."""
    return a // b if isinstance(a, int) else lax.div(a, jnp.int32(b))
