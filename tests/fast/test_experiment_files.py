"""Files of experiments: what they mean, and that every mistake is reported with its line, value and remedy."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace as replace_fields

from palate import ExperimentFile, Session
from palate.cli import main
from palate.errors import ConfigurationError, JobNotReadyError
from palate.experiments import Experiment
from palate.experiments.execute import Planned, Plans, _Crew, planned_runs, prepared
from palate.runs.record import Record
from tests.support.manifests import train_manifest
from tests.support.rows import preference_rows

NATURAL = """
defaults:
  model_name: smollm2-135m-instruct
  inputs: {train: data/prefs.json}
  labels: {team: red}
  hyperparameters: {training_strategy: dpo, fsdp: off}
rates:
  labels: {topic: rates}
  hyperparameters:
    learning_rate: [1e-5, 5e-5]
    _:
      - {lora_dim: 8, lora_alpha: 16}
      - {lora_dim: 16, lora_alpha: 32}
lists:
  hyperparameters: {target_modules: [q_proj, v_proj], loss_type: [sigmoid, sft], loss_weights: [1, 0.5]}
sweep-of-lists:
  model_name: [smollm2-135m-instruct, qwen2-0.5b-instruct]
  hyperparameters: {target_modules: [all-linear, [q_proj, v_proj]]}
"""

# The form of gllm-training, with the keys of its documentation.
GLLM = """
storage: &s3_storage_config
  provider: "s3"
  bucket_name: "models"
  object_prefix: "fine-tuned"
  upload_to_cloud: {upload}

fine_tune_hyperparam_1: &fine_tune_hyperparam_1_conf
  hyperparameters_id: "1"
  max_seq_length: 512
  load_in_16bit: true
  trust_remote_code: true
  thinking_mode: "off"
  r: 16
  lora_alpha: 16
  lora_dropout: 0
  bias: "none"
  target_modules:
    - "q_proj"
    - "v_proj"
  use_gradient_checkpointing: "unsloth"
  random_state: 3407
  learning_rate: 5.0e-6
  optim: "adamw_8bit"
  logging_steps: 2
  save_steps: 50
  resume_from_checkpoint: false
  report_to: "tensorboard"
  eval_strategy: "steps"
  load_best_model_at_end: true

experiment_1:
  experiment_id: "1"
  hyperparameters: *fine_tune_hyperparam_1_conf
  storage_config: *s3_storage_config
  topic: "DPO Fine Tuned"
  model_name: "smollm2-135m-instruct"
  framework: "unsloth"
  multimodal: false
  spreadsheet_id: "sheet_1"
  train_sheet: "training data"
  validation_sheet: "held out"
  prompt_sheet: "prompt"
  prompt_name: "prompt_default"
  dpo_column_mapping_config:
    input_columns:
      query: "user_query"
    chosen: "good"
    rejected: "bad"

experiment_2:
  experiment_id: "2"
  hyperparameters: {{r: 8, eval_strategy: "no"}}
  model_name: "smollm2-135m-instruct"
  datasets_path: "examples/csv"
  train_filename: "training_data.csv"
  validation_filename: "validation_data.csv"
  column_mapping_config:
    input_columns:
      query: "user_query"
    label_columns:
      label: "target"
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "experiments.yml"
    path.write_text(text.lstrip("\n"), encoding="utf-8")
    return path


