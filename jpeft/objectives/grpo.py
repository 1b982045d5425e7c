"""GRPO and its kin: a policy gradient by groups of answers, without a value function.

With ratio = exp(new - old) at each token, A one advantage an answer (or a token):

    clipped    max(-A ratio, -A clip(ratio, 1 - low, 1 + high))       GRPO, DAPO
    gspo       the same, with one ratio an answer, exp(mean of new - old)
    cispo      -sg(min(ratio, cap)) A new
    + beta KL(policy, reference)

and a sum over tokens whose weights are a method of its own:

    "grpo"     mean over the tokens of each answer, then over answers
    "bnpo"     mean over all tokens of the micro-batch
    "dapo"     mean over all tokens of the whole step
    "dr_grpo"  sum over tokens / (answers * longest), a constant

GRPO: Shao et al. 2024, arXiv:2402.03300.  DAPO (clip-higher, truncated answers masked):
Yu et al. 2025, arXiv:2503.14476.  Dr. GRPO: Liu et al. 2025, arXiv:2503.20783.  GSPO:
Zheng et al. 2025, arXiv:2507.18071.  CISPO: MiniMax 2025, arXiv:2506.13585.  Two-sided
clip: INTELLECT-2, 2025, arXiv:2505.07291.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jpeft.checks import check_count, check_flag, check_positive, real, refusal
from jpeft.objectives._arrays import (
    check_shape,
    choose,
    held,
    numbers,
    ratio,
    weights,
)
from jpeft.objectives.kl import ESTIMATORS, guarded_exp
from jpeft.objectives.ppo import check_clip, check_clip_low, clipped
from jpeft.objectives.weighted import Weighted, weighted_sum

_check_beta = real(lambda x: x >= 0, "0 or more")


def grpo_loss(
    new: Any,
    advantages: Any,
    mask: Any,
    *,
    old: Any = None,
    reference: Any = None,
    truncated: Any = None,
    aggregation: str = "dapo",
    longest: int | None = None,
    kind: str = "clipped",
    level: str = "token",
    clip: float = 0.2,
    clip_high: float | None = None,
    most: float | None = None,
    cap: float = 5.0,
    beta: float = 0.0,
    estimator: str = "k3",
    corrected: bool = False,
) -> Weighted:
    """The loss, of which `.mean()` is the step's; gradients go to `new`.

    new, old, reference: (*batch, tokens), log-probabilities of what was sampled, at one
    temperature.  advantages: (*batch,), `group_relative`, or one a token.  mask: the
    answers' tokens.

    old: None on-policy: the ratio is exp(new - sg(new)), 1 with the gradient of new.
    truncated: (*batch,) bool, answers to leave out because they were cut off.
    aggregation: see the module.  A `Weighted` is what makes "dapo" exact over micro-
        batches and devices; "bnpo" gives the mean of each with count 1.  An answer
        without a token counts nowhere, save in "dr_grpo" (TRL counts it in "grpo" too,
        which dilutes the others).
    longest: "dr_grpo" alone: the most tokens that an answer may have.
    kind: "clipped" or "cispo".
    level: "token", or "sequence" for one ratio an answer (GSPO).
    clip, clip_high: the two eps; 0 is a value like others.  None above is `clip`.
    most: no ratio counts as more than this before clipping (two-sided clip; TRL's
        `delta`), which bounds the loss of a token with A < 0.  None is no bound.
    cap: "cispo" alone: the ratio's own bound, as TRL's `epsilon_high`; not 1 + eps.
    beta: weight of the KL term; above 0 it needs `reference`.
    estimator: of the KL, see `estimate_kl`.
    corrected: True multiplies the KL by the token's ratio, so that its gradient is that
        of KL(policy, reference) and not of the reverse.

    TRL's GRPO loss of the same `loss_type`; `level` is its `importance_sampling_level`.

    >>> import numpy as np
    >>> from jpeft.objectives import group_relative, grpo_loss
    >>> log_probs = np.full((2, 3), -1.0, np.float32)
    >>> mask = np.array([[1, 1, 1], [1, 0, 0]])
    >>> loss = grpo_loss(log_probs, group_relative(np.float32([1, 0])), mask)
    >>> int(loss.count), f"{loss.mean():.3f}"  # -(3 - 1) / 4 of the advantage 0.707
    (4, '-0.354')
    """
    where = "grpo_loss"
    new, advantages, weight, answer = _answers(where, new, advantages, mask, truncated)
    aggregate = choose(where, "aggregation", aggregation, AGGREGATIONS)
    beta = _check_beta(where, "beta", beta)
    ratios = choose(where, "level", level, _LEVELS)
    loss = choose(where, "kind", kind, _KINDS)
    if kind == "cispo" and clip_high is not None:
        raise refusal(where, "clip_high", clip_high, 'cap, the bound of "cispo"')
    low = check_clip_low(where, "clip", clip)
    high = low if clip_high is None else check_clip(where, "clip_high", clip_high)
    most = None if most is None else check_positive(where, "most", most)
    cap = check_positive(where, "cap", cap)
    corrected = check_flag(where, "corrected", corrected)
    if aggregation == "dr_grpo":
        if longest is None:
            raise refusal(
                where, "longest", None, 'the most tokens of an answer, for "dr_grpo"'
            )
        longest = check_count(where, "longest", longest)
    elif longest is not None:
        raise refusal(where, "longest", longest, f"None with {aggregation!r}")

    before = lax.stop_gradient(new)
    if old is not None:
        before = _beside(where, "old", old, new, weight)
    change = new - before
    each = ratios(change, weight)
    value = loss(each, new, advantages, low, high, most, cap)
    if reference is None and beta:
        raise refusal(where, "beta", beta, "0 without reference=log-probabilities")
    if beta:
        other = _beside(where, "reference", reference, new, weight)
        divergence = choose(where, "estimator", estimator, ESTIMATORS)(new - other)
        own = guarded_exp(change) if corrected else jnp.ones_like(new)
        value = value + beta * own * divergence
    return aggregate(value, weight, answer, longest)


def _answers(
    where: str, new: Any, advantages: Any, mask: Any, truncated: Any
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(new, one advantage a token, the weights, (*batch,) ones)."""
    (new,) = numbers(where, new=new)
    if new.ndim < 1:
        raise ValueError(f"{where}: new is one number: expected (..., tokens)")
    (advantages,) = numbers(where, advantages=advantages)
    weight = weights(where, mask, new)
    shape = np.shape(new)
    if advantages.shape == shape[:-1]:
        advantages = jnp.broadcast_to(advantages[..., None], shape)
    check_shape(where, "advantages", advantages, shape, f"or {shape[:-1]}")
    if truncated is not None:
        check_shape(where, "truncated", truncated, shape[:-1], "one for each answer")
        whole = ~jnp.asarray(truncated).astype(bool)
        weight = weight * whole[..., None].astype(weight.dtype)
    advantages = held(lax.stop_gradient(advantages).astype(new.dtype), weight)
    return held(new, weight), advantages, weight, jnp.ones_like(new[..., 0])


