"""What `compare` says of jobs in a store, whose records are written here as a runner writes them."""

from __future__ import annotations

import csv
import json
import math
from typing import Any

import pytest
from msgspec.structs import replace

from palate import Session, TrainingJob, compare
from palate.cli import main
from palate.errors import ConfigurationError, JobNotReadyError, RunNotFoundError
from palate.evaluation.record import Figure
from palate.evaluation.record import write as write_evaluation
from palate.runs.record import Record
from palate_recipes.specs.codec import encode
from palate_recipes.specs.run import State
from palate_recipes.specs.train import InputFile
from tests.support.evaluations import compared, evaluation_record
from tests.support.html import check_html
from tests.support.manifests import train_manifest


def write(
    session: Session,
    name: str,
    events: list[dict[str, Any]],
    *,
    state: State = "Succeeded",
    data: str = "a" * 64,
    **hyperparameters: Any,
) -> Record:
    record = Record(session.store, "jobs", name)
    inputs = {"train": InputFile(uri="file:///prefs.json", sha256=data)}
    record.create(train_manifest(name, hyperparameters={"training_strategy": "dpo", **hyperparameters}, inputs=inputs))
    record.append("metrics", 1, "".join(json.dumps(event) + "\n" for event in events).encode())
    record.advance("Running", expect={"Creating"})
    if state != "Running":
        record.advance(state, expect={"Running"}, reason="the loss is NaN" if state == "Failed" else "")
    return record


def evaluation(step: int, loss: float, accuracy: float = 0.5) -> dict[str, Any]:
    return {"kind": "eval", "step": step, "eval_loss": loss, "eval_rewards/accuracies": accuracy}


def ended(step: int, **more: Any) -> dict[str, Any]:
    return {"kind": "end", "step": step, "seconds": 9.5, "tokens_per_s": 100.0, "final_loss": 0.4, **more}


@pytest.fixture
def jobs(session: Session) -> list[str]:
    write(session, "late", [evaluation(1, 0.5, 0.9), evaluation(2, 0.7, 0.6), ended(2)], learning_rate=1e-4)
    best = [evaluation(1, 0.6, 0.8), evaluation(2, 0.65, 0.7), ended(2, best_step=1)]
    write(session, "best", best, learning_rate=1e-3, lora_dim=8)
    write(session, "failed", [{"kind": "train", "step": 1, "loss": None}], state="Failed", data="b" * 64)
    return ["late", "best", "failed"]


def test_jobs_are_ranked_and_only_what_differs_is_shown(session: Session, jobs: list[str]) -> None:
    comparison = compare(jobs)
    assert comparison.metric == "eval_loss"
    assert [job.id for job in comparison.jobs] == ["best", "late", "failed"]
    assert comparison.differing == ["learning_rate", "lora_dim", "data train"]
    figures = {job.id: job.figures for job in comparison.jobs}
    assert (figures["late"]["eval_loss"], figures["late"]["best_eval_loss"]) == (0.7, 0.5)
    # The model is that of step 1: the figures are of its evaluation.
    assert (figures["best"]["eval_loss"], figures["best"]["eval_rewards/accuracies"]) == (0.6, 0.8)
    assert "eval_loss" not in figures["failed"]
    assert comparison.jobs[-1].reason == "the loss is NaN"
    assert comparison.best.id == "best"
    assert [job.id for job in compare(jobs, metric="best_eval_loss").jobs][:2] == ["late", "best"]
    assert [job.id for job in compare(jobs, metric="eval_rewards/accuracies").jobs][:2] == ["best", "late"]
    with pytest.raises(JobNotReadyError, match=r"no job has succeeded with win_rate: .*failed is Failed"):
        _ = compare(jobs, metric="win_rate").best


