"""LoKr: a Kronecker product as the delta.  Yeh et al. 2023 (LyCORIS), arXiv:2309.14859;
KronA: Edalati et al. 2022, arXiv:2212.10650.

    W' = W + s W1 x W2     W1 (*stack, i1, o1)   W2 (*stack, i2, o2)   s = alpha / rank

with i1 i2 inputs and o1 o2 outputs, split as evenly as possible or by `factor`.  A
large factor is low-rank itself, W2 = A2 B2 with A2 (i2, rank), B2 (rank, o2).  One of
them starts at zero, so the model starts as its base.

The product is never made.  With the inputs seen as a matrix X (i1, i2),

    x (W1 x W2) = W1^T X W2

so the delta acts as small contractions, one after the other.

Where we depart from the papers: the weight may have several input and output axes,
which are counted through in the weight's order.  The two factors belong to whole
inputs and outputs: a model that slices such a weight before using it, or looks rows up
in it, is refused by name.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jpeft.adapt.equations import (
    Join,
    Label,
    Move,
    Negate,
    Product,
    Repeat,
    Reverse,
    Route,
    Scale,
    Split,
    Sum,
    Verb,
    align,
    smaller_as_value,
)
from jpeft.adapt.interpreter import Interpreter, acts, contracts
from jpeft.adapt.labels import (
    Labelled,
    Moving,
    contract,
    factor_along,
    factor_of,
    moved,
)
from jpeft.attach import Ranked
from jpeft.checks import check_count, one_of, plain
from jpeft.leaf import adapted_leaf, is_leaf, labels_of, static, trainable
from jpeft.leaves import first_factors
from jpeft.leaves.draw import filled
from jpeft.leaves.scaled import ScaledInput, ScaledOutput
from jpeft.sharding.explicit import places_of
from jpeft.transform import method
from jpeft.tree.layout import LINEAR, MATRIX, LeafUse

LYCORIS, PEFT = INITS = ("lycoris", "peft")
# The axes of the two factors.
I1, O1, I2, O2 = "i1", "o1", "i2", "o2"

# --- the leaf ------------------------------------------------------------------------


@adapted_leaf
class Kronecker(Labelled):
    """W + scale * (W1 x W2).

    Each factor is one array, w1 (*stack, i1, o1), or the product of two, w1_a (*stack,
    i1, rank) and w1_b (*stack, rank, o1); the others are None.
    """

    w1: Any = trainable(("s", "i1", "o1"), off=0, default=None)
    w1_a: Any = trainable(("s", "i1", "r1"), default=None)
    w1_b: Any = trainable(("s", "r1", "o1"), off=0, default=None)
    w2: Any = trainable(("s", "i2", "o2"), default=None)
    w2_a: Any = trainable(("s", "i2", "r2"), default=None)
    w2_b: Any = trainable(("s", "r2", "o2"), default=None)
    scale: float = static(default=1.0)

    def move(self, base: Any, f: Moving, axes: str | None = None) -> Any:
        """None where inputs or outputs are no longer whole."""
        after = self.axes if axes is None else axes
        shape = tuple(base.shape)
        for group in "io":
            old = [n for n, c in zip(self.shape, self.axes, strict=True) if c == group]
            new = [n for n, c in zip(shape, after, strict=True) if c == group]
            if math.prod(old) != math.prod(new):
                return None
        return super().move(base, f, axes)

    def factor(self, name: str, dtype: Any, **kwargs: Any) -> jax.Array:
        """w1 or w2 as one array."""
        whole = getattr(self, name)
        if whole is not None:
            return jnp.asarray(whole).astype(dtype)
        a, b = (jnp.asarray(getattr(self, f"{name}_{n}")).astype(dtype) for n in "ab")
        return jnp.matmul(a, b, **kwargs)

    def effective(self, w: jax.Array) -> jax.Array:
        highest = lax.Precision.HIGHEST
        one, two = (self.factor(n, w.dtype, precision=highest) for n in ("w1", "w2"))
        order = [k for g in "sio" for k, c in enumerate(self.axes) if c == g]
        delta = kronecker(one, two).reshape([self.shape[k] for k in order])
        return w + self.scale * align(delta, order, range(self.ndim))

    def unstack(self) -> Any:
        return super().unstack() if self.axes[0] == "s" else None

    def for_shards(self, spec: PartitionSpec, mesh: Any) -> Self | None:
        cut = zip(tuple(spec), self.axes, strict=False)
        if any(names is not None and c != "s" for names, c in cut):
            return None
        return super().for_shards(spec, mesh)


# --- rules: where a model consumes the weight ----------------------------------------


@contracts(kind=Kronecker, two=smaller_as_value)
def _contract(it: Interpreter, at: Product) -> Any:
    leaf, xl, out = at.leaf, at.xl, at.out
    wide = {
        g: [k for k, c in enumerate(leaf.axes) if c == g and leaf.shape[k] > 1]
        for g in "io"
    }
    # The sum runs over all inputs, or (a tied weight) over all outputs.
    for g, other in ("io", "oi"):
        if set(wide[g]) <= set(xl) - set(out) and not set(wide[other]) & set(xl):
            return it.with_delta(at, _product(leaf, at.x, xl, out, g, **at.options))
    return None


def _product(
    leaf: Kronecker,
    x: jax.Array,
    xl: list[Label],
    out: list[Label],
    group: str,
    *,
    out_sharding: Any = None,
    **options: Any,
) -> jax.Array:
    """scale * x (W1 x W2), summed over the axes of `group`."""
    dtype = jnp.dtype(leaf.dtype)
    # On an explicit mesh free axes stay where they are.
    place = places_of(x, xl, out_sharding, kept=out)
    summed = [k for k in _axes(leaf, group) if k in xl]
    rest = [k for k in xl if k not in summed]
    x = align(x, xl, [*rest, *summed])
    split, made = ((I1, I2), (O1, O2)) if group == "i" else ((O1, O2), (I1, I2))
    sizes = _sizes(leaf)
    x = x.reshape(*x.shape[: len(rest)], *(sizes[k] for k in split))
    xl = [*rest, *split]
    stack = [k for k, c in enumerate(leaf.axes) if c == "s"]
    labels = leaf.labels()
    steps = _order(leaf, split)
    for n, name in enumerate(steps):
        w, wl = getattr(leaf, name).astype(dtype), labels[name]
        later = {k for m in steps[n + 1 :] for k in labels[m]}
        keep = {*out, *made, *later, *(stack if later else ())}
        x, xl = contract(x, xl, w, wl, keep, place=place, **options)
        x = x.astype(dtype) if later else x
    # Outputs in front or behind: the reshape puts them in the order of `out`.
    others = [k for k in out if k in xl]
    x = align(x, xl, [*others, *made])
    mine = [k for k in out if k not in others]
    x = x.reshape(*x.shape[: len(others)], *(leaf.shape[k] for k in mine))  # type: ignore[index]
    x = align(x, [*others, *mine], out)
    return x if leaf.scale == 1.0 else x * jnp.asarray(leaf.scale, x.dtype)


def _axes(leaf: Kronecker, group: str) -> list[Label]:
    return [k for k, c in enumerate(leaf.axes) if c == group]


def _sizes(leaf: Kronecker) -> dict[Label, int]:
    return {
        k: n
        for name, labels in leaf.labels().items()
        for k, n in zip(labels, getattr(leaf, name).shape, strict=True)
    }


def _order(leaf: Kronecker, split: Sequence[str]) -> list[str]:
    """The cheapest order in which the activation can be multiplied by the arrays.

    Between the two halves of a factor the activation has few values (the rank)."""
    labels, sizes = leaf.labels(), _sizes(leaf)
    pairs = {n: {k for k in of if isinstance(k, str)} for n, of in labels.items()}

    def cost(names: Sequence[str]) -> float:
        have, total = set(split), 0
        for name in names:
            if not have & pairs[name]:
                return math.inf  # the other half comes first
            have ^= pairs[name]
            total += math.prod(sizes[k] for k in have | pairs[name])
        return total

    return list(min(itertools.permutations(labels), key=cost))


@acts(Route, kind=Kronecker)
def _route(it: Interpreter, at: Route, ins: list[Any]) -> Any:
    """Experts on sorted tokens: each token brings i1 rows for W2, then o2 for W1."""
    x, leaf, *sizes = ins
    if is_leaf(x) or not is_leaf(leaf):
        return None
    if at.axes() != (0, 1, 2, 0) or leaf.axes != "sio":
        return None
    (sizes,), options = sizes, at.options
    one, two = (leaf.factor(n, leaf.dtype) for n in ("w1", "w2"))
    (_, i1, o1), (_, i2, o2) = one.shape, two.shape
    n = x.shape[0]
    h = lax.ragged_dot(x.reshape(n * i1, i2), two, sizes * i1, **options)
    h = jnp.swapaxes(h.reshape(n, i1, o2), 1, 2).reshape(n * o2, i1)
    d = lax.ragged_dot(h.astype(leaf.dtype), one, sizes * o2, **options)
    d = jnp.swapaxes(d.reshape(n, o2, o1), 1, 2).reshape(n, o1 * o2)
    y = it.base(at.eqn, ins)
    return y + (leaf.scale * d).astype(y.dtype)


# --- rules: what happens to the weight before it is consumed -------------------------


@acts(Move, kind=Kronecker)
def _moved(it: Interpreter, move: Move, ins: list[Any]) -> Any:
    """The equation must keep the order in which inputs, and outputs, are counted."""
    if move.step in (Split, Reverse, Repeat):
        return None
    leaf = ins[0]
    for group in "io" if is_leaf(leaf) else "":
        order = [k for k in move.order if leaf.axes[k] == group and leaf.shape[k] > 1]
        if order != sorted(order):
            return None
    return moved(it, move, ins)


@acts(Negate, kind=Kronecker)
def _negate(it: Interpreter, verb: Negate, ins: list[Any]) -> Any:
    return ins[0].replace(base=it.base(verb.eqn, ins), scale=-ins[0].scale)


@acts(Scale, kind=Kronecker)
def _scale(it: Interpreter, by: Scale, ins: list[Any]) -> Any:
    """By a number for each matrix of a stack; by a vector, a `Scaled` leaf over it."""
    at = factor_of(it, by, ins)
    if at is None:
        return None
    leaf, v, varying = at
    v = 1 / v if by.divides else v
    groups = {leaf.axes[k] for k in varying}
    if groups <= {"s"}:
        name = "w1" if leaf.w1 is not None else "w1_b"
        x, labels = getattr(leaf, name), leaf.labels()[name]
        x = x * factor_along(v, varying, labels).astype(x.dtype)
        return leaf.replace(base=it.base(by.eqn, ins), **{name: x})
    kind = ScaledOutput if groups <= {"s", "o"} else ScaledInput
    labels = labels_of(kind, leaf.axes)["scale"]
    if not varying <= set(labels):
        return None
    sizes = [leaf.shape[k] for k in labels]  # type: ignore[index]
    scale = jnp.broadcast_to(factor_along(v, varying, labels), sizes)
    return kind(base=leaf, axes=leaf.axes, scale=scale, path=leaf.path)


@acts(Sum, Join, kind=Kronecker)
def _no_longer_whole(it: Interpreter, verb: Verb, ins: list[Any]) -> Any:
    return None


# --- the mathematics -----------------------------------------------------------------


def kronecker(
    one: Float[Array, "*stack i1 o1"], two: Float[Array, "*stack i2 o2"]
) -> Float[Array, "*stack in out"]:
    """The Kronecker product of each pair of matrices."""
    z = one[..., :, None, :, None] * two[..., None, :, None, :]
    *stack, i1, i2, o1, o2 = z.shape
    return z.reshape(*stack, i1 * i2, o1 * o2)


def factorization(n: int, factor: int = -1) -> tuple[int, int]:
    """n as a product of two.

    factor: the first of them where it divides n, else an upper bound of it; -1 is no
    bound.  Short of that the two are as even as they can be, the smaller one first.

    >>> [factorization(*n) for n in ((768,), (768, 4), (250, 4), (7,))]
    [(24, 32), (4, 192), (2, 125), (1, 7)]
    """
    if factor > 0 and n % factor == 0:
        return factor, n // factor
    most = math.isqrt(n) if factor == -1 else min(factor, math.isqrt(n))
    first = next(k for k in range(most, 0, -1) if n % k == 0)
    return first, n // first


def draw(
    key: jax.Array, shapes: Mapping[str, tuple[int, ...]], init: str
) -> dict[str, jax.Array]:
    """First values of the arrays of both factors, in float32."""
    zero = {LYCORIS: ("w2", "w2_a"), PEFT: ("w1", "w1_b")}[init]
    keys = jax.random.split(key, len(shapes))
    return {
        n: filled(shape, 0, jnp.float32)
        if n in zero
        else first_factors.draw_a(k, shape, shape[-2], "kaiming", jnp.float32)
        for k, (n, shape) in zip(keys, shapes.items(), strict=True)
    }


# --- the method ----------------------------------------------------------------------


def check_factor(method: str, name: str, value: Any) -> int:
    return -1 if plain(value) == -1 else check_count(method, name, value)


@method("lokr")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoKr(Ranked):
    """A transform that puts a Kronecker product beside each selected weight.

        W' = W + s W1 x W2     s = alpha / rank

    Yeh et al. 2023, arXiv:2309.14859; Edalati et al. 2022, arXiv:2212.10650.

    rank: of the second factor; from half of that factor's larger side on, it is one
        matrix.
    alpha: numerator of the scale; None means `rank`, that is a scale of 1.
    where, exclude: which weights, linear ones.
    factor: the size of the first factor's sides where it divides those of the weight,
        and the most they may be where not; -1 splits as evenly as can be.
    decompose_both: the first factor is low-rank as well, by the same measure.
    init: "lycoris": the second factor (its A2) starts at zero, the rest uniform, as
        the authors of LyCORIS have it.  "peft": the first (its B1), as Hugging Face
        PEFT has it.
    dtype: of the factors; None means float32, or float64 beside float64.
    rank_pattern, alpha_pattern: {regular expression for the whole path: value}.

    Raises ValueError for a rank below 1, and as `jpeft.lora` does.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = {"dense": {"kernel": jnp.ones((12, 10))}}
    >>> kernel = jpeft.lokr(rank=1)(jax.random.key(0), params)["dense"]["kernel"]
    >>> kernel.w1.shape, kernel.w2_a.shape, kernel.w2_b.shape
    ((3, 2), (4, 1), (1, 5))
    """

    factor: Annotated[int, check_factor] = -1
    decompose_both: bool = False
    init: Annotated[str, one_of(INITS)] = LYCORIS

    def accepts(self, use: LeafUse) -> bool:
        return use.kind in (LINEAR, MATRIX)

    def shapes(self, use: LeafUse, rank: int) -> dict[str, tuple[int, ...]]:
        """Of the arrays beside a weight."""
        stack = tuple(use.sizes("s"))
        n_in, n_out = math.prod(use.sizes("i")), math.prod(use.sizes("o"))
        i1, i2 = factorization(n_in, self.factor)
        o1, o2 = factorization(n_out, self.factor)
        out: dict[str, tuple[int, ...]] = {}
        for n, i, o in (("w1", i1, o1), ("w2", i2, o2)):
            if rank < max(i, o) / 2 and (n == "w2" or self.decompose_both):
                out |= {f"{n}_a": (*stack, i, rank), f"{n}_b": (*stack, rank, o)}
            else:
                out[n] = (*stack, i, o)
        return out

    def attach(self, key: jax.Array, path: str, base: Any, use: LeafUse) -> Kronecker:
        rank, alpha = self.rank_of(path), self.alpha_of(path)
        assert use.axes is not None
        drawn = draw(key, self.shapes(use, rank), self.init)
        dtype = self.adapter_dtype(base)
        factors: dict[str, Any] = {n: x.astype(dtype) for n, x in drawn.items()}
        return Kronecker(
            base=base,
            axes=use.axes,
            scale=1.0 if alpha is None else float(alpha / rank),
            **factors,
        )


lokr = LoKr
