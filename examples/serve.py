"""Serving: one batch in which each example has a task of its own; then one task merged.

    python examples/serve.py

A prefix for each of three tasks lies in one adapter, and `jpeft.select` says which one
an example of the batch gets.  One sees that each row is what its prefix alone would
give.  LoRA changes weights, so it can be merged: one sees the operations of a call
before and after, and that the results agree.
"""

import tempfile

import jax
import jax.numpy as jnp
from flax import linen as nn

import jpeft


class Model(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(100, 64)(tokens)
        x = x + nn.MultiHeadDotProductAttention(num_heads=4)(x)
        return nn.Dense(100)(x)


model = Model()
tokens = jax.random.randint(jax.random.key(0), (4, 16), 0, 100)
base = model.init(jax.random.key(1), tokens)["params"]  # in place of a pretrained one
apply = jax.jit(jpeft.adapt(model.apply))

with tempfile.TemporaryDirectory() as folder:  # what a training would have written
    prefixes = jpeft.prefix(length=5, tasks=3, init="unit")
    jpeft.save(f"{folder}/tasks", prefixes(jax.random.key(2), base), prefixes)
    lora = jpeft.lora(rank=8)
    trainable, frozen = jpeft.partition(lora(jax.random.key(3), base))
    trainable = jax.tree.map(lambda a: a + 0.01, trainable)
    jpeft.save(f"{folder}/lora", jpeft.combine(trainable, frozen), lora)
    tasks = jpeft.load(f"{folder}/tasks", base)
    one = jpeft.load(f"{folder}/lora", base)

ids = jnp.array(
    [2, 0, 1, 2]
)  # the task of each example; another batch compiles nothing
logits = apply({"params": jpeft.select(tasks, ids)}, tokens)
for row, task in enumerate(ids):
    alone = jpeft.select(tasks, jnp.array([task]))
    far = jnp.abs(apply({"params": alone}, tokens[row : row + 1]) - logits[row]).max()
    print(f"row {row}, task {task}: differs from this task alone by {far:.0e}")

merged = jpeft.merge(one)  # plain arrays: the model needs no jpeft any more
far = jnp.abs(model.apply({"params": merged}, tokens) - apply({"params": one}, tokens))
print(f"merged: differs from the adapter by {far.max():.0e}")
for name, f, params in (
    ("adapter", apply, one),
    ("merged", jax.jit(model.apply), merged),
):
    cost = f.lower({"params": params}, tokens).compile().cost_analysis()
    print(f"{name:8} {cost['flops'] / 1e6:.2f} million operations a call")
