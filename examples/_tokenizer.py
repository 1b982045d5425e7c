"""The tokenizer of a language model and its chat template.

Read from a folder of Hugging Face (`tokenizer.json`, `tokenizer_config.json`) or from
the metadata of a GGUF file.  What counts in the loss is found here too: of a chat, the
text of the assistant's answers and the token that ends each.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

import jpeft

Message = Mapping[str, str]
# Digits one by one, in threes, ...: how the models of each name cut text into words.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{%s}| ?[^\s\p{L}\p{N}]"
    r"+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {"llama-bpe": _LLAMA3 % "1,3", "qwen2": _LLAMA3 % "1"}
CONTROL, USER_DEFINED = 3, 4  # kinds of GGUF's tokens that stand for themselves


class TemplateError(ValueError):
    """A chat template that fails, or whose text cannot be told apart by message."""


@dataclasses.dataclass(frozen=True)
class Chat:
    """A chat as tokens.

    ids: int32 (n,).  answer: bool (n,), true on what the assistant said and on the
    token that ends it.
    """

    ids: np.ndarray
    answer: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """Text to ids and back.

    stop: the ids that end an answer.  pad: fills a row up; often one of `stop`, which
    is why nothing here, and no loss, finds padding by its id.
    bos: what begins a text that is no chat, if anything does.
    """

    core: tokenizers.Tokenizer
    stop: tuple[int, ...]
    pad: int
    bos: int | None
    template: str | None
    names: Mapping[str, str | None]

    def __len__(self) -> int:
        """One more than the largest id."""
        return max(self.core.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        return self.core.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """special: the names of control tokens too, `<|im_end|>`."""
        return self.core.decode([int(k) for k in ids], skip_special_tokens=not special)

    def document(self, text: str) -> list[int]:
        """A text that is no chat, with what begins and ends it."""
        begin = [] if self.bos is None else [self.bos]
        return [*begin, *self.encode(text), self.stop[0]]

    # --- chats -----------------------------------------------------------------------

    def render(self, messages: Sequence[Message], *, ask: bool = False) -> str:
        """The chat as the model was taught to read it.

        ask: with the head of an answer at the end, for the model to go on.
        """
        if self.template is None:
            raise TemplateError(
                "the model's tokenizer has no chat template; pass one, or train on "
                "plain text"
            )
        try:
            return _compiled(self.template).render(
                messages=[dict(m) for m in messages],
                add_generation_prompt=ask,
                tools=None,
                documents=None,
                **self.names,
            )
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            raise TemplateError(
                f"the chat template failed on messages by {_roles(messages)}: {error}"
            ) from error

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The chat so far, for the model to answer."""
        return self.encode(self.render(messages, ask=True))

    def chat(self, messages: Sequence[Message], *, last_only: bool = False) -> Chat:
        """The whole chat; `answer` marks what the assistant says (or says last).

        The marks come from rendering the chat up to each answer, without and with it,
        since templates do not say where their answers are; what they render must begin
        the whole, as text and as ids.  Of the text behind an answer only the stop token
        counts: what follows it belongs to the template.
        """
        whole = self.render(messages)
        found = self.core.encode(whole, add_special_tokens=False)
        ids = np.array(found.ids, np.int32)
        answer = np.zeros(len(ids), bool)
        turns = [k for k, m in enumerate(messages) if m["role"] == "assistant"]
        for k in turns[-1:] if last_only else turns:
            before = self.render(messages[:k], ask=True)
            through = self.render(messages[: k + 1])
            if not (whole.startswith(through) and through.startswith(before)):
                raise TemplateError(
                    f"message {k}: the chat template renders the chat up to it other "
                    "than as the beginning of the whole, so where the answer stands "
                    "cannot be told; train on the last answer alone, or pass a "
                    "template that adds each message at the end"
                )
            first, end = len(self.encode(before)), len(self.encode(through))
            if self.encode(before) != found.ids[:first]:
                raise TemplateError(
                    f"message {k}: the tokens of the text before it are not those of "
                    "the whole; the head of an answer must end with a special token or "
                    "white space that no answer is joined to"
                )
            if not (stops := np.flatnonzero(np.isin(ids[first:end], self.stop))).size:
                known = [self.decode([t], special=True) for t in self.stop]
                raise TemplateError(
                    f"message {k}: behind the answer the chat template writes none of "
                    f"the stop tokens {known}; a model trained so would never stop"
                )
            answer[first : first + stops[-1] + 1] = True
        return Chat(ids, answer)


def _roles(messages: Sequence[Message]) -> str:
    return ", ".join(str(m.get("role")) for m in messages) or "nobody"


_TEMPLATES: dict[str, jinja2.Template] = {}


