"""First values: the bits of `jax.random`'s own arrays, for fewer compilations."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from every_method import KEY, METHODS, attached, bits
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from speed import slow_but

import jpeft
from jpeft.finite import all_finite
from jpeft.leaves import draw as drawing
from jpeft.leaves.draw import drawn, filled

DRAWS = {
    "normal": lambda k, s: jax.random.normal(k, s, jnp.float32) / 3.0,
    "uniform": lambda k, s: jax.random.uniform(k, s, jnp.float32, -0.3, 0.3),
    "truncated": lambda k, s: jax.random.truncated_normal(k, -2.0, 2.0, s, jnp.float32),
    "normal in bfloat16": lambda k, s: jax.random.normal(k, s, jnp.bfloat16),
    "uniform in float16": lambda k, s: jax.random.uniform(k, s, jnp.float16, -1, 1),
}
SHAPES = [(3, 7, 5), (3, 683)]  # 105 entries; 2,049: one more than the least room


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("draw", slow_but(("normal", "uniform"), DRAWS))
def test_an_array_has_the_bits_of_one_drawn_in_its_shape(draw, shape):
    want = DRAWS[draw](KEY, shape)
    got = drawn(DRAWS[draw], KEY, shape)
    assert got.dtype == want.dtype and got.shape == shape
    assert np.asarray(got).tobytes() == np.asarray(want).tobytes()


@pytest.mark.parametrize(
    "key",
    [
        pytest.param(jax.random.PRNGKey(5), id="an array of words"),
        pytest.param(jax.random.key(5, impl="rbg"), id="another generator"),
    ],
)
def test_any_key_gives_the_bits_of_jax(key):
    want = DRAWS["uniform"](key, (2, 3, 5))
    got = drawn(DRAWS["uniform"], key, (2, 3, 5))
    assert np.asarray(got).tobytes() == np.asarray(want).tobytes()


@pytest.mark.parametrize("partitionable", [True, False])
def test_bits_are_those_of_the_generator_in_force(partitionable):
    with threefry(partitionable):
        want = DRAWS["uniform"](KEY, (3, 7, 5))
        got = drawn(DRAWS["uniform"], KEY, (3, 7, 5))
    assert np.asarray(got).tobytes() == np.asarray(want).tobytes()


@contextlib.contextmanager
def threefry(partitionable):
    before = jax.config.jax_threefry_partitionable
    jax.config.update("jax_threefry_partitionable", partitionable)
    try:
        yield
    finally:
        jax.config.update("jax_threefry_partitionable", before)


def test_an_array_is_where_one_drawn_in_its_shape_would_be():
    device = jax.devices()[1]
    key = jax.device_put(KEY, device)
    got = drawn(DRAWS["uniform"], key, (3, 7, 5))
    assert got.committed and got.devices() == {device}
    free = drawn(DRAWS["uniform"], KEY, (3, 7, 5))
    assert not free.committed and not filled((3, 7), 1, jnp.float32).committed
    assert np.asarray(got).tobytes() == np.asarray(free).tobytes()
    mesh = jax.make_mesh((8,), ("m",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        got = drawn(DRAWS["uniform"], KEY, (3, 7, 5))
        want = DRAWS["uniform"](KEY, (3, 7, 5))
        assert jax.typeof(got) == jax.typeof(want)
        ones = filled((3, 7), 1, jnp.float32)
        assert jax.typeof(ones) == jax.typeof(jnp.ones((3, 7)))
        assert ones.sharding == jnp.ones((3, 7)).sharding
    assert np.asarray(got).tobytes() == np.asarray(free).tobytes()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_filled_array_is_jax_s_own(dtype):
    got, want = filled((3, 2), 0.8, dtype), jnp.full((3, 2), 0.8, dtype)
    assert got.dtype == want.dtype and got.weak_type == want.weak_type
    assert np.asarray(got).tobytes() == np.asarray(want).tobytes()
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    np.testing.assert_array_equal(step(got), want + 1)
    program = jax.make_jaxpr(lambda: filled((3, 2), 0.8, dtype))()
    assert not program.consts  # nothing of its size is written into a program


@pytest.mark.parametrize("method", slow_but(("lora", "adapter_houlsby"), METHODS))
def test_a_method_s_bits_are_those_drawn_in_shape(method, monkeypatch):
    name = METHODS[method].forms + "scan_remat"
    got = bits(attached(method, name))
    monkeypatch.setattr(drawing, "_COUNTS", "")  # every draw in its own shape
    monkeypatch.setattr(drawing, "_is_free", lambda x: False)
    assert got == bits(attached(method, name))


# --- the cost ------------------------------------------------------------------------


def test_seven_stacked_kernels_are_attached_for_five_compilations():
    """The generator's key, one draw, its division, and two casts of a number."""
    sizes = {"query": (11, 3, 5), "key": (11, 1, 5), "value": (11, 1, 5)}
    sizes |= {"out": (3, 5, 11), "gate": (11, 29), "up": (11, 29), "down": (29, 11)}
    rng = np.random.default_rng(0)
    base = {
        n: {"kernel": jnp.asarray(rng.standard_normal((13, *s), np.float32))}
        for n, s in sizes.items()
    }
    axes = {"query": "sioo", "key": "sioo", "value": "sioo", "out": "siio"}
    uses = {
        f"{n}/kernel": jpeft.tree.layout.LeafUse(
            f"{n}/kernel", (13, *s), "linear", axes.get(n, "sio")
        )
        for n, s in sizes.items()
    }
    with compilations() as count:
        jpeft.lora(rank=3)(KEY, base, uses=uses)
    assert len(count) <= 5  # less, where a test before this one compiled some of them


