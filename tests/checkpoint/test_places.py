"""Every array goes where it is told, else beside its base."""

from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import jpeft
from jpeft.tree.paths import slots

KEY = jax.random.key(0)


def mesh():
    return jax.make_mesh((4,), ("m",), devices=jax.devices()[:4])


def base():
    """Names that Flax' attention and our own leaves have too."""
    kernel = lambda: {"kernel": jnp.ones((8, 8))}
    return {
        "attn": {
            "query": kernel(),
            "value": kernel(),
            "value_proj": {"value": kernel()},
        },
        "head": kernel(),
        "value": jnp.ones(8),
    }


LORA = jpeft.lora(rank=2, where="attn/.*")
BOTH = jpeft.chain(
    LORA, jpeft.lora(rank=3, where="attn/value/.*"), jpeft.full(["head/.*", "value"])
)
TRANSFORMS = {"lora": LORA, "both": BOTH, "full": jpeft.full(["head/.*", "value"])}


def saved(folder, transform, tree, **how):
    params = transform(KEY, tree, **how)
    jpeft.save(folder, params, transform)
    return params


def places(tree):
    return [x.sharding for x in jax.tree.leaves(jpeft.partition(tree)[0])]


@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_array_goes_where_it_is_told(name, tmp_path):
    params = saved(tmp_path / "a", TRANSFORMS[name], base())
    cut = NamedSharding(mesh(), P("m"))
    told = jpeft.sharding.shardings(params, jax.tree.map(lambda _: cut, base()))
    loaded = jpeft.load(tmp_path / "a", base(), shardings=told)
    mask = jpeft.trainable_mask(params)
    pairs = zip(*map(jax.tree.leaves, (mask, told)), strict=True)
    assert places(loaded) == [place for trains, place in pairs if trains]
    assert all(len(place.device_set) == 4 for place in places(loaded))


def test_each_adapter_on_one_weight_has_places_of_its_own(tmp_path):
    params = saved(tmp_path / "a", BOTH, base())
    whole = NamedSharding(mesh(), P())
    told = jax.tree.map(lambda _: whole, params)
    two = told["attn"]["value"]["kernel"]
    below = two.base.replace(b=NamedSharding(mesh(), P(None, "m")))
    told["attn"]["value"]["kernel"] = two.replace(base=below)
    leaf = jpeft.load(tmp_path / "a", base(), shardings=told)["attn"]["value"]["kernel"]
    assert leaf.b.sharding.spec == P() and leaf.base.b.sharding.spec == P(None, "m")


def test_boxes_are_looked_into(tmp_path):
    state = nnx.State({"value": {"kernel": nnx.Param(jnp.ones((8, 8)))}})
    t = jpeft.lora(rank=2)
    params = saved(tmp_path / "a", t, state)
    cut = NamedSharding(mesh(), P(None, "m"))
    told = jpeft.sharding.shardings(params, jax.tree.map(lambda _: cut, state))
    leaf = jpeft.load(tmp_path / "a", state, shardings=told)["value"]["kernel"]
    assert leaf.a[...].sharding.spec == P(None, None)
    assert leaf.b[...].sharding.spec == P(None, "m")


def test_one_sharding_is_for_all(tmp_path):
    saved(tmp_path / "a", BOTH, base())
    there = SingleDeviceSharding(jax.devices()[3])
    loaded = jpeft.load(tmp_path / "a", base(), shardings=there)
    assert set(places(loaded)) == {there}


@pytest.mark.parametrize("kind", ["device", "mesh"])
def test_an_adapter_goes_beside_its_base(kind, tmp_path):
    """On one device or on a mesh that is neither the first nor all."""
    device = jax.devices()[2]
    spread = jax.make_mesh((2,), ("x",), devices=jax.devices()[2:4])
    place = {
        "device": SingleDeviceSharding(device),
        "mesh": NamedSharding(spread, P("x")),
    }[kind]
    here = jax.device_put(base(), place)
    params = saved(tmp_path / "a", BOTH, here)
    loaded = jpeft.load(tmp_path / "a", here)
    assert places(loaded) == places(params)
    for s in places(loaded):
        assert s.device_set == place.device_set
    fn = lambda p, x: x @ p["attn"]["value"]["kernel"] @ p["head"]["kernel"]
    whole = place if kind == "device" else NamedSharding(spread, P())
    x = jax.device_put(np.ones((2, 8), np.float32), whole)
    jax.block_until_ready(jpeft.adapt(fn)(loaded, x))


