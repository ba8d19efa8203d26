"""Scores of held-out preference pairs: what a run of it is given and what it writes, as types without ML imports.

`python -m palate_trainer.evaluate` takes one file, an `EvaluateTask`. Its output folder:

    scores     <output_dir>/scores.json    a `PairScores`; written last, so it exists only if it is complete
    failure    <output_dir>/error.txt      the reason in words, only if the exit code is not 0
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from msgspec import Meta, Struct
from msgspec.structs import replace

from palate_recipes.specs.codec import Natural, Sha256, decode, encode
from palate_recipes.specs.train import InputFile, LocalFiles, TrainSpec, TrainTask
from palate_recipes.specs.weights import BaseModel

SCORES_FILE = "scores.json"

SCORES_FORMAT = 1
"""Incremented when the meaning of a number changes. It is part of an evaluation's name, so older ones are not found."""


class EvaluationSpec(Struct, frozen=True, kw_only=True):
    """One evaluation: a trained model, its reference, and held-out pairs. The client builds it; the manifest has it as `body`.

    Attributes:
        job: URI of the job.
        training: The job's training, as its manifest has it. Tokens, precision and loss options are taken from it.
        base_revision: Revision of the base's weights that the job trained; "" if it is not known.
        tuned_uri: The trained adapter or full weights.
        tuned_digest: SHA-256 of the model's digests.json, or of a checkpoint's marker.
        checkpoint: Name of the checkpoint that `tuned_uri` is; "" for the model of a finished job.
        data: The held-out pairs.
        skipped: Number of rows that are left out: invalid ones (`bad_rows="skip"`) and ties.
        seen_rows: Numbers of the rows whose prompt and chosen answer are in the job's training data; None if that cannot be read.
        seen_prompts: Number of rows whose prompt is in it, with this or other answers; None as for `seen_rows`.
    """

    job: str
    training: TrainSpec
    base_revision: str = ""
    tuned_uri: str
    tuned_digest: Sha256 | None = None
    checkpoint: str = ""
    data: InputFile
    skipped: Natural = 0
    seen_rows: tuple[Natural, ...] | None = None
    seen_prompts: Natural | None = None

    @property
    def model(self) -> BaseModel:
        """The base model, as of every run."""
        return self.training.model

    @property
    def placement(self) -> dict[str, object]:
        """Where it runs: where the training ran."""
        return self.training.placement


class EvaluateTask(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An evaluation's files on the machine that runs it: the input of the program.

    Attributes:
        training: The job's training.
        model_dir: Folder of the base model.
        tuned_dir: Folder of the trained adapter, or of the full weights.
        data_file: Held-out pairs, in any format that `palate_recipes.preferences` reads.
        output_dir: Folder for all output; created if missing.
        adapter_dir: Folder of the adapter that the job began with: the reference. None: the base is the reference.
        cache_dir: Folder of tables of log-probabilities (see `palate_recipes.specs.reference_table`), or None.
        fast: False computes as TRL does, without packed trees: same scores, more time.
    """

    training: TrainSpec
    model_dir: str
    tuned_dir: str
    data_file: str
    output_dir: str
    adapter_dir: str | None = None
    cache_dir: str | None = None
    fast: bool = True

    def write(self, path: Path) -> None:
        """Writes the task as JSON."""
        path.write_bytes(encode(self) + b"\n")

    @classmethod
    def read(cls, path: Path) -> EvaluateTask:
        """Reads a task. Raises ValueError for invalid JSON and for unknown, missing or invalid fields."""
        return decode(path.read_bytes(), cls)

    def base(self) -> TrainTask:
        """Returns the DPO training whose reference is the job's reference. Its trainer scores the rows before its first step."""
        return self._training(model_dir=self.model_dir, adapter_dir=self.adapter_dir)

    def tuned(self) -> TrainTask:
        """Returns the DPO training that would continue from the trained model, so that its reference is that model."""
        if self.training.trains_adapter:
            return self._training(model_dir=self.model_dir, adapter_dir=self.tuned_dir)
        return self._training(model_dir=self.tuned_dir, adapter_dir=None)

    def _training(self, *, model_dir: str, adapter_dir: str | None) -> TrainTask:
        values = replace(
            self.training.hyperparameters,
            training_strategy="dpo",
            max_steps=0,  # the trainer scores all rows in advance only if the steps reach them
            lora_dropout=0.0,
            gradient_checkpointing=False,
            fsdp="off",
        )
        files = LocalFiles(
            model_dir=model_dir,
            adapter_dir=adapter_dir,
            train_file=self.data_file,
            output_dir=self.output_dir,
            cache_dir=self.cache_dir,
            fast=self.fast,
            processes=1,
        )
        return TrainTask(spec=replace(self.training, hyperparameters=values), files=files)


class AnswerLogProbs(Struct, frozen=True, kw_only=True):
    """A model's log-probabilities of each row's answers.

    Attributes:
        chosen, rejected: Sums over the tokens of an answer, in nats. If the job has `ld_alpha` below 1, the tokens beyond the
            length of the shorter answer are weighted with it, as in its loss.
    """

    chosen: list[float]
    rejected: list[float]


class PairScores(Struct, frozen=True, kw_only=True):
    """The result: one entry per used row in every list, in the order of the file.

    Attributes:
        rows: Row numbers. A conversation with several pairs has the same number several times.
        chosen_tokens, rejected_tokens: Scored tokens of each answer.
        tuned: Of the trained model.
        base: Of the reference: the base model, or the adapter that the job began with.
        losses: The job's DPO loss of each row. None for jobs of SFT and KTO, and for losses that compare the rows of a batch.
        loss: Mean of the loss, over batches as in the training if it compares rows; None for jobs of SFT and KTO.
        base_loss: The same with the reference as policy: the loss of an untrained model.
        file_rows: Number of valid rows in the file.
        truncated: Numbers of rows whose answer lost its end at `seq_length`.
        dropped: Numbers of rows that are not used: no answer is left at `seq_length`, or both have the same tokens.
        cached: Number of log-probability pairs that were in the cache, of twice the number of rows.
        packed: Whether pairs shared one packed row.
        notes: What a reader of the numbers should know.
        seconds: Duration of the program.
    """

    rows: list[Natural]
    chosen_tokens: list[Natural]
    rejected_tokens: list[Natural]
    tuned: AnswerLogProbs
    base: AnswerLogProbs
    losses: list[float] | None
    loss: float | None
    base_loss: float | None
    file_rows: Natural
    truncated: list[Natural]
    dropped: list[Natural]
    cached: Natural
    packed: bool
    notes: list[str]
    seconds: Annotated[float, Meta(ge=0)]

    def __post_init__(self) -> None:
        columns = [self.tuned.chosen, self.tuned.rejected, self.base.chosen, self.base.rejected]
        columns += [] if self.losses is None else [self.losses]
        sizes = {len(column) for column in columns} | {len(self.chosen_tokens), len(self.rejected_tokens)}
        if sizes != {len(self.rows)}:
            raise ValueError(f"its lists have different lengths, expected {len(self.rows)} entries in each")

    def encode(self) -> bytes:
        return encode(self) + b"\n"

    @classmethod
    def decode(cls, data: bytes) -> PairScores:
        """Raises ValueError if a field is missing or has the wrong type, or the lists have different lengths."""
        return decode(data, cls)
