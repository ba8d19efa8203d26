"""Records that an earlier version wrote, put where a test can use them. Knows the folder tests/fixtures, no format."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

_RECORDS_V1 = Path(__file__).parents[1] / "fixtures" / "records-v1"

_MODEL_TIME = 1_700_000_000
"""Of the model's files: a model folder is told from another one by their times, too, and git keeps none."""


def records_v1(home: Path) -> None:
    """Copies the store of the fixtures to `home/store`, and the base model beside it; every path in a manifest follows."""
    shutil.copytree(_RECORDS_V1 / "store", home / "store")
    shutil.copytree(_RECORDS_V1 / "models", home / "models")
    for file in (home / "models" / "tiny").iterdir():
        os.utime(file, (_MODEL_TIME, _MODEL_TIME))
    for manifest in (home / "store").glob("*/*/manifest.json"):
        manifest.write_text(manifest.read_text().replace("/data/", f"{home}/"))
