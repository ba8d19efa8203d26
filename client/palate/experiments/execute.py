"""Runs an experiment: its jobs, some at a time, each only once. Knows recipes and jobs, no file format.

A job's id is the experiment's id and a digest of everything that its result depends on. So the same run is found again without a
search, and of two clients that start it at once, one gets the name and the other follows. Others can compute the id too, and write
something else under it: a job that is found counts only if its manifest is what this experiment would write.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from msgspec.structs import asdict, replace

from palate.adapter_input import read_adapter
from palate.checksums import file_facts
from palate.comparison import METRICS, Comparison, check_metric, compare_jobs, figures_of
from palate.experiments.experiment_file import Experiment, Run, search_metric_problem
from palate.experiments.search import Searcher
from palate.experiments.sweep import describe
from palate.job import TrainingJob
from palate.model import ModelTrainingRecipe
from palate.runner.reference_cache import CACHE_PREFIX
from palate.runs.same import same_training
from palate.session import Session, get_default_session
from palate.sources.inputs import PreferenceData, checked_inputs
from palate.sources.resolve import fetch_files
from palate.ui import note
from palate.weights import reachable_weights
from palate_recipes.errors import (
    ConfigurationError,
    HyperparameterError,
    JobNotReadyError,
    NameTakenError,
    PalateError,
    RunNotFoundError,
)
from palate_recipes.hyperparameters import LOSS_DEFINED_BY
from palate_recipes.schema import HYPERPARAMETERS
from palate_recipes.specs.reference_table import REFERENCE_DIR
from palate_recipes.specs.train import InputFile, TrainSpec

_POLL_S = 1.0
_SHEETS = ("gsheet://", "https://docs.google.com/spreadsheets/")
EXPERIMENT_LABEL = "experiment"
_DIGEST_LABEL = "settings"
_TRIAL_LABEL = "trial"
_VALUES_LABEL = "values"


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """One run of an experiment.

    Attributes:
        job: The job; None if it could not be submitted.
        varied: What the run has of its own.
        state: The job's state, or "not submitted".
        reason: Why it failed.
        is_reused: Whether an earlier call had trained it.
    """

    job: TrainingJob | None
    varied: dict[str, Any]
    state: str
    reason: str = ""
    is_reused: bool = False


@dataclass(frozen=True, kw_only=True)
class ExperimentResult:
    """The runs of an experiment.

    Attributes:
        experiment: The experiment.
        runs: All runs, in the file's order.
        comparison: The jobs side by side, best first.
        model_copy: URI of the copy of the best model, or "".
    """

    experiment: Experiment
    runs: tuple[RunResult, ...]
    comparison: Comparison
    model_copy: str = ""

    @property
    def best(self) -> TrainingJob:
        """The best succeeded job.

        Raises:
            JobNotReadyError: None has succeeded with the metric, see `has_best`.
        """
        best = self.comparison.best.id
        return next(run.job for run in self.runs if run.job is not None and run.job.id == best)

    @property
    def has_best(self) -> bool:
        """Whether a job has succeeded with the metric that ranks them."""
        return any(job.state == "Succeeded" and self.comparison.metric in job.figures for job in self.comparison.jobs)

    @property
    def failed(self) -> tuple[RunResult, ...]:
        """The runs without a model."""
        return tuple(run for run in self.runs if run.state != "Succeeded")

    def __str__(self) -> str:
        return str(self.comparison)

    def _repr_html_(self) -> str:
        return self.comparison._repr_html_()


@dataclass(kw_only=True)
class Planned:
    """A run with its recipe and its job's id. `state` is the job's state before this call, or "new".

    `adopt` changes a trial into the one that another client has started under its id: with other results, it chose other values.
    """

    run: Run
    recipe: ModelTrainingRecipe
    inputs: dict[str, Any]
    name: str
    reference: str
    state: str = "new"
    job: TrainingJob | None = None
    reason: str = ""
    adopt: Callable[[TrainingJob], None] | None = None

    @property
    def is_reused(self) -> bool:
        return self.state == "Succeeded"


def run_experiment(
    experiment: Experiment,
    *,
    session: Session | None = None,
    jobs: int | None = None,
    metric: str = "",
    show: bool = True,
) -> ExperimentResult:
    """See `Experiment.run`."""
    if jobs is not None and (isinstance(jobs, bool) or not isinstance(jobs, int) or jobs < 1):
        raise ConfigurationError(f"jobs={jobs!r} must be a whole number, 1 or more: the number of jobs at a time")
    metric = metric or experiment.metric
    check_metric(metric)
    at_once = jobs or experiment.jobs
    say = note if show else _silent
    if experiment.search != "grid":
        metric = _search_metric(experiment, metric, say)
    with prepared(experiment, session) as plans:
        for warning in experiment.warnings:
            say(f"warning: {warning}")
        crew = _Crew(plans, at_once, say)
        if experiment.search == "grid":
            planned = plans.grid()
            crew.work(planned)
        else:
            planned = _search(plans, crew, at_once, metric)
    found = [plan.job for plan in planned if plan.job is not None]
    comparison = compare_jobs(
        found, metric=metric, varied=sorted({name for plan in planned for name in plan.run.varied})
    )
    runs = tuple(_result(plan) for plan in planned)
    result = ExperimentResult(experiment=experiment, runs=runs, comparison=comparison)
    if not experiment.upload or result.failed:
        return result
    if not (result.has_best and comparison.is_ranked):
        say(f"no model is copied to {experiment.upload}: {comparison.note or f'no job has {comparison.metric}'}")
        return result
    uri = f"{experiment.upload}/{result.best.id}"
    say(f"copying the model of {result.best.id} to {uri}")
    copied = result.best.save_model(uri, session=plans.session)
    return ExperimentResult(experiment=experiment, runs=runs, comparison=comparison, model_copy=copied)


def _result(plan: Planned) -> RunResult:
    if plan.job is None:
        return RunResult(job=None, varied=plan.run.varied, state="not submitted", reason=plan.reason)
    status = plan.job.describe()
    return RunResult(
        job=plan.job, varied=plan.run.varied, state=status.state, reason=status.reason, is_reused=plan.is_reused
    )


def _silent(_: str) -> None:
    pass


# ── what is run ────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def prepared(experiment: Experiment, session: Session | None = None) -> Iterator[Plans]:
    """Fetches the experiment's prompts and digests its data, once for all runs.

    Raises:
        PalateError: Data or prompts cannot be read.
    """
    chosen = session or (Session(store=experiment.store) if experiment.store else get_default_session())
    missing = [name for name in experiment.environments if name not in os.environ]
    if missing:
        raise ConfigurationError(
            f"experiment {experiment.id} passes {', '.join(missing)} to the training program: set it in the environment, or remove it "
            "from `environments`"
        )
    with ExitStack() as places:
        inputs: dict[str, Any] = {}
        facts: dict[str, Any] = {}
        for channel, given in experiment.inputs.items():
            if channel == "adapter":
                inputs[channel], facts[channel] = given, given
                continue
            values = dict(given) if isinstance(given, dict) else {"uri": given}
            if template := values.get("prompt_template"):
                local = _local_prompts(str(template), chosen, places)
                values["prompt_template"] = local
                facts[f"{channel} prompts"] = file_facts(local)["sha256"]
            inputs[channel] = PreferenceData(**values) if isinstance(given, dict) else given
            with fetch_files(values["uri"], chosen) as fetched:
                facts[channel] = [file_facts(path)["sha256"] for path in fetched.files]
            more = {name: value for name, value in values.items() if name not in ("uri", "prompt_template")}
            facts[f"{channel} columns"] = more
        yield Plans(experiment=experiment, session=chosen, inputs=inputs, facts=facts)


def _local_prompts(template: str, session: Session, places: ExitStack) -> Path:
    """Returns a file with the prompt templates; a worksheet is fetched to a folder that is deleted with `places`."""
    if not template.startswith(_SHEETS):
        path = Path(template)
        if not path.is_file():
            raise ConfigurationError(f"prompt_template {template!r} does not exist: check the path")
        return path
    from palate.sources.sheets import fetch_sheet

    folder = places.enter_context(tempfile.TemporaryDirectory(prefix="palate-"))
    return fetch_sheet(template, Path(folder)).files[0]


@dataclass(kw_only=True)
class Plans:
    """Makes recipes and ids for the runs of one experiment.

    Attributes:
        experiment: The experiment.
        session: Store and backend.
        inputs: Data by channel, as `train()` takes it.
        facts: What identifies the data.
    """

    experiment: Experiment
    session: Session
    inputs: dict[str, Any]
    facts: dict[str, Any] = field(repr=False)
    _entries: dict[tuple[str, str], dict[str, InputFile]] = field(default_factory=dict, repr=False)

    def grid(self) -> list[Planned]:
        """Returns the runs of a grid. Of runs with the same settings only the first is kept."""
        planned: dict[str, Planned] = {}
        for run in self.experiment.runs():
            plan = self.plan(run)
            planned.setdefault(plan.name, plan)
        return list(planned.values())

    def plan(self, run: Run, *, name: str = "", labels: Mapping[str, str] | None = None) -> Planned:
        """Returns a run with its recipe, and its job if the store has it.

        Args:
            run: The run.
            name: The job's id; default: by the digest of the settings.
            labels: Further labels.

        Raises:
            NameTakenError: The store has another job under this id, or one that would have to be resumed and was not started here.
        """
        recipe = self._recipe(run, labels or {})
        digest = self._digest(recipe)
        recipe.labels[_DIGEST_LABEL] = digest
        plan = Planned(
            run=run,
            recipe=recipe,
            inputs=self.inputs,
            name=name or self.name(digest[:10]),
            reference=self._reference(recipe),
        )
        try:
            job = TrainingJob.get(plan.name, self.session)
        except RunNotFoundError:
            return plan
        self.check_same(job, recipe)
        plan.state = job.status
        if plan.state in ("Failed", "Stopped"):
            self.check_own(job, plan.state)
        plan.job = job
        return plan

    def check_same(self, job: TrainingJob, recipe: ModelTrainingRecipe) -> None:
        """Raises NameTakenError if a job is not the one that a recipe would submit."""
        manifest = job.manifest
        differences = same_training(
            manifest.body, self._body(recipe), backends=(manifest.backend, self.session.backend.name)
        )
        if differences:
            raise NameTakenError(
                f"job {job.id} in {self.session.store.root} is not what experiment {self.experiment.id} would train: {differences}. "
                f"It is neither used nor resumed: give the experiment another id, or delete the job (`palate delete {job.id}`)"
            )

    def check_own(self, job: TrainingJob, state: str) -> None:
        """Raises NameTakenError if a job that would be resumed was not started from here, as `RunHandle.refresh` does not resume it."""
        if not job._run.is_own:
            raise NameTakenError(
                f"job {job.id} is {state} and was not started by you on this machine. A resume would run here what another writer of "
                f"{self.session.store.root} may have left in it. If you trust it, `palate resume {job.id}`; else give the experiment "
                f"another id, or delete the job (`palate delete {job.id}`)"
            )

    def _body(self, recipe: ModelTrainingRecipe) -> TrainSpec:
        """Returns what `recipe.train` would write, without notes and with no URI of what it would upload."""
        spec = recipe._spec()
        source = reachable_weights(spec.model.source, self.session, self.session.backend)
        spec = replace(spec, model=replace(spec.model, source=source))
        values = spec.hyperparameters
        key = values.training_strategy, values.bad_rows
        if key not in self._entries:  # the same for most runs, and large data takes its time
            data = {channel: given for channel, given in self.inputs.items() if channel != "adapter"}
            with checked_inputs(
                data, self.session, strategy=values.training_strategy, bad_rows=values.bad_rows
            ) as checked:
                self._entries[key] = {channel: item.entry(channel) for channel, item in checked.items()}
        inputs = dict(self._entries[key])
        if "adapter" in self.inputs:
            adapter = read_adapter(self.inputs["adapter"], self.session)
            spec = adapter.settle(spec)
            inputs["adapter"] = adapter.as_input()
        return replace(spec, inputs=inputs)

    def name(self, suffix: str) -> str:
        """Returns a job's id: the experiment's id and a suffix."""
        return f"{self.experiment.id[:80]}-{suffix}"

    @property
    def search_digest(self) -> str:
        """Identifies a search over this data."""
        return _digest_of([self.experiment.search_digest, self.facts])

    def _recipe(self, run: Run, labels: Mapping[str, str]) -> ModelTrainingRecipe:
        return ModelTrainingRecipe(
            **run.arguments,
            hyperparameters=run.hyperparameters,
            labels={**self.experiment.labels, EXPERIMENT_LABEL: self.experiment.id, **labels},
            environments={name: os.environ[name] for name in self.experiment.environments},
            session=self.session,
        )

    def _digest(self, recipe: ModelTrainingRecipe) -> str:
        values = {
            name: value
            for name, value in asdict(recipe.resolve().values).items()
            if value
            != HYPERPARAMETERS[name].default  # so that a hyperparameter that a later version adds changes no digest
        }
        return _digest_of(
            [recipe.model_name, recipe.model_version, recipe.model_uri, recipe.method, values, self.facts]
        )

    def _reference(self, recipe: ModelTrainingRecipe) -> str:
        """Identifies the reference model's scores that a run needs; "" if it needs none."""
        values = recipe.resolve().values
        if values.training_strategy != "dpo":
            return ""
        names = (
            "precision",
            "load_in_4bit",
            "load_in_8bit",
            "ld_alpha",
            "seq_length",
            "system_prompt",
            "apply_chat_template",
        )
        model = [recipe.model_name, recipe.model_version, recipe.model_uri, recipe.method == "Standard_LLM"]
        return _digest_of([model, [getattr(values, name) for name in names], self.facts])


