"""Recipes and catalog models: what to train, how, and on what; what to serve as it is. Knows the schema and the catalog, no run.

The parameters are those of PAI's `ModelTrainingRecipe`, in its order; parameters that Palate does not support are rejected by name.
"""

from __future__ import annotations

import builtins
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec.structs import asdict

from palate.backends import Backend, PlacementRequest, get_backend
from palate.backends.limits import ResourceConfig as ResourceConfig
from palate.common.utils import check_name, unique_name
from palate.job import OUTPUT_CHANNELS, TrainingJob
from palate.parameters import refuse, reject_unknown_keywords
from palate.session import Session, get_default_session
from palate.sources.hub_model import hub_model
from palate.submit import CHANNELS, check_channels, submit
from palate.weights import LABEL as STAND_IN_LABEL
from palate.weights import base_model, find_row, find_weights, has_stand_in, one_revision, stand_in_for
from palate_recipes.catalog import Model, find_model, models
from palate_recipes.errors import ConfigurationError, JobNotReadyError, UnsupportedParameterError
from palate_recipes.hyperparameters import METHODS, Resolved, as_definitions, check_method, resolve, validate
from palate_recipes.specs.train import TrainSpec
from palate_recipes.trackers import variables

if TYPE_CHECKING:
    from palate.estimate import Estimate
    from palate.predictor import Predictor
    from palate.sources.inputs import PreferenceData, Rows


# A PAI script finds both in this module.
__all__ = ["ModelTrainingRecipe", "RegisteredModel"]

DEFAULT_METHOD = "LoRA_LLM"


