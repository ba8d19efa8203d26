"""A client as a user would write it: trains under a name, or finds the job again, and resumes it until it has its model.

Killed at any point and started again, it goes on. Every ending of an attempt that it sees is a JSON line on stdout.
"""

from __future__ import annotations

import json
import sys
import time

from palate import ModelTrainingRecipe, TrainingJob
from palate.errors import JobNotReadyError, NameTakenError, RunNotFoundError, TrainingJobError
from palate_recipes.errors import StoreError


def main(name: str, prefs: str, settings: str) -> None:
    while True:
        try:
            job = find_or_train(name, prefs, json.loads(settings))
            if ended_well(job):
                return
            resume(name)
        except (StoreError, NameTakenError) as error:
            tell("refused", str(error))
            time.sleep(0.5)


def ended_well(job: TrainingJob) -> bool:
    try:
        job.wait(show_logs=False, interval=0.5)
    except TrainingJobError as error:
        tell("ended", error.reason)
        return False
    return True


def find_or_train(name: str, prefs: str, settings: dict[str, object]) -> TrainingJob:
    try:
        return TrainingJob.get(name)
    except RunNotFoundError:
        recipe = ModelTrainingRecipe(**settings)  # type: ignore[arg-type]
        return recipe.train(inputs={"train": prefs}, wait=False, show_logs=False, job_name=name)


def resume(name: str) -> None:
    try:
        TrainingJob.get(name).resume(wait=False)
        tell("resumed", "")
    except JobNotReadyError as error:
        tell("refused", str(error))


def tell(what: str, why: str) -> None:
    print(json.dumps({"what": what, "why": why}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
