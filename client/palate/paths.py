"""Palate's own folder on this machine. Knows where it is, what its parts are called, and which of them nobody uses."""

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
    """Returns PALATE_HOME, by default `~/.palate`; made, and private to the user, when it is missing.

    Raises:
        ConfigurationError: It cannot be made.
    """
    given = os.environ.get("PALATE_HOME") or "~/.palate"
    try:
        home = Path(expand_path(given)).absolute()
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
    except ValueError as error:
        raise ConfigurationError(f"PALATE_HOME={show_path(given)} {error}") from None
    except OSError as error:
        raise ConfigurationError(
            f"Palate's folder {home} cannot be made: {error.strerror or error}. Set PALATE_HOME to a folder that this user may write"
        ) from None
    return home


def work_folder(kind: str, name: str) -> Path:
    """Returns the folder that this process works for a run in; not made.

    It is no other process's: a runner that has lost its run to another one of this machine must not remove what that one
    uses, and runs of two stores may have one name.
    """
    return palate_home() / "work" / kind / name / f"{os.getpid()}-{start_time(os.getpid())}-{_space()}"


def remember_start(uri: str, manifest: bytes) -> None:
    """Notes that this user started a run, with its manifest as it was then: see `was_started_here`."""
    mark = _start_mark(uri)
    draft = mark.with_name(f"{mark.name}.{os.getpid()}")
    try:
        mark.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        draft.write_text(hashlib.sha256(manifest).hexdigest())
        draft.replace(mark)
    except OSError as error:  # a full disk: the run can start, and `palate resume` replaces a look that begins it again
        logger.warning("%s is started, and would have to be resumed by hand if its runner were lost: %s", uri, error)
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def was_started_here(uri: str, manifest: bytes) -> bool:
    """Returns whether this user started a run, or resumed it, from this PALATE_HOME, with the manifest that it has."""
    try:
        return _start_mark(uri).read_text() == hashlib.sha256(manifest).hexdigest()
    except (OSError, UnicodeError):
        return False


def forget_start(uri: str) -> None:
    """Removes what `remember_start` noted."""
    _start_mark(uri).unlink(missing_ok=True)


def _start_mark(uri: str) -> Path:
    return palate_home() / "started" / hashlib.sha256(uri.encode()).hexdigest()


def stale_work_folders(kind: str, name: str) -> list[Path]:
    """Returns the work folders of a run whose process is gone; those of other machines, on a shared disk, are left out."""
    folder = palate_home() / "work" / kind / name
    return [entry for entry in (sorted(folder.iterdir()) if folder.is_dir() else []) if _is_stale(entry.name)]


def folder_now(folder: Path) -> float:
    """Returns the time by the clock of the file system that holds a folder, in seconds since the epoch."""
    with tempfile.TemporaryFile(dir=folder) as probe:
        return os.fstat(probe.fileno()).st_mtime


def _is_stale(mark: str) -> bool:
    pid, _, rest = mark.partition("-")
    started, _, space = rest.partition("-")
    return space == _space() and pid.isdecimal() and process_state(int(pid), started) == "dead"


def _space() -> str:
    return hashlib.sha256(pid_space().encode()).hexdigest()[:8]
