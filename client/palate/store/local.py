"""Local files, threads and CRC-32: what stores need to transfer trees. Knows files, no store.

CRC-32 because S3 verifies uploads with it. It detects damage, not tampering: compare SHA-256 digests for that.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from palate.store.uri import RESERVED

PARALLEL = 8
"""Files of a tree that are transferred concurrently."""

_Item = TypeVar("_Item")


def draft_beside(target: Path) -> Path:
    """Returns a new hidden name in the same folder, from which os.replace() is atomic."""
    return target.with_name(f"{RESERVED}draft-{os.urandom(8).hex()}")


def walk(folder: Path) -> Iterator[str]:
    """Yields the relative path of every file below `folder`, with `/`, sorted by the whole path.

    Follows links, except to a parent folder; skips reserved names, sockets and pipes.
    Yields dangling links, so that the caller fails on them instead of skipping a file.
    """
    return _walk(folder, "", (os.path.realpath(folder),))


def _walk(folder: Path, below: str, above: tuple[str, ...]) -> Iterator[str]:
    try:
        with os.scandir(folder) as found:
            entries = [(entry.name, entry.is_dir(), entry.is_file() or entry.is_symlink()) for entry in found]
    except (FileNotFoundError, NotADirectoryError):
        return  # deleted concurrently, or an object and not a folder
    # Sort a folder with its slash, or `a/b` and `a.txt` would come in another order than on S3.
    for name, is_folder, is_file in sorted(entries, key=lambda entry: entry[0] + "/" * entry[1]):
        if name.startswith(RESERVED):
            continue
        if is_folder:
            real = os.path.realpath(folder / name)  # only parents are excluded: a link to a sibling is not a cycle
            if real not in above:
                yield from _walk(folder / name, f"{below}{name}/", (*above, real))
        elif is_file:
            yield below + name


def in_parallel(function: Callable[[_Item], object], items: Iterable[_Item], *, threads: int = PARALLEL) -> None:
    """Calls `function` with each item in a thread pool. The first failure cancels the rest and is raised."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(max_workers=threads, thread_name_prefix="palate-store") as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            for future in futures:
                future.result()
        except BaseException:  # KeyboardInterrupt too: leaving the block waits for all queued items otherwise
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_BLOCK = 1 << 20


def crc32_of(path: str | os.PathLike[str]) -> str:
    """Returns the CRC-32 of a file as eight hex digits.

    Raises:
        OSError: The file cannot be read.
    """
    crc = 0
    with Path(path).open("rb") as file:
        while block := file.read(_BLOCK):
            crc = zlib.crc32(block, crc)
    return spelled(crc)


def spelled(crc: int) -> str:
    """Returns a CRC-32 as eight hex digits."""
    return f"{crc:08x}"
