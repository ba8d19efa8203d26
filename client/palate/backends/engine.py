"""The local container engine, through the common command line of docker and podman. Knows nothing of Palate's images."""

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
"""Time limit for commands. A healthy engine answers at once, a starting one within seconds."""

_INSTALL = "install docker (docs.docker.com/engine/install) or podman (podman.io/docs/installation; it needs no root)"


@dataclass(frozen=True)
class ImageFacts:
    """An image in an engine.

    Attributes:
        name: Its first tag, or its id if it has none.
        id: Digest of its configuration, `sha256:…`, the same on every machine.
        digest: Digest in the registry that it was pulled from or pushed to; "" if it was only built or loaded.
        size_bytes: Size of all layers, unpacked.
        created: ISO time.
        labels: The image's labels.
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
        name: docker or podman.
        command: Path of its executable.
        version: Version of the engine, not of the client.
    """

    name: EngineName
    command: str
    version: str = ""

    def run(
        self, *arguments: str, check: bool = True, timeout_s: float | None = _ASK_S, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Runs one engine command. Arguments must not contain secrets, because other users can see them.

        Args:
            arguments: Arguments of the engine's command line.
            check: Raise an error if the exit code is not 0.
            timeout_s: Time limit in seconds; None: no limit.
            cwd: Working folder, also of processes that stay for a container, such as podman's monitor.

        Raises:
            EngineError: The command failed (with `check`), or took longer than `timeout_s`.
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
        # cgroup v1 can only be used by root. In v2 a user has the controllers that were delegated.
        return {"cpu", "memory"} & set(host.get("cgroupControllers") or ())

    @contextmanager
    def following(self, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        """Runs a command whose stdout and stderr are read while it runs. It is terminated at the end of the block."""
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
            # Newer docker versions refuse to build without the buildx plugin, unless the legacy builder is selected.
            return {**os.environ, "DOCKER_BUILDKIT": "0"}
        return dict(os.environ)


def find_engine(name: str | None = None) -> Engine:
    """Returns an engine that answers.

    Args:
        name: `docker` or `podman`; default: PALATE_ENGINE, else docker, else podman.

    Raises:
        ConfigurationError: The name is unknown.
        EngineError: None is installed or none answers. The message says what to install or start.
    """
    name = name or os.environ.get("PALATE_ENGINE") or None
    known = get_args(EngineName)
    if name is not None and name not in known:
        raise ConfigurationError(f"unknown engine {name!r}: valid names: {', '.join(known)}")
    silent = []
    for candidate in (name,) if name else known:
        command = shutil.which(candidate)
        if command is None:
            continue
        engine = Engine(candidate, command)
        done = engine.run("version", "--format", "{{json .}}", check=False)
        if done.returncode == 0:
            return _answered(candidate, command, done.stdout)
        silent.append(f"{candidate} is installed but does not answer: {_cause(done)}. {_wake(candidate, _cause(done))}")
    if silent:
        raise EngineError("\n".join(silent))
    raise EngineError(f"no container engine found ({name or ', '.join(known)} not installed): {_INSTALL}")


def _wake(name: str, cause: str) -> str:
    if name == "podman":
        return "Run `podman info` for details"
    if "permission denied" in cause.lower():
        return "Give your user access (`sudo usermod -aG docker $USER`, then log in again), or use podman, which needs no root"
    return "Start it (`sudo systemctl start docker`), or set DOCKER_HOST to its address"


def _answered(name: EngineName, command: str, text: str) -> Engine:
    try:
        answer: dict[str, Any] = json.loads(text)
    except ValueError:
        return Engine(name, command)
    if name == "docker" and not answer.get("Server"):
        name = "podman"  # the package podman-docker installs podman as docker. Real docker reports a server
    return Engine(name, command, str((answer.get("Server") or answer.get("Client") or {}).get("Version", "")))


def _has_buildx(command: str) -> bool:
    return subprocess.run([command, "buildx", "version"], capture_output=True).returncode == 0


def _facts(entry: dict[str, Any], name: str) -> ImageFacts:
    # podman also reports a digest for images that were built or loaded here, but no registry knows it.
    digests = [digest for digest in entry.get("RepoDigests") or () if not digest.startswith("localhost/")]
    for prefix in ("localhost/", "docker.io/library/"):  # podman adds these to names without a registry
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
    # docker prints a hint about its help last, and podman may print log lines after the error.
    telling = [line for line in lines if not line.startswith(("Run '", "See '", "time="))]
    return (telling or lines or [f"exit code {done.returncode}"])[-1]
