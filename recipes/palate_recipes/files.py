"""Recipe files: TOML with the arguments of `ModelTrainingRecipe`. Knows their keys, nothing of how they are run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import HyperparameterError
from .hyperparameters import validate
from .nearest import did_you_mean

KEYS = (
    "model_name",
    "model_version",
    "model_provider",
    "model_uri",
    "method",
    "labels",
    "max_run_time",
    "max_attempts",
    "base_job_name",
    "hyperparameters",
)


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Returns the arguments that a recipe file holds, hyperparameters validated.

    Args:
        path: TOML: `model_name` or `model_uri`, `method`, and a table `[hyperparameters]`.

    Raises:
        HyperparameterError: No such file, broken TOML, an unknown key, or bad hyperparameters.
    """
    import tomllib

    path = Path(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise HyperparameterError(f"recipe file {path} is not there: check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise HyperparameterError(f"recipe file {path} cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise HyperparameterError(f"recipe file {path} is not valid TOML: {error}") from None
    for key in values:
        if key not in KEYS:
            raise HyperparameterError(
                f"recipe file {path} has an unknown key {key!r}: {did_you_mean(key, KEYS)}known are {', '.join(KEYS)}"
            )
    try:
        validate(values.get("hyperparameters", {}), method=values.get("method", "LoRA_LLM"))
    except HyperparameterError as error:
        raise HyperparameterError(f"recipe file {path}: {error}") from None
    return values
