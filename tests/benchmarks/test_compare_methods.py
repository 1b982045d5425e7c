"""The table of methods, over the tiny base of tiny_bert."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import _compare
import _jobs
import _recipe
import compare_methods
import finetune
import jax
import pytest
import tiny_bert
from compare_methods import Cost, Outcome, Row, Untrained

import jpeft

# Fixtures: pytest finds them by name in the module.
as_in_the_command = tiny_bert.as_in_the_command
base, data = tiny_bert.base, tiny_bert.data

ROOT = Path(__file__).resolve().parents[2]
METHODS = ["full", "p_tuning", "head"]
COST = Cost(trainable=2_000, flops=3e9, temp_bytes=600, examples_per_second=12.4)
FULL = Cost(trainable=4_000_000, flops=6e9, temp_bytes=400, examples_per_second=9.0)
BEFORE = Untrained(accuracy=0.07, majority=0.1, examples="9 examples")


def outcome_of(accuracy, kept=2_000):
    return Outcome(accuracy, macro_f1=0.5, kept=kept, adapter_bytes=330_000)


@pytest.fixture(scope="module", autouse=True)
def caches_stay():
    """The command clears them after each run; here they make the next one faster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "clear_caches", lambda: None)
        yield


@pytest.fixture(scope="module")
def options(base, data):
    """Of a run of 2 steps."""
    paths = ["--base", str(base), "--data", str(data)]
    return [*paths, "--epochs", "1", "--max-train", "64", "--length", "24"]


@pytest.fixture(scope="module")
def table(options, tmp_path_factory):
    """The folder of a finished table: --out, and what it wrote."""
    folder = tmp_path_factory.mktemp("table")
    assert compare_methods.main(command(folder, options)) == 0
    return folder


def command(folder, options, *more, methods=METHODS):
    files = ["--markdown", str(folder / "table.md"), "--plot", str(folder / "plot.svg")]
    argv = ["--methods", *methods, "--seeds", "0", "1", "--out", str(folder / "runs")]
    return [*argv, *files, *options, *more]


def rows_of(text):
    """Name -> the other cells, by the head's names."""
    lines = [x for x in text.splitlines() if x.startswith("|")]
    head, _, *rows = ([c.strip() for c in x.strip("|").split("|")] for x in lines)
    assert tuple(head) == compare_methods.HEAD
    return {name: dict(zip(head[1:], cells, strict=True)) for name, *cells in rows}


def number(cell):
    return float(re.match(r"[\d.,]+", cell)[0].replace(",", ""))


# ------------------------------------------------------------------------ the figures


@pytest.mark.slow
def test_rows_are_in_the_order_of_what_they_train(table):
    rows = rows_of((table / "table.md").read_text())
    assert set(rows) == set(METHODS)
    trainable = [number(cells["trainable"]) for cells in rows.values()]
    assert trainable == sorted(trainable)
    assert [*rows][0] == "head" and number(rows["head"]["trainable"]) == 32 * 3 + 3


@pytest.mark.slow
def test_full_fine_tuning_is_the_unit_and_trains_everything(table, base):
    cells = rows_of((table / "table.md").read_text())["full"]
    assert (cells["of full"], cells["FLOPs"], cells["temporaries"]) == (
        *("100%", "1.00x", "1.00x"),
    )
    _, params = finetune.read_base(base, 3, jax.random.key(0))
    assert number(cells["trainable"]) == sum(x.size for x in jax.tree.leaves(params))
    # No weight of the encoder has a gradient: no product for it.
    head = rows_of((table / "table.md").read_text())["head"]
    assert 0.2 < number(head["FLOPs"]) < 0.6 and number(head["temporaries"]) < 1


@pytest.mark.slow
def test_what_only_trains_is_not_kept(table):
    cells = rows_of((table / "table.md").read_text())["p_tuning"]
    assert number(cells["kept"]) == 20 * 32 + 99 < number(cells["trainable"])


