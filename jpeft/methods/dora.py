"""DoRA: a weight's columns turn by LoRA and stretch by a vector.  Liu et al. 2024,
arXiv:2402.09353.

    W' = m * V / |V|     V = W + s A B     m, |V| (*stack, *out)     |V| over the inputs

A (*stack, *in, rank) is Gaussian, B (*stack, rank, *out) zero and m starts as |W|, so
the model starts as its base.  In a model g = m / |V| scales what LoRA gives,

    x W' = g * (x W + s (x A) B)

and |V| is differentiated as a constant (section 4.3), so nothing of it is kept.  Nor is
anything of W's size made:

    |V|^2 = |W|^2 + 2 s <W, A B> + s^2 |A B|^2

where |W| is kept from the start, <W, A B> = sum_r (W^T A) B is as wide as the rank, and
|A B|^2 needs the rank x rank matrix A^T A only.  So the base may be quantised.

Where we depart from the paper: dropout acts on what enters A, as in LoRA, and x W is
computed once; Hugging Face PEFT drops the inputs of (g - 1) x W as well, in a second
product.  Convolutions have one norm for each output channel, tables one for each
feature.  A column of zeros has no direction: it stays zero.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jpeft.adapt.entry import stand_in
from jpeft.adapt.equations import Label, align
from jpeft.adapt.interpreter import Interpreter, acts_as
from jpeft.adapt.labels import Labelled, R, contract
from jpeft.leaf import (
    adapted_leaf,
    frozen,
    is_leaf,
    is_stored,
    labels_of,
    static,
    trainable,
    wide_dtype,
)
from jpeft.leaves import first_factors
from jpeft.leaves.low_rank import LowRank
from jpeft.leaves.scaled import ScaledOutput, spread
from jpeft.methods.lora import LoRA
from jpeft.sharding.explicit import cut, places
from jpeft.transform import method
from jpeft.tree.layout import LeafUse

# --- the leaf ------------------------------------------------------------------------


@adapted_leaf
class DoRALeaf(Labelled):
    """m * (W + scale * A.B) / |W + scale * A.B|.

    a, b, scale, dropout: as `LowRank`'s; m, norm: (*stack, *out), norm is |W|.
    """

    a: Any = trainable("sir")
    b: Any = trainable("sro", off=0)
    m: Any = trainable("so", off="norm")
    norm: Any = frozen("so")
    scale: float = static(default=1.0)
    dropout: float = static(default=0.0)

    def direction(self) -> LowRank:
        """V, which is not of length one."""
        return LowRank(
            base=self.base,
            axes=self.axes,
            a=self.a,
            b=self.b,
            scale=self.scale,
            dropout=self.dropout,
            origin=self.origin,
            path=self.path,
            key=self.key,
        )

    def as_scaled(self) -> ScaledOutput:
        """The same weight as a LoRA whose columns are rescaled."""
        change = change_of_norm(self.base, self.a, self.b, self.axes, self.scale)
        return ScaledOutput(
            base=self.direction(),
            axes=self.axes,
            scale=gain(self.m, self.norm, lax.stop_gradient(change)),
            origin=self.origin,
            path=self.path,
        )

    def effective(self, w: jax.Array) -> jax.Array:
        v, labels = self.direction().effective(w), self.labels()["m"]
        g = quotient(jnp.asarray(self.m).astype(w.dtype), norm_of(v, self.axes))
        return v * spread(g, labels, list(range(self.ndim)))

    def grown(self, axis: int) -> None:
        """A norm is of all rows; that of a new column is in no array yet."""

    def unstack(self) -> Any:
        """A row of an input axis has no norm of its own."""
        return super().unstack() if self.axes[0] == "s" else self.as_scaled().unstack()

    def for_shards(self, spec: PartitionSpec, mesh: Any) -> Any:
        """A shard knows only its part of a norm, which is therefore taken before."""
        return self.as_scaled().for_shards(spec, mesh)


# Whatever happens to the weight, its norm is that of the whole.
acts_as("as_scaled", kind=DoRALeaf)


# --- the mathematics -----------------------------------------------------------------


def gain(
    m: Float[Array, "..."], norm: Float[Array, "..."], change: Float[Array, "..."]
) -> Float[Array, "..."]:
    """m / |V|, where |V|^2 = norm^2 + change.

    Exactly one where m is the norm and nothing changed.
    """
    zero = norm == 0
    of_base = jnp.where(zero, jnp.ones_like(norm), norm)
    relative = jnp.where(zero, 0.0, 1.0) + change.astype(norm.dtype) / of_base**2
    return quotient(m.astype(norm.dtype) / of_base, jnp.sqrt(jnp.maximum(relative, 0)))


def quotient(x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, "..."]:
    """x / y, and zero where y is zero."""
    return jnp.where(y > 0, x / jnp.where(y > 0, y, jnp.ones_like(y)), 0)


def change_of_norm(
    base: Any, a: Float[Array, "..."], b: Float[Array, "..."], axes: str, scale: float
) -> Float[Array, "..."]:
    """|W + s A B|^2 - |W|^2 of each column, shaped as the columns of W.

    Summed in float32 (float64 for float64).  base: an array, or a leaf that holds one.
    """
    wide = wide_dtype(base.dtype)
    labels = labels_of(LowRank, axes)
    al, bl = labels["a"], labels["b"]
    columns = labels_of(ScaledOutput, axes)["scale"]
    a, b = (lax.stop_gradient(x).astype(wide) for x in (a, b))
    options: dict[str, Any] = {"preferred_element_type": wide}

    def into(w: jax.Array, a: jax.Array) -> jax.Array:
        """W^T A: (*stack, rank, *out)."""
        wl: list[Label] = list(range(len(axes)))
        z, zl = contract(w, wl, a, al, bl, place=places(cut(w), wl), **options)
        return align(z, zl, bl)

    a_like = a.astype(base.dtype)
    if is_leaf(base):
        program = jax.make_jaxpr(into)(stand_in(base), a_like)
        run = Interpreter(allow=False).run
        (wa,) = run(program.jaxpr, program.consts, [base, a_like])
    else:
        wa = into(base, a_like)
    # G = A^T A, as (*stack, rank, rank')
    other: list[Label] = ["r'" if k == R else k for k in al]
    stack = [k for k, c in enumerate(axes) if c == "s"]
    highest = {**options, "precision": lax.Precision.HIGHEST}
    gram, gl = contract(a, al, a, other, [*stack, R, "r'"], **highest)
    gb, gbl = contract(gram, gl, b, ["r'" if k == R else k for k in bl], bl, **highest)
    ab = align(gb, gbl, bl)
    total = (2 * scale * wa.astype(wide) + scale**2 * ab) * b
    return align(jnp.sum(total, bl.index(R)), [k for k in bl if k != R], columns)


def norm_of(w: Float[Array, "..."], axes: str) -> Float[Array, "..."]:
    """|W| of each column, squared and summed in float32 (float64 for float64)."""
    wide = wide_dtype(w.dtype)
    columns = labels_of(ScaledOutput, axes)["scale"]
    inputs = tuple(k for k in range(len(axes)) if k not in columns)
    norm = jnp.sqrt(jnp.sum(jnp.square(w.astype(wide)), inputs))
    return align(norm, sorted(columns), columns)  # type: ignore[type-var]


# --- the method ----------------------------------------------------------------------


@method("dora")
@dataclasses.dataclass(frozen=True, kw_only=True)
class DoRA(LoRA):
    """A transform that decomposes each selected weight into length and direction.

        W' = m * V / |V|     V = W + s A B     s = alpha / rank

    Liu et al. 2024, arXiv:2402.09353.  Arguments are those of `jpeft.lora`; `init` is
    "gaussian" or "kaiming".

    Raises ValueError as `jpeft.lora` does, and over a leaf that trains.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = {"dense": {"kernel": jnp.ones((4, 5))}}
    >>> params = jpeft.dora(rank=2, alpha=4)(jax.random.key(0), params)
    >>> params["dense"]["kernel"].m
    Array([2., 2., 2., 2., 2.], dtype=float32)
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init not in first_factors.DRAWN:
            raise ValueError(
                f"dora: init={self.init!r}: expected one of {first_factors.DRAWN}; "
                "other first values of A and B would turn the columns before the "
                "first step"
            )

    def attach(self, key: jax.Array, path: str, base: Any, use: LeafUse) -> Any:
        if is_leaf(base) and not is_stored(base):
            raise ValueError(
                f"{path}: dora needs the norm of a weight that stays as it is, and "
                f"here a {type(base).__name__} trains; apply dora first and the other "
                f"method on top of it, or exclude={path!r}"
            )
        low_rank = super().attach(key, path, base, use)
        assert use.axes is not None
        whole = base.materialize() if is_leaf(base) else base
        norm = (
            jax.eval_shape(norm_of, whole, use.axes)
            if isinstance(whole, jax.ShapeDtypeStruct)
            else norm_of(jnp.asarray(whole), use.axes)
        )
        dtype = self.adapter_dtype(base)
        return DoRALeaf(
            base=base,
            axes=use.axes,
            a=low_rank.a,
            b=low_rank.b,
            m=jnp.array(norm, dtype, copy=True),
            norm=norm,
            scale=low_rank.scale,
            dropout=low_rank.dropout,
        )


dora = DoRA
