"""LoRA+ is two optimisers, one of which is faster."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from forms import FORMS

import jpeft
from jpeft.optim.lora_plus import fast

KEY = jax.random.key(4)
SCHEDULE = optax.linear_schedule(3e-2, 1e-2, 5)

# Optax's own promotions need the standard rules.
pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


OPTIMISERS = {
    "sgd": lambda speed: optax.sgd(speed * 3e-2),
    "momentum": lambda speed: optax.sgd(speed * 3e-3, momentum=0.9),
    "adam": lambda speed: optax.adam(speed * 3e-2),
    "adamw_on_a_schedule": lambda speed: optax.adamw(
        lambda step: speed * SCHEDULE(step), weight_decay=0.1
    ),
}


@functools.cache
def setting(name="unrolled"):
    f = FORMS[name]()
    transform = jpeft.chain(
        jpeft.lora(2, where=".*up/kernel"),
        jpeft.lora(2, init="olora", where=".*down/kernel"),
        jpeft.adalora(2, where="head/kernel"),
        jpeft.bitfit(),
    )
    params = transform(KEY, f.params, uses=jpeft.find_uses(f.fn, f.params, *f.args))
    apply = jpeft.adapt(f.fn)
    loss = lambda p: jnp.mean(jnp.square(apply(p, *f.args) - 1.0))
    return params, loss


def by_name(tree):
    """The label of every array, from its path alone."""
    label = lambda path, _: "b" if jax.tree_util.keystr(path).endswith(".b") else "rest"
    return jax.tree_util.tree_map_with_path(label, tree)


@functools.cache
def gradient(loss):
    """Compiled once, and not again for each optimiser."""
    return jax.jit(jax.grad(lambda t, frozen: loss(jpeft.combine(t, frozen))))


def trained(tx, params, loss, steps=6):
    trainable, frozen = jpeft.partition(params)
    state = tx.init(trainable)

    @jax.jit
    def step(g, t, s):
        u, s = tx.update(g, s, t)
        return optax.apply_updates(t, u), s

    for _ in range(steps):
        g = gradient(loss)(trainable, frozen)
        trainable, state = step(g, trainable, state)
    assert step._cache_size() == 1
    return trainable


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMISERS)
def test_it_is_two_optimisers_of_which_one_is_faster(name):
    params, loss = setting()
    make = OPTIMISERS[name]
    got = trained(jpeft.optim.lora_plus(make(1.0), ratio=16), params, loss)
    two = optax.partition({"rest": make(1.0), "b": make(16.0)}, by_name)
    want = trained(two, params, loss)
    one = trained(make(1.0), params, loss)
    same = lambda x, y: np.allclose(x, y, rtol=1e-4, atol=1e-6)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert same(x, y)
    assert not all(
        same(x, y)
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(one), strict=True)
    )


def test_every_b_learns_faster_and_vectors_if_asked():
    params = {"kernel": jnp.ones((7, 5)), "bias": jnp.ones(5)}
    params = jpeft.chain(jpeft.lora(2), jpeft.bitfit())(KEY, params)
    ones = jax.tree.map(jnp.ones_like, jpeft.partition(params)[0])
    for vectors, of_bias in ((False, -0.5), (True, -8.0)):
        tx = jpeft.optim.lora_plus(optax.sgd(0.5), ratio=16, vectors=vectors)
        updates, _ = tx.update(ones, tx.init(ones), ones)
        want = {"a": -0.5, "b": -8.0}
        found = {n: getattr(updates["kernel"], n) for n in want}
        assert {n: set(np.ravel(x).tolist()) for n, x in found.items()} == {
            n: {x} for n, x in want.items()
        }
        assert set(np.ravel(updates["bias"].delta).tolist()) == {of_bias}


def test_what_is_fast():
    params, _ = setting("scan")
    flat, _ = jax.tree_util.tree_flatten_with_path(fast(params, vectors=False))
    quick = {jax.tree_util.keystr(p) for p, yes in flat if yes is True}
    assert quick == {
        "['layers']['up']['kernel'].b",
        "['layers']['down']['kernel'].b",  # OLoRA's, not its frozen first value
    }


@pytest.mark.slow
def test_vectors_may_be_fast_too():
    params, loss = setting()
    flat, _ = jax.tree_util.tree_flatten_with_path(fast(params, vectors=True))
    quick = {jax.tree_util.keystr(p) for p, yes in flat if yes is True}
    assert "['head']['bias'].delta" in quick and "['head']['bias'].base" not in quick
    assert "['head']['kernel'].lam" in quick
    got = trained(
        jpeft.optim.lora_plus(optax.sgd(1e-3), 4, vectors=True), params, loss, steps=1
    )
    slow = trained(jpeft.optim.lora_plus(optax.sgd(1e-3), 4), params, loss, steps=1)
    deltas = [x["head"]["bias"].delta for x in (got, slow)]
    np.testing.assert_allclose(deltas[0], 4 * deltas[1], rtol=1e-5)


@pytest.mark.slow
def test_one_tree_and_freeze_in_either_order():
    params, loss = setting()
    gradients = jax.jit(jax.grad(loss))(params)
    for tx in (
        jpeft.freeze(jpeft.optim.lora_plus(optax.sgd(1e-2), 4)),
        jpeft.optim.lora_plus(jpeft.freeze(optax.sgd(1e-2)), 4),
    ):
        updates, _ = tx.update(gradients, tx.init(params), params)
        after = optax.apply_updates(params, updates)
        want = trained(jpeft.optim.lora_plus(optax.sgd(1e-2), 4), params, loss, steps=1)
        got, frozen = jpeft.partition(after)
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)
        assert [x.tobytes() for x in map(np.asarray, jax.tree.leaves(frozen))] == [
            x.tobytes()
            for x in map(np.asarray, jax.tree.leaves(jpeft.partition(params)[1]))
        ]


def test_messages():
    with pytest.raises(ValueError, match="lora_plus: ratio=0: expected a number"):
        jpeft.optim.lora_plus(optax.sgd(0.1), 0)
    params = jpeft.bitfit()(KEY, {"dense": {"bias": jnp.zeros(3)}})
    with pytest.raises(ValueError, match="no leaf of this tree has a trainable A"):
        jpeft.optim.lora_plus(optax.sgd(0.1)).init(params)
