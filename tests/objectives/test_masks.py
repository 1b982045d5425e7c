"""The answer is what stands between the prompt and the first stop."""

import jax
import numpy as np
import pytest

from jpeft.objectives import answer_mask, truncated

MASK, TRUNCATED = jax.jit(answer_mask), jax.jit(truncated)
# 2 is the end of text, the padding, and stands in the prompts too.
IDS = np.array([[2, 2, 7, 5, 2, 2], [7, 2, 5, 3, 6, 2], [2, 7, 6, 6, 6, 6]])
WANTED = [[0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 0, 0], [0, 0, 0, 1, 1, 1]]


@pytest.mark.parametrize("start", [3, np.array([3, 3, 3]), np.arange(6) >= 3], ids=str)
def test_up_to_and_including_the_first_stop(start):
    if np.ndim(start) and start.dtype == bool:
        start = np.broadcast_to(start, IDS.shape)
    assert MASK(IDS, [2, 3], start).astype(int).tolist() == WANTED
    assert TRUNCATED(IDS, [2, 3], start).tolist() == [False, False, True]


def test_a_padding_id_that_is_the_end_neither_loses_the_end_nor_goes_on():
    mask = MASK(np.array([[7, 5, 2, 2, 2]]), 2, 1)
    assert mask.astype(int).tolist() == [[0, 1, 1, 0, 0]]
    # `ids != 2` would leave the end out, so that it is never learned.


def test_messages():
    with pytest.raises(ValueError, match="ids is float32: expected integers"):
        answer_mask(np.ones((2, 3), np.float32), 2, 1)
    with pytest.raises(ValueError, match=r"start has shape \(2,\): expected \(3,\)"):
        answer_mask(IDS, 2, np.array([1, 2]))
    with pytest.raises(ValueError, match=r"start has shape \(6,\): expected \(3, 6\)"):
        answer_mask(IDS, 2, np.arange(6) > 2)
