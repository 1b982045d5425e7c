"""Preference tuning without a reward model: DPO and its kin.

    python examples/dpo.py                                   # SmolLM2, default pairs
    python examples/dpo.py --loss ipo --beta 0.2
    python examples/dpo.py --data pairs.jsonl --steps 500 --learning-rate 1e-4

    D = (log p - log ref)(chosen) - (log p - log ref)(rejected)
    loss = -log sigmoid(beta D)                  Rafailov et al. 2023, arXiv:2305.18290

The reference is the model with its adapters off, so no second model is in memory.
Pairs are those of `reward.py`; other losses: `jpeft.objectives.preference_loss`.
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
    import _lm
    import _loop
    import _pairs
    import _recipe
    import _report
    import reward
    from _recipe import _setting
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"error: {missing.name} is not installed; type: "
        "pip install -e '.[examples,hf,plots]'"
    ) from None

CONFIG = "configs/language/dpo.toml"
# Losses of log-ratios to a reference, losses of log-probabilities, those that count
# tokens, and those that know wrong labels.
REFERRED = (
    *("dpo", "robust_dpo", "hinge", "ipo", "ipo_summed", "normalised_dpo", "nca"),
    *("sppo", "apo_zero", "apo_down", "exo", "discopop", "f_dpo"),
)
FREE = ("cpo", "simpo", "orpo")
BY_LENGTH = ("ipo", "normalised_dpo", "simpo", "orpo")
SMOOTHED = ("dpo", "robust_dpo", "exo")


@dataclasses.dataclass(frozen=True)
class Settings(reward.Settings):
    """The ``[train]`` table of a recipe for DPO and its kin."""

    loss: str = _setting("dpo", "dpo, ipo, hinge, simpo, ... (preference_loss)")
    beta: float = _setting(0.1, "how much a log-ratio counts")
    label_smoothing: float = _setting(
        0.0, "share of pairs that are the wrong way round"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _loop.one_of("loss", self.loss, (*REFERRED, *FREE))
        if not 0 < self.beta < float("inf"):
            raise ValueError(f"beta must be above 0, found {self.beta}")
        if self.label_smoothing and self.loss not in SMOOTHED:
            raise ValueError(
                f"label_smoothing is of {', '.join(SMOOTHED)}; {self.loss} has none"
            )


def loss_of_pairs(
    how: Settings,
    sums: tuple[jax.Array, jax.Array],
    references: tuple[jax.Array, jax.Array],
    counts: tuple[jax.Array, jax.Array],
) -> objectives.Weighted:
    """Each: (pairs,) of the chosen answers and of the rejected ones.

    sums: log-probabilities.  counts: tokens.
    """
    options = {"beta": how.beta} if how.loss != "orpo" else {}
    if how.label_smoothing:
        options["label_smoothing"] = how.label_smoothing
    if how.loss in REFERRED:
        sums = sums[0] - references[0], sums[1] - references[1]
    args = (*sums, *counts) if how.loss in BY_LENGTH else sums
    return objectives.preference_loss(how.loss, *args, **options)


def sums(
    language: _lm.Language,
    params: Any,
    batch: Any,
    prompt: int,
    key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """((batch,) log-probabilities of chosen answers, of rejected ones)."""
    ids, mask = _pairs.flat(batch["ids"]), _pairs.flat(batch["mask"])
    apply = jpeft.adapt(language.model.apply, key=key)
    found = _pairs.log_probs(apply, params, ids, mask, prompt)
    chosen, rejected = jnp.split(
        jnp.sum(jnp.where(mask[:, prompt:], found, 0.0), axis=1), 2
    )
    return chosen, rejected


def measured(
    language: _lm.Language,
    how: Settings,
    params: Any,
    batch: Any,
    prompt: int,
    key: jax.Array | None = None,
) -> tuple[objectives.Weighted, dict[str, jax.Array]]:
    """(loss of the pairs, what is to be watched, one number a pair)."""
    chosen, rejected = sums(language, params, batch, prompt, key)
    # The adapters off: the model as it came, without dropout and without a gradient.
    reference = jax.lax.stop_gradient(
        sums(language, jpeft.disable(params), batch, prompt)
    )
    counts = jnp.sum(batch["mask"][..., prompt:], axis=-1, dtype=jnp.float32)
    loss = loss_of_pairs(
        how, (chosen, rejected), reference, (counts[:, 0], counts[:, 1])
    )
    moved = chosen - reference[0], rejected - reference[1]
    return loss, {
        "margin": how.beta * (moved[0] - moved[1]),
        # Both may fall while the margin rises.
        "chosen": how.beta * moved[0],
        "rejected": how.beta * moved[1],
    }


def make_step(
    language: _lm.Language,
    how: Settings,
    prompt: int,
    optimizer: optax.GradientTransformation,
) -> Callable[..., Any]:
    def loss_of(trainable, frozen, batch, key):
        params = jpeft.combine(trainable, frozen)
        loss, found = measured(language, how, params, batch, prompt, key)
        accuracy = jnp.mean(found["margin"] > 0)
        found = {name: jnp.mean(x) for name, x in found.items()}
        return loss.mean(), {"loss": loss.mean(), "accuracy": accuracy, **found}

    def step(trainable, state, frozen, batch, key):
        grads, metrics = jax.grad(loss_of, has_aux=True)(trainable, frozen, batch, key)
        updates, state = optimizer.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, metrics

    return jax.jit(step, donate_argnums=(0, 1))


def evaluation(
    language: _lm.Language, how: Settings, rows: _pairs.Rows
) -> Callable[..., dict[str, float]]:
    @jax.jit
    def found_in(params, batch):
        return measured(language, how, params, batch, rows.prompt)[1]

    def evaluate(params: Any, state: Any = None) -> dict[str, float]:
        parts = [
            {k: np.asarray(x)[:n] for k, x in found_in(params, b).items()}
            for b, n in reward.batches_of(rows, how.batch_size)
        ]
        found = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
        means = {name: np.mean(x) for name, x in found.items()}
        return {"accuracy": np.mean(found["margin"] > 0), **means}

    return evaluate


def prepare(args: argparse.Namespace) -> _loop.Job:
    """Everything up to the first step; what the user can get wrong is found here."""
    file = _recipe.find(args.config)
    peft, how = _recipe.read(file, vars(args), Settings)
    language = _lm.load(args.base, how.base_form, remat=how.remat)
    train, held_out = reward.encoded(language, args, how, peft.virtual_tokens())
    params = language.attach(peft, jax.random.key(how.seed))
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
        step=make_step(language, how, train.prompt, optimizer),
        batches=_loop.shuffled(train, how),
        how=how,
        evaluate=evaluation(language, how, held_out),
    )


def work(job: _loop.Job, training: Callable[[], None]) -> None:
    print(_report.table(jpeft.summary(job.params), full=False))
    training()
    names = ["accuracy", "margin", "chosen", "rejected"]
    _loop.tell(job, names, ["loss"], ["accuracy", "margin"])


def parser() -> argparse.ArgumentParser:
    return reward.pair_options(_loop.options(__doc__, Settings, CONFIG))


def main(argv: Sequence[str] | None = None, *, stop_after: int | None = None) -> int:
    """The command; after that many steps it does what it does after Ctrl-C."""
    return _loop.command(__file__, argv, parser(), prepare, work, stop_after)


if __name__ == "__main__":
    sys.exit(main())
