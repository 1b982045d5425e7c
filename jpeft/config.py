"""Configurations: TOML or plain data <-> transforms.

A recipe is a TOML file with one `[[peft]]` table a transform, in the order in which
they apply, and tables such as `[train]` that belong to the program:

    [[peft]]
    method = "lora"
    rank = 8
    alpha = 16
    where = "attention"

Those that come with jpeft are called by their names, `from_config("lora")`.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jpeft.checks import plain, shown
from jpeft.transform import Chain, Transform, chain, transform_from_config
from jpeft.tree.paths import suggest

TABLES = ("peft", "train")
# What comes with jpeft: in a wheel a part of the package, in a checkout beside it.
_PACKAGE = Path(__file__).parent
_RECIPES = next(
    (f for f in (_PACKAGE / "recipes", _PACKAGE.parent / "configs") if f.is_dir()),
    _PACKAGE / "recipes",
)
_TOO_DEEP = "transforms are nested too deeply; write one after the other"


def from_config(config: Mapping[str, Any] | str | os.PathLike[str]) -> Transform:
    """The transform that a configuration or a recipe file describes.

    config: what `transform.to_config()` returned, a recipe as a dict, the path of a
    TOML recipe, or the name of one that comes with jpeft, such as "lora" or "sft/qlora"
    (`jpeft.config.recipes()` lists them).  Unknown keys, methods and names are refused
    with the nearest known one.  A recipe's [train] table is left to the program that
    trains.

    >>> from_config("sft/lora").where
    'linear'
    >>> from_config({"method": "lora", "rank": 16, "where": "attention"}).rank
    16
    """
    if isinstance(config, (str, os.PathLike)):
        return read(config)[0]
    if not isinstance(config, Mapping):
        raise ValueError(f"from_config: expected a dict or a path, got {shown(config)}")
    try:
        if "method" in config:
            return transform_from_config(config)
        return _recipe(config, "the configuration")[0]
    except RecursionError:
        raise ValueError(f"from_config: {_TOO_DEEP}") from None


def recipes() -> list[str]:
    """The names of the recipes that come with jpeft.

    >>> [name for name in recipes() if "lora" in name and "/" not in name]
    ['adalora', 'lora', 'lora_plus', 'lora_qv', 'qlora', 'rslora']
    """
    files = (f.relative_to(_RECIPES) for f in _RECIPES.rglob("*.toml"))
    return sorted(f.with_suffix("").as_posix() for f in files)


def read(path: str | os.PathLike[str]) -> tuple[Transform, dict[str, Any]]:
    """(transform, the `[train]` table) of a TOML recipe, by its path or its name.

    >>> import jpeft
    >>> peft, train = jpeft.config.read("lora")
    >>> peft.transforms[0].where, train
    ('linear', {'learning_rate': 0.004})
    """
    file = _file(path)
    if not file.is_file():
        there = sorted(p.name for p in file.parent.glob("*.toml"))
        hint = f"; nearest: {suggest(there, file.name)}" if there else ""
        raise FileNotFoundError(f"{file}: no such recipe{hint}")
    try:
        text = file.read_text(encoding="utf-8")
        _check_keys(text)
        config = tomllib.loads(text)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file}: not UTF-8, which TOML is written in ({error.reason} at byte "
            f"{error.start}); save it again as UTF-8"
        ) from None
    # An integer of thousands of digits is a ValueError of its own.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not TOML: {error}") from None
    try:
        return _recipe(config, "the file")
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    except RecursionError:
        raise ValueError(f"{file}: {_TOO_DEEP}") from None


def _file(path: str | os.PathLike[str]) -> Path:
    """The path itself, or that of the recipe of this name."""
    file = Path(path)
    if not isinstance(path, str) or file.suffix == ".toml" or file.is_file():
        return file
    if path not in (names := recipes()):
        raise FileNotFoundError(
            f"no recipe {shown(path)} comes with jpeft, nor is it a file here; "
            f"nearest: {suggest(names, path)}"
        )
    return _RECIPES / f"{path}.toml"


_QUOTED = re.compile(r""" "[^"]*" | '[^']*' """, re.X)


def _check_keys(text: str) -> None:
    """Raises for a key of very many parts, for which Python's reader takes minutes."""
    for n, line in enumerate(text.splitlines(), 1):
        for part in re.split(r"[=,{}\[\]#]", _QUOTED.sub("", line)):
            if part.count(".") > 100:
                raise ValueError(f"a key of {part.count('.') + 1} parts in line {n}")


def _recipe(config: Mapping[str, Any], name: str) -> tuple[Transform, dict[str, Any]]:
    for key in config:
        if key not in TABLES:
            near = suggest(TABLES, str(key), 1)[0]
            raise ValueError(
                f"unknown key {shown(key)}; did you mean {near!r}? "
                "A recipe has [[peft]] tables and a [train] table"
            )
    items = config.get("peft", [])
    items = [items] if isinstance(items, Mapping) else items
    if not isinstance(items, (list, tuple)):
        raise ValueError(f"write [[peft]], a table a transform, not {shown(items)}")
    if not items:
        raise ValueError(f"{name} has no [[peft]] table")
    train = config.get("train", {})
    if not isinstance(train, Mapping):
        raise ValueError("write [train], one table, not a list or a value")
    _check_no_nan(train, "train")
    made = [transform_from_config(x) for x in items]
    transform = made[0] if len(made) == 1 else chain(*made)
    return transform, dict(train)


def _check_no_nan(x: Any, at: str) -> None:
    """NaN is no value of anything, and does not equal itself when it is read again."""
    if isinstance(x, float) and x != x:
        raise ValueError(f"{at} = nan: expected a number; leave the line out")
    if isinstance(x, Mapping):
        for key, value in x.items():
            _check_no_nan(value, f"{at}.{key}")
    if isinstance(x, (list, tuple)):
        for k, value in enumerate(x):
            _check_no_nan(value, f"{at}[{k}]")


def to_toml(transform: Transform, train: Mapping[str, Any] | None = None) -> str:
    """The recipe of a transform; `from_config` of it is the transform again.

    >>> import jpeft
    >>> jpeft.config.to_toml(jpeft.lora(rank=8)).splitlines()
    ['[[peft]]', 'method = "lora"', 'rank = 8']
    """
    # One table stands for the transform itself, not for a chain of it alone.
    parts = transform.transforms if isinstance(transform, Chain) else ()
    parts = parts if len(parts) > 1 else (transform,)
    tables = [_table("[[peft]]", t.to_config()) for t in parts]
    if train:
        _check_no_nan(train, "train")
        tables.append(_table("[train]", train))
    return "\n".join(tables)


def _table(head: str, fields: Mapping[str, Any]) -> str:
    lines = [f"{_key(k)} = {_value(v)}" for k, v in fields.items()]
    return "\n".join([head, *lines]) + "\n"


def _key(key: str) -> str:
    return key if key.replace("_", "").isalnum() and key.isascii() else _string(key)


def _value(x: Any) -> str:
    x = plain(x)
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
    if isinstance(x, (datetime.date, datetime.time)):
        return x.isoformat()
    raise ValueError(f"a recipe cannot hold {shown(x)}")


def _string(x: str) -> str:
    """As a basic string of TOML, whose escapes are JSON's; and DEL needs one."""
    return json.dumps(x, ensure_ascii=False).replace("\x7f", "\\u007f")
