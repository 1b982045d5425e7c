"""Prefixes beside rows that see no key, as queries of left padding do.

Switched off a prefix is not there: values and gradients are the base's to the bit.
Active, such a row attends to the prefix alone.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax
from speed import every_nth, slow_but

import jpeft
from jpeft.leaf import is_leaf
from jpeft.tree.paths import slots

KEY = jax.random.key(0)
D, LENGTH = 6, 2
PAD = jnp.array([[0, 0, 1, 1], [1, 1, 1, 1]])
SEE = jnp.tril(jnp.ones((4, 4), bool))[None] & (PAD[:, None] > 0)
NAMES = ("query", "key", "value", "out")


def draw(*shape, k=0):
    rng = np.random.default_rng(k)
    return jnp.asarray(0.4 * rng.standard_normal(shape), jnp.float32)


def attention(k=0):
    return {n: {"kernel": draw(D, D, k=k + j)} for j, n in enumerate(NAMES)}


X = draw(2, 4, D, k=20)
LOWEST = float(np.finfo(np.float32).min)
MASKS = {
    "-1e9": lambda s: jnp.where(SEE, s, -1e9),
    "finfo.min": lambda s: jnp.where(SEE, s, LOWEST),
    "-inf": lambda s: jnp.where(SEE, s, -jnp.inf),
    "added -1e9": lambda s: s + jnp.where(SEE, 0.0, -1e9),
    "added finfo.min": lambda s: s + jnp.where(SEE, 0.0, LOWEST),
    # No mask at all: unscaled scores may lie as low.
    "as T5": lambda s: s - 256.0,
}


def by_hand(s):
    e = jnp.exp(s - jnp.max(s, -1, keepdims=True))
    return e / jnp.sum(e, -1, keepdims=True)


def guarded(s):
    """A row of nothing is given weights of zero."""
    m = jnp.max(s, -1, keepdims=True)
    e = jnp.exp(s - lax.stop_gradient(jnp.where(jnp.isfinite(m), m, 0.0)))
    return e / jnp.maximum(jnp.sum(e, -1, keepdims=True), 1e-9)


SOFTMAX = {
    "jax": lambda s: jax.nn.softmax(s),
    "where=": lambda s: jax.nn.softmax(s, where=SEE),
    "by hand": by_hand,
    "guarded": guarded,
    "capped": lambda s: jax.nn.softmax(5.0 * jnp.tanh(s / 5.0)),
    # Odd ones: their slopes at zero are infinite, or they look at the scores.
    "roots": lambda s: jax.nn.softmax(jnp.where(s > 0, jnp.sqrt(jnp.abs(s)), s)),
    "lowest": lambda s: jax.nn.softmax(s - lax.stop_gradient(jnp.min(s) * 0.0)),
}


def model(mask, softmax):
    def attend(p, x):
        q, k, v = (x @ p[n]["kernel"] for n in NAMES[:3])
        s = MASKS[mask](jnp.einsum("bqd,bkd->bqk", q, k))
        return x + SOFTMAX[softmax](s) @ v @ p["out"]["kernel"]

    return lambda p, x: attend(p["l1"]["attn"], attend(p["l0"]["attn"], x))


PARAMS = {"l0": {"attn": attention()}, "l1": {"attn": attention(4)}}


def with_gradients(fn):
    """(params, x, ...) -> the output, and its gradients by the first two.

    Compiled equation by equation: fused ones are rounded otherwise than alone.
    """

    def loss(p, x, *more):
        y = fn(p, x, *more)
        return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

    def run(*args):
        (_, y), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(*args)
        return y, grads

    return jax.jit(run, compiler_options={"xla_disable_hlo_passes": "fusion"})


def check_off(fn, params, off, x=X, more=(), ready=lambda p: p):
    """A tree whose prefixes are switched off is the base, bit for bit."""
    want, (by_base, by_x) = with_gradients(fn)(params, x, *more)
    apply = lambda p, *args: jpeft.adapt(fn)(ready(p), *args)
    got, (by_params, also_by_x) = with_gradients(apply)(off, x, *more)
    same = functools.partial(np.testing.assert_array_equal, strict=True)
    same(got, want)
    same(also_by_x, by_x)
    jax.tree.map(same, jpeft.unload(by_params), by_base)
    for path, leaf in slots(by_params).items():
        if hasattr(leaf, "keys") and is_leaf(leaf):
            rows = [x for x in (leaf.keys, leaf.values) if x is not None]
            assert not any(map(np.any, rows)), path
    return want


# Every softmax after the masks that reach furthest, every mask before two softmaxes.
ROWS = [
    (m, s)
    for m in MASKS
    for s in SOFTMAX
    if m in ("-inf", "finfo.min") or s in ("jax", "by hand")
]


@pytest.mark.sample(2)
@pytest.mark.parametrize(("mask", "softmax"), every_nth(5, ROWS))
def test_switched_off_it_is_the_base_bit_for_bit(mask, softmax):
    fn = model(mask, softmax)
    params = jpeft.prefix(LENGTH, init="unit")(KEY, PARAMS)
    want = check_off(fn, PARAMS, jpeft.disable(params))
    # Without keys and without a guard the base itself has no answer.
    assert bool(jnp.isfinite(want).all()) or mask == "-inf"


METHODS = {
    "prefix": lambda: jpeft.prefix(LENGTH, init="unit"),
    "gated": lambda: jpeft.gated(jpeft.prefix(LENGTH, init="unit")),
    "network": lambda: jpeft.prefix(LENGTH, reparametrization="mlp", width=3),
    "tasks": lambda: jpeft.prefix(LENGTH, init="unit", tasks=3),
    "mam": lambda: jpeft.mam(prefix_length=LENGTH, bottleneck=2),
    "unipelt": lambda: jpeft.unipelt(prefix_length=LENGTH, bottleneck=2, rank=2),
}
MLP = {"up": {"kernel": draw(D, 3, k=30)}, "down": {"kernel": draw(3, D, k=31)}}


@pytest.mark.sample(1)
@pytest.mark.parametrize("method", slow_but({"gated", "mam", "unipelt"}, METHODS))
def test_each_method_that_has_a_prefix_is_switched_off(method):
    attend = model("-1e9", "jax")

    def fn(p, x):
        x = attend(p, x)
        return (
            x + jax.nn.relu(x @ p["mlp"]["up"]["kernel"]) @ p["mlp"]["down"]["kernel"]
        )

    base = {**PARAMS, "mlp": MLP}
    params = jpeft.disable(METHODS[method]()(KEY, base))
    ids = jnp.array([2, 0])
    ready = lambda p: jpeft.select(p, ids) if method == "tasks" else p
    check_off(fn, base, params, ready=ready)


def test_what_became_nan_is_switched_off_too():
    fn = model("-1e9", "jax")
    trainable, frozen = jpeft.partition(jpeft.prefix(LENGTH)(KEY, PARAMS))
    lost = jax.tree.map(lambda x: x * jnp.nan, trainable)
    check_off(fn, PARAMS, jpeft.disable(jpeft.combine(lost, frozen)))


class Layer(nn.Module):
    how: str

    @nn.compact
    def __call__(self, x, _=None):
        mask = SEE[:, None]
        if self.how == "flax":
            attend = nn.MultiHeadDotProductAttention(2, name="attn", use_bias=False)
            return x + attend(x, x, mask=mask), None
        dense = lambda n: nn.DenseGeneral((2, 3), use_bias=False, name=n)
        q, k, v = (dense(n)(x) for n in ("query", "key", "value"))
        y = jax.nn.dot_product_attention(q, k, v, mask=mask)
        out = nn.DenseGeneral(D, axis=(-2, -1), use_bias=False, name="out")
        return x + out(y), None


class Stack(nn.Module):
    how: str

    @nn.compact
    def __call__(self, x):
        scanned = nn.scan(
            Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2
        )
        return scanned(self.how, name="layers")(x, None)[0]


@functools.cache
def stack(how):
    module = Stack(how)
    params = jax.jit(module.init)(KEY, X)["params"]
    return (lambda p, x: module.apply({"params": p}, x)), params


@pytest.mark.slow
@pytest.mark.parametrize("how", ["flax", "dot_product_attention"])
def test_layers_of_a_scan_are_switched_off(how):
    fn, base = stack(how)
    uses = jpeft.find_uses(fn, base, X)
    both = jpeft.prefix(LENGTH, init="unit")(KEY, base, uses=uses)
    check_off(fn, base, jpeft.disable(both))
    last = jpeft.p_tuning_v2(LENGTH, layers=[-1], init="unit")(KEY, base, uses=uses)
    apply = lambda p, x: jpeft.adapt(fn)(p, x)
    loss = lambda p, x: jnp.sum(jnp.sin(apply(p, x)))
    value, grads = jax.jit(jpeft.value_and_grad(loss))(last, X)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves((value, grads)))
    for g in jax.tree.leaves(jpeft.partition(grads)[0]):
        assert not np.any(g[0]) and np.any(g[1])


# --- active
# ------------------------------------------------------------------------------


def put_before(p, x, mask, rows):
    """The same attention over keys and values that stand before the real ones."""
    q, k, v = (x @ p[n]["kernel"] for n in NAMES[:3])
    k, v = (
        jnp.concatenate([jnp.broadcast_to(r[None], (2, LENGTH, D)), y], 1)
        for r, y in zip(rows, (k, v), strict=True)
    )
    s = jnp.einsum("bqd,bkd->bqk", q, k)
    s = jnp.concatenate([s[..., :LENGTH], MASKS[mask](s[..., LENGTH:])], -1)
    return x + jax.nn.softmax(s) @ v @ p["out"]["kernel"]


@pytest.mark.parametrize("mask", slow_but({"-inf", "finfo.min"}, list(MASKS)[:-1]))
def test_a_row_that_sees_no_key_attends_to_the_prefix_alone(mask):
    base = {"attn": attention()}

    def fn(p, x):
        q, k, v = (x @ p["attn"][n]["kernel"] for n in NAMES[:3])
        s = MASKS[mask](jnp.einsum("bqd,bkd->bqk", q, k))
        return x + jax.nn.softmax(s) @ v @ p["attn"]["out"]["kernel"]

    params = jpeft.prefix(LENGTH, init="unit")(KEY, base)
    rows = (
        params["attn"]["key"]["kernel"].keys,
        params["attn"]["value"]["kernel"].values,
    )

    def ours(rows, x):
        at = params["attn"]
        k, v = (at[n]["kernel"] for n in ("key", "value"))
        k, v = k.replace(keys=rows[0]), v.replace(values=rows[1])
        at = {**at, "key": {"kernel": k}, "value": {"kernel": v}}
        return jpeft.adapt(fn)({"attn": at}, x)

    hand = lambda rows, x: put_before(base["attn"], x, mask, rows)
    got, grads = with_gradients(ours)(rows, X)
    want, expected = with_gradients(hand)(rows, X)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    for g, w in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5)


# --- in mode "tokens"
# ------------------------------------------------------------------------------


def test_rows_of_virtual_tokens_leave_a_text_without_them_as_it_is():
    attend = model("-1e9", "jax")
    base = {**PARAMS, "embed": {"embedding": draw(9, D, k=40)}}
    ids = jnp.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    fn = lambda p, t, ids: attend(p, t * p["embed"]["embedding"][ids])
    params = jpeft.prefix(LENGTH, mode="tokens", init="unit")(KEY, base)
    for tree in (params, jpeft.disable(params)):
        check_off(fn, base, tree, jnp.float32(1.5), more=(ids,))
