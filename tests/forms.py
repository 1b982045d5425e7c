"""Small models as users write them: Linen, scanned, rematerialised, NNX, plain.

Uneven sizes (7, 5, 3), so that a transposed axis shows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from draws import noisy, normal
from flax import linen as nn
from flax import nnx

WIDTH, HIDDEN, OUT, LAYERS = 7, 5, 3, 3


@dataclasses.dataclass(frozen=True)
class Form:
    """args: the first is the batch; other: another one of its shape.

    bare: of texts, the arguments without virtual tokens.
    """

    fn: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    other: Any = None
    bare: tuple[Any, ...] | None = None


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        h = nn.LayerNorm()(x)
        h = nn.Dense(HIDDEN, use_bias=False, name="up")(h)
        return x + nn.Dense(WIDTH, name="down")(nn.gelu(h)), None


class Unrolled(nn.Module):
    @nn.compact
    def __call__(self, x):
        for k in range(LAYERS):
            x, _ = Block(name=f"layer_{k}")(x)
        return nn.Dense(OUT, name="head")(x)


class Scanned(nn.Module):
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block, prevent_cse=False) if self.remat else Block
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=LAYERS,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = layers(name="layers")(x, None)
        return nn.Dense(OUT, name="head")(x)


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, HIDDEN, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, WIDTH, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([NnxBlock(rngs) for _ in range(LAYERS)])
        self.head = nnx.Linear(WIDTH, OUT, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


X = normal(1, 4, 2, WIDTH)


def linen(module):
    params = jax.jit(module.init)(jax.random.key(0), X)["params"]
    fn = lambda p, x: module.apply({"params": p}, x)
    return Form(fn, noisy(params), (X,), X + 1.0)


def nnx_form():
    graph, params = nnx.split(NnxModel(nnx.Rngs(0)))
    return Form(lambda p, x: nnx.merge(graph, p)(x), noisy(params), (X,), X + 1.0)


def plain():
    shapes = {
        "norm": {"scale": (WIDTH,)},
        "up": {"w": (WIDTH, HIDDEN)},
        "down": {"w": (HIDDEN, OUT), "b": (OUT,)},
    }
    params = jax.tree.map(jnp.zeros, shapes, is_leaf=lambda x: isinstance(x, tuple))

    def fn(p, x):
        h = jnp.tanh((x * (1.0 + p["norm"]["scale"])[None, None]) @ p["up"]["w"])
        return h @ p["down"]["w"] + p["down"]["b"][None, None]

    params = jax.tree.map(lambda x: x + 0.1, params)
    return Form(fn, noisy(params), (X,), X + 1.0)


FORMS: dict[str, Callable[[], Form]] = {
    "unrolled": lambda: linen(Unrolled()),
    "scan": lambda: linen(Scanned()),
    "scan_remat": lambda: linen(Scanned(remat=True)),
    "nnx": nnx_form,
    "plain": plain,
}
