"""Copies objects and folders from any URI to any other: `palate store cp`. Knows stores by their surface alone.

Within one bucket the bytes stay on the server. From a bucket to another they go through a temporary file of this machine,
so that each way has its checksums and its repeated attempts.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from palate.store import open_store
from palate.store.errors import ObjectNotFoundError, StoreUsageError
from palate.store.local import in_parallel
from palate.store.tree import Progress, Tally
from palate.store.uri import check_prefix, normal_uri, split_uri

if TYPE_CHECKING:
    from palate.store.base import Keys, Store
    from palate.store.options import StoreOptions


@dataclass(frozen=True, kw_only=True)
class Place:
    """An object or a folder, by its whole URI.

    Attributes:
        uri: In its one spelling.
        store: Of the whole bucket; of a file, of the folder that holds it.
        key: In that store; "" for a whole bucket and for `/`.
        path: On this machine, or None.
    """

    uri: str
    store: Store
    key: str
    path: Path | None

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]


def open_place(uri: str | os.PathLike[str], *, options: StoreOptions | None = None) -> Place:
    """Opens what a URI or path names; sends nothing.

    Raises:
        StoreUsageError: The URI or the options cannot work.
        MissingDependencyError: boto3 is not installed; only for `s3://` and `oss://`.
    """
    whole = normal_uri(uri)
    scheme, _, rest = whole.partition("://")
    if scheme == "file":
        parent, name = (whole, "") if rest == "/" else split_uri(whole)
        return Place(uri=whole, store=open_store(parent), key=name, path=Path(rest))
    bucket, _, key = rest.partition("/")
    return Place(uri=whole, store=open_store(f"{scheme}://{bucket}", options=options), key=key, path=None)


def copy_object(source: Place, target: Place, *, moved: Callable[[int], object] | None = None) -> None:
    """Copies one object, whole or not at all.

    Args:
        source: An object.
        target: What it becomes; an object that is there is replaced.
        moved: Gets the number of bytes of each piece that has arrived, from several threads.

    Raises:
        ObjectNotFoundError: `source` is no object.
        StoreUsageError: Both are the same.
    """
    _check_apart(source, target)
    tell = moved or (lambda _: None)
    if target.path is not None:
        source.store.download(source.key, target.path, moved=tell)
    elif source.path is not None:
        target.store.upload(source.path, target.key, moved=tell)
    elif _bucket(source) == _bucket(target):
        _copy_there(source.store, source.key, target.key, tell)
    else:
        with tempfile.TemporaryDirectory(prefix="palate-copy-") as folder:
            _through(Path(folder) / "object", source.store, source.key, target.store, target.key, tell)


def copy_tree(source: Place, target: Place, *, progress: Callable[[Progress], None] | None = None) -> Keys:
    """Copies every object below a folder, several at a time; what is there already, with the same content, is left.

    Args:
        source: A folder.
        target: The folder that has the same objects then; what else is in it stays.
        progress: Gets the state after each piece, one call at a time, from several threads.

    Returns:
        The relative keys that are in place now, sorted.

    Raises:
        ObjectNotFoundError: Nothing stands below `source`.
        StoreUsageError: One of the two is in the other.
    """
    _check_apart(source, target)
    if target.path is not None:
        return source.store.download_tree(source.key, target.path, progress=progress)
    if source.path is not None:
        return target.store.upload_tree(source.path, target.key, progress=progress)
    below, onto = check_prefix(source.key), check_prefix(target.key)
    sizes = {info.key.removeprefix(below): info.size for info in source.store.list(source.key)}
    if not sizes:
        raise ObjectNotFoundError(f"{source.uri} holds no object: check the name, or wait until it is written")
    there = {info.key: info.size for info in target.store.list(target.key)}
    tally = Tally(sizes, progress)
    within = _bucket(source) == _bucket(target)
    with tempfile.TemporaryDirectory(prefix="palate-copy-") as folder:

        def copy(name: str) -> None:
            key, other = below + name, onto + name
            if there.get(other) == sizes[name] and _same(source.store, key, target.store, other):
                tally.moved(sizes[name])
            elif within:
                _copy_there(source.store, key, other, tally.moved)
            else:
                draft = Path(folder) / os.urandom(8).hex()
                _through(draft, source.store, key, target.store, other, tally.moved)
            tally.file_done()

        in_parallel(copy, sizes)
    return list(sizes)


def _check_apart(source: Place, target: Place) -> None:
    if f"{target.uri}/".startswith(f"{source.uri.rstrip('/')}/") or f"{source.uri}/".startswith(f"{target.uri}/"):
        raise StoreUsageError(
            f"{source.uri} and {target.uri}: one of them is, or lies in, the other; choose another place"
        )


def _bucket(place: Place) -> str:
    return place.store.root


def _same(store: Store, key: str, other_store: Store, other: str) -> bool:
    recorded = store.checksum(key)  # of other programs' objects there is none: they are copied anew
    return recorded is not None and recorded == other_store.checksum(other)


def _copy_there(store: Store, key: str, target: str, moved: Callable[[int], object]) -> None:
    store.copy(key, target)
    info = store.stat(target)
    moved(info.size if info else 0)


def _through(
    draft: Path, store: Store, key: str, other_store: Store, other: str, moved: Callable[[int], object]
) -> None:
    try:
        store.download(key, draft)
        other_store.upload(draft, other, moved=moved)
    finally:
        draft.unlink(missing_ok=True)
