"""First values of A and B, drawn or taken from the weight itself.

    gaussian, kaiming   A drawn, B zero
    pissa               W = U S V^T:  A = U_r sqrt(S_r / s),  B = sqrt(S_r / s) V_r^T
    olora               W^T = Q R:    A = R_r^T,              B = Q_r^T

PiSSA is Meng et al. 2024, arXiv:2404.02948; OLoRA is Buyukakyuz 2024,
arXiv:2406.01775.  W is (in, out), as in x W; the decompositions are those of each
matrix of a stack, with input and output axes flattened.
"""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jpeft import compat
from jpeft.checks import refusal
from jpeft.leaf import wide_dtype
from jpeft.leaves.draw import drawn

DRAWN, PISSA, OLORA = ("gaussian", "kaiming"), "pissa", "olora"
INITS = (*DRAWN, PISSA, f"{PISSA}_niter_<n>", OLORA)
# More columns than asked for make the randomised subspace settle sooner (Halko et al.
# 2011, arXiv:0909.4061, recommend 5 to 10).
_EXTRA = 8


def iterations(init: str) -> int | None:
    """n of "pissa_niter_<n>", else None."""
    found = re.fullmatch(rf"{PISSA}_niter_(\d+)", init)
    return int(found[1]) if found else None


def check_init(method: str, name: str, init: Any) -> str:
    known = isinstance(init, str) and (
        init in (*DRAWN, PISSA, OLORA) or iterations(init) is not None
    )
    if not known:
        raise refusal(method, name, init, f"one of {INITS}")
    return init


def draw_a(
    key: jax.Array, shape: tuple[int, ...], fan_in: int, init: str, dtype: Any
) -> jax.Array:
    """A's first values, drawn in float32."""
    root = math.sqrt(fan_in)

    def entries(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        if init == "gaussian":
            x = jax.random.normal(key, shape, jnp.float32) / root
        else:
            x = jax.random.uniform(key, shape, jnp.float32, -1.0 / root, 1.0 / root)
        return x.astype(dtype)

    return drawn(entries, key, shape)


def factors_of(
    key: jax.Array,
    path: str,
    weight: jax.Array,
    axes: str,
    *,
    rank: int,
    scale: float,
    init: str,
) -> tuple[jax.Array, jax.Array]:
    """(A, B) taken from the weight: (*stack, *in, rank) and (*stack, rank, *out).

    Computed in float32 (float64 for float64), one matrix of a stack after the other.
    Raises if a matrix is zero, whose singular vectors say nothing: A and B would be
    zero, and neither would ever get a gradient.
    """
    a, b = factors(key, weight, axes=axes, rank=rank, scale=scale, init=init)
    if init != OLORA and not isinstance(a, compat.Tracer):
        own = tuple(range(axes.count("s"), a.ndim))
        if not jnp.all(jnp.any(a != 0, own)):
            raise ValueError(
                f"{path}: init={init!r} takes A and B from the weight, and this one "
                "is zero (or a matrix of its stack is), so they would never train; "
                f"use init='gaussian' here, or exclude={path!r}"
            )
    return a, b


@functools.partial(jax.jit, static_argnames=("axes", "rank", "scale", "init"))
def factors(
    key: jax.Array, weight: jax.Array, *, axes: str, rank: int, scale: float, init: str
) -> tuple[jax.Array, jax.Array]:
    """`factors_of` without its check."""
    order = [k for g in "sio" for k, c in enumerate(axes) if c == g]
    stack, ins, outs = (
        tuple(n for n, c in zip(weight.shape, axes, strict=True) if c == g)
        for g in "sio"
    )
    matrices = _replicated(jnp.transpose(weight, order))
    matrices = matrices.reshape(math.prod(stack), math.prod(ins), math.prod(outs))

    def one(row: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        k, w = row
        w = w.astype(wide_dtype(w.dtype))
        if init == OLORA:
            return orthonormal_factors(w, rank)
        of = jax.random.fold_in(key, k)
        return principal_factors(w, rank, scale, key=of, niter=iterations(init))

    # One after the other: the workspace is that of one matrix.
    a, b = lax.map(one, (jnp.arange(math.prod(stack)), matrices))
    return a.reshape(*stack, *ins, rank), b.reshape(*stack, rank, *outs)


def _replicated(x: jax.Array) -> jax.Array:
    """On an explicit mesh: whole on every device, as decompositions need it.

    On an automatic one the compiler gathers what it needs, a matrix at a time.
    """
    sharding = jax.typeof(x).sharding
    if all(names is None for names in sharding.spec):
        return x
    return jax.sharding.reshard(
        x, jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    )


# --- the mathematics -----------------------------------------------------------------

dot = functools.partial(jnp.dot, precision=lax.Precision.HIGHEST)


def principal_factors(
    w: Float[Array, "in out"],
    rank: int,
    scale: float,
    *,
    key: jax.Array | None = None,
    niter: int | None = None,
) -> tuple[Float[Array, "in rank"], Float[Array, "rank out"]]:
    """PiSSA: scale * A.B is the best approximation of W of this rank.

    niter: how often a random subspace is refined; None is the exact decomposition.
    """
    if niter is None:
        u, s, vt = jnp.linalg.svd(w, full_matrices=False)
    else:
        assert key is not None
        u, s, vt = randomized_svd(key, w, rank, niter)
    root = jnp.sqrt(s[:rank] / scale)
    return u[:, :rank] * root[None], root[:, None] * vt[:rank]


def randomized_svd(
    key: jax.Array, w: Float[Array, "in out"], rank: int, niter: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The leading singular triplets, from a random subspace refined `niter` times.

    Halko, Martinsson, Tropp 2011, arXiv:0909.4061, algorithms 4.4 and 5.1.
    """
    basis = lambda x: jnp.linalg.qr(x)[0]
    columns = min(rank + _EXTRA, *w.shape)
    q = basis(dot(w, jax.random.normal(key, (w.shape[1], columns), w.dtype)))
    for _ in range(niter):
        q = basis(dot(w, basis(dot(w.T, q))))
    u, s, vt = jnp.linalg.svd(dot(q.T, w), full_matrices=False)
    return dot(q, u), s, vt


def orthonormal_factors(
    w: Float[Array, "in out"], rank: int
) -> tuple[Float[Array, "in rank"], Float[Array, "rank out"]]:
    """OLoRA: of W^T = Q R, the first columns of Q and rows of R.

    The transpose is the paper's W, which maps columns: B's rows are orthonormal.  The
    first columns of Q are those of the first columns of W^T, and R is Q^T W^T, so the
    rest is never decomposed.
    """
    q, _ = jnp.linalg.qr(w[:rank].T)  # (out, rank)
    return dot(w, q), q.T
