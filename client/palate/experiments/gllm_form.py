"""Translates experiments in the form of GDP Labs' gllm-training, whose files run here unchanged. Knows their keys, not how they run.

Source: the pages "Direct Preference Optimization (DPO)" and "Supervised Fine Tuning (SFT)" of its documentation. A setting without a
meaning here becomes a warning if the model is the same without it, else a problem with a remedy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from palate.experiments.yaml_tree import Node
from palate_recipes.hyperparameters import BEST_METRICS, HYPERPARAMETERS, shorten

Report = Callable[[Node, str], None]
Warn = Callable[[int, str], None]

_MARKS = (
    *("experiment_id", "spreadsheet_id", "datasets_path", "train_sheet", "train_filename"),
    *("column_mapping_config", "dpo_column_mapping_config"),
)
"""Keys that only this form has."""

_RENAMED = {
    "max_seq_length": "seq_length",
    "r": "lora_dim",
    "random_state": "seed",
    "beta": "dpo_beta",
    "use_gradient_checkpointing": "gradient_checkpointing",
}
_STORED = "outputs are in the job's folder of the store, which PALATE_STORE or `store:` chooses"
_WITHOUT_MEANING = {
    "framework": "Palate trains with TRL and PEFT, with its own faster kernels",
    "save_processed_dataset": "the rows of a training are kept with its job, under inputs/",
    "output_processed_dir": "the rows of a training are kept with its job, under inputs/",
    "model_output_dir": _STORED,
    "model_cache_dir": "weights from the hub are in its own cache, which HF_HOME chooses",
    "trust_remote_code": "Palate runs no code of a model's repository",
    "gpu_memory_utilization": "it is for an engine inside the training; `palate deploy --gpu-memory` sets it for a service",
    "enable_thinking": "prompts are rendered by the model's chat template with its defaults",
    "thinking_mode": "prompts are rendered by the model's chat template with its defaults",
    "add_generation_prompt": "prompts always end as in serving",
    "per_device_eval_batch_size": "evaluations use per_device_train_batch_size; the figures are the same",
    "save_total_limit": "all checkpoints are kept",
    "dataloader_num_workers": "rows are in memory",
    "logging_dir": _STORED,
    "output_dir": _STORED,
}
_SILENT: Mapping[str, tuple[Any, ...]] = {
    "trust_remote_code": (False,),
    "enable_thinking": (False,),
    "thinking_mode": ("off", False),
    "add_generation_prompt": (False,),
    "save_processed_dataset": (False,),
}
"""Values that say what Palate does anyway."""

_EXPERIMENT_KEYS = (
    *("experiment_id", "topic", "framework", "multimodal", "spreadsheet_id", "train_sheet", "validation_sheet"),
    *("prompt_sheet", "prompt_name", "datasets_path", "train_filename", "validation_filename", "prompt_filename"),
    *("column_mapping_config", "dpo_column_mapping_config", "storage_config", "hyperparameters"),
    *("save_processed_dataset", "output_processed_dir"),
)


@dataclass(frozen=True)
class Translated:
    """An experiment with Palate's keys, and the folder that its model is copied to, or ""."""

    entries: dict[str, Node]
    upload: str


def is_gllm_form(entries: Mapping[str, Node]) -> bool:
    """Whether an experiment has this form."""
    return any(name in entries for name in _MARKS)


