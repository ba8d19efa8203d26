"""The interface of every store, and the transfer of whole folders. Knows keys and folders, no particular store.

A key is a relative path with `/` between its parts. A prefix names a folder: `jobs/1` never matches `jobs/10/…`,
a trailing slash is ignored, and `""` is the whole store.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from palate.store.local import crc32_of, draft_beside, in_parallel, walk
from palate.store.uri import check_key, check_prefix
from palate_recipes.errors import ObjectNotFoundError, StoreError, StoreUsageError

Keys = list[str]  # an alias, because `list` is a method inside Store


@dataclass(frozen=True, kw_only=True)
class ObjectInfo:
    """One object of a store.

    Attributes:
        key: Relative to the store's root.
        size: Bytes.
        etag: Changes with the content; compare it only with etags of the same store. Empty in the listings of a
            file store, which read no content; use `stat` instead.
        modified_s: Seconds since the epoch, by the store's clock.
    """

    key: str
    size: int
    etag: str
    modified_s: float


class Store(ABC):
    """Objects below one root URI. Thread-safe.

    Every method can raise StoreDeniedError, StoreUnreachableError, BucketNotFoundError or another StoreError,
    and StoreUsageError for a key or prefix that is absolute, has a `..` part or a reserved name.

    Attributes:
        root: URI of the store, without a trailing slash.
        atomic_replace: Whether `put(if_match=…)` is atomic. If False (Alibaba OSS does not support it, some servers
            ignore it), the etag is compared before the object is written, and two writers can race.
    """

    atomic_replace: bool = True

    def __init__(self, root: str) -> None:
        self.root = root

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.root!r})"

    def uri(self, key: str = "") -> str:
        """Returns the URI of an object or folder, or of the store itself for `""`."""
        if not key:
            return self.root
        checked = check_key(key.removesuffix("/"))
        return f"{self.root.rstrip('/')}/{checked}"

    # ── objects ────────────────────────────────────────────────────────────────────────────────────────────

    @abstractmethod
    def get(self, key: str) -> bytes:
        """Returns the content of an object.

        Raises:
            ObjectNotFoundError: No object has this key.
        """

    @abstractmethod
    def get_range(self, key: str, start: int, length: int | None = None) -> bytes:
        """Returns part of the content: fewer than `length` bytes near the end, none past it.

        Args:
            key: Key of the object.
            start: Offset of the first byte.
            length: Maximum number of bytes; None reads to the end.

        Raises:
            ObjectNotFoundError: No object has this key.
            StoreUsageError: `start` is negative, or `length` is less than 1.
        """

    @abstractmethod
    def put(
        self,
        key: str,
        data: bytes,
        *,
        if_match: str | None = None,
        if_none_match: bool = False,
        private: bool = False,
    ) -> str:
        """Writes an object atomically and returns its etag.

        Racing writers should write different bytes, for example with an id or a time: when the response to a put is
        lost and the put is retried, only the content shows that the first try succeeded.

        Args:
            key: Key of the object.
            data: The whole content.
            if_match: Write only if the existing object has this etag.
            if_none_match: Write only if no object has this key.
            private: Readable only by this user (file mode 0600). On S3 the bucket policy decides.

        Raises:
            PreconditionFailedError: The condition is not met; nothing was written.
        """

    @abstractmethod
    def stat(self, key: str) -> ObjectInfo | None:
        """Returns the metadata of an object, or None if it does not exist."""

    def exists(self, key: str) -> bool:
        """Returns whether an object has this key."""
        return self.stat(key) is not None

    @abstractmethod
    def checksum(self, key: str) -> str | None:
        """Returns the CRC-32 of the content as eight hex digits; None without an object or a recorded checksum.

        In a bucket it is in the metadata of every object that Palate wrote. A file store computes it from the file.
        """

    @abstractmethod
    def delete(self, key: str) -> None:
        """Deletes an object. Idempotent."""

    # ── folders ────────────────────────────────────────────────────────────────────────────────────────────

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Yields every object below a folder, at any depth, sorted by key; nothing if the folder does not exist."""

    @abstractmethod
    def list_children(self, prefix: str = "") -> Keys:
        """Returns the sorted names of the direct subfolders that contain at least one object.

        A server with real folders (SeaweedFS) may still list a folder shortly after its last object was deleted.
        """

    @abstractmethod
    def delete_tree(self, prefix: str) -> None:
        """Deletes every object below a folder. Idempotent. Raises StoreUsageError for `""`."""

    @abstractmethod
    def check(self, *, write: bool = True) -> None:
        """Checks within seconds that the store is usable: lists it and, with `write`, writes a probe object.

        For an `s3://` store, `write` also checks that the server enforces conditional writes.
        For a file store, `write` creates the root folder.

        Raises:
            BucketNotFoundError, StoreDeniedError, StoreUnreachableError, StoreError: The cause and the remedy.
        """

    # ── local files ────────────────────────────────────────────────────────────────────────────────────────

    @abstractmethod
    def upload(self, path: str | os.PathLike[str], key: str, *, moved: Callable[[int], object] | None = None) -> None:
        """Uploads a file of any size; the object becomes visible when it is complete.

        Args:
            path: Local file.
            key: Key of the object.
            moved: Called from several threads with the number of bytes of each part that was transferred.

        Raises:
            FileNotFoundError: `path` is not a local file.
        """

    @abstractmethod
    def _fetch(self, key: str, target: Path, moved: Callable[[int], object]) -> None:
        """Writes the content of an object to `target`, a new local file. Raises ObjectNotFoundError."""

    def download(self, key: str, path: str | os.PathLike[str], *, moved: Callable[[int], object] | None = None) -> None:
        """Downloads an object of any size to a file, atomically; creates missing folders.

        Args:
            key: Key of the object.
            path: Local file.
            moved: Called from several threads with the number of bytes of each part that was transferred.

        Raises:
            ObjectNotFoundError: No object has this key; `path` is unchanged.
            DigestMismatchError: The downloaded bytes differ from the uploaded ones; `path` is unchanged.
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        # A draft in the same folder: os.replace() is atomic only within a file system.
        draft = draft_beside(target)
        try:
            self._fetch(check_key(key), draft, moved or _ignore)
            os.replace(draft, target)
        except StoreError:
            raise
        except OSError as error:
            raise StoreError(
                f"{target} cannot be written: {error.strerror or error}. Check its folder and the free space there"
            ) from error
        finally:
            draft.unlink(missing_ok=True)

    def upload_tree(
        self,
        folder: str | os.PathLike[str],
        prefix: str = "",
        *,
        skip: Callable[[str], bool] | None = None,
        progress: Callable[[TransferProgress], None] | None = None,
    ) -> Keys:
        """Uploads every file below a local folder, several at a time. Follows symbolic links.

        Files that the store already has with the same size and CRC-32 are not sent again: call it again to retry
        after an error or to update a tree.

        Args:
            folder: Local folder.
            prefix: Folder in the store.
            skip: Called with each file's path relative to `folder` (with `/`); True skips the file.
            progress: Called after each part, from several threads but never concurrently.

        Returns:
            The relative paths of the tree, sorted. After an error some files may have been uploaded.

        Raises:
            FileNotFoundError: `folder` is not a folder, or a file in it is a dangling link.
        """

        return upload_tree(self, folder, prefix, skip=skip, progress=progress)

    def download_tree(
        self, prefix: str, folder: str | os.PathLike[str], *, progress: Callable[[TransferProgress], None] | None = None
    ) -> Keys:
        """Downloads every object below a folder of the store, several at a time.

        Keeps files in `folder` that are not in the store. Files with the size and CRC-32 of their object are not
        downloaded again: call it again to retry after an error.

        Args:
            prefix: Folder in the store.
            folder: Local folder; created if missing.
            progress: Called after each part, from several threads but never concurrently.

        Returns:
            The relative paths of the tree, sorted. After an error some files may have been downloaded.

        Raises:
            ObjectNotFoundError: No object below `prefix`.
            DigestMismatchError: The downloaded bytes differ from the uploaded ones.
            StoreUsageError: The key of an object would escape `folder`.
        """

        return download_tree(self, prefix, folder, progress=progress)

    def local_path(self, key: str = "") -> Path | None:
        """Returns the local path of an object or folder, or None if it must be downloaded."""
        check_prefix(key)
        return None


def check_condition(key: str, if_match: str | None, if_none_match: bool) -> None:
    """Raises StoreUsageError if both conditions of a put are given, or an empty etag."""
    if if_match is not None and if_none_match:
        raise StoreUsageError(f"put of {key!r}: if_match and if_none_match are mutually exclusive; pass one")
    if if_match == "":
        raise StoreUsageError(f"put of {key!r}: if_match is empty; pass an etag from stat() or put()")


def check_not_root(prefix: str) -> str:
    """Returns the checked prefix of a folder; raises StoreUsageError for the whole store."""
    if not prefix:
        raise StoreUsageError("delete_tree(prefix='') would delete the whole store: pass a folder in it")
    return check_prefix(prefix)


def check_range(key: str, start: int, length: int | None) -> None:
    """Raises StoreUsageError for an invalid byte range."""
    if start < 0 or (length is not None and length < 1):
        raise StoreUsageError(
            f"range of {key!r}: start={start}, length={length} is invalid: expected start >= 0 and length >= 1"
        )


def _ignore(_: int) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class TransferProgress:
    """Progress of a tree transfer.

    Attributes:
        files_done: Completed files, including those that did not need a transfer.
        files_total: Files in the tree.
        bytes_done: Transferred bytes; also grows within a large file.
        bytes_total: Bytes in the tree.
    """

    files_done: int
    files_total: int
    bytes_done: int
    bytes_total: int


def upload_tree(
    store: Store,
    folder: str | os.PathLike[str],
    prefix: str,
    *,
    skip: Callable[[str], bool] | None,
    progress: Callable[[TransferProgress], None] | None,
) -> Keys:
    """Implements `Store.upload_tree`."""
    source, below = Path(folder), check_prefix(prefix)
    if not source.is_dir():
        raise ObjectNotFoundError(
            f"{source} is not a local folder: nothing to upload to {store.uri(prefix)}. Check the path"
        )
    # All keys and sizes before the first upload: a bad name fails before anything is written, and progress has totals.
    sizes = {}
    for name in walk(source):
        if skip is not None and skip(name):
            continue
        check_key(below + name)
        try:
            sizes[name] = (source / name).stat().st_size
        except FileNotFoundError as error:
            raise ObjectNotFoundError(f"{source / name} is a dangling link or was deleted: fix or remove it") from error
    # One listing for the whole tree; only files of equal size cost a request for the checksum.
    there = {info.key: info.size for info in store.list(prefix)} if sizes else {}
    tally = Tally(sizes, progress)

    def send(name: str) -> None:
        path, key = source / name, below + name
        if there.get(key) == sizes[name] and store.checksum(key) == crc32_of(path):
            tally.moved(sizes[name])
        else:
            store.upload(path, key, moved=tally.moved)
        tally.file_done()

    in_parallel(send, sizes)
    return list(sizes)


def download_tree(
    store: Store, prefix: str, folder: str | os.PathLike[str], *, progress: Callable[[TransferProgress], None] | None
) -> Keys:
    """Implements `Store.download_tree`."""
    below, target = check_prefix(prefix), Path(folder)
    # check_key: a foreign object with `..` in its key must not be written outside `folder`.
    sizes = {check_key(info.key.removeprefix(below)): info.size for info in store.list(prefix)}
    if not sizes:
        raise ObjectNotFoundError(
            f"{store.uri(prefix)} contains no objects: check the name, or wait until it is written"
        )
    target.mkdir(parents=True, exist_ok=True)
    tally = Tally(sizes, progress)

    def fetch(name: str) -> None:
        path = target / name
        if path.is_file() and path.stat().st_size == sizes[name] and store.checksum(below + name) == crc32_of(path):
            tally.moved(sizes[name])
        else:
            store.download(below + name, path, moved=tally.moved)
        tally.file_done()

    in_parallel(fetch, sizes)
    return list(sizes)


class Tally:
    """Sums the progress of the threads of a tree transfer and reports it, one call at a time."""

    def __init__(self, sizes: dict[str, int], tell: Callable[[TransferProgress], None] | None) -> None:
        self._tell = tell
        self._files, self._bytes = len(sizes), sum(sizes.values())
        self._files_done = self._bytes_done = 0
        self._lock = Lock()

    def moved(self, count: int) -> None:
        self._add(0, count)

    def file_done(self) -> None:
        self._add(1, 0)

    def _add(self, files: int, size: int) -> None:
        # The callback runs inside the lock, so callers need no lock of their own and see the counts in order.
        with self._lock:
            self._files_done += files
            self._bytes_done += size
            if self._tell is not None:
                self._tell(
                    TransferProgress(
                        files_done=self._files_done,
                        files_total=self._files,
                        bytes_done=self._bytes_done,
                        bytes_total=self._bytes,
                    )
                )
