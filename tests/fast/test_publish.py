"""A finished job's model in another place: what arrives, what it says of itself, and what is refused."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from palate import Session, TrainingJob
from palate.checksums import DIGESTS_FILE, Checksums
from palate.errors import ConfigurationError, DamagedFilesError, JobNotReadyError, NameTakenError
from palate.publish import model_card
from palate.runs.record import Record
from palate_recipes.errors import StoreDeniedError, StoreError, StoreUnreachableError
from palate_recipes.model_card import card_head, folder_card
from palate_recipes.specs.run import Status, TrainManifest
from palate_recipes.specs.train import InputFile
from tests.support.hub_models import ModelHub, running_model_hub
from tests.support.manifests import base_model, train_spec

pytest.importorskip("huggingface_hub")

TOKEN = "hf_a_secret_of_the_test"
FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": bytes(range(256)) * 20, "tokenizer.json": b"{}\n"}
SPEC = train_spec(
    "qwen2-0.5b-instruct",
    precision="bfloat16",
    hyperparameters={"training_strategy": "dpo", "dpo_beta": 0.1, "system_prompt": "You | are\nhelpful"},
    inputs={"train": InputFile(uri="s3://secret-bucket/of/a team/prefs.json", rows=12, sha256="ab" * 32)},
)
BODY = replace(SPEC, model=base_model("qwen2-0.5b-instruct", hub_id="Qwen/Qwen2-0.5B-Instruct"))


@pytest.fixture
def job(session: Session) -> TrainingJob:
    record = Record(session.store, "jobs", "one")
    record.create(TrainManifest(name="one", backend="process", body=BODY, labels={"team": "x"}))
    for name, data in FILES.items():
        session.store.put(record.key("model", name), data)
    record.advance("Running", expect={"Creating"}, details={"model_revision": "abc123", "versions": {"trl": "1.16.0"}})
    record.advance("Succeeded", expect={"Running"}, exit_code=0)
    return TrainingJob.get("one")


@pytest.fixture
def hub(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelHub]:
    with running_model_hub(TOKEN) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        yield server


def palate(*arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "palate.cli", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PALATE_HOME": str(home)},
        timeout=120,
    )


def test_a_folder_receives_the_model_a_card_and_the_digests(job: TrainingJob, home: Path, tmp_path: Path) -> None:
    done = palate("save", "one", str(tmp_path / "copies" / "one"), home=home)
    assert (done.returncode, done.stdout) == (0, f"file://{tmp_path}/copies/one\n"), done.stderr
    assert done.stderr.splitlines()[-1] == "next: palate deploy one"
    folder = tmp_path / "copies" / "one"
    assert {path.name for path in folder.iterdir()} == {*FILES, "README.md", DIGESTS_FILE}
    listed = json.loads((folder / DIGESTS_FILE).read_text())["files"]
    assert listed.keys() == {*FILES, "README.md"}
    for name, facts in listed.items():
        data = (folder / name).read_bytes()
        assert data == FILES.get(name, data)
        assert facts == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert not any((home / "work").iterdir())


def test_the_card_says_what_it_was_trained_from(job: TrainingJob, tmp_path: Path) -> None:
    import yaml

    job.save_model(tmp_path / "copy")
    _, head, text = (tmp_path / "copy" / "README.md").read_text().split("---\n", 2)
    settings = yaml.safe_load(head)
    assert settings["base_model"] == "Qwen/Qwen2-0.5B-Instruct"
    assert (settings["base_model_relation"], settings["library_name"]) == ("adapter", "peft")
    assert settings["license"] == "apache-2.0"
    assert {"dpo", "lora"} <= set(settings["tags"])
    for line in (
        "| base revision | abc123 |",
        "| label team | x |",
        f"| train | prefs.json | 12 | `{'ab' * 32}` |",
        "| dpo_beta | 0.1 |",
        '| system_prompt | "You \\| are\\nhelpful" |',
        "| trl | 1.16.0 |",
    ):
        assert line in text.splitlines()
    assert "secret-bucket" not in text


HOSTILE = [
    "a\n---\nlicense: mit\n```python\nimport os\n```\n# b",
    "x\x7f\x85\u2028\u202e\x9b31m\ufffey",
    "\U0001f600 <img src=x> ![a](http://b) `c`",
    "\\| a \\",
]


def structure(card: str) -> list[str]:
    """Returns what a Markdown text consists of, without the words."""
    from markdown_it import MarkdownIt

    tokens = MarkdownIt("commonmark").enable("table").parse(card.split("---\n", 2)[2])
    return [part.type for token in tokens for part in (token, *(token.children or ())) if part.type != "text"]


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("of_hub", [True, False])
def test_no_name_of_a_record_can_add_to_a_card(name: str, of_hub: bool) -> None:
    import yaml

    body = replace(BODY, model=base_model(name, hub_id=name if of_hub else None))
    manifest = TrainManifest(name="one", backend="process", body=body, labels={name: name})
    status = Status(state="Succeeded", details={"versions": "of another shape", "model_revision": name})
    card = model_card(manifest, status, FILES)
    plain = replace(body, model=base_model("plain", hub_id="plain" if of_hub else None))
    assert structure(card) == structure(model_card(replace(manifest, body=plain, labels={"a": "b"}), status, FILES))
    head = yaml.safe_load("\n".join(card_head(body, FILES)[1:-1]))
    assert head.get("base_model") == (name if of_hub else None)
    if not of_hub:
        (line,) = [line for line in folder_card(body, FILES).splitlines() if line.startswith("base = ")]
        assert ast.literal_eval(line.removeprefix("base = ").partition("  #")[0]) == name


def test_a_place_that_holds_something_is_refused(job: TrainingJob, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "mine.txt").write_text("mine")
    with pytest.raises(NameTakenError, match="is not empty"):
        job.save_model(tmp_path / "copy")
    assert [path.name for path in (tmp_path / "copy").iterdir()] == ["mine.txt"]
    job.save_model(tmp_path / "other")
    with pytest.raises(NameTakenError):
        job.save_model(tmp_path / "other")
    with pytest.raises(ConfigurationError, match="current location"):
        job.save_model(job.output_path())


def test_a_save_that_broke_off_is_finished_by_the_next(job: TrainingJob, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "tokenizer.json").write_bytes(b"half")
    assert job.save_model(tmp_path / "copy") == f"file://{tmp_path}/copy"
    assert (tmp_path / "copy" / "tokenizer.json").read_bytes() == FILES["tokenizer.json"]
    assert (tmp_path / "copy" / DIGESTS_FILE).is_file()


def test_a_model_that_was_changed_after_the_training_goes_nowhere(
    job: TrainingJob, session: Session, tmp_path: Path
) -> None:
    digests = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in FILES.items()}
    session.store.put(f"jobs/one/model/{DIGESTS_FILE}", json.dumps({"schema": 1, "files": digests}).encode())
    job.save_model(tmp_path / "good")
    session.store.put("jobs/one/model/tokenizer.json", b"[]\n")
    session.store.delete("jobs/one/model/adapter_config.json")
    with pytest.raises(DamagedFilesError, match=r"adapter_config\.json, tokenizer\.json missing or changed"):
        job.save_model(tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def listed_job(session: Session, files: dict[str, bytes]) -> TrainingJob:
    """Returns a succeeded job whose status vouches for the list of its model's files."""
    facts = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    listed = json.dumps({"schema": 1, "files": facts}).encode()
    record = Record(session.store, "jobs", "listed")
    record.create(TrainManifest(name="listed", backend="process", body=BODY))
    for name, data in FILES.items():
        session.store.put(record.key("model", name), data)
    session.store.put(record.key("model", DIGESTS_FILE), listed)
    digest = hashlib.sha256(listed).hexdigest()
    record.advance("Succeeded", expect={"Creating"}, details={"model_digest": digest})
    return TrainingJob.get("listed")


