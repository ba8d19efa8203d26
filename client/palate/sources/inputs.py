"""The input data of a training job: fetched, fully checked, and uploaded for the run. Knows stores, no trainer."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from palate.checksums import file_facts
from palate.parameters import reject_unknown_keywords
from palate_recipes.errors import ConfigurationError, DataError
from palate_recipes.specs.train import InputFile

if TYPE_CHECKING:
    from palate.runs.record import Record
    from palate.session import Session
    from palate.sources.select import Fetched
    from palate_recipes.preferences.check import Linter
    from palate_recipes.preferences.formats import Format
    from palate_recipes.preferences.near_duplicates import NearIndex
    from palate_recipes.preferences.report import Report
    from palate_recipes.preferences.row import BadRows, Strategy


_REMARKS_SHOWN = 12

MEMORY = "memory:"
"""Origin of rows that were given themselves."""

Rows = Sequence[Mapping[str, Any]]
"""Rows in memory; `palate.sources.memory` says what else is accepted."""


@reject_unknown_keywords
@dataclass(frozen=True, kw_only=True)
class PreferenceData:
    """Data with instructions on how to read it; `inputs={"train": …}` accepts it in place of a path.

    Attributes:
        uri: A path, folder, glob or URI, see docs/data.md; or the rows: a list of dicts, `datasets.Dataset`, `pandas.DataFrame`.
        format: Name of the row format. Default: detected from the fields of each row.
        input_columns: For a table: maps placeholders of the prompt template to columns; without a template, one column.
        label_columns: For a table: the columns of `chosen` and `rejected`, or several by key, which form a JSON object.
        prompt_template: File with prompt templates (CSV or YAML with `name`, `system`, `user`).
        prompt_name: Name of the template, if the file has several.
    """

    uri: str | Path | Rows
    format: str | None = None
    input_columns: Mapping[str, str] | None = None
    label_columns: Mapping[str, str | Mapping[str, str]] | None = None
    prompt_template: str | Path | None = None
    prompt_name: str | None = None

    def as_format(self) -> Format | None:
        """Returns the row format, or None to detect it from the fields.

        Raises:
            DataError: See `palate_recipes.preferences.columns.format_for`.
        """
        from palate_recipes.preferences.columns import format_for

        return format_for(
            self.format,
            input_columns=self.input_columns,
            label_columns=self.label_columns,
            prompt_template=self.prompt_template,
            prompt_name=self.prompt_name,
        )


@dataclass(frozen=True, kw_only=True)
class Input:
    """Fully checked data of one channel.

    Attributes:
        fetched: The files, on this machine until `checked_inputs` exits.
        report: Report of the check.
        rows: Usable rows.
        skipped: Rows that `bad_rows=skip` leaves out, as row number to fault.
        format: The row format, if it was given.
        strategy: Training strategy of the rows.
    """

    fetched: Fetched
    report: Report
    rows: int
    skipped: dict[int, str] = field(default_factory=dict)
    format: Format | None = None
    strategy: Strategy = "dpo"

    def remarks(self, channel: str, *, skipped: bool) -> list[str]:
        """Returns notes about the data for the user, one per line.

        Args:
            channel: `train` or `validation`.
            skipped: Also list the skipped rows.
        """
        from palate_recipes.preferences.load import describe_skipped

        lines = [f"note: {channel}: {describe_skipped(self.skipped)}"] if self.skipped and skipped else []
        if self.fetched.passed_over:
            lines.append(
                f"note: {channel}: skipped, because their names are not those of data files: {', '.join(self.fetched.passed_over[:8])}"
            )
        found = self.report.lines(("warning",))[:-1]
        lines += [f"{channel}: {line}" for line in found[:_REMARKS_SHOWN]]
        if len(found) > _REMARKS_SHOWN:
            lines.append(f"{channel}: … run `palate data check` to see all")
        return lines

    def keep(self, record: Record, channel: str) -> InputFile:
        """Makes the data available to the run; returns its manifest entry.

        A single file in an object store is used in place. A single local file is uploaded unchanged to the job's prefix.
        Everything else (shards, hub datasets, sheets, data with a given format) is uploaded as one JSONL file of plain rows.
        """
        with self._as_file(channel) as (path, entry):
            if entry.uri:
                return entry
            key = record.key("inputs", channel, path.name)
            record.store.upload(path, key)
            return replace(entry, uri=record.store.uri(key))

    def entry(self, channel: str) -> InputFile:
        """Returns the manifest entry that `keep` would return, and uploads nothing. What `keep` would upload has no URI."""
        with self._as_file(channel) as (_, entry):
            return entry

    @contextmanager
    def _as_file(self, channel: str) -> Iterator[tuple[Path, InputFile]]:
        """Yields the file that the run reads, and its manifest entry; the entry's URI is "" if the file must be uploaded."""
        plain = len(self.fetched.files) == 1 and self.format is None
        path = self.fetched.files[0]
        origin = self.fetched.origin
        facts: dict[str, Any] = {"rows": self.rows}
        if self.skipped and plain:
            facts["skipped_rows"] = list(self.skipped)
        if plain and origin.startswith(("s3://", "oss://", "file://", MEMORY)):
            in_place = origin.startswith(("s3://", "oss://"))
            yield path, InputFile(uri=origin if in_place else "", **file_facts(path), **facts)
            return
        with tempfile.TemporaryDirectory(prefix="palate-") as folder:
            joined = Path(folder) / f"{channel}.jsonl"
            self._join(joined)
            facts |= {"origin": origin, "files": len(self.fetched.files)}
            if self.fetched.revision:
                facts["revision"] = self.fetched.revision
            yield joined, InputFile(uri="", **file_facts(joined), **facts)

    def _join(self, out: Path) -> None:
        from palate_recipes.preferences.formats import plain_raw
        from palate_recipes.preferences.load import read_rows
        from palate_recipes.preferences.writing import write_rows

        bad_rows: BadRows = "skip" if self.skipped else "refuse"  # all were checked and reported
        rows = (
            plain_raw(row)
            for path in self.fetched.files
            for row in read_rows(path, strategy=self.strategy, bad_rows=bad_rows, format=self.format)
        )
        write_rows(out, rows)


