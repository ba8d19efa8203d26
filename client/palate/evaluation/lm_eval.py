"""Runs tasks of the installed lm-eval against a service, as a guard against regressions. Knows its command line, no task.

https://github.com/EleutherAI/lm-evaluation-harness, model `local-completions`. The token goes through the environment.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from palate.evaluation.arena import Seat
from palate.predictor import ServedModel
from palate.session import Session
from palate.store import open_parent
from palate_recipes.errors import EngineError, MissingDependencyError

_TAIL = 15
_CONCURRENT = 8


def check_lm_eval() -> str:
    """Returns the path of lm-eval's program. Raises MissingDependencyError if it is not installed."""
    beside = Path(sys.executable).with_name("lm_eval")
    found = str(beside) if beside.exists() else shutil.which("lm_eval")
    if found is None:
        raise MissingDependencyError("lm-eval is not installed: pip install 'lm-eval[api]' transformers")
    return found


def run_lm_eval(tasks: Sequence[str], seat: Seat, served: ServedModel, session: Session) -> dict[str, dict[str, float]]:
    """Returns the metrics of each task, with the names that lm-eval gives them.

    Args:
        tasks: Names of tasks, or paths of their YAML files.
        seat: The model.
        served: The tuned model, whose folder has the tokenizer.
        session: Opens that folder.

    Raises:
        EngineError: lm-eval failed. Has the last lines of what it printed.
        MissingDependencyError: It is not installed.
    """
    program = check_lm_eval()
    with tempfile.TemporaryDirectory(prefix="palate-lm-eval-") as folder:
        arguments = {
            "model": seat.model,
            "base_url": f"{seat.endpoint.base_url}/completions",
            "tokenizer": _tokenizer(served, session, Path(folder)),
            "num_concurrent": _CONCURRENT,
            "max_retries": 3,
        }
        command = [
            program,
            "--model",
            "local-completions",
            "--tasks",
            ",".join(tasks),
            "--output_path",
            f"{folder}/out",
        ]
        command += ["--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())]
        done = subprocess.run(
            command,
            env={**os.environ, "OPENAI_API_KEY": seat.endpoint.api_key},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        results = sorted(Path(folder).glob("out/**/results_*.json"))
        if done.returncode or not results:
            tail = [seat.endpoint.without_key(line) for line in (done.stdout + done.stderr).splitlines()[-_TAIL:]]
            lines = "\n".join(f"  {line}" for line in tail)
            raise EngineError(
                f"lm-eval failed with exit code {done.returncode} on {seat.model}. Its last lines:\n{lines}"
            )
        found = json.loads(results[-1].read_text(encoding="utf-8"))["results"]
    return {
        task: {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}
        for task, metrics in found.items()
    }


def _tokenizer(served: ServedModel, session: Session, folder: Path) -> str:
    """Returns a folder with the tokenizer, on this machine."""
    assert served.tuned_uri is not None  # of a job
    store, prefix = open_parent(served.tuned_uri, options=session.options_for(served.tuned_uri))
    if (local := store.local_path(prefix)) is not None:
        return str(local)
    target = folder / "tokenizer"
    target.mkdir()
    for info in store.list(prefix):
        name = info.key.removeprefix(f"{prefix}/")
        if "/" not in name and name.endswith((".json", ".jinja", ".model", ".txt")):
            store.download(info.key, target / name)
    return str(target)
