"""What is known of a weight: what it is, and which of its axes mean what.

Each axis carries one of three labels:

    s  stack    one weight matrix a row (scanned layers, experts): in A and in B
    i  input    contracted with the activation: in A only
    o  output   free: in B only

`find_uses` learns this by tracing the model.  Without it, `by_name` goes by Flax's
naming conventions, and says so where they leave a doubt.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import jax.numpy as jnp

from jpeft import conventions
from jpeft.tree.paths import Slots, is_array, suggest, weight
from jpeft.tree.state import states

LINEAR, CONV, EMBEDDING = "linear", "conv", "embedding"
BIAS, NORM, MATRIX = "bias", "norm", "matrix"
OTHER, UNUSED = "other", "unused"
WEIGHTS = frozenset({LINEAR, CONV, EMBEDDING, MATRIX})

# The part of a vector in an equation, see `Use.part`; a bias is `BIAS` too.
NORM_SCALE, NORM_BIAS, LATE_BIAS = "norm scale", "norm bias", "late bias"
LAYER_SCALE, NEUTRAL = "layer scale", "neutral"
MAYBE_SCALE, MAYBE_BIAS = "maybe a scale", "maybe a bias"


@dataclasses.dataclass(frozen=True)
class Use:
    """One equation that consumes a weight."""

    primitive: str
    roles: str  # a label for each axis of the weight, '?' where the use does not say
    site: str
    context: tuple[str, ...]
    opaque: bool  # behind a gradient rule of the user's own
    blurred: bool  # not the weight itself, but something computed from it
    lookup: str = ""  # of a lookup by row: what an id beyond the table becomes
    ids: tuple[int, ...] = ()  # of a lookup: the inputs of data that make its ids
    part: str = ""
    """What a vector does there.  "norm scale": it scales what was normalised.  "norm
    bias": it is added to that.  "bias": to the product of a weight.  "late bias": to
    the sum of such a product and something else, a residual.  "layer scale": it scales
    a product, or what has a scale.  "maybe a scale", "maybe a bias": it scales, or is
    added to, something unknown.  "neutral": what any of them may go through.
    """


@dataclasses.dataclass(frozen=True)
class LeafUse:
    """What a weight is.

    kind: "linear", "conv", "embedding" (weights that methods act on), "bias", "norm",
    "matrix" (two axes, meaning unknown), "other", "unused".
    axes: a label for each axis, or None where there is a doubt; `doubt` then says why.
    tied: consumed in both directions (an embedding table that is also the head).
    changed_axes: the labels of a weight that the model changes first, element by
        element (its norm divided out, a mask); they are `axes` too, and in doubt.
    bias: of a weight, the path of the bias that is added to its product.
    late: of a bias, whether something else was added to the product before.
    of_norm: of a bias, whether it is that of a norm.
    state: whether it is kept by the model, and no optimiser trains it: a running
        statistic, a counter, a cache.
    """

    path: str
    shape: tuple[int, ...]
    kind: str = UNUSED
    axes: str | None = None
    tied: bool = False
    doubt: str = ""
    conflict: str = ""
    uses: tuple[Use, ...] = ()
    changed_axes: str | None = None
    bias: str | None = None
    late: bool = False
    of_norm: bool = False
    state: bool = False

    @property
    def is_weight(self) -> bool:
        return self.kind in WEIGHTS

    @property
    def lookup(self) -> str:
        """What ids from the table's size up become before they are looked up.

        "direct": they arrive.  "clipped", "wrapped", "shifted", "replaced": they are
        lost, at least in one lookup.  "constant": no lookup is by ids of the data.
        "": there is no lookup, or it could not be told.
        """
        found = {u.lookup for u in self.uses} - {""}
        lost = sorted(found - {"direct", "constant"})
        return next(iter([*lost, *sorted(found, reverse=True)]), "")

    def sizes(self, label: str) -> list[int]:
        assert self.axes is not None
        return [n for n, c in zip(self.shape, self.axes, strict=True) if c == label]


def traced(known: Mapping[str, LeafUse]) -> bool:
    """Whether this is what `find_uses` saw, not what names say."""
    return any(u.uses or u.kind == UNUSED for u in known.values())


class Uses(Mapping[str, LeafUse]):
    """`find_uses`' answer: path -> `LeafUse`."""

    def __init__(self, found: Mapping[str, LeafUse]):
        self._found = dict(found)

    def __getitem__(self, path: str) -> LeafUse:
        return self._found[path]

    def __iter__(self):
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def __repr__(self) -> str:
        rows = [
            f"  {u.path}  {u.shape}  {u.kind}  {u.axes or ''}"
            + ("  tied" if u.tied else "")
            + (f"  ({u.doubt or u.conflict})" if u.doubt or u.conflict else "")
            for u in self._found.values()
        ]
        return "Uses(\n" + "\n".join(rows) + "\n)"


