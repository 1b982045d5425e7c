"""4-bit matrices: quantise, dequantise, x @ W and its transpose, on any platform.

    W[k, n] = book[code[k, n]] * scale[k // block, n]

    codes   uint8 (K / 2, N), planar in groups of 64 rows; see `jpeft.formats.packing`
    scales  float32 (ceil(K / block), N)
    book    float32 (16,), the values of the codes: nf4, fp4, int4 or a learned one; of
            a stack (*stack, 16) too

A *block* is what shares a scale; a *tile* is what one step of a kernel works on.  The
platform is chosen here (and, of arrays on a mesh, in `jpeft.sharding.plan`) when a
program is compiled (`jax.lax.platform_dependent`): Pallas for TPU and NVIDIA GPUs,
plain JAX for the rest.  `plain` is the meaning of all of them, for numbers below
2^126, and what `jax.export` gets where a size is a symbol: a kernel's tiles are chosen
by numbers.

Products differentiate with respect to x, and what they keep for that is the
codes and scales.  The gradient of scales and book is zero: they are constants.
Arrays that do not fit each other raise ValueError, with what was expected.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt8

from jpeft import compat
from jpeft.formats.blocks import BLOCK_SIZES
from jpeft.formats.codebooks import CODEBOOKS
from jpeft.formats.packing import GROUP
from jpeft.kernels import plain, targets
from jpeft.sharding import plan
from jpeft.sharding.plan import OWN, Dim


def quantize(
    w: Float[Array, "*stack k n"], *, format: str = "nf4", block_size: int = 64
) -> tuple[UInt8[Array, "*stack half n"], Float[Array, "*stack blocks n"]]:
    """(codes, scales) of matrices, in blocks down their columns.

    format: "nf4", "fp4" or "int4".  Rows are stored in whole groups of 64, filled up
    with zeros.  Raises ValueError for what is no matrix of real numbers.
    """
    if format not in CODEBOOKS:
        raise ValueError(f"format={format!r}: expected one of {sorted(CODEBOOKS)}")
    _check_floating("w", w)
    if w.ndim > 2:
        return jax.vmap(
            functools.partial(quantize, format=format, block_size=block_size)
        )(w)
    if w.ndim == 2 and 0 not in w.shape and w.shape[0] % GROUP:
        w = jnp.pad(w, ((0, -w.shape[0] % GROUP), (0, 0)))
    _check(w.shape, block_size)
    return _quantize(w, format=format, block_size=block_size)


def dequantize(
    codes: UInt8[Array | np.ndarray, "*stack half n"],
    scales: Float[Array | np.ndarray, "*stack blocks n"],
    book: Float[Array | np.ndarray, "*#stack 16"],
    *,
    block_size: int = 64,
    dtype: Any = jnp.bfloat16,
    rows: int | None = None,
) -> Float[Array, "*stack k n"]:
    """W: the product in float32, rounded once to `dtype`.

    rows: K, where it is not all that is stored.
    """
    if codes.ndim > 2:
        one = functools.partial(
            dequantize, block_size=block_size, dtype=dtype, rows=rows
        )
        return jax.vmap(one, (0, 0, _of_book(book)))(codes, scales, book)
    _check((2 * codes.shape[0], codes.shape[1]), block_size, scales)
    w = _dequantize(
        codes, scales, jnp.asarray(book), block_size=block_size, dtype=jnp.dtype(dtype)
    )
    return w if rows is None else w[: _checked_rows(rows, codes)]


def matmul(
    x: Float[Array, "*batch k"],
    codes: UInt8[Array | np.ndarray, "*stack half n"],
    scales: Float[Array | np.ndarray, "*stack blocks n"],
    book: Float[Array | np.ndarray, "*#stack 16"],
    *,
    block_size: int = 64,
    dtype: Any = None,
) -> Float[Array, "*batch n"]:
    """x @ W, with W in x's dtype and sums in float32.

    On Hopper and later, for at most 64 rows of bfloat16, it is the book that is rounded
    to x's dtype instead (in `matmul_transposed` g times its scale as well).

    dtype: of the result; default x's.  Of a stack of matrices each takes its row of x,
    (*stack, ..., k).
    """
    if codes.ndim > 2:
        one = lambda *a: matmul(*a, block_size=block_size, dtype=dtype)
        return _over_stack(one, x, codes, scales, book)
    _check_floating("x", x)
    k, n = 2 * codes.shape[0], codes.shape[1]
    _check((k, n), block_size, scales)
    if x.ndim == 0 or not k - GROUP < x.shape[-1] <= k:
        raise ValueError(
            f"x has shape {x.shape}, expected (..., {k})"
            + (f", or from {k - GROUP + 1} on without the padding" if x.ndim else "")
        )
    dtype = jnp.dtype(x.dtype if dtype is None else dtype)
    batch = x.shape[:-1]
    if 0 in batch:
        return jnp.zeros((*batch, n), dtype)
    if x.shape[-1] < k:
        x = jnp.pad(x, [(0, 0)] * len(batch) + [(0, k - x.shape[-1])])
    return _product_of_rows(False, x, codes, scales, book, n, block_size, dtype)


def matmul_transposed(
    g: Float[Array, "*batch n"],
    codes: UInt8[Array | np.ndarray, "*stack half n"],
    scales: Float[Array | np.ndarray, "*stack blocks n"],
    book: Float[Array | np.ndarray, "*#stack 16"],
    *,
    block_size: int = 64,
    dtype: Any = None,
    rows: int | None = None,
) -> Float[Array, "*batch k"]:
    """g @ W.T, from the same codes.  Everything as in `matmul`.

    rows: K, where it is not all that is stored.
    """
    if codes.ndim > 2:
        one = lambda *a: matmul_transposed(
            *a, block_size=block_size, dtype=dtype, rows=rows
        )
        return _over_stack(one, g, codes, scales, book)
    _check_floating("g", g)
    k, n = 2 * codes.shape[0], codes.shape[1]
    _check((k, n), block_size, scales)
    if g.ndim == 0 or g.shape[-1] != n:
        raise ValueError(f"g has shape {g.shape}, expected (..., {n})")
    dtype = jnp.dtype(g.dtype if dtype is None else dtype)
    batch, kept = g.shape[:-1], k if rows is None else _checked_rows(rows, codes)
    if 0 in batch:
        return jnp.zeros((*batch, kept), dtype)
    y = _product_of_rows(True, g, codes, scales, book, k, block_size, dtype)
    return y if kept == k else y[..., :kept]


def _product_of_rows(
    transposed: bool,
    x: jax.Array,
    codes: Any,
    scales: Any,
    book: Any,
    out: int,
    block_size: int,
    dtype: Any,
) -> jax.Array:
    """The batch's axes as one."""
    batch = x.shape[:-1]
    if len(batch) != 1:
        x = x.reshape(-1, x.shape[-1])
    how = _How(block_size, transposed, jnp.dtype(x.dtype), dtype)
    # Before the gradient rule, so that it is JAX that adds up over shards.
    x, *_ = compat.varying_alike((x, codes, scales))
    y: Any = _product(how, (codes, scales, jnp.asarray(book)), x)
    return y if len(batch) == 1 else y.reshape(*batch, out)


