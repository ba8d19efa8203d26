"""Training speed of Palate's trainer against stock TRL: same model, pairs, order, seed and optimizer, one run, alternating.

    python benchmarks/train_speed.py                          a folder of pairs beside the checkout, else generated pairs
    python benchmarks/train_speed.py --data prefs.json        any preference file
    python benchmarks/train_speed.py --steps 20 --rounds 1 --variants tuned,palate     loss curves over 20 steps

Variants (each in a process of its own, so that peak memory is its own):
    stock     TRL's DPOTrainer as its defaults leave it: a model by name, bfloat16 autocast, gradient checkpointing
    stock-32  the same without the autocast: what stock costs where the processor has no bfloat16
    tuned     TRL's DPOTrainer as an expert sets it: weights in the run's precision, no checkpointing, 4 pairs a batch
    palate    this trainer, by its own defaults
A run's seconds are its steps and, with the reference scored ahead, that pass as well; loading and imports are not in them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

VARIANTS = ("stock", "stock-32", "tuned", "palate")
PAIRS_A_STEP = 8
LEARNING_RATE = 2e-4
RANK = 32


def main() -> None:
    options = _options()
    if options.child:
        _child(options)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options.model = options.model or str(_small_model(folder))
        options.precision = options.precision or _precision()
        rows, source = _rows(options)
        pairs = folder / "pairs.json"
        pairs.write_text(json.dumps(rows))
        results = _measure(options, pairs, folder)
    _report(options, results, source)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a preference file: prompt, chosen, rejected, or ShareGPT with one turn")
    parser.add_argument("--model", help="a model folder; default SmolLM2-135M-Instruct from its package")
    parser.add_argument(
        "--precision", choices=["float32", "bfloat16"], help="default: what this processor computes fast"
    )
    parser.add_argument("--seq-length", type=int, default=128, help="tokens of prompt and answer")
    parser.add_argument("--steps", type=int, default=6, help=f"optimizer steps of {PAIRS_A_STEP} pairs")
    parser.add_argument("--stock-steps", type=int, help="steps of the stock variants, whose rate does not change")
    parser.add_argument("--epochs", type=int, default=1, help="passes over those pairs, for palate and tuned")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--variants", default=",".join(VARIANTS), help="comma-separated, of " + ", ".join(VARIANTS))
    parser.add_argument("--json", help="write all figures to this file")
    parser.add_argument("--child", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--pairs", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.variants = options.variants.split(",")
    return options


# The parent: pairs, order of runs, report.


def _rows(options: argparse.Namespace) -> tuple[list[dict[str, str]], str]:
    """Pairs that fill the steps, each with an answer of its own left after the cut to the sequence length."""
    beside = Path(__file__).parents[2] / "shared" / "data" / "general_sharegpt_300.json"
    path = Path(options.data) if options.data else beside if beside.is_file() else None
    if path is None:
        rows, source = _generated(400, options.seed), "generated pairs"
    else:
        text = path.read_text(encoding="utf-8")
        raw = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
        rows, source = [row for row in map(_pair, raw) if row], path.name
    kept = _usable(rows, options)
    wanted = options.steps * PAIRS_A_STEP
    if not kept:
        raise SystemExit(f"{source}: no pair is left at --seq-length {options.seq_length}")
    random.Random(options.seed).shuffle(kept)
    while len(kept) < wanted:  # a small file is gone through again, with prompts that differ
        kept += [{**row, "prompt": f"{row['prompt']} "} for row in kept]
    return kept[:wanted], source


def _pair(row: dict[str, Any]) -> dict[str, str] | None:
    if "conversations" in row:
        turns = row["conversations"]
        if len(turns) != 1:
            return None
        row = {"prompt": turns[0]["value"], "chosen": row["chosen"]["value"], "rejected": row["rejected"]["value"]}
    if not all(isinstance(row.get(name), str) and row[name].strip() for name in ("prompt", "chosen", "rejected")):
        return None
    return {name: row[name] for name in ("prompt", "chosen", "rejected")} if row["chosen"] != row["rejected"] else None


def _usable(rows: list[dict[str, str]], options: argparse.Namespace) -> list[dict[str, str]]:
    from palate_trainer.env import prepare_environment

    prepare_environment()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    kept = {row.row for row in _encoded(rows, tokenizer, options.seq_length)}
    return [row for number, row in enumerate(rows, 1) if number in kept]


def _encoded(rows: list[dict[str, str]], tokenizer: Any, seq_length: int) -> list[Any]:
    from palate_recipes.preferences.row import plain_row
    from palate_trainer.tokenize import Renderer, encode_pairs

    pairs = [plain_row(row["prompt"], row["chosen"], row["rejected"], n) for n, row in enumerate(rows, 1)]
    return encode_pairs(pairs, Renderer(tokenizer, True, "You are a helpful assistant", seq_length), name="train")[0]


def _generated(count: int, seed: int) -> list[dict[str, str]]:
    """Pairs of random words whose lengths follow short instruction data: prompts of 10 to 60 words, answers of 5 to 70."""
    draw = random.Random(seed)
    words = [
        "the",
        "model",
        "answer",
        "question",
        "data",
        "reason",
        "short",
        "long",
        "tree",
        "river",
        "music",
        "number",
        "light",
        "paper",
        "stone",
        "early",
    ]

    def text(low: int, high: int) -> str:
        return " ".join(draw.choice(words) for _ in range(draw.randint(low, high)))

    return [{"prompt": text(10, 60), "chosen": text(5, 70), "rejected": text(5, 70)} for _ in range(count)]


def _measure(options: argparse.Namespace, pairs: Path, folder: Path) -> dict[str, list[dict[str, Any]]]:
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in options.variants}
    for number in range(options.rounds):
        order = options.variants if number % 2 == 0 else list(reversed(options.variants))
        for name in order:
            stock = name.startswith("stock")
            out = folder / f"{name}-{number}.json"
            command = [sys.executable, __file__, "--child", name, "--pairs", str(pairs), "--out", str(out)]
            for option in ("model", "precision", "seq_length", "seed"):
                command += [f"--{option.replace('_', '-')}", str(getattr(options, option))]
            command += ["--steps", str(options.stock_steps or options.steps if stock else options.steps)]
            command += ["--epochs", str(1 if stock else options.epochs)]
            child = subprocess.run(
                command,
                env={**os.environ, "PALATE_BENCH_DIR": str(folder)},
                capture_output=True,
                text=True,
                check=False,
            )
            if child.returncode:
                raise SystemExit(f"{name} failed:\n{child.stderr[-4000:]}")
            results[name].append(json.loads(out.read_text()))
            run = results[name][-1]
            print(f"round {number + 1} {name:9} {run['pairs'] / run['seconds']:6.3f} pairs/s", flush=True)
    return results


def _report(options: argparse.Namespace, results: dict[str, list[dict[str, Any]]], source: str) -> None:
    rates = _product_rates()
    first = next(iter(results.values()))[0]
    print(
        f"\n{source}, {first['model']}, LoRA r={RANK}, {PAIRS_A_STEP} pairs a step, up to {options.seq_length} tokens,"
    )
    print(f"{options.epochs} epoch(s), {options.precision}, {first['threads']} threads; {first['versions']}")
    print(f"\n{'':10} pairs/s  (best, worst)    tokens/s  peak GB  ref s  last loss  margin")
    best = {}
    for name, runs in results.items():
        speeds = sorted(run["pairs"] / run["seconds"] for run in runs)
        best[name] = sum(speeds) / len(speeds)
        run = runs[0]
        print(
            f"{name:10} {best[name]:7.3f}  ({speeds[-1]:.3f}, {speeds[0]:.3f})  {best[name] * run['tokens_a_pair']:9.0f}"
            f"  {max(r['peak_gb'] for r in runs):7.2f}  {run['reference_s']:5.1f}  {run['losses'][-1]:9.4f}  {run['margin']:6.3f}"
        )
    ours = results.get("palate")
    if ours:
        for name in results:
            if name != "palate":
                curve, theirs = ours[0]["losses"], results[name][0]["losses"]
                apart = max(abs(a - b) for a, b in zip(curve, theirs, strict=False))
                print(
                    f"palate / {name:9} {best['palate'] / best[name]:5.2f}x   largest difference of the loss over"
                    f" {min(len(curve), len(theirs))} steps {apart:.1e}"
                )
        run = ours[0]
        done = run["flops"] / run["seconds"] / 1e12
        fast = rates[options.precision]
        print(
            f"matrix products: {fast:.3f} TFLOP/s in {options.precision} at their best here"
            f" (float32 {rates['float32']:.3f}, bfloat16 {rates['bfloat16']:.3f});"
            f" palate's own products run at {done:.3f}, {100 * done / fast:.0f}% of it"
        )
        print("loss of palate:", " ".join(f"{loss:.4f}" for loss in run["losses"]))
    if options.json:
        Path(options.json).write_text(
            json.dumps({"options": vars(options), "rates": rates, "results": results}, indent=1)
        )


def _product_rates() -> dict[str, float]:
    """TFLOP/s of large matrix products on this processor, the best of several."""
    import torch

    rates = {}
    for name in ("float32", "bfloat16"):
        a = torch.randn(1024, 1024, dtype=getattr(torch, name))
        times = []
        for _ in range(12):
            begun = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - begun)
        rates[name] = 2 * 1024**3 / min(times) / 1e12
    return rates


def _precision() -> str:
    flags = Path("/proc/cpuinfo").read_text(encoding="ascii") if Path("/proc/cpuinfo").exists() else ""
    return "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"


def _small_model(folder: Path) -> Path:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.support.models import smollm2

    return smollm2(folder / "smollm2-135m-instruct")


# A child: one variant, one run.


def _child(options: argparse.Namespace) -> None:
    from palate_trainer.env import prepare_environment, use_available_cores

    prepare_environment()
    threads = use_available_cores()
    run = _palate(options) if options.child == "palate" else _trl(options)
    import torch
    import transformers
    import trl

    run |= {
        "pairs": options.steps * PAIRS_A_STEP * options.epochs,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "threads": threads,
        "model": Path(options.model).name,
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, TRL {trl.__version__}",
    }
    Path(options.out).write_text(json.dumps(run))


def _palate(options: argparse.Namespace) -> dict[str, Any]:
    from transformers import TrainerCallback, set_seed

    from palate_recipes.hyperparameters import DeviceFacts, resolve
    from palate_recipes.specs.train import LocalFiles, TrainSpec, TrainTask
    from palate_recipes.specs.weights import BaseModel, WeightsSource
    from palate_trainer.fast.forward import completion_tokens_only
    from palate_trainer.model import load_model
    from palate_trainer.reference_scores import ReferenceScores
    from palate_trainer.tokenize import load_tokenizer
    from palate_trainer.trainers import build_trainer

    given = {
        "training_strategy": "dpo",
        "learning_rate": LEARNING_RATE,
        "num_train_epochs": options.epochs,
        "per_device_train_batch_size": PAIRS_A_STEP,
        "gradient_accumulation_steps": 1,
        "seq_length": options.seq_length,
        "lora_dim": RANK,
        "lora_alpha": RANK,
        "logging_steps": 1,
        "seed": options.seed,
    }
    bf16 = options.precision == "bfloat16"
    resolved = resolve(given, method="LoRA_LLM", device=DeviceFacts(cuda=False, bf16=bf16, fp16=False))
    spec = TrainSpec(
        model=BaseModel(name=options.model, source=WeightsSource(kind="folder", location=options.model)),
        method="LoRA_LLM",
        hyperparameters=resolved.values,
        precision=resolved.precision,
    )
    output = str(Path(os.environ["PALATE_BENCH_DIR"]) / "palate")
    task = TrainTask(spec=spec, files=LocalFiles(model_dir=options.model, train_file=options.pairs, output_dir=output))
    tokenizer = load_tokenizer(options.model)
    rows = _encoded(json.loads(Path(options.pairs).read_text()), tokenizer, options.seq_length)
    set_seed(options.seed)
    model = load_model(task)

    class Rows(TrainerCallback):  # type: ignore[misc]
        """The sampler's epoch, which the program's own callback sets."""

        def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trainer.order.set_epoch(int(state.epoch or 0))

    with completion_tokens_only():
        begun = time.perf_counter()
        trainer = build_trainer(
            task,
            model=model,
            tokenizer=tokenizer,
            train=rows,
            validation=[],
            callbacks=[Rows()],
            reference=ReferenceScores(task, _quiet),
            note=_quiet,
        )
        built = time.perf_counter()
        trainer.train()
    seconds = time.perf_counter() - begun
    return {
        "seconds": seconds,
        "reference_s": built - begun,
        "flops": _flops(trainer, rows, options.epochs),
        **_curve(trainer, rows),
    }


def _quiet(line: str) -> None:
    pass


def _flops(trainer: Any, rows: list[Any], epochs: int) -> float:
    """Floating-point operations of the matrix products that the tree needs: forward, reference, gradients."""
    from palate_trainer.fast.tree import pair_sequences, plant

    frozen = head = adapter = 0
    for name, parameter in trainer.model.named_parameters():
        if "lora_" in name:
            adapter += parameter.numel()
        elif parameter.dim() == 2 and "embed" not in name:
            frozen += parameter.numel()
    head = trainer.model.get_output_embeddings().weight.numel()
    if "lm_head" in "".join(name for name, _ in trainer.model.named_parameters()):
        frozen -= head
    tokens = scored = 0
    for start in range(0, len(rows), PAIRS_A_STEP):
        part = rows[start : start + PAIRS_A_STEP]
        tree = plant(*pair_sequences([vars(row) for row in part]))
        tokens, scored = tokens + len(tree.ids), scored + len(tree.score_rows)
    step = tokens * (4 * frozen + 6 * adapter) + scored * 4 * head
    reference = tokens * 2 * frozen + scored * 2 * head
    return float(epochs * step + reference)


def _trl(options: argparse.Namespace) -> dict[str, Any]:
    from datasets import Dataset
    from peft import LoraConfig
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    from palate_trainer.samplers import RowSampler

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = json.loads(Path(options.pairs).read_text())
    encoded = _encoded(rows, tokenizer, options.seq_length)
    order = RowSampler(len(encoded), options.seed)
    data = []
    for epoch in range(options.epochs):
        order.set_epoch(epoch)
        data += [
            {
                "prompt": [
                    {"role": "system", "content": "You are a helpful assistant"},
                    {"role": "user", "content": rows[i]["prompt"]},
                ],
                "chosen": [{"role": "assistant", "content": rows[i]["chosen"]}],
                "rejected": [{"role": "assistant", "content": rows[i]["rejected"]}],
            }
            for i in order
        ]
    data = data[: options.steps * options.epochs * PAIRS_A_STEP]

    class Stock(DPOTrainer):  # type: ignore[misc]
        """In the order in which Palate takes the rows."""

        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    settings: dict[str, Any] = {}
    model: Any = options.model
    if options.child == "stock-32":
        settings = {"bf16": False}
    if options.child == "tuned":
        bf16 = options.precision == "bfloat16"
        batch = 4
        settings = {
            "bf16": bf16,
            "gradient_checkpointing": False,
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": PAIRS_A_STEP // batch,
        }
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype="bfloat16" if bf16 else "float32")
    arguments = DPOConfig(
        output_dir=str(Path(os.environ["PALATE_BENCH_DIR"]) / "stock"), use_cpu=True, num_train_epochs=1,
        learning_rate=LEARNING_RATE, logging_steps=1, max_length=options.seq_length, report_to=[], save_strategy="no",
        seed=options.seed, disable_tqdm=True, beta=0.1, max_steps=-1, **settings,
    )  # fmt: skip
    trainer = Stock(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=RANK, target_modules="all-linear"),
    )
    begun = time.perf_counter()
    trainer.train()
    return {"seconds": time.perf_counter() - begun, "reference_s": 0.0, "flops": 0.0, **_curve(trainer, encoded)}


def _curve(trainer: Any, rows: list[Any]) -> dict[str, Any]:
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    tokens = sum(len(row.prompt_ids) + len(row.chosen_ids) + len(row.rejected_ids) for row in rows)
    return {
        "losses": [entry["loss"] for entry in log],
        "margin": sum(entry["rewards/margins"] for entry in log[-3:]) / len(log[-3:]),
        "tokens_a_pair": tokens / len(rows),
    }


if __name__ == "__main__":
    main()
