"""Rewards of pairs, and where a text's score is read."""

import float64
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal

from jpeft.objectives import accuracy, bradley_terry, last_token_scores, margin

CHOSEN, REJECTED, MARGIN = normal(0, 7), normal(1, 7), jnp.abs(normal(2, 7))
WEIGHT = np.array([1, 1, 0, 1, 1, 0, 1], bool)


def reference(c, r, m):
    losses = -float64.log_sigmoid(c - r - m) + 0.01 * (c + r) ** 2
    return np.sum(WEIGHT * losses) / 5


def test_bradley_terry_and_its_gradient():
    ours = lambda c, r, m: bradley_terry(
        c, r, margin=m, centre=0.01, weight=WEIGHT
    ).mean()
    float64.assert_same(ours, reference, CHOSEN, REJECTED, MARGIN)


@pytest.mark.parametrize("by, want", [(None, 0.37110067), (0.5, 0.55435524)])
def test_pins(by, want):
    one = lambda x: np.float32([x])
    by = None if by is None else one(by)
    loss = bradley_terry(one(1.2), one(0.4), margin=by)
    np.testing.assert_allclose(loss.mean(), want, rtol=1e-6)


SCORES = jax.jit(last_token_scores)
TEXT = np.float32([0.5, -1.0, 2.0])


@pytest.mark.parametrize("left, right", [(0, 0), (2, 0), (0, 3), (1, 1)])
def test_the_score_does_not_depend_on_padding(left, right):
    row = np.pad(TEXT, (left, right), constant_values=9)
    mask = np.pad(np.ones(3, bool), (left, right))
    batch = np.stack([row, np.full_like(row, 7)])
    masks = np.stack([mask, np.ones_like(mask)])
    assert SCORES(row[None], mask[None]) == 2.0
    assert SCORES(batch, masks).tolist() == [2.0, 7.0]


def test_a_padding_that_is_the_end_of_text_is_not_where_the_score_is():
    # Real tokens: 5, 2 (the end); then padding with the same id 2.
    scores, ids = np.float32([[0.1, 0.2, 0.3, 0.4]]), np.array([[5, 2, 2, 2]])
    mask = np.array([[1, 1, 0, 0]])
    assert SCORES(scores, mask) == np.float32(0.2)
    last_that_differs = np.flatnonzero(ids[0] != 2)[-1]
    assert scores[0, last_that_differs] == np.float32(0.1)  # what `ids != pad` reads


def test_a_text_without_a_token_has_no_score():
    assert np.isnan(SCORES(np.ones((1, 3), np.float32), np.zeros((1, 3))))[0]


def test_accuracy_and_margin():
    c, r = np.float32([1, 2, 3, np.nan]), np.float32([0, 2, 5, 1])
    weight = np.array([1, 1, 1, 0])
    assert np.isclose(accuracy(c, r, weight=weight).mean(), 1 / 3)
    assert np.isclose(margin(c, r, weight=weight).mean(), -1 / 3)


def test_messages():
    with pytest.raises(ValueError, match=r"rejected has shape \(3,\): expected \(7,\)"):
        bradley_terry(CHOSEN, REJECTED[:3])
    with pytest.raises(ValueError, match=r"margin has shape \(3,\)"):
        bradley_terry(CHOSEN, REJECTED, margin=MARGIN[:3])
