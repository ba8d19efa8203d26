"""A store in a folder of this machine or of a shared file system. Knows files, never S3.

An object is a file, written as a hidden draft beside its place and moved there in one step. Writers of one
folder take turns through a lock file in that folder, whatever root they opened; readers need none. Unlike on S3,
a key cannot be an object and a folder at once.

What a put has written outlives a power loss: file, its name, and the folders that were made for it. A folder is deleted by
moving it to a hidden name first. A put that races with that comes before it, and its object goes too; or after it, and the
object is there alone, in a new folder.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from palate.store.base import Keys, ObjectInfo, Store, check_condition, check_not_root, check_range
from palate.store.local import crc32_of, draft_beside, walk
from palate.store.uri import RESERVED, check_key, check_prefix
from palate_recipes.errors import (
    BucketNotFoundError,
    ObjectNotFoundError,
    PreconditionFailedError,
    StoreDeniedError,
    StoreError,
)

_LOCK = f"{RESERVED}lock"

_DIGEST_LIMIT = 8 << 20
"""Bytes up to which an etag is a digest of the content. Above, size and time stand in: stat stays fast."""

_CONTENDED_S = 10.0
"""How long a put or a deletion is tried whose folder others delete or fill at the same time."""


class FileStore(Store):
    """Objects as files below a folder; folders are made with mode 0700.

    Args:
        root: `file://` and an absolute path. The folder is made by the first put, or by `check`.
    """

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self._folder = Path(root.removeprefix("file://"))

    def get(self, key: str) -> bytes:
        with self._explained("read", key), _open_file(self._path(key)) as file:
            return file.read()

    def get_range(self, key: str, start: int, length: int | None = None) -> bytes:
        check_range(key, start, length)
        with self._explained("read", key), _open_file(self._path(key)) as file:
            file.seek(start)
            return file.read(-1 if length is None else length)

    def put(
        self,
        key: str,
        data: bytes,
        *,
        if_match: str | None = None,
        if_none_match: bool = False,
        private: bool = False,
    ) -> str:
        check_condition(key, if_match, if_none_match)
        path = self._path(key)
        with self._explained("written", key):
            give_up = time.monotonic() + _CONTENDED_S
            while True:
                try:
                    _make_folders(path.parent)
                    with _opened(path.parent) as folder, _locked(folder):
                        self._check(key, folder, if_match, if_none_match)
                        return _replace_whole(path.name, data, folder, mode=0o600 if private else 0o666)
                except FileNotFoundError:  # its folder was deleted
                    if time.monotonic() > give_up:
                        raise

    def _check(self, key: str, folder: int, if_match: str | None, if_none_match: bool) -> None:
        """Raises PreconditionFailedError unless the object is as a put wants it."""
        name = key.rpartition("/")[2]
        if if_none_match and _is_there(name, folder):
            raise PreconditionFailedError(f"{self.uri(key)} was not written: an object is there already")
        if if_match is not None:
            try:
                there = _etag(name, folder)[0]
            except (FileNotFoundError, IsADirectoryError):
                there = ""
            if there != if_match:
                raise PreconditionFailedError(
                    f"{self.uri(key)} was not written: etag {if_match} is no longer there; read it again"
                )

    def stat(self, key: str) -> ObjectInfo | None:
        path = self._path(key)
        try:
            with self._explained("read", key):
                etag, state = _etag(path)
        except ObjectNotFoundError:
            return None
        return ObjectInfo(key=key, size=state.st_size, etag=etag, modified_s=state.st_mtime)

    def checksum(self, key: str) -> str | None:
        try:
            with self._explained("read", key):
                _open_file(self._path(key)).close()
                return crc32_of(self._path(key))
        except ObjectNotFoundError:
            return None

    def delete(self, key: str) -> None:
        path = self._path(key)
        with self._explained("deleted", key):
            if path.is_file() or path.is_symlink():
                with suppress(FileNotFoundError), _opened(path.parent) as folder, _locked(folder):
                    os.unlink(path.name, dir_fd=folder)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        below = check_prefix(prefix)
        with self._explained("listed", prefix):
            for name in walk(self._folder / below):
                try:
                    state = os.stat(self._folder / below / name)
                except FileNotFoundError:
                    continue  # deleted meanwhile, or a link to nothing
                yield ObjectInfo(key=below + name, size=state.st_size, etag="", modified_s=state.st_mtime)

    def list_children(self, prefix: str = "") -> Keys:
        folder = self._folder / check_prefix(prefix)
        with self._explained("listed", prefix):
            try:
                names = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
            except (FileNotFoundError, NotADirectoryError):
                return []
            return sorted(name for name in names if not name.startswith(RESERVED) and any(walk(folder / name)))

    def delete_tree(self, prefix: str) -> None:
        folder = self._folder / check_not_root(prefix)
        with self._explained("deleted", prefix):
            if folder.is_symlink():
                folder.unlink()
                return
            hidden = draft_beside(folder)
            try:
                os.rename(folder, hidden)
            except (FileNotFoundError, NotADirectoryError):
                return
            try:
                _remove(hidden)
            except OSError:
                with suppress(OSError):  # another folder has that name by now
                    os.rename(hidden, folder)
                raise

    def upload(self, path: str | os.PathLike[str], key: str, *, moved: Callable[[int], object] | None = None) -> None:
        source, target = Path(path), self._path(key)
        if not source.is_file():
            raise ObjectNotFoundError(f"{source} is no file of this machine: nothing to upload to {self.uri(key)}")
        with self._explained("written", key):
            size = self._place(source, target)
        if moved is not None:
            moved(size)

    def _place(self, source: Path, target: Path) -> int:
        """Puts a copy of a file at `target` in one step, and returns its size in bytes."""
        give_up = time.monotonic() + _CONTENDED_S
        while True:
            draft = draft_beside(target)
            try:
                _make_folders(target.parent)
                shutil.copyfile(source, draft)
                descriptor = os.open(draft, os.O_RDONLY)
                try:
                    os.fsync(descriptor)  # who names it in a status must find it after a power loss
                    size = os.fstat(descriptor).st_size
                finally:
                    os.close(descriptor)
                os.replace(draft, target)
                with suppress(FileNotFoundError):  # deleted with its folder since
                    _keep_names(target.parent)
                return size
            except FileNotFoundError:  # its folder was deleted
                if time.monotonic() > give_up or not source.exists():
                    raise
            finally:
                draft.unlink(missing_ok=True)

    def _fetch(self, key: str, target: Path, moved: Callable[[int], object]) -> None:
        source = self._path(key)
        with self._explained("read", key):
            _open_file(source).close()
        shutil.copyfile(source, target)  # what fails from here on is the target, and `download` says so
        moved(target.stat().st_size)

    def local_path(self, key: str = "") -> Path | None:
        path = self._folder / check_prefix(key)
        return path if path.exists() else None

    def check(self, *, write: bool = True) -> None:
        if not write and not self._folder.exists():
            raise BucketNotFoundError(f"the folder {self._folder} is not there: check the path of {self.root}")
        with self._explained("used", ""):
            if write:
                _make_folders(self._folder)
            if not self._folder.is_dir():
                raise StoreError(
                    f"{self._folder} is a file: a store needs a folder; give another path than {self.root}"
                )
            os.scandir(self._folder).close()
            if write:
                draft = draft_beside(self._folder / "probe")
                try:
                    _write_through(draft, b"", mode=0o600)
                finally:
                    draft.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self._folder / check_key(key)

    @contextmanager
    def _explained(self, verb: str, key: str) -> Iterator[None]:
        """Turns what the operating system says into a StoreError with URI and remedy."""
        try:
            yield
        except StoreError:
            raise
        except OSError as error:
            what = f"{self.uri(key)} cannot be {verb}: {error.strerror or error}"
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise StoreDeniedError(
                    f"{what}. Give this user (uid {os.geteuid()}) the right to it, or choose another folder"
                ) from error
            if verb == "read" and error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
                raise ObjectNotFoundError(
                    f"{self.uri(key)} is not there: check the name, or wait until it is written"
                ) from error
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StoreError(f"{what}. Free space there, or choose another folder") from error
            if error.errno in (errno.EEXIST, errno.ENOTDIR, errno.EISDIR):
                raise StoreError(
                    f"{what}. A key cannot be an object and a folder at once: choose another key"
                ) from error
            raise StoreError(f"{what}. Check the file system below {self._folder}") from error


def _make_folders(folder: Path) -> None:
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for part in reversed(missing):  # mkdir(parents=True) would make those above with the umask's mode
        part.mkdir(mode=0o700, exist_ok=True)
        _keep_names(part.parent)


def _keep_names(folder: Path) -> None:
    """Writes through what names a folder holds: until then a power loss can take a new file or folder away again."""
    with _opened(folder) as descriptor:
        os.fsync(descriptor)


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _locked(folder: int) -> Iterator[None]:
    # flock on a fresh descriptor excludes threads as well as processes, and NFS carries it between machines.
    descriptor = os.open(_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666, dir_fd=folder)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _replace_whole(name: str, data: bytes, folder: int, *, mode: int) -> str:
    """Writes a file in an opened folder, in one step and through to the disk; returns its etag."""
    draft = draft_beside(Path(name)).name
    try:
        state = _write_through(draft, data, mode=mode, folder=folder)
        os.replace(draft, name, src_dir_fd=folder, dst_dir_fd=folder)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(draft, dir_fd=folder)
    os.fsync(folder)
    return _spelled_etag(state, data)


def _write_through(path: str | Path, data: bytes, *, mode: int, folder: int | None = None) -> os.stat_result:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode, dir_fd=folder)
    with open(descriptor, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(descriptor)
        return os.fstat(descriptor)


def _open_file(path: str | Path, folder: int | None = None) -> IO[bytes]:
    """Opens an object: a pipe that somebody put in its place would be waited for without end, and a device read so."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=folder)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        number = errno.EISDIR if stat.S_ISDIR(mode) else errno.ENOENT
        raise OSError(number, os.strerror(number), str(path))
    return open(descriptor, "rb")


def _is_there(name: str, folder: int) -> bool:
    try:
        os.stat(name, dir_fd=folder)
    except FileNotFoundError:
        return False
    return True


def _etag(path: str | Path, folder: int | None = None) -> tuple[str, os.stat_result]:
    """Returns the etag and the state of one and the same version: files are replaced, never changed."""
    with _open_file(path, folder) as stream:
        state = os.fstat(stream.fileno())
        return _spelled_etag(state, b"" if state.st_size > _DIGEST_LIMIT else stream.read()), state


def _spelled_etag(state: os.stat_result, data: bytes) -> str:
    if state.st_size > _DIGEST_LIMIT:
        return f"{state.st_size:x}-{state.st_mtime_ns:x}"
    return hashlib.sha256(data).hexdigest()


def _remove(folder: Path) -> None:
    give_up = time.monotonic() + _CONTENDED_S
    while True:
        try:
            shutil.rmtree(folder)
            return
        except OSError as error:  # a writer that had opened a folder in it put something in
            if error.errno not in (errno.ENOTEMPTY, errno.ENOENT) or time.monotonic() > give_up:
                raise
