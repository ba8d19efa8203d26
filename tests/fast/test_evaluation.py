"""Evaluations without an engine: figures, their record, the gate, what is read. The judge answers over real HTTP."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace as replace_fields
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from palate import Session, TrainingJob
from palate.cli.evaluate import _next_of, evaluate
from palate.cli.flags import options_of, reworded
from palate.comparison import compare
from palate.errors import (
    ConfigurationError,
    DamagedFilesError,
    DataError,
    EndpointError,
    EngineError,
    MissingDependencyError,
    WinRateError,
)
from palate.evaluation.arena import EvaluationProgress, Seat, answer_call
from palate.evaluation.gate import check_win_rate
from palate.evaluation.held_out import figures_of
from palate.evaluation.inputs import judge_of, read_labels
from palate.evaluation.lm_eval import check_lm_eval, failure, run_lm_eval
from palate.evaluation.preferences import PreferenceScores
from palate.evaluation.record import Comparison, EvaluationRecord, Figure, write
from palate.evaluation.result import Evaluation
from palate.evaluation.run import PreparedEvaluation, _facts, list_evaluations, prepare
from palate.evaluation.statistics import bradley_terry, cohens_kappa, length_controlled, win_rate
from palate.generate.chat_client import Endpoint
from palate.generate.completion_log import CompletionLog, Reply
from palate.generate.judge import agreed
from palate.predictor import ServedModel
from palate.runs.record import TOKEN_KEY, Record
from palate.runs.rollout import ask, change_update, update_to
from palate_recipes.preferences.load import read_rows
from palate_recipes.specs.evaluation import AnswerLogProbs, PairScores
from palate_recipes.specs.rollout import Version
from palate_recipes.specs.run import ServeManifest
from tests.support.chat import HANG, ChatServer, chat_server, completion, refusal, shown_answers
from tests.support.evaluations import alphabetical, compared, evaluation_record, job_of
from tests.support.fronted import fronted_service
from tests.support.manifests import serve_manifest

EVALSCOPE = json.loads((Path(__file__).parents[1] / "fixtures/evalscope/verdicts.json").read_text())
SCORES = {"first": 1.0, "second": 0.0}


# ── figures ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def evalscope_scores() -> dict[tuple[str, str], list[float]]:
    found: dict[tuple[str, str], list[float]] = {}
    for first, second, straight, swapped in EVALSCOPE["verdicts"]:
        found.setdefault((first, second), []).append(SCORES.get(agreed(straight, swapped), 0.5))
    return found


def test_win_rates_are_those_of_evalscopes_arena() -> None:
    scores = evalscope_scores()
    alone = {name: win_rate(scores[name, "base"]).value for name in ("first", "second")}
    assert alone == pytest.approx(EVALSCOPE["win_rates"]["alone"], abs=1e-5)
    strengths = bradley_terry(["first", "second", "base"], scores)
    ranked = {name: 1 / (1 + math.exp(strengths["base"] - strengths[name])) for name in ("first", "second")}
    assert ranked == pytest.approx(EVALSCOPE["win_rates"]["ranked"], abs=1e-4)
    assert sum(strengths.values()) == pytest.approx(0)


def test_the_interval_is_that_of_a_bootstrap_over_prompts() -> None:
    scores = [1.0] * 60 + [0.0] * 40
    found = win_rate(scores)
    generator = np.random.default_rng(3)
    means = np.sort([generator.choice(scores, len(scores)).mean() for _ in range(4000)])
    assert found.value == pytest.approx(0.6)
    assert (found.low, found.high) == pytest.approx((means[100], means[3900]), abs=0.011)
    assert win_rate(scores) == found


def test_the_interval_of_few_prompts_is_not_narrower_than_wilsons() -> None:
    found = win_rate([1.0, 1.0, 1.0, 0.5])
    assert (found.value, found.low) == pytest.approx((0.875, 0.3957731), abs=1e-6)
    for wins in range(9):
        for ties in range(9 - wins):
            scores = [1.0] * wins + [0.5] * ties + [0.0] * (8 - wins - ties)
            share, low, high = win_rate(scores)
            middle, room = share + 3.8415 / 16, 1.96 * math.sqrt(share * (1 - share) / 8 + 3.8415 / 256)
            assert 0.0 <= low <= (middle - room) / (1 + 3.8415 / 8) + 1e-4
            assert 1.0 >= high >= min(1.0, (middle + room) / (1 + 3.8415 / 8) - 1e-4)


@pytest.mark.parametrize(("score", "low", "high"), [(1.0, 0.025**0.1, 1.0), (0.0, 0.0, 1 - 0.025**0.1)])
def test_a_model_that_wins_everything_has_an_interval_too(score: float, low: float, high: float) -> None:
    assert tuple(win_rate([score] * 10)) == pytest.approx((score, low, high))
    tied = win_rate([0.5] * 10)
    assert tied.low < 0.5 < tied.high


def test_the_length_controlled_win_rate_is_that_without_the_judges_liking_for_length() -> None:
    generator = random.Random(0)
    differences = [generator.gauss(80, 100) for _ in range(4000)]
    spread = float(np.std(differences))
    likely = [1 / (1 + math.exp(-(0.4 + 2 * math.tanh(one / spread)))) for one in differences]
    scores = [float(generator.random() < one) for one in likely]
    found = length_controlled(scores, differences)
    assert found is not None
    assert win_rate(scores).value > 0.7
    assert found.value == pytest.approx(1 / (1 + math.exp(-0.4)), abs=0.03)
    assert found.low < found.value < found.high
    assert length_controlled([1.0, 0.0], [5, 5]) is None
    for same in (1.0, 0.5, 0.0):  # no length tells them apart, and no resample either
        assert length_controlled([same] * 20, differences[:20]) is None
    decided = length_controlled([1.0, 1.0, 0.0, 0.0], [9, 8, -9, -8])  # by length alone
    assert decided is not None
    assert decided.value == pytest.approx(0.5, abs=0.05)


def test_cohens_kappa() -> None:
    # 20 yes/yes, 5 yes/no, 10 no/yes, 15 no/no: observed 0.7, by chance 0.5
    first = ["yes"] * 25 + ["no"] * 25
    second = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    assert cohens_kappa(first, second) == pytest.approx(0.4)
    assert cohens_kappa(["A"] * 3, ["A"] * 3) is None
    assert cohens_kappa([], []) is None


# ── what is read ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("given", "url", "model"),
    [
        ("http://127.0.0.1:8000/v1/judge", "http://127.0.0.1:8000/v1", "judge"),
        ("https://h/compatible-mode/v1/Qwen/Qwen3-8B", "https://h/compatible-mode/v1", "Qwen/Qwen3-8B"),
        ("https://h/v1beta/openai/gemini", "https://h/v1beta/openai", "gemini"),
    ],
)
def test_a_judge_is_a_url_and_a_model(given: str, url: str, model: str) -> None:
    endpoint, name = judge_of(given)
    assert endpoint is not None
    assert (endpoint.base_url, name) == (url, model)


def test_a_judge_without_a_model_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="URL/MODEL"):
        judge_of("http://127.0.0.1:8000/v1")


def test_a_judge_that_cannot_be_reached_so_is_told_how(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    options = options_of(evaluate)
    for given, told in {
        "judge": "--judge 'URL/MODEL', such as http://127.0.0.1:8000/v1/judge",
        "127.0.0.1:18765/v1/judge": "--judge 'http://127.0.0.1:18765/v1/judge'",
        "api.openai.com/v1/gpt-4o": "--judge 'http://api.openai.com/v1/gpt-4o'",
    }.items():
        with pytest.raises(ConfigurationError) as refused:
            judge_of(given)
        assert told in reworded(str(refused.value), options)
        assert "--base-url" not in str(refused.value)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")
    assert judge_of("Qwen/Qwen3-8B")[1] == "Qwen/Qwen3-8B"


def test_labels_are_read_and_wrong_ones_are_refused(tmp_path: Path) -> None:
    row = {"prompt": "Is it?", "answer_a": "Yes.", "answer_b": "No."}
    file = tmp_path / "labels.jsonl"
    file.write_text(
        "\n".join(json.dumps({**row, **more}) for more in ({"label": "a"}, {"label": ""}, {"preference": "tie"}))
    )
    assert [(one.number, one.label) for one in read_labels(file)] == [(1, "A"), (3, "tie")]
    for wrong in ([{**row, "label": "C"}], [{"prompt": "x", "label": "A"}], [row]):
        with pytest.raises(DataError, match="label"):
            read_labels(wrong)


# ── an evaluation, with answers that are in the ledger already ──────────────────────────────────────────────────────


@pytest.fixture
def job(session: Session, tmp_path: Path) -> TrainingJob:
    return job_of(session, "one", tmp_path / "base", adapter(tmp_path / "one"), system_prompt="Be brief.")


def adapter(folder: Path) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8}))
    (folder / "adapter_model.safetensors").write_bytes(folder.name.encode())
    return folder


@pytest.fixture
def judge() -> Iterator[ChatServer]:
    with chat_server(alphabetical) as running:
        yield running


ANSWERS = {"one": ["a", "a", "z", "same"], "base": ["b", "bbb", "c", "same"], "two": ["0", "0", "0", "0"]}
PROMPTS = ["First?", "Second?", "Third?", "Fourth?"]


def answered(prepared: PreparedEvaluation) -> PreparedEvaluation:
    """The same evaluation, after its models have answered."""
    with CompletionLog(prepared.ledger) as ledger:
        for model in prepared.models:
            for prompt, text in zip(prepared.prompts, cycle(ANSWERS[model.name]), strict=False):
                call = answer_call(model.weights, prompt, prepared.settings)
                ledger.add(call.key(), Reply(text, "stop", 10, 5), model="default", temperature=0.0)
    return prepared


def prepared_for(job: TrainingJob, judge: ChatServer, **changes: Any) -> PreparedEvaluation:
    return answered(prepare(job, **{"prompts": PROMPTS, "judge": f"{judge.url}/strict", **changes}))


def test_figures_rows_cost_and_the_record(job: TrainingJob, judge: ChatServer) -> None:
    prepared = prepared_for(job, judge, prices={"strict": (2.0, 10.0)})
    plan = prepared.plan()
    assert (plan.prompts, plan.answers, plan.verdicts, plan.finished, plan.calls) == (4, 8, 8, 8, 12)
    assert judge.asked == []
    result = prepared.run()
    assert len(judge.asked) == 6  # both orders of three; identical answers are not asked about
    assert all("system: Be brief." in asked.body["messages"][0]["content"] for asked in judge.asked)
    found = result.against("base")
    assert found is not None
    assert (found.wins, found.ties, found.losses, found.same, found.prompts) == (2, 1, 1, 1, 4)
    assert result.win_rate is not None
    assert result.win_rate.value == 0.625
    assert found.seen_from("base").win_rate.value == 0.375
    assert [row["result"] for row in result.rows()] == ["A", "A", "B", "same"]
    assert result.to_rows()[2] == {
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Third?"}],
        "chosen": "c",
        "rejected": "z",
        "chosen_model": "base",
        "rejected_model": "one",
    }
    verdicts = next(row for row in result.record.spent if row.role == "verdicts")
    assert (verdicts.calls, verdicts.cost) == (6, pytest.approx((600 * 2 + 6 * 10) / 1e6))
    assert plan.cost is not None
    assert verdicts.cost is not None
    assert plan.cost > verdicts.cost
    assert plan.prompt_tokens >= 600

    # Again: nothing is asked, and the store has one evaluation.
    assert prepared.plan().calls == 0
    assert prepared.run().comparisons == result.comparisons
    assert len(judge.asked) == 6
    (kept,) = job.evaluations()
    assert kept.record.comparisons == result.record.comparisons
    assert "62.5%" in str(kept)
    assert "62.5%" in kept._repr_html_()
    # Another rubric asks the judge alone.
    assert prepare(job, prompts=PROMPTS, judge=f"{judge.url}/strict", rubric="Shorter.").plan().calls == 12


def test_flips_are_ties_and_unreadable_verdicts_too(
    job: TrainingJob, judge: ChatServer, capsys: pytest.CaptureFixture[str]
) -> None:
    judge.behaviour = lambda body, number: completion("A" if min(shown := shown_answers(body)) == shown[0] else "?")
    found = prepared_for(job, judge).run().against("base")
    assert found is not None
    assert (found.ties, found.flips, found.flip_rate) == (4, 3, 1.0)
    said = capsys.readouterr().err
    assert "3 of 6 verdicts could not be read" in said
    assert "judge strict is not usable" in said
    assert "on 100% of the judged prompts" in said
    assert len(judge.asked) == 9  # each unreadable one was asked for again
    assert prepared_for(job, judge).plan().calls == 0
    (kept,) = job.evaluations()
    assert "WARNING: one against base: 3 of 6 verdicts could not be read" in str(kept)
    assert "3 of 6 verdicts could not be read" in kept._repr_html_()


def test_a_judge_that_cannot_be_read_gives_no_figures(job: TrainingJob, judge: ChatServer) -> None:
    judge.behaviour = lambda body, number: completion("I do not know")
    with pytest.raises(DataError, match=r"3 of 3 comparisons have no verdict.*'I do not know'.*another judge"):
        prepared_for(job, judge).run()
    judge.behaviour = lambda body, number: completion("Well, both", finish="length")
    with pytest.raises(DataError, match=r"'Well, both'.*judge_max_tokens=9: raise"):
        prepared_for(job, judge, judge_max_tokens=9).run()
    assert job.evaluations() == []
    # One comparison of three: its verdicts are ties, and the others count.
    judge.behaviour = lambda body, number: (
        completion("?") if "Third?" in body["messages"][0]["content"] else alphabetical(body, number)
    )
    found = prepared_for(job, judge, rubric="Another.").run().against("base")
    assert found is not None
    assert (found.wins, found.ties, found.unreadable) == (2, 2, 2)


@pytest.fixture
def service(job: TrainingJob, session: Session) -> Iterator[Record]:
    """A running service that serves the job's model and its base."""
    served, given = job.served_model(), serve_manifest("svc")
    facts = {"model": served.model, "tuned_uri": served.tuned_uri, "tuned_digest": served.tuned_digest, "adapter": True}
    record = Record(session.store, "services", "svc")
    record.create(replace(given, body=replace(given.body, **facts)))
    session.store.put(record.key(TOKEN_KEY), b"a-token-for-tests", private=True)
    with fronted_service("a-token-for-tests", chats=True, adapts=True) as fronted:
        record.advance("Running", expect={"Creating"}, endpoint=fronted.endpoint, engine_id="elsewhere:1:2:x")
        yield record


