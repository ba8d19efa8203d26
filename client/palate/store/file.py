"""A store in a local folder or on a shared file system. Knows files, never S3.

An object is a file: written as a hidden draft in its folder, then renamed. A lock file in each folder serializes its
writers, whatever root they opened; readers need no lock. Unlike on S3, a key cannot be both an object and a folder.

A put survives a power loss: the file, its name, and the folders created for it are synced to disk. A folder is renamed to a
hidden name before it is deleted. A put that races with the deletion either comes first, and its object is deleted too, or
comes second, and its object is alone in a new folder.
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
"""Maximum bytes for which an etag is a digest of the content. Above, it is size and mtime, to keep stat fast."""

_CONTENDED_S = 10.0
"""How long a put or a deletion is retried while other processes delete or fill its folder."""


class FileStore(Store):
    """Objects as files below a folder; folders are created with mode 0700.

    Args:
        root: `file://` and an absolute path. The first put, or `check`, creates the folder.
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
                    # All steps use the descriptor, not the path: if the folder is moved away meanwhile, the object
                    # goes with it, and never lands unlocked in a new folder of the same name.
                    with _opened(path.parent) as folder, _locked(folder):
                        self._check(key, folder, if_match, if_none_match)
                        return _replace_whole(path.name, data, folder, mode=0o600 if private else 0o666)
                except FileNotFoundError:  # the folder was deleted: create it again
                    if time.monotonic() > give_up:
                        raise

    def _check(self, key: str, folder: int, if_match: str | None, if_none_match: bool) -> None:
        """Raises PreconditionFailedError unless the conditions of a put are met. Call with the folder locked."""
        name = key.rpartition("/")[2]
        if if_none_match and _is_there(name, folder):
            raise PreconditionFailedError(f"{self.uri(key)} was not written: the object already exists; read it again")
        if if_match is not None:
            try:
                there = _etag(name, folder)[0]
            except (FileNotFoundError, IsADirectoryError):
                there = ""
            if there != if_match:
                raise PreconditionFailedError(
                    f"{self.uri(key)} was not written: the object no longer has the etag {if_match}; read it again"
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
                _open_file(self._path(key)).close()  # rejects pipes and devices, which crc32_of would read forever
                return crc32_of(self._path(key))
        except ObjectNotFoundError:
            return None

    def delete(self, key: str) -> None:
        path = self._path(key)
        with self._explained("deleted", key):
            if path.is_file() or path.is_symlink():  # a folder with this name is not an object
                with suppress(FileNotFoundError), _opened(path.parent) as folder, _locked(folder):
                    os.unlink(path.name, dir_fd=folder)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        below = check_prefix(prefix)
        with self._explained("listed", prefix):
            for name in walk(self._folder / below):
                try:
                    state = os.stat(self._folder / below / name)
                except FileNotFoundError:
                    continue  # deleted concurrently, or a dangling link
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
            if folder.is_symlink():  # delete the link only: its target may be outside the store
                folder.unlink()
                return
            # Rename first: readers see the folder whole or not at all, and new puts go into a new folder.
            hidden = draft_beside(folder)
            try:
                os.rename(folder, hidden)
            except (FileNotFoundError, NotADirectoryError):
                return
            try:
                _remove(hidden)
            except OSError:
                # Restore the name so that the rest can be listed and deleted again, unless a new folder has taken it.
                with suppress(OSError):
                    os.rename(hidden, folder)
                raise

    def upload(self, path: str | os.PathLike[str], key: str, *, moved: Callable[[int], object] | None = None) -> None:
        source, target = Path(path), self._path(key)
        if not source.is_file():
            raise ObjectNotFoundError(
                f"{source} is not a local file: nothing to upload to {self.uri(key)}. Check the path"
            )
        with self._explained("written", key):
            size = self._place(source, target)
        if moved is not None:
            moved(size)

    def _place(self, source: Path, target: Path) -> int:
        """Copies a file to `target` atomically; returns its size in bytes."""
        give_up = time.monotonic() + _CONTENDED_S
        while True:
            draft = draft_beside(target)
            try:
                _make_folders(target.parent)
                shutil.copyfile(source, draft)
                descriptor = os.open(draft, os.O_RDONLY)
                try:
                    os.fsync(descriptor)  # a status that names this file must find it after a power loss
                    size = os.fstat(descriptor).st_size
                finally:
                    os.close(descriptor)
                os.replace(draft, target)
                with suppress(FileNotFoundError):  # the folder was deleted since, and the object with it
                    _keep_names(target.parent)
                return size
            except FileNotFoundError:  # the folder was deleted: create it again
                if time.monotonic() > give_up or not source.exists():
                    raise
            finally:
                draft.unlink(missing_ok=True)

    def _fetch(self, key: str, target: Path, moved: Callable[[int], object]) -> None:
        source = self._path(key)
        with self._explained("read", key):
            _open_file(source).close()
        shutil.copyfile(source, target)  # outside _explained: an error here is about the target; `download` reports it
        moved(target.stat().st_size)

    def local_path(self, key: str = "") -> Path | None:
        path = self._folder / check_prefix(key)
        return path if path.exists() else None

    def check(self, *, write: bool = True) -> None:
        if not write and not self._folder.exists():
            raise BucketNotFoundError(f"the folder {self._folder} does not exist: check the path of {self.root}")
        with self._explained("used", ""):
            if write:
                _make_folders(self._folder)
            if not self._folder.is_dir():
                raise StoreError(
                    f"{self._folder} is a file, but a store needs a folder: use a path other than {self.root}"
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
        """Turns an OSError into a StoreError with URI, cause and remedy."""
        try:
            yield
        except StoreError:
            raise
        except OSError as error:
            what = f"{self.uri(key)} cannot be {verb}: {error.strerror or error}"
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise StoreDeniedError(
                    f"{what}. Give this user (uid {os.geteuid()}) permission, or choose another folder"
                ) from error
            if verb == "read" and error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
                raise ObjectNotFoundError(
                    f"{self.uri(key)} does not exist: check the name, or wait until it is written"
                ) from error
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StoreError(f"{what}. Free space there, or choose another folder") from error
            if error.errno in (errno.EEXIST, errno.ENOTDIR, errno.EISDIR):
                raise StoreError(f"{what}. A key cannot be both an object and a folder: choose another key") from error
            raise StoreError(f"{what}. Check the file system of {self._folder}") from error


def _make_folders(folder: Path) -> None:
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for part in reversed(missing):  # mkdir(parents=True) would create the parents with the umask's mode, not 0700
        part.mkdir(mode=0o700, exist_ok=True)
        _keep_names(part.parent)


def _keep_names(folder: Path) -> None:
    """Syncs the entries of a folder to disk: before that, a power loss can remove a new file or folder."""
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
    # flock on a new descriptor excludes threads as well as processes, and works across machines on NFS.
    # The lock file is deleted only with its folder: otherwise two writers could lock two files of the same name.
    descriptor = os.open(_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666, dir_fd=folder)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _replace_whole(name: str, data: bytes, folder: int, *, mode: int) -> str:
    """Writes a file in an open folder, atomically and synced to disk; returns its etag."""
    draft = draft_beside(Path(name)).name
    try:
        state = _write_through(draft, data, mode=mode, folder=folder)
        os.replace(draft, name, src_dir_fd=folder, dst_dir_fd=folder)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(draft, dir_fd=folder)
    os.fsync(folder)  # the rename is durable only now
    return _spelled_etag(state, data)


def _write_through(path: str | Path, data: bytes, *, mode: int, folder: int | None = None) -> os.stat_result:
    # O_EXCL: `mode` applies only to a new file, and a planted link of this name must not be followed.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode, dir_fd=folder)
    with open(descriptor, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(descriptor)
        return os.fstat(descriptor)


def _open_file(path: str | Path, folder: int | None = None) -> IO[bytes]:
    """Opens an object; rejects a pipe or device in its place, which would block or be read forever."""
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
    """Returns the etag and the stat of the same version: files are replaced, never modified."""
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
        except OSError as error:  # a writer that had already opened a subfolder added a file
            if error.errno not in (errno.ENOTEMPTY, errno.ENOENT) or time.monotonic() > give_up:
                raise
