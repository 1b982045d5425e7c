"""Tokens a second of SmolLM2, training and writing, beside torch on the same cores.

    python benchmarks/benchmark_language.py                    # jpeft alone
    pip install torch transformers peft accelerate gguf
    python benchmarks/benchmark_language.py --torch            # and the peer

Training: a LoRA step (rank 16 on all linear layers, AdamW, float32) of 8 x 64 tokens.
Writing: 32 tokens, greedy, from a prompt of 32 tokens, one row and eight.  jpeft's
base is once plain float32, as the peer's, and once the codes of the GGUF file.
CPU-seconds are of all threads; the rounds alternate between the two, so that both meet
the same machine.
The peer runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "examples"))

ROWS, TOKENS, PROMPT, TURNS, RANK = 8, 64, 32, 32, 16


def timed(f: Callable[[], Any]) -> tuple[float, float]:
    """(seconds, CPU-seconds)."""
    wall, cpu = time.perf_counter(), _cpu()
    f()
    return time.perf_counter() - wall, _cpu() - cpu


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def ids(rows: int, tokens: int) -> np.ndarray:
    return np.random.default_rng(0).integers(1000, 40_000, (rows, tokens))


# --- jpeft ---------------------------------------------------------------------------


def with_jpeft(form: str) -> dict[str, Callable[[], Any]]:
    """{what is timed: a function that does it once}, all compiled."""
    import _lm
    import _loop
    import _sampling
    import _stages
    import jax
    import sft

    import jpeft

    language = _lm.load(None, form)
    peft = jpeft.lora(rank=RANK, alpha=2 * RANK, where="linear")
    params = language.attach(peft, jax.random.key(0))
    trainable, frozen = jpeft.partition(params)
    optimizer = _loop.optimizer(sft.Settings())
    kept = [trainable, optimizer.init(trainable)]
    batch = {
        "ids": ids(ROWS, TOKENS).astype(np.int32),
        "segments": np.ones((ROWS, TOKENS), np.int32),
        "counted": np.ones((ROWS, TOKENS), bool),
    }
    step = sft.make_step(language, _stages.Stage(1, optimizer), 1)

    def train() -> None:
        kept[0], kept[1], metrics = step(*kept, frozen, batch, jax.random.key(0))
        jax.block_until_ready(metrics)

    writer = _sampling.Compiled.of(
        _sampling.Writer(
            jpeft.adapt(language.model.apply),
            *(language.config, (-1,), language.tokenizer.pad, TURNS),
            _sampling.GREEDY,
        )
    )

    def writes(rows: int) -> Callable[[], Any]:
        prompts = ids(rows, PROMPT).astype(np.int32)
        mask = np.ones(prompts.shape, bool)

        def write() -> None:
            params = jpeft.combine(kept[0], frozen)  # those before a step are gone
            start = writer.begin(params, prompts, mask, jax.random.key(0))
            jax.block_until_ready(writer.go_on(params, start, TURNS))

        return write

    made = {"train": train, "write 1": writes(1), "write 8": writes(ROWS)}
    for f in made.values():
        f()
    return made


# --- the peer ------------------------------------------------------------------------


def with_torch() -> dict[str, Callable[[], Any]]:
    import _lm
    import peft
    import torch
    import transformers

    path = _lm.default_base()
    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    names = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=names)
    model = peft.get_peft_model(model, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    batch = torch.tensor(ids(ROWS, TOKENS))

    def train() -> None:
        model.train()
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()

    def writes(rows: int) -> Callable[[], Any]:
        prompts = torch.tensor(ids(rows, PROMPT))

        def write() -> None:
            model.eval()
            with torch.no_grad():
                model.generate(
                    input_ids=prompts,
                    attention_mask=torch.ones_like(prompts),
                    max_new_tokens=TURNS,
                    min_new_tokens=TURNS,
                    do_sample=False,
                    pad_token_id=2,
                )

        return write

    made = {"train": train, "write 1": writes(1), "write 8": writes(ROWS)}
    for f in made.values():
        f()
    return made


# --- turns ---------------------------------------------------------------------------

WAYS = {
    "jpeft, float32": lambda: with_jpeft("float32"),
    "jpeft, codes": lambda: with_jpeft("stored"),
    "torch + peft": with_torch,
}


def serve(way: str) -> None:
    """Does what a line on stdin names, and writes what it took."""
    made = WAYS[way]()
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(timed(made[line.strip()])), flush=True)


class Peer:
    """A way in a process of its own."""

    def __init__(self, way: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve", way],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        while (line := self._process.stdout.readline()).strip() != "ready":
            if not line:
                raise SystemExit(f"error: {way} could not be prepared, see above")

    def time(self, what: str) -> tuple[float, float]:
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        return tuple(json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def main() -> int:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--torch", action="store_true", help="the peer too")
    made.add_argument("--rounds", type=int, default=5, help="(%(default)s)")
    made.add_argument("--serve", help=argparse.SUPPRESS)
    args = made.parse_args()
    if args.serve:
        serve(args.serve)
        return 0
    ways = [w for w in WAYS if args.torch or w != "torch + peft"]
    peers = {w: Peer(w) for w in ways}
    tokens = {"train": ROWS * TOKENS, "write 1": TURNS, "write 8": ROWS * TURNS}
    print(f"{'':<10}{'':<16}{'tokens/s':>10}{'CPU-s':>8}   medians of {args.rounds}")
    for what, count in tokens.items():
        found = {w: [] for w in ways}
        for _ in range(args.rounds):
            for w in ways:
                found[w].append(peers[w].time(what))
        for w in ways:
            wall, cpu = np.median(np.array(found[w]), axis=0)
            print(f"{what:<10}{w:<16}{count / wall:>10.1f}{cpu:>8.2f}")
    for peer in peers.values():
        peer.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
