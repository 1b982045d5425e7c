"""The table of methods for instruction tuning, over a model of a few weights."""

import dataclasses
import json

import _compare
import _compare_sft
import _jobs
import _loop
import _recipe
import _runs
import compare_methods
import jax
import pytest
import sft
import tiny_lm
from _compare_sft import Cost, Outcome, Row, Untrained

import jpeft

CHATS = [
    {"instruction": f"count to {n}", "output": " ".join(map(str, range(n)))}
    for n in range(1, 25)
]
COST = Cost(
    flops=2e9,
    temp_bytes=2**21,
    tokens_per_second=300.0,
    serving_flops=1.25,
    merges=False,
    virtual=20,
)
FOUND = Outcome(
    trainable=500,
    parameters=20_000,
    adapter_bytes=330_000,
    base="q4_1",
    loss_before=3.0,
    loss_after=2.5,
    one_sentence=0.75,
    cost=COST,
)
BEFORE = Untrained(loss=3.0, one_sentence=0.25, examples="2 steps of 4 x 160 tokens")


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Of a run of two steps.  The model's keys are 16 wide: rank 32 does not fit."""
    folder = tmp_path_factory.mktemp("world")
    tiny_lm.write(folder / "model")
    data = folder / "chats.jsonl"
    data.write_text("\n".join(map(json.dumps, CHATS)))
    made = ["--base", folder / "model", "--base-form", "float32", "--data", data]
    made += ["--length", 160, "--steps", 2, "--held-out", 4, "--samples", 2]
    return [*map(str, made), "--answer-tokens", "4"]


@pytest.fixture(autouse=True)
def as_in_the_command():
    """What the command has: Optax's schedules multiply a float by a count."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def command(folder, options, *methods):
    argv = ["--task", "sft", "--methods", *methods, "--out", str(folder / "runs")]
    return [*argv, "--markdown", str(folder / "table.md"), *options]


def rows_of(text):
    """Name -> the other cells, by the head's names."""
    lines = [x for x in text.splitlines() if x.startswith("|")]
    head, _, *rows = ([c.strip() for c in x.strip("|").split("|")] for x in lines)
    assert tuple(head) == _compare_sft.HEAD
    return {name: dict(zip(head[1:], cells, strict=True)) for name, *cells in rows}


# ------------------------------------------------------------------------ the recipes


def test_recipes_differ_in_what_trains_its_rates_and_the_base_alone():
    names = _compare.names(_compare_sft.SFT)
    assert {"lora", "full", "prompt", "adapter", "qlora"} <= set(names)
    common = sft.Settings()
    for name in names:
        file = _compare.recipe_file(name, _compare_sft.SFT)
        _, how = _recipe.read(file, {}, sft.Settings)
        own = ("learning_rate", "base_form", "lora_plus", "adalora")
        own = {field: getattr(how, field) for field in own}
        assert how == dataclasses.replace(common, **own), name


# --------------------------------------------------------------------------- the runs


@pytest.mark.slow
def test_each_method_is_trained_once_and_has_a_row(
    options, tmp_path, monkeypatch, capsys
):
    argv = command(tmp_path, options, "prompt", "rslora")
    assert compare_methods.main(argv) == 0
    text = (tmp_path / "table.md").read_text()
    assert text in capsys.readouterr().out
    rows = rows_of(text)
    assert [*rows] == ["prompt", "lora", "rslora"]
    unit, prompt = rows["lora"], rows["prompt"]
    assert (unit["FLOPs"], unit["temporaries"]) == ("1.00x", "1.00x")
    assert unit["serving"] == "merges" and prompt["serving"].endswith("20 tokens more")
    assert prompt["trainable"] == f"{20 * 32:,}" and prompt["base"] == "float32"
    assert float(prompt["FLOPs"][:-1]) < 1  # no product for the gradient of a weight
    before, after = map(float, unit["loss"].split(" to "))
    assert after < before and f"Untrained: loss {before:.3f} a token" in text
    assert rows["rslora"]["serving"].startswith("refused: layers/attn/k/kernel: rank")
    monkeypatch.setattr(_loop, "train", lambda run: pytest.fail("trained again"))
    assert compare_methods.main(argv) == 0
    assert (tmp_path / "table.md").read_text() == text


