"""`load_quantized`: a stored model into a quantised tree, one weight at a time.

A weight is read, put in place, quantised and dropped before the next one is read.  So
the peak is the quantised model and the work on its largest weight: a model larger than
memory can be loaded if its quantised form fits.
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, Sharding

from jpeft.boxes import same_box
from jpeft.checkpoint._orbax import open_leaves
from jpeft.checkpoint._safetensors import open_tensors
from jpeft.checkpoint.names import Names, Stored, told_by
from jpeft.compat import is_key_array
from jpeft.leaf import box_of, is_leaf
from jpeft.methods.quantize import Quantize
from jpeft.quant.exchange import STATE, TYPES, from_bitsandbytes
from jpeft.quant.leaf import Quantized, boxed
from jpeft.sharding.specs import place_beside
from jpeft.transform import Transform
from jpeft.tree.layout import LeafUse
from jpeft.tree.paths import Slots, is_array, slots, suggest, weight
from jpeft.types import CheckpointError, PyTree


def load_quantized(
    path: str | os.PathLike[str],
    transform: Transform,
    like: PyTree,
    *,
    names: Names = None,
    uses: Mapping[str, LeafUse] | None = None,
    shardings: Any = None,
) -> PyTree:
    """The model stored in `path`, quantised while it is read.

    The result is `transform(key, params)` of the loaded parameters, bit for bit.  Above
    its own memory it needs about three times the largest weight in float32, whatever
    the size of the model.

    path: a safetensors file, a folder of them (or its index), or a folder that Orbax
        saved a tree in.
    transform: `jpeft.quantize(...)` or a chain of them.  Other weights are loaded as
        they are, NaN and infinity too (a mask may hold it); adapters are applied to the
        result.
    like: the parameters or their shapes, `jax.eval_shape(model.init, ...)["params"]`,
        boxed or not.  Says structure, shapes, and the dtype each weight is cast to.
    names: where each weight is stored; None and paths it does not speak of: under their
        own path, with "/" or "." between its parts.  A dict from paths, or regular
        expressions for whole paths (the first match counts), to a name, which may hold
        the expression's groups; or a function of the path.  Instead of a name there may
        be (name, function of the array) or (list of names, function of all of them).
    uses: see `jpeft.find_uses`.
    shardings: of the plain weights; one `Sharding`, or a tree as `like`.  A quantised
        weight is placed as its own was to be.

    PyTorch keeps the weight of a linear layer as (out, in), Flax as (in, out), and of a
    convolution (out, in, *window), Flax (*window, in, out); where sizes are equal,
    nothing can tell that a transposition is missing.  For a Linen model whose layers
    are named as those of the PyTorch model that was saved:

        params = jpeft.load_quantized("folder/", jpeft.quantize("nf4"), like, names={
            r"(.*)/kernel": (r"model/\\1/weight", np.transpose),
            r"(.*)/(embedding|scale)": r"model/\\1/weight",
        })

    A weight that bitsandbytes has quantised to 4 bits is taken over code for code, if
    `transform` asks for its format and block size (nested scales or not).

    Raises ValueError for a transform other than quantize, and for `names` that fit no
    path; CheckpointError, naming the weight, for what is missing, misshapen, of another
    kind of dtype, not finite, or damaged, and naming the file where it is no file, or
    not what its format allows.

    >>> import tempfile, jax, jpeft, numpy as np
    >>> from safetensors.numpy import save_file
    >>> like = {"linear": {"kernel": jax.ShapeDtypeStruct((64, 5), np.float32)}}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     tensors = {"fc.weight": np.ones((5, 64), np.float32)}  # torch: (out, in)
    ...     save_file(tensors, f"{folder}/a.safetensors")
    ...     names = {"linear/kernel": ("fc.weight", np.transpose)}
    ...     nf4 = jpeft.quantize("nf4")
    ...     params = jpeft.load_quantized(folder, nf4, like, names=names)
    >>> params["linear"]["kernel"].codes.shape
    (32, 5)
    """
    return load_from(
        lambda: _open(Path(path)),
        formats_of(transform, "load_quantized"),
        like,
        names=names,
        uses=uses,
        shardings=shardings,
        caller="load_quantized",
    )


def load_from(
    opened: Callable[[], Source],
    formats: Sequence[Quantize],
    like: PyTree,
    *,
    names: Names,
    uses: Mapping[str, LeafUse] | None,
    shardings: Any,
    caller: str,
    ready: Callable[[], Mapping[str, Callable[[Any, Any], Any]]] = dict,
) -> PyTree:
    """The arrays of a source as parameters, those that `formats` select quantised.

    opened: makes the source, once the other arguments are seen to be sound.
    ready: gives {path: a function of the slot and the sharding, which makes the leaf}
        for leaves that are not read as arrays.
    """
    flat = slots(like)
    if any(is_leaf(x) for x in flat.values):
        raise ValueError(
            f"{caller}: like= carries adapters or quantised weights; pass those "
            "of the plain model, jax.eval_shape(model.init, ...)['params']"
        )
    chosen = _chosen(formats, flat, uses)
    places = _places(shardings, flat, caller)
    source = opened()
    origins = _origins(source, flat, names, caller)
    weights = {
        p: _Weight(p, x, origins[p], chosen.get(p), places[p])
        for p, x in flat.items()
        if p in origins
    }
    # What can be seen from names and shapes is refused before the long reading.
    for w in weights.values():
        _check(w, source)
    made, own = {}, ready()
    for p, w in weights.items():
        leaf = own[p](w.slot, w.place) if p in own else _load(w, source)
        # Work on a weight must not begin while copies of the one before are alive.
        made[p] = jax.block_until_ready(leaf)
    return flat.rebuild(made.get(p, x) for p, x in flat.items())


Chosen = tuple[Quantize, LeafUse]


class Source(Protocol):
    """Arrays by name, read one by one.

    boxed: {another name: the stored one}, of what may be a box or a level more.
    """

    path: Path
    stored: dict[str, jax.ShapeDtypeStruct]
    boxed: dict[str, str]

    def read(self, name: str) -> np.ndarray: ...


class _Origin(NamedTuple):
    """The names of a weight's stored arrays and what makes the weight of them."""

    names: tuple[str, ...]
    function: Callable[..., Any] | None


