"""The page of a service, in a real browser and as requests, with a service that streams what it was asked."""

from __future__ import annotations

import http.client
import json
import resource
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from palate import Predictor
from palate.errors import ConfigurationError, ServiceError
from palate.runs.record import TOKEN_KEY, Record
from palate.store import open_store
from palate.web import WebUI, server
from palate.web.votes import Shown, VotesFile
from palate_recipes.preferences.check import check
from palate_recipes.preferences.load import read_rows
from tests.support.browser import Tab, browser
from tests.support.fronted import fronted_service
from tests.support.manifests import serve_manifest

TOKEN = "a-token-for-tests"


@pytest.fixture
def service(home: Path) -> Iterator[Predictor]:
    store = open_store(f"file://{home}/store")
    record = Record(store, "services", "svc")
    record.create(serve_manifest(system_prompt="Be brief", tuned_uri="file:///jobs/one/model"))
    store.put(record.key(TOKEN_KEY), TOKEN.encode(), private=True)
    with fronted_service(TOKEN, chats=True, adapts=True) as fronted:
        record.advance("Running", expect={"Creating"}, endpoint=fronted.endpoint, engine_id="elsewhere:1:2:x")
        yield Predictor("svc")


@pytest.fixture
def page(service: Predictor, tmp_path: Path) -> Iterator[WebUI]:
    with service.webui(votes=tmp_path / "votes.jsonl") as page:
        yield page


class Caller:
    """Sends requests as the page does, and as it never would."""

    def __init__(self, page: WebUI) -> None:
        address, _, self.key = page.url.partition("#")
        self.host = address.removeprefix("http://").rstrip("/")

    def request(self, method: str, path: str, body: object = None, **headers: str | None) -> tuple[int, bytes, Any]:
        connection = http.client.HTTPConnection(self.host, timeout=60)
        sent: dict[str, str | None] = {"Authorization": f"Bearer {self.key}", **headers}
        content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        try:
            connection.request(method, path, content, {k: v for k, v in sent.items() if v is not None})
            response = connection.getresponse()
            return response.status, response.read(), response.headers
        finally:
            connection.close()

    def call(self, path: str, body: object = None) -> tuple[int, Any]:
        status, content, _ = self.request("GET" if body is None else "POST", path, body)
        return status, json.loads(content)

    def round(self, message: str = "Why?", **changed: Any) -> str:
        asked = {"messages": [{"role": "user", "content": message}], "models": ["default", "base"], "blind": True}
        status, told = self.call("/api/round", {**asked, "temperature": 0.5, "max_tokens": 9, "seed": 3, **changed})
        assert status == 200, told
        found: str = told["round"]
        return found

    def answer(self, identity: str, side: int = 0) -> list[dict[str, str]]:
        status, content, _ = self.request("POST", "/api/answer", {"round": identity, "side": side})
        assert status == 200, content
        return [json.loads(line) for line in content.splitlines()]

    def vote(self, identity: str, vote: str = "left", voter: str = "Ann") -> tuple[int, Any]:
        return self.call("/api/vote", {"round": identity, "vote": vote, "voter": voter})


def text_of(events: list[dict[str, str]]) -> str:
    return "".join(event.get("text", "") for event in events)


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_bytes().splitlines()]


# ── in a browser ────────────────────────────────────────────────────────────────────────────────────────────────────────


def ask(tab: Tab, message: str) -> None:
    tab.run("document.querySelector('#message').focus()")
    tab.write(message)
    tab.key("Enter")


