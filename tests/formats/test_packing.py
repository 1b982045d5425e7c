"""Two codes a byte: planar in groups of 64, and bitsandbytes' neighbours."""

import jax.numpy as jnp
import numpy as np
import pytest

from jpeft.formats import codebooks, packing


def codes(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 16, shape, dtype=np.uint8)


SHAPES = [((64, 3), 0), ((3, 192), 1), ((5, 128, 2), 1), ((320,), 0), ((2, 3, 64), 2)]


@pytest.mark.parametrize(("n", "padded"), [(1, 64), (63, 64), (64, 64), (65, 128)])
def test_the_packed_axis_has_whole_groups(n, padded):
    assert packing.padded(n) == padded


@pytest.mark.sample(2)
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_unpacking_undoes_packing(shape, axis):
    c = codes(*shape)
    packed = packing.pack(jnp.asarray(c), axis)
    assert packed.dtype == jnp.uint8 and 2 * packed.size == c.size
    assert packed.shape[axis] == shape[axis] // 2
    got = packing.unpack(packed, axis)
    assert got.shape[axis : axis + 2] == (shape[axis] // 64, 64)
    np.testing.assert_array_equal(np.asarray(got).reshape(shape), c)


def test_a_byte_holds_the_codes_32_apart():
    c = codes(192, 5)
    packed = np.asarray(packing.pack(jnp.asarray(c), 0))
    for g in range(3):
        for r in range(32):
            low, high = c[64 * g + r], c[64 * g + 32 + r]
            np.testing.assert_array_equal(packed[32 * g + r], low | high << 4)


def test_a_shard_of_whole_groups_is_a_shard_of_the_bytes():
    c = jnp.asarray(codes(256, 3))
    whole = packing.pack(c, 0)
    for k in range(4):
        part = packing.pack(c[64 * k : 64 * (k + 1)], 0)
        np.testing.assert_array_equal(part, whole[32 * k : 32 * (k + 1)])


@pytest.mark.sample(2)
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.parametrize("whole", [False, True])
def test_nibbles_name_where_their_code_begins(shape, axis, whole):
    """Decoded in place or shifted down, they are the same codes."""
    c = codes(*shape)
    packed = packing.groups(packing.pack(jnp.asarray(c), axis), axis)
    halves = [
        codebooks.look_up(byte, list(np.arange(16)), first)
        for byte, first in packing.nibbles(packed, whole=whole)
    ]
    got = np.concatenate(halves, axis + 1).reshape(shape)
    np.testing.assert_array_equal(got, c)


@pytest.mark.sample(2)
@pytest.mark.parametrize("n", [1, 2, 7, 64, 101])
def test_pairs_are_neighbours_with_the_first_in_the_high_nibble(n):
    c = codes(n)
    full = np.append(c, np.uint8(7)) if n % 2 else c
    packed = packing.pairs(jnp.asarray(c), zero=7)
    assert packed.dtype == jnp.uint8
    np.testing.assert_array_equal(packed, full[::2] << 4 | full[1::2])
    np.testing.assert_array_equal(packing.from_pairs(packed, n), c)
