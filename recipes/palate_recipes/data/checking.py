"""A check of whole files: large ones in parts, on all cores. Knows the linter, no rule.

The helpers are programs of their own (`python -m palate_recipes.data.checking`), so that a script without a main guard, or a notebook
with threads, can check data too. They share a hash seed: rows of different parts are compared by hash.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from palate_recipes.data.containers import Container, open_container
from palate_recipes.data.formats import Format
from palate_recipes.data.lint import Linter
from palate_recipes.data.near import NearIndex
from palate_recipes.data.report import Report
from palate_recipes.data.rows import Strategy
from palate_recipes.errors import DataError

LARGE = 32 << 20
"""Bytes from which on helpers pay: they take a quarter of a second to start."""

_PART = 1 << 30
"""Bytes of a part at most: what a helper gives back, about a twentieth of it, is held twice for a moment."""

_BLOCK = 1 << 22


@dataclass(frozen=True)
class _Task:
    strategy: Strategy | None
    format: Format | None
    validation: tuple[tuple[Path, str], ...]
    container: Container
    name: str


def check(
    train: Sequence[tuple[Path, str]],
    validation: Sequence[tuple[Path, str]] = (),
    *,
    strategy: Strategy | None = "dpo",
    format: Format | None = None,
) -> Report:
    """Checks training files, against validation files where there are any.

    Args:
        train: Path and name of each file.
        validation: The same of held-out data. Its own rows are checked as well; findings of both are in one report.
        strategy: What the rows are for; None takes any.
        format: Of the rows; each row's own fields decide when None.

    Raises:
        DataError: A file cannot be read at all.
    """
    held_out = read_files(validation, strategy=strategy, format=format, index_prompts=True)
    report = read_files(train, strategy=strategy, format=format, validation=validation).finish()
    if validation:
        report.join(held_out.finish())
    return report


def read_files(
    files: Sequence[tuple[Path, str]],
    *,
    strategy: Strategy | None = "dpo",
    format: Format | None = None,
    validation: Sequence[tuple[Path, str]] = (),
    index_prompts: bool = False,
) -> Linter:
    """Reads files into one linter: with helpers when they are large, the rows are JSON lines, and there is more than one core.

    Args:
        files: Path and name of each.
        strategy, format: See `Linter`.
        validation: Held-out files that the rows are compared with; each helper reads them for itself.
        index_prompts: See `Linter.read`; done here, without helpers.

    Raises:
        DataError: A file cannot be read at all.
    """
    containers = [open_container(path) for path, _ in files]
    cores = len(os.sched_getaffinity(0))
    if index_prompts or cores < 2 or sum(map(_lines_bytes, containers)) < LARGE:
        linter = Linter(strategy, format=format, against=_index(validation, strategy, format))
        for container, (_, name) in zip(containers, files, strict=True):
            linter.read(container, name=name, index_prompts=index_prompts)
        return linter
    linter = Linter(strategy, format=format)
    tasks = [
        _Task(strategy, format, tuple(validation), part, name)
        for container, (_, name) in zip(containers, files, strict=True)
        for part in _parts(container)
    ]
    with ThreadPoolExecutor(cores) as pool:
        for found in pool.map(_run, tasks):
            linter.join(found)
    return linter


def _index(
    validation: Sequence[tuple[Path, str]], strategy: Strategy | None, format: Format | None
) -> NearIndex | None:
    held_out = Linter(strategy, format=format)
    for path, name in validation:
        held_out.read(path, name=name, index_prompts=True)
    return held_out.prompts or None


def _lines_bytes(container: Container) -> int:
    """Bytes that can be parted at a line's end."""
    return container.path.stat().st_size if container.kind == "jsonl" and not container.compression else 0


def _parts(container: Container) -> Iterator[Container]:
    """The file in parts that end with a line, each with the number of its first; the whole where it cannot be parted."""
    size = _lines_bytes(container)
    if not size:
        yield container
        return
    cores = len(os.sched_getaffinity(0))
    wanted = size // (cores * -(-size // (cores * _PART))) + 1  # as many parts as cores, or a multiple
    start, first = 0, 1
    with container.path.open("rb") as file:
        while start < size:
            lines, left, last = 0, wanted, b""
            while left > 0 and (block := file.read(min(_BLOCK, left))):
                lines += block.count(b"\n")
                left -= len(block)
                last = block
            rest = file.readline()
            lines += 1 if rest else not last.endswith(b"\n")  # the file's last line may have no end
            end = file.tell()
            yield replace(container, span=(start, lines, first))
            start, first = end, first + lines


def _run(task: _Task) -> Linter:
    done = subprocess.run(
        [sys.executable, "-m", "palate_recipes.data.checking"],
        input=pickle.dumps(task),
        capture_output=True,
        env={**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    if done.returncode:
        raise RuntimeError(f"a helper that checks {task.name} ended:\n{done.stderr.decode(errors='replace')[-2000:]}")
    found = pickle.loads(done.stdout)
    if isinstance(found, DataError):
        raise found
    part: Linter = found
    return part


def main() -> None:
    """Checks one part; task and result go through stdin and stdout."""
    task: _Task = pickle.load(sys.stdin.buffer)
    try:
        linter = Linter(task.strategy, format=task.format, against=_index(task.validation, task.strategy, task.format))
        linter.read(task.container, name=task.name)
        result: Linter | DataError = linter
    except DataError as error:
        result = error
    sys.stdout.buffer.write(pickle.dumps(result))


if __name__ == "__main__":
    main()
