"""What in a tree of arrays is no weight: it moves without being trained.

    statistics   running means and variances: the model reads them, so they belong with
                 what was trained beside them
    passing      random keys, counters, caches, values that a layer leaves behind: every
                 run has its own

A box's type says which (`nnx.BatchStat`, `nnx.RngState`, `nnx.Cache`, and `nnx.Param`:
neither); where it does not, names do: Linen's collections, and what layers of Flax,
Haiku and PyTorch call such arrays.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jpeft import compat
from jpeft.boxes import PARAMETER, declared, unbox
from jpeft.boxes import PASSING as PASSING
from jpeft.boxes import STATISTIC as STATISTIC
from jpeft.leaf import is_leaf
from jpeft.tree.paths import Keys, Slots, is_array

_STATISTICS = "batch_stats"
# Beside `params` these are collections; elsewhere a module may have such a name.
_KEPT = re.compile(r"(.*_)?stats|(model_)?state")
_PASSED = re.compile(r"cache|intermediates|perturbations|rngs")
_RUNNING = re.compile(
    r"(running|moving)_(mean|avg|average|var|variance|std|min|max)|num_batches_tracked"
)
# Flax' BatchNorm out of its boxes; Haiku's ExponentialMovingAverage.
_PAIRS = ({"mean", "var"}, {"average", "hidden"})
_COUNTERS = re.compile(r"count(er)?|steps?|cache_index")
_KEYS = re.compile(r"(.*_)?(p?rng|key|seed)s?(_(key|state|data))?")
_CACHED = re.compile(r"cached_(key|value|bias|mask)s?|cache_index")


def states(flat: Slots) -> dict[str, str]:
    """The path of everything that is no weight -> STATISTIC or PASSING.

    An array that carries an adapter is a weight, whatever its type and its name.
    """
    shapes = {
        k: (tuple(x.shape), x.dtype)
        for k, x in zip(flat.keys, map(unbox, flat.values), strict=True)
        if is_array(x) and not is_leaf(x)
    }
    roots = {k[:n] for k in shapes for n, s in enumerate(k[:-1]) if s == "params"}
    found = {}
    for path, keys, slot in zip(flat.paths, flat.keys, flat.values, strict=True):
        if keys not in shapes:
            continue
        kind = PASSING if compat.is_key_array(unbox(slot)) else declared(slot)
        kind = kind or _by_name(keys, shapes, roots)
        if kind not in (None, PARAMETER):
            found[path] = kind
    return found


def _by_name(
    keys: Keys,
    shapes: Mapping[Keys, tuple[tuple[int, ...], Any]],
    roots: set[Keys],
) -> str | None:
    modules, name = keys[:-1], keys[-1] if keys else ""
    shape, dtype = shapes[keys]
    counts = jnp.issubdtype(dtype, jnp.integer) or dtype == jnp.bool_
    beside_params = [s for n, s in enumerate(modules) if keys[:n] in roots]
    raw_key = dtype == jnp.uint32 and shape[-1:] in ((2,), (4,))
    if counts and ("rngs" in modules or (raw_key and _KEYS.fullmatch(name))):
        return PASSING
    if any(map(_PASSED.fullmatch, beside_params)) or _CACHED.fullmatch(name):
        return PASSING
    if _STATISTICS in modules or any(map(_KEPT.fullmatch, beside_params)):
        return STATISTIC
    if _RUNNING.fullmatch(name):
        return STATISTIC
    for pair in _PAIRS:
        beside = [shapes.get((*modules, n)) for n in pair]
        if None not in beside and len(set(beside)) == 1:
            if name in pair or (counts and shape == ()):
                return STATISTIC
    return PASSING if counts and (shape == () or _COUNTERS.fullmatch(name)) else None
