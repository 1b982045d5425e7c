"""The main job: what it writes, resuming, bad input, the recipes of the repository.

Most tests use a tiny random BERT, in which a word decides the class.
"""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import _recipe
import _runs
import finetune
import jax
import numpy as np
import pytest
import tiny_bert

import jpeft

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "finetune.py"
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))
# Run by tests of their own, here and in test_formats.
ELSEWHERE = {"adalora", "diff_pruning", "p_tuning", "qlora"}
# Fixtures: pytest finds them by name in the module.
as_in_the_command = tiny_bert.as_in_the_command
base, data = tiny_bert.base, tiny_bert.data


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A quick one, with dropout: its masks must be those of each step."""
    text = (ROOT / "configs" / "lora_qv.toml").read_text()
    assert "alpha = 16" in text
    path = tmp_path_factory.mktemp("recipe") / "lora.toml"
    path.write_text(text.replace("alpha = 16", "alpha = 16\ndropout = 0.1"))
    return path


@pytest.fixture(scope="module")
def command(base, data, recipe):
    """The options of a run of 9 steps in 3 epochs, with some more to add."""

    def options(out, *more):
        return [
            *("--base", str(base), "--data", str(data), "--config", str(recipe)),
            *("--out", str(out), "--batch-size", "24", "--epochs", "3"),
            *("--learning-rate", "0.05", *map(str, more)),
        ]

    return options


def read(path):
    return json.loads(path.read_text())


def fails(capsys, argv, *texts):
    """Exit code 2, with one line that contains these texts."""
    assert finetune.main(list(map(str, argv))) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    for text in texts:
        assert text in captured.err
    return captured.err


# -------------------------------------------------------------------- from end to end


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
    """The folder of a run that was not interrupted."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert finetune.main(command(out)) == 0
    return out


def test_a_run_learns_and_writes_its_files(finished, base):
    metrics = read(finished / "metrics.json")
    assert metrics["examples"] == {"train": 78, "held_out": 18}
    assert metrics["reload_difference"] == 0
    assert metrics["merge_difference"] <= finetune.MERGE_TOLERANCE
    # Nine steps with dropout are above chance; the slow test has the real figure.
    assert metrics["after"]["accuracy"] > metrics["majority"]["accuracy"] + 0.15
    history = metrics["history"]
    assert len(history["loss"]) == 9 and history["loss"][-1] < history["loss"][0]
    assert [step for step, _ in history["accuracy"]] == [1, 3, 4, 6, 7, 9]
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert metrics["adapter_bytes"] > 0
    weights = base / "model.safetensors"
    assert metrics["base_bytes"] == weights.stat().st_size
    steps = [path.name for path in (finished / "checkpoints").iterdir()]
    assert sorted(steps) == ["00000006", "00000009"]


@pytest.mark.slow
def test_a_second_run_says_what_it_did_and_is_the_same(
    command, finished, base, tmp_path, capsys
):
    assert finetune.main(command(tmp_path / "again")) == 0
    printed = capsys.readouterr()
    for pattern in (
        r"query/kernel +32x32 +LowRank",
        r"total +trainable",
        r"19 weights not shown; --full-summary shows them",
        r"majority +0\.\d+",
        r"before +0\.\d+",
        r"after +[01]\.\d+",
        r"adapter .*% of the base's",
        r"reload .* 0\n",
        r"merge ",
        r"examples/s",
    ):
        assert re.search(pattern, printed.out), pattern
    assert "examples/s, loss=" in printed.err  # the progress bar
    assert "Traceback" not in printed.err
    tiny_bert.assert_same_adapter(tmp_path / "again", finished, base)
    first, second = (read(x / "metrics.json") for x in (finished, tmp_path / "again"))
    assert first["history"] == second["history"]


@pytest.mark.slow
def test_another_seed_is_another_run(command, finished, tmp_path):
    argv = command(tmp_path / "other", "--seed", 1)
    assert finetune.main(argv, stop_after=1) == 130
    (metadata,) = (tmp_path / "other" / "checkpoints").glob("*/state.json")
    first = read(metadata)["metadata"]["history"]["loss"][0]
    assert first != read(finished / "metrics.json")["history"]["loss"][0]


