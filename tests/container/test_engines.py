"""Every verb that Palate asks of an engine, of docker and of podman alike, over a tiny image and without a training."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import tarfile
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from palate.backends import Launch, PlacementRequest, folders_seen
from palate.backends.container import ContainerBackend
from palate.backends.engine import Engine as PalateEngine
from palate.backends.engine import find_engine
from palate.backends.images import _follow, need_image
from palate.backends.limits import Limits
from palate.errors import UnsupportedParameterError
from palate_recipes.errors import EngineError, ImageBuildError, ImageMissingError
from tests.slow.conftest import until
from tests.support.engine import BASE, Engine
from tests.support.podman import copy_image, running_podman

pytestmark = [pytest.mark.slow, pytest.mark.container, pytest.mark.timeout(600)]

# An engine may have those of another test run, too.
IMAGE = f"palate-engine-test:{os.getpid()}"
BROKEN = f"palate-engine-test:{os.getpid()}-broken"
SMALL = f"palate-engine-test:{os.getpid()}-small"
IDLE = f"palate-engine-test:{os.getpid()}-idle"
LABEL = f"ai.palate.engine-test-{os.getpid()}"

DOCKERFILE = f"""
ARG PYTHON_IMAGE={BASE}
FROM ${{PYTHON_IMAGE}} AS built
ARG WHAT=nothing
RUN echo "$WHAT" > /what
FROM ${{PYTHON_IMAGE}} AS broken
LABEL {LABEL}="1"
ENTRYPOINT ["/no/such/program"]
FROM ${{PYTHON_IMAGE}} AS idle
LABEL {LABEL}="1"
ENTRYPOINT ["python", "-c", "pass"]
FROM ${{PYTHON_IMAGE}}
LABEL {LABEL}="1"
COPY --from=built /what /what
COPY runner.py /runner.py
USER 1000:0
STOPSIGNAL SIGTERM
HEALTHCHECK CMD python -c pass
ENTRYPOINT ["python", "-u", "/runner.py"]
"""

RUNNER = """
import json, os, pathlib, signal, sys, time
file = pathlib.Path(os.environ["PALATE_VARIABLES_FILE"])
variables = json.loads(file.read_text())
file.unlink()
folder, part = pathlib.Path(variables["FOLDER"]), sys.argv[1].rpartition("/")[2]
def hear(number, frame):
    if part != "deaf":
        (folder / "heard").write_text(variables["MY_KEY"])
        sys.exit(0)
signal.signal(signal.SIGTERM, hear)
print("begun by", os.getuid(), pathlib.Path("/what").read_text(), file=sys.stderr)
if part == "fails":
    sys.exit("no luck")
kept = []
while True:
    kept += [os.urandom(1 << 20)] if part == "grows" else []
    time.sleep(0 if part == "grows" else 0.05)
"""


@pytest.fixture(scope="module", params=["docker", "podman"])
def an_engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Each of the two, with the images of these tests, which it builds itself."""
    engine: Engine = request.getfixturevalue({"docker": "engine", "podman": "podman"}[request.param])
    context = tmp_path_factory.mktemp("context")
    (context / "Dockerfile").write_text(DOCKERFILE)
    (context / "runner.py").write_text(RUNNER)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in engine.settings().items():
            patch.setenv(name, value)
        there = find_engine()
        steps = build(there, context, IMAGE, "--build-arg", "WHAT=built")
        build(there, context, BROKEN, "--target=broken")
        build(there, context, IDLE, "--target=idle")
    assert len([step for step in steps if "FROM" in step]) >= 2, steps  # podman leaves out what nobody needs
    yield engine
    engine.run("image", "rm", "--force", IMAGE, BROKEN, IDLE, SMALL, check=False)


def build(there: PalateEngine, context: Path, image: str, *options: str) -> list[str]:
    """Builds as `palate images build` does, and returns the steps that it would show."""
    steps: list[str] = []
    # docker's older builder would keep the container of a step that failed.
    form = ["--format", "docker"] if there.name == "podman" else ["--force-rm"]
    _follow(there, ["build", *form, "--network=host", *options, "--tag", image, str(context)], image, steps.append)
    return steps


@pytest.fixture
def there(an_engine: Engine, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PalateEngine]:
    """The engine as Palate finds it; after a test it holds no container of it and no folder of secrets."""
    for name, value in an_engine.settings().items():
        monkeypatch.setenv(name, value)
    found = find_engine()
    yield found
    backend = ContainerBackend()
    for run in backend.runs():
        backend.stop(run.engine_id, grace_s=1)
    assert backend.runs() == []
    assert list((home / "run").glob("*")) == []


