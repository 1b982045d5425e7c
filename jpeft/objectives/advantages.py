"""Rewards to advantages: token by token (PPO), or answer against answer (RLOO, GRPO).

    delta_t = r_t + gamma V_{t+1} - V_t
    A_t     = delta_t + gamma lambda A_{t+1}          V = A = 0 after the end
    R_t     = A_t + V_t

Generalised advantages: Schulman et al. 2015, arXiv:1506.02438.  t runs over the tokens
that the mask names, the policy's own: what stands between them (a tool's output, the
user's next turn) is passed over, so that A and V are handed across it untouched.

RLOO: Ahmadian et al. 2024, arXiv:2402.14740.  GRPO: Shao et al. 2024, arXiv:2402.03300.
Without the division: Liu et al. 2025 ("Dr. GRPO"), arXiv:2503.20783.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jpeft.checks import check_flag, check_positive, real
from jpeft.objectives._arrays import (
    check_shape,
    choose,
    held,
    last_position,
    numbers,
    ratio,
    weights,
)

_check_share = real(lambda x: 0 <= x <= 1, "from 0 to 1")
_check_freedom = real(lambda x: x in (0, 1), "0 (divide by n) or 1 (by n - 1)")


# --- masked moments ------------------------------------------------------------------


def masked_mean(x: Any, mask: Any, axis: Any = None) -> jax.Array:
    """Over what counts; 0 where nothing does.

    >>> import numpy as np
    >>> from jpeft.objectives import masked_mean
    >>> float(masked_mean(np.float32([1, 3, 99]), np.array([1, 1, 0])))
    2.0
    """
    (x,) = numbers("masked_mean", whole=True, x=x)
    weight = weights("masked_mean", mask, x)
    return _mean(held(x, weight), weight, axis)


def _mean(x: jax.Array, weight: jax.Array, axis: Any, keep: bool = False) -> jax.Array:
    add = lambda y: jnp.sum(y, axis=axis, keepdims=keep)
    return ratio(add(x * weight), add(weight))


def masked_variance(x: Any, mask: Any, axis: Any = None, *, ddof: int = 1) -> jax.Array:
    """Over what counts; 0 where too little does (one token has no n - 1).

    ddof: 1 divides by n - 1 (torch, TRL, tunix), 0 by n (NumPy).

    >>> import numpy as np
    >>> from jpeft.objectives import masked_variance
    >>> x, mask = np.float32([1, 3, 99]), np.array([1, 1, 0])
    >>> float(masked_variance(x, mask)), float(masked_variance(x, mask, ddof=0))
    (2.0, 1.0)
    """
    (x,) = numbers("masked_variance", whole=True, x=x)
    weight = weights("masked_variance", mask, x)
    ddof = _check_freedom("masked_variance", "ddof", ddof)
    return _variance(held(x, weight), weight, axis, ddof)


def _variance(
    x: jax.Array, weight: jax.Array, axis: Any, ddof: int, keep: bool = False
) -> jax.Array:
    squares = jnp.square(x - _mean(x, weight, axis, keep=True)) * weight
    add = lambda y: jnp.sum(y, axis=axis, keepdims=keep)
    return ratio(add(squares), add(weight) - ddof)


def whiten(
    x: Any, mask: Any, *, keep_mean: bool = False, ddof: int = 1, eps: float = 1e-8
) -> jax.Array:
    """(x - mean) / sqrt(variance + eps) over all that counts; 0 where masked.

    keep_mean: True puts the mean back (as rewards are whitened).  One token alone is 0.
    TRL's `masked_whiten` with ddof=1.

    >>> import numpy as np
    >>> from jpeft.objectives import whiten
    >>> x, mask = np.float32([[1, 3, 5, 99]]), np.array([[1, 1, 1, 0]])
    >>> print(np.asarray(whiten(x, mask)).round(3))
    [[-1.  0.  1.  0.]]
    """
    (x,) = numbers("whiten", whole=True, x=x)
    weight = weights("whiten", mask, x)
    keep_mean = check_flag("whiten", "keep_mean", keep_mean)
    ddof = _check_freedom("whiten", "ddof", ddof)
    eps = check_positive("whiten", "eps", eps)
    x = held(x, weight)
    mean, variance = _mean(x, weight, None), _variance(x, weight, None, ddof)
    out = (x - mean) * lax.rsqrt(variance + eps)
    return held(out + mean if keep_mean else out, weight)


# --- token by token ------------------------------------------------------------------


def place_scores(rewards: Any, scores: Any, mask: Any) -> jax.Array:
    """`rewards`, with each answer's score added at its last token that counts.

    rewards: (*batch, tokens), such as -beta (log p - log q).  scores: (*batch,),
    integers too.  mask: (*batch, tokens), `answer_mask`.  So the score stands on the
    token that stopped the answer, or on the last one if none did.  The result is
    float32, 0 where masked.  An answer without a token has no place for its score,
    which is dropped.

    >>> import numpy as np
    >>> from jpeft.objectives import place_scores
    >>> kl, mask = np.zeros((1, 4), np.float32), np.array([[0, 1, 1, 0]])
    >>> place_scores(kl, np.float32([5]), mask).tolist()
    [[0.0, 0.0, 5.0, 0.0]]
    """
    rewards, scores, weight = _placed("place_scores", rewards, scores, mask)
    at, last = last_position(weight)
    return held(rewards, weight) + _at(at, last, scores)


def place_scores_after_end(
    rewards: Any, scores: Any, mask: Any
) -> tuple[jax.Array, jax.Array]:
    """TRL's layout: (rewards, mask), each score one position after the answer's end.

    Arguments as for `place_scores`; answers are contiguous.  The mask returned has that
    position too (the first padding, whose V then takes part in `gae`) and is for `gae`
    alone; where an answer reaches the last position its score stands there.
    For replaying TRL's PPO; the papers and `place_scores` put it on the end itself.

    >>> import numpy as np
    >>> from jpeft.objectives import place_scores_after_end
    >>> kl, mask = np.zeros((1, 4), np.float32), np.array([[0, 1, 1, 0]])
    >>> rewards, for_gae = place_scores_after_end(kl, np.float32([5]), mask)
    >>> rewards.tolist(), for_gae.astype(int).tolist()
    ([[0.0, 0.0, 0.0, 5.0]], [[0, 1, 1, 1]])
    """
    where = "place_scores_after_end"
    rewards, scores, weight = _placed(where, rewards, scores, mask)
    at, last = last_position(weight)
    some = last >= 0
    last = jnp.where(some, jnp.minimum(last + 1, rewards.shape[-1] - 1), last)
    longer = (weight != 0) | (at == last)
    return held(rewards, weight) + _at(at, last, scores), longer


def _placed(
    where: str, rewards: Any, scores: Any, mask: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    (rewards,) = numbers(where, whole=True, rewards=rewards)
    (scores,) = numbers(where, whole=True, scores=scores)
    check_shape(where, "scores", scores, rewards.shape[:-1], "one for each answer")
    return rewards, scores.astype(rewards.dtype), weights(where, mask, rewards)


def _at(at: jax.Array, last: jax.Array, scores: jax.Array) -> jax.Array:
    return jnp.where(at == last, scores[..., None], jnp.zeros((), scores.dtype))


def gae(
    rewards: Any, values: Any, mask: Any, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[jax.Array, jax.Array]:
    """(advantages, returns), (*batch, tokens) float32, zero where masked.

    rewards, values, mask: (*batch, tokens).  values[t] is V before token t is known:
    the value head's output at the position that predicts it.  A reward has to stand on
    a token of the mask; what stands elsewhere is not seen.  No gradient passes.

    gamma 1, lam 0.95: TRL's defaults.

    >>> import numpy as np
    >>> from jpeft.objectives import gae
    >>> rewards, values = np.float32([[0, 0, 1]]), np.float32([[0.5, 0.5, 0.5]])
    >>> advantages, returns = gae(rewards, values, np.ones((1, 3)), lam=1.0)
    >>> advantages.tolist(), returns.tolist()
    ([[0.5, 0.5, 0.5]], [[1.0, 1.0, 1.0]])
    """
    rewards, values = numbers("gae", whole=True, rewards=rewards, values=values)
    weight = weights("gae", mask, rewards)
    gamma = _check_share("gae", "gamma", gamma)
    lam = _check_share("gae", "lam", lam)
    rewards, values = map(lax.stop_gradient, (rewards, values))
    rewards, values = held(rewards, weight), held(values, weight)

    def back(after: Any, now: Any) -> tuple[Any, jax.Array]:
        advantage, value = after
        r, v, w = now
        own = r + gamma * value - v + gamma * lam * advantage
        return (
            jnp.where(w != 0, own, advantage),
            jnp.where(w != 0, v, value),
        ), held(own, w)

    zero = jnp.zeros_like(rewards[..., 0])
    times = [jnp.moveaxis(x, -1, 0) for x in (rewards, values, weight)]
    _, advantages = lax.scan(back, (zero, zero), times, reverse=True)
    advantages = jnp.moveaxis(advantages, 0, -1)
    return advantages, held(advantages + values, weight)


# --- answer against answer -----------------------------------------------------------


def leave_one_out(rewards: Any, *, scored: Any = None) -> jax.Array:
    """RLOO: each reward less the mean of the others of its group, (*groups, answers).

        G / (G - 1) (r - mean)

    scored: (*groups, answers), False for an answer that no reward could be found for:
        it is in no mean and gets 0.  None: all are.  An only answer gets 0.

    >>> import numpy as np
    >>> from jpeft.objectives import leave_one_out
    >>> leave_one_out(np.float32([[3, 0, 0, 1]])).tolist()[0][:2]  # 3 - 1/3, 0 - 4/3
    [2.6666667461395264, -1.3333333730697632]
    """
    rewards, weight = _group("leave_one_out", rewards, scored)
    n = jnp.sum(weight, axis=-1, keepdims=True)
    apart = rewards - _mean(rewards, weight, -1, keep=True)
    one = jnp.ones((), n.dtype)
    out = apart * ratio(n, n - one)
    return _differing(rewards, weight, out)


def group_relative(
    rewards: Any,
    *,
    scored: Any = None,
    scale: str = "group",
    ddof: int = 1,
    eps: float = 1e-4,
) -> jax.Array:
    """GRPO: (r - mean of the group) / (standard deviation + eps), (*groups, answers).

    scored: see `leave_one_out`.
    scale: "group"; "none", without the division, which favours prompts that are nearly
        solved or nearly failed (Dr. GRPO); or "batch", by the deviation of all rewards.
    ddof, eps: 1 and 1e-4 are TRL's; tunix has eps 1e-6, which blows noise up.

    A group whose rewards are all equal is 0 exactly, whatever the mean rounds to.

    >>> import numpy as np
    >>> from jpeft.objectives import group_relative
    >>> rewards = np.float32([[1, 0, 0, 1], [1, 1, 1, 1]])  # two prompts, four answers
    >>> print(np.asarray(group_relative(rewards)).round(2))
    [[ 0.87 -0.87 -0.87  0.87]
     [ 0.    0.    0.    0.  ]]
    """
    where = "group_relative"
    rewards, weight = _group(where, rewards, scored)
    axis = choose(where, "scale", scale, {"group": -1, "batch": None, "none": ()})
    ddof = _check_freedom(where, "ddof", ddof)
    eps = check_positive(where, "eps", eps)
    apart = rewards - _mean(rewards, weight, -1, keep=True)
    if axis != ():
        # keep: of "batch", one number in as many axes.
        variance = _variance(rewards, weight, axis, ddof, keep=True)
        apart = apart / (jnp.sqrt(variance) + eps)
    return _differing(rewards, weight, apart)


def _group(where: str, rewards: Any, scored: Any) -> tuple[jax.Array, jax.Array]:
    (rewards,) = numbers(where, whole=True, rewards=rewards)
    if rewards.ndim < 1:
        raise ValueError(
            f"{where}: rewards is one number: expected (..., answers), the answers to "
            "one prompt along the last axis: rewards.reshape(-1, group_size)"
        )
    if scored is None:
        weight = jnp.ones_like(rewards)
    else:
        weight = (weights(where, scored, rewards, "scored") != 0).astype(rewards.dtype)
    return held(lax.stop_gradient(rewards), weight), weight


def _differing(rewards: jax.Array, weight: jax.Array, out: jax.Array) -> jax.Array:
    """`out`, and zero where all that is scored in a group is equal, or it is not."""
    inf = jnp.full((), jnp.inf, rewards.dtype)
    most = jnp.max(jnp.where(weight != 0, rewards, -inf), axis=-1, keepdims=True)
    least = jnp.min(jnp.where(weight != 0, rewards, inf), axis=-1, keepdims=True)
    return held(jnp.where(most > least, out, jnp.zeros((), out.dtype)), weight)
