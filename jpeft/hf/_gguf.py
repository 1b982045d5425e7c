"""The one place that reads GGUF: metadata, and tensors mapped when they are asked for.

    4 bytes    "GGUF"
    head       version, counts of tensors and keys; version 2 or 3, little-endian
    metadata   (key, type, value), each word with its length before it
    tensors    (name, sizes from the last axis to the first, type, offset)
    the rest   from the next multiple of general.alignment on: the tensors' rows

The head is read here and not by its library, `gguf`, which makes an array of every word
of the vocabulary: 4 s and 190 MB for 49,152 of them.  It decodes the types of blocks.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jpeft.types import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = "general.alignment"
# Types of metadata, by number; a word and a list are read by themselves.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?"}
_SCALARS |= {10: "Q", 11: "q", 12: "d"}
_WORD, _LIST = 8, 9
_MOST_AXES, _MOST_NESTED = 4, 8
# Types of tensors that are no blocks, by number.
PLAIN: dict[int, Any] = {
    0: np.float32,
    1: np.float16,
    24: np.int8,
    25: np.int16,
    26: np.int32,
    27: np.int64,
    28: np.float64,
    30: jnp.bfloat16,
}
# Those that jpeft has formats for: (name, bytes of a block of 32).
BLOCKS = {2: ("Q4_0", 18), 3: ("Q4_1", 20), 8: ("Q8_0", 34)}
# Values that are decoded at once.
_CHUNK = 1 << 22


def gguf_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a GGUF file says of its model: {key: number, word, bool or list of them}.

    Such as "general.architecture", "llama.block_count", "tokenizer.ggml.tokens".
    Raises CheckpointError for what is not there, truncated or no GGUF file.

    >>> import pathlib, struct, tempfile, jpeft
    >>> key, word = b"general.architecture", b"llama"
    >>> head = struct.pack("<4sIQQQ20sIQ5s", b"GGUF", 3, 0, 1, 20, key, 8, 5, word)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "tiny.gguf")
    ...     _ = path.write_bytes(head)
    ...     jpeft.hf.gguf_metadata(path)
    {'general.architecture': 'llama'}
    """
    return _read_head(Path(path)).metadata


def gguf_tensors(path: str | os.PathLike[str]) -> dict[str, tuple[int, ...]]:
    """The tensors of a GGUF file: {name: shape, rows first}.

    Raises CheckpointError as `gguf_metadata` does.

    >>> import pathlib, struct, tempfile, jpeft
    >>> head = struct.pack("<4sIQQQ1sIQQIQ", b"GGUF", 3, 1, 0, 1, b"a", 2, 3, 5, 0, 0)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "tiny.gguf")
    ...     _ = path.write_bytes(head.ljust(96 + 4 * 3 * 5, b"\\0"))
    ...     jpeft.hf.gguf_tensors(path)
    {'a': (5, 3)}
    """
    return {name: x.shape for name, x in _read_head(Path(path)).tensors.items()}


class Info(NamedTuple):
    """One tensor.  shape: rows first.  begin: its first byte in the file."""

    kind: int
    shape: tuple[int, ...]
    begin: int


class _Head(NamedTuple):
    metadata: dict[str, Any]
    tensors: dict[str, Info]
    size: int


