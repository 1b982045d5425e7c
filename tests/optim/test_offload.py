"""The state is on the host, the updates are the same bits, the peak is lower."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from draws import normal
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jpeft
from jpeft.optim.offload import HOST_KIND, check_host_memory, joined

# Every array that is not a scalar moves, however small.
offload = functools.partial(jpeft.optim.offload, min_size=1)
matrices_only = lambda params: jax.tree.map(lambda x: x.ndim > 1, params)
by_rank = lambda params: jax.tree.map(lambda x: str(x.ndim), params)

# Optax's own promotions need the standard rules.
pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


TRANSFORMATIONS = {
    "adam": lambda: optax.adam(1e-2),
    "adamw_masked": lambda: optax.adamw(1e-2, mask=matrices_only),
    "clip_then_adamw_on_a_schedule": lambda: optax.chain(
        optax.clip_by_global_norm(0.1),
        optax.adamw(optax.cosine_decay_schedule(1e-2, 10)),
    ),
    "momentum": lambda: optax.sgd(1e-1, momentum=0.9),
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=2),
    "lamb": lambda: optax.lamb(1e-2),
    "hyperparameters_in_the_state": lambda: optax.inject_hyperparams(optax.adamw)(
        optax.linear_schedule(1e-2, 0.0, 5)
    ),
    "one_for_each_rank": lambda: optax.partition(
        {
            "1": optax.sgd(1e-2, momentum=0.5),
            "2": optax.adam(1e-2),
            "0": optax.set_to_zero(),
        },
        by_rank,
    ),
    "noise_from_a_key": lambda: optax.chain(
        optax.add_noise(0.1, 0.5, jax.random.key(4)), optax.adam(1e-2)
    ),
}


def weights():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "up": {"kernel": jax.random.normal(keys[0], (7, 5)), "frozen": None},
        "down": {"kernel": jax.random.normal(keys[1], (5, 3)), "bias": jnp.ones(3)},
        "gain": jnp.float32(2.0),
    }


def loss(p, x):
    h = jnp.tanh(x @ p["up"]["kernel"])
    out = h @ p["down"]["kernel"] + p["down"]["bias"][None]
    return p["gain"] * jnp.mean(jnp.square(out - 1.0))


def batch(k):
    return normal(k, 4, 7)


def train(tx, params, of=loss, steps=5, **options):
    state = tx.init(params)

    def step(params, state, x):
        grads = jax.grad(of)(params, x)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    if options.pop("places", False):
        where = jax.tree.map(lambda x: x.sharding, (params, state))
        options["out_shardings"] = where
        params, state = jax.device_put((params, state), where)
    step = jax.jit(step, **options)
    for k in range(steps):
        params, state = step(params, state, batch(k))
    if "out_shardings" in options:
        assert step._cache_size() == 1
    return params, state


def is_key(x):
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def bits(tree):
    plain = lambda x: jax.random.key_data(x) if is_key(x) else x
    return [np.asarray(plain(x)).tobytes() for x in jax.tree.leaves(tree)]


def check_places(state):
    """Arrays on the host, scalars and keys on the device; some array there is."""
    arrays = jax.tree.leaves(state)
    assert any(x.ndim for x in arrays)
    for x in arrays:
        wanted = HOST_KIND if x.ndim and not is_key(x) else "device"
        assert x.sharding.memory_kind == wanted


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_five_steps_are_the_same_bits_and_the_state_stays_on_the_host(name):
    tx = TRANSFORMATIONS[name]()
    check_places(offload(tx).init(weights()))
    want = train(tx, weights())
    got = train(offload(tx), weights())
    chex.assert_trees_all_equal_structs(got, want)
    assert bits(got) == bits(want)
    check_places(got[1])
    assert bits(want[0]) != bits(weights())


def test_donated_state_is_used_up_and_comes_back_on_the_host():
    tx = optax.adamw(1e-2)
    want = train(tx, weights())
    got = train(offload(tx), weights(), donate_argnums=(0, 1), places=True)
    assert bits(got) == bits(want)
    check_places(got[1])


def test_inside_and_around_freeze():
    params = {"dense": {"kernel": jnp.ones((7, 5)), "bias": jnp.ones(5)}}
    params = jpeft.lora(rank=2)(jax.random.key(1), params)
    fn = lambda p, x: x @ p["dense"]["kernel"] + p["dense"]["bias"][None]
    of = lambda p, x: jnp.mean(jnp.square(jpeft.adapt(fn)(p, x)))
    want = train(jpeft.freeze(optax.adam(1e-2)), params, of)
    for tx in (
        jpeft.freeze(offload(optax.adam(1e-2))),
        offload(jpeft.freeze(optax.adam(1e-2))),
    ):
        got = train(tx, params, of)
        assert bits(got) == bits(want)
        check_places(got[1])
        assert bits(jpeft.unload(got[0])) == bits(jpeft.unload(params))


def test_on_the_trainable_half_of_a_partition():
    params = jpeft.lora(rank=2)(jax.random.key(1), {"kernel": jnp.ones((7, 5))})
    trainable, frozen = jpeft.partition(params)
    fn = jpeft.adapt(lambda p, x: x @ p["kernel"])
    of = lambda t, x: jnp.mean(jnp.square(fn(jpeft.combine(t, frozen), x)))
    want = train(optax.adam(1e-2), trainable, of)
    got = train(offload(optax.adam(1e-2)), trainable, of)
    assert bits(got) == bits(want)
    check_places(got[1])


@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
def test_the_state_keeps_the_sharding_of_its_weight(axis_type):
    kind = jax.sharding.AxisType[axis_type]
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    with jax.set_mesh(mesh):
        place = NamedSharding(mesh, P(None, "model"))
        params = {k: jax.device_put(normal(n, 7, 6), place) for n, k in enumerate("ab")}
        of = lambda p, x: jnp.mean(jnp.square(jnp.tanh(x @ p["a"]) - x @ p["b"]))
        want = train(optax.adam(1e-2), params, of)
        tx = offload(optax.adam(1e-2))
        got = train(tx, params, of, donate_argnums=1, places=True)
    for x in jax.tree.leaves((tx.init(params)[0].mu, got[1][0].mu)):
        assert x.sharding == place.with_memory_kind(HOST_KIND)
    assert bits(got) == bits(want)


def test_init_under_jit_leaves_the_state_on_the_host():
    state = jax.jit(offload(optax.adam(1e-2)).init)(weights())
    check_places(state)


@pytest.mark.slow
def test_a_scan_over_steps_carries_the_state_on_the_host():
    tx, params = offload(optax.adam(1e-2)), weights()
    want = train(optax.adam(1e-2), params)

    @jax.jit
    def run(params, state, xs):
        def step(carry, x):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params, x), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), xs)[0]

    got = run(params, tx.init(params), jnp.stack([batch(k) for k in range(5)]))
    assert bits(got) == bits(want)
    check_places(got[1])


def test_small_arrays_stay_on_the_device():
    state = jpeft.optim.offload(optax.adam(1e-2), min_size=16).init(weights())
    assert state[0].mu["up"]["kernel"].sharding.memory_kind == HOST_KIND  # 35
    assert state[0].mu["down"]["kernel"].sharding.memory_kind == "device"  # 15


def test_extra_arguments_reach_the_transformation():
    def update(updates, state, params=None, *, factor, rule):
        return jax.tree.map(lambda g, m: rule(g, m) * factor, updates, state), state

    tx = optax.GradientTransformationExtraArgs(lambda p: p, update)
    grads, params = {"a": jnp.ones((7, 5))}, {"a": jnp.full((7, 5), 3.0)}
    tx = offload(tx)
    step = jax.jit(lambda s, f: tx.update(grads, s, params, factor=f, rule=jnp.add))
    updates, _ = step(tx.init(params), 2.0)
    np.testing.assert_array_equal(updates["a"], 8.0)


def test_what_couples_weights_may_stand_around_it():
    make = lambda wrap: optax.MultiSteps(
        optax.chain(wrap(optax.adam(1e-2)), optax.clip_by_global_norm(0.1)), 2
    ).gradient_transformation()
    want = train(make(lambda tx: tx), weights())
    got = train(make(offload), weights())
    assert bits(got) == bits(want)


@pytest.mark.parametrize(
    ("make", "primitive"),
    [
        (
            lambda: optax.chain(optax.adam(1e-2), optax.clip_by_global_norm(0.1)),
            "add",
        ),
        (lambda: optax.MultiSteps(optax.adam(1e-2), 2), "cond"),
        (lambda: optax.apply_if_finite(optax.adam(1e-2), 3), "cond"),
    ],
)
def test_a_transformation_that_mixes_the_state_of_weights_is_refused(make, primitive):
    message = f"offload: `{primitive}` at .*optax.* of several weights.*around offload"
    with pytest.raises(ValueError, match=message):
        train(offload(make()), weights())


def test_a_backend_without_host_memory_is_refused_with_a_remedy():
    class Memory:
        kind = "device"

    class Device:
        platform = "toaster"
        addressable_memories = staticmethod(lambda: [Memory()])

    with pytest.raises(ValueError, match=r"toaster.*no pinned_host.*without offload"):
        check_host_memory(Device())


def test_groups_join_what_meets_in_one_set():
    sets = [frozenset("ab"), frozenset(), frozenset("c"), frozenset("ad")]
    assert joined("abcde", sets) == [frozenset("abd"), frozenset("c")]


def barriers(jaxpr):
    """How many weights' states pass each barrier of a program."""
    return [
        sum(v.aval.memory_space == jax.memory.Space.Host for v in e.invars)
        for e in jaxpr.eqns
        if e.primitive.name == "optimization_barrier"
    ]


