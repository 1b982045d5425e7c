"""x @ W and x @ W.T for a quantised W, keeping codes and scales for the gradient.

    forward    y  = x @ value(W)            kept for the backward pass: W's own arrays
    backward   dx = g @ value(W).T          W decoded again, nothing for W itself

Neither the values of W nor x are kept (W does not train).  What decodes W is the 4-bit
kernel of the platform where there is one, else tiles in plain JAX (`jpeft.kernels`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jpeft import compat
from jpeft.formats import blocks
from jpeft.formats.blocks import BLOCK_SIZES, CHANNEL, TENSOR, Blocks
from jpeft.formats.packing import GROUP
from jpeft.kernels import four_bit, tiled
from jpeft.kernels.four_bit import constant_cotangents
from jpeft.kernels.tiled import Tiles
from jpeft.quant.leaf import Quantized, QuantizedValue
from jpeft.sharding import plan
from jpeft.sharding.plan import OWN, Dim


@dataclasses.dataclass(frozen=True)
class How:
    """transposed: contract with the columns.  Dtypes: arriving, of the activation;
    inside, to multiply in; outside, of the result."""

    transposed: bool
    arriving: str
    inside: str
    outside: str

    def back(self) -> How:
        return How(not self.transposed, self.outside, self.inside, self.arriving)


def product(how: How, leaf: Quantized, x: jax.Array) -> jax.Array:
    """x (..., m, k) by W (k, n); or by W.T, with k and n exchanged.

    k and n are W's rows and columns, each flattened: for a table the rows are its
    vocabulary.  One leading axis if W is a stack, the stack's axes as one.
    """
    # Before the gradient rule, so that JAX itself sums gradients over shards.
    x, *_ = compat.varying_alike((x, leaf.codes, leaf.scales))
    return _product(how, leaf, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(how: How, leaf: Quantized, x: jax.Array) -> jax.Array:
    matrices = _matrices(leaf)
    run = functools.partial(_one, how, leaf)
    if leaf.stack:
        run = jax.vmap(run)
    with _declared_shardings(leaf):
        return run(matrices, x)


def _forward(how: How, leaf: Quantized, x: jax.Array) -> tuple[jax.Array, Any]:
    return _product(how, leaf, x), (leaf, _Place.of(x))


def _backward(how: How, kept: tuple[Quantized, _Place], g: jax.Array) -> Any:
    leaf, of_x = kept
    return constant_cotangents(leaf), of_x.put(_product(how.back(), leaf, g))


_product.defvjp(_forward, _backward)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Place:
    """An operand's sharding, if it is part of its type."""

    sharding: Any

    @classmethod
    def of(cls, x: jax.Array) -> _Place:
        return cls(compat.typed_sharding(x))

    def put(self, x: jax.Array) -> jax.Array:
        return x if self.sharding is None else jax.sharding.reshard(x, self.sharding)


def shape_of(leaf: Quantized) -> tuple[int, int]:
    """(rows, columns) of each matrix."""
    codes = leaf.codes.shape
    if leaf.is_matrix:
        return leaf.length, math.prod(codes[leaf.lead + 1 :])
    rows = math.prod(codes[leaf.stack : leaf.lead])
    return rows, leaf.length


def _declared_shardings(leaf: Quantized) -> contextlib.AbstractContextManager[None]:
    """The shardings that `jpeft.sharding.declare` was given, for this weight."""
    declared = plan.declared()
    nothing = contextlib.nullcontext()
    if declared is None:
        return nothing
    spec = declared.of_codes(str.__str__(leaf.path), leaf.codes.shape)
    if spec is None:
        return nothing
    stack, rows = spec[: leaf.stack], spec[leaf.stack : leaf.lead]
    blocked, columns = spec[leaf.lead], spec[leaf.lead + 1 :]
    parts = {"s": stack, "k": (blocked,), "n": columns}
    if not leaf.is_matrix:
        parts |= {"k": rows, "n": (blocked,)}
    if any(axes for group in parts.values() for axes in group[1:]):
        return nothing  # axes become one, and only the first of them may be cut
    cuts = {letter: group[0] for letter, group in parts.items() if group}
    return plan.known(declared.mesh, {**cuts, plan.TOKENS: declared.tokens})


def _matrices(leaf: Quantized) -> Blocks:
    """The arrays with two axes each, and one before them for the stack."""
    q = leaf.blocks()
    q = blocks.filled(q, leaf.kind, leaf.block_size, leaf.lead)
    stack = (-1,) if leaf.stack else ()
    k = leaf.lead

    def flat(x: jax.Array | None) -> jax.Array | None:
        if x is None:
            return None
        first = math.prod(x.shape[leaf.stack : k])
        last = math.prod(x.shape[k + 1 :])
        sides = (x.shape[k], last) if leaf.is_matrix else (first, x.shape[k] * last)
        return x.reshape(*stack, *sides)

    book = None if q.book is None else q.book.reshape(*stack, q.book.shape[-1])
    return Blocks(flat(q.codes), flat(q.scales), flat(q.zeros), book)  # type: ignore[arg-type]


def _one(how: How, leaf: Quantized, q: Blocks, x: jax.Array) -> jax.Array:
    """One matrix."""
    k, n = shape_of(leaf)
    if x.shape[0] == 0:  # an empty batch; the kernels would divide by its size
        return jnp.zeros((0, k if how.transposed else n), how.outside)
    rows = _stored_rows(leaf, q)
    # The stored rows are whole groups; the weight's may be fewer.
    x = x.astype(how.inside)
    if not how.transposed:
        x = jnp.pad(x, ((0, 0), (0, rows - k)))
    block = _kernel_block(leaf)
    if block is None:
        y = _by_tiles(how, leaf, q, x)
    else:
        run = four_bit.matmul_transposed if how.transposed else four_bit.matmul
        book = jnp.asarray(blocks.book_of(leaf.kind)) if q.book is None else q.book
        y = run(
            x,
            q.codes,
            q.scales.astype(jnp.float32),
            book,
            block_size=block,
            dtype=jnp.dtype(how.outside),
        )
    return lax.slice_in_dim(y, 0, k, axis=1) if how.transposed else y


