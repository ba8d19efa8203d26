"""A run's folder in a store: manifest, status, logs, metrics. Owns every key in it. Knows no backend and no program.

    jobs/<id>/      manifest.json  status.json  lease.json  logs/000001.log  metrics/000001.jsonl
                    inputs/  checkpoints/  model/  tensorboard/
    services/<name>/manifest.json  status.json  lease.json  logs/000001.log  access_token  access_tokens.json
                    renewal.json
                    adapters.json  adapters/<digest>/
                    update.json  versions/<number>.json
    evaluations/<name>/
                    manifest.json  status.json  lease.json  logs/000001.log  inputs/  scores.json

`manifest.json` is written once and has everything that a run needs. `status.json` is written conditionally, so that of two
writers (a stop and a finish) one wins. A terminal state is written last, after everything that it promises. `lease.json`
belongs to the runner (see `palate.runs.lease`). `palate/schemas` has their JSON schemas.
"""

from __future__ import annotations

import json
import platform
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, Literal, NoReturn

from msgspec.structs import replace

from palate.common.utils import check_name
from palate.store import Store
from palate_recipes import __version__
from palate_recipes.errors import (
    ConfigurationError,
    DamagedFilesError,
    NameTakenError,
    PreconditionFailedError,
    RunNotFoundError,
)
from palate_recipes.specs.codec import decode, encode, parse_object, shown
from palate_recipes.specs.events import is_event
from palate_recipes.specs.run import (
    ACTIVE,
    KINDS,
    TERMINAL,
    Attempt,
    EvaluateManifest,
    Kind,
    LogIndex,
    Manifest,
    MergedLog,
    ServeManifest,
    State,
    Status,
    TrainManifest,
)

TOKEN_KEY = "access_token"
"""The owner's bearer token of a service. A separate key, so that no manifest, status or log contains it."""
NAMED_TOKENS_KEY = "access_tokens.json"
"""The service's named tokens (see `palate_recipes.specs.access`)."""
RENEWAL_KEY = "renewal.json"
"""The service's renewed time to live; missing if it was never renewed."""
ADAPTERS_KEY = "adapters.json"
"""The service's adapters (see `palate_recipes.specs.adapters`)."""
ADAPTER_COPIES = "adapters"
"""Folder with copies of those adapters that only the client's machine had, one folder per digest."""

LOST = "the runner died without writing a status: it was killed, or the machine went down"

_CAS_ATTEMPTS = 20


