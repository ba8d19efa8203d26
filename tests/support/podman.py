"""A podman of the tests' own, as root or as anybody, and images from one engine to another. Knows no image of Palate."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.engine import Engine, EngineError, unmount


def start_podman(folder: Path) -> Engine:
    """Returns a podman with everything of it below `folder`, which is of no daemon and of no other podman's business.

    Raises:
        EngineError: There is none, or it cannot run here; carries its last words.
    """
    if shutil.which("podman") is None:
        raise EngineError("no podman here: apt-get install podman runc, and uidmap for users without root")
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    engine = Engine(folder=folder)
    soft, hard = (min(limit, 20000) for limit in resource.getrlimit(resource.RLIMIT_NOFILE))
    runtime = 'runtime = "runc"\n' if shutil.which("runc") else ""  # crun wants the second kind of cgroup
    (folder / "containers.conf").write_text(
        f"""[containers]
netns = "host"
default_ulimits = ["nofile={soft}:{hard}", "nproc=32768:32768"]  # its own defaults are beyond what a guest may set
[engine]
{runtime}cgroup_manager = "cgroupfs"  # there may be no systemd
events_logger = "file"
lock_type = "file"
tmp_dir = "{folder}/tmp"
image_copy_tmp_dir = "{folder}"
"""
    )
    (folder / "storage.conf").write_text(
        f"""[storage]
driver = "overlay"
graphroot = "{folder}/images"
rootless_storage_path = "{folder}/images"
runroot = "{folder}/run"
"""
    )
    engine.run("info", timeout_s=60)
    return engine


def stop_podman(engine: Engine, *, remove: bool = False) -> None:
    """Ends a podman's containers and what it left running or mounted; with `remove` its folder goes, too."""
    assert engine.folder is not None
    engine.run("rm", "--all", "--force", "--volumes", "--time", "1", check=False)
    if os.geteuid() != 0:
        if remove:  # its files belong to users that only it may be
            engine.run("unshare", "rm", "-rf", str(engine.folder / "images"), check=False)
        engine.run("system", "migrate", check=False)  # ends the process that holds its namespace
    else:
        unmount(engine.folder)
    if remove:
        shutil.rmtree(engine.folder)


@contextmanager
def running_podman(folder: Path, *, remove: bool = False) -> Iterator[Engine]:
    """A podman below `folder`, for as long as the block lasts; with `remove` its images last no longer, either."""
    engine = start_podman(folder)
    try:
        yield engine
    finally:
        stop_podman(engine, remove=remove)


def copy_image(source: Engine, target: Engine, name: str) -> None:
    """Sees to it that `target` has the image that `source` calls by this name, under the same name.

    Raises:
        EngineError: `source` has none, or one of the two failed.
    """
    wanted = source.image_id(name)
    if not wanted:
        raise EngineError(f"{source.name} has no image {name}")
    if target.image_id(name) == wanted:
        return
    with subprocess.Popen([source.name, "save", name], stdout=subprocess.PIPE, env=source.environment()) as save:
        loaded = subprocess.run(
            [target.name, "load", "--quiet"],
            stdin=save.stdout,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=target.environment(),
        )
    if save.returncode or loaded.returncode:
        raise EngineError(f"{name} was not copied from {source.name} to {target.name}: {loaded.stdout[-2000:]}")
    if target.image_id(name) != wanted:  # a loaded image may be named with a registry that its name never had
        target.run("tag", wanted.removeprefix("sha256:"), name)
