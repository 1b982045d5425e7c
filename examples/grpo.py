"""GRPO: reinforcement learning with rewards that are verified, and no critic.

    python examples/grpo.py                                  # SmolLM2 learns to add
    python examples/grpo.py --task letter_counting --task-options '{}'
    python examples/grpo.py --data questions.jsonl --reward my_rewards.py:reward

To each question a group of answers is written; an answer's advantage is its reward
beside the group's mean (Shao et al. 2024, arXiv:2402.03300).  `loss` says how tokens
are averaged: "grpo" favours short right and long wrong answers, "dapo" and "dr_grpo"
do not (Yu et al. 2025, arXiv:2503.14476; Liu et al. 2025, arXiv:2503.20783).

The default task is adding two digits, of reasoning-gym: an answer whose last number is
the sum is worth 1, any other 0.  A reward function that the user names sees the
answers and their rows (`_rewards.py`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jpeft
from jpeft import objectives

try:
    import _dialogues
    import _lm
    import _loop
    import _pairs
    import _recipe
    import _report
    import _rewards
    import _rollout
    import _sampling
    from _recipe import _setting
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"error: {missing.name} is not installed; type: "
        "pip install -e '.[examples,hf,plots]'"
    ) from None

CONFIG = "configs/language/grpo.toml"


@dataclasses.dataclass(frozen=True)
class Settings(_loop.Settings):
    """The ``[train]`` table of a recipe for GRPO; batch_size counts questions."""

    group: int = _setting(8, "answers to a question")
    prompt_length: int = _setting(40, "tokens of a question")
    answer_length: int = _setting(16, "tokens of an answer")
    system: str = _setting("", "the system's message, if any")
    base_form: str = _setting("stored", "the base in memory: stored, float32, bfloat16")
    temperature: float = _setting(1.0, "answers are drawn from softmax(logits / this)")
    epochs: int = _setting(1, "times a round is learned from")
    parts: int = _setting(1, "steps of the optimiser an epoch")
    loss: str = _setting("dapo", "grpo, bnpo, dapo, dr_grpo (how tokens are averaged)")
    scale: str = _setting("group", "whose deviation divides: group, batch, none")
    clip: float = _setting(0.2, "bound below on the policy's ratio")
    clip_high: float = _setting(0.28, "bound above")
    kl_coefficient: float = _setting(0.02, "of KL to the reference, in the loss")
    cut_off: str = _setting("keep", "answers without end: penalise, mask or keep")
    penalty: float = _setting(1.0, "what a cut off answer loses, with penalise")
    held_out: int = _setting(64, "questions held out")
    questions: int = _setting(512, "questions that are made, of a task")
    task: str = _setting("basic_arithmetic", "of reasoning-gym")
    read: str = _setting("last_number", "what of an answer: last_number or whole")
    task_options: str = _setting(
        '{"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1, '
        '"operators": ["+"], "allow_parentheses": false, "allow_negation": false}',
        "of the task, as JSON",
    )
    remat: bool = _setting(False, "activations computed again, for memory")

    def __post_init__(self) -> None:
        super().__post_init__()
        names = "prompt_length", "answer_length", "epochs", "parts", "held_out"
        for name in (*names, "questions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more")
        if self.group < 2:
            raise ValueError(
                f"group {self.group}: one answer has no other to be compared with"
            )
        if self.batch_size * self.group % self.parts:
            raise ValueError(
                f"parts {self.parts} does not divide batch_size x group, "
                f"{self.batch_size * self.group}"
            )
        if not self.temperature > 0:
            raise ValueError(
                f"temperature must be above 0, found {self.temperature}: all answers "
                "of a group would be the same"
            )
        _loop.one_of("read", self.read, _rewards.READS)
        _loop.one_of("loss", self.loss, ("grpo", "bnpo", "dapo", "dr_grpo"))
        _loop.one_of("scale", self.scale, ("group", "batch", "none"))
        _loop.one_of("cut_off", self.cut_off, ("penalise", "mask", "keep"))
        _loop.one_of("base_form", self.base_form, _lm.FORMS)

    def options(self) -> dict[str, Any]:
        try:
            found = json.loads(self.task_options)
        except ValueError as error:
            raise ValueError(f"task_options is not valid JSON: {error}") from error
        if not isinstance(found, dict):
            raise ValueError(f"task_options should be an object, found {found!r}")
        return found


# --- the heart -----------------------------------------------------------------------


def make_update(
    language: _lm.Language, how: Settings, optimizer: optax.GradientTransformation
) -> Callable[..., Any]:
    """(trainable, state, frozen, rollout, rewards) -> (trainable, state, metrics).

    rewards: (questions, group) float32, NaN where an answer could not be judged.
    """

    def log_probs(params, ids, mask):
        apply = jpeft.adapt(language.model.apply)
        return _pairs.log_probs(
            apply, params, ids, mask, how.prompt_length, how.temperature
        )

    def loss_of(trainable, frozen, part):
        params = jpeft.combine(trainable, frozen)
        new = log_probs(params, part["ids"], part["mask"])
        loss = objectives.grpo_loss(
            *(new, part["advantages"], part["counted"]),
            old=part.get("old"),
            reference=part["reference"],
            aggregation=how.loss,
            longest=how.answer_length if how.loss == "dr_grpo" else None,
            clip=how.clip,
            clip_high=how.clip_high,
            beta=how.kl_coefficient,
        )
        kl = objectives.estimate_kl(new, part["reference"], estimator="k3")
        kl = jnp.sum(jnp.where(part["counted"], kl, 0.0), axis=1)
        return loss.mean(), {"loss": loss.mean(), "kl": jnp.mean(kl)}

    def update(trainable, state, frozen, rollout, rewards):
        params = jpeft.combine(trainable, frozen)
        ids, mask, answer = rollout.ids, rollout.mask, rollout.answer
        each = lambda f: _rollout.in_parts(f, how.parts, ids, mask)
        if how.cut_off == "penalise":
            stopped = rollout.stopped.reshape(rewards.shape)
            rewards = jnp.where(stopped, rewards, rewards - how.penalty)
        judged = ~jnp.isnan(rewards)
        advantages = objectives.group_relative(rewards, scored=judged, scale=how.scale)
        counted = answer & judged.reshape(-1, 1)
        if how.cut_off == "mask":
            counted &= rollout.stopped[:, None]
        learned = {
            "ids": ids,
            "mask": mask,
            "counted": counted,
            "advantages": advantages.reshape(-1),
            "reference": each(lambda i, m: log_probs(jpeft.disable(params), i, m)),
        }
        if how.epochs * how.parts > 1:  # else what learns is what wrote
            learned["old"] = each(lambda i, m: log_probs(params, i, m))

        def learn(carry, part):
            trainable, opt = carry
            part = jax.tree.map(lambda x: x[part], learned)
            grads, found = jax.grad(loss_of, has_aux=True)(trainable, frozen, part)
            updates, opt = optimizer.update(grads, opt, trainable)
            found["grad_norm"] = optax.global_norm(grads)
            return (optax.apply_updates(trainable, updates), opt), found

        rows = ids.shape[0]
        parts = jnp.tile(jnp.arange(rows).reshape(how.parts, -1), (how.epochs, 1))
        (trainable, opt), found = jax.lax.scan(
            learn, (trainable, state["optimizer"]), parts
        )
        return (
            trainable,
            {"optimizer": opt},
            {
                **{name: jnp.mean(x) for name, x in found.items()},
                "reward": objectives.masked_mean(rewards, judged),
                # Groups that teach nothing.
                "same_reward": jnp.mean(jnp.all(advantages == 0, axis=1)),
                "answer_tokens": jnp.mean(jnp.sum(answer, axis=1)),
                "ended": jnp.mean(rollout.stopped),
            },
        )

    return update


# --- a run ---------------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class Questions:
    """Rows of a task, with their ids; a batch has the numbers of its rows."""

    ids: np.ndarray
    mask: np.ndarray
    rows: list[_rewards.Row]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, k: Any) -> dict[str, Any]:
        return {"ids": self.ids[k], "mask": self.mask[k], "number": np.int32(k)}


def encode(
    language: _lm.Language, rows: Sequence[_rewards.Row], how: Settings, virtual: int
) -> Questions:
    first = [{"role": "system", "content": how.system}] if how.system else []
    kept, prompts = [], []
    for row in rows:
        said = row["prompt"]
        chat = [{"role": "user", "content": said}] if isinstance(said, str) else said
        ids = language.prompt([*first, *chat], virtual)
        if len(ids) <= how.prompt_length:
            kept.append(row)
            prompts.append(ids)
    if not kept:
        raise ValueError(
            f"none of {len(rows)} questions fits into prompt_length {how.prompt_length}"
        )
    if len(kept) < len(rows):
        left_out = len(rows) - len(kept)
        print(f"longer than {how.prompt_length} tokens: {left_out} questions left out")
    pad = language.tokenizer.pad
    return Questions(*_lm.left_padded(prompts, pad, how.prompt_length), kept)


def task_of(args: argparse.Namespace, how: Settings) -> _rewards.Task:
    if args.reward is None:
        if args.data is not None:
            raise ValueError("--data without --reward: name a function that judges")
        return _rewards.of_gym(
            *(how.task, how.questions, how.seed, how.options(), how.read)
        )
    if args.data is None:
        raise ValueError("--reward without --data: give a file with rows of 'prompt'")
    rows = []
    for at, row in _dialogues.rows(args.data):
        if "prompt" not in row:
            raise ValueError(
                f"{at}: no field 'prompt', only {', '.join(map(repr, row))}"
            )
        rows.append(row)
    return _rewards.of_function(args.reward, rows)


def prepare(args: argparse.Namespace) -> _loop.Job:
    """Everything up to the first round; what the user can get wrong is found here."""
    file = _recipe.find(args.config)
    peft, how = _recipe.read(file, vars(args), Settings)
    task = task_of(args, how)
    language = _lm.load(args.base, how.base_form, remat=how.remat)
    train, held_out = _dialogues.split(task.rows, how.held_out, how.seed)
    virtual = peft.virtual_tokens()
    rows, test = (encode(language, x, how, virtual) for x in (train, held_out))
    if len(rows) < how.batch_size:
        raise ValueError(
            f"batch_size {how.batch_size}: there are only {len(rows)} questions"
        )
    params = language.attach(peft, jax.random.key(how.seed))
    steps = how.steps * how.epochs * how.parts
    optimizer = _loop.optimizer(dataclasses.replace(how, steps=steps))
    print(
        f"{task.name}: {len(rows)} questions, {len(test)} held out; a round: "
        f"{how.batch_size} x {how.group} answers of up to {how.answer_length} tokens"
    )
    return _loop.Job(
        name=file.stem,
        out=args.out or Path("runs") / file.stem,
        settings={
            "peft": peft.to_config(),
            **dataclasses.asdict(how),
            "base": language.path.name,
            "judge": task.name,
        },
        peft=peft,
        base=language.base,
        params=params,
        state={"optimizer": optimizer.init(jpeft.partition(params)[0])},
        step=make_step(language, task, rows, how, optimizer),
        batches=_loop.shuffled(rows, how),
        how=how,
        evaluate=evaluation(language, task, test, how),
        tokens=lambda batch: len(batch["ids"]) * how.group * how.answer_length,
        bar="reward",
    )


def make_step(
    language: _lm.Language,
    task: _rewards.Task,
    questions: Questions,
    how: Settings,
    optimizer: optax.GradientTransformation,
) -> Callable[..., Any]:
    """A round: written and learned from on the device, judged between the two here."""
    sampling = _sampling.Sampling(temperature=how.temperature)

    @jax.jit
    def write(trainable, frozen, ids, mask, key):
        params = jpeft.combine(trainable, frozen)
        ids, mask = (jnp.repeat(x, how.group, axis=0) for x in (ids, mask))
        return _rollout.roll(
            language, sampling, how.answer_length, params, ids, mask, key
        )

    update = jax.jit(make_update(language, how, optimizer), donate_argnums=(0, 1))

    def step(trainable, state, frozen, batch, key):
        rollout = write(trainable, frozen, batch["ids"], batch["mask"], key)
        rows = [questions.rows[n] for n in batch["number"] for _ in range(how.group)]
        rewards = judged(task, texts(language, rollout, how.prompt_length), rows)
        rewards = jnp.asarray(rewards.reshape(-1, how.group))
        return update(trainable, state, frozen, rollout, rewards)

    return step


def judged(
    task: _rewards.Task, answers: Sequence[str], rows: Sequence[_rewards.Row]
) -> np.ndarray:
    """As `task.score`; Failed where the function gives what is no reward."""
    try:
        return task.score(answers, rows)
    except ValueError as error:
        raise _loop.Failed(str(error)) from error


def texts(language: _lm.Language, rollout: _rollout.Rollout, prompt: int) -> list[str]:
    """The answers as text, without the token that ends them."""
    tokens, lengths = np.asarray(rollout.ids)[:, prompt:], np.asarray(rollout.answer)
    return [
        language.tokenizer.decode(row[:n])
        for row, n in zip(tokens, lengths.sum(1), strict=True)
    ]


def evaluation(
    language: _lm.Language, task: _rewards.Task, rows: Questions, how: Settings
) -> Callable[..., dict[str, float]]:
    """(params, state) -> reward of the likeliest answers to held-out questions."""
    size = min(len(rows), how.batch_size * how.group)

    @jax.jit
    def write(params, ids, mask):
        key = jax.random.key(0)  # nothing is drawn
        sampling = _sampling.GREEDY
        return _rollout.roll(
            language, sampling, how.answer_length, params, ids, mask, key
        )

    def evaluate(params: Any, state: Any = None) -> dict[str, float]:
        found = []
        for at in range(0, len(rows), size):
            index = np.minimum(np.arange(at, at + size), len(rows) - 1)
            out = write(params, rows.ids[index], rows.mask[index])
            n = min(size, len(rows) - at)
            said = texts(language, out, how.prompt_length)[:n]
            found.append(judged(task, said, rows.rows[at : at + n]))
        rewards = np.concatenate(found)
        return {"reward": np.nanmean(rewards), "perfect": np.mean(rewards == 1)}

    return evaluate


def work(job: _loop.Job, training: Callable[[], None]) -> None:
    print(_report.table(jpeft.summary(job.params), full=False))
    training()
    drawn = ["reward", "kl", "answer_tokens"]
    _loop.tell(job, ["reward", "perfect"], drawn, ["reward"])


def parser() -> argparse.ArgumentParser:
    made = _loop.options(__doc__, Settings, CONFIG)
    add = made.add_argument
    add("--data", type=Path, help="rows of 'prompt' and what --reward reads")
    add("--reward", metavar="FILE.py:NAME", help="function that judges (reasoning-gym)")
    return made


def main(argv: Sequence[str] | None = None, *, stop_after: int | None = None) -> int:
    """The command; after that many rounds it does what it does after Ctrl-C."""
    return _loop.command(__file__, argv, parser(), prepare, work, stop_after)


if __name__ == "__main__":
    sys.exit(main())
