"""What a report says of a job, read from its store: record, metrics, data, answers. Knows no HTML and no chart."""

from __future__ import annotations

import hashlib
import json
import shlex
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palate.evaluation import record as evaluations
from palate.evaluation.record import EvaluationRecord, Figure
from palate.runs.record import Record
from palate.session import Session
from palate.store import Store, open_parent
from palate.store.uri import normal_uri
from palate_recipes.errors import ConfigurationError, PalateError
from palate_recipes.preferences.check import read_files
from palate_recipes.preferences.report import Report as DataReport
from palate_recipes.specs.codec import parse_object
from palate_recipes.specs.diagnose import Reading, read_run
from palate_recipes.specs.run import Status, TrainManifest
from palate_recipes.specs.train import InputFile, TrainSpec

if TYPE_CHECKING:
    from palate.job import TrainingJob

_DATA_BYTES = 64 * 1024**2
"""Larger data files are not read again for a report: the manifest has their rows, size and digest."""

_MOST_ROWS = 50
"""Questions that a report shows of one file. The file has the others."""

_MOST_EVALUATIONS = 8


@dataclass(frozen=True)
class ChannelFacts:
    """The data of one channel.

    Attributes:
        name: `train`, `validation` or `adapter`.
        given: The manifest's entry.
        checked: The check of the file; None if it was not read.
        remark: Why it was not read; may be empty.
    """

    name: str
    given: InputFile
    checked: DataReport | None = None
    remark: str = ""


@dataclass(frozen=True)
class Answers:
    """Answers of several models to the same questions.

    Attributes:
        title: Where they come from.
        models: Names of the models.
        rows: Question, and one answer per model.
        facts: Further figures, by name.
        left_out: Number of rows that are not shown.
    """

    title: str
    models: tuple[str, ...] = ()
    rows: tuple[tuple[str, tuple[str, ...]], ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    left_out: int = 0


@dataclass(frozen=True)
class JobFacts:
    """Everything that a report says of one job."""

    name: str
    uri: str
    manifest: TrainManifest
    status: Status
    events: list[dict[str, Any]]
    reading: Reading
    channels: list[ChannelFacts] = field(default_factory=list)
    answers: list[Answers] = field(default_factory=list)

    @property
    def spec(self) -> TrainSpec:
        return self.manifest.body

    def last(self, kind: str) -> dict[str, Any]:
        """The last event of a kind, or an empty one."""
        return next((event for event in reversed(self.events) if event.get("kind") == kind), {})


def gather(job: TrainingJob) -> JobFacts:
    """Reads everything that a report needs. Data and answers that cannot be read become remarks."""
    status, events = job.describe(), job.metrics()
    return JobFacts(
        name=job.id,
        uri=job.uri,
        manifest=job.manifest,
        status=status,
        events=events,
        reading=read_run(events),
        channels=_channels(job.manifest.body, job._run.record, job._run.session),
        answers=read_evaluations(job._run.record),
    )


def _channels(spec: TrainSpec, record: Record, session: Session) -> list[ChannelFacts]:
    """Checks the data files of a training again."""
    found: dict[str, ChannelFacts] = {}
    strategy = spec.hyperparameters.training_strategy
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="palate-report-")))
        prompts = None
        # Validation first: the training data is compared with its prompts.
        for name in sorted(spec.inputs, key=("validation", "train", "adapter").index):
            given = spec.inputs[name]
            if name == "adapter":
                found[name] = ChannelFacts(name, given)
                continue
            try:
                path, remark = _fetch(given, record, session, scratch / name)
                if path is None:
                    found[name] = ChannelFacts(name, given, remark=remark)
                    continue
                linter = read_files(
                    [(path, path.name)],
                    strategy=strategy,
                    against=prompts if name == "train" else None,
                    index_prompts=name == "validation",
                )
                prompts = linter.prompts if name == "validation" else prompts
                found[name] = ChannelFacts(name, given, linter.finish())
            except (PalateError, OSError) as error:
                found[name] = ChannelFacts(name, given, remark=f"not read: {error}")
    return [found[name] for name in ("train", "validation", "adapter") if name in found]


def _fetch(given: InputFile, record: Record, session: Session, folder: Path) -> tuple[Path | None, str]:
    """Returns a copy of a data file, or None and a remark.

    Whoever can write to a store can write any URI into a manifest. So a file outside of the run's inputs is read only if it has the
    recorded digest, and the remark is the same whether it is missing, has changed or is a file that only the reader can read.
    """
    if given.bytes is not None and given.bytes > _DATA_BYTES:
        return None, f"not read again: it has {given.bytes / 1e6:.0f} MB"
    key = _own_key(given.uri, record)
    if key is None:
        if given.sha256 is None:
            return None, "not read: it is not among the job's own inputs, and the manifest has no SHA-256 of it"
        try:
            store, name = open_parent(given.uri, options=session.options_for(given.uri))
            content = _content(store, name)
        except (PalateError, OSError):
            content = None
    else:
        store, name = record.store, key
        info = store.stat(key)
        if info is None:
            return None, "not read: the file does not exist any more"
        if info.size > _DATA_BYTES:
            return None, f"not read again: it has {info.size / 1e6:.0f} MB"
        content = _content(store, key)
    # The digest is that of the bytes that are checked: a file that is replaced meanwhile is not read a second time.
    if content is None or (given.sha256 is not None and hashlib.sha256(content).hexdigest() != given.sha256):
        return None, "not read: the file has changed or is another"
    path = folder / name.rpartition("/")[2]
    folder.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path, ""


