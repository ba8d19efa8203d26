"""Services over every backend, with the real engine: deployed from a job, asked, stopped, deleted; and what a failed start leaves."""

from __future__ import annotations

import asyncio
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import openai
import pytest

import palate.session
from palate import ModelTrainingRecipe, Predictor, Session, TrainingJob, setup_default_session
from palate.deploy import ServedModel, start_service
from palate.errors import ConfigurationError, NameTakenError, RunNotFoundError, ServiceError
from palate.predictor import TOKENS_TAKEN_S
from palate.runs.record import TOKEN_KEY
from palate.store import open_store
from palate_recipes.specs.serve import describe_engines
from tests.backends.hands import Hands
from tests.slow.conftest import until
from tests.support.rows import preference_rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

NEEDS_SERVER = True

SERVICE = "smol_example"
LIMITS = {"max_model_len": 512, "start_timeout_s": 240}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, base_model: Path) -> Iterator[tuple[Path, str]]:
    """A home with one succeeded job: SmolLM2, pushed far enough by a few steps to answer differently."""
    import json

    folder = tmp_path_factory.mktemp("trained")
    prefs = folder / "prefs.json"
    prefs.write_text(json.dumps(preference_rows(8)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PALATE_HOME", str(folder / "home"))
        patch.setattr(palate.session, "_default", None)
        settings = {
            "training_strategy": "dpo",
            "learning_rate": 2e-3,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 1,
        }
        recipe = ModelTrainingRecipe("smollm2-135m-instruct", model_uri=str(base_model), hyperparameters=settings)
        job = recipe.train(inputs={"train": prefs}, show_logs=False)
        yield folder / "home", job.id


@pytest.fixture
def home(home: Path, trained: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home with the job; the setting of a test's own home has kept the user's settings out."""
    monkeypatch.setenv("PALATE_HOME", str(trained[0]))
    return trained[0]


@pytest.fixture
def job(hands: Hands, trained: tuple[Path, str], request: pytest.FixtureRequest) -> TrainingJob:
    """The job, found again in its store as any process would; it was trained by the process backend, and this may be another."""
    record = Session().store.root + f"/jobs/{trained[1]}"
    if getattr(request, "param", "file") == "s3":
        bring_to_s3(request, record)
    return TrainingJob.attach(trained[1])


def bring_to_s3(request: pytest.FixtureRequest, job_uri: str) -> None:
    """Makes an S3 store the default one, and gives it the job: a record means the same wherever it lies."""
    seaweed, monkeypatch = request.getfixturevalue("seaweed"), request.getfixturevalue("monkeypatch")
    for name, value in seaweed.environment().items():
        monkeypatch.setenv(name, value)
    store = f"s3://{request.getfixturevalue('bucket')}/services-{request.node.name.replace('[', '-').strip(']')}"
    source, target = open_store(job_uri), open_store(f"{store}/jobs/{job_uri.rpartition('/')[2]}")
    for info in source.list(""):
        target.put(info.key, source.get(info.key))
    monkeypatch.setenv("PALATE_STORE", store)
    setup_default_session()


def is_free(endpoint: str) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", urlsplit(endpoint).port or 0)) != 0


def ask(client: openai.OpenAI, model: str) -> str:
    reply = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "Is 3 an even number?"}], temperature=0, max_tokens=24
    )
    return reply.choices[0].message.content or ""


@pytest.mark.parametrize("job", ["file", pytest.param("s3", marks=pytest.mark.thorough)], indirect=True)
def test_a_service_from_its_deployment_to_its_deletion(hands: Hands, job: TrainingJob, home: Path) -> None:
    predictor = job.deploy(SERVICE, options=LIMITS)
    assert predictor.service_status == "Running"
    endpoint = predictor.endpoint
    assert endpoint.startswith("http://127.0.0.1:")
    parity = predictor.describe_service()["parity"]
    print(parity)
    assert parity["verdict"] == "same", parity

    # Who holds the store's address holds the service: nothing else is needed.
    held = Predictor(SERVICE, session=Session())
    client = held.openai()
    assert [model.id for model in client.models.list().data] == ["default", SERVICE, "base"]
    tuned, base = ask(client, "default"), ask(client, "base")
    assert tuned != base
    assert ask(client, SERVICE) == tuned == ask(client, client.models.list().data[0].id)

    # Both models in one batch answer as they do alone.
    with ThreadPoolExecutor() as pool:
        together = list(pool.map(lambda model: ask(client, model), ["base", "default"] * 3))
    assert together == [base, tuned] * 3

    async def ask_async() -> str:
        async with held.async_openai() as asynchronous:
            reply = await asynchronous.completions.create(
                model="base", prompt="The capital of France is", max_tokens=4, temperature=0
            )
            return reply.choices[0].text

    assert "Paris" in asyncio.run(ask_async())
    assert held.predict({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2})["choices"]
    assert held.raw_predict(path="/v1/models", method="GET").status_code == 200
    assert held.raw_predict({"model": "absent", "messages": []}).status_code == 404
    assert held.raw_predict({"messages": []}, headers={"Authorization": "Bearer wrong"}).status_code == 401
    with pytest.raises(ServiceError, match="404"):
        held.predict({"model": "absent", "messages": [{"role": "user", "content": "Hi"}]})

    spoken = subprocess.run(
        [
            sys.executable,
            "-m",
            "palate.cli",
            "chat",
            SERVICE,
            "Is 3 an even number?",
            "--temperature",
            "0",
            "--max-tokens",
            "24",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert spoken.stdout.strip() == _with_system(client)

    token = held.access_token
    assert len(token) >= 32
    store = job._run.session.store
    if store.root.startswith("file:"):
        assert stat.S_IMODE((home / "store" / "services" / SERVICE / TOKEN_KEY).stat().st_mode) == 0o600
    for info in store.list(f"services/{SERVICE}/"):
        assert info.key.endswith(TOKEN_KEY) or token.encode() not in store.get(info.key), info.key
    assert token not in repr(held) + str(held.describe_service())
    assert token not in hands.shown(held._run.refresh().engine_id)
    assert held.describe_service()["Labels"] == {"job": job.id}

    with pytest.raises(NameTakenError, match=SERVICE):
        job.deploy(SERVICE, options=LIMITS)
    port = urlsplit(endpoint).port
    with pytest.raises(ConfigurationError, match=f"port {port}"):
        job.deploy("other", options={"port": port})
    assert [found.service_name for found in Predictor.list()] == [SERVICE]

    held.stop_service()
    assert held.service_status == "Stopped"
    assert is_free(endpoint)
    until(lambda: hands.left() == [], timeout_s=30)  # the runner says that it is over, then ends
    with pytest.raises(ServiceError, match="Stopped"):
        _ = held.endpoint

    predictor.delete_service()
    predictor.delete_service()  # twice is no error
    with pytest.raises(RunNotFoundError):
        Predictor(SERVICE)
    until(lambda: hands.left() == [], timeout_s=30)  # the runner says that it is over, then ends


def _with_system(client: openai.OpenAI) -> str:
    reply = client.chat.completions.create(
        model="default",
        messages=[
            {"role": "system", "content": "You are a helpful assistant"},
            {"role": "user", "content": "Is 3 an even number?"},
        ],
        temperature=0,
        max_tokens=24,
    )
    return (reply.choices[0].message.content or "").strip()


@pytest.mark.thorough
@pytest.mark.parametrize("hands", ["process"], indirect=True)
def test_a_merged_adapter_is_one_model_after_a_restart_too(hands: Hands, job: TrainingJob) -> None:
    predictor = job.deploy("merged", options={**LIMITS, "merge": True, "dtype": "float32"})
    for start in ("first", "second"):
        if start == "second":
            predictor.stop_service()
            predictor.start_service()
        assert [model.id for model in predictor.openai().models.list().data] == ["default", "merged"]
        parity = predictor.describe_service()["parity"]
        assert parity["verdict"] == "same", parity
        assert "effect" not in parity  # a service of one model has no base to compare with
        assert any("rounded to float32, the merged weights keep 100%" in line for line in predictor.logs())
    predictor.delete_service()


@pytest.mark.parametrize("hands", ["process"], indirect=True)
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"engine": "vlm"}, ["engine", "vlm"]),
        ({"prot": 8000}, ["'prot'", "'port'"]),
        ({"port": "8000"}, ["port='8000'", "int"]),
        ({"port": 70000}, ["70000"]),
        ({"time_to_live_s": 0}, ["time_to_live_s"]),
        ({"start_timeout_s": -1}, ["start_timeout_s"]),
        ({"idle_time_to_live_s": 0}, ["idle_time_to_live_s"]),
        ({"engine_args": ["--middleware", "x.Y"]}, ["--middleware", "PALATE_ENGINE_ARGS"]),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(
    job: TrainingJob, options: dict[str, object], words: list[str]
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        job.deploy("never", options=options)
    for word in words:
        assert word in str(caught.value)
    assert Predictor.list() == []


@pytest.mark.parametrize("hands", ["process"], indirect=True)
@pytest.mark.parametrize("name", ["", "a/b", "../up", "default", "base", "x" * 101])
def test_a_service_name_that_cannot_be_used_is_refused(job: TrainingJob, name: str) -> None:
    with pytest.raises(ConfigurationError):
        start_service(job._run.session, service_name=name, served=ServedModel(model={}))


def test_a_start_that_fails_or_hangs_raises_with_the_engines_words_and_leaves_nothing(
    hands: Hands, job: TrainingJob
) -> None:
    with pytest.raises(ServiceError) as caught:
        job.deploy("broken", options={**LIMITS, "engine": "vllm", "engine_args": ["--stream-interval=0"]})
    # The images have vLLM; an environment of the variant transformers has none.
    lacks = job._run.session.backend.uses_this_python and any(
        engine.missing for engine in describe_engines() if engine.name == "vllm"
    )
    assert ("needs vllm" if lacks else "stream_interval") in str(caught.value)
    assert Predictor("broken").service_status == "Failed"
    until(lambda: hands.left() == [], timeout_s=30)  # the runner says that it is over, then ends
    with pytest.raises(ServiceError, match="3"):  # the name is free again; this time the start hangs
        job.deploy("broken", options={"start_timeout_s": 3})
    until(lambda: hands.left() == [], timeout_s=30)  # the runner says that it is over, then ends
    Predictor("broken").delete_service()


def untuned(job: TrainingJob, name: str, **options: object) -> Predictor:
    """The base model alone on the engine of last resort, which starts in seconds."""
    return start_service(
        job._run.session,
        service_name=name,
        served=ServedModel(model=job.manifest.body.model),
        options={"engine": "transformers", **options},
    )


def damaged_copy(job: TrainingJob) -> TrainingJob:
    """A job whose weights are not what was trained, although their size is."""
    store = job._run.session.store
    for info in store.list(f"jobs/{job.id}/"):
        data = store.get(info.key)
        if info.key.endswith("adapter_model.safetensors"):
            data = data[:-1] + bytes([data[-1] ^ 1])
        store.put(info.key.replace(job.id, "damaged", 1), data)
    return TrainingJob.attach("damaged")


def test_a_service_is_stopped_started_updated_and_missed_when_it_is_killed(hands: Hands, job: TrainingJob) -> None:
    predictor = untuned(job, "untuned")
    client, endpoint = predictor.openai(), predictor.endpoint
    assert [model.id for model in client.models.list().data] == ["default", "untuned"]
    before = ask(client, "default")
    # On every backend the runner brings tokens to the gateway; they survive a stop and a start.
    alice = predictor.add_token("alice", concurrency=8)
    named = openai.OpenAI(base_url=f"{endpoint}/v1", api_key=alice)
    assert ask(named, "default") == before
    predictor.stop_service()
    until(lambda: hands.left() == [], timeout_s=30)  # the runner says that it is over, then ends
    predictor.start_service()
    assert predictor.endpoint == endpoint
    assert ask(client, "untuned") == ask(named, "untuned") == before, (
        "the clients of before work again: the port stayed"
    )
    token, begun = predictor.access_token, time.monotonic()
    assert predictor.rotate_token() == predictor.access_token != token
    predictor.remove_token("alice")
    assert time.monotonic() - begun < 3 * TOKENS_TAKEN_S  # the new value accepted, the old one refused, and alice's
    for refused in (token, alice):
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{endpoint}/v1", api_key=refused).models.list()
    assert [known.name for known in predictor.tokens()] == ["default"]

    # What it serves is another job's from now on; one that does not come up changes nothing.
    token = predictor.access_token
    predictor.update_service(job)
    assert predictor.labels == {"job": job.id}
    assert predictor.endpoint == endpoint
    assert [model.id for model in predictor.openai().models.list().data] == ["default", "untuned", "base"]
    tuned = ask(predictor.openai(), "default")
    assert (tuned != before, predictor.access_token) == (True, token)
    with pytest.raises(ServiceError, match=r"could not be updated to job damaged.*previous model.*missing or changed"):
        predictor.update_service(damaged_copy(job))
    assert ask(predictor.openai(), "default") == tuned

    endpoint = predictor.endpoint
    hands.kill(predictor._run.refresh().engine_id)
    until(lambda: predictor.service_status == "Failed", timeout_s=20)
    until(lambda: hands.left() == [] and is_free(endpoint), timeout_s=20)
    assert "runner died" in predictor.describe_service()["Reason"]
    predictor.delete_service()


def copied(job: TrainingJob, name: str) -> TrainingJob:
    """Another job with the same model."""
    store = job._run.session.store
    for info in store.list(f"jobs/{job.id}/"):
        store.put(info.key.replace(job.id, name, 1), store.get(info.key))
    return TrainingJob.attach(name)


@pytest.mark.thorough
@pytest.mark.parametrize("hands", ["process"], indirect=True)
def test_no_request_fails_while_a_service_is_updated_and_returns(hands: Hands, job: TrainingJob) -> None:
    """Three clients ask all the time: over a hot load, a canary, a failed update, and a rollback.

    Other numbers of engines are in tests/serve/test_updates over small ones, and in test_serving_load over vLLM.
    """
    predictor = job.deploy("steady", options=LIMITS)
    endpoint, failures, answered, ended = predictor.endpoint, [], [], threading.Event()

    def load(model: str) -> None:
        client = predictor.openai(max_retries=0)
        while not ended.is_set():
            try:
                answered.append((model, ask(client, model)))
            except openai.OpenAIError as error:
                failures.append((model, repr(error)))

    threads = [threading.Thread(target=load, args=(model,)) for model in ("default", "steady", "base")]
    for thread in threads:
        thread.start()
    try:
        begun = time.monotonic()
        predictor.update_service(copied(job, "second"))
        print(f"hot load: {time.monotonic() - begun:.1f} s")
        assert (predictor.labels, predictor.endpoint) == ({"job": "second"}, endpoint)
        with pytest.raises(ServiceError, match=r"could not be updated to job damaged.*missing or changed"):
            predictor.update_service(damaged_copy(job))
        predictor.update_service(copied(job, "third"), traffic=0.5)
        assert [(one.name, one.state, one.share) for one in predictor.versions()[-2:]] == [
            ("v3", "failed", 0.0),
            ("v4", "ready", 0.5),
        ]
        predictor.promote()
        assert predictor.labels == {"job": "third"}
        begun = time.monotonic()
        predictor.rollback()
        print(f"rollback: {time.monotonic() - begun:.1f} s")
        assert predictor.labels == {"job": "second"}
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    print(f"{len(answered)} answers")
    assert failures == []
    # The model is the same in all versions, so the answers are.
    assert len({text for model, text in answered if model != "base"}) == 1
    predictor.delete_service()


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        # The test below ends one that was renewed; the idle one is also in tests/serve.
        pytest.param("time_to_live_s", "its time to live is over", marks=pytest.mark.thorough),
        pytest.param("idle_time_to_live_s", "no request for", marks=pytest.mark.thorough),
    ],
)
def test_a_service_stops_by_itself_when_its_time_is_over(
    hands: Hands, job: TrainingJob, option: str, reason: str
) -> None:
    with untuned(job, "brief", **{option: 3}) as predictor:
        endpoint = predictor.endpoint
        until(lambda: predictor.service_status == "Stopped", timeout_s=30)
        assert reason in predictor.describe_service()["Reason"]
        until(lambda: is_free(endpoint), timeout_s=30)  # the runner says that it is over, then ends
    assert Predictor.list() == []


def test_a_running_service_is_renewed_and_ends_without_its_client(hands: Hands, job: TrainingJob) -> None:
    with untuned(job, "renewed", time_to_live_s=3600) as predictor:
        assert predictor.describe_service()["EndsAt"] == pytest.approx(time.time() + 3600, abs=300)
        begun = time.monotonic()
        predictor.renew(None)
        assert predictor.describe_service()["EndsAt"] is None
        predictor.renew(3)
        assert time.monotonic() - begun < 2 * TOKENS_TAKEN_S
        until(lambda: predictor.service_status == "Stopped", timeout_s=30)
        assert predictor.describe_service()["Reason"] == "its time to live is over"
        # It has the renewed time at its next start, too, and the runner writes when that ends.
        predictor.renew(7200)
        predictor.start_service()
        assert predictor.describe_service()["EndsAt"] == pytest.approx(time.time() + 7200, abs=300)
