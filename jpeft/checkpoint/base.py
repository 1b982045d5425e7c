"""Which base an adapter fits.

    {path: {"shape", "dtype", "digest"}}     of every weight of the base; of a quantised
                                             one there is a digest of each array

Random keys, counters, caches and running statistics are no weights, and no part of it.
A base that differs is refused, unless a word of `load(allow=)` allows the difference;
what can still be compared then is compared.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jpeft import compat
from jpeft.boxes import PASSING, STATISTIC, unbox
from jpeft.checkpoint.digest import digests
from jpeft.checkpoint.folder import Folder
from jpeft.checkpoint.names import Names, told_by
from jpeft.leaf import KINDS, array_fields, innermost, is_leaf, layers
from jpeft.methods.quantize import ACTIVATION, Quantize
from jpeft.quant.leaf import Layout, Quantized, boxed
from jpeft.sharding.specs import place_beside
from jpeft.transform import freeze_value
from jpeft.tree.paths import Slots, is_array, slots, suggest, weight
from jpeft.tree.state import states
from jpeft.types import CheckpointError, PyTree

Fingerprint = dict[str, dict[str, Any]]
Described = list[dict[str, Any]]

# In which respect a base may differ, and what the word allows.
DTYPE, QUANTIZATION, VOCABULARY = "dtype", "quantization", "vocabulary"
EXTRA, MISSING = "extra", "missing"
WORDS = (DTYPE, QUANTIZATION, VOCABULARY, EXTRA, MISSING)


def check_words(allow: str | Iterable[str]) -> frozenset[str]:
    several = isinstance(allow, Iterable) and not isinstance(allow, str)
    words: list[Any] = list(allow) if several else [allow]
    if odd := [word for word in words if word not in WORDS]:
        raise ValueError(
            f"load: allow={odd[0]!r}: expected some of {', '.join(map(repr, WORDS))}"
        )
    return frozenset(words)


# --- what is saved of it -------------------------------------------------------------


def base_fingerprint(
    params: PyTree, only: Collection[str] | None = None
) -> Fingerprint:
    """Path, shape, dtype and digest of every weight of the base (adapted or plain
    tree).

    A leaf that trains whole has no digest: its base plays no part in the model.
    only: of these paths.
    """
    bases = base_weights(params)
    if only is not None:
        bases = {p: x for p, x in bases.items() if p in only}
    unused = {
        path
        for path, slot in slots(params).items()
        if any(x.replaces_base for x in layers(slot))
    }
    found = _digests({p: x for p, x in bases.items() if p not in unused})
    return {
        p: {"shape": list(x.shape), "dtype": str(x.dtype), "digest": found.get(p)}
        for p, x in bases.items()
    }


def base_weights(params: PyTree) -> dict[str, Any]:
    """Every weight of the base, an array or a quantised leaf, by its path."""
    flat = slots(params)
    no_weights = states(flat)
    bases = {p: unbox(innermost(x)) for p, x in flat.items() if p not in no_weights}
    return {p: x for p, x in bases.items() if is_array(x)}


class Watch:
    """A base that stays as it is while its adapter trains.

    fingerprint: of it, if it is known.
    """

    def __init__(self, fingerprint: Fingerprint | None = None):
        self.fingerprint = fingerprint
        # JAX' arrays cannot change, so the same ones need not be looked at again.
        self._same: dict[str, tuple[weakref.ref[Any] | None, ...]] = {}

    def moved(self, params: PyTree) -> set[str]:
        """The weights that are not as they were when this was first called."""
        weights = base_weights(params)
        if self.fingerprint is None:
            self.fingerprint = base_fingerprint(params)
            found: set[str] = set()
        else:
            new = {p for p, x in weights.items() if not self._is_same(p, x)}
            here = base_fingerprint(params, new) if new else {}
            found = {p for p in here if here[p] != self.fingerprint.get(p)}
        self.remember({p: x for p, x in weights.items() if p not in found})
        return found

    def remember(self, weights: Mapping[str, Any]) -> None:
        """These are as they were."""
        self._same = {
            p: tuple(
                weakref.ref(x) if isinstance(x, jax.Array) else None for x in _parts(w)
            )
            for p, w in weights.items()
        }

    def _is_same(self, path: str, weight: Any) -> bool:
        known, here = self._same.get(path, ()), _parts(weight)
        return len(known) == len(here) and all(
            ref is not None and ref() is x for ref, x in zip(known, here, strict=True)
        )


def _parts(weight: Any) -> list[Any]:
    if not is_leaf(weight):
        return [weight]
    return [unbox(x) for x in array_fields(weight).values()]


def _digests(bases: Mapping[str, Any]) -> dict[str, Any]:
    """A digest a weight; of a quantised one, {array: digest}."""
    plain = {p: x for p, x in bases.items() if not is_leaf(x)}
    found: dict[str, Any] = dict(digests(plain))
    for path, leaf in bases.items():
        if is_leaf(leaf):
            arrays = {n: unbox(x) for n, x in array_fields(leaf).items()}
            found[path] = digests(arrays)
    return found


# --- what a folder says, seen from a tree --------------------------------------------


@dataclasses.dataclass(frozen=True)
class Saved:
    """A description, by the paths of the tree that it is loaded onto.

    leaves: the adapted and quantised weights, layer by layer.  base: a fingerprint.
    statistics: shape, dtype and digest of those saved with the adapter.  passing: paths
    that were seen to be no weights.  name: the path that the folder has for one here.
    unplaced: saved paths that this tree lacks, with the word that would allow that.
    lost: the saved statistics that this tree lacks.
    """

    folder: Folder
    version: int
    leaves: dict[str, Described]
    base: Fingerprint
    statistics: dict[str, dict[str, Any]]
    passing: frozenset[str]
    name: dict[str, str]
    unplaced: dict[str, str | None]
    lost: dict[str, dict[str, Any]]

    def storage(self, path: str) -> dict[str, Any] | None:
        """How the weight was quantised, if it was."""
        described = self.leaves.get(path, ())
        return next((layer for layer in described if "holds" in layer), None)

    def grown(self, path: str, shape: tuple[int, ...]) -> int | None:
        """The one axis along which the weight here has more rows than the saved one."""
        before = self.base[path]["shape"]
        if len(before) != len(shape):
            return None
        other = [k for k, n in enumerate(shape) if n != before[k]]
        if len(other) != 1 or shape[other[0]] < before[other[0]]:
            return None
        return other[0]


def seen_from(
    folder: Folder, manifest: Mapping[str, Any], flat: Slots, names: Names = None
) -> Saved:
    """The description for the tree of `flat`, whose paths `names` translates."""
    parts = {n: dict(manifest.get(n, {})) for n in ("leaves", "base", "statistics")}
    passing = manifest.get("passing", ())
    known = {p for part in parts.values() for p in part} | set(passing)
    name = _translated(flat, known, names)
    here = {q: p for p, q in name.items()}
    seen = {
        n: {here[q]: x for q, x in v.items() if q in here} for n, v in parts.items()
    }
    gone = [q for q in parts["base"] if q not in here]
    gone += [q for q in parts["leaves"] if q not in here and q not in gone]
    no_weights = _states_of(parts["base"])
    adapted = {
        q for q, x in parts["leaves"].items() if any("holds" not in y for y in x)
    }
    unplaced = {
        q: None if q in adapted else MISSING
        for q in gone
        if q in parts["leaves"] or q not in no_weights
    }
    passing = frozenset(here[q] for q in passing if q in here)
    return Saved(
        folder,
        manifest["version"],
        **seen,
        passing=passing,
        name=name,
        unplaced=unplaced,
        lost={q: x for q, x in parts["statistics"].items() if q not in here},
    )


def _translated(flat: Slots, known: Collection[str], names: Names) -> dict[str, str]:
    """Path here -> saved path, of all that is in both."""
    paths = {p: None for p, x in flat.items() if is_array(weight(x))}
    told = told_by(names, list(paths), "load", "base_params")
    name = {}
    for p in paths:
        given = told(p)
        if given is not None and not isinstance(given, str):
            raise ValueError(
                f"load: names gives {given!r} for {p}; expected the path that it had "
                "where the adapter was saved, a string"
            )
        q = p if given is None else given
        if q in known:
            name[p] = q
    # Before two paths could read alike, a slash within a key was not marked.
    for p, keys in zip(flat.paths, flat.keys, strict=True):
        q = "/".join(keys)
        if p in paths and p not in name and q in known and q not in name.values():
            name[p] = q
    met: dict[str, str] = {}
    for p, q in name.items():
        if q in met:
            raise ValueError(
                f"load: names gives both {met[q]} and {p} the saved path {q}; an "
                "adapter goes to one weight"
            )
        met[q] = p
    return name


def _states_of(base: Fingerprint) -> dict[str, str]:
    """What is no weight in a fingerprint, by names alone."""
    keys, like = [], []
    found = {}
    for p, x in base.items():
        if x["dtype"].startswith("key<"):
            found[p] = PASSING
            continue
        keys.append(tuple(p.split("/")))
        like.append(jax.ShapeDtypeStruct(tuple(x["shape"]), jnp.dtype(x["dtype"])))
    return found | states(Slots(tuple(keys), tuple(like), None))


# --- the base as the adapter met it --------------------------------------------------


def is_kept(layer: Mapping[str, Any]) -> bool:
    """Whether this described layer is a quantised base whose arrays were saved."""
    return "holds" in layer and bool(layer["arrays"])


def as_met(saved: Saved, path: str, slot: Any, words: Collection[str]) -> Any:
    """The base in a slot as the adapter met it: quantised if it was."""
    layer = saved.storage(path)
    if layer is None:
        return slot
    if KINDS.get(layer["kind"]) is not Quantized:
        raise CheckpointError(
            f"{path}: a base of kind {layer['kind']!r}: upgrade jpeft"
        )
    if is_leaf(slot):
        same = not _other_storage(layer, slot)
        compute = layer["static"]["compute_dtype"]
        return slot.replace(compute_dtype=compute) if same else slot
    if is_kept(layer):
        if QUANTIZATION in words:
            raise CheckpointError(
                f"{saved.folder}: {path}: the adapter makes up for the rounding of "
                "codes that were searched together with it (loftq), and on another "
                f"weight it would add that again; leave {QUANTIZATION!r} out of allow="
            )
        return slot
    if QUANTIZATION in words:
        return slot
    x = weight(slot)
    before = _as_saved(x, saved.base[path]["dtype"])
    grown = saved.grown(path, tuple(x.shape)) is not None
    made = _longer(saved, path, before) if grown else _quantized(layer, before)
    made = made.replace(element=jnp.dtype(x.dtype).name)
    if not isinstance(x, jax.ShapeDtypeStruct):
        made = place_beside(made, x)
    return boxed(slot, made)  # type: ignore[arg-type]


def _quantized(
    layer: Mapping[str, Any], x: Any, *, double: bool | None = None
) -> Quantized:
    how = {k: freeze_value(v) for k, v in layer["static"].items()}
    layout = Layout(how["order"], how["stack"], how["lead"], len(how["inner"]))
    quantizer = Quantize(
        format=how["format"],
        block_size=how["block_size"],
        double="nested" in layer["holds"] if double is None else double,
        compute_dtype=how["compute_dtype"] or ACTIVATION,
    )
    make = lambda x: quantizer.of_array(x, layout).replace(origin=how["origin"])
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.eval_shape(make, x)
    return make(jnp.asarray(x))


def _longer(saved: Saved, path: str, x: Any) -> Quantized:
    """A weight that has grown, whose old part has the values of the training.

    Blocks do not depend on each other.  But nested scales are quantised across the
    matrix, so here all scales stay plain.
    """
    layer = saved.storage(path)
    assert layer is not None
    new = _quantized(layer, x, double=False)
    if isinstance(x, jax.ShapeDtypeStruct):
        return new
    before = _quantized(layer, _old_part(x, saved.base[path]["shape"]))
    old, arrays = array_fields(before.with_plain_scales()), array_fields(new)
    part = {n: _old_part(arrays[n], x.shape) for n, x in old.items()}
    if not all(_equal(old[n], part[n]) for n in old if n != "scales"):
        raise CheckpointError(
            f"{saved.folder}: {path} has grown, and in {new.format} with block_size="
            f"{new.block_size!r} its new part would change the codes of the old one; "
            f"pass allow=({QUANTIZATION!r}, {VOCABULARY!r}) for the adapter on the "
            "plain weight"
        )
    at = tuple(map(slice, old["scales"].shape))
    join: Any = lambda all, some: all.at[at].set(some)
    if (place := compat.typed_sharding(arrays["scales"])) is not None:
        join = jax.sharding.auto_axes(join, out_sharding=place)
    return new.replace(scales=join(arrays["scales"], old["scales"]))


def _equal(one: Any, two: Any) -> bool:
    return one.shape == two.shape and bool(jnp.all(one == two))


def _old_part(x: Any, shape: Sequence[int]) -> jax.Array:
    """Of an array that has grown."""
    x, part = jnp.asarray(compat.on_device(x)), tuple(map(slice, shape))
    cut: Any = lambda x: x[part]
    if (place := compat.typed_sharding(x)) is not None:
        # How rows are cut on a mesh need not fit fewer of them.
        whole = NamedSharding(place.mesh, PartitionSpec(*[None] * x.ndim))
        cut = jax.sharding.auto_axes(cut, out_sharding=whole)
    return cut(x)


def _other_storage(layer: Mapping[str, Any] | None, leaf: Any) -> str:
    """How a quantised weight here is stored otherwise than the saved one, or ""."""
    if layer is None:
        return "is quantised here, and was not where the adapter was trained"
    how = {k: freeze_value(v) for k, v in layer["static"].items()}
    names = ("format", "block_size", "order")
    pairs = {n: (getattr(leaf, n), how[n]) for n in names}
    pairs["double"] = leaf.nested is not None, "nested" in layer["holds"]
    for field, (here, saved) in pairs.items():
        if here != saved:
            return (
                f"is quantised with {field}={here!r}, the adapter was trained on "
                f"{field}={saved!r} (the plain base is quantised by load as it was)"
            )
    return ""


def _as_saved(x: Any, dtype: str | None) -> Any:
    """A wider weight rounded as the saved one was; any other as it is."""
    if dtype is None or not _is_wider(x.dtype, dtype):
        return x
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype), sharding=x.sharding)
    return jnp.asarray(compat.on_device(x)).astype(dtype)


def _is_wider(here: Any, saved: str) -> bool:
    return jnp.dtype(here).itemsize > jnp.dtype(saved).itemsize


# --- comparison ----------------------------------------------------------------------


def check_structure(
    saved: Saved, given: Slots, words: Collection[str]
) -> dict[str, int]:
    """Raises, naming the leaves, unless these are the paths, shapes, dtypes and formats
    of the base the adapter was trained on, up to what `words` allow.

    Returns the axis of every weight that has grown.
    """
    here = _weights(saved, given)
    differences = _differences(saved, given, here)
    told = [(text, word) for text, word in differences if word not in words]
    if told:
        raise CheckpointError(_refusal(saved, here, told, words))
    both = {p: tuple(x.shape) for p, x in here.items() if p in saved.base}
    grown = {p: saved.grown(p, shape) for p, shape in both.items()}
    return {p: axis for p, axis in grown.items() if axis is not None}


def check_values(saved: Saved, given: Slots, met: Slots) -> None:
    """Raises, naming the leaves, unless the weights have the values that were saved, as
    far as those here tell.

    given: the base as the caller passed it.  met: what `as_met` makes of it.
    """
    here = _weights(saved, given)
    for p, x in here.items():
        if isinstance(x, jax.ShapeDtypeStruct):
            raise ValueError(
                f"load: base_params has no values ({p} is a ShapeDtypeStruct) that "
                'could be compared; pass the arrays, or check="structure" for the '
                "adapters over these shapes"
            )
    wrong = _other_values(saved, here, {p: weight(x) for p, x in met.items()})
    if wrong:
        raise CheckpointError(
            f"{saved.folder}: trained on another base: "
            f"{_some([f'{p} has other values' for p in wrong])}. Pass the base it was "
            'trained on (check="structure" skips the comparison of values)'
        )


def _weights(saved: Saved, given: Slots) -> dict[str, Any]:
    """What is compared: every weight here, by its path."""
    no_weights = states(given) | dict.fromkeys(saved.passing, PASSING)
    out = {}
    for path, slot in given.items():
        if not is_array(weight(slot)) or path in saved.statistics:
            continue
        # Statistics of a fingerprint were not saved with the adapter.
        own = path in saved.base and no_weights.get(path) == STATISTIC
        if path in saved.leaves or own or path not in no_weights:
            out[path] = weight(slot)
    return out


def _differences(
    saved: Saved, given: Slots, here: Mapping[str, Any]
) -> Iterator[tuple[str, str | None]]:
    """What differs beside the values, with the word that would allow it."""
    for q, word in saved.unplaced.items():
        yield f"{q} is missing", word
    for p, x in here.items():
        if p not in saved.base:
            yield f"{p} is not in the saved base", EXTRA
            continue
        yield from _array_differs(saved.base[p], p, x, saved.grown(p, tuple(x.shape)))
        if is_leaf(x) and (how := _other_storage(saved.storage(p), x)):
            yield f"{p} {how}", QUANTIZATION
    for p, slot in given.items():
        if p in saved.statistics:
            yield from _array_differs(saved.statistics[p], p, weight(slot), None)


def _array_differs(
    saved: Mapping[str, Any], path: str, x: Any, grown: int | None
) -> Iterator[tuple[str, str | None]]:
    shape, dtype = list(x.shape), str(x.dtype)
    if shape != saved["shape"]:
        word = None if grown is None else VOCABULARY
        yield f"{path} has shape {shape}, saved was {saved['shape']}", word
    if dtype != saved["dtype"]:
        word = DTYPE if _kind(dtype) == _kind(saved["dtype"]) != "" else None
        yield f"{path} has dtype {dtype}, saved was {saved['dtype']}", word


def _kind(dtype: str) -> str:
    """Among which dtypes a value keeps its meaning."""
    if not dtype.startswith("key<"):
        for kind in (jnp.floating, jnp.integer, jnp.complexfloating):
            if jnp.issubdtype(jnp.dtype(dtype), kind):
                return kind.__name__
    return ""


def _refusal(
    saved: Saved,
    here: Mapping[str, Any],
    told: Sequence[tuple[str, str | None]],
    words: Collection[str],
) -> str:
    text = f"{saved.folder}: trained on another base: {_some([t for t, _ in told])}. "
    needed = {word for _, word in told}
    every = sorted({*needed, *words} - {None}, key=WORDS.index)  # type: ignore[arg-type]
    allow = f"allow={every[0]!r}" if len(every) == 1 else f"allow={tuple(every)!r}"
    extra = [p for p in here if p not in saved.base]
    if saved.unplaced and extra:
        advice = "If only the paths differ, "
        if renamed := _renamed(list(saved.unplaced), extra):
            advice += f"pass names={{{renamed}}}"
        else:
            near = suggest(extra, next(iter(saved.unplaced)))
            advice += f"say so in names={{path here: saved path}}; nearest here: {near}"
        if None not in needed:
            advice += f". If these are other weights, pass {allow}"
        return text + advice
    if None in needed:
        return text + "Pass the base it was trained on"
    return text + f"If it is the same model otherwise, pass {allow}"


def _renamed(saved: Sequence[str], here: Sequence[str]) -> str:
    """An entry of names= by which every saved path is found, if a level more or less
    is all that differs."""
    first = saved[0]
    for p in here:
        if p.endswith("/" + first):
            level = p.removesuffix(first)
            if all(level + q in here for q in saved):
                return f"r'{level}(.*)': r'\\1'"
        if first.endswith("/" + p):
            level = first.removesuffix(p)
            if all(q.removeprefix(level) in here for q in saved):
                return f"'(.*)': r'{level}\\1'"
    return ""


def _other_values(
    saved: Saved, given: Mapping[str, Any], met: Mapping[str, Any]
) -> list[str]:
    """The paths whose values are not those saved, as far as this base can tell."""
    found: dict[str, Any] = {}
    as_it_is: dict[str, Any] = {}
    for p, x in given.items():
        if p not in saved.base or _tells_nothing(saved, p, x):
            continue
        told, shape = saved.base[p]["digest"], tuple(saved.base[p]["shape"])
        dtype, quantized = saved.base[p]["dtype"], isinstance(told, dict)
        same = shape == tuple(x.shape)
        if same and quantized and is_leaf(met[p]):
            as_it_is[p] = met[p]
        elif same and not quantized and str(x.dtype) == dtype:
            as_it_is[p] = x
        else:  # what is made for this is dropped before the next one is made
            x = _as_saved(x if same else _old_part(x, shape), dtype)
            layer = saved.storage(p)
            x = _quantized(layer, x) if quantized and layer is not None else x
            found |= _digests({p: x})
    found |= _digests(as_it_is)
    return [p for p, digest in found.items() if digest != saved.base[p]["digest"]]


def _tells_nothing(saved: Saved, path: str, x: Any) -> bool:
    """Whether the values here cannot tell anything about the saved ones."""
    told, dtype = saved.base[path]["digest"], saved.base[path]["dtype"]
    layer = saved.storage(path)
    if told is None:
        return True  # it plays no part
    if layer is not None and is_kept(layer) and not is_leaf(x):
        return True  # compared when the codes are read
    if is_leaf(x):
        same = list(x.shape) == saved.base[path]["shape"] and str(x.dtype) == dtype
        return not same or bool(_other_storage(layer, x))
    return str(x.dtype) != dtype and not _is_wider(x.dtype, dtype)


def _some(items: Sequence[str], most: int = 4) -> str:
    more = f"; and {len(items) - most} more" if len(items) > most else ""
    return "; ".join(items[:most]) + more
