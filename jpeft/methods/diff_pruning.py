"""Diff pruning: a sparse difference to every parameter.  Guo et al. 2021,
arXiv:2012.07463.

    W' = W + z * w                          z, w: of W's shape
    z = clip(s (high - low) + low, 0, 1)    s = sigmoid((log(u / (1 - u)) + alpha) / T)

The gates z are hard concrete (Louizos et al. 2018, arXiv:1712.01312): u is uniform, and
as high > 1 and low < 0, a gate is exactly one or exactly zero with some probability,
while alpha still gets a gradient.  How many gates are open is, on average,

    E[number of z > 0] = sum of sigmoid(alpha - T log(-low / high))

which `jpeft.expected_l0` gives for the loss.  The structured variant has a further gate
for each matrix or vector, and z is the product of the two.  w starts at zero, so the
model starts as its base.  The whole procedure of the paper:

    1  train w and alpha with a small multiple of the expected L0 norm
    2  `jpeft.sparsify`: keep the largest |z w| of all leaves, and their places
    3  train on, with those places fixed

Gates are random where `adapt` has a key, so pass it one in step 1; without, s is
sigmoid(alpha), as Louizos et al. do after training.

Where we depart from the paper: it has no temperature T (1 is the paper's).  A group is
each array, or each matrix of a stack.  (The authors' code penalises the structured
gates by the sum of the two probabilities; the product here is the paper's.)

w and alpha have the size of the weights they stand beside, so step 1 costs the memory
of full fine-tuning and more; what is small is the result.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Hashable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jpeft import compat
from jpeft.attach import LeafMethod
from jpeft.boxes import unbox
from jpeft.checks import Floating, Positive, real
from jpeft.leaf import (
    AdaptedLeaf,
    adapted_leaf,
    box_of,
    boxed_like,
    frozen,
    innermost,
    is_leaf,
    is_stored,
    layers,
    static,
    trainable,
    unboxed,
)
from jpeft.leaves.draw import filled
from jpeft.sharding.specs import place_beside
from jpeft.transform import method
from jpeft.tree.layout import UNUSED, LeafUse
from jpeft.tree.paths import slots
from jpeft.tree.where import Where
from jpeft.types import PyTree

LOW, HIGH, ALPHA = -1.5, 1.5, 5.0  # the paper's stretch; the authors' first alpha
_ELEMENT, _GROUP = 0, 1  # what a key folds in

# --- the leaves ----------------------------------------------------------------------


@adapted_leaf
class GatedDelta(AdaptedLeaf):
    """base + gate * delta.  delta, alpha: of the base's shape."""

    delta: Any = trainable("*", off=0)
    alpha: Any = trainable("*")
    low: float = static(default=LOW)
    high: float = static(default=HIGH)
    temperature: float = static(default=1.0)

    is_value: ClassVar[bool] = True

    def gate(self) -> Float[Array, "..."]:
        """z of every element, at random where there is a key."""
        return self._gate(self.alpha, _ELEMENT)

    def open(self) -> Float[Array, "..."]:
        """The probability that z is not zero, of every element."""
        return self._open(self.alpha)

    def change(self) -> Float[Array, "..."]:
        return self.gate() * self.delta

    def effective(self, w: jax.Array) -> jax.Array:
        return w + self.change().astype(w.dtype)

    def draws(self) -> bool:
        return True

    def _gate(self, alpha: jax.Array, which: int) -> jax.Array:
        key = None if self.key is None else jax.random.fold_in(self.key, which)
        return hard_concrete(alpha, key, self.low, self.high, self.temperature)

    def _open(self, alpha: jax.Array) -> jax.Array:
        return open_probability(alpha, self.low, self.high, self.temperature)


@adapted_leaf
class GroupedDelta(GatedDelta):
    """base + gate * group's gate * delta.

    group: alpha of the groups' gates, of the base's rank, 1 along the axes of a group.
    """

    group: Any = trainable()

    def gate(self) -> Float[Array, "..."]:
        return super().gate() * self._gate(self.group, _GROUP)

    def open(self) -> Float[Array, "..."]:
        return super().open() * self._open(self.group)

    def labels(self) -> dict[str, list[Hashable]]:
        sizes = unbox(self.group).shape
        group: list[Hashable] = [k if n > 1 else None for k, n in enumerate(sizes)]
        return {**super().labels(), "group": group}


