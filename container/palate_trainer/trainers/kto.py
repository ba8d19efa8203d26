"""KTO: TRL's trainer on single answers labelled good or bad. Knows TRL's hooks and token ids, no files of a run.

TRL estimates the KL divergence from prompts with answers of other rows: within a batch, each answer moves to the next prompt.
TRL builds these pairs once in file order and therefore never shuffles. Here the collator builds them per batch, so rows are
shuffled every epoch. For a given batch the numbers are TRL's.
"""

from __future__ import annotations

import random
from typing import Any

from datasets import Dataset
from trl import KTOTrainer
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

from palate_trainer.samplers import RowSampler
from palate_trainer.tokenize import TokenPair
from palate_trainer.trainers.base import PalateMixin

_IDEAL = (1.0, 4 / 3)
"""Weight of all good answers over that of all bad ones, by equation 8 of the KTO paper (arXiv 2402.01306)."""
_ROUNDING = 0.01

_LABELS = ("chosen", "rejected")


def label_rows(rows: list[TokenPair], *, shuffle_seed: int | None = None) -> Dataset:
    """Builds the data set for TRL's collator of labelled answers.

    Args:
        rows: Each with one answer.
        shuffle_seed: Shuffles rows that are read in order (evaluation). A file of pairs has both answers to a prompt next to
            each other, but the KL estimate needs answers to other prompts.
    """
    if shuffle_seed is not None:
        rows = random.Random(shuffle_seed).sample(rows, len(rows))
    return Dataset.from_list(
        [
            {
                "prompt_ids": row.prompt_ids,
                "completion_ids": row.answer_ids,
                "label": bool(row.chosen_ids),
                "length": row.length,
            }
            for row in rows
        ]
    )


class MismatchedAnswers:
    """TRL's collator, with the mismatched answer of each prompt taken from the previous row of the batch.

    Args:
        pad_token_id: For padding.
        seq_length: Maximum tokens of a prompt with another row's answer. Longer sequences are cut at the end.
    """

    def __init__(self, *, pad_token_id: int, seq_length: int) -> None:
        self._stock = DataCollatorForUnpairedPreference(pad_token_id=pad_token_id, max_length=seq_length)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = self._stock(
            [{**row, "KL_completion_ids": rows[at - 1]["completion_ids"]} for at, row in enumerate(rows)]
        )
        return batch


class PalateKTOTrainer(PalateMixin, KTOTrainer):
    """KTO on rows that already have token ids. TRL scores the reference in each step."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> RowSampler:
        # Not sorted by length: if bad answers are shorter, batches would hold answers of one kind only.
        rows = self.train_dataset if train_dataset is None else train_dataset
        self.order = RowSampler(len(rows), self.args.seed)
        return self.order

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        metrics = self._metrics["train" if self.model.training else "eval"]
        result = super()._compute_loss(model, inputs, return_outputs)
        good = int(inputs["label"].sum())
        counts = dict(zip(_LABELS, (good, len(inputs["label"]) - good), strict=True))
        # TRL omits metrics of labels that a batch lacks. `average` needs one value and one row count per batch.
        for label, count in counts.items():
            metrics[f"rows/{label}"].append(count)
            for name in [] if count else _names(label):
                metrics[name].append(0.0)
        return result

    def average(self, metrics: dict[str, list[float]], sizes: list[int]) -> None:
        """Averages the metrics of good answers over good answers, and those of bad answers over bad answers."""
        metrics.pop("rewards/margins", None)  # TRL averages only batches that have both kinds
        for label in _LABELS:
            counts = metrics.pop(f"rows/{label}", [])[: len(sizes) or None]
            for name in _names(label):
                values = metrics.pop(name, [])
                if values and sum(counts):
                    metrics[name] = [sum(v * n for v, n in zip(values, counts, strict=False)) / sum(counts)]
        if all(f"rewards/{label}" in metrics for label in _LABELS):
            metrics["rewards/margins"] = [metrics["rewards/chosen"][0] - metrics["rewards/rejected"][0]]
        super().average(metrics, sizes)


def balance_note(rows: list[TokenPair], *, desirable_weight: float, undesirable_weight: float) -> str | None:
    """Returns a note if the weights do not balance the numbers of good and bad answers, else None.

    Args:
        rows: Each with one answer.
        desirable_weight: Loss factor of a good answer.
        undesirable_weight: Loss factor of a bad answer.
    """
    good = sum(bool(row.chosen_ids) for row in rows)
    bad = len(rows) - good
    if not good or not bad:
        kind = "good" if good else "bad"
        return f"all {len(rows)} answers are {kind}, but KTO learns from the difference between good and bad answers"
    low, high = _IDEAL
    if (
        undesirable_weight
        and low - _ROUNDING <= desirable_weight * good / (undesirable_weight * bad) <= high + _ROUNDING
    ):
        return None
    up, down = undesirable_weight * bad / good, desirable_weight * good / bad
    either = [f"desirable_weight={low * up:.3g} to {high * up:.3g}"] if up else []
    either += [f"undesirable_weight={down / high:.3g} to {down / low:.3g}"] if down else []
    return (
        f"{good} good and {bad} bad answers with weights {desirable_weight:g} and {undesirable_weight:g}: the KTO paper"
        f" recommends a total weight of good answers of 1 to 1.33 times that of bad ones. Set {' or '.join(either)}"
    )


def _names(label: str) -> list[str]:
    return [f"{what}/{label}" for what in ("rewards", "logps", "logits")]
