"""AdaLoRA's allocator: which singular triplets the budget of ranks is spent on.

Zhang et al. 2023, arXiv:2303.10512, algorithm 1.  For every entry w of P, lam and Q,
with its gradient g at step t = 1, 2, ...:

    I = |w g|                                     importance
    S = beta1 S + (1 - beta1) I                   sensitivity, smoothed
    U = beta2 U + (1 - beta2) |I - S|             uncertainty
    s = S U

    score of a triplet = s(lam) + mean s of its column of P + mean s of its row of Q

Of all triplets of all matrices the b(t) with the highest scores keep the lam that the
optimiser gave them, and the others' lam is set to zero:

    b(t) = b0                                        t <= t_init
    b(t) = bT + (b0 - bT) (1 - (t - t_init) / n)^3   n = total - t_init - t_final
    b(t) = bT, and the choice is fixed               t > total - t_final

P and Q, and the optimiser's moments, go on as if nothing had happened, so a pruned
triplet may come back while the choice is not fixed.

Where we depart from the paper's print: it writes t - t_init - t_final in the numerator,
which starts above b0; this is the schedule of the authors' code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jpeft.boxes import same_box, unbox
from jpeft.checks import check_count, check_fraction, check_positive, whole
from jpeft.late import Late
from jpeft.leaf import is_leaf
from jpeft.methods.adalora import NO_TRIPLETS, Triplets, triplets
from jpeft.tree.partition import beside, is_placeholder
from jpeft.tree.paths import slots
from jpeft.types import PyTree

if TYPE_CHECKING:
    import optax
else:
    optax = Late("optax")

PAPER, PEFT = "paper", "peft"


class Entries(NamedTuple):
    """A number for each entry of one leaf's P, lam and Q."""

    p: jax.Array
    lam: jax.Array
    q: jax.Array


class AllocatorState(NamedTuple):
    """inner: the wrapped optimiser's state.  step: updates made.  sensitivity,
    uncertainty, keep: one item a leaf; keep is what the last allocation chose, (*stack,
    rank)."""

    inner: Any
    step: jax.Array
    sensitivity: tuple[Entries, ...]
    uncertainty: tuple[Entries, ...]
    keep: tuple[jax.Array, ...]


