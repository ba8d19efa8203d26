"""Alpaca's formats: `instruction`, `input`, `history`, with one answer or two."""

from __future__ import annotations

from palate_recipes.preferences.formats.fields import (
    Format,
    Parts,
    Raw,
    Turns,
    both_answers,
    good_answer,
    need,
    with_system,
)
from palate_recipes.preferences.messages import (
    check_characters,
    kind,
    read_answer,
    read_text,
    shown,
    without_system,
)
from palate_recipes.preferences.row import Message, Row, fault


def read_instruction(row: Raw) -> Turns:
    """Alpaca's question: `instruction`, `input` below it, `history` before it."""
    need(row, "instruction")
    asked = read_text(row["instruction"], "instruction")
    more = row.get("input")
    if more is not None and type(more) is not str:
        raise fault("not-text", "input", f"`input` is {kind(more)}, not text")
    check_characters(more or "", "input")
    turns = (*read_history(row), Message("user", f"{asked}\n{more}" if more and more.strip() else asked))
    return with_system(row, turns)


def read_history(row: Raw) -> Turns:
    """The turns before the question: `history`, a list of [question, answer]."""
    turns: list[Message] = []
    history = row.get("history") or []
    if not isinstance(history, list):
        raise fault("not-text", "history", f"`history` is {kind(history)}, not a list of [question, answer]")
    for index, turn in enumerate(history):
        if not isinstance(turn, list) or len(turn) != 2:
            raise fault(
                "turn-order", f"history[{index}]", f"`history[{index}]` is {shown(turn)}, not [question, answer]"
            )
        turns += [Message("user", read_text(turn[0], f"history[{index}][0]"))]
        turns += [Message("assistant", read_text(turn[1], f"history[{index}][1]"))]
    return tuple(turns)


def read_alpaca(row: Raw) -> Parts:
    need(row, "chosen", "rejected")
    prompt = read_instruction(row)
    return prompt, read_answer(row["chosen"], "chosen", prompt), read_answer(row["rejected"], "rejected", prompt)


def _question(row: Row) -> Raw:
    prompt = without_system(row.prompt)
    if any(turn.role == "tool" for turn in prompt):
        raise fault("wrong-kind", "", "has a tool turn, which this format does not support")
    said = [turn.content for turn in prompt]
    raw: Raw = {"instruction": said[-1]}
    if prompt != row.prompt:
        raw["system"] = row.prompt[0].content
    if said[:-1]:
        raw["history"] = [list(turn) for turn in zip(said[:-1:2], said[1:-1:2], strict=True)]
    return raw


def write_alpaca_pair(row: Row) -> Raw:
    chosen, rejected = both_answers(row)
    return {**_question(row), "chosen": chosen, "rejected": rejected}


def read_alpaca_ranking(row: Raw) -> Parts:
    need(row, "output")
    output = row["output"]
    if not isinstance(output, list):
        raise fault("not-text", "output", f"`output` is {kind(output)}, not a list of two answers")
    if len(output) != 2:
        raise fault("wrong-kind", "output", f"`output` has {len(output)} answers; expected two, the better one first")
    return read_instruction(row), read_text(output[0], "output[0]"), read_text(output[1], "output[1]")


def read_instructions(row: Raw) -> Parts:
    need(row, "instruction", "output")
    return read_instruction(row), read_text(row["output"], "output"), None


def write_instructions(row: Row) -> Raw:
    return {**_question(row), "output": good_answer(row)}


FORMATS = (
    Format(
        "alpaca",
        "`instruction`, `input`, `history`, `chosen`, `rejected`",
        read_alpaca,
        write_alpaca_pair,
    ),
    Format("alpaca-ranking", "`instruction`, `output`: the better answer, then the other", read_alpaca_ranking),
    Format("instructions", "`instruction`, `input`, `output`", read_instructions, write_instructions),
)
