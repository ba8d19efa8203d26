"""The surface that every store has, and what all of them share. Knows keys and folders, no kind of store.

A key is a relative path with `/` between its parts. A prefix is a folder: `jobs/1` never matches `jobs/10/…`,
a slash at its end changes nothing, and `""` is the whole store.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from palate.store.errors import ObjectNotFoundError, StoreUsageError
from palate.store.uri import RESERVED, check_key, check_prefix

PARALLEL = 8
"""Files of a tree that move at the same time."""

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
            (Alibaba OSS has no such request) the etag is compared first and the object written after.
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

        A file store's root folder is made when `write` is set.

        Raises:
            BucketNotFoundError, StoreDeniedError, StoreUnreachableError, StoreError: Why not, and the remedy.
        """

    # ── files of this machine ──────────────────────────────────────────────────────────────────────────────

    @abstractmethod
    def upload(self, path: str | os.PathLike[str], key: str) -> None:
        """Copies a file of any size into the store; visible when it is whole.

        Raises:
            FileNotFoundError: `path` is no file of this machine.
        """

    @abstractmethod
    def _fetch(self, key: str, target: Path) -> None:
        """Writes an object's content to `target`, a fresh name here. Raises ObjectNotFoundError."""

    def download(self, key: str, path: str | os.PathLike[str]) -> None:
        """Copies an object of any size to a file, whole or not at all; makes the folders that it needs.

        Raises:
            ObjectNotFoundError: No object has this key; `path` is left as it was.
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = draft_beside(target)
        try:
            self._fetch(check_key(key), draft)
            os.replace(draft, target)
        finally:
            draft.unlink(missing_ok=True)

    def upload_tree(
        self, folder: str | os.PathLike[str], prefix: str = "", *, skip: Callable[[str], bool] | None = None
    ) -> Keys:
        """Copies every file below a folder of this machine, several at a time. Links are followed.

        Args:
            folder: On this machine.
            prefix: Folder in the store.
            skip: Gets each file's path relative to `folder` (with `/`); True leaves it out.

        Returns:
            The relative paths that were copied, sorted. After an error some files may be in place.

        Raises:
            FileNotFoundError: `folder` is no folder, or a file in it is a link to nothing.
        """
        source, below = Path(folder), check_prefix(prefix)
        if not source.is_dir():
            raise ObjectNotFoundError(f"{source} is no folder of this machine: nothing to upload to {self.uri(prefix)}")
        names = [name for name in walk(source) if not (skip is not None and skip(name))]
        in_parallel(lambda name: self.upload(source / name, below + name), names)
        return names

    def download_tree(self, prefix: str, folder: str | os.PathLike[str]) -> Keys:
        """Copies every object below a folder of the store to this machine, several at a time.

        Files that are in `folder` already and not in the store stay.

        Returns:
            The relative paths that were copied, sorted. After an error some files may be in place.

        Raises:
            ObjectNotFoundError: Nothing stands under `prefix`.
            StoreUsageError: An object's key would leave `folder`.
        """
        below, target = check_prefix(prefix), Path(folder)
        names = [check_key(info.key.removeprefix(below)) for info in self.list(prefix)]
        if not names:
            raise ObjectNotFoundError(
                f"{self.uri(prefix)} holds no object: check the name, or wait until it is written"
            )
        target.mkdir(parents=True, exist_ok=True)
        in_parallel(lambda name: self.download(below + name, target / name), names)
        return names

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


def draft_beside(target: Path) -> Path:
    """Returns a fresh, hidden name in the same folder: from there os.replace() is one step."""
    return target.with_name(f"{RESERVED}draft-{os.urandom(8).hex()}")


def walk(folder: Path) -> Iterator[str]:
    """Yields the relative path of every file below `folder`, with `/` and in the order of the whole paths.

    Follows links, except one that leads back to a folder above it; leaves out reserved names, sockets, pipes.
    A link to nothing is yielded: who reads it fails.
    """
    return _walk(folder, "", (os.path.realpath(folder),))


def _walk(folder: Path, below: str, above: tuple[str, ...]) -> Iterator[str]:
    try:
        with os.scandir(folder) as found:
            entries = [(entry.name, entry.is_dir(), entry.is_file() or entry.is_symlink()) for entry in found]
    except FileNotFoundError:
        return  # deleted meanwhile
    # A folder sorts as its files do: with its slash.
    for name, is_folder, is_file in sorted(entries, key=lambda entry: entry[0] + "/" * entry[1]):
        if name.startswith(RESERVED):
            continue
        if is_folder:
            real = os.path.realpath(folder / name)
            if real not in above:
                yield from _walk(folder / name, f"{below}{name}/", (*above, real))
        elif is_file:
            yield below + name


def in_parallel(function: Callable[[str], None], names: Iterable[str]) -> None:
    """Calls `function` with each name on a few threads. The first failure drops the rest and is raised."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(max_workers=PARALLEL, thread_name_prefix="palate-store") as pool:
        futures = [pool.submit(function, name) for name in names]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
