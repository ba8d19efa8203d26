"""Reference log-probabilities of a data set, cached in a file across runs. Knows files, no model."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from palate_recipes.specs.reference_table import LogProbs, Table, read_table, reference_key, table_name, write_table
from palate_recipes.specs.train import TrainTask
from palate_trainer.distributed import is_main

_PROGRESS_EVERY_S = 10.0
_SAVE_EVERY_S = 60.0
_CHECKED_ROWS = 4

_TOLERANCES = {"float32": (1e-3, 2e-4), "bfloat16": (0.5, 0.005), "float16": (0.1, 0.001)}
"""Absolute (nats) and relative tolerance of a row's log-probability between two batches or two machines."""


class ReferenceScores:
    """The reference's log-probabilities for one run: from the run's cache folder if present, else scored.

    A table that cannot be read or written is reported in a note and does not fail the run.

    Args:
        task: The run. Without a `cache_dir` every row is scored.
        note: Called with a progress line.
        label: What is scored, in messages; default: the reference and the name of the data set.

    Attributes:
        cached_rows: Rows found in the table so far.
        scored_rows: Rows scored so far.
        seconds: Time spent on both.
    """

    def __init__(self, task: TrainTask, note: Callable[[str], None], *, label: str = "") -> None:
        self.note = note
        self._label = label
        self.cached_rows, self.scored_rows, self.seconds = 0, 0, 0.0
        self._precision = task.spec.precision
        self._quantised = bool(task.spec.hyperparameters.load_in_4bit or task.spec.hyperparameters.load_in_8bit)
        self._path: Path | None = None
        self._checked = False
        self._table = Table("")
        self._kept: frozenset[str] = frozenset()  # digests from earlier runs
        if task.files.cache_dir is not None:
            try:
                key = reference_key(task)
                self._path = Path(task.files.cache_dir) / table_name(key)
                self._table = read_table(self._path, key)
                self._kept = frozenset(self._table.rows)
            except OSError as error:
                self._give_up(error)

    def knows(self, digests: Sequence[str]) -> bool:
        """Whether all these rows are in the table."""
        return all(digest in self._table.rows for digest in digests)

    def report(self) -> dict[str, int]:
        """The row counts for the `start` event."""
        return {
            "reference_cached_rows": self.cached_rows,
            "reference_scored_rows": self.scored_rows,
        }

    def logps(
        self,
        digests: Sequence[str],
        lengths: Sequence[int],
        score: Callable[[list[int]], list[LogProbs]],
        *,
        name: str,
        batch_size: int,
    ) -> list[LogProbs]:
        """Returns the log-probabilities of a data set's rows in order, and saves those it had to score.

        Args:
            digests: Digest of each row (see `row_digest`).
            lengths: Tokens of each row. Rows of similar length share a batch.
            score: Scores one batch, given as row indices.
            name: Name of the data set in messages.
            batch_size: Rows per batch.
        """
        began = time.monotonic()
        what = self._label or f"reference {name}"
        first = {digest: row for row, digest in reversed(list(enumerate(digests)))}  # score a repeated row once
        found = {digest: self._table.rows[digest] for digest in first if digest in self._table.rows}
        kept = sorted(self._kept.intersection(found))
        if kept and not self._checked and not self._holds(kept, first, lengths, score, batch_size):
            found = {}
        missing = sorted((row for digest, row in first.items() if digest not in found), key=lambda row: -lengths[row])
        self._table.add(found.items())  # marks them as recently used: a full table drops the oldest rows
        scored = self._score(missing, digests, score, what=what, batch_size=batch_size)

        cached = sum(digest in self._kept for digest in digests)
        seconds = time.monotonic() - began
        self.cached_rows += cached
        self.scored_rows += len(digests) - cached
        self.seconds += seconds
        found_some = f"{cached} of {len(digests)} pairs from the cache, " if self._path is not None else ""
        self.note(f"{what}: {found_some}{len(digests) - cached} scored in {seconds:.1f} s")
        return [found[digest] if digest in found else scored[digest] for digest in digests]

    def _score(
        self,
        rows: list[int],
        digests: Sequence[str],
        score: Callable[[list[int]], list[LogProbs]],
        *,
        what: str,
        batch_size: int,
    ) -> dict[str, LogProbs]:
        scored: dict[str, LogProbs] = {}
        said = saved = time.monotonic()
        try:
            for start in range(0, len(rows), batch_size):
                batch = rows[start : start + batch_size]
                values = dict(zip((digests[row] for row in batch), score(batch), strict=True))
                scored |= values
                self._table.add(values.items())
                now = time.monotonic()
                if now - said > _PROGRESS_EVERY_S:
                    said = now
                    self.note(f"{what} {start + len(batch)}/{len(rows)} pairs")
                if now - saved > _SAVE_EVERY_S:
                    self._save()
                    saved = time.monotonic()
        finally:
            # Save after a stop too, so that the next run continues from here.
            if scored:
                self._save()
        return scored

    def _holds(
        self,
        kept: list[str],
        first: dict[str, int],
        lengths: Sequence[int],
        score: Callable[[list[int]], list[LogProbs]],
        batch_size: int,
    ) -> bool:
        """Scores a few cached rows again. Drops the table if one of them differs."""
        self._checked = True
        # A random sample with a fixed seed: every process must check the same rows. Short rows keep the check cheap.
        picked = random.Random(self._table.key).sample(kept, min(4 * _CHECKED_ROWS, len(kept)))
        picked = sorted(picked, key=lambda digest: lengths[first[digest]])[: min(_CHECKED_ROWS, batch_size)]
        for digest, values in zip(picked, score([first[digest] for digest in picked]), strict=True):
            for now, before in zip(values, self._table.rows[digest], strict=True):
                # `not <=` instead of `>`: NaN compares False both ways and must count as a difference.
                if not abs(now - before) <= self._tolerance(before):
                    self.note(
                        f"reference: the cached log-probability of an answer is {before:.4f}, but it scores {now:.4f} now:"
                        " the cache is dropped and all pairs are scored"
                    )
                    self._table = Table(self._table.key, generation=self._table.generation + 1)
                    self._kept = frozenset()
                    return False
        return True

    def _tolerance(self, value: float) -> float:
        absolute, relative = _TOLERANCES["bfloat16" if self._quantised else self._precision]
        return absolute + relative * abs(value)

    def _save(self) -> None:
        if self._path is None or not is_main():
            return
        try:
            # Merge, because another run may have written to the same folder since.
            write_table(self._path, read_table(self._path, self._table.key).merge(self._table))
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._path = None
        self.note(f"reference: this run does not use the cache: {error}")
