"""The mark of a whole checkpoint: what it holds, and whether that is still so. Knows folders, no training."""

from __future__ import annotations

import json
from pathlib import Path

from palate_recipes.specs.train import COMPLETE_MARK


def mark_complete(folder: Path) -> None:
    """Writes the mark, last: every file that is there, with its size in bytes."""
    (folder / COMPLETE_MARK).write_text(json.dumps(_sizes(folder)) + "\n", encoding="utf-8")


def is_whole(folder: Path) -> bool:
    """Whether the mark is there, and every file that it lists has its size.

    Who copies a folder while it grows (a platform that syncs checkpoints) may bring the mark and not yet what it promises.
    """
    try:
        text = (folder / COMPLETE_MARK).read_text(encoding="utf-8")
    except FileNotFoundError:
        return False
    try:
        listed = json.loads(text or "{}")  # an empty one is the runner's, which compares digests instead
    except ValueError:
        return False
    there = _sizes(folder)
    return all(there.get(name) == size for name, size in listed.items())


def last_whole(checkpoints: Path) -> Path | None:
    """Returns the newest whole `checkpoint-N` of a folder, or None."""
    found = (folder for folder in checkpoints.glob("checkpoint-*") if folder.name.rpartition("-")[2].isdigit())
    newest_first = sorted(found, key=lambda folder: int(folder.name.rpartition("-")[2]), reverse=True)
    return next(filter(is_whole, newest_first), None)


def _sizes(folder: Path) -> dict[str, int]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != COMPLETE_MARK)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
