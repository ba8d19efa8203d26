"""The question of a row whose format does not say which field has it: `prompt`, `query`, `instruction`, `context` and so on."""

from __future__ import annotations

from palate_recipes.preferences.formats.alpaca import read_history, read_instruction
from palate_recipes.preferences.formats.fields import Raw, Turns, listed, with_system
from palate_recipes.preferences.messages import check_prompt, quoted, read_prompt
from palate_recipes.preferences.row import fault

QUESTIONS = (
    "prompt",
    "question",
    "query",
    "instruction",
    "input",
    "context",
    "history",
    "messages",
    "conversation",
    "conversations",
)
"""Fields that may have the question."""


def given(row: Raw) -> list[str]:
    """Returns the fields that have a question: not those that are null, empty, or only add to another one."""
    names = [name for name in QUESTIONS if row.get(name) not in (None, "", [])]
    if "instruction" in names and "input" in names:
        names.remove("input")  # Alpaca: the text that the instruction is about
    if len(names) > 1 and "history" in names and isinstance(row["history"], list):
        names.remove("history")  # the turns before the question
    return names


def read_question(row: Raw) -> Turns:
    """Returns the conversation before the answers.

    Raises:
        RowFaults: No field has it, or several fields might.
    """
    names = given(row)
    if not names:
        empty = next((name for name in QUESTIONS if name in row), None)
        if empty is not None:
            raise fault("empty-field", empty, f"{quoted(empty)} is empty")
        raise fault("missing-field", "prompt", f"`prompt` is missing; the row has {listed(list(row))}")
    if len(names) > 1:
        raise fault(
            "ambiguous-format", names[0], f"{' and '.join(map(quoted, names))} may each be the question: remove one"
        )
    name = names[0]
    if name == "instruction":
        return read_instruction(row)
    value = row[name]
    if isinstance(value, dict) and "full_text" in value:  # WebGPT: with the source of the question
        name, value = f"{name}.full_text", value["full_text"]
    earlier = read_history(row) if name != "history" and isinstance(row.get("history"), list) else ()
    return check_prompt(with_system(row, (*earlier, *read_prompt(value, name))), name)
