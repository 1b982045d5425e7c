"""Instruction tuning (SFT) of a language model, with any recipe of jpeft.

    python examples/sft.py                             # QLoRA on SmolLM2, default data
    python examples/sft.py --full                      # the same for long, not minutes
    python examples/sft.py --data alpaca.json --length 512 --steps 1000
    python examples/sft.py --config configs/sft/lora.toml --base path/to/Qwen3-0.6B
    python examples/sft.py --resume                         # after Ctrl-C

The default base is SmolLM2-135M-Instruct in the few bits of its GGUF file, the default
data are the functions of Python's standard library: a signature is asked, the answer
is the first sentence of its docstring.  Files in the forms of Alpaca, ShareGPT, chats
and plain text are read as they are (`_dialogues.py`).

The loss counts the tokens of answers and those that end them.  Examples are packed
into rows; a token sees its own example only.  Gradients of `accumulate` parts of a
batch are summed before they are divided by the count of tokens, so that the parts do
not matter.  A recipe says what trains and how; options override its ``[train]``.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import jpeft
from jpeft import objectives

try:
    import _dialogues
    import _lm
    import _loop
    import _recipe
    import _report
    import _rows
    import _signatures
    import _stages
    import generate
    from _recipe import _setting
    from _sampling import GREEDY
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"error: {missing.name} is not installed; type: "
        "pip install -e '.[examples,hf,plots]'"
    ) from None

CONFIG = "configs/language/sft_qlora.toml"


@dataclasses.dataclass(frozen=True)
class Settings(_loop.Settings):
    """The ``[train]`` table of a recipe for instruction tuning."""

    length: int = _setting(192, "tokens of a row")
    packing: bool = _setting(True, "several examples to a row")
    too_long: str = _setting("truncate", "truncate, drop or keep (an error) examples")
    accumulate: int = _setting(1, "parts a batch is computed in")
    last_only: bool = _setting(False, "learn the last answer of a chat alone")
    base_form: str = _setting("stored", "the base in memory: stored, float32, bfloat16")
    prompt: str = _setting(_dialogues.PROMPT, "question of instruction and input")
    held_out: int = _setting(64, "examples held out, if there is no --eval")
    samples: int = _setting(16, "held-out questions that are answered")
    answer_tokens: int = _setting(40, "tokens of an answer, at most")
    remat: bool = _setting(False, "activations computed again, for memory")
    # Tables of their own below [train]; see _stages.
    lora_plus: _stages.LoraPlus | None = None
    adalora: _stages.AdaLora | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("length", "accumulate", "held_out", "samples", "answer_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate {self.accumulate} does not divide batch_size "
                f"{self.batch_size}"
            )
        _loop.one_of("too_long", self.too_long, _rows.TOO_LONG)
        _loop.one_of("base_form", self.base_form, _lm.FORMS)
        _dialogues.check_prompt(self.prompt)


# --- the heart -----------------------------------------------------------------------


def make_loss(language: _lm.Language) -> Callable[..., objectives.Weighted]:
    """(params, batch, key) -> the loss of a batch, as a sum and a count of tokens."""

    def loss(params: Any, batch: Any, key: jax.Array | None = None):
        apply = jpeft.adapt(language.model.apply, key=key)
        hidden = apply(
            *({"params": params}, batch["ids"]),
            segments=batch["segments"],
            logits_from=None,
        ).hidden
        labels, mask = objectives.shift_labels(
            batch["ids"], batch["counted"], batch["segments"]
        )
        head, tied = language.head(params)
        return objectives.linear_cross_entropy(hidden, head, labels, mask, tied=tied)

    return loss


def make_stage(how: Settings) -> _stages.Stage:
    """The training, with what LoRA+ or AdaLoRA asks of it."""

    def make(steps: int, **changes: float) -> optax.GradientTransformation:
        optimizer = _loop.optimizer(dataclasses.replace(how, steps=steps, **changes))
        plus = how.lora_plus
        return jpeft.optim.lora_plus(optimizer, plus.ratio) if plus else optimizer

    if how.adalora:
        [stage] = how.adalora.stages(how.steps, make)
        return stage
    return _stages.Stage(how.steps, make(how.steps))


def make_step(
    language: _lm.Language, stage: _stages.Stage, accumulate: int
) -> Callable[..., Any]:
    """(trainable, state, frozen, batch, key) -> (trainable, state, metrics), jitted.

    The metric `loss` is without the stage's penalty.
    """
    loss, penalty = make_loss(language), stage.penalty

    def of(trainable, batch, frozen):
        data, key = batch
        return loss(jpeft.combine(trainable, frozen), data, key)

    def step(trainable, state, frozen, batch, key):
        cut = lambda x: x.reshape(accumulate, -1, *x.shape[1:])
        parts = jax.tree.map(cut, batch), jax.random.split(key, accumulate)
        total, grads = objectives.accumulated_value_and_grad(of)(
            trainable, parts, frozen
        )
        if penalty is not None:
            grads = optax.tree.add(grads, jax.grad(penalty)(trainable))
        updates, state = stage.optimizer.update(grads, state, trainable)
        metrics = {
            "loss": total.mean(),
            "grad_norm": optax.global_norm(grads),
            "counted_tokens": total.count,
        }
        return optax.apply_updates(trainable, updates), state, metrics

    return jax.jit(step, donate_argnums=(0, 1))


# --- data ----------------------------------------------------------------------------


def documents(
    language: _lm.Language,
    found: Sequence[_dialogues.Dialogue],
    *,
    virtual: int = 0,
    last_only: bool = False,
) -> list[_rows.Document]:
    """Ids, and which of them count; virtual tokens stand before each and do not."""
    made, first = [], language.virtual(virtual)
    for x in found:
        if x.text is not None:
            ids = language.tokenizer.document(x.text)
            counted = np.ones(len(ids), bool)
        else:
            try:
                chat = language.tokenizer.chat(x.messages, last_only=last_only)
            except ValueError as error:
                raise type(error)(f"{x.at}: {error}") from error
            ids, counted = chat.ids, chat.answer
        made.append(
            _rows.Document(
                np.array([*first, *ids], np.int32),
                np.concatenate([np.zeros(virtual, bool), counted]),
                x.at,
            )
        )
    return made


def rows(
    language: _lm.Language,
    found: Sequence[_dialogues.Dialogue],
    how: Settings,
    virtual: int,
    what: str,
) -> _rows.Rows:
    fitted = _rows.fit(
        documents(language, found, virtual=virtual, last_only=how.last_only),
        *(how.length, how.too_long),
    )
    if told := fitted.told(how.length):
        print(f"{what}: {told}")
    make = _rows.pack if how.packing else _rows.one_each
    return make(fitted.documents, how.length, language.tokenizer.pad)


def read(
    args: argparse.Namespace, how: Settings
) -> tuple[list[_dialogues.Dialogue], list[_dialogues.Dialogue]]:
    """(to train on, held out)."""
    if args.data is None:
        if args.eval is not None:
            raise ValueError("--eval without --data: the default data has its own")
        found = _signatures.dialogues()
    else:
        found = _dialogues.dialogues(args.data, prompt=how.prompt)
        if args.eval is not None:
            return found, _dialogues.dialogues(args.eval, prompt=how.prompt)
    return _dialogues.split(found, how.held_out, how.seed)


# --- a run ---------------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class Run(_loop.Job):
    language: Any = None
    held_out: list[_dialogues.Dialogue] = dataclasses.field(default_factory=list)
    virtual: int = 0
    default_data: bool = True


def prepare(args: argparse.Namespace) -> Run:
    """Everything up to the first step; what the user can get wrong is found here."""
    file = _recipe.find(args.config)
    peft, how = _recipe.read(file, vars(args), Settings)
    train, held_out = read(args, how)
    language = _lm.load(args.base, how.base_form, remat=how.remat)
    if how.length > language.config.context:
        raise ValueError(
            f"length {how.length}: the model's context is {language.config.context}"
        )
    virtual = peft.virtual_tokens()
    data = rows(language, train, how, virtual, "examples")
    if len(data) < how.batch_size:
        raise ValueError(
            f"batch_size {how.batch_size}: there are only {len(data)} rows to train on"
        )
    test = rows(language, held_out, how, virtual, "held-out examples")
    key = jax.random.key(how.seed)
    params = language.attach(peft, key)
    stage = make_stage(how)
    print(
        f"{len(train)} examples in {len(data)} rows of {how.length} tokens, "
        f"{100 * np.mean(data.segments > 0):.0f} % filled, "
        f"{100 * np.mean(data.counted):.0f} % count; {len(held_out)} held out"
    )
    return Run(
        name=file.stem,
        out=args.out or Path("runs") / file.stem,
        settings={
            "peft": peft.to_config(),
            **dataclasses.asdict(how),
            "base": str(language.path.name),
            "rows": data.checksum(),
            "held_out_rows": test.checksum(),
        },
        peft=peft,
        base=language.base,
        params=params,
        state=stage.optimizer.init(jpeft.partition(params)[0]),
        step=make_step(language, stage, how.accumulate),
        batches=_loop.shuffled(data, how),
        how=how,
        evaluate=evaluation(language, test, how.batch_size),
        finish=stage.finish,
        language=language,
        held_out=held_out,
        virtual=virtual,
        default_data=args.data is None,
    )


def evaluation(
    language: _lm.Language, rows: _rows.Rows, batch_size: int
) -> Callable[..., dict[str, float]]:
    """(params, state) -> loss a token, over all held-out tokens, and perplexity."""
    loss = jax.jit(make_loss(language))

    def evaluate(params: Any, state: Any = None) -> dict[str, float]:
        total = count = 0.0
        for at in range(0, len(rows), batch_size):
            # The last batch is filled up with rows that count nothing.
            index = np.arange(at, at + batch_size)
            batch = rows[np.minimum(index, len(rows) - 1)]
            batch["counted"] = batch["counted"] & (index < len(rows))[:, None]
            found = loss(params, batch)
            total, count = total + float(found.total), count + float(found.count)
        mean = total / max(count, 1.0)
        return {"loss": mean, "perplexity": float(np.exp(mean))}

    return evaluate


def answers(run: Run, params: Any) -> list[str]:
    """What the model answers to held-out questions, by the likeliest tokens."""
    chats = [x.question for x in run.held_out if x.messages][: run.how.samples]
    if not chats:
        return []
    writer = generate.Writer(
        *(run.language, params, GREEDY, run.how.answer_tokens), virtual=run.virtual
    )
    longest = max(len(run.language.prompt(c, run.virtual)) for c in chats)
    return writer.in_batches(chats, min(8, len(chats)), longest)


def scores(run: Run, said: Sequence[str]) -> dict[str, float]:
    """Shares of answers that are exactly the expected one, and, of the default data,
    that have its form."""
    asked = [x for x in run.held_out if x.messages]
    exact = [a.strip() == x.answer.strip() for a, x in zip(said, asked, strict=False)]
    found = {"exact_match": float(np.mean(exact))}
    if run.default_data:
        form = [_signatures.follows(a) for a in said]
        found["one_sentence"] = float(np.mean(form))
    return found


def work(run: Run, training: Callable[[], None]) -> None:
    print(_report.table(jpeft.summary(run.params), full=False))
    base = jpeft.disable(run.params)
    before = answers(run, base)
    training()
    after = answers(run, run.params)
    said = {}
    if after:
        said = {"before": scores(run, before), "after": scores(run, after)}
        for k in range(min(3, len(after))):
            print(f"\n> {run.held_out[k].question[-1]['content']}")
            print(f"  before: {before[k]!r:.160}\n  after:  {after[k]!r:.160}")
        print()
        for name in said["after"]:
            was, now = said["before"][name], said["after"][name]
            print(f"{name.replace('_', ' '):<24}{was:>8.3f} -> {now:.3f}")
    _loop.tell(
        run, ["loss", "perplexity"], ["loss"], ["loss", "perplexity"], answers=said
    )


def parser() -> argparse.ArgumentParser:
    made = _loop.options(__doc__, Settings, CONFIG)
    add = made.add_argument
    add(
        "--data", type=Path, help=".json, .jsonl, .csv or .parquet (Python's functions)"
    )
    add("--eval", type=Path, help="held-out examples (a part of --data)")
    return made


def main(argv: Sequence[str] | None = None, *, stop_after: int | None = None) -> int:
    """The command; after that many steps it does what it does after Ctrl-C."""
    return _loop.command(__file__, argv, parser(), prepare, work, stop_after)


if __name__ == "__main__":
    sys.exit(main())
