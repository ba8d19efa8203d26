"""Where preference data comes from: turns paths, folders, globs and URIs into local files. Knows names, never a file's content."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from palate.errors import ConfigurationError, DataError
from palate.store import open_parent, open_store
from palate.store.errors import ObjectNotFoundError
from palate.store.local import in_parallel, walk
from palate.store.uri import normal_uri
from palate_recipes.data.containers import SUFFIXES
from palate_recipes.paths import LONGEST, expand_path, show_path

if TYPE_CHECKING:
    from palate.session import Session

COMPRESSIONS = (".gz", ".zst")
"""Endings that may follow each of SUFFIXES."""

KNOWN = (
    "a path, a folder or a glob of this machine, file://, s3://, oss://, hf://datasets/OWNER/NAME, "
    "gsheet://ID/WORKSHEET or https://docs.google.com/spreadsheets/d/ID"
)
"""What `at_hand` takes, for messages."""

_SHEETS = "https://docs.google.com/spreadsheets/"
_KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF_KEYWORD = {keyword: split for split, keywords in _KEYWORDS.items() for keyword in keywords}
_KEYWORD = re.compile(rf"(?:^|[-._ 0-9])({'|'.join(_SPLIT_OF_KEYWORD)})(?=[-._ 0-9]|$)", re.IGNORECASE)
_REPEATED = re.compile(r"(?:\*\*/){2,}")
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}")

_NO_DATA = {"_SUCCESS", "dataset_info.json", "dataset_infos.json", "dataset_dict.json"}
_SHOWN = 5
_SPLITS_SHOWN = 20


@dataclass(frozen=True)
class Fetched:
    """Data files that lie on this machine, in the order in which their rows are to be read.

    Attributes:
        files: At least one; below a common folder they keep the names that they have where they come from.
        origin: URI of the whole: `file://…` for what is local, else as it was given.
        revision: Commit of a hub dataset; None where the origin keeps no versions.
        passed_over: Names that were found and left out because they end like no data file or belong to no split.
            Hidden files, `_SUCCESS`, READMEs, licences and the like are not among them.
    """

    files: tuple[Path, ...]
    origin: str
    revision: str | None
    passed_over: tuple[str, ...] = ()


@contextmanager
def at_hand(uri: str | Path, session: Session) -> Iterator[Fetched]:
    """Brings the data files that `uri` names onto this machine for as long as the block runs.

    Local files are used in place, those of a hub dataset lie in the hub's own cache, all others in a temporary folder
    that vanishes at the end. A folder (or prefix) is read at any depth and must hold one split; a glob takes what it matches.

    Args:
        uri: A path, folder or glob (`data/part-*.jsonl.gz`, `**` for any depth) here or in a store: `file://`, `s3://`,
            `oss://`; `hf://datasets/OWNER/NAME[@revision][/path or glob][?split=train&config=…]`; a Google Sheet.
        session: Gives the options of object stores.

    Raises:
        ConfigurationError: The URI cannot be understood, or a setting for it is missing.
        DataError: Nothing is there, it is no data file, or a folder holds several splits; says what is there.
        MissingDependencyError: An optional package that this kind of place needs is not installed.
        StoreError: The place refuses or does not answer.
    """
    text = os.fspath(uri)
    scheme, separator, _ = text.partition("://")
    if not text.strip():
        raise ConfigurationError(f"the path of the data is empty: give {KNOWN}")
    if len(text) >= LONGEST:
        raise ConfigurationError(
            f"{show_path(text)} has {len(text):,} characters: a path or URI has less than {LONGEST:,}"
        )
    if not separator or scheme == "file":
        yield _local(text)
        return
    if scheme == "hf":
        from palate.data.hub import fetch_dataset

        yield fetch_dataset(text)
        return
    import tempfile

    with tempfile.TemporaryDirectory(prefix="palate-") as folder:
        if scheme in ("s3", "oss"):
            yield _from_store(text, session, Path(folder))
        elif scheme == "gsheet" or text.startswith(_SHEETS):
            from palate.data.sheets import fetch_sheet

            yield fetch_sheet(text, Path(folder))
        else:  # the message repeats the scheme alone: the rest may hold a password
            hint = "; a page of the Hugging Face hub is hf://datasets/OWNER/NAME" if "huggingface.co/" in text else ""
            raise ConfigurationError(
                f"{scheme}:// is no place that preference data is read from: give {KNOWN}, or download it first{hint}"
            )


# ── names ──────────────────────────────────────────────────────────────────────────────────────────────────────


def stem_of(name: str) -> str | None:
    """Returns a data file's name without its endings, or None for what ends like no data file."""
    plain = name.lower()
    for compression in COMPRESSIONS:
        plain = plain.removesuffix(compression)
    ending = next((suffix for suffix in SUFFIXES if plain.endswith(suffix)), None)
    return None if ending is None else name[: len(plain) - len(ending)]


