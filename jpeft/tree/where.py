"""`where` and `exclude`: presets, regular expressions, callables, lists of these.

A preset or a pattern selects among the weights a method can act on.  What matches
nothing is an error; so is a selected weight whose axes are in doubt, and one that a
pattern names and the model, as it was traced, does not use.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Annotated, Any

from jpeft import conventions
from jpeft.checks import check_regex, refusal, shown
from jpeft.tree.layout import (
    BIAS,
    CONV,
    EMBEDDING,
    LINEAR,
    MATRIX,
    NORM,
    UNUSED,
    LeafUse,
    traced,
)
from jpeft.tree.paths import suggest

PRESETS = ("attention", "mlp", "linear", "embedding", "bias", "norm", "all")
_EXPECTED = (
    f"one of {PRESETS}, a regular expression for the whole path, a callable "
    "(path, leaf) -> bool, or a list of these"
)


def _preset(name: str, use: LeafUse, part: str | None) -> bool:
    """part: the sub-layer that the weight is in, "attention" or "mlp", if one is known
    by the weights beside it; else its own path must say so."""
    if name in ("attention", "mlp"):
        by_path = (
            conventions.in_attention if name == "attention" else conventions.in_mlp
        )
        within = part == name if part is not None else by_path(use.path)
        return use.kind in (LINEAR, MATRIX) and within
    # An unknown matrix may be linear: it is selected so that it is refused by name
    # rather than passed over in silence.
    if name == "linear":
        return use.kind in (LINEAR, MATRIX)
    if name == "embedding":
        return use.kind == EMBEDDING
    if name == "bias":
        return use.kind == BIAS
    if name == "norm":
        return use.kind == NORM or use.of_norm
    return not use.state


def check_where(method: str, name: str, where: Any) -> One | tuple[One, ...]:
    """`where` as a str, a callable or a tuple of these; raises on anything else."""
    checked = check_where_or_nothing(method, name, where)
    if checked == () and name != "exclude":
        raise refusal(method, name, where, _EXPECTED)
    return checked


def check_where_or_nothing(method: str, name: str, where: Any) -> One | tuple[One, ...]:
    """The same, or an empty tuple, which selects nothing."""
    if _is_one(method, name, where):
        return where
    if isinstance(where, Iterable) and not isinstance(where, (Mapping, bytes)):
        # A set has another order in another process, and the transform another mark.
        unordered = isinstance(where, (set, frozenset))
        items = tuple(sorted(where, key=str) if unordered else where)
        if all(_is_one(method, name, w) for w in items):
            return items
    raise refusal(method, name, where, _EXPECTED)


def _is_one(method: str, name: str, where: Any) -> bool:
    if isinstance(where, str) and where not in PRESETS:
        try:
            check_regex(where)
        except ValueError as error:
            raise ValueError(
                f"{method}: {name}={shown(where)} is neither one of {PRESETS} nor a "
                f"regular expression: {error}"
            ) from None
    return isinstance(where, str) or callable(where)


One = str | Callable[[str, Any], bool]
Where = Annotated[One | Sequence[Any], check_where]
WhereOrNothing = Annotated[One | Sequence[Any], check_where_or_nothing]


def select(
    candidates: dict[str, LeafUse],
    slots: dict[str, Any],
    where: Where,
    exclude: Where,
    *,
    method: str,
    others: Mapping[str, LeafUse] | None = None,
    otherwise: str = "",
    unused: Collection[str] = (),
    parts: Mapping[str, str] | None = None,
) -> dict[str, bool]:
    """The paths selected, in tree order, each with whether it was named explicitly
    (by a pattern or a callable, not by a preset alone).

    candidates: the weights the method can act on; others: all further ones, for the
    messages.  otherwise: what to type where there is nothing to act on.  unused: paths
    that the model, as it was traced, does not use.  parts: path -> "attention" or
    "mlp", see `_preset`.  Each item of `where` must match something.
    """
    chosen: set[str] = set()
    named: set[str] = set()
    parts, others = parts or {}, others or {}
    matches = lambda item, p: _matches(item, candidates[p], slots[p], parts.get(p))
    for item in _items(where):
        hits = {p for p in candidates if matches(item, p)}
        idle = [p for p in unused if _names(item, p, slots[p])]
        idle = [
            p for p in idle if not any(_names(e, p, slots[p]) for e in _items(exclude))
        ]
        if idle:
            used = [p for p in slots if p not in unused]
            raise ValueError(_not_used(item, idle, used, bool(hits), method))
        if not hits:
            raise ValueError(_nothing(item, candidates, others, method, otherwise))
        chosen |= hits
        if item not in PRESETS:
            named |= hits
    for item in _items(exclude):
        hits = {p for p in candidates if matches(item, p)}
        if isinstance(item, str) and item not in PRESETS and not hits:
            if not any(_full(item, p) for p in others):
                raise ValueError(
                    f"{method}: exclude={item!r} matches no path; nearest: "
                    f"{suggest([*candidates, *others], item)}"
                )
        chosen -= hits
    if not chosen:
        raise ValueError(
            f"{method}: exclude={exclude!r} leaves nothing of where={where!r}"
        )
    return {p: p in named for p in candidates if p in chosen}


def asks_parts(*selections: Where) -> bool:
    """Whether a preset asks which sub-layer a weight is in."""
    return any(
        isinstance(item, str) and item in ("attention", "mlp")
        for where in selections
        for item in _items(where)
    )


def _items(where: Where) -> tuple[One, ...]:
    if isinstance(where, str) or callable(where):
        return (where,)
    return tuple(where)


def _full(pattern: str, path: str) -> bool:
    return pattern == path or re.fullmatch(pattern, path) is not None


def _matches(item: One, use: LeafUse, slot: Any, part: str | None) -> bool:
    if isinstance(item, str) and item in PRESETS:
        return _preset(item, use, part)
    return _names(item, use.path, slot)


def _names(item: One, path: str, slot: Any) -> bool:
    """Whether a pattern or a callable, not a preset, selects the weight."""
    if not isinstance(item, str):
        return bool(item(path, slot))
    return item not in PRESETS and _full(item, path)


def _not_used(
    item: One, idle: list[str], used: Sequence[str], more: bool, method: str
) -> str:
    """more: whether the item selects something else too."""
    shown = repr(item) if isinstance(item, str) else getattr(item, "__qualname__", item)
    names = [*idle[:3], "..."] if len(idle) > 3 else idle
    patterns = all_of(idle, used)
    out = patterns[0] if len(patterns) == 1 else patterns
    leave = f"exclude={out!r}" if more else "take it out of where="
    return (
        f"{method}: where={shown} names {', '.join(names)}, which the call that "
        "jpeft.find_uses traced does not use; trace a call that does, "
        f"jpeft.find_uses(fn, params, *args), or {leave}"
    )


def all_of(paths: Sequence[str], others: Sequence[str]) -> list[str]:
    """Patterns for these paths and none of the others, as few as modules allow."""
    out = []
    for path in paths:
        segments = path.split("/")
        for k in range(1, len(segments)):
            module = "/".join(segments[:k]) + "/"
            if not any(p.startswith(module) for p in others):
                out.append(re.escape(module) + ".*")
                break
        else:
            out.append(path)
    return list(dict.fromkeys(out))


def _nothing(
    item: One,
    candidates: Mapping[str, LeafUse],
    others: Mapping[str, LeafUse],
    method: str,
    otherwise: str,
) -> str:
    if not isinstance(item, str):
        item_name = getattr(item, "__qualname__", repr(item))
        return (
            f"{method}: where={item_name} is true of no weight; it was asked about "
            f"{list(candidates)[:5]}"
        )
    start = f"{method}: where={item!r} matches nothing. "
    if item in PRESETS:
        if not candidates:
            return (
                start
                + f"{method} can act on no array of this tree; it has {[*others][:5]}"
                + _instead(list(others), others, method, otherwise)
            )
        if any(use.uses for use in candidates.values()):
            return start + (
                "By how the model uses them, no weight of this tree is one; write a "
                f"pattern, such as {suggest(list(candidates), item)}"
            )
        return start + (
            "By name no weight of this tree is one; pass "
            "uses=jpeft.find_uses(fn, params, *args), or a pattern such as "
            f"{suggest(list(candidates), item)}"
        )
    unfit = [p for p in others if _full(item, p)]
    if unfit:
        return (
            f"{method}: where={item!r} matches only {unfit[:3]}, which {method} cannot "
            f"act on{_instead(unfit, others, method, otherwise)}"
        )
    part = [p for p in candidates if re.search(item, p)]
    if part:
        return start + (
            f"A pattern must match the whole path: write {'.*' + item + '.*'!r} for "
            f"{part[:3]}"
        )
    return start + f"Nearest paths: {suggest([*candidates, *others], item)}"


# What acts on a weight of a kind that not every method can act on.
_ACTING = {
    CONV: ("a convolution", "jpeft.lora, jpeft.dora and jpeft.loha act on those"),
    EMBEDDING: ("looked up by row", "jpeft.lora and jpeft.dora act on such tables"),
    LINEAR: ("a matrix", "jpeft.lora and its kin act on those"),
    BIAS: ("a bias", "jpeft.bitfit trains those"),
    NORM: ("a scale", "jpeft.norm_tuning trains those"),
}


def _instead(
    paths: Sequence[str], known: Mapping[str, LeafUse], method: str, otherwise: str
) -> str:
    """Why a method cannot act on such weights, and what can."""
    asks = "" if traced(known) else ASK
    if otherwise:
        return f"; {otherwise}{asks}"
    kinds = {known[p].kind: p for p in reversed(paths)}
    kind = next((k for k in _ACTING if k in kinds), None)
    if kind is not None:
        what, acts = _ACTING[kind]
        return f" ({kinds[kind]} is {what}); {acts}"
    if not paths:
        return ""
    if known[paths[0]].kind == UNUSED:
        return "; the call that jpeft.find_uses traced uses none of them"
    by = "name" if asks else "use"
    return f" ({paths[0]} is none by its {by}); jpeft.full trains any array{asks}"


ASK = ", or pass uses=jpeft.find_uses(fn, params, *args), which looks at the use"
