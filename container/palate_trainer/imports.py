"""What the import of the ML libraries leaves out. Knows a spec and those libraries' habits, no training."""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from palate_trainer.spec import TrainSpec

_NEVER_USED = ("boto3", "botocore", "sklearn", "tensorflow")
"""Imported where a library finds it installed, for what no run does: accelerate's and TensorBoard's dealings with AWS,
transformers' assisted generation, and files on TensorFlow's terms, which TensorBoard also writes without."""


@contextmanager
def lean_imports(spec: TrainSpec) -> Iterator[None]:
    """Within it, the ML libraries are imported without what `spec` has no use for, and without the garbage collector.

    For a process that does nothing but this run: what is left out stays out until it ends, because the libraries look once
    for what is installed. Together that is 30% of the processor time of a run of one step. The collector would go
    through all that was imported so far, over and over, and find nothing to free; what stands here at the end it never
    looks at again.
    """
    gc.disable()
    try:
        for name in _NEVER_USED if _quantised(spec) else (*_NEVER_USED, "bitsandbytes"):
            _leave_out(name)
        import torch

        if torch.accelerator.is_available():
            # Before the process ends, or the objects of Triton that no collection has seen are reported as leaks.
            atexit.register(gc.unfreeze)
        else:
            _leave_out("triton")  # compiles for GPUs alone
        yield
    finally:
        gc.freeze()
        gc.enable()


def _leave_out(name: str) -> None:
    """Makes every further import of `name` fail, as if it were not installed (Python reference, 5.3.1)."""
    sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def _quantised(spec: TrainSpec) -> bool:
    """Whether the weights become quantised, or are so on disk already."""
    config = Path(spec.model_dir) / "config.json"
    return (
        spec.hyperparameters["load_in_4bit"]
        or spec.hyperparameters["load_in_8bit"]
        or (config.is_file() and b'"quantization_config"' in config.read_bytes())
    )
