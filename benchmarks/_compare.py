"""What the tables that compare whole runs of a script have in common."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import _bert
import _recipe
import finetune
import jax
import numpy as np

# What a run is given by such a table, one by one.
OWN_OPTIONS = ("--seed", "--out", "--resume", "--overwrite", "--full-summary")
SMALL = ("--epochs", "1", "--max-train", "96", "--max-eval", "64")


@dataclasses.dataclass(frozen=True)
class Script:
    """What runs the recipes of a folder.  Its functions are found by their names in
    other processes.

    prepare: (arguments) -> a run before its first step.
    kind: of the recipes' ``[train]``.
    base: the default one.
    choices: options beside ``[train]``, the data and the base, that change a result.
    small: options of a few steps.
    """

    name: str
    recipes: str
    parser: Callable[[], argparse.ArgumentParser]
    prepare: Callable[[argparse.Namespace], Any]
    kind: Any
    base: Callable[[], Path]
    choices: tuple[str, ...] = ()
    small: tuple[str, ...] = ()


FINETUNE = Script(
    name="finetune.py",
    recipes="configs",
    parser=finetune.parser,
    prepare=finetune.prepare,
    kind=_recipe.Train,
    base=_bert.default_base,
    choices=("text_column", "label_column", "max_train", "max_eval"),
    small=SMALL,
)


def refuse(
    parser: argparse.ArgumentParser, options: Iterable[str], own: Iterable[str]
) -> None:
    """Ends the command if an option is one of its own."""
    if given := [x for x in options if x.split("=")[0] in own]:
        parser.error(f"{given[0]} is set for each run; the seeds by --seeds")


def parser(
    about: str, *, seeds: Sequence[int], out: str, script: Script = FINETUNE
) -> argparse.ArgumentParser:
    """The options, beside those of the script, of a table over its recipes.

    about: the script's docstring.
    """
    options = argparse.ArgumentParser(
        description=about.splitlines()[0],
        epilog=f"Other options are those of examples/{script.name}, for every run.",
        allow_abbrev=False,
    )
    add, default = options.add_argument, " ".join(map(str, seeds))
    recipes = f"recipes in {script.recipes}/ (all)"
    add("--methods", nargs="+", metavar="NAME", help=recipes)
    add("--seeds", type=int, nargs="+", default=seeds, metavar="N", help=f"({default})")
    add(
        *("--jobs",),
        type=finetune.positive,
        default=1,
        metavar="N",
        help="runs at a time, each in a process (%(default)s)",
    )
    add("--small", action="store_true", help="a few steps: whether it runs")
    add("--markdown", type=Path, metavar="FILE", help="write the table there too")
    add(
        *("--out",),
        type=Path,
        default=Path(out),
        metavar="FOLDER",
        help="what each run found is kept here (%(default)s)",
    )
    return options


def parse(
    options: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    *,
    own: Iterable[str],
    files: Iterable[str],
    script: Script = FINETUNE,
) -> tuple[Any, list[str]]:
    """The arguments, each method and seed once, and those of the script.

    own: options of the script that the table sets.
    files: options that name a file to be written.
    """
    args, rest = options.parse_known_args(argv)
    refuse(options, rest, own)
    for name in files:
        file = getattr(args, name.removeprefix("--"))
        if file is not None and not file.absolute().parent.is_dir():
            options.error(f"{name} {file}: there is no folder {file.parent}")
    args.methods = list(dict.fromkeys(args.methods or names(script)))
    args.seeds = list(dict.fromkeys(args.seeds))
    return args, [*script.small, *rest] if args.small else rest


def names(script: Script = FINETUNE) -> list[str]:
    """Of all its recipes."""
    folder = _recipe.ROOT / script.recipes
    return sorted(file.stem for file in folder.glob("*.toml"))


def recipe_file(name: str, script: Script = FINETUNE) -> Path:
    """ValueError, with a suggestion, if there is none."""
    if name not in (known := names(script)):
        near = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
        raise ValueError(
            f"no method {name!r}; did you mean {near!r}? known: {', '.join(known)}"
        )
    return _recipe.ROOT / script.recipes / f"{name}.toml"


def cores() -> int:
    """What the process may use."""
    return len(os.sched_getaffinity(0))


def machine() -> str:
    """Where the figures come from."""
    python = ".".join(platform.python_version_tuple()[:2])
    device = jax.devices()[0]
    name = device.platform if device.platform == "cpu" else device.device_kind
    return f"Python {python}, jax {jax.__version__} on {name}, {cores()} cores"


def examples(run: finetune.Run) -> str:
    """The data and the length of a run."""
    return (
        f"{len(run.train)} examples to train on, {len(run.held_out)} held out, "
        f"{len(run.classes)} classes, {run.recipe.epochs} x {run.steps_per_epoch} steps"
    )


def seeds(numbers: Sequence[int]) -> str:
    """In words."""
    return f"seed{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


def spread(values: Sequence[float]) -> str:
    """The mean, and the lowest and highest beside it if there are several."""
    mean, lowest, highest = np.mean(values), min(values), max(values)
    some = f" ({lowest:.3f} to {highest:.3f})" if len(values) > 1 else ""
    return f"{mean:.3f}{some}"


def markdown(head: Sequence[str], table: Iterable[Sequence[str]]) -> str:
    """With a head, as a README has it."""
    lines = [head, tuple("---" for _ in head), *table]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
