"""Finds the cause of an engine's end in its exit code and log, and the few lines that show it. Knows text, no process."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence

GIB = 1024**3

_SHOWN_LINES = 8
_WRAPPERS = (
    "Engine core initialization failed",
    "See root cause above",
    "WorkerProc initialization failed",
    "EngineCore encountered an issue",
    "EngineDeadError",
)
"""Errors of vLLM that only point to an earlier one."""

_PREFIX = re.compile(r"^(\([^)]*pid=\d+\)\s*)?((ERROR|CRITICAL|WARNING|INFO)\s[\d-]+\s[\d:]+\s\[[^\]]*\]\s*)?")
_ERROR = re.compile(
    r"^([\w.]*(Error|Exception|Exit|Interrupt)\b.*|[\w.\- ]+: error: .*|error: .*|(Fatal Python error: |Killed|Segmentation fault).*)$"
)
_WORKER = re.compile(r"^RuntimeError: Worker failed with error '(.*)', please check the stack.*$")
_PROCESS = re.compile(r"EngineCore|[Ww]orker|Engine core")
_DIED = re.compile(r"died unexpectedly|terminated unexpectedly|is dead")

_LINE_CHARACTERS = 2000
"""Lines are cut to this length: an engine may log a request's whole text, and `.*` in a pattern takes quadratic time."""

_REQUEST = '{"time":'
"""Start of a line of the request log."""
_END = re.compile(r"resource_tracker|\[shutdown\]")

_SIGNS: tuple[tuple[str, str, str], ...] = (
    (
        r"CUDA out of memory|OutOfMemoryError|HIP out of memory",
        "the GPU ran out of memory",
        "set a smaller max_model_len or gpu_memory_utilization=0.8, or stop other programs on the GPU",
    ),
    (
        r"No available memory for the cache blocks|KV cache is needed|KV cache.*larger than the available",
        "the KV cache does not fit into memory",
        "set a smaller max_model_len",
    ),
    (
        r"^MemoryError|[Cc]annot allocate memory|can't allocate memory",
        "the machine ran out of memory",
        "set a smaller max_model_len, use a smaller model, or stop other programs",
    ),
    (
        r"[Aa]ddress already in use|EADDRINUSE",
        "a port is taken",
        "stop the program that uses it, choose another port, or set port=0 for a free one",
    ),
    (r"No space left on device|ENOSPC", "the disk is full", "free space where the engine writes"),
    (
        r"Model architectures .* (are not supported|failed to be inspected)|does not recognize this architecture",
        "the engine does not support the model's architecture",
        "try engine='transformers', or install a newer version of the engine",
    ),
    (
        r"CUDA driver version is insufficient|no kernel image is available",
        "the engine's CUDA build does not fit the GPU or its driver",
        "update the driver, or install the build of the engine for this GPU",
    ),
    (
        r"^FileNotFoundError|No such file or directory|does not appear to have a file named|SafetensorError",
        "a file of the model is missing or damaged",
        "copy the model again",
    ),
)
"""(pattern of an error line, what it means, what to do), most specific first."""


def failure(lines: Sequence[str], *, returncode: int | None, free_bytes: int | None, log: str) -> str:
    """Returns why an engine ended: the cause in the first line, the lines that show it, and where the whole log is.

    Args:
        lines: The engine's last lines, oldest first.
        returncode: Its exit code, 128 + n for signal n; None if this program ended it.
        free_bytes: Memory that was free while the engine was running; None if unknown.
        log: Command that shows the whole log.
    """
    lines = [line[:_LINE_CHARACTERS] for line in lines]
    shown = "\n".join(f"  | {line}" for line in _relevant(lines)) or "  (none)"
    return f"{_cause(lines, returncode, free_bytes)}\nLast lines of the engine:\n{shown}\nThe whole log: {log}"


def root_cause(lines: Sequence[str]) -> str | None:
    """Returns the last line that states an error itself, not one that points to an earlier error."""
    for number in range(len(lines) - 1, -1, -1):
        text = _PREFIX.sub("", lines[number])
        if _ERROR.match(text) and not any(wrapper in text for wrapper in _WRAPPERS):
            if inner := _WORKER.match(text):
                return inner[1]
            follows, then = (_PREFIX.sub("", line) for line in [*lines[number + 1 : number + 3], "", ""][:2])
            # pydantic's first line only counts the errors; the next line has the first one, or the field that it is about
            if "validation error" in text and follows.startswith(" "):
                return f"{text}: {follows.strip()}"
            if "validation error" in text and re.fullmatch(r"[\w.]+", follows) and then.startswith(" "):
                return f"{text}: {follows}: {then.strip()}"
            return text
    return None


def _cause(lines: Sequence[str], returncode: int | None, free_bytes: int | None) -> str:
    if signalled := _signalled(returncode, free_bytes):
        return signalled
    found = root_cause(lines)
    died = next((line for line in lines if _is_death(line)), None)
    if found is None and (died or any("EngineDeadError" in line for line in lines)):
        # vLLM does not say how the process ended. One that ends by itself logs an error first, and SIGKILL allows none.
        return f"its engine process vanished without an error, as one killed by signal 9 (SIGKILL) does. {_memory(free_bytes)}"
    for pattern, meaning, remedy in _SIGNS if found else ():
        if re.search(pattern, found or ""):
            return f"{meaning}: {found}. Remedy: {remedy}"
    code = f" (exit code {returncode})" if returncode else ""
    return f"{found}{code}" if found else f"it ended without an error in its log{code}"


def _is_death(line: str) -> bool:
    """Whether a line says that an engine process is dead. Two searches: in one pattern they would take cubic time."""
    process = _PROCESS.search(line)
    return process is not None and _DIED.search(line, process.end()) is not None


def _signalled(returncode: int | None, free_bytes: int | None) -> str:
    """Returns which signal ended the engine; "" if none did."""
    number = (returncode or 0) - 128
    try:
        name = signal.Signals(number).name
    except ValueError:  # not above 128, or a code of the program's own, such as the 255 of sys.exit(-1)
        return ""
    text = f"it was killed by signal {number} ({name})"
    return f"{text}. {_memory(free_bytes)}" if number == signal.SIGKILL else text


def _memory(free_bytes: int | None) -> str:
    free = "" if free_bytes is None else f" ({free_bytes / GIB:.1f} GiB were free after the start)"
    return (
        f"The usual cause is the kernel, when memory runs out{free}: set a smaller max_model_len, use a smaller model, "
        "or stop other programs"
    )


def _relevant(lines: Sequence[str]) -> list[str]:
    """Returns the last different lines that state an error; without one, the last lines."""
    plain = [_PREFIX.sub("", line).rstrip() for line in lines]
    errors = [line for line in plain if _ERROR.match(line) or _is_death(line)]
    chosen = errors or [line for line in plain if line and not line.startswith(_REQUEST) and not _END.search(line)]
    return [line[:300] for line in list(dict.fromkeys(chosen))[-_SHOWN_LINES:]]
