"""`save` and `load`: the adapter alone, with a description of itself and of its base.

    folder/jpeft.json   what it is: format, versions, transform, every leaf, the base
    folder/arrays/      the adapter's arrays, by Orbax

The description is enough to attach the adapter to its base again; no code of the
training run is needed.  Each array has a digest, because Orbax itself loads flipped
bits without a word, and the base has one for every leaf, so that another base is
refused.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from jpeft.adapt.labels import R
from jpeft.boxes import STATISTIC, same_box, unbox
from jpeft.checkpoint import _orbax
from jpeft.checkpoint.base import (
    Fingerprint,
    Saved,
    as_met,
    base_fingerprint,
    check_structure,
    check_values,
    check_words,
    is_kept,
    seen_from,
)
from jpeft.checkpoint.digest import digests
from jpeft.checkpoint.folder import Fill, Folder, find_folder, location, write_folder
from jpeft.checkpoint.manifest import (
    ADAPTER,
    ARRAYS,
    FORMAT,
    VERSION,
    check_sizes,
    read_manifest,
    step_number,
)
from jpeft.checkpoint.names import Names
from jpeft.checkpoint.places import Place, Told, placed_by
from jpeft.checkpoint.processes import check_alike
from jpeft.checkpoint.sealed import metadata_of, seal
from jpeft.checks import check_flag
from jpeft.leaf import (
    KINDS,
    STATIC,
    TRAINABLE,
    AdaptedLeaf,
    StoredWeight,
    array_fields,
    box_of,
    boxed_like,
    check_whole,
    field_axes,
    innermost,
    is_leaf,
    is_stored,
    layers,
    roles,
    title,
)
from jpeft.methods.quantize import Quantize
from jpeft.quant.leaf import Quantized, boxed
from jpeft.sharding.specs import beside, place_of
from jpeft.transform import Transform, freeze_value, transform_from_config
from jpeft.tree.describe import is_adapted
from jpeft.tree.partition import NOTHING_TRAINS
from jpeft.tree.paths import slots, weight
from jpeft.tree.state import states
from jpeft.types import CheckpointError, DamagedError, PyTree, __version__


def save(
    path: str | os.PathLike[str],
    params: PyTree,
    transform: Transform,
    *,
    step: int | None = None,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    statistics: bool = True,
    fingerprint: Fingerprint | None = None,
) -> None:
    """Writes the adapter's arrays and what they are into the folder `path`.

    params: an adapted tree.  transform: what adapted it; kept as a configuration.
    metadata: anything JSON can hold.  overwrite: replace an adapter that is there.
    statistics: also running means and variances, which move while the adapter trains;
    without them, `load` leaves those of its base.
    fingerprint: of the base, if `base_fingerprint` was called before.

    The folder appears whole or not at all, and is on the disk when this returns; an
    `overwrite` is one exchange.  A symbolic link is followed.  path: also of an object
    store, `gs://...`, with the package gcsfs.

    Raises ValueError if nothing is adapted or by another transform, FileExistsError if
    the folder exists, CheckpointError if it is no adapter's or the disk refuses it.

    >>> import pathlib, tempfile, jax, jax.numpy as jnp, jpeft
    >>> base, peft = {"kernel": jnp.ones((5, 3))}, jpeft.lora(rank=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     jpeft.save(f"{folder}/run", peft(jax.random.key(0), base), peft, step=7)
    ...     sorted(x.name for x in pathlib.Path(folder, "run").iterdir())
    ['arrays', 'jpeft.json']
    """

    check_flag("save", "overwrite", overwrite)
    check_flag("save", "statistics", statistics)

    def make() -> tuple[Fill, str]:
        described = describe(params, transform, fingerprint, statistics)
        number = None if step is None else step_number(step)
        return filled(*described, step=number, metadata=metadata)

    write_folder(path, ADAPTER, make, overwrite=overwrite)


def filled(
    manifest: Mapping[str, Any],
    arrays: Mapping[str, Any],
    *,
    step: int | None,
    metadata: Mapping[str, Any] | None,
) -> tuple[Fill, str]:
    """What writes the arrays into a folder, and the text of its description."""
    check_alike(arrays)
    text = seal({**manifest, "step": step, "metadata": metadata_of(metadata)})
    return lambda place: _orbax.write(place / ARRAYS, arrays), text


def load(
    path: str | os.PathLike[str],
    base_params: PyTree,
    *,
    shardings: Any = None,
    check: str = "content",
    allow: str | Iterable[str] = (),
    names: Names = None,
) -> PyTree:
    """The adapted tree: the adapter in `path` on the base it was trained on.

    base_params: the plain base.  Weights that were quantised for the training are
    quantised again in the same way, or may come quantised, as `unload` leaves them.
    Codes that the plain base does not give (`loftq` with several steps) are in the
    checkpoint; the base must be nearer to their values than zero is.  Random keys,
    counters and caches may be any, or missing.  Running statistics come back as they
    were saved.
    shardings: of the adapter's arrays, one `Sharding` for all or a tree as
    `jpeft.sharding.shardings` gives; None puts each beside its base.
    check: "content" compares a digest of every weight, "structure" only paths, shapes
    and dtypes; with it the base may be of `jax.ShapeDtypeStruct`.
    allow: in which respects the base may differ, one word or several:
        "dtype"         other dtypes of the same kind; the adapter's arrays keep theirs
        "quantization"  the base stays as it is passed: a plain one under an adapter
                        that was trained on a quantised one, or the other way round
        "vocabulary"    weights that were made longer along one axis: rows of an
                        embedding, columns of a head.  An adapter on one of them changes
                        nothing of what is new
        "extra"         weights that the saved base did not have
        "missing"       weights that are not there, none of them adapted
    Values are compared where the base still tells them: a wider dtype by rounding it,
    what was quantised by quantising it, a longer weight by its old part.
    names: what the weights were called where the adapter was saved: a dict from paths
    here, or regular expressions for whole paths, to saved paths, which may hold the
    expression's groups; or a function of the path.

    Raises CheckpointError, naming the leaf and the word that would allow it, for
    another base, a missing, misshapen or damaged array, a truncated folder; ValueError
    for shardings of other arrays, and for `names` that fit no path.

    >>> import tempfile, jax, jax.numpy as jnp, jpeft
    >>> base, peft = {"kernel": jnp.ones((5, 3))}, jpeft.lora(rank=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     jpeft.save(f"{folder}/run", peft(jax.random.key(0), base), peft)
    ...     params = jpeft.load(f"{folder}/run", base)
    >>> params["kernel"].rank
    2
    """
    if check not in ("content", "structure"):
        raise ValueError(f'load: check={check!r}: expected "content" or "structure"')
    words, content = check_words(allow), check == "content"
    folder = find_folder(location(path))
    manifest = read_manifest(folder)
    if is_adapted(base_params):
        raise ValueError(
            "load: base_params carries adapters already; pass the base, "
            "jpeft.unload(params)"
        )
    given = slots(base_params)
    saved = seen_from(folder, manifest, given, names)
    grown = check_structure(saved, given, words)
    met = dataclasses.replace(
        given, values=tuple(as_met(saved, p, x, words) for p, x in given.items())
    )
    if content:
        check_values(saved, given, met)
    at = dict(met.items())
    arrays = _Arrays(saved, at, grown, placed_by(shardings))
    arrays.read(folder / ARRAYS)
    made = {}
    for p, described in saved.leaves.items():
        # What stands in for a plain weight here, codes and all.
        if is_kept(described[-1]) and not is_leaf(at[p]):
            if p in grown:
                raise CheckpointError(_not_grown(saved, p, "Quantized", grown[p]))
            fields = arrays.of(p, len(described) - 1)
            at[p] = _kept_base(folder, p, described[-1], at[p], fields, content)
        made[p] = _rebuild(saved, p, at[p], arrays)
    for p in saved.statistics:
        made[p] = same_box(at[p], arrays.statistic(p))
    return met.rebuild(made.get(p, x) for p, x in met.items())


def read_transform(path: str | os.PathLike[str]) -> Transform:
    """The transform of a saved adapter: what `save` was given.

    Tells what the adapter asks of its callers, such as `virtual_tokens()`, without the
    base.  Raises CheckpointError for what is no adapter's folder, ValueError for a
    transform that chose its weights by a Python function, which is not in the file.

    >>> import tempfile, jax, jax.numpy as jnp, jpeft
    >>> base, peft = {"kernel": jnp.ones((5, 3))}, jpeft.lora(rank=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     jpeft.save(f"{folder}/run", peft(jax.random.key(0), base), peft)
    ...     jpeft.read_transform(f"{folder}/run") == peft
    True
    """
    folder = find_folder(location(path))
    described = read_manifest(folder)["transform"]
    try:
        return transform_from_config(described)
    except ValueError as error:
        raise ValueError(
            f"{folder}: its transform cannot be made again from the file ({error}); "
            "one that chose its weights by a Python function is only in the program "
            "that made it"
        ) from error


# --- the description -----------------------------------------------------------------


def describe(
    params: PyTree,
    transform: Transform,
    fingerprint: Fingerprint | None = None,
    statistics: bool = True,
    also: Collection[str] = (),
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(manifest, {name: array}) of an adapted tree.

    also: paths without an adapter that are saved as statistics are.
    """
    flat = slots(params)
    adapted = {p: x for p, x in flat.items() if is_leaf(x)}
    for path, x in adapted.items():
        check_whole(x, path, "save")
    if not is_adapted(params):
        raise ValueError("save: " + NOTHING_TRAINS)
    _check_origin(adapted, transform)
    arrays: dict[str, Any] = {}
    leaves: dict[str, list[dict[str, Any]]] = {}
    for path, leaf in adapted.items():
        leaves[path] = []
        for k, layer in enumerate(layers(leaf)):
            fields = {n: unbox(x) for n, x in array_fields(layer).items()}
            about: dict[str, Any] = {
                "kind": type(layer).__name__,
                "static": {
                    n: getattr(layer, n)
                    for n, role in roles(layer).items()
                    if role == STATIC and n != "path"
                },
                "arrays": {},
            }
            if is_stored(layer):
                about["holds"] = sorted(fields)
            # A base's arrays are not written if its weight gives them.
            if not isinstance(layer, StoredWeight) or layer.keeps_arrays:
                about["arrays"] = {n: _about(x) for n, x in fields.items()}
                arrays |= {array_name(path, k, n): x for n, x in fields.items()}
            leaves[path].append(about)
    at, kinds = dict(flat.items()), states(flat)
    moved = {
        p: unbox(at[p])
        for p in at
        if p in also or (statistics and kinds.get(p) == STATISTIC)
        if unbox(at[p]).size
    }
    arrays |= {array_name(p, *_OF_STATISTIC): x for p, x in moved.items()}
    found = digests(arrays)
    for path, described in leaves.items():
        for k, layer in enumerate(described):
            for n, array in layer["arrays"].items():
                array["digest"] = found[array_name(path, k, n)]
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "jpeft": __version__,
        "jax": jax.__version__,
        "transform": transform.describe(),
        "leaves": leaves,
        "base": fingerprint or base_fingerprint(params),
        "statistics": {
            p: _about(x) | {"digest": found[array_name(p, *_OF_STATISTIC)]}
            for p, x in moved.items()
        },
        # For trees whose boxes or names do not mark them.
        "passing": [p for p in kinds if p not in moved],
    }
    return manifest, arrays


def _about(x: Any) -> dict[str, Any]:
    return {"shape": list(x.shape), "dtype": str(x.dtype)}


def _check_origin(adapted: Mapping[str, AdaptedLeaf], transform: Transform) -> None:
    known = transform.origins()
    for path, leaf in adapted.items():
        for layer in layers(leaf):
            if layer.origin not in known and not is_stored(layer):
                raise ValueError(
                    f"save: {path} was adapted by {layer.origin or 'hand'}, not by the "
                    f"transform given ({', '.join(sorted(known))}); pass the transform "
                    "that made this tree"
                )
    bases = map(innermost, adapted.values())
    stored = {(x.format, x.block_size) for x in bases if isinstance(x, Quantized)}
    for t in transform.parts():
        if isinstance(t, Quantize) and (t.format, t.block_size) not in stored:
            raise ValueError(
                f"save: the transform given quantises to {t.format} with block_size="
                f"{t.block_size!r}, and no weight of this tree is stored so; pass the "
                "transform that made this tree"
            )


_OF_STATISTIC = 0, "statistic"


def array_name(path: str, layer: int, field: str, version: int = VERSION) -> str:
    """A name for Orbax, which joins and splits keys at '.' and '/'."""
    safe = path.replace("%", "%25").replace(".", "%2E")
    # In version 1 'a:b' and 'a/b' had the same name.
    safe = safe if version == 1 else safe.replace(":", "%3A")
    return f"{safe.replace('/', ':')}:{layer}:{field}"


# --- reading -------------------------------------------------------------------------


def adapters(described: list[Any]) -> list[Any]:
    """The described layers without the one that is a quantised base."""
    return [layer for layer in described if "holds" not in layer]


def _kept_base(
    folder: Folder,
    path: str,
    layer: Mapping[str, Any],
    slot: Any,
    arrays: Mapping[str, Any],
    content: bool,
) -> Any:
    """The quantised base that was saved, in place of the weight in a slot."""
    static = {n: freeze_value(x) for n, x in layer["static"].items()}
    leaf, w = Quantized(**arrays, **static), jnp.asarray(weight(slot), jnp.float32)
    norm = lambda x: float(jnp.sum(jnp.square(x)))
    if content and not norm(leaf.materialize(jnp.float32) - w) <= norm(w):
        raise CheckpointError(
            f"{folder}: trained on another base: {path} is farther from the quantised "
            "weight that was saved than zero is. Pass the base it was trained on "
            '(check="structure" skips the comparison of values)'
        )
    return boxed(slot, leaf)


def _kind(path: str, layer: Mapping[str, Any]) -> type[AdaptedLeaf]:
    if layer["kind"] not in KINDS:
        raise CheckpointError(
            f"{path}: a leaf of kind {layer['kind']!r}, which this jpeft does not know "
            f"(it knows {sorted(KINDS)}); import the module that defines it, or upgrade"
        )
    return KINDS[layer["kind"]]


def _made(
    path: str, layer: Mapping[str, Any], base: Any, fields: Mapping[str, Any]
) -> AdaptedLeaf:
    """A described layer over `base`, of these arrays or shapes."""
    kind = _kind(path, layer)
    expected = {
        f.name
        for f in dataclasses.fields(kind)
        if f.metadata["role"] == TRAINABLE and f.default is dataclasses.MISSING
    }
    if missing := sorted(expected - set(fields)):
        raise CheckpointError(
            f"{path}: the saved {layer['kind']} lacks {', '.join(missing)}"
        )
    static = {n: freeze_value(x) for n, x in layer["static"].items()}
    base = None if issubclass(kind, StoredWeight) else base
    try:
        return kind(base=base, **static, **fields)
    except (
        Exception
    ) as error:  # a class may raise anything for fields that it cannot have
        raise CheckpointError(
            f"{path}: the saved {layer['kind']} is none that this jpeft can make: "
            f"{error}"
        ) from error


def _rebuild(saved: Saved, path: str, slot: Any, arrays: _Arrays) -> Any:
    leaf = slot
    described = adapters(saved.leaves[path])
    for k in reversed(range(len(described))):
        made = _made(path, described[k], leaf, arrays.of(path, k))
        check_shapes(path, made, tuple(saved.base[path]["shape"]))
        if path in arrays.grown:
            made = arrays.placed(path, k, _grown(saved, path, made, arrays.grown[path]))
        leaf = boxed_like(box_of(slot), made)
    return leaf


def _grown(saved: Saved, path: str, leaf: AdaptedLeaf, axis: int) -> AdaptedLeaf:
    if isinstance(innermost(leaf), jax.ShapeDtypeStruct):
        raise ValueError(
            f"load: base_params has no values, and {path} has grown; pass the arrays"
        )
    more = leaf.grown(axis)
    if more is None:
        raise CheckpointError(_not_grown(saved, path, title(leaf), axis))
    return more


def _not_grown(saved: Saved, path: str, title: str, axis: int) -> str:
    return (
        f"{saved.folder}: {path} has grown along axis {axis}, and the {title} that was "
        "saved knows nothing of new rows; load it onto the base that it was trained "
        "on, jpeft.merge it, and append the rows then"
    )


def check_shapes(path: str, leaf: AdaptedLeaf, shape: tuple[int, ...]) -> None:
    """Raises if an array does not fit the weight it stands beside."""
    labels = leaf.labels()
    own: dict[Any, set[int]] = {}
    for field, axes in field_axes(leaf).items():
        x = getattr(leaf, field)
        want = tuple(
            n if k is None else shape[k] for k, n in zip(axes, x.shape, strict=False)
        )
        if len(axes) != len(x.shape) or want != tuple(x.shape):
            raise CheckpointError(
                f"{path}/{field}: shape {tuple(x.shape)} does not fit a weight of "
                f"shape {shape}"
            )
        for label, n in zip(labels[field], x.shape, strict=False):
            if label is not None and not isinstance(label, int):
                own.setdefault("rank" if label == R else label, set()).add(n)
    for label, sizes in own.items():
        if len(sizes) > 1:
            raise CheckpointError(
                f"{path}: its arrays disagree on the {label}: {sorted(sizes)}"
            )


# --- the arrays ----------------------------------------------------------------------


class _Arrays:
    """The arrays of a folder, each with the sharding asked for, or beside its base."""

    def __init__(
        self, saved: Saved, at: Mapping[str, Any], grown: Mapping[str, int], told: Told
    ):
        self.saved, self.at, self.grown, self.told = saved, at, grown, told
        # (path here, layer, field) -> shape, dtype and digest
        self.about: dict[Place, dict[str, Any]] = {
            (p, k, field): array
            for p, described in saved.leaves.items()
            for k, layer in enumerate(described)
            for field, array in layer["arrays"].items()
        }
        self.about |= {(p, *_OF_STATISTIC): x for p, x in saved.statistics.items()}
        self.found: dict[Place, Any] = {}
        if told.names() and not any(told.of(*place) for place in self.about):
            p, _, field = next(iter(self.about))
            raise ValueError(
                f"load: shardings= has {told.names()[:2]} and none of the adapter's "
                f"arrays, such as {p}/{field}; pass one Sharding, or the tree that "
                "jpeft.sharding.shardings(params, base_shardings) gives"
            )

    def read(self, folder: Folder) -> None:
        """Reads all of them; raises CheckpointError, naming the leaf, unless they have
        the bits that were saved."""
        names = {place: self._name(place) for place in self.about}
        places = self._places()
        like = {
            names[place]: jax.ShapeDtypeStruct(
                tuple(array["shape"]),
                jnp.dtype(array["dtype"]),
                sharding=places.get(place),
            )
            for place, array in self.about.items()
        }
        check_sizes(self.saved.folder, self.saved.leaves, self.saved.base)
        self._check_fit()  # before memory is asked for
        spelled = {name: f"{p}/{field}" for (p, _, field), name in names.items()}
        arrays = _orbax.read(folder, like, spelled.__getitem__)
        found = digests(arrays)
        for place, array in self.about.items():
            if found[names[place]] != array["digest"]:
                p, _, field = place
                raise DamagedError(
                    f"{self.saved.folder}: {p}/{field} is damaged: its bits differ "
                    "from those saved"
                )
        # JAX may move what was read into the host's memory, as it may move the base.
        self.found = {place: jnp.asarray(arrays[name]) for place, name in names.items()}

    def _check_fit(self) -> None:
        for p, described in self.saved.leaves.items():
            for layer in adapters(described):
                made = _made(p, layer, weight(self.at[p]), _shapes(layer))
                check_shapes(p, made, tuple(self.saved.base[p]["shape"]))

    def of(self, path: str, layer: int) -> dict[str, Any]:
        fields = self.saved.leaves[path][layer]["arrays"]
        return {n: self.found[path, layer, n] for n in fields}

    def statistic(self, path: str) -> jax.Array:
        x = self.found[path, *_OF_STATISTIC]
        return x.astype(weight(self.at[path]).dtype)

    def placed(self, path: str, layer: int, leaf: AdaptedLeaf) -> AdaptedLeaf:
        """A leaf whose arrays have grown after they were read."""
        arrays, of_base = array_fields(leaf), beside(leaf, weight(self.at[path]))
        places = {n: self.told.of(path, layer, n) or of_base.get(n) for n in arrays}
        put = lambda x, place: x if place is None else jax.device_put(x, place)
        return leaf.replace(**{n: put(arrays[n], p) for n, p in places.items()})

    def _name(self, place: Place) -> str:
        path, layer, field = place
        stored = self.saved.name[path]
        return array_name(stored, layer, field, self.saved.version)

    def _places(self) -> dict[Place, Sharding]:
        """The shardings with which arrays are read.  Other arrays, and those that will
        grow, are read into the host's memory."""
        found: dict[Place, Sharding] = {}
        for p, described in self.saved.leaves.items():
            for k, layer in enumerate(described):
                of_base = _beside(p, layer, weight(self.at[p]))
                for field in layer["arrays"]:
                    place = self.told.of(p, k, field) or of_base.get(field)
                    if place is not None and p not in self.grown:
                        found[p, k, field] = place
        for p in self.saved.statistics:
            place = self.told.plain.get(p, self.told.every) or _own_place(self.at[p])
            if place is not None:
                found[p, *_OF_STATISTIC] = place
        return found


def _own_place(slot: Any) -> Sharding | None:
    place = place_of(weight(slot))
    return place and weight(slot).sharding


def _beside(path: str, layer: Mapping[str, Any], base: Any) -> dict[str, Sharding]:
    """The sharding of each array of a described layer over this base."""
    shapes = _shapes(layer)
    return beside(_made(path, layer, base, shapes), base) if shapes else {}


def _shapes(layer: Mapping[str, Any]) -> dict[str, Any]:
    return {
        n: jax.ShapeDtypeStruct(tuple(x["shape"]), jnp.dtype(x["dtype"]))
        for n, x in layer["arrays"].items()
    }
