"""Small language models, one style of attention each, with a place for a prefix.

`prefix` is the method written by hand into the model: keys and values put before the
real ones, after whatever the model does to those.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

WIDTH, HEADS, GROUPS, HEAD, VOCAB, LAYERS = 16, 4, 2, 4, 23, 2


def rotary(x, pos, style="half"):
    d = x.shape[-1]
    freq = 1.0 / 100.0 ** (jnp.arange(0, d, 2, dtype=jnp.float32) / d)
    t = pos[..., None].astype(jnp.float32) * freq[None, None]
    c, s = (f(t)[:, :, None, :].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    if style == "partial":  # half of the features are rotated
        a, b = jnp.split(x, 2, -1)
        return jnp.concatenate([rotary(a, pos), b], -1)
    if style == "rotate_half":
        c, s = (jnp.concatenate([u, u], -1) for u in (c, s))
        a, b = jnp.split(x, 2, -1)
        return x * c + jnp.concatenate([-b, a], -1) * s
    if style == "half":
        a, b = jnp.split(x, 2, -1)
        return jnp.concatenate([a * c - b * s, b * c + a * s], -1)
    a, b = x[..., ::2], x[..., 1::2]
    return jnp.stack([a * c - b * s, a * s + b * c], -1).reshape(x.shape)


def before(prefix, k, v):
    """The hand-written prefix: (length, heads, head) put before keys and values."""
    if prefix is None:
        return k, v, 0
    pk, pv = (jnp.broadcast_to(p, (k.shape[0], *p.shape)) for p in prefix)
    k, v = (jnp.concatenate([p.astype(x.dtype), x], 1) for p, x in ((pk, k), (pv, v)))
    return k, v, pk.shape[1]


def widened(n, x, value):
    """n more columns of a neutral value before the keys' axis, the last."""
    return jnp.concatenate([jnp.full((*x.shape[:-1], n), value, x.dtype), x], -1)


