"""The table of seeds, over runs that a script wrote."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import compare_seeds
import pytest

KL = {0: [0.0, 0.3, 0.1], 1: [0.0, 0.2, 0.4]}


@pytest.fixture
def calls(monkeypatch):
    """The commands that were called; a script that ends with `code` writes its run."""
    made = SimpleNamespace(argv=[], code={})

    def run(argv):
        option = lambda name: argv[argv.index(name) + 1]
        seed, out = int(option("--seed")), Path(option("--out"))
        made.argv.append(argv[1:])
        code = made.code.get(seed, 0)
        out.mkdir(parents=True, exist_ok=True)
        rounds = [
            {"kind": "train", "step": k + 1, "kl": kl, "reward": 0.1 * k}
            for k, kl in enumerate(KL[seed])
        ]
        lines = [*rounds, {"kind": "evaluate", "step": 3, "reward": 0.5}]
        (out / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        if code == 0:
            found = {"before": {"reward": 0.125}, "after": {"reward": 0.5 + seed}}
            (out / "metrics.json").write_text(json.dumps(found))
        return SimpleNamespace(returncode=code)

    monkeypatch.setattr(subprocess, "run", run)
    return made


def command(out, *more):
    argv = ["--scripts", "ppo", "--seeds", "0", "1", "--out", str(out), *more]
    return compare_seeds.main(argv)


def test_a_row_has_the_reward_before_and_after_and_the_largest_kl(
    calls, tmp_path, capsys
):
    picture, table = tmp_path / "curves.png", tmp_path / "table.md"
    options = ["--plot", str(picture), "--markdown", str(table), "--steps", "3"]
    assert command(tmp_path, *options) == 0
    text = capsys.readouterr().out
    assert table.read_text() == text and picture.stat().st_size > 1000
    assert "| `ppo.py` | 0 | 0.125 | 0.500 | 0.100 | 0.300 |" in text
    assert "| `ppo.py` | 1 | 0.125 | 1.500 | 0.400 | 0.400 |" in text
    assert [argv[-2:] for argv in calls.argv] == [["--steps", "3"]] * 2


def test_what_ended_is_kept_and_what_was_interrupted_goes_on(calls, tmp_path):
    calls.code = {1: 130}
    assert command(tmp_path) == 130
    calls.code, calls.argv = {}, []
    assert command(tmp_path) == 0
    [argv] = calls.argv
    assert "--resume" in argv and argv[argv.index("--seed") + 1] == "1"


def test_a_run_that_fails_leaves_the_others(calls, tmp_path, capsys):
    calls.code = {0: 1}
    assert command(tmp_path) == 1
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == 1 and rows[0].startswith("| `ppo.py` | 1 |")