def launch(part: str, folder: Path, *, image: str = IMAGE, spec: object = None) -> Launch:
    request = PlacementRequest(kind="jobs", image_uri=image, instance_spec=spec)
    return Launch(
        uri=f"test:/{folder}/jobs/{part}",
        kind="jobs",
        name=part,
        env={"MY_KEY": "told-to-nobody", "FOLDER": str(folder)},
        folders={folder: True},
        placement=ContainerBackend().place(request),
    )


def gone(engine_id: str) -> str:
    """Waits for a container's end, and returns what the engine says of it."""
    backend = ContainerBackend()
    until(lambda: backend.status(engine_id).state == "gone", timeout_s=60)
    return backend.status(engine_id).cause


def inspected(there: PalateEngine, engine_id: str) -> str:
    return there.run("container", "inspect", engine_id.split(":")[2]).stdout


def test_it_is_found_and_says_what_images_it_has(an_engine: Engine, there: PalateEngine) -> None:
    assert (there.name, there.version != "") == (an_engine.name, True)
    found = need_image(there, IMAGE)
    assert found.name == IMAGE
    assert found.id == an_engine.image_id(IMAGE)
    assert found.id.startswith("sha256:")
    assert found == there.image(found.name)
    assert found.digest == ""  # no registry has seen it
    assert found.size_bytes > 100_000_000
    assert datetime.fromisoformat(found.created).tzinfo is not None
    assert found.labels[LABEL] == "1"
    assert {image.name for image in there.images(LABEL)} == {IMAGE, BROKEN, IDLE}
    assert there.images(f"{LABEL}=2") == []
    assert there.image("palate-engine-test:never") is None
    with pytest.raises(ImageMissingError, match=f"palate images build trainer .*--engine {there.name}"):
        need_image(there, "palate-trainer:never-cpu")


