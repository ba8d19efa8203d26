"""Lets models answer the same prompts and a judge compare their answers; counts and estimates the calls. Knows no service.

Every response is recorded in a ledger (`palate.generate.completion_log`), so that what was asked once is not asked again.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, NamedTuple

from palate.evaluation.record import Agreement, Comparison, Contestant, Figure
from palate.evaluation.statistics import cohens_kappa, length_controlled, win_rate
from palate.generate.chat_client import Call, CallFailed, ChatClient, Endpoint
from palate.generate.completion_log import CompletionLog, Reply
from palate.generate.judge import RUBRIC, asked_again, comparison
from palate.generate.pairs import REQUEST_BOUNDS, Usage, check_bounds, merge, usage_of
from palate.generate.prompts import Prompt
from palate.generate.running import TEMPLATE_TOKENS, in_parallel, most_tokens, run_to_end
from palate.generate.verdicts import CUT, Judge, Verdicts
from palate_recipes.errors import ConfigurationError, DataError

_BOUNDS = {**REQUEST_BOUNDS, "temperature": (0, 2), "seed": (0, 2**63 - 1)}
_RESULTS = {"first": "A", "second": "B", "tie": "tie", "disagreement": "flip"}
"""Results of a comparison as rows have them."""
_SCORES = {"A": 1.0, "B": 0.0}

_SHOWN_START, _SHOWN_END = 120, 80
"""Characters of a judge's reply in an error: the verdict is missing at the end."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """Settings of the answers, the judge and the requests.

    Raises:
        ConfigurationError: A value is out of range.
    """

    judge_endpoint: Endpoint | None = None
    """Endpoint of the judge; None: answers are not judged."""
    judge_model: str = ""
    """Model name of the judge."""
    judge_max_tokens: int = 512
    """Maximum tokens of a verdict, including its reasoning."""
    rubric: str = RUBRIC
    """Criteria for the better answer."""
    system_prompt: str = ""
    """Prepended to conversations without a system message."""
    max_tokens: int = 512
    """Maximum tokens of an answer."""
    temperature: float = 0.0
    """Sampling temperature of the answers, 0 to 2; 0 takes the most likely token."""
    limit: int | None = None
    """Use only the first N prompts."""
    concurrency: int = 8
    """Maximum concurrent calls."""
    requests_per_minute: float | None = None
    """Rate limit of the judge, including retries; None: no limit."""
    timeout_s: float = 300.0
    """Timeout of one request in seconds."""
    retries: int = 6
    """Maximum retries after transient failures."""
    retry_wait_s: float = 1.0
    """Seconds before the first retry; doubles up to 30."""
    prices: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Price per million prompt tokens and per million completion tokens of the judge's model."""
    seed: int = 0
    """Of the intervals."""

    def __post_init__(self) -> None:
        check_bounds(self, _BOUNDS)
        if not self.rubric.strip():
            raise ConfigurationError(
                "rubric is empty: describe what makes an answer better, or omit it for the default"
            )
        if unknown := set(self.prices) - {self.judge_model}:
            raise ConfigurationError(
                f"prices has {', '.join(sorted(unknown))}, which is not used: expected only the judge's model "
                f"({self.judge_model or 'there is none'})"
            )

    @property
    def judge(self) -> Judge:
        assert self.judge_endpoint is not None
        return Judge(self.judge_endpoint, self.judge_model, self.rubric, self.judge_max_tokens)


