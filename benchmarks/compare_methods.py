"""Every method on the main job: what it trains, stores and costs, and how good it gets.

    python benchmarks/compare_methods.py [--methods lora bitfit full] [--seeds 0 1 2]
        [--jobs N] [--costs-only] [--markdown FILE] [--plot FILE.png] [--out FOLDER]
        [--small] [any option of examples/finetune.py]
    python benchmarks/compare_methods.py --task sft [...]     # see _compare_sft.py

A method is a recipe, ``configs/<name>.toml``: all of them unless ``--methods`` chooses.
Each is trained by ``finetune.py`` from the same seeds on the same examples in the same
order, with the learning rate of its recipe.  A run takes two or three minutes on two
cores, so the whole table takes hours; what a run found is kept below ``--out`` by
recipe, seed and options, and the same command continues where it was interrupted.
(A change of jpeft itself is not noticed: delete the folder, or name another.)

``--jobs N`` runs N at a time, each in a process.  No step is timed beside another or
beside a training, but other processes compile meanwhile, which examples/s shows; for
exact ones use one.  None of them takes a GPU's memory in advance, unless
XLA_PYTHON_CLIENT_PREALLOCATE is set.  On a GPU XLA tries many kernels for every
product, which takes longer than these short trainings: set
XLA_FLAGS="--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false".
``--costs-only`` trains nothing.

    trainable    parameters that the first step trains, and of those of the row "full"
    kept         what is left of them in the adapter: AdaLoRA and diff pruning choose,
                 P-tuning and prefixes drop the network that made their vectors
    adapter      the saved folder
    FLOPs, temporaries   of the compiled first step on a batch of full length, as XLA
                 states them, over those of "full"; XLA counts the body of a loop
                 (P-tuning's LSTM) once, and on a GPU not what libraries multiply: take
                 FLOPs from a CPU.  Temporaries are neither parameters nor the
                 optimiser's state.
    examples/s   of that step, the median of several, without compilation
    accuracy     on the held-out examples, the mean over the seeds (lowest to highest)

Rows are in the order of the parameters they train.  Exit codes: 0, 1 if a training
failed (its row says so, the others are there), 2 for input that cannot be used, 130
after Ctrl-C.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "examples"))

import finetune  # first: it says so if something is not installed

# isort: split
import _compare
import _jobs
import _recipe
import _report
import _runs
import jax
import jax.numpy as jnp
import numpy as np
from _jobs import Task
from matplotlib import pyplot

import jpeft

FULL = "full"  # the recipe that costs are compared with
UNTRAINED = "head"  # a recipe that changes nothing before its first step
OWN_OPTIONS = (*_compare.OWN_OPTIONS, "--config")
BUDGET = ("epochs", "batch_size", "length")
REPEATS = 9  # steps that are timed
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of the first step of a method; the same for all seeds but for the speed."""

    trainable: int
    flops: float
    temp_bytes: int
    examples_per_second: float


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Of one training."""

    accuracy: float
    macro_f1: float
    kept: int
    adapter_bytes: int


@dataclasses.dataclass(frozen=True)
class Untrained:
    """Accuracies without training, and a line on what they were found on."""

    accuracy: float
    majority: float
    examples: str


@dataclasses.dataclass(frozen=True)
class Row:
    """What is known of a method; no outcomes if all of its trainings failed."""

    name: str
    cost: Cost
    outcomes: Sequence[Outcome]
    failed: int = 0

    def mean(self, field: str) -> float:
        return statistics.fmean(getattr(x, field) for x in self.outcomes)

    @property
    def accuracies(self) -> list[float]:
        return [x.accuracy for x in self.outcomes]


# --- one run -------------------------------------------------------------------------


def cost(run: finetune.Run) -> Cost:
    """Compiles the step that trains first, times it, and reads what XLA says of it."""
    stage, n = run.stages[0], run.recipe.batch_size
    trainable, frozen = jpeft.partition(run.params)
    # The step donates its first two arguments; the run's own arrays are kept.
    trainable = jax.tree.map(jnp.copy, trainable)
    state = finetune.initial_state(stage, run.params)
    ids, mask, labels = (
        jnp.asarray(x[:n]) for x in (run.train.ids, run.train.mask, run.train.labels)
    )
    rest = frozen, ids, mask, labels, finetune.keys(run.recipe.seed).dropout
    program = finetune.make_step(run.model, stage).lower(trainable, state, *rest)
    program, taken = program.compile(), []
    with _jobs.timing():
        for _ in range(REPEATS):
            began = time.perf_counter()
            trainable, state, loss = program(trainable, state, *rest)
            loss.block_until_ready()
            taken.append(time.perf_counter() - began)
    return Cost(
        trainable=jpeft.count(run.params).trainable,
        flops=program.cost_analysis()["flops"],
        temp_bytes=program.memory_analysis().temp_size_in_bytes,
        examples_per_second=n / statistics.median(taken),
    )


def outcome(run: finetune.Run) -> Outcome:
    """Trains to the end, saves and scores."""
    logits = finetune.make_logits(run.model)
    finetune.train(run, logits, stop=lambda: False)
    adapter = run.out / _runs.ADAPTER
    jpeft.save(adapter, run.params, run.peft, step=run.step)
    return Outcome(
        **finetune.scores(run, logits),
        kept=jpeft.count(run.params).trainable,
        adapter_bytes=_report.size(adapter),
    )


def untrained(run: finetune.Run) -> Untrained:
    """What the base with a new head finds, and what guessing finds."""
    return Untrained(
        accuracy=finetune.scores(run, finetune.make_logits(run.model))["accuracy"],
        majority=finetune.majority(run)["accuracy"],
        examples=_compare.examples(run),
    )


# --- all of them ---------------------------------------------------------------------


def untrained_task(seed: int, options: Sequence[str]) -> Task:
    """What there is before a training."""
    argv = _argv(UNTRAINED, seed, options)
    name, file = f"untrained, seed {seed}", f"untrained-seed{seed}"
    return Task(name, file, argv, untrained, Untrained)


def cost_task(name: str, options: Sequence[str]) -> Task:
    """What a step of a method costs."""
    argv = (*options, "--config", str(_compare.recipe_file(name)))
    return Task(f"{name}, cost", f"{name}-cost", argv, cost, Cost)


def outcome_task(name: str, seed: int, options: Sequence[str]) -> Task:
    """How good a method gets."""
    argv = _argv(name, seed, options)
    return Task(f"{name}, seed {seed}", f"{name}-seed{seed}", argv, outcome, Outcome)


def _argv(name: str, seed: int, options: Sequence[str]) -> tuple[str, ...]:
    config = str(_compare.recipe_file(name))
    return (*options, "--config", config, "--seed", str(seed))


def check_same_budget(chosen: Sequence[str], options: Sequence[str]) -> None:
    """ValueError unless all recipes train for as long on texts of one length."""
    args = vars(finetune.parser().parse_args(options))
    budgets = {
        name: _recipe.read(_compare.recipe_file(name), args)[1]
        for name in [*chosen, FULL]
    }
    for setting in BUDGET:
        values = {name: getattr(train, setting) for name, train in budgets.items()}
        if others := [name for name in values if values[name] != values[FULL]]:
            raise ValueError(
                f"{others[0]} has {setting} = {values[others[0]]}, {FULL} has "
                f"{values[FULL]}; a comparison wants one budget: set it for all with "
                f"--{setting.replace('_', '-')}"
            )


# --- the table -----------------------------------------------------------------------

HEAD = (
    *("method", "trainable", "of full", "kept", "adapter"),
    *("FLOPs", "temporaries", "examples/s", "accuracy"),
)


def cells(row: Row, full: Cost) -> tuple[str, ...]:
    """The columns of HEAD."""
    trainable = row.cost.trainable
    kept, accuracy = ("", ""), []
    if row.outcomes:
        size = _report.megabytes(row.mean("adapter_bytes"))
        kept = f"{row.mean('kept'):,.0f}", size
        accuracy.append(_compare.spread(row.accuracies))
    if row.failed:
        accuracy.append(f"{row.failed} failed")
    return (
        *(row.name, f"{trainable:,}", f"{100 * trainable / full.trainable:.3g}%"),
        *kept,
        f"{row.cost.flops / full.flops:.2f}x",
        f"{row.cost.temp_bytes / full.temp_bytes:.2f}x",
        f"{row.cost.examples_per_second:.0f}",
        ", ".join(accuracy),
    )


def text_of(
    rows: Sequence[Row],
    full: Cost,
    before: Sequence[Untrained],
    seeds: Sequence[int],
    machine: str,
) -> str:
    """The table with what must be known beside it."""
    spread = lambda field: _compare.spread([getattr(x, field) for x in before])
    trained = [before[0].examples, _compare.seeds(seeds)] if before else []
    about = "; ".join([*trained, machine]) + "."
    unit = (
        f"1.00x is full fine-tuning: {full.flops / 1e9:.4g} GFLOP and "
        f"{full.temp_bytes / MIB:.4g} MiB of temporaries a step."
    )
    table = _compare.markdown(HEAD, (cells(row, full) for row in rows))
    if not before:
        return "\n\n".join([about, table, unit])
    guess = (
        f"Untrained: accuracy {spread('accuracy')}; the most frequent class: "
        f"{spread('majority')}."
    )
    return "\n\n".join([about, table, f"{guess} {unit}"])


def measure(
    runs: _jobs.Runs, chosen: Sequence[str], seeds: Sequence[int], options: list[str]
) -> tuple[list[Untrained], Cost, list[Row]]:
    """Runs what has not run yet, and tells each result as it comes.

    Gives what is there before a training, by seed, the cost of "full", and the rows.
    """
    before = {seed: untrained_task(seed, options) for seed in seeds}
    costs = {name: cost_task(name, options) for name in dict.fromkeys([FULL, *chosen])}
    pairs = [(name, seed) for seed in seeds for name in chosen]
    outcomes = {pair: outcome_task(*pair, options) for pair in pairs}
    found: dict[Task, Any] = {}
    # Costs first: what cannot be used is found before hours of training, and no step
    # is timed beside one.
    for tasks in ([*before.values(), *costs.values()], outcomes.values()):
        for task, result in runs.each(tasks):
            found[task] = result
            tell(task, result)
    rows = []
    for name in chosen:
        results = [found[outcomes[name, seed]] for seed in seeds]
        good = [x for x in results if isinstance(x, Outcome)]
        failed = len(results) - len(good)
        rows.append(Row(name, found[costs[name]], good, failed))
    rows.sort(key=lambda row: row.cost.trainable)
    return [found[task] for task in before.values()], found[costs[FULL]], rows


def tell(task: Task, found: Cost | Outcome | Untrained | finetune.Failed) -> None:
    """A line on a result."""
    match found:
        case Cost():
            print(f"{task.name}: {found.trainable:,} trainable parameters", flush=True)
        case Outcome() | Untrained():
            print(f"{task.name}: accuracy {found.accuracy:.3f}", flush=True)
        case _:
            print(f"{task.name}: {found}", file=sys.stderr, flush=True)


# --- the picture ---------------------------------------------------------------------

PICTURES = (".png", ".svg")
# Places of a label around its point, in points: the first one that is free is taken.
AROUND = [
    (x * far, y * far)
    for far in (7, 12, 18, 26, 36, 48)
    for x, y in ((1, 0), (0, 1), (0, -1), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1))
]


def picture(path: Path, rows: Iterable[Row], before: Sequence[Untrained]) -> None:
    """Draws accuracy against trainable parameters; a line leads to what is kept."""
    shown = {row.name: row for row in rows if row.outcomes}
    untrained = statistics.fmean(x.accuracy for x in before)
    style = {"svg.hashsalt": "jpeft"}  # the same file from the same figures
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(figsize=(9, 5.4), layout="constrained")
        for row in shown.values():
            x, y = row.cost.trainable, row.mean("accuracy")
            color = _report.ORANGE if row.name == FULL else _report.BLUE
            axes.plot([x, row.mean("kept")], [y, y], color=_report.GRAY, linewidth=0.8)
            axes.plot(row.mean("kept"), y, "|", color=_report.GRAY)
            axes.vlines(x, min(row.accuracies), max(row.accuracies), color, alpha=0.4)
            axes.plot(x, y, "o", color=color, markersize=5)
        axes.set(xscale="log", ylabel="held-out accuracy")
        axes.set_xlabel("trainable parameters; a line leads to those that are kept")
        lowest, highest = axes.get_ylim()
        if FULL in shown:
            axes.axhline(
                *[shown[FULL].mean("accuracy")],
                color=_report.ORANGE,
                linewidth=0.8,
                linestyle="--",
            )
        below = " (below)" if untrained < lowest else ""
        axes.axhline(
            untrained,
            color=_report.GRAY,
            linestyle="--",
            label=f"untrained: {untrained:.3f}{below}",
        )
        axes.set_ylim(lowest, highest)
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e6e6")
        _put_labels(figure, axes, shown)
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=150, metadata=metadata)
        pyplot.close(figure)


def _put_labels(figure: Any, axes: Any, shown: Mapping[str, Row]) -> None:
    """A name beside each point, where no point and no other name is."""
    figure.canvas.draw()  # only now is it known how large things are
    renderer, inside = figure.canvas.get_renderer(), axes.get_window_extent()
    points = [(row.cost.trainable, row.mean("accuracy")) for row in shown.values()]
    taken = [
        pyplot.matplotlib.transforms.Bbox([xy - 5, xy + 5])
        for xy in axes.transData.transform(np.array(points).reshape(-1, 2))
    ]
    for name, point in zip(shown, points, strict=True):
        for dx, dy in AROUND:
            label = axes.annotate(
                *(name, point, (dx, dy)),
                textcoords="offset points",
                ha="left" if dx > 0 else "right" if dx < 0 else "center",
                va="center_baseline",
                fontsize=8,
                in_layout=False,
                bbox={
                    "facecolor": "white",
                    "edgecolor": "none",
                    "alpha": 0.6,
                    "pad": 0,
                },
            )
            box = label.get_window_extent(renderer)
            free = not any(map(box.overlaps, taken))
            if free and inside.contains(*box.min) and inside.contains(*box.max):
                taken.append(box)
                break
            label.remove()
        else:  # in a crowd, over another one
            axes.annotate(name, point, AROUND[0], textcoords="offset points")


# --- the command line ----------------------------------------------------------------


TASKS = ("classify", "sft")


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    tasks = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    given = {"choices": TASKS, "default": TASKS[0], "help": "(%(default)s)"}
    tasks.add_argument("--task", **given)
    if tasks.parse_known_args(argv)[0].task == "sft":
        import _compare_sft  # needs more than this table

        return _compare_sft.main(argv)
    options = _compare.parser(__doc__, seeds=[0, 1, 2], out="runs/compare_methods")
    options.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw it: .png or .svg"
    )
    options.add_argument("--costs-only", action="store_true", help="train nothing")
    options.add_argument("--task", **given)
    files = "--markdown", "--plot"
    args, rest = _compare.parse(options, argv, own=OWN_OPTIONS, files=files)
    if args.costs_only:
        args.seeds = []
        if args.plot:
            options.error("--plot draws accuracies: leave out --costs-only")
    if args.plot and args.plot.suffix not in PICTURES:
        options.error(f"--plot {args.plot}: expected a name in {' or '.join(PICTURES)}")
    return _jobs.exit_code(partial(work, args, rest), args.out)


def work(args: argparse.Namespace, options: list[str]) -> int:
    """Measures, prints, writes; gives the exit code."""
    check_same_budget(args.methods, options)
    with _jobs.Runs(args.out, args.jobs) as runs:
        before, full, rows = measure(runs, args.methods, args.seeds, options)
        text = text_of(rows, full, before, args.seeds, runs.machine())
    if args.plot:
        picture(args.plot, rows, before)
    print(text)
    if args.markdown:
        args.markdown.write_text(text + "\n", encoding="utf-8")
    return 1 if any(row.failed for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
