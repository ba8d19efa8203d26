"""A server that speaks the few routes of the Hugging Face hub by which datasets and models are read. Knows nothing of Palate.

Routes: `/api/KIND/ID[/revision/REV]`, `/api/KIND/ID/tree/REV` with KIND `datasets` or `models`, and the files at
`/datasets/ID/resolve/REV/PATH` and `/ID/resolve/REV/PATH`.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

_PAGE = 3
"""Files a page of the listing: small, so that every test turns pages."""


@dataclass
class Repository:
    """A dataset or model, with one commit.

    Attributes:
        files: Path to content.
        gated: Its files need `token`; its listing does not.
        private: All of it needs `token`.
        revisions: Names that lead to the commit.
        facts: Further keys of its description, such as `safetensors`.
    """

    files: dict[str, bytes]
    gated: bool = False
    private: bool = False
    revisions: tuple[str, ...] = ("main",)
    facts: dict[str, object] = field(default_factory=dict)

    @property
    def commit(self) -> str:
        return hashlib.sha1(
            json.dumps({name: _oid(self.files[name]) for name in sorted(self.files)}).encode()
        ).hexdigest()


@dataclass
class Hub:
    """The running server.

    Attributes:
        endpoint: For HF_ENDPOINT.
        datasets, models: By id; a test puts in what it needs.
        token: That opens what is gated or private.
        asked: Method and path of every request, in order.
        failing: Answers every request with this status when it is set.
    """

    endpoint: str
    token: str
    datasets: dict[str, Repository] = field(default_factory=dict)
    models: dict[str, Repository] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    failing: int = 0

    def add(self, repo: str, files: Mapping[str, str | bytes], **settings: object) -> Repository:
        content = {name: data.encode() if isinstance(data, str) else data for name, data in files.items()}
        self.datasets[repo] = Repository(content, **settings)  # type: ignore[arg-type]
        return self.datasets[repo]

    def add_model(self, repo: str, folder: Path, **settings: object) -> Repository:
        content = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.models[repo] = Repository(content, **settings)  # type: ignore[arg-type]
        return self.models[repo]


@contextmanager
def running_hub(token: str) -> Iterator[Hub]:
    """Serves on a free port of the loopback until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self, *, with_body: bool) -> None:
            url = urlsplit(self.path)
            hub.asked.append(f"{self.command} {unquote(url.path)}")
            status, headers, body = self._route(unquote(url.path), parse_qs(url.query))
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def _route(self, path: str, query: dict[str, list[str]]) -> tuple[int, dict[str, str], bytes]:
            if hub.failing:
                return hub.failing, {}, b"no"
            api, there = path.startswith("/api/"), path.removeprefix("/api")
            of_datasets = there.startswith("/datasets/")
            repo, rest = _split(there.removeprefix("/datasets/" if of_datasets else "/models/" if api else "/"))
            found = (hub.datasets if of_datasets else hub.models).get(repo)
            allowed = self.headers.get("Authorization") == f"Bearer {hub.token}"
            if found is None or (found.private and not allowed):
                return 401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b""
            if found.gated and not api and not allowed:
                return 401, {"X-Error-Code": "GatedRepo", "X-Error-Message": f"Access to {repo} is restricted"}, b""
            kind, _, rest = rest.partition("/")
            known = (*found.revisions, found.commit)
            revision = next((name for name in known if rest == name or rest.startswith(f"{name}/")), None)
            if kind and revision is None:
                return 404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"}, b""
            if kind in ("", "revision"):
                siblings = [
                    {"rfilename": name, "size": len(data), "blobId": _oid(data)} for name, data in found.files.items()
                ]
                facts = {"id": repo, "sha": found.commit, "siblings": siblings, **found.facts}
                return 200, {}, json.dumps(facts).encode()
            if kind == "tree":
                return self._tree(found, path, int(query.get("cursor", ["0"])[0]))
            name = rest.removeprefix(f"{revision}/")
            if name not in found.files:
                return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": found.commit}, b""
            content = found.files[name]
            return 200, {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": found.commit}, content

        def _tree(self, found: Repository, path: str, start: int) -> tuple[int, dict[str, str], bytes]:
            names = sorted(found.files)
            entries = [
                {"type": "file", "path": name, "size": len(found.files[name]), "oid": _oid(found.files[name])}
                for name in names[start : start + _PAGE]
            ]
            more = start + _PAGE < len(names)
            link = {"Link": f'<{hub.endpoint}{path}?cursor={start + _PAGE}>; rel="next"'} if more else {}
            return 200, link, json.dumps(entries).encode()

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        hub = Hub(f"http://127.0.0.1:{server.server_address[1]}", token)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


def _split(path: str) -> tuple[str, str]:
    owner, _, rest = path.partition("/")
    name, _, rest = rest.partition("/")
    return f"{owner}/{name}", rest


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def used_hub(token: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Runs a hub that this process reads, with an empty cache and no other setting of the hub's client."""
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGING_FACE")):
            monkeypatch.delenv(name)
    with running_hub(token) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setenv("HF_HUB_CACHE", str(cache))
        monkeypatch.setenv("HF_TOKEN", "")
        yield server
