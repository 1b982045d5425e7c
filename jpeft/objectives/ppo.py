"""PPO: a policy that moves no further than a clip allows, and its value function.

With ratio = exp(new - old), log-probabilities of the tokens that were sampled:

    policy   max(-A ratio, -A clip(ratio, 1 - eps, 1 + eps))
    dual     for A < 0 no more than -A c:  min(policy, -A c)
    value    1/2 max((V - R)^2, (clip(V, V_old +- epsV) - R)^2)

Schulman et al. 2017, arXiv:1707.06347.  Dual clip: Ye et al. 2019, arXiv:1912.09729.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jpeft.checks import check_positive, real
from jpeft.objectives._arrays import held, numbers, ratio, weights
from jpeft.objectives.kl import guarded_exp
from jpeft.objectives.weighted import Weighted, weighted_sum

check_clip = real(lambda x: x >= 0, "0 or more")
check_clip_low = real(lambda x: 0 <= x <= 1, "from 0 to 1")
_check_dual = real(lambda x: x > 1, "a ratio above 1, such as 3")


def clipped(
    ratio: jax.Array, advantages: jax.Array, low: float, high: float
) -> jax.Array:
    """max(-A ratio, -A clip(ratio, 1 - low, 1 + high)), entry by entry."""
    within = jnp.clip(ratio, 1 - low, 1 + high)
    return jnp.maximum(-advantages * ratio, -advantages * within)


def policy_loss(
    new: Any,
    old: Any,
    advantages: Any,
    mask: Any,
    *,
    clip: float = 0.2,
    clip_high: float | None = None,
    dual_clip: float | None = None,
) -> Weighted:
    """The clipped loss, summed over the tokens that count.

    new, old: (*batch, tokens), log-probabilities by the policy and by the one that
    sampled, at one temperature.  advantages: the same shape.  Gradients go to `new`.
    |new - old| beyond 20 counts as 20.

    clip: eps; 0 lets no ratio pass 1.  clip_high: another eps above; None is `clip`.
    dual_clip: c, or None for none.

    TRL's and tunix's; rlax has it as `clipped_surrogate_pg_loss` of one sequence.

    >>> import numpy as np
    >>> from jpeft.objectives import policy_loss
    >>> new, old = np.float32([[-1, -0.5]]), np.float32([[-1, -1]])
    >>> loss = policy_loss(new, old, np.float32([[1, 1]]), np.ones((1, 2)))
    >>> f"{loss.mean():.2f}"  # -(1 + 1.2) / 2: the second ratio, 1.65, is clipped
    '-1.10'
    """
    where = "policy_loss"
    new, old, advantages, weight = _policy(where, new, old, advantages, mask)
    low = check_clip_low(where, "clip", clip)
    high = low if clip_high is None else check_clip(where, "clip_high", clip_high)
    change = guarded_exp(new - old)
    loss = clipped(change, advantages, low, high)
    if dual_clip is not None:
        most = -advantages * _check_dual(where, "dual_clip", dual_clip)
        loss = jnp.where(advantages < 0, jnp.minimum(loss, most), loss)
    return weighted_sum(loss, weight)


def clip_fraction(
    new: Any,
    old: Any,
    advantages: Any,
    mask: Any,
    *,
    clip: float = 0.2,
    clip_high: float | None = None,
) -> Weighted:
    """At how many tokens the clip is what decides, so that no gradient passes.

    >>> import numpy as np
    >>> from jpeft.objectives import clip_fraction
    >>> new, old = np.float32([-1, -0.5]), np.float32([-1, -1])
    >>> float(clip_fraction(new, old, np.float32([1, 1]), np.ones(2)).mean())
    0.5
    """
    where = "clip_fraction"
    new, old, advantages, weight = _policy(where, new, old, advantages, mask)
    low = check_clip_low(where, "clip", clip)
    high = low if clip_high is None else check_clip(where, "clip_high", clip_high)
    change = guarded_exp(new - old)
    decides = clipped(change, advantages, low, high) > -advantages * change
    return weighted_sum(decides.astype(new.dtype), weight)


def _policy(
    where: str, new: Any, old: Any, advantages: Any, mask: Any
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    new, old, advantages = numbers(where, new=new, old=old, advantages=advantages)
    weight = weights(where, mask, new)
    old, advantages = map(lax.stop_gradient, (old, advantages))
    new, old, advantages = (held(x, weight) for x in (new, old, advantages))
    return new, old, advantages, weight


def value_loss(
    values: Any, old_values: Any, returns: Any, mask: Any, *, clip: float | None = 0.2
) -> Weighted:
    """Half the squared error, and no less than that of values held near the old ones.

    All (*batch, tokens).  Gradients go to `values`.  clip: epsV, or None for none.

    >>> import numpy as np
    >>> from jpeft.objectives import value_loss
    >>> old, returns = np.float32([[1, 2]]), np.float32([[2, 2]])
    >>> float(value_loss(old, old, returns, np.ones((1, 2))).mean())  # (1/2 + 0) / 2
    0.25
    """
    where = "value_loss"
    values, old_values, returns = numbers(
        where, values=values, old_values=old_values, returns=returns
    )
    weight = weights(where, mask, values)
    old_values, returns = map(lax.stop_gradient, (old_values, returns))
    values, old, returns = (held(x, weight) for x in (values, old_values, returns))
    loss = jnp.square(values - returns)
    if clip is not None:
        eps = check_positive(where, "clip", clip)
        near = old + jnp.clip(values - old, -eps, eps)
        loss = jnp.maximum(loss, jnp.square(near - returns))
    return weighted_sum(0.5 * loss, weight)


def explained_variance(values: Any, returns: Any, mask: Any) -> jax.Array:
    """1 - var(R - V) / var(R) over what counts: 1 is perfect, 0 as good as the mean.

    0 where the returns do not vary.

    >>> import numpy as np
    >>> from jpeft.objectives import explained_variance
    >>> returns = np.float32([1, 2, 3])
    >>> float(explained_variance(returns, returns, np.ones(3)))
    1.0
    """
    where = "explained_variance"
    values, returns = numbers(where, whole=True, values=values, returns=returns)
    weight = weights(where, mask, values)
    values, returns = held(values, weight), held(returns, weight)

    def variance(x: jax.Array) -> jax.Array:
        n = jnp.sum(weight)
        return ratio(jnp.sum(jnp.square(x - ratio(jnp.sum(x * weight), n)) * weight), n)

    of_returns = variance(returns)
    error = ratio(variance(returns - values), of_returns)
    return jnp.where(of_returns > 0, 1 - error, jnp.zeros_like(error))
