"""Kills processes that save, and looks at what is there afterwards.

    python kills.py random 200      at random moments
    python kills.py points          before each change that Python makes to the disk

Prints what it counted, as JSON.  Every process that saves is forked from this one,
which has imported JAX and never used it; one more looks at what they leave.
"""

import itertools
import json
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":  # and not where pytest looks for doctests
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"

import jax  # noqa: E402
import numpy as np  # noqa: E402

import jpeft  # noqa: E402
from jpeft.checkpoint import folder  # noqa: E402

BASE = {"dense": {"kernel": np.arange(15, dtype=np.float32).reshape(5, 3)}}
PEFT = jpeft.lora(rank=2)
LIKE = {"count": np.int32(0)}


def of_step(params, step):
    leaf = params["dense"]["kernel"]
    return {"dense": {"kernel": leaf.replace(b=np.full((2, 3), step, np.float32))}}


def step_of(params):
    return float(np.asarray(params["dense"]["kernel"].b)[0, 0])


# --- the processes that save ---------------------------------------------------------


class Saver:
    """One way to save `number`, and what must be there when it was cut short."""

    def __init__(self, directory, params):
        self.directory, self.params = Path(directory), params

    def manager(self):
        return jpeft.CheckpointManager(self.directory, PEFT, max_to_keep=2)

    def save(self, number, step=None):
        self.manager().save(
            number if step is None else step,
            of_step(self.params, number),
            state={"count": np.int32(number)},
            metadata={"number": number},
        )

    def step(self, number):
        return number

    def found(self, finished):
        """{what was lost, does not load or was left: how many}."""
        manager, bad = self.manager(), {}
        listed = manager.steps()
        bad["left"] = len({*os.listdir(self.directory)} - {f"{s:08d}" for s in listed})
        loaded = set()
        for step in listed:
            try:
                params, state, metadata = manager.restore(BASE, LIKE, step=step)
            except Exception as error:
                print(repr(error), file=sys.stderr)
                bad["unloadable"] = bad.get("unloadable", 0) + 1
                continue
            number = metadata["number"]
            if not number == step_of(params) == int(state["count"]):
                bad["mixed"] = bad.get("mixed", 0) + 1
            loaded.add(number)
        bad["lost"] = self.lost(loaded, finished)
        return bad

    def lost(self, loaded, finished):
        # The last two, or, where the next was written before the kill, the last one.
        last = max(finished)
        former = {x for x in finished if x == last - 1}
        gone = 0 if last in loaded else 1
        return gone + (0 if former <= loaded or last + 1 in loaded else 1)


class Again(Saver):
    """The same step, saved again and again."""

    def save(self, number):
        super().save(number, step=1)

    def lost(self, loaded, finished):
        return int(not {max(finished), max(finished) + 1} & loaded)


class Overwritten(Saver):
    """An adapter, by `save(overwrite=True)`."""

    def save(self, number):
        params = of_step(self.params, number)
        jpeft.save(self.directory / "ad", params, PEFT, overwrite=True)

    def found(self, finished):
        bad = {"lost": 0}
        try:
            number = step_of(jpeft.load(self.directory / "ad", BASE))
            bad["lost"] = int(number not in (max(finished), max(finished) + 1))
        except Exception as error:
            print(repr(error), file=sys.stderr)
            bad["unloadable"] = 1
        jpeft.save(self.directory / "other", of_step(self.params, 0), PEFT)
        shutil.rmtree(self.directory / "other")
        bad["left"] = len({*os.listdir(self.directory)} - {"ad"})
        return bad


KINDS = {x.__name__: x for x in (Saver, Again, Overwritten)}


def kill_before(change, directory):
    """Ends this process before it changes the disk for the so many-th time."""
    changes = itertools.count(1)

    def count():
        if next(changes) == change:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event, args):
        if event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir") or (
            event == "open" and isinstance(args[2], int) and args[2] & os.O_ACCMODE
        ):
            here = [os.fspath(x) for x in args[:2] if isinstance(x, (str, os.PathLike))]
            if event in ("os.remove", "os.rmdir") or any(
                x.startswith(directory) for x in here
            ):
                count()

    sys.addaudithook(hook)
    exchange = folder._exchange_at_once
    folder._exchange_at_once = lambda *x: (count(), exchange(*x))[1]


