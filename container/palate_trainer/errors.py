"""The trainer's own error. Knows no cause in particular; `failures` words the ones that libraries raise."""

from __future__ import annotations

from palate_recipes.errors import PalateError


class TrainerError(PalateError, RuntimeError):
    """A training cannot start or go on; the message names the cause and the remedy."""


class NotFiniteError(TrainerError):
    """The loss became infinite or no number."""
