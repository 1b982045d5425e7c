"""A prefix that starts as the keys and values of a real text.

Li & Liang 2021, arXiv:2101.00190, section 7.4: such a start helps where data are few.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.adapt.entry import evaluate
from jpeft.boxes import unbox
from jpeft.leaf import is_leaf, is_stored, layers, whose
from jpeft.leaves.attention import KEY, VALUE, Tagged, rows_of
from jpeft.leaves.prefix import NETWORK_ELSEWHERE, MadePrefix, Prefix
from jpeft.tree.paths import slots


def prefix_from_text(
    fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any
) -> Any:
    """The tree with each prefix set to the keys and values of a real text.

    Runs `fn(params, *args, **kwargs)` once, with the prefixes switched off, and takes
    the keys and values of the first `length` positions of the first example, where the
    prefix would stand before them.  Li & Liang found such a start to help where data
    are few.

    params: with a `prefix` of mode "kv".  What a network makes (`reparametrization=`)
    is added to these keys and values, and is zero until the first step; `finalize`
    adds them up.

    Raises ValueError where there is none, or the text is shorter than the prefix.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> from flax import linen as nn
    >>> w = lambda *shape: {"kernel": jnp.ones(shape)}
    >>> attn = {n: w(8, 2, 4) for n in ("query", "key", "value")} | {"out": w(2, 4, 8)}
    >>> def model(p, x):
    ...     names = ("query", "key", "value")
    ...     qkv = (jnp.tensordot(x, p[n]["kernel"], 1) for n in names)
    ...     return jnp.tensordot(nn.dot_product_attention(*qkv), p["out"]["kernel"], 2)
    >>> params = jpeft.prefix(length=5)(jax.random.key(0), attn)
    >>> params = jpeft.prefix_from_text(model, params, jnp.ones((1, 9, 8)))
    >>> params["key"]["kernel"].keys.shape
    (5, 8)
    """
    flat = slots(params)
    at: dict[int, tuple[int, tuple[int, ...]]] = {}
    lengths = {
        x.origin: unbox(x.embedding).shape[0]
        for slot in flat.values
        for x in layers(slot)
        if isinstance(x, MadePrefix) and x.embedding is not None
    }
    probe: list[Any] = []
    for k, slot in enumerate(flat.values):
        probe.append(_numbered(slot, k, at, lengths))
    if not at:
        raise ValueError(
            "prefix_from_text: no prefix to set; apply jpeft.prefix(length, "
            "mode='kv') first, without tasks="
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
    rows: dict[int, dict[str, np.ndarray]] = {}
    for number, (k, place) in at.items():
        for role in _held(flat.values[k]):
            if (number, role) not in found:
                raise ValueError(
                    f"{flat.paths[k]}: the model did not attend to the {role} of this "
                    "kernel in this call, so there is nothing to start from; give it "
                    "the inputs it is for"
                )
            one = found[number, role]
            stack = jnp.shape(unbox(_prefix_in(flat.values[k]).on))
            of_slot = rows.setdefault(k, {})
            if role not in of_slot:
                of_slot[role] = np.zeros((*stack, *one.shape), one.dtype)
            of_slot[role][place] = one
    out = list(flat.values)
    for k, of_slot in rows.items():
        out[k] = _with_rows(out[k], of_slot)
    return flat.rebuild(out)


def _prefix_in(slot: Any) -> Prefix | MadePrefix:
    return next(x for x in layers(slot) if isinstance(x, Prefix | MadePrefix))


def _held(slot: Any) -> list[str]:
    """Which of keys and values the prefix in a slot has."""
    leaf = _prefix_in(slot)
    if isinstance(leaf, MadePrefix):
        return [n for n in (KEY, VALUE) if leaf.count(n)]
    return [n for n in (KEY, VALUE) if getattr(leaf, n) is not None]


def _numbered(
    slot: Any,
    k: int,
    at: dict[int, tuple[int, tuple[int, ...]]],
    lengths: Mapping[str, int],
) -> Any:
    """The slot with its prefix off and a number of its own in each row's first place;
    `at` learns which number is which.  lengths: of the prefixes that networks make."""
    if not is_leaf(slot):
        return slot
    if isinstance(slot, MadePrefix):
        if slot.origin not in lengths:
            raise ValueError(f"prefix_from_text: {whose(slot)}{NETWORK_ELSEWHERE}")
        features = sum(map(slot.count, (KEY, VALUE)))
        shape = *jnp.shape(unbox(slot.on)), lengths[slot.origin], features
        slot = slot.holding(jnp.zeros(shape))
    if not isinstance(slot, Prefix) or slot.tasks > 1:
        if is_stored(slot):
            return slot
        return slot.replace(base=_numbered(slot.base, k, at, lengths))
    stack = jnp.shape(unbox(slot.on))
    start = len(at) + 1
    numbers = start + np.arange(math.prod(stack)).reshape(stack)
    for index in np.ndindex(*stack):
        at[int(numbers[index])] = (k, index)
    # float32 whatever the prefix is: bfloat16 counts to 256 only.
    marked = lambda y: jnp.zeros(y.shape).at[..., 0, 0].set(numbers.astype(np.float32))
    rows = {n: jax.tree.map(marked, getattr(slot, n)) for n in _held(slot)}
    return slot.switched(0.0).replace(**rows)


def _with_rows(slot: Any, rows: Mapping[str, np.ndarray]) -> Any:
    """The slot with these keys and values, (*stack, length, features)."""
    if isinstance(slot, MadePrefix):
        return slot.started(jnp.concatenate([rows[n] for n in _held(slot)], -1))
    if not isinstance(slot, Prefix):
        return slot.replace(base=_with_rows(slot.base, rows))
    # Set, not replaced: it stays on its devices.
    put = lambda y, x: jax.tree.map(
        lambda y: y.at[...].set(jnp.asarray(x).astype(y.dtype)), y
    )
    return slot.replace(**{n: put(getattr(slot, n), x) for n, x in rows.items()})
