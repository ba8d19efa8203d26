"""Causes of an engine's end, from lines that the installed engines wrote in real runs or that real exceptions print."""

from __future__ import annotations

import errno
import os
import socket
import time
import traceback
from pathlib import Path

import pytest

from palate_server.causes import failure

LOST = (
    "(APIServer pid=7) ERROR 11-29 06:04:24 [async_llm.py:906] vllm.v1.engine.exceptions.EngineDeadError: EngineCore "
    + ("encountered an issue. See stack trace (above) for the root cause.")
)
NOISE = [
    "(APIServer pid=7) WARNING 11-29 06:08:28 [utils.py:648] [shutdown] Process manager: force killing remaining processes count=1",
    "/lib/python3.11/multiprocessing/resource_tracker.py:254: UserWarning: resource_tracker: There appear to be 1 leaked",
    "  warnings.warn('resource_tracker: There appear to be %d '",
    'INFO:     127.0.0.1:59042 - "POST /v1/completions HTTP/1.1" 500 Internal Server Error',
]
WORKER = (
    "(EngineCore pid=9) ERROR 11-29 06:08:28 [core.py:1512] RuntimeError: Worker failed with error '%s', "
    "please check the stack trace above for the root cause"
)


def story(*lines: str, returncode: int | None = 0, free_bytes: int | None = None) -> list[str]:
    return failure(lines, returncode=returncode, free_bytes=free_bytes, log="palate logs svc").splitlines()


def test_an_engine_process_that_vanished_was_killed() -> None:
    first, *rest = story(*["INFO x"] * 300, LOST, *NOISE, free_bytes=3 << 29)
    assert first.startswith(
        "its engine process vanished without an error, as one killed by signal 9 (SIGKILL) does. The usual"
    )
    assert "(1.5 GiB were free after the start)" in first
    assert len(rest) <= 4
    assert not any("resource_tracker" in line or "[shutdown]" in line for line in rest)
    assert rest[-1] == "The whole log: palate logs svc"


@pytest.mark.parametrize(
    ("code", "says"), [(137, "signal 9 (SIGKILL)"), (139, "signal 11 (SIGSEGV)"), (134, "6 (SIGABRT)")]
)
def test_a_signal_is_named(code: int, says: str) -> None:
    first = story("ValueError: an earlier one", returncode=code)[0]
    assert says in first
    assert ("memory" in first) == (code == 137)


def test_a_workers_error_is_told_without_its_wrappers() -> None:
    first = story(WORKER % "Unsupported CPU attention configuration: head_dim=16", LOST, *NOISE)[0]
    assert first == "Unsupported CPU attention configuration: head_dim=16"


def test_a_crash_that_python_reports_is_not_taken_for_a_kill() -> None:
    assert story("Fatal Python error: Segmentation fault", LOST, *NOISE)[0] == "Fatal Python error: Segmentation fault"


def test_an_end_without_an_error_says_so() -> None:
    assert story("all well", returncode=3)[:3] == [
        "it ended without an error in its log (exit code 3)",
        "Last lines of the engine:",
        "  | all well",
    ]
    assert "(none)" in story(returncode=0)[2]


def printed(error: BaseException) -> list[str]:
    return "".join(traceback.format_exception(error)).splitlines()


def test_a_taken_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.socket() as other, pytest.raises(OSError) as caught:
        other.bind(taken.getsockname())
    assert story(*printed(caught.value))[0].startswith("a port is taken: OSError: [Errno 98] Address already in use")


def test_a_missing_file_a_full_disk_and_memory_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as missing:
        (tmp_path / "model.safetensors").read_bytes()
    assert story(*printed(missing.value))[0].startswith("a file of the model is missing or damaged: FileNotFoundError")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert story(*printed(full))[0].startswith("the disk is full: OSError: [Errno 28] No space left on device")
    with pytest.raises(MemoryError) as memory:
        bytearray(1 << 62)
    assert story(*printed(memory.value))[0].startswith("the machine ran out of memory: MemoryError")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", "the GPU ran out of memory"),
        ("ValueError: No available memory for the cache blocks.", "the KV cache does not fit"),
        (
            "ValueError: Model architectures ['X'] are not supported for now.",
            "does not support the model's architecture",
        ),
    ],
)
def test_other_causes_have_a_remedy(line: str, says: str) -> None:
    first = story("(EngineCore pid=9) ERROR 11-21 03:39:19 [core.py:1] " + line, LOST, *NOISE)[0]
    assert says in first
    assert line in first
    assert "Remedy: " in first


@pytest.mark.parametrize("line", ["worker" * 11_000, "Worker" + "a" * 65_000, "ValueError: " + "KV cache" * 8000])
def test_a_long_line_of_a_request_in_the_log_takes_no_time(line: str) -> None:
    begun = time.process_time()
    told = story(*[line] * 400, returncode=1)
    assert time.process_time() - begun < 5
    assert max(map(len, told)) < 2100


def test_an_exit_code_of_the_program_is_no_signal() -> None:
    assert story("ValueError: bad", returncode=255)[0] == "ValueError: bad (exit code 255)"
