"""Several tuned models on one base, with real trainings and vLLM: added under load, replaced, removed, found again after a restart."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest

from palate import ModelTrainingRecipe, Predictor, Session, TrainingJob
from palate.errors import ServiceError
from palate_recipes.specs.serve import describe_engines
from tests.support.models import tiny_model
from tests.support.rows import preference_rows

pytestmark = [pytest.mark.slow, pytest.mark.thorough, pytest.mark.timeout(1800)]

OPTIONS = {"engine": "vllm", "dtype": "float32", "max_model_len": 512, "start_timeout_s": 240, "verify": "off"}
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
    answer = client.completions.create(model=model, prompt="Is it?", temperature=0, max_tokens=16, timeout=60)
    return answer.choices[0].text


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
def test_adapters_come_and_go_while_the_service_answers(jobs: dict[str, TrainingJob]) -> None:
    alone = {}
    for name in ("second", "third"):
        with jobs[name].deploy(f"{name}-alone", options=OPTIONS) as other:
            alone[name] = ask(other.openai(), "default")

    with jobs["first"].deploy("assistant", options=OPTIONS) as predictor:
        client = predictor.openai()
        tuned, base = ask(client, "default"), ask(client, "base")
        assert len({tuned, base, *alone.values()}) == 4, "they must differ, or nothing is tested"
        with asked_all_the_time(predictor, "default") as answers:
            predictor.add_adapter("support", jobs["second"])
            assert ask(client, "support") == alone["second"], "it answers when the call returns"
            # The other one takes its name without a gap: until it answers, the previous one does.
            with asked_all_the_time(predictor, "support") as of_support:
                predictor.add_adapter("support", "third", replace=True)
                assert ask(client, "support") == alone["third"]
            assert set(of_support) <= {alone["second"], alone["third"]}
            predictor.add_adapter("sales", jobs["second"].model_uri)
            with ThreadPoolExecutor() as pool:
                names = ["default", "support", "base", "sales"] * 3
                together = list(pool.map(lambda name: ask(client, name), names))
            assert together == [tuned, alone["third"], base, alone["second"]] * 3
        assert set(answers) == {tuned}
        assert len(answers) >= 4

        assert [one.state for one in predictor.adapters()] == ["ready", "ready"]
        assert {model.id for model in client.models.list().data} == {"default", "assistant", "base", "support", "sales"}
        predictor.remove_adapter("sales")
        with pytest.raises(openai.NotFoundError, match="support"):
            ask(client, "sales")

        predictor.stop_service()
        assert [one.state for one in predictor.adapters()] == ["not running"]
        predictor.add_adapter("sales", "second")
        predictor.start_service()
        predictor.add_adapter("sales", "second")  # waits until it answers
        predictor.add_adapter("support", "third")
        client = predictor.openai()
        assert [ask(client, name) for name in ("default", "support", "sales")] == [
            tuned,
            alone["third"],
            alone["second"],
        ]


@pytest.mark.parametrize("store_session", ["file"], indirect=True)
def test_an_adapter_that_the_engine_refuses_is_taken_back(
    store_session: Session, jobs: dict[str, TrainingJob], tmp_path: Path
) -> None:
    """Its files are what its list says, so only the engine can tell that they are no weights."""
    from palate.checksums import DIGESTS_FILE, Checksums

    folder = tmp_path / "no-weights"
    jobs["second"].save_model(folder)
    (folder / "adapter_model.safetensors").write_bytes(b"no weights")
    (folder / DIGESTS_FILE).write_bytes(Checksums.of(folder).encode())
    with jobs["first"].deploy("assistant", options=OPTIONS) as predictor:
        client = predictor.openai()
        tuned = ask(client, "default")
        predictor.add_adapter("support", jobs["second"])
        support = ask(client, "support")
        with pytest.raises(ServiceError, match="broken was not added to service assistant"):
            predictor.add_adapter("broken", folder)
        assert [(one.name, one.state) for one in predictor.adapters()] == [("support", "ready")]
        assert [ask(client, name) for name in ("default", "support")] == [tuned, support]
        with pytest.raises(openai.NotFoundError):
            ask(client, "broken")
