"""The same adapters, acting in another way: cast, selected for each example, off."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.checks import check_float
from jpeft.compat import Tracer
from jpeft.leaf import (
    Several,
    StoredWeight,
    array_fields,
    cast_array,
    check_whole,
    disabled,
    is_leaf,
    layers,
)
from jpeft.tree.merge import check_adapted
from jpeft.tree.paths import slots
from jpeft.types import PyTree


def cast(params: PyTree, dtype: Any) -> PyTree:
    """The tree with its floating-point numbers in `dtype`, such as "bfloat16".

    What `jax.tree.map(lambda x: x.astype(dtype), params)` is meant to do, where codes
    are no numbers: a quantised weight keeps its codes and scales, and acts as a weight
    of that dtype.  Integers and keys stay.  Raises ValueError for a dtype that is not
    floating.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = jpeft.quantize("nf4")(jax.random.key(0), {"kernel": jnp.ones((64, 5))})
    >>> leaf = jpeft.cast(params, "bfloat16")["kernel"]
    >>> leaf.dtype, leaf.codes.dtype, leaf.scales.dtype
    (dtype(bfloat16), dtype('uint8'), dtype('uint8'))
    """
    check_float("cast", dtype)
    if dtype is None:
        raise ValueError('cast: dtype=None: expected a dtype, such as "bfloat16"')

    def one(x: Any) -> Any:
        if isinstance(x, StoredWeight):
            return x.cast(dtype)
        if is_leaf(x):
            arrays = {n: one(y) for n, y in array_fields(x).items()}
            return x.replace(base=one(x.base), **arrays)
        return jax.tree.map(lambda y: cast_array(y, dtype), x)

    flat = slots(params)
    for path, x in flat.items():
        check_whole(x, path, "cast")
    return flat.rebuild(map(one, flat.values))


def select(params: PyTree, ids: Any) -> PyTree:
    """The same adapters, where each example of a batch has its own.

    ids: int (examples,), for each example the number of its adapter among those a leaf
        holds, as `jpeft.prefix(..., tasks=n)` does.  Leaves that hold one serve all.

    Raises ValueError if no leaf holds several, or a number is out of range.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> w = lambda *shape: {"kernel": jnp.ones(shape)}
    >>> attn = {n: w(8, 2, 4) for n in ("query", "key", "value")} | {"out": w(2, 4, 8)}
    >>> params = jpeft.prefix(length=5, tasks=3)(jax.random.key(0), {"attn": attn})
    >>> three = jpeft.select(params, jnp.array([2, 0, 2]))  # for a batch of three
    >>> leaf = three["attn"]["key"]["kernel"]
    >>> leaf.keys.shape, leaf.task.tolist()
    ((3, 5, 8), [2, 0, 2])
    """
    ids = jnp.asarray(ids)
    if ids.ndim != 1 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(
            f"select: expected integers of shape (examples,), got {ids.dtype} "
            f"{ids.shape}"
        )
    flat = slots(params)
    check_adapted(flat, "select")
    every = [x for slot in flat.values for x in layers(slot)]
    held = [n for x in every if isinstance(x, Several) and (n := x.holds()) > 1]
    if not held:
        raise ValueError(
            "select: no leaf of this tree holds several adapters; make them with "
            "jpeft.prefix(length, tasks=n)"
        )
    if not isinstance(ids, Tracer) and ids.size:
        known = np.asarray(ids)  # under jit a number of `ids` would be traced
        low, high = int(known.min()), int(known.max())
        if low < 0 or high >= min(held):
            raise ValueError(
                f"select: ids from {low} to {high}, but there are {min(held)} "
                f"adapters, numbered 0 to {min(held) - 1}"
            )

    def one(x: Any) -> Any:
        if not is_leaf(x):
            return x
        x = x.replace(base=one(x.base))
        return x.select(ids) if isinstance(x, Several) else x

    return flat.rebuild(map(one, flat.values))


def disable(params: PyTree) -> PyTree:
    """The same structure with adapters that do nothing: the model acts as its base.

    For a reference model in the same compiled step, where `unload` would change the
    tree.  The adapters given are not touched.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> base = {"kernel": jnp.ones((5, 3))}
    >>> params = jpeft.lora(rank=2)(jax.random.key(0), base)
    >>> reference = jpeft.disable(params)
    >>> jax.tree.structure(reference) == jax.tree.structure(params)
    True
    """
    flat = slots(params)
    check_adapted(flat, "disable")
    return flat.rebuild(map(disabled, flat.values))