def _own_key(uri: str, record: Record) -> str | None:
    """Returns the key of a file in the run's `inputs/`; None if it is elsewhere, also by a symbolic link."""
    inputs = record.key("inputs")
    below = f"{record.store.uri(inputs)}/"
    whole = normal_uri(uri)
    if not whole.startswith(below):
        return None
    key = f"{inputs}/{whole.removeprefix(below)}"
    path, root = record.store.local_path(key), record.store.local_path()
    is_linked = path is not None and root is not None and path.resolve() != root.resolve() / key
    return None if is_linked else key


def _content(store: Store, key: str) -> bytes | None:
    """Returns the content of an object; None if it is too large."""
    content = store.get_range(key, 0, _DATA_BYTES + 1)
    return content if len(content) <= _DATA_BYTES else None


def read_answers(path: Path) -> Answers:
    """Reads answers from a file such as the quickstart's `answers.json`: objects with a question and an answer per model.

    Raises:
        ConfigurationError: The file has another form.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(
            f"{path} is not JSON: {str(error)[:200]}. Give the quickstart's answers.json"
        ) from None
    found = _side_by_side(path.name, rows) if isinstance(rows, list) else None
    if found is None:
        raise ConfigurationError(
            f"{path} has no answers: expected a list of objects with `question` and one answer per model, such as the"
            " quickstart's answers.json"
        )
    return found


def read_evaluations(record: Record) -> list[Answers]:
    """Reads the newest evaluations of a job, the prompts and answers of the newest one only. A damaged one becomes a remark."""
    shown: list[Answers] = []
    has_rows = False
    for key, figures in evaluations.newest_first(record)[:_MOST_EVALUATIONS]:
        try:
            if isinstance(figures, PalateError):
                raise figures
            title = f"evaluation {Path(key).stem}, {_date(figures.created_at)}"
            answers = (
                Answers(title) if has_rows else _compared(title, f"{key.removesuffix('.json')}.rows.jsonl", record)
            )
        except (FileNotFoundError, ValueError, PalateError) as error:
            shown.append(_not_read(key, error))
            continue
        has_rows = True
        shown.append(replace(answers, facts=tuple(_facts(figures))))
    return shown


def _not_read(key: str, error: Exception) -> Answers:
    return Answers(f"evaluation {Path(key).stem}", facts=(("not read", str(error)[:200]),))


def _date(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
    except (OverflowError, OSError, ValueError):  # a record may contain any number
        return f"{seconds:g} s since 1970"


def _facts(evaluation: EvaluationRecord) -> Iterator[tuple[str, str]]:
    if evaluation.judge:
        yield "judge", evaluation.judge
    for one in evaluation.comparisons[:_MOST_ROWS]:
        at_equal_length = f", at equal lengths {_shown(one.length_controlled)}" if one.length_controlled else ""
        counts = f"{one.wins} won, {one.losses} lost and {one.ties} tied of {one.prompts} prompts"
        more = [(one.flips, "flips"), (one.unreadable, "unreadable verdicts"), (one.failed, "failed prompts")]
        counts += "".join(f", {count} {what}" for count, what in more if count or what == "flips")
        yield f"{one.first} against {one.second}", f"win-rate {_shown(one.win_rate)}{at_equal_length}; {counts}"
    if (agreement := evaluation.agreement) is not None:
        kappa = "" if agreement.kappa is None else f", Cohen's κ {agreement.kappa:.2f}"
        yield "agreement with people", f"{agreement.agreed} of {agreement.rows} labels{kappa}"
    for name, held in list(evaluation.preferences.items())[:_MOST_ROWS]:
        margins = f"margin {held.margin.value:.3g} nats (reference {held.base_margin.value:.3g})"
        accuracy = f"accuracy {_shown(held.accuracy)} (reference {held.base_accuracy.value:.1%})"
        yield f"{name} on {held.rows} held-out pairs", f"{accuracy}; {margins}"


def _shown(figure: Figure) -> str:
    return f"{figure.value:.1%} (95% interval {figure.low:.1%} to {figure.high:.1%})"


def _compared(title: str, key: str, record: Record) -> Answers:
    """Reads the rows of an evaluation: each has a prompt, two models with their answers, and what the judge decided."""
    if record.store.stat(key) is None:
        return Answers(title)
    lines = record.store.get_range(key, 0, evaluations.LARGEST_BYTES).splitlines()
    questions: dict[str, dict[str, str]] = {}
    verdicts: dict[str, list[str]] = {}
    for line in lines:
        try:
            row = parse_object(line)
        except ValueError:
            continue  # the last one may be cut off
        question = _prompt_text(row.get("prompt"))
        models = str(row.get("model_a")), str(row.get("model_b"))
        texts = str(row.get("answer_a", "")), str(row.get("answer_b", ""))
        questions.setdefault(question, {}).update(zip(models, texts, strict=True))
        result = {"A": f"prefers {models[0]}", "B": f"prefers {models[1]}"}.get(str(row.get("result")), "tie")
        verdicts.setdefault(question, []).append(f"{' against '.join(models)}: {result}")
    rows = [
        {"question": question, **answers, "judge": "\n".join(verdicts[question])}
        for question, answers in questions.items()
    ]
    return _side_by_side(title, rows) or Answers(title)


def _prompt_text(prompt: object) -> str:
    """Returns a prompt as text: itself, or the turns of a conversation."""
    if not isinstance(prompt, list):
        return str(prompt)
    turns = [turn for turn in prompt if isinstance(turn, dict)]
    return "\n".join(f"{turn.get('role', '')}: {turn.get('content', '')}" for turn in turns)


def _side_by_side(title: str, rows: Sequence[Any]) -> Answers | None:
    """Returns rows as questions with answers; None if a row has another form. The other texts are the answers."""
    pairs: list[tuple[str, dict[str, str]]] = []
    for row in rows:
        if not isinstance(row, dict):
            return None
        question = next((row[name] for name in ("question", "prompt") if isinstance(row.get(name), str)), None)
        if question is None:
            return None
        texts = {name: text for name, text in row.items() if isinstance(text, str)}
        pairs.append((question, {name: text for name, text in texts.items() if name not in ("question", "prompt")}))
    models = tuple(dict.fromkeys(name for _, answers in pairs[:_MOST_ROWS] for name in answers))
    if not models:
        return None
    shown = tuple(
        (question, tuple(answers.get(name, "") for name in models)) for question, answers in pairs[:_MOST_ROWS]
    )
    # The service's name of the model that was trained says little to a reader.
    return Answers(
        title, tuple({"default": "tuned"}.get(name, name) for name in models), shown, (), len(pairs) - len(shown)
    )


def reproduce(facts: JobFacts) -> tuple[str, str]:
    """Returns the training as a Python script and as a command."""
    spec, revision = facts.spec, facts.status.details.get("model_revision")
    source = spec.model.source
    # What the machine decided is fixed, so that another machine computes the same.
    values: dict[str, Any] = {**spec.given, "precision": spec.precision}
    if spec.trains_adapter and not spec.hyperparameters.load_in_4bit and "load_in_4bit" not in values:
        values["load_in_4bit"] = False
    arguments: dict[str, Any] = {}
    if source.kind in ("folder", "store"):
        arguments["model_uri"] = source.location
    else:
        arguments["model_name"] = spec.model.name
        if source.kind == "hub" and isinstance(revision, str) and revision:
            arguments["model_version"] = revision
    inputs = {name: given.uri for name, given in spec.inputs.items()}
    lines = ["from palate import ModelTrainingRecipe", "", "recipe = ModelTrainingRecipe("]
    lines += [f"    {name}={value!r}," for name, value in {**arguments, "method": spec.method}.items()]
    lines += ["    hyperparameters={", *(f"        {name!r}: {value!r}," for name, value in values.items()), "    },"]
    if spec.environment_names:
        names = ", ".join(f"{name!r}: …" for name in spec.environment_names)
        lines.append(f"    environments={{{names}}},  # the values are not recorded")
    lines += [")", "job = recipe.train(inputs={", *(f"    {name!r}: {uri!r}," for name, uri in inputs.items()), "})"]
    lines += ["predictor = job.deploy()", "print(predictor.endpoint)"]
    command = ["palate", "train", inputs.pop("train", "")]
    for name, uri in inputs.items():
        command += [f"--{name}", uri]
    if "model_uri" in arguments:
        command += ["--model-uri", arguments["model_uri"]]
    else:
        version = f"@{arguments['model_version']}" if "model_version" in arguments and spec.model.hub_id else ""
        command += ["--model", f"hf://{spec.model.hub_id}{version}" if version else spec.model.name]
    command += ["--method", spec.method]
    for name, value in {"training_strategy": spec.hyperparameters.training_strategy, **values}.items():
        command += ["-s", f"{name}={_flag(value)}"]
    return "\n".join(lines), shlex.join(command)


def _flag(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
