"""How many calls are left, and what they take at most: a replay of what the ledger has. Sends nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from palate.data.asking import Call
from palate.data.judge import comparison, most_comparisons
from palate.data.ledger import Ledger, Reply
from palate.data.pairs import Maker, PairSettings, Usage, merge, usage_of
from palate.data.prompts import Prompt

_TEMPLATE_TOKENS = 16
"""What a chat template puts around a message, at most about."""


class Planned(NamedTuple):
    """Calls for all prompts: all told, finished, and left; what is left takes at most the usage."""

    answers: int
    verdicts: int
    finished: int
    calls: int
    usage: tuple[Usage, ...]


class _NotFinished(Exception):
    pass


async def plan_calls(prompts: Sequence[Prompt], settings: PairSettings, ledger: Ledger) -> Planned:
    """Counts the calls that prompts take, by replaying those that the ledger has."""
    finished = answers_left = verdicts_left = 0
    rows: list[Usage] = []
    most_verdicts = 2 * most_comparisons(settings.answers)
    found = 0

    async def look_up(call: Call) -> Reply:
        nonlocal found
        reply = ledger.get(call.key())
        if reply is None:
            raise _NotFinished
        found += 1
        return reply

    maker = Maker(settings, look_up)
    judge_model = settings.judge[1]
    for prompt in prompts:
        calls = settings.answer_calls(prompt)
        asked = [call for call in calls if call.key() not in ledger] if len(ledger) else calls
        verdicts = most_verdicts
        found = len(calls) - len(asked)
        if not asked:
            found = 0
            try:
                await maker.make(prompt)
                verdicts = 0
            except _NotFinished:
                verdicts = max(0, most_verdicts - (found - len(calls)))
        finished += found
        answers_left += len(asked)
        verdicts_left += verdicts
        prompt_tokens = _most_tokens(prompt.as_messages())
        rows += [usage_of(settings, call.model, "answers", 1, prompt_tokens, settings.max_tokens) for call in asked]
        if verdicts:
            once = _most_tokens(comparison(prompt.messages, "", "", settings.rubric)) + 2 * settings.max_tokens
            again = once + settings.judge_max_tokens + 10 * _TEMPLATE_TOKENS
            limit = 2 * settings.judge_max_tokens
            rows.append(
                usage_of(settings, judge_model, "verdicts", verdicts, verdicts * (once + again), verdicts * limit)
            )
        rows = list(merge(rows))
    return Planned(
        answers=settings.answers * len(prompts),
        verdicts=most_verdicts * len(prompts),
        finished=finished,
        calls=answers_left + verdicts_left,
        usage=tuple(rows),
    )


def _most_tokens(messages: Sequence[Mapping[str, str]]) -> int:
    """Returns a bound of the tokens: none is shorter than a byte."""
    return sum(len(message["content"].encode()) + _TEMPLATE_TOKENS for message in messages)
