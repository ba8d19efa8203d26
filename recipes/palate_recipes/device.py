"""Detects this machine's GPUs, CPU features, memory and installed packages in milliseconds, without torch and a CUDA context."""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

from palate_recipes.hyperparameters import DeviceFacts

CPU_INFO = Path("/proc/cpuinfo")

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
    return DeviceFacts(cuda=False, bf16=cpu_has_bf16(), fp16=False, memory_gib=memory_gib)


def available_memory() -> int:
    """Returns the bytes that new processes can use: available memory, or the rest of the cgroup's limit if that is less."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux
        return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)
    cgroup = Path("/sys/fs/cgroup")
    try:
        limit = int((cgroup / "memory.max").read_text())  # "max" means no limit and raises ValueError
        used = int((cgroup / "memory.current").read_text())
    except (OSError, ValueError):
        return free
    return min(free, max(limit - used, 0))


def cpu_has_bf16() -> bool:
    """Whether the CPU has bfloat16 instructions."""
    try:
        lines = CPU_INFO.read_text().splitlines()
    except OSError:
        return False
    line = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & {*line.partition(":")[2].split()})


def free_gpu_memory() -> int | None:
    """Returns the free bytes of all GPUs together, or None if nvidia-smi fails."""
    try:
        lines = _ask_gpus("memory.free")
        return None if lines is None else sum(int(line) for line in lines) * 1024**2
    except ValueError:
        return None


def gpu_ids() -> list[str]:
    """Returns the numbers of this machine's GPUs, as CUDA_VISIBLE_DEVICES takes them; none if nvidia-smi fails."""
    return _ask_gpus("index") or []


def has_gpu_tool() -> bool:
    """Whether nvidia-smi is installed, which comes with NVIDIA's driver."""
    return shutil.which("nvidia-smi") is not None


def installed_version(distribution: str) -> str | None:
    """Returns the version of an installed package, or None. Reads its metadata only."""
    from importlib.metadata import PackageNotFoundError, version  # slow, and the client imports this module

    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _gpus() -> tuple[str, float, float, int] | None:
    """Returns (name, memory in GiB, compute capability) of the first GPU from nvidia-smi, and the number of visible GPUs."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible in {"", "-1"}:
        return None
    try:
        lines = _ask_gpus("name,memory.total,compute_cap")
        if lines is None:
            return None
        name, memory_mib, capability = (part.strip() for part in lines[0].rsplit(",", 2))
        count = len(lines) if visible is None else min(len(lines), len(visible.split(",")))
        return name, float(memory_mib) / 1024, float(capability), count
    except (ValueError, IndexError):
        return None


def _ask_gpus(query: str) -> list[str] | None:
    """Returns the output of nvidia-smi, one line per GPU, or None if it is missing or fails."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
