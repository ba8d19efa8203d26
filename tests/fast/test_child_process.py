"""What a program that Palate starts is given: no credential that it has no use for, and no module of the folder it runs in."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from palate.env_file import without_credentials
from palate.runner.child_process import Child
from palate_recipes.preferences import check

ROOT = Path(__file__).parents[2]

CREDENTIALS = [
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "OSS_ACCESS_KEY_SECRET",
    "ALIBABA_CLOUD_ACCESS_KEY_SECRET", "AZURE_STORAGE_CONNECTION_STRING", "GOOGLE_APPLICATION_CREDENTIALS",
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OPENAI_API_KEY", "ANTHROPIC_API_KEY", "WANDB_API_KEY", "GITHUB_TOKEN",
    "DB_PASSWORD", "MY_SECRET", "SSH_AUTH_SOCK", "api_key", "PGPASSWORD", "MYSQL_PWD", "GITHUB_PAT", "CI_JOB_JWT", "DB_PASS",
    "ALIYUN_ACCESSKEYSECRET", "SENTRY_DSN",
]  # fmt: skip
SETTINGS = [
    "PATH", "HOME", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "HF_HOME", "TOKENIZERS_PARALLELISM", "OMP_NUM_THREADS",
    "VLLM_CPU_KVCACHE_SPACE", "PALATE_HOME", "PALATE_RUN", "PALATE_RUN_URI", "PYTHONPATH", "KEYBOARD", "MONKEY", "AUTHOR",
    "PWD", "OLDPWD", "COMPASS", "PATTERN",
]  # fmt: skip


def said_by(child: Child) -> str:
    with child:
        assert child.process.wait(30) == 0, child.log.read_text()
    return child.log.read_text()


def test_a_program_is_given_no_credentials_but_those_meant_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {name: f"value of {name}" for name in (*CREDENTIALS, "MY_KEY", "WORD")}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    code = "import json, os; print(json.dumps(dict(os.environ)))"
    child = Child(
        [sys.executable, "-c", code],
        log=tmp_path / "log",
        env={"PALATE_TOKEN": "of the service"},
        cwd=tmp_path,
        kept=["WANDB_API_KEY", "MY_KEY"],
    )
    found = json.loads(said_by(child))
    assert {name for name in given if name in found} == {"WANDB_API_KEY", "MY_KEY", "WORD"}
    assert found["PALATE_TOKEN"] == "of the service"
    assert set(without_credentials(dict.fromkeys([*CREDENTIALS, *SETTINGS], ""))) == set(SETTINGS)
    urls = {
        "A": "https://me:secret@host/simple",
        "B": "redis://:secret@host",
        "C": "http://host:80/a@b",
        "D": "me@host:x",
    }
    assert set(without_credentials(urls)) == {"C", "D"}


def trap(folder: Path, *modules: str) -> Path:
    """Puts modules into a folder that leave a trace when they are imported; returns where it would be."""
    for module in modules:
        (folder / f"{module}.py").write_text(f"open({str(folder / 'trace')!r}, 'w').write({module!r})\n")
    return folder / "trace"


def test_what_a_program_starts_takes_no_module_from_its_folder(tmp_path: Path) -> None:
    trace = trap(tmp_path, "colorsys", "trapped")
    code = (
        "import subprocess, sys\n"
        "subprocess.run([sys.executable, '-c', 'import colorsys'], check=True)\n"
        "assert subprocess.run([sys.executable, '-m', 'trapped']).returncode\n"
    )
    said_by(Child([sys.executable, "-P", "-c", code], log=tmp_path / "log", env={}, cwd=tmp_path))
    assert not trace.exists()


def test_a_check_takes_no_module_from_the_datas_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = trap(tmp_path, "orjson", "numpy", "pickletools", "dataclasses")
    path = tmp_path / "prefs.jsonl"
    rows = [{"prompt": f"Is it {n}?", "chosen": f"No, {n} more.", "rejected": "Yes."} for n in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    check.check([(Path("prefs.jsonl"), "prefs.jsonl")])
    assert not trace.exists()


def test_every_python_that_is_started_leaves_the_current_folder_alone() -> None:
    """Without -P, `python -m` imports from the folder that it is started in before anything else."""
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for room in ("client", "container", "recipes", "serve")
        for path in (ROOT / room).rglob("*.py")
        for match in re.finditer(r"""sys\.executable,\s*(?!"-P")(?:"-\w+",\s*)*"-m",.*""", path.read_text())
    ]
    assert found == []
