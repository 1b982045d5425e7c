"""Operations on quantised matrices, one shard a device.

XLA cannot see into a Pallas kernel, so it cannot cut one up.  It cuts up the loops of
the plain form badly, since each step slices along an axis that is cut over devices.  So
an operation says here how it splits, in terms of the axes of its equation,

    y[m, n] = sum over k of x[m, k] * W[k, n]      (transposed: k and n exchanged)

and each device runs the operation itself on its part:

    W cut along what is kept      a part of the columns each, nothing is sent
    W cut along what is summed    a part of the sum each, added up afterwards
    x cut along its tokens        W's codes and scales are gathered, never its values

The last two compete where one mesh axis cuts both x's tokens and W (fully sharded
training): what sends fewer bytes is done.

How a device gets its part depends on what is known when the program is traced:

    shardings are part of the types (`AxisType.Explicit`)     `jax.shard_map`
    they were declared (`jpeft.sharding.declare`)             `jax.shard_map`
    the compiler chooses them, on a CPU or GPU                `custom_partitioning`
    the compiler chooses them, on TPU                         the whole of W is made

On TPU there is no `custom_partitioning` (jax-ml/jax#38196), so that W's values are made
by XLA, which cuts them up as it would any weight, and sends them as such.  On a single
device, and inside a `shard_map` of the caller, it is the operation and nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jpeft import compat

# The mesh axes that cut one axis of an array; of an array, of an operation's letters.
Axes = tuple[str, ...]
Spec = tuple[Axes, ...]
Cuts = dict[str, Axes]

TOKENS = "m"


class Dim(NamedTuple):
    """An axis of an array.

    letter: the axis of the equation that it is, or None for one that is never cut.
    per: elements of the equation's axis for each stored entry: 2 for packed codes, the
        block size for scales.
    """

    letter: str | None
    per: int = 1


OWN = Dim(None)
Dims = tuple[Dim, ...]


@dataclasses.dataclass(frozen=True)
class Operation:
    """What is known of an operation on matrices.

    operands, results: the axes of its arrays.
    sizes: elements of each axis of the equation.
    units: a part of that axis is a multiple of so many elements.
    summed: the axis of a product that the result lacks.
    weights: how many operands, behind x, are the weight's.
    """

    operands: tuple[Dims, ...]
    results: tuple[Dims, ...]
    sizes: Mapping[str, int]
    units: Mapping[str, int]
    summed: str | None = None
    weights: int = 0

    @property
    def of_weight(self) -> range:
        return range(1, 1 + self.weights)

    def batched(self, size: int, flags: Sequence[bool]) -> Operation:
        """With an axis more, in front, on the operands that are flagged."""
        letter = f"s{sum(k.startswith('s') for k in self.sizes)}"
        grown = tuple(
            (Dim(letter), *dims) if flag else dims
            for dims, flag in zip(self.operands, flags, strict=True)
        )
        return dataclasses.replace(
            self,
            operands=grown,
            results=tuple((Dim(letter), *dims) for dims in self.results),
            sizes={**self.sizes, letter: size},
        )


# --- what is offered -----------------------------------------------------------------


def product(
    multiply: Callable[..., jax.Array],
    x: jax.Array,
    weight: Sequence[jax.Array],
    *,
    whole: Callable[..., jax.Array],
    dims: Sequence[Dims],
    sizes: Mapping[str, int],
    units: Mapping[str, int],
    transposed: bool,
) -> jax.Array:
    """multiply(x, *weight), on each device of its part.

    whole: the same in a form that XLA can cut up.
    x is (m, k), the result (m, n); k and n are exchanged if it is transposed.
    dims: the axes of each of the weight's arrays, in the letters "k" and "n"; codes
        come first.  sizes, units: of "k" and "n".
    """
    summed, kept = ("n", "k") if transposed else ("k", "n")
    tokens, out = Dim(TOKENS), (Dim(TOKENS), Dim(kept))
    operation = Operation(
        operands=((tokens, Dim(summed)), *_cuttable(dims, weight)),
        results=(out,),
        sizes={**sizes, TOKENS: x.shape[0]},
        units=units,
        summed=summed,
        weights=len(weight),
    )
    forms = _Forms(lambda *a: (multiply(*a),), lambda *a: (whole(*a),))
    (y,) = _vmappable(forms, operation)(x, *weight)
    return y


def elementwise(
    f: Callable[..., Sequence[jax.Array]],
    operands: Sequence[jax.Array],
    *,
    whole: Callable[..., Sequence[jax.Array]],
    dims: Sequence[Dims],
    results: Sequence[Dims],
    sizes: Mapping[str, int],
    units: Mapping[str, int],
) -> list[jax.Array]:
    """f(*operands), of which each part of a result depends on that part alone."""
    operation = Operation(_cuttable(dims, operands), tuple(results), sizes, units)
    forms = _Forms(lambda *a: tuple(f(*a)), lambda *a: tuple(whole(*a)))
    return list(_vmappable(forms, operation)(*operands))


def _cuttable(dims: Sequence[Dims], arrays: Sequence[jax.Array]) -> tuple[Dims, ...]:
    """A single entry serves all parts of an axis."""
    return tuple(
        tuple(OWN if n == 1 else dim for dim, n in zip(each, x.shape, strict=True))
        for each, x in zip(dims, arrays, strict=True)
    )


class _Forms(NamedTuple):
    """part: for one device.  whole: for the compiler to cut up."""

    part: Callable[..., tuple[jax.Array, ...]]
    whole: Callable[..., tuple[jax.Array, ...]]


def _vmappable(
    forms: _Forms, operation: Operation
) -> Callable[..., tuple[jax.Array, ...]]:
    """`custom_partitioning` knows nothing of `vmap`: here an axis of W's becomes one
    of the operation's, and an axis of x alone becomes more tokens."""

    @custom_vmap
    def run(*operands: jax.Array) -> tuple[jax.Array, ...]:
        return _on_devices(forms, operation, operands)

    @run.def_vmap
    def rule(size: int, flags: list[bool], *operands: jax.Array) -> Any:
        if operation.weights and not any(flags[k] for k in operation.of_weight):
            made = _with_more_tokens(forms, operation, size, flags, operands)
        else:
            axes = tuple(0 if flag else None for flag in flags)
            # Called with parts: the axis is shorter on each of several devices.
            mapped = lambda f: lambda *a: jax.vmap(f, axes)(*a)

            batched = _Forms(*map(mapped, forms))
            made = _vmappable(batched, operation.batched(size, flags))(*operands)
        return made, tuple(True for _ in made)

    return run


