"""Figures of pairwise verdicts: win-rates, intervals, length control, agreement, ranking. Knows numbers, no model and no judge."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

RESAMPLES = 10_000
_FEWER_RESAMPLES = 1000
"""Where each one costs a pass over all prompts."""

_TAIL = 0.025
"""Probability beyond each end of an interval of 95%."""

_QUANTILE = 1.959964
"""Of the normal distribution, at 1 - `_TAIL`."""

_BATCH = 2_000_000
"""Weights of resamples that are in memory at once."""

_RIDGE = 1e-3
"""Weight of the penalty on squared coefficients: keeps them finite where one side has won everything."""
_NEWTON_STEPS = 50


class Interval(NamedTuple):
    """A figure with its 95% interval."""

    value: float
    low: float
    high: float


def win_rate(scores: Sequence[float], *, seed: int = 0) -> Interval:
    """Returns the mean score with a bootstrap interval.

    The bootstrap resamples prompts, so it is paired: both answers to a prompt stay together. The interval is the 2.5th to the
    97.5th percentile of 10,000 resamples. Where all scores are equal, resamples do not differ; then the interval is exact
    (Clopper and Pearson 1934): n equal scores leave room for up to 1 - 0.025 ** (1 / n) other ones.

    The interval is never narrower than that of Wilson (1927) for the same share of as many prompts: with few prompts, resamples
    have no more results than the sample, so their percentiles are too close. Three wins and a tie give [0.40, 1.00], not
    [0.63, 1.00].

    Args:
        scores: 1.0 for a win, 0.5 for a tie, 0.0 for a loss, per prompt; at least one.
        seed: Of the resampling.
    """
    counts = np.array([sum(score == value for score in scores) for value in (0.0, 0.5, 1.0)])
    total = len(scores)
    value = float(counts @ (0.0, 0.5, 1.0)) / total
    if counts.max() == total:
        same = _TAIL ** (1.0 / total)
        return _not_narrower(Interval(value, value * same, value * same + 1.0 - same), total)
    # Three outcomes: their counts in a resample of the prompts are multinomial.
    drawn = np.random.default_rng(seed).multinomial(total, counts / total, size=RESAMPLES)
    low, high = np.quantile(drawn @ np.array([0.0, 0.5, 1.0]) / total, [_TAIL, 1.0 - _TAIL])
    return _not_narrower(Interval(value, float(low), float(high)), total)


def _not_narrower(found: Interval, total: int) -> Interval:
    """Extends an interval of a share of `total` prompts to that of Wilson, where it is within."""
    value, square = found.value, _QUANTILE**2
    middle = value + square / (2 * total)
    half = _QUANTILE * math.sqrt(value * (1.0 - value) / total + square / (4 * total**2))
    low, high = ((middle + side) / (1.0 + square / total) for side in (-half, half))
    return Interval(value, max(0.0, min(found.low, low)), min(1.0, max(found.high, high)))


def mean(values: Sequence[float], *, seed: int = 0) -> Interval:
    """Returns the mean of any values, one per row, with a bootstrap interval: 1,000 resamples of the rows.

    Args:
        values: At least one.
        seed: Of the resampling.
    """
    given = np.asarray(values, float)
    found = np.concatenate([weights @ given for weights in _resamples(len(given), seed)]) / len(given)
    low, high = np.quantile(found, [_TAIL, 1.0 - _TAIL])
    return Interval(float(given.mean()), float(low), float(high))


def length_controlled(scores: Sequence[float], differences: Sequence[float], *, seed: int = 0) -> Interval | None:
    """Returns the win-rate at equal lengths, with a bootstrap interval; None without a difference in lengths or in scores.

    Fits, by logistic regression over prompts i with the score y_i (ties count one half),

        P(win)_i = sigmoid(theta + phi * tanh(d_i / s)),   d_i = length of the first answer - length of the second,

    where s is the standard deviation of d, and returns sigmoid(theta): the win-rate at d = 0. This is the length control of
    AlpacaEval 2 (Dubois et al. 2024, arXiv:2404.04475, section 3) without its term for the difficulty of an instruction, which
    takes the verdicts on many models. Both coefficients have a ridge penalty of 0.001.

    Equal scores say nothing about lengths: theta would be as large as the penalty allows, in every resample, so that 20 wins of 20
    prompts would give [0.994, 0.999]. `win_rate` has the interval for them.

    Args:
        scores: As in `win_rate`.
        differences: Length of the first answer minus that of the second, per prompt.
        seed: Of the resampling: 1,000 resamples of the prompts.
    """
    won, differs = np.asarray(scores, float), np.asarray(differences, float)
    spread = float(differs.std())
    if spread == 0.0 or won.min() == won.max():
        return None
    inputs = np.stack([np.ones_like(won), np.tanh(differs / spread)], axis=1)  # (prompts, 2)
    total = len(won)
    theta = _logistic(inputs, won, np.ones((1, total)))[0, 0]
    found = np.concatenate([_logistic(inputs, won, weights)[:, 0] for weights in _resamples(total, seed)])
    low, high = np.quantile(_sigmoid(found), [_TAIL, 1.0 - _TAIL])
    return Interval(float(_sigmoid(theta)), float(low), float(high))


def cohens_kappa(first: Sequence[str], second: Sequence[str]) -> float | None:
    """Returns Cohen's kappa of two raters' labels (Cohen 1960): 1 is full agreement, 0 that of chance.

    None without labels, or if both raters gave one and the same label throughout, where it is 0 / 0.
    """
    total = len(first)
    if not total:
        return None
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / total
    labels = {*first, *second}
    expected = sum((list(first).count(label) / total) * (list(second).count(label) / total) for label in labels)
    return None if expected == 1.0 else (observed - expected) / (1.0 - expected)


def bradley_terry(names: Sequence[str], results: Mapping[tuple[str, str], Sequence[float]]) -> dict[str, float]:
    """Returns the models' strengths (Bradley and Terry 1952), as log-odds with a mean of 0.

    The maximum of the likelihood with P(a beats b) = sigmoid(strength_a - strength_b), a tie as half a win for both, and a ridge
    penalty of 0.001.

    Args:
        names: The models.
        results: Scores of the first model of each pair, as in `win_rate`.
    """
    rows = [pair for pair, scores in results.items() if scores]
    inputs = np.zeros((len(rows), len(names)))
    for row, (first, second) in enumerate(rows):
        inputs[row, names.index(first)], inputs[row, names.index(second)] = 1.0, -1.0
    shares = np.array([np.mean(results[pair]) for pair in rows])
    weights = np.array([[len(results[pair]) for pair in rows]], float)
    strengths = _logistic(inputs, shares, weights)[0]
    return {name: float(value) for name, value in zip(names, strengths - strengths.mean(), strict=True)}


def _resamples(total: int, seed: int) -> Iterator[Array]:
    """Yields how often each of `total` rows is in each resample: (resamples, rows), in batches."""
    generator = np.random.default_rng(seed)
    left = _FEWER_RESAMPLES
    while left:
        batch = min(left, max(1, _BATCH // total))
        yield generator.multinomial(total, np.full(total, 1.0 / total), size=batch).astype(float)
        left -= batch


def _sigmoid(value: Any) -> Any:
    return 0.5 * (1.0 + np.tanh(0.5 * np.asarray(value)))  # without an overflow at either end


def _logistic(inputs: Array, targets: Array, weights: Array) -> Array:
    """Fits logistic regressions by Newton's method, one per row of weights.

    Args:
        inputs: (rows, coefficients).
        targets: (rows,), 0 to 1.
        weights: (fits, rows).

    Returns:
        (fits, coefficients).
    """
    size = inputs.shape[1]
    found = np.zeros((len(weights), size))
    ridge = _RIDGE * np.eye(size)
    for _ in range(_NEWTON_STEPS):
        predicted = _sigmoid(found @ inputs.T)  # (fits, rows)
        slope = (weights * (targets - predicted)) @ inputs - _RIDGE * found
        bend = np.einsum("fr,ra,rb->fab", weights * predicted * (1.0 - predicted), inputs, inputs) + ridge
        step = np.linalg.solve(bend, slope[:, :, None])[:, :, 0]
        # A step from a flat place is too long: Newton's method would leave the range where the curve is visible.
        step *= np.minimum(1.0, 4.0 / np.maximum(np.abs(step).max(axis=1, keepdims=True), 1e-12))
        found += step
        if np.abs(step).max() < 1e-10:
            break
    return found
