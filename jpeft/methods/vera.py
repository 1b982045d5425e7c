"""VeRA: vectors over random matrices that all layers share.  Kopiczko et al. 2023,
arXiv:2310.11454.

    W' = W + (A * d) (B * b)     A (in, rank)   B (rank, out)     both random and frozen
    x W' = x W + (((x A) * d) B) * b     d (*stack, rank)   b (*stack, *out)

A and B are drawn once for the largest weight; smaller ones use their first rows and
columns.  They are kept in the first adapted weight of the tree, from which the others
borrow them, and saved with the adapter: no seed has to give the same numbers elsewhere.
d starts at 0.1 and b at zero, so the model starts as its base.

Both are uniform with variance 2 / fan-in (Kaiming), fan-in being the largest input of A
and the rank of B.

Where we depart from the paper: a weight may have several input and output axes, which
are counted through in the weight's order.  (Hugging Face PEFT draws A and B with
torch's generator; the numbers are others here.)
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jpeft.adapt.equations import Label, Product, align
from jpeft.adapt.interpreter import Interpreter, contracts
from jpeft.adapt.labels import contract
from jpeft.attach import LeafMethod, path_key
from jpeft.checks import Count, Floating, Positive, Rate
from jpeft.leaf import (
    AdaptedLeaf,
    Sharing,
    adapted_leaf,
    frozen,
    labels_of,
    shapes_beside,
    static,
    trainable,
    transient,
    whose,
)
from jpeft.leaves.draw import drawn
from jpeft.leaves.low_rank import ActsAsLowRank, LowRank, as_low_rank, dropped
from jpeft.leaves.scaled import spread, times
from jpeft.transform import Transform, method, written
from jpeft.tree.layout import LINEAR, MATRIX, LeafUse
from jpeft.tree.paths import slots
from jpeft.tree.where import Where
from jpeft.types import PyTree

# --- the leaf as it is stored --------------------------------------------------------


@adapted_leaf
class VeRALeaf(AdaptedLeaf, Sharing):
    """The two vectors of a weight; in one leaf also what all of them share.

    d: (*stack, rank); b: (*stack, *out); shared_a: (largest in, rank), shared_b: (rank,
    largest out).  lent_a: (*in, rank), lent_b: (rank, *out), of this weight.
    """

    axes: str = static()
    d: Any = trainable("sr")
    b: Any = trainable("so", off=0)
    shared_a: Any = frozen(default=None)
    shared_b: Any = frozen(default=None)
    lent_a: Any = transient()
    lent_b: Any = transient()
    dropout: float = static(default=0.0)

    def lends(self) -> Mapping[str, Any] | None:
        """Functions that give a weight its rows or columns: the same array to weights
        of the same sizes, so that what they make of one activation is made once."""
        if self.shared_a is None:
            return None
        a, b = jnp.asarray(self.shared_a), jnp.asarray(self.shared_b)
        rows = lambda *ins: a[: math.prod(ins)].reshape(*ins, -1)
        columns = lambda *outs: b[:, : math.prod(outs)].reshape(-1, *outs)
        return {"a": functools.cache(rows), "b": functools.cache(columns)}

    def borrow(self, lent: Mapping[str, Any]) -> Self:
        ins, outs = (
            [n for n, c in zip(self.shape, self.axes, strict=True) if c == g]
            for g in "io"
        )
        return self.replace(lent_a=lent["a"](*ins), lent_b=lent["b"](*outs))

    def begin(self) -> SharedLowRank:
        """The leaf with its rows and columns of the shared matrices."""
        if self.lent_a is None:
            raise ValueError(
                f"{whose(self)}VeRA's random matrices are kept in the first adapted "
                "weight of the tree, which is not among the arguments; pass the whole "
                "tree"
            )
        return SharedLowRank(
            base=self.base,
            axes=self.axes,
            a=self.lent_a,
            d=self.d,
            b=self.lent_b,
            e=self.b,
            dropout=self.dropout,
            origin=self.origin,
            path=self.path,
            key=self.key,
        )

    def effective(self, w: jax.Array) -> jax.Array:
        return self.begin().effective(w)

    def grown(self, axis: int) -> None:
        """Rows of the matrices that all share are counted by the largest weight."""


# --- the leaf as it acts -------------------------------------------------------------


@adapted_leaf
class SharedLowRank(ActsAsLowRank):
    """W + (A * d).(B * e), where A and B belong to other weights too.

    a: (*in, rank); d: (*stack, rank); b: (rank, *out); e: (*stack, *out).
    """

    a: Any = frozen("ir")
    d: Any = trainable("sr")
    b: Any = frozen("ro")
    e: Any = trainable("so")
    dropout: float = static(default=0.0)

    def as_low_rank(self) -> LowRank:
        own, of = self.labels(), labels_of(LowRank, self.axes)
        pair = lambda x, v, n: (
            spread(getattr(self, x), own[x], of[n])
            * spread(getattr(self, v), own[v], of[n])
        )
        return LowRank(
            base=self.base,
            axes=self.axes,
            a=pair("a", "d", "a"),
            b=pair("b", "e", "b"),
            dropout=self.dropout,
            origin=self.origin,
            path=self.path,
            key=self.key,
        )


@contracts(kind=SharedLowRank, two=as_low_rank)
def _contract(it: Interpreter, at: Product) -> Any:
    """Through the rank, scaled in between: A * d and B * b are not made."""
    leaf, x, xl, out, options = at.leaf, at.x, at.xl, at.out, at.options
    if options.pop("out_sharding") is not None:
        return it.bind(at.eqn, at.ins(leaf=leaf.as_low_rank()))
    wide = lambda g: {
        k for k, c in enumerate(leaf.axes) if c == g and leaf.shape[k] > 1
    }
    summed = set(xl) - set(out)
    if wide("i") <= summed and not wide("o") & set(xl):
        steps = ("a", "d", "b", "e")
    elif wide("o") <= summed and not wide("i") & set(xl):
        steps = ("e", "b", "d", "a")
    else:
        return it.bind(at.eqn, at.ins(leaf=leaf.as_low_rank()))
    y, dtype, labels = dropped(leaf, x), jnp.dtype(leaf.dtype), leaf.labels()
    for n, name in enumerate(steps):
        v, vl = getattr(leaf, name), labels[name]
        if name in ("d", "e"):
            y, xl = _times(y, xl, v, vl)
            continue
        later = {k for m in steps[n + 1 :] for k in labels[m]}
        y, xl = contract(y, xl, v.astype(dtype), vl, {*out, *later}, **options)
        y = y.astype(dtype)
    gone = [n for n, k in enumerate(xl) if k not in out]
    y, xl = jnp.sum(y, gone), [k for k in xl if k in out]
    return it.with_delta(at, align(y, xl, out))


def _times(
    x: Float[Array, "..."], xl: list[Label], v: Float[Array, "..."], vl: list[Label]
) -> tuple[Float[Array, "..."], list[Label]]:
    """x times v along the labels they share, with an axis for each other label of v."""
    new = [k for k in vl if k not in xl]
    labels = [*new, *xl]
    return times(jnp.expand_dims(x, range(len(new))), spread(v, vl, labels)), labels


# --- the mathematics -----------------------------------------------------------------


def draw(
    key: jax.Array, n_in: int, rank: int, n_out: int
) -> tuple[Float[Array, "in rank"], Float[Array, "rank out"]]:
    """A and B: uniform with variance 2 / fan-in, in float32."""

    def uniform(name: str, shape: tuple[int, ...], fan_in: int) -> jax.Array:
        bound = math.sqrt(6 / fan_in)
        draw = lambda k, s: jax.random.uniform(k, s, jnp.float32, -bound, bound)
        return drawn(draw, path_key(key, name), shape)

    return uniform("a", (n_in, rank), n_in), uniform("b", (rank, n_out), rank)


# --- the method ----------------------------------------------------------------------


@method("vera")
@dataclasses.dataclass(frozen=True)
class VeRA(Transform):
    """A transform that trains two vectors a weight, over random matrices that all of
    them share.

        W' = W + (A * d) (B * b)

    Kopiczko et al. 2023, arXiv:2310.11454.

    rank: of A and B; it may be large, since a weight trains rank + out numbers.
    where, exclude: which weights, linear ones.
    d_initial: the first value of d; b starts at zero.
    dropout: rate on the activations that enter A, drawn where `adapt` is given a key.
    dtype: of the vectors and of A and B; None means float32.

    Raises ValueError as `jpeft.lora` does.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = {"query": jnp.ones((7, 5)), "value": jnp.ones((7, 5))}
    >>> jpeft.count(jpeft.vera(4, where=".*")(jax.random.key(0), params))
    Count(trainable=18, frozen=118)
    """

    rank: Count = written(256)
    _: dataclasses.KW_ONLY
    d_initial: Positive = 0.1
    dropout: Rate = 0.0
    dtype: Floating | None = None
    where: Where = "linear"
    exclude: Where = ()

    def __call__(
        self,
        key: jax.Array,
        params: PyTree,
        *,
        uses: Mapping[str, LeafUse] | None = None,
    ) -> PyTree:
        found = _Vectors(whole=self).targets(slots(params), uses)
        largest = lambda g: max(math.prod(u.sizes(g)) for u in found.values())
        shared = draw(key, largest("i"), self.rank, largest("o"))
        attach = _Vectors(whole=self, holder=next(iter(found)), shared=shared)
        return attach(key, params, uses=uses)


vera = VeRA


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Vectors(LeafMethod):
    """What `VeRA` does to each weight, once what is shared is drawn.

    holder: the path of the weight that keeps it.
    """

    whole: VeRA
    holder: str = ""
    shared: Any = None

    name: ClassVar[str] = "vera"

    def origin(self) -> str:
        return self.whole.origin()

    def selection(self) -> tuple[Where, Where]:
        return self.whole.where, self.whole.exclude

    def accepts(self, use: LeafUse) -> bool:
        return use.kind in (LINEAR, MATRIX)

    @property
    def dtype(self) -> str | None:
        return self.whole.dtype

    def attach(self, key: jax.Array, path: str, base: Any, use: LeafUse) -> VeRALeaf:
        assert use.axes is not None
        dtype = self.adapter_dtype(base)
        shapes = shapes_beside(VeRALeaf, use.shape, use.axes, r=self.whole.rank)
        a, b = self.shared if path == self.holder else (None, None)
        return VeRALeaf(
            base=base,
            axes=use.axes,
            d=jnp.full(shapes["d"], self.whole.d_initial, dtype),
            b=jnp.zeros(shapes["b"], dtype),
            shared_a=None if a is None else a.astype(dtype),
            shared_b=None if b is None else b.astype(dtype),
            lent_a=None,
            lent_b=None,
            dropout=float(self.whole.dropout),
        )
