"""TRL's and PAI's formats: `prompt`, `chosen`, `rejected` as texts or messages, and `completion`."""

from __future__ import annotations

from typing import Any

from palate_recipes.preferences.formats.fields import (
    OTHER_PROMPTS,
    PROMPTS,
    Format,
    Parts,
    Raw,
    assistant_turn,
    both_answers,
    good_answer,
    need,
    shared_turns,
    turns_as_json,
    with_system,
)
from palate_recipes.preferences.formats.question import given, read_question
from palate_recipes.preferences.messages import (
    check_prompt,
    read_answer,
    read_messages,
    read_prompt,
    read_text,
    without_system,
)
from palate_recipes.preferences.row import Fault, Message, Row, RowFaults, fault


def plain_texts(row: Raw) -> Parts | None:
    """Reads `prompt`, `chosen` and `rejected` of most rows, in a tenth of the time of `read_texts`, or returns None.

    Args:
        row: A row without a system text.
    """
    prompt, chosen, rejected = row.get("prompt"), row.get("chosen"), row.get("rejected")
    if (
        type(prompt) is type(chosen) is type(rejected) is str
        and prompt.isascii()
        and chosen.isascii()
        and rejected.isascii()
        and not (prompt.isspace() or chosen.isspace() or rejected.isspace())
        and prompt
        and chosen
        and rejected
        and not prompt.startswith(OTHER_PROMPTS)
    ):
        return (Message("user", prompt),), chosen, rejected
    return None


def read_texts(row: Raw) -> Parts:
    """`prompt`, `chosen` and `rejected` as texts."""
    need(row, "prompt", "chosen")
    faults: list[Fault] = []
    found: list[Any] = []
    for name in ("prompt", "chosen", "rejected"):
        try:
            found.append(read_text(row[name], name) if name in row else None)
        except RowFaults as error:
            faults += error.faults
    if faults:
        raise RowFaults(*faults)
    prompt, chosen, rejected = found
    turns = check_prompt(read_prompt(prompt, "prompt"), "prompt")
    return with_system(row, turns) if "system" in row or "system_prompt" in row else turns, chosen, rejected


def one_question(row: Row) -> tuple[str, Raw]:
    turns = without_system(row.prompt)
    if len(turns) != 1:
        raise fault("wrong-kind", "", f"is a conversation of {len(turns)} turns, but this format has one question")
    return turns[0].content, {"system": row.prompt[0].content} if turns != row.prompt else {}


def write_pai(row: Row) -> Raw:
    prompt, system = one_question(row)
    if read_prompt(prompt, "prompt") != (Message("user", prompt),):
        raise fault("wrong-kind", "", "has a question that would read as a transcript of several turns")
    answers = {"chosen": row.chosen, "rejected": row.rejected}
    if row.chosen is None:
        both_answers(row)
    return {**system, "prompt": prompt, **{name: text for name, text in answers.items() if text is not None}}


def read_trl(row: Raw) -> Parts:
    need(row, "chosen", "rejected")
    name = next((name for name in PROMPTS if name in row), None)
    chosen, rejected = row["chosen"], row["rejected"]
    if name is not None:
        prompt = read_prompt(row[name], name)
        prompt = check_prompt(with_system(row, prompt), name)
    else:
        prompt = with_system(row, shared_turns(read_messages(chosen, "chosen"), read_messages(rejected, "rejected")))
        prompt = check_prompt(prompt, "chosen")
    if type(chosen) is list and len(chosen) > 1 and prompt[0].role != "system":
        first = read_messages(chosen[:2], "chosen")[0]  # without an empty system turn
        if first.role == "system":  # UltraFeedback's `prompt` is the last question; the whole is in the answers
            prompt = (first, *prompt)
    return prompt, read_answer(chosen, "chosen", prompt), read_answer(rejected, "rejected", prompt)


def write_trl(row: Row) -> Raw:
    chosen, rejected = both_answers(row)
    return {
        "prompt": turns_as_json(row.prompt),
        "chosen": [assistant_turn(chosen)],
        "rejected": [assistant_turn(rejected)],
    }


def read_completions(row: Raw) -> Parts:
    if "prompt" in row:
        prompt = check_prompt(with_system(row, read_prompt(row["prompt"], "prompt")), "prompt")
    else:
        need(row, *(() if given(row) else ("prompt",)))
        prompt = read_question(row)
    name = next((name for name in ("chosen", *ANSWERS) if name in row), "completion")
    need(row, name)
    return prompt, read_answer(row[name], name, prompt), None


ANSWERS = ("completion", "response", "answer", "output")
"""Fields of a single answer, in order of precedence."""


def write_completions(row: Row) -> Raw:
    return {"prompt": turns_as_json(row.prompt), "completion": [assistant_turn(good_answer(row))]}


FORMATS = (
    Format("pai", "`prompt`, `chosen`, `rejected`: texts; perhaps `system`", read_texts, write_pai),
    Format(
        "trl",
        "the same with messages or texts; `prompt` may be missing where the answers begin with it",
        read_trl,
        write_trl,
    ),
    Format(
        "completions",
        "`prompt`, `question` or `query`, and `completion`, `response`, `answer` or `chosen`",
        read_completions,
        write_completions,
    ),
)