class _Weight(NamedTuple):
    """One weight of `like`: where it comes from, how it is quantised, where it goes."""

    path: str
    slot: Any
    origin: _Origin
    chosen: Chosen | None
    place: Sharding | None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(weight(self.slot).shape)

    @property
    def dtype(self) -> Any:
        return weight(self.slot).dtype

    def at(self, source: Source) -> str:
        """For a message: the arrays' names and where they are."""
        return f"{', '.join(map(repr, self.origin.names))} of {source.path}"

    def remedy(self, function: str) -> str:
        """For a message: what to pass as names=."""
        names = self.origin.names
        given = repr(names[0] if len(names) == 1 else list(names))
        return f"names={{{self.path!r}: ({given}, {function})}}"


# --- what becomes of each weight -----------------------------------------------------


def formats_of(transform: Any, caller: str) -> list[Quantize]:
    """The parts of a transform that is quantize, or a chain of them; raises ValueError
    for another."""
    if not isinstance(transform, Transform):
        raise ValueError(
            f"{caller}: {transform!r} is no transform; pass "
            "jpeft.quantize(...), with the format as its first argument"
        )
    formats = []
    for t in transform.parts():
        if not isinstance(t, Quantize):
            raise ValueError(
                f"{caller}: {t.name} is not quantize; apply it to what was loaded: "
                f"params = jpeft.{caller}(...) with jpeft.quantize(...), then "
                f"params = jpeft.{t.name}(...)(key, params)"
            )
        formats.append(t)
    return formats


def _chosen(
    formats: Sequence[Quantize], flat: Slots, uses: Mapping[str, LeafUse] | None
) -> dict[str, Chosen]:
    out: dict[str, Chosen] = {}
    for t in formats:
        for path, use in t.targets(flat, uses).items():
            if path in out:
                raise ValueError(
                    f"{path}: {t.format} and {out[path][0].format} both select it; "
                    f"exclude={path!r} in one of the two"
                )
            out[path] = t, use
    return out


