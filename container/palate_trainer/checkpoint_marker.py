"""Marks a checkpoint as complete, and checks that it still is. Knows folders, no training."""

from __future__ import annotations

import json
from pathlib import Path

from palate_recipes.specs.train import COMPLETE_MARK


def mark_complete(folder: Path) -> None:
    """Writes the marker: the name and size in bytes of every file. Call it after the last file is written."""
    (folder / COMPLETE_MARK).write_text(json.dumps(_sizes(folder)) + "\n", encoding="utf-8")


def is_whole(folder: Path) -> bool:
    """Whether the marker exists and every file in it has the recorded size.

    A platform that syncs a checkpoint while it is being written may copy the marker before the files that it lists.
    """
    try:
        text = (folder / COMPLETE_MARK).read_text(encoding="utf-8")
    except FileNotFoundError:
        return False
    try:
        listed = json.loads(text or "{}")  # the runner's marker is empty: the runner compares digests instead
    except ValueError:
        return False
    there = _sizes(folder)
    return all(there.get(name) == size for name, size in listed.items())


def last_whole(checkpoints: Path) -> Path | None:
    """Returns the newest complete `checkpoint-N` in a folder, or None."""
    found = (folder for folder in checkpoints.glob("checkpoint-*") if folder.name.rpartition("-")[2].isdigit())
    newest_first = sorted(found, key=lambda folder: int(folder.name.rpartition("-")[2]), reverse=True)
    return next(filter(is_whole, newest_first), None)


def _sizes(folder: Path) -> dict[str, int]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != COMPLETE_MARK)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
