"""The command line as a person meets it: real processes, stdout for results, stderr for the rest, exit codes."""

from __future__ import annotations

import fcntl
import inspect
import json
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import pytest
import typer
from msgspec import structs

import palate as palate_package
from palate.cli import app
from palate.cli.examples import EXAMPLES
from palate.cli.flags import options_of, reworded
from palate.errors import ConfigurationError
from palate.evaluation.record import Figure
from palate.evaluation.record import write as write_evaluation
from palate.runs.record import TOKEN_KEY, Record
from palate.store import open_store
from palate_recipes import __version__
from palate_recipes.catalog import models
from palate_recipes.text import visible
from tests.support.command_lines import parse
from tests.support.evaluations import compared, evaluation_record
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
        (["train", "--model", "smollm2-135m-instruct"], ["no training data", "add DATA", "--recipe FILE"]),
        (["deploy", "no-such-job"], ["no-such-job", "palate jobs"]),
        (
            ["deploy", "x", "--engine-arg", "max-num-seq=8"],
            [
                "--engine-arg 'max-num-seq=8': max-num-seq is not an allowed option of vLLM; did you mean 'max-num-seqs'?\n"
            ],
        ),
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


def test_training_without_a_model_names_the_flag(home: Path, prefs: Path) -> None:
    done = palate("train", str(prefs), home=home)
    assert done.returncode == 1
    assert "--model smollm2-135m-instruct" in done.stderr
    assert "model_name=" not in done.stderr


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
        ([" "], ["the message is empty"]),
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


