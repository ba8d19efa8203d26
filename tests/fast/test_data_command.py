"""`palate data …` as a person meets it, and the data of a training: real processes, stdout for results, exit codes."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from msgspec import to_builtins

from palate import Session
from palate.errors import ConfigurationError, DataError
from palate.runs.record import Record
from palate.sources.inputs import PreferenceData, checked_inputs

GOOD = {"prompt": "Is it?", "chosen": "Yes, it is.", "rejected": "No."}


def rows(count: int, start: int = 0) -> list[dict[str, str]]:
    return [{**GOOD, "prompt": f"Is it {number}?"} for number in range(start, start + count)]


def data(*arguments: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "palate.cli", "data", *map(str, arguments)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        cwd=folder,
        env={**os.environ, "PALATE_HOME": str(folder / "home")},
        timeout=120,
    )


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    lines = [GOOD, {**GOOD, "chosen": "<|im_end|>Sure."}, {"prompt": "b", "chosen": "c"}, GOOD]
    path = tmp_path / "prefs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "{broken\n")
    return path


def test_a_check_names_file_row_field_and_remedy_and_fails(bad: Path) -> None:
    done = data("check", bad.name, folder=bad.parent)
    assert done.returncode == 1
    for words in (
        "error[broken-json]",
        "prefs.jsonl, line 5: broken JSON at line 5, column 2",
        "prefs.jsonl, line 3: `rejected` is missing",
        "prefs.jsonl, line 2: `chosen` holds '<|im_end|>'",
        "prefs.jsonl, line 4: the same pair as line 1",
        "3 of 5 rows are usable (dpo, format pai): 2 errors, 2 warnings",
    ):
        assert words in done.stdout
    assert done.stderr.splitlines()[-1] == "next: palate data check prefs.jsonl --fix OUT.jsonl"


@pytest.mark.parametrize(
    ("count", "strategy", "words"),
    [
        (20, "dpo", "note: with the default hyperparameters, 3 optimizer steps (20 examples, 8 per step"),
        (73, "dpo", ""),
        (20, "kto", "2 optimizer steps (40 examples, 32 per step"),  # of each pair both answers
        (20, "sft", ""),  # the number of examples is not known
    ],
)
def test_a_check_notes_what_is_too_little_to_learn_from(tmp_path: Path, count: int, strategy: str, words: str) -> None:
    (tmp_path / "p.json").write_text(json.dumps(rows(count)))
    done = data("check", "p.json", "--strategy", strategy, folder=tmp_path)
    assert done.returncode == 0
    assert words in done.stderr
    assert ("too few to learn from" in done.stderr) is bool(words)
    assert done.stderr.splitlines()[-1].startswith("next: palate train p.json")


def test_no_fix_is_proposed_where_no_row_can_be_kept(tmp_path: Path) -> None:
    (tmp_path / "none.json").write_text("[{}]")
    done = data("check", "none.json", folder=tmp_path)
    assert (done.returncode, done.stderr) == (1, "")


def test_the_next_command_can_be_pasted_into_a_shell(tmp_path: Path) -> None:
    folder = tmp_path / "my data"
    folder.mkdir()
    (folder / "all.json").write_text(json.dumps(rows(20)))
    for arguments, following in {
        ("demo", "my demo"): [
            *("train", "my demo/train.json", "--validation", "my demo/validation.json"),
            *("--model", "smollm2-135m-instruct"),
        ],
        ("split", "my data/all.json", "-o", "my data/a.json"): [
            *("train", "my data/a.json", "--validation", "my data/a.validation.json"),
            *("--model", "smollm2-135m-instruct"),
        ],
        ("convert", "my data/all.json", "-o", "my data/b.json"): ["data", "check", "my data/b.json"],
        ("stats", "my data/all.json"): ["train", "my data/all.json", "--model", "smollm2-135m-instruct"],
        ("stats", "my data/all.json", "my data/a.json"): ["data", "check", "my data/all.json", "my data/a.json"],
        ("check", "my data/all.json"): ["train", "my data/all.json", "--model", "smollm2-135m-instruct"],
        ("check", "my data/all.json", "--fix", "my data/c.json"): ["data", "check", "my data/c.json"],
    }.items():
        done = data(*arguments, folder=tmp_path)
        assert shlex.split(done.stderr.splitlines()[-1]) == ["next:", "palate", *following]


@pytest.mark.parametrize("length", ["0", "-5", "99999999999"])
def test_a_seq_length_that_no_training_takes_is_refused(tmp_path: Path, length: str) -> None:
    (tmp_path / "one.json").write_text(json.dumps([GOOD]))
    done = data("check", "one.json", "--seq-length", length, folder=tmp_path)
    assert done.returncode == 2
    assert "--seq-length" in done.stderr


def test_a_fixed_copy_passes_the_strict_check(bad: Path) -> None:
    done = data("check", bad.name, "--fix", "good.jsonl", folder=bad.parent)
    assert done.returncode == 0
    assert "skipped: 1 rows, duplicate" in done.stderr
    assert [json.loads(line)["chosen"] for line in (bad.parent / "good.jsonl").read_text().splitlines()] == [
        "Yes, it is.",
        "Sure.",
    ]
    assert data("check", "good.jsonl", "--strict", folder=bad.parent).returncode == 0


def test_warnings_fail_only_a_strict_check(tmp_path: Path) -> None:
    (tmp_path / "twice.json").write_text(json.dumps([GOOD, GOOD]))
    assert data("check", "twice.json", folder=tmp_path).returncode == 0
    assert data("check", "twice.json", "--strict", folder=tmp_path).returncode == 1


def test_the_report_is_json_for_programs(bad: Path) -> None:
    report = json.loads(data("check", bad.name, "--json", folder=bad.parent).stdout)
    assert (report["rows"], report["usable_rows"], report["errors"]) == (5, 3, 2)
    found = {finding["code"]: finding for finding in report["findings"]}
    assert found["missing-field"]["places"] == [
        {"file": "prefs.jsonl", "row": 3, "unit": "line", "field": "rejected", "what": "`rejected` is missing"}
    ]
    assert found["missing-field"]["level"] == "error"
    assert found["missing-field"]["remedy"]


def test_validation_is_searched_for_the_same_prompts(tmp_path: Path) -> None:
    question = "How was the old steam engine in the valley built, and who paid for all of it in the end"
    (tmp_path / "train.json").write_text(json.dumps([{**GOOD, "prompt": question}, {**GOOD, "prompt": "Is it?"}]))
    (tmp_path / "held.json").write_text(
        json.dumps([{**GOOD, "prompt": f"{question}, please"}, {**GOOD, "prompt": "IS IT"}])
    )
    done = data("check", "train.json", "--validation", "held.json", folder=tmp_path)
    assert "train.json, row 1: the prompt is nearly that in held.json, row 1" in done.stdout
    assert "train.json, row 2: the prompt is also in held.json, row 2" in done.stdout


def test_convert_split_stats_demo_and_formats_say_what_they_did(tmp_path: Path) -> None:
    assert data("demo", "demo", "--direction", "blunt", folder=tmp_path).stdout.split() == [
        "demo/train.json",
        "demo/validation.json",
    ]
    done = data("convert", "demo/train.json", "-o", "train.parquet", "--to", "openai", folder=tmp_path)
    assert (done.stdout, done.returncode) == ("train.parquet\n", 0)
    done = data("split", "train.parquet", "-o", "part.jsonl", "--share", "0.25", folder=tmp_path)
    assert done.stdout.split() == ["part.jsonl", "part.validation.jsonl"]
    assert "palate train part.jsonl --validation part.validation.jsonl" in done.stderr
    described = data("stats", "part.jsonl", folder=tmp_path).stdout
    assert "openai" in described
    assert "the chosen answer is the longer one in" in described
    assert "openai\t" in data("formats", folder=tmp_path).stdout


def test_columns_and_templates_reach_the_check(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("q,good,bad\na,b,c\nd,,f\n")
    (tmp_path / "prompts.csv").write_text('name,system,user\nplain,,"Say: {question}"\n')
    mapping = ["--input-column", "question=q", "--label-column", "chosen=good", "--label-column", "rejected=bad"]
    done = data("check", "table.csv", *mapping, "--prompt-template", "prompts.csv", folder=tmp_path)
    assert done.returncode == 1
    assert "table.csv, row 2: column `good` is empty" in done.stdout
    done = data(
        "convert",
        "table.csv",
        "-o",
        "out.jsonl",
        "--to",
        "pai",
        "--skip-bad-rows",
        *mapping,
        "--prompt-template",
        "prompts.csv",
        folder=tmp_path,
    )
    assert json.loads((tmp_path / "out.jsonl").read_text()) == {"prompt": "Say: a", "chosen": "b", "rejected": "c"}
    assert (
        "error: --input-column: expected PLACEHOLDER=COLUMN, such as prompt=q, got 'q'"
        in data("check", "table.csv", "--input-column", "q", folder=tmp_path).stderr
    )


def test_a_table_with_columns_of_its_own_leads_to_a_training_by_the_printed_commands(tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text("q,better,worse\nIs it?,Yes it is.,No.\n")
    mapping = ["--input-column", "prompt=q", "--label-column", "chosen=better", "--label-column", "rejected=worse"]
    done = data("check", "own.csv", *mapping, folder=tmp_path)
    printed = []
    for _ in range(2):
        printed.append(shlex.split(done.stderr.splitlines()[-1].removeprefix("next: palate data ")))
        done = data(*printed[-1], folder=tmp_path)
        assert done.returncode == 0, done.stderr
    assert printed == [
        ["convert", "own.csv", "--output", "own.converted.jsonl", *mapping],
        ["check", "own.converted.jsonl"],
    ]
    last = "next: palate train own.converted.jsonl --model smollm2-135m-instruct"
    assert done.stderr.splitlines()[-1] == last
    assert data("stats", "own.converted.jsonl", folder=tmp_path).stderr.splitlines()[-1] == last


def test_a_file_that_is_no_data_or_not_there_is_answered_with_what_is_meant(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# A title\n")
    (tmp_path / "Own.jsonl").write_text(json.dumps(GOOD) + "\n")
    said = data("check", "README.md", folder=tmp_path).stderr
    assert "README.md does not hold preference data: its first line is '# A title', which is not JSON" in said
    assert data("check", "Own.jsnl", folder=tmp_path).stderr.endswith("Did you mean 'Own.jsonl'?\n")


# The data of a training.


def kept(session: Session, tmp_path: Path, inputs: dict[str, Any], **settings: Any) -> dict[str, dict[str, Any]]:
    record = Record(session.store, "jobs", "job")
    with checked_inputs(inputs, session, **{"strategy": "dpo", "bad_rows": "refuse", **settings}) as checked:
        return {
            channel: to_builtins(item.keep(record, channel)) | {"said": item.remarks(channel, skipped=True)}
            for channel, item in checked.items()
        }


def stored(session: Session, uri: str) -> str:
    return session.store.get(uri.removeprefix(session.store.root).lstrip("/")).decode()


def test_one_local_file_is_copied_as_it_is(session: Session, tmp_path: Path) -> None:
    path = tmp_path / "prefs.json"
    path.write_text(json.dumps(rows(3)))
    found = kept(session, tmp_path, {"train": str(path)})["train"]
    assert found["uri"].endswith("/jobs/job/inputs/train/prefs.json")
    assert (found["rows"], found["bytes"]) == (3, path.stat().st_size)
    assert stored(session, found["uri"]) == path.read_text()


def test_shards_become_one_file_of_plain_rows(session: Session, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    (folder / "deep").mkdir(parents=True)
    (folder / "part-1.json").write_text(json.dumps(rows(2)))
    (folder / "deep" / "part-1.json").write_text(json.dumps(rows(2, 2)))
    (folder / "notes.txt").write_text("not data")
    found = kept(session, tmp_path, {"train": folder})["train"]
    lines = [json.loads(line) for line in stored(session, found["uri"]).splitlines()]
    assert [line["prompt"][0]["content"] for line in lines] == [f"Is it {number}?" for number in (2, 3, 0, 1)]
    assert (found["rows"], found["files"], found["origin"]) == (4, 2, f"file://{folder}")
    assert any("notes.txt" in line for line in found["said"])


def test_named_columns_are_applied_before_the_job_sees_them(session: Session, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text("q,good,bad\na,b,c\n")
    given = PreferenceData(
        uri=table, input_columns={"prompt": "q"}, label_columns={"chosen": "good", "rejected": "bad"}
    )
    found = kept(session, tmp_path, {"train": given})["train"]
    assert json.loads(stored(session, found["uri"])) == {
        "prompt": [{"role": "user", "content": "a"}],
        "chosen": [{"role": "assistant", "content": "b"}],
        "rejected": [{"role": "assistant", "content": "c"}],
    }


def test_warnings_are_said_and_training_goes_on(session: Session, tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text(json.dumps([*rows(3), rows(1)[0]]))
    (tmp_path / "held.json").write_text(json.dumps(rows(1)))
    found = kept(session, tmp_path, {"train": tmp_path / "train.json", "validation": tmp_path / "held.json"})
    said = "\n".join(found["train"]["said"])
    assert "train: warning[duplicate]" in said
    assert "warning[leakage]" in said
    assert list(found) == ["train", "validation"]


def test_wrong_rows_stop_it_or_are_left_out_and_named(session: Session, tmp_path: Path) -> None:
    path = tmp_path / "prefs.json"
    path.write_text(json.dumps([*rows(2), {"prompt": "p"}]))
    with pytest.raises(DataError, match=r"(?s)1 of 3 rows is invalid.*row 3: `chosen` is missing"):
        kept(session, tmp_path, {"train": path})
    found = kept(session, tmp_path, {"train": path}, bad_rows="skip")["train"]
    assert (found["rows"], found["skipped_rows"]) == (2, [3])
    path.write_text(json.dumps(rows(2))[:-5])
    with pytest.raises(DataError, match="broken JSON at line 1"):
        kept(session, tmp_path, {"train": path}, bad_rows="skip")


@pytest.mark.parametrize("uri", ["", 3, None])
def test_what_is_no_place_is_refused(session: Session, tmp_path: Path, uri: Any) -> None:
    with pytest.raises(ConfigurationError, match="must be a path or a URI"):
        kept(session, tmp_path, {"train": uri})


def test_other_column_names_get_the_one_command_that_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shlex

    from typer.testing import CliRunner

    from palate.cli import app

    monkeypatch.chdir(tmp_path)
    for name, header in (("a.csv", "question_text,good answer,bad answer"), ("b.csv", "User question;Good;Bad")):
        separator = ";" if ";" in header else ","
        rows = [separator.join((f"ask {n}", f"yes {n}", f"no {n}")) for n in range(24)]
        Path(name).write_text("\n".join([header, *rows]) + "\n")
        first = CliRunner().invoke(app, ["data", "check", name])
        assert first.exit_code == 1
        assert first.output.count("--label-column chosen=") + first.output.count("--label-column 'chosen=") == 1
        command = shlex.split(first.output.split("Read them by name: palate ")[1].split(". Or rename")[0])
        second = CliRunner().invoke(app, command)
        assert second.exit_code == 0, second.output
        assert "24 of 24 rows are usable" in second.output
        assert "unread" not in second.output
