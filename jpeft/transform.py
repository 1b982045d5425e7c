"""The contract of every method: `(key, params, *, uses=None) -> params`.

Laws, checked by the tests for every method:

    transform(key, params) is pure; params is not touched
    unload(transform(key, params)) is params, bit for bit
    from_config(transform.to_config()) == transform
    a leaf's key derives from its path: another layer more changes no other leaf
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jpeft import compat
from jpeft.boxes import unbox
from jpeft.checks import check_fields, shown
from jpeft.finite import all_finite
from jpeft.leaf import (
    AdaptedLeaf,
    array_fields,
    box_of,
    boxed_like,
    innermost,
    is_leaf,
    is_stored,
    layers,
    wide_dtype,
)
from jpeft.tree.beside import beside
from jpeft.tree.layout import UNUSED, LeafUse, layouts
from jpeft.tree.paths import Slots, slots, suggest, weight
from jpeft.tree.sublayers import weights_of_parts
from jpeft.tree.where import Where, asks_parts, select
from jpeft.types import PyTree

# Every method by its name, for configurations.
METHODS: dict[str, type[Transform]] = {}
T = TypeVar("T", bound="type[Transform]")
Pattern = tuple[tuple[str, Any], ...]


def method(name: str) -> Callable[[T], T]:
    """Enters a transform's class, a dataclass, in the table of methods.

    The class is the method's factory too: its fields are the arguments, each with its
    default and its check, whether the values come by a call or from a configuration.
    """

    def enter(cls: T) -> T:
        cls.name = name
        cls.__init__ = _naming_arguments(cls)  # type: ignore[method-assign]
        METHODS[name] = cls
        return cls

    return enter


def _naming_arguments(cls: type[Transform]) -> Callable[..., None]:
    """Its `__init__`, which says of arguments that do not fit which ones there are."""
    init = cls.__init__

    @functools.wraps(init)
    def __init__(self: Transform, *args: Any, **kwargs: Any) -> None:
        if misfit := _misfit(cls, len(args), kwargs, "argument", "call"):
            raise TypeError(misfit)
        init(self, *args, **kwargs)

    return __init__


def _misfit(
    cls: type[Transform], by_place: int, named: Mapping[str, Any], item: str, whole: str
) -> str:
    """What is wrong with a transform's arguments, of which the first `by_place` have no
    names, or "".  item, whole: what the message calls one of them, and all."""
    fields = dataclasses.fields(cls)
    known = [f.name for f in fields]
    for key in named:
        if key not in known:
            return (
                f"{cls.name}: unknown {item} {shown(key)}; did you mean "
                f"{suggest(known, str(key), 1)[0]!r}? Known: {', '.join(sorted(known))}"
            )
    placed = [f.name for f in fields if not f.kw_only]
    if by_place > len(placed):
        taken = f"at most {len(placed)}: {', '.join(placed)}" if placed else "none"
        return (
            f"{cls.name}: {by_place} positional arguments, expected {taken}; write the "
            "others with their names"
        )
    placed = placed[:by_place]
    if twice := [n for n in placed if n in named]:
        return f"{cls.name}: {twice[0]!r} is given twice, by position and by name"
    needed = dataclasses.MISSING
    missing = [
        f.name
        for f in fields
        if f.default is needed and f.default_factory is needed
        if f.name not in named and f.name not in placed
    ]
    return f"{cls.name}: the {whole} lacks {missing}" if missing else ""


def written(default: Any, *, unless: Any = dataclasses.MISSING) -> Any:
    """A field that a configuration leaves out at the value `unless`, not at its default
    as other fields; without `unless` it is always written."""
    return dataclasses.field(default=default, metadata={"unless": unless})


@dataclasses.dataclass(frozen=True)
class Transform:
    """A frozen, hashable rewriting of a parameter tree."""

    name: ClassVar[str]

    def __post_init__(self) -> None:
        check_fields(self.name, self)

    def __call__(
        self,
        key: jax.Array,
        params: PyTree,
        *,
        uses: Mapping[str, LeafUse] | None = None,
    ) -> PyTree:
        raise NotImplementedError

    def to_config(self) -> dict[str, Any]:
        """The transform as plain data; `jpeft.from_config` makes it again.

        Raises ValueError where `where` is a Python function, which data cannot hold.
        """
        return {"method": self.name, **self._fields(_refuse_callable)}

    def describe(self) -> dict[str, Any]:
        """As `to_config`, with the names of functions where it has any."""
        return {"method": self.name, **self._fields(_name_callable)}

    def origin(self) -> str:
        """A mark for the leaves this transform makes."""
        return self._mark(_whole_as_int(self.describe()))

    def _mark(self, described: Any) -> str:
        text = json.dumps(described, sort_keys=True)
        return f"{self.name}-{zlib.crc32(text.encode()):08x}"

    def origins(self) -> frozenset[str]:
        """The marks of all leaves this transform makes, or made when 8.0 and 8 still
        had marks of their own."""
        return frozenset({self.origin(), self._mark(self.describe())})

    def parts(self) -> tuple[Transform, ...]:
        """The transforms that it applies, one after the other."""
        return (self,)

    def virtual_tokens(self) -> int:
        """How many virtual tokens each text needs: the `n` of
        `jpeft.prepend_virtual_tokens`."""
        return 0

    def _fields(self, of_callable: Callable[[Any], Any]) -> dict[str, Any]:
        out = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            left_out = f.metadata.get("unless", f.default)
            if value is not None and (
                value != left_out or left_out is dataclasses.MISSING
            ):
                pattern = f.name.endswith("_pattern")
                out[f.name] = dict(value) if pattern else _data(value, of_callable)
        return out

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Transform:
        """From a configuration without its `method`; unknown keys are refused."""
        if misfit := _misfit(cls, 0, fields, "key", "configuration"):
            raise ValueError(misfit)
        return cls(**fields)


@dataclasses.dataclass(frozen=True)
class LeafMethod(Transform):
    """A method that rewrites each selected weight by itself."""

    # False: the method acts on the whole array and asks nothing of its axes.
    needs_axes: ClassVar[bool] = True
    # False: what it makes has no merged value that a model could use in its place.
    has_value: ClassVar[bool] = True
    # What to type instead where a tree has nothing for it, or "".
    otherwise: ClassVar[str] = ""

    def selection(self) -> tuple[Where, Where]:
        """(where, exclude)."""
        raise NotImplementedError

    def accepts(self, use: LeafUse) -> bool:
        """Whether the method can act on such a weight."""
        raise NotImplementedError

    def attach(self, key: jax.Array, path: str, base: Any, use: LeafUse) -> AdaptedLeaf:
        """The leaf over `base` (unboxed); its key is the leaf's own."""
        raise NotImplementedError

    def patterns(self) -> dict[str, Pattern]:
        return {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name.endswith("_pattern")
        }

    def adapter_dtype(self, base: Any) -> Any:
        """float32, or what was asked for; float64 beside float64."""
        dtype = getattr(self, "dtype", None)
        return wide_dtype(base.dtype) if dtype is None else jnp.dtype(dtype)

    def __call__(
        self,
        key: jax.Array,
        params: PyTree,
        *,
        uses: Mapping[str, LeafUse] | None = None,
    ) -> PyTree:
        if compat.is_key_array(params):
            raise ValueError(f"{self.name}: the key comes first, then the parameters")
        flat = slots(params)
        chosen = self.targets(flat, uses)
        at = dict(flat.items())
        check_finite({p: at[p] for p in chosen}, self.name)
        made = {p: self.adapted(key, p, at[p], use) for p, use in chosen.items()}
        return flat.rebuild(made.get(p, x) for p, x in flat.items())

    def targets(
        self, flat: Slots, uses: Mapping[str, LeafUse] | None
    ) -> dict[str, LeafUse]:
        """The weights this transform rewrites, each checked."""
        known = layouts(flat, uses)
        at = dict(flat.items())
        candidates = {p: u for p, u in known.items() if self.accepts(u)}
        others = [p for p in flat.paths if p not in candidates]
        where, exclude = self.selection()
        chosen = select(
            candidates,
            at,
            where,
            exclude,
            method=self.name,
            others={p: known[p] for p in others if p in known},
            otherwise=self.otherwise,
            unused=self._unused(flat, known),
            parts=weights_of_parts(flat, uses) if asks_parts(where, exclude) else None,
        )
        out = {}
        doubtful = [p for p, named in chosen.items() if in_doubt(self, known[p], named)]
        for path, explicit in chosen.items():
            use = candidates[path]
            if not check_target(self, path, at[path], use, explicit, doubtful):
                continue
            out[path] = use
        self._check_patterns(out)
        return out

    def _unused(self, flat: Slots, known: Mapping[str, LeafUse]) -> list[str]:
        """What the method could act on by name, and the traced call does not use."""
        idle = [p for p, u in known.items() if u.kind == UNUSED]
        names = layouts(flat, None) if idle else {}
        return [p for p in idle if self.accepts(names[p])]

    def _check_patterns(self, chosen: Mapping[str, LeafUse]) -> None:
        for name, pattern in self.patterns().items():
            for regex, _ in pattern:
                if not any(re.fullmatch(regex, p) for p in chosen):
                    raise ValueError(
                        f"{self.name}: {name} key {regex!r} matches none of the "
                        f"selected weights; nearest: {suggest(list(chosen), regex)}"
                    )

    def adapted(
        self, key: jax.Array, path: str, slot: Any, use: LeafUse
    ) -> AdaptedLeaf:
        """The slot with this method's leaf over it, boxed and placed as its base is."""
        base = weight(slot)
        leaf = self.attach(path_key(key, path), path, base, use)
        leaf = place_beside(leaf, unbox(innermost(slot)))
        leaf = leaf.replace(base=slot, origin=self.origin())
        return boxed_like(box_of(slot), leaf)


