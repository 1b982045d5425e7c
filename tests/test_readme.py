"""The README's code runs as it stands."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState

import jpeft

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
LINEN, NNX, FILTER, STATE, EXPORT, QUANTIZED, LOSS = re.findall(
    r"```python\n(.*?)```", README, re.S
)


class Model(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 24)(tokens)
        return nn.Dense(19)(nn.relu(nn.Dense(32)(x)))


BATCH = {"tokens": jnp.arange(6).reshape(2, 3)}


def cross_entropy(logits, batch):
    return jnp.mean(
        optax.softmax_cross_entropy_with_integer_labels(logits, batch["tokens"])
    )


def test_the_linen_loop(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = Model()
    base = model.init(jax.random.key(0), BATCH["tokens"])["params"]
    names = {
        "model": model,
        "base_params": base,
        "batch": BATCH,
        "cross_entropy": cross_entropy,
    }
    with jax.numpy_dtype_promotion("standard"):
        exec(LINEN, names)
        key = jax.random.key(1)
        t, s = names["trainable"], names["opt_state"]
        _, _, first = names["step"](t, s, names["frozen"], BATCH, key)
        for _ in range(30):
            t, s, last = names["step"](t, s, names["frozen"], BATCH, key)
    assert last < first
    assert jax.tree.structure(names["merged"]) == jax.tree.structure(base)


def test_the_nnx_lines():
    names = {
        "jax": jax,
        "jpeft": jpeft,
        "nnx": nnx,
        "model": nnx.Linear(24, 19, rngs=nnx.Rngs(0)),
        "x": jnp.ones((2, 24)),
    }
    exec(NNX, names)
    assert names["model"](names["x"]).shape == names["y"].shape == (2, 19)


def test_the_nnx_optimizer_lines():
    names = {
        "jax": jax,
        "jnp": jnp,
        "jpeft": jpeft,
        "nnx": nnx,
        "optax": optax,
        "model": nnx.Linear(24, 19, rngs=nnx.Rngs(0)),
        "x": jnp.ones((2, 24)),
    }
    with jax.numpy_dtype_promotion("standard"):
        exec(FILTER, names)
    _, adapter, base = nnx.split(names["model"], names["wrt"], ...)
    assert bool((adapter["kernel"]["b"][...] != 0).any())
    assert sorted(base["kernel"]) == ["base"]


@pytest.mark.slow
def test_the_train_state_lines():
    model = Model()
    base = model.init(jax.random.key(0), BATCH["tokens"])["params"]
    names = {
        "jax": jax,
        "jpeft": jpeft,
        "optax": optax,
        "TrainState": TrainState,
        "model": model,
        "params": jpeft.lora(rank=8)(jax.random.key(0), base),
        "batch": BATCH,
        "loss": lambda apply, p, batch: cross_entropy(
            apply({"params": p}, batch["tokens"]), batch
        ),
    }
    with jax.numpy_dtype_promotion("standard"):
        exec(STATE, names)
    before, after = (
        jpeft.partition(p) for p in (names["params"], names["state"].params)
    )
    for a, b in zip(jax.tree.leaves(before[1]), jax.tree.leaves(after[1]), strict=True):
        assert a.tobytes() == b.tobytes()
    assert int(names["state"].step) == 1


@pytest.mark.slow
def test_the_export_lines():
    model, tokens = Model(), BATCH["tokens"]
    base = model.init(jax.random.key(0), tokens)["params"]
    params = jpeft.quantize("nf4")(jax.random.key(0), base)
    params = jpeft.lora(rank=8)(jax.random.key(1), params)
    names = {"jax": jax, "jpeft": jpeft, "model": model}
    exec(EXPORT, names | {"params": params, "tokens": tokens} | (made := {}), made)
    want = jpeft.adapt(model.apply)({"params": params}, tokens)
    np.testing.assert_allclose(made["y"], want, rtol=1e-2, atol=1e-2)  # bfloat16


def test_the_quantised_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = Model()
    base = model.init(jax.random.key(0), BATCH["tokens"])["params"]
    uses = jpeft.find_uses(model.apply, {"params": base}, BATCH["tokens"])
    names = {"jax": jax, "jnp": jnp, "jpeft": jpeft, "model": model}
    exec(QUANTIZED, names | {"base_params": base, "uses": uses} | (made := {}), made)
    assert made["merged"]["Dense_0"]["kernel"].dtype == jnp.bfloat16
    assert "Dense_0/kernel" in capsys.readouterr().out


def test_the_lines_on_the_loss_of_a_large_vocabulary():
    names = {
        "jpeft": jpeft,
        "params": {"embed": {"embedding": jnp.zeros((11, 5))}},
        "hidden": jnp.ones((2, 3, 5)),
        "labels": BATCH["tokens"],
        "mask": jnp.ones((2, 3), bool),
    }
    exec(LOSS, names)
    np.testing.assert_allclose(names["loss"].mean(), np.log(11), rtol=1e-6)
