"""Optax around and inside of our optimisers, and Flax's own for NNX."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from speed import slow_but

import jpeft

KEY = jax.random.key(4)

# Optax's own promotions need the standard rules.
pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((8, 6)), jnp.float32)
BASE = {
    "up": {
        "kernel": jnp.asarray(0.4 * RNG.standard_normal((6, 32)), jnp.float32),
        "bias": jnp.ones(32),
    },
    "down": {"kernel": jnp.asarray(0.4 * RNG.standard_normal((32, 6)), jnp.float32)},
}


@jpeft.adapt
def model(p, x):
    return jnp.tanh(x @ p["up"]["kernel"] + p["up"]["bias"]) @ p["down"]["kernel"]


def loss(p):
    return jnp.mean(jnp.square(model(p, X) - 1.0))


@functools.cache
def params_of(method):
    lora = jpeft.lora(rank=2)
    quantize = jpeft.quantize("int8", block_size="tensor", double=False)
    transforms = {
        "lora": lora,
        "qlora": jpeft.chain(quantize, lora),
        "adalora": jpeft.adalora(rank=2),
    }
    return transforms[method](KEY, BASE)


def bits(tree):
    """Of every array but random keys."""
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree) if not is_key(x)]


# --- transformations through `freeze` ------------------------------------------------

searching = lambda value, grad, value_fn, grad_fn: {
    "value": value,
    "grad": grad,
    "value_fn": value_fn,
}
valued = lambda value, grad, value_fn, grad_fn: {"value": value}
drawing = lambda value, grad, value_fn, grad_fn: {"grad_fn": grad_fn}
nothing = lambda value, grad, value_fn, grad_fn: {}
by_rank = lambda params: jax.tree.map(lambda x: x.ndim > 1, params)

# (the transformation, what its update is given)
TRANSFORMATIONS = {
    "lbfgs": (lambda: optax.lbfgs(), searching),
    "backtracking": (
        lambda: optax.chain(
            optax.sgd(1.0),
            optax.scale_by_backtracking_linesearch(5),
        ),
        searching,
    ),
    "polyak": (lambda: optax.polyak_sgd(), valued),
    "plateau": (
        lambda: optax.chain(optax.adam(1e-2), optax.contrib.reduce_on_plateau()),
        valued,
    ),
    "sam": (
        lambda: optax.contrib.sam(
            optax.sgd(1e-2), optax.sgd(1e-2), opaque_mode=True, sync_period=2
        ),
        drawing,
    ),
    "injected": (
        lambda: optax.inject_hyperparams(optax.adam)(learning_rate=1e-2),
        nothing,
    ),
    "accumulated": (lambda: optax.MultiSteps(optax.adam(1e-2), 2), nothing),
    "if_finite": (lambda: optax.apply_if_finite(optax.adam(1e-2), 3), nothing),
    "schedule_free": (
        lambda: optax.contrib.schedule_free(optax.sgd(1e-2), 1e-2),
        nothing,
    ),
    "averaged": (lambda: optax.chain(optax.adam(1e-2), optax.ema(0.9)), nothing),
    "masked_decay": (lambda: optax.adamw(1e-2, mask=by_rank), nothing),
    "prodigy": (lambda: optax.contrib.prodigy(), nothing),
    "muon": (lambda: optax.contrib.muon(1e-2), nothing),
    "adafactor": (lambda: optax.adafactor(1e-2), nothing),
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("method", slow_but(("qlora",), ("lora", "qlora")))
@pytest.mark.parametrize(
    "name", slow_but(("lbfgs", "sam", "if_finite"), TRANSFORMATIONS)
)
def test_a_frozen_tree_trains_as_its_trainable_half_does(name, method):
    make, extra = TRANSFORMATIONS[name]
    params, tx = params_of(method), jpeft.freeze(make())
    of_half = optax.with_extra_args_support(make())
    half, frozen = jpeft.partition(params)
    of_t = lambda t: loss(jpeft.combine(t, frozen))
    grad = lambda p, *_: jpeft.value_and_grad(loss)(p)[1]

    @jax.jit
    def both(p, s, t, st):
        value, g = jpeft.value_and_grad(loss)(p)
        u, s = tx.update(g, s, p, **extra(value, g, loss, grad))
        gt = jax.grad(of_t)(t)
        given = extra(value, gt, of_t, lambda t, *_: jax.grad(of_t)(t))
        ut, st = of_half.update(gt, st, t, **given)
        return optax.apply_updates(p, u), s, optax.apply_updates(t, ut), st

    state = (params, tx.init(params), half, of_half.init(half))
    for _ in range(3):
        state = both(*state)
    got, fixed = jpeft.partition(state[0])
    assert bits(fixed) == bits(frozen)
    assert bits(got) != bits(half)
    # The same float32 sums, fused another way; three steps may each round once more.
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(state[2]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_whole_gradients_are_taken_as_extra_arguments_too():
    params, tx = params_of("lora"), jpeft.freeze(optax.lbfgs())
    value, whole = jax.value_and_grad(loss)(params)
    half = jpeft.value_and_grad(loss)(params)[1]
    new = [
        jax.jit(functools.partial(tx.update, value_fn=loss))(
            g, tx.init(params), params, value=value, grad=g
        )[0]
        for g in (whole, half)
    ]
    assert bits(new[0]) == bits(new[1])


# --- optax.tree_map_params -----------------------------------------------------------

MASKED = lambda x: isinstance(x, optax.MaskedNode)
adam = functools.partial(optax.adam, 1e-3)
WRAPPERS = {
    "freeze": (lambda: jpeft.freeze(adam()), "lora"),
    "lora_plus": (lambda: jpeft.optim.lora_plus(adam()), "lora"),
    "offload": (lambda: jpeft.optim.offload(adam()), "lora"),
    "adalora_allocator": (
        lambda: jpeft.optim.adalora_allocator(adam(), target_rank=1, total_steps=9),
        "adalora",
    ),
    "partition": (
        lambda: optax.partition(
            {True: adam(), False: optax.set_to_zero()}, jpeft.trainable_mask
        ),
        "lora",
    ),
    "frozen_lora_plus": (
        lambda: jpeft.freeze(jpeft.optim.lora_plus(adam())),
        "lora",
    ),
}
WHOLE = ("freeze", "partition", "frozen_lora_plus")


@pytest.mark.parametrize("name", WRAPPERS)
def test_optax_maps_over_the_state_s_parameters(name):
    make, method = WRAPPERS[name]
    tx, whole = make(), params_of(method)
    half = jpeft.partition(whole)[0]
    params = whole if name in WHOLE else half
    state = tx.init(params)
    same = optax.tree_map_params(tx, lambda x: x, state)
    assert jax.tree.structure(same) == jax.tree.structure(state)
    assert bits(same) == bits(state)
    cast = optax.tree_map_params(tx, lambda x: x.astype(jnp.bfloat16), state)
    arrays = [x for x in jax.tree.leaves(cast) if x.dtype == jnp.bfloat16]
    assert len(arrays) == 2 * len(jax.tree.leaves(half))  # Adam's two moments
    others = [x for x in jax.tree.leaves(cast) if x.dtype != jnp.bfloat16]
    assert all(x.dtype != jnp.float32 or method == "adalora" for x in others)


@pytest.mark.parametrize("name", WRAPPERS)
def test_optax_gives_the_state_the_shardings_of_the_parameters(name):
    make, method = WRAPPERS[name]
    tx, whole = make(), params_of(method)
    mesh = jax.make_mesh((8,), ("m",), axis_types=(jax.sharding.AxisType.Auto,))
    over = jax.tree.map(lambda _: NamedSharding(mesh, P()), BASE)
    places = jpeft.sharding.shardings(whole, over)
    params = whole
    if name not in WHOLE:
        params, places = (jpeft.partition(x)[0] for x in (whole, places))
    state = tx.init(params)
    alone = NamedSharding(mesh, P())
    of_state = optax.tree_map_params(
        tx,
        lambda x, place: x if MASKED(x) else place,
        state,
        places,
        transform_non_params=lambda x: alone,
        is_leaf=MASKED,
    )
    placed = jax.device_put(state, of_state)
    assert jax.tree.structure(placed) == jax.tree.structure(state)
    assert all(x.sharding.mesh == mesh for x in jax.tree.leaves(placed))


# --- nnx.Optimizer -------------------------------------------------------------------


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(6, 8, rngs=rngs)
        self.down = nnx.Linear(8, 6, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(x)))


class Model(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([Block(rngs) for _ in range(2)])
        self.heads = nnx.Dict(one=nnx.Linear(6, 3, rngs=rngs))
        self.dropout = nnx.Dropout(0.1, deterministic=True, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.heads["one"](self.dropout(x))


forward = lambda model, x: model(x)


def nnx_model(transform):
    model = Model(nnx.Rngs(0))
    return transform(KEY, model, uses=jpeft.find_uses(forward, model, X))


NNX = {
    "lora": lambda: jpeft.lora(rank=2),
    "bitfit": lambda: jpeft.bitfit(),
    "lora_and_head": lambda: jpeft.chain(
        jpeft.lora(rank=2, where="layers/.*/kernel"), jpeft.full("heads/.*")
    ),
    "qlora": lambda: jpeft.chain(
        jpeft.quantize("int8", block_size="tensor", double=False), jpeft.lora(rank=2)
    ),
}


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", slow_but(("lora_and_head", "qlora"), NNX))
def test_an_nnx_optimizer_trains_what_the_filter_names(name):
    model = nnx_model(NNX[name]())
    wrt = jpeft.trainable_filter(model)
    half, frozen = jpeft.partition(model)
    assert len(jax.tree.leaves(nnx.state(model, wrt))) == len(jax.tree.leaves(half))
    _, own, rest = nnx.split(model, wrt, ...)
    assert len(jax.tree.leaves(own)) == len(jax.tree.leaves(half))
    before = bits(half), bits(frozen), jax.tree.structure(model)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=wrt)
    loss = lambda m, x: jnp.mean(jnp.square(jpeft.adapt(forward)(m, x) - 1.0))

    @nnx.jit
    def step(model, optimizer, x):
        argnums = nnx.DiffState(0, wrt)
        value, grads = nnx.value_and_grad(loss, argnums=argnums)(model, x)
        optimizer.update(model, grads)
        return value

    values = [float(step(model, optimizer, X)) for _ in range(3)]
    assert values[2] < values[1] < values[0]
    half, frozen = jpeft.partition(model)
    assert bits(frozen) == before[1] and jax.tree.structure(model) == before[2]
    assert all(a != b for a, b in zip(bits(half), before[0], strict=True))


def test_filters_of_equal_trees_are_equal():
    one, two = (jpeft.trainable_filter(nnx_model(NNX["lora"]())) for _ in range(2))
    assert one == two and hash(one) == hash(two)
    assert one != jpeft.trainable_filter(nnx_model(NNX["bitfit"]()))
    with pytest.raises(ValueError, match="nothing in this tree is trainable"):
        jpeft.trainable_filter(Model(nnx.Rngs(0)))


def test_freeze_in_an_nnx_optimizer_is_told_of_the_filter():
    model = nnx_model(jpeft.lora(rank=2))
    with pytest.raises(ValueError, match="without jpeft.freeze: nnx.Optimizer") as e:
        nnx.Optimizer(model, jpeft.freeze(optax.adam(1e-3)), wrt=nnx.Param)
    remedy = str(e.value).split("freeze: ")[1]
    made = eval(remedy, {"nnx": nnx, "optax": optax, "jpeft": jpeft, "model": model})
    assert isinstance(made, nnx.Optimizer)


@pytest.mark.parametrize("name", ["lora_plus", "adalora_allocator"])
def test_what_asks_the_leaves_is_used_without_an_nnx_optimizer(name):
    make, method = WRAPPERS[name]
    model = nnx_model(getattr(jpeft, method)(rank=2))
    tx = make()
    with pytest.raises(ValueError, match="nnx.Optimizer took the variables") as e:
        nnx.Optimizer(model, tx, wrt=jpeft.trainable_filter(model))
    remedy = str(e.value).split("state = ")[1].rstrip(")") + ")"
    eval(remedy, {"jpeft": jpeft, "model": model, "tx": tx})
