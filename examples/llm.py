"""One decoder for the Llama family: Llama, Mistral, SmolLM, Qwen2, Qwen3.

    x = embed(ids)
    x = x + attn(rms_norm(x)) W_o          layer by layer; grouped queries, rotary
    x = x + (silu(h W_gate) * (h W_up)) W_down,   h = rms_norm(x)
    logits = rms_norm(x) W_head            W_head = embed^T where it is tied

Llama: Touvron et al. 2023, arXiv:2302.13971 and 2307.09288; rotary positions: Su et al.
2021, arXiv:2104.09864; grouped queries: Ainslie et al. 2023, arXiv:2305.13245; Qwen3's
norm of queries and keys: arXiv:2505.09388.

    config = llm.read_config(path)              # a folder of Hugging Face, or GGUF
    model = llm.Decoder(config)
    params = jpeft.hf.load_base(path, like=llm.shapes(model))
    logits = model.apply({"params": params}, ids).logits

A row of ids may be padded on either side (`mask`) and may hold several documents
(`segments`): a token sees earlier tokens of its own document that are real, and no
other.  Positions count the real tokens of a document from 0.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import jpeft

PyTree = Any
# Added to scores that do not count: far below all, and finite in every float.
OUT = -1e30
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@dataclasses.dataclass(frozen=True)
class Scaling:
    """How rotary frequencies are stretched for longer texts than were trained on.

    kind: "linear" (positions divided by `factor`), "llama3" (low frequencies divided,
    high ones kept, between `low` and `high` turns of `original` tokens blended; Llama
    3.1), "yarn" (Peng et al. 2023, arXiv:2309.00071; `low` and `high` are its beta_slow
    and beta_fast).
    """

    kind: str
    factor: float
    original: int = 0
    low: float = 1.0
    high: float = 4.0
    attention: float | None = None

    KINDS = ("linear", "llama3", "yarn")


@dataclasses.dataclass(frozen=True)
class Config:
    """What the shapes and the equations of a decoder follow from.

    head: what turns the last hidden state into the answer: "tied" (the embedding),
    "untied" (`lm_head`), or "score", one number a token (`score`), for reward models
    and critics.
    scan: one stacked layer under `nn.scan`, compiled once; otherwise `layers_0`, ...
    unroll: layers in a turn of the scan.
    remat: activations inside a layer are computed again in the backward pass.
    """

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    context: int
    rope_base: float = 10_000.0
    rope_scaling: Scaling | None = None
    norm_eps: float = 1e-5
    head: str = "tied"
    qkv_bias: bool = False
    qk_norm: bool = False
    window: int | None = None
    scan: bool = True
    unroll: int = 1
    remat: bool = False
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads={self.heads} is no multiple of kv_heads={self.kv_heads}"
            )
        if self.head not in ("tied", "untied", "score"):
            raise ValueError(
                f"head={self.head!r}: expected 'tied', 'untied' or 'score'"
            )


class Cache(NamedTuple):
    """Keys and values of the tokens seen, and which of its places hold real tokens.

    keys, values: (layers, batch, places, kv_heads, head_dim), or one such array without
        the first axis for each layer where the model is not scanned.
    segments: (batch, places) int32, 0 where nothing real stands.
    positions: (batch, places) int32.
    length: () int32, places in use.
    """

    keys: Any
    values: Any
    segments: jax.Array
    positions: jax.Array
    length: jax.Array


class Output(NamedTuple):
    """logits: (batch, tokens, vocab) float32, or (batch, tokens) scores, or None where
    they were not asked for.  hidden: (batch, tokens, width), what the head reads."""

    logits: jax.Array | None
    hidden: jax.Array
    cache: Cache | None


def empty_cache(config: Config, batch: int, places: int) -> Cache:
    shape = batch, places, config.kv_heads, config.head_dim
    if config.scan:
        both = [jnp.zeros((config.layers, *shape), config.dtype) for _ in range(2)]
    else:
        both = [
            [jnp.zeros(shape, config.dtype) for _ in range(config.layers)]
            for _ in range(2)
        ]
    none = jnp.zeros((batch, places), jnp.int32)
    return Cache(*both, segments=none, positions=none, length=jnp.int32(0))


# --- the model -----------------------------------------------------------------------


class Decoder(nn.Module):
    config: Config

    @nn.compact
    def __call__(
        self,
        ids: jax.Array,
        mask: jax.Array | None = None,
        *,
        segments: jax.Array | None = None,
        positions: jax.Array | None = None,
        cache: Cache | None = None,
        logits_from: int | None = 0,
    ) -> Output:
        """ids: (batch, tokens).  mask: the same shape, true where a token is real.

        segments: (batch, tokens), the number of the document, rising from 1; 0 for
            padding.  Says all that `mask` says.
        positions: counted from segments if not given.
        cache: tokens before these; the answer's cache holds these too.
        logits_from: the first position whose logits are wanted, -1 for the last alone;
            None for none.
        """
        c = self.config
        if segments is None:
            real = jnp.ones(ids.shape, bool) if mask is None else mask.astype(bool)
            segments = real.astype(jnp.int32)
        if positions is None:
            positions = count_positions(segments)
            if cache is not None:
                # The tokens of the cache that are real come before.
                before = jnp.sum(cache.segments > 0, axis=1, dtype=jnp.int32)
                positions = positions + before[:, None]
        embed = nn.Embed(c.vocab, c.width, dtype=c.dtype, name="embed")
        x = embed(ids)
        keys_segments, keys_positions, start = segments, positions, jnp.int32(0)
        if cache is not None:
            start = cache.length
            put = lambda new, old: jax.lax.dynamic_update_slice(old, new, (0, start))
            keys_segments = put(segments, cache.segments)
            keys_positions = put(positions, cache.positions)
        seen = visible(
            segments, positions, keys_segments, keys_positions, start, c.window
        )
        rotary = angles(c, positions)
        x, keys, values = self._layers(x, seen, rotary, start, cache)
        x = RMSNorm(c.norm_eps, c.dtype, name="norm")(x)
        if cache is not None:
            cache = Cache(
                keys, values, keys_segments, keys_positions, start + ids.shape[1]
            )
        logits = None
        if logits_from is not None:
            read = x[:, logits_from:]
            if c.head == "tied":
                logits = embed.attend(read).astype(jnp.float32)
            else:
                name, size = ("score", 1) if c.head == "score" else ("lm_head", c.vocab)
                logits = linear(size, c, name)(read).astype(jnp.float32)
                if c.head == "score":
                    logits = logits[..., 0]
        return Output(logits, x, cache)

    def _layers(self, x, seen, rotary, start, cache):
        c = self.config
        layer = Layer
        if c.remat:
            layer = nn.remat(layer, prevent_cse=not c.scan)
        if c.scan:
            both = None if cache is None else (cache.keys, cache.values)
            scanned = nn.scan(
                layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, 0),
                length=c.layers,
                unroll=c.unroll,
            )
            x, both = scanned(c, name="layers")(x, seen, rotary, start, both)
            return x, *(both or (None, None))
        keys, values = [], []
        for k in range(c.layers):
            both = None if cache is None else (cache.keys[k], cache.values[k])
            x, both = layer(c, name=f"layers_{k}")(x, seen, rotary, start, both)
            if both is not None:
                keys.append(both[0])
                values.append(both[1])
        return x, keys, values


class Layer(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x, seen, rotary, start, both):
        c = self.config
        h = RMSNorm(c.norm_eps, c.dtype, name="attn_norm")(x)
        h, both = Attention(c, name="attn")(h, seen, rotary, start, both)
        x = x + h
        h = RMSNorm(c.norm_eps, c.dtype, name="mlp_norm")(x)
        return x + MLP(c, name="mlp")(h), both


class Attention(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x, seen, rotary, start, both):
        """seen: (batch, tokens, keys).  both: a layer's keys and values so far."""
        c = self.config
        batch, tokens, _ = x.shape

        def heads(name: str, count: int) -> jax.Array:
            y = linear(count * c.head_dim, c, name, c.qkv_bias)(x)
            return y.reshape(batch, tokens, count, c.head_dim)

        q, k, v = heads("q", c.heads), heads("k", c.kv_heads), heads("v", c.kv_heads)
        if c.qk_norm:
            q = RMSNorm(c.norm_eps, c.dtype, name="q_norm")(q)
            k = RMSNorm(c.norm_eps, c.dtype, name="k_norm")(k)
        q, k = rotate(q, rotary), rotate(k, rotary)
        if both is not None:
            put = lambda new, old: jax.lax.dynamic_update_slice(
                old, new, (0, start, 0, 0)
            )
            k, v = put(k, both[0]), put(v, both[1])
            both = k, v
        q = q.reshape(batch, tokens, c.kv_heads, -1, c.head_dim)
        scores = jnp.einsum("btkgd,bskd->bkgts", q, k) * (1 / math.sqrt(c.head_dim))
        scores = jnp.where(seen[:, None, None], scores.astype(jnp.float32), OUT)
        weights = nn.softmax(scores, axis=-1).astype(c.dtype)
        y = jnp.einsum("bkgts,bskd->btkgd", weights, v)
        y = y.reshape(batch, tokens, c.heads * c.head_dim)
        return linear(c.width, c, "o")(y), both


