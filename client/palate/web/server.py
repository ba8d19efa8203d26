"""The page's HTTP server, on the loopback. Knows requests and who may send them; asks `Rounds` for everything else.

Who may: any process of this machine can connect, and any web page that is open in a browser can try. So everything but the page's own
files needs the key of the address, which only the reader of the terminal has. The key is in the fragment, which browsers do not send;
the page takes it out of the address, keeps it for its tab, and sends it as a header. There is no cookie, so no other page can use it,
also none on another port of this machine. A request under another host name (DNS rebinding) or from another origin is refused.

A process without the key cannot keep the reader out either: connections are few and short until they show it.
"""

from __future__ import annotations

import getpass
import json
import logging
import secrets
import select
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BufferedReader
from pathlib import Path
from socketserver import TCPServer
from typing import TYPE_CHECKING, Any

from palate.paths import palate_home
from palate.web.rounds import Refused, Rounds
from palate.web.votes import VotesFile
from palate_recipes.errors import ConfigurationError, PalateError

if TYPE_CHECKING:
    from palate.predictor import Predictor

logger = logging.getLogger("palate.web")

HOST = "127.0.0.1"
MOST_BODY_BYTES = 1 << 20
MOST_CONNECTIONS = 64
"""Each has a thread and a descriptor. One more ends the oldest that has not shown the key, or is closed if all have."""

_IDLE_S = 60.0
"""Wait for the next request of a connection that has shown the key, or for a piece of its body."""
_HEAD_S = 10.0
"""Time for the whole head of a request. Without the key also the wait for a request, and head and answer together."""
_ACCEPT_PAUSE_S = 0.1
"""Pause after a failed accept: without a free descriptor the listening socket stays readable, and the loop would spin."""

_PAGE = Path(__file__).parent / "page"
_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class WebUI:
    """A running page. Created by `Predictor.webui`. A context manager; `close()` ends it, and so does the end of the process.

    Attributes:
        url: Address with the key of the page. Whoever has it can use the service and vote, on this machine.
        votes: The file of pairs.
        ties: The file of votes without a winner.
    """

    def __init__(
        self,
        predictor: Predictor,
        *,
        votes: str | Path | None,
        port: int,
        models: list[str],
        defaults: dict[str, Any],
    ) -> None:
        self._file = VotesFile(votes or palate_home() / "votes" / f"{predictor.service_name}.jsonl")
        self._rounds = Rounds(predictor, self._file)
        try:
            known = self._rounds.models()
            if unknown := [name for name in models if name not in known]:
                raise ConfigurationError(
                    f"model {unknown[0]!r}: service {predictor.service_name} has no such model. It has: {', '.join(known)}"
                )
            self._server = _Server(port)
        except BaseException:
            self._rounds.close()
            raise
        server = self._server
        server.rounds, server.votes = self._rounds, self._file
        server.facts = {
            "service": predictor.service_name,
            "selected": models or known[:2],
            "voter": _user(),
            **defaults,
        }
        self._thread = threading.Thread(target=server.serve_forever, name="palate-web-page", daemon=True)
        self._thread.start()
        self._is_closed = False

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self._server.server_port}/#{self._server.key}"

    @property
    def votes(self) -> Path:
        return self._file.path

    @property
    def ties(self) -> Path:
        return self._file.ties

    @property
    def pairs_count(self) -> int:
        """Pairs in the file, with those of earlier pages."""
        return self._file.pairs_count

    def wait(self) -> None:
        """Blocks until the page is closed, as by Ctrl-C."""
        self._thread.join()

    def close(self) -> None:
        """Ends the page and its open answers. Idempotent."""
        if not self._is_closed:
            self._is_closed = True
            self._server.shutdown()
            self._rounds.close()
            self._server.server_close()
            self._thread.join()

    def __enter__(self) -> WebUI:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"WebUI({self.url})"


