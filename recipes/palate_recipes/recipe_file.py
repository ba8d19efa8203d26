"""Reads recipe files: TOML with the arguments of `ModelTrainingRecipe`, the data, the store and the job's id. Knows their keys,
not how they run.
"""

from __future__ import annotations

import glob
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palate_recipes.errors import HyperparameterError
from palate_recipes.hyperparameters import shorten, validate
from palate_recipes.text import did_you_mean, expand_path, show_path

CHANNELS = ("train", "validation", "adapter")
_A_PATH = "a path or URI in quotes"
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
    **dict.fromkeys(CHANNELS, (str, _A_PATH)),
    "inputs": (dict, "a table"),
    "store": (str, _A_PATH),
    "name": (str, "a string"),
}
KEYS = tuple(_TYPES)

_LARGEST = 1 << 20
"""Size limit in bytes: tomllib needs minutes for some files of many megabytes."""


@dataclass(frozen=True, kw_only=True)
class RecipeFile:
    """The content of a recipe file. Relative paths in it are joined to the file's folder.

    Attributes:
        arguments: Arguments of `ModelTrainingRecipe`, with validated hyperparameters; data as `default_training_inputs`.
        store: The session's store, or None.
        name: The job's id, or None.
    """

    arguments: dict[str, Any]
    store: str | None
    name: str | None


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Returns the arguments of `ModelTrainingRecipe` in a recipe file, with validated hyperparameters.

    Data that the file names becomes `default_training_inputs`, so `ModelTrainingRecipe(**read_recipe(path)).train()` uses it.

    Args:
        path: TOML file with `model_name` or `model_uri`, `method`, and a table `[hyperparameters]`; see docs/training.md.

    Raises:
        HyperparameterError: The file is missing or not valid TOML, has an unknown key or an invalid value, or has `store` or `name`,
            which are no arguments of a recipe: `read_recipe_file` returns them.
    """
    found = read_recipe_file(path)
    for key, place in (("store", "Session(store=…)"), ("name", "train(job_name=…)")):
        if getattr(found, key) is not None:
            raise HyperparameterError(
                f"recipe file {path} sets {key}, which belongs to {place}: call read_recipe_file(), which returns it, or remove the key"
            )
    return found.arguments


def read_recipe_file(path: str | Path) -> RecipeFile:
    """Reads a recipe file with everything that `palate train --recipe` uses.

    Args:
        path: TOML file, see docs/training.md.

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
    inputs: dict[str, Any] = {}
    for key in values:
        _check_key(path, key, KEYS)
    for key, value in values.items():
        kind, words = _TYPES[key]
        fits = isinstance(value, kind) and not isinstance(value, bool) and (value or words != _A_PATH)
        if not fits or (key == "labels" and not all(isinstance(label, str) for label in value.values())):
            raise HyperparameterError(f"recipe file {path}: {key} = {shorten(value)}: expected {words}")
    for channel, value in values.pop("inputs", {}).items():
        _check_key(path, channel, CHANNELS, table="inputs")
        if not (isinstance(value, str) and value):
            raise HyperparameterError(f"recipe file {path}: inputs.{channel} = {shorten(value)}: expected {_A_PATH}")
        if channel in values:
            raise HyperparameterError(f"recipe file {path} has {channel} twice, also in [inputs]: remove one of them")
        inputs[channel] = value
    try:
        validate(values.get("hyperparameters", {}), method=values.get("method", "LoRA_LLM"))
    except HyperparameterError as error:
        raise HyperparameterError(f"recipe file {path}: {error}") from None
    folder = path.absolute().parent
    inputs |= {channel: values.pop(channel) for channel in CHANNELS if channel in values}
    if inputs:
        values["default_training_inputs"] = {
            channel: beside(folder, inputs[channel]) for channel in CHANNELS if channel in inputs
        }
    if values.get("model_uri"):
        values["model_uri"] = beside(folder, values["model_uri"])
    store, name = values.pop("store", None), values.pop("name", None)
    return RecipeFile(arguments=values, store=store and beside(folder, store), name=name)


def _check_key(path: Path, key: str, known: tuple[str, ...], *, table: str = "") -> None:
    if key not in known:
        where = f" in [{table}]" if table else ""
        raise HyperparameterError(
            f"recipe file {path} has an unknown key {key[:60]!r}{where}: {did_you_mean(key, known)}valid keys: {', '.join(known)}"
        )


def beside(folder: Path, location: str) -> str:
    """Returns a location of the file with a relative path joined to the file's folder; URIs and `~` stay as they are."""
    if "://" in location or location.startswith("~") or os.path.isabs(location):
        return location
    # The folder's own brackets are no wildcards.
    start = (
        glob.escape(str(folder)) if glob.has_magic(location) and not os.path.exists(folder / location) else str(folder)
    )
    return os.path.normpath(os.path.join(start, location)) + "/" * location.endswith("/")
