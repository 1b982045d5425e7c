"""4-bit matrices on TPU, in Pallas.

    W[k, n] = book[code[k, n]] * scale[k // block, n]

A *block* is what shares a scale, a *tile* what one step of a kernel works on, a *group*
the 64 rows whose codes are packed together.  `_plain` is the meaning of all four
operations; layout and signatures are those of `four_bit`.

Looking a code up is what costs: a TPU has no table look-up but a gather within the
eight sublanes of a register.  Two of these, from the lower and the upper half of the
book, and a select are exact and keep up with the memory ("sublane").  TPU v4 has no
such gather; there a tree of fifteen selects does it ("select").

A product decodes a strip of W once into VMEM and sweeps the tokens over it, so that W
never exists in the chip's memory.  With few tokens the strip is decoded piece by piece
as it arrives.

Which TPU a program is for is settled when it is traced, first of these that answers:

    `tpu_generation`   set by hand, for compiling ahead of time
    Pallas             the mesh in use (`jax.set_mesh`), else the default device
    otherwise          tiles and look-up that every TPU from v5e on accepts
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32, UInt8

from jpeft import compat
from jpeft.formats import codebooks
from jpeft.formats.packing import GROUP
from jpeft.kernels import targets

LookUp = Literal["sublane", "select"]
LANES, SUBLANES = 128, 8
HALF = GROUP // 2
MIB = 2**20
# What a kernel may take without asking for more.
_DEFAULT_VMEM = 16 * MIB


# --- the device ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile sizes for one generation of TPU.

    tuned_on: by what.  No TPU was at hand: the figures that decided are the estimates
        of its compiler (`benchmarks/kernel_report_tpu.py`).
    vmem_bytes: for one kernel at most.  Tiles that do not fit are halved.
    tile_rows, tile_columns: of W, in `dequantize` and `quantize`.
    tokens, outputs, inputs: of a product: rows of x, columns of the result, and
        elements summed, in a step.
    few_outputs, few_inputs: the same when one tile holds all tokens.
    """

    tuned_on: str
    look_up: LookUp = "sublane"
    vmem_bytes: int = 40 * MIB
    tile_rows: int = 512
    tile_columns: int = 2048
    tokens: int = 256
    outputs: int = 1024
    inputs: int = 8192
    few_outputs: int = 1024
    few_inputs: int = 1024


CONFIGS = {
    "v4": Config(
        "not tuned: libtpu 0.0.42 has no estimate for v4",
        look_up="select",
        vmem_bytes=12 * MIB,
        tile_columns=512,
        outputs=512,
        few_outputs=512,
    ),
    "v5e": Config("libtpu 0.0.42 and 0.0.50, for v5e", vmem_bytes=80 * MIB),
    "v5p": Config("libtpu 0.0.42 and 0.0.50, for v5p"),
    "v6e": Config("libtpu 0.0.42, for v6e", vmem_bytes=80 * MIB, tokens=512),
}
_ELSEWHERE = CONFIGS["v5p"]


def tpu_generation(name: str) -> contextlib.AbstractContextManager[None]:
    """What is traced inside it is for that TPU: "v4", "v5e", "v5p" or "v6e".

    Needed only to compile ahead of time for v4, or for the best tiles elsewhere.

        with tpu_generation("v4"):
            jax.jit(step).lower(*arguments).compile()
    """
    if name not in CONFIGS:
        raise ValueError(f"TPU generation {name!r}: expected one of {sorted(CONFIGS)}")
    return targets.generation(name)


def _config(given: Config | None, look_up: LookUp | None) -> Config:
    config = given
    if config is None:
        config = CONFIGS.get(targets.generation.value or _present(), _ELSEWHERE)
    return dataclasses.replace(config, look_up=look_up) if look_up else config


def _present() -> str:
    try:
        present = str(pltpu.get_tpu_info().chip_version)
    except ValueError:
        return "no TPU"  # traced here, compiled for somewhere else or not at all
    return "v4" if present in ("v2", "v3", "v4i") else present


# --- the operations ------------------------------------------------------------------


