"""`Weighted`: a mean that stays exact when it is put together from parts.

The loss of a step is (sum over all tokens that count) / (how many they are), over all
micro-batches and devices of the step.  The mean of the parts' means is another number
wherever their counts differ: means 2.0 over 10 tokens and 1.0 over 90 make 1.1, not
1.5.  So objectives return both, and one division is made at the end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jpeft import compat
from jpeft.leaf import wide_dtype
from jpeft.objectives._arrays import held, ratio
from jpeft.types import PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Weighted:
    """total: the sum of weight times value.  count: the sum of weights.

    Both float32 scalars.  `a + b` is the same of both parts together; `sum(parts)`
    works.  Scaling a loss leaves its count: `Weighted(0.1 * x.total, x.count)`.

    >>> import jax.numpy as jnp
    >>> from jpeft.objectives import Weighted
    >>> three, one = (Weighted(*jnp.float32(x)) for x in ([6, 3], [4, 1]))
    >>> float((three + one).mean())  # (6 + 4) / (3 + 1), not the mean of the means
    2.5
    """

    total: jax.Array
    count: jax.Array

    def __add__(self, other: Weighted) -> Weighted:
        if not isinstance(other, Weighted):
            return NotImplemented
        return Weighted(self.total + other.total, self.count + other.count)

    def __radd__(self, other: int) -> Weighted:  # `sum` begins with 0
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def mean(self) -> jax.Array:
        """total / count; 0, with zero gradients, where nothing counts."""
        return ratio(self.total, self.count)

    def psum(self, axis_name: Any) -> Weighted:
        """Over the devices along a mesh axis, inside `shard_map`."""
        return lax.psum(self, axis_name)


def weighted_sum(values: jax.Array, weight: jax.Array) -> Weighted:
    """values, weight: of one shape.  What has no weight may be NaN."""
    return Weighted(jnp.sum(held(values, weight) * weight), jnp.sum(weight))


def accumulated_value_and_grad(
    loss: Callable[..., Weighted], *, axis_name: Any = None
) -> Callable[..., tuple[Weighted, PyTree]]:
    """`f(params, batches, *rest)` -> (Weighted, gradients of its mean).

    What `jax.value_and_grad(lambda p: loss(p, whole, *rest).mean())(params)` gives, of
    a batch that is seen a micro-batch at a time: gradients of the sum are added up, in
    float32, and divided once by the count of all.  `optax.MultiSteps` takes the mean of
    the micro-batches' gradients instead.

    loss: `loss(params, batch, *rest)` -> `Weighted`.
    params: a tree of floating-point arrays, such as `jpeft.partition(params)[0]`; the
        frozen part goes into `rest`.
    batches: a tree of arrays (micro-batches, ...), all of one first size.
    axis_name: mesh axis (or axes) of a `shard_map` over whose devices to sum as well.

    Gradients have the dtype of their parameters.  Without a counted token they are
    zero.  Raises TypeError if `loss` returns anything but a `Weighted`.

    >>> import jax.numpy as jnp
    >>> from jpeft.objectives import Weighted, accumulated_value_and_grad
    >>> loss = lambda p, x: Weighted(jnp.sum(p * x), jnp.float32(x.size))
    >>> value, grad = accumulated_value_and_grad(loss)(jnp.float32(3), jnp.ones((4, 2)))
    >>> float(value.mean()), float(grad)
    (3.0, 1.0)
    """

    def run(params: PyTree, batches: PyTree, *rest: Any) -> tuple[Weighted, PyTree]:
        _check_batches(batches)
        dtypes = [wide_dtype(x.dtype) for x in jax.tree.leaves(params)]
        dtype = max(dtypes, key=lambda d: d.itemsize, default=jnp.dtype("float32"))

        def part(params: PyTree, batch: PyTree) -> tuple[jax.Array, jax.Array]:
            out = loss(params, batch, *rest)
            if not isinstance(out, Weighted):
                raise TypeError(
                    "accumulated_value_and_grad: the loss returned "
                    f"{type(out).__name__}: expected jpeft.objectives.Weighted(total, "
                    "count); a mean cannot be put together from means"
                )
            return out.total.astype(dtype), out.count.astype(dtype)

        def step(sums: Any, batch: PyTree) -> tuple[Any, None]:
            value, grads = jax.value_and_grad(part, has_aux=True)(params, batch)
            add = lambda s, x: s + x.astype(s.dtype)
            return jax.tree.map(add, sums, (Weighted(*value), grads)), None

        zeros = lambda x: jnp.zeros(x.shape, wide_dtype(x.dtype))
        nothing = Weighted(jnp.zeros((), dtype), jnp.zeros((), dtype))
        init = nothing, jax.tree.map(zeros, params)
        # Inside `shard_map`, where the parameters are the same on all devices, JAX
        # would sum their gradients in every step, and here they would be summed again.
        params, batches, init = compat.varying_alike((params, batches, init))
        (value, grads), _ = lax.scan(step, init, batches)
        if axis_name is not None:
            value, grads = value.psum(axis_name), lax.psum(grads, axis_name)
        mean = lambda g, p: ratio(g, value.count.astype(g.dtype)).astype(p.dtype)
        return value, jax.tree.map(mean, grads, params)

    return run


def _check_batches(batches: PyTree) -> None:
    shapes = {jnp.shape(x) for x in jax.tree.leaves(batches)}
    if len({s[:1] for s in shapes}) != 1 or () in shapes:
        raise ValueError(
            f"accumulated_value_and_grad: batches has arrays of shapes {sorted(shapes)}"
            ": expected (micro-batches, ...), the first size the same for all; reshape "
            "with x.reshape(n, -1, *x.shape[1:])"
        )
