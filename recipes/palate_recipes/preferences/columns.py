"""Reads any table by column names, with an optional prompt template. Knows raw rows, no files except templates."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palate_recipes.errors import DataError
from palate_recipes.preferences.files import open_container
from palate_recipes.preferences.formats import Format, format_named
from palate_recipes.preferences.formats.fields import Parts, Raw, listed
from palate_recipes.preferences.messages import check_characters, kind
from palate_recipes.preferences.row import Message, fault
from palate_recipes.text import expand_path, load_yaml, show_path

_LARGEST_YAML = 1 << 20
"""Size limit in bytes: PyYAML reads 100 kB per second."""

_PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}|\{(\w+)\}")


@dataclass(frozen=True)
class PromptTemplate:
    """A prompt with placeholders for a row's values.

    Attributes:
        name: Name of the template.
        system: The system turn, without placeholders; empty for none.
        user: The user turn. `{name}` is replaced by a value; `{{name}}` is a literal `{name}`.
    """

    name: str
    system: str
    user: str

    @property
    def placeholders(self) -> list[str]:
        """Unique placeholder names in `user`, in order."""
        return list(dict.fromkeys(match[2] for match in _PLACEHOLDER.finditer(self.user) if match[2]))

    def fill(self, values: Mapping[str, str]) -> str:
        """Returns the user turn with the values filled in. Braces in values are not expanded."""
        return _PLACEHOLDER.sub(lambda match: f"{{{match[1]}}}" if match[1] else values[match[2]], self.user)


@dataclass(frozen=True)
class Columns:
    """Maps columns of a table to prompt and answers.

    Attributes:
        input_columns: Placeholder of the template -> column. Without a template: one column, the prompt.
        label_columns: `chosen` (and `rejected`) -> column, or key -> column: then the answer is a JSON object.
        template: Combines the input columns; None uses the single input column as the prompt.
    """

    input_columns: Mapping[str, str]
    label_columns: Mapping[str, str | Mapping[str, str]]
    template: PromptTemplate | None = None

    def __post_init__(self) -> None:
        for name in self.label_columns:
            if name not in ("chosen", "rejected"):
                raise DataError(f"label_columns has {name!r}: expected chosen and rejected")
        if "chosen" not in self.label_columns:
            raise DataError("label_columns has no column for chosen: add chosen=COLUMN")
        if self.template is None and len(self.input_columns) != 1:
            raise DataError(
                f"input_columns has {len(self.input_columns)} columns but there is no prompt template to combine them:"
                " give a template, or one column"
            )
        if self.template is not None:
            for name in self.template.placeholders:
                if name not in self.input_columns:
                    raise DataError(
                        f"the prompt template {self.template.name!r} has {{{name}}}, but input_columns has no column for it: add"
                        f" {name}=COLUMN, or write {{{{{name}}}}} for literal braces"
                    )
            for name in self.input_columns:
                if name not in self.template.placeholders:
                    raise DataError(
                        f"input_columns has {name!r}, but the prompt template {self.template.name!r} has no {{{name}}}: it has"
                        f" {', '.join(f'{{{one}}}' for one in self.template.placeholders) or 'no placeholder'}"
                    )

    def as_format(self) -> Format:
        """Returns the table's row format."""
        answers = [
            column
            for columns in self.label_columns.values()
            for column in ([columns] if isinstance(columns, str) else columns.values())
        ]
        return Format(
            "columns", "columns by name", self._read, reads=frozenset((*self.input_columns.values(), *answers))
        )

    def _read(self, row: Raw) -> Parts:
        values = {name: _value(row, column) for name, column in self.input_columns.items()}
        asked = self.template.fill(values) if self.template else next(iter(values.values()))
        turns = (Message("user", asked),)
        prompt = (
            (Message("system", self.template.system), *turns)
            if self.template and self.template.system.strip()
            else turns
        )
        answers = {name: _answer(row, columns) for name, columns in self.label_columns.items()}
        return prompt, answers["chosen"], answers.get("rejected")


def _value(row: Raw, column: str) -> str:
    if column not in row:
        raise fault("missing-field", column, f"column `{column}` is missing; the row has {listed(list(row))}")
    value = row[column]
    if isinstance(value, bool | int | float):
        value = json.dumps(value)
    if not isinstance(value, str):
        raise fault("not-text", column, f"column `{column}` is {kind(value)}, not text")
    if not value.strip():
        raise fault("empty-field", column, f"column `{column}` is empty")
    check_characters(value, column)
    return value


