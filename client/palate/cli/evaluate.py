"""`palate eval`: whether a tuned model is better. Knows arguments and output; the work is in `palate.evaluation`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from palate.cli.format import ProgressLine, Terminated, Wide, age, say_next
from palate.cli.generate import prices_of
from palate_recipes.errors import ConfigurationError, EndpointError
from palate_recipes.text import visible

if TYPE_CHECKING:
    from palate.evaluation.arena import EvaluationPlan, EvaluationProgress
    from palate.evaluation.result import Evaluation
    from palate.predictor import Predictor

_NOT_WORSE = 0.5
"""Win-rate of two equal models."""


def evaluate(
    jobs: Annotated[
        list[str],
        typer.Argument(
            metavar="JOB...", help="Job to evaluate, then further jobs on the same base, or JOB@CHECKPOINT."
        ),
    ],
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Prompts: text (one per line), JSON or JSONL with `prompt` or `messages`, CSV with `prompt`."
        ),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            metavar="URL/MODEL", help="Endpoint and model that judge; a model name alone uses OPENAI_BASE_URL."
        ),
    ] = None,
    judge_service: Annotated[str | None, typer.Option(help="Running Palate service that judges.")] = None,
    judge_api_key_env: Annotated[str | None, typer.Option(help="Environment variable with the judge's key.")] = None,
    judge_max_tokens: Annotated[int, typer.Option(help="Maximum tokens of a verdict, reasoning included.")] = 512,
    data: Annotated[
        str | None,
        typer.Option(help="Held-out preference data, as for train. Without --prompts, its prompts are answered."),
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(metavar="STEP", help="Evaluate a checkpoint of the first job: latest, or a step.")
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(help="Answers with people's labels; prints how far the judge agrees. See docs/evaluation.md."),
    ] = None,
    rubric: Annotated[Path | None, typer.Option(help="Text file that defines what makes an answer better.")] = None,
    system: Annotated[
        str | None, typer.Option(help="System prompt for conversations without one. Default: that of the training.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Maximum tokens of an answer.")] = 512,
    temperature: Annotated[float, typer.Option(help="Sampling temperature of the answers.")] = 0.0,
    limit: Annotated[int | None, typer.Option(help="Use only the first N prompts.")] = None,
    concurrency: Annotated[int, typer.Option(help="Maximum concurrent calls.")] = 8,
    requests_per_minute: Annotated[float | None, typer.Option(help="Rate limit of the judge.")] = None,
    timeout: Annotated[float, typer.Option(help="Timeout of one request in seconds.")] = 300.0,
    seed: Annotated[int, typer.Option(help="Seed of the intervals.")] = 0,
    price: Annotated[
        list[str] | None,
        typer.Option(metavar="MODEL=IN,OUT", help="Price of the judge per million prompt and completion tokens."),
    ] = None,
    service: Annotated[
        str | None, typer.Option(help="Running service with these models. Default: one is started and deleted.")
    ] = None,
    engine: Annotated[str, typer.Option(help="Engine of the started service: auto, vllm or transformers.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="Compute type of the started service: auto, bfloat16, float16 or float32.")
    ] = "auto",
    max_model_len: Annotated[int | None, typer.Option(help="Context length of the started service in tokens.")] = None,
    lm_eval: Annotated[
        list[str] | None, typer.Option(metavar="TASK", help="Also run a task of lm-eval on model and base; repeatable.")
    ] = None,
    rows: Annotated[
        Path | None, typer.Option(help="Write prompts, answers and verdicts to this JSONL file, for people's labels.")
    ] = None,
    pairs: Annotated[
        Path | None, typer.Option(help="Write the decided comparisons to this JSONL file, as preference data.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Estimate calls, tokens and cost; send nothing, start nothing.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before calls that have a price.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    wide: Wide = False,
) -> None:
    """Compare a tuned model with its base and other models.

    Each answers the same prompts, and a judge compares each pair of answers in both orders. Without --prompts, --data and
    --lm-eval, lists the evaluations of the job.
    """
    from palate.evaluation.run import later_calls, prepare
    from palate.job import TrainingJob

    name, _, step = jobs[0].partition("@")
    if step and checkpoint:
        raise ConfigurationError(f"{jobs[0]} has a checkpoint: omit --checkpoint")
    job = TrainingJob.get(name)
    if prompts is None and data is None and not lm_eval and judge is None and judge_service is None:
        found = job.evaluations()
        _print_list(found, as_json=as_json, wide=wide)
        if kept := later_calls(job, found):
            print(
                f"{kept} finished calls are kept, some since the last evaluation: after an interruption, the same command continues",
                file=sys.stderr,
            )
        return
    options: dict[str, object] = {} if service else {"engine": engine}
    if dtype != "auto":
        options["dtype"] = dtype
    if max_model_len is not None:
        options["max_model_len"] = max_model_len
    prepared = prepare(
        job,
        prompts=prompts,
        data=data,
        judge=_judge(judge, judge_service),
        against=jobs[1:],
        checkpoint=checkpoint or step or None,
        labels=labels,
        rubric=rubric,
        system_prompt=system,
        max_tokens=max_tokens,
        temperature=temperature,
        limit=limit,
        judge_api_key_env=judge_api_key_env,
        judge_max_tokens=judge_max_tokens,
        prices=prices_of(price or []),
        concurrency=concurrency,
        requests_per_minute=requests_per_minute,
        timeout_s=timeout,
        seed=seed,
        service=service,
        options=options,
        lm_eval=lm_eval or (),
    )
    plan = prepared.plan()
    command = sys.argv[1:]
    if dry_run:
        _print_plan(plan)
        say_next(*(word for word in command if word != "--dry-run"))
        return
    if plan.prompts:
        tokens = plan.prompt_tokens + plan.completion_tokens
        money = "" if plan.cost is None else f", cost {plan.cost:.4f}"
        print(
            f"{len(plan.models)} models, {plan.prompts} prompts: up to {plan.calls} calls ({plan.finished} already finished), "
            f"up to {tokens:,} tokens of the judge{money}",
            file=sys.stderr,
        )
    if plan.cost and not yes and sys.stdin.isatty():
        typer.confirm("Continue?", abort=True, err=True)
    news = _News()
    try:
        result = prepared.run(news)
    except EndpointError as error:
        news.end()
        print(f"error: {error}. Finished calls are kept, and the same command continues", file=sys.stderr)
        say_next(*command)
        raise typer.Exit(1) from None
    except KeyboardInterrupt as interrupt:
        news.end()
        starts = prepared.service is None and (prepared.prompts or prepared.tasks)
        deleted = "any service that it started is deleted; " if starts else ""
        calls = "finished calls are kept, and " if prepared.prompts else ""
        print(f"interrupted; {deleted}{calls}the same command continues", file=sys.stderr)
        for text in getattr(interrupt, "__notes__", ()):
            if text.startswith("evaluation "):  # what a start says of its service is out of date: it is deleted by now
                print(visible(text), file=sys.stderr)
        say_next(*command)
        raise typer.Exit(143 if isinstance(interrupt, Terminated) else 130) from None
    finally:
        news.end()
    _write(rows, list(result.rows()) if rows else [])
    _write(pairs, result.to_rows() if pairs else [])
    _print_result(result, as_json=as_json, wide=wide)
    say_next(*_next_of(result, prepared.models[0].served.checkpoint))


def _next_of(result: Evaluation, checkpoint: str) -> list[object]:
    """Returns the command that deploys the model if the evaluation lets it pass, else the one that shows why not."""
    from palate.evaluation.gate import LEAST_PROMPTS, MOST_FAILED
    from palate.evaluation.record import BASE

    found = result.against(BASE)
    if (
        found is None
        or found.win_rate.low < _NOT_WORSE
        or found.prompts < LEAST_PROMPTS
        or found.failed > MOST_FAILED * (found.prompts + found.failed)
    ):
        return ["report", result.job]
    return [
        "deploy",
        result.job,
        *(["--checkpoint", checkpoint] if checkpoint else []),
        "--require-win-rate",
        _NOT_WORSE,
    ]


def _judge(address: str | None, service: str | None) -> str | Predictor | None:
    if service is None:
        return address
    if address is not None:
        raise ConfigurationError("--judge-service has its own address and token: omit --judge")
    from palate.predictor import Predictor

    return Predictor(service)


def _write(path: Path | None, rows: list[dict[str, object]]) -> None:
    if path is not None:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        print(f"{len(rows)} rows are in {path}", file=sys.stderr)


def _print_plan(plan: EvaluationPlan) -> None:
    from palate.ui.terminal import print_table

    rows: list[tuple[str, object]] = [
        ("models", ", ".join(plan.models)),
        ("prompts", plan.prompts),
        *([("held-out pairs", plan.pairs)] if plan.pairs is not None else []),
        ("calls for answers", plan.answers),
        ("calls for verdicts", plan.verdicts),
        ("finished calls", plan.finished),
        ("remaining calls, maximum", plan.calls),
        ("prompt tokens of the judge, maximum", plan.prompt_tokens),
        ("completion tokens of the judge, maximum", plan.completion_tokens),
    ]
    if plan.cost is not None:
        rows.append(("cost, maximum", f"{plan.cost:.4f}"))
    print_table(("what", "number"), rows)
    print("the maximum includes a second question for every verdict, in case it cannot be read", file=sys.stderr)


def _print_result(result: Evaluation, *, as_json: bool, wide: bool) -> None:
    from palate.evaluation.result import COLUMNS, describe_agreement, held_out_rows
    from palate.ui.terminal import Column, print_table

    if as_json:
        from msgspec import to_builtins

        print(json.dumps(to_builtins(result.record), indent=1))
        return
    drops = {"wins": 2, "ties": 3, "losses": 2, "flips": 4, "unreadable": 1}
    if result.comparisons:
        print_table([Column(name, drops.get(name, 0)) for name in COLUMNS], result.table(), wide=wide)
    if result.strengths:
        ranked = [(name, f"{value:+.2f}") for name, value in result.strengths.items()]
        print_table(("ranking", "strength"), ranked, wide=wide)
    if result.preferences:
        print_table(("model", "held-out pairs", "tuned", "base"), held_out_rows(result), wide=wide)
    for model, tasks in (result.record.tasks or {}).items():
        cells = [(model, task, name, f"{value:.4g}") for task, found in tasks.items() for name, value in found.items()]
        print_table(("model", "task", "metric", "value"), cells, wide=wide)
    if result.agreement is not None:
        print(describe_agreement(result.agreement), file=sys.stderr)
    for one in result.models:
        if one.answers:
            counts = [(one.cut, "cut at the token limit"), (one.empty, "empty"), (one.failed, "failed")]
            told = "".join(f", {count} {what}" for count, what in counts if count)
            print(
                visible(f"{one.name}: {one.answers} answers of {one.mean_length:.0f} characters on average{told}"),
                file=sys.stderr,
            )
    cost = [row.cost for row in result.record.spent if row.cost is not None]
    if cost:
        print(f"cost of all verdicts: {sum(cost):.4f}", file=sys.stderr)


def _print_list(found: list[Evaluation], *, as_json: bool, wide: bool) -> None:
    if as_json:
        from msgspec import to_builtins

        print(json.dumps([to_builtins(one.record) for one in found], indent=1))
        return
    from palate.ui.terminal import Column, print_table

    rows = [(one.key, age(one.record.created_at), *cells) for one in found for cells in one.figures()]
    columns = (
        "evaluation",
        Column("age", 2),
        "model",
        Column("against", 1),
        "figure",
        "value",
        Column("rows", 1),
        Column("judge", 3),
    )
    print_table(columns, rows, wide=wide)
    for one in found:
        for text in one.warnings:
            print(visible(f"evaluation {one.key}: {text}"), file=sys.stderr)
    if not found:
        print("no evaluation yet: pass --prompts and --judge, --data or --lm-eval", file=sys.stderr)


class _News(ProgressLine):
    def __call__(self, progress: EvaluationProgress) -> None:
        self.show(
            lambda: f"{progress.step}: {progress.done}/{progress.total}, {progress.asked} calls",
            is_last=progress.done >= progress.total,
        )


def register(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.command("eval")(evaluate)
