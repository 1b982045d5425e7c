"""`Quantized`: a weight stored in few bits, standing where its array stood.

The weight's axes are put in the order (*stack, *rows, *blocked, *columns), the blocked
ones become one axis of K elements, and blocks run along it:

    a linear weight      stack axes, none,        input axes,  output axes
    an embedding table   stack axes, vocabulary,  features,    none
    an array as it is    none,       none,        all axes,    none

So blocks run along what is contracted, which is how bitsandbytes cuts a torch weight
(out, in) whose rows are whole blocks, and a lookup in a table reads whole rows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jpeft import compat
from jpeft.boxes import is_box, names_of, rebox, unbox, with_names
from jpeft.formats import blocks, double
from jpeft.formats.blocks import FORMATS, Blocks, Format
from jpeft.formats.packing import GROUP
from jpeft.kernels import targets
from jpeft.leaf import (
    AdaptedLeaf,
    StoredWeight,
    adapted_leaf,
    array_fields,
    field_axes,
    frozen,
    static,
    unboxed,
)
from jpeft.sharding.plan import whole_shards
from jpeft.sharding.specs import leaf_specs
from jpeft.tree.layout import EMBEDDING


class QuantizedValue(AdaptedLeaf):
    """What the rules of consumption need: a weight that is made when it is used."""

    # The dtype to multiply in; None: the activation's, or the weight's if wider.
    compute_dtype: str | None

    def value(self, dtype: Any) -> jax.Array:
        """The whole weight in `dtype`."""
        raise NotImplementedError

    def materialize(self, dtype: Any = None) -> jax.Array:
        return unboxed(self).value(self.dtype if dtype is None else dtype)

    def parts(self) -> tuple[Any, list[jax.Array], Callable[[Any, Any], Self]]:
        """(arrays that are constants, real arrays that may have gradients, how to put
        the two together again)."""
        return self, [], lambda data, _: data


@adapted_leaf
class Quantized(QuantizedValue, StoredWeight):
    """value = book[codes] * scales, block by block; see `jpeft.formats.blocks`.

    codes: uint8 (int8 for signed ones), (*stack, *rows, K', *columns); 4-bit ones two a
        byte.
    scales: float32 (float16 in GGUF's formats) (*stack, *rows, blocks, *columns); with
        `nested`, bytes.
    nested, offset: of doubly quantised scales, float32 (*stack, groups) and (*stack,).
    zeros: uint8, the zero points of asymmetric formats; float16, the least values of
        blocks in "q4_1".
    book: float32 (*stack, 2^bits), a code book learned from the weight.
    order: the weight's axes in the order above; lead: how many are stack or rows.
    inner: the sizes of the blocked axes.  element: the dtype the weight has.
    names: of the weight's axes, if it was boxed.
    searched: the codes cannot be recomputed from the weight (LoftQ searched for them).

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = jpeft.quantize("nf4")(jax.random.key(0), {"kernel": jnp.ones((64, 5))})
    >>> leaf = params["kernel"]
    >>> leaf.shape, leaf.dtype, leaf.format, leaf.codes.shape
    ((64, 5), dtype('float32'), 'nf4', (32, 5))
    """

    base: Any = frozen(default=None)
    codes: Any = frozen()
    scales: Any = frozen()
    zeros: Any = frozen(default=None)
    book: Any = frozen(default=None)
    nested: Any = frozen(default=None)
    offset: Any = frozen(default=None)
    format: str = static()
    block_size: int | str = static()
    order: tuple[int, ...] = static()
    stack: int = static(default=0)
    lead: int = static(default=0)
    inner: tuple[int, ...] = static()
    element: str = static(default="float32")
    compute_dtype: str | None = static(default=None)
    names: tuple[Any, ...] | None = static(default=None)
    searched: bool = static(default=False)

    def __post_init__(self) -> None:
        targets.prepare()

    # -- the weight it stands for -----------------------------------------------------

    @property
    def shape(self) -> tuple[int, ...]:
        codes = unbox(self.codes).shape
        sizes = (*codes[: self.lead], *self.inner, *codes[self.lead + 1 :])
        return tuple(sizes[self.order.index(k)] for k in range(len(sizes)))

    @property
    def dtype(self) -> Any:
        return jnp.dtype(self.element)

    @property
    def keeps_arrays(self) -> bool:
        return self.searched

    @property
    def kind(self) -> Format:
        return FORMATS[self.format]

    @property
    def length(self) -> int:
        """Elements along the blocked axis, K."""
        return math.prod(self.inner)

    @property
    def is_matrix(self) -> bool:
        """Blocks run down the columns of a matrix, which the 4-bit kernels know."""
        return self.lead == self.stack

    @property
    def bits_per_parameter(self) -> float:
        """Stored bits for each parameter of the weight."""
        stored = sum(unbox(x).nbytes for x in array_fields(self).values())
        return 8.0 * stored / self.size

    @property
    def sharding(self) -> Any:
        """The sharding of the weight, from that of its codes."""
        codes = unbox(self.codes)
        found = getattr(codes, "sharding", None)
        if not isinstance(found, NamedSharding):
            return found
        return NamedSharding(found.mesh, self._spec(found.spec))

    @property
    def typed_sharding(self) -> Any:
        place = compat.typed_sharding(unbox(self.codes))
        if place is None:
            return None
        spec = whole_shards(self._spec(place.spec), self.shape, place.mesh)
        return NamedSharding(place.mesh, spec)

    def _spec(self, of_codes: PartitionSpec) -> PartitionSpec:
        """The weight's, from that of its codes."""
        axes = self._axes_of_codes()
        full = (*of_codes, *[None] * (len(axes) - len(of_codes)))
        at = dict(zip(axes, full, strict=True))
        return PartitionSpec(*map(at.get, range(self.ndim)))

    def _axes_of_codes(self) -> tuple[int, ...]:
        """For each axis of the codes the weight's axis; for K the first blocked one."""
        return (*self.order[: self.lead + 1], *self.order[self.after :])

    def labels(self) -> dict[str, list[Hashable]]:
        axes, stack = self._axes_of_codes(), self.order[: self.stack]
        found: dict[str, list[Hashable]] = {}
        for name, x in array_fields(self).items():
            of_matrix = name in ("nested", "offset", "book")
            own = [None] * (unbox(x).ndim - self.stack)
            sizes = unbox(x).shape
            found[name] = (
                [*stack, *own]
                if of_matrix
                # One scale for the whole axis: there is nothing to shard.
                else [k if n > 1 else None for k, n in zip(axes, sizes, strict=True)]
            )
        return found

    def weight_box(self) -> Any:
        if not is_box(self.codes):
            return None
        return with_names(self.codes, np.zeros(0, np.float32), self.names or ())

    # -- its values -------------------------------------------------------------------

    def plain_scales(self) -> jax.Array:
        """The scales, not quantised themselves.

        Where shardings are part of types, that of the codes they come from: JAX could
        not tell, since groups of them run across the matrix.
        """
        if self.nested is None:
            return self.scales
        of: Any = lambda *a: double.dequantize_scales(
            double.Nested(*a), self.lead, self.stack
        )
        types = compat.typed_sharding(self.scales)
        if types is not None:
            of = jax.sharding.auto_axes(of, out_sharding=types)
        return of(self.scales, self.nested, self.offset)

    def with_plain_scales(self) -> Self:
        """The same weight with scales that are not quantised themselves."""
        if self.nested is None:
            return self
        return self.replace(scales=self.plain_scales(), nested=None, offset=None)

    def blocks(self) -> Blocks:
        return Blocks(self.codes, self.plain_scales(), self.zeros, self.book)

    def value(self, dtype: Any) -> jax.Array:
        """The whole weight: products in float32, rounded once."""
        place = self.typed_sharding
        if place is None:
            return self._value(dtype)
        # As for `quantize_array`.
        arrays = array_fields(self)
        run: Any = jax.sharding.auto_axes(
            lambda arrays: self.replace(**arrays)._value(dtype), out_sharding=place
        )
        return run(arrays)

    def _value(self, dtype: Any) -> jax.Array:
        x = blocks.dequantize(
            self.blocks(),
            self.kind,
            self.block_size,
            self.lead,
            self.length,
            self.stack,
            dtype,
        )
        return self.uncanonical(x)

    def uncanonical(self, x: jax.Array) -> jax.Array:
        """(*stack, *rows, K, *columns) -> the weight's own axes."""
        x = x.reshape(*x.shape[: self.lead], *self.inner, *x.shape[self.lead + 1 :])
        return jnp.transpose(x, tuple(map(int, np.argsort(self.order))))

    def with_value(self, x: jax.Array) -> Self:
        """x, (float32) of the weight's shape, in this leaf's format and boxes.

        A matrix that is this leaf's own, but for rounding, keeps its codes and scales.
        Trap: quantising it again would move it, in formats without a code for -1
        ("dynamic8") and where scales are quantised too.  A learned format's book is
        used again where a new one is no nearer.
        """
        own: Any = unboxed(self)
        make = functools.partial(
            quantize_array,
            x,
            Layout(self.order, self.stack, self.lead, len(self.inner)),
            format=self.format,
            block_size=self.block_size,
            double_scales=self.nested is not None,
        )
        leaf = make()
        if self.kind.learned:
            leaf = _nearer(make(book=own.book), leaf, x)
        leaf = boxed(self.weight_box(), _own_where_same(own, leaf, x))
        return self.replace(**array_fields(leaf))

    def cast(self, dtype: Any) -> Self:
        """The same codes and scales, of a weight in `dtype`."""
        return self.replace(element=jnp.dtype(dtype).name)

    def check_stored(self, path: str) -> None:
        for name, x in array_fields(self).items():
            wanted, found = self._dtype_of(name), getattr(unbox(x), "dtype", None)
            if found is not None and found != wanted:
                raise ValueError(
                    f"{path}: the {name} of this {self.format} weight are {found}, not "
                    f"{wanted}: something was done to every array of the tree, and "
                    "those of a quantised weight are no numbers to cast or to average; "
                    'cast with jpeft.cast(params, "bfloat16"), and do arithmetic on '
                    "the adapters alone, jpeft.partition(params)[0]"
                )

    def _dtype_of(self, name: str) -> Any:
        if name == "codes" and self.kind.signed:
            return np.dtype(np.int8)
        if name in ("scales", "zeros") and self.kind.of_gguf:
            return self.kind.scale_dtype
        as_bytes = name in ("codes", "zeros") or (
            name == "scales" and self.nested is not None
        )
        return np.dtype(np.uint8 if as_bytes else np.float32)

    # -- rows of a stack --------------------------------------------------------------

    def along_stack(self, f: Callable[[jax.Array, int], jax.Array], axis: int) -> Self:
        """`f(array, position)` on every array, at the position of a stack axis."""
        at = self.order.index(axis)
        assert at < self.stack
        return self.replace(**{n: f(x, at) for n, x in array_fields(self).items()})

    def without_stack_axis(self, axis: int) -> Self:
        """The leaf with one stack axis less, where its arrays have lost that axis."""
        order = tuple(k - (k > axis) for k in self.order if k != axis)
        return self.replace(order=order, stack=self.stack - 1, lead=self.lead - 1)

    @property
    def after(self) -> int:
        """Where, in `order`, the columns begin."""
        return self.lead + len(self.inner)

    def array_axis(self, at: int) -> int:
        """Of the codes: the axis that holds the weight's axis at this place in `order`,
        which is none of the blocked ones."""
        return at if at < self.lead else at - len(self.inner) + 1

    def is_stack(self, axis: int) -> bool:
        return self.order.index(axis) < self.stack

    def unstack(self) -> tuple[Any, Any, Callable[[Any, Any], Any]] | None:
        at = self.order.index(0)
        if self.lead <= at < self.after:
            return None  # a slice through every block
        leaf, constant = self, {}
        if at >= self.stack:  # a row or a column of each matrix
            leaf = self.with_plain_scales()
            constant = {} if self.book is None else {"book": self.book}
        place = self.array_axis(at)
        arrays = {n: x for n, x in array_fields(leaf).items() if n not in constant}
        if any(x.shape[place] != self.shape[0] for x in arrays.values()):
            return None  # one scale for all of them
        scanned = {n: jnp.moveaxis(x, place, 0) for n, x in arrays.items()}
        template = leaf.replace(
            **dict.fromkeys(array_fields(leaf)),
            order=tuple(k - 1 for k in self.order if k != 0),
            stack=self.stack - (at < self.stack),
            lead=self.lead - (at < self.lead),
        )
        return scanned, constant, lambda row, kept: template.replace(**row, **kept)

    # -- for a mesh -------------------------------------------------------------------

    def for_shards(self, spec: PartitionSpec, mesh: Any) -> Self | None:
        """Stack, rows and columns are cut anywhere; the blocked axes only along the
        first of them, between whole blocks and whole groups of packed codes.

        Groups of nested scales run across a matrix, so a shard of one gets plain ones.
        """
        parts = [parts_of(names, mesh) for names in tuple(spec)]
        parts += [1] * (self.ndim - len(parts))
        cut = [k for k in range(self.ndim) if parts[k] > 1]
        if all(self.is_stack(k) for k in cut):
            return self
        blocked = self.order[self.lead : self.after]
        leaf = self.with_plain_scales()
        if not any(k in blocked for k in cut):
            return leaf
        first, n = blocked[0], parts[blocked[0]]
        unit = GROUP if self.kind.packed else 1
        if isinstance(self.block_size, int):
            unit = max(unit, self.block_size)
        whole = self.length % (n * unit) == 0 and isinstance(self.block_size, int)
        if any(k in blocked and k != first for k in cut) or not whole:
            return None
        return leaf.replace(inner=(self.inner[0] // n, *self.inner[1:]))


def parts_of(names: Any, mesh: Any) -> int:
    """Into how many parts an entry of a partition specification cuts its axis."""
    each = names if isinstance(names, tuple) else (names,)
    return math.prod(mesh.shape[a] for a in each if a is not None)


# --- making one ----------------------------------------------------------------------


class Layout(NamedTuple):
    """order: the weight's axes, canonically; of them `stack` and then others up to
    `lead` come before the blocked ones."""

    order: tuple[int, ...]
    stack: int
    lead: int
    blocked: int


def arrangement(axes: str, kind: str) -> Layout:
    """Of a weight with these axis labels."""
    s, i, o = ([k for k, c in enumerate(axes) if c == g] for g in "sio")
    if kind == EMBEDDING:
        return Layout((*s, *i, *o), len(s), len(s) + len(i), len(o))
    return Layout((*s, *i, *o), len(s), len(s), len(i))


def as_it_is(ndim: int) -> Layout:
    """Blocks in the array's own memory order."""
    return Layout(tuple(range(ndim)), 0, 0, ndim)


def nested_order(scales: jax.Array, axis: int) -> jax.Array:
    """Scales flat, in the order in which bitsandbytes counts them."""
    return jnp.moveaxis(scales, axis, -1).reshape(-1)


def quantize_array(
    x: jax.Array,
    layout: Layout,
    *,
    format: str,
    block_size: int | str,
    double_scales: bool,
    compute_dtype: str | None = None,
    book: jax.Array | None = None,
) -> Quantized:
    """x as a leaf.  The arithmetic is one jitted program a shape.

    book: see `jpeft.formats.blocks.quantize`.
    """
    x = compat.on_device(x)
    order, stack, lead, blocked = layout
    make = functools.partial(
        _arrays,
        layout=layout,
        format=format,
        block_size=block_size,
        double_scales=double_scales,
    )
    inner = tuple(x.shape[k] for k in order[lead : lead + blocked])
    leaf = lambda arrays: Quantized(
        **arrays,
        format=format,
        block_size=block_size,
        order=order,
        stack=stack,
        lead=lead,
        inner=inner,
        element=jnp.dtype(x.dtype).name,
        compute_dtype=compute_dtype,
    )
    place = compat.typed_sharding(x)
    if place is None:
        return leaf(make(x, book))
    # Blocks run across axes as types of shardings cannot: the compiler finds the way,
    # and the result's types are those of the weight's axes.
    bare = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype)
    shapes = jax.eval_shape(make, *jax.tree.map(bare, (x, book)))
    specs = leaf_specs(leaf(shapes), place.spec)
    types = {
        n: None
        if shape is None
        else NamedSharding(
            place.mesh, whole_shards(getattr(specs, n), shape.shape, place.mesh)
        )
        for n, shape in shapes.items()
    }
    run: Any = jax.sharding.auto_axes(make, out_sharding=types)
    return leaf(run(x, book))


def _quantized_arrays(
    x: jax.Array,
    book: jax.Array | None,
    *,
    layout: Layout,
    format: str,
    block_size: int | str,
    double_scales: bool,
) -> dict[str, Any]:
    order, stack, lead, blocked = layout
    x = jnp.transpose(x, order)
    x = x.reshape(*x.shape[:lead], -1, *x.shape[lead + blocked :])
    q = blocks.quantize(x, FORMATS[format], block_size, lead, stack, book)
    made = {"codes": q.codes, "scales": q.scales, "zeros": q.zeros, "book": q.book}
    # As those of a channel, scales in float16 are not quantised in turn.
    plain = FORMATS[format].of_gguf or not isinstance(block_size, int)
    if double_scales and not plain:
        nested = double.quantize_scales(q.scales, lead, stack)
        made |= {
            "scales": nested.codes,
            "nested": nested.absmax,
            "offset": nested.offset,
        }
    return made


_arrays = jax.jit(
    _quantized_arrays,
    static_argnames=("layout", "format", "block_size", "double_scales"),
)


@jax.jit
def _own_where_same(own: Quantized, made: Quantized, x: jax.Array) -> Quantized:
    """What was made of x; `own` for the matrices in which x is its value."""
    value = own.materialize(jnp.float32)
    # What an adapter that learned nothing adds is the rounding of a few sums.
    near = 8 * np.finfo(np.float32).eps * _of_matrices(own, jnp.max, jnp.abs(value))
    far = _of_matrices(own, jnp.max, jnp.abs(x.astype(jnp.float32) - value))
    return _either(far <= near, own, made)


@jax.jit
def _nearer(a: Quantized, b: Quantized, x: jax.Array) -> Quantized:
    """Of each matrix the one whose squared distance from x is less, a if equal."""

    def error(q: Quantized) -> jax.Array:
        off = jnp.square(x.astype(jnp.float32) - q.materialize(jnp.float32))
        return _of_matrices(q, jnp.mean, off)

    return _either(error(a) <= error(b), a, b)


def _of_matrices(q: Quantized, f: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
    """f over each matrix of x, of the weight's shape; in the order of the codes."""
    stack = q.order[: q.stack]
    found = f(x, tuple(k for k in range(x.ndim) if k not in stack))
    return jnp.transpose(found, tuple(map(sorted(stack).index, stack)))


def _either(first: jax.Array, a: Quantized, b: Quantized) -> Quantized:
    """The arrays of a for the matrices where `first` is true, those of b elsewhere."""
    of = lambda x: jnp.expand_dims(first, tuple(range(first.ndim, x.ndim)))
    arrays = array_fields(a)
    return b.replace(
        **{n: jnp.where(of(x), arrays[n], x) for n, x in array_fields(b).items()}
    )


def boxed(box: Any, leaf: Quantized) -> Quantized:
    """The leaf with boxes on its arrays, and the names of the weight's own."""
    if not is_box(box):
        return leaf
    axes = field_axes(leaf)
    arrays = {n: rebox(box, x, axes[n]) for n, x in array_fields(leaf).items()}
    return leaf.replace(**arrays, names=names_of(box))
