"""Optimiser state in host memory, fetched one weight at a time.

This is what JAX can have of QLoRA's paged optimiser (Dettmers et al. 2023,
arXiv:2305.14314).  CUDA's unified memory moves pages on demand; XLA has no such thing
and plans every transfer when it compiles.  Left to itself it fetches the state of all
weights as soon as the backward pass ends, and the peak is what it was.  So the update
is taken apart into its weights, and each weight's fetch is made to wait until the state
of the one before is back on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax import lax

from jpeft import compat
from jpeft.adapt.equations import Jit, read
from jpeft.checks import check_index
from jpeft.late import Late
from jpeft.types import PyTree

if TYPE_CHECKING:
    import optax
else:
    optax = Late("optax")

HOST, DEVICE, HOST_KIND = jax.memory.Space.Host, jax.memory.Space.Device, "pinned_host"
Env = dict[Any, Any]  # the values of a program's variables


def offload(
    tx: optax.GradientTransformation, *, min_size: int = 1
) -> optax.GradientTransformationExtraArgs:
    """`tx` with its state in host memory.

    The state's arrays live in `pinned_host` memory, sharded as they were.  `update`
    fetches one weight's state, updates it and puts it back before it fetches the next,
    so the device holds the moments of a few weights, not of all.  Under `jax.jit` the
    updates are those of `tx`, bit for bit.

    min_size: arrays of fewer elements stay on the device, as scalars do.  For 1024
        (biases, tables of coefficients) a transfer costs more than it saves.

    What it costs: the state crosses the bus twice a step, one weight after the other,
    whether memory is short or not.  What it gives: the memory of the state.  For LoRA
    of rank 16 Adam's moments are 2 % of all; for high ranks, and for layers trained
    whole (`jpeft.full`), they are twice the trained weights.  The gradients stay, and
    `init` makes the state on the device before it moves it.

    The new state comes out of a jitted step on the host.  A step that donates its
    arguments must name the places of all results, or JAX may reuse a buffer on the host
    for a result on the device, which a TPU's compiler refuses ("Unimplemented DMA"):

        places = jax.tree.map(lambda x: x.sharding, (params, state))
        step = jax.jit(step, donate_argnums=(0, 1), out_shardings=places)
        params, state = jax.device_put((params, state), places)

    The last line commits all arrays to where they are.  Without it the second step
    compiles once more: JAX lets fresh arrays go anywhere, those on a host not.

    Any Optax transformation will do in which the state of one weight does not touch the
    update of another.  (Clipping gradients by their global norm before Adam is one:
    gradients are on the device.)  Raises ValueError for others, such as clipping the
    updates that Adam makes, and where a backend has no such memory.

    >>> import jax, jax.numpy as jnp, jpeft, optax
    >>> tx = jpeft.optim.offload(optax.adam(1e-3))
    >>> state = tx.init({"kernel": jnp.ones((64, 32))})
    >>> state[0].mu["kernel"].sharding.memory_kind
    'pinned_host'
    """
    min_size = check_index("offload", "min_size", min_size)
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise ValueError(
            f"offload: expected an Optax transformation, such as optax.adam(1e-3), got "
            f"{tx!r}"
        )
    inner = optax.with_extra_args_support(tx)

    def moves(x: Any) -> bool:
        if not _holds_values(x) or compat.is_key_array(x):
            return False
        return x.ndim > 0 and x.size >= min_size

    put = lambda x: to_host(x) if moves(x) else x
    fetch = lambda x: jax.device_put(x, DEVICE) if moves(x) else x

    def init(params: PyTree) -> Any:
        return jax.tree.map(put, inner.init(params))

    def update(
        updates: PyTree, state: Any, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, Any]:
        given, treedef = jax.tree.flatten((state, updates, params, extra))
        # The rest (a function among `extra`, a Python number) reaches `tx` as it is.
        traced = [k for k, x in enumerate(given) if _holds_values(x)]
        out_trees: list[Any] = []

        def flat(*arrays: Any) -> list[Any]:
            full = list(given)
            for k, x in zip(traced, arrays, strict=True):
                full[k] = x
            state, updates, params, extra = jax.tree.unflatten(treedef, full)
            fetched = jax.tree.map(fetch, state)
            updates, state = inner.update(updates, fetched, params, **extra)
            out = updates, jax.tree.map(put, state)
            out_trees[:] = map(jax.tree.structure, out)
            return jax.tree.leaves(out)

        arrays = [given[k] for k in traced]
        program = jax.make_jaxpr(without_jits(flat))(*arrays)
        of_updates, of_state = out_trees
        n = len(jax.tree.leaves(state))
        paged = [
            v
            for v, k in zip(program.jaxpr.invars, traced, strict=True)
            if k < n and moves(given[k])
        ]
        out = one_at_a_time(program, arrays, paged, of_updates.num_leaves)
        cut = of_updates.num_leaves
        return of_updates.unflatten(out[:cut]), of_state.unflatten(out[cut:])

    return optax.GradientTransformationExtraArgs(init, update)


# --- where an array lives ------------------------------------------------------------


def _holds_values(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray))


def to_host(x: Any) -> jax.Array:
    """The array in the memory of its device's host, sharded as it is."""
    if isinstance(x, jax.Array) and not isinstance(x, compat.Tracer):
        check_host_memory(next(iter(x.sharding.device_set)))
        return jax.device_put(x, x.sharding.with_memory_kind(HOST_KIND))
    check_host_memory(jax.devices()[0])
    return jax.device_put(x, HOST)


