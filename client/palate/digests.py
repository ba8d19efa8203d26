"""A list of what a folder must hold, file by file with size and SHA-256. Knows files and stores, no run.

{"schema": 1, "files": {"adapter_model.safetensors": {"bytes": 3521, "sha256": "…"}, …}}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from palate.common.parsing import check_fields, parse_object
from palate.errors import DamagedFilesError
from palate.store import Store
from palate.store.local import walk

DIGESTS_FILE = "digests.json"
"""In a job's `model/`, written last."""

_SCHEMA = 1
_KINDS: dict[str, type | tuple[type, ...]] = {"bytes": int, "sha256": str}
_CHANGED = "is not what the training wrote"
_RESTORE = "Restore the files, or train again"


class Digests:
    """What a folder must hold.

    Args:
        files: `bytes` and `sha256` by path relative to the folder, with `/`.
    """

    def __init__(self, files: Mapping[str, Mapping[str, Any]]) -> None:
        self.files = dict(files)

    @classmethod
    def of(cls, folder: Path, *, leave_out: str = DIGESTS_FILE) -> Digests:
        """Reads every file below `folder` but one, the list itself."""
        return cls({name: file_facts(folder / name) for name in walk(folder) if name != leave_out})

    @classmethod
    def parse(cls, data: bytes, *, where: str, remedy: str = "the files that it lists cannot be trusted") -> Digests:
        """Reads what `encode` wrote.

        Args:
            data: The list.
            where: Name of it for people.
            remedy: Last words of the error.

        Raises:
            DamagedFilesError: It is no such list.
        """
        try:
            files = parse_object(data)["files"]
            for facts in files.values():
                check_fields({name: facts[name] for name in _KINDS}, _KINDS)
            return cls({name: {key: facts[key] for key in _KINDS} for name, facts in files.items()})
        except (ValueError, TypeError, KeyError, AttributeError):
            raise DamagedFilesError(f"{where} is no list of digests: {remedy}") from None

    def encode(self) -> bytes:
        return (json.dumps({"schema": _SCHEMA, "files": self.files}, indent=1, ensure_ascii=False) + "\n").encode()

    def check_folder(self, folder: Path, *, what: str, wrong: str = _CHANGED, remedy: str = _RESTORE) -> None:
        """Reads every file whole.

        Args:
            folder: On this machine.
            what: Name of it for people.
            wrong, remedy: What the error says of it, before and behind the names of the files.

        Raises:
            DamagedFilesError: A file is missing, cut short or changed; names all of them.
        """
        damaged = [name for name, facts in self.files.items() if _or_none(folder / name) != facts]
        _refuse(what, damaged, wrong=wrong, remedy=remedy)

    def check_store(self, store: Store, prefix: str, *, what: str) -> None:
        """Compares names and sizes by one listing; reads nothing.

        Raises:
            DamagedFilesError: As for `check_folder`.
        """
        sizes = {info.key.removeprefix(f"{prefix}/"): info.size for info in store.list(prefix)}
        _refuse(what, [name for name, facts in self.files.items() if sizes.get(name) != facts["bytes"]])


def file_facts(path: Path) -> dict[str, Any]:
    """Returns a file's `bytes` and `sha256`, read whole."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}


def read_model_digests(store: Store, prefix: str, sha256: str, *, what: str) -> Digests:
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
    return Digests.parse(data, where=store.uri(key))


def _refuse(what: str, damaged: list[str], *, wrong: str = _CHANGED, remedy: str = _RESTORE) -> None:
    if damaged:
        raise DamagedFilesError(f"{what} {wrong}: {', '.join(sorted(damaged))} missing or changed. {remedy}")


def _or_none(path: Path) -> dict[str, Any] | None:
    try:
        return file_facts(path)
    except OSError:
        return None