def _places(shardings: Any, flat: Slots, caller: str) -> dict[str, Sharding | None]:
    if shardings is None or isinstance(shardings, Sharding):
        return dict.fromkeys(flat.paths, shardings)
    is_sharding = lambda x: isinstance(x, Sharding)
    given = jax.tree.leaves(shardings, is_leaf=is_sharding)
    if len(given) != len(flat.paths) or not all(map(is_sharding, given)):
        kinds = sorted({type(x).__name__ for x in given})
        raise ValueError(
            f"{caller}: shardings= has {len(given)} leaves ({', '.join(kinds)}) "
            f"for {len(flat.paths)} weights; pass one Sharding, or a tree of "
            "NamedSharding of the structure of like="
        )
    return dict(zip(flat.paths, given, strict=True))


# --- where it is stored --------------------------------------------------------------


def _open(path: Path) -> Source:
    expected = f"{path}: expected *.safetensors, or a folder that Orbax saved a tree in"
    try:
        if not path.exists():
            raise CheckpointError(f"{path}: no such file or folder")
        if not path.is_file() and not path.is_dir():
            raise CheckpointError(f"{expected}; this is neither file nor folder")
        found = open_tensors(path) or open_leaves(path)
        there = [] if found else sorted(p.name for p in path.iterdir())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if found is None:
        raise CheckpointError(
            f"{expected}; there is {', '.join(there[:5]) or 'nothing'}"
        )
    return found


def _origins(
    source: Source, flat: Slots, names: Names, caller: str
) -> dict[str, _Origin]:
    paths = [p for p, x in flat.items() if is_array(weight(x))]
    told = told_by(names, paths, caller, "like=")
    out, missing = {}, []
    for path in paths:
        said = told(path)
        given, function = _as_origin(path, said)
        found = [_find(source, n) for n in given]
        if said is None:
            _check_one(source, path)
        missing += [(path, n) for n, f in zip(given, found, strict=True) if f is None]
        out[path] = _Origin(tuple(f for f in found if f is not None), function)
    if missing:
        raise CheckpointError(_missing(source, missing, paths))
    return out


def _find(source: Source, name: str) -> str | None:
    """The name as it is stored: with '/' or '.' between its parts."""
    return next(iter(_spellings(source, name)), None)


def _spellings(source: Source, name: str) -> list[str]:
    """The names under which it may be stored, as the user typed it first."""
    spelled = (name, name.replace("/", "."), name.replace(".", "/"))
    known = (n if n in source.stored else source.boxed.get(n) for n in spelled)
    return [n for n in dict.fromkeys(known) if n is not None]


def _check_one(source: Source, path: str) -> None:
    """Raises if a path is there under two names, either of which may be meant."""
    found = _spellings(source, path)
    if len(found) > 1:
        raise CheckpointError(
            f"{path}: {source.path} has {' and '.join(map(repr, found))}; say which is "
            f"meant, names={{{path!r}: {found[0]!r}}}"
        )


def _missing(
    source: Source, missing: Sequence[tuple[str, str]], paths: Sequence[str]
) -> str:
    path, name = missing[0]
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    levels = _levels(source, [n for _, n in missing])
    if advice := _as_torch(source, [p for p, _ in missing]):
        advice = f"PyTorch wrote it, it seems: names={{{advice}}}"
    elif levels:
        there, *others = (_find(source, x + name) or x + name for x in levels)
        also = f" (and {', '.join(map(repr, others))})" if others else ""
        level = levels[0].replace("\\", r"\\")
        whole = all(_find(source, levels[0] + p) for p in paths)
        given = f"'(.*)': r'{level}\\1'" if whole else f"{path!r}: {there!r}, ..."
        advice = f"it has {there!r}{also}: names={{{given}}}"
    else:
        weights = [n for n in source.stored if not _says(_TRAINING, n)]
        near = suggest(weights, name) or "nothing"
        advice = f"nearest: {near}; say where it is in names="
    return f"{path}: {source.path} has no {name!r}{more}; {advice}"


