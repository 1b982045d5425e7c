"""Names shared by every floor: errors and warnings, and the check of a dtype."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

__version__ = "0.1.0"

PyTree = Any


class DensifyError(NotImplementedError):
    """An adapted weight reached an equation in which its delta has no cheap form."""


class DensifyWarning(UserWarning):
    """`adapt(fn, materialize="allow")` used the full value of an adapted weight."""


class CheckpointError(ValueError):
    """An adapter on disk is damaged, or does not belong to the given base."""


class DamagedError(CheckpointError):
    """The bits on disk are not those that were saved, or not all are there."""


class CheckpointWarning(UserWarning):
    """A checkpoint was not used, or holds more than was asked for."""


class PromiseError(ValueError):
    """Something an adapter left to a later equation was never taken up."""


def check_float(name: str, dtype: Any, argument: str = "dtype") -> None:
    """Raises ValueError unless dtype is floating, or None."""
    if dtype is None:
        return
    try:
        floating = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        floating = False
    if not floating:
        raise ValueError(
            f"{name}: {argument}={dtype!r}: expected a floating-point dtype"
        )
