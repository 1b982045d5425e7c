"""Random arrays by NumPy: JAX compiles a program for each new shape that it draws."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np

import jpeft
from jpeft.leaf import is_leaf
from jpeft.tree.paths import map_slots, slots


def normal(seed, *shape, dtype=jnp.float32):
    """Standard normal numbers of this shape."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(dtype))


def noisy(tree, by=0.1):
    """Every array moved, each by noise of its own, so that no zero hides an error."""

    def one(path, x):
        rng = np.random.default_rng(zlib.crc32(jax.tree_util.keystr(path).encode()))
        there = np.float64(x) + by * rng.standard_normal(x.shape)
        there = there.astype(x.dtype)
        one_device = len(x.sharding.device_set) == 1
        return jnp.asarray(there) if one_device else jax.device_put(there, x.sharding)

    return jax.tree_util.tree_map_with_path(one, tree)


def moved(params, by=0.3):
    """The same of every trainable array, so that an adapter acts."""
    trainable, frozen = jpeft.partition(params)
    return jpeft.combine(noisy(trainable, by), frozen)


def drawn_like(shapes, base):
    """Adapted weights of these shapes around those of `base`, drawn without compiling
    anything."""
    rng, at = np.random.default_rng(8), dict(slots(base).items())

    def one(path, x):
        if not is_leaf(x):
            return at[path]
        draw = lambda s: jnp.asarray(0.5 * rng.normal(size=s.shape), s.dtype)
        return jax.tree.map(draw, x).replace(base=at[path])

    return map_slots(one, shapes)
