"""A container engine for the tests: the docker that is there, else a dockerd of their own. Knows no image of Palate.

    python -m tests.support.engine up FOLDER [--install]   starts dockerd below FOLDER; prints the settings that reach it
    python -m tests.support.engine down FOLDER [--remove]  stops it; --remove takes its images along

No registry need be reached: `python:3.11-slim-bookworm` is bootstrapped from Debian packages where it can be had nowhere else. What
downloads need on this machine (certificates, pip's settings, folders of wheels) is in a second image, for build stages alone.
"""

from __future__ import annotations

import argparse
import configparser
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

BASE = "python:3.11-slim-bookworm"
BUILD_BASE = "palate-test-build:3.11-slim-bookworm"
"""The base with this machine's way to packages: the build argument BUILD_IMAGE of Palate's Dockerfiles."""

FOLDER = os.environ.get("PALATE_TEST_ENGINE")  # now: a test's own home knows no variable of Palate's
"""A folder below which `up` has started an engine, and where podman's images stay for the next tests."""

_PACKAGES = ("docker.io", "podman", "runc", "uidmap", "mmdebstrap")
_INCLUDE = "python3.11,python3-pip,python3.11-venv,ca-certificates"
_CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
_PIP_FILES = (Path("/etc/pip.conf"), Path.home() / ".config/pip/pip.conf", Path.home() / ".pip/pip.conf")
_READY_S = 30.0


class EngineError(RuntimeError):
    """There is no engine and none can be started; the message says what is missing."""


