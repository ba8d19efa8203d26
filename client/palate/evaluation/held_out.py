"""Figures of held-out preferences, as an evaluation keeps them: from the trainer's scores, with intervals. Scores nothing itself."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from palate.evaluation.preferences import PreferenceScores, preference_scores
from palate.evaluation.record import Figure, HeldOut
from palate.evaluation.statistics import mean, win_rate
from palate.ui import note
from palate_recipes.errors import DataError

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
    measured = list(zip(scores.margins, scores.base_margins, scores.reward_margins, strict=True))
    # A model that diverged gives NaN, which would be a loss in every share and make every mean NaN.
    finite = [row for row in measured if all(map(math.isfinite, row))]
    if not finite:
        raise DataError(
            f"the model of {scores.name} gives no held-out pair a finite log-probability: the training diverged"
        )
    if len(finite) < len(measured):
        note(
            f"{len(measured) - len(finite)} held-out pairs are left out: their log-probabilities are not finite numbers"
        )
    margins, base_margins, reward_margins = (list(values) for values in zip(*finite, strict=True))
    return HeldOut(
        name=scores.name,
        rows=len(finite),
        skipped=scores.skipped,
        dropped=len(pairs.dropped),
        truncated=len(pairs.truncated),
        seen=None if scores.seen_rows is None else len(scores.seen_rows),
        accuracy=_share(margins, seed),
        base_accuracy=_share(base_margins, seed),
        reward_accuracy=_share(reward_margins, seed),
        margin=Figure.of(mean(margins, seed=seed)),
        base_margin=Figure.of(mean(base_margins, seed=seed)),
        reward_margin=Figure.of(mean(reward_margins, seed=seed)),
        loss=_finite(scores.loss),
        base_loss=_finite(scores.base_loss),
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _share(margins: list[float], seed: int) -> Figure:
    return Figure.of(win_rate([float(margin > 0) for margin in margins], seed=seed))
