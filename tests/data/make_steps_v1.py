"""Writes steps_v1.zip: a step of a run, saved by jpeft 0.1.0 at commit e8a33ff, whose
descriptions had no digest of themselves.

    PYTHONPATH=<that commit> python make_steps_v1.py
"""

import shutil
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

import jpeft

base = {
    "dense": {"kernel": jnp.arange(15.0).reshape(5, 3)},
    "head": {"kernel": jnp.ones((3, 2))},
}
peft = jpeft.chain(
    jpeft.lora(rank=2, alpha=4, exclude="head/.*"), jpeft.full("head/.*")
)
state = {
    "count": jnp.int32(3),
    "n": 5,
    "big": np.int64(2**40 + 7),
    "key": jax.random.key(5),
}
with tempfile.TemporaryDirectory() as folder:
    manager = jpeft.CheckpointManager(folder, peft)
    manager.save(7, peft(jax.random.key(0), base), state=state, metadata={"epoch": 1})
    shutil.make_archive("steps_v1", "zip", folder)
