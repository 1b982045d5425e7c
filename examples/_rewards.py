"""Rewards that are verified, not learned: tasks of reasoning-gym, or a function.

A function is named `file.py:name` or `module:name` and called with a list of answers
and the rows they answer; it gives a number for each, or None for what it cannot judge:

    def reward(answers: list[str], rows: list[dict]) -> list[float]: ...
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]
Reward = Callable[[list[str], list[Row]], Sequence[float | None]]


READS = ("last_number", "whole")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def last_number(answer: str) -> str:
    """Without commas; nothing where there is none."""
    found = _NUMBER.findall(answer)
    return found[-1].replace(",", "") if found else ""


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """Rows with a `prompt`, and what an answer to one is worth."""

    name: str
    rows: list[Row]
    reward: Reward

    def score(self, answers: Sequence[str], rows: Sequence[Row]) -> np.ndarray:
        """(answers,) float32; NaN where the function gave None.

        Raises ValueError for anything else that is no finite number, and for another
        count than that of the answers.
        """
        found = list(self.reward(list(answers), list(rows)))
        if len(found) != len(answers):
            raise ValueError(
                f"the reward function {self.name} gave {len(found)} numbers for "
                f"{len(answers)} answers; expected one for each"
            )
        for k, x in enumerate(found):
            if x is None:
                continue
            if isinstance(x, str) or not math.isfinite(x):
                raise ValueError(
                    f"the reward function {self.name} gave {x!r} for the answer "
                    f"{answers[k][:60]!r}; expected a finite number, or None for an "
                    "answer that it cannot judge"
                )
        return np.array([np.nan if x is None else x for x in found], np.float32)


def of_gym(
    name: str, size: int, seed: int, options: dict[str, Any], read: str = "whole"
) -> Task:
    """A task of reasoning-gym (Stojanovski et al. 2025, arXiv:2505.24760).

    read: what of an answer is judged, of `READS`.
    """
    try:
        import reasoning_gym
    except ModuleNotFoundError:
        raise ValueError(
            "the default task needs reasoning-gym; type: pip install -e '.[rl]', or "
            "name a reward function with --reward and questions with --data"
        ) from None
    try:
        data = reasoning_gym.create_dataset(name, size=size, seed=seed, **options)
    except (ValueError, TypeError, AssertionError) as error:
        raise ValueError(f"reasoning-gym's task {name!r}: {error}") from error
    rows = [{"prompt": x["question"], "entry": x} for x in data]
    part = last_number if read == "last_number" else str.strip
    for x in data if read == "last_number" else ():
        expected = str(x["answer"])
        if data.score_answer(last_number(expected), x) != 1:
            raise ValueError(
                f"reasoning-gym's task {name!r}: its answer {expected[:60]!r} would "
                "not count, since a last number is read; type: --read whole"
            )

    def reward(answers: list[str], rows: list[Row]) -> list[float]:
        return [
            float(data.score_answer(part(a), r["entry"]))
            for a, r in zip(answers, rows, strict=True)
        ]

    return Task(f"reasoning-gym {name}", rows, reward)


def of_function(name: str, rows: list[Row]) -> Task:
    """A function that the user names, over rows that the user gives."""
    where, colon, function = name.rpartition(":")
    if not colon:
        raise ValueError(
            f"--reward {name!r}: expected file.py:function or module:function"
        )
    if where.endswith(".py"):
        if not Path(where).is_file():
            raise FileNotFoundError(f"--reward {name}: there is no file {where}")
        spec = importlib.util.spec_from_file_location("reward_function", where)
        module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        spec.loader.exec_module(module)  # type: ignore[union-attr]
    else:
        sys.path.insert(0, str(Path.cwd()))
        try:
            module = importlib.import_module(where)
        except ModuleNotFoundError as error:
            raise ValueError(f"--reward {name}: {error}") from error
        finally:
            sys.path.pop(0)
    found = getattr(module, function, None)
    if not callable(found):
        raise ValueError(f"--reward {name}: {where} has no function {function!r}")
    return Task(name, rows, found)