class Record:
    """One run's folder in a store.

    Args:
        store: The store.
        kind: `jobs`, `services` or `evaluations`.
        name: Job id, or name of a service or evaluation.
    """

    def __init__(self, store: Store, kind: Kind, name: str) -> None:
        self.store = store
        self.kind = kind
        self.name = name
        self.prefix = f"{kind}/{name}"

    @property
    def uri(self) -> str:
        return self.store.uri(self.prefix)

    @property
    def noun(self) -> str:
        """What it is, in messages."""
        return self.kind.removesuffix("s")

    def key(self, *parts: str) -> str:
        """Returns the store key of a path in the run's folder."""
        return "/".join((self.prefix, *parts))

    # ── manifest ────────────────────────────────────────────────────────────────────────────────────────────────────

    def create(self, manifest: Manifest) -> None:
        """Writes the manifest if there is none, then the first status.

        Raises:
            NameTakenError: A run with this name exists.
            ConfigurationError: The manifest could not be read after it was written.
        """
        check_manifest(manifest)
        try:
            self.store.put(self.key("manifest.json"), _encode(manifest), if_none_match=True)
        except PreconditionFailedError:
            services = self.kind == "services"
            update = f"serve another job under it (`palate update {self.name} JOB`), " if services else ""
            raise NameTakenError(
                f"{self.noun} name {self.name!r} is taken in {self.store.root}: choose another, {update}"
                f"or delete it first (`palate delete {self.name}`; `palate {self.kind}` lists what is there)"
            ) from None
        # The manifest decides who owns the name, so it is first. A client that dies before the next line leaves a run that
        # `status()` reports as Creating.
        attempts = manifest.body.max_attempts if isinstance(manifest, TrainManifest) else 1
        status = Status(state="Creating", updated_at=time.time(), last_attempt=attempts)
        self.store.put(self.key("status.json"), status.encode())

    def manifest(self) -> Manifest:
        """Returns the manifest. Raises RunNotFoundError if there is none, DamagedFilesError if it cannot be read."""
        if self.kind == "services":
            return self.serve_manifest()
        if self.kind == "evaluations":
            return self.evaluate_manifest()
        try:
            return TrainManifest.decode(self.manifest_bytes())
        except ValueError as error:
            self._raise_damaged("manifest.json", error)

    def serve_manifest(self) -> ServeManifest:
        """Returns the manifest of a service. Raises as `manifest`."""
        try:
            return ServeManifest.decode(self.manifest_bytes())
        except ValueError as error:
            self._raise_damaged("manifest.json", error)

    def evaluate_manifest(self) -> EvaluateManifest:
        """Returns the manifest of an evaluation. Raises as `manifest`."""
        try:
            return EvaluateManifest.decode(self.manifest_bytes())
        except ValueError as error:
            self._raise_damaged("manifest.json", error)

    def manifest_bytes(self) -> bytes:
        """Returns the manifest as it was written. Raises RunNotFoundError if there is none."""
        try:
            return self.store.get(self.key("manifest.json"))
        except FileNotFoundError:
            other: Kind = "services" if self.kind == "jobs" else "jobs"
            hint = f"`palate {other if self.kind == 'evaluations' else self.kind}` lists what is there"
            if self.kind != "evaluations" and Record(self.store, other, self.name).exists():
                hint = (
                    f"it is a service: `palate show {self.name}` shows which job it serves; `palate jobs` lists jobs"
                    if other == "services"
                    else f"it is a job: `palate deploy {self.name}` serves its model; `palate services` lists services"
                )
            raise RunNotFoundError(
                f"no {self.noun} {self.name!r} in {self.store.root}: {hint}; "
                "PALATE_STORE or Session(store=…) selects another store"
            ) from None

    @property
    def other_version(self) -> str:
        """The Palate version that wrote the manifest, if it is another one than this; else ""."""
        try:
            versions = parse_object(self.manifest_bytes()).get("versions")
        except (RunNotFoundError, ValueError):
            return ""
        written = versions.get("palate") if isinstance(versions, dict) else None
        return written if isinstance(written, str) and written != __version__ else ""

    def _raise_damaged(self, name: str, error: ValueError) -> NoReturn:
        if other := self.other_version:
            raise DamagedFilesError(
                f"{name} of {self.name} cannot be read by Palate {__version__} ({error}): it was written by Palate "
                f"{shown(other)}. Use that version"
            ) from None
        raise DamagedFilesError(
            f"{name} of {self.name} is damaged ({error}): restore {self.uri}/{name}, or remove the whole "
            f"{self.noun} with `palate delete {self.name}`"
        ) from None

    def replace_manifest(self, known: ServeManifest, new: ServeManifest) -> None:
        """Replaces the known manifest by another. The service's next attempt reads it.

        Raises:
            ConfigurationError: The manifest is not the known one: somebody else has replaced it.
            RunNotFoundError: There is none.
        """
        check_manifest(new)
        key = self.key("manifest.json")
        info = self.store.stat(key)  # before the read: a later write must not match
        try:
            if info is None or self.manifest() != known:
                raise PreconditionFailedError(key)
            self.store.put(key, _encode(new), if_match=info.etag)
        except PreconditionFailedError:
            raise ConfigurationError(
                f"{self.uri} was changed by somebody else at the same time: check it and try again"
            ) from None

    def exists(self) -> bool:
        return self.store.stat(self.key("manifest.json")) is not None

    # ── status ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def status(self) -> Status:
        """Returns the status. Raises RunNotFoundError if there is no such run, DamagedFilesError if the status cannot be read."""
        try:
            data = self.store.get(self.key("status.json"))
        except FileNotFoundError:
            manifest = self.manifest()  # raises if there is no such run
            return Status(state="Creating", updated_at=manifest.created_at)
        return self._parse_status(data)

    def _parse_status(self, data: bytes) -> Status:
        try:
            return Status.decode(data)
        except ValueError as error:
            self._raise_damaged("status.json", error)

    def advance(
        self, state: State, *, expect: Collection[State], attempt: int | None = None, **changes: Any
    ) -> Status | None:
        """Changes the state to `state`. Returns None, without a change, if the current state is not in `expect`.

        The write is conditional on what was read, so of two concurrent writers one wins and the other sees its result.

        Args:
            state: The new state.
            expect: States from which the change is allowed.
            attempt: The caller's attempt. If the run is at another attempt, nothing changes.
            changes: Further fields of the status.
        """
        if state in TERMINAL:
            changes.setdefault("finished_at", time.time())
        return self._rewrite(lambda current: replace(current, state=state, **changes), expect, attempt)

    def note(self, *, attempt: int | None = None, **changes: Any) -> Status | None:
        """Changes fields of the status other than the state. Returns None if the run is deleted or at another attempt."""
        return self._rewrite(lambda current: replace(current, **changes), ACTIVE | TERMINAL, attempt)

    def add_details(self, attempt: int, details: Mapping[str, Any]) -> bool:
        """Adds details to the status of a running attempt, or replaces those of the same name. Returns False if it is not running."""

        def change(current: Status) -> Status:
            return replace(current, details={**current.details, **details})

        return self._rewrite(change, {"Running"}, attempt) is not None

    def begin_again(
        self,
        *,
        expect: Collection[State],
        attempt: int,
        state: State = "Creating",
        more: int = 0,
        **ended: Any,
    ) -> Status | None:
        """Starts the run's next attempt. Returns None if somebody else did, or if the state is not in `expect`.

        Args:
            expect: States from which the change is allowed.
            attempt: The attempt that has ended.
            state: `Running` if the same runner continues.
            more: New number of remaining attempts, including this one; 0 keeps the limit.
            ended: Fields of the history entry (reason, exit_code) that the status does not have.
        """

        def change(current: Status) -> Status:
            names = ("attempt", "reason", "exit_code", "started_at", "finished_at")
            entry = Attempt(**{**{name: getattr(current, name) for name in names}, **ended})
            entry = replace(entry, finished_at=entry.finished_at or time.time())
            goes_on = state == "Running"
            return replace(
                current,
                state=state,
                attempt=current.attempt + 1,
                last_attempt=current.attempt + more if more else current.last_attempt,
                attempts=(*current.attempts, entry),
                reason="",
                log_tail=(),
                exit_code=None,
                finished_at=None,
                started_at=time.time() if goes_on else None,
                engine_id=current.engine_id if goes_on else "",
                start_id=current.start_id if goes_on else "",
            )

        return self._rewrite(change, expect, attempt)

    def _rewrite(
        self, change: Callable[[Status], Status], expect: Collection[State], attempt: int | None
    ) -> Status | None:
        written: bytes | None = None
        for _ in range(_CAS_ATTEMPTS):
            info = self.store.stat(self.key("status.json"))  # before the read: a later write must not match
            try:
                data = self.store.get(self.key("status.json"))
            except FileNotFoundError:
                return None
            current = self._parse_status(data)
            # A put whose answer got lost is retried by the client, fails on its own ETag, and looks like a lost race.
            if data == written:
                return current  # our own write, whose answer was lost
            if info is None or current.state not in expect or attempt not in (None, current.attempt):
                return None
            # `change` runs again on every try: it must see the state that the condition protects.
            target = replace(change(current), updated_at=time.time())
            written = target.encode()
            try:
                self.store.put(self.key("status.json"), written, if_match=info.etag)
            except (PreconditionFailedError, FileNotFoundError):
                continue
            return target
        raise RuntimeError(f"{self.uri}/status.json changed {_CAS_ATTEMPTS} times during attempts to write it")

    # ── lists that several clients change ───────────────────────────────────────────────────────────────────────────

    def listed(self, name: str, *, limit_bytes: int) -> bytes:
        """Returns a small object of the run, b"" if there is none, and one byte more than the limit if it is larger."""
        try:
            return self.store.get_range(self.key(name), 0, limit_bytes + 1)
        except FileNotFoundError:
            return b""

    def change_listed(
        self, name: str, change: Callable[[bytes], bytes], *, limit_bytes: int, private: bool = False
    ) -> None:
        """Replaces a small object by the changed one, on the condition that nobody wrote in between.

        Args:
            name: Name of the object.
            change: Gets what `listed` returns. It runs again on every try.
            limit_bytes: As in `listed`.
            private: As in `Store.put`.
        """
        key, written = self.key(name), b""
        for _ in range(_CAS_ATTEMPTS):
            info = self.store.stat(key)  # before the read: a later write must not match
            data = self.listed(name, limit_bytes=limit_bytes)
            # A put whose answer got lost is retried by the client, fails on its own ETag, and looks like a lost race.
            if written and data == written:
                return
            written = change(data)
            try:
                if info is None:
                    self.store.put(key, written, if_none_match=True, private=private)
                else:
                    self.store.put(key, written, if_match=info.etag, private=private)
            except (PreconditionFailedError, FileNotFoundError):
                continue
            return
        raise RuntimeError(f"{self.uri}/{name} changed {_CAS_ATTEMPTS} times during attempts to write it")

    # ── logs and metrics ────────────────────────────────────────────────────────────────────────────────────────────

    def append(self, kind: Literal["logs", "metrics"], part: int, data: bytes) -> None:
        """Writes part number `part`, counted from 1 by the run's only writer.

        Raises:
            PreconditionFailedError: The part exists with other content.
        """
        key = self.key(kind, f"{part:06d}{_SUFFIX[kind]}")
        try:
            self.store.put(key, data, if_none_match=True)
        except PreconditionFailedError:
            if self.store.get(key) != data:  # if equal, it is our own write, whose answer was lost
                raise

    def part_sizes(self, kind: Literal["logs", "metrics"]) -> dict[int, int]:
        """Returns the sizes of all parts by number."""
        numbered = {
            info.key.rpartition("/")[2].removesuffix(_SUFFIX[kind]): info for info in self.store.list(self.key(kind))
        }
        return {int(name): info.size for name, info in numbered.items() if _PART.fullmatch(name)}

    def last_part(self, kind: Literal["logs", "metrics"]) -> int:
        """Returns the number of the last part, or 0."""
        return max(self.part_sizes(kind), default=0)

    def part(self, kind: Literal["logs", "metrics"], number: int) -> bytes:
        """Returns one part. Raises ObjectNotFoundError if it does not exist."""
        return self.store.get(self.key(kind, f"{number:06d}{_SUFFIX[kind]}"))

    def delete_part(self, kind: Literal["logs", "metrics"], number: int) -> None:
        """Deletes one part, if it exists."""
        self.store.delete(self.key(kind, f"{number:06d}{_SUFFIX[kind]}"))

    def parts(self, kind: Literal["logs", "metrics"], *, after: int = 0) -> Iterator[tuple[int, bytes]]:
        """Yields (number, data) of the parts after `after` in order. A service's oldest log parts may be deleted or merged.

        Requests the next number by name instead of listing: one small read per poll on any store, two for a service's log.
        """
        number = after
        # Two rounds: parts by number. If the next one was merged or dropped, the merged parts, then the numbers after them.
        for _ in range(2):
            while True:
                try:
                    data = self.part(kind, number + 1)
                except FileNotFoundError:
                    break
                number += 1
                yield number, data
            if (self.kind, kind) != ("services", "logs"):
                return
            index = self.log_index()
            if index.following <= number + 1:
                return
            for merged in index.merged:
                if merged.last > number:
                    try:
                        data = self.store.get(self.key("logs", merged.name))
                    except FileNotFoundError:  # deleted meanwhile
                        continue
                    number = merged.last
                    yield number, data
            number = max(number, index.following - 1)

    def log_index(self) -> LogIndex:
        """Returns which parts of a service's log were merged or deleted. An invalid index counts as empty."""
        try:
            return decode(self.store.get(self.key("logs", _INDEX)), LogIndex)
        except (FileNotFoundError, ValueError):
            return LogIndex()

    def write_log_index(self, index: LogIndex) -> None:
        self.store.put(self.key("logs", _INDEX), encode(index))

    def write_merged(self, first: int, last: int, content: bytes) -> MergedLog:
        """Writes several parts of a service's log as one. The caller must add it to the index."""
        merged = MergedLog(first=first, last=last, size=len(content))
        self.store.put(self.key("logs", merged.name), content)
        return merged

    def delete_parts(self, kind: Literal["logs", "metrics"]) -> None:
        """Deletes all parts. Numbers start again from 1."""
        # Listed completely first, so that deletions do not change a listing in progress.
        for info in list(self.store.list(self.key(kind))):
            self.store.delete(info.key)

    def log_lines(self) -> Iterator[str]:
        """Yields all log lines."""
        buffer = b""
        for _, data in self.parts("logs"):
            *lines, buffer = (buffer + data).split(b"\n")
            yield from (line.decode(errors="replace") for line in lines)
            # Bounds memory: a program may write gigabytes without a line break.
            if len(buffer) > LONGEST_LINE:
                yield buffer.decode(errors="replace")
                buffer = b""
        if buffer:
            yield buffer.decode(errors="replace")

    def last_log_lines(self, count: int) -> list[str]:
        """Returns the last log lines. Reads from the end, since the log may be large."""
        content = b""
        sizes = self.part_sizes("logs")
        for number in sorted(sizes, reverse=True):
            key = self.key("logs", f"{number:06d}{_SUFFIX['logs']}")
            try:
                content = self.store.get_range(key, max(0, sizes[number] - _TAIL_BYTES)) + content
            except FileNotFoundError:  # merged meanwhile, with all earlier parts
                break
            if content.count(b"\n") > count or len(content) >= _TAIL_BYTES:
                break
        return content[-_TAIL_BYTES:].decode(errors="replace").splitlines()[-count:]

    def metrics(self) -> Iterator[dict[str, Any]]:
        """Yields all metrics events in order."""
        for _, data in self.parts("metrics"):
            yield from events_in(data)

    def delete(self) -> None:
        """Deletes everything, the manifest last: until then the run can be found and deleted again."""
        for info in list(self.store.list(self.prefix + "/")):
            if info.key != self.key("manifest.json"):
                self.store.delete(info.key)
        self.store.delete_tree(self.prefix + "/")


