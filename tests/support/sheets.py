"""A server that speaks the two Google APIs that a sheet is read by: tokens and Sheets v4. Knows nothing of Palate.

It hands out a token only for an assertion that the account's own key has signed, and cells only for that token.
"""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from secrets import token_hex
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, unquote, urlsplit

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import rsa

_JWT_GRANT = "urn:ietf:params:oauth:grant-type:jwt-bearer"
_AUDIENCE = "https://oauth2.googleapis.com/token"  # google-auth names Google's own whatever server is asked


@cache
def make_key(number: int = 0) -> rsa.RSAPrivateKey:
    """Returns an RSA key, another one for each number."""
    from cryptography.hazmat.primitives.asymmetric import rsa

    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def as_pem(key: rsa.RSAPrivateKey) -> str:
    """Returns the key as it stands in a service account's JSON file."""
    from cryptography.hazmat.primitives import serialization

    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return key.private_bytes(*form).decode()


@dataclass
class Spreadsheet:
    """A spreadsheet.

    Attributes:
        title: Of the whole.
        sheets: Title of each worksheet to its cells; the gid of the first is 0, of the next 100, and so on.
        shared: Whether the account may read it.
    """

    title: str
    sheets: dict[str, list[list[str]]]
    shared: bool = True


@dataclass
class Sheets:
    """The running server.

    Attributes:
        url: Of both APIs.
        email: Of the one service account that it knows.
        spreadsheets: By id.
        claims: Of the last assertion that was right.
        asked: Method and path of every request, in order.
        failing: Answers each request for cells with this status and message when it is set.
    """

    url: str
    email: str
    spreadsheets: dict[str, Spreadsheet] = field(default_factory=dict)
    claims: dict[str, object] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    failing: tuple[int, str] | None = None

    @property
    def token_uri(self) -> str:
        return f"{self.url}/token"


@contextmanager
def running_sheets() -> Iterator[Sheets]:
    """Serves on a free port of the loopback until the block ends."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import padding

    token = token_hex(16)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            sheets.asked.append(f"POST {self.path}")
            form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self._send(*self._grant(form) if self.path == "/token" else (404, {}))

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            sheets.asked.append(f"GET {path}")
            if self.headers.get("Authorization") != f"Bearer {token}":
                self._refuse(401, "UNAUTHENTICATED", "Request had invalid authentication credentials.")
            elif sheets.failing:
                self._refuse(sheets.failing[0], "FAILING", sheets.failing[1])
            else:
                self._cells(path)

        def log_message(self, *_: object) -> None:
            pass

        def _grant(self, form: dict[str, list[str]]) -> tuple[int, dict[str, object]]:
            if form.get("grant_type") != [_JWT_GRANT]:
                return 400, {"error": "unsupported_grant_type", "error_description": "no JWT"}
            signed, _, signature = form["assertion"][0].rpartition(".")
            head, claims = (json.loads(_unpack(part)) for part in signed.split("."))
            try:
                make_key().public_key().verify(_unpack(signature), signed.encode(), padding.PKCS1v15(), hashes.SHA256())
            except InvalidSignature:
                return 400, {"error": "invalid_grant", "error_description": "Invalid JWT Signature."}
            right = claims["aud"] == _AUDIENCE and claims["iss"] == sheets.email and head["alg"] == "RS256"
            if not right or not claims["iat"] - 60 <= time.time() <= claims["exp"]:
                return 400, {"error": "invalid_grant", "error_description": "Invalid JWT: claims"}
            sheets.claims = claims
            return 200, {"access_token": token, "token_type": "Bearer", "expires_in": 3600}

        def _cells(self, path: str) -> None:
            key, _, span = path.removeprefix("/v4/spreadsheets/").partition("/values/")
            found = sheets.spreadsheets.get(key)
            if found is None:
                self._refuse(404, "NOT_FOUND", "Requested entity was not found.")
            elif not found.shared:
                self._refuse(403, "PERMISSION_DENIED", "The caller does not have permission")
            elif span:
                cells = found.sheets[span.strip("'").replace("''", "'")]
                # As Google does: empty cells at the end of a row are left out, and so are the values of an empty sheet.
                rows = [list(row) for row in cells]
                for row in rows:
                    while row and not row[-1]:
                        row.pop()
                self._send(200, {"range": span, "majorDimension": "ROWS", **({"values": rows} if rows else {})})
            else:
                titles = [
                    {"properties": {"sheetId": 100 * index, "title": title, "index": index}}
                    for index, title in enumerate(found.sheets)
                ]
                self._send(200, {"spreadsheetId": key, "properties": {"title": found.title}, "sheets": titles})

        def _refuse(self, code: int, status: str, message: str) -> None:
            self._send(code, {"error": {"code": code, "message": message, "status": status}})

        def _send(self, status: int, values: dict[str, object]) -> None:
            body = json.dumps(values).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        sheets = Sheets(f"http://127.0.0.1:{server.server_address[1]}", "reader@project.iam.gserviceaccount.com")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield sheets
        finally:
            server.shutdown()
            thread.join()


def _unpack(part: str) -> bytes:
    return base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))