# -------------------------------------------------------------------------- resuming


@pytest.mark.slow
def test_a_run_resumed_again_and_again_ends_bit_identical(
    command, finished, base, tmp_path, capsys
):
    """In an epoch, at its end, and when only the report was missing."""
    argv = command(tmp_path)
    for stop_after in (1, 6, 9):
        more = ["--resume"] * (stop_after > 1)
        assert finetune.main([*argv, *more], stop_after=stop_after) == 130
        assert f"step {stop_after} is saved" in capsys.readouterr().err
        assert not (tmp_path / "metrics.json").exists()
    assert finetune.main([*argv, "--resume"]) == 0
    tiny_bert.assert_same_adapter(tmp_path, finished, base)
    resumed, whole = (read(x / "metrics.json") for x in (tmp_path, finished))
    for key in ("history", "before", "after"):
        assert resumed[key] == whole[key]


@pytest.mark.slow
def test_a_finished_run_can_be_resumed_to_report_again(finished, command):
    before = read(finished / "metrics.json")
    assert finetune.main(command(finished, "--resume")) == 0
    assert read(finished / "metrics.json")["after"] == before["after"]


@pytest.mark.slow
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_save_and_the_command_they_print_resumes(
    ending, command, finished, base, tmp_path
):
    argv = [sys.executable, "-u", os.path.relpath(SCRIPT), *command(tmp_path)]
    with subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            if "Ctrl-C" in line:
                break
        process.send_signal(ending)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    line = errors.strip().splitlines()[-1]
    found = re.fullmatch(
        r"interrupted; step (\d) is saved. To go on, type: python (.*) --resume", line
    )
    assert found and int(found[1]) < 9
    script, *options = found[2].split()
    assert Path(script).resolve() == SCRIPT
    assert finetune.main([*options, "--resume"]) == 0
    tiny_bert.assert_same_adapter(tmp_path, finished, base)


def test_sigterm_is_asked_for_as_ctrl_c_is_however_often_it_comes():
    end = lambda: os.kill(os.getpid(), signal.SIGTERM)
    former = signal.getsignal(signal.SIGTERM)
    with _runs.sigterm_as_ctrl_c():
        with _runs.Interrupt() as interrupt:
            end()
            end()
            assert interrupt.asked
        with pytest.raises(KeyboardInterrupt):
            end()
    assert signal.getsignal(signal.SIGTERM) == former


@pytest.mark.slow
def test_a_damaged_last_checkpoint_costs_one_and_no_more(
    command, finished, base, tmp_path, capsys
):
    assert finetune.main(command(tmp_path), stop_after=5) == 130
    steps = sorted((tmp_path / "checkpoints").iterdir())
    assert len(steps) == 2
    (steps[1] / "state.json").write_text("")
    assert finetune.main(command(tmp_path, "--resume")) == 0
    assert f"resuming after step {int(steps[0].name)}" in capsys.readouterr().out
    tiny_bert.assert_same_adapter(tmp_path, finished, base)


def test_resuming_without_a_checkpoint_is_refused(command, tmp_path, capsys):
    fails(capsys, command(tmp_path, "--resume"), "no checkpoint", "leave out --resume")


@pytest.mark.slow
def test_resuming_a_run_of_another_recipe_is_refused(command, finished, capsys):
    argv = command(finished, "--resume", "--config", "configs/bitfit.toml")
    fails(capsys, argv, "other settings", "peft was", "another --out")


def test_resuming_with_another_option_is_refused(command, finished, capsys):
    argv = command(finished, "--resume", "--epochs", 4)
    fails(capsys, argv, "epochs was 3, is 4")