def events_in(part: bytes) -> Iterator[dict[str, Any]]:
    """Yields the events of a metrics part. Skips lines that are truncated or not events."""
    for line in part.splitlines():
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if is_event(event):
            yield event


def events_once(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the events of all attempts as one run. Of steps that a later attempt repeated, only the later events are kept.

    Every `start` event is kept: it has the step at which an attempt resumed. Events are ordered by attempt, not by part: a
    runner that counted as lost during a store outage uploads its last events after the first ones of the next attempt.
    """
    attempts: dict[int, list[dict[str, Any]]] = {}
    unnumbered = 0
    for event in events:
        if "attempt" not in event:  # the first attempt, or an earlier version, which did not number them
            unnumbered += event["kind"] == "start"
        attempts.setdefault(event.get("attempt", max(1, unnumbered)), []).append(event)
    kept: list[dict[str, Any]] = []
    evaluated = set[int]()
    for _, own in sorted(attempts.items()):
        for event in own:
            if event["kind"] == "start":  # a second one in an attempt: its fast path failed in the first step
                kept = [
                    earlier
                    for earlier in kept
                    if earlier["kind"] == "start" or (earlier["kind"] != "end" and earlier["step"] <= event["step"])
                ]
            elif event["kind"] == "eval":
                # A resumed run repeats the evaluation that its checkpoint was written without.
                if event["step"] in evaluated:
                    kept = [one for one in kept if (one["kind"], one["step"]) != ("eval", event["step"])]
                evaluated.add(event["step"])
            kept.append(event)
    return kept


_SUFFIX = {"logs": ".log", "metrics": ".jsonl"}
_INDEX = "index.json"
_PART = re.compile(r"[0-9]{6,18}")
LONGEST_LINE = 1024**2
_TAIL_BYTES = 256 * 1024
"""`last_log_lines` reads this many bytes from the end."""


def versions() -> dict[str, str]:
    """Returns Palate's version and Python's, for a manifest."""
    return {"palate": __version__, "python": platform.python_version()}


def check_manifest(manifest: Manifest) -> None:
    """Raises ConfigurationError if a manifest could not be read after it was written."""
    try:
        type(manifest).decode(_encode(manifest))
    except ValueError as error:
        raise ConfigurationError(f"the settings of {manifest.name} cannot be recorded: {error}") from None


def _encode(manifest: Manifest) -> bytes:
    try:
        return manifest.encode()
    except UnicodeEncodeError as error:
        raise ConfigurationError(
            f"the settings of {manifest.name} contain {error.object[error.start : error.end]!r}, which is not valid Unicode: "
            "give labels and settings as UTF-8 text"
        ) from None


def names(store: Store, kind: Kind) -> list[str]:
    """Returns the names of all runs of a kind in a store."""
    return [name for name in store.list_children(f"{kind}/") if store.stat(f"{kind}/{name}/manifest.json")]


def locate(uri: str) -> tuple[str, Kind, str]:
    """Splits a run's URI into store root, kind and name. Raises ConfigurationError if the URI or the name is invalid."""
    root, _, name = uri.rstrip("/").rpartition("/")
    root, _, kind = root.rpartition("/")
    for known in KINDS:
        if kind == known and name:
            return root, known, check_name("the name in the URI of a run", name)
    raise ConfigurationError(
        f"{uri!r} is not the URI of a run: expected <store>/jobs/<id>, <store>/services/<name> or <store>/evaluations/<name>"
    )
