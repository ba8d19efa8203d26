"""The root of Palate's errors and those that reading data or settings can raise.
Knows no job, store or engine.

The whole tree is drawn in `palate.errors`.
"""

from palate_recipes.visible import visible


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


class CheckError(PalateError, RuntimeError):
    """A check of preference data broke off for a reason that is not the data's."""