def translate(entries: Mapping[str, Node], problem: Report, warn: Warn) -> Translated:
    """Translates an experiment.

    Args:
        entries: Its keys with their values. Keys of Palate's own form are kept.
        problem: Called with place and text of what cannot be translated.
        warn: Called with line and text of what has no meaning here.
    """
    found = {name: node for name, node in entries.items() if name not in _EXPERIMENT_KEYS}
    labels = dict(entries["labels"].value) if "labels" in entries and isinstance(entries["labels"].value, dict) else {}
    for name in ("experiment_id", "topic"):
        if name in entries:
            labels[name] = Node(str(entries[name].plain), entries[name].line)
    for name in ("framework", "save_processed_dataset", "output_processed_dir"):
        if name in entries:
            _no_meaning(name, entries[name], warn)
    if "multimodal" in entries and entries["multimodal"].value is not False:
        problem(entries["multimodal"], "multimodal: Palate trains on text; set it to false")
    hyperparameters = _Hyperparameters(entries.get("hyperparameters"), problem, warn)
    inputs, strategy, line = _inputs(entries, problem)
    if strategy and "training_strategy" not in hyperparameters.values:
        hyperparameters.values["training_strategy"] = Node(strategy, line)
    if "system_prompt" not in hyperparameters.values:
        # Their system prompt is the template's; without one there is none, unlike Palate's default.
        hyperparameters.values["system_prompt"] = Node("", line)
    if hyperparameters.identity is not None:
        labels["hyperparameters_id"] = hyperparameters.identity
    if hyperparameters.full and "method" not in found:
        found["method"] = Node("Standard_LLM", hyperparameters.line)
    hyperparameters.settle(inputs, strategy or "sft")
    found["hyperparameters"] = Node(hyperparameters.values, hyperparameters.line)
    if labels:
        found["labels"] = Node(labels, line)
    if "inputs" not in found:
        found["inputs"] = Node(inputs, line)
    return Translated(found, _upload(entries.get("storage_config"), problem))


def _no_meaning(name: str, node: Node, warn: Warn) -> None:
    if node.value not in _SILENT.get(name, ()):
        warn(node.line, f"{name} = {shorten(node.plain)} has no effect: {_WITHOUT_MEANING[name]}")


class _Hyperparameters:
    """Translates the block of hyperparameters."""

    def __init__(self, node: Node | None, problem: Report, warn: Warn) -> None:
        self._problem, self._warn = problem, warn
        self.line = node.line if node else 1
        self.values: dict[str, Node] = {}
        self.identity: Node | None = None
        self.full = False
        self._evaluation: Node | None = None
        self._saving: Node | None = None
        self._greater: Node | None = None
        if node is None:
            return
        if not isinstance(node.value, dict):
            problem(node, f"hyperparameters = {shorten(node.plain)}: expected a mapping, or an alias of one")
            return
        for name, item in node.value.items():
            self._add(name, item)

    def _add(self, name: str, node: Node) -> None:
        value = node.value
        if name == "hyperparameters_id":
            self.identity = Node(str(node.plain), node.line)
        elif name in _RENAMED or name in HYPERPARAMETERS or name.startswith("_"):
            own = _RENAMED.get(name, name)
            if own == "gradient_checkpointing" and value == "unsloth":
                node = Node(True, node.line)
            elif own == "metric_for_best_model" and isinstance(value, str) and not value.startswith("eval_"):
                node = Node(f"eval_{value}", node.line)
            if own in self.values:
                self._problem(node, f"{name}: {own} is set in line {self.values[own].line} too: remove one of them")
            self.values[own] = node
        elif name == "load_in_16bit":
            if value is True:
                self.values.setdefault("load_in_4bit", Node(False, node.line))
        elif name == "full_finetuning":
            self.full = value is True
        elif name in ("bf16", "fp16"):
            if value is True:
                self.values["precision"] = Node("bfloat16" if name == "bf16" else "float16", node.line)
        elif name == "bias":
            if value != "none":
                self._problem(node, f'bias = {shorten(node.plain)}: adapters have no bias here; write "none"')
        elif name == "resume_from_checkpoint":
            if value is not False:
                self._problem(
                    node,
                    "resume_from_checkpoint: running the same experiment again resumes what failed or was stopped; write false",
                )
        elif name == "optim":
            if not str(value).startswith("adamw"):
                self._problem(
                    node, f"optim = {shorten(node.plain)}: Palate trains with AdamW; omit it, or write adamw_torch"
                )
            elif value not in ("adamw_torch", "adamw_torch_fused"):
                self._warn(node.line, f"optim = {shorten(node.plain)} has no effect: AdamW's state is in 32 bits")
        elif name == "eval_strategy":
            self._evaluation = self._one_of(name, node, ("no", "steps", "epoch"))
        elif name == "save_strategy":
            self._saving = self._one_of(name, node, ("no", "steps", "epoch", "best"))
        elif name == "greater_is_better":
            self._greater = node
        elif name == "warmup_steps":
            self._problem(node, f"warmup_steps = {shorten(node.plain)}: give warmup_ratio, the share of all steps")
        elif name in _WITHOUT_MEANING:
            _no_meaning(name, node, self._warn)
        else:
            self.values[name] = node  # unknown: reported with a suggestion by the reader

    def _one_of(self, name: str, node: Node, choices: tuple[str, ...]) -> Node | None:
        if node.value in choices:
            return node
        self._problem(node, f"{name} = {shorten(node.plain)}: expected one of {', '.join(choices)}")
        return None

    def settle(self, inputs: dict[str, Node], strategy: str) -> None:
        """Translates what depends on other settings: evaluation and checkpoints."""
        if self._evaluation is not None:
            line = self._evaluation.line
            if self._evaluation.value == "no":
                if inputs.pop("validation", None) is not None:
                    self._warn(
                        line, "eval_strategy = no: the validation data is not used; write steps or epoch to evaluate"
                    )
            elif self._evaluation.value == "steps" and "eval_steps" not in self.values:
                # transformers takes logging_steps there.
                every = self.values.get("logging_steps", Node(HYPERPARAMETERS["logging_steps"].default, line))
                self.values["eval_steps"] = Node(every.value, line)
            elif self._evaluation.value == "epoch":
                self.values["eval_steps"] = Node(0, line)
        if self._saving is not None:
            line = self._saving.line
            if self._saving.value == "no":
                self.values["save_steps"] = Node(0, line)
            elif self._saving.value == "best":
                self.values.setdefault("load_best_model_at_end", Node(True, line))
                self.values["save_steps"] = Node(0, line)
            elif self._saving.value == "epoch":
                self._warn(
                    line, "save_strategy = epoch has no effect: save_steps sets the steps between two checkpoints"
                )
        if self._greater is not None:
            metric = self.values.get("metric_for_best_model", Node(BEST_METRICS[strategy][0], 1)).value
            if self._greater.value is not (not str(metric).endswith("loss")):
                self._problem(
                    self._greater, f"greater_is_better = {shorten(self._greater.plain)}: contradicts {metric}; omit it"
                )


