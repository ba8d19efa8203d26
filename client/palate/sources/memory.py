"""Rows in memory as a data file: lists of objects, `datasets.Dataset`, pandas and Arrow tables. Imports none of these libraries."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from palate_recipes.errors import ConfigurationError, DataError
from palate_recipes.preferences.messages import MEDIA

_MEDIA_FEATURES = ("Image", "Audio", "Video")


def are_rows(given: object) -> bool:
    """Whether an input is data itself, not a path or URI."""
    return not isinstance(given, str | Path) and (isinstance(given, Iterable) or hasattr(given, "to_pylist"))


def write_memory(given: Any, path: Path, channel: str) -> None:
    """Writes the rows as JSON Lines. The same rows give the same bytes.

    Raises:
        ConfigurationError: The object is not a table of rows; says what to give instead.
        DataError: A row is not an object, or has a value that JSON cannot represent; names row and field.
    """
    where = f"inputs[{channel!r}]"
    with path.open("wb") as file:
        for number, row in enumerate(_rows(given, where), start=1):
            if not isinstance(row, Mapping):
                raise DataError(f"{where}, row {number}: is {type(row).__name__}, not a dict with fields.")
            file.write(_line(row, f"{where}, row {number}"))


def _rows(given: Any, where: str) -> Iterable[Any]:
    library, name = type(given).__module__.partition(".")[0], type(given).__name__
    if library == "datasets":
        if "Iterable" in name:
            raise ConfigurationError(
                f"{where} is {name}, which has no fixed rows: give list(dataset.take(N)), or load it without streaming=True"
            )
        if isinstance(given, Mapping):
            raise ConfigurationError(
                f"{where} is {name} with {', '.join(given)}: give one split, such as dataset['train']"
            )
        if not isinstance(getattr(given, "features", None), Mapping):  # one column of a dataset
            raise _not_a_table(name, where)
        for column, feature in given.features.items():
            if type(feature).__name__ in _MEDIA_FEATURES:
                raise DataError(
                    f"{where}: column {column!r} is of type {type(feature).__name__}: Palate trains on text alone. "
                    f"Choose other data, or remove_columns({column!r}) if the text does not need it."
                )
        return given.with_format(None)  # type: ignore[no-any-return]
    if library == "pandas":
        if not hasattr(given, "columns"):  # a Series or an Index
            raise _not_a_table(name, where)
        _check_names(given.columns, where)
        return given.astype(object).where(given.notna(), None).to_dict("records")  # type: ignore[no-any-return]
    if hasattr(given, "to_pylist"):
        _check_names(given.schema.names if hasattr(given, "schema") else (), where)
        try:
            return given.to_pylist()  # type: ignore[no-any-return]
        except (
            ValueError,
            OverflowError,
        ) as error:  # a date that Python does not have, two fields of a struct with one name
            raise DataError(f"{where}: {name} cannot be converted to rows: {str(error).rstrip('.')}.") from None
    if isinstance(given, list | tuple):
        return given
    raise _not_a_table(name, where)


def _not_a_table(name: str, where: str) -> ConfigurationError:
    return ConfigurationError(
        f"{where} is {name}: expected a path, a URI, a list of dicts, a datasets.Dataset or a pandas.DataFrame"
    )


def _check_names(names: Iterable[object], where: str) -> None:
    """Raises DataError if two columns have one name: a dict of a row keeps only the last one."""
    seen: set[str] = set()
    for name in map(str, names):
        if name in seen:
            raise DataError(f"{where}: two columns are named {name!r}. Rename one of them.")
        seen.add(name)


def _line(row: Mapping[str, Any], place: str) -> bytes:
    fields: dict[str, str] = {}
    for field, value in row.items():
        if str(field) in fields:
            raise DataError(f"{place}: two fields are named {str(field)!r}. Rename one of them.")
        try:
            fields[str(field)] = json.dumps(value, ensure_ascii=True, default=_plain)
        except (TypeError, ValueError, RecursionError):
            if field not in MEDIA:
                raise DataError(
                    f"{place}: `{field}` is {type(value).__name__}, which JSON cannot represent. Remove or convert it."
                ) from None
            fields[str(field)] = json.dumps(type(value).__name__)  # the check refuses it by row
    return ("{" + ", ".join(f"{json.dumps(field)}: {text}" for field, text in fields.items()) + "}\n").encode()


def _plain(value: Any) -> Any:
    """Converts NumPy arrays and numbers, mappings and dates."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "isoformat"):
        return value.isoformat()
    raise TypeError
