"""Preference accuracy, margins and loss of a job's model on held-out pairs, scored by the trainer. Knows runs, no ML.

An evaluation is a run of its own, `evaluations/<name>` in the store, on the job's backend. Its name is made from the digests of
model, pairs and settings, so that the same question finds the answer that is stored, or the run that is working on it. Others can
compute the name too: a run that is found counts only if its manifest asks the same question.
"""

from __future__ import annotations

import hashlib
import math
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from palate.checksums import file_facts
from palate.job import TrainingJob
from palate.parameters import reject_unknown_keywords
from palate.preflight import check_scoring_memory, check_trainer
from palate.runs.handle import RunHandle
from palate.runs.record import Record, check_manifest, versions
from palate.runs.same import same_evaluation
from palate.session import Session, get_default_session
from palate.sources.inputs import Input, PreferenceData, Rows, checked_inputs
from palate.store import open_parent
from palate.submit import parameter_count
from palate.ui import note
from palate.weights import find_row
from palate_recipes.catalog import Model
from palate_recipes.errors import DamagedFilesError, DataError, EvaluationError, NameTakenError, PalateError
from palate_recipes.specs.codec import encode
from palate_recipes.specs.evaluation import SCORES_FILE, SCORES_FORMAT, EvaluationSpec, PairScores
from palate_recipes.specs.run import EvaluateManifest, State
from palate_recipes.specs.train import InputFile, TrainSpec

if TYPE_CHECKING:
    from palate_recipes.preferences.row import Row

_COMMIT = re.compile(r"[0-9a-f]{40}")
_CHANNEL = "held-out"


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean over rows.

    Attributes:
        value: The mean.
        standard_error: Standard deviation of the values over the square root of their number; 0 for one row.
        rows: Number of values.
    """

    value: float
    standard_error: float
    rows: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """Returns the mean of at least one value."""
        count = len(values)
        mean = math.fsum(values) / count
        if count == 1:
            return cls(value=mean, standard_error=0.0, rows=1)
        variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
        return cls(value=mean, standard_error=math.sqrt(variance / count), rows=count)

    def __str__(self) -> str:
        return f"{self.value:.4g} ± {self.standard_error:.2g}"


@dataclass(frozen=True, kw_only=True)
class PreferenceScores:
    """How a job's model and its reference score held-out pairs. All lists have one entry per used row, in the order of the file.

    The reference is the base model, or the adapter that the job began with. Log-probabilities are sums over an answer's tokens, in
    nats, with the tokens, precision and quantisation of the training.

    Attributes:
        name: Name of the evaluation.
        job: Id of the job.
        checkpoint: Name of the checkpoint; "" for the model of the finished job.
        strategy: `dpo`, `sft` or `kto`: what the job trained.
        beta: The job's `dpo_beta`, the factor of rewards.
        loss_type: The job's loss, if it trained with DPO.
        pairs: Row numbers, token counts, log-probabilities of both models, losses; and which rows were truncated or dropped.
        skipped: Number of rows that are left out: invalid ones (`bad_rows="skip"`) and ties.
        seen_rows: Numbers of the rows whose prompt and chosen answer are in the job's training data; None if that cannot be read.
        seen_prompts: Number of rows whose prompt is in it; None as for `seen_rows`.
    """

    name: str
    job: str
    checkpoint: str
    strategy: str
    beta: float
    loss_type: str
    pairs: PairScores
    skipped: int
    seen_rows: tuple[int, ...] | None
    seen_prompts: int | None

    @cached_property
    def margins(self) -> list[float]:
        """Log-probability of chosen minus that of rejected, by the tuned model."""
        return [c - r for c, r in zip(self.pairs.tuned.chosen, self.pairs.tuned.rejected, strict=True)]

    @cached_property
    def base_margins(self) -> list[float]:
        """The same by the reference."""
        return [c - r for c, r in zip(self.pairs.base.chosen, self.pairs.base.rejected, strict=True)]

    @cached_property
    def reward_margins(self) -> list[float]:
        """Implicit reward of chosen minus that of rejected: `beta` times the difference of `margins` and `base_margins`."""
        return [self.beta * (tuned - base) for tuned, base in zip(self.margins, self.base_margins, strict=True)]

    @property
    def accuracy(self) -> Mean:
        """Share of rows whose chosen answer is more likely than the rejected one, by the tuned model."""
        return _share(self.margins)

    @property
    def base_accuracy(self) -> Mean:
        """The same by the reference."""
        return _share(self.base_margins)

    @property
    def reward_accuracy(self) -> Mean:
        """Share of rows whose chosen answer gained more than the rejected one: `rewards/accuracies` of a training."""
        return _share(self.reward_margins)

    @property
    def margin(self) -> Mean:
        """Mean of `margins`, in nats."""
        return Mean.of(self.margins)

    @property
    def base_margin(self) -> Mean:
        """Mean of `base_margins`, in nats."""
        return Mean.of(self.base_margins)

    @property
    def reward_margin(self) -> Mean:
        """Mean of `reward_margins`: `rewards/margins` of a training."""
        return Mean.of(self.reward_margins)

    @property
    def loss(self) -> float | None:
        """The job's DPO loss; None for SFT and KTO."""
        return self.pairs.loss

    @property
    def base_loss(self) -> float | None:
        """The same of an untrained model."""
        return self.pairs.base_loss

    def lines(self) -> list[str]:
        """Returns the figures and counts in words, one per line."""
        pairs = self.pairs
        left_out = [
            f"{count} {what}"
            for count, what in (
                (self.skipped, "skipped"),
                (len(pairs.dropped), "dropped"),
                (len(pairs.truncated), "truncated"),
            )
            if count
        ]
        found = [
            f"{len(pairs.rows)} pairs scored" + (f", {', '.join(left_out)}" if left_out else ""),
            f"accuracy {self.accuracy}, base {self.base_accuracy}",
            f"margin {self.margin} nats, base {self.base_margin} nats",
            f"reward accuracy {self.reward_accuracy}, reward margin {self.reward_margin} (beta {self.beta:g})",
        ]
        if self.loss is not None:
            found.append(f"loss {self.loss:.4g}, untrained {self.base_loss:.4g} ({self.loss_type})")
        if leak := _leak_note(self.seen_rows, self.seen_prompts, len(pairs.rows)):
            found.append(leak)
        return found

    def __str__(self) -> str:
        return "\n".join(self.lines())