@dataclass(frozen=True, kw_only=True)
class EvaluationProgress:
    """Progress of a run, after each prompt of a step.

    Attributes:
        step: `answers` or `verdicts`.
        done: Answers, or comparisons, that are finished.
        total: All of them.
        asked: Calls sent in this step.
    """

    step: str
    done: int
    total: int
    asked: int


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """Upper bounds of an evaluation. Prompts count as one token per byte, answers and verdicts as their token limits.

    Attributes:
        prompts: Distinct prompts.
        models: Names of the models.
        answers: Calls for answers, in total.
        verdicts: Calls for verdicts, in total, if no answers are identical and every verdict can be parsed.
        finished: Calls that earlier runs have finished.
        calls: Maximum remaining calls: each verdict that cannot be parsed is asked for a second time.
        prompt_tokens: Maximum prompt tokens of the judge's remaining calls, including unreadable verdicts.
        completion_tokens: Likewise for completion tokens.
        cost: Cost of those tokens; None without a price.
        pairs: Held-out pairs that are scored; None without data.
    """

    prompts: int
    models: tuple[str, ...]
    answers: int
    verdicts: int
    finished: int
    calls: int
    prompt_tokens: int
    completion_tokens: int
    cost: float | None
    pairs: int | None = None


class Weights(NamedTuple):
    """A model that takes part, as the ledger knows it."""

    name: str
    identity: str
    """Digest of what its answers depend on besides the call."""


class Seat(NamedTuple):
    """Where a model answers: an endpoint, and its name there."""

    endpoint: Endpoint
    model: str


class Labelled(NamedTuple):
    """Two answers of which a person has said which is better: A, B or tie."""

    number: int
    conversation: tuple[tuple[str, str], ...]
    first: str
    second: str
    label: str


Answers = Mapping[tuple[str, int], Reply]
"""Answers by model and position of the prompt."""

_NOWHERE = "http://none.invalid/v1"
"""Base URL of calls that are only looked up."""


def answer_call(weights: Weights, prompt: Prompt, settings: EvaluationSettings, seat: Seat | None = None) -> Call:
    """Returns the call for a model's answer to a prompt. Its key depends on the weights, and on no service."""
    endpoint = Endpoint(_NOWHERE) if seat is None else seat.endpoint
    known = Endpoint(
        endpoint.base_url, endpoint.api_key, endpoint.key_source, weights.identity, is_service=endpoint.is_service
    )
    about = f"{weights.name}, prompt {prompt.number}"
    name = seat.model if seat else weights.name
    return Call(
        known,
        name,
        prompt.as_messages(),
        settings.temperature,
        settings.max_tokens,
        about=about,
        as_model="weights",
    )


def missing_answers(
    models: Sequence[Weights], prompts: Sequence[Prompt], settings: EvaluationSettings, ledger: CompletionLog
) -> list[str]:
    """Returns the names of the models that have not answered all prompts."""
    return [
        one.name for one in models if any(answer_call(one, prompt, settings).key() not in ledger for prompt in prompts)
    ]


def collect_answers(
    seats: Mapping[Weights, Seat],
    prompts: Sequence[Prompt],
    settings: EvaluationSettings,
    ledger: CompletionLog,
    progress: Callable[[EvaluationProgress], None] | None,
) -> dict[str, str]:
    """Asks models for their answers, all at the same time; the ledger has them afterwards.

    Returns:
        Messages of the failed calls, by what they were about.

    Raises:
        EndpointError: An endpoint rejected a request or is unreachable; finished calls are kept.
    """
    calls = [answer_call(one, prompt, settings, seat) for prompt in prompts for one, seat in seats.items()]
    failures: dict[str, str] = {}

    async def ask(client: ChatClient, call: Call) -> None:
        try:
            await client.ask(call)
        except CallFailed as failure:
            failures[call.about] = str(failure)

    run_to_end(_through(calls, ask, "answers", settings, ledger, progress, rate=None))
    return failures


def read_answers(
    models: Sequence[Weights], prompts: Sequence[Prompt], settings: EvaluationSettings, ledger: CompletionLog
) -> dict[tuple[str, int], Reply]:
    """Returns the answers in the ledger."""
    found = {}
    for one in models:
        for at, prompt in enumerate(prompts):
            reply = ledger.get(answer_call(one, prompt, settings).key())
            if reply is not None:
                found[one.name, at] = reply
    return found


def answer_usage(models: Sequence[Weights], answers: Answers) -> Iterator[Usage]:
    """Yields the tokens of each model's answers."""
    for weights in models:
        own = [reply for (name, _), reply in answers.items() if name == weights.name]
        prompt_tokens = sum(reply.prompt_tokens or 0 for reply in own)
        completion_tokens = sum(reply.completion_tokens or 0 for reply in own)
        if own:
            yield usage_of({}, weights.name, "answers", len(own), prompt_tokens, completion_tokens)


