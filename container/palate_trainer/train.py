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
from palate_trainer.distributed import join_group, wait_for_all, world_size
from palate_trainer.env import keep_one_gpu, lean_imports, prepare_environment, use_available_cores
from palate_trainer.failures import explain, is_out_of_memory
from palate_trainer.throughput import StartupTimes


def run(task: TrainTask, *, own_process: bool = False) -> int:
    """Trains, and says in the exit code how it ended.

    Args:
        task: The run.
        own_process: This process does nothing but this run, so libraries that it has no use for are kept out of it.

    Returns:
        0 when `model/` is whole; EXIT_STOPPED after a SIGTERM; EXIT_FAILED with error.txt written.
    """
    # Until StopSignal takes over: the imports alone take seconds, and a stop in them has the same exit code.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(EXIT_STOPPED))
    output = Path(task.files.output_dir)
    if world_size() == 1:  # the launcher of several has done it, and one of them may already have failed
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
            # The launcher begins anew without the fast path: alone this process cannot, the others wait for it.
            (output / FAST_PATH_FAILED_FILE).write_text(message, encoding="utf-8")
        return EXIT_FAILED


def write_error(output_dir: Path, message: str) -> bool:
    """Leaves error.txt, or gives up quietly where not even that can be written: the message stands on stderr too.

    Of several processes the first one's message stays: when one ends, the others fail for the loss of it.

    Returns:
        Whether this message is the one that stays.
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

    # Everything that can be refused without ML libraries or weights comes first.
    train_data, skipped = _read_rows(task, task.files.train_file)
    validation_data, skipped_validation = _read_rows(task, task.files.validation_file)
    resume_from = _resume_folder(task)
    startup.done("read")

    prepare_environment()
    keep_one_gpu()
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(output / TENSORBOARD_DIR)
    with importing:
        from transformers import set_seed

        from palate_trainer.callbacks import StopRequested, StopSignal, log
        from palate_trainer.model import check_model_dir, check_target_modules
        from palate_trainer.save import save_model
        from palate_trainer.template_probe import take_out_system_default
        from palate_trainer.tokenize import Renderer, encode_pairs, load_tokenizer, stop_token_ids
        from palate_trainer.trainers import build_trainer  # noqa: F401  # what a run needs is imported by here
        from palate_trainer.trainers.kto import balance_note

    startup.done("imports")
    stop = StopSignal()
    try:
        join_group(sharded=hyperparameters.fsdp == "full_shard")
        set_seed(hyperparameters.seed)
        check_model_dir(task)
        check_target_modules(task)
        tokenizer = load_tokenizer(task.files.model_dir)
        renderer = Renderer(
            tokenizer=tokenizer,
            apply_chat_template=hyperparameters.apply_chat_template,
            system_prompt=hyperparameters.system_prompt,
            seq_length=hyperparameters.seq_length,
            stop_ids=stop_token_ids(task.files.model_dir),
        )
        renderer.check()
        notes = [
            f"{name}: {describe_skipped(rows)}"
            for name, rows in (("train", skipped), ("validation", skipped_validation))
            if rows
        ]
        if renderer.apply_chat_template and not renderer.system_prompt.strip():
            notes += filter(None, [take_out_system_default(tokenizer)])
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
            tokenizer=tokenizer,
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
                "WARNING: the fast path failed before the first step was done, and the run begins anew TRL's own way: the same"
                f" losses, more time. {error}"
            )
        if warning:  # out of the block above, whose exception keeps the model in memory
            log(warning)
            notes.append(warning)
            _free_memory()
            trainer, callback = fit(task.changed(fast=False))
        if stop.agreed and not callback.all_steps_done:
            return EXIT_STOPPED
        stop.deferred = True  # nothing is left but to save: that is done before a stop is obeyed
        folder = save_model(task, trainer, tokenizer, validation_rows or train_rows)
        summary = callback.finish(seconds=startup.seconds)
        wait_for_all()
    except StopRequested:
        log("stopped before the first step")
        return EXIT_STOPPED
    except Exception:
        if world_size() > 1 and stop.requested:
            # Told to end, as all are when one fails or a stop is asked for; what fails then is the tie to one that is gone.
            traceback.print_exc(file=sys.stderr)
            return EXIT_STOPPED
        raise
    log(f"{folder} written, {summary['seconds']} s in all")
    log("reading: {verdict}. {text}".format(**summary["reading"]))
    return 0


class _FastPathError(TrainerError):
    """A run with the fast path failed before its first step was done; its cause says how."""


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
    """Loads the model and trains it, from the seed on.

    Returns:
        The trainer and its RunCallback, after the last step or the one at which a stop came.

    Raises:
        _FastPathError: It failed before the first step was done, and `files.fast` allowed what may be the cause.
    """
    from transformers import set_seed

    from palate_trainer.callbacks import Metrics, RunCallback, StopRequested, log
    from palate_trainer.fast.forward import completion_tokens_only
    from palate_trainer.model import load_model
    from palate_trainer.reference_scores import ReferenceScores
    from palate_trainer.trainers import build_trainer

    hyperparameters = task.spec.hyperparameters
    notes = start_event["notes"]

    def note(line: str) -> None:
        log(line)
        if line.startswith("WARNING: "):
            notes.append(line)

    set_seed(hyperparameters.seed)  # here: a run that begins anew begins alike
    threads = use_available_cores()
    log(f"loading {task.spec.model.name or task.files.model_dir} in {task.spec.precision} ({threads} threads)")
    model = load_model(task)
    startup.done("model")
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
            "processes": world_size(),
            "train_rows": len(train),
            "validation_rows": len(validation),
            **{name: getattr(hyperparameters, name) for name in ADVICE_NAMES},
            **start_event,
        },
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
                callbacks=[callback],
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
            except StopRequested:  # in an evaluation, or nothing was left to train
                callback.checkpoint_now()
    except Exception as error:
        in_use = task.files.fast and (trainer is None or (trainer.trial is not None and trainer.trial.fast))
        if in_use and not callback.step_losses and _may_be_of_the_fast_path(error):
            raise _FastPathError(explain(error)) from error
        raise
    return trainer, callback


def _may_be_of_the_fast_path(error: Exception) -> bool:
    """Not what says its own cause: our errors, files, too little memory (TRL's way takes more)."""
    if isinstance(error, PalateError):
        return isinstance(error, NotFiniteError)
    return not isinstance(error, OSError) and not is_out_of_memory(error)


def _free_memory() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _batch_note(hyperparameters: Hyperparameters) -> str:
    rows, batches = hyperparameters.per_device_train_batch_size, hyperparameters.gradient_accumulation_steps
    return (
        f"{world_size()} processes x {rows} rows x {batches} batches: a step takes {world_size() * rows * batches} rows,"
        f" {world_size()} times those of one process. To keep its steps, divide gradient_accumulation_steps={batches}"
        f" or per_device_train_batch_size={rows} by {world_size()}."
    )


def _read_rows(task: TrainTask, path: str | None) -> tuple[list[Row], dict[int, str]]:
    """Rows of one file, and the wrong rows that `bad_rows` lets be left out, by number."""
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
            f"{folder} is no whole checkpoint: {COMPLETE_MARK} is missing. Resume from an earlier one, or start anew."
        )
    return str(folder)
