"""The table of compare_methods.py for instruction tuning: `--task sft`.

    python benchmarks/compare_methods.py --task sft [--methods lora ia3 prompt]
        [--seeds 0] [--jobs N] [--markdown FILE] [--out FOLDER] [--small]
        [any option of examples/sft.py]

A method is a recipe, ``configs/sft/<name>.toml``: all of them unless ``--methods``
chooses, and LoRA, to which costs are compared, in any case.  Each is trained by
``sft.py`` for 16 steps of 4 rows of 192 tokens, on the same rows in the same order; a
recipe has a learning rate, and a form of the base where the file's own would not do.
What a run found is kept below ``--out`` by recipe, seed and options, and the same
command continues where it was interrupted.  With ``--jobs`` above 1 the speed is that
beside other trainings.

    trainable    parameters that train, and of those of the base
    adapter      the saved folder
    base         the number formats of its weights; without any, its dtype
    loss         of held-out answers, a token, before the first step and after the last
    one sentence     share of answers to held-out questions that have the form of the
                 default data: one sentence, on one line
    tokens/s     of training, the median of the steps
    FLOPs        of a step, over those of LoRA, as XLA states them of the program before
                 its optimisations, with layers unrolled and the base in plain numbers:
                 it counts the body of a loop once, and a product with weights in few
                 bits is a loop
    temporaries  bytes of the compiled step, over those of LoRA: neither parameters nor
                 the optimiser's state
    serving      merges: the adapter goes into the weights, which become plain numbers,
                 and costs nothing.  Otherwise the FLOPs of reading a row, over those of
                 the base, and the virtual tokens in front of every text.

Diff pruning is not here: it trains every parameter, in two stages, and sft.py has one.
A recipe that the model cannot take has a row with the reason.  Rows are in
the order of the parameters they train.  Exit codes: as of the other table.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import sft  # first: it says so if something is not installed

# isort: split
import _compare
import _jobs
import _lm
import _loop
import _report
import _runs
import jax
import jax.numpy as jnp
import llm
import numpy as np
from _jobs import Task

import jpeft

UNIT = "lora"  # the recipe that costs are compared with
BUDGET = ("--steps", "16", "--batch-size", "4", "--length", "192")
SMALL = ("--steps", "2", "--samples", "2", "--held-out", "8")
OWN_OPTIONS = (*_compare.OWN_OPTIONS, "--config", "--full", "--tensorboard")


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of a step, and of using what it trained.

    serving_flops: over those of the base.
    """

    flops: float
    temp_bytes: int
    tokens_per_second: float
    serving_flops: float
    merges: bool
    virtual: int


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Of one training.  one_sentence: None but on the default data."""

    trainable: int
    parameters: int
    adapter_bytes: int
    base: str
    loss_before: float
    loss_after: float
    one_sentence: float | None
    cost: Cost

    def __post_init__(self) -> None:
        if isinstance(self.cost, dict):  # as a file has it
            object.__setattr__(self, "cost", Cost(**self.cost))


@dataclasses.dataclass(frozen=True)
class Untrained:
    """The base as it is, and a line on what it was asked."""

    loss: float
    one_sentence: float | None
    examples: str


@dataclasses.dataclass(frozen=True)
class Row:
    """What is known of a method; without outcomes `why` says the reason."""

    name: str
    outcomes: Sequence[Outcome]
    why: str = ""

    def mean(self, field: str) -> float:
        return statistics.fmean(getattr(x, field) for x in self.outcomes)

    def cost(self, field: str) -> float:
        return statistics.fmean(getattr(x.cost, field) for x in self.outcomes)


# --- one run -------------------------------------------------------------------------


def prepare(args: argparse.Namespace) -> sft.Run:
    run = sft.prepare(args)
    _loop.prepare(run, args)
    return run


SFT = _compare.Script(
    name="sft.py",
    recipes="configs/sft",
    parser=sft.parser,
    prepare=prepare,
    kind=sft.Settings,
    base=_lm.default_base,
    small=SMALL,
)


def outcome(run: sft.Run) -> Outcome:
    """Trains to the end, saves and scores."""
    try:
        flops, program = compiled_step(run)
    except jpeft.PromiseError as error:
        raise _runs.Unattachable(str(error)) from error
    trainable = jpeft.count(run.params).trainable
    run.step = program
    _loop.train(run)
    losses = [x["loss"] for x in run.lines("evaluate")]
    return Outcome(
        trainable=trainable,
        parameters=jpeft.count(run.base).frozen,
        adapter_bytes=_report.size(run.out / _runs.ADAPTER),
        base=held_in(run.params),
        loss_before=losses[0],
        loss_after=losses[-1],
        one_sentence=one_sentence(run, run.params),
        cost=Cost(
            flops=flops,
            temp_bytes=program.memory_analysis().temp_size_in_bytes,
            tokens_per_second=statistics.median(
                x["tokens_per_s"] for x in run.lines("train")
            ),
            serving_flops=reading(run, run.params) / reading(run, run.base),
            merges=merges(run.params),
            virtual=run.virtual,
        ),
    )


def untrained(run: sft.Run) -> Untrained:
    """What the base answers before a training."""
    filled = f"{run.how.steps} steps of {run.how.batch_size} x {run.how.length} tokens"
    return Untrained(
        loss=run.evaluate(run.base)["loss"],
        one_sentence=one_sentence(run, run.base),
        examples=f"{filled}, {len(run.held_out)} examples held out",
    )


def one_sentence(run: sft.Run, params: Any) -> float | None:
    """The share of one-sentence answers; none on examples of another kind."""
    said = sft.answers(run, params)
    return sft.scores(run, said).get("one_sentence") if said else None


def compiled_step(run: sft.Run) -> tuple[float, Any]:
    """(FLOPs, the compiled step that trains)."""
    trainable, frozen = jpeft.partition(run.params)
    place = run.batches.get_state()
    batch = next(run.batches)
    run.batches.set_state(place)
    key = jax.random.key(run.how.seed)
    step = run.step.lower(trainable, run.state, frozen, batch, key)
    # Parts of a batch are a loop too, and do the same work as the whole.
    stage = sft.make_stage(run.how)
    whole = sft.make_step(unrolled(run.language), stage, 1)
    trainable, frozen = jpeft.partition(plain(run.params))
    state = jax.eval_shape(stage.optimizer.init, trainable)
    counted = whole.lower(trainable, state, frozen, batch, key)
    return counted.cost_analysis()["flops"], step.compile()


def reading(run: sft.Run, params: Any) -> float:
    """FLOPs of a row of tokens up to the last one's logits."""
    apply = jpeft.adapt(unrolled(run.language).model.apply)
    last = lambda p, ids: apply({"params": p}, ids, logits_from=-1).logits
    ids = jax.ShapeDtypeStruct((1, run.how.length), jnp.int32)
    return jax.jit(last).lower(plain(params), ids).cost_analysis()["flops"]


