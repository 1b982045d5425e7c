"""Log-probabilities and the supervised loss, against NumPy's float64."""

import functools

import float64
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from draws import normal

from jpeft.objectives import entropy, log_probs, next_token_loss, shift_labels

LOGITS = 3 * normal(0, 3, 5, 11)
LABELS = np.random.default_rng(1).integers(0, 11, (3, 5))
LOG_PROBS = jax.jit(log_probs)
MASK = float64.ragged(3, 5, seed=2)


def reference(
    z, labels=LABELS, w=MASK, kind="nll", label_smoothing=0, z_loss=0, temperature=1
):
    z = z / temperature
    log_p = float64.log_softmax(z)
    nll = -np.take_along_axis(log_p, labels[..., None], -1)[..., 0]
    total = z[..., 0] - log_p[..., 0]
    loss = (1 - label_smoothing) * nll - label_smoothing * log_p.mean(-1)
    if kind == "dft":  # its gradient is that of -p
        loss = np.exp(-nll) * nll
    return np.sum(w * (loss + z_loss * total**2)) / w.sum()


@pytest.mark.parametrize(
    "options",
    [{}, {"label_smoothing": 0.1, "z_loss": 0.01}, {"temperature": 0.7}],
    ids=str,
)
def test_the_loss_and_its_gradient(options):
    ours = lambda z: next_token_loss(z, LABELS, MASK, **options).mean()
    float64.assert_same(ours, functools.partial(reference, **options), LOGITS)


def test_dft_has_the_gradient_of_minus_p():
    ours = jax.jit(
        jax.value_and_grad(
            lambda z: next_token_loss(z, LABELS, MASK, kind="dft").mean()
        )
    )
    value, grad = ours(LOGITS)
    np.testing.assert_allclose(
        value, reference(np.float64(LOGITS), kind="dft"), rtol=1e-5
    )

    def minus_p(z):
        p = np.exp(float64.log_softmax(z))
        picked = np.take_along_axis(p, LABELS[..., None], -1)[..., 0]
        return -np.sum(MASK * picked) / MASK.sum()

    # sg(p) grad(-log p) = -grad p
    want = float64.gradient(minus_p, LOGITS, at=0)
    np.testing.assert_allclose(grad, want, rtol=1e-5, atol=1e-7)


def test_log_probs_equal_optax():
    optaxs = jax.jit(optax.softmax_cross_entropy_with_integer_labels)
    want = -optaxs(LOGITS, LABELS)
    np.testing.assert_allclose(LOG_PROBS(LOGITS, LABELS), want, rtol=1e-6, atol=1e-6)


def test_bfloat16_logits_are_summed_in_float32():
    z = normal(3, 2, 501, dtype=jnp.bfloat16)
    labels = np.array([7, 500])
    got = LOG_PROBS(z, labels)
    want = float64.log_softmax(np.float64(z))[[0, 1], labels]
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-6)  # bfloat16 would be off by 1e-2


def test_entropy():
    want = lambda z: float(
        np.sum(-np.exp(float64.log_softmax(z / 0.7)) * float64.log_softmax(z / 0.7))
    )
    float64.assert_same(
        lambda z: jnp.sum(entropy(z, temperature=0.7)), want, LOGITS, atol=1e-5
    )
    holes = np.float32([0, -np.inf, 0])
    value, grad = jax.jit(jax.value_and_grad(entropy))(holes)
    assert np.isclose(value, np.log(2)) and np.isfinite(grad).all()


def test_labels_move_to_where_they_are_predicted():
    ids = np.array([[5, 6, 7, 8, 9, 3]])
    mask = np.array([[1, 1, 1, 1, 1, 0]])
    shift = jax.jit(shift_labels)
    labels, counts = shift(ids, mask)
    assert labels.tolist() == [[6, 7, 8, 9, 3, 0]]
    assert counts.tolist() == [[1, 1, 1, 1, 0, 0]]
    labels, counts = shift(ids, mask, np.array([[1, 1, 1, 2, 2, 2]]))
    assert counts.tolist() == [[1, 1, 0, 1, 0, 0]]  # 8 begins a document


def test_packed_documents_have_the_loss_of_separate_ones():
    loss = jax.jit(lambda z, *rest: next_token_loss(z, *shift_labels(*rest)))
    z, ids = np.float32(LOGITS)[:, :4], LABELS[:, :4]
    mask = np.ones((3, 4), bool)
    apart = loss(z, ids, mask)
    # The last logits of a document stand before the next one's first token.
    row = z.reshape(1, 12, 11), ids.reshape(1, 12), mask.reshape(1, 12)
    segments = np.repeat([[1, 2, 3]], 4, axis=1)
    packed = loss(*row, segments)
    assert apart.count == packed.count == 9
    np.testing.assert_allclose(apart.total, packed.total, rtol=1e-6)


def test_what_is_masked_may_be_nan_and_have_any_label():
    z = np.where(MASK[..., None], LOGITS, np.float32(np.nan))
    labels = np.where(MASK, LABELS, -100)
    loss = lambda z, labels: next_token_loss(z, labels, MASK).mean()
    grad = jax.jit(jax.value_and_grad(loss))
    got, want = grad(z, labels), grad(LOGITS, LABELS)
    assert got[0] == want[0]
    assert np.array_equal(got[1], want[1])


@pytest.mark.parametrize("label", [-1, -100, 11])
def test_a_label_outside_of_the_vocabulary_that_counts_is_nan(label):
    # A gather would wrap -1 and -100 around, or take the last word.
    assert np.isnan(LOG_PROBS(LOGITS[0, 0], label))


def test_messages():
    with pytest.raises(ValueError, match=r"labels has shape \(3, 4\): expected \(3, 5"):
        next_token_loss(LOGITS, LABELS[:, :4], MASK)
    with pytest.raises(ValueError, match="logits is int32: expected floating"):
        log_probs(jnp.ones((3, 5), int), jnp.ones(3, int))
    with pytest.raises(ValueError, match="labels is float32: expected integers"):
        log_probs(LOGITS, jnp.ones((3, 5)))
    with pytest.raises(ValueError, match=r"mask has shape \(3, 4\): expected \(3, 5"):
        next_token_loss(LOGITS, LABELS, MASK[:, :4])
    with pytest.raises(ValueError, match="mask is None: expected an array of shape"):
        next_token_loss(LOGITS, LABELS, None)
    with pytest.raises(ValueError, match="kind='dtf': expected one of .*near it: 'dft"):
        next_token_loss(LOGITS, LABELS, MASK, kind="dtf")
    with pytest.raises(ValueError, match="temperature=0: expected a number above 0"):
        log_probs(LOGITS, LABELS, temperature=0)
    with pytest.raises(ValueError, match="segment_ids has shape"):
        shift_labels(LABELS, MASK, np.ones((3, 4), int))
