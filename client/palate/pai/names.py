"""Names of PAI's SDK that Palate provides, and remedies for those it does not. Data only; knows no import machinery.

`surface.json` in this folder lists all names of the SDK; docs/tools/pai_surface.py writes it.
"""

from __future__ import annotations

VERSION = __version__ = "0.4.13+palate"
"""The version of PAI's SDK whose names are known here. The local part says that it is not PAI's own."""

PROVIDED: dict[str, dict[str, str]] = {
    "pai": {"__version__": "palate.pai.names"},
    "pai.version": {"VERSION": "palate.pai.names"},
    "pai.common": {},
    "pai.common.utils": {"random_str": "palate.common.utils"},
    "pai.job": {"TrainingJob": "palate.job"},
    "pai.model": {
        "ModelTrainingRecipe": "palate.model",
        "RegisteredModel": "palate.model",
        "ResourceConfig": "palate.model",
    },
    "pai.predictor": {"Predictor": "palate.predictor"},
    "pai.session": {
        "Session": "palate.session",
        "get_default_session": "palate.session",
        "setup_default_session": "palate.session",
    },
}
"""PAI's modules: name -> module of Palate that provides it."""

_RECIPE = "train with pai.model.ModelTrainingRecipe, which runs Palate's own training program"
_DATA = "give the local path, or an oss:// or s3:// URI, in train(inputs=...): Palate copies and reads it itself"
_DEPLOY = (
    "deploy with ModelTrainingRecipe.deploy() or RegisteredModel(name).deploy(); options= sets engine, port and limits"
)
_PLACE = "the backend decides where a run is placed: see docs/backends.md"
_JSON = "bodies are JSON: Predictor.predict() and raw_predict() take and return it"
_REASON = "catch palate.errors.PalateError, the base of all errors of Palate"
_NO_SERVICE = "Palate uses no Alibaba service except the object store: see session.store"
_HELPER = "it is a helper of PAI's SDK itself: use the standard library, or copy the function into the script"
_STEPS = "call train() and deploy() one after the other: each returns the next noun"
_METRICS = "metrics and TensorBoard files are stored with the job: job.metrics(), job.output_path('tensorboard')"
_CONSOLE = "there is no console: use `palate jobs`, `palate services` and `palate logs NAME`"

MISSING: dict[str, dict[str, str]] = {
    "pai.common.utils": {
        "make_list_resource_iterator": "list() returns everything as a list",
        "to_plain_text": "use str()",
        **dict.fromkeys(("is_local_run_instance_type", "is_filesystem_uri", "is_odps_table_uri"), _DATA),
    },
    "pai.job": {
        "TrainingJobStatus": "TrainingJob.status is a str: Creating, Running, Stopping, Succeeded, Failed or Stopped",
        "ExperimentConfig": _METRICS,
        **dict.fromkeys(("InstanceSpec", "UserVpcConfig", "SpotSpec", "SpotStrategy", "ResourceType"), _PLACE),
        **dict.fromkeys(("Channel", "UriInput", "UriOutput", "OssLocation"), _DATA),
        **dict.fromkeys(("AlgorithmSpec", "CodeDir", "LocalTrainingJob", "ModelTrainingSpec"), _RECIPE),
        "HyperParameterDefinition": "ModelTrainingRecipe.hyperparameter_definitions lists them as dicts",
    },
    "pai.model": {
        "ModelRecipe": _RECIPE,
        "ModelRecipeType": _RECIPE,
        "Model": "give its folder or URI as ModelTrainingRecipe(model_uri=...); " + _DEPLOY,
        **dict.fromkeys(("ModelFormat", "InferenceSpec", "container_serving_spec"), _DEPLOY),
        **dict.fromkeys(
            (
                "StorageConfigBase",
                "NfsStorageConfig",
                "NodeStorageConfig",
                "OssStorageConfig",
                "RawStorageConfig",
                "SharedMemoryConfig",
            ),
            _DEPLOY,
        ),
    },
    "pai.predictor": {
        "ServiceStatus": "Predictor.service_status is a str: Creating, Running, Stopping, Stopped or Failed",
        "EndpointType": "a service has one endpoint: omit endpoint_type, or set it to 'INTERNET'",
        "AsyncPredictor": "Predictor.async_openai() is the asynchronous client",
        "LocalPredictor": "on the process backend every service is local: use Predictor",
        "RawResponse": "raw_predict() returns an httpx.Response",
        **dict.fromkeys(("PredictorBase", "ServiceType", "WaitConfig", "AsyncTask"), "use Predictor"),
    },
    "pai.session": {
        "config_default_session": "call get_default_session()",
        "load_default_config_file": "a session loads its saved configuration automatically",
    },
}
"""Names that PAI's modules have and Palate does not, with a remedy."""

