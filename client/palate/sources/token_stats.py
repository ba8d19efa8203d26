"""Adds token counts to the report of a data check: runs a program of the trainer. Knows its spec, no tokenizer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from palate.env_file import without_credentials
from palate.preflight import check_trainer
from palate.session import get_default_session
from palate.ui import note
from palate.weights import fetch_weights, find_weights
from palate_recipes.errors import DataError
from palate_recipes.hyperparameters import HYPERPARAMETERS
from palate_recipes.preferences.report import Location, Report
from palate_recipes.preferences.row import Strategy
from palate_recipes.specs.train import Measured, MeasureSpec
from palate_recipes.text import expand_path, show_path


def measure(
    report: Report,
    files: Sequence[tuple[Path, str]],
    *,
    tokenizer: str,
    strategy: Strategy | None,
    settings: dict[str, Any],
    seq_length: int | None = None,
    system_prompt: str | None = None,
    apply_chat_template: bool = True,
) -> Measured:
    """Counts the tokens of files, truncated as in training, and adds lengths and findings to their report.

    Args:
        report: Report of the same files.
        files: Path and name of each file.
        tokenizer: A model of the catalog, or a model folder.
        strategy: Training strategy of the rows; None accepts any.
        settings: Arguments of `format_for`.
        seq_length: Maximum tokens of prompt and answer together; None only counts.
        system_prompt: For rows without one; None for the training default.
        apply_chat_template: As in training.

    Returns:
        The counts that were added.

    Raises:
        UnknownModelError: The model is not in the catalog.
        DataError: The tokenizer does not work on these rows; contains the cause.
    """
    check_trainer()
    session = get_default_session()
    try:
        folder = Path(expand_path(tokenizer))
    except ValueError as error:
        raise DataError(f"the tokenizer {show_path(tokenizer)} {error}") from None
    if not os.path.isdir(folder):
        source, _ = find_weights(session, model_name=tokenizer, model_uri=None)
        folder, _ = fetch_weights(source, session, say=note)
    prompt = HYPERPARAMETERS["system_prompt"].default if system_prompt is None else system_prompt
    spec = MeasureSpec(
        model_dir=str(folder.absolute()),
        files=[(str(Path(path).absolute()), name) for path, name in files],
        strategy=strategy,
        settings=settings,
        seq_length=seq_length or sys.maxsize,
        system_prompt=str(prompt),
        apply_chat_template=apply_chat_template,
    )
    with tempfile.TemporaryDirectory(prefix="palate-") as work:
        spec.write(Path(work) / "measure.json")
        done = subprocess.run(
            [sys.executable, "-P", "-m", "palate_trainer.token_stats", str(Path(work) / "measure.json")],
            capture_output=True,
            text=True,
            env={**without_credentials(os.environ), "PYTHONSAFEPATH": "1"},
            cwd=work,
        )
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise DataError(f"the tokens could not be counted with the tokenizer {show_path(tokenizer)}: {said[-1]}")
    found: Measured = json.loads(done.stdout.splitlines()[-1])
    for code, places in found["places"].items():
        for file, row, unit, what in places:
            report.add(code, Location(file, row, unit, "", what))
        report.findings[code].count += found["counts"][code] - len(places)
    if found["lengths"]:
        report.lengths["tokens"], report.histograms["tokens"] = found["lengths"], found["histogram"]
    return found
