"""The supervised loss of hidden states and a head, without the logits of all tokens.

    logits = soft_cap tanh((hidden @ head + bias) / soft_cap)       loss as in `tokens`

A loop over chunks of tokens makes a chunk's logits, its loss and, since the loss is a
plain sum, the gradient for the chunk's hidden states at once; the backward pass only
multiplies that by the cotangent.  So the head is read twice a chunk, forward and back,
as often as by the plain loss: nothing is computed again, and nothing of the size
(tokens, vocabulary) exists.  (A chunk under `jax.checkpoint` costs a third product.)

Only the tokens that count are visited: their positions are moved to the front, and the
number of steps is known when the program runs, ceil(count / chunk).

Arrays of the head that nobody differentiates (a frozen head, a quantised one, the base
under LoRA) get no gradient, and none is computed: JAX says which those are.

The idea of gradients in the forward pass: Hsu et al. 2024 (Liger Kernel),
arXiv:2410.10989; of skipping: Wijmans et al. 2024 (Cut Your Losses), arXiv:2411.09009.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import NamedSharding, PartitionSpec

from jpeft import compat
from jpeft.adapt.entry import adapt
from jpeft.boxes import unbox
from jpeft.checks import check_count, check_flag, check_positive
from jpeft.leaf import is_leaf, wide_dtype
from jpeft.objectives._arrays import (
    check_shape,
    held,
    integers,
    weights,
)
from jpeft.objectives.tokens import TokenLoss, token_loss, token_losses
from jpeft.objectives.weighted import Weighted

NAME = "linear_cross_entropy"


def linear_cross_entropy(
    hidden: Any,
    head: Any,
    labels: Any,
    mask: Any,
    *,
    tied: bool = False,
    bias: Any = None,
    chunk: int = 512,
    shards: int = 1,
    skip: bool = True,
    kind: str = "nll",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    temperature: float = 1.0,
) -> Weighted:
    """`next_token_loss(hidden @ head + bias, labels, mask)`, chunk by chunk.

    hidden: (*batch, features), floating.  Products are made in its dtype, as by a Flax
        layer of that dtype, and summed in float32; all else is float32.
    head: (features, vocabulary): an array, or an adapted leaf (LoRA, NF4, both).
    labels, mask: (*batch,), as for `next_token_loss`.
    tied: True for a head that is the embedding table, (vocabulary, features).
    bias: None or (vocabulary,).
    chunk: tokens in a step.  A step's logits take chunk * vocabulary * 4 bytes, and
        about as much again their gradient.
    shards: in how many parts the first axis of `hidden` is cut over devices under
        `jit`.  Each part then skips and chunks for itself, `chunk` tokens in each, and
        no token changes devices.  Inside `shard_map` it is 1.
    skip: False visits masked tokens too, for the same result.
    kind, label_smoothing, z_loss, temperature: see `next_token_loss`.
    soft_cap: Gemma's, of the logits before the temperature; None is none.

    Gradients: for hidden, and for those arrays of head and bias that are differentiated
    (each chunk's in the array's dtype, their sum in float32).  None for `mask`, which
    counts as a constant.  A second derivative needs skip=False: JAX refuses one of a
    loop of unknown length.  No dropout acts in the head.  Masked tokens may hold NaN.

    Call it outside of `jpeft.adapt`, with the leaf itself: inside, the rule that makes
    the gradients would receive a weight that is none, and `adapt` refuses.

    >>> import jax, numpy as np
    >>> from jpeft.objectives import linear_cross_entropy
    >>> hidden, head = np.ones((2, 3), np.float32), np.zeros((3, 7), np.float32)
    >>> loss = jax.jit(linear_cross_entropy)(hidden, head, np.arange(2), np.ones(2))
    >>> int(loss.count), f"{loss.mean():.3f}"  # log 7
    (2, '1.946')
    """
    head, bias = unbox(head), unbox(bias)
    hidden, labels, weight = _checked(hidden, head, bias, labels, mask, tied)
    shards = check_count(NAME, "shards", shards)
    if shards > 1 and (hidden.ndim < 2 or hidden.shape[0] % shards):
        raise ValueError(
            f"{NAME}: shards={shards}: expected a divisor of the first axis of hidden, "
            f"whose shape is {hidden.shape}"
        )
    features, tokens = hidden.shape[-1], labels.size // shards
    loss = token_loss(NAME, kind, label_smoothing, z_loss, temperature)
    cap = None if soft_cap is None else check_positive(NAME, "soft_cap", soft_cap)
    arrays, treedef = jax.tree.flatten((head, bias))
    how = _How(
        treedef=treedef,
        tied=tied,
        chunk=min(check_count(NAME, "chunk", chunk), max(tokens, 1)),
        skip=check_flag(NAME, "skip", skip),
        loss=loss,
        soft_cap=cap,
    )
    # Before the gradient rule, so that it is JAX that adds up over shards.
    hidden, labels, weight, arrays = compat.varying_alike(
        (hidden, labels, weight, arrays)
    )

    def whole(
        hidden: jax.Array, arrays: list[Any], labels: jax.Array, weight: jax.Array
    ) -> Any:
        return _total(
            how,
            hidden.reshape(shards, tokens, features),
            arrays,
            labels.reshape(shards, tokens),
            weight.reshape(shards, tokens),
        )

    # Where shardings are part of types, what a loop does with a shard has none that JAX
    # could tell.
    run: Any = whole
    places = map(compat.typed_sharding, (hidden, labels, weight, *arrays))
    place = next((x for x in places if x is not None), None)
    if place is not None:
        everywhere = NamedSharding(place.mesh, PartitionSpec())
        run = jax.sharding.auto_axes(whole, out_sharding=everywhere)
    return Weighted(run(hidden, arrays, labels, weight), jnp.sum(weight))


def _checked(
    hidden: Any, head: Any, bias: Any, labels: Any, mask: Any, tied: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    hidden = jnp.asarray(hidden)
    if not jnp.issubdtype(hidden.dtype, jnp.floating) or hidden.ndim < 1:
        raise ValueError(
            f"{NAME}: hidden is {hidden.dtype} {hidden.shape}: expected floating-point "
            "(..., features)"
        )
    names = ("vocabulary", "features") if tied else ("features", "vocabulary")
    shape, features = tuple(head.shape), hidden.shape[-1]
    check_flag(NAME, "tied", tied)
    if len(shape) != 2 or shape[names.index("features")] != features:
        other = len(shape) == 2 and shape[names.index("vocabulary")] == features
        raise ValueError(
            f"{NAME}: head has shape {shape}: expected ({', '.join(names)}) with "
            f"{features} features, as hidden has"
            + (f"; for this one tied={not tied}" if other else "")
        )
    vocabulary = shape[names.index("vocabulary")]
    if bias is not None:
        check_shape(NAME, "bias", bias, (vocabulary,), "one for each word")
    labels = integers(NAME, "labels", labels)
    check_shape(NAME, "labels", labels, hidden.shape[:-1], "of hidden but the last")
    like = jax.ShapeDtypeStruct(labels.shape, wide_dtype(hidden.dtype))
    weight = weights(NAME, mask, like)  # type: ignore[arg-type]
    return hidden, held(labels, weight), weight


class _How(NamedTuple):
    """What is fixed when the program is made.  treedef: of (head, bias)."""

    treedef: Any
    tied: bool
    chunk: int
    skip: bool
    loss: TokenLoss
    soft_cap: float | None


# --- one chunk -----------------------------------------------------------------------


def _logits(how: _How, hidden: jax.Array, arrays: list[Any]) -> jax.Array:
    """hidden: (tokens, features) -> (tokens, vocabulary), float32 or more."""
    head, bias = jax.tree.unflatten(how.treedef, arrays)
    dtype = wide_dtype(hidden.dtype)
    contracted = ((1,), (1 if how.tied else 0,))

    def product(head: Any, bias: Any, hidden: jax.Array) -> jax.Array:
        if head.dtype != hidden.dtype:
            head = head.astype(hidden.dtype)
        y = lax.dot_general(
            hidden, head, (contracted, ((), ())), preferred_element_type=dtype
        )
        return y if bias is None else y + bias.astype(dtype)[None, :]

    if is_leaf(head) or is_leaf(bias):
        product = adapt(product)
    y = product(head, bias, hidden)
    return y if how.soft_cap is None else how.soft_cap * jnp.tanh(y / how.soft_cap)


def _chunk_total(
    how: _How,
    hidden: jax.Array,
    moving: list[Any],
    fixed: list[Any],
    labels: jax.Array,
    weight: jax.Array,
) -> jax.Array:
    """The chunk's sum.  moving, fixed: the head's arrays, None for those of the other
    list."""
    arrays = [f if m is None else m for m, f in zip(moving, fixed, strict=True)]
    losses = token_losses(_logits(how, hidden, arrays), labels, how.loss)
    return jnp.sum(held(losses, weight) * weight)


# --- the loop ------------------------------------------------------------------------


class _Sums(NamedTuple):
    """What the loop carries.  total: (shards,).  hidden: (shards, tokens, features) or
    None.  moving: of each array that is differentiated (shards, *shape), else None."""

    total: jax.Array
    hidden: jax.Array | None
    moving: list[Any]


def _loop(
    how: _How,
    hidden: jax.Array,
    arrays: list[Any],
    labels: jax.Array,
    weight: jax.Array,
    of_hidden: bool = False,
    of_arrays: tuple[bool, ...] = (),
) -> _Sums:
    """The sum, and its gradients for what is said to be differentiated."""
    shards, tokens, features = hidden.shape
    of_arrays = of_arrays or (False,) * len(arrays)
    moving = [x if m else None for x, m in zip(arrays, of_arrays, strict=True)]
    fixed = [None if m else x for x, m in zip(arrays, of_arrays, strict=True)]
    steps = -(-tokens // how.chunk)
    visits, needed = _visits(how, weight, steps)
    sums = wide_dtype(hidden.dtype)

    def one(hidden: jax.Array, labels: jax.Array, weight: jax.Array) -> Any:
        """A chunk of one shard: its sum and the gradients that are asked for."""
        # Rows that do not count, masked or beyond the last, reach nothing.
        hidden = held(hidden, weight[:, None])
        total = lambda h, m: _chunk_total(how, h, m, fixed, labels, weight)
        if of_hidden:
            value, pull = jax.vjp(total, hidden, moving)
            return value, *pull(jnp.ones_like(value))
        if any(of_arrays):
            value, pull = jax.vjp(lambda m: total(hidden, m), moving)
            return value, None, *pull(jnp.ones_like(value))
        return total(hidden, moving), None, moving

    def step(k: Any, carry: _Sums) -> _Sums:
        rows = lax.dynamic_slice_in_dim(visits, k * how.chunk, how.chunk, axis=1)
        chunk = [jax.vmap(_rows)(x, rows) for x in (hidden, labels, weight)]
        if shards == 1:
            made = jax.tree.map(lambda x: x[None], one(*[x[0] for x in chunk]))
        else:
            made = jax.vmap(one)(*chunk)
        value, d_hidden, d_moving = made
        at_rows = carry.hidden
        if at_rows is not None:
            at_rows = jax.vmap(_put)(at_rows, rows, d_hidden)
        add = lambda s, x: s + x.astype(s.dtype)
        return _Sums(
            carry.total + value,
            at_rows,
            jax.tree.map(add, carry.moving, d_moving),
        )

    init = _Sums(
        jnp.zeros(shards, sums),
        jnp.zeros_like(hidden) if of_hidden else None,
        [
            None if x is None else jnp.zeros((shards, *x.shape), wide_dtype(x.dtype))
            for x in moving
        ],
    )
    _, init = compat.varying_alike((hidden, init))
    if not tokens:
        return init
    return lax.fori_loop(0, needed, step, init)


def _visits(how: _How, weight: jax.Array, steps: int) -> tuple[jax.Array, Any]:
    """(shards, steps * chunk) positions in the order of the visit, those that count
    first, `tokens` where there is none; and the steps that are needed."""
    shards, tokens = weight.shape
    length = steps * how.chunk
    if not how.skip:
        each = jnp.minimum(jnp.arange(length), tokens)
        return jnp.broadcast_to(each[None], (shards, length)), steps
    counts = weight != 0
    where = lambda c: jnp.nonzero(c, size=length, fill_value=tokens)[0]
    most = jnp.max(jnp.sum(counts, axis=1, dtype=jnp.int32))
    return jax.vmap(where)(counts), (most + how.chunk - 1) // how.chunk


def _rows(x: jax.Array, rows: jax.Array) -> jax.Array:
    return x.at[rows].get(mode="fill", fill_value=0)


def _put(x: jax.Array, rows: jax.Array, values: jax.Array) -> jax.Array:
    return x.at[rows].set(values, mode="drop")


# --- the gradient rule ---------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total(
    how: _How,
    hidden: jax.Array,
    arrays: list[Any],
    labels: jax.Array,
    weight: jax.Array,
) -> jax.Array:
    return jnp.sum(_loop(how, hidden, arrays, labels, weight).total)


def _forward(how: _How, hidden: Any, arrays: Any, labels: Any, weight: Any) -> Any:
    plain = [x.value for x in (hidden, labels, weight)]
    differentiated = tuple(x.perturbed for x in arrays)
    sums = _loop(
        how,
        plain[0],
        [x.value for x in arrays],
        plain[1],
        plain[2],
        of_hidden=hidden.perturbed,
        of_arrays=differentiated,
    )
    over_shards = lambda s, x: jnp.sum(s, axis=0) if x.perturbed else None
    moving = [over_shards(s, x) for s, x in zip(sums.moving, arrays, strict=True)]
    # The dtypes of the arrays, which is what their gradients are rounded to.
    like = [np.zeros(0, x.value.dtype) if x.perturbed else None for x in arrays]
    return jnp.sum(sums.total), (sums.hidden, moving, like)


def _backward(how: _How, kept: Any, cotangent: Any) -> Any:
    d_hidden, moving, like = kept
    if isinstance(cotangent, SymbolicZero):
        return None, [None] * len(moving), None, None
    scaled = lambda x, dtype: (cotangent.astype(x.dtype) * x).astype(dtype)
    d_arrays = [
        None if x is None else scaled(x, y.dtype)
        for x, y in zip(moving, like, strict=True)
    ]
    if d_hidden is not None:
        # The product in float32: a cotangent of 1 / count is none of bfloat16's.
        x = d_hidden.astype(cotangent.dtype)
        d_hidden = scaled(x, d_hidden.dtype)
    return d_hidden, d_arrays, None, None


_total.defvjp(_forward, _backward, symbolic_zeros=True)
