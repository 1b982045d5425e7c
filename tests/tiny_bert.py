"""A tiny random BERT in which a word decides the class, as fixtures."""

import json

import _bert
import finetune
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import jpeft

CLASSES = ("fish", "bird", "tree")
FILLERS = ("the", "small", "old", "grey", "one", "we", "saw", "yesterday")
SIZES = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 192,
}


@pytest.fixture(scope="module", autouse=True)
def as_in_the_command():
    """What the command has: Optax's schedules multiply a float by a count."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A directory as Hugging Face has it, with random weights."""
    folder = tmp_path_factory.mktemp("base")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *CLASSES, *FILLERS]
    sizes = SIZES | {"vocab_size": len(words)}
    (folder / "config.json").write_text(json.dumps(sizes))
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = _bert.BertConfig.from_file(folder / "config.json")
    rng = np.random.default_rng(0)
    tensors = {}
    for path, shape in _bert._shapes(config).items():
        *parents, leaf = path
        name = ".".join([*parents, "bias" if leaf == "bias" else "weight"])
        shape = shape[::-1] if leaf == "kernel" else shape
        mean = 1.0 if leaf == "scale" else 0.0
        tensors[name] = (mean + rng.normal(0, 0.2, shape)).astype(np.float32)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Sentences of 3 to 25 words, one of which is the class."""
    rng = np.random.default_rng(1)
    rows = ["text\tlabel"]
    for i in range(96):
        name = CLASSES[i % 3]
        words = [*rng.choice(FILLERS, rng.integers(2, 12 if i % 8 else 25)), name]
        rows.append(" ".join(rng.permutation(words)) + "\t" + name)
    path = tmp_path_factory.mktemp("data") / "animals.tsv"
    path.write_text("\n".join(rows) + "\n")
    return path


def adapter_arrays(out, base):
    """The trainable arrays of the adapter that a run saved."""
    settings = json.loads((out / "settings.json").read_text())
    head = finetune.keys(settings["seed"]).head
    _, params = finetune.read_base(base, len(settings["classes"]), head)
    trainable, _ = jpeft.partition(jpeft.load(out / "adapter", params))
    return jax.tree.leaves(trainable)


def assert_same_adapter(out, other, base):
    found, expected = adapter_arrays(out, base), adapter_arrays(other, base)
    assert len(found) == len(expected) > 0
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
