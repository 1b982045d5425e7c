"""Methods that put a leaf on each weight that they choose.

Which weights they choose and what is checked; how a leaf gets its key, its box and its
sharding."""

from __future__ import annotations

import dataclasses
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jpeft import compat
from jpeft.boxes import unbox
from jpeft.checks import Count, Counts, Floating, Positive, Positives
from jpeft.finite import all_finite
from jpeft.leaf import AdaptedLeaf, box_of, boxed_like, innermost, layers, wide_dtype
from jpeft.sharding.specs import place_beside
from jpeft.transform import Pattern, Transform, folded
from jpeft.tree.layout import CONV, UNUSED, LeafUse, layouts
from jpeft.tree.paths import Slots, slots, suggest, weight
from jpeft.tree.sublayers import weights_of_parts
from jpeft.tree.where import Where, asks_parts, select
from jpeft.types import PyTree


@dataclasses.dataclass(frozen=True)
class LeafMethod(Transform):
    """A method that rewrites each selected weight by itself."""

    # False: the method acts on the whole array and asks nothing of its axes.
    needs_axes: ClassVar[bool] = True
    # False: its leaf has no merged weight that a model could use instead.
    has_value: ClassVar[bool] = True
    # What to type instead where a tree has nothing for it, or "".
    otherwise: ClassVar[str] = ""

    def selection(self) -> tuple[Where, Where]:
        """(where, exclude)."""
        raise NotImplementedError

    def accepts(self, use: LeafUse) -> bool:
        """Whether the method can act on such a weight."""
        raise NotImplementedError

    def attach(self, key: jax.Array, path: str, base: Any, use: LeafUse) -> AdaptedLeaf:
        """The leaf over `base` (unboxed); its key is the leaf's own."""
        raise NotImplementedError

    def patterns(self) -> dict[str, Pattern]:
        return {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name.endswith("_pattern")
        }

    def adapter_dtype(self, base: Any) -> Any:
        """float32, or what was asked for; float64 beside float64."""
        dtype = getattr(self, "dtype", None)
        return wide_dtype(base.dtype) if dtype is None else jnp.dtype(dtype)

    def __call__(
        self,
        key: jax.Array,
        params: PyTree,
        *,
        uses: Mapping[str, LeafUse] | None = None,
    ) -> PyTree:
        if compat.is_key_array(params):
            raise ValueError(f"{self.name}: the key comes first, then the parameters")
        flat = slots(params)
        chosen = self.targets(flat, uses)
        at = dict(flat.items())
        check_finite({p: at[p] for p in chosen}, self.name)
        made = {p: self.adapted(key, p, at[p], use) for p, use in chosen.items()}
        return flat.rebuild(made.get(p, x) for p, x in flat.items())

    def targets(
        self, flat: Slots, uses: Mapping[str, LeafUse] | None
    ) -> dict[str, LeafUse]:
        """The weights this transform rewrites, each checked."""
        known = layouts(flat, uses)
        at = dict(flat.items())
        candidates = {p: u for p, u in known.items() if self.accepts(u)}
        others = [p for p in flat.paths if p not in candidates]
        where, exclude = self.selection()
        chosen = select(
            candidates,
            at,
            where,
            exclude,
            method=self.name,
            others={p: known[p] for p in others if p in known},
            otherwise=self.otherwise,
            unused=self._unused(flat, known),
            parts=weights_of_parts(flat, uses) if asks_parts(where, exclude) else None,
        )
        out = {}
        doubtful = [p for p, named in chosen.items() if in_doubt(self, known[p], named)]
        for path, explicit in chosen.items():
            use = candidates[path]
            if not check_target(self, path, at[path], use, explicit, doubtful):
                continue
            out[path] = use
        self._check_patterns(out)
        return out

    def _unused(self, flat: Slots, known: Mapping[str, LeafUse]) -> list[str]:
        """Weights that by name the method could act on, unused by the traced call."""
        idle = [p for p, u in known.items() if u.kind == UNUSED]
        names = layouts(flat, None) if idle else {}
        return [p for p in idle if self.accepts(names[p])]

    def _check_patterns(self, chosen: Mapping[str, LeafUse]) -> None:
        for name, pattern in self.patterns().items():
            for regex, _ in pattern:
                if not any(re.fullmatch(regex, p) for p in chosen):
                    raise ValueError(
                        f"{self.name}: {name} key {regex!r} matches none of the "
                        f"selected weights; nearest: {suggest(list(chosen), regex)}"
                    )

    def adapted(
        self, key: jax.Array, path: str, slot: Any, use: LeafUse
    ) -> AdaptedLeaf:
        """The slot with this method's leaf over it, in the box and the sharding of its
        base."""
        base = weight(slot)
        return over(self, slot, self.attach(path_key(key, path), path, base, use))


def over(transform: Transform, slot: Any, leaf: AdaptedLeaf) -> AdaptedLeaf:
    """A transform's leaf over what stands in the tree, boxed and placed as its base."""
    leaf = place_beside(leaf, unbox(innermost(slot)))
    return boxed_like(box_of(slot), leaf.replace(base=slot, origin=transform.origin()))