def sift(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns (data files, other files), each sorted; what is known to be neither data nor a mistake is in none of them.

    Args:
        names: Paths relative to their common folder, with `/`.
    """
    data: list[str] = []
    other: list[str] = []
    all_names = set(names)
    for name in sorted(all_names):
        folder, _, file = name.rpartition("/")
        if file in _NO_DATA or file.upper().startswith(("README", "LICENSE")) or file.endswith(".md"):
            continue
        if any(part.startswith(".") for part in name.split("/")):
            continue
        # What datasets' save_to_disk() writes beside its Arrow files.
        if file == "state.json" and f"{folder}/dataset_info.json".lstrip("/") in all_names:
            continue
        (other if stem_of(file) is None else data).append(name)
    return data, other


def split_of(name: str) -> str | None:
    """Returns the split that a file belongs to by its own name or a folder's, or None; as `datasets` guesses it.

    Source: `datasets.data_files`, with one difference: `train_prefs-00000-of-00001` and a folder `train_prefs` are
    splits of their own, so that they are never mixed with `train_sft`.
    """
    *folders, file = name.split("/")
    for folder in folders:
        if found := _KEYWORD.search(folder):
            rest = (folder[: found.start(1)] + folder[found.end() :]).strip("-._ 0123456789")
            return folder if rest else _SPLIT_OF_KEYWORD[found[1].lower()]
    stem = stem_of(file) or file
    shard = _SHARD.match(stem)
    found = _KEYWORD.search(shard[1] if shard else stem)
    if found is None:
        return None
    whole = shard is not None and shard[1].lower() not in _SPLIT_OF_KEYWORD
    return shard[1] if shard and whole else _SPLIT_OF_KEYWORD[found[1].lower()]


def matches(name: str, pattern: str) -> bool:
    """Says whether a relative path matches a glob: `*` stays within a part of the path, `**` spans any number of them."""
    parts, patterns = name.split("/"), pattern.split("/")
    taken = {
        0
    }  # numbers of parts that the patterns so far may match: a search of each way would never end for `**/*/**/*…`
    for index, part in enumerate(patterns):
        if part == "**":
            if index == len(patterns) - 1:
                return any(count < len(parts) for count in taken)
            taken = set(range(min(taken), len(parts) + 1))
        else:
            taken = {count + 1 for count in taken if count < len(parts) and fnmatchcase(parts[count], part)}
        if not taken:
            return False
    return len(parts) in taken


def refuse_twins(names: Sequence[str], origin: str) -> None:
    """Raises DataError when two files differ in their endings alone: the same rows would count twice."""
    seen: dict[str, str] = {}
    for name in names:
        twin = seen.setdefault(stem_of(name) or name, name)
        if twin != name:
            raise DataError(
                f"{origin} holds {twin} and {name}, which look like the same rows in two formats: "
                "name one of them, or use a glob such as *.jsonl"
            )


def few(names: Sequence[str]) -> str:
    """Returns the first names for a message, and how many more there are."""
    if not names:
        return "nothing"
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def nothing_there(origin: str, names: Sequence[str]) -> DataError:
    """Returns the error for a place without a data file."""
    endings = " ".join(SUFFIXES)
    return DataError(
        f"{origin}: no data file is there. Looked for names that end in {endings}, each also with "
        f"{' or '.join(COMPRESSIONS)}; found {few(sorted(names))}. Check the path, or convert the files"
    )


def _of_folder(names: Sequence[str], origin: str) -> tuple[list[str], tuple[str, ...]]:
    data, other = sift(names)
    if not data:
        raise nothing_there(origin, names)
    splits: dict[str | None, list[str]] = {}
    for name in data:
        splits.setdefault(split_of(name), []).append(name)
    if len(splits) > 1:
        lines = [f"{origin} holds files of several splits, which must not be mixed. Give one of them:"]
        for split, files in sorted(splits.items(), key=lambda item: str(item[0] or "~")):
            place = _place_of(split, files, data)
            remedy = f"{origin.rstrip('/')}/{place}" if place else "(no glob fits them alone: give them a folder)"
            lines.append(f"  {split or 'no split'} ({len(files)} {'file' if len(files) == 1 else 'files'}): {remedy}")
        more = len(lines) - 1 - _SPLITS_SHOWN
        lines[_SPLITS_SHOWN + 1 :] = [f"  and {more} more splits"] if more > 0 else []
        raise DataError("\n".join(lines))
    refuse_twins(data, origin)
    return data, tuple(other)


def _place_of(split: str | None, files: list[str], data: list[str]) -> str | None:
    """Returns the name, folder or glob that takes `files` and no other of `data`."""
    if len(files) == 1:
        return files[0]
    folder = files[0].partition("/")[0]
    if [name for name in data if name.startswith(f"{folder}/")] == files:
        return folder
    alike = takewhile(lambda letters: len(set(letters)) == 1, zip(*files, strict=False))
    begin = glob.escape("".join(letters[0] for letters in alike))
    guesses = [f"{split}*", f"**/{split}*", f"**/*{split}*"] if split else []
    guesses += [f"{begin}*"] if begin else []
    return next((guess for guess in guesses if [name for name in data if matches(name, guess)] == files), None)


def _split_glob(path: str) -> tuple[str, str]:
    """Splits a path into the folder before its first part with a wildcard, and the glob below it."""
    parts = path.split("/")
    first = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    return "/".join(parts[:first]), "/".join(parts[first:])


def _of_glob(names: Sequence[str], origin: str, there: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    data, other = sift(names)
    if not data:
        raise nothing_there(origin, there)
    return data, tuple(other)


# ── this machine ───────────────────────────────────────────────────────────────────────────────────────────────


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
            data, other = _of_folder(list(walk(path)), str(path))
            return Fetched(tuple(path / name for name in data), origin, None, other)
        if path.exists():
            raise DataError(f"{path} is neither a file nor a folder, and is read more than once: save it as a file")
        if glob.has_magic(str(path)):
            base = Path(_split_glob(str(path))[0] or "/")
            found = [Path(name) for name in glob.glob(_REPEATED.sub("**/", str(path)), recursive=True)]
            names = [file.relative_to(base).as_posix() for file in found if file.is_file()]
            there = _entries(base)
            data, other = _of_glob(names, str(path), there)
            return Fetched(tuple(base / name for name in data), origin, None, other)
        near = next(folder for folder in path.parents if folder.is_dir())
        raise DataError(f"{path}: no such file or folder. Check the path; {near} holds {few(_entries(near))}")
    except OSError as error:
        raise DataError(
            f"{error.filename or path} cannot be read: {error.strerror or error}. "
            "Give this user the right to read it, or copy it elsewhere"
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
            pass  # a prefix or a glob, then
    if glob.has_magic(key):
        base, pattern = _split_glob(key)
        store = open_store(f"{scheme}://{bucket}/{base}".rstrip("/"), options=options)
        there = [info.key for info in store.list()]
        data, other = _of_glob([name for name in there if matches(name, pattern)], origin, there)
    else:
        store = open_store(origin, options=options)
        there = [info.key for info in store.list()]
        if not there and key:
            parent, _ = open_parent(origin, options=options)
            # All keys of a bucket may be millions: there only its folders are named.
            beside = [info.key for info in parent.list()] if "/" in key else [f"{n}/" for n in parent.list_children()]
            raise DataError(
                f"{origin} is not there, as an object or as a prefix; {parent.root} holds {few(beside)}: "
                "check bucket and key, or upload the file first"
            )
        data, other = _of_folder(there, origin)
    in_parallel(lambda name: store.download(name, folder / name), data)
    return Fetched(tuple(folder / name for name in data), origin, None, other)
