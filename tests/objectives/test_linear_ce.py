"""Cross-entropy of hidden states and a head: that of the logits, for less."""

import functools

import float64
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import moved, normal
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jpeft
from jpeft.objectives import Weighted, linear_cross_entropy, next_token_loss
from jpeft.objectives.linear_ce import _How, _visits

FEATURES, VOCABULARY = 5, 13
HIDDEN = normal(0, 3, 6, FEATURES)
HEAD = normal(1, FEATURES, VOCABULARY)
BIAS = normal(2, VOCABULARY)
LABELS = np.random.default_rng(3).integers(0, VOCABULARY, (3, 6))
MASK = float64.ragged(3, 6, seed=4)  # 6, 6 and 5 or so: uneven
MASK[1, 3:] = False


def reference(h, w, b, tied=False, soft_cap=None, label_smoothing=0, z_loss=0, t=1):
    z = h @ (w.T if tied else w) + b
    z = z if soft_cap is None else soft_cap * np.tanh(z / soft_cap)
    z = z / t
    log_p = float64.log_softmax(z)
    nll = -np.take_along_axis(log_p, LABELS[..., None], -1)[..., 0]
    total = z[..., 0] - log_p[..., 0]
    loss = (1 - label_smoothing) * nll - label_smoothing * log_p.mean(-1)
    return np.sum(MASK * (loss + z_loss * total**2)) / MASK.sum()


CASES = {
    "one chunk": {},
    "chunks": {"chunk": 4},
    "all visited": {"chunk": 4, "skip": False},
    "shards": {"chunk": 4, "shards": 3},
    "tied, capped, warm": {"tied": True, "soft_cap": 2.0, "temperature": 0.7},
    "smoothed, z-loss": {"chunk": 7, "label_smoothing": 0.1, "z_loss": 0.01},
}


@pytest.mark.parametrize("case", CASES)
def test_the_loss_and_its_gradients(case):
    options = CASES[case]
    own = {k: v for k, v in options.items() if k not in ("chunk", "skip", "shards")}
    own["t"] = own.pop("temperature", 1)
    head = HEAD.T if options.get("tied") else HEAD

    def ours(h, w, b):
        return linear_cross_entropy(h, w, LABELS, MASK, bias=b, **options).mean()

    want = functools.partial(reference, **own)
    float64.assert_same(ours, want, HIDDEN, head, BIAS)


def plain(h, w, labels=LABELS, mask=MASK, **options):
    return next_token_loss(h @ w, labels, mask, **options).mean()


def ours(h, w, labels=LABELS, mask=MASK, **options):
    options = {"chunk": 4, **options}
    return linear_cross_entropy(h, w, labels, mask, **options).mean()


def test_it_is_the_plain_loss_to_one_part_in_a_million():
    hidden, head = normal(8, 96, 32), normal(9, 32, 1201)
    labels, mask = np.arange(96) * 11 % 1201, np.arange(96) % 2 == 0
    both = jax.jit(
        lambda h, w: [
            jax.value_and_grad(f, argnums=(0, 1))(h, w, labels, mask)
            for f in (plain, functools.partial(ours, chunk=16))
        ]
    )
    want, got = map(jax.tree.leaves, both(hidden, head))
    for x, y in zip(got, want, strict=True):
        x, y = np.float64(x), np.float64(y)
        assert np.linalg.norm(x - y) < 1e-6 * np.linalg.norm(y)


def test_dft_is_that_of_the_logits():
    both = jax.jit(
        lambda: [jax.value_and_grad(f)(HIDDEN, HEAD, kind="dft") for f in (ours, plain)]
    )
    (value, grad), (want, want_grad) = both()
    np.testing.assert_allclose(value, want, rtol=1e-6)
    np.testing.assert_allclose(grad, want_grad, rtol=1e-5, atol=1e-7)


def products(f, *args):
    """How many matrix products the program of `f` holds, loops' bodies counted once."""
    return str(jax.make_jaxpr(f)(*args)).count("dot_general[")


def test_a_frozen_head_gets_no_gradient_and_none_is_computed():
    assert products(ours, HIDDEN, HEAD) == 1
    assert products(jax.grad(ours, argnums=0), HIDDEN, HEAD) == 2
    assert products(jax.grad(ours, argnums=1), HIDDEN, HEAD) == 2
    assert products(jax.grad(ours, argnums=(0, 1)), HIDDEN, HEAD) == 3
    inside = lambda h, w: jax.jit(ours)(h, w)
    assert products(jax.grad(inside, argnums=0), HIDDEN, HEAD) == 2
    stopped = lambda h, w: ours(h, jax.lax.stop_gradient(w))
    assert products(jax.grad(stopped, argnums=(0, 1)), HIDDEN, HEAD) == 2


