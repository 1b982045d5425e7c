"""Reward models: pairs of answers of which people prefer one.

    loss = -log sigmoid(r_chosen - r_rejected - margin) + c (r_chosen + r_rejected)^2

Bradley and Terry 1952; for language models Ouyang et al. 2022, arXiv:2203.02155;
margin: Touvron et al. 2023 (Llama 2), arXiv:2307.09288; centring: Eisenstein et al.
2023, arXiv:2312.09244.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.checks import check_number
from jpeft.objectives._arrays import (
    check_shape,
    held,
    last_position,
    numbers,
    weights,
)
from jpeft.objectives.weighted import Weighted, weighted_sum


def bradley_terry(
    chosen: Any,
    rejected: Any,
    *,
    margin: Any = None,
    centre: float = 0.0,
    weight: Any = None,
) -> Weighted:
    """The loss of pairs' rewards, summed, and how many pairs there are.

    chosen, rejected: (*pairs,).  margin: (*pairs,), by how much the chosen one should
    win.  centre: weight c of the term that keeps rewards around zero; 0.01 is usual.
    weight: (*pairs,), 0 for what is no pair; None counts all.

    TRL's RewardTrainer with `margin` and `center_rewards_coefficient`.

    >>> import numpy as np
    >>> from jpeft.objectives import bradley_terry
    >>> loss = bradley_terry(np.float32([1, 0]), np.float32([-1, 0.5]))
    >>> int(loss.count), f"{loss.mean():.3f}"
    (2, '0.551')
    """
    chosen, rejected = numbers("bradley_terry", chosen=chosen, rejected=rejected)
    centre = check_number("bradley_terry", "centre", centre)
    weight = pair_weights("bradley_terry", weight, chosen)
    chosen, rejected = held(chosen, weight), held(rejected, weight)
    ahead = chosen - rejected
    if margin is not None:
        (margin,) = numbers("bradley_terry", whole=True, margin=margin)
        check_shape("bradley_terry", "margin", margin, chosen.shape, "one a pair")
        ahead = ahead - held(margin, weight)
    loss = -jax.nn.log_sigmoid(ahead) + centre * jnp.square(chosen + rejected)
    return weighted_sum(loss, weight)


def pair_weights(where: str, weight: Any, like: jax.Array) -> jax.Array:
    """Ones where None."""
    if weight is None:
        return jnp.ones_like(like)
    return weights(where, weight, like, "weight")


def last_token_scores(scores: Any, mask: Any) -> jax.Array:
    """(*batch,) float32: the score at the last real token of each text.

    scores: (*batch, tokens), what the reward head says at every token.  mask: the same
    shape, true for real tokens, padded on the left or right: the same text has the same
    score however it is padded.  By mask, not by id: a padding id may be the end's.
    A text without a real token gives NaN.

    >>> import numpy as np
    >>> from jpeft.objectives import last_token_scores
    >>> scores, mask = np.float32([[0.1, 0.5, 9.0]]), np.array([[1, 1, 0]])
    >>> last_token_scores(scores, mask).tolist()
    [0.5]
    """
    (scores,) = numbers("last_token_scores", scores=scores)
    at, last = last_position(weights("last_token_scores", mask, scores))
    found = jnp.sum(jnp.where(at == last, scores, jnp.zeros((), scores.dtype)), axis=-1)
    nan = jnp.full((), np.nan, scores.dtype)
    return jnp.where(last[..., 0] >= 0, found, nan)


def accuracy(chosen: Any, rejected: Any, *, weight: Any = None) -> Weighted:
    """In how many pairs the chosen answer has the higher reward; a tie is not.

    >>> import numpy as np
    >>> from jpeft.objectives import accuracy
    >>> float(accuracy(np.float32([1, 0]), np.float32([-1, 0.5])).mean())
    0.5
    """
    chosen, rejected = numbers("accuracy", chosen=chosen, rejected=rejected)
    weight = pair_weights("accuracy", weight, chosen)
    return weighted_sum((chosen > rejected).astype(chosen.dtype), weight)


def margin(chosen: Any, rejected: Any, *, weight: Any = None) -> Weighted:
    """chosen - rejected, summed, and how many pairs there are.

    >>> import numpy as np
    >>> from jpeft.objectives import margin
    >>> float(margin(np.float32([1, 0]), np.float32([-1, 0.5])).mean())
    0.75
    """
    chosen, rejected = numbers("margin", chosen=chosen, rejected=rejected)
    weight = pair_weights("margin", weight, chosen)
    return weighted_sum(held(chosen, weight) - held(rejected, weight), weight)
