"""P-tuning: a prompt that an encoder makes.  Liu et al. 2021, arXiv:2103.10385.

    P = MLP(BiLSTM(e))    e (length, features), trained like the encoder
    BiLSTM   two layers, `hidden` wide in each direction: (length, features) -> 2 hidden
    MLP      relu(h W_1 + b_1) W_2 + b_2:  2 hidden -> 2 hidden -> features

The encoder ties the virtual tokens to each other while they train; then
`jpeft.finalize(params)` keeps P alone.  They may stand anywhere in the text, with words
between them: `jpeft.virtual_template(3, [it, was], ..., 2, vocab_size=V)`.

    encoder="mlp"    relu(relu(e W_1 + b_1) W_2 + b_2) W_3 + b_3, token by token, which
                     is what the popular implementation does unless told otherwise

Where we depart from the paper's code: an LSTM gate has one bias, not two that are only
ever added.  P is made once a call, however often the model looks up its ids.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Any, Self

import jax
import jax.numpy as jnp

from jpeft.boxes import unbox
from jpeft.checks import Count, one_of
from jpeft.leaf import (
    AdaptedLeaf,
    adapted_leaf,
    array_fields,
    static,
    trainable,
)
from jpeft.leaves.draw import drawn
from jpeft.leaves.embedding import Prompt
from jpeft.leaves.networks import linear, lstm
from jpeft.methods.prompt import VirtualMethod
from jpeft.transform import method
from jpeft.tree.layout import LeafUse

LSTM, MLP = ENCODERS = ("lstm", "mlp")


# --- the leaves ----------------------------------------------------------------------


@adapted_leaf
class EncodedPrompt(AdaptedLeaf):
    """A prompt with its encoder.

    axes: of the table, as in `jpeft.tree.layout`.  start: e, (length, features).
    w1, b1, w2, b2: the MLP's layers, (in, out) and (out,).
    """

    axes: str = static()
    vocab: int = static()
    one_hot: bool = static(default=False)
    start: Any = trainable()
    w1: Any = trainable()
    b1: Any = trainable()
    w2: Any = trainable()
    b2: Any = trainable()
    # Without the last layer's arrays P is zero: a kind declares them off=0.

    @property
    def tokens(self) -> int:
        return unbox(self.start).shape[0]

    def encoded(self) -> jax.Array:
        """P, (length, features)."""
        raise NotImplementedError

    def finalize(self) -> AdaptedLeaf:
        features = [n for n, c in zip(self.shape, self.axes, strict=True) if c == "o"]
        return Prompt(
            base=self.base,
            axes=self.axes,
            vocab=self.vocab,
            tokens=self.tokens,
            one_hot=self.one_hot,
            prompt=self.encoded().reshape(self.tokens, *features),
            origin=self.origin,
            path=self.path,
        )

    def grown(self, axis: int) -> Self | None:
        """Virtual ids begin behind the new rows."""
        is_rows = self.axes[axis] == "i"
        return self.replace(vocab=self.shape[axis]) if is_rows else None


@adapted_leaf
class LstmPrompt(EncodedPrompt):
    """A prompt with the paper's encoder.

    first (2, features, 4 hidden), second (2, 2 hidden, 4 hidden): what enters the two
        layers of the LSTM, for each direction, gates in the order i, f, g, o.
    recurrent (2, 2, hidden, 4 hidden), gates (2, 2, 4 hidden): layer, direction.
    """

    w2: Any = trainable(off=0)
    b2: Any = trainable(off=0)
    first: Any = trainable()
    second: Any = trainable()
    recurrent: Any = trainable()
    gates: Any = trainable()

    def encoded(self) -> jax.Array:
        h = lstm(self.start, self.first, self.recurrent[0], self.gates[0])
        h = lstm(h, self.second, self.recurrent[1], self.gates[1])
        return linear(jax.nn.relu(linear(h, self.w1, self.b1)), self.w2, self.b2)


@adapted_leaf
class MlpPrompt(EncodedPrompt):
    """A prompt with an MLP of three layers.  w3, b3: the third."""

    w3: Any = trainable(off=0)
    b3: Any = trainable(off=0)

    def encoded(self) -> jax.Array:
        h = jax.nn.relu(linear(self.start, self.w1, self.b1))
        h = jax.nn.relu(linear(h, self.w2, self.b2))
        return linear(h, self.w3, self.b3)


# --- the method ----------------------------------------------------------------------


@method("p_tuning")
@dataclasses.dataclass(frozen=True)
class PTuning(VirtualMethod):
    """A transform that gives virtual tokens vectors made by a trained encoder.

    Liu et al. 2021, arXiv:2103.10385.  The texts need the virtual tokens:
    `jpeft.prepend_virtual_tokens`, or `jpeft.virtual_template` for a pattern with words
    between them.

    length: virtual tokens of one text, all of them together.
    encoder: "lstm" (the paper's) or "mlp".
    hidden: width of the encoder, of each direction of an LSTM; None means half the
        features for "lstm", as in the paper's code, and all of them for "mlp".
    where, exclude, one_hot, dtype: as for `jpeft.prompt`.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = {"embed": {"embedding": jnp.ones((11, 6))}}
    >>> params = jpeft.p_tuning(4)(jax.random.key(0), params)
    >>> jpeft.count(params).trainable
    588
    >>> jpeft.count(jpeft.finalize(params)).trainable
    24
    """

    length: Count
    _: dataclasses.KW_ONLY
    encoder: Annotated[str, one_of(ENCODERS)] = LSTM
    hidden: Count | None = None

    def virtual_tokens(self) -> int:
        return self.length

    def attach(
        self, key: jax.Array, path: str, base: Any, use: LeafUse
    ) -> EncodedPrompt:
        vocab = self.vocab_of(path, base, use, self.length)
        d = math.prod(use.sizes("o"))
        dtype = self.adapter_dtype(base)
        k_start, key = jax.random.split(key)
        common: dict[str, Any] = {
            "base": base,
            "axes": use.axes,
            "vocab": vocab,
            "one_hot": self.one_hot,
            "start": drawn(_normal, k_start, (self.length, d)),
        }
        if self.encoder == LSTM:
            h = self.hidden or max(1, d // 2)
            kind: type[EncodedPrompt] = LstmPrompt
            # (shape, how many values enter one of the results)
            sizes = {
                "first": ((2, d, 4 * h), h),
                "second": ((2, 2 * h, 4 * h), h),
                "recurrent": ((2, 2, h, 4 * h), h),
                "gates": ((2, 2, 4 * h), h),
                **_layers([2 * h, 2 * h, d]),
            }
        else:
            h, kind = self.hidden or d, MlpPrompt
            sizes = _layers([d, h, h, d])
        keys = jax.random.split(key, len(sizes))
        layers: dict[str, Any] = {
            n: _uniform(k, shape, fan_in)
            for k, (n, (shape, fan_in)) in zip(keys, sizes.items(), strict=True)
        }
        leaf = kind(**common, **layers)
        return leaf.replace(
            **{n: x.astype(dtype) for n, x in array_fields(leaf).items()}
        )


p_tuning = PTuning


# --- first values --------------------------------------------------------------------


def _layers(widths: list[int]) -> dict[str, tuple[tuple[int, ...], int]]:
    """Shapes of linear layers, and how many values enter each."""
    found: dict[str, tuple[tuple[int, ...], int]] = {}
    for k, (n, m) in enumerate(zip(widths, widths[1:], strict=False)):
        found[f"w{k + 1}"], found[f"b{k + 1}"] = ((n, m), n), ((m,), n)
    return found


def _normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(key, shape, jnp.float32)


def _uniform(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    """The start of the published encoders, uniform with variance 1 / (3 fan_in)."""
    limit = 1.0 / math.sqrt(fan_in)
    draw = lambda k, s: jax.random.uniform(k, s, jnp.float32, -limit, limit)
    return drawn(draw, key, shape)