@contextmanager
def checked_inputs(
    inputs: Mapping[str, str | Path | Rows | PreferenceData], session: Session, *, strategy: Strategy, bad_rows: BadRows
) -> Iterator[dict[str, Input]]:
    """Fetches and checks the data of every channel, and compares the training data with the validation data.

    Args:
        inputs: `train` and optionally `validation`.
        session: Has the options of object stores.
        strategy: Training strategy of the rows.
        bad_rows: `refuse` raises for an unusable row, `skip` leaves it out.

    Raises:
        DataError: Data is missing or has unusable rows (with `skip`: no usable row); names file, row, field and remedy.
        StoreError: The object store cannot be read.
        ConfigurationError: An input is neither a path nor a URI.
    """
    from palate.sources.memory import are_rows, write_memory
    from palate.sources.resolve import fetch_files
    from palate.sources.select import Fetched
    from palate_recipes.preferences.check import read_files

    checked: dict[str, Input] = {}
    with ExitStack() as places:
        found: dict[str, tuple[PreferenceData, Format | None, Fetched]] = {}
        for channel, given in inputs.items():
            data = given if isinstance(given, PreferenceData) else PreferenceData(uri=given)
            if are_rows(data.uri):
                folder = Path(places.enter_context(tempfile.TemporaryDirectory(prefix="palate-")))
                path = folder / f"{channel}.jsonl"
                write_memory(data.uri, path, channel)
                if not path.stat().st_size:
                    raise DataError(f"inputs[{channel!r}] has no rows.")
                found[channel] = data, data.as_format(), Fetched((path,), MEMORY, None)
                continue
            if not isinstance(data.uri, str | Path) or not str(data.uri):
                raise ConfigurationError(
                    f"inputs[{channel!r}]={data.uri!r} must be a path or a URI (file://, s3://, oss://, hf://, gsheet://)"
                )
            found[channel] = data, data.as_format(), places.enter_context(fetch_files(data.uri, session))
        files = {
            channel: tuple(
                (path, f"inputs[{channel!r}]" if item.origin == MEMORY else str(path)) for path in item.files
            )
            for channel, (_, _, item) in found.items()
        }
        prompts: NearIndex | None = None
        for channel in sorted(found, key=lambda name: name != "validation"):  # first: train is compared with it
            data, form, fetched = found[channel]
            index = channel == "validation" and "train" in found
            linter = read_files(files[channel], strategy=strategy, format=form, against=prompts, index_prompts=index)
            report = linter.finish()
            _refuse(linter, data, strategy, bad_rows)
            skipped = {number: problem for _, number, problem in sorted((*linter.wrong, *linter.left_out))}
            checked[channel] = Input(
                fetched=fetched, report=report, rows=report.usable, skipped=skipped, format=form, strategy=strategy
            )
            if index:
                prompts = linter.prompts
        yield {channel: checked[channel] for channel in inputs}


def _refuse(linter: Linter, data: PreferenceData, strategy: Strategy, bad_rows: BadRows) -> None:
    from palate_recipes.preferences.check import column_flags
    from palate_recipes.preferences.files import open_container
    from palate_recipes.preferences.formats.fields import listed
    from palate_recipes.preferences.load import UNREADABLE, nothing_in, only_ties, refusal, unreadable
    from palate_recipes.preferences.row import Fault

    report = linter.report
    for code in UNREADABLE:
        if code in report.findings:
            place = report.findings[code].places[0]
            raise DataError(unreadable(open_container(place.file), place.row, Fault(code, place.field, place.what)))
    name = report.files[0] if len(report.files) == 1 else str(data.uri)
    if linter.wrong and (bad_rows == "refuse" or not report.usable):
        many = len(report.files) > 1
        first = [f"{problem} ({Path(file).name})" if many else problem for file, _, problem in linter.wrong]
        columns = linter.columns()
        if columns is not None:
            labels = {key: column for key, column in columns.items() if key != "prompt"}
            raise DataError(
                f"{name}: no format has its fields {listed(linter.fields(), most=12)}. Name the columns: "
                f"PreferenceData(uri={name!r}, input_columns={ {'prompt': columns['prompt']} }, label_columns={labels}), or write "
                f"a file to train on: {shlex.join(['palate', 'data', 'convert', name])} {column_flags(columns)} -o NEW.jsonl"
            )
        raise DataError(refusal(name, first, linter.wrong_rows, report.rows, strategy))
    if not report.usable:
        raise DataError(only_ties(name, len(linter.left_out)) if linter.left_out else nothing_in(name, strategy))
