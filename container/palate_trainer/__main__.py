"""`python -m palate_trainer SPEC.json`: reads the spec, trains in one or several processes, returns the exit code."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path

from palate_recipes.errors import TrainerError
from palate_recipes.specs.train import ERROR_FILE, EXIT_FAILED, EXIT_STOPPED, TrainSpec
from palate_trainer.launch import die_with_launcher, is_worker, launch, leave, process_count


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m palate_trainer", description="Runs one training spec.")
    parser.add_argument("spec", type=Path, help="a TrainSpec as JSON")
    path = parser.parse_args(argv).spec
    # The run installs its own handler later. A stop before that must return the same exit code.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(EXIT_STOPPED))
    die_with_launcher()
    try:
        spec = TrainSpec.read(path)
    except (OSError, TypeError, json.JSONDecodeError) as error:
        print(f"{path} is not a valid train spec: {error}", file=sys.stderr)
        return EXIT_FAILED
    from palate_trainer.train import run, write_error

    if is_worker():
        return leave(run(spec, own_process=True))
    try:
        processes = process_count(spec)
    except TrainerError as error:
        print(error, file=sys.stderr)
        (Path(spec.output_dir) / ERROR_FILE).unlink(missing_ok=True)
        write_error(Path(spec.output_dir), str(error))
        return EXIT_FAILED
    return run(spec, own_process=True) if processes == 1 else launch(path, spec, processes)


if __name__ == "__main__":
    sys.exit(main())