def load(folder: Path, text: str, experiment_id: str) -> Experiment:
    for name in (
        "p.json",
        "v.json",
        "data/prefs.json",
        "examples/csv/training_data.csv",
        "examples/csv/validation_data.csv",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return ExperimentFile.load(write(folder, text), experiment_id)


def refused(folder: Path, text: str, experiment_id: str | None = None) -> str:
    path = write(folder, text)
    with pytest.raises(ConfigurationError) as caught:
        ExperimentFile.load(path) if experiment_id is None else ExperimentFile.load(path, experiment_id)
    return str(caught.value).replace(str(path), "FILE")


def test_defaults_grids_and_pairs_become_runs(tmp_path: Path) -> None:
    file = ExperimentFile.load(write(tmp_path, NATURAL))
    assert list(file) == ["rates", "lists", "sweep-of-lists"]
    rates = file["rates"]
    assert rates.inputs == {"train": str(tmp_path / "data/prefs.json")}
    assert rates.labels == {"team": "red", "topic": "rates"}
    assert [run.varied for run in rates.runs()] == [
        {"learning_rate": rate, "lora_dim": dim, "lora_alpha": 2 * dim} for rate in (1e-5, 5e-5) for dim in (8, 16)
    ]
    first = rates.runs()[0].hyperparameters
    assert first == {
        "training_strategy": "dpo",
        "fsdp": "off",  # not a boolean, as in YAML 1.1
        "learning_rate": 1e-5,  # not a text, as in PyYAML
        "lora_dim": 8,
        "lora_alpha": 16,
    }


def test_a_list_is_a_sweep_only_where_one_value_is_no_list(tmp_path: Path) -> None:
    file = ExperimentFile.load(write(tmp_path, NATURAL))
    (only,) = file["lists"].runs()
    assert only.hyperparameters["target_modules"] == ["q_proj", "v_proj"]
    assert (only.hyperparameters["loss_type"], only.hyperparameters["loss_weights"]) == ("sigmoid,sft", [1.0, 0.5])
    assert "write a list of lists: [[sigmoid], [sft]]" in file["lists"].warnings[0]
    runs = file["sweep-of-lists"].runs()
    assert [(run.arguments["model_name"], run.hyperparameters["target_modules"]) for run in runs] == [
        (model, modules)
        for model in ("smollm2-135m-instruct", "qwen2-0.5b-instruct")
        for modules in ("all-linear", ["q_proj", "v_proj"])
    ]


def test_a_file_in_the_form_of_gllm_training_is_read_unchanged(tmp_path: Path) -> None:
    one = load(tmp_path, GLLM.format(upload="true"), "experiment_1")
    (run,) = one.runs()
    assert run.hyperparameters == {
        "seq_length": 512,
        "load_in_4bit": False,
        "lora_dim": 16,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj", "v_proj"],
        "gradient_checkpointing": True,
        "seed": 3407,
        "learning_rate": 5e-6,
        "logging_steps": 2,
        "save_steps": 50,
        "load_best_model_at_end": True,
        "eval_steps": 2,
        "report_to": "tensorboard",
        "training_strategy": "dpo",
        "system_prompt": "",
    }
    columns = {"input_columns": {"query": "user_query"}, "label_columns": {"chosen": "good", "rejected": "bad"}}
    prompts = {"prompt_template": "gsheet://sheet_1/prompt", "prompt_name": "prompt_default"}
    assert one.inputs == {
        "train": {"uri": "gsheet://sheet_1/training data", **columns, **prompts},
        "validation": {"uri": "gsheet://sheet_1/held out", **columns, **prompts},
    }
    assert one.labels == {"experiment_id": "1", "topic": "DPO Fine Tuned", "hyperparameters_id": "1"}
    assert one.upload == "s3://models/fine-tuned"
    said = [line.partition("experiments.yml:")[2].partition(" = ")[0] for line in one.warnings]
    assert said == ["11: trust_remote_code", "23: optim", "37: framework"]
    assert load(tmp_path, GLLM.format(upload="false"), "experiment_1").upload == ""

    two = load(tmp_path, GLLM.format(upload="true"), "experiment_2")
    assert two.inputs["train"] == {
        "uri": str(tmp_path / "examples/csv/training_data.csv"),
        "input_columns": {"query": "user_query"},
        "label_columns": {"chosen": {"label": "target"}},  # the answer is a JSON object
    }
    assert "validation" not in two.inputs
    assert two.runs()[0].hyperparameters["training_strategy"] == "sft"


@pytest.mark.parametrize(
    ("changed", "to", "message"),
    [
        ('bias: "none"', 'bias: "all"', 'FILE:LINE: bias = "all": adapters have no bias here; write "none"'),
        ('optim: "adamw_8bit"', "optim: sgd", 'FILE:LINE: optim = "sgd": Palate trains with AdamW'),
        ("max_seq_length: 512", "max_seq_length: 5", "FILE:LINE: seq_length = 5: must be a whole number from 16"),
        ("logging_steps: 2", "loging_steps: 2", "FILE:LINE: loging_steps = 2: unknown name; did you mean logging_steps?"),
        ("multimodal: false", "multimodal: true", "FILE:LINE: multimodal: Palate trains on text; set it to false"),
        ("rejected: \"bad\"", "worse: bad", "FILE:LINE: dpo_column_mapping_config.worse: unknown key"),
        ("train_sheet:", "train_filename:", "FILE:LINE: train_filename: the data is in a spreadsheet: give train_sheet"),
        ("bucket_name: \"models\"", "secret_key: abcdef", "FILE:LINE: secret_key: a file must not contain credentials"),
        ("topic:", "topics:", "FILE:LINE: topics = \"DPO Fine Tuned\": unknown key"),
        ("*s3_storage_config", "*s4", "FILE:LINE: alias *s4 has no anchor above it"),
    ],
)  # fmt: skip
def test_what_has_no_meaning_there_is_named_with_its_line(tmp_path: Path, changed: str, to: str, message: str) -> None:
    text = GLLM.format(upload="true")
    assert changed in text
    line = text.lstrip("\n")[: text.index(changed) - 1].count("\n") + 1
    said = refused(tmp_path, text.replace(changed, to, 1), "experiment_1")
    assert message.replace("LINE", str(line)) in said
    assert "abcdef" not in said


BASE = "a:\n  model_name: smollm2-135m-instruct\n  inputs: {train: p.json}\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("  methd: LoRA_LLM", "FILE:4: methd = \"LoRA_LLM\": unknown key; did you mean 'method'?"),
        ("  lr: 3", "FILE:4: lr = 3: belongs under hyperparameters: `hyperparameters: {learning_rate: …}`"),
        ("  validation: v.json", "FILE:4: validation = \"v.json\": belongs under inputs"),
        ("  jobs: 0", "FILE:4: jobs = 0: expected a whole number from 1 to 64"),
        ("  hyperparameters: {learning_rate: 5}", "FILE:4: learning_rate = 5: must be a number greater than 0"),
        ("  hyperparameters: {learning_rate: [1e-5, 5]}", "FILE:4: learning_rate = 5: must be"),
        ("  hyperparameters: {learning_rate: [1e-5, 1e-5]}", "learning_rate: 1e-05 is in the list twice"),
        ("  hyperparameters: {learning_rate: []}", "an empty list has no value to try"),
        ("  hyperparameters: {r: 8}", "FILE:4: r = 8: unknown name; did you mean lora_dim?"),
        ("  hyperparameters: {_: {lora_dim: 8}}", "_: expected a list of mappings"),
        ("  hyperparameters: {_: [{lora_dim: 8}, {lora_alpha: 8}]}", "give each mapping the same names"),
        ("  hyperparameters: {lora_dim: 8, _: [{lora_dim: 8}]}", "lora_dim is in _ and in hyperparameters"),
        ("  hyperparameters: {learning_rate: {min: 1e-5, max: 1e-4}}", "a range, which a grid cannot have; add search"),
        ("  hyperparameters: {load_in_4bit: [true, false], load_in_8bit: true}", "load_in_4bit = true, load_in_8bit"),
        ("  metric: eval_los", "FILE:4: metric = \"eval_los\": unknown; did you mean 'eval_loss'?"),
        ("  search: tpe", "search has nothing to vary"),
        ("  trials: 3", "trials: belongs to search: random or tpe"),
        ("  environments: {HF_TOKEN: hf_abcdefabcdefabcdef}", "a file must not contain credentials"),
        ("  other: {deep: {hf_token: abcdef}}", "FILE:4: hf_token: a file must not contain credentials"),
        ("  labels: {note: hf_abcdefabcdefabcdef}", "a file must not contain credentials"),
        ("  model_name: other", "FILE:4: key 'model_name' is also in line 2"),
        ("  labels: !!python/object/apply:os.system [id]", "FILE:4: tag 'tag:yaml.org,2002:python/object/apply:os.system'"),
        ("  labels: {a: 1", "FILE:5: is not valid YAML"),
        ("  labels: [" + "[" * 100, "nested more than 24 levels deep"),
        ("b: [1]", "FILE:4: b: is a list, not a mapping"),
        ("b: &shared {r: 8}", "FILE:4: b: is neither an experiment nor used by one"),
    ],
)  # fmt: skip
def test_mistakes_are_named_with_line_value_and_remedy(tmp_path: Path, line: str, message: str) -> None:
    said = refused(tmp_path, BASE + line + "\n")
    assert message in said
    assert "abcdef" not in said


