"""The versions in a service's record: the update that is open, the history, and which version is current. Knows no runner.

    <service>/update.json         the last update that was asked for; open until `ended`
    <service>/versions/<n>.json   what version n serves, and what became of it

The manifest decides which version is current, and every change of it is conditional on what was read. `update.json` is never
deleted: a store deletes without a condition, and would remove the update that another client has just written. An ended one is
replaced instead, on the condition that it is still the same.
"""

from __future__ import annotations

import re
import time
from secrets import token_hex
from typing import Any

from msgspec.structs import replace

from palate.runs.record import Record
from palate_recipes.errors import ConfigurationError, DamagedFilesError, PreconditionFailedError
from palate_recipes.specs.rollout import Outcome, Update, Version, version_name
from palate_recipes.specs.run import VERSIONS_LIMIT, Deployment, ServeManifest

UPDATE_KEY = "update.json"
VERSIONS_FOLDER = "versions"

KEPT_VERSIONS = 100
"""The history has this many versions. Older ones are deleted when a new one is added."""

_CAS_ATTEMPTS = 20
_NUMBERED = re.compile(r"([1-9][0-9]{0,5})\.json")


# ── the update ──────────────────────────────────────────────────────────────────────────────────────────────────────


def last_update(record: Record) -> Update | None:
    """Returns the update that was asked for last, also one that has ended. Raises DamagedFilesError if it cannot be read."""
    try:
        data = record.store.get(record.key(UPDATE_KEY))
    except FileNotFoundError:
        return None
    return _parse_update(record, data)


def open_update(record: Record) -> Update | None:
    """Returns the update that is in progress, if there is one. Raises DamagedFilesError if it cannot be read."""
    update = last_update(record)
    return None if update is None or update.ended else update


def update_to(version: Version, *, share: float = 0.0, promote: bool = True) -> Update:
    """Returns an update to a version, for `ask`."""
    return Update(
        id=token_hex(8),
        body=version.body,
        labels=version.labels,
        share=share,
        promote=promote,
        asked_at=version.asked_at,
    )


def ask(record: Record, update: Update) -> None:
    """Asks the service's runner for an update.

    Raises:
        ConfigurationError: Another update is open.
    """
    key = record.key(UPDATE_KEY)
    for _ in range(_CAS_ATTEMPTS):
        info = record.store.stat(key)  # before the read: a later write must not match
        found = last_update(record)
        if found is not None and found.id == update.id:
            return  # our own write, whose answer was lost
        if found is not None and not found.ended:
            raise in_progress(record, found)
        try:
            if info is None:
                record.store.put(key, update.encode(), if_none_match=True)
            else:
                record.store.put(key, update.encode(), if_match=info.etag)
        except (PreconditionFailedError, FileNotFoundError):
            continue
        return
    raise RuntimeError(f"{record.uri}/{UPDATE_KEY} changed {_CAS_ATTEMPTS} times during attempts to write it")


def in_progress(record: Record, update: Update) -> ConfigurationError:
    """Returns the error that an update is open."""
    name = version_name(update.body.version)
    return ConfigurationError(
        f"service {record.name} has an update to {name} in progress: `palate promote {record.name}` completes it, "
        f"`palate rollback {record.name}` withdraws it, `palate versions {record.name}` shows it"
    )


def change_update(record: Record, update_id: str, **changes: Any) -> Update | None:
    """Changes fields of an open update. Returns None, without a change, if it has ended or another one has replaced it."""
    key, written = record.key(UPDATE_KEY), b""
    for _ in range(_CAS_ATTEMPTS):
        info = record.store.stat(key)  # before the read: a later write must not match
        try:
            data = record.store.get(key)
        except FileNotFoundError:
            return None
        found = _parse_update(record, data)
        # A put whose answer got lost is retried by the client, fails on its own ETag, and looks like a lost race.
        if data == written:
            return found
        if info is None or found.id != update_id or found.ended:
            return None
        target = replace(found, **changes)
        written = target.encode()
        if written == data:
            return found
        try:
            record.store.put(key, written, if_match=info.etag)
        except (PreconditionFailedError, FileNotFoundError):
            continue
        return target
    raise RuntimeError(f"{record.uri}/{UPDATE_KEY} changed {_CAS_ATTEMPTS} times during attempts to write it")


def _parse_update(record: Record, data: bytes) -> Update:
    try:
        return Update.decode(data)
    except ValueError as error:
        raise DamagedFilesError(
            f"{UPDATE_KEY} of {record.name} is damaged ({error}): restore {record.uri}/{UPDATE_KEY}, or delete that file, "
            "which withdraws the update in progress"
        ) from None


