"""A notebook in a real kernel: a training is one output that is updated in place, and what users hold is shown as HTML."""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
import venv
from pathlib import Path
from typing import Any

import psutil
import pytest

from palate import Predictor
from palate.session import Session
from palate.weights import SETTING
from tests.slow.conftest import processes_of, until
from tests.support.html import check_html

pytestmark = [pytest.mark.slow, pytest.mark.thorough]

STEPS = 3

CELLS = {
    "kernel": "import os; os.getpid()",
    "train": f"""
from palate import ModelTrainingRecipe
recipe = ModelTrainingRecipe(
    "smollm2-135m-instruct",
    hyperparameters={{"training_strategy": "dpo", "max_steps": {STEPS}, "logging_steps": 1, "per_device_train_batch_size": 2}},
)
job = recipe.train(inputs={{"train": "prefs.json"}})
""",
    "wait": "job.wait()",
    "job": "job",
    "report": """
from pathlib import Path
from palate_recipes.preferences.check import check
check([(Path("hostile.json"), "hostile.json")])
""",
    "predictor": """
predictor = job.deploy("svc", wait=False)
predictor
""",
    "delete": "predictor.delete_service()",
    # One poll's news, then a poll without news.
    "display": """
import json
from palate.ui import make_display
with make_display(True, "<script>") as display:
    display.log("loading <b>\\n")
    display.metrics(json.dumps({"kind": "train", "step": 1, "total_steps": 4, "loss": 0.7}).encode() + b"\\n")
    display.flush()
    display.flush()
""",
}

RUN = """
import json, sys
import nbformat
from nbclient import NotebookClient

cells = json.load(sys.stdin)
notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in cells.values()])
updates = {name: [] for name in cells}  # cell: (display id, HTML) of each message, in order


class Client(NotebookClient):
    def process_message(self, msg, cell, cell_index):
        if msg["msg_type"] in ("display_data", "update_display_data"):
            content = msg["content"]
            shown = [msg["msg_type"], content["transient"].get("display_id"), content["data"].get("text/html")]
            updates[list(cells)[cell_index]].append(shown)
        return super().process_message(msg, cell, cell_index)


Client(notebook, timeout=200, kernel_name="python3").execute()
outputs = {name: cell.outputs for name, cell in zip(cells, notebook.cells)}
json.dump({"outputs": outputs, "updates": updates}, open("executed.json", "w"))
"""
"""Executes cells as `jupyter execute` does; notes the messages, since the notebook keeps only the last state of a display."""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with a kernel on top of this environment, which stays as it is."""
    folder = tmp_path_factory.mktemp("notebook")
    venv.create(folder / "venv")
    python = folder / "venv" / "bin" / "python"
    own = sysconfig.get_path("purelib", vars={"base": str(folder / "venv")})
    # addsitedir, because an editable install is a .pth file.
    Path(own, "outer.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    install = [python, "-m", "pip", "install", "--quiet", "--retries=1", "--timeout=20", "ipykernel", "nbclient"]
    done = subprocess.run(install, capture_output=True, text=True, timeout=120)
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()
        pytest.skip(f"a kernel cannot be installed from the index: {reason[-1] if reason else '?'}")
    return python


def htmls(outputs: list[dict[str, Any]]) -> list[str]:
    """Returns the HTML of a cell's outputs, in order; no cell may have an error."""
    assert [output for output in outputs if output["output_type"] == "error"] == []
    return [output["data"]["text/html"] for output in outputs if "text/html" in output.get("data", {})]


def test_a_notebook_trains_and_shows_what_it_holds(
    python: Path, home: Path, tiny: Path, prefs: Path, tmp_path: Path
) -> None:
    attack = "<script>alert(1)</script>"
    hostile = [{"prompt": "a", "completion": "b", "label": attack}, {attack: "$x$"}]
    (tmp_path / "hostile.json").write_text(json.dumps(hostile))
    folders = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    environment = {**os.environ, **{name: str(tmp_path / name.lower()) for name in folders}}
    try:
        done = subprocess.run(
            [python, "-c", RUN],
            input=json.dumps(CELLS),
            cwd=prefs.parent,
            env={**environment, "PALATE_HOME": str(home), SETTING: f"smollm2-135m-instruct={tiny}"},
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    finally:
        for service in Predictor.list(session=Session()):
            service.delete_service()
    executed = json.loads((tmp_path / "executed.json").read_text())
    outputs, updates = executed["outputs"], executed["updates"]

    # Training: one output, which ends with the whole curve.
    (shown,) = htmls(outputs["train"])
    root = check_html(shown)
    text = "".join(root.itertext())
    assert f"step {STEPS} of {STEPS}" in text
    assert root.find(".//progress").get("value") == "1.0000"  # type: ignore[union-attr]
    assert len((root.find(".//polyline").get("points") or "").split()) == STEPS  # type: ignore[union-attr]
    assert root.find(".//pre") is not None
    (first, identifier, empty), *later = updates["train"]
    assert first == "display_data"
    assert identifier
    assert "<progress" not in empty
    assert {(kind, name) for kind, name, _ in later} == {("update_display_data", identifier)}
    assert len(later) > 1
    assert later[-1][2] == shown
    assert any("<progress" not in html for _, _, html in later), "the log was shown before the first step"

    # Values: the last expression of a cell. wait() shows the display of the job, too.
    waited, job = htmls(outputs["wait"])
    assert f"step {STEPS} of {STEPS}" in waited
    assert htmls(outputs["job"]) == [job]
    text = "".join(check_html(job).itertext())
    assert "stateSucceeded" in text
    assert f"step {STEPS} of {STEPS}" in text
    (report,) = htmls(outputs["report"])
    text = "".join(check_html(report).itertext())
    assert "0 of 2 rows are usable" in text
    assert f"`{attack}`" in text
    (predictor,) = htmls(outputs["predictor"])
    assert "servicesvc" in "".join(check_html(predictor).itertext())
    assert htmls(outputs["delete"]) == []

    # One poll is one update, with all its news; a poll without news is none; the last is the end of the display.
    (_, _, empty), (_, _, polled), (_, _, last) = updates["display"]
    assert "&lt;script&gt;" in empty
    text = "".join(check_html(polled).itertext())
    assert "step 1 of 4" in text
    assert "loading <b>" in text
    assert last == polled

    (kernel,) = outputs["kernel"]
    assert not psutil.pid_exists(int(kernel["data"]["text/plain"]))
    until(lambda: processes_of(home) == [], timeout_s=30)
