"""`AdaptedLeaf`: what stands in a parameter tree where an array stood.

A leaf holds `base` (the array, or another adapted leaf: that is how methods compose)
and the arrays of its method.  Each field declares its role once, in the class:

    trainable   gets gradients and optimiser state, is saved
    frozen      belongs to the base; never moves
    static      part of the tree's structure, not an array
    transient   put there by `adapt` for one call, absent from stored trees

and each array its axes, and what it is where the leaf does nothing:

    a: Any = trainable("sir")           (*stack, *in, rank)
    b: Any = trainable("sro", off=0)    (*stack, rank, *out), zero for the base's value

From this table follow the labels of axes (`jpeft.adapt.labels`), first shapes, names of
boxes, shardings and what is checked when an adapter is loaded.

Laws, checked by the tests for every kind of leaf:

    shape(leaf) == shape(base)   dtype(leaf) == dtype(base)
    disabled(leaf) has the leaf's structure and acts as its base
    materialize(leaf) is the weight that acts as the leaf does, where there is one
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, ClassVar, Self, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.sharding import PartitionSpec

from jpeft.boxes import is_box, rebox, unbox
from jpeft.serialization import let_serialize

TRAINABLE, FROZEN, STATIC, TRANSIENT = "trainable", "frozen", "static", "transient"
T = TypeVar("T")
L = TypeVar("L", bound="AdaptedLeaf")


def trainable(
    axes: Sequence[str] | None = None, *, off: float | str | None = None, **kwargs: Any
) -> Any:
    """An array that trains.

    axes: where its axes come from, a name each: "s", "i", "o" are the stack, input and
        output axes of the weight, "*" all of its axes; anything else is one axis of the
        leaf's own ("r", the rank; a letter, or a word in a tuple).  None: all are its
        own, and nothing moves them.
    off: what stands there in `disabled`: a number, or the field that has it.
    """
    return dataclasses.field(
        metadata={"role": TRAINABLE, "axes": axes, "off": off}, **kwargs
    )


def frozen(
    axes: Sequence[str] | None = None, *, off: float | str | None = None, **kwargs: Any
) -> Any:
    """An array that does not train; see `trainable`."""
    return dataclasses.field(
        metadata={"role": FROZEN, "axes": axes, "off": off}, **kwargs
    )


def static(**kwargs: Any) -> Any:
    return dataclasses.field(metadata={"role": STATIC}, **kwargs)


def transient(**kwargs: Any) -> Any:
    return dataclasses.field(default=None, metadata={"role": TRANSIENT}, **kwargs)


class Path(str):
    """A leaf's path, for messages only: equal to every other `Path`.

    It is part of the static structure of a leaf inside one call of `adapt`.  If two
    layers differed by it, each would compile its own copy of an inner `jit`.
    """

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Path)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return 0


# Every kind of leaf by its class name, so that a checkpoint can name it.
KINDS: dict[str, type[AdaptedLeaf]] = {}


@dataclass_transform(
    kw_only_default=True,
    frozen_default=True,
    eq_default=False,
    field_specifiers=(trainable, frozen, static, transient),
)
def adapted_leaf(cls: type[T]) -> type[T]:
    """Makes `cls` a frozen dataclass and a pytree node, and enters it in `KINDS`."""
    cls = dataclasses.dataclass(frozen=True, eq=False, kw_only=True, repr=False)(cls)
    roles = {f.name: f.metadata["role"] for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    statics = [n for n, r in roles.items() if r == STATIC]
    jax.tree_util.register_dataclass(
        cls,
        data_fields=[n for n, r in roles.items() if r != STATIC],
        meta_fields=statics,
    )
    with contextlib.suppress(ValueError):  # a notebook cell that runs again
        _let_export(cls, statics)
    let_serialize(cls, stored)
    KINDS[cls.__name__] = cls  # type: ignore[assignment]
    return cls


def _let_export(cls: type, statics: list[str]) -> None:
    """Lets `jax.export` write programs whose arguments hold leaves of this kind."""

    def write(values: tuple[Any, ...]) -> bytes:
        # A `Path` equals every other one, so it must not come back as a string.
        is_path = [isinstance(x, Path) for x in values]
        plain = [str(x) if p else x for p, x in zip(is_path, values, strict=True)]
        tagged = list(zip(is_path, plain, strict=True))
        text = repr(tagged)
        try:
            same = ast.literal_eval(text) == tagged
        except (ValueError, SyntaxError):
            same = False
        if not same:
            raise TypeError(
                f"jax.export cannot write a {cls.__name__}: its static fields "
                f"{dict(zip(statics, values, strict=True))} are not all numbers, "
                "strings and tuples of such; export a function of the arrays, "
                "jax.tree.leaves(params)"
            )
        return text.encode()

    def read(text: bytes | bytearray) -> tuple[Any, ...]:
        tagged = ast.literal_eval(text.decode())
        return tuple(Path(x) if is_path else x for is_path, x in tagged)

    export.register_pytree_node_serialization(
        cls,
        serialized_name=f"jpeft.{cls.__name__}",
        serialize_auxdata=write,
        deserialize_auxdata=read,
    )


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class AdaptedLeaf:
    """A weight with a method attached.  See the module's docstring for the laws.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = jpeft.lora(rank=2)(jax.random.key(0), {"kernel": jnp.ones((5, 3))})
    >>> leaf = params["kernel"]
    >>> isinstance(leaf, jpeft.AdaptedLeaf), leaf.shape, leaf.base.shape, leaf.a.shape
    (True, (5, 3), (5, 3), (5, 2))
    """

    base: Any = frozen()
    # The transform that made this leaf ("lora-1a2b3c4d"): the same one refuses to be
    # applied twice.
    origin: str = static(default="")
    path: Path = static(default=Path(""))
    key: Any = transient()

    # True: the leaf is a weight like any other (its value may be used wherever an
    # array may), so nothing is lost when `adapt` takes its value at once.
    is_value: ClassVar[bool] = False
    # True: the base plays no part in the value, only in `unload`.
    replaces_base: ClassVar[bool] = False

    __array_priority__ = 100

    def instead(self, name: str) -> str:
        """What a refusal tells the user to type, where a model uses the weight `name`
        in a way for which the leaf has no rule."""
        leave = f"Leave it out (exclude={name!r})"
        if not all(map(merges, layers(self))):
            return leave
        return (
            f"{leave}, or let that one equation use its full value: "
            'jpeft.adapt(fn, materialize="allow")'
        )

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(jnp.shape(unbox(self.base)))

    @property
    def dtype(self) -> Any:
        return unbox(self.base).dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def effective(self, w: jax.Array) -> jax.Array:
        """The method's formula: the weight that acts as the leaf does over a base `w`.

        w: in float32 (or wider), the dtype of the result.  The leaf is out of its boxes
        (`nnx.Param`, `nn.Partitioned`).  Not defined for a leaf that is no change of
        the weight.
        """
        raise NotImplementedError

    def materialize(self, dtype: Any = None) -> jax.Array:
        """The effective weight, computed in float32 (or wider) and cast once.

        `dtype`: of the result; default the base's.
        """
        if not merges(self):
            raise TypeError(
                f"{whose(self)}a {type(self).__name__} is not a change of the weight, "
                "so it has no merged value; keep it attached, or jpeft.unload(params)"
            )
        leaf, wide = unboxed(self), wide_dtype(self.dtype)
        if is_leaf(leaf.base):
            w = leaf.base.materialize(wide)
        else:
            w = jnp.asarray(leaf.base).astype(wide)
        return leaf.effective(w).astype(self.dtype if dtype is None else dtype)

    def finalize(self) -> AdaptedLeaf:
        """The leaf that acts as this one, without what only makes its arrays: an
        encoder, a network for the training.  The leaf itself where there is none.
        """
        return self

    def begin(self) -> AdaptedLeaf:
        """The leaf that acts in its place.  `adapt` asks once a call, before anything
        acts."""
        return self.finalize()

    def labels(self) -> dict[str, list[Hashable]]:
        """The same for each array that the leaf has; None for an undeclared axis."""
        axes = getattr(self, "axes", None)
        declared = labels_of(type(self), "?" * self.ndim if axes is None else axes)
        return {
            n: declared[n] if n in declared else [None] * unbox(x).ndim
            for n, x in array_fields(self).items()
        }

    def unstack(self) -> tuple[Any, Any, Callable[[Any, Any], Any]] | None:
        """For a scan over axis 0: (what is scanned, what is constant, how to join a row
        of the one with the other).  None: the leaf has no rows of its own kind."""
        return None

    def for_shards(self, spec: PartitionSpec, mesh: Any) -> Self | None:
        """The leaf as one shard sees it, if its arrays can be sharded as `spec` shards
        the weight: its static fields describe one shard.  None: they cannot be."""
        if not is_leaf(self.base):
            return self
        base = self.base.for_shards(spec, mesh)
        return None if base is None else self.replace(base=base)

    def grown(self, axis: int) -> Self | None:
        """The leaf, whose base has more rows along an axis than its arrays know of:
        what it was on the old ones, nothing on the new.  None: there is none."""
        own, axes = array_fields(self), field_axes(self)
        at = {n: axes[n].index(axis) for n in own if axis in axes.get(n, ())}
        if not at:
            return None
        # On the host: a base on a mesh and arrays that are on none do not mix.
        own = {n: np.asarray(own[n]) for n in at}
        more = {n: self.shape[axis] - own[n].shape[k] for n, k in at.items()}

        def padded(x: np.ndarray, k: int, n: int) -> np.ndarray:
            return np.pad(x, [(0, n * (j == k)) for j in range(x.ndim)])

        longer = self.replace(**{n: padded(own[n], k, more[n]) for n, k in at.items()})
        idle = array_fields(disabled(longer))

        def joined(n: str, k: int) -> jax.Array:
            new = np.split(np.asarray(idle[n]), [own[n].shape[k]], k)[1]
            return jnp.asarray(np.concatenate([own[n], new], k))

        return longer.replace(**{n: joined(n, k) for n, k in at.items()})

    def draws(self) -> bool:
        """Whether the leaf acts at random where `adapt` has a key."""
        return getattr(self, "dropout", 0.0) > 0.0

    def replace(self, **changes: Any) -> Self:
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    def __repr__(self) -> str:
        arrays = ", ".join(
            f"{n}={_brief(getattr(self, n))}"
            for n, r in roles(self).items()
            if r not in (STATIC, TRANSIENT)
        )
        return f"{type(self).__name__}({arrays})"

    def __jax_array__(self) -> jax.Array:
        raise TypeError(
            f"{whose(self)}a {type(self).__name__} {self.shape} was used as an array. "
            "Call the model through jpeft.adapt(fn), which understands adapted leaves, "
            "or make plain arrays of them with jpeft.merge(params)"
        )

    def _no_array(self, *_: Any, **__: Any) -> Any:
        return self.__jax_array__()

    # NumPy would else make an array of one object, and Python and Flax' modules (which
    # read `self.kernel[...]`) say that something is missing here.
    __array__ = __getitem__ = __matmul__ = __rmatmul__ = _no_array
    __add__ = __radd__ = __mul__ = __rmul__ = _no_array
    __sub__ = __rsub__ = __truediv__ = __neg__ = _no_array


# --- what some leaves are besides ----------------------------------------------------


class StoredWeight(AdaptedLeaf):
    """A leaf that is the weight itself, stored in another way: there is no base."""

    @property
    def keeps_arrays(self) -> bool:
        """Whether the plain weight does not give its arrays, so that a checkpoint
        must."""
        return False

    @property
    def typed_sharding(self) -> Any:
        """Where the weight would be, if that is part of its arrays' types (on an
        explicit mesh); else None."""
        return None

    def weight_box(self) -> Any:
        """A box with the weight's axis names, or None."""
        return None

    def check_stored(self, path: str) -> None:
        """Raises for arrays that can no longer mean what they stand for."""

    def cast(self, dtype: Any) -> Self:
        """The same weight, of this floating-point dtype."""
        raise NotImplementedError

    def with_value(self, x: jax.Array) -> Self:
        """Another weight, stored in the same way."""
        raise NotImplementedError


