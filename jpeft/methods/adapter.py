"""Bottleneck adapters: a small network at the end of a sub-layer, or beside it.

    houlsby    y' = y + s f(y)     after attention and after feed-forward
    pfeiffer   y' = y + s f(y)     after feed-forward only
    parallel   y' = y + s f(x)     beside feed-forward, s = 4

    f(h) = act(h D + d) U + u      D (*stack, *in, rank)    d (*stack, rank)
                                   U (*stack, rank, *out)   u (*stack, *out)

x is what enters the sub-layer, y what its last weight puts out, bias included.
Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2020, arXiv:2005.00247; He et al.
2021, arXiv:2110.04366.

A sequential adapter is a leaf on the last bias of the sub-layer, whose sum is the
finished output, or on the last weight if it has no bias.  A parallel one is two leaves:
the first weight, which sees x, hands on act(x D + d), which is rank wide, to the last.
Both wait through the dropout that follows (`late`), where the papers put them.

Where we depart from the papers: U starts at zero instead of near it (init="houlsby" is
the paper's), so the model starts as its base, bit for bit.  Pfeiffer's adapter reads
the sub-layer's output as Houlsby's does, not its sum with the residual after another
layer norm, as AdapterHub's does: that sum is made outside of the sub-layer.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jpeft import compat
from jpeft.adapt.interpreter import Interpreter, rule, settled
from jpeft.adapt.labels import (
    Label,
    Labelled,
    Labels,
    R,
    align,
    contract,
    operand_labels,
)
from jpeft.leaf import (
    AdaptedLeaf,
    Carried,
    Path,
    adapted_leaf,
    carried,
    frozen,
    is_leaf,
    static,
    trainable,
)
from jpeft.methods._gate import gate_labels, open_gate, spread
from jpeft.transform import (
    LeafMethod,
    Pattern,
    check_float,
    check_pattern,
    check_positive,
    check_target,
    matched,
    method,
)
from jpeft.tree.layout import LeafUse, layouts
from jpeft.tree.paths import Slots, suggest
from jpeft.tree.sublayers import SubLayer, parts_of
from jpeft.tree.where import Where, check_where

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "gelu_exact": lambda x: jax.nn.gelu(x, approximate=False),
    "swish": jax.nn.swish,
    "tanh": jnp.tanh,
    "leaky_relu": jax.nn.leaky_relu,
    "identity": lambda x: x,
}
INITS = ("near_identity", "houlsby", "bert", "lora")
LEARNED = "learned"


@dataclasses.dataclass(frozen=True)
class _Placement:
    """What a paper says where the caller does not."""

    where: str
    activation: str
    reduction: int
    scale: float
    init: str


PLACEMENTS = {
    "houlsby": _Placement("all", "gelu", 16, 1.0, "near_identity"),
    "pfeiffer": _Placement("mlp", "relu", 16, 1.0, "near_identity"),
    "parallel": _Placement("mlp", "relu", 2, 4.0, "lora"),
}


# --- the leaves ----------------------------------------------------------------------


@adapted_leaf
class Part(Labelled):
    """A leaf of an adapter.  Arrays a variant does not have are None.

    Of a bias all axes are output axes; of a weight input axes are in no array of a leaf
    that acts on its output.
    """

    spare: ClassVar[str] = "-"

    def labels(self) -> dict[str, list[Label]]:
        every = type(self).labels_of(self.axes)
        return {n: k for n, k in every.items() if getattr(self, n) is not None}


@adapted_leaf
class AtEnd(Part):
    """A leaf that adds to the output of a sub-layer: on its last bias or weight.

    late: wait through the dropout that follows.  scale times gain is the factor of what
    is added.
    """

    up: Any = trainable()
    up_bias: Any = trainable()
    gain: Any = trainable(default=None)
    scale: float = static(default=1.0)
    late: bool = static(default=True)

    def disable(self) -> Self:
        base = self.base.disable() if is_leaf(self.base) else self.base
        zero = {n: jax.tree.map(jnp.zeros_like, getattr(self, n)) for n in _UP}
        return self.replace(base=base, **zero)

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
        y, yl = contract(h, hl, up, labels["up"], out, **options)
        bias = spread(up_bias, labels["up_bias"], out)
        for f in factors:
            bias = bias * (f if jnp.ndim(f) == 0 else spread(f[..., 0], hl[:-1], out))
        return align(y, yl, out) + bias


_UP = ("up", "up_bias")


@adapted_leaf
class Bottleneck(AtEnd):
    """y -> y + s f(y).

    down: (*stack, *out, rank); down_bias: (*stack, rank); up: (*stack, rank, *out);
    up_bias: (*stack, *out); gain: (*stack,); gate: (*stack, *out); gate_bias: (*stack,)
    """

    down: Any = trainable()
    down_bias: Any = trainable()
    gate: Any = trainable(default=None)
    gate_bias: Any = trainable(default=None)
    activation: str = static(default="relu")

    @classmethod
    def labels_of(cls, axes: str) -> dict[str, list[Label]]:
        s, o = ([k for k, c in enumerate(axes) if c == g] for g in "so")
        return {
            "down": [*s, *o, R],
            "down_bias": [*s, R],
            "up": [*s, R, *o],
            "up_bias": [*s, *o],
            "gain": [*s],
            **gate_labels(s, o),
        }

    def finish(
        self, it: Interpreter, eqn: Any, y: jax.Array, labels: list[Label]
    ) -> Any:
        waiting = Waiting(
            y=y,
            leaf=self.replace(base=None),
            labels=tuple(labels),
            precision=eqn.params.get("precision"),
        )
        return waiting if self.late else waiting.settle()

    def added(self, y: jax.Array, labels: list[Label], **options: Any) -> jax.Array:
        h, hl = reduced(self, y, labels, **options)
        gate = None
        if self.gate is not None:
            gate = open_gate(y, labels, self, hl, **options)
        return self.expand(h, hl, labels, gate, **options)


@adapted_leaf
class BranchStart(Part):
    """On the first weight of a sub-layer: hands act(x D + d), and a gate, to the last.

    down: (*stack, *in, rank); down_bias: (*stack, rank); gate: (*stack, *in);
    gate_bias: (*stack,).  link: the sub-layer's path.
    """

    down: Any = trainable()
    down_bias: Any = trainable()
    gate: Any = trainable(default=None)
    gate_bias: Any = trainable(default=None)
    activation: str = static(default="relu")
    link: Path = static()

    def __post_init__(self) -> None:
        _as_path(self)

    @classmethod
    def labels_of(cls, axes: str) -> dict[str, list[Label]]:
        s, i = ([k for k, c in enumerate(axes) if c == g] for g in "si")
        return {
            "down": [*s, *i, R],
            "down_bias": [*s, R],
            **gate_labels(s, i),
        }

    def opens(self) -> frozenset[str]:
        return frozenset({_link(self)})

    def disable(self) -> Self:
        base = self.base.disable() if is_leaf(self.base) else self.base
        return self.replace(base=base)


@adapted_leaf
class BranchEnd(AtEnd):
    """On the last bias or weight: y -> y + s (h U + u), where h is what `BranchStart`
    handed on.

    up: (*stack, rank, *out); up_bias: (*stack, *out); gain: (*stack,)
    """

    link: Path = static()

    def __post_init__(self) -> None:
        _as_path(self)

    @classmethod
    def labels_of(cls, axes: str) -> dict[str, list[Label]]:
        s, o = ([k for k, c in enumerate(axes) if c == g] for g in "so")
        return {"up": [*s, R, *o], "up_bias": [*s, *o], "gain": [*s]}

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
                f"{self.where()}the parallel adapter of {str.__str__(self.link)!r} "
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


@rule("dot_general", kind=AtEnd)
def _dot_general(it: Interpreter, eqn: Any, ins: list[Any]) -> Any:
    if all(map(is_leaf, ins)):
        return None
    side = 0 if is_leaf(ins[0]) else 1
    leaf, x = ins[side], ins[1 - side]
    _, out = operand_labels(eqn, side, leaf.ndim, jnp.ndim(x))
    _check_direction(it, eqn, leaf, "o", out)
    return leaf.finish(it, eqn, settled(it.base(eqn, ins)), out)


@rule("add", "add_any", kind=AtEnd)
def _add(it: Interpreter, eqn: Any, ins: list[Any]) -> Any:
    """A bias, shaped to broadcast to the output it is added to."""
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


@rule("dot_general", kind=BranchStart)
def _start(it: Interpreter, eqn: Any, ins: list[Any]) -> Any:
    if all(map(is_leaf, ins)):
        return None
    side = 0 if is_leaf(ins[0]) else 1
    leaf, x = ins[side], ins[1 - side]
    xl, out = operand_labels(eqn, side, leaf.ndim, jnp.ndim(x))
    _check_direction(it, eqn, leaf, "i", [k for k in xl if k not in out])
    _check_unstacked(it, eqn, leaf)
    y = it.base(eqn, ins)
    options = {"precision": eqn.params["precision"]}
    h, hl = reduced(leaf, x, xl, **options)
    gate = None
    if leaf.gate is not None:
        gate = open_gate(x, xl, leaf, hl, **options)
    it.open_link(eqn, _link(leaf), (h, gate))
    return y


def _check_unstacked(it: Interpreter, eqn: Any, leaf: Labelled) -> None:
    if "s" in leaf.axes:
        raise ValueError(
            f"{leaf.where()}a parallel adapter acts in one layer at a time, and at "
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
            f"{leaf.where()}the axes {sorted(wanted)} of shape {leaf.shape} were taken "
            f"for its {name} axes, and in the product at {it.site(eqn)} they are "
            f"{sorted(got)}; pass uses=jpeft.find_uses(fn, params, *args) to the "
            "transform, or exclude= the sub-layer"
        )


# --- waiting -------------------------------------------------------------------------


class Late(Carried):
    """An output that is still owed its adapter, and waits while it is only dropped.

    It goes through x / keep, x * number, select(mask, x, 0), x * mask and casts, which
    is how `nn.Dropout` and its kin are written; at any other equation it is settled.
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
    name, at = eqn.primitive.name, next(k for k, x in enumerate(ins) if x is own)
    if name == "convert_element_type":
        return jnp.issubdtype(eqn.params["new_dtype"], jnp.floating)
    if name in ("sharding_constraint", "copy", "copy_p", "name"):
        return True
    if name == "div":
        return at == 0 and _is_number(it, eqn.invars[1])
    if name == "mul":
        other = eqn.invars[1 - at]
        return _is_number(it, other) or _is_mask(it, other)
    if name == "select_n" and len(ins) == 3 and at > 0:
        return _is_zero(it, eqn.invars[3 - at])
    return False


