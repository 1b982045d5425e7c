"""How a quantised weight acts in the equations of a model.

Consumed by a product, it is decoded tile by tile (`jpeft.quant.product`).  Rows of a
stack (layers, experts) and of a table are taken from the codes; a transpose, and a
reshape within input or output axes, only rename axes.  What else is done to the weight
before it is used waits in a `Deferred` leaf, so that nothing decoded lives longer than
the equation that consumes it.  (What a gather takes along an input or output axis is
decoded there and then.)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jpeft import compat
from jpeft.adapt.equations import (
    ByElement,
    Cast,
    Convolve,
    Gather,
    Join,
    LookUp,
    Move,
    Product,
    Reduce,
    Reverse,
    Round,
    Route,
    Same,
    Slice,
    SliceAt,
    Verb,
    align,
    axis_groups,
    smaller_as_value,
)
from jpeft.adapt.interpreter import Interpreter, acts, contracts
from jpeft.formats import blocks
from jpeft.formats.blocks import TENSOR, Blocks
from jpeft.formats.double import NESTED_BLOCK, dequantize_codes
from jpeft.formats.packing import GROUP
from jpeft.leaf import array_fields, is_leaf, wide_dtype
from jpeft.quant.deferred import deferred
from jpeft.quant.leaf import Quantized, QuantizedValue
from jpeft.quant.product import How, linear, product
from jpeft.sharding.explicit import reshaped

# --- consumed ------------------------------------------------------------------------


@contracts(kind=QuantizedValue, two=smaller_as_value)
def _contract(it: Interpreter, at: Product) -> Any:
    leaf, x = at.leaf, at.x
    if not jnp.issubdtype(x.dtype, jnp.floating):  # nothing to differentiate
        return it.native(at.eqn)(*at.ins(leaf=leaf.value(leaf.dtype)))
    if isinstance(leaf, Quantized) and not _asks_more(at):
        out = _as_matrix(at, leaf, x)
        if out is not None:
            return out
    return _general(at, leaf, x)


def _asks_more(at: Product) -> bool:
    """Whether the product asks for more than the kernels promise."""
    return at.options["precision"] not in (
        None,
        lax.Precision.DEFAULT,
        (lax.Precision.DEFAULT, lax.Precision.DEFAULT),
    )


def _as_matrix(at: Product, leaf: Quantized, x: jax.Array) -> Any:
    """The product as x @ W or x @ W.T, where it contracts the rows or the columns."""
    mine, batch = at.verb.contracting[at.side], at.verb.batch[at.side]
    stack = leaf.order[: leaf.stack]
    if set(batch) != set(stack):
        return None
    inner = leaf.order[leaf.lead : leaf.after]
    columns = leaf.order[leaf.after :]
    rows = inner if leaf.is_matrix else leaf.order[leaf.stack : leaf.lead]
    columns = columns if leaf.is_matrix else inner
    if set(mine) == set(rows):
        transposed, summed, kept = False, rows, columns
    elif set(mine) == set(columns):
        transposed, summed, kept = True, columns, rows
    else:
        return None
    # The activation as (stack, free, summed), in the weight's order.
    free = [k for k in at.xl if isinstance(k, tuple)]
    sizes = [x.shape[at.xl.index(k)] for k in free]
    x2 = align(x, at.xl, [*stack, *free, *summed])
    many = (len(stack),) if stack else ()
    x2 = _merged(x2, *many, len(free), len(summed))
    out = at.eqn.outvars[0].aval
    how = How(transposed, x.dtype.name, _inside(leaf, x), out.dtype.name)
    made = (
        *(leaf.shape[k] for k in stack),
        *sizes,
        *(leaf.shape[k] for k in kept),
    )
    y = product(how, leaf, x2)
    y = _split(y, made, *many, len(free), len(kept))
    y = align(y, [*stack, *free, *kept], at.out)
    # On an explicit mesh the equation may say where its result goes.
    place = at.options["out_sharding"]
    return y if place is None else jax.sharding.reshard(y, place)


def _merged(x: jax.Array, *counts: int) -> jax.Array:
    """So many axes each as one."""
    ends = list(itertools.accumulate(counts))
    sizes = [math.prod(x.shape[b - n : b]) for n, b in zip(counts, ends, strict=True)]
    places = lambda spec: [
        spec[b - n] if n else None for n, b in zip(counts, ends, strict=True)
    ]
    return reshaped(x, sizes, places)


def _split(x: jax.Array, sizes: Sequence[int], *counts: int) -> jax.Array:
    """Each axis as so many, of these sizes."""
    places = lambda spec: [
        place
        for of_axis, n in zip(spec, counts, strict=True)
        for place in (of_axis, *[None] * (n - 1))[:n]
    ]
    return reshaped(x, sizes, places)


def _inside(leaf: QuantizedValue, x: jax.Array) -> str:
    if leaf.compute_dtype is not None:
        return leaf.compute_dtype
    return max(x.dtype, leaf.dtype, key=lambda dtype: dtype.itemsize).name


def _general(at: Product, leaf: QuantizedValue, x: jax.Array) -> jax.Array:
    """Any other dimension numbers: the whole weight is made for this product alone."""
    out = at.eqn.outvars[0].aval
    inside = _inside(leaf, x)

    def f(w: jax.Array, x: jax.Array) -> jax.Array:
        options = {**at.options, "preferred_element_type": wide_dtype(inside)}
        left, right = at.ins(leaf=w, x=x.astype(inside))
        numbers = at.verb.contracting, at.verb.batch
        y = lax.dot_general(left, right, numbers, **options)
        return y.astype(out.dtype)

    return linear(f, leaf, x, inside)


@acts(Convolve, kind=QuantizedValue)
def _conv(it: Interpreter, conv: Convolve, ins: list[Any]) -> Any:
    x, leaf = ins
    if is_leaf(x) or not is_leaf(leaf):
        return None
    run = it.native(conv.eqn)
    return linear(lambda w, x: run(x, w), leaf, x, leaf.dtype)


@acts(Route, kind=QuantizedValue)
def _route(it: Interpreter, at: Route, ins: list[Any]) -> Any:
    x, leaf, *sizes = ins
    if is_leaf(x) or not is_leaf(leaf):
        return None
    run = it.native(at.eqn)
    return linear(lambda w, x, *s: run(x, w, *s), leaf, x, leaf.dtype, *sizes)


@acts(LookUp, kind=QuantizedValue)
def _look_up(it: Interpreter, at: LookUp, ins: list[Any]) -> Any:
    leaf, indices = ins
    eqn = at.eqn
    if is_leaf(indices) or not is_leaf(leaf):
        return None
    if isinstance(leaf, Quantized):
        axis = _whole_rows(eqn, leaf)
        if axis is not None:
            if indices.dtype.itemsize < 4:  # room to count with: blocks, and the rows
                indices = indices.astype(jnp.int32)
            if leaf.is_stack(axis) and leaf.ndim > 2:
                return _picked(at, leaf, axis, indices)
            if leaf.order.index(axis) < leaf.lead:
                return _looked_up(it, eqn, leaf, axis, indices)
    return it.native(eqn)(leaf.value(leaf.dtype), indices)


def _whole_rows(eqn: Any, leaf: Quantized) -> int | None:
    """The one axis that the gather indexes, if it takes all of the others."""
    p, numbers = eqn.params, eqn.params["dimension_numbers"]
    if numbers.operand_batching_dims or len(numbers.start_index_map) != 1:
        return None
    (axis,) = numbers.start_index_map
    whole = all(n == leaf.shape[k] for k, n in enumerate(p["slice_sizes"]) if k != axis)
    if not whole or numbers.collapsed_slice_dims != (axis,):
        return None
    # The rows' axes stay together, in order, behind the indices'.
    ndim = len(eqn.outvars[0].aval.shape)
    first = ndim - (leaf.ndim - 1)
    return axis if numbers.offset_dims == tuple(range(first, ndim)) else None


def _looked_up(
    it: Interpreter, eqn: Any, leaf: Quantized, axis: int, indices: jax.Array
) -> Any:
    """Takes rows of a table, by the same lookup in the codes and in the scales."""
    at = leaf.order.index(axis)
    if leaf.lead - leaf.stack != 1 or leaf.stack or leaf.codes.ndim != 2:
        return None
    rows = indices[..., 0]
    shared = leaf.block_size == TENSOR
    codes = _take(eqn, leaf.codes, indices, at)
    take = lambda x: x if shared else _take(eqn, x, indices, at)
    if leaf.nested is None:
        scales = take(leaf.scales)
    else:
        scales = _scales_of_rows(leaf, rows, take(leaf.scales))
    zeros = None if leaf.zeros is None else take(leaf.zeros)
    width, n = codes.shape[-1], rows.size
    flat = lambda x: None if x is None else x.reshape(-1, x.shape[-1])
    part = Blocks(codes.reshape(n, width), flat(scales), flat(zeros), leaf.book)  # type: ignore[arg-type]
    y = blocks.dequantize(
        part, leaf.kind, leaf.block_size, 1, leaf.length, dtype=leaf.dtype
    )
    sizes = (*rows.shape, *leaf.inner)
    out = eqn.outvars[0].aval
    y = y.reshape(sizes).reshape(out.shape)
    return _out_of_range(eqn, leaf, axis, rows, y)


def _take(eqn: Any, x: jax.Array, indices: jax.Array, axis: int) -> jax.Array:
    """The equation's lookup on another array with the same rows."""
    rest = tuple(k for k in range(x.ndim) if k != axis)
    first = indices.ndim - 1
    numbers = lax.GatherDimensionNumbers(
        offset_dims=tuple(range(first, first + len(rest))),
        collapsed_slice_dims=(axis,),
        start_index_map=(axis,),
    )
    sizes = tuple(1 if k == axis else n for k, n in enumerate(x.shape))
    mode = eqn.params["mode"]
    # Rows out of range are filled once, in the values.
    fill = mode == lax.GatherScatterMode.FILL_OR_DROP
    return lax.gather(
        x,
        indices,
        numbers,
        sizes,
        mode=lax.GatherScatterMode.CLIP if fill else mode,
        indices_are_sorted=eqn.params["indices_are_sorted"],
        unique_indices=eqn.params["unique_indices"],
    )