def test_answers_of_a_service_that_is_updated_meanwhile_are_dropped(
    job: TrainingJob, judge: ChatServer, service: Record
) -> None:
    prepared = prepare(job, prompts=PROMPTS, judge=f"{judge.url}/strict", service="svc")

    def update(progress: EvaluationProgress) -> None:
        if progress.done == 3:  # version 2 comes and goes: a canary that was rolled back leaves the manifest as it was
            body = replace(service.serve_manifest().body, version=2)
            update = update_to(
                Version(body=body, outcome="asked", asked_at=1.0, changed_at=1.0), share=0.5, promote=False
            )
            ask(service, update)
            change_update(service, update.id, ended=True)

    with pytest.raises(ConfigurationError, match=r"service svc was changed while it answered.*8 answers are dropped"):
        prepared.run(update)
    assert prepared.ledger.read_bytes().count(b"\n") == 1
    assert judge.asked == []
    result = prepared.run()
    assert [row["answer_a"] for row in result.rows()] == [f"[su] default {prompt}." for prompt in PROMPTS]
    assert [row["answer_b"] for row in result.rows()] == [f"[su] base {prompt}." for prompt in PROMPTS]
    assert prepared.plan().calls == 0


def test_answers_of_a_service_are_kept_when_the_run_is_interrupted(
    job: TrainingJob, judge: ChatServer, service: Record
) -> None:
    prepared = prepare(job, prompts=PROMPTS, judge=f"{judge.url}/strict", service="svc", concurrency=1)

    def interrupt(progress: EvaluationProgress) -> None:
        if progress.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepared.run(interrupt)
    assert prepared.plan().finished == 3


