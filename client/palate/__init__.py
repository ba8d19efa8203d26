"""What a user holds: recipe, job, predictor, session. Loads each name when it is first asked for, and nothing heavy before."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from palate.common.utils import random_str
    from palate.comparison import compare
    from palate.experiments import ExperimentFile
    from palate.job import TrainingJob
    from palate.model import ModelTrainingRecipe, RegisteredModel
    from palate.predictor import Predictor
    from palate.session import Session, get_default_session, setup_default_session
    from palate.sources.inputs import PreferenceData
    from palate_recipes.errors import PalateError

from palate_recipes import __version__

_HOMES = {
    "ModelTrainingRecipe": "palate.model",
    "RegisteredModel": "palate.model",
    "PreferenceData": "palate.sources.inputs",
    "TrainingJob": "palate.job",
    "Predictor": "palate.predictor",
    "Session": "palate.session",
    "get_default_session": "palate.session",
    "setup_default_session": "palate.session",
    "compare": "palate.comparison",
    "ExperimentFile": "palate.experiments",
    "random_str": "palate.common.utils",
    "PalateError": "palate.errors",
}

__all__ = [
    "ExperimentFile",
    "ModelTrainingRecipe",
    "PalateError",
    "Predictor",
    "PreferenceData",
    "RegisteredModel",
    "Session",
    "TrainingJob",
    "__version__",
    "compare",
    "get_default_session",
    "random_str",
    "setup_default_session",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'palate' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
