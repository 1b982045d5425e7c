"""A reward model: a language model with adapters and one score, from preference pairs.

    python examples/reward.py                                # SmolLM2, default pairs
    python examples/reward.py --data pairs.jsonl --steps 500
    python examples/reward.py --resume                       # after Ctrl-C

The score is read at the last token of an answer; the loss is that of Bradley and
Terry, -log sigmoid(score of the chosen - score of the rejected) (Ouyang et al. 2022,
arXiv:2203.02155).  The new head trains in full, and is saved with the adapter.

Pairs are rows of `prompt`, `chosen`, `rejected`, texts or chats (`_dialogues.py`).  The
default ones can be checked by a rule: the answer in one plain sentence is preferred to
the same one with talk around it, and to a part of it (`_pairs.py`).
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
    import _rows
    import llm
    from _recipe import _setting
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"error: {missing.name} is not installed; type: "
        "pip install -e '.[examples,hf,plots]'"
    ) from None

CONFIG = "configs/language/reward.toml"
HEAD = "score"


@dataclasses.dataclass(frozen=True)
class Settings(_loop.Settings):
    """The ``[train]`` table of a recipe for preference pairs."""

    prompt_length: int = _setting(72, "tokens of a question")
    answer_length: int = _setting(32, "tokens of an answer")
    too_long: str = _setting("truncate", "truncate, drop or keep (an error) pairs")
    base_form: str = _setting("stored", "the base in memory: stored, float32, bfloat16")
    held_out: int = _setting(48, "pairs held out, if there is no --eval")
    centre: float = _setting(0.01, "weight of (sum of both scores)^2")
    remat: bool = _setting(False, "activations computed again, for memory")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("prompt_length", "answer_length", "held_out"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more")
        _loop.one_of("too_long", self.too_long, _rows.TOO_LONG)
        _loop.one_of("base_form", self.base_form, _lm.FORMS)


def scored(language: _lm.Language) -> _lm.Language:
    """The same base with a head of one score, that begins at zero."""
    config = dataclasses.replace(language.config, head=HEAD)
    kernel = jnp.zeros((config.width, 1), jnp.float32)
    base = {k: x for k, x in language.base.items() if k != "lm_head"}
    return dataclasses.replace(
        language,
        config=config,
        model=llm.Decoder(config),
        base={**base, HEAD: {"kernel": kernel}},
    )


def scores(
    language: _lm.Language,
    params: Any,
    ids: jax.Array,
    mask: jax.Array,
    key: jax.Array | None = None,
) -> jax.Array:
    """(batch,) float32, read at each row's last real token."""
    out = jpeft.adapt(language.model.apply, key=key)({"params": params}, ids, mask)
    return objectives.last_token_scores(out.logits, mask)


def make_step(
    language: _lm.Language, how: Settings, optimizer: optax.GradientTransformation
) -> Callable[..., Any]:
    def loss_of(trainable, frozen, batch, key):
        params = jpeft.combine(trainable, frozen)
        ids, mask = _pairs.flat(batch["ids"]), _pairs.flat(batch["mask"])
        chosen, rejected = jnp.split(scores(language, params, ids, mask, key), 2)
        loss = objectives.bradley_terry(chosen, rejected, centre=how.centre).mean()
        return loss, {
            "loss": loss,
            "accuracy": jnp.mean(chosen > rejected),
            "margin": jnp.mean(chosen - rejected),
        }

    def step(trainable, state, frozen, batch, key):
        grads, metrics = jax.grad(loss_of, has_aux=True)(trainable, frozen, batch, key)
        updates, state = optimizer.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, metrics

    return jax.jit(step, donate_argnums=(0, 1))


def read(args: argparse.Namespace, how: Any) -> tuple[list, list]:
    """(to train on, held out) pairs."""
    if args.data is None:
        if args.eval is not None:
            raise ValueError("--eval without --data: the default data has its own")
        found = _pairs.default()
    else:
        found = _dialogues.pairs(args.data)
        if args.eval is not None:
            return found, _dialogues.pairs(args.eval)
    return _dialogues.split(found, how.held_out, how.seed)


