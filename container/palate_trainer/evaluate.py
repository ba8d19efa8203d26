"""Scores held-out pairs with a trained model and its reference, by the trainer's own code. Knows files, never stores or clients.

A DPO trainer scores its reference on every row before the first step. So the base is scored as the reference of the job's own
training, and the tuned model as the reference of a training that would continue from it: same tokens, fast path, precision and
cache as in a training, and no second implementation. The losses are TRL's formulas on these log-probabilities.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from palate_recipes.errors import NotFiniteError
from palate_recipes.preferences.load import describe_skipped, read_rows
from palate_recipes.preferences.row import Row
from palate_recipes.specs.evaluation import SCORES_FILE, AnswerLogProbs, EvaluateTask, PairScores
from palate_recipes.specs.reference_table import LogProbs
from palate_recipes.specs.train import ERROR_FILE, EXIT_FAILED, EXIT_STOPPED, TrainTask
from palate_recipes.training_memory import compares_rows
from palate_trainer.env import keep_one_gpu, lean_imports, prepare_environment, use_available_cores
from palate_trainer.failures import explain
from palate_trainer.train import free_memory, may_be_of_the_fast_path, write_error


def run(task: EvaluateTask, *, own_process: bool = False) -> int:
    """Scores the pairs and returns the exit code.

    Args:
        task: The evaluation.
        own_process: This process does nothing else, so imports may skip libraries that the run does not need.

    Returns:
        0 if scores.json is written; EXIT_FAILED with error.txt written.
    """
    output = Path(task.output_dir)
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / ERROR_FILE).unlink(missing_ok=True)
        _evaluate(task, output, lean_imports(task.base()) if own_process else nullcontext())
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        message = explain(error)
        print(message, file=sys.stderr, flush=True)
        write_error(output, message)
        return EXIT_FAILED
    return 0


def _evaluate(task: EvaluateTask, output: Path, importing: AbstractContextManager[None]) -> None:
    began = time.monotonic()
    hyperparameters = task.training.hyperparameters
    # The data first, as in a training: bad input fails before anything is imported or loaded.
    skipped: dict[int, str] = {}
    data: list[Row] = read_rows(
        task.data_file, strategy="dpo", bad_rows=hyperparameters.bad_rows, on_skip=skipped.__setitem__
    )
    prepare_environment()
    keep_one_gpu()
    with importing:
        from transformers import set_seed

        from palate_trainer.callbacks import log
        from palate_trainer.model import check_model_dir
        from palate_trainer.tokenize import encode_pairs, load_renderer
    base, tuned = task.base(), task.tuned()
    check_model_dir(base)
    check_model_dir(tuned)
    set_seed(hyperparameters.seed)
    use_available_cores()
    renderer, notes = load_renderer(task.model_dir, hyperparameters)
    rows, report = encode_pairs(data, renderer, name="the held-out data")
    notes += [describe_skipped(skipped)] if skipped else []
    notes += report.notes("held-out", renderer.seq_length)
    for note in notes:
        log(f"note: {note}")

    before = _Scored(base, rows, renderer.tokenizer, "base", notes).without_trainer()
    free_memory()
    after = _Scored(tuned, rows, renderer.tokenizer, "tuned model", notes)
    losses, loss, base_loss = None, None, None
    if hyperparameters.training_strategy == "dpo":
        losses, loss = after.losses(after.logps, before.logps, notes)
        _, base_loss = after.losses(before.logps, before.logps, [])
    scores = PairScores(
        rows=[row.row for row in rows],
        # The first token of a sequence is not scored, so an answer to an empty prompt loses one.
        chosen_tokens=[len(row.chosen_ids) - (not row.prompt_ids) for row in rows],
        rejected_tokens=[len(row.rejected_ids) - (not row.prompt_ids) for row in rows],
        tuned=_columns(after.logps),
        base=_columns(before.logps),
        losses=losses,
        loss=loss,
        base_loss=base_loss,
        file_rows=len(data),
        truncated=report.cut,
        dropped=report.dropped,
        cached=before.cached + after.cached,
        packed=after.packed,
        notes=notes,
        seconds=round(time.monotonic() - began, 1),
    )
    draft = output / f".{SCORES_FILE}"
    draft.write_bytes(scores.encode())
    draft.replace(output / SCORES_FILE)  # last: its presence means complete
    log(f"{len(rows)} pairs scored, {scores.seconds} s in all")


class _Scored:
    """One model's log-probabilities of all rows, as a DPO trainer computes those of its reference.

    Args:
        task: A training whose reference is the model.
        rows: Tokenized pairs.
        tokenizer: Of the base model.
        label: Name of the model in messages.
        notes: Receives a warning if the fast path failed.

    Attributes:
        logps: Chosen and rejected, by row.
        cached: Number of rows that were in the cache.
        packed: Whether pairs shared one packed row.
        trainer: The trainer, which computes losses.

    Raises:
        NotFiniteError: A log-probability is infinite or NaN.
    """

    def __init__(self, task: TrainTask, rows: list[Any], tokenizer: Any, label: str, notes: list[str]) -> None:
        warning = ""
        try:
            self._score(task, rows, tokenizer, label)
        except Exception as error:
            if not (task.files.fast and may_be_of_the_fast_path(error)):
                raise
            traceback.print_exc(file=sys.stderr)
            warning = (
                f"WARNING: the fast path failed for the {label}, which is scored again without it: same scores, more time."
                f" {explain(error)}"
            )
        if warning:  # outside the except block, because its exception keeps the model in memory
            print(warning, flush=True)
            notes.append(warning)
            free_memory()
            self._score(task.changed(fast=False), rows, tokenizer, label)

    def _score(self, task: TrainTask, rows: list[Any], tokenizer: Any, label: str) -> None:
        from palate_trainer.callbacks import log
        from palate_trainer.fast.forward import completion_tokens_only
        from palate_trainer.model import load_model
        from palate_trainer.reference_scores import ReferenceScores
        from palate_trainer.trainers import build_trainer

        log(f"loading the {label} in {task.spec.precision}")
        scores = ReferenceScores(task, log, label=label)
        with completion_tokens_only():
            self.trainer = build_trainer(
                task,
                model=load_model(task),
                tokenizer=tokenizer,
                train=rows,
                validation=[],
                callbacks=[],
                reference=scores,
                note=log,
            )
        scored = self.trainer.train_dataset
        self.logps: list[LogProbs] = list(zip(scored["ref_chosen_logps"], scored["ref_rejected_logps"], strict=True))
        self.cached = scores.cached_rows
        self.packed = self.trainer.trial is not None and self.trainer.trial.reason is None
        for row, values in zip(rows, self.logps, strict=True):
            if not all(map(math.isfinite, values)):
                raise NotFiniteError(
                    f"Row {row.row}: the {label} gives its answers the log-probabilities {values[0]} and {values[1]}. If the"
                    " training ran in float16, train in bfloat16 or float32."
                )

    def without_trainer(self) -> _Scored:
        """Lets go of the trainer and its model."""
        del self.trainer
        return self

    def losses(
        self, policy: list[LogProbs], reference: list[LogProbs], notes: list[str]
    ) -> tuple[list[float] | None, float | None]:
        """Computes the trainer's DPO loss of each row from its log-probabilities.

        Args:
            policy, reference: Log-probabilities, by row.
            notes: Receives why there is no loss.

        Returns:
            Losses by row, None if the loss compares the rows of a batch; and their mean, None if it needs more than these sums.
        """
        trainer: Any = self.trainer
        if trainer.ld_alpha is not None and "sft" in trainer.loss_types:
            notes.append("no loss: a mix of sft with ld_alpha needs the log-probability of every token")
            return None, None
        trainer.model.eval()
        trainer.aux_loss_enabled = False  # the balance of experts in a batch says nothing about a pair
        together = compares_rows(trainer.loss_types)
        size = trainer.args.per_device_eval_batch_size if together else 1
        pairs = trainer.train_dataset.remove_columns(["ref_chosen_logps", "ref_rejected_logps"])
        total: list[tuple[float, int]] = []
        for start in range(0, len(pairs), size):
            numbers = range(start, min(start + size, len(pairs)))
            rows = [
                {**pairs[n], "ref_chosen_logps": reference[n][0], "ref_rejected_logps": reference[n][1]}
                for n in numbers
            ]
            batch = trainer._prepare_inputs(trainer.data_collator.stock(rows))
            loss = trainer.compute_loss(_Known([policy[n] for n in numbers], batch["completion_mask"]), batch)
            trainer._metrics["eval"].clear()
            total.append((float(loss), len(rows)))
        return (
            None if together else [loss for loss, _ in total],
            sum(loss * count for loss, count in total) / len(pairs),
        )


class _Known:
    """Stands in for the model in TRL's loss, with log-probabilities that are known already.

    Args:
        logps: Of the answers of each row.
        completion_mask: Scored tokens of the batch, all chosen answers first.  # (2 rows, tokens)
    """

    def __init__(self, logps: Sequence[LogProbs], completion_mask: Any) -> None:
        import torch

        scored = completion_mask[:, 1:]  # (2 rows, tokens - 1)
        sums = torch.tensor([c for c, _ in logps] + [r for _, r in logps], device=scored.device)  # (2 rows,)
        # TRL sums over an answer's tokens, so the whole sum may be at its first one, to which ld_alpha gives full weight.
        self.log_probs = torch.zeros(scored.shape, device=scored.device)
        self.log_probs.scatter_(1, scored.argmax(1, keepdim=True), sums[:, None])
        self.entropy = self.mean_logits = torch.zeros_like(self.log_probs)
        self.is_top1 = torch.zeros_like(self.log_probs, dtype=torch.bool)

    def __call__(self, **inputs: Any) -> _Known:
        return self


def _columns(logps: list[LogProbs]) -> AnswerLogProbs:
    return AnswerLogProbs(chosen=[chosen for chosen, _ in logps], rejected=[rejected for _, rejected in logps])


def main(argv: list[str] | None = None) -> int:
    """Reads the task file and returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m palate_trainer.evaluate", description="Scores held-out pairs.")
    parser.add_argument("task", type=Path, help="an EvaluateTask as JSON")
    path = parser.parse_args(argv).task
    # SystemExit passes through the scoring, which saves the rows that it has scored so far.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(EXIT_STOPPED))
    try:
        task = EvaluateTask.read(path)
    except (OSError, ValueError) as error:
        print(f"{path} is not a valid evaluation: {error}", file=sys.stderr)
        return EXIT_FAILED
    return run(task, own_process=True)


if __name__ == "__main__":
    sys.exit(main())
