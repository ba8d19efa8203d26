"""Reference log-probabilities in files: the key, and one line with a checksum per row. Knows files, no model and no store.

A table is a text file, `<cache_dir>/reference/<key>.jsonl`: a header (one JSON object), then one JSON array per row, most
recently used last:

    {"format": 1, "key": "…", "generation": 0}
    ["<digest of the row>", <log-probability of chosen>, <of rejected>, "<checksum of key and row>"]

The key covers the model and the digest covers the token ids, so a row that changed is not found. The trainer reads and writes
tables. The runner merges them into a store, possibly at the same time as other jobs.
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
"""Incremented when the meaning of the numbers or the file format changes. It is part of the key, so older tables are not found."""

REFERENCE_DIR = "reference"
"""Folder of the tables, in a cache folder and in a store's cache."""

MAX_ROWS = 500_000
"""Maximum rows of a table, about 45 MB. The least recently used rows are dropped first."""

_SAMPLES, _SAMPLE_BYTES = 8, 64  # of one tensor
_FILE_SAMPLES, _FILE_END = 256, 1 << 20
_CONFIGS = ("config.json", "adapter_config.json")

LogProbs = tuple[float, float]
"""Log-probabilities (nats) of the chosen and the rejected answer, each a sum over its tokens."""


# What a reference log-probability depends on.


def model_fingerprint(model_dir: str | Path) -> str:
    """Identifies the weights in a folder by samples, in milliseconds: config, and header and 512 bytes of every tensor.

    Detects merges and updates of whole tensors. It can miss a change of a few rows in a large tensor, so callers score a few
    rows again before they trust cached values.

    Args:
        model_dir: Folder of a model or an adapter.

    Returns:
        A hex digest that does not depend on the location of the files.

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
    # As in transformers, pickled weights are used only if there are no safetensors.
    for name in tensors or [name for name in names if name.endswith(".bin")]:
        digest.update(f"\n{name}\n".encode())
        with open(folder / name, "rb", buffering=0) as file:
            for part in _tensor_samples(file.fileno()) if name in tensors else _file_samples(file.fileno()):
                digest.update(part)
    return digest.hexdigest()


def reference_key(task: TrainTask) -> str:
    """The table's key for a run's reference: weights, starting adapter, precision, quantisation. Independent of training options.

    Raises:
        OSError: Weights cannot be read.
    """
    return _digest(
        FORMAT,
        model_fingerprint(task.files.model_dir),
        model_fingerprint(task.files.adapter_dir) if task.files.adapter_dir else None,
        task.spec.precision,
        # In full fine-tuning the weights are float32 for any precision.
        task.spec.precision if task.spec.trains_adapter else "float32",
        task.spec.hyperparameters.load_in_4bit,
        task.spec.hyperparameters.load_in_8bit,
    )


def row_digest(
    prompt_ids: Sequence[int], chosen_ids: Sequence[int], rejected_ids: Sequence[int], *, ld_alpha: float | None = None
) -> str:
    """The digest of a row: its truncated token ids, and TRL's `ld_alpha`, which weights them."""
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
    """Returns the path of a table relative to a cache folder, with `/`."""
    return f"{REFERENCE_DIR}/{key}.jsonl"


@dataclass
class Table:
    """Log-probabilities by row digest, for one key.

    Attributes:
        key: From `reference_key`.
        rows: By digest, most recently used last.
        generation: Incremented when a table turned out wrong. A table replaces those of a lower generation.
    """

    key: str
    rows: dict[str, LogProbs] = field(default_factory=dict)
    generation: int = 0

    def add(self, rows: Iterable[tuple[str, LogProbs]]) -> None:
        """Appends rows, replacing those with the same digest. Skips rows with values that are not finite."""
        for digest, values in rows:
            self.rows.pop(digest, None)
            if all(math.isfinite(value) for value in values):
                self.rows[digest] = values

    def merge(self, other: Table) -> Table:
        """Returns this table updated with `other`: the rows of both, or only those of the higher generation.

        Raises:
            ValueError: The tables belong to different keys.
        """
        if other.key != self.key:
            raise ValueError(f"cannot merge tables of different references: {self.key} and {other.key}")
        if other.generation != self.generation:
            return other if other.generation > self.generation else self
        merged = Table(self.key, dict(self.rows), self.generation)
        merged.add(other.rows.items())
        return merged

    def encode(self) -> bytes:
        """Returns the file's content, with at most MAX_ROWS most recently used rows."""
        header = json.dumps({"format": FORMAT, "key": self.key, "generation": self.generation})
        kept = list(self.rows.items())[-MAX_ROWS:]
        return "\n".join([header, *(_line(self.key, digest, *values) for digest, values in kept), ""]).encode("ascii")

    @classmethod
    def decode(cls, data: bytes, key: str) -> Table:
        """Parses a table. Skips lines that are damaged, truncated or from another table."""
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
    """Reads a table. Returns an empty one if the file is missing or has no valid line.

    Raises:
        OSError: The file exists but cannot be read.
    """
    try:
        return Table.decode(path.read_bytes(), key)
    except FileNotFoundError:
        return Table(key)


def write_table(path: Path, table: Table) -> None:
    """Writes a table atomically, and creates its folder.

    Raises:
        OSError: The file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        draft.write_bytes(table.encode())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _line(key: str, digest: str, chosen: float, rejected: float) -> str:
    # repr of a float round-trips exactly.
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
    """Returns header and samples of a safetensors file. Format: 8 bytes with the header's size, the header, the tensors."""
    size = int.from_bytes(os.pread(file, 8, 0), "little")
    if size > os.fstat(file).st_size:
        return _file_samples(file)  # not a safetensors file; loading it will report that
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
    """Returns size, samples and end of any file. torch's archives end with a directory with each tensor's checksum."""
    size = os.fstat(file).st_size
    end = min(size, _FILE_END)
    return [str(size).encode(), os.pread(file, end, size - end), *_spread(file, 0, size, _FILE_SAMPLES)]


def _spread(file: int, begin: int, length: int, samples: int) -> list[bytes]:
    if length <= samples * _SAMPLE_BYTES:
        return [os.pread(file, length, begin)]
    step = (length - _SAMPLE_BYTES) // (samples - 1)
    return [os.pread(file, _SAMPLE_BYTES, begin + step * index) for index in range(samples)]
