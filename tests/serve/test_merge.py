"""Merging an adapter for `merge=True`: the sum, what rounding costs, what is refused. test_parity serves a merged model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from palate_recipes.errors import BadSpec
from palate_recipes.specs.merge import MERGED_FILE, Merged
from palate_recipes.specs.serve import ERROR_FILE
from palate_server.merge import main, merge
from tests.serve.conftest import installed

pytestmark = pytest.mark.skipif(not installed("peft"), reason="peft is not installed")


def adapter_of(base: str, folder: Path, *, std: float) -> Path:
    """An adapter on the attention and one layer of the MLP, whose B matrices have this standard deviation."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    tuned = get_peft_model(model, config)
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=std)
    tuned.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    (folder / "probe.json").write_text('{"precision": "float32", "model_name": "m", "rows": []}')
    return folder


@pytest.fixture(scope="module")
def rounded_llama(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model as bfloat16, as most bases are stored."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("rounded")
    AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    return str(folder)


def test_the_merged_model_computes_as_the_adapter_on_its_base(tiny_llama: str, tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter, out = adapter_of(tiny_llama, tmp_path / "adapter", std=0.05), tmp_path / "out"
    done = merge(Path(tiny_llama), adapter, out)
    assert (done.dtype, done.kept) == ("float32", 1.0)
    tokens = torch.arange(5, 25)[None]
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        untuned = base(tokens).logits
        beside = PeftModel.from_pretrained(base, adapter)(tokens).logits
        found = merged(tokens).logits
    assert not torch.allclose(beside, untuned, atol=1e-3)
    assert torch.allclose(found, beside, atol=1e-4)
    names = {file.name for file in out.iterdir()}
    assert {"tokenizer.json", "probe.json", MERGED_FILE, "config.json", "model.safetensors"} <= names
    assert not names & {"adapter_config.json", "adapter_model.safetensors", "digests.json"}


@pytest.mark.parametrize(("dtype", "stored"), [("auto", "bfloat16"), ("float32", "float32"), ("float16", "float16")])
def test_it_is_written_in_the_type_of_the_base_or_the_one_asked_for(
    rounded_llama: str, dtype: str, stored: str, tmp_path: Path
) -> None:
    adapter = adapter_of(rounded_llama, tmp_path / "adapter", std=0.5)
    done = merge(Path(rounded_llama), adapter, tmp_path / "out", dtype=dtype)
    assert done.dtype == stored
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == stored
    assert done.kept == pytest.approx(1, abs=0.02)


def test_a_small_adapter_that_16_bits_round_off_is_refused_unless_it_is_only_to_be_warned_of(
    rounded_llama: str, tmp_path: Path
) -> None:
    adapter = adapter_of(rounded_llama, tmp_path / "adapter", std=2e-5)
    out = tmp_path / "out"
    arguments = [rounded_llama, str(adapter), str(out)]
    assert main(arguments) == 1
    error = (out / ERROR_FILE).read_text()
    assert (
        "merge=True would serve another model than the trained one: rounded to bfloat16, the merged weights keep"
        in error
    )
    assert "Omit merge" in error
    assert "dtype='float32'" in error
    assert not (out / MERGED_FILE).exists()
    assert main([*arguments, "--verify=warn"]) == 0
    assert Merged.read(out / MERGED_FILE).kept < 0.5
    assert main([rounded_llama, str(adapter), str(tmp_path / "exact"), "--dtype=float32"]) == 0
    assert Merged.read(tmp_path / "exact" / MERGED_FILE).kept == 1.0


def test_a_base_of_another_type_is_refused(tiny_llama: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text('{"dtype": "float64"}')
    with pytest.raises(BadSpec, match=r"dtype='float64'.*choose one of float32, bfloat16, float16"):
        merge(base, base, tmp_path / "out")
