"""AdaLoRA: a delta of singular triplets, from which a budget takes the least important.

    W' = W + s P diag(lam) Q    P (*stack, *in, rank)   lam (*stack, rank)
                                Q (*stack, rank, *out)  s = alpha / rank

Zhang et al. 2023, arXiv:2303.10512.  P and Q are Gaussian and lam is zero, so the model
starts as its base.  Three parts work together:

    jpeft.adalora               the leaves, each with the initial rank
    jpeft.orthogonality         ||P^T P - I||^2 + ||Q Q^T - I||^2, for the loss
    jpeft.optim.adalora_allocator   prunes triplets: their lam is held at zero

A triplet is pruned where its lam is exactly zero; nothing else marks it, and it may
come back until the allocator's final phase.  `jpeft.compact` then drops the pruned ones
for good.

Where we depart from the paper: it has no s (alpha=None is a scale of 1, the paper's),
and does not say how wide the Gaussian is; 0.02 is that of the authors' code.  Each
matrix of a stack (a scanned layer, an expert) is a matrix of its own.  The popular
implementation (PEFT) divides alpha by rank + 1e-5, for good by the initial rank.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jpeft import compat
from jpeft.attach import Ranked, check_rank
from jpeft.boxes import same_box, unbox
from jpeft.checks import Positive, Rate
from jpeft.leaf import (
    adapted_leaf,
    is_leaf,
    is_stored,
    layers,
    shapes_beside,
    static,
    trainable,
    wide_dtype,
)
from jpeft.leaves.draw import drawn, filled
from jpeft.leaves.low_rank import ActsAsLowRank, LowRank
from jpeft.transform import method
from jpeft.tree.layout import LeafUse
from jpeft.tree.paths import slots
from jpeft.types import PyTree

STD = 0.02
SQUARES, NORMS = "sum_of_squares", "mean_of_norms"

# --- the leaf ------------------------------------------------------------------------


@adapted_leaf
class Triplets(ActsAsLowRank):
    """W + scale * P.diag(lam).Q.

    p: (*stack, *in, rank); lam: (*stack, rank); q: (*stack, rank, *out).
    dropout: rate on the activation that enters P; active only where `adapt` has a key.
    """

    p: Any = trainable("sir")
    lam: Any = trainable("sr", off=0)
    q: Any = trainable("sro")
    scale: float = static(default=1.0)
    dropout: float = static(default=0.0)

    @property
    def rank(self) -> int:
        return unbox(self.lam).shape[-1]

    @property
    def stack_ndim(self) -> int:
        """How many axes count matrices."""
        return self.axes.count("s")

    def as_low_rank(self) -> LowRank:
        return LowRank(
            base=self.base,
            axes=self.axes,
            a=self.p * along_rank(self.lam, self.p.ndim),
            b=self.q,
            scale=self.scale,
            dropout=self.dropout,
            origin=self.origin,
            path=self.path,
            key=self.key,
        )


def along_rank(lam: Float[Array, "..."], ndim: int) -> Float[Array, "..."]:
    """lam (*stack, rank) with axes of size 1 in between, to scale P."""
    *stack, rank = lam.shape
    return lam.reshape(*stack, *[1] * (ndim - lam.ndim), rank)


def triplets(tree: PyTree) -> list[Triplets]:
    """Every leaf of this kind, also in the trees of gradients and of updates."""
    return [
        leaf
        for slot in slots(tree).values
        for leaf in layers(slot)
        if isinstance(leaf, Triplets)
    ]


# --- the method ----------------------------------------------------------------------


@method("adalora")
@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaLoRA(Ranked):
    """A transform that gives each selected weight `rank` singular triplets to prune.

        W' = W + s P diag(lam) Q       s = alpha / rank

    Zhang et al. 2023, arXiv:2303.10512.  The ranks come down in training, by
    `jpeft.optim.adalora_allocator` around the optimiser; add a multiple of
    `jpeft.orthogonality(params)` to the loss (0.1 in most of the paper's runs), and
    call `jpeft.compact(params)` at the end.

    rank: initial rank; the paper takes 1.5 times the one aimed at.
    alpha: numerator of the scale; None means `rank`, that is a scale of 1, the paper's.
    where, exclude: which weights; see `jpeft.tree.where`.
    dropout: rate on the activations that enter P, drawn where `adapt` is given a key.
    std: of the Gaussian that P and Q start from.
    dtype: of P, lam and Q; None means float32, or float64 beside float64.
    rank_pattern, alpha_pattern: {regular expression for the whole path: value}.

    Raises as `jpeft.lora` does.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = {"dense": {"kernel": jnp.ones((7, 5))}}
    >>> params = jpeft.adalora(rank=3)(jax.random.key(0), params)
    >>> leaf = params["dense"]["kernel"]
    >>> leaf.p.shape, leaf.lam.shape, leaf.q.shape
    ((7, 3), (3,), (3, 5))
    """

    dropout: Rate = 0.0
    std: Positive = STD

    def attach(self, key: jax.Array, path: str, base: Any, use: LeafUse) -> Triplets:
        rank, alpha = self.rank_of(path), self.alpha_of(path)
        check_rank(path, rank, use)
        dtype = self.adapter_dtype(base)
        assert use.axes is not None
        shapes = shapes_beside(Triplets, use.shape, use.axes, r=rank)
        of_p, of_q = jax.random.split(key)
        normal = lambda k, s: self.std * jax.random.normal(k, s, jnp.float32)
        draw = lambda k, n: drawn(normal, k, shapes[n]).astype(dtype)
        return Triplets(
            base=base,
            axes=use.axes,
            p=draw(of_p, "p"),
            lam=filled(shapes["lam"], 0, dtype),
            q=draw(of_q, "q"),
            scale=float((rank if alpha is None else alpha) / rank),
            dropout=float(self.dropout),
        )


adalora = AdaLoRA


# --- the penalty ---------------------------------------------------------------------


def orthogonality(params: PyTree, *, form: str = SQUARES) -> Float[Array, ""]:
    """How far P and Q are from orthonormal, for the loss: a scalar.

    form: "sum_of_squares" is the paper's, the sum over all matrices of
    ||P^T P - I||_F^2 + ||Q Q^T - I||_F^2.  "mean_of_norms" is that of the authors' code
    and of PEFT: the mean over all P and Q of ||P^T P - I||_F, which does not grow with
    the number of matrices.

    params: the whole tree or its trainable part.  Raises ValueError if no leaf of it is
    AdaLoRA's.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = jpeft.adalora(rank=3)(jax.random.key(0), {"kernel": jnp.ones((5, 7))})
    >>> loss = 0.25  # the task's own
    >>> bool(loss + 0.1 * jpeft.orthogonality(params) > loss)
    True
    """
    if form not in (SQUARES, NORMS):
        raise ValueError(
            f"orthogonality: form={form!r}: expected {SQUARES!r} or {NORMS!r}"
        )
    found = triplets(params)
    if not found:
        raise ValueError(f"orthogonality: {NO_TRIPLETS}")
    squares = [_off_orthonormal(x) for x in found]
    if form == SQUARES:
        return functools.reduce(jnp.add, [jnp.sum(x) for x in squares])
    norms = jnp.concatenate([x.reshape(-1) for x in squares])
    # The root of zero has no gradient; an orthonormal P should get none.
    safe = jnp.where(norms > 0, norms, jnp.ones_like(norms))
    return jnp.mean(jnp.where(norms > 0, jnp.sqrt(safe), jnp.zeros_like(norms)))


NO_TRIPLETS = (
    "this tree has no AdaLoRA leaf; apply the transform first: params = "
    "jpeft.adalora(rank=12)(jax.random.key(0), params)"
)


def _off_orthonormal(leaf: Triplets) -> Float[Array, "2 m"]:
    s = leaf.stack_ndim
    p, q = (
        jnp.asarray(x).astype(wide_dtype(x.dtype))
        for x in (unbox(leaf.p), unbox(leaf.q))
    )
    columns = p.reshape(-1, int(np.prod(p.shape[s:-1])), leaf.rank)
    rows = q.reshape(-1, leaf.rank, int(np.prod(q.shape[s + 1 :])))
    return jnp.stack(
        [off_orthonormal(columns), off_orthonormal(jnp.swapaxes(rows, 1, 2))]
    )


def off_orthonormal(x: Float[Array, "m n rank"]) -> Float[Array, " m"]:
    """||X^T X - I||_F^2 of each matrix."""
    gram = jnp.einsum("mnr,mnt->mrt", x, x, precision=lax.Precision.HIGHEST)
    off = gram - jnp.eye(x.shape[-1], dtype=x.dtype)[None]
    return jnp.sum(jnp.square(off), (1, 2))


# --- the end -------------------------------------------------------------------------


def compact(params: PyTree) -> PyTree:
    """The same model with pruned triplets dropped: every leaf has its kept rank.

    A weight that kept none loses its leaf and is the base again.  A stack has the
    largest rank of its matrices; the others are padded with triplets of zeros, which
    get no gradient.  The scale stays what it was.  Leaves of other methods are not
    touched; the result saves, merges and trains as any adapted tree.

    Raises ValueError if the tree has no AdaLoRA leaf, or no triplet that is not pruned
    (as before the first step, when every lam is zero), and under `jit`, because the
    shapes depend on values.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = jpeft.adalora(rank=3)(jax.random.key(0), {"kernel": jnp.ones((5, 7))})
    >>> lam = jnp.array([2.0, 0.0, 1.0])  # a budget pruned the second one
    >>> params = {"kernel": params["kernel"].replace(lam=lam)}
    >>> jpeft.compact(params)["kernel"].p.shape
    (5, 2)
    """
    found = triplets(params)
    if not found:
        raise ValueError(f"compact: {NO_TRIPLETS}")
    if any(isinstance(unbox(x.lam), compat.Tracer) for x in found):
        raise ValueError(
            "compact: the shapes of the result depend on values; call it outside of "
            "jax.jit"
        )
    if not any(np.any(unbox(x.lam)) for x in found):
        raise ValueError(
            "compact: every lam is zero, so nothing would be left; train first, with "
            "jpeft.optim.adalora_allocator around the optimiser"
        )
    flat = slots(params)
    return flat.rebuild(_compacted(x) for x in flat.values)


def _compacted(slot: Any) -> Any:
    if not is_leaf(slot) or is_stored(slot):
        return slot
    leaf = slot.replace(base=_compacted(slot.base))
    if not isinstance(leaf, Triplets):
        return leaf
    p, lam, q = (np.asarray(unbox(x)) for x in (leaf.p, leaf.lam, leaf.q))
    rank = int(np.max(np.sum(lam != 0, -1)))
    if rank == 0:
        return leaf.base
    small = kept_triplets(p, lam, q, rank)
    arrays = dict(zip(("p", "lam", "q"), small, strict=True))
    return leaf.replace(
        **{n: _like(getattr(leaf, n), x) for n, x in arrays.items()},
    )


def _like(old: Any, new: np.ndarray) -> Any:
    """The new array in the old one's box, on its mesh."""
    return same_box(old, jax.device_put(new, getattr(unbox(old), "sharding", None)))


def kept_triplets(
    p: np.ndarray, lam: np.ndarray, q: np.ndarray, rank: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """P, lam and Q of the first `rank` triplets that are not zero, zeros after them.

    p (*stack, *in, r), lam (*stack, r), q (*stack, r, *out).
    """
    stack, s = lam.shape[:-1], lam.ndim - 1
    order = np.argsort(lam == 0, -1, kind="stable")[..., :rank]
    live = np.take_along_axis(lam, order, -1) != 0

    def on(x: np.ndarray, axis: int) -> np.ndarray:
        shape = [1] * x.ndim
        shape[:s], shape[axis] = stack, rank
        kept = np.take_along_axis(x, order.reshape(shape), axis)
        return np.where(live.reshape(shape), kept, np.zeros((), x.dtype))

    return on(p, p.ndim - 1), on(lam, s), on(q, s)
