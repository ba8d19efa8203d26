"""Starts one worker process per GPU with torch's launcher, and returns one exit code for all.

Knows processes, signals and exit codes, no training: every worker runs this same program on the same spec.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

from palate_recipes.errors import TrainerError
from palate_recipes.prctl import die_with_parent
from palate_recipes.specs.train import (
    ERROR_FILE,
    EXIT_FAILED,
    EXIT_STOPPED,
    FAST_PATH_FAILED_FILE,
    MODEL_DIR,
    TrainTask,
)
from palate_trainer.distributed import MEETING, world_size
from palate_trainer.env import prepare_environment
from palate_trainer.failures import explain_signal

_STOP_GRACE_S = 110
"""Time for workers to finish their step and write a checkpoint. Must be shorter than the runner's grace for this process."""

_SAME_MOMENT_S = 5
"""A killed worker breaks the others' connections. Their errors follow within seconds and are not the cause."""

_LAUNCHER = "PALATE_LAUNCHER_PID"


def is_worker() -> bool:
    """Whether a launcher (this one, torchrun, `accelerate launch`) started this process."""
    return "LOCAL_RANK" in os.environ


def process_count(task: TrainTask) -> int:
    """The number of processes that `task` needs on this machine.

    Raises:
        TrainerError: It is higher than the number of visible GPUs.
    """
    if task.files.processes == 1:
        return 1
    gpus = visible_gpus()
    if gpus and task.files.processes > gpus:
        raise TrainerError(
            f"processes={task.files.processes}, but only {gpus} GPUs are visible, and each process needs its own."
            " Set processes to a lower value or to 0 (all visible GPUs), or make more visible in CUDA_VISIBLE_DEVICES."
        )
    return task.files.processes or max(1, gpus)


def visible_gpus() -> int:
    """The number of CUDA devices that this process may use. Imports torch only if the machine has an NVIDIA device."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in {"", "-1"} or not any(Path("/dev").glob("nvidia*")):
        return 0
    prepare_environment()
    import torch

    return int(torch.cuda.device_count())


def launch(spec_file: Path, task: TrainTask, processes: int) -> int:
    """Runs `processes` workers to completion. If the fast path fails in the first step, runs them again without it.

    Args:
        spec_file: The spec file that each worker reads.
        task: Its content.
        processes: Number of workers, each with its own GPU, or all on the CPU.

    Returns:
        0 if all succeeded; EXIT_STOPPED after a SIGTERM, when all workers have ended; EXIT_FAILED with error.txt written.
    """
    prepare_environment()
    import torch.distributed.launcher.api  # noqa: F401  # creates the loggers below

    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # its failure report would hide the worker's own error
    output = Path(task.files.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    for left in (ERROR_FILE, FAST_PATH_FAILED_FILE):
        (output / left).unlink(missing_ok=True)
    before = _identity(output / MODEL_DIR)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    # All workers are on this machine: accept no connections from others, and do not require a resolvable host name.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", _loopback())
    os.environ.setdefault("NCCL_SOCKET_IFNAME", _loopback())
    os.environ[_LAUNCHER] = str(os.getpid())
    # Private to this user. In the work folder, because that is removed even if this process is killed.
    with tempfile.TemporaryDirectory(prefix=".meeting-", dir=output) as meeting:
        code = _launch_once(spec_file, output, processes, before, meeting)
    cause = output / FAST_PATH_FAILED_FILE
    if code != EXIT_FAILED or not task.files.fast or not cause.exists():
        return code
    said = cause.read_text(encoding="utf-8")
    cause.unlink()
    print(
        "WARNING: the fast path failed in the first step. The run starts again without it: same losses, more time."
        f" {said}",
        flush=True,
    )
    with tempfile.TemporaryDirectory(prefix=".spec-", dir=output) as folder:
        plain = task.changed(fast=False)
        plain.write(Path(folder) / spec_file.name)
        return launch(Path(folder) / spec_file.name, plain, processes)


def _loopback() -> str:
    return next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), "lo")


def _launch_once(spec_file: Path, output: Path, processes: int, before: tuple[int, int] | None, meeting: str) -> int:
    """See `launch`.

    Args:
        before: Identity of the model folder before the launch.
        meeting: A folder private to this user, for the rendezvous files.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # torch's TCP store listens on all interfaces and unpickles what it receives, so anyone who reaches it could run code.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    os.environ[MEETING] = str(Path(meeting) / "workers")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint=str(Path(meeting) / "launcher"),
        rdzv_configs={"store_type": "file"},
        local_addr="localhost",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),  # workers inherit this process's stdout and stderr
        shutdown_timeout=_STOP_GRACE_S,
    )
    try:
        elastic_launch(config, sys.executable)("-u", "-P", "-m", "palate_trainer", str(spec_file))
    except SignalException:
        finished = _identity(output / MODEL_DIR)
        # A stop after the last step: the model was saved, so the run succeeded.
        return 0 if finished and finished != before else EXIT_STOPPED
    except ChildFailedError as error:
        return _failed(output, error.failures, processes)
    return 0


def die_with_launcher() -> None:
    """Makes the kernel kill this worker if the launcher dies. Workers have their own sessions, so nothing else would."""
    launcher = os.environ.get(_LAUNCHER)
    if launcher is None or sys.platform != "linux":
        return
    die_with_parent()
    if os.getppid() != int(launcher):  # the launcher died before prctl took effect
        os._exit(EXIT_FAILED)


def leave(code: int) -> int:
    """Leaves the process group and exits the process, if it is one of several workers.

    With code 0 it waits for all workers. A failed worker is out of step with the others and would hang.
    """
    if world_size() > 1:
        import torch.distributed as dist

        if code == 0 and dist.is_initialized():
            dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        # Not through the interpreter's shutdown: a thread of torch that is still running then can abort the process
        # ("terminate called without an active exception"), and the job would fail although its model is complete.
        os._exit(code)
    return code


def _failed(output: Path, failures: dict[int, Any], processes: int) -> int:
    from palate_trainer.train import write_error

    first = min(failures.values(), key=lambda failure: failure.timestamp)
    killed = next(
        (
            (rank, -failure.exitcode)
            for rank, failure in failures.items()
            if failure.exitcode < 0
            and failure.exitcode != -signal.SIGTERM
            and failure.timestamp <= first.timestamp + _SAME_MOMENT_S
        ),
        None,
    )
    if killed:
        rank, number = killed
        message = f"Process {rank + 1} of {processes} was {explain_signal(number)}"
        (output / ERROR_FILE).unlink(missing_ok=True)  # can only hold another worker's lost connection
        print(message, file=sys.stderr, flush=True)
        write_error(output, message)
    elif not (output / ERROR_FILE).exists():
        write_error(
            output, f"One of {processes} processes exited with code {first.exitcode}. See the last lines of the log."
        )
    return EXIT_FAILED


def _identity(folder: Path) -> tuple[int, int] | None:
    """Distinguishes a folder from a later one at the same path; None if it does not exist."""
    if not folder.is_dir():
        return None
    facts = folder.stat()
    return facts.st_ino, facts.st_mtime_ns
