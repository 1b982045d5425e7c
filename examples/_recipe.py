"""Recipes: what trains (``[[peft]]``, jpeft reads it) and how (``[train]``)."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import _stages

import jpeft
from jpeft import config

ROOT = Path(__file__).resolve().parents[1]


def _setting(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True)
class Train:
    """The ``[train]`` table of a recipe, with the defaults of what it leaves out."""

    learning_rate: float = _setting(1e-3, "the highest one")
    head_learning_rate: float | None = _setting(None, "of the classifier, if another")
    epochs: int = _setting(2, "passes through the training data")
    batch_size: int = _setting(32, "examples in a step")
    length: int = _setting(48, "tokens after which a text is cut off")
    weight_decay: float = _setting(0.0, "of AdamW")
    schedule: str = _setting("linear", "linear (falls to 0) or constant")
    warmup: float = _setting(0.06, "part of the steps in which the rate rises")
    prefix_start: str = _setting("drawn", "drawn, or text: as training texts are read")
    seed: int = _setting(0, "of the split, the order, the new weights and dropout")
    # Tables of their own below [train]; see _stages.
    lora_plus: _stages.LoraPlus | None = None
    adalora: _stages.AdaLora | None = None
    diff_pruning: _stages.DiffPruning | None = None

    def __post_init__(self) -> None:
        check_types(self)
        if self.adalora and self.diff_pruning:
            raise ValueError(
                "[train.adalora] and [train.diff_pruning] cannot be in one recipe"
            )
        at_least = {"epochs": 1, "batch_size": 1, "length": 3, "seed": 0}
        for name, least in at_least.items():
            if (value := getattr(self, name)) < least:
                raise ValueError(f"{name} must be {least} or more, found {value}")
        # Written so that nan, which compares as False, is refused.
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(
                f"learning_rate must be above 0, found {self.learning_rate}"
            )
        head = self.head_learning_rate
        if head is not None and not 0 < head < math.inf:
            raise ValueError(f"head_learning_rate must be above 0, found {head}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(
                f"weight_decay must be 0 or more, found {self.weight_decay}"
            )
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup must lie between 0 and 1, found {self.warmup}")
        for name, known in (
            ("schedule", ("linear", "constant")),
            ("prefix_start", ("drawn", "text")),
        ):
            if (choice := getattr(self, name)) not in known:
                raise ValueError(
                    f"{name} must be {known[0]!r} or {known[1]!r}, found {choice!r}"
                )


def settings(kind: Any = Train) -> list[dataclasses.Field[Any]]:
    """The settings of ``[train]`` itself, each of which is an option too."""
    return [f for f in dataclasses.fields(kind) if "help" in f.metadata]


def add_options(add: Callable[..., Any], kind: Any = Train) -> None:
    """An option for each setting, without a default: that is the recipe's."""
    for field in settings(kind):
        option, help = "--" + field.name.replace("_", "-"), field.metadata["help"]
        of = str(field.type).split(" | ")[0]
        if of == "bool":
            add(option, action=argparse.BooleanOptionalAction, help=help)
            continue
        type, letter = {"int": (int, "N"), "float": (float, "X")}.get(of, (str, "NAME"))
        add(option, type=type, metavar=letter, help=help)


def check_types(settings_of: Any) -> None:
    """Raises unless each setting is of its declared type."""
    for field in settings(type(settings_of)):
        _check_type(field.name, getattr(settings_of, field.name), str(field.type))


def _check_type(name: str, value: Any, expected: str) -> None:
    kinds: dict[str, Any] = {
        "int": int,
        "float": int | float,
        "str": str,
        "bool": bool,
    }
    expected, *optional = expected.split(" | ")
    if optional and value is None:
        return
    of = kinds[expected]
    if isinstance(value, bool) != (of is bool) or not isinstance(value, of):
        raise ValueError(f"{name} must be of the type {expected}, found {value!r}")


def find(path: str | Path) -> Path:
    """The recipe's file: the path itself, or below the repository of this script."""
    for candidate in (Path(path), ROOT / path):
        if candidate.is_file():
            return candidate
    folder = Path(path).parent
    if folder.parts[:1] != ("configs",) or not (ROOT / folder).is_dir():
        folder = Path("configs")
    known = sorted(file.stem for file in (ROOT / folder).glob("*.toml"))
    raise FileNotFoundError(
        f"no recipe {path}; the repository has {folder.as_posix()}/<name>.toml for the "
        f"names {', '.join(known)}"
    )


def read(
    path: Path, overrides: Mapping[str, Any], kind: Any = Train
) -> tuple[jpeft.Transform, Any]:
    """What trains, and how, a ``kind``; overrides that are not None replace the
    recipe's.

    With the override ``full`` the table ``[train.full]`` replaces them first.
    """
    try:
        transform, table = config.read(path)
        table = _full(table, kind, overrides["full"]) if "full" in overrides else table
        train = kind(
            **{
                key: _table(f"train.{key}", _stages.TABLES[key], value)
                if key in _stages.TABLES
                else value
                for key, value in _known("train", kind, table).items()
            }
        )
    except (ValueError, TypeError) as error:
        # jpeft names the file itself.
        text = str(error).removeprefix(f"{path}: ")
        raise ValueError(f"{path}: {text}") from error
    known = [field.name for field in settings(kind)]
    given = {k: overrides[k] for k in known if overrides.get(k) is not None}
    return transform, dataclasses.replace(train, **given)


def _full(table: Mapping[str, Any], kind: Any, wanted: bool) -> Mapping[str, Any]:
    """The table of a short run, or of a long one."""
    table = dict(table)
    more = table.pop("full", None)
    if more is not None:
        if not isinstance(more, Mapping):
            raise ValueError(f"write [train.full], a table, not {more!r}")
        more = _known("train.full", kind, more)
    if not wanted:
        return table
    if more is None:
        raise ValueError("--full: the recipe has no table [train.full] for it")
    return {**table, **more}


def _known(name: str, kind: Any, table: Mapping[str, Any]) -> Mapping[str, Any]:
    """The table, if it has no key that ``kind`` has not."""
    known = [field.name for field in dataclasses.fields(kind)]
    for key in table:
        if key not in known:
            raise ValueError(
                f"[{name}] has no key {key!r}; {_nearest(key, known)}known: "
                f"{', '.join(known)}"
            )
    return table


def _table(name: str, kind: Any, table: Any) -> Any:
    if not isinstance(table, Mapping):
        raise ValueError(f"write [{name}], a table, not {table!r}")
    for field in dataclasses.fields(kind):
        value = table.get(field.name, field.default)
        _check_type(f"[{name}] {field.name}", value, str(field.type))
    return kind(**_known(name, kind, table))


def _nearest(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0)
    return f"did you mean {near[0]!r}? " if near else ""
