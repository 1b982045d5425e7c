"""Parameters that a function hands back: every kind of leaf comes back as it was."""

from __future__ import annotations

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

import jpeft
from jpeft.leaf import is_leaf

KEY = jax.random.key(0)


def draw(*shape, k=0):
    rng = np.random.default_rng(k)
    return jnp.asarray(0.4 * rng.standard_normal(shape), jnp.float32)


BASE = {
    "layers": {"kernel": draw(2, 4, 4, k=1), "bias": draw(2, 4, k=2)},
    "norm": {"scale": 1 + draw(4, k=3)},
    "up": {"kernel": draw(4, 6, k=4), "bias": draw(6, k=5)},
    "head": {"kernel": draw(6, 3, k=6), "bias": draw(3, k=7)},
}
X = draw(5, 4, k=8)
# A kind of leaf each, values and others, alone and upon each other.
TREE = jpeft.chain(
    jpeft.quantize("int8", where="head/kernel", compute_dtype=None),
    jpeft.lora(rank=1, where="head/kernel"),
    jpeft.dora(rank=1, where="layers/kernel"),
    jpeft.bitfit(where="layers/bias"),
    jpeft.full("up/bias"),
    jpeft.diff_pruning(where="up/kernel"),
    jpeft.norm_tuning(where="norm/scale"),
    jpeft.bitfit(where=".*(up|head)/bias", exclude="up/bias"),
)


@functools.cache
def trained():
    params = TREE(KEY, BASE)
    halves = jpeft.partition(params)
    return jpeft.combine(jax.tree.map(lambda x: x + 0.1, halves[0]), halves[1])


def fn(p, x):
    def step(x, layer):
        return jnp.tanh(x @ layer["kernel"] + layer["bias"][None]), None

    x = lax.scan(step, x, p["layers"])[0] * p["norm"]["scale"][None]
    x = x @ p["up"]["kernel"] + p["up"]["bias"][None]
    return x @ p["head"]["kernel"] + p["head"]["bias"][None]


def stacked(p):
    """A loop over the layers that returns each layer's parameters."""
    layers = lax.scan(lambda c, layer: (c, layer), 0, p["layers"], reverse=True)[1]
    return {**p, "layers": layers}


@jax.custom_jvp
def own_rule(x, norm):
    return x * 1.0, norm


own_rule.defjvp(lambda p, t: (own_rule(*p), (t[0], t[1])))


def loop(p, x):
    go_on = lambda c: c[0] < 2
    return lax.while_loop(
        go_on, lambda c: (c[0] + 1, jax.jit(lambda p: p)(c[1])), (0, p)
    )


WAYS = {
    "itself": lambda p, x: p,
    "jit": lambda p, x: jax.jit(lambda p: jax.jit(lambda p: p)(p))(p),
    "checkpoint": lambda p, x: jax.checkpoint(lambda p, x: (p, fn(p, x)))(p, x)[0],
    "a scan's carry": lambda p, x: lax.scan(
        lambda p, x: (p, fn(p, x)), p, jnp.stack([x, x])
    )[0],
    "a scan's rows": lambda p, x: stacked(p),
    "while": lambda p, x: loop(p, x)[1],
    "cond": lambda p, x: lax.cond(
        x[0, 0] > 0, lambda p: (fn(p, x), p), lambda p: (0 * fn(p, x), p), p
    )[1],
    "vmap": lambda p, x: jax.vmap(
        lambda p, x: (fn(p, x[None]), p), in_axes=(None, 0), out_axes=(0, None)
    )(p, x)[1],
    "custom_jvp": lambda p, x: {**p, "norm": own_rule(x, p["norm"])[1]},
    "copies": lambda p, x: jax.tree.map(jnp.copy, p),
    "a barrier": lambda p, x: lax.optimization_barrier(p),
    "value_and_grad": lambda p, x: jax.value_and_grad(
        lambda x: (jnp.sum(fn(p, x)), p), has_aux=True
    )(x)[0][1],
    "shard_map": lambda p, x: jax.shard_map(
        lambda p, x: (p, fn(p, x)),
        mesh=jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,)),
        in_specs=(P(), P("d")),
        out_specs=(P(), P("d")),
    )(p, x)[0],
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("way", WAYS)
def test_every_kind_comes_back_whatever_it_went_through(way):
    params = trained()
    _, back = jpeft.adapt(lambda p, x: (fn(p, x), WAYS[way](p, x)))(params, X)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True):
        assert a.dtype == b.dtype and np.array_equal(a, b)


