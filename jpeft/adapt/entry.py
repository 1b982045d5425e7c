"""`adapt(fn)`: the same function, for parameter trees that hold adapted leaves."""

from __future__ import annotations

import functools
import warnings
import zlib
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jpeft import compat
from jpeft.adapt import control as _control  # noqa: F401  enters its rules
from jpeft.adapt.handed import handed_on
from jpeft.adapt.interpreter import Interpreter, settled
from jpeft.boxes import is_box, same_box, unbox
from jpeft.leaf import (
    AdaptedLeaf,
    OfText,
    Path,
    box_of,
    check_whole,
    innermost,
    is_leaf,
    layers,
    unboxed,
)
from jpeft.tree.lend import resolve
from jpeft.tree.paths import is_array, segments, spelled
from jpeft.types import DensifyWarning

P = ParamSpec("P")
T = TypeVar("T")


def adapt(
    fn: Callable[P, T], *, key: jax.Array | None = None, materialize: str = "refuse"
) -> Callable[P, T]:
    """`fn` with the same signature, whose arguments may hold adapted leaves.

    `fn` is traced with plain stand-ins for the leaves, then its program is evaluated
    with each leaf acting in the equation that consumes it; nothing of a weight's size
    is made.  Leaves may be anywhere in the arguments.  Arrays are traced; every other
    argument (True, "mean", a list of collections) reaches `fn` as it is.  `fn` is
    traced at every call, so call the result under `jax.jit`, as you would call the
    model.

    key: turns dropout on.  Each leaf folds in its path, each use its number, each scan
        step its index; a rematerialised forward draws the same masks.  None: no
        dropout.
    materialize: what happens where an equation has no cheap form for a leaf.  "refuse"
        raises DensifyError with the leaf's path and the source line; "allow" uses the
        full value there, and warns once a call with all such places.

    A weight that `fn` hands back as it came is handed back adapted.  A derivative that
    `fn` takes itself raises DerivativeError where it meets a leaf that is no change of
    a weight, or dropout: take it of `adapt(fn)`.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = jpeft.lora(rank=2)(jax.random.key(0), {"kernel": jnp.ones((7, 5))})
    >>> jpeft.adapt(lambda p, x: x @ p["kernel"])(params, jnp.ones((3, 7))).shape
    (3, 5)
    """
    if materialize not in ("refuse", "allow"):
        raise ValueError(
            f'adapt: materialize={materialize!r}: expected "refuse" or "allow"'
        )

    @functools.wraps(fn)
    def adapted(*args: P.args, **kwargs: P.kwargs) -> T:
        if not any(map(is_leaf, jax.tree.leaves((args, kwargs), is_leaf=is_leaf))):
            return fn(*args, **kwargs)
        return evaluate(fn, args, kwargs, key=key, allow=materialize == "allow")

    return adapted


def evaluate(
    fn: Callable[..., T],
    args: Any,
    kwargs: Any,
    *,
    key: jax.Array | None = None,
    allow: bool = False,
    noted: Callable[..., None] | None = None,
) -> T:
    """One call of an adapted function.  noted: see `Interpreter`."""
    program = Program(fn, args, kwargs)
    it = Interpreter(allow)
    if noted is not None:
        it.noted = noted
    values = [prepare(x, key) for x in resolve(program.inputs)]
    for k, x in enumerate(values):
        for leaf in layers(x):
            if isinstance(leaf, OfText):
                leaf.enters(program, k)
    outs = it.run(program.closed.jaxpr, program.closed.consts, values)
    it.channel.end("this call")
    it.ledger.settle()
    result = program.result(it, outs)
    if it.densified:
        places = sorted({f"{p} in `{q}` at {s}" for p, q, s in it.densified})
        warnings.warn(
            "full value used of " + "; ".join(places), DensifyWarning, stacklevel=3
        )
    return result


def prepare(x: Any, key: jax.Array | None) -> Any:
    """The leaf ready to act: values are taken, and it has its dropout key."""
    if not is_leaf(x):
        return x
    base = prepare(x.base, key)
    x = x.replace(base=base).begin()
    if key is not None and x.draws():
        name = f"{str.__str__(x.path)}#{x.origin}"
        x = x.replace(key=jax.random.fold_in(key, zlib.crc32(name.encode())))
    return x.materialize() if x.is_value else x


