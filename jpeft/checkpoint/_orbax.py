"""The one place that speaks to Orbax: arrays to a folder and back."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jpeft.types import CheckpointError


def write(folder: Path, arrays: Mapping[str, Any]) -> None:
    """Writes a flat {name: array}; names hold no '.', with which Orbax joins keys."""
    with _quiet(), ocp.StandardCheckpointer() as writer:
        writer.save(folder.absolute(), dict(arrays))


def read(folder: Path, like: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """Reads what `write` wrote, onto the shardings of `like`."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: missing; the checkpoint is incomplete")
    try:
        with _quiet(), ocp.StandardCheckpointer() as reader:
            return reader.restore(folder.absolute(), dict(like))
    except Exception as error:  # Orbax raises many types, with pages of text
        text = str(error).strip() or type(error).__name__
        raise CheckpointError(
            f"{folder}: the arrays cannot be read; the folder is truncated or damaged "
            f"({text.splitlines()[0][:200]})"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Orbax logs every save and warns of the sharding file we do not need."""
    loggers = [logging.getLogger(n) for n in ("absl", "orbax")]
    before = [x.level for x in loggers]
    for x in loggers:
        x.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for x, level in zip(loggers, before, strict=True):
            x.setLevel(level)