def layouts(tree: Slots, uses: Mapping[str, LeafUse] | None) -> dict[str, LeafUse]:
    """`LeafUse` of every slot: from `uses` if given, else from its name."""
    if uses is None:
        return by_name(tree)
    out = {}
    for path, slot in tree.items():
        if not is_array(weight(slot)):
            continue
        use = _look_up(path, uses)
        shape = tuple(jnp.shape(weight(slot)))
        if use.shape != shape:
            raise ValueError(
                f"{path}: uses= was found for shape {use.shape}, the tree has {shape}; "
                "call jpeft.find_uses with the parameters you pass to the transform"
            )
        bias = use.bias and _moved_along(use.bias, use.path, path)
        out[path] = dataclasses.replace(use, path=path, bias=bias)
    return out


def _moved_along(other: str, known_as: str, path: str) -> str:
    """The path of a weight beside one that is known under another path here."""
    if known_as.endswith("/" + path):
        return other.removeprefix(known_as.removesuffix(path))
    return path.removesuffix(known_as) + other


def _look_up(path: str, uses: Mapping[str, LeafUse]) -> LeafUse:
    if path in uses:
        return uses[path]
    # find_uses(model.apply, {"params": params}, ...) with the transform on params
    # alone, or the other way round: one level above may be missing on either side.
    below = [
        p
        for p in uses
        if p.endswith("/" + path) and p.count("/") == path.count("/") + 1
    ]
    if len(below) == 1:
        return uses[below[0]]
    if "/" in path and path.split("/", 1)[1] in uses:
        return uses[path.split("/", 1)[1]]
    raise ValueError(
        f"uses= says nothing of {path!r}; nearest: {suggest(list(uses), path)}. Call "
        "jpeft.find_uses(fn, params, ...) with the parameters you pass here"
    )


# --- by name -------------------------------------------------------------------------


def state_of(tree: Slots) -> frozenset[str]:
    """The paths of what a model keeps and no optimiser trains: see `jpeft.tree.state`;
    means and deviations of the data too, by their names."""
    return frozenset(states(tree)) | frozenset(
        filter(conventions.is_statistic, tree.paths)
    )


def by_name(tree: Slots) -> dict[str, LeafUse]:
    """Flax's conventions: `kernel`, `embedding`, `bias`, `scale`, and their parents."""
    shapes = {
        keys: tuple(jnp.shape(weight(x)))
        for keys, x in zip(tree.keys, tree.values, strict=True)
        if is_array(weight(x))
    }
    paths = dict(zip(tree.keys, tree.paths, strict=True))
    found = {paths[k]: _by_name(paths[k], k, shapes) for k in shapes}
    for path in state_of(tree) & found.keys():
        if not found[path].is_weight:
            found[path] = LeafUse(path, found[path].shape, OTHER, state=True)
    for path, use in found.items():
        bias = _beside(path, use, found)
        if bias is None:
            continue
        found[path] = dataclasses.replace(use, bias=bias)
        if found[bias].kind == OTHER:
            found[bias] = dataclasses.replace(found[bias], kind=BIAS)
    return found