@pytest.mark.slow
def test_a_row_is_what_the_main_job_finds(table, options, tmp_path):
    metrics = []
    for seed in ("0", "1"):
        out = tmp_path / seed
        argv = [*options, "--config", "configs/p_tuning.toml", "--seed", seed]
        assert finetune.main([*argv, "--out", str(out)]) == 0
        metrics.append(json.loads((out / "metrics.json").read_text()))
    cells = rows_of((table / "table.md").read_text())["p_tuning"]
    found = sorted(x["after"]["accuracy"] for x in metrics)
    mean = sum(found) / 2
    assert cells["accuracy"] == f"{mean:.3f} ({found[0]:.3f} to {found[1]:.3f})"
    size = sum(x["adapter_bytes"] for x in metrics) / 2e3
    # Orbax notes times, whose digits vary.
    assert abs(number(cells["adapter"]) - size) < 2 and cells["adapter"][-3:] == " kB"
    text = (table / "table.md").read_text()
    assert "64 examples to train on, 18 held out, 3 classes, 1 x 2 steps" in text
    assert "; seeds 0, 1; Python 3." in text


@pytest.mark.slow
def test_untrained_is_the_base_with_a_new_head(table, options, tmp_path):
    found = []
    for seed in ("0", "1"):
        argv = [*options, "--config", "configs/lora.toml", "--seed", seed]
        run = _jobs.prepare(argv, str(tmp_path / seed))
        # LoRA's B is 0: nothing changes before the first step.
        found.append(finetune.scores(run, finetune.make_logits(run.model))["accuracy"])
    low, high = sorted(found)
    expected = f"accuracy {(low + high) / 2:.3f} ({low:.3f} to {high:.3f}); the most"
    assert expected in (table / "table.md").read_text()


@pytest.mark.slow
def test_flops_are_those_of_the_step_that_trains(options, tmp_path):
    """A step over all layers costs more than one that stops at the classifier."""
    run = _jobs.prepare([*options, "--config", "configs/lora.toml"], str(tmp_path))
    found = compare_methods.cost(run)
    (stage,) = run.stages
    trainable, frozen = jpeft.partition(run.params)  # kept: the step donates copies
    n = run.recipe.batch_size
    batch = run.train.ids[:n], run.train.mask[:n], run.train.labels[:n]
    step = finetune.make_step(run.model, stage)
    program = step.lower(trainable, run.opt_state, frozen, *batch, jax.random.key(0))
    assert found.flops == program.compile().cost_analysis()["flops"] > 0
    assert found.trainable == jpeft.count(run.params).trainable
    assert found.temp_bytes > 0 and found.examples_per_second > 0


# ------------------------------------------------------------------------- continuing


@pytest.fixture
def counted(monkeypatch):
    """Names of the trainings that ran."""
    ran, train = [], finetune.train

    def recorded(run, *args, **kwargs):
        ran.append(run.name)
        return train(run, *args, **kwargs)

    monkeypatch.setattr(finetune, "train", recorded)
    return ran


@pytest.mark.slow
def test_a_finished_table_is_written_again_without_a_training(
    table, options, counted, capsys
):
    before = (table / "table.md").read_bytes(), (table / "plot.svg").read_bytes()
    assert compare_methods.main(command(table, options)) == 0
    assert counted == []
    assert ((table / "table.md").read_bytes(), (table / "plot.svg").read_bytes()) == (
        before
    )
    assert before[0].decode() in capsys.readouterr().out


@pytest.fixture
def nothing_runs(monkeypatch):
    """Figures of no training, where a test is on what is done with them."""
    found = {"cost": COST, "outcome": outcome_of(0.7), "untrained": BEFORE}
    for name, value in found.items():
        monkeypatch.setattr(compare_methods, name, lambda run, value=value: value)


