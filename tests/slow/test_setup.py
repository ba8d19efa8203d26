"""What a stranger has: a new folder, an empty home, no setting of pip's or uv's, and the package index alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.rows import preference_rows

ROOT = Path(__file__).parents[2]
PYTHONS = ("3.11", "3.12", "3.13", "3.14")

pytestmark = pytest.mark.slow


def stranger(home: Path) -> dict[str, str]:
    """Returns variables without anybody's settings; proxies and certificates of the machine stay."""
    (home / "xdg").mkdir(parents=True, exist_ok=True)
    mine = ("PIP_", "UV_", "XDG_", "PALATE_", "HF_", "VIRTUAL_ENV", "PYTHON")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(mine)}
    return {**kept, "HOME": str(home), "PIP_CONFIG_FILE": os.devnull, "XDG_CONFIG_DIRS": str(home / "xdg")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def resolving(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables of one stranger, whose uv asks the index once for what several tests resolve."""
    return stranger(tmp_path_factory.mktemp("resolving"))


@pytest.mark.parametrize("python", [PYTHONS[0], *(pytest.param(p, marks=pytest.mark.thorough) for p in PYTHONS[1:])])
@pytest.mark.parametrize(
    "extras", ["s3,data,store-server,train,serve", "s3,data,train,serve-transformers", "train,serve"]
)
def test_the_extras_of_the_wheel_resolve_together_without_constraints(
    wheel: Path, resolving: dict[str, str], extras: str, python: str
) -> None:
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-config", "--only-binary", ":all:", "-"]
    command += ["--python", sys.executable, "--python-version", python, "--python-platform", "x86_64-manylinux_2_31"]
    done = subprocess.run(
        command,
        input=f"palate[{extras}] @ {wheel.as_uri()}\n",
        capture_output=True,
        text=True,
        env=resolving,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    names = {line.partition("==")[0] for line in done.stdout.splitlines()}
    assert {"torch", "transformers", "trl"} <= names
    assert ("vllm" in names) == ("serve-transformers" not in extras)


def test_palate_resolves_with_a_library_that_wants_an_older_rich(wheel: Path, resolving: dict[str, str]) -> None:
    """instructor 1.17 requires rich<15, so `rich>=15` excluded it."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-config", "--python", sys.executable, "-"]
    done = subprocess.run(
        command, input=f"palate @ {wheel.as_uri()}\nrich<15\n", capture_output=True, text=True, env=resolving
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Path]:
    """A new folder with what is in git; gone afterwards, since it takes gigabytes."""
    folder = tmp_path / "palate"
    files = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=True
    ).stdout.split("\0")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    yield folder
    shutil.rmtree(tmp_path / "stranger", ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.thorough
@pytest.mark.timeout(1200)
def test_a_stranger_sets_up_trains_and_deploys(project: Path, tmp_path: Path, tiny: Path) -> None:
    """On a machine without a GPU and without the CPU build of torch: the fallback, setup to answer."""
    if shutil.which("nvidia-smi"):
        pytest.skip("this machine has an NVIDIA driver: its variant is cuda, not the fallback")
    home = tmp_path / "stranger"
    environment = stranger(home)
    begun = time.monotonic()
    # Named outright: where PyTorch's own index can be reached, looking would find the CPU build there.
    setup = ["make", "setup", f"PYTHON={sys.base_prefix}/bin/python3", "VARIANT=transformers"]
    done = subprocess.run(setup, cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    setup_s = time.monotonic() - begun
    assert [path.name for path in project.glob(".venv*")] == [".venv"]

    palate = str(project / ".venv" / "bin" / "palate")
    prefs = tmp_path / "prefs.json"
    prefs.write_text(json.dumps(preference_rows()))

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [palate, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400
        )

    trained = run("train", str(prefs), "--model-uri", str(tiny), "-s", "max_steps=1", "--name", "one")
    assert trained.returncode == 0, trained.stderr[-3000:]
    deployed = run("deploy", "one", "--name", "first")
    try:
        assert deployed.returncode == 0, deployed.stderr[-3000:]
        (service,) = json.loads(run("services", "--json").stdout)
        assert "transformers" in json.dumps(service), service
    finally:
        deleted = run("delete", "--yes", "first")
    assert deleted.returncode == 0, deleted.stderr
    taken = sum(path.lstat().st_size for path in (project / ".venv").rglob("*") if path.is_file())
    print(f"setup {setup_s:.0f} s, {taken / 1e9:.1f} GB; to the deleted service {time.monotonic() - begun:.0f} s")
