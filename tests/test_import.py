"""`import jpeft` imports what it needs: little beside JAX and Flax's Linen."""

import subprocess
import sys

# Each is imported when something of it is first used.
LATE = ("orbax", "tensorstore", "matplotlib", "gguf", "optax", "flax.nnx")
PALLAS = "jax.experimental.pallas.tpu"
# Rooms that a program may never enter; the roof imports them when it is asked for them.
ROOMS = ("checkpoint", "hf", "objectives", "optim", "plot")


def printed(program):
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_what_may_never_be_used_is_imported_late(tmp_path):
    program = f"""
import sys, jax, jpeft
found = lambda: [n for n in {(*LATE, PALLAS)!r} if n in sys.modules]
print(*found(), "|")
params = jpeft.lora(2)(jax.random.key(0), {{"kernel": jax.numpy.ones((64, 5))}})
jpeft.adapt(lambda p, x: x @ p["kernel"])(params, jax.numpy.ones((2, 64)))
print(*found(), "|")
jpeft.quantize("nf4")(jax.random.key(0), {{"kernel": jax.numpy.ones((64, 5))}})
print(*found(), "|")
jpeft.save({str(tmp_path / "adapter")!r}, params, jpeft.lora(2))
print(*(n for n in found() if n in ("orbax", "tensorstore")), "|")
from flax import nnx
p = nnx.Param(jax.numpy.ones((3, 5)))
print(jpeft.lora(2)(jax.random.key(0), {{"kernel": p}})["kernel"].a.shape)
"""
    parts = " ".join(printed(program)).split("|")
    assert [p.split() for p in parts[:4]] == [
        [],
        [],
        [PALLAS],
        ["orbax", "tensorstore"],
    ]
    assert parts[4].split() == ["(3,", "2)"]


def test_a_room_is_imported_with_the_first_name_asked_of_it():
    program = f"""
import sys, jpeft
there = lambda: [r for r in {ROOMS!r} if "jpeft." + r in sys.modules]
print(*there(), "|", *("save" in dir(jpeft), "optim" in dir(jpeft)), "|")
jpeft.save, jpeft.optim.lora_plus
print(*there(), "|")
from jpeft import plot, VirtualTokens, CheckpointManager
print(jpeft.plot is plot, hasattr(jpeft, "none"), jpeft.freeze is jpeft.optim.freeze)
"""
    first, listed, second, last = " ".join(printed(program)).split("|")
    assert first.split() == []
    assert listed.split() == ["True", "True"]
    assert second.split() == ["checkpoint", "optim"]
    assert last.split() == ["True", "False", "True"]
