"""What one equation hands to a later one beside its outputs: links and virtual rows.

A *link* is left under a name by the first weight of a sub-layer and taken up by its
last: the input of a parallel adapter, a gate.  *Rows* say which positions of a text are
virtual tokens; the token embedding finds that in the ids it is asked for.  Both pass
into inner jits and checkpoints as explicit inputs and outputs, so that no tracer leaks;
rows enter the bodies of loops, links start and end there.

The *ledger* holds what was promised (this prefix is to be attended, this link closed)
and raises where a promise is still open at the end: losing a value is never silent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any

import jax

from jpeft.leaf import Linked, OfText, layers
from jpeft.types import PromiseError

Links = dict[str, Any]
Rows = tuple[jax.Array, ...]


@dataclasses.dataclass
class Channel:
    """The links open and the rows known at one place of a program.

    rows: for each look-up of token ids so far, in order, an int32 array of the ids'
    shape: the number of the virtual token there, -1 for a real one.
    """

    links: Links = dataclasses.field(default_factory=dict)
    rows: Rows = ()

    def open(self, name: str, value: Any, site: str) -> None:
        if name in self.links:
            raise PromiseError(
                f"link {name!r} is opened at {site}, but it is open already: the first "
                "weight of that sub-layer is used twice before its last; exclude= the "
                "sub-layer"
            )
        self.links[name] = value

    def close(self, name: str, site: str) -> Any:
        if name not in self.links:
            raise PromiseError(
                f"link {name!r} is not open at {site}: its first weight has not run "
                "here, in this step of a loop or this branch (open are "
                f"{sorted(self.links)}); both weights must be in one body, or exclude= "
                "the sub-layer"
            )
        return self.links.pop(name)

    def end(self, where: str) -> None:
        """Raises if a link is open at the end of a body."""
        if self.links:
            names = ", ".join(map(repr, sorted(self.links)))
            raise PromiseError(
                f"link {names} was opened and never closed in {where}: the weight that "
                "takes it up did not run there; exclude= that sub-layer"
            )


@dataclasses.dataclass
class Ledger:
    """Promises made and kept during one call."""

    owed: dict[Hashable, str] = dataclasses.field(default_factory=dict)
    paid: set[Hashable] = dataclasses.field(default_factory=set)

    def owe(self, promise: Hashable, message: str) -> None:
        """message: what to say if the promise is not kept."""
        self.owed.setdefault(promise, message)

    def pay(self, promise: Hashable) -> None:
        self.paid.add(promise)

    def settle(self) -> None:
        open_ = [m for p, m in self.owed.items() if p not in self.paid]
        if open_:
            more = f" (and {len(open_) - 1} more like it)" if len(open_) > 1 else ""
            raise PromiseError(open_[0] + more)


def crossing(values: Sequence[Any]) -> tuple[frozenset[str], frozenset[str]]:
    """(links that must come in, links that may come out) of a program that gets these
    values: closed but not opened by its leaves, opened but not closed."""
    opened: set[str] = set()
    closed: set[str] = set()
    for x in values:
        for leaf in layers(x):
            if isinstance(leaf, Linked):
                opened |= leaf.opens()
                closed |= leaf.closes()
    return frozenset(closed - opened), frozenset(opened - closed)


def knows_rows(values: Sequence[Any]) -> bool:
    return any(isinstance(leaf, OfText) for x in values for leaf in layers(x))
