"""Every `next:` command that is printed is run as it stands, from a folder with nothing in it, until no new one comes up."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from palate.weights import SETTING
from palate_recipes.demo import write_demo
from tests.support.models import tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

FIRST = [
    ["data", "demo", "demo", "--per-topic", "1"],
    ["data", "split", "all.json", "-o", "part.json"],
    ["data", "convert", "all.json", "-o", "all.jsonl", "--to", "trl"],
    ["data", "stats", "all.json"],
    ["data", "check", "bad.json"],
    ["data", "check", "all.json", "--fix", "fixed.json"],
    ["models"],
    ["models", "no such model"],
    ["jobs"],
    ["jobs", "--name", "nothing-*"],
    ["services"],
    ["clean"],
    ["show", "JOB"],
    ["metrics", "JOB"],
    ["deploy", "JOB", "--no-wait", "--engine", "transformers", "--name", "later"],
    ["show", "later"],
]
"""Where a user may begin; JOB is the first job that was trained on the way."""

FAILS = [["data", "check", "bad.json"], ["data", "check", "bad.json", "--fix", "OUT.jsonl"]]
"""These have errors to report: their exit code may be 1."""


def kind(line: list[str]) -> tuple[str, ...]:
    """What makes two lines the same step: the verb, and for `data` its own verb."""
    return tuple(line[: 2 if line[0] in ("data", "images", "store") else 1])


def test_every_next_command_works_as_it_is_printed(home: Path, tmp_path: Path, base_model: Path) -> None:
    """With a tiny model in the place of the one that the lines name, which the quickstart trains."""
    work = tmp_path / "work"
    work.mkdir()
    write_demo(work / "source", "honest", per_topic=1)
    (work / "source" / "train.json").rename(work / "all.json")
    (work / "bad.json").write_text(
        '[{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "", "rejected": "c"}]'
    )
    # As in a shell where nothing was activated: what is printed has to start the right program all the same.
    path = os.pathsep.join(
        folder for folder in os.environ["PATH"].split(os.pathsep) if not shutil.which("palate", path=folder)
    )
    environment = {**os.environ, "PALATE_HOME": str(home), "HF_HUB_OFFLINE": "1", "PATH": path}
    started = [sys.executable, "-m", "palate.cli"]
    environment[SETTING] = f"smollm2-135m-instruct={tiny_model(tmp_path / 'tiny', base_model, head_dim=32)}"
    job, done, todo = "", set[tuple[str, ...]](), [list(line) for line in FIRST]

    def run(line: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*started, *line],
            cwd=work,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
        )

    printed = []
    try:
        while todo:
            line = [job if word == "JOB" else word for word in todo.pop(0)]
            finished = run(line)
            assert finished.returncode == 0 or line in FAILS, f"palate {shlex.join(line)}: {finished.stderr[-3000:]}"
            if line[0] == "train" and not job:
                job = finished.stdout.split()[0]
            done.add(kind(line))
            for text in finished.stderr.splitlines():
                if not text.startswith("next: "):
                    continue
                program, *following = shlex.split(text.removeprefix("next: "))
                assert Path(program).is_file(), "PATH has no `palate`"
                started = [program]
                printed.append(following)
                if kind(following) not in done | {kind(one) for one in todo if "JOB" not in one}:
                    todo.insert(0, following)
    finally:
        services = run(["services"]).stdout.splitlines()[1:]
        run(["delete", "--yes", *(row.split("\t")[0] for row in services)])
    verbs = {kind(line)[0] for line in printed}
    assert {"data", "train", "deploy", "chat", "metrics", "jobs", "show"} <= verbs
    assert not any(word in ("NAME", "JOB", "DATA", "SERVICE") for line in printed for word in line)
