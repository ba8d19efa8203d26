"""Runs as containers of the local docker or podman. Knows the engine's command line, not stores or programs.

A run's results are in its store, so a container can be removed at any time. Credentials are passed in a file that the runner
reads and deletes before `start` returns. The engine never sees them, so `inspect` does not show them. An engine id is
`host@machine:engine:container:secrets folder`. Ids come back from the store and are not trusted: a container is read or stopped
only if its own label and name say that it was started for the run.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from secrets import token_hex
from typing import Any, get_args

from palate.backends import EngineRun, EngineStatus, Launch, PlacementRequest
from palate.backends.engine import Engine, EngineName, find_engine
from palate.backends.images import Program, image_name, need_image
from palate.backends.limits import Limits
from palate.env_file import FILE_VARIABLE
from palate.paths import folder_now, palate_home
from palate.processes import machine_digest
from palate.runs.record import locate
from palate_recipes.device import local_device
from palate_recipes.errors import ConfigurationError, EngineError
from palate_recipes.hyperparameters import DeviceFacts
from palate_recipes.specs.run import Kind

RUN_LABEL = "ai.palate.run"
"""Label of a container with the URI of its run."""

_HOME_LABEL = "ai.palate.home"
"""Label of a container with the PALATE_HOME of its user, because several users can share an engine."""

_NAME_PREFIX = "palate-"

IMAGE_VARIABLES: dict[Kind, str] = {
    "jobs": "PALATE_TRAINER_IMAGE",
    "services": "PALATE_SERVER_IMAGE",
    "evaluations": "PALATE_TRAINER_IMAGE",
}
"""Environment variables with images to use instead of those of this version."""

_HOME = "/home/palate/.palate"
_SECRETS = "/run/palate"
_SECRETS_FILE = "variables.json"
_TAKEN_S = 120.0
"""Time limit for the runner to read its variables. It usually takes a second, on a busy machine up to a minute."""

_SECRETS_FOLDER = r"((?:jobs|services)-[A-Za-z0-9][A-Za-z0-9._-]{0,99})-[0-9a-f]{8}"
_ENGINE_ID = re.compile(rf"([^:@]*)(?:@([0-9a-f]{{16}}))?:(docker|podman):([0-9a-f]{{64}}):({_SECRETS_FOLDER})")
"""Host, machine, engine, container, secrets folder, run name. Earlier versions had no machine."""

_PASSED_ON = ("AWS_", "OSS_", "HF_", "ALIBABA_CLOUD_", "PALATE_")
_KEPT_BACK = (
    "PALATE_HOME",
    "PALATE_BACKEND",
    "PALATE_ENGINE",
    "HF_HOME",
    "AWS_CONFIG_FILE",
    "AWS_SHARED_CREDENTIALS_FILE",
)
_PROXIES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
_LOG_LINES = 200
_ALIVE = ("created", "running", "restarting", "paused", "configured", "initialized", "stopping")
_POLL_S = 0.05
_ASK_EVERY_S = 1.0
_KILLED = 137
"""128 + SIGKILL: killed by the kernel's OOM killer, which podman does not always report, or by a user."""
_UNENFORCED = (
    "{engine} cannot enforce the {lacks} limit here (docs/containers.md, Without root); omit it, or run as root"
)


@dataclass(frozen=True)
class _EngineId:
    """A parsed engine id.

    Attributes:
        is_here: Whether the container, unless removed, is on this machine.
        may_be_here: Whether it could be on this machine.
        engine, container: Names of engine and container.
        folder: Name of the secrets folder.
    """

    is_here: bool
    may_be_here: bool
    engine: str
    container: str
    folder: str


