"""Boxes: what Flax puts around an array to name its axes.

Linen has `nn.Partitioned` and `nn.LogicallyPartitioned`, NNX has `nnx.Variable`.  A
method rewrites the array inside; each new array gets a box of its own, with the names
of the axes it inherits.  (A box whose value is merely replaced keeps the old names, and
nothing complains.)
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import linen as nn

# What the type of an NNX box says of the array in it.
PARAMETER, STATISTIC, PASSING = "parameter", "statistic", "passing"
_DECLARED = {
    "Param": PARAMETER,
    "BatchStat": STATISTIC,
    "RngState": PASSING,
    "Cache": PASSING,
    "Intermediate": PASSING,
}

# Where NNX keeps axis names; the last two are its older spellings.
_NNX_NAMES = ("out_sharding", "sharding_names", "sharding")


def is_box(x: Any) -> bool:
    return isinstance(x, nn.meta.AxisMetadata) or is_variable(x)


def is_variable(x: Any) -> bool:
    """Whether it is a box of NNX."""
    return _is_of_nnx(x, "Variable")


def declared(x: Any) -> str:
    """PARAMETER, STATISTIC (a running mean), PASSING (a random key, a counter, a cache,
    a value left behind), or "" where no box says it."""
    return next((kind for t, kind in _DECLARED.items() if _is_of_nnx(x, t)), "")


def is_nnx_state(x: Any) -> bool:
    """Whether a tree is what `nnx.split` and `nnx.state` give."""
    return _is_of_nnx(x, "State")


def _is_of_nnx(x: Any, kind: str) -> bool:
    # NNX takes a sixth of the time of `import jax, flax`, and Linen does without: until
    # someone has imported it, nothing can be of its types.
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(x, getattr(nnx, kind))


def unbox(x: Any) -> Any:
    """The value inside, whatever the number of boxes around it."""
    while is_box(x):
        x = _children(x)[0][0]
    return x


def same_box(box: Any, value: Any) -> Any:
    """The boxes of `box` around another value of the same axes."""
    if not is_box(box):
        return value
    (inner,), treedef = _children(box)
    return jax.tree.unflatten(treedef, [same_box(inner, value)])


def rebox(box: Any, value: Any, axes: Sequence[int | None]) -> Any:
    """A new box around `value`, whose k-th axis is the axis `axes[k]` of `box`.

    `None` marks an axis that the boxed array does not have (the rank): it gets no name,
    so it is replicated.
    """
    return _renamed(box, value, lambda names: _pick(names, axes))


def with_names(box: Any, value: Any, names: tuple[Any, ...]) -> Any:
    """A box like `box` around `value`, with these axis names."""
    return _renamed(box, value, lambda _: names)


def names_of(box: Any) -> tuple[Any, ...] | None:
    """The axis names that a box keeps, if it keeps any."""
    if isinstance(box, nn.Partitioned):
        return tuple(box.names)
    if is_variable(box):
        metadata = box.get_metadata()
        found = (metadata[n] for n in _NNX_NAMES if metadata.get(n) is not None)
        names = next(found, None)
        return None if names is None else tuple(names)
    return None


def _renamed(box: Any, value: Any, rename: Callable[[Any], tuple[Any, ...]]) -> Any:
    if not is_box(box):
        return value
    (inner,), _ = _children(box)
    value = _renamed(inner, value, rename)
    if is_variable(box):
        metadata = dict(box.get_metadata())
        for name in _NNX_NAMES:
            if metadata.get(name) is not None:
                metadata[name] = rename(metadata[name])
        # NNX would place a new variable on the mesh in force, or refuse where there is
        # none; the value is where it belongs already.
        eager = metadata.pop("eager_sharding", None)
        new = type(box)(value, eager_sharding=False, **metadata)
        if eager is not None:
            new.set_metadata("eager_sharding", eager)
        return new
    if isinstance(box, nn.Partitioned):
        return box.replace(value=value, names=rename(box.names))
    raise TypeError(
        f"jpeft does not know how to name the axes of a new array in a box of type "
        f"{type(box).__name__}; unbox the tree first with flax.linen.meta.unbox"
    )


def _pick(names: Any, axes: Sequence[int | None]) -> tuple[Any, ...]:
    # A specification may be shorter than the array: the rest is replicated.
    names = tuple(names)
    return tuple(names[k] if k is not None and k < len(names) else None for k in axes)


def _children(box: Any) -> tuple[list[Any], Any]:
    return jax.tree.flatten(box, is_leaf=lambda x: x is not box)
