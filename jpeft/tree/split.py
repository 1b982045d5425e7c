"""Trainable and frozen: the tree taken apart, put together, counted, described."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.boxes import is_nnx_state, same_box, unbox
from jpeft.checks import check_flag, check_float
from jpeft.compat import Tracer
from jpeft.leaf import (
    FROZEN,
    STATIC,
    TRAINABLE,
    Several,
    StoredWeight,
    array_fields,
    box_of,
    boxed_like,
    cast_array,
    check_whole,
    disabled,
    innermost,
    is_leaf,
    is_stored,
    layers,
    roles,
    transients,
)
from jpeft.tree.lend import acting
from jpeft.tree.paths import Slots, is_array, slots
from jpeft.tree.state import states
from jpeft.types import PyTree

NOTHING_TRAINS = (
    "nothing in this tree is trainable: no leaf was adapted. Apply a transform first: "
    "params = jpeft.lora(rank=8, alpha=16)(jax.random.key(0), params)"
)
NOTHING_IN_STATE = (
    "nothing in this nnx.State is trainable: no leaf was adapted, or nnx.Optimizer "
    "took the variables out of their leaves; there pass the optimiser as it is, "
    "without jpeft.freeze: nnx.Optimizer(model, optax.adam(1e-3), "
    "wrt=jpeft.trainable_filter(model))"
)


def _marked(x: Any, role: str) -> Any:
    """The tree below a slot with its role in place of every array."""
    if is_leaf(x):
        return x.replace(
            **{n: _marked(getattr(x, n), r) for n, r in roles(x).items() if r != STATIC}
        )
    return jax.tree.map(lambda _: role, x)


def _role_tree(tree: PyTree) -> PyTree:
    flat = slots(tree)
    return flat.rebuild(_marked(x, FROZEN) for x in flat.values)


def trainable_mask(params: PyTree) -> PyTree:
    """A tree of bools of the same structure: True where an array trains.

    Beware of `optax.masked(tx, mask)`: it passes the raw gradient through to what it
    masks out.  `jpeft.freeze(tx)` does what is wanted.
    """
    if is_placeholder(params):
        return params
    mask = jax.tree.map(lambda r: r == TRAINABLE, _role_tree(params))
    if not any(jax.tree.leaves(mask)):
        of_nnx = is_nnx_state(params)
        raise ValueError(NOTHING_IN_STATE if of_nnx else NOTHING_TRAINS)
    return mask


def is_placeholder(tree: PyTree) -> bool:
    """Whether it is what `optax.tree_map_params` calls `init` with, to see where in a
    state the parameters stand: a node of Optax' own without an array."""
    return type(tree).__module__.startswith("optax.") and not jax.tree.leaves(tree)


def beside(params: PyTree) -> str:
    """The end of a message of an optimiser that asks the adapted leaves, which
    `nnx.Optimizer` takes away."""
    if not is_nnx_state(params):
        return ""
    return (
        " (nnx.Optimizer took the variables out of their leaves: use the optimiser "
        "without it, state = tx.init(jpeft.partition(model)[0]))"
    )


def partition(params: PyTree) -> tuple[PyTree, PyTree]:
    """`(trainable, frozen)`: two trees of one structure, None where the other has it.

    Gradients and optimiser state of the first exist for the adapters only.  Raises
    ValueError if nothing is trainable.
    """
    mask = trainable_mask(params)
    pick = lambda side: jax.tree.map(
        lambda m, x: x if m is side else None, mask, params
    )
    return pick(True), pick(False)


def combine(trainable: PyTree, frozen: PyTree) -> PyTree:
    """The tree again: `combine(*partition(params))` is `params`."""

    def one(t: Any, f: Any) -> Any:
        if t is not None and f is not None:
            raise ValueError(
                "combine: both trees hold an array in the same place; pass the two "
                "trees of one jpeft.partition(params)"
            )
        return f if t is None else t

    is_none = lambda x: x is None
    of_t, of_f = (jax.tree.structure(t, is_leaf=is_none) for t in (trainable, frozen))
    if of_t != of_f:
        raise ValueError(
            f"combine: the trees differ in structure: {of_t.num_leaves} places against "
            f"{of_f.num_leaves}; pass the two trees of one jpeft.partition(params)"
        )
    return jax.tree.map(one, trainable, frozen, is_leaf=is_none)


class Count(NamedTuple):
    """Numbers of parameters."""

    trainable: int
    frozen: int

    @property
    def total(self) -> int:
        return self.trainable + self.frozen

    @property
    def percent(self) -> float:
        """Trainable parameters in percent of all."""
        return 100.0 * self.trainable / max(1, self.total)


def count(params: PyTree) -> Count:
    """How many parameters train and how many do not.

    The old value that a `full` leaf keeps for `unload` is part of neither: the model
    does not use it.  Random keys, counters, caches and running statistics are no
    parameters; see `jpeft.tree.state`.
    """
    total = {TRAINABLE: 0, FROZEN: 0}
    for _, slot in _weights(slots(params)):
        for role, n, _ in _arrays(slot):
            total[role] += n
    return Count(total[TRAINABLE], total[FROZEN])


def _weights(flat: Slots) -> list[tuple[str, Any]]:
    no_weights = states(flat)
    return [(p, x) for p, x in flat.items() if p not in no_weights]


def _arrays(slot: Any) -> list[tuple[str, int, int]]:
    """(role, parameters, bytes) of every array of a slot that the model uses."""
    out = []
    for leaf in layers(slot):
        if is_stored(leaf):  # counted as the weight it stands for
            size = sum(_bytes(unbox(x)) for x in array_fields(leaf).values())
            return [*out, (FROZEN, leaf.size, size)]
        for name, role in roles(leaf).items():
            x = unbox(getattr(leaf, name)) if role in (TRAINABLE, FROZEN) else None
            if name != "base" and x is not None:
                out.append((role, math.prod(x.shape), _bytes(x)))
        if leaf.replaces_base:
            return out
    base = unbox(innermost(slot))
    if is_array(base):
        out.append((FROZEN, math.prod(base.shape), _bytes(base)))
    return out


