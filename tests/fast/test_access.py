"""A service's tokens from the client to the gateway: the record, the runner's file, and who is refused when. Without an engine."""

from __future__ import annotations

import json
import stat
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

import palate.predictor
from palate import Predictor, Session
from palate.errors import ConfigurationError, DamagedFilesError, ServiceError
from palate.http import openai_client
from palate.runner.access import AccessFile
from palate.runner.poll import RecordPoll
from palate.runs.access import add, owner_token, read_access
from palate.runs.record import NAMED_TOKENS_KEY, TOKEN_KEY, Record
from palate.store import open_store
from palate_recipes.specs.access import ACCESS_FILE, TOKENS_LIMIT, GatewayAccess
from tests.support.fronted import fronted_service
from tests.support.manifests import serve_manifest
from tests.support.schemas import check_records

OWNER = "the-token-of-the-owner"


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session(store=f"file://{tmp_path}/store")


@pytest.fixture
def record(session: Session) -> Record:
    """A service that its record says is stopped."""
    record = Record(session.store, "services", "svc")
    record.create(serve_manifest())
    record.store.put(record.key(TOKEN_KEY), OWNER.encode(), private=True)
    record.advance("Stopped", expect={"Creating"})
    return record


@contextmanager
def running(record: Record, work: Path, *, follows: bool = True) -> Iterator[str]:
    """A gateway that runs for the service, and the part of its runner that follows the tokens; yields the endpoint."""
    work.mkdir()
    said: list[str] = []
    file = AccessFile(record, work / ACCESS_FILE)
    file.update()
    with fronted_service(OWNER, work_dir=work, LOOK_EVERY_S=0.05) as service:
        httpx.get(f"{service.endpoint}/health")  # waits until it answers
        record.note(state="Running", endpoint=service.endpoint, engine_id="elsewhere:1:2:x", finished_at=None)
        if follows:
            with RecordPoll({"tokens": file.update}, said.append):
                yield service.endpoint
            assert said == []
        else:
            yield service.endpoint


def accepts(endpoint: str, value: str) -> bool:
    headers = {"Authorization": f"Bearer {value}"}
    return httpx.get(f"{endpoint}/v1/models", headers=headers).status_code == 200


