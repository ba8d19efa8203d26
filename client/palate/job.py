"""A training job: a URI in a store that can be followed, stopped and deployed from anywhere. Knows no training."""

from __future__ import annotations

import builtins
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palate.backends import PlacementRequest
from palate.checksums import read_model_digests
from palate.common.utils import check_name
from palate.runs.handle import RunHandle
from palate.runs.list import RunFilter, find_runs
from palate.runs.record import Record, events_once, locate
from palate.session import Session, get_default_session
from palate_recipes.errors import ConfigurationError, DamagedFilesError, JobNotReadyError, TrainingJobError
from palate_recipes.specs.diagnose import Reading, read_run
from palate_recipes.specs.run import State, Status, TrainManifest

if TYPE_CHECKING:
    from palate.predictor import Predictor, ServedModel


class TrainingJob:
    """A training job in a store.

    Made by `ModelTrainingRecipe.train`, or found again with `TrainingJob.get` or `attach`, by any process that reaches
    the store.
    """

    def __init__(self, record: Record, session: Session) -> None:
        self._run = RunHandle(record, session)

    @classmethod
    def get(cls, training_job_id: str, session: Session | None = None) -> TrainingJob:
        """Returns the job of that id (or URI).

        Raises:
            RunNotFoundError: There is none in the session's store.
            ConfigurationError: No job can have this id.
        """
        session = session or get_default_session()
        if "/" in training_job_id:
            root, kind, name = locate(training_job_id)
            if kind != "jobs":
                raise ConfigurationError(f"{training_job_id!r} is a service: Predictor({name!r}) holds it")
            session = Session(session.region_id, store=root, backend=session.backend, options=session.options)
        else:
            name = training_job_id
        check_name("training_job_id", name)
        job = cls(Record(session.store, "jobs", name), session)
        with suppress(DamagedFilesError):  # it can still be deleted
            _ = job.manifest  # raises when there is none
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
            status: Only those in this state.
            session: Default: the default session.
            page_size: Jobs a page.
            page_number: Page, from 1.
            name: Glob for their ids, such as `qwen2-*`.
            model: Glob for the name of their model.
            labels: Only those that have these labels, with these values.
            since_s: Only those created at most so many seconds ago.
            min_attempts: Only those that were begun so often at least.

        Raises:
            ConfigurationError: An argument that lets nothing through.
            StoreError: The store, or a job of it, cannot be read.
            DamagedFilesError: A job's record is no record.
        """
        if page_size < 1 or page_number < 1:
            raise ConfigurationError(f"page_size={page_size!r} and page_number={page_number!r} must be 1 or more")
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
        """What was asked for: weights source, resolved hyperparameters, input digests. `describe().details` has the versions."""
        manifest = self._run.manifest
        assert isinstance(manifest, TrainManifest)  # no other is read from a job's record
        return manifest

    @property
    def status(self) -> State:
        """Where it stands: Creating, Running, Stopping, Succeeded, Failed or Stopped."""
        return self._run.refresh().state

    def describe(self) -> Status:
        """Returns the whole status: state, reason, times, exit code, details."""
        return self._run.refresh()

    def is_succeeded(self) -> bool:
        return self.status == "Succeeded"

    def is_completed(self) -> bool:
        """Returns whether it has ended, in whatever way."""
        return self._run.refresh().is_terminal

    # ── what it says and gives ──────────────────────────────────────────────────────────────────────────────────────

    def logs(self, follow: bool = False) -> Iterator[str]:
        """Yields the log line by line; with `follow`, goes on until the job has ended."""
        return self._run.lines(follow=follow)

    def metrics(self) -> builtins.list[dict[str, Any]]:
        """Returns every logged metrics object in order, by TRL's names.

        Those of `kind` `train` have step, epoch, loss, learning_rate, rewards/margins and so on, those of `kind` `eval`
        eval_loss, eval_rewards/accuracies and so on. `start` comes first with sizes, `end` last with final figures and reading.
        After a resume each step is there once, and a `start` for each attempt.
        """
        return events_once(self._run.record.metrics())

    def reading(self) -> Reading:
        """Returns what the metrics say in words, whether the job has ended or not.

        Its `verdict` is one of learning, over-fitting, not learning, unstable, saturated, too early to tell; its `text` has
        the figures and what to change. See "Watching a run" in docs/training.md.
        """
        return read_run(self.metrics())

    def output_path(self, channel_name: str = "model") -> str:
        """Returns the URI of an output of the job.

        Args:
            channel_name: `model` (adapter or weights), `checkpoints`, or `tensorboard`.
        """
        channels = ("model", "checkpoints", "tensorboard")
        if channel_name not in channels:
            raise ConfigurationError(
                f"channel_name={channel_name!r} is no output of a job: choose one of {', '.join(channels)}"
            )
        return f"{self.uri}/{channel_name}"

    @property
    def model_uri(self) -> str:
        """URI of what the job made: for `inputs["adapter"]` of a further training, after LoRA.

        Raises:
            JobNotReadyError: The job has not succeeded.
        """
        self.require_model()
        return self.output_path("model")

    # ── what can be done with it ────────────────────────────────────────────────────────────────────────────────────

    def wait(self, interval: float = 1.0, show_logs: bool = True, *, timeout_s: float | None = None) -> TrainingJob:
        """Waits until the job has succeeded.

        Args:
            interval: Seconds between two looks.
            show_logs: Shows a live view on a terminal, log lines elsewhere, on stderr.
            timeout_s: Seconds after which WaitTimeoutError is raised; the job goes on. None waits without end.

        Returns:
            The job itself.

        Raises:
            TrainingJobError: It failed or was stopped; carries the reason and the last log lines.
        """
        status = self._run.follow(
            until=lambda status: status.is_terminal,
            show_logs=show_logs,
            timeout_s=timeout_s,
            interval_s=interval,
            what="the end of the training",
        )
        if status.state != "Succeeded":
            verb = "was stopped" if status.state == "Stopped" else "failed"
            raise TrainingJobError(f"job {self.id} {verb}", reason=status.reason, log_tail=list(status.log_tail))
        return self

    def stop(self, *, grace_s: float = 150.0) -> None:
        """Stops the job: it writes a checkpoint and ends; by force after `grace_s` seconds. Ended already is no error."""
        self._run.stop(grace_s=grace_s)

    def resume(
        self,
        *,
        environments: Mapping[str, str] | None = None,
        wait: bool = True,
        show_logs: bool = True,
    ) -> TrainingJob:
        """Goes on with a failed or stopped job, from its last whole checkpoint: its result equals that of a run without a break.

        Without a checkpoint it begins anew. It is given `max_attempts` attempts again, and `max_run_time` for each.

        Args:
            environments: Values of the variables that it was started with; what this process has in its own
                environment need not be given.
            wait: Whether to wait until it has succeeded.
            show_logs: With `wait`: a live view on a terminal, log lines elsewhere, on stderr.

        Returns:
            The job itself.

        Raises:
            JobNotReadyError: It runs, or has succeeded.
            ConfigurationError: A value of `environments` is missing.
            TrainingJobError: With `wait`: it failed or was stopped again.
        """
        status = self._run.refresh()
        if status.state not in ("Failed", "Stopped"):
            remedy = "it has its model" if status.state == "Succeeded" else f"follow it with `palate watch {self.id}`"
            raise JobNotReadyError(
                f"job {self.id} is {status.state}: only a failed or stopped one is resumed; {remedy}"
            )
        known = self._run.environments(environments)
        begun = self._run.restart(
            expect={"Failed", "Stopped"},
            attempt=status.attempt,
            more=self.manifest.body.max_attempts,
            environments=known,
        )
        if not begun:
            raise JobNotReadyError(
                f"job {self.id} was resumed by somebody else just now: follow it with `palate watch {self.id}`"
            )
        if wait:
            self.wait(show_logs=show_logs)
        return self

    def delete(self) -> None:
        """Stops the job if it runs, and removes it with its model and checkpoints. Its record may be damaged."""
        self._run.delete()

    def save_model(self, uri: str | Path, *, session: Session | None = None) -> str:
        """Copies the model, adapter or full weights as the job made it, to another place, with a model card.

        Every file is checked against its SHA-256 before and after. `digests.json` comes last: without it a copy is not whole,
        and saving there again finishes it.

        Args:
            uri: An empty folder, or one to be made: a path, `file://`, `s3://`, `oss://`; or `hf://OWNER/NAME`, a model
                repository of the Hugging Face hub, made private when it is missing (HF_TOKEN with write access).
            session: Credentials and endpoint for `uri`; default: the job's own.

        Returns:
            The URI of what was written; of the hub with its commit.

        Raises:
            JobNotReadyError: The job has not succeeded.
            NameTakenError: The folder holds something else.
            DamagedFilesError: The model is not what the training wrote, or did not arrive as it was sent.
            StoreError: The place refuses or does not answer.
            ConfigurationError: The hub is meant and there is no token.
        """
        from palate.publish import save

        self.require_model()
        record = self._run.record
        return save(record, self.manifest, record.status(), uri, session or self._run.session)

    def require_model(self) -> None:
        """Checks that there is a model: nothing else may be deployed or read.

        Raises:
            JobNotReadyError: The job has not succeeded.
            DamagedFilesError: A file of its model is missing or has another size.
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
            else f"see why (`palate logs {self.id}`), then `palate resume {self.id}` or train again"
        )
        reason = f": {status.reason}" if status.reason else ""
        raise JobNotReadyError(f"job {self.id} is {status.state}{reason}. Only a succeeded job has a model: {remedy}")

    def deploy(
        self,
        service_name: str | None = None,
        *,
        instance_type: str | None = None,
        instance_count: int | None = 1,
        resource_config: object = None,
        options: dict[str, Any] | None = None,
        wait: bool = True,
        show_logs: bool = False,
    ) -> Predictor:
        """Serves the job's model; see `ModelTrainingRecipe.deploy`.

        Raises:
            JobNotReadyError: The job has not succeeded.
            DamagedFilesError: Its model is not what the training wrote. The service's runner compares every digest, and
                fails with this as its reason.
        """
        from palate.deploy import start_service

        return start_service(
            self._run.session,
            service_name=service_name or f"{self.id}-service",
            served=self.served_model(),
            options=options,
            where=PlacementRequest(
                kind="services",
                instance_type=instance_type,
                instance_count=instance_count,
                resource_config=resource_config,
            ),
            wait=wait,
            show_logs=show_logs,
        )

    def served_model(self) -> ServedModel:
        """Returns what a service of this job serves; raises as `deploy` does."""
        from palate.predictor import ServedModel

        self.require_model()
        body = self.manifest.body
        return ServedModel(
            model=body.model,
            tuned_uri=self.output_path("model"),
            tuned_digest=self._run.record.status().details.get("model_digest"),
            adapter=body.method != "Standard_LLM",
            system_prompt=body.hyperparameters.system_prompt,
            labels={"job": self.id},
        )

    def __repr__(self) -> str:
        return f"TrainingJob(id={self.id!r}, uri={self.uri!r})"
