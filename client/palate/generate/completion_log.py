"""The ledger: an append-only file with one line per finished call. Knows keys and replies, no endpoint.

A line is written as soon as its call is finished, so a crash of the process loses only the calls in flight. It is synced to
disk within a second, so a crash of the machine loses little more. A torn last line is truncated when the file is opened
again. Only one process can write at a time.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from palate_recipes.errors import ConfigurationError, DataError

_HEADER = {"palate_ledger": 1}
_SYNC_S = 1.0


class Reply(NamedTuple):
    """The response to a finished call."""

    text: str
    finish: str
    """Finish reason: `stop`, `length` (cut at the token limit), `content_filter` and so on; empty if not reported."""
    prompt_tokens: int | None
    completion_tokens: int | None
    """None if the endpoint reports no usage."""


class CompletionLog:
    """Finished calls by key; a context manager that closes the file.

    Args:
        path: The file; created if missing, with its folder.
        read_only: Only look up calls: takes no lock, writes nothing, and the file may be missing.
        writer: What another process must be that writes the file, for the message; default: the file is named.

    Attributes:
        answered: The (model, temperature) pairs of its calls.

    Raises:
        ConfigurationError: Another process is writing the file, or it cannot be opened.
        DataError: The file is damaged before its last line, or is not a ledger.
    """

    def __init__(self, path: Path, *, read_only: bool = False, writer: str = "") -> None:
        self.path = path
        self._places: dict[str, tuple[int, int]] = {}  # key: (offset, bytes) of its line
        self.answered: set[tuple[str, float]] = set()
        self._end = 0
        self._synced_at = time.monotonic()
        self._writes = not read_only
        self._held: dict[str, tuple[Reply, str, float]] | None = None
        self._fd = -1
        if read_only and not path.exists():
            return
        if self._writes:
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # Prompts and answers may be confidential, and `PALATE_HOME` may be readable by others.
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT if self._writes else os.O_RDONLY, 0o600)
        except OSError as error:
            raise ConfigurationError(f"{path} cannot be opened: {error.strerror}. Use another output") from None
        try:
            if not self._writes:
                self._load()
                return
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigurationError(
                    f"{writer} runs: wait until it ends"
                    if writer
                    else f"{path} is being written by another process: wait until it ends, or use another output"
                ) from None
            self._load()
            os.ftruncate(self._fd, self._end)
            if self._end == 0:
                self._append(json.dumps(_HEADER).encode() + b"\n")
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: str) -> bool:
        return key in self._places or key in (self._held or {})

    def get(self, key: str) -> Reply | None:
        """Returns the response to a call; None if the call is not finished."""
        if self._held and key in self._held:
            return self._held[key][0]
        place = self._places.get(key)
        if place is None:
            return None
        entry = json.loads(os.pread(self._fd, place[1], place[0]))
        return Reply(entry["text"], entry["finish"], entry["prompt_tokens"], entry["completion_tokens"])

    def add(self, key: str, reply: Reply, *, model: str, temperature: float) -> None:
        """Records a finished call. Model and temperature are only for `answered`: calls are found by key.

        Raises:
            DataError: The file cannot be written; its earlier lines stay intact.
        """
        if self._held is not None:
            self._held[key] = (reply, model, temperature)
            self.answered.add((model, temperature))
            return
        line = json.dumps({"key": key, "model": model, "temperature": temperature, **reply._asdict()}).encode() + b"\n"
        start = self._end
        self._append(line)
        self._places[key] = (start, len(line))
        self.answered.add((model, temperature))
        if time.monotonic() - self._synced_at > _SYNC_S:
            self._sync()

    def hold(self) -> None:
        """Keeps further calls in memory until `release`, because it is not known yet whether they count. `close` drops them."""
        self._held = {}

    def release(self, *, keep: bool) -> int:
        """Ends `hold`: records the calls since then, or drops them. Returns how many there were. Raises as `add`."""
        held, self._held = self._held or {}, None
        if keep:
            for key, (reply, model, temperature) in held.items():
                self.add(key, reply, model=model, temperature=temperature)
        return len(held)

    def close(self) -> None:
        """Syncs the file and releases the lock. Idempotent."""
        if self._fd >= 0:
            if self._writes and self._end:
                self._sync()
            os.close(self._fd)
            self._fd = -1

    def _sync(self) -> None:
        os.fsync(self._fd)
        self._synced_at = time.monotonic()

    def _append(self, line: bytes) -> None:
        written = 0
        try:
            while written < len(line):
                written += os.pwrite(self._fd, line[written:], self._end + written)
        except OSError as error:
            os.ftruncate(self._fd, self._end)
            raise DataError(
                f"{self.path} cannot be written: {error.strerror}. Free space and repeat the call: "
                f"its {len(self)} finished calls are kept"
            ) from None
        self._end += len(line)

    def _load(self) -> None:
        with os.fdopen(os.dup(self._fd), "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    return  # torn: the call counts as not finished
                try:
                    entry = json.loads(line)
                    if number == 1:
                        known = entry == _HEADER
                    else:
                        self._places[entry["key"]] = (self._end, len(line))
                        self.answered.add((entry["model"], entry["temperature"]))
                        known = True
                except (ValueError, KeyError, TypeError):
                    known = False
                if not known:
                    raise DataError(
                        f"{self.path}, line {number} is not a valid ledger line: "
                        "move the file away to start again, or use another output"
                    )
                self._end += len(line)

    def __enter__(self) -> CompletionLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
