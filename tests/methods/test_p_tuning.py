"""P-tuning: a prompt that an encoder makes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from speed import slow_but
from text_forms import IDS, VOCAB, Lm, linen_text

import jpeft

KEY, V, D, N = jax.random.key(3), 11, 6, 5
E = normal(0, V, D)
ENCODERS = pytest.mark.parametrize("encoder", ["lstm", "mlp"])
QUICK_MLP = pytest.mark.parametrize("encoder", slow_but(["mlp"], ["lstm", "mlp"]))


def made(encoder="lstm", **kwargs):
    return jpeft.p_tuning(N, encoder=encoder, **kwargs)(KEY, {"embedding": E})


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def lstm_by_hand(x, w, r, b):
    h = c = np.zeros(r.shape[0])
    out = []
    for row in x:
        i, f, g, o = np.split(row @ w + h @ r + b, 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        out.append(h)
    return np.stack(out)


def encoded_by_hand(leaf):
    """In float64."""
    get = lambda n: np.asarray(getattr(leaf, n), np.float64)
    layer = lambda x, k: x @ get(f"w{k}") + get(f"b{k}")
    x = get("start")
    if hasattr(leaf, "w3"):
        return layer(np.maximum(layer(np.maximum(layer(x, 1), 0), 2), 0), 3)
    for k, name in enumerate(("first", "second")):
        w, r, b = get(name), get("recurrent")[k], get("gates")[k]
        ahead = lstm_by_hand(x, w[0], r[0], b[0])
        back = lstm_by_hand(x[::-1], w[1], r[1], b[1])[::-1]
        x = np.concatenate([ahead, back], 1)
    return layer(np.maximum(layer(x, 1), 0), 2)


@pytest.mark.sample(2)
@ENCODERS
@pytest.mark.parametrize("hidden", [None, 4])
def test_the_encoder_is_the_papers(encoder, hidden):
    leaf = made(encoder, hidden=hidden)["embedding"]
    np.testing.assert_allclose(
        leaf.encoded(), encoded_by_hand(leaf), rtol=1e-5, atol=1e-6
    )


def test_widths():
    shapes = lambda leaf: {
        n: getattr(leaf, n).shape for n in ("first", "second", "recurrent", "w1", "w2")
    }
    assert shapes(made()["embedding"]) == {
        "first": (2, 6, 12),
        "second": (2, 6, 12),
        "recurrent": (2, 2, 3, 12),
        "w1": (6, 6),
        "w2": (6, 6),
    }
    assert made("mlp", hidden=4)["embedding"].w1.shape == (6, 4)


@pytest.mark.sample(1)
@ENCODERS
def test_a_template_reads_the_encoded_rows_in_order(encoder):
    template = jpeft.virtual_template(2, [7], ..., [8, 9], 3, vocab_size=V)
    ids = template(jnp.array([[1, 2]])).ids
    params = made(encoder)
    got = jpeft.adapt(lambda p, i: p["embedding"][i])(params, ids)
    rows = params["embedding"].encoded()
    words = E[jnp.array([7, 1, 2, 8, 9])]
    want = jnp.concatenate([rows[:2], words, rows[2:]])
    # The rows are made by another program than here.
    np.testing.assert_allclose(got[0], want, rtol=1e-5, atol=1e-6)


@QUICK_MLP
def test_gradients_reach_the_whole_encoder(encoder):
    """Those of the encoder differentiated by itself."""
    params = made(encoder)
    ids = jnp.arange(V, V + N)[None]
    weights = jax.random.normal(KEY, (1, N, D))
    trainable, frozen = jpeft.partition(params)

    def ours(t):
        fn = jpeft.adapt(lambda p, i: p["embedding"][i])
        return jnp.sum(weights * fn(jpeft.combine(t, frozen), ids))

    def theirs(t):
        return jnp.sum(weights[0] * jpeft.combine(t, frozen)["embedding"].encoded())

    got, want = jax.grad(ours)(trainable), jax.grad(theirs)(trainable)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        assert jnp.any(b != 0)


@ENCODERS
def test_it_is_encoded_once_a_call(encoder):
    def twice(p, i):
        return p["embedding"][i] + p["embedding"][i + 1]

    count = lambda fn: str(jax.make_jaxpr(jpeft.adapt(fn))(made(encoder), i)).count(
        "tanh" if encoder == "lstm" else "dot_general"
    )
    i = jnp.array([[V]])
    assert count(twice) == count(lambda p, i: p["embedding"][i]) > 0


@pytest.mark.slow
@QUICK_MLP
def test_finalize_keeps_the_vectors_alone(encoder, tmp_path):
    transform = jpeft.chain(
        jpeft.p_tuning(N, encoder=encoder), jpeft.lora(rank=2, where=".*attention.*")
    )
    f = linen_text(Lm())
    uses = jpeft.find_uses(f.fn, f.params, IDS)
    params = transform(KEY, f.params, uses=uses)
    ids = jpeft.prepend_virtual_tokens(IDS, N, vocab_size=VOCAB).ids
    done = jpeft.finalize(params)
    leaf = done["token_embed"]["embedding"]
    assert sum(x.size for x in jax.tree.leaves(jpeft.partition(leaf)[0])) == N * D
    apply = jax.jit(jpeft.adapt(f.fn))
    want = apply(params, ids)
    np.testing.assert_allclose(apply(done, ids), want, rtol=1e-5, atol=1e-5)
    assert jax.tree.structure(jpeft.finalize(done)) == jax.tree.structure(done)
    jpeft.save(tmp_path / "a", done, transform)
    again = jpeft.load(tmp_path / "a", f.params)
    assert jax.tree.structure(again) == jax.tree.structure(done)
    np.testing.assert_array_equal(apply(again, ids), apply(done, ids))


def test_finalize_of_a_plain_tree_is_refused():
    with pytest.raises(ValueError, match="finalize: no leaf"):
        jpeft.finalize({"embedding": E})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jpeft.p_tuning(0), "length=0: expected an integer"),
        (lambda: jpeft.p_tuning(2, encoder="gru"), r"encoder='gru': expected one of"),
        (lambda: jpeft.p_tuning(2, hidden=0), "hidden=0: expected an integer"),
        (
            lambda: jpeft.prompt(2)(KEY, made()),
            "prompt adds 2 virtual tokens, and LstmPrompt",
        ),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
