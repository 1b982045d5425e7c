"""A QLoRA step on four TPUs, by the real compiler: kernels, and codes on the wires."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason='the TPU compiler is not installed: pip install "jax[tpu]"',
    ),
]


@pytest.fixture(scope="module")
def programs():
    """{(cut, kind, declared): what was found in the compiled step}."""
    python_path = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/kernels/_compile_tpu_mesh.py")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, python_path))},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {(x["cut"], x["kind"], x["declared"]): x for x in lines}


def matrices(arrays, *dtypes):
    """The gathered arrays of that dtype with a weight's two axes."""
    found = []
    for array in arrays:
        dtype, shape = re.fullmatch(r"(\w+)\[([\d,]*)\]", array).groups()
        sizes = [int(n) for n in shape.split(",") if n and int(n) > 3]
        if dtype in dtypes and len(sizes) == 2 and min(sizes) >= 256:
            found.append(array)
    return found


def test_every_way_to_cut_it_compiles(programs):
    assert {k: x["error"] for k, x in programs.items() if "error" in x} == {}
    assert len(programs) == 7


@pytest.mark.parametrize("cut", ["fully sharded", "both"])
def test_where_weights_are_declared_codes_are_gathered(programs, cut):
    gathered = programs[cut, "Auto", True]["gathered"]
    assert matrices(gathered, "u8") and not matrices(gathered, "bf16", "f32")


def test_where_shardings_are_types_codes_are_gathered(programs):
    gathered = programs["fully sharded", "Explicit", False]["gathered"]
    assert matrices(gathered, "u8") and not matrices(gathered, "bf16", "f32")


@pytest.mark.parametrize("declared", [True, False])
def test_tensor_parallel_weights_stay_where_they_are(programs, declared):
    gathered = programs["tensor parallel", "Auto", declared]["gathered"]
    assert matrices(gathered, "u8", "bf16", "f32") == []


def test_each_chip_runs_kernels_on_its_part(programs):
    for (cut, kind, declared), found in programs.items():
        known = declared or kind == "Explicit"
        assert (found["kernels"] > 0) == known, (cut, kind, declared)
