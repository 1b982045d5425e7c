"""`VirtualEmbedding`: a token embedding that knows virtual ids, and how it acts.

    row(id) = E[id]        id < V
    row(id) = P[id - V]    from V on, wherever the id stands

It acts as a table with more rows would, whatever the model does to the table.  Only a
tied head has no columns for virtual tokens: logits keep the vocabulary's size.  For
later weights the leaf records which positions of the text are virtual (`it.add_rows`).
"""

from __future__ import annotations

from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax

from jpeft.adapt.equations import (
    Contract,
    Label,
    LookUp,
    Move,
    Pad,
    Repeat,
    Reverse,
    Scale,
    SliceAt,
    align,
)
from jpeft.adapt.interpreter import Interpreter, acts
from jpeft.adapt.labels import Labelled, factor_along, factor_of, moved
from jpeft.adapt.lookups import tables_looked_up
from jpeft.compat import Tracer
from jpeft.leaf import OfText, adapted_leaf, is_leaf, layers, static, trainable, whose

TOKENS = "tokens"  # the label of the virtual tokens

# --- the leaves ----------------------------------------------------------------------


@adapted_leaf
class VirtualEmbedding(Labelled, OfText):
    """A token embedding in which virtual tokens have zeros.

    vocab: rows of the table; virtual ids begin there.  tokens: how many there are.
    one_hot: whether a row of zeros in a one-hot lookup is a virtual token.
    silent: True if another table is looked up by the same ids and records them.
    """

    vocab: int = static()
    tokens: int = static()
    one_hot: bool = static(default=False)
    silent: bool = static(default=False)

    def instead(self, name: str) -> str:
        return (
            "Let the model look rows up by the text's own ids, table[ids], or train "
            "keys and values instead, which needs no table: "
            'jpeft.prefix(length, mode="kv")'
        )

    def enters(self, program: Any, k: int) -> None:
        """The same ids must not reach a table that has no rows for virtual tokens."""
        found = tables_looked_up(program.closed.jaxpr)
        own = {ids for table, ids in found if table == k}
        bare = [
            program.names[table]
            for table in dict.fromkeys(table for table, ids in found if ids in own)
            if not any(hasattr(x, "vocab") for x in layers(program.inputs[table]))
        ]
        if bare:
            names = [program.names[k], *bare]
            raise ValueError(
                f"{whose(self)}the model looks up {bare} by the same ids, which has "
                "no rows for virtual tokens; the method must stand on all of these "
                + (
                    "tables: pass uses=jpeft.find_uses(fn, params, *args) to it"
                    if type(self) is VirtualEmbedding
                    else f"tables: where={names!r}"
                )
            )

    @property
    def axis(self) -> int | None:
        """The axis of the vocabulary, while there is one."""
        return self.axes.index("i") if self.axes.count("i") == 1 else None

    def table(self, dtype: Any) -> jax.Array:
        """The virtual tokens' rows, with the axes of the weight."""
        shape = [self.tokens if c == "i" else n for c, n in self._axes_and_sizes()]
        return jnp.zeros(shape, dtype)

    def _axes_and_sizes(self) -> list[tuple[str, int]]:
        return list(zip(self.axes, self.shape, strict=True))

    def grown(self, axis: int) -> Self | None:
        """Virtual ids begin behind the new rows."""
        return self.replace(vocab=self.shape[axis]) if axis == self.axis else None


@adapted_leaf
class Prompt(VirtualEmbedding):
    """A token embedding with rows of their own for virtual tokens.

    prompt: (tokens, *features).
    """

    prompt: Any = trainable(("tokens", "o"), off=0)

    def table(self, dtype: Any) -> jax.Array:
        labels = self.labels()["prompt"]
        order = [TOKENS if k == self.axis else k for k in range(self.ndim)]
        return align(self.prompt, labels, order).astype(dtype)


def beneath(leaf: VirtualEmbedding) -> bool:
    """Whether a leaf below knows virtual ids too: then that leaf looks them up and
    records them."""
    return any(isinstance(x, VirtualEmbedding) for x in layers(leaf.base))


# --- rules: where a model looks ids up -----------------------------------------------