# ── the history ─────────────────────────────────────────────────────────────────────────────────────────────────────


def numbers(record: Record) -> list[int]:
    """Returns the numbers of the versions in the history, in order."""
    names = (info.key.rpartition("/")[2] for info in record.store.list(record.key(VERSIONS_FOLDER)))
    return sorted(int(found[1]) for name in names if (found := _NUMBERED.fullmatch(name)))


def read_version(record: Record, number: int) -> Version | None:
    """Returns a version of the history, or None. Raises DamagedFilesError if it cannot be read."""
    name = f"{VERSIONS_FOLDER}/{number}.json"
    try:
        return Version.decode(record.store.get(record.key(VERSIONS_FOLDER, f"{number}.json")))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DamagedFilesError(
            f"{name} of {record.name} is damaged ({error}): restore {record.uri}/{name}, or delete that file, which removes the "
            "version from the history"
        ) from None


def history(record: Record) -> list[Version]:
    """Returns the versions that were updated to or from, in order. Raises DamagedFilesError if one cannot be read."""
    found = (read_version(record, number) for number in numbers(record))
    return [version for version in found if version is not None]


def reserve(record: Record, body: Deployment, labels: dict[str, str]) -> Version:
    """Adds a version with a number of its own to the history, and returns it. Deletes the oldest ones over the limit."""
    current = record.serve_manifest().body.version
    known = numbers(record)
    number = max([current, *known])
    while True:
        number += 1
        if number > VERSIONS_LIMIT:
            raise ConfigurationError(
                f"service {record.name} has no number left for a version: deploy it under another name"
            )
        now = time.time()
        version = Version(
            body=replace(body, version=number), labels=labels, outcome="asked", asked_at=now, changed_at=now
        )
        try:
            record.store.put(_version_key(record, number), version.encode(), if_none_match=True)
        except PreconditionFailedError:
            continue  # another client's, or our own whose answer was lost: a number that is skipped does no harm
        for old in [one for one in known if one != current][: -KEPT_VERSIONS + 1]:
            record.store.delete(_version_key(record, old))
        return version


def note_outcome(record: Record, version: Version, outcome: Outcome, *, reason: str = "", table: str = "") -> None:
    """Writes what became of a version."""
    noted = replace(version, outcome=outcome, reason=reason, table=table, changed_at=time.time())
    record.store.put(_version_key(record, version.number), noted.encode())


def of_manifest(manifest: ServeManifest, known: Version | None) -> Version:
    """Returns the current version, as the history has it once it is replaced.

    Args:
        manifest: The service's.
        known: What the history has of it; None for the first version.
    """
    created_at = known.asked_at if known is not None else manifest.created_at
    return Version(
        body=manifest.body, labels=dict(manifest.labels), outcome="current", asked_at=created_at, changed_at=created_at
    )


def make_current(record: Record, manifest: ServeManifest, version: Version) -> ServeManifest:
    """Makes a version the current one, on the condition that the manifest is the known one. Returns the new manifest.

    Order of writes: the history of the current version, the manifest, the history of the new one. After the manifest the new
    version is current, whatever the history says.

    Raises:
        ConfigurationError: Somebody else has replaced the manifest.
    """
    before = of_manifest(manifest, read_version(record, manifest.body.version))
    note_outcome(record, before, "replaced")
    # The number of engines is the service's, whatever it was when the version was asked for.
    sizes = manifest.body
    body = replace(version.body, instances=sizes.instances, autoscaling=sizes.autoscaling)
    after = replace(manifest, labels=version.labels, body=body)
    record.replace_manifest(manifest, after)
    note_outcome(record, version, "current")
    return after


def previous(record: Record) -> Version | None:
    """Returns the version that the current one has replaced, or None."""
    current = record.serve_manifest().body.version
    replaced = [one for one in history(record) if one.outcome == "replaced" and one.number != current]
    return max(replaced, key=lambda one: one.changed_at, default=None)


def withdraw(record: Record, update: Update, *, reason: str) -> None:
    """Ends an open update of a service that does not run. Its runner does it for one that runs."""
    version = read_version(record, update.body.version)
    if version is not None and version.outcome == "asked":
        note_outcome(record, version, "cancelled", reason=reason)
    change_update(record, update.id, cancelled=True, ended=True)


def forget(record: Record) -> None:
    """Removes update and history, for another service under the same name."""
    record.store.delete(record.key(UPDATE_KEY))
    for number in numbers(record):
        record.store.delete(_version_key(record, number))


def _version_key(record: Record, number: int) -> str:
    return record.key(VERSIONS_FOLDER, f"{number}.json")