def on_terminal(*arguments: str, home: Path, width: int = 80) -> list[str]:
    """Runs a command on a terminal of this width and returns the lines it shows, colours removed."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-m", "palate.cli", *arguments],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env={**environment, "PALATE_HOME": str(home), "TERM": "xterm"},
    )
    os.close(follower)
    shown = b""
    with suppress(OSError):  # EIO: the program has exited
        while piece := os.read(leader, 65536):
            shown += piece
    os.close(leader)
    assert process.wait(timeout=120) == 0
    return [line.rstrip() for line in re.sub(r"\x1b\[[0-9;]*m", "", shown.decode()).splitlines()]


def test_a_model_is_one_line_at_80_characters_and_its_name_is_whole(home: Path) -> None:
    names = [model.name for model in models()]
    shown = on_terminal("models", home=home)
    assert [line.split()[0] for line in shown[1 : 1 + len(names)]] == names
    assert max(map(len, shown)) <= 80
    assert any(line.startswith("not shown at this width: context, licence") for line in shown)


def test_wide_shows_all_columns_and_one_line_for_each_row(home: Path) -> None:
    shown = on_terminal("models", "qwen2-0.5b-instruct", "--wide", home=home)
    (row,) = (line for line in shown if line.startswith("qwen2-0.5b-instruct "))
    assert "Apache-2.0" in row
    assert "The place to start, for most conversation." in row
    assert not any(line.startswith("not shown") for line in shown)


@pytest.mark.parametrize("width", [40, 80, 200])
def test_ids_are_never_broken_or_cut(home: Path, width: int) -> None:
    long_id = "smollm2-135m-instruct-dpo-20261129-054441-" + "a1b2c3d4" * 5
    Record(open_store(str(home / "store")), "jobs", long_id).create(train_manifest(long_id))
    shown = on_terminal("jobs", "--timeout", "20", home=home, width=width)
    assert sum(long_id in line for line in shown) == 2  # in the table and in the next command


def test_a_job_is_deleted_without_a_terminal_only_with_yes(home: Path) -> None:
    record = Record(open_store(str(home / "store")), "jobs", "keep-me")
    record.create(train_manifest("keep-me"))
    done = palate("delete", "keep-me", home=home)
    assert (done.returncode, done.stdout) == (1, "")
    assert "keep-me (job, with model and checkpoints); confirm with --yes" in done.stderr
    assert record.exists()
    assert palate("delete", "keep-me", "not-there", "--yes", home=home).returncode == 1
    assert record.exists(), "one wrong name, and nothing is deleted"
    assert palate("delete", "keep-me", "--yes", home=home).stdout == "keep-me\tdeleted\n"
    assert not record.exists()


def test_a_running_service_is_deleted_only_with_yes_and_the_question_names_all_that_goes(home: Path) -> None:
    store = open_store(str(home / "store"))
    records = [Record(store, "services", name) for name in ("up", "down")]
    for record, state in zip(records, ("Running", "Stopped"), strict=True):
        record.create(serve_manifest(record.name))
        record.advance(state, expect={"Creating"}, engine_id="elsewhere:1:2:x", endpoint="http://127.0.0.1:9")  # type: ignore[arg-type]
    job = Record(store, "jobs", "tuned")
    job.create(train_manifest("tuned"))
    done = palate("delete", "up", home=home)
    assert (done.returncode, "up (running service); confirm with --yes" in done.stderr) == (1, True)
    done = palate("delete", "down", "up", "tuned", home=home)
    assert "up (running service), tuned (job, with model and checkpoints), down; confirm" in done.stderr
    assert [record.exists() for record in (*records, job)] == [True, True, True]
    assert palate("delete", "down", home=home).stdout == "down\tdeleted\n"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("chat tuned", "no service 'tuned' in file://{store}: it is a job: `palate deploy tuned` serves its model"),
        ("start tuned", "`palate deploy tuned`"),
        ("update tuned tuned", "`palate deploy tuned`"),
        ("update svc tuned --checkpoint newest", "--checkpoint 'newest' is not a checkpoint: expected 'latest'"),
        (
            "update svc tuned --checkpoint latest",
            "job tuned is Creating and has no complete checkpoint: save_steps is 0",
        ),
        ("checkpoints svc", "it is a service: `palate show svc`"),
        ("watch svc", "no job 'svc' in file://{store}: it is a service: `palate show svc`"),
        ("metrics svc", "`palate show svc`"),
        ("deploy svc", "`palate show svc`"),
        ("deploy smollm2-135m-instruct", "To serve the untuned model of this name add --base"),
        ("chat svc", "it is Stopped (stopped on request): start it again (`palate start svc`)"),
        (
            "deploy smollm2-135m-instruct --base --name svc",
            "serve another job under it (`palate update svc JOB`), or delete",
        ),
    ],
)
def test_a_name_of_the_wrong_kind_or_state_leads_to_the_command_that_takes_it(
    home: Path, line: str, words: str
) -> None:
    store = open_store(str(home / "store"))
    Record(store, "jobs", "tuned").create(train_manifest("tuned"))
    service = Record(store, "services", "svc")
    service.create(serve_manifest("svc"))
    service.advance("Stopped", expect={"Creating"}, reason="stopped on request")
    done = palate(*line.split(), home=home)
    assert (done.returncode, done.stdout) == (1, "")
    assert words.format(store=home / "store") in done.stderr


def test_show_has_both_forms_of_the_endpoint_and_the_token_only_where_it_is_asked_for(home: Path) -> None:
    store = open_store(str(home / "store"))
    record = Record(store, "services", "svc")
    record.create(serve_manifest("svc"))
    store.put(record.key(TOKEN_KEY), b"a-token-for-tests", private=True)
    record.advance("Running", expect={"Creating"}, endpoint="http://127.0.0.1:9", engine_id="elsewhere:1:2:x")
    shown = palate("show", "svc", home=home).stdout
    assert re.search(r"^endpoint +http://127.0.0.1:9$", shown, re.MULTILINE)
    assert re.search(r"^OpenAI base URL +http://127.0.0.1:9/v1$", shown, re.MULTILINE)
    assert "a-token" not in shown
    assert palate("show", "svc", "--token", home=home).stdout == "a-token-for-tests\n"
    Record(store, "jobs", "one").create(train_manifest("one"))
    record.advance("Stopped", expect={"Running"})
    record.begin_again(expect={"Stopped"}, attempt=1, more=1)
    assert re.search(r"^state +Creating, start 2$", palate("show", "svc", home=home).stdout, re.MULTILINE)
    assert "only a service has a token" in palate("show", "one", "--token", home=home).stderr


def test_a_watch_that_ends_by_its_timeout_says_so_and_is_no_error(home: Path) -> None:
    record = Record(open_store(str(home / "store")), "jobs", "one")
    record.create(train_manifest("one"))
    record.advance("Running", expect={"Creating"}, engine_id="elsewhere:1:2:x")
    done = palate("watch", "one", "--timeout", "0.1", home=home)
    assert (done.returncode, done.stdout) == (1, "one\tRunning\n")
    assert done.stderr.splitlines() == [
        "one has not ended within --timeout 0.1 s, and continues",
        "next: palate watch one",
    ]


def test_jobs_as_json_have_hyperparameters_data_and_uris(home: Path) -> None:
    Record(open_store(str(home / "store")), "jobs", "one").create(train_manifest("one"))
    (row,) = json.loads(palate("jobs", "--json", home=home).stdout)
    assert row["hyperparameters"]["seq_length"] > 0
    assert set(row) >= {"id", "uri", "state", "model", "given", "data", "model_uri", "labels", "reason"}
    assert row["model_uri"] is None, "it has no model yet"


def test_the_version_is_printed(home: Path) -> None:
    assert palate("--version", home=home).stdout == f"palate {__version__}\n"


def commands(command: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    for verb, found in command.commands.items():
        if hasattr(found, "commands"):
            yield from commands(found, f"{name}{verb} ")
        else:
            yield f"{name}{verb}", found


@pytest.mark.parametrize("group", [[], ["data"], ["store"], ["images"]])
def test_no_summary_is_cut_at_80_characters(home: Path, group: list[str]) -> None:
    done = palate(*group, "--help", home=home, COLUMNS="80")
    assert "..." not in done.stdout.partition("Commands:")[2]


def test_every_command_has_examples_that_the_parser_accepts() -> None:
    found = dict(commands(typer.main.get_command(app)))
    assert set(found) == set(EXAMPLES)
    for name, lines in EXAMPLES.items():
        assert lines
        for line in lines:
            program, *arguments = shlex.split(line)
            assert program == "palate"
            assert arguments[: len(name.split())] == name.split()
            parse(arguments)
            assert f"\n  {line}" in found[name].epilog


def test_the_examples_that_need_no_job_no_model_and_no_engine_work_as_they_are_shown(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("prefs.jsonl", "prefs.csv"):
        rows = [{"prompt": f"Is it {n}?", "chosen": "Yes, it is.", "rejected": "No."} for n in range(20)]
        lines = [json.dumps(row) for row in rows]
        if name.endswith(".csv"):
            lines = ["prompt,chosen,rejected", *(",".join(f'"{value}"' for value in row.values()) for row in rows)]
        Path(name).write_text("\n".join(lines) + "\n")
    Path("table.csv").write_text("question,better,worse\nIs it?,Yes it is.,No.\n")
    groups = ("jobs", "services", "clean", "models", "data check", "data convert", "data split", "data stats")
    for line in [line for name in (*groups, "data formats", "data demo") for line in EXAMPLES[name]]:
        try:
            code = app(shlex.split(line)[1:], prog_name="palate", standalone_mode=False)
        except typer.Exit as end:
            code = end.exit_code
        assert not code, f"{line}\n{capsys.readouterr().err}"
        assert "error" not in capsys.readouterr().err, line


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_completes_commands(home: Path, shell: str) -> None:
    script = palate("--show-completion", shell, home=home, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert "_PALATE_COMPLETE" in script.stdout
    variables = {
        "bash": {"COMP_WORDS": "palate ser", "COMP_CWORD": "1"},
        "zsh": {"_TYPER_COMPLETE_ARGS": "palate ser"},
        "fish": {"_TYPER_COMPLETE_ARGS": "palate ser", "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
    }[shell]
    done = palate(home=home, _PALATE_COMPLETE=f"complete_{shell}", **variables)
    assert "services" in done.stdout
    assert "train" not in done.stdout


def test_a_job_is_shown_on_a_page(home: Path) -> None:
    manifest = train_manifest("one", labels={"team": "search"})
    Record(open_store(str(home / "store")), "jobs", "one").create(manifest)
    done = palate("show", "one", home=home)
    lines = {line.split("  ")[0]: line for line in done.stdout.splitlines()}
    assert lines["job"].endswith("one")
    assert "Creating" in lines["state"] or "Failed" in lines["state"]
    assert manifest.body.model.name in lines["base model"]
    assert "team=search" in lines["labels"]
    assert f"{home}/store/jobs/one" in lines["record"]
    assert "next: palate" in done.stderr
    assert json.loads(palate("show", "one", "--json", home=home).stdout)["manifest"]["name"] == "one"


def test_a_job_s_page_lists_its_evaluations_newest_first(home: Path) -> None:
    record = Record(open_store(str(home / "store")), "jobs", "one")
    record.create(train_manifest("one"))
    pair = compared("base", "one", Figure(value=0.25, low=0.1, high=0.4))
    for key, created_at in (("0a1b2c", 86400.0 * 3), ("7e2297", 86400.0 * 9)):
        made = evaluation_record(key, "one", "base", comparisons=(pair,))
        write_evaluation(record, structs.replace(made, created_at=created_at), [])
    record.store.put(record.key("evaluations/damaged.json"), b"{")
    shown = palate("show", "one", home=home).stdout
    found = re.findall(r"(\w{6}), 1970-01-(\d\d) .*: win-rate (75.0%) .* against base", shown)
    assert found == [("7e2297", "10", "75.0%"), ("0a1b2c", "04", "75.0%")]
    unknown = palate("show", "7e2297", home=home)
    assert "`palate eval JOB` lists the evaluations of a job" in unknown.stderr


def test_only_what_differs_from_the_defaults_is_shown(home: Path) -> None:
    early = structs.replace(train_manifest("one"), created_at=-1e300)  # a record may contain any number
    Record(open_store(str(home / "store")), "jobs", "one").create(early)
    usual = palate("show", "one", home=home).stdout
    given = train_manifest("two")
    changed = structs.replace(
        given.body, hyperparameters=structs.replace(given.body.hyperparameters, learning_rate=0.5)
    )
    Record(open_store(str(home / "store")), "jobs", "two").create(structs.replace(given, body=changed))
    shown = palate("show", "two", home=home).stdout
    assert "learning_rate=0.5 (default 5e-5)" in shown
    assert "learning_rate=0.5" not in usual
    assert "per_device_eval_batch_size" not in shown


def without(module: str, *arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command as if these packages were not installed."""
    code = f"import sys; sys.modules.update(dict.fromkeys({module.split(',')!r})); from palate.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PALATE_HOME": str(home)},
        timeout=120,
    )


