"""The root of Palate's errors and those that reading data or settings can raise.
Knows no job, store or engine.

The whole tree is drawn in `palate.errors`.
"""


class PalateError(Exception):
    """Root of every error that Palate raises on purpose. The message says what, the value, and the remedy."""


class HyperparameterError(PalateError, ValueError):
    """A hyperparameter is unknown, has the wrong type, is out of bounds, or contradicts another."""


class UnknownModelError(PalateError, LookupError):
    """No catalog row has this model name."""


class DataError(PalateError, ValueError):
    """A preference file cannot be used; the message names file, row, field and remedy."""


class CheckError(PalateError, RuntimeError):
    """A check of preference data broke off for a reason that is not the data's."""
