"""Evaluations in a job's folder: their types, how they are written, listed and read. Knows a store, no service and no judge.

    jobs/<id>/evaluations/<key>.json         settings and figures
    jobs/<id>/evaluations/<key>.rows.jsonl   prompts, answers and verdicts; written first, so that the figures have them

The record is in the folder of every job that took part.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from msgspec import Struct

from palate.runs.record import Record
from palate_recipes.errors import DamagedFilesError, DataError, PalateError, RunNotFoundError
from palate_recipes.specs.codec import Int, Natural, decode, encode
from palate_recipes.specs.weights import BaseModel

if TYPE_CHECKING:
    from palate.evaluation.statistics import Interval

EVALUATION_SCHEMA = 1
BASE = "base"
"""Name of the untuned model in an evaluation, as in a service."""

LARGEST_BYTES = 16 * 1024**2
"""A larger file is not read: an evaluation of 100 models has about 2 MB of figures."""

_FOLDER = "evaluations"
_ROWS = ".rows.jsonl"


class Contestant(Struct, frozen=True, kw_only=True):
    """A model that took part.

    Attributes:
        name: `base`, a job's id, or `JOB@CHECKPOINT`.
        job: Id of the job; "" for the base.
        checkpoint: Name of the job's checkpoint, or "".
        digest: SHA-256 of the model's digests.json or of the checkpoint's marker; "" for the base.
        answers: Prompts that it has answered.
        cut: Answers that were cut at the token limit. They were compared as they are.
        empty: Answers without text.
        failed: Prompts without an answer, because the call failed.
        mean_length: Mean length of its answers in characters.
    """

    name: str
    job: str = ""
    checkpoint: str = ""
    digest: str = ""
    answers: Natural = 0
    cut: Natural = 0
    empty: Natural = 0
    failed: Natural = 0
    mean_length: float = 0.0


class Figure(Struct, frozen=True, kw_only=True):
    """A figure with its 95% interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, interval: Interval) -> Figure:
        return cls(value=interval.value, low=interval.low, high=interval.high)

    @property
    def reversed(self) -> Figure:
        """The same figure of the other side."""
        return Figure(value=1.0 - self.value, low=1.0 - self.high, high=1.0 - self.low)

    def __str__(self) -> str:
        return f"{self.value:.1%} [{self.low:.1%}, {self.high:.1%}]"


class Comparison(Struct, frozen=True, kw_only=True):
    """Two models, compared on the same prompts: `wins + losses + ties == prompts`.

    Attributes:
        first: Name of the model whose win-rate it is.
        second: Name of the other model.
        prompts: Prompts that were compared.
        wins: Prompts on which both verdicts preferred the first model's answer.
        losses: Likewise for the second model.
        ties: All others: flips, identical answers, unreadable and tied verdicts.
        flips: Ties whose verdict changed when the answers were swapped.
        same: Ties of identical answers, which the judge was not asked about.
        unreadable: Verdicts that could not be parsed, even on the second try.
        failed: Prompts that were left out, because a call failed.
        win_rate: Wins and half of the ties, as a share of the prompts.
        length_controlled: The win-rate at equal lengths; None if all lengths or all results are equal.
    """

    first: str
    second: str
    prompts: Natural
    wins: Natural
    losses: Natural
    ties: Natural
    flips: Natural
    same: Natural
    unreadable: Natural
    failed: Natural
    win_rate: Figure
    length_controlled: Figure | None = None

    @property
    def flip_rate(self) -> float:
        """Flips as a share of the prompts that the judge was asked about."""
        judged = self.prompts - self.same
        return self.flips / judged if judged else 0.0

    def seen_from(self, name: str) -> Comparison:
        """Returns the comparison with this model as the first one."""
        if name == self.first:
            return self
        return msgspec.structs.replace(
            self,
            first=self.second,
            second=self.first,
            wins=self.losses,
            losses=self.wins,
            win_rate=self.win_rate.reversed,
            length_controlled=self.length_controlled.reversed if self.length_controlled else None,
        )


class Agreement(Struct, frozen=True, kw_only=True):
    """Agreement of the judge with people's labels.

    Attributes:
        rows: Labelled rows that were judged.
        agreed: Rows on which the judge gave the label.
        kappa: Cohen's kappa; None if both gave one and the same label throughout.
    """

    rows: Natural
    agreed: Natural
    kappa: float | None


class HeldOut(Struct, frozen=True, kw_only=True):
    """A model and its reference on held-out pairs, scored by the trainer's code. Log-probabilities are in nats.

    Attributes:
        name: Name of the stored scores, with all rows.
        rows: Pairs that were scored.
        skipped: Invalid rows and ties that were left out.
        dropped: Pairs that the job's settings leave out because of their length.
        truncated: Pairs that were cut at the job's `seq_length`.
        seen: Rows that are in the job's training data; None if that cannot be read.
        accuracy: Share of pairs whose chosen answer is more likely than the rejected one.
        base_accuracy: The same by the reference.
        reward_accuracy: Share of pairs whose chosen answer gained more than the rejected one.
        margin: Mean log-probability of chosen minus rejected.
        base_margin: The same by the reference.
        reward_margin: Mean difference of the implicit rewards.
        loss: The job's loss; None for SFT and KTO.
        base_loss: The same of the untrained model.
    """

    name: str
    rows: Natural
    skipped: Natural
    dropped: Natural
    truncated: Natural
    seen: Natural | None
    accuracy: Figure
    base_accuracy: Figure
    reward_accuracy: Figure
    margin: Figure
    base_margin: Figure
    reward_margin: Figure
    loss: float | None = None
    base_loss: float | None = None


