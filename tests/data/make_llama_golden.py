"""Writes `llama_golden.npz`: small random models of the Llama family, and their logits.

    pip install torch transformers==4.57.6
    python tests/data/make_llama_golden.py

Each model is the configuration of `transformers` as JSON, its state dict, ids with a
mask of real tokens, and the float32 logits that `transformers` gives for them.
"""

import json
from pathlib import Path

import numpy as np
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

SMALL = dict(
    vocab_size=37,
    hidden_size=16,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
MODELS = {
    "llama": ("llama", dict(tie_word_embeddings=False)),
    "smollm": ("llama", dict(tie_word_embeddings=True, rope_theta=100_000.0)),
    "llama3": ("llama", dict(rope_scaling=LLAMA3, rope_theta=500_000.0)),
    "linear": ("llama", dict(rope_scaling={"rope_type": "linear", "factor": 2.0})),
    "yarn": ("llama", dict(rope_scaling=YARN)),
    "mistral": ("mistral", dict(sliding_window=5)),
    "qwen2": ("qwen2", dict(tie_word_embeddings=True)),
    "qwen3": ("qwen3", dict(head_dim=6, tie_word_embeddings=True)),
}


def main() -> None:
    out: dict[str, np.ndarray] = {}
    for seed, (name, (family, changes)) in enumerate(MODELS.items()):
        torch.manual_seed(seed)
        config = CONFIG_MAPPING[family](**{**SMALL, **changes})
        config._attn_implementation = "eager"
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for x in model.parameters():  # far from their start, norms and biases too
                x.copy_(x + 0.2 * torch.randn_like(x))
        ids = torch.randint(0, 37, (2, 13))
        mask = torch.ones_like(ids)
        mask[1, :4] = 0  # padded on the left
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = model(ids, attention_mask=mask, position_ids=positions).logits
        about = {k: v for k, v in config.to_dict().items() if v is not None}
        out[f"{name}/config"] = np.array(json.dumps(about))
        out[f"{name}/ids"], out[f"{name}/mask"] = ids.numpy(), mask.numpy()
        out[f"{name}/logits"] = logits.numpy()
        for key, x in model.state_dict().items():
            if key != "lm_head.weight" or not config.tie_word_embeddings:
                out[f"{name}/weights/{key}"] = x.numpy()
    path = Path(__file__).with_name("llama_golden.npz")
    np.savez_compressed(path, **out)
    print(path, path.stat().st_size)


if __name__ == "__main__":
    main()
