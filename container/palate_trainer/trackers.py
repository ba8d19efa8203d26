"""Experiment trackers of a run: transformers' callbacks, which report to trackio, MLflow or W&B. Knows no metric and no model.

Tracking is an extra: a tracker that fails is named in a warning, and the training continues without it.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from palate_recipes.specs.train import TrainTask
from palate_recipes.text import without_secrets
from palate_recipes.trackers import chosen
from palate_trainer.env import tracker_tags

_FAILURES = 3
"""A tracker that failed so often in a row is not called again: each call may wait for its server."""


def make_trackers(task: TrainTask, note: Callable[[str], None]) -> list[TrackerCallback]:
    """Returns a callback per tracker except TensorBoard, which writes local files and is transformers' own.

    Args:
        task: The run.
        note: Called with a warning.
    """
    names = [name for name in chosen(task.spec.hyperparameters.report_to) if name != "tensorboard"]
    return [TrackerCallback(name, task, note) for name in names]


class TrackerCallback(TrainerCallback):  # type: ignore[misc]
    """Passes a trainer's events on to a tracker's callback, and turns its errors into warnings."""

    def __init__(self, name: str, task: TrainTask, note: Callable[[str], None]) -> None:
        self.name, self._task, self._note = name, task, note
        self._callback: Any = None
        self._failures = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        def begin() -> None:
            self._callback = INTEGRATION_TO_CALLBACK[self.name]()
            self._callback.on_train_begin(args, state, control, **kwargs)
            if self.name == "trackio":  # has no variable for tags
                import trackio

                trackio.config.update(tracker_tags(self._task))

        self._guarded("start", begin)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self._pass_on("log", "on_log", args, state, control, logs=dict(logs or {}), **kwargs)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._pass_on("save", "on_save", args, state, control, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._pass_on("end", "on_train_end", args, state, control, **kwargs)
        if self.name == "wandb" and self._callback is not None:
            # Its callback leaves this to the interpreter's shutdown, which workers of several GPUs skip.
            import wandb

            self._guarded("end", wandb.finish)

    def _pass_on(self, what: str, event: str, *args: Any, **kwargs: Any) -> None:
        if self._callback is not None and self._failures < _FAILURES:
            self._guarded(what, lambda: getattr(self._callback, event)(*args, **kwargs))

    def _guarded(self, what: str, act: Callable[[], Any]) -> None:
        try:
            # Trackers print banners and addresses, which can have credentials.
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                act()
        except Exception as error:
            self._failures += 1
            if self._failures in (1, _FAILURES) or what == "start":
                self._note(self._warning(what, error))
        else:
            self._failures = 0

    def _warning(self, what: str, error: Exception) -> str:
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        cause = without_secrets(cause, [*self._task.spec.environment_names, *_SECRET_NAMES], os.environ)
        ended = what == "start" or self._failures >= _FAILURES
        then = "does not report to it any more" if ended else "continues"
        return f"WARNING: the tracker {self.name} failed ({what}), and the training {then}: {cause}"


_SECRET_NAMES = (
    "WANDB_API_KEY",
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_URI",
    "HF_TOKEN",
)
