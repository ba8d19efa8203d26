"""Images without an engine: names, what is said where there is none, and locks that agree with what was tested."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from palate import __version__
from palate.errors import ConfigurationError
from palate.images import BASE_IMAGE, build_image, image_name
from palate.images.engine import Engine, EngineName, find_engine
from palate.images.errors import EngineError
from palate.images.source import build_source
from palate_recipes.errors import PalateError

ROOT = Path(__file__).parents[2]
LOCKS = {
    "container/requirements-cpu.txt": ("s3", "train"),
    "container/requirements-cuda.txt": ("s3", "train"),
    "serve/requirements-cpu.txt": ("s3", "serve-cpu"),
    "serve/requirements-cuda.txt": ("s3", "serve"),
}


def pins(path: Path) -> dict[str, str]:
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    pairs = (line.partition(";")[0].strip().partition("==") for line in lines if "==" in line)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, _, version in pairs}


def test_a_name_has_the_version_and_the_variant() -> None:
    assert image_name("trainer", "cpu") == f"palate-trainer:{__version__}-cpu"
    assert image_name("server", "cuda", tag="mine") == "palate-server:mine"


def test_without_an_engine_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PALATE_ENGINE", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EngineError, match=r"docker, podman not found.*install docker"):
        find_engine()
    with pytest.raises(EngineError, match="podman not found"):
        find_engine("podman")
    with pytest.raises(ConfigurationError, match="unknown engine 'lxc': known are docker, podman"):
        find_engine("lxc")
    assert issubclass(EngineError, PalateError)


@pytest.mark.skipif(shutil.which("docker") is None, reason="no docker command here")
def test_an_engine_that_does_not_answer_is_named_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/nothing.sock")
    with pytest.raises(EngineError, match=r"docker is installed and does not answer: .*nothing\.sock.*DOCKER_HOST"):
        find_engine("docker")


@pytest.mark.parametrize(
    ("name", "answer", "limits"),
    [
        ("docker", {"CpuCfsQuota": True, "MemoryLimit": True}, {"cpu", "memory"}),
        ("docker", {"CpuCfsQuota": False, "MemoryLimit": False}, set()),  # without root, cgroups v1
        ("podman", {"host": {"security": {"rootless": False}}}, {"cpu", "memory"}),
        ("podman", {"host": {"security": {"rootless": True}, "cgroupControllers": []}}, set()),
        ("podman", {"host": {"security": {"rootless": True}, "cgroupControllers": ["memory", "pids"]}}, {"memory"}),
    ],
)
def test_an_engine_says_which_limits_it_can_hold_to(
    tmp_path: Path, name: EngineName, answer: dict[str, object], limits: set[str]
) -> None:
    command = tmp_path / name  # answers as engines do on machines that no test has
    command.write_text(f"#!/bin/sh\necho '{json.dumps(answer)}'\n")
    command.chmod(0o755)
    assert Engine(name, str(command)).enforces() == limits


def test_what_cannot_be_built_is_refused_before_an_engine_is_asked() -> None:
    nobody = Engine("docker", "/nowhere/docker")
    with pytest.raises(ConfigurationError, match="unknown program 'webui': known are trainer, server"):
        build_image("webui", "cpu", engine=nobody)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="unknown variant 'rocm'"):
        build_image("trainer", "rocm", engine=nobody)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="is no tag"):
        build_image("trainer", "cpu", engine=nobody, tag="a b")


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_holds_every_requirement_of_its_extras(lock: str) -> None:
    """A version that pyproject.toml pins and a lock does not have would be another one in the image: run container/lock."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(line for extra in LOCKS[lock] for line in project["optional-dependencies"][extra]),
    ]
    found = pins(ROOT / lock)
    for requirement in wanted:
        name, exact = re.match(r"([A-Za-z0-9-]+)(?:==([^,;]+))?", requirement).groups()  # type: ignore[union-attr]
        assert name in found, f"{name} is not in {lock}: run container/lock"
        assert exact is None or found[name].partition("+")[0] == exact, f"{name} differs in {lock}: run container/lock"


