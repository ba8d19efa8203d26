"""All errors that Palate raises, in one tree for client, trainer and server. Knows no job, store or engine.

PalateError
├── HyperparameterError (ValueError)            unknown, wrong type, out of bounds, contradictory
├── UnknownModelError (LookupError)             not in the catalog
├── DataError (ValueError)                      a preference file cannot be used
├── ConfigurationError (ValueError)             an invalid argument or setting
│   ├── UnservableError                         no engine, or not the chosen one, can serve the model
│   └── UnsupportedParameterError (TypeError)   a parameter of PAI's SDK has no meaning here, or none has this name
├── MissingDependencyError (ImportError)        an optional package is not installed
├── NotEnoughMemoryError (MemoryError)          the model does not fit; checked before anything starts
├── NameTakenError (FileExistsError)            a job or service with this name exists
├── RunNotFoundError (LookupError)              no job or service with this name in this store
├── JobNotReadyError (RuntimeError)             the job's state does not allow it: deploy before success, resume while running
├── WinRateError (RuntimeError)                 no evaluation shows the win-rate that a deploy requires
├── DamagedFilesError (RuntimeError)            a model, checkpoint or record is not what was written
├── WaitTimeoutError (TimeoutError)             a wait reached its time limit
├── TrainingJobError (RuntimeError)             a job failed or was stopped; has reason and last log lines
├── EvaluationError (RuntimeError)              an evaluation failed or was stopped; has reason and last log lines
├── ServiceError (RuntimeError)                 a service failed to start, or died; has reason and last log lines
├── EndpointError (RuntimeError)                an OpenAI-compatible endpoint rejects a call, or stopped answering
├── WeightsError (RuntimeError)                 a model's weights cannot be fetched
├── EngineError (RuntimeError)                  no container engine, or it does not answer
│   └── ImageBuildError                         a build failed; has its last log lines
├── ImageMissingError (LookupError)             an image is not on this machine
├── PaiNameError (ImportError)                  a name of PAI's SDK that Palate does not have
├── PaiAttributeError (AttributeError)          an attribute of PAI's classes that Palate does not have
├── StoreError (OSError)                        a store operation failed
│   ├── ObjectNotFoundError (FileNotFoundError) no object with this key
│   ├── BucketNotFoundError (LookupError)       the bucket or root folder is missing
│   ├── StoreDeniedError (PermissionError)      missing, wrong or insufficient credentials or file permissions
│   ├── StoreUnreachableError (ConnectionError) the endpoint does not answer, or answers with a server error
│   ├── DigestMismatchError                     the received bytes differ from those uploaded
│   ├── PreconditionFailedError                 a conditional put lost: another writer was first
│   └── StoreUsageError (ValueError)            an invalid URI, key or option
├── TrainerError (RuntimeError)                 a training cannot start or continue
│   └── NotFiniteError                          the loss became NaN or infinite
├── ConversionError (RuntimeError)              a GGUF file cannot be converted
└── ServerError                                 the server program cannot serve; its message is in error.txt
    ├── BadSpec (ValueError)                    the spec, or a folder in it, cannot be served
    ├── PortTaken (OSError)                     the port is in use
    ├── EngineMissing (ModuleNotFoundError)     the engine is not installed
    ├── OutOfMemory (MemoryError)               the weights do not fit
    ├── EngineFailed (RuntimeError)             the engine exited, or answered its first request with an error
    ├── EngineHung (TimeoutError)               the engine no longer answers
    ├── ParityFailed (RuntimeError)             the service does not answer as the trained model
    └── StartTimeout (TimeoutError)             the engine did not answer in time
"""

from __future__ import annotations

from palate_recipes.text import visible


class PalateError(Exception):
    """Root of all errors that Palate raises. The message says what is wrong, the value, and the remedy.

    A message can quote logs, names and values from untrusted sources, so control characters are escaped.
    """

    def __str__(self) -> str:
        return visible(super().__str__())


class HyperparameterError(PalateError, ValueError):
    """A hyperparameter is unknown, has the wrong type, is out of bounds, or contradicts another."""


class UnknownModelError(PalateError, LookupError):
    """No catalog row has this model name."""


class DataError(PalateError, ValueError):
    """A preference file cannot be used; the message names file, row, field and remedy."""


class ConfigurationError(PalateError, ValueError):
    """An argument or setting is invalid."""


class UnservableError(ConfigurationError):
    """No engine, or not the one that was chosen, can serve the model. Raised before a training or service is submitted."""


class UnsupportedParameterError(ConfigurationError, TypeError):
    """A parameter of PAI's SDK has no meaning here, or no parameter has this name. It is rejected, not ignored."""


