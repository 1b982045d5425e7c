"""Instruction data and preference pairs, from files in the forms that people have.

A file is JSON (a list of objects), JSON Lines, CSV, TSV or Parquet; each row is one of

    {"messages": [{"role": "user", "content": ...}, ...]}         a chat
    {"conversations": [{"from": "human", "value": ...}, ...]}     ShareGPT
    {"instruction": ..., "input": ..., "output": ...}             Alpaca; input may lack
    {"prompt": ..., "completion": ...}                            texts, or messages
    {"text": ...}                                                 plain text
    {"prompt": ..., "chosen": ..., "rejected": ...}               a pair; prompt may be
                                                                  inside the two

Whatever cannot be used raises ValueError with the file and the line or row.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import string
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _text import decoded

Message = dict[str, str]
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "bing": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "user": "user",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}
FIELDS = ("instruction", "input", "output")
# What Alpaca's rows become: the question, and the text that it is about.
PROMPT = "{instruction}\n\n{input}"


@dataclasses.dataclass(frozen=True)
class Dialogue:
    """Something to learn from: a chat, or a text that is none.

    at: the file and the line, for errors.
    """

    messages: tuple[Message, ...]
    text: str | None
    at: str

    @property
    def question(self) -> list[Message]:
        """The chat before its last answer."""
        return list(self.messages[:-1])

    @property
    def answer(self) -> str:
        return self.messages[-1]["content"]


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two answers to one question, the first of them preferred."""

    question: tuple[Message, ...]
    chosen: str
    rejected: str
    at: str

    def __post_init__(self) -> None:
        if self.chosen == self.rejected:
            raise ValueError(
                f"{self.at}: both answers are the same ({self.chosen[:60]!r}); there "
                "is nothing to prefer, leave the pair out"
            )


def dialogues(path: str | Path, *, prompt: str = PROMPT) -> list[Dialogue]:
    """The instruction data in a file.

    prompt: the question that rows of `instruction`, `input`, `output` become, with
        those fields in braces; without an input it is the instruction alone.
    """
    check_prompt(prompt)
    found = [_dialogue(at, row, prompt) for at, row in rows(Path(path))]
    if not found:
        raise ValueError(f"{path}: the file has no examples")
    return found


def pairs(path: str | Path) -> list[Pair]:
    """The preference pairs in a file."""
    found = [_pair(at, row) for at, row in rows(Path(path))]
    if not found:
        raise ValueError(f"{path}: the file has no pairs")
    return found


def check_prompt(prompt: str) -> None:
    """Raises unless it has an instruction, and no field that rows have not."""
    try:
        fields = {name for _, name, _, _ in string.Formatter().parse(prompt) if name}
    except ValueError as error:
        raise ValueError(f"prompt {prompt!r}: {error}; double a brace {{{{") from error
    if unknown := sorted(fields - set(FIELDS[:2])):
        raise ValueError(
            f"prompt {prompt!r}: unknown field {unknown[0]!r}; there are "
            "{instruction} and {input}"
        )
    if "instruction" not in fields:
        raise ValueError(f"prompt {prompt!r}: leaves the {{instruction}} out")


# --- a row ---------------------------------------------------------------------------


def _dialogue(at: str, row: Mapping[str, Any], prompt: str) -> Dialogue:
    if "messages" in row:
        return Dialogue(_chat(at, row["messages"], "role", "content"), None, at)
    if "conversations" in row:
        return Dialogue(_chat(at, row["conversations"], "from", "value"), None, at)
    if "instruction" in row:
        question = _text(at, row, "instruction")
        if row.get("input"):
            question = prompt.format(
                instruction=question, input=_text(at, row, "input")
            )
        answer = _text(at, row, "output")
        return Dialogue((_said("user", question), _said("assistant", answer)), None, at)
    if "completion" in row:
        return Dialogue(
            (*asked(at, row), _said("assistant", _answer(at, row, "completion"))),
            None,
            at,
        )
    if "text" in row:
        return Dialogue((), _text(at, row, "text"), at)
    raise ValueError(
        f"{at}: expected 'messages', 'conversations', 'instruction' and 'output', "
        f"'prompt' and 'completion', or 'text', found {', '.join(map(repr, row))}"
    )


def _pair(at: str, row: Mapping[str, Any]) -> Pair:
    for name in ("chosen", "rejected"):
        if name not in row:
            raise ValueError(
                f"{at}: a pair has 'chosen' and 'rejected', found "
                f"{', '.join(map(repr, row)) or 'an empty object'}"
            )
    if row.get("prompt") is not None:
        question = asked(at, row)
        both = [_answer(at, row, name) for name in ("chosen", "rejected")]
        return Pair(question, both[0], both[1], at)
    chats = [_chat(at, row[name], "role", "content") for name in ("chosen", "rejected")]
    if chats[0][:-1] != chats[1][:-1]:
        raise ValueError(
            f"{at}: 'chosen' and 'rejected' differ before their last message; a pair "
            "is two answers to one question"
        )
    return Pair(chats[0][:-1], chats[0][-1]["content"], chats[1][-1]["content"], at)


def asked(at: str, row: Mapping[str, Any]) -> tuple[Message, ...]:
    found = _listed(row["prompt"])
    if isinstance(found, str):
        return (_said("user", _text(at, row, "prompt")),)
    return _messages(at, found, "role", "content")


