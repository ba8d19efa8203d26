"""`palate data …`: checks, converts, splits, describes and generates preference data. The work is in `palate_recipes.preferences`."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from palate.cli.format import EXAMPLE_MODEL, say_next
from palate.cli.generate import generate
from palate_recipes.errors import ConfigurationError
from palate_recipes.text import visible

if TYPE_CHECKING:
    from palate_recipes.preferences.formats import Format
    from palate_recipes.preferences.report import Report
    from palate_recipes.preferences.transform import Change

data = typer.Typer(help="Check, convert, split and generate preference data.", no_args_is_help=True)

Files = Annotated[list[str], typer.Argument(help="Files, folders, globs or URIs (s3://, oss://, hf://, gsheet://).")]
Strategy = Annotated[str, typer.Option(help="Training strategy: dpo, sft, kto or any.")]
From = Annotated[str | None, typer.Option("--from", help="Format of the rows. Default: detected from their fields.")]
InputColumns = Annotated[
    list[str] | None,
    typer.Option(
        "--input-column",
        metavar="PLACEHOLDER=COLUMN",
        help="Column that fills a placeholder of the prompt; repeat for more.",
    ),
]
LabelColumns = Annotated[
    list[str] | None,
    typer.Option(
        "--label-column",
        metavar="chosen=COLUMN",
        help="Column of an answer; chosen.KEY=COLUMN makes the answer a JSON object with that key.",
    ),
]
Template = Annotated[
    Path | None, typer.Option("--prompt-template", help="CSV or YAML file with name, system and user.")
]
TemplateName = Annotated[
    str | None, typer.Option("--prompt-name", help="Name of the prompt template, if the file has several.")
]

Tokenizer = Annotated[str | None, typer.Option(help="Model name or folder; also counts tokens as the training would.")]
SystemPrompt = Annotated[
    str | None, typer.Option(help="With --tokenizer: system prompt. Default: the training's default.")
]


@data.command()
def check(
    files: Files,
    validation: Annotated[
        list[str] | None, typer.Option(help="Validation data, checked for prompts that are also in the training data.")
    ] = None,
    strategy: Strategy = "dpo",
    from_: From = None,
    input_column: InputColumns = None,
    label_column: LabelColumns = None,
    prompt_template: Template = None,
    prompt_name: TemplateName = None,
    tokenizer: Tokenizer = None,
    seq_length: Annotated[
        int, typer.Option(min=16, max=1_048_576, help="With --tokenizer: maximum tokens of prompt and answer.")
    ] = 128,
    system_prompt: SystemPrompt = None,
    strict: Annotated[bool, typer.Option("--strict", help="Treat warnings as errors.")] = False,
    fix: Annotated[Path | None, typer.Option(help="Write the usable rows, cleaned, to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Check every row, as train() does.

    The exit code is 1 if there are errors.
    """
    from palate_recipes.preferences.check import check as check_files
    from palate_recipes.preferences.transform import clean

    settings = _settings(from_, input_column, label_column, prompt_template, prompt_name)
    form, wanted = _format(settings), _strategy(strategy)
    with _fetch_files(files) as found, _fetch_files(validation or []) as held_out:
        report = check_files(found, held_out, strategy=wanted, format=form)
        if tokenizer is not None:
            from palate.sources.token_stats import measure

            measure(
                report,
                [*found, *held_out],
                tokenizer=tokenizer,
                strategy=wanted,
                settings=settings,
                seq_length=seq_length,
                system_prompt=system_prompt,
            )
        change = clean([path for path, _ in found], fix, strategy=wanted, format=form) if fix else None
    if as_json:
        print(
            json.dumps(report.to_json() | ({"fixed": _as_json(change)} if change else {}), indent=1, ensure_ascii=False)
        )
    else:
        print(visible("\n".join(report.lines())))
        _say_few_steps(report, wanted)
    if change:
        _say(change)
        say_next("data", "check", fix)
    wrong = report.count("error") + (report.count("warning") if strict else 0)
    if wrong and not fix:
        if report.usable:
            say_next(*sys.argv[1:], "--fix", "OUT.jsonl")
        raise typer.Exit(1)
    if form is not None and not fix:
        # `train` reads known fields only.
        own = {"--from": from_, "--prompt-template": prompt_template, "--prompt-name": prompt_name}
        columns = [("--input-column", one) for one in input_column or []]
        columns += [("--label-column", one) for one in label_column or []]
        given = [word for pair in (*own.items(), *columns) if pair[1] is not None for word in pair]
        say_next("data", "convert", *files, "--output", _converted(files[0]), *given)
    elif not fix:
        _say_train(files, validation or [], strategy)


