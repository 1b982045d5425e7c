"""The folder of a run, and how a run is interrupted and resumed."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

SETTINGS, CHECKPOINTS, ADAPTER = "settings.json", "checkpoints", "adapter"
METRICS, CURVES = "metrics.json", "curves.png"


class Failed(Exception):
    """The training, or a check of its result, failed."""


class Unattachable(ValueError):
    """The model cannot take what a recipe adds."""


class Interrupted(Exception):
    """Training ended early; a checkpoint of it was written."""


class Interrupt:
    """While entered, the first Ctrl-C only sets ``asked``; a second one interrupts.

    So does SIGTERM, which clusters send before they end a job, however often.
    """

    def __enter__(self) -> Interrupt:
        self.asked = False
        self._former = {
            which: signal.signal(which, self._ask)
            for which in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def _ask(self, which: int, _: Any) -> None:
        self.asked = True
        if which == signal.SIGINT:
            signal.signal(which, self._former[which])

    def __exit__(self, *_: Any) -> None:
        for which, former in self._former.items():
            signal.signal(which, former)


@contextlib.contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """While entered, SIGTERM raises KeyboardInterrupt, so that no child is left."""
    former = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def begin(out: Path, settings: Mapping[str, Any], *, overwrite: bool) -> None:
    """Makes ``out`` the folder of a new run; ValueError if it holds one already."""
    held = [name for name in (CHECKPOINTS, ADAPTER) if (out / name).exists()]
    if held and not overwrite:
        raise ValueError(
            f"{out} already holds a run; add --resume to continue it, --overwrite to "
            "replace it, or choose another --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    for name in held:
        shutil.rmtree(out / name)
    for name in (METRICS, CURVES):
        (out / name).unlink(missing_ok=True)
    write_json(out / SETTINGS, settings)


def check_same(out: Path, settings: Mapping[str, Any]) -> None:
    """Raises unless ``out`` holds a run with these settings."""
    if not (out / SETTINGS).is_file():
        raise nothing_to_resume(out)
    found = json.loads((out / SETTINGS).read_text(encoding="utf-8"))
    wanted = json.loads(json.dumps(settings))  # as it would be read again
    if other := [name for name in wanted if found.get(name) != wanted[name]]:
        changes = (f"{k} was {found.get(k)!r:.90}, is {wanted[k]!r:.90}" for k in other)
        raise ValueError(
            f"{out} holds a run with other settings ({'; '.join(changes)}); resume "
            "with the options of that run, or choose another --out"
        )


def nothing_to_resume(out: Path) -> FileNotFoundError:
    """The error for a folder without a checkpoint."""
    return FileNotFoundError(
        f"{out} holds no checkpoint to resume from; leave out --resume to start a run"
    )


def how_to_resume(script: str, argv: Sequence[str], step: int | None) -> str:
    """What to tell after Ctrl-C; ``step`` is the latest one with a checkpoint."""
    if step is None:
        return "interrupted before a step was saved; the same command starts again"
    options = [x for x in argv if x not in ("--resume", "--overwrite")]
    command = shlex.join(["python", os.path.relpath(script), *options, "--resume"])
    return f"interrupted; step {step} is saved. To go on, type: {command}"


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes plain data, indented; a file that is there is whole."""
    unfinished = path.with_name(path.name + ".partial")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(json.dumps(values, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())  # before it has its name
    os.replace(unfinished, path)
