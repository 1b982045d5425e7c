"""LoRA+: B learns faster than A.  Hayou et al. 2024, arXiv:2402.12354.

    learning rate of B = ratio * learning rate of A

With one rate for both, the features of a wide model hardly move; the paper finds a
ratio near 16 good throughout.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax

from jpeft.checks import check_flag, check_positive
from jpeft.late import Late
from jpeft.leaf import STATIC, TRAINABLE, is_leaf, roles
from jpeft.tree.partition import beside, is_placeholder
from jpeft.tree.paths import slots
from jpeft.types import PyTree

if TYPE_CHECKING:
    import optax
else:
    optax = Late("optax")


def lora_plus(
    inner: optax.GradientTransformation, ratio: float = 16.0, *, vectors: bool = False
) -> optax.GradientTransformationExtraArgs:
    """`inner`, whose updates of every B are multiplied by `ratio`.

    Hayou et al. 2024, arXiv:2402.12354.  An Optax optimiser's update is its learning
    rate times something that does not depend on it, schedules and the decay of AdamW
    included, so this is `inner` with `ratio` times the rate for B.  What sees all
    gradients at once, such as clipping by their global norm, still does.

    A B is the trainable field `b` of a leaf that has a trainable `a`: the side that
    starts at zero, whatever the method.  Everything else (heads, biases, norms) learns
    at the rate of A.

    ratio: 1 changes nothing.
    vectors: True also speeds up trainable vectors (biases, norms), as PEFT's optimiser
        does.  (PEFT's also trains factors beside an embedding at a rate of 1e-6 or so,
        for which there is `optax.partition`.)

    Raises ValueError if the tree has no B.

    >>> import jpeft, optax
    >>> tx = jpeft.optim.lora_plus(optax.adamw(1e-4), ratio=16)
    """
    ratio = check_positive("lora_plus", "ratio", ratio)
    vectors = check_flag("lora_plus", "vectors", vectors)
    inner = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> Any:
        if is_placeholder(params):
            return inner.init(params)
        if not any(x is True for x in jax.tree.leaves(fast(params, vectors=False))):
            raise ValueError(
                "lora_plus: no leaf of this tree has a trainable A and B; apply a "
                "low-rank transform first: params = jpeft.lora(rank=8)"
                f"(jax.random.key(0), params){beside(params)}"
            )
        return inner.init(params)

    def update(
        updates: PyTree, state: Any, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, Any]:
        updates, state = inner.update(updates, state, params, **extra)
        speed = lambda quick, x: ratio * x if quick else x
        return jax.tree.map(speed, fast(updates, vectors=vectors), updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def fast(tree: PyTree, *, vectors: bool) -> PyTree:
    """The tree with a bool in place of every array: True where it learns faster."""
    flat = slots(tree)
    return flat.rebuild(_fast(x, vectors) for x in flat.values)


def _fast(x: Any, vectors: bool) -> Any:
    if not is_leaf(x):
        return jax.tree.map(lambda _: False, x)
    of = roles(x)
    pair = of.get("a") == of.get("b") == TRAINABLE

    def mark(name: str) -> Any:
        trains, is_b = of[name] == TRAINABLE, pair and name == "b"
        quick = lambda y: trains and (is_b or (vectors and y.ndim == 1))
        return jax.tree.map(quick, getattr(x, name))

    own = {n: mark(n) for n, r in of.items() if r != STATIC and n != "base"}
    return x.replace(base=_fast(x.base, vectors), **own)