def test_several_jobs_are_ranked_and_each_has_the_record(
    job: TrainingJob, judge: ChatServer, session: Session, tmp_path: Path
) -> None:
    two = job_of(session, "two", tmp_path / "base", adapter(tmp_path / "two"), system_prompt="Be brief.")
    result = prepared_for(job, judge, against=["two"]).run()
    assert [(one.first, one.second) for one in result.comparisons] == [("one", "two"), ("one", "base"), ("two", "base")]
    assert next(iter(result.strengths)) == "two"
    (of_two,) = two.evaluations()
    against = of_two.against("one")
    assert of_two.name == "two"
    assert against is not None
    assert against.wins == 4


def test_people_agree_with_the_judge_or_not(job: TrainingJob, judge: ChatServer) -> None:
    rows = [{**row, "label": label} for row, label in zip(prepared_for(job, judge).run().rows(), "AABA", strict=True)]
    asked = len(judge.asked)
    agreement = prepared_for(job, judge, labels=rows).run().agreement
    assert agreement is not None
    assert (agreement.rows, agreement.agreed) == (4, 3)
    # The rows had been judged with the same conversation; only the identical answers are new.
    assert len(judge.asked) == asked + 2


def test_a_judge_that_needs_a_key_says_so(job: TrainingJob, judge: ChatServer) -> None:
    judge.behaviour = lambda body, number: refusal(401)
    with pytest.raises(EndpointError, match=r"No key was sent \(none; --judge-api-key-env VARIABLE passes one\)"):
        prepared_for(job, judge).run()


