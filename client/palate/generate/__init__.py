"""Generates preference pairs from prompts: estimates the cost, lets models answer and a judge compare. Knows no engine.

Every response is recorded in the ledger next to the output (`OUT.ledger.jsonl`); the output is written from it at the end,
atomically. So the same call resumes after any interruption: finished calls are not sent again, calls in flight are.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from palate.generate.chat_client import Call, ChatClient
from palate.generate.completion_log import CompletionLog, Reply
from palate.generate.judge import comparison, most_comparisons
from palate.generate.pairs import Maker, Outcome, PairSettings, Usage, merge, usage_of
from palate.generate.prompts import Prompt, as_prompts, with_system
from palate.generate.running import TEMPLATE_TOKENS, in_parallel, most_tokens, run_to_end
from palate_recipes.errors import ConfigurationError, DataError, EndpointError

_SHOWN_FAILURES = 5

Prompts = str | Path | Iterable[str | Sequence[Mapping[str, str]]]


@dataclass(frozen=True, kw_only=True)
class GenerationProgress:
    """Progress of a run, after each prompt."""

    prompts: int
    done: int
    pairs: int
    asked: int
    """Calls sent by this run."""
    tokens: int
    cost: float | None


@dataclass(frozen=True, kw_only=True)
class Generated:
    """Result of a run: `pairs + ties + same + cut + failed == prompts`.

    Attributes:
        output: The file with the pairs.
        ledger: The file with all finished calls.
        prompts: Distinct prompts.
        pairs: Prompts with a pair.
        ties: Prompts for which no comparison had two agreeing verdicts.
        same: Prompts with identical answers.
        cut: Prompts with fewer than two complete answers: the others were empty or cut at `max_tokens`.
        failed: Prompts with a failed call; the next run sends those calls again.
        repeated_prompts: Duplicate prompts that were skipped.
        disagreements: Comparisons whose verdict changed when the answers were swapped.
        unreadable: Verdicts that could not be parsed, even on the second try; they count as ties.
        asked: Calls sent by this run.
        reused: Calls taken from the ledger.
        usage: Tokens and cost of all calls behind the result, by model and role, including earlier runs.
        failures: Messages of the first few failed calls.
    """

    output: Path
    ledger: Path
    prompts: int
    pairs: int
    ties: int
    same: int
    cut: int
    failed: int
    repeated_prompts: int
    disagreements: int
    unreadable: int
    asked: int
    reused: int
    usage: tuple[Usage, ...]
    failures: tuple[str, ...]

    @property
    def tokens(self) -> int:
        return sum(row.prompt_tokens + row.completion_tokens for row in self.usage)

    @property
    def cost(self) -> float | None:
        """In the currency of the prices; None unless every model has a price."""
        return total_cost(self.usage)


@dataclass(frozen=True, kw_only=True)
class GenerationPlan:
    """Upper bounds of a run. Prompts count as one token per byte, answers as their token limit.

    Attributes:
        prompts: Distinct prompts.
        answers: Calls for answers, in total.
        verdicts: Calls for verdicts, in total, if no answers are identical and every verdict can be parsed.
        finished: Calls in the ledger.
        calls: Maximum remaining calls if every verdict can be parsed; each unreadable one adds a call.
        prompt_tokens: Maximum prompt tokens of the remaining calls, including unreadable verdicts.
        completion_tokens: Likewise for completion tokens.
        cost: Cost of those tokens; None unless every model has a price.
    """

    prompts: int
    answers: int
    verdicts: int
    finished: int
    calls: int
    prompt_tokens: int
    completion_tokens: int
    cost: float | None


def completion_log_path(output: str | Path) -> Path:
    """Returns the path of the ledger for an output file."""
    output = Path(output)
    return output.with_name(f"{output.name}.ledger.jsonl")


def plan_pairs(prompts: Prompts, *, output: str | Path, settings: PairSettings) -> GenerationPlan:
    """Estimates the calls of `generate_pairs`; sends no requests and writes nothing.

    Args:
        prompts: As for `generate_pairs`.
        output: The calls in its ledger count as finished.
        settings: As for `generate_pairs`.

    Raises:
        DataError, ConfigurationError: As for `generate_pairs`.
    """
    wanted, _ = _different(prompts, settings)
    with CompletionLog(completion_log_path(output), read_only=True) as ledger:
        counted = run_to_end(plan_calls(wanted, settings, ledger))
    return GenerationPlan(
        prompts=len(wanted),
        answers=counted.answers,
        verdicts=counted.verdicts,
        finished=counted.finished,
        calls=counted.calls,
        prompt_tokens=sum(row.prompt_tokens for row in counted.usage),
        completion_tokens=sum(row.completion_tokens for row in counted.usage),
        cost=total_cost(counted.usage),
    )


def generate_pairs(
    prompts: Prompts,
    *,
    output: str | Path,
    settings: PairSettings,
    progress: Callable[[GenerationProgress], None] | None = None,
) -> Generated:
    """Gets several answers to every prompt, compares them, and writes the best and the worst as preference pairs.

    Repeat the same call to resume after any interruption. The output is a JSONL file in the order of the prompts:
    `prompt` (a string, or messages), `chosen`, `rejected`, `chosen_model`, `rejected_model`, `votes`.

    Args:
        prompts: A file (see `read_prompts`), strings, or lists of messages.
        output: File for the pairs; the ledger is written next to it.
        settings: Answering models, judge and limits.
        progress: Called after each prompt.

    Returns:
        Counts, tokens, cost.

    Raises:
        DataError: The prompts cannot be read, or no pair was produced; then no output is written.
        ConfigurationError: The output exists without a ledger, or another process is writing it.
        EndpointError: An endpoint rejected a request or is unreachable; finished calls are kept.
    """
    output = Path(output)
    wanted, repeated = _different(prompts, settings)
    kept = completion_log_path(output)
    if output.exists() and not kept.exists():
        raise ConfigurationError(
            f"output {output} already exists without its ledger {kept.name}: use another output, or move it away"
        )
    with CompletionLog(kept) as ledger:
        known = len(ledger)
        outcomes = run_to_end(_make_all(wanted, settings, ledger, progress))
        asked = len(ledger) - known
        kinds = Counter(outcome.kind for outcome in outcomes)
        failures = [outcome.failure for outcome in outcomes if outcome.failure]
        usage = merge(row for outcome in outcomes for row in outcome.usage)
        result = Generated(
            output=output,
            ledger=kept,
            prompts=len(wanted),
            pairs=kinds["pair"],
            ties=kinds["tie"],
            same=kinds["same"],
            cut=kinds["cut"],
            failed=kinds["failed"],
            repeated_prompts=repeated,
            disagreements=sum(outcome.disagreements for outcome in outcomes),
            unreadable=sum(outcome.unreadable for outcome in outcomes),
            asked=asked,
            reused=sum(row.calls for row in usage) - asked,
            usage=usage,
            failures=tuple(failures[:_SHOWN_FAILURES]),
        )
        if not result.pairs:
            raise DataError(_none_came_out(result))
        _write(output, [outcome.row for outcome in outcomes if outcome.row is not None])
    return result


def total_cost(usage: Sequence[Usage]) -> float | None:
    """Returns the total cost; None unless all costs are known."""
    costs = [row.cost for row in usage if row.cost is not None]
    return sum(costs) if usage and len(costs) == len(usage) else None


async def _make_all(
    prompts: list[Prompt],
    settings: PairSettings,
    ledger: CompletionLog,
    progress: Callable[[GenerationProgress], None] | None,
) -> list[Outcome]:
    outcomes: dict[int, Outcome] = {}
    async with ChatClient(
        ledger,
        concurrency=settings.concurrency,
        requests_per_minute=settings.requests_per_minute,
        timeout_s=settings.timeout_s,
        retries=settings.retries,
        retry_wait_s=settings.retry_wait_s,
    ) as asker:
        maker = Maker(settings, asker.ask)
        waiting = iter(enumerate(prompts))
        pairs = 0
        so_far: tuple[Usage, ...] = ()

        async def work() -> None:
            nonlocal pairs, so_far
            for index, prompt in waiting:
                outcome = outcomes[index] = await maker.make(prompt)
                pairs += outcome.kind == "pair"
                so_far = merge([*so_far, *outcome.usage])
                if progress is not None:
                    progress(
                        GenerationProgress(
                            prompts=len(prompts),
                            done=len(outcomes),
                            pairs=pairs,
                            asked=asker.asked,
                            tokens=sum(row.prompt_tokens + row.completion_tokens for row in so_far),
                            cost=total_cost(so_far),
                        )
                    )

        try:
            await in_parallel(asker, work, workers=min(settings.concurrency, len(prompts)))
        except EndpointError as failure:
            raise _with_what_is_safe(failure, pairs, len(outcomes), len(prompts), ledger) from None
    return [outcomes[index] for index in range(len(prompts))]


def _with_what_is_safe(
    error: EndpointError, pairs: int, done: int, prompts: int, ledger: CompletionLog
) -> EndpointError:
    message = (
        f"{error}. Stopped with {done} of {prompts} prompts done: {pairs} pairs and {len(ledger)} finished calls are saved "
        f"in {ledger.path}; repeat the call to resume"
    )
    return EndpointError(message, endpoint=error.endpoint, model=error.model, status=error.status)


def _none_came_out(result: Generated) -> str:
    reasons = {
        "tied": (result.ties, "a stronger --judge-model, or answers that differ more"),
        "with identical answers": (result.same, "a higher --temperature, several --model"),
        "with cut or empty answers": (result.cut, "a higher --max-tokens, or --keep-cut"),
        "failed": (result.failed, "the same call again"),
    }
    shown = [f"{count} {what} (try {remedy})" for what, (count, remedy) in reasons.items() if count]
    first = f". First failure: {result.failures[0]}" if result.failures else ""
    return f"{result.prompts} prompts gave no pair, so {result.output} was not written: {'; '.join(shown)}{first}"


def _different(prompts: Prompts, settings: PairSettings) -> tuple[list[Prompt], int]:
    """Returns the distinct prompts up to the limit, and the number of duplicates."""
    given = [with_system(prompt, settings.system_prompt) for prompt in as_prompts(prompts)]
    different: dict[tuple[tuple[str, str], ...], Prompt] = {}
    for prompt in given:
        different.setdefault(prompt.messages, prompt)
    return list(different.values())[: settings.limit], len(given) - len(different)


def _write(output: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    draft = output.with_name(f".{output.name}.draft")
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(output)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise DataError(
            f"{output} cannot be written: {error.strerror}. Fix that and repeat the call: its finished calls are kept"
        ) from None


class Planned(NamedTuple):
    """Calls for all prompts: in total, finished, and remaining; `usage` is an upper bound of the remaining ones."""

    answers: int
    verdicts: int
    finished: int
    calls: int
    usage: tuple[Usage, ...]


class _NotFinished(Exception):
    pass


async def plan_calls(prompts: Sequence[Prompt], settings: PairSettings, ledger: CompletionLog) -> Planned:
    """Counts the calls for prompts by replaying the finished ones from the ledger."""
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
        prompt_tokens = most_tokens(prompt.as_messages())
        rows += [
            usage_of(settings.prices, call.model, "answers", 1, prompt_tokens, settings.max_tokens) for call in asked
        ]
        if verdicts:
            once = most_tokens(comparison(prompt.messages, "", "", settings.rubric)) + 2 * settings.max_tokens
            again = once + settings.judge_max_tokens + 10 * TEMPLATE_TOKENS
            limit = 2 * settings.judge_max_tokens
            rows.append(
                usage_of(
                    settings.prices, judge_model, "verdicts", verdicts, verdicts * (once + again), verdicts * limit
                )
            )
        rows = list(merge(rows))
    return Planned(
        answers=settings.answers * len(prompts),
        verdicts=most_verdicts * len(prompts),
        finished=finished,
        calls=answers_left + verdicts_left,
        usage=tuple(rows),
    )