@adapted_leaf
class SparseDelta(AdaptedLeaf):
    """base + values at their places.

    values (count,); indices (count,): of the flattened weight, ascending, int32.
    """

    values: Any = trainable(off=0)
    indices: Any = frozen()

    is_value: ClassVar[bool] = True

    def effective(self, w: jax.Array) -> jax.Array:
        flat = jnp.zeros(math.prod(self.shape), self.values.dtype)
        flat = flat.at[self.indices].set(
            self.values, indices_are_sorted=True, unique_indices=True
        )
        return w + flat.reshape(self.shape).astype(w.dtype)


# --- the method ----------------------------------------------------------------------


@method("diff_pruning")
@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffPruning(LeafMethod):
    """A transform that gives each selected array a gated difference.

        W' = W + z * w      z hard concrete, at random where `adapt` is given a key

    Guo et al. 2021, arXiv:2012.07463.  Add a small multiple of
    `jpeft.expected_l0(params)` to the loss, then `jpeft.sparsify(params, density)`,
    then train on: see the module.

    where, exclude: which arrays, any floating-point ones; see `jpeft.tree.where`.
    structured: a gate for each matrix or vector too, times its elements' gates.
    alpha: what the gates start from; at 5 nearly all are open.
    low, high: what the gates are stretched to, before they are clipped to 0 and 1.
    temperature: of the gates; low ones are more often exactly 0 or 1.
    dtype: of w and alpha; None means float32, or float64 beside float64.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = {"dense": {"kernel": jnp.ones((7, 5)), "bias": jnp.zeros(5)}}
    >>> params = jpeft.diff_pruning()(jax.random.key(0), params)
    >>> round(float(jpeft.expected_l0(params)), 2)  # of 40, sigmoid(5) each
    39.73
    """

    where: Where = "all"
    exclude: Where = ()
    structured: bool = False
    alpha: float = ALPHA
    low: float = LOW
    high: float = HIGH
    temperature: Positive = 1.0
    dtype: Floating | None = None

    needs_axes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.low < 0.0:
            raise ValueError(
                f"diff_pruning: low={self.low!r}: expected below 0, or no gate ever "
                "closes"
            )
        if not self.high > 1.0:
            raise ValueError(
                f"diff_pruning: high={self.high!r}: expected above 1, or no gate is "
                "ever fully open"
            )

    def selection(self) -> tuple[Where, Where]:
        return self.where, self.exclude

    def accepts(self, use: LeafUse) -> bool:
        return use.kind != UNUSED

    def attach(
        self, key: jax.Array, path: str, base: Any, use: LeafUse
    ) -> GatedDelta | GroupedDelta:
        dtype = self.adapter_dtype(base)
        common: dict[str, Any] = {
            "base": base,
            "delta": filled(use.shape, 0, dtype),
            "alpha": filled(use.shape, self.alpha, dtype),
            "low": float(self.low),
            "high": float(self.high),
            "temperature": float(self.temperature),
        }
        if not self.structured:
            return GatedDelta(**common)
        axes = use.axes or "?" * len(use.shape)
        groups = [n if c == "s" else 1 for n, c in zip(use.shape, axes, strict=True)]
        return GroupedDelta(group=filled(tuple(groups), self.alpha, dtype), **common)


diff_pruning = DiffPruning


# --- the penalty and the projection --------------------------------------------------

_NONE = (
    "this tree has no gated difference; apply the transform first: params = "
    "jpeft.diff_pruning()(jax.random.key(0), params)"
)


def gated(tree: PyTree) -> list[GatedDelta]:
    """Every gated difference, out of its boxes."""
    return [
        leaf
        for slot in slots(tree).values
        for leaf in map(unboxed, layers(slot))
        if isinstance(leaf, GatedDelta)
    ]


def expected_l0(params: PyTree) -> Float[Array, ""]:
    """How many gates are open on average, for the loss: a scalar.

    In closed form, so nothing is drawn.  params: the whole tree or its trainable part.
    Raises ValueError if no leaf of it is `diff_pruning`'s.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = jpeft.diff_pruning()(jax.random.key(0), {"kernel": jnp.ones((5, 3))})
    >>> f"{jpeft.expected_l0(params):.1f} of 15"
    '14.9 of 15'
    """
    found = gated(params)
    if not found:
        raise ValueError(f"expected_l0: {_NONE}")
    sums = [jnp.sum(leaf.open(), dtype=jnp.float32) for leaf in found]
    return functools.reduce(jnp.add, sums)


_check_density = real(
    lambda x: 0 < x <= 1, "above 0, up to 1 (0.005 keeps one difference in 200)"
)