def path_key(key: jax.Array, path: str) -> jax.Array:
    """A leaf's key.  crc32, never `hash`: that one differs from run to run."""
    return folded(key, zlib.crc32(path.encode()))


def folded(key: Any, n: int) -> jax.Array:
    """`fold_in`; raises ValueError for what is no key."""
    try:
        return jax.random.fold_in(key, n)
    except TypeError:
        raise ValueError(
            "a transform is called with a key and a tree, transform(jax.random.key(0), "
            f"params); as the key came a {type(key).__name__}"
        ) from None


def place_beside(leaf: AdaptedLeaf, base: Any) -> AdaptedLeaf:
    """New arrays on the devices of their base, sharded as the axes they share with
    it."""
    if isinstance(base, (compat.Tracer, jax.ShapeDtypeStruct)):
        return leaf
    places = beside(leaf, base)
    arrays = array_fields(leaf)
    return leaf.replace(**{n: jax.device_put(arrays[n], p) for n, p in places.items()})


# --- checks --------------------------------------------------------------------------


def in_doubt(transform: LeafMethod, use: LeafUse, explicit: bool) -> bool:
    """Whether the axes of a selected weight are not known as the method needs them."""
    return bool(
        transform.needs_axes
        and use.doubt
        and not (explicit and _may_be_whole(transform, use))
    )