def _compiled(template: str) -> jinja2.Template:
    """As Hugging Face compiles them; a template may compute, but not reach Python."""
    if template not in _TEMPLATES:
        world = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )

        def refuse(message: str) -> None:
            raise jinja2.TemplateError(message)

        world.globals["raise_exception"] = refuse
        world.globals["strftime_now"] = lambda f: datetime.datetime.now().strftime(f)
        world.filters["tojson"] = lambda x, **how: json.dumps(
            x, ensure_ascii=False, **how
        )
        try:
            _TEMPLATES[template] = world.from_string(template)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(
                f"the chat template cannot be read, line {error.lineno}: {error}"
            ) from error
    return _TEMPLATES[template]


# --- where it is read from -----------------------------------------------------------


def load(path: str | Path) -> Tokenizer:
    """Of a folder of Hugging Face, or of a GGUF file."""
    path = Path(path)
    if path.suffix == ".gguf":
        return from_gguf(jpeft.hf.gguf_metadata(path), str(path))
    if not (path / "tokenizer.json").is_file():
        raise FileNotFoundError(
            f"{path}: expected a folder with tokenizer.json, or a .gguf file"
        )
    core = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    core.no_padding()
    core.no_truncation()
    about = _json(path / "tokenizer_config.json")
    names = {
        name: x["content"] if isinstance(x := about.get(name), dict) else x
        for name in ("bos_token", "eos_token", "pad_token", "unk_token")
    }
    template = about.get("chat_template")
    if (file := path / "chat_template.jinja").is_file():
        template = file.read_text(encoding="utf-8")
    if isinstance(template, list):  # several, by name
        template = {x["name"]: x["template"] for x in template}.get("default")
    # Chats may end with another token than texts: both stop.
    stop = _json(path / "generation_config.json").get("eos_token_id", [])
    stop = list(stop) if isinstance(stop, list) else [stop]
    if names["eos_token"] is not None:
        stop.insert(0, core.token_to_id(names["eos_token"]))
    if not stop:
        raise ValueError(
            f"{path}: neither tokenizer_config.json nor generation_config.json names "
            "an eos token, so nothing would end an answer"
        )
    stop = tuple(dict.fromkeys(stop))
    pad = core.token_to_id(names["pad_token"]) if names["pad_token"] else stop[0]
    bos = None
    if names["bos_token"] and about.get("add_bos_token"):
        bos = core.token_to_id(names["bos_token"])
    return Tokenizer(core, stop, pad, bos, template, names)


def _json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def from_gguf(data: Mapping[str, Any], at: str = "GGUF") -> Tokenizer:
    """Of a GGUF file's metadata, as `jpeft.hf.gguf_metadata` gives them."""
    kind, cut = data.get("tokenizer.ggml.model"), data.get("tokenizer.ggml.pre")
    if kind != "gpt2" or cut not in ("smollm", "gpt-2", *_SPLITS):
        raise ValueError(
            f"{at}: a tokenizer of the kind {kind!r}, {cut!r}; known are byte-level "
            f"ones ('gpt2') cut as smollm, gpt-2, {', '.join(_SPLITS)}; pass the "
            "folder of the model's tokenizer.json instead"
        )
    tokens = data["tokenizer.ggml.tokens"]
    merges = [tuple(m.split(" ", 1)) for m in data["tokenizer.ggml.merges"]]
    core = tokenizers.Tokenizer(
        models.BPE(vocab={t: k for k, t in enumerate(tokens)}, merges=merges)
    )
    if cut == "smollm":
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    elif cut == "gpt-2":
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        words = tokenizers.Regex(_SPLITS[cut])
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(words, "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        if cut == "qwen2":
            core.normalizer = normalizers.NFC()
    core.decoder = decoders.ByteLevel()
    kinds = data.get("tokenizer.ggml.token_type", [])
    core.add_special_tokens(
        [
            tokenizers.AddedToken(t, special=True, normalized=False)
            for t, k in zip(tokens, kinds, strict=True)
            if k == CONTROL
        ]
    )
    core.add_tokens(
        [
            tokenizers.AddedToken(t, normalized=False)
            for t, k in zip(tokens, kinds, strict=True)
            if k == USER_DEFINED
        ]
    )
    known = {
        name: data.get(f"tokenizer.ggml.{of}_token_id")
        for name, of in (
            ("bos_token", "bos"),
            ("eos_token", "eos"),
            ("pad_token", "padding"),
            ("unk_token", "unknown"),
        )
    }
    if known["eos_token"] is None:
        raise ValueError(f"{at}: its metadata names no eos token")
    more = (data.get(f"tokenizer.ggml.{x}_token_id") for x in ("eot", "eom"))
    stop = tuple(
        dict.fromkeys([known["eos_token"], *(k for k in more if k is not None)])
    )
    pad = stop[0] if known["pad_token"] is None else known["pad_token"]
    bos = known["bos_token"] if data.get("tokenizer.ggml.add_bos_token") else None
    names = {name: None if k is None else tokens[k] for name, k in known.items()}
    return Tokenizer(core, stop, pad, bos, data.get("tokenizer.chat_template"), names)
