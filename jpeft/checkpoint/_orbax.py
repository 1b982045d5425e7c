"""The one place that speaks to Orbax: arrays to a folder and back."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jpeft.late import Late
from jpeft.tree.paths import segments, spelled
from jpeft.types import CheckpointError, DamagedError

if TYPE_CHECKING:
    import orbax.checkpoint as ocp
    import tensorstore
else:
    ocp, tensorstore = Late("orbax.checkpoint"), Late("tensorstore")

TREE = "_METADATA"  # the file that describes a saved tree
INDEX = "manifest.ocdbt"  # the file by which a saved tree's arrays are found


def meet(name: str, timeout_s: int) -> None:
    """Waits for all processes to come here; raises if one does not in time."""
    everyone = _everyone()
    if everyone is not None:
        ocp.multihost.sync_global_processes(name, timeout=timeout_s, processes=everyone)


def is_local(x: Any) -> bool:
    """Whether an array is one process's alone, of several: Optax' `count`, a key."""
    if jax.process_count() == 1:
        return False
    return not isinstance(x, jax.Array) or x.is_fully_addressable


def write(folder: Any, arrays: Mapping[str, Any]) -> None:
    """Writes a flat {name: array}; names hold no '.', with which Orbax joins keys.

    Raises OSError where the disk refuses.
    """
    # Orbax writes no empty arrays, and no empty trees; `read` makes them again.
    arrays = {n: x for n, x in arrays.items() if x.size}
    # What each process has to itself Orbax takes from the first one, as NumPy's.
    arrays = {n: np.asarray(x) if is_local(x) else x for n, x in arrays.items()}
    if not arrays:
        return
    try:
        with _quiet(), _checkpointer(ocp.StandardCheckpointHandler, folder) as writer:
            writer.save(_absolute(folder), args=ocp.args.StandardSave(arrays))
    except OSError:
        raise
    except Exception as error:  # tensorstore's own have no errno
        if (number := _errno(error)) is None:
            text = (str(error).strip() or type(error).__name__).splitlines()[0]
            if "DEADLINE_EXCEEDED" in text:
                text = "another process failed, or did not come, to write its part"
            raise CheckpointError(
                f"{folder}: Orbax cannot write the arrays: {text[:120]}"
            ) from error
        raise OSError(number, os.strerror(number), os.fspath(folder)) from error


def read(
    folder: Any,
    like: Mapping[str, jax.ShapeDtypeStruct],
    told: Callable[[str], str],
) -> dict[str, Any]:
    """Reads what `write` wrote, onto the shardings of `like`.

    An array that has none comes into the host's memory.  told: a name as the user
    knows it.  Raises DamagedError, naming the array or the file, for whatever is not
    there, and before memory is asked for where the shapes differ.
    """
    empty = {n: x for n, x in like.items() if not x.size}
    full = {n: x for n, x in like.items() if x.size}
    made = {n: _zeros(x) for n, x in empty.items()}
    if not full:
        return made
    _check_stored(folder, full, told)
    try:
        with _quiet(), _checkpointer(ocp.PyTreeCheckpointHandler, folder) as reader:
            found = reader.restore(_absolute(folder), args=_wanted(full))
            for n, x in full.items():
                if x.sharding is not None and not _is_shared(x.sharding):
                    found[n] = jax.device_put(found[n], x.sharding)
    except Exception as error:  # Orbax raises many types, with pages of text
        what = _first_unreadable(folder, full, told)
        raise DamagedError(
            f"{folder}: {what} cannot be read{_because(error)}; the file is missing, "
            "truncated or damaged"
        ) from error
    return {**found, **made}


def _wanted(like: Mapping[str, jax.ShapeDtypeStruct]) -> Any:
    """What tells Orbax to read these arrays and no others."""
    how = {
        n: ocp.RestoreArgs(restore_type=np.ndarray)
        if x.sharding is None or not _is_shared(x.sharding)
        else ocp.ArrayRestoreArgs(
            sharding=x.sharding, global_shape=x.shape, dtype=x.dtype
        )
        for n, x in like.items()
    }
    return ocp.args.PyTreeRestore(dict(like), restore_args=how, partial_restore=True)


def _check_stored(
    folder: Any, like: Mapping[str, jax.ShapeDtypeStruct], told: Callable[[str], str]
) -> None:
    """Compares what the folder says it holds with what is asked for."""
    if not folder.is_dir():
        raise DamagedError(f"{folder}: missing; the checkpoint is incomplete")
    for name in (TREE, INDEX):
        if not (folder / name).is_file():
            raise DamagedError(
                f"{folder / name}: missing; the checkpoint is incomplete"
            )
    try:
        json.loads((folder / TREE).read_bytes())
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{folder / TREE}: damaged: it is no JSON") from error
    try:
        with _quiet(), ocp.PyTreeCheckpointer() as reader:
            stored: Any = reader.metadata(_absolute(folder))
        for inside in ("item_metadata", "tree"):
            stored = getattr(stored, inside, stored)
        stored = dict(stored)
    except Exception as error:
        raise DamagedError(
            f"{folder}: neither {TREE} nor {INDEX} says what arrays are there"
            f"{_because(error)}; one of the files is damaged"
        ) from error
    for name, x in like.items():
        if name not in stored:
            raise DamagedError(f"{folder}: {told(name)} is missing")
        here = stored[name]
        shape, dtype = getattr(here, "shape", None), getattr(here, "dtype", None)
        if shape is None or tuple(shape) != x.shape or dtype != x.dtype:
            raise DamagedError(
                f"{folder}: {told(name)} is stored as {dtype}{list(shape or ())}, "
                f"expected {x.dtype}{list(x.shape)}"
            )
        parts = getattr(getattr(here, "storage", None), "chunk_shape", None) or ()
        if math.prod(parts) > x.size:
            raise DamagedError(
                f"{folder}: {told(name)} of shape {list(x.shape)} is stored in "
                f"parts of shape {list(parts)}, larger than itself"
            )


def _first_unreadable(
    folder: Any, names: Collection[str], told: Callable[[str], str]
) -> str:
    """Which array, or which file where that says more, makes a read fail."""
    kvstore = {"driver": "ocdbt", "base": _url(folder)}
    good = 0
    for name in names:
        spec = {"driver": "zarr", "kvstore": {**kvstore, "path": f"{name}/"}}
        try:
            tensorstore.open(spec).result().read().result()
            good += 1
        except Exception:
            if good or len(names) == 1:
                return told(name)
            break
    return f"{told(next(iter(names)))}, or the index of all arrays, {INDEX},"


def _is_shared(place: Any) -> bool:
    """Whether Orbax reads onto it: with several processes, not onto one's alone."""
    return jax.process_count() == 1 or not place.is_fully_addressable


