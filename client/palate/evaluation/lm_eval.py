"""Runs tasks of the installed lm-eval against a service, as a guard against regressions. Knows its command line, no task.

https://github.com/EleutherAI/lm-evaluation-harness, model `local-completions`. The token goes through the environment.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from palate.evaluation.arena import Seat
from palate.predictor import ServedModel
from palate.session import Session
from palate.store import open_parent
from palate_recipes.errors import EngineError, MissingDependencyError

_TAIL = 15
_CONCURRENT = 8
_REJECTED = re.compile(r"API request failed! Status code: (\d{3}), Response text: (.*?)\. Retrying\.\.\.", re.DOTALL)
"""How lm-eval logs a response other than 2xx."""
_SHOWN_REJECTIONS = 3
_LONGEST_REJECTION = 500
_AFTERMATH = "Task exception was never retrieved"
"""asyncio's first line about a request that was open when lm-eval gave up. After one request that failed for good, lm-eval closes its
connections, so the others end with `ServerDisconnectedError` or `Session is closed`, whatever the cause was."""


def check_lm_eval() -> str:
    """Returns the path of lm-eval's program. Raises MissingDependencyError if it is not installed."""
    beside = Path(sys.executable).with_name("lm_eval")
    found = str(beside) if beside.exists() else shutil.which("lm_eval")
    if found is None:
        raise MissingDependencyError(
            "lm_eval is not installed, which lm_eval= (--lm-eval) runs: pip install 'lm-eval[api]' transformers"
        )
    return found


def run_lm_eval(tasks: Sequence[str], seat: Seat, served: ServedModel, session: Session) -> dict[str, dict[str, float]]:
    """Returns the metrics of each task, with the names that lm-eval gives them.

    Args:
        tasks: Names of tasks, or paths of their YAML files.
        seat: The model.
        served: The tuned model, whose folder has the tokenizer.
        session: Opens that folder.

    Raises:
        EngineError: lm-eval failed. Has what the service rejected, and the last lines that lm-eval printed.
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
            why = seat.endpoint.without_key(failure(done.stdout + done.stderr))
            raise EngineError(f"lm_eval failed with exit code {done.returncode} on {seat.model}. {why}")
        found = json.loads(results[-1].read_text(encoding="utf-8"))["results"]
    return {
        task: {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}
        for task, metrics in found.items()
    }


def failure(printed: str) -> str:
    """Returns why lm-eval failed, from all that it printed: the service's rejections, the most frequent first, and the last lines."""
    lines = []
    rejections = Counter((status, _message(body)) for status, body in _REJECTED.findall(printed))
    if rejections:
        lines.append("The service rejected requests:")
        for (status, message), count in rejections.most_common(_SHOWN_REJECTIONS):
            lines.append(f"  HTTP {status} ({count} times): {message}")
    before, _, _ = printed.partition(_AFTERMATH)
    # Without a traceback before it, the cause comes later or is the aftermath itself.
    shown = before if "Traceback" in before else printed
    lines.append("Its last lines:")
    lines += [f"  {line}" for line in shown.splitlines()[-_TAIL:]]
    return "\n".join(lines)


def _message(body: str) -> str:
    """Returns the message of an error in OpenAI's format, and any other body as it is."""
    try:
        message = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = body
    return str(message)[:_LONGEST_REJECTION]


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