def test_every_problem_of_a_file_is_reported_at_once_and_once(tmp_path: Path) -> None:
    text = "defaults: {hyperparameters: {learning_rate: 7}}\na: {model_name: x, inputs: {train: t, trian: u}}\nb: {inputs: {}}\n"
    said = refused(tmp_path, text)
    assert said.startswith("4 problems in the experiment file:")
    assert said.count("learning_rate = 7") == 1


def test_aliases_cannot_expand_without_limit(tmp_path: Path) -> None:
    levels = ["x0: &x0 {k: v}"]
    levels += [f"x{n}: &x{n} {{" + ", ".join(f"k{i}: *x{n - 1}" for i in range(10)) + "}" for n in range(1, 12)]
    assert "has more than 20,000 values with its aliases expanded" in refused(tmp_path, "\n".join(levels) + "\n" + BASE)
    assert "contains itself through an alias" in refused(tmp_path, BASE + "  labels: &l {again: *l}\n")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "expected experiments by id"),
        (b"- a\n", "expected experiments by id"),
        (b"a: \xff\n", "is not UTF-8"),
        (b"a: \x00\n", "is not valid YAML"),
        (b"#" * (300 << 10), "is larger than the limit of 262,144 bytes"),
        (b"a: 1\n---\nb: 2\n", "is not valid YAML"),
    ],
)
def test_a_hostile_file_is_refused_with_a_reason(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "hostile.yml"
    path.write_bytes(data)
    with pytest.raises(ConfigurationError, match=message):
        ExperimentFile.load(path)


def test_missing_data_is_reported_with_the_other_problems_of_an_experiment(tmp_path: Path) -> None:
    text = BASE + "  jobs: zero\n"
    assert "p.json" not in refused(tmp_path, text)  # of the whole file: the data may come later
    assert refused(tmp_path, text, "a") == (
        "2 problems in the experiment file:\n"
        f'  FILE:3: inputs.train = "p.json": {tmp_path / "p.json"} does not exist; check the path\n'
        '  FILE:4: jobs = "zero": expected a whole number from 1 to 64'
    )


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_a_command_names_the_keys_of_the_file_and_its_own_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], more: tuple[str, ...]
) -> None:
    def told(text: str, *options: str) -> str:
        monkeypatch.setattr("sys.argv", ["palate", "run-experiment", str(write(tmp_path, text)), "a", *more, *options])
        with pytest.raises(SystemExit) as left:
            main()
        assert left.value.code == 1
        return capsys.readouterr().err

    (tmp_path / "p.json").touch()
    assert "experiments.yml:4: jobs = " in told(BASE + "  jobs: zero\n")
    assert "--metric 'foo' is unknown" in told(BASE, "--metric", "foo")


