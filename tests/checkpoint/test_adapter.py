"""Adapters on disk: only the adapter, self-describing, refused on anything odd."""

import json
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from draws import normal

import jpeft
from jpeft.checkpoint.sealed import seal

KEY = jax.random.key(0)


def base():
    return {
        "dense": {"kernel": jnp.arange(35.0).reshape(7, 5), "bias": jnp.ones(5)},
        "mixer/linear.0": {"w": jnp.ones((5, 7), jnp.bfloat16)},
        "head": {"kernel": jnp.ones((5, 3))},
        "steps": jnp.int32(4),
    }


def peft():
    return jpeft.chain(
        jpeft.lora(rank=2, exclude="head/.*"), jpeft.full("head/.*"), jpeft.bitfit()
    )


@pytest.fixture
def saved(tmp_path):
    params = peft()(KEY, base())
    jpeft.save(tmp_path / "a", params, peft(), step=7, metadata={"note": "x"})
    return tmp_path / "a", params


def refused(parts, f):
    with pytest.raises(jpeft.CheckpointError) as error:
        f()
    for part in parts:
        assert part in str(error.value), str(error.value)


def test_it_loads_without_the_transform(saved):
    folder, params = saved
    again = jpeft.load(folder, base())
    assert jax.tree.structure(again) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True):
        assert a.dtype == b.dtype and np.array_equal(a, b)
    about = json.loads((folder / "jpeft.json").read_text())
    assert about["step"] == 7 and about["metadata"] == {"note": "x"}
    assert jpeft.from_config(about["transform"]) == peft()


def test_names_in_the_file_do_not_meet(tmp_path):
    """Orbax joins keys at '.' and '/', which are written otherwise there."""
    kernel = lambda k: {
        "kernel": jnp.asarray(np.random.default_rng(k).normal(size=(4, 4)))
    }
    odd = ("a:b", "a.b", "a%3Ab", "a%2Eb", "a/b", "a%2Fb", "a:b:0", "a b", "ä")
    tree = {n: kernel(k) for k, n in enumerate(odd)} | {"a": {"b": kernel(99)}}
    transform = jpeft.lora(rank=2, init="pissa")  # A and B are each weight's own
    params = transform(KEY, tree)
    jpeft.save(tmp_path / "a", params, transform)
    again = jpeft.load(tmp_path / "a", tree)
    for a, b in zip(*map(jax.tree.leaves, (again, params)), strict=True):
        assert np.array_equal(a, b)


