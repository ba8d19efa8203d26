"""What the measuring program takes and gives: `python -m palate_trainer.measure SPEC.json`. Types only.

It prints one JSON object, a `Measured`; on failure its last line on stderr is a message for people, and the exit code is 1.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict


@dataclass(frozen=True, kw_only=True)
class MeasureSpec:
    """Files whose tokens are to be counted as a training would cut them.

    Attributes:
        model_dir: Folder with the tokenizer.
        files: Path and name of each data file.
        strategy: What the rows are for; None takes any.
        settings: Arguments of `palate_recipes.data.columns.format_for`.
        seq_length: Most tokens of prompt and answer together.
        system_prompt: Of rows that bring none.
        apply_chat_template: As in training.
    """

    model_dir: str
    files: list[list[str]]
    strategy: str | None
    settings: dict[str, Any]
    seq_length: int
    system_prompt: str
    apply_chat_template: bool = True

    def write(self, path: Path) -> None:
        """Writes the spec as JSON."""
        path.write_text(json.dumps(asdict(self), ensure_ascii=False), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> MeasureSpec:
        """Reads a spec; raises TypeError on unknown or missing fields."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


class Measured(TypedDict):
    """What was measured.

    Keys:
        counts: Rows by code: `no-room`, `same-after-cut`, `same-tokens`, `cut`.
        places: The first of each: file, row number, unit, what.
        lengths: Percentiles of whole rows in tokens, uncut.
        histogram: Rows by tokens, see `palate_recipes.data.facts.histogram`.
    """

    counts: dict[str, int]
    places: dict[str, list[tuple[str, int, str, str]]]
    lengths: dict[str, int]
    histogram: list[int]
