"""The learning rate of every recipe, chosen without a look at the held-out examples.

    python benchmarks/choose_rates.py [--methods lora bitfit full] [--seeds 0]
        [--factors 0.25 0.5 1 2 4] [--jobs N] [--out FOLDER] [--json FILE]
        [--markdown FILE] [--small] [any option of examples/finetune.py]

Trains each recipe, ``configs/<name>.toml``, at its ``learning_rate`` times each factor,
on four fifths of the training examples, and scores it on the other fifth: the same one
for all, with its part of every class.  A ``head_learning_rate`` stays what it is.

The best rate has the highest accuracy, the mean over the seeds; of those that are not
more than 0.002 below it, the highest macro-F1.  A rate at which a training failed is
not chosen.  If the best is the lowest or the highest that was tried, a better one may
lie beyond: the table says so.

Give ``--eval``: without it each seed holds out other examples, and what one holds out,
another trains on.  What a run found is kept below ``--out`` by recipe, rate, seed and
options, and the same command continues where it was interrupted.  ``--jobs N`` runs N
at a time, each in a process.

    0.5x         the rate that is half the recipe's: accuracy, and the loss at the end
                 of training, the mean of the last steps and of the seeds

``--json`` gets {method: {"rate": the best, "tried": {rate: {"accuracy": ...,
"macro_f1": ..., "loss": ...}}}}, null for what failed.  Exit codes: 0, 1 if a method
failed at all rates, 2 for input that cannot be used, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "examples"))

import finetune  # first: it says so if something is not installed

# isort: split
import _compare
import _jobs
import _recipe
import _runs
import numpy as np
from _jobs import Task

PART = "0.2"  # of the training examples, on which rates are scored
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
TIE = 0.002
LAST = 20  # steps over which the loss is averaged
OWN_OPTIONS = (*_compare.OWN_OPTIONS, "--config", "--validate", "--learning-rate")


@dataclasses.dataclass(frozen=True)
class Score:
    """Of one training, or the mean of several."""

    accuracy: float
    macro_f1: float
    loss: float


def score(run: finetune.Run) -> Score:
    """Trains to the end and scores; the run holds out a part of the training data."""
    logits = finetune.make_logits(run.model)
    finetune.train(run, logits, stop=lambda: False)
    loss = float(np.mean(run.history["loss"][-LAST:]))
    return Score(**finetune.scores(run, logits), loss=loss)


# --- all of them ---------------------------------------------------------------------


def rates(name: str, factors: Sequence[float]) -> list[float]:
    """Those to try for a recipe, in the order of the factors."""
    _, train = _recipe.read(_compare.recipe_file(name), {})
    # Without the last digits of a product, which only a computer finds different.
    return [float(f"{factor * train.learning_rate:.6g}") for factor in factors]


def task_of(name: str, rate: float, seed: int, options: Sequence[str]) -> Task:
    """One training."""
    argv = (
        *(*options, "--validate", PART, "--config", str(_compare.recipe_file(name))),
        *("--learning-rate", f"{rate:g}", "--seed", str(seed)),
    )
    file = f"{name}-rate{rate:g}-seed{seed}"
    return Task(f"{name}, rate {rate:g}, seed {seed}", file, argv, score, Score)


def measure(
    runs: _jobs.Runs,
    tried: Mapping[str, Sequence[float]],
    seeds: Sequence[int],
    options: Sequence[str],
) -> dict[str, dict[float, Score | None]]:
    """Method -> rate -> means, or None if a training failed; tells each as it comes."""
    tasks = {
        (name, rate, seed): task_of(name, rate, seed, options)
        for seed in seeds
        for name in tried
        for rate in tried[name]
    }
    found: dict[Task, Any] = {}
    for task, result in runs.each(tasks.values()):
        found[task] = result
        if isinstance(result, Score):
            told = f"accuracy {result.accuracy:.3f}, loss {result.loss:.2f}"
            print(f"{task.name}: {told}", flush=True)
        else:
            print(f"{task.name}: {result}", file=sys.stderr, flush=True)
    return {
        name: {
            rate: mean([found[tasks[name, rate, seed]] for seed in seeds])
            for rate in tried[name]
        }
        for name in tried
    }


def mean(results: Sequence[Score | finetune.Failed]) -> Score | None:
    """Over the seeds."""
    scores = [dataclasses.astuple(x) for x in results if isinstance(x, Score)]
    if len(scores) < len(results):
        return None
    return Score(*map(statistics.fmean, zip(*scores, strict=True)))


def best(tried: Mapping[float, Score | None]) -> float | None:
    """The rate to take, if there is one."""
    good = {rate: x for rate, x in tried.items() if x is not None}
    highest = max((x.accuracy for x in good.values()), default=0.0)
    near = [rate for rate, x in good.items() if highest - x.accuracy <= TIE]
    return max(near, key=lambda rate: good[rate].macro_f1, default=None)


# --- the table -----------------------------------------------------------------------


def row(name: str, tried: Mapping[float, Score | None]) -> tuple[str, ...]:
    """A method: each rate with what it gave, and the best."""
    chosen, cells = best(tried), []
    for rate, x in tried.items():
        gave = "failed" if x is None else f"{x.accuracy:.3f} (loss {x.loss:.2f})"
        cells.append(
            f"{'**' * (rate == chosen)}{rate:g}{'**' * (rate == chosen)}: {gave}"
        )
    return (
        name,
        *cells,
        "none" if chosen is None else f"{chosen:g}{edge(chosen, tried)}",
    )


def edge(rate: float, tried: Mapping[float, Any]) -> str:
    """What to say of a rate with none beyond it."""
    if len(tried) == 1:
        return ", the only one tried"
    if rate == max(tried):
        return ", the highest tried"
    return ", the lowest tried" if rate == min(tried) else ""


def text_of(
    tried: Mapping[str, Mapping[float, Score | None]],
    factors: Sequence[float],
    seeds: Sequence[int],
    machine: str,
) -> str:
    """The table with what must be known beside it."""
    scored = f"Scored on {PART} of the training examples"
    about = f"{scored}; {_compare.seeds(seeds)}; {machine}."
    head = ("method", *(f"{factor:g}x" for factor in factors), "best")
    table = _compare.markdown(head, (row(name, tried[name]) for name in tried))
    return f"{about}\n\n{table}"


def plain(tried: Mapping[float, Score | None]) -> dict[str, Any]:
    """A method in JSON."""
    scores = {
        f"{rate:g}": x and dataclasses.asdict(x)  # None stays None
        for rate, x in tried.items()
    }
    return {"rate": best(tried), "tried": scores}


# --- the command line ----------------------------------------------------------------


def _factor(text: str) -> float:
    if not 0 < (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text}")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    options = _compare.parser(__doc__, seeds=[0], out="runs/choose_rates")
    add, default = options.add_argument, " ".join(f"{x:g}" for x in FACTORS)
    add(
        *("--factors",),
        type=_factor,
        nargs="+",
        default=FACTORS,
        metavar="X",
        help=f"of the recipe's rate ({default})",
    )
    add("--json", type=Path, metavar="FILE", help="write all scores there")
    files = "--markdown", "--json"
    args, rest = _compare.parse(options, argv, own=OWN_OPTIONS, files=files)
    return _jobs.exit_code(partial(work, args, rest), args.out)


def work(args: argparse.Namespace, options: list[str]) -> int:
    """Measures, prints, writes; gives the exit code."""
    factors = sorted(set(args.factors))
    rates_of = {name: rates(name, factors) for name in args.methods}
    with _jobs.Runs(args.out, args.jobs) as runs:
        tried = measure(runs, rates_of, args.seeds, options)
        text = text_of(tried, factors, args.seeds, runs.machine())
    print(text)
    if args.markdown:
        args.markdown.write_text(text + "\n", encoding="utf-8")
    if args.json:
        _runs.write_json(args.json, {name: plain(x) for name, x in tried.items()})
    return 1 if any(best(x) is None for x in tried.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
