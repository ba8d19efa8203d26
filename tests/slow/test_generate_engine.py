"""Preference pairs from a real engine: made, killed in the middle, gone on with; nothing finished is asked twice."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import palate.session
from palate import Predictor
from palate.deploy import ServedModel, start_service
from palate.generate import completion_log_path, generate_pairs, plan_pairs
from palate.generate.chat_client import Endpoint
from palate.generate.pairs import PairSettings
from palate_recipes.specs.weights import BaseModel, WeightsSource
from tests.slow.conftest import until
from tests.support.chat import Answer, ChatServer, chat_server

pytestmark = pytest.mark.slow

PROGRAM = "import typer; from palate.cli.generate import generate; app = typer.Typer(); app.command()(generate); app()"
PROMPTS = ["Name a colour.", "What is 2 + 3?", "Say hello.", "Name an animal."]
ANSWER_TOKENS, VERDICT_TOKENS = 16, 8


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Iterator[Predictor]:
    """A tiny model on the engine that starts fastest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PALATE_HOME", str(tmp_path_factory.mktemp("generate") / "home"))
        patch.setattr(palate.session, "_default", None)
        source = WeightsSource(kind="folder", location=str(tiny))
        with start_service(
            palate.session.get_default_session(),
            service_name="answers",
            served=ServedModel(model=BaseModel(name="tiny", source=source)),
            options={"engine": "transformers", "max_model_len": 1024},
        ) as predictor:
            yield predictor


@pytest.fixture
def relay(service: Predictor) -> Iterator[ChatServer]:
    """Passes requests on to the engine and remembers them."""

    def pass_on(body: dict[str, Any], number: int) -> Answer:
        response = httpx.post(
            f"{service.endpoint}/v1/chat/completions",
            json=body,
            headers={"Authorization": f"Bearer {service.access_token}"},
            timeout=120,
        )
        return Answer(response.status_code, response.content)

    with chat_server(pass_on) as running:
        yield running


def test_killed_in_the_middle_it_goes_on_and_asks_nothing_twice(relay: ChatServer, tmp_path: Path) -> None:
    prompts, output = tmp_path / "prompts.txt", tmp_path / "pairs.jsonl"
    prompts.write_text("\n".join(PROMPTS))
    command = [sys.executable, "-c", PROGRAM, str(prompts), "-o", str(output), "--base-url", relay.url]
    command += ["--model", "default", "--temperature", "0", "--temperature", "1", "-n", "1", "--keep-cut"]
    command += ["--max-tokens", str(ANSWER_TOKENS), "--judge-max-tokens", str(VERDICT_TOKENS), "--concurrency", "2"]
    kept = completion_log_path(output)
    settings = PairSettings(
        endpoint=Endpoint(relay.url),
        models=["default"],
        temperatures=[0, 1],
        n=1,
        max_tokens=ANSWER_TOKENS,
        judge_max_tokens=VERDICT_TOKENS,
        keep_cut=True,
        concurrency=2,
    )

    killed = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(lambda: kept.exists() and kept.read_bytes().count(b"\n") >= 6)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not output.exists()
    finished = [json.loads(line) for line in kept.read_bytes().splitlines()[1:]]
    in_flight = len(relay.asked) - len(finished)
    assert 0 <= in_flight <= 2
    plan = plan_pairs(prompts, output=output, settings=settings)
    assert plan.finished == len(finished)
    before = len(relay.asked)

    resumed = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300)
    entries = [json.loads(line) for line in kept.read_bytes().splitlines()[1:]]
    assert entries[: len(finished)] == finished
    assert len({entry["key"] for entry in entries}) == len(entries)
    # Each request after the kill is one new line; so none of what was finished was among them.
    assert len(relay.asked) - before == len(entries) - len(finished)
    asked = Counter(request.key for request in relay.asked)
    assert (
        sum(count - 1 for count in asked.values()) <= in_flight
    )  # all requests differ: one answer at each temperature
    assert all(entry["completion_tokens"] for entry in entries)

    # A model of this size seldom says a readable verdict: whether pairs came out is its affair, that it ends is ours.
    if resumed.returncode == 0:
        assert resumed.stdout == f"{output}\n"
        assert {row["prompt"] for row in map(json.loads, output.read_text().splitlines())} <= set(PROMPTS)
    else:
        assert "4 prompts gave no pair" in resumed.stderr
    assert plan_pairs(prompts, output=output, settings=settings).calls == 0


def test_a_service_answers_and_another_endpoint_judges(service: Predictor, tmp_path: Path) -> None:
    from tests.support.chat import completion, shown_answers

    with chat_server(
        lambda body, _: completion("A" if shown_answers(body)[0] < shown_answers(body)[1] else "B")
    ) as judge:
        endpoint = Endpoint.of_service(service.service_name)
        settings = PairSettings(
            endpoint=endpoint,
            models=["default"],
            n=2,
            max_tokens=ANSWER_TOKENS,
            keep_cut=True,
            judge_endpoint=Endpoint.other(judge.url),
            judge_model="strict",
        )
        done = generate_pairs(PROMPTS[:2], output=tmp_path / "pairs.jsonl", settings=settings)
        assert done.pairs == 2
        assert {request.authorization for request in judge.asked} == {
            "Bearer none"
        }  # the service's token stays at home
    for row in map(json.loads, (tmp_path / "pairs.jsonl").read_text().splitlines()):
        assert row["chosen"] < row["rejected"]
    token = service.access_token
    assert token not in repr(settings)
    for path in tmp_path.iterdir():
        assert token not in path.read_text()

    # A restart may change the port; what was asked stays finished.
    service.stop_service()
    service.start_service()
    again = Endpoint.of_service(service.service_name)
    assert again.identity == endpoint.identity
