"""PPO's losses against float64 and pinned values."""

import float64
import jax
import numpy as np
import pytest
from draws import normal

from jpeft.objectives import (
    clip_fraction,
    explained_variance,
    policy_loss,
    value_loss,
)

NEW, OLD = -1 + 0.5 * normal(0, 3, 5), -1 + 0.5 * normal(1, 3, 5)
A, MASK = normal(2, 3, 5), float64.ragged(3, 5, seed=3)


def reference(new, low=0.2, high=0.2, dual=None):
    ratio, a = np.exp(new - np.float64(OLD)), np.float64(A)
    loss = np.maximum(-a * ratio, -a * np.clip(ratio, 1 - low, 1 + high))
    if dual is not None:
        loss = np.where(a < 0, np.minimum(loss, -a * dual), loss)
    return np.sum(MASK * loss) / MASK.sum()


@pytest.mark.parametrize(
    "ours, theirs",
    [
        ({}, {}),
        ({"clip": 0.1, "clip_high": 0.4}, {"low": 0.1, "high": 0.4}),
        ({"dual_clip": 1.3}, {"dual": 1.3}),
        # Zero is a value like others, not a default.
        ({"clip": 0.0}, {"low": 0.0, "high": 0.0}),
        ({"clip": 0.0, "clip_high": 0.4}, {"low": 0.0, "high": 0.4}),
        ({"clip": 0.2, "clip_high": 0.0}, {"low": 0.2, "high": 0.0}),
    ],
    ids=str,
)
def test_the_policy_loss_and_its_gradient(ours, theirs):
    loss = lambda new: policy_loss(new, OLD, A, MASK, **ours).mean()
    float64.assert_same(loss, lambda new: reference(new, **theirs), NEW)


def test_the_value_loss_and_its_gradient():
    old, returns = np.float64(OLD), np.float64(A)

    def want(v):
        near = old + np.clip(v - old, -0.2, 0.2)
        both = np.maximum((v - returns) ** 2, (near - returns) ** 2)
        return 0.5 * np.sum(MASK * both) / MASK.sum()

    float64.assert_same(lambda v: value_loss(v, OLD, A, MASK).mean(), want, NEW)
    free = jax.jit(lambda v: value_loss(v, OLD, A, MASK, clip=None).mean())(NEW)
    error = np.square(np.float64(NEW) - returns)
    np.testing.assert_allclose(free, 0.5 * (MASK * error).sum() / MASK.sum(), rtol=1e-5)


ROW = np.ones((1, 4), bool)


def test_pins():
    old = np.float32([[-1, -2, -0.5, -0.1]])
    new = np.float32([[-0.9, -2.3, -0.5, -0.05]])
    a = np.float32([[1.104607, 0.503341, -0.462111, -1.145837]])
    # Half a digit of 1.1 times, summed: the pin's own rounding is 1e-6.
    loss = policy_loss(new, old, a, ROW).mean()
    np.testing.assert_allclose(loss, 0.01825812, atol=2e-6)
    # The clip at t = 1 does not decide, as A > 0 there.
    assert clip_fraction(new, old, a, ROW).mean() == 0
    assert clip_fraction(new, old, -a, ROW).mean() == 0.25
    values = np.float32([[0.5, 0.1, 0.35, 0.9]])
    old_values = np.float32([[0.1, 0.2, 0.3, 0.4]])
    returns = np.float32([[0.634327, 0.667712, 0.66075, 0.685]])
    loss = value_loss(values, old_values, returns, ROW).mean()
    np.testing.assert_allclose(loss, 0.07210781, rtol=2e-6)


def test_what_is_masked_may_be_nan():
    hide = lambda x: np.where(MASK, x, np.float32(np.nan))
    f = jax.jit(jax.value_and_grad(lambda *x: policy_loss(*x, MASK).mean()))
    got, want = f(hide(NEW), hide(OLD), hide(A)), f(NEW, OLD, A)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_ratio_that_overflows_is_finite():
    one = np.ones((1, 1), np.float32)
    loss = lambda new: policy_loss(new, -200 * one, -one, one).mean()
    value, grad = jax.jit(jax.value_and_grad(loss))(-one)
    assert np.isfinite(value) and np.isfinite(grad).all()


def test_explained_variance():
    returns = np.float32([[1, 2, 4, 9]])
    mask = np.array([[1, 1, 1, 0]])
    run = jax.jit(explained_variance)
    assert run(returns, returns, mask) == 1
    np.testing.assert_allclose(run(0 * returns, returns, mask), 0, atol=1e-6)
    assert run(returns, 0 * returns, mask) == 0


def test_messages():
    with pytest.raises(ValueError, match="old has shape"):
        policy_loss(NEW, OLD[:, :3], A, MASK)
    with pytest.raises(ValueError, match="dual_clip=1: expected a ratio above 1"):
        policy_loss(NEW, OLD, A, MASK, dual_clip=1)
    with pytest.raises(ValueError, match="are these ids in place of log-prob"):
        policy_loss(np.ones((3, 5), int), OLD, A, MASK)
