"""A run's output while it trains: metrics.jsonl, progress lines, checkpoint markers, and the stop on SIGTERM.

Knows transformers' callbacks and one output folder, no model.
"""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback

from palate_recipes.specs.diagnose import read_run
from palate_recipes.specs.divergence import DivergenceWatch
from palate_recipes.specs.events import Curves, progress_line
from palate_recipes.specs.train import COMPLETE_MARK, METRICS_FILE
from palate_trainer.checkpoint_marker import mark_complete
from palate_trainer.distributed import any_process, is_main, sum_over_processes, wait_for_all
from palate_trainer.throughput import StartupTimes, Throughput, peak_memory_gb

_NOT_SCALARS = ("step", "total_steps", "seconds", "kind")
"""Values that TensorBoard shows on its axes already."""


def log(line: str) -> None:
    """Prints a progress line on stdout, unbuffered. Only rank 0 prints."""
    if is_main():
        print(line, flush=True)


class Metrics:
    """Appends events (`start`, `train`, `eval`, `end`) to metrics.jsonl, one JSON object per line, and reads them back.

    Only rank 0 writes. Events have the number of their attempt: a runner that was considered lost may still push its last events
    after those of the next attempt.
    """

    def __init__(self, output_dir: Path, *, attempt: int = 1) -> None:
        self.path = output_dir / METRICS_FILE
        self._attempt = attempt

    def write(self, kind: str, values: dict[str, Any]) -> None:
        if not is_main():
            return
        # One write call per line, so that a reader never sees half a line. JSON has no NaN, so it becomes null.
        with self.path.open("a", encoding="utf-8") as file:
            file.write(
                json.dumps({"kind": kind, "attempt": self._attempt, **_without_nan(values)}, ensure_ascii=False) + "\n"
            )

    def read(self) -> list[dict[str, Any]]:
        """All events so far, including those before a resume."""
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]


class StopRequested(BaseException):
    """A stop outside of a step: SIGTERM between steps, or no step is left. A BaseException, so that no library catches it."""


class StopSignal:
    """Handles SIGTERM: records it while `deferred`, otherwise raises StopRequested at once.

    Attributes:
        requested: This process received SIGTERM.
        agreed: All processes know of the stop, so all act on it in the same step.
    """

    def __init__(self) -> None:
        self.requested = False
        self.agreed = False
        self.deferred = False
        signal.signal(signal.SIGTERM, self._received)

    def _received(self, number: int, frame: FrameType | None) -> None:
        first, self.requested = not self.requested, True
        if first and not self.deferred:
            raise StopRequested
        if first:
            log("stop requested: finishing the current step")


class EarlyStopping(EarlyStoppingCallback):  # type: ignore[misc]
    """Stops after evaluations without an improvement. Also after a resume: it counts again what the checkpoint's log has."""

    @property
    def has_stopped(self) -> bool:
        return bool(self.early_stopping_patience_counter >= self.early_stopping_patience)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Not the base's: it only warns that the best model is not loaded at the end, which Palate does itself.
        self.early_stopping_patience_counter = 0
        best, better = state.best_metric, np.greater if args.greater_is_better else np.less
        state.best_metric = None
        for entry in state.log_history:
            value = entry.get(args.metric_for_best_model)
            if value is not None:
                self.check_metric_value(args, state, control, value)
                if state.best_metric is None or better(value, state.best_metric):
                    state.best_metric = value
        state.best_metric = best

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        super().on_evaluate(args, state, control, metrics, **kwargs)
        if self.has_stopped:
            log(
                f"stopped early at step {state.global_step}: {args.metric_for_best_model} has not improved in "
                f"{self.early_stopping_patience_counter} evaluations"
            )


