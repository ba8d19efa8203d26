"""Parameters of PAI's SDK that have no meaning in Palate, and why. Rows of data; knows no recipe."""

from __future__ import annotations

from palate.errors import UnsupportedParameterError
from palate.submission import CHANNELS

_NO_MEANING = {
    "source_dir": "the training program is Palate's own; its behaviour is set by hyperparameters",
    "command": "the training program is Palate's own; its behaviour is set by hyperparameters",
    "requirements": "the training program runs in a pinned environment: add packages to the environment or the image",
    "job_type": "every training is one job of one program",
    "spot_spec": "where a run is placed is the backend's matter; it has no spot market",
    "resource_id": "where a run is placed is the backend's matter: choose backend=",
    "resource_type": "where a run is placed is the backend's matter: choose backend=",
    "user_vpc_config": "Palate knows endpoints, not Alibaba's networks",
    "experiment_config": "metrics and TensorBoard files lie beside the job: see job.metrics() and job.output_path('tensorboard')",
    "input_channels": f"the channels are fixed: {', '.join(CHANNELS)}",
    "output_channels": "outputs are fixed: model, checkpoints, tensorboard; see job.output_path()",
    "outputs": "outputs lie in the job's own prefix: see job.output_path(), and Session(store=…) to choose where jobs are kept",
    "inference_spec": "what a service runs follows from the job; options= sets engine, port and limits",
}


def refuse(**parameters: object) -> None:
    """Refuses each parameter that was given.

    Args:
        parameters: By name, which has a row here; None when it was left out.

    Raises:
        UnsupportedParameterError: Names the parameter, its value, and why it has no meaning here.
    """
    for name, value in parameters.items():
        if value is not None:
            raise UnsupportedParameterError(
                f"{name}={value!r} has no meaning in Palate: {_NO_MEANING[name]}. Leave it out"
            )
