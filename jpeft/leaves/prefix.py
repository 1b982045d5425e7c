"""`Prefix`, `MadePrefix`: the leaves of prefix tuning, on kernels of keys and values.

Learned rows stand beside what the kernel makes; `attention` says how they are carried
to the scores.

    keys, values    (*stack, length, features), each kernel's own
    made            P = H W + c, with H (length, width) by a network that all share
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jpeft.adapt.equations import (
    Cast,
    Gather,
    Label,
    Move,
    Negate,
    Pad,
    Product,
    Same,
    Scale,
    Verb,
)
from jpeft.adapt.interpreter import Interpreter, acts, contracts
from jpeft.adapt.labels import Labelled, moved
from jpeft.boxes import unbox
from jpeft.leaf import (
    AdaptedLeaf,
    Several,
    Sharing,
    adapted_leaf,
    array_fields,
    box_of,
    boxed_like,
    frozen,
    innermost,
    is_leaf,
    static,
    trainable,
    transient,
    whose,
)
from jpeft.leaves.attention import BOTH, KEY, VALUE, Index, Tagged
from jpeft.leaves.networks import linear, lstm
from jpeft.leaves.projections import Runs
from jpeft.sharding.specs import place_beside

NETWORK_ELSEWHERE = (
    "the network that makes this prefix is held by another weight of the same "
    "transform; pass the whole tree"
)

# --- the leaves ----------------------------------------------------------------------


@adapted_leaf
class OfKernel(Labelled):
    """On a kernel whose output features are keys, values, or both among others.

    on: 1, or 0 where the prefix is switched off.
    runs: what the output features are; () means that all are what `role` says: keys,
        values, or both at once.
    features: which of the kernel's original output features stand where (`Index` over
        the output axes), if an equation moved the kernel.
    """

    on: Any = frozen("s", off=0)
    role: str = static(default=KEY)
    runs: Runs = static(default=())
    features: Index | None = static(default=None)

    def columns(self) -> np.ndarray:
        """For each output feature the column of the payload, -1 for none."""
        if self.features is not None:
            return self.features.array
        shape = [n for n, c in zip(self.shape, self.axes, strict=True) if c == "o"]
        if not self.runs:
            return np.arange(math.prod(shape)).reshape(shape)
        found, at = [], {KEY: 0, VALUE: self.count(KEY)}
        for role, n in self.runs:
            start = at.get(role)
            found.append(np.full(n, -1) if start is None else start + np.arange(n))
            if start is not None:
                at[role] += n
        return np.concatenate(found).reshape(shape)

    def count(self, role: str) -> int:
        """How many features of the payload are keys, or values."""
        if self.runs:
            return sum(n for r, n in self.runs if r == role)
        if self.role not in (role, BOTH):
            return 0
        return math.prod(
            n for n, c in zip(self.shape, self.axes, strict=True) if c == "o"
        )

    def move(self, base: Any, f: Any, axes: str | None = None) -> Self:
        place = lambda a: [k for k, c in enumerate(a) if c == "o"]
        with jax.ensure_compile_time_eval():
            columns = f(
                jnp.asarray(self.columns(), jnp.int32),
                place(self.axes),
                place(self.axes if axes is None else axes),
            )
            features = Index(columns)
        old = self.labels()
        made = self.replace(base=base, axes=self.axes if axes is None else axes)
        new = made.labels()
        arrays = {n: f(getattr(self, n), old[n], new[n]) for n in old}
        return made.replace(features=features, **arrays)

    def unstack(self) -> Any:
        return super().unstack() if self.axes[:1] == "s" else None

    def switched(self, on: float) -> Self:
        return self.replace(on=jax.tree.map(lambda x: jnp.full_like(x, on), self.on))


@adapted_leaf
class Prefix(OfKernel, Several):
    """Learned keys, values, or both, beside what a kernel makes.

    keys, values: (*stack, length, features), or (*stack, tasks, length, features).
    task: with several tasks, the task of each example; `jpeft.select` sets it.
    """

    keys: Any = trainable(("s", "length", "feature"), default=None)
    values: Any = trainable(("s", "length", "feature"), default=None)
    tasks: int = static(default=1)
    task: Any = transient()

    def holds(self) -> int:
        return self.tasks

    def select(self, ids: jax.Array) -> Self:
        return self.replace(task=ids) if self.tasks > 1 else self

    def labels(self) -> dict[str, list[Label]]:
        found = super().labels()
        for n in (KEY, VALUE):
            if n in found and self.tasks > 1:
                found[n].insert(-2, "task")
        return found


@adapted_leaf
class MadePrefix(OfKernel, Sharing):
    """A prefix made by a network; `lends` the part that all layers share.

    w (*stack, width, features) and c (*stack, features): the last layer, its own.
    start (*stack, length, features), or None: the network's output is added to it;
    `prefix_from_text` sets it.  embedding (length, d), w1 (d, width), b1 (width): held
    by one leaf for all.  Of an LSTM: w1 (2, d, 2 width), r1 (2, width / 2, 2 width),
    b1 (2, 2 width).
    """

    w: Any = trainable(("s", "width", "feature"))
    c: Any = trainable(("s", "feature"))
    embedding: Any = trainable(("length", "d"), default=None)
    w1: Any = trainable(("d", "width"), default=None)
    r1: Any = trainable(("way", "half", "gates"), default=None)
    b1: Any = trainable(("width",), default=None)
    start: Any = frozen(("s", "length", "feature"), default=None)
    hidden: Any = transient()

    def labels(self) -> dict[str, list[Label]]:
        found = super().labels()
        if self.r1 is not None:
            found |= {"w1": ["way", "d", "gates"], "b1": ["way", "gates"]}
        return found

    def lends(self) -> Mapping[str, Any] | None:
        if self.embedding is None:
            return None
        e, w1, b1 = map(unbox, (self.embedding, self.w1, self.b1))
        if self.r1 is not None:
            return {"hidden": lstm(e, w1, unbox(self.r1), b1)}
        return {"hidden": jnp.tanh(linear(e, w1, b1))}

    def borrow(self, lent: Mapping[str, Any]) -> Self:
        return self.replace(hidden=lent["hidden"])

    def finalize(self) -> AdaptedLeaf:
        """The `Prefix` that the network makes, which needs the network no longer."""
        if self.hidden is None:
            raise ValueError(f"{whose(self)}{NETWORK_ELSEWHERE}")
        w, c = unbox(self.w), unbox(self.c)
        rows = jnp.matmul(self.hidden, w, precision="highest") + c[..., None, :]
        return self.holding(rows if self.start is None else rows + unbox(self.start))

    def holding(self, rows: Float[jax.Array, "*stack length features"]) -> AdaptedLeaf:
        """The prefix of these rows, keys before values, without a network."""
        n = self.count(KEY)
        parts: dict[str, Any] = {KEY: rows[..., :n], VALUE: rows[..., n:]}
        made = Prefix(
            base=self.base,
            axes=self.axes,
            on=unbox(self.on),
            role=self.role,
            runs=self.runs,
            features=self.features,
            origin=self.origin,
            path=self.path,
            **{r: x for r, x in parts.items() if x.shape[-1]},
        )
        return boxed_like(box_of(self), made)

    def started(self, rows: Float[jax.Array, "*stack length features"]) -> AdaptedLeaf:
        """With a last layer of zeros, so that the prefix begins as these rows."""
        own = {n: unbox(x) for n, x in array_fields(self).items()}
        own |= {n: jnp.zeros_like(own[n]) for n in ("w", "c")}
        own["start"] = jnp.asarray(rows).astype(own["c"].dtype)
        leaf = place_beside(self.replace(**own), unbox(innermost(self)))
        return boxed_like(box_of(self), leaf.replace(base=self.base))


# --- rules ---------------------------------------------------------------------------


@contracts(kind=Prefix)
def _project(it: Interpreter, at: Product) -> Any:
    leaf, out = at.leaf, at.out
    mine = [k for k in out if isinstance(k, int)]
    if [leaf.axes[k] for k in mine if leaf.shape[k] > 1] != [
        "o" for k, c in enumerate(leaf.axes) if c == "o" and leaf.shape[k] > 1
    ]:
        return None  # used the other way round, or a whole stack at once
    y = it.base(at.eqn, at.ins())
    columns = leaf.columns()
    shape = [leaf.shape[k] if k in mine and leaf.axes[k] == "o" else 1 for k in out]  # type: ignore[index]
    order = [k for k in mine if leaf.axes[k] == "o"]
    places = [k for k, c in enumerate(leaf.axes) if c == "o"]
    columns = columns.transpose([places.index(k) for k in order]).reshape(shape)
    name = str.__str__(leaf.path)
    message = (
        f"{name}: the prefix of this kernel reached no attention that could be read. "
        "An opaque kernel (cuDNN, Pallas, flash attention in blocks) or a linear "
        "attention needs jpeft.prefix(..., mode='tokens')"
    )
    for role in (KEY, VALUE):
        if getattr(leaf, role) is not None:
            it.ledger.owe((name, role), message)
    keys, values, examples = leaf.keys, leaf.values, None
    if leaf.tasks > 1:
        keys, values, examples = _for_examples(leaf, jnp.shape(y), out)
    free = [k for k, label in enumerate(out) if not isinstance(label, int)]
    order = None
    if len(free) > 1:
        n = jnp.shape(y)[free[-1]]
        places = [n if k == free[-1] else 1 for k in range(len(out))]
        order = Index(np.arange(n).reshape(places))
    tag = Tagged(
        main=y,
        keys=keys,
        values=values,
        on=leaf.on,
        columns=Index(columns),
        examples=examples,
        order=order,
        shared=leaf.role == BOTH,
        name=leaf.path,
    )
    # So that a kernel of which nothing is key or value gives its plain output.
    return tag.moved(y, lambda a: a)


def _for_examples(
    leaf: Prefix, shape: Sequence[int], out: Sequence[Label]
) -> tuple[Any, Any, Index]:
    """(the rows of each example, the axis of the output that counts examples)."""
    if leaf.task is None:
        raise ValueError(
            f"{whose(leaf)}this prefix holds {leaf.tasks} tasks; say which one each "
            "example has: params = jpeft.select(params, task_ids)"
        )
    n = leaf.task.shape[0]
    axis = next((k for k, label in enumerate(out) if not isinstance(label, int)), None)
    if axis is None or shape[axis] != n:
        raise ValueError(
            f"{whose(leaf)}{n} task ids were selected, but the activations {shape} "
            "have another number of examples; examples must lead"
        )
    one_each = isinstance(leaf.task, np.ndarray) and np.array_equal(
        leaf.task, np.arange(leaf.tasks)
    )
    pick = lambda x: x if x is None or one_each else x[leaf.task]
    index = np.arange(n).reshape([n if k == axis else 1 for k in range(len(shape))])
    return pick(leaf.keys), pick(leaf.values), Index(index)


@acts(Cast, Negate, kind=OfKernel)
def _of_the_base(it: Interpreter, verb: Verb, ins: list[Any]) -> Any:
    """Leaves the learned rows alone: the kernel does not make them, so what changes its
    values does not change them."""
    return ins[0].replace(base=it.base(verb.eqn, ins))


@acts(Move, kind=OfKernel)
def _moved(it: Interpreter, move: Move, ins: list[Any]) -> Any:
    if move.step in (Pad, Gather):
        return None  # features that the prefix knows nothing of
    return (_of_the_base if isinstance(move, Same) else moved)(it, move, ins)


@acts(Scale, kind=OfKernel)
def _scale(it: Interpreter, by: Scale, ins: list[Any]) -> Any:
    leaf = next(filter(is_leaf, ins))
    if all(map(is_leaf, ins)) or by.eqn.outvars[0].aval.shape != leaf.shape:
        return None
    return leaf.replace(base=it.base(by.eqn, ins))
