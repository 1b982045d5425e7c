"""`names=`: what the weights of a tree are called where they are stored.

A dict from paths, or regular expressions for whole paths (the first match counts), to a
name, which may hold the expression's groups; or a function of the path.  Instead of a
name there may be (name or names, function of the arrays).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jpeft.checks import check_regex
from jpeft.tree.paths import suggest

# What is stored for a weight: a name, or names and a function of their arrays.
Stored = str | tuple[str | Sequence[str], Callable[..., Any]]
Names = Mapping[str, Stored] | Callable[[str], Stored | None] | None


def told_by(
    names: Names, paths: Sequence[str], caller: str, tree: str
) -> Callable[[str], Stored | None]:
    """What `names` says of a path; None where it says nothing.

    caller, tree: for messages.  Raises ValueError for an entry that fits no path.
    """
    if names is None:
        return lambda path: None
    if not isinstance(names, Mapping):
        return names
    patterns = {}
    for key in names:
        pattern = re.escape(key) if key in paths else key
        try:
            check_regex(pattern)
        except ValueError as error:
            raise ValueError(
                f"{caller}: names key {key!r} is neither a path nor a regular "
                f"expression: {error}"
            ) from None
        patterns[key] = re.compile(pattern)
        if not any(patterns[key].fullmatch(p) for p in paths):
            raise ValueError(
                f"{caller}: names key {key!r} matches no path of {tree}; nearest: "
                f"{suggest(paths, key)}"
            )

    def told(path: str) -> Stored | None:
        for key, pattern in patterns.items():
            if match := pattern.fullmatch(path):
                return _expanded(match, names[key], caller)
        return None

    return told


def _expanded(match: re.Match[str], stored: Stored, caller: str) -> Stored:
    """With the groups of the match where the names say \\1 or \\g<name>."""

    def expand(name: Any) -> Any:
        try:
            return match.expand(name) if isinstance(name, str) else name
        except (re.error, IndexError) as error:
            raise ValueError(
                f"{caller}: names gives {name!r}, which does not fit its "
                f"expression {match.re.pattern!r}: {error}"
            ) from None

    if isinstance(stored, tuple) and len(stored) == 2:
        given, function = stored
        several = isinstance(given, (list, tuple))
        return [expand(n) for n in given] if several else expand(given), function
    return expand(stored)
