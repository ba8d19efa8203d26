"""Object stores behind one interface: `file://` (and plain paths), `s3://` and `oss://`. Knows objects, never jobs.

boto3 is imported only when an object store is opened.
"""

from __future__ import annotations

import os

from palate.store.base import ObjectInfo, Store, TransferProgress
from palate.store.options import StoreOptions
from palate.store.uri import normal_uri, split_uri

__all__ = [
    "ObjectInfo",
    "Store",
    "StoreOptions",
    "TransferProgress",
    "open_parent",
    "open_store",
    "read_uri",
    "split_uri",
]


def open_store(uri: str | os.PathLike[str], *, options: StoreOptions | None = None) -> Store:
    """Opens the store whose root is `uri`. Sends no request; call `Store.check` to test the connection.

    Args:
        uri: `file:///folder`, a plain path, `s3://bucket/folder` or `oss://bucket/folder`.
        options: Endpoint and credentials of an object store; ignored for a file store.

    Raises:
        StoreUsageError: The URI or the options are invalid.
        MissingDependencyError: boto3 is not installed; only for `s3://` and `oss://`.
    """
    root = normal_uri(uri)
    if root.startswith("file://"):
        from palate.store.file import FileStore

        return FileStore(root)
    from palate.store.s3 import S3Store

    return S3Store(root, options or StoreOptions())


def open_parent(uri: str | os.PathLike[str], *, options: StoreOptions | None = None) -> tuple[Store, str]:
    """Opens the parent folder of the object or folder `uri`; returns the store and the name in it.

    Raises:
        StoreUsageError: The URI or the options are invalid, or `uri` is a whole bucket.
    """
    parent, name = split_uri(uri)
    return open_store(parent, options=options), name


def read_uri(uri: str | os.PathLike[str], *, options: StoreOptions | None = None) -> bytes:
    """Returns the content of the object at a full URI.

    Raises:
        ObjectNotFoundError: The object does not exist.
    """
    store, name = open_parent(uri, options=options)
    return store.get(name)
