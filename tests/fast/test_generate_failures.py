"""What goes wrong while pairs are made: an endpoint that fails, stalls, limits, refuses and dies."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from palate_recipes.errors import EndpointError
from tests.support.chat import DROP, HANG, KEY, Answer, ChatServer, World, chat_server, make, refusal, wait_for


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with chat_server(World()) as running:
        yield running


@pytest.mark.parametrize(
    "trouble",
    [
        refusal(500, "boom"),
        refusal(503, "later", headers={"Retry-After": "0"}),
        refusal(408),
        Answer(200, b'{"choices": [{"mess'),
        Answer(200, b'{"choices": []}'),
        Answer(200, b"<html>busy</html>", {"Content-Type": "text/html"}),
        DROP,
        HANG,
    ],
    ids=["500", "503", "408", "torn JSON", "no choice", "html", "drop", "stall"],
)
def test_what_passes_is_asked_again(server: ChatServer, tmp_path: Path, trouble: Answer | str) -> None:
    world = World()
    server.behaviour = lambda body, number: trouble if number == 3 else world(body, number)
    done = make(server, tmp_path / "p.jsonl", timeout_s=1.0 if trouble == HANG else 20.0)
    assert (done.pairs, done.failed) == (3, 0)
    assert len(server.asked) == done.asked + 1


def test_retry_after_pauses_the_whole_endpoint(server: ChatServer, tmp_path: Path) -> None:
    world = World()
    limited: list[float] = []

    def behaviour(body: dict[str, Any], number: int) -> Answer | str:
        if number != 5:
            return world(body, number)
        limited.append(time.monotonic())
        return refusal(429, "slow down", headers={"Retry-After": "1"})

    server.behaviour = behaviour
    done = make(server, tmp_path / "p.jsonl", concurrency=1)
    assert done.pairs == 3
    after = [asked.at_s for asked in server.asked if asked.at_s > limited[0]]
    assert min(after) - limited[0] >= 1.0


def test_rate_and_concurrency_are_bounded(server: ChatServer, tmp_path: Path) -> None:
    begun = time.monotonic()
    done = make(server, tmp_path / "p.jsonl", concurrency=2, requests_per_minute=1200)
    assert done.asked == 12
    # Requests depart evenly spaced. Each arrives later than it departs, the first perhaps much later on a busy machine.
    assert max(asked.at_s for asked in server.asked) - begun >= 11 * 0.05
    assert server.most_at_once <= 2


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (refusal(401, f"bad key {KEY}", code="invalid_api_key"), ["401", "THE_KEY", "bad key ***"]),
        (refusal(403, "not yours"), ["403", "may not use this model"]),
        (refusal(404, "no model small"), ["404", "no model small", "/models"]),
        (refusal(400, "n is wrong"), ["400", "n is wrong", "(prompt 1)"]),
        (refusal(429, "no credit", code="insufficient_quota"), ["429", "top it up"]),
        (refusal(429, "tomorrow", headers={"Retry-After": "86400"}), ["86400 s"]),
    ],
    ids=["401", "403", "404", "400", "quota", "long wait"],
)
def test_a_refusal_of_all_calls_stops_at_once(
    server: ChatServer, tmp_path: Path, answer: Answer, words: list[str]
) -> None:
    server.behaviour = lambda body, number: answer
    with pytest.raises(EndpointError) as caught:
        make(server, tmp_path / "p.jsonl", ["Is it?"], concurrency=1)
    for word in ["small", server.url, "0 pairs", *words]:
        assert word in str(caught.value)
    assert KEY not in str(caught.value)
    assert len(server.asked) == 1
    assert not (tmp_path / "p.jsonl").exists()


def test_one_bad_prompt_is_counted_and_asked_again_next_time(server: ChatServer, tmp_path: Path) -> None:
    world = World()
    server.behaviour = lambda body, number: (
        refusal(400, "the prompt is too long") if body["messages"][-1]["content"] == "long" else world(body, number)
    )
    prompts = ["Is it?", "long", "Why so?"]
    done = make(server, tmp_path / "p.jsonl", prompts, concurrency=1)
    assert (done.pairs, done.failed) == (2, 1)
    assert "prompt 2: small at" in done.failures[0]
    assert "too long" in done.failures[0]
    before = len(server.asked)
    assert make(server, tmp_path / "p.jsonl", prompts, concurrency=1).failed == 1  # alone, it is still its own fault
    assert {asked.body["messages"][-1]["content"] for asked in server.asked[before:]} == {"long"}
    server.behaviour = world
    assert make(server, tmp_path / "p.jsonl", prompts).pairs == 3


def test_a_prompt_that_always_breaks_the_server_is_counted(server: ChatServer, tmp_path: Path) -> None:
    world = World()
    server.behaviour = lambda body, number: (
        refusal(500) if body["messages"][-1]["content"] == "crash" else world(body, number)
    )
    for _ in range(2):
        done = make(server, tmp_path / "p.jsonl", ["Is it?", "crash"], retries=2, concurrency=1)
        assert (done.pairs, done.failed) == (1, 1)


def test_models_that_want_parameters_otherwise(server: ChatServer, tmp_path: Path) -> None:
    world = World()

    def behaviour(body: dict[str, Any], number: int) -> Answer | str:
        if body["model"] == "big" and "max_tokens" in body:
            return refusal(400, "Unsupported parameter: use 'max_completion_tokens' instead.", param="max_tokens")
        if body["model"] == "big" and "temperature" in body:
            return refusal(400, "Unsupported value: 'temperature' does not support 0.", param="temperature")
        return world(body, number)

    server.behaviour = behaviour
    assert make(server, tmp_path / "p.jsonl", concurrency=1).pairs == 3
    assert sum(asked.is_verdict for asked in server.asked) == 6 + 2
    assert server.asked[-1].body["max_completion_tokens"] == 512


def test_an_endpoint_that_dies_stops_the_run_and_the_same_call_goes_on(server: ChatServer, tmp_path: Path) -> None:
    world = World()
    server.behaviour = lambda body, number: HANG if number > 10 else world(body, number)
    prompts = [f"Number {number}?" for number in range(6)]
    output = tmp_path / "p.jsonl"
    closing = threading.Thread(target=lambda: (wait_for(lambda: len(server.asked) >= 11), server.close()))
    closing.start()
    with pytest.raises(
        EndpointError, match=r"no connection.*6 prompts done: \d+ pairs and 10 finished calls are saved"
    ):
        make(server, output, prompts, retries=2, concurrency=1)
    closing.join()
    assert not output.exists()
    before = len(server.asked)
    server.behaviour = world
    server.start()
    done = make(server, output, prompts)
    assert done.pairs == 6
    assert (done.asked, done.reused) == (24 - 10, 10)
    assert len(server.asked) - before == 14


def test_no_endpoint_at_all_is_found_out_soon(server: ChatServer, tmp_path: Path) -> None:
    server.close()
    with pytest.raises(EndpointError, match="no connection"):
        make(server, tmp_path / "p.jsonl", retries=50)


def test_a_failure_lets_calls_in_flight_finish(server: ChatServer, tmp_path: Path) -> None:
    world = World()
    refused = threading.Event()

    def behaviour(body: dict[str, Any], number: int) -> Answer | str:
        if number == 4:
            refused.set()
            return refusal(403)
        assert refused.wait(10)
        return world(body, number)

    server.behaviour = behaviour
    with pytest.raises(EndpointError) as caught:
        make(server, tmp_path / "p.jsonl")
    # At least those three were in flight; an answer that came before the refusal was read may have let one more begin.
    assert len(server.asked) >= 4
    assert f"{len(server.asked) - 1} finished calls are saved" in str(caught.value)
