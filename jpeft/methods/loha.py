"""LoHa: the elementwise product of two low-rank deltas.  Hyeon-Woo et al. 2021
(FedPara), arXiv:2108.06098; as an adapter: Yeh et al. 2023 (LyCORIS), arXiv:2309.14859.

    W' = W + s (A1 B1) * (A2 B2)     A (*stack, *in, rank)   B (*stack, rank, *out)

s = alpha / rank.  With twice the parameters of LoRA its rank is up to rank^2.  One of
the four starts at zero, so the model starts as its base.

The elementwise product of two low-rank matrices is itself a product, of columns that
are products of columns:

    (A1 B1) * (A2 B2) = A B     A_i,pq = A1_ip A2_iq     B_pq,o = B1_po B2_qo

So the delta acts as LoRA of rank^2 does, as long as that is fewer multiplications; from
there on (rank above about sqrt(in out / (in + out) / 3), 11 for 768 x 768) the delta is
made for each product, joins the weight, is dropped again and made once more for the
backward pass.  Nothing of W's size is kept in between.  Beside a weight in bfloat16,
where a small delta would be rounded away, and beside a quantised one it has a product
of its own.

Where we depart from the papers: FedPara trains W itself in this form, without a frozen
base; and kernels of convolutions are factored as matrices, without a core tensor.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jpeft.adapt.equations import Label, Product, align
from jpeft.adapt.interpreter import Interpreter, contracts
from jpeft.adapt.labels import R, contract
from jpeft.attach import Ranked
from jpeft.checks import one_of
from jpeft.leaf import (
    adapted_leaf,
    is_leaf,
    shapes_beside,
    static,
    trainable,
    wide_dtype,
)
from jpeft.leaves import first_factors
from jpeft.leaves.draw import drawn, filled
from jpeft.leaves.low_rank import (
    ActsAsLowRank,
    LowRank,
    as_low_rank,
    low_rank_product,
    through,
)
from jpeft.methods.lora import check_rank
from jpeft.transform import method
from jpeft.tree.layout import CONV, LINEAR, MATRIX, LeafUse

FACTORS = ("a1", "b1", "a2", "b2")
LYCORIS, PEFT = INITS = ("lycoris", "peft")

# --- the leaf ------------------------------------------------------------------------


@adapted_leaf
class Hadamard(ActsAsLowRank):
    """W + scale * (A1.B1) * (A2.B2).

    a: (*stack, *in, rank); b: (*stack, rank, *out).
    """

    a1: Any = trainable("sir")
    b1: Any = trainable("sro")
    a2: Any = trainable("sir")
    b2: Any = trainable("sro", off=0)
    scale: float = static(default=1.0)

    @property
    def rank(self) -> int:
        return self.b1.shape[self.labels()["b1"].index(R)]

    def as_low_rank(self) -> LowRank:
        at = {n: labels.index(R) for n, labels in self.labels().items()}
        return LowRank(
            base=self.base,
            axes=self.axes,
            a=products_along(self.a1, self.a2, at["a1"]),
            b=products_along(self.b1, self.b2, at["b1"]),
            scale=self.scale,
            origin=self.origin,
            path=self.path,
        )

    def delta(self, dtype: Any) -> jax.Array:
        one, two = (
            low_rank_product(a, b, self.axes, dtype)
            for a, b in ((self.a1, self.b1), (self.a2, self.b2))
        )
        return self.scale * one * two

    def effective(self, w: jax.Array) -> jax.Array:
        return w + self.delta(w.dtype)


@contracts(kind=Hadamard, two=as_low_rank)
def _contract(it: Interpreter, at: Product) -> Any:
    leaf, x, xl, out, options = at.leaf, at.x, at.xl, at.out, at.options
    shape = at.eqn.outvars[0].aval.shape
    whole = leaf.size * math.prod(
        n for n, k in zip(x.shape, xl, strict=True) if isinstance(k, tuple)
    )
    low_rank = leaf.rank**2 * (x.size + math.prod(shape))
    # Forwards and backwards.  A delta that joins the weight needs no product of its
    # own but for its gradient; beside a narrower weight it would be rounded away there.
    joins = not is_leaf(leaf.base) and leaf.dtype == wide_dtype(leaf.dtype)
    products = 1 if joins else 3
    as_product = 3 * low_rank <= products * whole + 8 * leaf.rank * leaf.size
    template = leaf.replace(base=jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), key=None)

    factors = {n: getattr(leaf, n) for n in FACTORS}

    if joins and not as_product:

        def joined(x: Any, base: Any, factors: dict[str, jax.Array]) -> jax.Array:
            w = template.replace(base=base, **factors).materialize()
            return it.native(at.eqn)(*at.ins(leaf=w, x=x))

        return jax.checkpoint(joined, prevent_cse=False)(x, leaf.base, factors)

    def f(x: jax.Array, factors: dict[str, jax.Array]) -> jax.Array:
        made = template.replace(**factors)
        if as_product:
            return through(made.as_low_rank(), x, xl, out, **options)
        return _densely(made, x, xl, out, options)

    # What is as large as the weight, or has rank^2 columns, is made again for the
    # backward pass; the activation inside is kept.
    policy = jax.checkpoint_policies.dots_saveable if as_product else None
    f = jax.checkpoint(f, policy=policy, prevent_cse=False)
    return it.with_delta(at, f(x, factors))


def _densely(
    leaf: Hadamard,
    x: jax.Array,
    xl: list[Label],
    out: list[Label],
    options: dict[str, Any],
) -> jax.Array:
    """The product with a delta that is made for it."""
    options = dict(options)
    every: list[Label] = list(range(leaf.ndim))
    delta = leaf.delta(wide_dtype(leaf.dtype)).astype(leaf.dtype)
    sharding = options.pop("out_sharding")
    place = None
    if sharding is not None:  # an explicit mesh asks of each product where it goes
        names = dict(zip(out, sharding.spec, strict=True))
        place = lambda labels: NamedSharding(
            sharding.mesh, PartitionSpec(*(names.get(k) for k in labels))
        )
    y, yl = contract(x, xl, delta, every, out, place=place, **options)
    return align(y, yl, out)


# --- the mathematics -----------------------------------------------------------------


def products_along(
    x: Float[Array, "..."], y: Float[Array, "..."], axis: int
) -> Float[Array, "..."]:
    """Every entry of x along an axis times every entry of y along it, x's slower."""
    z = jnp.expand_dims(x, axis + 1) * jnp.expand_dims(y, axis)
    return z.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])


