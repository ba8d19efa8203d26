"""The grammar of store URIs and keys. Knows no store.

What follows the scheme is taken as it is, without percent-decoding: `s3://bucket/a b` has the key `a b`, and
`file:///tmp/a b` is the folder `/tmp/a b`. A text without a scheme is a path of this machine.
"""

from __future__ import annotations

import os
import re

from palate_recipes.errors import StoreUsageError
from palate_recipes.text import expand_path, show_path

SCHEMES = ("file", "s3", "oss")

RESERVED = ".palate-"
"""Begins every name that a store keeps for itself (locks, drafts, probes). Refused in keys, never listed."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def normal_uri(uri: str | os.PathLike[str]) -> str:
    """Returns the URI in its one spelling: with scheme, absolute, without a slash at the end.

    Raises:
        StoreUsageError: Unknown scheme, no bucket, credentials inside, or a relative `file://`.
    """
    text = os.fspath(uri)
    scheme, separator, rest = text.partition("://")
    if not separator:
        if not text:
            raise StoreUsageError("the store URI is empty: give a folder, file://…, s3://… or oss://…")
        return "file://" + os.path.abspath(_expanded(text))
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise StoreUsageError(f"scheme {scheme}:// is unknown: give a path or one of {known}")
    if scheme == "file":
        rest = rest.removeprefix("localhost") if rest.startswith("localhost/") else rest
        if not rest.startswith("/"):
            raise StoreUsageError(
                f"{text!r} has no absolute path: write file:///folder with three slashes, or a plain path"
            )
        return "file://" + os.path.abspath(_expanded(rest))
    bucket, _, prefix = rest.partition("/")
    if "@" in bucket:  # the message repeats nothing of it
        raise StoreUsageError(f"the {scheme}:// URI holds credentials: give them as StoreOptions or in the environment")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", bucket):
        raise StoreUsageError(f"{text!r} names no bucket: write {scheme}://bucket/folder")
    prefix = prefix.strip("/")
    return f"{scheme}://{bucket}/{check_key(prefix)}" if prefix else f"{scheme}://{bucket}"


def _expanded(path: str) -> str:
    try:
        return expand_path(path)
    except ValueError as error:
        raise StoreUsageError(f"the store {show_path(path)} {error}") from None


def split_uri(uri: str | os.PathLike[str]) -> tuple[str, str]:
    """Splits the URI of an object or folder into the URI of the folder that holds it and its name there.

    Raises:
        StoreUsageError: No URI of a store, or one of a whole bucket.
    """
    whole = normal_uri(uri)
    parent, _, name = whole.rpartition("/")
    if parent.endswith(":/") or not name:
        raise StoreUsageError(f"{whole} is a whole store: name a file or folder in it")
    return (f"{parent}/" if parent == "file://" else parent), name


def check_key(key: str) -> str:
    """Returns `key`, or raises StoreUsageError when it is no relative path that stays below its root."""
    parts = key.split("/")
    if not key:
        problem = "is empty"
    elif key.startswith("/"):
        problem = "is absolute"
    elif ".." in parts or "." in parts:
        problem = "has a '.' or '..' part"
    elif "" in parts:
        problem = "has an empty part"
    elif _CONTROL.search(key):
        problem = "has a control character"
    elif any(part.startswith(RESERVED) for part in parts):
        problem = f"has a part that begins with {RESERVED!r}, which stores keep for themselves"
    elif not _is_unicode(key):
        problem = "is no valid Unicode (a file name in another encoding?)"
    else:
        return key
    raise StoreUsageError(f"key {key!r} {problem}: give a relative path such as 'jobs/1/status.json'")


def check_prefix(prefix: str) -> str:
    """Returns the prefix of a folder's keys: `""`, or a checked key with one slash at its end."""
    return check_key(prefix.removesuffix("/")) + "/" if prefix else ""


def is_reserved(key: str) -> bool:
    """Says whether a part of `key` is a name that stores keep for themselves."""
    return any(part.startswith(RESERVED) for part in key.split("/"))


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