@contextlib.contextmanager
def compilations():
    """A list that grows by one for each program compiled (or found on the disk)."""
    found: list[str] = []
    note = lambda event, _, **more: (
        found.append(event) if event.endswith("backend_compile_duration") else None
    )
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


# --- NaN and infinity ----------------------------------------------------------------

FLOATS = [jnp.float32, jnp.float16, jnp.bfloat16, jnp.float8_e5m2]


@pytest.mark.parametrize("dtype", FLOATS)
def test_one_entry_that_is_not_finite_is_found(dtype):
    x = np.zeros((3, 5), dtype)
    assert all_finite(x) and all_finite(jnp.asarray(x))
    for bad in (np.nan, np.inf, -np.inf):
        x[2, 1] = bad
        assert not all_finite(x) and not all_finite(x.T)
        assert not all_finite(jnp.asarray(x))


@pytest.mark.parametrize("spec", [P("m"), P(None, "m"), P()])
@pytest.mark.parametrize("kind", ["device", "pinned_host"])
def test_it_is_found_in_any_shard_wherever_the_array_lies(spec, kind):
    mesh = jax.make_mesh((8,), ("m",), axis_types=(AxisType.Auto,))
    place = NamedSharding(mesh, spec, memory_kind=kind)
    x = np.zeros((8, 16), np.float32)
    with compilations() as count:
        assert all_finite(jax.device_put(x, place))
        x[7, 15] = np.inf
        assert not all_finite(jax.device_put(x, place))
    assert not count


def test_a_device_s_memory_is_asked_there(monkeypatch):
    monkeypatch.setattr("jpeft.finite._on_this_host", lambda x: False)
    x = jnp.zeros((3, 5))
    assert all_finite(x) and not all_finite(x.at[1, 2].set(jnp.nan))
    jax.eval_shape(lambda: pytest.fail("read") if not all_finite(x) else x)


def test_a_large_array_is_read_a_piece_at_a_time():
    x = np.zeros((2, 1 << 20), np.float32)
    assert all_finite(x)
    x[1, -1] = np.nan
    assert not all_finite(x)
