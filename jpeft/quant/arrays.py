"""Single arrays: quantise, dequantise, look at a code book."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft import compat
from jpeft.checks import check_flag, check_float, check_whole, plain, shown
from jpeft.formats import blocks
from jpeft.formats.blocks import (
    BLOCK_SIZE,
    BLOCK_SIZES,
    CHANNEL,
    FORMATS,
    GGUF_BLOCK,
    TENSOR,
)
from jpeft.leaf import is_leaf, unboxed
from jpeft.quant.leaf import Layout, Quantized, as_it_is, quantize_array
from jpeft.tree.paths import suggest


def quantize(
    x: jax.Array,
    format: str = "nf4",
    *,
    block_size: int | str | None = None,
    double: bool = True,
    axis: int | Sequence[int] | None = None,
    compute_dtype: Any = None,
) -> Quantized:
    """x in few bits.

    format, block_size, double: see `jpeft.quantize`.
    axis: blocks run along these axes.  None: through the array in its memory order, as
        bitsandbytes cuts any tensor.  For a kernel (in, out) that is a torch weight
        (out, in), axis=0 makes the same blocks.  With block_size="channel" None means
        all axes but the last: a scale for each output of a kernel.
    compute_dtype: of products, if the result is put into a parameter tree.

    A block of zeros comes back as zeros, and so does zero anywhere (in "dynamic8" as
    2e-5 of the block's largest value, in "q4_1" as up to half a step).  An infinity
    spoils its block, see `jpeft.formats.blocks`.  Raises ValueError for NaN, and for
    what scales in float16 do not reach, outside jit; inside, its block becomes NaN.
    With double=True both spoil the whole matrix, whose scales have one mean, as in
    bitsandbytes.  Raises TypeError for what is not a real floating-point array.

    >>> import jax.numpy as jnp, jpeft
    >>> q = jpeft.quant.quantize(jnp.linspace(-1.0, 1.0, 128), "nf4", double=False)
    >>> q.codes.shape, q.scales.shape, float(jpeft.quant.dequantize(q)[-1])
    ((64,), (2,), 1.0)
    """
    check_format("quant.quantize", "format", format)
    block_size = block_of("quant.quantize", format, block_size)
    double = check_flag("quant.quantize", "double", double)
    check_float("quant.quantize", compute_dtype, "compute_dtype")
    if is_leaf(x):
        raise ValueError(
            f"quant.quantize: {x!r} is an adapted leaf already; quantise the array it "
            "stands for, jpeft.merge(params) makes it"
        )
    x = compat.on_device(jnp.asarray(x))
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"quant.quantize: expected a real floating-point array, got {x.dtype}"
        )
    if x.size == 0:
        raise ValueError(f"quant.quantize: the array of shape {x.shape} is empty")
    if _holds_nan(x):
        raise ValueError(
            f"quant.quantize: the array of shape {x.shape} holds NaN, which no code "
            "stands for; check how it was made"
        )
    check_in_format(f"quant.quantize: the array of shape {x.shape}", x, format)
    return quantize_array(
        x,
        _layout(x, axis, block_size),
        format=format,
        block_size=block_size,
        double_scales=double,
        compute_dtype=None if compute_dtype is None else jnp.dtype(compute_dtype).name,
    )


def check_in_format(at: str, x: jax.Array, format: str) -> None:
    """Raises for finite numbers beyond float32, which all is computed in, or beyond
    what scales in float16 reach (skipped for what JAX traces)."""
    kind = FORMATS[format]
    may_not = x.dtype == jnp.float64 or kind.of_gguf
    if not may_not or isinstance(x, compat.Tracer):
        return
    with jax.ensure_compile_time_eval():
        largest = float(jnp.max(jnp.abs(x)))
    if float(np.finfo(np.float32).max) < largest < np.inf:
        raise ValueError(
            f"{at} holds {largest:.3g}, which float32 cannot hold, and quantising "
            "computes in float32; scale the weight"
        )
    if kind.of_gguf and kind.largest <= largest < np.inf:
        raise ValueError(
            f"{at} holds {largest:.3g}, and the scales of {format}, in float16, reach "
            f"{kind.largest:.3g}; scale the weight, or take a format whose scales are "
            "float32"
        )


def _holds_nan(x: jax.Array) -> bool:
    if isinstance(x, compat.Tracer):
        return False
    with jax.ensure_compile_time_eval():
        return bool(jnp.any(jnp.isnan(x)))


def _layout(
    x: jax.Array, axis: int | Sequence[int] | None, block_size: int | str
) -> Layout:
    if axis is None:
        if block_size != CHANNEL or x.ndim < 2:
            return as_it_is(x.ndim)
        axis = tuple(range(x.ndim - 1))  # as a kernel's inputs: a scale an output
    axis = plain(axis)
    given = axis if isinstance(axis, (list, tuple)) else (axis,)
    axes = tuple(check_whole("quant.quantize", "axis", k) for k in given)
    if not all(-x.ndim <= k < x.ndim for k in axes):
        raise ValueError(f"quant.quantize: axis={axis!r} for an array of {x.ndim} axes")
    blocked = tuple(k % x.ndim for k in axes)
    if len(set(blocked)) < len(blocked):
        raise ValueError(f"quant.quantize: axis={axis!r} names one axis twice")
    rest = tuple(k for k in range(x.ndim) if k not in blocked)
    if blocked == tuple(range(x.ndim - len(blocked), x.ndim)):
        return Layout((*rest, *blocked), 0, len(rest), len(blocked))  # whole rows
    return Layout((*blocked, *rest), 0, 0, len(blocked))


def dequantize(q: Quantized, dtype: Any = None) -> jax.Array:
    """The values: a product in float32, rounded once to `dtype` (default: that of the
    array that was quantised).  q: as `quantize` returns it, or a leaf of a tree.

    >>> import jax.numpy as jnp, jpeft
    >>> q = jpeft.quant.quantize(jnp.linspace(-1.0, 1.0, 128), "nf4", double=False)
    >>> jpeft.quant.dequantize(q).shape, jpeft.quant.dequantize(q, "bfloat16").dtype
    ((128,), dtype(bfloat16))
    """
    if not isinstance(q, Quantized):
        raise TypeError(
            "quant.dequantize: expected what quant.quantize returns, got "
            f"{type(q).__name__}; of an adapted tree jpeft.merge(params) makes arrays"
        )
    check_float("quant.dequantize", dtype)
    return unboxed(q).materialize(dtype)


def codebook(name: str) -> np.ndarray:
    """The values of a format's codes, as parts of a block's scale; float32 (2^bits,).

    Learned formats keep theirs with each array (`.book`); those with a zero point have
    one for each block.

    >>> import jpeft
    >>> book = jpeft.quant.codebook("nf4")
    >>> len(book), [round(float(x), 3) for x in book[:3]]
    (16, [-1.0, -0.696, -0.525])
    """
    check_format("quant.codebook", "format", name)
    kind = FORMATS[name]
    if kind.learned or kind.zero_point or kind.least:
        raise ValueError(
            f"quant.codebook: {name!r} has no fixed code book: "
            + ("it is learned, see q.book" if kind.learned else "blocks have a range")
        )
    if kind.parts is not None:  # by code + 128
        return (np.arange(-128, 128) / np.float32(kind.parts)).astype(np.float32)
    return blocks.book_of(kind).copy()


# --- checks --------------------------------------------------------------------------


def check_format(method: str, name: str, format: Any) -> str:
    if not isinstance(format, str) or format not in FORMATS:
        near = suggest(list(FORMATS), shown(format), 1)[0]
        raise ValueError(
            f"{method}: {name}={shown(format)}: did you mean {near!r}? Known: "
            f"{', '.join(FORMATS)}"
        )
    return str(format)


def block_of(method: str, format: str, block_size: Any) -> int | str:
    """The block size, for None the format's own; raises ValueError where the two do not
    fit."""
    of_gguf = FORMATS[check_format(method, "format", format)].of_gguf
    if block_size is None:
        return GGUF_BLOCK if of_gguf else BLOCK_SIZE
    size = check_block_size(method, "block_size", block_size)
    if of_gguf and size != GGUF_BLOCK:
        raise ValueError(
            f"{method}: block_size={size!r} does not fit format={format!r}: blocks of "
            f"GGUF's formats have {GGUF_BLOCK} elements; leave block_size out"
        )
    return size


def check_block_size(method: str, name: str, block_size: Any) -> int | str:
    """As a Python number or a word; raises ValueError for what is no block size."""
    size = plain(block_size)
    if isinstance(size, str) and size in (CHANNEL, TENSOR):
        return str(size)
    whole = isinstance(size, int) and not isinstance(size, bool)
    if not whole or size not in BLOCK_SIZES:
        raise ValueError(
            f"{method}: {name}={shown(size)} does not fit: expected one of "
            f"{', '.join(map(str, BLOCK_SIZES))}, {CHANNEL!r} or {TENSOR!r}"
        )
    return size