class MLP(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        gate, up = linear(c.hidden, c, "gate")(x), linear(c.hidden, c, "up")(x)
        return linear(c.width, c, "down")(nn.silu(gate) * up)


class RMSNorm(nn.Module):
    eps: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        scale = scale.reshape((1,) * (x.ndim - 1) + scale.shape)
        return y.astype(self.dtype) * scale.astype(self.dtype)


def linear(size: int, config: Config, name: str, bias: bool = False) -> nn.Dense:
    start = nn.initializers.normal(0.02)
    return nn.Dense(size, bias, config.dtype, kernel_init=start, name=name)


# --- positions, and who sees whom ----------------------------------------------------


def count_positions(segments: jax.Array) -> jax.Array:
    """(batch, tokens) int32: how many tokens of its document stand before a token.

    Padding may stand anywhere, inside a document too; the numbers of documents rise
    from left to right.
    """
    count = jnp.cumsum(segments > 0, axis=1, dtype=jnp.int32) - 1
    so_far = jax.lax.cummax(segments, axis=1)
    begins = so_far > jnp.pad(so_far, ((0, 0), (1, 0)))[:, :-1]
    first = jax.lax.cummax(jnp.where(begins, count, 0), axis=1)
    return jnp.where(segments > 0, count - first, 0)


def visible(
    segments: jax.Array,
    positions: jax.Array,
    keys_segments: jax.Array,
    keys_positions: jax.Array,
    start: jax.Array,
    window: int | None,
) -> jax.Array:
    """(batch, tokens, keys): same document, not later, within the window.

    A padding token sees itself, so that its row is finite; nobody reads it.
    """
    place = start + jnp.arange(segments.shape[1], dtype=jnp.int32)[None, :, None]
    keys = jnp.arange(keys_segments.shape[1], dtype=jnp.int32)[None, None]
    seen = (segments[:, :, None] == keys_segments[:, None]) & (keys <= place)
    if window is not None:
        far = positions[:, :, None] - keys_positions[:, None] >= window
        seen &= ~far
    return seen | (keys == place)


def angles(config: Config, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(cos, sin), each (batch, tokens, 1, head_dim / 2), float32."""
    frequencies, factor = rotary_frequencies(config)
    angle = positions[..., None, None].astype(jnp.float32)
    angle = angle * frequencies.reshape(1, 1, 1, -1)
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def rotate(x: jax.Array, rotary: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The first half of a head with the second, as Hugging Face stores them."""
    cos, sin = (r.astype(x.dtype) for r in rotary)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def rotary_frequencies(config: Config) -> tuple[np.ndarray, np.float32]:
    """(radians a position (head_dim / 2), factor of cos and sin), float32."""
    size, scaling = config.head_dim, config.rope_scaling
    plain = config.rope_base ** (-np.arange(0, size, 2) / size)
    one = np.float32(1)
    if scaling is None:
        return plain.astype(np.float32), one
    if scaling.kind == "linear":
        return (plain / scaling.factor).astype(np.float32), one
    if scaling.kind == "llama3":
        turns = scaling.original * plain / (2 * np.pi)
        kept = (turns - scaling.low) / (scaling.high - scaling.low)
        kept = np.clip(kept, 0, 1)
        blend = kept * plain + (1 - kept) * plain / scaling.factor
        return blend.astype(np.float32), one

    # YaRN: the axis at which so many turns fit into the original context.
    def axis_of(turns: float) -> float:
        wave = scaling.original / (turns * 2 * math.pi)
        return size * math.log(wave) / (2 * math.log(config.rope_base))

    first = max(math.floor(axis_of(scaling.high)), 0)
    last = min(math.ceil(axis_of(scaling.low)), size - 1)
    ramp = (np.arange(size // 2) - first) / max(last - first, 0.001)
    kept = 1 - np.clip(ramp, 0, 1)
    blend = kept * plain + (1 - kept) * plain / scaling.factor
    factor = scaling.attention
    if factor is None:
        factor = 0.1 * math.log(scaling.factor) + 1 if scaling.factor > 1 else 1.0
    return blend.astype(np.float32), np.float32(factor)


# --- configurations ------------------------------------------------------------------


def read_config(path: str | Path, **changes: Any) -> Config:
    """Of a folder with `config.json` (Hugging Face), of that file, or of a GGUF file.

    changes: fields of `Config` to replace, scan=False for example.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        config = from_gguf(
            jpeft.hf.gguf_metadata(path), jpeft.hf.gguf_tensors(path), str(path)
        )
    else:
        file = path / "config.json" if path.is_dir() else path
        if not file.is_file():
            raise FileNotFoundError(
                f"{path}: expected a folder with config.json, as save_pretrained "
                "writes it, or a .gguf file"
            )
        config = from_hugging_face(
            json.loads(file.read_text(encoding="utf-8")), str(file)
        )
    return dataclasses.replace(config, **changes)


def from_hugging_face(data: Mapping[str, Any], at: str = "config.json") -> Config:
    """The contents of `config.json`."""
    family = data.get("model_type")
    if family not in FAMILIES:
        raise ValueError(
            f"{at}: model_type {family!r}; this decoder knows {', '.join(FAMILIES)}"
        )
    act = data.get("hidden_act", "silu")
    if act != "silu":
        raise ValueError(f"{at}: hidden_act {act!r}; this decoder has silu alone")
    for name in ("attention_bias", "mlp_bias"):
        if data.get(name):
            raise ValueError(f"{at}: {name} is true; this decoder has no such biases")
    heads, width = data["num_attention_heads"], data["hidden_size"]
    window = data.get("sliding_window")
    if family.startswith("qwen") and not data.get("use_sliding_window"):
        window = None
    if window is not None and family.startswith("qwen"):
        raise ValueError(
            f"{at}: use_sliding_window, in some layers only; this decoder has one "
            "window for all"
        )
    rope = data.get("rope_parameters") or {}  # transformers 5 keeps the base there
    return Config(
        vocab=data["vocab_size"],
        width=width,
        layers=data["num_hidden_layers"],
        heads=heads,
        kv_heads=data.get("num_key_value_heads") or heads,
        head_dim=data.get("head_dim") or width // heads,
        hidden=data["intermediate_size"],
        context=data["max_position_embeddings"],
        rope_base=float(data.get("rope_theta") or rope.get("rope_theta", 10_000.0)),
        rope_scaling=_scaling(data.get("rope_scaling") or rope, data, at),
        norm_eps=data.get("rms_norm_eps", 1e-6),
        head="tied" if data.get("tie_word_embeddings", False) else "untied",
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        window=window,
    )


def _scaling(
    rope: Mapping[str, Any], data: Mapping[str, Any], at: str
) -> Scaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind not in Scaling.KINDS:
        raise ValueError(
            f"{at}: rotary scaling {kind!r}; this decoder knows {Scaling.KINDS}"
        )
    original = rope.get("original_max_position_embeddings")
    original = original or data["max_position_embeddings"]
    factor = float(rope["factor"])
    if kind == "linear":
        return Scaling(kind, factor)
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        return Scaling(kind, factor, original, low, high)
    low, high = rope.get("beta_slow") or 1, rope.get("beta_fast") or 32
    for name in ("mscale", "mscale_all_dim", "truncate"):
        if name in rope:
            raise ValueError(f"{at}: YaRN's {name} is not known to this decoder")
    return Scaling(kind, factor, original, low, high, rope.get("attention_factor"))


def from_gguf(
    data: Mapping[str, Any], tensors: Collection[str], at: str = "GGUF"
) -> Config:
    """The metadata of a GGUF file, as `jpeft.hf.gguf_metadata` gives them, and its
    tensors' names."""
    family = data.get("general.architecture")
    if family not in FAMILIES:
        raise ValueError(
            f"{at}: architecture {family!r}; this decoder knows {', '.join(FAMILIES)}"
        )
    get = lambda name, *default: _metadata(data, f"{family}.{name}", at, *default)
    heads, width = get("attention.head_count"), get("embedding_length")
    scaling = None
    kind = get("rope.scaling.type", "none")
    if kind == "linear":
        scaling = Scaling(kind, get("rope.scaling.factor"))
    elif kind == "yarn":
        original = get("rope.scaling.original_context_length")
        scaling = Scaling(kind, get("rope.scaling.factor"), original, 1, 32)
    elif kind != "none":
        raise ValueError(f"{at}: rotary scaling {kind!r} is not known to this decoder")
    if "rope_freqs.weight" in tensors:
        raise ValueError(
            f"{at}: holds rotary factors (rope_freqs.weight, Llama 3.1 and later), "
            "which this decoder reads from config.json only; load the safetensors"
        )
    vocab = data.get(f"{family}.vocab_size")
    return Config(
        vocab=vocab or len(_metadata(data, "tokenizer.ggml.tokens", at)),
        width=width,
        layers=get("block_count"),
        heads=heads,
        kv_heads=get("attention.head_count_kv", heads),
        head_dim=get("attention.key_length", width // heads),
        hidden=get("feed_forward_length"),
        context=get("context_length"),
        rope_base=float(get("rope.freq_base", 10_000.0)),
        rope_scaling=scaling,
        norm_eps=float(get("attention.layer_norm_rms_epsilon")),
        head="untied" if "output.weight" in tensors else "tied",
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
    )


def _metadata(data: Mapping[str, Any], name: str, at: str, *default: Any) -> Any:
    if name in data:
        return data[name]
    if default:
        return default[0]
    raise ValueError(f"{at}: its metadata has no {name}")


def shapes(model: Decoder) -> PyTree:
    """The parameters as `jax.ShapeDtypeStruct`, for `jpeft.hf.load_base`."""
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