def test_one_evaluation_of_a_job_runs_at_a_time(job: TrainingJob, judge: ChatServer) -> None:
    prepared = prepared_for(job, judge)
    with (
        CompletionLog(prepared.ledger),
        pytest.raises(ConfigurationError, match=r"another evaluation of job one runs: wait until it ends$"),
    ):
        prepared.run()


def test_calls_of_an_interrupted_evaluation_are_told_of(job: TrainingJob, judge: ChatServer) -> None:
    prepared_for(job, judge)  # its answers, and no evaluation
    said = palate("eval", "one").stderr
    assert "8 finished calls are kept" in said
    assert "no evaluation yet" in said


@pytest.mark.parametrize("service", ["", "svc"])
def test_an_interruption_says_only_what_was_done(
    job: TrainingJob, judge: ChatServer, session: Session, tmp_path: Path, service: str
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("First?")
    record = Record(session.store, "services", "svc")
    record.create(serve_manifest("svc"))
    prepared_for(job, judge, prompts=prompts, **({"service": service} if service else {}))
    asked = threading.Event()

    def silent(body: dict[str, Any], number: int) -> str:
        asked.set()
        return HANG

    judge.behaviour = silent
    command = [
        sys.executable,
        "-m",
        "palate.cli",
        "eval",
        "one",
        "--prompts",
        prompts,
        "--judge",
        f"{judge.url}/strict",
    ]
    command += ["--service", service] if service else []
    running = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        assert asked.wait(60)
        running.send_signal(signal.SIGINT)
        said = running.communicate(timeout=60)[1]
    finally:
        running.kill()
        running.wait()
    assert running.returncode == 130, said
    assert "finished calls are kept, and the same command continues" in said
    assert ("service that it started is deleted" in said) == (not service)
    assert record.manifest().name == "svc"


def test_a_plan_counts_held_out_pairs_and_refuses_data_without_any(job: TrainingJob, tmp_path: Path) -> None:
    rows = [{"prompt": f"Is {number} even?", "chosen": "Yes.", "rejected": "No."} for number in range(3)]
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text("\n".join(json.dumps(row) for row in rows))
    bad.write_text('{"prompt": "Is it?"}\n')
    assert "held-out pairs\t3" in palate("eval", "one", "--data", good, "--dry-run").stdout
    assert "bad.jsonl" in palate("eval", "one", "--data", bad, "--dry-run", code=1).stderr


def test_the_next_command_is_one_that_succeeds(job: TrainingJob) -> None:
    def following(**figures: Any) -> list[object]:
        record = evaluated(job, "a" * 16, at=1.0, **figures)
        return _next_of(Evaluation("one", record, job._run.record), "")

    assert following(low=0.5) == ["deploy", "one", "--require-win-rate", 0.5]
    assert following(low=0.49) == ["report", "one"]
    assert following(low=0.7, prompts=4) == ["report", "one"]
    assert following(low=0.7, failed=20) == ["report", "one"]


def test_what_is_missing_or_contradictory_is_refused(
    job: TrainingJob, judge: ChatServer, session: Session, tmp_path: Path
) -> None:
    url = f"{judge.url}/strict"
    other = job_of(session, "other", tmp_path / "base", adapter(tmp_path / "other"), system_prompt="Be long.")
    elsewhere = job_of(session, "elsewhere", tmp_path / "another", adapter(tmp_path / "elsewhere"))
    for match, arguments in {
        "judge is missing": {"prompts": PROMPTS},
        "prompts is missing": {"judge": url},
        "nothing to evaluate": {},
        "different system prompts": {"prompts": PROMPTS, "judge": url, "against": [other]},
        "same base": {"prompts": PROMPTS, "judge": url, "against": [elsewhere]},
        "twice": {"prompts": PROMPTS, "judge": url, "against": ["one"]},
        "rubric is empty": {"prompts": PROMPTS, "judge": url, "rubric": " "},
        "temperature=3": {"prompts": PROMPTS, "judge": url, "temperature": 3},
        "not used": {"prompts": PROMPTS, "judge": url, "prices": {"x": (1, 1)}},
    }.items():
        with pytest.raises(ConfigurationError, match=match):
            prepare(job, **arguments)  # type: ignore[arg-type]
    assert judge.asked == []


def test_lm_eval_that_is_not_installed_is_said_before_anything_starts(
    job: TrainingJob, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    try:
        check_lm_eval()
    except MissingDependencyError:
        with pytest.raises(MissingDependencyError, match="pip install"):
            job.evaluate(lm_eval=["arc_easy"])
    else:
        pytest.skip("lm-eval is installed")


def test_an_engine_that_cannot_run_lm_eval_is_rejected_before_anything_starts(job: TrainingJob) -> None:
    with pytest.raises(ConfigurationError, match="--engine vllm"):
        prepare(job, lm_eval=["arc_easy"], options={"engine": "transformers"})


REJECTION = (
    "2026-11-29:18:09:52 WARNING  [models.api_models:521] API request failed! Status code: 400, Response text: "
    '{"error": {"message": "logprobs=1 is not supported. Omit it.", "type": "BadRequestError", "param": "logprobs", '
    '"code": 400}}. Retrying...\n'
    "2026-11-29:18:09:52 ERROR    [models.api_models:557] Exception:ClientResponseError(), (no outputs), retrying.\n"
)
GIVEN_UP = """Traceback (most recent call last):
  File "lm_eval/models/api_models.py", line 526, in amodel_call
    response.raise_for_status()
aiohttp.client_exceptions.ClientResponseError: 400, message='Bad Request', url='http://127.0.0.1:1/v1/completions'
"""
AFTERMATH = """Task exception was never retrieved
future: <Task finished name='Task-19' exception=ServerDisconnectedError('Server disconnected')>
Traceback (most recent call last):
  File "aiohttp/client_reqrep.py", line 745, in start
    message, payload = await protocol.read()
aiohttp.client_exceptions.ServerDisconnectedError: Server disconnected
"""


def test_a_failure_of_lm_eval_says_what_the_service_rejected_and_no_connection_that_lm_eval_closed() -> None:
    # As lm-eval 0.4.13 prints it, shortened. Before, only the last of these lines were shown.
    said = failure(REJECTION * 3 + GIVEN_UP + AFTERMATH * 4)
    assert "HTTP 400 (3 times): logprobs=1 is not supported. Omit it." in said
    assert "ClientResponseError: 400, message='Bad Request'" in said
    assert "ServerDisconnectedError" not in said


def test_a_failure_of_lm_eval_shows_a_body_without_a_message_and_a_traceback_that_comes_last() -> None:
    rejection = "API request failed! Status code: 502, Response text: <html>\nBad Gateway</html>. Retrying...\n"
    assert "HTTP 502 (1 times): <html>\nBad Gateway</html>" in failure(rejection + GIVEN_UP)
    assert failure(AFTERMATH + GIVEN_UP).endswith("url='http://127.0.0.1:1/v1/completions'")
    assert failure("no such task\n") == "Its last lines:\n  no such task"


LM_EVAL = """#!{python}
import json, pathlib, sys, time
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
print("asked for", given["--tasks"], flush=True)
if given["--tasks"] == "endless":
    time.sleep(600)
out = pathlib.Path(given["--output_path"]) / "m"
out.mkdir(parents=True)
found = {{given["--tasks"]: {{"acc,none": 0.5, "acc_stderr,none": float("nan"), "alias": "x"}}}}
(out / "results_1.json").write_text(json.dumps({{"results": found}}))
"""


def test_metrics_of_lm_eval_its_time_limit_and_paths_with_commas(
    job: TrainingJob, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "programs" / "lm_eval"
    program.parent.mkdir()
    program.write_text(LM_EVAL.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program.with_name("python")))
    seat, served, session = (
        Seat(Endpoint("http://127.0.0.1:9/v1", "a-key"), "default"),
        job.served_model(),
        job._run.session,
    )
    found = run_lm_eval(["one_row"], seat, served, session)
    assert found == {"one_row": {"acc,none": 0.5}}
    assert "acc_stderr,none left out" in capsys.readouterr().err
    write(job._run.record, replace(evaluated(job, "a" * 16, 0.5, at=1.0), tasks={"one": found}), [])
    assert job.evaluations()[0].record.tasks == {"one": found}
    with pytest.raises(EngineError, match=r"(?s)did not end within 2 seconds.*\n  asked for endless"):
        run_lm_eval(["endless"], seat, served, session, time_limit_s=2.0)
    with pytest.raises(ConfigurationError, match="comma"):
        prepare(job, lm_eval=[str(tmp_path / "a,tokenizer=b.yaml")])
    (tmp_path / "a,b" / "model").mkdir(parents=True)
    there = replace_fields(served, tuned_uri=f"file://{tmp_path}/a,b/model")
    with pytest.raises(ConfigurationError, match="comma"):
        run_lm_eval(["one_row"], seat, there, session)


def test_held_out_scores_get_intervals(job: TrainingJob) -> None:
    pairs = PairScores(
        rows=[1, 2, 3, 4],
        chosen_tokens=[2] * 4,
        rejected_tokens=[2] * 4,
        tuned=AnswerLogProbs(chosen=[-1.0, -2.0, -3.0, -4.0], rejected=[-3.0, -3.0, -3.5, -3.0]),
        base=AnswerLogProbs(chosen=[-2.0, -2.0, -3.0, -4.0], rejected=[-2.5, -1.0, -2.0, -3.0]),
        losses=None,
        loss=0.5,
        base_loss=math.log(2),
        file_rows=5,
        truncated=[2],
        dropped=[5],
        cached=0,
        packed=True,
        notes=[],
        seconds=1.0,
    )
    scores = PreferenceScores(
        name="one-abc",
        job="one",
        checkpoint="",
        strategy="dpo",
        beta=0.1,
        loss_type="sigmoid",
        pairs=pairs,
        skipped=1,
        seen_rows=(2,),
        seen_prompts=1,
    )
    found = figures_of(scores, seed=0)
    assert (found.rows, found.skipped, found.dropped, found.truncated, found.seen) == (4, 1, 1, 1, 1)
    assert (found.accuracy.value, found.base_accuracy.value, found.reward_accuracy.value) == (0.75, 0.25, 0.75)
    assert found.margin.value == pytest.approx(scores.margin.value)
    assert found.margin.low < found.margin.value < found.margin.high
    assert found.reward_margin.value == pytest.approx(0.1 * (1.5 + 2.0 + 1.5 + 0.0) / 4)
    diverged = replace(pairs, tuned=replace(pairs.tuned, chosen=[-1.0, math.nan, -3.0, -4.0]))
    left = figures_of(replace_fields(scores, pairs=diverged), seed=0)
    assert (left.rows, left.accuracy.value) == (3, pytest.approx(2 / 3))
    assert math.isfinite(left.margin.low)
    record = replace(evaluated(job, "d" * 16, 0.5, at=1.0), preferences={"one": found})
    write(job._run.record, record, [])
    (kept,) = job.evaluations()
    assert kept.preferences == {"one": found}
    write(job._run.record, replace(record, comparisons=(), tasks={"one": {"arc_easy": {"acc,none": 0.5}}}), [])
    listed = palate("eval", "one").stdout
    assert f"held-out accuracy\t{found.accuracy}\t4" in listed
    assert "arc_easy acc,none\t0.5" in listed
    assert "on 4 held-out pairs; WARNING: 1 are in the training data" in str(kept)


def palate(*words: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "palate.cli", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == code, done.stderr
    return done


def test_the_command_plans_prints_and_lists(job: TrainingJob, judge: ChatServer, tmp_path: Path) -> None:
    prompts, compared, pairs = (tmp_path / name for name in ("prompts.txt", "compared.jsonl", "pairs.jsonl"))
    prompts.write_text("\n".join(PROMPTS))
    prepared_for(job, judge)  # its answers are there, so no service is started
    words = ["eval", "one", "--prompts", prompts, "--judge", f"{judge.url}/strict", "--price", "strict=2,10"]
    planned = palate(*words, "--dry-run")
    assert "remaining calls, maximum\t12" in planned.stdout
    assert "cost, maximum" in planned.stdout
    assert f"--judge {judge.url}/strict" in planned.stderr
    assert judge.asked == []
    done = palate(*words, "--rows", compared, "--pairs", pairs)
    assert "one\tbase\t62.5%" in done.stdout
    assert "up to 12 calls (8 already finished)" in done.stderr
    assert "next: palate report one" in done.stderr.replace(
        f"{sys.executable} -m palate.cli", "palate"
    )  # 4 prompts show nothing
    assert [json.loads(line)["result"] for line in compared.read_text().splitlines()] == ["A", "A", "B", "same"]
    trained = read_rows(pairs)
    assert [row.chosen for row in trained] == ["a", "a", "c"]
    assert "finished calls are kept" not in palate("eval", "one").stderr
    listed = json.loads(palate("eval", "one", "--json").stdout)
    assert listed[0]["comparisons"][0]["win_rate"]["value"] == 0.625
    assert "62.5%" in palate("eval", "one").stdout
    # The gate, in the words of the command line.
    refused = palate("deploy", "one", "--require-win-rate", "0.9", code=1)
    assert "--require-win-rate 0.9" in refused.stderr
    assert "palate eval one --prompts" in refused.stderr
    assert palate("services", "--json").stdout.strip() == "[]"


# ── the gate ────────────────────────────────────────────────────────────────────────────────────────────────────────


def evaluated(
    job: TrainingJob,
    key: str,
    low: float,
    *,
    at: float,
    digest: str | None = None,
    prompts: int = 100,
    failed: int = 0,
    created_at: float | None = None,
    settings: dict[str, Any] | None = None,
) -> EvaluationRecord:
    """Writes an evaluation of the job against its base, at a time by the store's clock."""
    prepared = prepare(job, data="held-out.jsonl")

    one, base = (_facts(model) for model in prepared.models)
    figure = Figure(value=min(1.0, low + 0.1), low=low, high=min(1.0, low + 0.2))
    counts = {**dict.fromkeys(("wins", "losses", "flips", "same", "unreadable"), 0), "failed": failed}
    record = EvaluationRecord(
        key=key,
        created_at=at if created_at is None else created_at,
        base=job.manifest.body.model,
        models=(replace(one, digest=digest or one.digest), base),
        comparisons=(Comparison(first="one", second="base", prompts=prompts, ties=prompts, win_rate=figure, **counts),),
        judge="strict",
        settings=settings or {},
    )
    write(job._run.record, record, [])
    path = job._run.session.store.local_path(f"jobs/{job.id}/evaluations/{key}.json")
    assert path is not None
    os.utime(path, (at, at))
    return record


def test_a_deploy_needs_an_evaluation_of_exactly_this_model(job: TrainingJob) -> None:
    served = job.served_model()
    with pytest.raises(WinRateError, match="was never evaluated against"):
        job.deploy("svc", require_win_rate=0.55)
    evaluated(job, "a" * 16, 0.7, at=1.0, digest="f" * 64)
    with pytest.raises(WinRateError, match="palate eval one --prompts"):
        check_win_rate(job, served, 0.55)
    evaluated(job, "b" * 16, 0.56, at=2.0)
    check_win_rate(job, served, 0.55)
    with pytest.raises(WinRateError, match=r"begins at 0\.560"):
        check_win_rate(job, served, 0.57)
    evaluated(job, "c" * 16, 0.4, at=3.0)  # the last one counts
    with pytest.raises(WinRateError, match=r"begins at 0\.400.*cccc"):
        check_win_rate(job, served, 0.55)
    with pytest.raises(ConfigurationError, match="out of range"):
        check_win_rate(job, served, 55)
    assert [one.key[0] for one in list_evaluations(job)] == ["c", "b", "a"]


def test_the_last_evaluation_is_that_of_the_stores_clock(job: TrainingJob) -> None:
    evaluated(job, "a" * 16, 0.7, at=1.0, created_at=9e9)  # of a client whose clock is fast
    evaluated(job, "b" * 16, 0.4, at=2.0)
    with pytest.raises(WinRateError, match=r"begins at 0\.400.*bbbb"):
        check_win_rate(job, job.served_model(), 0.55)
    assert [one.key[0] for one in list_evaluations(job)] == ["b", "a"]
    assert figures_compared(job) == pytest.approx(0.5)


def figures_compared(job: TrainingJob) -> float | None:
    return compare([job], metric="win_rate").jobs[0].figures.get("win_rate")


def test_few_prompts_and_many_failures_show_nothing(job: TrainingJob) -> None:
    served = job.served_model()
    evaluated(job, "a" * 16, 0.7, at=1.0, prompts=19)
    with pytest.raises(WinRateError, match=r"only 19 prompts, and at least 20 are needed.*palate eval one --prompts"):
        check_win_rate(job, served, 0.55)
    evaluated(job, "b" * 16, 0.7, at=2.0, prompts=94, failed=6)
    with pytest.raises(WinRateError, match=r"6 of 100 prompts failed, more than 5%"):
        check_win_rate(job, served, 0.55)
    evaluated(job, "c" * 16, 0.7, at=3.0, prompts=95, failed=5)
    check_win_rate(job, served, 0.55)


def test_a_deploy_with_other_settings_than_the_evaluation_is_noted(
    job: TrainingJob, judge: ChatServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages }}")
    many = [f"Is {number} even?" for number in range(20)]
    options = {"dtype": "float32", "chat_template": template, "engine_args": ["--seed", "3"]}
    made = prepared_for(job, judge, prompts=many, options=options).run().record.settings["service"]
    assert (made["dtype"], made["engine_args"]) == ("float32", "--seed 3")
    served = job.served_model()
    capsys.readouterr()
    check_win_rate(job, served, 0.0, options=options)
    said = capsys.readouterr().err
    assert "one may be served: win-rate" in said
    assert "on 20 prompts" in said
    assert "with judge strict" in said
    assert "WARNING" not in said
    template.write_text("{{ messages[0] }}")
    check_win_rate(job, served, 0.0, options={**options, "dtype": "auto", "quantization": "fp8"})
    said = capsys.readouterr().err
    assert "dtype 'float32' instead of the default" in said
    assert "quantization the default instead of 'fp8'" in said
    assert "chat_template" in said
    assert "engine_args" not in said
    assert "system_prompt" not in said


def test_an_update_needs_an_evaluation_against_what_the_service_serves(
    job: TrainingJob, judge: ChatServer, session: Session, tmp_path: Path
) -> None:
    two = job_of(session, "two", tmp_path / "base", adapter(tmp_path / "two"), system_prompt="Be brief.")
    prepared_for(job, judge, against=["two"], prompts=[f"Is {number} even?" for number in range(20)]).run()
    served = two.served_model()

    def serving(model: ServedModel | None, **labels: str) -> ServeManifest:
        given = serve_manifest("svc")
        facts = (
            {"model": served.model}
            if model is None
            else {
                "model": model.model,
                "tuned_uri": model.tuned_uri,
                "tuned_digest": model.tuned_digest,
                "adapter": True,
            }
        )
        return replace(given, labels=labels, body=replace(given.body, **facts))

    # two wins all prompts: the exact interval begins at 0.025 ** (1 / 20).
    check_win_rate(two, served, 0.83, instead_of=serving(job.served_model(), job="one"))
    with pytest.raises(WinRateError, match=r"against one, which service svc serves, begins|win-rate against one"):
        check_win_rate(two, served, 0.84, instead_of=serving(job.served_model(), job="one"))
    check_win_rate(two, served, 0.83, instead_of=serving(None))
    check_win_rate(two, served, 1.0, instead_of=serving(served, job="two"))  # it is served already
    three = job_of(session, "three", tmp_path / "base", adapter(tmp_path / "three"))
    with pytest.raises(WinRateError, match=r"palate eval two three --prompts"):
        check_win_rate(two, served, 0.1, instead_of=serving(three.served_model(), job="three"))


def test_no_escape_sequence_of_a_store_reaches_the_terminal(job: TrainingJob) -> None:
    figure = Figure(value=0.5, low=0.4, high=0.6)
    against = compared("\x1b[2Jone", "base\nforged line", figure)
    record = evaluation_record("k", "one", "base", comparisons=(against,), strengths={"\x9bone": 0.5})
    shown = str(Evaluation(job.id, record, job._run.record))
    assert not set(shown) & {"\x1b", "\x9b"}
    assert len(shown.splitlines()) == 2
    assert shown.startswith(r"\x1b[2Jone against base forged line: win-rate 50.0%")


def test_a_damaged_evaluation_hides_no_other_and_passes_no_gate(job: TrainingJob) -> None:
    evaluated(job, "a" * 16, 0.7, at=1.0)
    record = job._run.record
    record.store.put(record.key("evaluations", "x.json"), b"{}")
    listed = palate("eval", "one")
    assert "aaaa" in listed.stdout
    assert "evaluations/x.json is damaged" in listed.stderr
    with pytest.raises(DamagedFilesError, match=r"evaluations/x\.json is damaged"):
        check_win_rate(job, job.served_model(), 0.55)  # it may be the last one of this model
    evaluated(job, "b" * 16, 0.7, at=9e9)
    check_win_rate(job, job.served_model(), 0.55)


def test_a_figure_that_is_not_finite_is_not_written(job: TrainingJob) -> None:
    record = evaluated(job, "a" * 16, 0.7, at=1.0)
    broken = replace(record, key="b" * 16, strengths={"one": math.nan})
    with pytest.raises(DataError, match="cannot be written"):
        write(job._run.record, broken, [])
    assert [one.key[0] for one in list_evaluations(job)] == ["a"]