def sparsify(params: PyTree, density: float) -> PyTree:
    """The tree with only the largest differences, at fixed places.

    density: how many of the differences stay, over all leaves together, as a part of
    them; the paper's is 0.005.  Chosen by magnitude of z * w with the gates as they are
    without a key, and kept with that value.  They go on training; the others are gone,
    in memory and in the checkpoint.  An array that keeps none loses its leaf.

    Raises ValueError for a density outside (0, 1], where no difference is left, and
    under `jit`, because the shapes of the result depend on values.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = jpeft.diff_pruning()(jax.random.key(0), {"kernel": jnp.zeros((5, 4))})
    >>> w = jnp.arange(20.0).reshape(5, 4)  # what was learned
    >>> params = {"kernel": params["kernel"].replace(delta=w)}
    >>> jpeft.count(jpeft.sparsify(params, density=0.1)).trainable
    2
    """
    density = _check_density("sparsify", "density", density)
    flat = slots(params)
    found = gated(params)
    if not found:
        raise ValueError(f"sparsify: {_NONE}")
    if any(isinstance(x.delta, compat.Tracer) for x in found):
        raise ValueError(
            "sparsify: the shapes of the result depend on values; call it outside of "
            "jax.jit"
        )
    changes = [np.asarray(leaf.change()).reshape(-1) for leaf in found]
    count = round(density * sum(x.size for x in changes))
    kept = iter(zip(largest(changes, count), changes, strict=True))
    out = [_sparse(p, x, kept) for p, x in flat.items()]
    if not any(isinstance(x, SparseDelta) for slot in out for x in layers(slot)):
        raise ValueError(
            f"sparsify: density={density!r} keeps no difference that is not zero; "
            "train first, or raise it"
        )
    return flat.rebuild(out)


def _sparse(path: str, slot: Any, kept: Any) -> Any:
    """In the order of `layers`: the outermost leaf of a slot first."""
    if not is_leaf(slot) or is_stored(slot):
        return slot
    if not isinstance(slot, GatedDelta):
        return slot.replace(base=_sparse(path, slot.base, kept))
    indices, change = next(kept)
    base = _sparse(path, slot.base, kept)
    if not indices.size:
        return base
    if slot.size > np.iinfo(np.int32).max:
        raise ValueError(
            f"{path}: {slot.size} elements are more than int32 counts, in which places "
            f"are kept; exclude={path!r}"
        )
    leaf = SparseDelta(
        base=unbox(base),
        values=jnp.asarray(change[indices]),
        indices=jnp.asarray(indices, jnp.int32),
        origin=slot.origin,
    )
    leaf = place_beside(leaf, unbox(innermost(base)))
    return boxed_like(box_of(base), leaf.replace(base=base))


# --- the mathematics -----------------------------------------------------------------


def hard_concrete(
    alpha: Float[Array, "..."],
    key: jax.Array | None,
    low: float,
    high: float,
    temperature: float,
) -> Float[Array, "..."]:
    """A gate between 0 and 1, both included, for each alpha."""
    if key is None:
        s = jax.nn.sigmoid(alpha)
    else:
        noise = jax.random.logistic(key, alpha.shape, jnp.float32)  # log(u / (1 - u))
        s = jax.nn.sigmoid((noise.astype(alpha.dtype) + alpha) / temperature)
    return jnp.clip(s * (high - low) + low, 0.0, 1.0)


def open_probability(
    alpha: Float[Array, "..."], low: float, high: float, temperature: float
) -> Float[Array, "..."]:
    """P(gate > 0)."""
    return jax.nn.sigmoid(alpha - temperature * math.log(-low / high))


def largest(arrays: list[np.ndarray], count: int) -> list[np.ndarray]:
    """Ascending indices into each of the flat arrays: of the `count` largest magnitudes
    of all of them, zeros left out."""
    if count == 0:
        return [np.zeros(0, np.int64) for _ in arrays]
    sizes = np.abs(np.concatenate(arrays))
    first = sizes.size - count
    chosen = np.sort(np.argpartition(sizes, first)[first:]) if first else slice(None)
    chosen = np.arange(sizes.size)[chosen]
    chosen = chosen[sizes[chosen] > 0]
    ends = np.cumsum([x.size for x in arrays])
    parts = np.split(chosen, np.searchsorted(chosen, ends[:-1]))
    return [p - start for p, start in zip(parts, [0, *ends[:-1]], strict=True)]
