"""Palate's folder on this machine: its location, its layout, and which work folders are stale."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from contextlib import suppress
from pathlib import Path

from palate.processes import pid_space, process_state, start_time
from palate_recipes.errors import ConfigurationError
from palate_recipes.text import expand_path, show_path

logger = logging.getLogger("palate.paths")


def palate_home() -> Path:
    """Returns PALATE_HOME, by default `~/.palate`. Creates it, private to the user, if it is missing.

    Raises:
        ConfigurationError: It cannot be created.
    """
    given = os.environ.get("PALATE_HOME") or "~/.palate"
    try:
        home = Path(expand_path(given)).absolute()
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
    except ValueError as error:
        raise ConfigurationError(f"PALATE_HOME={show_path(given)} {error}") from None
    except OSError as error:
        raise ConfigurationError(
            f"Palate's folder {home} cannot be created: {error.strerror or error}. Set PALATE_HOME to a writable folder"
        ) from None
    return home


def work_folder(kind: str, name: str) -> Path:
    """Returns this process's work folder for a run. Does not create it.

    No other process has the same folder: a runner that has lost its run to another runner on this machine must not remove that
    runner's files, and runs of two stores can have the same name.
    """
    return palate_home() / "work" / kind / name / f"{os.getpid()}-{start_time(os.getpid())}-{_space()}"


def remember_start(uri: str, manifest: bytes) -> None:
    """Records that this user started a run with this manifest. See `was_started_here`."""
    mark = _start_mark(uri)
    draft = mark.with_name(f"{mark.name}.{os.getpid()}")
    try:
        mark.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        draft.write_text(hashlib.sha256(manifest).hexdigest())
        draft.replace(mark)
    except OSError as error:  # a full disk: the run can start, but only `palate resume` restarts it
        logger.warning("%s was started, but must be resumed manually if its runner is lost: %s", uri, error)
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def was_started_here(uri: str, manifest: bytes) -> bool:
    """Returns whether this user started or resumed the run from this PALATE_HOME with the same manifest."""
    try:
        return _start_mark(uri).read_text() == hashlib.sha256(manifest).hexdigest()
    except (OSError, UnicodeError):
        return False


def forget_start(uri: str) -> None:
    """Removes the record of `remember_start`."""
    _start_mark(uri).unlink(missing_ok=True)


def _start_mark(uri: str) -> Path:
    return palate_home() / "started" / hashlib.sha256(uri.encode()).hexdigest()


def stale_work_folders(kind: str, name: str) -> list[Path]:
    """Returns a run's work folders whose process has ended. Ignores those of other machines on a shared disk."""
    folder = palate_home() / "work" / kind / name
    return [entry for entry in (sorted(folder.iterdir()) if folder.is_dir() else []) if _is_stale(entry.name)]


def folder_now(folder: Path) -> float:
    """Returns the time by the clock of the folder's file system, in seconds since the epoch."""
    with tempfile.TemporaryFile(dir=folder) as probe:
        return os.fstat(probe.fileno()).st_mtime


def _is_stale(mark: str) -> bool:
    pid, _, rest = mark.partition("-")
    started, _, space = rest.partition("-")
    return space == _space() and pid.isdecimal() and process_state(int(pid), started) == "dead"


def _space() -> str:
    return hashlib.sha256(pid_space().encode()).hexdigest()[:8]
