"""Reads prompts from text, JSON, JSONL or CSV. Knows files, no answers and no endpoint."""

from __future__ import annotations

import csv
import io
import json
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from palate_recipes.errors import DataError
from palate_recipes.text import expand_path, show_path

_REPR = reprlib.Repr()
"""Truncates large and deeply nested values."""

_ROLES = ("system", "user", "assistant", "tool")


class Prompt(NamedTuple):
    """A conversation to be answered."""

    number: int
    """Line number in a text or JSONL file, otherwise the position; counts from 1."""
    messages: tuple[tuple[str, str], ...]
    """Pairs of (role, content)."""
    is_text: bool
    """Whether it was given as a string, and is written as one."""

    def as_messages(self) -> list[dict[str, str]]:
        """Returns the conversation as messages of the chat API."""
        return [{"role": role, "content": content} for role, content in self.messages]


def read_prompts(path: str | Path) -> list[Prompt]:
    """Reads a file of prompts.

    A text file (`.txt` or no suffix) has one prompt per line; empty lines are skipped. JSON (an array) and JSONL have strings,
    or objects with `prompt` (a string or a list of messages) or `messages`; CSV has a column `prompt`. Ignores other fields.

    Raises:
        DataError: The file cannot be read, has no prompts, or has an invalid row; names the row and the remedy.
    """
    try:
        path = Path(expand_path(path))
    except ValueError as error:
        raise DataError(f"{show_path(path)} {error}") from None
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. Check the path and its permissions") from None
    suffix = path.suffix.lower()
    if suffix in {"", ".txt"}:
        rows: Iterable[tuple[int, Any]] = (
            (number, line.strip()) for number, line in enumerate(text.split("\n"), start=1) if line.strip()
        )
    elif suffix in {".jsonl", ".ndjson"}:
        rows = [
            (number, _loads(line, f"{path}, line {number}"))
            for number, line in enumerate(text.split("\n"), start=1)
            if line.strip()
        ]
    elif suffix == ".json":
        array = _loads(text, str(path))
        if not isinstance(array, list):
            raise DataError(f"{path}: expected a JSON array, got {type(array).__name__}: put the prompts in [ … ]")
        rows = enumerate(array, start=1)
    elif suffix == ".csv":
        rows = _table(path, text)
    else:
        raise DataError(f"{path} has the suffix {suffix!r}: expected .txt, .json, .jsonl or .csv")
    prompts = [_prompt(number, row, f"{path}, row {number}") for number, row in rows]
    if not prompts:
        raise DataError(f"{path} contains no prompts: write one per line, or rows with `prompt` or `messages`")
    return prompts


def as_prompts(given: str | Path | Iterable[str | Sequence[Mapping[str, str]]]) -> list[Prompt]:
    """Returns prompts from the path of a file, or from strings and message lists.

    Raises:
        DataError: See `read_prompts`.
    """
    if isinstance(given, str | Path):
        return read_prompts(given)
    prompts = [_prompt(number, row, f"prompt {number}") for number, row in enumerate(given, start=1)]
    if not prompts:
        raise DataError("prompts is empty: pass the path of a file, strings, or lists of messages")
    return prompts


def with_system(prompt: Prompt, system_prompt: str) -> Prompt:
    """Returns the prompt with `system_prompt` prepended, unless that is empty or the prompt has its own."""
    if not system_prompt or prompt.messages[0][0] == "system":
        return prompt
    return Prompt(prompt.number, (("system", system_prompt), *prompt.messages), is_text=False)


def _table(path: Path, text: str) -> list[tuple[int, Any]]:
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""))
        if "prompt" not in (reader.fieldnames or []):
            raise DataError(
                f"{path} has no column `prompt`: it has {', '.join(reader.fieldnames or [])[:200] or 'no columns'}. "
                "Rename the column with the prompts"
            )
        return list(enumerate(reader, start=1))
    except csv.Error as error:  # such as a cell larger than csv.field_size_limit()
        raise DataError(
            f"{path} is not valid CSV: {error}. Quote cells that contain separators or line breaks"
        ) from None


def _loads(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not valid JSON: {error}. Fix the syntax") from None


def _prompt(number: int, row: Any, where: str) -> Prompt:
    value = row.get("prompt", row.get("messages")) if isinstance(row, Mapping) else row
    if isinstance(value, str) and value.strip():
        return Prompt(number, (("user", _clean(value, where)),), is_text=True)
    if not isinstance(value, list | tuple) or not value:
        raise DataError(
            f"{where} has no prompt: expected `prompt` (a string) or `messages` (a list), got {_REPR.repr(row):.80}"
        )
    messages = []
    for position, message in enumerate(value, start=1):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, Mapping) else (None, None)
        if role not in _ROLES or not isinstance(content, str):
            raise DataError(
                f"{where}, message {position} is {_REPR.repr(message):.80}: expected a role ({', '.join(_ROLES)}) and string content"
            )
        messages.append((role, _clean(content, where)))
    if messages[-1][0] not in {"user", "tool"}:
        raise DataError(
            f"{where} ends with the role {messages[-1][0]}: remove the messages after the last user message"
        )
    return Prompt(number, tuple(messages), is_text=False)


def _clean(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} has half a character (a lone surrogate) at position {error.start}: fix or remove the row"
        ) from None
    return text
