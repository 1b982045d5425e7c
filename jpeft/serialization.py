"""`flax.serialization` for leaves: their arrays by the names of their fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import serialization

from jpeft.boxes import is_variable, same_box, unbox

_REMEDY = (
    "restore into a tree of the transform that was saved, "
    "from_bytes(transform(key, base), data)"
)


def let_serialize(cls: type, stored: Callable[[Any], Mapping[str, Any]]) -> None:
    """Enters a kind of leaf, a dataclass, with Flax.

    stored: its arrays and what stands below it, by the names of their fields.  All
    else is not part of a state: it is the target's own.
    """

    def to_state(leaf: Any) -> dict[str, Any]:
        return {
            n: serialization.to_state_dict(_out(x)) for n, x in stored(leaf).items()
        }

    def from_state(leaf: Any, state: Any) -> Any:
        path, fields = serialization.current_path(), stored(leaf)
        if not isinstance(state, Mapping) or set(state) != set(fields):
            came = sorted(state) if isinstance(state, Mapping) else "an array"
            raise ValueError(
                f"{path}: the target has a {type(leaf).__name__} with "
                f"{sorted(fields)}, the state has {came}; {_REMEDY}, or a plain state "
                "into the plain base"
            )
        new = {}
        for name, x in fields.items():
            old = _out(x)
            value = serialization.from_state_dict(old, state[name], name)
            _check_same(f"{path}/{name}", old, value)
            new[name] = same_box(x, value) if is_variable(x) else value
        return dataclasses.replace(leaf, **new)

    serialization.register_serialization_state(cls, to_state, from_state)


def _out(x: Any) -> Any:
    """Out of a variable, of which Flax's serialisation knows nothing."""
    return unbox(x) if is_variable(x) else x


def _check_same(path: str, old: Any, new: Any) -> None:
    """Of two arrays; a leaf below is asked by itself."""
    if serialization.is_serializable(old) or not hasattr(old, "shape"):
        return
    shape, dtype = jnp.shape(new), jnp.result_type(new)
    floats = all(jnp.issubdtype(d, jnp.floating) for d in (old.dtype, dtype))
    if old.shape != shape or (old.dtype != dtype and not floats):
        raise ValueError(
            f"{path}: the target has {old.dtype}{list(old.shape)}, the state has "
            f"{dtype}{list(shape)}; {_REMEDY}"
        )