def _answer(row: Raw, columns: str | Mapping[str, str]) -> str:
    if isinstance(columns, str):
        return _value(row, columns)
    return json.dumps({key: _value(row, column) for key, column in columns.items()}, ensure_ascii=False)


def read_templates(path: str | Path) -> dict[str, PromptTemplate]:
    """Reads prompt templates.

    Args:
        path: CSV with the columns `name`, `system`, `user`; or YAML or JSON: a list of such objects, or an object of them by name.

    Returns:
        Templates by name, at least one.

    Raises:
        DataError: The file cannot be read, or a template in it is incomplete.
    """
    path = Path(path)
    in_yaml = path.suffix.lower() in (".yaml", ".yml")
    entries = _from_yaml(path) if in_yaml else [value for _, value in open_container(path).raw_rows()]
    templates: dict[str, PromptTemplate] = {}
    for number, entry in enumerate(entries, start=1):
        template = _template(path, number, entry)
        if template.name in templates:
            raise DataError(f"{path}: two templates are named {template.name!r}. Rename one of them.")
        templates[template.name] = template
    if not templates:
        raise DataError(f"{path} has no template. Add rows with `name`, `system` and `user`.")
    return templates


def choose_template(path: str | Path, name: str | None) -> PromptTemplate:
    """Returns the template with this name; None: the only one.

    Raises:
        DataError: No template has this name, or there are several and `name` is None.
    """
    templates = read_templates(path)
    if name is None and len(templates) == 1:
        return next(iter(templates.values()))
    if name not in templates:
        asked = f"no template is named {name!r}" if name else "there are several templates"
        raise DataError(f"{path}: {asked}: choose one of {', '.join(templates)}")
    return templates[name]


def _from_yaml(path: Path) -> list[Any]:
    try:
        with Path(expand_path(path)).open("rb") as file:
            data = file.read(_LARGEST_YAML + 1)
        if len(data) > _LARGEST_YAML:
            raise DataError(
                f"{path} is larger than {_LARGEST_YAML:,} bytes, the limit for YAML: keep only prompt templates in it, or use CSV"
            )
        found = load_yaml(data.decode("utf-8"))
    except ImportError:
        raise DataError(
            "prompt templates in YAML need PyYAML, which is not installed: pip install 'palate[data]'"
        ) from None
    except FileNotFoundError:
        raise DataError(f"prompt template file {path} does not exist. Check the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}. Check the file.") from None
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"{show_path(path)}: broken YAML: {error}") from None
    if isinstance(found, dict):
        found = found.get("prompts", found)
    if isinstance(found, dict):
        return [{"name": name, **entry} if isinstance(entry, dict) else entry for name, entry in found.items()]
    return found if isinstance(found, list) else [found]


def _template(path: Path, number: int, entry: Any) -> PromptTemplate:
    if not isinstance(entry, dict):
        raise DataError(f"{path}, template {number}: is {kind(entry)}, not an object with `name`, `system` and `user`")
    for key in ("name", "user"):
        if not isinstance(entry.get(key), str) or not entry[key].strip():
            raise DataError(f"{path}, template {number}: `{key}` is missing or empty; it has {listed(list(entry))}")
    system = entry.get("system") or ""
    if not isinstance(system, str):
        raise DataError(f"{path}, template {number}: `system` is {kind(system)}, not text")
    template = PromptTemplate(entry["name"].strip(), system, entry["user"])
    if not template.placeholders:
        raise DataError(f"{path}, template {template.name!r}: `user` has no placeholder, such as {{query}}")
    return template


def format_for(
    name: str | None = None,
    *,
    input_columns: Mapping[str, str] | None = None,
    label_columns: Mapping[str, str | Mapping[str, str]] | None = None,
    prompt_template: str | Path | None = None,
    prompt_name: str | None = None,
) -> Format | None:
    """Returns the row format: by name, by columns, or None to detect it per row.

    Args:
        name: Name of a format.
        input_columns, label_columns: See `Columns`.
        prompt_template: File with prompt templates.
        prompt_name: Name of the template, if there are several.

    Raises:
        DataError: Unknown format or template, contradictory settings, or columns that do not match the template.
    """
    if input_columns is None and label_columns is None and prompt_template is None:
        return format_named(name) if name else None
    if name:
        raise DataError(f"the format {name!r} cannot be combined with named columns: give one of them")
    if not input_columns or not label_columns:
        raise DataError(
            "named columns need both input_columns={placeholder: column} and label_columns={'chosen': column, …}"
        )
    template = choose_template(prompt_template, prompt_name) if prompt_template else None
    return Columns(input_columns, label_columns, template).as_format()