def _with_more_tokens(
    forms: _Forms, operation: Operation, size: int, flags: Sequence[bool], operands: Any
) -> tuple[jax.Array, ...]:
    def merged(x: jax.Array, dims: Dims, flag: bool) -> jax.Array:
        if not flag:
            x = jnp.broadcast_to(x, (size, *x.shape))
        at = dims.index(Dim(TOKENS))
        x = jnp.moveaxis(x, 0, at)
        return x.reshape(*x.shape[:at], -1, *x.shape[at + 2 :])

    moved = [
        x if k in operation.of_weight else merged(x, operation.operands[k], flags[k])
        for k, x in enumerate(operands)
    ]
    tokens = operation.sizes[TOKENS]
    larger = dataclasses.replace(
        operation, sizes={**operation.sizes, TOKENS: size * tokens}
    )
    (y,) = _vmappable(forms, larger)(*moved)
    at = operation.results[0].index(Dim(TOKENS))
    y = y.reshape(*y.shape[:at], size, tokens, *y.shape[at + 1 :])
    return (jnp.moveaxis(y, at, 0),)


# --- on the devices ------------------------------------------------------------------


def _on_devices(
    forms: _Forms, operation: Operation, operands: tuple[jax.Array, ...]
) -> tuple[jax.Array, ...]:
    mesh, known = _mesh_of(operands), _known.value
    kinds = set() if mesh.empty else set(mesh.axis_types)
    if kinds == {AxisType.Manual}:
        return forms.part(*compat.varying_alike(operands))
    if AxisType.Explicit in kinds:
        if kinds != {AxisType.Explicit}:
            raise ValueError(
                f"a quantised weight on a mesh with axis types {mesh.axis_types}: "
                "expected all of one kind; make the mesh with axis_types="
                f"(jax.sharding.AxisType.Auto,) * {len(mesh.axis_names)}, or enter "
                "jax.shard_map over all of its axes"
            )
        specs = [spec_of(jax.typeof(x).sharding, x.shape, mesh) for x in operands]
        return _manual(forms.part, operation, operands, mesh, specs, [])
    if known is not None and operation.weights and kinds <= {AxisType.Auto}:
        specs = [known.of(dims) for dims in operation.operands]
        wanted = [known.of(dims) for dims in operation.results]
        # What is known of the summed axis of x is the weight's.
        specs[0] = tuple(
            () if dim.letter == operation.summed else axes
            for dim, axes in zip(operation.operands[0], specs[0], strict=True)
        )
        return _manual(forms.part, operation, operands, known.mesh, specs, wanted)
    several = not mesh.empty and mesh.size > 1
    return lax.platform_dependent(
        *operands,
        tpu=forms.whole if several else forms.part,
        default=_automatic(forms.part, operation),
    )