@pytest.mark.parametrize("lock", [lock for lock in LOCKS if "cpu" in lock])
def test_a_lock_for_processors_is_what_was_tested(lock: str) -> None:
    tested = pins(ROOT / "constraints.txt")
    found = pins(ROOT / lock)
    assert found["torch"] == f"{tested['torch']}+cpu"  # never a CUDA build because an index was out of reach
    assert not [name for name in found if name.startswith("nvidia-") or name == "triton"]
    both = found.keys() & tested.keys() - {"torch"}
    assert {name: found[name] for name in both} == {name: tested[name] for name in both}


def test_both_dockerfiles_begin_from_the_same_base() -> None:
    for folder in ("container", "serve"):
        assert f"ARG PYTHON_IMAGE={BASE_IMAGE}\n" in (ROOT / folder / "Dockerfile").read_text()


def test_both_dockerfiles_share_the_stage_of_what_both_hold() -> None:
    """Line for line, up to the layer itself, else an engine builds and keeps torch twice."""
    trainer, server = ((ROOT / folder / "Dockerfile").read_text().splitlines() for folder in ("container", "serve"))
    begin, layer = "ARG PYTHON_IMAGE=" + BASE_IMAGE, "COPY --from=common /opt/palate /opt/palate"
    for first, last in ((begin, "# What this image alone holds."), ("FROM ${PYTHON_IMAGE}", layer)):
        parts = [lines[lines.index(first) : lines.index(last) + 1] for lines in (trainer, server)]
        assert parts[0] == parts[1]
    assert trainer[trainer.index(layer) - 1] == "FROM ${PYTHON_IMAGE}"
    for variant in ("cpu", "cuda"):
        common = [
            set((ROOT / folder / f"requirements-{variant}.txt").read_text().splitlines())
            for folder in ("container", "serve")
        ]
        assert any(line.startswith("torch==") for line in common[0] & common[1])


def test_pip_settings_reach_uv(tmp_path: Path) -> None:
    """uv reads none of them; what it is called with is seen by a program of its name."""
    (tmp_path / "uv").write_text('#!/bin/sh\nenv | grep -E "^(UV_|SSL_CERT_FILE)" | sort\necho "$@"\n')
    (tmp_path / "uv").chmod(0o755)
    pytest.importorskip("pip")
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "pip.conf").write_text(
        "[global]\nfind-links =\n  /wheels/a\n  /wheels/b\nextra-index-url = https://more.example/simple\ncert = /cert.pem\n"
    )
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "PIP_CONFIG_FILE": str(tmp_path / "pip.conf"),
        "PIP_INDEX_URL": "https://index.example/simple",
        "VARIANT": "cpu",
        "TORCH_INDEX_URL": "https://torch.example/cpu",
        "UV_INSECURE_HOST": "own.example",
    }
    (tmp_path / "prefix").mkdir()
    done = subprocess.run(
        ["sh", ROOT / "container/install", tmp_path / "prefix", "torch==1"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    *settings, command = done.stdout.splitlines()
    assert settings == [
        "SSL_CERT_FILE=/cert.pem",
        "UV_DEFAULT_INDEX=https://index.example/simple",
        "UV_FIND_LINKS=/wheels/a,/wheels/b",
        "UV_INDEX=https://more.example/simple https://torch.example/cpu",
        "UV_INSECURE_HOST=own.example",
    ]
    assert command.endswith("torch==1")
    assert "--no-deps" in command


def test_a_checkout_is_built_from_itself() -> None:
    with build_source() as source:
        assert source.folder == ROOT
        assert source.dockerfile("container").is_file()
        assert re.fullmatch(r"([0-9a-f]{40}(-dirty)?)?", source.revision)
