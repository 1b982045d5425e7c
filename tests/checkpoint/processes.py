"""One of several processes that save and restore together.

    python processes.py PORT COUNT INDEX DIRECTORY WHAT [WHAT ...]

WHAT, which DIRECTORY has a folder for: "loop", the README's loop with its own state, a
key in it; "local", each process has a model of its own; "fails", one process fails
while the others save; "differs", what each has to itself is not the same in all.
Prints a line of what each found.
"""

import json
import os
import sys
import time
from pathlib import Path

if __name__ == "__main__":  # and not where pytest looks for doctests
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402

import jpeft  # noqa: E402
from jpeft.checkpoint import _orbax, folder  # noqa: E402
from jpeft.checkpoint.processes import Crew  # noqa: E402

PEFT = jpeft.lora(rank=2)
FAILURES = {
    "write": (_orbax, "write"),
    "text": (folder, "write_text"),
    "rename": (folder, "_take_place"),
}


def on_mesh():
    mesh = jax.make_mesh((len(jax.devices()),), ("x",))
    place = NamedSharding(mesh, PartitionSpec(None, "x"))
    kernel = np.arange(64, dtype=np.float32).reshape(8, 8)
    make = lambda at: kernel[at]
    base = {"dense": {"kernel": jax.make_array_from_callback((8, 8), place, make)}}
    return base, jax.jit(lambda base: PEFT(jax.random.key(0), base))(base)


def loop(directory, first):
    base, params = on_mesh()
    trainable, _ = jpeft.partition(params)
    tx = optax.adam(1e-3)
    state = {"opt": tx.init(trainable), "key": jax.random.key(7), "seen": np.int64(3)}
    manager = jpeft.CheckpointManager(directory, PEFT)
    for step in (1, 2, 3, 3):
        manager.save(step, params, state=state)
    like = {"opt": tx.init(trainable), "key": jax.random.key(0), "seen": np.int64(0)}
    restored = manager.restore(base, like)
    from jax.experimental import multihost_utils

    def whole(x):
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        local = not isinstance(x, jax.Array) or x.is_fully_addressable
        return x if local else multihost_utils.process_allgather(x, tiled=True)

    for a, b in zip(
        *map(jax.tree.leaves, ((params, state), restored[:2])), strict=True
    ):
        np.testing.assert_array_equal(whole(a), whole(b))
    for a, b in zip(*map(jax.tree.leaves, (like, restored.state)), strict=True):
        if isinstance(a, jax.Array):
            assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
    if first:  # all fall back
        (Path(directory) / "00000003" / "state.json").write_text("")
    multihost_utils.sync_global_devices("damaged")
    return {"steps": manager.steps(), "fallen": manager.restore(base, like).step}


def local(directory, first):
    """Each process has the whole model to itself."""
    base = {"dense": {"kernel": jnp.arange(64.0).reshape(8, 8)}}
    params = PEFT(jax.random.key(0), base)
    jpeft.save(f"{directory}/a", params, PEFT)
    loaded = jpeft.load(f"{directory}/a", base)
    for a, b in zip(*map(jax.tree.leaves, (loaded, params)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.sharding == b.sharding
    other = PEFT(jax.random.key(int(first)), base)
    try:
        jpeft.save(f"{directory}/b", other, PEFT)
    except ValueError as error:
        return {"error": str(error), "names": sorted(os.listdir(directory))}


def fails(directory, first, where):
    _, params = on_mesh()
    manager = jpeft.CheckpointManager(directory, PEFT)
    manager.save(1, params)
    place, name = FAILURES[where]
    good = getattr(place, name)

    def bad(*_):
        raise OSError(28, "No space left on device")

    if first == (where != "write"):
        setattr(place, name, bad)
    began, error = time.monotonic(), ""
    try:
        manager.save(2, params)
    except jpeft.CheckpointError as raised:
        error = str(raised)
    setattr(place, name, good)
    seconds = time.monotonic() - began
    manager.save(3, params)
    found = {"error": error, "seconds": seconds, "steps": manager.steps()}
    return found | {"names": sorted(os.listdir(directory))}


def differs(directory, first):
    _, params = on_mesh()
    manager = jpeft.CheckpointManager(directory, PEFT)
    found = {"error": "", "kinds": []}
    try:
        manager.save(1, params, state={"key": jax.random.key(int(first))})
    except ValueError as error:
        found["error"] = str(error)

    def bad(kinds):
        if kinds[int(first)]:
            raise kinds[int(first)]("bad")

    damaged, other = jpeft.DamagedError, jpeft.CheckpointError
    for kinds in ((damaged, None), (damaged, other), (None, ValueError), (None, None)):
        try:
            Crew("this").all(lambda kinds=kinds: bad(kinds))
        except ValueError as error:
            found["kinds"].append(type(error).__name__)
    return found


def main(port, count, index, directory, *whats):
    jax.distributed.initialize(f"localhost:{port}", int(count), int(index))
    works = {"loop": loop, "local": local, "fails": fails, "differs": differs}
    found = {}
    for what in whats:
        name, *more = what.split("-")
        found[what] = works[name](f"{directory}/{what}", index == "0", *more)
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
