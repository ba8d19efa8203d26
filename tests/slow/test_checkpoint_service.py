"""A checkpoint on real vLLM, of a job that still trains: it is asked, and a running service goes on to a later one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from palate import ModelTrainingRecipe, Predictor, Session
from palate_recipes.specs.serve import describe_engines
from tests.slow.conftest import until
from tests.support.models import tiny_model
from tests.support.trainings import SETTINGS, last_checkpoint

vllm = next(engine for engine in describe_engines() if engine.name == "vllm")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.thorough,
    pytest.mark.timeout(900),
    pytest.mark.skipif(vllm.distribution is None, reason="vLLM is not installed"),
]

ENGINE: dict[str, Any] = {"engine": "vllm", "max_model_len": 512, "dtype": "float32"}


def first_token(predictor: Predictor, model: str) -> dict[str, float]:
    """Returns the log-probabilities of the most likely first tokens of an answer."""
    with predictor.openai() as client:
        answer = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "Is 3 an even number?"}],
            max_tokens=1,
            temperature=0,
            logprobs=True,
            top_logprobs=5,
        )
    content = answer.choices[0].logprobs.content  # type: ignore[union-attr]
    return {token.token: token.logprob for token in content[0].top_logprobs}  # type: ignore[index]


def differ(one: dict[str, float], other: dict[str, float]) -> bool:
    return one.keys() != other.keys() or max(abs(one[token] - other[token]) for token in one) > 1e-3


def test_a_checkpoint_of_a_job_that_trains_is_served_by_vllm_and_replaced_by_a_later_one(
    session: Session, tmp_path: Path, base_model: Path, prefs: Path
) -> None:
    model = tiny_model(tmp_path / "model", base_model, head_dim=32)
    settings = {**SETTINGS, "learning_rate": 1e-3, "save_steps": 50, "max_steps": 100_000}
    job = ModelTrainingRecipe(model_name="tiny", model_uri=str(model), hyperparameters=settings).train(
        inputs={"train": prefs}, wait=False
    )
    until(lambda: last_checkpoint(job) > 0)
    first = next(one for one in job.checkpoints() if one.is_complete)
    assert (first.step, first.metrics["step"]) == (50, 50)
    with job.deploy("early", checkpoint=first.step, options=ENGINE) as predictor:
        assert job.status == "Running"
        assert predictor.labels == {"job": job.id, "checkpoint": "step-000050"}
        early, base = first_token(predictor, "default"), first_token(predictor, "base")
        assert differ(early, base), "the adapter of the checkpoint is not applied"
        job.stop()
        last = job.checkpoints()[-1]
        assert last.is_complete
        assert last.step > 100
        predictor.update_service(job, checkpoint="latest")
        assert predictor.labels["checkpoint"] == last.name
        later = first_token(predictor, "default")
        assert differ(later, early), "the service still has the earlier checkpoint"
        assert not differ(first_token(predictor, "base"), base)
