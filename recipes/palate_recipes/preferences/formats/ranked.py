"""Lists of answers with ranks or scores: the best and the worst are the pair. Knows no other format.

Sources: the dataset cards of UltraFeedback and Nectar, and NeMo RL's guide to DPO (a lower rank is better).
"""

from __future__ import annotations

from typing import Any

from palate_recipes.preferences.formats.compared import number
from palate_recipes.preferences.formats.fields import Format, Parts, Raw
from palate_recipes.preferences.formats.question import QUESTIONS, read_question
from palate_recipes.preferences.messages import kind, read_answer
from palate_recipes.preferences.row import fault

LISTS = ("completions", "answers", "responses", "candidates", "generations")
"""Fields with the answers."""
_TEXTS = ("completion", "response", "answer", "text", "output", "content", "generation")
_RANKS = ("rank",)
_SCORES = ("overall_score", "score", "rating", "reward")
_LISTS_OF_RANKS = ("ranks",)
_LISTS_OF_SCORES = ("scores", "score", "ratings", "rating", "rewards")


def list_of(row: Raw) -> str | None:
    """Returns the field with ranked answers, or None."""
    for name in LISTS:
        answers = row.get(name)
        if not (isinstance(answers, list) and answers):
            continue
        first = answers[0]
        if isinstance(first, dict) and _field(first, _TEXTS) and _field(first, (*_RANKS, *_SCORES)):
            return name
        if isinstance(first, str | list | dict) and _beside(row):
            return name
    return None


def _field(answer: Raw, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in answer), None)


def _beside(row: Raw) -> str | None:
    return next((name for name in (*_LISTS_OF_RANKS, *_LISTS_OF_SCORES) if isinstance(row.get(name), list)), None)


def read_ranked(row: Raw) -> Parts:
    name = list_of(row)
    if name is None:
        there = next((one for one in LISTS if one in row), None)
        if there is None:
            raise fault("missing-field", LISTS[0], f"`{LISTS[0]}` is missing")
        raise fault(
            "missing-field",
            there,
            f"`{there}` has no rank and no score: expected objects with `completion` and `score`",
        )
    answers = row[name]
    if len(answers) < 2:
        raise fault("wrong-kind", name, f"`{name}` has 1 answer; expected two or more")
    texts, values = (
        _within(answers, name) if isinstance(answers[0], dict) and not _beside(row) else _parallel(row, name)
    )
    best, worst = values.index(max(values)), values.index(min(values))
    if best == worst:
        raise fault("tie", name, f"is a tie: all {len(answers)} answers of `{name}` have the same score")
    prompt = read_question({field: value for field, value in row.items() if field != name})
    good, bad = (read_answer(texts[index], f"{name}[{index}]", prompt) for index in (best, worst))
    return prompt, good, bad


def _within(answers: list[Any], name: str) -> tuple[list[Any], list[float]]:
    texts: list[Any] = []
    values: list[float] = []
    for index, answer in enumerate(answers):
        place = f"{name}[{index}]"
        if not isinstance(answer, dict):
            raise fault("not-text", place, f"`{place}` is {kind(answer)}, not an object with an answer")
        text, rank = _field(answer, _TEXTS), _field(answer, (*_RANKS, *_SCORES))
        if text is None or rank is None:
            raise fault("missing-field", place, f"`{place}` has no {'answer' if text is None else 'rank and no score'}")
        texts.append(answer[text])
        value = number(answer[rank], f"{place}.{rank}")
        values.append(-value if rank in _RANKS else value)
    return texts, values


def _parallel(row: Raw, name: str) -> tuple[list[Any], list[float]]:
    by = _beside(row) or ""
    if len(row[by]) != len(row[name]):
        raise fault("bad-label", by, f"`{by}` has {len(row[by])} values, but `{name}` has {len(row[name])} answers")
    values = [number(value, f"{by}[{index}]") for index, value in enumerate(row[by])]
    return row[name], [-value for value in values] if by in _LISTS_OF_RANKS else values


FORMATS = (
    Format(
        "ranked",
        "`completions` or `answers`: a list with `rank` or `score`; the best and the worst are the pair",
        read_ranked,
        reads=frozenset((*QUESTIONS, *LISTS, *_LISTS_OF_RANKS, *_LISTS_OF_SCORES, "system", "system_prompt")),
    ),
)
