"""What follows from the table of a leaf's arrays, on leaves made up for it."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jpeft
from jpeft.checkpoint.adapter import check_shapes
from jpeft.leaf import (
    AdaptedLeaf,
    adapted_leaf,
    boxed_like,
    disabled,
    field_axes,
    frozen,
    merges,
    shapes_beside,
    static,
    trainable,
)
from jpeft.types import CheckpointError


@adapted_leaf
class Table(AdaptedLeaf):
    """w * gain, plus more where there is any."""

    axes: str = static()
    up: Any = trainable("sir")
    gain: Any = trainable("so", off="old")
    old: Any = frozen("so")
    rows: Any = trainable(("tokens", "o"), off=2)
    more: Any = trainable("*", off=0, default=None)
    free: Any = trainable()

    def effective(self, w):
        y = w * jnp.asarray(self.gain)[:, None]
        return y if self.more is None else y + self.more


@adapted_leaf
class Formless(AdaptedLeaf):
    """No change of a weight."""


SHAPE, AXES = (2, 5, 3), "sio"


def table(**changes):
    shapes = shapes_beside(Table, SHAPE, AXES, r=4, tokens=7)
    arrays = {n: jnp.full(s, 3.0) for n, s in shapes.items() if n != "more"}
    arrays |= {"free": jnp.ones((6, 1)), "base": jnp.full(SHAPE, 5.0)}
    return Table(axes=AXES, **{**arrays, **changes})


def test_shapes_follow_from_the_axes_and_sizes_given():
    assert shapes_beside(Table, SHAPE, AXES, r=4) == {
        "up": (2, 5, 4),
        "gain": (2, 3),
        "old": (2, 3),
        "more": SHAPE,
    }
    assert shapes_beside(Table, SHAPE, AXES, tokens=7)["rows"] == (7, 3)


def test_each_array_has_labels_and_one_that_is_not_there_has_none():
    assert table().labels() == {
        "up": [0, 1, "r"],
        "gain": [0, 2],
        "old": [0, 2],
        "rows": ["tokens", 2],
        "free": [None, None],
    }
    assert field_axes(table(more=jnp.ones(SHAPE)))["more"] == (0, 1, 2)
    assert field_axes(table())["rows"] == (None, 2)


def test_disabled_puts_what_each_field_says():
    leaf = disabled(table(old=jnp.full((2, 3), 9.0), more=jnp.ones(SHAPE)))
    assert {float(x) for x in np.ravel(leaf.gain)} == {9.0}
    assert {float(x) for x in np.ravel(leaf.rows)} == {2.0}
    assert not np.any(leaf.more) and np.all(leaf.up == 3.0)
    assert disabled(table()).more is None


def test_the_base_is_widened_once_and_the_weight_rounded_once():
    third = jnp.asarray(1 / 3, jnp.float32)
    below = table(base=jnp.full(SHAPE, 5, jnp.bfloat16), gain=jnp.full((2, 3), third))
    leaf = table(base=below, gain=jnp.full((2, 3), 3.0))
    assert leaf.dtype == jnp.bfloat16
    np.testing.assert_allclose(leaf.materialize(jnp.float32), 5.0, rtol=1e-6)
    assert leaf.materialize().dtype == jnp.bfloat16


def test_a_leaf_without_a_formula_does_not_merge():
    leaf = Formless(base=jnp.ones(3))
    assert merges(table()) and not merges(leaf)
    with pytest.raises(TypeError, match="a Formless is not a change of the weight"):
        jpeft.merge({"w": leaf})


def test_boxes_are_named_after_the_axes():
    box = nn.Partitioned(jnp.zeros(SHAPE), ("layers", "in", "out"))
    leaf = boxed_like(box, table())
    assert leaf.up.names == ("layers", "in", None)
    assert leaf.rows.names == (None, "out")
    assert leaf.free.names == (None, None)


def test_arrays_that_disagree_are_named():
    check_shapes("w", table(), SHAPE)
    with pytest.raises(CheckpointError, match=r"w/gain: shape \(2, 4\) does not fit"):
        check_shapes("w", table(gain=jnp.ones((2, 4))), SHAPE)
