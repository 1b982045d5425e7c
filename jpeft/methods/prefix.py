"""Prefix tuning: learned keys and values before every attention.

Li & Liang 2021, arXiv:2101.00190.

    o = softmax(q [P_k; K]^T / sqrt(d)) [P_v; V]    P_k, P_v (*stack, length, features)

Mode "kv": P_k and P_v are trained, one for the kernel that makes keys and one for that
which makes values.  The model's own attention runs unchanged, whatever it is made of
(`leaves.attention` says how); there are no extra positions, masks or cache slots.
Learned keys enter after the model's rotary positions and key norms.

Mode "tokens": the text gets virtual tokens (`jpeft.prepend_virtual_tokens`), whose keys
and values are overwritten by learned ones where they are projected.  Any attention
works, opaque kernels included; the model then does to learned keys what it does to real
ones (rotary, norm), and they take positions.

The paper makes P_k and P_v with a network while training, which is dropped afterwards
(`jpeft.finalize`):

    H = tanh(E W_1 + b_1)     shared by all layers     E (length, d)   W_1 (d, width)
        or a bidirectional LSTM over the rows of E, `width` wide
    P = H W_2 + b_2           of each kernel           W_2 (*stack, width, features)

Where we depart: without `reparametrization`, P itself trains (P-tuning v2's way, Liu et
al. 2022, arXiv:2110.07602), which suits classification and few steps; the paper found
the network to train more steadily.  Attention weights that a model hands out are those
of the real tokens.  Dropout on attention weights does not drop the prefix.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.attach import check_finite, check_new, over, path_key
from jpeft.checks import Count, Floating, one_of, plain, refusal
from jpeft.leaf import (
    AdaptedLeaf,
    layers,
    wide_dtype,
)
from jpeft.leaves.attention import KEY, VALUE
from jpeft.leaves.draw import drawn
from jpeft.leaves.embedding import VirtualEmbedding
from jpeft.leaves.prefix import MadePrefix, OfKernel, Prefix
from jpeft.leaves.projections import (
    Runs,
    check_apart,
    check_free,
    chosen_layers,
    in_doubt,
    targets,
)
from jpeft.leaves.token_rows import Columns, Draw, TokenRows
from jpeft.leaves.token_tables import (
    check_lookups,
    is_table,
    looked_up_together,
    token_embeddings,
)
from jpeft.transform import Transform, method
from jpeft.tree.layout import LeafUse, layouts
from jpeft.tree.paths import Slots, slots, weight
from jpeft.tree.sublayers import CROSS, SubLayer, parts_of
from jpeft.tree.where import Where

INITS = ("gaussian", "unit", "zeros")
Network = Annotated[str, one_of(("mlp", "lstm"))]

# --- the method ----------------------------------------------------------------------


def check_layers(method: str, name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, (str, Mapping)) and isinstance(value, Iterable):
        value = numbers = tuple(plain(k) for k in value)
        whole = (isinstance(k, int) and not isinstance(k, bool) for k in numbers)
        if numbers and all(whole):
            return numbers
    raise refusal(method, name, value, "layer numbers such as (0, 1, -1)")


@method("prefix")
@dataclasses.dataclass(frozen=True)
class PrefixTuning(Transform):
    """A transform that puts learned keys and values before every attention.

    Li & Liang 2021, arXiv:2101.00190.

    length: number of virtual positions, some ten to a few hundred.
    mode: "kv" (nothing of the input changes) or "tokens" (ids with virtual tokens, see
        `jpeft.prepend_virtual_tokens`); see the module's docstring.
    where, exclude: which attentions, by the path of the sub-layer; "attention" is all
        of them, cross-attention included.
    reparametrization: "mlp" makes the prefix with the paper's network, of hidden size
        `width`, "lstm" with a recurrent one; drop it after the training with
        `jpeft.finalize(params)`.  None trains the prefix itself.
    init: without a network: "gaussian" N(0, 0.02^2), "unit" N(0, 1), "zeros".
        `jpeft.prefix_from_text` takes the activations of a text instead.
    layers: the numbers of the attentions among those chosen that get a prefix, from 0,
        or from -1 backwards; None is all of them.
    tasks: prefixes kept side by side; `jpeft.select(params, ids)` then says which one
        each example of a batch has.
    heads: number of heads, where a fused kernel does not show it.
    dtype: of what is trained; None means float32, or float64 beside float64.

    Raises ValueError where the names of the weights do not say which kernels make keys
    and values, PromiseError from the model where its attention cannot be read.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> w = lambda *shape: {"kernel": jnp.ones(shape)}
    >>> attn = {n: w(8, 2, 4) for n in ("query", "key", "value")} | {"out": w(2, 4, 8)}
    >>> params = jpeft.prefix(length=5)(jax.random.key(0), {"attn": attn})
    >>> params["attn"]["key"]["kernel"].keys.shape
    (5, 8)
    """

    length: Count
    _: dataclasses.KW_ONLY
    mode: Annotated[str, one_of(("kv", "tokens"))] = "kv"
    where: Where = "attention"
    exclude: Where = ()
    reparametrization: Network | None = None
    width: Count = 512
    init: Annotated[str, one_of(INITS)] = "gaussian"
    layers: Annotated[Sequence[int], check_layers] | None = None
    tasks: Count = 1
    heads: Count | None = None
    dtype: Floating | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reparametrization == "lstm" and self.width % 2:
            raise ValueError(
                f"{self.name}: width={self.width}: an LSTM of two directions needs an "
                "even width"
            )
        if self.layers is not None and self.mode == "tokens":
            raise ValueError(
                f"{self.name}: layers= is for mode='kv'; in mode='tokens' choose "
                "sub-layers with where="
            )
        if self.mode == "tokens" and self.reparametrization is not None:
            raise ValueError(
                f"{self.name}: mode='tokens' and reparametrization= exclude each "
                "other; the network is there in mode='kv'"
            )
        if self.tasks > 1 and self.reparametrization is not None:
            raise ValueError(
                f"{self.name}: tasks= and reparametrization= exclude each other; train "
                "one prefix a task, jpeft.finalize each"
            )

    def virtual_tokens(self) -> int:
        return self.length if self.mode == "tokens" else 0

    def __call__(
        self,
        key: jax.Array,
        params: Any,
        *,
        uses: Mapping[str, LeafUse] | None = None,
    ) -> Any:
        flat = slots(params)
        parts = parts_of(
            flat, uses, self.where, self.exclude, self.name, needs=("key", "value")
        )
        known, at = dict(layouts(flat, uses)), dict(flat.items())
        wanted = targets(parts, known, self.heads)
        if self.mode == "tokens":
            return tokens_prefix(
                *(self, key, flat, parts, known),
                tokens=self.length * self.tasks,
                draw=_drawn(self.init),
                heads=self.heads,
                dtype=self.dtype,
            )
        check_apart(self.name, parts)
        on = chosen_layers(self.name, self.layers, parts, known)
        order = [p for p in flat.paths if p in wanted and np.any(on[p])]
        check_finite({p: at[p] for p in order}, self.name)
        made: dict[str, AdaptedLeaf] = {}
        for path in order:
            check_free(self, path, at[path])
            role, runs = wanted[path]
            made[path] = self.attach(
                path_key(key, path),
                path,
                at[path],
                known[path],
                role,
                runs,
                on[path],
                None if made else path_key(key, "shared"),
            )
        return flat.rebuild(made.get(p, x) for p, x in flat.items())

    def attach(
        self,
        key: jax.Array,
        path: str,
        slot: Any,
        use: LeafUse,
        role: str,
        runs: Runs,
        on: np.ndarray,
        shared: jax.Array | None,
    ) -> AdaptedLeaf:
        base = weight(slot)
        dtype = wide_dtype(base.dtype) if self.dtype is None else jnp.dtype(self.dtype)
        assert use.axes is not None
        stack = tuple(use.sizes("s"))
        common: dict[str, Any] = {
            "base": base,
            "axes": use.axes,
            "on": jnp.asarray(on, dtype),
            "role": role,
            "runs": runs,
        }
        shape = OfKernel(**common)
        n = {r: shape.count(r) for r in (KEY, VALUE)}
        leaf: AdaptedLeaf
        if self.reparametrization is None:
            tasks = (self.tasks,) if self.tasks > 1 else ()
            draw = _drawn(self.init)
            rows: dict[str, Any] = {
                r: draw(
                    jax.random.fold_in(key, k), (*stack, *tasks, self.length, m), dtype
                )
                for k, (r, m) in enumerate(n.items())
                if m
            }
            leaf = Prefix(tasks=self.tasks, **common, **rows)
        else:
            arrays: dict[str, Any] = {
                **_last_layer(key, stack, self.width, sum(n.values()), dtype),
                **self._shared(shared, math.prod(use.sizes("i")), dtype),
            }
            leaf = MadePrefix(**common, **arrays)
        return over(self, slot, leaf)

    def _shared(self, key: Any, d: int, dtype: Any) -> dict[str, Any]:
        if key is None:
            return {}
        k1, k2, k3, k4 = jax.random.split(key, 4)
        normal = lambda k, s: jax.random.normal(k, s, dtype)
        e = drawn(normal, k1, (self.length, d))
        n, half = self.width, self.width // 2
        if self.reparametrization == "mlp":
            return {
                "embedding": e,
                "w1": _uniform(k2, (d, n), d, dtype),
                "b1": _uniform(k3, (n,), d, dtype),
            }
        return {
            "embedding": e,
            "w1": _uniform(k2, (2, d, 4 * half), half, dtype),
            "b1": _uniform(k3, (2, 4 * half), half, dtype),
            "r1": _uniform(k4, (2, half, 4 * half), half, dtype),
        }


prefix = PrefixTuning


@method("p_tuning_v2")
@dataclasses.dataclass(frozen=True, kw_only=True)
class PTuningV2(PrefixTuning):
    """A transform that puts deep prompts into chosen layers, for understanding tasks.

    Liu et al. 2022, arXiv:2110.07602.  Prompts of a layer are keys and values before
    its attention, as in `prefix`, whose arguments these are; the paper trains them
    without a network on some tasks and with one on others, and adds a classification
    head, which `jpeft.full` trains beside them.

    layers: the numbers of the layers that get prompts, from 0, or from -1 backwards;
        None is all of them.  The paper finds deeper ones to matter more.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> w = lambda *shape: {"kernel": jnp.ones(shape)}
    >>> attn = {n: w(8, 2, 4) for n in ("query", "key", "value")} | {"out": w(2, 4, 8)}
    >>> layers = {f"layer_{k}": {"attn": attn} for k in range(3)}
    >>> params = jpeft.p_tuning_v2(5, layers=[-1])(jax.random.key(0), layers)
    >>> jpeft.count(params).trainable
    80
    """


p_tuning_v2 = PTuningV2


# --- attaching, in mode "tokens" -----------------------------------------------------


def tokens_prefix(
    transform: Transform,
    key: jax.Array,
    flat: Slots,
    parts: Sequence[SubLayer],
    known: Mapping[str, LeafUse],
    *,
    tokens: int,
    draw: Draw,
    heads: int | None = None,
    dtype: Any = None,
) -> Any:
    """The tree with a prefix of `tokens` virtual tokens in the attentions `parts`.

    known: the use of every weight; those of projections have their axes.
    draw: (key, shape, dtype) -> the first values.
    """
    at = dict(flat.items())
    made: dict[str, AdaptedLeaf] = {}
    name, origin = transform.name, transform.origin()
    places = _places(parts, known, at, heads)
    check_finite({p: at[p] for p in places}, name)
    for path, (axes, columns, stream) in places.items():
        slot = at[path]
        base = weight(slot)
        sizes = {
            c: [n for n, a in zip(base.shape, axes, strict=True) if a == c]
            for c in "so"
        }
        n = sum(k for mine, k in columns if mine) if columns else math.prod(sizes["o"])
        own = wide_dtype(base.dtype) if dtype is None else jnp.dtype(dtype)
        leaf = TokenRows(
            base=base,
            axes=axes,
            rows=draw(path_key(key, path), (*sizes["s"], tokens, n), own),
            columns=columns,
            stream=stream,
        )
        check_new(transform, path, slot)
        made[path] = over(transform, slot, leaf)
    tables = {p: u for p, u in known.items() if is_table(u) and p not in places}
    heard: set[str] = set()  # tables whose ids another table records
    for path in token_embeddings(tables, name, known):
        silent = path in heard
        heard.update(looked_up_together(path, tables))
        slot = at[path]
        told = [x for x in layers(slot) if getattr(x, "vocab", None) is not None]
        if told:
            theirs = getattr(told[0], "tokens")  # noqa: B009  of a prompt, whichever
            if theirs != tokens:
                raise ValueError(
                    f"{path}: {type(told[0]).__name__} gave {theirs} virtual tokens a "
                    f"meaning, and this {name} has {tokens}; they are the same tokens, "
                    "so make the lengths equal"
                )
            continue
        use = known[path]
        check_lookups(path, use, name)
        assert use.axes is not None
        leaf = VirtualEmbedding(
            base=slot,
            axes=use.axes,
            vocab=use.sizes("i")[0],
            tokens=tokens,
            silent=silent,
        )
        made[path] = leaf.replace(origin=origin)
    return flat.rebuild(made.get(p, x) for p, x in flat.items())


def _places(
    parts: Sequence[SubLayer],
    known: Mapping[str, LeafUse],
    at: Mapping[str, Any],
    heads: int | None,
) -> dict[str, tuple[str, Columns, str]]:
    """For each bias or kernel: its axes, the features overwritten, whose text."""
    out = {}
    for part in parts:
        stream = "encoder" if part.kind == CROSS and part.stream else part.stream
        for kernel in dict.fromkeys((*part.key, *part.value)):
            use = known[kernel]
            if use.axes is None:
                raise ValueError(in_doubt(kernel, use, part))
            stack, features = use.sizes("s"), use.sizes("o")
            makes = [r for r in ("key", "value") if kernel in getattr(part, r)]
            marks = [part.features(r, features, heads=heads).ravel() for r in makes]
            cut = np.logical_or.reduce(marks)
            columns = () if cut.all() else _runs(cut)
            bias = use.bias
            if bias is not None and weight(at[bias]).shape == (*stack, *features):
                axes = "s" * len(stack) + "o" * len(features)
                out[bias] = axes, columns, stream
            else:
                out[kernel] = use.axes, columns, stream
    return out


def _runs(cut: np.ndarray) -> Columns:
    ends = [*(np.flatnonzero(np.diff(cut)) + 1), len(cut)]
    return tuple(
        (bool(cut[a]), int(b - a)) for a, b in zip([0, *ends], ends, strict=False)
    )


# --- first values --------------------------------------------------------------------


def _drawn(init: str) -> Callable[..., jax.Array]:
    std = {"gaussian": 0.02, "unit": 1.0, "zeros": 0.0}[init]
    return lambda key, shape, dtype: drawn(
        lambda k, s: std * jax.random.normal(k, s, dtype), key, shape
    )


def _last_layer(
    key: jax.Array, stack: tuple[int, ...], width: int, n: int, dtype: Any
) -> dict[str, jax.Array]:
    k1, k2 = jax.random.split(key)
    return {
        "w": _uniform(k1, (*stack, width, n), width, dtype),
        "c": _uniform(k2, (*stack, n), width, dtype),
    }


def _uniform(
    key: jax.Array, shape: tuple[int, ...], fan_in: int, dtype: Any
) -> jax.Array:
    """As a linear layer usually starts: U(-1, 1) / sqrt(fan_in)."""
    root = math.sqrt(fan_in)
    draw = lambda k, s: jax.random.uniform(k, s, dtype, -1.0, 1.0) / root
    return drawn(draw, key, shape)
