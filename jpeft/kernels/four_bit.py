"""4-bit matrices: quantise, dequantise, x @ W and its transpose, on any platform.

    W[k, n] = book[code[k, n]] * scale[k // block, n]

    codes   uint8 (K / 2, N), planar in groups of 64 rows; see `jpeft.formats.packing`
    scales  float32 (ceil(K / block), N)
    book    float32 (16,), the values of the codes: nf4, fp4, int4 or a learned one

A *block* is what shares a scale; a *tile* is what one step of a kernel works on.  The
platform is chosen here and nowhere else, when a program is compiled
(`jax.lax.platform_dependent`): Pallas for TPU and NVIDIA GPUs, plain JAX for the rest.
`_plain` is the meaning of all of them, and what `jax.export` gets where a size is a
symbol: a kernel's tiles are chosen by numbers.

`matmul` differentiates with respect to x only, and what it keeps for that is the codes
and scales.
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
from jpeft.kernels import _plain, partitioned, targets
from jpeft.kernels.partitioned import OWN, Dim


def quantize(
    w: Float[Array, "k n"], *, format: str = "nf4", block_size: int = 64
) -> tuple[UInt8[Array, "half n"], Float[Array, "blocks n"]]:
    """(codes, scales) of a matrix, in blocks down its columns.

    format: "nf4", "fp4" or "int4".  Raises ValueError unless K is a multiple of 64.
    """
    if format not in CODEBOOKS:
        raise ValueError(f"format={format!r}: expected one of {sorted(CODEBOOKS)}")
    _check(w.shape, block_size)
    return _quantize(w, format=format, block_size=block_size)


def dequantize(
    codes: UInt8[Array, "half n"],
    scales: Float[Array, "blocks n"],
    book: Float[Array, " 16"],
    *,
    block_size: int = 64,
    dtype: Any = jnp.bfloat16,
) -> Float[Array, "k n"]:
    """W: the product in float32, rounded once to `dtype`."""
    _check((2 * codes.shape[0], codes.shape[1]), block_size, scales)
    return _dequantize(
        codes, scales, jnp.asarray(book), block_size=block_size, dtype=jnp.dtype(dtype)
    )


def matmul(
    x: Float[Array, "m k"],
    codes: UInt8[Array, "half n"],
    scales: Float[Array, "blocks n"],
    book: Float[Array, " 16"],
    *,
    plus: Float[Array, "m n"] | None = None,
    block_size: int = 64,
    dtype: Any = None,
) -> Float[Array, "m n"]:
    """x @ W + plus, with W in x's dtype and sums in float32.

    On Hopper and later, for at most 64 rows of bfloat16, it is the book that is rounded
    to x's dtype instead (in `matmul_transposed` g times its scale as well).

    plus: added in the same pass where that spares memory.  dtype: of the result;
    default x's.
    """
    k, n = 2 * codes.shape[0], codes.shape[1]
    _check((k, n), block_size, scales)
    if x.ndim != 2 or x.shape[1] != k:
        raise ValueError(f"x has shape {x.shape}, expected (m, {k})")
    dtype = jnp.dtype(x.dtype if dtype is None else dtype)
    how = _How(block_size, False, jnp.dtype(x.dtype), dtype)
    # Before the gradient rule, so that it is JAX that adds up over shards.
    x, plus, *_ = partitioned.alike(x, plus, codes, scales)
    return _product(how, (codes, scales, jnp.asarray(book)), x, plus)


def matmul_transposed(
    g: Float[Array, "m n"],
    codes: UInt8[Array, "half n"],
    scales: Float[Array, "blocks n"],
    book: Float[Array, " 16"],
    *,
    plus: Float[Array, "m k"] | None = None,
    block_size: int = 64,
    dtype: Any = None,
) -> Float[Array, "m k"]:
    """g @ W.T + plus, from the same codes.  Everything as in `matmul`."""
    k, n = 2 * codes.shape[0], codes.shape[1]
    _check((k, n), block_size, scales)
    if g.ndim != 2 or g.shape[1] != n:
        raise ValueError(f"g has shape {g.shape}, expected (m, {n})")
    dtype = jnp.dtype(g.dtype if dtype is None else dtype)
    how = _How(block_size, True, jnp.dtype(g.dtype), dtype)
    # Before the gradient rule, so that it is JAX that adds up over shards.
    g, plus, *_ = partitioned.alike(g, plus, codes, scales)
    return _product(how, (codes, scales, jnp.asarray(book)), g, plus)


def _check(
    shape: tuple[int, ...], block_size: int, scales: jax.Array | None = None
) -> None:
    if len(shape) != 2 or shape[0] % GROUP or 0 in shape:
        raise ValueError(
            f"shape {shape}: expected (k, n) with k a multiple of {GROUP}; pad with "
            "zeros, or use jpeft.quant.quantize, which does"
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
        plain = functools.partial(getattr(_plain, name), **static)
        if any(not isinstance(n, int) for x in arrays for n in x.shape):
            return split(plain, arrays)  # exported with a symbolic size
        from jpeft.kernels import _gpu, _tpu  # Pallas takes a second to import

        def of(backend: Any) -> Callable[..., Any]:
            kernel = functools.partial(getattr(backend, name), **static)
            # A kernel of three arrays beside x adds nothing: XLA does, after it.
            return lambda *a: kernel(*a) if len(a) < 5 else kernel(*a[:4]) + a[4]

        target = _target(_gpu, _tpu)

        def one(*a: jax.Array) -> Any:
            with target():
                return lax.platform_dependent(
                    *a, tpu=of(_tpu), cuda=of(_gpu), default=plain
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


def dims_of_weight(block_size: int) -> tuple[partitioned.Dims, ...]:
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
    x, codes, scales, book, *plus = arrays

    def whole(x: jax.Array, codes: jax.Array, *more: jax.Array) -> jax.Array:
        # Tied to x, W is not shared between the passes, nor made ahead of its use.
        codes, x = lax.optimization_barrier((codes, x))
        w = _plain.dequantize(codes, *more[:2], block_size=block_size, dtype=x.dtype)
        axes = (((1,), (1 if transposed else 0,)), ((), ()))
        y = lax.dot_general(x, w, axes, preferred_element_type=dtype)
        return y + more[2] if more[2:] else y

    return partitioned.product(
        run,
        x,
        (codes, scales, book),
        plus[0] if plus else None,
        whole=whole,
        dims=dims_of_weight(block_size),
        sizes={"k": 2 * codes.shape[0], "n": codes.shape[1]},
        units={"k": GROUP},
        transposed=transposed,
    )


def _split_dequantize(
    run: Callable[..., Any], arrays: Sequence[jax.Array], *, block_size: int, dtype: Any
) -> jax.Array:
    (w,) = partitioned.elementwise(
        lambda *a: (run(*a),),
        arrays,
        whole=lambda *a: (_plain.dequantize(*a, block_size=block_size, dtype=dtype),),
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
    codes, scales = partitioned.elementwise(
        run,
        (w,),
        whole=lambda w: _plain.quantize(w, format=format, block_size=block_size),
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


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Like:
    """A dtype among what is kept for the backward pass."""

    dtype: Any


@dataclasses.dataclass(frozen=True)
class _How:
    block_size: int
    transposed: bool
    arriving: Any  # the activation's dtype, in which is multiplied
    outside: Any  # the result's


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(
    how: _How, weight: tuple[jax.Array, ...], x: jax.Array, plus: jax.Array | None
) -> jax.Array:
    run = _matmul_transposed if how.transposed else _matmul
    more = () if plus is None else (plus.astype(how.outside),)
    return run(x, *weight, *more, block_size=how.block_size, dtype=how.outside)


def _product_forward(how: _How, weight: Any, x: jax.Array, plus: Any) -> Any:
    return _product(how, weight, x, plus), (
        weight,
        None if plus is None else _Like(plus.dtype),
    )


def _product_backward(how: _How, kept: Any, g: jax.Array) -> Any:
    weight, like = kept
    back = _How(how.block_size, not how.transposed, how.arriving, how.arriving)
    dx = _product(back, weight, g.astype(how.arriving), None)
    d_plus = None if like is None else g.astype(like.dtype)
    return constant_cotangents(weight), dx, d_plus


_product.defvjp(_product_forward, _product_backward)


def constant_cotangents(tree: Any) -> Any:
    """What a gradient rule says of arrays that are constants."""

    def zero(x: jax.Array) -> Any:
        if jnp.issubdtype(x.dtype, jnp.floating):
            # Where shardings are part of types, of the array's own type.
            return jnp.zeros_like(x, device=compat.typed_sharding(x))
        return np.zeros(x.shape, jax.dtypes.float0)

    return jax.tree.map(zero, tree)
