"""A prefix that starts as the keys and values of a real text.

Li & Liang 2021, arXiv:2101.00190, section 7.4: such a start helps where data are few.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.adapt.entry import evaluate
from jpeft.boxes import unbox
from jpeft.leaf import is_leaf, layers
from jpeft.methods._attention import KEY, VALUE, Tagged, rows_of
from jpeft.methods.prefix import Prefix
from jpeft.tree.paths import slots


def prefix_from_text(
    fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any
) -> Any:
    """The tree with each prefix set to the keys and values of a real text.

    Runs `fn(params, *args, **kwargs)` once, with the prefixes switched off, and takes
    the keys and values of the first `length` positions of the first example, where the
    prefix would stand before them.  Li & Liang found such a start to help where data
    are few.

    params: with a `prefix` of mode "kv" that was not made by a network.

    Raises ValueError where there is none, or the text is shorter than the prefix.
    """
    flat = slots(params)
    at: dict[int, tuple[int, tuple[int, ...]]] = {}
    probe: list[Any] = []
    for k, slot in enumerate(flat.values):
        probe.append(_numbered(slot, k, at))
    if not at:
        raise ValueError(
            "prefix_from_text: no prefix to set; apply jpeft.prefix(length, "
            "mode='kv') first, without reparametrization= and tasks="
        )
    found: dict[tuple[int, str], np.ndarray] = {}

    def keep(role: str, number: Any, rows: Any) -> None:
        found[int(number), role] = np.asarray(rows)

    def noted(role: str, t: Tagged, seq: int) -> None:
        table = t.keys if role == KEY else t.values
        if t.examples is not None or np.ndim(table) != 2:
            return
        length = table.shape[0]
        if t.main.shape[seq] < length:
            raise ValueError(
                f"{t.name}: the text has {t.main.shape[seq]} positions, the prefix "
                f"{length}; give a longer text or a shorter prefix"
            )
        rows = rows_of(t, role, seq)[:length].astype(table.dtype)
        jax.debug.callback(functools.partial(keep, role), table[0, 0], rows)

    jax.block_until_ready(
        evaluate(fn, (flat.rebuild(probe), *args), kwargs, noted=noted)
    )
    jax.effects_barrier()
    for number, (k, _) in at.items():
        for role in _held(flat.values[k]):
            if (number, role) not in found:
                raise ValueError(
                    f"{flat.paths[k]}: the model did not attend to the {role} of this "
                    "kernel in this call, so there is nothing to start from; give it "
                    "the inputs it is for"
                )
    out = list(flat.values)
    for (number, role), rows in found.items():
        k, row = at[number]
        out[k] = _with_rows(out[k], role, row, rows)
    return flat.rebuild(out)


def _held(slot: Any) -> list[str]:
    """Which of keys and values the prefix in a slot has."""
    leaf = next(x for x in layers(slot) if isinstance(x, Prefix))
    return [n for n in (KEY, VALUE) if getattr(leaf, n) is not None]


def _numbered(slot: Any, k: int, at: dict[int, tuple[int, tuple[int, ...]]]) -> Any:
    """The slot with its prefix off and a number of its own in each row's first place;
    `at` learns which number is which."""
    if not is_leaf(slot):
        return slot
    if not isinstance(slot, Prefix) or slot.tasks > 1:
        if slot.holds_weight:
            return slot
        return slot.replace(base=_numbered(slot.base, k, at))
    stack = jnp.shape(unbox(slot.on))
    start = len(at) + 1
    numbers = start + np.arange(math.prod(stack)).reshape(stack)
    for index in np.ndindex(*stack):
        at[int(numbers[index])] = (k, index)
    # float32 whatever the prefix is: bfloat16 counts to 256 only.
    marked = lambda y: jnp.zeros(y.shape).at[..., 0, 0].set(numbers.astype(np.float32))
    rows = {n: jax.tree.map(marked, getattr(slot, n)) for n in _held(slot)}
    return slot.switched(0.0).replace(**rows)


def _with_rows(slot: Any, role: str, row: tuple[int, ...], rows: np.ndarray) -> Any:
    if not isinstance(slot, Prefix):
        return slot.replace(base=_with_rows(slot.base, role, row, rows))
    put = lambda y: y.at[row].set(jnp.asarray(rows).astype(y.dtype))
    return slot.replace(**{role: jax.tree.map(put, getattr(slot, role))})
