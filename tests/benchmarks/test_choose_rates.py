"""The learning rates of the recipes, over the tiny base of tiny_bert."""

import json

import _compare
import _jobs
import choose_rates
import finetune
import jax
import numpy as np
import pytest
import tiny_bert
from choose_rates import Score

# Fixtures: pytest finds them by name in the module.
as_in_the_command = tiny_bert.as_in_the_command
base, data = tiny_bert.base, tiny_bert.data


@pytest.fixture(scope="module")
def options(base, data, tmp_path_factory):
    """Of a run of 1 step: 51 examples to train on, 13 to score on."""
    held_out = tmp_path_factory.mktemp("eval") / "eval.tsv"
    held_out.write_text("text\tlabel\nwe saw a fish\tfish\n")
    paths = ["--base", str(base), "--data", str(data), "--eval", str(held_out)]
    return [*paths, "--epochs", "1", "--max-train", "64", "--length", "24"]


def command(folder, options, *more):
    argv = ["--methods", "head", "bitfit", "--factors", "2", "0.5", "1", *more]
    argv += ["--out", str(folder / "runs"), "--json", str(folder / "rates.json")]
    return [*argv, "--markdown", str(folder / "rates.md"), *options]


# ------------------------------------------------------------------------------ a run


@pytest.mark.slow
def test_a_run_is_scored_on_a_fifth_of_the_training_examples(options, tmp_path):
    task = choose_rates.task_of("bitfit", 0.5, 1, options)
    run = _jobs.prepare(task.argv, str(tmp_path / "part"))
    whole = _jobs.prepare([*options, "--seed", "1"], str(tmp_path / "whole"))
    rows = lambda x: [tuple(ids) for ids in x.ids.tolist()]
    assert sorted(rows(run.train) + rows(run.held_out)) == sorted(rows(whole.train))
    assert (len(run.train), len(run.held_out)) == (51, 13)
    # A fifth of every class.
    counts = np.bincount(whole.train.labels)
    assert np.abs(np.bincount(run.held_out.labels) - counts / 5).max() <= 0.5
    assert (run.recipe.learning_rate, run.recipe.seed) == (0.5, 1)


def test_the_rate_of_the_head_stays():
    """As the recipe has it, or that of everything else."""
    for name, rate, head in (("lora_plus", 6e-4, 1e-2), ("lora", 8e-3, None)):
        assert choose_rates.rates(name, [1, 2])[1] == rate
        task = choose_rates.task_of(name, rate, 0, [])
        train = _jobs.settings_of(task.argv)["train"]
        assert (train["learning_rate"], train["head_learning_rate"]) == (rate, head)


def test_rates_have_no_digits_of_rounding():
    # 3e-4 * 3 is 0.0008999999999999999.
    assert choose_rates.rates("lora_plus", [3]) == [0.0009]


def test_settings_without_a_validation_part_are_what_they_were(base):
    """Results that compare_methods.py found earlier are still found."""
    argv = ["--base", str(base)]
    assert "validate" not in _jobs.settings_of(argv)
    part = _jobs.settings_of([*argv, "--validate", "0.2"])
    assert part == {**_jobs.settings_of(argv), "validate": 0.2}


# --------------------------------------------------------------------------- choosing


def test_the_best_rate_has_the_highest_accuracy_then_the_highest_f1():
    tried = {
        0.1: Score(0.700, 0.9, 1.0),
        0.2: Score(0.7985, 0.6, 1.0),
        0.4: Score(0.800, 0.5, 1.0),
        0.8: None,
    }
    assert choose_rates.best(tried) == 0.2
    tried[0.2] = Score(0.7979, 0.6, 1.0)  # no tie
    assert choose_rates.best(tried) == 0.4
    assert choose_rates.best({0.1: None}) is None


def test_a_row_marks_the_best_and_says_if_it_is_at_the_edge():
    low, high = Score(0.5, 0.5, 1.234), Score(0.6, 0.5, 0.9)
    assert choose_rates.row("some", {0.1: low, 0.2: high, 0.4: None}) == (
        *("some", "0.1: 0.500 (loss 1.23)", "**0.2**: 0.600 (loss 0.90)"),
        *("0.4: failed", "0.2"),
    )
    best = lambda tried: choose_rates.row("some", tried)[-1]
    assert best({0.1: low, 0.2: high}) == "0.2, the highest tried"
    assert best({0.1: high, 0.2: low}) == "0.1, the lowest tried"
    assert best({0.1: high}) == "0.1, the only one tried"
    assert best({0.1: None}) == "none"


