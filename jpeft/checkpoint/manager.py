"""`CheckpointManager`: adapters and the state of a training run, step by step.

directory/00000100/adapter/      as `jpeft.save` writes it
directory/00000100/state/        the run's own arrays: optimiser state, counters
directory/00000100/state.json    their places, and the caller's metadata
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jpeft import compat
from jpeft.checkpoint import _orbax
from jpeft.checkpoint.adapter import load, save, whole_folder
from jpeft.checkpoint.base import Fingerprint, base_fingerprint
from jpeft.checkpoint.digest import digests
from jpeft.transform import Transform
from jpeft.types import CheckpointError, PyTree


class CheckpointManager:
    """Saves and restores the steps of a run.

    directory: made if it is not there.  transform: what adapted the parameters.
    max_to_keep: the newest steps that stay; None keeps all.

    The base is fingerprinted at the first save: it must not change during the run.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        transform: Transform,
        *,
        max_to_keep: int | None = 2,
    ):
        if max_to_keep is not None and max_to_keep < 1:
            raise ValueError(f"max_to_keep={max_to_keep}: expected at least 1 or None")
        self.directory = Path(directory)
        self.transform = transform
        self.max_to_keep = max_to_keep
        self._fingerprint: Fingerprint | None = None

    def steps(self) -> list[int]:
        """The finished steps, oldest first."""
        if not self.directory.is_dir():
            return []
        names = [p.name for p in self.directory.iterdir() if p.is_dir()]
        return sorted(int(n) for n in names if n.isdigit())

    def latest_step(self) -> int | None:
        return max(self.steps(), default=None)

    def save(
        self,
        step: int,
        params: PyTree,
        *,
        state: PyTree = None,
        metadata: Mapping[str, Any] | None = None,
        statistics: bool = True,
    ) -> None:
        """Writes a step whole, then deletes what exceeds `max_to_keep`.

        state: any tree of arrays.  metadata: anything JSON can hold.  statistics: as
        `jpeft.save` takes it.  Saving a step that is there replaces it.
        """
        if self._fingerprint is None:
            self._fingerprint = base_fingerprint(params)
        arrays = {f"{k:06d}": _array(p, x) for k, (p, x) in enumerate(_flat(state))}
        about = {
            "paths": [p for p, _ in _flat(state)],
            "digests": digests(arrays),
            "arrays": {
                n: {"shape": list(x.shape), "dtype": str(x.dtype)}
                for n, x in arrays.items()
            },
            "metadata": dict(metadata or {}),
        }
        text = json.dumps(about)

        def fill(folder: Path) -> None:
            save(
                folder / "adapter",
                params,
                self.transform,
                step=step,
                statistics=statistics,
                fingerprint=self._fingerprint,
            )
            if arrays:
                _orbax.write(folder / "state", arrays)
            if jax.process_index() == 0:
                (folder / "state.json").write_text(text)

        whole_folder(self._folder(step), fill)
        self._prune()

    def restore(
        self,
        base_params: PyTree,
        state_like: PyTree = None,
        *,
        step: int | None = None,
        **how: Any,
    ) -> tuple[PyTree, PyTree, dict[str, Any]]:
        """(adapted params, state, metadata) of a step, the latest by default.

        state_like: a tree of the structure that was saved, such as a fresh
        `tx.init(trainable)`; its arrays' shapes, dtypes and shardings are used.  Or a
        function that makes it of the restored parameters, where their shapes are known
        only then (after `jpeft.compact` or `jpeft.sparsify`).
        how: shardings=, check=, allow=, names=, as `jpeft.load` takes them.
        """
        step = self.latest_step() if step is None else step
        if step is None or step not in self.steps():
            raise CheckpointError(
                f"{self.directory}: no checkpoint"
                + ("" if step is None else f" of step {step}; there are {self.steps()}")
            )
        folder = self._folder(step)
        params = load(folder / "adapter", base_params, **how)
        try:
            about = json.loads((folder / "state.json").read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder}/state.json: damaged: {error}") from error
        like = state_like(params) if callable(state_like) else state_like
        return params, self._state(folder, about, like), about["metadata"]

    def close(self) -> None:
        """Nothing is pending: every save is finished when it returns."""

    def _state(self, folder: Path, about: Mapping[str, Any], like: PyTree) -> PyTree:
        flat = _flat(like)
        paths = [p for p, _ in flat]
        if paths != about["paths"]:
            odd = sorted(set(paths) ^ set(about["paths"])) or ["their order"]
            raise CheckpointError(
                f"{folder}: the saved state has another structure: {odd[:3]} differ; "
                "build the optimiser as in the run that saved it"
            )
        if not flat:
            return like
        abstract = {}
        for k, (path, x) in enumerate(flat):
            name, x = f"{k:06d}", _array(path, x)
            saved = about["arrays"][name]
            if saved != {"shape": list(x.shape), "dtype": str(x.dtype)}:
                raise CheckpointError(
                    f"{folder}: state{path} was saved as {saved['dtype']}"
                    f"{saved['shape']}, here it is {x.dtype}{list(x.shape)}"
                )
            sharding = x.sharding if isinstance(x, jax.Array) else None
            abstract[name] = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        arrays = _orbax.read(folder / "state", abstract)
        if digests(arrays) != about["digests"]:
            raise CheckpointError(
                f"{folder}/state: damaged: bits differ from those saved"
            )
        new = [
            jax.random.wrap_key_data(arrays[f"{k:06d}"], impl=jax.random.key_impl(x))
            if compat.is_key_array(x)
            else arrays[f"{k:06d}"]
            for k, (_, x) in enumerate(flat)
        ]
        return jax.tree.unflatten(jax.tree.structure(like), new)

    def _folder(self, step: int) -> Path:
        return self.directory / f"{step:08d}"

    def _prune(self) -> None:
        if self.max_to_keep is None or jax.process_index() != 0:
            return
        for step in self.steps()[: -self.max_to_keep]:
            # Renamed first: a deletion cut short must not leave half a step listed.
            trash = self.directory / f"{step:08d}.old"
            self._folder(step).rename(trash)
            shutil.rmtree(trash)


def _flat(tree: PyTree) -> list[tuple[str, Any]]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(p) + _key_kind(x), x) for p, x in flat]


def _key_kind(x: Any) -> str:
    """A key's kind is part of its place: its words mean nothing to another kind."""
    return f":{x.dtype}" if compat.is_key_array(x) else ""


def _array(path: str, x: Any) -> Any:
    if compat.is_key_array(x):
        return jax.random.key_data(x)
    if isinstance(x, (jax.Array, np.ndarray)):
        return x
    if isinstance(x, (bool, int, float, np.generic)):
        return np.asarray(x)
    raise TypeError(f"state{path}: expected an array, got {type(x).__name__}")
