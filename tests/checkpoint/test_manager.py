"""The steps of a run: found again whole, in order, or refused by name."""

import json
import shutil
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from jpeft.checkpoint.sealed import seal

KEY = jax.random.key(0)
BASE = {"dense": {"kernel": jnp.arange(15.0).reshape(5, 3)}}
PEFT = jpeft.lora(rank=2, alpha=4)
PARAMS = PEFT(KEY, BASE)
STATE = {"count": jnp.int32(0), "mu": jnp.zeros((2, 3))}


def of_step(step):
    """Parameters and state that tell which step they are of."""
    leaf = PARAMS["dense"]["kernel"]
    params = {"dense": {"kernel": leaf.replace(b=jnp.full_like(leaf.b, step))}}
    return params, {"count": jnp.int32(step), "mu": jnp.full((2, 3), float(step))}


def save(manager, step, **how):
    params, state = of_step(step)
    manager.save(step, params, state=state, metadata={"step": step}, **how)


def check(restored, step):
    params, state = of_step(step)
    wanted = (params, state, {"step": step})
    assert restored.step == step
    for a, b in zip(*map(jax.tree.leaves, (restored, wanted)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Three steps; to be copied."""
    directory = tmp_path_factory.mktemp("run")
    manager = jpeft.CheckpointManager(directory, PEFT, max_to_keep=3)
    for step in (1, 2, 3):
        save(manager, step)
    return directory


@pytest.fixture
def run(saved, tmp_path):
    return copied(saved, tmp_path / "run")


def copied(saved, directory):
    shutil.copytree(saved, directory)
    return jpeft.CheckpointManager(directory, PEFT, max_to_keep=3)


def refused(parts, f, kind=jpeft.CheckpointError):
    with pytest.raises(kind) as error:
        f()
    for part in parts:
        assert part in str(error.value), str(error.value)


# --- which steps ---------------------------------------------------------------------


def test_a_manager_keeps_what_it_has_just_written(tmp_path):
    """Though an earlier run left higher steps; and it is what comes back."""
    manager = jpeft.CheckpointManager(tmp_path, PEFT, max_to_keep=2)
    for step in (200, 300, 10, 20):
        save(manager, step)
        assert step in manager.steps() and len(manager.steps()) <= 2
        assert manager.latest_step() == step
    assert manager.steps() == [10, 20]
    check(manager.restore(BASE, STATE), 20)
    one = jpeft.CheckpointManager(tmp_path, PEFT, max_to_keep=1)
    save(one, 5)
    assert one.steps() == [5]


def test_only_what_is_named_and_filled_as_a_step_is_one(run):
    for name in ("2024", "7", "²", "00000009", "notes", "00000001.jpeft"):
        (run.directory / name).mkdir()
    (run.directory / "7" / "mine").write_text("...")
    assert run.steps() == [1, 2, 3]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(run.restore(BASE, STATE), 3)
    save(run, 4)
    assert run.steps() == [2, 3, 4]


@pytest.mark.parametrize("step", [np.int64(5), jnp.int32(5), np.uint8(5)])
def test_a_step_may_be_a_number_of_numpy_or_jax(step, tmp_path):
    manager = jpeft.CheckpointManager(tmp_path, PEFT)
    metadata = {"loss": np.float32(0.5), "seen": jnp.arange(2)}
    manager.save(step, PARAMS, metadata=metadata)
    restored = manager.restore(BASE, step=step)
    assert restored.step == 5 and restored.metadata == {"loss": 0.5, "seen": [0, 1]}


def test_what_is_no_step_and_no_metadata_is_refused(tmp_path):
    manager = jpeft.CheckpointManager(tmp_path, PEFT)
    for step in (-1, 2.5, "5", None):
        refused(
            [f"step={step!r}: expected a whole number"],
            lambda s=step: manager.save(s, PARAMS),
            ValueError,
        )
    refused(
        ["step=2.5"],
        lambda: jpeft.save(tmp_path / "a", PARAMS, PEFT, step=2.5),
        ValueError,
    )
    for metadata, part in (({1: 0, "1": 1}, "two are written alike"), ({"x": {1}}, "")):
        refused(
            ["metadata: ", part],
            lambda m=metadata: manager.save(1, PARAMS, metadata=m),
            ValueError,
        )
    assert list(tmp_path.iterdir()) == []


# --- falling back --------------------------------------------------------------------


def test_a_damaged_step_is_skipped_and_said(run):
    (run.directory / "00000003" / "state.json").write_text("")
    (run.directory / "00000002" / "adapter" / "jpeft.json").unlink()
    with pytest.warns(jpeft.CheckpointWarning, match="step 1 is restored") as told:
        restored = run.restore(BASE, STATE)
    check(restored, 1)
    assert list(restored.skipped) == [3, 2]
    assert "00000003/state.json: damaged" in restored.skipped[3]
    assert "jpeft.json is missing" in restored.skipped[2]
    assert all(why in str(told[0].message) for why in restored.skipped.values())
    refused(
        ["00000003/state.json"],
        lambda: run.restore(BASE, STATE, step=3),
        jpeft.DamagedError,
    )
    shutil.rmtree(run.directory / "00000001" / "state")
    refused(
        ["no checkpoint", "step 3 cannot be read", "step 1 cannot", "state"],
        lambda: run.restore(BASE, STATE),
    )


def test_a_mistake_of_the_caller_is_no_reason_to_fall_back(run):
    other = {"dense": {"kernel": BASE["dense"]["kernel"] + 1}}
    refused(["00000003", "has other values"], lambda: run.restore(other, STATE))
    refused(["00000003", "another structure"], lambda: run.restore(BASE))
    refused(["no checkpoint of step 9", "[1, 2, 3]"], lambda: run.restore(BASE, step=9))


def test_a_step_knows_which_step_it_is(run):
    manager, folder = run, run.directory
    shutil.copytree(folder / "00000001", folder / "00000005")
    refused(
        ["00000005", "of step 1", "folder of step 5"],
        lambda: manager.restore(BASE, STATE, step=5),
    )
    shutil.rmtree(folder / "00000005")
    for part in ("adapter", "state", "state.json"):
        one, two = (folder / f"0000000{k}" / part for k in (1, 2))
        one.rename(folder / "aside")
        two.rename(one)
        (folder / "aside").rename(two)
        refused(["0000000"], lambda: manager.restore(BASE, STATE, step=1))
        one.rename(folder / "aside")
        two.rename(one)
        (folder / "aside").rename(two)
    check(manager.restore(BASE, STATE, step=2), 2)


def test_an_adapter_and_a_state_of_two_saves_of_one_step_are_refused(run, tmp_path):
    shutil.copytree(run.directory / "00000003", tmp_path / "former")
    run.save(3, of_step(8)[0], state=of_step(8)[1], metadata={})
    for part in ("state", "state.json"):
        path = run.directory / "00000003" / part
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.move(tmp_path / "former" / part, path)
    refused(["saved with another adapter"], lambda: run.restore(BASE, STATE, step=3))


def test_a_step_that_is_replaced_while_it_is_read_is_read_again(run, monkeypatch):
    from jpeft.checkpoint import manager as module

    load, times = module.load, []

    def replaced_meanwhile(*args, **how):
        loaded = load(*args, **how)
        if not times:
            params, state = of_step(8)
            run.save(3, params, state=state, metadata={"step": 8})
        times.append(1)
        return loaded

    monkeypatch.setattr(module, "load", replaced_meanwhile)
    params, state, metadata = run.restore(BASE, STATE)
    assert len(times) == 2 and metadata == {"step": 8}
    assert int(state["count"]) == 8 and float(params["dense"]["kernel"].b[0, 0]) == 8


# --- the transform and the state -----------------------------------------------------


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (jpeft.lora(rank=2, alpha=64), "alpha: saved 4, here 64"),
        (jpeft.dora(rank=2, alpha=4), "method: saved 'lora', here 'dora'"),
        (jpeft.chain(jpeft.quantize("nf4"), PEFT), "the base was made by another"),
    ],
)
def test_the_transform_is_compared_when_restoring(other, told, run):
    """Not at the first save, when the training is done."""
    refused(
        ["dense/kernel" if "base" not in told else "", told],
        lambda: jpeft.CheckpointManager(run.directory, other).restore(BASE, STATE),
    )


def test_the_adapter_comes_back_without_its_optimiser(tmp_path):
    manager = jpeft.CheckpointManager(tmp_path, PEFT)
    trainable, _ = jpeft.partition(PARAMS)
    with jax.numpy_dtype_promotion("standard"):
        state = jax.tree.map(lambda x: x + 1, optax.adam(1e-3).init(trainable))
    manager.save(1, PARAMS, state=state)
    fresh = optax.sgd(1e-3).init(trainable)
    refused(
        ["another structure", 'restore_state="matching"', 'restore_state="none"'],
        lambda: manager.restore(BASE),
    )
    for like in (None, fresh, lambda params: fresh):
        _, found, _ = restored = manager.restore(BASE, like, restore_state="none")
        assert found == (None if like is None else fresh)
        assert restored.step == 1
    refused(
        ["restore_state='some'", '"matching"'],
        lambda: manager.restore(BASE, restore_state="some"),
        ValueError,
    )


def test_another_optimiser_gets_what_it_has_in_common(tmp_path):
    manager = jpeft.CheckpointManager(tmp_path, PEFT)
    trainable, _ = jpeft.partition(PARAMS)
    with jax.numpy_dtype_promotion("standard"):
        state = jax.tree.map(lambda x: x + 1, optax.adam(1e-3).init(trainable))
        other = optax.adam(optax.constant_schedule(1e-3)).init(trainable)
    manager.save(1, PARAMS, state={"opt": state, "key": jax.random.key(3)})
    manager.save(2, PARAMS, state={"opt": state, "key": jax.random.key(3), "m": 1})
    like = {"opt": other, "key": jax.random.key(0), "n": jnp.zeros(2)}
    restored = manager.restore(BASE, like, restore_state="matching")
    assert restored.fresh == ("['n']", "['opt'][1].count")
    found = restored.state["opt"]
    assert jax.tree.structure(restored.state) == jax.tree.structure(like)
    for a, b in zip(*map(jax.tree.leaves, (found[0], state[0])), strict=True):
        np.testing.assert_array_equal(a, b)
    assert int(found[1].count) == 0
    assert jax.random.key_data(restored.state["key"])[1] == 3


def test_arrays_without_elements_and_wide_numbers_are_saved(tmp_path):
    manager = jpeft.CheckpointManager(tmp_path, PEFT)
    state = {
        "none": jnp.zeros((0, 3)),
        "seen": np.int64(2**40 + 7),
        "ratio": np.float64(1 / 3),
        "bits": np.arange(3, dtype=np.uint64) << 40,
    }
    manager.save(1, PARAMS, state=state)
    like = jax.tree.map(np.zeros_like, state) | {"none": state["none"]}
    _, found, _ = manager.restore(BASE, like)
    for name, x in state.items():
        assert found[name].dtype == x.dtype
        np.testing.assert_array_equal(found[name], x)
    # The upper half of a wide number is in the digest too.
    file = tmp_path / "00000001" / "state.json"
    about = json.loads(file.read_text())
    digests = about["digests"]
    manager.save(1, PARAMS, state=state | {"seen": np.int64(2**41 + 7)})
    assert json.loads(file.read_text())["digests"] != digests
    only = {"none": jnp.zeros((3, 0))}
    manager.save(2, PARAMS, state=only)
    assert manager.restore(BASE, only).state["none"].shape == (3, 0)


# --- damage --------------------------------------------------------------------------


def test_a_run_saved_before_descriptions_had_digests_is_restored(tmp_path):
    shutil.unpack_archive(Path(__file__).parents[1] / "data" / "steps_v1.zip", tmp_path)
    base = BASE | {"head": {"kernel": jnp.ones((3, 2))}}
    peft = jpeft.chain(
        jpeft.lora(rank=2, alpha=4, exclude="head/.*"), jpeft.full("head/.*")
    )
    like = {"count": jnp.int32(0), "n": 0, "big": np.int64(0), "key": KEY}
    manager = jpeft.CheckpointManager(tmp_path, peft)
    assert manager.steps() == [7] and manager.latest_step() == 7
    params, state, metadata = manager.restore(base, like)
    assert metadata == {"epoch": 1} and (state["count"], state["n"]) == (3, 5)
    assert state["big"] == 2**40 + 7 and jax.random.key_data(state["key"])[1] == 5
    manager.save(8, params, state=state)
    assert manager.restore(base, like).step == 8


FILES = ("adapter/jpeft.json", "state.json")


def flips(folder, count, seed):
    """Restores after each of so many flips of one bit; how many loaded all the same."""
    draw = np.random.default_rng(seed)
    manager = jpeft.CheckpointManager(folder, PEFT)
    good = {f: (folder / "00000002" / f).read_bytes() for f in FILES}
    ends = np.cumsum([len(x) for x in good.values()])
    loaded = 0
    for at, bit in zip(
        draw.integers(ends[-1], size=count), draw.integers(8, size=count), strict=True
    ):
        name = FILES[int(np.searchsorted(ends, at, side="right"))]
        file = folder / "00000002" / name
        data = bytearray(good[name])
        data[at - (0 if name == FILES[0] else ends[0])] ^= 1 << bit
        file.write_bytes(data)
        try:
            restored = manager.restore(BASE, STATE, step=2)
        except jpeft.CheckpointError as error:  # any other is a failure
            assert str(file) in str(error), (name, at, bit)
        else:
            check(restored, 2)
            loaded += 1
        file.write_bytes(good[name])
    return loaded


def test_a_flipped_bit_of_a_description_is_refused_or_changes_nothing(run):
    assert flips(run.directory, 60, seed=0) < 30


@pytest.mark.slow
def test_of_3000_flipped_bits_of_the_descriptions_none_is_silent(run):
    loaded = flips(run.directory, 3000, seed=1)
    assert loaded < 500  # spaces that became others, and the like


def damages():
    yield "missing", lambda f: f.unlink()
    yield "empty", lambda f: f.write_bytes(b"")
    yield "half", lambda f: f.write_bytes(f.read_bytes()[: f.stat().st_size // 2])
    yield "longer", lambda f: f.write_bytes(f.read_bytes() + b"\x00")
    yield "garbage", lambda f: f.write_bytes(bytes(range(256)))

    def folder(f):
        f.unlink()
        f.mkdir()

    yield "a folder", folder


@pytest.mark.sample(2)
@pytest.mark.parametrize("how", [n for n, _ in damages()])
def test_every_refusal_of_a_damaged_file_names_a_leaf_or_a_file(how, saved, tmp_path):
    damage = dict(damages())[how]
    names = ["dense/kernel/a", "dense/kernel/b", "state['count']", "state['mu']"]
    step = saved / "00000002"
    files = [f.relative_to(step) for f in step.rglob("*") if f.is_file()]
    refusals = 0
    for k, file in enumerate(files):
        manager = copied(saved, tmp_path / str(k))
        folder = manager.directory
        damage(folder / "00000002" / file)
        try:
            restored = manager.restore(BASE, STATE, step=2)
        except jpeft.DamagedError as error:
            text, refusals = str(error), refusals + 1
            parts = [*names, *(f.name for f in files)]
            assert any(x in text for x in parts), text
            assert "pybind" not in text and "0x7" not in text and len(text) < 400, text
        else:
            check(restored, 2)
    assert refusals >= (2 if how == "longer" else 6)


# --- a folder made to harm -----------------------------------------------------------


def resealed(file, change):
    about = json.loads(file.read_text())
    about.pop("sha256")
    changed = change(about)
    file.write_text(seal(about if changed is None else changed))


def put(*path):
    """Sets, in a description, what stands last at what stands before it."""
    *above, name, value = path

    def change(about):
        for k in above:
            about = about[k]
        about[name] = value

    return change


LAYER = ("leaves", "dense/kernel", 0)
ODD = [
    put("leaves", None),
    put("leaves", []),
    put("leaves", "dense/kernel", {}),
    put("leaves", "dense/kernel", [None]),
    put("leaves", "../../x", [{"kind": "LowRank", "static": {}, "arrays": {}}]),
    put("version", "1"),
    put("version", None),
    put("version", 0),
    put("version", 2.5),
    put("base", None),
    put("base", "dense/kernel", {}),
    put("transform", None),
    put(*LAYER, "kind", None),
    put(*LAYER, "static", []),
    put(*LAYER, "static", {"x": 1}),
    put(*LAYER, "holds", 3),
    put(*LAYER, "arrays", None),
    put(*LAYER, "arrays", "a", "shape", [2**31, "2"]),
    put(*LAYER, "arrays", "a", "shape", [-1, 2]),
    put(*LAYER, "arrays", "a", "shape", [2**70, 2]),
    put(*LAYER, "arrays", "a", "shape", [5, 2**40]),
    put(*LAYER, "arrays", "a", "dtype", "floet32"),
    put(*LAYER, "arrays", "a", "dtype", None),
    put(*LAYER, "arrays", "a", {"shape": [5, 2], "dtype": "float32"}),
    put(*LAYER, "arrays", "c", {"shape": [2], "dtype": "float32", "digest": ""}),
    put(*LAYER, "arrays", {}),
]


def test_a_description_that_makes_no_sense_is_refused_as_ours(run):
    manager, folder = run, run.directory
    file = folder / "00000002" / "adapter" / "jpeft.json"
    good = file.read_bytes()
    for k, change in enumerate(ODD):
        file.write_bytes(good)
        resealed(file, change)
        for load in (
            lambda: manager.restore(BASE, STATE, step=2),
            lambda: jpeft.load(file.parent, BASE),
        ):
            with pytest.raises(jpeft.CheckpointError) as error:
                load()
            assert str(folder) in str(error.value) or "dense" in str(error.value), k
    nested = b"[" * 100_000 + b"]" * 100_000
    for text in (b"null", b"[]", b'"x"', b"{}", nested, b"\xff\xfe{\x00", b'{"a":'):
        for name in FILES:
            other = folder / "00000002" / name
            before = other.read_bytes()
            other.write_bytes(text)
            refused([str(other)], lambda: manager.restore(BASE, STATE, step=2))
            other.write_bytes(before)


def test_shapes_are_compared_before_memory_is_asked_for(run, monkeypatch):
    """A rank of 2^31 in the description fits the base, but nothing asks for so many."""
    from jpeft.checkpoint import _orbax

    file = run.directory / "00000002" / "adapter" / "jpeft.json"

    def large(about):
        arrays = about["leaves"]["dense/kernel"][0]["arrays"]
        arrays["a"]["shape"], arrays["b"]["shape"] = [5, 2**31], [2**31, 3]

    resealed(file, large)
    monkeypatch.setattr(
        _orbax, "_checkpointer", lambda *_: pytest.fail("was asked for")
    )
    refused(
        ["dense/kernel/a", "does not fit a weight"],
        lambda: jpeft.load(file.parent, BASE),
    )
    resealed(file, put(*LAYER, "arrays", "a", "shape", [7, 2]))
    refused(["dense/kernel/"], lambda: jpeft.load(file.parent, BASE))


@pytest.mark.parametrize("field", ["shape", "chunks"])
def test_an_array_stored_larger_than_it_is_said_to_be_is_refused(field, run):
    """A part of 2^31 rows, of which the process would die."""
    import tensorstore

    arrays = run.directory / "00000002" / "adapter" / "arrays"
    kvstore = {"driver": "ocdbt", "base": f"file://{arrays}/"}
    store = tensorstore.KvStore.open(kvstore).result()
    name = next(k for k in store.list().result() if k.endswith(b"a/.zarray"))
    about = json.loads(store.read(name).result().value)
    about[field] = [2**31, 4]
    store.write(name, json.dumps(about).encode()).result()
    refused(["dense/kernel/a"], lambda: jpeft.load(arrays.parent, BASE))


# --- a base that moves ---------------------------------------------------------------


def test_what_moves_beside_the_adapters_is_saved_and_comes_back(tmp_path):
    """Statistics that no name and no type tells of; again after a restart."""
    base = BASE | {"ema": {"of_inputs": jnp.zeros(3)}, "other": jnp.ones(2)}
    params = PEFT(KEY, base)
    manager = jpeft.CheckpointManager(tmp_path, PEFT)
    manager.save(0, params)
    for step in (1, 2):
        # As a step of training under jit: every array is another one.
        params = jax.tree.map(lambda x: x + 0, params)
        params["ema"] = {"of_inputs": params["ema"]["of_inputs"] + 1}
        manager.save(step, params)
        file = tmp_path / f"{step:08d}" / "adapter" / "jpeft.json"
        assert list(json.loads(file.read_text())["statistics"]) == ["ema/of_inputs"]
        manager = jpeft.CheckpointManager(tmp_path, PEFT)
        params, _, _ = manager.restore(base)
        np.testing.assert_array_equal(params["ema"]["of_inputs"], np.full(3, step))
        np.testing.assert_array_equal(params["other"], np.ones(2))


def test_a_weight_that_moves_under_its_adapter_is_refused_by_name(tmp_path):
    manager = jpeft.CheckpointManager(tmp_path, PEFT)
    manager.save(0, PARAMS)
    leaf = PARAMS["dense"]["kernel"]
    moved = {"dense": {"kernel": leaf.replace(base=leaf.base * 2)}}
    refused(
        ["dense/kernel", "not as it was", "a directory of its own"],
        lambda: manager.save(1, moved),
    )
    jpeft.CheckpointManager(tmp_path / "after", PEFT).save(1, moved)
    assert manager.steps() == [0]


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "peft",
    [
        jpeft.chain(jpeft.quantize("nf4"), PEFT),
        jpeft.loftq(rank=2),
        jpeft.full("dense/kernel"),
        jpeft.lora(rank=2, init="pissa"),
    ],
)
def test_a_run_that_goes_on_after_a_restart_saves_its_base_as_it_was(peft, tmp_path):
    base = {"dense": {"kernel": jax.random.normal(KEY, (64, 64))}}
    manager = jpeft.CheckpointManager(tmp_path, peft)
    manager.save(0, peft(KEY, base))
    for step in (1, 2):
        params, _, _ = manager.restore(base)
        manager.save(step, jax.tree.map(lambda x: x * 1, params))
        manager = jpeft.CheckpointManager(tmp_path, peft)
    assert manager.restore(base).step == 2