def test_people_chat_stop_and_vote_in_a_browser(page: WebUI, tmp_path: Path) -> None:
    key = page.url.partition("#")[2]
    with browser(tmp_path) as program:
        tab = program.open(page.url)
        tab.wait("!document.querySelector('#hint').hidden && document.querySelector('#service').textContent === 'svc'")
        assert tab.run("location.href") == page.url.partition("#")[0]
        assert key not in tab.run("document.documentElement.outerHTML")
        assert TOKEN not in tab.run(
            "document.documentElement.outerHTML + JSON.stringify({...sessionStorage, ...localStorage})"
        )

        # Two models side by side, each with a history of its own. What a model writes is text, never markup.
        ask(tab, "<b>one</b>")
        tab.wait("document.querySelectorAll('.answer').length === 2 && document.querySelector('#stop').hidden")
        assert tab.texts(".answer .name") == ["default", "base"]
        assert tab.texts(".answer .text") == ["[su] default 0.7 <b>one</b>.", "[su] base 0.7 <b>one</b>."]
        tab.key("Enter", shift=True)
        tab.write("two")
        assert tab.run("document.querySelector('#message').value") == "\ntwo"
        tab.key("Enter")
        tab.wait("document.querySelectorAll('.answer').length === 4 && document.querySelector('#stop').hidden")
        assert tab.texts(".answer .text")[2:] == ["[suau] default 0.7 two.", "[suau] base 0.7 two."]

        # Regenerate with another temperature; stop an answer that would never end; an error of the service.
        tab.click("#open-settings")
        tab.run("document.querySelector('#temperature').value = 1.5")
        tab.click("#open-settings")
        tab.click("#again")
        tab.wait(
            "document.querySelectorAll('.answer .text')[3].innerText.includes('1.5') && document.querySelector('#stop').hidden"
        )
        ask(tab, "forever")
        tab.wait(
            "[...document.querySelectorAll('.writing .text')].filter((one) => one.innerText.includes('forever')).length === 2"
        )
        tab.key("Escape")
        tab.wait("document.querySelector('#stop').hidden")
        assert tab.texts(".answer .note")[4:] == ["Stopped.", "Stopped."]
        ask(tab, "refuse")
        tab.wait("document.querySelectorAll('.note.error').length === 2 && document.querySelector('#stop').hidden")

        # Blind: the name is asked for once, and no model is named before the vote.
        tab.click("#mode-blind")
        tab.wait("document.querySelector('#ask-name').open")
        tab.write("Ann")
        tab.key("Enter")
        tab.wait("!document.querySelector('#ask-name').open")
        for number, digit in enumerate("132", start=1):
            ask(tab, f"question {number}")
            tab.wait("!document.querySelector('#voting').hidden")
            assert tab.texts(".answer .name")[-2:] == ["Left", "Right"]
            if number == 1:
                ask(tab, "not yet")
                assert "Vote first" in tab.text("#status")
                tab.run("document.querySelector('#message').value = ''")
            tab.key(digit)
            tab.wait(
                "document.querySelector('#voting').hidden && document.querySelector('#status').innerText.startsWith('Left was')"
            )
            assert sorted(tab.texts(".answer .name")[-2:]) == ["base", "default"]
        tab.wait("document.querySelector('#counts').textContent === '2 pairs, 1 tie'")

        # What is downloaded is what was saved, and passes the check.
        tab.click("#open-settings")
        tab.click("#download")
        saved = tmp_path / "svc.votes.jsonl"
        paused = threading.Event()
        while not (saved.exists() and saved.read_bytes() == page.votes.read_bytes()):  # the test's timeout ends it
            paused.wait(0.02)
        assert tab.complaints() == []
    rows = read_rows(saved)
    assert len(rows) == 2
    assert check([(saved, saved.name)]).of("error") == []
    first, second = rows_of(saved)
    assert first["chosen_model"] in first["chosen"][0]["content"]
    assert {first["chosen_side"], second["chosen_side"]} == {"left", "right"}
    assert first["prompt"] == [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "question 1"}]
    # The conversation goes on with the answer that won, and of a tie with the left one.
    assert [turn["role"] for turn in second["prompt"]] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert second["prompt"][2] == first["chosen"][0]
    assert {row["voter"] for row in (first, second)} == {"Ann"}
    assert rows_of(page.ties)[0]["vote"] == "tie"