@pytest.mark.slow
def test_costs_alone_need_no_training(options, tmp_path, nothing_runs, capsys):
    argv = [*options, "--methods", "head", "--costs-only", "--out", str(tmp_path)]
    assert compare_methods.main(argv) == 0
    assert {x.name.split("-")[1] for x in tmp_path.glob("*.json")} == {"cost"}
    (row,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("| head"))
    assert row.split(" | ")[1] == f"{COST.trainable:,}" and row.endswith("|  |")


@pytest.mark.slow
def test_an_interrupted_table_continues(
    options, tmp_path, nothing_runs, monkeypatch, capsys
):
    ran = []

    def interrupted(run):
        ran.append(run.name)
        if len(ran) == 3:
            raise KeyboardInterrupt
        return outcome_of(0.7)

    monkeypatch.setattr(compare_methods, "outcome", interrupted)
    argv = command(tmp_path, options, methods=["head", "bitfit"])
    assert compare_methods.main(argv) == 130
    assert "the same command continues" in capsys.readouterr().err
    assert compare_methods.main(argv) == 0
    first, second = "head, seed 0", "bitfit, seed 0"
    assert ran == [first, second, "head, seed 1", "head, seed 1", "bitfit, seed 1"]


@pytest.mark.slow
def test_other_options_are_other_results(table, options, counted):
    """Results of another learning rate must not be taken for these."""
    files = set((table / "runs").iterdir())
    argv = command(table, options, "--learning-rate", "0.5", methods=["head"])
    assert compare_methods.main([*argv, "--seeds", "0"]) == 0
    assert counted == ["head, seed 0"]
    new = sorted(
        x.name.rpartition("-")[0] for x in {*(table / "runs").iterdir()} - files
    )
    assert new == ["full-cost", "head-cost", "head-seed0", "untrained-seed0"]


def test_changed_data_are_other_results(base, data, tmp_path):
    copy = tmp_path / "data.tsv"
    copy.write_bytes(data.read_bytes())
    argv = ["--base", str(base), "--data", str(copy)]
    before = _jobs.settings_of(argv)
    assert _jobs.settings_of(argv) == before
    copy.write_bytes(data.read_bytes() + b"a fish\tfish\n")
    assert _jobs.settings_of(argv) != before


@pytest.mark.slow
def test_a_damaged_result_is_named(options, tmp_path, nothing_runs, capsys):
    argv = [*command(tmp_path, options, methods=["head"]), "--seeds", "0"]
    assert compare_methods.main(argv) == 0
    (file,) = (tmp_path / "runs").glob("head-seed0-*.json")
    file.write_text("{")
    assert compare_methods.main(argv) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert str(file) in error and "delete it to measure again" in error


# -------------------------------------------------------------------------- bad input


def refused(argv, capsys, *texts):
    """Exit code 2 with a line that contains these texts, before anything ran."""
    try:
        code = compare_methods.main(argv)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert all(text in error for text in texts), error


def test_an_unknown_method_is_refused_with_a_suggestion(tmp_path, capsys):
    argv = ["--methods", "lora", "bitfti", "--out", str(tmp_path / "out")]
    refused(
        argv, capsys, "no method 'bitfti'; did you mean 'bitfit'?", "known: ", "vera"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "texts"),
    [
        (["--seed=1"], ["--seed=1 is set for each run; the seeds by --seeds"]),
        (["--config", "configs/lora.toml"], ["--config is set for each run"]),
        (["--plot", "table.gif"], ["expected a name in .png or .svg"]),
        (["--plot", "t.svg", "--costs-only"], ["--plot draws accuracies"]),
        (["--markdown", "no/where.md"], ["there is no folder no"]),
        (["--data", "nowhere.tsv"], ["--data nowhere.tsv: no such file"]),
        (["--base", "nowhere"], ["--base nowhere: no such directory"]),
        (["--epochs", "0"], ["epochs must be 1 or more, found 0"]),
    ],
)
def test_options_that_cannot_be_used_are_refused(argv, texts, tmp_path, capsys):
    refused([*argv, "--methods", "head", "--out", str(tmp_path)], capsys, *texts)