class Linked:
    """A leaf that hands a value to another leaf of its sub-layer, or receives one."""

    def opens(self) -> frozenset[str]:
        """Names of the links that this leaf opens for a later one of its sub-layer."""
        return frozenset()

    def closes(self) -> frozenset[str]:
        """Names of the links that this leaf closes."""
        return frozenset()


class Sharing:
    """A leaf of a transform whose leaves have arrays in common."""

    def lends(self) -> Mapping[str, Any] | None:
        """Arrays that every leaf of one transform shares and this one holds."""
        return None

    def borrow(self, lent: Mapping[str, Any]) -> Self:
        """The leaf with what the leaves of its transform share, in transient fields."""
        return self


class Several:
    """A leaf in which several adapters may stand side by side; see `jpeft.select`."""

    def holds(self) -> int:
        """How many they are."""
        raise NotImplementedError

    def select(self, ids: jax.Array) -> Self:
        """The leaf acting with the one that `ids` (examples,) names for each."""
        raise NotImplementedError


class OfText:
    """A leaf that needs to know which positions of a text are virtual tokens, or
    that finds them."""

    def enters(self, program: Any, k: int) -> None:
        """`adapt` calls it before any leaf acts, with the traced program
        (`adapt.entry.Program`) whose k-th input the leaf is.  Raises where the model
        cannot be adapted in this way."""