def _digest_of(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def planned_runs(plans: Plans) -> list[Planned]:
    """Returns the runs of a grid, or the first trial of a search, whose others depend on results."""
    if plans.experiment.search == "grid":
        return plans.grid()
    metric = _search_metric(plans.experiment, plans.experiment.metric, _silent)
    return [_trial(plans, _searcher(plans.experiment, metric), 0)]


# ── jobs, some at a time ───────────────────────────────────────────────────────────────────────────────────────


class _Crew:
    """Keeps up to `at_once` jobs running until all have ended.

    The first DPO job of each reference scores it alone; the others start once its scores are in the store, where they find them.
    """

    def __init__(self, plans: Plans, at_once: int, say: Any) -> None:
        self._plans = plans
        self._session = plans.session
        self._at_once = at_once
        self._say = say
        self._scored: set[str] = set()
        self._started = 0

    def work(self, plans: Sequence[Planned]) -> None:
        """Trains those that are not trained yet, and waits for all."""
        waiting, running = list(plans), list[Planned]()
        scoring: tuple[Planned, frozenset[str]] | None = None
        try:
            while waiting or running:
                if scoring is not None and self._is_scored(*scoring):
                    self._scored.add(scoring[0].reference)
                    scoring = None
                while waiting and len(running) < self._at_once:
                    plan = next(
                        (one for one in waiting if scoring is None or one.reference in ("", *self._scored)), None
                    )
                    if plan is None:
                        break
                    waiting.remove(plan)
                    before = self._tables()
                    if not self._start(plan):
                        continue
                    running.append(plan)
                    if plan.reference and plan.reference not in self._scored:
                        scoring = plan, before
                ended = [plan for plan in running if plan.job is not None and plan.job.is_completed()]
                for plan in ended:
                    running.remove(plan)
                    self._say(_ending(plan))
                if running and not ended:
                    time.sleep(_POLL_S)
        except KeyboardInterrupt as interrupt:
            ids = " ".join(plan.name for plan in running)
            rest = f"follows them and starts the other {len(waiting)}" if waiting else "follows them"
            if ids:
                interrupt.add_note(f"these jobs continue: {ids}. `palate stop JOB` stops one; the same command {rest}")
            raise

    def _start(self, plan: Planned) -> bool:
        """Submits, resumes or follows a run's job. Returns whether it runs now."""
        own = describe(plan.run.varied)
        words = f"{plan.name}{f' ({own})' if own else ''}"
        if plan.state == "Succeeded":
            self._say(f"{words}: trained already")
            self._started += 1
            return False
        try:
            if plan.job is None:
                self._submit(plan, words)
            elif plan.state in ("Failed", "Stopped"):
                self._resume(plan, plan.job, words)
            else:
                self._say(f"{words}: runs already")
        except PalateError as error:
            if not self._started:
                raise
            plan.reason = str(error)
            self._say(f"{words}: cannot be submitted: {error}")
            return False
        self._started += 1
        return True

    def _submit(self, plan: Planned, words: str) -> None:
        try:
            plan.job = plan.recipe.train(plan.inputs, wait=False, job_name=plan.name, show_logs=False)
            self._say(f"{words}: started")
        except NameTakenError:  # another client was first
            job = TrainingJob.get(plan.name, self._session)
            if plan.adopt is not None:
                plan.adopt(job)
            self._plans.check_same(job, plan.recipe)
            plan.job = job
            self._say(f"{plan.name}: was just started by another process")

    def _resume(self, plan: Planned, job: TrainingJob, words: str) -> None:
        plan.job = None  # if it is refused, it is no result of this experiment
        job = TrainingJob.get(job.id, self._session)
        self._plans.check_same(job, plan.recipe)  # again: a long sweep may have come here after hours
        self._plans.check_own(job, plan.state)
        plan.job = job
        try:
            job.resume(environments=plan.recipe.environments, wait=False)
            self._say(f"{words}: resumed, it was {plan.state}")
        except JobNotReadyError:  # another client has just resumed it
            self._say(f"{words}: was just resumed by another process")

    def _tables(self) -> frozenset[str]:
        found = self._session.store.list(f"{CACHE_PREFIX}/{REFERENCE_DIR}")
        return frozenset(f"{info.key} {info.etag}" for info in found)

    def _is_scored(self, plan: Planned, before: frozenset[str]) -> bool:
        """Whether the scores of a run's reference are in the store, or it will not write them."""
        assert plan.job is not None
        if plan.job.is_completed():
            return True
        start = next((event for event in plan.job.metrics() if event["kind"] == "start"), None)
        if start is None:
            return False
        return not start.get("reference_scored_rows") or self._tables() != before


def _ending(plan: Planned) -> str:
    assert plan.job is not None
    status = plan.job.describe()
    if status.state != "Succeeded":
        first = (status.reason or "no reason was recorded").splitlines()[0][:200]
        return f"{plan.name}: {status.state}: {first}"
    figures = figures_of(plan.job.metrics())
    shown = " ".join(
        f"{name}={figures[name]:.4g}" for name in ("eval_loss", "final_loss", "seconds") if name in figures
    )
    return f"{plan.name}: Succeeded {shown}"


# ── a search ───────────────────────────────────────────────────────────────────────────────────────────────────


def _search_metric(experiment: Experiment, metric: str, say: Callable[[str], None]) -> str:
    """Returns what chooses the trials.

    Raises:
        ConfigurationError: No trial would have it.
    """
    validates = "validation" in experiment.inputs
    if problem := metric and search_metric_problem(metric, validates=validates):
        raise ConfigurationError(f"experiment {experiment.id}: {problem}")
    axes = experiment.axes
    groups = {name for choices in axes.groups.values() for name in choices[0]}
    varied = sorted({*axes.ranges, *axes.lists, *groups}.intersection(LOSS_DEFINED_BY))
    if not metric and varied:
        raise ConfigurationError(
            f"experiment {experiment.id}: its search varies {', '.join(varied)}, and losses of different {', '.join(varied)} do not "
            "compare: add validation data and `metric: eval_rewards/accuracies`, or use `search: grid`"
        )
    if not metric and not validates:
        say("the search chooses by final_loss, the training loss: there is no validation data")
    return metric or ("eval_loss" if validates else "final_loss")


def _searcher(experiment: Experiment, metric: str) -> Searcher:
    return Searcher(
        experiment.axes,
        tpe=experiment.search == "tpe",
        seed=experiment.search_seed,
        maximize=METRICS[metric],
    )


def _search(plans: Plans, crew: _Crew, at_once: int, metric: str) -> list[Planned]:
    """Runs the trials of a search, `at_once` at a time: the next ones are chosen by the results so far."""
    searcher, trials = _searcher(plans.experiment, metric), plans.experiment.trials
    planned: list[Planned] = []
    while len(planned) < trials:
        numbers = range(len(planned), min(len(planned) + at_once, trials))
        wave = [_trial(plans, searcher, number) for number in numbers]
        crew.work(wave)
        for number, plan in zip(numbers, wave, strict=True):
            figures = figures_of(plan.job.metrics()) if plan.job is not None and plan.job.is_succeeded() else {}
            searcher.tell(number, plan.run.varied, figures.get(metric))
        planned += wave
    return planned


def _trial(plans: Plans, searcher: Searcher, number: int) -> Planned:
    """Returns a trial: that of the store, or with values that the search chooses now.

    Its job's id has its number and not its settings, so that a search goes on where it was, whatever its results depended on.
    """
    name = plans.name(f"{number:03d}-{plans.search_digest}"[:12])
    try:
        varied = _recorded(searcher, TrainingJob.get(name, plans.session))
    except RunNotFoundError:
        varied = searcher.ask(number)
    labels = {_TRIAL_LABEL: str(number), _VALUES_LABEL: searcher.record(varied)}
    plan = plans.plan(_run_of(plans, number, varied), name=name, labels=labels)

    def adopt(job: TrainingJob) -> None:
        found = _recorded(searcher, job)
        if found != plan.run.varied:
            own = {**labels, _VALUES_LABEL: searcher.record(found)}
            theirs = plans.plan(_run_of(plans, number, found), name=name, labels=own)
            plan.run, plan.recipe, plan.reference = theirs.run, theirs.recipe, theirs.reference

    plan.adopt = adopt
    return plan


def _recorded(searcher: Searcher, job: TrainingJob) -> dict[str, Any]:
    return searcher.values_in(job.manifest.labels.get(_VALUES_LABEL, ""))


def _run_of(plans: Plans, number: int, varied: Mapping[str, Any]) -> Run:
    try:
        return plans.experiment.with_values(varied)
    except HyperparameterError as error:
        raise ConfigurationError(
            f"experiment {plans.experiment.id}: trial {number} chose {describe(varied)}, which is not valid: {error}"
        ) from None
