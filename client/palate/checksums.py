"""A list of what a folder must hold, file by file with size and SHA-256. Knows files and stores, no run.

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
"""In a job's `model/`, written last."""

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
    """What a folder must hold.

    Args:
        files: `bytes` and `sha256` by path relative to the folder, with `/`.
    """

    def __init__(self, files: Mapping[str, Mapping[str, Any]]) -> None:
        self.files = dict(files)

    @classmethod
    def of(cls, folder: Path, *, leave_out: str = DIGESTS_FILE) -> Checksums:
        """Reads every file below `folder` but one, the list itself."""
        return cls({name: file_facts(folder / name) for name in walk(folder) if name != leave_out})

    @classmethod
    def parse(cls, data: bytes, *, where: str, remedy: str = "the files that it lists cannot be trusted") -> Checksums:
        """Reads what `encode` wrote.

        Args:
            data: The list.
            where: Name of it for people.
            remedy: Last words of the error.

        Raises:
            DamagedFilesError: It is no such list, or a name in it leads out of the folder.
        """
        try:
            files = {name: asdict(facts) for name, facts in decode(data, _Digests).files.items()}
        except ValueError:
            raise DamagedFilesError(f"{where} is no list of digests: {remedy}") from None
        for name in files:
            if not _is_clean(name):
                raise DamagedFilesError(f"{where} lists {name!r}, which is not a path inside the folder: {remedy}")
        return cls(files)

    def encode(self) -> bytes:
        return (json.dumps({"schema": _SCHEMA, "files": self.files}, indent=1, ensure_ascii=False) + "\n").encode()

    def check_folder(
        self, folder: Path, *, what: str, wrong: str = _CHANGED, remedy: str | None = None, may_hold_more: bool = False
    ) -> None:
        """Reads every file whole.

        Args:
            folder: On this machine.
            what: Name of it for people.
            wrong, remedy: What the error says of it, before and behind the names of the files.
            may_hold_more: Accept files that are not listed. A loader takes what it finds, so for a model it is an error.

        Raises:
            DamagedFilesError: A file is missing, cut short, changed or not listed; names all of them.
        """
        damaged = [name for name, facts in self.files.items() if _or_none(folder / name) != facts]
        added = [] if may_hold_more else self._not_listed(walk(folder))
        _refuse(what, damaged, added, wrong=wrong, remedy=remedy)

    def check_store(self, store: Store, prefix: str, *, what: str) -> None:
        """Compares names and sizes by one listing; reads nothing.

        Raises:
            DamagedFilesError: As for `check_folder`.
        """
        sizes = {info.key.removeprefix(f"{prefix}/"): info.size for info in store.list(prefix)}
        damaged = [name for name, facts in self.files.items() if sizes.get(name) != facts["bytes"]]
        _refuse(what, damaged, self._not_listed(sizes))

    def _not_listed(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if name not in self.files and name != DIGESTS_FILE]


def file_facts(path: Path) -> dict[str, Any]:
    """Returns a file's `bytes` and `sha256`, read whole."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}


def read_model_digests(store: Store, prefix: str, sha256: str, *, what: str) -> Checksums:
    """Returns the list of a model folder, checked against its own digest.

    Args:
        store, prefix: The folder.
        sha256: Of the list itself, as the job's status says.
        what: Name of the folder for people.

    Raises:
        DamagedFilesError: The list is missing, or another one.
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
