"""Input and output of the training program and the token-counting program, as types without ML imports.

`python -m palate_trainer` takes one file, a `TrainTask`: the job's `TrainSpec` and the files of this attempt. Its output folder:

    adapter/ or weights   <output_dir>/model/          adapter or full weights, with tokenizer, ready to serve
    metrics               <output_dir>/metrics.jsonl    one JSON object per logged step, appended
    checkpoints           <output_dir>/checkpoints/checkpoint-N/   with `.complete` written last
    TensorBoard           <output_dir>/tensorboard/
    failure               <output_dir>/error.txt        the reason in words, only if the exit code is not 0

`python -m palate_trainer.token_stats` takes a `MeasureSpec` and prints one JSON object, a `Measured`. If it fails, the last line on
stderr is the reason in words, and the exit code is 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

from msgspec import Meta, Struct
from msgspec.structs import replace

from palate_recipes.schema import Hyperparameters, Method
from palate_recipes.specs.codec import Natural, Ordinal, Sha256, decode, encode
from palate_recipes.specs.weights import BaseModel

ERROR_FILE = "error.txt"
FAST_PATH_FAILED_FILE = ".fast-path-failed"
"""A worker writes it to make its launcher start again with `fast=False`."""
METRICS_FILE = "metrics.jsonl"
MODEL_DIR = "model"
CHECKPOINTS_DIR = "checkpoints"
TENSORBOARD_DIR = "tensorboard"
COMPLETE_MARK = ".complete"
"""Written last into a checkpoint folder. Without it the checkpoint is incomplete."""

EXIT_FAILED = 1
EXIT_STOPPED = 143
"""Stopped by SIGTERM: a complete checkpoint was written, and the run is not finished."""

Precision = Literal["bfloat16", "float16", "float32"]


class InputFile(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The data of one channel, or an adapter, as the run reads it.

    Attributes:
        uri: URI of the file, or of the adapter's folder.
        bytes, sha256: Size and digest of the content.
        rows: Number of rows to train on.
        skipped_rows: Numbers of the rows that `bad_rows=skip` skips.
        origin: What the user gave, if it differs from `uri`.
        files: Number of files in `origin`.
        revision: Revision of a data set on the Hub.
    """

    uri: str
    sha256: Sha256 | None = None
    bytes: Natural | None = None
    rows: Natural | None = None
    skipped_rows: list[Natural] | None = None
    origin: str | None = None
    files: Natural | None = None
    revision: str | None = None


class TrainSpec(Struct, frozen=True, kw_only=True):
    """One training. The recipe builds it, the job's manifest holds it as `body`, and the trainer reads it.

    Attributes:
        model: The base model.
        method: `LoRA_LLM`, `QLoRA_LLM` or `Standard_LLM` (full fine-tuning).
        hyperparameters: Resolved for the machine that runs the training.
        given: Hyperparameters as the user gave them, validated.
        precision: Data type of weights and arithmetic.
        notes: One sentence for each changed default and each given value without effect.
        inputs: Preference data by channel (`train`, `validation`), and `adapter`, a LoRA adapter to continue training. In DPO and
            KTO its initial state is the reference.
        max_run_time_s: Time limit of an attempt in seconds, or None.
        max_attempts: Maximum number of attempts.
        placement: The placement, as the backend returned it.
        environment_names: Names of the trainer's environment variables. Values are never recorded.
    """

    model: BaseModel
    method: Method
    hyperparameters: Hyperparameters
    given: dict[str, Any] = {}
    precision: Precision
    notes: tuple[str, ...] = ()
    inputs: dict[str, InputFile] = {}
    max_run_time_s: Ordinal | Annotated[float, Meta(gt=0)] | None = None
    max_attempts: Ordinal = 1
    placement: dict[str, Any] = {}
    environment_names: tuple[str, ...] = ()

    @property
    def trains_adapter(self) -> bool:
        """True for LoRA and QLoRA; PAI trains all weights when `lora_dim` is 0."""
        return self.method != "Standard_LLM" and self.hyperparameters.lora_dim > 0


