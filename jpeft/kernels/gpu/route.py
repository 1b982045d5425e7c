"""4-bit matrices on NVIDIA GPUs: which kernel does which of the four operations.

With many tokens a product is bound by the tensor cores, and XLA's own is as fast as
they are: W is dequantised by a kernel and handed to it, for 11 % more time at 2048
tokens and 3 % at 8192.  With few it is bound by reading W: one kernel reads the codes
and multiplies.

Pallas has two dialects for NVIDIA GPUs, and which one a program gets is settled when it
is traced:

    Mosaic GPU   Hopper and later; few tokens are `few_rows.MOST`, in bfloat16 and with
                 blocks of 64 or more
    Triton       Ampere and Ada, and for few tokens (`FEW`) in float16 or with blocks of
                 32, as long as Pallas has it (deprecated since jax 0.11)
    neither      plain JAX, fused by XLA as it sees fit

That depends on the GPU's compute capability, from the first of these that answers:

    `gpu_capability`   set by hand, for compiling ahead of time
    JAX                the first CUDA device of this process
    otherwise          unknown: Triton where it compiles for any GPU (jax 0.10), else
                       neither
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt8

from jpeft import compat
from jpeft.formats.packing import GROUP
from jpeft.kernels import plain, targets

# Either dialect may be missing from a version of Pallas.
try:
    import jax.experimental.pallas.mosaic_gpu
except ImportError:
    few_rows = mosaic = None
else:
    from jpeft.kernels.gpu import few_rows, mosaic
try:
    import jax.experimental.pallas.triton
except ImportError:
    triton = None
else:
    from jpeft.kernels.gpu import triton

Route = Literal["mosaic", "triton", "plain"]
# Tokens up to which a product is one kernel of Triton's: on an H200 that is faster than
# decoding first for 16, and slower for 64.
FEW = 32
_HOPPER, _AMPERE = (9, 0), (8, 0)
_WRITTEN = (jnp.bfloat16, jnp.float16, jnp.float32)


def gpu_capability(major: int, minor: int) -> contextlib.AbstractContextManager[None]:
    """The GPU that programs traced inside are for; (9, 0) is H100 and H200.

    >>> with gpu_capability(9, 0):
    ...     route()
    'mosaic'
    """
    return targets.capability((major, minor))


def route() -> Route:
    """The dialect of `quantize` and `dequantize`."""
    capability = targets.capability.value or _present()
    if capability is None:
        return "triton" if _triton_compiles() else "plain"
    if capability >= _HOPPER and mosaic is not None:
        return "mosaic"
    if capability >= _AMPERE and _triton_compiles():
        return "triton"
    return "plain"


def _triton_compiles() -> bool:
    """Since jax 0.11 it asks JAX which GPU is there, and fails if there is none."""
    if triton is None:
        return False
    return not compat.triton_asks_for_a_gpu() or _present() is not None


@functools.cache
def _present() -> tuple[int, int] | None:
    try:
        device = jax.devices("cuda")[0]
    except RuntimeError:
        return None  # traced here, compiled for somewhere else or not at all
    major, minor = str(device.compute_capability).split(".")
    return int(major), int(minor)


# --- the operations ------------------------------------------------------------------


def quantize(
    w: Float[Array, "k n"], *, format: str, block_size: int
) -> tuple[UInt8[Array, "half n"], Float[Array, "blocks n"]]:
    how = route()
    if how == "plain":
        return plain.quantize(w, format=format, block_size=block_size)
    w = w if w.dtype in _WRITTEN else w.astype(jnp.float32)
    run = _backend(how).quantize
    codes, scales = run(w, format=format, block_size=block_size)
    return _varying_as(codes, w), _varying_as(scales, w)


def dequantize(
    codes: UInt8[Array, "half n"],
    scales: Float[Array, "blocks n"],
    book: Float[Array, " 16"],
    *,
    block_size: int,
    dtype: Any,
) -> Float[Array, "k n"]:
    how = route()
    if how == "plain":
        return plain.dequantize(codes, scales, book, block_size=block_size, dtype=dtype)
    written = dtype if jnp.dtype(dtype) in _WRITTEN else jnp.float32
    run = _backend(how).dequantize
    out = run(codes, scales, book, block_size=block_size, dtype=written)
    return _varying_as(out, codes, scales, book).astype(dtype)


def matmul(
    x: Float[Array, "m k"],
    codes: UInt8[Array, "half n"],
    scales: Float[Array, "blocks n"],
    book: Float[Array, " 16"],
    *,
    block_size: int,
    dtype: Any,
) -> Float[Array, "m n"]:
    return _product("matmul", x, codes, scales, book, block_size, jnp.dtype(dtype))


def matmul_transposed(
    g: Float[Array, "m n"],
    codes: UInt8[Array, "half n"],
    scales: Float[Array, "blocks n"],
    book: Float[Array, " 16"],
    *,
    block_size: int,
    dtype: Any,
) -> Float[Array, "m k"]:
    return _product(
        "matmul_transposed", g, codes, scales, book, block_size, jnp.dtype(dtype)
    )


def _product(
    name: Literal["matmul", "matmul_transposed"],
    x: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    book: jax.Array,
    block_size: int,
    dtype: Any,
) -> jax.Array:
    how = route()
    if how == "plain":
        run = getattr(plain, name)
        return run(x, codes, scales, book, block_size=block_size, dtype=dtype)
    backend = _few(how, x, block_size, dtype)
    if backend is not None:
        run = getattr(backend, name)
        out = run(x, codes, scales, book, block_size=block_size, dtype=dtype)
        return _varying_as(out, x, codes, scales, book)
    # Tied to x, W cannot be made before x is there: XLA would otherwise find that the
    # backward pass needs the W of the forward pass, and keep it in between, or take it
    # out of a loop over microbatches.
    codes, x = lax.optimization_barrier((codes, x))
    w = dequantize(codes, scales, book, block_size=block_size, dtype=x.dtype)
    numbers = (((1,), (0 if name == "matmul" else 1,)), ((), ()))
    # With a 16-bit result the tensor cores' sums are float32 all the same.
    wide = dtype if dtype == x.dtype else jnp.float32
    return lax.dot_general(x, w, numbers, preferred_element_type=wide).astype(dtype)


def _few(how: Route, x: jax.Array, block_size: int, dtype: Any) -> Any:
    """Who has one kernel for the product, if anybody has."""
    if dtype not in _WRITTEN:
        return None
    ours = how == "mosaic" and x.dtype == jnp.bfloat16 and block_size >= GROUP
    if few_rows is not None and ours and x.shape[0] <= few_rows.MOST:
        return few_rows
    half = x.dtype in (jnp.bfloat16, jnp.float16)
    return triton if half and x.shape[0] <= FEW and _triton_compiles() else None


def _backend(how: Route) -> Any:
    return {"mosaic": mosaic, "triton": triton}[how]


def _varying_as(out: jax.Array, *operands: jax.Array) -> jax.Array:
    """Under shard_map: varying over the axes that the operands vary over.  A Mosaic GPU
    kernel does not say that of its results."""
    has = compat.varying_axes(out)
    axes = sorted({a for x in operands for a in compat.varying_axes(x)} - {*has})
    return lax.pcast(out, tuple(axes), to="varying") if axes else out