def test_an_unknown_id_names_the_nearest(tmp_path: Path) -> None:
    assert "experiment_id='rate' is not in FILE: did you mean 'rates'? it has rates, lists" in refused(
        tmp_path, NATURAL, "rate"
    )
    with pytest.raises(ConfigurationError, match="does not exist: check the path"):
        ExperimentFile.load(tmp_path / "missing.yml")


SEARCH = """
a:
  model_name: smollm2-135m-instruct
  inputs: {train: p.json}
  search: SEARCH
  trials: 4
  search_seed: 7
  hyperparameters:
    learning_rate: {min: 1e-5, max: 1e-3, log: true}
    lora_dim: {min: 8, max: 32, step: 8}
    target_modules: [all-linear, [q_proj]]
    _: [{lora_alpha: 8, lora_dropout: 0.1}, {lora_alpha: 16, lora_dropout: 0.0}]
"""


@pytest.mark.parametrize("how", ["random", "tpe"])
def test_a_search_stays_in_its_space_and_goes_on_where_it_was(tmp_path: Path, how: str) -> None:
    optuna = pytest.importorskip("optuna")
    from palate.experiments.search import Searcher

    experiment = load(tmp_path, SEARCH.replace("SEARCH", how), "a")

    def searcher() -> Searcher:
        return Searcher(experiment.axes, tpe=how == "tpe", seed=experiment.search_seed, maximize=False)

    def result(values: dict[str, Any]) -> float | None:
        return None if values["lora_dim"] == 32 else values["learning_rate"]

    whole, seen = searcher(), []
    for number in range(12):
        seen.append(whole.ask(number))
        whole.tell(number, seen[-1], result(seen[-1]))
    for values in seen:
        run = experiment.with_values(values)
        assert 1e-5 <= run.hyperparameters["learning_rate"] <= 1e-3
        assert run.hyperparameters["lora_dim"] in (8, 16, 24, 32)
        assert run.hyperparameters["lora_dropout"] == (0.1 if run.hyperparameters["lora_alpha"] == 8 else 0.0)
    assert len({str(values) for values in seen}) == 12

    # Interrupted after six trials, whose values are read from their jobs.
    again = searcher()
    for number in range(6):
        kept = again.values_in(again.record(seen[number]))
        again.tell(number, kept, result(seen[number]))
    assert [again.ask(6)] == [seen[6]]
    assert optuna.logging.get_verbosity() == optuna.logging.WARNING

    # Another client's trial 7 has values of its own: they count, and not those that were drawn here.
    again.tell(6, seen[6], result(seen[6]))
    again.ask(7)
    theirs = {**seen[7], "lora_dim": 8, "learning_rate": 5e-4}
    again.tell(7, theirs, 0.25)
    other = searcher()
    for number in range(7):
        other.tell(number, seen[number], result(seen[number]))
    other.tell(7, theirs, 0.25)
    assert again.ask(8) == other.ask(8)

    for values in ({**seen[0], "lora_alpha": 9}, {**seen[0], "lora_dim": 99}, {"lora_dim": 8}, [1]):
        with pytest.raises(ConfigurationError, match="not values of this search"):
            again.values_in(json.dumps(values))
    with pytest.raises(ConfigurationError, match="not values of this search"):
        again.values_in("")