def _may_be_whole(transform: LeafMethod, use: LeafUse) -> bool:
    """Whether its axes are known, and where the model changes it, or has a gradient
    rule of its own for it, a full value could take its place."""
    return use.axes is not None and (transform.has_value or not use.uses)


def check_target(
    transform: LeafMethod,
    path: str,
    slot: Any,
    use: LeafUse,
    explicit: bool,
    doubtful: Sequence[str] = (),
) -> bool:
    """Raises if the method must not act here.  False: leave it out (a preset met an
    array that does not train, such as a counter).

    doubtful: all selected weights whose axes are in doubt, for the message.
    """
    x, name = weight(slot), transform.name
    if not jnp.issubdtype(x.dtype, jnp.floating):
        if not explicit and not transform.needs_axes:
            return False
        real = not jnp.issubdtype(x.dtype, jnp.complexfloating)
        raise ValueError(
            f"{path}: {name} needs a real floating-point weight, this one is "
            f"{x.dtype}; exclude={path!r}" + (", or cast it first" if real else "")
        )
    if in_doubt(transform, use, explicit):
        every = [path, *(p for p in doubtful if p != path)]
        leave = f"exclude={every if len(every) > 1 else path!r}"
        remedy = (
            "pass uses=jpeft.find_uses(fn, params, *args), which looks at how the "
            f"model uses it, or {leave}"
            if not use.uses
            else f"{leave}, or name it in where= and call "
            'jpeft.adapt(fn, materialize="allow")'
            if _may_be_whole(transform, use)
            else leave
        )
        raise ValueError(
            f"{path}: {name} cannot tell input from output axes of shape {use.shape} "
            f"({use.doubt}); {remedy}"
        )
    for leaf in layers(slot):
        if leaf.origin == transform.origin():
            raise ValueError(
                f"{path}: this very {name} transform is already applied here; apply it "
                "to the base, jpeft.unload(params), or change where= or exclude="
            )
        if leaf.replaces_base:
            raise ValueError(
                f"{path}: this leaf trains whole ({type(leaf).__name__}), so {name} "
                f"would add nothing; exclude={path!r}"
            )
    return True


def check_finite(targets: Mapping[str, Any], name: str) -> None:
    """Raises if a weight holds NaN or infinity (skipped for weights JAX traces)."""
    found = {}
    for path, slot in targets.items():
        x = unbox(innermost(slot))
        if isinstance(x, compat.Tracer) or not isinstance(x, (jax.Array, np.ndarray)):
            continue
        if jnp.issubdtype(x.dtype, jnp.floating):
            found[path] = all_finite(x)
    bad = [p for p, ok in jax.device_get(found).items() if not ok]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise ValueError(
            f"{bad[0]}{more}: the base holds NaN or infinity, which no {name} adapter "
            "can train away; check how the weights were loaded"
        )