def _inputs(entries: Mapping[str, Node], problem: Report) -> tuple[dict[str, Node], str, int]:
    """Returns data by channel, the training strategy (or ""), and the line of the data."""
    sheet, folder = entries.get("spreadsheet_id"), entries.get("datasets_path")
    first = sheet or folder or next(iter(entries.values()))
    if sheet and folder:
        problem(folder, f"datasets_path: spreadsheet_id in line {sheet.line} is set too: remove one of them")
    columns, strategy = _columns(entries, problem)
    if not sheet and not folder:
        if "inputs" not in entries:
            problem(first, "no training data: give spreadsheet_id and train_sheet, or datasets_path and train_filename")
        return {}, strategy, first.line
    own, other = ("sheet", "filename") if sheet else ("filename", "sheet")
    for name in ("train", "validation", "prompt"):
        if f"{name}_{other}" in entries:
            problem(
                entries[f"{name}_{other}"],
                f"{name}_{other}: the data is in {'a spreadsheet' if sheet else 'files'}: give {name}_{own}",
            )

    def place(name: str) -> Node | None:
        node = entries.get(f"{name}_{own}")
        if node is None:
            return None
        if not isinstance(node.value, str) or not isinstance(first.value, str):
            problem(node, f"{name}_{own} = {shorten(node.plain)}: expected a text")
            return None
        base = f"gsheet://{first.value}" if sheet else first.value.rstrip("/")
        return Node(f"{base}/{node.value}", node.line)

    if f"train_{own}" not in entries:
        problem(first, f"no training data: add train_{own}, the {'worksheet' if sheet else 'file'} with it")
    more = dict(columns)
    if template := place("prompt"):
        more["prompt_template"] = template
        if "prompt_name" in entries:
            more["prompt_name"] = entries["prompt_name"]
    elif "prompt_name" in entries:
        problem(entries["prompt_name"], f"prompt_name: there is no prompt_{own}, the {own} with the prompts: add it")
    inputs = {
        channel: Node({"uri": found, **more} if more else found.value, found.line)
        for channel in ("train", "validation")
        if (found := place(channel))
    }
    return inputs, strategy, first.line


