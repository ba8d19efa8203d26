"""Training data against held-out data: what is read how often, alone and with helpers, and what a helper's end says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from palate import Session
from palate.data.inputs import PreferenceData, checked_inputs
from palate_recipes.data import checking
from palate_recipes.errors import CheckError

COUNTED = """
import json, sys
from collections import Counter

opened = Counter()
sys.addaudithook(lambda event, found: opened.update([str(found[0])]) if event == "open" else None)

from palate import get_default_session
from palate.data.inputs import checked_inputs

inputs = json.loads(sys.argv[1])
with checked_inputs(inputs, get_default_session(), strategy="dpo", bad_rows="refuse") as checked:
    leaks = [item.report.findings["leakage"].count for item in checked.values() if "leakage" in item.report.findings]
print(json.dumps({"opened": {name: opened[path] for name, path in inputs.items()}, "leaks": leaks}))
"""


def pairs(path: Path, count: int, start: int = 0) -> Path:
    rows = (
        {"prompt": f"Is it {n} now?", "chosen": f"Yes {n}.", "rejected": "No."} for n in range(start, start + count)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def counted(home: Path, **inputs: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", COUNTED, json.dumps({name: str(path) for name, path in inputs.items()})],
        capture_output=True,
        text=True,
        env={**os.environ, "PALATE_HOME": str(home)},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_validation_data_is_read_once(home: Path, tmp_path: Path) -> None:
    train, held_out = pairs(tmp_path / "train.jsonl", 20), pairs(tmp_path / "held.jsonl", 5, 18)
    alone = counted(home, validation=held_out)
    both = counted(home, train=train, validation=held_out)
    assert both["opened"]["validation"] == alone["opened"]["validation"] > 0
    assert both["leaks"] == [2]


@pytest.mark.parametrize("large", [False, True], ids=["alone", "with helpers"])
def test_validation_data_is_read_in_its_own_format(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    if large:
        monkeypatch.setattr(checking, "LARGE", 1)
    table = tmp_path / "held.csv"
    table.write_text("q,good,bad\nIs it 3 now?,Yes.,No.\n")
    held_out = PreferenceData(
        uri=table, input_columns={"prompt": "q"}, label_columns={"chosen": "good", "rejected": "bad"}
    )
    inputs = {"train": pairs(tmp_path / "train.jsonl", 20), "validation": held_out}
    with checked_inputs(inputs, session, strategy="dpo", bad_rows="refuse") as checked:
        (place,) = checked["train"].report.findings["leakage"].places
    assert (place.row, place.what.endswith("held.csv, row 1")) == (4, True)


def test_a_helper_that_cannot_run_says_what_was_not_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "LARGE", 1)
    monkeypatch.setenv("PYTHONIOENCODING", "none")  # no Python starts with it; this one runs already
    path = pairs(tmp_path / "prefs.jsonl", 3)
    with pytest.raises(CheckError, match=r"(?s)prefs\.jsonl is not checked whole.*exit code 1\. Free memory.*\n  ."):
        checking.check([(path, "prefs.jsonl")])
