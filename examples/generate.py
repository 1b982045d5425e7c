"""Chat with a language model, with an adapter of jpeft or without; or answer a file.

    python examples/generate.py                                  # chat, Ctrl-D ends it
    python examples/generate.py --adapter runs/sft/adapter
    python examples/generate.py --prompt "What is JAX?" --temperature 0
    python examples/generate.py --prompts questions.txt --batch-size 8

The adapter stays beside the weights, or is merged into them with --merge.  Answers are
drawn with --temperature, --top-k, --top-p and --min-p; temperature 0 takes the
likeliest token.  Two programs are compiled, one that reads a prompt and one that
writes, whatever the length of the answer up to --max-tokens.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jpeft

try:
    import _lm
    import _sampling
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"error: {missing.name} is not installed; type: "
        "pip install -e '.[examples,hf,plots]'"
    ) from None

# Tokens between two looks at what was written, while it is shown.
SHOWN_EVERY = 4


class Writer:
    """Answers chats, with one model, its adapter and one way of drawing."""

    def __init__(
        self,
        language: _lm.Language,
        params: Any,
        how: _sampling.Sampling,
        max_tokens: int,
        *,
        virtual: int = 0,
        seed: int = 0,
    ) -> None:
        self.language, self.params, self.virtual = language, params, virtual
        self.key, self.turn, self.max_tokens = jax.random.key(seed), 0, max_tokens
        t = language.tokenizer
        self.compiled = _sampling.Compiled.of(
            _sampling.Writer(
                jpeft.adapt(language.model.apply),
                *(language.config, t.stop, t.pad, max_tokens, how),
            )
        )
        self.tokens, self.seconds = 0, 0.0

    def answers(
        self,
        chats: Sequence[Sequence[dict[str, str]]],
        show: Callable[[str], None] | None = None,
        length: int | None = None,
        counted: int | None = None,
    ) -> list[str]:
        """What the model says next in each chat.

        show: receives the text of a single answer piece by piece.
        length: of the prompts, padded; None for a power of two.
        counted: so many of the chats are new, for `speed`; None: all.
        """
        prompts = [self.language.prompt(c, self.virtual) for c in chats]
        self._check(prompts)
        ids, mask = _lm.left_padded(prompts, self.language.tokenizer.pad, length)
        self.turn += 1
        began = time.perf_counter()
        state = self.compiled.begin(
            self.params, ids, mask, jax.random.fold_in(self.key, self.turn)
        )
        every = self.max_tokens if show is None else SHOWN_EVERY
        shown, until = "", 0
        while until < self.max_tokens:
            until = min(until + every, self.max_tokens)
            state = self.compiled.go_on(self.params, state, until)
            if show is not None:
                text = self._texts(state)[0]
                # Half of a letter in several bytes is not shown.
                if not text.endswith("\ufffd"):
                    show(text[len(shown) :])
                    shown = text
            if bool(np.all(state.done)):
                break
        texts = self._texts(state)
        if show is not None:
            show(texts[0][len(shown) :])
        self.tokens += int(np.sum(np.asarray(state.lengths)[:counted]))
        self.seconds += time.perf_counter() - began
        return texts

    def in_batches(
        self,
        chats: Sequence[Sequence[dict[str, str]]],
        size: int,
        length: int | None = None,
    ) -> list[str]:
        """What the model says next in each chat; so many at a time, by length."""
        lengths = [len(self.language.prompt(c, self.virtual)) for c in chats]
        order = sorted(range(len(chats)), key=lengths.__getitem__)
        answers: dict[int, str] = {}
        for at in range(0, len(order), size):
            some = order[at : at + size]
            # Filled up where it is not full: no other shape is compiled for it.
            full = [*some, *[some[-1]] * (size - len(some))]
            found = self.answers(
                [chats[k] for k in full], length=length, counted=len(some)
            )
            answers.update(zip(some, found, strict=False))
        return [answers[k] for k in range(len(chats))]

    def _check(self, prompts: Sequence[Sequence[int]]) -> None:
        longest, context = max(map(len, prompts)), self.language.config.context
        if longest + self.max_tokens > context:
            raise ValueError(
                f"a prompt of {longest} tokens and {self.max_tokens} to write do not "
                f"fit into the model's context of {context}; shorten the chat, or "
                "choose a smaller --max-tokens"
            )

    def _texts(self, state: _sampling.State) -> list[str]:
        t = self.language.tokenizer
        tokens, lengths = np.asarray(state.tokens), np.asarray(state.lengths)
        return [t.decode(row[:n]) for row, n in zip(tokens, lengths, strict=True)]

    def speed(self) -> str:
        if not self.tokens:
            return "nothing was written"
        return (
            f"{self.tokens} tokens in {self.seconds:.1f} s: "
            f"{self.tokens / self.seconds:.1f} tokens/s, compiling included"
        )


def chat(writer: Writer, system: str | None, lines: Iterator[str]) -> None:
    """Questions by lines, answers as they are written."""
    messages = begun(system)
    for line in lines:
        if not line.strip():
            continue
        asked = [*messages, {"role": "user", "content": line.strip()}]
        try:
            answer = writer.answers([asked], print_now)[0]
        except ValueError as error:  # too long: the chat goes on without it
            print(f"error: {error}", file=sys.stderr)
            continue
        print("\n")
        messages = [*asked, {"role": "assistant", "content": answer}]


def print_now(text: str) -> None:
    print(text, end="", flush=True)


def begun(system: str | None) -> list[dict[str, str]]:
    """A chat before its first question."""
    return [{"role": "system", "content": system}] if system else []


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--base", type=Path, help="Hugging Face folder or GGUF file (SmolLM2-135M)")
    add("--base-form", default="stored", choices=_lm.FORMS, help="(%(default)s)")
    add("--adapter", type=Path, help="what a training saved, runs/sft/adapter")
    add("--merge", action="store_true", help="write the adapter into the weights")
    add("--prompt", help="one question, then end")
    add("--prompts", type=Path, help="a file of questions, one a line")
    add("--system", help="the system's message")
    add("--batch-size", type=int, default=8, help="with --prompts (%(default)s)")
    add("--max-tokens", type=int, default=256, help="of an answer (%(default)s)")
    add("--temperature", type=float, default=0.7, help="0: likeliest (%(default)s)")
    add("--top-k", type=int, default=0, help="draw from so many (0: all)")
    add("--top-p", type=float, default=0.95, help="draw from this share (%(default)s)")
    add("--min-p", type=float, default=0.0, help="relative to the likeliest")
    add("--seed", type=int, default=0, help="of what is drawn")
    return made


def load(args: argparse.Namespace) -> Writer:
    how = _sampling.Sampling(args.temperature, args.top_k, args.top_p, args.min_p)
    for name in ("max_tokens", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be 1 or more")
    language = _lm.load(args.base, args.base_form)
    params, virtual = language.base, 0
    if args.adapter is not None:
        params = jpeft.load(args.adapter, params)
        virtual = jpeft.read_transform(args.adapter).virtual_tokens()
        if args.merge:
            params = jpeft.merge(params)
    elif args.merge:
        raise ValueError("--merge needs an --adapter to merge")
    return Writer(
        language, params, how, args.max_tokens, virtual=virtual, seed=args.seed
    )


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        writer = load(args)
        if args.prompts is not None:
            lines = args.prompts.read_text(encoding="utf-8").splitlines()
            questions = [x for x in lines if x.strip()]
            if not questions:
                raise ValueError(f"{args.prompts}: holds no questions")
            ask = lambda text: [*begun(args.system), {"role": "user", "content": text}]
            answers = writer.in_batches([ask(q) for q in questions], args.batch_size)
            for question, answer in zip(questions, answers, strict=True):
                print(f"> {question}\n{answer}\n")
        elif args.prompt is not None:
            asked = [*begun(args.system), {"role": "user", "content": args.prompt}]
            writer.answers([asked], print_now)
            print("\n")
        else:
            print("Type a question; Ctrl-D ends the chat.", file=sys.stderr)
            chat(writer, args.system, _typed())
    except (ValueError, OSError, KeyError, jpeft.CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    print(writer.speed(), file=sys.stderr)
    return 0


def _typed() -> Iterator[str]:
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


if __name__ == "__main__":
    sys.exit(main())
