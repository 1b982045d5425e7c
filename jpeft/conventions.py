"""Names: what Flax, Haiku, T5X, MaxText, Hugging Face and others call their weights.

Where the traced program does not say what a weight is, its name does; all that the
library knows of names stands here.  A name is a hint: whoever asks checks sizes too, or
refuses where it is in doubt.
"""

from __future__ import annotations

import re
from typing import NamedTuple

# --- arrays of a module --------------------------------------------------------------

KERNELS = {"kernel", "w", "weight", "weights"}
BIASES = {"bias", "b", "beta"}
SCALES = {"scale", "gamma"}
NOT_WEIGHTS = {*BIASES, "scale", "gamma", "offset", "cls", "count"}
# Running statistics of norms and of the data; Haiku keeps averages in modules.
_STATISTICS = re.compile(
    r"(.*_)?(mean|var|variance|std|stddev)(_?(ema|avg|stat))?"
    r"|num_batches_tracked|count(er)?",
    re.I,
)
_AVERAGES = re.compile(r"(mean|var|variance)_ema|batch_?stats", re.I)
POSITIONS = re.compile(
    r"pos|cls|dist|token$|query_tokens|queries|latent|probe|mask|register", re.I
)
_NORMS = re.compile(r"(norm|^ln|_ln|ln_|layernorm|^bn|batchnorm)", re.I)
LAYER_SCALES = re.compile(r"layer_?scale|^ls_?\d*$", re.I)
CONVS = re.compile(r"conv", re.I)
# Where how a vector is used leaves a doubt, names like these decide.
_MAYBE_BIAS = re.compile(
    r"(^|_)(bias|offset|shift|beta)\d*(_|$)|^b[a-z]?\d*$|^b_", re.I
)
_MAYBE_SCALE = re.compile(r"(^|_)(scale|gain|gamma)\d*$|norm|^(ln|rms)_?\d*$", re.I)
_NO_BIAS = re.compile(r"embed|pos|token|type|modality|segment|time", re.I)


def in_norm(path: str) -> bool:
    """Whether the module that holds this array is a normalisation, by its name."""
    module = path.split("/")[-2:-1]
    return bool(module and _NORMS.search(module[0]))


def is_statistic(path: str) -> bool:
    """Whether the name is that of a mean or variance that is counted, not trained."""
    *modules, name = path.split("/")
    return bool(_STATISTICS.fullmatch(name) or any(map(_AVERAGES.fullmatch, modules)))


def bias_names(name: str) -> list[str]:
    """Of the bias beside a weight, in Flax's modules or in one without modules."""
    if name.lower() in KERNELS:
        return ["bias", "b"]
    out = [f"{name}_bias", f"{name}_b"]
    if stem := re.fullmatch(r"(.+)_(kernel|weight|weights|w)", name, re.I):
        out += [f"{stem[1]}_bias", f"{stem[1]}_b"]
    if name[0] in "wW":  # w1, wq, w_up
        out.append("b" + name[1:])
    return out


def may_be_bias(path: str) -> bool:
    """Whether the array's own name is one that a bias may have."""
    name = path.rsplit("/", 1)[-1]
    return bool(_MAYBE_BIAS.search(name)) and not _NO_BIAS.search(name)


def may_be_scale(path: str) -> bool:
    """Whether the array's own name is one that a norm's scale may have."""
    *modules, name = path.split("/")
    scaled = [*modules[-1:], name]
    return bool(_MAYBE_SCALE.search(name)) and not any(map(LAYER_SCALES.search, scaled))


def never_a_bias(path: str) -> bool:
    """Whether the array's own name is that of a position, a type, a token."""
    return bool(_NO_BIAS.search(path.rsplit("/", 1)[-1])) and not may_be_bias(path)


# --- sub-layers ----------------------------------------------------------------------

_ATTENTION = re.compile(
    r"attn|attention|^(q|k|v|o|query|key|value|qkv|kv|q_proj|k_proj|v_proj|o_proj"
    r"|qkv_proj|out_proj|to_q|to_k|to_v|to_out|wq|wk|wv|q_einsum|kv_einsum|qkv_einsum"
    r"|attn_vec_einsum)$",
    re.I,
)
_MLP = re.compile(
    r"mlp|ffn|ffw|feed_?forward|densereludense|intermediate|expert|moe|gating_einsum"
    r"|^(fc|fc_?\d|c_fc|wi|wi_\d|w[123]|up|down|gate|up_proj|down_proj|gate_proj"
    r"|gate_up_proj|lin[12]|linear[12]?)$",
    re.I,
)


def in_attention(path: str) -> bool:
    return any(_ATTENTION.search(s) for s in path.split("/"))


def in_mlp(path: str) -> bool:
    return not in_attention(path) and any(_MLP.search(s) for s in path.split("/"))


