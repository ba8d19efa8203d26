"""Fetches preference data: turns paths, folders, globs and URIs into local files. Knows locations, not the files' content."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from palate.session import Session
from palate.sources.select import REPEATED, Fetched, few, matches, of_folder, of_glob, split_glob
from palate.store import open_parent, open_store
from palate.store.local import in_parallel, walk
from palate.store.uri import normal_uri
from palate_recipes.errors import ConfigurationError, DataError, ObjectNotFoundError
from palate_recipes.text import LONGEST, did_you_mean, expand_path, show_path

KNOWN = (
    "a local path, folder or glob, file://, s3://, oss://, hf://datasets/OWNER/NAME, "
    "gsheet://ID/WORKSHEET or https://docs.google.com/spreadsheets/d/ID"
)
"""Supported locations, for error messages."""

_SHEETS = "https://docs.google.com/spreadsheets/"


@contextmanager
def fetch_files(uri: str | Path, session: Session) -> Iterator[Fetched]:
    """Makes the data files at `uri` available on this machine while the block runs.

    Local files are used in place, files of a hub dataset are in the hub's own cache, all others in a temporary folder that
    is deleted at the end. A folder (or prefix) is read recursively and must contain one split; a glob selects files.

    Args:
        uri: A local path, folder or glob (`data/part-*.jsonl.gz`, `**` for any depth), or one in a store: `file://`,
            `s3://`, `oss://`; `hf://datasets/OWNER/NAME[@revision][/path or glob][?split=train&config=…]`; a Google Sheet.
        session: Has the options of object stores.

    Raises:
        ConfigurationError: The URI is invalid, or a setting for it is missing.
        DataError: Nothing found, not a data file, or a folder with several splits; lists what exists.
        MissingDependencyError: An optional package for this kind of location is not installed.
        StoreError: The location refuses access or does not respond.
    """
    text = os.fspath(uri)
    scheme, separator, _ = text.partition("://")
    if not text.strip():
        raise ConfigurationError(f"the path of the data is empty: expected {KNOWN}")
    if len(text) >= LONGEST:
        raise ConfigurationError(
            f"{show_path(text)} has {len(text):,} characters: expected a path or URI with fewer than {LONGEST:,}"
        )
    if not separator or scheme == "file":
        yield _local(text)
        return
    if scheme == "hf":
        from palate.sources.hub import fetch_dataset

        yield fetch_dataset(text)
        return
    import tempfile

    with tempfile.TemporaryDirectory(prefix="palate-") as folder:
        if scheme in ("s3", "oss"):
            yield _from_store(text, session, Path(folder))
        elif scheme == "gsheet" or text.startswith(_SHEETS):
            from palate.sources.sheets import fetch_sheet

            yield fetch_sheet(text, Path(folder))
        else:  # the message has only the scheme: the rest may contain a password
            hint = (
                "; for a dataset of the Hugging Face hub use hf://datasets/OWNER/NAME"
                if "huggingface.co/" in text
                else ""
            )
            raise ConfigurationError(
                f"{scheme}:// is not supported for preference data: expected {KNOWN}. Or download it first{hint}"
            )


# ── local files ────────────────────────────────────────────────────────────────────────────────────────────────


def _local(text: str) -> Fetched:
    local = normal_uri(text).removeprefix("file://") if text.startswith("file://") else text
    try:
        path = Path(expand_path(local)).absolute()
    except ValueError as error:
        raise ConfigurationError(f"the path {show_path(text)} {error}") from None
    origin = f"file://{path}"
    try:
        if path.is_file():
            return Fetched((path,), origin, None)
        if path.is_dir():
            data, other = of_folder(list(walk(path)), str(path))
            return Fetched(tuple(path / name for name in data), origin, None, other)
        if path.exists():
            raise DataError(
                f"{path} is neither a file nor a folder: save it as a file, because data is read more than once"
            )
        if glob.has_magic(str(path)):
            base = Path(split_glob(str(path))[0] or "/")
            found = [Path(name) for name in glob.glob(REPEATED.sub("**/", str(path)), recursive=True)]
            names = [file.relative_to(base).as_posix() for file in found if file.is_file()]
            there = _entries(base)
            data, other = of_glob(names, str(path), there)
            return Fetched(tuple(base / name for name in data), origin, None, other)
        near = next(folder for folder in path.parents if folder.is_dir())
        there = _entries(near)
        meant = did_you_mean(path.name, there) if near == path.parent else ""
        hint = f"D{meant[1:].rstrip()}" if meant else f"Check the path; {near} contains {few(there)}"
        raise DataError(f"{path}: no such file or folder. {hint}")
    except OSError as error:
        raise DataError(
            f"{error.filename or path} cannot be read: {error.strerror or error}. "
            "Give this user permission to read it, or copy it elsewhere"
        ) from error


def _entries(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(entry.name + "/" * entry.is_dir() for entry in os.scandir(folder) if not entry.name.startswith("."))


# ── object stores ──────────────────────────────────────────────────────────────────────────────────────────────


def _from_store(uri: str, session: Session, folder: Path) -> Fetched:
    options = session.options_for(uri)
    origin = normal_uri(uri)
    scheme, _, rest = origin.partition("://")
    bucket, _, key = rest.partition("/")
    if key and not uri.endswith("/"):
        parent, name = open_parent(origin, options=options)
        try:
            parent.download(name, folder / name)
            return Fetched((folder / name,), origin, None)
        except ObjectNotFoundError:
            pass  # so it is a prefix or a glob
    if glob.has_magic(key):
        base, pattern = split_glob(key)
        store = open_store(f"{scheme}://{bucket}/{base}".rstrip("/"), options=options)
        there = [info.key for info in store.list()]
        data, other = of_glob([name for name in there if matches(name, pattern)], origin, there)
    else:
        store = open_store(origin, options=options)
        there = [info.key for info in store.list()]
        if not there and key:
            parent, _ = open_parent(origin, options=options)
            # A bucket may have millions of keys, so at its root only the folders are listed.
            beside = [info.key for info in parent.list()] if "/" in key else [f"{n}/" for n in parent.list_children()]
            raise DataError(
                f"{origin} does not exist as an object or a prefix; {parent.root} contains {few(beside)}: "
                "check bucket and key, or upload the file first"
            )
        data, other = of_folder(there, origin)
    in_parallel(lambda name: store.download(name, folder / name), data)
    return Fetched(tuple(folder / name for name in data), origin, None, other)
