"""Files of pretrained models as one thing: tensors by torch's names, part by part."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from jpeft.checkpoint._safetensors import INDEX, Tensors, open_tensors
from jpeft.checks import read_json, shown
from jpeft.hf._gguf import Gguf
from jpeft.hf.names import HEAD, from_gguf, interleaved_heads
from jpeft.types import CheckpointError

CONFIG = "config.json"
# Of how many files a model in GGUF is.
SPLIT = "split.count"


class Files(Protocol):
    """stored: {torch's name: shape and dtype}.  architecture: "" where nothing says it.
    tied: whether the head is the embedding, as far as is known."""

    path: Path
    stored: dict[str, jax.ShapeDtypeStruct]
    architecture: str
    tied: bool

    def parts(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, some rows) until all are there; rows are along the first axis."""
        ...

    def type_of(self, name: str) -> str:
        """What the numbers are stored as."""
        ...


def open_files(path: Path) -> Files:
    """A folder of Hugging Face, a safetensors file (or index), a GGUF file."""
    expected = (
        f"{path}: expected a folder with config.json and *.safetensors, a .safetensors "
        "file, or a .gguf file"
    )
    try:
        if not path.exists():
            raise CheckpointError(f"{path}: no such file or folder")
        if path.suffix == ".gguf":
            return GgufFiles(Gguf(path))
        if path.is_file() and not path.name.endswith((".safetensors", INDEX)):
            raise CheckpointError(f"{expected}; this is {path.name!r}")
        found = open_tensors(path)
        if found is not None:
            return TorchFiles(found, path if path.is_dir() else path.parent)
        there = sorted(p.name for p in path.iterdir())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if models := [n for n in there if n.endswith(".gguf")]:
        raise CheckpointError(
            f"{expected}; there is {', '.join(models[:5])}: pass one such file"
        )
    raise CheckpointError(f"{expected}; there is {', '.join(there[:5]) or 'nothing'}")


class TorchFiles:
    """Tensors of safetensors, and what config.json beside them says."""

    def __init__(self, tensors: Tensors, folder: Path):
        self.path, self.stored, self._tensors = tensors.path, tensors.stored, tensors
        config = _config(folder / CONFIG)
        self.architecture = config.get("model_type", "")
        self.tied = config.get("tie_word_embeddings", False) is True

    def parts(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        yield 0, self._tensors.read(name)

    def type_of(self, name: str) -> str:
        return np.dtype(self.stored[name].dtype).name


def _config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        read = read_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: damaged: {error}") from error
    if not isinstance(read, dict) or not isinstance(read.get("model_type", ""), str):
        raise CheckpointError(
            f"{file}: damaged: expected a table with a word for 'model_type', found "
            f"{shown(read)}"
        )
    return read


class GgufFiles:
    """Tensors of a GGUF file under torch's names, rows in torch's order."""

    def __init__(self, file: Gguf):
        self.path, self.file = file.path, file
        if (n := file.metadata.get(SPLIT, 1)) != 1:
            raise CheckpointError(
                f"{file.path}: one of {n} files of a model; put them together with "
                "llama.cpp's llama-gguf-split --merge"
            )
        self.architecture = str(file.metadata.get("general.architecture", ""))
        self._own: dict[str, str] = {}
        for name in file.tensors:
            torch = from_gguf(name)
            if torch in self._own:
                raise CheckpointError(
                    f"{file.path}: {name!r} and {self._own[torch]!r} are both {torch!r}"
                )
            self._own[torch] = name
        self.tied = HEAD not in self._own
        self.stored = {
            torch: jax.ShapeDtypeStruct(file.tensors[own].shape, file.dtype_of(own))
            for torch, own in self._own.items()
        }

    def parts(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        own = self._own[name]
        if heads := self._heads(own):
            rows = np.concatenate([x for _, x in self.file.parts(own)])
            yield 0, self._in_order(own, rows, heads)
        else:
            yield from self.file.parts(own)

    def raw(self, name: str) -> np.ndarray:
        """uint8 (rows, bytes of a row), the rows in torch's order."""
        own = self._own[name]
        rows, heads = self.file.raw(own), self._heads(own)
        return self._in_order(own, rows, heads) if heads else rows

    def type_of(self, name: str) -> str:
        return self.file.type_of(self._own[name])

    def _heads(self, own: str) -> int:
        try:
            return interleaved_heads(own, self.file.metadata)
        except ValueError as error:
            raise CheckpointError(f"{self.path}: {error}") from error

    def _in_order(self, own: str, rows: np.ndarray, heads: int) -> np.ndarray:
        """Of each head the even rows, then the odd ones: what llama.cpp undid."""
        if rows.shape[0] % (2 * heads):
            raise CheckpointError(
                f"{self.path}: {own!r} has {rows.shape[0]} rows for {heads} heads of "
                "pairs; the metadata is of another model"
            )
        pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
        return pairs.swapaxes(1, 2).reshape(rows.shape)
