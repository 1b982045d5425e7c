"""x @ W and g @ W.T for few rows of x or g on NVIDIA GPUs from Hopper on (Mosaic GPU).

    y[m, n]  = sum_k x[m, k] * book[code[k, n]] * scale[k // block, n]
    dx[m, k] = sum_n g[m, n] * scale[k // block, n] * book[code[k, n]]

With few rows a product takes as long as reading W, which is 3.5 times shorter in codes
than in bfloat16, if decoding them is no slower.  What is multiplied here is the book,
in bfloat16 as x is: in `matmul` the scale is applied to float32 sums over 64 rows of W,
in `matmul_transposed` to g before it is rounded.  Either way a product is off by as
much as it is with W in bfloat16, though not by the same.

    group   the 64 rows of W whose codes are packed in 32 rows of bytes
    strip   the columns of a group that a warp works on at a time
    table   what each byte means, a pair of bfloat16, once for every lane

A byte holds rows r and 32 + r of its group.  Their values are what one register of a
tensor core's operand holds if the sum runs over k in the order r, 32 + r, r + 1 ...:
any order will do, as long as x is read in the same one.  So a byte is an address, and
what lies there is an operand: one look-up in shared memory for two elements, in a bank
of the lane's own.  W is the left operand, transposed: tensor cores take 16 of its
columns at least, and 8 rows of x.

Bytes go from memory to registers, a step ahead of their use.  The warps of a block
divide the sum among them, and add up in shared memory, always in one order.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, scf
from jaxtyping import Array, Float, UInt8

from jpeft.formats.packing import GROUP
from jpeft.kernels.gpu import ptx
from jpeft.kernels.gpu.mosaic import HALF, from_lane

# Rows of x up to which accumulators fit the registers.
MOST = 64
_STRIP = 64
_PROCESSORS = 132  # of an H100 or H200
_ROW = 128  # bytes in a row of the table: one bank of four bytes for each lane
_TABLE = 256 * _ROW


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    tuned_on: by what (`benchmarks/kernel_report_gpu.py` measures).
    columns: of W in a block of `matmul`: 32, 64 or 128.
    rows: of packed bytes in a block of `matmul_transposed`: 8, 16 or 32.
    warps: of a block, a multiple of 4.
    """

    tuned_on: str = "H200, jax 0.11.2"
    columns: int = 32
    rows: int = 16
    warps: int = 8

    @classmethod
    def of_matmul(cls, m: int, n: int) -> Config:
        if m > 16:  # sums leave room for no more
            return cls(columns=32, warps=8)
        columns = 32 if n < 64 * _PROCESSORS else 64
        if n <= columns * _PROCESSORS:  # a block each: it takes them all
            return cls(columns=columns, warps=16)
        return cls(columns=columns, warps=8 if m <= 8 else 4)

    @classmethod
    def of_transposed(cls, m: int, k: int) -> Config:
        if m > 16:
            return cls(rows=16, warps=8)
        # Larger blocks, of 64 rows of W, where nearly all processors get one.
        return cls(rows=32 if k >= 0.9 * 64 * _PROCESSORS else 16, warps=16)


# --- the operations ------------------------------------------------------------------


def matmul(
    x: Float[Array, "m k"],
    codes: UInt8[Array, "half n"],
    scales: Float[Array, "blocks n"],
    book: Float[Array, " 16"],
    *,
    block_size: int,
    dtype: Any,
    config: Config | None = None,
) -> Float[Array, "m n"]:
    """x @ W for a bfloat16 x of at most `MOST` rows; blocks of 64 or more."""
    columns = codes.shape[1]
    codes, scales = _pad(codes), _pad(scales)
    (m, k), n = x.shape, codes.shape[1]
    config = config or Config.of_matmul(m, n)
    product = _Forward(m, k, n, block_size, jnp.dtype(dtype), config)
    out = _call(product, x, codes, scales, book, name="matmul_4bit")
    return out[:, :columns]


