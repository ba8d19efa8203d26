"""The hyperparameter schema: one typed field a name, with default, bounds, unit and meaning, and how a value is read.

Knows one value at a time, never how values fit together or what a machine makes of them. Every reader of a value raises
TypeError, ValueError or OverflowError.
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

ALL_LINEAR = "all-linear"


def _string(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    value.encode()  # half a character, as bytes of a terminal that are not UTF-8 become: no manifest can hold it
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
        raise TypeError  # True is 1 to Python, but a flag in the place of a count is a mistake
    if hasattr(value.__class__, "__index__"):  # also the integers of numpy
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
        raise ValueError  # Python reads "1_0" and the digits of every script as numbers; other readers do not
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
    """The items of a list, or of the string that stands for one: "a,b" or "[1, 2]"."""
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
        "LoRA_LLM": "trains a low-rank adapter on frozen weights, held in 4 bits where CUDA is there",
        "QLoRA_LLM": "trains a low-rank adapter on frozen weights, held in 4 or 8 bits on every machine",
        "Standard_LLM": "trains every weight of the model; needs the most memory",
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
    """One hyperparameter: what it means and which values it takes.

    `type` is the value's form: "string", "int", "float", "bool", "modules" (`"all-linear"` or a list of module names),
    "names" (one or several of `choices`, kept as they are written: `"sigmoid,sft"`), or "numbers" (a list; empty is
    none, and the bounds hold for each).
    `minimum` and `maximum` are included in the range unless marked exclusive; every number has both.
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
        """What a value must be, as the words after "must be"."""
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
        """The value in its own type. PAI sends strings: `"5e-5"`, `"8"`, `"true"` are read as what they say.

        Raises:
            ValueError: the value has the wrong type or is out of bounds; the message says what it must be.
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
    """The hyperparameters of a run, resolved: each with its type, bounds, default, unit and meaning, stated here and nowhere else."""

    training_strategy: Annotated[
        Literal["sft", "dpo", "kto"],
        Meta(
            description="what is trained for: sft imitates one answer, dpo prefers the chosen over the rejected answer, "
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
            description="longest prompt plus answer; what is longer is cut at the end",
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
        Meta(gt=0, le=100, description="pull towards the reference model in DPO and KTO: higher stays closer to it"),
    ] = 0.1
    load_in_4bit: Annotated[
        bool,
        Meta(
            description="hold the frozen weights in 4 bits; false by default without CUDA, with load_in_8bit or "
            "Standard_LLM"
        ),
    ] = True
    load_in_8bit: Annotated[bool, Meta(description="hold the frozen weights in 8 bits")] = False
    gradient_accumulation_steps: Annotated[
        int,
        Meta(
            ge=1,
            le=4096,
            description="batches whose gradients are averaged into one optimizer step",
            extra={"unit": "batches"},
        ),
    ] = 8
    apply_chat_template: Annotated[
        bool, Meta(description="wrap prompt and answer in the model's chat template, with system_prompt")
    ] = True
    system_prompt: Annotated[
        str,
        Meta(
            description="system message of every row when the chat template is applied; empty is none, not the "
            "template's own either"
        ),
    ] = "You are a helpful assistant"
    warmup_ratio: Annotated[
        float,
        Meta(
            ge=0,
            lt=1,
            description="part of all optimizer steps over which the learning rate rises from 0",
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
            description="part of the adapter's inputs that are dropped in training",
            extra={"unit": "fraction"},
        ),
    ] = 0.0
    lr_scheduler_type: Annotated[Schedule, Meta(description="how the learning rate runs after the warm-up")] = "linear"
    weight_decay: Annotated[float, Meta(ge=0, le=1, description="AdamW's decoupled weight decay")] = 0.0
    max_grad_norm: Annotated[
        float,
        Meta(
            ge=0,
            le=1000,
            description="gradients longer than this are scaled down to it; 0 turns clipping off",
            extra={"unit": "L2 norm"},
        ),
    ] = 1.0
    seed: Annotated[int, Meta(ge=0, le=4_294_967_295, description="seed of adapter start, data order and dropout")] = 42
    logging_steps: Annotated[
        int,
        Meta(
            ge=1,
            le=1_000_000,
            description="metrics are written once in this many steps",
            extra={"unit": "optimizer steps"},
        ),
    ] = 10
    save_steps: Annotated[
        int,
        Meta(
            ge=0,
            le=10_000_000,
            description="a checkpoint is kept once in this many steps; 0 saves at the end only",
            extra={"unit": "optimizer steps"},
        ),
    ] = 0
    eval_steps: Annotated[
        int,
        Meta(
            ge=0,
            le=10_000_000,
            description="validation data is scored once in this many steps; 0 scores it at the end of every epoch",
            extra={"unit": "optimizer steps"},
        ),
    ] = 0
    max_steps: Annotated[
        int,
        Meta(
            ge=0,
            le=100_000_000,
            description="stops after this many steps, whatever num_train_epochs says; 0 is off",
            extra={"unit": "optimizer steps"},
        ),
    ] = 0
    loss_type: Annotated[
        str,
        Meta(
            description="loss over a pair under dpo, by TRL's names; sigmoid is the one of the DPO paper; several are "
            "added up",
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
            description="share of pairs whose labels are taken to be flipped, in the losses robust, exo_pair (above 0), "
            "aot and aot_unpaired",
            extra={"unit": "fraction"},
        ),
    ] = 0.0
    ld_alpha: Annotated[
        float,
        Meta(
            ge=0,
            le=1,
            description="weight of the tokens by which the longer answer of a pair exceeds the other (LD-DPO); 1 is DPO "
            "as it is",
            extra={"unit": "fraction"},
        ),
    ] = 1.0
    discopop_tau: Annotated[float, Meta(gt=0, le=100, description="temperature of the loss discopop")] = 0.05
    desirable_weight: Annotated[
        float,
        Meta(
            ge=0,
            le=1000,
            description="factor of the loss of good answers under kto, to make up for unequal numbers of good and bad "
            "ones",
        ),
    ] = 1.0
    undesirable_weight: Annotated[float, Meta(ge=0, le=1000, description="the same for bad answers")] = 1.0
    bad_rows: Annotated[
        Literal["refuse", "skip"],
        Meta(
            description="what becomes of rows that are empty, incomplete or have the same answer twice: refuse ends with "
            "their numbers, skip leaves them out and says which"
        ),
    ] = "refuse"
    precision: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Meta(
            description="number format of the frozen weights and of the arithmetic; auto is bfloat16 where the GPU or "
            "processor computes it natively, else float16 on CUDA and float32 on a CPU"
        ),
    ] = "auto"
    gradient_checkpointing: Annotated[
        bool, Meta(description="recompute activations in the backward pass: less memory, about a third more time")
    ] = False
    fsdp: Annotated[
        Literal["off", "full_shard"],
        Meta(
            description="full_shard splits the weights over all GPUs, for a model that one GPU cannot hold; off keeps a "
            "copy on each"
        ),
    ] = "off"


def _row(name: str, kind: Any, default: Any) -> Hyperparameter:
    """Returns the row of a field of `Hyperparameters`, from its annotation."""
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

HYPERPARAMETERS: Mapping[str, Hyperparameter] = MappingProxyType({row.name: row for row in _ROWS})


def as_definitions() -> list[dict[str, Any]]:
    """The schema as PAI's `recipe.hyperparameter_definitions` lists it, one dict a name; no bound is None."""
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
    """The schema as a Markdown table, one row a name; docs/hyperparameters.md holds exactly this text."""
    lines = ["| name | default | values | unit | meaning |", "| --- | --- | --- | --- | --- |"]
    for row in HYPERPARAMETERS.values():
        lines.append(f"| `{row.name}` | `{show(row.default)}` | {row.expectation} | {row.unit} | {row.meaning} |")
    return "\n".join(lines) + "\n"


def show(value: object) -> str:
    """A value as it is written in a table or a message: `true`, `5e-5`, `"text"`."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, float):
        return _number(value)
    try:
        return repr(value)
    except (ValueError, RecursionError):  # Python writes no whole number of more than 4300 digits
        return f"a {type(value).__name__} that is too long to show"


def _number(value: float | None) -> str:
    if value is None:
        return "any"
    if isinstance(value, float) and not value.is_integer():
        return repr(value).replace("e-0", "e-")
    return str(int(value))
