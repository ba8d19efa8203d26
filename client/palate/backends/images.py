"""Palate's two images: names, lookup and builds. Knows engines, no run.

An image is built from the running code (a checkout or the installed package), never from a package index.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import time
import zipfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Literal, get_args

from palate.backends.engine import Engine, ImageFacts
from palate_recipes import __version__
from palate_recipes.errors import ConfigurationError, ImageBuildError, ImageMissingError

_PACKED = Path(__file__).parent / "build"
"""The Dockerfiles and lock files in an installed package."""
_NOT_IN_WHEEL = ("RECORD", "INSTALLER", "REQUESTED", "direct_url.json")
"""Written by the installer and specific to this machine."""


@dataclass(frozen=True)
class Source:
    """A build context.

    Attributes:
        folder: The context folder.
        revision: Commit of a checkout, with `-dirty` if files have changed; "" for an installed package.
    """

    folder: Path
    revision: str

    def dockerfile(self, folder: str) -> Path:
        """Returns the Dockerfile of `container` or `serve`."""
        return self.folder / folder / "Dockerfile"


@contextmanager
def build_source() -> Iterator[Source]:
    """Yields the build context of this Palate: the checkout, or a temporary folder.

    Raises:
        ConfigurationError: This is neither a checkout nor a complete installed package.
    """
    checkout = Path(__file__).resolve().parents[3]
    if (checkout / "pyproject.toml").is_file() and (checkout / "container" / "Dockerfile").is_file():
        yield Source(checkout, _revision(checkout))
        return
    with tempfile.TemporaryDirectory(prefix="palate-image-") as scratch:
        folder = Path(scratch)
        for name in ("container", "serve"):
            if not (_PACKED / name / "Dockerfile").is_file():
                raise ConfigurationError(
                    f"{_PACKED / name} has no Dockerfile: this Palate is neither a checkout nor a complete wheel; reinstall it"
                )
            shutil.copytree(_PACKED / name, folder / name)
        pack_wheel(folder)
        yield Source(folder, "")


def pack_wheel(folder: Path) -> Path:
    """Packs the installed package, as it is on disk, into a wheel in `folder`.

    Raises:
        ConfigurationError: Palate is not installed as a package.
    """
    try:
        package = distribution("palate")
    except PackageNotFoundError:
        raise ConfigurationError(
            "palate is not installed as a package: `pip install` it, or work in a checkout"
        ) from None
    wheel = folder / f"palate-{package.version}-py3-none-any.whl"
    record, listed = "", []
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(package.files or [], key=str):
            name = file.as_posix()
            outside = name.startswith("..")  # scripts: pip creates them from the wheel's entry points
            if file.name == "RECORD":
                record = name
            if outside or file.suffix == ".pyc" or (file.name in _NOT_IN_WHEEL and ".dist-info/" in name):
                continue
            data = Path(os.fspath(file.locate())).read_bytes()
            archive.writestr(zipfile.ZipInfo(name), data)  # without times, so that the same code gives the same wheel
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            listed.append(f"{name},sha256={digest},{len(data)}\n")
        if not record:
            raise ConfigurationError(f"the installed package {package.version} has no RECORD file: reinstall it")
        archive.writestr(zipfile.ZipInfo(record), "".join([*listed, f"{record},,\n"]))
    return wheel


def _revision(checkout: Path) -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(checkout), *arguments], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    if not (checkout / ".git").exists() or shutil.which("git") is None:
        return ""
    commit = git("rev-parse", "HEAD")
    return f"{commit}-dirty" if commit and git("status", "--porcelain") else commit


Program = Literal["trainer", "server"]
Variant = Literal["cpu", "cuda"]

PROGRAM_LABEL = "ai.palate.program"
VARIANT_LABEL = "ai.palate.variant"

BASE_IMAGE = "python:3.11-slim-bookworm"
"""The default of PYTHON_IMAGE in both Dockerfiles."""

_FOLDERS: dict[str, str] = {"trainer": "container", "server": "serve"}
_TAIL_LINES = 30
_STEP = re.compile(r"^(?:Step \d+/\d+ :|\[\d+/\d+\] STEP|STEP \d+|#\d+ \[)")
"""Matches the first line of a step in the output of docker's two builders and of podman."""
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")


