"""A language model of a few thousand weights, in the files of Hugging Face."""

from __future__ import annotations

import json
from pathlib import Path

import llm
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + "
    "'<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|im_start|>", "<|im_end|>")
CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


def write(folder: Path, *, template: str | None = CHATML, more: int = 0) -> Path:
    """A folder with config.json, model.safetensors and tokenizer files.

    The tokens are bytes and the two of ChatML.  more: rows of the embedding beyond
    them (fewer, if below 0).
    """
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = tokenizers.Tokenizer(
        models.BPE(vocab={t: k for k, t in enumerate(alphabet)}, merges=[])
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(
        [tokenizers.AddedToken(t, special=True, normalized=False) for t in SPECIAL]
    )
    core.save(str(folder / "tokenizer.json"))
    about = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1], "pad_token": SPECIAL[1]}
    if template is not None:
        about["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    vocab = len(alphabet) + len(SPECIAL) + more
    config = {**CONFIG, "vocab_size": vocab}
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    width, hidden = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    draw = lambda *shape: rng.normal(0, 0.2, shape).astype(np.float32)
    weights = {
        "model.embed_tokens.weight": draw(vocab, width),
        "model.norm.weight": np.ones(width, np.float32),
    }
    for k in range(CONFIG["num_hidden_layers"]):
        at = f"model.layers.{k}."
        for name, shape in {
            "self_attn.q_proj": (width, width),
            "self_attn.k_proj": (16, width),
            "self_attn.v_proj": (16, width),
            "self_attn.o_proj": (width, width),
            "mlp.gate_proj": (hidden, width),
            "mlp.up_proj": (hidden, width),
            "mlp.down_proj": (width, hidden),
        }.items():
            weights[f"{at}{name}.weight"] = draw(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{at}{name}.weight"] = np.ones(width, np.float32)
    save_file(weights, folder / "model.safetensors")
    assert llm.read_config(folder).vocab == vocab
    return folder