MISSING_MODULES: dict[str, str] = {
    "pai.common": _HELPER,
    "pai.job": _RECIPE,
    "pai.model": _DEPLOY,
    "pai.predictor": "use Predictor",
    "pai.session": "call get_default_session() or setup_default_session()",
    "pai.toolkit": "settings are arguments of setup_default_session() or environment variables: see docs/stores.md",
    "pai.tracking": _METRICS,
    "pai.estimator": _RECIPE,
    "pai.processor": _RECIPE,
    "pai.huggingface": _RECIPE,
    "pai.modelscope": _RECIPE,
    "pai.tensorboard": "TensorBoard files are at job.output_path('tensorboard')",
    "pai.experiment": _METRICS,
    "pai.image": "ModelTrainingRecipe(image_uri=...) takes an image's address, on backends that run images",
    "pai.serializers": _JSON,
    "pai.exception": _REASON,
    "pai.dataset": _DATA,
    "pai.code_source": _RECIPE,
    "pai.common.oss_utils": _DATA,
    "pai.common.consts": "give the value itself, such as a str",
    "pai.common.logging": "use the standard library's logging",
    "pai.common.configs": _PLACE,
    "pai.pipeline": _STEPS,
    "pai.operator": _STEPS,
    "pai.dsw": "a notebook does not need it",
    "pai.api": _NO_SERVICE,
    "pai.libs": _NO_SERVICE,
}
"""Remedies for all other names, by module, also for its submodules. A module that is not in PROVIDED has no name in Palate."""

REST = "*"
"""In ATTRIBUTES: the remedy for all other members of the class."""


ATTRIBUTES: dict[tuple[str, str], dict[str, str]] = {
    ("palate.model", "ModelTrainingRecipe"): {
        REST: "docs/pai.md lists every parameter of a recipe, with the reason where Palate has no such setting",
        "build_inputs": _DATA,
        "build_outputs": "the outputs are in the job's folder: job.output_path()",
        "output_path": "the outputs are in the job's folder: job.output_path()",
        "supported_instance_types": _PLACE,
    },
    ("palate.session", "Session"): {
        REST: _NO_SERVICE,
        "credential_config": "it is an object of Alibaba's SDK: session.environment() has the credentials of the store",
        "get_oss_bucket": "palate.store.open_store('oss://BUCKET', options=session.options) reads and writes objects",
        "oss_bucket": "session.store reads and writes objects (get, put, list, upload_tree, download_tree)",
        "console_uri": _CONSOLE,
        "provider": "Palate has no accounts",
        "is_supported_training_instance": _PLACE,
        "is_supported_inference_instance": _PLACE,
        "is_gpu_training_instance": "`palate doctor` says which device is used",
        "is_gpu_inference_instance": "`palate doctor` says which device is used",
    },
    ("palate.job", "TrainingJob"): {
        REST: "job.manifest has the job's definition, job.describe() its state",
        "training_job_id": "use id",
        "training_job_name": "use id",
        "training_job_url": "use uri",
        "console_uri": _CONSOLE,
        "reason_code": "use describe().reason",
        "reason_message": "use describe().reason",
    },
    ("palate.model", "RegisteredModel"): {
        REST: "RegisteredModel.row has what the catalog knows of a model",
        "register": "a finished job is deployed by job.deploy(), and its model is trained further by train(inputs={'adapter': ...})",
        "download": "the weights are fetched by the run that uses them",
        "list_versions": "a version is a revision on the Hugging Face hub: give model_version=",
        "delete": "the catalog is part of Palate; TrainingJob.delete() deletes a job with its model",
        "model_recipe": "use training_recipe()",
        "get_recipe_spec": "use training_recipe().hyperparameter_definitions",
        "get_estimator": "use training_recipe()",
        "get_estimator_inputs": "models come without data: give your preference data in train(inputs=...)",
        "get_eval_processor": "give train(inputs={'train': ..., 'validation': ...}) and read job.metrics()",
    },
    ("palate.predictor", "Predictor"): {
        REST: "describe_service() has what is known of a service",
        "console_uri": _CONSOLE,
        "inspect_model_signature_def": "the API is OpenAI's: raw_predict(path='/v1/models', method='GET') lists the models",
        "deploy": _DEPLOY,
        "internet_endpoint": "use endpoint",
        "intranet_endpoint": "use endpoint",
    },
}
"""Attributes that PAI's classes have and Palate's do not, with a remedy, by Palate's module and class."""
