"""Finds and removes what runs left behind. Knows records, leases and backends; no engine.

Finds nothing that may still be needed: a run only if its own check says that it is lost, a process or container only if its run
has ended or is deleted, and a folder only if its process has ended.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from palate.backends import backend_names, get_backend
from palate.backends.container import stale_secrets
from palate.paths import folder_now, palate_home, stale_work_folders
from palate.runs.handle import RunHandle
from palate.runs.lease import LEASE_KEY, LOST_AFTER_S, read_lease, silence_s, store_now
from palate.runs.record import RENEWAL_KEY, Record, locate, names
from palate.runs.renewal import read_renewal
from palate.session import Session
from palate.store import Store, open_store
from palate_recipes.errors import ConfigurationError, DamagedFilesError, RunNotFoundError
from palate_recipes.specs.run import KINDS, Kind, ServeManifest

ENDING_S = 30.0
"""Time that a runner may need after its last status, and a service after its time to live."""

UNFINISHED_S = 86400.0
"""Time that a submission may need to upload its data, which precede the manifest."""

CACHE_S = 30 * 86400.0
"""Age at which files in the store's cache are removed. They are computed again when needed."""


@dataclass(frozen=True, kw_only=True)
class Leftover:
    """Something that can be cleaned up.

    Attributes:
        kind: `lost run`, `damaged record`, `expired service`, `stale lease`, `unfinished submission`, `stale cache`,
            `orphan run` or `stale folder`.
        what: Name of a run, a pid with its command, or a path.
        why: Why it is not needed.
        remove: Removes it, if it still exists.
    """

    kind: Literal[
        "lost run",
        "damaged record",
        "expired service",
        "stale lease",
        "unfinished submission",
        "stale cache",
        "orphan run",
        "stale folder",
    ]
    what: str
    why: str
    remove: Callable[[], object]


def find_leftovers(session: Session) -> list[Leftover]:
    """Checks every run in the session's store and this machine's files. Changes nothing.

    Raises:
        StoreError: The store cannot be read.
    """
    named = {kind: names(session.store, kind) for kind in KINDS}
    return [
        *_of_the_store(session, named),
        *_unnamed(session.store, named),
        *_of_the_engines(session),
        *_of_this_machine(),
    ]


def _of_the_store(session: Session, named: Mapping[Kind, list[str]]) -> Iterator[Leftover]:
    for kind in KINDS:
        for name in named[kind]:
            record = Record(session.store, kind, name)
            handle = RunHandle(record, session)
            try:
                status = record.status()
                manifest = handle.manifest  # may be damaged, too
                cause = "" if status.is_terminal else handle.lost(status)
            except DamagedFilesError as error:
                # A newer version may have written what this one cannot read. Only `palate delete` removes that.
                if not record.other_version and not _may_run(record):
                    yield Leftover(kind="damaged record", what=f"{kind}/{name}", why=str(error), remove=handle.delete)
                continue
            except (RunNotFoundError, ConfigurationError):
                continue  # deleted meanwhile, or its backend is not installed here
            if status.is_terminal:
                try:
                    lease = read_lease(record)
                except DamagedFilesError:
                    continue  # nobody reads it any more; it is deleted with its run
                silent_s = silence_s(record) if lease is not None and not lease.released else None
                if lease is not None and silent_s is not None and silent_s > lease.lost_after_s:
                    key = record.key(LEASE_KEY)
                    yield Leftover(
                        kind="stale lease",
                        what=f"{kind}/{name}",
                        why=f"the run is {status.state}, and its runner on {lease.host} has been silent for {silent_s:.0f} s",
                        remove=lambda key=key: session.store.delete(key),  # type: ignore[misc]
                    )
            elif cause:
                yield Leftover(
                    kind="lost run",
                    what=f"{kind}/{name}",
                    why=cause,
                    remove=lambda handle=handle: _settle(handle),  # type: ignore[misc]
                )
            elif (
                status.state == "Running"
                and isinstance(manifest, ServeManifest)
                and (why := _expired(record, manifest))
            ):
                yield Leftover(kind="expired service", what=name, why=why, remove=handle.stop)