def test_what_was_put_nowhere_stays_free_to_move(tmp_path):
    """As a fresh adapter does where the batch alone is on a mesh."""
    for here in (base(), jax.tree.map(np.asarray, base())):
        params = saved(tmp_path / str(type(here["value"])), BOTH, here)
        loaded = jpeft.load(tmp_path / str(type(here["value"])), here)
        for x in jax.tree.leaves(jpeft.partition(loaded)[0]):
            assert not x.committed
        fn = lambda p, x: x @ p["head"]["kernel"]
        batch = jax.device_put(jnp.ones((4, 8)), NamedSharding(mesh(), P("m")))
        for p in (params, loaded):
            assert len(jax.jit(jpeft.adapt(fn))(p, batch).sharding.device_set) == 4


def test_restore_has_the_same_means(tmp_path):
    params = BOTH(KEY, base())
    manager = jpeft.CheckpointManager(tmp_path / "run", BOTH)
    manager.save(1, params)
    there = SingleDeviceSharding(jax.devices()[3])
    loaded, _, _ = manager.restore(base(), shardings=there)
    assert set(places(loaded)) == {there}
    here = jax.device_put(base(), jax.devices()[2])
    loaded, _, _ = manager.restore(here)
    assert places(loaded) == places(BOTH(KEY, here))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base())
    with pytest.raises(jpeft.CheckpointError, match="allow='dtype'"):
        manager.restore(half)
    manager.restore(half, allow="dtype")
    manager.restore({"params": base()}, names={"params/(.*)": r"\1"})
    manager.restore(jax.eval_shape(base), check="structure")


def test_statistics_stay_where_they_are(tmp_path):
    there = SingleDeviceSharding(jax.devices()[2])
    tree = base() | {"bn": {"mean": jnp.zeros(8), "var": jnp.ones(8)}}
    here = jax.device_put(tree, there)
    saved(tmp_path / "a", LORA, here)
    loaded = jpeft.load(tmp_path / "a", here)
    assert loaded["bn"]["mean"].sharding == there
    loaded = jpeft.load(tmp_path / "a", tree)
    assert not loaded["bn"]["var"].committed


def test_what_has_grown_is_cut_as_its_base_is(tmp_path):
    """Eleven rows do not divide, twenty do."""
    head = lambda n: {"head": {"kernel": jnp.ones((8, n))}}
    t = jpeft.lora(rank=2)
    saved(tmp_path / "a", t, head(11))
    here = jax.device_put(head(20), NamedSharding(mesh(), P(None, "m")))
    leaf = jpeft.load(tmp_path / "a", here, allow="vocabulary")["head"]["kernel"]
    assert leaf.b.sharding.spec == P(None, "m") and leaf.b.shape == (2, 20)
    there = SingleDeviceSharding(jax.devices()[1])
    loaded = jpeft.load(tmp_path / "a", here, allow="vocabulary", shardings=there)
    assert set(places(loaded)) == {there}


def test_a_quantised_base_and_its_adapter_are_on_one_device(tmp_path):
    plain = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(64, 8)))}
    t = jpeft.chain(jpeft.quantize("nf4"), jpeft.lora(rank=2))
    saved(tmp_path / "a", t, plain)
    there = jax.devices()[2]
    for here in (plain, jpeft.quantize("nf4")(KEY, plain)):
        loaded = jpeft.load(tmp_path / "a", jax.device_put(here, there))
        for x in jax.tree.leaves(loaded):
            assert x.devices() == {there}


def test_paths_of_places_are_told_apart(tmp_path):
    two = {
        "a/b": {"kernel": jnp.ones((8, 8))},
        "a": {"b": {"kernel": jnp.ones((8, 8))}},
    }
    t = jpeft.lora(rank=2)
    params = saved(tmp_path / "a", t, two)
    devices = iter(jax.devices())
    told = jax.tree.map(lambda _: SingleDeviceSharding(next(devices)), params)
    loaded = jpeft.load(tmp_path / "a", two, shardings=told)
    for leaf, place in zip(slots(loaded).values, slots(told).values, strict=True):
        assert (leaf.a.sharding, leaf.b.sharding) == (place.a, place.b)


def test_places_of_a_base_are_found_by_their_paths():
    """Two dictionaries of one content may have another order."""
    tree = OrderedDict(b={"kernel": jnp.ones((8, 4))}, a={"kernel": jnp.ones((8, 4))})
    on = {n: NamedSharding(mesh(), P(m)) for n, m in (("a", "m"), ("b", None))}
    there = SingleDeviceSharding(jax.devices()[1])
    params = jpeft.lora(rank=2)(KEY, tree)
    told = jpeft.sharding.shardings(params, {n: {"kernel": on[n]} for n in "ab"})
    assert told["a"]["kernel"].base == on["a"] and told["b"]["kernel"].base == on["b"]
    assert set(jax.tree.leaves(jpeft.sharding.shardings(params, there))) == {there}
    with pytest.raises(
        ValueError, match=r"b/kernel has none among 1 .* \['a/kernel'\]"
    ):
        jpeft.sharding.shardings(params, {"a": {"kernel": there}})