class Row(NamedTuple):
    """Names below the sub-layer; last: the first of these that is there."""

    first: tuple[str, ...]
    last: tuple[str, ...]
    fused: str = ""


ATTENTIONS = (
    # Flax, NNX, T5X, MaxText; ALBERT; Haiku
    Row(("query", "key", "value"), ("out", "dense", "out_proj", "output", "linear")),
    Row(("self/query", "self/key", "self/value"), ("output/dense",)),  # BERT
    Row(  # ViT
        ("attention/query", "attention/key", "attention/value"), ("output/dense",)
    ),
    Row(("q", "k", "v"), ("o", "out", "proj")),  # T5
    Row(("q_proj", "k_proj", "v_proj"), ("o_proj", "out_proj", "proj")),
    Row(("query_proj", "key_proj", "value_proj"), ("output_proj", "out_proj")),
    Row(("q_lin", "k_lin", "v_lin"), ("out_lin",)),  # DistilBERT
    Row(
        ("to_q", "to_k", "to_v"), ("to_out", "to_out_0", "to_out/0", "to_out/layers/0")
    ),
    Row(("wq", "wk", "wv"), ("wo",)),  # Llama as published
    Row(("q_einsum", "k_einsum", "v_einsum"), ("attn_vec_einsum",)),
    Row(("q_einsum", "kv_einsum"), ("attn_vec_einsum",), "blocks kv"),  # Gemma
    Row(("qkv_einsum",), ("attn_vec_einsum",), "blocks qkv"),
    Row(("to_q", "to_kv"), ("to_out", "to_out_0", "to_out/0"), "blocks kv"),
    Row(("q", "kv"), ("o", "out", "proj"), "blocks kv"),
    Row(("c_attn",), ("c_proj",), "blocks qkv"),  # GPT-2
    Row(("query_key_value",), ("dense",), "heads qkv"),  # GPT-NeoX, BLOOM
    Row(("qkv",), ("proj", "out", "out_proj", "o", "dense"), "blocks qkv"),  # timm
    Row(("qkv_proj",), ("o_proj", "out_proj", "out", "proj"), "blocks qkv"),
    Row(("Wqkv",), ("out_proj", "Wo"), "blocks qkv"),
    Row(("to_qkv",), ("to_out", "to_out_0", "to_out/0"), "blocks qkv"),
)
MLPS = (
    # with a gate: of two first weights either sees the input
    Row(("gate_proj", "up_proj"), ("down_proj",)),
    Row(("gate", "up"), ("down",)),
    Row(("w_gate", "w_up"), ("w_down",)),
    Row(("wi_0", "wi_1"), ("wo",)),
    Row(("w1", "w3"), ("w2",)),
    Row(("gate_up_proj",), ("down_proj",)),
    Row(("gating_einsum",), ("linear",)),
    Row(("w12",), ("w3",)),
    # without
    Row(("intermediate/dense",), ("output/dense",)),
    Row(("intermediate_dense",), ("output_dense",)),
    Row(("ffn",), ("ffn_output",)),
    Row(("dense_h_to_4h",), ("dense_4h_to_h",)),
    Row(("fc1",), ("fc2",)),
    Row(("fc_1",), ("fc_2",)),
    Row(("fc_in",), ("fc_out",)),
    Row(("c_fc",), ("c_proj",)),
    Row(("up_proj",), ("down_proj",)),
    Row(("up",), ("down",)),
    Row(("wi",), ("wo",)),
    Row(("w_in",), ("w_out",)),
    Row(("w_up",), ("w_down",)),
    Row(("w1",), ("w2",)),
    Row(("lin1",), ("lin2",)),
    Row(("lin_1",), ("lin_2",)),
    Row(("linear1",), ("linear2",)),
    Row(("linear_1",), ("linear_2",)),
    Row(("linear",), ("linear_1",)),  # Haiku
)
# `Dense_0`, `layers/0`, `0`: an order, but only in what is called an MLP.
NUMBERED = re.compile(r"((?:dense|linear|layers?|fc)[_/])?(\d+)", re.I)
ARRAYS = frozenset({"kernel", "w", "weight", "weights"})
CROSS_NAMES = re.compile(
    r"cross|encoder_?attn|enc_?dec|encoder_?decoder_?att|src_?attn|multihead_attn", re.I
)
STREAMS = re.compile(r"(encoder|decoder)s?", re.I)

# The weights that UniPELT's LoRA stands on.
QUERY_VALUE = r"(.*/)?(query|value|q_proj|v_proj|q|v|wq|wv)/(kernel|w|weight)"

# --- token embeddings ----------------------------------------------------------------

OTHER_TABLES = re.compile(
    r"pos|wpe|type|segment|bias|relative|distance|patch|time|class|label|lang|speaker",
    re.I,
)
TOKEN_TABLES = re.compile(
    r"tok|word|wte|vocab|shared|embedder|input_embedding|^embed(ding|der)?s?$", re.I
)
