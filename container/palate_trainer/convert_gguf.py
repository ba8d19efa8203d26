"""Converts a GGUF file to a Hugging Face model folder: `python -m palate_trainer.convert_gguf FILE OUT_DIR`.

Knows one file and one folder. The folder appears complete or not at all, so two processes can convert at once.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from palate_recipes.errors import ConversionError, PalateError
from palate_trainer.env import prepare_environment


def convert(gguf_file: Path, out_dir: Path) -> None:
    """Writes config, weights (bfloat16), tokenizer and chat template of `gguf_file` to the new folder `out_dir`.

    An existing `out_dir` with a config.json counts as done and is not changed.

    Raises:
        ConversionError: The file is missing or not GGUF, `out_dir` is something else, or the architecture is unknown.
    """
    if (out_dir / "config.json").is_file():
        return
    if out_dir.exists():
        raise ConversionError(f"{out_dir} exists and is not a model folder. Remove it or choose another out_dir.")
    if not gguf_file.is_file():
        raise ConversionError(f"gguf_file {gguf_file} does not exist.")
    with gguf_file.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ConversionError(f"{gguf_file} is not a GGUF file.")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}-", dir=out_dir.parent))
    try:
        _write(gguf_file, draft)
        draft.chmod(0o755)
        draft.rename(out_dir)
    except OSError:
        # Another process may have finished the same conversion first: its folder is the same as ours.
        if not (out_dir / "config.json").is_file():
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write(gguf_file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where, name = str(gguf_file.parent), gguf_file.name
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=name)
        model = AutoModelForCausalLM.from_pretrained(
            where, gguf_file=name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
    except (ValueError, KeyError, NotImplementedError) as error:
        raise ConversionError(f"{gguf_file} cannot be converted: {error}") from error
    except ImportError as error:
        raise ConversionError(f"Converting GGUF needs the package gguf: pip install gguf. ({error})") from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m palate_trainer.convert_gguf", description="GGUF to model folder")
    parser.add_argument("gguf_file", type=Path)
    parser.add_argument("out_dir", type=Path)
    arguments = parser.parse_args(argv)
    prepare_environment()
    try:
        convert(arguments.gguf_file, arguments.out_dir)
    except PalateError as error:
        print(error, file=sys.stderr)
        return 1
    print(arguments.out_dir)
    return 0


if __name__ == "__main__":
    sys.exit(main())