@reject_unknown_keywords
class PreferenceRun:
    """An evaluation in a store, running or ended.

    Args:
        record: Its record.
        session: Store and credentials.
    """

    def __init__(self, record: Record, session: Session) -> None:
        self._run = RunHandle(record, session)

    @classmethod
    def get(cls, name: str, session: Session | None = None) -> PreferenceRun:
        """Returns the evaluation with this name.

        Raises:
            RunNotFoundError: The session's store has none.
        """
        session = session or get_default_session()
        record = Record(session.store, "evaluations", name)
        record.manifest_bytes()
        return cls(record, session)

    @property
    def name(self) -> str:
        return self._run.record.name

    @property
    def manifest(self) -> EvaluateManifest:
        """Its definition: job, model, data, and the settings of the training."""
        return self._run.record.evaluate_manifest()

    @property
    def status(self) -> State:
        """The current state: Creating, Running, Stopping, Succeeded, Failed or Stopped."""
        return self._run.refresh().state

    def logs(self, follow: bool = False) -> Iterator[str]:
        """Yields the log line by line. With `follow`, until it has ended."""
        return self._run.lines(follow=follow)

    def stop(self) -> None:
        """Stops it. What is scored is kept: asking again continues from there."""
        self._run.stop()

    def delete(self) -> None:
        """Stops it if it is running, and deletes it with its scores."""
        self._run.delete()

    def wait(self, *, show_logs: bool = True, timeout_s: float | None = None) -> PreferenceScores:
        """Waits for the scores and returns them.

        Args:
            show_logs: Show its log on stderr.
            timeout_s: Time limit in seconds; None: no limit. It continues after a timeout, and after Ctrl-C.

        Raises:
            EvaluationError: It failed or was stopped.
            DamagedFilesError: The stored scores are not what was written.
            WaitTimeoutError: It has not ended within `timeout_s`.
        """
        try:
            status = self._run.follow(
                until=lambda status: status.is_terminal,
                show_logs=show_logs,
                timeout_s=timeout_s,
                what="the evaluation",
                after_log_part=0,
            )
        except KeyboardInterrupt as interrupt:
            interrupt.add_note(
                f"evaluation {self.name} continues: `palate logs -f {self.name}` follows it, `palate stop {self.name}` stops it"
            )
            raise
        if status.state != "Succeeded":
            verb = "was stopped" if status.state == "Stopped" else "failed"
            raise EvaluationError(
                f"evaluation {self.name} {verb}", reason=status.reason, log_tail=list(status.log_tail)
            )
        return self.scores()

    def scores(self) -> PreferenceScores:
        """Returns the stored scores of an evaluation that has succeeded. Raises DamagedFilesError as `wait`."""
        record = self._run.record
        digest = record.status().details.get("scores_digest")
        try:
            data = record.store.get(record.key(SCORES_FILE))
            if hashlib.sha256(data).hexdigest() != digest:
                raise ValueError("its digest is another")
            pairs = PairScores.decode(data)
        except (FileNotFoundError, ValueError) as error:
            raise DamagedFilesError(
                f"{record.uri}/{SCORES_FILE} is missing or changed ({error}): delete the evaluation (`palate delete "
                f"{self.name}`), and ask again"
            ) from None
        spec = self.manifest.body
        values = spec.training.hyperparameters
        return PreferenceScores(
            name=self.name,
            job=spec.job.rpartition("/")[2],
            checkpoint=spec.checkpoint,
            strategy=values.training_strategy,
            beta=values.dpo_beta,
            loss_type=values.loss_type,
            pairs=pairs,
            skipped=spec.skipped,
            seen_rows=spec.seen_rows,
            seen_prompts=spec.seen_prompts,
        )

    def __repr__(self) -> str:
        return f"PreferenceRun(name={self.name!r})"