class Spent(Struct, frozen=True, kw_only=True):
    """Calls and tokens of a model in one role, earlier runs included; `cost` in the currency of the prices."""

    model: str
    role: Literal["answers", "verdicts"]
    calls: Natural
    prompt_tokens: Natural
    completion_tokens: Natural
    cost: float | None = None


class EvaluationRecord(Struct, frozen=True, kw_only=True):
    """An evaluation's settings and figures.

    Attributes:
        key: Digest of everything that its answers and verdicts depend on.
        created_at: Seconds since the epoch, by the client's clock. Decides nothing: see `newest_first`.
        base: The base model of all models.
        models: The models, the evaluated job first.
        comparisons: Every two of them.
        strengths: Bradley–Terry strengths by model, as log-odds with a mean of 0; empty for two models.
        agreement: Agreement with people's labels; None without labels.
        preferences: Figures of held-out preferences by model; empty without data.
        tasks: Results of lm-eval by model and task; None if it was not asked for.
        judge: Model name of the judge.
        judge_url: Its base URL.
        rubric: Criteria that it was given.
        prompts_sha256: Digest of the prompts.
        settings: Further settings of the answers and verdicts; `service` has those of the service that answered.
        spent: Calls, tokens and cost.
        versions: Versions of Palate and Python.
    """

    key: str
    created_at: float
    base: BaseModel
    models: tuple[Contestant, ...]
    comparisons: tuple[Comparison, ...] = ()
    strengths: dict[str, float] = {}
    agreement: Agreement | None = None
    preferences: dict[str, HeldOut] = {}
    tasks: dict[str, dict[str, dict[str, float]]] | None = None
    judge: str = ""
    judge_url: str = ""
    rubric: str = ""
    prompts_sha256: str = ""
    settings: dict[str, Any] = {}
    spent: tuple[Spent, ...] = ()
    versions: dict[str, str] = {}
    schema: Int = EVALUATION_SCHEMA


def write(record: Record, evaluation: EvaluationRecord, rows: Iterable[dict[str, Any]]) -> None:
    """Writes an evaluation into a job's folder.

    Raises:
        RunNotFoundError: The job was deleted meanwhile.
        DataError: A figure is not finite. Nothing was written.
    """
    data = encode(evaluation)
    try:
        decode(data, EvaluationRecord)  # NaN is written as null, which no reader accepts
    except ValueError as error:
        raise DataError(f"the evaluation of job {record.name} cannot be written: {error}") from None
    if not record.exists():
        raise RunNotFoundError(f"job {record.name} was deleted during its evaluation: {record.uri} is gone")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    record.store.put(record.key(_FOLDER, f"{evaluation.key}{_ROWS}"), text.encode())
    record.store.put(record.key(_FOLDER, f"{evaluation.key}.json"), data)


def newest_first(record: Record) -> list[tuple[str, EvaluationRecord | PalateError]]:
    """Returns a job's evaluations with their keys in the store, newest first; instead of one that cannot be read, the error.

    The order is that of the store's clock. `created_at` is by clients' clocks, and one that is fast would make its evaluation the
    newest for as long; it only decides between evaluations of the same second.
    """
    found: list[tuple[tuple[float, float], str, EvaluationRecord | PalateError]] = []
    for info in record.store.list(record.key(_FOLDER)):
        if not info.key.endswith(".json"):
            continue
        try:
            evaluation = _read(record, info.key)
        except FileNotFoundError:  # the job is being deleted
            continue
        except PalateError as error:
            found.append(((info.modified_s, 0.0), info.key, error))
        else:
            found.append(((info.modified_s, evaluation.created_at), info.key, evaluation))
    found.sort(key=lambda one: one[0], reverse=True)
    return [(key, evaluation) for _, key, evaluation in found]


def _read(record: Record, key: str) -> EvaluationRecord:
    try:
        return decode(record.store.get_range(key, 0, LARGEST_BYTES), EvaluationRecord)
    except ValueError as error:
        raise DamagedFilesError(
            f"{record.store.uri(key)} is damaged ({error}): restore it, or delete the file and evaluate again"
        ) from None


def read_rows(record: Record, key: str) -> Iterator[dict[str, Any]]:
    """Yields the rows of an evaluation. Raises DamagedFilesError if they are missing or damaged."""
    name = record.key(_FOLDER, f"{key}{_ROWS}")
    try:
        for line in record.store.get(name).splitlines():
            yield json.loads(line)
    except (FileNotFoundError, ValueError) as error:
        raise DamagedFilesError(
            f"{record.store.uri(name)} is missing or damaged ({error}): restore it, or evaluate again"
        ) from None
