"""Figures of held-out preferences, as an evaluation keeps them: from the trainer's scores, with intervals. Scores nothing itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from palate.evaluation.preferences import PreferenceScores, preference_scores
from palate.evaluation.record import Figure, HeldOut
from palate.evaluation.statistics import Interval, mean, win_rate

if TYPE_CHECKING:
    from palate.job import TrainingJob
    from palate.sources.inputs import PreferenceData, Rows


def held_out(
    job: TrainingJob, checkpoint: str | None, data: str | Path | Rows | PreferenceData, *, seed: int
) -> HeldOut:
    """Returns the figures of a job's model and its reference on held-out pairs. See `preference_scores`, also for what it raises."""
    return figures_of(preference_scores(job, data, checkpoint=checkpoint, show_logs=False), seed=seed)


def figures_of(scores: PreferenceScores, *, seed: int) -> HeldOut:
    """Returns the figures of scored pairs."""
    pairs = scores.pairs
    return HeldOut(
        name=scores.name,
        rows=len(pairs.rows),
        skipped=scores.skipped,
        dropped=len(pairs.dropped),
        truncated=len(pairs.truncated),
        seen=None if scores.seen_rows is None else len(scores.seen_rows),
        accuracy=_share(scores.margins, seed),
        base_accuracy=_share(scores.base_margins, seed),
        reward_accuracy=_share(scores.reward_margins, seed),
        margin=_figure(mean(scores.margins, seed=seed)),
        base_margin=_figure(mean(scores.base_margins, seed=seed)),
        reward_margin=_figure(mean(scores.reward_margins, seed=seed)),
        loss=scores.loss,
        base_loss=scores.base_loss,
    )


def _share(margins: list[float], seed: int) -> Figure:
    return _figure(win_rate([float(margin > 0) for margin in margins], seed=seed))


def _figure(interval: Interval) -> Figure:
    return Figure(value=interval.value, low=interval.low, high=interval.high)
