"""`Deferred`: an equation that waits until a quantised weight is used.

Done at once, `w * mask` would decode the weight and keep it for the backward pass.  So
the equation is written down in a leaf, and done on the decoded values inside the
product that consumes them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jpeft import compat
from jpeft.adapt.equations import ByElement, Join, Move, Pad, Round, Verb
from jpeft.leaf import adapted_leaf, frozen, is_leaf, static
from jpeft.quant.leaf import QuantizedValue


@adapted_leaf
class Deferred(QuantizedValue):
    """One equation on quantised weights.

    base: its operands: quantised or deferred leaves, and arrays.
    primitive, params: the equation.  literals: ((place, number), ...), its other
    operands.  take: which output this is, None if there is one only.
    by_row: whether it does the same to each row of its operands.  pads: whether it puts
    a value of its own beside the weight.
    """

    base: Any = frozen()
    primitive: Any = static()
    params: tuple[tuple[str, Any], ...] = static()
    literals: tuple[tuple[int, Any], ...] = static()
    take: int | None = static()
    by_row: bool = static()
    pads: bool = static()
    sizes: tuple[int, ...] = static()
    element: str = static()
    compute_dtype: str | None = static(default=None)

    known_as: ClassVar[str] = "changed Quantized"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.sizes

    @property
    def dtype(self) -> Any:
        return jnp.dtype(self.element)

    def value(self, dtype: Any) -> jax.Array:
        operands = [x.value(x.dtype) if is_leaf(x) else x for x in self.base]
        for place, number in self.literals:
            operands.insert(place, number)
        if self.pads and not self.literals:
            # Apart from the array, or JAX cannot differentiate by the filling alone.
            x, fill = operands
            config = dict(self.params)["padding_config"]
            inside = lax.pad(jnp.ones(x.shape, bool), False, config)
            out = jnp.where(inside, lax.pad(x, jnp.zeros((), x.dtype), config), fill)
        else:
            out = self.primitive.bind(*operands, **dict(self.params))
        return (out if self.take is None else out[self.take]).astype(dtype)

    def parts(self) -> tuple[Any, list[jax.Array], Callable[[Any, Any], Self]]:
        """The real arrays among the operands, however deep, are taken out."""
        real: list[jax.Array] = []
        below: list[Any] = []
        for x in self.base:
            if isinstance(x, Deferred):
                data, inner, put = x.parts()
                below.append((data, put, len(inner)))
                real.extend(inner)
            elif not is_leaf(x) and jnp.issubdtype(jnp.result_type(x), jnp.floating):
                below.append((None, lambda _, r: r[0], 1))
                real.append(x)
            else:
                below.append((x, lambda data, _: data, 0))
        counts = [n for *_, n in below]
        puts = [put for _, put, _ in below]
        template = self.replace(base=None)

        def put_back(data: Any, real: Any) -> Any:
            base, first = [], 0
            for part, put, n in zip(data, puts, counts, strict=True):
                base.append(put(part, real[first : first + n]))
                first += n
            return template.replace(base=tuple(base))

        return tuple(data for data, *_ in below), real, put_back

    def unstack(self) -> tuple[Any, Any, Callable[[Any, Any], Any]] | None:
        if not self.by_row:
            return None
        rows = []
        for x in self.base:
            if is_leaf(x):
                rows.append(x.unstack())
            elif not jnp.ndim(x):
                rows.append((None, x, lambda _, kept: kept))
            elif x.shape[0] == self.sizes[0]:
                rows.append((x, None, lambda row, _: row))
            else:  # of one row, for all of them
                rows.append((None, x[0], lambda _, kept: kept))
        if any(r is None for r in rows):
            return None
        joins = [join for _, _, join in rows]
        template = self.replace(base=None, sizes=self.sizes[1:])

        def join(row: Any, kept: Any) -> Any:
            parts = zip(joins, row, kept, strict=True)
            return template.replace(base=tuple(f(r, k) for f, r, k in parts))

        return tuple(r[0] for r in rows), tuple(r[1] for r in rows), join


def deferred(verb: Verb, ins: list[Any]) -> Any:
    """The equation, waiting.  None where it must not: a leaf of another kind is among
    its operands, it makes more than the weights that go in (an activation does that),
    or its parameters do not compare."""
    eqn = verb.eqn
    if any(is_leaf(x) and not isinstance(x, QuantizedValue) for x in ins):
        return None
    operands, literals = [], []
    for k, (x, var) in enumerate(zip(ins, eqn.invars, strict=True)):
        if isinstance(var, compat.Literal):
            literals.append((k, np.asarray(x)[()]))
        else:
            operands.append(x)
    outs = [v.aval for v in eqn.outvars]
    if not all(jnp.issubdtype(a.dtype, jnp.floating) for a in outs):
        return None
    weights = sum(x.size for x in operands if is_leaf(x))
    real = [
        jnp.size(x)
        for x in operands
        if not is_leaf(x)
        and jnp.size(x) > 1
        and jnp.issubdtype(jnp.result_type(x), jnp.floating)
    ]
    # Beside a key's weight stands a query's, which eight heads may share.
    room = 8 if isinstance(verb, Join) else 1
    if any(n > room * weights for n in real):
        return None
    if real and max(a.size for a in outs) > weights + sum(real):
        return None
    params = tuple(sorted(eqn.params.items()))
    try:
        hash((params, tuple(literals)))
    except TypeError:
        return None
    many = eqn.primitive.multiple_results
    first = next(x for x in ins if is_leaf(x))
    made = [
        Deferred(
            base=tuple(operands),
            primitive=eqn.primitive,
            params=params,
            literals=tuple(literals),
            take=k if many else None,
            by_row=isinstance(verb, (ByElement, Round)),
            pads=isinstance(verb, Move) and verb.step is Pad,
            sizes=tuple(a.shape),
            element=a.dtype.name,
            compute_dtype=first.compute_dtype,
            path=first.path,
        )
        for k, a in enumerate(outs)
    ]
    return made if many else made[0]
