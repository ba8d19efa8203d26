"""A job that the version before the typed records left goes on, and one that it finished is served: real programs over both."""

from __future__ import annotations

from pathlib import Path

import pytest

from palate import Session, TrainingJob
from tests.slow.conftest import processes_of, until
from tests.support.fixtures import records_v1
from tests.support.trainings import losses

pytestmark = pytest.mark.slow


def test_a_job_of_an_earlier_version_goes_on(session: Session, home: Path) -> None:
    records_v1(home)
    job = TrainingJob.get("failed").resume(show_logs=False)
    status = job.describe()
    assert (status.state, status.attempt) == ("Succeeded", 2)
    assert any("attempt 2, resuming from checkpoint-" in line for line in job.logs())
    steps = [step for step, _ in losses(job)]
    assert steps == sorted(set(steps))
    assert steps[-1] == job.metrics()[-1]["step"]
    until(lambda: processes_of(home) == [], timeout_s=30)


def test_a_job_of_an_earlier_version_is_served(session: Session, home: Path) -> None:
    records_v1(home)
    with TrainingJob.get("whole").deploy("again", options={"engine": "transformers", "dtype": "float32"}) as predictor:
        answer = predictor.predict({"messages": [{"role": "user", "content": "Is 2 even?"}], "max_tokens": 4})
        assert answer["choices"][0]["message"]["role"] == "assistant"
    until(lambda: processes_of(home) == [], timeout_s=30)