# What a training keeps beside the weights, under the same names and in the same shapes:
# moments and sums of Optax and PyTorch, gradients, running averages.
_TRAINING = re.compile(
    r"opt(im|imi[sz]er)?_?states?|optimi[sz]ers?|tx|inner_(opt_)?state|mu|nu|trace"
    r"|(max_)?exp_avg(_sq)?|momentum(_buffer)?|velocity|moments?|[mv]_?hat"
    r"|acc_grads?|grads?|gradients?|sum_of_squares|v_row|v_col|updates?",
    re.I,
)
# Weights too, but not those that were trained.
_AVERAGES = re.compile(r"(.*_)?(ema|swa|averaged?|polyak|shadow|slow)(_.*)?", re.I)


def _levels(source: Source, names: Sequence[str]) -> list[str]:
    """The prefixes under which all these names are stored, that of weights first.

    It skips what only a training keeps (moments, averages).
    """
    first = "/" + _bare(names[0])
    ends = [n for n in (*source.stored, *source.boxed) if _bare(n).endswith(first)]
    levels = dict.fromkeys(n[: len(n) - len(names[0])] for n in ends)
    fits = [x for x in levels if all(_find(source, x + n) for n in names)]
    return sorted(
        (x for x in fits or levels if not _says(_TRAINING, x)),
        key=lambda x: (_says(_AVERAGES, x), "params" not in _bare(x).split("/")),
    )


def _says(words: re.Pattern[str], name: str) -> bool:
    """Whether a level of a stored name is one of these words."""
    return any(map(words.fullmatch, _bare(name).split("/")[:-1]))


def _as_torch(source: Source, missing: Sequence[str]) -> str:
    """Entries of names= for paths that are there under PyTorch's name `weight`."""
    split = [p.rpartition("/") for p in missing]
    there = {last for to, _, last in split if _find(source, f"{to}/weight")}
    entries = [
        f"r'(.*)/{n}': r'\\1/weight'" for n in ("scale", "embedding") if n in there
    ]
    if "kernel" in there:  # of a convolution: (out, in, *window) to (*window, in, out)
        turn = "lambda w: w.transpose(*range(2, w.ndim), 1, 0)"
        entries.append(f"r'(.*)/kernel': (r'\\1/weight', {turn})")
    return ", ".join(entries)


def _bare(name: str) -> str:
    return name.replace(".", "/")


def _as_origin(path: str, stored: Stored | None) -> _Origin:
    if stored is None:
        return _Origin((path,), None)
    if isinstance(stored, str):
        return _Origin((stored,), None)
    if isinstance(stored, tuple) and len(stored) == 2 and callable(stored[1]):
        given, function = stored
        given = (given,) if isinstance(given, str) else tuple(given)
        if given and all(isinstance(n, str) for n in given):
            return _Origin(given, function)
    raise ValueError(
        f"{path}: names= gives {stored!r}; expected a name, (name, function of the "
        "array) or (list of names, function of the arrays)"
    )


# --- checks --------------------------------------------------------------------------


def _check(w: _Weight, source: Source) -> None:
    """Raises for what can be seen without reading."""
    if is_key_array(w):
        raise ValueError(
            f"{w.path}: like= holds a random key here, which is not loaded; pass the "
            "parameters alone, such as nnx.state(model, nnx.Param)"
        )
    if _is_quantized(w, source):
        _check_quantized(w, source)
    elif w.origin.function is None:
        (name,) = w.origin.names
        found = source.stored[name]
        _check_shape(w, found.shape, source)
        _check_kind(w, found.dtype, source)
        _check_no_scale(w, name, source)