def _zeros(like: jax.ShapeDtypeStruct) -> Any:
    zeros = np.zeros(like.shape, like.dtype)
    return zeros if like.sharding is None else jax.device_put(zeros, like.sharding)


_times: Counter[str] = Counter()


def _checkpointer(handler: Any, folder: Any) -> Any:
    how = ocp.options.MultiprocessingOptions()
    if (everyone := _everyone()) is not None:
        # Only if the processes are named do Orbax' barriers end after a time (300 s);
        # one at which they did not meet must not have the name of a later one.
        _times[str(folder)] += 1
        how = ocp.options.MultiprocessingOptions(
            active_processes=everyone,
            barrier_sync_key_prefix=f"{folder}-{_times[str(folder)]}",
        )
    return ocp.Checkpointer(
        handler(multiprocessing_options=how), multiprocessing_options=how
    )


def _everyone() -> set[int] | None:
    n = jax.process_count()
    return set(range(n)) if n > 1 else None


def _absolute(folder: Any) -> Any:
    return folder.absolute() if isinstance(folder, Path) else folder


def _url(folder: Any) -> str:
    return f"{folder}/" if "://" in str(folder) else f"file://{folder.absolute()}/"


def _errno(error: BaseException) -> int | None:
    """The error of the operating system that the text of an exception tells of."""
    text = str(error)
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO):
        if os.strerror(number) in text:
            return number
    names = {
        "RESOURCE_EXHAUSTED": errno.ENOSPC,
        "PERMISSION_DENIED": errno.EACCES,
        "UNAUTHENTICATED": errno.EACCES,
    }
    return next((number for name, number in names.items() if name in text), None)


def _because(error: BaseException) -> str:
    number = _errno(error)
    return "" if number is None else f" ({os.strerror(number)})"


