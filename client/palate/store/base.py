"""The surface that every store has, and whole folders moved through it. Knows keys and folders, no kind of store.

A key is a relative path with `/` between its parts. A prefix is a folder: `jobs/1` never matches `jobs/10/…`,
a slash at its end changes nothing, and `""` is the whole store.
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

Keys = list[str]  # inside Store, `list` is the method


@dataclass(frozen=True, kw_only=True)
class ObjectInfo:
    """One object of a store.

    Attributes:
        key: Relative to the store's root.
        size: Bytes.
        etag: Changes with the content; compare it only with etags of the same store. Empty in a file store's
            listings, which read no content: `stat` has it.
        modified_s: Seconds since the epoch, by the store's clock.
    """

    key: str
    size: int
    etag: str
    modified_s: float


class Store(ABC):
    """Objects below one root URI. Safe to use from several threads.

    Every method can raise StoreDeniedError, StoreUnreachableError, BucketNotFoundError or another StoreError,
    and StoreUsageError for a key or prefix that is absolute, has a `..` part or a reserved name.

    Attributes:
        root: URI of the store, without a slash at its end.
        atomic_replace: Whether the store decides `put(if_match=…)` in one step. Where it is False
            (Alibaba OSS has no such request, some servers ignore it) the etag is compared first and the object written after.
    """

    atomic_replace: bool = True

    def __init__(self, root: str) -> None:
        self.root = root

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.root!r})"

    def uri(self, key: str = "") -> str:
        """Returns the URI of an object or folder; of the store itself for `""`."""
        if not key:
            return self.root
        checked = check_key(key.removesuffix("/"))
        return f"{self.root.rstrip('/')}/{checked}"

    # ── objects ────────────────────────────────────────────────────────────────────────────────────────────

    @abstractmethod
    def get(self, key: str) -> bytes:
        """Returns the content.

        Raises:
            ObjectNotFoundError: No object has this key.
        """

    @abstractmethod
    def get_range(self, key: str, start: int, length: int | None = None) -> bytes:
        """Returns a part of the content: less than `length` bytes at its end, none behind it.

        Args:
            key: Which object.
            start: Bytes to leave out.
            length: Bytes at most; None goes to the end.

        Raises:
            ObjectNotFoundError: No object has this key.
            StoreUsageError: `start` is negative, or `length` less than 1.
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
        """Writes an object whole or not at all, and returns its etag.

        Two racing writers should not write the same bytes (give each an id or a time): a put that is repeated
        because its answer got lost knows its own work only by the content.

        Args:
            key: Where.
            data: All of it.
            if_match: Write only over the object that has this etag.
            if_none_match: Write only where no object is.
            private: Readable by this user alone (file mode 0600). On S3 the bucket's policy decides.

        Raises:
            PreconditionFailedError: The condition does not hold; nothing was written.
        """

    @abstractmethod
    def stat(self, key: str) -> ObjectInfo | None:
        """Returns what is known about an object without its content, or None where none is."""

    def exists(self, key: str) -> bool:
        """Says whether an object has this key."""
        return self.stat(key) is not None

    @abstractmethod
    def checksum(self, key: str) -> str | None:
        """Returns the CRC-32 of the content as eight hex digits; None where no object is, or nobody recorded it.

        A bucket has it for what Palate wrote: it stands in the object's metadata. A file store reads the file.
        """

    @abstractmethod
    def delete(self, key: str) -> None:
        """Removes an object; no error where none is."""

    # ── folders ────────────────────────────────────────────────────────────────────────────────────────────

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Yields every object below a folder, at any depth, sorted by key; nothing where no folder is."""

    @abstractmethod
    def list_children(self, prefix: str = "") -> Keys:
        """Returns the names of the folders right below a folder that hold at least one object, sorted.

        A server that keeps folders (SeaweedFS) may name one for a while after its last object was deleted.
        """

    @abstractmethod
    def delete_tree(self, prefix: str) -> None:
        """Removes every object below a folder; no error where none is. Refuses `""`: StoreUsageError."""

    @abstractmethod
    def check(self, *, write: bool = True) -> None:
        """Proves within seconds that the store can be used: lists it and, with `write`, writes a probe.

        Of an `s3://` store it also proves that conditional puts fail when they must.
        A file store's root folder is made when `write` is set.

        Raises:
            BucketNotFoundError, StoreDeniedError, StoreUnreachableError, StoreError: Why not, and the remedy.
        """

    # ── files of this machine ──────────────────────────────────────────────────────────────────────────────

    @abstractmethod
    def upload(self, path: str | os.PathLike[str], key: str, *, moved: Callable[[int], object] | None = None) -> None:
        """Copies a file of any size into the store; visible when it is whole.

        Args:
            path: On this machine.
            key: Where.
            moved: Gets the number of bytes of each piece that has arrived, from several threads.

        Raises:
            FileNotFoundError: `path` is no file of this machine.
        """

    @abstractmethod
    def _fetch(self, key: str, target: Path, moved: Callable[[int], object]) -> None:
        """Writes an object's content to `target`, a fresh name here. Raises ObjectNotFoundError."""

    def download(self, key: str, path: str | os.PathLike[str], *, moved: Callable[[int], object] | None = None) -> None:
        """Copies an object of any size to a file, whole or not at all; makes the folders that it needs.

        Args:
            key: Which object.
            path: On this machine.
            moved: Gets the number of bytes of each piece that has arrived, from several threads.

        Raises:
            ObjectNotFoundError: No object has this key; `path` is left as it was.
            DigestMismatchError: What arrived is not what was uploaded; `path` is left as it was.
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = draft_beside(target)
        try:
            self._fetch(check_key(key), draft, moved or _ignore)
            os.replace(draft, target)
        except StoreError:
            raise
        except OSError as error:
            raise StoreError(
                f"{target} cannot be written: {error.strerror or error}. Check its folder and the room there"
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
        """Copies every file below a folder of this machine, several at a time. Links are followed.

        What is in the store already with the same size and CRC-32 is not sent again: after an error, or to bring
        a tree up to date, call it once more.

        Args:
            folder: On this machine.
            prefix: Folder in the store.
            skip: Gets each file's path relative to `folder` (with `/`); True leaves it out.
            progress: Gets the state after each piece, one call at a time, from several threads.

        Returns:
            The relative paths that are in place now, sorted. After an error some files may be.

        Raises:
            FileNotFoundError: `folder` is no folder, or a file in it is a link to nothing.
        """

        return upload_tree(self, folder, prefix, skip=skip, progress=progress)

    def download_tree(
        self, prefix: str, folder: str | os.PathLike[str], *, progress: Callable[[TransferProgress], None] | None = None
    ) -> Keys:
        """Copies every object below a folder of the store to this machine, several at a time.

        Files that are in `folder` already and not in the store stay. Those with the size and CRC-32 of their
        object are not fetched again: after an error, call it once more.

        Args:
            prefix: Folder in the store.
            folder: On this machine; made where it is not.
            progress: Gets the state after each piece, one call at a time, from several threads.

        Returns:
            The relative paths that are in place now, sorted. After an error some files may be.

        Raises:
            ObjectNotFoundError: Nothing stands under `prefix`.
            DigestMismatchError: What arrived is not what was uploaded.
            StoreUsageError: An object's key would leave `folder`.
        """

        return download_tree(self, prefix, folder, progress=progress)

    def local_path(self, key: str = "") -> Path | None:
        """Returns the path of an object or folder that lies on this machine, or None: download it then."""
        check_prefix(key)
        return None


def check_condition(key: str, if_match: str | None, if_none_match: bool) -> None:
    """Raises StoreUsageError when both conditions of a put are given, or an empty etag."""
    if if_match is not None and if_none_match:
        raise StoreUsageError(f"put of {key!r}: if_match and if_none_match exclude each other; give one")
    if if_match == "":
        raise StoreUsageError(f"put of {key!r}: if_match is empty; take the etag from stat() or put()")


def check_not_root(prefix: str) -> str:
    """Returns the checked prefix of a folder; raises StoreUsageError for the whole store."""
    if not prefix:
        raise StoreUsageError("delete_tree('') would empty the whole store: name a folder in it")
    return check_prefix(prefix)


def check_range(key: str, start: int, length: int | None) -> None:
    """Raises StoreUsageError when no bytes can be meant."""
    if start < 0 or (length is not None and length < 1):
        raise StoreUsageError(
            f"range of {key!r}: start={start}, length={length} names no bytes; start is 0 or more, length 1 or more"
        )


def _ignore(_: int) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class TransferProgress:
    """How far a tree is.

    Attributes:
        files_done: Files that are in place, those that were there before included.
        files_total: Files of the tree.
        bytes_done: Bytes that are in place; grows within a large file, too.
        bytes_total: Bytes of the tree.
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
    """Does what `Store.upload_tree` says."""
    source, below = Path(folder), check_prefix(prefix)
    if not source.is_dir():
        raise ObjectNotFoundError(f"{source} is no folder of this machine: nothing to upload to {store.uri(prefix)}")
    sizes = {}
    for name in walk(source):
        if skip is not None and skip(name):
            continue
        check_key(below + name)
        try:
            sizes[name] = (source / name).stat().st_size
        except FileNotFoundError as error:
            raise ObjectNotFoundError(
                f"{source / name} is no file of this machine (a link to nothing?): mend or remove it"
            ) from error
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
    """Does what `Store.download_tree` says."""
    below, target = check_prefix(prefix), Path(folder)
    sizes = {check_key(info.key.removeprefix(below)): info.size for info in store.list(prefix)}
    if not sizes:
        raise ObjectNotFoundError(f"{store.uri(prefix)} holds no object: check the name, or wait until it is written")
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
    """Adds up what the threads of a tree report, and tells it one call at a time."""

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
