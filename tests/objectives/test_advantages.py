"""Advantages: pinned values, float64 loops, and what peers got wrong."""

import float64
import jax
import numpy as np
import pytest
from draws import normal

from jpeft.objectives import (
    gae,
    group_relative,
    leave_one_out,
    masked_mean,
    masked_variance,
    place_scores,
    place_scores_after_end,
    whiten,
)

OLD = np.float32([[-1, -2, -0.5, -0.1]])
REFERENCE = np.float32([[-1.2, -1.5, -0.7, -0.4]])
PENALTY = -0.05 * (OLD - REFERENCE)
VALUES = np.float32([[0.1, 0.2, 0.3, 0.4]])
ALL = np.ones((1, 4), bool)
A = [0.534327, 0.467712, 0.36075, 0.285]
GAE, PLACE = jax.jit(gae), jax.jit(place_scores)
# Pins have six digits after the point.
close = lambda got, want: np.testing.assert_allclose(
    np.ravel(got), want, rtol=1e-6, atol=1e-6
)


def test_the_score_stands_at_the_end():
    close(PLACE(PENALTY, np.float32([0.7]), ALL), [-0.01, 0.025, -0.01, 0.685])
    padded = np.concatenate([PENALTY, np.float32([[9, 9]])], axis=1)
    mask = np.array([[1, 1, 1, 1, 0, 0]])
    got = PLACE(padded, np.float32([0.7]), mask)
    close(got, [-0.01, 0.025, -0.01, 0.685, 0, 0])


def test_a_score_of_seven_tenths_is_not_put_into_integers():
    zeros, mask = np.zeros((2, 3), np.int32), np.array([[1, 1, 0], [1, 1, 1]])
    got = PLACE(zeros, np.float32([0.7, -1.6]), mask)
    assert got.dtype == np.float32
    close(got, [0, 0.7, 0, 0, 0, -1.6])


def test_advantages_and_returns():
    advantages, returns = GAE(PLACE(PENALTY, np.float32([0.7]), ALL), VALUES, ALL)
    close(advantages, A)
    close(returns, [0.634327, 0.667712, 0.66075, 0.685])


def test_trls_layout():
    after = lambda x, y: np.concatenate([x, np.float32([[y]])], axis=1)
    mask = np.array([[1, 1, 1, 1, 0]])
    place = jax.jit(place_scores_after_end)
    rewards, longer = place(after(PENALTY, 9), np.float32([0.7]), mask)
    close(rewards, [-0.01, 0.025, -0.01, -0.015, 0.7])
    assert longer.all()
    advantages, _ = GAE(rewards, after(VALUES, 0.35), longer)
    close(advantages[:, :4], [0.519323, 0.451919, 0.344125, 0.2675])
    # Where the answer fills the row the score stands on its last token.
    rewards, longer = place(PENALTY, np.float32([0.7]), ALL)
    close(rewards, [-0.01, 0.025, -0.01, 0.685])


def test_trls_layout_of_an_answer_of_one_token_and_of_none():
    mask = np.array([[1, 0, 0], [0, 0, 0]])
    zeros, scores = np.zeros((2, 3), np.float32), np.float32([5, 7])
    rewards, longer = place_scores_after_end(zeros, scores, mask)
    assert rewards.tolist() == [[0, 5, 0], [0, 0, 0]]
    assert longer.tolist() == [[True, True, False], [False, False, False]]


def loop(rewards, values, mask, gamma, lam):
    """Of one row, over the policy's tokens alone."""
    advantages = np.zeros_like(rewards)
    own = np.flatnonzero(mask)
    advantage = value = 0.0
    for t in own[::-1]:
        advantage = rewards[t] + gamma * value - values[t] + gamma * lam * advantage
        value = values[t]
        advantages[t] = advantage
    return advantages


def test_observations_between_turns_neither_carry_nor_break_it():
    rewards, values = normal(0, 3, 8), normal(1, 3, 8)
    mask = np.array(
        [[1, 1, 0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0]]
    )
    hidden = np.where(mask, rewards, np.nan), np.where(mask, values, np.nan)
    run = jax.jit(lambda r, v: gae(r, v, mask, gamma=0.9, lam=0.8))
    advantages, returns = run(*hidden)
    for k in range(3):
        want = loop(np.float64(rewards[k]), np.float64(values[k]), mask[k], 0.9, 0.8)
        np.testing.assert_allclose(advantages[k], want, rtol=1e-5, atol=1e-6)
        both = np.where(mask[k], want + np.float64(values[k]), 0)
        np.testing.assert_allclose(returns[k], both, rtol=1e-5, atol=1e-6)


