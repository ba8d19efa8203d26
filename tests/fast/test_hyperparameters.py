"""The hyperparameter schema: bounds, rules between values, resolution on machines, the page that lists it."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import asdict

from palate_recipes.errors import HyperparameterError
from palate_recipes.hyperparameters import (
    HYPERPARAMETERS,
    METHODS,
    DeviceFacts,
    Hyperparameter,
    as_definitions,
    check_method,
    describe,
    resolve,
    validate,
)
from palate_recipes.schema import LOSS_TYPES, show

ROOT = Path(__file__).parents[2]

CPU = DeviceFacts(cuda=False, bf16=False, fp16=False)
CPU_BF16 = DeviceFacts(cuda=False, bf16=True, fp16=False)
H200 = DeviceFacts(cuda=True, bf16=True, fp16=True, gpu_name="NVIDIA H200", gpu_memory_gib=139.0)
T4 = DeviceFacts(cuda=True, bf16=False, fp16=True, gpu_name="Tesla T4", gpu_memory_gib=14.6)

PAI_DEFAULTS = {
    "training_strategy": "sft",
    "learning_rate": 5e-5,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 1,
    "seq_length": 128,
    "lora_dim": 32,
    "lora_alpha": 32,
    "dpo_beta": 0.1,
    "load_in_4bit": True,
    "load_in_8bit": False,
    "gradient_accumulation_steps": 8,
    "apply_chat_template": True,
    "system_prompt": "You are a helpful assistant",
}
NUMBERS = [row for row in HYPERPARAMETERS.values() if row.type in ("int", "float")]
BOOLS = [row.name for row in HYPERPARAMETERS.values() if row.type == "bool"]
CHOICES = [row for row in HYPERPARAMETERS.values() if row.choices]


def refusal(values: Any, method: str = "LoRA_LLM") -> str:
    with pytest.raises(HyperparameterError) as error:
        validate(values, method=method)
    return str(error.value)


def check(name: str, value: object) -> Any:
    # An evaluation of SFT, the default, has no rewards.
    more = {"training_strategy": "dpo"} if "rewards" in str(value).lower() else {}
    return validate({**more, name: value}, method="Standard_LLM" if name == "lora_dim" else "LoRA_LLM")[name]


def test_pai_names_and_defaults() -> None:
    assert {name: HYPERPARAMETERS[name].default for name in PAI_DEFAULTS} == PAI_DEFAULTS


@pytest.mark.parametrize("row", HYPERPARAMETERS.values(), ids=HYPERPARAMETERS)
def test_every_row_is_complete_and_its_default_valid(row: Hyperparameter) -> None:
    assert row.meaning
    assert "|" not in row.meaning
    assert check(row.name, row.default) == row.default
    assert type(check(row.name, row.default)) is type(row.default)
    if row.type in ("int", "float"):
        assert row.minimum is not None
        assert row.maximum is not None


@pytest.mark.parametrize("row", NUMBERS, ids=lambda row: row.name)
def test_bounds(row: Hyperparameter) -> None:
    assert row.minimum is not None
    assert row.maximum is not None
    step = 1 if row.type == "int" else 1e-6
    for bound, outward, exclusive in (
        (row.minimum, -step, row.minimum_exclusive),
        (row.maximum, step, row.maximum_exclusive),
    ):
        beyond, inside = bound + outward, bound - outward
        message = refusal({row.name: beyond})
        assert f"{row.name} = {show(beyond)}: must be {row.expectation}" in message
        if exclusive:
            refusal({row.name: bound})
        else:
            assert check(row.name, bound) == bound
        assert check(row.name, inside) == inside


@pytest.mark.parametrize("row", NUMBERS, ids=lambda row: row.name)
@pytest.mark.parametrize("bad", [True, False, None, "", "helloworld", "nan", "inf", float("nan"), float("inf")])
def test_numbers_refuse_what_is_no_number(row: Hyperparameter, bad: object) -> None:
    assert row.expectation in refusal({row.name: bad})


@pytest.mark.parametrize("row", NUMBERS, ids=lambda row: row.name)
@pytest.mark.parametrize("bad", ["-inf", -float("inf"), "1e999", "1_0", "٣", "0x10", [1], {"a": 1}, "1 2", "1,5"])
def test_numbers_refuse_odd_spellings(row: Hyperparameter, bad: object) -> None:
    assert row.expectation in refusal({row.name: bad})


SPELLINGS: dict[str, list[tuple[object, object]]] = {
    "learning_rate": [("5e-5", 5e-5), (" 0.001 ", 0.001), (1, 1.0)],
    "num_train_epochs": [("1", 1.0), ("0.5", 0.5), (3, 3.0)],
    "seq_length": [("1024", 1024), (1024.0, 1024), ("1e3", 1000)],
    "lora_dim": [("64", 64)],
    "seed": [("0", 0), (4_294_967_295, 4_294_967_295)],
    "load_in_4bit": [("true", True), ("True", True), ("false", False), ("1", True), ("0", False)],
    "training_strategy": [("DPO", "dpo"), (" dpo ", "dpo")],
    "system_prompt": [("", ""), (" Reply in French. ", " Reply in French. ")],
    "target_modules": [
        ("all-linear", "all-linear"),
        ("ALL-LINEAR", "all-linear"),
        ("q_proj", ["q_proj"]),
        ("q_proj, v_proj", ["q_proj", "v_proj"]),
        (["q_proj", "v_proj", "q_proj"], ["q_proj", "v_proj"]),
        (("self_attn.q_proj",), ["self_attn.q_proj"]),
        ('["q_proj", "v_proj"]', ["q_proj", "v_proj"]),
    ],
}


@pytest.mark.parametrize(
    ("name", "given", "expected"), [(name, *pair) for name, pairs in SPELLINGS.items() for pair in pairs]
)
def test_values_come_in_their_own_type(name: str, given: object, expected: object) -> None:
    value = check(name, given)
    assert value == expected
    assert type(value) is type(expected)


def test_numbers_of_numpy_are_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    assert type(check("seq_length", numpy.int64(256))) is int
    assert type(check("learning_rate", numpy.float32(0.5))) is float


@pytest.mark.parametrize("bad", [1.5, "1.5", "2.0001"])
def test_counts_are_whole(bad: object) -> None:
    assert "whole number" in refusal({"lora_dim": bad})


@pytest.mark.parametrize("name", BOOLS)
@pytest.mark.parametrize("bad", [1, 0, 1.0, None, "yes", "", "tru", [], "2"])
def test_flags_are_true_or_false(name: str, bad: object) -> None:
    message = refusal({name: bad})
    assert f"{name} = " in message
    assert "true or false" in message


@pytest.mark.parametrize("row", CHOICES, ids=lambda row: row.name)
def test_choices(row: Hyperparameter) -> None:
    assert row.choices
    for choice in row.choices:
        assert check(row.name, choice) == choice
        assert check(row.name, choice.upper()) == choice
    for bad in ("nonsense", "", 1, True, None, [1], *([[row.choices[0]]] if row.type == "string" else [])):
        assert ", ".join(row.choices) in refusal({row.name: bad})


@pytest.mark.parametrize("bad", [None, 3, "", " , ", [], ["q_proj", 1], "q proj", ["all-linear"], "[1]", "[", {}])
def test_target_modules_refuses(bad: object) -> None:
    assert "all-linear" in refusal({"target_modules": bad})


@pytest.mark.parametrize(
    "name", ["seq_length", "learning_rate", "target_modules", "loss_weights", "loss_type", "no_such"]
)
@pytest.mark.parametrize(
    "bad",
    ["[" * 100_000, "9" * 5000, 16**5000, [[]] * 5000, "a b" * 40_000],
    ids=["deep", "digits", "huge", "lists", "long"],
)
def test_values_beyond_what_python_reads_are_refused_in_few_words(name: str, bad: object) -> None:
    with pytest.raises(HyperparameterError, match=name) as caught:
        validate({name: bad}, method="LoRA_LLM")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "method", [[1], 16**5000, "x" * 100_000, None, {}], ids=["list", "huge", "long", "none", "dict"]
)
def test_a_method_of_any_kind_is_refused_in_few_words(method: Any) -> None:
    with pytest.raises(HyperparameterError, match="unknown method") as caught:
        validate({}, method=method)
    assert len(str(caught.value)) < 1000


def test_system_prompt_is_a_string() -> None:
    assert "a string" in refusal({"system_prompt": 5})


def test_only_the_given_names_come_back() -> None:
    assert validate(None, method="LoRA_LLM") == {}
    assert validate({}, method="LoRA_LLM") == {}
    assert validate({"seed": "7"}, method="LoRA_LLM") == {"seed": 7}


@pytest.mark.parametrize("bad", ["learning_rate=1", [("seed", 1)], 3])
def test_hyperparameters_are_a_mapping(bad: Any) -> None:
    message = refusal(bad)
    assert type(bad).__name__ in message
    assert "dict" in message


MEANT = {
    "training_strategy": "training_method",
    "learning_rate": "lr leaning_rate LEARNING_RATE",
    "num_train_epochs": "epochs epoch",
    "per_device_train_batch_size": "batch_size",
    "seq_length": "max_length max_seq_length max_context_length seq_lenght",
    "lora_dim": "lora_rank lora_r r lora-rank",
    "dpo_beta": "beta Beta",
    "warmup_ratio": "warmup_steps",
    "target_modules": "lora_target",
    "gradient_accumulation_steps": "gradient_accumulation_step",
    "load_in_4bit": "load_in_4_bit",
}


@pytest.mark.parametrize(
    ("typed", "meant"), [(typed, meant) for meant, words in MEANT.items() for typed in words.split()]
)
def test_an_unknown_name_gets_the_nearest_known_one(typed: str, meant: str) -> None:
    message = refusal({typed: 1})
    assert f"{typed} = 1: unknown name; did you mean {meant}?" in message


@pytest.mark.parametrize("name", ["zzz", "", 7, None])
def test_a_far_name_is_pointed_to_the_list(name: object) -> None:
    assert "hyperparameter_definitions" in refusal({name: 1})


def test_every_problem_is_listed_at_once() -> None:
    message = refusal({"learning_rate": 2, "lr": 1, "num_train_epochs": "helloworld", "seed": 1, "lora_dim": 0})
    assert message.startswith("4 problems in the hyperparameters for LoRA_LLM:")
    for part in ("learning_rate = 2: must be", "lr = 1: unknown", '"helloworld"', "lora_dim = 0"):
        assert part in message
    assert "seed" not in message
    assert refusal({"seed": -1}).startswith("1 problem in")
    assert len(refusal({"learning_rate": "x" * 10_000})) < 300


@pytest.mark.parametrize(
    ("method", "values", "part"),
    [
        ("LoRA_LLM", {"load_in_4bit": True, "load_in_8bit": "true"}, "set only one"),
        ("QLoRA_LLM", {"load_in_4bit": True, "load_in_8bit": True}, "set only one"),
        ("Standard_LLM", {"load_in_4bit": True}, "load_in_4bit = true: Standard_LLM"),
        ("Standard_LLM", {"load_in_8bit": "true"}, "load_in_8bit = true: Standard_LLM"),
        ("LoRA_LLM", {"lora_dim": 0}, "Standard_LLM"),
        ("QLoRA_LLM", {"lora_dim": "0"}, "Standard_LLM"),
        ("QLoRA_LLM", {"load_in_4bit": False, "load_in_8bit": False}, "use method LoRA_LLM"),
        ("QLoRA_LLM", {"load_in_4bit": "false"}, "use method LoRA_LLM"),
        ("LoRA_LLM", {"target_modules": "q_proj,lm_head"}, "lm_head is the LM head"),
        ("LoRA_LLM", {"target_modules": ["model.embed_tokens"]}, "embed_tokens is an embedding"),
        ("LoRA_LLM", {"target_modules": "q_proj,input_layernorm"}, "input_layernorm is a normalisation"),
        ("LoRA_LLM", {"target_modules": "mlp.gate"}, "mlp.gate is a router of experts"),
        ("LoRA_LLM", {"training_strategy": "dpo", "loss_type": "exo_pair"}, "exo_pair needs label_smoothing above 0"),
        ("LoRA_LLM", {"loss_type": "sigmoid,sft", "loss_weights": [1]}, "1 weights for 2 losses (sigmoid, sft)"),
        ("LoRA_LLM", {"loss_weights": "0"}, "the loss would always be 0"),
    ],
)
def test_contradictions(method: str, values: dict[str, object], part: str) -> None:
    assert part in refusal(values, method)


@pytest.mark.parametrize(
    ("method", "values"),
    [
        ("LoRA_LLM", {"load_in_8bit": True}),
        ("LoRA_LLM", {"load_in_4bit": False, "load_in_8bit": True}),
        ("LoRA_LLM", {"load_in_4bit": False, "load_in_8bit": False}),
        ("QLoRA_LLM", {"load_in_8bit": True}),
        ("QLoRA_LLM", {"load_in_8bit": False}),
        ("QLoRA_LLM", {"load_in_4bit": False, "load_in_8bit": True}),
        ("Standard_LLM", {"load_in_4bit": False, "load_in_8bit": False, "lora_dim": 0}),
        ("LoRA_LLM", {"training_strategy": "sft", "dpo_beta": 0.2, "loss_type": "ipo"}),
        ("LoRA_LLM", {"training_strategy": "dpo", "target_modules": "q_proj,v_proj"}),
        ("LoRA_LLM", {"target_modules": "gate_proj,up_proj"}),
        ("LoRA_LLM", {"training_strategy": "dpo", "loss_type": "exo_pair", "label_smoothing": 1e-3}),
        ("LoRA_LLM", {"training_strategy": "dpo", "loss_type": "sigmoid,sft", "loss_weights": "1,0.5"}),
    ],
)
def test_no_contradiction(method: str, values: dict[str, object]) -> None:
    validate(values, method=method)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("lora", "LoRA_LLM"), ("QLora", "QLoRA_LLM"), ("lora_llm", "LoRA_LLM"), ("full", "Standard_LLM")],
)
def test_unknown_method(typed: str, meant: str) -> None:
    for call in (lambda: validate({}, method=typed), lambda: resolve({}, method=typed, device=CPU)):
        with pytest.raises(HyperparameterError) as error:
            call()
        assert f'{typed!r}: unknown method; did you mean "{meant}"?' in str(error.value)
        assert all(method in str(error.value) for method in METHODS)


def test_known_methods() -> None:
    assert list(METHODS) == ["LoRA_LLM", "QLoRA_LLM", "Standard_LLM"]
    assert [check_method(method) for method in METHODS] == list(METHODS)
    with pytest.raises(HyperparameterError, match="unknown method; The methods"):
        check_method("zzzz")


@pytest.mark.parametrize(
    ("method", "values", "device", "bits", "precision", "words"),
    [
        ("LoRA_LLM", {}, CPU, "", "float32", ["CUDA", "float32"]),
        ("LoRA_LLM", {}, CPU_BF16, "", "bfloat16", ["CUDA", "bfloat16"]),
        ("LoRA_LLM", {}, H200, "4", "bfloat16", []),
        ("LoRA_LLM", {}, T4, "4", "float16", ["Tesla T4"]),
        ("LoRA_LLM", {}, DeviceFacts(True, False, False), "4", "float32", []),
        ("LoRA_LLM", {"load_in_4bit": False}, CPU, "", "float32", []),
        ("LoRA_LLM", {"load_in_4bit": "true"}, CPU, "4", "float32", ["as requested"]),
        ("LoRA_LLM", {"load_in_8bit": True}, H200, "8", "bfloat16", []),
        (
            "LoRA_LLM",
            {"load_in_8bit": True},
            CPU,
            "8",
            "float32",
            ["as requested"],
        ),
        ("LoRA_LLM", {"load_in_4bit": False, "load_in_8bit": True}, H200, "8", "bfloat16", []),
        ("LoRA_LLM", {"load_in_8bit": False}, H200, "4", "bfloat16", []),
        ("QLoRA_LLM", {}, H200, "4", "bfloat16", []),
        ("QLoRA_LLM", {}, T4, "4", "float16", ["Tesla T4"]),
        ("QLoRA_LLM", {}, CPU_BF16, "4", "bfloat16", ["as requested"]),
        ("QLoRA_LLM", {"load_in_8bit": True}, H200, "8", "bfloat16", []),
        ("Standard_LLM", {}, H200, "", "bfloat16", []),
        ("Standard_LLM", {}, CPU, "", "float32", []),
        ("Standard_LLM", {"load_in_4bit": False}, T4, "", "float16", ["Tesla T4"]),
        ("Standard_LLM", {"load_in_4bit": False, "precision": "float32"}, H200, "", "float32", []),
        ("LoRA_LLM", {"load_in_4bit": False, "precision": "float16"}, T4, "", "float16", []),
        ("LoRA_LLM", {"load_in_4bit": False, "precision": "auto"}, CPU, "", "float32", []),
        ("LoRA_LLM", {"load_in_4bit": False, "precision": "float32"}, CPU_BF16, "", "float32", []),
        ("LoRA_LLM", {"load_in_4bit": False, "precision": "BFloat16"}, CPU_BF16, "", "bfloat16", []),
        ("LoRA_LLM", {"load_in_4bit": False, "precision": "bfloat16"}, CPU, "", "bfloat16", ["emulated"]),
    ],
)
def test_resolution_of_bits_and_precision(
    method: str, values: dict[str, object], device: DeviceFacts, bits: str, precision: str, words: list[str]
) -> None:
    resolved = resolve(values, method=method, device=device)
    assert resolved.values.load_in_4bit is (bits == "4")
    assert resolved.values.load_in_8bit is (bits == "8")
    assert resolved.precision == precision
    text = "\n".join(resolved.notes)
    assert all(word in text for word in words)
    assert bool(resolved.notes) == bool(words)
    assert all(note.endswith(".") and "\n" not in note for note in resolved.notes)


@pytest.mark.parametrize(
    ("precision", "device", "words"),
    [
        ("float16", CPU, 'precision = "float16": a CPU cannot train in float16; use "float32"'),
        ("float16", CPU_BF16, 'precision = "float16": a CPU cannot train in float16; use "float32"'),
        ("bfloat16", T4, 'precision = "bfloat16": Tesla T4 does not support it (it needs compute capability 8.0)'),
    ],
)
def test_a_precision_that_the_machine_lacks_is_refused_with_the_remedy(
    precision: str, device: DeviceFacts, words: str
) -> None:
    with pytest.raises(HyperparameterError) as refused:
        resolve({"precision": precision}, method="LoRA_LLM", device=device)
    assert words in str(refused.value)
    assert '"auto"' in str(refused.value)


EIGHT = replace(H200, gpu_count=8)


@pytest.mark.parametrize(
    ("device", "four_bits", "words"),
    [
        (EIGHT, False, "fsdp=full_shard was given"),
        (H200, False, "fsdp=full_shard was given"),  # how many are there is not known
        (replace(H200, gpu_count=1), True, "there is only one GPU"),
        (CPU, False, "there is no CUDA"),
    ],
)
def test_full_shard_needs_several_gpus_and_whole_weights(device: DeviceFacts, four_bits: bool, words: str) -> None:
    resolved = resolve({"fsdp": "full_shard"}, method="LoRA_LLM", device=device)
    assert resolved.values.load_in_4bit is four_bits
    assert words in "\n".join(resolved.notes)


@pytest.mark.parametrize(
    ("method", "values"),
    [("QLoRA_LLM", {}), ("LoRA_LLM", {"load_in_4bit": True}), ("LoRA_LLM", {"load_in_8bit": True})],
)
def test_full_shard_with_quantised_weights_is_refused(method: str, values: dict[str, object]) -> None:
    with pytest.raises(HyperparameterError, match='fsdp = "full_shard"'):
        validate({"fsdp": "full_shard", **values}, method=method)


def test_resolve_fills_in_every_default() -> None:
    resolved = resolve({"training_strategy": "dpo", "learning_rate": "1e-4"}, method="LoRA_LLM", device=H200)
    assert list(asdict(resolved.values)) == list(HYPERPARAMETERS)
    assert asdict(resolved.values) == {
        **{name: row.default for name, row in HYPERPARAMETERS.items()},
        "training_strategy": "dpo",
        "learning_rate": 1e-4,
        "precision": "bfloat16",
    }
    assert resolved.notes == ()
    with pytest.raises(HyperparameterError, match="learning_rate"):
        resolve({"learning_rate": 0}, method="LoRA_LLM", device=CPU)


def test_resolved_values_resolve_to_themselves() -> None:
    for method in METHODS:
        for device in (CPU, CPU_BF16, H200, T4):
            first = resolve({"training_strategy": "dpo"}, method=method, device=device)
            again = resolve(first.values, method=method, device=device)
            assert again.values == first.values
            assert again.precision == first.precision


@pytest.mark.parametrize(
    ("method", "values", "part"),
    [
        ("LoRA_LLM", {"dpo_beta": 0.2}, "dpo_beta has no effect"),
        ("LoRA_LLM", {"loss_type": "ipo"}, "loss_type has no effect"),
        ("Standard_LLM", {"lora_dim": 8}, "lora_dim has no effect"),
        ("Standard_LLM", {"target_modules": "q_proj"}, "target_modules has no effect"),
        ("LoRA_LLM", {"apply_chat_template": False, "system_prompt": "Hi"}, "system_prompt has no effect"),
        ("LoRA_LLM", {"warmup_ratio": 0.1, "lr_scheduler_type": "constant"}, "constant_with_warmup"),
        ("LoRA_LLM", {"num_train_epochs": 2, "max_steps": 5}, "max_steps=5"),
        ("LoRA_LLM", {"training_strategy": "dpo", "loss_type": "aot"}, "per_device_train_batch_size is 1"),
        ("LoRA_LLM", {"training_strategy": "dpo", "loss_type": "sigmoid,sft"}, "mean over the tokens of one batch"),
        ("LoRA_LLM", {"training_strategy": "dpo", "label_smoothing": 0.1}, "label_smoothing has no effect"),
        ("LoRA_LLM", {"training_strategy": "dpo", "discopop_tau": 0.1}, "discopop_tau has no effect"),
        ("LoRA_LLM", {"ld_alpha": 0.5}, "ld_alpha has no effect"),
    ],
)
def test_values_without_effect_are_noted(method: str, values: dict[str, object], part: str) -> None:
    notes = resolve(values, method=method, device=H200).notes
    assert sum(part in note for note in notes) == 1


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("sigmoid", "sigmoid"),
        (" Sigmoid, sft ", "sigmoid,sft"),
        (["sigmoid", "BCO_pair"], "sigmoid,bco_pair"),
        ('["ipo"]', "ipo"),
    ],
)
def test_several_losses_are_one_value(given: object, kept: str) -> None:
    assert check("loss_type", given) == kept


@pytest.mark.parametrize(
    "given", ["", [], "sigmoid,sigmoid", "sigmoid,", "sigmoid;sft", ["sigmoid", 1], {"sigmoid": 1}]
)
def test_what_is_no_list_of_losses_is_refused(given: object) -> None:
    assert "loss_type" in refusal({"loss_type": given})


@pytest.mark.parametrize(
    ("given", "kept"), [("1,0.5", [1, 0.5]), ([1, "0.5"], [1, 0.5]), ("[2]", [2]), (2, [2]), ("", []), ([], [])]
)
def test_numbers_are_a_list(given: object, kept: list[float]) -> None:
    losses = {0: "sigmoid", 1: "sigmoid", 2: "sigmoid,sft"}[len(kept)]
    assert validate({"loss_type": losses, "loss_weights": given}, method="LoRA_LLM")["loss_weights"] == kept


@pytest.mark.parametrize("given", ["a", "1,", [True], [-1], [1e9], "nan", {"a": 1}, None])
def test_what_is_no_list_of_numbers_is_refused(given: object) -> None:
    assert "loss_weights" in refusal({"loss_weights": given})


@pytest.mark.parametrize("smoothing", [-0.1, 0.5, 1])
def test_label_smoothing_stays_below_a_half(smoothing: float) -> None:
    assert "label_smoothing" in refusal({"label_smoothing": smoothing})


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"loss_type": "simpo"}, ["simpo is experimental in TRL", "loss_type=sigmoid_norm"]),
        ({"loss_type": "orpo"}, ["orpo is experimental in TRL", "sigmoid,sft"]),
        ({"training_strategy": "orpo"}, ["orpo is experimental in TRL", "sigmoid,sft"]),
        ({"training_strategy": "CPO"}, ["cpo is experimental in TRL"]),
    ],
)
def test_what_trl_only_tries_out_is_refused_with_the_nearest_offer(values: dict[str, object], parts: list[str]) -> None:
    assert all(part in refusal(values) for part in parts)


def test_choices_are_those_of_the_trainer() -> None:
    trl, transformers = find_spec("trl"), find_spec("transformers")
    if not (trl and trl.origin and transformers and transformers.origin):
        pytest.skip("the trainer's libraries are not installed")
    # Read, not imported: importing them takes longer than all other tests of this file.
    losses = (Path(trl.origin).parent / "trainer/dpo_trainer.py").read_text("utf-8")
    assert all(f'loss_type == "{loss}":' in losses for loss in LOSS_TYPES)
    schedules = (Path(transformers.origin).parent / "trainer_utils.py").read_text("utf-8")
    assert all(f' = "{schedule}"\n' in schedules for schedule in HYPERPARAMETERS["lr_scheduler_type"].choices or ())


def test_definitions_have_the_form_of_pai() -> None:
    definitions = {row["Name"]: row for row in as_definitions()}
    assert list(definitions) == list(HYPERPARAMETERS)
    assert definitions["lora_dim"] == {
        "Name": "lora_dim",
        "DefaultValue": 32,
        "Type": "Int",
        "Description": HYPERPARAMETERS["lora_dim"].meaning,
        "Minimum": 0,
        "Maximum": 512,
        "Choices": None,
        "Unit": "",
    }
    assert definitions["training_strategy"]["Choices"] == ["sft", "dpo", "kto"]
    assert {row["Type"] for row in definitions.values()} == {"String", "Int", "Float", "Bool"}


def test_the_docs_page_holds_the_generated_table() -> None:
    page = (ROOT / "docs/hyperparameters.md").read_text("utf-8")
    assert describe() in page, (
        "docs/hyperparameters.md differs from the schema; replace its table by the output of "
        "python -c 'from palate_recipes.hyperparameters import describe; print(describe())'"
    )
