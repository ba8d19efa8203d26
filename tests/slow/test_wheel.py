"""The built wheel in an empty environment, no checkout beside it: what a user of `pip install palate` has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.support.rows import preference_rows

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty environment with the wheel and its core dependencies."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    wheel = next(folder.glob("*.whl"))
    install = [python, "-m", "pip", "install", "--quiet", str(wheel)]
    subprocess.run(install, check=True)
    return python


def run(python: Path, *arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [str(python), "-m", "palate.cli", *arguments],
        capture_output=True,
        text=True,
        cwd=python.parent,
        env={**environment, "PALATE_HOME": str(home)},
        timeout=300,
    )


def test_doctor_and_models_run_without_the_extras(python: Path, home: Path) -> None:
    doctor = run(python, "doctor", "--json", home=home)
    assert doctor.returncode == 0, doctor.stderr
    findings = {item["topic"]: item for item in json.loads(doctor.stdout)}
    assert findings["training"]["state"] == "missing"
    assert findings["training"]["remedy"] == "pip install 'palate[train]'"
    assert "qwen2-0.5b-instruct" in run(python, "models", home=home).stdout
    assert (python.parent / "palate-run").exists()


def test_a_training_without_the_extras_says_what_to_install(
    python: Path, home: Path, tiny: Path, tmp_path: Path
) -> None:
    prefs = tmp_path / "prefs.json"
    prefs.write_text(json.dumps(preference_rows()))
    done = run(python, "train", str(prefs), "--model-uri", str(tiny), home=home)
    assert done.returncode == 1
    assert "palate[train]" in done.stderr
    assert "Traceback" not in done.stderr


def test_images_are_built_from_the_installed_package(python: Path, tmp_path: Path) -> None:
    """Without a checkout the build context is the package as it is installed, packed again, with the files of the images."""
    program = (
        "import json, zipfile; from palate.backends.images import build_source\n"
        "with build_source() as source:\n"
        "    files = sorted(path.relative_to(source.folder).as_posix() for path in source.folder.rglob('*') if path.is_file())\n"
        "    names = zipfile.ZipFile(next(source.folder.glob('*.whl'))).namelist()\n"
        "print(json.dumps([files, names]))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-c", program], capture_output=True, text=True, cwd=tmp_path, env=environment, check=True
    )
    files, names = json.loads(done.stdout)
    assert {"container/Dockerfile", "serve/Dockerfile", "container/install", "container/uv-settings"} <= set(files)
    assert {"container/locks/cpu.txt", "container/locks/cuda.txt"} <= set(files)
    original = zipfile.ZipFile(next(python.parents[2].glob("*.whl"))).namelist()
    assert set(names) == set(original)


def test_a_training_runs_with_the_extras(python: Path, home: Path, tiny: Path, tmp_path: Path) -> None:
    # The extras are those of the running environment, lent as a path: a .pth file brings its packages, and not the
    # editable install of this checkout, which is a .pth file of its own.
    site = next((python.parents[1] / "lib").glob("python3*")) / "site-packages"
    lent = site / "zz-extras.pth"
    lent.write_text(sysconfig.get_path("purelib") + "\n")
    try:
        where = subprocess.run(
            [python, "-c", "import palate, palate_trainer; print(palate.__file__, palate_trainer.__file__)"],
            capture_output=True, text=True, check=True, cwd=python.parent,
        )  # fmt: skip
        assert all(str(site) in path for path in where.stdout.split())
        prefs = tmp_path / "prefs.json"
        prefs.write_text(json.dumps(preference_rows()))
        done = run(
            python, "train", str(prefs), "--model-uri", str(tiny), "-s", "max_steps=2", "--name", "one", home=home
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == "one\n"
        assert (home / "store" / "jobs" / "one" / "model" / "adapter_model.safetensors").exists()
    finally:
        lent.unlink()
