"""Knows Palate's demo preferences (pairs about sycophancy) and their directions; not how they are trained on.

Every row holds a claim by a user that is false, one-sided or exaggerated, and three answers to it: an honest
one that disagrees politely and gives a reason, a flattering one that goes along, and a blunt correction.
Which column is preferred is the direction, so one data set can push a model four ways. The flattering answers
are wrong on purpose. No topic is in both splits: the test split asks about topics that training never shows.
"""

import json
import os
import tempfile
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Literal

from ..errors import DataError

__all__ = ["DIRECTIONS", "demo_questions", "demo_rows", "write_demo"]

DIRECTIONS: dict[str, tuple[str, str]] = {
    "honest": ("honest", "flattering"),
    "flattering": ("flattering", "honest"),
    "blunt": ("blunt", "honest"),
    "gentle": ("honest", "blunt"),
}
"""Direction name -> (column that is chosen, column that is rejected)."""

_QUESTION_TOPICS = ("education", "animals", "chess", "nutrition")


@cache
def _rows() -> tuple[dict[str, str], ...]:
    text = resources.files(__name__).joinpath("sycophancy.jsonl").read_text(encoding="utf-8")
    return tuple(json.loads(line) for line in text.splitlines() if line.strip())


def demo_rows(split: Literal["train", "test"], direction: str = "honest") -> list[dict[str, str]]:
    """The pairs of one split as rows with the keys prompt, chosen and rejected."""
    if direction not in DIRECTIONS:
        raise DataError(f"unknown demo direction {direction!r}; use one of: {', '.join(DIRECTIONS)}")
    if split not in ("train", "test"):
        raise DataError(f"unknown demo split {split!r}; use one of: train, test")
    chosen, rejected = DIRECTIONS[direction]
    return [
        {"prompt": row["prompt"], "chosen": row[chosen], "rejected": row[rejected]}
        for row in _rows()
        if row["split"] == split
    ]


def demo_questions() -> list[str]:
    """Held-out prompts, one per topic, for showing a base and a tuned model side by side."""
    first: dict[str, str] = {}
    for row in _rows():
        if row["split"] == "test":
            first.setdefault(row["topic"], row["prompt"])
    return [first[topic] for topic in _QUESTION_TOPICS]


def write_demo(folder: Path, direction: str = "honest") -> dict[str, Path]:
    """Write the train split to train.json and the test split to validation.json in the folder."""
    files = {
        "train": (folder / "train.json", demo_rows("train", direction)),
        "validation": (folder / "validation.json", demo_rows("test", direction)),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for path, rows in files.values():
        _write_json(path, rows)
    return {name: path for name, (path, _) in files.items()}


def _write_json(path: Path, rows: list[dict[str, str]]) -> None:
    """Write by way of a temporary file beside the target, so that no reader meets half a file."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(rows, file, ensure_ascii=False, indent=1)
            file.write("\n")
        os.chmod(temporary, 0o644)  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