def _mesh_of(operands: Sequence[jax.Array]) -> Any:
    """The mesh in use, else that of the operands' types, which has their mesh even
    where it does not have their shardings."""
    mesh = jax.sharding.get_abstract_mesh()
    for x in operands:
        if mesh.empty:
            mesh = jax.typeof(x).sharding.mesh
    return mesh


def _automatic(f: Any, operation: Operation) -> Callable[..., tuple[jax.Array, ...]]:
    """The compiler tells the operands' shardings when it is done with choosing them."""
    # Parts are traced when the caller's `with` is left: the kernels read this.
    precision = jax.config.jax_default_matmul_precision  # type: ignore

    # The jit holds f's constants, which `custom_partitioning` takes none of.
    run = custom_partitioning(jax.jit(f))

    def chosen(mesh: Any, shaped: Any, wanted: Any) -> Cuts:
        return choose(
            operation,
            dict(mesh.shape),
            [spec_of(x.sharding, x.shape, mesh) for x in shaped],
            [x.size * x.dtype.itemsize for x in shaped],
            [spec_of(y.sharding, y.shape, mesh) for y in wanted],
        )

    def partition(mesh: Mesh, shaped: Any, wanted: Any) -> Any:
        if mesh.empty:  # devices without names
            devices = sorted(shaped[0].sharding.device_set, key=lambda d: d.id)
            mesh, cuts = Mesh(np.array(devices), ("all",)), {}
        else:
            cuts = chosen(mesh, shaped, wanted)
        local = _local(f, operation, dict(mesh.shape), cuts)

        def lowered(*operands: jax.Array) -> tuple[jax.Array, ...]:
            with jax.default_matmul_precision(precision):
                return local(*operands)

        place = lambda specs: tuple(NamedSharding(mesh, s) for s in specs)
        into, out = _placed(operation, dict(mesh.shape), cuts)
        return mesh, lowered, place(out), place(into)

    def infer(mesh: Mesh, shaped: Any, wanted: Any) -> Any:
        cuts = {} if mesh.empty else chosen(mesh, shaped, [])
        _, out = _placed(operation, dict(mesh.shape), cuts)
        return tuple(NamedSharding(mesh, spec) for spec in out)

    def rule(mesh: Mesh, operands: Any, results: Any) -> Any:
        shapes = [tuple(x.shape) for x in operands]
        return sharding_rule(operation, shapes, dict(mesh.shape))

    run.def_partition(
        partition=partition,
        infer_sharding_from_operands=infer,
        sharding_rule=rule,
        # JAX refuses what it cannot name, such as half of a mesh axis; see `spec_of`.
        decode_shardings=False,
    )
    return run


def _manual(
    f: Any,
    operation: Operation,
    operands: tuple[jax.Array, ...],
    mesh: Any,
    specs: Sequence[Spec],
    wanted: Sequence[Spec],
) -> tuple[jax.Array, ...]:
    """The operands' shardings are known while the program is traced."""
    sizes = dict(mesh.shape)
    in_bytes = [x.size * x.dtype.itemsize for x in operands]
    cuts = choose(operation, sizes, specs, in_bytes, wanted)
    into, out = _placed(operation, sizes, cuts)
    run = jax.shard_map(
        _local(f, operation, sizes, cuts),
        mesh=mesh,
        in_specs=tuple(into),
        out_specs=tuple(out),
        check_vma=False,
    )
    if AxisType.Explicit in mesh.axis_types:
        place = lambda x, s: jax.sharding.reshard(x, NamedSharding(mesh, s))
        operands = tuple(map(place, operands, into))
    return run(*operands)