def test_losses_of_different_loss_types_are_not_ranked_against_each_other(
    session: Session, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    both = "losses do not compare, because loss_type differs (sigmoid; sigmoid,sft)"
    write(session, "plain", [evaluation(1, 0.48, 0.6) | {"eval_rewards/margins": 0.1}, ended(1)])
    more = {"loss_type": "sigmoid,sft", "loss_weights": [1.0, 1.0]}
    write(session, "with-sft", [evaluation(1, 3.958, 0.6) | {"eval_rewards/margins": 0.2}, ended(1)], **more)
    comparison = compare(["plain", "with-sft"])
    assert comparison.metric == "eval_rewards/accuracies"
    assert [job.id for job in comparison.jobs] == ["with-sft", "plain"]  # by the margin: the accuracies are the same
    assert comparison.note == f"{both}: the jobs are ranked by eval_rewards/accuracies"
    assert comparison.is_ranked
    # A metric that is asked for ranks, and no job is called the best.
    assert not compare(["plain", "with-sft"], metric="eval_loss").is_ranked
    write(session, "not-evaluated", [ended(1)], dpo_beta=0.5)
    unranked = compare(["with-sft", "plain", "not-evaluated"])
    assert [job.id for job in unranked.jobs] == ["with-sft", "plain", "not-evaluated"]
    assert (unranked.metric, unranked.is_ranked) == ("", False)
    assert "dpo_beta differs (0.1; 0.5): the jobs are not ranked" in unranked.note
    assert [job["rank"] for job in unranked.as_dict()["jobs"]] == [None] * 3
    assert str(unranked).splitlines()[-1] == unranked.note
    assert check_html(unranked._repr_html_()).find(".//p") is not None
    with pytest.raises(JobNotReadyError, match="no job is the best: losses do not compare"):
        _ = unranked.best
    monkeypatch.setattr("sys.argv", ["palate", "compare", "with-sft", "plain", "not-evaluated"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 0
    told = capsys.readouterr().err
    assert "note: losses do not compare" in told
    assert "deploy" not in told


def test_json_csv_and_html_have_the_same_table(session: Session, jobs: list[str]) -> None:
    comparison = compare([TrainingJob.get(name) for name in jobs])
    values = json.loads(json.dumps(comparison.as_dict()))
    assert [(job["id"], job["rank"]) for job in values["jobs"]] == [("best", 1), ("late", 2), ("failed", None)]
    table = list(csv.reader(comparison.to_csv().splitlines()))
    assert table[0] == comparison.columns
    assert [row[0] for row in table[1:]] == ["best", "late", "failed"]
    html = check_html(comparison._repr_html_())
    assert len(list(html.iter("tr"))) == 4
    assert str(comparison).splitlines()[0].split()[:3] == ["job", "state", "learning_rate"]


def test_the_newest_readable_evaluation_gives_the_win_rate(session: Session, jobs: list[str]) -> None:
    store = session.store
    against = compared("base", "late", Figure(value=0.25, low=0.1, high=0.4))
    write_evaluation(Record(store, "jobs", "late"), evaluation_record("k", "late", "base", comparisons=(against,)), [])
    store.put("jobs/best/evaluations/damaged.json", b'{"comparisons": [{"first": 1}]}')
    store.put("jobs/best/evaluations/deep.json", b"[" * 100_000)
    comparison = compare(["best", "late"], metric="win_rate")
    assert [(job.id, job.figures.get("win_rate")) for job in comparison.jobs] == [("late", 0.75), ("best", None)]


@pytest.mark.parametrize("rate", [7.0, -0.25, math.inf])
def test_a_win_rate_that_cannot_be_does_not_spoil_the_order(session: Session, jobs: list[str], rate: float) -> None:
    for name, value, at in (("late", 0.25, 1.0), ("best", 0.75, 1.0), ("best", rate, 2.0)):
        against = compared(name, "base", Figure(value=value, low=0.1, high=0.9))
        found = evaluation_record(f"k{at:.0f}", name, "base", comparisons=(against,))
        # Not by `write`, which refuses a figure that is not finite.
        content = encode(replace(found, created_at=at)).replace(b'"value":null', b'"value":1e999')
        session.store.put(f"jobs/{name}/evaluations/k{at:.0f}.json", content)
    comparison = compare(["late", "best", "failed"], metric="win_rate")
    assert [(job.id, job.figures.get("win_rate")) for job in comparison.jobs] == [
        ("best", 0.75),
        ("late", 0.25),
        ("failed", None),
    ]


def test_what_a_store_holds_is_shown_as_text(session: Session) -> None:
    write(session, "a", [ended(1, reading={"verdict": "=1+1<script>\x1b[2J", "text": ""})])
    comparison = compare("a")
    check_html(comparison._repr_html_())
    assert list(csv.reader(comparison.to_csv().splitlines()))[1][-1].startswith("'=1+1")


def test_no_escape_sequence_of_a_store_reaches_the_terminal(session: Session) -> None:
    write(
        session,
        "a",
        [ended(1, reading={"verdict": "\r=1+1\x1b[2J\nforged row", "text": ""})],
        system_prompt="\x1b]52;c;\a",
    )
    record = write(session, "b", [ended(1)], system_prompt="\x9b2J")
    assert record.note(details={"versions": {"\x1b[1mtorch": "1\x1b[8m"}})
    comparison = compare(["a", "b"])
    table, text = str(comparison), comparison.to_csv()
    assert len(table.splitlines()) == 3
    for shown in (table, text):
        assert not set(shown) & {"\x1b", "\x9b", "\x07", "\r"}
        assert r"\x1b]52;c;\x07" in shown
        assert r"version \x1b[1mtorch" in shown
        assert r"1\x1b[8m" in shown
    assert r"'=1+1\x1b[2J" in text


def test_mistakes(session: Session, jobs: list[str]) -> None:
    with pytest.raises(ConfigurationError, match="jobs is empty"):
        compare([])
    with pytest.raises(ConfigurationError, match="job late is given twice"):
        compare(["late", "late"])
    with pytest.raises(ConfigurationError, match=r"metric='loss' is unknown: .*expected one of eval_loss"):
        compare(jobs, metric="loss")
    with pytest.raises(RunNotFoundError):
        compare(["none"])
    assert not compare(jobs, metric="win_rate").is_ranked  # none was evaluated