def test_recipes_of_another_budget_are_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "configs").mkdir()
    for name, more in (("full", ""), ("long", "epochs = 5\n")):
        text = (ROOT / "configs" / "full.toml").read_text() + more
        (tmp_path / "configs" / f"{name}.toml").write_text(text)
    monkeypatch.setattr(_recipe, "ROOT", tmp_path)
    argv = ["--methods", "long", "--out", str(tmp_path / "out")]
    refused(argv, capsys, "long has epochs = 5, full has 2", "--epochs")


def test_the_recipes_of_the_repository_have_one_budget():
    assert {"full", "head", "lora", "p_tuning"} <= set(_compare.names())
    compare_methods.check_same_budget(_compare.names(), [])


@pytest.mark.slow
def test_a_training_that_fails_leaves_the_other_rows(
    options, tmp_path, nothing_runs, monkeypatch, capsys
):
    def fails(run):
        if run.name == "head, seed 0":
            raise finetune.Failed("the loss is nan at step 2")
        return outcome_of(0.7)

    monkeypatch.setattr(compare_methods, "outcome", fails)
    argv = command(tmp_path, options, methods=["head", "bitfit"])
    assert compare_methods.main([*argv, "--seeds", "0"]) == 1
    printed = capsys.readouterr()
    assert "head, seed 0: the loss is nan at step 2" in printed.err
    rows = rows_of(printed.out)
    assert (rows["head"]["accuracy"], rows["head"]["kept"]) == ("1 failed", "")
    assert (rows["bitfit"]["accuracy"], rows["bitfit"]["kept"]) == ("0.700", "2,000")
    # It is tried again.
    monkeypatch.setattr(compare_methods, "outcome", lambda run: outcome_of(0.6))
    assert compare_methods.main([*argv, "--seeds", "0"]) == 0
    assert rows_of(capsys.readouterr().out)["head"]["accuracy"] == "0.600"


# -------------------------------------------------------------------- several processes


# Of a worker; JAX_PLATFORMS is set here, as a user may have set any of them.
ENVIRONMENT = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "TQDM_DISABLE": "1",
    "JAX_PLATFORMS": "cpu",
}


@dataclasses.dataclass
class Told:
    """What a worker says of itself."""

    environment: dict
    ctrl_c_is_ignored: bool
    process: int
    began: float
    ended: float


def told(run):
    with _jobs.timing():
        began = time.time()
        time.sleep(0.3)
        ended = time.time()
    return Told(
        environment={name: os.environ.get(name) for name in ENVIRONMENT},
        ctrl_c_is_ignored=signal.getsignal(signal.SIGINT) == signal.SIG_IGN,
        process=os.getpid(),
        began=began,
        ended=ended,
    )


def fails(run):
    raise finetune.Failed("the loss is nan at step 2")


def breaks(run):
    raise KeyError("what nobody thought of")


def dies(run):
    os._exit(3)


def task(find, name, options):
    return _jobs.Task(f"{name}, seed 0", name, tuple(options), find, Told)


