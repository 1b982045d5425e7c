"""What the estimators are worth and what their gradients are, by exact expectation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal

from jpeft.objectives import adapt_coefficient, clipped_share, estimate_kl

LOGITS, REFERENCE = normal(0, 5), jax.nn.log_softmax(normal(1, 5))


def exact(of, z):
    p, q = jax.nn.softmax(z), jnp.exp(REFERENCE)
    log = jnp.log(p) - jnp.log(q)
    return jnp.sum(p * log) if of == "p, q" else -jnp.sum(q * log)


def expected(estimator, ratio, z):
    """sum over the five of sg(p) times the estimate: what samples give on average."""
    log_p = jax.nn.log_softmax(z)
    sampled = log_p if ratio else None
    value = estimate_kl(log_p, REFERENCE, estimator=estimator, log_sampled=sampled)
    return jnp.sum(jax.lax.stop_gradient(jnp.exp(log_p)) * value)


ROWS = [
    ("k1", False, None),
    ("k2", False, "p, q"),
    ("k3", False, "q, p"),
    ("k1", True, "p, q"),
    ("k3", True, "p, q"),
]


@pytest.mark.parametrize("estimator, ratio, of", ROWS)
def test_the_expected_gradient_in_the_loss(estimator, ratio, of):
    f = lambda z: (
        jax.value_and_grad(lambda z: expected(estimator, ratio, z))(z),
        jax.value_and_grad(lambda z: exact(of, z))(z),
        exact("p, q", z),
    )
    (value, grad), (_, want), divergence = jax.jit(f)(LOGITS)
    if estimator != "k2":  # unbiased, but for rounding of numbers near 1
        np.testing.assert_allclose(value, divergence, rtol=1e-5)
    # k1 in the loss, as in a peer's GRPO, has no gradient at all.
    want = np.zeros(5) if of is None else want
    np.testing.assert_allclose(grad, want, rtol=1e-5, atol=1e-6)


def test_k1_in_the_reward_has_the_gradient_of_the_divergence():
    def by_score(z):
        log_p = jax.nn.log_softmax(z)
        reward = jax.lax.stop_gradient(estimate_kl(log_p, REFERENCE, estimator="k1"))
        return jnp.sum(jax.lax.stop_gradient(jnp.exp(log_p)) * reward * log_p)

    both = jax.jit(
        lambda z: (jax.grad(by_score)(z), jax.grad(lambda z: exact("p, q", z))(z))
    )
    got, want = both(LOGITS)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "estimator, want", [("k1", 0.0375), ("k2", 0.0128125), ("k3", 0.01181506)]
)
def test_pins(estimator, want):
    old, new = np.float32([-1, -2, -0.5, -0.1]), np.float32([-0.9, -2.3, -0.5, -0.05])
    got = estimate_kl(old, new, estimator=estimator).mean()
    # Of size 1e-2, from differences of numbers of size 2 that are off by 1e-7.
    np.testing.assert_allclose(got, want, rtol=3e-5)


def test_k3_does_not_overflow_where_the_policy_finds_a_token_impossible():
    p, q = np.float32([-200.0, -1.0]), np.float32([-1.0, -1.0])
    value, grad = jax.jit(jax.value_and_grad(lambda p: estimate_kl(p, q).sum()))(p)
    assert np.isfinite(value) and np.isfinite(grad).all()
    share = clipped_share(p, q, np.ones(2))
    assert share.total == 1 and share.count == 2


@pytest.mark.parametrize("kl, want", [(9.0, 0.201024), (6.3, 0.200256), (0, 0.198976)])
def test_the_adaptive_coefficient(kl, want):
    got = adapt_coefficient(0.2, kl, target=6, episodes=256)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_messages():
    with pytest.raises(ValueError, match="estimator='kl3': expected one of .*'k3'"):
        estimate_kl(REFERENCE, REFERENCE, estimator="kl3")
    with pytest.raises(ValueError, match="log_q has shape"):
        estimate_kl(REFERENCE, REFERENCE[:3])
    with pytest.raises(ValueError, match="target=0: expected a number above 0"):
        adapt_coefficient(0.2, 1.0, target=0, episodes=1)
