"""The main job's texts as CSV files, for runs elsewhere on the very same ones.

    python examples/write_docstrings.py FOLDER

Writes FOLDER/train.csv and FOLDER/test.csv, columns ``text`` and ``label``: what seed 0
trains on and holds out.  Each release of Python has its own docstrings.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

import _text


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    options.add_argument("folder", type=Path, metavar="FOLDER")
    folder = options.parse_args(argv).folder
    folder.mkdir(parents=True, exist_ok=True)
    parts = _text.split(_text.docstrings(), seed=0)
    for name, part in zip(("train", "test"), parts, strict=True):
        with open(folder / f"{name}.csv", "w", encoding="utf-8", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["text", "label"])
            for text, label in zip(part.texts, part.labels, strict=True):
                rows.writerow([text, part.classes[label]])
        print(f"{folder / name}.csv: {len(part)} examples")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
