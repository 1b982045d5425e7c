"""What rounding does to a merged adapter: the error beside the change it rounds."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from jpeft.leaf import check_whole, innermost, is_leaf, is_stored
from jpeft.tree.lend import acting
from jpeft.tree.merge import check_merge
from jpeft.tree.paths import slots
from jpeft.types import PyTree


class Rounding(NamedTuple):
    """Root mean squares over one weight.

    error: of the merged weight, against the adapted one in float32.
    change: what the adapter changed.  weight: of the adapted weight itself.
    """

    error: float
    change: float
    weight: float

    @property
    def lost(self) -> float:
        """Error over change: 0.1 means that a tenth of the adapter is rounding."""
        return self.error / self.change if self.change > 0 else 0.0


def rounding(
    params: PyTree, *, dtype: Any = None, requantize: bool = False
) -> dict[str, Rounding]:
    """{path: `Rounding`} of what `jpeft.merge(params, ...)` with these arguments does.

    Small changes vanish in a coarse format: of a delta of a thousandth of the weight,
    bfloat16 loses most and 4 bits all.  Weights without an adapter are left out.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = jpeft.lora(2)(jax.random.key(0), {"kernel": jnp.ones((5, 3))})
    >>> leaf = params["kernel"]
    >>> params = {"kernel": leaf.replace(b=jnp.full((2, 3), 0.01))}
    >>> report = jpeft.quant.rounding(params, dtype=jnp.bfloat16)["kernel"]
    >>> report.change > report.error > 0
    True
    """
    check_merge("quant.rounding", dtype, requantize)
    out = {}
    flat = slots(params)
    for path, x in flat.items():
        check_whole(x, path, "quant.rounding")
    for path, leaf in zip(flat.paths, acting(flat), strict=True):
        if not is_leaf(leaf) or is_stored(leaf):
            continue
        base = innermost(leaf)
        exact = leaf.materialize(jnp.float32)
        start = base.materialize(jnp.float32) if is_leaf(base) else base
        if requantize and is_leaf(base):
            merged = base.with_value(exact).materialize(jnp.float32)
        else:
            merged = leaf.materialize(dtype).astype(jnp.float32)
        rms = lambda x: float(jnp.sqrt(jnp.mean(jnp.square(x))))
        out[path] = Rounding(
            rms(merged - exact), rms(exact - start.astype(jnp.float32)), rms(exact)
        )
    return out