def matmul_transposed(
    g: Float[Array, "m n"],
    codes: UInt8[Array, "half n"],
    scales: Float[Array, "blocks n"],
    book: Float[Array, " 16"],
    *,
    block_size: int,
    dtype: Any,
    config: Config | None = None,
) -> Float[Array, "m k"]:
    """g @ W.T, as `matmul`."""
    g, codes, scales = _pad(g), _pad(codes), _pad(scales)
    (m, n), k = g.shape, 2 * codes.shape[0]
    config = config or Config.of_transposed(m, k)
    product = _Backward(m, k, n, block_size, jnp.dtype(dtype), config)
    return _call(product, g, codes, scales, book, name="matmul_transposed_4bit")


def _call(product: _Product, *operands: jax.Array, name: str) -> jax.Array:
    def kernel(*refs: Any) -> None:
        types = tuple(plgpu.RefType() for _ in refs), plgpu.Layout.WG_SPLAT

        @plgpu.inline_mgpu(arg_types=types, return_type=())
        def body(_: Any, refs: Any, block: Any) -> tuple[()]:
            product.emit(refs, block.registers.item())
            return ()

        run: Any = body
        run(refs, lax.axis_index("blocks"))

    kernel.__name__ = name
    return plgpu.kernel(
        kernel,
        grid=(product.result // product.wide,),
        grid_names=("blocks",),
        num_threads=product.config.warps // 4,
        thread_name="warpgroups",
        out_type=jax.ShapeDtypeStruct((product.m, product.result), product.dtype),
        scratch_types=[plgpu.SMEM((product.shared // 4,), jnp.float32)],
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
    )(*operands)


# --- what both have in common --------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Product(abc.ABC):
    """One of the two products: of `m` rows with a W of `k` x `n`."""

    m: int
    k: int
    n: int
    block_size: int
    dtype: Any  # of the result
    config: Config

    @property
    def eights(self) -> int:
        """Rows of x, eight at a time."""
        return -(-self.m // 8)

    @property
    def wide(self) -> int:
        """Columns of the result that a block makes."""
        return 16 * self.tiles

    @property
    def shared(self) -> int:
        """Bytes: first for the table, then for the warps' sums."""
        return max(_TABLE, 4 * self.config.warps * 8 * self.eights * self.wide)

    # --- of each product

    @property
    @abc.abstractmethod
    def result(self) -> int:
        """Columns of the result."""

    @property
    @abc.abstractmethod
    def tiles(self) -> int:
        """Tiles of 16 x 8 sums that a warp has, for each eight rows of x."""

    @property
    @abc.abstractmethod
    def steps(self) -> int:
        """Of a block's sums; its warps take turns."""

    @abc.abstractmethod
    def fetch(self, at: _At, step: Any) -> list[Any]:
        """The codes of a step, in words of four bytes."""

    @abc.abstractmethod
    def operands(self, at: _At, step: Any) -> Any:
        """What else it takes."""

    @abc.abstractmethod
    def step(
        self, at: _At, codes: Sequence[Any], operands: Any, counts: Any, sums: list[Any]
    ) -> list[Any]:
        """The sums after a step, unless not `counts`."""

    @abc.abstractmethod
    def column(self, at: _At, tile: int, half: int) -> Any:
        """Of the result, in the block, of a thread's sums in a tile's upper (0) or
        lower eight rows."""

    def place(self, at: _At, column: Any) -> Any:
        """In the result, of a column of the block."""
        return ptx.add(ptx.mul(at.block, self.wide), column)

    # --- of both

    def row_of_x(self, at: _At, eight: int, width: int, column: Any) -> Any:
        """Where column `column` is of a thread's row of x (of `width` columns)."""
        row = arith.minui(ptx.add(ptx.shr(at.lane, 2), 8 * eight), ptx.word(self.m - 1))
        return arith.addi(at.x, ptx.offset(row, 2 * width, ptx.mul(column, 2)))

    def scales_of(
        self, at: _At, block: Any, column: Any, count: int, *, stream: bool
    ) -> list[Any]:
        """Of `count` columns from `column` on."""
        start = arith.addi(at.scales, ptx.offset(block, 4 * self.n, ptx.mul(column, 4)))
        words = (
            ptx.load(ptx.after(start, 4 * i), 4, stream=stream)
            for i in range(0, count, 4)
        )
        return [ptx.as_float(word) for four in words for word in four]

    def emit(self, refs: Sequence[Any], block: Any) -> None:
        """The kernel, by the thread.  refs: in the order of `_At`."""
        thread = mgpu.thread_idx()
        x, codes, scales, book, out, shared = map(ptx.address, refs)
        warp, lane = ptx.shr(thread, 5), ptx.and_(thread, 31)
        at = _At(x, codes, scales, book, out, shared, warp, lane, block)
        warps, last = self.config.warps, ptx.word(self.steps - 1)
        fetched = self.fetch(at, arith.minui(at.warp, last))
        _write_table(at, warps)
        ptx.barrier()
        sums = [ptx.real(0.0)] * (4 * self.tiles * self.eights)
        turns = scf.ForOp(
            ptx.word(0),
            ptx.word(-(-self.steps // warps)),
            ptx.word(1),
            [*fetched, *sums],
        )
        with ir.InsertionPoint(turns.body):
            turn, *carried = turns.body.arguments
            read, sums = carried[: len(fetched)], carried[len(fetched) :]
            step = ptx.add(at.warp, ptx.mul(turn, warps))
            # Beyond the last step something is read, and not used.
            operands = self.operands(at, arith.minui(step, last))
            ahead = self.fetch(at, arith.minui(ptx.add(step, warps), last))
            counts = None
            if self.steps % warps:
                counts = arith.cmpi(arith.CmpIPredicate.ule, step, last)
            scf.yield_([*ahead, *self.step(at, read, operands, counts, sums)])
        self.finish(at, list(turns.results)[len(fetched) :])

    def finish(self, at: _At, sums: list[Any]) -> None:
        """Adds up what the warps have, and writes it."""
        rows, wide, warps = 8 * self.eights, self.wide, self.config.warps
        ptx.barrier()  # the table is not needed any more
        mine = ptx.add(at.shared, ptx.mul(at.warp, 4 * rows * wide))
        for i, value in enumerate(sums):
            (eight, tile), part = divmod(i // 4, self.tiles), i % 4
            row = ptx.add(ptx.mul(ptx.and_(at.lane, 3), 2), 8 * eight + part % 2)
            column = self.column(at, tile, part // 2)
            place = ptx.add(ptx.mul(row, wide), column)
            ptx.store_shared(ptx.add(mine, ptx.mul(place, 4)), value)
        ptx.barrier()
        thread = ptx.add(ptx.mul(at.warp, 32), at.lane)
        for start in range(0, rows * wide, 32 * warps):
            # A thread that has no sum of its own does another's again.
            place = arith.remui(ptx.add(thread, start), ptx.word(rows * wide))
            row = arith.minui(arith.divui(place, ptx.word(wide)), ptx.word(self.m - 1))
            column = arith.remui(place, ptx.word(wide))
            first = ptx.add(at.shared, ptx.mul(ptx.add(ptx.mul(row, wide), column), 4))
            total = ptx.load_shared(first, ir.F32Type.get())
            for warp in range(1, warps):
                theirs = ptx.add(first, 4 * warp * rows * wide)
                total = arith.addf(total, ptx.load_shared(theirs, ir.F32Type.get()))
            size = self.dtype.itemsize
            column = ptx.mul(self.place(at, column), size)
            address = arith.addi(at.out, ptx.offset(row, self.result * size, column))
            ptx.store(address, total, self.dtype)


@dataclasses.dataclass(frozen=True)
class _At:
    """Addresses of arrays, and who is asking."""

    x: Any
    codes: Any
    scales: Any
    book: Any
    out: Any
    shared: Any
    warp: Any
    lane: Any
    block: Any


# --- x @ W ---------------------------------------------------------------------------


class _Forward(_Product):
    """A step is a group.  Lane 4 a + b reads, of the strip, the a-th eighth of the
    columns, in rows 8 b to 8 b + 7 of bytes."""

    @property
    def tiles(self) -> int:
        return self.config.columns // 16

    @property
    def result(self) -> int:
        return self.n

    @property
    def steps(self) -> int:
        return self.k // GROUP

    @property
    def each(self) -> int:
        """Columns of a thread."""
        return self.config.columns // 8

    def first_column(self, at: _At) -> Any:
        return self.place(at, self.column(at, 0, 0))

    def fetch(self, at: _At, step: Any) -> list[Any]:
        row = ptx.add(ptx.mul(step, HALF), ptx.mul(ptx.and_(at.lane, 3), 8))
        start = arith.addi(at.codes, ptx.offset(row, self.n, self.first_column(at)))
        return [
            word
            for i in range(8)
            for word in ptx.load(
                ptx.after(start, i * self.n), self.each // 4, stream=True
            )
        ]

    def operands(self, at: _At, step: Any) -> Any:
        """Pairs (x[8 b + i], x[32 + 8 b + i]), and the columns' scales."""
        pairs = []
        for e in range(self.eights):
            column = ptx.add(ptx.mul(step, GROUP), ptx.mul(ptx.and_(at.lane, 3), 8))
            start = self.row_of_x(at, e, self.k, column)
            low, high = (
                ptx.load(ptx.after(start, 2 * HALF * half), 4) for half in (0, 1)
            )
            pairs.append(
                [ptx.halves(low[i // 2], high[i // 2], i % 2) for i in range(8)]
            )
        block = arith.divui(step, ptx.word(self.block_size // GROUP))
        column = self.first_column(at)
        return pairs, self.scales_of(at, block, column, self.each, stream=True)

    def step(
        self, at: _At, codes: Sequence[Any], operands: Any, counts: Any, sums: list[Any]
    ) -> list[Any]:
        pairs, scales = operands
        if counts is not None:
            scales = [arith.select(counts, s, ptx.real(0.0)) for s in scales]
        words = self.each // 4
        row_of = lambda i: [
            _look_up(at, word, byte)
            for word in codes[words * i : words * (i + 1)]
            for byte in range(4)
        ]
        parts = [[ptx.real(0.0)] * 4 for _ in range(self.eights * self.tiles)]
        for i in range(0, 8, 2):
            first, second = row_of(i), row_of(i + 1)
            for tile in range(self.tiles):
                two = slice(2 * tile, 2 * tile + 2)
                left = [*first[two], *second[two]]
                for e in range(self.eights):
                    place = e * self.tiles + tile
                    parts[place] = ptx.mma(left, pairs[e][i : i + 2], parts[place])
        done = []
        for place, part in enumerate(parts):
            tile = place % self.tiles
            for i, value in enumerate(part):
                so_far = sums[4 * place + i]
                done.append(ptx.fma(value, scales[2 * tile + i // 2], so_far))
        return done

    def column(self, at: _At, tile: int, half: int) -> Any:
        return ptx.add(ptx.mul(ptx.shr(at.lane, 2), self.each), 2 * tile + half)


# --- g @ W.T -------------------------------------------------------------------------


class _Backward(_Product):
    """A step is a strip of 64 columns.  Lane 4 a + b reads, of the group, rows
    a, a + 8 ... of bytes, in the b-th quarter of the columns."""

    @property
    def tiles(self) -> int:
        return self.config.rows // 8

    @property
    def result(self) -> int:
        return self.k

    @property
    def steps(self) -> int:
        return self.n // _STRIP

    def first_row(self, at: _At) -> Any:
        """Of bytes."""
        return ptx.mul(at.block, self.config.rows)

    def column_of(self, at: _At, step: Any) -> Any:
        return ptx.add(ptx.mul(step, _STRIP), ptx.mul(ptx.and_(at.lane, 3), 16))

    def fetch(self, at: _At, step: Any) -> list[Any]:
        row = ptx.add(self.first_row(at), ptx.shr(at.lane, 2))
        start = arith.addi(at.codes, ptx.offset(row, self.n, self.column_of(at, step)))
        return [
            word
            for j in range(self.tiles)
            for word in ptx.load(ptx.after(start, 8 * j * self.n), 4, stream=True)
        ]

    def operands(self, at: _At, step: Any) -> Any:
        """g times the scales, in pairs of neighbours."""
        column = self.column_of(at, step)
        block = arith.divui(self.first_row(at), ptx.word(self.block_size // 2))
        scales = self.scales_of(at, block, column, 16, stream=False)
        pairs = []
        for e in range(self.eights):
            start = self.row_of_x(at, e, self.n, column)
            words = [*ptx.load(start, 4), *ptx.load(ptx.after(start, 16), 4)]
            pairs.append([])
            for i, word in enumerate(words):
                low = arith.mulf(ptx.as_float(ptx.shl(word, 16)), scales[2 * i])
                high = ptx.as_float(ptx.and_(word, 0xFFFF0000))
                high = arith.mulf(high, scales[2 * i + 1])
                pairs[-1].append(ptx.pack(high, low))
        return pairs

    def step(
        self, at: _At, codes: Sequence[Any], operands: Any, counts: Any, sums: list[Any]
    ) -> list[Any]:
        pairs, done = operands, list(sums)
        if counts is not None:
            pairs = [[arith.select(counts, p, ptx.word(0)) for p in e] for e in pairs]
        for tile in range(self.tiles):
            for i, word in enumerate(codes[4 * tile : 4 * tile + 4]):
                value = [_look_up(at, word, byte) for byte in range(4)]
                left = [
                    ptx.halves(value[2 * second], value[2 * second + 1], half)
                    for second in (0, 1)
                    for half in (0, 1)
                ]
                for e in range(self.eights):
                    place = 4 * (e * self.tiles + tile)
                    right = pairs[e][2 * i : 2 * i + 2]
                    done[place : place + 4] = ptx.mma(
                        left, right, done[place : place + 4]
                    )
        return done

    def column(self, at: _At, tile: int, half: int) -> Any:
        """In W's rows: the lower half of a group, then the upper."""
        return ptx.add(ptx.shr(at.lane, 2), 8 * tile + half * self.config.rows)

    def place(self, at: _At, column: Any) -> Any:
        rows, first = self.config.rows, self.first_row(at)
        upper, row = (
            arith.divui(column, ptx.word(rows)),
            arith.remui(column, ptx.word(rows)),
        )
        group, inside = ptx.shr(first, 5), ptx.and_(first, HALF - 1)
        row = ptx.add(ptx.add(row, inside), ptx.mul(upper, HALF))
        return ptx.add(ptx.mul(group, GROUP), row)


# --- the table -----------------------------------------------------------------------


def _write_table(at: _At, warps: int) -> None:
    """A row for each byte: the bfloat16 of its lower code, and that of its upper one
    16 bits up."""
    mine = arith.extui(ptx.i64(), ptx.mul(ptx.and_(at.lane, 15), 4))
    entry = ptx.as_float(*ptx.load(arith.addi(at.book, mine), 1))
    start = ptx.add(at.shared, ptx.mul(at.lane, 4))
    for first in range(0, 256, warps):
        byte = ptx.add(at.warp, first)
        low = from_lane(entry, ptx.and_(byte, 15))
        high = from_lane(entry, ptx.shr(byte, 4))
        ptx.store_shared(
            ptx.add(start, ptx.mul(byte, _ROW)), ptx.as_float(ptx.pack(high, low))
        )


def _look_up(at: _At, word: Any, byte: int) -> Any:
    """What byte `byte` of a word means."""
    shift = 8 * byte - 7  # a row has 2^7 bytes
    moved = ptx.shl(word, -shift) if shift < 0 else ptx.shr(word, shift)
    place = ptx.and_or(moved, 255 * _ROW, ptx.mul(at.lane, 4))
    return ptx.load_shared(ptx.add(at.shared, place), ptx.i32())


def _pad(x: jax.Array) -> jax.Array:
    """Columns that a thread can read 16 bytes of, whatever the configuration."""
    short = -x.shape[1] % 128
    return jnp.pad(x, ((0, 0), (0, short))) if short else x