@reject_unknown_keywords
def preference_scores(
    job: TrainingJob | str,
    data: str | Path | Rows | PreferenceData,
    *,
    checkpoint: str | int | None = None,
    session: Session | None = None,
    show_logs: bool = True,
    timeout_s: float | None = None,
) -> PreferenceScores:
    """Scores held-out pairs with a job's model and with its reference, and waits for the result.

    If the same pairs were scored with the same model before, this returns the stored result and starts nothing.

    Args:
        job: The job, or its id.
        data: Pairs in any format and from any source that `train()` takes. Not those that the job trained on: they are counted in
            `seen_rows`.
        checkpoint: As in `TrainingJob.deploy`.
        session: Store of the job, if `job` is an id; default: the default session.
        show_logs: Show the log on stderr.
        timeout_s: As in `PreferenceRun.wait`.

    Raises:
        JobNotReadyError: The job has no model yet and no `checkpoint` is given, or it has no complete checkpoint.
        DataError: The data cannot be read or has no pairs; names file, row, field and remedy.
        NotEnoughMemoryError: The model cannot fit.
        DamagedFilesError: A file of the model is missing or changed.
        NameTakenError: The store has another evaluation under this one's name, or one that would have to be continued and was not
            started here. Says what differs and the remedy.
        EvaluationError: It failed or was stopped; has the reason and the last log lines.
    """
    run = start_preference_scores(job, data, checkpoint=checkpoint, session=session, announce=show_logs)
    return run.wait(show_logs=show_logs and run.status != "Succeeded", timeout_s=timeout_s)


