"""Prefix tuning: learned keys and values before every attention.

Li & Liang 2021, arXiv:2101.00190.

    o = softmax(q [P_k; K]^T / sqrt(d)) [P_v; V]    P_k, P_v (*stack, length, features)

Mode "kv": P_k and P_v are trained, one for the kernel that makes keys and one for that
which makes values.  The model's own attention runs unchanged, whatever it is made of
(`_attention` says how); there are no extra positions, masks or cache slots.  Learned
keys enter after the model's rotary positions and key norms.

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
from typing import Annotated, Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jpeft.adapt.equations import (
    Cast,
    Gather,
    Move,
    Negate,
    Pad,
    Product,
    Same,
    Scale,
    Verb,
)
from jpeft.adapt.interpreter import Interpreter, acts, contracts
from jpeft.adapt.labels import Label, Labelled, moved
from jpeft.boxes import unbox
from jpeft.checks import Count, Floating, one_of, plain, refusal
from jpeft.leaf import (
    AdaptedLeaf,
    Several,
    Sharing,
    adapted_leaf,
    array_fields,
    box_of,
    boxed_like,
    frozen,
    innermost,
    is_leaf,
    static,
    trainable,
    transient,
    wide_dtype,
)
from jpeft.methods._attention import BOTH, KEY, VALUE, Index, Tagged
from jpeft.methods._draw import drawn
from jpeft.methods._prefix_targets import (
    Runs,
    check_apart,
    check_free,
    chosen_layers,
    targets,
)
from jpeft.methods._prefix_tokens import tokens_prefix
from jpeft.methods.p_tuning import linear, lstm
from jpeft.transform import (
    Transform,
    check_finite,
    method,
    path_key,
    place_beside,
)
from jpeft.tree.layout import LeafUse, layouts
from jpeft.tree.paths import slots, weight
from jpeft.tree.sublayers import parts_of
from jpeft.tree.where import Where

INITS = ("gaussian", "unit", "zeros")
Network = Annotated[str, one_of(("mlp", "lstm"))]
NETWORK_ELSEWHERE = (
    "the network that makes this prefix is held by another weight of the same "
    "transform; pass the whole tree"
)

# --- the leaves ----------------------------------------------------------------------


@adapted_leaf
class _OfKernel(Labelled):
    """On a kernel whose output features are keys, values, or both among others.

    on: 1, or 0 where the prefix is switched off.  runs: what the output features are;
    () means that all are what `role` says: keys, values, or both at once.  features:
    where the output features have gone since (`Index` over the output axes), if the
    kernel was moved about.
    """

    on: Any = frozen("s", off=0)
    role: str = static(default=KEY)
    runs: Runs = static(default=())
    features: Index | None = static(default=None)

    def columns(self) -> np.ndarray:
        """For each output feature the column of the payload, -1 for none."""
        if self.features is not None:
            return self.features.array
        shape = [n for n, c in zip(self.shape, self.axes, strict=True) if c == "o"]
        if not self.runs:
            return np.arange(math.prod(shape)).reshape(shape)
        found, at = [], {KEY: 0, VALUE: self.count(KEY)}
        for role, n in self.runs:
            start = at.get(role)
            found.append(np.full(n, -1) if start is None else start + np.arange(n))
            if start is not None:
                at[role] += n
        return np.concatenate(found).reshape(shape)

    def count(self, role: str) -> int:
        """How many features of the payload are keys, or values."""
        if self.runs:
            return sum(n for r, n in self.runs if r == role)
        if self.role not in (role, BOTH):
            return 0
        return math.prod(
            n for n, c in zip(self.shape, self.axes, strict=True) if c == "o"
        )

    def move(self, base: Any, f: Any, axes: str | None = None) -> Self:
        place = lambda a: [k for k, c in enumerate(a) if c == "o"]
        with jax.ensure_compile_time_eval():
            columns = f(
                jnp.asarray(self.columns(), jnp.int32),
                place(self.axes),
                place(self.axes if axes is None else axes),
            )
            features = Index(columns)
        old = self.labels()
        made = self.replace(base=base, axes=self.axes if axes is None else axes)
        new = made.labels()
        arrays = {n: f(getattr(self, n), old[n], new[n]) for n in old}
        return made.replace(features=features, **arrays)

    def unstack(self) -> Any:
        return super().unstack() if self.axes[:1] == "s" else None

    def switched(self, on: float) -> Self:
        return self.replace(on=jax.tree.map(lambda x: jnp.full_like(x, on), self.on))


@adapted_leaf
class Prefix(_OfKernel, Several):
    """Learned keys, values, or both, beside what a kernel makes.

    keys, values: (*stack, length, features), or (*stack, tasks, length, features).
    task: with several tasks, that of each example; put there by `jpeft.select`.
    """

    keys: Any = trainable(("s", "length", "feature"), default=None)
    values: Any = trainable(("s", "length", "feature"), default=None)
    tasks: int = static(default=1)
    task: Any = transient()

    def holds(self) -> int:
        return self.tasks

    def select(self, ids: jax.Array) -> Self:
        return self.replace(task=ids) if self.tasks > 1 else self

    def labels(self) -> dict[str, list[Label]]:
        found = super().labels()
        for n in (KEY, VALUE):
            if n in found and self.tasks > 1:
                found[n].insert(-2, "task")
        return found


@adapted_leaf
class MadePrefix(_OfKernel, Sharing):
    """A prefix made by a network; `lends` the part that all layers share.

    w (*stack, width, features) and c (*stack, features): the last layer, its own.
    start (*stack, length, features), or None: what the network's output is added to;
    set by `prefix_from_text`.  embedding (length, d), w1 (d, width), b1 (width): held
    by one leaf for all.  Of an LSTM: w1 (2, d, 2 width), r1 (2, width / 2, 2 width),
    b1 (2, 2 width).
    """

    w: Any = trainable(("s", "width", "feature"))
    c: Any = trainable(("s", "feature"))
    embedding: Any = trainable(("length", "d"), default=None)
    w1: Any = trainable(("d", "width"), default=None)
    r1: Any = trainable(("way", "half", "gates"), default=None)
    b1: Any = trainable(("width",), default=None)
    start: Any = frozen(("s", "length", "feature"), default=None)
    hidden: Any = transient()

    def labels(self) -> dict[str, list[Label]]:
        found = super().labels()
        if self.r1 is not None:
            found |= {"w1": ["way", "d", "gates"], "b1": ["way", "gates"]}
        return found

    def lends(self) -> Mapping[str, Any] | None:
        if self.embedding is None:
            return None
        e, w1, b1 = map(unbox, (self.embedding, self.w1, self.b1))
        if self.r1 is not None:
            return {"hidden": lstm(e, w1, unbox(self.r1), b1)}
        return {"hidden": jnp.tanh(linear(e, w1, b1))}

    def borrow(self, lent: Mapping[str, Any]) -> Self:
        return self.replace(hidden=lent["hidden"])

    def finalize(self) -> AdaptedLeaf:
        """What the network makes, without the network."""
        if self.hidden is None:
            raise ValueError(f"{self.where()}{NETWORK_ELSEWHERE}")
        w, c = unbox(self.w), unbox(self.c)
        rows = jnp.matmul(self.hidden, w, precision="highest") + c[..., None, :]
        return self.holding(rows if self.start is None else rows + unbox(self.start))

    def holding(self, rows: Float[jax.Array, "*stack length features"]) -> AdaptedLeaf:
        """The prefix of these rows, keys before values, without a network."""
        n = self.count(KEY)
        parts: dict[str, Any] = {KEY: rows[..., :n], VALUE: rows[..., n:]}
        made = Prefix(
            base=self.base,
            axes=self.axes,
            on=unbox(self.on),
            role=self.role,
            runs=self.runs,
            features=self.features,
            origin=self.origin,
            path=self.path,
            **{r: x for r, x in parts.items() if x.shape[-1]},
        )
        return boxed_like(box_of(self), made)

    def started(self, rows: Float[jax.Array, "*stack length features"]) -> AdaptedLeaf:
        """With a last layer of zeros, so that the prefix begins as these rows."""
        own = {n: unbox(x) for n, x in array_fields(self).items()}
        own |= {n: jnp.zeros_like(own[n]) for n in ("w", "c")}
        own["start"] = jnp.asarray(rows).astype(own["c"].dtype)
        leaf = place_beside(self.replace(**own), unbox(innermost(self)))
        return boxed_like(box_of(self), leaf.replace(base=self.base))


# --- rules ---------------------------------------------------------------------------


@contracts(kind=Prefix)
def _project(it: Interpreter, at: Product) -> Any:
    leaf, out = at.leaf, at.out
    mine = [k for k in out if isinstance(k, int)]
    if [leaf.axes[k] for k in mine if leaf.shape[k] > 1] != [
        "o" for k, c in enumerate(leaf.axes) if c == "o" and leaf.shape[k] > 1
    ]:
        return None  # used the other way round, or a whole stack at once
    y = it.base(at.eqn, at.ins())
    columns = leaf.columns()
    shape = [leaf.shape[k] if k in mine and leaf.axes[k] == "o" else 1 for k in out]  # type: ignore[index]
    order = [k for k in mine if leaf.axes[k] == "o"]
    places = [k for k, c in enumerate(leaf.axes) if c == "o"]
    columns = columns.transpose([places.index(k) for k in order]).reshape(shape)
    name = str.__str__(leaf.path)
    message = (
        f"{name}: the prefix of this kernel reached no attention that could be read. "
        "An opaque kernel (cuDNN, Pallas, flash attention in blocks) or a linear "
        "attention needs jpeft.prefix(..., mode='tokens')"
    )
    for role in (KEY, VALUE):
        if getattr(leaf, role) is not None:
            it.ledger.owe((name, role), message)
    keys, values, examples = leaf.keys, leaf.values, None
    if leaf.tasks > 1:
        keys, values, examples = _for_examples(leaf, jnp.shape(y), out)
    free = [k for k, label in enumerate(out) if not isinstance(label, int)]
    order = None
    if len(free) > 1:
        n = jnp.shape(y)[free[-1]]
        places = [n if k == free[-1] else 1 for k in range(len(out))]
        order = Index(np.arange(n).reshape(places))
    tag = Tagged(
        main=y,
        keys=keys,
        values=values,
        on=leaf.on,
        columns=Index(columns),
        examples=examples,
        order=order,
        shared=leaf.role == BOTH,
        name=leaf.path,
    )
    # So that a kernel of which nothing is key or value gives its plain output.
    return tag.moved(y, lambda a: a)


def _for_examples(
    leaf: Prefix, shape: Sequence[int], out: Sequence[Label]
) -> tuple[Any, Any, Index]:
    """Each example's own rows, and which axis of the output counts examples."""
    if leaf.task is None:
        raise ValueError(
            f"{leaf.where()}this prefix holds {leaf.tasks} tasks; say which one each "
            "example has: params = jpeft.select(params, task_ids)"
        )
    n = leaf.task.shape[0]
    axis = next((k for k, label in enumerate(out) if not isinstance(label, int)), None)
    if axis is None or shape[axis] != n:
        raise ValueError(
            f"{leaf.where()}{n} task ids were selected, but the activations {shape} "
            "have another number of examples; examples must lead"
        )
    one_each = isinstance(leaf.task, np.ndarray) and np.array_equal(
        leaf.task, np.arange(leaf.tasks)
    )
    pick = lambda x: x if x is None or one_each else x[leaf.task]
    index = np.arange(n).reshape([n if k == axis else 1 for k in range(len(shape))])
    return pick(leaf.keys), pick(leaf.values), Index(index)


@acts(Cast, Negate, kind=_OfKernel)
def _of_the_base(it: Interpreter, verb: Verb, ins: list[Any]) -> Any:
    """The learned rows are no product of the kernel, so what changes its values leaves
    them alone."""
    return ins[0].replace(base=it.base(verb.eqn, ins))


@acts(Move, kind=_OfKernel)
def _moved(it: Interpreter, move: Move, ins: list[Any]) -> Any:
    if move.step in (Pad, Gather):
        return None  # features that the prefix knows nothing of
    return (_of_the_base if isinstance(move, Same) else moved)(it, move, ins)


@acts(Scale, kind=_OfKernel)
def _scale(it: Interpreter, by: Scale, ins: list[Any]) -> Any:
    leaf = next(filter(is_leaf, ins))
    if all(map(is_leaf, ins)) or by.eqn.outvars[0].aval.shape != leaf.shape:
        return None
    return leaf.replace(base=it.base(by.eqn, ins))


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
            "origin": self.origin(),
        }
        shape = _OfKernel(**common)
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
        leaf = place_beside(leaf, unbox(innermost(slot))).replace(base=slot)
        return boxed_like(box_of(slot), leaf)

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
