"""Training data against held-out data: what is read how often, and in which format."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from palate import Session, get_default_session
from palate.sources.inputs import PreferenceData, checked_inputs
from palate_recipes.errors import PalateError

COUNTED = """
import json, sys
from collections import Counter

opened = Counter()
sys.addaudithook(lambda event, found: opened.update([str(found[0])]) if event == "open" else None)

from palate import get_default_session
from palate.sources.inputs import checked_inputs

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


def test_validation_data_is_read_in_its_own_format(session: Session, tmp_path: Path) -> None:
    table = tmp_path / "held.csv"
    table.write_text("q,good,bad\nIs it 3 now?,Yes.,No.\n")
    held_out = PreferenceData(
        uri=table, input_columns={"prompt": "q"}, label_columns={"chosen": "good", "rejected": "bad"}
    )
    inputs = {"train": pairs(tmp_path / "train.jsonl", 20), "validation": held_out}
    with checked_inputs(inputs, session, strategy="dpo", bad_rows="refuse") as checked:
        (place,) = checked["train"].report.findings["leakage"].places
    assert (place.row, place.what.endswith("held.csv, row 1")) == (4, True)


def test_rows_in_memory_are_checked_and_written_as_a_file() -> None:
    import datasets
    import pandas

    rows = [{"prompt": f"Ask {n}", "chosen": f"Yes {n}", "rejected": f"No {n} é"} for n in range(3)]
    contents = set()
    for given in (rows, datasets.Dataset.from_list(rows), pandas.DataFrame(rows), PreferenceData(uri=rows)):
        with checked_inputs({"train": given}, get_default_session(), strategy="dpo", bad_rows="refuse") as checked:
            assert checked["train"].rows == 3
            contents.add(checked["train"].fetched.files[0].read_bytes())
    assert len(contents) == 1


def test_what_is_no_table_is_refused_with_what_to_give_instead() -> None:
    import datasets
    import pandas

    table = datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    for given, words in (
        (table.to_iterable_dataset(), r"list\(dataset.take\(N\)\)"),
        (datasets.DatasetDict(train=table), r"dataset\['train'\]"),
        ((row for row in [{}]), "expected a path"),
        (pandas.Series(["a"]), "is Series: expected a path"),
        (pandas.DataFrame([["a", "b"]], columns=["prompt", "prompt"]), "two columns 'prompt'"),
        ([], "has no rows"),
        ([{"prompt": "a", "chosen": "b"}], r"inputs\['train'\].*line 1: `rejected` is missing"),
        ([{"prompt": object()}], "row 1: `prompt` is object"),
        ([{"prompt": "a", "chosen": "b", "rejected": "c", "image": object()}], "`image` is an image"),
    ):
        with (
            pytest.raises(PalateError, match=re.compile(words, re.S)),
            checked_inputs({"train": given}, get_default_session(), strategy="dpo", bad_rows="refuse"),
        ):
            pass
