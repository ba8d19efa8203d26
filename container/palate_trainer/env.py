"""Prepares the process before the ML libraries are imported: environment, threads, modules that imports can skip."""

from __future__ import annotations

import atexit
import gc
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from palate_recipes.specs.train import TrainTask
from palate_recipes.trackers import chosen

_QUIET_AND_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "true",  # explicit, because an unset value prints a warning after a fork
    "TQDM_DISABLE": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "BITSANDBYTES_NOWELCOME": "1",
}
"""The trainer reads files only, so it never needs the Hub. Progress bars and notices would hide its own log lines."""


def prepare_environment() -> None:
    """Makes libraries offline and quiet. Call it before importing torch or transformers."""
    os.environ.update(_QUIET_AND_OFFLINE)
    # Threads that spin at a barrier stall each other when another process needs a core: measured 3 to 4 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    for name in ("transformers", "trl", "accelerate", "datasets", "peft", "tensorboard", "bitsandbytes", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)


PROJECT = "palate"
"""Project or experiment of a run in trackers, unless a variable names another."""


def prepare_trackers(task: TrainTask) -> None:
    """Sets defaults of the trackers' variables. Call it before their packages are imported."""
    tags = tracker_tags(task)
    given = os.environ.get("MLFLOW_TAGS")
    with suppress(ValueError):  # MLflow reports what is wrong with the user's own
        os.environ["MLFLOW_TAGS"] = json.dumps({**tags, **(json.loads(given) if given else {})})
    defaults = {
        "MLFLOW_EXPERIMENT_NAME": PROJECT,
        # MLflow's own are 7 retries and 120 s: a server that is away would hold up every step.
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        "WANDB_PROJECT": PROJECT,
        "WANDB_TAGS": ",".join(value for value in tags.values() if value and "," not in value),
        "WANDB_SILENT": "true",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # the URL of the server may have a password


def tracker_tags(task: TrainTask) -> dict[str, str]:
    """Returns what identifies a run in a tracker, besides the arguments that transformers reports."""
    spec = task.spec
    found = {
        "palate.job": task.files.run_name or "",
        "palate.model": spec.model.name,
        "palate.method": spec.method,
        "palate.strategy": spec.hyperparameters.training_strategy,
        "palate.precision": spec.precision,
        **{f"palate.data.{name}": given.sha256 or "" for name, given in spec.inputs.items()},
    }
    return {name: value for name, value in found.items() if value}


def keep_one_gpu() -> None:
    """Hides all GPUs but the first if there is no launcher: TRL does not support several GPUs in one process.

    Call it before CUDA is first used. A launcher's worker sees all GPUs and uses that of its local rank.
    """
    if "LOCAL_RANK" not in os.environ:
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


def use_available_cores() -> int:
    """Sets torch's thread count to the cores that this process may use, and returns it.

    torch counts the machine's cores. Under a container's CPU quota that is too many, and threads wait for each other.
    OMP_NUM_THREADS in the environment takes precedence.
    """
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, min(torch.get_num_threads(), cores, _quota_cores() or cores)))
    return int(torch.get_num_threads())


def _quota_cores() -> int | None:
    """CPU quota of the cgroup (v2) in cores, rounded up, or None if there is no limit."""
    limit = Path("/sys/fs/cgroup/cpu.max")
    if not limit.is_file():
        return None
    quota, _, period = limit.read_text(encoding="ascii").partition(" ")
    return None if quota == "max" else -(-int(quota) // int(period))


_NEVER_USED = ("boto3", "botocore", "sklearn", "tensorflow")
"""Libraries import these if they are installed, for features that no run uses: AWS support in accelerate and TensorBoard,
assisted generation in transformers, TensorFlow's file layer in TensorBoard (which has its own)."""


@contextmanager
def lean_imports(task: TrainTask) -> Iterator[None]:
    """Imports inside this context skip modules that `task` does not need, and run without the garbage collector.

    Only for a process that does nothing but this run: libraries check once what is installed, so a skipped module stays
    skipped. This saves 30% of the CPU time of a one-step run. The collector would repeatedly scan the imported modules and
    find nothing to free. They are frozen at the end, so later collections skip them.
    """
    gc.disable()
    try:
        # MLflow takes a module with an entry in sys.modules for imported, and uses it.
        tracked = set(chosen(task.spec.hyperparameters.report_to)) - {"tensorboard"}
        for name in (*(() if tracked else _NEVER_USED), *(() if _quantised(task) else ("bitsandbytes",))):
            _leave_out(name)
        import torch

        if torch.accelerator.is_available():
            # Without this, Triton reports its frozen objects as leaks at exit.
            atexit.register(gc.unfreeze)
        else:
            _leave_out("triton")  # compiles for GPUs only
        yield
    finally:
        gc.freeze()
        gc.enable()


def _leave_out(name: str) -> None:
    """Makes later imports of `name` fail as if it were not installed (Python reference, 5.3.1)."""
    sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def _quantised(task: TrainTask) -> bool:
    """Whether the weights are quantised on loading or on disk."""
    config = Path(task.files.model_dir) / "config.json"
    return (
        task.spec.hyperparameters.load_in_4bit
        or task.spec.hyperparameters.load_in_8bit
        or (config.is_file() and b'"quantization_config"' in config.read_bytes())
    )