# --- values with something owed ------------------------------------------------------


@dataclass_transform(
    kw_only_default=True,
    frozen_default=True,
    eq_default=False,
    field_specifiers=(frozen, static),
)
def carried(cls: type[T]) -> type[T]:
    """Makes `cls`, a kind of `Carried`, a frozen dataclass and a pytree node.

    Fields that are arrays (or trees of them) are declared `frozen()`, the rest
    `static()`.
    """
    cls = dataclasses.dataclass(frozen=True, eq=False, kw_only=True, repr=False)(cls)
    fields = {f.name: f.metadata["role"] for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    jax.tree_util.register_dataclass(
        cls,
        data_fields=[n for n, r in fields.items() if r != STATIC],
        meta_fields=[n for n, r in fields.items() if r == STATIC],
    )
    return cls


class Carried:
    """A computed value on its way, with something still owed.

    Keys that owe a prefix; scores in two parts; an output that waits through dropout.
    It goes where the value goes, through the equations for which `through` knows how.
    """

    def settle(self) -> Any:
        """The plain value."""
        raise NotImplementedError

    def through(self, it: Any, eqn: Any, ins: list[Any]) -> Any:
        """What the equation makes of it (a list for several outputs).  None: the
        interpreter first settles every carried operand."""
        return None

    def as_constant(self, it: Any, eqn: Any) -> Any:
        """What replaces it in an equation of a derivative.  Nothing may be owed there,
        since the derivative does not see what is owed."""
        return self.settle()

    def on_value(self, f: Callable[[Any], Any]) -> Any:
        """`f` done to the value, shape and dtype kept; what is owed stays owed."""
        return f(self.settle())

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(jnp.shape(self.settle()))

    @property
    def dtype(self) -> Any:
        return jnp.result_type(self.settle())

    @property
    def ndim(self) -> int:
        return len(self.shape)

    # The outer method's leaf adds to what the inner method's leaf makes, or scales it.

    def __add__(self, other: Any) -> Any:
        return self.on_value(lambda x: x + other)

    def __mul__(self, other: Any) -> Any:
        return self.on_value(lambda x: x * other)

    def replace(self, **changes: Any) -> Self:
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]


