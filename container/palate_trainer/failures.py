"""Turns library exceptions into messages with a remedy. Knows exceptions, no run."""

from __future__ import annotations

import errno
import signal

from palate_recipes.errors import PalateError

_MEMORY_SIGNS = ("out of memory", "can't allocate memory", "cannot allocate memory", "cublas_status_alloc_failed")
_MEMORY_REMEDY = (
    "Use less memory: per_device_train_batch_size=1 with a higher gradient_accumulation_steps, a shorter seq_length,"
    " gradient_checkpointing=true, a smaller lora_dim, QLoRA_LLM (load_in_4bit=true), or a smaller model."
)
_DISK_REMEDY = "Free space on the output folder's disk, or write fewer checkpoints (a higher save_steps, 0 for none)."


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the machine or its GPU ran out of memory."""
    return isinstance(error, MemoryError) or any(sign in f"{error}".lower() for sign in _MEMORY_SIGNS)


def explain(error: BaseException) -> str:
    """Returns one message: Palate's own errors unchanged, known causes with a remedy, anything else as type and text."""
    if isinstance(error, PalateError):
        return str(error)
    text = f"{error}".strip()
    signs = text.lower()
    if is_out_of_memory(error):
        return f"Out of memory: {_first_line(text) or type(error).__name__}. {_MEMORY_REMEDY}"
    if (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)) or "no space left" in signs:
        return f"The disk is full: {_first_line(text)}. {_DISK_REMEDY}"
    if isinstance(error, PermissionError):
        return f"Permission denied: {_first_line(text)}. Check the owner and the permissions of that path."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def explain_signal(number: int) -> str:
    """Describes a death by signal, to follow "was": "killed by SIGKILL: ..."."""
    name = signal.Signals(number).name
    if number == signal.SIGKILL:
        return f"killed by {name}. The usual cause is the kernel's out-of-memory killer. {_MEMORY_REMEDY}"
    return f"killed by {name}."


def _first_line(text: str) -> str:
    return text.splitlines()[0].rstrip(".") if text else ""
