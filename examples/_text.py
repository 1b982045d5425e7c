"""Labelled text: two sources of it, splits, batches, and how predictions are scored.

Needs NumPy and nothing else.
"""

from __future__ import annotations

import ast
import csv
import dataclasses
import io
import json
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# Parts of the standard library, and the packages or modules each is made of: such as
# are in Python 3.11 and later, in every distribution of it, and rich in docstrings.
AREAS = {
    "asyncio": ("asyncio",),
    "concurrency": (
        *("concurrent", "multiprocessing", "queue", "sched"),
        *("subprocess", "threading"),
    ),
    "files": (
        *("bz2", "glob", "gzip", "lzma", "pathlib", "shutil", "tarfile", "tempfile"),
        "zipfile",
    ),
    "imports": ("importlib", "modulefinder", "pkgutil", "runpy", "zipimport"),
    "inspection": (
        *("ast", "dis", "inspect", "pydoc", "symtable", "tokenize", "traceback"),
        "typing",
    ),
    "internet": (
        *("ftplib", "http", "socket", "socketserver", "ssl", "urllib", "wsgiref"),
        "xmlrpc",
    ),
    "logging": ("logging",),
    "mail": ("email", "imaplib", "mailbox", "poplib", "smtplib"),
    "markup": ("html", "xml"),
    "numbers": ("_pydecimal", "fractions", "numbers", "random", "statistics"),
    "testing": ("bdb", "doctest", "pdb", "unittest"),
}
MAX_PER_CLASS = 300
MIN_WORDS, MAX_WORDS = 4, 60
POOL = 8  # batches that share out their texts by length

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_PACKAGES = sorted({name.lstrip("_") for names in AREAS.values() for name in names})
# With the dotted path behind the name, and the quotes around both.
_PACKAGE_NAME = re.compile(
    rf"([`'\"]*)(?<!\w)_?(?:{'|'.join(_PACKAGES)})(?:\.\w+)*(?:\(\))?(?!\w)\1",
    re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Texts, the number of each one's class (int32), and the names of the classes."""

    texts: tuple[str, ...]
    labels: np.ndarray
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Iterable[int]) -> Dataset:
        """The examples at these positions, with the classes of the whole."""
        chosen = np.fromiter(indices, np.int64)
        texts = tuple(self.texts[i] for i in chosen)
        return Dataset(texts, self.labels[chosen], self.classes)


# ------------------------------------------------------------------- the default data


