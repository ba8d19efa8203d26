"""Fixtures of the tests that need a container engine: the engines that are here, and Palate's images, really built.

python -m tests.support.images   builds both beforehand, on the engine that is here
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.engine import FOLDER, Engine, build_options, find_engine, need_base, prepare
from tests.support.podman import running_podman

NO_ENGINE = "NO CONTAINER ENGINE: start docker and set DOCKER_HOST, or as root: python -m tests.support.engine up FOLDER --install"


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


def build(engine: Engine, program: str) -> Image:
    """Builds an image of this checkout."""
    # One at a time, whatever process of the test run asks: two builds of the same layers share none of them.
    with (Path(tempfile.gettempdir()) / f"palate-test-build-{os.getuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        begun = time.monotonic()
        done = palate(engine, "images", "build", program, "--variant", "cpu", "--json", *build_options())
        assert done.returncode == 0, done.stderr
        (facts,) = json.loads(done.stdout)
        return Image(facts["name"], facts, done.stderr, time.monotonic() - begun)


@pytest.fixture(scope="session")
def engine() -> Engine:
    """The engine that is here, with the base images."""
    found = find_engine()
    if found is None:
        pytest.skip(NO_ENGINE)
    prepare(found)
    return found


@pytest.fixture(scope="session")
def podman(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A podman with the base image; its images stay for the next tests where PALATE_TEST_ENGINE names a folder."""
    if shutil.which("podman") is None:
        pytest.skip("NO PODMAN: apt-get install podman runc uidmap")
    # Ending one would end the other's containers: every process of a test run has its own.
    name = f"podman-{os.environ.get('PYTEST_XDIST_WORKER', 'alone')}"
    folder = Path(FOLDER, name) if FOLDER else tmp_path_factory.mktemp("podman")
    with running_podman(folder, remove=not FOLDER) as found:
        need_base(found)
        yield found


@pytest.fixture(scope="session")
def trainer(engine: Engine) -> Image:
    return build(engine, "trainer")


@pytest.fixture(scope="session")
def server(engine: Engine) -> Image:
    return build(engine, "server")


def main() -> int:
    found = find_engine()
    if found is None:
        print(NO_ENGINE, file=sys.stderr)
        return 1
    for program in ("trainer", "server"):
        image = build(found, program)
        print(f"{image.name}: {image.facts['size_bytes'] / 1e9:.2f} GB, {image.seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
