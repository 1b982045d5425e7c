"""Prefix tuning by virtual tokens: what they make of keys and values is learned.

    y = x W + b          keys or values, (..., features)
    y[t] = P[n(t)]       where position t holds virtual token n(t)

The token embedding records which positions those are (`leaves.embedding`).  The method
needs nothing else of the model, so any attention will do.  The leaf stands on the bias,
whose sum is the finished projection, and on the kernel where there is no bias.  In a
fused projection it overwrites the features of keys and values alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jpeft.adapt.equations import Add, Label, Move, Product, align
from jpeft.adapt.interpreter import Interpreter, acts, contracts
from jpeft.adapt.labels import Labelled, moved
from jpeft.leaf import (
    AdaptedLeaf,
    OfText,
    adapted_leaf,
    is_leaf,
    static,
    trainable,
    whose,
)
from jpeft.leaves.embedding import TOKENS
from jpeft.types import PromiseError

Columns = tuple[tuple[bool, int], ...]
Draw = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]
# The label of an axis of the activation, which a bias gets when it is broadcast.
_OTHER = "n"


# --- the leaves ----------------------------------------------------------------------


@adapted_leaf
class TokenRows(AdaptedLeaf, OfText):
    """A bias or kernel whose output is overwritten where a token is virtual.

    rows: (*stack, tokens, features), of the features overwritten.
    columns: which those are, ((overwritten, how many), ...); () for all.
    stream: "encoder" or "decoder", whose text the projection reads, or "".
    """

    axes: str = static()
    rows: Any = trainable(off=0)
    columns: Columns = static(default=())
    stream: str = static(default="")

    def labels(self) -> dict[str, list[Hashable]]:
        stack = [k for k, c in enumerate(self.axes) if c == "s"]
        features = [k for k, c in enumerate(self.axes) if c == "o"]
        whole = len(features) == 1 and not self.columns
        return {"rows": [*stack, TOKENS, features[0] if whole else None]}

    def begin(self) -> AdaptedLeaf:
        """With rows of every feature, so that they move as the weight's own axes do."""
        *stack, tokens, _ = self.rows.shape
        features = [n for n, c in zip(self.shape, self.axes, strict=True) if c == "o"]
        rows, cut = self.rows, None
        if self.columns:
            cut = np.concatenate([np.full(n, mine) for mine, n in self.columns])
            shape = (*stack, tokens, math.prod(features))
            rows = jnp.zeros(shape, rows.dtype).at[..., np.flatnonzero(cut)].set(rows)
            cut = jnp.asarray(cut.reshape(features), rows.dtype)
        return ActingRows(
            base=self.base,
            axes=self.axes,
            rows=rows.reshape(*stack, tokens, *features),
            cut=cut,
            stream=self.stream,
            path=self.path,
        )


@adapted_leaf
class ActingRows(Labelled, OfText):
    """`TokenRows` in a call.

    rows: (*stack, tokens, *out).  cut: (*out), 1 for features that are overwritten,
        None if all are.
    """

    rows: Any = trainable(("s", "tokens", "o"))
    cut: Any = trainable("o", default=None)
    stream: str = static(default="")

    spare: ClassVar[str] = _OTHER


# --- rules ---------------------------------------------------------------------------


@acts(Add, kind=ActingRows)
def _add(it: Interpreter, add: Add, ins: list[Any]) -> Any:
    eqn = add.eqn
    if all(map(is_leaf, ins)):
        return None
    leaf = next(filter(is_leaf, ins))
    shape = eqn.outvars[0].aval.shape
    if set(leaf.axes) - {"o", _OTHER} or len(shape) != leaf.ndim:
        return None
    if any(c == "o" and shape[k] != leaf.shape[k] for k, c in enumerate(leaf.axes)):
        return None
    out = [k if c == "o" else ("x", k) for k, c in enumerate(leaf.axes)]
    return overwritten(it, eqn, leaf, it.base(eqn, ins), out)


@contracts(kind=ActingRows)
def _contract(it: Interpreter, at: Product) -> Any:
    leaf, out = at.leaf, at.out
    mine = [k for k in out if isinstance(k, int)]
    if {k for k in mine if leaf.shape[k] > 1} != {
        k for k, c in enumerate(leaf.axes) if c == "o" and leaf.shape[k] > 1
    }:
        return None  # used the other way round, or a whole stack at once
    labels: list[Label] = [
        ("x", k) if isinstance(k, int) and leaf.axes[k] != "o" else k for k in out
    ]
    return overwritten(it, at.eqn, leaf, it.base(at.eqn, at.ins()), labels)


