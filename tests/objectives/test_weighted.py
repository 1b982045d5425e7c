"""A mean from parts is the mean of the whole."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from draws import normal
from jax.sharding import PartitionSpec as P

from jpeft.objectives import Weighted, accumulated_value_and_grad

MASK = np.zeros((4, 6), np.float32)
MASK[0, :5], MASK[1, :1], MASK[3, 2:5] = 1, 1, 1  # nothing in row 2
X = normal(0, 4, 6, 3)


def loss(params, batch):
    x, mask = batch
    y = jnp.tanh(x @ params["w"]) + params["b"]
    return Weighted(jnp.sum(jnp.square(y) * mask), jnp.sum(mask))


PARAMS = {"w": normal(1, 3), "b": normal(2)}
WHOLE = jax.jit(jax.value_and_grad(lambda p, b: loss(p, b).mean()))


def close(x, y, rtol=1e-6):  # sums of nine float32 numbers in another order
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=rtol), x, y)


def test_mean_of_means_is_not_what_accumulation_gives():
    a = Weighted(jnp.float32(20), jnp.float32(10))
    b = Weighted(jnp.float32(90), jnp.float32(90))
    assert np.isclose((a + b).mean(), 1.1)
    assert np.isclose(sum([a, b]).mean(), 1.1)


def test_nothing_counted_is_zero_with_zero_gradients():
    f = lambda p: loss(p, (X[0], jnp.zeros(6))).mean()
    value, grads = jax.jit(jax.value_and_grad(f))(PARAMS)
    assert value == 0 and all(np.all(g == 0) for g in jax.tree.leaves(grads))
    run = jax.jit(accumulated_value_and_grad(loss))
    value, grads = run(PARAMS, (X[:1], jnp.zeros((1, 6))))
    assert value.mean() == 0
    assert all(np.all(g == 0) for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("parts", [1, 4])
def test_micro_batches_have_the_gradient_of_the_whole(parts):
    split = lambda x: jnp.asarray(x).reshape(parts, 4 // parts, *x.shape[1:])
    run = jax.jit(accumulated_value_and_grad(loss))
    value, grads = run(PARAMS, (split(X), split(MASK)))
    close((value.mean(), grads), WHOLE(PARAMS, (X, MASK)))
    assert value.count == 9


def test_multisteps_averages_what_accumulation_sums():
    # What the docstring says of Optax.
    run = jax.jit(accumulated_value_and_grad(loss))
    _, grads = run(PARAMS, (X, MASK))
    tx = optax.MultiSteps(optax.sgd(1.0), every_k_schedule=4)
    step, state = jax.jit(tx.update), tx.init(PARAMS)
    with jax.numpy_dtype_promotion("standard"):
        for k in range(4):
            _, g = WHOLE(PARAMS, (X[k], MASK[k]))
            updates, state = step(g, state, PARAMS)
    assert not np.allclose(-updates["w"], grads["w"], rtol=1e-2)


@pytest.mark.parametrize("check_vma", [True, False])
def test_over_devices_of_unequal_counts(check_vma):
    kind = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((2,), ("data",), (kind,), devices=jax.devices()[:2])
    run = accumulated_value_and_grad(loss, axis_name="data")
    sharded = jax.jit(
        jax.shard_map(
            run,
            mesh=mesh,
            in_specs=(P(), P(None, "data")),
            out_specs=P(),
            check_vma=check_vma,
        )
    )
    split = lambda x: jnp.asarray(x).reshape(2, 2, *x.shape[1:])
    value, grads = sharded(PARAMS, (split(X), split(MASK)))
    close((value.mean(), grads), WHOLE(PARAMS, (X, MASK)))


def test_bfloat16_gradients_are_summed_in_float32():
    f = lambda p, x: Weighted(jnp.sum((p * x).astype(jnp.float32)), jnp.float32(1))
    parts = jnp.full((300,), 1.0, jnp.bfloat16)  # 256 + 1 is 256 in bfloat16
    value, grad = jax.jit(accumulated_value_and_grad(f))(jnp.bfloat16(1), parts)
    assert grad.dtype == jnp.bfloat16 and grad == 1 and value.total == 300


def test_messages():
    mean = lambda p, b: loss(p, b).mean()
    with pytest.raises(TypeError, match="expected jpeft.objectives.Weighted"):
        accumulated_value_and_grad(mean)(PARAMS, (X, MASK))
    with pytest.raises(ValueError, match="the first size the same for all"):
        accumulated_value_and_grad(loss)(PARAMS, (X, MASK[:3]))
