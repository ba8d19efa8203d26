"""A server that speaks the few routes of the Hugging Face hub by which a model is pushed. Knows nothing of Palate.

Routes: `/api/repos/create`, `/api/validate-yaml`, `/api/models/ID/preupload/REV`, `/api/models/ID/commit/REV`,
`/api/models/ID/paths-info/REV`, `/api/models/ID[/revision/REV]`. Every file goes inline, as the hub takes small ones.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class ModelHub:
    """The running server.

    Attributes:
        endpoint: For HF_ENDPOINT.
        token: That may write.
        repos: Files by path, by repository.
        private: Repository to whether it was made private.
        spoils: A path whose content the server changes when it is committed.
        asked: Method and path of every request, in order.
        failing: Answers every request with this status when it is set.
    """

    endpoint: str
    token: str
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    spoils: str = ""
    asked: list[str] = field(default_factory=list)
    failing: int = 0


@contextmanager
def running_model_hub(token: str) -> Iterator[ModelHub]:
    """Serves on a free port of the loopback until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(b"")

        def do_POST(self) -> None:
            if self.headers.get("Transfer-Encoding", "") == "chunked":
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self._answer(body)

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self, body: bytes) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append(f"{self.command} {path}")
            if hub.failing:
                status, answer = hub.failing, {"error": "out of order"}
            elif self.headers.get("Authorization") != f"Bearer {hub.token}":
                status, answer = 401, {"error": "Invalid username or password."}
            else:
                status, answer = _route(hub, path, body, self.headers.get("Content-Type", ""))
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = ModelHub(f"http://127.0.0.1:{server.server_port}", token)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _route(hub: ModelHub, path: str, body: bytes, content_type: str) -> tuple[int, Any]:
    if path == "/api/repos/create":
        asked = json.loads(body)
        repo = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        url = {"url": f"{hub.endpoint}/{repo}"}
        if repo in hub.repos:
            return 409, {"error": "You already created this model repo", **url}
        hub.repos[repo] = {}
        hub.private[repo] = bool(asked.get("private")) or asked.get("visibility") == "private"
        return 200, url
    if path == "/api/validate-yaml":
        return 200, {"errors": [], "warnings": []}
    _, _, _, owner, name, *rest = path.split("/")
    repo = f"{owner}/{name}"
    if repo not in hub.repos:
        return 404, {"error": "Repository not found"}
    files = hub.repos[repo]
    if rest[:1] == ["preupload"]:
        asked = json.loads(body)["files"]
        return 200, {
            "files": [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False} for each in asked]
        }
    if rest[:1] == ["commit"]:
        for line in body.splitlines():
            item = json.loads(line)
            if item["key"] == "file":
                value = item["value"]
                content = base64.b64decode(value["content"])
                files[value["path"]] = content + b"!" if value["path"] == hub.spoils else content
        commit = _commit(files)
        return 200, {"commitUrl": f"{hub.endpoint}/{repo}/commit/{commit}", "commitOid": commit, "success": True}
    if rest[:1] == ["paths-info"]:
        if "json" in content_type:
            names = json.loads(body)["paths"]
        else:
            from urllib.parse import parse_qs

            names = parse_qs(body.decode())["paths"]
        return 200, [
            {"type": "file", "path": each, "size": len(files[each]), "oid": _blob(files[each])}
            for each in names
            if each in files
        ]
    return 200, {
        "id": repo,
        "modelId": repo,
        "sha": _commit(files),
        "siblings": [{"rfilename": each} for each in files],
    }


def _blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _commit(files: dict[str, bytes]) -> str:
    return hashlib.sha1(json.dumps({name: _blob(data) for name, data in sorted(files.items())}).encode()).hexdigest()
