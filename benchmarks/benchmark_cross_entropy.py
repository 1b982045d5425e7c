"""What the loss of a large vocabulary costs, forward and backward, by compiling it.

    python benchmarks/benchmark_cross_entropy.py [--tokens 8192] [--features 4096] ...

Four ways to the loss of hidden states and a frozen head, with the gradient for the
hidden states, compiled ahead of time from shapes alone: nothing runs, so that no memory
is needed and any machine does.

    plain             logits of all tokens, float32 log-softmax
    jpeft             `jpeft.objectives.linear_cross_entropy`, all tokens counted
    ... half masked   the same program, half of whose tokens count
    remat             chunks under `jax.checkpoint`, as TRL's `chunked_nll`, of all
                      tokens, and of half of them, packed to the front

XLA counts the FLOPs of a loop's body once, so those of a program with a loop are
measured of a short one, times the steps, and what the program has besides.  float32
throughout: what XLA for CPUs makes of bfloat16 is a copy of the head.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jpeft.objectives import Weighted, linear_cross_entropy, next_token_loss

MIB = 2**20
Loss = Callable[..., Weighted]


class Sizes(NamedTuple):
    tokens: int
    features: int
    vocabulary: int
    chunk: int


class Cost(NamedTuple):
    flops: float
    temp_bytes: int


def plain(
    hidden: jax.Array, head: jax.Array, labels: jax.Array, mask: jax.Array
) -> Weighted:
    return next_token_loss(hidden @ head, labels, mask)


def remat(
    hidden: jax.Array, head: jax.Array, labels: jax.Array, mask: jax.Array, chunk: int
) -> Weighted:
    """Chunks whose logits are made again in the backward pass."""

    @jax.checkpoint
    def one(total: jax.Array, part: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        return total + plain(part[0], head, *part[1:]).total, None

    parts = [x.reshape(-1, chunk, *x.shape[1:]) for x in (hidden, labels, mask)]
    total, _ = jax.lax.scan(one, jnp.zeros((), jnp.float32), tuple(parts))
    return Weighted(total, jnp.sum(mask, dtype=jnp.float32))


def compiled(loss: Loss, sizes: Sizes, tokens: int) -> Cost:
    """Of the mean and its gradient for the hidden states, loops' bodies once."""
    shape = jax.ShapeDtypeStruct
    args = (
        shape((tokens, sizes.features), jnp.float32),
        shape((sizes.features, sizes.vocabulary), jnp.float32),
        shape((tokens,), jnp.int32),
        shape((tokens,), jnp.bool_),
    )
    step = jax.value_and_grad(lambda *args: loss(*args).mean())
    program = jax.jit(step).lower(*args).compile()
    flops = program.cost_analysis()["flops"]
    return Cost(flops, program.memory_analysis().temp_size_in_bytes)


def looped(loss: Loss, sizes: Sizes, tokens: int, counted: int) -> Cost:
    """The same of a loss that loops over chunks, `counted` of whose tokens count."""
    # Of one chunk there would be no loop: XLA merges what forward and backward share.
    whole, one = (compiled(loss, sizes, n) for n in (tokens, 2 * sizes.chunk))
    steps = -(-counted // sizes.chunk)
    return Cost(whole.flops + (steps - 1) * one.flops, whole.temp_bytes)


def table(sizes: Sizes) -> dict[str, Cost]:
    n, half = sizes.tokens, sizes.tokens // 2
    ours = functools.partial(linear_cross_entropy, chunk=sizes.chunk)
    again = functools.partial(remat, chunk=sizes.chunk)
    return {
        "plain": compiled(plain, sizes, n),
        "jpeft": looped(ours, sizes, n, n),
        "jpeft, half masked": looped(ours, sizes, n, half),
        "remat": looped(again, sizes, n, n),
        "remat, half masked": looped(again, sizes, half, half),
    }


def markdown(costs: dict[str, Cost]) -> str:
    first = costs["plain"]
    lines = ["| loss | TFLOP | temporaries MiB |", "|---|---|---|"]
    for name, cost in costs.items():
        flops = f"{cost.flops / 1e12:.3f} ({cost.flops / first.flops:.2f}x)"
        share = cost.temp_bytes / first.temp_bytes
        lines.append(
            f"| {name} | {flops} | {cost.temp_bytes / MIB:.0f} ({share:.3f}x) |"
        )
    return "\n".join(lines)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--tokens", type=int, default=8192)
    arguments.add_argument("--features", type=int, default=4096)
    arguments.add_argument("--vocabulary", type=int, default=128_256)
    arguments.add_argument("--chunk", type=int, default=512)
    sizes = Sizes(**vars(arguments.parse_args()))
    if sizes.tokens % (2 * sizes.chunk):
        arguments.error("--tokens must be a multiple of twice --chunk")
    print(
        f"{sizes.tokens} tokens, {sizes.features} features, {sizes.vocabulary} words, "
        f"chunks of {sizes.chunk}; jax {jax.__version__}, "
        f"{jax.devices()[0].platform}.\n"
    )
    print(markdown(table(sizes)))


if __name__ == "__main__":
    main()