# ── as requests ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_sides_are_drawn_for_each_round_and_names_come_with_the_vote(page: WebUI) -> None:
    caller = Caller(page)
    lefts = set()
    for number in range(24):
        identity = caller.round(f"question {number}")
        shown = [text_of(caller.answer(identity, side)) for side in (0, 1)]
        status, told = caller.vote(identity, "left" if number % 2 else "right")
        assert status == 200
        assert told["is_pair"]
        assert all(model in text for model, text in zip(told["models"], shown, strict=True))
        lefts.add(told["models"][0])
    assert lefts == {"default", "base"}  # the same side 24 times has a chance of 1 in 8 million
    rows = rows_of(page.votes)
    assert len(rows) == 24
    last = rows[-1]
    assert last["chosen"] == [{"role": "assistant", "content": shown[0]}]
    assert last["rejected"] == [{"role": "assistant", "content": shown[1]}]
    assert {last["chosen_model"], last["rejected_model"]} == {"default", "base"}
    assert last["sampling"] == {"temperature": 0.5, "max_tokens": 9, "seed": 3}
    assert (last["voter"], last["service"], last["base_model"]) == ("Ann", "svc", "m")
    assert last["tuned_uri"] == "file:///jobs/one/model"
    assert not page.ties.exists()


def test_what_says_no_preference_is_kept_apart_and_never_read_as_a_pair(page: WebUI) -> None:
    caller = Caller(page)
    for vote in ("tie", "both_bad"):
        identity = caller.round(vote)
        shown = [text_of(caller.answer(identity, side)) for side in (0, 1)]
        status, told = caller.vote(identity, vote)
        assert (status, told["is_pair"], told["pairs"]) == (200, False, 0)
    assert not page.votes.exists()
    tie, bad = rows_of(page.ties)
    assert (tie["vote"], bad["vote"]) == ("tie", "both_bad")
    assert [bad["response_a"], bad["response_b"]] == shown
    report = check([(page.ties, "ties.jsonl")])
    assert report.findings["tie"].count == 2
    assert (report.usable, report.of("error")) == (0, [])


def test_a_vote_counts_once_and_only_for_complete_blind_answers(page: WebUI) -> None:
    caller = Caller(page)
    identity = caller.round()
    assert caller.vote(identity)[0] == 409  # not asked yet
    caller.answer(identity)
    assert caller.vote(identity)[0] == 409
    caller.answer(identity, 1)
    assert caller.request("POST", "/api/answer", {"round": identity, "side": 1})[0] == 409
    assert caller.vote(identity, "middle")[0] == 400
    assert caller.vote(identity, voter=" ")[0] == 400
    assert caller.vote(identity, voter="\x1b[2J")[0] == 400
    assert caller.vote(identity)[0] == 200
    assert caller.vote(identity, "right")[0] == 409
    failed = caller.round("refuse")
    assert "error" in caller.answer(failed)[-1]
    caller.answer(failed, 1)
    assert caller.vote(failed)[0] == 409
    open_one = caller.round(models=["base"], blind=False)
    caller.answer(open_one)
    assert caller.vote(open_one)[0] == 409
    assert caller.vote("0" * 32)[0] == 404
    assert len(rows_of(page.votes)) == 1


def test_a_blind_error_does_not_name_the_model(page: WebUI) -> None:
    caller = Caller(page)
    identity = caller.round(models=["nobody-1", "nobody-2"])
    (event,) = caller.answer(identity)
    assert "nobody" not in event["error"]
    assert "404" in event["error"]


REFUSED: list[dict[str, Any]] = [
    {"messages": []},
    {"messages": [{"role": "assistant", "content": "a"}]},
    {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]},
    {"messages": [{"role": "user", "content": " "}]},
    {"messages": [{"role": "user", "content": "half \ud83d"}]},
    {"system": 3},
    {"models": []},
    {"models": ["default"]},
    {"models": ["default", "default"]},
    {"models": ["default", "base"], "blind": False},
    {"temperature": 2.5},
    {"temperature": True},
    {"max_tokens": 0},
    {"max_tokens": 1.5},
    {"seed": -1},
    {"seed": 2**53},
]


