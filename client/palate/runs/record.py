"""A run's prefix in a store: manifest, status, logs, metrics. Owns every key below it; knows no backend and no program.

    jobs/<id>/      manifest.json  status.json  lease.json  logs/000001.log  metrics/000001.jsonl
                    inputs/  checkpoints/  model/  tensorboard/
    services/<name>/manifest.json  status.json  lease.json  logs/000001.log  access_token

`manifest.json` is written once and says all that a run needs. `status.json` is written conditionally, so that of two
writers (a stop and a finish) one wins, and a terminal state is written last: all that it names is in place by then.
`lease.json` is its runner's (see `palate.runs.lease`). The folder `palate/schemas` has the JSON schema of each.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, Literal, NoReturn

from msgspec.structs import replace

from palate.common.utils import check_name
from palate.store import Store
from palate_recipes.errors import (
    ConfigurationError,
    DamagedFilesError,
    NameTakenError,
    PreconditionFailedError,
    RunNotFoundError,
)
from palate_recipes.specs.codec import decode, encode
from palate_recipes.specs.events import is_event
from palate_recipes.specs.run import (
    ACTIVE,
    TERMINAL,
    Attempt,
    LogIndex,
    Manifest,
    MergedLog,
    ServeManifest,
    State,
    Status,
    TrainManifest,
)

TOKEN_KEY = "access_token"
"""A service's bearer token: a key of its own, so that no manifest, status or log ever holds it."""

LOST = "the runner died without writing a status: it was killed, or the machine went down"

_CAS_ATTEMPTS = 20


