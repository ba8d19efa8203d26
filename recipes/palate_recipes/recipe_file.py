"""Reads recipe files: TOML with the arguments of `ModelTrainingRecipe`. Knows their keys, not how they run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from palate_recipes.errors import HyperparameterError
from palate_recipes.hyperparameters import shorten, validate
from palate_recipes.text import did_you_mean, expand_path, show_path

_TYPES = {
    "model_name": (str, "a string"),
    "model_version": (str, "a string"),
    "model_provider": (str, "a string"),
    "model_uri": (str, "a string"),
    "method": (str, "a string"),
    "labels": (dict, "a table of strings"),
    "max_run_time": (int, "a whole number of seconds"),
    "max_attempts": (int, "a whole number"),
    "base_job_name": (str, "a string"),
    "hyperparameters": (dict, "a table"),
}
KEYS = tuple(_TYPES)

_LARGEST = 1 << 20
"""Size limit in bytes: tomllib needs minutes for some files of many megabytes."""


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Returns the arguments in a recipe file, with validated hyperparameters.

    Args:
        path: TOML file with `model_name` or `model_uri`, `method`, and a table `[hyperparameters]`.

    Raises:
        HyperparameterError: The file is missing or not valid TOML, or has an unknown key or an invalid value.
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
                f"recipe file {path} is larger than the limit of {_LARGEST:,} bytes: give a TOML file with only the settings"
            )
        values = tomllib.loads(data.decode("utf-8"))
    except FileNotFoundError:
        raise HyperparameterError(f"recipe file {path} does not exist: check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise HyperparameterError(f"recipe file {path} cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise HyperparameterError(f"recipe file {path} is not valid TOML: {error}") from None
    except RecursionError:
        raise HyperparameterError(f"recipe file {path} is nested too deeply: flatten its lists and tables") from None
    except ValueError as error:  # a number with more than 4300 digits, or a date such as 2024-02-30
        raise HyperparameterError(f"recipe file {path} has a value that cannot be read: {error}") from None
    for key in values:
        if key not in KEYS:
            raise HyperparameterError(
                f"recipe file {path} has an unknown key {key[:60]!r}: {did_you_mean(key, KEYS)}valid keys: {', '.join(KEYS)}"
            )
    for key, value in values.items():
        kind, words = _TYPES[key]
        fits = isinstance(value, kind) and not isinstance(value, bool)
        if not fits or (key == "labels" and not all(isinstance(label, str) for label in value.values())):
            raise HyperparameterError(f"recipe file {path}: {key} = {shorten(value)}: expected {words}")
    try:
        validate(values.get("hyperparameters", {}), method=values.get("method", "LoRA_LLM"))
    except HyperparameterError as error:
        raise HyperparameterError(f"recipe file {path}: {error}") from None
    return values