def draw(
    key: jax.Array, shapes: Mapping[str, tuple[int, ...]], fan_in: int, init: str
) -> dict[str, jax.Array]:
    """First values of the four factors, in float32."""
    k1, k2, k3 = jax.random.split(key, 3)
    normal = lambda k, n, by=1.0: drawn(
        lambda k, s: by * jax.random.normal(k, s), k, shapes[n]
    )
    zeros = lambda n: filled(shapes[n], 0, jnp.float32)
    if init == LYCORIS:
        return {
            "a1": normal(k1, "a1"),
            "b1": normal(k2, "b1", 0.1),
            "a2": normal(k3, "a2"),
            "b2": zeros("b2"),
        }
    rank = shapes["a1"][-1]
    uniform = lambda k, n, fan: first_factors.draw_a(
        k, shapes[n], fan, "kaiming", jnp.float32
    )
    return {
        "a1": uniform(k1, "a1", fan_in),
        "b1": uniform(k2, "b1", rank),
        "a2": zeros("a2"),
        "b2": uniform(k3, "b2", rank),
    }


# --- the method ----------------------------------------------------------------------


@method("loha")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoHa(Ranked):
    """A transform that puts an elementwise product of two low-rank deltas beside each
    selected weight.

        W' = W + s (A1 B1) * (A2 B2)     s = alpha / rank

    Hyeon-Woo et al. 2021, arXiv:2108.06098; Yeh et al. 2023, arXiv:2309.14859.

    rank: of each of the two; their product has up to its square.
    alpha: numerator of the scale; None means `rank`, that is a scale of 1.
    where, exclude: which weights, linear ones or convolutions.
    init: "lycoris": A1, A2 ~ N(0, 1), B1 ~ N(0, 0.01), B2 zero, as the authors of
        LyCORIS have it.  "peft": B1, B2 uniform with variance 1/(3 rank), A1 with
        variance 1/(3 in), A2 zero, as Hugging Face PEFT has it; the delta then grows
        much more slowly.
    dtype: of the factors; None means float32, or float64 beside float64.
    rank_pattern, alpha_pattern: {regular expression for the whole path: value}.

    Raises ValueError for a rank below 1 or above the matrix, and as `jpeft.lora` does.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = {"dense": {"kernel": jnp.ones((7, 5))}}
    >>> params = jpeft.loha(rank=2)(jax.random.key(0), params)
    >>> jpeft.count(params).trainable
    48
    """

    init: Annotated[str, one_of(INITS)] = LYCORIS

    def accepts(self, use: LeafUse) -> bool:
        return use.kind in (LINEAR, MATRIX, CONV)

    def attach(self, key: jax.Array, path: str, base: Any, use: LeafUse) -> Hadamard:
        rank, alpha = self.rank_of(path), self.alpha_of(path)
        check_rank(path, rank, use)
        assert use.axes is not None
        shapes = shapes_beside(Hadamard, use.shape, use.axes, r=rank)
        drawn = draw(key, shapes, math.prod(use.sizes("i")), self.init)
        dtype = self.adapter_dtype(base)
        factors: dict[str, Any] = {n: x.astype(dtype) for n, x in drawn.items()}
        return Hadamard(
            base=base,
            axes=use.axes,
            scale=1.0 if alpha is None else float(alpha / rank),
            **factors,
        )


loha = LoHa