def test_a_round_that_could_not_be_trained_on_is_refused(page: WebUI) -> None:
    asked = {"messages": [{"role": "user", "content": "q"}], "models": ["default", "base"], "blind": True}
    for changed in REFUSED:
        status, told = Caller(page).call("/api/round", {**asked, "temperature": 1, "max_tokens": 9, **changed})
        assert (status, bool(told["error"])) == (400, True), changed


def test_who_may_ask(page: WebUI) -> None:
    caller = Caller(page)
    port = caller.host.partition(":")[2]

    def status(path: str, body: object = None, **headers: str | None) -> int:
        return caller.request("GET" if body is None else "POST", path, body, **headers)[0]

    # The page's files need no key: they are the same for everybody. All else does.
    for path in ("/", "/page.js", "/page.css", "/icon.svg"):
        assert status(path, Authorization=None) == 200
    for path in ("/api/state", "/api/votes", "/api/ties", "/nothing"):
        assert status(path, Authorization=None) == 401
        assert status(path, Authorization="Bearer ") == 401
    for path in ("/api/round", "/api/answer", "/api/vote"):
        assert status(path, {}, Authorization="Bearer wrong") == 401
    assert status("/api/state") == 200
    # A name that leads here by DNS, and pages of other origins, also of other ports.
    assert status("/", Host=f"evil.example:{port}") == 421
    assert status("/api/state", Host="evil.example") == 421
    assert status("/api/state", Host="localhost:1234") == 200  # the other end of a tunnel
    for origin in ("https://evil.example", f"http://localhost:{port}", "http://127.0.0.1:1", "null"):
        assert status("/api/round", {}, Origin=origin) == 403
    assert status("/api/round", {}, Origin=f"http://{caller.host}") == 400
    # Bodies that are too long, have no length, or are no object.
    assert status("/api/round", b"x" * (1 << 20), **{"Content-Type": "text/plain"}) == 400
    assert status("/api/round", None) == 404
    assert caller.request("POST", "/api/round", None, **{"Content-Length": str(1 << 30)})[0] == 413
    assert caller.request("POST", "/api/round", None, **{"Content-Length": "-1"})[0] == 411
    assert status("/api/round", b"[" * 100_000) == 400
    assert status("/../rounds.py") == 404
    assert status("/api/state", Authorization="Bearer é".encode().decode("latin-1")) == 401


def test_the_page_brings_everything_along_and_runs_no_foreign_script(page: WebUI) -> None:
    _, content, headers = Caller(page).request("GET", "/")
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for text in (content, *(Caller(page).request("GET", path)[1] for path in ("/page.js", "/page.css"))):
        assert b"://" not in text.replace(b"http://www.w3.org/2000/svg", b"")
        for word in (b"innerHTML", b"insertAdjacentHTML", b"document.write", b" style=", b"onclick="):
            assert word not in text


def test_an_answer_ends_in_the_service_when_the_reader_leaves(page: WebUI) -> None:
    caller = Caller(page)
    identity = caller.round("forever", models=["base"], blind=False)
    connection = http.client.HTTPConnection(caller.host, timeout=60)
    body = json.dumps({"round": identity, "side": 0})
    connection.request("POST", "/api/answer", body, {"Authorization": f"Bearer {caller.key}"})
    response = connection.getresponse()
    assert json.loads(response.readline())["text"] == "[u]"
    connection.close()
    response.close()
    found = page._rounds._round(identity).answers[0]
    waiting = threading.Event()
    for _ in range(500):
        if found.finish:
            break
        waiting.wait(0.02)
    assert (found.finish, found.is_open) == ("stopped", False)


def test_a_page_that_is_closed_ends_its_answers(service: Predictor, tmp_path: Path) -> None:
    with service.webui(votes=tmp_path / "votes.jsonl") as page:
        stream = page._rounds.stream(Caller(page).round("forever"), 0, has_left=lambda: False)
        assert next(stream)[0] == "text"
    *_, last = stream
    assert last == ("finish", "stopped")
    page.close()
    with pytest.raises(ConnectionRefusedError):
        Caller(page).call("/api/state")