@reject_unknown_keywords
class ModelTrainingRecipe:
    """A model, a method and hyperparameters, ready to train on preference data.

    Args:
        model_name: A name of the catalog (`palate models`), or the id of any other model on the hub: `OWNER/NAME` or
            `hf://OWNER/NAME[@revision]`.
        model_version: Revision of the weights on the hub: branch, tag or commit.
        model_provider: Publisher, checked against the catalog; `pai` matches any.
        model_uri: A folder, object-store URI or `hf://` URI with config, weights and tokenizer; overrides the catalog's source.
        method: `LoRA_LLM` (default), `QLoRA_LLM` or `Standard_LLM` (full fine-tuning, also `Standard`).
        source_dir: Not supported.
        model_channel_name: Must be `model`, PAI's default.
        hyperparameters: By PAI's names, validated now; see `hyperparameter_definitions` and docs/hyperparameters.md.
        job_type: Not supported.
        image_uri: Image of the trainer, on backends that run images.
        command: Not supported.
        instance_count: Number of machines, on backends that support it.
        instance_type: Type of machine, on backends that support it.
        spot_spec: Not supported.
        instance_spec: Limits such as `{"cpu": 8, "memory": "32g"}`, on backends that support them.
        resource_id: Not supported.
        resource_type: Not supported.
        user_vpc_config: Not supported.
        labels: Key-value pairs, recorded with the job.
        requirements: Not supported.
        environments: Environment variables of the training program; their values are never recorded. Those of this process that
            configure a tracker in `report_to`, such as MLFLOW_TRACKING_URI, are added.
        experiment_config: Not supported.
        input_channels: Not supported.
        output_channels: Not supported.
        max_run_time: Time limit of one attempt in seconds; then the job fails and its checkpoints are kept.
        default_training_inputs: Inputs of `train()` when none are given.
        base_job_name: Prefix of job ids; default: model and strategy.
        backend: Name or instance of a backend; default: the session's.
        session: Default: the default session.
        max_attempts: Maximum number of attempts; each continues from the last complete checkpoint.

    Raises:
        HyperparameterError: Lists every bad value with its bounds, every unknown name with the nearest known one.
        UnknownModelError: Names the nearest models.
        UnsupportedParameterError: Names the parameter and why Palate does not support it.
    """

    def __init__(
        self,
        model_name: str | None = None,
        model_version: str | None = None,
        model_provider: str | None = None,
        model_uri: str | None = None,
        method: str | None = None,
        source_dir: str | None = None,
        model_channel_name: str = "model",
        hyperparameters: Mapping[str, Any] | None = None,
        job_type: object = None,
        image_uri: str | None = None,
        command: object = None,
        instance_count: int | None = None,
        instance_type: str | None = None,
        spot_spec: object = None,
        instance_spec: object = None,
        resource_id: str | None = None,
        resource_type: object = None,
        user_vpc_config: object = None,
        labels: Mapping[str, str] | None = None,
        requirements: list[str] | None = None,
        environments: Mapping[str, str] | None = None,
        experiment_config: object = None,
        input_channels: object = None,
        output_channels: object = None,
        max_run_time: int | None = None,
        default_training_inputs: Mapping[str, str] | None = None,
        base_job_name: str | None = None,
        *,
        backend: str | Backend | None = None,
        session: Session | None = None,
        max_attempts: int = 1,
    ) -> None:
        refuse(
            source_dir=source_dir,
            job_type=job_type,
            command=command,
            spot_spec=spot_spec,
            resource_id=resource_id,
            resource_type=resource_type,
            user_vpc_config=user_vpc_config,
            requirements=requirements,
            experiment_config=experiment_config,
            input_channels=input_channels,
            output_channels=output_channels,
        )
        if model_channel_name != "model":
            raise UnsupportedParameterError(
                f"model_channel_name={model_channel_name!r} is not supported: the channel is always 'model'; omit it"
            )
        if max_run_time is not None and not (
            isinstance(max_run_time, int | float)
            and not isinstance(max_run_time, bool)
            and math.isfinite(max_run_time)
            and max_run_time > 0
        ):
            raise ConfigurationError(f"max_run_time={max_run_time!r}: expected seconds above 0, or None for no limit")
        if isinstance(max_attempts, bool) or not isinstance(max_attempts, int) or max_attempts < 1:
            raise ConfigurationError(
                f"max_attempts={max_attempts!r} must be a whole number, 1 or more; 1 means no retry"
            )
        self.session = _with_backend(session or get_default_session(), backend)
        self.placement = self.session.backend.place(
            PlacementRequest(
                kind="jobs",
                image_uri=image_uri,
                instance_type=instance_type,
                instance_count=instance_count,
                instance_spec=instance_spec,
            )
        )
        self.image_uri = image_uri
        self.instance_type = instance_type
        self.instance_count = instance_count
        self.input_channels = builtins.list(CHANNELS)
        self.output_channels = builtins.list(OUTPUT_CHANNELS)
        self.model_provider = model_provider
        self.labels = dict(labels or {})
        if model_name is not None and model_uri is None and (found := hub_model(model_name)):
            model_name, model_version = found.repo, one_revision(model_name, model_version)
        if model_name is not None and model_uri is None and (other := stand_in_for(model_name)):
            # A revision and a publisher are those of the model that was asked for.
            model_name, model_uri, model_version, model_provider = other.name, other.uri, None, None
            self.labels[STAND_IN_LABEL] = other.for_name
        # `Standard` is the name that a notebook of PAI's SDK uses.
        self.method = check_method("Standard_LLM" if method == "Standard" else method or DEFAULT_METHOD)
        self._given = validate(hyperparameters, method=self.method)
        if model_name is not None:
            self._row: Model | None = (
                find_row(model_name, provider=model_provider) if model_uri is None else _row_if_known(model_name)
            )
        elif model_uri is None:
            raise ConfigurationError(
                "no model given: set model_name= (`palate models` lists them) or model_uri= (any folder)"
            )
        else:
            self._row = None
        self.model_name = model_name or _name_in(str(model_uri))
        self.model_version = model_version
        self.model_uri = model_uri
        self.environments = dict(environments or {})
        self.max_run_time = max_run_time
        self.max_attempts = max_attempts
        self.default_inputs: dict[str, str] = dict(default_training_inputs or {})
        self.base_job_name = base_job_name
        self._jobs: list[TrainingJob] = []

    # ── settings ────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """All hyperparameters as the training on the session's backend would use them, defaults included."""
        return asdict(self.resolve().values)

    @property
    def hyperparameter_definitions(self) -> list[dict[str, Any]]:
        """Name, type, default, bounds, unit and meaning of every hyperparameter (PAI's keys)."""
        return as_definitions()

    def resolve(self) -> Resolved:
        """Returns hyperparameters, precision, and a note for each value that was adapted to the machine."""
        return resolve(self._given, method=self.method, device=self.session.backend.device(self.placement))

    # ── training ────────────────────────────────────────────────────────────────────────────────────────────────────

    def train(
        self,
        inputs: Mapping[str, str | Path | Rows | PreferenceData] | None = None,
        outputs: object = None,
        wait: bool = True,
        job_name: str | None = None,
        show_logs: bool = True,
        *,
        servable: bool = True,
    ) -> TrainingJob:
        """Checks everything and submits a training job.

        Args:
            inputs: Preference data by channel: `train`, and optionally `validation`; a path, folder, glob or URI (`file://`, `s3://`,
                `oss://`, `hf://`, `gsheet://`), rows (a list of dicts,
                `datasets.Dataset`, `pandas.DataFrame`), or a `PreferenceData` that says how to read it.
                `adapter` is the model folder of a finished LoRA job to continue from (`job.model_uri`), such as SFT before
                DPO: its rank, alpha and layers apply, and under DPO it is also the reference.
            outputs: Not supported: outputs are in the job's folder.
            wait: Whether to wait until the job has succeeded.
            job_name: The job's id; default: a unique one from `base_job_name`.
            show_logs: With `wait`: a live view on a terminal, log lines elsewhere, on stderr.
            servable: Whether to reject a training whose result no engine could serve. False trains it with a note.

        Returns:
            The job.

        Raises:
            UnservableError: No engine could serve the result.
            DataError: An input cannot be read; names file, row, field and remedy.
            NotEnoughMemoryError: The model cannot fit.
            NameTakenError: `job_name` is in use.
            TrainingJobError: With `wait`: the job failed or was stopped; has the reason and the last log lines.
        """
        refuse(outputs=outputs)
        given = self.default_inputs if inputs is None else inputs
        check_channels(given)
        if job_name is not None:
            check_name("job_name", job_name)
        spec = self._spec()
        base_name = self.base_job_name or f"{self.model_name}-{spec.hyperparameters.training_strategy}"
        job = submit(
            spec,
            self.session,
            inputs=given,
            row=self._row,
            job_name=check_name("job_name", job_name or unique_name(base_name)),
            labels=self.labels,
            environments=self._variables(spec.hyperparameters.report_to),
            announce=show_logs,
            notes=not wait,
            servable=servable,
        )
        self._jobs.append(job)
        if wait:
            job.wait(show_logs=show_logs)
        return job

    run = train

    def estimate(
        self,
        inputs: Mapping[str, str | Path | Rows | PreferenceData] | None = None,
        *,
        job_name: str | None = None,
        servable: bool = True,
        price_per_hour: float | None = None,
    ) -> Estimate:
        """Checks a training as `train()` does and estimates its size, memory and time. Submits nothing and loads no weights.

        Args:
            inputs: As in `train()`.
            job_name: The job's id, checked whether it is taken; None for a unique one.
            servable: As in `train()`.
            price_per_hour: What an hour of the device costs, in any currency, for `Estimate.price`.

        Returns:
            The estimate. Problems with data, memory or store are its `errors` and `warnings`.

        Raises:
            HyperparameterError: A hyperparameter is invalid.
            ConfigurationError: The model's folder is unusable, `job_name` is not a valid id, or the price is not above 0.
        """
        from palate.estimate import estimate

        given = self.default_inputs if inputs is None else inputs
        if job_name is not None:
            check_name("job_name", job_name)
        if price_per_hour is not None and not 0 < price_per_hour < math.inf:
            raise ConfigurationError(f"price_per_hour={price_per_hour!r} is out of range: expected a number above 0")
        found = estimate(self._spec(), self.session, inputs=given, row=self._row, job_name=job_name, servable=servable)
        if price_per_hour is None or found.seconds is None:
            return found
        low, high = (seconds / 3600 * price_per_hour for seconds in found.seconds)
        return replace(found, price=(low, high))

    def _spec(self) -> TrainSpec:
        """Returns the training as far as the recipe knows it: without its data."""
        resolved = self.resolve()
        source, row = find_weights(
            self.session,
            model_name=self.model_name if self._row or not self.model_uri else None,
            model_uri=self.model_uri,
            model_version=self.model_version,
        )
        return TrainSpec(
            model=base_model(self.model_name, source, row),
            method=self.method,
            hyperparameters=resolved.values,
            given=self._given,
            precision=resolved.precision,
            notes=resolved.notes,
            max_run_time_s=self.max_run_time,
            max_attempts=self.max_attempts,
            placement=self.placement,
            environment_names=tuple(sorted(self._variables(resolved.values.report_to))),
        )

    def _variables(self, report_to: str) -> dict[str, str]:
        """Returns `environments`, and the variables of this process that configure the trackers in `report_to`."""
        return {**variables(report_to, os.environ), **self.environments}

    def job_name(self, job_name: str | None = None) -> str:
        """Returns `job_name`, or a new unique id for a job of this recipe."""
        return job_name or unique_name(self.base_job_name or self.model_name)

    @property
    def latest_job(self) -> TrainingJob | None:
        """The last job submitted by this recipe, or None."""
        return self._jobs[-1] if self._jobs else None

    def wait(self, interval: float = 5, show_logs: bool = True, all_jobs: bool = False) -> None:
        """Waits for the latest job (or all of this recipe's) to succeed; raises as `TrainingJob.wait` does."""
        for job in self._jobs if all_jobs else [self._need_job()]:
            job.wait(interval=interval, show_logs=show_logs)

    def model_data(self) -> str:
        """Returns the URI of the latest job's model.

        Raises:
            JobNotReadyError: There is no job, or it has not succeeded.
        """
        return self._need_job().model_uri

    def retrieve_scripts(self, local_path: str) -> None:
        raise UnsupportedParameterError(
            f"retrieve_scripts({local_path!r}): not supported: the training program is the installed package palate_trainer"
        )

    # ── serving ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def deploy(
        self,
        service_name: str | None = None,
        instance_type: str | None = None,
        instance_count: int | None = 1,
        resource_config: object = None,
        resource_id: str | None = None,
        options: Mapping[str, Any] | None = None,
        wait: bool = True,
        inference_spec: object = None,
        *,
        show_logs: bool = False,
        verify: bool | str = True,
        require_win_rate: float | None = None,
    ) -> Predictor:
        """Serves the latest job's model behind an OpenAI-compatible endpoint.

        `default` and the service's name are the tuned model, `base` is the untuned one (not after full fine-tuning, which has no
        adapter).

        Args:
            service_name: Name of the service; default: the job's id with `-service`.
            instance_type: Type of machine, on backends that support it.
            instance_count: Number of engines that answer requests, each with its own copy of the model. `Predictor.scale` changes it.
            resource_config: Limits, on backends that support them: `ResourceConfig(cpu=4, memory=16000)`, cores and MB,
                or a dict with these keys.
            resource_id: Not supported.
            options: `engine` (auto, vllm, transformers), `host` (default 127.0.0.1), `port` (default: a free one),
                `dtype`, `max_model_len` (tokens), `start_timeout_s`, `hang_after_s`, `time_to_live_s`, `idle_time_to_live_s`
                (default: 12 hours; None: never), `sleep_after_s` (seconds without a request after which the engines end until the
                next one), `restarts` (of an engine that ended by itself, within ten minutes; default: 3), `autoscaling` (such as
                `{"max_instances": 4}`, see `Predictor.autoscale`), `merge` (True: serve
                the adapter merged into its base, as one model),
                `chat_template` (path of a Jinja file), and of vLLM alone `quantization`, `kv_cache_dtype`,
                `tensor_parallel_size`, `gpu_memory_utilization`, `max_num_seqs`, `max_loras`, `max_lora_rank`,
                `tool_call_parser`, `reasoning_parser`, `engine_args` (list of str).
            wait: Whether to wait until the service has answered a real request.
            inference_spec: Not supported.
            show_logs: With `wait`: whether to show the engine's log.
            verify: Whether to compare the service's log-probs with the trainer's before it counts as ready. True stops a service
                that does not answer as the trained model, "warn" keeps it and says so, False does not compare.
            require_win_rate: Deploy only if the last evaluation of this model against its base (`TrainingJob.evaluate`) has a
                win-rate whose 95% interval begins at this value or above, such as 0.55.

        Returns:
            The predictor. As a context manager it deletes the service at the end.

        Raises:
            JobNotReadyError: The latest job has not succeeded.
            NameTakenError: `service_name` is in use.
            WinRateError: There is no such evaluation, or its interval begins lower. Nothing was started.
            ServiceError: The service failed to start; has the reason and the engine's last lines. Nothing keeps running.
        """
        refuse(resource_id=resource_id, inference_spec=inference_spec)
        return self._need_job().deploy(
            service_name,
            instance_type=instance_type,
            instance_count=instance_count,
            resource_config=resource_config,
            options=dict(options or {}),
            wait=wait,
            show_logs=show_logs,
            verify=verify,
            require_win_rate=require_win_rate,
        )

    def _need_job(self) -> TrainingJob:
        if not self._jobs:
            raise JobNotReadyError(
                "this recipe has no job yet: call train() first, or TrainingJob.get(id) for an earlier one"
            )
        return self._jobs[-1]

    def __repr__(self) -> str:
        return f"ModelTrainingRecipe(model_name={self.model_name!r}, method={self.method!r})"


