"""Quantised base weights: the Q of QLoRA.  Dettmers et al. 2023, arXiv:2305.14314.

    W ~ book[codes] * scale, block by block        y = x W, decoded where it is used

A quantised weight is frozen.  What trains goes over it, by nesting:
`chain(quantize("nf4"), lora(rank=16))` is QLoRA.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from jpeft.attach import LeafMethod
from jpeft.boxes import unbox
from jpeft.checks import check_floating
from jpeft.formats.blocks import BLOCK_SIZE
from jpeft.leaf import AdaptedLeaf, box_of, is_stored, layers
from jpeft.quant import rules as _rules  # noqa: F401  enters its rules
from jpeft.quant.arrays import (
    block_of,
    check_block_size,
    check_format,
    check_in_format,
)
from jpeft.quant.leaf import Layout, Quantized, arrangement, boxed, quantize_array
from jpeft.sharding.specs import place_beside
from jpeft.transform import method, written
from jpeft.tree.layout import LeafUse
from jpeft.tree.paths import Slots, weight
from jpeft.tree.where import Where

# In a configuration: products in the activation's own dtype.
ACTIVATION = "activation"


def check_compute_dtype(method: str, name: str, value: Any) -> str:
    if value is None or (isinstance(value, str) and value == ACTIVATION):
        return ACTIVATION
    return check_floating(method, name, value)


def check_block(method: str, name: str, value: Any) -> int | str | None:
    """None: the format's own, which `block_of` finds."""
    return None if value is None else check_block_size(method, name, value)


FormatName = Annotated[str, check_format]
BlockSize = Annotated[Any, check_block]
ComputeDtype = Annotated[Any, check_compute_dtype]


@method("quantize")
@dataclasses.dataclass(frozen=True)
class Quantize(LeafMethod):
    """A transform that stores the selected weights in few bits.

    format: "nf4", "fp4" (code books; Dettmers et al. 2023, arXiv:2305.14314), "int4",
        "int8" (linear, symmetric), "int4_asymmetric", "int8_asymmetric" (with a zero
        point), "dynamic8" (the 8-bit dynamic map; Dettmers et al. 2022,
        arXiv:2110.02861), "quantile4", "quantile8" (a code book learned from each
        weight's own quantiles); "q4_0", "q4_1", "q8_0" (llama.cpp's, as GGUF files have
        them: 4.5, 5 and 8.5 bits a parameter).
    double: quantise the scales of blocks too: 4.127 bits a parameter for nf4 in blocks
        of 64, 4.5 without.  A scale for a channel or tensor stays float32, those of
        GGUF's formats float16.
    block_size: elements that share a scale, along the input axes: 32, 64 (None), ...
        4096; "channel" for one scale an output, "tensor" for one a matrix.  GGUF's
        formats have 32 and no other.
    where, exclude: which weights; see `jpeft.tree.where`.  Formats mix in one chain:
        `chain(quantize("int8", where=".*/down/.*"), quantize("nf4", where=".*/up/.*"))`
    compute_dtype: what matrix products with these weights are computed in, summed in
        float32; None means the activation's own dtype, or the weight's if that is
        wider.  Results keep the dtype the model asks.  Convolutions and ragged products
        are computed in the dtype that the model gives them.

    The leaf keeps the weight's shape and dtype and does not train.  4-bit codes are
    stored in whole groups of 64 along the input axes, filled up with zeros: a weight
    of up to 16 inputs takes more room than in bfloat16.  Gradients
    flow through it in reverse mode (`jax.grad`, `jax.vjp`); JAX refuses `jax.jvp`.
    Codes are no numbers: `jpeft.cast` casts a tree that holds them, and they are not
    averaged or scaled.  A Linen model applied without `jpeft.adapt` says that it
    received another shape, that of the codes.

    Raises ValueError for an unknown format, a block size that is none of these, a
    weight that is quantised or carries an adapter already, whose axes are in doubt,
    that is not floating, has no elements, or holds NaN or infinity.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = {"dense": {"kernel": jnp.ones((64, 128))}}
    >>> params = jpeft.quantize("nf4")(jax.random.key(0), params)
    >>> leaf = params["dense"]["kernel"]
    >>> leaf.shape, leaf.codes.shape, leaf.codes.dtype.name
    ((64, 128), (32, 128), 'uint8')
    """

    format: FormatName = "nf4"
    double: bool = True
    block_size: BlockSize = written(None, unless=BLOCK_SIZE)
    where: Where = "linear"
    _: dataclasses.KW_ONLY
    exclude: Where = ()
    compute_dtype: ComputeDtype = "bfloat16"

    def __post_init__(self) -> None:
        super().__post_init__()
        size = block_of(self.name, self.format, self.block_size)
        object.__setattr__(self, "block_size", size)

    def selection(self) -> tuple[Where, Where]:
        return self.where, self.exclude

    def accepts(self, use: LeafUse) -> bool:
        return use.is_weight

    def targets(
        self, flat: Slots, uses: Mapping[str, LeafUse] | None
    ) -> dict[str, LeafUse]:
        """Also weights that the model changes before it uses them: the change waits
        (`Deferred`) until the weight is decoded."""
        if uses is not None:
            uses = {
                p: dataclasses.replace(u, axes=u.changed_axes, doubt="")
                if u.changed_axes
                else u
                for p, u in uses.items()
            }
        return super().targets(flat, uses)

    def attach(self, key: jax.Array, path: str, base: Any, use: LeafUse) -> Quantized:
        assert use.axes is not None
        base = jnp.asarray(base)
        check_in_format(f"{path}: the weight", base, self.format)
        return self.of_array(base, arrangement(use.axes, use.kind))

    @property
    def inside(self) -> str | None:
        """The dtype of products; None: the activation's."""
        return None if self.compute_dtype == ACTIVATION else self.compute_dtype

    def of_array(self, x: jax.Array, layout: Layout) -> Quantized:
        return quantize_array(
            x,
            layout,
            format=self.format,
            block_size=self.block_size,
            double_scales=self.double,
            compute_dtype=self.inside,
        )

    def adapted(
        self, key: jax.Array, path: str, slot: Any, use: LeafUse
    ) -> AdaptedLeaf:
        check_plain(path, slot)
        leaf = self.attach(key, path, weight(slot), use)
        leaf = place_beside(leaf, unbox(slot)).replace(origin=self.origin())
        return boxed(box_of(slot), leaf)  # type: ignore[arg-type]


quantize = Quantize


def check_plain(path: str, slot: Any) -> None:
    """Raises if a weight is quantised, carries an adapter or has no elements."""
    for leaf in layers(slot):
        if is_stored(leaf):
            raise ValueError(
                f"{path}: already quantised ({getattr(leaf, 'format', '?')}); "
                f"exclude={path!r} in one of the two, or dequantise it first with "
                "jpeft.merge(params)"
            )
        raise ValueError(
            f"{path}: carries an adapter ({type(leaf).__name__}) that was made for the "
            "weight as it is; quantise first and adapt then, "
            "jpeft.chain(jpeft.quantize(...), jpeft.lora(...)), or merge it first, "
            "jpeft.merge(params)"
        )
    shape = jnp.shape(weight(slot))
    if 0 in shape:
        raise ValueError(
            f"{path}: a weight of shape {shape} has nothing to quantise; "
            f"exclude={path!r}"
        )