@data.command()
def convert(
    files: Files,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="Output file: .json, .jsonl, .csv, .tsv or .parquet; also with .gz or .zst."
        ),
    ],
    to: Annotated[str, typer.Option(help="Output format; `palate data formats` lists them.")] = "trl",
    from_: From = None,
    input_column: InputColumns = None,
    label_column: LabelColumns = None,
    prompt_template: Template = None,
    prompt_name: TemplateName = None,
    unpair: Annotated[bool, typer.Option("--unpair", help="Split each pair into two labelled rows (for KTO).")] = False,
    skip_bad_rows: Annotated[bool, typer.Option("--skip-bad-rows", help="Skip bad rows and report them.")] = False,
) -> None:
    """Convert data to another row format or file type."""
    from palate_recipes.preferences.formats import format_named
    from palate_recipes.preferences.transform import convert as convert_files

    form = _format(_settings(from_, input_column, label_column, prompt_template, prompt_name))
    with _fetch_files(files) as found:
        change = convert_files(
            [path for path, _ in found],
            output,
            format_named(to),
            format=form,
            bad_rows="skip" if skip_bad_rows else "refuse",
            unpair=unpair,
        )
    _say(change)
    print(output)
    say_next("data", "check", output)


@data.command()
def split(
    files: Files,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Training file; NAME.validation.EXT is written next to it.")
    ],
    validation: Annotated[Path | None, typer.Option(help="Validation file. Default: NAME.validation.EXT.")] = None,
    share: Annotated[float, typer.Option(help="Share of the rows for validation.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Random seed of the split.")] = 0,
    from_: From = None,
) -> None:
    """Split data into training and validation.

    No prompt is in both. Prints both paths.
    """
    from palate_recipes.preferences.transform import split as split_files

    beside = validation or output.with_name(_beside(output.name))
    with _fetch_files(files) as found:
        change = split_files(
            [path for path, _ in found], output, beside, share=share, seed=seed, format=_format({"name": from_})
        )
    _say(change)
    print(f"{output}\n{beside}")
    say_next("train", output, "--validation", beside, "--model", EXAMPLE_MODEL)


