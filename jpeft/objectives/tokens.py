"""Log-probabilities of tokens, and the supervised loss.

    log p(label)   = z[label] - logsumexp(z)          z = logits / temperature
    nll            = -log p(label)
    smoothed       = (1 - e) nll + e mean over the vocabulary of -log p
    z-loss         = c logsumexp(z)^2                 added to any of them
    dft            = sg(p(label)) nll

Label smoothing: Szegedy et al. 2016, arXiv:1512.00567.  z-loss: Chowdhery et al. 2022
(PaLM), arXiv:2204.02311.  dft, dynamic fine-tuning: Wu et al. 2025, arXiv:2508.05629.

Position t of the logits predicts token t + 1: `shift_labels` moves the labels there.
The label is found by comparison, not by a gather, so that logits cut along the
vocabulary stay where they are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jpeft.checks import check_number, check_positive, check_rate
from jpeft.leaf import wide_dtype
from jpeft.objectives._arrays import (
    check_shape,
    choose,
    held,
    integers,
    numbers,
    weights,
)
from jpeft.objectives.weighted import Weighted, weighted_sum


class TokenLoss(NamedTuple):
    """Which loss of a token: what `token_losses` is told."""

    kind: str = "nll"
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    temperature: float = 1.0


KINDS = {"nll": False, "dft": True}


def token_loss(
    where: str, kind: Any, label_smoothing: Any, z_loss: Any, temperature: Any
) -> TokenLoss:
    """The same, checked."""
    choose(where, "kind", kind, KINDS)
    return TokenLoss(
        kind,
        check_rate(where, "label_smoothing", label_smoothing),
        check_number(where, "z_loss", z_loss),
        check_positive(where, "temperature", temperature),
    )


def log_probs(logits: Any, labels: Any, *, temperature: float = 1.0) -> jax.Array:
    """log softmax(logits / temperature)[label], float32 also of bfloat16 logits.

    logits: (*batch, vocabulary), floating.  labels: (*batch,), integers.  The result
    is (*batch,).  A label outside of 0 ... vocabulary - 1 gives NaN; mask it.

    temperature: what was sampled with: that policy *is* softmax(logits / temperature),
        so the new, the old and the reference's log-probabilities all take the same.

    Equals -optax.softmax_cross_entropy_with_integer_labels(logits, labels) in float32.

    >>> import jax, numpy as np
    >>> from jpeft.objectives import log_probs
    >>> f"{jax.jit(log_probs)(np.zeros(4, np.float32), 2):.3f}"  # - log 4
    '-1.386'
    """
    logits, labels = logits_and_labels("log_probs", logits, labels)
    temperature = check_positive("log_probs", "temperature", temperature)
    return -token_losses(logits, labels, TokenLoss(temperature=temperature))


def entropy(logits: Any, *, temperature: float = 1.0) -> Float[Array, "*batch"]:
    """-sum p log p of softmax(logits / temperature) over the last axis, float32.

    >>> import numpy as np
    >>> from jpeft.objectives import entropy
    >>> f"{entropy(np.zeros(4, np.float32)):.3f}"  # log 4
    '1.386'
    """
    (logits,) = numbers("entropy", logits=logits)
    temperature = check_positive("entropy", "temperature", temperature)
    log_p = jax.nn.log_softmax(logits / temperature)
    p = jnp.exp(log_p)
    # A logit of -inf has p = 0 and log p = -inf, whose product is no number.
    return -jnp.sum(p * jnp.where(p > 0, log_p, 0.0), axis=-1)


def shift_labels(
    ids: Any, mask: Any, segment_ids: Any = None
) -> tuple[jax.Array, jax.Array]:
    """(labels, mask) for logits of every position: position t is to say token t + 1.

    ids, mask, segment_ids: (*batch, tokens); mask is 1 at the tokens to be learned (an
    answer's), segment_ids number the documents of a packed row.  Both results have that
    shape; the mask keeps its dtype.  The last position has nothing to say, and neither
    has one before another document's first token: label 0, mask 0.

    >>> import numpy as np
    >>> from jpeft.objectives import shift_labels
    >>> labels, mask = shift_labels(np.array([[5, 3, 1]]), np.array([[0, 1, 1]]))
    >>> labels.tolist(), mask.tolist()
    ([[3, 1, 0]], [[1, 1, 0]])
    """
    ids = integers("shift_labels", "ids", ids)
    weights("shift_labels", mask, ids)
    mask = jnp.asarray(mask)
    counts = _next(mask)
    if segment_ids is not None:
        segments = integers("shift_labels", "segment_ids", segment_ids)
        check_shape("shift_labels", "segment_ids", segments, ids.shape, "that of ids")
        same = segments == _next(segments)
        counts = jnp.where(same, counts, jnp.zeros((), mask.dtype))
    return _next(ids), counts


def _next(x: jax.Array) -> jax.Array:
    """x[t + 1] at t, zero at the last."""
    return jnp.concatenate([x[..., 1:], jnp.zeros_like(x[..., :1])], axis=-1)


def next_token_loss(
    logits: Any,
    labels: Any,
    mask: Any,
    *,
    kind: str = "nll",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    temperature: float = 1.0,
) -> Weighted:
    """The supervised loss: sum over the tokens that count, and how many they are.

    logits: (*batch, vocabulary).  labels: (*batch,), already where the logits predict
    them (`shift_labels`).  mask: (*batch,), bool or weights.  What is masked may hold
    any label (-100) and any logits, NaN among them.  A label outside of the vocabulary
    that counts makes the loss NaN: under `jit` nobody can see it earlier.

    kind: "nll", or "dft", whose gradient is that of -p rather than of -log p.
    label_smoothing: weight e of the uniform distribution over the whole vocabulary, the
        label's own entry included (as torch and optax have it); of "nll" only.
    z_loss: weight of logsumexp squared; PaLM's is 1e-4.

    For a vocabulary whose logits do not fit: `linear_cross_entropy`.

    >>> import jax, numpy as np
    >>> from jpeft.objectives import next_token_loss, shift_labels
    >>> ids, answer = np.array([[5, 3, 1]]), np.array([[0, 1, 1]])
    >>> labels, mask = jax.jit(shift_labels)(ids, answer)
    >>> logits = np.zeros((1, 3, 7), np.float32)
    >>> loss = jax.jit(next_token_loss)(logits, labels, mask)
    >>> int(loss.count), f"{loss.mean():.3f}"  # log 7
    (2, '1.946')
    """
    where = "next_token_loss"
    logits, labels = logits_and_labels(where, logits, labels)
    how = token_loss(where, kind, label_smoothing, z_loss, temperature)
    weight = weights(where, mask, logits[..., 0])
    labels = held(labels, weight)
    logits = held(logits, weight[..., None])
    return weighted_sum(token_losses(logits, labels, how), weight)


def logits_and_labels(
    where: str, logits: Any, labels: Any
) -> tuple[jax.Array, jax.Array]:
    (logits,) = numbers(where, logits=logits)
    labels = integers(where, "labels", labels)
    if logits.ndim < 1:
        raise ValueError(f"{where}: logits is one number: expected (..., vocabulary)")
    shape = np.shape(logits)
    check_shape(where, "labels", labels, shape[:-1], f"of logits {shape} but the last")
    return logits, labels


def token_losses(logits: jax.Array, labels: jax.Array, how: TokenLoss) -> jax.Array:
    """The loss of each token.  logits: (*batch, vocabulary), labels: (*batch,)."""
    z = logits.astype(wide_dtype(logits.dtype)) / how.temperature
    total = jax.nn.logsumexp(z, axis=-1)
    ids = lax.broadcasted_iota(labels.dtype, z.shape, z.ndim - 1)
    is_label = ids == labels[..., None]
    zero = jnp.zeros((), z.dtype)
    loss = total - jnp.sum(jnp.where(is_label, z, zero), axis=-1)
    if how.kind == "dft":
        loss = loss * lax.stop_gradient(jnp.exp(-loss))
    elif how.label_smoothing:
        uniform = total - jnp.mean(z, axis=-1)
        loss = (1 - how.label_smoothing) * loss + how.label_smoothing * uniform
    if how.z_loss:
        loss = loss + how.z_loss * jnp.square(total)
    known = (labels >= 0) & (labels < z.shape[-1])
    return loss * jnp.where(known, jnp.ones((), z.dtype), jnp.full((), np.nan, z.dtype))