@pytest.mark.parametrize(
    ("module", "arguments", "words"),
    [
        ("boto3,botocore", ["store", "up", "--folder", "{tmp}/s3", "--port", "29111"], "palate[store-server]"),
        ("cryptography", ["store", "up", "--folder", "{tmp}/s3", "--port", "29111"], "palate[store-server]"),
        ("boto3,botocore", ["train", "s3://bucket/x.json", "--model", "smollm2-135m-instruct"], "palate[s3]"),
        ("pyarrow", ["data", "convert", "{prefs}", "--to", "trl", "--output", "{tmp}/x.parquet"], "palate[data]"),
        ("huggingface_hub", ["data", "check", "hf://owner/name"], "palate[data]"),
        ("gspread", ["data", "check", "gsheet://abc"], "palate[data]"),
        (
            "openai",
            [
                "data",
                "generate",
                "{prefs}",
                "-o",
                "{tmp}/x.jsonl",
                "--model",
                "a",
                "--base-url",
                "http://127.0.0.1:9/v1",
            ],
            "the package openai is required",
        ),
    ],
)
def test_a_missing_package_is_one_line_with_the_remedy(
    home: Path, tmp_path: Path, prefs: Path, module: str, arguments: list[str], words: str
) -> None:
    done = without(module, *(word.format(tmp=tmp_path, prefs=prefs) for word in arguments), home=home)
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert "pip install" in done.stderr


