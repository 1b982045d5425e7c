"""LoftQ: quantise a weight and start LoRA where it makes up for that best.
Li et al. 2023, arXiv:2310.08659.

    Q_t = quantise(W - s A_{t-1} B_{t-1})      s A_t B_t = SVD_rank(W - Q_t)
    A_0 B_0 = 0, t = 1 ... steps               W' = Q + s A B, near W from the start

With one step (the default, as in Hugging Face PEFT) Q is the quantised W itself, the
same as `quantize` makes; the paper takes five.  Where the decomposition has nothing to
give (a matrix that its format holds exactly), A and B start as LoRA's do.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jpeft import compat
from jpeft.boxes import unbox
from jpeft.checks import Count
from jpeft.formats.blocks import BLOCK_SIZE
from jpeft.leaf import AdaptedLeaf, box_of, boxed_like
from jpeft.leaves.first_factors import PISSA, draw_a, factors
from jpeft.leaves.low_rank import LowRank, low_rank_product
from jpeft.methods.lora import LowRankMethod, check_rank
from jpeft.methods.quantize import (
    BlockSize,
    ComputeDtype,
    FormatName,
    Quantize,
    check_plain,
)
from jpeft.quant.arrays import block_of, check_in_format
from jpeft.quant.leaf import Quantized, arrangement, boxed
from jpeft.sharding.specs import place_beside
from jpeft.transform import method, written
from jpeft.tree.layout import EMBEDDING, LeafUse
from jpeft.tree.paths import weight


@method("loftq")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoftQ(LowRankMethod):
    """A transform that quantises the selected weights and starts LoRA from the error.

    rank, alpha, rank_stabilized, dropout, dtype, rank_pattern, alpha_pattern: as in
    `jpeft.lora`.  format, double, block_size, compute_dtype: as in `jpeft.quantize`.
    where, exclude: see `jpeft.tree.where`.
    steps: how often quantising and the decomposition alternate, from 1; each costs an
    exact singular value decomposition of the weight in float32.  From 2 on the codes
    are not those of the weight, and `jpeft.save` writes them beside the adapter.

    Unlike LoRA the model does not start as its (quantised) base but nearer to the one
    before it was quantised.  `unload` gives the quantised weights.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> w = jax.random.normal(jax.random.key(1), (64, 48))
    >>> params = jpeft.loftq(rank=8)(jax.random.key(0), {"kernel": w})
    >>> error = lambda x: float(jnp.linalg.norm(jpeft.merge(x)["kernel"] - w))
    >>> error(params) < error(jpeft.unload(params))
    True
    """

    steps: Count = 1
    format: FormatName = "nf4"
    double: bool = True
    block_size: BlockSize = written(None, unless=BLOCK_SIZE)
    compute_dtype: ComputeDtype = "bfloat16"

    def __post_init__(self) -> None:
        super().__post_init__()
        size = block_of(self.name, self.format, self.block_size)
        object.__setattr__(self, "block_size", size)

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
        rank, scale = self.rank_of(path), self.scale_of(path)
        check_rank(path, rank, use)
        assert use.axes is not None
        w, box = compat.on_device(jnp.asarray(weight(slot))), box_of(slot)
        check_in_format(f"{path}: the weight", w, self.format)
        q, a, b = alternate(
            key,
            w,
            use.axes,
            use.kind,
            self.quantizer(),
            rank=rank,
            scale=scale,
            steps=self.steps,
        )
        dtype = self.adapter_dtype(w)
        q = place_beside(q, unbox(slot)).replace(origin=self.origin())
        leaf = LowRank(
            base=q,
            axes=use.axes,
            a=a.astype(dtype),
            b=b.astype(dtype),
            scale=scale,
            dropout=float(self.dropout),
            origin=self.origin(),
        )
        leaf = boxed_like(box, place_beside(leaf, unbox(slot)))
        return leaf.replace(base=boxed(box, q))  # type: ignore[arg-type]


loftq = LoftQ


def alternate(
    key: jax.Array,
    w: jax.Array,
    axes: str,
    kind: str,
    quantizer: Quantize,
    *,
    rank: int,
    scale: float,
    steps: int,
) -> tuple[Quantized, jax.Array, jax.Array]:
    """(Q, A, B) after `steps` rounds, in float32.

    Q depends on the last bits of each decomposition, which differ from one program and
    machine to the next: it is marked, so that checkpoints keep it.
    """
    exact = w.astype(jnp.float32)
    layout = arrangement(axes, kind)
    rest, q, a, b = exact, None, None, None
    for _ in range(steps):
        q = quantizer.of_array(rest.astype(w.dtype), layout)
        error = exact - q.materialize(jnp.float32)
        a, b = factors(key, error, axes=axes, rank=rank, scale=scale, init=PISSA)
        rest = exact - scale * low_rank_product(a, b, axes, jnp.float32)
    assert q is not None and a is not None and b is not None
    if steps > 1:  # one step is the weight itself, quantised
        q = q.replace(searched=True)
    return q, *_alive(key, a, b, axes, kind)


def _alive(
    key: jax.Array, a: jax.Array, b: jax.Array, axes: str, kind: str
) -> tuple[jax.Array, jax.Array]:
    """A, B with LoRA's start where the singular value is zero, to rounding: there both
    would be zero and never get a gradient."""
    n_in, n_out = axes.count("i"), axes.count("o")
    ins, outs = (
        math.prod(a.shape[a.ndim - 1 - n_in : -1]),
        math.prod(b.shape[b.ndim - n_out :]),
    )
    squares = jnp.sum(jnp.square(b), tuple(range(b.ndim - n_out, b.ndim)))
    rounding = max(ins, outs) * jnp.finfo(b.dtype).eps
    dead = squares <= rounding * jnp.max(squares, -1, keepdims=True)
    in_a = jnp.expand_dims(dead, tuple(range(-1 - n_in, -1)))
    in_b = jnp.expand_dims(dead, tuple(range(-n_out, 0)))
    fan_in = 1 if kind == EMBEDDING else ins
    drawn = draw_a(key, a.shape, fan_in, "gaussian", a.dtype)
    return jnp.where(in_a, drawn, a), jnp.where(in_b, 0, b)