def forked(work):
    """A process that does it; its id, and a file of what it writes."""
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        code = 1
        try:
            os.close(read)
            work(lambda text: os.write(write, f"{text}\n".encode()))
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    return pid, os.fdopen(read)


class Looker:
    """A process that looks at what others left, so that JAX is started once for all."""

    def __init__(self, params):
        self.theirs, self.ours = os.pipe()

        def look(tell):
            for line in os.fdopen(self.theirs):
                kind, directory, finished = json.loads(line)
                tell(json.dumps(KINDS[kind](directory, params).found(finished)))

        self.pid, self.answers = forked(look)

    def __call__(self, saver, finished):
        asked = type(saver).__name__, str(saver.directory), finished
        os.write(self.ours, f"{json.dumps(asked)}\n".encode())
        return json.loads(self.answers.readline())

    def end(self):
        os.kill(self.pid, signal.SIGKILL)


# --- when they are killed ------------------------------------------------------------


def at_random(count, params, total, look):
    draw = random.Random(0)
    for kind, share in ((Saver, 2), (Again, 4), (Overwritten, 4)):
        finished = []
        with tempfile.TemporaryDirectory() as directory:
            saver = kind(directory, params)
            for _ in range(count // share):
                begin = max(finished, default=0) + 1

                def save(tell, saver=saver, first=begin):
                    for number in itertools.count(first):
                        saver.save(number)
                        tell(number)

                pid, told = forked(save)
                finished.append(int(told.readline()))  # programs are compiled by now
                time.sleep(draw.uniform(0, 0.15))
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                finished += [int(x) for x in told.read().split()]
                left = os.listdir(directory)
                total["with left-overs"] += any(".jpeft-" in x for x in left)
                add(total, look(saver, finished))


def at_points(params, total, look):
    for kind in (Saver, Again, Overwritten):
        with tempfile.TemporaryDirectory() as prepared:
            saver = kind(prepared, params)

            def prepare(_, saver=saver):
                saver.save(1)
                saver.save(2)

            pid, _ = forked(prepare)
            assert os.waitpid(pid, 0)[1] == 0
            for change in itertools.count(1):
                with tempfile.TemporaryDirectory() as directory:
                    shutil.copytree(prepared, directory, dirs_exist_ok=True)
                    saver = kind(directory, params)

                    def save(_, saver=saver, change=change):
                        kill_before(change, str(saver.directory))
                        saver.save(3)

                    pid, _ = forked(save)
                    if os.waitpid(pid, 0)[1] == 0:  # it was done before
                        break
                    left = os.listdir(directory)
                    total["with left-overs"] += any(".jpeft-" in x for x in left)
                    add(total, look(saver, [1, 2]))


def add(total, bad):
    total["kills"] += 1
    for name, n in bad.items():
        total[name] = total.get(name, 0) + n


def main(what, count="200"):
    def attach(_):
        params = PEFT(jax.random.key(0), jax.tree.map(jax.numpy.asarray, BASE))
        with open(file, "wb") as out:
            pickle.dump(jax.tree.map(np.asarray, params), out)

    with tempfile.TemporaryDirectory() as scratch:
        file = os.path.join(scratch, "params")
        pid, _ = forked(attach)
        os.waitpid(pid, 0)
        params = pickle.loads(Path(file).read_bytes())
    total = dict.fromkeys(("kills", "with left-overs", "lost", "unloadable"), 0)
    look = Looker(params)
    try:
        if what == "random":
            at_random(int(count), params, total, look)
        else:
            at_points(params, total, look)
    finally:
        look.end()
    print(json.dumps(total))


if __name__ == "__main__":
    main(*sys.argv[1:])
