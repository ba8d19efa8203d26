"""The command line as a person meets it: real processes, stdout for results, stderr for the rest, exit codes."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from palate.errors import ConfigurationError
from palate.runs.record import TOKEN_KEY, Record
from palate.store import open_store
from palate_recipes.text import visible
from tests.support.fronted import fronted_service
from tests.support.manifests import serve_manifest, train_manifest


def palate(*arguments: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "palate.cli", *arguments],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PALATE_HOME": str(home), **environment},
        timeout=120,
    )


@pytest.fixture
def prefs(tmp_path: Path) -> Path:
    path = tmp_path / "prefs.json"
    path.write_text(json.dumps([{"prompt": "Is it?", "chosen": "Yes, it is.", "rejected": "No."}]))
    return path


def test_help_lists_the_verbs(home: Path) -> None:
    done = palate("--help", home=home)
    assert done.returncode == 0
    for verb in [
        "train",
        "deploy",
        "run",
        "chat",
        "jobs",
        "services",
        "watch",
        "metrics",
        "logs",
        "stop",
        "delete",
        "resume",
        "clean",
        "models",
        "doctor",
        "quickstart",
    ]:
        assert f"\n  {verb} " in done.stdout


def test_models_are_rows_on_stdout_when_it_is_no_terminal(home: Path) -> None:
    done = palate("models", home=home)
    header, *rows = done.stdout.splitlines()
    assert header.split("\t")[0] == "model"
    assert any(row.startswith("qwen2-0.5b-instruct\tinstruct\t") for row in rows)
    assert "next:" in done.stderr
    assert [row["name"] for row in json.loads(palate("models", "--json", home=home).stdout)]
    assert "dpo_beta\t0.1\t" in palate("models", "--hyperparameters", home=home).stdout


def test_doctor_says_what_will_be_used(home: Path) -> None:
    done = palate("doctor", "--json", home=home)
    findings = {item["topic"]: item for item in json.loads(done.stdout)}
    assert done.returncode == 0
    assert findings["store"]["fact"] == str(home / "store")
    assert {"device", "training precision", "training", "backend", "engine vllm", "engine transformers"} <= set(
        findings
    )
    assert sum("will be used" in item["fact"] for topic, item in findings.items() if topic.startswith("engine")) == 1


def test_doctor_fails_on_a_store_that_cannot_be_used(home: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    done = palate("doctor", home=home, PALATE_STORE=str(blocked / "store"))
    assert done.returncode == 1
    assert "broken\tstore" in done.stdout


def test_empty_lists_name_the_next_command(home: Path) -> None:
    jobs = palate("jobs", home=home)
    assert (jobs.returncode, jobs.stdout.splitlines()[1:]) == (0, [])
    assert "next: palate quickstart" in jobs.stderr
    assert json.loads(palate("services", "--json", home=home).stdout) == []


def test_quickstart_help_shows_the_readme_s_lines_the_local_ones_first(home: Path) -> None:
    shown = code_lines(palate("quickstart", "--help", home=home).stdout)
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    local, remote = (code_lines(block) for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL))
    assert 'recipe.train(inputs={"train": "palate-demo/train.json"})' in local
    assert "s3://" in remote
    assert shown.partition(local)[2].count(remote) == 1


def code_lines(text: str) -> str:
    return "\n".join(line.strip() for line in text.splitlines() if line.strip())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "{prefs}", "--model", "smollm2-135m-instuct"], ["smollm2-135m-instuct", "smollm2-135m-instruct"]),
        (["train", "/nowhere.json", "--model", "smollm2-135m-instruct"], ["/nowhere.json"]),
        (["train", "{prefs}", "--model", "smollm2-135m-instruct", "-s", "lr=1"], ["lr", "learning_rate"]),
        (["train", "{prefs}", "--model", "smollm2-135m-instruct", "-s", "lr"], ["NAME=VALUE"]),
        (["train", "{prefs}", "--model", "smollm2-135m-instruct", "-s", "system_prompt=\udcff"], ["system_prompt"]),
        (["train", "{prefs}"], ["no model given"]),
        (["train", "{prefs}", "--recipe", "/nowhere.toml"], ["/nowhere.toml"]),
        (["deploy", "no-such-job"], ["no-such-job", "palate jobs"]),
        (["deploy", "no-such-model", "--base"], ["no-such-model", "palate models"]),
        (["logs", "nothing"], ["nothing", "palate jobs"]),
        (["watch", "nothing"], ["nothing", "palate jobs"]),
        (["metrics", "nothing"], ["nothing", "palate jobs"]),
        (["stop", "nothing"], ["nothing"]),
        (["resume", "nothing"], ["nothing", "palate jobs"]),
        (["delete", "nothing"], ["nothing"]),
        (["chat", "nothing", "hi"], ["nothing", "palate services"]),
        (["quickstart", "--direction", "sideways"], ["sideways", "honest"]),
        (["quickstart", "--engine", "sideways"], ["engine", "sideways", "vllm"]),
    ],
)
def test_an_error_is_one_message_on_stderr_and_exit_code_1(
    home: Path, prefs: Path, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    if arguments[0] == "quickstart":
        arguments = [*arguments, "--folder", str(tmp_path / "quickstart")]
    done = palate(*(part.format(prefs=prefs) for part in arguments), home=home)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr
    assert not (home / "store" / "jobs").exists()


def test_watch_and_metrics_need_only_the_record(home: Path) -> None:
    from palate.runs.record import Record
    from palate.store import open_store

    record = Record(open_store(home / "store"), "jobs", "done")
    record.create(train_manifest("done"))
    start = {"kind": "start", "step": 0, "total_steps": 2, "strategy": "dpo", "learning_rate": 1e-4}
    step = {"kind": "train", "step": 2, "total_steps": 2, "epoch": 1.0, "loss": 0.5, "rewards/margins": 0.4}
    record.append("metrics", 1, "".join(json.dumps(event) + "\n" for event in (start, step)).encode())
    record.append("logs", 1, b"step 2/2 loss 0.500\n")
    record.advance("Succeeded", expect={"Creating"}, exit_code=0)

    watched = palate("watch", "done", home=home)
    assert (watched.returncode, watched.stdout) == (0, "done\tSucceeded\n")
    assert watched.stderr.splitlines() == ["step 2/2 loss 0.500", "next: palate deploy done"]

    told = palate("metrics", "done", home=home)
    assert told.stdout.splitlines()[1].split("\t")[:5] == ["training", "2", "1.0", "0.5", "0.4"]
    assert told.stderr.startswith("reading: too early to tell. 2 steps are too few")
    assert [json.loads(line) for line in palate("metrics", "done", "--json", home=home).stdout.splitlines()] == [
        start,
        step,
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        ("data", "check", "~nosuchuser/x.json"),
        ("data", "check", "a" * 5000),
        ("train", "~nosuchuser/x.json", "--model", "smollm2-135m-instruct"),
        ("train", "x.json", "--model-uri", "~nosuchuser/model"),
        ("train", "x.json", "--recipe", "~nosuchuser/x.toml"),
        ("train", "x.json", "--recipe", "deep.toml"),
        ("train", "x.json", "--recipe", "digits.toml"),
        ("train", "x.json", "--model", "smollm2-135m-instruct", "--set", "target_modules=" + "[" * 5000),
        ("train", "x.json", "--model", "m" * 100_000),
        ("data", "demo", "file"),
        ("data", "demo", "/proc/nowhere"),
        ("quickstart", "--folder", "file"),
        ("store", "up", "--folder", "file", "--port", "48333"),
    ],
    ids=lambda arguments: ascii(" ".join(arguments))[:60],
)
def test_what_cannot_be_read_is_one_error_and_no_traceback(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("deep.toml").write_text("[hyperparameters]\nlearning_rate = " + "[" * 3000)
    Path("digits.toml").write_text("max_attempts = " + "9" * 5000)
    Path("file").write_text("")
    done = palate(*arguments, home=home)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert len(done.stderr) < 2000


def test_a_manifest_that_no_file_can_hold_is_one_error(home: Path) -> None:
    record = Record(open_store(f"file://{home}/store"), "jobs", "job-1")
    with pytest.raises(ConfigurationError, match=r"job-1.*\\udcff"):
        record.create(train_manifest("job-1", labels={"team": "a\udcff"}))
    assert not record.exists()


@pytest.mark.parametrize("verb", ["jobs", "services"])
def test_a_list_may_be_waited_for_without_end(home: Path, verb: str) -> None:
    kind: Literal["jobs", "services"] = "jobs" if verb == "jobs" else "services"
    record = Record(open_store(f"file://{home}/store"), kind, "one")
    record.create(train_manifest() if verb == "jobs" else serve_manifest("one"))
    for timeout in ("inf", "1e300"):
        done = palate(verb, "--timeout", timeout, home=home)
        assert (done.returncode, "one\t" in done.stdout) == (0, True), done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["hi", "--model", "other"], ["--model 'other'", "no such model", "It has: default, svc"]),
        (["\udcff"], [r"message '\udcff'", "UTF-8"]),
        (["hi", "--system", "\udcff"], ["--system", "UTF-8"]),
    ],
)
def test_a_chat_that_fails_is_one_error(home: Path, arguments: list[str], words: list[str]) -> None:
    store = open_store(f"file://{home}/store")
    record = Record(store, "services", "svc")
    record.create(serve_manifest())
    store.put(record.key(TOKEN_KEY), b"a-token-for-tests", private=True)
    with fronted_service("a-token-for-tests") as service:
        record.advance("Running", expect={"Creating"}, endpoint=service.endpoint, engine_id="elsewhere:1:2:x")
        done = palate("chat", "svc", *arguments, home=home)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


def test_a_home_that_cannot_be_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in ("~nosuchuser/palate", str(tmp_path / "file" / "home")):
        done = palate("jobs", home=Path(folder))
        assert (done.returncode, "Traceback" in done.stderr) == (1, False)
        assert "PALATE_HOME" in done.stderr


ATTACK = "\x1b]0;owned\x07\x1b[2J[red]x[/red] \x9b31m \u202eabc \x7f"


def escapes(text: str) -> list[str]:
    return re.findall(r"[\x00-\x08\x0b-\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e]", text)


@pytest.mark.parametrize("verb", ["jobs", "logs", "watch"])
def test_what_a_store_says_reaches_a_terminal_without_escape_sequences(verb: str, home: Path) -> None:
    """Whoever can write to a store must not write to the screens of those who look at it."""
    record = Record(open_store(f"file://{home}/store"), "jobs", "job-1")
    record.create(train_manifest("job-1", model=ATTACK))
    record.append("logs", 1, f"{ATTACK}\nloading\rloaded\n".encode())
    record.advance("Failed", expect={"Creating"}, reason=f"it broke: {ATTACK}")
    done = palate(verb, *([] if verb == "jobs" else ["job-1"]), home=home)
    said = done.stdout + done.stderr
    assert escapes(said) == []
    assert "Traceback" not in said
    assert r"\x1b]0;owned\x07\x1b[2J[red]x[/red]" in said
    if verb == "logs":
        assert done.stdout.splitlines()[-1] == "loaded"


def test_a_terminal_shows_what_a_store_says_as_it_is_written(home: Path) -> None:
    """A table and the live view are rich's: its markup in a name is text, too."""
    script = f"""
from palate.ui.terminal import LiveDisplay, print_side_by_side, print_table
print_table(("[red]name",), [({ATTACK!r},)], title="[link=http://x]")
print_side_by_side({ATTACK!r}, ("[red]base", {ATTACK!r}), ("tuned", "x"))
with LiveDisplay("[red]" + {ATTACK!r}) as display:
    display.log({ATTACK!r} + "\\n")
"""
    ours, theirs = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", script], stdout=theirs, stderr=theirs, stdin=theirs) as process:
        os.close(theirs)
        said = b""
        try:
            while piece := os.read(ours, 65536):
                said += piece
        except OSError:  # the other end has closed
            pass
        os.close(ours)
    text = said.decode()
    assert process.returncode == 0, text
    assert "\x1b]" not in text
    assert "\x1b[2J" not in text
    assert "\u202e" not in text
    assert "\x9b" not in text
    for shown in ("[red]name", "[link=http", "[red]base", "owned"):
        assert shown in text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain\ttext\n", "plain\ttext\n"),
        ("10%\r50%\r100%\n", "100%\n"),
        ("dos\r\nline", "dos\nline"),
        ("\x1b", r"\x1b"),
        ("a\ud800", r"a\ud800"),
        ("naïve 漢字 👍🏽 שלום", "naïve 漢字 👍🏽 שלום"),
    ],
)
def test_text_is_made_visible(text: str, shown: str) -> None:
    assert visible(text) == shown
