"""PPO on a language model: four roles, four adapter trees, one base.

    python examples/ppo.py                  # SmolLM2; trains a reward model first, if
                                            # there is none
    python examples/ppo.py --reward runs/reward/adapter --steps 40
    python examples/ppo.py --resume                          # after Ctrl-C

    policy      adapters that train; writes the answers
    reference   the policy with its adapters off
    reward      adapters and a head from `reward.py`, frozen
    critic      begins as the reward model; trains

A round is one jitted step: answers are written, scored and judged, then `epochs` times
learned from (Schulman et al. 2017, arXiv:1707.06347; on language: Ziegler et al. 2019,
arXiv:1909.08593).  The policy that writes is the one that trains, in the same program,
so nothing corrects for a sampler that differs from it.

Questions are those of the preference pairs, or of a file with rows of `prompt`.
"""

from __future__ import annotations

import argparse
import dataclasses
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
    import _rollout
    import _sampling
    import reward
    from _recipe import _setting
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"error: {missing.name} is not installed; type: "
        "pip install -e '.[examples,hf,plots]'"
    ) from None

CONFIG = "configs/language/ppo.toml"
REWARD = Path("runs/reward/adapter")


@dataclasses.dataclass(frozen=True)
class Settings(_loop.Settings):
    """The ``[train]`` table of a recipe for PPO."""

    prompt_length: int = _setting(72, "tokens of a question")
    answer_length: int = _setting(24, "tokens of an answer")
    base_form: str = _setting("stored", "the base in memory: stored, float32, bfloat16")
    temperature: float = _setting(1.0, "answers are drawn from softmax(logits / this)")
    epochs: int = _setting(2, "times a round is learned from")
    parts: int = _setting(1, "steps of the optimiser an epoch")
    kl_coefficient: float = _setting(0.05, "of the reward's KL term, at the start")
    kl_target: float = _setting(0.0, "KL of an answer it is steered to; 0: it stays")
    kl_horizon: int = _setting(1000, "answers in which it is steered")
    gamma: float = _setting(1.0, "discount a token")
    lam: float = _setting(0.95, "lambda of the advantages (GAE)")
    clip: float = _setting(0.2, "bound on the policy's ratio")
    value_clip: float = _setting(0.2, "bound on how far a value moves")
    value_coefficient: float = _setting(0.1, "of the critic's loss")
    whiten_rewards: bool = _setting(False, "rewards divided by their deviation")
    cut_off: str = _setting("penalise", "answers without end: penalise, mask or keep")
    penalty: float = _setting(1.0, "what a cut off answer loses, with penalise")
    held_out: int = _setting(32, "questions held out")
    remat: bool = _setting(False, "activations computed again, for memory")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("prompt_length", "answer_length", "epochs", "parts", "held_out"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more")
        if self.batch_size % self.parts:
            raise ValueError(
                f"parts {self.parts} does not divide batch_size {self.batch_size}"
            )
        if not self.temperature > 0:
            raise ValueError(
                f"temperature must be above 0, found {self.temperature}: PPO learns "
                "from what is drawn"
            )
        _loop.one_of("cut_off", self.cut_off, ("penalise", "mask", "keep"))
        _loop.one_of("base_form", self.base_form, _lm.FORMS)


# --- the heart -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Roles:
    """language: what writes.  scored: the same base with a head of one score."""

    language: _lm.Language
    scored: _lm.Language
    how: Settings

    @property
    def sampling(self) -> _sampling.Sampling:
        return _sampling.Sampling(temperature=self.how.temperature)

    def log_probs(self, params: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
        apply = jpeft.adapt(self.language.model.apply)
        how = self.how
        return _pairs.log_probs(
            apply, params, ids, mask, how.prompt_length, how.temperature
        )

    def values(self, params: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """(batch, answer): what is expected before each token of the answer."""
        out = jpeft.adapt(self.scored.model.apply)(
            {"params": params}, ids, mask, logits_from=self.how.prompt_length - 1
        )
        return out.logits[:, :-1]


def make_round(
    roles: Roles,
    optimizer: optax.GradientTransformation,
    shared: _rollout.Shared,
) -> Callable[..., Any]:
    """(policy, state, arrays, batch, key) -> (policy, state, metrics), to be jitted.

    policy: what of it trains.  state: the optimiser's, what of the critic trains, the
    coefficient of KL.  arrays: everything that does not train, each array once.
    """
    how = roles.how

    def judged(rollout, policy, critic, judge, coefficient):
        """What the round is learned from; of constants, none is differentiated."""
        ids, mask, answer = rollout.ids, rollout.mask, rollout.answer
        each = lambda f: _rollout.in_parts(f, how.parts, ids, mask)
        old = each(lambda i, m: roles.log_probs(policy, i, m))
        reference = each(lambda i, m: roles.log_probs(jpeft.disable(policy), i, m))
        values = each(lambda i, m: roles.values(critic, i, m))
        scores = each(lambda i, m: reward.scores(roles.scored, judge, i, m))
        counted = answer
        if how.cut_off == "mask":
            counted = answer & rollout.stopped[:, None]
        elif how.cut_off == "penalise":
            scores = jnp.where(rollout.stopped, scores, scores - how.penalty)
        kl = objectives.estimate_kl(old, reference, estimator="k1")
        rewards = objectives.place_scores(-coefficient * kl, scores, answer)
        if how.whiten_rewards:
            rewards = objectives.whiten(rewards, counted, keep_mean=True)
        advantages, returns = objectives.gae(
            rewards, values, answer, gamma=how.gamma, lam=how.lam
        )
        advantages = objectives.whiten(advantages, counted)
        learned = {
            "ids": ids,
            "mask": mask,
            "counted": counted,
            "old": old,
            "values": values,
            "advantages": advantages,
            "returns": returns,
        }
        lengths = jnp.sum(answer, axis=1)
        return learned, {
            "reward": jnp.mean(scores),
            "kl": jnp.mean(jnp.sum(jnp.where(answer, kl, 0.0), axis=1)),
            "answer_tokens": jnp.mean(lengths),
            "ended": jnp.mean(rollout.stopped),
        }

    def loss_of(both, frozen, part):
        policy, critic = (
            jpeft.combine(t, f) for t, f in zip(both, frozen, strict=True)
        )
        new = roles.log_probs(policy, part["ids"], part["mask"])
        # What was judged was judged in another program: the last bit may differ.
        old = jnp.where(part["first"], jax.lax.stop_gradient(new), part["old"])
        moved = new, old, part["advantages"], part["counted"]
        loss = objectives.policy_loss(*moved, clip=how.clip)
        values = roles.values(critic, part["ids"], part["mask"])
        value_loss = objectives.value_loss(
            values,
            *(part["values"], part["returns"], part["counted"]),
            clip=how.value_clip,
        )
        total = loss.mean() + how.value_coefficient * value_loss.mean()
        ratio = jnp.exp(new - part["old"]) - 1
        ratio = jnp.max(jnp.abs(jnp.where(part["counted"], ratio, 0.0)))
        return total, {
            "loss": total,
            "value_loss": value_loss.mean(),
            "ratio_apart": ratio,
            "clipped": objectives.clip_fraction(*moved, clip=how.clip).mean(),
        }

    def round_(policy, state, arrays, batch, key):
        frozen_policy, frozen_critic, judge = shared.trees(arrays)
        critic, frozen = state["critic"], (frozen_policy, frozen_critic)
        write, order = jax.random.split(key)
        rollout = _rollout.roll(
            roles.language,
            *(roles.sampling, how.answer_length),
            *(jpeft.combine(policy, frozen_policy), batch["ids"], batch["mask"]),
            write,
        )
        learned, metrics = judged(
            rollout,
            jpeft.combine(policy, frozen_policy),
            jpeft.combine(critic, frozen_critic),
            *(judge, state["kl_coefficient"]),
        )
        rows = batch["ids"].shape[0]
        # The first epoch takes the parts as they were judged.
        orders = [jnp.arange(rows)] + [
            jax.random.permutation(k, rows)
            for k in jax.random.split(order, how.epochs - 1)
        ]
        parts = jnp.stack(orders).reshape(how.epochs * how.parts, rows // how.parts)

        def learn(carry, xs):
            (both, opt), (part, first) = carry, xs
            part = {**jax.tree.map(lambda x: x[part], learned), "first": first}
            grads, found = jax.grad(loss_of, has_aux=True)(both, frozen, part)
            updates, opt = optimizer.update(grads, opt, both)
            return (optax.apply_updates(both, updates), opt), found

        carry = (policy, critic), state["optimizer"]
        first = jnp.arange(len(parts)) == 0
        ((policy, critic), opt), found = jax.lax.scan(learn, carry, (parts, first))
        apart = found.pop("ratio_apart")[0]
        coefficient = state["kl_coefficient"]
        if how.kl_target:
            coefficient = objectives.adapt_coefficient(
                *(coefficient, metrics["kl"]),
                target=how.kl_target,
                episodes=rows,
                horizon=how.kl_horizon,
            )
        state = {"optimizer": opt, "critic": critic, "kl_coefficient": coefficient}
        found = {name: jnp.mean(x) for name, x in found.items()}
        return (
            policy,
            state,
            {
                **metrics,
                **found,
                "programs_apart": apart,
                "kl_coefficient": coefficient,
            },
        )

    return round_


@dataclasses.dataclass(frozen=True, eq=False)
class Round:
    """`make_round`, jitted, with what it passes beside what moves."""

    jitted: Callable[..., Any]
    shared: _rollout.Shared

    def __call__(self, policy, state, frozen, batch, key):
        # Of what the loop holds, the frozen part is in `shared` already.
        return self.jitted(policy, state, self.shared.arrays, batch, key)


# --- a run ---------------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class Questions:
    """Questions as rows, padded on the left."""

    ids: np.ndarray
    mask: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, k: Any) -> dict[str, np.ndarray]:
        return {"ids": self.ids[k], "mask": self.mask[k]}


def questions(
    language: _lm.Language, chats: Sequence[Any], length: int, virtual: int
) -> tuple[Questions, int]:
    """(rows, how many questions were too long and left out)."""
    prompts = [language.prompt(c, virtual) for c in chats]
    kept = [p for p in prompts if len(p) <= length]
    if not kept:
        raise ValueError(
            f"none of {len(prompts)} questions fits into prompt_length {length}"
        )
    ids, mask = _lm.left_padded(kept, language.tokenizer.pad, length)
    return Questions(ids, mask), len(prompts) - len(kept)


def read(args: argparse.Namespace) -> list[Any]:
    """The chats that end with a question."""
    if args.data is None:
        return [x.question for x in _pairs.default()]
    chats = []
    for at, row in _dialogues.rows(args.data):
        if "prompt" not in row:
            raise ValueError(
                f"{at}: no field 'prompt', only {', '.join(map(repr, row))}"
            )
        chats.append(list(_dialogues.asked(at, row)))
    return chats


def prepare(args: argparse.Namespace) -> _loop.Job:
    """Everything up to the first round; what the user can get wrong is found here."""
    file = _recipe.find(args.config)
    peft, how = _recipe.read(file, vars(args), Settings)
    language = _lm.load(args.base, how.base_form, remat=how.remat)
    scored = reward.scored(language)
    roles = Roles(language, scored, how)
    train, held_out = _dialogues.split(read(args), how.held_out, how.seed)
    virtual = peft.virtual_tokens()
    rows, left_out = questions(language, train, how.prompt_length, virtual)
    test, _ = questions(language, held_out, how.prompt_length, virtual)
    if left_out:
        print(f"longer than {how.prompt_length} tokens: {left_out} questions left out")
    if len(rows) < how.batch_size:
        raise ValueError(
            f"batch_size {how.batch_size}: there are only {len(rows)} questions"
        )
    judge = judge_of(args, scored)
    # A tree of its own, on the same base: the critic begins as the reward model.
    critic, frozen_critic = jpeft.partition(judge)
    critic = jax.tree.map(jnp.copy, critic)
    params = language.attach(peft, jax.random.key(how.seed))
    policy, frozen_policy = jpeft.partition(params)
    optimizer = _loop.optimizer(
        dataclasses.replace(how, steps=how.steps * how.epochs * how.parts)
    )
    shared = _rollout.Shared.of(frozen_policy, frozen_critic, judge)
    jitted = jax.jit(make_round(roles, optimizer, shared), donate_argnums=(0, 1))
    megabytes = lambda *trees: sum(x.nbytes for x in jax.tree.leaves(trees)) / 1e6
    base = megabytes(language.base)
    print(
        f"four roles: one base of {base:.0f} MB, in all "
        f"{megabytes(shared.arrays, policy, critic):.0f} MB; four models would be "
        f"{4 * base + megabytes(policy, critic, critic):.0f} MB"
    )
    print(
        f"{len(rows)} questions, {len(test)} held out; a round: {how.batch_size} "
        f"answers of up to {how.answer_length} tokens"
    )
    return _loop.Job(
        name=file.stem,
        out=args.out or Path("runs") / file.stem,
        settings={
            "peft": peft.to_config(),
            **dataclasses.asdict(how),
            "base": language.path.name,
            "reward": str(args.reward or REWARD),
        },
        peft=peft,
        base=language.base,
        params=params,
        state={
            "optimizer": optimizer.init((policy, critic)),
            "critic": critic,
            "kl_coefficient": jnp.float32(how.kl_coefficient),
        },
        step=Round(jitted, shared),
        batches=_loop.shuffled(rows, how),
        how=how,
        evaluate=evaluation(roles, judge, test),
        tokens=lambda batch: batch["ids"].shape[0] * how.answer_length,
        bar="reward",
    )


def judge_of(args: argparse.Namespace, scored: _lm.Language) -> Any:
    """The reward model; the default one is trained if it is not there yet."""
    path = args.reward or REWARD
    if args.reward is None and not REWARD.exists():
        print(f"no reward model in {REWARD}: training one first", flush=True)
        argv = ["--out", str(REWARD.parent)]
        if args.base is not None:
            argv += ["--base", str(args.base)]
        if reward.main(argv) != 0:
            raise ValueError("the reward model could not be trained")
    return jpeft.load(path, scored.base)


def evaluation(roles: Roles, judge: Any, rows: Questions) -> Callable[..., Any]:
    """(policy, state) -> mean score and length of answers to held-out questions.

    The same randomness every time, so that what moves is the policy.
    """
    how, size = roles.how, roles.how.batch_size

    @jax.jit
    def found_in(params, judge, batch, key):
        out = _rollout.roll(
            roles.language,
            *(roles.sampling, how.answer_length, params),
            *(batch["ids"], batch["mask"], key),
        )
        scores = reward.scores(roles.scored, judge, out.ids, out.mask)
        return scores, jnp.sum(out.answer, axis=1), out.stopped

    def evaluate(params: Any, state: Any = None) -> dict[str, float]:
        parts = []
        for k, (batch, n) in enumerate(reward.batches_of(rows, size)):
            key = jax.random.fold_in(jax.random.key(how.seed + 1), k)
            found = found_in(params, judge, batch, key)
            parts.append([np.asarray(x)[:n] for x in found])
        scores, lengths, stopped = map(np.concatenate, zip(*parts, strict=True))
        return {
            "reward": np.mean(scores),
            "answer_tokens": np.mean(lengths),
            "ended": np.mean(stopped),
        }

    return evaluate


def work(job: _loop.Job, training: Callable[[], None]) -> None:
    print(_report.table(jpeft.summary(job.params), full=False))
    training()
    names = ["reward", "answer_tokens", "ended"]
    _loop.tell(job, names, ["reward", "kl", "answer_tokens"], ["reward"])


def parser() -> argparse.ArgumentParser:
    made = _loop.options(__doc__, Settings, CONFIG)
    add = made.add_argument
    add("--data", type=Path, help="questions, rows of 'prompt' (Python's functions)")
    add("--reward", type=Path, help=f"adapter of a reward model ({REWARD})")
    return made


def main(argv: Sequence[str] | None = None, *, stop_after: int | None = None) -> int:
    """The command; after that many rounds it does what it does after Ctrl-C."""
    return _loop.command(__file__, argv, parser(), prepare, work, stop_after)


if __name__ == "__main__":
    sys.exit(main())