def adalora_allocator(
    inner: optax.GradientTransformation,
    *,
    target_rank: float,
    total_steps: int,
    t_init: int | None = None,
    t_final: int | None = None,
    delta_t: int = 1,
    beta1: float = 0.85,
    beta2: float = 0.85,
    variant: str = PAPER,
) -> optax.GradientTransformationExtraArgs:
    """`inner`, and after each of its updates the budget of `jpeft.adalora`'s leaves.

    Zhang et al. 2023, arXiv:2303.10512.  The gradients given to `update` are those that
    importance is judged by; it needs the parameters.  Nothing is recompiled as ranks
    fall: shapes stay, and a pruned triplet's lam is exactly zero.

    target_rank: mean rank of a matrix at the end; a matrix may keep more or none.
    total_steps: updates in the whole training.
    t_init: updates before the first pruning; None is an eighth of `total_steps`.
    t_final: updates after the last one; None is a half.  (What the paper takes on
        GLUE.)
    delta_t: updates from one allocation to the next; pruned triplets train in between.
    beta1, beta2: decay of sensitivity and of uncertainty.
    variant: "peft" does as PEFT 0.21 and the authors' code, with their count of steps
        from 1: importance is that of the weights after the optimiser's update, not
        before it; the last allocation goes by the scores of the step before; and where
        scores tie at the threshold all of them go, not just enough of them.

    Raises ValueError where the tree has no AdaLoRA leaf, or the target is above what it
    starts with.

    >>> import jax, jax.numpy as jnp, jpeft, optax
    >>> params = {"dense": {"kernel": jnp.ones((7, 5))}}
    >>> params = jpeft.adalora(rank=3)(jax.random.key(0), params)
    >>> tx = jpeft.optim.adalora_allocator(
    ...     optax.adam(1e-3), target_rank=2, total_steps=100
    ... )
    >>> state = tx.init(jpeft.partition(params)[0])
    """
    name = "adalora_allocator"
    target_rank = check_positive(name, "target_rank", target_rank)
    total_steps = check_count(name, "total_steps", total_steps)
    delta_t = check_count(name, "delta_t", delta_t)
    t_init = total_steps // 8 if t_init is None else t_init
    t_final = total_steps // 2 if t_final is None else t_final
    updates = whole(0, "a number of updates, 0 or more")
    t_init = int(updates(name, "t_init", t_init))
    t_final = int(updates(name, "t_final", t_final))
    if t_init + t_final >= total_steps:
        raise ValueError(
            f"{name}: t_init={t_init} and t_final={t_final} leave none of "
            f"total_steps={total_steps} to prune in; lower one of them"
        )
    beta1 = check_fraction(name, "beta1", beta1)
    beta2 = check_fraction(name, "beta2", beta2)
    if variant not in (PAPER, PEFT):
        raise ValueError(f"{name}: variant={variant!r}: expected {PAPER!r} or {PEFT!r}")
    inner = optax.with_extra_args_support(inner)
    last = total_steps - t_final

    def init(params: PyTree) -> AllocatorState:
        if is_placeholder(params):
            # The allocator's own arrays are no copies of the parameters.
            rest: Any = dict.fromkeys(AllocatorState._fields[1:], 0)
            return AllocatorState(inner=inner.init(params), **rest)
        found = triplets(params)
        if not found:
            raise ValueError(f"{name}: {NO_TRIPLETS}{beside(params)}")
        budgets(found, target_rank)
        zeros = lambda: tuple(
            Entries(*(jnp.zeros_like(x, jnp.float32) for x in arrays(leaf)))
            for leaf in found
        )
        return AllocatorState(
            inner=inner.init(params),
            step=jnp.zeros((), jnp.int32),
            sensitivity=zeros(),
            uncertainty=zeros(),
            keep=tuple(jnp.ones_like(arrays(leaf).lam, bool) for leaf in found),
        )

    def update(
        updates: PyTree, state: Any, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, AllocatorState]:
        if params is None:
            raise ValueError(
                f"{name}: update needs the parameters: update(grads, state, params)"
            )
        grads, weights = ([*map(arrays, triplets(x))] for x in (updates, params))
        updates, of_inner = inner.update(updates, state.inner, params, **extra)
        moves = [*map(arrays, triplets(updates))]
        t = state.step + 1
        learning: Any = True
        if variant == PEFT:
            weights = [_sum(w, m) for w, m in zip(weights, moves, strict=True)]
            learning = t < last
        smoothed = [
            _smoothed(*each, beta1, beta2, learning)
            for each in zip(
                weights, grads, state.sensitivity, state.uncertainty, strict=True
            )
        ]
        scores = [triplet_scores(*each) for each in smoothed]
        b0, target = budgets(triplets(params), target_rank)
        drops = drop_steps(b0, target, total_steps, t_init, t_final)
        fresh = allocate(scores, budget(t, b0, drops), ties=variant == PAPER)
        allocating = (t > t_init) & ((t == last) | ((t < last) & (t % delta_t == 0)))
        keep = [
            jnp.where(allocating, new, old)
            for new, old in zip(fresh, state.keep, strict=True)
        ]
        pruning = allocating | (t > last)
        lams = [
            _pruned(m.lam, arrays(leaf).lam, k | ~pruning)
            for m, leaf, k in zip(moves, triplets(params), keep, strict=True)
        ]
        state = AllocatorState(
            inner=of_inner,
            step=t,
            sensitivity=tuple(s for s, _ in smoothed),
            uncertainty=tuple(u for _, u in smoothed),
            keep=tuple(keep),
        )
        return _with_lams(updates, lams), state

    return optax.GradientTransformationExtraArgs(init, update)


# --- the mathematics -----------------------------------------------------------------


