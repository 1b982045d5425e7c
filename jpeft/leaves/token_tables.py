"""Which weights are token embeddings, and whether virtual ids reach them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from jpeft import conventions
from jpeft.adapt.lookups import DIRECT
from jpeft.tree.layout import EMBEDDING, MATRIX, LeafUse, traced
from jpeft.tree.paths import suggest


def is_table(use: LeafUse) -> bool:
    return use.kind in (EMBEDDING, MATRIX) and len(use.shape) >= 2


def token_embedding(
    candidates: Mapping[str, LeafUse], method: str, known: Mapping[str, LeafUse]
) -> str:
    """The path of the one weight that is looked up by token ids.

    known: all weights, for the message.
    """
    found = _token_tables(candidates)
    if not found:
        near = suggest(list(candidates), "embed_tokens/embedding", 1)
        asking = "" if traced(known) else f", or pass {_USES}"
        named = f"; name it with where={next(iter(near), '...')!r}{asking}"
        raise ValueError(
            f"{method}: no weight here is a token embedding by its name or use"
            f"{named if near or asking else ''}. A model that is given "
            'vectors instead of ids has none: there jpeft.prefix(length, mode="kv") '
            "is the way"
        )
    if len(found) > 1:
        raise ValueError(_which(found, candidates, method))
    return found[0]


def looked_up_together(path: str, known: Mapping[str, LeafUse]) -> list[str]:
    """Other tables that the model looks up by the same ids, as `find_uses` saw."""
    ids = {u.ids for u in known[path].uses if u.lookup == DIRECT and u.ids}
    # Positions made of ids may look as if they were clipped to their table.
    may_hold = lambda p, u: (
        u.lookup == DIRECT
        or (u.lookup in LOST and not _named(p, conventions.OTHER_TABLES))
    )
    return [
        p
        for p, use in known.items()
        if p != path and any(u.ids in ids and may_hold(p, u) for u in use.uses)
    ]


def check_together(
    chosen: Sequence[str], known: Mapping[str, LeafUse], method: str
) -> None:
    """Raises if the ids of virtual tokens reach a table that has no rows for them."""
    for path in chosen:
        others = looked_up_together(path, known)
        if missing := [p for p in others if p not in chosen]:
            raise ValueError(
                f"{path}: the model looks up {missing} by the same ids, which has no "
                f"rows for virtual tokens; {method} must stand on all of these tables: "
                f"where={[p for p in known if p in (path, *others)]!r}"
            )


def token_embeddings(
    candidates: Mapping[str, LeafUse], method: str, known: Mapping[str, LeafUse]
) -> list[str]:
    """The paths of all of them: an encoder and a decoder may have one each.

    known: all weights, for the message.
    """
    found = _token_tables(candidates)
    if not found:
        raise ValueError(
            f"{method}: no weight here is a token embedding by its name or use, and in "
            f"mode 'tokens' it is the ids that tell{_asking(known)}; a model that "
            f'is given vectors instead of ids takes jpeft.{method}(..., mode="kv")'
        )
    if len(found) > 1 and not all(_named(p, conventions.TOKEN_TABLES) for p in found):
        together = {found[0], *looked_up_together(found[0], candidates)}
        if not set(found) <= together:
            raise ValueError(
                f"{method}: which of {found} is the token embedding, neither their "
                f"names nor their use say{_asking(known)}; "
                f'jpeft.{method}(..., mode="kv") needs none'
            )
    more = [p for f in found for p in looked_up_together(f, candidates)]
    return [p for p in candidates if p in (*found, *more)]


_USES = "uses=jpeft.find_uses(fn, params, *args)"


def _asking(candidates: Mapping[str, LeafUse]) -> str:
    return "" if traced(candidates) else f"; pass {_USES}"


def _token_tables(candidates: Mapping[str, LeafUse]) -> list[str]:
    """The token embeddings among them: by their use, where `find_uses` knows it, and by
    their names."""
    tables = {
        p: u
        for p, u in candidates.items()
        if u.kind == EMBEDDING
        or (u.kind == MATRIX and _named(p, conventions.TOKEN_TABLES))
    }
    fed = {p: u for p, u in tables.items() if u.lookup != "constant"}
    found = [p for p in fed if not _named(p, conventions.OTHER_TABLES)] or list(fed)
    if len(found) > 1:
        found = [p for p in found if _named(p, conventions.TOKEN_TABLES)] or found
    return found


def _named(path: str, names: re.Pattern[str]) -> bool:
    return any(names.search(s) for s in path.split("/")[-2:])


def _which(found: list[str], known: Mapping[str, LeafUse], method: str) -> str:
    together = looked_up_together(found[0], known)
    if together:
        every = [p for p in known if p in (found[0], *together)]
        return (
            f"{method}: the model looks up {every} by the same ids, and virtual tokens "
            f"need rows in each; name all of them: where={every!r}"
        )
    return (
        f"{method}: which of {found} is the token embedding? Name it with "
        f"where={found[0]!r}" + ("" if traced(known) else f", or pass {_USES}")
    )


def check_lookups(path: str, use: LeafUse, method: str) -> None:
    """Raises if the model is known to lose virtual ids before it looks them up."""
    if use.axes is None or sorted(use.axes.replace("o", "")) != ["i"]:
        raise ValueError(
            f"{path}: {method} needs a table (vocabulary, features), and this weight "
            f"of shape {use.shape} has the axes {use.axes!r}"
            + (f" ({use.doubt})" if use.doubt else "")
            + _asking({path: use})
            + '; jpeft.prefix(length, mode="kv") needs no table'
        )
    for u in use.uses:
        if u.lookup in LOST:
            raise ValueError(
                f"{path}: the model {LOST[u.lookup]} before it looks them up at "
                f"{u.site or 'a library line'}, so virtual tokens would be lost "
                f"without a trace and {method} cannot act; let the model look up the "
                "ids as they come"
            )


# What `LeafUse.lookup` says of ids from the vocabulary's size up.
LOST = {
    "clipped": "clips token ids to the vocabulary",
    "wrapped": "wraps token ids around the vocabulary",
    "replaced": "replaces token ids beyond the vocabulary",
    "shifted": "shifts token ids",
}
