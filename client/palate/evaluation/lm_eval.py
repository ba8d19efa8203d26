"""Runs tasks of the installed lm-eval against a service, as a guard against regressions. Knows its command line, no task.

https://github.com/EleutherAI/lm-evaluation-harness, model `local-completions`. The token goes through the environment.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from palate.evaluation.arena import Seat
from palate.predictor import ServedModel
from palate.session import Session
from palate.store import open_parent
from palate.ui import note
from palate_recipes.errors import ConfigurationError, EngineError, MissingDependencyError

_TAIL = 15
_CONCURRENT = 8
_REJECTED = re.compile(r"API request failed! Status code: (\d{3}), Response text: (.*?)\. Retrying\.\.\.", re.DOTALL)
"""How lm-eval logs a response other than 2xx."""
_SHOWN_REJECTIONS = 3
_LONGEST_REJECTION = 500
_AFTERMATH = "Task exception was never retrieved"
"""asyncio's first line about a request that was open when lm-eval gave up. After one request that failed for good, lm-eval closes its
connections, so the others end with `ServerDisconnectedError` or `Session is closed`, whatever the cause was."""

TIME_LIMIT_S = 24 * 3600.0
"""Of one model. `mmlu` on a small GPU takes hours; without an end, a server that answers nothing would be waited for for ever."""


def check_lm_eval() -> str:
    """Returns the path of lm-eval's program. Raises MissingDependencyError if it is not installed."""
    beside = Path(sys.executable).with_name("lm_eval")
    found = str(beside) if beside.exists() else shutil.which("lm_eval")
    if found is None:
        raise MissingDependencyError("lm-eval is not installed: pip install 'lm-eval[api]' transformers")
    return found


def check_tasks(tasks: Sequence[str], served: ServedModel, session: Session) -> None:
    """Raises ConfigurationError if a path has a comma: lm-eval separates tasks, and arguments of the model, by commas."""
    paths = [task for task in tasks if "/" in task or task.endswith((".yaml", ".yml"))]
    if served.tuned_uri is not None:
        store, prefix = open_parent(served.tuned_uri, options=session.options_for(served.tuned_uri))
        paths.append(str(store.local_path(prefix) or tempfile.gettempdir()))
    for path in paths:
        _refuse_comma(path)


def _refuse_comma(path: str) -> None:
    if "," in path:
        raise ConfigurationError(
            f"lm_eval cannot be given {path!r}, because it has a comma, which separates lm-eval's arguments: use a path without one"
        )


def run_lm_eval(
    tasks: Sequence[str], seat: Seat, served: ServedModel, session: Session, *, time_limit_s: float = TIME_LIMIT_S
) -> dict[str, dict[str, float]]:
    """Returns the metrics of each task, with the names that lm-eval gives them. Notes and omits those that are not finite.

    Args:
        tasks: Names of tasks, or paths of their YAML files.
        seat: The model.
        served: The tuned model, whose folder has the tokenizer.
        session: Opens that folder.
        time_limit_s: Seconds after which lm-eval is killed.

    Raises:
        ConfigurationError: A path has a comma.
        EngineError: lm-eval failed, or did not end in time. Has what the service rejected, and the last lines that lm-eval printed.
        MissingDependencyError: It is not installed.
    """
    program = check_lm_eval()
    check_tasks(tasks, served, session)
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
        # Into a file: a worker that lm-eval leaves behind would keep a pipe open.
        log = Path(folder) / "lm_eval.log"
        with log.open("wb") as output:
            try:
                code: int | None = subprocess.run(
                    command,
                    env={**os.environ, "OPENAI_API_KEY": seat.endpoint.api_key},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=time_limit_s,
                    check=False,
                ).returncode
            except subprocess.TimeoutExpired:
                code = None
        results = sorted(Path(folder).glob("out/**/results_*.json"))
        if code or code is None or not results:
            text = seat.endpoint.without_key(failure(log.read_text(encoding="utf-8", errors="replace")))
            why = (
                f"did not end within {time_limit_s:g} seconds, and was killed: run fewer tasks, or smaller ones"
                if code is None
                else f"failed with exit code {code}"
            )
            raise EngineError(f"lm-eval on {seat.model} {why}. {text}")
        found = json.loads(results[-1].read_text(encoding="utf-8"))["results"]
    return {task: _finite(task, metrics) for task, metrics in found.items()}


def _finite(task: str, metrics: Mapping[str, object]) -> dict[str, float]:
    """Returns the numbers of a task. lm-eval writes NaN where it has no error, as of one row."""
    numbers = {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}
    left_out = sorted(name for name, value in numbers.items() if not math.isfinite(value))
    if left_out:
        note(f"task {task}: {', '.join(left_out)} left out, not a finite number")
    return {name: value for name, value in numbers.items() if name not in left_out}


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