def _check_shape(w: _Weight, found: tuple[int, ...], source: Source) -> None:
    want, found = w.shape, tuple(found)
    if want == found:
        return
    # PyTorch: (out, in), of a convolution (out, in, *window).
    axes = (*range(2, len(found)), 1, 0) if len(found) > 1 else ()
    advice = "pass the like= of the model that was saved"
    if w.origin.function is not None:
        before = ", ".join(str(source.stored[n].shape) for n in w.origin.names)
        advice = f"the function in names= made it of {before}"
    elif tuple(found[k] for k in axes) == want:
        turn = "numpy.transpose" if len(axes) == 2 else f"lambda w: w.transpose{axes}"
        advice = f"it is stored transposed: {w.remedy(turn)}"
    elif math.prod(want) == math.prod(found):
        # PyTorch's (out, in), where in and out are several axes of the weight.
        turned = any(
            found == (math.prod(want[k:]), math.prod(want[:k]))
            for k in range(1, len(want))
        )
        why = "transposed and flat" if turned else "in another shape"
        make = f"lambda w: w{'.T' if turned else ''}.reshape{want}"
        advice = f"it is stored {why}: {w.remedy(make)}"
    raise CheckpointError(
        f"{w.path}: expected shape {want}, found {found} in {w.at(source)}; {advice}"
    )


def _check_kind(w: _Weight, found: Any, source: Source) -> None:
    """A cast from float to float is meant, one from integers to floats is not."""
    kinds = (jnp.floating, jnp.integer, jnp.bool_, jnp.complexfloating)
    if any(jnp.issubdtype(w.dtype, k) and jnp.issubdtype(found, k) for k in kinds):
        return
    raise CheckpointError(
        f"{w.path}: expected {w.dtype}, found {found} in {w.at(source)}; if these are "
        "codes of a quantised weight, give the function that decodes them: "
        f"{w.remedy('lambda codes: ...')}"
    )


def _check_no_scale(w: _Weight, name: str, source: Source) -> None:
    """8-bit floats come with a scale, without which they are other weights."""
    scales = [n for n in (f"{name}_scale", f"{name}_scale_inv") if n in source.stored]
    found = np.dtype(source.stored[name].dtype)
    if found.itemsize == 1 and scales:
        both = w._replace(origin=_Origin((name, scales[0]), None))
        raise CheckpointError(
            f"{w.path}: {w.at(source)} is {found} with a scale beside it; give the "
            f"function that multiplies the two: {both.remedy('lambda w, scale: ...')}"
        )


# --- one weight ----------------------------------------------------------------------


def _load(w: _Weight, source: Source) -> Any:
    """The weight in its slot, quantised if it is to be."""
    if _is_quantized(w, source):
        return _taken_over(w, source)
    array = _put(w, _read(w, source))
    if w.chosen is None:
        return same_box(w.slot, array)
    if not bool(jnp.all(jnp.isfinite(array))):
        raise CheckpointError(
            f"{w.path}: {w.at(source)} holds NaN or infinity in {array.dtype}, which "
            "no code stands for; the file is damaged, or the dtype in like= too narrow"
        )
    transform, use = w.chosen
    no_key = jax.random.key(0)  # quantising draws nothing
    return transform.adapted(no_key, w.path, same_box(w.slot, array), use)


def _read(w: _Weight, source: Source) -> np.ndarray:
    """The weight in the memory of the host; where it can be, a view of the file."""
    arrays = [source.read(n) for n in w.origin.names]
    if w.origin.function is None:
        (made,) = arrays
    else:
        made = _applied(w, arrays, source)
        _check_shape(w, made.shape, source)
        _check_kind(w, made.dtype, source)
    if jnp.issubdtype(w.dtype, jnp.integer) and made.dtype != w.dtype:
        if not np.array_equal(made.astype(w.dtype), made):
            raise CheckpointError(
                f"{w.path}: {w.at(source)} holds numbers that {w.dtype} does not"
            )
    return made


def _applied(w: _Weight, arrays: Sequence[np.ndarray], source: Source) -> np.ndarray:
    """What the function in names= makes of the stored arrays."""
    assert w.origin.function is not None
    try:
        return np.asarray(w.origin.function(*arrays))
    except Exception as error:
        shapes = ", ".join(str(x.shape) for x in arrays)
        raise ValueError(
            f"{w.path}: the function in names= failed on {w.at(source)} of shape "
            f"{shapes}: {error}"
        ) from error


