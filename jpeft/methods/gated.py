"""Gates on other methods: each example decides how much of an adapter it gets.

Mao et al. 2022, arXiv:2110.07577.

    g = mean over the sequence of sigmoid(x w + b)      w (*stack, *in)   b (*stack,)

    lora       y' = x W + g s x A B        x: what enters the weight
    prefix     P_k, P_v -> g P_k, g P_v    x: what enters the kernel of keys
    adapter    y' = y + g s f(h)           x = h: what the adapter reads

One number an example and gated part, from the gated part's own input; w starts Gaussian
with deviation 0.02 and b at zero, so gates start near a half.  The sequence is the axis
before the features, padding included.

Where implementations differ: AdapterHub's gated LoRA has g in the place of the scale s
(`replace_scale=True`), and gates keys and values by two numbers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.adapt.equations import Product
from jpeft.adapt.interpreter import Interpreter, contracts
from jpeft.adapt.labels import Labelled
from jpeft.attach import path_key
from jpeft.boxes import unbox
from jpeft.checks import shown
from jpeft.leaf import (
    AdaptedLeaf,
    Linked,
    Path,
    adapted_leaf,
    array_fields,
    box_of,
    boxed_like,
    innermost,
    is_leaf,
    roles,
    shapes_beside,
    static,
    trainable,
    whose,
    wide_dtype,
)
from jpeft.leaves.draw import drawn, filled
from jpeft.leaves.gate import open_gate
from jpeft.leaves.low_rank import LowRank, dropped, through
from jpeft.leaves.prefix import Prefix
from jpeft.methods.adapter import Adapter
from jpeft.methods.lora import LoRA
from jpeft.methods.prefix import PrefixTuning
from jpeft.sharding.specs import place_beside
from jpeft.transform import Transform, method, transform_from_config
from jpeft.tree.layout import LeafUse
from jpeft.tree.paths import slots
from jpeft.tree.sublayers import parts_of

# --- LoRA ----------------------------------------------------------------------------


@adapted_leaf
class GatedLowRank(Labelled):
    """W + g scale * A.B, where g is read from what enters.

    a, b, scale, dropout: as `LowRank`'s.  gate: (*stack, *in); gate_bias: (*stack,)
    """

    a: Any = trainable("sir")
    b: Any = trainable("sro", off=0)
    gate: Any = trainable("si")
    gate_bias: Any = trainable("s")
    scale: float = static(default=1.0)
    dropout: float = static(default=0.0)

    def ungated(self) -> LowRank:
        names = roles(LowRank)
        return LowRank(**{n: getattr(self, n) for n in names})


@contracts(kind=GatedLowRank)
def _low_rank(it: Interpreter, at: Product) -> Any:
    leaf, x, xl, out = at.leaf, at.x, at.xl, at.out
    if any(k in out for k, c in enumerate(leaf.axes) if c == "i" and leaf.shape[k] > 1):
        return None  # used the other way round: x is not what the gate reads
    plain = leaf.ungated()
    delta = through(plain, dropped(plain, x), xl, out, **at.options)
    g = open_gate(x, xl, leaf, out, precision=at.options["precision"])
    return it.with_delta(at, g.astype(delta.dtype) * delta)


# --- prefix --------------------------------------------------------------------------


@adapted_leaf
class GatedPrefix(Prefix, Linked):
    """A prefix times a gate.

    gate: (*stack, *in), gate_bias: (*stack,) on the kernel of keys, which hands g on to
    that of values; None there.  link: the sub-layer's path, "" for one kernel of both.
    """

    gate: Any = trainable("si", default=None)
    gate_bias: Any = trainable("s", default=None)
    link: Path = static(default=Path(""))

    def __post_init__(self) -> None:
        # A link's name is no part of a leaf's structure: equal layers stay one program.
        object.__setattr__(self, "link", Path(self.link))

    def _links(self) -> frozenset[str]:
        name = str.__str__(self.link)
        return frozenset({f"{name} of {self.origin}"} if name else ())

    def opens(self) -> frozenset[str]:
        return self._links() if self.gate is not None else frozenset()

    def closes(self) -> frozenset[str]:
        return self._links() if self.gate is None else frozenset()

    def ungated(self, g: jax.Array) -> Prefix:
        """The plain prefix of these examples.  g: (examples,) or ()."""
        names = {n for n in roles(Prefix) if n not in ("keys", "values")}
        fields = {n: getattr(self, n) for n in names}
        each = g.ndim == 1 and g.shape[0] > 1
        g = g if each else g.reshape(())
        by = (
            (lambda x: g[:, None, None].astype(x.dtype) * x[None])
            if each
            else (lambda x: g.astype(x.dtype) * x)
        )
        rows = {
            n: by(getattr(self, n))
            for n in ("keys", "values")
            if getattr(self, n) is not None
        }
        if each:
            fields |= {"tasks": g.shape[0], "task": np.arange(g.shape[0])}
        return Prefix(**fields, **rows)


@contracts(kind=GatedPrefix)
def _prefix(it: Interpreter, at: Product) -> Any:
    leaf, eqn = at.leaf, at.eqn
    if leaf.gate is not None:
        g = _of_examples(it, at)
        for name in leaf.opens():
            it.open_link(eqn, name, g)
    else:
        (name,) = leaf.closes()
        g = it.close_link(eqn, name)
    return it.bind(eqn, at.ins(leaf=leaf.ungated(g)))


def _of_examples(it: Interpreter, at: Product) -> jax.Array:
    """g of each example: (examples,), or () where there is no axis of examples."""
    leaf, x = at.leaf, at.x
    free = [k for k in at.xl if isinstance(k, tuple)]
    if "s" in leaf.axes or len(free) not in (1, 2):
        raise ValueError(
            f"{whose(leaf)}a gated prefix needs activations (examples, sequence, "
            f"features), and at {it.site(at.eqn)} they are {jnp.shape(x)}; exclude= "
            "the sub-layer"
        )
    g = open_gate(x, at.xl, leaf, free, precision=at.options["precision"])
    return g.reshape(g.shape[:-1])


# --- the method ----------------------------------------------------------------------


def check_inner(method: str, name: str, value: Any) -> LoRA | PrefixTuning | Adapter:
    """A transform that has gates, given as it is or as a configuration."""
    made = transform_from_config(value) if isinstance(value, Mapping) else value
    if not isinstance(made, (LoRA, PrefixTuning, Adapter)):
        raise ValueError(
            f"{method}: expected jpeft.lora(...), jpeft.prefix(...) or "
            f"jpeft.adapter(...) as the {name}, got {shown(made)}"
        )
    return made


@method("gated")
@dataclasses.dataclass(frozen=True)
class Gated(Transform):
    """The given transform, with a gate that says how much of it each example gets.

    Mao et al. 2022, arXiv:2110.07577; see the module's docstring for the formulas.

    transform: `jpeft.lora`, `jpeft.prefix` (mode "kv") or `jpeft.adapter`.
    replace_scale: True drops LoRA's scale, whose place the gate takes.

    A gate depends on the input, so there is no merged weight.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = {"dense": {"kernel": jnp.ones((7, 5))}}
    >>> params = jpeft.gated(jpeft.lora(rank=2))(jax.random.key(0), params)
    >>> params["dense"]["kernel"].gate.shape
    (7,)
    """

    transform: Annotated[Transform, check_inner]
    _: dataclasses.KW_ONLY
    replace_scale: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        inner = self.transform
        if self.replace_scale and not isinstance(inner, LoRA):
            raise ValueError(
                "gated: replace_scale=True is for jpeft.lora(...), whose scale it drops"
            )
        if isinstance(inner, LoRA) and inner.init not in ("gaussian", "kaiming"):
            raise ValueError(
                f"gated: lora(init={inner.init!r}) starts from the weight itself, "
                "which a gate would scale; use init='gaussian'"
            )
        plain = {"mode": "kv", "reparametrization": None, "tasks": 1}
        for name, value in plain.items():
            if isinstance(inner, PrefixTuning) and getattr(inner, name) != value:
                raise ValueError(
                    f"gated: prefix({name}={getattr(inner, name)!r}) cannot be gated; "
                    f"expected {name}={value!r}"
                )

    def origins(self) -> frozenset[str]:
        return self.inner().origins()

    def inner(self) -> Transform:
        if isinstance(self.transform, Adapter):
            return dataclasses.replace(self.transform, gate=True)
        return self.transform

    def __call__(
        self,
        key: jax.Array,
        params: Any,
        *,
        uses: Mapping[str, LeafUse] | None = None,
    ) -> Any:
        inner = self.inner()
        if isinstance(inner, Adapter):
            return inner(key, params, uses=uses)
        pairs: dict[str, tuple[str, bool]] = {}
        if isinstance(inner, PrefixTuning):
            parts = parts_of(
                *(slots(params), uses, inner.where, inner.exclude, "prefix"),
                needs=("key", "value"),
            )
            for part in parts:
                k, v = part.key[0], part.value[0]
                link = "" if k == v else part.path
                pairs |= {v: (link, False), k: (link, True)}
        flat = slots(inner(key, params, uses=uses))
        out = []
        for path, slot in flat.items():
            if is_leaf(slot) and slot.origin == inner.origin():
                link, own = pairs.get(path, ("", True))
                slot = self._with_gate(path_key(key, path), slot, link, own)
            out.append(slot)
        return flat.rebuild(out)

    def _with_gate(
        self, key: jax.Array, leaf: Any, link: str, own: bool
    ) -> AdaptedLeaf:
        low_rank = isinstance(leaf, LowRank)
        kind = GatedLowRank if low_rank else GatedPrefix
        fields = {n: getattr(leaf, n) for n in roles(leaf)}
        if low_rank and self.replace_scale:
            fields["scale"] = 1.0
        if not low_rank:
            fields["link"] = Path(link)
        if not own:
            return kind(**fields)
        shape = shapes_beside(kind, leaf.shape, leaf.axes)
        of = jax.tree.leaves(next(iter(array_fields(leaf).values())))[0].dtype
        dtype = wide_dtype(of) if of == jnp.float64 else of
        normal = lambda k, s: 0.02 * jax.random.normal(k, s, wide_dtype(dtype))
        own_key = jax.random.fold_in(key, math.prod(shape["gate"]))
        gate = {
            "gate": drawn(normal, own_key, shape["gate"]).astype(dtype),
            "gate_bias": filled(shape["gate_bias"], 0, dtype),
        }
        base = unbox(innermost(leaf))
        empty = {n: None for n in array_fields(leaf)}
        alone = kind(**{**fields, **empty, **gate, "base": base})
        placed: Any = boxed_like(box_of(leaf), place_beside(alone, base))
        return kind(**fields, gate=placed.gate, gate_bias=placed.gate_bias)


gated = Gated
