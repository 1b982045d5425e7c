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

from jpeft.tree.paths import Slots, is_array, suggest, weight

LINEAR, CONV, EMBEDDING = "linear", "conv", "embedding"
BIAS, NORM, MATRIX = "bias", "norm", "matrix"
OTHER, UNUSED = "other", "unused"
WEIGHTS = frozenset({LINEAR, CONV, EMBEDDING, MATRIX})


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


@dataclasses.dataclass(frozen=True)
class LeafUse:
    """What a weight is.

    kind: "linear", "conv", "embedding" (weights that methods act on), "bias", "norm",
    "matrix" (two axes, meaning unknown), "other", "unused".
    axes: a label for each axis, or None where there is a doubt; `doubt` then says why.
    tied: consumed in both directions (an embedding table that is also the head).
    changed_axes: the labels of a weight that the model changes first, element by
        element (its norm divided out, a mask), which is a doubt for what acts on axes.
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
        out[path] = dataclasses.replace(use, path=path)
    return out


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

_KERNELS = {"kernel", "w", "weight", "weights"}
_NOT_WEIGHTS = {"bias", "b", "scale", "gamma", "beta", "mean", "var", "cls", "count"}
_POSITIONS = re.compile(r"pos|cls|dist|token$|query_tokens|latents|probe|mask", re.I)
_NORMS = re.compile(r"(norm|^ln|_ln|ln_|layernorm|^bn|batchnorm)", re.I)
_CONVS = re.compile(r"conv", re.I)


def in_norm(path: str) -> bool:
    """Whether the module that holds this array is a normalisation, by its name."""
    module = path.split("/")[-2:-1]
    return bool(module and _NORMS.search(module[0]))


def by_name(tree: Slots) -> dict[str, LeafUse]:
    """Flax's conventions: `kernel`, `embedding`, `bias`, `scale`, and their parents."""
    shapes = {
        keys: tuple(jnp.shape(weight(x)))
        for keys, x in zip(tree.keys, tree.values, strict=True)
        if is_array(weight(x))
    }
    paths = dict(zip(tree.keys, tree.paths, strict=True))
    return {paths[k]: _by_name(paths[k], k, shapes) for k in shapes}


def _by_name(
    path: str,
    keys: tuple[str, ...],
    shapes: Mapping[tuple[str, ...], tuple[int, ...]],
) -> LeafUse:
    shape, name = shapes[keys], keys[-1] if keys else ""
    parent = keys[-2] if len(keys) > 1 else ""
    of_norm = in_norm(path)

    def is_(kind: str, axes: str | None = None, doubt: str = "") -> LeafUse:
        return LeafUse(path, shape, kind, axes, doubt=doubt)

    lower = name.lower()
    if lower in ("bias", "b", "beta"):
        return is_(BIAS)
    if lower in ("scale", "gamma") or (of_norm and lower in ("weight", "w")):
        return is_(NORM)
    if len(shape) < 2 or lower in _NOT_WEIGHTS:
        return is_(OTHER)
    if lower == "embedding":
        if len(shape) == 2:
            return is_(EMBEDDING, "io")
        return is_(EMBEDDING, None, f"an embedding of {len(shape)} axes")
    if _POSITIONS.search(name):
        return is_(OTHER)
    if lower not in _KERNELS:
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
    conv = bool(_CONVS.search(parent)) and not re.fullmatch(r"conv1d", parent, re.I)
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
