"""SFT, reward model, DPO, PPO and GRPO as commands, on a model of a few weights."""

import json
import sys
import types

import _loop
import _recipe
import _rewards
import dpo
import generate
import grpo
import jax
import numpy as np
import ppo
import pytest
import reward
import sft
import tiny_lm

import jpeft

CHATS = [
    {"instruction": f"count to {n}", "output": " ".join(map(str, range(n)))}
    for n in range(1, 25)
]
PAIRS = [
    {"prompt": f"say {n}", "chosen": f"{n}.", "rejected": f"Well, {n} it is!"}
    for n in range(24)
]
QUESTIONS = [{"prompt": f"say {n}", "wanted": str(n)} for n in range(24)]
REWARD = """
def reward(answers, rows):
    assert len(answers) == len(rows) and all("wanted" in r for r in rows)
    return [float(len(a)) for a in answers]

def half(answers, rows):
    return [None if k % 2 else 1.0 for k in range(len(answers))]

def broken(answers, rows):
    return [float("nan")] * len(answers)

def short(answers, rows):
    return [1.0]
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a model and data, and the options that name the model."""
    folder = tmp_path_factory.mktemp("world")
    tiny_lm.write(folder / "model")
    for name, rows in (("chats", CHATS), ("pairs", PAIRS), ("questions", QUESTIONS)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "rewards.py").write_text(REWARD)
    return folder


def options(world, name, out, *more):
    data = {"sft": "chats", "reward": "pairs", "dpo": "pairs"}.get(name, "questions")
    made = {
        "--base": world / "model",
        "--base-form": "float32",
        "--data": world / f"{data}.jsonl",
        "--out": out,
        "--steps": 4,
        "--batch-size": 4,
        "--evaluate-every": 2,
        "--save-every": 2,
        "--held-out": 4,
    }
    made |= {
        "sft": {"--length": 160, "--samples": 2, "--answer-tokens": 4},
        "reward": {"--prompt-length": 64, "--answer-length": 24},
        "dpo": {"--prompt-length": 64, "--answer-length": 24},
        "ppo": {
            "--prompt-length": 64,
            "--answer-length": 6,
            "--reward": world / "judge" / "adapter",
            "--parts": 2,
        },
        "grpo": {
            "--prompt-length": 64,
            "--answer-length": 6,
            "--group": 4,
            "--reward": f"{world / 'rewards.py'}:reward",
        },
    }[name]
    return [str(x) for pair in made.items() for x in pair] + list(more)


SCRIPTS = {"sft": sft, "reward": reward, "dpo": dpo, "ppo": ppo, "grpo": grpo}


def run(world, name, out, *more, stop_after=None):
    if name == "ppo" and not (world / "judge").exists():
        assert run(world, "reward", world / "judge") == 0
    with jax.numpy_dtype_promotion("standard"):  # optax mixes int and float
        return SCRIPTS[name].main(
            options(world, name, out, *more), stop_after=stop_after
        )


def adapter(world, out, scored=False):
    import _lm

    language = _lm.load(world / "model", "float32")
    language = reward.scored(language) if scored else language
    return jpeft.load(out / "adapter", language.base)


@pytest.mark.parametrize(
    "name",
    [
        "reward",  # and DPO, which has its data and its loop
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("sft", "ppo", "grpo")),
    ],
)
def test_an_interrupted_run_ends_as_one_that_was_not(world, tmp_path, capsys, name):
    """Bit for bit, with the position in the data, what is drawn, the critic and the
    optimiser; and the metrics have every step once."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(world, name, whole, "--tensorboard") == 0
    assert list((whole / "tensorboard").glob("events.*"))
    assert run(world, name, parts, stop_after=3) == 130
    assert "step 3 is saved" in capsys.readouterr().err
    assert run(world, name, parts, "--resume") == 0
    ours, theirs = (adapter(world, x, name == "reward") for x in (whole, parts))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)
    lines = [
        [json.loads(x) for x in (out / _loop.METRICS).read_text().splitlines()]
        for out in (whole, parts)
    ]
    for one in lines:
        for line in one:
            line.pop("tokens_per_s", None)
    assert lines[0] == lines[1]
    steps = [x["step"] for x in lines[0] if x["kind"] == "train"]
    assert steps == [1, 2, 3, 4]
    assert (whole / "curves.png").exists() and (whole / "metrics.json").exists()


ADALORA = """
[[peft]]
method = "adalora"
rank = 4
where = "linear"

[train]
learning_rate = 4e-3

