"""Every error that Palate raises on purpose, in one tree for client, trainer and server. Knows no job, store or engine.

PalateError
├── HyperparameterError (ValueError)            unknown, wrong type, out of bounds, contradictory
├── UnknownModelError (LookupError)             not in the catalog
├── DataError (ValueError)                      a preference file cannot be used
├── ConfigurationError (ValueError)             an argument or setting cannot work
│   └── UnsupportedParameterError               a parameter of PAI's SDK has no meaning here
├── MissingDependencyError (ImportError)        an optional package is not installed
├── NotEnoughMemoryError (MemoryError)          the model does not fit; found before anything starts
├── NameTakenError (FileExistsError)            a job or service of that name exists
├── RunNotFoundError (LookupError)              no job or service of that name in this store
├── JobNotReadyError (RuntimeError)             the state of the job does not allow it: deploy before success, resume while running
├── DamagedFilesError (RuntimeError)            a model, checkpoint or record is not what was written
├── WaitTimeoutError (TimeoutError)             a wait reached its time limit
├── TrainingJobError (RuntimeError)             a job failed or was stopped; has reason and last log lines
├── ServiceError (RuntimeError)                 a service failed to start, or died; has reason and last log lines
├── EndpointError (RuntimeError)                an OpenAI-compatible endpoint refuses, or stopped answering
├── WeightsError (RuntimeError)                 a model's weights cannot be fetched
├── EngineError (RuntimeError)                  no container engine, or it does not answer
│   └── ImageBuildError                         a build failed; has its last lines
├── ImageMissingError (LookupError)             an image is not on this machine
├── PaiNameError (ImportError)                  a name of PAI's SDK that Palate does not have
├── PaiAttributeError (AttributeError)          an attribute of PAI's classes that Palate does not have
├── StoreError (OSError)                        a store could not do what it was asked
│   ├── ObjectNotFoundError (FileNotFoundError) no object under that key
│   ├── BucketNotFoundError (LookupError)       the bucket or root folder itself is missing
│   ├── StoreDeniedError (PermissionError)      no, wrong or insufficient credentials or file permissions
│   ├── StoreUnreachableError (ConnectionError) the endpoint does not answer, or answers with its own failure
│   ├── DigestMismatchError                     bytes that arrived are not those that were uploaded
│   ├── PreconditionFailedError                 a conditional put lost: somebody else wrote first
│   └── StoreUsageError (ValueError)            a URI, key or option cannot work
├── TrainerError (RuntimeError)                 a training cannot start or continue
│   └── NotFiniteError                          the loss became NaN or infinite
├── ConversionError (RuntimeError)              a GGUF file cannot be converted
└── ServerError                                 the server program cannot serve; its message is in error.txt
    ├── BadSpec (ValueError)                    the spec, or a folder that it names, cannot be served
    ├── PortTaken (OSError)                     the port is in use
    ├── EngineMissing (ModuleNotFoundError)     the engine is not installed
    ├── OutOfMemory (MemoryError)               the weights do not fit
    ├── EngineFailed (RuntimeError)             the engine ended, or answered its first request with an error
    ├── EngineHung (TimeoutError)               the engine no longer answers
    └── StartTimeout (TimeoutError)             the engine did not answer in time
"""

from __future__ import annotations

from palate_recipes.text import visible


class PalateError(Exception):
    """Root of every error that Palate raises on purpose. The message says what, the value, and the remedy.

    A message can quote a log, a name or a value from elsewhere, so its control characters are written out.
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


class EndpointError(PalateError, RuntimeError):
    """An endpoint refused a call that no retry can mend, or is gone.

    Attributes:
        endpoint: Its base URL.
        model: The model that was asked.
        status: The HTTP status of the last answer; None when there was none.
    """

    def __init__(self, message: str, *, endpoint: str, model: str, status: int | None = None) -> None:
        self.endpoint = endpoint
        self.model = model
        self.status = status
        super().__init__(message)


class WeightsError(PalateError, RuntimeError):
    """Weights could not be fetched."""


class EngineError(PalateError, RuntimeError):
    """There is no container engine, it does not answer, or it refuses what it was asked for."""


class ImageBuildError(EngineError):
    """An image could not be built.

    Attributes:
        log_tail: The last lines of the build.
    """

    def __init__(self, message: str, log_tail: list[str]) -> None:
        self.log_tail = log_tail
        super().__init__("\n".join([message, *(f"  {line}" for line in log_tail)]))


class ImageMissingError(PalateError, LookupError):
    """An image is not there."""


class PaiNameError(PalateError, ImportError):
    """A module of PAI's SDK has this name and Palate has not."""


class PaiAttributeError(PalateError, AttributeError):
    """A class of PAI's SDK has this attribute and Palate's has not."""


class StoreError(PalateError, OSError):
    """A store could not do what it was asked."""


class ObjectNotFoundError(StoreError, FileNotFoundError):
    """No object has this key, or none stands under this prefix."""


class BucketNotFoundError(StoreError, LookupError):
    """The bucket or root folder itself is missing. No FileNotFoundError: nobody should wait for an object."""


class StoreDeniedError(StoreError, PermissionError):
    """The store refuses: no credentials, wrong ones, or ones that do not allow this."""


class StoreUnreachableError(StoreError, ConnectionError):
    """The endpoint did not answer, or kept answering with a failure of its own."""


class DigestMismatchError(StoreError):
    """Bytes that arrived are not those that were uploaded, also when they were asked for again."""


class PreconditionFailedError(StoreError):
    """A conditional put lost: the object is there already, or is not the one that was read."""


class StoreUsageError(StoreError, ValueError):
    """A URI, a key or an option cannot be used as given."""


class TrainerError(PalateError, RuntimeError):
    """A training cannot start or go on; the message names the cause and the remedy."""


class NotFiniteError(TrainerError):
    """The loss became infinite or no number."""


class ConversionError(PalateError, RuntimeError):
    """A GGUF file cannot be turned into a model folder."""


class ServerError(PalateError):
    """Root of the server's errors. The message says what, the value, and the remedy."""


class BadSpec(ServerError, ValueError):
    """The spec, or a folder that it names, cannot be served."""


class PortTaken(ServerError, OSError):
    """Something else listens on the wanted port."""


class EngineMissing(ServerError, ModuleNotFoundError):
    """The wanted engine is not installed."""


class OutOfMemory(ServerError, MemoryError):
    """The model does not fit into the memory that is free."""


class EngineFailed(ServerError, RuntimeError):
    """The engine ended by itself, or answered its first request with an error."""


class EngineHung(ServerError, TimeoutError):
    """The engine runs and has answered, but answers no more."""


class StartTimeout(ServerError, TimeoutError):
    """The engine did not answer within `start_timeout_s`."""