def _expired(record: Record, manifest: ServeManifest) -> str:
    """Returns why a running service should have stopped by itself, or ""."""
    try:
        renewal = read_renewal(record)
    except DamagedFilesError:
        return ""  # it may have been renewed
    ttl_s = manifest.body.time_to_live_s if renewal is None else renewal.time_to_live_s
    if not ttl_s:
        return ""
    # By the store's clock. The status was last written when the service became Running, or later.
    written = ["status.json", *([RENEWAL_KEY] if renewal else [])]
    ages_s = [age_s for key in written if (age_s := silence_s(record, key)) is not None]
    if len(ages_s) < len(written) or (over_s := min(ages_s) - ttl_s) <= ENDING_S:
        return ""
    return f"its time to live of {ttl_s:g} s was over {over_s:.0f} s ago"


def _unnamed(store: Store, named: Mapping[Kind, list[str]]) -> Iterator[Leftover]:
    """Files in the store that belong to no run: of a client that died before it wrote the manifest, and old caches."""
    now = store_now(store)
    if now is None:
        return  # a read-only store cannot be cleaned
    for kind in KINDS:
        for name in sorted(set(store.list_children(f"{kind}/")) - set(named[kind])):
            age_s = now - max((info.modified_s for info in store.list(f"{kind}/{name}/")), default=now)
            if age_s > UNFINISHED_S:
                yield Leftover(
                    kind="unfinished submission",
                    what=f"{kind}/{name}",
                    why=f"it has no manifest {age_s / 3600:.0f} h after its last file: the process that submitted it died",
                    remove=lambda prefix=f"{kind}/{name}/": store.delete_tree(prefix),  # type: ignore[misc]
                )
    for info in store.list("cache/"):
        if (age_s := now - info.modified_s) > CACHE_S:
            yield Leftover(
                kind="stale cache",
                what=info.key,
                why=f"it was written {age_s / 86400:.0f} days ago; a training that needs it computes it again",
                remove=lambda key=info.key: store.delete(key),  # type: ignore[misc]
            )


def _of_the_engines(session: Session) -> Iterator[Leftover]:
    for name in backend_names():
        backend = get_backend(name)
        for run in backend.runs():
            if why := _over(*locate(run.uri), session):
                yield Leftover(
                    kind="orphan run",
                    what=run.what,
                    why=why,
                    remove=lambda backend=backend, run=run: backend.stop(run.engine_id, grace_s=ENDING_S),  # type: ignore[misc]
                )


def _of_this_machine() -> Iterator[Leftover]:
    home = palate_home()
    for kind in KINDS:
        for folder in _children(home / "work" / kind):
            for stale in stale_work_folders(kind, folder.name):
                yield Leftover(
                    kind="stale folder",
                    what=str(stale),
                    why="its runner has ended",
                    remove=lambda stale=stale: shutil.rmtree(stale, ignore_errors=True),  # type: ignore[misc]
                )
    for folder in stale_secrets():
        yield Leftover(
            kind="stale folder",
            what=str(folder),
            why="it holds the credentials of a container that was never started",
            remove=lambda folder=folder: shutil.rmtree(folder, ignore_errors=True),  # type: ignore[misc]
        )
    drafts = [draft for draft in _children(home / "cache" / "models") if draft.name.endswith(".draft")]
    now = folder_now(drafts[0].parent) if drafts else 0.0
    for draft in drafts:
        if now - draft.stat().st_mtime > 86400:
            yield Leftover(
                kind="stale folder",
                what=str(draft),
                why="a download of weights that was interrupted more than a day ago",
                remove=lambda draft=draft: shutil.rmtree(draft, ignore_errors=True),  # type: ignore[misc]
            )


def _over(root: str, kind: Kind, name: str, session: Session) -> str:
    """Returns why a runner is not needed any more, or ""."""
    record = Record(open_store(root, options=session.options_for(root)), kind, name)
    try:
        status = record.status()
    except RunNotFoundError:
        return "its run was deleted"
    except DamagedFilesError:
        return ""  # removed with the damaged record
    silent_s = silence_s(record, "status.json")
    if status.is_terminal and silent_s is not None and silent_s > ENDING_S:
        return f"its run has been {status.state} for {silent_s:.0f} s"
    return ""


def _may_run(record: Record) -> bool:
    """Whether the lease is recent enough that its runner counts as alive."""
    try:
        lease = read_lease(record)
    except DamagedFilesError:
        silence = silence_s(record)
        return silence is None or silence <= LOST_AFTER_S
    if lease is None or lease.released:
        return False
    silence = silence_s(record)
    return silence is None or silence <= lease.lost_after_s


def _settle(handle: RunHandle) -> None:
    if handle.refresh().is_terminal:
        handle.record.store.delete(handle.record.key(LEASE_KEY))


def _children(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []
