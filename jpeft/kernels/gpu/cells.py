"""The 4-bit codes of numbers, by a table of 32 cells: how GPUs encode."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32

from jpeft.formats import codebooks


@dataclasses.dataclass(frozen=True)
class Cells:
    """Where the code changes: [-1, 1] in at most 32 cells, none with two thresholds.

    x lies in cell round(x * density) + first, or |x| does if the sign stands apart.

    thresholds: of each cell, infinite where it has none.
    codes: of each cell, that below its threshold and, 4 bits up, that above.
    """

    density: float
    first: int
    sign_apart: bool
    thresholds: tuple[float, ...]
    codes: tuple[int, ...]

    @classmethod
    @functools.cache
    def of(cls, format: str) -> Cells | None:
        """None for a format whose codes are just rounded."""
        book = codebooks.fixed(format)
        if book.even is not None:
            return None
        if not book.sign_apart:
            return cls._cut(book.thresholds, book.order, False)
        order = np.argsort(book.values[:8]).tolist()
        return cls._cut(codebooks.midpoints(book.values[order]), order, True)

    @classmethod
    def _cut(cls, thresholds: np.ndarray, order: Iterable[int], apart: bool) -> Cells:
        """With the density that keeps thresholds away from the cells' borders: an x
        which rounding carries over a border finds the same code beyond it."""
        order, exact = tuple(order), thresholds.astype(np.float64)

        def margin(density: float) -> float:
            places = exact * density
            if np.diff(np.round(places)).min() < 1:
                return 0.0  # two in one cell
            return float((0.5 - np.abs(places - np.round(places))).min())

        density = max(np.arange(12.0, 15.5, 0.125).tolist(), key=margin)
        assert margin(density) > 1e-2
        first = 0 if apart else 16
        of_threshold = np.round(exact * density).astype(int) + first
        limits, codes = [], []
        for cell in range(32):
            below = int(np.sum(of_threshold < cell))
            inside = int(np.sum(of_threshold == cell))
            limits.append(float(thresholds[below]) if inside else float("inf"))
            codes.append(order[below] | order[below + inside] << 4)
        return cls(density, first, apart, tuple(limits), tuple(codes))

    def tables(self, size: int = 32) -> tuple[Float[Array, " s"], Int32[Array, " s"]]:
        """`thresholds` and `codes`, repeated."""
        limits, codes = np.array(self.thresholds), np.array(self.codes)
        return (
            jnp.asarray(np.resize(limits, size), jnp.float32),
            jnp.asarray(np.resize(codes, size), jnp.int32),
        )

    def encode(
        self, x: Float[Array, "*shape"], look_up: Callable[[Array], Any]
    ) -> Int32[Array, "*shape"]:
        """As `codebooks.encode`, for |x| <= 1; NaN gets some code.

        look_up: cell -> its entries in the two tables, where of `cell` only the lowest
        five bits count.
        """
        size = jnp.abs(x) if self.sign_apart else x
        limit, codes = look_up(round_to_bits(size, self.density, self.first))
        negative, above = x < jnp.float32(0), size > limit
        if self.sign_apart:
            # A tie goes to the lower value, which below zero is the larger one.
            above = above | (negative & (size == limit))
        upper = lax.shift_right_logical(codes, jnp.full_like(codes, 4))
        codes = jnp.where(above, upper, codes) & jnp.full_like(codes, 15)
        if not self.sign_apart:
            return codes
        # fp4 has two zeros, and that with the sign lies above the other.
        signed = jnp.where(codes == 0, x > jnp.float32(0), negative)
        return codes | jnp.where(signed, jnp.int32(8), jnp.int32(0))


def round_to_bits(x: jax.Array, factor: float, offset: int) -> jax.Array:
    """round(x * factor) + offset, in the lowest bits.  Floats from 2^23 on are whole,
    so the addition rounds, and their last bits count up."""
    whole = x * jnp.float32(factor) + jnp.float32(2**23 + offset)
    return lax.bitcast_convert_type(whole, jnp.int32)