def is_carried(x: Any) -> bool:
    return isinstance(x, Carried)


def is_node(x: Any) -> bool:
    """Whether a value in a program is no array but a leaf or a carried value."""
    return isinstance(x, (AdaptedLeaf, Carried))


def _brief(x: Any) -> str:
    if is_leaf(x) or x is None:
        return repr(x)
    x = unbox(x)
    if not hasattr(x, "shape"):
        return type(x).__name__
    return f"{x.dtype}[{','.join(map(str, x.shape))}]"


def is_leaf(x: Any) -> bool:
    return isinstance(x, AdaptedLeaf)


def merges(leaf: AdaptedLeaf) -> bool:
    """Whether there is a weight that acts as the leaf does."""
    kind = type(leaf)
    own = kind.materialize is not AdaptedLeaf.materialize
    return own or kind.effective is not AdaptedLeaf.effective


def whose(leaf: AdaptedLeaf) -> str:
    """`path: ` for a message, or nothing."""
    return f"{str.__str__(leaf.path)}: " if len(leaf.path) else ""


def title(leaf: AdaptedLeaf) -> str:
    """For a message: what stands there."""
    return getattr(leaf, "known_as", type(leaf).__name__)


def is_stored(x: Any) -> bool:
    return isinstance(x, StoredWeight)


