"""A decoder, and each method written into it by hand.

A twin reads the arrays that the method trains, and computes the same loss and gradients
as its authors would write them.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp

import jpeft
from jpeft.leaf import array_fields, innermost, is_leaf, layers

LAYERS, VOCAB, D, HEADS, F, BATCH, LENGTH = 2, 128, 128, 4, 256, 4, 64
RANK, SCALE, N = 8, 2.0, 8  # N: virtual tokens, of a prompt or a prefix

# --- the model, and methods written into it ------------------------------------------


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder.  Twins override what their method changes."""

    form: str

    def dense(self, w, x, name):
        return x @ w["kernel"] + w["bias"][None, None]

    def norm(self, w, x):
        x = x - jnp.mean(x, -1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6)
        return x * w["scale"][None, None] + w["bias"][None, None]

    def embed(self, w, ids):
        return w["embedding"][ids]

    def scores(self, w, x):
        return x @ w["embedding"].T

    def projected(self, w, x):
        return [self.dense(w[n], x, n) for n in ("query", "key", "value")]

    def attention(self, w, x):
        q, k, v = (
            y.reshape(*y.shape[:2], HEADS, D // HEADS) for y in self.projected(w, x)
        )
        s = jnp.einsum("bqhd,bkhd->bhqk", q, k) / (D // HEADS) ** 0.5
        n, m = s.shape[-2:]
        seen = jnp.arange(n)[:, None] + m - n >= jnp.arange(m)[None]
        s = jnp.where(seen[None, None], s, -1e9)
        y = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(s), v)
        return self.dense(w["out"], y.reshape(x.shape), "out")

    def mlp(self, w, x):
        return self.dense(w["down"], jax.nn.relu(self.dense(w["up"], x, "up")), "down")

    def layer(self, w, x):
        x = x + self.attention(w["attention"], self.norm(w["norm_1"], x))
        return x + self.mlp(w["mlp"], self.norm(w["norm_2"], x))

    def __call__(self, params, ids):
        x = self.embed(params["embed"], ids)
        layer = jax.checkpoint(self.layer) if "remat" in self.form else self.layer
        if "scan" in self.form:
            x, _ = jax.lax.scan(lambda x, w: (layer(w, x), None), x, params["layers"])
        else:
            for k in range(LAYERS):
                x = layer(params[f"layer_{k}"], x)
        return self.scores(params["embed"], self.norm(params["norm"], x))


class Rescaled(Model):
    """IA3: keys, values, and what enters the last weight of the feed-forward."""

    def dense(self, w, x, name):
        if name == "down":
            return (x * w["kernel"]["scale"][None, None]) @ whole(w, "kernel") + whole(
                w, "bias"
            )[None, None]
        y = x @ whole(w, "kernel") + whole(w, "bias")[None, None]
        return y * w["kernel"]["scale"][None, None] if name in ("key", "value") else y


class LowRank(Model):
    def dense(self, w, x, name):
        k = w["kernel"]
        delta = (x @ k["a"]) * SCALE @ k["b"]
        return x @ k["w"] + delta + w["bias"][None, None]


class LowRankTable(Model):
    def embed(self, w, ids):
        t = w["embedding"]
        return t["w"][ids] + (t["a"][ids] * SCALE) @ t["b"]

    def scores(self, w, x):
        t = w["embedding"]
        return x @ t["w"].T + ((x @ t["b"].T) * SCALE) @ t["a"].T


class Triplets(Model):
    def dense(self, w, x, name):
        k = w["kernel"]
        delta = ((x @ k["p"]) * (k["lam"] * SCALE)[None, None]) @ k["q"]
        return x @ k["w"] + delta + w["bias"][None, None]


class Dora(Model):
    """As its authors have it: the norm of the whole weight, which is a constant."""

    def dense(self, w, x, name):
        k = w["kernel"]
        v = k["w"] + SCALE * (k["a"] @ k["b"])
        norm = jax.lax.stop_gradient(jnp.sqrt(jnp.sum(jnp.square(v), 0)))
        y = x @ k["w"] + (x @ k["a"]) * SCALE @ k["b"]
        return y * (k["m"] / norm)[None, None] + w["bias"][None, None]


@dataclasses.dataclass(frozen=True)
class Vera(Model):
    shared: tuple = ()

    def dense(self, w, x, name):
        k, (a, b) = w["kernel"], self.shared
        a, b = a[: x.shape[-1]], b[:, : k["w"].shape[-1]]
        h = (x @ a) * k["d"][None, None]
        return x @ k["w"] + (h @ b) * k["b"][None, None] + w["bias"][None, None]

    def __call__(self, params, ids):
        found = [k for k in jax.tree.leaves(params, is_leaf=holds) if holds(k)]
        shared = found[0].pop("shared_a"), found[0].pop("shared_b")
        return Model.__call__(dataclasses.replace(self, shared=shared), params, ids)


def holds(x):
    return isinstance(x, dict) and "shared_a" in x


class Hadamard(Model):
    """As LyCORIS has it: the delta is made and added to the weight, here once more for
    the backward pass, so that no layer keeps one."""

    def dense(self, w, x, name):
        def product(x, k):
            delta = SCALE * (k["a1"] @ k["b1"]) * (k["a2"] @ k["b2"])
            return x @ (k["w"] + delta)

        made = jax.checkpoint(product, prevent_cse=False)
        return made(x, w["kernel"]) + w["bias"][None, None]


class HadamardLowRank(Model):
    """W * (1 + s A B), made once more for the backward pass."""

    def dense(self, w, x, name):
        def product(x, k):
            return x @ (k["w"] * (1 + SCALE * (k["a"] @ k["b"])))

        made = jax.checkpoint(product, prevent_cse=False)
        return made(x, w["kernel"]) + w["bias"][None, None]


class HadamardAsProduct(Model):
    """As LoRA of rank^2."""

    def dense(self, w, x, name):
        k = w["kernel"]
        a = (k["a1"][:, :, None] * k["a2"][:, None]).reshape(x.shape[-1], -1)
        b = (k["b1"][:, None] * k["b2"][None]).reshape(-1, k["w"].shape[-1])
        return x @ k["w"] + (x @ a) * SCALE @ b + w["bias"][None, None]


class Kronecker(Model):
    def dense(self, w, x, name):
        k = w["kernel"]
        one, two_a, two_b = k["w1"], k["w2_a"], k["w2_b"]
        h = x.reshape(*x.shape[:2], one.shape[0], two_a.shape[0]) @ two_a
        h = jnp.einsum("bsir,io->bsor", h, one) @ two_b
        y = x @ k["w"] + SCALE * h.reshape(*x.shape[:2], -1)
        return y + w["bias"][None, None]


class Added(Model):
    """b + delta, in the place where a vector is used."""

    def dense(self, w, x, name):
        return x @ w["kernel"] + whole(w, "bias")[None, None]

    def norm(self, w, x):
        return super().norm({n: whole(w, n) for n in w}, x)


class Pruned(Model):
    """W + z w, of all parameters before the model, as the authors' code has it."""

    def __call__(self, params, ids):
        def one(x):
            gate = jnp.clip(jax.nn.sigmoid(x["alpha"]) * 3.0 - 1.5, 0.0, 1.0)
            return x["w"] + gate * x["delta"]

        return super().__call__(jax.tree.map(one, params, is_leaf=is_written), ids)


class Prompted(Model):
    def embed(self, w, ids):
        prompt = self.prompt(w["embedding"])
        x = w["embedding"]["w"][ids[:, N:]]
        return jnp.concatenate([jnp.broadcast_to(prompt, (BATCH, N, D)), x], 1)

    def prompt(self, w):
        return w["prompt"][None]

    def scores(self, w, x):
        return x @ w["embedding"]["w"].T


class PromptedByLstm(Prompted):
    def prompt(self, w):
        def layer(x, enter, recurrent, bias):
            def way(x, k):
                def step(state, entered):
                    h, c = state
                    i, f, g, o = jnp.split(entered + h @ recurrent[k], 4)
                    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
                    h = jax.nn.sigmoid(o) * jnp.tanh(c)
                    return (h, c), h

                zero = jnp.zeros(recurrent.shape[1])
                return jax.lax.scan(step, (zero, zero), x @ enter[k] + bias[k][None])[1]

            return jnp.concatenate([way(x, 0), way(x[::-1], 1)[::-1]], -1)

        h = layer(w["start"], w["first"], w["recurrent"][0], w["gates"][0])
        h = layer(h, w["second"], w["recurrent"][1], w["gates"][1])
        h = jax.nn.relu(h @ w["w1"] + w["b1"][None])
        return (h @ w["w2"] + w["b2"][None])[None]


class PromptedByMlp(Prompted):
    def prompt(self, w):
        h = jax.nn.relu(w["start"] @ w["w1"] + w["b1"][None])
        h = jax.nn.relu(h @ w["w2"] + w["b2"][None])
        return (h @ w["w3"] + w["b3"][None])[None]


class Overwritten(Model):
    """Keys and values of the first positions."""

    def embed(self, w, ids):
        ids = ids[:, N:]
        return jnp.pad(whole(w, "embedding")[ids], ((0, 0), (N, 0), (0, 0)))

    def scores(self, w, x):
        return x @ whole(w, "embedding").T

    def projected(self, w, x):
        q, k, v = (
            self.dense({n: whole(w[m], n) for n in w[m]}, x, m)
            for m in ("query", "key", "value")
        )
        put = lambda y, w: y.at[:, :N].set(w["bias"]["rows"][None])
        return q, put(k, w["key"]), put(v, w["value"])


class Prefixed(Model):
    """Keys and values put before the real ones."""

    def projected(self, w, x):
        q, k, v = (self.dense(w[n], x, n) for n in ("query", "key", "value"))
        rows = self.rows(w, x)
        before = lambda rows, y: jnp.concatenate(
            [jnp.broadcast_to(rows, (BATCH, *rows.shape[1:])), y], 1
        )
        return q, before(rows[0], k), before(rows[1], v)

    def rows(self, w, x):
        return w["key"]["kernel"]["keys"][None], w["value"]["kernel"]["values"][None]

    def dense(self, w, x, name):
        return x @ whole(w, "kernel") + whole(w, "bias")[None, None]


class MixAndMatch(Prefixed):
    def mlp(self, w, x):
        start, end = w["up"]["kernel"], w["down"]["bias"]
        h = jax.nn.relu(x @ start["down"] + start["down_bias"][None, None])
        added = 4.0 * (h @ end["up"] + end["up_bias"][None, None])
        return super().mlp(w, x) + added


class UniPelt(Prefixed):
    def rows(self, w, x):
        g = gate(w["key"]["kernel"], x)
        return [g * y for y in super().rows(w, x)]

    def dense(self, w, x, name):
        y = super().dense(w, x, name)
        k = w["kernel"]
        if name not in ("query", "value"):
            return y
        return y + gate(k, x) * SCALE * (x @ k["a"] @ k["b"])

    def mlp(self, w, x):
        y = super().mlp(w, x)
        end = w["down"]["bias"]
        h = jax.nn.relu(y @ end["down"] + end["down_bias"][None, None])
        added = h @ end["up"] + end["up_bias"][None, None]
        return y + gate(end, y) * added


def gate(w, x):
    g = jax.nn.sigmoid(x @ w["gate"] + w["gate_bias"][None, None])
    return jnp.mean(g, 1)[:, None, None]


# --- what the twins read -------------------------------------------------------------


def is_written(x):
    return isinstance(x, dict) and "w" in x


def written(params):
    """Every leaf as a dictionary of the weight and of the arrays beside it."""

    def one(x):
        if not is_leaf(x):
            return x
        beside = functools.reduce(operator.or_, map(array_fields, layers(x)))
        return {"w": innermost(x), **beside}

    return jax.tree.map(one, params, is_leaf=is_leaf)


def whole(w, name):
    """The weight of this name, with its delta if it has one."""
    x = w[name]
    if not is_written(x):
        return x
    return x["w"] + x["delta"] if "delta" in x else x["w"]


# --- what is compared ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Cost:
    """A method, in the sizes of this model, and its twin."""

    make: Callable[[], jpeft.Transform]
    twin: type[Model]
    virtual: bool = False  # the text has N virtual tokens
    finalize: bool = False