def overwritten(
    it: Interpreter, eqn: Any, leaf: ActingRows, y: jax.Array, out: Sequence[Label]
) -> jax.Array:
    """y with the learned rows where tokens are virtual.

    out: for each axis of y the weight's axis, or a label of its own.
    """
    acts = [j for j, k in enumerate(out) if not isinstance(k, int)]
    sizes = tuple(y.shape[j] for j in acts)
    at = virtual_rows(it, eqn, leaf, sizes)
    features = [k for k in out if isinstance(k, int)]
    labels = leaf.labels()
    table = align(leaf.rows, labels["rows"], [TOKENS, *features])
    rows = jnp.take(table, jnp.maximum(at, 0), axis=0, mode="clip")
    rows = align(rows, [*(out[j] for j in acts), *features], out).astype(y.dtype)
    here = lax.broadcast_in_dim(at >= 0, y.shape, acts)
    if leaf.cut is not None:
        cut = align(leaf.cut, labels["cut"], features) > 0.5
        places = [j for j in range(y.ndim) if j not in acts]
        here &= lax.broadcast_in_dim(cut, y.shape, places)
    return jnp.where(here, rows, y)


def virtual_rows(
    it: Interpreter, eqn: Any, leaf: ActingRows, sizes: tuple[int, ...]
) -> jax.Array:
    """The number of the virtual token at each position, -1 at a real one."""
    found = [at for at in it.rows if _fits(at.shape, sizes)]
    start = f"{whose(leaf)}this prefix in mode 'tokens' at {it.site(eqn)} "
    if not it.rows:
        raise PromiseError(
            start + "knows of no virtual tokens: no ids were looked up in an embedding "
            "before (the function is given vectors), or what was found cannot reach "
            "here (a shard_map). Use jpeft.prefix(..., mode='kv')"
        )
    if not found:
        raise PromiseError(
            start + f"projects positions {sizes}, and the ids looked up have the "
            f"shapes {[tuple(at.shape) for at in it.rows]}: it is not the text that is "
            "projected here. Use jpeft.prefix(..., mode='kv')"
        )
    if len(found) == 2 and leaf.stream:
        found = [found[0] if leaf.stream == "encoder" else found[-1]]
    if len(found) > 1:
        raise PromiseError(
            start + f"cannot tell which of {len(found)} texts of shape "
            f"{tuple(found[0].shape)} it projects; give them different lengths, or use "
            "jpeft.prefix(..., mode='kv'); if it is one text looked up in two tables, "
            "pass uses=jpeft.find_uses(fn, params, *args) to the transform"
        )
    return found[0].reshape(sizes)


def _fits(ids: Sequence[int], sizes: Sequence[int]) -> bool:
    """Whether the axes are the same but for axes of size 1, or are joined into one."""
    wide = lambda s: [n for n in s if n != 1]
    return wide(ids) == wide(sizes) or wide(sizes) == wide([math.prod(ids)])


# --- rules: a bias on its way to the sum ---------------------------------------------


def _reshaped(dst: Sequence[int]) -> Any:
    """Rows keep their features' sizes; axes of size 1 come and go."""
    return lambda x, old, new: x.reshape(
        [dst[k] if isinstance(k, int) else x.shape[old.index(k)] for k in new]
    )


@acts(Move, kind=ActingRows)
def _moved(it: Interpreter, move: Move, ins: list[Any]) -> Any:
    """A broadcast leaves the rows alone: its new axes belong to the activation."""
    leaf = ins[0]
    if not move.spreads:
        return moved(it, move, ins)
    axes = move.labels(leaf.axes, _OTHER)
    assert axes is not None  # nothing is merged
    for k, held in enumerate(move.of):
        if held and leaf.shape[held[0]] != move.shape[k]:
            if axes[k] == "s":
                return None
            axes = axes[:k] + _OTHER + axes[k + 1 :]
    return leaf.move(it.base(move.eqn, ins), _reshaped(move.shape), axes)
