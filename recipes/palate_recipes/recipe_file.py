"""Recipe files: TOML with the arguments of `ModelTrainingRecipe`. Knows their keys, nothing of how they are run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from palate_recipes.errors import HyperparameterError
from palate_recipes.hyperparameters import shorten, validate
from palate_recipes.text import did_you_mean, expand_path, show_path

_TYPES = {
    "model_name": (str, "text"),
    "model_version": (str, "text"),
    "model_provider": (str, "text"),
    "model_uri": (str, "text"),
    "method": (str, "text"),
    "labels": (dict, "a table of texts"),
    "max_run_time": (int, "a whole number of seconds"),
    "max_attempts": (int, "a whole number"),
    "base_job_name": (str, "text"),
    "hyperparameters": (dict, "a table"),
}
KEYS = tuple(_TYPES)

_LARGEST = 1 << 20
"""Bytes: tomllib takes minutes for some files of many megabytes."""


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Returns the arguments that a recipe file holds, hyperparameters validated.

    Args:
        path: TOML: `model_name` or `model_uri`, `method`, and a table `[hyperparameters]`.

    Raises:
        HyperparameterError: No such file, broken TOML, an unknown key, a value of a wrong type, or bad hyperparameters.
    """
    import tomllib

    try:
        path = Path(expand_path(path))
    except ValueError as error:
        raise HyperparameterError(f"recipe file {show_path(path)} {error}") from None
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST + 1)
        if len(data) > _LARGEST:
            raise HyperparameterError(
                f"recipe file {path} has more than {_LARGEST:,} bytes, the limit: give a TOML file with the settings alone"
            )
        values = tomllib.loads(data.decode("utf-8"))
    except FileNotFoundError:
        raise HyperparameterError(f"recipe file {path} is not there: check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise HyperparameterError(f"recipe file {path} cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise HyperparameterError(f"recipe file {path} is not valid TOML: {error}") from None
    except RecursionError:
        raise HyperparameterError(f"recipe file {path} is nested too deeply: write its lists and tables flat") from None
    except ValueError as error:  # a number with more than 4300 digits, or a date such as 2024-02-30
        raise HyperparameterError(f"recipe file {path} has a value that cannot be read: {error}") from None
    for key in values:
        if key not in KEYS:
            raise HyperparameterError(
                f"recipe file {path} has an unknown key {key[:60]!r}: {did_you_mean(key, KEYS)}known are {', '.join(KEYS)}"
            )
    for key, value in values.items():
        kind, words = _TYPES[key]
        fits = isinstance(value, kind) and not isinstance(value, bool)
        if not fits or (key == "labels" and not all(isinstance(label, str) for label in value.values())):
            raise HyperparameterError(f"recipe file {path}: {key} = {shorten(value)} must be {words}")
    try:
        validate(values.get("hyperparameters", {}), method=values.get("method", "LoRA_LLM"))
    except HyperparameterError as error:
        raise HyperparameterError(f"recipe file {path}: {error}") from None
    return values
