"""Several processes that save and restore one run."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "processes.py"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def told(tmp_path_factory, count=2):
    """What each process found, by what was asked of it."""
    directory = tmp_path_factory.mktemp("processes")
    whats = ("loop", "local", "fails-text", "fails-rename", "differs")
    for what in whats:
        (directory / what).mkdir()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = os.environ | {"PYTHONPATH": str(SCRIPT.parents[2])}
    argv = [sys.executable, str(SCRIPT), str(port), str(count)]
    run = [
        subprocess.Popen(
            [*argv, str(k), str(directory), *whats],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for k in range(count)
    ]
    try:
        found = [p.communicate(timeout=900) for p in run]
    finally:
        for p in run:
            p.kill()
    # Gloo writes lines of its own.
    lines = [[x for x in out.splitlines() if x.startswith("{")] for out, _ in found]
    assert all(lines), "\n".join(err[-3000:] for _, err in found)
    each = [json.loads(x[0]) for x in lines]
    return {what: [found[what] for found in each] for what in whats}


def test_the_state_of_the_readme_loop_is_saved_and_comes_back(told):
    """Optax' count and a key belong to each process alone."""
    for found in told["loop"]:
        assert found["steps"] == [2] and found["fallen"] == 2


def test_a_model_that_each_process_has_to_itself_is_saved_once(told):
    for found in told["local"]:
        assert "dense:kernel:0:a is not the same in all 2" in found["error"]
        assert found["names"] == ["a"]


@pytest.mark.parametrize("where", ["text", "rename"])
def test_a_process_that_fails_does_not_hang_the_others(where, told):
    one, other = told[f"fails-{where}"]
    assert "00000002: cannot be written: No space left" in one["error"]
    assert "process 0 of 2 failed" in other["error"]
    for found in (one, other):
        assert found["seconds"] < 60
        assert found["steps"] == [1, 3] and found["names"] == ["00000001", "00000003"]


def test_what_differs_from_process_to_process_is_refused_by_name(told):
    first, second = told["differs"]
    for found in (first, second):
        assert "state['key']" in found["error"] and "fold_in" in found["error"]
    # All fall back to an older step, or none does.
    assert first["kinds"] == ["DamagedError", "CheckpointError", "ValueError"]
    assert second["kinds"] == ["DamagedError", "CheckpointError", "CheckpointError"]
