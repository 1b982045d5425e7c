"""Runs in a bucket, `gs://`, of a stand-in for Google's storage."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft

pytestmark = pytest.mark.slow
BASE = {"dense": {"kernel": jnp.arange(15.0).reshape(5, 3)}}
PEFT = jpeft.lora(rank=2)


@pytest.fixture(scope="module")
def bucket():
    pytest.importorskip("gcsfs")
    import fake_storage

    url, patch = fake_storage.start(), pytest.MonkeyPatch()
    patch.setenv("STORAGE_EMULATOR_HOST", url)
    patch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
    patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "any")
    yield fake_storage
    patch.undo()


def test_adapters_and_runs_are_saved_and_come_back(bucket):
    params = PEFT(jax.random.key(0), BASE)
    path, state = "gs://bucket/some/adapter", {"n": jnp.int32(0), "none": jnp.ones(0)}
    jpeft.save(path, params, PEFT)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        jpeft.save(path, params, PEFT)
    jpeft.save(path, params, PEFT, overwrite=True)
    for a, b in zip(
        *map(jax.tree.leaves, (jpeft.load(path, BASE), params)), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    manager = jpeft.CheckpointManager("gs://bucket/run", PEFT)
    for step in (1, 2, 3, 3):
        manager.save(step, params, state={**state, "n": jnp.int32(step)})
    assert manager.steps() == [2, 3]
    assert not [x for x in bucket.Bucket.objects if x.startswith("run/00000001")]
    # Without its last file a step is not one.
    del bucket.Bucket.objects["run/00000003/state.json"]
    manager = jpeft.CheckpointManager("gs://bucket/run", PEFT)
    assert manager.steps() == [2]
    with pytest.warns(jpeft.CheckpointWarning, match="step 2 is restored"):
        restored = manager.restore(BASE, state)
    assert restored.state["n"] == 2


def test_what_is_not_ours_and_what_is_not_allowed_is_refused(bucket, monkeypatch):
    params = PEFT(jax.random.key(0), BASE)
    bucket.Bucket.objects["thesis/chapter1.tex"] = b"...", 1
    with pytest.raises(jpeft.CheckpointError, match="holds 'chapter1.tex'"):
        jpeft.save("gs://bucket/thesis", params, PEFT, overwrite=True)
    monkeypatch.setitem(bucket.ALLOWED, "write", False)
    with pytest.raises(jpeft.CheckpointError, match="closed: cannot be written") as e:
        jpeft.save("gs://bucket/closed", params, PEFT)
    assert len(str(e.value)) < 300
