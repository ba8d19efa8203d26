"""Palate's demo data: preference pairs about sycophancy. Knows the rows and directions, not the training.

Each row has a user's claim that is false, one-sided or exaggerated, and three answers: an honest one that disagrees politely
and gives a reason, a flattering one that agrees, and a blunt correction. The direction says which column is preferred, so one
data set can train four behaviors. The flattering answers are wrong on purpose. The splits share no topic. The first two rows
of each topic in the train split are short and simple; the quickstart trains on these only.
"""

import json
import os
import re
import tempfile
from collections import Counter
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Literal

from palate_recipes.errors import DataError

__all__ = ["DIRECTIONS", "ROWS_PER_TOPIC", "demo_questions", "demo_rows", "disagrees", "write_demo"]

DIRECTIONS: dict[str, tuple[str, str]] = {
    "honest": ("honest", "flattering"),
    "flattering": ("flattering", "honest"),
    "blunt": ("blunt", "honest"),
    "gentle": ("honest", "blunt"),
}
"""Direction name -> (chosen column, rejected column)."""

ROWS_PER_TOPIC = 4

_QUESTION_TOPICS = ("education", "animals", "chess", "nutrition")

_STATED = r"(that |entirely |quite |really |completely )?(true|right|correct|accurate|the case|so simple|that simple|that way)"
_CONTRADICTION = re.compile(
    r"^no[,.:;!]|^(actually|unfortunately)\b|^not (really|quite|at all|necessarily|exactly)\b|\bdisagree\b|\bi doubt\b"
    r"|\b(do not|don't|would not|wouldn't|cannot|can't) (agree|think|say that|see it|see a)\b"
    rf"|\b(is not|are not|was not|isn't|aren't|wasn't) {_STATED}\b|'s not {_STATED}\b"
    r"|\b(is|are|was|were)( both)? (wrong|false|incorrect|untrue)\b|'s (wrong|false|incorrect|untrue)\b"
    r"|\b(a|this|is) ([a-z]+ )?(myth|misconception)\b",
    re.IGNORECASE,
)


@cache
def _rows() -> tuple[dict[str, str], ...]:
    text = resources.files(__name__).joinpath("sycophancy.jsonl").read_text(encoding="utf-8")
    return tuple(json.loads(line) for line in text.splitlines() if line.strip())


def demo_rows(
    split: Literal["train", "test"], direction: str = "honest", *, per_topic: int = ROWS_PER_TOPIC
) -> list[dict[str, str]]:
    """Returns the pairs of one split as rows with the keys prompt, chosen and rejected.

    Args:
        split: train (34 topics) or test (8 other topics).
        direction: A key of `DIRECTIONS`.
        per_topic: Rows per topic, 1 to `ROWS_PER_TOPIC`, in file order.

    Raises:
        DataError: A value is unknown or out of range.
    """
    if direction not in DIRECTIONS:
        raise DataError(f"unknown demo direction {direction!r}; use one of: {', '.join(DIRECTIONS)}")
    if split not in ("train", "test"):
        raise DataError(f"unknown demo split {split!r}; use one of: train, test")
    if not 1 <= per_topic <= ROWS_PER_TOPIC:
        raise DataError(f"per_topic={per_topic} is out of range: expected 1 to {ROWS_PER_TOPIC}")
    chosen, rejected = DIRECTIONS[direction]
    seen: Counter[str] = Counter()
    rows = []
    for row in _rows():
        if row["split"] == split and seen[row["topic"]] < per_topic:
            seen[row["topic"]] += 1
            rows.append({"prompt": row["prompt"], "chosen": row[chosen], "rejected": row[rejected]})
    return rows


def demo_questions() -> list[str]:
    """Returns held-out prompts, one per topic, to compare a base and a tuned model."""
    first: dict[str, str] = {}
    for row in _rows():
        if row["split"] == "test":
            first.setdefault(row["topic"], row["prompt"])
    return [first[topic] for topic in _QUESTION_TOPICS]


def disagrees(answer: str) -> bool:
    """Whether the first sentence of an answer contradicts the claim, by a fixed list of English phrases.

    Detects the position, not whether the reasons are correct.
    """
    text = answer.strip().replace("\u2019", "'")
    first = re.split(r"(?<=[.!?])\s", text, maxsplit=1)[0]
    return _CONTRADICTION.search(first) is not None


def write_demo(folder: Path, direction: str = "honest", *, per_topic: int = ROWS_PER_TOPIC) -> dict[str, Path]:
    """Writes the train split to train.json and the test split to validation.json in the folder. See `demo_rows`.

    Returns:
        The paths by channel: `train` and `validation`.
    """
    files = {
        "train": (folder / "train.json", demo_rows("train", direction, per_topic=per_topic)),
        "validation": (folder / "validation.json", demo_rows("test", direction, per_topic=per_topic)),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for path, rows in files.values():
        _write_json(path, rows)
    return {name: path for name, (path, _) in files.items()}


def _write_json(path: Path, rows: list[dict[str, str]]) -> None:
    """Writes a temporary file and renames it, so that no reader sees half a file."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(rows, file, ensure_ascii=False, indent=1)
            file.write("\n")
        os.chmod(temporary, 0o644)  # mkstemp creates files with mode 0600
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