@reject_unknown_keywords
def start_preference_scores(
    job: TrainingJob | str,
    data: str | Path | Rows | PreferenceData,
    *,
    checkpoint: str | int | None = None,
    session: Session | None = None,
    announce: bool = True,
) -> PreferenceRun:
    """Starts what `preference_scores` waits for, or finds the run that is working on it or has ended. See there.

    A failed or stopped one is continued, if this user started it from this machine.
    """
    if isinstance(job, str):
        job = TrainingJob.get(job, session)
    session, training = job._run.session, job.manifest.body
    served = job.served_model(checkpoint)
    backend = job._run.backend
    with checked_inputs(
        {_CHANNEL: data}, session, strategy="dpo", bad_rows=training.hyperparameters.bad_rows
    ) as checked:
        rows = _rows(checked[_CHANNEL])
        status = job.describe()
        revision = str(status.details.get("model_revision", ""))
        source = training.model.source
        if source.kind == "hub" and _COMMIT.fullmatch(revision):
            source = replace(source, revision=revision)  # a branch may have moved since
        spec = EvaluationSpec(
            job=job.uri,
            training=replace(training, model=replace(training.model, source=source)),
            base_revision=revision,
            tuned_uri=str(served.tuned_uri),
            tuned_digest=served.tuned_digest,
            checkpoint=served.checkpoint or "",
            data=InputFile(uri=""),
            skipped=len(checked[_CHANNEL].skipped),
        )
        key = _key(spec, rows, trained_at=job.manifest.created_at)
        record = Record(session.store, "evaluations", f"{job.id[:60]}-{key[:16]}")
        run = PreferenceRun(record, session)
        if record.exists():
            _check_same(run, spec, job, checked[_CHANNEL], rows)
            return _continued(run, announce=announce)
        if backend.uses_this_python:
            check_trainer()
        check_scoring_memory(
            training, parameter_count(training, _row_of(training)), device=backend.device(training.placement)
        )
        seen, seen_prompts = _seen(rows, training, session, announce=announce)
        manifest = EvaluateManifest(
            name=record.name,
            backend=job.manifest.backend,
            body=replace(spec, seen_rows=seen, seen_prompts=seen_prompts),
            labels={"job": job.id},
            versions=versions(),
        )
        check_manifest(manifest)
        kept = checked[_CHANNEL].keep(record, _CHANNEL)
        manifest = replace(manifest, body=replace(manifest.body, data=kept))
        try:
            record.create(manifest)
        except NameTakenError:  # somebody asked the same at the same time
            _check_same(run, spec, job, checked[_CHANNEL], rows)
            return _continued(run, announce=announce)
        run._run.start()
    if announce:
        note(
            f"evaluation {run.name} submitted: {len(rows)} pairs for {job.id}{f' {spec.checkpoint}' * bool(spec.checkpoint)}"
        )
        if leak := _leak_note(seen, seen_prompts, len(rows)):
            note(leak)
    return run


def _continued(run: PreferenceRun, *, announce: bool) -> PreferenceRun:
    """Returns a run that exists, after it was started again if it had failed or was stopped.

    Raises:
        NameTakenError: It would have to be started again, and this user has not started it from here.
    """
    status = run._run.refresh()
    if status.state in ("Failed", "Stopped"):
        if not run._run.is_own:  # as `RunHandle.refresh`, which does not start it either
            raise NameTakenError(
                f"evaluation {run.name} is {status.state} and was not started by you on this machine. To continue it would run here "
                f"what another writer of {run._run.record.store.root} may have left in it: delete it (`palate delete {run.name}`), and "
                "ask again"
            )
        run._run.restart(expect={"Failed", "Stopped"}, attempt=status.attempt, more=1, environments={})
    if announce:
        what = "is stored: nothing is started" if status.state == "Succeeded" else "continues"
        note(f"evaluation {run.name} {what}")
    return run


def _check_same(run: PreferenceRun, own: EvaluationSpec, job: TrainingJob, item: Input, rows: Sequence[Row]) -> None:
    """Raises NameTakenError if a run in the store has another manifest than this question would write."""
    manifest = run.manifest
    found = manifest.body
    seen = _seen(rows, job.manifest.body, run._run.session, announce=False)
    if (
        None in seen or found.seen_rows is None
    ):  # the job's data could be read then and cannot now, or the other way round
        seen = found.seen_rows, found.seen_prompts
    own = replace(own, seen_rows=seen[0], seen_prompts=seen[1])
    differences = same_evaluation(found, own, backends=(manifest.backend, job.manifest.backend))
    if not differences and not _has_rows(run._run.record, found.data, item.entry(_CHANNEL), rows):
        differences = "its pairs are others"
    if differences:
        raise NameTakenError(
            f"evaluation {run.name} in {run._run.record.store.root} is not what was asked for: {differences}. Its scores are not "
            f"used: delete it (`palate delete {run.name}`), and ask again"
        )


def _has_rows(record: Record, found: InputFile, own: InputFile, rows: Sequence[Row]) -> bool:
    """Returns whether the data of a run is the same file as the caller's, or a copy in its folder that has the same rows."""
    from palate_recipes.preferences.load import read_rows

    if found.sha256 is not None and found.sha256 == own.sha256:
        return True
    name = found.uri.rpartition("/")[2]
    if name in ("", ".", "..") or found.uri != record.store.uri(key := record.key("inputs", _CHANNEL, name)):
        return False  # nothing is read from a place that only the manifest names
    with tempfile.TemporaryDirectory(prefix="palate-") as folder:
        path = Path(folder) / name
        try:
            record.store.download(key, path)
            if file_facts(path)["sha256"] != found.sha256:
                return False
            kept = read_rows(path, strategy="dpo", bad_rows="skip")
        except (PalateError, OSError):
            return False
    return [_content(row) for row in kept] == [_content(row) for row in rows]


