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
import zlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import jax
import numpy as np

from jpeft.checks import check_fields, shown
from jpeft.tree.layout import LeafUse
from jpeft.tree.paths import suggest
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
    """An `__init__` whose error, where an argument does not fit, lists them all."""
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
    """What is wrong with a transform's arguments, or "".

    by_place: how many of them are given without a name.  item, whole: what the message
    calls one of them, and all of them."""
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
    """A field that a configuration leaves out where its value is `unless`.

    Other fields are left out at their default.  Without `unless` it is always written.
    """
    return dataclasses.field(default=default, metadata={"unless": unless})


@dataclasses.dataclass(frozen=True)
class Transform:
    """A frozen, hashable rewriting of a parameter tree.

    >>> import jpeft
    >>> peft = jpeft.lora(rank=8, where="attention")
    >>> isinstance(peft, jpeft.Transform), peft.rank, hash(peft) == hash(peft)
    (True, 8, True)
    >>> peft == jpeft.from_config(peft.to_config())
    True
    """

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
        """As `to_config`, but a Python function is written by its name."""
        return {"method": self.name, **self._fields(_name_callable)}

    def origin(self) -> str:
        """A mark for the leaves this transform makes."""
        return self._mark(_whole_as_int(self.describe()))

    def _mark(self, described: Any) -> str:
        text = json.dumps(described, sort_keys=True)
        return f"{self.name}-{zlib.crc32(text.encode()):08x}"

    def origins(self) -> frozenset[str]:
        """The marks of the leaves that this transform makes, and of those that it made
        when 8.0 and 8 still gave different marks."""
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


def folded(key: Any, n: int) -> jax.Array:
    """`fold_in`; raises ValueError for what is no key."""
    try:
        return jax.random.fold_in(key, n)
    except TypeError:
        raise ValueError(
            "a transform is called with a key and a tree, transform(jax.random.key(0), "
            f"params); as the key came a {type(key).__name__}"
        ) from None


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
    """Writes equal numbers alike (8.0 as 8), so that equal transforms have one mark."""
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


# --- methods in a row ----------------------------------------------------------------


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

    >>> import jax, jax.numpy as jnp, jpeft
    >>> peft = jpeft.chain(jpeft.quantize("nf4"), jpeft.lora(rank=2))  # QLoRA
    >>> params = peft(jax.random.key(0), {"kernel": jnp.ones((64, 5))})
    >>> type(params["kernel"]).__name__, type(params["kernel"].base).__name__
    ('LowRank', 'Quantized')
    """
    for t in transforms:
        if not isinstance(t, Transform):
            raise TypeError(
                f"chain: expected transforms such as jpeft.lora(rank=8), got {t!r}"
            )
    if not transforms:
        raise ValueError("chain: expected at least one transform")
    return Chain(tuple(transforms))


@dataclasses.dataclass(frozen=True)
class Recipe(Transform):
    """A transform that acts as the transform `composed()`."""

    def composed(self) -> Transform:
        raise NotImplementedError

    def __call__(
        self,
        key: jax.Array,
        params: Any,
        *,
        uses: Mapping[str, LeafUse] | None = None,
    ) -> Any:
        return self.composed()(key, params, uses=uses)

    def origins(self) -> frozenset[str]:
        return self.composed().origins()


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
