"""Starts one worker process a GPU through torch's own launcher, and gives their end as one exit code.

Knows processes, signals and exit codes, no training: every worker is this same program on the same spec.
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
"""Time of the workers to finish their step and write a checkpoint; below what the runner grants this process."""

_SAME_MOMENT_S = 5
"""A worker that is killed takes the others' connections with it: their errors come seconds later, and are not the cause."""

_LAUNCHER = "PALATE_LAUNCHER_PID"


def is_worker() -> bool:
    """Whether a launcher (this one, torchrun, `accelerate launch`) has started this process."""
    return "LOCAL_RANK" in os.environ


def process_count(task: TrainTask) -> int:
    """How many processes `task` asks for on this machine.

    Raises:
        TrainerError: More than the visible GPUs.
    """
    if task.files.processes == 1:
        return 1
    gpus = visible_gpus()
    if gpus and task.files.processes > gpus:
        raise TrainerError(
            f"processes={task.files.processes}, but {gpus} GPUs are visible: a process needs one of its own."
            " Ask for fewer, or make more visible in CUDA_VISIBLE_DEVICES; 0 takes all there are."
        )
    return task.files.processes or max(1, gpus)


def visible_gpus() -> int:
    """CUDA devices that this process may use. Torch counts them, and is imported only where there is a device at all."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in {"", "-1"} or not any(Path("/dev").glob("nvidia*")):
        return 0
    prepare_environment()
    import torch

    return int(torch.cuda.device_count())


def launch(spec_file: Path, task: TrainTask, processes: int) -> int:
    """Runs `processes` workers to their end; a second time TRL's own way where the fast path failed in the first step.

    Args:
        spec_file: What each of them reads.
        task: The same, read.
        processes: Workers, each with a GPU of its own, or on the processor.

    Returns:
        0 when all ended well; EXIT_STOPPED after a SIGTERM, with the workers ended; EXIT_FAILED with error.txt written.
    """
    prepare_environment()
    import torch.distributed.launcher.api  # noqa: F401  # makes the loggers below

    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # its account of a failure would bury the worker's own
    output = Path(task.files.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    for left in (ERROR_FILE, FAST_PATH_FAILED_FILE):
        (output / left).unlink(missing_ok=True)
    before = _identity(output / MODEL_DIR)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    # One machine: nothing of it listens to others, and its host name need not resolve.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", _loopback())
    os.environ.setdefault("NCCL_SOCKET_IFNAME", _loopback())
    os.environ[_LAUNCHER] = str(os.getpid())
    # Private to this user, and in the work folder, which goes even where this process is killed.
    with tempfile.TemporaryDirectory(prefix=".meeting-", dir=output) as meeting:
        code = _launch_once(spec_file, output, processes, before, meeting)
    cause = output / FAST_PATH_FAILED_FILE
    if code != EXIT_FAILED or not task.files.fast or not cause.exists():
        return code
    said = cause.read_text(encoding="utf-8")
    cause.unlink()
    print(
        "WARNING: the fast path failed before the first step was done, and the run begins anew TRL's own way: the same losses,"
        f" more time. {said}",
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
        before: Identity of the model folder that was there before.
        meeting: A folder of this user alone, for the file by which the workers find each other.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # torch's TCP stores listen on every interface, and whoever reaches one may write there what is unpickled here.
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
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),  # workers write to this process's own output
        shutdown_timeout=_STOP_GRACE_S,
    )
    try:
        elastic_launch(config, sys.executable)("-u", "-P", "-m", "palate_trainer", str(spec_file))
    except SignalException:
        finished = _identity(output / MODEL_DIR)
        # A stop that came after the last step: the model was saved all the same.
        return 0 if finished and finished != before else EXIT_STOPPED
    except ChildFailedError as error:
        return _failed(output, error.failures, processes)
    return 0


def die_with_launcher() -> None:
    """Ties a worker's life to the launcher's: killed, it could stop nobody, and workers lead sessions of their own."""
    launcher = os.environ.get(_LAUNCHER)
    if launcher is None or sys.platform != "linux":
        return
    die_with_parent()
    if os.getppid() != int(launcher):  # it went before the line above
        os._exit(EXIT_FAILED)


def leave(code: int) -> int:
    """Ends a worker's part in the group; with a bad `code` it does not return.

    A worker that failed is out of step with the others, and to take leave in order would be to wait for them.
    """
    if world_size() > 1:
        import torch.distributed as dist

        if code != 0:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        if dist.is_initialized():
            dist.destroy_process_group()
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
        (output / ERROR_FILE).unlink(missing_ok=True)  # at most the others' loss of their connection to it
        print(message, file=sys.stderr, flush=True)
        write_error(output, message)
    elif not (output / ERROR_FILE).exists():
        write_error(output, f"A process of {processes} ended with exit code {first.exitcode}; its last lines say more.")
    return EXIT_FAILED


def _identity(folder: Path) -> tuple[int, int] | None:
    """What tells a folder from another one of the same name, or None where there is none."""
    if not folder.is_dir():
        return None
    facts = folder.stat()
    return facts.st_ino, facts.st_mtime_ns
