"""What some methods ask of the training loop, beside their leaves.

AdaLoRA wants an allocator around the optimiser, a penalty and an end; diff pruning
wants two trainings, the first with a penalty and with gates at a rate of their own.
Each is a table below ``[train]`` in a recipe; ``[train.lora_plus]`` makes B faster.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax

import jpeft

HEAD = "classifier"  # its name in the tree of parameters


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of the training with an optimiser of its own.

    penalty: of the trainable parameters, added to the loss.  finish: what becomes of
    the parameters after the last step.
    """

    steps: int
    optimizer: optax.GradientTransformation
    penalty: Callable[[Any], jax.Array] | None = None
    finish: Callable[[Any], Any] | None = None


# (steps, **what differs from the recipe) -> an optimiser with a schedule of its own
Make = Callable[..., optax.GradientTransformation]


@dataclasses.dataclass(frozen=True)
class LoraPlus:
    """``[train.lora_plus]``: the rate of B over the rate of everything else."""

    ratio: float = 16.0


@dataclasses.dataclass(frozen=True)
class AdaLora:
    """``[train.adalora]``: t_init, t_final are parts of all steps, delta_t is steps."""

    target_rank: float = 8.0
    t_init: float = 0.125
    t_final: float = 0.5
    delta_t: int = 1
    orthogonality: float = 0.1
    form: str = "sum_of_squares"  # of the penalty; see jpeft.orthogonality

    def __post_init__(self) -> None:
        parts = self.t_init, self.t_final
        if min(parts) < 0 or not sum(parts) < 1:
            raise ValueError(
                "[train.adalora] t_init and t_final are parts of the steps, together "
                f"below 1, found {self.t_init} and {self.t_final}"
            )
        if self.form not in (forms := ("sum_of_squares", "mean_of_norms")):
            raise ValueError(
                f"[train.adalora] form must be one of {forms}, found {self.form!r}"
            )

    def stages(self, steps: int, make: Make) -> list[Stage]:
        """One, at the end of which what was pruned is dropped."""
        optimizer = jpeft.optim.adalora_allocator(
            make(steps),
            target_rank=self.target_rank,
            total_steps=steps,
            t_init=int(self.t_init * steps),
            t_final=int(self.t_final * steps),
            delta_t=self.delta_t,
        )
        penalty = lambda params: (
            self.orthogonality * jpeft.orthogonality(params, form=self.form)
        )
        return [Stage(steps, optimizer, penalty, jpeft.compact)]


@dataclasses.dataclass(frozen=True)
class DiffPruning:
    """``[train.diff_pruning]``: fixed is the part of all steps after the pruning."""

    penalty: float = 1.25e-7
    gates_learning_rate: float = 0.1
    density: float = 0.005
    fixed: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.fixed < 1:
            raise ValueError(
                f"[train.diff_pruning] fixed must be 0 or more and below 1, found "
                f"{self.fixed}"
            )

    def stages(self, steps: int, make: Make) -> list[Stage]:
        """Learning what changes, then training what was chosen."""
        last = min(steps - 1, round(self.fixed * steps))
        first = steps - last
        both = {
            "gates": make(
                first, learning_rate=self.gates_learning_rate, weight_decay=0.0
            ),
            "rest": make(first),
        }
        learning = Stage(
            first,
            optax.partition(both, _gates),
            lambda params: self.penalty * jpeft.expected_l0(params),
            lambda params: jpeft.sparsify(params, self.density),
        )
        return [learning, Stage(last, make(last))] if last else [learning]


def _gates(params: Any) -> Any:
    """ "gates" for the arrays that open and close, "rest" for all others."""
    of = lambda path, _: (
        "gates" if jax.tree_util.keystr(path[-1:]) in (".alpha", ".group") else "rest"
    )
    return jax.tree_util.tree_map_with_path(of, params)


def head_times(factor: float) -> optax.GradientTransformation:
    """Steps of the classifier are so much larger."""
    of = lambda path, step: step * factor if path[0].key == HEAD else step
    return optax.stateless(
        lambda updates, _: jax.tree_util.tree_map_with_path(of, updates)
    )


TABLES = {"lora_plus": LoraPlus, "adalora": AdaLora, "diff_pruning": DiffPruning}
