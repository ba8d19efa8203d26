"""A training job in a store, which can be followed, stopped and deployed from anywhere. Knows no training."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palate.backends import PlacementRequest
from palate.checksums import read_model_digests
from palate.common.utils import check_name, unique_name
from palate.parameters import reject_unknown_keywords
from palate.runs.checkpoints import Checkpoint, check_servable, choose_checkpoint, list_checkpoints, with_metrics
from palate.runs.handle import RunHandle
from palate.runs.list import RunFilter, find_runs
from palate.runs.record import Record, events_once, locate
from palate.session import Session, get_default_session
from palate_recipes.errors import ConfigurationError, DamagedFilesError, JobNotReadyError, TrainingJobError
from palate_recipes.specs.diagnose import Reading, read_run
from palate_recipes.specs.run import State, Status, TrainManifest

if TYPE_CHECKING:
    from palate.chat import Chat
    from palate.evaluation.arena import EvaluationProgress
    from palate.evaluation.inputs import Prompts
    from palate.evaluation.result import Evaluation
    from palate.generate.chat_client import Endpoint
    from palate.predictor import Predictor, ServedModel
    from palate.report import Report
    from palate.sources.inputs import PreferenceData, Rows

OUTPUT_CHANNELS = ("model", "checkpoints", "tensorboard")


@reject_unknown_keywords
class TrainingJob:
    """A training job in a store.

    Created by `ModelTrainingRecipe.train`. Any process that reaches the store can find it with `TrainingJob.get` or `attach`.
    """

    def __init__(self, record: Record, session: Session) -> None:
        self._run = RunHandle(record, session)

    @classmethod
    def get(cls, training_job_id: str, session: Session | None = None) -> TrainingJob:
        """Returns the job with this id or URI.

        Raises:
            RunNotFoundError: No job in the session's store has this id.
            ConfigurationError: The id is not valid.
        """
        session = session or get_default_session()
        if "/" in training_job_id:
            root, kind, name = locate(training_job_id)
            if kind != "jobs":
                raise ConfigurationError(f"training_job_id={training_job_id!r} is a service: use Predictor({name!r})")
            session = Session(session.region_id, store=root, backend=session.backend, options=session.options)
        else:
            name = training_job_id
        check_name("training_job_id", name)
        job = cls(Record(session.store, "jobs", name), session)
        with suppress(DamagedFilesError):  # a damaged job can still be deleted
            _ = job.manifest  # raises if there is no such job
        return job

    attach = get

    @classmethod
    def list(
        cls,
        status: State | None = None,
        session: Session | None = None,
        page_size: int = 50,
        page_number: int = 1,
        *,
        name: str = "*",
        model: str = "*",
        labels: Mapping[str, str] | None = None,
        since_s: float | None = None,
        min_attempts: int = 1,
    ) -> builtins.list[TrainingJob]:
        """Returns the jobs of the session's store, newest first.

        Args:
            status: Only jobs in this state.
            session: Default: the default session.
            page_size: Jobs per page.
            page_number: Page, from 1.
            name: Glob for the id, such as `qwen2-*`.
            model: Glob for the model's name.
            labels: Only jobs with all these labels.
            since_s: Only jobs created within the last `since_s` seconds.
            min_attempts: Only jobs with at least this many attempts.

        Raises:
            ConfigurationError: An argument is invalid or matches nothing.
            StoreError: The store or a job in it cannot be read.
            DamagedFilesError: A job's record is damaged.
        """
        if page_size < 1 or page_number < 1:
            raise ConfigurationError(f"page_size={page_size!r}, page_number={page_number!r}: both must be 1 or more")
        wanted = RunFilter(
            states=() if status is None else (status,),
            name=name,
            model=model,
            labels=labels or {},
            since_s=since_s,
            min_attempts=min_attempts,
        )
        session = session or get_default_session()
        found = find_runs(session, "jobs", wanted, status=False, limit=page_size * page_number).require_all()
        return [cls._of(run.handle) for run in found[(page_number - 1) * page_size :]]

    @classmethod
    def _of(cls, run: RunHandle) -> TrainingJob:
        job = cls(run.record, run.session)
        job._run = run  # with its manifest
        return job

    # ── what it is ──────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def id(self) -> str:
        return self._run.record.name

    @property
    def uri(self) -> str:
        return self._run.record.uri

    @property
    def manifest(self) -> TrainManifest:
        """The job's definition: weights source, resolved hyperparameters, input digests. `describe().details` has the versions."""
        manifest = self._run.manifest
        assert isinstance(manifest, TrainManifest)  # a job's record has no other kind
        return manifest

    @property
    def status(self) -> State:
        """The current state: Creating, Running, Stopping, Succeeded, Failed or Stopped."""
        return self._run.refresh().state

    def describe(self) -> Status:
        """Returns the full status: state, reason, times, exit code, details."""
        return self._run.refresh()

    def is_succeeded(self) -> bool:
        return self.status == "Succeeded"

    def is_completed(self) -> bool:
        """Returns whether it has ended: succeeded, failed or stopped."""
        return self._run.refresh().is_terminal

    # ── what it says and gives ──────────────────────────────────────────────────────────────────────────────────────

    def logs(self, follow: bool = False) -> Iterator[str]:
        """Yields the log line by line. With `follow`, continues until the job has ended."""
        return self._run.lines(follow=follow)

    def metrics(self) -> builtins.list[dict[str, Any]]:
        """Returns all metrics events in order, with TRL's names.

        Events of `kind` `train` have step, epoch, loss, learning_rate, rewards/margins and so on. Events of `kind` `eval` have
        eval_loss, eval_rewards/accuracies and so on. `start` is first and has sizes; `end` is last and has the final figures and
        the reading. After a resume each step occurs once, and there is one `start` per attempt (two if its fast path failed).
        """
        return events_once(self._run.record.metrics())

    def reading(self) -> Reading:
        """Interprets the metrics of a finished or running job.

        `verdict` is one of learning, over-fitting, not learning, unstable, saturated, too early to tell. `text` has the figures
        and what to change. See "Watching a run" in docs/training.md.
        """
        return read_run(self.metrics())

    def checkpoints(self) -> builtins.list[Checkpoint]:
        """Returns the job's checkpoints in the store by step: time, size, whether they are complete, and the metrics of their step.

        Each complete one can be given to `deploy` and `chat`, also while the job trains. Empty if the job has none yet.

            best = min(job.checkpoints(), key=lambda checkpoint: checkpoint.metrics.get("eval_loss", math.inf))
        """
        found = list_checkpoints(self._run.record)
        return with_metrics(found, self.metrics()) if found else []

    def report(self, others: Sequence[TrainingJob] = (), *, answers: str | Path | None = None) -> Report:
        """Returns one HTML document about the job: curves, reading, answers, data, settings, versions, how to reproduce it.

        It loads nothing from anywhere and has no secrets. In a notebook it is shown; `.save("report.html")` writes it.

        Args:
            others: Jobs to compare with. Their curves are overlaid.
            answers: A file with answers of several models to the same questions, such as the quickstart's `answers.json`.

        Raises:
            MissingDependencyError: Plotly is not installed: `pip install 'palate[report]'`.
            ConfigurationError: There are more than twelve jobs, one is given twice, or `answers` has another form.
        """
        from palate.report import make_report

        return make_report([self, *others], answers=answers)

    def output_path(self, channel_name: str = "model") -> str:
        """Returns the URI of an output of the job.

        Args:
            channel_name: `model` (adapter or weights), `checkpoints`, or `tensorboard`.
        """
        if channel_name not in OUTPUT_CHANNELS:
            raise ConfigurationError(
                f"channel_name={channel_name!r} is not an output of a job: choose one of {', '.join(OUTPUT_CHANNELS)}"
            )
        return f"{self.uri}/{channel_name}"

    @property
    def model_uri(self) -> str:
        """URI of the trained model. After LoRA it can be `inputs["adapter"]` of another training.

        Raises:
            JobNotReadyError: The job has not succeeded.
        """
        self.require_model()
        return self.output_path("model")

    # ── what can be done with it ────────────────────────────────────────────────────────────────────────────────────

    def wait(self, interval: float = 1.0, show_logs: bool = True, *, timeout_s: float | None = None) -> TrainingJob:
        """Waits until the job has succeeded.

        Args:
            interval: Seconds between polls.
            show_logs: Show a live view on a terminal, log lines elsewhere, on stderr.
            timeout_s: Time limit in seconds; None: no limit. The job continues after a timeout, and after Ctrl-C.

        Returns:
            The job itself.

        Raises:
            TrainingJobError: It failed or was stopped. Has the reason and the last log lines.
            WaitTimeoutError: It has not ended within `timeout_s`.
        """
        return self._wait(interval, show_logs=show_logs, timeout_s=timeout_s)

    def _wait(
        self, interval: float = 1.0, *, show_logs: bool, timeout_s: float | None = None, after_log_part: int = 0
    ) -> TrainingJob:
        try:
            status = self._run.follow(
                until=lambda status: status.is_terminal,
                show_logs=show_logs,
                timeout_s=timeout_s,
                interval_s=interval,
                what="the end of the training",
                after_log_part=after_log_part,
            )
        except KeyboardInterrupt as interrupt:
            interrupt.add_note(
                f"job {self.id} continues: `palate watch {self.id}` follows it, `palate stop {self.id}` stops it"
            )
            raise
        if status.state != "Succeeded":
            verb = "was stopped" if status.state == "Stopped" else "failed"
            raise TrainingJobError(f"job {self.id} {verb}", reason=status.reason, log_tail=list(status.log_tail))
        return self

    def stop(self, *, grace_s: float = 150.0) -> None:
        """Stops the job. It writes a checkpoint and ends, or is killed after `grace_s` seconds. Idempotent."""
        self._run.stop(grace_s=grace_s)

    def resume(
        self,
        *,
        environments: Mapping[str, str] | None = None,
        wait: bool = True,
        show_logs: bool = True,
    ) -> TrainingJob:
        """Continues a failed or stopped job from its last complete checkpoint. The result equals that of an uninterrupted run.

        Without a checkpoint it starts from the beginning. It gets `max_attempts` more attempts, with `max_run_time` each.

        Args:
            environments: Values of the variables that the job was started with. Values in this process's environment can be
                omitted.
            wait: Wait until it has succeeded.
            show_logs: With `wait`: show a live view on a terminal, log lines elsewhere, on stderr.

        Returns:
            The job itself.

        Raises:
            JobNotReadyError: It is running or has succeeded.
            ConfigurationError: A value of `environments` is missing.
            TrainingJobError: With `wait`: it failed or was stopped again.
        """
        status = self._run.refresh()
        if status.state not in ("Failed", "Stopped"):
            remedy = "its model is ready" if status.state == "Succeeded" else f"follow it with `palate watch {self.id}`"
            raise JobNotReadyError(
                f"job {self.id} is {status.state}: only a failed or stopped job can be resumed; {remedy}"
            )
        known = self._run.environments(environments)
        shown = self._run.record.last_part("logs")  # the new attempt continues the log
        begun = self._run.restart(
            expect={"Failed", "Stopped"},
            attempt=status.attempt,
            more=self.manifest.body.max_attempts,
            environments=known,
        )
        if not begun:
            raise JobNotReadyError(
                f"job {self.id} was just resumed by another process: follow it with `palate watch {self.id}`"
            )
        if wait:
            self._wait(show_logs=show_logs, after_log_part=shown)
        return self

    def delete(self) -> None:
        """Stops the job if it is running, and deletes it with its model and checkpoints. Works on a damaged record too."""
        self._run.delete()

    def save_model(self, uri: str | Path, *, session: Session | None = None) -> str:
        """Copies the model (adapter or full weights) with a model card to another location.

        Every file is checked against its SHA-256 before and after. `digests.json` is written last: a copy without it is
        incomplete, and saving to the same location again completes it.

        Args:
            uri: An empty or new folder: a path, `file://`, `s3://`, `oss://`; or `hf://OWNER/NAME`, a model repository on the
                Hugging Face Hub, created as private if it does not exist (needs HF_TOKEN with write access).
            session: Credentials and endpoint for `uri`; default: the job's session.

        Returns:
            The URI of the copy; on the Hub with its commit.

        Raises:
            JobNotReadyError: The job has not succeeded.
            NameTakenError: The folder has other files.
            DamagedFilesError: The model differs from what the training wrote, or the copy differs from the model.
            StoreError: The location denies access or does not answer.
            ConfigurationError: `uri` is on the Hub and there is no token.
        """
        from palate.publish import save

        self.require_model()
        record = self._run.record
        return save(record, self.manifest, record.status(), uri, session or self._run.session)

    def require_model(self) -> None:
        """Checks that the job has a complete model.

        Raises:
            JobNotReadyError: The job has not succeeded.
            DamagedFilesError: A file of its model is missing or has the wrong size.
        """
        status = self._run.refresh()
        if status.state == "Succeeded":
            if digest := status.details.get("model_digest"):
                store, prefix = self._run.record.store, self._run.record.key("model")
                what = self.output_path("model")
                read_model_digests(store, prefix, digest, what=what).check_store(store, prefix, what=what)
            return
        remedy = (
            f"wait for it (`palate watch {self.id}`)"
            if not status.is_terminal
            else f"find the cause (`palate logs {self.id}`), then `palate resume {self.id}` or train again"
        )
        reason = f": {status.reason}" if status.reason else ""
        raise JobNotReadyError(f"job {self.id} is {status.state}{reason}. Only a succeeded job has a model: {remedy}")

    def deploy(
        self,
        service_name: str | None = None,
        *,
        checkpoint: str | int | None = None,
        instance_type: str | None = None,
        instance_count: int | None = 1,
        resource_config: object = None,
        options: dict[str, Any] | None = None,
        wait: bool = True,
        show_logs: bool = False,
        verify: bool | str = True,
        require_win_rate: float | None = None,
    ) -> Predictor:
        """Serves the job's model, or one of its checkpoints. See `ModelTrainingRecipe.deploy`.

        Args:
            service_name: Name of the service. Default: the job id with `-service`, or with the checkpoint's name.
            checkpoint: `latest`, a step such as 100, or a name such as `step-000100`: a complete checkpoint of the job, which may
                still be running, or has failed or was stopped. None: the model of the succeeded job.
            instance_type: As there, as all that follow.
            instance_count: As there.
            resource_config: As there.
            options: As there.
            wait: As there.
            show_logs: As there.
            verify: As there. A checkpoint has no probe, so there is nothing to compare.
            require_win_rate: Deploy only if the last evaluation of exactly this model against its base has a win-rate whose 95%
                interval begins at this value or above, such as 0.55.

        Raises:
            WinRateError: There is no such evaluation, its interval begins lower, it has fewer than 20 prompts, or more than 5% of
                them failed. Nothing was started.
            JobNotReadyError: The job has not succeeded; with `checkpoint`: it has no complete checkpoint.
            ConfigurationError: The job has no such checkpoint. The message lists those that it has.
            DamagedFilesError: A file of the model is missing or has the wrong size. The service's runner also compares all
                digests; a mismatch there is the service's reason for failing.
        """
        from palate.deploy import start_service

        served = self.served_model(checkpoint)
        if require_win_rate is not None:
            from palate.evaluation.gate import check_win_rate

            check_win_rate(self, served, require_win_rate, options=options or {})
        return start_service(
            self._run.session,
            service_name=service_name or f"{self.id}-{served.checkpoint or 'service'}",
            served=served,
            options={"verify": verify, **(options or {})},
            where=PlacementRequest(
                kind="services",
                instance_type=instance_type,
                instance_count=instance_count,
                resource_config=resource_config,
            ),
            wait=wait,
            show_logs=show_logs,
        )

    def chat(self, checkpoint: str | int | None = None, *, options: dict[str, Any] | None = None) -> Chat:
        """Starts a service of the job's model or of a checkpoint, for one conversation. Use it in a `with` statement.

            with job.chat(checkpoint="latest") as chat:
                print(chat.ask("The Moon is bigger than the Earth, right?"))

        The service has a name of its own and is deleted at the end of the block. If this process is killed, the service stops
        after an hour without a request. The system prompt of the training is sent, as by `palate chat`.

        Args:
            checkpoint: As in `deploy`.
            options: As in `ModelTrainingRecipe.deploy`.

        Raises:
            PalateError: As `deploy`.
        """
        from palate.chat import IDLE_TIME_TO_LIVE_S, Chat

        settings = {"idle_time_to_live_s": IDLE_TIME_TO_LIVE_S, **(options or {})}
        predictor = self.deploy(unique_name(f"{self.id}-chat"), checkpoint=checkpoint, options=settings)
        try:
            return Chat(predictor)
        except BaseException:  # nobody else has its name
            predictor.delete_service()
            raise

    def evaluate(
        self,
        prompts: Prompts | None = None,
        *,
        judge: str | Predictor | tuple[Endpoint, str] | None = None,
        data: str | Path | Rows | PreferenceData | None = None,
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
        progress: Callable[[EvaluationProgress], None] | None = None,
    ) -> Evaluation:
        """Compares the job's model with its base and other models: each answers the same prompts, and a judge compares the answers.

        Starts a service for the answers, and deletes it. The result is kept with the job. The same call resumes after any
        interruption: finished calls are not sent again.

        Args:
            prompts: A file of prompts (text, JSON, JSONL, CSV), strings, or lists of messages. Not from the training data.
            judge: `URL/MODEL` of any OpenAI-compatible endpoint, such as `https://api.openai.com/v1/gpt-4o-mini`; a model name
                at OPENAI_BASE_URL; a running service; or an endpoint and a model name.
            data: Held-out preference data, as `inputs` of a training takes it. With a judge and without `prompts`, its prompts
                are used.
            against: Further jobs on the same base: jobs, ids, or `ID@CHECKPOINT`. Every two models are compared.
            checkpoint: Evaluate a checkpoint, as in `deploy`.
            labels: Answers that people have compared, a file or rows: `prompt`, `answer_a`, `answer_b`, `label` (A, B or tie).
                The judge compares them too, and Cohen's kappa tells how far it agrees.
            rubric: What makes an answer better: a text, or the Path of a text file. Default: `palate.generate.judge.RUBRIC`.
            system_prompt: Prepended to prompts without one. Default: that of the training.
            max_tokens: Maximum tokens of an answer.
            temperature: Sampling temperature of the answers.
            limit: Use only the first N prompts.
            judge_api_key_env: Environment variable with the judge's key.
            judge_max_tokens: Maximum tokens of a verdict, including its reasoning.
            prices: Price per million prompt and completion tokens of the judge's model, by its name.
            concurrency: Maximum concurrent calls.
            requests_per_minute: Rate limit of the judge; None: no limit.
            timeout_s: Timeout of one request in seconds.
            seed: Of the intervals.
            service: A running service that serves these models; None starts one. It is not changed.
            options: Of the started service, as in `deploy`.
            lm_eval: Tasks of the installed lm-eval, which are run on the model and its base.
            progress: Called after each prompt of a step.

        Returns:
            Win-rates with 95% intervals, answers and verdicts.

        Raises:
            ConfigurationError: Arguments are missing or out of range, or a model has another base.
            JobNotReadyError: A job has not succeeded; with a checkpoint: has no complete one.
            DataError: Prompts, data or labels cannot be read, or no prompt could be compared.
            ServiceError: The service did not start. Nothing keeps running.
            EndpointError: The judge rejected a request or is unreachable. Finished calls are kept.
        """
        from palate.evaluation.run import prepare

        prepared = prepare(
            self,
            prompts=prompts,
            data=data,
            judge=judge,
            against=against,
            checkpoint=checkpoint,
            labels=labels,
            rubric=rubric,
            system_prompt=system_prompt,
            max_tokens=max_tokens,
            temperature=temperature,
            limit=limit,
            judge_api_key_env=judge_api_key_env,
            judge_max_tokens=judge_max_tokens,
            prices=prices,
            concurrency=concurrency,
            requests_per_minute=requests_per_minute,
            timeout_s=timeout_s,
            seed=seed,
            service=service,
            options=options,
            lm_eval=lm_eval,
        )
        return prepared.run(progress)

    def evaluations(self) -> builtins.list[Evaluation]:
        """Returns the evaluations in which the job took part, newest first by the store's clock. Notes those that cannot be read."""
        from palate.evaluation.run import list_evaluations

        return list_evaluations(self)

    def served_model(self, checkpoint: str | int | None = None) -> ServedModel:
        """Returns the model for a service of this job, or one of its checkpoints. Raises as `deploy`."""
        from palate.predictor import ServedModel

        record, body = self._run.record, self.manifest.body
        served = ServedModel(
            model=body.model,
            adapter=body.trains_adapter,
            system_prompt=body.hyperparameters.system_prompt,
            labels={"job": self.id},
        )
        if checkpoint is None:
            self.require_model()
            digest = record.status().details.get("model_digest")
            return replace(served, tuned_uri=self.output_path("model"), tuned_digest=digest)
        self._run.refresh()  # so that a lost runner is noticed, and messages have the right state
        chosen = choose_checkpoint(record, checkpoint)
        return replace(
            served,
            tuned_uri=f"{self.output_path('checkpoints')}/{chosen.name}",
            tuned_digest=check_servable(record, chosen, adapter=served.adapter),
            checkpoint=chosen.name,
            # Full fine-tuning keeps its weights in float32, and the finished model is saved in the training's precision.
            dtype="" if served.adapter else body.precision,
            labels={"job": self.id, "checkpoint": chosen.name},
        )

    def _repr_html_(self) -> str:
        """The job in a notebook: state, model, settings that differ from the defaults, progress, loss curve and reading."""
        from palate.ui.notebook import run_html
        from palate_recipes.hyperparameters import differences

        status, spec = self._run.refresh(), self.manifest.body
        differs = ", ".join(f"{name}={value}" for name, value, _ in differences(spec.hyperparameters))
        facts = [
            ("state", status.state + (f": {status.reason}" if status.reason else "")),
            ("base model", spec.model.name),
            ("training", f"{spec.hyperparameters.training_strategy}, {spec.method}, {spec.precision}"),
            ("differs from the defaults", differs or "nothing"),
            ("record", self.uri),
        ]
        return run_html(f"job {self.id}", self.metrics(), facts)

    def __repr__(self) -> str:
        return f"TrainingJob(id={self.id!r}, uri={self.uri!r})"
