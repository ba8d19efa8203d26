"""A run's variables in a file, for engines that would show them to anyone who inspects a run. Knows no engine."""

from __future__ import annotations

import json
import os
from pathlib import Path

FILE_VARIABLE = "PALATE_VARIABLES_FILE"
"""Names the file, a JSON object of names and values, in the environment of a runner."""


def take_variables() -> None:
    """Puts what the file holds into this process's environment, and removes it: it may hold credentials.

    A run without such a file has all that it needs in its environment.
    """
    name = os.environ.pop(FILE_VARIABLE, "")
    if not name or not (path := Path(name)).is_file():
        return
    os.environ.update(json.loads(path.read_text(encoding="utf-8")))
    try:
        path.unlink()
    except OSError:
        pass  # mounted read-only; who wrote it removes it
