"""`load_base`: a pretrained model's files into a parameter tree, one leaf at a time."""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.boxes import same_box
from jpeft.checkpoint.stream import formats_of, load_from, placed
from jpeft.checks import check_float, shown
from jpeft.hf import names
from jpeft.hf._files import CONFIG, Files, GgufFiles, open_files
from jpeft.hf._gguf import NUMBERS
from jpeft.hf.names import NameMap, Wanted
from jpeft.leaf import box_of
from jpeft.quant.exchange import (
    BLOCK_BYTES,
    KERNEL,
    gguf_arrays,
    gguf_inputs,
    gguf_leaf,
)
from jpeft.quant.leaf import boxed
from jpeft.tree.layout import LeafUse
from jpeft.tree.paths import is_array, slots, suggest, weight
from jpeft.types import CheckpointError, CheckpointWarning, PyTree

CALLER = "hf.load_base"
# transform= of those who want a GGUF file's own codes.
STORED = "stored"


@dataclasses.dataclass(frozen=True)
class Report:
    """What `load_base` did.

    unused: tensors that no leaf took, by torch's names; without those that the model
        computes itself, and a head that is the embedding.
    stored: {path: what its tensors are stored as}, such as "bfloat16" or "Q4_1, Q6_K".
    cast: {path: (stored dtype, dtype of the leaf)} where the two differ; blocks count
        as float32, to which they are decoded.
    decoded: {path: why} of quantised weights that transform="stored" could not keep as
        they are stored.

    >>> import tempfile, jax, jpeft, numpy as np
    >>> from safetensors.numpy import save_file
    >>> like = {"norm": {"scale": jax.ShapeDtypeStruct((5,), np.float32)}}
    >>> rules, reports = [jpeft.hf.Rule("norm/scale", "norm.weight")], []
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = f"{folder}/a.safetensors"
    ...     save_file({"norm.weight": np.ones(5, np.float16), "x": np.ones(2)}, path)
    ...     params = jpeft.hf.load_base(path, like, map=rules, report=reports.append)
    >>> reports[0].unused, reports[0].cast
    (('x',), {'norm/scale': ('float16', 'float32')})
    """

    unused: tuple[str, ...]
    stored: Mapping[str, str]
    cast: Mapping[str, tuple[str, str]]
    decoded: Mapping[str, str]