def roles(leaf: AdaptedLeaf | type[AdaptedLeaf]) -> dict[str, str]:
    """Field name -> role."""
    return {f.name: f.metadata["role"] for f in dataclasses.fields(leaf)}  # type: ignore[arg-type]


def array_fields(leaf: AdaptedLeaf) -> dict[str, Any]:
    """The method's own arrays (not the base, nothing transient), boxed or not."""
    return {
        n: getattr(leaf, n)
        for n, role in roles(leaf).items()
        if n != "base" and role in (TRAINABLE, FROZEN) and getattr(leaf, n) is not None
    }


def stored(leaf: AdaptedLeaf) -> dict[str, Any]:
    """What a file of the whole tree holds of it: the method's arrays, and the base."""
    base = {} if leaf.base is None else {"base": leaf.base}
    return {**base, **array_fields(leaf)}


@functools.cache
def _declared_axes(kind: type[AdaptedLeaf]) -> dict[str, Sequence[str]]:
    found = {f.name: f.metadata.get("axes") for f in dataclasses.fields(kind)}
    return {n: axes for n, axes in found.items() if axes is not None}


def labels_of(kind: type[AdaptedLeaf], axes: str) -> dict[str, list[Hashable]]:
    """For each array declared: what each of its axes is, beside a weight with these
    axes (one of "s", "i", "o" for each): an axis of the weight, or a name."""
    groups = {g: [k for k, c in enumerate(axes) if c == g] for g in "sio"}
    groups["*"] = list(range(len(axes)))
    return {
        n: [k for g in names for k in groups.get(g, [g])]
        for n, names in _declared_axes(kind).items()
    }


def field_axes(leaf: AdaptedLeaf) -> dict[str, tuple[int | None, ...]]:
    """For each array of the method the axis of the weight that each of its axes comes
    from; None for one of its own."""
    return {
        n: tuple(k if isinstance(k, int) else None for k in labels)
        for n, labels in leaf.labels().items()
    }


def shapes_beside(
    kind: type[AdaptedLeaf], shape: tuple[int, ...], axes: str, **own: int
) -> dict[str, tuple[int, ...]]:
    """Shapes of a leaf's arrays beside a weight.

    own: the sizes of its own axes, r=8 the rank; arrays with others are left out.
    """
    sizes = {**own, **dict(enumerate(shape))}
    return {
        n: tuple(sizes[k] for k in labels)  # type: ignore[index]
        for n, labels in labels_of(kind, axes).items()
        if all(k in sizes for k in labels)
    }


def disabled(x: Any) -> Any:
    """The leaf with arrays that make it act as its base, the structure the same."""
    if not is_leaf(x) or is_stored(x):
        return x
    changes: dict[str, Any] = {"base": disabled(x.base)}
    x = x.replace(**changes)
    for f in dataclasses.fields(x):
        off, old = f.metadata.get("off"), getattr(x, f.name)
        if off is None or old is None:
            continue
        if isinstance(off, str):
            given = getattr(x, off)
            given = given.materialize() if is_leaf(given) else unbox(given)
            one = lambda y, given=given: jnp.asarray(given).astype(y.dtype)
        else:
            one = lambda y, off=off: jnp.full_like(y, off)
        changes[f.name] = jax.tree.map(one, old)
    return x.replace(**changes)


