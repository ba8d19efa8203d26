"""One training run, top to bottom: spec in, model folder out. Knows files, never stores or clients."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from palate_trainer.environment import prepare_environment, use_available_cores
from palate_trainer.errors import TrainerError
from palate_trainer.failures import explain
from palate_trainer.spec import (
    COMPLETE_MARK,
    ERROR_FILE,
    EXIT_FAILED,
    EXIT_STOPPED,
    TENSORBOARD_DIR,
    TrainSpec,
)
from palate_trainer.spec.preferences import read_preferences
from palate_trainer.spec.reading import ADVICE_NAMES


def run(spec: TrainSpec) -> int:
    """Trains, and says in the exit code how it ended.

    Returns:
        0 when `model/` is whole; EXIT_STOPPED after a SIGTERM; EXIT_FAILED with error.txt written.
    """
    # Until StopSignal takes over: the imports alone take seconds, and a stop in them has the same exit code.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(EXIT_STOPPED))
    output = Path(spec.output_dir)
    (output / ERROR_FILE).unlink(missing_ok=True)
    try:
        output.mkdir(parents=True, exist_ok=True)
        return _train(spec, output)
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        message = explain(error)
        print(message, file=sys.stderr, flush=True)
        write_error(output, message)
        return EXIT_FAILED


def write_error(output_dir: Path, message: str) -> None:
    """Leaves error.txt, or gives up quietly where not even that can be written: the message stands on stderr too."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / ERROR_FILE).write_text(message.rstrip() + "\n", encoding="utf-8")
    except OSError as error:
        print(f"{ERROR_FILE} cannot be written: {error}", file=sys.stderr)


def _train(spec: TrainSpec, output: Path) -> int:
    began = time.monotonic()
    hyperparameters = spec.hyperparameters
    strategy = hyperparameters["training_strategy"]

    # Everything that can be refused without ML libraries or weights comes first.
    train_pairs = read_preferences(spec.train_file, strategy=strategy)
    validation_pairs = read_preferences(spec.validation_file, strategy=strategy) if spec.validation_file else []
    resume_from = _resume_folder(spec)

    prepare_environment()
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(output / TENSORBOARD_DIR)
    from transformers import set_seed

    from palate_trainer.fused_head import completion_tokens_only
    from palate_trainer.loading import check_model_dir, load_model, load_tokenizer
    from palate_trainer.outputs import save_model
    from palate_trainer.reporting import Metrics, RunCallback, StopRequested, StopSignal, say
    from palate_trainer.tokens import Renderer, encode_pairs
    from palate_trainer.trainers import build_trainer

    stop = StopSignal()
    try:
        set_seed(hyperparameters["seed"])
        check_model_dir(spec)
        tokenizer = load_tokenizer(spec)
        renderer = Renderer(
            tokenizer=tokenizer,
            apply_chat_template=hyperparameters["apply_chat_template"],
            system_prompt=hyperparameters["system_prompt"],
            seq_length=hyperparameters["seq_length"],
        )
        renderer.check()
        train_rows, report = encode_pairs(train_pairs, renderer, name="train")
        notes = report.notes("train", renderer.seq_length)
        validation_rows: list[Any] = []
        if validation_pairs:
            validation_rows, validation_report = encode_pairs(validation_pairs, renderer, name="validation")
            notes += validation_report.notes("validation", renderer.seq_length)
        for note in notes:
            say(f"note: {note}")

        threads = use_available_cores()
        say(f"loading {spec.model_name or spec.model_dir} in {spec.precision} ({threads} threads)")
        model = load_model(spec)
        callback = RunCallback(
            Metrics(output),
            stop,
            rows=len(train_rows),
            start_event={
                "strategy": strategy,
                "method": spec.method,
                "model_name": spec.model_name,
                "precision": spec.precision,
                "train_rows": len(train_rows),
                "validation_rows": len(validation_rows),
                "dropped_rows": report.dropped,
                "truncated_rows": len(report.cut),
                **{name: hyperparameters[name] for name in ADVICE_NAMES},
                "notes": notes,
            },
        )
        with completion_tokens_only():
            trainer = build_trainer(
                spec,
                model=model,
                tokenizer=tokenizer,
                train=train_rows,
                validation=validation_rows,
                callbacks=[callback],
                note=say,
            )
            callback.attach(trainer)
            try:
                trainer.train(resume_from_checkpoint=resume_from)
            except StopRequested:  # in an evaluation, or nothing was left to train
                callback.checkpoint_now()
        if stop.requested and not callback.all_steps_done:
            return EXIT_STOPPED
        stop.deferred = True  # nothing is left but to save: that is done before a stop is obeyed
        folder = save_model(spec, trainer.model, tokenizer, validation_rows or train_rows)
        summary = callback.finish(seconds=time.monotonic() - began)
    except StopRequested:
        say("stopped before the first step")
        return EXIT_STOPPED
    say(f"{folder} written, {summary['seconds']} s in all")
    say("reading: {verdict}. {text}".format(**summary["reading"]))
    return 0


def _resume_folder(spec: TrainSpec) -> str | None:
    if spec.resume_from is None:
        return None
    folder = Path(spec.resume_from)
    if not (folder / COMPLETE_MARK).is_file():
        raise TrainerError(
            f"{folder} is no whole checkpoint: {COMPLETE_MARK} is missing. Resume from an earlier one, or start anew."
        )
    return str(folder)
