"""`jpeft.json`: what an adapter on disk says of itself, read and checked.

    {"sha256", "format", "version", "jpeft", "jax", "transform", "step", "metadata",
     "leaves": {path: [{"kind", "static", "arrays": {field: {"shape", "dtype",
                "digest"}}}, ...]},
     "base": {path: {"shape", "dtype", "digest"}},
     "statistics": as "base", "passing": [path, ...]}

Version 1 had no digest of itself.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jpeft.checkpoint.folder import Folder, Kind
from jpeft.checkpoint.sealed import unseal
from jpeft.leaf import KINDS, STATIC, roles
from jpeft.quant.leaf import Quantized
from jpeft.tree.paths import suggest
from jpeft.types import CheckpointError, DamagedError

FORMAT, VERSION = "jpeft-adapter", 2
MANIFEST, ARRAYS = "jpeft.json", "arrays"
ADAPTER = Kind(frozenset({MANIFEST, ARRAYS}), MANIFEST, (MANIFEST,))
# More elements than these, and than so many of its base, no array of an adapter has.
_MOST, _TIMES = 2**24, 64


def read_manifest(folder: Folder) -> dict[str, Any]:
    """What the file says; CheckpointError, naming it, if it is not as it was written
    or of another format."""
    if not folder.is_dir():
        raise DamagedError(f"{folder}: no such folder")
    file = folder / MANIFEST
    if not file.is_file():
        near = suggest([p.name for p in folder.iterdir()] or ["nothing"], MANIFEST)
        raise DamagedError(
            f"{folder}: not an adapter, or a truncated one: {MANIFEST} is missing "
            f"(there is {near})"
        )
    manifest = unseal(file, unsealed=lambda m: m.get("version") == 1)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{file}: not a {FORMAT} file")
    version = manifest.get("version")
    if type(version) is not int or version < 1:
        raise DamagedError(
            f"{file}: damaged: its version is {version!r}, expected 1 to {VERSION}"
        )
    if version > VERSION:
        raise CheckpointError(
            f"{file}: format {version}, this jpeft reads up to {VERSION}; it was "
            f"written by jpeft {manifest.get('jpeft')}: upgrade"
        )
    _check(file, manifest)
    return manifest


def step_number(step: Any) -> int:
    """A step as a plain number; ValueError for what is none."""
    try:
        number = operator.index(step)
    except TypeError:
        number = -1
    if number < 0:
        raise ValueError(f"step={step!r}: expected a whole number, 0 or more")
    return number


def check_sizes(
    folder: Folder, leaves: Mapping[str, Any], base: Mapping[str, Any]
) -> None:
    """Raises, naming the array, where one is out of all proportion to its base."""
    most = max(_MOST, _TIMES * sum(math.prod(x["shape"]) for x in base.values()))
    for path, described in leaves.items():
        for layer in described:
            for field, array in layer["arrays"].items():
                if math.prod(array["shape"]) > most:
                    raise CheckpointError(
                        f"{folder}: {path}/{field}: shape {array['shape']} does not "
                        f"fit a weight of shape {base[path]['shape']}"
                    )


def _check(file: Folder, manifest: Mapping[str, Any]) -> None:
    """Raises DamagedError unless everything is of the type that it is used as."""
    _of(file, manifest, "transform", dict)
    for path, described in _of(file, manifest, "leaves", dict).items():
        if not isinstance(described, list) or not described:
            raise _wrong(file, path, described, "a list of layers")
        for layer in described:
            if not isinstance(layer, dict):
                raise _wrong(file, path, layer, "a layer")
            _of(file, layer, "kind", str, path)
            _of(file, layer, "static", dict, path)
            if "holds" in layer:
                _of(file, layer, "holds", list, path)
                known = KINDS.get(layer["kind"], Quantized)
                for name in (n for n, role in roles(known).items() if role == STATIC):
                    if name not in layer["static"] and name != "path":
                        raise _wrong(file, path, layer["static"], f"{name!r} in it")
            for field, array in _of(file, layer, "arrays", dict, path).items():
                _check_array(file, f"{path}/{field}", array)
    for path, array in _of(file, manifest, "base", dict).items():
        _check_array(file, path, array)
    for path in manifest["leaves"]:
        if path not in manifest["base"]:
            raise _wrong(file, path, None, "its weight in the base")
    if "statistics" in manifest:
        for path, array in _of(file, manifest, "statistics", dict).items():
            _check_array(file, path, array)
    if "passing" in manifest and not all(
        isinstance(p, str) for p in _of(file, manifest, "passing", list)
    ):
        raise _wrong(file, "passing", manifest["passing"], "a list of paths")


def _check_array(file: Folder, path: str, array: Any) -> None:
    if not isinstance(array, dict) or "digest" not in array:
        raise _wrong(file, path, array, "an array with a digest")
    shape = _of(file, array, "shape", list, path)
    if any(type(n) is not int or not 0 <= n < 2**63 for n in shape):
        raise _wrong(file, path, shape, "a shape")
    dtype = array.get("dtype")
    try:
        known = isinstance(dtype, str) and (
            dtype.startswith("key<") or jnp.dtype(dtype) is not None
        )
    except TypeError:
        known = False
    if not known:
        raise _wrong(file, path, array.get("dtype"), "a dtype")


def _of(
    file: Folder, values: Mapping[str, Any], name: str, kind: type, path: str = ""
) -> Any:
    if not isinstance(values.get(name), kind):
        where = f"{path}: {name}" if path else name
        raise _wrong(file, where, values.get(name), f"a {kind.__name__}")
    return values[name]


def _wrong(file: Folder, what: str, found: Any, expected: str) -> DamagedError:
    return DamagedError(
        f"{file}: damaged: {what}: expected {expected}, found {str(found)[:60]!r}"
    )
