"""VeRA: the formula, what is shared and by whom it is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import moved, normal

import jpeft

KEY = jax.random.key(0)
TREE = {
    "a": {"kernel": normal(1, 7, 5)},
    "b": {"kernel": normal(2, 4, 2, 3)},
    "c": {"kernel": normal(3, 5, 9)},
}
USES = {"b/kernel": "ioo"}


def model(p, x):
    b = jnp.einsum("bi,iho->bho", x[:, :4], p["b"]["kernel"])
    return (x @ p["a"]["kernel"]) @ p["c"]["kernel"], b


X = normal(4, 3, 7)


def attached(t=None, tree=TREE):
    uses = jpeft.find_uses(model, tree, X)
    return (t or jpeft.vera(rank=11))(KEY, tree, uses=uses)


def test_it_is_the_papers_formula_on_slices_of_the_same_matrices():
    params = moved(attached())
    first = params["a"]["kernel"]
    assert (first.shared_a.shape, first.shared_b.shape) == ((7, 11), (11, 9))
    a, b = np.float64(first.shared_a), np.float64(first.shared_b)
    merged = jpeft.merge(params)
    for name, i, o in (("a", 7, 5), ("b", 4, 6), ("c", 5, 9)):
        leaf = params[name]["kernel"]
        d, e = np.float64(leaf.d), np.float64(leaf.b).reshape(-1)
        want = np.float64(leaf.base).reshape(i, o) + (a[:i] * d) @ (b[:, :o] * e)
        np.testing.assert_allclose(
            merged[name]["kernel"].reshape(i, o), want, rtol=1e-5, atol=1e-5
        )
    for got, want in zip(
        jax.jit(jpeft.adapt(model))(params, X), model(merged, X), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-5)


def test_what_is_shared_is_there_once():
    params = attached()
    held = [params[k]["kernel"].shared_a is not None for k in "abc"]
    assert held == [True, False, False]
    frozen = sum(x.size for x in jax.tree.leaves(TREE)) + 11 * (7 + 9)
    assert jpeft.count(params) == (3 * 11 + 5 + 6 + 9, frozen)


def test_a_layer_left_out_changes_no_number_of_the_others():
    """As long as it is not the largest."""
    tree = {**TREE, "a": {"kernel": TREE["a"]["kernel"]}}
    whole = attached(tree=tree)
    less = attached(jpeft.vera(rank=11, exclude="b/kernel"))
    assert not isinstance(less["b"]["kernel"], jpeft.AdaptedLeaf)
    for name in ("shared_a", "shared_b"):
        np.testing.assert_array_equal(
            getattr(whole["a"]["kernel"], name), getattr(less["a"]["kernel"], name)
        )


def test_without_the_leaf_that_keeps_the_matrices_it_says_so():
    params = attached()
    rest = {**params, "a": TREE["a"]}
    for f in (lambda: jpeft.adapt(model)(rest, X), lambda: jpeft.merge(rest)):
        with pytest.raises(ValueError, match="b/kernel: VeRA's random matrices"):
            f()


@pytest.mark.slow
def test_two_of_them_keep_their_own_matrices():
    one = jpeft.vera(rank=11)
    two = jpeft.vera(rank=3, where="a/kernel")
    params = moved(attached(jpeft.chain(one, two)))
    for got, want in zip(
        jpeft.adapt(model)(params, X), model(jpeft.merge(params), X), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-5)


def test_first_values():
    params = {"kernel": jnp.zeros((400, 300))}
    leaf = jpeft.vera(rank=64, d_initial=0.25)(KEY, params)["kernel"]
    np.testing.assert_array_equal(leaf.d, 0.25)
    np.testing.assert_array_equal(leaf.b, 0.0)
    for x, fan_in in ((leaf.shared_a, 400), (leaf.shared_b, 64)):
        assert float(jnp.var(x)) == pytest.approx(2 / fan_in, rel=0.05)
        assert float(jnp.max(jnp.abs(x))) <= (6 / fan_in) ** 0.5


def test_dropout_draws_where_there_is_a_key():
    params = moved(attached(jpeft.vera(rank=11, dropout=0.5)))
    plain = jpeft.adapt(model)(params, X)[0]
    one, two = (
        jpeft.adapt(model, key=jax.random.key(k))(params, X)[0] for k in range(2)
    )
    assert float(jnp.max(jnp.abs(one - plain))) > 1e-3
    assert float(jnp.max(jnp.abs(one - two))) > 1e-3


def test_what_it_refuses():
    with pytest.raises(ValueError, match="vera: rank=0: expected an integer"):
        jpeft.vera(0)
    with pytest.raises(ValueError, match="vera: d_initial=0: expected a number"):
        jpeft.vera(2, d_initial=0)
    with pytest.raises(ValueError, match="vera cannot act on"):
        jpeft.vera(2, where=".*embedding")(KEY, {"embedding": X, "kernel": X})
