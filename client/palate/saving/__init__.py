"""A finished job's model, copied to another store or the Hugging Face hub. Knows files and places, no training and no serving.

What arrives is what the training wrote, file by file with its SHA-256, and a model card. `digests.json` is written last: its
presence means that all of it is in place.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from palate.digests import DIGESTS_FILE, Digests
from palate.errors import ConfigurationError, NameTakenError
from palate.home import palate_home
from palate.saving.card import model_card
from palate.store import Store, open_parent
from palate.store.local import walk
from palate.store.uri import normal_uri

if TYPE_CHECKING:
    from palate.record import Manifest, Record, Status
    from palate.session import Session

CARD_FILE = "README.md"


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
        _fetch(record, folder)
        names = [name for name in walk(folder) if name != DIGESTS_FILE]
        card = model_card(manifest, status, names, tags_adapter="adapter_config.json" in names)
        (folder / CARD_FILE).write_text(card, encoding="utf-8")
        digests = Digests.of(folder)
        (folder / DIGESTS_FILE).write_bytes(digests.encode())
        if where.startswith("hf://"):
            from palate.saving.hub import push

            return push(folder, where, message=f"Model of job {record.name}, trained with Palate")
        store, name = open_parent(where, options=session.options_for(where))
        _push(folder, digests, store, name, Path(scratch) / "back")
    return where


def _fetch(record: Record, folder: Path) -> None:
    """Brings the job's model here and compares it with the list that its runner left, where there is one."""
    prefix = record.key("model")
    record.store.download_tree(prefix, folder)
    listed = folder / DIGESTS_FILE
    if listed.is_file():
        what = record.store.uri(prefix)
        expected = Digests.parse(
            listed.read_bytes(), where=f"{what}/{DIGESTS_FILE}", remedy="restore it, or train again"
        )
        expected.check_folder(folder, what=what)


def _push(folder: Path, digests: Digests, store: Store, name: str, back: Path) -> None:
    """Copies a folder whole, reads it back, and only then says that it is there."""
    present = {info.key.removeprefix(f"{name}/") for info in store.list(name)}
    # Without the list it is a save that broke off: the same files are written again.
    if DIGESTS_FILE in present or not present <= set(digests.files):
        raise NameTakenError(f"{store.uri(name)} holds files already: name an empty place, or delete what is there")
    store.upload_tree(folder, name, skip=lambda path: path == DIGESTS_FILE)
    arrived = store.local_path(name)
    if arrived is None:
        store.download_tree(name, back)
        arrived = back
    digests.check_folder(
        arrived,
        what=store.uri(name),
        wrong="does not hold what was sent",
        remedy="Something else writes there, or the store is damaged: save to another place",
    )
    store.upload(folder / DIGESTS_FILE, f"{name}/{DIGESTS_FILE}")
