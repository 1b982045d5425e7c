"""What makes prompts and prefixes while they train: a linear layer, an LSTM."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def linear(
    x: Float[Array, "n in"], w: Float[Array, "in out"], b: Float[Array, " out"]
) -> Float[Array, "n out"]:
    return jnp.matmul(x, w, precision=lax.Precision.HIGHEST) + b[None]


def lstm(
    x: Float[Array, "n width"],
    w: Float[Array, "2 width gates"],
    recurrent: Float[Array, "2 hidden gates"],
    b: Float[Array, "2 gates"],
) -> Float[Array, "n twice_hidden"]:
    """One layer over the tokens, forwards and backwards.

    i, f, g, o = x W + h R + b;  c = sig(f) c + sig(i) tanh(g);  h = sig(o) tanh(c)
    """
    forward = _lstm(x, w[0], recurrent[0], b[0])
    backward = _lstm(x[::-1], w[1], recurrent[1], b[1])
    return jnp.concatenate([forward, backward[::-1]], axis=-1)


def _lstm(
    x: Float[Array, "n width"],
    w: Float[Array, "width gates"],
    recurrent: Float[Array, "hidden gates"],
    b: Float[Array, " gates"],
) -> Float[Array, "n hidden"]:
    def step(state: tuple[jax.Array, jax.Array], entered: jax.Array):
        h, c = state
        z = entered + jnp.matmul(h, recurrent, precision=lax.Precision.HIGHEST)
        i, f, g, o = jnp.split(z, 4)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    zero = jnp.zeros(recurrent.shape[0], x.dtype)
    _, out = lax.scan(step, (zero, zero), linear(x, w, b))
    return out
