"""Folders that are whole or absent; only what is jpeft's is replaced or deleted."""

import errno
import os
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.checkpoint import _orbax, folder

KEY = jax.random.key(0)
BASE = {"dense": {"kernel": jnp.arange(15.0).reshape(5, 3)}}
PEFT = jpeft.lora(rank=2)
PARAMS = PEFT(KEY, BASE)


def save(path, **how):
    jpeft.save(path, PARAMS, PEFT, **how)


def loads(path):
    again = jpeft.load(path, BASE)
    for a, b in zip(*map(jax.tree.leaves, (again, PARAMS)), strict=True):
        np.testing.assert_array_equal(a, b)


def refused(parts, f, kind=jpeft.CheckpointError):
    with pytest.raises(kind) as error:
        f()
    for part in parts:
        assert part in str(error.value), str(error.value)


# --- on the disk before it has its name ----------------------------------------------


class Disk:
    """Notes what was synced, and looks at every change of a name."""

    def __init__(self, monkeypatch):
        self.synced, self.named = {}, []
        fsync, rename, exchange = os.fsync, os.rename, folder._exchange_at_once

        def synced(fd):
            fsync(fd)
            self.synced[os.fstat(fd).st_ino] = os.fstat(fd).st_mtime_ns

        def renamed(old, new, **how):
            ours = ".jpeft-" in Path(old).name + Path(new).name  # not Orbax' own
            if ".jpeft-" in Path(old).name:
                self.check(old)
            rename(old, new, **how)
            self.named += [new] * ours

        def exchanged(new, target):
            self.check(new)
            exchange(new, target)
            self.named.append(target)

        monkeypatch.setattr(os, "fsync", synced)
        monkeypatch.setattr(os, "rename", renamed)
        monkeypatch.setattr(folder, "_exchange_at_once", exchanged)

    def check(self, new):
        """Everything in it was synced after it was last written."""
        files = [Path(new), *Path(new).rglob("*")]
        assert len(files) > 8
        for file in files:
            about = file.stat()
            assert self.synced.get(about.st_ino) == about.st_mtime_ns, file

    def check_above(self):
        """What has changed its name did so on the disk."""
        assert self.named
        for path in map(Path, self.named):
            above = path.parent.stat()
            assert self.synced.get(above.st_ino, 0) > 0, path


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    disk = Disk(monkeypatch)
    save(tmp_path / "deep" / "er" / "a")
    save(tmp_path / "deep" / "er" / "a", overwrite=True)
    for new in ("deep", "deep/er"):  # the folders that were made on the way
        assert (tmp_path / new).parent.stat().st_ino in disk.synced
    manager = jpeft.CheckpointManager(tmp_path / "run", PEFT, max_to_keep=1)
    for step in (1, 2, 2):
        manager.save(step, PARAMS, state={"count": 3})
    names = [Path(x).name for x in disk.named]
    assert [x for x in names if ".jpeft-" not in x] == [
        *("a", "a", "00000001", "00000002", "00000002")
    ]
    assert len(names) == 6  # and the step that was deleted
    disk.check_above()
    assert sorted(os.listdir(tmp_path / "run")) == ["00000002"]


# --- replacing -----------------------------------------------------------------------


def test_only_a_folder_of_ours_is_overwritten(tmp_path):
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "chapter1.tex").write_text("...")
    refused(
        ["thesis: holds 'chapter1.tex'", "choose another folder"],
        lambda: save(thesis, overwrite=True),
    )
    assert os.listdir(thesis) == ["chapter1.tex"]
    (thesis / "chapter1.tex").rename(tmp_path / "chapter1.tex")
    save(thesis, overwrite=True)  # an empty folder
    save(thesis, overwrite=True)
    loads(thesis)
    (thesis / "notes").write_text("of mine, beside the adapter")
    refused(["'notes'"], lambda: save(thesis, overwrite=True))
    (tmp_path / "data" / "arrays").mkdir(parents=True)  # one of ours has such a folder
    refused(["data: holds 'arrays'"], lambda: save(tmp_path / "data", overwrite=True))
    refused(["exists", "overwrite=True"], lambda: save(thesis))
    refused(["exists"], lambda: save(thesis), FileExistsError)


def test_a_step_of_a_manager_that_is_none_is_not_replaced(tmp_path):
    manager = jpeft.CheckpointManager(tmp_path, PEFT)
    (tmp_path / "00000003").mkdir()
    (tmp_path / "00000003" / "mine").write_text("...")
    refused(["00000003: holds 'mine'"], lambda: manager.save(3, PARAMS))
    manager.save(4, PARAMS)
    assert manager.steps() == [4]


def test_neighbours_are_left_alone(tmp_path):
    for name in ("run.tmp", "run.old", ".jpeft-mine", "run.orbax-checkpoint-tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("...")
    before = sorted(os.listdir(tmp_path))
    save(tmp_path / "run")
    save(tmp_path / "run", overwrite=True)
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "run"])
    assert len(list(tmp_path.glob("*/mine"))) == 4


def test_a_symbolic_link_is_followed_and_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save("run_3")
    os.symlink("run_3", "latest")
    for _ in range(2):
        save("latest", overwrite=True)
    assert os.readlink("latest") == "run_3"
    loads("run_3")
    os.symlink("to_come", "dangling")
    save("dangling")
    loads("to_come")
    os.symlink("thesis", "work")
    Path("thesis").mkdir()
    Path("thesis/chapter1.tex").write_text("...")
    refused(["thesis: holds"], lambda: save("work", overwrite=True))
    Path("file").write_text("...")
    refused(["file: is no folder"], lambda: save("file", overwrite=True))
    os.symlink("loop", "loop")
    refused(["loop: is no folder"], lambda: save("loop", overwrite=True))
    assert not [x for x in os.listdir() if x.startswith(".jpeft")]


