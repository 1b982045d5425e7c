"""LoRA on a small Linen model: attach, train, save, load, merge.

    python examples/linen.py

A network that has learned the sine learns the cosine by an adapter on its middle layer
alone.  One sees what is trained and what is frozen, the error before and after, that
the loaded adapter gives the same numbers, and that the merged weights do.
"""

import tempfile

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import jpeft


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.tanh(nn.Dense(64)(x))
        return nn.Dense(1)(x)


def fit(loss, weights):
    """An optax loop like any other: it need not know what an adapter is."""
    tx = optax.adam(1e-2)

    @jax.jit
    def step(weights, state):
        updates, state = tx.update(jax.grad(loss)(weights), state)
        return optax.apply_updates(weights, updates), state

    state = tx.init(weights)
    for _ in range(500):
        weights, state = step(weights, state)
    return weights


model = Model()
x = jnp.linspace(-3, 3, 64)[:, None]
error = lambda apply, params, y: jnp.mean((apply({"params": params}, x) - y) ** 2)
base = model.init(jax.random.key(0), x)["params"]
base = fit(lambda p: error(model.apply, p, jnp.sin(x)), base)  # the pretrained model

peft = jpeft.lora(rank=8, alpha=16, where="Dense_1/kernel")
params = peft(jax.random.key(1), base)  # the same tree, with adapters beside weights
print(jpeft.summary(params))

apply = jpeft.adapt(model.apply)  # the model's function, for a tree with adapters
trainable, frozen = jpeft.partition(params)
loss = lambda t: error(apply, jpeft.combine(t, frozen), jnp.cos(x))
print(f"error before {loss(trainable):.4f}")
trainable = fit(loss, trainable)
print(f"error after  {loss(trainable):.4f}")
params = jpeft.combine(trainable, frozen)

with tempfile.TemporaryDirectory() as folder:
    jpeft.save(f"{folder}/adapter", params, peft)  # the adapter alone
    loaded = jpeft.load(f"{folder}/adapter", base)  # onto the pretrained model
y = apply({"params": params}, x)
print("loaded: max difference", jnp.abs(apply({"params": loaded}, x) - y).max())
merged = jpeft.merge(params)  # plain arrays, for the model as it is
far = jnp.abs(model.apply({"params": merged}, x) - y).max()
print(f"merged: max difference {far:.0e}")