def docstrings() -> Dataset:
    """Docstrings of the standard library; the class is the part they come from.

    The sources are parsed, never imported. An example is the first 60 words of a
    docstring, up to its first ``>>>`` prompt, with all white space collapsed; what has
    fewer than 4 words is left out. The names of all the packages in ``AREAS``, alone or
    with a dotted path behind, are removed from all texts: "the asyncio event loop"
    would give the answer away, and "unlike logging" in a text of another class would
    give away what the answer is not. A text that occurs repeatedly in one class is kept
    once, one that occurs in several classes not at all. Of the larger classes 300
    examples are kept, evenly spread over their files.

    The result depends on the release of Python, which comes with its own docstrings,
    and on nothing else.
    """
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    found = {area: _area_texts(stdlib, names) for area, names in AREAS.items()}
    owners = Counter(text.casefold() for texts in found.values() for text in texts)
    texts: list[str] = []
    labels: list[int] = []
    for label, (area, candidates) in enumerate(found.items()):
        own = [text for text in candidates if owners[text.casefold()] == 1]
        if not own:
            raise ValueError(
                f"found no docstrings of {', '.join(AREAS[area])} under {stdlib}; the "
                "default data needs a Python whose standard library is installed as "
                "source files; take such a Python, or give files of your own"
            )
        kept = min(len(own), MAX_PER_CLASS)
        texts += [own[i * len(own) // kept] for i in range(kept)]
        labels += [label] * kept
    return Dataset(tuple(texts), np.array(labels, np.int32), tuple(AREAS))


def _area_texts(stdlib: Path, packages: Sequence[str]) -> list[str]:
    texts: dict[str, str] = {}
    for package in packages:
        for file in _sources(stdlib, package):
            for docstring in _file_docstrings(file):
                text = _clean(docstring)
                if len(text.split()) >= MIN_WORDS:
                    texts.setdefault(text.casefold(), text)
    return list(texts.values())


def _sources(stdlib: Path, package: str) -> list[Path]:
    # Either a module or a package, and not always the same in all releases.
    files = [*stdlib.glob(f"{package}.py"), *(stdlib / package).rglob("*.py")]
    relative = {file.relative_to(stdlib).as_posix(): file for file in files}
    # Until 3.11 unittest carried its own tests, which some distributions leave out.
    tests = {"test", "tests"}
    return [
        relative[name] for name in sorted(relative) if not tests & {*name.split("/")}
    ]


def _file_docstrings(file: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        # Parsing warns of what is doubtful in the source, which is not ours.
        warnings.simplefilter("ignore")
        tree = ast.parse(file.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and (text := ast.get_docstring(node)):
            yield text


def _clean(docstring: str) -> str:
    text = _PACKAGE_NAME.sub("", docstring.partition(">>>")[0])
    return " ".join(text.split()[:MAX_WORDS])


# --------------------------------------------------------------------- data in a file


def read(
    path: str | Path,
    *,
    text: str = "text",
    label: str = "label",
    classes: Sequence[str] | None = None,
) -> Dataset:
    """The labelled texts in a ``.jsonl``, ``.csv`` or ``.tsv`` file (UTF-8).

    The first line of a ``.csv`` or ``.tsv`` names the columns; both are quoted as the
    ``csv`` module does it. Labels are strings or integers, and the classes are the
    labels that occur, sorted (as numbers if all are). For a second file pass the
    ``classes`` of the first, so that both number them alike; then a label that is not
    among them is an error. Whatever cannot be used is a ValueError which names the file
    and the line.
    """
    path = Path(path)
    readers = {".jsonl": _jsonl, ".csv": _csv, ".tsv": _csv}
    if path.suffix.lower() not in readers:
        raise ValueError(
            f"{path}: expected a file that ends in {', '.join(readers)}, found "
            f"{path.suffix or 'no extension'!r}; convert or rename it"
        )
    texts: list[str] = []
    names: list[str] = []
    for line, row in readers[path.suffix.lower()](path):
        where = f"{path}:{line}"
        texts.append(_text(where, row, text))
        names.append(_label(where, row, label))
        if classes is not None and names[-1] not in classes:
            raise ValueError(
                f"{where}: the label {names[-1]!r} does not occur in the training "
                f"data, whose classes are {_listed(classes)}; correct the label or "
                "leave out the line"
            )
    if not texts:
        raise ValueError(f"{path}: the file has no examples; expected one per line")
    if classes is None:
        classes = _sorted_labels(set(names))
        if len(classes) == 1:
            raise ValueError(
                f"{path}: all {len(texts)} examples have the label {classes[0]!r}; "
                "expected two classes or more; is --label-column the right one?"
            )
    number = {name: i for i, name in enumerate(classes)}
    labels = np.array([number[name] for name in names], np.int32)
    return Dataset(tuple(texts), labels, tuple(classes))


def _jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    # Not splitlines(), which also splits at characters that JSON allows in a string.
    for number, line in enumerate(decoded(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"{path}:{number}: not valid JSON ({error}): {line.strip()[:60]!r}; "
                'expected one object per line, like {"text": "...", "label": "..."}'
            ) from error
        if not isinstance(row, dict):
            raise ValueError(
                f"{path}:{number}: expected a JSON object, like "
                f'{{"text": "...", "label": "..."}}, found {line.strip()[:60]!r}'
            )
        yield number, row


def _csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    content = io.StringIO(decoded(path), newline="")
    rows = csv.reader(content, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for row in rows:
            if row and header is None:
                header = row
            elif row and header is not None:
                if len(row) != len(header):
                    raise ValueError(
                        f"{path}:{line}: expected {len(header)} fields, as in the "
                        f"header ({_listed(header)}), found {len(row)}; put a field "
                        f"that holds a {delimiter!r} or a line break between quotes"
                    )
                yield line, dict(zip(header, row, strict=True))
            # A quoted field may span lines: name the first one of each row.
            line = rows.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"{path}:{line}: {error}; a field that begins with a quotation mark must "
            "end with one, and those inside must be doubled"
        ) from error


def decoded(path: Path) -> str:
    """The text of a file; ValueError, naming the line, if it is not UTF-8."""
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}:{line}: expected UTF-8, found the byte "
            f"0x{content[error.start]:02x}; save the file as UTF-8"
        ) from error


def _text(where: str, row: dict[str, Any], column: str) -> str:
    value = _column(where, row, column, "--text-column")
    if not isinstance(value, str):
        raise ValueError(f"{where}: {column!r} should be a text, found {value!r:.60}")
    if not value.strip():
        raise ValueError(
            f"{where}: the text in {column!r} is empty; leave out the line"
        )
    return value.strip()


def _label(where: str, row: dict[str, Any], column: str) -> str:
    value = _column(where, row, column, "--label-column")
    # A bool is an int to Python, but True and "true" would become two classes.
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(
            f"{where}: {column!r} should be a string or an integer, found {value!r:.60}"
        )
    if not (name := str(value).strip()):
        raise ValueError(f"{where}: the label in {column!r} is empty; give it a class")
    return name


def _column(where: str, row: dict[str, Any], column: str, option: str) -> Any:
    if column not in row:
        raise ValueError(
            f"{where}: no column {column!r}, only {_listed(row) or 'an empty object'}; "
            f"name the right one with {option}"
        )
    return row[column]


def _sorted_labels(names: set[str]) -> list[str]:
    try:
        return sorted(names, key=lambda name: (int(name), name))
    except ValueError:
        return sorted(names)


def _listed(names: Iterable[str], limit: int = 20) -> str:
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(repr(name) for name in names[:limit]) + more


# ----------------------------------------------------------------- splits and batches


def split(
    dataset: Dataset, *, fraction: float = 0.2, seed: int = 0
) -> tuple[Dataset, Dataset]:
    """Two parts, ``(train, eval)``; the second has this fraction of every class.

    Of a class with two examples or more each part has at least one; the only example
    of a class is for training. Both parts keep the order of the whole.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must lie between 0 and 1, found {fraction}")
    rng = np.random.default_rng(seed)
    held_out = np.zeros(len(dataset), bool)
    for label in range(len(dataset.classes)):
        members = rng.permutation(np.flatnonzero(dataset.labels == label))
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        held_out[members[: max(count, 0)]] = True
    if not held_out.any():
        raise ValueError(
            f"cannot split {len(dataset)} examples of {len(dataset.classes)} classes: "
            "expected a class with two examples or more"
        )
    return (
        dataset.take(np.flatnonzero(~held_out)),
        dataset.take(np.flatnonzero(held_out)),
    )


def batches(
    n: int,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    lengths: np.ndarray | None = None,
) -> Iterator[np.ndarray]:
    """The positions 0 ... n - 1 in the order of this epoch, ``batch_size`` at a time.

    The same seed and epoch give the same order. Positions left over at the end, fewer
    than ``batch_size``, are dropped, so that all batches have one size. With
    ``lengths``, those of the texts, a batch holds texts of like length, so that little
    of it is padding: each `POOL` batches that follow each other share out their texts
    anew, by length, and come in an order that does not depend on it.
    """
    if not 1 <= batch_size <= n:
        raise ValueError(
            f"the batch size must lie between 1 and the number of examples, {n}; "
            f"found {batch_size}"
        )
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(n)[: n // batch_size * batch_size]
    if lengths is None:
        return iter(order.reshape(-1, batch_size))
    found: list[np.ndarray] = []
    for begin in range(0, len(order), POOL * batch_size):
        pool = order[begin : begin + POOL * batch_size]
        pool = pool[np.argsort(lengths[pool], kind="stable")].reshape(-1, batch_size)
        found.extend(rng.permutation(pool))
    return iter(found)


# ----------------------------------------------------------------------------- scores


def accuracy_f1(
    labels: np.ndarray, predictions: np.ndarray, num_classes: int
) -> tuple[float, float]:
    """The accuracy and the macro-averaged F1, both between 0 and 1.

    The average is over the classes that occur among the labels or the predictions; a
    class that is never predicted rightly counts as 0.
    """
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    if labels.shape != predictions.shape or labels.ndim != 1 or not len(labels):
        raise ValueError(
            "expected labels and predictions of one shape [n], n >= 1, found "
            f"{labels.shape} and {predictions.shape}"
        )
    right = np.bincount(labels[labels == predictions], minlength=num_classes)
    # F1 = 2 TP / (2 TP + FP + FN), where TP + FN and TP + FP are these two counts.
    total = np.bincount(labels, minlength=num_classes)
    total = total + np.bincount(predictions, minlength=num_classes)
    occurs = total > 0
    f1 = 2 * right[occurs] / total[occurs]
    return float(np.mean(labels == predictions)), float(f1.mean())


def majority(train: Dataset, evaluation: Dataset) -> float:
    """The accuracy of always answering the most frequent class of ``train``."""
    answer = np.bincount(train.labels, minlength=len(train.classes)).argmax()
    return float(np.mean(evaluation.labels == answer))