class Attention(nn.Module):
    """kind: how keys are made and attended; see the branches."""

    kind: str = "jax"
    style: str = "half"

    @nn.compact
    def __call__(self, x, pos, pad, prefix=None):
        q, k, v = self.project(x)
        if self.kind == "norms":
            q, k = nn.LayerNorm(name="q_norm")(q), nn.LayerNorm(name="k_norm")(k)
        else:
            q, k = rotary(q, pos, self.style), rotary(k, pos, self.style)
        k, v, n = before(prefix, k, v)
        s = x.shape[1]
        at = jnp.arange(s)
        allow = (pad[:, None, None, :] > 0) & (at[:, None] >= at[None, :])[None, None]
        if self.kind == "window":
            allow &= (at[:, None] < at[None, :] + 3)[None, None]
        o = getattr(self, f"attend_{self.how()}")(q, k, v, widened(n, allow, True), n)
        dense = nn.DenseGeneral(WIDTH, (-2, -1), name="out", use_bias=False)
        return dense(o.reshape(*x.shape[:2], HEADS, HEAD))

    def how(self):
        known = ("repeat", "grouped", "folded", "window", "mla", "bias")
        return self.kind if self.kind in known else "jax"

    def project(self, x):
        b, s, _ = x.shape
        if self.kind == "fused":
            qkv = nn.DenseGeneral((3, HEADS, HEAD), name="qkv")(x)
            return qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        if self.kind == "fused_flat":
            qkv = nn.Dense(3 * WIDTH, name="qkv")(x)
            return [t.reshape(b, s, HEADS, HEAD) for t in jnp.split(qkv, 3, -1)]
        if self.kind == "fused_heads":
            qkv = nn.Dense(3 * WIDTH, name="query_key_value")(x)
            return jnp.split(qkv.reshape(b, s, HEADS, 3 * HEAD), 3, -1)
        grouped = self.kind in ("jax", "repeat", "grouped", "window", "bias")
        n = GROUPS if grouped else HEADS
        general = functools.partial(nn.DenseGeneral, use_bias=False)
        q = general((HEADS, HEAD), name="query")(x)
        if self.kind == "folded":
            k, v = (nn.Dense(n * HEAD, name=m)(x) for m in ("key", "value"))
            return q, k.reshape(b, s, n, HEAD), v.reshape(b, s, n, HEAD)
        return q, *(general((n, HEAD), name=m)(x) for m in ("key", "value"))

    def attend_jax(self, q, k, v, allow, n):
        return jax.nn.dot_product_attention(q, k, v, mask=allow)

    attend_window = attend_jax

    def attend_bias(self, q, k, v, allow, n):
        """jax.nn's own causal mask, a position bias; scores in float32."""
        s = q.shape[1]
        bias = jnp.linspace(-1, 1, s)[None, None, None, :] * jnp.ones((1, HEADS, s, 1))
        if n == 0:
            return jax.nn.dot_product_attention(q, k, v, bias=bias, is_causal=True)
        at = jnp.arange(s)
        mask = widened(n, (at[:, None] >= at[None, :])[None, None], True)
        bias = widened(n, bias, 0.0)
        return jax.nn.dot_product_attention(q, k, v, bias=bias, mask=mask)

    def attend_repeat(self, q, k, v, allow, n):
        k, v = (jnp.repeat(t, HEADS // GROUPS, 2) for t in (k, v))
        s = jnp.einsum("bqhd,bkhd->bhqk", q, k) / HEAD**0.5
        s = jnp.where(allow, s, jnp.asarray(-1e9, s.dtype)).astype(jnp.float32)
        w = jax.nn.softmax(s, -1).astype(q.dtype)
        return jnp.einsum("bhqk,bkhd->bqhd", w, v)

    def attend_grouped(self, q, k, v, allow, n):
        """Groups of queries; a soft cap; a softmax by hand with a mask multiplied."""
        q = q.reshape(*q.shape[:2], GROUPS, HEADS // GROUPS, HEAD)
        s = jnp.einsum("bqkgd,bskd->bkgqs", q, k) * HEAD**-0.5
        s = s + jnp.where(allow, 0.0, -1e9)[:, :, None].astype(s.dtype)
        s = jnp.tanh(s / 30) * 30
        e = jnp.exp(s - jax.lax.stop_gradient(s.max(-1, keepdims=True)))
        e = e * allow[:, :, None].astype(s.dtype)
        return jnp.einsum("bkgqs,bskd->bqkgd", e / e.sum(-1, keepdims=True), v)

    def attend_folded(self, q, k, v, allow, n):
        b = q.shape[0]
        fold = lambda t: t.transpose(0, 2, 1, 3).reshape(b * HEADS, -1, HEAD)
        s = fold(q) @ fold(k).transpose(0, 2, 1) / HEAD**0.5
        mask = jnp.repeat(allow, HEADS, 1).reshape(b * HEADS, q.shape[1], -1)
        s = jnp.where(mask, s, -jnp.inf)
        o = (jax.nn.softmax(s) @ fold(v)).reshape(b, HEADS, -1, HEAD)
        return o.transpose(0, 2, 1, 3)

    def attend_mla(self, q, k, v, allow, n):
        """Scores as the sum of two products, over parts of the features."""
        cut = lambda t: (t[..., :1], t[..., 1:])
        parts = zip(cut(q), cut(k), strict=True)
        s = sum(jnp.einsum("bqhd,bkhd->bhqk", a, b) for a, b in parts)
        s = jnp.where(allow, s, -1e9)
        return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(s, -1), v)


class Mlp(nn.Module):
    gated: bool = False

    @nn.compact
    def __call__(self, x):
        if not self.gated:
            return nn.Dense(WIDTH, name="fc2")(nn.gelu(nn.Dense(20, name="fc1")(x)))
        dense = functools.partial(nn.Dense, use_bias=False)
        h = nn.silu(dense(20, name="gate_proj")(x)) * dense(20, name="up_proj")(x)
        return dense(WIDTH, name="down_proj")(h)


class Block(nn.Module):
    attention: Any
    gated: bool = False
    drop: float = 0.0

    @nn.compact
    def __call__(self, x, pos, pad, prefix=None):
        h = nn.LayerNorm(name="norm_1")(x)
        x = x + self.attention(name="attention")(h, pos, pad, prefix)
        y = Mlp(self.gated, name="mlp")(nn.LayerNorm(name="norm_2")(x))
        if self.drop:
            y = nn.Dropout(self.drop, deterministic=False)(y)
        return x + y


class LM(nn.Module):
    """attention: an `Attention`, partially applied.  mode: any of "scan", "remat"."""

    attention: Any
    mode: str = ""
    gated: bool = False
    learned: bool = False
    drop: float = 0.0

    @nn.compact
    def __call__(self, ids, pad=None, prefix=None):
        """prefix: (keys, values), (layers, length, heads, head) each."""
        pad = jnp.ones(ids.shape) if pad is None else pad
        embed = nn.Embed(VOCAB, WIDTH, name="tok")
        x = embed(ids)
        pos = jnp.broadcast_to(jnp.arange(ids.shape[1])[None], ids.shape)
        if self.learned:
            x = x + nn.Embed(64, WIDTH, name="pos")(pos)
        block = nn.remat(Block) if "remat" in self.mode else Block
        options = {"attention": self.attention, "gated": self.gated, "drop": self.drop}
        if "scan" in self.mode:
            step = nn.scan(
                lambda layer, x, p: (layer(x, pos, pad, p), None),
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                length=LAYERS,
                in_axes=0,
            )
            x, _ = step(block(**options, name="layers"), x, prefix)
        else:
            for k in range(LAYERS):
                mine = None if prefix is None else jax.tree.map(lambda p: p[k], prefix)  # noqa: B023
                x = block(**options, name=f"layer_{k}")(x, pos, pad, mine)
        return embed.attend(nn.LayerNorm(name="norm")(x))


IDS = jax.random.randint(jax.random.key(3), (2, 7), 0, VOCAB)
PAD = jnp.array([[1.0] * 7, [1.0] * 5 + [0.0] * 2])


@functools.cache
def model(kind="jax", style="half", mode="", **options):
    """(module, params), every parameter noised."""
    made = LM(functools.partial(Attention, kind=kind, style=style), mode, **options)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    params = jax.jit(made.init)(keys, IDS)["params"]
    flat, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(5), len(flat))
    noisy = [
        x + 0.3 * jax.random.normal(k, x.shape, x.dtype)
        for x, k in zip(flat, keys, strict=True)
    ]
    return made, treedef.unflatten(noisy)
