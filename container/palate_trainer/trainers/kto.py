"""KTO: TRL's trainer on single answers, good or bad. Knows TRL's hooks and token ids, no files of a run.

TRL estimates the KL divergence from prompts with the answers of other rows: in every batch each answer moves on to the next
prompt. It pairs them up once, in the order of the file, and therefore never shuffles. Here the collator pairs up what shares a
batch, so rows are shuffled every epoch; the numbers of a batch are TRL's.
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
    """The rows as TRL's collator for labelled answers takes them.

    Args:
        rows: Each with one answer.
        shuffle_seed: For rows that are taken in their order: a file of pairs has both answers to a prompt next to each other,
            and the KL divergence is to be estimated from answers to other prompts.
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
    """TRL's collator, with each prompt's mismatched answer taken from the row before it in the batch.

    Args:
        pad_token_id: For padding.
        seq_length: Most tokens of a prompt with the answer of another row; what is longer is cut at the end.
    """

    def __init__(self, *, pad_token_id: int, seq_length: int) -> None:
        self._stock = DataCollatorForUnpairedPreference(pad_token_id=pad_token_id, max_length=seq_length)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = self._stock(
            [{**row, "KL_completion_ids": rows[at - 1]["completion_ids"]} for at, row in enumerate(rows)]
        )
        return batch


class PalateKTOTrainer(PalateMixin, KTOTrainer):
    """KTO on rows that carry token ids already. The reference is scored within each step, by TRL."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> RowSampler:
        # By length, bad answers would meet bad ones wherever they are the shorter kind.
        rows = self.train_dataset if train_dataset is None else train_dataset
        self.order = RowSampler(len(rows), self.args.seed)
        return self.order

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        metrics = self._metrics["train" if self.model.training else "eval"]
        result = super()._compute_loss(model, inputs, return_outputs)
        good = int(inputs["label"].sum())
        counts = dict(zip(_LABELS, (good, len(inputs["label"]) - good), strict=True))
        # TRL leaves out what a batch has no row for. One value a batch and the rows it stands for: then they can be averaged.
        for label, count in counts.items():
            metrics[f"rows/{label}"].append(count)
            for name in [] if count else _names(label):
                metrics[name].append(0.0)
        return result

    def average(self, metrics: dict[str, list[float]], sizes: list[int]) -> None:
        """Makes what concerns good answers a mean over those, and what concerns bad ones a mean over those."""
        metrics.pop("rewards/margins", None)  # TRL's is one over the batches that have both
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
    """What to say of weights that do not make up for unequal numbers of good and bad answers; None when they do.

    Args:
        rows: Each with one answer.
        desirable_weight: Factor of the loss of a good answer.
        undesirable_weight: The same for a bad one.
    """
    good = sum(bool(row.chosen_ids) for row in rows)
    bad = len(rows) - good
    if not good or not bad:
        kind = "good" if good else "bad"
        return f"all {len(rows)} answers are {kind}: KTO learns from what sets good and bad ones apart"
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
        f"{good} good and {bad} bad answers with weights {desirable_weight:g} and {undesirable_weight:g}: the KTO paper wants"
        f" the good ones to weigh 1 to 1.33 times the bad ones. That is {' or '.join(either)}"
    )


def _names(label: str) -> list[str]:
    return [f"{what}/{label}" for what in ("rewards", "logps", "logits")]