@pytest.mark.slow
def test_workers_tell_what_they_find_and_of_which_task(options, tmp_path, monkeypatch):
    monkeypatch.setitem(_jobs.ENVIRONMENT, "JAX_PLATFORMS", "no_such_platform")
    monkeypatch.setattr(jax, "devices", lambda: pytest.fail("asked in this process"))
    good = [task(told, name, options) for name in ("one", "two")]
    bad = task(fails, "head", options)
    folder = tmp_path / "runs"
    with _jobs.Runs(folder, jobs=2) as runs:
        found = dict(runs.each([*good, bad]))
        assert isinstance(found[bad], finetune.Failed)
        assert str(found[bad]) == "the loss is nan at step 2"
        assert re.search(r" on cpu, \d+ cores", runs.machine())
        with pytest.raises(
            RuntimeError, match="^full, seed 0:(.|\n)*breaks(.|\n)*nobody"
        ):
            list(runs.each([task(breaks, "full", options)]))
        with pytest.raises(RuntimeError, match="^lora, seed 0: .* ended with code 3"):
            list(runs.each([task(dies, "lora", options)]))
    first, second = sorted((found[x] for x in good), key=lambda x: x.began)
    for x in (first, second):
        assert x.ctrl_c_is_ignored
        assert x.environment == ENVIRONMENT
        with pytest.raises(ProcessLookupError):
            os.kill(x.process, 0)
    assert first.process != second.process
    assert first.ended <= second.began  # no step is timed beside another
    assert "TQDM_DISABLE" not in os.environ
    # What failed runs again, what was found does not.
    names = sorted(x.name.rpartition("-")[0] for x in folder.iterdir())
    assert names == ["one", "two"]
    again = dict(_jobs.Runs(folder, jobs=2).each(good))
    assert again == {x: found[x] for x in good}


@pytest.fixture
def heeds_ctrl_c():
    """What a shell runs in the background ignores Ctrl-C, and so do its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.usefixtures("heeds_ctrl_c")
def test_ctrl_c_ends_the_workers(options, tmp_path):
    script = ROOT / "benchmarks" / "compare_methods.py"
    argv = [sys.executable, str(script), "--jobs", "2", "--methods", "head"]
    with subprocess.Popen(
        [*argv, "--out", str(tmp_path), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        process.stdout.readline()  # the first result
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        # Whoever is left holds the pipes open.
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors and "leaked" not in errors
    assert "the same command continues" in errors.splitlines()[-1]


# ------------------------------------------------------------------------ table, plot


def test_several_seeds_make_a_mean_and_a_spread():
    found = [outcome_of(0.7, kept=100), outcome_of(0.8, kept=200)]
    row = compare_methods.cells(Row("some", COST, found, failed=1), FULL)
    assert row == (
        *("some", "2,000", "0.05%", "150", "330 kB"),
        *("0.50x", "1.50x", "12", "0.750 (0.700 to 0.800), 1 failed"),
    )


@pytest.mark.parametrize("suffix", compare_methods.PICTURES)
def test_the_picture_names_every_method_that_was_trained(suffix, tmp_path):
    rows = [
        Row("good", COST, [outcome_of(0.7), outcome_of(0.74)]),
        Row("smaller", COST, [outcome_of(0.71, kept=50)]),
        Row("full", FULL, [outcome_of(0.75, kept=FULL.trainable)]),
        Row("broken", COST, [], failed=1),
    ]
    path = tmp_path / f"plot{suffix}"
    compare_methods.picture(path, rows, [BEFORE])
    content = path.read_bytes()
    if suffix == ".png":
        assert content.startswith(b"\x89PNG")
        return
    # Matplotlib draws a text as paths and names it in a comment.
    texts = re.findall(r"<!-- (.*?) -->", content.decode())
    assert {"good", "smaller", "full", "untrained: 0.070 (below)"} <= set(texts)
    assert "broken" not in texts


def test_no_label_lies_on_another_while_there_is_room():
    rows = {f"method {k}": Row("", COST, [outcome_of(0.7 + k / 1e3)]) for k in range(5)}
    figure, axes = compare_methods.pyplot.subplots(figsize=(9, 5))
    axes.set(xscale="log", xlim=(100, 1e6), ylim=(0.6, 0.8))
    compare_methods._put_labels(figure, axes, rows)
    renderer = figure.canvas.get_renderer()
    boxes = [x.get_window_extent(renderer) for x in axes.texts]
    compare_methods.pyplot.close(figure)
    assert len(boxes) == 5
    for k, box in enumerate(boxes):
        assert not any(map(box.overlaps, boxes[:k]))
