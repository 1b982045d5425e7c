"""The default instruction data: Python functions and what each does, in one sentence.

The question is a signature from the standard library, the answer the first sentence of
its docstring.  The sources are parsed, never imported; every Python has them.
"""

from __future__ import annotations

import ast
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from _dialogues import Dialogue

QUESTION = "What does this Python function do?\n\n{signature}"
MOST_LETTERS = 110  # of a signature, and of an answer
LEAST_WORDS = 4
# A sentence, up to a full stop that white space or the end follows.
_SENTENCE = re.compile(r"(.*?\.)(?=\s|$)", re.DOTALL)


def dialogues() -> list[Dialogue]:
    """Depends on the release of Python, which comes with its own docstrings, and on
    nothing else.  Of functions with the same answer the first is kept."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, Dialogue] = {}
    for file in sorted(stdlib.rglob("*.py")):
        name = file.relative_to(stdlib).with_suffix("")
        if {"test", "tests", "idlelib", "lib2to3", "site-packages"} & set(name.parts):
            continue
        if any(part.startswith("_") for part in name.parts[:-1]):
            continue
        module = ".".join(p for p in name.parts if p != "__init__").lstrip("_")
        for signature, answer in _documented(file, module):
            question = QUESTION.format(signature=signature)
            messages = (
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            )
            found.setdefault(
                answer.casefold(), Dialogue(messages, None, f"{module}: {signature}")
            )
    if not found:
        raise ValueError(
            f"found no docstrings under {stdlib}; the default data needs a Python "
            "whose standard library is installed as source files; pass --data"
        )
    return list(found.values())


def follows(answer: str) -> bool:
    """Whether an answer has the data's form: one sentence of four words or more."""
    answer = answer.strip()
    first = _SENTENCE.match(answer)
    return (
        first is not None
        and first[1] == answer
        and "\n" not in answer
        and len(answer) <= MOST_LETTERS
        and len(answer.split()) >= LEAST_WORDS
    )


def _documented(file: Path, module: str) -> Iterator[tuple[str, str]]:
    with warnings.catch_warnings():
        # Parsing warns of what is doubtful in the source, which is not ours.
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):  # samples of broken code are in some Pythons
            return
    for owner, node in _functions(tree, module):
        if node.name.startswith("_"):
            continue
        text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
        sentence = _SENTENCE.match(text)
        if sentence is None or len(sentence[1].split()) < LEAST_WORDS:
            continue
        signature = f"{owner}.{node.name}({ast.unparse(node.args)})"
        if max(len(signature), len(sentence[1])) <= MOST_LETTERS:
            yield signature, sentence[1]


def _functions(
    tree: ast.Module, module: str
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield module, node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield f"{module}.{node.name}", inner
