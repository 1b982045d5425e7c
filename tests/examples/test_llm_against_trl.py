"""A Llama with LoRA: losses and gradients of A and B are those of TRL and PEFT."""

import json
from pathlib import Path

import _lm
import dpo
import jax
import jax.numpy as jnp
import llm
import numpy as np
import pytest
import sft

import jpeft

FILE = np.load(Path(__file__).parents[1] / "data" / "trl_golden.npz")
SIZES = json.loads(bytes(FILE["settings"]))["llama"]
LORA = json.loads(bytes(FILE["settings"]))["lora"]
BATCH = {k: FILE[f"llama/{k}"] for k in ("ids", "attention_mask", "completion_mask")}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(the model, its parameters with PEFT's factors)."""
    from safetensors.numpy import save_file

    folder = tmp_path_factory.mktemp("llama")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **SIZES}))
    start = "llama/state/"
    state = {k.removeprefix(start): FILE[k] for k in FILE.files if k.startswith(start)}
    save_file(state, folder / "model.safetensors")
    config = llm.read_config(folder)
    model = llm.Decoder(config)
    base = jpeft.hf.load_base(folder, like=llm.shapes(model))
    language = _lm.Language(folder, config, model, None, base)
    peft = jpeft.lora(rank=LORA["r"], alpha=LORA["lora_alpha"], where=".*/attn/[qv]/.*")
    params = language.attach(peft, jax.random.key(0))
    for side in "qv":
        leaf = params["layers"]["attn"][side]["kernel"]
        a, b = (of_torch(f"llama/lora/{{}}/{side}/{x}") for x in "ab")
        params["layers"]["attn"][side]["kernel"] = leaf.replace(a=a, b=b)
    return language, params


def of_torch(name):
    """Both layers, stacked; torch keeps its matrices the other way round."""
    return jnp.stack([FILE[name.format(n)].T for n in range(2)])


def assert_gradients(grads, name):
    """Float32 on both sides: sums over some 20 tokens, two layers deep."""
    for side in "qv":
        leaf = grads["layers"]["attn"][side]["kernel"]
        for x in "ab":
            want = of_torch(f"llama/{name}/grad/{{}}/{side}/{x}")
            np.testing.assert_allclose(getattr(leaf, x), want, rtol=1e-4, atol=1e-5)


def test_sft_is_that_of_trl(world):
    language, params = world
    trainable, frozen = jpeft.partition(params)
    batch = {
        "ids": BATCH["ids"][:2],
        "segments": BATCH["attention_mask"][:2],
        "counted": BATCH["completion_mask"][:2].astype(bool),
    }
    loss = sft.make_loss(language)
    value, grads = jax.jit(
        jax.value_and_grad(lambda t: loss(jpeft.combine(t, frozen), batch).mean())
    )(trainable)
    np.testing.assert_allclose(value, FILE["llama/sft"], rtol=1e-5)
    assert_gradients(grads, "sft")


def test_dpo_is_that_of_trl(world):
    """Answers begin at the fourth token; questions have no padding here."""
    language, params = world
    trainable, frozen = jpeft.partition(params)
    pair = lambda x: np.swapaxes(x.reshape(2, 2, -1), 0, 1)  # chosen rows come first
    batch = {
        "ids": pair(BATCH["ids"]),
        "mask": pair(BATCH["attention_mask"]).astype(bool),
    }
    how = dpo.Settings(beta=0.1)

    def loss(t):
        return dpo.measured(language, how, jpeft.combine(t, frozen), batch, 3)[0].mean()

    value, grads = jax.jit(jax.value_and_grad(loss))(trainable)
    np.testing.assert_allclose(value, FILE["llama/dpo"], rtol=1e-5)
    assert_gradients(grads, "dpo")
