"""How fast preference data is read and checked, and in how much memory: `make bench-data`.

Writes a JSON-lines file of realistic pairs, then times, each in a process of its own: `json` (the standard library's parser alone,
for scale), `read` (what the trainer does before it tokenises) and `check` (`palate data check`: parse, every rule, the whole file's
statistics). `--big GB` also checks a file of that size for its peak memory. With `--tokenizer FOLDER` it compares the check with
tokens against the bare tokenizer on the same texts.
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

_TEXT = """
the of and a to in is you that it he was for on are as with his they at be this have from or one had by word
but not what all were we when your can said there use an each which she do how their if will up other about
out many then them these so some her would make like him into time has look two more write go see number no
way could people my than first water been call who oil its now find long down day did get come made may part
answer question because however therefore
"""
WORDS = _TEXT.split()
ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument(
        "--big", type=float, default=0.0, help="GB of a further file that is checked for its peak memory"
    )
    parser.add_argument("--tokenizer", help="folder of a model whose tokenizer is used")
    parser.add_argument("--token-rows", type=int, default=2_000, help="rows for the comparison with a tokenizer")
    parser.add_argument("--child", choices=["json", "read", "check", "tokens", "bare"], help=argparse.SUPPRESS)
    parser.add_argument("--file", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        _child(options)
        return
    with tempfile.TemporaryDirectory(prefix="palate-bench-") as folder:
        path = Path(folder) / "pairs.jsonl"
        _write(path, options.rows)
        size = path.stat().st_size
        print(
            f"{options.rows:,} pairs, {size / 1e6:,.0f} MB, {size / options.rows:,.0f} bytes a row; best of {ROUNDS} rounds"
        )
        best: dict[str, dict[str, float]] = {}
        for number in range(ROUNDS):  # alternating: a busy moment hits all alike
            for what in ("json", "read", "check") if number % 2 == 0 else ("check", "read", "json"):
                found = _run(what, path)
                if what not in best or found["seconds"] < best[what]["seconds"]:
                    best[what] = found
        for what, found in best.items():
            rate = options.rows / found["seconds"]
            print(
                f"{what:6} {rate:>10,.0f} pairs/s {size / found['seconds'] / 1e6:>6,.0f} MB/s   peak {found['gb']:.2f} GB"
            )
        path.unlink()
        if options.big:
            _write(path, round(options.big * 1e9 / (size / options.rows)))
            found = _run("check", path)
            print(f"check of {path.stat().st_size / 1e9:.1f} GB: {found['seconds']:,.0f} s, peak {found['gb']:.2f} GB")
            path.unlink()
        if options.tokenizer:
            _write(path, options.token_rows)
            bare, whole = (
                min((_run(what, path, options.tokenizer) for _ in range(ROUNDS)), key=lambda found: found["seconds"])
                for what in ("bare", "tokens")
            )
            print(
                f"with tokenizer, {options.token_rows:,} pairs: {options.token_rows / whole['seconds']:,.0f} pairs/s,"
                f" {whole['seconds'] / bare['seconds']:.2f} times the bare tokenizer's time"
            )


def _write(path: Path, rows: int) -> None:
    random.seed(0)
    texts = [" ".join(random.choices(WORDS, k=random.randint(15, 90))).capitalize() + "." for _ in range(2000)]
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            row = {
                "prompt": f"{random.choice(texts)[:250]} ({number})",
                "chosen": random.choice(texts),
                "rejected": f"{random.choice(texts)} {number}",
            }
            file.write(json.dumps(row) + "\n")


def _run(what: str, path: Path, tokenizer: str | None = None) -> dict[str, float]:
    argv = [sys.executable, __file__, "--child", what, "--file", str(path)]
    output = subprocess.run(
        [*argv, *(["--tokenizer", tokenizer] if tokenizer else [])], check=True, capture_output=True, text=True
    )
    found: dict[str, float] = json.loads(output.stdout.splitlines()[-1])
    return found


def _child(options: argparse.Namespace) -> None:
    path = Path(options.file)
    if options.child in ("tokens", "bare"):
        seconds = _tokens(path, options.tokenizer, bare=options.child == "bare")
    else:
        begun = time.perf_counter()
        if options.child == "json":
            with path.open("rb") as lines:
                for line in lines:
                    json.loads(line)
        elif options.child == "read":
            from palate_recipes.preferences.files import open_container
            from palate_recipes.preferences.formats import read_row

            for number, value in open_container(path).raw_rows():
                read_row(value, number)
        else:
            from palate_recipes.preferences.check import check

            report = check([(path, path.name)])
            assert not report.count("error"), report.lines()
        seconds = time.perf_counter() - begun
    own, helpers = (resource.getrusage(who).ru_maxrss / 1e6 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    peak = own + helpers * len(os.sched_getaffinity(0))  # an upper bound: not all are at their largest at once
    print(json.dumps({"seconds": seconds, "gb": peak}))


def _tokens(path: Path, folder: str, *, bare: bool) -> float:
    """Seconds of the check with tokens, or of the tokenizer alone on the texts that the check renders."""
    from transformers import AutoTokenizer

    from palate_recipes.preferences.check import check
    from palate_recipes.preferences.load import read_rows
    from palate_trainer.token_stats import measured
    from palate_trainer.tokenize import Renderer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    renderer = Renderer(tokenizer, True, "You are a helpful assistant", 512)
    if not bare:
        begun = time.perf_counter()
        check([(path, path.name)])
        measured([(path, path.name)], renderer, strategy="dpo", format=None)
        return time.perf_counter() - begun
    texts = []
    for row in read_rows(path):
        turns = renderer.messages(row.prompt)
        texts.append(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        for answer in (row.chosen, row.rejected):
            both = [*turns, {"role": "assistant", "content": answer}]
            texts.append(tokenizer.apply_chat_template(both, tokenize=False))
    begun = time.perf_counter()
    for at in range(0, len(texts), 3000):
        tokenizer(text=texts[at : at + 3000], add_special_tokens=False, return_attention_mask=False)
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
