"""`adapt` as users meet it: dropout keys, dtypes, eager calls, errors, inner jits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from flax import linen as nn
from jax import lax

import jpeft
from jpeft.leaf import is_leaf
from jpeft.tree.paths import slots

KEY = jax.random.key(0)
X = normal(1, 4, 7)


def active(params, scale=0.3):
    """The tree with B no longer zero."""
    trainable, frozen = jpeft.partition(params)
    bump = lambda x: x + scale * jax.random.normal(jax.random.key(4), x.shape, x.dtype)
    return jpeft.combine(jax.tree.map(bump, trainable), frozen)


# --- dropout
# -----------------------------------------------------------------------------


def stacked(n=3):
    return {"w": jax.random.normal(KEY, (n, 7, 7)) * 0.3}


def scanned(remat):
    step = lambda c, w: (jnp.tanh(c @ w), None)
    step = jax.checkpoint(step, prevent_cse=False) if remat else step
    return lambda p, x: lax.scan(step, x, p["w"])[0]


def dropping(rate=0.5):
    fn = scanned(False)
    t = jpeft.lora(rank=2, dropout=rate)
    return active(t(KEY, stacked(), uses=jpeft.find_uses(fn, stacked(), X)))


def test_without_a_key_nothing_is_dropped():
    params, fn = dropping(), scanned(False)
    np.testing.assert_allclose(
        jpeft.adapt(fn)(params, X), fn(jpeft.merge(params), X), rtol=1e-5, atol=1e-5
    )


def test_the_key_decides_the_masks():
    params, fn = dropping(), scanned(False)
    call = lambda k: jpeft.adapt(fn, key=jax.random.key(k))(params, X)
    np.testing.assert_array_equal(call(0), call(0))
    assert not np.allclose(call(0), call(1))
    assert not np.allclose(call(0), jpeft.adapt(fn)(params, X))


def test_rematerialisation_draws_the_same_masks():
    params = dropping()

    def grads(remat):
        apply = jpeft.adapt(scanned(remat), key=KEY)
        loss = lambda p: jnp.sum(apply(p, X) ** 2)
        return jax.jit(jpeft.value_and_grad(loss))(params)

    for a, b in zip(
        jax.tree.leaves(grads(False)), jax.tree.leaves(grads(True)), strict=True
    ):
        # Rounding; another mask would change the first digit.
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def masks_of(fn, params, x, key=KEY):
    """Which inputs reach A: found with A and B the identity and a base of zeros."""
    return np.asarray(jpeft.adapt(fn, key=key)(params, x)) != 0


def identity(n=7, rate=0.5, path="w"):
    t = jpeft.lora(rank=n, dropout=rate, where=".*")
    leaf = t(KEY, {path: jnp.zeros((n, n))})[path]
    return {path: leaf.replace(a=jnp.eye(n), b=jnp.eye(n))}


def test_the_rate_is_the_rate_and_what_stays_is_scaled():
    x = jnp.ones((400, 7))
    y = jpeft.adapt(lambda p, x: x @ p["w"], key=KEY)(identity(rate=0.25), x)
    assert abs(float(jnp.mean(y == 0)) - 0.25) < 0.03  # 2800 draws: sd 0.008
    np.testing.assert_allclose(jnp.unique(y), [0, 1 / 0.75], rtol=1e-6)


def test_two_uses_two_leaves_and_two_steps_draw_different_masks():
    x = jnp.ones((50, 7))
    twice = lambda p, x: jnp.concatenate([x @ p["w"], x @ p["w"]])
    a, b = np.split(masks_of(twice, identity(), x), 2)
    assert (a != b).any()
    fn = lambda p, x: x @ next(iter(p.values()))
    assert (
        masks_of(fn, identity(path="w"), x) != masks_of(fn, identity(path="v"), x)
    ).any()

    def loop(p, x):
        return lax.scan(lambda c, _: (c, x @ p["w"]), 0, None, length=2)[1]

    a, b = masks_of(loop, identity(), x)
    assert (a != b).any()

    def fori(p, x):
        put = lambda i, c: c.at[i].set(x @ p["w"])
        return lax.fori_loop(0, 2, put, jnp.zeros((2, 50, 7)))

    a, b = masks_of(fori, identity(), x)
    assert (a != b).any()


# --- dtypes
# ------------------------------------------------------------------------------


def test_bfloat16_equals_the_hand_written_twin_bit_for_bit():
    """Merged and unmerged differ by rounding in bfloat16; the twin is the reference."""
    w = jax.random.normal(KEY, (7, 5), jnp.bfloat16)
    params = active(jpeft.lora(rank=2, alpha=3)(KEY, {"kernel": w}))
    leaf = params["kernel"]
    assert leaf.a.dtype == leaf.b.dtype == jnp.float32
    x = X.astype(jnp.bfloat16)

    def twin(leaf):
        h = (x @ leaf.a.astype(jnp.bfloat16)) * jnp.bfloat16(1.5)
        return x @ w + h @ leaf.b.astype(jnp.bfloat16)

    apply = jpeft.adapt(lambda p, x: x @ p["kernel"])
    loss = lambda f: lambda leaf: jnp.sum(f(leaf).astype(jnp.float32) ** 2)
    got = jax.jit(jax.value_and_grad(loss(lambda w: apply({"kernel": w}, x))))(leaf)
    want = jax.jit(jax.value_and_grad(loss(twin)))(leaf)
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_array_equal(got[1].a, want[1].a)
    np.testing.assert_array_equal(got[1].b, want[1].b)


def test_merge_sums_in_float32_and_rounds_once():
    w = jax.random.normal(KEY, (7, 5), jnp.bfloat16)
    params = active(jpeft.lora(rank=2, alpha=3)(KEY, {"kernel": w}))
    leaf = params["kernel"]
    exact = np.asarray(w, np.float64) + 1.5 * (
        np.asarray(leaf.a, np.float64) @ np.asarray(leaf.b, np.float64)
    )
    merged = jpeft.merge(params, dtype=jnp.float32)["kernel"]
    np.testing.assert_allclose(merged, exact, rtol=1e-6, atol=1e-6)
    half = jpeft.merge(params)["kernel"]
    assert half.dtype == jnp.bfloat16
    np.testing.assert_array_equal(half, merged.astype(jnp.bfloat16))


def test_lora_equals_a_float64_formula():
    rng = np.random.default_rng(0)
    w, a, b, x = (rng.normal(size=s) for s in ((7, 5), (7, 3), (3, 5), (4, 7)))
    leaf = jpeft.lora(rank=3, alpha=6)(
        KEY, {"k": {"kernel": jnp.asarray(w, jnp.float32)}}
    )
    leaf = leaf["k"]["kernel"].replace(
        a=jnp.asarray(a, jnp.float32), b=jnp.asarray(b, jnp.float32)
    )
    got = jpeft.adapt(lambda w, x: x @ w)(leaf, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(got, x @ w + 2.0 * (x @ a) @ b, rtol=1e-5, atol=1e-5)


def test_gaussian_and_kaiming_have_their_variance():
    base = {
        "dense": {"kernel": jnp.ones((512, 256))},
        "e": {"embedding": jnp.ones((999, 64))},
    }
    for init, variance in (("gaussian", 1 / 512), ("kaiming", 1 / 3 / 512)):
        t = jpeft.lora(rank=64, init=init, where=["linear", "embedding"])
        out = t(KEY, base)
        assert float(jnp.var(out["dense"]["kernel"].a)) == pytest.approx(variance, 0.03)
        assert not jnp.any(out["dense"]["kernel"].b)
    assert float(jnp.var(out["e"]["embedding"].a)) == pytest.approx(1 / 3, 0.03)


# --- calls
# -------------------------------------------------------------------------------


def test_without_adapted_leaves_the_function_is_called_as_it_is():
    assert jpeft.adapt(lambda x, mode: (x, mode))(3, mode="a") == (3, "a")


def test_eager_calls_equal_jitted_ones():
    model = nn.Sequential([nn.Dense(5), nn.relu, nn.jit(nn.Dense)(3)])
    params = model.init(KEY, X)["params"]
    params = active(jpeft.lora(rank=2)(KEY, params))
    apply = jpeft.adapt(model.apply)
    np.testing.assert_allclose(
        apply({"params": params}, X),
        jax.jit(apply)({"params": params}, X),
        rtol=1e-6,
        atol=1e-6,
    )


def test_twelve_equal_layers_stay_one_inner_jit():
    layer = jax.jit(lambda x, w: jnp.tanh(x @ w))
    base = {f"layer_{k}": jax.random.normal(KEY, (7, 7)) for k in range(12)}

    def fn(p, x):
        for w in p.values():
            x = layer(x, w)
        return x

    params = jpeft.lora(rank=2, where="layer_.*")(KEY, base)
    program = jax.make_jaxpr(jpeft.adapt(fn))(params, X)
    inner = [e.params["jaxpr"] for e in program.eqns if "jaxpr" in e.params]
    assert len(inner) == 12 and len({id(j) for j in inner}) == 1


def test_name_stacks_are_kept_and_not_doubled():
    def fn(p, x):
        with jax.named_scope("outer"):
            return jnp.tanh(x) @ p["w"]["kernel"]

    params = jpeft.lora(rank=2)(KEY, {"w": {"kernel": jnp.ones((7, 5))}})
    text = jax.jit(jpeft.adapt(fn)).lower(params, X).as_text(debug_info=True)
    assert "outer" in text and "outer/outer" not in text


def test_a_weight_out_of_a_loop_is_refused():
    fn = lambda p, x: lax.scan(lambda c, w: (c, w.T), x, p["w"])[1]
    t = jpeft.lora(rank=2, where="w")
    use = jpeft.find_uses(scanned(False), stacked(), X)
    params = t(KEY, stacked(), uses=use)
    with pytest.raises(jpeft.DensifyError, match="w: LowRank .* `scan` .*leave a loop"):
        jpeft.adapt(fn)(params, X)


def test_allow_warns_with_the_places():
    params = jpeft.lora(rank=2, where="w")(KEY, {"w": jnp.ones((7, 7))})
    with pytest.warns(jpeft.DensifyWarning, match="w in `exp` at .*test_adapt.py"):
        jpeft.adapt(lambda p, x: x @ jnp.exp(p["w"]), materialize="allow")(params, X)


# --- find_uses
# ---------------------------------------------------------------------------


def test_uses_of_a_tied_and_a_plain_model():
    base = {
        "table": jnp.ones((11, 7)),
        "up": jnp.ones((7, 5)),
        "position": jnp.ones((4, 7)),
        "cls": jnp.ones((1, 7)),
        "gain": jnp.ones(7),
        "shift": jnp.ones(7),
        "spare": jnp.ones((3, 3)),
    }

    def fn(p, ids):
        x = p["table"][ids] + p["position"][: ids.shape[0]]
        x = jnp.concatenate([p["cls"], x]) * p["gain"][None] + p["shift"][None]
        return jnp.tanh(x @ p["up"]) @ p["up"].T @ p["table"].T

    uses = jpeft.find_uses(fn, base, jnp.arange(4))
    kinds = {p: u.kind for p, u in uses.items()}
    assert kinds == {
        "table": "embedding",
        "up": "linear",
        "position": "other",
        "cls": "other",
        "gain": "norm",
        "shift": "bias",
        "spare": "unused",
    }
    assert uses["table"].tied and uses["table"].axes == "io"
    assert uses["up"].tied


MASK = jnp.ones((7, 7))
LOUD = {
    "masked by an argument": lambda w, x: x @ (w * MASK),
    "masked by data": lambda w, x: x @ (w * x[0, 0]),
    "selected by data": lambda w, x: x @ jnp.where(x[:, :1].sum() > 0, w, 0.0),
    "a row written": lambda w, x: x @ w.at[0].set(x[0]),
    "a kronecker product": lambda w, x: x @ jnp.kron(w, jnp.eye(1)),
    "flattened and back": lambda w, x: x @ (w.reshape(-1) * 2).reshape(7, 7),
    "the output of a branch": lambda w, x: (
        x @ lax.cond(x[0, 0] > 0, lambda: w, lambda: -w)
    ),
    "the output of a map": lambda w, x: x @ lax.map(lambda r: r * 2, w),
    "turned in a carry": lambda w, x: lax.fori_loop(
        0, 3, lambda i, c: (c[0].T, jnp.tanh(c[1] @ c[0])), (w, x)
    )[1],
    "normalised": lambda w, x: x @ (w - jnp.mean(w, 0, keepdims=True)),
}


@pytest.mark.sample(6)
@pytest.mark.parametrize("name", LOUD)
def test_no_linear_weight_is_passed_over_in_silence(name):
    """It is adapted, and right, or refused by name."""
    fn = lambda p, x: LOUD[name](p["w"], x) @ p["head"]
    base = {"w": jax.random.normal(KEY, (7, 7)), "head": jnp.ones((7, 5))}
    uses = jpeft.find_uses(fn, base, X)
    try:
        params = jpeft.lora(rank=2)(KEY, base, uses=uses)
    except ValueError as error:
        assert str(error).startswith("w: lora cannot tell")
        return
    assert hasattr(params["w"], "a")
    try:
        got = jpeft.adapt(fn)(active(params), X)
    except jpeft.DensifyError as error:
        assert str(error).startswith("w: ")
        return
    want = fn(jpeft.merge(active(params)), X)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_a_layer_with_one_output_or_one_input_is_a_layer():
    """A reward head, an embedding of time: as by name, so by use."""

    class Reward(nn.Module):
        @nn.compact
        def __call__(self, x, time):
            x = jnp.tanh(nn.Dense(5)(x) + nn.Dense(5)(time))
            probe = self.param("probe", nn.initializers.ones, (1, 5))
            return nn.Dense(1)(x) + x @ probe.T

    args = X, jnp.ones((X.shape[0], 1))
    params = Reward().init(KEY, *args)["params"]
    fn = lambda p, *args: Reward().apply({"params": p}, *args)
    uses = jpeft.find_uses(fn, params, *args)
    kinds = {p: (u.kind, u.axes) for p, u in uses.items() if not p.endswith("bias")}
    heads = {f"Dense_{k}/kernel": ("linear", "io") for k in range(3)}
    assert kinds == {**heads, "probe": ("other", None)}
    with pytest.raises(ValueError, match=r"Dense_1/kernel: rank 2 .* matrix 1 x 5"):
        jpeft.lora(rank=2)(KEY, params, uses=uses)
    one = jpeft.lora(rank=2, rank_pattern={"Dense_[12].*": 1})
    adapted = active(one(KEY, params, uses=uses))
    assert [p for p, x in slots(adapted).items() if is_leaf(x)] == [*heads]
    got = jpeft.adapt(fn)(adapted, *args)
    np.testing.assert_allclose(got, fn(jpeft.merge(adapted), *args), rtol=1e-5)


def test_tokens_beside_the_text_are_no_weights():
    base = {"registers": jnp.ones((4, 7)), "w": jnp.ones((7, 5))}
    fn = lambda p, x: jnp.concatenate([p["registers"], x]) @ p["w"]
    assert jpeft.find_uses(fn, base, X)["registers"].kind == "other"


def test_find_uses_takes_shapes():
    shapes = jax.eval_shape(lambda: {"w": jnp.ones((7, 5))})
    x = jax.ShapeDtypeStruct((4, 7), jnp.float32)
    assert jpeft.find_uses(lambda p, x: x @ p["w"], shapes, x)["w"].axes == "io"


def test_a_function_of_the_weights_alone_has_its_data_around_it():
    """Rows that ids choose are activations, not a part of the table, whether the ids
    are an argument or not."""
    base = {
        "table": jnp.ones((9, 7)),
        "bias": jnp.ones(7),
        "w": jnp.ones((7, 5)),
        "out": jnp.ones((5, 9)),
    }

    def fn(p, ids):
        h = jnp.take(p["table"], ids, axis=0) + p["bias"][None, None]
        return jnp.tanh(h @ p["w"]) @ p["out"]

    ids = jnp.arange(6).reshape(2, 3)
    want = jpeft.find_uses(fn, base, ids)
    assert [want[k].kind for k in ("table", "bias", "w")] == [
        *("embedding", "bias", "linear")
    ]
    for own in (ids, np.asarray(ids)):
        for wrap in (lambda f: f, jax.jit, jax.checkpoint):
            got = jpeft.find_uses(wrap(lambda p: fn(p, own)), base)  # noqa: B023
            assert {k: (got[k].kind, got[k].axes) for k in base} == {
                k: (want[k].kind, want[k].axes) for k in base
            }