BAD_LINES = [
    (["train", "{prefs}"], ["--model", "--model-uri"]),
    (["train", "{prefs}", "--model", "smollm2-135m-instruct", "--name", ""], ["--name ''"]),
    (["train", "{prefs}", "--model", "smollm2-135m-instruct", "--max-attempts", "0"], ["--max-attempts 0"]),
    (["train", "{prefs}", "--model", "smollm2-135m-instruct", "--max-run-time", "0"], ["--max-run-time 0"]),
    (["train", "{prefs}", "--model", "smollm2-135m-instruct", "--method", "LoRA"], ["--method 'LoRA'"]),
    (["train", "{prefs}", "--model", "smollm2-135m-instruct", "--strategy", "x"], ['--strategy "x"']),
    (["train", "{prefs}", "--model", "smollm2-135m-instruct", "--adapter", "/nowhere"], ["--adapter must"]),
    (["train", "{prefs}", "--model-uri", "/nowhere"], ["--model-uri '/nowhere'"]),
    (["deploy", "smollm2-135m-instruct", "--base", "--engine", "x"], ["--engine is 'x'"]),
    (["deploy", "smollm2-135m-instruct", "--base", "--port", "99999999"], ["--port is 99999999"]),
    (["deploy", "smollm2-135m-instruct", "--base", "--max-model-len", "-5"], ["--max-model-len is -5", "omit it"]),
    (["deploy", "smollm2-135m-instruct", "--base", "--time-to-live", "-5"], ["--time-to-live -5"]),
    (["jobs", "--status", "x"], ["--status 'x'"]),
    (["models", "--kind", "x"], ["--kind 'x'"]),
    (["data", "split", "{prefs}", "--output", "{tmp}/x.json", "--share", "5"], ["--share 5.0"]),
    (["data", "demo", "{tmp}/demo", "--per-topic", "9"], ["--per-topic 9"]),
    (["data", "check", "{prefs}", "--label-column", "chosen=x"], ["--input-column PLACEHOLDER=COLUMN"]),
    (["watch", "nothing"], ["PALATE_STORE selects"]),
]


