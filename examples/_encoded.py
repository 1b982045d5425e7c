"""Examples as token ids: reading them, cutting batches, and predicting in bulk."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import _bert
import _text
import jax
import numpy as np

import jpeft

BUCKET = 16  # batches are cut to multiples of it: one compiled program each
EVAL_BATCH = 64


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
    """Token ids, mask and labels of examples: ``[n, length]`` twice, and ``[n]``."""

    ids: np.ndarray
    mask: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each example: ``[n]``."""
        return self.mask.sum(1)

    def take(self, rows: Any) -> Encoded:
        """These rows, cut to the bucket of the longest of them."""
        mask = self.mask[rows]
        longest = int(self.lengths[rows].max())
        length = min(-(-longest // BUCKET) * BUCKET, mask.shape[1])
        return Encoded(self.ids[rows, :length], mask[:, :length], self.labels[rows])

    def prepended(self, n: int, vocab_size: int) -> Encoded:
        """With ``n`` virtual tokens in front of each text."""
        if n == 0:
            return self
        new = jpeft.prepend_virtual_tokens(
            self.ids, n, vocab_size=vocab_size, mask=self.mask
        )
        return Encoded(new.ids, new.mask, self.labels)

    def sample(self, most: int, seed: int) -> Encoded:
        """At most so many rows, chosen by the seed."""
        order = np.random.default_rng(seed).permutation(len(self))
        return self.take(order[:most])

    def checksum(self) -> int:
        """Of what the model sees, so that a resumed run can tell other data."""
        crc = 0
        for array in (self.ids, self.mask, self.labels):
            crc = zlib.crc32(np.ascontiguousarray(array), crc)
        return crc


def read(
    data: Path | None,
    held_out: Path | None,
    *,
    columns: dict[str, str],
    limits: tuple[int | None, int | None],
    seed: int,
) -> tuple[_text.Dataset, _text.Dataset]:
    """Texts to train on and held-out ones, each cut to its limit by a seeded choice.

    Without ``data`` the docstrings of the standard library; without ``held_out`` a
    part of the data is held out.
    """
    if data is None and held_out is not None:
        raise ValueError("--eval needs --data, or the default data is split")
    for name, file in (("--data", data), ("--eval", held_out)):
        if file is not None and not file.is_file():
            raise FileNotFoundError(f"{name} {file}: no such file")
    texts = _text.docstrings() if data is None else _text.read(data, **columns)
    if held_out is None:
        parts = _text.split(texts, seed=seed)
    else:
        parts = texts, _text.read(held_out, classes=texts.classes, **columns)
    return (
        _limited(parts[0], limits[0], [seed, 1]),
        _limited(parts[1], limits[1], [seed, 2]),
    )


def _limited(
    data: _text.Dataset, limit: int | None, seed: Sequence[int]
) -> _text.Dataset:
    if limit is None or limit >= len(data):
        return data
    return data.take(np.random.default_rng(seed).permutation(len(data))[:limit])


def encode(data: _text.Dataset, tokenize: _bert.Encode, vocab_size: int) -> Encoded:
    """The texts as ids; ValueError if the model has no vector for one of them."""
    ids, mask = tokenize(data.texts)
    # An id past the embedding's end would not fail in JAX but read as NaN.
    if (largest := int(ids.max())) >= vocab_size:
        raise ValueError(
            f"the tokenizer makes the id {largest}, but the base's vocabulary has "
            f"{vocab_size} entries; its tokenizer.json and config.json do not belong "
            "together"
        )
    return Encoded(ids, mask, data.labels)


def predict(logits: Callable[..., jax.Array], params: Any, data: Encoded) -> np.ndarray:
    """Class scores ``[n, classes]``, in batches of texts of like length."""
    order = np.argsort(data.lengths, kind="stable")
    found: list[np.ndarray] = []
    for start in range(0, len(data), EVAL_BATCH):
        batch = data.take(order[start : start + EVAL_BATCH])
        fill = ((0, EVAL_BATCH - len(batch)), (0, 0))
        scores = logits(params, np.pad(batch.ids, fill), np.pad(batch.mask, fill))
        found.append(np.asarray(scores)[: len(batch)])
    return np.concatenate(found)[np.argsort(order)]
