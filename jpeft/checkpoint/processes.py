"""Processes that save or restore together: all succeed, or all are told who did not.

A process that fails reaches the next meeting all the same and says so there; one that
does not come at all is waited for `TIMEOUT_S` seconds.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np

from jpeft.checkpoint import _orbax
from jpeft.types import CheckpointError

T = TypeVar("T")
TIMEOUT_S = 600  # longer than Orbax waits within a step
_begun = itertools.count()


def is_first() -> bool:
    """Whether this process is the one that changes names on the disk."""
    return jax.process_index() == 0


class Crew:
    """The processes of one save or restore; each must take every step, in order.

    purpose: what they do, for the errors, such as a folder's name.
    """

    def __init__(self, purpose: str):
        self.purpose = purpose
        # The same in every process, since each takes part in every save.
        self._meeting = f"jpeft-{next(_begun)}"
        self._steps = itertools.count()

    def all(self, do: Callable[[], T]) -> T:
        """`do()` of this process, once it succeeded in each."""
        return self._together(do)[0]

    def first(self, do: Callable[[], int | None]) -> int:
        """`do()` of the first process, below 2^62, for all of them."""
        made, told = self._together(lambda: (do() if is_first() else 0) or 0)
        return made if told is None else told

    def _together(self, do: Callable[[], T]) -> tuple[T, int | None]:
        if jax.process_count() == 1:
            return do(), None
        try:
            made, error = do(), None
        except Exception as raised:
            made, error = None, raised
        number = made if isinstance(made, int) and is_first() else 0
        try:
            failed, number = self._meet(error is not None, number)
        except CheckpointError:
            if error is not None:
                raise error from None
            raise
        if error is not None:
            raise error
        if failed:
            raise CheckpointError(
                f"{self.purpose}: process {failed[0]} of {jax.process_count()} failed; "
                "its own error says why"
            )
        return made, number  # type: ignore[return-value]

    def _meet(self, failed: bool, number: int) -> tuple[list[int], int]:
        """(the processes that failed, the first one's number)."""
        # A collective alone would wait for a missing process without end.
        name = f"{self._meeting}-{next(self._steps)}"
        try:
            _orbax.meet(name, TIMEOUT_S)
        except Exception as error:
            raise CheckpointError(
                f"{self.purpose}: another process did not come within {TIMEOUT_S} s; "
                "it has ended, or was not called to do the same"
            ) from error
        from jax.experimental import multihost_utils

        low, high = number % 2**31, number // 2**31
        mine = np.array([failed, low, high], np.int32)
        told = np.asarray(multihost_utils.process_allgather(mine))
        of_first = int(told[0, 1]) + int(told[0, 2]) * 2**31
        return [int(k) for k in np.flatnonzero(told[:, 0])], of_first
