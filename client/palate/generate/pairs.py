"""Makes one pair from one prompt: the calls, the choice among the answers, the cost. Sends no requests itself."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple

from palate.generate.chat_client import Call, CallFailed, Endpoint
from palate.generate.completion_log import Reply
from palate.generate.judge import RUBRIC, choose, together
from palate.generate.prompts import Prompt
from palate.generate.verdicts import CUT, Judge
from palate_recipes.errors import ConfigurationError

_MOST_ANSWERS = 64
_NO_ANSWER = {"content_filter", "tool_calls", "function_call", "error", "abort"}
"""Finish reasons of responses that are not answers. All but these and `CUT` are complete answers."""

REQUEST_BOUNDS: Mapping[str, tuple[float, float]] = {
    "max_tokens": (1, 1_000_000),
    "judge_max_tokens": (1, 1_000_000),
    "limit": (1, 1_000_000_000),
    "concurrency": (1, 1000),
    "requests_per_minute": (0.001, 1_000_000),
    "timeout_s": (0.001, 86_400),
    "retries": (0, 100),
    "retry_wait_s": (0.001, 30),
}
"""Bounds of the settings that every run with a judge has."""
_BOUNDS = {"n": (1, _MOST_ANSWERS), **REQUEST_BOUNDS}


@dataclass(frozen=True, kw_only=True)
class PairSettings:
    """Settings of the answering models, the judge and the requests.

    Raises:
        ConfigurationError: A value is out of range, or the answers to a prompt would all be identical.
    """

    endpoint: Endpoint
    """Endpoint for answers."""
    models: Sequence[str]
    """Models that answer."""
    temperatures: Sequence[float] = (1.0,)
    """Sampling temperatures, 0 to 2; each model answers at each."""
    n: int = 2
    """Answers per model and temperature; only one at temperature 0, where all would be identical."""
    system_prompt: str = ""
    """Prepended to conversations without a system message; becomes part of the pair's prompt."""
    max_tokens: int = 512
    """Maximum tokens of an answer."""
    keep_cut: bool = False
    """Whether to use answers cut at `max_tokens`. A model trained on them learns to stop in mid-sentence."""
    judge_endpoint: Endpoint | None = None
    """Default: `endpoint`."""
    judge_model: str | None = None
    """Default: the first of `models`; required with `judge_endpoint`."""
    judge_max_tokens: int = 512
    """Maximum tokens of a verdict, including its reasoning."""
    rubric: str = RUBRIC
    """Criteria for the better answer."""
    limit: int | None = None
    """Use only the first N prompts."""
    concurrency: int = 8
    """Maximum concurrent calls."""
    requests_per_minute: float | None = None
    """Rate limit per endpoint, including retries; None: no limit."""
    timeout_s: float = 300.0
    """Timeout of one request in seconds."""
    retries: int = 6
    """Maximum retries after transient failures."""
    retry_wait_s: float = 1.0
    """Seconds before the first retry; doubles up to 30."""
    prices: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Price per million prompt tokens and per million completion tokens, by model."""

    def __post_init__(self) -> None:
        check_bounds(self, _BOUNDS)
        object.__setattr__(self, "models", tuple(dict.fromkeys(self.models)))
        object.__setattr__(self, "temperatures", tuple(dict.fromkeys(float(value) for value in self.temperatures)))
        if not self.models or not all(self.models):
            raise ConfigurationError("models is empty: pass at least one model (--model) from the endpoint's /models")
        wrong = [value for value in self.temperatures if not 0 <= value <= 2]
        if wrong or not self.temperatures:
            raise ConfigurationError(
                f"temperatures={self.temperatures} is out of range: expected one or more values between 0 and 2"
            )
        if not 2 <= self.answers <= _MOST_ANSWERS:
            raise ConfigurationError(
                f"the number of answers per prompt is {self.answers} ({len(self.models)} models, temperatures "
                f"{', '.join(f'{value:g}' for value in self.temperatures)}, n={self.n}; at temperature 0 all are identical): "
                f"expected 2 to {_MOST_ANSWERS}. Change models, temperatures or n"
            )
        if self.judge_endpoint is not None and not self.judge_model:
            raise ConfigurationError(
                f"the judge at {self.judge_endpoint.base_url} has no model: pass judge_model (--judge-model)"
            )
        if not self.rubric.strip():
            raise ConfigurationError(
                "rubric is empty: describe what makes an answer better, or omit it for the default"
            )
        unknown = set(self.prices) - {*self.models, self.judge[1]}
        if unknown:
            raise ConfigurationError(
                f"prices has {', '.join(sorted(unknown))}, which is not used: expected only models that answer "
                f"({', '.join(self.models)}) or judge ({self.judge[1]})"
            )

    @property
    def answers(self) -> int:
        """Number of answers per prompt."""
        return len(self.models) * sum(self.n if value > 0 else 1 for value in self.temperatures)

    @property
    def judge(self) -> tuple[Endpoint, str]:
        return self.judge_endpoint or self.endpoint, self.judge_model or self.models[0]

    def answer_calls(self, prompt: Prompt) -> list[Call]:
        """Returns the calls for the answers to a prompt."""
        messages = prompt.as_messages()
        return [
            Call(self.endpoint, model, messages, temperature, self.max_tokens, sample, about=f"prompt {prompt.number}")
            for model in self.models
            for temperature in self.temperatures
            for sample in range(self.n if temperature > 0 else 1)
        ]


def check_bounds(settings: object, bounds: Mapping[str, tuple[float, float]]) -> None:
    """Raises ConfigurationError if a setting is out of its bounds; None passes."""
    for name, (low, high) in bounds.items():
        value = getattr(settings, name)
        if value is not None and not low <= value <= high:
            raise ConfigurationError(f"{name}={value!r} is out of range: expected {low:g} <= {name} <= {high:g}")


@dataclass(frozen=True)
class Usage:
    """Tokens and cost of a model's calls in one role."""

    model: str
    role: Literal["answers", "verdicts"]
    calls: int
    prompt_tokens: int
    completion_tokens: int
    without_usage: int
    """Calls for which the endpoint reported no tokens; the sums do not include them."""
    cost: float | None
    """In the currency of the prices; None without a price."""


