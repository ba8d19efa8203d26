"""Which checkpoint of a job is served, what is copied of it, and what is said of one that cannot be served."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace as with_fields
from pathlib import Path

import pytest

from palate import Session, TrainingJob
from palate.checksums import Checksums
from palate.deploy import tell_parity
from palate.errors import ConfigurationError, DamagedFilesError, JobNotReadyError
from palate.runner.checkpoints import stage_for_serving, stage_last_checkpoint
from palate.runs.checkpoints import check_servable, choose_checkpoint, complete_checkpoints
from palate.runs.record import Record
from palate.store import Store, open_store
from palate_recipes.specs.run import ServeManifest
from palate_recipes.specs.train import COMPLETE_MARK
from tests.fast.test_deploy import NothingStarts
from tests.support.fixtures import records_v1
from tests.support.manifests import serve_manifest, train_manifest
from tests.support.stores import empty_store

FILES = {
    "adapter_config.json": b'{"peft_type": "LORA"}',
    "adapter_model.safetensors": b"weights",
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "trainer_state.json": b"{}",
    "optimizer.pt": b"a pickle",
    "training_args.bin": b"a pickle",
}
SERVED = {"adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "tokenizer.json"}


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return empty_store(request.param, request, tmp_path)


def job(store: Store, *, save_steps: int = 100, method: str = "LoRA_LLM") -> Record:
    record = Record(store, "jobs", "one")
    record.create(train_manifest(hyperparameters={"save_steps": save_steps}, method=method))
    return record


def write(record: Record, name: str, files: dict[str, bytes] = FILES, *, marked: bool = True, folder: Path) -> None:
    """Uploads a checkpoint as a runner does, with the marker last."""
    local = folder / name
    local.mkdir(parents=True)
    for file, content in files.items():
        (local / file).write_bytes(content)
        record.store.put(record.key("checkpoints", name, file), content)
    if marked:
        record.store.put(record.key("checkpoints", name, COMPLETE_MARK), Checksums.of(local).encode())


def test_latest_a_step_and_a_name(store: Store, tmp_path: Path) -> None:
    record = job(store)
    for name in ("step-000100", "step-000200", "step-000200-attempt-2", "step-000050"):
        write(record, name, folder=tmp_path)
    write(record, "step-000300", marked=False, folder=tmp_path)  # half uploaded: never served
    assert [one.name for one in complete_checkpoints(record)] == [
        "step-000050",
        "step-000100",
        "step-000200",
        "step-000200-attempt-2",
    ]
    for wanted, name in {
        "latest": "step-000200-attempt-2",
        200: "step-000200-attempt-2",
        "200": "step-000200-attempt-2",
        "step-000200": "step-000200",
        "step-200": "step-000200-attempt-2",
        "checkpoint-50": "step-000050",
        100: "step-000100",
    }.items():
        assert choose_checkpoint(record, wanted).name == name, wanted
    for wanted in (300, "step-000300", "step-000200-attempt-3", 0):
        with pytest.raises(ConfigurationError) as caught:
            choose_checkpoint(record, wanted)
        assert "It has step-000050, step-000100, step-000200, step-000200-attempt-2" in str(caught.value)
        assert repr(wanted) in str(caught.value)
    for wanted in ("newest", True, -1, "", "step-", "../model", "\u0661"):
        with pytest.raises(ConfigurationError, match=r"expected 'latest', a step such as 100"):
            choose_checkpoint(record, wanted)


def event(kind: str, step: int, **figures: float) -> dict[str, object]:
    return {"kind": kind, "attempt": 1, "step": step, "total_steps": 150, **figures}


def write_metrics(record: Record, *events: dict[str, object]) -> None:
    record.append(
        "metrics", record.last_part("metrics") + 1, "".join(json.dumps(one) + "\n" for one in events).encode()
    )


def test_the_list_has_size_time_state_and_the_metrics_of_the_step(store: Store, tmp_path: Path) -> None:
    record = job(store)
    before = time.time()
    for name in ("step-000050", "step-000060", "step-000100"):
        write(record, name, folder=tmp_path)
    write(record, "step-000150", {"optimizer.pt": b"half of it"}, marked=False, folder=tmp_path)
    store.put(record.key("checkpoints", "notes", "README.md"), b"somebody's own")
    write_metrics(
        record,
        event("train", 50, loss=0.5, learning_rate=1e-4),
        event("eval", 50, eval_loss=0.6, epoch=1.0),
        event("train", 100, loss=0.25),
    )
    session = Session(store=store.root, backend=NothingStarts())
    session._store = store
    listed = TrainingJob.get("one", session=session).checkpoints()
    assert [(one.name, one.step, one.attempt, one.is_complete) for one in listed] == [
        ("step-000050", 50, 1, True),
        ("step-000060", 60, 1, True),
        ("step-000100", 100, 1, True),
        ("step-000150", 150, 1, False),
    ]
    assert listed[0].metrics == {
        "step": 50,
        "total_steps": 150,
        "loss": 0.5,
        "learning_rate": 1e-4,
        "eval_loss": 0.6,
    }
    # Between two log lines the figures are those of the line before; an evaluation counts at its own step only.
    assert listed[1].metrics == {"step": 50, "total_steps": 150, "loss": 0.5, "learning_rate": 1e-4}
    assert listed[2].metrics["loss"] == 0.25
    assert "eval_loss" not in listed[2].metrics
    assert [one.size_bytes > sum(map(len, FILES.values())) for one in listed] == [
        True,
        True,
        True,
        False,
    ]  # with the marker
    assert listed[3].size_bytes == len(b"half of it")
    assert all(before - 2 <= one.written_at <= time.time() + 2 for one in listed)


def checkpoints_command(*arguments: str) -> tuple[str, str]:
    command = [sys.executable, "-m", "palate.cli", "checkpoints", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_the_command_lists_them_and_says_what_is_next(home: Path, tmp_path: Path) -> None:
    record = job(open_store(f"file://{home}/store"))
    shown, told = checkpoints_command("one")
    columns = ("checkpoint", "step", "state", "age", "size", "loss", "validation loss", "validation accuracy", "margin")
    assert shown.splitlines() == ["\t".join(columns)]
    assert "job one is Creating and has no complete checkpoint yet: it writes one every 100 steps" in told
    assert checkpoints_command("one", "--json") == ("[]\n", "")
    write_metrics(record, event("train", 50, loss=0.5))
    write(record, "step-000100", folder=tmp_path)
    write(record, "step-000150", marked=False, folder=tmp_path)
    shown, told = checkpoints_command("one")
    rows = [line.split("\t") for line in shown.splitlines()[1:]]
    assert [(row[0], row[2], row[5]) for row in rows] == [
        ("step-000100", "complete", "0.5"),
        ("step-000150", "incomplete", "0.5"),
    ]
    assert told == "next: palate deploy one --checkpoint latest\n"
    (first, _) = json.loads(checkpoints_command("one", "--json")[0])
    assert (first["name"], first["is_complete"], first["metrics"]["loss"]) == ("step-000100", True, 0.5)


def test_of_many_checkpoints_the_newest_are_listed(store: Store, tmp_path: Path) -> None:
    record = job(store)
    for step in range(1, 14):
        write(record, f"step-{step:06d}", {}, folder=tmp_path)
    with pytest.raises(ConfigurationError, match=r"It has 3 older and step-000004, .*step-000013$"):
        choose_checkpoint(record, 99)


@pytest.mark.parametrize("store", ["file"], indirect=True)
def test_a_job_without_a_checkpoint_says_how_to_get_one(store: Store) -> None:
    record = job(store)
    record.advance("Running", expect={"Creating"})
    with pytest.raises(JobNotReadyError, match=r"is Running and has no complete checkpoint yet: .*every 100 steps"):
        choose_checkpoint(record, "latest")
    for at, words in (
        (
            event("train", 40, loss=0.5, seconds_left=1100.0),
            r"at step 40 of 150: the first one comes at step 100, in about 10 min\. ",
        ),
        (
            event("train", 90, loss=0.4),
            r"at step 90 of 150: the first one comes at step 100\. Follow it with `palate watch one`",
        ),
        (event("train", 100, loss=0.4, seconds_left=9.0), r"at step 100 of 150: the first one is being uploaded\. "),
    ):
        write_metrics(record, at)
        with pytest.raises(JobNotReadyError, match=words):
            choose_checkpoint(record, "latest")
    record.advance("Succeeded", expect={"Running"})
    with pytest.raises(JobNotReadyError, match=r"is Succeeded .*deploy its model without a checkpoint"):
        choose_checkpoint(record, "latest")
    record.delete()
    record = job(store, save_steps=0)
    record.advance("Running", expect={"Creating"})
    with pytest.raises(JobNotReadyError, match=r"save_steps is 0.*palate stop one.*set the hyperparameter save_steps"):
        choose_checkpoint(record, 100)
    record.advance("Failed", expect={"Running"})
    with pytest.raises(JobNotReadyError, match=r"is Failed and has no complete checkpoint: set the hyperparameter"):
        choose_checkpoint(record, 100)


def test_what_a_server_reads_is_copied_and_nothing_else(store: Store, tmp_path: Path) -> None:
    record = job(store)
    write(record, "step-000100", folder=tmp_path / "written")
    digest = check_servable(record, choose_checkpoint(record, 100), adapter=True)
    prefix = record.key("checkpoints", "step-000100")
    folder = tmp_path / "staged"
    stage_for_serving(store, prefix, folder, digest=digest, what=store.uri(prefix))
    assert {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".palate")} == {
        name: FILES[name] for name in SERVED
    }
    # An added file is not listed in the marker, so no server ever sees it.
    store.put(f"{prefix}/generation_config.json", b"{}")
    again = tmp_path / "again"
    stage_for_serving(store, prefix, again, digest=digest, what=store.uri(prefix))
    assert not (again / "generation_config.json").exists()


def test_a_checkpoint_that_is_deleted_or_changed_is_not_served(store: Store, tmp_path: Path) -> None:
    record = job(store)
    write(record, "step-000100", folder=tmp_path / "written")
    chosen = choose_checkpoint(record, "latest")
    digest = check_servable(record, chosen, adapter=True)
    prefix = record.key("checkpoints", chosen.name)

    def stage() -> None:
        stage_for_serving(store, prefix, tmp_path / "staged", digest=digest, what=store.uri(prefix))

    weights = f"{prefix}/adapter_model.safetensors"
    store.put(weights, b"w3ights")  # of the same size: only the digest tells
    check_servable(record, chosen, adapter=True)
    with pytest.raises(
        DamagedFilesError, match=r"adapter_model.safetensors missing or changed. Deploy another checkpoint"
    ):
        stage()
    store.put(weights, b"wei")
    with pytest.raises(
        DamagedFilesError, match=r"adapter_model.safetensors missing or changed. Choose another checkpoint"
    ):
        check_servable(record, chosen, adapter=True)

    store.put(weights, FILES["adapter_model.safetensors"])
    stage()
    mark = store.get(f"{prefix}/{COMPLETE_MARK}")
    store.put(f"{prefix}/{COMPLETE_MARK}", mark + b"\n")
    with pytest.raises(DamagedFilesError, match="was written again after it was deployed"):
        stage()
    store.put(f"{prefix}/{COMPLETE_MARK}", b"")
    with pytest.raises(DamagedFilesError, match=r"is not a list of digests: choose another checkpoint"):
        check_servable(record, chosen, adapter=True)

    # Deleted while it is copied: the marker was read, a file is gone.
    store.put(f"{prefix}/{COMPLETE_MARK}", mark)
    store.delete(weights)
    with pytest.raises(DamagedFilesError, match=r"was deleted .*palate deploy one --checkpoint latest"):
        stage()
    store.delete_tree(prefix)
    with pytest.raises(DamagedFilesError, match=r"step-000100 was deleted"):
        stage()
    with pytest.raises(DamagedFilesError, match=r"step-000100 was deleted"):
        check_servable(record, chosen, adapter=True)


@pytest.mark.parametrize("store", ["file"], indirect=True)
@pytest.mark.parametrize(
    ("adapter", "left_out", "words"),
    [
        (True, "tokenizer.json", "has no tokenizer"),
        (True, "adapter_config.json", "has no adapter_config.json"),
        (False, "", r"has no config.json and no weights \(\*.safetensors\)"),
    ],
)
def test_a_checkpoint_without_what_a_server_needs(
    store: Store, tmp_path: Path, adapter: bool, left_out: str, words: str
) -> None:
    record = job(store)
    files = {name: content for name, content in FILES.items() if name != left_out}
    if not adapter:
        files = {name: content for name, content in files.items() if not name.startswith("adapter")}
    write(record, "step-000100", files, folder=tmp_path)
    with pytest.raises(DamagedFilesError, match=rf"{words}, which a server needs.*palate resume one"):
        check_servable(record, choose_checkpoint(record, 100), adapter=adapter)


@pytest.fixture
def failed(home: Path) -> tuple[TrainingJob, NothingStarts]:
    """A job that an earlier version wrote: killed after its checkpoint of step 40."""
    records_v1(home)
    backend = NothingStarts()
    where = Session(store=f"file://{home}/store", backend=backend)
    return TrainingJob.get("failed", session=where), backend


def test_a_failed_job_is_deployed_from_its_checkpoint(failed: tuple[TrainingJob, NothingStarts]) -> None:
    job, backend = failed
    predictor = job.deploy(checkpoint="latest", wait=False)
    assert (predictor.service_name, backend.started) == ("failed-step-000040", 1)
    assert predictor.labels == {"job": "failed", "checkpoint": "step-000040"}
    body = predictor.manifest.body
    assert (body.tuned_uri, body.checkpoint, body.adapter) == (
        f"{job.uri}/checkpoints/step-000040",
        "step-000040",
        True,
    )
    assert len(body.tuned_digest or "") == 64
    assert "dtype" not in body.options
    with pytest.raises(JobNotReadyError, match="Only a succeeded job has a model"):
        job.deploy(wait=False)
    assert job.deploy("mine", checkpoint=40, wait=False).service_name == "mine"
    with pytest.raises(ConfigurationError, match="It has step-000040"):
        job.deploy(checkpoint=50, wait=False)


def test_a_service_of_a_finished_model_has_no_checkpoint_in_its_record(
    failed: tuple[TrainingJob, NothingStarts],
) -> None:
    whole = TrainingJob.get("whole", session=failed[0]._run.session)
    predictor = whole.deploy("final", wait=False)
    assert b'"checkpoint"' not in predictor._run.record.store.get("services/final/manifest.json")
    # And a service that goes from a checkpoint to the finished model forgets it.
    after = whole.served_model().instead_of(failed[0].deploy(checkpoint=40, wait=False).manifest, predictor._run)
    assert not ServeManifest.decode(after.encode()).body.checkpoint
    assert after.labels == {"job": "whole"}


@pytest.mark.parametrize("store", ["file"], indirect=True)
def test_full_weights_are_served_in_the_precision_of_the_training(store: Store, home: Path, tmp_path: Path) -> None:
    record = job(store, method="Standard_LLM")
    files = {"config.json": b"{}", "model.safetensors": b"x", "tokenizer.json": b"{}"}
    write(record, "step-000100", files, folder=tmp_path / "written")
    session = Session(store=store.root, backend=NothingStarts())
    session._store = store
    found = TrainingJob.get("one", session=session)
    assert found.manifest.body.precision == "float32"
    body = found.deploy(checkpoint=100, wait=False).manifest.body
    assert (body.adapter, body.options["dtype"]) == (False, "float32")
    other = found.deploy("other", checkpoint=100, options={"dtype": "bfloat16"}, wait=False)
    assert other.manifest.body.options["dtype"] == "bfloat16"
    # An update keeps the service's own setting, and adds the training's precision where it has none.
    served, run = found.served_model(checkpoint=100), other._run
    assert served.instead_of(other.manifest, run).body.options["dtype"] == "bfloat16"
    assert served.instead_of(serve_manifest(), run).body.options["dtype"] == "float32"
    # What the checkpoint brought leaves with it: the finished model has the engine choose again.
    of_checkpoint = ServeManifest.decode(found.deploy("third", checkpoint=100, wait=False).manifest.encode())
    finished = with_fields(served, checkpoint="", dtype="")
    assert "dtype" not in finished.instead_of(of_checkpoint, run).body.options
    other_checkpoint = with_fields(served, dtype="float16").instead_of(of_checkpoint, run)
    assert other_checkpoint.body.options["dtype"] == "float16"
    assert "dtype" not in finished.instead_of(other_checkpoint, run).body.options
    assert finished.instead_of(other.manifest, run).body.options["dtype"] == "bfloat16"


def test_the_client_says_that_a_checkpoint_is_not_compared(capfd: pytest.CaptureFixture[str]) -> None:
    tell_parity({"verdict": "not verified", "text": "the model's folder has no probe.json"}, "step-000040")
    assert (
        "step-000040 is a checkpoint: its files are verified, but its answers are not compared"
        in capfd.readouterr().err
    )


def test_the_command_names_its_flag(failed: tuple[TrainingJob, NothingStarts]) -> None:
    def deploy(*arguments: str) -> str:
        command = [sys.executable, "-m", "palate.cli", "deploy", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 1, done.stdout
        return done.stderr

    assert "--checkpoint '7': job failed has no complete checkpoint of this step. It has step-000040" in deploy(
        "failed", "--checkpoint", "7"
    )
    assert "--checkpoint is of a job" in deploy("smollm2-135m-instruct", "--base", "--checkpoint", "latest")


def test_a_resumed_run_also_gets_the_best_checkpoint_before_its_last(store: Store, tmp_path: Path) -> None:
    def state(best: int | None) -> dict[str, bytes]:
        return {**FILES, "trainer_state.json": json.dumps({"best_global_step": best}).encode()}

    record = Record(store, "jobs", "one")
    record.create(train_manifest(hyperparameters={"load_best_model_at_end": True}))
    write(record, "step-000050", state(50), folder=tmp_path)
    write(record, "step-000100-attempt-2", state(50), folder=tmp_path)
    write(record, "step-000150-attempt-2", state(140), folder=tmp_path)  # the best one was never uploaded
    write(record, "step-000200-attempt-2", {**FILES, "trainer_state.json": b"[]"}, folder=tmp_path)
    said: list[str] = []
    staged = stage_last_checkpoint(record, tmp_path / "staged", said.append)
    assert staged == tmp_path / "staged/checkpoint-100"
    assert [line.partition(": ")[0] for line in said] == ["note"] * 2
    assert "has no readable trainer_state.json" in said[0]
    assert "checkpoint-150 needs checkpoint-140, which has the best evaluation" in said[1]
    assert {path.name for path in (tmp_path / "staged").iterdir()} == {"checkpoint-50", "checkpoint-100"}
    assert (tmp_path / "staged/checkpoint-50/adapter_model.safetensors").read_bytes() == b"weights"
    # Only the one that is resumed from has a marker: the other would be uploaded again.
    assert not (tmp_path / "staged/checkpoint-50" / COMPLETE_MARK).exists()
    assert (tmp_path / "staged/checkpoint-100" / COMPLETE_MARK).exists()