@pytest.mark.slow
def test_a_run_is_replaced_only_on_request(command, tmp_path, capsys):
    assert finetune.main(command(tmp_path), stop_after=1) == 130
    capsys.readouterr()
    fails(capsys, command(tmp_path), "already holds a run", "--overwrite")
    assert finetune.main(command(tmp_path, "--overwrite"), stop_after=2) == 130
    steps = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert steps == ["00000002"]


# -------------------------------------------------------------------------- bad input


def recipe_with(tmp_path, text):
    path = tmp_path / "recipe.toml"
    path.write_text('[[peft]]\nmethod = "full"\nwhere = "classifier/.*"\n' + text)
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train]\nlearning_rat = 1", "did you mean 'learning_rate'?"),
        ("[train]\nlearning_rate = -1", "learning_rate must be above 0, found -1"),
        (
            "[train]\nlearning_rate = nan",
            "train.learning_rate = nan: expected a number",
        ),
        ('[train]\nepochs = "2"', "epochs must be of the type int, found '2'"),
        ("[train]\nepochs = 0", "epochs must be 1 or more, found 0"),
        ("[train]\nbatch_size = true", "batch_size must be of the type int"),
        ('[train]\nschedule = "cosine"', "schedule must be 'linear' or 'constant'"),
        ("[train]\nhead_learning_rate = 0.0", "head_learning_rate must be above 0"),
        ('[train]\nprefix_start = "words"', "prefix_start must be 'drawn' or 'text'"),
        ("[train]\nwarmup = 6", "warmup must lie between 0 and 1, found 6"),
        ("[trian]\nepochs = 2", "unknown key 'trian'"),
        ("[train", "not TOML"),
        ('[[peft]]\nmethod = "loar"\nrank = 2', "did you mean 'lora'?"),
        ('[[peft]]\nmethod = "lora"\nranks = 2', "unknown key 'ranks'"),
    ],
)
def test_a_wrong_recipe_is_refused(text, message, command, tmp_path, capsys):
    recipe = recipe_with(tmp_path, text)
    argv = command(tmp_path / "out", "--config", recipe)
    error = fails(capsys, argv, message)
    assert error.count("recipe.toml") == 1
    assert not (tmp_path / "out").exists()


def test_a_recipe_that_is_not_there_is_refused(command, tmp_path, capsys):
    argv = command(tmp_path, "--config", "configs/lroa.toml")
    fails(capsys, argv, "no recipe configs/lroa.toml", "bitfit", "lora")


def test_a_pattern_that_matches_nothing_is_refused(command, tmp_path, capsys):
    recipe = tmp_path / "recipe.toml"
    lora = '[[peft]]\nmethod = "lora"\nrank = 2\nalpha = 2\nwhere = "query"\n'
    recipe.write_text(lora)
    argv = command(tmp_path / "out", "--config", recipe)
    fails(capsys, argv, "where='query' matches nothing", ".*query.*")


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        (["--base", "nowhere"], ["--base nowhere: no such directory"]),
        (["--data", "nowhere.tsv"], ["--data nowhere.tsv: no such file"]),
        (["--eval", "nowhere.tsv"], ["--eval nowhere.tsv: no such file"]),
        (["--text-column", "sentence"], ["no column 'sentence'", "--text-column"]),
        (["--label-column", "class"], ["no column 'class'", "--label-column"]),
        (["--batch-size", "100"], ["batch_size 100", "only 78 examples"]),
        (["--length", "193"], ["length 193", "only 192 positions"]),
        (["--learning-rate", "0"], ["learning_rate must be above 0"]),
        (["--max-train", "8"], ["batch_size 24", "only 8 examples"]),
    ],
)
def test_wrong_options_are_refused(options, texts, command, tmp_path, capsys):
    fails(capsys, command(tmp_path / "out", *options), *texts)
    assert not (tmp_path / "out").exists()


def test_held_out_data_alone_is_refused(base, data, tmp_path, capsys):
    argv = ["--base", base, "--eval", data, "--out", tmp_path / "out"]
    fails(capsys, argv, "--eval needs --data")


def test_a_folder_that_is_no_checkpoint_is_refused(command, tmp_path, capsys):
    argv = command(tmp_path / "out", "--base", tmp_path)
    fails(capsys, argv, "holds no config.json")