@dataclass(eq=False)
class _Connection:
    """What the server knows of an open connection.

    Attributes:
        has_key: Whether one of its requests had the key.
        ends_at: Monotonic time at which the server ends it; None while it may last.
    """

    has_key: bool = False
    ends_at: float | None = None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128  # with the usual 5, a burst of others delays the reader by seconds: TCP tries again late
    allow_reuse_port = False  # true in newer Pythons: two pages would then share a port
    rounds: Rounds
    votes: VotesFile
    facts: dict[str, Any]

    def __init__(self, port: int) -> None:
        self.key = secrets.token_urlsafe(32)
        self._open: dict[socket.socket, _Connection] = {}  # oldest first
        self._lock = threading.Lock()
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            raise ConfigurationError(
                f"port={port}: {error.strerror or error}. Use another port, or 0 for any free one"
            ) from None
        except OverflowError:
            raise ConfigurationError(f"port={port} is out of range: expected 0 to 65535") from None

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # not HTTPServer's, which asks DNS for the host's name
        self.server_port = self.socket.getsockname()[1]

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            return super().get_request()
        except OSError:
            time.sleep(_ACCEPT_PAUSE_S)
            raise

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Registers a new connection; False closes it at once."""
        with self._lock:
            if len(self._open) >= MOST_CONNECTIONS:
                oldest = next((one for one, known in self._open.items() if not known.has_key), None)
                if oldest is None:
                    return False
                self._end(oldest)
            self._open[request] = _Connection(ends_at=time.monotonic() + _HEAD_S)
            return True

    def service_actions(self) -> None:
        """Ends connections that are past their time. The loop of the server calls it twice a second or more often."""
        now = time.monotonic()
        with self._lock:
            # ends_at is read once: its connection's thread writes it without the lock.
            late = [
                one for one, known in self._open.items() if (ends_at := known.ends_at) is not None and ends_at < now
            ]
            for connection in late:
                self._end(connection)

    def _end(self, connection: socket.socket) -> None:
        """Wakes the thread of a connection, which closes it. Call with the lock: a closed socket is not in the table."""
        del self._open[connection]
        with suppress(OSError):  # the other side has ended it
            connection.shutdown(socket.SHUT_RDWR)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def known(self, connection: socket.socket) -> _Connection:
        """Returns what is known of a connection; nothing of one that was ended meanwhile."""
        with self._lock:
            return self._open.get(connection) or _Connection()

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.debug("a request of the page failed", exc_info=True)  # mostly a browser that has left


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "palate", ""
    timeout = _IDLE_S
    rfile: BufferedReader

    def setup(self) -> None:
        super().setup()
        self._known = self.server.known(self.connection)

    def handle_one_request(self) -> None:
        self._known.ends_at = time.monotonic() + (_IDLE_S if self._known.has_key else _HEAD_S)
        if not self.rfile.peek(1):
            self.close_connection = True
            return
        self._known.ends_at = time.monotonic() + _HEAD_S
        super().handle_one_request()

    def do_GET(self) -> None:
        self._answered(self._get)

    def do_POST(self) -> None:
        self._answered(self._post)

    def _answered(self, answer: Any) -> None:
        try:
            self._check_sender()
            answer(self.path.partition("?")[0])
        except Refused as error:
            self.close_connection = True  # its body may be unread
            self._send(error.status, {"error": str(error)})
        except PalateError as error:
            self._send(502, {"error": str(error)})

    def _get(self, path: str) -> None:
        if path in _FILES:
            name, kind = _FILES[path]
            self._send(200, (_PAGE / name).read_bytes(), kind)
            return
        self._check_key()
        votes = self.server.votes
        if path == "/api/state":
            self._send(200, {**self.server.facts, "models": self.server.rounds.models(), **self._counts()})
        elif path in ("/api/votes", "/api/ties"):
            self._send(200, votes.content(ties=path.endswith("ties")), "application/x-ndjson; charset=utf-8")
        else:
            raise Refused(404, f"no such path: {path}")

    def _post(self, path: str) -> None:
        self._check_key()
        asked = self._body()
        if path == "/api/round":
            self._send(200, {"round": self.server.rounds.start(asked)})
        elif path == "/api/answer":
            self._stream(asked)
        elif path == "/api/vote":
            kept, models = self.server.rounds.vote(asked.get("round"), asked.get("vote"), asked.get("voter"))
            self._send(200, {"models": models, "is_pair": kept.is_pair, "why": kept.why, **self._counts()})
        else:
            raise Refused(404, f"no such path: {path}")

    def _stream(self, asked: dict[str, Any]) -> None:
        """Answers with one JSON object per line. The end of the connection is the end of the answer."""
        events = self.server.rounds.stream(asked.get("round"), asked.get("side"), has_left=self._has_left)
        try:
            self.close_connection = True
            is_first = True
            for kind, text in events:
                # Not before the first piece: closing a generator that has not begun would give nothing back.
                if is_first:
                    self._head(200, {"Content-Type": "application/x-ndjson; charset=utf-8", "Connection": "close"})
                    is_first = False
                self.wfile.write(json.dumps({kind: text}).encode() + b"\n")
        except OSError:  # the browser has left
            pass
        finally:
            events.close()  # type: ignore[attr-defined]  # a generator: ends the request to the service

    def _has_left(self) -> bool:
        try:
            readable, _, _ = select.select([self.connection], [], [], 0)
            return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)
        except OSError:
            return True

    # ── who asks ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _check_sender(self) -> None:
        """Refuses a request under a name that is not this machine's, or from a page of another origin.

        The port of the name is not compared: a tunnel may have another one at its other end.
        """
        host = self.headers.get("Host", "")
        if host.rpartition(":")[0] not in (HOST, "localhost") and host not in (HOST, "localhost"):  # without port: 80
            raise Refused(421, "this page is served as 127.0.0.1 and localhost only")
        origin = self.headers.get("Origin")
        if origin is not None and origin != f"http://{host}":
            raise Refused(403, "this request is from another page")

    def _check_key(self) -> None:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not secrets.compare_digest(given.encode(), self.server.key.encode()):
            raise Refused(401, "open the address that the terminal shows: this tab does not have its key")
        self._known.has_key, self._known.ends_at = True, None

    def _body(self) -> dict[str, Any]:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or self.headers.get("Transfer-Encoding"):
            raise Refused(411, "expected a body with its length")
        if int(length) > MOST_BODY_BYTES:
            raise Refused(413, f"the message is too long: expected up to {MOST_BODY_BYTES} bytes")
        try:
            found = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise Refused(400, "expected a JSON object")
        return found

    # ── answers ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _counts(self) -> dict[str, Any]:
        votes = self.server.votes
        return {"pairs": votes.pairs_count, "ties": votes.ties_count, "file": str(votes.path)}

    def _send(self, status: int, content: Any, kind: str = "application/json") -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        close = {"Connection": "close"} if self.close_connection else {}
        self._head(status, {"Content-Type": kind, "Content-Length": str(len(body)), **close})
        self.wfile.write(body)

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**_HEADERS, **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *values: Any) -> None:
        logger.debug(format, *values)


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return ""
