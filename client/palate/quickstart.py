"""Trains and serves the demo data end to end through the public API, as a first user would."""

from __future__ import annotations

import json
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

from palate.common.utils import random_str
from palate.job import TrainingJob
from palate.model import ModelTrainingRecipe
from palate.ui.terminal import print_side_by_side
from palate_recipes.demo import demo_questions, disagrees, write_demo
from palate_recipes.errors import ConfigurationError
from palate_recipes.recipe_file import read_recipe
from palate_recipes.specs.serve import EngineName

MAX_TOKENS = 80
PAIRS_PER_TOPIC = 2
"""Half of the demo's pairs (68 from 34 topics) are enough for the small model; all 136 take twice the time."""


def run_quickstart(folder: Path, *, direction: str = "honest", engine: str = "auto") -> TrainingJob:
    """Writes demo data, trains on it, serves the result, compares answers of base and tuned model, and cleans up.

    Args:
        folder: Output folder for data and answers.
        direction: Which answers are preferred (`palate_recipes.demo.DIRECTIONS`).
        engine: Serving engine: auto, vllm or transformers.

    Returns:
        The job, which is not deleted.

    Raises:
        ConfigurationError: Unknown direction or engine.
    """
    if engine not in get_args(EngineName):  # before the training, which takes minutes
        raise ConfigurationError(f"engine={engine!r} is unknown: choose one of {', '.join(get_args(EngineName))}")
    begun = time.monotonic()

    def step(text: str) -> None:
        print(f"\n[{time.monotonic() - begun:5.0f} s] {text}", file=sys.stderr, flush=True)

    folder = folder.absolute()
    data = write_demo(folder, direction=direction, per_topic=PAIRS_PER_TOPIC)
    step(f"demo preference data is in {folder}")

    settings = read_recipe(Path(str(files("palate_recipes.demo") / "recipe.toml")))
    recipe = ModelTrainingRecipe(**settings)
    step(f"training {recipe.model_name}: LoRA + DPO, everything on this machine")
    job = recipe.train(inputs=data)
    _print_learning(job)

    step("serving the tuned model and its base (the engine takes about half a minute)")
    system = recipe.hyperparameters["system_prompt"]
    answers = []
    with recipe.deploy(service_name=f"quickstart_{random_str(6)}", options={"engine": engine}) as predictor:
        client = predictor.openai()
        step(f"{predictor.service_name} answers at {predictor.endpoint}: held-out questions, before and after")

        def ask(question: str, model: str) -> str:
            messages: list[Any] = [{"role": "system", "content": system}, {"role": "user", "content": question}]
            reply = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=MAX_TOKENS)
            return _whole_sentences((reply.choices[0].message.content or "").strip())

        with ThreadPoolExecutor() as pool:  # in parallel, so that the engine answers them as one batch
            asked = [
                (question, pool.submit(ask, question, "base"), pool.submit(ask, question, "default"))
                for question in demo_questions()
            ]
        for question, base, tuned in asked:
            print_side_by_side(question, ("base", base.result()), ("tuned", tuned.result()))
            answers.append({"question": question, "base": base.result(), "default": tuned.result()})
    stands = {name: sum(disagrees(answer[name]) for answer in answers) for name in ("base", "default")}
    print(
        f"\ndisagree with the claim: base {stands['base']} of {len(answers)}, tuned {stands['default']} of {len(answers)}"
        " (greedy decoding, topics that are not in the training data)"
    )
    (folder / "answers.json").write_text(json.dumps(answers, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    step("the service is deleted; results:")
    for name, value in (
        ("adapter", job.output_path("model")),
        ("job", job.id),
        ("data", folder),
        ("answers", folder / "answers.json"),
    ):
        print(f"  {name:8} {value}")
    return job


def _whole_sentences(answer: str) -> str:
    """Returns the answer up to the last end of a sentence, because the token limit may cut one."""
    ends = [match.end() for match in re.finditer(r"[.!?][\"')\]]*(?=\s|$)", answer)]
    return answer[: ends[-1]] if ends else answer


def _print_learning(job: TrainingJob) -> None:
    metrics = job.metrics()
    train = [entry for entry in metrics if entry["kind"] == "train"]
    held_out = [entry for entry in metrics if entry["kind"] == "eval"]
    first, last = train[0], train[-1]
    print("training loss      {loss:.3f} at step {step}, before its first update".format(**first))
    print("                   {loss:.3f} at step {step}".format(**last))
    print("training margin    {rewards/margins:+.2f} at step {step}".format(**last))
    if held_out:
        print(f"held-out accuracy  {held_out[-1]['eval_rewards/accuracies']:.2f}")
        print(f"held-out margin    {held_out[-1]['eval_rewards/margins']:+.2f}")