def test_what_cannot_be_attached_is_listed_and_what_fails_is_told(
    options, tmp_path, monkeypatch, capsys
):
    def fails(run):
        if run.name == "ia3, seed 0":
            raise _runs.Failed("loss is nan at step 2; try another --learning-rate")
        return FOUND

    monkeypatch.setattr(_compare_sft, "outcome", fails)
    monkeypatch.setattr(_compare_sft, "untrained", lambda run: BEFORE)
    assert compare_methods.main(command(tmp_path, options, "lora", "rslora")) == 0
    printed = capsys.readouterr()
    why = rows_of(printed.out)["rslora"]["serving"]
    assert why == (
        "refused: layers/attn/k/kernel: rank 32 is larger than the matrix 32 x 16 of "
        "shape (2, 32, 16)"
    )
    assert "use rank <= 16" in printed.err
    assert compare_methods.main(command(tmp_path, options, "ia3")) == 1
    rows = rows_of(capsys.readouterr().out)
    assert rows["ia3"]["serving"] == "failed: loss is nan at step 2"
    assert rows["lora"]["serving"] == "1.250x FLOPs, 20 tokens more"  # kept from before


# -------------------------------------------------------------------------- the costs


@pytest.fixture(scope="module")
def lora(options, tmp_path_factory):
    return prepared("lora", options, tmp_path_factory.mktemp("lora"))


def prepared(name, options, out):
    config = str(_compare.recipe_file(name, _compare_sft.SFT))
    argv = [*options, "--config", config]
    return _jobs.prepare(argv, str(out), _compare_sft.SFT)


def test_every_layer_is_counted(lora):
    """XLA counts the body of a loop once, and the layers are one."""
    tokens, width, layers, vocab = 160, 32, 2, lora.language.config.vocab
    kernels = layers * (2 * width * width + 2 * width * 16 + 3 * width * 20)
    products = 2 * tokens * kernels + 2 * vocab * width
    products += 2 * 2 * layers * tokens * tokens * width  # scores, and what they weigh
    found = _compare_sft.reading(lora, lora.base)
    # The rest, norms and a softmax, is some operations a score and a hidden value.
    others = 20 * layers * tokens * (4 * tokens + width)
    assert products < found < products + others


def test_weights_in_few_bits_are_counted_as_plain_ones(lora, options, tmp_path):
    """Their products are loops, of which XLA counts one turn."""
    qlora = prepared("qlora", options, tmp_path)
    assert _compare_sft.held_in(qlora.params) == "nf4"
    assert _compare_sft.held_in(lora.params) == "float32"
    count = _compare_sft.reading
    assert count(qlora, qlora.params) == count(lora, lora.params)


def test_what_merges_is_told(lora):
    prompt = jpeft.prompt(3)(jax.random.key(0), lora.base)
    assert _compare_sft.merges(lora.params) and not _compare_sft.merges(prompt)


# ----------------------------------------------------------------- bad input, the text


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--config", "configs/sft/lora.toml"], "--config is set for each run"),
        (["--methods", "lroa"], "no method 'lroa'; did you mean 'lora'?"),
        (["--markdown", "no/where.md"], "there is no folder no"),
        (["--base", "nowhere", "--methods", "lora"], "nowhere"),
    ],
)
def test_options_that_cannot_be_used_are_refused(argv, text, tmp_path, capsys):
    try:
        code = compare_methods.main(["--task", "sft", *argv, "--out", str(tmp_path)])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert text in capsys.readouterr().err.splitlines()[-1]


def test_costs_are_those_of_lora_at_one():
    unit = dataclasses.replace(COST, flops=1e9, merges=True)
    lora = Row("lora", [dataclasses.replace(FOUND, cost=unit)])
    row = Row("prompt", [FOUND, dataclasses.replace(FOUND, loss_after=2.7)])
    assert _compare_sft.cells(row, lora) == (
        *("prompt", "500", "2.5%", "330 kB", "q4_1"),
        *("3.000 to 2.600 (2.500 to 2.700)", "0.75", "300"),
        *("2.00x", "1.00x", "1.250x FLOPs, 20 tokens more"),
    )
    assert _compare_sft.cells(row, None)[8:10] == ("", "")
    text = _compare_sft.text_of([row, lora], [BEFORE], [0, 1], "a machine")
    assert text.startswith("2 steps of 4 x 160 tokens; seeds 0, 1; a machine.\n")
    assert "Untrained: loss 3.000 a token, one sentence 0.25." in text
    assert "1.00x is LoRA: 1 GFLOP and 2 MiB of temporaries a step." in text
