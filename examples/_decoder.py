"""One small decoder in four forms, each with LoRA in it and without.

The forms are the ways a Flax model is commonly written: layers in a Python loop,
layers under `nn.scan`, the same with `nn.remat`, and NNX.  Of each there is the plain
model and its **twin**: the same model with LoRA written into it by hand, on the same
weights and the same factors.  The twin is what `jpeft.adapt` is measured against.

    y = x W + (s (x A)) B       A (in, rank)   B (rank, out)   s = alpha / rank
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx, traverse_util

import jpeft

PyTree = Any
# (width of the output, name) -> the linear layer of that name
MakeLinear = Callable[[int, str], Callable[[jax.Array], jax.Array]]
FORMS = ("unrolled", "scan", "scan + remat", "nnx")
ADAPTED = r"(.*/)?(q|k|v|o|up|down)/kernel"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the decoder, its batch, and the LoRA beside it."""

    layers: int = 6
    width: int = 256
    hidden: int = 1024
    heads: int = 8
    vocab: int = 1024
    batch: int = 4
    tokens: int = 128
    rank: int = 8
    alpha: float = 16.0

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


# No activation has the shape of a weight, so that a saved copy of a weight shows.
SMALL = Sizes(
    layers=3,
    width=32,
    hidden=128,
    heads=4,
    vocab=48,
    batch=2,
    tokens=6,
    rank=4,
    alpha=8,
)


class Variant(NamedTuple):
    """A way to fine-tune: its loss is differentiated by the first argument only."""

    loss: Callable[[PyTree, PyTree, jax.Array], jax.Array]
    trainable: PyTree
    frozen: PyTree


class Decoder(NamedTuple):
    """One form of the model, with everything the ways to fine-tune it start from.

    apply: (base, tokens) -> logits, the plain model as a function of its tree.
    model: the plain module itself, for libraries that rewrite modules.
    adapted: the base with `jpeft.lora` on the layers' linear kernels, B random.
    twin: LoRA written into the model, on the same arrays.
    """

    form: str
    sizes: Sizes
    apply: Callable[[PyTree, jax.Array], jax.Array]
    model: Any
    base: PyTree
    adapted: PyTree
    twin: Variant
    tokens: jax.Array

    def factors(self) -> dict[str, tuple[jax.Array, jax.Array]]:
        """Path of a kernel -> its A and B."""
        return factors(self.adapted)


def decoder(form: str, sizes: Sizes) -> Decoder:
    """The decoder in one of `FORMS`, weights and factors drawn from fixed seeds."""
    if form not in FORMS:
        raise ValueError(f"form={form!r}: expected one of {FORMS}")
    shape = sizes.batch, sizes.tokens + 1
    tokens = jax.random.randint(jax.random.key(1), shape, 0, sizes.vocab)
    return (_nnx if form == "nnx" else _linen)(form, sizes, tokens)


# --- the ways to fine-tune -----------------------------------------------------------


