"""Moves whole folders between a store and this machine: several files at once, and only what is not there yet.

Knows stores by their surface alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from palate.store.crc import crc32_of
from palate.store.errors import ObjectNotFoundError
from palate.store.local import in_parallel, walk
from palate.store.uri import check_key, check_prefix

if TYPE_CHECKING:
    from palate.store.base import Keys, Store


@dataclass(frozen=True, kw_only=True)
class Progress:
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
    progress: Callable[[Progress], None] | None,
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
    store: Store, prefix: str, folder: str | os.PathLike[str], *, progress: Callable[[Progress], None] | None
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

    def __init__(self, sizes: dict[str, int], tell: Callable[[Progress], None] | None) -> None:
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
                    Progress(
                        files_done=self._files_done,
                        files_total=self._files,
                        bytes_done=self._bytes_done,
                        bytes_total=self._bytes,
                    )
                )
