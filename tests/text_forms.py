"""Small models of text: token ids in, scores of the next token out.

Uneven sizes.  The table is read in mode "clip", so that the bare model is finite on
virtual ids too.  `prefix` is prefix tuning written into the model by hand.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from draws import noisy, normal
from flax import linen as nn
from flax import nnx
from forms import Form

import jpeft

VOCAB, WIDTH, HEADS, HEAD, HIDDEN, LAYERS, LENGTH, PLACES = 11, 6, 2, 5, 7, 2, 4, 16
N = 3  # virtual tokens


def attended(q, k, v, mask):
    """Causal attention of queries at the last places; mask (batch, keys)."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / HEAD**0.5
    queries, keys = scores.shape[-2:]
    seen = jnp.arange(queries)[:, None] + keys - queries >= jnp.arange(keys)[None]
    seen = seen[None, None] & (mask[:, None, None] != 0)
    weights = jax.nn.softmax(jnp.where(seen, scores, -1e9))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def prefixed(x, rows):
    """rows (length, heads, head) before x (batch, keys, heads, head)."""
    rows = jnp.broadcast_to(rows[None], (x.shape[0], *rows.shape))
    return jnp.concatenate([rows.astype(x.dtype), x], 1)


class Attention(nn.Module):
    use_bias: bool = True
    fused: bool = False

    @nn.compact
    def __call__(self, x, mask, prefix=None):
        dense = lambda name, *sizes: nn.DenseGeneral(
            sizes, use_bias=self.use_bias, name=name
        )
        if self.fused:
            q, k, v = jnp.moveaxis(dense("qkv", 3, HEADS, HEAD)(x), -3, 0)
        else:
            q, k, v = (dense(n, HEADS, HEAD)(x) for n in ("query", "key", "value"))
        if prefix is not None:
            k, v = (prefixed(y, p) for y, p in zip((k, v), prefix, strict=True))
            ones = jnp.ones((x.shape[0], prefix[0].shape[0]), mask.dtype)
            mask = jnp.concatenate([ones, mask], 1)
        y = attended(q, k, v, mask)
        return nn.DenseGeneral(WIDTH, axis=(-2, -1), name="out")(y)


class TextBlock(nn.Module):
    use_bias: bool = True
    fused: bool = False

    @nn.compact
    def __call__(self, x, mask, prefix=None):
        attention = Attention(self.use_bias, self.fused, name="attention")
        x = x + attention(nn.LayerNorm(name="norm_1")(x), mask, prefix)
        h = nn.Dense(HIDDEN, name="up")(nn.LayerNorm(name="norm_2")(x))
        return x + nn.Dense(WIDTH, name="down")(nn.gelu(h)), None


class Embed(nn.Module):
    rows: int

    def setup(self):
        shape = (self.rows, WIDTH)
        self.embedding = self.param("embedding", nn.initializers.normal(1.0), shape)

    def __call__(self, ids):
        return self.embedding.at[ids].get(mode="clip")

    def attend(self, x):
        return x @ self.embedding.T