def _is_number(it: Interpreter, var: Any) -> bool:
    """One value, perhaps broadcast."""
    if math.prod(var.aval.shape) == 1:
        return True
    made = it.producer(var)
    return (
        made is not None
        and made.primitive.name in _SAME_VALUES
        and _is_number(it, made.invars[0])
    )


def _is_mask(it: Interpreter, var: Any) -> bool:
    made = it.producer(var)
    if made is None or made.primitive.name not in _SAME_VALUES:
        return False
    source = made.invars[0]
    return source.aval.dtype == jnp.bool_ or _is_mask(it, source)


def _is_zero(it: Interpreter, var: Any) -> bool:
    if isinstance(var, compat.Literal):
        return not np.any(np.asarray(var.val))
    made = it.producer(var)
    if made is not None:
        name = made.primitive.name
        return name in _SAME_VALUES and _is_zero(it, made.invars[0])
    return False


_SAME_VALUES = ("broadcast_in_dim", "convert_element_type", "reshape", "copy")


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


def draw(
    key: jax.Array, init: str, shape: tuple[int, ...], fan_in: int, dtype: Any
) -> jax.Array:
    """The first values of a projection, drawn in float32."""
    if init == "lora":
        limit = 1.0 / math.sqrt(fan_in)
        x = jax.random.uniform(key, shape, jnp.float32, -limit, limit)
    elif init == "bert":
        x = 0.02 * jax.random.normal(key, shape, jnp.float32)
    else:  # two standard deviations at most, of 0.01, as Houlsby et al. have it
        x = 0.01 * jax.random.truncated_normal(key, -2.0, 2.0, shape, jnp.float32)
    return x.astype(dtype)