class Compared(NamedTuple):
    """One prompt, with the answers of two models and what the judge says."""

    first: str
    second: str
    at: int
    result: str
    """A, B, tie, flip, same, or failed."""
    verdicts: Verdicts | None = None


def judge_answers(
    names: Sequence[str],
    answers: Answers,
    prompts: Sequence[Prompt],
    settings: EvaluationSettings,
    ledger: CompletionLog,
    progress: Callable[[EvaluationProgress], None] | None,
) -> tuple[list[Compared], list[Usage], list[str]]:
    """Compares the answers of every two models to every prompt.

    Returns:
        The comparisons in the order of models and prompts, the judge's tokens, and the messages of failed calls.

    Raises:
        EndpointError: The judge rejected a request or is unreachable; finished calls are kept.
    """
    tasks = [(first, second, at) for first, second in combinations(names, 2) for at in range(len(prompts))]
    done: dict[tuple[str, str, int], Compared] = {}
    usage: list[Usage] = []
    failures: list[str] = []
    judge = settings.judge

    async def compare(client: ChatClient, task: tuple[str, str, int]) -> None:
        first, second, at = task
        one, other = answers.get((first, at)), answers.get((second, at))
        if one is None or other is None:
            done[task] = Compared(first, second, at, "failed")
            return
        if one.text == other.text:
            done[task] = Compared(first, second, at, "same")
            return
        ask = _counted(client.ask, settings, usage)
        prompt = prompts[at]
        try:
            verdicts = await judge.compare(
                ask, prompt.messages, one.text, other.text, about=f"prompt {prompt.number}, {first} and {second}"
            )
        except CallFailed as failure:
            failures.append(str(failure))
            done[task] = Compared(first, second, at, "failed")
            return
        done[task] = Compared(first, second, at, _RESULTS[verdicts.result], verdicts)

    run_to_end(_through(tasks, compare, "verdicts", settings, ledger, progress, rate=settings.requests_per_minute))
    return [done[task] for task in tasks], list(merge(usage)), failures


def check_readable(
    compared: Sequence[Compared],
    answers: Answers,
    prompts: Sequence[Prompt],
    settings: EvaluationSettings,
    ledger: CompletionLog,
) -> None:
    """Raises DataError if the judge gave no readable verdict in either order on more than half of what it judged.

    All of these are ties, so the figures would be those of two equal models.
    """
    judged = [one for one in compared if one.verdicts is not None]
    silent = [one for one in judged if one.verdicts is not None and one.verdicts.unreadable == 2]
    if 2 * len(silent) <= len(judged):
        return
    one, judge = silent[0], settings.judge
    texts = answers[one.first, one.at].text, answers[one.second, one.at].text
    messages = comparison(prompts[one.at].messages, *texts, judge.rubric)
    reply = ledger.get(_question(judge, messages).key())
    assert reply is not None  # it was asked
    if reply.finish in CUT:
        remedy = f"It was cut at judge_max_tokens={judge.max_tokens}: raise that"
    else:
        remedy = "Use another judge, or a rubric that asks for A, B or tie alone on the last line"
    shown = reply.text.strip()
    shown = f"{shown[:_SHOWN_START]} … {shown[-_SHOWN_END:]}" if len(shown) > _SHOWN_START + _SHOWN_END else shown
    raise DataError(
        f"judge {settings.judge_model} cannot be read: {len(silent)} of {len(judged)} comparisons have no verdict in either order. "
        f"No win-rate was computed and nothing was recorded. Its first reply: {shown!r}. {remedy}"
    )


