"""An evaluation from its arguments to its record: checks, plans, lets models answer, lets the judge compare. Knows no engine.

prepared = prepare(job, prompts="prompts.jsonl", judge="http://127.0.0.1:8000/v1/judge")
prepared.plan()   # sends nothing, starts nothing
prepared.run()
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palate.deploy import read_template
from palate.evaluation.arena import (
    Compared,
    EvaluationPlan,
    EvaluationProgress,
    EvaluationSettings,
    Labelled,
    Seat,
    Weights,
    answer_usage,
    check_readable,
    collect_answers,
    contestant,
    figures,
    judge_answers,
    judge_labels,
    missing_answers,
    plan,
    read_answers,
    rows_of,
)
from palate.evaluation.inputs import Prompts, distinct_prompts, judge_of, read_labels, read_prompts_of, read_rubric
from palate.evaluation.lm_eval import check_lm_eval, check_tasks, run_lm_eval
from palate.evaluation.record import BASE, Contestant, EvaluationRecord, HeldOut, Spent, newest_first, write
from palate.evaluation.result import Evaluation
from palate.evaluation.serving import OF_ANSWERS, Model, answer_settings, answering, serve_in_turn
from palate.evaluation.statistics import bradley_terry
from palate.generate.completion_log import CompletionLog
from palate.generate.judge import RUBRIC
from palate.generate.pairs import merge
from palate.generate.prompts import Prompt
from palate.job import TrainingJob
from palate.paths import palate_home
from palate.predictor import Predictor, ServedModel
from palate.runs.record import Record, versions
from palate.service_adapters import same_weights
from palate.ui import note
from palate_recipes.errors import ConfigurationError, DataError, PalateError

if TYPE_CHECKING:
    from palate.generate.chat_client import Endpoint
    from palate.sources.inputs import PreferenceData, Rows

MOST_MODELS = 8
"""Models of one evaluation, the base included: every two of them are compared."""

_SHOWN_FAILURES = 5


@dataclass(frozen=True, kw_only=True)
class PreparedEvaluation:
    """A checked evaluation. Made by `prepare`.

    Attributes:
        job: The evaluated job.
        models: All models, that of the job first, the base last.
        prompts: Distinct prompts, with the system prompt.
        labels: Answers that people have compared.
        settings: Of answers, judge and requests.
        data: Held-out preference data.
        service: A running service that answers; None: services are started for the evaluation.
        options: Of the services that are started.
        tasks: Tasks of lm-eval.
    """

    job: TrainingJob
    models: tuple[Model, ...]
    prompts: tuple[Prompt, ...]
    labels: tuple[Labelled, ...]
    settings: EvaluationSettings
    data: Any
    service: Predictor | None
    options: Mapping[str, Any]
    tasks: tuple[str, ...]

    @property
    def ledger(self) -> Path:
        """The file with all finished calls about the job. Without it, everything is asked again."""
        return _ledger_of(self.job)

    def _key(self, preferences: Mapping[str, HeldOut]) -> str:
        """Returns a digest of everything that the figures depend on. The name of held-out scores is one of their data."""
        endpoint = self.settings.judge_endpoint
        entering = [
            [one.weights for one in self.models],
            [prompt.messages for prompt in self.prompts],
            [endpoint.identity if endpoint else "", self.settings.judge_model, self.settings.judge_max_tokens],
            [self.settings.rubric, self.settings.max_tokens, self.settings.temperature, self.settings.seed],
            [tuple(row) for row in self.labels],
            sorted(one.name for one in preferences.values()),
            self.tasks,
        ]
        return hashlib.sha256(json.dumps(entering).encode()).hexdigest()[:16]

    def plan(self) -> EvaluationPlan:
        """Estimates calls, tokens and cost; sends no request, starts no service and writes nothing.

        Raises:
            DataError: The held-out data cannot be read or has no pairs.
        """
        with CompletionLog(self.ledger, read_only=True) as ledger:
            found = plan(self._weights, self.prompts, self.labels, self.settings, ledger)
        if self.data is None:
            return found
        from palate.evaluation.preferences import count_pairs

        return replace(found, pairs=count_pairs(self.job, self.data))

    def run(self, progress: Callable[[EvaluationProgress], None] | None = None) -> Evaluation:
        """Lets the models answer and the judge compare, and writes the record. The same call resumes after any interruption.

        Raises:
            ServiceError: A service did not start.
            ConfigurationError: The service that was given does not serve the models, or was changed while it answered.
            EndpointError: The judge rejected a request or is unreachable; finished calls are kept.
            DataError: No prompt could be compared, or most of the judge's verdicts could not be read.
        """
        preferences = self._preferences()
        with CompletionLog(self.ledger, writer=f"another evaluation of job {self.job.id}") as ledger:
            failures, tasks = self._serve(ledger, progress)
            answers = read_answers(self._weights, self.prompts, self.settings, ledger)
            names = [one.name for one in self.models]
            usage = list(answer_usage(self._weights, answers))
            compared: list[Compared] = []
            agreement = None
            if self.prompts:
                compared, more, failed = judge_answers(names, answers, self.prompts, self.settings, ledger, progress)
                usage += more
                failures += failed
                check_readable(compared, answers, self.prompts, self.settings, ledger)
            if self.labels:
                agreement, more = judge_labels(self.labels, self.settings, ledger)
                usage = list(merge([*usage, *more]))
        comparisons, scores = [], {}
        for first, second in dict.fromkeys((one.first, one.second) for one in compared):
            made = figures(compared, answers, first=first, second=second, seed=self.settings.seed)
            if made is None:
                shown = "; ".join(failures[:_SHOWN_FAILURES])
                raise DataError(
                    f"no prompt could be compared for {first} and {second}: every call failed ({shown}). Repeat the call: what has "
                    "finished is kept"
                )
            comparisons.append(made[0])
            scores[first, second] = made[1]
        for failure in failures[:_SHOWN_FAILURES]:
            note(f"failed: {failure}")
        if failures:
            note(f"{len(failures)} calls failed and are left out: the same call again asks them again")
        endpoint, body = self.settings.judge_endpoint, self.job.manifest.body
        record = EvaluationRecord(
            key=self._key(preferences),
            created_at=round(time.time(), 3),
            base=body.model,
            models=tuple(
                contestant(_facts(one), answers, len(self.prompts)) if self.prompts else _facts(one)
                for one in self.models
            ),
            comparisons=tuple(comparisons),
            strengths=bradley_terry(names, scores) if len(names) > 2 and scores else {},
            agreement=agreement,
            preferences=preferences,
            tasks=tasks,
            judge=self.settings.judge_model,
            judge_url=endpoint.base_url if endpoint else "",
            rubric=self.settings.rubric if endpoint else "",
            prompts_sha256=hashlib.sha256(json.dumps([one.messages for one in self.prompts]).encode()).hexdigest(),
            settings={
                **{
                    name: getattr(self.settings, name)
                    for name in ("system_prompt", "max_tokens", "temperature", "judge_max_tokens", "seed")
                },
                "service": answer_settings(self.models[0].served, self.options),
            },
            spent=tuple(
                Spent(
                    model=row.model,
                    role=row.role,
                    calls=row.calls,
                    prompt_tokens=row.prompt_tokens,
                    completion_tokens=row.completion_tokens,
                    cost=row.cost,
                )
                for row in usage
            ),
            versions=versions(),
        )
        rows = list(rows_of(compared, answers, self.prompts))
        for job in dict.fromkeys(one.job for one in self.models if one.job is not None):
            write(_record(job), record, rows)
        result = Evaluation(self.job.id, record, _record(self.job))
        for warning in result.warnings:
            note(warning)
        return result

    def _preferences(self) -> dict[str, HeldOut]:
        """Scores the held-out preferences with each job's model: the trainer's own program, before any service needs the memory."""
        if self.data is None:
            return {}
        from palate.evaluation.held_out import held_out

        return {
            one.name: held_out(one.job, one.served.checkpoint or None, self.data, seed=self.settings.seed)
            for one in self.models
            if one.job is not None
        }

    @property
    def _weights(self) -> list[Weights]:
        return [one.weights for one in self.models]

    def _serve(
        self, ledger: CompletionLog, progress: Callable[[EvaluationProgress], None] | None
    ) -> tuple[list[str], dict[str, dict[str, dict[str, float]]] | None]:
        """Collects the answers that are missing, and the results of tasks. Starts no service if there are none."""
        missing = missing_answers(self._weights, self.prompts, self.settings, ledger)
        tested = {self.models[0].name, BASE} if self.tasks else set[str]()
        wanted = [one for one in self.models if one.name in {*missing, *tested}]
        failures: dict[str, str] = {}
        tasks: dict[str, dict[str, dict[str, float]]] = {}

        def ask(seats: Mapping[Weights, Seat]) -> None:
            asked = {weights: seat for weights, seat in seats.items() if weights.name in missing}
            failures.update(collect_answers(asked, self.prompts, self.settings, ledger, progress))
            for weights, seat in seats.items():
                if weights.name in tested:
                    tasks[weights.name] = run_lm_eval(self.tasks, seat, self.models[0].served, self.job._run.session)

        if wanted and self.service is not None:
            with answering(self.service, wanted, ledger) as seats:
                ask(seats)
        elif wanted:
            with closing(serve_in_turn(wanted, self.job._run.session, self.options)) as services:
                for _, seats in services:
                    ask(seats)
        return list(failures.values()), tasks or None


def prepare(
    job: TrainingJob,
    *,
    prompts: Prompts | None = None,
    data: str | Path | Rows | PreferenceData | None = None,
    judge: str | Predictor | tuple[Endpoint, str] | None = None,
    against: Sequence[str | TrainingJob] = (),
    checkpoint: str | int | None = None,
    labels: str | Path | Iterable[Mapping[str, Any]] | None = None,
    rubric: str | Path | None = None,
    system_prompt: str | None = None,
    max_tokens: int = 512,
    temperature: float = 0.0,
    limit: int | None = None,
    judge_api_key_env: str | None = None,
    judge_max_tokens: int = 512,
    prices: Mapping[str, tuple[float, float]] | None = None,
    concurrency: int = 8,
    requests_per_minute: float | None = None,
    timeout_s: float = 300.0,
    seed: int = 0,
    service: str | Predictor | None = None,
    options: Mapping[str, Any] | None = None,
    lm_eval: Sequence[str] = (),
) -> PreparedEvaluation:
    """Checks everything that an evaluation needs; starts nothing. See `TrainingJob.evaluate` for the arguments.

    Raises:
        ConfigurationError: Arguments are missing, contradictory or out of range.
        JobNotReadyError: A job has not succeeded; with a checkpoint: has no complete one.
        DataError: Prompts, data or labels cannot be read.
    """
    session = job._run.session
    served_by = Predictor(service, session=session) if isinstance(service, str) else service
    if served_by is not None and options:
        raise ConfigurationError("options are of a service that is started for the evaluation: omit them with service=")
    given_options = dict(options or {}) if served_by is None else served_by.manifest.body.options
    if given_options.get("chat_template") is not None:
        # Answers are known by the template's text: the file may change.
        given_options = {**given_options, "chat_template": read_template(given_options["chat_template"])}
    models = _models(job, checkpoint, against, given_options)
    if lm_eval:
        # With engine="auto" it is known only when the service runs: it then rejects lm-eval's requests with the reason.
        if given_options.get("engine") == "transformers":
            raise ConfigurationError(
                "lm_eval needs an engine that takes token ids, logprobs, echo and stop, and engine=transformers does not: use "
                "engine=vllm (--engine vllm)"
            )
        check_lm_eval()
        check_tasks(lm_eval, models[0].served, session)
    if judge is None and (prompts is not None or labels is not None):
        raise ConfigurationError("judge is missing: pass judge='URL/MODEL', such as http://127.0.0.1:8000/v1/judge")
    if judge is not None and prompts is None and data is None:
        raise ConfigurationError("prompts is missing: pass a file of prompts, or data whose prompts are used")
    if judge is None and data is None and not lm_eval:
        raise ConfigurationError(
            "nothing to evaluate: pass prompts and judge for a win-rate, data for held-out preferences, or lm_eval for tasks"
        )
    if system_prompt is None:
        system_prompt = _system_prompt(models)
    endpoint, name = judge_of(judge, judge_api_key_env)
    settings = EvaluationSettings(
        judge_endpoint=endpoint,
        judge_model=name,
        judge_max_tokens=judge_max_tokens,
        rubric=RUBRIC if rubric is None else read_rubric(rubric),
        system_prompt=system_prompt,
        max_tokens=max_tokens,
        temperature=temperature,
        limit=limit,
        concurrency=concurrency,
        requests_per_minute=requests_per_minute,
        timeout_s=timeout_s,
        prices=dict(prices or {}),
        seed=seed,
    )
    given: list[Prompt] = []
    if judge is not None:
        given = read_prompts_of(prompts, data, session, job.manifest.body.hyperparameters.training_strategy)
    return PreparedEvaluation(
        job=job,
        models=models,
        prompts=tuple(distinct_prompts(given, system_prompt, limit)),
        labels=() if labels is None else tuple(read_labels(labels)),
        settings=settings,
        data=data,
        service=served_by,
        options=given_options,
        tasks=tuple(lm_eval),
    )


def list_evaluations(job: TrainingJob) -> list[Evaluation]:
    """Returns the evaluations of a job, newest first, and notes those that cannot be read. See `TrainingJob.evaluations`."""
    record, found = _record(job), []
    for _, one in newest_first(record):
        if isinstance(one, PalateError):
            note(f"WARNING: not listed: {one}")
        else:
            found.append(Evaluation(job.id, one, record))
    return found


def later_calls(job: TrainingJob, found: Sequence[Evaluation]) -> int:
    """Returns the number of finished calls about a job; 0 if none came after its last evaluation, as in one that was interrupted."""
    path = _ledger_of(job)
    last = max((one.record.created_at for one in found), default=0.0)
    if not path.exists() or path.stat().st_mtime <= last:
        return 0
    with CompletionLog(path, read_only=True) as ledger:
        return len(ledger)


def _ledger_of(job: TrainingJob) -> Path:
    return palate_home() / "evaluations" / f"{job.id}-{hashlib.sha256(job.uri.encode()).hexdigest()[:8]}.ledger.jsonl"


def _models(
    job: TrainingJob,
    checkpoint: str | int | None,
    against: Sequence[str | TrainingJob],
    options: Mapping[str, Any],
) -> tuple[Model, ...]:
    found = [_model(job, checkpoint, options)]
    for other in against:
        if isinstance(other, str):
            if other == BASE:  # always takes part
                continue
            name, _, step = other.partition("@")
            found.append(_model(TrainingJob.get(name, job._run.session), step or None, options))
        else:
            found.append(_model(other, None, options))
    body = job.manifest.body
    for one in found[1:]:
        if not same_weights(one.served.model, body.model):
            raise ConfigurationError(
                f"{one.name} was trained on {one.served.model.name}, and {found[0].name} on {body.model.name} from elsewhere: compare "
                "models of the same base"
            )
    found.append(
        Model(
            weights=Weights(BASE, _identity(ServedModel(model=body.model), options)),
            served=ServedModel(model=body.model),
        )
    )
    names = [one.name for one in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigurationError(f"against names {', '.join(sorted(twice))} twice: give each model once")
    if len(found) > MOST_MODELS:
        raise ConfigurationError(
            f"against makes {len(found)} models with the job and the base: expected up to {MOST_MODELS}, because every two are compared"
        )
    return tuple(found)


def _model(job: TrainingJob, checkpoint: str | int | None, options: Mapping[str, Any]) -> Model:
    served = job.served_model(checkpoint)
    name = f"{job.id}@{served.checkpoint}" if served.checkpoint else job.id
    return Model(weights=Weights(name, _identity(served, options)), served=served, job=job)


def _identity(served: ServedModel, options: Mapping[str, Any]) -> str:
    source = served.model.source
    entering: list[Any] = [source.kind, source.location, source.revision, served.tuned_digest or served.tuned_uri]
    entering += [[name, str(options[name])] for name in OF_ANSWERS if name in options]
    return f"weights:{hashlib.sha256(json.dumps(entering).encode()).hexdigest()}"


def _facts(model: Model) -> Contestant:
    return Contestant(
        name=model.name,
        job=model.job.id if model.job else "",
        checkpoint=model.served.checkpoint,
        digest=model.served.tuned_digest or "",
    )


def _system_prompt(models: Sequence[Model]) -> str:
    """Returns the system prompt of the trainings. Raises ConfigurationError if they had different ones."""
    prompts = {one.served.system_prompt for one in models if one.job is not None}
    if len(prompts) > 1:
        raise ConfigurationError(
            f"the jobs were trained with different system prompts ({', '.join(repr(one)[:60] for one in sorted(prompts))}): pass "
            "system_prompt, which all models get"
        )
    return prompts.pop()


def _record(job: TrainingJob) -> Record:
    return job._run.record
