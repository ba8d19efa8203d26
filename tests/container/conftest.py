"""A real engine and images really built; skipped, loudly, where there is no engine."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.engine import FOLDER_VARIABLE, Engine, build_options, find_engine, need_base, running_engine
from tests.support.podman import running_podman

NO_ENGINE = f"no container engine here: start docker and set DOCKER_HOST, or as root {FOLDER_VARIABLE}=/folder for one of its own"


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """The engine that is there, or one in the folder that PALATE_TEST_ENGINE names, for as long as the tests take."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if find_engine() is None and not folder:
        pytest.skip(NO_ENGINE)
    with running_engine(Path(folder or "/nowhere")) as found:
        yield found


@pytest.fixture(scope="session")
def podman(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A podman with the base image; its images stay for the next tests where PALATE_TEST_ENGINE names a folder."""
    if shutil.which("podman") is None:
        pytest.skip("no podman here: apt-get install podman runc uidmap")
    kept = os.environ.get(FOLDER_VARIABLE)
    # Ending one would end the other's containers: every process of a test run has its own.
    name = f"podman-{os.environ.get('PYTEST_XDIST_WORKER', 'alone')}"
    folder = Path(kept, name) if kept else tmp_path_factory.mktemp("podman")
    with running_podman(folder, remove=not kept) as found:
        need_base(found)
        yield found


@dataclass(frozen=True)
class Image:
    """An image that was built for the tests.

    Attributes:
        name: Its tag.
        facts: What `palate images build --json` said.
        log: What it said on stderr.
        seconds: How long it took; little when the engine had its layers.
    """

    name: str
    facts: dict[str, Any]
    log: str
    seconds: float


def palate(engine: Engine, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the command line against the engine."""
    return subprocess.run(
        [sys.executable, "-m", "palate.cli", *arguments],
        capture_output=True,
        text=True,
        env={**engine.environment(), **environment},
        timeout=3600,
    )


def _build(engine: Engine, program: str) -> Image:
    # One at a time, whatever process of the test run asks: two builds of the same layers share none of them.
    with (Path(tempfile.gettempdir()) / f"palate-test-build-{os.getuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _built(engine, program)


def _built(engine: Engine, program: str) -> Image:
    begun = time.monotonic()
    done = palate(engine, "images", "build", program, "--variant", "cpu", "--json", *build_options())
    assert done.returncode == 0, done.stderr
    (facts,) = json.loads(done.stdout)
    return Image(facts["name"], facts, done.stderr, time.monotonic() - begun)


@pytest.fixture(scope="session")
def trainer(engine: Engine) -> Image:
    return _build(engine, "trainer")


@pytest.fixture(scope="session")
def server(engine: Engine) -> Image:
    return _build(engine, "server")


@pytest.fixture
def container(engine: Engine) -> Iterator[Callable[..., str]]:
    """Starts containers, by the engine's arguments, and takes them away after the test; returns their ids."""
    started: list[str] = []

    def start(*arguments: str) -> str:
        started.append(engine.run("run", "--detach", "--network=host", *arguments).stdout.split()[-1])
        return started[-1]

    yield start
    if started:
        engine.run("rm", "--force", "--volumes", *started)
