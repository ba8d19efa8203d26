"""`palate services --live` on a terminal: what it shows, at which width, and how it ends. The gateway is real; there is no engine."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from palate.runs.record import TOKEN_KEY, Record
from palate.store import open_store
from tests.support.fronted import FrontedService, fronted_service
from tests.support.manifests import serve_manifest

TOKEN = "a-token-for-tests"
HOUR_S = 3600.0


@pytest.fixture
def record(home: Path) -> Record:
    """The running service `svc` of the home's store; two others are stopped and have been lost."""
    store = open_store(f"file://{home}/store")
    for name, state in (("old", "Stopped"), ("broken", "Failed")):
        other = Record(store, "services", name)
        other.create(serve_manifest(name, model="qwen2-0.5b-instruct"))
        other.advance(state, expect={"Creating"})  # type: ignore[arg-type]
    record = Record(store, "services", "svc")
    record.create(serve_manifest(model="smollm2-135m-instruct", idle_time_to_live_s=12 * HOUR_S))
    store.put(record.key(TOKEN_KEY), TOKEN.encode(), private=True)
    return record


@pytest.fixture
def service(record: Record) -> Iterator[FrontedService]:
    with fronted_service(TOKEN) as started:
        begun = time.time() - 2.5 * HOUR_S
        record.advance(
            "Running",
            expect={"Creating"},
            endpoint=started.endpoint,
            engine_id="elsewhere:1:2:x",
            started_at=begun,
            details={"ends_at": time.time() + 5.5 * HOUR_S},
        )
        yield started


class Screen:
    """A terminal of a width, on which the command runs."""

    def __init__(self, home: Path, width: int, *arguments: str) -> None:
        self.leader, follower = pty.openpty()
        fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
        self.settings = termios.tcgetattr(follower)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "palate.cli", "services", "--live", "--interval", "0.1", *arguments],
            stdin=follower,
            stdout=follower,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, "PALATE_HOME": str(home), "TERM": "xterm"},
        )
        self._follower = follower
        self.raw = b""

    def tables(self) -> list[list[str]]:
        """The lines of each table that was drawn to its end."""
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.raw.decode(errors="replace")).replace("\r", "")
        drawn = [part.split("\n") for part in re.split(r"(?=service +state)", text)[1:]]
        return [[line.rstrip() for line in table if line.strip()] for table in drawn][:-1]

    def until(self, shown: Callable[[list[str]], bool]) -> list[str]:
        """Reads until a table is as wanted, and returns it."""
        deadline = time.monotonic() + 30
        while True:
            if select.select([self.leader], [], [], 0.1)[0]:
                self.raw += os.read(self.leader, 65536)
            assert self.process.poll() is None, self.process.stderr and self.process.stderr.read()
            for table in self.tables()[-2:]:
                if shown(table):
                    return table
            assert time.monotonic() < deadline, self.tables()[-1:]

    def rest(self) -> None:
        """Reads to the end of the command."""
        os.close(self._follower)
        with open(self.leader, "rb", buffering=0) as screen:
            try:
                while data := screen.read(65536):
                    self.raw += data
            except OSError:
                pass  # Linux's end of a terminal


@contextmanager
def screen(home: Path, width: int, *arguments: str) -> Iterator[Screen]:
    """Runs the command; at the end of the block it gets Ctrl-C, and must leave the terminal as it was."""
    found = Screen(home, width, *arguments)
    try:
        yield found
        found.process.send_signal(2)
        restored = found.settings == termios.tcgetattr(found._follower)
        found.rest()
        assert found.process.wait(timeout=30) == 0
        assert found.process.stderr is not None
        assert found.process.stderr.read() == b""
        assert restored
        assert b"\x1b[?25h" in found.raw[-200:], "the cursor is back"
    finally:
        found.process.kill()
        found.process.wait()
        if found.process.stderr:
            found.process.stderr.close()


def cells(table: list[str], name: str) -> list[str]:
    (line,) = [line for line in table if line.startswith(f"{name} ")]
    return re.split(r" {2,}", line)


def test_it_shows_what_each_service_does_and_follows_changes(
    home: Path, record: Record, service: FrontedService
) -> None:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with screen(home, 120) as shown:
        table = shown.until(lambda table: len(table) == 4 and cells(table, "svc")[-2:] == ["0.0", "0.0"])
        titles = re.split(r" {2,}", table[0])
        assert titles == ["service", "state", "model", "uptime", "ends in", "requests/min", "tokens/s"]
        assert cells(table, "svc") == ["svc", "Running", "smollm2-135m-instruct", "2 h", "5 h", "0.0", "0.0"]
        assert cells(table, "old") == ["old", "Stopped", "qwen2-0.5b-instruct", "-", "-", "-", "-"]
        assert cells(table, "broken")[1] == "Failed"
        for _ in range(3):
            assert httpx.post(f"{service.endpoint}/v1/completions", headers=headers, json={}).status_code == 200
        shown.until(lambda table: float(cells(table, "svc")[-2].replace("-", "0")) > 0)

        # Without a time to live, the end depends on its use.
        record.add_details(1, {"ends_at": None})
        shown.until(lambda table: cells(table, "svc")[4] == "12 h idle")
        service.process.kill()
        shown.until(lambda table: cells(table, "svc")[1:2] + cells(table, "svc")[-2:] == ["Running", "-", "-"])
        record.advance("Stopped", expect={"Running"}, endpoint="")
        shown.until(lambda table: cells(table, "svc")[1] == "Stopped")


def test_a_narrow_terminal_shows_fewer_columns_and_breaks_no_line(
    home: Path, record: Record, service: FrontedService
) -> None:
    with screen(home, 40) as shown:
        table = shown.until(lambda table: len(table) == 4)
        assert re.split(r" {2,}", table[0]) == ["service", "state", "ends in", "requests/min"]
        assert cells(table, "svc")[:3] == ["svc", "Running", "5 h"]
    Record(record.store, "services", "a-service-with-a-long-name").create(serve_manifest("a-service-with-a-long-name"))
    with screen(home, 20) as shown:
        table = shown.until(lambda table: len(table) == 5)
        assert max(map(len, table)) == 20
        assert re.search(r"^a-service…  Creating$", "\n".join(table), re.MULTILINE), table


def test_a_filter_and_an_empty_table(home: Path, record: Record) -> None:
    with screen(home, 100, "--status", "stopped") as shown:
        table = shown.until(lambda table: len(table) == 2)
        assert cells(table, "old")[1] == "Stopped"
    with screen(home, 100, "--name", "absent") as shown:
        assert shown.until(lambda table: len(table) == 2)[1] == "no services"


def test_a_service_that_cannot_be_read_is_named(home: Path, record: Record) -> None:
    record.store.put(record.key("status.json"), b"{")
    with screen(home, 100) as shown:
        table = shown.until(lambda table: len(table) == 5)
        assert cells(table, "svc")[1] == "?"
        assert table[-1].startswith("1 could not be read (the rows with a ?): status.json of svc is damaged")
        record.store.delete(record.key("status.json"))
        assert cells(shown.until(lambda table: len(table) == 4), "svc")[1] == "Creating"


@pytest.mark.parametrize("arguments", [(), ("--json",)])
def test_without_a_terminal_it_is_refused(home: Path, record: Record, arguments: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "palate.cli", "services", "--live", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PALATE_HOME": str(home)},
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: --live needs a terminal: omit it for one table")
