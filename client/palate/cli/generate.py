"""`palate data generate`: preference pairs from prompts, with any OpenAI-compatible endpoint. The work is in `palate.generate`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from palate.cli.format import EXAMPLE_MODEL, ProgressLine, Terminated, say_next
from palate_recipes.errors import ConfigurationError

if TYPE_CHECKING:
    from palate.generate import Generated, GenerationPlan, GenerationProgress
    from palate.generate.chat_client import Endpoint
    from palate.generate.pairs import PairSettings


def generate(
    prompts: Annotated[
        Path,
        typer.Argument(
            help="Text file (one prompt per line), JSON or JSONL with `prompt` or `messages`, or CSV with `prompt`."
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="JSONL file for the pairs; the ledger is written next to it.")
    ],
    model: Annotated[
        list[str] | None, typer.Option(help="Model that answers; repeat for more. Default with --service: default.")
    ] = None,
    temperature: Annotated[
        list[float] | None, typer.Option(help="Sampling temperature; repeat for more. Default: 1.")
    ] = None,
    n: Annotated[int, typer.Option("-n", help="Answers per model and temperature.")] = 2,
    system: Annotated[str, typer.Option(help="System prompt for conversations without one.")] = "",
    max_tokens: Annotated[int, typer.Option(help="Maximum tokens of an answer.")] = 512,
    keep_cut: Annotated[bool, typer.Option("--keep-cut", help="Also use answers cut at --max-tokens.")] = False,
    service: Annotated[str | None, typer.Option(help="Running Palate service that answers.")] = None,
    base_url: Annotated[
        str | None, typer.Option(help="Any other endpoint that answers. Default: OPENAI_BASE_URL.")
    ] = None,
    api_key_env: Annotated[
        str | None, typer.Option(help="Environment variable with the key. Default: OPENAI_API_KEY.")
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="Model that judges. Default: the first --model.")] = None,
    judge_service: Annotated[str | None, typer.Option(help="Running Palate service that judges.")] = None,
    judge_base_url: Annotated[
        str | None, typer.Option(help="Any other endpoint that judges. Default: the one that answers.")
    ] = None,
    judge_api_key_env: Annotated[str | None, typer.Option(help="Environment variable with the judge's key.")] = None,
    judge_max_tokens: Annotated[int, typer.Option(help="Maximum tokens of a verdict, reasoning included.")] = 512,
    rubric: Annotated[Path | None, typer.Option(help="Text file that defines what makes an answer better.")] = None,
    limit: Annotated[int | None, typer.Option(help="Use only the first N prompts.")] = None,
    concurrency: Annotated[int, typer.Option(help="Maximum concurrent calls.")] = 8,
    requests_per_minute: Annotated[float | None, typer.Option(help="Rate limit per endpoint.")] = None,
    timeout: Annotated[float, typer.Option(help="Timeout of one request in seconds.")] = 300.0,
    price: Annotated[
        list[str] | None,
        typer.Option(metavar="MODEL=IN,OUT", help="Price per million prompt and completion tokens; repeat for more."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Estimate calls, tokens and cost without sending any request.")
    ] = False,
) -> None:
    """Generate preference pairs with models and a judge.

    Models answer, the judge compares each two answers twice, and the best and the worst become a pair.
    """
    from palate.generate import generate_pairs, plan_pairs
    from palate.generate.judge import RUBRIC
    from palate.generate.pairs import PairSettings
    from palate_recipes.errors import EndpointError

    settings = PairSettings(
        endpoint=_endpoint(service, base_url, api_key_env),
        models=model or (["default"] if service else []),
        temperatures=temperature or [1.0],
        n=n,
        system_prompt=system,
        max_tokens=max_tokens,
        keep_cut=keep_cut,
        judge_endpoint=_judge(judge_service, judge_base_url, judge_api_key_env),
        judge_model=judge_model or ("default" if judge_service else None),
        judge_max_tokens=judge_max_tokens,
        rubric=_text(rubric) if rubric else RUBRIC,
        limit=limit,
        concurrency=concurrency,
        requests_per_minute=requests_per_minute,
        timeout_s=timeout,
        prices=prices_of(price or []),
    )
    plan = plan_pairs(prompts, output=output, settings=settings)
    command = sys.argv[1:]
    if dry_run:
        _print_plan(plan, settings)
        say_next(*(word for word in command if word != "--dry-run"))
        return
    print(
        f"{plan.prompts} prompts: up to {plan.calls} calls ({plan.finished} already finished), "
        f"up to {plan.prompt_tokens + plan.completion_tokens:,} tokens{_money(plan.cost)}",
        file=sys.stderr,
    )
    news = _News()
    try:
        result = generate_pairs(prompts, output=output, settings=settings, progress=news)
    except EndpointError as error:
        news.end()  # here, because `finally` would run after the message
        print(f"error: {error}", file=sys.stderr)
        say_next(*command)
        raise typer.Exit(1) from None
    except KeyboardInterrupt as interrupt:
        news.end()
        print("interrupted; finished calls are kept", file=sys.stderr)
        say_next(*command)
        raise typer.Exit(143 if isinstance(interrupt, Terminated) else 130) from None
    finally:
        news.end()
    _print_result(result)
    print(result.output)
    say_next("train", result.output, "--model", EXAMPLE_MODEL)


def _endpoint(service: str | None, base_url: str | None, api_key_env: str | None) -> Endpoint:
    from palate.generate.chat_client import Endpoint

    if service:
        if base_url or api_key_env:
            raise ConfigurationError("--service has its own address and token: omit --base-url and --api-key-env")
        return Endpoint.of_service(service)
    return Endpoint.from_environment(base_url, api_key_env)


def _judge(service: str | None, base_url: str | None, api_key_env: str | None) -> Endpoint | None:
    from palate.generate.chat_client import Endpoint

    if service:
        if base_url or api_key_env:
            raise ConfigurationError(
                "--judge-service has its own address and token: omit --judge-base-url and --judge-api-key-env"
            )
        return Endpoint.of_service(service)
    if base_url:
        return Endpoint.other(base_url, api_key_env)
    if api_key_env:
        raise ConfigurationError(
            f"--judge-api-key-env {api_key_env} requires --judge-base-url: pass the judge's endpoint"
        )
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"--rubric {path} cannot be read: {error}. Pass a UTF-8 text file") from None


def prices_of(entries: list[str]) -> dict[str, tuple[float, float]]:
    """Parses a repeated option MODEL=IN,OUT."""
    prices = {}
    for entry in entries:
        name, _, value = entry.rpartition("=")
        try:
            prompt_price, completion_price = (float(part) for part in value.split(","))
            if not name or not 0 <= prompt_price < float("inf") or not 0 <= completion_price < float("inf"):
                raise ValueError
        except ValueError:
            raise ConfigurationError(
                f"--price: expected MODEL=IN,OUT with two prices per million tokens, such as small-model=0.15,0.60, got {entry!r}"
            ) from None
        prices[name] = (prompt_price, completion_price)
    return prices


def _money(cost: float | None) -> str:
    return "" if cost is None else f", cost {cost:.4f}"


def _print_plan(plan: GenerationPlan, settings: PairSettings) -> None:
    from palate.ui.terminal import print_table

    rows: list[tuple[str, object]] = [
        ("prompts", plan.prompts),
        (f"calls for answers, {settings.answers} per prompt", plan.answers),
        (f"calls for verdicts, up to {plan.verdicts // plan.prompts} per prompt", plan.verdicts),
        ("finished calls", plan.finished),
        ("remaining calls, maximum", plan.calls),
        ("prompt tokens, maximum", plan.prompt_tokens),
        ("completion tokens, maximum", plan.completion_tokens),
    ]
    if plan.cost is not None:
        rows.append(("cost, maximum", f"{plan.cost:.4f}"))
    print_table(("what", "number"), rows)
    print("an unreadable verdict takes one more call; the maximum tokens include it", file=sys.stderr)


def _print_result(result: Generated) -> None:
    say = [
        f"{result.pairs} pairs from {result.prompts} prompts",
        f"no pair: {result.ties} tied, {result.same} with identical answers, {result.cut} cut or empty, {result.failed} failed",
        f"verdicts: {result.disagreements} comparisons changed when swapped, {result.unreadable} unreadable",
        f"calls: {result.asked} sent, {result.reused} taken from {result.ledger}",
    ]
    if result.repeated_prompts:
        say.append(f"{result.repeated_prompts} duplicate prompts were skipped")
    for row in result.usage:
        unknown = f" ({row.without_usage} calls without usage)" if row.without_usage else ""
        say.append(
            f"{row.model}, {row.calls} {row.role}: {row.prompt_tokens:,} prompt tokens, "
            f"{row.completion_tokens:,} completion tokens{unknown}{_money(row.cost)}"
        )
    if result.cost is not None:
        say.append(f"cost of all calls: {result.cost:.4f}")
    say += [f"failed: {failure}" for failure in result.failures]
    if result.failed:
        say.append("run the same command again to retry the failed calls")
    print("\n".join(say), file=sys.stderr)


class _News(ProgressLine):
    def __init__(self) -> None:
        super().__init__()
        self._begun = time.monotonic()

    def __call__(self, progress: GenerationProgress) -> None:
        is_last = progress.done == progress.prompts

        def line() -> str:
            left_s = (time.monotonic() - self._begun) / progress.done * (progress.prompts - progress.done)
            return (
                f"{progress.done}/{progress.prompts} prompts  {progress.pairs} pairs  {progress.asked} calls  "
                f"{progress.tokens:,} tokens{_money(progress.cost)}" + ("" if is_last else f"  {left_s:.0f} s left")
            )

        self.show(line, is_last=is_last)