class LocalFiles(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The files of one attempt on the machine that runs it.

    Attributes:
        model_dir: Folder with config, weights and tokenizer of the base model.
        train_file: Training data, in any format that `palate_recipes.preferences` reads.
        output_dir: Folder for all output; created if missing.
        validation_file: Validation data, or None.
        adapter_dir: Folder of the adapter to continue training, or None for a new adapter.
        resume_from: A complete checkpoint folder to resume from, or None.
        cache_dir: Folder of the reference cache (see `palate_recipes.specs.reference_table`), or None for no cache.
        attempt: Number of the attempt, from 1. Events of attempts after the first have it: late events of an earlier attempt may still
            arrive in the store.
        fast: False computes as TRL does, without packed trees and fused layers: same losses, more time.
        processes: Number of processes on this machine, one per GPU. 0 means all visible GPUs, or one process without CUDA.
        run_name: Name of the run in trackers: the job's id.
    """

    model_dir: str
    train_file: str
    output_dir: str
    validation_file: str | None = None
    adapter_dir: str | None = None
    resume_from: str | None = None
    cache_dir: str | None = None
    attempt: Ordinal = 1
    fast: bool = True
    processes: Natural = 0
    run_name: str | None = None


class TrainTask(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A training and the files of one attempt: the input of the trainer program."""

    spec: TrainSpec
    files: LocalFiles

    def write(self, path: Path) -> None:
        """Writes the task as JSON."""
        path.write_bytes(encode(self) + b"\n")

    @classmethod
    def read(cls, path: Path) -> TrainTask:
        """Reads a task. Raises ValueError for invalid JSON and for unknown, missing or invalid fields."""
        return decode(path.read_bytes(), cls)

    def changed(self, **files: Any) -> TrainTask:
        """Returns the same training with these files changed."""
        return replace(self, files=replace(self.files, **files))


class MeasureSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Data files to count tokens in, with truncation as in training.

    Attributes:
        model_dir: Folder with the tokenizer.
        files: Path and display name of each data file.
        strategy: Training strategy that the rows are for; None accepts all.
        settings: Arguments of `palate_recipes.preferences.columns.format_for`.
        seq_length: Maximum tokens of prompt and answer together.
        system_prompt: System prompt of rows without one.
        apply_chat_template: As in training.
    """

    model_dir: str
    files: list[tuple[str, str]]
    strategy: Literal["dpo", "sft", "kto"] | None
    settings: dict[str, Any]
    seq_length: Ordinal
    system_prompt: str
    apply_chat_template: bool = True

    def write(self, path: Path) -> None:
        """Writes the spec as JSON."""
        path.write_bytes(encode(self))

    @classmethod
    def read(cls, path: Path) -> MeasureSpec:
        """Reads a spec. Raises ValueError for invalid JSON and for unknown, missing or invalid fields."""
        return decode(path.read_bytes(), cls)


class Measured(TypedDict):
    """The measurement.

    Keys:
        counts: Number of rows by code: `no-room`, `same-after-cut`, `same-tokens`, `cut`.
        places: The first places of each code: file, row number, unit, detail.
        lengths: Percentiles of row lengths in tokens before truncation.
        histogram: Number of rows by length in tokens, see `palate_recipes.preferences.statistics.histogram`.
        kept: Examples that are trained on in an epoch.
        tokens: Their tokens after truncation, the prompt of a pair once.
        largest, deviation: Maximum and standard deviation of the same per example.
        truncated_rows, dropped_rows: Number of rows; a row with several answers counts once.
    """

    counts: dict[str, int]
    places: dict[str, list[tuple[str, int, str, str]]]
    lengths: dict[str, int]
    histogram: list[int]
    kept: int
    tokens: int
    largest: int
    deviation: float
    truncated_rows: int
    dropped_rows: int
