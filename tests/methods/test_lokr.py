"""LoKr: the formula in its orientation, how sides are split, what is refused."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.methods.lokr import factorization

KEY = jax.random.key(0)


def n(*shape, k=0):
    return jax.random.normal(jax.random.key(k), shape)


def attached(w, rank, **options):
    leaf = jpeft.lokr(rank, 3, where="w", **options)(KEY, {"w": w})["w"]
    for k, name in enumerate(("w1", "w1_b", "w2", "w2_a")):
        if getattr(leaf, name) is not None:
            leaf = leaf.replace(**{name: n(*getattr(leaf, name).shape, k=k + 5)})
    return {"w": leaf}


def factor(leaf, name):
    whole = getattr(leaf, name)
    if whole is not None:
        return np.float64(whole)
    return np.float64(getattr(leaf, name + "_a")) @ np.float64(
        getattr(leaf, name + "_b")
    )


@pytest.mark.sample(2)
@pytest.mark.parametrize("options", [{}, {"factor": 2}, {"decompose_both": True}])
@pytest.mark.parametrize("rank", [1, 9])
def test_it_is_the_papers_formula(rank, options):
    params, x = attached(n(12, 30), rank, **options), n(3, 12, k=2)
    leaf = params["w"]
    assert (leaf.w2 is None) == (rank == 1)
    assert (leaf.w1 is None) == (rank == 1 and "decompose_both" in options)
    delta = np.kron(factor(leaf, "w1"), factor(leaf, "w2"))
    want = np.float64(leaf.base) + 3 / rank * delta
    np.testing.assert_allclose(jpeft.merge(params)["w"], want, rtol=1e-5, atol=1e-5)
    got = jpeft.adapt(lambda p, x: x @ p["w"])(params, x)
    np.testing.assert_allclose(got, np.float64(x) @ want, rtol=1e-5, atol=2e-5)


def test_as_a_weight_of_torch_the_factors_are_transposed():
    """W (out, in) = kron(w1, w2) with w1 (o1, i1), w2 (o2, i2)."""
    leaf = attached(jnp.zeros((6, 8)), 3)["w"]
    one, two = factor(leaf, "w1").T, factor(leaf, "w2").T
    got = jpeft.merge({"w": leaf})["w"].T
    np.testing.assert_allclose(got, np.kron(one, two), rtol=1e-5, atol=1e-6)


def test_nothing_of_the_weights_size_is_made():
    w = n(64, 60)
    params = attached(w, 2)
    program = jax.make_jaxpr(jpeft.adapt(lambda p, x: x @ p["w"]))(
        params, jnp.ones((3, 64))
    )
    made = [v.aval.size for e in program.eqns for v in e.outvars]
    assert len(made) > 3 and max(made) < w.size / 4


@pytest.mark.parametrize("size", range(1, 70))
def test_sides_are_split_as_evenly_as_they_divide(size):
    first, second = factorization(size)
    assert first * second == size and first <= second
    assert not [k for k in range(first + 1, math.isqrt(size) + 1) if size % k == 0]
    small, rest = factorization(size, 4)
    assert small * rest == size and small <= 4
    assert small == 4 or size % 4


def test_first_values():
    params = {"kernel": jnp.zeros((400, 300))}
    leaf = jpeft.lokr(2)(KEY, params)["kernel"]
    assert (leaf.w1.shape, leaf.w2_a.shape) == ((20, 15), (20, 2))
    assert not jnp.any(leaf.w2_a) and jnp.any(leaf.w2_b)
    assert float(jnp.std(leaf.w1)) == pytest.approx((3 * 20) ** -0.5, rel=0.15)
    leaf = jpeft.lokr(2, init="peft")(KEY, params)["kernel"]
    assert not jnp.any(leaf.w1) and jnp.any(leaf.w2_a) and jnp.any(leaf.w2_b)


def test_what_it_refuses():
    with pytest.raises(ValueError, match="lokr: factor=0: expected an integer"):
        jpeft.lokr(2, factor=0)
    with pytest.raises(ValueError, match="lokr: init='x': expected one of"):
        jpeft.lokr(2, init="x")
    params = attached(n(8, 6), 1)
    with pytest.raises(jpeft.DensifyError, match="w: Kronecker .* reaches `slice`"):
        jpeft.adapt(lambda p, x: x @ p["w"][:, :3])(params, n(2, 8))