def _stored_rows(leaf: Quantized, q: Blocks) -> int:
    packed = leaf.is_matrix and leaf.kind.packed
    return q.codes.shape[0] * (2 if packed else 1)


def _kernel_block(leaf: Quantized) -> int | None:
    """The block size in the kernels' terms, or None where they do not apply."""
    if not (leaf.is_matrix and leaf.kind.has_book) or leaf.block_size == TENSOR:
        return None
    if leaf.block_size == CHANNEL:
        stored = -(-leaf.length // GROUP) * GROUP
        return next((b for b in BLOCK_SIZES if b >= stored), None)
    assert isinstance(leaf.block_size, int)
    return leaf.block_size


def _by_tiles(how: How, leaf: Quantized, q: Blocks, x: jax.Array) -> jax.Array:
    """In plain JAX; on a mesh each device computes its part (`jpeft.sharding.plan`)."""
    kind, size = leaf.kind, leaf.block_size
    axis = 0 if leaf.is_matrix else 1
    per_byte = kind.per_byte
    stored = q.codes.shape[axis] * per_byte
    filled_up = not leaf.is_matrix and stored != leaf.length
    names = [name for name, a in q._asdict().items() if a is not None]

    def multiply(x: jax.Array, *operands: jax.Array) -> jax.Array:
        part = Blocks(**dict(zip(names, operands, strict=True)))
        length = part.codes.shape[axis] * per_byte
        length = leaf.length if filled_up else length
        inside, outside = jnp.dtype(how.inside), jnp.dtype(how.outside)
        along = Tiles(*blocks.along(part, kind, size, axis, inside))
        across = Tiles(*blocks.across(part, kind, size, axis, length, inside))
        rows, columns = (along, across) if leaf.is_matrix else (across, along)
        if how.transposed:
            n = length if leaf.is_matrix else part.codes.shape[0]
            return tiled.matmul_transposed(x, n, rows, outside)
        if leaf.is_matrix:
            return tiled.matmul(x, part.codes.shape[1], columns, outside)
        # A table's features are padded to whole groups.
        n = part.codes.shape[1] * per_byte
        y = tiled.matmul(x, n, columns, outside)
        return lax.slice_in_dim(y, 0, length, axis=1)

    def whole(x: jax.Array, *operands: jax.Array) -> jax.Array:
        x, operands = lax.optimization_barrier((x, operands))
        part = Blocks(**dict(zip(names, operands, strict=True)))
        length = leaf.length if filled_up else stored
        w = blocks.dequantize(part, kind, size, axis, length, dtype=x.dtype)
        axes = (((1,), (1 if how.transposed else 0,)), ((), ()))
        return lax.dot_general(x, w, axes, preferred_element_type=how.outside)

    blocked, other = ("k", "n") if leaf.is_matrix else ("n", "k")

    def dims(name: str) -> plan.Dims:
        if name == "book":
            return (OWN,)
        per = per_byte if name == "codes" else size if isinstance(size, int) else 1
        both = Dim(blocked, per), Dim(other)
        return both if leaf.is_matrix else both[::-1]

    length = leaf.length if filled_up else stored
    return plan.product(
        multiply,
        x,
        [getattr(q, name) for name in names],
        whole=whole,
        dims=[dims(name) for name in names],
        sizes={blocked: length, other: q.codes.shape[1 - axis]},
        # With padded features the parts of the operands would not match.
        units={blocked: length if filled_up else GROUP if kind.packed else 1},
        transposed=how.transposed,
    )


# --- anything else that is linear in the activation ----------------------------------


def linear(
    f: Callable[..., jax.Array],
    leaf: QuantizedValue,
    x: jax.Array,
    dtype: Any,
    *more: jax.Array,
) -> jax.Array:
    """f(value of the leaf, x, *more) for an f that is linear in x.

    The full weight is made in `dtype`, once forwards and once backwards, and not kept
    in between.  What is kept are the leaf's arrays, and x if real arrays wait in the
    leaf (a scaling vector, a mask), for their gradients.

    more: integers, such as the sizes of groups.  Trap: the backward pass may be traced
    elsewhere, so f must not close over them.
    """
    data, real, put = leaf.parts()

    @jax.custom_vjp
    def run(data: Any, real: list[jax.Array], x: jax.Array, more: Any) -> jax.Array:
        return f(put(data, real).value(dtype), x, *more)

    def forward(data: Any, real: list[jax.Array], x: jax.Array, more: Any) -> Any:
        return run(data, real, x, more), (data, real, x if real else None, more)

    def backward(kept: Any, g: jax.Array) -> tuple[Any, Any, Any, Any]:
        # Tied to g, the weight is not shared with the forward pass, where it would
        # have to live until now.
        (data, real, x, more), g = lax.optimization_barrier((kept, g))
        of_x = lambda x: f(put(data, real).value(dtype), x, *more)
        (dx,) = jax.linear_transpose(of_x, like)(g)
        d_real: Any = real
        if real:
            _, back = jax.vjp(
                lambda real: f(put(data, real).value(dtype), x, *more), real
            )
            (d_real,) = back(g)
        return constant_cotangents(data), d_real, dx, constant_cotangents(more)

    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    run.defvjp(forward, backward)
    return run(data, real, x, more)