def test_tokens_of_a_running_service_are_added_limited_rotated_and_removed(
    session: Session, record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("palate.runner.poll.POLL_S", 0.1)
    predictor = Predictor("svc", session=session)
    with running(record, tmp_path / "work") as endpoint:
        held = predictor.openai(max_retries=0)
        alice = predictor.add_token("alice", rate_per_minute=2)
        assert accepts(endpoint, alice), "it is accepted when the call returns"
        bob = predictor.add_token("bob", concurrency=3)
        assert len({OWNER, alice, bob}) == 3
        assert min(len(alice), len(bob)) >= 40

        # A named token is enough for a client that wants a proof before it sends it.
        client = openai_client(endpoint, alice, "v1", {"max_retries": 0})
        assert client.models.list().data[0].id == "default"
        with pytest.raises(ServiceError, match="is not the service"):
            openai_client(endpoint, alice[:-1], "v1", {})
        url, headers = f"{endpoint}/v1/completions", {"Authorization": alice}
        assert [httpx.post(url, headers=headers, json={}).status_code for _ in range(3)] == [200, 200, 429]

        rotated = predictor.rotate_token("alice")
        assert [accepts(endpoint, value) for value in (alice, rotated)] == [False, True]
        headers = {"Authorization": rotated}
        assert httpx.post(url, headers=headers, json={}).status_code == 429, "the limit and its use stay"

        owner = predictor.rotate_token()
        assert owner == predictor.access_token != OWNER
        assert [accepts(endpoint, value) for value in (OWNER, owner, rotated, bob)] == [False, True, True, True]
        assert predictor.openai().models.list().data[0].id == "default"
        with pytest.raises(ServiceError, match="token may have been replaced"):
            held.models.list()

        predictor.remove_token("bob")
        assert [accepts(endpoint, value) for value in (bob, owner, rotated)] == [False, True, True]

    listed = predictor.tokens()
    assert [(token.name, token.rate_per_minute, token.concurrency) for token in listed] == [
        ("default", None, None),
        ("alice", 2, None),
    ]
    assert all(time.time() - 60 < token.created_at <= time.time() for token in listed)
    assert check_records(record.store) == 3

    # No value but the owner's is anywhere in the store, and that one in its own private object alone.
    for info in record.store.list(""):
        content = record.store.get(info.key).decode()
        assert not [value for value in (alice, rotated, bob, OWNER) if value in content], info.key
        assert (owner in content) is info.key.endswith(f"/{TOKEN_KEY}"), info.key
    path = record.store.local_path(record.key(NAMED_TOKENS_KEY))
    assert path is not None
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_service_that_does_not_follow_is_told(
    session: Session,
    record: Record,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its runner is of an earlier version, or has no store: nobody is told that a token is refused while it is accepted."""
    monkeypatch.setattr(palate.predictor, "_TOKENS_LIMIT_S", 0.3)
    predictor = Predictor("svc", session=session)
    bob, _ = add(record, "bob", rate_per_minute=None, concurrency=None)
    with running(record, tmp_path / "work", follows=False) as endpoint:
        with pytest.raises(ServiceError, match=r"token of service svc was not replaced.*palate stop svc"):
            predictor.rotate_token()
        assert predictor.access_token == OWNER
        assert predictor.openai().models.list()
        with pytest.raises(ServiceError, match=r"bob was removed from the record.*has not followed"):
            predictor.remove_token("bob")
        assert accepts(endpoint, bob)
        assert len(predictor.add_token("alice")) >= 40
        assert "WARNING: the token was added, but the running service has not followed" in capsys.readouterr().err
    assert [token.name for token in predictor.tokens()] == ["default", "alice"]


def test_the_runner_keeps_the_tokens_while_the_record_is_damaged(record: Record, tmp_path: Path) -> None:
    add(record, "alice", rate_per_minute=None, concurrency=None)
    file = AccessFile(record, tmp_path / ACCESS_FILE)
    before = file.update()
    assert (before.owner, [token.name for token in before.tokens]) == (OWNER, ["alice"])
    good = record.store.get(record.key(NAMED_TOKENS_KEY))
    damaged = json.loads(good)
    damaged["tokens"] *= 2
    huge = {**json.loads(good), "tokens": json.loads(good)["tokens"] * 5000}
    for content in (b"", b"{", b"\xff", b"[" * 60_000, json.dumps(damaged).encode(), json.dumps(huge).encode()):
        record.store.put(record.key(NAMED_TOKENS_KEY), content or b" ")
        with pytest.raises(DamagedFilesError, match=r"access_tokens.json of svc is damaged"):
            file.update()
    record.store.put(record.key(NAMED_TOKENS_KEY), good)
    for content in (b"", b"two words", b"line\n", "é".encode(), b"x" * 1001):
        record.store.put(record.key(TOKEN_KEY), content)
        with pytest.raises(DamagedFilesError, match="access_token is damaged"):
            file.update()
    assert GatewayAccess.read(tmp_path / ACCESS_FILE) == before
    written = (tmp_path / ACCESS_FILE).stat()
    record.store.put(record.key(TOKEN_KEY), OWNER.encode())
    assert file.update() == before
    assert (tmp_path / ACCESS_FILE).stat() == written, "what has not changed is not written again"


@pytest.mark.parametrize(
    ("name", "limits", "words"),
    [
        ("", {}, "token name"),
        ("a b", {}, "token name"),
        ("../up", {}, "token name"),
        ("x" * 101, {}, "token name"),
        ("default", {}, "the owner's"),
        ("alice", {}, "has a token 'alice' already"),
        ("bob", {"rate_per_minute": 0}, "rate_per_minute=0 is out of range"),
        ("bob", {"rate_per_minute": 1.5}, "rate_per_minute=1.5"),
        ("bob", {"concurrency": True}, "concurrency=True"),
        ("bob", {"concurrency": 10**9}, "concurrency=1000000000"),
    ],
)
def test_a_token_that_cannot_be_is_refused(
    session: Session, record: Record, name: str, limits: dict[str, int], words: str
) -> None:
    predictor = Predictor("svc", session=session)
    predictor.add_token("alice")
    before = record.store.get(record.key(NAMED_TOKENS_KEY))
    with pytest.raises(ConfigurationError, match=words):
        predictor.add_token(name, **limits)
    assert record.store.get(record.key(NAMED_TOKENS_KEY)) == before


def test_an_unknown_token_is_named_with_those_that_are_there(session: Session, record: Record) -> None:
    predictor = Predictor("svc", session=session)
    predictor.add_token("alice")
    for act in (predictor.remove_token, predictor.rotate_token):
        with pytest.raises(ConfigurationError, match=r"has no token 'bob'. It has: default, alice"):
            act("bob")
    with pytest.raises(ConfigurationError, match="cannot be removed"):
        predictor.remove_token("default")


def test_concurrent_changes_all_count_and_the_number_is_limited(record: Record) -> None:
    def one(number: int) -> str:
        return add(record, f"token-{number}", rate_per_minute=None, concurrency=None)[0]

    with ThreadPoolExecutor(4) as pool:
        values = list(pool.map(one, range(12)))
    assert len(set(values)) == 12
    assert {token.name for token in read_access(record).tokens} == {f"token-{number}" for number in range(12)}
    for number in range(12, TOKENS_LIMIT):
        one(number)
    with pytest.raises(ConfigurationError, match="has 64 tokens"):
        one(TOKENS_LIMIT)
    assert owner_token(record) == OWNER


def test_the_commands(session: Session, record: Record, home: Path) -> None:
    from typer.testing import CliRunner

    from palate.cli import app

    store = open_store(f"file://{home}/store")
    service = Record(store, "services", "svc")
    service.create(serve_manifest())
    store.put(service.key(TOKEN_KEY), OWNER.encode(), private=True)
    service.advance("Stopped", expect={"Creating"})

    def palate_(*arguments: str) -> tuple[int, str, str]:
        done = CliRunner().invoke(app, ["token", *arguments])
        return done.exit_code, done.stdout, done.stderr

    code, value, said = palate_("add", "svc", "alice", "--rate-per-minute", "60", "--concurrency", "2")
    assert (code, len(value.strip()) >= 40) == (0, True)
    assert "next: palate token list svc" in said
    code, shown, _ = palate_("list", "svc", "--json")
    assert [(one["name"], one["rate_per_minute"], one["concurrency"]) for one in json.loads(shown)] == [
        ("default", None, None),
        ("alice", 60, 2),
    ]
    assert "alice\t" in palate_("list", "svc")[1]
    assert palate_("rotate", "svc", "alice")[1] != value
    assert palate_("rotate", "svc")[1].strip() == Predictor("svc").access_token != OWNER
    assert palate_("remove", "svc", "alice")[:2] == (0, "alice\tremoved\n")
    code, _, said = palate_("add", "svc", "bob", "--concurrency", "0")
    assert (code, "--concurrency 0 is out of range" in said) == (1, True), said
