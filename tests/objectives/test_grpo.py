"""GRPO and its kin against float64, and the coefficients that tell them apart."""

import float64
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal

from jpeft.objectives import grpo_loss

NEW, OLD, REFERENCE = (-1 + 0.5 * normal(k, 4, 6) for k in range(3))
A = normal(3, 4)
MASK = float64.ragged(4, 6, seed=4)


def tokens(new, kind="clipped", level="token", low=0.2, high=0.2, most=None, cap=5.0):
    change = new - np.float64(OLD)
    ratio = np.exp(change)
    if level == "sequence":
        mean = (change * MASK).sum(-1) / MASK.sum(-1)
        ratio = np.broadcast_to(np.exp(mean)[:, None], ratio.shape)
    a = np.float64(A)[:, None]
    if kind == "cispo":
        return -np.minimum(ratio, cap) * a * new
    bounded = ratio if most is None else np.minimum(ratio, most)
    return np.maximum(-a * bounded, -a * np.clip(ratio, 1 - low, 1 + high))


def summed(x, aggregation="dapo"):
    x = x * MASK
    if aggregation == "grpo":
        return (x.sum(-1) / MASK.sum(-1)).mean()
    return x.sum() / (4 * 6 if aggregation == "dr_grpo" else MASK.sum())


CASES = {
    "plain": ({}, {}),
    "clip higher": ({"clip": 0.1, "clip_high": 0.4}, {"low": 0.1, "high": 0.4}),
    "two-sided": ({"most": 1.3}, {"most": 1.3}),
    "gspo": ({"level": "sequence"}, {"level": "sequence"}),
    # A peer takes its default where 0 is given.
    "a clip of zero": ({"clip": 0.0}, {"low": 0.0, "high": 0.0}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_loss_and_its_gradient(case):
    ours, theirs = CASES[case]
    loss = lambda new: grpo_loss(new, A, MASK, old=OLD, **ours).mean()
    float64.assert_same(loss, lambda new: summed(tokens(new, **theirs)), NEW)


@pytest.mark.parametrize("aggregation", ["grpo", "bnpo", "dapo", "dr_grpo"])
def test_aggregations(aggregation):
    longest = 6 if aggregation == "dr_grpo" else None
    loss = lambda new: grpo_loss(
        new, A, MASK, old=OLD, aggregation=aggregation, longest=longest
    ).mean()
    float64.assert_same(loss, lambda new: summed(tokens(new), aggregation), NEW)


def test_cispo_has_the_gradient_of_log_p_alone():
    loss = lambda new: grpo_loss(new, A, MASK, old=OLD, kind="cispo", cap=1.1).mean()
    value, grad = jax.jit(jax.value_and_grad(loss))(NEW)
    want = summed(tokens(np.float64(NEW), kind="cispo", cap=1.1))
    np.testing.assert_allclose(value, want, rtol=1e-5)
    ratio = np.minimum(np.exp(np.float64(NEW) - np.float64(OLD)), 1.1)
    want = -1.0 * MASK * ratio * np.float64(A)[:, None] / MASK.sum()
    np.testing.assert_allclose(grad, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("corrected", [False, True])
def test_with_a_divergence(corrected):
    loss = lambda new: grpo_loss(
        new, A, MASK, old=OLD, reference=REFERENCE, beta=0.3, corrected=corrected
    ).mean()

    def want(new):
        d = new - np.float64(REFERENCE)
        ratio = np.exp(new - np.float64(OLD)) if corrected else 1
        return summed(tokens(new) + 0.3 * ratio * (np.exp(-d) - 1 + d))

    float64.assert_same(loss, want, NEW)


def test_on_policy_the_ratio_is_one_and_still_has_a_gradient():
    f = jax.jit(jax.value_and_grad(lambda new: grpo_loss(new, A, MASK).mean()))
    value, grad = f(NEW)
    weight = MASK / MASK.sum()
    a = np.float64(A)[:, None]
    np.testing.assert_allclose(value, np.sum(-a * weight), rtol=1e-5)
    np.testing.assert_allclose(grad, -a * weight, rtol=1e-5, atol=1e-7)


PINS = {
    "grpo": (-0.25, 0.0625),
    "bnpo": (-0.1, 0.1),
    "dapo": (-0.1, 0.1),
    "dr_grpo": (-0.05, 0.05),
}


@pytest.mark.parametrize("aggregation", PINS)
def test_the_coefficient_of_a_token(aggregation):
    mask = np.arange(10) < np.array([[2], [8]])
    longest = 10 if aggregation == "dr_grpo" else None
    loss = lambda new: grpo_loss(
        new,
        np.float32([1, -1]),
        mask,
        aggregation=aggregation,
        longest=longest,
    ).mean()
    grad = jax.jit(jax.grad(loss))(np.zeros((2, 10), np.float32))
    np.testing.assert_allclose(grad[:, 0], PINS[aggregation], rtol=1e-6)
    assert np.all(grad[0, 2:] == 0)


def test_micro_batches_dilute_bnpo_and_not_dapo():
    def parts(aggregation):
        half = lambda rows: grpo_loss(
            NEW[rows], A[rows], MASK[rows], old=OLD[rows], aggregation=aggregation
        )
        return (half(slice(0, 1)) + half(slice(1, 4))).mean()

    both = jax.jit(lambda: [parts("dapo"), parts("bnpo")])()
    whole = summed(tokens(np.float64(NEW)))
    np.testing.assert_allclose(both[0], whole, rtol=1e-5)
    assert not np.isclose(both[1], whole, rtol=1e-3)


@pytest.mark.parametrize("aggregation", ["grpo", "dapo"])
def test_truncated_and_empty_answers_count_nowhere(aggregation):
    f = jax.jit(
        lambda new, a, mask, cut: grpo_loss(
            new, a, mask, old=OLD[: len(a)], truncated=cut, aggregation=aggregation
        )
    )
    cut = np.array([False, False, True, False])
    mask = MASK & ~np.array([[0], [0], [0], [1]], bool)
    got = f(NEW, A, mask, cut)
    want = f(NEW[:2], A[:2], MASK[:2], cut[:2])
    np.testing.assert_allclose(got.mean(), want.mean(), rtol=1e-6)
    assert got.count == want.count


def test_what_is_masked_may_be_nan():
    hide = lambda x: jnp.where(MASK, x, jnp.nan)
    f = jax.jit(
        jax.value_and_grad(
            lambda new, old, ref: grpo_loss(
                new, A, MASK, old=old, reference=ref, beta=0.1
            ).mean()
        )
    )
    got, want = f(hide(NEW), hide(OLD), hide(REFERENCE)), f(NEW, OLD, REFERENCE)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_messages():
    with pytest.raises(ValueError, match="aggregation='drgrpo': .*near it: 'dr_grpo'"):
        grpo_loss(NEW, A, MASK, aggregation="drgrpo")
    with pytest.raises(ValueError, match="longest=None: expected the most tokens"):
        grpo_loss(NEW, A, MASK, aggregation="dr_grpo")
    with pytest.raises(ValueError, match="longest=9: expected None with 'dapo'"):
        grpo_loss(NEW, A, MASK, longest=9)
    with pytest.raises(ValueError, match="beta=0.1: expected 0 without reference"):
        grpo_loss(NEW, A, MASK, beta=0.1)
    with pytest.raises(ValueError, match=r"advantages has shape \(3,\)"):
        grpo_loss(NEW, A[:3], MASK)
    with pytest.raises(ValueError, match="clip_high=0.3: expected cap"):
        grpo_loss(NEW, A, MASK, kind="cispo", clip_high=0.3)
    with pytest.raises(ValueError, match="kind='gspo': expected one of"):
        grpo_loss(NEW, A, MASK, kind="gspo")
