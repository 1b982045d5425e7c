"""Names shared by every floor: errors and warnings."""

from __future__ import annotations

from typing import Any

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


class DerivativeError(NotImplementedError):
    """The adapted function takes a derivative of itself that jpeft cannot follow."""
