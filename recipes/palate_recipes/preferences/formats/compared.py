"""Two answers and a field that says which is better, as a table of field names. Knows no other format.

Sources: the dataset cards of SHP, HelpSteer2 and 3, PKU-SafeRLHF, AlpacaFarm, WebGPT comparisons and LMSYS's arenas.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Container
from itertools import product
from typing import Any, NamedTuple

from palate_recipes.preferences.formats.fields import Format, Parts, Raw, missing_fields, shared_turns, with_system
from palate_recipes.preferences.formats.question import QUESTIONS, given, read_question
from palate_recipes.preferences.messages import check_prompt, quoted, read_answer, read_messages, shown
from palate_recipes.preferences.row import RowFaults, fault


class Compared(NamedTuple):
    """Names of the fields of one kind of comparison.

    Attributes:
        first, second: The answers.
        verdict: One or more fields that together say which is better.
        judge: Returns a positive number if the first answer is better, a negative one for the second, 0 for a tie.
    """

    first: str
    second: str
    verdict: tuple[str, ...]
    judge: Callable[[Raw, Compared], float]


def number(value: Any, field: str) -> float:
    """Returns a score, a rank or a verdict; in CSV it is a text.

    Raises:
        RowFaults: It is not a finite number.
    """
    try:
        found = float(value) if isinstance(value, str | int | float) else math.nan
    except (ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):  # the difference of two infinite scores has no sign
        raise fault("bad-label", field, f"`{field}` is {shown(value)}, not a number")
    return found


def _code(row: Raw, field: str) -> float:
    """Returns a number that stands for an answer. True and false are refused: which answer they mean is not known."""
    if isinstance(row[field], bool):
        raise fault("bad-label", field, f"`{field}` is {shown(row[field])}, not a number")
    return number(row[field], field)


def _one_of(row: Raw, names: Compared, meanings: dict[float, int]) -> int:
    field = names.verdict[0]
    found = _code(row, field)
    if found not in meanings:
        expected = " or ".join(f"{value:g}" for value in meanings)
        raise fault("bad-label", field, f"`{field}` is {shown(row[field])}, not {expected}")
    return meanings[found]


def _position(row: Raw, names: Compared) -> float:
    return _one_of(row, names, {0: 1, 1: -1})


def _first_is_better(row: Raw, names: Compared) -> float:
    return _one_of(row, names, {1: 1, 0: -1})


def _strength(row: Raw, names: Compared) -> float:
    field = names.verdict[0]
    found = _code(row, field)
    if abs(found) > 3:  # -100 marks an invalid comparison in some copies of HelpSteer2
        raise fault("bad-label", field, f"`{field}` is {shown(row[field])}, not from -3 to 3")
    return -found  # negative: the first is better


def _one_or_two(row: Raw, names: Compared) -> float:
    field = names.verdict[0]
    found = _code(row, field)
    if not 1 <= found <= 2:
        # 0 was a tie in AlpacaEval's first files. In a file with 0 and 1 it is the first answer, and 1 the second.
        raise fault("bad-label", field, f"`{field}` is {shown(row[field])}, not 1 or 2 (1.5 for a tie)")
    return 1.5 - found


def _unclear(row: Raw, names: Compared) -> float:
    """Refuses a number that files use in two ways: 1 is the first answer in some and favours the second in others."""
    field = names.verdict[0]
    raise fault(
        "ambiguous-format",
        field,
        f"`{field}` is {shown(row[field])} with `{names.first}` and `{names.second}`, which has two meanings: rename "
        f"`{field}` to `preference_strength` if negative numbers prefer the first answer, or the answers to `output_1` and "
        "`output_2` if 1 is the first and 2 the second",
    )


_TIES = ("tie", "both", "neither", "draw", "equal", "same")


def _winner(row: Raw, names: Compared) -> float:
    field = names.verdict[0]
    said = row[field].strip().lower() if isinstance(row[field], str) else ""
    for value, answer in ((1, names.first), (-1, names.second)):
        end = answer.rsplit("_", 1)[-1].lower()
        if said in (answer.lower(), end, f"model_{end}", f"assistant_{end}", f"response_{end}", f"answer_{end}"):
            return value
    if said.startswith(_TIES):
        return 0
    ends = names.first.rsplit("_", 1)[-1], names.second.rsplit("_", 1)[-1]
    raise fault("bad-label", field, f"`{field}` is {shown(row[field])}, not {ends[0]!r}, {ends[1]!r} or 'tie'")


def _marked(row: Raw, names: Compared) -> float:
    first, second = (number(row[field], field) for field in names.verdict)
    return first - second


COMPARED = (
    Compared("human_ref_A", "human_ref_B", ("labels",), _first_is_better),  # SHP
    Compared("response_1", "response_2", ("preference_strength",), _strength),  # HelpSteer2
    Compared("response1", "response2", ("overall_preference",), _strength),  # HelpSteer3
    Compared("response_0", "response_1", ("better_response_id",), _position),  # PKU-SafeRLHF
    Compared("output_1", "output_2", ("preference",), _one_or_two),  # AlpacaFarm
    Compared("response_1", "response_2", ("preference",), _unclear),
    Compared("response_a", "response_b", ("winner_model_a", "winner_model_b"), _marked),  # LMSYS's competition
    Compared("answer_0", "answer_1", ("score_0", "score_1"), _marked),  # WebGPT
    *(
        Compared(f"{answer}_{one}", f"{answer}_{other}", (verdict,), _winner)
        for answer, (one, other), verdict in product(
            ("response", "answer", "output", "completion", "conversation"),
            (("a", "b"), ("A", "B")),
            ("winner", "preferred", "preference"),
        )
    ),
)
"""All kinds of comparison."""


def kinds_of(names: Container[str]) -> list[Compared]:
    """Returns the kinds of comparison whose fields are there."""
    return [
        one
        for one in COMPARED
        if one.first in names and one.second in names and all(field in names for field in one.verdict)
    ]


def read_compared(row: Raw) -> Parts:
    kinds = kinds_of(row)
    if not kinds:
        raise _incomplete(row)
    if len(kinds) > 1:
        several = " or ".join(
            f"{quoted(one.first)} and {quoted(one.second)} by {quoted(one.verdict[0])}" for one in kinds
        )
        raise fault("ambiguous-format", kinds[0].verdict[0], f"may be read as {several}: remove one of the fields")
    names = kinds[0]
    better = names.judge(row, names)
    if not better:
        field = names.verdict[0]
        raise fault("tie", field, f"is a tie: `{field}` is {shown(row[field])}")
    row = _in_turns(row, names)
    if given(row):
        prompt = read_question(row)
    else:  # an arena's conversations: the question is in both
        one, other = (read_messages(row[name], name) for name in names[:2])
        prompt = check_prompt(with_system(row, shared_turns(one, other, *names[:2])), names.first)
    first, second = (read_answer(row[name], name, prompt) for name in names[:2])
    return (prompt, first, second) if better > 0 else (prompt, second, first)


def _in_turns(row: Raw, names: Compared) -> Raw:
    """Returns a row of LMSYS's competition with its conversations; another row unchanged.

    The competition's prompt and answers are JSON lists with one text per turn, written as text.
    """
    if names.judge is not _marked or not all(
        isinstance(row.get(name), str) and row[name].startswith("[") for name in ("prompt", *names[:2])
    ):
        return row
    try:
        asked, one, other = (json.loads(row[name]) for name in ("prompt", *names[:2]))
    except (ValueError, RecursionError):
        return row
    if not all(
        isinstance(texts, list) and all(isinstance(text, str | None) for text in texts) for texts in (asked, one, other)
    ):
        return row
    for name, texts in zip(names[:2], (one, other), strict=False):
        if len(texts) != len(asked):
            what = f"`{name}` has {len(texts)} turns, but `prompt` has {len(asked)}"
            raise fault("different-prompts", name, what)
    turns = {
        name: [
            {"role": role, "content": text}
            for pair in zip(asked, texts, strict=True)
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        for name, texts in zip(names[:2], (one, other), strict=False)
    }
    return {name: value for name, value in row.items() if name != "prompt"} | turns


def _incomplete(row: Raw) -> RowFaults:
    for one in COMPARED:
        there = [name for name in (one.first, one.second, *one.verdict) if name in row]
        if len(there) > 1:
            missing = [name for name in (one.first, one.second, *one.verdict) if name not in row]
            return missing_fields(missing, [name for name in row if name not in there])
    return missing_fields([COMPARED[1].first, COMPARED[1].second], list(row))


FORMATS = (
    Format(
        "compared",
        "two answers (`response_a` and `response_b`, `output_1` and `output_2` …) and which is better (`winner`, `preference` …)",
        read_compared,
        reads=frozenset(
            (
                *QUESTIONS,
                "system",
                "system_prompt",
                "winner_tie",
                *(name for one in COMPARED for name in (one.first, one.second, *one.verdict)),
            )
        ),
    ),
)