def test_a_file_that_was_added_after_the_training_is_named(session: Session, tmp_path: Path) -> None:
    job = listed_job(session, FILES)
    job.require_model()
    folder = session.store.local_path("jobs/listed/model") or Path()
    digests = Checksums.parse((folder / DIGESTS_FILE).read_bytes(), where="the list")
    digests.check_folder(folder, what="the model")  # as a service's runner does
    for name in ("adapter_model.bin", "deep/sitecustomize.py"):
        session.store.put(f"jobs/listed/model/{name}", b"import os")
    words = r"adapter_model\.bin, deep/sitecustomize\.py added\. Delete the added files, or train again"
    with pytest.raises(DamagedFilesError, match=words):
        job.deploy("refused")
    with pytest.raises(DamagedFilesError, match=words):
        digests.check_folder(folder, what="the model")
    with pytest.raises(DamagedFilesError, match=words):
        job.save_model(tmp_path / "copy")


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "a\\b", "./x", "a//b", "", ".", "a\0b"])
def test_a_list_that_leads_out_of_the_folder_is_refused(session: Session, name: str) -> None:
    with pytest.raises(DamagedFilesError, match="not a path inside the folder"):
        listed_job(session, {**FILES, name: b""}).require_model()


def test_only_a_succeeded_job_has_a_model_to_save(session: Session, tmp_path: Path) -> None:
    record = Record(session.store, "jobs", "failed")
    record.create(TrainManifest(name="failed", backend="process", body=BODY))
    record.advance("Failed", expect={"Creating"}, reason="no")
    with pytest.raises(JobNotReadyError, match="Failed"):
        TrainingJob.get("failed").save_model(tmp_path / "copy")


