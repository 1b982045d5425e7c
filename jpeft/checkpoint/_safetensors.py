"""The one place that reads safetensors: tensors by name, each mapped when it is asked.

    8 bytes    N, little-endian
    N bytes    JSON: {name: {"dtype", "shape", "data_offsets": [begin, end]}}
    the rest   the tensors, row by row, little-endian; offsets count from here

The format is read here and not by its library, whose numpy side has no bfloat16.  What
the library refuses is refused: the tensors cover the rest of the file, each byte once.
"""

from __future__ import annotations

import math
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.checks import read_json, shown
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
    "F8_E8M0": jnp.float8_e8m0fnu,
    "F8_E4M3FNUZ": jnp.float8_e4m3fnuz,
    "F8_E5M2FNUZ": jnp.float8_e5m2fnuz,
    "C64": np.complex64,
}
# Bytes of JSON, as the library has it: read whole, they must not fill the memory.
LARGEST_HEADER = 100_000_000


class _At(NamedTuple):
    file: Path
    begin: int  # from the start of the file
    bytes: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class Tensors:
    """The tensors of one file or of the shards of one model.

    stored: shape and dtype of every tensor.
    """

    def __init__(self, path: Path, files: Iterable[Path]):
        self.path = path
        self.boxed: dict[str, str] = {}
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
        try:
            bytes_ = np.memmap(at.file, np.uint8, "r", at.begin, (at.bytes,))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{at.file}: {name!r} is not there any more ({error}); the file "
                "changed after it was opened"
            ) from error
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
    """The files that an index names, all of its own folder."""
    if _size(index) > LARGEST_HEADER:
        raise CheckpointError(f"{index}: too large for an index")
    try:
        read = read_json(index.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{index}: damaged: {error}") from error
    names = read.get("weight_map") if isinstance(read, dict) else None
    if not isinstance(names, dict) or not all(
        isinstance(n, str) and n for n in names.values()
    ):
        raise CheckpointError(
            f'{index}: damaged: expected {{"weight_map": {{tensor: file}}}}, found '
            f"{shown(read)}"
        )
    each = sorted(set(names.values()))
    for name in each:
        # Of both kinds of path: also a file written elsewhere must not lead outside.
        path = PureWindowsPath(name)
        if path.anchor or ".." in path.parts or "\0" in name:
            raise CheckpointError(
                f"{index}: names {shown(name)}, a file outside its own folder; put the "
                "shards beside the index and name them without a path"
            )
    files = [index.parent / n for n in each]
    if missing := [f.name for f in files if not _is_there(f)]:
        raise CheckpointError(
            f"{index}: {len(missing)} of {len(files)} shards are missing: "
            f"{', '.join(missing[:3])}; finish the download"
        )
    return files


def _is_there(file: Path) -> bool:
    try:
        return file.exists()
    except OSError:  # a name too long for any file
        return False


def _size(file: Path) -> int:
    """Its bytes; what is no regular file (a pipe would wait) is refused."""
    try:
        found = file.stat()
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "no regular file"
        raise CheckpointError(f"{file}: expected a file, this is {kind}")
    return found.st_size


def _header(file: Path) -> dict[str, _At]:
    size = _size(file)
    try:
        with file.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or length > size - 8:
                raise CheckpointError(f"{file}: truncated, or no safetensors file")
            if length > LARGEST_HEADER:
                raise CheckpointError(
                    f"{file}: damaged: a header of {length} bytes, the format allows "
                    f"{LARGEST_HEADER}"
                )
            text = f.read(length)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    try:
        header = read_json(text)
    except ValueError as error:
        raise CheckpointError(
            f"{file}: damaged, or no safetensors file: {error}"
        ) from error
    if not isinstance(header, dict) or not _is_metadata(header.pop(METADATA, None)):
        raise CheckpointError(
            f"{file}: damaged, or no safetensors file: the header is no table of "
            f"tensors, with words alone in {METADATA!r}"
        )
    found = {n: _tensor(file, n, x, 8 + length, size) for n, x in header.items()}
    _check_covered(file, found, 8 + length, size)
    return found


METADATA = "__metadata__"


def _is_metadata(x: Any) -> bool:
    return x is None or (
        isinstance(x, dict) and all(isinstance(v, str) for v in x.values())
    )


def _tensor(file: Path, name: str, x: Any, data: int, size: int) -> _At:
    fields: list[Any] = [x.get(k) if isinstance(x, dict) else None for k in FIELDS]
    dtype, shape, offsets = fields
    if not isinstance(dtype, str) or not _counts(shape) or not _counts(offsets, 2):
        raise CheckpointError(
            f"{file}: damaged: {shown(name)} is described by {shown(x)}; expected "
            "dtype, a word, shape, whole numbers, and data_offsets, two of them"
        )
    if dtype not in DTYPES:
        raise CheckpointError(
            f"{file}: {shown(name)} has dtype {shown(dtype)[1:-1]}; known are "
            f"{', '.join(DTYPES)}"
        )
    kind, (begin, end) = np.dtype(DTYPES[dtype]), offsets
    if math.prod(max(1, k) for k in shape) * kind.itemsize >= 2**63:
        raise CheckpointError(
            f"{file}: {shown(name)} has the shape {shown(tuple(shape))}, beyond any "
            "array"
        )
    if end - begin != math.prod(shape) * kind.itemsize:
        raise CheckpointError(
            f"{file}: damaged: {shown(name)} of shape {shown(tuple(shape))} and {kind} "
            f"has {end - begin} bytes"
        )
    # A view past the end of a file would kill the process.
    if data + end > size:
        raise CheckpointError(
            f"{file}: truncated: {shown(name)} ends at byte {data + end}, the file at "
            f"{size}"
        )
    return _At(file, data + begin, end - begin, tuple(shape), kind)


FIELDS = ("dtype", "shape", "data_offsets")


def _counts(x: Any, n: int | None = None) -> bool:
    """Whether it is a list of counts, n of them."""
    whole = isinstance(x, list) and all(type(k) is int and 0 <= k < 2**63 for k in x)
    return whole and n in (None, len(x))


def _check_covered(file: Path, found: Mapping[str, _At], data: int, size: int) -> None:
    """Raises unless the tensors lie one after the other to the end of the file."""
    at, before = data, "the header"
    for name, x in sorted(found.items(), key=lambda item: item[1][1:3]):
        if x.begin != at:
            what = "leaves a hole after" if x.begin > at else "overlaps"
            raise CheckpointError(
                f"{file}: damaged: {shown(name)} begins at byte {x.begin} and {what} "
                f"{before}, which ends at {at}"
            )
        at, before = x.begin + x.bytes, shown(name)
    if at != size:
        raise CheckpointError(
            f"{file}: damaged: {before} ends at byte {at}, the file at {size}"
        )