def judge_labels(
    rows: Sequence[Labelled], settings: EvaluationSettings, ledger: CompletionLog
) -> tuple[Agreement, list[Usage]]:
    """Lets the judge compare answers that people have labelled. Returns the agreement and the judge's tokens.

    A flip counts as a tie. Rows whose call failed are left out.
    """
    found: dict[int, str] = {}
    usage: list[Usage] = []
    judge = settings.judge

    async def compare(client: ChatClient, at: int) -> None:
        row = rows[at]
        ask = _counted(client.ask, settings, usage)
        try:
            verdicts = await judge.compare(
                ask, row.conversation, row.first, row.second, about=f"labelled row {row.number}"
            )
        except CallFailed:
            return
        found[at] = {"first": "A", "second": "B"}.get(verdicts.result, "tie")

    run_to_end(
        _through(list(range(len(rows))), compare, "labels", settings, ledger, None, rate=settings.requests_per_minute)
    )
    said, given = list(found.values()), [rows[at].label for at in found]
    agreed = sum(one == other for one, other in zip(said, given, strict=True))
    return Agreement(rows=len(found), agreed=agreed, kappa=cohens_kappa(said, given)), list(merge(usage))


def figures(
    compared: Sequence[Compared], answers: Answers, *, first: str, second: str, seed: int
) -> tuple[Comparison, list[float]] | None:
    """Returns the figures of two models and the score of each prompt; None if no prompt could be compared."""
    own = [one for one in compared if (one.first, one.second) == (first, second)]
    counted = [one for one in own if one.result != "failed"]
    if not counted:
        return None
    results = [one.result for one in counted]
    scores = [_SCORES.get(result, 0.5) for result in results]
    differences = [len(answers[first, one.at].text) - len(answers[second, one.at].text) for one in counted]
    controlled = length_controlled(scores, differences, seed=seed)
    wins, losses = results.count("A"), results.count("B")
    made = Comparison(
        first=first,
        second=second,
        prompts=len(counted),
        wins=wins,
        losses=losses,
        ties=len(counted) - wins - losses,
        flips=results.count("flip"),
        same=results.count("same"),
        unreadable=sum(one.verdicts.unreadable for one in counted if one.verdicts),
        failed=len(own) - len(counted),
        win_rate=Figure.of(win_rate(scores, seed=seed)),
        length_controlled=None if controlled is None else Figure.of(controlled),
    )
    return made, scores


def contestant(given: Contestant, answers: Answers, prompts: int) -> Contestant:
    """Returns a model with the facts of its answers."""
    from msgspec.structs import replace

    own = [answers[given.name, at] for at in range(prompts) if (given.name, at) in answers]
    return replace(
        given,
        answers=len(own),
        cut=sum(reply.finish in CUT for reply in own),
        empty=sum(not reply.text for reply in own),
        failed=prompts - len(own),
        mean_length=sum(len(reply.text) for reply in own) / len(own) if own else 0.0,
    )


def plan(
    models: Sequence[Weights],
    prompts: Sequence[Prompt],
    labels: Sequence[Labelled],
    settings: EvaluationSettings,
    ledger: CompletionLog,
) -> EvaluationPlan:
    """Counts the calls of an evaluation by replaying the finished ones from the ledger; sends none."""
    answers = read_answers(models, prompts, settings, ledger)
    wanted = len(models) * len(prompts)
    names = [one.name for one in models]
    pairs = [(first, second, at) for first, second in combinations(names, 2) for at in range(len(prompts))]
    finished = len(answers)
    open_calls = prompt_tokens = 0
    asks = settings.judge_endpoint is not None
    for first, second, at in pairs if asks else ():
        one, other = answers.get((first, at)), answers.get((second, at))
        if one is not None and other is not None and one.text == other.text:
            continue
        texts = ("", "") if one is None or other is None else (one.text, other.text)
        room = 2 * settings.max_tokens if one is None or other is None else 0
        done, left, most = _look_up(prompts[at].messages, texts, settings, ledger, known=not room)
        finished += done
        open_calls += left
        prompt_tokens += left * (most + room)
    for row in labels if asks else ():
        done, left, most = _look_up(row.conversation, (row.first, row.second), settings, ledger, known=True)
        finished += done
        open_calls += left
        prompt_tokens += left * most
    # The second question of two has what the judge said before.
    prompt_tokens += (open_calls + 1) // 2 * (settings.judge_max_tokens + 10 * TEMPLATE_TOKENS)
    completion_tokens = open_calls * settings.judge_max_tokens
    spent = usage_of(settings.prices, settings.judge_model, "verdicts", open_calls, prompt_tokens, completion_tokens)
    return EvaluationPlan(
        prompts=len(prompts),
        models=tuple(names),
        answers=wanted,
        verdicts=2 * (len(pairs) + len(labels)) if asks else 0,
        finished=finished,
        calls=wanted - len(answers) + open_calls,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        cost=spent.cost,
    )


