"""The files of an adapter that a service adds: finds, verifies and copies them. Knows stores and digests, no service.

An adapter has two files, its config and its weights as safetensors. Nothing else in its folder is read or copied: another file may
be a pickle, which a loader could prefer.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palate.checksums import DIGESTS_FILE, Checksums
from palate.session import Session
from palate.store import Store, open_parent
from palate.store.uri import normal_uri
from palate_recipes.errors import DamagedFilesError, DataError, StoreError
from palate_recipes.lora_targets import ADAPTER_CONFIG, ADAPTER_FILES
from palate_recipes.servability import GIB

ADAPTER_LIMIT_BYTES = 64 * GIB
"""Maximum size of the weights. Rank 512 on all layers of a 70B model in float32 has 26 GiB."""

_DIGESTS_LIMIT_BYTES = 1024**2
_CONFIG_LIMIT_BYTES = 1024**2
_FREE_BYTES = GIB
"""Disk space that a copy leaves free: logs and the engine need some."""


@dataclass(frozen=True, kw_only=True)
class AdapterFiles:
    """An adapter whose list of files was read and verified. Of the files themselves only the sizes were compared.

    Attributes:
        uri: The folder.
        digest: SHA-256 of its digests.json.
        store, prefix: The same folder.
        listing: digests.json.
        files: The adapter's files in it.
    """

    uri: str
    digest: str
    store: Store
    prefix: str
    listing: bytes
    files: Checksums

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(int(facts["bytes"]) for facts in self.files.files.values())

    @property
    def local_folder(self) -> Path | None:
        """The folder, if it is on this machine."""
        return self.store.local_path(self.prefix)

    def config(self) -> dict[str, Any]:
        """Returns adapter_config.json. Raises DamagedFilesError if it was changed, DataError if it is not a JSON object."""
        data = self.store.get_range(f"{self.prefix}/{ADAPTER_CONFIG}", 0, _CONFIG_LIMIT_BYTES + 1)
        if hashlib.sha256(data).hexdigest() != self.files.files[ADAPTER_CONFIG]["sha256"]:
            raise self._damaged(ADAPTER_CONFIG)
        try:
            found = json.loads(data)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise DataError(f"{self.uri}/{ADAPTER_CONFIG} is not a JSON object: give the model folder of a LoRA run")
        return found

    def check_sizes(self) -> None:
        """Raises DamagedFilesError if a file is missing or has another size than the list says."""
        for name, facts in self.files.files.items():
            info = self.store.stat(f"{self.prefix}/{name}")
            if info is None or info.size != facts["bytes"]:
                raise self._damaged(name)

    def copy(self, folder: Path) -> None:
        """Copies the files to a new folder and verifies each by its digest.

        A copy, also from this machine: the original may be deleted or replaced while it is served. Links are followed, so the
        copy has none.

        Raises:
            DamagedFilesError: A file is missing or differs.
            StoreError: The store cannot be read, or the disk has not enough space.
        """
        self.check_sizes()  # before the download: what is larger than listed must not fill the disk
        folder.mkdir(parents=True)
        free = shutil.disk_usage(folder).free
        if self.size > free - _FREE_BYTES:
            raise StoreError(
                f"{self.uri} has {self.size / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free for its copy in {folder.parent}: "
                "free some space"
            )
        for name in self.files.files:
            try:
                self.store.download(f"{self.prefix}/{name}", folder / name)
            except FileNotFoundError:
                raise self._damaged(name) from None
        self.files.check_folder(folder, what=self.uri)

    def _damaged(self, name: str) -> DamagedFilesError:
        return DamagedFilesError(
            f"{self.uri} is not what the training wrote: {name} missing or changed. Restore the files, or train again"
        )


def find_adapter(uri: str | Path, session: Session, *, digest: str | None = None) -> AdapterFiles:
    """Reads the list of an adapter's files.

    Args:
        uri: A model folder with digests.json: `job.model_uri`, or a copy made by `job.save_model()`.
        session: Opens it.
        digest: SHA-256 that the list must have; None accepts any.

    Raises:
        DataError: The folder has no digests.json, or no adapter.
        DamagedFilesError: The list is missing or is not the expected one, or a file has another size.
        StoreError: The folder cannot be read.
    """
    where = normal_uri(uri)
    store, prefix = open_parent(where, options=session.options_for(where))
    try:
        listing = store.get_range(f"{prefix}/{DIGESTS_FILE}", 0, _DIGESTS_LIMIT_BYTES + 1)
    except FileNotFoundError:
        if digest is not None:
            raise DamagedFilesError(
                f"{where} has no {DIGESTS_FILE}: it was deleted or moved. Add the adapter again from where it is now"
            ) from None
        raise DataError(
            f"{where} has no {DIGESTS_FILE}, so its files cannot be verified: give a job, its model_uri, or a copy made by "
            "job.save_model()"
        ) from None
    if len(listing) > _DIGESTS_LIMIT_BYTES:
        raise DamagedFilesError(f"{where}/{DIGESTS_FILE} has more than {_DIGESTS_LIMIT_BYTES} bytes: restore the file")
    found = hashlib.sha256(listing).hexdigest()
    if digest not in (None, found):
        raise DamagedFilesError(
            f"{where} is not the adapter that was added: its {DIGESTS_FILE} was changed. Restore the files, or add the adapter again"
        )
    listed = Checksums.parse(listing, where=f"{where}/{DIGESTS_FILE}").files
    if missing := [name for name in ADAPTER_FILES if name not in listed]:
        raise DataError(
            f"{where} has no {' and no '.join(missing)}, so it is not an adapter: give the model folder of a LoRA run"
        )
    adapter = AdapterFiles(
        uri=where,
        digest=found,
        store=store,
        prefix=prefix,
        listing=listing,
        files=Checksums({name: listed[name] for name in ADAPTER_FILES}),
    )
    if listed[ADAPTER_CONFIG]["bytes"] > _CONFIG_LIMIT_BYTES or adapter.size > ADAPTER_LIMIT_BYTES:
        raise DataError(
            f"{where} has {adapter.size / GIB:.1f} GiB, of which {listed[ADAPTER_CONFIG]['bytes']:,} bytes are "
            f"{ADAPTER_CONFIG}: expected up to {ADAPTER_LIMIT_BYTES / GIB:.0f} GiB and {_CONFIG_LIMIT_BYTES:,} bytes"
        )
    return adapter