class RunCallback(TrainerCallback):  # type: ignore[misc]
    """Writes events and log lines, and turns a stop request into a last checkpoint.

    Args:
        metrics: Where events are written.
        stop: The SIGTERM state.
        rows: Rows per epoch over all processes.
        startup: Timer of the stages before the first step.
        start_event: Fields of the `start` event besides steps and seconds.
        trackers: Callbacks of trackers.
        early: Early stopping, if the run has it. Its events must come before those of this callback.
    """

    def __init__(
        self,
        metrics: Metrics,
        stop: StopSignal,
        *,
        rows: int,
        startup: StartupTimes,
        start_event: dict[str, Any],
        trackers: Sequence[TrainerCallback] = (),
        early: EarlyStopping | None = None,
    ) -> None:
        self.metrics, self.stop, self.rows, self.start_event = metrics, stop, rows, start_event
        self.early = early
        self.startup, self._trackers = startup, trackers
        self._tensorboard: Any = None
        self.trainer: Any = None
        self.last: dict[str, dict[str, Any]] = {"train": {}, "eval": {}}
        self.step_losses: list[float] = []  # one per step of this process
        self._last_window = 0  # steps in the last log line
        self._logged_steps = 0
        self._pace = Throughput()
        self._watch = DivergenceWatch()
        self._epoch_mark = 0.0
        self._owed_evaluation = False

    def attach(self, trainer: Any) -> None:
        """Connects to the trainer, and removes its callback that prints raw dicts."""
        self.trainer = trainer
        trainer.remove_callback(PrinterCallback)
        self._tensorboard = trainer.pop_callback(TensorBoardCallback)
        for callback in (self._tensorboard, *self._trackers):
            if callback is not None:
                trainer.add_callback(callback)  # must run after this callback, to write the values that it adds

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stop.deferred = True
        self._pace.start()
        self._epoch_mark = float(state.epoch or 0.0)
        model = self.trainer.model
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in model.parameters())
        event = {
            **self.start_event,
            **self.startup.report(),
            "step": state.global_step,
            "total_steps": state.max_steps,
            "trainable_parameters": trainable,
            "total_parameters": total,
        }
        self.metrics.write("start", event)
        self._watch.add({"kind": "start", **event})
        log(self.startup.line())
        log(f"training {self.rows} rows, {state.max_steps} steps, {trainable:,} of {total:,} parameters")
        log(_what_lines_show(event))
        if state.global_step:
            log(f"resumed after step {state.global_step}")
            if self._tensorboard is not None and is_main():
                # Files of the attempt before are there too: its events of the steps that are repeated must not be shown.
                from torch.utils.tensorboard import SummaryWriter

                folder = self._tensorboard.logging_dir
                self._tensorboard.tb_writer = SummaryWriter(log_dir=folder, purge_step=state.global_step + 1)
            self._owed_evaluation = self._is_evaluation_missing(args, state)
        if self.all_steps_done:
            self._evaluate_if_owed()
            raise StopRequested  # resumed after the last step: transformers would run one step too many

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Not in on_train_begin: the checkpoint's random state is loaded only now, and an evaluation changes it.
        self._evaluate_if_owed()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # accelerate's wrappers do not always pass the epoch on to the sampler, and the row order of a resumed run needs it.
        self.trainer.order.set_epoch(int(state.epoch or 0))

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._pace.micro_batch(1 / args.gradient_accumulation_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        requests, loss = sum_over_processes([float(self.stop.requested), self.trainer.step_loss])
        self.stop.agreed = requests > 0
        self._pace.step()
        self.step_losses.append(loss / args.world_size)
        self.trainer.step_loss = 0.0
        if state.global_step >= state.max_steps:
            control.should_log = True  # otherwise the steps after the last full window are never logged
        return self._maybe_stop(state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self.stop.agreed:
            control.should_evaluate = False
            control.should_save = False  # on_step_end has already requested it
        return control

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stop.agreed = any_process(self.stop.requested)
        if self.stop.agreed:
            raise StopRequested

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        shared = {} if logs is None else logs  # later callbacks see changes to this dict
        logs = dict(shared)
        if "train_runtime" in logs:  # transformers' summary; the `end` event replaces it
            return
        kind = "eval" if any(name.startswith("eval_") for name in logs) else "train"
        values: dict[str, Any] = {
            "step": state.global_step,
            "total_steps": state.max_steps,
            "epoch": round(float(state.epoch or 0.0), 4),
            "seconds": round(self._pace.seconds, 2),
        }
        if kind == "train":
            rows = (float(state.epoch or 0.0) - self._epoch_mark) * self.rows
            self._epoch_mark = float(state.epoch or 0.0)
            values |= self._pace.window(rows, logs.get("tokens"))
            values["seconds_left"] = self._pace.seconds_left(**self._to_come(args, state))
            if (memory := peak_memory_gb()) is not None:
                values["memory_gb"] = memory
            self._last_window, self._logged_steps = len(self.step_losses) - self._logged_steps, len(self.step_losses)
        else:
            self._pace.evaluation()
        values |= {name: value for name, value in logs.items() if name != "epoch"}
        self.last[kind] = values
        self.metrics.write(kind, values)
        event = {"kind": kind, **_without_nan(values)}
        log(progress_line(event))
        for note in self._watch.add(event):
            log(f"note: {note}")
        shared.update({name: value for name, value in event.items() if name not in _NOT_SCALARS and value is not None})

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        wait_for_all()  # every process writes its own random state, and the marker must be last
        if is_main():
            mark_complete(folder)
        self._pace.checkpoint()
        log(f"checkpoint {folder.name} written")

    @property
    def all_steps_done(self) -> bool:
        """Whether the last step is done: the last planned one, or that of an early stop."""
        return self.stopped_early or bool(self.trainer.state.global_step >= self.trainer.state.max_steps)

    @property
    def stopped_early(self) -> bool:
        return self.early is not None and self.early.has_stopped

    @property
    def is_over(self) -> bool:
        """Whether the model can be saved: all steps are done, and the evaluation of the last one if it chooses the model."""
        trainer = self.trainer
        awaited = trainer.keeps_best and self._is_evaluation_missing(trainer.args, trainer.state)
        return self.all_steps_done and not awaited

    def checkpoint_now(self) -> None:
        """Writes a checkpoint of the last finished step, unless it exists or training is over."""
        trainer = self.trainer
        if (
            not self.is_over
            and not (Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}" / COMPLETE_MARK).exists()
        ):
            trainer._save_checkpoint(trainer.model, trial=None)
            self.on_save(trainer.args, trainer.state, trainer.control)

    def finish(self, *, seconds: float, best_step: int | None = None) -> dict[str, Any]:
        """Writes the `end` event with the reading of the run, and returns it.

        Args:
            seconds: Wall time of the whole run.
            best_step: Step of the model's weights, if they are not those of the last step.
        """
        reading = read_run(self.metrics.read())
        state = self.trainer.state
        # From the log of the checkpoints: metrics.jsonl of a resumed run may begin after the best step.
        of_model = next(
            (entry for entry in reversed(state.log_history) if entry["step"] == best_step and "eval_loss" in entry),
            self.last["eval"],
        )
        steps = state.global_step  # not max_steps: it may have stopped early
        epoch_steps = max(1, round(steps / max(float(state.epoch or 1.0), 1e-9)))
        event = {
            "step": state.global_step,
            "total_steps": state.max_steps,
            "epoch": round(float(state.epoch or 0.0), 4),
            "seconds": round(seconds, 2),
            **self._pace.totals(),
            "memory_gb": peak_memory_gb(),
            "first_loss": _mean(self.step_losses[:1]),
            "final_loss": _mean(self.step_losses[-max(1, self._last_window) :]),
            "last_epoch_loss": _mean(self.step_losses[-epoch_steps:]),
            "train": _numbers_only(self.last["train"]),
            "eval": _numbers_only(of_model),
            "reading": {"verdict": reading.verdict, "text": reading.text},
        }
        if self.trainer.args.metric_for_best_model is not None:
            event |= {"best_metric": state.best_metric, "stopped_early": self.stopped_early}
        if best_step is not None:
            event["best_step"] = best_step
        self.metrics.write("end", event)
        return event

    def _evaluate_if_owed(self) -> None:
        """Makes the evaluation that a stop or a kill left out after the checkpoint's step."""
        if self._owed_evaluation:
            self._owed_evaluation = False
            self.trainer._determine_best_metric(self.trainer.evaluate(), trial=None)
            if self.stopped_early:
                raise StopRequested  # the unbroken run stopped here, and transformers would run the step that begins

    def _is_evaluation_missing(self, args: Any, state: Any) -> bool:
        """Whether an evaluation was due at the checkpoint's step, and the checkpoint was written without it."""
        if any(entry["step"] == state.global_step and "eval_loss" in entry for entry in state.log_history):
            return False
        if args.eval_strategy != "no" and state.global_step >= state.max_steps:
            return True
        if args.eval_strategy == "epoch":
            return math.isclose(float(state.epoch or 0.0) % 1.0, 0.0, abs_tol=1e-9)
        return bool(args.eval_strategy == "steps" and state.global_step % state.eval_steps == 0)

    def _to_come(self, args: Any, state: Any) -> dict[str, int]:
        """Counts the remaining work. The evaluation and checkpoint of the step being logged are still to come."""
        step, total = state.global_step, state.max_steps
        evaluations = 0
        if args.eval_strategy == "epoch":
            evaluations = state.num_train_epochs - math.ceil(float(state.epoch or 0.0) - 1e-6) + 1
        elif args.eval_strategy == "steps":
            evaluations = _multiples(step, total, state.eval_steps)
        return {
            "steps": total - step,
            "evaluations": evaluations,
            "evaluation_rows": len(self.trainer.eval_dataset or ()),
            "checkpoints": _multiples(step, total, state.save_steps) if args.save_strategy == "steps" else 0,
        }

    def _maybe_stop(self, state: Any, control: Any) -> Any:
        # After the last step only the model is left to write, unless an evaluation chooses it: a resumed run makes that one.
        if self.stop.agreed and (state.global_step < state.max_steps or self.trainer.keeps_best):
            control.should_save = True
            control.should_training_stop = True
            control.should_evaluate = False
        return control


def _what_lines_show(start: dict[str, Any]) -> str:
    """Returns what the figures of the log lines are. The reading compares with the exact loss of an untrained model."""
    means = "a line has the means over the steps since the line before"
    if start["step"]:
        return means
    untrained = Curves.of([{"kind": "start", **_without_nan(start)}]).first_loss  # known before any step, or None
    exact = "" if untrained is None else f", whose exact loss is {untrained:.3f}"
    if exact and start["precision"] != "float32":  # the reference was scored in other batches
        exact += f": a difference is rounding in {start['precision']}"
    return f"step 1 is the untrained model{exact}; {means}"


def _mean(values: list[float]) -> float | None:
    return round(sum(values) / len(values), 6) if values else None


def _multiples(first: int, last: int, every: int) -> int:
    """Counts the steps from `first` to `last` that are a multiple of `every` or the last one."""
    return last // every - (first - 1) // every + (last % every != 0)


def _numbers_only(values: dict[str, Any]) -> dict[str, Any]:
    left_out = (*_NOT_SCALARS, "epoch", "seconds_left", "memory_gb")
    return {name: value for name, value in values.items() if name not in left_out}


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
