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
from palate_recipes.errors import CheckError, DataError

LARGE = 32 << 20
"""Bytes from which on helpers pay: they take a quarter of a second to start."""

_PART = 1 << 30
"""Bytes of a part at most: what a helper gives back, about a twentieth of it, is held twice for a moment."""

_BLOCK = 1 << 22
_LINES_SHOWN = 20


@dataclass(frozen=True)
class HeldOut:
    """Validation data, for a check of training data against it.

    Attributes:
        files: Path and name of each.
        format: Of the rows; each row's own fields decide when None.
        prompts: Its prompts, from a read with `index_prompts`; None when the data is to be read again where it is needed.
    """

    files: tuple[tuple[Path, str], ...]
    format: Format | None = None
    prompts: NearIndex | None = None

    def index(self, strategy: Strategy | None) -> NearIndex | None:
        """Returns the prompts of the rows that can be used; None when there are none."""
        if self.prompts is not None:
            return self.prompts or None
        linter = Linter(strategy, format=self.format)
        for path, name in self.files:
            linter.read(path, name=name, index_prompts=True)
        return linter.prompts or None


@dataclass(frozen=True)
class _Task:
    strategy: Strategy | None
    format: Format | None
    held_out: HeldOut | None
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
        CheckError: A helper ended before its part was done.
    """
    if not validation:
        return read_files(train, strategy=strategy, format=format).finish()
    alone = not takes_helpers(train)
    checked = read_files(validation, strategy=strategy, format=format, index_prompts=alone)
    held_out = HeldOut(tuple(validation), format, checked.prompts if alone else None)
    report = read_files(train, strategy=strategy, format=format, held_out=held_out).finish()
    report.join(checked.finish())
    return report


def takes_helpers(files: Sequence[tuple[Path, str]]) -> bool:
    """Whether `read_files` reads these with helpers: they are large, the rows are JSON lines, and there is more than one core.

    Raises:
        DataError: A file cannot be read at all.
    """
    return _takes_helpers([open_container(path) for path, _ in files])


def _takes_helpers(containers: Sequence[Container]) -> bool:
    return len(os.sched_getaffinity(0)) > 1 and sum(map(_lines_bytes, containers)) >= LARGE


def read_files(
    files: Sequence[tuple[Path, str]],
    *,
    strategy: Strategy | None = "dpo",
    format: Format | None = None,
    held_out: HeldOut | None = None,
    index_prompts: bool = False,
) -> Linter:
    """Reads files into one linter, with helpers where `takes_helpers` says so.

    Args:
        files: Path and name of each.
        strategy, format: See `Linter`.
        held_out: What the rows are compared with; each helper reads its files for itself.
        index_prompts: See `Linter.read`; done here, without helpers.

    Raises:
        DataError: A file cannot be read at all.
        CheckError: A helper ended before its part was done.
    """
    containers = [open_container(path) for path, _ in files]
    if index_prompts or not _takes_helpers(containers):
        linter = Linter(strategy, format=format, against=held_out.index(strategy) if held_out else None)
        for container, (_, name) in zip(containers, files, strict=True):
            linter.read(container, name=name, index_prompts=index_prompts)
        return linter
    linter = Linter(strategy, format=format)
    if held_out:
        held_out = replace(
            held_out, prompts=None
        )  # an index is larger than its files, and its hashes are this process's
    tasks = [
        _Task(strategy, format, held_out, part, name)
        for container, (_, name) in zip(containers, files, strict=True)
        for part in _parts(container)
    ]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for found in pool.map(_run, tasks):
            linter.join(found)
    return linter


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
        [
            sys.executable,
            "-P",
            "-m",
            "palate_recipes.data.checking",
        ],  # the folder may be the data's: no module is there
        input=pickle.dumps(task),
        capture_output=True,
        env={**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    if done.returncode:
        how = f"exit code {done.returncode}" if done.returncode > 0 else f"signal {-done.returncode}"
        said = done.stderr.decode(errors="replace").strip().splitlines()[-_LINES_SHOWN:]
        raise CheckError(
            f"{task.name} is not checked whole: a helper program that reads a part of it ended with {how}. Free memory and check "
            "again, or check the data in smaller files" + "".join(f"\n  {line}" for line in said)
        )
    found = pickle.loads(done.stdout)
    if isinstance(found, DataError):
        raise found
    part: Linter = found
    return part


def main() -> None:
    """Checks one part; task and result go through stdin and stdout."""
    task: _Task = pickle.load(sys.stdin.buffer)
    try:
        against = task.held_out.index(task.strategy) if task.held_out else None
        linter = Linter(task.strategy, format=task.format, against=against)
        linter.read(task.container, name=task.name)
        result: Linter | DataError = linter
    except DataError as error:
        result = error
    sys.stdout.buffer.write(pickle.dumps(result))


if __name__ == "__main__":
    main()