@dataclass(frozen=True)
class Engine:
    """An engine and the way to it.

    Attributes:
        host: What DOCKER_HOST is to be; "" for podman, which needs no daemon.
        folder: Below it are a podman's settings and everything it keeps; None for docker.
    """

    host: str = ""
    folder: Path | None = None

    @property
    def name(self) -> str:
        return "docker" if self.folder is None else "podman"

    def run(self, *arguments: str, check: bool = True, timeout_s: float = 1800) -> subprocess.CompletedProcess[str]:
        """Runs the engine's command line; its output comes back as text, stderr included."""
        done = subprocess.run(
            [self.name, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self.environment(),
            timeout=timeout_s,
        )
        if check and done.returncode != 0:
            raise EngineError(f"{self.name} {' '.join(arguments[:3])}: {done.stdout[-2000:]}")
        return done

    def settings(self) -> dict[str, str]:
        """Returns the variables that lead to this engine, for its own command line and for Palate's."""
        if self.folder is None:
            return {"DOCKER_HOST": self.host, "DOCKER_BUILDKIT": "0", "PALATE_ENGINE": "docker"}
        return {
            "CONTAINERS_CONF": str(self.folder / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(self.folder / "storage.conf"),
            "PALATE_ENGINE": "podman",
        }

    def environment(self) -> dict[str, str]:
        """Returns this process's variables with those of `settings`."""
        return {**os.environ, **self.settings()}

    def image_id(self, image: str) -> str:
        """Returns the digest of an image's configuration, the same in every engine that has it; "" when this one has not."""
        done = self.run("image", "inspect", "--format", "{{.Id}}", image, check=False)
        return f"sha256:{done.stdout.strip().removeprefix('sha256:')}" if done.returncode == 0 else ""

    def has(self, image: str) -> bool:
        return self.image_id(image) != ""


def find_engine() -> Engine | None:
    """Returns the engine that is there: DOCKER_HOST, the usual socket, or one that `up` has left below the tests' folder."""
    if shutil.which("docker") is None:
        return None
    hosts = [os.environ.get("DOCKER_HOST"), "unix:///var/run/docker.sock", _host(Path(FOLDER)) if FOLDER else None]
    return next((engine for engine in map(Engine, filter(None, hosts)) if _answers(engine)), None)


def start(folder: Path) -> Engine:
    """Starts dockerd with everything of it below `folder`, and returns when it answers.

    Raises:
        EngineError: It cannot be started here, or did not answer in time; carries the last lines of its log.
    """
    if os.geteuid() != 0:
        raise EngineError("an engine of the tests' own needs root: start docker or podman, and set DOCKER_HOST")
    if shutil.which("dockerd") is None:
        raise EngineError("no dockerd here: apt-get install docker.io mmdebstrap, or `up FOLDER --install`")
    folder.mkdir(parents=True, exist_ok=True)
    engine = Engine(_host(folder))
    if _answers(engine):
        return engine
    (folder / "dockerd.pid").unlink(missing_ok=True)
    with (folder / "dockerd.log").open("wb") as log:
        daemon = subprocess.Popen(
            [
                *("dockerd", "--data-root", str(folder / "data"), "--exec-root", str(folder / "exec")),
                *("-H", engine.host, "-p", str(folder / "dockerd.pid")),
                # Networks and firewall of the machine are not the tests' to change: containers share the host's network.
                *("--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-forward=false"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    deadline = time.monotonic() + _READY_S
    while not _answers(engine):
        if daemon.poll() is not None or time.monotonic() > deadline:
            tail = (folder / "dockerd.log").read_text(errors="replace")[-1500:]
            raise EngineError(f"dockerd did not come up:\n{tail}")
        time.sleep(0.2)
    return engine


def stop(folder: Path, *, remove: bool = False) -> None:
    """Stops the dockerd below `folder` and its containers; with `remove` its images go, too."""
    file = folder / "dockerd.pid"
    if file.exists():
        engine, pid = Engine(_host(folder)), int(file.read_text())
        if running := engine.run("ps", "--quiet", check=False).stdout.split():
            engine.run("kill", *running, check=False)
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + _READY_S
        while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
            try:
                os.waitpid(pid, os.WNOHANG)  # a child of this process would stay a zombie
            except ChildProcessError:
                pass
            time.sleep(0.1)
    if remove and folder.exists():
        unmount(folder)  # dockerd leaves the host network's namespace mounted
        shutil.rmtree(folder)


def unmount(folder: Path) -> None:
    """Takes away every mount below `folder`; asks for root."""
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for mount in reversed([mount for mount in mounts if mount.startswith(f"{folder.absolute()}/")]):
        subprocess.run(["umount", mount], check=True)


def prepare(engine: Engine) -> None:
    """Sees to it that the base images are there; a base that the engine has or can fetch is left as it is."""
    need_base(engine)
    if not engine.has(BUILD_BASE):
        _make_build_base(engine)


def need_base(engine: Engine) -> None:
    """Sees to it that the base is there, without this machine's way to packages."""
    if not engine.has(BASE) and engine.run("pull", BASE, check=False, timeout_s=120).returncode != 0:
        _import_base(engine)


def build_options() -> list[str]:
    """Returns what `palate images build` needs here: the host's network, and the base with a way to packages."""
    return ["--network", "host", "--build-arg", f"BUILD_IMAGE={BUILD_BASE}"]


def install() -> None:
    """Installs what an engine needs from Debian's packages; asks for root."""
    missing = [name for name in _PACKAGES if subprocess.run(["dpkg", "-s", name], capture_output=True).returncode != 0]
    if missing:
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update", "-q"], ["install", "-qy", "--no-install-recommends", *missing]):
            subprocess.run(["apt-get", *command], check=True, env=environment, stdout=sys.stderr)


def cache_folder() -> Path:
    """Where the bootstrapped base is kept between engines."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "palate-test-engine"


def _import_base(engine: Engine) -> None:
    archive = cache_folder() / "bookworm-python3.11.tar"
    if not archive.exists():
        if shutil.which("mmdebstrap") is None:
            raise EngineError(
                f"{BASE} cannot be pulled, and mmdebstrap is not here to make it: apt-get install mmdebstrap"
            )
        archive.parent.mkdir(parents=True, exist_ok=True)
        draft = archive.with_suffix(".draft.tar")
        command = ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={_INCLUDE}", "bookworm", str(draft)]
        subprocess.run(command, check=True, stdout=sys.stderr)
        draft.rename(archive)  # whole or not at all
    engine.run("import", str(archive), "palate-test-raw:1")
    with tempfile.TemporaryDirectory() as context:
        # The official image's Python is /usr/local/bin/python, and pip may install there.
        (Path(context) / "Dockerfile").write_text(
            "FROM palate-test-raw:1\n"
            "RUN rm -f /usr/lib/python3.11/EXTERNALLY-MANAGED && ln -s /usr/bin/python3.11 /usr/local/bin/python"
            " && ln -s /usr/bin/python3.11 /usr/local/bin/python3\n"
            'CMD ["python3"]\n'
        )
        engine.run("build", "--network=host", "--tag", BASE, context)


def _make_build_base(engine: Engine) -> None:
    with tempfile.TemporaryDirectory() as context:
        lines = [f"FROM {BASE}"]
        if _CERTIFICATES.exists():
            shutil.copy(_CERTIFICATES, Path(context) / "certificates.crt")
            lines += [
                f"COPY certificates.crt {_CERTIFICATES}",
                f"ENV PIP_CERT={_CERTIFICATES} SSL_CERT_FILE={_CERTIFICATES}",
            ]
        index, wheels = _pip_settings()
        for number, folder in enumerate(wheels):
            shutil.copytree(folder, Path(context) / f"wheels{number}")
            lines += [f"COPY wheels{number} {folder}"]
        if wheels:
            lines += [f"ENV PIP_FIND_LINKS='{' '.join(map(str, wheels))}'"]
        if index:
            lines += [f"ENV PIP_INDEX_URL={index}"]
        (Path(context) / "Dockerfile").write_text("\n".join(lines) + "\n")
        engine.run("build", "--network=host", "--tag", BUILD_BASE, context)


def _pip_settings() -> tuple[str, list[Path]]:
    """Returns the package index that pip is told to use here, if any, and the folders of wheels that it looks into."""
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(_PIP_FILES)
    index = os.environ.get("PIP_INDEX_URL") or settings.get("global", "index-url", fallback="")
    links = os.environ.get("PIP_FIND_LINKS") or settings.get("global", "find-links", fallback="")
    return index, [Path(link) for link in links.split() if Path(link).is_dir()]


def _host(folder: Path) -> str:
    return f"unix://{folder.absolute() / 'docker.sock'}"


def _answers(engine: Engine) -> bool:
    socket = engine.host.removeprefix("unix://")
    if engine.host.startswith("unix://") and not Path(socket).exists():
        return False
    return engine.run("version", check=False, timeout_s=30).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.support.engine", description="An engine for the container tests."
    )
    parser.add_argument("verb", choices=["up", "down"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--install", action="store_true", help="install Debian's packages first; asks for root")
    parser.add_argument("--remove", action="store_true", help="with down: remove the folder")
    given = parser.parse_args()
    if given.verb == "down":
        stop(given.folder, remove=given.remove)
        return 0
    if given.install and os.geteuid() == 0 and shutil.which("apt-get"):
        install()
    try:
        engine = find_engine() or start(given.folder)
        prepare(engine)
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"export DOCKER_HOST={engine.host}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