def test_a_second_derivative_is_right_or_refused():
    def twice(f):
        squared = lambda h: jnp.sum(jnp.square(jax.grad(f)(h, HEAD)))
        return jax.jit(jax.grad(squared))

    got = twice(functools.partial(ours, skip=False))(HIDDEN)
    np.testing.assert_allclose(got, twice(plain)(HIDDEN), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
        twice(ours)(HIDDEN)


def test_only_tokens_that_count_are_visited():
    how = _How(None, False, 4, True, None, None)
    mask = jnp.array([[0, 1, 0, 1, 1, 0, 0, 1, 1, 0], [0] * 10])
    run = jax.jit(functools.partial(_visits, how, steps=3))
    visits, steps = run(mask)
    assert steps == 2  # five tokens by four
    assert visits[0].tolist() == [1, 3, 4, 7, 8] + [10] * 7
    assert run(jnp.zeros_like(mask))[1] == 0
    assert run(jnp.ones_like(mask))[1] == 3


def adapted_head(method):
    quantize = jpeft.quantize("int8", compute_dtype="float32", where="all")
    lora = jpeft.lora(2, where="all")
    transform = lora if method == "lora" else jpeft.chain(quantize, lora)
    tree = {"head": {"kernel": normal(5, 64, 9)}}
    params = transform(jax.random.key(0), tree)
    return moved(params)["head"]["kernel"]


@pytest.mark.parametrize("method", ["lora", "lora over int8"])
def test_an_adapted_head(method):
    head = adapted_head(method)
    trainable, frozen = jpeft.partition(head)
    hidden, labels = normal(6, 3, 6, 64), LABELS % 9

    def by_logits(t, h):
        logits = jpeft.adapt(lambda w, h: h @ w)(jpeft.combine(t, frozen), h)
        return next_token_loss(logits, labels, MASK).mean()

    def by_chunks(t, h):
        return ours(h, jpeft.combine(t, frozen), labels)

    grad = lambda f: jax.jit(jax.value_and_grad(f, argnums=(0, 1)))
    want, got = grad(by_logits)(trainable, hidden), grad(by_chunks)(trainable, hidden)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, got, want)
    assert np.abs(got[1][0].b).max() > 1e-3


def test_inside_of_adapt_a_leaf_is_refused_and_told_to_stay_outside():
    head = adapted_head("lora")
    inside = jpeft.adapt(lambda w, h: ours(h, w, LABELS % 9))
    with pytest.raises(
        jpeft.DensifyError, match="linear_cross_entropy, is called outside of"
    ):
        inside(head, normal(6, 3, 6, 64))


def test_bfloat16_hidden_states_and_a_float32_head():
    h, w = HIDDEN.astype(jnp.bfloat16), HEAD
    value, (dh, dw) = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)))(h, w)
    assert value.dtype == jnp.float32
    assert dh.dtype == jnp.bfloat16 and dw.dtype == jnp.float32
    # The head is rounded to the dtype of the hidden states; what follows is float32.
    rounded = w.astype(jnp.bfloat16).astype(jnp.float32)
    want = jax.jit(jax.value_and_grad(plain, argnums=(0, 1)))
    want, (want_dh, want_dw) = want(h.astype(jnp.float32), rounded)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    # Rounded to eight bits: the logits' gradient, each chunk's, and the result.
    np.testing.assert_allclose(dh.astype(jnp.float32), want_dh, rtol=3e-2, atol=1e-3)
    np.testing.assert_allclose(dw, want_dw, rtol=3e-2, atol=1e-3)


def test_no_tokens_at_all():
    none = np.zeros(0, np.int32)
    loss = jax.jit(ours)(np.ones((0, FEATURES), np.float32), HEAD, none, none)
    assert loss == 0


def test_masked_tokens_may_be_nan_and_all_may_be_masked():
    mask = MASK
    hidden = np.where(mask[..., None], HIDDEN, np.float32(np.nan))
    labels = np.where(mask, LABELS, -100)
    for skip in (True, False):
        f = jax.jit(jax.value_and_grad(functools.partial(ours, skip=skip), (0, 1)))
        got, want = f(hidden, HEAD, labels, mask), f(HIDDEN, HEAD, labels, mask)
        jax.tree.map(np.testing.assert_array_equal, got, want)
        value, grads = f(hidden, HEAD, labels, np.zeros_like(mask))
        assert value == 0 and all(np.all(np.asarray(g) == 0) for g in grads)