class Record:
    """One run's prefix in a store.

    Args:
        store: Where it lives.
        kind: `jobs` or `services`.
        name: Job id or service name.
    """

    def __init__(self, store: Store, kind: Literal["jobs", "services"], name: str) -> None:
        self.store = store
        self.kind = kind
        self.name = name
        self.prefix = f"{kind}/{name}"

    @property
    def uri(self) -> str:
        return self.store.uri(self.prefix)

    def key(self, *parts: str) -> str:
        """Returns the store key of something below this record."""
        return "/".join((self.prefix, *parts))

    # ── manifest ────────────────────────────────────────────────────────────────────────────────────────────────────

    def create(self, manifest: Manifest) -> None:
        """Writes the manifest where none is, then the first status.

        Raises:
            NameTakenError: A run of that name is there.
        """
        try:
            self.store.put(self.key("manifest.json"), _encode(manifest), if_none_match=True)
        except PreconditionFailedError:
            noun = "job" if self.kind == "jobs" else "service"
            command = "palate jobs" if self.kind == "jobs" else "palate services"
            raise NameTakenError(
                f"{noun} name {self.name!r} is taken in {self.store.root}: choose another, "
                f"or delete it first (`palate delete {self.name}`; `{command}` lists what is there)"
            ) from None
        # The manifest decides who owns the name, so it is first. A client that dies before the next line leaves a run that
        # `status()` reports as Creating.
        attempts = manifest.body.max_attempts if isinstance(manifest, TrainManifest) else 1
        status = Status(state="Creating", updated_at=time.time(), last_attempt=attempts)
        self.store.put(self.key("status.json"), status.encode())

    def manifest(self) -> Manifest:
        """Raises RunNotFoundError when there is none, DamagedFilesError when it cannot be read."""
        if self.kind == "services":
            return self.serve_manifest()
        try:
            return TrainManifest.decode(self.manifest_bytes())
        except ValueError as error:
            self._raise_damaged("manifest.json", error)

    def serve_manifest(self) -> ServeManifest:
        """As `manifest`, of a service."""
        try:
            return ServeManifest.decode(self.manifest_bytes())
        except ValueError as error:
            self._raise_damaged("manifest.json", error)

    def manifest_bytes(self) -> bytes:
        """Returns the manifest as it was written; raises RunNotFoundError when there is none."""
        try:
            return self.store.get(self.key("manifest.json"))
        except FileNotFoundError:
            noun = "job" if self.kind == "jobs" else "service"
            raise RunNotFoundError(
                f"no {noun} {self.name!r} in {self.store.root}: `palate {self.kind}` lists what is there; "
                "another store is chosen with PALATE_STORE or Session(store=…)"
            ) from None

    def _raise_damaged(self, name: str, error: ValueError) -> NoReturn:
        raise DamagedFilesError(
            f"{name} of {self.name} is damaged ({error}): restore {self.uri}/{name}, or remove the whole "
            f"{'job' if self.kind == 'jobs' else 'service'} with `palate delete {self.name}`"
        ) from None

    def replace_manifest(self, known: ServeManifest, new: ServeManifest) -> None:
        """Writes another manifest in the place of the known one; the service's next attempt reads it.

        Raises:
            ConfigurationError: Another one is there: somebody else replaced it.
            RunNotFoundError: None is there.
        """
        key = self.key("manifest.json")
        info = self.store.stat(key)  # before the read: a later write must not match
        try:
            if info is None or self.manifest() != known:
                raise PreconditionFailedError(key)
            self.store.put(key, _encode(new), if_match=info.etag)
        except PreconditionFailedError:
            raise ConfigurationError(
                f"{self.uri} was changed by somebody else just now: look at it, and try again"
            ) from None

    def exists(self) -> bool:
        return self.store.stat(self.key("manifest.json")) is not None

    # ── status ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def status(self) -> Status:
        """Raises RunNotFoundError when there is no such run, DamagedFilesError when its status cannot be read."""
        try:
            data = self.store.get(self.key("status.json"))
        except FileNotFoundError:
            manifest = self.manifest()  # raises when the run itself is unknown
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
        """Moves the run to `state`, or leaves it and returns None when its state is not one of `expect`.

        The write is conditional on what was read, so of two that race one wins and the other sees its result.

        Args:
            state: The new state.
            expect: States that it may leave.
            attempt: The attempt that the caller speaks for; a run that has gone on to another is left.
            changes: Further fields of the status.
        """
        if state in TERMINAL:
            changes.setdefault("finished_at", time.time())
        return self._rewrite(lambda current: replace(current, state=state, **changes), expect, attempt)

    def note(self, *, attempt: int | None = None, **changes: Any) -> Status | None:
        """Adds facts to the status and leaves its state; returns None when the run is gone, or on to another attempt."""
        return self._rewrite(lambda current: replace(current, **changes), ACTIVE | TERMINAL, attempt)

    def begin_again(
        self,
        *,
        expect: Collection[State],
        attempt: int,
        state: State = "Creating",
        more: int = 0,
        **ended: Any,
    ) -> Status | None:
        """Moves the run to its next attempt, or returns None when somebody else did, or it is in another state.

        Args:
            expect: States that it may leave.
            attempt: The attempt that is over.
            state: `Running` when the same runner goes on.
            more: Attempts that it is given anew, this one included; 0 leaves the limit.
            ended: What the history says of the attempt that is over (reason, exit_code), when the status does not.
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
                return current  # our own write, whose answer got lost
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
        raise RuntimeError(f"{self.uri}/status.json changed {_CAS_ATTEMPTS} times while it was to be written")

    # ── logs and metrics ────────────────────────────────────────────────────────────────────────────────────────────

    def append(self, kind: Literal["logs", "metrics"], part: int, data: bytes) -> None:
        """Writes part number `part`, beginning with 1; the one writer of a run counts.

        Raises:
            PreconditionFailedError: That part is there, and says something else.
        """
        key = self.key(kind, f"{part:06d}{_SUFFIX[kind]}")
        try:
            self.store.put(key, data, if_none_match=True)
        except PreconditionFailedError:
            if self.store.get(key) != data:  # else it is our own, whose answer got lost
                raise

    def part_sizes(self, kind: Literal["logs", "metrics"]) -> dict[int, int]:
        """Returns the sizes of the parts that are there, by number."""
        numbered = {
            info.key.rpartition("/")[2].removesuffix(_SUFFIX[kind]): info for info in self.store.list(self.key(kind))
        }
        return {int(name): info.size for name, info in numbered.items() if _PART.fullmatch(name)}

    def last_part(self, kind: Literal["logs", "metrics"]) -> int:
        """Returns the number of the last part, 0 when there is none."""
        return max(self.part_sizes(kind), default=0)

    def part(self, kind: Literal["logs", "metrics"], number: int) -> bytes:
        """Returns one part; raises ObjectNotFoundError when it is not there."""
        return self.store.get(self.key(kind, f"{number:06d}{_SUFFIX[kind]}"))

    def delete_part(self, kind: Literal["logs", "metrics"], number: int) -> None:
        """Removes one part; no error where none is."""
        self.store.delete(self.key(kind, f"{number:06d}{_SUFFIX[kind]}"))

    def parts(self, kind: Literal["logs", "metrics"], *, after: int = 0) -> Iterator[tuple[int, bytes]]:
        """Yields (number, data) of the parts after number `after`, in order; the oldest of a service's log may be gone or merged.

        Asks for the next number by name instead of listing: one small read a poll, on any store, two for a service's log.
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
                    except FileNotFoundError:  # dropped just now
                        continue
                    number = merged.last
                    yield number, data
            number = max(number, index.following - 1)

    def log_index(self) -> LogIndex:
        """Returns what of a service's log was merged or dropped; an index that is none counts as empty."""
        try:
            return decode(self.store.get(self.key("logs", _INDEX)), LogIndex)
        except (FileNotFoundError, ValueError):
            return LogIndex()

    def write_log_index(self, index: LogIndex) -> None:
        self.store.put(self.key("logs", _INDEX), encode(index))

    def write_merged(self, first: int, last: int, content: bytes) -> MergedLog:
        """Writes the content of several parts of a service's log as one; the index has to name it."""
        merged = MergedLog(first=first, last=last, size=len(content))
        self.store.put(self.key("logs", merged.name), content)
        return merged

    def delete_parts(self, kind: Literal["logs", "metrics"]) -> None:
        """Removes every part; a later one counts on from 1."""
        # Listed completely first, so that deletions do not change a listing in progress.
        for info in list(self.store.list(self.key(kind))):
            self.store.delete(info.key)

    def log_lines(self) -> Iterator[str]:
        """Yields the whole log, line by line."""
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
        """Returns the log's last lines, read from its end: the whole of it may be large."""
        content = b""
        sizes = self.part_sizes("logs")
        for number in sorted(sizes, reverse=True):
            key = self.key("logs", f"{number:06d}{_SUFFIX['logs']}")
            try:
                content = self.store.get_range(key, max(0, sizes[number] - _TAIL_BYTES)) + content
            except FileNotFoundError:  # merged meanwhile, with all before it
                break
            if content.count(b"\n") > count or len(content) >= _TAIL_BYTES:
                break
        return content[-_TAIL_BYTES:].decode(errors="replace").splitlines()[-count:]

    def metrics(self) -> Iterator[dict[str, Any]]:
        """Yields every metrics object in order."""
        for _, data in self.parts("metrics"):
            yield from events_in(data)

    def delete(self) -> None:
        """Removes everything, the manifest last: until then the run can still be found and deleted again."""
        for info in list(self.store.list(self.prefix + "/")):
            if info.key != self.key("manifest.json"):
                self.store.delete(info.key)
        self.store.delete_tree(self.prefix + "/")