def quantize(
    w: Float[Array, "k n"],
    *,
    format: str,
    block_size: int,
    interpret: Any = False,
    look_up: LookUp | None = None,
    config: Config | None = None,
) -> tuple[UInt8[Array, "half n"], Float[Array, "blocks n"]]:
    """(codes, scales).  look_up: as in the others; encoding looks nothing up."""
    k, n = w.shape
    config = _config(config, look_up)
    if w.dtype not in (jnp.bfloat16, jnp.float32):
        w = w.astype(jnp.float32)
    w = _pad(w, 1, LANES)
    block = min(block_size, k)
    span = max(block, GROUP)  # rows with whole blocks and whole groups
    rows = min(_up(config.tile_rows, span), _up(k, span), k)
    columns = min(config.tile_columns, w.shape[1])
    count = pl.cdiv(k, block)
    vmem = lambda: (
        2 * columns * (rows * w.dtype.itemsize + rows // 2 + _up(count, 8) * 4)
    )
    while vmem() > config.vmem_bytes and columns > LANES:
        columns = _up(columns // 2, LANES)

    codes, scales = pl.pallas_call(
        _Quantize(format, k, rows, block),
        grid=(pl.cdiv(w.shape[1], columns), pl.cdiv(k, rows)),
        in_specs=[pl.BlockSpec((rows, columns), lambda j, i: (i, j))],
        out_specs=[
            pl.BlockSpec((rows // 2, columns), lambda j, i: (i, j)),
            # All scales of a strip of columns stay until its last tile: a tile of rows
            # may have fewer of them than a register has sublanes.
            pl.BlockSpec((count, columns), lambda j, i: (0, j)),
        ],
        out_shape=[
            compat.output_like((k // 2, w.shape[1]), jnp.uint8, w),
            compat.output_like((count, w.shape[1]), jnp.float32, w),
        ],
        compiler_params=_compiler_params(interpret, vmem(), "parallel", "arbitrary"),
        interpret=interpret,
        name="quantize_4bit",
    )(w)
    return codes[:, :n], scales[:, :n]


def dequantize(
    codes: UInt8[Array, "half n"],
    scales: Float[Array, "blocks n"],
    book: Float[Array, " 16"],
    *,
    block_size: int,
    dtype: Any,
    interpret: Any = False,
    look_up: LookUp | None = None,
    config: Config | None = None,
) -> Float[Array, "k n"]:
    """W: the product in float32, rounded once."""
    config = _config(config, look_up)
    k, n = 2 * codes.shape[0], codes.shape[1]
    codes, scales = _pad(codes, 1, LANES), _pad(scales, 1, LANES)
    rows, columns = min(config.tile_rows, k), min(config.tile_columns, codes.shape[1])
    tile = _Tile(k, codes.shape[1], rows, columns, block_size, config.look_up)
    written = _native(dtype)

    def kernel(book_ref: Any, codes_ref: Any, scales_ref: Any, out_ref: Any) -> None:
        tile.decode(pl.program_id(0), 0, book_ref, codes_ref, scales_ref, out_ref)

    out = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(k, rows), pl.cdiv(codes.shape[1], columns)),
        in_specs=[_BOOK, *tile.specs(lambda i, j: (i, j))],
        out_specs=pl.BlockSpec((rows, columns), lambda i, j: (i, j)),
        out_shape=compat.output_like((k, codes.shape[1]), written, codes, scales, book),
        compiler_params=_compiler_params(
            interpret,
            tile.vmem_bytes + 2 * rows * columns * written.itemsize,
            "parallel",
            "parallel",
        ),
        interpret=interpret,
        name="dequantize_4bit",
    )(_as_row(book), codes, scales)
    return out[:, :n].astype(dtype)


def matmul(
    x: Float[Array, "m k"],
    codes: UInt8[Array, "half n"],
    scales: Float[Array, "blocks n"],
    book: Float[Array, " 16"],
    *,
    block_size: int,
    dtype: Any,
    interpret: Any = False,
    look_up: LookUp | None = None,
    config: Config | None = None,
) -> Float[Array, "m n"]:
    """x @ W.  Float32 is multiplied as `jax.default_matmul_precision` says: by default,
    as in XLA, rounded to bfloat16 first."""
    config = _config(config, look_up)
    return _product(
        x, codes, scales, book, False, block_size, jnp.dtype(dtype), interpret, config
    )


def matmul_transposed(
    g: Float[Array, "m n"],
    codes: UInt8[Array, "half n"],
    scales: Float[Array, "blocks n"],
    book: Float[Array, " 16"],
    *,
    block_size: int,
    dtype: Any,
    interpret: Any = False,
    look_up: LookUp | None = None,
    config: Config | None = None,
) -> Float[Array, "m k"]:
    """g @ W.T, from the same codes: the tile is decoded as above, and its other axis
    summed over."""
    config = _config(config, look_up)
    return _product(
        g, codes, scales, book, True, block_size, jnp.dtype(dtype), interpret, config
    )


# --- encoding ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Quantize:
    """The kernel of `quantize`, on a tile of rows x columns, with the grid's axis 1
    going down the rows."""

    format: str
    k: int
    rows: int
    block: int

    def __call__(self, w_ref: Any, codes_ref: Any, scales_ref: Any) -> None:
        groups = _groups_of_tile(self.k, self.rows, pl.program_id(1))
        first = pl.program_id(1) * (self.rows // self.block)
        if self.block < GROUP:

            def pair(g: Any, _: Any) -> None:
                halves = [self._rows(w_ref, g, half) for half in (0, 1)]
                largest = [jnp.max(jnp.abs(x), axis=0, keepdims=True) for x in halves]
                for half in (0, 1):
                    scales_ref[pl.ds(first + 2 * g + half, 1), :] = largest[half]
                self._encode(codes_ref, g, halves, [_inverse(s) for s in largest])

            _for(0, groups, pair)
            return

        per = self.block // GROUP

        def block(b: Any, _: Any) -> None:
            start = b * per
            stop = jnp.minimum(start + per, groups)  # W's last block may end early

            def largest_of(g: Any, so_far: jax.Array) -> jax.Array:
                low, high = (jnp.abs(self._rows(w_ref, g, half)) for half in (0, 1))
                both = jnp.maximum(low, high)
                parts = [both[r : r + SUBLANES] for r in range(0, HALF, SUBLANES)]
                for part in parts:
                    so_far = jnp.maximum(so_far, part)
                return so_far

            zero = jnp.zeros((SUBLANES, w_ref.shape[1]), jnp.float32)
            largest = _for(start, stop, largest_of, zero)
            scale = jnp.max(largest, axis=0, keepdims=True)
            scales_ref[pl.ds(first + b, 1), :] = scale
            inverse = _inverse(scale)

            def group(g: Any, _: Any) -> None:
                halves = [self._rows(w_ref, g, half) for half in (0, 1)]
                self._encode(codes_ref, g, halves, [inverse, inverse])

            _for(start, stop, group)

        _for(0, _divide(groups + per - 1, per), block)

    def _rows(self, w_ref: Any, group: Any, half: int) -> jax.Array:
        start = pl.multiple_of(group * GROUP + half * HALF, HALF)
        return w_ref[pl.ds(start, HALF), :].astype(jnp.float32)

    def _encode(
        self, codes_ref: Any, group: Any, halves: list[jax.Array], inverses: list[Any]
    ) -> None:
        low, high = (
            _encode(jnp.clip(x * i, -1.0, 1.0), self.format)
            for x, i in zip(halves, inverses, strict=True)
        )
        # A NaN's code may have more than four bits; it must not reach its neighbour.
        both = (low & 15) | (high << 4)
        start = pl.multiple_of(group * HALF, HALF)
        codes_ref[pl.ds(start, HALF), :] = both.astype(jnp.uint8)


def _inverse(scale: jax.Array) -> jax.Array:
    """1 / scale, and finite for a block of zeros.  The bound is the smallest normal
    float: below it a TPU sees zero (elsewhere it is 1e-38)."""
    return 1.0 / jnp.maximum(scale, np.finfo(np.float32).tiny)


def _encode(
    x: Float[Array, "rows columns"], format: str
) -> Int32[Array, "rows columns"]:
    """`codebooks.encode` with codes in 32 bits: here a comparison of floats cannot
    select among bytes."""
    book = codebooks.fixed(format)
    if book.even is not None:
        return (jnp.round(x * book.even) + 8.0).astype(jnp.int32)
    return book.in_order(_count_above(x, book.thresholds), jnp.int32)


def _count_above(x: jax.Array, thresholds: np.ndarray) -> jax.Array:
    """How many of 2^n - 1 sorted thresholds lie strictly below x, by bisection."""
    level: list[Any] = list(thresholds)
    code = jnp.zeros(x.shape, jnp.int32)
    while level:
        middle = len(level) // 2
        above = x > level[middle]
        code = code | jnp.where(above, middle + 1, 0)
        halves = zip(level[:middle], level[middle + 1 :], strict=True)
        level = [jnp.where(above, high, low) for low, high in halves]
    return code


# --- decoding ------------------------------------------------------------------------

# Scalar memory: read once a tile, and no copy of the book is laid out beforehand.
_BOOK = pl.BlockSpec((1, 16), lambda *_: (0, 0), memory_space=pltpu.SMEM)


def _as_row(book: Float[Array, " 16"]) -> Float[Array, "1 16"]:
    return book.astype(jnp.float32).reshape(1, 16)


# Columns that are decoded in one go: wide enough to fill the pipeline, no wider, since
# every register of them is code.
_WIDE = 2048


@dataclasses.dataclass(frozen=True)
class _Tile:
    """W (k, n) in tiles of (rows, columns), and how one is decoded."""

    k: int
    n: int
    rows: int
    columns: int
    block_size: int
    look_up: LookUp

    @property
    def scale_rows(self) -> int:
        """Scales are fetched in windows of so many rows, whole registers of eight:
        those of one tile, those of the several tiles that share eight, or all."""
        total = pl.cdiv(self.k, self.block_size)
        wanted = total
        if self.rows % (SUBLANES * self.block_size) == 0:
            wanted = self.rows // self.block_size
        elif (SUBLANES * self.block_size) % self.rows == 0:
            wanted = SUBLANES
        return min(wanted, total)

    def _window(self, i: Any) -> Any:
        # All scales in one window would make this 0 for every tile.
        if self.scale_rows * self.block_size >= self.k:
            return 0
        return _divide(i * self.rows, self.scale_rows * self.block_size)

    def specs(self, place: Callable[..., tuple[Any, Any]]) -> list[pl.BlockSpec]:
        """Of codes and scales; place: a step of the grid -> its tile."""

        def scales(*step: Any) -> tuple[Any, Any]:
            i, j = place(*step)
            return self._window(i), j

        return [
            pl.BlockSpec((self.rows // 2, self.columns), place),
            pl.BlockSpec((self.scale_rows, self.columns), scales),
        ]

    @property
    def vmem_bytes(self) -> int:
        """Of codes and scales, the next ones arriving included."""
        scales = 4 * _up(self.scale_rows, SUBLANES) * self.columns
        codes = self.rows // 2 * self.columns
        return 2 * (codes + scales)

    def decode(
        self,
        i: Any,
        j: Any,
        book_ref: Any,
        codes_ref: Any,
        scales_ref: Any,
        out_ref: Any,
        zero_outside: bool = False,
    ) -> None:
        """Tile (i, j) into out_ref.

        What a tile has beyond W's edge is left undefined, or made zero: then j must be
        right.
        """
        table = _table(book_ref, self.look_up)
        first_scale = self._window(i) * self.scale_rows
        shift = int(math.log2(self.block_size))

        def piece(g: Any, left: Any, wide: int) -> None:
            """A group of rows, from column `left` on."""
            across = pl.ds(left, wide)
            start = pl.multiple_of(g * HALF, HALF)
            packed = codes_ref[pl.ds(start, HALF), across].astype(jnp.int32)
            row = i * self.rows + g * GROUP
            halves = []
            for half, codes in enumerate((packed & 15, packed >> 4)):
                at = ((row + half * HALF) >> shift) - first_scale
                scale = scales_ref[pl.ds(at, 1), across]
                if zero_outside and self.n % self.columns:
                    lane = lax.broadcasted_iota(jnp.int32, (1, wide), 1)
                    inside = lane < self.n - j * self.columns - left
                    scale = jnp.where(inside, scale, 0.0)
                halves.append(_look_up(codes, table, self.look_up) * scale)
            at = pl.multiple_of(g * GROUP, GROUP)
            values = jnp.concatenate(halves, axis=0).astype(out_ref.dtype)
            out_ref[pl.ds(at, GROUP), across] = values

        def group(g: Any, _: Any) -> None:
            whole, rest = divmod(self.columns, _WIDE)
            left = lambda c: pl.multiple_of(c * _WIDE, LANES)
            if whole == 1:
                piece(g, 0, _WIDE)
            elif whole:
                _for(0, whole, lambda c, _: piece(g, left(c), _WIDE))
            if rest:
                piece(g, whole * _WIDE, rest)

        def nothing(g: Any, _: Any) -> None:
            at = pl.multiple_of(g * GROUP, GROUP)
            zero = jnp.zeros((GROUP, self.columns), out_ref.dtype)
            out_ref[pl.ds(at, GROUP), :] = zero

        groups = _groups_of_tile(self.k, self.rows, i)
        _for(0, groups, group)
        if zero_outside and self.k % self.rows:
            _for(groups, self.rows // GROUP, nothing)


def _table(book_ref: Any, how: LookUp) -> tuple[jax.Array, ...]:
    """The book as `_look_up` wants it."""
    entries = [book_ref[0, k] for k in range(16)]
    if how == "select":
        return tuple(entries)
    sublane = lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 0)
    halves = []
    for half in (entries[:8], entries[8:]):
        table = jnp.full((SUBLANES, LANES), half[0])
        for k in range(1, SUBLANES):
            table = jnp.where(sublane == k, half[k], table)
        halves.append(table)
    return tuple(halves)


def _look_up(
    codes: Int32[Array, "rows columns"], table: tuple[jax.Array, ...], how: LookUp
) -> Float[Array, "rows columns"]:
    """book[codes]."""
    if how == "select":
        return codebooks.look_up(codes, table)
    rows = []
    for r in range(0, codes.shape[0], SUBLANES):
        row = codes[r : r + SUBLANES]
        parts = [row[:, c : c + LANES] for c in range(0, codes.shape[1], LANES)]
        rows.append(jnp.concatenate([_by_sublane(q, *table) for q in parts], axis=1))
    return jnp.concatenate(rows, axis=0)


def _by_sublane(codes: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """A register of codes: of its bits, three say the sublane and one the half."""
    find = lambda half: jnp.take_along_axis(
        half, codes & 7, axis=0, mode="promise_in_bounds"
    )
    return jnp.where(codes >= 8, find(high), find(low))


# --- products ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Steps of a product: the columns of its result, the tokens, the elements summed.

    tokens, outputs, inputs: of one step.
    keep: a strip of W, once decoded, stays while the tokens go by.
    """

    tokens: int
    outputs: int
    inputs: int
    token_tiles: int
    output_tiles: int
    steps: int
    keep: bool
    tile: _Tile
    vmem_bytes: int

    @property
    def kept(self) -> int:
        """Decoded tiles that there is room for."""
        return self.steps if self.keep else 1


def _plan(
    m: int,
    k: int,
    n: int,
    transposed: bool,
    block_size: int,
    arriving: np.dtype,
    leaving: np.dtype,
    config: Config,
) -> _Plan:
    """The config's tiles, made smaller until they fit into VMEM."""
    all_outputs, all_inputs = (k, n) if transposed else (n, k)
    few = m <= config.tokens
    keep, most_tokens = not few, config.tokens
    most_outputs = config.few_outputs if few else config.outputs
    most_inputs = config.few_inputs if few else config.inputs
    while True:
        tokens = _even(m, most_tokens, 32 // arriving.itemsize)
        outputs = _even(all_outputs, most_outputs, LANES)
        inputs = _even(all_inputs, most_inputs, LANES)
        steps = pl.cdiv(all_inputs, inputs)
        rows, columns = (outputs, inputs) if transposed else (inputs, outputs)
        tile = _Tile(k, n, rows, columns, block_size, config.look_up)
        plan = _Plan(
            tokens,
            outputs,
            inputs,
            pl.cdiv(m, tokens),
            pl.cdiv(all_outputs, outputs),
            steps,
            keep,
            tile,
            tile.vmem_bytes
            + (steps if keep else 1) * rows * columns * arriving.itemsize
            + 2 * tokens * inputs * arriving.itemsize
            + 2 * tokens * outputs * leaving.itemsize
            + 2 * tokens * outputs * 4,  # the sum so far, and what to add to it
        )
        if plan.vmem_bytes <= config.vmem_bytes:
            return plan
        # What costs least first.  Short sums reload the sum so far, narrow strips x.
        if inputs > 4 * LANES and steps < 8:
            most_inputs = inputs // 2
        elif outputs > LANES:
            most_outputs = outputs // 2
        elif keep:
            # The narrowest strip is too long: decode it anew for each tile of tokens,
            # which are then many.
            keep, most_tokens = False, 4 * config.tokens
            most_outputs, most_inputs = config.few_outputs, config.few_inputs
        elif tokens > 32 // arriving.itemsize:
            most_tokens = tokens // 2
        else:
            raise ValueError(
                f"the smallest tiles of a product with a 4-bit matrix of shape "
                f"{(k, n)} need {plan.vmem_bytes / MIB:.0f} MiB of VMEM, and "
                f"{config.vmem_bytes / MIB:.0f} MiB are allowed; use larger blocks, or "
                "split the matrix"
            )


def _product(
    x: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    book: jax.Array,
    transposed: bool,
    block_size: int,
    dtype: np.dtype,
    interpret: Any,
    config: Config,
) -> jax.Array:
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        # The matrix unit takes no others: let XLA convert as it sees fit.
        w = dequantize(
            codes,
            scales,
            book,
            block_size=block_size,
            dtype=x.dtype,
            interpret=interpret,
            config=config,
        )
        wide = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
        return _dot(x, w, transposed, wide).astype(dtype)

    m = x.shape[0]
    out_size = 2 * codes.shape[0] if transposed else codes.shape[1]
    codes, scales = _pad(codes, 1, LANES), _pad(scales, 1, LANES)
    k, n = 2 * codes.shape[0], codes.shape[1]
    written = _native(dtype)
    plan = _plan(m, k, n, transposed, block_size, x.dtype, written, config)
    # Zeros meet zeros: W's tiles have them too beyond its edge.
    x = _pad(_pad(x, 0, 32 // x.dtype.itemsize), 1, plan.inputs)

    def place(o: Any, t: Any, s: Any) -> tuple[Any, Any]:
        """The tile of W; when it is decoded already, the one that is there."""
        if plan.keep and plan.steps > 1:
            s = jnp.where(t == 0, s, plan.steps - 1)
        return (o, s) if transposed else (s, o)

    out = pl.pallas_call(
        _Product(plan, transposed),
        grid=(plan.output_tiles, plan.token_tiles, plan.steps),
        in_specs=[
            _BOOK,
            pl.BlockSpec((plan.tokens, plan.inputs), lambda o, t, s: (t, s)),
            *plan.tile.specs(place),
        ],
        out_specs=pl.BlockSpec((plan.tokens, plan.outputs), lambda o, t, s: (t, o)),
        out_shape=compat.output_like(
            (x.shape[0], _up(out_size, LANES)), written, x, codes, scales, book
        ),
        scratch_shapes=[
            pltpu.VMEM((plan.kept, plan.tile.rows, plan.tile.columns), x.dtype),
            *(
                [pltpu.VMEM((plan.tokens, plan.outputs), jnp.float32)]
                * (plan.steps > 1)
            ),
        ],
        compiler_params=_compiler_params(
            interpret, plan.vmem_bytes, "parallel", "arbitrary", "arbitrary"
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * m * k * n,
            bytes_accessed=codes.size
            + 4 * scales.size
            + plan.output_tiles * x.size * x.dtype.itemsize
            + m * out_size * written.itemsize,
            transcendentals=0,
        ),
        interpret=interpret,
        name="matmul_transposed_4bit" if transposed else "matmul_4bit",
    )(_as_row(book), x, codes, scales)
    return out[:m, :out_size].astype(dtype)


@dataclasses.dataclass(frozen=True)
class _Product:
    """The kernel of both products; its grid is (outputs, tokens, inputs)."""

    plan: _Plan
    transposed: bool

    def __call__(
        self,
        book_ref: Any,
        x_ref: Any,
        codes_ref: Any,
        scales_ref: Any,
        out_ref: Any,
        kept_ref: Any,
        *sum_refs: Any,
    ) -> None:
        plan = self.plan
        o, t, s = (pl.program_id(axis) for axis in range(3))
        s = s if plan.steps > 1 else 0
        w_ref = kept_ref.at[s if plan.kept > 1 else 0]
        i, j = (o, s) if self.transposed else (s, o)

        def decode() -> None:
            plan.tile.decode(
                i, j, book_ref, codes_ref, scales_ref, w_ref, zero_outside=True
            )

        if plan.keep:
            pl.when(t == 0)(decode)
        else:
            decode()
        part = _dot(x_ref[...], w_ref[...], self.transposed)
        if plan.steps == 1:
            out_ref[...] = part.astype(out_ref.dtype)
            return

        (sum_ref,) = sum_refs

        @pl.when(s == 0)
        def _() -> None:
            sum_ref[...] = part

        @pl.when(s > 0)
        def _() -> None:
            sum_ref[...] += part

        @pl.when(s == plan.steps - 1)
        def _() -> None:
            out_ref[...] = sum_ref[...].astype(out_ref.dtype)


def _dot(
    x: jax.Array, w: jax.Array, transposed: bool, wide: Any = jnp.float32
) -> jax.Array:
    numbers = (((1,), (1 if transposed else 0,)), ((), ()))
    return lax.dot_general(x, w, numbers, preferred_element_type=wide)


# --- sizes and loops -----------------------------------------------------------------


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _even(n: int, most: int, multiple: int) -> int:
    """The size of the fewest tiles of at most `most` that cover n, made alike."""
    tiles = pl.cdiv(n, max(most, multiple))
    return _up(pl.cdiv(n, tiles), multiple)


def _divide(a: Any, b: int) -> Any:
    """a // b for a >= 0, without the sign tests that a traced // has."""
    return a // b if isinstance(a, int) else lax.div(a, jnp.int32(b))


def _pad(x: jax.Array, axis: int, multiple: int) -> jax.Array:
    short = -x.shape[axis] % multiple
    pads = [(0, short if a == axis else 0) for a in range(x.ndim)]
    return jnp.pad(x, pads) if short else x


def _groups_of_tile(k: int, rows: int, i: Any) -> Any:
    """Groups of 64 rows that tile i really has: fewer than `rows` at W's edge."""
    if k % rows == 0:
        return rows // GROUP
    if k < rows:
        return k // GROUP
    return jnp.minimum(rows // GROUP, k // GROUP - i * (rows // GROUP))


def _for(
    start: Any, stop: Any, body: Callable[[Any, Any], Any], carry: Any = None
) -> Any:
    """A loop that counts in 32 bits, also with `jax_enable_x64`."""
    as_i32 = lambda n: np.int32(n) if isinstance(n, int) else n
    return lax.fori_loop(as_i32(start), as_i32(stop), body, carry)


def _native(dtype: Any) -> np.dtype:
    """What a kernel writes: the dtype itself, or float32 for XLA to round."""
    dtype = jnp.dtype(dtype)
    return dtype if dtype in (jnp.bfloat16, jnp.float32) else jnp.dtype(jnp.float32)


def _compiler_params(
    interpret: Any, vmem_bytes: int, *semantics: Any
) -> pltpu.CompilerParams:
    """More VMEM than the default where the tiles need it, with room for spills.

    The interpreter, unlike the compiler, fails on semantics under vmap (jax 0.10.2).
    """
    wanted = vmem_bytes * 5 // 4 + 2 * MIB
    return pltpu.CompilerParams(
        dimension_semantics=None if interpret else semantics,
        vmem_limit_bytes=wanted if wanted > _DEFAULT_VMEM else None,
    )
