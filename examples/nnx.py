"""LoRA on a small NNX model: attach, train, save, load, merge.

    python examples/nnx.py

A network that has learned the sine learns the cosine by an adapter on its middle layer
alone.  One sees what is trained and what is frozen, the error before and after, that
the loaded adapter gives the same numbers, and that the merged model does.
"""

import tempfile

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import jpeft


class Model(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(1, 64, rngs=rngs)
        self.middle = nnx.Linear(64, 64, rngs=rngs)
        self.last = nnx.Linear(64, 1, rngs=rngs)

    def __call__(self, x):
        x = nnx.tanh(self.middle(nnx.tanh(self.first(x))))
        return self.last(x)


def fit(model, forward, wrt, y):
    """Trains the variables that the filter `wrt` names."""
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=wrt)

    @nnx.jit
    def step(model, optimizer):
        loss = lambda model: jnp.mean((forward(model, x) - y) ** 2)
        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, wrt))(model)
        optimizer.update(model, grads)
        return value

    errors = [step(model, optimizer) for _ in range(500)]
    return errors[0], errors[-1]


x = jnp.linspace(-3, 3, 64)[:, None]
plain = lambda model, x: model(x)
base = Model(nnx.Rngs(0))
fit(base, plain, nnx.Param, jnp.sin(x))  # the pretrained model

peft = jpeft.lora(rank=8, alpha=16, where="middle/kernel")
uses = jpeft.find_uses(plain, base, x)  # traces once: what each weight is for
model = peft(jax.random.key(1), base, uses=uses)  # a model with adapters in it
print(jpeft.summary(model))

forward = jpeft.adapt(plain)  # the same function, for a model with adapters
before, after = fit(model, forward, jpeft.trainable_filter(model), jnp.cos(x))
print(f"error before {before:.4f}\nerror after  {after:.4f}")

with tempfile.TemporaryDirectory() as folder:
    jpeft.save(f"{folder}/adapter", model, peft)  # the adapter alone
    loaded = jpeft.load(f"{folder}/adapter", base)  # onto the pretrained model
y = forward(model, x)
print("loaded: max difference", jnp.abs(forward(loaded, x) - y).max())
merged = jpeft.merge(model)  # an NNX model without adapters
print(f"merged: max difference {jnp.abs(merged(x) - y).max():.0e}")
