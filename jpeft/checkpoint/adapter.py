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
import json
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, Sharding

from jpeft.adapt.labels import Labelled, R
from jpeft.boxes import unbox
from jpeft.checkpoint import _orbax
from jpeft.checkpoint.digest import digests
from jpeft.leaf import (
    KINDS,
    STATIC,
    TRAINABLE,
    AdaptedLeaf,
    array_fields,
    box_of,
    boxed_like,
    check_whole,
    innermost,
    is_leaf,
    layers,
    leaf_specs,
    roles,
    whole_shards,
)
from jpeft.methods.quantize import ACTIVATION, Quantize
from jpeft.quant.leaf import Layout, Quantized, boxed
from jpeft.transform import Transform, freeze_value, is_adapted, place_beside
from jpeft.tree.paths import Slots, is_array, segment, slots, suggest, weight
from jpeft.tree.split import NOTHING_TRAINS
from jpeft.types import CheckpointError, PyTree, __version__

FORMAT, VERSION = "jpeft-adapter", 1
MANIFEST, ARRAYS = "jpeft.json", "arrays"
Fingerprint = dict[str, dict[str, Any]]


def save(
    path: str | os.PathLike[str],
    params: PyTree,
    transform: Transform,
    *,
    step: int | None = None,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    fingerprint: Fingerprint | None = None,
) -> None:
    """Writes the adapter's arrays and what they are into the folder `path`.

    params: an adapted tree.  transform: what adapted it; kept as a configuration.
    metadata: anything JSON can hold.  overwrite: replace an adapter that is there.
    fingerprint: of the base, if `base_fingerprint` was called before.

    The folder appears whole or not at all.  Raises ValueError if nothing is adapted or
    by another transform, FileExistsError if the folder exists.
    """
    target = Path(path)
    if target.exists() and not overwrite:
        raise FileExistsError(
            f"{target} exists; choose another folder or pass overwrite=True"
        )
    manifest, arrays = describe(params, transform, fingerprint)
    manifest |= {"step": step, "metadata": dict(metadata or {})}
    text = json.dumps(manifest, indent=1)

    def fill(folder: Path) -> None:
        _orbax.write(folder / ARRAYS, arrays)
        if jax.process_index() == 0:
            (folder / MANIFEST).write_text(text)

    whole_folder(target, fill)


def load(
    path: str | os.PathLike[str],
    base_params: PyTree,
    *,
    shardings: Any = None,
    check: str = "content",
) -> PyTree:
    """The adapted tree: the adapter in `path` on the base it was trained on.

    base_params: the plain base.  Weights that were quantised for the training are
    quantised again in the same way, or may come quantised, as `unload` leaves them.
    Codes that the plain base does not give (`loftq` with several steps) are in the
    checkpoint; the base must be nearer to their values than zero is.
    shardings: of the adapter's arrays, one `Sharding` for all or a tree as
    `jpeft.sharding.shardings` gives; None puts each beside its base.
    check: "content" compares a digest of every base leaf, "structure" only paths,
    shapes and dtypes.

    Raises CheckpointError, naming the leaf, for another base, a missing, misshapen or
    damaged array, a truncated folder; ValueError for shardings of other arrays.
    """
    if check not in ("content", "structure"):
        raise ValueError(f'load: check={check!r}: expected "content" or "structure"')
    folder = Path(path)
    manifest = read_manifest(folder)
    if is_adapted(base_params):
        raise ValueError(
            "load: base_params carries adapters already; pass the base, "
            "jpeft.unload(params)"
        )
    flat = slots(base_params)
    flat = dataclasses.replace(
        flat,
        values=tuple(
            quantized_again(manifest["leaves"], p, x) for p, x in flat.items()
        ),
    )
    at = dict(flat.items())
    # What stands in for a plain weight here, codes and all.
    kept = {
        p: described[-1]
        for p, described in manifest["leaves"].items()
        if is_kept(described[-1]) and p in at and not is_leaf(at[p])
    }
    content = check == "content"
    compare_bases(folder, manifest["base"], flat, content=content, kept=kept)
    wanted = dict(_shardings(shardings))
    abstract: dict[str, jax.ShapeDtypeStruct] = {}
    for leaf_path, described in manifest["leaves"].items():
        base = weight(at[leaf_path])
        for k, layer in enumerate(described):
            specs = _sharding_beside(layer, base)
            for field, array in layer["arrays"].items():
                place = wanted.get(f"{leaf_path}/{field}", wanted.get(""))
                abstract[_name(leaf_path, k, field)] = jax.ShapeDtypeStruct(
                    tuple(array["shape"]),
                    jnp.dtype(array["dtype"]),
                    sharding=place or specs.get(field) or _one_device(),
                )
    own = [
        f"{p}/{field}"
        for p, described in manifest["leaves"].items()
        for layer in described
        for field in layer["arrays"]
    ]
    if wanted and not set(own) & set(wanted) and "" not in wanted:
        raise ValueError(
            f"load: shardings= has {list(wanted)[:2]} and none of the adapter's "
            f"arrays, such as {own[0]}; pass one Sharding, or the tree that "
            "jpeft.sharding.shardings(params, base_shardings) gives"
        )
    arrays = _orbax.read(folder / ARRAYS, abstract)
    check_digests(folder, manifest, arrays)
    for p, layer in kept.items():
        k = len(manifest["leaves"][p]) - 1
        fields = {n: arrays[_name(p, k, n)] for n in layer["arrays"]}
        at[p] = _kept_base(folder, p, layer, at[p], fields, content)
    made = {
        p: _rebuild(p, described, at[p], arrays)
        for p, described in manifest["leaves"].items()
    }
    return flat.rebuild(made.get(p, x) for p, x in flat.items())


