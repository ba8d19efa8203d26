"""The grammar of store URIs and keys. Knows strings, no store.

The part after the scheme is used as is, without percent-decoding: `s3://bucket/a b` has the key `a b`, and
`file:///tmp/a b` is the folder `/tmp/a b`. A string without a scheme is a local path.
"""

from __future__ import annotations

import os
import re

from palate_recipes.errors import StoreUsageError
from palate_recipes.text import expand_path, show_path

SCHEMES = ("file", "s3", "oss")

RESERVED = ".palate-"
"""Prefix of the names that stores use internally (locks, drafts, probes). Rejected in keys, never listed."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def normal_uri(uri: str | os.PathLike[str]) -> str:
    """Returns the URI in its canonical form: with a scheme, absolute, without a trailing slash.

    Raises:
        StoreUsageError: Unknown scheme, no bucket, credentials in the URI, or a relative `file://`.
    """
    text = os.fspath(uri)
    scheme, separator, rest = text.partition("://")
    if not separator:
        if not text:
            raise StoreUsageError("the store URI is empty: expected a folder, file://…, s3://… or oss://…")
        return "file://" + os.path.abspath(_expanded(text))
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise StoreUsageError(f"scheme {scheme}:// is unknown: expected a path or one of {known}")
    if scheme == "file":
        rest = rest.removeprefix("localhost") if rest.startswith("localhost/") else rest
        if not rest.startswith("/"):
            raise StoreUsageError(f"{text!r} is not absolute: write file:///folder with three slashes, or a plain path")
        return "file://" + os.path.abspath(_expanded(rest))
    bucket, _, prefix = rest.partition("/")
    if "@" in bucket:  # the message omits the URI, which contains a secret
        raise StoreUsageError(
            f"the {scheme}:// URI contains credentials: pass them as StoreOptions or in the environment"
        )
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", bucket):
        raise StoreUsageError(f"{text!r} has no valid bucket name: expected {scheme}://bucket/folder")
    prefix = prefix.strip("/")
    return f"{scheme}://{bucket}/{check_key(prefix)}" if prefix else f"{scheme}://{bucket}"


def _expanded(path: str) -> str:
    try:
        return expand_path(path)
    except ValueError as error:
        raise StoreUsageError(f"the store {show_path(path)} {error}") from None


def split_uri(uri: str | os.PathLike[str]) -> tuple[str, str]:
    """Splits the URI of an object or folder into the URI of its parent folder and its name.

    Raises:
        StoreUsageError: Not a store URI, or the URI of a whole bucket.
    """
    whole = normal_uri(uri)
    parent, _, name = whole.rpartition("/")
    if parent.endswith(":/") or not name:
        raise StoreUsageError(f"{whole} is a whole store: expected a file or folder in it")
    # `file:///` keeps its slash: without it the parent of `file:///a` would be a URI without a path.
    return (f"{parent}/" if parent == "file://" else parent), name


def check_key(key: str) -> str:
    """Returns `key`; raises StoreUsageError unless it is a relative path that stays below the root.

    Every key passes through here before it reaches a file system or a bucket, so no store checks for `..` itself.
    """
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
        problem = f"has a part that begins with {RESERVED!r}, which is reserved"
    elif not _is_unicode(key):
        problem = "is not valid Unicode (a file name in another encoding?)"
    else:
        return key
    raise StoreUsageError(f"key {key!r} {problem}: expected a relative path such as 'jobs/1/status.json'")


def check_prefix(prefix: str) -> str:
    """Returns the prefix of the keys in a folder: `""`, or a checked key with one trailing slash."""
    return check_key(prefix.removesuffix("/")) + "/" if prefix else ""


def is_reserved(key: str) -> bool:
    """Returns whether a part of `key` is a reserved name."""
    return any(part.startswith(RESERVED) for part in key.split("/"))


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