def test_each_weight_waits_for_the_one_before():
    tx, params = offload(optax.adam(1e-2)), weights()
    state = tx.init(params)
    program = jax.make_jaxpr(lambda g, s: tx.update(g, s, params))(params, state)
    # Three weights that are no scalars: two moments in, two of the one before back.
    assert barriers(program.jaxpr) == [2, 4, 4]


@pytest.mark.slow
def test_the_tpu_compiler_holds_few_moments_at_once(monkeypatch):
    """32 weights of 4 MB: Adam's moments are 256 MB, and on the device 20 % of that,
    however many weights there are."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("data",))
    plain = optax.adam(1e-3)

    def all_at_once(grads, state, params):
        to = lambda space: lambda x: jax.device_put(x, space) if x.ndim else x
        state = jax.tree.map(to(jax.memory.Space.Device), state)
        updates, state = plain.update(grads, state, params)
        return updates, jax.tree.map(to(jax.memory.Space.Host), state)

    def compiled(update, host):
        def place(x):
            kind = HOST_KIND if host and x.ndim else "device"
            sharding = NamedSharding(mesh, P(), memory_kind=kind)
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        shape = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
        params = {str(k): shape for k in range(32)}
        state = jax.tree.map(place, jax.eval_shape(plain.init, params))
        params = jax.tree.map(
            lambda x: place(x).update(sharding=NamedSharding(mesh, P())), params
        )

        def step(params, state, grads):
            updates, state = update(grads, state, params)
            return optax.apply_updates(params, updates), state

        where = jax.tree.map(lambda x: x.sharding, (params, state))
        step = jax.jit(step, donate_argnums=(0, 1), out_shardings=where)
        return step.lower(params, state, params).compile().memory_analysis()

    state_bytes = 2 * 32 * 4 * 2**20
    usual = compiled(plain.update, False)
    naive = compiled(all_at_once, True)
    ours = compiled(offload(plain).update, True)
    assert usual.argument_size_in_bytes - ours.argument_size_in_bytes >= state_bytes
    assert ours.host_argument_size_in_bytes == state_bytes
    assert ours.host_alias_size_in_bytes == state_bytes
    assert naive.temp_size_in_bytes > state_bytes  # nothing is gained
    assert ours.temp_size_in_bytes < 0.3 * state_bytes