def image_name(program: Program, variant: Variant, tag: str | None = None) -> str:
    """Returns the name of an image, such as `palate-trainer:0.1.0-cpu`.

    Args:
        program: trainer or server.
        variant: cpu or cuda.
        tag: Tag; default: version and variant.
    """
    return f"palate-{program}:{tag or f'{__version__}-{variant}'}"


def need_image(engine: Engine, name: str) -> ImageFacts:
    """Returns the engine's facts about an image. Raises ImageMissingError with the command that builds or pulls it."""
    found = engine.image(name)
    if found is not None:
        return found
    program, _, tag = name.removeprefix("palate-").partition(":")
    if program in _FOLDERS and name.startswith("palate-"):
        variant = "cuda" if tag.endswith("-cuda") else "cpu"
        own = "" if tag == f"{__version__}-{variant}" else f" --tag {tag}"
        remedy = f"build it with `palate images build {program} --variant {variant} --engine {engine.name}{own}`"
    else:
        remedy = f"pull it with `{engine.name} pull {name}`"
    raise ImageMissingError(f"the image {name} is not on this machine ({engine.name}): {remedy}")


def list_images(engine: Engine) -> list[ImageFacts]:
    """Returns Palate's images in the engine by label, newest first."""
    return engine.images(PROGRAM_LABEL)


def build_image(
    program: Program,
    variant: Variant,
    *,
    engine: Engine,
    tag: str | None = None,
    build_args: Mapping[str, str] | None = None,
    network: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> ImageFacts:
    """Builds an image from this Palate, and returns the engine's facts about it.

    Args:
        program: trainer or server.
        variant: cpu or cuda.
        engine: The engine that builds it.
        tag: Tag; default: version and variant.
        build_args: Arguments of the Dockerfile, such as TORCH_INDEX_URL or BUILD_IMAGE. They stay in the image's history, so
            never pass a secret.
        network: The engine's `--network`; `host` if builds have no network otherwise.
        say: Called with a line per build step.

    Raises:
        ConfigurationError: The program, variant or tag is invalid.
        EngineError: The engine does not answer, or the base image is not available.
        ImageBuildError: The build failed. Has the last lines of its log.
    """
    _check("program", program, get_args(Program))
    _check("variant", variant, get_args(Variant))
    if tag is not None and not _TAG.fullmatch(tag):
        raise ConfigurationError(f"tag={tag!r} is not valid: expected at most 128 letters, digits, '.', '_' and '-'")
    given = dict(build_args or {})
    name = image_name(program, variant, tag)
    base = given.get("PYTHON_IMAGE", BASE_IMAGE)
    given |= {"VARIANT": variant, "PALATE_VERSION": __version__, "BASE_DIGEST": _base_digest(engine, base, say)}
    with build_source() as source:
        given["REVISION"] = source.revision or "unknown"
        command = ["build", "--file", str(source.dockerfile(_FOLDERS[program])), "--tag", name]
        for argument, value in given.items():
            command += ["--build-arg", f"{argument}={value}"]
        if network:
            command += ["--network", network]
        if engine.name == "podman":
            command += ["--format", "docker"]  # the OCI format does not support health checks
        say(f"building {name} with {engine.name} {engine.version}")
        _follow(engine, [*command, str(source.folder)], name, say)
    return need_image(engine, name)


def _check(kind: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigurationError(f"unknown {kind} {value!r}: valid values: {', '.join(known)}")


def _base_digest(engine: Engine, base: str, say: Callable[[str], None]) -> str:
    """Returns the digest of the base image, to record it as a label. Pulls a missing image."""
    found = engine.image(base)
    if found is None:
        say(f"pulling {base}")
        engine.run("pull", "--", base, timeout_s=None)
        found = need_image(engine, base)
    return found.digest or found.id


def _follow(engine: Engine, command: list[str], name: str, say: Callable[[str], None]) -> None:
    begun = time.monotonic()
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    with engine.following(*command) as build:
        for line in build.stdout or ():
            line = line.rstrip()
            if not line:
                continue
            tail.append(line)
            if _STEP.match(line):
                say(f"[{time.monotonic() - begun:4.0f} s] {line[:160]}")
        code = build.wait()
    if code != 0:
        raise ImageBuildError(f"building {name} with {engine.name} failed with exit code {code}. Last lines:", [*tail])
    say(f"[{time.monotonic() - begun:4.0f} s] {name} is built")
