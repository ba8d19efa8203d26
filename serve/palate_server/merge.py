"""Merges an adapter into its base and writes a full model, for `merge=True`. A program of its own: its memory is free afterwards.

    python -m palate_server.merge BASE ADAPTER OUT

The sum is computed in float32 and rounded once to the type that the service uses. A 16-bit weight has 8 or 11 significant bits, so a
change that is less than about 1/500 (bfloat16) or 1/4000 (float16) of its weight is rounded off. How much of the adapter survives is
measured on the weights themselves, which is exact; how the service answers is for the comparison with the trained model.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from palate_recipes.device import installed_version
from palate_recipes.errors import BadSpec, EngineMissing, ServerError
from palate_recipes.servability import DTYPE_BYTES, stored_dtype
from palate_recipes.specs.merge import KEPT_AT_LEAST, MERGE_PACKAGES, MERGED_FILE, Merged
from palate_recipes.specs.serve import ERROR_FILE

if TYPE_CHECKING:
    import torch

_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
"""If the adapter's folder has one of them, its tokenizer was used in training, and nothing of the base's is mixed into it."""

_NOT_COPIED = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "digests.json", "README.md")
"""Files of an adapter's folder that are not the merged model's. Tokenizer, chat template and probe are."""


def merge(base_dir: Path, adapter_dir: Path, out: Path, *, dtype: str = "auto") -> Merged:
    """Writes the base with the adapter's change as a full model, with the adapter's tokenizer, chat template and probe.

    Args:
        base_dir: The base's weights. Quantised ones are dequantised first.
        adapter_dir: An adapter as PEFT writes it.
        out: Folder to write; must not have a model.
        dtype: Type of the merged weights. `auto`: that of the base; weights that the base has in float32 stay so.

    Raises:
        EngineMissing: A library is missing.
    """
    if missing := [name for name in MERGE_PACKAGES if installed_version(name) is None]:
        raise EngineMissing(
            f"merge=True needs {', '.join(missing)}, which is not installed: pip install {' '.join(missing)}"
        )
    import torch
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers import AutoModelForCausalLM

    begun = time.monotonic()
    config = json.loads((base_dir / "config.json").read_text(encoding="utf-8"))
    name = stored_dtype(config) if dtype == "auto" else dtype
    if name not in DTYPE_BYTES:
        raise BadSpec(f"dtype={name!r} of {base_dir} is not one to merge in: choose one of {', '.join(DTYPE_BYTES)}")
    target: torch.dtype = getattr(torch, name)
    model = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    quantised = getattr(model, "hf_quantizer", None) is not None
    if quantised:
        model = model.dequantize()
    tuned = PeftModel.from_pretrained(model, adapter_dir)
    kept = total = 0.0
    with torch.no_grad():
        for module in tuned.modules():
            if not isinstance(module, BaseTunerLayer):
                continue
            weights = list(module.get_base_layer().parameters(recurse=False))
            before = [weight.detach().clone() for weight in weights]
            module.merge(safe_merge=True)
            after = module.get_base_layer().parameters(recurse=False)
            for was, weight in zip(before, after, strict=True):
                change = weight - was
                kept += float(((weight.to(target).float() - was) * change).sum(dtype=torch.float64))
                total += float((change * change).sum(dtype=torch.float64))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All adapters are already merged")
        merged = tuned.merge_and_unload(safe_merge=True)  # puts modules_to_save in their places too
    stay = set(_float32_weights(base_dir)) if dtype == "auto" and name != "float32" else set()
    for key, weight in merged.named_parameters():
        if weight.is_floating_point() and key not in stay:
            weight.data = weight.data.to(target)
    merged.config.dtype = target
    merged.save_pretrained(out, save_original_format=not quantised)
    has_tokenizer = any((adapter_dir / name).exists() for name in _TOKENIZERS)
    for file in sorted((adapter_dir if has_tokenizer else base_dir).iterdir()):
        if _belongs(file) and not (out / file.name).exists():
            shutil.copyfile(file, out / file.name)
    if (adapter_dir / "probe.json").exists():
        shutil.copyfile(adapter_dir / "probe.json", out / "probe.json")
    done = Merged(dtype=name, kept=round(kept / total, 4) if total else 1.0, seconds=round(time.monotonic() - begun, 1))
    done.write(out / MERGED_FILE)
    return done


def _belongs(file: Path) -> bool:
    """Whether a file of the adapter's or base's folder is the merged model's too: neither weights nor about them."""
    return (
        file.is_file()
        and file.name not in _NOT_COPIED
        and not file.name.startswith(".")
        and file.suffix in (".json", ".jinja", ".model", ".txt", ".tiktoken")
        and not file.name.endswith(".index.json")
    )


def _float32_weights(base_dir: Path) -> Iterator[str]:
    """Returns the names of the weights that are stored in float32."""
    from safetensors import safe_open

    for file in base_dir.glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            for name in sorted(weights.keys()):
                if weights.get_slice(name).get_dtype() == "F32":
                    yield name


def refusal(merged: Merged) -> BadSpec:
    """Returns the error for weights that have lost too much of the adapter."""
    return BadSpec(
        f"merge=True would serve another model than the trained one: {merged.text}, and less than {KEPT_AT_LEAST:.0%} is refused. "
        "Omit merge, which serves the adapter beside its base without a loss; or set dtype='float32'. "
        "verify='warn' serves it all the same"
    )


def main(argv: list[str]) -> int:
    """Runs the program. Returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m palate_server.merge", description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", default="auto", choices=("auto", *DTYPE_BYTES))
    parser.add_argument("--verify", default="error", choices=("error", "warn", "off"))
    given = parser.parse_args(argv)
    given.out.mkdir(parents=True, exist_ok=True)
    try:
        merged = merge(given.base, given.adapter, given.out, dtype=given.dtype)
        if merged.kept < KEPT_AT_LEAST and given.verify == "error":
            (given.out / MERGED_FILE).unlink()
            raise refusal(merged)
    except ServerError as error:
        (given.out / ERROR_FILE).write_text(f"{error}\n", encoding="utf-8")
        print(f"palate_server.merge: {error}", file=sys.stderr)
        return 1
    warning = "WARNING: " if merged.kept < KEPT_AT_LEAST else ""
    print(f"palate_server.merge: {warning}{merged.text}; it took {merged.seconds:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
