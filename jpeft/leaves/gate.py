"""Gates: how much of an adapter an example gets.  Mao et al. 2022, arXiv:2110.07577.

    g = mean over the sequence of sigmoid(x w + b)      w (*stack, *in)   b (*stack,)

x is what the gated part reads, (..., sequence, *in); g is one number an example.  The
sequence is the last axis of x before its features, so padding counts, as in the paper.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jpeft.adapt.equations import Labels, align
from jpeft.adapt.labels import contract


def open_gate(
    x: Float[Array, "..."],
    xl: Labels,
    leaf: Any,
    wanted: Labels,
    **options: Any,
) -> jax.Array:
    """g, shaped to scale an array that has the labels `wanted`.

    leaf: holds `gate` and `gate_bias`, whose labels are among those of x.
    """
    labels = leaf.labels()
    w, b = (getattr(leaf, n).astype(x.dtype) for n in ("gate", "gate_bias"))
    inputs = set(labels["gate"]) - set(labels["gate_bias"])
    keep = [k for k in xl if k not in inputs]
    logits, found = contract(x, xl, w, labels["gate"], keep, **options)
    g = jax.nn.sigmoid(logits + spread(b, labels["gate_bias"], found))
    free = [k for k in found if isinstance(k, tuple)]
    if free:
        g = jnp.mean(g, found.index(free[-1]), keepdims=True)
    return spread(g, found, wanted)


def spread(x: jax.Array, labels: Labels, wanted: Labels) -> jax.Array:
    """The array shaped to broadcast to one that has the labels `wanted`."""
    order = [k for k in wanted if k in labels]
    x = align(x, labels, order)
    return x.reshape([x.shape[order.index(k)] if k in order else 1 for k in wanted])
