"""Runs of the training program in the test's own process, over generated rows. Knows the program's spec."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from palate_recipes.hyperparameters import DeviceFacts, resolve
from palate_recipes.specs.train import ERROR_FILE, LocalFiles, TrainTask
from tests.support.manifests import train_spec
from tests.support.rows import preference_rows

CPU = DeviceFacts(cuda=False, bf16=False, fp16=False)
PRECISIONS = ("float32", "bfloat16")
NEAR = {"float32": 1e-5, "bfloat16": 2e-2}
"""How far the losses of two runs may be apart whose sums are in another order: in 16 bits a log-probability of an answer is off
by hundredths, and a loss with it."""
NORM_NEAR = {"float32": 1e-3, "bfloat16": 5e-2}
"""The same of gradient norms, as a share of them."""
QUICK = {
    "training_strategy": "dpo",
    "gradient_accumulation_steps": 1,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
}


def spec(model: Path, folder: Path, *, method: str = "LoRA_LLM", rows: int = 12, **fields: Any) -> TrainTask:
    """A spec over generated rows; hyperparameters by keyword, on top of QUICK.

    Args:
        model: Folder of the base model.
        folder: Receives data and output.
        method: As in a recipe.
        rows: How many rows to generate.
        fields: Hyperparameters, and `data` (rows instead of generated ones), `held_out` (rows for validation), `validate`
            (validate on the training rows), `resume_from`, `adapter_dir`, `fast`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data, held_out = folder / "prefs.json", folder / "held-out.json"
    data.write_text(json.dumps(fields.pop("data", preference_rows(rows))))
    validation = str(data) if fields.pop("validate", False) else None
    if "held_out" in fields:
        held_out.write_text(json.dumps(fields.pop("held_out")))
        validation = str(held_out)
    beside = {name: fields.pop(name) for name in ("resume_from", "adapter_dir", "fast") if name in fields}
    # No CPU is offered float16; the program itself is asked.
    precision = fields.pop("precision") if fields.get("precision") == "float16" else None
    resolved = resolve({**QUICK, **fields}, method=method, device=CPU)
    spec = train_spec("tiny", method=method, precision=precision or resolved.precision)
    files = LocalFiles(
        model_dir=str(model),
        train_file=str(data),
        validation_file=validation,
        output_dir=str(folder / "out"),
        **beside,
    )
    return TrainTask(spec=replace(spec, hyperparameters=resolved.values), files=files)


def train(wanted: TrainTask) -> list[dict[str, Any]]:
    """Runs the program's main path in this process and returns its metrics."""
    from palate_trainer.train import run

    code = run(wanted)
    if gc.get_freeze_count() == 0:  # accelerate collects in each training: not over all libraries again
        gc.collect()
        gc.freeze()
    error = Path(wanted.files.output_dir) / ERROR_FILE
    assert code == 0, error.read_text() if error.exists() else code
    return [json.loads(line) for line in (Path(wanted.files.output_dir) / "metrics.jsonl").read_text().splitlines()]


def refusal(wanted: TrainTask) -> str:
    """Runs the program, which must fail without a model, and returns its message."""
    from palate_trainer.train import run

    assert run(wanted) == 1
    assert not (Path(wanted.files.output_dir) / "model").exists()
    return (Path(wanted.files.output_dir) / ERROR_FILE).read_text()


def losses(metrics: list[dict[str, Any]]) -> list[float]:
    """The loss of each logged step."""
    return [entry["loss"] for entry in metrics if entry["kind"] == "train"]