def next_token_loss(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return losses.mean()


def with_jpeft(model: Decoder) -> Variant:
    """The plain model through `jpeft.adapt`: what is measured."""
    apply = jpeft.adapt(model.apply)

    def loss(trainable: PyTree, frozen: PyTree, tokens: jax.Array) -> jax.Array:
        params = jpeft.combine(trainable, frozen)
        return next_token_loss(apply(params, tokens[:, :-1]), tokens)

    return Variant(loss, *jpeft.partition(model.adapted))


def quantized(model: Decoder) -> Variant:
    """QLoRA: the same factors over kernels in NF4 with double quantisation.

    XLA counts the body of a loop once, and a product with a quantised weight is a loop:
    its FLOPs are not to be compared.  Its loss is that of the rounded weights.
    """
    ids = model.tokens[:, :-1]
    uses = jpeft.find_uses(model.apply, model.base, ids)
    base = jpeft.quantize("nf4", where=ADAPTED)(
        jax.random.key(0), model.base, uses=uses
    )

    def over(leaf: Any, quantised: Any) -> Any:
        return leaf.replace(base=quantised) if is_adapted(leaf) else leaf

    params = jax.tree.map(over, model.adapted, base, is_leaf=is_adapted)
    return with_jpeft(model._replace(adapted=params))


def merged_in_forward(model: Decoder) -> Variant:
    """The short cut: W + s A B is formed in every forward pass."""

    def loss(factors: PyTree, base: PyTree, tokens: jax.Array) -> jax.Array:
        def merged(path: Any, w: jax.Array) -> jax.Array:
            if name_of(path) not in factors:
                return w
            a, b = factors[name_of(path)]
            return w + model.sizes.scale * (a @ b)

        params = jax.tree_util.tree_map_with_path(merged, base)
        return next_token_loss(model.apply(params, tokens[:, :-1]), tokens)

    return Variant(loss, model.factors(), model.base)


def full_fine_tuning(model: Decoder) -> Variant:
    """No adapter: every weight trains."""

    def loss(params: PyTree, _: PyTree, tokens: jax.Array) -> jax.Array:
        return next_token_loss(model.apply(params, tokens[:, :-1]), tokens)

    return Variant(loss, model.base, {})


def training_step(loss: Callable[..., jax.Array]) -> Callable[..., Any]:
    """(trainable, state, frozen, tokens) -> (trainable, state, loss), with AdamW.

    The caller jits it, donating the first two.
    """
    optimizer = adamw()

    def step(trainable: PyTree, state: PyTree, frozen: PyTree, tokens: jax.Array):
        value, gradients = jax.value_and_grad(loss)(trainable, frozen, tokens)
        updates, state = optimizer.update(gradients, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    return step


def adamw() -> optax.GradientTransformation:
    return optax.adamw(1e-3)


# --- trees ---------------------------------------------------------------------------


def is_adapted(x: Any) -> bool:
    return isinstance(x, jpeft.AdaptedLeaf)


def name_of(path: Any) -> str:
    """`layers/0/q/kernel`: without the `.value` of an NNX variable."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return name.removesuffix("/value").removesuffix("/raw_value")


def factors(adapted: PyTree) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Path of a kernel -> its A and B, out of their boxes."""
    flat, _ = jax.tree_util.tree_flatten_with_path(adapted, is_leaf=is_adapted)
    array = lambda box: jax.tree.leaves(box)[0]
    return {name_of(p): (array(x.a), array(x.b)) for p, x in flat if is_adapted(x)}


def attached(apply: Callable[..., Any], base: PyTree, ids: jax.Array, sizes: Sizes):
    """The base with LoRA on its linear kernels.

    B is not zero as it would be at the start of training: with B = 0 the gradient of A
    is zero, and a mistake in it would not show.
    """
    uses = jpeft.find_uses(apply, base, ids)
    lora = jpeft.lora(rank=sizes.rank, alpha=sizes.alpha, where=ADAPTED)
    params = lora(jax.random.key(2), base, uses=uses)
    rng = np.random.default_rng(3)

    def start(x: Any) -> Any:
        if not is_adapted(x):
            return x
        draw = lambda b: jnp.asarray(0.02 * rng.standard_normal(b.shape), b.dtype)
        return x.replace(b=jax.tree.map(draw, x.b))

    return jax.tree.map(start, params, is_leaf=is_adapted)


# --- the model -----------------------------------------------------------------------


def attention(q: jax.Array, k: jax.Array, v: jax.Array, heads: int) -> jax.Array:
    """Causal attention of several heads.  (batch, tokens, width), all three."""
    split = lambda x: x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)
    q, k, v = split(q), split(k), split(v)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    causal = jnp.tril(jnp.ones((1, 1, q.shape[1], k.shape[1]), bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -1e9))
    out = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
    return out.reshape(*out.shape[:-2], -1)


def layer(
    x: jax.Array,
    linear: MakeLinear,
    norm: Callable[[str], Callable[[jax.Array], jax.Array]],
    sizes: Sizes,
) -> jax.Array:
    """One layer of the decoder, in terms of its parts."""
    d = sizes.width
    h = norm("norm_1")(x)
    h = attention(*(linear(d, n)(h) for n in ("q", "k", "v")), sizes.heads)
    x = x + linear(d, "o")(h)
    h = jax.nn.silu(linear(sizes.hidden, "up")(norm("norm_2")(x)))
    return x + linear(d, "down")(h)


def low_rank(
    x: jax.Array, a: jax.Array, b: jax.Array, scale: float, dtype: Any
) -> jax.Array:
    """The delta by hand.  The scale goes where it is cheapest: on the rank's values."""
    h = (x @ a.astype(x.dtype)) * jnp.asarray(scale, x.dtype)
    return (h @ b.astype(x.dtype)).astype(dtype)


# --- Linen ---------------------------------------------------------------------------


class LoRADense(nn.Module):
    """The twin of `nn.Dense`: its kernel in `params`, its factors in `lora`."""

    features: int
    sizes: Sizes

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = x.shape[-1], self.features
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        rank = self.sizes.rank
        a = self.variable("lora", "a", jnp.zeros, (shape[0], rank)).value
        b = self.variable("lora", "b", jnp.zeros, (rank, shape[1])).value
        y = x @ kernel
        return y + low_rank(x, a, b, self.sizes.scale, y.dtype)


class LinenLayer(nn.Module):
    sizes: Sizes
    twin: bool

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        def linear(features: int, name: str) -> nn.Module:
            if self.twin:
                return LoRADense(features, self.sizes, name=name)
            return nn.Dense(features, use_bias=False, name=name)

        return layer(x, linear, lambda name: nn.RMSNorm(name=name), self.sizes), None


class LinenDecoder(nn.Module):
    sizes: Sizes
    form: str
    twin: bool = False

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        s = self.sizes
        x = nn.Embed(s.vocab, s.width, name="embed")(ids)
        if self.form == "unrolled":
            for k in range(s.layers):
                x, _ = LinenLayer(s, self.twin, name=f"layers_{k}")(x)
        else:
            remat = self.form == "scan + remat"
            body = nn.remat(LinenLayer, prevent_cse=False) if remat else LinenLayer
            stack = nn.scan(
                body,
                variable_axes={"params": 0, "lora": 0},
                split_rngs={"params": True},
                length=s.layers,
                in_axes=nn.broadcast,
            )
            x, _ = stack(s, self.twin, name="layers")(x, None)
        x = nn.RMSNorm(name="norm")(x)
        return nn.Dense(s.vocab, use_bias=False, name="head")(x)


def _linen(form: str, sizes: Sizes, tokens: jax.Array) -> Decoder:
    model, ids = LinenDecoder(sizes, form), tokens[:, :-1]
    base = jax.jit(model.init)(jax.random.key(0), ids)["params"]
    apply = lambda params, ids: model.apply({"params": params}, ids)
    adapted = attached(apply, base, ids, sizes)
    twin = LinenDecoder(sizes, form, twin=True)
    flat = {}
    for path, (a, b) in factors(adapted).items():
        *module, _ = path.split("/")
        flat[(*module, "a")], flat[(*module, "b")] = a, b

    def loss(lora: PyTree, params: PyTree, tokens: jax.Array) -> jax.Array:
        logits = twin.apply({"params": params, "lora": lora}, tokens[:, :-1])
        return next_token_loss(logits, tokens)

    by_hand = Variant(loss, traverse_util.unflatten_dict(flat), base)
    return Decoder(form, sizes, apply, model, base, adapted, by_hand, tokens)


# --- NNX -----------------------------------------------------------------------------


class Factor(nnx.Variable):
    """A or B of the twin, so that they can be split from the base."""


class LoRALinear(nnx.Module):
    """The twin of `nnx.Linear`."""

    def __init__(self, n_in: int, n_out: int, sizes: Sizes, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(init(rngs.params(), (n_in, n_out)))
        self.a = Factor(jnp.zeros((n_in, sizes.rank)))
        self.b = Factor(jnp.zeros((sizes.rank, n_out)))
        self.scale = sizes.scale

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x @ self.kernel[...]
        return y + low_rank(x, self.a[...], self.b[...], self.scale, y.dtype)


class NnxLayer(nnx.Module):
    def __init__(self, sizes: Sizes, twin: bool, rngs: nnx.Rngs):
        d, f = sizes.width, sizes.hidden
        shapes = {"up": (d, f), "down": (f, d)}
        for name in ("q", "k", "v", "o", "up", "down"):
            n_in, n_out = shapes.get(name, (d, d))
            linear = (
                LoRALinear(n_in, n_out, sizes, rngs)
                if twin
                else nnx.Linear(n_in, n_out, use_bias=False, rngs=rngs)
            )
            setattr(self, name, linear)
        self.norm_1 = nnx.RMSNorm(d, rngs=rngs)
        self.norm_2 = nnx.RMSNorm(d, rngs=rngs)
        self.sizes = sizes

    def __call__(self, x: jax.Array) -> jax.Array:
        part = lambda name: getattr(self, name)
        return layer(x, lambda _, name: part(name), part, self.sizes)


class NnxDecoder(nnx.Module):
    def __init__(self, sizes: Sizes, rngs: nnx.Rngs, twin: bool = False):
        self.embed = nnx.Embed(sizes.vocab, sizes.width, rngs=rngs)
        self.layers = nnx.List(
            [NnxLayer(sizes, twin, rngs) for _ in range(sizes.layers)]
        )
        self.norm = nnx.RMSNorm(sizes.width, rngs=rngs)
        self.head = nnx.Linear(sizes.width, sizes.vocab, use_bias=False, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.embed(ids)
        for one in self.layers:
            x = one(x)
        return self.head(self.norm(x))


def _nnx(form: str, sizes: Sizes, tokens: jax.Array) -> Decoder:
    model, ids = NnxDecoder(sizes, nnx.Rngs(0)), tokens[:, :-1]
    graph, base = nnx.split(model)
    apply = lambda state, ids: nnx.merge(graph, state)(ids)
    adapted = attached(apply, base, ids, sizes)
    twin = NnxDecoder(sizes, nnx.Rngs(0), twin=True)
    for path, (a, b) in factors(adapted).items():
        _, k, name, _ = path.split("/")
        linear = getattr(twin.layers[int(k)], name)
        linear.a[...], linear.b[...] = a, b
    nnx.update(twin, base)
    twin_graph, lora, frozen = nnx.split(twin, Factor, nnx.Param)

    def loss(lora: PyTree, state: PyTree, tokens: jax.Array) -> jax.Array:
        logits = nnx.merge(twin_graph, lora, state)(tokens[:, :-1])
        return next_token_loss(logits, tokens)

    by_hand = Variant(loss, lora, frozen)
    return Decoder(form, sizes, apply, model, base, adapted, by_hand, tokens)


# --- twelve equal layers, each a call of one inner jit -------------------------------


def jitted_layers(sizes: Sizes, twin: bool) -> Callable[..., jax.Array]:
    """(list of trees of kernels, x) -> x, each through the one `jax.jit`ted layer.

    With `twin`, each kernel is a triple (W, A, B).
    """

    @jax.jit
    def one_layer(params: dict[str, Any], x: jax.Array) -> jax.Array:
        def linear(_: int, name: str) -> Callable[[jax.Array], jax.Array]:
            if not twin:
                return lambda x: x @ params[name]["kernel"]
            w, a, b = params[name]["kernel"]
            return lambda x: x @ w + low_rank(x, a, b, sizes.scale, x.dtype)

        return layer(x, linear, lambda _: lambda x: x, sizes)

    def apply(layers: list[dict[str, Any]], x: jax.Array) -> jax.Array:
        for params in layers:
            x = one_layer(params, x)
        return x

    return apply


def layer_kernels(sizes: Sizes, count: int) -> Iterator[dict[str, Any]]:
    """Weights for `jitted_layers`."""
    d, f = sizes.width, sizes.hidden
    shapes = {n: (d, d) for n in ("q", "k", "v", "o")} | {"up": (d, f), "down": (f, d)}
    rng = np.random.default_rng(4)
    draw = lambda shape: rng.standard_normal(shape, np.float32) / math.sqrt(shape[0])
    for _ in range(count):
        yield {n: {"kernel": jnp.asarray(draw(shape))} for n, shape in shapes.items()}