# ── the hub ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_hub_receives_one_commit_in_a_private_repository(job: TrainingJob, hub: ModelHub) -> None:
    uri = job.save_model("hf://me/tuned")
    assert uri.startswith("hf://me/tuned@")
    assert hub.repos["me/tuned"].keys() == {*FILES, "README.md", DIGESTS_FILE}
    assert {name: hub.repos["me/tuned"][name] for name in FILES} == FILES
    assert 'place = "me/tuned"\n' in hub.repos["me/tuned"]["README.md"].decode()
    assert hub.private == {"me/tuned": True}
    assert sum("/commit/" in line for line in hub.asked) == 1
    assert job.save_model("hf://models/me/tuned/").startswith("hf://me/tuned@")  # a repository has a history


def test_what_arrives_changed_on_the_hub_is_an_error(job: TrainingJob, hub: ModelHub) -> None:
    hub.spoils = "tokenizer.json"
    with pytest.raises(StoreError, match=r"differs from what was sent: tokenizer\.json"):
        job.save_model("hf://me/tuned")


def test_the_hub_needs_a_token(
    job: TrainingJob, hub: ModelHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    with pytest.raises(ConfigurationError, match="HF_TOKEN"):
        job.save_model("hf://me/tuned")
    assert hub.asked == []


def test_the_hub_refuses_or_fails_with_cause_and_remedy(
    job: TrainingJob, hub: ModelHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(StoreDeniedError, match=r"hf://me/tuned at http://127.*HF_TOKEN") as denied:
        job.save_model("hf://me/tuned")
    assert "hf_another" not in str(denied.value)
    hub.failing = 503
    with pytest.raises(StoreUnreachableError, match="503"):
        job.save_model("hf://me/tuned")


@pytest.mark.parametrize("uri", ["hf://tuned", "hf://datasets/me/tuned", "hf://me/tuned/deeper", "hf://"])
def test_a_uri_that_names_no_model_is_refused(job: TrainingJob, hub: ModelHub, uri: str) -> None:
    with pytest.raises(ConfigurationError, match="hf://OWNER/NAME"):
        job.save_model(uri)
    assert hub.asked == []