def _local(
    f: Any, operation: Operation, mesh: Mapping[str, int], cuts: Cuts
) -> Callable[..., tuple[jax.Array, ...]]:
    """What one device does with its parts of the operands."""

    def run(*operands: jax.Array) -> tuple[jax.Array, ...]:
        parts = [
            _entry(x, dims, operation, mesh, cuts)
            for x, dims in zip(operands, operation.operands, strict=True)
        ]
        over = cuts.get(operation.summed or "", ())
        return f(*parts) if not over else tuple(lax.psum(y, over) for y in f(*parts))

    return run


def _entry(
    x: jax.Array,
    dims: Dims,
    operation: Operation,
    mesh: Mapping[str, int],
    cuts: Cuts,
) -> jax.Array:
    """Of scales that serve several devices, the one that this device needs."""
    for k, dim in enumerate(dims):
        axes = cuts.get(dim.letter or "", ())
        if not axes or not _shared(dim, operation, mesh, axes):
            continue
        length = operation.sizes[dim.letter or ""] // _count(mesh, axes)
        start = lax.axis_index(axes) * length // dim.per
        x = lax.dynamic_slice_in_dim(x, start, 1, axis=k)
    return x


# --- what is declared ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Declared:
    """mesh; tokens: the axes that cut activations; weights: path, shape and
    specification of each weight's codes."""

    mesh: Mesh | AbstractMesh
    tokens: Axes
    weights: tuple[tuple[str, tuple[int, ...], Spec], ...]

    def __post_init__(self):
        # Every call of a jitted function asks for it.
        fields = (self.mesh, self.tokens, self.weights)
        object.__setattr__(self, "_hash", hash(fields))

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined]

    def of_codes(self, path: str, shape: tuple[int, ...]) -> Spec | None:
        """Of the codes of that weight, or of a row of its stack; None if they are
        reshaped or not known.  In a call a path may have more in front."""
        for name, whole, spec in self.weights:
            at_end = path == name or path.endswith("/" + name)
            if at_end and whole[len(whole) - len(shape) :] == shape:
                return spec[len(spec) - len(shape) :]
        return None


@dataclasses.dataclass(frozen=True)
class Known:
    """Of one product: the mesh axes that cut each axis of its equation; those of a
    stack all have what is here under "s"."""

    mesh: Mesh | AbstractMesh
    cuts: tuple[tuple[str, Axes], ...]

    def of(self, dims: Dims) -> Spec:
        cuts = dict(self.cuts)
        name = lambda dim: "s" if str(dim.letter).startswith("s") else dim.letter
        return tuple(cuts.get(name(dim) or "", ()) for dim in dims)


# Both are part of what `jit` remembers a program by.
_declared = jax.make_user_context(None)
_known = jax.make_user_context(None)


def declare(what: Declared) -> contextlib.AbstractContextManager[None]:
    return _declared(what)


def declared() -> Declared | None:
    return _declared.value


def known(
    mesh: Mesh | AbstractMesh, cuts: Cuts
) -> contextlib.AbstractContextManager[None]:
    """Products inside are of a weight that is cut so, by tokens cut as "m" says."""
    return _known(Known(mesh, tuple(sorted(cuts.items()))))


# --- who gets which part -------------------------------------------------------------


