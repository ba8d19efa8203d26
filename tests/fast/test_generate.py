"""Preference pairs from prompts, against a real HTTP server: what comes out, what it costs, killed and gone on with."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from palate.errors import ConfigurationError, DataError
from palate.generate import Generated, completion_log_path, plan_pairs
from palate.generate.chat_client import Endpoint
from palate.generate.completion_log import CompletionLog, Reply
from palate.generate.pairs import PairSettings
from palate_recipes.preferences.load import read_rows
from tests.support.chat import (
    HANG,
    KEY,
    PROMPTS,
    Answer,
    ChatServer,
    World,
    chat_server,
    completion,
    make,
    settings,
    wait_for,
)


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with chat_server(World()) as running:
        yield running


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_pairs_counts_tokens_and_cost(server: ChatServer, tmp_path: Path) -> None:
    output = tmp_path / "pairs.jsonl"
    changes = {"n": 3, "prices": {"small": (1.0, 2.0), "big": (10.0, 0.0)}}
    plan = plan_pairs(PROMPTS, output=output, settings=settings(server, **changes))
    assert (plan.answers, plan.verdicts, plan.finished, plan.calls) == (9, 18, 0, 27)
    assert not server.asked
    assert list(tmp_path.iterdir()) == []

    done = make(server, output, **changes)
    assert (done.prompts, done.pairs, done.ties, done.same, done.cut, done.failed) == (3, 3, 0, 0, 0, 0)
    assert done.asked == len(server.asked) == 27
    assert {asked.authorization for asked in server.asked} == {f"Bearer {KEY}"}
    assert [row["prompt"] for row in rows(output)] == PROMPTS
    for row in rows(output):
        assert int(row["chosen"].split()[-1]) < int(row["rejected"].split()[-1])
        assert row["votes"] == {"chosen": 2, "rejected": 0, "decided": 3}
        assert row["chosen_model"] == row["rejected_model"] == "small"
    answers, verdicts = done.usage
    assert (answers.model, answers.role, answers.calls, answers.prompt_tokens, answers.completion_tokens) == (
        "small",
        "answers",
        9,
        90,
        45,
    )
    assert (verdicts.model, verdicts.calls, verdicts.prompt_tokens, verdicts.completion_tokens) == (
        "big",
        18,
        1800,
        126,
    )
    assert done.cost == pytest.approx((90 * 1 + 45 * 2 + 1800 * 10) / 1e6)
    assert plan.prompt_tokens >= 1890
    assert plan.completion_tokens >= 171

    # Once more: nothing is asked, and the same bytes are written.
    written = output.read_bytes()
    output.unlink()
    again = make(server, output, **changes)
    assert (again.asked, again.reused, len(server.asked)) == (0, 27, 27)
    assert output.read_bytes() == written
    assert again.usage == done.usage
    assert plan_pairs(PROMPTS, output=output, settings=settings(server, **changes)).calls == 0
    # Another rubric asks the judge alone; another number of answers keeps those that are there.
    assert plan_pairs(PROMPTS, output=output, settings=settings(server, n=3, rubric="Shorter.")).calls == 18
    assert plan_pairs(PROMPTS, output=output, settings=settings(server, n=4)).finished == 9
    for path in tmp_path.iterdir():
        assert KEY.encode() not in path.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs.jsonl", "pairs.jsonl.ledger.jsonl"]


def test_models_temperatures_system_prompt_and_conversations(server: ChatServer, tmp_path: Path) -> None:
    talk = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "So?"},
    ]
    own = [{"role": "system", "content": "Mine."}, {"role": "user", "content": "Well?"}]
    prompts = ["Is it?", talk, own, "Is it?"]
    done = make(
        server, tmp_path / "p.jsonl", prompts, models=["a", "b"], temperatures=[0, 1], system_prompt="Be brief."
    )
    assert done.repeated_prompts == 1
    assert done.prompts == 3
    asked = Counter((body["model"], body["temperature"]) for body in (a.body for a in server.asked if not a.is_verdict))
    assert asked == {("a", 0): 3, ("a", 1): 6, ("b", 0): 3, ("b", 1): 6}  # one answer at 0: all would be alike
    system = {"role": "system", "content": "Be brief."}
    assert [row["prompt"] for row in rows(tmp_path / "p.jsonl")] == [
        [system, {"role": "user", "content": "Is it?"}],
        [system, *talk],
        own,
    ]
    trained = read_rows(tmp_path / "p.jsonl")  # what training makes of it
    assert [message.content for message in trained[1].prompt] == ["Be brief.", "Hi", "Hello", "So?"]
    assert all(row.chosen != row.rejected for row in trained)


def test_a_judge_that_favours_a_place_decides_nothing(server: ChatServer, tmp_path: Path) -> None:
    world = World()
    server.behaviour = lambda body, number: completion("A") if body["model"] == "big" else world(body, number)
    with pytest.raises(DataError, match=r"3 tied.*--judge-model"):
        make(server, tmp_path / "p.jsonl")
    assert not (tmp_path / "p.jsonl").exists()


def test_identical_cut_empty_and_tied_answers_make_no_pair(server: ChatServer, tmp_path: Path) -> None:
    world = World()

    def behaviour(body: dict[str, Any], number: int) -> Answer | str:
        question = body["messages"][-1]["content"]
        if body["model"] == "small" and question == "same":
            return completion(" alike \n")
        if body["model"] == "small" and question == "cut":
            return completion(f"in mid {number}", finish="length")
        if body["model"] == "small" and question == "empty":
            return completion(None, finish="content_filter")
        if body["model"] == "big" and "user: odd" in body["messages"][0]["content"]:
            return completion("I cannot decide between A and B.", usage=None)
        if body["model"] == "big" and "user: chopped" in body["messages"][0]["content"]:
            return completion("The better one is A", finish="length")
        return world(body, number)

    server.behaviour = behaviour
    done = make(server, tmp_path / "p.jsonl", ["same", "cut", "empty", "odd", "chopped", "good"])
    assert (done.pairs, done.ties, done.same, done.cut, done.failed) == (1, 2, 1, 2, 0)
    assert done.unreadable == 4
    verdicts = next(row for row in done.usage if row.role == "verdicts")
    assert (verdicts.calls, verdicts.without_usage) == (2 + 4 + 4, 4)  # each unreadable one was asked for once more
    assert rows(tmp_path / "p.jsonl")[0]["prompt"] == "good"
    kept = make(server, tmp_path / "k.jsonl", ["cut"], keep_cut=True)
    assert kept.pairs == 1


PROGRAM = "import typer; from palate.cli.generate import generate; app = typer.Typer(); app.command()(generate); app()"


def command_line(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "THE_KEY": KEY}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # A suite that was started in the background ignores Ctrl-C, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_the_command_line_killed_and_run_again_asks_nothing_twice(server: ChatServer, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"Number {number}?" for number in range(8)) + "\n")
    output = tmp_path / "p.jsonl"
    arguments = [str(prompts), "-o", str(output), "--model", "small", "--judge-model", "big", "--concurrency", "3"]
    arguments += ["--base-url", server.url, "--api-key-env", "THE_KEY", "--price", "small=1,2", "--price", "big=1,2"]

    planned = command_line(*arguments, "--dry-run")
    out, err = planned.communicate(timeout=120)
    assert planned.returncode == 0, err
    assert "remaining calls, maximum\t32" in out
    assert err.splitlines()[-1].startswith("next: ")
    assert not server.asked

    world = World()
    server.behaviour = lambda body, number: HANG if number > 13 else world(body, number)
    killed = command_line(*arguments)
    kept = completion_log_path(output)
    wait_for(lambda: kept.exists() and kept.read_bytes().count(b"\n") == 1 + 13 and len(server.asked) == 16)
    second = command_line(*arguments)
    assert "another process" in second.communicate(timeout=120)[1]
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not output.exists()
    with kept.open("ab") as file:
        file.write(b'{"key": "torn')
    in_flight = Counter(asked.key for asked in server.asked[13:])

    server.behaviour = world
    resumed = command_line(*arguments)
    out, err = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, err
    assert out == f"{output}\n"
    assert "19 sent, 13 taken from" in err
    assert "cost of all calls: " in err
    assert err.splitlines()[-1] == f"next: palate train {output} --model smollm2-135m-instruct"
    assert KEY not in out + err
    # 32 calls are 32 answers: what was asked more often was in flight when the process died.
    assert len(server.asked) == 32 + 3
    verdicts = Counter(asked.key for asked in server.asked if asked.is_verdict)
    assert all(count == 1 + in_flight[key] for key, count in verdicts.items())
    entries = rows(kept)
    assert len({entry["key"] for entry in entries[1:]}) == len(entries) - 1 == 32
    assert [row["prompt"] for row in rows(output)] == prompts.read_text().split("\n")[:-1]


def test_an_interrupt_says_how_to_go_on(server: ChatServer, tmp_path: Path) -> None:
    world = World()
    server.behaviour = lambda body, number: HANG if number > 3 else world(body, number)
    prompts, output = tmp_path / "prompts.txt", tmp_path / "p.jsonl"
    prompts.write_text("\n".join(PROMPTS))
    running = command_line(str(prompts), "-o", str(output), "--model", "small", "--base-url", server.url)
    wait_for(
        lambda: completion_log_path(output).exists() and completion_log_path(output).read_bytes().count(b"\n") == 4
    )
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130, err
    assert "finished calls are kept" in err.splitlines()[-2]
    assert err.splitlines()[-1].startswith(f"next: palate {prompts} -o {output}")


def test_the_ledger_refuses_what_it_cannot_trust(tmp_path: Path, server: ChatServer) -> None:
    output = tmp_path / "p.jsonl"
    with CompletionLog(completion_log_path(output)) as ledger:
        assert ledger.path.stat().st_mode & 0o777 == 0o600
        ledger.add("k", Reply("half \ud83d", "stop", None, 1), model="m", temperature=1.0)
        with pytest.raises(ConfigurationError, match="another process"):
            make(server, output)
    with CompletionLog(completion_log_path(output)) as ledger:
        assert ledger.get("k") == Reply("half \ud83d", "stop", None, 1)
    completion_log_path(output).write_bytes(completion_log_path(output).read_bytes() + b"junk\n")
    with pytest.raises(DataError, match="line 3"):
        make(server, output)
    foreign = tmp_path / "mine.jsonl"
    foreign.write_text("mine\n")
    with pytest.raises(ConfigurationError, match="already exists"):
        make(server, foreign)
    assert foreign.read_text() == "mine\n"
    assert not server.asked


def test_it_works_where_a_loop_runs_already(server: ChatServer, tmp_path: Path) -> None:
    async def notebook() -> Generated:
        return make(server, tmp_path / "p.jsonl")

    assert asyncio.run(notebook()).pairs == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"models": []}, ["--model"]),
        ({"n": 1}, ["answers per prompt is 1"]),
        ({"temperatures": [0.0], "n": 5}, ["answers per prompt is 1", "identical"]),
        ({"temperatures": [3.0]}, ["3.0", "0 and 2"]),
        ({"concurrency": 0}, ["concurrency=0 is out of range"]),
        ({"requests_per_minute": -1}, ["requests_per_minute=-1 is out of range"]),
        ({"rubric": " "}, ["rubric"]),
        ({"prices": {"smal": (1, 1)}}, ["smal", "small"]),
        ({"judge_endpoint": Endpoint("http://judge/v1"), "judge_model": None}, ["http://judge/v1", "--judge-model"]),
    ],
)
def test_settings_that_cannot_work_are_refused(server: ChatServer, changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        settings(server, **changes)
    for word in words:
        assert word in str(caught.value)


def test_endpoints_keep_their_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY", "THE_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigurationError, match="--base-url"):
        Endpoint.from_environment()
    with pytest.raises(ConfigurationError, match="THE_KEY is not set"):
        Endpoint.from_environment("http://x/v1", "THE_KEY")
    with pytest.raises(ConfigurationError) as caught:
        Endpoint(f"http://me:{KEY}@host/v1")
    assert KEY not in str(caught.value)
    with pytest.raises(ConfigurationError, match="ftp"):
        Endpoint("ftp://host/v1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    endpoint = Endpoint.from_environment()
    assert (endpoint.base_url, endpoint.api_key) == ("https://api.openai.com/v1", KEY)
    assert KEY not in repr(endpoint)
    assert KEY not in repr(PairSettings(endpoint=endpoint, models=["m"]))
    assert Endpoint.other("http://judge/v1").api_key != KEY  # a key goes nowhere unless it is named for it