def test_what_comes_back_takes_the_next_step():
    tx = optax.adam(1e-2)
    apply = jpeft.adapt(lambda p, x: (jnp.sum(fn(p, x) ** 2), WAYS["jit"](p, x)))

    @jax.jit
    def step(halves, state):
        loss = lambda t: apply(jpeft.combine(t, halves[1]), X)
        (value, back), grads = jax.value_and_grad(loss, has_aux=True)(halves[0])
        updates, state = tx.update(grads, state, halves[0])
        after, frozen = jpeft.partition(back)
        return value, (optax.apply_updates(after, updates), frozen), state

    halves = jpeft.partition(trained())
    state = tx.init(halves[0])
    losses = []
    with jax.numpy_dtype_promotion("standard"):  # optax mixes int and float
        for _ in range(3):
            value, halves, state = step(halves, state)
            losses.append(float(value))
    assert step._cache_size() == 1 and losses[2] < losses[1] < losses[0]


def test_a_stopped_gradient_stays_stopped():
    f = jpeft.adapt(lambda p: jax.tree.map(lax.stop_gradient, p))
    trainable, frozen = jpeft.partition(trained())
    assert jax.tree.structure(f(trained())) == jax.tree.structure(trained())

    def loss(t):
        back, _ = jpeft.partition(f(jpeft.combine(t, frozen)))
        return sum(jnp.sum(x) for x in jax.tree.leaves(back))

    grads = jax.grad(loss)(trainable)
    assert not any(np.any(np.asarray(g)) for g in jax.tree.leaves(grads))


def test_what_changed_is_a_value_or_refused():
    double = jpeft.adapt(lambda p: jax.tree.map(lambda w: 2 * w, p))
    values = {k: trained()[k] for k in ("norm",)}
    assert isinstance(double(values)["norm"]["scale"], jax.Array)
    with pytest.raises(jpeft.DensifyError, match="head/kernel: .* `return`"):
        double({"head": {"kernel": trained()["head"]["kernel"]}})
    swapped = lambda p: lax.fori_loop(0, 1, lambda _, c: (c[1], c[0]), p)
    a, b = (jpeft.bitfit()(KEY, {"bias": draw(3, k=k)})["bias"] for k in (1, 2))
    back = jpeft.adapt(swapped)((a, b))
    assert not any(map(is_leaf, back))
    np.testing.assert_array_equal(back[0], b.base)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(4, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.norm(self.up(x)))


def test_the_state_of_an_nnx_model_comes_back():
    graph, state = nnx.split(Net(nnx.Rngs(0)))

    def call(state, x):
        model = nnx.merge(graph, state)
        y = nnx.jit(lambda model, x: model(x))(model, x)
        return y, nnx.state(model)

    chain = jpeft.chain(
        jpeft.lora(rank=1, where="up/kernel"),
        jpeft.full("head/.*"),
        jpeft.bitfit(where="up/bias"),
    )
    params = chain(KEY, state)
    _, back = jpeft.adapt(call)(params, X)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    moved = lambda s: np.asarray(s["norm"]["mean"].get_value())
    assert not np.array_equal(moved(back), moved(params))  # a statistic went on


def test_linen_boxes_come_back_around_their_leaves():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_partitioning(nn.initializers.ones, ("in", "out"))
            return nn.Dense(3, kernel_init=init)(x)

    module = Model()
    base = module.init(KEY, X)
    chain = jpeft.chain(jpeft.full(".*kernel"), jpeft.bitfit())
    params = chain(KEY, base)
    _, back = jpeft.adapt(lambda v, x: (module.apply(v, x), v))(params, X)
    assert jax.tree.structure(back) == jax.tree.structure(params)


def test_the_full_value_is_made_where_it_is_used_and_not_handed_back():
    @jax.custom_vjp
    def product(p, x):
        return x @ p["up"]["kernel"], p

    product.defvjp(
        lambda p, x: (product(p, x), (p, x)),
        lambda kept, g: (g[1], g[0] @ kept[0]["up"]["kernel"].T),
    )
    params = jpeft.lora(rank=1, where="up/kernel")(KEY, {"up": BASE["up"]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", jpeft.DensifyWarning)
        _, back = jpeft.adapt(product, materialize="allow")(params, X)
    assert jax.tree.structure(back) == jax.tree.structure(params)
