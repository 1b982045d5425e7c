"""QLoRA: a base in 4 bits (NF4), LoRA in full precision over it.

    python examples/quantised.py

One sees how many bytes the weights take before and after, how many bits that is for a
parameter, how many are trained, the loss going down, and that a merged weight is an
array of 16 bits again.
"""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import jpeft


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = x + nn.Dense(256)(nn.gelu(nn.Dense(1024)(nn.LayerNorm()(x))))
        return x


megabytes = lambda tree: sum(a.nbytes for a in jax.tree.leaves(tree)) / 1e6
model = Model()
x, y = jax.random.normal(jax.random.key(0), (2, 64, 256))
base = model.init(jax.random.key(1), x)["params"]  # in place of a pretrained model

peft = jpeft.chain(
    jpeft.quantize("nf4", double=True, where="linear"),
    jpeft.lora(rank=8, alpha=16, where="linear"),
)
params = peft(jax.random.key(2), base)
trainable, frozen = jpeft.partition(params)
numbers = sum(a.size for a in jax.tree.leaves(base))
print(f"base in float32     {megabytes(base):6.2f} MB")
print(f"base in 4 bits      {megabytes(frozen):6.2f} MB")
print(f"bits a parameter    {8e6 * megabytes(frozen) / numbers:6.2f}")
print(f"what is trained     {megabytes(trainable):6.2f} MB")

tx = optax.adam(3e-3)
apply = jpeft.adapt(model.apply)


def loss(trainable, frozen):
    params = jpeft.combine(trainable, frozen)
    return jnp.mean((apply({"params": params}, x) - y) ** 2)


@jax.jit
def step(trainable, state, frozen):  # an argument, else its codes become constants
    value, grads = jax.value_and_grad(loss)(trainable, frozen)
    updates, state = tx.update(grads, state)
    return optax.apply_updates(trainable, updates), state, value


state = tx.init(trainable)
print(f"optimiser's state   {megabytes(state):6.2f} MB")
for k in range(41):
    trainable, state, value = step(trainable, state, frozen)
    if k % 20 == 0:
        print(f"step {k:2d}: loss {value:.3f}")

merged = jpeft.merge(jpeft.combine(trainable, frozen), dtype=jnp.bfloat16)
print("merged", merged["Dense_0"]["kernel"].dtype, f"{megabytes(merged):.2f} MB")