def _by_name(
    path: str,
    keys: tuple[str, ...],
    shapes: Mapping[tuple[str, ...], tuple[int, ...]],
) -> LeafUse:
    shape, name = shapes[keys], keys[-1] if keys else ""
    parent = keys[-2] if len(keys) > 1 else ""
    # A module with a scale and nothing larger is a norm, whatever it is called.
    beside = {k[-1].lower(): s for k, s in shapes.items() if k[:-1] == keys[:-1]}
    alone = all(len(s) <= len(shape) for s in beside.values())
    of_norm = conventions.in_norm(path) or bool(
        beside.keys() & conventions.SCALES and alone
    )
    of_norm = of_norm and not conventions.LAYER_SCALES.search(parent)

    def is_(kind: str, axes: str | None = None, doubt: str = "") -> LeafUse:
        bias_of_norm = kind == BIAS and of_norm
        return LeafUse(path, shape, kind, axes, doubt=doubt, of_norm=bias_of_norm)

    lower = name.lower()
    if conventions.is_statistic(path):
        return is_(OTHER)
    if lower in conventions.BIASES or (lower == "offset" and of_norm):
        return is_(BIAS)
    if lower in conventions.SCALES and not conventions.LAYER_SCALES.search(parent):
        return is_(NORM)
    if conventions.in_norm(path) and lower in ("weight", "w"):
        return is_(NORM)
    if len(shape) < 2 or lower in conventions.NOT_WEIGHTS:
        return is_(OTHER)
    if lower == "embedding":
        if len(shape) == 2:
            return is_(EMBEDDING, "io")
        return is_(EMBEDDING, None, f"an embedding of {len(shape)} axes")
    if conventions.POSITIONS.search(name):
        return is_(OTHER)
    if lower not in conventions.KERNELS:
        if len(shape) == 2:
            return is_(
                MATRIX, "io", f"the name {name!r} does not say whether it is linear"
            )
        return is_(
            MATRIX,
            None,
            f"neither the name {name!r} nor {len(shape)} axes say which "
            "axes are input and which are output",
        )
    conv = bool(conventions.CONVS.search(parent)) and not re.fullmatch(
        r"conv1d", parent, re.I
    )
    if conv and len(shape) > 2:
        return is_(CONV, "i" * (len(shape) - 1) + "o")
    if len(shape) == 2:
        return is_(LINEAR, "io")
    axes = _by_bias(shape, shapes.get((*keys[:-1], "bias")))
    if axes is not None:
        return is_(LINEAR, axes)
    return is_(
        LINEAR,
        None,
        f"{len(shape)} axes: a stack of layers or experts, or an input "
        "or output of several axes",
    )


def _by_bias(shape: tuple[int, ...], bias: tuple[int, ...] | None) -> str | None:
    """A kernel of several axes explained by the bias beside it, if in one way only."""
    if not bias:
        return None
    n, m = len(shape), len(bias)
    found = set()
    if n > m and shape[n - m :] == bias:  # DenseGeneral: the bias has the output axes
        found.add("i" * (n - m) + "o" * m)
    for s in range(1, m):  # s leading axes stacked in both
        outs = bias[s:]
        inputs = n - s - len(outs)
        if inputs > 0 and shape[:s] == bias[:s] and shape[n - len(outs) :] == outs:
            found.add("s" * s + "i" * inputs + "o" * len(outs))
    return found.pop() if len(found) == 1 else None


def _beside(path: str, use: LeafUse, known: Mapping[str, LeafUse]) -> str | None:
    """The bias of a weight by its name: `bias` in its module, or `b1` beside `w1`."""
    if not use.is_weight or use.kind == EMBEDDING:
        return None
    module, _, name = path.rpartition("/")
    place = f"{module}/" if module else ""
    for bias in conventions.bias_names(name):
        if (found := place + bias) in known and found != path:
            if name.lower() in conventions.KERNELS or _may_be_bias(known[found], use):
                return found
    return None


def _may_be_bias(bias: LeafUse, use: LeafUse) -> bool:
    """By its size: a bias has the last axis of its weight, or the first of one that is
    stored the other way round."""
    if bias.kind not in (BIAS, OTHER) or not bias.shape:
        return False
    return bias.shape[-1] in (use.shape[-1], use.shape[0])
