"""Every error that Palate raises on purpose, in one tree. Knows nothing else.

PalateError
├── HyperparameterError (ValueError)        unknown, wrong type, out of bounds, contradictory
├── UnknownModelError (LookupError)         not in the catalog
├── DataError (ValueError)                  a preference file cannot be used
├── CheckError (RuntimeError)               a check of data broke off for a reason that is not the data's
├── ConfigurationError (ValueError)         an argument or setting that cannot work
│   └── UnsupportedParameterError           a PAI parameter that has no meaning here
├── MissingDependencyError (ImportError)    an optional package is not installed
├── NotEnoughMemoryError (MemoryError)      the model does not fit, found before anything starts
├── NameTakenError (FileExistsError)        a job or service of that name is there already
├── RunNotFoundError (LookupError)          no job or service of that name in this store
├── JobNotReadyError (RuntimeError)         deploy or model data asked of a job that has not succeeded, or resume of one that runs
├── TrainingJobError (RuntimeError)         a job failed or was stopped; carries reason and last log lines
├── ServiceError (RuntimeError)             a service failed to start, or died; carries reason and last log lines
├── EndpointError (RuntimeError)            an endpoint refuses or has gone while pairs are made; see `palate.data.endpoint`
├── PaiNameError (ImportError)              a name of PAI's SDK that Palate has not; see `palate.pai`
├── PaiAttributeError (AttributeError)      an attribute of PAI's classes that Palate's have not; see `palate.pai`
├── DamagedFilesError (RuntimeError)        a model, a copy of it, or a checkpoint is not what was written
├── WaitTimeoutError (TimeoutError)         what was waited for did not come in time
├── EngineError (RuntimeError)              no container engine answers, or a build failed; see `palate.images.errors`
├── ImageMissingError (LookupError)         an image is not on this machine; see `palate.images.errors`
└── StoreError (OSError)                    see `palate.store.errors`
"""

from __future__ import annotations

from palate_recipes.errors import CheckError, DataError, HyperparameterError, PalateError, UnknownModelError

__all__ = [
    "CheckError",
    "ConfigurationError",
    "DamagedFilesError",
    "DataError",
    "HyperparameterError",
    "JobNotReadyError",
    "MissingDependencyError",
    "NameTakenError",
    "NotEnoughMemoryError",
    "PalateError",
    "RunNotFoundError",
    "ServiceError",
    "TrainingJobError",
    "UnknownModelError",
    "UnsupportedParameterError",
    "WaitTimeoutError",
]


class ConfigurationError(PalateError, ValueError):
    """An argument or setting cannot work."""


class UnsupportedParameterError(ConfigurationError):
    """A parameter of PAI's SDK has no meaning here and is refused instead of ignored."""


class MissingDependencyError(PalateError, ImportError):
    """An optional package that this path needs is not installed."""


class NotEnoughMemoryError(PalateError, MemoryError):
    """The model does not fit into the memory of the machine; found before anything starts."""


class NameTakenError(PalateError, FileExistsError):
    """A job or service of that name is there already."""


class RunNotFoundError(PalateError, LookupError):
    """No job or service of that name is in this store."""


class JobNotReadyError(PalateError, RuntimeError):
    """Something was asked of a job that its state does not allow: a model before it has succeeded, a resume while it runs."""


class DamagedFilesError(PalateError, RuntimeError):
    """Files are missing, cut short or changed: what they hold is not used."""


class WaitTimeoutError(PalateError, TimeoutError):
    """What was waited for did not come in time."""


class _RunError(PalateError, RuntimeError):
    def __init__(self, what: str, *, reason: str, log_tail: list[str] | None = None) -> None:
        self.reason = reason
        self.log_tail = log_tail or []
        lines = [f"{what}: {reason}"]
        if self.log_tail:
            lines += ["last log lines:", *(f"  {line}" for line in self.log_tail)]
        super().__init__("\n".join(lines))


class TrainingJobError(_RunError):
    """A job failed or was stopped.

    Attributes:
        reason: The cause in one message.
        log_tail: The last lines that the job logged.
    """


class ServiceError(_RunError):
    """A service failed to start, or died.

    Attributes:
        reason: The cause in one message.
        log_tail: The last lines that the engine logged.
    """
