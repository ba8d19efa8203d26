"""Unpaired answers for KTO: one answer and whether it is good."""

from __future__ import annotations

from typing import Any

from palate_recipes.preferences.formats.alpaca import read_instruction
from palate_recipes.preferences.formats.fields import (
    PROMPTS,
    Format,
    Parts,
    Raw,
    assistant_turn,
    last_answer,
    listed,
    need,
    turns_as_json,
    with_system,
)
from palate_recipes.preferences.messages import (
    check_prompt,
    read_answer,
    read_prompt,
    read_text,
    shown,
)
from palate_recipes.preferences.row import Row, fault


def read_unpaired(row: Raw) -> Parts:
    name = "kto_tag" if "kto_tag" in row and "label" not in row else "label"
    need(row, name)
    label = _label(row[name], name)
    answer = next((field for field in ("completion", "response", "answer") if field in row), None)
    if answer is not None:
        asked = next((field for field in PROMPTS if field in row), None)
        if asked is None:
            raise fault("missing-field", "prompt", f"`prompt` is missing; the row has {listed(list(row))}")
        prompt = check_prompt(with_system(row, read_prompt(row[asked], asked)), asked)
        text = read_answer(row[answer], answer, prompt)
    elif "instruction" in row and "output" in row:
        prompt, text = read_instruction(row), read_text(row["output"], "output")
    else:
        prompt, text = last_answer(row, "messages" if "messages" in row else "conversations")
    return (prompt, text, None) if label else (prompt, None, text)


def _label(value: Any, name: str) -> bool:
    known = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}
    found = (
        known.get(value.strip().lower() if isinstance(value, str) else value) if isinstance(value, str | int) else None
    )
    if found is None:
        raise fault("bad-label", name, f"`{name}` is {shown(value)}, not true or false")
    return found


def write_unpaired(row: Row) -> Raw:
    if row.chosen is not None and row.rejected is not None:
        raise fault("wrong-kind", "", "has two answers, but this format has one; `unpair` writes it as two rows")
    label = row.chosen is not None
    return {
        "prompt": turns_as_json(row.prompt),
        "completion": [assistant_turn(row.chosen if label else row.rejected)],
        "label": label,
    }


FORMATS = (
    Format(
        "unpaired",
        "`prompt` and `completion`, `instruction` and `output`, or `messages`; `label` or `kto_tag`: true or false",
        read_unpaired,
        write_unpaired,
    ),
)
