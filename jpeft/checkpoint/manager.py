"""`CheckpointManager`: adapters and the state of a training run, step by step.

directory/00000100/adapter/      as `jpeft.save` writes it
directory/00000100/state/        the run's own arrays: optimiser state, counters
directory/00000100/state.json    their places, and the caller's metadata

Both descriptions say which step they are, and `state.json` which adapter it is beside.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jpeft import compat
from jpeft.checkpoint import _orbax
from jpeft.checkpoint.adapter import describe, filled, load
from jpeft.checkpoint.base import Watch, base_weights
from jpeft.checkpoint.digest import digests, words
from jpeft.checkpoint.folder import (
    Fill,
    Folder,
    Kind,
    find_folder,
    listed,
    location,
    remove_folder,
    sweep,
    write_folder,
    write_text,
)
from jpeft.checkpoint.manifest import MANIFEST, read_manifest, step_number
from jpeft.checkpoint.processes import Crew, check_alike, is_first
from jpeft.checkpoint.sealed import DIGEST, metadata_of, seal, unseal
from jpeft.checks import check_flag
from jpeft.leaf import is_leaf
from jpeft.methods.quantize import Quantize
from jpeft.transform import Transform
from jpeft.tree.paths import slots
from jpeft.types import CheckpointError, CheckpointWarning, DamagedError, PyTree

ADAPTER, STATE, ABOUT = "adapter", "state", "state.json"
STEP = Kind(frozenset({ADAPTER, STATE, ABOUT}), ABOUT, (ABOUT, f"{ADAPTER}/{MANIFEST}"))
# What `state.json` held, and how it began, before it had a digest.
_UNSEALED, _UNSEALED_HEAD = {"paths", "digests", "arrays", "metadata"}, b'{"paths"'
# How many a save it was stands in the first bytes.
_HEAD, _SAVED = 512, re.compile(rb'"saved": (\d+)')
_TRIES = 5  # against others who replace the step at the same time
# What an earlier jpeft left behind when it was cut short.
_FORMER = re.compile(r"(?P<step>\d{8,})\.(old|tmp)", re.ASCII)


class _Three(NamedTuple):
    params: PyTree
    state: PyTree
    metadata: dict[str, Any]


class Restored(_Three):
    """(params, state, metadata), and where they are from.

    step: whose they are.  skipped: {step: why it could not be read}, newer ones.
    fresh: places in the state that are as `state_like` has them, not restored.
    """

    step: int = -1
    skipped: Mapping[int, str] = {}
    fresh: tuple[str, ...] = ()


class CheckpointManager:
    """Saves and restores the steps of a run.

    directory: made if it is not there; also of an object store, `gs://...`.
    transform: what adapted the parameters.
    max_to_keep: so many steps stay, those that were saved last; None keeps all.

    The base is fingerprinted at the first save.  What of it moves during the run,
    statistics that nothing marks as such, is saved with the adapter; a weight under an
    adapter must not.  What a run that was cut short left in the directory is deleted.

    >>> import tempfile, jax, jax.numpy as jnp, jpeft
    >>> base, peft = {"kernel": jnp.ones((5, 3))}, jpeft.lora(rank=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     manager = jpeft.CheckpointManager(folder, peft)
    ...     manager.save(7, peft(jax.random.key(0), base), state={"seen": jnp.ones(2)})
    ...     manager.restore(base, {"seen": jnp.zeros(2)}).step
    7
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
        self.directory = location(directory)
        self.transform = transform
        self.max_to_keep = max_to_keep
        self._base = Watch()
        self._sweep()

    def steps(self) -> list[int]:
        """The finished steps, in the order of their numbers."""
        return [n for n in self._folders() if self._is_finished(n)]

    def latest_step(self) -> int | None:
        """The step that was saved last: the largest, but where a run began again below
        the steps of an earlier one."""
        return max(self.steps(), key=self._order, default=None)

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

        state: any tree of arrays, numbers and keys.  With several processes, what only
        one of them holds, such as Optax' `count`, must be the same in each.
        metadata: anything JSON can hold.  statistics: as `jpeft.save` takes it.
        Saving a step that is there replaces it.

        When it returns, the step is on the disk, and it is never one that is deleted.
        Raises ValueError, naming it, for what cannot be saved, CheckpointError if the
        disk refuses.
        """
        number = step_number(step)
        check_flag("CheckpointManager.save", "statistics", statistics)

        def make() -> tuple[Fill, str]:
            return self._described(number, params, state, metadata, statistics)

        write_folder(self._folder(number), STEP, make, overwrite=True)
        if is_first():
            self._prune(number)

    def restore(
        self,
        base_params: PyTree,
        state_like: PyTree = None,
        *,
        step: int | None = None,
        restore_state: str = "all",
        **how: Any,
    ) -> Restored:
        """(adapted params, state, metadata) of a step, by default of the last that can
        be read: one that is damaged is skipped, with a `CheckpointWarning`.

        state_like: a tree of the structure that was saved, such as a fresh
        `tx.init(trainable)`; its arrays' shapes, dtypes and shardings are used.  Or a
        function that makes it of the restored parameters, where their shapes are known
        only then (after `jpeft.compact` or `jpeft.sparsify`).
        restore_state: "all" wants that structure; "matching" restores what has the
        same place, shape and dtype and leaves the rest as in `state_like` (an
        optimiser that changed); "none" leaves all of it (an adapter to serve, a new
        optimiser).
        how: shardings=, check=, allow=, names=, as `jpeft.load` takes them.

        The result says in `.step` which one it is, in `.skipped` which newer ones could
        not be read, and why, in `.fresh` which places of the state were not restored.

        Raises CheckpointError, naming the file or leaf, if no step can be read, for
        another base, another transform than the step's, another state.
        """
        if restore_state not in ("all", "matching", "none"):
            raise ValueError(
                f"restore: restore_state={restore_state!r}: expected "
                '"all", "matching" or "none"'
            )
        folders = self._folders()
        if step is not None:
            if (number := step_number(step)) not in folders:
                raise CheckpointError(
                    f"{self.directory}: no checkpoint of step {number}; there are "
                    f"{self.steps()}"
                )
            tried = [number]
        else:
            tried = sorted(folders, key=self._order, reverse=True)
        skipped: dict[int, str] = {}
        for number in tried:
            crew = Crew(str(self._folder(number)))
            read = lambda n=number: self._read(
                n, base_params, state_like, restore_state, how
            )
            try:
                restored = crew.all(read)
            except DamagedError as error:
                if step is not None:
                    raise
                skipped[number] = str(error)
            else:
                restored.skipped = skipped
                self._warn(restored)
                return restored
        raise CheckpointError(
            f"{self.directory}: no checkpoint"
            + "".join(f"; step {n} cannot be read: {why}" for n, why in skipped.items())
        )

    def close(self) -> None:
        """Nothing is pending: every save is finished when it returns."""

    # --- writing ---------------------------------------------------------------------

    def _described(
        self,
        step: int,
        params: PyTree,
        state: PyTree,
        metadata: Mapping[str, Any] | None,
        statistics: bool,
    ) -> tuple[Fill, str]:
        """What fills the folder of a step, and the text of its last file."""
        moved = self._base.moved(params)
        at = dict(slots(params).items())
        if under := sorted(p for p in moved if is_leaf(at[p])):
            raise CheckpointError(
                f"{self._folder(step)}: the weight under the adapter of {under[0]} is "
                "not as it was at the run's first save, and only adapters are saved; "
                "leave the base as it is, as jpeft.partition does, or begin another "
                "run, after a merge, with a manager and a directory of its own"
            )
        adapter, text = filled(
            *describe(
                params, self.transform, self._base.fingerprint, statistics, moved
            ),
            step=step,
            metadata=None,
        )
        flat = _flat(state)
        arrays = {f"{k:06d}": _as_array(p, x) for k, (p, x) in enumerate(flat)}
        check_alike({f"state{p}": arrays[f"{k:06d}"] for k, (p, _) in enumerate(flat)})
        about = {
            "step": step,
            "saved": 1 + max((self._saved(n) or 0 for n in self.steps()), default=0),
            "adapter": json.loads(text)[DIGEST],
            "paths": [p for p, _ in flat],
            "digests": digests({n: words(x) for n, x in arrays.items()}),
            "arrays": {
                n: {"shape": list(x.shape), "dtype": str(x.dtype)}
                for n, x in arrays.items()
            },
            "metadata": metadata_of(metadata),
        }

        def fill(folder: Folder) -> None:
            if is_first():
                (folder / ADAPTER).mkdir(parents=True, exist_ok=True)
                write_text(folder / ADAPTER / MANIFEST, text)
            adapter(folder / ADAPTER)
            _orbax.write(folder / STATE, arrays)

        return fill, seal(about)

    def _prune(self, written: int) -> None:
        if self.max_to_keep is None:
            return
        others = [n for n in self.steps() if n != written]
        others.sort(key=self._order, reverse=True)
        for step in others[self.max_to_keep - 1 :]:
            try:
                remove_folder(self._folder(step), STEP)
            except OSError as error:  # the step that was written is there
                warnings.warn(
                    f"{self._folder(step)}: cannot be deleted: {error}",
                    CheckpointWarning,
                    stacklevel=3,
                )

    def _sweep(self) -> None:
        sweep(self.directory)
        if not is_first():
            return
        for name in listed(self.directory):
            if (match := _FORMER.fullmatch(name)) is None:
                continue
            left, home = self.directory / name, self._folder(int(match["step"]))
            # Cut short between its two renames, it is the only copy there is.
            whole = name.endswith(".old") and all(
                (left / s).is_file() for s in STEP.signs
            )
            with contextlib.suppress(OSError):
                if whole and not home.exists():
                    left.rename(home)
                else:
                    remove_folder(left, STEP)

    # --- reading ---------------------------------------------------------------------

    def _folder(self, step: int) -> Folder:
        return self.directory / f"{step:08d}"

    def _folders(self) -> list[int]:
        """Every step that has a folder with anything in it, finished or not."""
        names = [n for n in listed(self.directory) if n.isascii() and n.isdigit()]
        steps = [int(n) for n in names if n == f"{int(n):08d}"]
        return sorted(n for n in steps if _is_filled(find_folder(self._folder(n))))

    def _is_finished(self, step: int) -> bool:
        return self._saved(step) is not None

    def _order(self, step: int) -> tuple[float, int]:
        """When a step was saved.  One that does not say so is looked at first."""
        saved = self._saved(step)
        return math.inf if saved is None else saved, step

    def _saved(self, step: int) -> int | None:
        """The how manieth save of the run it was; None if it does not say so."""
        try:
            with (find_folder(self._folder(step)) / ABOUT).open("rb") as file:
                head = file.read(_HEAD)
        except OSError:
            return None
        if match := _SAVED.search(head):
            return int(match[1])
        return 0 if head.startswith(_UNSEALED_HEAD) else None

    def _read(
        self,
        step: int,
        base_params: PyTree,
        like: PyTree,
        restore_state: str,
        how: Mapping[str, Any],
    ) -> Restored:
        for _ in range(_TRIES):
            folder = find_folder(self._folder(step))
            before = _bytes(folder / ABOUT)
            try:
                restored = self._read_once(
                    folder, step, base_params, like, restore_state, how
                )
            except DamagedError:
                if _bytes(folder / ABOUT) == before:
                    raise
            else:
                if _bytes(folder / ABOUT) == before:
                    return restored
        raise DamagedError(f"{self._folder(step)}: was replaced each time it was read")

    def _read_once(
        self,
        folder: Folder,
        step: int,
        base_params: PyTree,
        like: PyTree,
        restore_state: str,
        how: Mapping[str, Any],
    ) -> Restored:
        about = unseal(folder / ABOUT, unsealed=lambda x: set(x) == _UNSEALED)
        _check_about(folder / ABOUT, about)
        manifest = read_manifest(folder / ADAPTER)
        for file, told in (
            (folder / ABOUT, about.get("step", step)),
            (folder / ADAPTER / MANIFEST, manifest.get("step", step)),
        ):
            if told != step:
                raise DamagedError(
                    f"{file}: says that it is of step {told}, and lies in the folder "
                    f"of step {step}"
                )
        if about.get("adapter", manifest.get(DIGEST)) != manifest.get(DIGEST):
            raise DamagedError(
                f"{folder / ABOUT}: was saved with another adapter than the one in "
                f"{folder / ADAPTER / MANIFEST}"
            )
        _check_transform(folder, manifest, self.transform)
        params = load(folder / ADAPTER, base_params, **how)
        if callable(like):
            like = like(params)
        state, fresh = _state(folder, about, like, restore_state)
        if manifest["version"] > 1 and not how.keys() - {"shardings"}:
            self._base = Watch(manifest["base"])
            own = manifest.get("statistics", {})
            self._base.remember(
                {p: x for p, x in base_weights(params).items() if p not in own}
            )
        restored = Restored(params, state, about["metadata"])
        restored.step, restored.fresh = step, fresh
        return restored

    def _warn(self, restored: Restored) -> None:
        if restored.skipped:
            why = "; ".join(f"step {n}: {w}" for n, w in restored.skipped.items())
            warnings.warn(
                f"{self.directory}: step {restored.step} is restored, since newer ones "
                f"cannot be read: {why}",
                CheckpointWarning,
                stacklevel=3,
            )


# --- the state -----------------------------------------------------------------------


def _state(
    folder: Folder, about: Mapping[str, Any], like: PyTree, restore_state: str
) -> tuple[PyTree, tuple[str, ...]]:
    """The saved state in the places of `like`, and which of these it did not have."""
    flat = _flat(like)
    if restore_state == "none":
        return like, tuple(p for p, _ in flat)
    named = {p: f"{k:06d}" for k, p in enumerate(about["paths"])}
    if restore_state == "all" and [p for p, _ in flat] != about["paths"]:
        odd = sorted({p for p, _ in flat} ^ set(named)) or ["their order"]
        raise CheckpointError(
            f"{folder}: the saved state has another structure: {odd[:3]} differ; build "
            "the optimiser as in the run that saved it, or pass "
            'restore_state="matching" for what is alike, restore_state="none" for the '
            "adapter alone"
        )
    wanted: dict[str, Any] = {}
    for path, x in flat:
        if path not in named:
            continue
        saved, here = about["arrays"][named[path]], _as_array(path, x)
        if saved == {"shape": list(here.shape), "dtype": str(here.dtype)}:
            wanted[path] = here
        elif restore_state == "all":
            raise CheckpointError(
                f"{folder}: state{path} was saved as {saved['dtype']}{saved['shape']}, "
                f"here it is {here.dtype}{list(here.shape)}; build the optimiser as in "
                'the run that saved it, or pass restore_state="matching" for what is '
                'alike, restore_state="none" for the adapter alone'
            )
    abstract = {
        named[p]: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_place(x))
        for p, x in wanted.items()
    }
    spelled = {n: f"state{p}" for p, n in named.items()}
    arrays = _orbax.read(folder / STATE, abstract, spelled.__getitem__)
    # Files without a digest of their own have one of a number's lower half.
    as_saved = {n: words(x) for n, x in arrays.items()} if DIGEST in about else arrays
    for name, digest in digests(as_saved).items():
        if digest != about["digests"][name]:
            raise DamagedError(
                f"{folder / STATE}: {spelled[name]} is damaged: its bits differ from "
                "those saved"
            )
    new = [_as_was(arrays[named[p]], x) if p in wanted else x for p, x in flat]
    fresh = tuple(p for p, _ in flat if p not in wanted)
    return jax.tree.unflatten(jax.tree.structure(like), new), fresh


def _check_about(file: Folder, about: Mapping[str, Any]) -> None:
    """Raises DamagedError unless everything is of the type that it is used as."""
    kinds = {"paths": list, "digests": dict, "arrays": dict, "metadata": dict}
    for name, kind in kinds.items():
        if not isinstance(about.get(name), kind):
            raise DamagedError(
                f"{file}: damaged: {name}: expected a {kind.__name__}, found "
                f"{str(about.get(name))[:60]!r}"
            )
    for k, path in enumerate(about["paths"]):
        name = f"{k:06d}"
        if not (
            isinstance(path, str)
            and isinstance(about["arrays"].get(name), dict)
            and {"shape", "dtype"} <= set(about["arrays"][name])
            and isinstance(about["digests"].get(name), str)
        ):
            raise DamagedError(f"{file}: damaged: state{path} is not described")


def _flat(tree: PyTree) -> list[tuple[str, Any]]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(p) + _key_kind(x), x) for p, x in flat]


def _key_kind(x: Any) -> str:
    """A key's kind is part of its place: its words mean nothing to another kind."""
    return f":{x.dtype}" if compat.is_key_array(x) else ""


def _as_array(path: str, x: Any) -> Any:
    if compat.is_key_array(x):
        return jax.random.key_data(x)
    if isinstance(x, (jax.Array, np.ndarray)):
        return x
    if isinstance(x, (bool, int, float, complex, np.generic)):
        return np.asarray(x)
    raise TypeError(f"state{path}: expected an array, got {type(x).__name__}")


def _place(x: Any) -> Any:
    return x.sharding if isinstance(x, jax.Array) else None


def _as_was(x: Any, like: Any) -> Any:
    if compat.is_key_array(like):
        return jax.random.wrap_key_data(x, impl=jax.random.key_impl(like))
    return x


# --- what is refused -----------------------------------------------------------------


def _check_transform(
    folder: Folder, manifest: Mapping[str, Any], transform: Transform
) -> None:
    """Raises where `save` would, after the training, for this manager's transform."""
    known, stored, foreign = transform.origins(), set(), []
    for path, described in manifest["leaves"].items():
        for layer in described:
            static = layer["static"]
            if "holds" in layer:
                stored.add((static.get("format"), static.get("block_size")))
            elif static.get("origin") not in known:
                foreign.append(path)
    unused = [
        t
        for t in transform.parts()
        if isinstance(t, Quantize) and (t.format, t.block_size) not in stored
    ]
    if not foreign and not unused:
        return
    here = json.loads(json.dumps(transform.describe()))
    told = _differences(manifest["transform"], here) or ["what it selects"]
    what = foreign[0] if foreign else "the base"
    raise CheckpointError(
        f"{folder}: {what} was made by another transform than this manager's: "
        f"{'; '.join(told[:4])}; give the manager the transform of that run, or begin "
        "another run in a directory of its own"
    )


def _differences(saved: Any, here: Any, at: str = "") -> list[str]:
    """Where two configurations differ, each as `place: saved ..., here ...`."""
    if isinstance(saved, list) and isinstance(here, list) and len(saved) == len(here):
        saved, here = dict(enumerate(saved)), dict(enumerate(here))
    if not (isinstance(saved, dict) and isinstance(here, dict)):
        return (
            [] if saved == here else [f"{at}: saved {saved!r:.60}, here {here!r:.60}"]
        )
    keys = dict.fromkeys([*saved, *here])
    lists = [
        _differences(saved.get(k), here.get(k), f"{at}.{k}" if at else str(k))
        for k in keys
    ]
    return [x for found in lists for x in found]


def _is_filled(folder: Folder) -> bool:
    try:
        return any(folder.iterdir())
    except OSError:  # another process has just deleted it
        return False


def _bytes(file: Folder) -> bytes | None:
    try:
        return file.read_bytes()
    except OSError:
        return None
