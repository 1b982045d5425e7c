"""Gates, MAM and UniPELT against the same written into the model by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import noisy, normal
from speed import slow_but

import jpeft
from jpeft.leaf import is_leaf
from jpeft.tree.paths import slots

D, F, HEADS, LAYERS, P = 8, 12, 2, 2, 3
KEY = jax.random.key(0)
X = normal(4, 3, 5, D)


def weights():
    shapes = {n: (D, D) for n in ("query", "key", "value", "out")}
    attn = {n: {"kernel": s, "bias": s[1:]} for n, s in shapes.items()}
    mlp = {"fc1": {"kernel": (D, F)}, "fc2": {"kernel": (F, D), "bias": (D,)}}
    tree = {"attn": attn, "mlp": mlp}
    is_shape = lambda x: isinstance(x, tuple)
    zeros = lambda s: jnp.zeros((LAYERS, *s))
    return noisy(jax.tree.map(zeros, tree, is_leaf=is_shape), 0.3)


# --- the layer, with everything by hand ----------------------------------------------


def dense(p, x):
    y = x @ p["kernel"]
    return y + p["bias"][None, None] if "bias" in p else y


def gate(a, x):
    g = jax.nn.sigmoid(x @ a["gate"] + a["gate_bias"])
    return g.mean(1)[:, None, None]


def low_rank(p, a, x, scale):
    y = dense(p, x)
    return y if a is None else y + scale * gate(a, x) * (x @ a["a"] @ a["b"])


def bottleneck(a, h, scale):
    wide = lambda b: b[None, None]
    y = jax.nn.relu(h @ a["down"] + wide(a["down_bias"])) @ a["up"]
    y = scale * (y + wide(a["up_bias"]))
    return gate(a, h) * y if "gate" in a else y


def layer(p, x, hand=None):
    """hand: lora, prefix, adapter or parallel, whichever there are."""
    a = hand or {}
    attn, of = p["attn"], a.get("lora", {})
    q = low_rank(attn["query"], of.get("query"), x, 2.0)
    k = dense(attn["key"], x)
    v = low_rank(attn["value"], of.get("value"), x, 2.0)
    n = x.shape[1]
    if "prefix" in a:
        g = gate(a["prefix"], x) if "gate" in a["prefix"] else jnp.ones((len(x), 1, 1))
        k, v = (
            jnp.concatenate([g * a["prefix"][r][None], y], 1)
            for r, y in (("keys", k), ("values", v))
        )
        n += P
    split = lambda y: y.reshape(*y.shape[:2], HEADS, D // HEADS)
    q, k, v = split(q), split(k), split(v)
    w = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / (D / HEADS) ** 0.5)
    y = jnp.einsum("bhqk,bkhd->bqhd", w, v).reshape(x.shape)
    x = x + dense(attn["out"], y)
    y = dense(p["mlp"]["fc2"], jax.nn.gelu(dense(p["mlp"]["fc1"], x)))
    if "parallel" in a:
        y = y + bottleneck(a["parallel"], x, 4.0)
    if "adapter" in a:
        y = y + bottleneck(a["adapter"], y, 1.0)
    return x + y


def model(params, x, hand=None):
    step = jax.checkpoint(lambda x, row: (layer(row[0], x, row[1]), None))
    return jax.lax.scan(step, x, (params, hand))[0]


def apply(params, x):
    return model(params, x)


FIELDS = {
    "GatedLowRank": ("a", "b", "gate", "gate_bias"),
    "Prefix": ("keys", "values"),
    "GatedPrefix": ("keys", "values", "gate", "gate_bias"),
    "Bottleneck": ("down", "down_bias", "up", "up_bias", "gate", "gate_bias"),
    "BranchStart": ("down", "down_bias"),
    "BranchEnd": ("up", "up_bias"),
}
PLACE = {
    "Prefix": "prefix",
    "GatedPrefix": "prefix",
    "Bottleneck": "adapter",
    "BranchStart": "parallel",
    "BranchEnd": "parallel",
}


def handed(params):
    out = {}
    for path, x in slots(params).items():
        while is_leaf(x):
            kind = type(x).__name__
            arrays = {
                n: getattr(x, n) for n in FIELDS[kind] if getattr(x, n) is not None
            }
            if kind == "GatedLowRank":
                out.setdefault("lora", {})[path.split("/")[-2]] = arrays
            else:
                out.setdefault(PLACE[kind], {}).update(arrays)
            x = x.base
    return out


TRANSFORMS = {
    "gated lora": lambda: jpeft.gated(
        jpeft.lora(rank=2, alpha=4, where=".*/(query|value)/kernel")
    ),
    "gated prefix": lambda: jpeft.gated(jpeft.prefix(P)),
    "gated adapter": lambda: jpeft.gated(jpeft.adapter(3, placement="pfeiffer")),
    "mam": lambda: jpeft.mam(P, bottleneck=3),
    "unipelt": lambda: jpeft.unipelt(rank=2, alpha=4, prefix_length=P, bottleneck=3),
    "unipelt ap": lambda: jpeft.unipelt(rank=0, prefix_length=P, bottleneck=3),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_but(["unipelt"], TRANSFORMS))
def test_values_and_gradients_are_those_by_hand(name):
    params = weights()
    uses = jpeft.find_uses(apply, params, X)
    adapted = TRANSFORMS[name]()(KEY, params, uses=uses)
    trainable, frozen = jpeft.partition(adapted)
    trainable = noisy(trainable, 0.3)
    square = lambda y: jnp.mean(jnp.square(y))
    run = jpeft.adapt(apply)
    ours = lambda t: square(run(jpeft.combine(t, frozen), X))
    hand = lambda t: square(model(params, X, handed(jpeft.combine(t, frozen))))
    a, ga = jax.jit(jax.value_and_grad(hand))(trainable)
    b, gb = jax.jit(jax.value_and_grad(ours))(trainable)
    assert abs(float(a - square(apply(params, X)))) > 1e-3
    assert float(b) == pytest.approx(float(a), rel=2e-6)
    largest = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(ga))
    for x, y in zip(jax.tree.leaves(ga), jax.tree.leaves(gb), strict=True):
        # A bias on all keys moves no attention, so some gradients are zero.
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-6 * largest)


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_but(["unipelt"], TRANSFORMS))
def test_disabled_it_acts_as_the_base_and_all_of_it_trains(name):
    params = weights()
    uses = jpeft.find_uses(apply, params, X)
    adapted = TRANSFORMS[name]()(KEY, params, uses=uses)
    trainable, frozen = jpeft.partition(adapted)
    run = jpeft.adapt(apply)
    whole = jpeft.combine(noisy(trainable, 0.3), frozen)
    off = jax.jit(run)(jpeft.disable(whole), X)
    np.testing.assert_allclose(off, apply(params, X), rtol=1e-5, atol=1e-5)
    # Wide of zero for what passes a softmax or a rectifier.
    loss = lambda t: jnp.mean(jnp.square(run(jpeft.combine(t, frozen), X) - 1.0))
    gradients = jax.jit(jax.grad(loss))(noisy(trainable, 0.3))
    for path, g in jax.tree_util.tree_leaves_with_path(gradients):
        assert float(jnp.max(jnp.abs(g))) > 0.0, jax.tree_util.keystr(path)


def test_a_gate_does_not_mix_examples_and_needs_none():
    params = weights()
    uses = jpeft.find_uses(apply, params, X)
    adapted = TRANSFORMS["unipelt"]()(KEY, params, uses=uses)
    trainable, frozen = jpeft.partition(adapted)
    adapted = jpeft.combine(noisy(trainable, 0.3), frozen)
    run = jpeft.adapt(apply)
    every = jax.jit(run)(adapted, X)
    np.testing.assert_allclose(every[1:2], run(adapted, X[1:2]), rtol=1e-5, atol=1e-5)


def test_in_the_popular_implementation_the_gate_takes_the_place_of_the_scale():
    params = weights()
    one = jpeft.lora(rank=2, alpha=6, where=".*/query/kernel")
    for replace, scale in ((False, 3.0), (True, 1.0)):
        leaf = jpeft.gated(one, replace_scale=replace)(
            KEY, params, uses=jpeft.find_uses(apply, params, X)
        )["attn"]["query"]["kernel"]
        assert leaf.scale == scale


def test_recipes_are_their_parts_in_a_row():
    params = weights()
    uses = jpeft.find_uses(apply, params, X)
    parts = jpeft.chain(
        jpeft.prefix(P), jpeft.adapter(3, placement="parallel", scale=4.0)
    )
    got, want = (t(KEY, params, uses=uses) for t in (jpeft.mam(P, 3), parts))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", slow_but(["unipelt"], TRANSFORMS))
def test_saved_loaded_and_configured(name, tmp_path):
    params, transform = weights(), TRANSFORMS[name]()
    adapted = transform(KEY, params, uses=jpeft.find_uses(apply, params, X))
    again = jpeft.from_config(transform.to_config())
    assert again == transform and hash(again) == hash(transform)
    (tmp_path / "recipe.toml").write_text(jpeft.config.to_toml(transform))
    assert jpeft.from_config(tmp_path / "recipe.toml") == transform
    jpeft.save(tmp_path / "a", adapted, transform)
    loaded = jpeft.load(tmp_path / "a", params)
    assert jax.tree.structure(loaded) == jax.tree.structure(adapted)
    for x, y in zip(jax.tree.leaves(loaded), jax.tree.leaves(adapted), strict=True):
        np.testing.assert_array_equal(x, y)
    base = jpeft.unload(adapted)
    assert jax.tree.structure(base) == jax.tree.structure(params)
    with pytest.raises(TypeError, match="no merged value"):
        jpeft.merge(adapted)


@pytest.mark.parametrize("name", slow_but(["unipelt"], TRANSFORMS))
def test_applying_twice_is_refused(name):
    params, transform = weights(), TRANSFORMS[name]()
    uses = jpeft.find_uses(apply, params, X)
    adapted = transform(KEY, params, uses=uses)
    with pytest.raises(ValueError, match="already"):
        transform(KEY, adapted, uses=uses)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jpeft.gated(jpeft.bitfit()), "expected jpeft.lora"),
        (lambda: jpeft.gated(jpeft.lora(2, init="pissa")), "use init='gaussian'"),
        (
            lambda: jpeft.gated(jpeft.prefix(2, reparametrization="mlp")),
            "cannot be gated",
        ),
        (
            lambda: jpeft.gated(jpeft.adapter(2), replace_scale=True),
            "is for jpeft.lora",
        ),
        (lambda: jpeft.mam(0), "length=0"),
        (lambda: jpeft.unipelt(bottleneck=0), "bottleneck=0"),
    ],
)
def test_a_wrong_argument_is_one_clear_sentence(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()
