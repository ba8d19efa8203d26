"""The four verbs over real processes. The same suite is meant for every backend that runs a command."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from palate import Session
from palate.backends import get_backend
from palate.backends.process import ProcessBackend
from palate.errors import ConfigurationError
from palate.processes import start_time
from palate.runs.handle import RunHandle
from palate.runs.lease import LEASE_KEY, lease_here
from palate.runs.record import Record
from palate_recipes.specs.codec import encode
from tests.support.manifests import train_manifest

TIMEOUT_S = 20.0


@pytest.fixture
def backend(home: Path) -> ProcessBackend:
    found = get_backend("process")
    assert isinstance(found, ProcessBackend)
    return found


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)


def python(code: str) -> list[str]:
    return [sys.executable, "-u", "-c", code]


def test_a_command_runs_with_its_environment_and_is_logged(backend: ProcessBackend) -> None:
    code = "import os; print('says', os.environ['WORD'])"
    engine_id = backend.start_command(python(code), run_name="one", env={"WORD": "hello"})
    until(lambda: backend.status(engine_id).state == "gone")
    assert backend.logs(engine_id) == "says hello\n"


def test_a_run_outlives_the_process_that_started_it(backend: ProcessBackend, tmp_path: Path) -> None:
    code = (
        "from palate.backends import get_backend; import sys; "
        "print(get_backend('process').start_command([sys.executable, '-c', 'import time; time.sleep(60)'], run_name='a', env={}))"
    )
    engine_id = subprocess.run(python(code), capture_output=True, text=True, check=True).stdout.strip()
    assert backend.status(engine_id).state == "running"
    backend.stop(engine_id, grace_s=5)
    assert backend.status(engine_id).state == "gone"


def test_stop_ends_the_whole_tree_even_when_it_does_not_want_to(backend: ProcessBackend, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    code = (
        "import os, signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        f"open({str(pids)!r} + '.draft', 'w').write(f'{{os.getpid()}} {{child.pid}}')\n"
        f"os.rename({str(pids)!r} + '.draft', {str(pids)!r})\n"
        "time.sleep(60)\n"
    )
    engine_id = backend.start_command(python(code), run_name="stubborn", env={})
    until(pids.exists)
    backend.stop(engine_id, grace_s=0.3)
    assert backend.status(engine_id).state == "gone"
    for pid in pids.read_text().split():
        assert not psutil.pid_exists(int(pid)) or psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE
    backend.stop(engine_id, grace_s=0.3)  # twice is no error


def test_a_recycled_pid_is_not_mistaken_for_the_run(backend: ProcessBackend) -> None:
    engine_id = backend.start_command(python("import time; time.sleep(60)"), run_name="b", env={})
    host, pid, started, name = engine_id.split(":", 3)
    assert backend.status(f"{host}:{pid}:{int(started) + 1}:{name}").state == "gone"
    assert backend.status(f"elsewhere:{pid}:{started}:{name}").state == "unknown"
    backend.stop(engine_id, grace_s=1)


def test_a_run_that_ended_long_ago_takes_nobody_along(backend: ProcessBackend) -> None:
    """Its pid may be the session of another program by now, the leader of which may have gone as well."""
    stranger = subprocess.Popen(python("import time; time.sleep(60)"), start_new_session=True)
    try:
        engine_id = backend.start_command(python(""), run_name="old", env={})
        host, _, _, name = engine_id.split(":", 3)
        backend.stop(f"{host}:{stranger.pid}:1:{name}", grace_s=0.1)
        assert stranger.poll() is None
        backend.stop(engine_id, grace_s=5)
    finally:
        stranger.kill()
        stranger.wait()


BAD_IDS = [
    "", "x", "h:1", "h:1:1", "h:1:1:", "h:-1:1:jobs-one", "h:0:1:jobs-one", "h:1:1:../../etc/jobs", "h:1:1:/etc/passwd",
    "h:x:1:jobs-one", "h@0:1:1:jobs-one", "h:1:1:jobs-one\n", 5, ["h"], {"h": 1},
]  # fmt: skip


def test_an_engine_id_that_says_nothing_sensible_is_unknown(backend: ProcessBackend) -> None:
    for engine_id in BAD_IDS:
        assert backend.status(engine_id).state == "unknown"  # type: ignore[arg-type]
        assert backend.logs(engine_id) == ""  # type: ignore[arg-type]
        backend.stop(engine_id, grace_s=0)  # type: ignore[arg-type]


def test_a_crafted_engine_id_reaches_no_process_and_no_file_of_others(session: Session, home: Path) -> None:
    """Who may write to a store must not end, or read, what else runs or lies on the machine of one who looks."""
    backend = ProcessBackend()
    sleeps = [sys.executable, "-c", "import time; time.sleep(300)"]
    mine = Record(session.store, "jobs", "mine")
    mine.create(train_manifest("mine"))
    (home / "notes.log").write_text("of nobody's concern")
    stranger = subprocess.Popen(sleeps, start_new_session=True)
    others = {
        name: backend.start_command(sleeps, run_name=name, env={"PALATE_RUN_URI": uri})
        for name, uri in (("jobs-other", session.store.uri("jobs/other")), ("jobs-mine", "file:///elsewhere/jobs/mine"))
    }
    try:
        host = others["jobs-mine"].partition(":")[0]
        crafted = [
            f"{host}:{stranger.pid}:{start_time(stranger.pid)}:jobs-mine",
            others["jobs-other"],
            others["jobs-other"].replace("jobs-other", "jobs-mine"),
            others["jobs-mine"],
            f"{host}:{stranger.pid}:1:../notes",
            f"{socket.gethostname()}:{stranger.pid}:1:../notes",
        ]
        handle = RunHandle(mine, session)
        for engine_id in crafted:
            mine.advance("Running", expect={"Creating", "Stopped"}, engine_id=engine_id, start_id="s")
            lease = lease_here(holder="h", start_id="s", attempt=1, machine="far", every_s=0.001, lost_after_s=1.0)
            mine.store.put(mine.key(LEASE_KEY), encode(lease))
            assert handle.stop(grace_s=0.1).is_terminal
            assert "concern" not in "".join(mine.status().log_tail)
            mine.begin_again(expect={"Stopped", "Failed"}, attempt=mine.status().attempt)
        assert stranger.poll() is None
        assert [backend.status(engine_id).state for engine_id in others.values()] == ["running", "running"]
    finally:
        stranger.kill()
        stranger.wait()
        for engine_id in others.values():
            backend.stop(engine_id, grace_s=0)


def test_an_unknown_backend_names_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match=r"'proces'.*'process'"):
        get_backend("proces")