class ContainerBackend:
    """Runs the trainer and server images with the local container engine.

    Args:
        run_uri: Restricts the backend to the containers of this run; None: any. See `for_run`.
    """

    name = "container"
    uses_this_python = False
    is_this_host = True

    def __init__(self, run_uri: str | None = None) -> None:
        self._run_uri = run_uri

    def of_run(self, uri: str) -> ContainerBackend:
        return ContainerBackend(uri)

    def start(self, launch: Launch) -> str:
        engine = find_engine(launch.placement.get("engine"))
        image = need_image(engine, launch.placement["image"])
        self._remove(engine, launch.uri)
        secrets = palate_home() / "run" / f"{launch.run_name}-{token_hex(4)}"
        secrets.mkdir(parents=True, mode=0o700)
        try:
            variables = {**_ambient_variables(), **launch.env}
            with open(os.open(secrets / _SECRETS_FILE, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
                json.dump(variables, file)
            options = _options(engine, launch, secrets)
            # podman's monitor writes a file `oom` to its working folder when a container runs out of memory.
            done = engine.run("run", "--detach", *options, "--", image.id, launch.uri, timeout_s=120, cwd=secrets)
            container = done.stdout.split()[-1]
            _wait_until_taken(engine, container, secrets / _SECRETS_FILE)
        except BaseException:
            shutil.rmtree(secrets, ignore_errors=True)
            with suppress(EngineError):
                self._remove(engine, launch.uri)  # engines keep containers that failed to start
            raise
        return _engine_id(engine.name, container, secrets.name)

    def status(self, engine_id: str) -> EngineStatus:
        found = self._inspect(engine_id)
        if isinstance(found, EngineStatus):
            return found
        state = found["State"]
        if state["Status"] in _ALIVE:
            return EngineStatus("running")
        limits = Limits.of_container(found)
        if state.get("OOMKilled"):
            return EngineStatus(
                "gone", f"the container exceeded its memory limit of {limits.memory_text}: set a higher limit"
            )
        code = state.get("ExitCode", 0)
        error = state.get("Error") or ""
        if code == _KILLED and limits.memory_bytes and not error and ":podman:" in engine_id:
            error = (
                f"killed, either for exceeding its memory limit of {limits.memory_text} (then set a higher limit) or by a user;"
                " podman does not report which"
            )
        return EngineStatus(
            "gone", f"the container exited with code {code}{': ' if error else ''}{error}" if code else ""
        )

    def logs(self, engine_id: str) -> str:
        engine, run = self._find(engine_id)
        if engine is None or run is None or isinstance(self._inspect(engine_id), EngineStatus):
            return ""
        # podman's --tail drops the beginning of a line that was written in several pieces.
        tail = ["--tail", str(_LOG_LINES)] if engine.name == "docker" else []
        done = engine.run("logs", *tail, "--", run.container, check=False)
        lines = (done.stdout + done.stderr).splitlines(keepends=True) if done.returncode == 0 else []
        return "".join(lines[-_LOG_LINES:])

    def stop(self, engine_id: str, *, grace_s: float) -> None:
        engine, run = self._find(engine_id)
        if engine is None or run is None:
            return
        found = self._inspect(engine_id)
        if not isinstance(found, EngineStatus):
            seconds = max(1, round(grace_s))
            engine.run("stop", "--time", str(seconds), "--", run.container, check=False, timeout_s=seconds + 30)
            engine.run("rm", "--force", "--volumes", "--", run.container, check=False)
        elif found.state != "gone":
            return
        _forget_secrets(run.folder)

    def runs(self) -> list[EngineRun]:
        return [run for name in get_args(EngineName) for run in self._runs(name)]

    @staticmethod
    def _runs(name: EngineName) -> list[EngineRun]:
        try:
            engine = find_engine(name)
            if engine.name != name:
                return []  # podman installed as docker: it is queried under its own name
            ids = engine.run(
                "ps", "--all", "--quiet", "--filter", f"label={_HOME_LABEL}={palate_home()}"
            ).stdout.split()
            found = json.loads(engine.run("container", "inspect", "--", *ids, check=False).stdout) if ids else []
        except (EngineError, ValueError):
            return []  # not installed, no permission, or the containers were removed in between
        runs = []
        for facts in found:
            labels, own_name = facts["Config"]["Labels"], facts["Name"].removeprefix("/")
            engine_id = _engine_id(name, facts["Id"], own_name.removeprefix(_NAME_PREFIX))
            what = f"{name} container {own_name} ({facts['State']['Status']}): {labels[RUN_LABEL]}"
            runs.append(EngineRun(engine_id, labels[RUN_LABEL], what))
        return runs

    def device(self, placement: Mapping[str, Any] | None = None) -> DeviceFacts:
        here = local_device()
        limit_gib = Limits.from_json((placement or {}).get("limits") or {}).memory_gib
        if limit_gib is None or limit_gib >= here.memory_gib:
            return here
        return replace(here, memory_gib=limit_gib, memory_is_limited=True)

    def place(self, request: PlacementRequest) -> dict[str, Any]:
        spec = "resource_config" if request.kind == "services" else "instance_spec"
        request.refuse_other_machines(self.name, more=f"omit it, and set limits with {spec}")
        limits = Limits.parse(spec, getattr(request, spec))
        engine = find_engine()
        if limits.named() and (lacking := limits.named() - engine.enforces()):
            lacks = " and ".join(sorted(lacking))
            request.refuse(self.name, **{spec: _UNENFORCED.format(engine=engine.name, lacks=lacks)})
        program: Program = "server" if request.kind == "services" else "trainer"
        usual = image_name(program, "cuda" if local_device().cuda else "cpu")
        name = request.image_uri or os.environ.get(IMAGE_VARIABLES[request.kind]) or usual
        image = need_image(engine, name)
        return {"engine": engine.name, "image": name, "image_id": image.id, "limits": limits.to_json()}

    def _parse(self, engine_id: str) -> _EngineId | None:
        """Parses an engine id; None if it is malformed or belongs to another run."""
        match = _ENGINE_ID.fullmatch(engine_id) if isinstance(engine_id, str) else None
        if match is None:
            return None
        host, mark, engine, container, folder, run_name = match.groups()
        if self._run_uri is not None:
            _, kind, name = locate(self._run_uri)
            if run_name != f"{kind}-{name}":
                return None
        is_here = mark is not None and mark == machine_digest()
        # A reboot changes the machine's mark, but containers survive it, so the hostname is enough to look.
        return _EngineId(is_here, is_here or host == socket.gethostname(), engine, container, folder)

    def _find(self, engine_id: str) -> tuple[Engine | None, _EngineId | None]:
        run = self._parse(engine_id)
        if run is None or not run.may_be_here:
            return None, run
        try:
            return find_engine(run.engine), run
        except EngineError:
            return None, run

    def _inspect(self, engine_id: str) -> dict[str, Any] | EngineStatus:
        """Returns the engine's facts about the run's container, or the status that follows from its absence."""
        engine, run = self._find(engine_id)
        if engine is None or run is None:
            return EngineStatus("unknown")
        try:
            done = engine.run("container", "inspect", "--", run.container, check=False)
        except EngineError:
            return EngineStatus("unknown")
        if done.returncode == 0:
            found: dict[str, Any] = json.loads(done.stdout)[0]
            uri = (found["Config"].get("Labels") or {}).get(RUN_LABEL)
            is_ours = uri and found["Name"].removeprefix("/") == f"{_NAME_PREFIX}{run.folder}"
            return found if is_ours and self._run_uri in (None, uri) else EngineStatus("unknown")
        words = done.stderr.lower()
        is_gone = run.is_here and ("no such" in words or "no container" in words)
        return EngineStatus("gone" if is_gone else "unknown")

    @staticmethod
    def _remove(engine: Engine, uri: str) -> None:
        """Removes containers of earlier attempts: they have ended, or the lease fences them off."""
        listed = engine.run("ps", "--all", "--filter", f"label={RUN_LABEL}={uri}", "--format", "{{.Names}}")
        names = listed.stdout.split()
        if names:
            engine.run("rm", "--force", "--volumes", "--", *names, check=False)
        for name in names:
            _forget_secrets(name.removeprefix(_NAME_PREFIX))


def stale_secrets() -> list[Path]:
    """Returns folders with credentials that no container will read, because the process that started it died."""
    folder = palate_home() / "run"
    if not folder.is_dir():
        return []
    now = folder_now(folder)
    found = []
    for entry in sorted(folder.iterdir()):
        with suppress(OSError):
            if (
                re.fullmatch(_SECRETS_FOLDER, entry.name)
                and now - (entry / _SECRETS_FILE).stat().st_mtime > 2 * _TAKEN_S
            ):
                found.append(entry)
    return found


def _engine_id(engine: str, container: str, folder: str) -> str:
    mark = machine_digest()
    return f"{socket.gethostname()}{'@' if mark else ''}{mark}:{engine}:{container}:{folder}"


def _wait_until_taken(engine: Engine, container: str, file: Path) -> None:
    """Waits until the runner has read its variables. Deletes the file in every case."""
    begun = asked = time.monotonic()
    try:
        while file.exists() and time.monotonic() - begun < _TAKEN_S:
            time.sleep(_POLL_S)
            if time.monotonic() - asked >= _ASK_EVERY_S:
                asked = time.monotonic()
                state = engine.run(
                    "container", "inspect", "--format", "{{.State.Status}}", "--", container, check=False
                )
                if state.stdout.strip() not in _ALIVE:
                    return
    finally:
        file.unlink(missing_ok=True)


def _forget_secrets(folder: str) -> None:
    if re.fullmatch(
        _SECRETS_FOLDER, folder
    ):  # else the name is not of this module's making, and could be of any folder
        shutil.rmtree(palate_home() / "run" / folder, ignore_errors=True)


def _options(engine: Engine, launch: Launch, secrets: Path) -> list[str]:
    cache = palate_home() / "cache"
    cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    mounts = {f"{secrets}:{_SECRETS}": True, f"{cache}:{_HOME}/cache": True}
    for folder, writable in launch.folders.items():
        if ":" in str(folder):
            raise ConfigurationError(
                f"{folder} cannot be mounted into a container: its path contains a colon; rename it"
            )
        mounts[f"{folder}:{folder}"] = writable
    options = [
        *("--name", f"{_NAME_PREFIX}{secrets.name}"),
        *("--label", f"{RUN_LABEL}={launch.uri}", "--label", f"{_HOME_LABEL}={palate_home()}"),
        *("--network", "host"),  # so that a store or endpoint on this machine's loopback works in the container
        *("--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
        # Files in a mounted store must belong to the user who started the run. Group 0 owns the image's own folders.
        *("--user", f"{os.getuid()}:{os.getgid()}", "--group-add", "0"),
        *("--env", f"{FILE_VARIABLE}={_SECRETS}/variables.json", "--env", f"PALATE_HOME={_HOME}"),
        *("--env", f"HF_HOME={_HOME}/cache/huggingface", "--env", "USER=palate"),
    ]
    if engine.name == "podman":
        # podman would copy proxy variables, which may have a password, to where `inspect` shows them. They are in our file.
        options += ["--http-proxy=false"]
        # SELinux would deny access to the user's folders. The alternative, a label per mount, changes the files' labels.
        options += ["--security-opt", "label=disable"]
        if os.getuid() != 0:
            options += ["--userns", "keep-id"]
    if local_device().cuda:
        options += ["--gpus", "all"] if engine.name == "docker" else ["--device", "nvidia.com/gpu=all"]
    for mount, writable in mounts.items():
        options += ["--volume", mount if writable else f"{mount}:ro"]
    return [*options, *Limits.from_json(launch.placement.get("limits") or {}).options()]


def _ambient_variables() -> dict[str, str]:
    """The variables that a runner on the process backend would inherit: stores, Hub, proxies, and Palate's settings."""
    found = {
        name: value
        for name, value in os.environ.items()
        if (name.startswith(_PASSED_ON) and name not in _KEPT_BACK) or name in _PROXIES
    }
    if "AWS_ACCESS_KEY_ID" not in found and (keys := _keys_of_aws_files()):
        found |= keys
    return found


def _keys_of_aws_files() -> dict[str, str]:
    """AWS credentials from the user's files or the machine's role, which a container cannot read."""
    try:
        import boto3
        from botocore.exceptions import BotoCoreError
    except ImportError:
        return {}
    try:
        held = boto3.Session().get_credentials()
        if held is None:
            return {}
        keys = held.get_frozen_credentials()
    except (
        BotoCoreError
    ):  # a profile that is broken, or a role's address behind a proxy: a store that needs keys will say so
        return {}
    named = {
        "AWS_ACCESS_KEY_ID": keys.access_key,
        "AWS_SECRET_ACCESS_KEY": keys.secret_key,
        "AWS_SESSION_TOKEN": keys.token,
    }
    return {name: value for name, value in named.items() if value}
