"""Experiments with the real trainer and a tiny model: a sweep that trains nothing twice, and files of gllm-training from end to end."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from palate import ExperimentFile, ModelTrainingRecipe, Session, TrainingJob, compare
from palate.weights import SETTING
from tests.slow.conftest import processes_of, until
from tests.support.html import check_html
from tests.support.rows import ROWS, preference_rows
from tests.support.sheets import Spreadsheet, as_pem, make_key, running_sheets
from tests.support.trainings import adapter, last_checkpoint

pytestmark = pytest.mark.slow

SWEEP = """
defaults:
  model_name: tiny
  model_uri: MODEL
  inputs: {train: prefs.json, validation: held-out.json}
  hyperparameters:
    training_strategy: dpo
    per_device_train_batch_size: 4
    gradient_accumulation_steps: 1
    precision: float32
four:
  labels: {team: red}
  hyperparameters:
    max_steps: 2
    learning_rate: [1e-3, 1e-2]
    _: [{lora_dim: 4, lora_alpha: 4}, {lora_dim: 8, lora_alpha: 8}]
long:
  hyperparameters: {max_steps: 5000, save_steps: 5, logging_steps: 1, learning_rate: 1e-5}
"""


@pytest.fixture
def file(tmp_path: Path, tiny: Path) -> Path:
    (tmp_path / "prefs.json").write_text(json.dumps(preference_rows()))
    (tmp_path / "held-out.json").write_text(json.dumps(preference_rows(20)[ROWS:]))
    path = tmp_path / "experiments.yml"
    path.write_text(SWEEP.replace("MODEL", str(tiny)))
    return path


def palate(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "palate.cli", *arguments], capture_output=True, text=True, timeout=300)


def test_a_sweep_scores_the_reference_once_and_trains_nothing_twice(
    session: Session, home: Path, file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    experiment = ExperimentFile.load(file, "four")
    result = experiment.run(jobs=3)
    assert [run.state for run in result.runs] == ["Succeeded"] * 4
    assert not any(run.is_reused for run in result.runs)
    assert [run.varied for run in result.runs] == [
        {"learning_rate": rate, "lora_dim": dim, "lora_alpha": dim} for rate in (1e-3, 1e-2) for dim in (4, 8)
    ]
    jobs = [run.job for run in result.runs if run.job]
    counts = [(job.metrics()[0]["reference_cached_rows"], job.metrics()[0]["reference_scored_rows"]) for job in jobs]
    rows = ROWS + 8
    assert counts == [(0, rows), *[(rows, 0)] * 3]
    assert jobs[0].manifest.labels.items() >= {"team": "red", "experiment": "four"}.items()

    losses = {job.id: next(e for e in reversed(job.metrics()) if e["kind"] == "eval")["eval_loss"] for job in jobs}
    comparison = result.comparison
    assert [job.figures["eval_loss"] for job in comparison.jobs] == sorted(losses.values())
    assert result.best.id == min(losses, key=lambda name: losses[name])
    assert comparison.differing == ["learning_rate", "lora_dim", "lora_alpha"]
    assert all(job.figures.keys() >= {"eval_rewards/accuracies", "final_loss", "seconds"} for job in comparison.jobs)
    assert capfd.readouterr().out == ""

    again = experiment.run()
    assert [(run.is_reused, run.job.id if run.job else "") for run in again.runs] == [(True, job.id) for job in jobs]
    assert len(TrainingJob.list()) == 4

    listed = compare([job.id for job in jobs], metric="seconds")
    assert [row[0] for row in listed.rows()] == [
        job.id for job in sorted(listed.jobs, key=lambda j: j.figures["seconds"])
    ]
    parsed = list(csv.reader(listed.to_csv().splitlines()))
    assert parsed[0] == listed.columns
    assert len(parsed) == 5
    assert "".join(check_html(listed._repr_html_()).itertext()).count(jobs[0].id) == 1

    done = palate("runs", "compare", *(job.id for job in jobs), "--json")
    assert done.returncode == 0, done.stderr
    assert [one["id"] for one in json.loads(done.stdout)["jobs"]] == [job.id for job in comparison.jobs]
    done = palate("run-experiment", str(file), "four", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "all runs are in the store" in done.stderr
    until(lambda: processes_of(home) == [], timeout_s=30)


@pytest.mark.thorough
def test_a_search_goes_on_with_further_trials(session: Session, home: Path, file: Path) -> None:
    pytest.importorskip("optuna")
    space = "{max_steps: 1, learning_rate: {min: 1e-5, max: 1e-2, log: true}}"
    search = f"search:\n  search: tpe\n  trials: 2\n  hyperparameters: {space}\n"
    file.write_text(file.read_text() + search)
    first = ExperimentFile.load(file, "search").run(jobs=2)
    assert [run.state for run in first.runs] == ["Succeeded"] * 2
    rates = [run.varied["learning_rate"] for run in first.runs]
    assert len(set(rates)) == 2
    file.write_text(file.read_text().replace("trials: 2", "trials: 3"))
    second = ExperimentFile.load(file, "search").run(jobs=1)
    assert [run.is_reused for run in second.runs] == [True, True, False]
    assert [run.varied["learning_rate"] for run in second.runs][:2] == rates
    assert len(TrainingJob.list()) == 3
    until(lambda: processes_of(home) == [], timeout_s=30)


@pytest.mark.thorough
def test_ctrl_c_leaves_the_job_and_the_same_command_follows_and_resumes_it(
    session: Session, home: Path, file: Path
) -> None:
    command = [sys.executable, "-m", "palate.cli", "run-experiment", str(file), "long"]

    def begin() -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A shell's background job ignores SIGINT, and so would its children.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    program = begin()
    try:
        until(lambda: bool(jobs := TrainingJob.list()) and len(jobs[0].metrics()) > 1, timeout_s=240)
        program.send_signal(signal.SIGINT)
        _, said = program.communicate(timeout=60)
    finally:
        program.kill()
        program.wait()
    (job,) = TrainingJob.list()
    assert program.returncode == 130
    assert f"these jobs continue: {job.id}. `palate stop JOB` stops one; the same command follows them" in said
    assert job.status == "Running"
    job.stop()
    program = begin()
    try:
        until(lambda: job.describe().attempt == 2 and job.status == "Running", timeout_s=240)
    finally:
        program.kill()
        program.wait()
    job.delete()
    until(lambda: processes_of(home) == [], timeout_s=60)


@pytest.mark.thorough
def test_a_job_that_was_stopped_after_its_best_step_ends_with_the_same_best_model(
    session: Session, home: Path, tiny: Path, tmp_path: Path, precision: str
) -> None:
    """The best checkpoint comes from the store, into a work folder that never had it."""
    (tmp_path / "prefs.json").write_text(json.dumps(preference_rows()))
    worse = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in preference_rows(4)]
    (tmp_path / "held-out.json").write_text(json.dumps(worse))
    text = SWEEP.replace("MODEL", str(tiny)).replace("precision: float32", f"precision: {precision}")
    more = "    learning_rate: 1e-3\n    save_steps: 1\n    eval_steps: 1\n    logging_steps: 1\n    load_best_model_at_end: true\n"
    path = tmp_path / "experiments.yml"
    path.write_text(text + f"best:\n  hyperparameters:\n{more}    max_steps: 60\n")
    experiment = ExperimentFile.load(path, "best")
    (run,) = experiment.runs()
    recipe = ModelTrainingRecipe(**run.arguments, hyperparameters=run.hyperparameters)
    whole = recipe.train(experiment.inputs, job_name="whole", show_logs=False)
    best = whole.metrics()[-1]["best_step"]
    assert best < 40
    broken = recipe.train(experiment.inputs, job_name="broken", wait=False, show_logs=False)
    until(lambda: last_checkpoint(broken) > best, timeout_s=300)
    broken.stop()
    stopped_at = last_checkpoint(broken)
    assert broken.status == "Stopped"
    assert best < stopped_at < 60
    broken.resume(show_logs=False)
    assert broken.metrics()[-1]["best_step"] == best
    assert adapter(broken) == adapter(whole)
    until(lambda: processes_of(home) == [], timeout_s=60)


FORM = """
fine_tune_hyperparam_1: &fine_tune_hyperparam_1_conf
  hyperparameters_id: "1"
  max_seq_length: 128
  load_in_16bit: true
  r: 8
  lora_alpha: 16
  bias: "none"
  target_modules: ["q_proj", "v_proj"]
  learning_rate: 1.0e-3
  optim: "adamw_8bit"
  logging_steps: 1
  per_device_train_batch_size: 4
  gradient_accumulation_steps: 1
  eval_strategy: "steps"
  load_best_model_at_end: true