def matched(pattern: Pattern, path: str, default: Any) -> Any:
    """The value of the first pattern that matches the whole path."""
    return next((v for regex, v in pattern if re.fullmatch(regex, path)), default)


# --- data ----------------------------------------------------------------------------


def freeze_value(x: Any) -> Any:
    """Lists become tuples, so that transforms hash and compare."""
    if isinstance(x, (list, tuple)):
        return tuple(map(freeze_value, x))
    return x


def _data(x: Any, of_callable: Callable[[Any], Any]) -> Any:
    if isinstance(x, tuple):
        return [_data(y, of_callable) for y in x]
    if isinstance(x, Transform):
        return x.to_config() if of_callable is _refuse_callable else x.describe()
    if callable(x):
        return of_callable(x)
    return x.item() if isinstance(x, np.generic) else x


def _whole_as_int(x: Any) -> Any:
    """Equal numbers alike, 8.0 and 8: transforms that are equal have one mark."""
    if isinstance(x, dict):
        return {k: _whole_as_int(v) for k, v in x.items()}
    if isinstance(x, list):
        return [_whole_as_int(v) for v in x]
    return int(x) if isinstance(x, float) and x.is_integer() else x


def _callable_name(f: Any) -> str:
    return f"{getattr(f, '__module__', '?')}.{getattr(f, '__qualname__', repr(f))}"


def _refuse_callable(f: Any) -> Any:
    raise ValueError(
        f"where={_callable_name(f)} is a Python function, which a configuration cannot "
        "hold; select the same weights with a regular expression or a list of paths"
    )


def _name_callable(f: Any) -> Any:
    return {"callable": _callable_name(f)}


# --- chain ---------------------------------------------------------------------------


@method("chain")
@dataclasses.dataclass(frozen=True)
class Chain(Transform):
    """See `chain`."""

    transforms: tuple[Transform, ...]

    def __call__(
        self,
        key: jax.Array,
        params: PyTree,
        *,
        uses: Mapping[str, LeafUse] | None = None,
    ) -> PyTree:
        for k, transform in enumerate(self.transforms):
            params = transform(folded(key, k), params, uses=uses)
        return params

    def origins(self) -> frozenset[str]:
        return frozenset().union(*(t.origins() for t in self.transforms))

    def parts(self) -> tuple[Transform, ...]:
        return tuple(x for t in self.transforms for x in t.parts())

    def virtual_tokens(self) -> int:
        return max(t.virtual_tokens() for t in self.transforms)

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Transform:
        if set(fields) != {"transforms"}:
            raise ValueError(
                f"chain: expected the one key 'transforms', got "
                f"{shown(sorted(map(str, fields)))}"
            )
        if not isinstance(fields["transforms"], (list, tuple)):
            raise ValueError(
                f"chain: transforms={shown(fields['transforms'])}: expected a list of "
                "tables, one a transform"
            )
        return chain(*map(transform_from_config, fields["transforms"]))


def chain(*transforms: Transform) -> Chain:
    """One transform after the other, each on what the one before made.

    The k-th gets the key with k folded in.
    """
    for t in transforms:
        if not isinstance(t, Transform):
            raise TypeError(
                f"chain: expected transforms such as jpeft.lora(rank=8), got {t!r}"
            )
    if not transforms:
        raise ValueError("chain: expected at least one transform")
    return Chain(tuple(transforms))


def transform_from_config(config: Mapping[str, Any]) -> Transform:
    """The transform a `to_config` describes."""
    if not isinstance(config, Mapping) or "method" not in config:
        raise ValueError(
            f"a transform's configuration needs a key 'method', one of "
            f"{sorted(METHODS)}; got {shown(config)}"
        )
    name = config["method"]
    if not isinstance(name, str) or name not in METHODS:
        near = suggest(sorted(METHODS), str(name), 1)[0]
        raise ValueError(
            f"unknown method {shown(name)}; did you mean {near!r}? Known: "
            f"{sorted(METHODS)}"
        )
    return METHODS[name].from_fields({k: v for k, v in config.items() if k != "method"})


def is_adapted(params: PyTree) -> bool:
    """Whether a method has changed a weight.  A quantised weight alone is a base."""
    return any(is_leaf(x) and not is_stored(x) for x in slots(params).values)
