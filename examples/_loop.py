"""The training loop of the language-model scripts, all of it.

A script says in a `Job` what a step is and what is measured; the loop draws batches,
shows progress, writes metrics, saves, stops at Ctrl-C and goes on after `--resume`
with the same numbers, bit for bit: parameters, optimiser, randomness, and where in the
data it is, are in the checkpoint.

The folder of a run: `settings.json`, `metrics.jsonl` (a line a step or evaluation),
`curves.png`, `checkpoints/`, `adapter/`, with --tensorboard also `tensorboard/`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import _recipe
import _report
import _runs
import grain
import jax
import numpy as np
import optax
from _recipe import _setting
from _runs import Failed
from tqdm import tqdm

import jpeft

PyTree = Any
Metrics = Mapping[str, Any]
METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What every script has in ``[train]``; each adds its own."""

    steps: int = _setting(100, "steps of the optimiser")
    batch_size: int = _setting(8, "examples in a step")
    learning_rate: float = _setting(1e-3, "the highest one")
    schedule: str = _setting("linear", "linear (falls to 0), cosine or constant")
    warmup: float = _setting(0.1, "part of the steps in which the rate rises")
    weight_decay: float = _setting(0.0, "of AdamW")
    max_norm: float = _setting(1.0, "larger gradients are scaled down to this norm")
    evaluate_every: int = _setting(25, "steps between two evaluations")
    save_every: int = _setting(25, "steps between two checkpoints")
    seed: int = _setting(0, "of the split, the order, new weights, what is drawn")

    def __post_init__(self) -> None:
        _recipe.check_types(self)
        least = {"steps": 1, "batch_size": 1, "evaluate_every": 1, "save_every": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(
                    f"{name} must be {value} or more, found {getattr(self, name)}"
                )
        # Written so that nan, which compares as False, is refused.
        for name in ("learning_rate", "max_norm"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be above 0, found {getattr(self, name)}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must lie between 0 and 1, found {self.warmup}")
        one_of("schedule", self.schedule, ("linear", "cosine", "constant"))


def one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, found {value!r}")


def optimizer(settings: Settings) -> optax.GradientTransformation:
    """AdamW behind a bound on the gradient's norm."""
    peak, steps = settings.learning_rate, settings.steps
    warmup = max(1, round(settings.warmup * steps))
    rest = max(1, steps - warmup)
    falls = {
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "constant": optax.constant_schedule(peak),
    }
    rises = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
    rate = optax.join_schedules([rises, falls[settings.schedule]], [warmup])
    return optax.chain(
        optax.clip_by_global_norm(settings.max_norm),
        optax.adamw(rate, weight_decay=settings.weight_decay),
    )


def shuffled(rows: Any, settings: Settings) -> grain.DatasetIterator:
    """Batches without end, in a new order every time round; knows where it is."""
    data = grain.MapDataset.source(rows).seed(settings.seed).shuffle().repeat()
    return iter(data.batch(settings.batch_size).to_iter_dataset())


@dataclasses.dataclass(eq=False)
class Job:
    """What a script gives to the loop.

    settings: all that a resumed run must share with the run it continues.
    params: adapted; `state` goes with what of them trains: the optimiser's, and
        whatever else changes from step to step.
    step: (trainable, state, frozen, batch, key) -> (trainable, state, metrics).
    batches: what `shuffled` gives.
    evaluate: (params, state) -> metrics, or None; also before the first step.
    tokens: (batch) -> how many a step reads, for the bar.
    steps, evaluate_every, save_every, seed: as in Settings.
    bar: the metric that the progress bar shows.
    finish: what becomes of the parameters after the last step, before they are saved.
    """

    name: str
    out: Path
    settings: dict[str, Any]
    peft: jpeft.Transform
    base: PyTree
    params: PyTree
    state: PyTree
    step: Callable[..., tuple[PyTree, PyTree, Metrics]]
    batches: Any
    how: Settings
    evaluate: Callable[[PyTree, PyTree], Metrics] | None = None
    tokens: Callable[[Any], int] = lambda batch: batch["ids"].size
    bar: str = "loss"
    finish: Callable[[PyTree], PyTree] | None = None
    done: int = 0

    @functools.cached_property
    def manager(self) -> jpeft.CheckpointManager:
        return jpeft.CheckpointManager(self.out / _runs.CHECKPOINTS, self.peft)

    def lines(self, kind: str | None = None) -> list[dict[str, Any]]:
        """What was measured so far; kind: "train" or "evaluate"."""
        file = self.out / METRICS
        if not file.is_file():
            return []
        found = [json.loads(x) for x in file.read_text("utf-8").splitlines()]
        return [x for x in found if kind in (None, x["kind"])]


def prepare(job: Job, args: argparse.Namespace) -> None:
    """Begins the run's folder, or puts the job where its last checkpoint was."""
    if args.tensorboard:
        _board_writer()  # before the training, not after its first step
    if not args.resume:
        _runs.begin(job.out, job.settings, overwrite=args.overwrite)
        (job.out / METRICS).unlink(missing_ok=True)
        return
    _runs.check_same(job.out, job.settings)
    if job.manager.latest_step() is None:
        raise _runs.nothing_to_resume(job.out)
    found = job.manager.restore(job.base, job.state)
    job.params, job.state, job.done = found.params, found.state, found.step
    job.batches.set_state(json.loads(found.metadata["batches"]))
    # Lines of steps that the checkpoint has not seen would stand there twice.
    kept = [x for x in job.lines() if x["step"] <= job.done]
    (job.out / METRICS).write_text("".join(json.dumps(x) + "\n" for x in kept))


def train(
    job: Job, *, stop_after: int | None = None, tensorboard: bool = False
) -> None:
    """Trains to the end and saves the adapter; `job.params` are the result.

    Raises `_runs.Interrupted` after Ctrl-C (or `stop_after` steps), with a checkpoint
    written; Failed when the loss is not finite.
    """
    key = jax.random.key(job.how.seed)
    trainable, frozen = jpeft.partition(job.params)
    state = job.state
    with (
        _runs.Interrupt() as interrupt,
        _Log(job, tensorboard) as log,
        _bar(job) as bar,
    ):
        if job.done == 0 and job.evaluate is not None:
            log.write("evaluate", 0, job.evaluate(job.params, state))
        while job.done < job.how.steps:
            began, batch = time.perf_counter(), next(job.batches)
            trainable, state, metrics = job.step(
                trainable, state, frozen, batch, jax.random.fold_in(key, job.done)
            )
            metrics = {name: float(x) for name, x in metrics.items()}
            job.done += 1
            seconds, tokens = time.perf_counter() - began, job.tokens(batch)
            bad = [name for name, x in metrics.items() if not np.isfinite(x)]
            if bad:
                raise Failed(
                    f"{bad[0]} is {metrics[bad[0]]} at step {job.done}; try a "
                    f"--learning-rate below {job.how.learning_rate:g}"
                )
            log.write("train", job.done, {**metrics, "tokens_per_s": tokens / seconds})
            bar.set_postfix(
                {
                    job.bar: f"{metrics[job.bar]:.3f}",
                    "tok/s": f"{tokens / seconds:.0f}",
                },
                refresh=False,
            )
            bar.update()
            job.params, job.state = jpeft.combine(trainable, frozen), state
            last = job.done == job.how.steps
            if job.evaluate and (last or job.done % job.how.evaluate_every == 0):
                log.write("evaluate", job.done, job.evaluate(job.params, state))
            stopped = interrupt.asked or job.done == stop_after
            if stopped or last or job.done % job.how.save_every == 0:
                position = json.dumps(job.batches.get_state())
                job.manager.save(
                    *(job.done, job.params),
                    state=state,
                    metadata={"batches": position},
                )
            if stopped and not last:
                raise _runs.Interrupted
    if job.finish is not None:
        job.params = job.finish(job.params)
    job.params = jpeft.finalize(job.params)
    jpeft.save(
        *(job.out / _runs.ADAPTER, job.params, job.peft), step=job.done, overwrite=True
    )


def _bar(job: Job) -> Any:
    return tqdm(
        total=job.how.steps,
        initial=job.done,
        unit="step",
        desc=job.name,
        dynamic_ncols=True,
        # A log that is no terminal gets a line now and then.
        mininterval=0.2 if sys.stderr.isatty() else 10,
    )


class _Log(contextlib.AbstractContextManager["_Log"]):
    """Metrics into a file, a line each, and to TensorBoard if asked."""

    def __init__(self, job: Job, tensorboard: bool) -> None:
        self._file = (job.out / METRICS).open("a", encoding="utf-8")
        self._board = None
        if tensorboard:
            self._board = _board_writer()(str(job.out / TENSORBOARD))

    def write(self, kind: str, step: int, metrics: Metrics) -> None:
        plain = {k: x if isinstance(x, str) else float(x) for k, x in metrics.items()}
        line = {"kind": kind, "step": step, **plain}
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, x in plain.items():
                if not isinstance(x, str):
                    self._board.add_scalar(f"{kind}/{name}", x, step)

    def __exit__(self, *_: Any) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def _board_writer() -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ModuleNotFoundError:
        raise ValueError(
            "--tensorboard needs tensorboardX; type: pip install tensorboardX"
        ) from None
    return SummaryWriter


# --- the command line ----------------------------------------------------------------


def options(description: str | None, kind: Any, config: str) -> argparse.ArgumentParser:
    """The options that every script has; those of the recipe have no default here."""
    made = argparse.ArgumentParser(
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Options without a default here have it in the recipe's [train] table.",
    )
    add = made.add_argument
    add("--config", default=config, help="the recipe (%(default)s)")
    add("--out", type=Path, help="folder of results (runs/<name of the recipe>)")
    add("--base", type=Path, help="Hugging Face folder or GGUF file (SmolLM2-135M)")
    _recipe.add_options(add, kind)
    add("--full", action="store_true", help="a long run: the recipe's [train.full]")
    add("--tensorboard", action="store_true", help="metrics for TensorBoard too")
    add("--resume", action="store_true", help="continue the run in --out")
    add("--overwrite", action="store_true", help="replace the run in --out")
    return made


def command(
    script: str,
    argv: Sequence[str] | None,
    parser: argparse.ArgumentParser,
    make: Callable[[argparse.Namespace], Job],
    work: Callable[[Job, Callable[[], None]], None],
    stop_after: int | None = None,
) -> int:
    """Runs a script; the exit code: 0, 1 if training failed, 2 for input that cannot
    be used, 130 after Ctrl-C or SIGTERM.

    work: (job, training) does what is to be done before and after `training()`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(argv)
    with _runs.sigterm_as_ctrl_c():
        try:
            job = make(args)
            prepare(job, args)
        except (ValueError, OSError, KeyError, jpeft.CheckpointError) as error:
            # A KeyError's str() is the repr of its text.
            return _error(error.args[0] if isinstance(error, KeyError) else error, 2)
        except KeyboardInterrupt:
            return _error("interrupted before the training began", 130)
        try:
            work(
                job,
                lambda: train(job, stop_after=stop_after, tensorboard=args.tensorboard),
            )
        except Failed as error:
            return _error(error, 1)
        except (_runs.Interrupted, KeyboardInterrupt):
            saved = job.manager.latest_step()
            print("\n" + _runs.how_to_resume(script, argv, saved), file=sys.stderr)
            return 130
    return 0


def _error(text: object, code: int) -> int:
    print(f"error: {text}", file=sys.stderr)
    return code


# --- what a run shows ----------------------------------------------------------------


def tell(
    job: Job,
    names: Sequence[str],
    train: Sequence[str],
    evaluate: Sequence[str],
    **more: Any,
) -> None:
    """What was held out, before and after; into `metrics.json` with `more`, and drawn.

    names: of evaluations, told.  train, evaluate: as `curves` takes them.
    """
    first, last = job.lines("evaluate")[0], job.lines("evaluate")[-1]
    for name in names:
        label = f"held-out {name.replace('_', ' ')}"
        print(f"{label:<24}{first[name]:>8.3f} -> {last[name]:.3f}")
    count, steps = jpeft.count(job.params), job.lines("train")
    if "kl" in steps[-1]:
        print(f"{'KL of an answer':<24}{steps[-1]['kl']:>8.3f} at the end")
    _runs.write_json(
        job.out / _runs.METRICS,
        {
            "recipe": job.name,
            "settings": job.settings,
            "parameters": {"trainable": count.trainable, "frozen": count.frozen},
            "before": first,
            "after": last,
            "last_step": steps[-1],
            "tokens_per_s": float(np.median([x["tokens_per_s"] for x in steps])),
            **more,
        },
    )
    curves(job, train, evaluate)
    print(f"written  {job.out}: {_runs.ADAPTER}, {_runs.METRICS}, {_runs.CURVES}")


def curves(job: Job, train: Sequence[str], evaluate: Sequence[str]) -> None:
    """`curves.png`: a panel for each name, of steps or of evaluations."""
    pyplot = _report.pyplot
    names = [("train", x) for x in train] + [("evaluate", x) for x in evaluate]
    figure, panels = pyplot.subplots(
        *(1, len(names)), figsize=(3.2 * len(names), 3), layout="constrained"
    )
    for axes, (kind, name) in zip(np.atleast_1d(panels), names, strict=True):
        lines = [x for x in job.lines(kind) if name in x]
        steps, values = [x["step"] for x in lines], [x[name] for x in lines]
        marker = "o" if kind == "evaluate" else None
        color = _report.ORANGE if kind == "evaluate" else _report.BLUE
        axes.plot(steps, values, color=color, marker=marker, markersize=4)
        held_out = "held-out " if kind == "evaluate" else ""
        axes.set(title=held_out + name.replace("_", " "), xlabel="step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e6e6")
    figure.suptitle(job.name)
    figure.savefig(job.out / _runs.CURVES, dpi=150)
    pyplot.close(figure)
