"""All that depends on the JAX version, or that JAX documents as semi-public.

Checked on jax 0.10.2 and 0.12.0.  Nothing here imports `jax._src`.
"""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer as Tracer
from jax.extend import source_info_util
from jax.sharding import AxisType

Literal = jex.Literal
ClosedJaxpr = jex.ClosedJaxpr
jaxpr_as_fun = jex.jaxpr_as_fun

# Call-like primitives and the parameter that holds their program.
CALLS: dict[str, str] = {
    "jit": "jaxpr",
    "closed_call": "call_jaxpr",
    "remat2": "jaxpr",
    "shard_map": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}
JIT = "jit"
# jnp's own jits around an equation or two, which callers with equal shapes share.
INLINED = frozenset({"_where"})
CHECKPOINT = "remat2"
# A rule of the user's own stands between the value and its gradient.
CUSTOM_RULES = frozenset({"custom_jvp_call", "custom_vjp_call"})


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """The bare program and its constants, closed or not."""
    if isinstance(jaxpr, jex.ClosedJaxpr):
        return jaxpr.jaxpr, jaxpr.consts
    return jaxpr, ()


def sub_jaxpr(host: Any, eqns: Sequence[Any], ins: Sequence[Any], outs: Sequence[Any]):
    """Some equations of `host` as a program of their own."""
    inner = host.replace(
        constvars=[], invars=list(ins), outvars=list(outs), eqns=list(eqns)
    )
    return jex.ClosedJaxpr(inner, [])


def scan_counts(eqn: Any) -> tuple[int, int]:
    """How many constants and how many carries a `scan` equation takes.

    jax 0.10 says `num_consts` and `num_carry`; since 0.12 one tree, `ft_in`,
    holds (constants, carries, scanned inputs).
    """
    if "num_consts" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    names = list(range(len(eqn.invars)))
    consts, carry, _ = eqn.params["ft_in"].update(names).unpack()
    return len(list(consts)), len(list(carry))


def manual_axes(params: dict[str, Any]) -> set[str]:
    """The mesh axes a `shard_map` equation makes manual."""
    key = "newly_manual_axes" if "newly_manual_axes" in params else "manual_axes"
    return set(params[key])


def name_stack() -> Any:
    return source_info_util.current_name_stack()


def under_name_stack(stack: Any) -> contextlib.AbstractContextManager[Any]:
    return source_info_util.set_name_stack(stack)


@contextlib.contextmanager
def at_equation(eqn: Any):
    """A context in which profiles and errors name the layer that `eqn` came from."""
    stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
    with source_info_util.user_context(eqn.source_info.traceback, name_stack=stack):
        with eqn.ctx.manager:
            yield


_Transform = type(source_info_util.new_name_stack().transform("jvp").stack[0])


def differentiates(eqns: Sequence[Any]) -> bool:
    """Whether `jax.grad`, `jvp` or the like wrote the last of these equations while
    `adapt` traced the first.  Each equation is inside the one before it.

    JAX notes it in the name stack of all that runs inside of them, of the function's
    own equations as of those of its derivative; of `jet` only Python's stack tells.
    """
    return any(
        isinstance(x, _Transform) and x.name in ("jvp", "transpose")
        for eqn in eqns
        for x in eqn.source_info.name_stack.stack
    ) or any(map(_by_jet, eqns[:1]))


def _by_jet(eqn: Any) -> bool:
    traced = eqn.source_info.traceback
    for frame in traced.frames if traced is not None else ():
        if frame.file_name.endswith(os.path.join("jpeft", "adapt", "entry.py")):
            return False  # further out is whoever called the adapted function
        if frame.file_name.endswith(os.path.join("jax", "experimental", "jet.py")):
            return True
    return False


def source_line(eqn: Any) -> str:
    """`file:line (function)` of the user's code, or '' inside a library's own jit."""
    if eqn.source_info is None:
        return ""
    return source_info_util.summarize(eqn.source_info)


def varying_axes(x: Any) -> list[str]:
    """The manual mesh axes along which a value differs from shard to shard.

    Empty outside `shard_map`, and inside one made with `check_vma=False`, which keeps
    no account of it.
    """
    return sorted(jax.typeof(x).manual_axis_type.varying)


def output_like(shape: tuple[int, ...], dtype: Any, *operands: Any) -> Any:
    """The type of a kernel's result.  Under `shard_map` the result varies along the
    mesh axes along which its operands vary."""
    varying = frozenset(a for x in operands for a in varying_axes(x))
    kind = jax.sharding.ManualAxisType(varying=varying)
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind)


def load_at(load: Any, ref: Any, at: Any, **how: Any) -> Any:
    """Mosaic GPU's `load` of a part of an array."""
    if "idx" in inspect.signature(load).parameters:  # jax 0.10
        return load(ref, at, **how)
    return load(ref.at[at], **how)


def triton_asks_for_a_gpu() -> bool:
    """Since jax 0.11 Pallas' Triton compiles only where there is a GPU."""
    return jax.__version_info__ >= (0, 11)


def varying_alike(tree: Any) -> Any:
    """The tree in which every array varies along the union of the arrays' varying axes.

    Inside `shard_map` they may then meet in one equation or loop."""
    kinds = (jax.Array, np.ndarray)
    arrays = [x for x in jax.tree.leaves(tree) if isinstance(x, kinds)]
    axes = sorted({a for x in arrays for a in varying_axes(x)})
    if not axes:
        return tree

    def one(x: Any) -> Any:
        if not isinstance(x, kinds):
            return x
        has = varying_axes(x)
        more = tuple(a for a in axes if a not in has)
        return jax.lax.pcast(x, more, to="varying") if more else x

    return jax.tree.map(one, tree)


def abstract(shape: tuple[int, ...], dtype: Any, like: Any, place: Any) -> Any:
    """An array's type that varies along the same manual mesh axes as `like`.

    place: its sharding, where shardings are part of types.
    """
    if not varying_axes(like):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    aval = jax.typeof(like)
    place = jax.sharding.NamedSharding(aval.sharding.mesh, jax.sharding.PartitionSpec())
    return jax.ShapeDtypeStruct(
        shape, dtype, sharding=place, manual_axis_type=aval.manual_axis_type
    )


def is_key_array(x: Any) -> bool:
    dtype = getattr(x, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def draws_by_number() -> bool:
    """Whether a random entry depends on its position alone, not on the array's size."""
    return getattr(jax.config, "jax_threefry_partitionable", True)


def waits_on_host(x: Any) -> bool:
    """Whether an array lies in the memory of its device's host."""
    return (
        isinstance(x, jax.Array) and jax.typeof(x).memory_space == jax.memory.Space.Host
    )


def on_device(x: Any) -> Any:
    """The weight on the device that computes, copied there if it is in host memory."""
    if waits_on_host(x):
        return jax.device_put(x, jax.memory.Space.Device)
    return x


def typed_sharding(x: Any) -> Any:
    """An array's sharding where types have one (on an explicit mesh), else None."""
    sharding = jax.typeof(x).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None
