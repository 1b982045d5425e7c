"""Virtual tokens: ids from the vocabulary's size up, which methods give a meaning.

    V + j                the j-th virtual token
    V + task * n + j     the j-th of a task, of n each

A virtual token is known by its id, not by its place, so it may stand anywhere in a text
and every example of a batch may have its own.  What a text is given beside its ids
(mask, labels, positions) grows with it:

    ids        V, V+1, ...    then the text
    mask       1, 1, ...      the model attends to virtual tokens
    labels     ignored        they predict nothing
    positions  0, 1, ...      and the text moves up by as many

Virtual tokens stand in front of a text, before its padding if it is padded on the left:
`[v v pad pad a b]`.  Between them and the text a model that counts positions by itself
then sees a gap, as it saw one before the text; a model that is given positions sees
none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.checks import check_count, plain
from jpeft.compat import Tracer


class VirtualTokens(NamedTuple):
    """A text with virtual tokens; None is what was not given.

    >>> import numpy as np, jpeft
    >>> ids, mask = np.array([[7, 8]]), np.ones((1, 2), int)
    >>> text = jpeft.prepend_virtual_tokens(ids, 2, mask=mask, vocab_size=100)
    >>> text.ids.tolist(), text.mask.tolist(), text.labels
    ([[100, 101, 7, 8]], [[1, 1, 1, 1]], None)
    """

    ids: Any
    mask: Any = None
    labels: Any = None
    positions: Any = None


def prepend_virtual_tokens(
    ids: Any,
    n: int,
    *,
    vocab_size: int,
    mask: Any = None,
    labels: Any = None,
    positions: Any = None,
    task: Any = 0,
    ignore_index: int = -100,
) -> VirtualTokens:
    """`n` virtual tokens in front of each text.

    ids: (*batch, length), NumPy or JAX, traced or not; every result is of the kind and
        dtype it was given as.
    vocab_size: the rows of the token embedding; virtual ids begin there.
    mask, labels, positions: of the shape of `ids`; see the module for what they get.
    task: whose tokens, a number or one for each example (*batch).

    Raises ValueError for shapes that do not fit, ids that are virtual already, a dtype
    too small for the new ones.

    >>> import numpy as np, jpeft
    >>> out = jpeft.prepend_virtual_tokens(np.array([[7, 8, 9]]), 2, vocab_size=100)
    >>> out.ids
    array([[100, 101,   7,   8,   9]])
    """
    n = check_count("virtual tokens", "n", n)
    template = virtual_template(n, ..., vocab_size=vocab_size)
    return template(
        *(ids, mask, labels, positions), task=task, ignore_index=ignore_index
    )


def strip_virtual_tokens(x: Any, n: int, *, axis: int = 1) -> Any:
    """Logits or hidden states without their first `n` positions.

    x: (batch, n + length, ...).  axis: that of the positions.

    >>> import numpy as np, jpeft
    >>> logits = np.zeros((4, 2 + 9, 50))  # two virtual tokens, nine of a text
    >>> jpeft.strip_virtual_tokens(logits, 2).shape
    (4, 9, 50)
    """
    return _cut(x, check_count("virtual tokens", "n", n), 0, axis)


def virtual_template(*pieces: Any, vocab_size: int) -> VirtualTemplate:
    """Texts with virtual tokens and words around them, by a pattern.

    pieces: a number is so many virtual tokens, a list of ids is words, and `...`, once,
    is the text.

    >>> import numpy as np, jpeft
    >>> template = jpeft.virtual_template(2, [5], ..., 1, vocab_size=100)
    >>> template.length
    3
    >>> template(np.array([[7, 8]])).ids
    array([[100, 101,   5,   7,   8, 102]])
    """
    vocab_size = check_count("virtual tokens", "vocab_size", vocab_size)
    made: list[int | tuple[int, ...] | None] = []
    for given in pieces:
        piece = plain(given)
        if piece is ...:
            made.append(None)
        elif isinstance(piece, (Sequence, np.ndarray)) and not isinstance(piece, str):
            made.append(_words(piece, vocab_size))
        else:
            made.append(check_count("virtual tokens", "a piece", piece))
    if made.count(None) != 1 or not any(isinstance(p, int) for p in made):
        raise ValueError(
            f"virtual_template: {pieces!r}: expected one `...` for the text and at "
            "least one number of virtual tokens, such as virtual_template(3, [12], ...)"
        )
    return VirtualTemplate(tuple(made), vocab_size)


@dataclasses.dataclass(frozen=True)
class VirtualTemplate:
    """See `virtual_template`.  None among the pieces is the text."""

    pieces: tuple[int | tuple[int, ...] | None, ...]
    vocab_size: int

    @property
    def length(self) -> int:
        """Virtual tokens of one text."""
        return sum(p for p in self.pieces if isinstance(p, int))

    @property
    def before(self) -> int:
        """Positions in front of the text."""
        return sum(map(_size, self.pieces[: self.pieces.index(None)]))

    @property
    def after(self) -> int:
        """Positions behind the text."""
        return sum(map(_size, self.pieces[self.pieces.index(None) + 1 :]))

    def strip(self, x: Any, *, axis: int = 1) -> Any:
        """Logits or hidden states at the text's own positions."""
        return _cut(x, self.before, self.after, axis)

    def __call__(
        self,
        ids: Any,
        mask: Any = None,
        labels: Any = None,
        positions: Any = None,
        *,
        task: Any = 0,
        ignore_index: int = -100,
    ) -> VirtualTokens:
        """The texts in the template; arguments as in `prepend_virtual_tokens`.

        Positions behind the text go on from the largest one that the mask lets in.
        """
        ids = _array(ids)
        given = {"mask": mask, "labels": labels, "positions": positions}
        rest = {n: None if x is None else _array(x) for n, x in given.items()}
        self._check(ids, rest, task)
        front, back = self._around(ids, task)
        batch = ids.shape[:-1]
        out: dict[str, Any] = {"ids": _join(front, ids, back)}
        for name, value in (("mask", 1), ("labels", ignore_index)):
            x = rest[name]
            if x is not None:
                filled = [
                    _of(x).full((*batch, k), value, x.dtype)
                    for k in (self.before, self.after)
                ]
                out[name] = _join(filled[0], x, filled[1])
        if (x := rest["positions"]) is not None:
            out["positions"] = self._positions(x, rest["mask"])
        return VirtualTokens(**out)

    def _around(self, ids: Any, task: Any) -> tuple[Any, Any]:
        """The ids in front of the texts and behind them."""
        row: list[int] = []
        virtual: list[bool] = []
        met = self.vocab_size
        for piece in self.pieces:
            if isinstance(piece, int):
                row += range(met, met + piece)
                met += piece
            elif piece is not None:
                row += piece
            virtual += [isinstance(piece, int)] * (0 if piece is None else _size(piece))
        xp = jnp if isinstance(task, jax.Array) else _of(ids)
        task = xp.broadcast_to(xp.asarray(task, ids.dtype), ids.shape[:-1])
        shift = self.length * xp.asarray(virtual, ids.dtype)
        here = (*ids.shape[:-1], len(row))
        first = xp.broadcast_to(xp.asarray(row, ids.dtype), here)
        shift = xp.broadcast_to(shift, here)
        new = first + shift * xp.broadcast_to(task[..., None], here)
        return new[..., : self.before], new[..., self.before :]

    def _positions(self, x: Any, mask: Any) -> Any:
        xp = jnp if isinstance(mask, jax.Array) else _of(x)
        batch = x.shape[:-1]
        count = lambda k: xp.broadcast_to(xp.arange(k, dtype=x.dtype), (*batch, k))
        front, text = count(self.before), x + xp.asarray(self.before, x.dtype)
        back = count(self.after)
        if self.after:
            seen = text if mask is None else xp.where(mask != 0, text, self.before - 1)
            last = xp.max(seen, axis=-1, keepdims=True) + 1
            back = back + xp.broadcast_to(last.astype(x.dtype), back.shape)
        return _join(front, text, back)

    def _check(self, ids: Any, rest: dict[str, Any], task: Any) -> None:
        if ids.ndim < 1 or not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(
                f"virtual tokens: expected integer ids (*batch, length), got "
                f"{ids.dtype}{list(ids.shape)}"
            )
        for name, x in rest.items():
            if x is not None and x.shape != ids.shape:
                raise ValueError(
                    f"virtual tokens: {name} has shape {x.shape}, the ids have "
                    f"{ids.shape}; expected one value for each token"
                    + (
                        " (build an attention mask from the extended one)"
                        if name == "mask"
                        else " (labels of whole texts need no change)"
                        if name == "labels"
                        else ""
                    )
                )
        mask = rest["mask"]
        if _known(mask) and np.issubdtype(mask.dtype, np.floating) and np.any(mask < 0):
            raise ValueError(
                "virtual tokens: mask has negative values, so it is one to add to "
                "scores; pass the mask of tokens, 1 for those that count"
            )
        known = _known(ids)
        if known and ids.size and (largest := int(np.max(ids))) >= self.vocab_size:
            raise ValueError(
                f"virtual tokens: the ids go up to {largest}, and from vocab_size="
                f"{self.vocab_size} on they are virtual: they were prepended already, "
                "or vocab_size is not the number of rows of the token embedding"
            )
        if jnp.shape(task) not in ((), ids.shape[:-1]):
            raise ValueError(
                f"virtual tokens: task has shape {jnp.shape(task)}; expected one "
                f"number or one for each example, {ids.shape[:-1]}"
            )
        tasks = np.asarray(task) if _known(task) else np.zeros((), np.int32)
        if not np.issubdtype(tasks.dtype, np.integer) or np.any(tasks < 0):
            raise ValueError(f"virtual tokens: task={task!r}: expected integers from 0")
        last = self.vocab_size + self.length * (int(np.max(tasks, initial=0)) + 1) - 1
        if last > jnp.iinfo(ids.dtype).max:
            raise ValueError(
                f"virtual tokens: the last id is {last}, which {ids.dtype} cannot "
                "hold; pass the ids as int32"
            )