def transients(leaf: AdaptedLeaf) -> dict[str, Any]:
    """The fields that `adapt` sets for one call."""
    fields = {n: getattr(leaf, n) for n, r in roles(leaf).items() if r == TRANSIENT}
    return {n: x for n, x in fields.items() if x is not None}


def check_whole(x: Any, path: str, caller: str) -> None:
    """Raises for a leaf without its arrays, as half of a partitioned tree holds it, or
    with arrays that something was done to."""
    for leaf in layers(x):
        for f in dataclasses.fields(leaf):
            needed = f.default is f.default_factory is dataclasses.MISSING
            role = f.metadata["role"]
            if needed and role != STATIC and getattr(leaf, f.name) is None:
                raise ValueError(
                    f"{path}: {caller} needs the whole tree, and here the "
                    f"{type(leaf).__name__} has no {f.name!r}: this is one half of "
                    "jpeft.partition(params); pass jpeft.combine(trainable, frozen)"
                )
        if isinstance(leaf, StoredWeight):
            leaf.check_stored(path)


def fold_key(x: Any, of: int, n: Any) -> Any:
    """The value with the n-th of a kind folded into the dropout key of each leaf in it.

    of: the name of what n counts, so that the second use of a weight and the second
        step of a loop get different keys.
    """
    if not is_leaf(x):
        return x
    base = fold_key(x.base, of, n)
    if x.key is None:
        return x if base is x.base else x.replace(base=base)
    key = jax.random.fold_in(jax.random.fold_in(x.key, of), n)
    return x.replace(base=base, key=key)


def has_key(x: Any) -> bool:
    return any(leaf.key is not None for leaf in layers(x))


def cast_array(x: Any, dtype: Any) -> Any:
    """Real floating-point numbers in `dtype`, everything else as it is."""
    found = getattr(x, "dtype", np.dtype(bool))
    return x.astype(dtype) if jnp.issubdtype(found, jnp.floating) else x


def map_fields(f: Callable[[Any], Any], leaf: L) -> L:
    """`f` on every array of the leaf and of the leaves below it."""
    below = leaf.base
    changes = {n: f(x) for n, x in array_fields(leaf).items()}
    if not is_stored(leaf):
        changes["base"] = map_fields(f, below) if is_leaf(below) else f(below)
    return leaf.replace(**changes)


def unboxed(leaf: L) -> L:
    """The leaf with every box around its arrays taken off."""
    return map_fields(unbox, leaf)


def wide_dtype(dtype: Any) -> Any:
    """The dtype that deltas are kept and summed in: float32, float64 beside float64."""
    return jnp.dtype("float64" if jnp.dtype(dtype) == jnp.float64 else "float32")


def innermost(x: Any) -> Any:
    """The weight under all adapters: an array, boxed if it was boxed, or a quantised
    leaf."""
    while is_leaf(x) and not is_stored(x):
        x = x.base
    return x


def box_of(x: Any) -> Any:
    """A box with the weight's axis names, if the weight is boxed."""
    x = innermost(x)
    return x.weight_box() if is_leaf(x) else x


def boxed_like(box: Any, leaf: AdaptedLeaf) -> AdaptedLeaf:
    """The leaf with boxes on its own arrays, named after the axes of `box`."""
    if not is_box(box):
        return leaf
    axes = field_axes(leaf)
    return leaf.replace(
        **{n: rebox(box, x, axes[n]) for n, x in array_fields(leaf).items()}
    )


def layers(x: Any) -> list[AdaptedLeaf]:
    """The adapted leaves standing on each other, the outermost first."""
    found = []
    while is_leaf(x):
        found.append(x)
        x = x.base
    return found


def named(leaf: AdaptedLeaf, path: str) -> AdaptedLeaf:
    """The leaf without boxes and with its path on every layer, for messages."""

    def down(x: Any) -> Any:
        return x.replace(path=Path(path), base=down(x.base)) if is_leaf(x) else x

    return down(unboxed(leaf))
