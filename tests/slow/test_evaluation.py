"""Evaluations with real services: the models answer, a judge over HTTP compares; killed, resumed, nothing left running."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import palate.session
from palate import Predictor, TrainingJob
from palate.errors import ServiceError, WinRateError
from palate.evaluation.preferences import preference_scores
from palate.evaluation.run import prepare
from palate_recipes.specs.serve import describe_engines
from tests.slow.conftest import processes_of, until
from tests.support.chat import ChatServer, chat_server
from tests.support.evaluations import alphabetical, job_of
from tests.support.models import greedy, random_adapter, tiny_model
from tests.support.rows import preference_rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PROMPTS = [f"Tell me about the number {number}." for number in range(12)]
TOKENS = 24
OPTIONS = {"engine": "transformers", "dtype": "float32"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home for all tests of this file."""
    home = tmp_path_factory.mktemp("evaluation") / "home"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PALATE_HOME", str(home))
        patch.setattr(palate.session, "_default", None)
        yield home


@pytest.fixture(scope="module")
def job(place: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingJob:
    adapter = random_adapter(tmp_path_factory.mktemp("adapter") / "one", tiny, seed=1)
    return job_of(palate.session.get_default_session(), "one", tiny, adapter, system_prompt="")


@pytest.fixture
def judge() -> Iterator[ChatServer]:
    with chat_server(alphabetical) as running:
        yield running


def nothing_is_left(place: Path) -> None:
    assert Predictor.list() == []
    until(lambda: processes_of(place) == [])


@pytest.mark.thorough  # two starts of an engine; the fast tests have the same over a real front
def test_ended_while_models_answer_it_leaves_nothing_and_resumes(
    job: TrainingJob, judge: ChatServer, place: Path, tmp_path: Path, tiny: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    command = [
        sys.executable,
        "-m",
        "palate.cli",
        "eval",
        job.id,
        "--prompts",
        str(prompts),
        "--judge",
        f"{judge.url}/strict",
    ]
    command += ["--engine", "transformers", "--dtype", "float32", "--max-tokens", str(TOKENS), "--concurrency", "1"]
    prepared = prepare(
        job,
        prompts=prompts,
        judge=f"{judge.url}/strict",
        max_tokens=TOKENS,
        concurrency=1,
        options=OPTIONS,
    )
    running = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ)
    until(lambda: prepared.ledger.exists() and prepared.ledger.read_bytes().count(b"\n") >= 3)
    running.send_signal(signal.SIGTERM)
    _, said = running.communicate(timeout=120)
    assert running.returncode == 143, said
    assert "finished calls are kept" in said
    nothing_is_left(place)
    assert judge.asked == []
    finished = prepared.plan().finished
    assert 2 <= finished < 24

    result = prepared.run()
    nothing_is_left(place)
    entries = [json.loads(line) for line in prepared.ledger.read_bytes().splitlines()[1:]]
    assert len({entry["key"] for entry in entries}) == len(entries), "what had finished was asked again"
    found = result.against("base")
    assert found is not None
    assert found.prompts == found.wins + found.losses + found.ties == len(PROMPTS)
    assert len(judge.asked) == 2 * (found.prompts - found.same)
    rows = list(result.rows())
    for row in rows:
        assert row["result"] == (
            "same" if row["answer_a"] == row["answer_b"] else "AB"[row["answer_a"] > row["answer_b"]]
        )
    # The answers are those of the tuned model and of its base: no engine computes these.
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    adapter = job._run.session.store.local_path(f"jobs/{job.id}/model")
    assert adapter is not None
    for name, folder in (("answer_a", adapter), ("answer_b", None)):
        expected = tokenizer.decode(greedy(tiny, folder, PROMPTS[0], TOKENS), skip_special_tokens=True)
        assert rows[0][name] == expected.strip()

    # Once more: no service, no call, the same record.
    asked = len(judge.asked)
    again = prepared.run()
    assert len(judge.asked) == asked
    assert again.comparisons == result.comparisons
    assert [one.key for one in job.evaluations()] == [result.key]

    # The gate reads it: the judge's rule makes no model much better.
    with pytest.raises(WinRateError, match=r"--prompts PROMPTS --judge"):
        job.deploy("gated", require_win_rate=0.99)
    assert Predictor.list() == []


def test_a_service_that_does_not_start_is_deleted(job: TrainingJob, judge: ChatServer, place: Path) -> None:
    with pytest.raises(ServiceError, match="context"):
        job.evaluate(["Why?"], judge=f"{judge.url}/strict", options={**OPTIONS, "max_model_len": 1_000_000})
    nothing_is_left(place)


@pytest.mark.thorough
@pytest.mark.skipif(
    next(engine for engine in describe_engines() if engine.name == "vllm").distribution is None,
    reason="vLLM is not installed",
)
def test_several_jobs_answer_from_one_service_on_vllm(
    place: Path, judge: ChatServer, base_model: Path, tmp_path: Path
) -> None:
    base = tiny_model(tmp_path / "base", base_model, head_dim=32)
    session = palate.session.get_default_session()
    jobs = [
        job_of(session, f"job{seed}", base, random_adapter(tmp_path / f"{seed}", base, seed=seed), system_prompt="")
        for seed in (1, 2)
    ]
    options = {"engine": "vllm", "dtype": "float32", "max_model_len": 512}
    prepared = prepare(
        jobs[0], prompts=PROMPTS, judge=f"{judge.url}/strict", against=[jobs[1].id], max_tokens=TOKENS, options=options
    )
    result = prepared.run()
    nothing_is_left(place)
    assert [(one.first, one.second) for one in result.comparisons] == [
        ("job1", "job2"),
        ("job1", "base"),
        ("job2", "base"),
    ]
    assert set(result.strengths) == {"job1", "job2", "base"}
    assert [one.key for one in jobs[1].evaluations()] == [result.key]
    assert len({row["answer_a"] for row in result.rows() if row["prompt"] == PROMPTS[0]}) == 2

    # A service that serves them answers as well; nothing is added to it.
    with jobs[0].deploy("assistant", options={**options, "verify": "off"}) as predictor:
        predictor.add_adapter("second", jobs[1])
        other = prepare(
            jobs[0],
            prompts=["And now?"],
            judge=f"{judge.url}/strict",
            against=["job2"],
            service=predictor,
            max_tokens=TOKENS,
        ).run()
        assert [one.name for one in predictor.adapters()] == ["second"]
        assert all(one.answers == 1 for one in other.models)
    nothing_is_left(place)


@pytest.mark.thorough
def test_held_out_preferences_are_scored_by_the_trainer_and_kept(place: Path, tiny: Path, tmp_path: Path) -> None:
    adapter = random_adapter(tmp_path / "held", tiny, seed=3)
    job = job_of(palate.session.get_default_session(), "held", tiny, adapter, lora_dim=8, lora_alpha=16)
    data = tmp_path / "held-out.json"
    data.write_text(json.dumps(preference_rows()))
    result = job.evaluate(data=data)
    scores = preference_scores(job, data)  # stored: nothing is started
    found = result.preferences["held"]
    assert found.seen == 0
    assert found.rows == len(scores.pairs.rows) == len(preference_rows())
    assert found.accuracy.value == pytest.approx(scores.accuracy.value)
    assert found.margin.low <= scores.margin.value <= found.margin.high
    assert result.comparisons == ()
    assert [one.key for one in job.evaluations()] == [result.key]
    nothing_is_left(place)