class MissingDependencyError(PalateError, ImportError):
    """An optional package that this path needs is not installed."""


class NotEnoughMemoryError(PalateError, MemoryError):
    """The model does not fit into the machine's memory. Checked before anything starts."""


class NameTakenError(PalateError, FileExistsError):
    """A job or service with this name exists."""


class RunNotFoundError(PalateError, LookupError):
    """No job or service in this store has this name."""


class JobNotReadyError(PalateError, RuntimeError):
    """The job's state does not allow the operation, such as deploy before success or resume while running."""


class WinRateError(PalateError, RuntimeError):
    """No stored evaluation of the model shows the win-rate that a deploy or update requires. Nothing was started."""


class DamagedFilesError(PalateError, RuntimeError):
    """Files are missing, truncated or changed, and are not used."""


class WaitTimeoutError(PalateError, TimeoutError):
    """A wait reached its time limit."""


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
        reason: The cause.
        log_tail: The last lines of the job's log.
    """


class EvaluationError(_RunError):
    """An evaluation failed or was stopped.

    Attributes:
        reason: The cause.
        log_tail: The last lines of its log.
    """


class ServiceError(_RunError):
    """A service failed to start, or died.

    Attributes:
        reason: The cause.
        log_tail: The last lines of the engine's log.
    """


class EndpointError(PalateError, RuntimeError):
    """An endpoint rejected a call permanently, or stopped answering.

    Attributes:
        endpoint: Base URL.
        model: Name of the requested model.
        status: HTTP status of the last answer; None if there was none.
    """

    def __init__(self, message: str, *, endpoint: str, model: str, status: int | None = None) -> None:
        self.endpoint = endpoint
        self.model = model
        self.status = status
        super().__init__(message)


class WeightsError(PalateError, RuntimeError):
    """A model's weights cannot be fetched."""


class EngineError(PalateError, RuntimeError):
    """There is no container engine, it does not answer, or it rejects a command."""


class ImageBuildError(EngineError):
    """An image build failed.

    Attributes:
        log_tail: The last lines of the build's log.
    """

    def __init__(self, message: str, log_tail: list[str]) -> None:
        self.log_tail = log_tail
        super().__init__("\n".join([message, *(f"  {line}" for line in log_tail)]))


class ImageMissingError(PalateError, LookupError):
    """An image does not exist."""


class PaiNameError(PalateError, ImportError):
    """PAI's SDK has this name and Palate does not."""


class PaiAttributeError(PalateError, AttributeError):
    """PAI's class has this attribute and Palate's does not."""


class StoreError(PalateError, OSError):
    """A store operation failed."""


class ObjectNotFoundError(StoreError, FileNotFoundError):
    """No object has this key or prefix."""


class BucketNotFoundError(StoreError, LookupError):
    """The bucket or root folder is missing. Not a FileNotFoundError: a reader that waits for an object must not wait for this."""


class StoreDeniedError(StoreError, PermissionError):
    """The store denies access: credentials are missing, wrong or insufficient."""


class StoreUnreachableError(StoreError, ConnectionError):
    """The endpoint did not answer, or kept answering with server errors."""


class DigestMismatchError(StoreError):
    """The received bytes differ from those uploaded, after a retry too."""


class PreconditionFailedError(StoreError):
    """A conditional put lost: the object exists, or has changed since it was read."""


class StoreUsageError(StoreError, ValueError):
    """A URI, key or option is invalid."""


class TrainerError(PalateError, RuntimeError):
    """Training cannot start or continue. The message has the cause and the remedy."""


class NotFiniteError(TrainerError):
    """The loss became NaN or infinite."""


class ConversionError(PalateError, RuntimeError):
    """A GGUF file cannot be converted to a model folder."""


class ServerError(PalateError):
    """Root of the server program's errors."""


class BadSpec(ServerError, ValueError):
    """The spec, or a folder in it, cannot be served."""


class PortTaken(ServerError, OSError):
    """The port is in use."""


class EngineMissing(ServerError, ModuleNotFoundError):
    """The engine is not installed."""


class OutOfMemory(ServerError, MemoryError):
    """The model does not fit into free memory."""


class EngineFailed(ServerError, RuntimeError):
    """The engine exited, or answered its first request with an error."""


class EngineHung(ServerError, TimeoutError):
    """The engine is running but no longer answers."""


class ParityFailed(ServerError, RuntimeError):
    """The service does not answer as the model that was trained."""


class StartTimeout(ServerError, TimeoutError):
    """The engine did not answer within `start_timeout_s`."""
