"""What this machine can compute with and what is installed, read from the system in milliseconds. Imports no torch, starts no
CUDA context."""

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
"""CUDA compute capability from which bf16 is native (Ampere); T4 is 7.5, V100 7.0."""


@lru_cache(maxsize=1)
def local_device() -> DeviceFacts:
    """Returns the facts of this machine: its GPUs by the first one, if there is one, else the processor."""
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
    """Returns the bytes that new processes may take: free memory, or what the cgroup still allows if that is less."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # no Linux
        return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)
    cgroup = Path("/sys/fs/cgroup")
    try:
        limit = int((cgroup / "memory.max").read_text())  # "max" without a limit
        used = int((cgroup / "memory.current").read_text())
    except (OSError, ValueError):
        return free
    return min(free, max(limit - used, 0))


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bfloat16 natively."""
    try:
        lines = CPU_INFO.read_text().splitlines()
    except OSError:
        return False
    line = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & {*line.partition(":")[2].split()})


def free_gpu_memory() -> int | None:
    """Returns the free bytes over all GPUs; None when nvidia-smi says nothing."""
    try:
        lines = _ask_gpus("memory.free")
        return None if lines is None else sum(int(line) for line in lines) * 1024**2
    except ValueError:
        return None


def has_gpu_tool() -> bool:
    """Whether nvidia-smi is here, as it is wherever NVIDIA's driver is."""
    return shutil.which("nvidia-smi") is not None


def installed_version(distribution: str) -> str | None:
    """Returns the version of an installed package, or None. Reads its metadata only."""
    from importlib.metadata import PackageNotFoundError, version  # slow, and every start of the client comes by here

    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _gpus() -> tuple[str, float, float, int] | None:
    """Returns (name, memory in GiB, compute capability) of the first GPU as nvidia-smi says, and how many are to be used."""
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
    """Returns what nvidia-smi says, a line a GPU; None where it is missing or fails."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
