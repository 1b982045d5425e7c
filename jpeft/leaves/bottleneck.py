"""The leaves of bottleneck adapters, and how they act.

    after     y' = y + s f(y)       `Bottleneck`, at the end of a sub-layer
    beside    y' = y + s f(x)       `BranchStart` on its first weight, `BranchEnd`

    f(h) = act(h D + d) U + u       D (*stack, *in, rank)    d (*stack, rank)
                                    U (*stack, rank, *out)   u (*stack, *out)

A leaf at the end of a sub-layer stands on its last bias or, where there is none, on its
last weight.  What it adds may wait through dropout (`Late`).  A bias may meet the
product late, x + h W + b: then y is h W + b still, and what is added goes to the sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jpeft import compat
from jpeft.adapt.equations import (
    Add,
    Call,
    Cast,
    Contract,
    Convolve,
    Draw,
    Jit,
    Label,
    Labels,
    Product,
    Route,
    Same,
    Scale,
    Select,
    SumOfShards,
    only_moves,
    read,
)
from jpeft.adapt.interpreter import Interpreter, acts, contracts, settled
from jpeft.adapt.labels import Labelled, R, as_matrices_here, contract, expanded
from jpeft.leaf import (
    Carried,
    Linked,
    Path,
    adapted_leaf,
    carried,
    frozen,
    is_leaf,
    static,
    trainable,
    whose,
)
from jpeft.leaves.gate import open_gate, spread

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "gelu_exact": lambda x: jax.nn.gelu(x, approximate=False),
    "swish": jax.nn.swish,
    "tanh": jnp.tanh,
    "leaky_relu": jax.nn.leaky_relu,
    "identity": lambda x: x,
}


# --- the leaves ----------------------------------------------------------------------


@adapted_leaf
class Part(Labelled):
    """A leaf of an adapter.  Arrays a variant does not have are None.

    Of a bias all axes are output axes; of a weight input axes are in no array of a leaf
    that acts on its output.
    """

    spare: ClassVar[str] = "-"


@adapted_leaf
class AtEnd(Part):
    """A leaf that adds to the output of a sub-layer: on its last bias or weight.

    late: wait through the dropout that follows.  scale times gain is the factor of what
    is added.
    """

    up: Any = trainable("sro", off=0)
    up_bias: Any = trainable("so", off=0)
    gain: Any = trainable("s", default=None)
    scale: float = static(default=1.0)
    late: bool = static(default=True)

    def finish(
        self, it: Interpreter, eqn: Any, y: jax.Array, labels: list[Label]
    ) -> Any:
        """The output with what is added, at once or later."""
        raise NotImplementedError

    def expand(
        self, h: jax.Array, hl: Labels, out: Labels, gate: jax.Array | None, **options
    ) -> jax.Array:
        """s (h U + u), with the axes `out`.  gate: broadcasts to h."""
        labels = self.labels()
        up, up_bias = (getattr(self, n).astype(h.dtype) for n in _UP)
        factors = [] if self.scale == 1.0 else [jnp.asarray(self.scale, h.dtype)]
        factors += [] if gate is None else [gate]
        if self.gain is not None:
            factors.append(spread(self.gain.astype(h.dtype), labels["gain"], hl))
        for f in factors:  # on the rank's values, where they are few
            h = h * f
        here = as_matrices_here(h)
        y = expanded(h, hl, up, labels["up"], out, matrices=here, **options)
        bias = spread(up_bias, labels["up_bias"], out)
        for f in factors:
            bias = bias * (f if jnp.ndim(f) == 0 else spread(f[..., 0], hl[:-1], out))
        return y + bias


_UP = ("up", "up_bias")


@adapted_leaf
class Bottleneck(AtEnd):
    """y -> y + s f(y).

    down: (*stack, *out, rank); down_bias: (*stack, rank); up: (*stack, rank, *out);
    up_bias: (*stack, *out); gain: (*stack,); gate: (*stack, *out); gate_bias: (*stack,)
    """

    down: Any = trainable("sor")
    down_bias: Any = trainable("sr")
    gate: Any = trainable("so", default=None)
    gate_bias: Any = trainable("s", default=None)
    activation: str = static(default="relu")

    def finish(
        self, it: Interpreter, eqn: Any, y: jax.Array, labels: list[Label]
    ) -> Any:
        options = {"precision": eqn.params.get("precision")}
        if (own := _own_output(it, eqn, self)) is not None:
            return y + self.added(own, labels, **options).astype(y.dtype)
        waiting = Waiting(
            y=y,
            leaf=self.replace(base=None),
            labels=tuple(labels),
            **options,
        )
        return waiting if self.late else waiting.settle()

    def added(self, y: jax.Array, labels: list[Label], **options: Any) -> jax.Array:
        h, hl = reduced(self, y, labels, **options)
        gate = None
        if self.gate is not None:
            gate = open_gate(y, labels, self, hl, **options)
        return self.expand(h, hl, labels, gate, **options)


@adapted_leaf
class BranchStart(Part, Linked):
    """On the first weight of a sub-layer: hands act(x D + d), and a gate, to the last.

    down: (*stack, *in, rank); down_bias: (*stack, rank); gate: (*stack, *in);
    gate_bias: (*stack,).  link: the sub-layer's path.
    """

    down: Any = trainable("sir")
    down_bias: Any = trainable("sr")
    gate: Any = trainable("si", default=None)
    gate_bias: Any = trainable("s", default=None)
    activation: str = static(default="relu")
    link: Path = static()

    def __post_init__(self) -> None:
        _as_path(self)

    def opens(self) -> frozenset[str]:
        return frozenset({_link(self)})


@adapted_leaf
class BranchEnd(AtEnd, Linked):
    """On the last bias or weight: y -> y + s (h U + u), where h is what `BranchStart`
    handed on.

    up: (*stack, rank, *out); up_bias: (*stack, *out); gain: (*stack,)
    """

    link: Path = static()

    def __post_init__(self) -> None:
        _as_path(self)

    def closes(self) -> frozenset[str]:
        return frozenset({_link(self)})

    def finish(
        self, it: Interpreter, eqn: Any, y: jax.Array, labels: list[Label]
    ) -> Any:
        _check_unstacked(it, eqn, self)
        h, gate = it.close_link(eqn, _link(self))
        free = [k for k in labels if isinstance(k, tuple)]
        sizes = tuple(y.shape[labels.index(k)] for k in free)
        if h.shape[:-1] != sizes:
            raise ValueError(
                f"{whose(self)}the parallel adapter of {str.__str__(self.link)!r} "
                f"reads activations {h.shape[:-1]} and should add to {sizes} at "
                f"{it.site(eqn)}; the two must agree, or exclude= the sub-layer"
            )
        hl = [*free, R]
        options = {"precision": eqn.params.get("precision")}
        added = self.expand(h.astype(y.dtype), hl, labels, gate, **options)
        waiting = Owing(y=y, added=added)
        return waiting if self.late else waiting.settle()


def _as_path(leaf: BranchStart | BranchEnd) -> None:
    """A link's name is no part of a leaf's structure: equal layers stay one program."""
    if isinstance(leaf.link, str) and not isinstance(leaf.link, Path):
        object.__setattr__(leaf, "link", Path(leaf.link))


def _link(leaf: BranchStart | BranchEnd) -> str:
    return f"{str.__str__(leaf.link)} of {leaf.origin or 'adapter'}"


# --- rules ---------------------------------------------------------------------------


@contracts(kind=AtEnd)
def _contract(it: Interpreter, at: Product) -> Any:
    _check_direction(it, at.eqn, at.leaf, "o", at.out)
    y = settled(it.base(at.eqn, at.ins()))
    return at.leaf.finish(it, at.eqn, y, at.out)


@acts(Add, kind=AtEnd)
def _add(it: Interpreter, add: Add, ins: list[Any]) -> Any:
    """A bias, shaped to broadcast to the output it is added to."""
    eqn = add.eqn
    if all(map(is_leaf, ins)):
        return None
    leaf = ins[0] if is_leaf(ins[0]) else ins[1]
    shape = eqn.outvars[0].aval.shape
    if any(c == "i" for c in leaf.axes) or any(
        c != leaf.spare and n != m
        for c, n, m in zip(leaf.axes, leaf.shape, shape, strict=True)
    ):
        return None
    out: list[Label] = [
        ("x", k) if c == leaf.spare else k for k, c in enumerate(leaf.axes)
    ]
    return leaf.finish(it, eqn, settled(it.base(eqn, ins)), out)


def _own_output(it: Interpreter, eqn: Any, leaf: Bottleneck) -> jax.Array | None:
    """h W + b, where a bias is added to the sum of h W and something else.

    None where it is added to the product, or leaf is no bias.  Of two summands the
    product is the one that nothing else reads: not the stream that goes on.
    """
    if not isinstance(read(eqn), Add):
        return None
    side = next(k for k, v in enumerate(eqn.invars) if is_leaf(it.read(v)))
    made = it.producer(eqn.invars[1 - side])
    if made is None or not _is_sum(made):
        return None
    at_hand = not isinstance(read(made), Jit)  # what it was made of
    products = [v for v in made.invars if at_hand and _is_product(it, v)]
    if len(products) > 1:
        products = [v for v in products if it.readers(v) == 1]
        if len(products) > 1:
            return None  # one product in parts
    value = settled(it.read(products[0])) if products else None
    if value is None or is_leaf(leaf.base):
        raise ValueError(
            f"{whose(leaf)}an adapter reads its sub-layer's output, and at "
            f"{it.site(eqn)} this bias is added to a sum in which that is no part of "
            "its own; let the model add it to the product of the last weight first, "
            "x + (h @ w + b), or exclude= the sub-layer"
        )
    return value + jnp.asarray(leaf.base).astype(value.dtype)


def _is_sum(eqn: Any) -> bool:
    verb = read(eqn)
    if isinstance(verb, Jit):
        return any(map(_is_sum, _last(verb)))
    return isinstance(verb, Add)


def _last(inner: Jit) -> list[Any]:
    """The equation that makes all that comes out, if one does."""
    return [e for e in inner.jaxpr.eqns if e.outvars == inner.jaxpr.outvars]


def _is_product(it: Interpreter, var: Any) -> bool:
    """Whether a product of a weight made it, moved about at most."""
    made = it.producer(var)
    if made is None:
        return False
    verb = read(made)
    if isinstance(verb, Jit):
        return any(map(_multiplies, _last(verb)))
    if _multiplies(made):
        return True
    moves = only_moves(made) or isinstance(verb, SumOfShards)
    return moves and _is_product(it, made.invars[0])


def _multiplies(eqn: Any) -> bool:
    return isinstance(read(eqn), (Contract, Convolve, Route))


@contracts(kind=BranchStart)
def _start(it: Interpreter, at: Product) -> Any:
    leaf, eqn, x, xl = at.leaf, at.eqn, at.x, at.xl
    _check_direction(it, eqn, leaf, "i", [k for k in xl if k not in at.out])
    _check_unstacked(it, eqn, leaf)
    y = it.base(eqn, at.ins())
    options = {"precision": at.options["precision"]}
    h, hl = reduced(leaf, x, xl, **options)
    gate = None
    if leaf.gate is not None:
        gate = open_gate(x, xl, leaf, hl, **options)
    it.open_link(eqn, _link(leaf), (h, gate))
    return y


def _check_unstacked(it: Interpreter, eqn: Any, leaf: Labelled) -> None:
    if "s" in leaf.axes:
        raise ValueError(
            f"{whose(leaf)}a parallel adapter acts in one layer at a time, and at "
            f"{it.site(eqn)} the weights of a whole stack are used at once; exclude= "
            "the sub-layer"
        )


def _check_direction(
    it: Interpreter, eqn: Any, leaf: Labelled, side: str, found: Labels
) -> None:
    """Raises if the axes taken for inputs or outputs are not those of this product."""
    wanted = {k for k, c in enumerate(leaf.axes) if c == side}
    got = {k for k in found if isinstance(k, int) and leaf.axes[k] != "s"}
    if wanted - got or any(leaf.shape[k] > 1 for k in got - wanted):
        name = "input" if side == "i" else "output"
        raise ValueError(
            f"{whose(leaf)}the axes {sorted(wanted)} of shape {leaf.shape} were taken "
            f"for its {name} axes, and in the product at {it.site(eqn)} they are "
            f"{sorted(got)}; pass uses=jpeft.find_uses(fn, params, *args) to the "
            "transform, or exclude= the sub-layer"
        )


# --- waiting -------------------------------------------------------------------------


class Late(Carried):
    """An output that is still owed its adapter, and waits while it is only dropped.

    It goes through x / keep, x * number, select(mask, x, 0), x * mask and casts, which
    is how `nn.Dropout` and its kin are written, where the mask is drawn from random
    bits; at any other equation, a mask of padding included, it is settled.
    """

    y: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(jnp.shape(self.y))

    def through(self, it: Interpreter, eqn: Any, ins: list[Any]) -> Any:
        if sum(x is self for x in ins) != 1 or not _only_drops(it, eqn, ins, self):
            return None
        if len(ins) > 1 and eqn.outvars[0].aval.shape != self.shape:
            return None
        y = it.native(eqn)(*(self.y if x is self else settled(x) for x in ins))
        return self.replace(y=y)


@carried
class Waiting(Late):
    """y, owed f(y).  leaf: the `Bottleneck`; labels: of y."""

    y: Any = frozen()
    leaf: Any = frozen()
    labels: tuple[Label, ...] = static()
    precision: Any = static(default=None)

    def settle(self) -> jax.Array:
        y = settled(self.y)
        more = self.leaf.added(y, list(self.labels), precision=self.precision)
        return y + more


@carried
class Owing(Late):
    """y, owed `added`, which is known already."""

    y: Any = frozen()
    added: Any = frozen()

    def settle(self) -> jax.Array:
        y = settled(self.y)
        return y + self.added.astype(y.dtype)


def _only_drops(it: Interpreter, eqn: Any, ins: list[Any], own: Any) -> bool:
    verb, at = read(eqn), next(k for k, x in enumerate(ins) if x is own)
    if isinstance(verb, Cast):
        return jnp.issubdtype(verb.dtype, jnp.floating)
    if isinstance(verb, Same):
        return verb.is_operand
    if isinstance(verb, Scale):
        other = eqn.invars[1 - at]
        if verb.divides:
            return at == 0 and _is_number(it, other)
        return _is_number(it, other) or _is_mask(it, other, own.shape)
    if isinstance(verb, Select) and len(ins) == 3 and at > 0:
        return _is_zero(it, eqn.invars[3 - at]) and _is_drawn(
            it, eqn.invars[0], own.shape
        )
    return False


def _is_number(it: Interpreter, var: Any) -> bool:
    """One value, perhaps broadcast."""
    var = it.source(var)
    if math.prod(var.aval.shape) == 1:
        return True
    made = it.producer(var)
    return made is not None and only_moves(made) and _is_number(it, made.invars[0])


def _is_mask(it: Interpreter, var: Any, shape: Sequence[int]) -> bool:
    made = it.producer(var)
    if made is None or not only_moves(made):
        return False
    source = made.invars[0]
    if source.aval.dtype == jnp.bool_:
        return _is_drawn(it, source, shape)
    return _is_mask(it, source, shape)


def _is_drawn(it: Interpreter, var: Any, shape: Sequence[int]) -> bool:
    """Whether random bits and numbers alone made it, not what entered.

    A constant was drawn before if it has a value for each feature, which padding has
    not.
    """
    return _drawn(it, var, tuple(shape), {}) is True


def _drawn(
    it: Interpreter,
    var: Any,
    shape: tuple[int, ...],
    known: dict[Any, bool | None],
) -> bool | None:
    """True: of random bits.  None: the same whatever is drawn.  False: of an input."""
    var = it.source(var)
    if isinstance(var, compat.Literal) or math.prod(var.aval.shape) == 1:
        return None
    if var not in known:
        known[var] = it.is_constant(var) and var.aval.shape == shape
        made = it.producer(var)
        if made is not None and isinstance(read(made), Draw):
            known[var] = True
        elif made is not None:
            draws = _draws(made)
            of = [v for v in made.invars if not (draws and _is_key(v))]
            parts = [_drawn(it, v, shape, known) for v in of]
            known[var] = _all_drawn([True if draws else None, *parts])
    return known[var]


def _draws(eqn: Any) -> bool:
    verb = read(eqn)
    if isinstance(verb, Call):
        return any(map(_draws, verb.jaxpr.eqns))
    return isinstance(verb, Draw)


def _is_key(var: Any) -> bool:
    return compat.is_key_array(var.aval) or var.aval.dtype == jnp.uint32


def _all_drawn(parts: list[bool | None]) -> bool | None:
    if False in parts:
        return False
    return True if True in parts else None


def _is_zero(it: Interpreter, var: Any) -> bool:
    var = it.source(var)
    if isinstance(var, compat.Literal):
        return not np.any(np.asarray(var.val))
    made = it.producer(var)
    return made is not None and only_moves(made) and _is_zero(it, made.invars[0])


# --- the mathematics -----------------------------------------------------------------


def reduced(
    leaf: Bottleneck | BranchStart,
    x: Float[Array, "..."],
    xl: Labels,
    **options: Any,
) -> tuple[jax.Array, list[Label]]:
    """act(x D + d), the rank last, and its labels."""
    labels = leaf.labels()
    down, bias = (getattr(leaf, n).astype(x.dtype) for n in ("down", "down_bias"))
    inputs = set(labels["down"]) - set(labels["down_bias"])
    keep = [*(k for k in xl if k not in inputs), R]
    h, hl = contract(x, xl, down, labels["down"], keep, **options)
    h = h + spread(bias, labels["down_bias"], hl)
    return ACTIVATIONS[leaf.activation](h), hl