def _beside(
    where: str, name: str, x: Any, new: jax.Array, weight: jax.Array
) -> jax.Array:
    (x,) = numbers(where, **{name: x})
    check_shape(where, name, x, new.shape, "that of new")
    return held(lax.stop_gradient(x).astype(new.dtype), weight)


# --- ratios --------------------------------------------------------------------------


def _of_tokens(change: jax.Array, weight: jax.Array) -> jax.Array:
    return guarded_exp(change)


def _of_sequences(change: jax.Array, weight: jax.Array) -> jax.Array:
    """exp of the mean over an answer, the same at each of its tokens."""
    count = jnp.sum(weight, axis=-1, keepdims=True)
    mean = ratio(jnp.sum(change * weight, axis=-1, keepdims=True), count)
    return jnp.broadcast_to(guarded_exp(mean), change.shape)


_LEVELS = {"token": _of_tokens, "sequence": _of_sequences}


# --- losses of a token ---------------------------------------------------------------


def _clipped(
    ratio: jax.Array,
    new: jax.Array,
    advantages: jax.Array,
    low: float,
    high: float,
    most: float | None,
    cap: float,
) -> jax.Array:
    if most is None:
        return clipped(ratio, advantages, low, high)
    within = jnp.clip(ratio, 1 - low, 1 + high)
    return jnp.maximum(-advantages * jnp.minimum(ratio, most), -advantages * within)


def _cispo(
    ratio: jax.Array,
    new: jax.Array,
    advantages: jax.Array,
    low: float,
    high: float,
    most: float | None,
    cap: float,
) -> jax.Array:
    return -lax.stop_gradient(jnp.minimum(ratio, cap)) * advantages * new


_KINDS = {"clipped": _clipped, "cispo": _cispo}


# --- sums over tokens ----------------------------------------------------------------


def _by_answer(
    x: jax.Array, weight: jax.Array, answer: jax.Array, longest: Any
) -> Weighted:
    count = jnp.sum(weight, axis=-1)
    means = ratio(jnp.sum(x * weight, axis=-1), count)
    return weighted_sum(means, (count > 0).astype(x.dtype))


def _by_micro_batch(
    x: jax.Array, weight: jax.Array, answer: jax.Array, longest: Any
) -> Weighted:
    return Weighted(weighted_sum(x, weight).mean(), jnp.ones((), x.dtype))


def _by_step(
    x: jax.Array, weight: jax.Array, answer: jax.Array, longest: Any
) -> Weighted:
    return weighted_sum(x, weight)


def _by_constant(
    x: jax.Array, weight: jax.Array, answer: jax.Array, longest: int
) -> Weighted:
    return Weighted(jnp.sum(x * weight), jnp.sum(answer) * longest)


AGGREGATIONS: dict[str, Callable[..., Weighted]] = {
    "grpo": _by_answer,
    "bnpo": _by_micro_batch,
    "dapo": _by_step,
    "dr_grpo": _by_constant,
}
