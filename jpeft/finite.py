"""Whether an array holds NaN or infinity, asked where the array lies."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jpeft import compat

_PIECE = 1 << 20  # entries that NumPy looks at together: its answer takes a byte each


def all_finite(x: jax.Array | np.ndarray) -> bool | jax.Array:
    """True if every entry is finite.  x: floating, any shape, any place, not traced.

    NumPy reads what lies in this host's memory (a CPU's arrays, and those that wait
    there for an accelerator), shard by shard, where it is: nothing is copied, moved or
    compiled.  Elsewhere a program of each shape answers with an array on the device.
    """
    if isinstance(x, np.ndarray):
        return _finite_here(x)
    if _on_this_host(x):
        parts = [s.data for s in x.addressable_shards if s.replica_id == 0]
        return all(_finite_here(np.asarray(p)) for p in parts)
    # Also of arrays that a program which JAX traces closes over.
    with jax.ensure_compile_time_eval():
        return _finite_there(compat.on_device(x))


def _on_this_host(x: jax.Array) -> bool:
    if not x.is_fully_addressable:
        return False
    return compat.waits_on_host(x) or all(d.platform == "cpu" for d in x.devices())


def _finite_here(x: np.ndarray) -> bool:
    entries = x.ravel(order="K")  # in the order of memory, so no copy
    starts = range(0, entries.size, _PIECE)
    return all(bool(np.isfinite(entries[k : k + _PIECE]).all()) for k in starts)


@jax.jit
def _finite_there(x: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(x))