def _over_stack(
    one: Callable[..., jax.Array],
    x: jax.Array,
    codes: Any,
    scales: Any,
    book: Any,
) -> jax.Array:
    if x.ndim < 2 or x.shape[0] != codes.shape[0]:
        raise ValueError(
            f"x has shape {x.shape} for a stack of {codes.shape[0]} matrices; expected "
            f"({codes.shape[0]}, ..., features)"
        )
    axes = (0, 0, 0, _of_book(book))
    return jax.vmap(one, axes)(x, codes, scales, book)


def _of_book(book: Any) -> int | None:
    """The axis of a book a matrix, if there is more than one."""
    return 0 if jnp.ndim(book) > 1 else None


def _check_floating(name: str, x: Any) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name} is {x.dtype}, expected real floating-point numbers")


def _checked_rows(rows: int, codes: Any) -> int:
    stored = 2 * codes.shape[0]
    if not stored - GROUP < rows <= stored:
        raise ValueError(
            f"rows={rows}: expected {stored - GROUP + 1} to {stored}, as many as "
            f"codes of shape {codes.shape} were made of"
        )
    return rows


def _check(shape: tuple[int, ...], block_size: int, scales: Any = None) -> None:
    if len(shape) != 2 or shape[0] % GROUP or 0 in shape:
        raise ValueError(
            f"shape {shape}: expected (k, n), none of them 0, and codes of whole "
            f"groups of {GROUP} rows, as kernels.quantize makes them"
        )
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size={block_size!r}: expected one of {BLOCK_SIZES}")
    wanted = (-(-shape[0] // block_size), shape[1])
    if scales is not None and tuple(scales.shape) != wanted:
        raise ValueError(
            f"scales have shape {tuple(scales.shape)}, expected {wanted}: one for each "
            f"block of {block_size} rows and each column"
        )


# --- the platform --------------------------------------------------------------------


def _everywhere(name: str) -> Callable[..., Any]:
    """The operation of that name in the backend of the platform compiled for, on each
    device of a mesh for its part.

    Traced once a shape (`inline`, so no program shows the jit).
    """

    def run(*arrays: jax.Array, **static: Any) -> Any:
        split = functools.partial(_SPLIT[name], **static)
        whole = functools.partial(getattr(plain, name), **static)
        if any(not isinstance(n, int) for x in arrays for n in x.shape):
            return split(whole, arrays)  # exported with a symbolic size
        from jpeft.kernels import tpu  # half a second: when they are needed
        from jpeft.kernels.gpu import route

        def of(backend: Any) -> Callable[..., Any]:
            return functools.partial(getattr(backend, name), **static)

        target = _target(route, tpu)

        def one(*a: jax.Array) -> Any:
            with target():
                return lax.platform_dependent(
                    *a, tpu=of(tpu), cuda=of(route), default=whole
                )

        return split(one, arrays)

    run.__name__ = f"{name}_4bit"
    static = ("format", "block_size", "dtype")
    return jax.jit(run, static_argnames=static, inline=True)


def _target(gpu: Any, tpu: Any) -> Callable[[], contextlib.ExitStack]:
    """The devices that are compiled for, as far as they are known now: a part for one
    device is traced when the caller's `with` is left."""
    generation = targets.generation.value or tpu._present()
    capability = targets.capability.value

    def enter() -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        if generation in tpu.CONFIGS:
            stack.enter_context(tpu.tpu_generation(generation))
        if capability is not None:
            stack.enter_context(gpu.gpu_capability(*capability))
        return stack

    return enter


# --- several devices -----------------------------------------------------------------


def dims_of_weight(block_size: int) -> tuple[plan.Dims, ...]:
    """The axes of codes, scales and book."""
    n = Dim("n")
    return (Dim("k", 2), n), (Dim("k", block_size), n), (OWN,)


def _split_product(
    run: Callable[..., Any],
    arrays: Sequence[jax.Array],
    *,
    transposed: bool,
    block_size: int,
    dtype: Any,
) -> jax.Array:
    x, codes, scales, book = arrays

    def whole(x: jax.Array, codes: jax.Array, *more: jax.Array) -> jax.Array:
        # Tied to x, W is not shared between the passes, nor made ahead of its use.
        codes, x = lax.optimization_barrier((codes, x))
        w = plain.dequantize(codes, *more, block_size=block_size, dtype=x.dtype)
        axes = (((1,), (1 if transposed else 0,)), ((), ()))
        return lax.dot_general(x, w, axes, preferred_element_type=dtype)

    return plan.product(
        run,
        x,
        (codes, scales, book),
        whole=whole,
        dims=dims_of_weight(block_size),
        sizes={"k": 2 * codes.shape[0], "n": codes.shape[1]},
        units={"k": GROUP},
        transposed=transposed,
    )


def _split_dequantize(
    run: Callable[..., Any], arrays: Sequence[jax.Array], *, block_size: int, dtype: Any
) -> jax.Array:
    (w,) = plan.elementwise(
        lambda *a: (run(*a),),
        arrays,
        whole=lambda *a: (plain.dequantize(*a, block_size=block_size, dtype=dtype),),
        dims=dims_of_weight(block_size),
        results=((Dim("k"), Dim("n")),),
        sizes={"k": 2 * arrays[0].shape[0], "n": arrays[0].shape[1]},
        units={"k": GROUP},
    )
    return w


def _split_quantize(
    run: Callable[..., Any],
    arrays: Sequence[jax.Array],
    *,
    format: str,
    block_size: int,
) -> tuple[jax.Array, jax.Array]:
    (w,) = arrays
    codes, scales = plan.elementwise(
        run,
        (w,),
        whole=lambda w: plain.quantize(w, format=format, block_size=block_size),
        dims=((Dim("k"), Dim("n")),),
        results=dims_of_weight(block_size)[:2],
        sizes={"k": w.shape[0], "n": w.shape[1]},
        # No part makes half a scale.
        units={"k": max(GROUP, block_size)},
    )
    return codes, scales


_SPLIT = {
    "quantize": _split_quantize,
    "dequantize": _split_dequantize,
    "matmul": functools.partial(_split_product, transposed=False),
    "matmul_transposed": functools.partial(_split_product, transposed=True),
}

_quantize = _everywhere("quantize")
_dequantize = _everywhere("dequantize")
_matmul = _everywhere("matmul")
_matmul_transposed = _everywhere("matmul_transposed")


# --- the gradient --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _How:
    block_size: int
    transposed: bool
    arriving: Any  # the activation's dtype, in which is multiplied
    outside: Any  # the result's


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(how: _How, weight: tuple[jax.Array, ...], x: jax.Array) -> jax.Array:
    run = _matmul_transposed if how.transposed else _matmul
    return run(x, *weight, block_size=how.block_size, dtype=how.outside)


def _product_forward(how: _How, weight: Any, x: jax.Array) -> Any:
    return _product(how, weight, x), weight


def _product_backward(how: _How, weight: Any, g: jax.Array) -> Any:
    back = _How(how.block_size, not how.transposed, how.arriving, how.arriving)
    dx = _product(back, weight, g.astype(how.arriving))
    return constant_cotangents(weight), dx


_product.defvjp(_product_forward, _product_backward)


def constant_cotangents(tree: Any) -> Any:
    """What a gradient rule says of arrays that are constants."""

    def zero(x: jax.Array) -> Any:
        if jnp.issubdtype(x.dtype, jnp.floating):
            # Where shardings are part of types, of the array's own type.
            return jnp.zeros_like(x, device=compat.typed_sharding(x))
        return np.zeros(x.shape, jax.dtypes.float0)

    return jax.tree.map(zero, tree)
