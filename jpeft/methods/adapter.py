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
from collections.abc import Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from jpeft.attach import LeafMethod, check_target, matched
from jpeft.checks import (
    Count,
    Counts,
    Floating,
    Positive,
    check_positive,
    one_of,
    refusal,
)
from jpeft.leaf import AdaptedLeaf, Path, shapes_beside
from jpeft.leaves.bottleneck import ACTIVATIONS, Bottleneck, BranchEnd, BranchStart
from jpeft.leaves.draw import drawn, filled
from jpeft.transform import method
from jpeft.tree.layout import LeafUse, layouts
from jpeft.tree.paths import Slots, suggest
from jpeft.tree.sublayers import SubLayer, parts_of
from jpeft.tree.where import Where

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


# --- the method ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Target(LeafUse):
    """A weight or bias of a sub-layer, and what the leaf on it does there."""

    part: SubLayer = SubLayer("", "")
    role: str = ""
    rank: int = 0


_AFTER, _START, _END = "after", "start", "end"


def check_scale(method: str, name: str, value: Any) -> float | str:
    if isinstance(value, str) and value == LEARNED:
        return LEARNED
    if isinstance(value, str):
        raise refusal(method, name, value, f"a number above 0 or {LEARNED!r}")
    return check_positive(method, name, value)


Scale = Annotated[float | str, check_scale]


@method("adapter")
@dataclasses.dataclass(frozen=True)
class Adapter(LeafMethod):
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

    bottleneck: Count | None = None
    reduction: Positive | None = None
    _: dataclasses.KW_ONLY
    placement: Annotated[str, one_of(PLACEMENTS)] = "houlsby"
    activation: Annotated[str, one_of(ACTIVATIONS)] | None = None
    scale: Scale | None = None
    gate: bool = False
    late: bool = True
    init: Annotated[str, one_of(INITS)] | None = None
    dtype: Floating | None = None
    bottleneck_pattern: Counts = ()
    where: Where | None = None
    exclude: Where = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bottleneck is not None and self.reduction is not None:
            raise ValueError(
                f"adapter: bottleneck={self.bottleneck!r} and reduction="
                f"{self.reduction!r} both say how wide the bottleneck is; give one"
            )

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
        dtype = self.adapter_dtype(base)
        shape = shapes_beside(kind, use.shape, use.axes, r=use.rank)
        keys = dict(zip(("down", "up"), jax.random.split(key), strict=True))
        scale = self.of_paper.scale if self.scale is None else self.scale
        fields: dict[str, Any] = {"base": base, "axes": use.axes}
        if use.role != _START:
            fields["late"] = self.late
            if scale == LEARNED:
                fields["gain"] = filled(shape["gain"], 1, dtype)
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
                fields["gate_bias"] = filled(shape["gate_bias"], 0, dtype)
        for name in ("down", "up"):
            if name not in shape:
                continue
            fields[f"{name}_bias"] = filled(shape[f"{name}_bias"], 0, dtype)
            if name == "up" and init in ("near_identity", "lora"):
                fields[name] = filled(shape[name], 0, dtype)
                continue
            stack = math.prod(shape[f"{name}_bias"][: use.axes.count("s")])
            fan_in = (
                use.rank
                if name == "up"
                else math.prod(shape[name]) // (stack * use.rank)
            )
            fields[name] = draw(keys[name], init, shape[name], fan_in, dtype)
        return kind(**fields)


adapter = Adapter


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
            f"bias {part.last_bias} of shape {bias.shape}; "
            + (
                ""
                if last.uses
                else "pass uses=jpeft.find_uses(fn, params, *args), which looks at how "
                "the model uses it, or "
            )
            + f"exclude={part.path!r}"
        )
    return dataclasses.replace(bias, axes="".join(last.axes[k] for k in kept), doubt="")


def draw(
    key: jax.Array, init: str, shape: tuple[int, ...], fan_in: int, dtype: Any
) -> jax.Array:
    """The first values of a projection, drawn in float32."""
    limit, wide = 1.0 / math.sqrt(fan_in), jnp.float32

    def entries(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        if init == "lora":
            return jax.random.uniform(key, shape, wide, -limit, limit)
        if init == "bert":
            return 0.02 * jax.random.normal(key, shape, wide)
        # Two standard deviations at most, of 0.01, as Houlsby et al. have it.
        return 0.01 * jax.random.truncated_normal(key, -2.0, 2.0, shape, wide)

    return drawn(entries, key, shape).astype(dtype)