def merge(rows: Iterable[Usage]) -> tuple[Usage, ...]:
    """Returns the sums by model and role, in order of first occurrence."""
    sums: dict[tuple[str, str], Usage] = {}
    counted = [item.name for item in fields(Usage) if item.name not in {"model", "role", "cost"}]
    for row in rows:
        before = sums.get((row.model, row.role))
        if before is not None:
            cost = None if row.cost is None or before.cost is None else row.cost + before.cost
            row = Usage(
                model=row.model,
                role=row.role,
                cost=cost,
                **{name: getattr(row, name) + getattr(before, name) for name in counted},
            )
        sums[row.model, row.role] = row
    return tuple(sums.values())


class Outcome(NamedTuple):
    """Result of one prompt."""

    kind: Literal["pair", "tie", "same", "cut", "failed"]
    usage: tuple[Usage, ...]
    row: dict[str, Any] | None = None
    disagreements: int = 0
    unreadable: int = 0
    failure: str = ""


@dataclass
class _Notes:
    """Usage and counts collected while one prompt is processed."""

    usage: list[Usage] = field(default_factory=list)
    disagreements: int = 0
    unreadable: int = 0

    def outcome(self, kind: Any, *, row: dict[str, Any] | None = None, failure: str = "") -> Outcome:
        return Outcome(kind, merge(self.usage), row, self.disagreements, self.unreadable, failure)


class Maker:
    """Makes pairs with a function that sends calls.

    Args:
        settings: Answering models, judge and limits.
        ask: Returns the response to a call; raises CallFailed if only that call failed.
    """

    def __init__(self, settings: PairSettings, ask: Callable[[Call], Awaitable[Reply]]) -> None:
        self._settings = settings
        self._ask = ask

    async def make(self, prompt: Prompt) -> Outcome:
        """Gets the answers to a prompt and compares them; returns the pair, or why there is none."""
        notes = _Notes()
        try:
            return await self._make(prompt, notes)
        except CallFailed as failure:
            return notes.outcome("failed", failure=str(failure))

    async def _make(self, prompt: Prompt, notes: _Notes) -> Outcome:
        calls = self._settings.answer_calls(prompt)
        replies = await together(*(self._noted(call, "answers", notes) for call in calls))
        whole = [
            (reply.text, call.model)
            for call, reply in zip(calls, replies, strict=True)
            if reply.text and reply.finish not in _NO_ANSWER and (reply.finish not in CUT or self._settings.keep_cut)
        ]
        different: dict[str, str] = {}
        for text, model in whole:
            different.setdefault(text, model)
        if len(different) < 2:
            return notes.outcome("same" if len(whole) > 1 else "cut")
        texts = list(different)

        async def compare(first: int, second: int) -> int | None:
            return await self._compare(prompt, texts, first, second, notes)

        choice = await choose(len(texts), compare)
        if choice is None:
            return notes.outcome("tie")
        chosen, rejected = texts[choice.chosen], texts[choice.rejected]
        row = {
            "prompt": prompt.messages[0][1] if prompt.is_text else prompt.as_messages(),
            "chosen": chosen,
            "rejected": rejected,
            "chosen_model": different[chosen],
            "rejected_model": different[rejected],
            "votes": {"chosen": choice.chosen_wins, "rejected": choice.rejected_wins, "decided": choice.decided},
        }
        return notes.outcome("pair", row=row)

    async def _compare(
        self, prompt: Prompt, texts: Sequence[str], first: int, second: int, notes: _Notes
    ) -> int | None:
        endpoint, model = self._settings.judge
        judge = Judge(endpoint, model, self._settings.rubric, self._settings.judge_max_tokens)

        async def ask(call: Call) -> Reply:
            return await self._noted(call, "verdicts", notes)

        verdicts = await judge.compare(
            ask, prompt.messages, texts[first], texts[second], about=f"prompt {prompt.number}"
        )
        notes.unreadable += verdicts.unreadable
        notes.disagreements += verdicts.result == "disagreement"
        return {"first": first, "second": second}.get(verdicts.result)

    async def _noted(self, call: Call, role: Literal["answers", "verdicts"], notes: _Notes) -> Reply:
        reply = await self._ask(call)
        known = reply.prompt_tokens is not None and reply.completion_tokens is not None
        notes.usage.append(
            usage_of(
                self._settings.prices,
                call.model,
                role,
                1,
                reply.prompt_tokens or 0,
                reply.completion_tokens or 0,
                int(not known),
            )
        )
        return reply


def usage_of(
    prices: Mapping[str, tuple[float, float]],
    model: str,
    role: Literal["answers", "verdicts"],
    calls: int,
    prompt_tokens: int,
    completion_tokens: int,
    without_usage: int = 0,
) -> Usage:
    """Returns tokens with their cost, if the model has a price."""
    price = prices.get(model)
    cost = None if price is None else (prompt_tokens * price[0] + completion_tokens * price[1]) / 1e6
    return Usage(model, role, calls, prompt_tokens, completion_tokens, without_usage, cost)
