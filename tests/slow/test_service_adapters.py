"""Several tuned models on one base, with real trainings and vLLM: added under load, replaced, refused, removed, found after a restart.

Who answers is told by comparing with what transformers computes.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from palate import ModelTrainingRecipe, Predictor, Session, TrainingJob
from palate.checksums import DIGESTS_FILE, Checksums
from palate.errors import ServiceError
from palate_recipes.specs.serve import describe_engines
from tests.support.models import greedy, tiny_model
from tests.support.rows import preference_rows

pytestmark = [pytest.mark.slow, pytest.mark.thorough, pytest.mark.timeout(1800)]

OPTIONS = {"engine": "vllm", "dtype": "float32", "max_model_len": 512, "start_timeout_s": 240, "verify": "off"}
QUESTION = "Is it?"
TOKENS = 16
ROWS = {
    "first": preference_rows(8),
    "second": [{"prompt": "Is it?", "chosen": "No, never, not at all.", "rejected": "Yes."}] * 8,
    "third": [{"prompt": "Is it?", "chosen": "Blue and green and red.", "rejected": "Yes."}] * 8,
}


@pytest.fixture(autouse=True)
def _needs_vllm() -> None:
    vllm = next(engine for engine in describe_engines() if engine.name == "vllm")
    if vllm.distribution is None:
        pytest.skip(f"vLLM is not installed: {vllm.remedy}")


@pytest.fixture
def jobs(store_session: Session, base_model: Path, tmp_path: Path) -> dict[str, TrainingJob]:
    """Three adapters for one base, pushed far enough apart to answer differently."""
    model, trained = tiny_model(tmp_path / "model", base_model, head_dim=32), {}
    for rank, (name, rows) in zip((8, 4, 8), ROWS.items(), strict=True):
        data = tmp_path / f"{name}.json"
        data.write_text(json.dumps(rows))
        settings = {"training_strategy": "sft", "learning_rate": 5e-2, "lora_dim": rank, "num_train_epochs": 4}
        recipe = ModelTrainingRecipe(model_name="tiny", model_uri=str(model), hyperparameters=settings)
        trained[name] = recipe.train(inputs={"train": data}, job_name=name, show_logs=False)
    return trained


def ask(client: openai.OpenAI, model: str) -> str:
    messages: Any = [{"role": "user", "content": QUESTION}]
    answer = client.chat.completions.create(
        model=model, messages=messages, temperature=0, max_tokens=TOKENS, timeout=60
    )
    return answer.choices[0].message.content or ""


def computed(base: Path, adapter: Path | None) -> str:
    """Returns the answer that a model gives without an engine."""
    from transformers import AutoTokenizer

    answer = AutoTokenizer.from_pretrained(base).decode(
        greedy(base, adapter, QUESTION, TOKENS), skip_special_tokens=True
    )
    assert isinstance(answer, str)
    return answer


@contextmanager
def asked_all_the_time(predictor: Predictor, model: str) -> Iterator[list[str]]:
    """Four clients ask without a pause. A request that fails fails the test, and none is retried."""
    client, answers, ended = predictor.openai(max_retries=0), list[str](), threading.Event()

    def keep_asking() -> None:
        while not ended.is_set():
            answers.append(ask(client, model))

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(keep_asking) for _ in range(4)]
        try:
            yield answers
        finally:
            ended.set()
        for one in asking:
            one.result()


@pytest.mark.parametrize("store_session", ["s3"], indirect=True)
def test_adapters_come_and_go_while_the_service_answers(jobs: dict[str, TrainingJob], tmp_path: Path) -> None:
    base_folder = tmp_path / "model"
    folders = {name: tmp_path / f"saved-{name}" for name in jobs}
    for name, job in jobs.items():
        job.save_model(folders[name])
    base = computed(base_folder, None)
    tuned, second, third = (computed(base_folder, folders[name]) for name in ("first", "second", "third"))
    assert len({base, tuned, second, third}) == 4, "they must differ, or nothing is tested"

    with jobs["first"].deploy("assistant", options=OPTIONS) as predictor:
        client = predictor.openai()
        assert (ask(client, "default"), ask(client, "base")) == (tuned, base)
        with asked_all_the_time(predictor, "default") as answers:
            predictor.add_adapter("support", jobs["second"])
            assert ask(client, "support") == second, "it answers when the call returns"
            # The other one takes its name without a gap: until it answers, the previous one does.
            with asked_all_the_time(predictor, "support") as of_support:
                predictor.add_adapter("support", "third", replace=True)
                assert ask(client, "support") == third
            assert set(of_support) <= {second, third}
            predictor.add_adapter("sales", jobs["second"].model_uri)
            with ThreadPoolExecutor() as pool:
                names = ["default", "support", "base", "sales"] * 3
                together = list(pool.map(lambda name: ask(client, name), names))
            assert together == [tuned, third, base, second] * 3
        assert set(answers) == {tuned}
        assert len(answers) >= 4

        assert [one.state for one in predictor.adapters()] == ["ready", "ready"]
        assert {model.id for model in client.models.list().data} == {"default", "assistant", "base", "support", "sales"}
        predictor.remove_adapter("sales")
        with pytest.raises(openai.NotFoundError, match="support"):
            ask(client, "sales")

        # The files of this one are what its list says, so only the engine can tell that they are no weights.
        (folders["second"] / "adapter_model.safetensors").write_bytes(b"no weights")
        (folders["second"] / DIGESTS_FILE).write_bytes(Checksums.of(folders["second"]).encode())
        with pytest.raises(ServiceError, match="broken was not added to service assistant"):
            predictor.add_adapter("broken", folders["second"])
        assert [(one.name, one.state) for one in predictor.adapters()] == [("support", "ready")]
        assert [ask(client, name) for name in ("default", "support")] == [tuned, third]
        with pytest.raises(openai.NotFoundError):
            ask(client, "broken")

        predictor.stop_service()
        assert [one.state for one in predictor.adapters()] == ["not running"]
        predictor.add_adapter("sales", "second")
        predictor.start_service()
        predictor.add_adapter("sales", "second")  # waits until it answers
        predictor.add_adapter("support", "third")
        client = predictor.openai()
        assert [ask(client, name) for name in ("default", "support", "sales")] == [tuned, third, second]
