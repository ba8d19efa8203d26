"""Reference log-probabilities as files: what they depend on, one checked line a row. Knows files, no model and no store.

A table is a text file, `<cache_dir>/reference/<key>.jsonl`: a header (one JSON object), then one JSON array a row, the row
used last at the end:

    {"format": 1, "key": "…", "generation": 0}
    ["<digest of the row>", <log-probability of chosen>, <of rejected>, "<checksum of key and row>"]

The key covers the model, the digest the token ids, so a row that changed in any way is simply not found. The trainer reads
and writes tables; the runner merges them into a store, where several jobs may do so at once.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import sys
import zlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from palate_recipes.specs.train import TrainTask

FORMAT = 1
"""Goes up when the numbers get another meaning, or the file another shape: older tables are then never found."""

REFERENCE_DIR = "reference"
"""Folder of the tables, in a cache folder and in a store's cache."""

MAX_ROWS = 500_000
"""Rows a table keeps, about 45 MB; those not used for longest go first."""

_SAMPLES, _SAMPLE_BYTES = 8, 64  # of one tensor
_FILE_SAMPLES, _FILE_END = 256, 1 << 20
_CONFIGS = ("config.json", "adapter_config.json")

LogProbs = tuple[float, float]
"""Log-probabilities (nats) of the chosen and the rejected answer, each a sum over its tokens."""


# What a reference log-probability depends on.


def model_fingerprint(model_dir: str | Path) -> str:
    """Identifies the weights in a folder by samples, in milliseconds: header, shape and 512 bytes of every tensor, and the config.

    A merge, or an update that moves a tensor as a whole, changes it. A change of a few single rows of a large tensor can
    stay unseen; whoever trusts a value therefore scores a few rows again.

    Args:
        model_dir: Folder with a model, or with an adapter.

    Returns:
        A hex digest, the same wherever the same files lie.

    Raises:
        OSError: The folder or a file in it cannot be read.
    """
    folder = Path(model_dir)
    digest = hashlib.sha256()
    for name in _CONFIGS:
        if (folder / name).is_file():
            digest.update(name.encode() + (folder / name).read_bytes())
    names = sorted(os.listdir(folder))
    tensors = [name for name in names if name.endswith(".safetensors")]
    # As transformers does it: pickled weights count only where there are no others.
    for name in tensors or [name for name in names if name.endswith(".bin")]:
        digest.update(f"\n{name}\n".encode())
        with open(folder / name, "rb", buffering=0) as file:
            for part in _tensor_samples(file.fileno()) if name in tensors else _file_samples(file.fileno()):
                digest.update(part)
    return digest.hexdigest()


def reference_key(task: TrainTask) -> str:
    """Names the table for a run's reference: weights, starting adapter, arithmetic, quantisation. Training options do not enter.

    Raises:
        OSError: Weights cannot be read.
    """
    return _digest(
        FORMAT,
        model_fingerprint(task.files.model_dir),
        model_fingerprint(task.files.adapter_dir) if task.files.adapter_dir else None,
        task.spec.precision,
        # Weights that are trained themselves are held in float32, whatever the arithmetic.
        task.spec.precision if task.spec.trains_adapter else "float32",
        task.spec.hyperparameters.load_in_4bit,
        task.spec.hyperparameters.load_in_8bit,
    )


def row_digest(
    prompt_ids: Sequence[int], chosen_ids: Sequence[int], rejected_ids: Sequence[int], *, ld_alpha: float | None = None
) -> str:
    """Names one row by what is scored: its token ids as cut to length, and TRL's `ld_alpha`, which weighs them."""
    digest = hashlib.blake2b(repr(ld_alpha).encode(), digest_size=16)
    for ids in (prompt_ids, chosen_ids, rejected_ids):
        numbers = array("q", ids)
        if sys.byteorder == "big":
            numbers.byteswap()
        digest.update(struct.pack("<q", len(numbers)))
        digest.update(numbers.tobytes())
    return digest.hexdigest()


# Tables.


def table_name(key: str) -> str:
    """Returns where a table lies below a cache folder, with `/`."""
    return f"{REFERENCE_DIR}/{key}.jsonl"


