"""`python -m palate_trainer SPEC.json`: reads the task, trains in one or several processes, returns the exit code."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from palate_recipes.errors import TrainerError
from palate_recipes.specs.train import ERROR_FILE, EXIT_FAILED, EXIT_STOPPED, TrainTask
from palate_trainer.launch import die_with_launcher, is_worker, launch, leave, process_count


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m palate_trainer", description="Runs one training spec.")
    parser.add_argument("spec", type=Path, help="a TrainTask as JSON")
    path = parser.parse_args(argv).spec
    # The run installs its own handler later. A stop before that must return the same exit code.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(EXIT_STOPPED))
    die_with_launcher()
    try:
        task = TrainTask.read(path)
    except (OSError, ValueError) as error:
        print(f"{path} is not a valid train task: {error}", file=sys.stderr)
        return EXIT_FAILED
    from palate_trainer.train import run, write_error

    if is_worker():
        return leave(run(task, own_process=True))
    try:
        processes = process_count(task)
    except TrainerError as error:
        print(error, file=sys.stderr)
        (Path(task.files.output_dir) / ERROR_FILE).unlink(missing_ok=True)
        write_error(Path(task.files.output_dir), str(error))
        return EXIT_FAILED
    return run(task, own_process=True) if processes == 1 else launch(path, task, processes)


if __name__ == "__main__":
    sys.exit(main())
