"""A list of a folder's files with size and SHA-256, to verify the folder. Knows files and stores, no run.

{"schema": 1, "files": {"adapter_model.safetensors": {"bytes": 3521, "sha256": "…"}, …}}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from msgspec import Struct
from msgspec.structs import asdict

from palate.store import Store
from palate.store.local import walk
from palate_recipes.errors import DamagedFilesError
from palate_recipes.specs.codec import Int, decode

DIGESTS_FILE = "digests.json"
"""In a job's `model/`. Written last."""

_SCHEMA = 1
_CHANGED = "is not what the training wrote"
_RESTORE = "Restore the files, or train again"
_DELETE = "Delete the added files, or train again"


class _FileFacts(Struct):
    bytes: Int
    sha256: str


class _Digests(Struct):
    files: dict[str, _FileFacts]


class Checksums:
    """The expected files of a folder.

    Args:
        files: `bytes` and `sha256` by path relative to the folder, with `/`.
    """

    def __init__(self, files: Mapping[str, Mapping[str, Any]]) -> None:
        self.files = dict(files)

    @classmethod
    def of(cls, folder: Path, *, leave_out: str = DIGESTS_FILE) -> Checksums:
        """Reads every file in `folder` except the list itself."""
        return cls({name: file_facts(folder / name) for name in walk(folder) if name != leave_out})

    @classmethod
    def parse(cls, data: bytes, *, where: str, remedy: str = "the files that it lists cannot be trusted") -> Checksums:
        """Reads what `encode` wrote.

        Args:
            data: The list.
            where: Name of the list, for messages.
            remedy: Remedy, for messages.

        Raises:
            DamagedFilesError: It is not such a list, or a name in it is outside the folder.
        """
        try:
            files = {name: asdict(facts) for name, facts in decode(data, _Digests).files.items()}
        except ValueError:
            raise DamagedFilesError(f"{where} is not a list of digests: {remedy}") from None
        for name in files:
            if not _is_clean(name):
                raise DamagedFilesError(f"{where} lists {name!r}, which is not a path inside the folder: {remedy}")
        return cls(files)

    def encode(self) -> bytes:
        return (json.dumps({"schema": _SCHEMA, "files": self.files}, indent=1, ensure_ascii=False) + "\n").encode()

    def check_folder(
        self, folder: Path, *, what: str, wrong: str = _CHANGED, remedy: str | None = None, may_hold_more: bool = False
    ) -> None:
        """Verifies every file by its digest.

        Args:
            folder: A local folder.
            what: Name of the folder, for messages.
            wrong, remedy: Words of the message before and after the file names.
            may_hold_more: Accept files that are not listed. For a model they are an error, since a loader may read them.

        Raises:
            DamagedFilesError: A file is missing, truncated, changed or not listed. Names all of them.
        """
        damaged = [name for name, facts in self.files.items() if _or_none(folder / name) != facts]
        added = [] if may_hold_more else self._not_listed(walk(folder))
        _refuse(what, damaged, added, wrong=wrong, remedy=remedy)

    def check_store(
        self, store: Store, prefix: str, *, what: str, remedy: str | None = None, may_hold_more: bool = False
    ) -> None:
        """Compares names and sizes with one listing, without reading files. See `check_folder` for the arguments.

        Raises:
            DamagedFilesError: As for `check_folder`.
        """
        sizes = {info.key.removeprefix(f"{prefix}/"): info.size for info in store.list(prefix)}
        damaged = [name for name, facts in self.files.items() if sizes.get(name) != facts["bytes"]]
        _refuse(what, damaged, [] if may_hold_more else self._not_listed(sizes), remedy=remedy)

    def _not_listed(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if name not in self.files and name != DIGESTS_FILE]


def file_facts(path: Path) -> dict[str, Any]:
    """Reads a file and returns its `bytes` and `sha256`."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}


def read_model_digests(store: Store, prefix: str, sha256: str, *, what: str) -> Checksums:
    """Returns the list of a model folder, verified by the list's own digest.

    Args:
        store, prefix: The folder.
        sha256: Digest of the list itself, from the job's status.
        what: Name of the folder, for messages.

    Raises:
        DamagedFilesError: The list is missing or changed.
    """
    key = f"{prefix}/{DIGESTS_FILE}"
    try:
        data = store.get(key)
    except FileNotFoundError:
        data = b""
    if hashlib.sha256(data).hexdigest() != sha256:
        _refuse(what, [DIGESTS_FILE])
    return Checksums.parse(data, where=store.uri(key))


def _refuse(
    what: str, damaged: list[str], added: list[str] | None = None, *, wrong: str = _CHANGED, remedy: str | None = None
) -> None:
    found = [f"{', '.join(sorted(damaged))} missing or changed"] if damaged else []
    found += [f"{', '.join(sorted(added))} added"] if added else []
    if found:
        remedy = remedy or (_RESTORE if not added else f"{_RESTORE}. {_DELETE}" if damaged else _DELETE)
        raise DamagedFilesError(f"{what} {wrong}: {'; '.join(found)}. {remedy}")


def _is_clean(name: str) -> bool:
    path = PurePosixPath(name)
    return (
        bool(path.parts)
        and str(path) == name
        and path.root == ""
        and not {"..", "."} & {*path.parts}
        and not set(name) & {"\\", "\0"}
    )


def _or_none(path: Path) -> dict[str, Any] | None:
    try:
        return file_facts(path)
    except OSError:
        return None