def smoothed(
    importance: Float[Array, "..."],
    sensitivity: Float[Array, "..."],
    uncertainty: Float[Array, "..."],
    beta1: float,
    beta2: float,
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """(sensitivity, uncertainty) after one more step."""
    s = beta1 * sensitivity + (1 - beta1) * importance
    u = beta2 * uncertainty + (1 - beta2) * jnp.abs(importance - s)
    return s, u


def triplet_scores(sensitivity: Entries, uncertainty: Entries) -> jax.Array:
    """(*stack, rank): lam's score plus the means of its column's and its row's."""
    p, lam, q = (s * u for s, u in zip(sensitivity, uncertainty, strict=True))
    stack = lam.ndim - 1
    of_p = jnp.mean(p, tuple(range(stack, p.ndim - 1)))
    of_q = jnp.mean(q, tuple(range(stack + 1, q.ndim)))
    return lam + of_p + of_q


def drop_steps(
    initial: int, target: int, total: int, t_init: int, t_final: int
) -> Int[np.ndarray, " dropped"]:
    """For each triplet above the target, the step from which the budget has no room
    for it, in order.

    Computed in float64 and exactly once, so that no rounding on the device moves a
    step.
    """
    n = total - t_init - t_final
    left = 1 - np.arange(n + 1) / n
    budget = np.floor((initial - target) * left**3 + target).astype(np.int64)
    rooms = np.arange(initial - 1, target - 1, -1)
    return (t_init + np.searchsorted(-budget, -rooms)).astype(np.int32)


def budget(t: Any, initial: int, drops: Int[np.ndarray, " dropped"]) -> jax.Array:
    """b(t)."""
    return initial - jnp.sum(jnp.asarray(drops) <= t, dtype=jnp.int32)


def allocate(
    scores: Sequence[Float[Array, "..."]], budget: Any, *, ties: bool = True
) -> list[Bool[Array, "..."]]:
    """Which triplets are among the `budget` best of all matrices.

    ties: True keeps exactly so many, the first ones of equals; False drops all that
    equal the best one dropped.
    """
    flat = jnp.concatenate([x.reshape(-1) for x in scores])
    if ties:
        place = jnp.argsort(jnp.argsort(-flat, stable=True), stable=True)
        keep = place < budget
    else:
        dropped = flat.size - budget
        threshold = jnp.sort(flat)[jnp.maximum(dropped - 1, 0)]
        keep = (flat > threshold) | (dropped == 0)
    ends = np.cumsum([x.size for x in scores])[:-1]
    parts = jnp.split(keep, ends)
    return [k.reshape(x.shape) for k, x in zip(parts, scores, strict=True)]


# --- the tree ------------------------------------------------------------------------


def budgets(found: Sequence[Triplets], target_rank: float) -> tuple[int, int]:
    """How many triplets there are, and how many are to stay."""
    sizes = [arrays(leaf).lam.shape for leaf in found]
    matrices = sum(int(np.prod(n[:-1])) for n in sizes)
    initial = sum(int(np.prod(n)) for n in sizes)
    target = round(target_rank * matrices)
    if target > initial:
        raise ValueError(
            f"adalora_allocator: target_rank={target_rank} over {matrices} matrices is "
            f"a budget of {target} triplets, more than the {initial} there are; use "
            f"target_rank <= {initial / matrices:g}, or a higher rank in jpeft.adalora"
        )
    if target < 1:
        raise ValueError(
            f"adalora_allocator: target_rank={target_rank} over {matrices} matrices "
            f"leaves no triplet; use target_rank >= {1 / matrices:g}"
        )
    return initial, target


def arrays(leaf: Triplets) -> Entries:
    return Entries(unbox(leaf.p), unbox(leaf.lam), unbox(leaf.q))


def _sum(weights: Entries, moves: Entries) -> Entries:
    return Entries(
        *((w + m.astype(w.dtype)) for w, m in zip(weights, moves, strict=True))
    )


def _smoothed(
    weights: Entries,
    grads: Entries,
    sensitivity: Entries,
    uncertainty: Entries,
    beta1: float,
    beta2: float,
    learning: Any,
) -> tuple[Entries, Entries]:
    new = []
    for w, g, s, u in zip(weights, grads, sensitivity, uncertainty, strict=True):
        importance = jnp.abs(w.astype(jnp.float32) * g.astype(jnp.float32))
        both = smoothed(importance, s, u, beta1, beta2)
        new.append(
            [jnp.where(learning, x, y) for x, y in zip(both, (s, u), strict=True)]
        )
    return Entries(*(s for s, _ in new)), Entries(*(u for _, u in new))


def _pruned(move: jax.Array, lam: jax.Array, stays: jax.Array) -> jax.Array:
    """The update of lam.  Where a triplet is pruned, the update makes lam exactly 0."""
    dtype = jnp.promote_types(move.dtype, lam.dtype)
    return jnp.where(stays, move.astype(dtype), -lam.astype(dtype))


def _with_lams(updates: PyTree, lams: Sequence[jax.Array]) -> PyTree:
    given = iter(lams)
    flat = slots(updates)
    return flat.rebuild([_with_lam(x, given) for x in flat.values])


def _with_lam(slot: Any, given: Iterator[jax.Array]) -> Any:
    """In the order of `triplets`: the outermost leaf of a slot first."""
    if not is_leaf(slot):
        return slot
    changes: dict[str, Any] = {}
    if isinstance(slot, Triplets):
        changes["lam"] = same_box(slot.lam, next(given))
    if is_leaf(slot.base):
        changes["base"] = _with_lam(slot.base, given)
    return slot.replace(**changes)
