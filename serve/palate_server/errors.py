"""What can go wrong with a service, as exceptions whose message is what people read in error.txt.

ServerError
├── BadSpec        (ValueError)           the spec or a folder it names cannot be served
├── PortTaken      (OSError)              something else listens on the wanted port
├── EngineMissing  (ModuleNotFoundError)  the wanted engine is not installed
├── OutOfMemory    (MemoryError)          the weights do not fit
├── EngineFailed   (RuntimeError)         the engine ended by itself or refused its first request
├── EngineHung     (TimeoutError)         the engine answered, and answers no more
└── StartTimeout   (TimeoutError)         the engine did not answer in time
"""

from __future__ import annotations


class ServerError(Exception):
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
