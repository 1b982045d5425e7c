"""Code books: what a 4- or 8-bit code stands for, as parts of a block's scale.

    nf4       the 4-bit NormalFloat: quantiles of N(0, 1).  Dettmers et al. 2023,
              arXiv:2305.14314, appendix E; bitsandbytes' sixteen float32 values
    fp4       sign and 3 bits, {0, 1/16, 2, 3, 4, 6, 8, 12} / 12, in bitsandbytes' order
    int4      -7..7 over 7; code 8 is zero, code 0 is not made
    q4_0      -8..7, parts of a step of the block: GGUF's (llama.cpp)
    dynamic8  the signed dynamic map.  Dettmers 2015, arXiv:1511.04561; 7 exponents with
              a fraction that gets longer as they grow

Nearest value.  With sorted values v and midpoints m = (v[1:] + v[:-1]) / 2 in float32,
the place of x is the number of m with x > m: a tie goes to the lower value (in int4,
which is rounded, to the even code).  That is bitsandbytes' rule on a CPU, code for
code.  On CUDA its fp4 looks at |x| and puts the sign into bit 3, so it names the two
zeros (codes 0 and 8) the other way round.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, Num, UInt8

# fmt: off
NF4 = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
], np.float32)
_FP4_POSITIVE = np.array([
    0.0, 0.0052083334885537624, 0.6666666865348816, 1.0,
    0.3333333432674408, 0.5, 0.1666666716337204, 0.25,
], np.float32)
# fmt: on
FP4 = np.concatenate([_FP4_POSITIVE, -_FP4_POSITIVE])
INT4 = ((np.arange(16) - 8) / np.float32(7)).astype(np.float32)
Q4_0 = (np.arange(16) - 8).astype(np.float32)


def midpoints(values: np.ndarray) -> np.ndarray:
    """Where the nearest of sorted values changes, in float32."""
    return (values[1:] + values[:-1]) / np.float32(2)


@dataclasses.dataclass(frozen=True, eq=False)
class Book:
    """A fixed 4-bit code book, and how the code of the nearest value is found.

    values: of the sixteen codes, float32.
    even: codes k stand for (k - 8) / even, so that they are rounded, not looked for.
    sign_apart: bit 3 is the sign, and the other bits stand for the magnitude.
    """

    values: np.ndarray
    even: float | None = None
    sign_apart: bool = False

    @functools.cached_property
    def order(self) -> tuple[int, ...]:
        """The codes by rising value; of fp4's two zeros bitsandbytes has code 0
        first."""
        return tuple(np.argsort(self.values, kind="stable").tolist())

    @functools.cached_property
    def thresholds(self) -> np.ndarray:
        """Where the next code of `order` begins, float32 (15,)."""
        return midpoints(self.values[list(self.order)])

    def in_order(self, places: Array, dtype: Any) -> Array:
        """The code at each place of `order`."""
        if self.order == tuple(range(16)):
            return places
        return look_up(places, [jnp.asarray(k, dtype) for k in self.order])


BOOKS = {
    "nf4": Book(NF4),
    "fp4": Book(FP4, sign_apart=True),
    "int4": Book(INT4, even=7.0),
}
CODEBOOKS = {name: book.values for name, book in BOOKS.items()}


def fixed(format: str) -> Book:
    """The fixed 4-bit code book of this name; raises ValueError for others."""
    if format not in BOOKS:
        raise ValueError(f"no fixed 4-bit code book is named {format!r}")
    return BOOKS[format]


@functools.cache
def dynamic_map() -> np.ndarray:
    """The 256 sorted values of dynamic8, from -0.9929687 over 0 to 1."""
    found = [0.0, 1.0]
    for k in range(7):
        bounds = _linspace(0.1, 1.0, 2**k + 1)
        means = (bounds[:-1] + bounds[1:]) / np.float32(2)
        part = (np.float32(10.0 ** (k - 6)) * means).tolist()
        found += part + [-x for x in part]
    return np.sort(np.array(found, np.float32))


def normal_float(offset: float = 0.9677083) -> np.ndarray:
    """NF4 derived: 8 positive quantiles of N(0, 1), 7 negative ones and zero.

    offset: the outermost probability, 1 - (1/32 + 1/30) / 2.  Equal to `NF4` within
    5e-7; the table's last bits come from the inverse normal its authors used.
    """
    quantile = np.vectorize(statistics.NormalDist().inv_cdf)
    positive = quantile(_linspace(offset, 0.5, 9)[:-1].astype(np.float64))
    negative = -quantile(_linspace(offset, 0.5, 8)[:-1].astype(np.float64))
    values = np.sort(np.concatenate([positive, [0.0], negative]).astype(np.float32))
    return values / values.max()


def _linspace(start: float, stop: float, n: int) -> np.ndarray:
    """As PyTorch does it in float32: the first half from the start, the second from the
    end, each with one rounding.  The last bits of both maps depend on it."""
    first, last = np.float32(start), np.float32(stop)
    step = np.float64(np.float32((last - first) / np.float32(n - 1)))
    k = np.arange(n)
    rising, falling = first + step * k, last - step * (n - 1 - k)
    return np.where(k < n // 2, rising, falling).astype(np.float32)


# --- the nearest code ----------------------------------------------------------------


def encode(x: Float[Array, "*shape"], format: str) -> UInt8[Array, "*shape"]:
    """The code of the nearest value, for float32 x in [-1, 1].

    Between two values the lower code wins, in int4 the even one.  Written in compares
    and selects only, for Pallas; NaN gets the last code.
    """
    book = fixed(format)
    if book.even is not None:
        return (jnp.round(x * book.even) + 8.0).astype(jnp.int32).astype(jnp.uint8)
    places = count_above(x, [float(m) for m in book.thresholds])
    return book.in_order(places, jnp.uint8)


def encode_dynamic(x: Float[Array, "*shape"]) -> UInt8[Array, "*shape"]:
    """The code of dynamic8 for float32 x in [-1, 1], as bitsandbytes finds it on a CPU.

    It rounds x to one of 65,536 equal steps first.  On CUDA it takes the nearest value
    of x itself; about one code in a thousand is then its neighbour.
    """
    step = jnp.floor((1.0 + x) * 0.5 * 65535.0 + 0.5)
    rounded = step * np.float32(2 / 65535) - 1.0
    return place(rounded, jnp.asarray(midpoints(dynamic_map())))


def place(
    x: Float[Array, "*shape"], thresholds: Float[Array, " n"]
) -> UInt8[Array, "*shape"]:
    """How many of 2^n - 1 sorted thresholds lie strictly below x, looked up in a table.

    `jnp.searchsorted`, whose steps each write several integers an element, takes 13
    times as long on a CPU and six times the memory of x.  This is one loop over x.
    """
    n = (thresholds.shape[0] + 1).bit_length() - 1
    assert thresholds.shape[0] == 2**n - 1
    above = lambda limit, k: jnp.where(x <= limit, np.uint8(0), np.uint8(1 << k))
    # The first alone: XLA would take time to fold a gather of one place.
    found = above(thresholds[(1 << (n - 1)) - 1], n - 1)
    for k in reversed(range(n - 1)):
        at = (found + np.uint8((1 << k) - 1)).astype(jnp.int32)
        found += above(jnp.take(thresholds, at, mode="clip"), k)
    return found


def count_above(
    x: Float[Array, "*shape"], thresholds: Sequence[float]
) -> UInt8[Array, "*shape"]:
    """How many of 2^n - 1 sorted thresholds lie strictly below x, by bisection."""
    n = (len(thresholds) + 1).bit_length() - 1
    assert len(thresholds) == 2**n - 1
    bits: list[jax.Array] = []  # the most significant first

    def threshold(low: int, step: int, k: int) -> jax.Array | np.float32:
        """The one to compare with next, given the first k bits found."""
        if k == len(bits):
            return np.float32(thresholds[low + step - 1])
        above = threshold(low + (step << (len(bits) - k)), step, k + 1)
        return jnp.where(bits[k], above, threshold(low, step, k + 1))

    for k in reversed(range(n)):
        bits.append(~(x <= threshold(0, 1 << k, 0)))  # NaN: above all of them
    code = jnp.zeros(x.shape, jnp.uint8)
    for k, bit in enumerate(reversed(bits)):
        code = code | jnp.where(bit, jnp.uint8(1 << k), jnp.uint8(0))
    return code


def look_up(
    codes: Integer[Array, "*shape"],
    values: Sequence[Num[Array | np.generic, "*#shape"]],
    first: int = 0,
) -> Num[Array, "*shape"]:
    """values[codes] for 2^n values, as a tree of selects on the code's bits.

    first: the code's lowest bit in the byte, whose other bits may be anything.  On a
    CPU this beats a gather, and codes that stay uint8 fill four times the lanes.
    """
    bit, level = first, list[Any](values)
    while len(level) > 1:
        on = (codes & codes.dtype.type(1 << bit)) != 0
        pairs = zip(level[::2], level[1::2], strict=True)
        level = [jnp.where(on, b, a) for a, b in pairs]
        bit += 1
    return level[0]
