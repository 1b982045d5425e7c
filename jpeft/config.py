"""Configurations: TOML or plain data <-> transforms.

A recipe is a TOML file with one `[[peft]]` table a transform, in the order in which
they apply, and tables such as `[train]` that belong to the program:

    [[peft]]
    method = "lora"
    rank = 8
    alpha = 16
    where = "attention"
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jpeft.transform import Chain, Transform, chain, transform_from_config
from jpeft.tree.paths import suggest

TABLES = ("peft", "train")


def from_config(config: Mapping[str, Any] | str | os.PathLike[str]) -> Transform:
    """The transform that a configuration or a recipe file describes.

    config: what `transform.to_config()` returned, a recipe as a dict, or the path of a
    TOML recipe.  Unknown keys and methods are refused with the nearest known one.
    """
    if isinstance(config, (str, os.PathLike)):
        return read(config)[0]
    if not isinstance(config, Mapping):
        raise ValueError(f"from_config: expected a dict or a path, got {config!r}")
    if "method" in config:
        return transform_from_config(config)
    return _recipe(config, "the configuration")[0]


def read(path: str | os.PathLike[str]) -> tuple[Transform, dict[str, Any]]:
    """(transform, the `[train]` table) of a TOML recipe."""
    file = Path(path)
    if not file.is_file():
        there = sorted(p.name for p in file.parent.glob("*.toml"))
        hint = f"; nearest: {suggest(there, file.name)}" if there else ""
        raise FileNotFoundError(f"{file}: no such recipe{hint}")
    try:
        config = tomllib.loads(file.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{file}: not TOML: {error}") from None
    try:
        return _recipe(config, str(file))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _recipe(config: Mapping[str, Any], name: str) -> tuple[Transform, dict[str, Any]]:
    for key in config:
        if key not in TABLES:
            raise ValueError(
                f"unknown key {key!r}; did you mean {suggest(TABLES, key, 1)[0]!r}? "
                "A recipe has [[peft]] tables and a [train] table"
            )
    items = config.get("peft")
    if not items:
        raise ValueError(f"{name} has no [[peft]] table")
    train = config.get("train", {})
    if not isinstance(train, Mapping):
        raise ValueError("write [train], one table, not a list or a value")
    items = [items] if isinstance(items, Mapping) else items
    made = [transform_from_config(x) for x in items]
    transform = made[0] if len(made) == 1 else chain(*made)
    return transform, dict(train)


def to_toml(transform: Transform, train: Mapping[str, Any] | None = None) -> str:
    """The recipe of a transform; `from_config` of it is the transform again."""
    parts = transform.transforms if isinstance(transform, Chain) else (transform,)
    tables = [_table("[[peft]]", t.to_config()) for t in parts]
    if train:
        tables.append(_table("[train]", train))
    return "\n".join(tables)


def _table(head: str, fields: Mapping[str, Any]) -> str:
    lines = [f"{_key(k)} = {_value(v)}" for k, v in fields.items()]
    return "\n".join([head, *lines]) + "\n"


def _key(key: str) -> str:
    return key if key.replace("_", "").isalnum() and key.isascii() else _string(key)


def _value(x: Any) -> str:
    if isinstance(x, bool):
        return "true" if x else "false"
    if isinstance(x, (int, float)):
        return repr(x)
    if isinstance(x, str):
        return _string(x)
    if isinstance(x, Mapping):
        return "{" + ", ".join(f"{_key(k)} = {_value(v)}" for k, v in x.items()) + "}"
    if isinstance(x, (list, tuple)):
        return "[" + ", ".join(map(_value, x)) + "]"
    raise ValueError(f"a recipe cannot hold {x!r}")


def _string(x: str) -> str:
    escaped = x.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
