"""The hyperparameter schema: one typed field per name, with default, bounds, unit, meaning and parser.

Knows single values, not how they depend on each other or on the machine. A parser raises TypeError, ValueError or OverflowError.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, Literal, get_args, get_origin

from msgspec import NODEFAULT, Meta, Struct
from msgspec.structs import fields

from palate_recipes.trackers import OFF, PREFIXES

ALL_LINEAR = "all-linear"


def _string(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    value.encode()  # raises for a lone surrogate (from terminal input that is not UTF-8), which no manifest can contain
    return value


def _bool(value: object) -> bool:
    if isinstance(value, bool):
        return value
    text = _string(value).strip().casefold()
    if text not in ("true", "1", "false", "0"):
        raise ValueError
    return text in ("true", "1")


def _int(value: object) -> int:
    if isinstance(value, bool):
        raise TypeError  # Python treats True as 1, but a flag instead of a count is a mistake
    if hasattr(value.__class__, "__index__"):  # includes numpy integers
        return operator.index(value)  # type: ignore[arg-type]
    if isinstance(value, str):
        try:
            return int(_ascii(value))
        except ValueError:
            pass
    number = _float(value)
    if not number.is_integer():
        raise ValueError
    return int(number)


def _float(value: object) -> float:
    if isinstance(value, bool) or not (isinstance(value, str) or hasattr(value.__class__, "__float__")):
        raise TypeError
    number = float(_ascii(value) if isinstance(value, str) else value)  # type: ignore[arg-type]
    if not math.isfinite(number):
        raise ValueError
    return number


def _ascii(text: str) -> str:
    if "_" in text or not text.isascii():
        raise ValueError  # Python parses "1_0" and digits of all scripts as numbers; other parsers do not
    return text


def _modules(value: object) -> str | list[str]:
    if isinstance(value, str) and value.strip().casefold() == ALL_LINEAR:
        return ALL_LINEAR
    names = [_string(item).strip() for item in _items(value)]
    if not names or not all(name.replace(".", "").isidentifier() for name in names):
        raise ValueError
    # A list even for one name: PEFT reads a plain string as a regular expression.
    return list(dict.fromkeys(names))


def _items(value: object) -> list[object]:
    """Returns the items of a list, or of a string such as "a,b" or "[1, 2]"."""
    if isinstance(value, str):
        text = value.strip()
        if not text.startswith("["):
            return [part.strip() for part in text.split(",")] if text else []
        import json

        value = json.loads(text)
    if not isinstance(value, (list, tuple)):
        raise TypeError
    return list(value)


def _names(value: object) -> str:
    names = [_string(item).strip().casefold() for item in _items(value)]
    if not names or len(set(names)) < len(names):
        raise ValueError
    return ",".join(names)


def _numbers(value: object) -> list[float]:
    single = isinstance(value, (int, float)) and not isinstance(value, bool)
    return [_float(item) for item in (_items([value]) if single else _items(value))]


PARSERS: Mapping[str, Callable[[object], Any]] = {
    "string": _string,
    "bool": _bool,
    "int": _int,
    "float": _float,
    "modules": _modules,
    "names": _names,
    "numbers": _numbers,
}


Method = Literal["LoRA_LLM", "QLoRA_LLM", "Standard_LLM"]
METHODS: Mapping[str, str] = MappingProxyType(
    {
        "LoRA_LLM": "trains a low-rank adapter on frozen weights, in 4 bits if CUDA is available",
        "QLoRA_LLM": "trains a low-rank adapter on frozen weights, in 4 or 8 bits on every machine",
        "Standard_LLM": "trains all weights of the model; needs the most memory",
    }
)

Schedule = Literal[  # transformers.SchedulerType, without those that need lr_scheduler_kwargs or an evaluation
    "linear",
    "cosine",
    "constant",
    "constant_with_warmup",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
]
BestMetric = Literal["eval_loss", "eval_rewards/accuracies", "eval_rewards/margins", "eval_mean_token_accuracy"]
LOSS_TYPES = (  # trl.DPOConfig.loss_type 1.16, all of them
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "robust",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
)


@dataclass(frozen=True)
class Hyperparameter:
    """One hyperparameter: its meaning and its valid values.

    `type` is "string", "int", "float", "bool", "modules" (`"all-linear"` or a list of module names), "names" (one or several of
    `choices`, stored as `"sigmoid,sft"`), or "numbers" (a list, possibly empty; the bounds apply to each item).
    `minimum` and `maximum` are inclusive unless marked exclusive. Every number has both.
    """

    name: str
    type: str
    default: Any
    meaning: str
    unit: str = ""
    minimum: float | None = None
    maximum: float | None = None
    minimum_exclusive: bool = False
    maximum_exclusive: bool = False
    choices: tuple[str, ...] | None = None

    @property
    def expectation(self) -> str:
        """The valid values, worded to follow "must be"."""
        if self.type == "names":
            return "one or, as a list or separated by commas, several of " + ", ".join(self.choices or ())
        if self.type == "numbers":
            end = " to less than" if self.maximum_exclusive else " to"
            return (
                f"numbers from {_number(self.minimum)}{end} {_number(self.maximum)}, as a list or separated by commas"
            )
        if self.choices:
            return "one of " + ", ".join(self.choices)
        if self.type == "bool":
            return "true or false"
        if self.type == "string":
            return "a string"
        if self.type == "modules":
            return f'"{ALL_LINEAR}", or module names as a list or separated by commas'
        noun = "a whole number" if self.type == "int" else "a number"
        if self.minimum_exclusive:
            return f"{noun} greater than {_number(self.minimum)}, at most {_number(self.maximum)}"
        end = " to less than" if self.maximum_exclusive else " to"
        return f"{noun} from {_number(self.minimum)}{end} {_number(self.maximum)}"

    def parse(self, value: object) -> Any:
        """Returns the typed value. Strings are parsed, as PAI sends them: `"5e-5"`, `"8"`, `"true"`.

        Raises:
            ValueError: The value has the wrong type or is out of bounds. The message says what is expected.
        """
        try:
            parsed = PARSERS[self.type](value)
        except (TypeError, ValueError, OverflowError, RecursionError):
            raise ValueError(f"must be {self.expectation}") from None
        if self.type == "names":
            if not set(parsed.split(",")) <= set(self.choices or ()):
                raise ValueError(f"must be {self.expectation}")
        elif self.choices:
            parsed = parsed.strip().casefold()
            if parsed not in self.choices:
                raise ValueError(f"must be {self.expectation}")
        numbers = parsed if self.type == "numbers" else [parsed] if self.type in ("int", "float") else []
        if not all(map(self._within, numbers)):
            raise ValueError(f"must be {self.expectation}")
        return parsed

    def _within(self, number: float) -> bool:
        if self.minimum is not None and number <= self.minimum:
            return number == self.minimum and not self.minimum_exclusive
        if self.maximum is not None and number >= self.maximum:
            return number == self.maximum and not self.maximum_exclusive
        return True


class Hyperparameters(Struct, frozen=True, kw_only=True):
    """The resolved hyperparameters of a run. The only definition of their types, bounds, defaults, units and meanings."""

    training_strategy: Annotated[
        Literal["sft", "dpo", "kto"],
        Meta(
            description="training objective: sft imitates one answer, dpo prefers the chosen over the rejected answer, "
            "kto learns from single answers that are good or bad"
        ),
    ] = "sft"
    learning_rate: Annotated[float, Meta(gt=0, le=1, description="peak step size of AdamW")] = 5e-5
    num_train_epochs: Annotated[
        float,
        Meta(
            gt=0,
            le=1000,
            description="passes over the training data; a fraction stops within a pass",
            extra={"unit": "epochs"},
        ),
    ] = 1.0
    per_device_train_batch_size: Annotated[
        int,
        Meta(
            ge=1,
            le=1024,
            description="rows (sft), pairs (dpo) or answers (kto: at least 2, by default 4) of one batch on one device",
            extra={"unit": "rows"},
        ),
    ] = 1
    seq_length: Annotated[
        int,
        Meta(
            ge=16,
            le=1_048_576,
            description="maximum length of prompt plus answer; longer rows are truncated at the end",
            extra={"unit": "tokens"},
        ),
    ] = 128
    lora_dim: Annotated[
        int,
        Meta(
            ge=0,
            le=512,
            description="rank of the adapter's matrices; 0 only with Standard_LLM, 512 is the largest rank that vLLM "
            "serves",
        ),
    ] = 32
    lora_alpha: Annotated[
        int, Meta(ge=1, le=4096, description="the adapter's output is scaled by lora_alpha / lora_dim")
    ] = 32
    dpo_beta: Annotated[
        float,
        Meta(gt=0, le=100, description="weight of the reference model in DPO and KTO: higher values stay closer to it"),
    ] = 0.1
    load_in_4bit: Annotated[
        bool,
        Meta(
            description="load the frozen weights in 4 bits; false by default without CUDA, with load_in_8bit or "
            "Standard_LLM"
        ),
    ] = True
    load_in_8bit: Annotated[bool, Meta(description="load the frozen weights in 8 bits")] = False
    gradient_accumulation_steps: Annotated[
        int,
        Meta(
            ge=1,
            le=4096,
            description="number of batches whose gradients are averaged in one optimizer step",
            extra={"unit": "batches"},
        ),
    ] = 8
    apply_chat_template: Annotated[
        bool, Meta(description="wrap prompt and answer in the model's chat template, with system_prompt")
    ] = True
    system_prompt: Annotated[
        str,
        Meta(
            description="system message of every row when the chat template is applied; empty means none, not even "
            "the template's default"
        ),
    ] = "You are a helpful assistant"
    warmup_ratio: Annotated[
        float,
        Meta(
            ge=0,
            lt=1,
            description="fraction of optimizer steps in which the learning rate rises from 0",
            extra={"unit": "fraction of steps"},
        ),
    ] = 0.0
    target_modules: Annotated[
        str | list[str],
        Meta(
            description='layers with an adapter: "all-linear" (all but the output head), or names such as q_proj,v_proj',
            extra={"form": "modules"},
        ),
    ] = ALL_LINEAR
    lora_dropout: Annotated[
        float,
        Meta(
            ge=0,
            lt=1,
            description="fraction of the adapter's inputs that is dropped in training",
            extra={"unit": "fraction"},
        ),
    ] = 0.0
    lr_scheduler_type: Annotated[Schedule, Meta(description="schedule of the learning rate after the warm-up")] = (
        "linear"
    )
    weight_decay: Annotated[float, Meta(ge=0, le=1, description="AdamW's decoupled weight decay")] = 0.0
    max_grad_norm: Annotated[
        float,
        Meta(
            ge=0,
            le=1000,
            description="gradients with a larger norm are scaled down to it; 0 turns clipping off",
            extra={"unit": "L2 norm"},
        ),
    ] = 1.0
    seed: Annotated[
        int, Meta(ge=0, le=4_294_967_295, description="seed of adapter initialization, data order and dropout")
    ] = 42
    logging_steps: Annotated[
        int,
        Meta(
            ge=1,
            le=1_000_000,
            description="steps between two log lines of metrics",
            extra={"unit": "optimizer steps"},
        ),
    ] = 10
    save_steps: Annotated[
        int,
        Meta(
            ge=0,
            le=10_000_000,
            description="steps between two checkpoints; 0 saves only at the end",
            extra={"unit": "optimizer steps"},
        ),
    ] = 0
    eval_steps: Annotated[
        int,
        Meta(
            ge=0,
            le=10_000_000,
            description="steps between two evaluations; 0 evaluates at the end of every epoch",
            extra={"unit": "optimizer steps"},
        ),
    ] = 0
    max_steps: Annotated[
        int,
        Meta(
            ge=0,
            le=100_000_000,
            description="stops after this many steps, regardless of num_train_epochs; 0 means no limit",
            extra={"unit": "optimizer steps"},
        ),
    ] = 0
    load_best_model_at_end: Annotated[
        bool,
        Meta(
            description="the model is the checkpoint of the evaluation with the best metric_for_best_model, not the last step; "
            "needs validation data, and writes a checkpoint at each improvement"
        ),
    ] = False
    metric_for_best_model: Annotated[
        BestMetric,
        Meta(
            description="metric of the evaluations that load_best_model_at_end and early_stopping_patience compare; lower is "
            "better for eval_loss, higher for the others"
        ),
    ] = "eval_loss"
    early_stopping_patience: Annotated[
        int,
        Meta(
            ge=0,
            le=10_000,
            description="stops the training after this many evaluations in a row without an improvement; 0 turns it off; "
            "needs validation data",
            extra={"unit": "evaluations"},
        ),
    ] = 0
    early_stopping_threshold: Annotated[
        float,
        Meta(
            ge=0,
            le=1000,
            description="smallest change of metric_for_best_model that counts as an improvement for early_stopping_patience",
            extra={"unit": "of the metric"},
        ),
    ] = 0.0
    loss_type: Annotated[
        str,
        Meta(
            description="loss over a pair in dpo, with TRL's names; sigmoid is the DPO paper's; several are summed",
            extra={"form": "names", "choices": LOSS_TYPES},
        ),
    ] = "sigmoid"
    loss_weights: Annotated[
        list[Annotated[float, Meta(ge=0, le=1000)]],
        Meta(
            description="factor of each loss in loss_type, in its order; empty is 1 for each", extra={"form": "numbers"}
        ),
    ] = []
    label_smoothing: Annotated[
        float,
        Meta(
            ge=0,
            lt=0.5,
            description="assumed share of pairs with flipped labels, in the losses robust, exo_pair (above 0), "
            "aot and aot_unpaired",
            extra={"unit": "fraction"},
        ),
    ] = 0.0
    ld_alpha: Annotated[
        float,
        Meta(
            ge=0,
            le=1,
            description="weight of the tokens by which the longer answer of a pair exceeds the other (LD-DPO); 1 is "
            "plain DPO",
            extra={"unit": "fraction"},
        ),
    ] = 1.0
    discopop_tau: Annotated[float, Meta(gt=0, le=100, description="temperature of the loss discopop")] = 0.05
    desirable_weight: Annotated[
        float,
        Meta(
            ge=0,
            le=1000,
            description="factor of the loss of good answers in kto, to balance unequal numbers of good and bad answers",
        ),
    ] = 1.0
    undesirable_weight: Annotated[
        float, Meta(ge=0, le=1000, description="factor of the loss of bad answers in kto")
    ] = 1.0
    bad_rows: Annotated[
        Literal["refuse", "skip"],
        Meta(
            description="handling of rows that are empty, incomplete or have the same answer twice: refuse fails with their "
            "numbers, skip skips and reports them"
        ),
    ] = "refuse"
    precision: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Meta(
            description="number format of the frozen weights and of the arithmetic; auto is bfloat16 if the GPU or "
            "CPU supports it natively, else float16 on CUDA and float32 on a CPU"
        ),
    ] = "auto"
    gradient_checkpointing: Annotated[
        bool, Meta(description="recompute activations in the backward pass: less memory, about a third more time")
    ] = False
    fsdp: Annotated[
        Literal["off", "full_shard"],
        Meta(
            description="full_shard shards the weights over all GPUs, for a model that does not fit on one GPU; off keeps "
            "a copy on each"
        ),
    ] = "off"
    report_to: Annotated[
        str,
        Meta(
            description="trackers that also get the metrics, besides the job's own; none turns them off",
            extra={"form": "names", "choices": (*PREFIXES, OFF)},
        ),
    ] = "tensorboard"


def _row(name: str, kind: Any, default: Any) -> Hyperparameter:
    """Returns the table row of a field of `Hyperparameters`."""
    plain, *notes = get_args(kind)
    meta = next(note for note in notes if isinstance(note, Meta))
    extra = meta.extra or {}
    form, bounds, choices = extra.get("form"), meta, extra.get("choices")
    if form == "numbers":
        (item,) = get_args(plain)
        bounds = next(note for note in item.__metadata__ if isinstance(note, Meta))
    elif get_origin(plain) is Literal:
        form, choices = "string", get_args(plain)
    return Hyperparameter(
        name,
        form or {str: "string", int: "int", float: "float", bool: "bool"}[plain],
        default,
        str(meta.description),
        extra.get("unit", ""),
        minimum=bounds.ge if bounds.gt is None else bounds.gt,
        maximum=bounds.le if bounds.lt is None else bounds.lt,
        minimum_exclusive=bounds.gt is not None,
        maximum_exclusive=bounds.lt is not None,
        choices=choices,
    )


_ROWS = tuple(
    _row(field.name, field.type, field.default if field.default_factory is NODEFAULT else field.default_factory())
    for field in fields(Hyperparameters)
)

ADDED = (
    *("load_best_model_at_end", "metric_for_best_model", "early_stopping_patience", "early_stopping_threshold"),
    "report_to",
)
"""Hyperparameters that records of version 0.1.0 do not have."""

HYPERPARAMETERS: Mapping[str, Hyperparameter] = MappingProxyType({row.name: row for row in _ROWS})


def as_definitions() -> list[dict[str, Any]]:
    """Returns the schema as in PAI's `recipe.hyperparameter_definitions`, one dict per name. A missing bound is None."""
    types = {"int": "Int", "float": "Float", "bool": "Bool"}
    return [
        {
            "Name": row.name,
            "DefaultValue": row.default,
            "Type": types.get(row.type, "String"),
            "Description": row.meaning,
            "Minimum": row.minimum,
            "Maximum": row.maximum,
            "Choices": list(row.choices) if row.choices else None,
            "Unit": row.unit,
        }
        for row in HYPERPARAMETERS.values()
    ]


def describe() -> str:
    """Returns the schema as a Markdown table, one row per name. docs/hyperparameters.md has exactly this text."""
    lines = ["| name | default | values | unit | meaning |", "| --- | --- | --- | --- | --- |"]
    for row in HYPERPARAMETERS.values():
        lines.append(f"| `{row.name}` | `{show(row.default)}` | {row.expectation} | {row.unit} | {row.meaning} |")
    return "\n".join(lines) + "\n"


def show(value: object) -> str:
    """Formats a value for a table or a message: `true`, `5e-5`, `"text"`."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, float):
        return _number(value)
    try:
        return repr(value)
    except (ValueError, RecursionError):  # Python does not print integers of more than 4300 digits
        return f"a {type(value).__name__} that is too long to show"


def _number(value: float | None) -> str:
    if value is None:
        return "any"
    if isinstance(value, float) and not value.is_integer():
        return repr(value).replace("e-0", "e-")
    return str(int(value))
