"""One training run, top to bottom: spec in, model folder out. Knows files, never stores or clients."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from palate_recipes.errors import NotFiniteError, PalateError, TrainerError
from palate_recipes.hyperparameters import needs_validation
from palate_recipes.preferences.load import describe_skipped, read_rows
from palate_recipes.preferences.row import Row
from palate_recipes.schema import Hyperparameters
from palate_recipes.specs.diagnose import ADVICE_NAMES
from palate_recipes.specs.train import (
    COMPLETE_MARK,
    ERROR_FILE,
    EXIT_FAILED,
    EXIT_STOPPED,
    FAST_PATH_FAILED_FILE,
    TENSORBOARD_DIR,
    TrainTask,
)
from palate_recipes.trackers import missing
from palate_trainer.distributed import is_main, join_group, wait_for_all, world_size
from palate_trainer.env import keep_one_gpu, lean_imports, prepare_environment, prepare_trackers, use_available_cores
from palate_trainer.failures import explain, is_out_of_memory
from palate_trainer.throughput import StartupTimes, device_name


def run(task: TrainTask, *, own_process: bool = False) -> int:
    """Trains and returns the exit code.

    Args:
        task: The run.
        own_process: This process does nothing else, so imports may skip libraries that the run does not need.

    Returns:
        0 if `model/` is complete; EXIT_STOPPED after a SIGTERM; EXIT_FAILED with error.txt written.
    """
    # Until StopSignal takes over: the imports take seconds, and a stop during them must return the same exit code.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(EXIT_STOPPED))
    output = Path(task.files.output_dir)
    if world_size() == 1:  # with several workers the launcher removes it: here another worker may have failed already
        (output / ERROR_FILE).unlink(missing_ok=True)
    try:
        output.mkdir(parents=True, exist_ok=True)
        return _train(task, output, lean_imports(task) if own_process else nullcontext())
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        failed_fast = isinstance(error, _FastPathError)
        message = explain(error.__cause__ if failed_fast and error.__cause__ else error)
        print(message, file=sys.stderr, flush=True)
        if write_error(output, message) and failed_fast:
            # Tells the launcher to restart all workers without the fast path. One worker cannot: the others wait for it.
            (output / FAST_PATH_FAILED_FILE).write_text(message, encoding="utf-8")
        return EXIT_FAILED


def write_error(output_dir: Path, message: str) -> bool:
    """Writes error.txt. If that fails it only prints a warning, because the caller prints the message too.

    The first message wins: when one process fails, the others then fail because they lost it.

    Returns:
        Whether this message was written.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with (output_dir / ERROR_FILE).open("x", encoding="utf-8") as file:
            file.write(message.rstrip() + "\n")
    except FileExistsError:
        return False
    except OSError as error:
        print(f"{ERROR_FILE} cannot be written: {error}", file=sys.stderr)
        return False
    return True