def rows_of(compared: Sequence[Compared], answers: Answers, prompts: Sequence[Prompt]) -> Iterator[dict[str, Any]]:
    """Yields the comparisons as rows."""
    for one in compared:
        if one.result == "failed":
            continue
        prompt = prompts[one.at]
        yield {
            "prompt": prompt.messages[0][1] if prompt.is_text else prompt.as_messages(),
            "model_a": one.first,
            "model_b": one.second,
            "answer_a": answers[one.first, one.at].text,
            "answer_b": answers[one.second, one.at].text,
            "verdicts": list(one.verdicts) if one.verdicts else [],
            "result": one.result,
            "label": "",
        }


def _look_up(
    conversation: Sequence[tuple[str, str]],
    texts: tuple[str, str],
    settings: EvaluationSettings,
    ledger: CompletionLog,
    *,
    known: bool,
) -> tuple[int, int, int]:
    """Returns how many calls for the two verdicts are in the ledger, how many may be left, and the most tokens of one prompt."""
    judge = settings.judge
    done = left = most = 0
    for first, second in (texts, texts[::-1]):
        messages = comparison(conversation, first, second, judge.rubric)
        most = max(most, most_tokens(messages))
        reply = ledger.get(_question(judge, messages).key()) if known else None
        if reply is None:
            left += 2
        elif judge.verdict_in(reply) is not None:
            done += 1
        else:
            messages = asked_again(messages, reply.text)
            most = max(most, most_tokens(messages))
            again = _question(judge, messages, 1).key() in ledger
            done += 1 + again
            left += not again
    return done, left, most


def _question(judge: Judge, messages: list[dict[str, str]], attempt: int = 0) -> Call:
    """Returns the call for a verdict, to be looked up in the ledger."""
    return Call(judge.endpoint, judge.model, messages, 0.0, judge.max_tokens, attempt)


def _counted(
    ask: Callable[[Call], Awaitable[Reply]], settings: EvaluationSettings, usage: list[Usage]
) -> Callable[[Call], Awaitable[Reply]]:
    async def asked(call: Call) -> Reply:
        reply = await ask(call)
        told = reply.prompt_tokens is not None and reply.completion_tokens is not None
        tokens = (reply.prompt_tokens or 0, reply.completion_tokens or 0)
        usage[:] = merge([*usage, usage_of(settings.prices, call.model, "verdicts", 1, *tokens, int(not told))])
        return reply

    return asked


async def _through(
    tasks: Sequence[Any],
    work: Callable[[ChatClient, Any], Awaitable[None]],
    step: str,
    settings: EvaluationSettings,
    ledger: CompletionLog,
    progress: Callable[[EvaluationProgress], None] | None,
    *,
    rate: float | None,
) -> None:
    """Works through tasks, several at a time."""
    waiting = iter(tasks)
    done = 0
    async with ChatClient(
        ledger,
        concurrency=settings.concurrency,
        requests_per_minute=rate,
        timeout_s=settings.timeout_s,
        retries=settings.retries,
        retry_wait_s=settings.retry_wait_s,
    ) as client:

        async def worker() -> None:
            nonlocal done
            for task in waiting:
                await work(client, task)
                done += 1
                if progress is not None:
                    progress(EvaluationProgress(step=step, done=done, total=len(tasks), asked=client.asked))

        if tasks:
            await in_parallel(client, worker, workers=min(settings.concurrency, len(tasks)))
