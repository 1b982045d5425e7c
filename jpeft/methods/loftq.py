"""LoftQ: quantise a weight and start LoRA where it makes up for that best.
Li et al. 2023, arXiv:2310.08659.

    Q_t = quantise(W - s A_{t-1} B_{t-1})      s A_t B_t = SVD_rank(W - Q_t)
    A_0 B_0 = 0, t = 1 ... steps               W' = Q + s A B, near W from the start

With one step (the default, as in Hugging Face PEFT) Q is the quantised W itself, the
same as `quantize` makes; the paper takes five.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jpeft.boxes import unbox
from jpeft.leaf import AdaptedLeaf, box_of, boxed_like
from jpeft.methods._init import PISSA, factors_of
from jpeft.methods._low_rank import LowRank, low_rank_product
from jpeft.methods.lora import check_rank
from jpeft.methods.quantize import Quantize, check_plain, quantize
from jpeft.quant.leaf import Quantized, arrangement, boxed
from jpeft.transform import (
    LeafMethod,
    check_float,
    check_positive,
    dtype_name,
    method,
    place_beside,
)
from jpeft.tree.layout import LeafUse
from jpeft.tree.paths import weight
from jpeft.tree.where import Where, check_where


@method("loftq")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoftQ(LeafMethod):
    """See `loftq`."""

    rank: int
    alpha: float | None = None
    steps: int = 1
    format: str = "nf4"
    double: bool = True
    block_size: int | str = 64
    dropout: float = 0.0
    dtype: str | None = None
    where: Where = "linear"
    exclude: Where = ()
    compute_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        check_positive("loftq", "rank", self.rank, integer=True)
        check_positive("loftq", "steps", self.steps, integer=True)
        if self.alpha is not None:
            check_positive("loftq", "alpha", self.alpha)
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(
                f"loftq: dropout={self.dropout!r}: expected a rate from 0 up to, not "
                "including, 1"
            )
        check_float("loftq", self.dtype)
        object.__setattr__(self, "compute_dtype", self.quantizer().compute_dtype)
        object.__setattr__(self, "where", check_where(self.where))
        object.__setattr__(self, "exclude", check_where(self.exclude, "exclude"))

    def selection(self) -> tuple[Where, Where]:
        return self.where, self.exclude

    def accepts(self, use: LeafUse) -> bool:
        return use.is_weight

    def quantizer(self) -> Quantize:
        return Quantize(
            format=self.format,
            double=self.double,
            block_size=self.block_size,
            compute_dtype=self.compute_dtype,
        )

    def adapted(
        self, key: jax.Array, path: str, slot: Any, use: LeafUse
    ) -> AdaptedLeaf:
        check_plain(path, slot)
        check_rank(path, self.rank, use)
        assert use.axes is not None
        w, box = jnp.asarray(weight(slot)), box_of(slot)
        scale = (self.rank if self.alpha is None else self.alpha) / self.rank
        q, a, b = alternate(
            w,
            use.axes,
            use.kind,
            self.quantizer(),
            rank=self.rank,
            scale=float(scale),
            steps=self.steps,
            path=path,
        )
        dtype = self.adapter_dtype(w)
        q = place_beside(q, unbox(slot)).replace(origin=self.origin())
        leaf = LowRank(
            base=q,
            axes=use.axes,
            a=a.astype(dtype),
            b=b.astype(dtype),
            scale=float(scale),
            dropout=float(self.dropout),
            origin=self.origin(),
        )
        leaf = boxed_like(box, place_beside(leaf, unbox(slot)))
        return leaf.replace(base=boxed(box, q))  # type: ignore[arg-type]


def loftq(
    rank: int,
    alpha: float | None = None,
    *,
    steps: int = 1,
    format: str = "nf4",
    double: bool = True,
    block_size: int | str = 64,
    where: Where = "linear",
    exclude: Where = (),
    dropout: float = 0.0,
    dtype: Any = None,
    compute_dtype: Any = jnp.bfloat16,
) -> LoftQ:
    """A transform that quantises the selected weights and starts LoRA from the error.

    rank, alpha, dropout, dtype: as in `jpeft.lora`.  format, double, block_size,
    compute_dtype: as in `jpeft.quantize`.  where, exclude: see `jpeft.tree.where`.
    steps: how often quantising and the decomposition alternate, from 1; each costs an
    exact singular value decomposition of the weight in float32.

    Unlike LoRA the model does not start as its (quantised) base but nearer to the one
    before it was quantised.  `unload` gives the quantised weights.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> w = jax.random.normal(jax.random.key(1), (64, 48))
    >>> params = jpeft.loftq(rank=8)(jax.random.key(0), {"kernel": w})
    >>> error = lambda x: float(jnp.linalg.norm(jpeft.merge(x)["kernel"] - w))
    >>> error(params) < error(jpeft.unload(params))
    True
    """
    of = quantize(format, double, block_size, compute_dtype=compute_dtype)
    return LoftQ(
        rank=rank,
        alpha=alpha,
        steps=steps,
        format=format,
        double=double,
        block_size=block_size,
        dropout=dropout,
        dtype=dtype_name(dtype),
        where=where,
        exclude=exclude,
        compute_dtype=of.compute_dtype,
    )


def alternate(
    w: jax.Array,
    axes: str,
    kind: str,
    quantizer: Quantize,
    *,
    rank: int,
    scale: float,
    steps: int,
    path: str,
) -> tuple[Quantized, jax.Array, jax.Array]:
    """(Q, A, B) after `steps` rounds, in float32.  Q says how it came about, so that a
    checkpoint can make it again from W."""
    exact = w.astype(jnp.float32)
    layout = arrangement(axes, kind)
    rest, q, a, b = exact, None, None, None
    for _ in range(steps):
        q = quantizer.of_array(rest.astype(w.dtype), layout)
        error = exact - q.materialize(jnp.float32)
        a, b = factors_of(
            jax.random.key(0), path, error, axes, rank=rank, scale=scale, init=PISSA
        )
        rest = exact - scale * low_rank_product(a, b, axes, jnp.float32)
    assert q is not None and a is not None and b is not None
    if steps > 1:  # one step is the weight itself, quantised
        q = q.replace(residual=(axes, kind, rank, scale, steps))
    return q, a, b