def test_a_search_may_have_more_combinations_than_a_grid(tmp_path: Path) -> None:
    many = """
a:
  model_name: smollm2-135m-instruct
  inputs: {train: p.json}
  HOW
  hyperparameters:
    seed: [SEEDS]
    logging_steps: [STEPS]
""".replace("SEEDS", ", ".join(map(str, range(1000)))).replace("STEPS", ", ".join(map(str, range(1, 1001))))
    assert "the sweep has 1,000,000 combinations: at most 1,000 are run; use search: random" in refused(
        tmp_path, many.replace("  HOW\n", "")
    )
    for how in ("random", "tpe"):
        experiment = load(tmp_path, many.replace("HOW", f"search: {how}\n  trials: 4"), "a")
        assert experiment.axes.size == 1_000_000
    with_ranges = many.replace("HOW", "search: random\n  trials: 4") + "    learning_rate: {min: 1e-5, max: 1e-3}\n"
    contradiction = with_ranges + "    load_best_model_at_end: true\n    fsdp: full_shard\n"
    assert "load_best_model_at_end = true" in refused(tmp_path, contradiction)


@pytest.mark.parametrize(
    ("metric", "inputs", "message"),
    [
        (
            "win_rate",
            "{train: p.json, validation: v.json}",
            r"FILE:6: metric = 'win_rate': a search needs the metric when",
        ),
        ("eval_loss", "{train: p.json}", r"FILE:6: metric = 'eval_loss': needs validation data; add `validation` to"),
    ],
)
def test_a_metric_that_no_trial_has_is_refused(tmp_path: Path, metric: str, inputs: str, message: str) -> None:
    text = SEARCH.replace("SEARCH", "tpe").replace("{train: p.json}", inputs)
    assert message in refused(tmp_path, text.replace("search_seed: 7", f"metric: {metric}"))
    with pytest.raises(ConfigurationError, match=f"experiment a: metric = '{metric}'"):
        load(tmp_path, text, "a").run(metric=metric)


def test_a_search_over_what_defines_the_loss_needs_another_metric(tmp_path: Path) -> None:
    text = SEARCH.replace("SEARCH", "tpe").replace(
        "learning_rate: {min: 1e-5, max: 1e-3, log: true}", "dpo_beta: {min: 0.1, max: 0.5}"
    )
    experiment = load(tmp_path, text.replace("    dpo_beta", "    training_strategy: dpo\n    dpo_beta"), "a")
    with pytest.raises(ConfigurationError, match="losses of different dpo_beta do not compare: add validation data"):
        experiment.run()