def _answer(at: str, row: Mapping[str, Any], name: str) -> str:
    found = _listed(row[name])
    if isinstance(found, str):
        return _text(at, row, name)
    messages = _messages(at, found, "role", "content")
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise ValueError(f"{at}: {name!r} should be one answer, found {found!r:.80}")
    return messages[0]["content"]


def _chat(at: str, found: Any, role: str, content: str) -> tuple[Message, ...]:
    messages = _messages(at, found, role, content)
    if messages[-1]["role"] != "assistant":
        raise ValueError(
            f"{at}: the chat ends with a message by {messages[-1]['role']!r}; expected "
            "an answer by 'assistant' (or 'gpt') at its end"
        )
    return messages


def _messages(at: str, found: Any, role: str, content: str) -> tuple[Message, ...]:
    found = _listed(found)
    if not isinstance(found, list) or not found:
        raise ValueError(f"{at}: expected a list of messages, found {found!r:.80}")
    messages = []
    for k, x in enumerate(found):
        if not isinstance(x, Mapping) or role not in x or content not in x:
            raise ValueError(
                f"{at}: message {k} should have {role!r} and {content!r}, found "
                f"{x!r:.80}"
            )
        if x[role] not in ROLES:
            raise ValueError(
                f"{at}: message {k} is by {x[role]!r}; expected one of "
                f"{', '.join(ROLES)}"
            )
        who = ROLES[x[role]]
        messages.append(_said(who, _text(f"{at}: message {k}", x, content)))
    return tuple(messages)


def _said(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _text(at: str, row: Mapping[str, Any], name: str) -> str:
    if name not in row:
        raise ValueError(
            f"{at}: no field {name!r}, only {', '.join(map(repr, row)) or 'nothing'}"
        )
    value = row[name]
    if not isinstance(value, str):
        raise ValueError(f"{at}: {name!r} should be a text, found {value!r:.60}")
    if not value.strip():
        raise ValueError(f"{at}: {name!r} is empty; leave out the row")
    return value


def _listed(x: Any) -> Any:
    """Lists of messages in a CSV are written as JSON."""
    if isinstance(x, str) and x.lstrip().startswith("[{"):
        try:
            return json.loads(x)
        except ValueError:
            return x
    return x


# --- files ---------------------------------------------------------------------------


def rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and line, row) of a file."""
    readers = {
        ".json": _json,
        ".jsonl": _jsonl,
        ".csv": _csv,
        ".tsv": _csv,
        ".parquet": _parquet,
    }
    kind = path.suffix.lower()
    if kind not in readers:
        raise ValueError(
            f"{path}: expected a file that ends in {', '.join(readers)}, found "
            f"{kind or 'no extension'!r}; convert or rename it"
        )
    return readers[kind](path)


def _json(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        found = json.loads(decoded(path))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}:{error.lineno}: not valid JSON ({error.msg}); a file with one "
            "object per line should end in .jsonl"
        ) from error
    if not isinstance(found, list):
        raise ValueError(f"{path}: expected a list of objects, found {found!r:.60}")
    for k, row in enumerate(found):
        yield _checked(f"{path}, row {k + 1}", row)


def _jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    # Not splitlines(), which also splits at characters that JSON allows in a string.
    for number, line in enumerate(decoded(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"{path}:{number}: not valid JSON ({error}): {line.strip()[:60]!r}; "
                "expected one object per line"
            ) from error
        yield _checked(f"{path}:{number}", row)


def _csv(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    lines = csv.DictReader(
        io.StringIO(decoded(path), newline=""),
        delimiter=delimiter,
        strict=True,
    )
    at = 1
    try:
        for row in lines:
            if None in row or None in row.values():
                raise ValueError(
                    f"{path}:{at + 1}: expected {len(lines.fieldnames or ())} fields, "
                    "as in the header; put a field that holds a delimiter or a line "
                    "break between quotes"
                )
            yield f"{path}:{at + 1}", row
            at = lines.line_num
    except csv.Error as error:
        raise ValueError(f"{path}:{lines.line_num}: {error}") from error


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise ValueError(
            f"{path}: reading Parquet needs pyarrow; type: pip install pyarrow"
        ) from None
    for k, row in enumerate(parquet.read_table(path).to_pylist()):
        yield (
            f"{path}, row {k + 1}",
            {name: x for name, x in row.items() if x is not None},
        )


def _checked(at: str, row: Any) -> tuple[str, dict[str, Any]]:
    if not isinstance(row, dict):
        raise ValueError(f"{at}: expected an object, found {row!r:.60}")
    return at, row


def split(items: Sequence[Any], held_out: int, seed: int) -> tuple[list, list]:
    """(train, held out): so many of them, drawn; both in the order they had."""
    if not 0 < held_out < len(items):
        raise ValueError(
            f"held_out={held_out} of {len(items)} examples: expected at least one, and "
            "one left to train on"
        )
    chosen = set(
        np.random.default_rng(seed).permutation(len(items))[:held_out].tolist()
    )
    train = [x for k, x in enumerate(items) if k not in chosen]
    return train, [x for k, x in enumerate(items) if k in chosen]