def test_a_folder_that_is_replaced_is_there_at_every_moment(tmp_path, monkeypatch):
    save(tmp_path / "a")
    seen = []
    for name in ("rename", "unlink", "rmdir", "mkdir"):
        of = getattr(os, name)
        monkeypatch.setattr(
            os,
            name,
            lambda *x, of=of, **how: (
                seen.append((tmp_path / "a" / "jpeft.json").is_file()),
                of(*x, **how),
            )[1],
        )
    save(tmp_path / "a", overwrite=True)
    assert len(seen) > 10 and all(seen)


def no_exchange(*_):
    raise OSError(errno.EINVAL, "no such operation here")


def test_without_an_exchange_the_former_folder_is_found_when_cut_short(
    tmp_path, monkeypatch
):
    """As on NFS, between the two renames."""

    class Killed(BaseException):
        pass

    rename = os.rename

    def first_only(old, new):
        rename(old, new)
        if "-was-" in str(new):
            raise Killed

    monkeypatch.setattr(folder, "_exchange_at_once", no_exchange)
    manager = jpeft.CheckpointManager(tmp_path / "run", PEFT)
    manager.save(1, PARAMS)
    save(tmp_path / "a")
    save(tmp_path / "a", overwrite=True)
    assert os.listdir(tmp_path / "run") == ["00000001"]
    monkeypatch.setattr(os, "rename", first_only)
    for again in (
        lambda: save(tmp_path / "a", overwrite=True),
        lambda: manager.save(1, PARAMS),
    ):
        with pytest.raises(Killed):
            again()
    monkeypatch.setattr(os, "rename", rename)
    assert not (tmp_path / "a").exists() and manager.steps() == [1]
    loads(tmp_path / "a")
    manager.restore(BASE)
    jpeft.CheckpointManager(tmp_path / "run", PEFT)
    assert os.listdir(tmp_path / "run") == ["00000001"]
    save(tmp_path / "b")
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "run"]
    loads(tmp_path / "a")


# --- what is left behind -------------------------------------------------------------


def test_what_nobody_holds_is_swept_and_what_is_held_stays(tmp_path):
    left, held = (tmp_path / f".jpeft-{k:012x}" for k in (1, 2))
    for path in (left, held):
        (path / "arrays").mkdir(parents=True)
    fd = folder._lock(held)
    manager = jpeft.CheckpointManager(tmp_path, PEFT)
    assert os.listdir(tmp_path) == [held.name] and manager.steps() == []
    save(tmp_path / "a")
    assert held.is_dir()
    os.close(fd)
    save(tmp_path / "a", overwrite=True)
    assert os.listdir(tmp_path) == ["a"]


def test_without_locks_what_is_old_is_swept(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "fcntl", None)
    old, new = (tmp_path / f".jpeft-{k:012x}" for k in (1, 2))
    for path in (old, new):
        path.mkdir()
    os.utime(old, (0, 0))
    save(tmp_path / "a")
    assert sorted(os.listdir(tmp_path)) == [new.name, "a"]


def test_what_an_earlier_version_left_is_swept_and_its_only_copy_put_back(tmp_path):
    manager = jpeft.CheckpointManager(tmp_path, PEFT)
    manager.save(1, PARAMS)
    manager.save(2, PARAMS)
    (tmp_path / "00000001.old" / "adapter").mkdir(parents=True)
    (tmp_path / "00000002").rename(tmp_path / "00000002.old")
    (tmp_path / "00000002.tmp").mkdir()
    (tmp_path / "9.old").mkdir()  # none of ours has such a name
    manager = jpeft.CheckpointManager(tmp_path, PEFT)
    assert sorted(os.listdir(tmp_path)) == ["00000001", "00000002", "9.old"]
    for step in (3, 4, 5):
        manager.save(step, PARAMS)
    assert manager.steps() == [4, 5]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_disk_that_refuses_is_named_and_nothing_is_left(
    number, tmp_path, monkeypatch
):
    save(tmp_path / "a")

    def full(place, _):
        place.mkdir()
        (place / "half").write_text("...")
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(_orbax, "write", full)
    refused(
        ["a: cannot be written", os.strerror(number)],
        lambda: save(tmp_path / "a", overwrite=True),
    )
    assert os.listdir(tmp_path) == ["a"]
    loads(tmp_path / "a")


def test_several_that_save_one_path_all_succeed_and_one_is_there(tmp_path):
    errors = []

    def repeatedly():
        try:
            for _ in range(4):
                save(tmp_path / "a", overwrite=True)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=repeatedly) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert errors == []
    assert os.listdir(tmp_path) == ["a"]
    loads(tmp_path / "a")


# --- where ---------------------------------------------------------------------------


def test_a_url_that_is_not_supported_is_refused_and_makes_no_folder(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(folder.importlib.util, "find_spec", lambda _: None)
    for path, parts in {
        "s3://bucket/a": ["expected a local folder or a gs:// URL", "copy it there"],
        "hdfs://host/a": ["hdfs:"],
        "file:///data/a": ["type '/data/a'"],
        "gs://bucket/a": ["pip install gcsfs"],
        Path("gs://bucket/a"): ["pass the URL as a string"],
    }.items():
        for act in (
            lambda p=path: save(p),
            lambda p=path: jpeft.load(p, BASE),
            lambda p=path: jpeft.CheckpointManager(p, PEFT),
        ):
            refused([str(path), *parts], act)
    assert os.listdir() == []
    with pytest.raises(jpeft.CheckpointError) as error:
        save(f"file://{tmp_path}/b")
    save(str(error.value).split("'")[1])  # what the sentence says to type
    loads(tmp_path / "b")
