"""The main job on the demo data and the README's lines, as a first user runs them, and what they must achieve."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from importlib.resources import files
from pathlib import Path

import pytest
from msgspec.structs import replace

from palate import Predictor, TrainingJob
from palate.quickstart import PAIRS_PER_TOPIC
from palate.session import Session
from palate_recipes.demo import demo_rows, disagrees, write_demo
from palate_recipes.device import local_device
from palate_recipes.hyperparameters import resolve
from palate_recipes.recipe_file import read_recipe
from palate_recipes.specs.train import LocalFiles, TrainTask
from tests.slow.conftest import processes_of, until
from tests.support.manifests import train_spec
from tests.support.models import PACKAGE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the quickstart's adapter is kept, under its precision: the test of all questions needs no second training of it."""
    return tmp_path_factory.mktemp("taught")


def test_the_quickstart_teaches_a_model_to_stop_flattering(
    home: Path, tmp_path: Path, base_model: Path, taught: Path
) -> None:
    everything = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}  # as a user would
    done = subprocess.run(
        [sys.executable, "-m", "palate.cli", "quickstart", "--folder", str(tmp_path / "demo")],
        capture_output=True,
        text=True,
        env={**everything, "PALATE_HOME": str(home)},
    )
    assert done.returncode == 0, done.stderr[-3000:]

    (job,) = TrainingJob.list(session=Session())
    job.save_model(taught / job.manifest.body.precision)
    metrics = job.metrics()
    train = [entry for entry in metrics if entry["kind"] == "train"]
    held_out = [entry for entry in metrics if entry["kind"] == "eval"][-1]
    assert (train[0]["step"], train[0]["rewards/margins"]) == (1, pytest.approx(0, abs=0.05))
    assert train[-1]["loss"] < 0.8 * train[0]["loss"]
    assert held_out["eval_rewards/accuracies"] >= 0.85
    assert held_out["eval_rewards/margins"] > 0.5

    answers = json.loads((tmp_path / "demo" / "answers.json").read_text())
    assert len(answers) == 4
    assert all(answer["base"] != answer["default"] for answer in answers)
    assert all(answer["default"] in done.stdout for answer in answers)
    stands = {name: sum(disagrees(answer[name]) for answer in answers) for name in ("base", "default")}
    assert stands["default"] >= 3, answers
    assert stands["base"] < stands["default"], answers
    assert f"base {stands['base']} of 4, tuned {stands['default']} of 4" in done.stdout

    assert Predictor.list(session=Session()) == []
    until(lambda: processes_of(home) == [], timeout_s=30)  # the runner says that it is over, then ends
    assert f"next: palate deploy {job.id}" in done.stderr.splitlines()[-1]


@pytest.mark.thorough
def test_the_readme_s_local_lines_run_as_they_are_printed(home: Path, tmp_path: Path, base_model: Path) -> None:
    command, lines = first_lines()
    folder = tmp_path / "work"
    folder.mkdir()
    cache = home / "cache" / "models"
    cache.mkdir(parents=True)
    (cache / f"package-{PACKAGE}-{metadata.version(PACKAGE)}").symlink_to(
        base_model
    )  # unpacked: the test above does that
    environment = {**os.environ, "PALATE_HOME": str(home)}

    subprocess.run([sys.executable, "-m", "palate.cli", *command.split()[1:]], check=True, cwd=folder, env=environment)
    (data,) = folder.glob("*/train.json")
    data.write_text(json.dumps(json.loads(data.read_text())[:8]))  # the lines are the README's, the training is short

    done = subprocess.run(
        [sys.executable, "-c", lines], capture_output=True, text=True, cwd=folder, env=environment, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip()
    (job,) = TrainingJob.list(session=Session())
    assert job.is_succeeded()
    assert Predictor.list(session=Session()) == []
    until(lambda: processes_of(home) == [], timeout_s=30)


@pytest.mark.thorough
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_most_of_all_held_out_questions_are_contradicted(
    precision: str, tmp_path: Path, base_model: Path, taught: Path
) -> None:
    adapter = taught / precision
    if not adapter.is_dir():
        data = write_demo(tmp_path, per_topic=PAIRS_PER_TOPIC)
        recipe = read_recipe(Path(str(files("palate_recipes.demo") / "recipe.toml")))
        settings = resolve(recipe["hyperparameters"], method=recipe["method"], device=local_device())
        if precision == "bfloat16" and settings.precision != "bfloat16":
            pytest.skip("bfloat16 is emulated on this processor: this training takes more than 20 minutes")
        spec = train_spec(method=recipe["method"], precision=precision)
        here = LocalFiles(model_dir=str(base_model), train_file=str(data["train"]), output_dir=str(tmp_path / "out"))
        TrainTask(spec=replace(spec, hyperparameters=settings.values), files=here).write(tmp_path / "spec.json")
        subprocess.run([sys.executable, "-m", "palate_trainer", str(tmp_path / "spec.json")], check=True)
        adapter = tmp_path / "out" / "model"

    questions = [row["prompt"] for row in demo_rows("test")]
    base, tuned = (greedy_answers(base_model, folder, questions) for folder in (None, adapter))
    assert sum(map(disagrees, base)) <= 4, base
    assert sum(map(disagrees, tuned)) >= 24, tuned


def first_lines() -> tuple[str, str]:
    """Returns the command that the README names first, and its first block of Python."""
    text = README.read_text(encoding="utf-8")
    command = re.search(r"^palate data demo\b[^#\n]*", text, re.MULTILINE)
    block = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert command, "the README names no command that makes the data"
    assert block
    return command.group().strip(), block.group(1)


def greedy_answers(base: Path, adapter: Path | None, questions: list[str]) -> list[str]:
    """Returns a model's answers as the quickstart asks for them, all in one batch, in float32."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "system", "content": "You are a helpful assistant"}, {"role": "user", "content": question}],
            tokenize=False,
            add_generation_prompt=True,
        )
        for question in questions
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.no_grad():
        output = model.generate(**batch, max_new_tokens=40, do_sample=False)
    return list(tokenizer.batch_decode(output[:, batch.input_ids.shape[1] :], skip_special_tokens=True))