def _content(row: Row) -> tuple[object, ...]:
    return row.number, row.prompt, row.chosen, row.rejected


def _key(spec: EvaluationSpec, rows: Sequence[Row], *, trained_at: float) -> str:
    """Returns a digest of all that the scores depend on."""
    digest = hashlib.sha256()
    digest.update(encode([SCORES_FORMAT, spec.training, spec.base_revision, spec.checkpoint, spec.skipped]))
    # Jobs of early versions have no digest of their model.
    digest.update((spec.tuned_digest or f"{trained_at}").encode())
    for row in rows:
        digest.update(repr(_content(row)).encode())
    return digest.hexdigest()


def count_pairs(job: TrainingJob, data: str | Path | Rows | PreferenceData) -> int:
    """Returns the number of pairs that `preference_scores` would score, before the job's length limits; starts nothing.

    Raises:
        DataError: As `preference_scores`.
    """
    rule = job.manifest.body.hyperparameters.bad_rows
    with checked_inputs({_CHANNEL: data}, job._run.session, strategy="dpo", bad_rows=rule) as checked:
        return len(_rows(checked[_CHANNEL]))


def _rows(item: Input) -> list[Row]:
    """Returns the usable rows, with the numbers that they will have in the run."""
    from palate_recipes.preferences.load import read_rows

    found = [
        row
        for path in item.fetched.files
        for row in read_rows(path, strategy="dpo", bad_rows="skip" if item.skipped else "refuse", format=item.format)
    ]
    if len(item.fetched.files) == 1 and item.format is None:
        return found
    return [row._replace(number=number) for number, row in enumerate(found, 1)]


def _row_of(training: TrainSpec) -> Model | None:
    try:
        return find_row(training.model.name)
    except LookupError:
        return None  # the user's own name


# ── rows that the job has seen ────────────────────────────────────────────────────────────────────────────────────


def _seen(
    rows: Sequence[Row], training: TrainSpec, session: Session, *, announce: bool
) -> tuple[tuple[int, ...] | None, int | None]:
    """Returns which rows are in the training data, and how many prompts are; None if it cannot be read."""
    try:
        trained = _training_rows(training, session)
    except (PalateError, OSError) as error:
        if announce:
            note(f"note: whether the job trained on these rows is not known: {error}")
        return None, None
    prompts = {_digest(row.prompt, "") for row in trained}
    answers = {_digest(row.prompt, answer) for row in trained for answer in (row.chosen, row.rejected) if answer}
    numbers = [row.number for row in rows if _digest(row.prompt, row.chosen or "") in answers]
    return tuple(numbers), sum(_digest(row.prompt, "") in prompts for row in rows)


def _training_rows(training: TrainSpec, session: Session) -> list[Row]:
    """Reads the job's training data, if it is still what the job was given."""
    from palate_recipes.preferences.load import read_rows

    facts = training.inputs["train"]
    store, name = open_parent(facts.uri, options=session.options_for(facts.uri))
    with tempfile.TemporaryDirectory(prefix="palate-") as folder:
        path = store.local_path(name)
        if path is None:
            path = Path(folder) / name
            store.download(name, path)
        if facts.sha256 and file_facts(path)["sha256"] != facts.sha256:
            raise DataError(f"{facts.uri} is not the data that the job was given")
        return read_rows(path, strategy=training.hyperparameters.training_strategy, bad_rows="skip")


def _digest(prompt: object, answer: str) -> bytes:
    return hashlib.blake2b(repr((prompt, answer)).encode(), digest_size=16).digest()


def _leak_note(seen: Sequence[int] | None, seen_prompts: int | None, rows: int) -> str:
    """Returns a warning if rows are in the training data, else ""."""
    if seen:
        return (
            f"WARNING: {len(seen)} of {rows} rows are in the job's training data (row {seen[0]} is the first), so these "
            "figures say less about new prompts. Remove them"
        )
    if seen_prompts:
        return f"note: the prompts of {seen_prompts} of {rows} rows are in the job's training data, with other answers"
    return ""


def _share(margins: Sequence[float]) -> Mean:
    return Mean.of([float(margin > 0) for margin in margins])