@acts(LookUp, kind=VirtualEmbedding)
def _look_up(it: Interpreter, at: LookUp, ins: list[Any]) -> Any:
    leaf, indices = ins
    if is_leaf(indices) or not is_leaf(leaf):
        return None
    eqn, p, numbers = at.eqn, at.eqn.params, at.numbers
    axis = _looked_up(it, eqn, leaf, at.sizes)
    if axis not in numbers.start_index_map or at.batching:
        return it.densify(leaf, eqn, "which is no lookup of rows by token id")
    # Further columns, of a batched slice, say where features begin: at the first.
    column = numbers.start_index_map.index(axis)
    ids = indices[..., column]
    virtual, number = _told(it, leaf, ids)
    if beneath(leaf):
        y = it.base(eqn, ins)
    else:
        # With zeros among them they are neither sorted nor unique any longer.
        flags = {"indices_are_sorted": False, "unique_indices": False}
        eqn = eqn.replace(params={**p, **flags})
        real = jnp.where(virtual, jnp.zeros_like(ids), ids)
        y = it.base(eqn, [leaf, _with_column(indices, column, real)])
    rows = lax.gather(
        leaf.table(y.dtype),
        _with_column(indices.astype(jnp.int32), column, number),
        numbers,
        at.sizes,
        # A token that the prompt does not have is NaN, however the model looks up.
        mode=lax.GatherScatterMode.FILL_OR_DROP,
    )
    batch = [k for k in range(y.ndim) if k not in numbers.offset_dims]
    return jnp.where(lax.broadcast_in_dim(virtual, y.shape, batch), rows, y)


def _with_column(indices: jax.Array, column: int, ids: jax.Array) -> jax.Array:
    parts = [indices[..., :column], ids[..., None], indices[..., column + 1 :]]
    parts = [x for x in parts if x.shape[-1]]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)


@acts(Move, kind=VirtualEmbedding)
def _moved(it: Interpreter, move: Move, ins: list[Any]) -> Any:
    leaf = ins[0]
    if move.step in (Reverse, Repeat):
        return None  # ids would mean other rows
    if move.step is Pad and is_leaf(leaf):
        # Rows may be added behind the table: virtual ids still begin where they did.
        if any(s.low or s.inner or k != leaf.axis for k, s in move.along.items()):
            return None
        return leaf.move(it.base(move.eqn, ins), lambda x, *_: x)
    if move.step is SliceAt and is_leaf(leaf) and leaf.axis in move.along:
        return _one_row(it, move.eqn, ins)
    return moved(it, move, ins)


def _one_row(it: Interpreter, eqn: Any, ins: list[Any]) -> Any:
    """One row taken by its number, which is a lookup too."""
    leaf, *start = ins
    if any(map(is_leaf, start)):
        return None
    axis = _looked_up(it, eqn, leaf, eqn.params["slice_sizes"])
    virtual, number = _told(it, leaf, jnp.asarray(start[axis]))
    y = it.base(eqn, ins)  # out of range it reads the last row
    row = lax.dynamic_slice_in_dim(leaf.table(y.dtype), number, 1, axis)
    return jnp.where(jnp.broadcast_to(virtual, y.shape), row, y)


def _looked_up(it: Interpreter, eqn: Any, leaf: VirtualEmbedding, sizes: Any) -> int:
    """The axis of the vocabulary, if the equation takes one whole row of it."""
    axis = leaf.axis
    whole = axis is not None and all(
        n == (1 if k == axis else leaf.shape[k]) for k, n in enumerate(sizes)
    )
    if axis is None or not whole:
        it.densify(leaf, eqn, "which is no lookup of rows by token id")
        raise AssertionError  # it has no full value
    if leaf.shape[axis] < leaf.vocab:
        it.densify(
            leaf,
            eqn,
            f"which looks up {leaf.shape[axis]} of the {leaf.vocab} rows, so the ids "
            "are no longer the text's",
        )
    return axis


