"""Runs of a script, each of which happens once: in this process, or in several.

What a run found is kept in a file, by the recipe, the seed and the options, so that a
command that was interrupted continues.  (A change of jpeft itself is not noticed.)
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import multiprocessing.connection
import os
import platform
import signal
import sys
import tempfile
import threading
import traceback
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import _compare
import _recipe
import _runs
import finetune
import jax
from safetensors import SafetensorError

REFUSED = (
    ValueError,
    OSError,
    SafetensorError,
)  # what input that cannot be used raises
# Of a worker, unless the user has set it.
ENVIRONMENT = {
    # The first worker would take most of a GPU's memory and leave too little.
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "TQDM_DISABLE": "1",  # the bars of several would be drawn over each other
}
# Never forked: JAX has threads, and a fork keeps their locks but not the threads.
SPAWN = multiprocessing.get_context("spawn")

_timing: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()


@dataclasses.dataclass(frozen=True)
class Task:
    """A run of a script, and what is asked of it.

    name: for the reader.
    file: how the name of its file begins.
    argv: options of the script.
    find: a function of a module, so that another process finds it by its name.
    kind: the dataclass that ``find`` gives.
    """

    name: str
    file: str
    argv: tuple[str, ...]
    find: Callable[[Any], Any]
    kind: Callable[..., Any]
    script: _compare.Script = _compare.FINETUNE


class Refused(_runs.Failed):
    """The model cannot take the recipe."""


class Runs:
    """What tasks find: from their files below ``folder``, or by running them.

    Entered, it may start processes; left, it has ended them.
    jobs: 1 runs the tasks here, more in so many processes.
    """

    def __init__(self, folder: Path, jobs: int = 1) -> None:
        self.folder, self.jobs = folder, jobs
        self._workers: dict[multiprocessing.connection.Connection, Any] = {}
        self._machine = ""

    def __enter__(self) -> Runs:
        # Not each worker's own: one that is ended cleans nothing up.
        self._scratch = tempfile.TemporaryDirectory()
        self._lock = SPAWN.Lock() if self.jobs > 1 else None
        return self

    def __exit__(self, *_: Any) -> None:
        for process in self._workers.values():
            process.terminate()
        for process in self._workers.values():
            process.join()
        self._scratch.cleanup()

    def each(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Any]]:
        """Every task with what it finds, or with the Failed that it ended with.

        In their order if they run here, else as they are ready.
        """
        missing: deque[Task] = deque()
        for task in tasks:
            if (found := _kept(task, self.folder)) is not None:
                yield task, found
            elif self.jobs == 1:
                yield task, _run(task, self.folder, self._scratch.name)
            else:
                missing.append(task)
        if missing:
            yield from self._spread(missing)

    def machine(self) -> str:
        """Where the figures come from."""
        # Asked of a worker if there is one: this process leaves a GPU alone.
        return self._machine or _compare.machine()

    def _spread(self, waiting: deque[Task]) -> Iterator[tuple[Task, Any]]:
        self._start(min(self.jobs, len(waiting)) - len(self._workers))
        idle, busy = list(self._workers), {}
        while waiting or busy:
            while waiting and idle:
                pipe = idle.pop()
                busy[pipe] = waiting.popleft()
                pipe.send(busy[pipe])
            for pipe in multiprocessing.connection.wait(list(busy)):
                task = busy.pop(pipe)
                try:
                    found, self._machine = pipe.recv()
                except EOFError:
                    process = self._workers[pipe]
                    process.join()
                    raise RuntimeError(
                        f"{task.name}: its process ended with code {process.exitcode}"
                    ) from None
                if isinstance(found, ValueError | RuntimeError):
                    raise found
                idle.append(pipe)
                yield task, found

    def _start(self, count: int) -> None:
        with _inherited():
            for _ in range(count):
                ours, theirs = SPAWN.Pipe()
                given = theirs, self.folder, self._scratch.name, self._lock
                process = SPAWN.Process(target=_work, args=given, daemon=True)
                process.start()
                theirs.close()  # so that the worker's is the only one: its end shows
                self._workers[ours] = process


@contextlib.contextmanager
def _inherited() -> Iterator[None]:
    """What processes that start meanwhile have from their first moment."""
    new = {k: v for k, v in ENVIRONMENT.items() if k not in os.environ}
    os.environ.update(new)
    # A terminal sends Ctrl-C to all of them; it is for the first, which ends the rest.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        for name in new:
            del os.environ[name]


# --- in a worker ---------------------------------------------------------------------


def _work(
    pipe: multiprocessing.connection.Connection, folder: Path, scratch: str, lock: Any
) -> None:
    """Takes one task after the other, until it is ended."""
    global _timing
    _timing = lock
    # Its own lock is one between processes, which whoever is ended leaves behind.
    finetune.tqdm.set_lock(threading.RLock())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        pipe.send(_answer(pipe.recv(), folder, scratch))


def _end_with_parent() -> None:
    # A parent that was killed ends nothing.
    multiprocessing.parent_process().join()  # type: ignore[union-attr]
    os._exit(1)


def _answer(task: Task, folder: Path, scratch: str) -> tuple[Any, str]:
    """What is found, or an error that names the task; and on which machine."""
    try:
        return _run(task, folder, scratch), _compare.machine()
    except REFUSED as error:
        return ValueError(f"{task.name}: {error}"), ""
    except Exception:
        # As text: not every exception can be sent to another process.
        return RuntimeError(f"{task.name}:\n{traceback.format_exc()}"), ""


# --- one run -------------------------------------------------------------------------


def timing() -> contextlib.AbstractContextManager[Any]:
    """Entered by one worker at a time."""
    return _timing


def prepare(
    argv: Sequence[str], out: str, script: _compare.Script = _compare.FINETUNE
) -> Any:
    """The script's run up to its first step."""
    return script.prepare(script.parser().parse_args([*argv, "--out", out]))