def test_as_many_answers_as_there_may_be_open_are_counted(page: WebUI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page._rounds, "_open", threading.BoundedSemaphore(1))
    caller = Caller(page)
    stream = page._rounds.stream(caller.round("forever"), 0, has_left=lambda: False)
    assert next(stream)[0] == "text"
    identity = caller.round("two")
    assert caller.request("POST", "/api/answer", {"round": identity, "side": 0})[0] == 429
    stream.close()  # type: ignore[attr-defined]
    assert text_of(caller.answer(identity))


# ── connections without the key ─────────────────────────────────────────────────────────────────────────────────────────


class Connections:
    """Raw connections to a page, from a process of this machine that does not have its key."""

    def __init__(self, page: WebUI) -> None:
        host, _, port = Caller(page).host.partition(":")
        self.address = host, int(port)
        self.open: list[socket.socket] = []

    def connect(self, sent: bytes = b"") -> socket.socket:
        made = socket.create_connection(self.address, timeout=60)
        self.open.append(made)
        made.sendall(sent)
        return made

    def __enter__(self) -> Connections:
        return self

    def __exit__(self, *exception: object) -> None:
        for one in self.open:
            one.close()


def is_ended(connection: socket.socket) -> bool:
    """Waits until the page ends a connection without an answer."""
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True


def test_connections_without_the_key_do_not_keep_the_reader_out(page: WebUI) -> None:
    threads = threading.active_count()
    with Connections(page) as others:
        caller = Caller(page)
        kept = http.client.HTTPConnection(caller.host, timeout=60)
        kept.request("GET", "/api/state", headers={"Authorization": f"Bearer {caller.key}"})
        kept.getresponse().read()
        for _ in range(3 * server.MOST_CONNECTIONS):
            others.connect(b"GET / HT")
        first = others.open[: 2 * server.MOST_CONNECTIONS]
        assert all(is_ended(one) for one in first)
        assert caller.call("/api/state")[0] == 200
        assert threading.active_count() - threads <= server.MOST_CONNECTIONS + 2
        # The one with the key is older than all of them, and was not ended for them.
        kept.request("GET", "/api/state", headers={"Authorization": f"Bearer {caller.key}"})
        assert kept.getresponse().status == 200
        kept.close()


