"""Brings a service's adapters from its record to the work folder while the service runs. Knows the record and files, no engine."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from palate.adapter_files import find_adapter
from palate.runs.adapters import adapters_bytes, parse_adapters
from palate.runs.record import Record
from palate.session import Session
from palate_recipes.specs.adapters import ServedAdapter, reserved
from palate_recipes.specs.fleet import AdapterState, FleetAdapter

FIRST_RETRY_S = 10.0
LONGEST_RETRY_S = 300.0
"""A failed adapter is tried again after 10 s, 20 s, and so on up to this time: its store may come back, its files be restored."""

KEPT_S = 600.0
"""How long the files of a removed adapter stay. An engine may read them again for a request that it accepted before."""

_REASON_LENGTH = 1000
"""Characters of a reason, which becomes part of the service's status."""


class StagedAdapters:
    """Keeps a folder with the verified files of the adapters in a service's record.

    An adapter's folder has the name of its digest. It appears when its files are complete and verified, and never changes.
    `look` and `bring` may run in a thread each: what is removed must not wait for the download of another one.

    Args:
        record: The service, without retries.
        folder: Local folder for the files, which nobody else uses.
        session: Opens the adapters' stores.
        say: Writes a line to the service's log.
    """

    def __init__(self, record: Record, folder: Path, session: Session, say: Callable[[str], None]) -> None:
        self._record = record
        self._folder = folder
        self._session = session
        self._say = say
        self._read: bytes | None = None
        self._wanted: tuple[ServedAdapter, ...] = ()
        self._lock = threading.Lock()
        self._failures: dict[str, _Failure] = {}  # by digest and URI: the same files may be intact elsewhere
        self._draft = ""  # name of the folder that `bring` is filling
        self._unnamed_since: dict[str, float] = {}
        self._served: dict[str, str] = {}  # digests by name

    @property
    def missing(self) -> tuple[AdapterState, ...]:
        """The adapters of the record whose files are not here: `loading`, or `failed` with the reason."""
        found = []
        for one in self._wanted:
            if not self._is_here(one):
                reason = self._reason(one)
                state: Literal["failed", "loading"] = "failed" if reason else "loading"
                found.append(AdapterState(name=one.name, digest=one.digest, state=state, reason=reason))
        return tuple(found)

    def look(self) -> tuple[FleetAdapter, ...]:
        """Reads the record and returns the adapters whose files are here, in the record's order. Downloads nothing.

        If nothing has changed, it makes one small request.

        Raises:
            StoreError: The record cannot be read.
            DamagedFilesError: The record's list of adapters is damaged.
        """
        data = adapters_bytes(self._record)
        if data != self._read:
            self._wanted = parse_adapters(self._record, data)
            self._read = data
        kept = {_key(one) for one in self._wanted}
        with self._lock:
            self._failures = {key: failure for key, failure in self._failures.items() if key in kept}
        here = {one.name: one.digest for one in self._wanted if self._is_here(one)}
        # Until the files that replace it are here, an adapter is served as before.
        found = ((one.name, here.get(one.name) or self._served.get(one.name)) for one in self._wanted)
        self._served = {name: digest for name, digest in found if digest}
        self._clean()
        return tuple(
            FleetAdapter(name=name, digest=digest, path=str(self._folder / digest))
            for name, digest in self._served.items()
        )

    def bring(self) -> None:
        """Stages what the last `look` has found missing. Takes as long as its downloads; `look` may be called meanwhile.

        An adapter that cannot be staged does not hinder the others.
        """
        for adapter in self._wanted:
            if adapter in self._wanted and self._is_due(adapter):  # `look` may have found it removed
                self._stage(adapter)

    def _is_due(self, adapter: ServedAdapter) -> bool:
        if reserved(adapter.name, self._record.name) or (self._folder / adapter.digest).is_dir():
            return False
        failure = self._failure(adapter)
        return failure is None or time.monotonic() >= failure.retry_at

    def _stage(self, adapter: ServedAdapter) -> None:
        failure = self._failure(adapter)
        self._draft = f".draft-{adapter.digest}"
        draft = self._folder / self._draft
        try:
            shutil.rmtree(draft, ignore_errors=True)
            find_adapter(adapter.uri, self._session, digest=adapter.digest).copy(draft)
            draft.rename(self._folder / adapter.digest)  # its presence means complete and verified
        except Exception as error:  # whatever it is, the others must be served
            reason = str(error)[:_REASON_LENGTH] or type(error).__name__
            if failure is None or failure.reason != reason:
                self._say(f"note: the adapter {adapter.name} cannot be served: {reason}")
            with self._lock:
                self._failures[_key(adapter)] = _Failure(reason, after=failure)
            shutil.rmtree(draft, ignore_errors=True)
        else:
            with self._lock:
                self._failures.pop(_key(adapter), None)
            self._say(f"the files of the adapter {adapter.name} are here and verified")
        finally:
            self._draft = ""

    def _failure(self, adapter: ServedAdapter) -> _Failure | None:
        with self._lock:
            return self._failures.get(_key(adapter))

    def _is_here(self, adapter: ServedAdapter) -> bool:
        return not reserved(adapter.name, self._record.name) and (self._folder / adapter.digest).is_dir()

    def _reason(self, adapter: ServedAdapter) -> str:
        if whose := reserved(adapter.name, self._record.name):
            return f"the name {adapter.name!r} is {whose}"
        failure = self._failure(adapter)
        return failure.reason if failure is not None else ""

    def _clean(self) -> None:
        """Removes folders that have had no name for a while."""
        named = {*(one.digest for one in self._wanted), *self._served.values(), self._draft}
        now = time.monotonic()
        there = [entry.name for entry in self._folder.iterdir()] if self._folder.is_dir() else []
        since = {name: self._unnamed_since.get(name, now) for name in there if name not in named}
        for name, when in since.items():
            if now - when >= KEPT_S:
                shutil.rmtree(self._folder / name, ignore_errors=True)
        self._unnamed_since = since


class _Failure:
    """Why an adapter could not be staged, and when it is tried again."""

    def __init__(self, reason: str, *, after: _Failure | None) -> None:
        self.reason = reason
        self.pause_s: float = FIRST_RETRY_S if after is None else min(2 * after.pause_s, LONGEST_RETRY_S)
        self.retry_at = time.monotonic() + self.pause_s


def _key(adapter: ServedAdapter) -> str:
    return f"{adapter.digest} {adapter.uri}"
