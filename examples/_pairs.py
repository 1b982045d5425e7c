"""Questions and answers as arrays: questions padded on the left, answers on the right.

    [pad pad q q q | a a a stop pad]        the answers begin at the same place

The layout of what a model writes, so that a score, a log-probability and a value are
read at the same places whether the answer was written now or comes from a file.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import _dialogues
import _lm
import _signatures
import jax
import jax.numpy as jnp
import numpy as np
from _rows import TOO_LONG

from jpeft import objectives

PyTree = Any
# What is not wanted in the default data: talk around an answer, and less than one.
# Were all of it longer than the answer, the shortest text would be the best.
UNWANTED = (
    "Sure! {answer} Let me know if you have any other questions.",
    "This is a Python function. {answer} I hope that this helps!",
    "The `{name}` function is used in Python. {answer}",
    "Here is what the function does: {answer} It is often used in Python programs.",
    "{answer} This function takes arguments and returns a value, as functions do.",
    "{half}",
    "{word}.",
    "{half}",
)
# Without it hardly any answer of the base ends within the tokens that PPO gives it.
SHORT = "\n\nAnswer in one short sentence."


def default() -> list[_dialogues.Pair]:
    """One plain sentence, preferred to it with talk around, or to a part of it.

    `_signatures.follows` tells the two apart.
    """
    made = []
    for k, x in enumerate(_signatures.dialogues()):
        [asked] = x.question
        name = asked["content"].split("\n")[-1].partition("(")[0]
        words = x.answer.split()
        unwanted = UNWANTED[k % len(UNWANTED)].format(
            answer=x.answer,
            name=name.split(".")[-1],
            half=" ".join(words[: len(words) // 2]),
            word=words[0].rstrip(".,"),
        )
        question = ({**asked, "content": asked["content"] + SHORT},)
        made.append(_dialogues.Pair(question, x.answer, unwanted, x.at))
    return made


class Sequences(NamedTuple):
    """ids: int32 (rows, length).  mask: bool, what is real.  The answer's places are
    those from `prompt` on."""

    ids: np.ndarray
    mask: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Pairs as arrays: chosen and rejected share their questions.

    prompt: tokens of a question, padded.
    """

    chosen: Sequences
    rejected: Sequences
    prompt: int

    def __len__(self) -> int:
        return len(self.chosen.ids)

    def __getitem__(self, k: Any) -> dict[str, np.ndarray]:
        """ids, mask: (2, length), the chosen first."""
        both = self.chosen, self.rejected
        return {
            "ids": np.stack([x.ids[k] for x in both], axis=-2),
            "mask": np.stack([x.mask[k] for x in both], axis=-2),
        }

    def checksum(self) -> int:
        sums = 0
        for x in (*self.chosen, *self.rejected):
            sums = zlib.crc32(np.ascontiguousarray(x).tobytes(), sums)
        return sums


def encode(
    language: _lm.Language,
    pairs: Sequence[_dialogues.Pair],
    prompt: int,
    answer: int,
    too_long: str,
    *,
    virtual: int = 0,
) -> tuple[Rows, str]:
    """(pairs as arrays, a line on those that were too long).

    Of a question that is longer than `prompt` tokens the end is kept, of an answer
    longer than `answer` the beginning, with too_long="truncate".
    """
    if too_long not in TOO_LONG:
        raise ValueError(f"too_long={too_long!r}: expected one of {TOO_LONG}")
    first, rows, cut, dropped = language.virtual(virtual), [], 0, 0
    for pair in pairs:
        asked = language.tokenizer.prompt(pair.question)
        said = [written(language, pair, x) for x in (pair.chosen, pair.rejected)]
        over = len(first) + len(asked) > prompt or max(map(len, said)) > answer
        if over and too_long == "keep":
            raise ValueError(
                f"{pair.at}: a question of {len(first) + len(asked)} tokens and "
                f"answers of {' and '.join(str(len(x)) for x in said)}; there is room "
                f"for {prompt} and {answer}: give a larger --prompt-length or "
                "--answer-length, or --too-long truncate or drop"
            )
        said = [x[:answer] for x in said]
        # What is left of two answers may be the same: nothing to prefer.
        if over and (too_long == "drop" or said[0] == said[1]):
            dropped += 1
            continue
        cut += over
        rows.append(([*first, *asked[-(prompt - len(first)) :]], said))
    if not rows:
        raise ValueError(
            f"none of {len(pairs)} pairs fits into {prompt} and {answer} tokens"
        )
    told = ", ".join(
        f"{n} {what}" for n, what in ((cut, "cut"), (dropped, "dropped")) if n
    )
    pad = language.tokenizer.pad
    both = [
        joined([(q, said[k]) for q, said in rows], prompt, answer, pad)
        for k in range(2)
    ]
    told = told and f"longer than {prompt} + {answer} tokens: {told}"
    return Rows(*both, prompt=prompt), told


def written(language: _lm.Language, pair: _dialogues.Pair, answer: str) -> list[int]:
    """The tokens of an answer, behind the question's, the one that ends it included."""
    messages = [*pair.question, {"role": "assistant", "content": answer}]
    try:
        chat = language.tokenizer.chat(messages, last_only=True)
    except ValueError as error:
        raise type(error)(f"{pair.at}: {error}") from error
    places = np.flatnonzero(chat.answer)
    return chat.ids[places[0] : places[-1] + 1].tolist()


def joined(
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    prompt: int,
    answer: int,
    pad: int,
) -> Sequences:
    ids = np.full((len(rows), prompt + answer), pad, np.int32)
    mask = np.zeros(ids.shape, bool)
    for k, (asked, said) in enumerate(rows):
        ids[k, prompt - len(asked) : prompt] = asked
        ids[k, prompt : prompt + len(said)] = said
        mask[k, prompt - len(asked) : prompt + len(said)] = True
    return Sequences(ids, mask)


def log_probs(
    apply: Any,
    params: PyTree,
    ids: jax.Array,
    mask: jax.Array,
    prompt: int,
    temperature: float = 1.0,
) -> jax.Array:
    """(batch, answer) float32: of the tokens of the answers, wherever the mask is.

    The token at a place is predicted by the place before it, so the first one by the
    last of the question.
    """
    out = apply({"params": params}, ids, mask, logits_from=prompt - 1)
    return objectives.log_probs(
        out.logits[:, :-1], ids[:, prompt:], temperature=temperature
    )


def flat(x: jax.Array) -> jax.Array:
    """(batch, 2, ...) -> (2 batch, ...), all chosen ones first."""
    return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])
