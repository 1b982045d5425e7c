"""The one place that reads GGUF: metadata, and tensors mapped when they are asked for.

The format is read by its own library, `gguf`, whose errors on damaged files become ours.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

from jpeft.types import CheckpointError

MAGIC = b"GGUF"
# What the library raises, in its own time, for a file that is cut off or no GGUF.
_DAMAGED = (
    ValueError,  # also what is no UTF-8
    KeyError,
    IndexError,
    TypeError,
    OverflowError,
    struct.error,
)
# What the library keeps of the file's head among the metadata.
_HEAD = "GGUF."


def gguf_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a GGUF file says of its model: {key: number, word, bool or list of them}.

    Such as "general.architecture", "llama.block_count", "tokenizer.ggml.tokens".

    Raises CheckpointError for a file that is not there, truncated or no GGUF file, and
    ModuleNotFoundError without `gguf`.
    """
    reader = open_reader(Path(path))
    fields = {k: f for k, f in reader.fields.items() if not k.startswith(_HEAD)}
    return {k: _value(path, k, f) for k, f in fields.items()}


def open_reader(path: Path) -> Any:
    """The library's GGUFReader, which maps the file; its errors name the file."""
    try:
        import gguf
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            f"{path}: a GGUF file is read by gguf: pip install 'jpeft[hf]'"
        ) from missing
    try:
        with path.open("rb") as f:
            magic = f.read(len(MAGIC))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if magic != MAGIC:
        raise CheckpointError(
            f"{path}: no GGUF file: it begins with {magic!r}, expected {MAGIC!r}"
        )
    try:
        reader = gguf.GGUFReader(path)
    except _DAMAGED as error:
        raise CheckpointError(
            f"{path}: truncated, or damaged: {error}; finish the download"
        ) from error
    if reader.byte_order == "S":
        raise CheckpointError(
            f"{path}: written for machines of the other byte order; convert it with "
            "gguf's gguf_convert_endian"
        )
    return reader


def _value(path: Any, key: str, field: Any) -> Any:
    """One field as Python's own numbers, words and lists."""
    kinds = [t.name for t in field.types]
    try:
        parts = [field.parts[k] for k in field.data]
        if kinds[-1] == "STRING":
            found = [bytes(p).decode("utf-8") for p in parts]
        else:
            found = [x for p in parts for x in p.tolist()]
        return found if kinds[0] == "ARRAY" else found[0]
    except (*_DAMAGED, AttributeError) as error:
        raise CheckpointError(f"{path}: {key!r} is damaged: {error}") from error