def _train(task: TrainTask, output: Path, importing: AbstractContextManager[None]) -> int:
    startup = StartupTimes()
    hyperparameters = task.spec.hyperparameters
    strategy = hyperparameters.training_strategy

    # All checks that need no ML libraries and no weights come first, so that bad input fails within seconds.
    train_data, skipped = _read_rows(task, task.files.train_file)
    validation_data, skipped_validation = _read_rows(task, task.files.validation_file)
    if (setting := needs_validation(hyperparameters)) and not validation_data:
        raise TrainerError(
            f"{setting} needs validation data, and this run has none: give a validation file, or omit it"
        )
    resume_from = _resume_folder(task)
    if problem := missing(hyperparameters.report_to):
        raise TrainerError(problem)
    startup.done("read")

    prepare_environment()
    prepare_trackers(task)
    keep_one_gpu()
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(output / TENSORBOARD_DIR)
    with importing:
        from transformers import set_seed

        from palate_trainer.callbacks import StopRequested, StopSignal, log
        from palate_trainer.model import check_model_dir, check_target_modules
        from palate_trainer.save import save_model
        from palate_trainer.tokenize import encode_pairs, load_renderer
        from palate_trainer.trainers import build_trainer  # noqa: F401  # imported here to count as import time
        from palate_trainer.trainers.kto import balance_note

    startup.done("imports")
    stop = StopSignal()
    try:
        join_group(sharded=hyperparameters.fsdp == "full_shard")
        set_seed(hyperparameters.seed)
        check_model_dir(task)
        check_target_modules(task)
        renderer, template_notes = load_renderer(task.files.model_dir, hyperparameters)
        notes = [
            f"{name}: {describe_skipped(rows)}"
            for name, rows in (("train", skipped), ("validation", skipped_validation))
            if rows
        ]
        notes += template_notes
        train_rows, report = encode_pairs(train_data, renderer, name="train")
        notes += report.notes("train", renderer.seq_length)
        if strategy == "kto":
            weights = {name: getattr(hyperparameters, name) for name in ("desirable_weight", "undesirable_weight")}
            notes += filter(None, [balance_note(train_rows, **weights)])
        validation_rows: list[Any] = []
        if validation_data:
            validation_rows, validation_report = encode_pairs(validation_data, renderer, name="validation")
            notes += validation_report.notes("validation", renderer.seq_length)
        for note in notes:
            log(f"note: {note}")
        startup.done("data")

        if world_size() > 1:
            notes.append(_batch_note(hyperparameters))
            log(f"note: {notes[-1]}")
        fit = partial(
            _fit,
            tokenizer=renderer.tokenizer,
            train=train_rows,
            validation=validation_rows,
            start_event={
                "skipped_rows": list(skipped),
                "dropped_rows": report.dropped,
                "prompt_too_long_rows": len(report.no_room),
                "same_after_cut_rows": len(report.same_after_cut),
                "truncated_rows": len(report.cut),
                "notes": notes,
            },
            stop=stop,
            startup=startup,
            resume_from=resume_from,
        )
        warning = ""
        try:
            trainer, callback = fit(task)
        except _FastPathError as error:
            if world_size() > 1:
                raise
            traceback.print_exception(error.__cause__, file=sys.stderr)
            warning = (
                "WARNING: the fast path failed in the first step. The run starts again without it: same losses, more time."
                f" {error}"
            )
        if warning:  # outside the except block, because its exception keeps the model in memory
            log(warning)
            notes.append(warning)
            free_memory()
            trainer, callback = fit(task.changed(fast=False))
        if stop.agreed and not callback.is_over:
            return EXIT_STOPPED
        stop.deferred = True  # only saving is left, so a stop must not interrupt it
        best_step = trainer.load_best() if hyperparameters.load_best_model_at_end else None
        if best_step is not None:
            log(f"the model is that of step {best_step}, with the best {hyperparameters.metric_for_best_model}")
        save_model(task, trainer, renderer, validation_rows or train_rows, validation_data or train_data)
        summary = callback.finish(seconds=startup.seconds, best_step=best_step)
        wait_for_all()
    except StopRequested:
        log("stopped before the first step")
        return EXIT_STOPPED
    except Exception:
        if world_size() > 1 and stop.requested:
            # SIGTERM reaches all workers when one fails or a stop is requested. An error after it is a lost connection to a
            # worker that has ended, not a cause.
            traceback.print_exc(file=sys.stderr)
            return EXIT_STOPPED
        raise
    log(f"model written, {summary['seconds']} s in all")
    log("reading: {verdict}. {text}".format(**summary["reading"]))
    return 0


class _FastPathError(TrainerError):
    """A run with the fast path failed before its first step was complete; `__cause__` has the error."""