def test_damaged_weights_are_refused(base, command, tmp_path, capsys):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((base / name).read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 99)
    fails(capsys, command(tmp_path / "out", "--base", tmp_path))


def test_a_tokenizer_of_another_model_is_refused(base, command, tmp_path, capsys):
    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    weights = (base / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights)
    tokenizer = read(base / "tokenizer.json")
    tokenizer["model"]["vocab"]["the"] = 99
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    argv = command(tmp_path / "out", "--base", tmp_path)
    fails(capsys, argv, "the id 99", "do not belong together")


@pytest.mark.parametrize("option", [["--max-train", "0"], ["--epochs", "two"]])
def test_options_that_cannot_be_read_are_refused(option, capsys):
    with pytest.raises(SystemExit) as stop:
        finetune.main(option)
    assert stop.value.code == 2
    assert option[0] in capsys.readouterr().err


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_run(command, tmp_path, capsys):
    argv = command(tmp_path, "--learning-rate", "1e38", "--config", "configs/full.toml")
    assert finetune.main(argv) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search("error: the loss is (nan|inf) at step", error)
    assert "--learning-rate below 1e+38" in error


# ---------------------------------------------------------------------- other choices


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", [p for p in CONFIGS if p.stem not in ELSEWHERE], ids=lambda path: path.stem
)
def test_every_recipe_of_the_repository_runs(path, base, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a recipe is found from any folder
    argv = ["--base", base, "--data", data, "--config", f"configs/{path.name}"]
    argv += ["--max-train", "64", "--epochs", "1", "--length", "16"]
    assert finetune.main(list(map(str, argv))) == 0
    out = tmp_path / "runs" / path.stem
    metrics = read(out / "metrics.json")
    assert len(metrics["history"]["loss"]) == 2
    assert metrics["parameters"]["trainable"] > 0
    assert np.isfinite(metrics["history"]["loss"]).all()


@pytest.mark.slow
def test_a_held_out_file_is_used_as_it_is(command, data, tmp_path):
    held_out = tmp_path / "held_out.tsv"
    held_out.write_text("text\tlabel\nthe fish\tfish\nold tree\ttree\na bird\tbird\n")
    argv = command(tmp_path / "out", "--eval", held_out, "--epochs", 1)
    assert finetune.main(argv) == 0
    metrics = read(tmp_path / "out" / "metrics.json")
    assert metrics["examples"] == {"train": 96, "held_out": 3}
    assert metrics["majority"]["accuracy"] == 1 / 3


def test_limits_choose_examples_of_all_classes(data):
    columns = {"text": "text", "label": "label"}
    train, held_out = finetune._encoded.read(
        data, None, columns=columns, limits=(30, 9), seed=0
    )
    assert (len(train), len(held_out)) == (30, 9)
    assert set(train.labels) == set(held_out.labels) == {0, 1, 2}


def test_batches_are_cut_to_their_bucket():
    mask = np.arange(48)[None] < np.array([[3], [16], [17], [40]])
    ids = np.where(mask, 7, 0)
    data = finetune._encoded.Encoded(ids, mask, np.arange(4))
    assert data.take([0, 1]).ids.shape == (2, 16)
    assert data.take([2, 0]).ids.shape == (2, 32)
    assert data.take([3]).ids.shape == (1, 48)
    short = finetune._encoded.Encoded(ids[:, :40], mask[:, :40], np.arange(4))
    assert short.take([3]).ids.shape == (1, 40)


def test_predictions_stand_in_the_order_of_the_examples():
    mask = np.arange(48)[None] < np.array([[40], [3], [17], [16]])
    data = finetune._encoded.Encoded(np.where(mask, 7, 0), mask, np.arange(4))
    summed = lambda _, ids, mask: (ids * mask).sum(1, keepdims=True)
    found = finetune._encoded.predict(summed, None, data)
    np.testing.assert_array_equal(found, 7 * np.array([[40], [3], [17], [16]]))


@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_the_learning_rate_rises_and_then_falls_or_stays(schedule):
    recipe = _recipe.Train(learning_rate=1.0, schedule=schedule, warmup=0.2)
    optimizer = finetune.make_optimizer(recipe, steps=20)
    # Adam's first updates under a constant gradient are the learning rate itself.
    params = {"x": jax.numpy.zeros(())}
    state, rates = optimizer.init(params), []
    for _ in range(20):
        updates, state = optimizer.update({"x": jax.numpy.ones(())}, state, params)
        rates.append(-float(updates["x"]))
    np.testing.assert_allclose(rates[:4], [0.25, 0.5, 0.75, 1.0], rtol=1e-4)
    last = 1 / 16 if schedule == "linear" else 1.0
    np.testing.assert_allclose(rates[-1], last, rtol=1e-4)


# --------------------------------------------- methods that want more of the training


def more(command, out, name, *options):
    """The command of a run of nine steps of a recipe of the repository, on texts of
    one length, so that each step is compiled once."""
    short = ["--config", f"configs/{name}.toml", "--length", 16]
    return command(out, *short, *options)


@pytest.fixture(scope="module")
def in_stages(command, tmp_path_factory):
    """Folders of runs that were not interrupted."""
    out = tmp_path_factory.mktemp("stages")
    for name in ("adalora", "diff_pruning"):
        assert finetune.main(more(command, out / name, name)) == 0
    return out


@pytest.fixture(scope="module")
def with_encoder(command, tmp_path_factory):
    """The folder of a run of P-tuning that was not interrupted."""
    out = tmp_path_factory.mktemp("runs") / "p_tuning"
    assert finetune.main(more(command, out, "p_tuning")) == 0
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "steps"),
    # Of nine steps diff pruning learns what to keep in five; six end an epoch.
    [("adalora", [4]), ("diff_pruning", [5, 7])],
)
def test_a_run_in_stages_is_resumed_bit_for_bit(
    name, steps, in_stages, command, base, tmp_path
):
    argv = more(command, tmp_path / "out", name)
    for k, step in enumerate(steps):
        assert finetune.main([*argv, *["--resume"] * k], stop_after=step) == 130
    assert finetune.main([*argv, "--resume"]) == 0
    tiny_bert.assert_same_adapter(tmp_path / "out", in_stages / name, base)
    resumed, whole = (
        read(x / "metrics.json") for x in (tmp_path / "out", in_stages / name)
    )
    assert resumed["history"] == whole["history"]