def test_only_the_adapter_is_written(tmp_path):
    params = {"kernel": jax.random.normal(KEY, (512, 1024))}
    params = jpeft.lora(rank=1)(KEY, params)
    jpeft.save(tmp_path / "a", params, jpeft.lora(rank=1))
    size = sum(p.stat().st_size for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert size < 40_000  # the base has 2 MB


def test_an_existing_folder_is_not_overwritten_unasked(saved):
    folder, params = saved
    with pytest.raises(FileExistsError, match="overwrite=True"):
        jpeft.save(folder, params, peft())
    jpeft.save(folder, params, peft(), overwrite=True)
    jpeft.load(folder, base())


def test_another_transform_is_refused(tmp_path):
    params = peft()(KEY, base())
    with pytest.raises(
        ValueError, match="was adapted by bitfit-.*, not by the transform"
    ):
        jpeft.save(tmp_path / "a", params, jpeft.lora(rank=3))
    with pytest.raises(ValueError, match="nothing in this tree is trainable"):
        jpeft.save(tmp_path / "a", base(), peft())


def test_other_values_in_the_base_are_refused_by_name(saved):
    folder, _ = saved
    other = base()
    other["dense"]["kernel"] = other["dense"]["kernel"].at[3, 3].add(1e-3)
    refused(["dense/kernel has other values"], lambda: jpeft.load(folder, other))
    jpeft.load(folder, other, check="structure")


def test_the_base_of_a_whole_leaf_may_differ(saved):
    """A new head is drawn anew in every process; its first value plays no part."""
    folder, _ = saved
    other = base()
    other["head"]["kernel"] = other["head"]["kernel"] + 1.0
    jpeft.load(folder, other)


def test_another_shape_dtype_or_tree_is_refused_by_name(saved):
    folder, params = saved
    other = base()
    other["dense"]["bias"] = jnp.ones(6)
    refused(
        ["dense/bias has shape [6], saved was [5]"], lambda: jpeft.load(folder, other)
    )
    other = base()
    other["dense"]["bias"] = jnp.ones(5, jnp.bfloat16)
    refused(["dense/bias has dtype bfloat16"], lambda: jpeft.load(folder, other))
    other = base()
    del other["dense"]["bias"]
    refused(["dense/bias is missing"], lambda: jpeft.load(folder, other))
    other = base() | {"more": jnp.ones(3)}
    refused(["more is not in the saved base"], lambda: jpeft.load(folder, other))
    with pytest.raises(ValueError, match="carries adapters already"):
        jpeft.load(folder, params)


def edit(folder, f):
    file = folder / "jpeft.json"
    about = json.loads(file.read_text())
    about.pop("sha256")
    f(about)
    file.write_text(seal(about))


def test_a_changed_rank_is_refused(saved):
    folder, _ = saved

    def change(about):
        about["leaves"]["dense/kernel"][0]["arrays"]["a"]["shape"] = [7, 3]

    edit(folder, change)
    with pytest.raises(jpeft.CheckpointError):
        jpeft.load(folder, base())


def test_a_missing_leaf_is_refused(saved):
    folder, _ = saved
    edit(folder, lambda m: m["leaves"]["dense/kernel"][0]["arrays"].pop("b"))
    with pytest.raises(jpeft.CheckpointError):
        jpeft.load(folder, base())


def test_a_newer_format_and_an_unknown_kind_are_refused(saved):
    folder, _ = saved
    edit(folder, lambda m: m["leaves"]["dense/kernel"][0].update(kind="Lowrank"))
    refused(["'Lowrank'", "LowRank"], lambda: jpeft.load(folder, base()))
    edit(folder, lambda m: m.update(version=99))
    refused(["format 99", "upgrade"], lambda: jpeft.load(folder, base()))


def test_a_truncated_folder_is_refused(saved, tmp_path):
    folder, params = saved
    harmless = set()
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        copy, name = tmp_path / "copy", file.relative_to(folder)
        for damage in (
            lambda f: f.unlink(),
            lambda f: f.write_bytes(f.read_bytes()[:9]),
        ):
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(folder, copy)
            damage(copy / name)
            try:
                again = jpeft.load(copy, base())
            except jpeft.CheckpointError as error:
                assert str(copy) in str(error)
                continue
            # Orbax keeps files it does not read again; what loads must be right.
            for a, b in zip(
                jax.tree.leaves(again), jax.tree.leaves(params), strict=True
            ):
                assert np.array_equal(a, b), name
            harmless.add(name.name)
    assert "jpeft.json" not in harmless
    # Without the root of its store Orbax finds nothing.
    (folder / "arrays" / "manifest.ocdbt").unlink()
    refused(["manifest.ocdbt: missing"], lambda: jpeft.load(folder, base()))
    refused(["no such folder"], lambda: jpeft.load(tmp_path / "none", base()))
    (tmp_path / "empty").mkdir()
    refused(["jpeft.json is missing"], lambda: jpeft.load(tmp_path / "empty", base()))
    (folder / "jpeft.json").write_text("{")
    refused(["damaged"], lambda: jpeft.load(folder, base()))


def test_flipped_bits_are_caught(tmp_path):
    params = jpeft.lora(rank=8)(KEY, {"kernel": jax.random.normal(KEY, (256, 128))})
    plain = jpeft.unload(params)
    jpeft.save(tmp_path / "a", params, jpeft.lora(rank=8))
    data = [p for p in (tmp_path / "a").rglob("*") if "/d/" in str(p) and p.is_file()]
    file = max(data, key=lambda p: p.stat().st_size)
    good, draw = file.read_bytes(), random.Random(0)
    for _ in range(8):
        bad = bytearray(good)
        # The middle of the file is array data; the ends are Orbax's own index.
        bad[draw.randrange(len(bad) // 4, len(bad) // 2)] ^= 1 << draw.randrange(8)
        file.write_bytes(bytes(bad))
        refused([str(tmp_path)], lambda: jpeft.load(tmp_path / "a", plain))


def test_digests_do_not_depend_on_sharding():
    from jpeft.checkpoint.digest import digests

    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.random.normal(KEY, (16, 24))
    spread = jax.device_put(
        x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
    )
    assert digests({"x": x}) == digests({"x": spread})
    swapped = x.at[0, 0].set(x[0, 1]).at[0, 1].set(x[0, 0])
    assert digests({"x": x}) != digests({"x": swapped})
    for dtype in (jnp.bfloat16, jnp.int8, jnp.bool_, jnp.uint32, jnp.int4):
        digests({"x": jnp.ones((3, 5)).astype(dtype)})
    digests({"x": KEY})


def test_a_run_is_restored_whole(tmp_path):
    params = peft()(KEY, base())
    trainable, _ = jpeft.partition(params)
    with jax.numpy_dtype_promotion("standard"):
        tx = optax.adam(1e-3)
        state = {"opt": tx.init(trainable), "key": jax.random.key(5)}
    manager = jpeft.CheckpointManager(tmp_path / "run", peft(), max_to_keep=2)
    assert manager.latest_step() is None
    refused(["no checkpoint"], lambda: manager.restore(base(), state))
    for step in (1, 2, 10):
        manager.save(step, params, state=state, metadata={"epoch": step})
    assert manager.steps() == [2, 10]
    fresh = {"opt": tx.init(trainable), "key": jax.random.key(0)}
    got, restored, metadata = manager.restore(base(), fresh)
    assert metadata == {"epoch": 10}
    assert jax.random.key_data(restored["key"])[1] == 5
    assert jax.tree.structure(got) == jax.tree.structure(params)
    refused(
        ["another structure", "['key']"],
        lambda: manager.restore(base(), {"opt": fresh["opt"]}),
    )
    refused(["step 3", "[2, 10]"], lambda: manager.restore(base(), fresh, step=3))
    file = tmp_path / "run" / "00000010" / "state" / "manifest.ocdbt"
    file.unlink()
    refused([str(file), "missing"], lambda: manager.restore(base(), fresh, step=10))
    manager.restore(base(), fresh, step=2)


def test_a_base_that_comes_quantised_is_as_the_adapter_met_it(tmp_path):
    plain = {"kernel": jax.random.normal(KEY, (64, 256))}
    t = jpeft.chain(jpeft.quantize(compute_dtype="float32"), jpeft.lora(rank=2))
    jpeft.save(tmp_path / "a", t(KEY, plain), t)
    load = lambda **how: jpeft.load(tmp_path / "a", jpeft.quantize(**how)(KEY, plain))
    assert load()["kernel"].base.compute_dtype == "float32"
    refused(["double=False", "trained on double=True"], lambda: load(double=False))
    refused(["block_size=128", "on block_size=64"], lambda: load(block_size=128))


def test_a_transform_that_quantises_to_another_format_is_refused(tmp_path):
    plain, lora = {"kernel": jax.random.normal(KEY, (64, 5))}, jpeft.lora(rank=2)
    params = jpeft.chain(jpeft.quantize("nf4"), lora)(KEY, plain)
    with pytest.raises(ValueError, match="quantises to int8 with block_size=64"):
        jpeft.save(tmp_path / "a", params, jpeft.chain(jpeft.quantize("int8"), lora))
    jpeft.save(tmp_path / "a", params, lora)  # on a base that came quantised


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("format", ["nf4", "int4_asymmetric", "q4_1"])
def test_a_quantised_base_is_found_again_on_and_off_a_mesh(format, kind, tmp_path):
    """Its codes and scales have the same bits wherever they were made."""
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    types = (getattr(AxisType, kind),)
    mesh = jax.make_mesh((4,), ("x",), types, devices=jax.devices()[:4])
    place = NamedSharding(mesh, PartitionSpec(None, "x"))
    plain = {"kernel": 0.2 * normal(1, 1024, 768)}
    spread = jax.device_put(plain, place)
    t = jpeft.chain(jpeft.quantize(format), jpeft.lora(rank=2))
    made = {"plain": t(KEY, plain), "spread": t(KEY, spread)}
    for name, params in made.items():
        jpeft.save(tmp_path / name, params, t)
        for base in (plain, spread, jpeft.unload(made["spread"])):
            again = jpeft.load(tmp_path / name, base)
            assert jax.tree.structure(again) == jax.tree.structure(params)
            for a, b in zip(*map(jax.tree.leaves, (again, params)), strict=True):
                np.testing.assert_array_equal(a, b)
    codes = again["kernel"].base.codes
    assert codes.sharding.spec == place.spec


@pytest.mark.slow
def test_optimiser_state_on_the_host_is_saved_and_comes_back_there(tmp_path):
    t = peft()
    params = t(KEY, base())
    trainable, _ = jpeft.partition(params)
    tx = jpeft.optim.offload(optax.adam(1e-3), min_size=1)
    state = jax.tree.map(lambda x: x + 1, tx.init(trainable))
    state = jax.tree.map(
        lambda x, like: jax.device_put(x, like.sharding), state, tx.init(trainable)
    )
    manager = jpeft.CheckpointManager(tmp_path / "run", t)
    manager.save(1, params, state=state)
    _, restored, _ = manager.restore(base(), tx.init(trainable))
    kinds = lambda s: [x.sharding.memory_kind for x in jax.tree.leaves(s)]
    assert kinds(restored) == kinds(state)
    assert "pinned_host" in kinds(state)
    for a, b in zip(*map(jax.tree.leaves, (restored, state)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_shardings_of_other_arrays_are_refused(saved):
    path, plain = saved[0], base()
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with pytest.raises(ValueError, match=r"has \['zzz'\] and none of the adapter's"):
        jpeft.load(path, plain, shardings={"zzz": place})