def _fit(
    task: TrainTask,
    *,
    tokenizer: Any,
    train: list[Any],
    validation: list[Any],
    start_event: dict[str, Any],
    stop: Any,
    startup: StartupTimes,
    resume_from: str | None,
) -> tuple[Any, Any]:
    """Sets the seed, loads the model and trains it.

    Returns:
        The trainer and its RunCallback, after the last step or the step of a stop.

    Raises:
        _FastPathError: It failed before the first step was complete, and the fast path may be the cause.
    """
    from transformers import set_seed

    from palate_trainer.callbacks import EarlyStopping, Metrics, RunCallback, StopRequested, log
    from palate_trainer.fast.forward import completion_tokens_only
    from palate_trainer.model import load_model
    from palate_trainer.reference_scores import ReferenceScores
    from palate_trainer.trackers import make_trackers
    from palate_trainer.trainers import build_trainer

    hyperparameters = task.spec.hyperparameters
    notes = start_event["notes"]

    def note(line: str) -> None:
        log(line)
        if line.startswith("WARNING: "):
            notes.append(line)

    set_seed(hyperparameters.seed)  # here, so that a second attempt without the fast path gets the same random state
    threads = use_available_cores()
    log(f"loading {task.spec.model.name or task.files.model_dir} in {task.spec.precision} ({threads} threads)")
    model = load_model(task)
    startup.done("model")
    patience = hyperparameters.early_stopping_patience
    early = EarlyStopping(patience, hyperparameters.early_stopping_threshold) if patience else None
    callback = RunCallback(
        Metrics(Path(task.files.output_dir), attempt=task.files.attempt),
        stop,
        rows=len(train),
        startup=startup,
        start_event={
            "strategy": hyperparameters.training_strategy,
            "method": task.spec.method,
            "model_name": task.spec.model.name,
            "precision": task.spec.precision,
            "device": device_name(),
            "processes": world_size(),
            "train_rows": len(train),
            "validation_rows": len(validation),
            **{name: getattr(hyperparameters, name) for name in ADVICE_NAMES},
            **start_event,
        },
        trackers=make_trackers(task, note) if is_main() else (),
        early=early,
    )
    reference = ReferenceScores(task, log)
    trainer = None
    try:
        with completion_tokens_only():
            trainer = build_trainer(
                task,
                model=model,
                tokenizer=tokenizer,
                train=train,
                validation=validation,
                callbacks=[*([early] if early else []), callback],
                reference=reference,
                note=note,
            )
            if hyperparameters.training_strategy == "dpo":
                startup.done("build", reference=reference.seconds)
                callback.start_event |= reference.report()
            else:
                startup.done("build")
            if trainer.trial is not None:
                callback.start_event |= {"packed": trainer.trial.reason is None, "fused": trainer.trial.fused}
            callback.attach(trainer)
            try:
                trainer.train(resume_from_checkpoint=resume_from)
            except StopRequested:  # during an evaluation, or no step was left
                callback.checkpoint_now()
    except Exception as error:
        in_use = task.files.fast and (trainer is None or (trainer.trial is not None and trainer.trial.fast))
        if in_use and not callback.step_losses and may_be_of_the_fast_path(error):
            raise _FastPathError(explain(error)) from error
        raise
    return trainer, callback


def may_be_of_the_fast_path(error: Exception) -> bool:
    """Excludes errors with a known cause: our own, files, and out of memory (TRL's path needs more)."""
    if isinstance(error, PalateError):
        return isinstance(error, NotFiniteError)
    return not isinstance(error, OSError) and not is_out_of_memory(error)


def free_memory() -> None:
    """Returns the memory of what nobody refers to any more."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _batch_note(hyperparameters: Hyperparameters) -> str:
    rows, batches = hyperparameters.per_device_train_batch_size, hyperparameters.gradient_accumulation_steps
    return (
        f"{world_size()} processes x {rows} rows x {batches} batches: a step has {world_size() * rows * batches} rows,"
        f" {world_size()} times as many as with one process. For the same steps, divide gradient_accumulation_steps={batches}"
        f" or per_device_train_batch_size={rows} by {world_size()}."
    )


def _read_rows(task: TrainTask, path: str | None) -> tuple[list[Row], dict[int, str]]:
    """Reads one file. Also returns the invalid rows that `bad_rows` skips: row number to fault."""
    skipped: dict[int, str] = {}
    if path is None:
        return [], skipped
    rows = read_rows(
        path,
        strategy=task.spec.hyperparameters.training_strategy,
        bad_rows=task.spec.hyperparameters.bad_rows,
        on_skip=skipped.__setitem__,
    )
    return rows, skipped


def _resume_folder(task: TrainTask) -> str | None:
    if task.files.resume_from is None:
        return None
    folder = Path(task.files.resume_from)
    if not (folder / COMPLETE_MARK).is_file():
        raise TrainerError(
            f"Checkpoint {folder} is incomplete: {COMPLETE_MARK} is missing. Resume from an earlier one, or start a new job."
        )
    return str(folder)
