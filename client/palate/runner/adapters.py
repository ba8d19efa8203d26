"""Brings a service's adapters from its record to the work folder while the service runs. Knows the record and files, no engine."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

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
        self._failures: dict[str, _Failure] = {}  # by digest and URI: the same files may be intact elsewhere
        self._unnamed_since: dict[str, float] = {}
        self._served: dict[str, str] = {}  # digests by name

    @property
    def failed(self) -> tuple[AdapterState, ...]:
        """The adapters of the record that the last `update` could not stage, with the reason."""
        states = ((one, self._reason(one)) for one in self._wanted)
        return tuple(
            AdapterState(name=one.name, digest=one.digest, state="failed", reason=reason)
            for one, reason in states
            if reason
        )

    def update(self) -> tuple[FleetAdapter, ...]:
        """Reads the record, stages what is new, and returns the adapters whose files are there, in the record's order.

        Takes as long as its downloads. If nothing has changed, it makes one small request. An adapter that cannot be staged does
        not hinder the others.

        Raises:
            StoreError: The record cannot be read.
            DamagedFilesError: The record's list of adapters is damaged.
        """
        data = adapters_bytes(self._record)
        if data != self._read:
            self._wanted = parse_adapters(self._record, data)
            self._read = data
        for adapter in self._wanted:
            self._stage(adapter)
        kept = {_key(one) for one in self._wanted}
        self._failures = {key: failure for key, failure in self._failures.items() if key in kept}
        here = {one.name: one.digest for one in self._wanted if not self._reason(one)}
        # Until the files that replace it are here, an adapter is served as before.
        found = ((one.name, here.get(one.name) or self._served.get(one.name)) for one in self._wanted)
        self._served = {name: digest for name, digest in found if digest}
        self._clean()
        return tuple(
            FleetAdapter(name=name, digest=digest, path=str(self._folder / digest))
            for name, digest in self._served.items()
        )

    def _stage(self, adapter: ServedAdapter) -> None:
        target = self._folder / adapter.digest
        failure = self._failures.get(_key(adapter))
        if reserved(adapter.name, self._record.name) or target.is_dir():
            return
        if failure is not None and time.monotonic() < failure.retry_at:
            return
        draft = self._folder / f".draft-{adapter.digest}"
        try:
            shutil.rmtree(draft, ignore_errors=True)
            find_adapter(adapter.uri, self._session, digest=adapter.digest).copy(draft)
            draft.rename(target)  # its presence means complete and verified
        except Exception as error:  # whatever it is, the others must be served
            reason = str(error)[:_REASON_LENGTH] or type(error).__name__
            if failure is None or failure.reason != reason:
                self._say(f"note: the adapter {adapter.name} cannot be served: {reason}")
            self._failures[_key(adapter)] = _Failure(reason, after=failure)
            shutil.rmtree(draft, ignore_errors=True)
        else:
            self._failures.pop(_key(adapter), None)
            self._say(f"the files of the adapter {adapter.name} are here and verified")

    def _reason(self, adapter: ServedAdapter) -> str:
        if whose := reserved(adapter.name, self._record.name):
            return f"the name {adapter.name!r} is {whose}"
        if (self._folder / adapter.digest).is_dir():
            return ""
        failure = self._failures.get(_key(adapter))
        return failure.reason if failure is not None else "its files are not staged"

    def _clean(self) -> None:
        """Removes folders that have had no name for a while."""
        named, now = {*(one.digest for one in self._wanted), *self._served.values()}, time.monotonic()
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