class Gguf:
    """The tensors of one file.

    tensors: {name: Info}.  metadata: see `gguf_metadata`.
    """

    def __init__(self, path: Path):
        self.path = path
        self.metadata, self.tensors, size = _read_head(path)
        for name, x in self.tensors.items():
            self._check(name, x, size)

    def type_of(self, name: str) -> str:
        """Such as "F16", "Q4_0", "Q6_K"."""
        kind = self.tensors[name].kind
        if kind in BLOCKS:
            return BLOCKS[kind][0]
        if kind in PLAIN:
            return _NAMES[kind]
        return _library(self.path).GGMLQuantizationType(kind).name

    def dtype_of(self, name: str) -> np.dtype[Any]:
        """Of what `parts` gives: blocks are decoded to float32."""
        return np.dtype(PLAIN.get(self.tensors[name].kind, np.float32))

    def raw(self, name: str) -> np.ndarray:
        """uint8 (*rows, bytes of a row): a view of the file."""
        x = self.tensors[name]
        *rows, _ = x.shape or (1,)
        row, size = self._row_bytes(name, x), self._bytes(name, x)
        if size == 0:
            return np.zeros((*rows, row), np.uint8)
        try:
            found = np.memmap(self.path, np.uint8, "r", x.begin, (size,))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.path}: {name!r} is not there any more ({error}); the file "
                "changed after it was opened"
            ) from error
        return found.view(np.ndarray).reshape(*rows, row)

    def parts(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, some rows) until all rows are there, decoded."""
        x, raw = self.tensors[name], self.raw(name)
        if x.kind in PLAIN:
            yield 0, raw.view(PLAIN[x.kind]).reshape(x.shape)
            return
        library = _library(self.path)
        kind = library.GGMLQuantizationType(x.kind)
        many = max(1, _CHUNK // math.prod(x.shape[1:]))
        for k in range(0, x.shape[0], many):
            try:
                yield k, library.quants.dequantize(raw[k : k + many], kind)
            except NotImplementedError as error:
                raise CheckpointError(
                    f"{self.path}: {name!r} is {kind.name}, which gguf "
                    f"{_version(library)} does not decode; pip install -U gguf, or "
                    "take the model in another type"
                ) from error

    def _check(self, name: str, x: Info, size: int) -> None:
        # A view past the end of a file would kill the process.
        end = x.begin + self._bytes(name, x)
        if end > size:
            raise CheckpointError(
                f"{self.path}: truncated: {name!r} ends at byte {end}, the file at "
                f"{size}; finish the download"
            )

    def _bytes(self, name: str, x: Info) -> int:
        return self._row_bytes(name, x) * math.prod(x.shape[:-1])

    def _row_bytes(self, name: str, x: Info) -> int:
        if x.kind in PLAIN:
            block, bytes_ = 1, np.dtype(PLAIN[x.kind]).itemsize
        elif x.kind in BLOCKS:
            block, bytes_ = 32, BLOCKS[x.kind][1]
        else:
            block, bytes_ = self._of_library(name, x.kind)
        row = x.shape[-1] if x.shape else 1
        if row % block:
            raise CheckpointError(
                f"{self.path}: damaged: {name!r} of shape {x.shape} has rows that are "
                f"no multiple of {self.type_of(name)}'s blocks of {block}"
            )
        return row // block * bytes_

    def _of_library(self, name: str, kind: int) -> tuple[int, int]:
        library = _library(self.path)
        try:
            return library.GGML_QUANT_SIZES[library.GGMLQuantizationType(kind)]
        except (ValueError, KeyError) as error:
            raise CheckpointError(
                f"{self.path}: {name!r} has type {kind}, which gguf "
                f"{_version(library)} does not know; pip install -U gguf"
            ) from error


_NAMES = {0: "F32", 1: "F16", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64"}
_NAMES |= {30: "BF16"}
NUMBERS = frozenset(_NAMES.values())


def _library(path: Path) -> Any:
    try:
        import gguf  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            f"{path}: its blocks are decoded by gguf, which is not installed; type: "
            "pip install 'jpeft[hf]'"
        ) from missing
    return gguf


def _version(library: Any) -> str:
    from importlib.metadata import version

    return version(library.__name__)


# --- the head ------------------------------------------------------------------------


def _read_head(path: Path) -> _Head:
    try:
        if not path.is_file():
            kind = "a folder" if path.is_dir() else "no regular file"
            there = kind if path.exists() else "not there"
            raise CheckpointError(f"{path}: expected a GGUF file, this is {there}")
        with path.open("rb") as f:
            magic = f.read(len(MAGIC))
            if magic != MAGIC:
                raise CheckpointError(
                    f"{path}: no GGUF file: it begins with {magic!r}, expected "
                    f"{MAGIC!r}"
                )
            with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Cursor(path, data).head()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


class _Cursor:
    """Reads one value after the other, none beyond the end."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.at = path, data, len(MAGIC)

    def head(self) -> _Head:
        version = self.one("I")
        if version & 0xFFFF == 0:
            raise CheckpointError(
                f"{self.path}: written for machines of the other byte order; convert "
                "it with gguf's gguf-convert-endian"
            )
        if version not in VERSIONS:
            raise CheckpointError(
                f"{self.path}: version {version} of GGUF; known are 2 and 3"
            )
        n_tensors, n_keys = self.one("Q"), self.one("Q")
        metadata: dict[str, Any] = {}
        for _ in range(self.count(n_keys, 13)):
            self._enter(metadata, self.word(), self.value(self.one("I")))
        tensors: dict[str, Info] = {}
        for _ in range(self.count(n_tensors, 24)):
            self._enter(tensors, self.word(), self.info())
        align = metadata.get(ALIGNMENT, 32)
        if type(align) is not int or align < 1 or align & (align - 1):
            raise self.damaged(f"{ALIGNMENT} is {align!r}, expected a power of 2")
        start = -(-self.at // align) * align
        tensors = {n: x._replace(begin=x.begin + start) for n, x in tensors.items()}
        return _Head(metadata, tensors, len(self.data))

    def _enter(self, table: dict[str, Any], key: str, value: Any) -> None:
        if key in table:
            raise self.damaged(f"{key!r} is there twice")
        table[key] = value

    def info(self) -> Info:
        axes = self.one("I")
        if axes > _MOST_AXES:
            raise self.damaged(f"a tensor of {axes} axes")
        shape = tuple(reversed(self.some("Q", axes)))
        if math.prod(max(1, n) for n in shape) >= 2**60:
            raise self.damaged(f"the shape {shape}, beyond any array")
        kind, begin = self.one("I"), self.one("Q")
        return Info(kind, shape, begin)

    def value(self, kind: int, nested: int = 0) -> Any:
        if kind == _WORD:
            return self.word()
        if kind in _SCALARS:
            return self.one(_SCALARS[kind])
        if kind != _LIST or nested > _MOST_NESTED:
            raise self.damaged(f"a value of type {kind}")
        inner, n = self.one("I"), self.one("Q")
        if inner in _SCALARS:
            return list(self.some(_SCALARS[inner], n))
        # A word is its length at least, a list its type and length.
        return [self.value(inner, nested + 1) for _ in range(self.count(n, 8))]

    def word(self) -> str:
        n = self.one("Q")
        text = self.bytes(n)
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.damaged(f"{text[:40]!r} is no UTF-8") from error

    def one(self, kind: str) -> Any:
        return self.some(kind, 1)[0]

    def some(self, kind: str, n: int) -> tuple[Any, ...]:
        form = f"<{self.count(n, struct.calcsize('<' + kind))}{kind}"
        return struct.unpack(form, self.bytes(struct.calcsize(form)))

    def count(self, n: int, each: int) -> int:
        """n, if so many things of so many bytes can be there."""
        if n * each > len(self.data) - self.at:
            raise CheckpointError(
                f"{self.path}: truncated, or damaged: at byte {self.at} it needs "
                f"{n * each} bytes more, and ends at {len(self.data)}"
            )
        return n

    def bytes(self, n: int) -> bytes:
        self.count(n, 1)
        self.at += n
        return self.data[self.at - n : self.at]

    def damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: damaged before byte {self.at}: {what}")