def check_host_memory(device: Any) -> None:
    """Raises if arrays of this device cannot live in the host's pinned memory."""
    kinds = sorted(m.kind for m in device.addressable_memories())
    if HOST_KIND not in kinds:
        raise ValueError(
            f"offload: {device.platform} devices have no {HOST_KIND} memory (they have "
            f"{kinds}); use the optimiser without offload, or a backend that has it "
            "(TPU, CUDA, CPU)"
        )


# --- one weight at a time ------------------------------------------------------------


def one_at_a_time(
    program: Any, args: Sequence[Any], paged: Sequence[Any], updates: int
) -> list[Any]:
    """The outputs of a program, its equations sorted by the arrays they depend on.

    paged: the inputs that live on the host.  Those that meet in one output (the two
    moments of a weight) form a group.  What depends on none comes first; then comes one
    group after the other, whose inputs pass a barrier together with what the group
    before sent to the host.  Equations stay what they are, and so do the results.
    updates: how many of the outputs, the first, are updates of a weight each.
    """
    jaxpr = program.jaxpr
    env: Env = dict(zip(jaxpr.constvars, program.consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    of_eqns, of_outputs = dependence(jaxpr, paged)
    groups = joined(paged, of_outputs)
    member = {v: k for k, group in enumerate(groups) for v in group}

    def sort(items: Sequence[Any], found: Sequence[frozenset[Any]]) -> list[list[Any]]:
        """The items of every group, and last those that depend on nothing."""
        out: list[list[Any]] = [[] for _ in range(len(groups) + 1)]
        for x, needs in zip(items, found, strict=True):
            of = {member.get(v, -2) for v in needs} or {-1}
            if len(of) == 1 and -2 not in of:  # else it reaches no output
                out[of.pop()].append(x)
        return out

    eqns = sort(jaxpr.eqns, of_eqns)
    updated = sort(jaxpr.outvars[:updates], of_outputs[:updates])
    for k, group in enumerate(groups):
        if len(updated[k]) > 1:
            raise ValueError(_coupled(jaxpr, of_eqns, group))
    _run(jaxpr, eqns[-1], env)
    back: list[Any] = []
    for k, sent in enumerate(sort(jaxpr.outvars, of_outputs)[:-1]):
        # All that the barrier ties together is on the host.  With a value on the device
        # among it, XLA for TPU fetches everything at once again.
        waiting = [v for v in paged if member.get(v) == k]
        ready, _ = lax.optimization_barrier(([env[v] for v in waiting], back))
        env.update(zip(waiting, ready, strict=True))
        _run(jaxpr, eqns[k], env)
        results = [env[v] for v in sent]
        back = [x for x in results if jax.typeof(x).memory_space == HOST]
    return [env[v] if _is_var(v) else v.val for v in jaxpr.outvars]


def dependence(
    jaxpr: Any, inputs: Sequence[Any]
) -> tuple[list[frozenset[Any]], list[frozenset[Any]]]:
    """For each equation and for each output: which of `inputs` it is computed from."""
    needs = {v: frozenset({v}) for v in inputs}
    nothing: frozenset[Any] = frozenset()
    of = lambda v: needs.get(v, nothing) if _is_var(v) else nothing
    of_eqns = []
    for e in jaxpr.eqns:
        of_eqns.append(nothing.union(*map(of, e.invars)))
        needs |= dict.fromkeys(e.outvars, of_eqns[-1])
    return of_eqns, list(map(of, jaxpr.outvars))


def joined(
    items: Sequence[Any], sets: Sequence[frozenset[Any]]
) -> list[frozenset[Any]]:
    """The coarsest grouping of items: two that share a set share a group."""
    group_of: dict[Any, frozenset[Any]] = {}
    for found in sets:
        whole = found.union(*(group_of[v] for v in found if v in group_of))
        group_of |= dict.fromkeys(whole, whole)
    return list(dict.fromkeys(group_of[v] for v in items if v in group_of))


def without_jits(f: Callable[..., Any]) -> Callable[..., list[Any]]:
    """`f` with the programs of its inner `jit`s as part of its own.

    Optax has one around the bias correction of the whole tree, for example.
    """

    def run(*args: Any) -> list[Any]:
        program = jax.make_jaxpr(f)(*args)
        return _expanded(program.jaxpr, program.consts, args)

    return run


def _expanded(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    env: Env = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    value = lambda v: env[v] if _is_var(v) else v.val
    for e in jaxpr.eqns:
        verb = read(e)
        if isinstance(verb, Jit):
            ins = [value(v) for v in e.invars]
            outs = _expanded(verb.jaxpr, verb.consts, ins)
            env.update(zip(e.outvars, outs, strict=True))
        else:
            _run(jaxpr, [e], env)
    return [value(v) for v in jaxpr.outvars]


def _run(jaxpr: Any, eqns: list[Any], env: Env) -> None:
    """Evaluates some equations of a program, reading and writing `env`."""
    made = [v for e in eqns for v in e.outvars]
    inside = set(made)
    read = dict.fromkeys(
        v for e in eqns for v in e.invars if _is_var(v) and v not in inside
    )
    run = compat.jaxpr_as_fun(compat.sub_jaxpr(jaxpr, eqns, list(read), made))
    env.update(zip(made, run(*(env[v] for v in read)), strict=True))


def _is_var(v: Any) -> bool:
    return not isinstance(v, compat.Literal)


def _coupled(jaxpr: Any, of_eqns: Sequence[Any], group: frozenset[Any]) -> str:
    """The message for a transformation whose weights cannot be told apart."""
    counts = [len(needs & group) for needs in of_eqns]
    most = max(counts)
    e = jaxpr.eqns[counts.index(most)]
    site = compat.source_line(e) or "an unknown line"
    return (
        f"offload: `{e.primitive.name}` at {site} needs {most} arrays of the state, of "
        "several weights, at once, so they would all be on the device together. Put "
        "that transformation around offload, not inside it: "
        "optax.chain(offload(optax.adam(1e-3)), optax.clip_by_global_norm(1.0)), "
        "optax.MultiSteps(offload(optax.adam(1e-3)), 4)"
    )
