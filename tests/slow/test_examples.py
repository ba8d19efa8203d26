"""The scripts and notebooks of recipes/examples run from top to bottom, with a tiny model in the place of theirs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from palate import Predictor, TrainingJob
from palate.session import Session
from palate.weights import SETTING
from palate_recipes.demo import write_demo
from tests.slow.conftest import processes_of, until

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "recipes" / "examples"

# Example, arguments ({demo} is a training file), how many jobs it makes, and what it must print.
EXPECTED = {
    "five_lines.py": ([], 1, r"\S"),
    "own_csv.py": ([], 1, r"16 of 16 rows are usable \(kto.*step +1  loss 0\.5\d\d.*model: "),
    "dpo_after_sft.py": ([], 2, r"step +1  loss 0\.69\d  margin [+-]0\.00.*one adapter for the same base: "),
    "sweep.py": (["1e-4", "2e-3"], 2, r"step +1e-04 +2e-03\n +1 +0\.69\d +0\.69\d.*lowest validation loss"),
    "from_pai.py": (["{demo}"], 1, r"model data: .*/model\n\s*\S"),
    "first_model.ipynb": ([], 1, r"68 pairs.*step +1  loss.*base .*default "),
    "evaluate.ipynb": ([], 1, r"pairs: accuracy .*win-rate against the base: [\d.]+% \[.*A is .*B is "),
    "sweep.ipynb": ([], 2, r"lowest validation loss.*scored 42  cached 0.*scored \d  cached 42"),
}


def test_every_example_is_run_here_and_named_in_the_list() -> None:
    there = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")}
    assert there == EXPECTED.keys()
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert [name for name in there if f"[{name}]({name})" not in listed] == []


# A deployment and a sweep are in other examples too: the notebook trains and deploys in the same lines as five_lines.py.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.thorough)
        if name in ("five_lines.py", "from_pai.py", "sweep.py", "evaluate.ipynb")
        else name
        for name in EXPECTED
    ],
)
def test_an_example_runs(name: str, home: Path, tiny: Path, tmp_path: Path) -> None:
    arguments, jobs, printed = EXPECTED[name]
    folder = tmp_path / "reader"
    folder.mkdir()
    demo = str(write_demo(tmp_path / "demo", per_topic=1)["train"])
    code = [str(EXAMPLES / name)] if name.endswith(".py") else ["-c", cells(EXAMPLES / name)]
    done = subprocess.run(
        [sys.executable, *code, *(argument.format(demo=demo) for argument in arguments)],
        cwd=folder,
        env={**os.environ, "PALATE_HOME": str(home), SETTING: f"smollm2-135m-instruct={tiny}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-3000:]}"
    assert re.search(printed, done.stdout, re.DOTALL), done.stdout
    found = TrainingJob.list(session=Session())
    assert [job.status for job in found] == ["Succeeded"] * jobs
    assert Predictor.list(session=Session()) == []
    until(lambda: processes_of(home) == [], timeout_s=30)


def cells(notebook: Path) -> str:
    """Returns the code of a notebook as one program; its cells hold no magics and no stored output."""
    content = json.loads(notebook.read_text(encoding="utf-8"))
    assert content["nbformat"] == 4
    code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert [cell["outputs"] for cell in code] == [[]] * len(code)
    return "\n".join("".join(cell["source"]) for cell in code)
