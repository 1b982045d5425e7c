"""Token sequences put into rows of one length: packed, several to a row, or padded.

Of a row `segments` says which document a token belongs to, from 1; 0 is padding.
`counted` says which tokens the loss counts.  Nothing is told by a token's id: the one
that pads is often the one that ends an answer.
"""

from __future__ import annotations

import bisect
import dataclasses
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

TOO_LONG = ("truncate", "drop", "keep")


class Document(NamedTuple):
    """ids: int32 (n,).  counted: bool (n,).  at: where it comes from, for errors."""

    ids: np.ndarray
    counted: np.ndarray
    at: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """ids, segments: int32 (rows, length).  counted: bool, the same shape."""

    ids: np.ndarray
    segments: np.ndarray
    counted: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, k: int) -> dict[str, np.ndarray]:
        return {
            "ids": self.ids[k],
            "segments": self.segments[k],
            "counted": self.counted[k],
        }

    def checksum(self) -> int:
        """Tells these rows from others."""
        sums = 0
        for x in (self.ids, self.segments, self.counted):
            sums = zlib.crc32(np.ascontiguousarray(x).tobytes(), sums)
        return sums


class Fitted(NamedTuple):
    """What became of documents that were too long."""

    documents: list[Document]
    truncated: int
    dropped: int
    # Those of which nothing that counts was left.
    emptied: int

    def told(self, length: int) -> str:
        """A line for the reader; empty if all fitted."""
        parts = [
            f"{n} {what}"
            for n, what in (
                (self.truncated, "cut off at their end"),
                (self.dropped, "dropped"),
                (self.emptied, "dropped, since nothing of the answer was left"),
            )
            if n
        ]
        return f"longer than {length} tokens: {', '.join(parts)}" if parts else ""


def fit(documents: Sequence[Document], length: int, too_long: str) -> Fitted:
    """Documents of at most `length` tokens.

    too_long: "truncate" cuts the end off (a document that counts nothing then is
    dropped), "drop" leaves it out, "keep" raises, naming the first: what is to be kept
    wants longer rows.
    """
    if too_long not in TOO_LONG:
        raise ValueError(f"too_long={too_long!r}: expected one of {TOO_LONG}")
    kept, truncated, dropped, emptied = [], 0, 0, 0
    for d in documents:
        if len(d.ids) > length:
            if too_long == "keep":
                raise ValueError(
                    f"{d.at}: {len(d.ids)} tokens, and rows have {length}; give a "
                    "larger --length, or --too-long truncate or drop"
                )
            if too_long == "drop":
                dropped += 1
                continue
            d = d._replace(ids=d.ids[:length], counted=d.counted[:length])
            # The first token of a document is never predicted.
            if not d.counted[1:].any():
                emptied += 1
                continue
            truncated += 1
        kept.append(d)
    if not kept:
        raise ValueError(
            f"none of {len(documents)} examples fits into {length} tokens; give a "
            "larger --length"
        )
    return Fitted(kept, truncated, dropped, emptied)


def pack(documents: Sequence[Document], length: int, pad: int) -> Rows:
    """Several documents to a row, best fit, the longest first.

    A row's documents are the numbers 1, 2, ... of `segments`.
    """
    free: list[tuple[int, int]] = []  # (room, row), sorted
    rows: list[list[int]] = []
    order = sorted(range(len(documents)), key=lambda k: -len(documents[k].ids))
    for k in order:
        size = len(documents[k].ids)
        if size > length:
            raise ValueError(f"{documents[k].at}: {size} tokens; rows have {length}")
        at = bisect.bisect_left(free, (size, -1))
        if at < len(free):
            room, row = free.pop(at)
            rows[row].append(k)
        else:
            room, row = length, len(rows)
            rows.append([k])
        bisect.insort(free, (room - size, row))
    return _filled([[documents[k] for k in row] for row in rows], length, pad)


def one_each(documents: Sequence[Document], length: int, pad: int) -> Rows:
    """A row for each document, padded on the right."""
    return _filled([[d] for d in documents], length, pad)


def _filled(rows: Sequence[Sequence[Document]], length: int, pad: int) -> Rows:
    ids = np.full((len(rows), length), pad, np.int32)
    segments = np.zeros(ids.shape, np.int32)
    counted = np.zeros(ids.shape, bool)
    for r, row in enumerate(rows):
        start = 0
        for number, d in enumerate(row, start=1):
            at = slice(start, start + len(d.ids))
            ids[r, at], segments[r, at], counted[r, at] = d.ids, number, d.counted
            start = at.stop
    return Rows(ids, segments, counted)