class Lm(nn.Module):
    """prefix: (keys, values), each (layers, length, heads, head)."""

    vocab: int = VOCAB
    scan: bool = False
    remat: bool = False
    use_bias: bool = True
    fused: bool = False

    @nn.compact
    def __call__(self, ids, mask=None, places=None, prefix=None):
        mask = jnp.ones(ids.shape, jnp.int32) if mask is None else mask
        if places is None:
            places = jnp.broadcast_to(jnp.arange(ids.shape[1])[None], ids.shape)
        tokens = Embed(self.vocab, name="token_embed")
        x = tokens(ids) + Embed(PLACES, name="position_embed")(places)
        block = nn.remat(TextBlock, prevent_cse=False) if self.remat else TextBlock
        if self.scan:
            layers = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, 0 if prefix is not None else nn.broadcast),
                length=LAYERS,
            )
            x, _ = layers(self.use_bias, self.fused, name="layers")(x, mask, prefix)
        else:
            for k in range(LAYERS):
                mine = None if prefix is None else tuple(p[k] for p in prefix)
                layer = block(self.use_bias, self.fused, name=f"layer_{k}")
                x, _ = layer(x, mask, mine)
        return tokens.attend(nn.LayerNorm(name="norm")(x))


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        sizes = WIDTH, (HEADS, HEAD)
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.query = nnx.LinearGeneral(*sizes, rngs=rngs)
        self.key = nnx.LinearGeneral(*sizes, rngs=rngs)
        self.value = nnx.LinearGeneral(*sizes, rngs=rngs)
        self.out = nnx.LinearGeneral((HEADS, HEAD), WIDTH, axis=(-2, -1), rngs=rngs)
        self.up = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, WIDTH, rngs=rngs)

    def __call__(self, x, mask):
        h = self.norm(x)
        y = attended(self.query(h), self.key(h), self.value(h), mask)
        x = x + self.out(y)
        return x + self.down(nnx.gelu(self.up(x)))


class NnxLm(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.layers = nnx.List([NnxBlock(rngs) for _ in range(LAYERS)])
        self.head = nnx.Linear(WIDTH, VOCAB, rngs=rngs)

    def __call__(self, ids):
        # Of the lookup, not of the ids: these arrive as they are.
        x = self.embed.embedding[...].at[ids].get(mode="clip")
        mask = jnp.ones(ids.shape, jnp.int32)
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(x)


IDS = jax.random.randint(jax.random.key(4), (2, LENGTH), 0, VOCAB)
MORE = jax.random.randint(jax.random.key(5), (2, 4, LENGTH), 0, VOCAB)


def text_form(fn, params):
    """A form whose batches are four texts with N virtual tokens each."""
    virtual = jpeft.prepend_virtual_tokens(MORE, N, vocab_size=VOCAB).ids
    return Form(fn, params, (virtual[0],), virtual[1], (MORE[0],))


def linen_text(module):
    params = jax.jit(module.init)(jax.random.key(0), IDS)["params"]
    fn = lambda p, *args: module.apply({"params": p}, *args)
    return text_form(fn, noisy(params))


def nnx_text():
    graph, params = nnx.split(NnxLm(nnx.Rngs(0)))
    return text_form(lambda p, ids: nnx.merge(graph, p)(ids), noisy(params))


def plain_text():
    draw = lambda n, *s: normal(n, *s)
    names = ("query", "key", "value", "out")
    attn = {n: {"w": draw(k, WIDTH, WIDTH)} for k, n in enumerate(names)}
    mlp = {"up": {"w": draw(7, WIDTH, HIDDEN)}, "down": {"w": draw(8, HIDDEN, WIDTH)}}
    params = {"table": draw(9, VOCAB, WIDTH), "attn": attn, "mlp": mlp}

    def fn(p, ids):
        x = jnp.take(p["table"], ids, axis=0, mode="clip")
        q, k, v = (x @ p["attn"][n]["w"] for n in names[:3])
        y = jax.nn.softmax(q @ k.transpose(0, 2, 1)) @ v
        x = jnp.tanh(y @ p["attn"]["out"]["w"])
        x = x + jnp.tanh(x @ p["mlp"]["up"]["w"]) @ p["mlp"]["down"]["w"]
        return x @ p["table"].T

    return text_form(fn, params)


def of_words(make):
    """The same model on texts without virtual tokens."""
    form = make()
    return dataclasses.replace(form, args=form.bare, other=MORE[1], bare=None)


TEXT_FORMS = {
    "text_unrolled": lambda: linen_text(Lm()),
    "text_scan": lambda: linen_text(Lm(scan=True)),
    "text_scan_remat": lambda: linen_text(Lm(scan=True, remat=True)),
    "text_nnx": nnx_text,
    "text_plain": plain_text,
}
WORD_FORMS = {
    n.replace("text_", "words_"): (lambda make=make: of_words(make))
    for n, make in TEXT_FORMS.items()
}
