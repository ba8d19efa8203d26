"""Shares reference log-probabilities between the jobs of a store. Knows tables, no trainer.

Downloads a table before a training and publishes new rows after it. An error here only costs the next job a computation. It is logged once and never fails a job.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from palate.store import Store
from palate_recipes.errors import ObjectNotFoundError, PreconditionFailedError
from palate_recipes.specs.reference_table import Table, read_table, reference_key, table_name
from palate_recipes.specs.train import TrainTask

CACHE_PREFIX = "cache"
"""Folder of the store next to `jobs` and `services`. It may be deleted at any time."""

_ATTEMPTS = 30
_PAUSE_S = 0.2


class ReferenceCache:
    """One job's copy of a table. A context manager that publishes the rows that the job adds.

    Args:
        store: The job's store.
        task: The trainer's task, with its `cache_dir`.
        say: Called with a log line, also from another thread.
    """

    def __init__(self, store: Store, task: TrainTask, say: Callable[[str], None]) -> None:
        self._store = store
        self._say = say
        self._key: str | None = None
        self._path = Path()
        self._published: int | None = None  # st_mtime_ns of the file when it was published or downloaded
        self._failed = False
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="palate-cache")
        self._upload: Future[None] | None = None
        if task.files.cache_dir is not None and task.spec.hyperparameters.training_strategy == "dpo":
            self._guarded(lambda: self._fetch(task, Path(task.files.cache_dir or "")))

    def __enter__(self) -> ReferenceCache:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(wait=True)
        self._guarded(self._publish)

    def look(self) -> None:
        """Publishes the table in the background if the trainer has written it."""
        if not self._failed and (self._upload is None or self._upload.done()):
            self._guarded(self._start)

    def _fetch(self, task: TrainTask, folder: Path) -> None:
        key = reference_key(task)
        path = folder / table_name(key)
        try:
            # Copied even if the store is local, since other jobs may publish meanwhile.
            self._store.download(f"{CACHE_PREFIX}/{table_name(key)}", path)
            self._published = path.stat().st_mtime_ns
        except ObjectNotFoundError:
            pass
        self._key, self._path = key, path

    def _start(self) -> None:
        if self._has_news():
            self._upload = self._pool.submit(self._guarded, self._publish)

    def _has_news(self) -> bool:
        return self._key is not None and self._path.is_file() and self._path.stat().st_mtime_ns != self._published

    def _publish(self) -> None:
        if self._key is not None and self._has_news():
            written = self._path.stat().st_mtime_ns
            publish(self._store, read_table(self._path, self._key))
            self._published = written

    def _guarded(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # the cache must never fail a job
            if not self._failed:
                self._say(
                    f"note: the reference cache of the store cannot be used: {str(error) or type(error).__name__}"
                )
            self._failed = True


def publish(store: Store, table: Table) -> None:
    """Merges a table into the store's table. Rows that other jobs publish at the same time are kept.

    If the store cannot replace atomically (`Store.atomic_replace`), rows of a concurrent writer may be lost and are computed again
    when needed.

    Raises:
        StoreError: The store rejects the request, or other writers won every time.
    """
    name = f"{CACHE_PREFIX}/{table_name(table.key)}"
    for attempt in range(_ATTEMPTS):
        try:
            # stat before get: if the object changes in between, the conditional put fails.
            there = store.stat(name)
            if there is None:
                store.put(name, table.encode(), if_none_match=True)
                return
            stored = Table.decode(store.get(name), table.key)
            merged = stored.merge(table)
            if merged.generation != stored.generation or merged.rows.keys() != stored.rows.keys():
                store.put(name, merged.encode(), if_match=there.etag)
            return
        except (PreconditionFailedError, ObjectNotFoundError):  # another job wrote, or the cache was cleared
            if attempt == _ATTEMPTS - 1:
                raise
            time.sleep(random.uniform(0, _PAUSE_S * min(attempt + 1, 10)))