@pytest.mark.parametrize(("arguments", "words"), BAD_LINES, ids=[" ".join(line) for line, _ in BAD_LINES])
def test_errors_name_the_options_that_were_typed(
    home: Path, tmp_path: Path, prefs: Path, arguments: list[str], words: list[str]
) -> None:
    done = palate(*(word.format(tmp=tmp_path, prefs=prefs) for word in arguments), home=home)
    assert (done.returncode, done.stdout) == (1, "")
    message = done.stderr.partition("error: ")[2]
    for word in words:
        assert word in message
    assert not re.search(r"\b[a-z]+(?:_[a-z]+)+ ?=|Session\(|\bNone\b|inputs\[", message)


def test_a_long_message_is_reworded_at_once() -> None:
    options = {"model_uri": ("--model-uri", "")}
    for part in ("'", "' ", '"\\', "`", "inputs['", "'\\'", "  | \n", "last log lines:\n  "):
        begun = time.process_time()
        reworded(part * 20_000, options)
        assert time.process_time() - begun < 2


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            "x.json --learning-rate 1e-3",
            "--learning-rate. learning_rate is a hyperparameter: --set learning_rate=VALUE",
        ),
        ("x.json --lr 1e-3", "--lr. learning_rate is a hyperparameter: --set learning_rate=VALUE"),
        ("x.json --set learning_rate 1e-3", "(1e-3). --set takes one word: --set learning_rate=VALUE"),
        ("x.csv --input-column prompt=Question", "palate data convert DATA --output NEW.jsonl --input-column …"),
        ("x.csv --frobnicate 3", "No such option: --frobnicate\n"),
    ],
)
def test_a_setting_that_is_given_as_an_option_is_answered_with_how_it_is_given(
    home: Path, line: str, words: str
) -> None:
    done = palate("train", *line.split(), home=home)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr


def test_words_of_the_user_are_not_reworded() -> None:
    options = {"model_uri": ("--model-uri", ""), "share": ("--share", "")}
    for words in ("/data/model_uri/x", "'share=5'", "job.model_uri", "model_uri_of_mine", "/a/share=5"):
        assert reworded(f"{words} is not there", options) == f"{words} is not there"
    for words in (
        "'the data = {x}, share=5'",
        '"it\'s share = {x}"',
        "service failed:\n  | ValueError: share=5 of model_uri",
        "job failed: bad\nlast log lines:\n  share = 5\n  it's model_uri=",
        "`palate data split --set share=5`",
        "the jobs' row 3: 'a share=5, or None'",
    ):
        assert reworded(f"{words} is not there", options) == f"{words} is not there"
    said = "model_uri='share=5' of the job's \"x\": share={'a': 'b'} and model_uri='' or share='x"
    assert (
        reworded(said, options) == "--model-uri 'share=5' of the job's \"x\": --share and --model-uri '' or --share 'x"
    )
    assert reworded("set model_uri= or share=5", options) == "set --model-uri or --share 5"