def load_base(
    path: str | os.PathLike[str],
    like: PyTree,
    *,
    map: NameMap | str | None = None,
    shardings: Any = None,
    transform: Any = None,
    dtype: Any = None,
    uses: Mapping[str, LeafUse] | None = None,
    report: Callable[[Report], Any] | None = None,
) -> PyTree:
    """The pretrained model in `path` as parameters of the structure of `like`.

    path: a folder of Hugging Face (config.json and *.safetensors, in shards or not), a
        .safetensors file or its index, or a .gguf file of llama.cpp.
    like: the parameters or their shapes, `jax.eval_shape(model.init, ...)["params"]`,
        boxed or not.  Layers may stand apart (`layers_0/...`) or be stacked along a
        first axis, as `nn.scan` has them (`layers/...`).
    map: what the leaves are called in the files: rules (`jpeft.hf.names`), the name of
        a map, or None for the one of the model's architecture: Llama, Mistral, SmolLM,
        Qwen2, Qwen3.
    shardings: of the plain weights; one `Sharding`, or a tree as `like`.
    transform: `jpeft.quantize(...)` or a chain of them, applied weight by weight: the
        result is `transform(key, params)` of the loaded parameters, bit for bit.
        "stored": linear weights and embeddings that a GGUF file holds as Q4_0, Q4_1 or
        Q8_0 keep its codes and scales, nothing is quantised anew; products with them
        are computed in the activation's dtype, or the leaf's if that is wider.  What
        is stored in other blocks (Q6_K, or of two types in one stack) is decoded, and
        the report says so.
    dtype: of floating-point leaves; None: that of `like`.
    uses: see `jpeft.find_uses`; `transform` may need it to tell the axes of stacks.
    report: is called with a `Report`.  Without it a CheckpointWarning names tensors
        that no leaf took.

    Beside the result there is never more than one leaf in the memory of the host (and
    one layer's tensor, where a leaf is put together).

    Raises CheckpointError, naming tensor and path, for what is missing, misshapen, of
    another kind of dtype, truncated or damaged; ValueError for an architecture without
    a map, a map that is none, a transform other than quantize.

        like = jax.eval_shape(model.init, key, tokens)["params"]
        params = jpeft.hf.load_base("SmolLM2-135M-Instruct.Q4_1.gguf", like)

    >>> import tempfile, jax, jpeft, numpy as np
    >>> from safetensors.numpy import save_file
    >>> like = {"linear": {"kernel": jax.ShapeDtypeStruct((7, 5), np.float32)}}
    >>> rules = [jpeft.hf.Rule("linear/kernel", "fc.weight", axes="in out")]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = f"{folder}/a.safetensors"
    ...     save_file({"fc.weight": np.ones((5, 7), np.float32)}, path)  # (out, in)
    ...     params = jpeft.hf.load_base(path, like, map=rules)
    >>> params["linear"]["kernel"].shape
    (7, 5)
    """
    check_float(CALLER, dtype)
    if report is not None and not callable(report):
        raise ValueError(
            f"{CALLER}: report={shown(report)}: expected a function that takes a "
            "Report, such as a list's append: reports = [], report=reports.append"
        )
    rules = None if map is None else names.check_map(map)
    kept = isinstance(transform, str) and transform == STORED
    formats = [] if transform is None or kept else formats_of(transform, CALLER)
    like = _in_dtype(like, dtype)
    sources: list[_Mapped] = []

    def opened() -> _Mapped:
        files = open_files(Path(path))
        own = rules if rules is not None else _map_of(files)
        sources.append(_Mapped(files, like, own, kept))
        return sources[0]

    params = load_from(
        opened,
        formats,
        like,
        names=lambda path: sources[0].label(path),
        ready=lambda: sources[0].as_codes(),
        uses=uses,
        shardings=shardings,
        caller=CALLER,
    )
    _tell(sources[0].report(), sources[0].path, report)
    return params


def _in_dtype(like: PyTree, dtype: Any) -> PyTree:
    """Shapes instead of arrays, floating-point ones of this dtype."""
    flat = slots(like)

    def one(slot: Any) -> Any:
        x = weight(slot)
        if not is_array(x) or not hasattr(x, "dtype"):
            return slot
        if dtype is None or not jnp.issubdtype(x.dtype, jnp.floating):
            return slot
        return same_box(slot, jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)))

    return flat.rebuild(one(x) for x in flat.values)


def _map_of(files: Files) -> NameMap:
    found = names.MAPS.get(files.architecture)
    if found is None:
        says = (
            f"its architecture is {shown(files.architecture)}"
            if files.architecture
            else f"no {CONFIG} beside it says its architecture"
        )
        raise ValueError(
            f"{CALLER}: {files.path}: {says}, and there are maps for "
            f"{', '.join(names.MAPS)}; pass map=, one of these names, or a list of "
            "hf.Rule(path, torch's name, axes)"
        )
    return found


def _tell(found: Report, path: Path, report: Callable[[Report], Any] | None) -> None:
    if report is not None:
        report(found)
    elif found.unused:
        more = f" and {len(found.unused) - 3} more" if len(found.unused) > 3 else ""
        warnings.warn(
            f"{CALLER}: {path} holds {', '.join(found.unused[:3])}{more}, which no "
            "leaf of like= took; if that is meant, pass report=, a function that is "
            "called with all of them",
            CheckpointWarning,
            stacklevel=3,
        )


