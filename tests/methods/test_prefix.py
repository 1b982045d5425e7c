"""Prefix tuning in mode "kv": equal to keys and values put before the real ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import attention as A

import jpeft
from jpeft.methods.prefix import Prefix
from jpeft.tree.paths import slots

LENGTH = 5
KEY = jax.random.key(0)
GROUPED = ("jax", "repeat", "grouped", "window", "bias")
CASES = [
    ("jax", "half"),
    ("jax", "rotate_half"),
    ("jax", "partial"),
    ("repeat", "half"),
    ("repeat", "interleaved"),
    ("grouped", "rotate_half"),
    ("folded", "rotate_half"),
    ("norms", "half"),
    ("window", "half"),
    ("bias", "half"),
    ("mla", "half"),
    ("fused", "rotate_half"),
    ("fused_flat", "rotate_half"),
    ("fused_heads", "rotate_half"),
]


def groups(kind):
    return A.GROUPS if kind in GROUPED else A.HEADS


def learned(kind, length=LENGTH, dtype=jnp.float32):
    """(keys, values), (layers, length, heads, head) each."""
    shape = (A.LAYERS, length, groups(kind), A.HEAD)
    return tuple(
        jax.random.normal(jax.random.fold_in(KEY, k), shape, dtype) for k in (1, 2)
    )


def put(params, prefix):
    """The tree with these learned keys and values."""
    keys, values = prefix
    flat = slots(params)

    def one(path, x):
        if not isinstance(x, Prefix):
            return x
        layer = None if path.startswith("layers/") else int(path[len("layer_")])
        mine = lambda t: t if layer is None else t[layer]
        rows = lambda t: mine(t).reshape(*mine(t).shape[:-2], -1)
        return x.replace(
            keys=None if x.keys is None else rows(keys),
            values=None if x.values is None else rows(values),
        )

    return flat.rebuild(one(p, x) for p, x in flat.items())


def both(kind, style, mode, **options):
    """(ours, by hand): functions of (keys, values)."""
    module, params = A.model(kind, style, mode, **options)
    heads = A.HEADS if kind == "fused_heads" else None
    adapted = jpeft.prefix(LENGTH, heads=heads)(KEY, params)
    apply = lambda p, prefix=None: module.apply({"params": p}, A.IDS, A.PAD, prefix)
    ours = lambda prefix: jpeft.adapt(apply)(put(adapted, prefix))
    return ours, lambda prefix: apply(params, prefix)


def value_and_grads(f, prefix):
    """(logits, gradients) of one compiled program."""

    def loss(p):
        out = f(p)
        return jnp.sum(jnp.square(out) * A.PAD[..., None].astype(out.dtype)), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(prefix)
    return out, grads


def assert_same(got, want):
    np.testing.assert_allclose(got[0], want[0], atol=2e-5, rtol=1e-5)
    for g, w in zip(got[1], want[1], strict=True):
        np.testing.assert_allclose(g, w, atol=1e-5 * float(jnp.max(jnp.abs(w))))


SCANNED = {("jax", "half"), ("grouped", "rotate_half"), ("fused_flat", "rotate_half")}


@pytest.mark.parametrize(
    ("kind", "style", "mode"),
    [(*c, "") for c in CASES]
    + [
        pytest.param(*c, "scan remat", marks=() if c in SCANNED else pytest.mark.slow)
        for c in CASES
    ],
)
def test_equals_keys_and_values_put_before_the_real_ones(kind, style, mode):
    ours, hand = both(kind, style, mode)
    prefix = learned(kind)
    assert_same(value_and_grads(ours, prefix), value_and_grads(hand, prefix))