def _unreadable(folder: Path, what: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"{folder}: {what} cannot be read; the folder is truncated or damaged{why}"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Orbax logs every save, warns of the sharding file that we do not need, and logs
    what it raises."""
    loggers = [logging.getLogger(n) for n in ("absl", "orbax")]
    before = [x.level for x in loggers]
    for x in loggers:
        x.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for x, level in zip(loggers, before, strict=True):
            x.setLevel(level)


# --- one leaf at a time --------------------------------------------------------------

Keys = tuple[Any, ...]


class Leaves:
    """The arrays of a tree that anyone saved with Orbax, read one by one.

    A name is the array's path, joined by '/', without the `value` of a Flax box.
    stored: shape and dtype of every array.
    boxed: {the whole path: the name}, where the two differ: it is no box but a weight
        called `value` if that is what is asked for.
    """

    def __init__(self, path: Path, folder: Path):
        self.path = path
        self._folder = folder.absolute()
        try:
            with _quiet(), ocp.PyTreeCheckpointer() as reader:
                found: Any = reader.metadata(self._folder)
        except Exception as error:
            raise _unreadable(folder, "its description", _because(error)) from error
        # Orbax 0.11 and later wrap the tree once or twice, by who wrote it.
        for inside in ("item_metadata", "tree"):
            found = getattr(found, inside, found)
        self._tree = found
        flat, _ = jax.tree_util.tree_flatten_with_path(found)
        self._keys: dict[str, Keys] = {}
        self.stored: dict[str, jax.ShapeDtypeStruct] = {}
        self.boxed: dict[str, str] = {}
        wholes = spelled(segments([p for p, _ in flat]))
        for (path_, x), whole in zip(flat, wholes, strict=True):
            keys = tuple(getattr(k, "key", getattr(k, "idx", None)) for k in path_)
            if getattr(x, "shape", None) is None or getattr(x, "dtype", None) is None:
                continue  # a string, an empty subtree
            name = whole.removesuffix("/value")
            name = name if name not in self._keys else whole
            if name != whole:
                self.boxed[whole] = name
            self._keys[name] = keys
            self.stored[name] = jax.ShapeDtypeStruct(tuple(x.shape), x.dtype)
        if not self.stored:  # what Orbax says when it cannot read them
            raise _unreadable(folder, "the arrays", " (none is described)")

    def read(self, name: str) -> np.ndarray:
        """The whole array, in the memory of the host."""
        keys = self._keys[name]
        wanted = _only(self._tree, keys)
        as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
        args = ocp.args.PyTreeRestore(
            item=wanted,
            restore_args=jax.tree.map(lambda _: as_numpy, wanted),
            partial_restore=True,
        )
        try:
            with _quiet(), ocp.PyTreeCheckpointer() as reader:
                found = reader.restore(self._folder, args=args)
        except Exception as error:
            raise _unreadable(self._folder, repr(name), _because(error)) from error
        for k in keys:
            found = found[k]
        return np.asarray(found)


def open_leaves(path: Path) -> Leaves | None:
    """The arrays saved in a folder or in its one item; None if it holds none."""
    if (path / TREE).is_file():
        return Leaves(path, path)
    items = sorted(p.parent for p in path.glob("*/" + TREE))
    if len(items) > 1:
        raise CheckpointError(
            f"{path}: holds {', '.join(p.name for p in items)}; pass one of these "
            f"folders, such as {str(items[0])!r}"
        )
    if items:
        return Leaves(path, items[0])
    if steps := sorted(p.parent.parent for p in path.glob("*/*/" + TREE)):
        raise CheckpointError(
            f"{path}: holds {len(set(steps))} steps; pass one, such as "
            f"{str(steps[-1])!r}"
        )
    return None


def _only(tree: Any, keys: Keys) -> Any:
    """The tree with one leaf: of a dict the one entry, of a list all places (Orbax
    compares lengths), the others held by its mark for what is not to be read."""
    if not keys:
        return 0
    first, rest = keys[0], keys[1:]
    if isinstance(tree, Mapping):
        return {first: _only(tree[first], rest)}
    skip = lambda x: jax.tree.map(lambda _: ocp.PLACEHOLDER, x)
    places = [_only(x, rest) if k == first else skip(x) for k, x in enumerate(tree)]
    return type(tree)(places)
