"""The one place that speaks to Orbax: arrays to a folder and back."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jpeft.tree.paths import segments, spelled
from jpeft.types import CheckpointError


def write(folder: Path, arrays: Mapping[str, Any]) -> None:
    """Writes a flat {name: array}; names hold no '.', with which Orbax joins keys."""
    with _quiet(), ocp.StandardCheckpointer() as writer:
        writer.save(folder.absolute(), dict(arrays))


def read(folder: Path, like: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """Reads what `write` wrote, onto the shardings of `like`; into the host's memory
    what has none there."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: missing; the checkpoint is incomplete")
    try:
        with _quiet(), ocp.StandardCheckpointer() as reader:
            found = reader.restore(
                folder.absolute(), {n: _at(x) for n, x in like.items()}
            )
    except Exception as error:  # Orbax raises many types, with pages of text
        raise _unreadable(folder, "the arrays", error) from error
    for name, x in like.items():
        if tuple(found[name].shape) != x.shape or found[name].dtype != x.dtype:
            error = ValueError(f"{name} has another shape or dtype")
            raise _unreadable(folder, "the arrays", error)
    return found


def _at(x: jax.ShapeDtypeStruct) -> Any:
    return x if x.sharding is not None else np.empty(x.shape, x.dtype)


def _unreadable(folder: Path, what: str, error: Exception) -> CheckpointError:
    text = str(error).strip() or type(error).__name__
    return CheckpointError(
        f"{folder}: {what} cannot be read; the folder is truncated or damaged "
        f"({text.splitlines()[0][:200]})"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Orbax logs every save and warns of the sharding file we do not need."""
    loggers = [logging.getLogger(n) for n in ("absl", "orbax")]
    before = [x.level for x in loggers]
    for x in loggers:
        x.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for x, level in zip(loggers, before, strict=True):
            x.setLevel(level)


# --- one leaf at a time --------------------------------------------------------------

TREE = "_METADATA"  # the file that describes a saved tree
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
            raise _unreadable(folder, "its description", error) from error
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
            raise _unreadable(folder, "the arrays", ValueError("none is described"))

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
            raise _unreadable(self._folder, repr(name), error) from error
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
