"""KL divergence of a policy from a reference, estimated from the policy's own samples.

With d = log p - log q, p the policy, q the reference (Schulman 2020, "Approximating KL
divergence"):

    k1 = d                      unbiased, of either sign
    k2 = d^2 / 2                biased, small in variance
    k3 = exp(-d) - 1 + d        unbiased, never negative

What they are worth is one thing, what their gradient is another.  Expected gradient of
an estimator that stands in the loss, on the policy's own samples:

    k1                          0
    k2                          grad KL(p, q)
    k3                          grad KL(q, p)
    ratio k1, ratio k3          grad KL(p, q)         ratio = p / sg(p)

So k1 belongs in the reward, where the policy gradient makes it grad KL(p, q), and
without the ratio k1 in the loss does nothing but add noise.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jpeft.checks import check_count, check_positive, whole
from jpeft.objectives._arrays import choose, held, numbers, weights
from jpeft.objectives.weighted import Weighted, weighted_sum

# exp(20) is 5e8: beyond it a token would drown all others, and soon overflow.
MOST = 20.0


def guarded_exp(x: jax.Array) -> jax.Array:
    """exp of x held within +-20, where its gradient is that of x = +-20 as well: 0."""
    return jnp.exp(jnp.clip(x, -MOST, MOST))


ESTIMATORS = {
    "k1": lambda d: d,
    "k2": lambda d: 0.5 * jnp.square(d),
    "k3": lambda d: guarded_exp(-d) - 1 + d,
}


def estimate_kl(
    log_p: Any, log_q: Any, *, estimator: str = "k3", log_sampled: Any = None
) -> jax.Array:
    """The estimate at each token, (*batch,) float32.

    log_p, log_q: (*batch,), the policy's and the reference's log-probabilities of what
    was sampled; the gradient goes to log_p, and to log_q if that is not a constant.
    What is masked must be finite: `grpo_loss` sees to that itself.

    estimator: "k1", "k2" or "k3", see the module.
    log_sampled: of the policy that sampled; multiplies by exp(log_p - log_sampled), so
        that the gradient is that of KL(p, q).  On-policy that is log_p itself, whose
        gradient is stopped here.  (TRL: `use_bias_correction_kl`.)

    >>> import numpy as np
    >>> from jpeft.objectives import estimate_kl
    >>> log_p, log_q = np.float32([-1, -1]), np.float32([-1, -1.5])
    >>> print(np.asarray(estimate_kl(log_p, log_q)).round(3))
    [0.    0.107]
    """
    arrays = {"log_p": log_p, "log_q": log_q}
    if log_sampled is not None:
        arrays["log_sampled"] = log_sampled
    log_p, log_q, *rest = numbers("estimate_kl", **arrays)
    value = choose("estimate_kl", "estimator", estimator, ESTIMATORS)(log_p - log_q)
    for sampled in rest:
        value = guarded_exp(log_p - lax.stop_gradient(sampled)) * value
    return value


def clipped_share(log_p: Any, log_q: Any, mask: Any) -> Weighted:
    """The tokens at which |log p - log q| > 20, so that k3's exp was held there.

    >>> import numpy as np
    >>> from jpeft.objectives import clipped_share
    >>> log_p, log_q = np.float32([-1, -1]), np.float32([-2, -30])
    >>> float(clipped_share(log_p, log_q, np.ones(2)).mean())
    0.5
    """
    log_p, log_q = numbers("clipped_share", log_p=log_p, log_q=log_q)
    weight = weights("clipped_share", mask, log_p)
    beyond = jnp.abs(held(log_p, weight) - held(log_q, weight)) > MOST
    return weighted_sum(beyond.astype(log_p.dtype), weight)


def adapt_coefficient(
    coefficient: Any, kl: Any, *, target: float, episodes: int, horizon: int = 10_000
) -> jax.Array:
    """The coefficient after an update, such that the KL comes near `target`.

        coefficient * (1 + clip(kl / target - 1, -0.2, 0.2) * episodes / horizon)

    Ziegler et al. 2019, arXiv:1909.08593, section 2.2.  kl: the mean over episodes of
    the KL summed over an episode.  episodes: how many since the last update.  A fixed
    coefficient is one that is not updated.

    >>> from jpeft.objectives import adapt_coefficient
    >>> new = adapt_coefficient(0.1, 12.0, target=6.0, episodes=1000)  # too far: up 2 %
    >>> f"{new:.3f}"
    '0.102'
    """
    where = "adapt_coefficient"
    target = check_positive(where, "target", target)
    horizon = check_count(where, "horizon", horizon)
    episodes = whole(0, "a number of episodes, 0 or more")(where, "episodes", episodes)
    coefficient, kl = numbers(where, whole=True, coefficient=coefficient, kl=kl)
    error = jnp.clip(kl / target - 1, -0.2, 0.2)
    return coefficient * (1 + error * (episodes / horizon))