def _bytes(x: Any) -> int:
    return math.prod(x.shape) * x.dtype.itemsize


def summary(params: PyTree) -> str:
    """A table: path, shape, method, trainable and frozen parameters, bytes; totals.

    Of parameters alone, as `count` counts them.
    """
    rows, sums = [], [0, 0, 0]
    for path, slot in _weights(slots(params)):
        check_whole(slot, path, "summary")
        arrays = _arrays(slot)
        trains = sum(n for r, n, _ in arrays if r == TRAINABLE)
        still = sum(n for r, n, _ in arrays if r == FROZEN)
        size = sum(b for *_, b in arrays)
        if not arrays:
            continue
        method = " over ".join(type(x).__name__ for x in layers(slot)) or "-"
        shape = "x".join(map(str, unbox(innermost(slot)).shape)) or "scalar"
        rows.append((path, shape, method, f"{trains:,}", f"{still:,}", f"{size:,}"))
        sums = [a + b for a, b in zip(sums, (trains, still, size), strict=True)]
    percent = 100 * sums[0] / max(1, sums[0] + sums[1])
    total = ("total", "", f"trainable {percent:.4g}%", *(f"{n:,}" for n in sums))
    head = ("path", "shape", "method", "trainable", "frozen", "bytes")
    return _table([head, *rows, total])


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(r[k]) for r in rows) for k in range(len(rows[0]))]
    line = lambda r: "  ".join(
        x.ljust(w) if k < 3 else x.rjust(w)
        for k, (x, w) in enumerate(zip(r, widths, strict=True))
    ).rstrip()
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    lines = [line(r) for r in rows]
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


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


# --- leaving the adapters ------------------------------------------------------------


def _adapted(flat: Slots, verb: str) -> None:
    if not any(is_leaf(x) for x in flat.values):
        raise ValueError(f"{verb}: no leaf of this tree is adapted")
    for path, x in flat.items():
        check_whole(x, path, verb)


def merge(params: PyTree, *, dtype: Any = None, requantize: bool = False) -> PyTree:
    """Plain arrays again: every adapted leaf becomes its effective weight.

    Computed in float32 (float64 for float64 weights) and cast once.  dtype: of the
    merged weights; default each base's own.  Weights that were not adapted stay as
    they are.

    A quantised base is dequantised.  requantize: True stores the result of such a base
    in its own format again, which rounds once more: `jpeft.quant.rounding` says by how
    much, beside what the adapter changed.  Matrices that it left as they were keep
    their codes.
    """
    check_merge("merge", dtype, requantize)

    def one(slot: Any, leaf: Any) -> Any:
        if not is_leaf(slot):
            return slot
        base = innermost(slot)
        if requantize and is_leaf(base):
            return (
                base if base is slot else base.with_value(leaf.materialize(jnp.float32))
            )
        return same_box(box_of(slot), leaf.materialize(dtype))

    flat = slots(params)
    _adapted(flat, "merge")
    return flat.rebuild(map(one, flat.values, acting(flat)))


def check_merge(name: str, dtype: Any, requantize: bool) -> None:
    check_float(name, dtype)
    check_flag(name, "requantize", requantize)
    if requantize and dtype is not None:
        raise ValueError(
            f"{name}: requantize=True keeps the base's own format, and "
            f"dtype={dtype!r} is of plain arrays: give one of the two"
        )


def unload(params: PyTree) -> PyTree:
    """The base, bit for bit: every adapter is taken off.

    A quantised weight is the base of what was trained on it, and stays as it is;
    `merge` makes arrays of it.
    """
    flat = slots(params)
    _adapted(flat, "unload")
    return flat.rebuild(innermost(x) for x in flat.values)


def finalize(params: PyTree) -> PyTree:
    """The same adapters without what was only there to train them.

    The encoder of `p_tuning` and the network of a reparametrised `prefix` give way to
    the vectors they make.  What is trained or saved from here on is these.  Everything
    else stays as it is.
    """
    flat = slots(params)
    _adapted(flat, "finalize")
    return flat.rebuild(map(_finalized, flat.values, acting(flat)))


def _finalized(slot: Any, leaf: Any) -> Any:
    """slot: as it is stored; leaf: the same one, ready to act."""
    if not is_leaf(slot) or is_stored(slot):
        return slot
    base = _finalized(slot.base, leaf.base)
    done = leaf.finalize()  # borrowing may have made another kind of leaf already
    if type(done) is type(slot):
        return slot.replace(base=base)
    changes = {"base": base, "path": slot.path, **dict.fromkeys(transients(done))}
    return boxed_like(box_of(slot), done.replace(**changes))


def select(params: PyTree, ids: Any) -> PyTree:
    """The same adapters, where each example of a batch has its own.

    ids: int (examples,), for each example the number of its adapter among those a leaf
        holds, as `jpeft.prefix(..., tasks=n)` does.  Leaves that hold one serve all.

    Raises ValueError if no leaf holds several, or a number is out of range.
    """
    ids = jnp.asarray(ids)
    if ids.ndim != 1 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(
            f"select: expected integers of shape (examples,), got {ids.dtype} "
            f"{ids.shape}"
        )
    flat = slots(params)
    _adapted(flat, "select")
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
    """
    flat = slots(params)
    _adapted(flat, "disable")
    return flat.rebuild(map(disabled, flat.values))
