"""Copies checkpoints from the trainer's folder to the store and back, only complete ones. Knows folders and the record, no training.

See `palate.runs.checkpoints` for their names. Each attempt writes its own: a runner that counted as lost and comes back does not
touch those of the next attempt.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from palate.checksums import Checksums, read_model_digests
from palate.runs.checkpoints import complete_checkpoints, deleted, served_files
from palate.runs.record import Record
from palate.session import Session
from palate.store import Store, open_parent
from palate_recipes.errors import DamagedFilesError, StoreError
from palate_recipes.specs.train import CHECKPOINTS_DIR, COMPLETE_MARK


class CheckpointPusher:
    """Uploads each complete checkpoint during the training. A context manager; its exit waits for the uploads.

    Args:
        record: The run.
        folder: Where the trainer writes them.
        attempt: The attempt that writes them.
        staged: Name of the checkpoint that the trainer resumed from, which is in the store already.
        before_mark: Called before a marker is uploaded: the metrics up to the checkpoint must be in the store by then.
    """

    def __init__(
        self, record: Record, folder: Path, *, attempt: int, staged: str | None, before_mark: Callable[[], None]
    ) -> None:
        self._record = record
        self._folder = folder
        self._attempt = attempt
        self._seen = {staged}
        self._before_mark = before_mark
        # One worker: checkpoints arrive in order and do not compete for bandwidth.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="palate-checkpoints")
        self._uploads: dict[Path, Future[None]] = {}

    def __enter__(self) -> CheckpointPusher:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(wait=True)
        for folder, upload in self._uploads.items():
            if isinstance(upload.exception(), StoreError):
                self._push(folder)  # try again: a full store may have space now
            else:
                upload.result()

    def look(self) -> None:
        """Starts to upload new complete checkpoints."""
        if not self._folder.is_dir():
            return
        # The trainer writes its marker last, so a folder with one does not change any more.
        marks = self._folder.glob(f"checkpoint-*/{COMPLETE_MARK}")
        for folder in sorted((mark.parent for mark in marks), key=_step):
            if folder.name not in self._seen:
                self._seen.add(folder.name)
                self._uploads[folder] = self._pool.submit(self._push, folder)

    def _push(self, folder: Path) -> None:
        suffix = f"-attempt-{self._attempt}" if self._attempt > 1 else ""
        prefix = self._record.key(CHECKPOINTS_DIR, f"step-{_step(folder):06d}{suffix}")
        # Before the uploads: a file that changes on disk in between then fails the comparison when it is staged.
        digests = Checksums.of(folder, leave_out=COMPLETE_MARK)
        for name in digests.files:
            self._record.store.upload(folder / name, f"{prefix}/{name}")
        self._before_mark()
        self._record.store.put(f"{prefix}/{COMPLETE_MARK}", digests.encode())


def stage_last_checkpoint(record: Record, folder: Path, say: Callable[[str], None]) -> Path | None:
    """Copies a run's last complete checkpoint to this machine. Skips damaged ones with a note.

    Args:
        record: The run.
        folder: The trainer's folder of checkpoints.
        say: Called with a log line.

    Returns:
        The checkpoint's folder, with the trainer's name for it, or None if the store has none.

    Raises:
        StoreError: The store cannot be read.
    """
    # By step first: an earlier attempt may have come further. Of the same step, the latest attempt's.
    for checkpoint in reversed(complete_checkpoints(record)):
        source = record.key(CHECKPOINTS_DIR, checkpoint.name)
        mark = f"{source}/{COMPLETE_MARK}"
        target = folder / f"checkpoint-{checkpoint.step}"
        try:
            digests = Checksums.parse(record.store.get(mark), where=record.store.uri(mark))
            target.mkdir(parents=True, exist_ok=True)
            for name in digests.files:
                record.store.download(f"{source}/{name}", target / name)
            # Only the listed files were copied here.
            digests.check_folder(target, what=record.store.uri(source), may_hold_more=True)
        except (DamagedFilesError, FileNotFoundError) as error:
            say(f"note: a checkpoint is skipped: {error}")
            shutil.rmtree(target, ignore_errors=True)
            continue
        (target / COMPLETE_MARK).touch()  # last: its presence means complete
        return target
    return None


def stage_for_serving(store: Store, prefix: str, folder: Path, *, digest: str | None, what: str) -> None:
    """Copies what a server reads of a complete checkpoint to this machine, and verifies every file.

    A copy, also from a store on this machine: the checkpoint may be deleted while it is served.

    Args:
        store, prefix: The checkpoint.
        folder: Where to.
        digest: SHA-256 of its marker, from the service's manifest.
        what: URI of the checkpoint, for messages.

    Raises:
        DamagedFilesError: It is deleted, also while it is copied, or it is not what was deployed.
    """
    try:
        data = store.get(f"{prefix}/{COMPLETE_MARK}")
        if hashlib.sha256(data).hexdigest() != digest:
            raise DamagedFilesError(f"{what} was written again after it was deployed: deploy it again")
        files = served_files(Checksums.parse(data, where=store.uri(f"{prefix}/{COMPLETE_MARK}")))
        for name in files.files:
            store.download(f"{prefix}/{name}", folder / name)
    except FileNotFoundError:
        raise deleted(what, what.split("/")[-3]) from None
    files.check_folder(folder, what=what, remedy="Deploy another checkpoint")


def stage_tuned(session: Session, uri: str, folder: Path, *, checkpoint: bool, digest: str | None) -> Path:
    """Returns a local folder with a trained model or a checkpoint. Verifies every file by the digest that the training wrote.

    Args:
        session: Opens `uri`.
        uri: Of the model or the checkpoint.
        folder: Where it is copied to, unless the store is on this machine.
        checkpoint: Whether it is a checkpoint.
        digest: SHA-256 of its list of files; None verifies nothing.

    Raises:
        DamagedFilesError: A file is missing, changed or added.
    """
    store, prefix = open_parent(uri, options=session.options_for(uri))
    if checkpoint:
        stage_for_serving(store, prefix, folder, digest=digest, what=uri)
        return folder
    found = store.local_path(prefix)
    if found is None:
        found = folder
        store.download_tree(prefix, found)
    if digest:
        read_model_digests(store, prefix, digest, what=uri).check_folder(found, what=uri)
    return found


def _step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])