def _with_backend(session: Session, backend: str | Backend | None) -> Session:
    if backend is None:
        return session
    chosen = get_backend(backend) if isinstance(backend, str) else backend
    return Session(session.region_id, store=session.store_uri, backend=chosen, options=session.options)


def _name_in(uri: str) -> str:
    found = hub_model(uri) if uri.startswith("hf://") else None
    return found.repo if found else uri.rstrip("/").rpartition("/")[2]


def _row_if_known(name: str) -> Model | None:
    try:
        return find_model(name)
    except LookupError:
        return None  # with model_uri=, the name is the user's own


@reject_unknown_keywords
class RegisteredModel:
    """A model of the catalog, or any model on the hub.

    Args:
        model_name: A name or alias of the catalog, or a hub id: `OWNER/NAME` or `hf://OWNER/NAME[@revision]`.
        model_version: Revision of the weights on the hub.
        model_provider: Publisher, or `pai`, which stands for any.
        session: Default: the default session.

    Attributes:
        row: The catalog's row; None for a name that only PALATE_MODEL_STAND_IN knows.

    Raises:
        UnknownModelError: Names the nearest models.
    """

    def __init__(
        self,
        model_name: str,
        model_version: str | None = None,
        model_provider: str | None = None,
        session: Session | None = None,
    ) -> None:
        # As in a recipe, a name that is replaced need not be in the catalog.
        replaced = has_stand_in(model_name)
        self.row = _row_if_known(model_name) if replaced else find_row(model_name, provider=model_provider)
        found = None if replaced else hub_model(model_name)
        self.model_name = self.row.name if self.row else found.repo if found else model_name
        self.model_version = one_revision(model_name, model_version)
        owner = self.model_name.partition("/")[0] if found else None
        self.model_provider = self.row.provider if self.row else owner or model_provider
        self._session = session

    @property
    def task(self) -> str | None:
        """`chat` or `text-generation`."""
        return self.row.tasks[-1] if self.row else None

    @property
    def model_data(self) -> str:
        """URI of the weights on the Hub, `hf://OWNER/NAME`, or of its stand-in."""
        if other := stand_in_for(self.model_name):
            return other.uri or f"hf://{find_model(other.name).hub_id}"
        repo = self.row.hub_id if self.row else self.model_name  # without a row it is the id of another hub model
        return f"hf://{repo}" + (f"@{self.model_version}" if self.model_version else "")

    @property
    def version_labels(self) -> dict[str, str]:
        """What the catalog knows of the model: family, kind, size, licence, context, and the revision if one is set."""
        if self.row is None:
            return {}
        labels = {
            "family": self.row.family,
            "kind": self.row.kind,
            "model_size": f"{self.row.parameters_b * 1e9:.0f}",
            "license": self.row.licence,
            "context": str(self.row.context),
        }
        return {**labels, "revision": self.model_version} if self.model_version else labels

    @property
    def training_spec(self) -> dict[str, Any]:
        """Methods, channels and hyperparameters of its training."""
        return {
            "methods": dict(METHODS),
            "input_channels": builtins.list(CHANNELS),
            "output_channels": builtins.list(OUTPUT_CHANNELS),
            "hyperparameters": as_definitions(),
        }

    @property
    def inference_spec(self) -> dict[str, Any]:
        """The model and engine of its service. `deploy(options=...)` sets the rest."""
        return {"model": self.model_data, "engine": "auto"}

    @classmethod
    def list(
        cls,
        model_name: str | None = None,
        model_provider: str | None = None,
        task: str | None = None,
        session: Session | None = None,
    ) -> builtins.list[RegisteredModel]:
        """Returns the catalog's models.

        Args:
            model_name: Only models with this text in their name or hub id.
            model_provider: Only models of this publisher; `pai` and `huggingface` match any.
            task: Only models for this task: `chat`, `text-generation`, or PAI's `large-language-model`, which all are.
            session: Default: the default session.
        """
        text = (model_name or "").casefold()
        publisher = (model_provider or "pai").casefold()
        return [
            cls(row.name, session=session)
            for row in models(None if task == "large-language-model" else task)
            if (text in row.name.casefold() or text in row.hub_id.casefold())
            and publisher in ("pai", "huggingface", row.provider)
        ]

    def training_recipe(
        self, method: str | None = None, hyperparameters: Mapping[str, Any] | None = None
    ) -> ModelTrainingRecipe:
        """Returns a recipe that trains this model."""

        return ModelTrainingRecipe(
            model_name=self.model_name,
            model_version=self.model_version,
            method=method,
            hyperparameters=hyperparameters,
            session=self._session,
        )

    def deploy(
        self,
        service_name: str | None = None,
        instance_count: int | None = 1,
        instance_type: str | None = None,
        resource_config: object = None,
        resource_id: str | None = None,
        options: Mapping[str, Any] | None = None,
        service_type: str | None = None,
        wait: bool = True,
        serializer: object = None,
        inference_method: str | None = None,
        *,
        inference_spec: object = None,
        show_logs: bool = False,
    ) -> Predictor:
        """Serves the untuned model. The parameters are those of `ModelTrainingRecipe.deploy`, in PAI's order.

        Args:
            service_name: Default: the model's name with a unique suffix.
            instance_count: Number of engines that answer requests, each with its own copy of the model. `Predictor.scale` changes it.
            instance_type: Type of machine, on backends that support it.
            resource_config: Limits, on backends that support them.
            resource_id: Not supported.
            options: See `ModelTrainingRecipe.deploy`.
            service_type: Not supported.
            wait: Whether to wait until the service has answered a real request.
            serializer: Not supported.
            inference_method: Not supported.
            inference_spec: Not supported.
            show_logs: With `wait`: whether to show the engine's log.
        """
        from palate.deploy import start_service
        from palate.predictor import ServedModel

        refuse(
            resource_id=resource_id,
            service_type=service_type,
            serializer=serializer,
            inference_method=inference_method,
            inference_spec=inference_spec,
        )
        session = self._session or get_default_session()
        name, uri, version, labels = self.model_name, None, self.model_version, {}
        if other := stand_in_for(name):
            name, uri, version, labels = other.name, other.uri, None, {STAND_IN_LABEL: other.for_name}
        source, row = find_weights(session, model_name=None if uri else name, model_uri=uri, model_version=version)
        return start_service(
            session,
            service_name=service_name or unique_name(name),
            served=ServedModel(model=base_model(name, source, row), labels=labels),
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

    def __repr__(self) -> str:
        return f"RegisteredModel(model_name={self.model_name!r}, model_provider={self.model_provider!r})"
