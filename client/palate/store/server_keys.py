"""Keys that SeaweedFS's inner services ask each other for, made anew with every start. Knows files and certificates, no server.

S3 asks for the user's access keys. Behind it, filer and volume server get signing keys, and master and gRPC ask both sides for a
certificate: other users of the machine, and web pages in a browser on it, reach those ports as well.
"""

from __future__ import annotations

import json
import os
import secrets
import ssl
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from palate.errors import MissingDependencyError

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
