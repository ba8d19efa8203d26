"""Pairs whose answers have other names than `chosen` and `rejected`: those of ms-swift, argilla, distilabel and axolotl."""

from __future__ import annotations

from collections.abc import Container

from palate_recipes.preferences.formats.fields import Format, Parts, Raw, need
from palate_recipes.preferences.formats.question import QUESTIONS, read_question
from palate_recipes.preferences.messages import read_answer

ANSWERS = (
    ("chosen_response", "rejected_response"),  # argilla, axolotl
    ("response", "rejected_response"),  # ms-swift
    ("response_j", "response_k"),  # stack-exchange-paired: j has more votes
    ("chosen", "rejected"),  # with `input`: distilabel, axolotl
)
"""Fields of the better answer and of the other one, in order of precedence."""


def matches(names: Container[str]) -> bool:
    """Whether the fields have two such answers."""
    return any(good in names and bad in names for good, bad in ANSWERS[:3])


def read_named(row: Raw) -> Parts:
    good, bad = next((pair for pair in ANSWERS if pair[0] in row and pair[1] in row), ANSWERS[0])
    need(row, good, bad)
    prompt = read_question(row)
    return prompt, read_answer(row[good], good, prompt), read_answer(row[bad], bad, prompt)


FORMATS = (
    Format(
        "named-pairs",
        "`query`, `instruction`, `input` …; `chosen_response` or `response`, and `rejected_response`",
        read_named,
        reads=frozenset((*QUESTIONS, "system", "system_prompt", *(name for pair in ANSWERS for name in pair))),
    ),
)
