"""An evaluation as users hold it: figures, rows, tables. Knows its record, asks nobody."""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import Any

from palate.evaluation.record import (
    BASE,
    Agreement,
    Comparison,
    Contestant,
    EvaluationRecord,
    Figure,
    HeldOut,
    read_rows,
)
from palate.runs.record import Record
from palate_recipes.text import html_block, html_table, visible_line

COLUMNS = (
    "model",
    "against",
    "win-rate",
    "95%",
    "at equal length",
    "wins",
    "ties",
    "losses",
    "flips",
    "unreadable",
    "prompts",
)

MOST_FLIPS = 0.5
"""Share of the judged prompts. Above it, the judge follows the order of the answers more often than the answers."""


class Evaluation:
    """Figures of a job's model, compared with its base and other models. Made by `TrainingJob.evaluate`, kept in the store.

    Attributes:
        job: Id of the evaluated job.
        record: Everything that is kept, as a struct with plain fields.
    """

    def __init__(self, job: str, record: EvaluationRecord, folder: Record) -> None:
        self.job = job
        self.record = record
        self._folder = folder

    @property
    def key(self) -> str:
        """Its name in the job's folder: `evaluations/<key>.json`."""
        return self.record.key

    @property
    def models(self) -> tuple[Contestant, ...]:
        """The models with facts of their answers."""
        return self.record.models

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        """The figures of every two models."""
        return self.record.comparisons

    @property
    def win_rate(self) -> Figure | None:
        """The evaluated model's win-rate against its base, with the 95% interval; None if answers were not judged."""
        found = self.against(BASE)
        return None if found is None else found.win_rate

    @property
    def strengths(self) -> dict[str, float]:
        """Bradley–Terry strengths by model, strongest first, as log-odds; empty for two models."""
        return dict(sorted(self.record.strengths.items(), key=lambda item: -item[1]))

    @property
    def agreement(self) -> Agreement | None:
        """The judge's agreement with people's labels, if there were any."""
        return self.record.agreement

    @property
    def preferences(self) -> dict[str, HeldOut]:
        """Figures of held-out preferences by model; empty without `data`."""
        return self.record.preferences

    @property
    def name(self) -> str:
        """Name of the evaluated model: the job's id, with a checkpoint `JOB@CHECKPOINT`."""
        own = next((one.name for one in self.models if one.job == self.job), None)
        return own or self.job

    @property
    def warnings(self) -> list[str]:
        """What speaks against the figures: verdicts that could not be read, a judge that follows the order of the answers."""
        return [f"WARNING: {text}" for one in self.comparisons for text in doubts(one, self.record.judge)]

    def against(self, other: str, *, model: str | None = None) -> Comparison | None:
        """Returns the comparison with another model, seen from the evaluated one or from `model`; None if there is none."""
        name = model or self.name
        for one in self.comparisons:
            if {one.first, one.second} == {name, other} and name != other:
                return one.seen_from(name)
        return None

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yields each prompt with two models' answers and the judge's verdicts.

        `prompt`, `model_a`, `model_b`, `answer_a`, `answer_b`; `verdicts` as the judge gave them, the second with the answers
        swapped; `result`: A, B, tie, flip (it changed when swapped) or same (identical answers). An empty `label` is for a
        person's verdict, see `labels` of `TrainingJob.evaluate`.
        """
        return read_rows(self._folder, self.key)

    def to_rows(self) -> list[dict[str, Any]]:
        """Returns the decided comparisons as preference data: `prompt`, `chosen`, `rejected`, `chosen_model`, `rejected_model`."""
        found = []
        for row in self.rows():
            if row["result"] in ("A", "B"):
                won, lost = ("a", "b") if row["result"] == "A" else ("b", "a")
                found.append(
                    {
                        "prompt": row["prompt"],
                        "chosen": row[f"answer_{won}"],
                        "rejected": row[f"answer_{lost}"],
                        "chosen_model": row[f"model_{won}"],
                        "rejected_model": row[f"model_{lost}"],
                    }
                )
        return found

    def table(self) -> list[tuple[str, ...]]:
        """Returns the comparisons as cells, in the order of `COLUMNS`."""
        return [comparison_cells(one) for one in self.comparisons]

    def figures(self) -> list[tuple[str, str, str, str, str, str]]:
        """Returns every figure as cells: model, against, figure, value, number of prompts or pairs, judge."""
        found = [
            (one.first, one.second, "win-rate", str(one.win_rate), str(one.prompts), self.record.judge)
            for one in self.comparisons
        ]
        for model, scored in self.preferences.items():
            for name, value in (("accuracy", scored.accuracy), ("reward accuracy", scored.reward_accuracy)):
                found.append((model, "", f"held-out {name}", str(value), str(scored.rows), ""))
        for model, tasks in (self.record.tasks or {}).items():
            for task, metrics in tasks.items():
                found += [(model, "", f"{task} {name}", f"{value:.4g}", "", "") for name, value in metrics.items()]
        return found

    def __str__(self) -> str:
        lines = [describe(one) for one in self.comparisons]
        if self.strengths:
            lines.append("ranking: " + ", ".join(f"{name} {value:+.2f}" for name, value in self.strengths.items()))
        if self.agreement is not None:
            lines.append(describe_agreement(self.agreement))
        lines += [f"{name}: {describe_held_out(one)}" for name, one in self.preferences.items()]
        lines += self.warnings
        # Models' names come from a store.
        return "\n".join(map(visible_line, lines)) or visible_line(f"evaluation {self.key} of job {self.job}")

    def __repr__(self) -> str:
        return f"Evaluation(job={self.job!r}, key={self.key!r}, win_rate={str(self.win_rate) if self.win_rate else None!r})"

    def _repr_html_(self) -> str:
        return html_block(
            html_table([COLUMNS, *self.table()]), *(f"<p>{html.escape(text)}</p>" for text in self.warnings)
        )


def comparison_cells(one: Comparison) -> tuple[str, ...]:
    """Returns a comparison as cells, in the order of `COLUMNS`."""
    rate, controlled = one.win_rate, one.length_controlled
    return (
        one.first,
        one.second,
        f"{rate.value:.1%}",
        f"{rate.low:.1%} to {rate.high:.1%}",
        f"{controlled.value:.1%}" if controlled else "",
        *map(str, (one.wins, one.ties, one.losses, one.flips, one.unreadable, one.prompts)),
    )


def describe(one: Comparison) -> str:
    """Returns a comparison as one line."""
    controlled = f", at equal length {one.length_controlled}" if one.length_controlled else ""
    return (
        f"{one.first} against {one.second}: win-rate {one.win_rate}{controlled}; {one.wins} wins, {one.ties} ties, {one.losses} losses "
        f"on {one.prompts} prompts; flip rate {one.flip_rate:.0%}"
    )


def doubts(one: Comparison, judge: str) -> list[str]:
    """Returns what speaks against a comparison, as sentences."""
    found = []
    pair = f"{one.first} against {one.second}"
    if one.unreadable:
        found.append(
            f"{pair}: {one.unreadable} of {2 * (one.prompts - one.same)} verdicts could not be read, which count as ties"
        )
    if one.flip_rate > MOST_FLIPS:
        found.append(
            f"{pair}: judge {judge} is not usable: its verdicts in the two orders differ on {one.flip_rate:.0%} of the "
            "judged prompts, which count as ties. Use another judge or rubric"
        )
    return found


def describe_agreement(one: Agreement) -> str:
    """Returns the judge's agreement with people as one line."""
    kappa = "undefined, because all labels are the same" if one.kappa is None else f"{one.kappa:.2f}"
    return f"judge and people: {one.agreed} of {one.rows} labels agree, Cohen's kappa {kappa}"


