"""What the training and the token-counting program take and give, as types without ML imports.

`TrainTask` is the only argument of `python -m palate_trainer`: the `TrainSpec` of the job, and the files of this attempt. Its
output folder:

    adapter/ or weights   <output_dir>/model/          what is served: adapter or full weights, with tokenizer
    metrics               <output_dir>/metrics.jsonl    one JSON object a logged step, appended
    checkpoints           <output_dir>/checkpoints/checkpoint-N/   with `.complete` written last
    TensorBoard           <output_dir>/tensorboard/
    failure               <output_dir>/error.txt        one message for people, only when the exit code is not 0

`MeasureSpec` is the only argument of `python -m palate_trainer.token_stats`. It prints one JSON object, a `Measured`; on failure its
last line on stderr is a message for people, and the exit code is 1.
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
"""A worker's word to its launcher: begin anew with `fast=False`."""
METRICS_FILE = "metrics.jsonl"
MODEL_DIR = "model"
PROBE_FILE = "probe.json"
"""In the model folder: token ids and log-probabilities that a server with this model must give again."""
CHECKPOINTS_DIR = "checkpoints"
TENSORBOARD_DIR = "tensorboard"
COMPLETE_MARK = ".complete"
"""Written into a checkpoint folder after everything else: without it the checkpoint is half-written."""

EXIT_FAILED = 1
EXIT_STOPPED = 143
"""A SIGTERM was honoured: a whole checkpoint is written, the run is not complete."""

Precision = Literal["bfloat16", "float16", "float32"]


class InputFile(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Data of one channel, or an adapter, where the run finds it.

    Attributes:
        uri: Of the file, or of the adapter's folder.
        bytes, sha256: Of what is there.
        rows: Rows that are trained on.
        skipped_rows: Numbers of the rows that `bad_rows=skip` leaves out.
        origin: What the user named, where that is not what is at `uri`.
        files: How many files that were.
        revision: Of a data set of the hub.
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
    """One training: what a recipe asks for, what the manifest of its job holds, and what the trainer reads.

    Attributes:
        model: The base model.
        method: `LoRA_LLM`, `QLoRA_LLM` or `Standard_LLM` (full fine-tuning).
        hyperparameters: Resolved for the machine that trains.
        given: Hyperparameters as the user gave them, validated.
        precision: Dtype of weights and arithmetic.
        notes: A sentence for each default that gave way, and for each given value without effect.
        inputs: Preference data by channel (`train`, `validation`), and `adapter`, a LoRA adapter to go on training; under DPO and
            KTO its first state is the reference.
        max_run_time_s: Seconds until an attempt is ended, or None.
        max_attempts: How often the training is begun, at most.
        placement: Where it goes, as the backend said.
        environment_names: Variables of the trainer; their values are never recorded.
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
    """What one attempt of a training has on the machine that it runs on.

    Attributes:
        model_dir: Folder with config, weights and tokenizer of the base model.
        train_file: Data file for training, of any container and format that `palate_recipes.preferences` reads.
        output_dir: Folder that receives everything; made if missing.
        validation_file: The same for evaluation, or None.
        adapter_dir: Folder of the adapter to go on training, or None for a new one.
        resume_from: A whole checkpoint folder to go on from, or None.
        cache_dir: Folder for what later runs can use again (see `palate_recipes.specs.reference_table`), or None for no cache.
        attempt: Number of the attempt, from 1; recorded in the events of a later one, whose store may still get an earlier one's.
        fast: False computes as TRL does, without packed trees and fused layers: the same losses, more time.
        processes: Processes that train together on this machine, one a GPU; 0 takes every visible GPU, or without CUDA
            one process.
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


class TrainTask(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A training and the files of one attempt of it: the only argument of the trainer program."""

    spec: TrainSpec
    files: LocalFiles

    def write(self, path: Path) -> None:
        """Writes it as JSON."""
        path.write_bytes(encode(self) + b"\n")

    @classmethod
    def read(cls, path: Path) -> TrainTask:
        """Reads one; raises ValueError on text that is none, and on unknown or missing fields."""
        return decode(path.read_bytes(), cls)

    def changed(self, **files: Any) -> TrainTask:
        """Returns the same training with other files."""
        return replace(self, files=replace(self.files, **files))


class MeasureSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Files whose tokens are to be counted as a training would cut them.

    Attributes:
        model_dir: Folder with the tokenizer.
        files: Path and name of each data file.
        strategy: What the rows are for; None takes any.
        settings: Arguments of `palate_recipes.preferences.columns.format_for`.
        seq_length: Most tokens of prompt and answer together.
        system_prompt: Of rows that bring none.
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
        """Reads a spec; raises ValueError on text that is none, and on unknown or missing fields."""
        return decode(path.read_bytes(), cls)


class Measured(TypedDict):
    """What was measured.

    Keys:
        counts: Rows by code: `no-room`, `same-after-cut`, `same-tokens`, `cut`.
        places: The first of each: file, row number, unit, what.
        lengths: Percentiles of whole rows in tokens, uncut.
        histogram: Rows by tokens, see `palate_recipes.preferences.statistics.histogram`.
    """

    counts: dict[str, int]
    places: dict[str, list[tuple[str, int, str, str]]]
    lengths: dict[str, int]
    histogram: list[int]
