"""Block-wise quantisation of an array along one axis, in every format.

    value = book[code] * scale                     nf4, fp4, int4, dynamic8, quantile*
    value = code * scale / 127                     int8
    value = (code - zero) * scale                  int4_asymmetric, int8_asymmetric
    value = (code - 8) * scale                     q4_0
    value = code * scale + least                   q4_1
    value = code * scale                           q8_0

The last three are GGUF's (llama.cpp, ggml's Q4_0, Q4_1, Q8_0), in blocks of 32 alone,
with scales in float16: the codes of its library, and its values bit for bit.

A block is `block_size` consecutive elements along the axis; "channel" makes it the
whole axis, "tensor" the whole matrix.  A last block that is not full has a scale of its
own.  All arithmetic is float32, whatever comes in; a value is rounded once, to the
dtype that goes out.

What is special (as bitsandbytes on a CPU unless said):

    a block of zeros   scale 0, and zeros come back
    constant blocks    exact, but for rounding (an end of the book); negative ones in
                       dynamic8 0.7 % short, whose book ends at -0.993
    zeros elsewhere    exact; in dynamic8 2e-5 of the block's largest value; in q4_1
                       up to half a step off, since nothing makes zero a code of it
    infinity           its block is lost: in nf4 and fp4 it comes back, positive, and
                       the rest is NaN; in other formats what comes back is not defined,
                       in quantile* of the whole matrix, whose book it spoils
    subnormal numbers  zero, as XLA flushes them; and so are the blocks of linear
                       formats whose step is one (int8: up to 1.5e-36)
    beyond float16     GGUF's scales are infinite (q4_0 from 5e5, q4_1 from 65,520, q8_0
                       from 8e6) or zero; `jpeft.quant.quantize` raises for the first
    the largest        finite; in linear formats with a zero point up to a step off,
    numbers            where half a step would lead beyond float32
    NaN                its block is NaN, in quantile* the whole matrix;
                       `jpeft.quant.quantize` raises outside jit
    last, partial ones bitsandbytes divides by their scale, here they are multiplied by
                       its reciprocal as all others: codes at a tie may differ

Double quantisation subtracts the mean of all scales: there an infinity or NaN makes the
whole matrix NaN.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jpeft.formats import codebooks, packing
from jpeft.formats.packing import GROUP, split_axis

CHANNEL, TENSOR = "channel", "tensor"
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
# The least normal float32.
TINY = float(np.finfo(np.float32).tiny)
# Data that quantile code books are learned from, at most.
_SAMPLE = 1 << 20


@dataclasses.dataclass(frozen=True)
class Format:
    """A number format.

    bits: of a code.
    encode: the codes of values in [-1, 1], which are divided by their block's largest.
    encode_blocks: instead, (blocks, where they are) -> (codes, scales, zeros or None).
    book: what each code stands for, in parts of the scale; from a call, since a table
        of 256 is made when it is needed.
    parts: instead, into how many steps from one code to the next the scale is cut.
    learned: the code book comes from the data.  zero_point: blocks have one each.
    of_gguf: blocks of 32, scales in float16.  least: blocks have the value of code 0
    in place of a zero point.  signed: codes are int8.
    largest: beyond it a scale is infinite.
    """

    name: str
    bits: int
    encode: Callable[[jax.Array], jax.Array] | None = None
    encode_blocks: Callable[[jax.Array, _View], tuple[Any, Any, Any]] | None = None
    book: Callable[[], np.ndarray] | None = None
    parts: int | None = None
    learned: bool = False
    zero_point: bool = False
    of_gguf: bool = False
    least: bool = False
    signed: bool = False
    largest: float = float(np.finfo(np.float32).max)

    @property
    def packed(self) -> bool:
        return self.bits == 4

    @property
    def per_byte(self) -> int:
        """How many codes are stored in a byte."""
        return 2 if self.packed else 1

    @property
    def has_book(self) -> bool:
        """A table of sixteen values says all: the 4-bit kernels apply."""
        return self.packed and not self.zero_point and not self.least

    @property
    def scale_dtype(self) -> Any:
        return np.dtype(np.float16 if self.of_gguf else np.float32)


# What block_size=None means, in GGUF's formats and in others.
GGUF_BLOCK, BLOCK_SIZE = 32, 64


class Blocks(NamedTuple):
    """A quantised array.

    codes: uint8, or int8 for signed ones; 4-bit codes packed along the axis, see
        `packing`.
    scales: float32 (float16 in GGUF's formats), one a block along the axis; 1 where one
        scale serves.
    zeros: uint8 like the scales, for formats with a zero point; for "q4_1" float16, the
        values of code 0.
    book: float32 (*stack, 2^bits), for learned formats.
    """

    codes: Array
    scales: Any
    zeros: Array | None = None
    book: Array | None = None


def quantize(
    x: Float[Array, "..."],
    format: Format,
    block_size: int | str,
    axis: int,
    stack: int = 0,
    book: Float[Array, "..."] | None = None,
) -> Blocks:
    """x quantised along `axis`; the first `stack` axes count matrices.

    book: of a learned format, one to use again; its ends move out where the data needs
    it.  None: it is learned.
    """
    x, size = x.astype(jnp.float32), x.shape[axis]
    if format.packed:
        x = _fill(x, packing.padded(size), axis)
    view = _View(x.shape, block_size, axis, stack)
    blocks = view.split(x)
    if format.encode_blocks is not None:
        codes, scales, zeros = format.encode_blocks(blocks, view)
    else:
        scales = view.reduce(jnp.max, jnp.abs(blocks))
        unit = scaled(blocks, scales)
        if format.learned:  # from the data, not from what fills it up
            data = jax.lax.slice_in_dim(view.join(unit), 0, size, axis=axis)
            if book is None:
                book = _learn(data, format, stack)
            else:
                book = _widened(book, data, stack)
        codes, zeros = _encode(unit, format, book, stack), None
    codes = view.join(codes)
    if format.packed:
        codes = packing.pack(codes, axis)
    # Blocks of nothing but padding have no scale.
    count = -(-size // view.size)
    trim = lambda s: jax.lax.slice_in_dim(jnp.squeeze(s, axis + 1), 0, count, axis=axis)
    return Blocks(codes, trim(scales), None if zeros is None else trim(zeros), book)


def scaled(x: Float[Array, "..."], absmax: Float[Array, "..."]) -> Array:
    """x / absmax in [-1, 1], by the reciprocal: bitsandbytes' rounding.

    Powers of two keep the reciprocal a normal number, since XLA flushes others to zero.
    """
    big = absmax > 2.0**100
    down = jnp.where(big, np.float32(2.0**-64), np.float32(1.0))
    inverse = 1.0 / jnp.maximum(absmax * down, TINY)
    return jnp.clip(x * down * inverse, -1.0, 1.0)


def filled(q: Blocks, format: Format, block_size: int | str, axis: int) -> Blocks:
    """The same with a scale for every block of stored codes, those of padding too."""
    if not format.packed or not isinstance(block_size, int):
        return q
    count = -(-2 * q.codes.shape[axis] // block_size)
    fill = lambda s: None if s is None else _fill(s, max(count, s.shape[axis]), axis)
    return q._replace(scales=fill(q.scales), zeros=fill(q.zeros))


def _fill(x: jax.Array, size: int, axis: int) -> jax.Array:
    if x.shape[axis] == size:
        return x
    pads = [(0, 0)] * x.ndim
    pads[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, pads)


def dequantize(
    q: Blocks,
    format: Format,
    block_size: int | str,
    axis: int,
    size: int,
    stack: int = 0,
    dtype: Any = jnp.float32,
) -> Float[Array, "..."]:
    """The values; `size` of them along `axis`.  The scales must not be nested."""
    q = filled(q, format, block_size, axis)
    if format.packed:
        packed = packing.groups(q.codes, axis)
        at = lambda s: _of_groups(s, packed.shape[axis], block_size, axis)
        halves = [
            decode(code, scale, format, zero, q.book, stack, first)
            for (code, first), scale, zero in zip(
                packing.nibbles(packed, whole=format.zero_point or format.least),
                _halves(at(q.scales), axis + 1),
                _halves(at(q.zeros), axis + 1),
                strict=True,
            )
        ]
        values = jnp.concatenate(halves, axis + 1)
        values = values.reshape(*q.codes.shape[:axis], -1, *q.codes.shape[axis + 1 :])
    else:
        view = _View(q.codes.shape, block_size, axis, stack)
        scales = jnp.expand_dims(q.scales, axis + 1)
        zeros = None if q.zeros is None else jnp.expand_dims(q.zeros, axis + 1)
        values = decode(view.split(q.codes), scales, format, zeros, q.book, stack)
        values = view.join(values)
    return jax.lax.slice_in_dim(values, 0, size, axis=axis).astype(dtype)


# What cuts some of an axis, what decodes the part, the unit of both (`kernels.tiled`).
Parts = tuple[Callable[[Any, int], Blocks], Callable[[Blocks, int], jax.Array], int]


def along(
    q: Blocks, format: Format, block_size: int | str, axis: int, dtype: Any
) -> Parts:
    """Parts of a quantised matrix along its blocks, in groups of 64.  q: `filled`."""
    per_byte, shared = format.per_byte, q.scales.shape[axis] == 1
    size = block_size
    if isinstance(block_size, int) and block_size > GROUP and not shared:
        size = GROUP  # every group of 64 gets its scale

    def of_blocks(s: jax.Array | None, start: Any, count: int) -> jax.Array | None:
        if s is None or shared or not isinstance(block_size, int):
            return s
        if block_size > GROUP:
            groups = jnp.arange(-(-count // GROUP), dtype=jnp.int32)
            place = start // GROUP + groups
            place = place // (block_size // GROUP)
            return jnp.take(s, place, axis=axis, mode="clip")
        first, some = start // block_size, -(-count // block_size)
        return jax.lax.dynamic_slice_in_dim(s, first, some, axis)

    def cut(start: Any, count: int) -> Blocks:
        codes = jax.lax.dynamic_slice_in_dim(
            q.codes, start // per_byte, count // per_byte, axis
        )
        scales, zeros = (of_blocks(s, start, count) for s in (q.scales, q.zeros))
        return Blocks(codes, scales, zeros, q.book)

    def decode(part: Blocks, count: int) -> jax.Array:
        return dequantize(part, format, size, axis, count, dtype=dtype)

    return cut, decode, GROUP


def across(
    q: Blocks, format: Format, block_size: int | str, axis: int, size: int, dtype: Any
) -> Parts:
    """Parts of a quantised matrix beside its blocks, which stay whole.  q: `filled`."""
    other = 1 - axis

    def of_other(s: jax.Array | None, start: Any, count: int) -> jax.Array | None:
        if s is None or s.shape[other] == 1 < q.codes.shape[other]:
            return s
        return jax.lax.dynamic_slice_in_dim(s, start, count, other)

    def cut(start: Any, count: int) -> Blocks:
        part = (of_other(x, start, count) for x in q[:3])
        return Blocks(*part, q.book)  # type: ignore[arg-type]

    def decode(part: Blocks, count: int) -> jax.Array:
        return dequantize(part, format, block_size, axis, size, dtype=dtype)

    return cut, decode, 1


def decode(
    codes: Array,
    scales: Float[Array, "..."],
    format: Format,
    zeros: Array | None = None,
    book: Array | None = None,
    stack: int = 0,
    first: int = 0,
) -> Float[Array, "..."]:
    """Values of codes, in float32; scales and zeros broadcast to the codes.

    first: the lowest of a 4-bit code's bits in its byte.
    """
    scales = scales.astype(jnp.float32)
    if format.least:
        # A code of 4 bits times a scale of 11 is exact in float32, so that only the sum
        # is rounded, fused or not.
        assert zeros is not None
        return codes.astype(jnp.float32) * scales + zeros.astype(jnp.float32)
    if zeros is not None:
        code, zero = codes.astype(jnp.int32), zeros.astype(jnp.int32)
        return (code - zero).astype(jnp.float32) * scales
    if format.parts is not None:  # of q8_0 1: 8 bits by 11 are exact as well
        return codes.astype(jnp.float32) * (scales * np.float32(1 / format.parts))
    if book is None:
        book = jnp.asarray(book_of(format))
    if format.packed:
        ones = (1,) * (codes.ndim - stack)
        entry = lambda k: book[..., k].reshape(*book.shape[:-1], *ones)
        values = [entry(k) if format.learned else book[k] for k in range(16)]
        return codebooks.look_up(codes, values, first) * scales
    take = lambda b, c: jnp.take(b, c.astype(jnp.int32), mode="clip")
    if not format.learned:
        return take(book, codes) * scales
    for _ in range(stack):
        take = jax.vmap(take)
    return take(book, codes) * scales


def book_of(format: Format) -> np.ndarray:
    """The fixed code book of a format that has one, float32."""
    assert format.book is not None, format.name
    return format.book()


# --- encoding ------------------------------------------------------------------------


def _encode(unit: jax.Array, format: Format, book: Any, stack: int) -> jax.Array:
    if format.encode is not None:
        return format.encode(unit)

    def of_matrix(x: jax.Array, b: jax.Array) -> jax.Array:
        return codebooks.place(x, (b[1:] + b[:-1]) * 0.5)

    for _ in range(stack):
        of_matrix = jax.vmap(of_matrix)
    return of_matrix(unit, book)


def _linear_with_zero(
    blocks: jax.Array, bits: int, view: _View
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(codes, step, zero point): the range [min, max], widened to hold zero, in 2^bits
    equal steps, so that zero comes back as zero."""
    top = float(2**bits - 1)
    low = jnp.minimum(view.reduce(jnp.min, blocks), 0.0)
    high = jnp.maximum(view.reduce(jnp.max, blocks), 0.0)
    # Of the largest numbers half is taken, that their distance be finite.
    big = (high > 2.0**126) | (low < -(2.0**126))
    down = jnp.where(big, np.float32(0.5), np.float32(1.0))
    up = jnp.where(big, np.float32(2.0), np.float32(1.0))
    # Times the inverse: XLA divides by a constant so in some programs, not in others.
    # The maximum changes nothing but that it cannot be fused with what is subtracted
    # from the step when that is quantised in turn: the last bit would depend on it.
    step = jnp.maximum((high * down - low * down) * np.float32(1.0 / top) * up, 0.0)
    inverse = jnp.where(step > 0, 1.0 / jnp.where(step > 0, step, 1.0), 0.0)
    zero = jnp.clip(jnp.round(-low * inverse), 0.0, top)
    # Zero is a code, so an end may lie half a step beyond the data: not beyond float32,
    # with room for a step that is quantised in turn.
    most = np.float32(0.97) * np.finfo(np.float32).max / jnp.maximum(zero, top - zero)
    beyond = big & (step > most) & (step < jnp.inf)
    step = jnp.where(beyond, most, step)
    inverse = jnp.where(beyond, 1.0 / step, inverse)
    codes = jnp.clip(jnp.round(blocks * inverse) + zero, 0.0, top)
    as_u8 = lambda x: x.astype(jnp.int32).astype(jnp.uint8)
    return as_u8(codes), step, as_u8(zero)


def _q4_0(blocks: jax.Array, view: _View) -> tuple[jax.Array, jax.Array, None]:
    """The largest of a block by magnitude, of two such the first, has code 0: -8."""
    inside = view.axis + 1
    places = jax.lax.broadcasted_iota(jnp.int32, blocks.shape, inside)
    first = jnp.argmax(jnp.abs(blocks), inside, keepdims=True).astype(jnp.int32)
    # One of them is not -0.0, the others are zero: a sum without rounding.
    most = jnp.sum(jnp.where(places == first, blocks, 0.0), inside, keepdims=True)
    step = most * np.float32(-1 / 8)
    return _rounded(blocks * _inverse(step), 8.5), _half(step), None


def _q4_1(blocks: jax.Array, view: _View) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sixteen values from the least of a block to its largest."""
    least, most = view.reduce(jnp.min, blocks), view.reduce(jnp.max, blocks)
    step = _divided(most - least, 15.0)
    codes = _rounded((blocks - least) * _inverse(step), 0.5)
    return codes, _half(step), _half(least)


def _q8_0(blocks: jax.Array, view: _View) -> tuple[jax.Array, jax.Array, None]:
    """Rounded to the nearest code, halves away from zero."""
    step = _divided(view.reduce(jnp.max, jnp.abs(blocks)), 127.0)
    unit = blocks * _inverse(step)
    near = jnp.floor(jnp.abs(unit))
    near = near + jnp.floor(2.0 * (jnp.abs(unit) - near))
    return (jnp.sign(unit) * near).astype(jnp.int8), _half(step), None


def _divided(x: jax.Array, by: float) -> jax.Array:
    """x / by as IEEE has it, for x >= 0.  XLA multiplies by the inverse of a constant,
    behind a barrier too; it does not know that this maximum is one."""
    return x / jnp.maximum(np.float32(by), -x)


def _inverse(step: jax.Array) -> jax.Array:
    return jnp.where(step == 0, 0.0, 1.0 / jnp.where(step == 0, 1.0, step))


def _rounded(unit: jax.Array, up: float) -> jax.Array:
    """The code below unit + up.  The maximum changes nothing but that the product in
    `unit` cannot be fused with the sum, whose last bit would be another."""
    whole = jnp.trunc(jnp.maximum(unit, -32.0) + np.float32(up))
    return jnp.clip(whole, 0.0, 15.0).astype(jnp.int32).astype(jnp.uint8)


def _half(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float16)


def _learn(unit: jax.Array, format: Format, stack: int) -> jax.Array:
    """A code book from the data: NF4's construction, with the data's quantiles in place
    of the normal's.

    2^(bits-1) probabilities from 1/2 up to p, as many less one from 1 - p up to 1/2,
    and zero, with p = 1 - (1 / (2 n) + 1 / (2 n - 2)) / 2, n = 2^bits.  Dettmers et al.
    2023, arXiv:2305.14314, section 3 and appendix E.  The ends are then the data's own,
    so that zeros and the largest of a block are exact.  Of more than a million values
    every k-th is looked at.
    """
    n = 2**format.bits
    end = 1.0 - (1 / (2 * n) + 1 / (2 * n - 2)) / 2
    upper = np.linspace(0.5, end, n // 2 + 1)[1:]
    lower = np.linspace(1.0 - end, 0.5, n // 2)[:-1]
    at = jnp.asarray(np.concatenate([lower, [0.5], upper]), jnp.float32)

    def of_matrix(x: jax.Array) -> jax.Array:
        flat = x.reshape(-1)
        flat = flat[:: max(1, flat.shape[0] // _SAMPLE)]
        book = jnp.quantile(flat, at)
        book = book * (1.0 / jnp.maximum(jnp.max(jnp.abs(book)), TINY))
        # The ends are the data's, so that zero, which is exact, lies between.
        book = book.at[1 + jnp.argmin(jnp.abs(book[1:-1]))].set(0.0)
        return jnp.sort(book.at[0].set(jnp.min(x)).at[n - 1].set(jnp.max(x)))

    for _ in range(stack):
        of_matrix = jax.vmap(of_matrix)
    return of_matrix(unit)


def _widened(book: jax.Array, unit: jax.Array, stack: int) -> jax.Array:
    """A learned book whose ends hold all of the data."""
    axes = tuple(range(stack, unit.ndim))
    low = jnp.minimum(book[..., 0], jnp.min(unit, axes))
    high = jnp.maximum(book[..., -1], jnp.max(unit, axes))
    return book.at[..., 0].set(low).at[..., -1].set(high)


# --- where the blocks are ------------------------------------------------------------


class _View:
    """An array with its axis of blocks split in two: (..., blocks, in a block, ...)."""

    def __init__(
        self, shape: tuple[int, ...], block_size: int | str, axis: int, stack: int
    ):
        self.axis, self.n = axis, shape[axis]
        self.size = self.n if not isinstance(block_size, int) else block_size
        self.size = min(self.size, self.n)
        self.count = -(-self.n // self.size)
        self.shared = (axis + 1,)
        if block_size == TENSOR:
            self.shared = tuple(range(stack, len(shape) + 1))

    def split(self, x: jax.Array) -> jax.Array:
        x = _fill(x, self.count * self.size, self.axis)
        return split_axis(x, self.axis, self.count, self.size)

    def join(self, x: jax.Array) -> jax.Array:
        x = x.reshape(*x.shape[: self.axis], -1, *x.shape[self.axis + 2 :])
        return jax.lax.slice_in_dim(x, 0, self.n, axis=self.axis)

    def reduce(self, f: Any, x: jax.Array) -> jax.Array:
        """jnp.max or jnp.min of blocks.  Halved a few times first: on a CPU XLA takes
        elementwise maxima several times faster than it reduces a middle axis."""
        pair = jnp.maximum if f is jnp.max else jnp.minimum
        inside = self.axis + 1
        for _ in range(3):
            if x.shape[inside] % 2 == 0:
                x = pair(*jnp.split(x, 2, axis=inside))
        return f(x, self.shared, keepdims=True)


def _halves(s: jax.Array | None, axis: int) -> list[Any]:
    """What belongs to the low and to the high nibbles of a group."""
    if s is None or s.shape[axis] == 1:
        return [s, s]
    half = s.shape[axis] // 2
    cut = lambda a, b: jax.lax.slice_in_dim(s, a, b, axis=axis)
    return [cut(0, half), cut(half, 2 * half)]


def _of_groups(s: Any, groups: int, block_size: int | str, axis: int) -> Any:
    """Scales so that they broadcast to unpacked codes (..., groups, 64, ...)."""
    if s is None:
        return None
    if not isinstance(block_size, int) or s.shape[axis] == 1:
        return jnp.expand_dims(s, axis + 1)
    if block_size < GROUP:
        s = jnp.expand_dims(s, axis + 1)  # the two blocks of 32 in a group
        return s.reshape(*s.shape[:axis], groups, 2, *s.shape[axis + 2 :])
    s = jnp.repeat(s, block_size // GROUP, axis)
    s = jax.lax.slice_in_dim(s, 0, groups, axis=axis)
    return jnp.expand_dims(s, axis + 1)


# --- the formats ---------------------------------------------------------------------

# What float16 rounds to infinity.
_INFINITE = 65520.0


def _with_book(name: str) -> Format:
    book = lambda: codebooks.fixed(name).values
    return Format(name, 4, encode=lambda x: codebooks.encode(x, name), book=book)


def _with_zero(name: str, bits: int) -> Format:
    encode = lambda blocks, view: _linear_with_zero(blocks, bits, view)
    return Format(name, bits, encode_blocks=encode, zero_point=True)


def _gguf(name: str, bits: int, encode: Any, *, steps: float, **more: Any) -> Format:
    """steps: the largest value in steps of the scale."""
    largest = steps * _INFINITE
    return Format(
        name, bits, encode_blocks=encode, of_gguf=True, largest=largest, **more
    )


FORMATS = {
    f.name: f
    for f in (
        *map(_with_book, codebooks.BOOKS),
        _with_zero("int4_asymmetric", 4),
        Format("quantile4", 4, learned=True),
        Format(
            "int8",
            8,
            encode=lambda x: jnp.round(x * 127.0).astype(jnp.int8),
            parts=127,
            signed=True,
        ),
        _with_zero("int8_asymmetric", 8),
        Format(
            "dynamic8", 8, encode=codebooks.encode_dynamic, book=codebooks.dynamic_map
        ),
        Format("quantile8", 8, learned=True),
        _gguf("q4_0", 4, _q4_0, steps=8, book=lambda: codebooks.Q4_0),
        _gguf("q4_1", 4, _q4_1, steps=1, least=True),
        _gguf("q8_0", 8, _q8_0, steps=127, parts=1, signed=True),
    )
}
