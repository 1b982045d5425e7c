"""Reinforcement learning from several seeds: does the reward rise each time?

    python benchmarks/compare_seeds.py [--scripts ppo grpo] [--seeds 0 1 2]
        [--markdown FILE] [--plot FILE.png] [--out FOLDER]
        [any option that the scripts share]

Each script runs once a seed, in a process of its own, one after the other; a run that
has ended is kept below ``--out``, and one that was interrupted is continued.  A seed
decides what is held out, the order of the questions, the first adapters and what is
drawn.

    reward     of answers to held-out questions, before and after
    KL         of an answer, of the policy from its base: of the last round, and the
               largest of any round

Exit codes: 0, 1 if a run failed, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(1, str(EXAMPLES))

import _compare
import _loop
import _report
import _runs

HEAD = ("script", "seed", "reward before", "after", "KL at the end", "largest KL")
DRAWN = {"reward": "reward of a round", "kl": "KL of an answer"}


def run(script: str, seed: int, out: Path, options: Sequence[str]) -> int:
    """The script's exit code; 0 where the run has ended already."""
    if (out / _runs.METRICS).exists():
        return 0
    argv = [sys.executable, str(EXAMPLES / f"{script}.py"), "--seed", str(seed)]
    if (out / _loop.METRICS).exists():
        argv.append("--resume")
    return subprocess.run([*argv, "--out", str(out), *options]).returncode


def steps(out: Path) -> list[dict[str, Any]]:
    lines = (out / _loop.METRICS).read_text(encoding="utf-8").splitlines()
    return [x for x in map(json.loads, lines) if x["kind"] == "train"]


def row(script: str, seed: int, out: Path) -> tuple[str, ...]:
    found = json.loads((out / _runs.METRICS).read_text(encoding="utf-8"))
    kl = [x["kl"] for x in steps(out)]
    numbers = found["before"]["reward"], found["after"]["reward"], kl[-1], max(kl)
    return (f"`{script}.py`", str(seed), *(f"{x:.3f}" for x in numbers))


def draw(path: Path, outs: dict[tuple[str, int], Path]) -> None:
    """The reward and the KL of each round, a line a seed."""
    pyplot = _report.pyplot
    scripts = list(dict.fromkeys(script for script, _ in outs))
    figure, panels = pyplot.subplots(
        *(len(scripts), 2),
        figsize=(7, 2.6 * len(scripts)),
        layout="constrained",
        squeeze=False,
    )
    for (script, seed), out in outs.items():
        rounds = steps(out)
        at = [x["step"] for x in rounds]
        own = panels[scripts.index(script)]
        for axes, (name, title) in zip(own, DRAWN.items(), strict=True):
            axes.plot(at, [x[name] for x in rounds], label=f"seed {seed}")
            axes.set(title=f"{script}: {title}", xlabel="round")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", color="#e6e6e6")
    panels[0, 0].legend(frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--scripts", nargs="+", default=["ppo", "grpo"], choices=["ppo", "grpo"])
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--markdown", type=Path, help="a file for the table")
    add("--plot", type=Path, help="a PNG of every round's reward and KL")
    add("--out", type=Path, default=Path("runs/seeds"), help="(%(default)s)")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    args, options = parser().parse_known_args(argv)
    outs = {(s, n): args.out / f"{s}-{n}" for s in args.scripts for n in args.seeds}
    failed = 0
    for (script, seed), out in outs.items():
        code = run(script, seed, out, options)
        if code in (2, 130):  # what it says holds for the others too
            return code
        failed += code != 0
    ended = {k: out for k, out in outs.items() if (out / _runs.METRICS).exists()}
    text = _compare.markdown(HEAD, (row(*k, out) for k, out in ended.items()))
    print(text)
    if args.markdown is not None:
        args.markdown.write_text(text + "\n", encoding="utf-8")
    if args.plot is not None and ended:
        draw(args.plot, ended)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