def _run(task: Task, folder: Path, scratch: str) -> Any:
    """Runs it, and keeps what it finds; Failed is given back."""
    settings = settings_of(task.argv, task.script)
    # Checkpoints are a part of training, and of no use afterwards.
    with tempfile.TemporaryDirectory(dir=scratch) as out:
        try:
            run = prepare(task.argv, out, task.script)
            run.name = task.name  # on the progress bar
            found = task.find(run)
        # Given back without their frames, which hold arrays.
        except _runs.Unattachable as error:
            return Refused(str(error))
        except _runs.Failed as error:
            return _runs.Failed(str(error))
    jax.clear_caches()  # the programs of a method are of no use to the next
    folder.mkdir(parents=True, exist_ok=True)
    path = _path(task, folder, settings)
    values = {"settings": settings, "found": dataclasses.asdict(found)}
    _runs.write_json(path, values)
    return found


# --- what is kept --------------------------------------------------------------------


def _kept(task: Task, folder: Path) -> Any:
    """What it found earlier, or None."""
    path = _path(task, folder, settings_of(task.argv, task.script))
    if not path.is_file():
        return None
    try:
        return task.kind(**json.loads(path.read_text(encoding="utf-8"))["found"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} holds no result ({error}); delete it to measure again"
        ) from error


def _path(task: Task, folder: Path, settings: dict[str, Any]) -> Path:
    mark = zlib.crc32(json.dumps(settings, sort_keys=True).encode())
    return folder / f"{task.file}-{mark:08x}.json"


def settings_of(
    argv: Sequence[str], script: _compare.Script = _compare.FINETUNE
) -> dict[str, Any]:
    """All that a result depends on, as plain data."""
    args = script.parser().parse_args(argv)
    peft, train = _recipe.read(_recipe.find(args.config), vars(args), script.kind)
    choices = [*script.choices]
    if getattr(args, "validate", None) is not None:
        choices.append("validate")
    return {
        "peft": peft.to_config(),
        "train": dataclasses.asdict(train),
        "data": _stamp(args.data),
        "eval": _stamp(args.eval),
        "base": _stamp(args.base or script.base()),
        **{name: getattr(args, name) for name in choices},
        "jax": jax.__version__,
        "python": platform.python_version(),  # its docstrings are the default data
    }


def _stamp(path: Path | None) -> list[Any] | None:
    """Tells a file, or those of a folder, from later ones in the same place."""
    if path is None:
        return None
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    stats = [(x.name, x.stat()) for x in files if x.is_file()]
    return [str(path.resolve()), *([n, s.st_size, s.st_mtime_ns] for n, s in stats)]


# --- the command ---------------------------------------------------------------------


def exit_code(work: Callable[[], int], out: Path) -> int:
    """What ``work`` gives; 2 for input that cannot be used, 130 if interrupted."""
    try:
        with _runs.sigterm_as_ctrl_c():
            return work()
    except REFUSED as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = f"what was found is in {out}; the same command continues"
        print(f"\ninterrupted; {kept}", file=sys.stderr)
        return 130