def mesh_of(n, name, kind=AxisType.Auto):
    return jax.make_mesh((n,), (name,), (kind,), devices=jax.devices()[:n])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_a_head_cut_along_the_vocabulary_gathers_no_logits(kind):
    head = normal(7, FEATURES, 32)
    mesh = mesh_of(8, "vocabulary", kind)
    cut = jax.device_put(head, NamedSharding(mesh, P(None, "vocabulary")))
    h = jax.device_put(HIDDEN, NamedSharding(mesh, P()))
    f = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)))
    program = f.lower(h, cut).compile()
    assert "all-gather" not in program.as_text()
    value, (dh, dw) = program(h, cut)
    want, (want_dh, want_dw) = f(HIDDEN, head)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    np.testing.assert_allclose(dh, want_dh, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(dw, want_dw, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_tokens_cut_over_devices_stay_where_they_are(kind):
    mesh = mesh_of(3, "data", kind)
    place = lambda x: jax.device_put(x, NamedSharding(mesh, P("data")))
    f = jax.jit(jax.value_and_grad(functools.partial(ours, shards=3)))
    head = jax.device_put(HEAD, NamedSharding(mesh, P()))
    args = place(HIDDEN), head, place(jnp.asarray(LABELS)), place(jnp.asarray(MASK))
    program = f.lower(*args).compile()
    text = program.as_text()
    assert "all-gather" not in text and "all-to-all" not in text
    assert "collective-permute" not in text
    value, grad = program(*args)
    want, want_grad = jax.jit(jax.value_and_grad(plain))(HIDDEN, HEAD)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    np.testing.assert_allclose(grad, want_grad, rtol=1e-5, atol=1e-7)


def test_inside_shard_map():
    def local(h, w, labels, mask):
        return linear_cross_entropy(h, w, labels, mask, chunk=4).psum("data").mean()

    data = P("data")
    sharded = jax.shard_map(
        local, mesh=mesh_of(3, "data"), in_specs=(data, P(), data, data), out_specs=P()
    )
    args = HIDDEN, HEAD, jnp.asarray(LABELS), jnp.asarray(MASK)
    got = jax.jit(jax.value_and_grad(sharded, argnums=(0, 1)))(*args)
    want = jax.jit(jax.value_and_grad(plain, argnums=(0, 1)))(HIDDEN, HEAD)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, got, want)


def test_the_cost_at_a_large_vocabulary():
    """XLA counts a loop's body once, so its FLOPs are those of one chunk alone, times
    the steps, and what the whole program has besides."""
    tokens, features, vocabulary, chunk = 8192, 64, 128_256, 512
    shape = jax.ShapeDtypeStruct

    def cost(f, tokens):
        program = (
            jax.jit(jax.value_and_grad(f))
            .lower(
                shape((tokens, features), jnp.float32),
                shape((features, vocabulary), jnp.float32),
                shape((tokens,), jnp.int32),
                shape((tokens,), jnp.bool_),
            )
            .compile()
        )
        flops = program.cost_analysis()["flops"]
        return flops, program.memory_analysis().temp_size_in_bytes

    chunked = functools.partial(ours, chunk=chunk)
    plain_flops, plain_bytes = cost(plain, tokens)
    once, temporary = cost(chunked, tokens)
    body, _ = cost(chunked, chunk)
    flops = lambda counted: once - body + body * counted / chunk
    assert temporary <= 0.07 * plain_bytes  # 0.045 when written
    assert flops(tokens / 2) <= 0.6 * plain_flops  # 0.49
    assert 0.9 * plain_flops < flops(tokens) <= 1.005 * plain_flops  # 0.98


def test_messages():
    with pytest.raises(ValueError, match=r"\(13, 5\): expected \(features, .*; for"):
        ours(HIDDEN, HEAD.T)
    with pytest.raises(ValueError, match="for this one tied=False"):
        ours(HIDDEN, HEAD, tied=True)
    with pytest.raises(ValueError, match=r"labels has shape \(3, 5\): expected \(3, 6"):
        ours(HIDDEN, HEAD, LABELS[:, :5])
    with pytest.raises(ValueError, match="mask has shape"):
        ours(HIDDEN, HEAD, mask=MASK[:2])
    with pytest.raises(ValueError, match=r"bias has shape \(5,\): expected \(13,\)"):
        ours(HIDDEN, HEAD, bias=jnp.ones(5))
    with pytest.raises(ValueError, match="hidden is int32"):
        ours(LABELS, HEAD)
    with pytest.raises(ValueError, match="shards=2: expected a divisor"):
        ours(HIDDEN, HEAD, shards=2)
    with pytest.raises(ValueError, match="chunk=0: expected an integer of at least 1"):
        ours(HIDDEN, HEAD, chunk=0)


def test_the_count_is_that_of_the_weights():
    weights = np.float32(0.5 * MASK)
    got = jax.jit(linear_cross_entropy)(HIDDEN, HEAD, LABELS, weights)
    assert isinstance(got, Weighted) and got.count == 0.5 * MASK.sum()
    logits = np.asarray(HIDDEN) @ np.asarray(HEAD)
    want = jax.jit(next_token_loss)(logits, LABELS, weights)
    np.testing.assert_allclose(got.total, want.total, rtol=1e-6)