def test_a_build_that_fails_ends_with_its_last_lines(there: PalateEngine, tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text(f"FROM {BASE}\nRUN echo it is && exit 3\n")
    with pytest.raises(ImageBuildError, match=r"(?s)failed with exit code .*it is"):
        build(there, tmp_path, "palate-engine-test:never")


def test_a_run_starts_keeps_its_secrets_hears_a_stop_and_leaves_nothing(
    there: PalateEngine, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://me:told-to-nobody@127.0.0.1:9")
    backend = ContainerBackend()
    engine_id = backend.start(launch("waits", tmp_path))
    assert list((home / "run").rglob("*.json")) == []  # the runner has its variables
    until(lambda: "begun by" in backend.logs(engine_id), timeout_s=30)
    assert f"begun by {os.getuid()} built" in backend.logs(engine_id)
    assert backend.status(engine_id).state == "running"
    seen = folders_seen(backend, engine_id)
    assert seen is not None
    assert tmp_path in seen
    assert tmp_path.with_name("another") not in seen
    (run,) = backend.runs()
    assert (run.uri, run.engine_id) == (f"test:/{tmp_path}/jobs/waits", engine_id)
    assert "told-to-nobody" not in inspected(there, engine_id)
    backend.stop(engine_id, grace_s=20)
    assert (tmp_path / "heard").read_text() == "told-to-nobody"
    assert (tmp_path / "heard").stat().st_uid == os.getuid()
    assert (backend.status(engine_id).state, backend.logs(engine_id), backend.runs()) == ("gone", "", [])
    assert folders_seen(backend, engine_id) is None
    backend.stop(engine_id, grace_s=1)  # gone is no error


def test_credentials_that_nobody_took_do_not_stay(there: PalateEngine, home: Path, tmp_path: Path) -> None:
    backend = ContainerBackend()
    engine_id = backend.start(launch("idle", tmp_path, image=IDLE))
    assert list((home / "run").rglob("*.json")) == []
    there.run("rm", "--force", engine_id.split(":")[2])  # by hand: the next look takes away what is left
    assert gone(engine_id) == ""
    assert list((home / "run").iterdir()) != []
    backend.stop(engine_id, grace_s=0)
    assert list((home / "run").iterdir()) == []


def test_a_crafted_engine_id_reaches_no_container_and_no_folder_of_others(
    there: PalateEngine, home: Path, tmp_path: Path
) -> None:
    """Who may write to a store must not end, read or remove what else is on the machine of one who looks."""
    backend = ContainerBackend()
    engine_id = backend.start(launch("waits", tmp_path))
    options = ["--detach", "--name", f"stranger-{os.getpid()}", "--network=host", "--entrypoint=sleep"]
    stranger = there.run("run", *options, IMAGE, "300").stdout.split()[-1]
    victim = tmp_path / "victim"
    victim.mkdir()
    way_out = os.path.relpath(victim, home / "run")
    try:
        machine, old = engine_id.partition(":")[0], socket.gethostname()
        crafted = [
            f"{host}:{there.name}:{container}:{folder}"
            for host in (machine, old)
            for container in ("--all", stranger, engine_id.split(":")[2], "0" * 64)
            for folder in (way_out, str(victim), "jobs-other-00000000")
        ]
        other = backend.of_run(f"test:/{tmp_path}/jobs/other")
        for forged in (*crafted, engine_id, engine_id.replace("jobs-waits", "jobs-other"), "", "a:b:c", "a:docker:c:d"):
            assert other.status(forged).state in {"unknown", "gone"}
            assert other.logs(forged) == ""
            other.stop(forged, grace_s=0)
        for forged in crafted:
            backend.stop(forged, grace_s=0)
        assert victim.is_dir()
        running = there.run("ps", "--quiet", "--no-trunc").stdout.split()
        assert {stranger, engine_id.split(":")[2]} <= set(running)
    finally:
        there.run("rm", "--force", stranger)


def test_one_that_does_not_listen_is_ended(there: PalateEngine, tmp_path: Path) -> None:
    backend = ContainerBackend()
    engine_id = backend.start(launch("deaf", tmp_path))
    until(lambda: "begun" in backend.logs(engine_id), timeout_s=30)
    there.run("stop", "--time", "1", engine_id.split(":")[2])  # as an operator would, behind Palate's back
    assert gone(engine_id) == "the container exited with code 137"


def test_a_failure_is_told_with_its_exit_code_until_the_next_attempt(there: PalateEngine, tmp_path: Path) -> None:
    backend = ContainerBackend()
    first = backend.start(launch("fails", tmp_path))
    assert gone(first) == "the container exited with code 1"
    assert "no luck" in backend.logs(first)
    second = backend.start(launch("fails", tmp_path))
    assert [run.engine_id for run in backend.runs()] == [second]
    assert gone(first) == backend.logs(first) == ""


def test_limits_are_set_and_the_one_of_memory_is_told(
    there: PalateEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    spec = {"cpu": 1, "memory": "64m"}
    if there.enforces() != {"cpu", "memory"}:
        with pytest.raises(UnsupportedParameterError, match=rf"{there.name} cannot enforce the .*as root"):
            launch("grows", tmp_path, spec=spec)
        return
    engine_id = ContainerBackend().start(launch("grows", tmp_path, spec=spec))
    (facts,) = json.loads(inspected(there, engine_id))
    assert Limits.of_container(facts).memory_bytes == 64 << 20
    assert facts["HostConfig"]["NanoCpus"] == 1_000_000_000
    assert re.search(r"memory limit of 0\.0625 GiB.* set a higher limit", gone(engine_id))
    assert list((tmp_path / "here").iterdir()) == []


def test_one_that_cannot_start_says_why_and_stays_nowhere(
    an_engine: Engine, there: PalateEngine, tmp_path: Path
) -> None:
    with pytest.raises(EngineError, match=f"{there.name} run --detach failed: .*no such file or directory"):
        ContainerBackend().start(launch("never", tmp_path, image=BROKEN))
    assert f"test:/{tmp_path}/jobs/never" not in an_engine.run("ps", "--all", "--format", "{{.Labels}}").stdout


def test_an_image_goes_from_one_to_the_other_and_stays_itself(
    an_engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("podman") is None:
        pytest.skip("no podman here to copy to")
    (tmp_path / "file").write_text("all of it")
    with tarfile.open(tmp_path / "small.tar", "w") as archive:
        archive.add(tmp_path / "file", "file")
    an_engine.run("import", str(tmp_path / "small.tar"), SMALL)
    with running_podman(tmp_path / "other", remove=True) as other:
        for _ in range(2):  # the second time there is nothing to do
            copy_image(an_engine, other, SMALL)
        for name, value in other.settings().items():
            monkeypatch.setenv(name, value)
        copied = need_image(find_engine(), SMALL)
        assert (copied.name, copied.id, copied.digest) == (SMALL, an_engine.image_id(SMALL), "")
    assert not (tmp_path / "other").exists()


def test_podman_is_known_under_dockers_name(
    podman: Engine, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package podman-docker puts such a command there; podman's own options are needed with it."""
    command = tmp_path / "docker"
    command.write_text('#!/bin/sh\nexec podman "$@"\n')
    command.chmod(0o755)
    for name, value in podman.settings().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = find_engine("docker")
    assert (found.name, found.command, found.version != "") == ("podman", str(command), True)