def test_every_command_knows_its_options() -> None:
    for name, command in commands(typer.main.get_command(app)):
        options = options_of(inspect.unwrap(command.callback))
        real = {option for item in command.params for option in item.opts}
        flags = {flag for flag, _ in options.values() if flag.startswith("-")}
        assert flags <= real, name


def test_deploy_and_update_take_a_checkpoint_in_one_way() -> None:
    taken = {
        name: (item.metavar, item.help)  # type: ignore[attr-defined]
        for name, command in commands(typer.main.get_command(app))
        for item in command.params
        if "--checkpoint" in item.opts and name in ("deploy", "update")
    }
    assert len(taken) == 2, taken
    assert len(set(taken.values())) == 1, taken


def test_a_reader_that_stops_early_is_no_error(home: Path) -> None:
    """As in `palate models --json | head -1`: the output is larger than a pipe holds."""
    script = f"{shlex.quote(sys.executable)} -m palate.cli models --hyperparameters --json | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, env={**os.environ, "PALATE_HOME": str(home)}, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "[\n", "")


def test_next_commands_are_printed_in_one_way() -> None:
    """`say_next` quotes for a shell, and tests/slow/test_next_commands.py runs what it prints."""
    for file in Path(palate_package.__file__).parent.rglob("*.py"):
        for line in file.read_text(encoding="utf-8").splitlines():
            assert "next: " not in line or "shlex.join" in line, f"{file.name}: {line.strip()}"


@pytest.mark.parametrize("on_path", ["it", "another", "none"])
@pytest.mark.parametrize("started", ["palate", "python -m palate.cli"])
def test_the_next_command_starts_the_same_program_whether_path_leads_to_it_or_not(
    home: Path, tmp_path: Path, on_path: str, started: str
) -> None:
    own = Path(sys.executable).with_name("palate")
    another = tmp_path / "bin" / "palate"
    another.parent.mkdir()
    another.write_text("#!/bin/sh\nexit 3\n")
    another.chmod(0o755)
    path = {"it": [str(own.parent)], "another": [str(another.parent)], "none": []}[on_path]
    environment = {**os.environ, "PALATE_HOME": str(home), "PATH": os.pathsep.join([*path, "/usr/bin", "/bin"])}
    command = [str(own)] if started == "palate" else [sys.executable, "-m", "palate.cli"]
    done = subprocess.run([*command, "jobs"], capture_output=True, text=True, env=environment, timeout=60)
    printed = done.stderr.splitlines()[-1].removeprefix("next: ")
    assert printed == f"{'palate' if on_path == 'it' else own} quickstart"
    again = subprocess.run(
        ["bash", "-c", f"{printed} --help"], capture_output=True, text=True, env=environment, timeout=60
    )
    assert (again.returncode, "Usage: palate quickstart" in again.stdout) == (0, True)


def test_a_recipe_file_names_the_data_and_the_command_overrides_it(home: Path, tmp_path: Path, prefs: Path) -> None:
    folder = tmp_path / "recipe"
    folder.mkdir()
    (folder / "r.toml").write_text(
        'model_name = "smollm2-135m-instruct"\nname = "a/b"\n[inputs]\ntrain = "absent.json"'
    )
    recipe = ["train", "--recipe", str(folder / "r.toml")]
    assert "a/b" in palate(*recipe, home=home).stderr  # the file's job id is checked first
    done = palate(*recipe, "--name", "one", home=home)
    assert f"{folder / 'absent.json'}: no such file" in done.stderr
    assert "ftp://" in palate(*recipe, str(prefs), "--name", "one", "--store", "ftp://x", home=home).stderr
    other = palate(*recipe, str(tmp_path / "other.json"), "--name", "one", home=home)
    assert f"{tmp_path / 'other.json'}: no such file" in other.stderr
    assert {done.returncode, other.returncode} == {1}
