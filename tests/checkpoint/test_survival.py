"""Runs that lose their power or are killed: what was saved is there, whole."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft

KEY = jax.random.key(0)
BASE = {"dense": {"kernel": jnp.arange(15.0).reshape(5, 3)}}
PEFT = jpeft.lora(rank=2)
HERE = Path(__file__).parent


def counted(*argv):
    """What kills.py counted."""
    env = os.environ | {"PYTHONPATH": str(HERE.parents[1])}
    done = subprocess.run(
        [sys.executable, str(HERE / "kills.py"), *argv],
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.slow
def test_kills_at_random_moments_lose_nothing_and_leave_nothing():
    """`python tests/checkpoint/kills.py random 200` kills that often."""
    found, errors = counted("random", "20")
    assert found["kills"] == 20 and found.pop("with left-overs") > 6
    assert found == {"kills": 20, "lost": 0, "unloadable": 0, "left": 0}, errors


@pytest.mark.slow
def test_a_kill_before_any_change_of_the_disk_loses_nothing_and_leaves_nothing():
    """Each change that a save, a replacement and the deletion of a step make."""
    found, errors = counted("points")
    kills = found.pop("kills")
    assert kills > 100 and found.pop("with left-overs") > 0.8 * kills
    assert found == {"lost": 0, "unloadable": 0, "left": 0}, errors


@contextlib.contextmanager
def mounted(image, at):
    at.mkdir(exist_ok=True)
    done = subprocess.run(
        ["mount", "-o", "loop", str(image), str(at)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no loop device here: {done.stderr}")
    try:
        yield at
    finally:
        subprocess.run(["umount", str(at)], check=True)


@pytest.mark.slow
def test_a_loss_of_power_at_any_time_after_a_save_loses_no_step(tmp_path):
    """What a disk holds is the file behind its loop device, without what the system
    has not written to it."""
    if shutil.which("mkfs.ext4") is None or os.geteuid() != 0:
        pytest.skip("needs mkfs.ext4 and the right to mount")
    image, params = tmp_path / "image", PEFT(KEY, BASE)
    with open(image, "wb") as file:
        file.truncate(48 * 2**20)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    copies, keep = {}, (1, 2)
    with mounted(image, tmp_path / "disk") as disk:
        managers = [
            jpeft.CheckpointManager(disk / str(n), PEFT, max_to_keep=n) for n in keep
        ]
        for step in range(1, 5):
            for manager in managers:
                manager.save(step, params, state={"count": jnp.int32(step)})
        jpeft.save(disk / "adapter", params, PEFT)
        jpeft.save(disk / "adapter", params, PEFT, overwrite=True)
        saved = time.monotonic()
        for seconds in (0, 2, 5, 12):
            time.sleep(max(0.0, saved + seconds - time.monotonic()))
            copies[seconds] = tmp_path / f"after {seconds} s"
            shutil.copy(image, copies[seconds])
    for seconds, copy in copies.items():
        with mounted(copy, tmp_path / "again") as disk:
            jpeft.load(disk / "adapter", BASE)
            for n in keep:
                manager = jpeft.CheckpointManager(disk / str(n), PEFT, max_to_keep=n)
                assert manager.steps() == list(range(5 - n, 5)), seconds
                for step in manager.steps():
                    like = {"count": jnp.int32(0)}
                    _, state, _ = manager.restore(BASE, like, step=step)
                    assert int(state["count"]) == step


@pytest.mark.slow
def test_a_full_disk_leaves_the_steps_and_says_so_in_a_sentence(tmp_path, capfd):
    if os.geteuid() != 0:
        pytest.skip("needs the right to mount")
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no tmpfs here")
    try:
        params = PEFT(KEY, BASE)
        manager = jpeft.CheckpointManager(small / "run", PEFT)
        manager.save(1, params, state={"x": np.zeros(9)})
        noise = np.random.default_rng(0).standard_normal(300_000)
        capfd.readouterr()
        for _ in range(2):
            with pytest.raises(jpeft.CheckpointError) as error:
                manager.save(2, params, state={"x": noise})
            text = str(error.value)
            assert "00000002: cannot be written: No space left on device" in text
            assert len(text) < 250
        assert capfd.readouterr().err == ""
        assert os.listdir(small / "run") == ["00000001"]
        manager.save(2, params, state={"x": np.zeros(9)})
        assert manager.restore(BASE, {"x": np.zeros(9)}).step == 2
    finally:
        subprocess.run(["umount", str(small)], check=True)
