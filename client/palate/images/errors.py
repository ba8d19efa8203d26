"""What can go wrong with engines and images, below PalateError. Knows no engine.

PalateError
├── EngineError (RuntimeError)          there is no container engine, or it does not answer
│   └── ImageBuildError                 a build failed; carries its last lines
└── ImageMissingError (LookupError)     an image is not there; names the command that builds it
"""

from __future__ import annotations

from palate.errors import PalateError


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
