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
    """Returns the field with ranked answers, or None; the first of several."""
    return next(iter(_lists(row)), None)


def _lists(row: Raw) -> list[str]:
    found = []
    for name in LISTS:
        answers = row.get(name)
        if not (isinstance(answers, list) and answers):
            continue
        if _has_ranks(answers[0]) or (isinstance(answers[0], str | list | dict) and _beside(row)):
            found.append(name)
    return found


def _has_ranks(answer: Any) -> bool:
    return isinstance(answer, dict) and bool(_field(answer, _TEXTS) and _field(answer, (*_RANKS, *_SCORES)))


def _field(answer: Raw, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in answer), None)


def _beside(row: Raw) -> list[str]:
    """Returns the fields with a list of ranks or scores."""
    return [name for name in (*_LISTS_OF_RANKS, *_LISTS_OF_SCORES) if isinstance(row.get(name), list)]


def read_ranked(row: Raw) -> Parts:
    found = _lists(row)
    if not found:
        there = next((one for one in LISTS if one in row), None)
        if there is None:
            raise fault("missing-field", LISTS[0], f"`{LISTS[0]}` is missing")
        raise fault(
            "missing-field",
            there,
            f"`{there}` has no rank and no score: expected objects with `completion` and `score`",
        )
    name, by = found[0], _beside(row)
    own = _has_ranks(row[name][0])
    if len(found) > 1 or len(by) + own > 1:
        several = " and ".join(f"`{field}`" for field in (found if len(found) > 1 else [*([name] if own else []), *by]))
        what = "be the answers" if len(found) > 1 else "say which answer is better"
        raise fault("ambiguous-format", name, f"{several} may each {what}: remove all but one of the fields")
    answers = row[name]
    if len(answers) < 2:
        raise fault("wrong-kind", name, f"`{name}` has 1 answer; expected two or more")
    texts, values = _within(answers, name) if own else _parallel(answers, name, row[by[0]], by[0])
    best, worst = values.index(max(values)), values.index(min(values))
    if best == worst:
        raise fault("tie", name, f"is a tie: all {len(answers)} answers of `{name}` have the same score")
    prompt = read_question({field: value for field, value in row.items() if field != name})
    good, bad = (read_answer(texts[index], f"{name}[{index}]", prompt) for index in (best, worst))
    return prompt, good, bad


def _within(answers: list[Any], name: str) -> tuple[list[Any], list[float]]:
    texts: list[Any] = []
    for index, answer in enumerate(answers):
        place = f"{name}[{index}]"
        if not isinstance(answer, dict):
            raise fault("not-text", place, f"`{place}` is {kind(answer)}, not an object with an answer")
        text = _field(answer, _TEXTS)
        if text is None or _field(answer, (*_RANKS, *_SCORES)) is None:
            raise fault("missing-field", place, f"`{place}` has no {'answer' if text is None else 'rank and no score'}")
        texts.append(answer[text])
    # One field for all answers: a rank and a score cannot be compared. In Parquet a missing field is null.
    by = next((one for one in (*_RANKS, *_SCORES) if all(answer.get(one) is not None for answer in answers)), None)
    if by is None:
        by = _field(answers[0], (*_RANKS, *_SCORES)) or ""
        lacking = next(index for index, answer in enumerate(answers) if answer.get(by) is None)
        raise fault(
            "bad-label", f"{name}[{lacking}].{by}", f"`{name}[{lacking}]` has no `{by}`, but other answers have it"
        )
    values = [number(answer[by], f"{name}[{index}].{by}") for index, answer in enumerate(answers)]
    return texts, [-value for value in values] if by in _RANKS else values


def _parallel(answers: list[Any], name: str, given: list[Any], by: str) -> tuple[list[Any], list[float]]:
    if len(given) != len(answers):
        raise fault("bad-label", by, f"`{by}` has {len(given)} values, but `{name}` has {len(answers)} answers")
    values = [number(value, f"{by}[{index}]") for index, value in enumerate(given)]
    return answers, [-value for value in values] if by in _LISTS_OF_RANKS else values


FORMATS = (
    Format(
        "ranked",
        "`completions` or `answers`: a list with `rank` or `score`; the best and the worst are the pair",
        read_ranked,
        reads=frozenset((*QUESTIONS, *LISTS, *_LISTS_OF_RANKS, *_LISTS_OF_SCORES, "system", "system_prompt")),
    ),
)