experiment_1:
  experiment_id: "1"
  hyperparameters: *fine_tune_hyperparam_1_conf
  model_name: "smollm2-135m-instruct"
  framework: "unsloth"
  PLACES
  prompt_name: "prompt_default"
  dpo_column_mapping_config:
    input_columns:
      query: "user_query"
    chosen: "good"
    rejected: "bad"
"""
PLACES = {
    "sheets": 'spreadsheet_id: "key1"\n  train_sheet: "training_data"\n  validation_sheet: "held out"\n  prompt_sheet: "prompt"',
    "csv": 'datasets_path: "csv"\n  train_filename: "training_data.csv"\n  validation_filename: "held out.csv"\n'
    '  prompt_filename: "prompt.csv"',
}


def tables() -> dict[str, list[list[str]]]:
    rows = [[row["prompt"], row["chosen"], row["rejected"]] for row in preference_rows(12)]
    head = ["user_query", "good", "bad"]
    prompts = [["name", "system", "user"], ["prompt_default", "Be exact.", "Question: {query}"]]
    return {"training_data": [head, *rows[:8]], "held out": [head, *rows[8:]], "prompt": prompts}


@pytest.mark.parametrize("places", ["sheets", pytest.param("csv", marks=pytest.mark.thorough)])
def test_a_file_in_the_form_of_gllm_training_trains_unchanged(
    session: Session, home: Path, tiny: Path, tmp_path: Path, places: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SETTING, f"smollm2-135m-instruct={tiny}")
    path = tmp_path / "dpo_experiment_config.yml"
    path.write_text(FORM.replace("PLACES", PLACES[places]))
    (tmp_path / "csv").mkdir()
    for name, cells in tables().items():
        with (tmp_path / "csv" / f"{name}.csv").open("w", newline="") as out:
            csv.writer(out).writerows(cells)
    with running_sheets() as server:
        server.spreadsheets["key1"] = Spreadsheet("Preferences", tables())
        for name, value in {
            "GOOGLE_SHEETS_CLIENT_EMAIL": server.email,
            "GOOGLE_SHEETS_PRIVATE_KEY": as_pem(make_key()),
            "GOOGLE_SHEETS_ENDPOINT": server.url,
            "GOOGLE_SHEETS_TOKEN_URI": server.token_uri,
        }.items():
            monkeypatch.setenv(name, value)
        result = ExperimentFile.load(path, "experiment_1").run(show=False)
        asked = len(server.asked)
    (run,) = result.runs
    assert (run.state, run.reason) == ("Succeeded", "")
    assert run.job is not None
    body = run.job.manifest.body
    given: dict[str, Any] = body.given
    assert (given["lora_dim"], given["training_strategy"], given["system_prompt"]) == (8, "dpo", "")
    assert {channel: found.rows for channel, found in body.inputs.items()} == {"train": 8, "validation": 4}
    assert (asked > 0) == (places == "sheets")
    if places == "sheets":
        assert body.inputs["train"].origin == "gsheet://key1/training_data"
    row = json.loads(session.store.get(f"jobs/{run.job.id}/inputs/train/train.jsonl").splitlines()[0])
    assert "Question: Is 0 an even number?" in json.dumps(row)
    assert "Be exact." in json.dumps(row)
    assert run.job.metrics()[-1]["best_step"] in (1, 2)
    assert "PRIVATE KEY" not in os.fsdecode(run.job._run.record.manifest_bytes())
    until(lambda: processes_of(home) == [], timeout_s=30)
