"""The health check of the server image: a ready service that answers, one that does not, none that is ready."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from palate_recipes.specs.serve import READY_FILE, Ready
from palate_server.health import main


class Answering(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_a_service_is_healthy_while_it_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PALATE_HOME", str(tmp_path))
    assert main() == 1
    assert "not ready" in capsys.readouterr().err
    work = tmp_path / "work/services/one/7-8-9"
    work.mkdir(parents=True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    answering = threading.Thread(target=server.serve_forever)
    answering.start()
    try:
        endpoint = f"http://127.0.0.1:{server.server_port}"
        Ready(endpoint=endpoint, engine="vllm", models=["default"], seconds=1.0).write(work / READY_FILE)
        assert main() == 0
    finally:
        server.shutdown()
        server.server_close()
        answering.join()
    assert main() == 1
    assert "does not answer" in capsys.readouterr().err