def choose(
    operation: Operation,
    mesh: Mapping[str, int],
    specs: Sequence[Spec],
    sizes: Sequence[int],
    wanted: Sequence[Spec],
) -> Cuts:
    """The mesh axes that cut each axis of the equation.

    mesh: its axes' sizes.  specs, sizes: of the operands, as they come, and in bytes.
    wanted: specifications of the results, where they are known.
    """
    cuts: Cuts = {}

    def take(letter: str, axes: Axes) -> None:
        for axis in axes:
            if mesh[axis] == 1 or any(axis in used for used in cuts.values()):
                continue
            more = (*cuts.get(letter, ()), axis)
            if _divides(operation, letter, _count(mesh, more)):
                cuts[letter] = more

    results = [_letters(d, s) for d, s in zip(operation.results, wanted, strict=False)]
    operands = [_letters(d, s) for d, s in zip(operation.operands, specs, strict=True)]
    if operation.summed is None:
        for found in (*results, *operands):
            for letter, axes in found.items():
                take(letter, axes)
        return cuts

    x, weight = operands[0], operands[1]
    y = results[0] if results else {}
    (kept,) = {"k", "n"} - {operation.summed}
    stack = [letter for letter in operation.sizes if letter.startswith("s")]
    for letter in stack:
        take(letter, weight.get(letter, ()))
        take(letter, x.get(letter, ()))
    rivals = {
        axis: letter
        for letter in (operation.summed, kept)
        for axis in weight.get(letter, ())
    }
    bytes_of_weight = sum(sizes[k] for k in operation.of_weight)
    for axis in x.get(TOKENS, ()):
        letter = rivals.get(axis)
        if letter is not None and _divides(operation, letter, mesh[axis]):
            n = mesh[axis]
            others = lambda found, axis=axis: math.prod(
                mesh[a] for axes in found.values() for a in axes if a != axis
            )
            codes = bytes_of_weight / others(weight)
            tokens = sizes[0] / others(x)
            made = sizes[0] * operation.sizes[kept] / operation.sizes[operation.summed]
            made /= others({TOKENS: x[TOKENS], kept: weight.get(kept, ())})
            # Kept: x is gathered, and the result changes hands.  Summed: x changes
            # hands, and the results are added up.
            moved = tokens + made / n if letter == kept else tokens / n + 2 * made
            if moved < codes:
                continue
        take(TOKENS, (axis,))
    take(operation.summed, weight.get(operation.summed, ()))
    take(kept, weight.get(kept, ()))
    take(operation.summed, x.get(operation.summed, ()))
    take(kept, y.get(kept, ()))
    take(TOKENS, y.get(TOKENS, ()))
    return cuts


def _divides(operation: Operation, letter: str, n: int) -> bool:
    """Whether n parts of that axis are whole units, and whole blocks or inside one."""
    size, unit = operation.sizes[letter], operation.units.get(letter, 1)
    if size % (n * unit):
        return False
    part = size // n
    pers = [d.per for dims in operation.operands for d in dims if d.letter == letter]
    return all(part % per == 0 or per % part == 0 for per in pers)


