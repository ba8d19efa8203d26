"""What must be set in the process before the ML libraries are imported, and what their import leaves out."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from palate_recipes.specs.train import TrainTask

_QUIET_AND_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "true",  # said outright: left open, a fork later on would print a warning
    "TQDM_DISABLE": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "BITSANDBYTES_NOWELCOME": "1",
}
"""A program that sees only files needs no hub; bars and notices would bury its own lines."""


def prepare_environment() -> None:
    """Offline and quiet. Call before importing torch or transformers."""
    os.environ.update(_QUIET_AND_OFFLINE)
    # Threads that spin at a barrier stall each other as soon as another process wants a core: seen 3 to 4 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    for name in ("transformers", "trl", "accelerate", "datasets", "peft", "tensorboard", "bitsandbytes", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)


def keep_one_gpu() -> None:
    """Hides all GPUs but the first from a process that has no launcher: TRL refuses several in one process.

    Call before CUDA is first used; a launcher's worker sees all, and takes the one of its local rank.
    """
    if "LOCAL_RANK" not in os.environ:
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


def use_available_cores() -> int:
    """Gives torch as many threads as this process may run on, and returns that number.

    torch counts the machine's cores; in a container with a CPU quota that makes threads wait for each other.
    An OMP_NUM_THREADS in the environment wins.
    """
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, min(torch.get_num_threads(), cores, _quota_cores() or cores)))
    return int(torch.get_num_threads())


def _quota_cores() -> int | None:
    """Cores that the control group (v2) allows, rounded up, or None without a limit."""
    limit = Path("/sys/fs/cgroup/cpu.max")
    if not limit.is_file():
        return None
    quota, _, period = limit.read_text(encoding="ascii").partition(" ")
    return None if quota == "max" else -(-int(quota) // int(period))


_NEVER_USED = ("boto3", "botocore", "sklearn", "tensorflow")
"""Imported where a library finds it installed, for what no run does: accelerate's and TensorBoard's dealings with AWS,
transformers' assisted generation, and files on TensorFlow's terms, which TensorBoard also writes without."""


@contextmanager
def lean_imports(task: TrainTask) -> Iterator[None]:
    """Within it, the ML libraries are imported without what `task` has no use for, and without the garbage collector.

    For a process that does nothing but this run: what is left out stays out until it ends, because the libraries look once
    for what is installed. Together that is 30% of the processor time of a run of one step. The collector would go
    through all that was imported so far, over and over, and find nothing to free; what stands here at the end it never
    looks at again.
    """
    gc.disable()
    try:
        for name in _NEVER_USED if _quantised(task) else (*_NEVER_USED, "bitsandbytes"):
            _leave_out(name)
        import torch

        if torch.accelerator.is_available():
            # Before the process ends, or the objects of Triton that no collection has seen are reported as leaks.
            atexit.register(gc.unfreeze)
        else:
            _leave_out("triton")  # compiles for GPUs alone
        yield
    finally:
        gc.freeze()
        gc.enable()


def _leave_out(name: str) -> None:
    """Makes every further import of `name` fail, as if it were not installed (Python reference, 5.3.1)."""
    sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def _quantised(task: TrainTask) -> bool:
    """Whether the weights become quantised, or are so on disk already."""
    config = Path(task.files.model_dir) / "config.json"
    return (
        task.spec.hyperparameters.load_in_4bit
        or task.spec.hyperparameters.load_in_8bit
        or (config.is_file() and b'"quantization_config"' in config.read_bytes())
    )
