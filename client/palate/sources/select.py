"""Selects data files by name: suffixes, splits, shards, globs. Knows names, never a file's content."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from palate_recipes.errors import DataError
from palate_recipes.preferences.files import SUFFIXES

if TYPE_CHECKING:
    pass


COMPRESSIONS = (".gz", ".zst")
"""Suffixes that may follow each of SUFFIXES."""

_KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF_KEYWORD = {keyword: split for split, keywords in _KEYWORDS.items() for keyword in keywords}
_KEYWORD = re.compile(rf"(?:^|[-._ 0-9])({'|'.join(_SPLIT_OF_KEYWORD)})(?=[-._ 0-9]|$)", re.IGNORECASE)
REPEATED = re.compile(r"(?:\*\*/){2,}")
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}")

_NO_DATA = {"_SUCCESS", "dataset_info.json", "dataset_infos.json", "dataset_dict.json"}
_SHOWN = 5
_SPLITS_SHOWN = 20


@dataclass(frozen=True)
class Fetched:
    """Local data files, in reading order.

    Attributes:
        files: At least one path; below a common folder they keep their original names.
        origin: URI of the data: `file://…` for local files, else as given.
        revision: Commit of a hub dataset; None if the origin has no versions.
        passed_over: Files that were skipped because their name is not that of a data file or belongs to no split.
            Does not include hidden files, `_SUCCESS`, READMEs, licences and the like.
    """

    files: tuple[Path, ...]
    origin: str
    revision: str | None
    passed_over: tuple[str, ...] = ()


# ── names ──────────────────────────────────────────────────────────────────────────────────────────────────────


def stem_of(name: str) -> str | None:
    """Returns the name of a data file without its suffixes, or None if it does not have the suffix of a data file."""
    plain = name.lower()
    for compression in COMPRESSIONS:
        plain = plain.removesuffix(compression)
    ending = next((suffix for suffix in SUFFIXES if plain.endswith(suffix)), None)
    return None if ending is None else name[: len(plain) - len(ending)]


def sift(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns (data files, other files), each sorted; neither includes READMEs, licences and other files known not to be data.

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
        # datasets' save_to_disk() writes it next to its Arrow files.
        if file == "state.json" and f"{folder}/dataset_info.json".lstrip("/") in all_names:
            continue
        (other if stem_of(file) is None else data).append(name)
    return data, other


def split_of(name: str) -> str | None:
    """Returns the split of a file, inferred from its name or a folder's as `datasets` does, or None.

    Source: `datasets.data_files`, with one difference: `train_prefs-00000-of-00001` and a folder `train_prefs` are
    separate splits, so that they are never mixed with `train_sft`.
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
    """Returns whether a relative path matches a glob: `*` matches within one path part, `**` any number of parts."""
    parts, patterns = name.split("/"), pattern.split("/")
    # The numbers of leading parts that the patterns so far can match. Backtracking is exponential for `**/*/**/*…`.
    taken = {0}
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
    """Raises DataError if two files differ only in their suffix: the same rows would be read twice."""
    seen: dict[str, str] = {}
    for name in names:
        twin = seen.setdefault(stem_of(name) or name, name)
        if twin != name:
            raise DataError(
                f"{origin} contains {twin} and {name}, which look like the same rows in two formats: "
                "select one of them, or use a glob such as *.jsonl"
            )


def few(names: Sequence[str]) -> str:
    """Returns the first names for a message, and the number of the others."""
    if not names:
        return "nothing"
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def nothing_there(origin: str, names: Sequence[str]) -> DataError:
    """Returns the error for a location without data files."""
    endings = " ".join(SUFFIXES)
    return DataError(
        f"{origin}: no data files found. Expected names that end in {endings}, each optionally with "
        f"{' or '.join(COMPRESSIONS)}; found {few(sorted(names))}. Check the path, or convert the files"
    )


def of_folder(names: Sequence[str], origin: str) -> tuple[list[str], tuple[str, ...]]:
    data, other = sift(names)
    if not data:
        raise nothing_there(origin, names)
    splits: dict[str | None, list[str]] = {}
    for name in data:
        splits.setdefault(split_of(name), []).append(name)
    if len(splits) > 1:
        lines = [f"{origin} contains files of several splits, which must not be mixed. Use one of:"]
        for split, files in sorted(splits.items(), key=lambda item: str(item[0] or "~")):
            place = _place_of(split, files, data)
            remedy = f"{origin.rstrip('/')}/{place}" if place else "(no glob matches only these: move them to a folder)"
            lines.append(f"  {split or 'no split'} ({len(files)} {'file' if len(files) == 1 else 'files'}): {remedy}")
        more = len(lines) - 1 - _SPLITS_SHOWN
        lines[_SPLITS_SHOWN + 1 :] = [f"  and {more} more splits"] if more > 0 else []
        raise DataError("\n".join(lines))
    refuse_twins(data, origin)
    return data, tuple(other)


def _place_of(split: str | None, files: list[str], data: list[str]) -> str | None:
    """Returns a name, folder or glob that selects exactly `files` from `data`."""
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


def split_glob(path: str) -> tuple[str, str]:
    """Splits a path into the folder before the first part with a wildcard, and the glob below it."""
    parts = path.split("/")
    first = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    return "/".join(parts[:first]), "/".join(parts[first:])


def of_glob(names: Sequence[str], origin: str, there: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    data, other = sift(names)
    if not data:
        raise nothing_there(origin, there)
    return data, tuple(other)