def _shared(
    dim: Dim, operation: Operation, mesh: Mapping[str, int], axes: Axes
) -> bool:
    """Whether one entry serves several parts."""
    return (operation.sizes[dim.letter or ""] // _count(mesh, axes)) % dim.per > 0


def _placed(
    operation: Operation, mesh: Mapping[str, int], cuts: Cuts
) -> tuple[list[PartitionSpec], list[PartitionSpec]]:
    """Specifications of operands and results."""

    def spec(dims: Dims) -> PartitionSpec:
        axes = [cuts.get(dim.letter or "", ()) for dim in dims]
        return PartitionSpec(
            *(
                None if not a or _shared(dim, operation, mesh, a) else a
                for dim, a in zip(dims, axes, strict=True)
            )
        )

    return [*map(spec, operation.operands)], [*map(spec, operation.results)]


def _letters(dims: Dims, spec: Spec) -> Cuts:
    return {
        dim.letter: axes
        for dim, axes in zip(dims, spec, strict=True)
        if dim.letter is not None
    }


def _count(mesh: Mapping[str, int], axes: Axes) -> int:
    return math.prod(mesh[a] for a in axes)


def spec_of(sharding: Any, shape: tuple[int, ...], mesh: Any) -> Spec:
    """The mesh axes of each axis of an array.

    Where the compiler has cut one by something else (it may split a mesh axis in two)
    it counts as whole, and is put together again.
    """
    if isinstance(sharding, NamedSharding):
        names = tuple(sharding.spec) + (None,) * (len(shape) - len(sharding.spec))
        return tuple(_axes(entry) for entry in names)
    whole = ((),) * len(shape)
    if sharding is None or sharding.is_fully_replicated or 0 in shape:
        return whole
    try:
        slices = sharding.devices_indices_map(shape)
    except ValueError:  # parts of different sizes
        return whole
    parts = [slices[device] for device in mesh.devices.flat]
    coordinates = dict(
        zip(mesh.axis_names, np.indices(mesh.devices.shape), strict=True)
    )
    large = [axis for axis, n in mesh.shape.items() if n > 1]

    def cut_by(k: int) -> Axes:
        starts = np.array([part[k].indices(shape[k])[0] for part in parts])
        step = max(1, int(np.min(starts[starts > 0], initial=shape[k])))
        place = (starts // step).reshape(mesh.devices.shape)
        n = shape[k] // step
        for count in range(1, len(large) + 1):
            for axes in itertools.permutations(large, count):
                if _count(mesh.shape, axes) != n:
                    continue
                index = 0
                for axis in axes:
                    index = index * mesh.shape[axis] + coordinates[axis]
                if np.array_equal(index, place):
                    return axes
        return ()

    return tuple(cut_by(k) for k in range(len(shape)))


def _axes(entry: Any) -> Axes:
    if isinstance(entry, str):
        return (entry,)
    return tuple(entry) if isinstance(entry, tuple) else ()


# --- what the compiler is told -------------------------------------------------------


def sharding_rule(
    operation: Operation, shapes: Sequence[tuple[int, ...]], mesh: Mapping[str, int]
) -> tuple[str, dict[str, int]]:
    """The equation in Shardy's notation, and the sizes of its compound factors.

    Along it the compiler carries shardings from operands to results and back.  x's
    summed axis stands alone: an activation must not be cut because a weight is.  So
    does an axis with too few units for the mesh, since half a mesh axis helps nobody.
    """
    own = iter(f"o{k}" for k in range(1000))
    largest = {letter: _unit(operation, letter, mesh) for letter in operation.sizes}
    sizes: dict[str, int] = {}
    alone: set[str] = set()

    def factor(dim: Dim, n: int) -> str:
        letter = dim.letter
        if letter is None or n * dim.per != operation.sizes[letter]:
            return next(own)
        whole = largest[letter]
        if whole is None or dim.per > whole:
            return next(own)
        if dim.per == whole:
            alone.add(letter)
            return letter
        minor = next(own)
        sizes[letter], sizes[minor] = n * dim.per // whole, whole // dim.per
        return f"({letter} {minor})"

    def array(dims: Dims, shape: tuple[int, ...], free: str | None = "") -> str:
        return " ".join(
            next(own) if dim.letter == free else factor(dim, n)
            for dim, n in zip(dims, shape, strict=True)
        )

    operands = [
        array(dims, shape, operation.summed if k == 0 else "")
        for k, (dims, shape) in enumerate(zip(operation.operands, shapes, strict=True))
    ]
    results = [
        array(dims, tuple(_entries(d, operation) for d in dims))
        for dims in operation.results
    ]
    text = f"{', '.join(operands)} -> {', '.join(results)}"
    return text, {k: n for k, n in sizes.items() if k not in alone}


def _unit(operation: Operation, letter: str, mesh: Mapping[str, int]) -> int | None:
    """Elements of the smallest part of an axis that all arrays can be cut into, or all
    but the scales; None if such parts are too few for the mesh."""
    size = operation.sizes[letter]
    arrays = (*operation.operands, *operation.results)
    pers = {d.per for dims in arrays for d in dims if d.letter == letter}
    least = max(operation.units.get(letter, 1), min(pers, default=1))
    if least == 1 == max(pers, default=1):
        return 1  # one entry an element: the compiler fills up what does not divide
    for unit in sorted({max(per, least) for per in pers}, reverse=True):
        parts = size // unit
        divides = all(parts % n == 0 for n in mesh.values())
        if size % unit == 0 and parts > 1 and divides:
            return unit
    return None


def _entries(dim: Dim, operation: Operation) -> int:
    return -(-operation.sizes[dim.letter or ""] // dim.per)


def whole_shards(
    spec: PartitionSpec, shape: tuple[int, ...], mesh: Any
) -> PartitionSpec:
    """The specification without the axes that do not divide evenly: replicated there.

    Scales of blocks are few, and a handful over many devices does not divide.
    """
    out = []
    for names, n in zip(tuple(spec), shape, strict=False):
        each = names if isinstance(names, tuple) else (names,)
        parts = math.prod(mesh.shape[a] for a in each if a is not None)
        out.append(names if n % parts == 0 else None)
    return PartitionSpec(*out)