def _columns(entries: Mapping[str, Node], problem: Report) -> tuple[dict[str, Node], str]:
    """Returns input_columns and label_columns as `PreferenceData` has them, and the training strategy (or "")."""
    names = [name for name in ("dpo_column_mapping_config", "column_mapping_config") if name in entries]
    if not names:
        return {}, ""
    if len(names) > 1:
        problem(entries[names[1]], f"{names[1]}: {names[0]} is set too: remove one of them")
    node = entries[names[0]]
    if not isinstance(node.value, dict):
        problem(node, f"{names[0]} = {shorten(node.plain)}: expected a mapping with input_columns")
        return {}, ""
    given = dict(node.value)
    inputs = given.pop("input_columns", None)
    if "image_columns" in given:
        problem(given.pop("image_columns"), "image_columns: Palate trains on text; remove it")
    labels = given.pop("label_columns", None)
    answers = {name: given.pop(name) for name in ("chosen", "rejected") if name in given}
    for name, item in given.items():
        problem(
            item,
            f"{names[0]}.{name[:60]}: unknown key; expected input_columns, and chosen and rejected, or label_columns",
        )
    if inputs is None:
        problem(node, f"{names[0]}: has no input_columns: add placeholders of the prompt and their columns")
        return {}, ""
    if labels is not None and isinstance(labels.value, dict) and "chosen" in labels.value:
        answers = {**labels.value, **answers}
    elif labels is not None:
        # One answer: a column, or several as a JSON object. `chosen` is the only one that SFT reads.
        answers.setdefault("chosen", labels)
    if "chosen" not in answers:
        problem(node, f"{names[0]}: has no chosen and rejected, and no label_columns: add the columns of the answers")
        return {}, ""
    strategy = "dpo" if "rejected" in answers else "sft"
    if names[0].startswith("dpo") and strategy == "sft":
        problem(node, f"{names[0]}: has no rejected: add the column of the worse answers")
    line = answers["chosen"].line
    return {"input_columns": inputs, "label_columns": Node(answers, line)}, strategy


def _upload(node: Node | None, problem: Report) -> str:
    """Returns the URI of the folder that the model is copied to, or ""."""
    if node is None:
        return ""
    if not isinstance(node.value, dict):
        problem(node, f"storage_config = {shorten(node.plain)}: expected a mapping, or an alias of one")
        return ""
    known = ("provider", "bucket_name", "object_prefix", "upload_to_cloud")
    for name, item in node.value.items():
        if name not in known:
            problem(
                item,
                f"storage_config.{name[:60]}: unknown key; valid keys: {', '.join(known)}. Endpoint, region and access keys come from "
                "the environment (AWS_*)",
            )
    values = node.plain
    if values.get("upload_to_cloud", False) is not True:
        if values.get("upload_to_cloud") not in (None, False):
            problem(
                node, f"storage_config.upload_to_cloud = {shorten(values['upload_to_cloud'])}: expected true or false"
            )
        return ""
    provider, bucket, prefix = (values.get(name) for name in ("provider", "bucket_name", "object_prefix"))
    if provider not in ("s3", "oss"):
        problem(node, f"storage_config.provider = {shorten(provider)}: expected s3 or oss")
    if not isinstance(bucket, str) or not bucket:
        problem(node, f"storage_config.bucket_name = {shorten(bucket)}: expected the bucket's name")
    return f"{provider}://{bucket}" + (f"/{str(prefix).strip('/')}" if prefix else "")
