"""A finished job's model, copied to another store or the Hugging Face hub. Knows files and places, no training and no serving.

What arrives is what the training wrote, file by file with its SHA-256, and a model card. `digests.json` is written last: its
presence means that all of it is in place.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from palate.errors import ConfigurationError, NameTakenError, PalateError
from palate.home import palate_home
from palate.saving.card import model_card
from palate.store import Store, open_parent
from palate.store.local import walk
from palate.store.uri import normal_uri

if TYPE_CHECKING:
    from palate.record import Manifest, Record, Status
    from palate.session import Session

DIGESTS_FILE = "digests.json"
CARD_FILE = "README.md"

_BLOCK = 1 << 20

Digests = dict[str, dict[str, Any]]
"""Bytes and SHA-256 by path relative to a folder."""


class SavedModelError(PalateError, RuntimeError):
    """A model is not what the training wrote, or did not arrive as it was sent."""


def save(record: Record, manifest: Manifest, status: Status, target: str | Path, session: Session) -> str:
    """Copies the model of a succeeded job; see `TrainingJob.save_model`."""
    where = str(target)
    if not where.startswith("hf://"):
        where = normal_uri(target)
        if where == normal_uri(record.store.uri(record.key("model"))):
            raise ConfigurationError(f"{where} is where the model lies already: give another place")
    work = palate_home() / "work"
    work.mkdir(exist_ok=True, mode=0o700)
    with TemporaryDirectory(prefix="save-", dir=work) as scratch:
        folder = Path(scratch) / "model"
        digests = _fetch(record, folder)
        card = model_card(manifest, status, digests, tags_adapter="adapter_config.json" in digests)
        (folder / CARD_FILE).write_text(card, encoding="utf-8")
        digests = _digests(folder)
        (folder / DIGESTS_FILE).write_text(
            json.dumps({"schema": 1, "files": digests}, indent=1) + "\n", encoding="utf-8"
        )
        if where.startswith("hf://"):
            from palate.saving.hub import push

            return push(folder, where, message=f"Model of job {record.name}, trained with Palate")
        store, name = open_parent(where, options=session.options_for(where))
        _push(folder, digests, store, name, Path(scratch) / "back")
    return where


def _fetch(record: Record, folder: Path) -> Digests:
    """Brings the job's model here and compares it with the list that its runner left, where there is one."""
    prefix = record.key("model")
    record.store.download_tree(prefix, folder)
    listed = folder / DIGESTS_FILE
    found = _digests(folder)
    if listed.is_file():
        try:
            expected: Digests = json.loads(listed.read_bytes())["files"]
        except (ValueError, KeyError, TypeError):
            raise SavedModelError(
                f"{record.store.uri(prefix)}/{DIGESTS_FILE} is no list of digests: restore it, or train again"
            ) from None
        if damaged := sorted(name for name, facts in expected.items() if found.get(name) != facts):
            raise SavedModelError(
                f"{record.store.uri(prefix)} is not what the training wrote: {', '.join(damaged)} missing or changed. "
                "Restore the files, or train again"
            )
    return found


def _push(folder: Path, digests: Digests, store: Store, name: str, back: Path) -> None:
    """Copies a folder whole, reads it back, and only then says that it is there."""
    present = {info.key.removeprefix(f"{name}/") for info in store.list(name)}
    # Without the list it is a save that broke off: the same files are written again.
    if DIGESTS_FILE in present or not present <= set(digests):
        raise NameTakenError(f"{store.uri(name)} holds files already: name an empty place, or delete what is there")
    store.upload_tree(folder, name, skip=lambda path: path == DIGESTS_FILE)
    _check_arrival(digests, store, name, back)
    store.upload(folder / DIGESTS_FILE, f"{name}/{DIGESTS_FILE}")


def _check_arrival(digests: Mapping[str, Mapping[str, Any]], store: Store, name: str, back: Path) -> None:
    arrived = store.local_path(name)
    if arrived is None:
        store.download_tree(name, back)
        arrived = back
    found = _digests(arrived)
    if damaged := sorted(path for path, facts in digests.items() if found.get(path) != facts):
        raise SavedModelError(
            f"{store.uri(name)} does not hold what was sent: {', '.join(damaged)} missing or changed. "
            "Something else writes there, or the store is damaged: save to another place"
        )


def _digests(folder: Path) -> Digests:
    found = {}
    for name in walk(folder):
        if name == DIGESTS_FILE:
            continue
        digest = hashlib.sha256()
        with (folder / name).open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
        found[name] = {"bytes": os.path.getsize(folder / name), "sha256": digest.hexdigest()}
    return found