def unrolled(language: _lm.Language) -> _lm.Language:
    """The same model as a program without a loop over layers."""
    config = dataclasses.replace(language.config, unroll=language.config.layers)
    return dataclasses.replace(language, config=config, model=llm.Decoder(config))


def plain(params: Any) -> Any:
    """With the shapes of plain arrays where weights are held in few bits."""
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if quantized(x) else x
    return jax.tree.map(shape, params, is_leaf=quantized)


def quantized(x: Any) -> bool:
    return isinstance(x, jpeft.quant.Quantized)


def held_in(params: Any) -> str:
    """The formats of the weights that are in few bits, or the dtype of all."""
    weights = jax.tree.leaves(params, is_leaf=quantized)
    formats = {x.format for x in weights if quantized(x)}
    return ", ".join(sorted(formats or {str(jax.tree.leaves(params)[0].dtype)}))


def merges(params: Any) -> bool:
    """Whether `jpeft.merge` takes all of it."""
    try:
        jax.eval_shape(jpeft.merge, params)
    except TypeError:  # a prompt, say, is no change of a weight
        return False
    return True


# --- the table -----------------------------------------------------------------------

HEAD = (
    *("method", "trainable", "of base", "adapter", "base", "loss", "one sentence"),
    *("tokens/s", "FLOPs", "temporaries", "serving"),
)


def cells(row: Row, unit: Row | None) -> tuple[str, ...]:
    """The columns of HEAD; costs over those of `unit`."""
    if not row.outcomes:
        return (row.name, *[""] * (len(HEAD) - 2), row.why)
    one = row.outcomes[0]
    share = 100 * one.trainable / one.parameters
    after = _compare.spread([x.loss_after for x in row.outcomes])
    over = lambda field: (
        f"{row.cost(field) / unit.cost(field):.2f}x" if unit and unit.outcomes else ""
    )
    return (
        *(row.name, f"{one.trainable:,}", f"{share:.3g}%"),
        _report.megabytes(row.mean("adapter_bytes")),
        one.base,
        f"{row.mean('loss_before'):.3f} to {after}",
        _form(row.outcomes),
        f"{row.cost('tokens_per_second'):.0f}",
        *(over("flops"), over("temp_bytes")),
        serving(one.cost) + (f"; {row.why}" if row.why else ""),
    )


def serving(cost: Cost) -> str:
    """What it takes to use a trained adapter."""
    if cost.merges:
        return "merges"
    tokens = f", {cost.virtual} tokens more" if cost.virtual else ""
    return f"{cost.serving_flops:.3f}x FLOPs{tokens}"


