"""LoHa: the formula, both ways of acting, what is kept, the two kinds of init."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.leaf import array_fields as factors
from jpeft.methods.loha import products_along

KEY = jax.random.key(0)


def n(*shape, k=0):
    return jax.random.normal(jax.random.key(k), shape)


def attached(i, o, rank, **options):
    leaf = jpeft.loha(rank, 3, where="w", **options)(KEY, {"w": n(i, o)})["w"]
    return {"w": leaf.replace(b2=n(*leaf.b2.shape, k=5))}


def product(p, x):
    return x @ p["w"]


def test_it_is_the_papers_formula():
    params = attached(7, 5, 2)
    leaf, x = params["w"], n(3, 7, k=2)
    w, a1, b1, a2, b2 = (
        np.float64(y) for y in (leaf.base, leaf.a1, leaf.b1, leaf.a2, leaf.b2)
    )
    want = w + 1.5 * (a1 @ b1) * (a2 @ b2)
    np.testing.assert_allclose(jpeft.merge(params)["w"], want, rtol=1e-5, atol=1e-5)
    got = jpeft.adapt(product)(params, x)
    np.testing.assert_allclose(got, np.float64(x) @ want, rtol=1e-5, atol=1e-5)


def test_columns_of_products():
    a, b, c, d = n(7, 2), n(2, 5, k=1), n(7, 3, k=2), n(3, 5, k=3)
    np.testing.assert_allclose(
        products_along(a, c, 1) @ products_along(b, d, 0),
        (a @ b) * (c @ d),
        rtol=1e-5,
        atol=1e-5,
    )


# Rank 2 acts through 4 columns, rank 4 (16 columns for 24 x 20) is made and joins W.
@pytest.mark.sample(1)
@pytest.mark.parametrize(("rank", "dense"), [(2, False), (4, True)])
def test_both_ways_give_the_same_and_keep_nothing_large(rank, dense):
    params, x = attached(24, 20, rank), n(64, 24, k=2)
    trainable, frozen = jpeft.partition(params)

    def loss(weight_of):
        return lambda t: jnp.sum(jnp.sin(weight_of(jpeft.combine(t, frozen))))

    unmerged = loss(lambda p: jpeft.adapt(product)(p, x))
    got = jax.jit(jax.value_and_grad(unmerged))(trainable)
    want = jax.value_and_grad(loss(lambda p: x @ jpeft.merge(p)["w"]))(trainable)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)
    forward = jax.make_jaxpr(unmerged)(trainable)
    (inner,) = [e for e in forward.eqns if e.primitive.name in ("checkpoint", "remat2")]
    shapes = [v.aval.shape for e in inner.params["jaxpr"].eqns for v in e.outvars]
    assert ((24, 20) in shapes) == dense
    kept = [y.shape for y in jax.tree.leaves(jax.vjp(unmerged, trainable)[1])]
    assert (x.shape[0], rank**2) in kept or dense
    base = [s for s in kept if s == (24, 20)]
    assert len(base) <= 1, kept  # the base's own, for its product


def test_beside_a_bfloat16_weight_a_small_delta_is_not_rounded_away():
    signs = jnp.where(jnp.arange(24) % 2, 1.0, -1.0)
    ones = {k: jnp.ones_like(v) for k, v in factors(attached(24, 20, 8)["w"]).items()}
    leaf = attached(24, 20, 8)["w"].replace(
        base=jnp.ones((24, 20), jnp.bfloat16),  # whose next number is 1 + 2^-7
        scale=2**-9 / 64,
        **{**ones, "a1": ones["a1"] * signs[:, None]},
    )
    x = jnp.broadcast_to(signs.astype(jnp.bfloat16)[None], (64, 24))
    got = jpeft.adapt(product)({"w": leaf}, x)
    np.testing.assert_array_equal(got, jnp.full((64, 20), 24 * 2**-9, jnp.bfloat16))


def test_first_values():
    leaf = jpeft.loha(8)(KEY, {"kernel": jnp.zeros((600, 500))})["kernel"]
    spread = lambda x: float(jnp.std(x))
    assert spread(leaf.a1) == pytest.approx(1, rel=0.05)
    assert spread(leaf.a2) == pytest.approx(1, rel=0.05)
    assert spread(leaf.b1) == pytest.approx(0.1, rel=0.05)
    assert not jnp.any(leaf.b2)
    leaf = jpeft.loha(8, init="peft")(KEY, {"kernel": jnp.zeros((600, 500))})["kernel"]
    assert spread(leaf.a1) == pytest.approx((3 * 600) ** -0.5, rel=0.05)
    assert spread(leaf.b1) == pytest.approx((3 * 8) ** -0.5, rel=0.05)
    assert spread(leaf.b2) == pytest.approx((3 * 8) ** -0.5, rel=0.05)
    assert not jnp.any(leaf.a2)


def test_what_it_refuses():
    with pytest.raises(ValueError, match=r"loha: init='x': expected one of"):
        jpeft.loha(2, init="x")
    with pytest.raises(ValueError, match="kernel: rank 6 is larger than the matrix"):
        jpeft.loha(6)(KEY, {"kernel": n(7, 5)})
    with pytest.raises(ValueError, match="loha cannot act on"):
        jpeft.loha(2, where=".*embedding")(
            KEY, {"embedding": n(7, 5), "kernel": n(5, 5)}
        )