# --- the description -----------------------------------------------------------------


def describe(
    params: PyTree, transform: Transform, fingerprint: Fingerprint | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(manifest, {name: array}) of an adapted tree."""
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
            if layer.holds_weight:
                about["holds"] = sorted(fields)
            # Of a base how it is stored, not what is stored, if its weight gives that.
            if not layer.holds_weight or layer.keeps_arrays:
                about["arrays"] = {
                    n: {"shape": list(x.shape), "dtype": str(x.dtype)}
                    for n, x in fields.items()
                }
                arrays |= {_name(path, k, n): x for n, x in fields.items()}
            leaves[path].append(about)
    found = digests(arrays)
    for path, described in leaves.items():
        for k, layer in enumerate(described):
            for n, array in layer["arrays"].items():
                array["digest"] = found[_name(path, k, n)]
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "jpeft": __version__,
        "jax": jax.__version__,
        "transform": transform.describe(),
        "leaves": leaves,
        "base": fingerprint or base_fingerprint(params),
    }
    return manifest, arrays


def base_fingerprint(params: PyTree) -> Fingerprint:
    """Path, shape, dtype and digest of every base leaf (adapted or plain tree).

    A leaf that trains whole has no digest: its base plays no part in the model.
    """
    bases, unused = {}, set()
    for path, slot in slots(params).items():
        base = unbox(innermost(slot))
        if is_array(base):
            bases[path] = base
        if any(x.replaces_base for x in layers(slot)):
            unused.add(path)
    found = _digests({p: x for p, x in bases.items() if p not in unused})
    return {
        p: {"shape": list(x.shape), "dtype": str(x.dtype), "digest": found.get(p)}
        for p, x in bases.items()
    }


def _digests(bases: Mapping[str, Any]) -> dict[str, Any]:
    """A digest a weight; of a quantised one, {array: digest}."""
    plain = {p: x for p, x in bases.items() if not is_leaf(x)}
    found: dict[str, Any] = dict(digests(plain))
    for path, leaf in bases.items():
        if is_leaf(leaf):
            arrays = {n: unbox(x) for n, x in array_fields(leaf).items()}
            found[path] = digests(arrays)
    return found


def _check_origin(adapted: Mapping[str, AdaptedLeaf], transform: Transform) -> None:
    known = transform.origins()
    for path, leaf in adapted.items():
        for layer in layers(leaf):
            if layer.origin not in known and not layer.holds_weight:
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


def _name(path: str, layer: int, field: str) -> str:
    """A name for Orbax, which joins and splits keys at '.' and '/'."""
    safe = path.replace("%", "%25").replace(".", "%2E").replace("/", ":")
    return f"{safe}:{layer}:{field}"


# --- reading -------------------------------------------------------------------------


def read_manifest(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    file = folder / MANIFEST
    if not file.is_file():
        near = suggest([p.name for p in folder.iterdir()] or ["nothing"], MANIFEST)
        raise CheckpointError(
            f"{folder}: not an adapter, or a truncated one: {MANIFEST} is missing "
            f"(there is {near})"
        )
    try:
        manifest = json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"{file}: damaged: {error}") from error
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{file}: not a {FORMAT} file")
    if manifest["version"] > VERSION:
        raise CheckpointError(
            f"{file}: format {manifest['version']}, this jpeft reads up to {VERSION}; "
            f"it was written by jpeft {manifest['jpeft']}: upgrade"
        )
    missing = [k for k in ("leaves", "base", "transform") if k not in manifest]
    if missing:
        raise CheckpointError(f"{file}: damaged: {missing} missing")
    return manifest


def compare_bases(
    folder: Path,
    saved: Fingerprint,
    flat: Slots,
    *,
    content: bool,
    kept: Collection[str] = (),
) -> None:
    """Raises, naming the leaves, unless this is the base the adapter was trained on.

    kept: paths whose values are not compared.
    """
    here = {p: unbox(x) for p, x in flat.items() if is_array(weight(x))}
    wrong = [f"{p} is missing" for p in saved if p not in here]
    wrong += [f"{p} is not in the saved base" for p in here if p not in saved]
    if wrong:
        near = suggest(list(here) or ["nothing"], next(iter(saved), ""))
        raise CheckpointError(
            f"{folder}: trained on another base: {_some(wrong)}. The saved paths begin "
            f"with {list(saved)[:2]}, the nearest here are {near}"
        )
    for p, x in here.items():
        for field, value in (("shape", list(x.shape)), ("dtype", str(x.dtype))):
            if saved[p][field] != value:
                wrong.append(f"{p} has {field} {value}, saved was {saved[p][field]}")
    if not wrong and content:
        told = {
            p: saved[p]["digest"]
            for p in here
            if saved[p]["digest"] is not None and p not in kept
        }
        found = _digests({p: here[p] for p in told})
        wrong = [
            _other_values(p, told[p], found[p]) for p in told if told[p] != found[p]
        ]
    if wrong:
        raise CheckpointError(
            f"{folder}: trained on another base: {_some(wrong)}. Pass the base it was "
            'trained on (check="structure" skips the comparison of values)'
        )


def _other_values(path: str, saved: Any, here: Any) -> str:
    if isinstance(saved, dict) == isinstance(here, dict):
        return f"{path} has other values"
    return (
        f"{path} is {'quantised' if isinstance(here, dict) else 'not quantised'} here"
    )


def adapters(described: list[Any]) -> list[Any]:
    """The described layers without the one that is a quantised base."""
    return [layer for layer in described if "holds" not in layer]


def is_kept(layer: Mapping[str, Any]) -> bool:
    """Whether this described layer is a quantised base whose arrays were saved."""
    return "holds" in layer and bool(layer["arrays"])


def quantized_again(leaves: Mapping[str, Any], path: str, slot: Any) -> Any:
    """The base in a slot as the adapter met it: quantised if it was."""
    layer = next((x for x in leaves.get(path, ()) if "holds" in x), None)
    if layer is None:
        return slot
    if _kind(path, layer) is not Quantized:
        raise CheckpointError(
            f"{path}: a base of kind {layer['kind']!r}: upgrade jpeft"
        )
    how = {k: freeze_value(v) for k, v in layer["static"].items()}
    double = "nested" in layer["holds"]
    if is_leaf(slot):
        pairs = {
            n: (getattr(slot, n), how[n]) for n in ("format", "block_size", "order")
        }
        pairs["double"] = slot.nested is not None, double
        for field, (here, saved) in pairs.items():
            if here != saved:
                raise CheckpointError(
                    f"{path}: quantised with {field}={here!r}, the adapter was trained "
                    f"on {field}={saved!r}; pass the plain base, which load quantises "
                    "as it was"
                )
        return slot.replace(compute_dtype=how["compute_dtype"])
    if is_kept(layer):
        return slot
    x, layout = (
        jnp.asarray(weight(slot)),
        Layout(how["order"], how["stack"], how["lead"], len(how["inner"])),
    )
    quantizer = Quantize(
        format=how["format"],
        block_size=how["block_size"],
        double=double,
        compute_dtype=how["compute_dtype"] or ACTIVATION,
    )
    made = quantizer.of_array(x, layout)
    made = place_beside(made.replace(origin=how["origin"]), weight(slot))
    return boxed(slot, made)  # type: ignore[arg-type]


def _kept_base(
    folder: Path,
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


def _some(items: list[str], most: int = 4) -> str:
    more = f"; and {len(items) - most} more" if len(items) > most else ""
    return "; ".join(items[:most]) + more


def check_digests(
    folder: Path, manifest: Mapping[str, Any], arrays: Mapping[str, Any]
) -> None:
    found = digests(arrays)
    for path, described in manifest["leaves"].items():
        for k, layer in enumerate(described):
            for field, array in layer["arrays"].items():
                if found[_name(path, k, field)] != array["digest"]:
                    raise CheckpointError(
                        f"{folder}: {path}/{field} is damaged: its bits differ from "
                        "those saved"
                    )


def _kind(path: str, layer: Mapping[str, Any]) -> type[AdaptedLeaf]:
    if layer["kind"] not in KINDS:
        raise CheckpointError(
            f"{path}: a leaf of kind {layer['kind']!r}, which this jpeft does not know "
            f"(it knows {sorted(KINDS)}); import the module that defines it, or upgrade"
        )
    return KINDS[layer["kind"]]


def _rebuild(
    path: str, described: list[Any], slot: Any, arrays: Mapping[str, Any]
) -> Any:
    leaf = slot
    described = adapters(described)
    for k in reversed(range(len(described))):
        layer = described[k]
        kind = _kind(path, layer)
        fields = {n: arrays[_name(path, k, n)] for n in layer["arrays"]}
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
        made = kind(base=leaf, **static, **fields)
        check_shapes(path, made, unbox(innermost(slot)).shape)
        leaf = boxed_like(box_of(slot), made)
    return leaf


def check_shapes(path: str, leaf: AdaptedLeaf, shape: tuple[int, ...]) -> None:
    """Raises if an array does not fit the weight it stands beside."""
    labels = leaf.labels() if isinstance(leaf, Labelled) else {}
    own: dict[Any, set[int]] = {}
    for field, axes in leaf.field_axes().items():
        x = getattr(leaf, field)
        want = tuple(
            n if k is None else shape[k] for k, n in zip(axes, x.shape, strict=False)
        )
        if len(axes) != len(x.shape) or want != tuple(x.shape):
            raise CheckpointError(
                f"{path}/{field}: shape {tuple(x.shape)} does not fit a weight of "
                f"shape {shape}"
            )
        for label, n in zip(labels.get(field, ()), x.shape, strict=False):
            if not isinstance(label, int):
                own.setdefault("rank" if label == R else label, set()).add(n)
    for label, sizes in own.items():
        if len(sizes) > 1:
            raise CheckpointError(
                f"{path}: its arrays disagree on the {label}: {sorted(sizes)}"
            )


# --- where arrays go -----------------------------------------------------------------


def _sharding_beside(layer: Mapping[str, Any], base: Any) -> dict[str, Sharding]:
    sharding = getattr(base, "sharding", None)
    if not isinstance(sharding, NamedSharding) or not layer["arrays"]:
        return {}
    kind = _kind("", layer)
    shapes: dict[str, Any] = {
        n: jax.ShapeDtypeStruct(tuple(x["shape"]), jnp.dtype(x["dtype"]))
        for n, x in layer["arrays"].items()
    }
    static = {n: freeze_value(x) for n, x in layer["static"].items()}
    leaf = kind(base=None if kind.holds_weight else base, **static, **shapes)
    specs = leaf_specs(leaf, sharding.spec)
    mesh, place = sharding.mesh, lambda n, x: whole_shards(getattr(specs, n), x, mesh)
    return {n: NamedSharding(mesh, place(n, x.shape)) for n, x in shapes.items()}


def _shardings(tree: Any) -> list[tuple[str, Sharding]]:
    if tree is None:
        return []
    if isinstance(tree, Sharding):
        return [("", tree)]
    flat, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda x: isinstance(x, Sharding)
    )
    return [("/".join(map(segment, p)).replace("/value", ""), s) for p, s in flat]


def _one_device() -> Sharding:
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


# --- folders -------------------------------------------------------------------------


def whole_folder(target: Path, fill: Any) -> None:
    """Fills a folder beside `target` and renames it, so that none is half there."""
    unfinished = target.with_name(target.name + ".tmp")
    first = jax.process_index() == 0
    if first:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    _meet("made")
    fill(unfinished)
    _meet("filled")
    if first:
        if target.exists():
            old = target.with_name(target.name + ".old")
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
            unfinished.rename(target)
            shutil.rmtree(old)
        else:
            unfinished.rename(target)
    _meet("named")


def _meet(name: str) -> None:
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"jpeft-{name}")
