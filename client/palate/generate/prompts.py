"""Reads prompts that are to be answered: text, JSON, JSONL or CSV. Knows no answers and no endpoint."""

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
"""Shows the beginning of a value however large and deep it is."""

_ROLES = ("system", "user", "assistant", "tool")


class Prompt(NamedTuple):
    """A conversation that waits for an answer."""

    number: int
    """Line of a text or JSONL file, position in anything else; from 1."""
    messages: tuple[tuple[str, str], ...]
    """(role, content) each."""
    is_text: bool
    """Whether it was given as one text, and goes out as one."""

    def as_messages(self) -> list[dict[str, str]]:
        """Returns the conversation as chat APIs take it."""
        return [{"role": role, "content": content} for role, content in self.messages]


def read_prompts(path: str | Path) -> list[Prompt]:
    """Reads a file of prompts.

    A text file (`.txt` or no suffix) has one a line; empty lines are passed over. JSON (an array) and JSONL have texts, or
    objects with `prompt` (a text or a list of messages) or `messages`; CSV has a column `prompt`. Other fields are ignored.

    Raises:
        DataError: The file cannot be read, holds no prompt, or a row is none; names the row and the remedy.
    """
    try:
        path = Path(expand_path(path))
    except ValueError as error:
        raise DataError(f"{show_path(path)} {error}") from None
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 text (byte {error.start}): save it as UTF-8") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
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
            raise DataError(f"{path} is no JSON array but {type(array).__name__}: put the prompts into [ … ]")
        rows = enumerate(array, start=1)
    elif suffix == ".csv":
        rows = _table(path, text)
    else:
        raise DataError(f"{path} has the suffix {suffix!r}: prompts are read from .txt, .json, .jsonl and .csv")
    prompts = [_prompt(number, row, f"{path}, row {number}") for number, row in rows]
    if not prompts:
        raise DataError(f"{path} holds no prompt: write one a line, or rows with `prompt` or `messages`")
    return prompts


def as_prompts(given: str | Path | Iterable[str | Sequence[Mapping[str, str]]]) -> list[Prompt]:
    """Returns prompts from a file's path, or from texts and message lists.

    Raises:
        DataError: See `read_prompts`.
    """
    if isinstance(given, str | Path):
        return read_prompts(given)
    prompts = [_prompt(number, row, f"prompt {number}") for number, row in enumerate(given, start=1)]
    if not prompts:
        raise DataError("no prompts were given: pass a file's path, texts, or lists of messages")
    return prompts


def with_system(prompt: Prompt, system_prompt: str) -> Prompt:
    """Returns the prompt with a system message before it, unless there is none to add or it has its own."""
    if not system_prompt or prompt.messages[0][0] == "system":
        return prompt
    return Prompt(prompt.number, (("system", system_prompt), *prompt.messages), is_text=False)


def _table(path: Path, text: str) -> list[tuple[int, Any]]:
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""))
        if "prompt" not in (reader.fieldnames or []):
            raise DataError(
                f"{path} has no column `prompt` but {', '.join(reader.fieldnames or [])[:200] or 'nothing'}"
            )
        return list(enumerate(reader, start=1))
    except csv.Error as error:  # such as a cell of more than csv.field_size_limit()
        raise DataError(f"{path} is broken CSV: {error}. Quote cells that hold separators or line breaks") from None


def _loads(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is no JSON: {error}") from None


def _prompt(number: int, row: Any, where: str) -> Prompt:
    value = row.get("prompt", row.get("messages")) if isinstance(row, Mapping) else row
    if isinstance(value, str) and value.strip():
        return Prompt(number, (("user", _clean(value, where)),), is_text=True)
    if not isinstance(value, list | tuple) or not value:
        raise DataError(
            f"{where} has no prompt: it needs `prompt` (a text) or `messages` (a list), and has {_REPR.repr(row):.80}"
        )
    messages = []
    for position, message in enumerate(value, start=1):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, Mapping) else (None, None)
        if role not in _ROLES or not isinstance(content, str):
            raise DataError(
                f"{where}, message {position} is {_REPR.repr(message):.80}: it needs a role ({', '.join(_ROLES)}) and a text as content"
            )
        messages.append((role, _clean(content, where)))
    if messages[-1][0] not in {"user", "tool"}:
        raise DataError(f"{where} ends with the role {messages[-1][0]}: leave off what is after the last question")
    return Prompt(number, tuple(messages), is_text=False)


def _clean(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where} has half a character at position {error.start}: repair or remove the row") from None
    return text