@data.command()
def stats(
    files: Files,
    strategy: Strategy = "any",
    from_: From = None,
    tokenizer: Tokenizer = None,
    system_prompt: SystemPrompt = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Describe data: rows, formats, length distributions, languages."""
    from palate_recipes.preferences.check import check as check_files

    settings = {"name": from_}
    with _fetch_files(files) as found:
        report = check_files(found, strategy=_strategy(strategy), format=_format(settings))
        if tokenizer is not None:
            from palate.sources.token_stats import measure

            measure(
                report,
                found,
                tokenizer=tokenizer,
                strategy=_strategy(strategy),
                settings=settings,
                system_prompt=system_prompt,
            )
    if as_json:
        print(json.dumps(report.to_json(), indent=1, ensure_ascii=False))
        return
    _describe(report)
    pairs = report.longer_wins is not None and strategy in ("dpo", "any")
    if report.count("error") or not _say_train(files, [], "dpo" if pairs else strategy):
        say_next("data", "check", *files)


@data.command()
def formats(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the row formats that can be read and written."""
    from palate_recipes.preferences.formats import FORMATS

    if as_json:
        rows = [{"name": name, "fields": one.fields, "written": one.write is not None} for name, one in FORMATS.items()]
        print(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    from palate.ui.terminal import Column, print_table

    print_table(
        ("format", Column("fields", wraps=True), "written"),
        [(name, one.fields, "yes" if one.write else "no") for name, one in FORMATS.items()],
    )


@data.command()
def demo(
    folder: Annotated[Path, typer.Argument(help="Output folder for train.json and validation.json.")] = Path(
        "palate-demo"
    ),
    direction: Annotated[str, typer.Option(help="Preferred answers: honest, flattering, blunt or gentle.")] = "honest",
    per_topic: Annotated[int, typer.Option(help="Pairs per topic, 1 to 4; the quickstart uses 2.")] = 4,
) -> None:
    """Write the demo data with the chosen preference."""
    from palate_recipes.demo import write_demo

    files = write_demo(folder, direction, per_topic=per_topic)
    print("\n".join(str(path) for path in files.values()))
    say_next("train", files["train"], "--validation", files["validation"], "--model", EXAMPLE_MODEL)


data.command()(generate)


# Shared by the commands.


def _strategy(name: str) -> Any:
    if name not in ("dpo", "sft", "kto", "any"):
        raise ConfigurationError(f"--strategy: expected dpo, sft, kto or any, got {name!r}")
    return None if name == "any" else name


def _settings(
    name: str | None,
    inputs: list[str] | None,
    labels: list[str] | None,
    template: Path | None,
    template_name: str | None,
) -> dict[str, Any]:
    """Returns the arguments of `format_for`, as JSON types."""
    answers: dict[str, Any] = {}
    for label, column in _named(labels, "--label-column").items():
        answer, dot, key = label.partition(".")
        if not dot:
            answers[answer] = column
        elif isinstance(answers.setdefault(answer, {}), dict):
            answers[answer][key] = column
        else:
            raise ConfigurationError(
                f"--label-column {label}={column}: {answer} already is a single column; use {answer}.KEY=COLUMN for all of them"
            )
    return {
        "name": name,
        "input_columns": _named(inputs, "--input-column") or None,
        "label_columns": answers or None,
        "prompt_template": str(template) if template else None,
        "prompt_name": template_name,
    }


def _named(entries: list[str] | None, flag: str) -> dict[str, str]:
    named = {}
    for entry in entries or []:
        name, separator, column = entry.partition("=")
        if not separator or not name or not column:
            form = (
                "PLACEHOLDER=COLUMN, such as prompt=" if flag == "--input-column" else "ANSWER=COLUMN, such as chosen="
            )
            raise ConfigurationError(f"{flag}: expected {form}{column or name or 'question'}, got {entry!r}")
        named[name.strip()] = column
    return named


def _format(settings: dict[str, Any]) -> Format | None:
    from palate_recipes.preferences.columns import format_for

    return format_for(**settings)


@contextmanager
def _fetch_files(uris: list[str]) -> Iterator[list[tuple[Path, str]]]:
    """Yields local files, each with its name for messages."""
    from palate.session import get_default_session
    from palate.sources.resolve import fetch_files

    with ExitStack() as places:
        found = []
        for uri in uris:
            fetched = places.enter_context(fetch_files(uri, get_default_session()))
            if fetched.passed_over:
                print(
                    visible(f"skipped (not data files by name): {', '.join(fetched.passed_over)}"),
                    file=sys.stderr,
                )
            single = len(fetched.files) == 1
            found += [(path, uri if single else path.name) for path in fetched.files]
        yield found


def _say_few_steps(report: Report, strategy: str | None) -> None:
    """Prints a note if a training on the data with the default hyperparameters has too few steps."""
    from palate.preflight import few_steps_note
    from palate_recipes.hyperparameters import DeviceFacts, resolve

    if strategy not in ("dpo", "kto"):  # under sft, rows of several turns are several examples
        return
    device = DeviceFacts(cuda=False, bf16=False, fp16=False)  # the steps do not depend on it
    values = resolve({"training_strategy": strategy}, method="LoRA_LLM", device=device).values
    if text := few_steps_note(report.usable * (2 if strategy == "kto" else 1), values, gpus=1):
        print(f"note: with the default hyperparameters, {text}", file=sys.stderr)


def _say_train(files: list[str], validation: list[str], strategy: str) -> bool:
    """Prints the training on data that was found good. Returns False if no single one takes it."""
    if len(files) != 1 or len(validation) > 1 or strategy == "any":
        return False
    more = [*(("--validation", validation[0]) if validation else ()), "--model", EXAMPLE_MODEL]
    say_next("train", files[0], *more, *(() if strategy == "dpo" else ("--strategy", strategy)))
    return True


def _converted(uri: str) -> str:
    """Returns the name of a file in the current folder for the converted data."""
    name = uri.rstrip("/").rpartition("/")[2].partition(".")[0]
    return f"{name if re.fullmatch(r'[A-Za-z0-9][A-Za-z0-9_-]*', name) else 'data'}.converted.jsonl"


def _beside(name: str) -> str:
    stem, dot, rest = name.partition(".")
    return f"{stem}.validation{dot}{rest}"


def _say(change: Change) -> None:
    for path, count in change.written.items():
        print(visible(f"{path}: {count:,} rows"), file=sys.stderr)
    if change.cleaned:
        print(f"cleaned: {change.cleaned:,} rows, chat template tokens removed", file=sys.stderr)
    for code, count in change.dropped.items():
        print(f"skipped: {count:,} rows, {code}", file=sys.stderr)
    for line in change.faults:
        print(visible(f"  {line}"), file=sys.stderr)


def _as_json(change: Change) -> dict[str, Any]:
    return {"written": change.written, "dropped": dict(change.dropped), "cleaned": change.cleaned}


_PARTS = {
    "prompt": "prompt, characters",
    "chosen": "chosen, characters",
    "rejected": "rejected, characters",
    "tokens": "whole row, tokens",
}


def _describe(report: Report) -> None:
    from palate.ui.terminal import Column, bars, print_table

    shapes = ", ".join(f"{name} {count:,}" for name, count in report.formats.items())
    print(f"{report.usable:,} of {report.rows:,} rows are usable; {shapes or 'no known format'}")
    print_table(
        ("length of", "mean", "median", "95%", "99%", "longest", Column("distribution up to 99%", wraps=True)),
        [
            (
                _PARTS[name],
                *(f"{lengths[key]:,}" for key in ("mean", "p50", "p95", "p99", "max")),
                bars(report.histograms[name]),
            )
            for name, lengths in report.lengths.items()
        ],
    )
    if report.longer_wins is not None:
        print(f"the chosen answer is the longer one in {report.longer_wins:.0%} of the pairs")
    for found in report.of("info"):
        print(visible("\n".join(found.lines())))