def test_seeds_are_averaged_and_one_that_fails_counts_as_all():
    scores = [Score(0.5, 0.4, 1.0), Score(0.6, 0.2, 2.0)]
    mean = choose_rates.mean(scores)
    np.testing.assert_allclose(
        [mean.accuracy, mean.macro_f1, mean.loss], [0.55, 0.3, 1.5]
    )
    assert choose_rates.mean([*scores, finetune.Failed("nan")]) is None


# ------------------------------------------------------------------------ the command


@pytest.mark.slow
def test_the_table_and_the_json_say_the_same(options, tmp_path, monkeypatch, capsys):
    ran = []

    def score(run):
        ran.append(run.name)
        if run.name == "bitfit, rate 0.02, seed 0":
            raise finetune.Failed("the loss is nan at step 1")
        return Score(0.5 + run.recipe.learning_rate, 0.5, 1.0)

    monkeypatch.setattr(choose_rates, "score", score)
    assert choose_rates.main(command(tmp_path, options)) == 0
    printed = capsys.readouterr()
    assert "bitfit, rate 0.02, seed 0: the loss is nan at step 1" in printed.err
    text = (tmp_path / "rates.md").read_text()
    assert text in printed.out and "seed 0; Python 3." in text
    lines = [x for x in text.splitlines() if x.startswith("|")]
    assert lines[0] == "| method | 0.5x | 1x | 2x | best |"
    assert lines[2].endswith("**0.02**: 0.520 (loss 1.00) | 0.02, the highest tried |")
    assert lines[3].endswith("**0.01**: 0.510 (loss 1.00) | 0.02: failed | 0.01 |")
    found = json.loads((tmp_path / "rates.json").read_text())
    assert {name: x["rate"] for name, x in found.items()} == (
        {"head": 0.02, "bitfit": 0.01}
    )
    assert found["bitfit"]["tried"]["0.02"] is None
    assert found["head"]["tried"]["0.005"] == (
        {"accuracy": 0.505, "macro_f1": 0.5, "loss": 1.0}
    )
    # Only what failed runs again; a method that fails at all rates is an error.
    ran.clear()
    argv = command(tmp_path, options)
    assert choose_rates.main([*argv, "--factors", "2"]) == 1
    assert ran == ["bitfit, rate 0.02, seed 0"]


@pytest.mark.slow
def test_two_processes_choose_as_one_does(options, tmp_path):
    found = []
    for jobs in ("1", "2"):
        (tmp_path / jobs).mkdir()
        argv = command(tmp_path / jobs, options, "--jobs", jobs, "--small")
        argv += ["--methods", "head", "--factors", "2", "1"]  # the last ones count
        assert choose_rates.main(argv) == 0
        found.append(json.loads((tmp_path / jobs / "rates.json").read_text()))
    assert found[0] == found[1]
    scores = [x for method in found[0].values() for x in method["tried"].values()]
    assert len(scores) == 2 and all(0 <= x["accuracy"] <= 1 for x in scores)


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--learning-rate", "0.1"], "--learning-rate is set for each run"),
        (["--validate=0.1"], "--validate=0.1 is set for each run"),
        (["--factors", "0"], "expected a number above 0, found 0"),
        (["--jobs", "0"], "expected 1 or more, found 0"),
        (["--methods", "bitfti"], "did you mean 'bitfit'?"),
        (["--json", "no/where.json"], "there is no folder no"),
    ],
)
def test_options_that_cannot_be_used_are_refused(argv, text, tmp_path, capsys):
    try:
        code = choose_rates.main(["--out", str(tmp_path / "runs"), *argv])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert text in capsys.readouterr().err.splitlines()[-1]


def test_a_part_that_is_none_is_refused(options, tmp_path, capsys):
    argv = [*options, "--validate", "1", "--out", str(tmp_path)]
    assert finetune.main(argv) == 2
    assert "fraction must lie between 0 and 1" in capsys.readouterr().err


def test_the_machine_is_named_by_its_accelerator(monkeypatch):
    class Device:
        platform, device_kind = "gpu", "NVIDIA H200"

    assert " on cpu, " in _compare.machine()
    monkeypatch.setattr(jax, "devices", lambda: [Device])
    assert " on NVIDIA H200, " in _compare.machine()