def _words(piece: Any, vocab_size: int) -> tuple[int, ...]:
    words = np.asarray(piece)
    fits = words.ndim == 1 and words.size and np.issubdtype(words.dtype, np.integer)
    if not fits or words.min() < 0 or words.max() >= vocab_size:
        raise ValueError(
            f"virtual_template: {piece!r}: expected a list of token ids below "
            f"{vocab_size}"
        )
    return tuple(words.tolist())


def _size(piece: Any) -> int:
    return piece if isinstance(piece, int) else len(piece)


def _array(x: Any) -> Any:
    return x if isinstance(x, jax.Array) else np.asarray(x)


def _of(x: Any) -> Any:
    """The array library of x."""
    return jnp if isinstance(x, jax.Array) else np


def _known(x: Any) -> bool:
    """Whether the values can be looked at here and now."""
    if x is None or isinstance(x, Tracer):
        return False
    return getattr(x, "is_fully_addressable", True)


def _join(front: Any, x: Any, back: Any) -> Any:
    parts = [p for p in (front, x, back) if p.shape[-1] or p is x]
    library = jnp if any(isinstance(p, jax.Array) for p in parts) else np
    return library.concatenate(parts, axis=-1)


def _cut(x: Any, before: int, after: int, axis: int) -> Any:
    x = _array(x)
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(
            f"strip_virtual_tokens: axis {axis} of shape {x.shape}; say which axis "
            "counts positions with axis="
        )
    if x.shape[axis] < before + after:
        raise ValueError(
            f"strip_virtual_tokens: axis {axis} of shape {x.shape} has no "
            f"{before + after} virtual tokens; say which axis counts positions with "
            "axis="
        )
    index = [slice(None)] * x.ndim
    index[axis] = slice(before, x.shape[axis] - after)
    return x[tuple(index)]
