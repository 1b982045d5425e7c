"""What a base in few bits costs in accuracy: the main job over bases in six formats.

    python benchmarks/compare_formats.py [--seeds 0 1 2] [--formats nf4 int8 none]
        [--markdown FILE] [--small] [any option of examples/finetune.py]

Quantises every linear weight of the encoder, then trains what the recipe trains
(``configs/lora.toml`` unless ``--config`` names another) with its own budget, on the
same examples in the same order.  So the row "none" is ``finetune.py`` itself, and the
row "nf4 + double" is ``finetune.py --config configs/qlora.toml``.  (A of LoRA is drawn
by its place in the chain, so the quantised rows share theirs and "none" has another.)

    bits         of a parameter, counted from the arrays that hold the linear weights
    in memory    the whole encoder, its embeddings and norms in float32
    seconds      of the training with its compilation, and of all threads of the process
                 over the number of cores, which other programs on the machine move less

With several seeds a row holds means, and the lowest and highest beside them.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "examples"))

import _compare
import _recipe
import _report
import finetune
import numpy as np

import jpeft
from jpeft.transform import Chain

LINEAR = {"where": "linear", "exclude": "classifier/.*"}
FORMATS: dict[str, jpeft.Transform | None] = {
    "nf4 + double": jpeft.quantize("nf4", double=True, **LINEAR),
    "nf4": jpeft.quantize("nf4", double=False, **LINEAR),
    "fp4": jpeft.quantize("fp4", double=False, **LINEAR),
    "int4": jpeft.quantize("int4", double=False, **LINEAR),
    "int8": jpeft.quantize("int8", double=False, **LINEAR),
    "none": None,
}


@dataclasses.dataclass(frozen=True)
class Result:
    """Of one run; the columns of the table.  Times in seconds."""

    bits: float
    base_bytes: int
    accuracy: float
    macro_f1: float
    wall: float
    cpu: float  # over the cores


def over(base: jpeft.Transform | None, peft: jpeft.Transform) -> jpeft.Transform:
    """The recipe's transform after one that quantises, in one chain as in TOML."""
    if base is None:
        return peft
    return jpeft.chain(base, *(peft.transforms if isinstance(peft, Chain) else (peft,)))


def prepare(name: str, seed: int, options: Sequence[str], out: str) -> finetune.Run:
    """The main job up to its first step, over a base of this format."""
    argv = [*options, "--seed", str(seed), "--out", out]
    args = finetune.parser().parse_args(argv)
    peft, _ = _recipe.read(_recipe.find(args.config), {})
    return finetune.prepare(args, over(FORMATS[name], peft))


def measure(run: finetune.Run) -> Result:
    """Trains to the end and scores."""
    logits = finetune.make_logits(run.model)
    wall, cpu = time.perf_counter(), time.process_time()
    finetune.train(run, logits, stop=lambda: False)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    weights = finetune.base_weights(run.params)
    # Every linear weight of the encoder is a kernel, and every kernel is one.
    linear = [w for path, w in weights.items() if path.endswith("/kernel")]
    return Result(
        bits=_report.stored(linear).bits,
        base_bytes=_report.stored(weights.values()).bytes,
        **finetune.scores(run, logits),
        wall=wall,
        cpu=cpu / _compare.cores(),
    )


# --- the table -----------------------------------------------------------------------

HEAD = ("base", "bits", "in memory", "accuracy", "macro-F1", "seconds", "CPU seconds")


def row(name: str, results: Sequence[Result]) -> tuple[str, ...]:
    """The runs of one format."""
    bits, size, accuracy, f1, wall, cpu = zip(
        *map(dataclasses.astuple, results), strict=True
    )
    return (
        *(name, f"{bits[0]:.3f}", _report.megabytes(size[0])),
        *(_compare.spread(accuracy), _compare.spread(f1)),
        *(f"{np.mean(wall):.0f}", f"{np.mean(cpu):.0f}"),
    )


def report(formats: Sequence[str], seeds: Sequence[int], options: Sequence[str]) -> str:
    """Runs all of it; a row is printed as soon as its last run is over."""
    results: dict[str, list[Result]] = {name: [] for name in formats}
    about = ""
    for seed in seeds:
        for name in formats:
            # Checkpoints are a part of training, and of no use afterwards.
            with tempfile.TemporaryDirectory() as out:
                run = prepare(name, seed, options, out)
                about = f"The recipe {run.name}, {_compare.examples(run)}"
                run.name = f"{name}, seed {seed}"  # on the progress bar
                results[name].append(measure(run))
            print(
                f"seed {seed}:", " | ".join(row(name, results[name][-1:])), flush=True
            )
    table = [row(name, found) for name, found in results.items()]
    about = f"{about}; {_compare.seeds(seeds)}; {_compare.machine()}."
    return "\n\n".join([about, _compare.markdown(HEAD, table)])


# --- the command line ----------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],  # type: ignore[union-attr]
        epilog="Other options are those of examples/finetune.py, for every run.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[0], metavar="N", help="(0)")
    add("--formats", nargs="+", choices=FORMATS, default=list(FORMATS), metavar="NAME")
    add("--small", action="store_true", help="a few steps: whether it runs")
    add("--markdown", type=Path, metavar="FILE", help="write the table there too")
    args, options = parser.parse_known_args(argv)
    _compare.refuse(parser, options, _compare.OWN_OPTIONS)
    if args.small:
        options = [*_compare.SMALL, *options]
    try:
        text = report(args.formats, args.seeds, options)
    except (ValueError, OSError, finetune.Failed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(text)
    if args.markdown:
        args.markdown.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