def events_in(part: bytes) -> Iterator[dict[str, Any]]:
    """Yields the events of a metrics part; a line that was cut short, or is no event of a training, is left out."""
    for line in part.splitlines():
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if is_event(event):
            yield event


def events_once(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns metrics events as of one run: what a later attempt did again is there once, as it did it.

    Every `start` stays: it says at which step an attempt went on. The order of attempts counts, not that of the parts: a runner
    that was given up for lost while its store was away pushes its last events after the first ones of the next attempt.
    """
    attempts: dict[int, list[dict[str, Any]]] = {}
    unnumbered = 0
    for event in events:
        if "attempt" not in event:  # the first attempt, or any of a version that did not number them
            unnumbered += event["kind"] == "start"
        attempts.setdefault(event.get("attempt", max(1, unnumbered)), []).append(event)
    kept: list[dict[str, Any]] = []
    for _, own in sorted(attempts.items()):
        step = next((event["step"] for event in own if event["kind"] == "start"), None)
        if step is not None:
            kept = [
                earlier
                for earlier in kept
                if earlier["kind"] == "start" or (earlier["kind"] != "end" and earlier["step"] <= step)
            ]
        kept += own
    return kept


_SUFFIX = {"logs": ".log", "metrics": ".jsonl"}
_INDEX = "index.json"
_PART = re.compile(r"[0-9]{6,18}")
LONGEST_LINE = 1024**2
_TAIL_BYTES = 256 * 1024
"""The last lines of a log are looked for in so many bytes of its end."""


def _encode(manifest: Manifest) -> bytes:
    try:
        return manifest.encode()
    except UnicodeEncodeError as error:
        raise ConfigurationError(
            f"what {manifest.name} is given holds {error.object[error.start : error.end]!r}, which is not valid Unicode: "
            "give labels and settings as UTF-8 text"
        ) from None


def names(store: Store, kind: Literal["jobs", "services"]) -> list[str]:
    """Returns the names of all runs of a kind in a store."""
    return [name for name in store.list_children(f"{kind}/") if store.stat(f"{kind}/{name}/manifest.json")]


def locate(uri: str) -> tuple[str, Literal["jobs", "services"], str]:
    """Splits a run's URI into store root, kind and name; raises ConfigurationError when it is none, or no run can have the name."""
    root, _, name = uri.rstrip("/").rpartition("/")
    root, _, kind = root.rpartition("/")
    if kind == "jobs" and name:
        return root, "jobs", check_name("the name in the URI of a run", name)
    if kind == "services" and name:
        return root, "services", check_name("the name in the URI of a run", name)
    raise ConfigurationError(f"{uri!r} is not the URI of a run: expected <store>/jobs/<id> or <store>/services/<name>")
