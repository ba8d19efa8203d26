"""Palate's two images: their names, whether they are here, and how they are built. Knows engines by their verbs, no run."""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Literal, get_args

from palate import __version__
from palate.errors import ConfigurationError
from palate.images.engine import Engine, ImageFacts
from palate.images.errors import ImageBuildError, ImageMissingError
from palate.images.source import build_source

Program = Literal["trainer", "server"]
Variant = Literal["cpu", "cuda"]

PROGRAM_LABEL = "ai.palate.program"
VARIANT_LABEL = "ai.palate.variant"

BASE_IMAGE = "python:3.11-slim-bookworm"
"""Default of PYTHON_IMAGE in both Dockerfiles."""

_FOLDERS: dict[str, str] = {"trainer": "container", "server": "serve"}
_TAIL_LINES = 30
_STEP = re.compile(r"^(?:Step \d+/\d+ :|\[\d+/\d+\] STEP|STEP \d+|#\d+ \[)")
"""What begins a step in the words of docker's two builders and of podman's."""
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")


def image_name(program: Program, variant: Variant, tag: str | None = None) -> str:
    """Returns the name of an image, such as `palate-trainer:0.1.0-cpu`.

    Args:
        program: Which one.
        variant: For processors, or for CUDA.
        tag: Instead of this version and the variant.
    """
    return f"palate-{program}:{tag or f'{__version__}-{variant}'}"


def need_image(engine: Engine, name: str) -> ImageFacts:
    """Returns what the engine knows of an image; raises ImageMissingError with the command that builds or fetches it."""
    found = engine.image(name)
    if found is not None:
        return found
    program, _, tag = name.removeprefix("palate-").partition(":")
    if program in _FOLDERS and name.startswith("palate-"):
        variant = "cuda" if tag.endswith("-cuda") else "cpu"
        own = "" if tag == f"{__version__}-{variant}" else f" --tag {tag}"
        remedy = f"build it with `palate images build {program} --variant {variant} --engine {engine.name}{own}`"
    else:
        remedy = f"fetch it with `{engine.name} pull {name}`"
    raise ImageMissingError(f"the image {name} is not on this machine ({engine.name}): {remedy}")


def list_images(engine: Engine) -> list[ImageFacts]:
    """Returns Palate's images that the engine has, newest first, whatever they are called."""
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
    """Builds an image from this Palate, and returns what the engine then knows of it.

    Args:
        program: Which one.
        variant: For processors, or for CUDA.
        engine: Builds it.
        tag: Instead of this version and the variant.
        build_args: Arguments of the Dockerfile, such as TORCH_INDEX_URL or BUILD_IMAGE; they stay readable in the image's
            history, so never a secret.
        network: The engine's `--network`, `host` where a build has no network otherwise.
        say: Receives a line a step.

    Raises:
        ConfigurationError: An unknown program or variant, or a tag that no engine takes.
        EngineError: The engine does not answer, or the base image is not to be had.
        ImageBuildError: The build failed; carries its last lines.
    """
    _check("program", program, get_args(Program))
    _check("variant", variant, get_args(Variant))
    if tag is not None and not _TAG.fullmatch(tag):
        raise ConfigurationError(f"tag={tag!r} is no tag: letters, digits, '.', '_' and '-', at most 128 of them")
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
            command += ["--format", "docker"]  # the other format has no health check
        say(f"building {name} with {engine.name} {engine.version}")
        _follow(engine, [*command, str(source.folder)], name, say)
    return need_image(engine, name)


def _check(kind: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigurationError(f"unknown {kind} {value!r}: known are {', '.join(known)}")


def _base_digest(engine: Engine, base: str, say: Callable[[str], None]) -> str:
    """Returns the digest of the base image, which is fetched when it is not there: it is recorded as a label."""
    found = engine.image(base)
    if found is None:
        say(f"fetching {base}")
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
        raise ImageBuildError(
            f"building {name} with {engine.name} failed with exit code {code}; its last lines:", [*tail]
        )
    say(f"[{time.monotonic() - begun:4.0f} s] {name} is built")