class _Mapped:
    """The files as a source of leaves: {label: the leaf}, made when it is read."""

    def __init__(self, files: Files, like: PyTree, rules: NameMap, kept: bool):
        self.path, self.files = files.path, files
        self.boxed: dict[str, str] = {}
        leaves = {p: weight(x) for p, x in slots(like).items() if is_array(weight(x))}
        shapes = {p: tuple(x.shape) for p, x in leaves.items()}
        self.wanted, without = names.wanted(rules, shapes)
        if without:
            near = without[0].replace("/", ".")
            near = next(iter(suggest(list(files.stored), near, 1)), "")
            raise ValueError(
                f"{without[0]}: the map has no rule for it"
                + (f" and {len(without) - 1} more" if len(without) > 1 else "")
                + f"; pass map= with one, hf.Rule({without[0]!r}, {near!r}, axes) or "
                "another name, or the like= of the model that was saved"
            )
        self._dtypes = {p: np.dtype(x.dtype) for p, x in leaves.items()}
        self._check_there()
        for w in self.wanted.values():
            self._check(w)
        self._labels = _distinct({p: w.label for p, w in self.wanted.items()})
        self._by_label = {n: self.wanted[p] for p, n in self._labels.items()}
        self.stored = {
            n: jax.ShapeDtypeStruct(w.shape, self._dtypes[w.path])
            for n, w in self._by_label.items()
        }
        self.decoded: dict[str, str] = {}
        if kept and not isinstance(files, GgufFiles):
            raise ValueError(
                f"{CALLER}: {self.path}: transform={STORED!r} keeps the codes of a "
                ".gguf file, and this holds none; pass jpeft.quantize(...)"
            )
        self._kept = [p for p in self.wanted if kept and self._keeps(p)]

    def _keeps(self, path: str) -> bool:
        """Whether its tensors can stay as they are stored; notes why blocks cannot."""
        w = self.wanted[path]
        types = list(dict.fromkeys(map(self.files.type_of, w.tensors)))
        if all(t in NUMBERS for t in types):
            return False
        why = ""
        if len(types) > 1:
            why = f"{' and '.join(types)} in one stack"
        elif types[0].lower() not in BLOCK_BYTES:
            why = f"jpeft has no format for {types[0]}"
        elif w.axes == names.PLAIN:
            why = f"{types[0]}, and it is no linear weight or embedding"
        if why:
            self.decoded[path] = why
        return not why

    def as_codes(self) -> dict[str, Callable[[Any, Any], Any]]:
        """{path: what makes its leaf} of those that keep their codes."""
        return {p: functools.partial(self._codes, self.wanted[p]) for p in self._kept}

    def _codes(self, w: Wanted, slot: Any, place: Any) -> Any:
        files = self.files
        assert isinstance(files, GgufFiles)
        format = files.type_of(w.tensors[0]).lower()
        begin, count = w.rows(files.stored[w.tensors[0]].shape)
        joined: dict[str, np.ndarray] = {}
        for k, name in enumerate(w.tensors):
            raw = files.raw(name)[begin : begin + count]
            try:
                arrays = gguf_arrays(raw, format, w.axes)
            except ValueError as error:
                raise CheckpointError(
                    f"{w.path}: {name!r} of {self.path}: {error}"
                ) from error
            for field, x in arrays.items():
                if k == 0:
                    joined[field] = np.empty((len(w.tensors), *x.shape), x.dtype)
                joined[field][k] = x
        inputs = gguf_inputs(w.own, w.axes, files.stored[w.tensors[0]].shape[-1])
        assert inputs is not None
        leaf = gguf_leaf(
            joined,
            format,
            w.axes,
            w.shape,
            int(w.stacked),
            inputs,
            self._dtypes[w.path],
        )
        return boxed(box_of(slot), placed(leaf, place))

    def label(self, path: str) -> str | None:
        return self._labels.get(path)

    def read(self, name: str) -> np.ndarray:
        """The leaf, in its own dtype; a view of the file where that is all it is."""
        w = self._by_label[name]
        dtype = self._dtypes[w.path]
        tensor = self.files.stored[w.tensors[0]]
        sizes = w.sizes(tensor.shape)
        assert sizes is not None
        if not w.stacked and w.axes != KERNEL and not w.before and w.last:
            _, rows = next(self.files.parts(w.tensors[0]))
            if rows.shape == tensor.shape:  # and not the first of several parts
                return rows.reshape(w.shape).astype(dtype, copy=False)
        out = np.empty(w.shape, dtype)
        for k, name in enumerate(w.tensors):
            into = (out[k] if w.stacked else out).reshape(sizes)
            self._fill(into.T if w.axes == KERNEL else into, w, name)
        return out

    def _fill(self, into: np.ndarray, w: Wanted, name: str) -> None:
        """A tensor's rows that are this leaf's."""
        begin, count = w.rows(self.files.stored[name].shape)
        for at, rows in self.files.parts(name):
            first, last = max(at, begin), min(at + len(rows), begin + count)
            if first < last:
                into[first - begin : last - begin] = rows[first - at : last - at]

    def report(self) -> Report:
        used = {n for w in self.wanted.values() for n in w.tensors}
        unused = [n for n in self.files.stored if n not in used]
        if self.files.tied:
            unused = [n for n in unused if n != names.HEAD]
        unused = [n for n in unused if not names.COMPUTED.fullmatch(n)]
        stored, cast = {}, {}
        for path, w in self.wanted.items():
            types = {self.files.type_of(n): None for n in w.tensors}
            stored[path] = ", ".join(types)
            own = {self.files.stored[n].dtype.name: None for n in w.tensors}
            if path not in self._kept and list(own) != [self._dtypes[path].name]:
                cast[path] = ", ".join(own), self._dtypes[path].name
        return Report(tuple(unused), stored, cast, self.decoded)

    # -- checks -----------------------------------------------------------------------

    def _check_there(self) -> None:
        missing = [
            (w.path, n)
            for w in self.wanted.values()
            for n in w.tensors
            if n not in self.files.stored
        ]
        if not missing:
            return
        path, name = missing[0]
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        advice = f"nearest: {suggest(list(self.files.stored), name)}"
        if name == names.HEAD and names.TOKENS in self.files.stored:
            advice = (
                "its head is the embedding: use the like= of a model that ties the "
                f"two, or a rule that reads {path!r} from {names.TOKENS!r}"
            )
        raise CheckpointError(f"{path}: {self.path} has no {name!r}{more}; {advice}")

    def _check(self, w: Wanted) -> None:
        for name in w.tensors:
            found = self.files.stored[name]
            if w.sizes(found.shape) is None:
                turned = " (transposed)" if w.axes == KERNEL else ""
                first, count = w.rows(found.shape)
                part = f", of which rows {first} to {first + count} were meant"
                part = part if w.before or not w.last else ""
                raise CheckpointError(
                    f"{w.path}: expected shape {w.own}{turned}, found {found.shape} in "
                    f"{name!r} of {self.path}{part}; pass the like= of the model that "
                    "was saved"
                )
            self._check_kind(w, name, found.dtype)

    def _check_kind(self, w: Wanted, name: str, found: Any) -> None:
        want = self._dtypes[w.path]
        kinds = (jnp.floating, jnp.integer, jnp.bool_, jnp.complexfloating)
        same = any(jnp.issubdtype(want, k) and jnp.issubdtype(found, k) for k in kinds)
        at = f"{w.path}: {name!r} of {self.path}"
        if not same:
            raise CheckpointError(
                f"{at} is {found}, expected {want}; if these are codes of a quantised "
                "weight, take the model that is not quantised"
            )
        scales = {f"{name}_scale", f"{name}_scale_inv"} & self.files.stored.keys()
        if np.dtype(found).itemsize == 1 and scales:
            raise CheckpointError(
                f"{at} is {found} with a scale beside it, without which it is another "
                "weight; take the model that is not quantised"
            )


def _distinct(labels: Mapping[str, str]) -> dict[str, str]:
    """Labels by path; of leaves that share their tensors they say the path too."""
    count = collections.Counter(labels.values())
    return {p: f"{n} ({p})" if count[n] > 1 else n for p, n in labels.items()}