def describe_held_out(one: HeldOut) -> str:
    """Returns the figures of held-out preferences as one line."""
    seen = f"; WARNING: {one.seen} are in the training data" if one.seen else ""
    return (
        f"accuracy {one.accuracy} (base {one.base_accuracy}), reward accuracy {one.reward_accuracy}, reward margin "
        f"{_signed(one.reward_margin)} on {one.rows} held-out pairs{seen}"
    )


def held_out_rows(result: Evaluation) -> list[tuple[str, str, str, str]]:
    """Returns the figures of held-out preferences as cells: model, figure, the tuned model's value, the base's."""
    found = []
    for name, one in result.preferences.items():
        found += [
            (name, f"accuracy on {one.rows} pairs", str(one.accuracy), str(one.base_accuracy)),
            (name, "margin in nats", _signed(one.margin), _signed(one.base_margin)),
            (name, "reward accuracy", str(one.reward_accuracy), ""),
            (name, "reward margin", _signed(one.reward_margin), ""),
        ]
        if one.loss is not None and one.base_loss is not None:
            found.append((name, "loss", f"{one.loss:.4g}", f"{one.base_loss:.4g}"))
        if one.seen:
            found.append((name, "rows that the training had", str(one.seen), ""))
    return found


def _signed(figure: Figure) -> str:
    return f"{figure.value:+.3f} [{figure.low:+.3f}, {figure.high:+.3f}]"
