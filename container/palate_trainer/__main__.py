"""`python -m palate_trainer SPEC.json`: reads the spec, runs it, exits with its code."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from palate_trainer.spec import EXIT_FAILED, TrainSpec


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m palate_trainer", description="Runs one training spec.")
    parser.add_argument("spec", type=Path, help="a TrainSpec as JSON")
    path = parser.parse_args(argv).spec
    try:
        spec = TrainSpec.read(path)
    except (OSError, TypeError, json.JSONDecodeError) as error:
        print(f"{path} is no train spec: {error}", file=sys.stderr)
        return EXIT_FAILED
    from palate_trainer.train import run

    return run(spec)


if __name__ == "__main__":
    sys.exit(main())
