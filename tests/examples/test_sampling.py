"""How tokens are drawn, and the loop that writes them."""

import _sampling
import jax
import jax.numpy as jnp
import llm
import numpy as np
import pytest
from _sampling import GREEDY, Sampling

LOGITS = jnp.log(jnp.array([[0.4, 0.3, 0.2, 0.07, 0.03]]))


@pytest.mark.parametrize(
    ("how", "kept"),
    [
        ({}, 5),
        ({"top_k": 2}, 2),
        ({"top_k": 9}, 5),
        ({"top_p": 0.69}, 2),  # 0.4 + 0.3 reach it
        ({"top_p": 0.71}, 3),
        ({"top_p": 0.1}, 1),
        ({"min_p": 0.4}, 3),
        ({"min_p": 0.4, "top_k": 2}, 2),
        ({"temperature": 2.0, "min_p": 0.4}, 4),  # 0.07 / 0.4 is 0.42 squared
    ],
)
def test_what_may_be_drawn(how, kept):
    z = _sampling.restrict(LOGITS, Sampling(**how))
    assert np.isfinite(z)[0].tolist() == [k < kept for k in range(5)]


def test_draws_follow_the_distribution():
    """20,000 draws: five standard deviations of a share of 0.4 are 0.017."""
    rows = jnp.broadcast_to(LOGITS, (20_000, 5))
    how = Sampling(temperature=0.5, top_k=3)
    found = np.asarray(_sampling.draw(jax.random.key(0), rows, how))
    p = np.array([0.4, 0.3, 0.2]) ** 2
    shares = np.bincount(found, minlength=5) / len(found)
    np.testing.assert_allclose(shares, [*(p / p.sum()), 0, 0], rtol=0, atol=0.018)
    assert (_sampling.draw(jax.random.key(0), rows, GREEDY) == 0).all()


@pytest.mark.parametrize(
    "how",
    [
        {"temperature": -1.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": 1.0},
    ],
)
def test_settings_that_mean_nothing_are_refused(how):
    with pytest.raises(ValueError, match=f"{next(iter(how))} must"):
        Sampling(**how)


# --- the loop ------------------------------------------------------------------------

CONFIG = llm.Config(
    vocab=37,
    width=16,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=4,
    hidden=20,
    context=64,
)
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [3]]
BUCKET = 8


@pytest.fixture(scope="module")
def model():
    shapes = llm.shapes(llm.Decoder(CONFIG))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: rng.normal(0, 0.5, s.shape).astype(s.dtype), shapes)
    apply = jax.jit(llm.Decoder(CONFIG).apply, static_argnames="logits_from")
    return params, apply


def uncached(model, prompt, count):
    """The likeliest tokens, each by a forward pass of its own over the whole text.

    Padded to one length, so that one program is compiled.
    """
    params, apply = model
    text = list(prompt)
    for _ in range(count):
        ids = np.zeros((1, 16), np.int32)
        ids[0, : len(text)] = text
        mask = np.arange(16)[None] < len(text)
        logits = apply({"params": params}, ids, mask).logits
        text.append(int(np.argmax(logits[0, len(text) - 1])))
    return text[len(prompt) :]


def padded():
    ids = np.full((3, 5), 36, np.int32)
    mask = np.zeros(ids.shape, bool)
    for k, p in enumerate(PROMPTS):
        ids[k, 5 - len(p) :], mask[k, 5 - len(p) :] = p, True
    return ids, mask


def writer(stop=(), how=GREEDY):
    apply = llm.Decoder(CONFIG).apply
    return _sampling.Compiled.of(
        _sampling.Writer(apply, CONFIG, stop, pad=36, bucket=BUCKET, how=how)
    )


def test_greedy_tokens_are_those_without_a_cache_and_stop_at_the_stop(model):
    params, _ = model
    expected = [uncached(model, p, BUCKET) for p in PROMPTS]
    stop = expected[1][2]
    w = writer((stop,))
    state = w.begin(params, *padded(), jax.random.key(0))
    state = w.go_on(params, state, BUCKET)
    for row, e in enumerate(expected):
        n = e.index(stop) + 1 if stop in e else BUCKET
        assert state.tokens[row, :n].tolist() == e[:n]
        assert (state.tokens[row, n:] == 36).all()
        assert int(state.lengths[row]) == n
        assert bool(state.done[row]) == (stop in e)
        assert state.mask[row].tolist() == [k < n for k in range(BUCKET)]


def test_the_loop_compiles_once_whatever_the_length(model):
    params, _ = model
    w = writer((99,), Sampling(temperature=1.0))
    start = lambda: w.begin(params, *padded(), jax.random.key(3))
    whole = w.go_on(params, start(), BUCKET)
    parts = start()
    for until in (1, 2, 5, BUCKET, BUCKET + 3):
        parts = w.go_on(params, parts, until)
    assert w.go_on._cache_size() == 1
    assert parts.tokens.tolist() == whole.tokens.tolist()
    other = w.go_on(params, w.begin(params, *padded(), jax.random.key(4)), BUCKET)
    assert other.tokens.tolist() != whole.tokens.tolist()