def encoded(
    language: _lm.Language, args: argparse.Namespace, how: Any, virtual: int
) -> tuple[_pairs.Rows, _pairs.Rows]:
    """(to train on, held out), with a line on what was too long."""
    if (room := how.prompt_length + how.answer_length) > language.config.context:
        raise ValueError(
            f"prompt_length and answer_length are {room} tokens, the model's context "
            f"{language.config.context}"
        )
    made = []
    for what, pairs in zip(("pairs", "held-out pairs"), read(args, how), strict=True):
        rows, told = _pairs.encode(
            language,
            pairs,
            *(how.prompt_length, how.answer_length, how.too_long),
            virtual=virtual,
        )
        if told:
            print(f"{what}: {told}")
        made.append(rows)
    if len(made[0]) < how.batch_size:
        raise ValueError(
            f"batch_size {how.batch_size}: there are only {len(made[0])} pairs"
        )
    return made[0], made[1]


def batches_of(rows: _pairs.Rows, size: int) -> Any:
    """(batch, how many of it are new), in order; the last is filled up."""
    for at in range(0, len(rows), size):
        index = np.arange(at, at + size)
        yield rows[np.minimum(index, len(rows) - 1)], min(size, len(rows) - at)


def evaluation(
    language: _lm.Language, rows: _pairs.Rows, size: int
) -> Callable[..., dict[str, float]]:
    @jax.jit
    def margins(params, batch):
        ids, mask = _pairs.flat(batch["ids"]), _pairs.flat(batch["mask"])
        chosen, rejected = jnp.split(scores(language, params, ids, mask), 2)
        return chosen - rejected

    def evaluate(params: Any, state: Any = None) -> dict[str, float]:
        found = np.concatenate(
            [np.asarray(margins(params, b))[:n] for b, n in batches_of(rows, size)]
        )
        return {"accuracy": np.mean(found > 0), "margin": np.mean(found)}

    return evaluate


def prepare(args: argparse.Namespace) -> _loop.Job:
    """Everything up to the first step; what the user can get wrong is found here."""
    file = _recipe.find(args.config)
    peft, how = _recipe.read(file, vars(args), Settings)
    language = scored(_lm.load(args.base, how.base_form, remat=how.remat))
    train, held_out = encoded(language, args, how, peft.virtual_tokens())
    params = language.attach(peft, jax.random.key(how.seed))
    if not jax.tree.leaves(jpeft.partition(params)[0][HEAD]):
        raise ValueError(
            f"{file}: nothing trains the new head; add a table [[peft]] with method = "
            "'full' and where = 'score/.*'"
        )
    optimizer = _loop.optimizer(how)
    print(f"{len(train)} pairs, {len(held_out)} held out")
    return _loop.Job(
        name=file.stem,
        out=args.out or Path("runs") / file.stem,
        settings={
            "peft": peft.to_config(),
            **dataclasses.asdict(how),
            "base": language.path.name,
            "rows": train.checksum(),
            "held_out_rows": held_out.checksum(),
        },
        peft=peft,
        base=language.base,
        params=params,
        state=optimizer.init(jpeft.partition(params)[0]),
        step=make_step(language, how, optimizer),
        batches=_loop.shuffled(train, how),
        how=how,
        evaluate=evaluation(language, held_out, how.batch_size),
    )


def work(job: _loop.Job, training: Callable[[], None]) -> None:
    print(_report.table(jpeft.summary(job.params), full=False))
    training()
    _loop.tell(job, ["accuracy", "margin"], ["loss"], ["accuracy", "margin"])


def parser() -> argparse.ArgumentParser:
    return pair_options(_loop.options(__doc__, Settings, CONFIG))


def pair_options(made: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """With the options that name preference pairs."""
    made.add_argument("--data", type=Path, help="pairs, .jsonl, .json, .csv, .parquet")
    made.add_argument("--eval", type=Path, help="held-out pairs (a part of --data)")
    return made


def main(argv: Sequence[str] | None = None, *, stop_after: int | None = None) -> int:
    """The command; after that many steps it does what it does after Ctrl-C."""
    return _loop.command(__file__, argv, parser(), prepare, work, stop_after)


if __name__ == "__main__":
    sys.exit(main())
