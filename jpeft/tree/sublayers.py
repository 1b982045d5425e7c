"""Sub-layers: which weights make up an attention or a feed-forward part of a layer.

A parameter tree says nothing of sub-layers but the names of its weights, and those
follow a few dozen conventions, listed here in tables.  A row counts only if its sizes
fit too: what the first weights put out is what the last one takes in.

Where the names leave a doubt, the weights are named in full:

    mlp: (.*)/inner/kernel -> \\1/outer/kernel
    attention: (.*)/a/kernel \\1/b/kernel \\1/c/kernel -> \\1/d/kernel
    attention(heads qkv): (.*)/abc/kernel -> \\1/d/kernel

The first item is a pattern for the whole path, the others are filled in from its
groups.  Of an attention these are query, key and value, in this order, or one weight
that makes all three, with the order of its output features.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jpeft import conventions
from jpeft.tree.layout import LINEAR, MATRIX, UNUSED, LeafUse, layouts
from jpeft.tree.paths import Slots, suggest
from jpeft.tree.where import Where

ATTENTION, CROSS, MLP = "attention", "cross_attention", "mlp"
PRESETS = (ATTENTION, MLP, "all")


@dataclasses.dataclass(frozen=True)
class SubLayer:
    """One attention or feed-forward part, by the paths of its weights.

    kind: "attention", "cross_attention" or "mlp".
    path: of the sub-layer, unique; it names links between its leaves.  Where the
        weights stand directly in the layer, the kind is appended.
    stream: "encoder" or "decoder" in a model with both, else "".
    query, key, value: kernels of an attention; a fused one stands in all that it makes.
    fused: "" or the order of the output features of a fused kernel, see `features`.
    first: weights that read the sub-layer's input, the one that opens links first.
    last: the weight that makes the sub-layer's output, "" if the names do not say.
    last_bias: the bias beside it, if there is one.
    width: how many features enter the last weight, 0 if unknown.
    doubt: what the names leave open; such a sub-layer cannot be chosen.
    """

    kind: str
    path: str
    stream: str = ""
    query: tuple[str, ...] = ()
    key: tuple[str, ...] = ()
    value: tuple[str, ...] = ()
    fused: str = ""
    first: tuple[str, ...] = ()
    last: str = ""
    last_bias: str | None = None
    width: int = 0
    doubt: str = ""

    @property
    def weights(self) -> tuple[str, ...]:
        """Every weight, once."""
        found = (*self.first, *self.query, *self.key, *self.value, self.last)
        return tuple(dict.fromkeys(p for p in found if p))

    def features(
        self, role: str, shape: Sequence[int], *, heads: int | None = None
    ) -> np.ndarray:
        """Which output features of a kernel belong to "query", "key" or "value".

        shape: the output axes of the kernel; the answer is a bool for each.  In a fused
        kernel features are ordered as `fused` says:

            blocks qkv   all queries, then all keys, then all values
            heads qkv    (heads, 3, head): for each head its query, key and value

        heads: their number, needed for "heads" where the shape does not hold it.
        """
        kernel = getattr(self, role)[0]
        makers = [r for r in ("query", "key", "value") if kernel in getattr(self, r)]
        if len(makers) == 1 or not self.fused:  # or all of them by the same features
            return np.ones(tuple(shape), bool)
        style, letters = self.fused.split()
        n = math.prod(shape)
        if style == "heads":
            sizes = self._per_head(kernel, letters, shape, heads)
            ids = np.tile(np.repeat(np.arange(len(letters)), sizes), n // sum(sizes))
        else:
            ids = np.repeat(np.arange(len(letters)), self._blocks(kernel, letters, n))
        return ids.reshape(tuple(shape)) == letters.index(role[0])

    def _blocks(self, kernel: str, letters: str, n: int) -> list[int]:
        """Grouped queries: there are as many query features as enter the output."""
        q = self.width if "q" in letters and self.width else n // len(letters)
        rest = len(letters) - ("q" in letters)
        each, left = divmod(n - q * ("q" in letters), rest)
        if left or each < 1:
            raise ValueError(
                f"{kernel}: {n} output features are not {q} of queries and {rest} "
                "equal blocks"
            )
        return [q if c == "q" else each for c in letters]

    def _per_head(
        self, kernel: str, letters: str, shape: Sequence[int], heads: int | None
    ) -> list[int]:
        n = math.prod(shape)
        if heads is None and len(shape) > 1:
            heads = shape[0]
        if heads is None:
            raise ValueError(
                f"{kernel}: query, key and value of each head stand together, and its "
                f"{n} output features do not say how many heads there are; pass heads="
            )
        each, left = divmod(n, heads * len(letters))
        if left or (self.width and self.width * len(letters) != n):
            raise ValueError(
                f"{kernel}: {n} output features are not {len(letters)} equal parts "
                f"for each of {heads} heads"
            )
        return [each] * len(letters)


_FORMS = {
    MLP: "'mlp: (.*)/inner/kernel -> \\1/outer/kernel'",
    ATTENTION: "'attention: (.*)/query/kernel \\1/key/kernel \\1/value/kernel -> "
    "\\1/out/kernel'",
}


def _form(kind: str, needs: Sequence[str]) -> str:
    """How the weights of such a sub-layer, as a method needs it, are named in full."""
    attends = kind in (ATTENTION, CROSS) or {"query", "key", "value"} & {*needs}
    return _FORMS[ATTENTION if attends else MLP]


def sublayers(flat: Slots, uses: Mapping[str, LeafUse] | None = None) -> list[SubLayer]:
    """Every sub-layer that the names show, in tree order of its first weight.

    Weights of a scanned stack are one sub-layer.  uses: as `find_uses` gives them; with
    them weights that are not used are left out, and sizes are surely known.
    """
    return _Finder(flat, uses).all()


def weights_of_parts(flat: Slots, uses: Mapping[str, LeafUse] | None) -> dict[str, str]:
    """Path of a weight -> the kind of sub-layer that it is in, "attention" or "mlp",
    where the weights beside it say so."""
    return {
        path: MLP if s.kind == MLP else ATTENTION
        for s in sublayers(flat, uses)
        if not s.doubt
        for path in s.weights
    }


class _Finder:
    def __init__(self, flat: Slots, uses: Mapping[str, LeafUse] | None):
        self.by_use = uses is not None
        known = layouts(flat, uses)
        self.known = {p: u for p, u in known.items() if u.kind in (LINEAR, MATRIX)}
        self.order = {p: k for k, p in enumerate(flat.paths)}
        # For each place in the tree: name of a module below it -> its weight.
        self.below: dict[str, dict[str, str]] = {}
        for path in self.known:
            segments = path.split("/")
            if segments[-1] in conventions.ARRAYS and len(segments) > 1:
                segments = segments[:-1]
            for k in range(len(segments)):
                # Haiku's `mlp/~/linear_0` is made when the module is, no layer more.
                below = [s for s in segments[k:] if s != "~"]
                root, name = "/".join(segments[:k]), "/".join(below)
                self.below.setdefault(root, {})[name] = path
        self.claimed: set[str] = set()
        self.found: list[SubLayer] = []
        # Of weights whose names fit a convention and whose sizes do not: what is wrong.
        self.misfits: dict[str, str] = {}

    def all(self) -> list[SubLayer]:
        # From the inside out, so that `attention/{query, key, value, dense}` is not
        # taken for the attention of the layer around it.
        roots = sorted(self.below, key=lambda r: -r.count("/") - bool(r))
        for complete in (True, False):
            for root in roots:
                for row in conventions.ATTENTIONS:
                    self.attention(root, row, complete)
        for root in roots:
            for row in conventions.MLPS:
                self.mlp(root, row.first, row.last)
            self.numbered(root)
        for root in roots:
            self.doubtful(root)
        self.found.sort(key=lambda s: min(self.order[p] for p in s.weights))
        return self.with_streams()

    def attention(self, root: str, row: conventions.Row, complete: bool) -> None:
        first = self.free(root, row.first)
        last = next((p for n in row.last for p in self.free(root, (n,))), "")
        if not first or bool(last) != complete:
            return
        q = k = v = (first[0],)
        if row.fused.endswith(" kv"):
            k = v = (first[1],)
        elif not row.fused:
            k, v = (first[1],), (first[2],)
        # A fused kernel makes keys and values beside as many queries as `last` takes.
        fits = operator.gt if row.fused.endswith("qkv") else operator.eq
        width = self.width(q, last, fits) if complete else 0
        if width is None and not row.fused:  # values may be of another width than keys
            width = self.width(v, last, lambda n, w: w % n == 0)
        if width is None:
            self.misfit(root, v, last)
            return
        cross = bool(conventions.CROSS_NAMES.search(root.rsplit("/", 1)[-1]))
        self.add(
            SubLayer(
                CROSS if cross else ATTENTION,
                self.name(root, ATTENTION),
                query=q,
                key=k,
                value=v,
                fused=row.fused,
                first=q if cross else tuple(first),
                last=last,
                width=width,
                doubt=""
                if last
                else f"no name beside {first[0]} says which weight makes the output",
            )
        )

    def mlp(self, root: str, first: Sequence[str], last: Sequence[str]) -> None:
        firsts, lasts = self.free(root, first), self.free(root, last)
        # Gate and value may be one weight of twice the width.
        most = 2 if len(first) == 1 else 1
        if firsts and lasts:
            stack = self.stack(lasts[0])  # experts, which are outputs of what reads x
            fits = lambda n, w: n in {w * k * m for k in (1, most) for m in (1, stack)}
            width = self.width(firsts, lasts[0], fits)
            if width is not None:
                self.add_mlp(root, firsts, lasts[0], width)
            else:
                self.misfit(root, firsts, lasts[0])

    def add_mlp(
        self, root: str, first: Sequence[str], last: str, width: int = 0
    ) -> None:
        path = self.name(root, MLP)
        self.add(SubLayer(MLP, path, first=tuple(first), last=last, width=width))

    def numbered(self, root: str) -> None:
        """All weights below an MLP, numbered: the first one and the last one."""
        if not conventions.in_mlp(root.rsplit("/", 1)[-1]):
            return
        named = {n: conventions.NUMBERED.fullmatch(n) for n in self.below[root]}
        if len(named) < 2 or not all(named.values()) or self.taken(root):
            return
        if len({m[1] for m in named.values() if m}) > 1:
            return
        order = sorted(named, key=lambda n: int(named[n][2]))  # type: ignore[index]
        first, last = (self.below[root][order[k]] for k in (0, -1))
        width = self.width((first,), last, lambda *_: True)
        self.add_mlp(root, (first,), last, width or 0)

    def doubtful(self, root: str) -> None:
        """Weights in what is called attention or MLP that no convention explains."""
        last = root.rsplit("/", 1)[-1]
        attention = conventions.in_attention(last)
        if not (attention or conventions.in_mlp(last)) or len(self.below[root]) < 2:
            return
        if self.taken(root):
            return
        paths = tuple(self.below[root].values())
        kind = ATTENTION if attention else MLP
        self.add(
            SubLayer(
                kind,
                root,
                first=paths,
                doubt=self.misfits.get(root)
                or self.without_values(root)
                or f"the names of its weights {list(paths[:4])} do not say which "
                "read its input and which makes its output",
            )
        )

    def without_values(self, root: str) -> str:
        """What to say of an attention that has no weight of its values."""
        at = self.below[root]
        for row in conventions.ATTENTIONS:
            if row.fused or row.first[2] in at or not {*row.first[:2]} <= {*at}:
                continue
            last = next((n for n in row.last if n in at), None)
            if last is None:
                continue
            q, k, o = (at[n][len(root) :] for n in (*row.first[:2], last))
            one, same = ("(.*)", r"\1") if root else ("", "")
            named = f"attention: {one}{q} {same}{k} {same}{k} -> {same}{o}"
            return (
                f"no name says which weight makes its values; if {at[row.first[1]]} "
                f"makes keys and values, write where='{named}'"
            )
        return ""

    def misfit(self, root: str, firsts: Sequence[str], last: str) -> None:
        of = lambda p, c: math.prod(self.known[p].sizes(c))
        self.misfits.setdefault(
            root,
            f"{firsts[0]} puts out {of(firsts[0], 'o')} features and {last} takes in "
            f"{of(last, 'i')}, so it is not sure which of them make the output",
        )

    # -- what is there ----------------------------------------------------------------

    def free(self, root: str, names: Sequence[str]) -> list[str]:
        """The weights of these names, or nothing unless all are there and free."""
        at = self.below[root]
        found = [at[n] for n in names if n in at and at[n] not in self.claimed]
        return found if len(found) == len(names) else []

    def taken(self, root: str) -> bool:
        return any(p in self.claimed for p in self.below[root].values())

    def width(
        self, firsts: Sequence[str], last: str, fits: Callable[[int, int], bool]
    ) -> int | None:
        """How many features enter `last`; 0 if unknown, None if the sizes do not fit.

        fits(outputs of a first weight, inputs of the last one).  By name alone it is
        not sure that kernels are (in, out): GPT-2's are stored the other way round.
        """
        uses = [self.known[p] for p in (*firsts, last)]
        if any(u.axes is None for u in uses):
            return 0
        for out, into in ("oi",) if self.by_use else ("oi", "io"):
            *outs, width = (
                math.prod(u.sizes(c))
                for u, c in zip(uses, out * len(firsts) + into, strict=True)
            )
            # Read the other way round, the first must take what the last one gives.
            reads, gives = (
                math.prod(uses[0].sizes(into)),
                math.prod(uses[-1].sizes(out)),
            )
            if out == "i" and reads != gives:
                continue
            if all(fits(n, width) for n in outs):
                return width
        return None

    def stack(self, path: str) -> int:
        use = self.known[path]
        return 1 if use.axes is None else math.prod(use.sizes("s"))

    def name(self, root: str, kind: str) -> str:
        """The module's path; the layer's and the kind if the layer holds the weights
        itself."""
        last = root.rsplit("/", 1)[-1]
        own = (
            conventions.in_attention(last)
            if kind == ATTENTION
            else conventions.in_mlp(last)
        )
        return root if own else f"{root}/{kind}".lstrip("/")

    def add(self, found: SubLayer) -> None:
        self.claimed.update(found.weights)
        taken = {s.path for s in self.found}
        path, k = found.path, 2
        while path in taken:
            path, k = f"{found.path}_{k}", k + 1
        bias = self.known[found.last].bias if found.last else None
        self.found.append(dataclasses.replace(found, path=path, last_bias=bias))

    def with_streams(self) -> list[SubLayer]:
        streams = {s.path: _stream(s.path) for s in self.found}
        if len(set(streams.values()) - {""}) < 2:
            return self.found
        return [dataclasses.replace(s, stream=streams[s.path]) for s in self.found]


def _stream(path: str) -> str:
    for segment in path.split("/"):
        found = conventions.STREAMS.fullmatch(segment)
        if found:
            return found[1].lower()
    return ""


# --- the choice ----------------------------------------------------------------------


def parts_of(
    flat: Slots,
    uses: Mapping[str, LeafUse] | None,
    where: Where,
    exclude: Where,
    method: str,
    *,
    needs: Sequence[str] = ("first", "last"),
) -> list[SubLayer]:
    """The sub-layers a method acts on, in tree order.

    where, exclude: "attention" (cross-attention included), "mlp", "all", a regular
        expression for the whole path of a sub-layer, a callable (path, sub-layer), a
        list of these; `where` also takes weights named in full, see above, and
        `exclude` a pattern for one of a sub-layer's weights.
    needs: which fields must be known.

    Raises ValueError on an item that matches nothing and on a sub-layer in doubt.
    """
    found = sublayers(flat, uses)
    idle = _idle(flat, uses)
    chosen: dict[str, SubLayer] = {}
    for item in _items(where):
        if isinstance(item, str) and "->" in item:
            hits = _explicit(flat, uses, item, method, found, needs)
        else:
            hits = [s for s in found if _matches(item, s)]
            out = lambda s: any(_matches(e, s) or _holds(e, s) for e in _items(exclude))
            named = [s for s in idle if _matches(item, s) and not out(s)]
            if named and item not in PRESETS:
                raise ValueError(
                    f"{method}: where={_shown(item)} names {named[0].path}, whose "
                    f"weights {list(named[0].weights[:3])} the call that "
                    "jpeft.find_uses traced does not use; trace a call that does, "
                    "jpeft.find_uses(fn, params, *args), or "
                    + (f"exclude={_of(named)!r}" if hits else "take it out of where=")
                )
        if not hits:
            raise ValueError(_nothing(item, found, flat, method, needs))
        chosen.update((s.path, s) for s in hits)
    for item in _items(exclude):
        every = {s.path: s for s in (*idle, *found, *chosen.values())}.values()
        gone = [s.path for s in every if _matches(item, s) or _holds(item, s)]
        if not gone and isinstance(item, str) and item not in PRESETS:
            raise ValueError(
                f"{method}: exclude={item!r} matches no sub-layer; nearest: "
                f"{suggest([s.path for s in found], item)}"
            )
        for path in gone:
            chosen.pop(path, None)
    if not chosen:
        raise ValueError(
            f"{method}: exclude={exclude!r} leaves nothing of where={where!r}; "
            f"sub-layers found: {suggest([s.path for s in found], str(where))}"
        )
    order = {p: k for k, p in enumerate(flat.paths)}
    out = sorted(chosen.values(), key=lambda s: min(order[p] for p in s.weights))
    _check(out, method, needs)
    return out


def _idle(flat: Slots, uses: Mapping[str, LeafUse] | None) -> list[SubLayer]:
    """What the names show and the traced call does not use."""
    if uses is None:
        return []
    known = layouts(flat, uses)
    unused = {p for p, u in known.items() if u.kind == UNUSED}
    if not unused:
        return []
    return [s for s in sublayers(flat) if unused & {*s.weights}]


def _of(parts: Sequence[SubLayer]) -> Any:
    paths = [s.path for s in parts]
    return paths[0] if len(paths) == 1 else paths


def _shown(item: Any) -> str:
    return getattr(item, "__qualname__", repr(item))


def _check(chosen: Sequence[SubLayer], method: str, needs: Sequence[str]) -> None:
    owner: dict[str, str] = {}
    for s in chosen:
        if s.doubt and not all(getattr(s, n) for n in needs):
            raise ValueError(
                f"{s.path}: {method} cannot act on this sub-layer: {s.doubt}. "
                f"exclude={s.path!r}, or name its weights in full, in the form "
                f"where={_form(s.kind, needs)}"
            )
        missing = [n for n in needs if not getattr(s, n)]
        if missing:
            raise ValueError(
                f"{s.path}: {method} needs {' and '.join(missing)}, which a sub-layer "
                f"of kind {s.kind!r} does not have; exclude={s.path!r}, or name the "
                "weights of another one in full, in the form "
                f"where={_form(s.kind, needs)}"
            )
        for path in s.weights:
            if owner.setdefault(path, s.path) != s.path:
                raise ValueError(
                    f"{path}: {method} is asked for it twice, as part of "
                    f"{owner[path]!r} and of {s.path!r}; exclude one of the two"
                )


def _items(where: Where) -> tuple[Any, ...]:
    return (where,) if isinstance(where, str) or callable(where) else tuple(where)


def _matches(item: Any, s: SubLayer) -> bool:
    if not isinstance(item, str):
        return bool(item(s.path, s))
    if item == "all":
        return True
    if item == ATTENTION:
        return s.kind in (ATTENTION, CROSS)
    if item == MLP:
        return s.kind == MLP
    return item == s.path or re.fullmatch(item, s.path) is not None


def _holds(item: Any, s: SubLayer) -> bool:
    """Messages about a weight say how to leave it out: with its sub-layer."""
    paths = (*s.weights, s.last_bias or "")
    return isinstance(item, str) and any(
        p == item or re.fullmatch(item, p) for p in paths
    )


def _nothing(
    item: Any,
    found: Sequence[SubLayer],
    flat: Slots,
    method: str,
    needs: Sequence[str],
) -> str:
    start = f"{method}: where={_shown(item)} matches no sub-layer. "
    form = _form(str(item), needs)
    if isinstance(item, str) and "->" in item:
        return start + f"Paths look like {suggest(flat.paths, item.split()[0])}"
    paths = [s.path for s in found]
    if not paths:
        return start + (
            "The names in this tree show none; name the weights in full, in the form "
            f"where={form}. Its weights look like {list(flat.paths[:3])}"
        )
    if item in (ATTENTION, MLP):
        return start + (
            f"The names in this tree show {suggest(paths, item)} alone; name the "
            f"weights in full, in the form where={form}"
        )
    if isinstance(item, str):
        part = [p for p in paths if item not in PRESETS and re.search(item, p)]
        if part:
            return start + (
                f"A pattern must match the whole path of a sub-layer: write "
                f"{'.*' + item + '.*'!r} for {part[:3]}"
            )
        if any(re.fullmatch(item, p) for p in flat.paths):
            return start + (
                "It matches weights, and a sub-layer is chosen by its own path: "
                f"{suggest(paths, item)}"
            )
    return start + f"Sub-layers found: {suggest(paths, str(item))}"


# --- weights named in full -----------------------------------------------------------

_EXPLICIT = re.compile(
    rf"\s*(?:({ATTENTION}|{CROSS}|{MLP})(?:\(((?:blocks|heads) [qkv]+)\))?\s*:)?"
    r"\s*(.+?)\s*->\s*(\S+)\s*"
)


def _explicit(
    flat: Slots,
    uses: Mapping[str, LeafUse] | None,
    item: str,
    method: str,
    others: Sequence[SubLayer],
    needs: Sequence[str],
) -> list[SubLayer]:
    # As it is shown, but typed without r before it: '\1' is one character then.
    item = re.sub(r"[\x01-\x09]", lambda c: f"\\{ord(c[0])}", item)
    form = _EXPLICIT.fullmatch(item)
    if form is None:
        raise ValueError(
            f"{method}: where={item!r}: expected the form {_form('', needs)}, with "
            "'attention:' or 'cross_attention:' before query, key and value"
        )
    kind, fused, firsts, last = form[1] or MLP, form[2] or "", form[3].split(), form[4]
    wanted = {"qkv": 1, "kv": 2}.get(fused.partition(" ")[2], 3)
    if kind != MLP and len(firsts) != wanted:
        raise ValueError(
            f"{method}: where={item!r}: expected {wanted} weights before '->' "
            "(query, key, value), or one weight and 'attention(blocks qkv):' or "
            f"'attention(heads qkv):'; got {len(firsts)}"
        )
    finder = _Finder(flat, uses)
    finder.found = [s for s in others if not s.doubt]
    for path in flat.paths:
        match = re.fullmatch(firsts[0], path)
        if match is None:
            continue
        weights = [path, *(match.expand(f) for f in (*firsts[1:], last))]
        for p in weights:
            if p not in finder.known:
                idle = p in flat.paths and layouts(flat, uses)[p].kind == UNUSED
                raise ValueError(
                    f"{method}: where={item!r}: {p!r} is "
                    + (
                        "not used by the call that jpeft.find_uses traced; trace a "
                        "call that does, jpeft.find_uses(fn, params, *args)"
                        if idle
                        else "no linear weight of this tree; nearest: "
                        f"{suggest(list(finder.known), p)}"
                    )
                )
        *first, end = weights
        # With a fused kernel `first` is shorter: the last of them makes the rest.
        q, k, v = (first[min(k, len(first) - 1)] for k in range(3))
        place = finder.name(_common(weights), MLP if kind == MLP else ATTENTION)
        finder.add(
            SubLayer(
                kind,
                place,
                query=() if kind == MLP else (q,),
                key=() if kind == MLP else (k,),
                value=() if kind == MLP else (v,),
                fused=fused,
                first=(q,) if kind == CROSS else tuple(first),
                last=end,
                width=finder.width((q,), end, lambda *_: True) or 0,
            )
        )
    return [s for s in finder.with_streams() if s not in others]


def _common(paths: Sequence[str]) -> str:
    """The innermost module that holds all of these weights."""
    modules = [p.split("/")[:-1] for p in paths]
    same = itertools.takewhile(lambda s: len(set(s)) == 1, zip(*modules, strict=False))
    return "/".join(s[0] for s in same)