def test_whitening():
    advantages, _ = GAE(PLACE(PENALTY, np.float32([0.7]), ALL), VALUES, ALL)
    run = jax.jit(
        lambda x, y: (
            whiten(x, ALL),
            whiten(x, ALL, ddof=0),
            whiten(y, ALL, keep_mean=True),
        )
    )
    rewards = np.float32([[-0.01, 0.025, -0.01, 0.685]])
    by_freedom, by_n, kept = run(advantages, rewards)
    close(by_freedom, [1.104607, 0.503341, -0.462111, -1.145837])
    close(by_n, [1.27549, 0.581208, -0.5336, -1.323098])
    close(kept, [-0.361025, -0.258705, -0.361025, 1.670754])


def test_whitening_one_token_does_not_divide_by_n_minus_one():
    mask = np.array([[0, 1, 0, 0]])
    run = jax.jit(whiten)
    assert run(np.float32([A]), mask).tolist() == [[0, 0, 0, 0]]
    assert run(np.float32([A]), np.zeros((1, 4))).tolist() == [[0, 0, 0, 0]]
    assert jax.jit(masked_variance)(np.float32([A]), mask) == 0


def test_moments_of_what_counts():
    x, mask = normal(2, 3, 5), float64.ragged(3, 5, seed=1)
    x = np.where(mask, x, np.float32(np.nan))
    moments = jax.jit(lambda x: (masked_mean(x, mask), masked_variance(x, mask, -1)))
    mean, variance = moments(x)
    np.testing.assert_allclose(mean, np.float64(x[mask]).mean(), rtol=1e-5)
    want = [np.var(r[m], ddof=1) if m.sum() > 1 else 0 for r, m in zip(x, mask)]  # noqa: B905
    np.testing.assert_allclose(variance, want, rtol=1e-5)


# --- answers of a group --------------------------------------------------------------

SOLVED = np.float32([[1, 0, 0, 0]])
NOISE = np.float32([[0.9, 0.9, 0.9, 0.9001]])


@pytest.mark.parametrize(
    "options, want",
    [
        ({}, [1.4997, -0.4999]),
        ({"eps": 1e-6}, [1.499997, -0.499999]),
        ({"eps": 1e-6, "ddof": 0}, [1.732048, -0.577349]),
        ({"ddof": 0}, [1.731651, -0.577217]),
        ({"scale": "none"}, [0.75, -0.25]),
    ],
    ids=str,
)
def test_group_relative(options, want):
    got = jax.jit(lambda r: group_relative(r, **options))(SOLVED)
    np.testing.assert_allclose(got[0, :2], want, rtol=2e-6)


def test_noise_is_blown_up_by_a_small_eps():
    # 0.0001 in float32 beside 0.9 has three digits.
    assert np.isclose(group_relative(NOISE)[0, 3], 0.5, rtol=1e-3)
    assert np.isclose(group_relative(NOISE, eps=1e-6)[0, 3], 1.470588, rtol=1e-3)


def test_leave_one_out():
    np.testing.assert_allclose(leave_one_out(SOLVED)[0], [1, *[-1 / 3] * 3], rtol=1e-6)


@pytest.mark.parametrize("estimator", [group_relative, leave_one_out])
def test_all_equal_is_zero_however_the_mean_rounds(estimator):
    # The mean of ten float32 0.1 is not 0.1.
    rewards = np.full((2, 10), 0.1, np.float32)
    assert np.all(jax.jit(estimator)(rewards) == 0)


@pytest.mark.parametrize("estimator", [group_relative, leave_one_out])
def test_unscorable_answers_are_in_no_mean(estimator):
    run = jax.jit(lambda r, s: estimator(r, scored=s))
    rewards = np.float32([[1, np.nan, 0.25, 0], [np.nan, np.nan, 3, np.nan]])
    got = run(rewards, np.isfinite(rewards))
    want = run(np.float32([[1, 0.25, 0]]), np.ones((1, 3), bool))
    assert got[0, 1] == 0 and np.all(got[1] == 0)
    np.testing.assert_allclose(got[0, [0, 2, 3]], want[0], rtol=1e-6)


def test_by_the_deviation_of_the_whole_batch():
    rewards = normal(3, 2, 4)
    got = jax.jit(lambda r: group_relative(r, scale="batch"))(rewards)
    r = np.float64(rewards)
    want = (r - r.mean(-1, keepdims=True)) / (r.std(ddof=1) + 1e-4)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_messages():
    with pytest.raises(ValueError, match=r"scores has shape \(3,\): expected \(1,\)"):
        place_scores(PENALTY, np.ones(3), ALL)
    with pytest.raises(ValueError, match="lam=1.5: expected from 0 to 1"):
        gae(PENALTY, VALUES, ALL, lam=1.5)
    with pytest.raises(ValueError, match="values has shape"):
        gae(PENALTY, VALUES[:, :3], ALL)
    with pytest.raises(ValueError, match="scale='groups': expected one of"):
        group_relative(SOLVED, scale="groups")
    with pytest.raises(ValueError, match="ddof=2: expected 0"):
        whiten(VALUES, ALL, ddof=2)
