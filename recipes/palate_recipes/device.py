"""Detects this machine's GPUs, CPU features and memory in milliseconds, without torch and without a CUDA context."""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

from palate_recipes.hyperparameters import DeviceFacts

_GIB = 1024**3
_FIRST_BF16_CAPABILITY = 8.0
"""First CUDA compute capability with native bf16 (Ampere). T4 has 7.5, V100 7.0."""


@lru_cache(maxsize=1)
def local_device() -> DeviceFacts:
    """Returns the facts of this machine: of its first GPU if there is one, else of its CPU."""
    gpu = _gpus()
    memory_gib = available_memory() / _GIB
    if gpu is not None:
        name, gpu_memory_gib, capability, count = gpu
        return DeviceFacts(
            cuda=True,
            bf16=capability >= _FIRST_BF16_CAPABILITY,
            fp16=True,
            gpu_name=name,
            gpu_memory_gib=gpu_memory_gib,
            memory_gib=memory_gib,
            gpu_count=count,
        )
    flags = _cpu_flags()
    bf16 = bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})
    return DeviceFacts(cuda=False, bf16=bf16, fp16=False, memory_gib=memory_gib)


def available_memory() -> int:
    """Returns the bytes that a new process can use: available memory, or the rest of the cgroup's limit if that is less."""
    free = 0
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    limit, used = _cgroup_memory()
    return free if limit is None else min(free, max(limit - used, 0))


def _cgroup_memory() -> tuple[int | None, int]:
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return None, 0
    return (None if limit == "max" else int(limit)), used


def _cpu_flags() -> set[str]:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return set(line.partition(":")[2].split())
    except OSError:
        pass
    return set()


def _gpus() -> tuple[str, float, float, int] | None:
    """Returns (name, memory in GiB, compute capability) of the first GPU from nvidia-smi, and the number of visible GPUs."""
    tool = shutil.which("nvidia-smi")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if tool is None or visible in {"", "-1"}:
        return None
    query = [tool, "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
        lines = answer.splitlines()
        name, memory_mib, capability = (part.strip() for part in lines[0].rsplit(",", 2))
        count = len(lines) if visible is None else min(len(lines), len(visible.split(",")))
        return name, float(memory_mib) / 1024, float(capability), count
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