def test_a_new_connection_is_closed_if_all_others_have_the_key(page: WebUI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MOST_CONNECTIONS", 2)
    caller = Caller(page)
    head = f"GET /api/state HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {caller.key}\r\n\r\n".encode()
    with Connections(page) as others:
        for _ in range(2):
            assert others.connect(head).recv(15) == b"HTTP/1.1 200 OK"
        assert is_ended(others.connect())


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"])
def test_a_connection_without_the_key_has_a_time_for_its_requests(
    page: WebUI, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(server, "_HEAD_S", 0.5)
    with Connections(page) as others:
        connection, received = others.connect(sent), b""
        while piece := connection.recv(1 << 16):  # ends when the page ends the connection
            received += piece
        assert received.startswith(b"HTTP/1.1 200 OK") is sent.endswith(b"\r\n\r\n")


def test_a_head_that_comes_byte_by_byte_has_an_end(page: WebUI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_HEAD_S", 0.5)
    with Connections(page) as others:
        connection = others.connect(b"GET / HTTP/1.1\r\nX: ")
        connection.settimeout(0.05)
        for _ in range(1000):
            try:
                connection.sendall(b"x")
                if connection.recv(1) == b"":
                    return
            except TimeoutError:
                continue
            except ConnectionError:
                return
        pytest.fail("the connection was not ended")


def test_an_accept_that_fails_does_not_spin() -> None:
    failed = threading.Semaphore(0)

    class Counting(server._Server):
        failures = 0

        def get_request(self) -> tuple[socket.socket, Any]:
            try:
                return super().get_request()
            except OSError:
                self.failures += 1
                failed.release()
                raise

    page = Counting(0)
    thread = threading.Thread(target=page.serve_forever)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with page, socket.socket() as connection:
        thread.start()
        try:
            # The descriptors below the limit are in use, so the accept fails.
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
            connection.connect(page.server_address[:2])
            for _ in range(2):
                assert failed.acquire(timeout=30)
            before = page.failures
            thread.join(timeout=0.5)
            assert page.failures - before <= 10
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        connection.settimeout(60)
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(15) == b"HTTP/1.1 200 OK"
        page.shutdown()
        thread.join()


# ── the files of votes ──────────────────────────────────────────────────────────────────────────────────────────────────

QUESTION = [{"role": "user", "content": "q"}]
LEFT, RIGHT = Shown("default", "good", "stop"), Shown("base", "bad", "length")


def test_votes_are_private_and_go_on_after_a_cut_line(tmp_path: Path) -> None:
    votes = VotesFile(tmp_path / "new" / "votes.jsonl")
    assert votes.add(QUESTION, LEFT, RIGHT, "right", {}).is_pair
    assert votes.add(QUESTION, LEFT, RIGHT, "tie", {}) == (False, "")
    for file in (votes.path, votes.ties):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with votes.path.open("ab") as file:
        file.write(b'{"prompt": "cu')
    votes.add(QUESTION, RIGHT, LEFT, "right", {})
    assert [line[:1] for line in votes.path.read_bytes().splitlines()] == [b"{"] * 3
    assert json.loads(votes.path.read_bytes().splitlines()[2])["chosen"][0]["content"] == "good"
    assert VotesFile(votes.path).pairs_count == 3


@pytest.mark.parametrize("other", ["", " \n", "good", "good "])
def test_a_vote_that_no_training_can_use_is_not_a_pair(tmp_path: Path, other: str) -> None:
    votes = VotesFile(tmp_path / "votes.jsonl")
    kept = votes.add(QUESTION, LEFT, Shown("base", other, "stop"), "left", {})
    assert not kept.is_pair
    assert ("same text" if "good" in other else "is empty") in kept.why
    (row,) = rows_of(votes.ties)
    assert (row["vote"], row["not_a_pair"]) == ("left", kept.why)
    assert not votes.path.exists()


def test_a_file_of_other_content_is_refused(tmp_path: Path) -> None:
    (tmp_path / "prefs.json").write_text("[{}]")
    with pytest.raises(ConfigurationError, match="expected JSON lines"):
        VotesFile(tmp_path / "prefs.json")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        VotesFile(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="vote again"):
        VotesFile(tmp_path / "votes.jsonl")._append(tmp_path / "file" / "votes.jsonl", {})


# ── the command ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_command_shows_the_address_and_ends_with_ctrl_c(service: Predictor, home: Path) -> None:
    command = [sys.executable, "-m", "palate.cli", "chat", "svc", "--web", "--model", "base", "--system", "Be rude"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    ) as process:
        assert process.stdout is not None
        address, _, key = process.stdout.readline().strip().partition("#")
        connection = http.client.HTTPConnection(address.removeprefix("http://").rstrip("/"), timeout=60)
        connection.request("GET", "/api/state", headers={"Authorization": f"Bearer {key}"})
        told = json.loads(connection.getresponse().read())
        connection.close()
        process.send_signal(signal.SIGINT)
        _, shown = process.communicate(timeout=60)
    assert process.returncode == 0, shown
    assert (told["models"], told["selected"], told["system"]) == (["default", "base"], ["base"], "Be rude")
    assert told["file"] == str(home / "votes" / "svc.jsonl")
    assert "ssh -L" in shown
    assert "Traceback" not in shown


def test_a_page_that_cannot_be_served_says_why(service: Predictor, page: WebUI, home: Path) -> None:
    port = int(Caller(page).host.partition(":")[2])
    with pytest.raises(ConfigurationError, match=r"in use.*another port"):
        service.webui(port=port)
    with pytest.raises(ConfigurationError, match="expected 0 to 65535"):
        service.webui(port=-1)
    with pytest.raises(ConfigurationError, match=r"no such model\. It has: default, base"):
        service.webui(models=["other"])
    Record(open_store(f"file://{home}/store"), "services", "svc").advance("Stopping", expect={"Running"}, endpoint=None)
    with pytest.raises(ServiceError, match="did not list its models"):
        Predictor("svc").webui()
