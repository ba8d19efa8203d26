"""What the training and the token-counting program take and give, as types without ML imports.

`TrainSpec` is the only argument of `python -m palate_trainer`. Its output folder:

    adapter/ or weights   <output_dir>/model/          what is served: adapter or full weights, with tokenizer
    metrics               <output_dir>/metrics.jsonl    one JSON object a logged step, appended
    checkpoints           <output_dir>/checkpoints/checkpoint-N/   with `.complete` written last
    TensorBoard           <output_dir>/tensorboard/
    failure               <output_dir>/error.txt        one message for people, only when the exit code is not 0

`MeasureSpec` is the only argument of `python -m palate_trainer.token_stats`. It prints one JSON object, a `Measured`; on failure its
last line on stderr is a message for people, and the exit code is 1.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

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


@dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """One training run, as the trainer program reads it from JSON.

    Attributes:
        method: `LoRA_LLM`, `QLoRA_LLM` or `Standard_LLM` (full fine-tuning).
        model_dir: Folder with config, weights and tokenizer of the base model.
        train_file: Data file for training, of any container and format that `palate_recipes.preferences` reads.
        validation_file: The same for evaluation, or None.
        output_dir: Folder that receives everything; made if missing.
        hyperparameters: Resolved values, every name of the schema present.
        precision: Dtype of weights and arithmetic.
        adapter_dir: Folder of a LoRA adapter to go on training, or None for a new one. Under DPO and KTO its first
            state is the reference.
        resume_from: A whole checkpoint folder to go on from, or None.
        model_name: Recorded in the output, so that a reader knows which base an adapter belongs to.
        cache_dir: Folder for what later runs can use again (see `palate_recipes.specs.reference_table`), or None for no cache.
        attempt: Number of the attempt, from 1; recorded in the events of a later one, whose store may still get an earlier one's.
        fast: False computes as TRL does, without packed trees and fused layers: the same losses, more time.
        processes: Processes that train together on this machine, one a GPU; 0 takes every visible GPU, or without CUDA
            one process.
    """

    method: str
    model_dir: str
    train_file: str
    output_dir: str
    hyperparameters: dict[str, Any]
    precision: Precision
    validation_file: str | None = None
    adapter_dir: str | None = None
    resume_from: str | None = None
    model_name: str = ""
    cache_dir: str | None = None
    attempt: int = 1
    fast: bool = True

    @property
    def trains_adapter(self) -> bool:
        """True for LoRA and QLoRA; PAI trains all weights when `lora_dim` is 0."""
        return self.method != "Standard_LLM" and self.hyperparameters["lora_dim"] > 0

    processes: int = 0

    def write(self, path: Path) -> None:
        """Writes the spec as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> TrainSpec:
        """Reads a spec; raises TypeError on unknown or missing fields."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


@dataclass(frozen=True, kw_only=True)
class MeasureSpec:
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
    files: list[list[str]]
    strategy: str | None
    settings: dict[str, Any]
    seq_length: int
    system_prompt: str
    apply_chat_template: bool = True

    def write(self, path: Path) -> None:
        """Writes the spec as JSON."""
        path.write_text(json.dumps(asdict(self), ensure_ascii=False), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> MeasureSpec:
        """Reads a spec; raises TypeError on unknown or missing fields."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


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
