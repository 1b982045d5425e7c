"""Processes that save or restore together: all succeed, or all are told who did not.

A process that fails reaches the next meeting all the same and says so there; one that
does not come at all is waited for `TIMEOUT_S` seconds.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np

from jpeft.checkpoint import _orbax
from jpeft.checkpoint.digest import digests, words
from jpeft.types import CheckpointError, DamagedError

T = TypeVar("T")
TIMEOUT_S = 600  # longer than Orbax waits within a step
_begun = itertools.count()
_DONE, _DAMAGED, _FAILED = range(3)  # how a process did


def is_first() -> bool:
    """Whether this process is the one that changes names on the disk."""
    return jax.process_index() == 0


def check_alike(arrays: Mapping[str, Any]) -> None:
    """Raises ValueError, naming it, for an array that each process has to itself and
    that is not the same in all."""
    own = {n: words(x) for n, x in arrays.items() if _orbax.is_local(x)}
    if jax.process_count() == 1 or not own:
        return
    from jax.experimental import multihost_utils

    mine = np.array([int(d, 16) for d in digests(own).values()], np.uint64)
    told = np.asarray(multihost_utils.process_allgather(mine.view(np.uint32)))
    for k, name in enumerate(own):
        if (told[:, 2 * k : 2 * k + 2] != told[0, 2 * k : 2 * k + 2]).any():
            raise ValueError(
                f"save: {name} is not the same in all {jax.process_count()} processes, "
                "and a checkpoint holds it once; put it on the mesh as one array, or "
                "derive it from one that is the same, as "
                "jax.random.fold_in(key, jax.process_index()) does"
            )


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
        made, error = None, None
        try:
            made = do()
        except Exception as raised:
            error = raised
        number = made if isinstance(made, int) and is_first() else 0
        try:
            told, number = self._meet(_code(error), number)
        except CheckpointError:
            if error is not None:
                raise error from None
            raise
        failed = [k for k, code in enumerate(told) if code != _DONE]
        if not failed:
            return made, number  # type: ignore[return-value]
        # Of one kind for all of them, so that all go on or none does.
        damaged = _FAILED not in told
        if error is not None and damaged == isinstance(error, DamagedError):
            raise error
        worst = failed[0] if damaged else told.index(_FAILED)
        kind = DamagedError if damaged else CheckpointError
        raise kind(
            f"{self.purpose}: process {worst} of {jax.process_count()} failed; its own "
            "error says why"
        ) from error

    def _meet(self, code: int, number: int) -> tuple[list[int], int]:
        """(the codes of all processes, the first one's number)."""
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

        mine = np.array([code, number % 2**31, number // 2**31], np.int32)
        told = np.asarray(multihost_utils.process_allgather(mine))
        codes, low, high = told.T.tolist()
        return codes, low[0] + high[0] * 2**31


def _code(error: Exception | None) -> int:
    if error is None:
        return _DONE
    return _DAMAGED if isinstance(error, DamagedError) else _FAILED
