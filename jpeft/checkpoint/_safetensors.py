"""The one place that reads safetensors: tensors by name, each mapped when it is asked.

    8 bytes    N, little-endian
    N bytes    JSON: {name: {"dtype", "shape", "data_offsets": [begin, end]}}
    the rest   the tensors, row by row, little-endian; offsets count from here

The format is read here and not by its library, whose numpy side has no bfloat16.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.types import CheckpointError

INDEX = ".safetensors.index.json"
DTYPES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "U32": np.uint32,
    "I32": np.int32,
    "U64": np.uint64,
    "I64": np.int64,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "F32": np.float32,
    "F64": np.float64,
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2,
}


class _At(NamedTuple):
    file: Path
    begin: int  # from the start of the file
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class Tensors:
    """The tensors of one file or of the shards of one model.

    stored: shape and dtype of every tensor.
    """

    def __init__(self, path: Path, files: Iterable[Path]):
        self.path = path
        self._at: dict[str, _At] = {}
        for file in files:
            for name, at in _header(file).items():
                if name in self._at:
                    raise CheckpointError(
                        f"{path}: {name!r} is in {self._at[name].file.name} and in "
                        f"{file.name}; pass the one file that is meant"
                    )
                self._at[name] = at
        self.stored = {
            n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in self._at.items()
        }

    def read(self, name: str) -> np.ndarray:
        """A view of the file: read where it is looked at, gone when it is dropped."""
        at = self._at[name]
        if 0 in at.shape:
            return np.zeros(at.shape, at.dtype)
        size = math.prod(at.shape) * at.dtype.itemsize
        bytes_ = np.memmap(at.file, np.uint8, mode="r", offset=at.begin, shape=(size,))
        return bytes_.view(np.ndarray).view(at.dtype).reshape(at.shape)


def open_tensors(path: Path) -> Tensors | None:
    """The tensors of a file, of an index or of a folder; None if it holds none."""
    if path.name.endswith(INDEX):
        return Tensors(path.parent, _shards(path))
    if path.is_file():
        return Tensors(path, [path])
    found = sorted(path.glob("*" + INDEX))
    if len(found) > 1:
        raise CheckpointError(
            f"{path}: {len(found)} models in one folder; pass the index of one: "
            f"{', '.join(p.name for p in found)}"
        )
    files = _shards(found[0]) if found else sorted(path.glob("*.safetensors"))
    return Tensors(path, files) if files else None


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{index}: damaged: {error!r}") from error
    files = [index.parent / n for n in names]
    if missing := [f.name for f in files if not f.is_file()]:
        raise CheckpointError(
            f"{index}: {len(missing)} of {len(files)} shards are missing: "
            f"{', '.join(missing[:3])}; finish the download"
        )
    return files


def _header(file: Path) -> dict[str, _At]:
    size = file.stat().st_size
    with file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if length > size - 8:
            raise CheckpointError(f"{file}: truncated, or no safetensors file")
        try:
            header = json.loads(f.read(length))
            header.pop("__metadata__", None)
            return {n: _tensor(file, n, x, 8 + length, size) for n, x in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"{file}: damaged, or no safetensors file: {error!r}"
            ) from error


def _tensor(file: Path, name: str, x: Mapping[str, Any], data: int, size: int) -> _At:
    if x["dtype"] not in DTYPES:
        raise CheckpointError(
            f"{file}: {name!r} has dtype {x['dtype']}; known are {', '.join(DTYPES)}"
        )
    shape, dtype = tuple(x["shape"]), np.dtype(DTYPES[x["dtype"]])
    begin, end = x["data_offsets"]
    if end - begin != math.prod(shape) * dtype.itemsize or begin < 0:
        raise CheckpointError(
            f"{file}: damaged: {name!r} of shape {shape} and {dtype} has {end - begin} "
            "bytes"
        )
    # A view past the end of a file would kill the process.
    if data + end > size:
        raise CheckpointError(
            f"{file}: truncated: {name!r} ends at byte {data + end}, the file at {size}"
        )
    return _At(file, data + begin, shape, dtype)