def _scales_of_rows(leaf: Quantized, rows: jax.Array, codes: jax.Array) -> jax.Array:
    """The nested scales of the rows that are taken, decoded for those rows only."""
    per = leaf.scales.shape[-1]
    rows = jnp.clip(rows, 0, leaf.codes.shape[0] - 1)
    block = jnp.arange(per, dtype=rows.dtype).reshape(*(1,) * rows.ndim, per)
    place = rows[..., None] * per + block
    each = jnp.take(leaf.nested, place // NESTED_BLOCK, mode="clip")
    return dequantize_codes(codes, each, leaf.offset)


def _out_of_range(
    eqn: Any, leaf: Quantized, axis: int, rows: jax.Array, y: jax.Array
) -> jax.Array:
    if eqn.params["mode"] != lax.GatherScatterMode.FILL_OR_DROP:
        return y
    fill = eqn.params["fill_value"]
    fill = jnp.nan if fill is None else fill
    inside = (rows >= 0) & (rows < leaf.shape[axis])
    inside = inside.reshape(*inside.shape, *(1,) * (y.ndim - inside.ndim))
    return jnp.where(inside, y, jnp.asarray(fill, y.dtype))


def _picked(verb: LookUp, leaf: Quantized, axis: int, indices: jax.Array) -> Any:
    """Matrices of a stack, by index: experts' weights stay codes."""
    if leaf.order[0] != axis:
        return deferred(verb, [leaf, indices])
    eqn, sizes, flat = verb.eqn, indices.shape[:-1], indices
    if len(sizes) > 1:  # the best k experts of each token
        flat = indices.reshape(-1, indices.shape[-1])
    out = leaf.along_stack(lambda x, at: _take(eqn, x, flat, at), axis)
    if not sizes:
        return out.without_stack_axis(axis)
    # The picked matrices become the stack axis, in front.
    order = (0, *(k + (k < axis) for k in leaf.order[1:]))
    out = out.replace(order=order)
    if len(sizes) == 1:
        return out
    split = _regrouped(out, (*sizes, *out.shape[1:]))
    return deferred(verb, [leaf, indices]) if split is None else split


# --- moved ---------------------------------------------------------------------------


@acts(Cast, kind=Quantized)
def _cast(it: Interpreter, cast: Cast, ins: list[Any]) -> Any:
    if not jnp.issubdtype(cast.dtype, jnp.floating):
        return None
    return ins[0].replace(element=jnp.dtype(cast.dtype).name)


@acts(Move, kind=QuantizedValue)
def _moved(it: Interpreter, move: Move, ins: list[Any]) -> Any:
    """Keeps the codes where they are, whatever the equation says of the weight."""
    if isinstance(move, Same) and not isinstance(move, Round):
        return ins[0]
    return None if move.step is Gather else deferred(move, ins)


@acts(Move, kind=Quantized)
def _moved_codes(it: Interpreter, move: Move, ins: list[Any]) -> Any:
    leaf, *more = ins
    out: Any = None
    if isinstance(move, Same):
        return _moved(it, move, ins)
    if move.step is Gather:
        return _all_gather(move, leaf)
    if not is_leaf(leaf) or any(map(is_leaf, more)):
        return None
    if move.step in (Slice, SliceAt, Reverse) and all(map(leaf.is_stack, move.along)):
        out = leaf
        for k, step in move.along.items():
            one = lambda x, at, step=step: step.done(x, {at: step}, more)
            out = out.along_stack(one, k)
    elif move.step is None and not move.spreads and move.order == sorted(move.order):
        out = _regrouped(leaf, move.shape)
    elif move.step is None and not move.spreads and not move.regroups:
        # Only the order changes: nothing is decoded.
        out = leaf.replace(order=tuple(map(move.order.index, leaf.order)))
    return deferred(move, ins) if out is None else out


@acts(Join, kind=Quantized)
def _join(it: Interpreter, join: Join, ins: list[Any]) -> Any:
    """Joins matrices of one format to a stack or a longer one; other joins wait."""
    axis, first, new = join.axis, ins[0], ins[0]
    alike = (
        all(isinstance(x, Quantized) for x in ins)
        and len({jax.tree.structure(x.replace(origin="")) for x in ins}) == 1
    )
    if not alike or not (join.new or first.is_stack(axis)):
        return deferred(join, ins)
    if join.new:
        at, put = 0, lambda xs, at: jnp.stack(xs, at)
        new = first.replace(
            order=(axis, *(k + (k >= axis) for k in first.order)),
            stack=first.stack + 1,
            lead=first.lead + 1,
        )
    else:
        at, put = first.order.index(axis), lax.concatenate
    arrays = [array_fields(x) for x in ins]
    made = {n: put([a[n] for a in arrays], at) for n in arrays[0]}
    return new.replace(**made)


def _regrouped(leaf: Quantized, dst: tuple[int, ...]) -> Quantized | None:
    """The leaf reshaped, if axes are split or joined within one of its four groups.

    New axes of size 1 go to the blocked ones, which have no axes of their own in the
    arrays.
    """
    if 0 in dst:
        return None
    bounds = (0, leaf.stack, leaf.lead, leaf.after, leaf.ndim)
    old = [leaf.order[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
    new: list[list[int]] = [[], [], [], []]
    groups = axis_groups(leaf.shape, dst)
    for g, members in enumerate(old):
        rest = [k for k in members if leaf.shape[k] != 1]
        while rest:
            pair = next((p for p in groups if p[0] == rest[: len(p[0])]), None)
            if pair is None:
                return None
            source, found = pair
            new[g] += found
            rest = rest[len(source) :]
    ones = [k for k, n in enumerate(dst) if n == 1]
    new[2] += ones
    sizes = [[dst[k] for k in group] for group in new]
    stack, rows, inner, columns = sizes
    lead, k = len(stack) + len(rows), leaf.lead

    def fit(x: jax.Array, name: str) -> jax.Array:
        if name in ("nested", "offset", "book"):
            return x.reshape(*stack, *x.shape[leaf.stack :])
        shared = leaf.block_size == TENSOR and name != "codes"
        of = lambda group: [1] * len(group) if shared else group
        return x.reshape(*stack, *of(rows), x.shape[k], *of(columns))

    arrays = {n: fit(x, n) for n, x in array_fields(leaf).items()}
    return leaf.replace(
        **arrays,
        order=tuple(k for group in new for k in group),
        stack=len(stack),
        lead=lead,
        inner=tuple(inner),
    )


def _all_gather(move: Move, leaf: Quantized) -> Any:
    """A weight put together from its shards: codes and scales are sent."""
    ((axis, step),) = move.along.items()
    whole = lambda x, at: step.done(x, {at: step}, ())
    if leaf.is_stack(axis):
        return leaf.along_stack(whole, axis)
    at, inner = leaf.order.index(axis), leaf.inner
    place = leaf.lead
    if leaf.lead <= at < leaf.after:
        # As `for_shards` cuts them: between whole blocks.
        if at > leaf.lead or not isinstance(leaf.block_size, int):
            return None
        if leaf.length % math.lcm(GROUP if leaf.kind.packed else 1, leaf.block_size):
            return None
        inner = (inner[0] * step.times, *inner[1:])
    else:
        place = leaf.array_axis(at)
    leaf = leaf.with_plain_scales()
    arrays = array_fields(leaf)
    of_all = {"scales", "zeros", "book"} if leaf.block_size == TENSOR else {"book"}
    of_all &= set(arrays)
    names = step.mesh_axes
    names = set(names if isinstance(names, tuple) else (names,))
    varying = lambda n: names & set(compat.varying_axes(arrays[n]))
    if of_all and (not varying("codes") or any(map(varying, of_all))):
        return None  # each shard may have a scale or a book of its own
    sent = {n: whole(x, place) for n, x in arrays.items() if n not in of_all}
    return leaf.replace(**sent, inner=inner)


@acts(ByElement, Reduce, Join, kind=QuantizedValue)
def _waits(it: Interpreter, verb: Verb, ins: list[Any]) -> Any:
    return deferred(verb, ins)
