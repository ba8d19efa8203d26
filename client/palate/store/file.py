"""A store in a folder of this machine or of a shared file system. Knows files, never S3.

An object is a file, written as a hidden draft beside its place and moved there in one step. Writers of one
folder take turns through a lock file in that folder, whatever root they opened; readers need none. Unlike on S3,
a key cannot be an object and a folder at once.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from palate.store.base import Keys, ObjectInfo, Store, check_condition, check_link, check_not_root, check_range
from palate.store.crc import crc32_of
from palate.store.errors import (
    BucketNotFoundError,
    ObjectNotFoundError,
    PreconditionFailedError,
    StoreDeniedError,
    StoreError,
    StoreUsageError,
)
from palate.store.local import draft_beside, walk
from palate.store.uri import RESERVED, check_key, check_prefix

_LOCK = f"{RESERVED}lock"

_DIGEST_LIMIT = 8 << 20
"""Bytes up to which an etag is a digest of the content. Above, size and time stand in: stat stays fast."""

_DELETE_ATTEMPTS = 5

_BLOCK = 4 << 20
"""Bytes that a stream yields at a time."""


class FileStore(Store):
    """Objects as files below a folder; folders are made with mode 0700.

    Args:
        root: `file://` and an absolute path. The folder is made by the first put, or by `check`.
    """

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self._folder = Path(root.removeprefix("file://"))

    def get(self, key: str) -> bytes:
        with self._explained("read", key):
            return self._path(key).read_bytes()

    def get_range(self, key: str, start: int, length: int | None = None) -> bytes:
        check_range(key, start, length)
        with self._explained("read", key), self._path(key).open("rb") as file:
            file.seek(start)
            return file.read(length)

    def stream(self, key: str) -> Iterator[bytes]:
        with self._explained("read", key), self._path(key).open("rb") as file:  # a file is replaced, never changed
            while block := file.read(_BLOCK):
                yield block

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
            _make_folders(path.parent)
            with _locked(path.parent):
                if if_none_match and path.exists():
                    raise PreconditionFailedError(f"{self.uri(key)} was not written: an object is there already")
                if if_match is not None and (not path.is_file() or _etag(path)[0] != if_match):
                    raise PreconditionFailedError(
                        f"{self.uri(key)} was not written: etag {if_match} is no longer there; read it again"
                    )
                draft = draft_beside(path)
                try:
                    _write_through(draft, data, mode=0o600 if private else 0o666)
                    os.replace(draft, path)
                finally:
                    draft.unlink(missing_ok=True)
                return _etag(path)[0]

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
                return crc32_of(self._path(key))
        except ObjectNotFoundError:
            return None

    def copy(self, key: str, target: str) -> None:
        source, copied = self._path(key), self._path(target)
        with self._explained("read", key):
            source.open("rb").close()
        with self._explained("written", target):
            self._place(source, copied)

    def presigned_url(self, key: str, *, expires_s: int = 3600, method: Literal["GET", "PUT"] = "GET") -> str:
        check_link(key, expires_s)
        raise StoreUsageError(
            f"{self.uri(key)} is a file: nobody serves it, so it has no link. Give its path, or keep it in a bucket "
            "(`palate store up` runs one)"
        )

    def delete(self, key: str) -> None:
        path = self._path(key)
        with self._explained("deleted", key):
            if path.is_file() or path.is_symlink():
                with _locked(path.parent):
                    path.unlink(missing_ok=True)

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
            for attempt in range(_DELETE_ATTEMPTS):
                try:
                    if folder.is_dir():
                        shutil.rmtree(folder)
                    return
                except OSError as error:  # a writer put something in, or another deletion took something out
                    if error.errno not in (errno.ENOTEMPTY, errno.ENOENT) or attempt == _DELETE_ATTEMPTS - 1:
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
        _make_folders(target.parent)
        draft = draft_beside(target)
        try:
            shutil.copyfile(source, draft)
            descriptor = os.open(draft, os.O_RDONLY)
            try:
                os.fsync(descriptor)  # who names it in a status must find it after a power loss
                size = os.fstat(descriptor).st_size
            finally:
                os.close(descriptor)
            os.replace(draft, target)
        finally:
            draft.unlink(missing_ok=True)
        return size

    def _fetch(self, key: str, target: Path, moved: Callable[[int], object]) -> None:
        source = self._path(key)
        with self._explained("read", key):
            source.open("rb").close()
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


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    # flock on a fresh descriptor excludes threads as well as processes, and NFS carries it between machines.
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write_through(path: Path, data: bytes, *, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with open(descriptor, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(descriptor)


def _etag(path: Path) -> tuple[str, os.stat_result]:
    """Returns the etag and the state of one and the same version: files are replaced, never changed."""
    with path.open("rb") as stream:
        state = os.fstat(stream.fileno())
        if state.st_size > _DIGEST_LIMIT:
            return f"{state.st_size:x}-{state.st_mtime_ns:x}", state
        return hashlib.sha256(stream.read()).hexdigest(), state