def _put(w: _Weight, array: np.ndarray) -> jax.Array:
    # On a CPU, JAX goes on using the memory that it is given.  That may be the file, if
    # the weight is quantised and dropped at once; what stays gets memory of its own.
    copy = True if w.chosen is None and not array.flags.writeable else None
    take = lambda x: np.array(x, w.dtype, copy=copy)
    if w.place is None:
        return jax.device_put(take(array))
    try:
        # Each process reads only what its own devices hold.
        return jax.make_array_from_callback(
            w.shape, w.place, lambda index: take(array[index])
        )
    except ValueError as error:
        raise ValueError(f"{w.path}: shardings= does not fit: {error}") from error


# --- weights that bitsandbytes has quantised -----------------------------------------


def _is_quantized(w: _Weight, source: Source) -> bool:
    marks = (n + STATE + t for n in w.origin.names for t in TYPES)
    return any(n in source.stored for n in marks)


def _check_quantized(w: _Weight, source: Source) -> None:
    what = f"{w.path}: {w.at(source)} is stored in 4 bits by bitsandbytes"
    if len(w.origin.names) > 1:
        raise CheckpointError(
            f"{what}, and a function in names= cannot put such codes together; use the "
            "checkpoint that is not quantised"
        )
    if w.chosen is None:
        raise CheckpointError(
            f"{what}, but quantize does not select it; select it in where=, or use the "
            "checkpoint that is not quantised"
        )


def _taken_over(w: _Weight, source: Source) -> Quantized:
    assert w.chosen is not None
    (name,), (transform, _) = w.origin.names, w.chosen
    own = [n for n in source.stored if n == name or n.startswith(name + ".")]
    state = {n: np.array(source.read(n)) for n in own}
    take = functools.partial(
        from_bitsandbytes, state, name, compute_dtype=transform.inside
    )
    try:
        leaf = take()
        turned = _transposes(w, leaf.shape, source)
        leaf = take(transpose=True) if turned else leaf
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{w.path}: {w.at(source)}: {error}") from error
    if (leaf.format, leaf.block_size) != (transform.format, transform.block_size):
        raise CheckpointError(
            f"{w.path}: {w.at(source)} is stored by bitsandbytes in {leaf.format} with "
            f"block_size={leaf.block_size}, quantize asks for {transform.format} with "
            f"block_size={transform.block_size}; ask for what is stored"
        )
    _check_shape(w, leaf.shape, source)
    leaf = leaf.replace(element=jnp.dtype(w.dtype).name, origin=transform.origin())
    return boxed(box_of(w.slot), placed(leaf, w.place))


def placed(leaf: Quantized, place: Sharding | None) -> Quantized:
    """The leaf on the devices on which its weight was to be."""
    if isinstance(place, NamedSharding):
        # There is no array of the weight: only its sharding is read.
        found = place_beside(leaf, SimpleNamespace(sharding=place))
        assert isinstance(found, Quantized)
        return found
    return jax.device_put(leaf, place)


def _transposes(w: _Weight, shape: tuple[int, ...], source: Source) -> bool:
    """Whether the function in names= transposes.  Codes can be used transposed or
    unchanged; any other function is refused."""
    if w.origin.function is None:
        return False
    # Arrays of their own indices along each axis: views, which take no memory.
    places = [np.arange(n, dtype=np.int32) for n in shape]
    probes = np.meshgrid(*places, indexing="ij", copy=False)
    made = [_applied(w, [x], source) for x in probes]
    for turned in (False, True):
        expected = [x.T if turned else x for x in probes]
        if all(map(np.array_equal, made, expected)):
            return turned
    raise CheckpointError(
        f"{w.path}: {w.at(source)} is stored in 4 bits by bitsandbytes; such codes can "
        "be transposed but nothing else, and the function in names= does something "
        "else; use the checkpoint that is not quantised"
    )