def loaded(out, base):
    head = finetune.keys(0).head
    return jpeft.load(
        out / "adapter", finetune.read_base(base, len(tiny_bert.CLASSES), head)[1]
    )


@pytest.mark.slow
def test_adalora_ends_with_the_ranks_of_the_budget(in_stages, base):
    params = loaded(in_stages / "adalora", base)
    ranks = jpeft.plot.allocation.rank_table(params).values
    assert ranks.shape == (6, 1)  # the matrices of one layer
    assert ranks.sum() == 8 * 6 and len(set(ranks.ravel())) > 1
    trained = read(in_stages / "adalora" / "metrics.json")["parameters"]["trainable"]
    assert trained == jpeft.count(params).trainable


@pytest.mark.slow
def test_diff_pruning_ends_with_the_wanted_density(in_stages, base):
    params = loaded(in_stages / "diff_pruning", base)
    head = 32 * len(tiny_bert.CLASSES) + len(tiny_bert.CLASSES)
    everything = (
        jpeft.count(params["bert"]).total - jpeft.count(params["bert"]).trainable
    )
    words = params["bert"]["embeddings"]["word_embeddings"]["embedding"].size
    kept = jpeft.count(params).trainable - head
    indices = kept  # int32, one a difference, counted as frozen
    assert kept == round(0.005 * (everything - indices - words))