def test_a_search_whose_limits_change_is_the_same_search(tmp_path: Path) -> None:
    first, longer, other = (
        load(
            tmp_path, SEARCH.replace("SEARCH", "tpe").replace("  trials: 4", f"  trials: 4\n  {line}"), "a"
        ).search_digest
        for line in ("max_run_time: 60", "max_run_time: 600\n  max_attempts: 3", "method: Standard_LLM")
    )
    assert first == longer != other


def search_over_models(folder: Path, tiny: Path) -> Experiment:
    (folder / "prefs.json").write_text(json.dumps(preference_rows(8)))
    (folder / "other").symlink_to(tiny)
    return load(
        folder,
        """
a:
  model_name: tiny
  model_uri: [MODEL, other]
  inputs: {train: prefs.json}
  search: random
  trials: 2
  hyperparameters: {training_strategy: dpo, learning_rate: {min: 1e-5, max: 1e-3}}
""".replace("MODEL", str(tiny)),
        "a",
    )


def submitted(session: Session, plans: Plans, plan: Planned) -> Record:
    """The record of a plan's job as it is after its training."""
    record = Record(session.store, "jobs", plan.name)
    body = plans._body(plan.recipe)
    record.create(replace_fields(train_manifest(plan.name, labels=plan.recipe.labels), body=body))
    record.advance("Running", expect={"Creating"})
    record.advance("Succeeded", expect={"Running"})
    return record


def test_a_search_over_models_finds_its_trials_again(session: Session, tmp_path: Path, tiny: Path) -> None:
    pytest.importorskip("optuna")
    for experiment in (
        search_over_models(tmp_path, tiny),
        load(
            tmp_path,
            """
b:
  model_name: [hf://HuggingFaceTB/SmolLM2-135M-Instruct, hf://Qwen/Qwen2-0.5B-Instruct]
  model_version: [v1, v2]
  inputs: {train: prefs.json}
  search: random
  trials: 2
  hyperparameters: {training_strategy: dpo}
""",
            "b",
        ),
    ):
        with prepared(experiment, session) as plans:
            (first,) = planned_runs(plans)
            submitted(session, plans, first)
            (again,) = planned_runs(plans)
        assert (first.state, again.state) == ("new", "Succeeded")
        assert again.run == first.run


def test_a_trial_that_another_client_has_started_has_its_values(session: Session, tmp_path: Path, tiny: Path) -> None:
    pytest.importorskip("optuna")
    experiment, said = search_over_models(tmp_path, tiny), list[str]()
    with prepared(experiment, session) as plans:
        (ours,), (theirs,) = planned_runs(plans), planned_runs(plans)
        drawn = ours.run.varied
        uris = experiment.axes.lists["model_uri"]
        values = {**drawn, "learning_rate": 2e-5, "model_uri": uris[drawn["model_uri"] == uris[0]]}
        # What the other client has drawn.
        winner = plans.plan(experiment.with_values(values), name=theirs.name, labels=theirs.recipe.labels)
        winner.recipe.labels["values"] = json.dumps(values)
        submitted(session, plans, winner)
        _Crew(plans, 1, said.append).work([ours])
    assert ours.run.varied == values
    assert ours.recipe.model_uri == values["model_uri"]
    assert said[0] == f"{ours.name}: was just started by another process"


def test_an_experiment_without_a_best_run_says_so(
    session: Session, tmp_path: Path, tiny: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its jobs are in the store, without the metric."""
    pytest.importorskip("optuna")
    experiment = replace(search_over_models(tmp_path, tiny), trials=1, upload=str(tmp_path / "copies"))
    with prepared(experiment, session) as plans:
        submitted(session, plans, *planned_runs(plans))
    result = experiment.run(session=session)
    assert (result.has_best, result.model_copy, result.failed) == (False, "", ())
    assert result.comparison.metric == "final_loss"
    said = capfd.readouterr().err
    assert "the search chooses by final_loss, the training loss: there is no validation data" in said
    assert "no model is copied to" in said
    with pytest.raises(JobNotReadyError, match="no job has succeeded with final_loss"):
        _ = result.best

    experiment.file.write_text(experiment.file.read_text().replace("trials: 2", "trials: 1"))
    command = [sys.executable, "-m", "palate.cli", "run-experiment", str(experiment.file), "a"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "no run is the best: none has final_loss" in done.stderr
    assert f"compare {result.runs[0].job.id if result.runs[0].job else ''}" in done.stderr.splitlines()[-1]
