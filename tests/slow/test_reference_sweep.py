"""A sweep over one store: the first job scores the reference, the others find it there, and no loss moves by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from palate import ModelTrainingRecipe, Session, TrainingJob
from tests.backends.test_jobs import QUICK
from tests.slow.conftest import processes_of, until
from tests.support.rows import ROWS

pytestmark = pytest.mark.slow


def start(model: Path, prefs: Path, name: str, **hyperparameters: Any) -> TrainingJob:
    recipe = ModelTrainingRecipe(model_name="tiny", model_uri=str(model), hyperparameters={**QUICK, **hyperparameters})
    return recipe.train(inputs={"train": prefs}, job_name=name, wait=False)


def finished(job: TrainingJob) -> tuple[tuple[int, int], list[float]]:
    """Rows from the cache and rows scored, and the losses."""
    job.wait(show_logs=False, timeout_s=300)
    metrics = job.metrics()
    losses = [entry["loss"] for entry in metrics if entry["kind"] == "train"]
    return (metrics[0]["reference_cached_rows"], metrics[0]["reference_scored_rows"]), losses


@pytest.mark.parametrize("store_session", ["s3", pytest.param("file", marks=pytest.mark.thorough)], indirect=True)
def test_the_second_job_of_a_sweep_finds_all_rows_in_the_store(
    store_session: Session, home: Path, tiny: Path, prefs: Path, precision: str
) -> None:
    store = store_session.store
    assert finished(start(tiny, prefs, "one", precision=precision, learning_rate=1e-3))[0] == (0, ROWS)
    (table,) = store.list("cache")
    assert table.key.startswith("cache/reference/")
    counts, losses = finished(start(tiny, prefs, "two", precision=precision, learning_rate=2e-3))
    assert counts == (ROWS, 0)
    assert [info.key for info in store.list("cache")] == [table.key]

    store.put(table.key, b"\x00 not a table")
    counts, uncached = finished(start(tiny, prefs, "three", precision=precision, learning_rate=2e-3))
    assert counts == (0, ROWS)
    assert losses == pytest.approx(uncached, abs=1e-6)
    assert store.get(table.key).startswith(b'{"format": 1')
    until(lambda: processes_of(home) == [], timeout_s=30)  # the runner says that it is over, then ends
