"""Prompt tuning: vectors in front of the text.  Lester et al. 2021, arXiv:2104.08691.

    [P; E[ids]]     P (length, features), trained     E (vocabulary, features), frozen

The prompt's vectors belong to ids from the vocabulary's size V up: the token embedding
reads row id - V of P for them.  So the text gets them with `prepend_virtual_tokens`,
which puts V, V+1, ... in front of its ids and extends mask, labels and positions; the
model runs on a text that is longer by `length`.

    several prompts     P (tasks * length, features)     ids V + task * length + j

A batch may then mix tasks, each example with its own prompt.

Where we depart from the paper: the prompt may stand anywhere in the text; it stands in
the table, so what the model does to looked-up rows (scaling, norm, positions) or to the
table itself happens to it as to any word.  Of the paper's ways to begin, "random" and
"vocab" are there, and the ids of a text in the place of class labels; a text shorter
than the prompt is repeated, as the popular implementation does.  The paper samples
"vocab" from the 5,000 most common tokens, here it is the whole vocabulary, for ids do
not say which are common.  "normal" is the popular implementation's random start.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jpeft.attach import LeafMethod, check_target
from jpeft.checks import Count, Floating, plain, refusal
from jpeft.leaf import is_leaf, layers, wide_dtype
from jpeft.leaves.draw import drawn
from jpeft.leaves.embedding import Prompt, VirtualEmbedding
from jpeft.leaves.token_tables import (
    check_lookups,
    check_together,
    is_table,
    looked_up_together,
    token_embedding,
)
from jpeft.transform import method
from jpeft.tree.layout import LeafUse, layouts
from jpeft.tree.paths import Slots
from jpeft.tree.where import Where, select

RANDOM, NORMAL, VOCAB = INITS = ("random", "normal", "vocab")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VirtualMethod(LeafMethod):
    """A method that stands on the token embedding, found if `where` is None."""

    where: Where | None = None
    exclude: Where = ()
    one_hot: bool = False
    dtype: Floating | None = None

    has_value: ClassVar[bool] = False

    def selection(self) -> tuple[Where, Where]:
        return self.where or ".*", self.exclude

    def accepts(self, use: LeafUse) -> bool:
        return is_table(use)

    def targets(
        self, flat: Slots, uses: Mapping[str, LeafUse] | None
    ) -> dict[str, LeafUse]:
        known, at = layouts(flat, uses), dict(flat.items())
        if self.where is not None:
            chosen = super().targets(flat, uses)
            check_together(list(chosen), known, self.name)
            return _telling_once(chosen)
        tables = {p: u for p, u in known.items() if self.accepts(u)}
        if tables and self.exclude:
            chosen = select(tables, at, ".*", self.exclude, method=self.name)
            tables = {p: tables[p] for p in chosen}
        path = token_embedding(tables, self.name, known)
        check_together([path], known, self.name)
        check_target(self, path, at[path], known[path], True)
        return {path: known[path]}

    def vocab_of(self, path: str, base: Any, use: LeafUse, tokens: int) -> int:
        """The rows of the table, checked."""
        check_lookups(path, use, self.name)
        for leaf in layers(base):
            # A prefix beneath speaks of the same virtual tokens.
            taken = isinstance(leaf, VirtualEmbedding) and type(leaf).table is not (
                VirtualEmbedding.table
            )
            if taken or getattr(leaf, "tokens", tokens) != tokens:
                raise ValueError(
                    f"{path}: {self.name} adds {tokens} virtual tokens, and "
                    f"{type(leaf).__name__} gave {leaf.tokens} a meaning here already; "  # type: ignore[attr-defined]
                    "they would be the same ids"
                )
        return use.sizes("i")[0]


def check_init(method: str, name: str, init: Any) -> str | tuple[int, ...]:
    """A way to begin, or the ids of a text."""
    if isinstance(init, str) and init in INITS:
        return str(init)
    if isinstance(init, (np.ndarray, jax.Array)):
        init = np.asarray(init).tolist()
    ids = [plain(x) for x in init] if isinstance(init, (list, tuple)) else []
    if not ids or any(isinstance(k, bool) or not isinstance(k, int) for k in ids):
        raise refusal(
            method,
            name,
            init,
            f"one of {INITS} or the token ids of a text, a list of integers",
        )
    return tuple(ids)


@dataclasses.dataclass(frozen=True)
class _Table(LeafUse):
    """silent: see `VirtualEmbedding`."""

    silent: bool = False


def _telling_once(chosen: dict[str, LeafUse]) -> dict[str, LeafUse]:
    """Of tables that the same ids look up, the first tells which tokens are virtual."""
    out, told = {}, set()
    for path, use in chosen.items():
        fields = {f.name: getattr(use, f.name) for f in dataclasses.fields(LeafUse)}
        out[path] = _Table(**fields, silent=path in told)
        told.update(looked_up_together(path, chosen))
    return out


@method("prompt")
@dataclasses.dataclass(frozen=True)
class PromptTuning(VirtualMethod):
    """A transform that gives virtual tokens trained vectors.

    Lester et al. 2021, arXiv:2104.08691.  The texts need the virtual tokens:
    `jpeft.prepend_virtual_tokens(ids, length, vocab_size=V)`.

    length: virtual tokens of one prompt, at least 1.
    init: "random" (uniform in [-0.5, 0.5]), "normal" (N(0, 1)), "vocab" (rows of random
        tokens), or the token ids of a text, at most `length`, whose rows are taken.
    tasks: how many prompts; example b uses the one that
        `prepend_virtual_tokens(..., task=...)` says.
    where: the token embedding; None finds it by its use or name.  Of tables that the
        same ids look up (per-layer embeddings), all.
    exclude: tables that are not it.
    one_hot: allow a model that looks up by one-hot rows times the table, in which the
        k-th row of zeros of a text is then virtual token k.
    dtype: of the prompt; None means float32, or float64 beside float64.

    Raises ValueError where no token embedding can be told, where `uses` shows that the
    model changes ids before it looks them up, for a text longer than the prompt.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = {"embed": {"embedding": jnp.ones((11, 3))}}
    >>> params = jpeft.prompt(2)(jax.random.key(0), params)
    >>> ids = jpeft.prepend_virtual_tokens(jnp.array([[4, 5]]), 2, vocab_size=11).ids
    >>> embed = jpeft.adapt(lambda p, ids: p["embed"]["embedding"][ids])
    >>> embed(params, ids).shape
    (1, 4, 3)
    """

    length: Count
    _: dataclasses.KW_ONLY
    init: Annotated[str | Sequence[int], check_init] = RANDOM
    tasks: Count = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.init, tuple) and len(self.init) > self.length:
            raise ValueError(
                f"prompt: init= is a text of {len(self.init)} tokens, longer than the "
                f"prompt of length {self.length}; shorten it, or pass "
                f"length={len(self.init)}"
            )

    def virtual_tokens(self) -> int:
        return self.length

    def attach(self, key: jax.Array, path: str, base: Any, use: LeafUse) -> Prompt:
        tokens = self.length * self.tasks
        vocab, axes = self.vocab_of(path, base, use, tokens), use.axes
        assert axes is not None
        dtype = self.adapter_dtype(base)
        shape = (tokens, *use.sizes("o"))
        if self.init == RANDOM:
            uniform = lambda k, s: jax.random.uniform(k, s, jnp.float32, -0.5, 0.5)
            prompt = drawn(uniform, key, shape)
        elif self.init == NORMAL:
            normal = lambda k, s: jax.random.normal(k, s, jnp.float32)
            prompt = drawn(normal, key, shape)
        elif self.init == VOCAB:
            prompt = rows_of(base, axes, sampled(key, vocab, tokens))
        else:
            ids = np.asarray(self.init)
            if ids.min() < 0 or ids.max() >= vocab:
                bad = ids[(ids < 0) | (ids >= vocab)][0]
                raise ValueError(
                    f"{path}: init= holds the id {bad}, and the table has the ids 0 "
                    f"to {vocab - 1}"
                )
            text = np.resize(ids, self.length)  # repeats it
            prompt = rows_of(base, axes, np.tile(text, self.tasks))
        return Prompt(
            base=base,
            axes=axes,
            vocab=vocab,
            tokens=tokens,
            one_hot=self.one_hot,
            silent=isinstance(use, _Table) and use.silent,
            prompt=prompt.astype(dtype),
        )


prompt = PromptTuning


# --- the mathematics -----------------------------------------------------------------


def sampled(key: jax.Array, vocab: int, n: int) -> Int[Array, " n"]:
    """Random token ids, no two the same while there are enough."""
    return jax.random.choice(key, vocab, (n,), replace=n > vocab)


def rows_of(base: Any, axes: str, ids: Any) -> Float[Array, "n ..."]:
    """Rows of a table, as its adapters make them, with the vocabulary's axis first."""
    table = base.materialize(wide_dtype(base.dtype)) if is_leaf(base) else base
    first = jnp.moveaxis(jnp.asarray(table), axes.index("i"), 0)
    return jnp.take(first, jnp.asarray(ids), axis=0)
