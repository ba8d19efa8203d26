"""Names of PAI's SDK that Palate provides, and remedies for those it does not. Data only; knows no import machinery."""

from __future__ import annotations

PROVIDED: dict[str, dict[str, str]] = {
    "pai": {},
    "pai.common": {},
    "pai.common.utils": {"random_str": "palate.common.utils"},
    "pai.job": {"TrainingJob": "palate.job"},
    "pai.model": {"ModelTrainingRecipe": "palate.model", "RegisteredModel": "palate.model"},
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
_CONSOLE = "there is no console: use `palate jobs`, `palate services` and `palate logs NAME`"

MISSING: dict[str, dict[str, str]] = {
    "pai.common.utils": {
        "make_list_resource_iterator": "list() returns everything as a list",
        "to_plain_text": "use str()",
        **dict.fromkeys(("is_local_run_instance_type", "is_filesystem_uri", "is_odps_table_uri"), _DATA),
    },
    "pai.job": {
        "TrainingJobStatus": "TrainingJob.status is a str: Creating, Running, Stopping, Succeeded, Failed or Stopped",
        "ExperimentConfig": "metrics and TensorBoard files are stored with the job: job.metrics(), job.output_path('tensorboard')",
        **dict.fromkeys(("InstanceSpec", "UserVpcConfig"), _PLACE),
        **dict.fromkeys(("Channel", "UriInput", "UriOutput", "OssLocation"), _DATA),
        **dict.fromkeys(("AlgorithmSpec", "CodeDir", "LocalTrainingJob", "ModelTrainingSpec"), _RECIPE),
        "HyperParameterDefinition": "ModelTrainingRecipe.hyperparameter_definitions lists them as dicts",
    },
    "pai.model": {
        "ModelRecipe": _RECIPE,
        "ModelRecipeType": _RECIPE,
        "Model": "give its folder or URI as ModelTrainingRecipe(model_uri=...); " + _DEPLOY,
        **dict.fromkeys(("ModelFormat", "InferenceSpec", "container_serving_spec", "ResourceConfig"), _DEPLOY),
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
    "pai.estimator": _RECIPE,
    "pai.processor": _RECIPE,
    "pai.huggingface": _RECIPE,
    "pai.modelscope": _RECIPE,
    "pai.tensorboard": "TensorBoard files are at job.output_path('tensorboard')",
    "pai.experiment": "metrics and TensorBoard files are stored with the job: job.metrics(), job.output_path('tensorboard')",
    "pai.image": "ModelTrainingRecipe(image_uri=...) takes an image's address, on backends that run images",
    "pai.serializers": _JSON,
    "pai.exception": _REASON,
    "pai.dataset": _DATA,
    "pai.code_source": _RECIPE,
    "pai.common.oss_utils": _DATA,
    "pai.common.consts": "give the value itself, such as a str",
    "pai.common.logging": "use the standard library's logging",
    "pai.common.configs": _PLACE,
    "pai.pipeline": "call train() and deploy() one after the other: each returns the next noun",
    "pai.operator": "call train() and deploy() one after the other: each returns the next noun",
    "pai.dsw": "a notebook does not need it",
    "pai.api": "Palate uses no Alibaba service except the object store: see session.store",
    "pai.libs": "Palate uses no Alibaba service except the object store: see session.store",
}
"""Modules of PAI's SDK without any name in Palate. They can be imported, and each of their names raises with the remedy."""

ATTRIBUTES: dict[tuple[str, str], dict[str, str]] = {
    ("palate.session", "Session"): {
        "oss_bucket": "session.store reads and writes objects (get, put, list, upload_tree, download_tree)",
        "workspace_name": "Palate has no workspaces",
        "console_uri": _CONSOLE,
        "provider": "Palate has no accounts",
        "is_supported_training_instance": _PLACE,
        "is_supported_inference_instance": _PLACE,
        "is_gpu_training_instance": "`palate doctor` says which device is used",
        "is_gpu_inference_instance": "`palate doctor` says which device is used",
    },
    ("palate.job", "TrainingJob"): {
        "training_job_id": "use id",
        "training_job_name": "use id",
        "training_job_url": "use uri",
        "console_uri": _CONSOLE,
        "reason_code": "use describe().reason",
        "reason_message": "use describe().reason",
    },
    ("palate.model", "RegisteredModel"): {
        "list_versions": "a version is a revision on the Hugging Face hub: give model_version=",
        "delete": "the catalog is part of Palate; TrainingJob.delete() deletes a job with its model",
        "model_recipe": "use training_recipe()",
        "get_recipe_spec": "use training_recipe().hyperparameter_definitions",
        "get_estimator": "use training_recipe()",
        "get_estimator_inputs": "models come without data: give your preference data in train(inputs=...)",
        "get_evaluation_processor": "give train(inputs={'train': ..., 'validation': ...}) and read job.metrics()",
    },
    ("palate.predictor", "Predictor"): {
        "console_uri": _CONSOLE,
        "inspect_model_signature_def": "the API is OpenAI's: raw_predict(path='/v1/models', method='GET') lists the models",
        "deploy": _DEPLOY,
        "internet_endpoint": "use endpoint",
        "intranet_endpoint": "use endpoint",
    },
}
"""Attributes that PAI's classes have and Palate's do not, with a remedy, by Palate's module and class."""