# --- the method ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Target(LeafUse):
    """A weight or bias of a sub-layer, and what the leaf on it does there."""

    part: SubLayer = SubLayer("", "")
    role: str = ""
    rank: int = 0


_AFTER, _START, _END = "after", "start", "end"


@method("adapter")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter(LeafMethod):
    """See `adapter`."""

    bottleneck: int | None = None
    reduction: float | None = None
    placement: str = "houlsby"
    activation: str | None = None
    scale: float | str | None = None
    gate: bool = False
    late: bool = True
    init: str | None = None
    dtype: str | None = None
    bottleneck_pattern: Pattern = ()
    where: Where | None = None
    exclude: Where = ()

    def __post_init__(self) -> None:
        one_of("placement", self.placement, PLACEMENTS)
        if self.bottleneck is not None and self.reduction is not None:
            raise ValueError(
                f"adapter: bottleneck={self.bottleneck!r} and reduction="
                f"{self.reduction!r} both say how wide the bottleneck is; give one"
            )
        if self.bottleneck is not None:
            check_positive("adapter", "bottleneck", self.bottleneck, integer=True)
        if self.reduction is not None:
            check_positive("adapter", "reduction", self.reduction)
        if self.activation is not None:
            one_of("activation", self.activation, ACTIVATIONS)
        if self.init is not None:
            one_of("init", self.init, INITS)
        if isinstance(self.scale, str) and self.scale != LEARNED:
            raise ValueError(
                f"adapter: scale={self.scale!r}: expected a number above 0 or "
                f"{LEARNED!r}"
            )
        if self.scale is not None and self.scale != LEARNED:
            check_positive("adapter", "scale", self.scale)
        for name in ("gate", "late"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(
                    f"adapter: {name}={getattr(self, name)!r}: expected True or False"
                )
        check_float("adapter", self.dtype)
        pattern = check_pattern(
            "adapter", "bottleneck_pattern", self.bottleneck_pattern, integer=True
        )
        object.__setattr__(self, "bottleneck_pattern", pattern)
        for name in ("where", "exclude"):
            if getattr(self, name) is not None:
                value = check_where(getattr(self, name), name)
                object.__setattr__(self, name, value)

    @property
    def of_paper(self) -> _Placement:
        return PLACEMENTS[self.placement]

    def selection(self) -> tuple[Where, Where]:
        return self.of_paper.where if self.where is None else self.where, self.exclude

    def targets(
        self, flat: Slots, uses: Mapping[str, LeafUse] | None
    ) -> dict[str, LeafUse]:
        known, at = layouts(flat, uses), dict(flat.items())
        parallel = self.placement == "parallel"
        needs = ("first", "last") if parallel else ("last",)
        parts = parts_of(flat, uses, *self.selection(), self.name, needs=needs)
        self._check_widths(parts)
        out: dict[str, LeafUse] = {}
        for part in parts:
            for path in {part.last: 0, **({part.first[0]: 0} if parallel else {})}:
                check_target(self, path, at[path], known[path], True)
            end = _at_end(part, known)
            check_target(self, end.path, at[end.path], end, True)
            start = known[part.first[0]] if parallel else None
            width = math.prod(end.sizes("o") if start is None else start.sizes("i"))
            rank = self.rank_of(part.path, width)
            target = lambda use, role, part=part, rank=rank: _Target(
                **_fields(use), part=part, role=role, rank=rank
            )
            out[end.path] = target(end, _END if parallel else _AFTER)
            if start is not None:
                out[start.path] = target(start, _START)
        return out

    def rank_of(self, path: str, width: int) -> int:
        rank = self.bottleneck
        if rank is None:
            rank = max(1, int(width // (self.reduction or self.of_paper.reduction)))
        return matched(self.bottleneck_pattern, path, rank)

    def _check_widths(self, parts: list[SubLayer]) -> None:
        paths = [p.path for p in parts]
        for regex, _ in self.bottleneck_pattern:
            if not any(matched(((regex, True),), p, False) for p in paths):
                raise ValueError(
                    f"adapter: bottleneck_pattern key {regex!r} matches none of the "
                    f"selected sub-layers; nearest: {suggest(paths, regex)}"
                )

    def attach(self, key: jax.Array, path: str, base: Any, use: LeafUse) -> AdaptedLeaf:
        assert isinstance(use, _Target) and use.axes is not None
        kind = {_AFTER: Bottleneck, _START: BranchStart, _END: BranchEnd}[use.role]
        init = self.of_paper.init if self.init is None else self.init
        dtype, labels = self.adapter_dtype(base), kind.labels_of(use.axes)
        size = lambda k: use.rank if k == R else use.shape[k]
        shape = {n: tuple(map(size, k)) for n, k in labels.items()}
        keys = dict(zip(("down", "up"), jax.random.split(key), strict=True))
        scale = self.of_paper.scale if self.scale is None else self.scale
        fields: dict[str, Any] = {"base": base, "axes": use.axes}
        if use.role != _START:
            fields["late"] = self.late
            if scale == LEARNED:
                fields["gain"] = jnp.ones(shape["gain"], dtype)
            else:
                fields["scale"] = float(scale)
        if use.role != _AFTER:
            fields["link"] = Path(use.part.path)
        if use.role != _END:
            activation = self.activation or self.of_paper.activation
            fields["activation"] = activation
            if self.gate:
                width = math.prod(shape["gate"]) // math.prod(shape["gate_bias"])
                fields["gate"] = draw(keys["up"], "bert", shape["gate"], width, dtype)
                fields["gate_bias"] = jnp.zeros(shape["gate_bias"], dtype)
        for name in ("down", "up"):
            if name not in shape:
                continue
            fields[f"{name}_bias"] = jnp.zeros(shape[f"{name}_bias"], dtype)
            if name == "up" and init in ("near_identity", "lora"):
                fields[name] = jnp.zeros(shape[name], dtype)
                continue
            stack = math.prod(shape[f"{name}_bias"][: use.axes.count("s")])
            fan_in = (
                use.rank
                if name == "up"
                else math.prod(shape[name]) // (stack * use.rank)
            )
            fields[name] = draw(keys[name], init, shape[name], fan_in, dtype)
        return kind(**fields)


def _fields(use: LeafUse) -> dict[str, Any]:
    return {f.name: getattr(use, f.name) for f in dataclasses.fields(LeafUse)}


def _at_end(part: SubLayer, known: Mapping[str, LeafUse]) -> LeafUse:
    """The last weight, or its bias with the weight's output axes."""
    last = known[part.last]
    assert last.axes is not None
    if part.last_bias is None:
        return last
    bias = known[part.last_bias]
    kept = [k for k, c in enumerate(last.axes) if c != "i"]
    if bias.shape != tuple(last.shape[k] for k in kept):
        raise ValueError(
            f"{part.last}: axes {last.axes!r} of shape {last.shape} do not fit its "
            f"bias {part.last_bias} of shape {bias.shape}; pass "
            "uses=jpeft.find_uses(fn, params, *args), which looks at how the model "
            f"uses it, or exclude={part.path!r}"
        )
    return dataclasses.replace(bias, axes="".join(last.axes[k] for k in kept), doubt="")


def one_of(name: str, value: Any, known: Any) -> None:
    if value not in known:
        raise ValueError(f"adapter: {name}={value!r}: expected one of {list(known)}")


def adapter(
    bottleneck: int | None = None,
    reduction: float | None = None,
    *,
    placement: str = "houlsby",
    activation: str | None = None,
    scale: float | str | None = None,
    gate: bool = False,
    late: bool = True,
    init: str | None = None,
    where: Where | None = None,
    exclude: Where = (),
    dtype: Any = None,
    bottleneck_pattern: Mapping[str, int] | None = None,
) -> Adapter:
    """A transform that puts bottleneck adapters at sub-layers.

        y' = y + s (act(h D + d) U + u)     h = y, or the sub-layer's input

    Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2020, arXiv:2005.00247; He et
    al. 2021, arXiv:2110.04366.

    bottleneck: columns of D.  reduction: instead, how many times narrower than h they
        are; None for both means 16, beside a parallel adapter 2.
    placement: "houlsby": after attention and feed-forward.  "pfeiffer": after
        feed-forward.  "parallel": beside feed-forward, on its input.
    activation: "relu", "gelu", "gelu_exact", "swish", "tanh", "leaky_relu" or
        "identity"; None means gelu for houlsby, relu for the other two.
    scale: s, or "learned" for one number a sub-layer that trains from 1; None means 4
        beside parallel, else 1.
    gate: True multiplies what is added by one number an example, read from h; see
        `jpeft.unipelt`.
    late: wait through the dropout that follows the sub-layer, as in the papers.  Casts
        and numbers that multiply the output are waited through as well.
    init: "near_identity": D a Gaussian of 0.01 cut at two deviations, U zero.
        "houlsby": both such Gaussians.  "bert": both Gaussians of 0.02, as AdapterHub.
        "lora": D uniform with variance 1/(3 in), U zero.  None means "lora" for
        parallel, else "near_identity".  Biases start at zero.
    where, exclude: which sub-layers, by their path: "attention", "mlp", "all", a
        regular expression, a callable, weights named in full; see
        `jpeft.tree.sublayers`.  None means what the placement says.
    dtype: of the adapter's arrays; None means float32, or float64 beside float64.
    bottleneck_pattern: {regular expression for a sub-layer's path: bottleneck}.

    There is no merged weight: `merge` refuses.  Raises ValueError for a selection that
    matches nothing and for a sub-layer whose weights or axes are in doubt.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> mlp = {"up": {"kernel": jnp.ones((6, 5))}, "down": {"kernel": jnp.ones((5, 6))}}
    >>> params = jpeft.adapter(3, placement="pfeiffer")(jax.random.key(0), {"mlp": mlp})
    >>> jpeft.count(params).trainable  # (6 + 1) 3 + (3 + 1) 6
    45
    """
    return Adapter(
        bottleneck=bottleneck,
        reduction=reduction,
        placement=placement,
        activation=activation,
        scale=scale,
        gate=gate,
        late=late,
        init=init,
        dtype=None if dtype is None else jnp.dtype(dtype).name,
        bottleneck_pattern=tuple((bottleneck_pattern or {}).items()),
        where=where,
        exclude=exclude,
    )
