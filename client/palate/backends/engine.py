"""The container engine of this machine, through the command line that docker and podman share. Knows no image of Palate's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from palate_recipes.errors import ConfigurationError, EngineError

EngineName = Literal["docker", "podman"]

_ASK_S = 30.0
"""An engine that is well answers at once; one that is starting takes seconds."""

_INSTALL = "install docker (docs.docker.com/engine/install) or podman (podman.io/docs/installation; it needs no root)"


@dataclass(frozen=True)
class ImageFacts:
    """An image that an engine has.

    Attributes:
        name: Its first tag, or its id when it has none.
        id: Digest of its configuration, `sha256:…`: the same wherever this very image is.
        digest: Digest in the registry that it was pulled from or pushed to; "" for one that was only built or loaded.
        size_bytes: All of its layers, unpacked.
        created: ISO time.
        labels: As the image was built.
    """

    name: str
    id: str
    digest: str = ""
    size_bytes: int = 0
    created: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Engine:
    """A container engine that has answered.

    Attributes:
        name: Which one.
        command: Path of its command line.
        version: Of the engine itself, not of the command line.
    """

    name: EngineName
    command: str
    version: str = ""

    def run(
        self, *arguments: str, check: bool = True, timeout_s: float | None = _ASK_S, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Runs one command of the engine's; a secret must never be among the arguments, which other users can see.

        Args:
            arguments: Of the engine's command line.
            check: Whether an exit code other than 0 is an error.
            timeout_s: Seconds, or None for any time.
            cwd: Where it runs; what stays behind for a container, such as podman's monitor, stays there, too.

        Raises:
            EngineError: With `check`, it failed; or it took longer than `timeout_s`.
        """
        what = f"{self.name} {' '.join(arguments[:2])}"
        try:
            done = subprocess.run(
                [self.command, *arguments], capture_output=True, text=True, timeout=timeout_s, cwd=cwd
            )
        except subprocess.TimeoutExpired:
            raise EngineError(
                f"{what} has not answered within {timeout_s:g} s: see whether the engine is well"
            ) from None
        if check and done.returncode != 0:
            raise EngineError(f"{what} failed: {_cause(done)}")
        return done

    def image(self, name: str) -> ImageFacts | None:
        """Returns what the engine knows of an image, by name or id; None when it has none. Fetches nothing."""
        done = self.run("image", "inspect", "--", name, check=False)
        if done.returncode != 0:
            if "no such image" in done.stderr.lower() or "image not known" in done.stderr.lower():
                return None
            raise EngineError(f"{self.name} image inspect {name} failed: {_cause(done)}")
        return _facts(json.loads(done.stdout)[0], name)

    def images(self, label: str) -> list[ImageFacts]:
        """Returns the images that have a label, one entry a tag, newest first; what a newer build took the tag of is left out."""
        found = self.run("image", "ls", "--quiet", "--no-trunc", "--filter", f"label={label}").stdout.split()
        ids = list(dict.fromkeys(found))
        if not ids:
            return []
        facts = []
        for entry in json.loads(self.run("image", "inspect", "--", *ids).stdout):
            facts += [_facts(entry, tag) for tag in entry.get("RepoTags") or ()]
        return sorted(facts, key=lambda image: image.created, reverse=True)

    def enforces(self) -> set[str]:
        """Returns which limits of a container it can hold to: "cpu", "memory". Without root it may have been given none."""
        facts: dict[str, Any] = json.loads(self.run("info", "--format", "{{json .}}").stdout)
        if self.name == "docker":
            return {name for name, key in (("cpu", "CpuCfsQuota"), ("memory", "MemoryLimit")) if facts.get(key)}
        host = facts["host"]
        if not host["security"]["rootless"]:
            return {"cpu", "memory"}
        # The first kind of cgroup belongs to root alone; of the second kind a user has what was delegated.
        return {"cpu", "memory"} & set(host.get("cgroupControllers") or ())

    @contextmanager
    def following(self, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        """Runs a command whose output, stdout and stderr together, is read while it goes; it ends with the block."""
        process = subprocess.Popen(
            [self.command, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=self._environment(),
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
            process.wait()
            if process.stdout:
                process.stdout.close()

    def _environment(self) -> dict[str, str]:
        if self.name == "docker" and "DOCKER_BUILDKIT" not in os.environ and not _has_buildx(self.command):
            # A newer docker refuses to build without that plugin, unless it is told to build as the older ones do.
            return {**os.environ, "DOCKER_BUILDKIT": "0"}
        return dict(os.environ)


def find_engine(name: str | None = None) -> Engine:
    """Returns an engine that answers: the one that is named, else docker, else podman.

    Args:
        name: `docker` or `podman`; default: PALATE_ENGINE, else whichever answers.

    Raises:
        ConfigurationError: There is no engine of that name.
        EngineError: None is installed, or none answers; says what to install or to start.
    """
    name = name or os.environ.get("PALATE_ENGINE") or None
    known = get_args(EngineName)
    if name is not None and name not in known:
        raise ConfigurationError(f"unknown engine {name!r}: known are {', '.join(known)}")
    silent = []
    for candidate in (name,) if name else known:
        command = shutil.which(candidate)
        if command is None:
            continue
        engine = Engine(candidate, command)
        done = engine.run("version", "--format", "{{json .}}", check=False)
        if done.returncode == 0:
            return _answered(candidate, command, done.stdout)
        silent.append(f"{candidate} is installed and does not answer: {_cause(done)}. {_wake(candidate, _cause(done))}")
    if silent:
        raise EngineError("\n".join(silent))
    raise EngineError(f"no container engine is here ({name or ', '.join(known)} not found): {_INSTALL}")


def _wake(name: str, cause: str) -> str:
    if name == "podman":
        return "`podman info` says more"
    if "permission denied" in cause.lower():
        return "Let your user use it (`sudo usermod -aG docker $USER`, then log in again), or use podman, which needs no root"
    return "Start it (`sudo systemctl start docker`), or set DOCKER_HOST to where it listens"


def _answered(name: EngineName, command: str, text: str) -> Engine:
    try:
        answer: dict[str, Any] = json.loads(text)
    except ValueError:
        return Engine(name, command)
    if name == "docker" and not answer.get("Server"):
        name = "podman"  # under docker's name (the package podman-docker): docker does not answer without a server
    return Engine(name, command, str((answer.get("Server") or answer.get("Client") or {}).get("Version", "")))


def _has_buildx(command: str) -> bool:
    return subprocess.run([command, "buildx", "version"], capture_output=True).returncode == 0


def _facts(entry: dict[str, Any], name: str) -> ImageFacts:
    # Of an image that was built or loaded here podman tells a digest, too, which no registry knows.
    digests = [digest for digest in entry.get("RepoDigests") or () if not digest.startswith("localhost/")]
    for prefix in ("localhost/", "docker.io/library/"):  # where podman puts a name without a registry
        name = name.removeprefix(prefix)
    return ImageFacts(
        name=name,
        id=entry["Id"] if ":" in entry["Id"] else f"sha256:{entry['Id']}",
        digest=digests[0].rpartition("@")[2] if digests else "",
        size_bytes=int(entry.get("Size", 0)),
        created=str(entry.get("Created", "")),
        labels=(entry.get("Config") or {}).get("Labels") or entry.get("Labels") or {},
    )


def _cause(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    # docker ends with a hint at its help, and podman's log may have the last word.
    telling = [line for line in lines if not line.startswith(("Run '", "See '", "time="))]
    return (telling or lines or [f"exit code {done.returncode}"])[-1]