def _form(found: Sequence[Outcome | Untrained]) -> str:
    shares = [x.one_sentence for x in found if x.one_sentence is not None]
    return f"{np.mean(shares):.2f}" if shares else ""


def text_of(
    rows: Sequence[Row], before: Sequence[Untrained], seeds: Sequence[int], machine: str
) -> str:
    """The table with what must be known beside it."""
    unit = next((row for row in rows if row.name == UNIT), None)
    about = f"{before[0].examples}; {_compare.seeds(seeds)}; {machine}."
    table = _compare.markdown(HEAD, (cells(row, unit) for row in rows))
    notes = [f"Untrained: loss {_compare.spread([x.loss for x in before])} a token"]
    if form := _form(before):
        notes.append(f", one sentence {form}")
    notes.append(".")
    if unit and unit.outcomes:
        notes.append(
            f" 1.00x is LoRA: {unit.cost('flops') / 1e9:.4g} GFLOP and "
            f"{unit.cost('temp_bytes') / 2**20:.4g} MiB of temporaries a step."
        )
    notes.append(" Diff pruning trains in two stages, and sft.py has one.")
    return "\n\n".join([about, table, "".join(notes)])


def measure(
    runs: _jobs.Runs, chosen: Sequence[str], seeds: Sequence[int], options: list[str]
) -> tuple[list[Untrained], list[Row], bool]:
    """Runs what has not run yet, and tells each result as it comes.

    Gives what is there before a training, by seed, the rows, and whether a training
    failed.
    """
    chosen = list(dict.fromkeys([UNIT, *chosen]))
    before = [task_of(UNIT, seed, options, untrained, Untrained) for seed in seeds]
    tasks = {
        (name, seed): task_of(name, seed, options, outcome, Outcome)
        for seed in seeds
        for name in chosen
    }
    found: dict[Task, Any] = {}
    for task, result in runs.each([*before, *tasks.values()]):
        found[task] = result
        tell(task, result)
    rows = []
    for name in chosen:
        results = [found[tasks[name, seed]] for seed in seeds]
        good = [x for x in results if isinstance(x, Outcome)]
        bad = [x for x in results if not isinstance(x, Outcome)]
        rows.append(Row(name, good, why(bad[0]) if bad else ""))
    # What could not be trained comes last.
    order = lambda row: row.mean("trainable") if row.outcomes else float("inf")
    rows.sort(key=order)
    failed = any(type(x) is _runs.Failed for x in found.values())
    return [found[task] for task in before], rows, failed


def task_of(name: str, seed: int, options: Sequence[str], find: Any, kind: Any) -> Task:
    config = str(_compare.recipe_file(name, SFT))
    argv = (*BUDGET, *options, "--config", config, "--seed", str(seed))
    label = name if kind is Outcome else "untrained"
    return Task(
        *(f"{label}, seed {seed}", f"{label}-seed{seed}", argv, find, kind), script=SFT
    )


def why(failed: _runs.Failed) -> str:
    """The first sentence of a refusal, or that the training failed."""
    refused = isinstance(failed, _jobs.Refused)
    text = str(failed).split(". ")[0].split("; ")[0].replace("|", r"\|")
    return f"{'refused' if refused else 'failed'}: {' '.join(text.split())}"


def tell(task: Task, found: Outcome | Untrained | _runs.Failed) -> None:
    """A line on a result."""
    match found:
        case Outcome():
            print(
                f"{task.name}: loss {found.loss_before:.3f} to {found.loss_after:.3f}",
                flush=True,
            )
        case Untrained():
            print(f"{task.name}: loss {found.loss:.3f}", flush=True)
        case _:
            print(f"{task.name}: {found}", file=sys.stderr, flush=True)


# --- the command line ----------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    options = _compare.parser(
        __doc__, seeds=[0], out="runs/compare_methods_sft", script=SFT
    )
    options.add_argument("--task", choices=["sft"], default="sft", help="(sft)")
    args, rest = _compare.parse(
        *(options, argv), own=OWN_OPTIONS, files=["--markdown"], script=SFT
    )
    return _jobs.exit_code(partial(work, args, rest), args.out)


def work(args: argparse.Namespace, options: list[str]) -> int:
    """Measures, prints, writes; gives the exit code."""
    with _jobs.Runs(args.out, args.jobs) as runs:
        before, rows, failed = measure(runs, args.methods, args.seeds, options)
        text = text_of(rows, before, args.seeds, runs.machine())
    print(text)
    if args.markdown:
        args.markdown.write_text(text + "\n", encoding="utf-8")
    return 1 if failed else 0