def _told(
    it: Interpreter, leaf: VirtualEmbedding, ids: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(which ids are virtual, the number of each one, 0 for real ones).

    Records them with `it`.  Where the values of the ids are known, some must be
    virtual, unless the model is asked for one position, as in generation.
    """
    wide = ids if ids.dtype.itemsize >= 4 else ids.astype(jnp.int32)
    first = jnp.asarray(leaf.vocab, wide.dtype)
    virtual = wide >= first
    number = jnp.where(virtual, wide - first, jnp.zeros_like(first)).astype(jnp.int32)
    if not beneath(leaf):
        if not leaf.silent:
            it.add_rows(jnp.where(virtual, number, jnp.int32(-1)))
        _check_ids(it, leaf, ids)
    return virtual, number


def _check_ids(it: Interpreter, leaf: VirtualEmbedding, ids: Any) -> None:
    promise = "virtual tokens", str.__str__(leaf.path)
    it.ledger.owe(
        promise,
        f"{whose(leaf)}no virtual token is in these ids; put them in front with "
        f"jpeft.prepend_virtual_tokens(ids, n, vocab_size={leaf.vocab})",
    )
    if isinstance(ids, Tracer) or ids.size == 0 or ids.shape[-1:] in ((), (1,)):
        it.ledger.pay(promise)
        return
    largest, end = int(jnp.max(ids)), leaf.vocab + leaf.tokens
    if largest >= leaf.vocab:
        it.ledger.pay(promise)
    if largest >= end:
        raise ValueError(
            f"{whose(leaf)}id {largest} is beyond the {leaf.tokens} virtual tokens "
            f"{leaf.vocab} to {end - 1}; was prepend_virtual_tokens called with "
            "another n, another vocab_size, or a task that the prompt does not have?"
        )


@acts(Contract, kind=VirtualEmbedding)
def _contract(it: Interpreter, verb: Contract, ins: list[Any]) -> Any:
    """A tied head scores real tokens.  A product with one-hot vectors is a lookup only
    where `one_hot` says so."""
    side = next(k for k, x in enumerate(ins) if isinstance(x, VirtualEmbedding))
    leaf, x, eqn = ins[side], ins[1 - side], verb.eqn
    contracting, batch = verb.contracting, verb.batch
    if leaf.axis in batch[side]:
        return it.densify(leaf, eqn, "which pairs every token with a row of its own")
    if leaf.axis not in contracting[side]:
        below = [y.base if isinstance(y, VirtualEmbedding) else y for y in ins]
        return it.bind(eqn, below)
    if not leaf.one_hot:
        return it.densify(
            leaf,
            eqn,
            "a lookup by one-hot rows, in which a virtual id is a row of zeros like "
            "any padding; if there are no other such rows, pass one_hot=True and the "
            "k-th row of zeros of a text is its k-th virtual token",
        )
    if is_leaf(x) or tuple(contracting[side]) != (leaf.axis,) or batch[side]:
        return None
    if jnp.ndim(x) < 2:
        return None
    zero = jnp.all(x == 0, axis=contracting[1 - side][0])
    rank = jnp.cumsum(zero, axis=-1, dtype=jnp.int32) - 1
    virtual = zero & (rank < leaf.tokens)
    if not beneath(leaf) and not leaf.silent:
        it.add_rows(jnp.where(virtual, rank, jnp.int32(-1)))
    y = it.base(eqn, ins)
    _, out = verb.labels(side, leaf.ndim, jnp.ndim(x))
    tokens = [k for k in out if isinstance(k, tuple)]
    table = jnp.moveaxis(leaf.table(y.dtype), leaf.axis, 0)
    features = [k for k in range(leaf.ndim) if k != leaf.axis]
    rows = jnp.take(table, jnp.where(virtual, rank, 0), axis=0)
    at = [out.index(k) for k in tokens]
    rows = align(rows, [*tokens, *features], out)
    return jnp.where(lax.broadcast_in_dim(virtual, y.shape, at), rows, y)


# --- rules: what happens to the table before -----------------------------------------


@acts(Scale, kind=VirtualEmbedding)
def _scale(it: Interpreter, by: Scale, ins: list[Any]) -> Any:
    """Scales all rows, the virtual ones too, by a number or a vector of features."""
    at = factor_of(it, by, ins)
    if at is None or at[0].axis in at[2]:
        return None
    leaf, v, varying = at

    def f(x: jax.Array, labels: list[Label], _: list[Label]) -> jax.Array:
        factor = jnp.broadcast_to(factor_along(v, varying, labels), x.shape)
        factor = factor.astype(x.dtype)
        return x / factor if by.divides else x * factor

    return leaf.move(it.base(by.eqn, ins), f)