class Program:
    """A function traced to a jaxpr, with the arrays and leaves that go into it."""

    def __init__(self, fn: Callable[..., Any], args: Any, kwargs: Any):
        flat, treedef = jax.tree_util.tree_flatten_with_path(
            (args, kwargs), is_leaf=is_leaf
        )
        values = [x for _, x in flat]
        names = argument_paths([keys for keys, _ in flat])
        for name, x in zip(names, values, strict=True):
            check_whole(x, name, "adapt")
        self.traced = [k for k, x in enumerate(values) if is_array(x)]
        self.given = [values[k] for k in self.traced]
        self.names = [names[k] for k in self.traced]
        self.inputs = [
            with_path(x, name) if is_leaf(x) else x
            for x, name in zip(self.given, self.names, strict=True)
        ]
        outputs: dict[str, Any] = {}

        def call(*arrays: Any) -> list[Any]:
            full = list(values)
            for k, x in zip(self.traced, arrays, strict=True):
                full[k] = same_box(box_of(values[k]), x) if is_leaf(values[k]) else x
            a, kw = jax.tree.unflatten(treedef, full)
            out, out_tree = jax.tree.flatten(fn(*a, **kw))
            # Tracers must not outlive the trace; the rest are values of `fn`'s own.
            outputs["tree"] = out_tree
            outputs["static"] = [None if is_array(x) else x for x in out]
            outputs["traced"] = [k for k, x in enumerate(out) if is_array(x)]
            return [out[k] for k in outputs["traced"]]

        self.closed = jax.make_jaxpr(call)(*map(stand_in, self.inputs))
        self.out_tree = outputs["tree"]
        self.out_traced = set(outputs["traced"])
        self.out_static = outputs["static"]

    def result(self, it: Interpreter, outs: list[Any]) -> Any:
        """The function's own output structure, filled."""
        # A weight handed back as it came (a returned state) stays adapted.
        on, free = (handed_on(self.closed.jaxpr, stopped=s) for s in (True, False))
        filled = iter(zip(outs, on, free, strict=True))
        flat = []
        for k, static in enumerate(self.out_static):
            if k not in self.out_traced:
                flat.append(static)
                continue
            x, same, moving = next(filled)
            if same is not None and is_leaf(self.given[same]):
                x = self.given[same]
                x = _stopped(x) if moving is None else x
            else:
                x = settled(x)
                x = self.refuse(it, x) if is_leaf(x) else x
            flat.append(x)
        # The function boxes what it returns; an adapted leaf has boxes of its own.
        lift = lambda x: unbox(x) if is_box(x) and is_leaf(unbox(x)) else x
        out = jax.tree.unflatten(self.out_tree, flat)
        return jax.tree.map(lift, out, is_leaf=lambda x: is_box(x) or is_leaf(x))

    def refuse(self, it: Interpreter, leaf: AdaptedLeaf) -> Any:
        return it.densify(leaf, _RETURNED, "changed, which has no plain value")


def _stopped(leaf: AdaptedLeaf) -> AdaptedLeaf:
    """The leaf as `stop_gradient` hands it on."""
    moves = lambda x: jnp.issubdtype(x.dtype, jnp.inexact)
    return jax.tree.map(lambda x: lax.stop_gradient(x) if moves(x) else x, leaf)


class _Returned:
    """Stands for 'the end of the function' where a message names an equation."""

    class primitive:  # noqa: N801
        name = "return"

    source_info = None


_RETURNED = _Returned()


def stand_in(x: Any) -> Any:
    """The abstract value that the model is traced with in place of the leaf."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return x
    if is_leaf(x):
        base = innermost(x)
        same = tuple(base.shape) == x.shape and base.dtype == x.dtype
        if same and not is_leaf(base):
            return stand_in(base)
        arrays = [a for a in jax.tree.leaves(x) if isinstance(a, jax.Array)]
        if not arrays:
            return jax.ShapeDtypeStruct(x.shape, x.dtype)
        place = base.typed_sharding if is_leaf(base) else None
        return compat.abstract(x.shape, x.dtype, arrays[0], place)
    return jax.typeof(x)


def with_path(leaf: AdaptedLeaf, name: str) -> AdaptedLeaf:
    """The leaf out of its boxes, knowing its path for messages and keys.

    In `shard_map` all its arrays vary along the same axes, as one array would.
    """

    def down(x: Any) -> Any:
        return x.replace(path=Path(name), base=down(x.base)) if is_leaf(x) else unbox(x)

    return compat.varying_alike(down(unboxed(leaf)))


def argument_paths(keys: Sequence[Any]) -> list[str]:
    """Every leaf's path below its argument; Linen's `params` level is left out."""
    arguments: dict[Any, list[int]] = {}
    for n, (kind, argument, *_) in enumerate(keys):
        arguments.setdefault((kind, argument), []).append(n)
    names = [""] * len(keys)
    for places in arguments.values():
        below = segments([keys[n][2:] for n in places])
        in_params = [len(k) > 1 and k[0] == "params" for k in below]
        paths = spelled(
            [k[1:] if p else k for k, p in zip(below, in_params, strict=True)]
        )
        for n, path in zip(places, paths, strict=True):
            names[n] = path
    return names