@pytest.mark.slow
def test_a_prompt_is_kept_without_the_encoder_that_made_it(
    command, with_encoder, base, tmp_path
):
    embeddings = loaded(with_encoder, base)["bert"]["embeddings"]
    leaf = embeddings["word_embeddings"]["embedding"]
    assert type(leaf).__name__ == "Prompt" and leaf.prompt.shape == (20, 32)
    trained = read(with_encoder / "metrics.json")["parameters"]["trainable"]
    assert trained == 20 * 32 + 32 * len(tiny_bert.CLASSES) + len(tiny_bert.CLASSES)
    # A run that goes on, or only ends again, needs the encoder.
    argv = more(command, tmp_path, "p_tuning")
    assert finetune.main(argv, stop_after=4) == 130
    assert finetune.main([*argv, "--resume"], stop_after=9) == 130
    assert finetune.main([*argv, "--resume"]) == 0
    tiny_bert.assert_same_adapter(tmp_path, with_encoder, base)


def test_b_learns_faster_with_lora_plus():
    recipe = _recipe.read(ROOT / "configs" / "lora_plus.toml", {"warmup": 0.0})[1]
    optimizer = finetune.make_stages(recipe, 20)[0].optimizer
    params = jpeft.lora(2)(jax.random.key(0), {"kernel": np.ones((7, 5), np.float32)})
    trainable, _ = jpeft.partition(params)
    ones = jax.tree.map(np.ones_like, trainable)
    updates, _ = optimizer.update(ones, optimizer.init(trainable), trainable)
    a, b = updates["kernel"].a, updates["kernel"].b
    np.testing.assert_allclose(b, 16 * a[0, 0], rtol=1e-5)


def test_the_classifier_may_learn_at_a_rate_of_its_own():
    changes = {"warmup": 0.0, "learning_rate": 0.01, "head_learning_rate": 0.5}
    recipe = _recipe.read(ROOT / "configs" / "lora.toml", changes)[1]
    optimizer = finetune.make_stages(recipe, 20)[0].optimizer
    params = {name: np.ones(3, np.float32) for name in ("bert", "classifier")}
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    np.testing.assert_allclose(updates["bert"], -0.01, rtol=1e-5)
    np.testing.assert_allclose(updates["classifier"], -0.5, rtol=1e-5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train.adalora]\ntarget = 4", "[train.adalora] has no key 'target'; did you"),
        ("[train.adalora]\ntarget_rank = 'x'", "[train.adalora] target_rank must be"),
        ("[train.adalora]\nt_final = 1.0", "together below 1, found 0.125 and 1.0"),
        ("[train.diff_pruning]\nfixed = 1.0", "fixed must be 0 or more and below 1"),
        ("[train]\nlora_plus = 16", "write [train.lora_plus], a table, not 16"),
        ("[train.adalroa]\nt_final = 0.1", "did you mean 'adalora'?"),
        ("[train.adalora]\n[train.diff_pruning]", "cannot be in one recipe"),
        ("[train.adalora]\ntarget_rank = 4", "this tree has no AdaLoRA leaf"),
        ("[train.lora_plus]\nratio = -1.0", "ratio=-1.0: expected a number above 0"),
        ("[train.adalora]\nform = 'mean'", "[train.adalora] form must be one of"),
        ("[train]\nprefix_start = 'text'", "no prefix to set; apply jpeft.prefix"),
    ],
)
def test_a_table_of_a_method_that_cannot_be_used_is_refused(
    text, message, command, tmp_path, capsys
):
    path = tmp_path / "recipe.toml"
    path.write_text('[[peft]]\nmethod = "lora"\nrank = 2\n\n' + text + "\n")
    fails(capsys, command(tmp_path / "out", "--config", path), message)


def test_a_prefix_longer_than_any_text_cannot_start_as_one(command, tmp_path, capsys):
    path = tmp_path / "recipe.toml"
    peft = '[[peft]]\nmethod = "prefix"\nlength = 193\n'
    path.write_text(peft + '[train]\nprefix_start = "text"\n')
    message = "a prefix of 193 rows cannot start as a text"
    fails(capsys, command(tmp_path / "out", "--config", path), message)
