"""A weight that is made where it is used: what else may stand on it, or below."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import moved

import jpeft

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (4, 8))
BASE = {"w": {"kernel": jax.random.normal(KEY, (8, 6))}}


def both(first, second):
    return moved(jpeft.chain(first, second)(KEY, BASE))


def fn(params, x):
    return x @ params["w"]["kernel"]


@pytest.mark.parametrize("order", [1, -1])
def test_over_and_under_another_method_it_acts_as_merged(order):
    params = both(*[jpeft.hira(2), jpeft.lora(2)][::order])
    got = jpeft.adapt(fn)(params, X)
    # float32, sums of 8 terms
    np.testing.assert_allclose(got, fn(jpeft.merge(params), X), rtol=1e-5, atol=1e-5)


def test_what_acts_on_activations_below_it_is_not_passed_over():
    params = both(jpeft.lora(2, dropout=0.5), jpeft.hira(2))
    jpeft.adapt(fn)(params, X)  # without a key nothing is dropped
    with pytest.raises(
        jpeft.DensifyError, match="LowRank below .* apply that one last"
    ):
        jpeft.adapt(fn, key=KEY)(params, X)
    params = both(jpeft.hira(2), jpeft.lora(2, dropout=0.5))
    dropped = jpeft.adapt(fn, key=KEY)(params, X)
    assert float(jnp.max(jnp.abs(dropped - jpeft.adapt(fn)(params, X)))) > 0.01


def test_no_weight_waits_for_the_backward_pass():
    params = moved(jpeft.hira(2)(KEY, BASE))
    trainable, frozen = jpeft.partition(params)
    apply = lambda t: jpeft.adapt(fn)(jpeft.combine(t, frozen), X)
    kept = jax.tree.leaves(jax.vjp(apply, trainable)[1])
    inputs = {np.shape(x) for x in jax.tree.leaves((params, X))}
    assert {np.shape(x) for x in kept} <= inputs
    whole = [x for x in kept if np.shape(x) == (8, 6)]
    assert all(np.array_equal(x, BASE["w"]["kernel"]) for x in whole)  # the base alone