@dataclass
class Table:
    """Log-probabilities by row digest, for one key.

    Attributes:
        key: From `reference_key`.
        rows: By digest; the row used last stands last.
        generation: Goes up when what was there turned out wrong: a table then replaces those of a lower generation.
    """

    key: str
    rows: dict[str, LogProbs] = field(default_factory=dict)
    generation: int = 0

    def add(self, rows: Iterable[tuple[str, LogProbs]]) -> None:
        """Puts rows at the end, over those of the same digest. Values that are no finite numbers are left out."""
        for digest, values in rows:
            self.rows.pop(digest, None)
            if all(math.isfinite(value) for value in values):
                self.rows[digest] = values

    def merge(self, other: Table) -> Table:
        """Returns this table with `other` on top: all rows of both, or those of the higher generation alone.

        Raises:
            ValueError: The tables belong to different keys.
        """
        if other.key != self.key:
            raise ValueError(f"tables of different references cannot be merged: {self.key} and {other.key}")
        if other.generation != self.generation:
            return other if other.generation > self.generation else self
        merged = Table(self.key, dict(self.rows), self.generation)
        merged.add(other.rows.items())
        return merged

    def encode(self) -> bytes:
        """Returns the file's content; beyond MAX_ROWS the rows used longest ago are left out."""
        header = json.dumps({"format": FORMAT, "key": self.key, "generation": self.generation})
        kept = list(self.rows.items())[-MAX_ROWS:]
        return "\n".join([header, *(_line(self.key, digest, *values) for digest, values in kept), ""]).encode("ascii")

    @classmethod
    def decode(cls, data: bytes, key: str) -> Table:
        """Returns what of `data` can be trusted: a line that was damaged, cut off or moved from another table is left out."""
        table = cls(key)
        lines = data.split(b"\n")
        try:
            header = json.loads(lines[0])
            generation = header["generation"]
            if (header["format"], header["key"]) != (FORMAT, key) or type(generation) is not int:
                return table
        except (ValueError, TypeError, KeyError):
            return table
        table.generation = generation
        table.add(row for line in lines[1:] if (row := _row(key, line)) is not None)
        return table


def read_table(path: Path, key: str) -> Table:
    """Returns the table in a file; an empty one where none is, or nothing in it can be trusted.

    Raises:
        OSError: The file is there and cannot be read.
    """
    try:
        return Table.decode(path.read_bytes(), key)
    except FileNotFoundError:
        return Table(key)


def write_table(path: Path, table: Table) -> None:
    """Writes a table, whole or not at all; makes its folder.

    Raises:
        OSError: It cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        draft.write_bytes(table.encode())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _line(key: str, digest: str, chosen: float, rejected: float) -> str:
    # repr of a float reads back as the same float.
    return f'["{digest}", {chosen!r}, {rejected!r}, "{_checksum(key, digest, chosen, rejected)}"]'


def _row(key: str, line: bytes) -> tuple[str, LogProbs] | None:
    try:
        digest, chosen, rejected, checksum = json.loads(line)
    except (ValueError, TypeError):
        return None
    if type(chosen) is not float or type(rejected) is not float or checksum != _checksum(key, digest, chosen, rejected):
        return None
    return digest, (chosen, rejected)


def _checksum(key: str, digest: str, chosen: float, rejected: float) -> str:
    return f"{zlib.crc32(f'{key} {digest} {chosen!r} {rejected!r}'.encode()):08x}"


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:40]


# Samples of weights.


def _tensor_samples(file: int) -> list[bytes]:
    """Returns header and samples of a safetensors file: 8 bytes with the header's size, the header, then the tensors."""
    size = int.from_bytes(os.pread(file, 8, 0), "little")
    if size > os.fstat(file).st_size:
        return _file_samples(file)  # no safetensors file: loading it will say so
    header = os.pread(file, size, 8)
    parts = [header]
    try:
        spans = [tensor["data_offsets"] for name, tensor in json.loads(header).items() if name != "__metadata__"]
        for begin, end in spans:
            parts += _spread(file, 8 + size + begin, end - begin, _SAMPLES)
    except (ValueError, TypeError, KeyError, AttributeError):
        return _file_samples(file)
    return parts


def _file_samples(file: int) -> list[bytes]:
    """Returns size, blocks and end of any file; torch's archives end with a directory that has each tensor's checksum."""
    size = os.fstat(file).st_size
    end = min(size, _FILE_END)
    return [str(size).encode(), os.pread(file, end, size - end), *_spread(file, 0, size, _FILE_SAMPLES)]


def _spread(file: int, begin: int, length: int, samples: int) -> list[bytes]:
    if length <= samples * _SAMPLE_BYTES:
        return [os.pread(file, length, begin)]
    step = (length - _SAMPLE_BYTES) // (samples - 1)
    return [os.pread(file, _SAMPLE_BYTES, begin + step * index) for index in range(samples)]