@dataclasses.dataclass(frozen=True)
class Ranked(LeafMethod):
    """rank, alpha: of weights whose path no regular expression of rank_pattern and
    alpha_pattern matches.  dtype: of the method's arrays."""

    rank: Count
    alpha: Positive | None = None
    _: dataclasses.KW_ONLY
    dtype: Floating | None = None
    rank_pattern: Counts = ()
    alpha_pattern: Positives = ()
    where: Where = "linear"
    exclude: Where = ()

    def selection(self) -> tuple[Where, Where]:
        return self.where, self.exclude

    def accepts(self, use: LeafUse) -> bool:
        return use.is_weight

    def rank_of(self, path: str) -> int:
        return matched(self.rank_pattern, path, self.rank)

    def alpha_of(self, path: str) -> float | None:
        return matched(self.alpha_pattern, path, self.alpha)


def check_rank(path: str, rank: int, use: LeafUse) -> None:
    """Raises if a matrix has no room for a delta of this rank."""
    n_in, n_out = math.prod(use.sizes("i")), math.prod(use.sizes("o"))
    if rank > min(n_in, n_out):
        kind = "convolution " if use.kind == CONV else ""
        raise ValueError(
            f"{path}: rank {rank} is larger than the {kind}matrix {n_in} x {n_out} of "
            f"shape {use.shape}; use rank <= {min(n_in, n_out)} "
            f"(rank_pattern={{{path!r}: {min(n_in, n_out)}}}) or exclude={path!r}"
        )


def path_key(key: jax.Array, path: str) -> jax.Array:
    """A leaf's key.  crc32, never `hash`: that one differs from run to run."""
    return folded(key, zlib.crc32(path.encode()))


# --- checks --------------------------------------------------------------------------


def in_doubt(transform: LeafMethod, use: LeafUse, explicit: bool) -> bool:
    """Whether a selected weight lacks the labels of axes that the method needs."""
    return bool(
        transform.needs_axes
        and use.doubt
        and not (explicit and _may_be_whole(transform, use))
    )


def _may_be_whole(transform: LeafMethod, use: LeafUse) -> bool:
    """Whether the axes are known, and the full value could replace the weight where the
    model changes it or has a gradient rule of its own for it."""
    return use.axes is not None and (transform.has_value or not use.uses)


def check_target(
    transform: LeafMethod,
    path: str,
    slot: Any,
    use: LeafUse,
    explicit: bool,
    doubtful: Sequence[str] = (),
) -> bool:
    """Raises if the method must not act here.  False: leave it out (a preset met an
    array that does not train, such as a counter).

    doubtful: all selected weights whose axes are in doubt, for the message.
    """
    x, name = weight(slot), transform.name
    if not jnp.issubdtype(x.dtype, jnp.floating):
        if not explicit and not transform.needs_axes:
            return False
        real = not jnp.issubdtype(x.dtype, jnp.complexfloating)
        raise ValueError(
            f"{path}: {name} needs a real floating-point weight, this one is "
            f"{x.dtype}; exclude={path!r}" + (", or cast it first" if real else "")
        )
    if in_doubt(transform, use, explicit):
        every = [path, *(p for p in doubtful if p != path)]
        leave = f"exclude={every if len(every) > 1 else path!r}"
        remedy = (
            "pass uses=jpeft.find_uses(fn, params, *args), which looks at how the "
            f"model uses it, or {leave}"
            if not use.uses
            else f"{leave}, or name it in where= and call "
            'jpeft.adapt(fn, materialize="allow")'
            if _may_be_whole(transform, use)
            else leave
        )
        raise ValueError(
            f"{path}: {name} cannot tell input from output axes of shape {use.shape} "
            f"({use.doubt}); {remedy}"
        )
    check_new(transform, path, slot)
    for leaf in layers(slot):
        if leaf.replaces_base:
            raise ValueError(
                f"{path}: this leaf trains whole ({type(leaf).__name__}), so {name} "
                f"would add nothing; exclude={path!r}"
            )
    return True


def check_new(transform: Transform, path: str, slot: Any) -> None:
    """Raises if this very transform stands here already."""
    if any(leaf.origin == transform.origin() for leaf in layers(slot)):
        raise ValueError(
            f"{path}: this very {transform.name} transform is already applied here; "
            "apply it to the base, jpeft.unload(params), or change where= or exclude="
        )


def check_finite(targets: Mapping[str, Any], name: str) -> None:
    """Raises if a weight holds NaN or infinity (skipped for weights JAX traces)."""
    found = {}
    for path, slot in targets.items():
        x = unbox(innermost(slot))
        if isinstance(x, compat.Tracer) or not isinstance(x, (jax.Array, np.ndarray)):
            continue
        if jnp.issubdtype(x.dtype, jnp.floating):
            found[path] = all_finite(x)
    bad = [p for p, ok in jax.device_get(found).items() if not ok]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise ValueError(
            f"{bad[0]}{more}: the base holds NaN or infinity, which no {name} adapter "
            "can train away; check how the weights were loaded"
        )


def matched(pattern: Pattern, path: str, default: Any) -> Any:
    """The value of the first pattern that matches the whole path."""
    return next((v for regex, v in pattern if re.fullmatch(regex, path)), default)
