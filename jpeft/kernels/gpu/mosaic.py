"""4-bit matrices on NVIDIA GPUs from Hopper on, in Pallas' Mosaic GPU dialect.

    W[k, n] = book[code[k, n]] * scale[k // block, n]

A *block* is what shares a scale, a *tile* what one warpgroup works on at a time, a
*group* the 64 rows whose codes are packed together.  `_plain` is the meaning of both
operations.  Products are in `_gpu_few` or XLA's: `_gpu` says which.

The table stays in registers.  Lane i of a warp holds book[i % 16], and a shuffle
fetches the entry of each element from the lane that its code names.  A shuffle reads no
more than five bits of a lane's number, and lane i + 16 has what lane i has: so a
register of four packed bytes is shifted by 0, 4, 8 ... 28 bits and names a lane each
time, nothing masked off.  That leaves a shift, a shuffle, a product and half a rounding
for each element.

Encoding has a table too, of 32 cells: see `Cells`.

Memory is read and written straight from registers, 16 bytes a thread where the dtype
has that many, by tiles small enough that many are in flight.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, vector
from jaxtyping import Array, Float, Int32, UInt8

from jpeft import compat
from jpeft.formats.packing import GROUP
from jpeft.kernels.gpu.cells import Cells, round_to_bits

HALF = GROUP // 2
# Of a tile; its rows are one group.
COLUMNS = 128
_WARPGROUP = 128

# How a warpgroup holds (32, 128).  For decoding, a thread has as many neighbours in a
# row as make 16 bytes of the result; by the bytes of one.
_WIDE = {
    2: plgpu.Layout.TILED(
        plgpu.Tiling(((8, COLUMNS), (2, COLUMNS), (8,))),
        warp_dims=(-5,),
        lane_dims=(-3, -2),
        vector_dim=-1,
    ),
    4: plgpu.Layout.TILED(
        plgpu.Tiling(((4, COLUMNS), (4,))),
        warp_dims=(-3,),
        lane_dims=(-2,),
        vector_dim=-1,
    ),
}
# For encoding, by columns: each lies in four or eight lanes of a warp, so that the
# largest of a block is found by two or three shuffles and without a barrier.  In tiles
# of 128 columns float32 fills too many registers.
_TALL = {
    COLUMNS: plgpu.Layout.TILED(
        plgpu.Tiling(((4, 128), (4, 32), (4,))),
        warp_dims=(-4,),
        lane_dims=(-3, -2),
        vector_dim=-1,
    ),
    COLUMNS // 2: plgpu.Layout.TILED(
        plgpu.Tiling(((8, 64), (8, 16), (4,))),
        warp_dims=(-4,),
        lane_dims=(-3, -2),
        vector_dim=-1,
    ),
}
# A table: one entry a thread.
_LANES = plgpu.Layout.WG_STRIDED((_WARPGROUP,), vec_size=1)


# --- the operations ------------------------------------------------------------------


def quantize(
    w: Float[Array, "k n"], *, format: str, block_size: int, interpret: Any = None
) -> tuple[UInt8[Array, "half n"], Float[Array, "blocks n"]]:
    n = w.shape[1]
    w = _pad(w)
    k, columns = w.shape
    # A program owns whole blocks and whole groups: two blocks if they are small.
    rows = min(max(block_size, GROUP), k)
    cells = Cells.of(format)
    tables = cells.tables(_WARPGROUP) if cells else ()
    tile = COLUMNS // 2 if w.dtype == jnp.float32 else COLUMNS
    layout = _TALL[tile]

    def kernel(w_ref: Any, *refs: Any) -> None:
        *table_refs, codes_ref, scales_ref = refs
        i = lax.axis_index("rows")
        at = pl.ds(lax.axis_index("columns") * tile, tile)
        tables = [_read(t, pl.ds(0, _WARPGROUP), _LANES) for t in table_refs]

        def halves_of(g: Any) -> list[jax.Array]:
            starts = (g * GROUP, g * GROUP + HALF)
            return [
                _read(w_ref, (pl.ds(start, HALF), at), layout).astype(jnp.float32)
                for start in starts
            ]

        def largest(*halves: jax.Array) -> jax.Array:
            return jnp.max(functools.reduce(jnp.maximum, map(jnp.abs, halves)), axis=0)

        def store(g: Any, halves: list[jax.Array], scales: list[jax.Array]) -> None:
            low, high = (
                _encode(
                    _unit(x, s), format, cells, tables, layout, interpret is not None
                )
                for x, s in zip(halves, scales, strict=True)
            )
            packed = low | lax.shift_left(high, jnp.full_like(high, 4))
            codes_ref[pl.ds(g * HALF, HALF), at] = packed.astype(jnp.uint8)

        if rows == GROUP:
            halves = halves_of(i)
            if block_size < GROUP:
                scales = [largest(x) for x in halves]
                for half, scale in enumerate(scales):
                    scales_ref[2 * i + half, at] = scale
            else:
                scales = [largest(*halves)] * 2
                scales_ref[i, at] = scales[0]
            store(i, halves, scales)
            return

        groups = rows // GROUP
        first, last = i * groups, (i + 1) * groups
        if k % rows:
            last = jnp.minimum(last, k // GROUP)  # the last block may end early
        widest = lambda g, so_far: jnp.maximum(so_far, largest(*halves_of(g)))
        scale = lax.fori_loop(first + 1, last, widest, largest(*halves_of(first)))
        scales_ref[i, at] = scale
        lax.fori_loop(
            first, last, lambda g, _: store(g, halves_of(g), [scale] * 2), None
        )

    codes, scales = _call(
        kernel,
        grid=(pl.cdiv(k, rows), columns // tile),
        out_type=[
            jax.ShapeDtypeStruct((k // 2, columns), jnp.uint8),
            jax.ShapeDtypeStruct((pl.cdiv(k, block_size), columns), jnp.float32),
        ],
        name="quantize_4bit",
        interpret=interpret,
    )(w, *tables)
    return codes[:, :n], scales[:, :n]


def dequantize(
    codes: UInt8[Array, "half n"],
    scales: Float[Array, "blocks n"],
    book: Float[Array, " 16"],
    *,
    block_size: int,
    dtype: Any,
    interpret: Any = None,
) -> Float[Array, "k n"]:
    n = codes.shape[1]
    codes, scales = _pad(codes), _pad(scales)
    k, columns = 2 * codes.shape[0], codes.shape[1]
    layout = _WIDE[jnp.dtype(dtype).itemsize]

    def kernel(codes_ref: Any, scales_ref: Any, book_ref: Any, out_ref: Any) -> None:
        i = lax.axis_index("rows")
        at = pl.ds(lax.axis_index("columns") * COLUMNS, COLUMNS)
        packed = _read(codes_ref, (pl.ds(i * HALF, HALF), at), layout)
        if block_size < GROUP:
            rows = [2 * i, 2 * i + 1]
        else:
            rows = [lax.div(i, jnp.int32(block_size // GROUP))]
        scale = [
            lax.broadcast_in_dim(
                _read(scales_ref, (row, at), layout.reduce((0,))), (HALF, COLUMNS), (1,)
            )
            for row in rows
        ]
        halves = _look_up(packed, book_ref, layout, interpret is not None)
        for half, values in enumerate(halves):
            place = pl.ds(i * GROUP + half * HALF, HALF)
            out_ref[place, at] = (values * scale[half % len(scale)]).astype(dtype)

    out = _call(
        kernel,
        grid=(k // GROUP, columns // COLUMNS),
        out_type=jax.ShapeDtypeStruct((k, columns), dtype),
        name="dequantize_4bit",
        interpret=interpret,
    )(codes, scales, book)
    return out[:, :n]


# --- decoding ------------------------------------------------------------------------


def _look_up(
    packed: UInt8[Array, "32 columns"],
    book_ref: Any,
    layout: Any,
    plainly: bool,
) -> tuple[Float[Array, "32 columns"], Float[Array, "32 columns"]]:
    """book[code] of the lower and the upper 32 rows of a group.

    plainly: by indexing.  What is written below in the GPU's own terms has no
    interpreter.
    """
    if plainly:
        codes = packed.astype(jnp.int32)
        book = book_ref[...]
        return book[codes & 15], book[lax.shift_right_logical(codes, 4)]
    result = plgpu.ShapeDtypeStruct(packed.shape, jnp.float32, layout=layout)

    @plgpu.inline_mgpu(
        arg_types=(layout, plgpu.RefType()), return_type=(result, result)
    )
    def shuffle(_: Any, packed: Any, book_ref: Any) -> Any:
        mine = arith.andi(mgpu.thread_idx(), mgpu.c(15, _i32()))
        mine = arith.index_cast(ir.IndexType.get(), mine)
        entry = memref.load(book_ref, [mine])
        halves = [np.empty_like(packed.registers) for _ in range(2)]
        for place, codes in np.ndenumerate(packed.registers):
            (count,) = codes.type.shape
            words = vector.bitcast(ir.VectorType.get((count // 4,), _i32()), codes)
            values = []
            for word in (_element(words, i) for i in range(count // 4)):
                for shift in range(0, 32, 4):
                    lane = arith.shrui(word, mgpu.c(shift, _i32()))
                    values.append(from_lane(entry, lane))
            kind = ir.VectorType.get((count,), ir.F32Type.get())
            for half, registers in enumerate(halves):
                registers[place] = vector.from_elements(kind, values[half::2])
        return tuple(_array(registers, packed.layout) for registers in halves)

    run: Any = shuffle
    return run(packed, book_ref)


# --- encoding ------------------------------------------------------------------------


def _encode(
    x: Float[Array, "32 columns"],
    format: str,
    cells: Cells | None,
    tables: list[jax.Array],
    layout: Any,
    plainly: bool,
) -> Int32[Array, "32 columns"]:
    if cells is None:
        bits = round_to_bits(x, 7.0, 8)
        return bits & jnp.full_like(bits, 15)
    if plainly:
        return cells.encode(x, lambda cell: [t[cell & 31] for t in tables])
    kinds = [plgpu.ShapeDtypeStruct(x.shape, t.dtype, layout=layout) for t in tables]

    @plgpu.inline_mgpu(arg_types=(layout, _LANES, _LANES), return_type=tuple(kinds))
    def shuffle(_: Any, cell: Any, *tables: Any) -> Any:
        results = []
        for table in tables:
            entry = _element(table.registers.flat[0], 0)
            registers = np.empty_like(cell.registers)
            for place, four in np.ndenumerate(cell.registers):
                values = [from_lane(entry, _element(four, e)) for e in range(4)]
                kind = ir.VectorType.get((4,), entry.type)
                registers[place] = vector.from_elements(kind, values)
            signed = None if isinstance(entry.type, ir.F32Type) else True
            results.append(_array(registers, cell.layout, signed))
        return tuple(results)

    run: Any = shuffle
    return cells.encode(x, lambda cell: run(cell, *tables))


def _unit(x: Float[Array, "32 columns"], scale: Float[Array, " columns"]) -> jax.Array:
    inverse = jnp.float32(1) / jnp.maximum(scale, jnp.float32(1e-38))
    return x * lax.broadcast_in_dim(inverse, x.shape, (1,))


# --- the GPU's own terms -------------------------------------------------------------


def _i32() -> Any:
    return ir.IntegerType.get_signless(32)


def _element(value: Any, index: int) -> Any:
    return vector.extract(value, dynamic_position=[], static_position=[index])


def _array(registers: np.ndarray, layout: Any, signed: bool | None = None) -> Any:
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=signed)


def from_lane(value: Any, lane: Any) -> Any:
    """What lane `lane % 32` of the warp has as `value`."""
    kind = "f" if isinstance(value.type, ir.F32Type) else "r"
    return llvm.inline_asm(
        value.type,
        [value, lane],
        "shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;",
        f"={kind},{kind},r",
        has_side_effects=False,
        asm_dialect=0,
    )


# --- calls ---------------------------------------------------------------------------


def _call(kernel: Any, *, grid: tuple[int, int], name: str, **how: Any) -> Any:
    kernel.__name__ = name
    return plgpu.kernel(
        kernel,
        grid=grid,
        grid_names=("rows", "columns"),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        **how,
    )


def _read(ref: Any, at: Any, layout: Any) -> jax.Array:
    """From global memory, where "optimized" (a term of shared memory) means nothing."""
    return compat.load_at(plgpu.load, ref, at, layout=layout, optimized=False)


def _pad(x: jax.Array) -> jax.Array:
    short = -x.shape[1] % COLUMNS
    return jnp.pad(x, ((0, 0), (0, short))) if short else x
