"""Palate's own folder on this machine. Knows where it is and what its parts are called."""

from __future__ import annotations

import os
from pathlib import Path


def palate_home() -> Path:
    """Returns PALATE_HOME, by default `~/.palate`; made, and private to the user, when it is missing."""
    home = Path(os.environ.get("PALATE_HOME") or Path.home() / ".palate").expanduser().absolute()
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    return home
