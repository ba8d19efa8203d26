"""Reads what an evaluation asks: prompts, from a file of prompts or from preference data, people's labels, the judge. Asks nothing."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palate.evaluation.arena import Labelled
from palate.generate.chat_client import Endpoint
from palate.generate.prompts import Prompt, as_prompts, with_system
from palate_recipes.errors import ConfigurationError, DataError
from palate_recipes.text import expand_path, show_path

if TYPE_CHECKING:
    from palate.predictor import Predictor
    from palate.session import Session
    from palate.sources.inputs import PreferenceData, Rows
    from palate_recipes.preferences.row import Strategy

Prompts = str | Path | Iterable[str | Sequence[Mapping[str, str]]]

_JUDGE = re.compile(r"(?P<url>https?://\S*?/v\d\w*(?:/openai)?)/(?P<model>\S+)")
_NO_SCHEME = re.compile(r"[^/\s]+:\d+/|[^/\s]+/(?:\S+/)?v\d\w*/\S")
"""Starts a URL without its scheme; a model name may have a slash, as `Qwen/Qwen3-8B`."""
_ENVIRONMENT = ("OPENAI_BASE_URL", "OPENAI_API_KEY")
_ANSWERS = (("answer_a", "answer_b"), ("response_a", "response_b"))
_LABELS = ("label", "preference")
_SAID = {"a": "A", "b": "B", "tie": "tie"}


def distinct_prompts(given: Iterable[Prompt], system_prompt: str, limit: int | None) -> list[Prompt]:
    """Returns the distinct prompts up to a limit, with the system prompt prepended to those that have none."""
    different: dict[tuple[tuple[str, str], ...], Prompt] = {}
    for prompt in given:
        whole = with_system(prompt, system_prompt)
        different.setdefault(whole.messages, whole)
    return list(different.values())[:limit]


def read_prompts_of(
    prompts: Prompts | None, data: str | Path | Rows | PreferenceData | None, session: Session, strategy: Strategy
) -> list[Prompt]:
    """Returns the given prompts, or those of preference data.

    Raises:
        DataError: The prompts or the data cannot be read.
    """
    if prompts is not None:
        return as_prompts(prompts)
    if data is None:
        return []
    from palate.sources.inputs import checked_inputs
    from palate_recipes.preferences.load import read_rows

    with checked_inputs({"validation": data}, session, strategy=strategy, bad_rows="skip") as inputs:
        found = inputs["validation"]
        return [
            Prompt(row.number, tuple((turn.role, turn.content) for turn in row.prompt), is_text=row.text is not None)
            for path in found.fetched.files
            for row in read_rows(path, strategy=strategy, bad_rows="skip", format=found.format)
        ]


def judge_of(
    given: str | Predictor | tuple[Endpoint, str] | None, api_key_env: str | None = None
) -> tuple[Endpoint | None, str]:
    """Returns the judge's endpoint and model name.

    Args:
        given: `URL/MODEL`, such as `http://127.0.0.1:8000/v1/judge`; a model name alone, at OPENAI_BASE_URL; a running service,
            whose tuned model judges; or an endpoint and a model name.
        api_key_env: Environment variable with the key.

    Raises:
        ConfigurationError: The address is not one, no endpoint is configured, or the variable is not set.
        ServiceError: The service is not running.
    """
    if given is None:
        return None, ""
    if isinstance(given, tuple):
        return given
    if not isinstance(given, str):
        return Endpoint.of_service(given.service_name, given._run.session), "default"
    if "://" not in given:
        if not given.strip():
            raise ConfigurationError("judge is empty: expected URL/MODEL, such as http://127.0.0.1:8000/v1/judge")
        if _NO_SCHEME.match(given):
            raise ConfigurationError(f"judge={given!r} has no http:// or https://: pass judge='http://{given}'")
        if api_key_env is None and not any(os.environ.get(name, "").strip() for name in _ENVIRONMENT):
            raise ConfigurationError(
                f"judge={given!r} is a model name alone, and no endpoint is configured: pass judge='URL/MODEL', such as "
                f"http://127.0.0.1:8000/v1/{given}, or set {' or '.join(_ENVIRONMENT)}"
            )
        return Endpoint.from_environment(None, api_key_env), given
    found = _JUDGE.fullmatch(given)
    if found is None:
        raise ConfigurationError(
            f"judge={given!r} does not end with a model name after its base URL: expected URL/MODEL, such as "
            "http://127.0.0.1:8000/v1/judge. If the base URL has no version, pass the URL in OPENAI_BASE_URL and the model alone"
        )
    return Endpoint.other(found["url"], api_key_env), found["model"]


def read_rubric(given: str | Path) -> str:
    """Returns a rubric's text: the content of a file if it is a Path, else the text itself."""
    if isinstance(given, str):
        return given
    try:
        return given.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"rubric {show_path(given)} cannot be read: {error}. Pass a UTF-8 text file") from None


def read_labels(given: str | Path | Iterable[Mapping[str, Any]]) -> list[Labelled]:
    """Reads answers that people have compared.

    Args:
        given: Rows, or a JSONL, JSON or CSV file of rows: `prompt` (a string or messages), `answer_a`, `answer_b`, and `label` or
            `preference`: A, B or tie. Rows with an empty label are skipped.

    Raises:
        DataError: The file cannot be read, a row is incomplete, or no row has a label.
    """
    where = "labels"
    rows: Sequence[Mapping[str, Any]]
    if isinstance(given, str | Path):
        where = show_path(given)
        rows = _rows_in(given)
    else:
        rows = list(given)
    found = []
    for number, row in enumerate(rows, start=1):
        said = next((str(row[name]).strip() for name in _LABELS if row.get(name) is not None), "")
        if not said:
            continue
        label = _SAID.get(said.lower())
        answers = next(((row.get(a), row.get(b)) for a, b in _ANSWERS if a in row and b in row), (None, None))
        if label is None or not isinstance(answers[0], str) or not isinstance(answers[1], str):
            wrong = f"label {said!r}" if label is None else "no answers"
            raise DataError(
                f"{where}, row {number} has {wrong}: expected `prompt`, `answer_a`, `answer_b`, and `label`: A, B or tie"
            )
        prompt = row.get("prompt", row.get("messages"))
        conversation = as_prompts([prompt] if prompt is not None else [""])[0].messages
        found.append(Labelled(number, conversation, answers[0], answers[1], label))
    if not found:
        raise DataError(f"{where} has no label: fill the column `label` with A, B or tie")
    return found


def _rows_in(path: str | Path) -> list[dict[str, Any]]:
    try:
        file = Path(expand_path(path))
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix.lower() == ".csv":
            return list(csv.DictReader(io.StringIO(text, newline="")))
        rows = (
            json.loads(text)
            if file.suffix.lower() == ".json"
            else [json.loads(line) for line in text.splitlines() if line.strip()]
        )
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{show_path(path)} cannot be read as rows: {error}. Pass JSONL, a JSON array or CSV") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(
            f"{show_path(path)} has rows that are not objects: expected `prompt`, `answer_a`, `answer_b`, `label`"
        )
    return rows