[train.adalora]
target_rank = 2
"""


@pytest.mark.slow
def test_what_adalora_prunes_is_not_saved(world, tmp_path):
    recipe, out = tmp_path / "adalora.toml", tmp_path / "run"
    recipe.write_text(ADALORA)
    assert run(world, "sft", out, "--config", str(recipe), "--steps", "8") == 0
    found = json.loads((out / "metrics.json").read_text())
    assert found["after"]["loss"] < found["before"]["loss"]
    pruned = lambda x: hasattr(x, "lam")
    leaves = jax.tree.leaves(adapter(world, out), is_leaf=pruned)
    kept = [np.asarray(x.lam) for x in filter(pruned, leaves)]
    # Two of four triplets a matrix, on average.
    assert 0 < sum(map(np.count_nonzero, kept)) <= 2 * sum(len(x) for x in kept)


@pytest.mark.slow
def test_settings_of_another_run_are_not_resumed(world, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(world, "sft", out, stop_after=2) == 130
    assert run(world, "sft", out, "--resume", "--learning-rate", "0.5") == 2
    assert "learning_rate was" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "more", "says"),
    [
        ("sft", ["--length", "600"], "length 600: the model's context is 512"),
        ("sft", ["--accumulate", "3"], "accumulate 3 does not divide batch_size 4"),
        ("sft", ["--too-long", "cut"], "too_long must be one of truncate, drop, keep"),
        ("sft", ["--too-long", "keep", "--length", "40"], "rows have 40"),
        ("sft", ["--prompt", "{question}"], "unknown field 'question'"),
        ("sft", ["--batch-size", "100"], "batch_size 100: there are only"),
        ("sft", ["--held-out", "24"], "held_out=24 of 24 examples"),
        ("reward", ["--prompt-length", "600"], "the model's context 512"),
        ("dpo", ["--loss", "dqo"], "loss must be one of dpo"),
        ("dpo", ["--loss", "ipo", "--label-smoothing", "0.1"], "ipo has none"),
        ("ppo", ["--reward", "nowhere"], "nowhere"),
        ("ppo", ["--temperature", "0"], "temperature must be above 0"),
        ("ppo", ["--parts", "3"], "parts 3 does not divide batch_size 4"),
        ("ppo", ["--prompt-length", "8"], "none of 20 questions fits"),
        ("grpo", ["--group", "1"], "one answer has no other"),
        ("grpo", ["--reward", "rewards"], r"expected file.py:function"),
    ],
)
def test_what_cannot_be_used_is_refused(world, tmp_path, capsys, name, more, says):
    if name == "ppo":
        (world / "judge").mkdir(exist_ok=True)
    assert SCRIPTS[name].main(options(world, name, tmp_path / "out", *more)) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_unknown_key_of_a_recipe_is_refused(world, tmp_path, capsys):
    recipe = tmp_path / "mine.toml"
    recipe.write_text('[[peft]]\nmethod = "lora"\nrank = 2\n[train]\nlenght = 5\n')
    assert run(world, "sft", tmp_path / "out", "--config", str(recipe)) == 2
    assert "did you mean 'length'?" in capsys.readouterr().err


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_long_run_is_in_the_recipe(name):
    script = SCRIPTS[name]
    file = _recipe.find(script.CONFIG)
    short, long = (
        _recipe.read(file, {"full": x, "seed": 3}, script.Settings)[1]
        for x in (False, True)
    )
    assert long.steps > 5 * short.steps and long.batch_size > short.batch_size
    assert long.seed == 3


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ("", "has no table [train.full]"),
        ("[train.full]\nstps = 5", "[train.full] has no key 'stps'; did you mean"),
        ("[train]\nfull = 5", "write [train.full], a table, not 5"),
    ],
)
def test_a_long_run_that_is_not_there_is_refused(world, tmp_path, capsys, table, says):
    recipe = tmp_path / "mine.toml"
    recipe.write_text(f'[[peft]]\nmethod = "lora"\nrank = 2\n{table}')
    options = "--config", str(recipe), "--full"
    assert run(world, "sft", tmp_path / "out", *options) == 2
    assert says in capsys.readouterr().err


# --- rewards -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "says"),
    [("broken", "gave nan for the answer"), ("short", "gave 1 numbers for 2 answers")],
)
def test_a_reward_function_that_gives_no_number_is_refused(world, function, says):
    task = _rewards.of_function(f"{world / 'rewards.py'}:{function}", QUESTIONS)
    with pytest.raises(ValueError, match=says):
        task.score(["a", "b"], QUESTIONS[:2])


@pytest.mark.slow
def test_a_run_whose_rewards_are_none_ends_with_a_sentence(world, tmp_path, capsys):
    name = f"{world / 'rewards.py'}:broken"
    assert run(world, "grpo", tmp_path / "out", "--reward", name) == 1
    assert "gave nan for the answer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("3 + 4 = 7.", "7"),
        ("It is 1,204, I think", "1204"),
        ("minus -2.5!", "-2.5"),
        ("seven", ""),
    ],
)
def test_the_last_number_of_an_answer(answer, number):
    assert _rewards.last_number(answer) == number


def test_a_task_whose_answers_are_no_numbers_says_how_to_read_them(monkeypatch):
    class Words(list):
        def score_answer(self, answer, entry):
            return float(answer == entry["answer"])

    made = Words([{"question": "Say it backwards: dog", "answer": "god"}])
    gym = types.SimpleNamespace(create_dataset=lambda name, **_: made)
    monkeypatch.setitem(sys.modules, "reasoning_gym", gym)
    with pytest.raises(ValueError, match=r"answer 'god' would not count.*--read whole"):
        _rewards.of_gym("spell_backward", 1, 0, {}, "last_number")
    task = _rewards.of_gym("spell_backward", 1, 0, {}, "whole")
    assert task.score([" god\n", "dog"], task.rows * 2).tolist() == [1, 0]


def test_answers_that_cannot_be_judged_are_left_out(world):
    task = _rewards.of_function(f"{world / 'rewards.py'}:half", QUESTIONS)
    found = task.score(["a", "b"], QUESTIONS[:2])
    assert found[0] == 1 and np.isnan(found[1])


def test_a_reward_function_that_is_not_there_is_refused(world):
    with pytest.raises(ValueError, match="has no function 'reword'"):
        _rewards.of_function(f"{world / 'rewards.py'}:reword", [])
    with pytest.raises(FileNotFoundError, match="there is no file"):
        _rewards.of_function("nowhere.py:reward", [])


# --- writing -------------------------------------------------------------------------


def test_questions_are_answered_with_and_without_an_adapter(world, tmp_path, capsys):
    file = tmp_path / "questions.txt"
    file.write_text("one?\na longer one?\nthe third?\n")
    base = ["--base", str(world / "model")]  # whose files have no codes to keep
    how = [*base, "--max-tokens", "5", "--temperature", "0", "--batch-size", "2"]
    assert generate.main([*how, "--prompts", str(file)]) == 0
    shown = capsys.readouterr()
    plain = shown.out
    assert plain.count("> ") == 3 and "tokens/s" in shown.err
    assert generate.main([*how, "--prompt", "one?"]) == 0
    assert plain.split("\n")[1] == capsys.readouterr().out.strip("\n")


@pytest.mark.parametrize(
    ("peft", "merges"), [(jpeft.lora(rank=2), True), (jpeft.prompt(length=3), False)]
)
def test_questions_are_answered_with_an_adapter(world, tmp_path, capsys, peft, merges):
    import _lm

    language = _lm.load(world / "model", "float32")
    params = language.attach(peft, jax.random.key(0))
    trainable, frozen = jpeft.partition(params)
    draw = np.random.default_rng(0)
    moved = lambda x: x + draw.normal(0, 0.5, x.shape).astype(np.float32)
    params = jpeft.combine(jax.tree.map(moved, trainable), frozen)
    jpeft.save(tmp_path / "adapter", params, peft)
    how = ["--base", str(world / "model"), "--base-form", "float32", "--prompt", "a?"]
    how += ["--max-tokens", "6", "--temperature", "0"]
    said = []
    for more in ([], ["--adapter", str(tmp_path / "adapter")]):
        assert generate.main([*how, *more]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] != said[1]
    if merges:
        assert generate.main([*how, *more, "--merge"]) == 0
        assert capsys.readouterr().out == said[1]


def test_a_prompt_that_fills_the_context_is_refused(world, capsys):
    base = ["--base", str(world / "model"), "--base-form", "float32"]
    assert generate.main([*base, "--prompt", "x" * 500, "--max-tokens", "9"]) == 2
    assert "do not fit into the model's context of 512" in capsys.readouterr().err


# --- four roles, one base ------------------------------------------------------------


@pytest.mark.slow
def test_four_roles_pass_their_base_once(world, tmp_path):
    """The arguments of a round are one base, four trees of adapters, and what the
    optimiser keeps."""
    if not (world / "judge" / "adapter").exists():
        assert run(world, "reward", world / "judge", "--overwrite") == 0
    args = ppo.parser().parse_args(options(world, "ppo", tmp_path / "out"))
    with jax.numpy_dtype_promotion("standard"):
        job = ppo.prepare(args)
        policy, _ = jpeft.partition(job.params)
        batch = next(job.batches)
        compiled = job.step.jitted.lower(
            policy, job.state, job.step.shared.arrays, batch, jax.random.key(0)
        ).compile()
    size = lambda tree: sum(np.asarray(x).nbytes for x in jax.tree.leaves(tree))
    # The judge and the critic, each with a head.
    adapters = size(policy) + 2 * size(job.state["critic"])
    wanted = size(job.base) + adapters + size(job.state["optimizer"]) + size(batch)
    taken = compiled.memory_analysis().argument_size_in_bytes
    assert taken <= 1.02 * wanted
