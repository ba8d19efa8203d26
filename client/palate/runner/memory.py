"""Whether the kernel ended a process of this run because a memory limit was reached, as the run's cgroup says. Knows no run."""

from __future__ import annotations

from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_NO_LIMIT = 1 << 60  # the first kind of cgroup says a huge number


class MemoryGuard:
    """Remembers how often the kernel has ended a process of this cgroup for its memory.

    Outside a container, and where the cgroup cannot be read, it knows nothing.
    """

    def __init__(self, root: Path = _ROOT, own: Path = Path("/proc/self/cgroup")) -> None:
        self._folders = _folders(root, own)
        self._before = self._kills()

    def cause(self) -> str:
        """Returns what happened, with the limit and the remedy, when the kernel ended a process since; else ""."""
        if self._kills() <= self._before:
            return ""
        limit = self._limit()
        which = f"its memory limit of {limit / (1 << 30):.3g} GiB" if limit else "the memory of its machine"
        return (
            f"out of memory: the kernel ended it at {which}. Give it more (instance_spec={{'memory': ...}} on the container "
            "backend), or take less: a smaller per_device_train_batch_size or max_length, or QLoRA_LLM"
        )

    def _kills(self) -> int:
        for folder in self._folders:
            for name in ("memory.events", "memory.oom_control"):
                for line in _lines(folder / name):
                    key, _, value = line.partition(" ")
                    if key == "oom_kill":
                        return int(value)
        return 0

    def _limit(self) -> int | None:
        for folder in self._folders:
            for name in ("memory.max", "memory.limit_in_bytes"):
                lines = _lines(folder / name)
                if lines and lines[0].isdigit() and int(lines[0]) < _NO_LIMIT:
                    return int(lines[0])
        return None


def _folders(root: Path, own: Path) -> list[Path]:
    """Where this process's memory is accounted: by both kinds of cgroup, as a container and as its host see the path."""
    found = []
    for line in _lines(own):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            found += [root / path.lstrip("/"), root]
        elif "memory" in controllers.split(","):
            found += [root / "memory" / path.lstrip("/"), root / "memory"]
    return found


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
