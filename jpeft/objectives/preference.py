"""DPO and its kin: pairs of answers without a reward model.

Log-probabilities are sums over an answer's tokens (`sequence_log_probs`), and

    c = log p(chosen) - log ref(chosen)       d = the same of the rejected answer
    D = c - d                                 b = beta       ls = log sigmoid

Every loss is a function of arrays (*pairs,) that gives one float32 number a pair;
`preference_loss` picks one by name and returns the `Weighted` of a batch.

    dpo             -ls(bD)                                Rafailov 2023, 2305.18290
                    -(1-e) ls(bD) - e ls(-bD), smoothed    Mitchell 2023, cDPO
    robust_dpo      (-(1-e) ls(bD) + e ls(-bD)) / (1-2e)   Chowdhury 2024, 2403.00409
    hinge           max(0, 1 - bD)                         Zhao 2023, 2305.10425
    ipo             (c/n_c - d/n_d - 1/2b)^2               Azar 2023, 2310.12036
    ipo_summed      (D - 1/2b)^2
    normalised_dpo  -ls(b (c/n_c - d/n_d))                 Lambert 2024, 2411.15124
    nca             -ls(bc) - ls(-bc)/2 - ls(-bd)/2        Chen 2024, 2402.05369
    bco             -ls(bc - delta) - ls(delta - bd)       Jung 2024, 2404.04656
    sppo            (c - 1/2b)^2 + (d + 1/2b)^2            Wu 2024, 2405.00675
    apo_zero        1 - s(bc) + s(bd)                      D'Oosterlinck 2024,
    apo_down        s(bc) + 1 - s(bD)                          2408.06266
    exo             KL((s(bD), s(-bD)), (1-e, e))          Ji 2024, 2402.00856
    discopop        -ls(bD) (1 - m) + exp(-bD) m           Lu 2024, 2406.08414
    f_dpo           -ls(b (f(c) - f(d)))                   Wang 2023, 2309.16240

without a reference, c' = log p(chosen) and d' = log p(rejected):

    cpo             -ls(b (c' - d'))                       Xu 2024, 2401.08417
    simpo           -ls(b (mean c' - mean d') - gamma)     Meng 2024, 2405.14734
    orpo            -ls(log odds(c') - log odds(d'))       Hong 2024, 2403.07691

and unpaired: `kto`, Ethayarajh 2024, 2402.01306.  The numbers are arXiv's; s is the
sigmoid; robust_dpo to f_dpo as TRL has them.

The log-probabilities of both answers may fall while the margin grows: log them apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jpeft.checks import check_number, check_positive, real
from jpeft.objectives._arrays import choose, held, numbers, ratio, weights
from jpeft.objectives.kl import guarded_exp
from jpeft.objectives.reward import pair_weights
from jpeft.objectives.weighted import Weighted, weighted_sum

_check_half = real(lambda x: 0 <= x < 0.5, "from 0 up to, not including, 0.5")
_check_small = real(lambda x: 0 < x < 1, "between 0 and 1")
_ls = jax.nn.log_sigmoid


def sequence_log_probs(log_probs: Any, mask: Any) -> tuple[jax.Array, jax.Array]:
    """(sums over an answer's tokens, how many they are), both (*batch,) float32.

    log_probs, mask: (*batch, tokens).  An answer without a token has sum and count 0.

    >>> import numpy as np
    >>> from jpeft.objectives import sequence_log_probs
    >>> log_probs, mask = np.float32([[-1, -2, -4]]), np.array([[0, 1, 1]])
    >>> sums, counts = sequence_log_probs(log_probs, mask)
    >>> float(sums[0]), float(counts[0])
    (-6.0, 2.0)
    """
    (log_probs,) = numbers("sequence_log_probs", log_probs=log_probs)
    weight = weights("sequence_log_probs", mask, log_probs)
    total = jnp.sum(held(log_probs, weight) * weight, axis=-1)
    return total, jnp.sum(weight, axis=-1)


# --- with a reference: c and d -------------------------------------------------------


def dpo(
    chosen: Any, rejected: Any, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> jax.Array:
    """-ls(b(c - d)); label_smoothing: the share e of pairs labelled the wrong way round
    (cDPO).  TRL's "sigmoid" takes no smoothing; its "robust" is `robust_dpo`.

    >>> import numpy as np
    >>> from jpeft.objectives import dpo
    >>> chosen, rejected = np.float32([1, 0]), np.float32([-1, 0.5])
    >>> print(np.asarray(dpo(chosen, rejected)).round(3))
    [0.598 0.718]
    """
    x = _scaled("dpo", chosen, rejected, beta)
    e = _check_half("dpo", "label_smoothing", label_smoothing)
    return -(1 - e) * _ls(x) - e * _ls(-x)


def robust_dpo(
    chosen: Any, rejected: Any, *, beta: float = 0.1, label_smoothing: float = 0.1
) -> jax.Array:
    """DPO whose expectation is right where a share e of labels is flipped.

    >>> import numpy as np
    >>> from jpeft.objectives import robust_dpo
    >>> chosen, rejected = np.float32([1, 0]), np.float32([-1, 0.5])
    >>> print(np.asarray(robust_dpo(chosen, rejected)).round(3))
    [0.573 0.725]
    """
    x = _scaled("robust_dpo", chosen, rejected, beta)
    e = _check_half("robust_dpo", "label_smoothing", label_smoothing)
    return (-(1 - e) * _ls(x) + e * _ls(-x)) / (1 - 2 * e)


def hinge(chosen: Any, rejected: Any, *, beta: float = 0.1) -> jax.Array:
    """max(0, 1 - b(c - d)), of SLiC.

    >>> import numpy as np
    >>> from jpeft.objectives import hinge
    >>> chosen, rejected = np.float32([1, 0]), np.float32([-1, 0.5])
    >>> print(np.asarray(hinge(chosen, rejected)).round(3))
    [0.8  1.05]
    """
    return jnp.maximum(0.0, 1 - _scaled("hinge", chosen, rejected, beta))


def ipo(
    chosen: Any,
    rejected: Any,
    chosen_tokens: Any,
    rejected_tokens: Any,
    *,
    beta: float = 0.1,
) -> jax.Array:
    """(c / n_c - d / n_d - 1 / 2b)^2: averaged over tokens, as the authors and TRL.

    >>> import numpy as np
    >>> from jpeft.objectives import ipo
    >>> chosen, rejected = np.float32([-4, -2]), np.float32([-6, -1])
    >>> loss = ipo(chosen, rejected, np.array([4, 2]), np.array([3, 2]))
    >>> print(np.asarray(loss).round(3))
    [16.   30.25]
    """
    args = chosen, rejected, chosen_tokens, rejected_tokens
    c, d = _means("ipo", *args)
    return jnp.square(c - d - 0.5 / check_positive("ipo", "beta", beta))


def ipo_summed(chosen: Any, rejected: Any, *, beta: float = 0.1) -> jax.Array:
    """(c - d - 1 / 2b)^2 of sums, which longer answers move further.

    >>> import numpy as np
    >>> from jpeft.objectives import ipo_summed
    >>> chosen, rejected = np.float32([1, 0]), np.float32([-1, 0.5])
    >>> print(np.asarray(ipo_summed(chosen, rejected)).round(3))
    [ 9.   30.25]
    """
    c, d = _pair("ipo_summed", chosen, rejected)
    return jnp.square(c - d - 0.5 / check_positive("ipo_summed", "beta", beta))


def normalised_dpo(
    chosen: Any,
    rejected: Any,
    chosen_tokens: Any,
    rejected_tokens: Any,
    *,
    beta: float = 0.1,
) -> jax.Array:
    """-ls(b(c / n_c - d / n_d)): TRL's "sigmoid_norm".

    >>> import numpy as np
    >>> from jpeft.objectives import normalised_dpo
    >>> chosen, rejected = np.float32([-4, -2]), np.float32([-6, -1])
    >>> loss = normalised_dpo(chosen, rejected, np.array([4, 2]), np.array([3, 2]))
    >>> print(np.asarray(loss).round(3))
    [0.644 0.718]
    """
    args = chosen, rejected, chosen_tokens, rejected_tokens
    c, d = _means("normalised_dpo", *args)
    return -_ls(check_positive("normalised_dpo", "beta", beta) * (c - d))


def nca(chosen: Any, rejected: Any, *, beta: float = 0.1) -> jax.Array:
    """Each answer against zero: TRL's "nca_pair".

    >>> import numpy as np
    >>> from jpeft.objectives import nca
    >>> chosen, rejected = np.float32([1, 0]), np.float32([-1, 0.5])
    >>> print(np.asarray(nca(chosen, rejected)).round(3))
    [1.339 1.399]
    """
    c, d = _scaled_pair("nca", chosen, rejected, beta)
    return -_ls(c) - 0.5 * _ls(-c) - 0.5 * _ls(-d)


def bco(
    chosen: Any, rejected: Any, *, beta: float = 0.1, delta: Any = 0.0
) -> jax.Array:
    """Chosen above, rejected below `delta`, a running mean of rewards b c and b d that
    the caller keeps (no gradient goes there): TRL's "bco_pair".

    >>> import numpy as np
    >>> from jpeft.objectives import bco
    >>> chosen, rejected = np.float32([1, 0]), np.float32([-1, 0.5])
    >>> print(np.asarray(bco(chosen, rejected)).round(3))
    [1.289 1.412]
    """
    c, d = _scaled_pair("bco", chosen, rejected, beta)
    delta = lax.stop_gradient(jnp.asarray(delta, c.dtype))
    return -_ls(c - delta) - _ls(-(d - delta))


def sppo(chosen: Any, rejected: Any, *, beta: float = 0.1) -> jax.Array:
    """(c - 1 / 2b)^2 + (d + 1 / 2b)^2, with hard labels: TRL's "sppo_hard".

    >>> import numpy as np
    >>> from jpeft.objectives import sppo
    >>> chosen, rejected = np.float32([1, 0]), np.float32([-1, 0.5])
    >>> print(np.asarray(sppo(chosen, rejected)).round(3))
    [32.   55.25]
    """
    c, d = _pair("sppo", chosen, rejected)
    half = 0.5 / check_positive("sppo", "beta", beta)
    return jnp.square(c - half) + jnp.square(d + half)


def apo_zero(chosen: Any, rejected: Any, *, beta: float = 0.1) -> jax.Array:
    """For a policy worse than the chosen answers: they rise, the rejected fall.

    >>> import numpy as np
    >>> from jpeft.objectives import apo_zero
    >>> chosen, rejected = np.float32([1, 0]), np.float32([-1, 0.5])
    >>> print(np.asarray(apo_zero(chosen, rejected)).round(3))
    [0.95  1.012]
    """
    c, d = _scaled_pair("apo_zero", chosen, rejected, beta)
    return 1 - jax.nn.sigmoid(c) + jax.nn.sigmoid(d)


def apo_down(chosen: Any, rejected: Any, *, beta: float = 0.1) -> jax.Array:
    """For a policy better than the chosen answers: both fall, the rejected further.

    >>> import numpy as np
    >>> from jpeft.objectives import apo_down
    >>> chosen, rejected = np.float32([1, 0]), np.float32([-1, 0.5])
    >>> print(np.asarray(apo_down(chosen, rejected)).round(3))
    [0.975 1.012]
    """
    c, d = _scaled_pair("apo_down", chosen, rejected, beta)
    return jax.nn.sigmoid(c) + 1 - jax.nn.sigmoid(c - d)


def exo(
    chosen: Any, rejected: Any, *, beta: float = 0.1, label_smoothing: float = 1e-3
) -> jax.Array:
    """KL of the policy's preference from the labels', 1 - e and e: TRL's "exo_pair".

    >>> import numpy as np
    >>> from jpeft.objectives import exo
    >>> chosen, rejected = np.float32([1, 0]), np.float32([-1, 0.5])
    >>> print(np.asarray(exo(chosen, rejected)).round(3))
    [2.422 2.848]
    """
    x = _scaled("exo", chosen, rejected, beta)
    e = _check_small("exo", "label_smoothing", label_smoothing)
    return jax.nn.sigmoid(x) * (_ls(x) - np.log1p(-e)) + jax.nn.sigmoid(-x) * (
        _ls(-x) - np.log(e)
    )


def discopop(
    chosen: Any, rejected: Any, *, beta: float = 0.1, temperature: float = 0.05
) -> jax.Array:
    """The log-ratio modulated loss that a search found: TRL's "discopop".

    temperature: tau.  exp(-bD) is held within exp(+-20).

    >>> import numpy as np
    >>> from jpeft.objectives import discopop
    >>> chosen, rejected = np.float32([1, 0]), np.float32([-1, 0.5])
    >>> print(np.asarray(discopop(chosen, rejected)).round(3))
    [0.815 0.808]
    """
    x = _scaled("discopop", chosen, rejected, beta)
    m = jax.nn.sigmoid(x / check_positive("discopop", "temperature", temperature))
    return -_ls(x) * (1 - m) + guarded_exp(-x) * m


def f_dpo(
    chosen: Any,
    rejected: Any,
    *,
    beta: float = 0.1,
    divergence: str = "forward_kl",
) -> jax.Array:
    """DPO under another divergence: f(c) in place of c.

    divergence: "forward_kl", f(c) = -exp(-c); "js", f(c) = ls(c), up to a constant that
        both answers share; "reverse_kl" is `dpo` itself.

    >>> import numpy as np
    >>> from jpeft.objectives import f_dpo
    >>> chosen, rejected = np.float32([1, 0]), np.float32([-1, 0.5])
    >>> print(np.asarray(f_dpo(chosen, rejected)).round(3))
    [0.583 0.713]
    """
    f = choose("f_dpo", "divergence", divergence, DIVERGENCES)
    c, d = _pair("f_dpo", chosen, rejected)
    return -_ls(check_positive("f_dpo", "beta", beta) * (f(c) - f(d)))


DIVERGENCES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "reverse_kl": lambda x: x,
    "forward_kl": lambda x: -guarded_exp(-x),
    "js": _ls,
}


# --- without a reference -------------------------------------------------------------


def cpo(chosen: Any, rejected: Any, *, beta: float = 0.1) -> jax.Array:
    """-ls(b(log p(chosen) - log p(rejected))), the preference term.

    The paper adds the mean negative log-likelihood of the chosen answers,
    `next_token_loss`, which TRL weighs with `cpo_alpha`.

    >>> import numpy as np
    >>> from jpeft.objectives import cpo
    >>> chosen, rejected = np.float32([1, 0]), np.float32([-1, 0.5])
    >>> print(np.asarray(cpo(chosen, rejected)).round(3))
    [0.598 0.718]
    """
    return -_ls(_scaled("cpo", chosen, rejected, beta))


def simpo(
    chosen: Any,
    rejected: Any,
    chosen_tokens: Any,
    rejected_tokens: Any,
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
) -> jax.Array:
    """-ls(b(mean log p(chosen) - mean log p(rejected)) - gamma).

    gamma: the margin itself, as in the paper; TRL's `simpo_gamma` is gamma as well, and
    stands there as (mean - mean - gamma / b).

    >>> import numpy as np
    >>> from jpeft.objectives import simpo
    >>> chosen, rejected = np.float32([-4, -2]), np.float32([-6, -1])
    >>> loss = simpo(chosen, rejected, np.array([4, 2]), np.array([3, 2]))
    >>> print(np.asarray(loss).round(3))
    [0.313 2.127]
    """
    args = chosen, rejected, chosen_tokens, rejected_tokens
    c, d = _means("simpo", *args)
    gamma = check_number("simpo", "gamma", gamma)
    return -_ls(check_positive("simpo", "beta", beta) * (c - d) - gamma)


def orpo(
    chosen: Any, rejected: Any, chosen_tokens: Any, rejected_tokens: Any
) -> jax.Array:
    """The odds term; log odds = a - log(1 - e^a) with a the mean log p of a token.

    The whole loss is nll(chosen) + 0.1 orpo(...): the authors and TRL take the former
    over prompt and answer, others over the answer; that is the mask of
    `next_token_loss`.  a is held below -1e-6, where an answer is certain.

    >>> import numpy as np
    >>> from jpeft.objectives import orpo
    >>> chosen, rejected = np.float32([-4, -2]), np.float32([-6, -1])
    >>> loss = orpo(chosen, rejected, np.array([4, 2]), np.array([3, 2]))
    >>> print(np.asarray(loss).round(3))
    [0.238 1.294]
    """
    args = chosen, rejected, chosen_tokens, rejected_tokens
    c, d = (jnp.minimum(x, -1e-6) for x in _means("orpo", *args))
    odds = lambda a: a - _log1mexp(a)
    return -_ls(odds(c) - odds(d))


def _log1mexp(a: jax.Array) -> jax.Array:
    """log(1 - e^a) for a < 0, by the form that keeps its digits (Maechler 2012)."""
    near = a > -0.6931472
    # Each branch is given a number that it has a finite gradient for.
    half = jnp.full((), -0.6931472, a.dtype)
    small, large = jnp.where(near, a, half), jnp.where(near, half, a)
    return jnp.where(near, jnp.log(-jnp.expm1(small)), jnp.log1p(-jnp.exp(large)))


# --- unpaired ------------------------------------------------------------------------


def kto(
    log_ratios: Any,
    desirable: Any,
    divergence: Any,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    weight: Any = None,
) -> Weighted:
    """Answers that are each good or bad, against what the policy does on average.

        desirable     w_d (1 - s(b (c - z)))        z = `kto_divergence`
        undesirable   w_u (1 - s(b (z - c)))

    log_ratios: (*batch,), c of each answer.  desirable: (*batch,) bool.  divergence: a
    scalar; held above 0, without a gradient.  desirable_weight, undesirable_weight: to
    balance how many there are of each; they scale the sum, not the count (as TRL).
    weight: (*batch,), 0 for what is no example; None counts all.

    >>> import numpy as np
    >>> from jpeft.objectives import kto
    >>> log_ratios, desirable = np.float32([1, -1]), np.array([True, False])
    >>> f"{kto(log_ratios, desirable, np.float32(0)).mean():.3f}"  # 1 - s(0.1)
    '0.475'
    """
    where = "kto"
    (c,) = numbers(where, log_ratios=log_ratios)
    weight = pair_weights(where, weight, c)
    good = weights(where, desirable, c, "desirable") != 0
    beta = check_positive(where, "beta", beta)
    w_good = check_positive(where, "desirable_weight", desirable_weight)
    w_bad = check_positive(where, "undesirable_weight", undesirable_weight)
    z = lax.stop_gradient(jnp.maximum(jnp.asarray(divergence, c.dtype), 0))
    if z.ndim:
        raise ValueError(
            f"kto: divergence has shape {z.shape}: expected a scalar, "
            "kto_divergence(...).mean()"
        )
    c = held(c, weight)
    ahead = jnp.where(good, c - z, z - c)
    scale = jnp.where(good, jnp.asarray(w_good, c.dtype), jnp.asarray(w_bad, c.dtype))
    return weighted_sum(scale * (1 - jax.nn.sigmoid(beta * ahead)), weight)


def kto_divergence(mismatched: Any, *, weight: Any = None) -> Weighted:
    """The mean log-ratio of answers to *other* prompts, whose mean is `kto`'s z.

    mismatched: (*batch,), log p - log ref of each prompt with another one's answer (of
    a batch, answers moved on by one; a batch of one has none).  A `Weighted`, so that
    it is put together over devices: `.psum("data").mean()`.  No gradient.

    >>> import numpy as np
    >>> from jpeft.objectives import kto_divergence
    >>> float(kto_divergence(np.float32([0.5, 1.5])).mean())
    1.0
    """
    (c,) = numbers("kto_divergence", mismatched=mismatched)
    weight = pair_weights("kto_divergence", weight, c)
    return weighted_sum(lax.stop_gradient(c), weight)


# --- by name -------------------------------------------------------------------------

LOSSES: dict[str, Callable[..., jax.Array]] = {
    f.__name__: f
    for f in (
        dpo,
        robust_dpo,
        hinge,
        ipo,
        ipo_summed,
        normalised_dpo,
        nca,
        bco,
        sppo,
        apo_zero,
        apo_down,
        exo,
        discopop,
        f_dpo,
        cpo,
        simpo,
        orpo,
    )
}


def preference_loss(
    loss: str, *args: Any, weight: Any = None, **options: Any
) -> Weighted:
    """The loss of that name, summed over pairs, and how many there are.

    args, options: its own: `preference_loss("ipo", c, d, n_c, n_d, beta=0.1)`.
    weight: (*pairs,), 0 for what is no pair; None counts all.

    >>> import jax.numpy as jnp
    >>> from jpeft.objectives import preference_loss
    >>> f"{preference_loss('dpo', jnp.ones(1), -0.5 * jnp.ones(1)).mean():.4f}"
    '0.6210'
    """
    function = choose("preference_loss", "loss", loss, LOSSES)
    arrays = function.__code__.co_varnames[: function.__code__.co_argcount]
    known = function.__kwdefaults__ or {}
    if len(args) != len(arrays) or not set(options) <= set(known):
        raise TypeError(
            f"preference_loss: {loss!r} with {len(args)} arrays and options "
            f"{sorted(options)}: expected the arrays {arrays}"
            + (f" and of options {tuple(known)}" if known else " and no options")
        )
    (first,) = numbers("preference_loss", chosen=args[0])
    weight = pair_weights("preference_loss", weight, first)
    # What is no pair may hold NaN: its gradient must not.
    args = tuple(held(jnp.asarray(x), weight) for x in args)
    return weighted_sum(function(*args, **options), weight)


# --- arguments -----------------------------------------------------------------------


def _pair(where: str, chosen: Any, rejected: Any) -> list[jax.Array]:
    return numbers(where, chosen=chosen, rejected=rejected)


def _scaled_pair(
    where: str, chosen: Any, rejected: Any, beta: float
) -> tuple[jax.Array, jax.Array]:
    beta = check_positive(where, "beta", beta)
    c, d = _pair(where, chosen, rejected)
    return beta * c, beta * d


def _scaled(where: str, chosen: Any, rejected: Any, beta: float) -> jax.Array:
    c, d = _pair(where, chosen, rejected)
    return check_positive(where, "beta", beta) * (c - d)


def _means(
    where: str, chosen: Any, rejected: Any, chosen_tokens: Any, rejected_tokens: Any
) -> tuple[jax.Array, jax.Array]:
    """Sums over their counts of tokens, which may be integers."""
    c, d = _pair(where, chosen, rejected)
    counts = numbers(
        where, whole=True, chosen_tokens=chosen_tokens, rejected_tokens=rejected_tokens
    )
    n_c, n_d = (lax.stop_gradient(n).astype(c.dtype) for n in counts)
    if n_c.shape != c.shape:
        raise ValueError(
            f"{where}: chosen_tokens has shape {n_c.shape}: expected {c.shape}, that "
            "of chosen"
        )
    return ratio(c, n_c), ratio(d, n_d)
