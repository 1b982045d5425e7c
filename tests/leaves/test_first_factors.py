"""PiSSA and OLoRA: what A and B start as, and that the start is the base."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jpeft
from jpeft.adapt.interpreter import _RULES
from jpeft.leaves import first_factors
from jpeft.leaves.low_rank import ActsAsLowRank, LowRank
from jpeft.methods.lora import ShiftedLowRank
from jpeft.tree.layout import CONV, EMBEDDING, LINEAR, LeafUse

KEY = jax.random.key(5)
TAKEN = ["pissa", "pissa_niter_3", "olora"]
taken = pytest.mark.parametrize("init", TAKEN)


def random(*shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def used(shape, axes, kind=LINEAR):
    return {"w": LeafUse("w", shape, kind, axes)}


def attach(weight, axes="io", kind=LINEAR, **options):
    uses = used(weight.shape, axes, kind)
    return jpeft.lora(where="w", **options)(KEY, {"w": weight}, uses=uses)


@pytest.mark.parametrize(("init", "std"), [("gaussian", 0.1), ("kaiming", 0)])
def test_a_is_drawn_as_wide_as_its_inputs_ask_for(init, std):
    a = np.asarray(attach(jnp.ones((100, 60)), rank=50, init=init)["w"].a)
    # A uniform on +-1/10 has a third of the variance.
    np.testing.assert_allclose(a.std(), std or 0.1 / 3**0.5, rtol=0.03)
    assert std or np.abs(a).max() <= 0.1
    np.testing.assert_allclose(a.mean(), 0, atol=5e-3)


def moved(params, by=0.3):
    """A and B somewhere else than at the start."""
    leaf = params["w"]
    a = leaf.a + by * random(*leaf.a.shape, seed=1)
    b = leaf.b + by * random(*leaf.b.shape, seed=2)
    return {"w": leaf.replace(a=a, b=b)}


def as_matrices(weight, axes):
    """(stack, in, out) in numpy."""
    order = [k for g in "sio" for k, c in enumerate(axes) if c == g]
    n = [
        int(np.prod([m for m, c in zip(weight.shape, axes, strict=True) if c == g]))
        for g in "sio"
    ]
    return np.asarray(weight).transpose(order).reshape(n)


SHAPES = {
    "linear": ((7, 5), "io", LINEAR),
    "transposed": ((5, 7), "oi", LINEAR),
    "stack": ((3, 7, 5), "sio", LINEAR),
    "experts_of_layers": ((2, 3, 7, 5), "ssio", LINEAR),
    "stack_in_the_middle": ((7, 3, 5), "iso", LINEAR),
    "heads_out": ((7, 2, 3), "ioo", LINEAR),
    "heads_in": ((2, 3, 7), "iio", LINEAR),
    "convolution": ((3, 2, 5, 4), "iiio", CONV),
    "embedding": ((11, 5), "io", EMBEDDING),
}
shapes = pytest.mark.parametrize("name", SHAPES)


# --- the first values ----------------------------------------------------------------


@pytest.mark.sample(4)
@shapes
def test_pissa_starts_at_the_best_approximation_of_every_matrix(name):
    shape, axes, kind = SHAPES[name]
    weight = random(*shape)
    leaf = attach(weight, axes, kind, rank=2, alpha=3, init="pissa")["w"]
    matrices = as_matrices(weight, axes)
    u, s, vt = np.linalg.svd(matrices, full_matrices=False)
    best = (u[..., :2] * s[:, None, :2]) @ vt[:, :2]
    a = np.asarray(leaf.a).reshape(*matrices.shape[:2], 2)
    b = np.asarray(leaf.b).reshape(matrices.shape[0], 2, matrices.shape[2])
    np.testing.assert_allclose(leaf.scale * (a @ b), best, atol=1e-5)
    # The singular values are shared evenly, and the scale is divided out.
    norms = np.sqrt(s[:, :2] / leaf.scale)
    np.testing.assert_allclose(np.linalg.norm(a, axis=1), norms, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(b, axis=2), norms, rtol=1e-5)


@pytest.mark.sample(4)
@shapes
def test_olora_starts_at_the_first_columns_of_q_and_rows_of_r(name):
    shape, axes, kind = SHAPES[name]
    weight = random(*shape)
    leaf = attach(weight, axes, kind, rank=2, alpha=3, init="olora")["w"]
    matrices = as_matrices(weight, axes)
    a = np.asarray(leaf.a).reshape(*matrices.shape[:2], 2)
    b = np.asarray(leaf.b).reshape(matrices.shape[0], 2, matrices.shape[2])
    for k, matrix in enumerate(matrices):
        q, r = np.linalg.qr(matrix.T)  # as the paper, and HF's peft, write a weight
        np.testing.assert_allclose(b[k].T @ a[k].T, q[:, :2] @ r[:2], atol=1e-5)
        np.testing.assert_allclose(b[k] @ b[k].T, np.eye(2), atol=1e-5)


def test_the_randomised_method_finds_the_leading_vectors():
    u, _ = jnp.linalg.qr(random(40, 30))
    v, _ = jnp.linalg.qr(random(30, 30, seed=1))
    values = 0.8 ** jnp.arange(30, dtype=jnp.float32)
    w = (u * values[None]) @ v.T
    a, b = first_factors.principal_factors(w, 3, 1.0)
    error = lambda k: float(
        jnp.linalg.norm(
            jnp.matmul(*first_factors.principal_factors(w, 3, 1.0, key=KEY, niter=k))
            - a @ b
        )
        / jnp.linalg.norm(a @ b)
    )
    assert error(4) < 1e-5 < error(0)


@taken
def test_float64_weights_are_decomposed_in_float64(init):
    with jax.enable_x64(True):
        weight = random(7, 5, dtype=jnp.float64)
        leaf = attach(weight, rank=5, init=init)["w"]
        assert leaf.a.dtype == leaf.a0.dtype == jnp.float64
        whole = jnp.matmul(leaf.a, leaf.b, precision=lax.Precision.HIGHEST)
        np.testing.assert_allclose(whole, weight, atol=1e-12)


@taken
def test_all_ranks_together_are_the_whole_weight(init):
    weight = random(7, 5)
    leaf = attach(weight, rank=5, alpha=2, rank_stabilized=True, init=init)["w"]
    scale = leaf.scale if init == "olora" else 1.0  # OLoRA does not divide it out
    np.testing.assert_allclose(
        leaf.scale * leaf.a @ leaf.b, scale * weight, rtol=1e-4, atol=1e-5
    )


# --- the start is the base, and training is the papers' ------------------------------


@pytest.mark.sample(4)
@taken
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_start_is_the_base_bit_for_bit(init, dtype):
    weight, x = random(7, 5, dtype=dtype), random(4, 7, seed=3, dtype=dtype)
    params = attach(weight, rank=3, alpha=2, init=init)
    fn = lambda p, x: x @ p["w"]
    got = jax.jit(jpeft.adapt(fn))(params, x)
    np.testing.assert_array_equal(
        np.asarray(got, np.float32), np.asarray(jax.jit(fn)({"w": weight}, x), "f4")
    )
    merged = jpeft.merge(params)["w"]
    assert np.asarray(merged).tobytes() == np.asarray(weight).tobytes()


@pytest.mark.slow
@taken
def test_gradients_are_those_of_a_base_that_holds_the_residual(init):
    weight, x = random(7, 5), random(4, 7, seed=3)
    params = moved(attach(weight, rank=2, alpha=3, init=init))
    leaf = params["w"]
    fn = jpeft.adapt(lambda p, x: jnp.sum(jnp.sin(x @ p["w"])))
    _, got = jpeft.value_and_grad(fn)(params, x)
    with jax.default_matmul_precision("highest"):
        residual = weight - leaf.scale * leaf.a0 @ leaf.b0
        textbook = lambda a, b: jnp.sum(jnp.sin(x @ (residual + leaf.scale * a @ b)))
        of_a, of_b = jax.grad(textbook, (0, 1))(leaf.a, leaf.b)
    np.testing.assert_allclose(got["w"].a, of_a, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got["w"].b, of_b, rtol=1e-4, atol=1e-5)
    assert got["w"].a0 is None and got["w"].b0 is None


def test_a_small_change_survives_bfloat16():
    """A.B - A0.B0 of factors cast to bfloat16 is mostly rounding; what acts is not."""
    weight, x = random(70, 50), random(40, 70, seed=3)
    params = moved(attach(weight, rank=8, init="pissa"), by=1e-3)
    leaf = params["w"]
    exact = np.asarray(leaf.materialize()) - np.asarray(weight)
    low = {"w": leaf.replace(base=jnp.zeros((70, 50), jnp.bfloat16))}
    got = jpeft.adapt(lambda p, x: x @ p["w"])(low, x.astype(jnp.bfloat16))
    want = np.asarray(x.astype(jnp.bfloat16), np.float32) @ exact
    error = np.linalg.norm(np.asarray(got, np.float32) - want) / np.linalg.norm(want)
    # Three roundings to 8 bits: of the factors, of x.A and of the result.
    assert error < 3 * 2**-8
    cast = {"w": leaf.replace(base=jnp.zeros((70, 50)))}
    fn = jpeft.adapt(lambda p, x: x @ p["w"].astype(jnp.bfloat16))
    got = fn(cast, x.astype(jnp.bfloat16))
    error = np.linalg.norm(np.asarray(got, np.float32) - want) / np.linalg.norm(want)
    assert error < 3 * 2**-8


@taken
def test_training_with_donated_buffers_leaves_the_start_alone(init):
    make = jax.jit(lambda w: attach(w, rank=2, init=init))
    for params in (attach(random(7, 5), rank=2, init=init), make(random(7, 5))):
        trainable, frozen = jpeft.partition(params)
        start = np.asarray(frozen["w"].a0)
        fn = jpeft.adapt(lambda p, x: jnp.mean(jnp.square(x @ p["w"] - 1.0)))
        tx = optax.sgd(1e-2)

        def step(t, f, x, fn=fn, tx=tx):
            g = jax.grad(lambda t: fn(jpeft.combine(t, f), x))(t)
            return optax.apply_updates(t, tx.update(g, tx.init(t), t)[0])

        step = jax.jit(step, donate_argnums=0)
        losses = []
        for k in range(3):
            losses.append(float(fn(jpeft.combine(trainable, frozen), random(4, 7))))
            trainable = step(trainable, frozen, random(4, 7))
            assert k > 0 or not np.array_equal(trainable["w"].a, start)
        np.testing.assert_array_equal(frozen["w"].a0, start)
        assert losses[0] > losses[1] > losses[2]


def test_dropout_acts_on_the_change_only():
    weight, x = random(7, 5), random(4, 7, seed=3)
    params = attach(weight, rank=2, init="pissa", dropout=0.5)
    fn = lambda p, x: x @ p["w"]
    wet = jax.jit(jpeft.adapt(fn, key=KEY))
    np.testing.assert_array_equal(wet(params, x), jax.jit(fn)({"w": weight}, x))
    params = moved(params)
    assert not np.allclose(wet(params, x), jpeft.adapt(fn)(params, x), atol=1e-2)


# --- every way a model uses a weight -------------------------------------------------

GROUPS = jnp.array([2, 0, 4], jnp.int32)
CONV_DIMS = ("NHWC", "HWIO", "NHWC")


def _conv(w, x):
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=CONV_DIMS)


WAYS = {
    "product": ((7, 5), "io", lambda w, x: x @ w, (4, 7)),
    "transposed": ((5, 7), "oi", lambda w, x: x @ w.T, (4, 7)),
    "scaled": ((7, 5), "io", lambda w, x: x @ (w * 0.5), (4, 7)),
    "negated": ((7, 5), "io", lambda w, x: x @ -w, (4, 7)),
    "divided": (
        (7, 5),
        "io",
        lambda w, x: x @ (w / jnp.arange(1.0, 6.0)[None]),
        (4, 7),
    ),
    "heads": ((7, 2, 3), "ioo", lambda w, x: jnp.einsum("bi,ihd->bhd", x, w), (4, 7)),
    "reshaped": ((7, 2, 3), "ioo", lambda w, x: x @ w.reshape(7, 6), (4, 7)),
    "sliced": ((7, 5), "io", lambda w, x: x @ w[:, 1:4], (4, 7)),
    "split": (
        (7, 6),
        "io",
        lambda w, x: sum(x @ v for v in jnp.split(w, 2, 1)),
        (4, 7),
    ),
    "joined": ((7, 5), "io", lambda w, x: x @ jnp.concatenate([w, 2 * w], 1), (4, 7)),
    "stacked": (
        (7, 5),
        "io",
        lambda w, x: jnp.einsum("bi,nio->bno", x, jnp.stack([w, w * 2])),
        (4, 7),
    ),
    "experts": (
        (3, 7, 5),
        "sio",
        lambda w, x: jnp.einsum("ebi,eio->ebo", x, w),
        (3, 4, 7),
    ),
    "ragged": ((3, 7, 5), "sio", lambda w, x: lax.ragged_dot(x, w, GROUPS), (6, 7)),
    "looked_up": ((11, 5), "io", lambda w, x: w[jnp.argsort(x[0])], (1, 6)),
    "convolved": ((3, 2, 5, 4), "iiio", _conv, (2, 6, 6, 5)),
    "summed": (
        (7, 5),
        "io",
        lambda w, x: x[:, 0] @ w.sum(0)[:, None] @ x[:, :1].T,
        (5, 7),
    ),
    "scanned": (
        (3, 7, 7),
        "sio",
        lambda w, x: lax.scan(lambda h, v: (jnp.tanh(h @ v), None), x, w)[0],
        (4, 7),
    ),
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("way", WAYS)
def test_it_acts_as_its_value_wherever_a_model_uses_it(way):
    shape, axes, f, x_shape = WAYS[way]
    kind = CONV if way == "convolved" else EMBEDDING if way == "looked_up" else LINEAR
    params = moved(attach(random(*shape), axes, kind, rank=2, alpha=3, init="pissa"))
    x = random(*x_shape, seed=3)
    fn = lambda p, x: f(p["w"], x)
    got, want = jpeft.adapt(fn)(params, x), fn(jpeft.merge(params), x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    off = jpeft.adapt(fn)(jpeft.disable(params), x)
    base = fn({"w": params["w"].base}, x)
    np.testing.assert_allclose(off, base, rtol=1e-5, atol=1e-5)
    assert not np.allclose(got, base, atol=1e-2)


def test_whatever_has_a_rule_for_low_rank_has_one_for_the_shifted():
    of = lambda kind: {verb for verb, k in _RULES if k is kind}
    assert issubclass(ShiftedLowRank, ActsAsLowRank)
    known = tuple(of(ActsAsLowRank))
    assert all(issubclass(verb, known) for verb in of(LowRank))


# --- placement -----------------------------------------------------------------------


@pytest.mark.sample(2)
@taken
@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
@pytest.mark.parametrize("spec", [P("s", None, "m"), P(None, "m", None), P()])
def test_factors_of_a_sharded_stack_are_those_of_the_whole(init, axis_type, spec):
    kind = jax.sharding.AxisType[axis_type]
    mesh = jax.make_mesh((2, 4), ("s", "m"), axis_types=(kind, kind))
    weight = random(2, 8, 12)
    there = jax.device_put(weight, NamedSharding(mesh, spec))
    want = attach(weight, "sio", rank=2, init=init)["w"]
    got = attach(there, "sio", rank=2, init=init)["w"]
    s, i, o = (*spec, None, None, None)[:3]
    for n in ("a", "a0"):
        assert getattr(got, n).sharding.spec == P(s, i, None)
    for n in ("b", "b0"):
        assert getattr(got, n).sharding.spec == P(s, None, o)
    np.testing.assert_allclose(got.a0, want.a0, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got.b0, want.b0, rtol=1e-4, atol=1e-5)


# --- what is refused -----------------------------------------------------------------


@taken
def test_a_weight_that_is_no_plain_array_is_refused(init):
    params = jpeft.lora(rank=2)(KEY, {"a": {"kernel": random(7, 5)}})
    with pytest.raises(ValueError, match=r"a/kernel: init=.*a LowRank.*plain array"):
        jpeft.lora(rank=2, init=init)(KEY, params)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_3"])
def test_a_weight_of_zeros_is_refused_where_nothing_would_train(init):
    zeros = jnp.zeros((7, 5))
    with pytest.raises(ValueError, match=r"w: init='pissa.*is zero.*init='gaussian'"):
        attach(zeros, rank=2, init=init)
    some = jnp.stack([random(7, 5), zeros])
    with pytest.raises(ValueError, match="a matrix of its stack"):
        attach(some, "sio", rank=2, init=init)


def test_olora_trains_a_weight_of_zeros():
    leaf = attach(jnp.zeros((7, 5)), rank=2, init="olora")["w"]
    assert bool(jnp.any(leaf.b != 0))


@pytest.mark.parametrize("init", ["svd", "pissa_niter_", "pissa_niter_x", "PiSSA"])
def test_an_unknown_init_is_refused_with_the_known_ones(init):
    with pytest.raises(ValueError, match=r"expected one of .*pissa_niter_<n>.*olora"):
        jpeft.lora(rank=2, init=init)
