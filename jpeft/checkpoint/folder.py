"""Folders that are whole or absent, whenever the process or the machine ends.

    write    filled under a name of its own, every file and folder synced to the disk,
             renamed; where a folder is replaced, the two exchange their names at once;
             then the parent synced
    remove   renamed before it is deleted

What such a save leaves behind if it is cut short is called `.jpeft-` and twelve
hexadecimal digits.  The folder is locked while its process lives, and swept, when
the next save begins beside it, once nobody holds it.

On an object store (`gs://`) names cannot be exchanged.  There a folder is whole when it
holds its last file, which is written last and deleted first; until a replacement has
it, there is neither the former folder nor the new one.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import importlib.util
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etils import epath

from jpeft.checkpoint.processes import Crew, is_first
from jpeft.types import CheckpointError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# A folder here or on an object store; the two have the same methods.
Folder = Any
Fill = Callable[[Folder], None]

_OURS = re.compile(r"\.jpeft-[0-9a-f]{12}(-was-(?P<name>.+))?", re.DOTALL)
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")
# On a file system without locks an abandoned folder is known by its age.
_ABANDONED_S = 24 * 3600
_TRIES = 100  # against others who save the same folder at the same time


@dataclass(frozen=True)
class Kind:
    """What a folder of ours holds, and by which files it is known to be ours.

    last: the file that is written last.
    """

    holds: frozenset[str]
    last: str
    signs: tuple[str, ...]


class ExistsError(CheckpointError, FileExistsError):
    """The folder exists and was not to be replaced."""


def location(path: str | os.PathLike[str]) -> Folder:
    """A path here, or one of an object store that Orbax writes to.

    Raises CheckpointError for a URL of another kind.
    """
    text = os.fspath(path)
    if (found := _SCHEME.match(text)) is None:
        return Path(path)
    if text.startswith("gs://"):
        if not any(map(importlib.util.find_spec, ("gcsfs", "tensorflow"))):
            raise CheckpointError(
                f"{text}: Google's storage needs the package gcsfs; type: "
                "pip install gcsfs"
            )
        return epath.Path(text)
    scheme = found[1]
    advice = "save to a local folder and copy it there"
    if scheme == "file":
        advice = f"type {text.removeprefix('file:').replace('//', '', 1)!r}"
    elif scheme == "gs":
        advice = "a pathlib.Path drops a slash, so pass the URL as a string"
    raise CheckpointError(
        f"{text}: expected a local folder or a gs:// URL, came one of {scheme}:; "
        f"{advice}"
    )


def write_folder(
    path: str | os.PathLike[str],
    kind: Kind,
    make: Callable[[], tuple[Fill, str]],
    *,
    overwrite: bool,
) -> None:
    """Puts a folder at `path`, whole or not at all; to be called by all processes.

    make: gives the function that fills an empty folder, and the text of its last file.
    overwrite: replace the folder that is there, if it is of this kind.  A symbolic link
    is followed, and stays.

    Raises CheckpointError, FileExistsError too where a folder must not be replaced.
    """
    target = _followed(location(path))
    crew = Crew(str(target))
    with _told(target):
        crew.first(lambda: _check_free(target, kind, overwrite))
        fill, text = crew.all(make)
        put = _put_remote if _is_remote(target) else _put_local
        put(target, kind, fill, text, overwrite, crew)


def remove_folder(folder: Folder, kind: Kind) -> None:
    """Deletes a folder; cut short, it does not leave half of it under its name."""
    if _is_remote(folder):
        (folder / kind.last).unlink(missing_ok=True)
        folder.rmtree(missing_ok=True)
        return
    trash = folder.parent / _name(secrets.randbits(48))
    try:
        os.rename(folder, trash)
    except FileNotFoundError:
        return  # another process was first
    _sync(folder.parent)
    shutil.rmtree(trash, ignore_errors=True)


def find_folder(folder: Folder) -> Folder:
    """Where the folder is: at its name, or, after a replacement that was cut short on
    a file system without exchange, set aside."""
    if _is_remote(folder) or folder.exists():
        return folder
    return next(_set_aside(folder), folder)


def listed(parent: Folder) -> list[str]:
    """The names of the folders in it, those set aside too; none if it is not there."""
    if not parent.is_dir():
        return []
    if _is_remote(parent):
        return [p.name for p in parent.iterdir()]
    found = ((p.name, _OURS.fullmatch(p.name)) for p in parent.iterdir() if p.is_dir())
    return sorted({m["name"] or name if m else name for name, m in found})


def sweep(parent: Folder) -> None:
    """Deletes what saves in this folder left behind, if nobody works on it."""
    if _is_remote(parent) or not is_first():
        return
    try:
        names = os.listdir(parent)
    except OSError:
        return
    for name in names:
        if match := _OURS.fullmatch(name):
            _sweep_one(parent / name, match["name"])


# --- here ----------------------------------------------------------------------------


def _put_local(
    target: Path, kind: Kind, fill: Fill, text: str, overwrite: bool, crew: Crew
) -> None:
    held: list[int] = []

    def begin() -> int:
        _make(target.parent)
        sweep(target.parent)
        return _claim(target.parent, held)

    unfinished = target.parent / _name(crew.first(begin))
    try:
        crew.all(lambda: fill(unfinished))
        crew.first(lambda: write_text(unfinished / kind.last, text))
        # Each process: another machine's files are on its own way to the disk.
        crew.all(lambda: _sync_tree(unfinished))
        crew.first(lambda: _take_place(unfinished, target, kind, overwrite))
    finally:
        if is_first():  # what could not be finished, or the folder that was replaced
            shutil.rmtree(unfinished, ignore_errors=True)
        for fd in held:
            os.close(fd)


def write_text(file: Folder, text: str) -> None:
    file.write_text(text, encoding="utf-8")


def _take_place(new: Path, target: Path, kind: Kind, overwrite: bool) -> None:
    for _ in range(_TRIES):
        if not os.path.lexists(target):
            try:
                os.rename(new, target)
                break
            except OSError as error:  # another process was first
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
        _check_free(target, kind, overwrite)
        try:
            _exchange(new, target)
            break
        except FileNotFoundError:
            if not new.exists():
                raise
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    else:
        raise CheckpointError(
            f"{target}: {_TRIES} times another process was first to save this folder; "
            "give each process a folder of its own"
        )
    _sync(target.parent)
    for aside in list(_set_aside(target, of=new.name)):
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(new: Path, target: Path) -> None:
    """The two exchange their names, in one step where the file system can."""
    try:
        _exchange_at_once(new, target)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        # Between these two lines `find_folder` knows where the former folder is.
        os.rename(target, target.with_name(f"{new.name}-was-{target.name}"))
        os.rename(new, target)


def _exchange_at_once(new: Path, target: Path) -> None:
    linux = sys.platform == "linux"
    library = ctypes.CDLL(None, use_errno=True) if linux else None
    rename = getattr(library, "renameat2", None)
    if rename is None:
        raise OSError(errno.ENOSYS, "renameat2 is not there")
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename(here, os.fsencode(new), here, os.fsencode(target), exchange):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), os.fspath(target))


def _set_aside(folder: Path, of: str = "") -> Iterator[Path]:
    """The former folders of this name, newest first; of: by which save."""
    ending = f"-was-{folder.name}"
    try:
        names = [n for n in os.listdir(folder.parent) if n.endswith(ending)]
    except OSError:
        return
    paths = [folder.parent / n for n in names if _OURS.fullmatch(n)]
    paths = [p for p in paths if p.name.startswith(of)]
    yield from sorted(paths, key=lambda p: p.stat().st_mtime, reverse=True)


def _sweep_one(path: Path, name: str | None) -> None:
    try:
        if (fd := _lock(path)) is None:
            return
        try:
            if name is not None and not (home := path.with_name(name)).exists():
                os.rename(path, home)
                _sync(path.parent)
            elif fd >= 0 or time.time() - path.stat().st_mtime > _ABANDONED_S:
                shutil.rmtree(path, ignore_errors=True)
        finally:
            if fd >= 0:
                os.close(fd)
    except OSError:
        return  # it went meanwhile, or is not ours to delete


def _claim(parent: Path, held: list[int]) -> int:
    """The number of a new folder that is locked while `held` holds its descriptor."""
    for _ in range(_TRIES):
        folder = parent / _name(number := secrets.randbits(48))
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        try:
            fd = _lock(folder)
        except FileNotFoundError:
            continue  # swept before it was locked
        if fd is None:
            continue
        if fd >= 0:
            held.append(fd)
            if not folder.exists():
                continue
        return number
    raise CheckpointError(f"{parent}: no new folder can be made in it")


def _name(number: int) -> str:
    return f".jpeft-{number:012x}"


def _lock(folder: Path) -> int | None:
    """What holds a folder until it is closed or the process ends; None if another
    holds it, -1 where the file system has no locks."""
    if fcntl is None:
        return -1
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        return None if isinstance(error, BlockingIOError) else -1
    return fd


def _make(folder: Path) -> None:
    """The folder and those above it, on the disk."""
    if folder.is_dir():
        return
    _make(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync(folder.parent)


def _sync_tree(folder: Path) -> None:
    for above, _, files in os.walk(folder, topdown=False):
        for name in files:
            _sync(os.path.join(above, name))
        _sync(above)


def _sync(path: str | os.PathLike[str]) -> None:
    """All of a file, or the names in a folder, are on the disk when this returns."""
    if os.name == "nt" and os.path.isdir(path):
        return  # there a folder cannot be opened
    fd = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(fd)
    except OSError as error:
        # Some file systems have no such call for folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


# --- elsewhere -----------------------------------------------------------------------


def _put_remote(
    target: Folder, kind: Kind, fill: Fill, text: str, overwrite: bool, crew: Crew
) -> None:
    def begin() -> None:
        if target.exists():
            _check_free(target, kind, overwrite)
            (target / kind.last).unlink(missing_ok=True)
            target.rmtree(missing_ok=True)

    crew.first(begin)
    crew.all(lambda: fill(target))
    crew.first(lambda: write_text(target / kind.last, text))


def _is_remote(folder: Folder) -> bool:
    return not isinstance(folder, Path)


# --- what is refused -----------------------------------------------------------------


def _followed(target: Folder) -> Folder:
    if _is_remote(target) or not target.is_symlink():
        return target
    return Path(os.path.realpath(target))


def _check_free(target: Folder, kind: Kind, overwrite: bool) -> None:
    if not (target.exists() or (not _is_remote(target) and target.is_symlink())):
        return
    if not target.is_dir():
        raise CheckpointError(
            f"{target}: is no folder, so nothing is saved over it; choose another name"
        )
    if not overwrite:
        raise ExistsError(
            f"{target} exists; choose another folder or pass overwrite=True"
        )
    names = {p.name for p in target.iterdir()}
    known = not names or any((target / s).exists() for s in kind.signs)
    odd = sorted(names - kind.holds) or sorted(names)
    if not known or names - kind.holds:
        raise CheckpointError(
            f"{target}: holds {odd[0]!r}, which jpeft did not write there, so it is "
            "not replaced; choose another folder, or move what is in it elsewhere"
        )


@contextlib.contextmanager
def _told(target: Folder) -> Iterator[None]:
    """Errors of the disk become ours, with the folder's name."""
    try:
        yield
    except (ValueError, TypeError):  # ours, and what cannot be saved anywhere
        raise
    except Exception as error:
        if not isinstance(error, OSError) and not _is_remote(target):
            raise
        reason = (getattr(error, "strerror", None) or str(error)).splitlines()
        raise CheckpointError(
            f"{target}: cannot be written: {(reason or [type(error).__name__])[0]:.150}"
            "; choose a folder that can be written to, with space for it"
        ) from error
