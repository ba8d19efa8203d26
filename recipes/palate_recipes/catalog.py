"""The model catalog: typed rows over `catalog.toml`, found by name, alias or hub id.
Knows what models are, never where weights lie on this machine or how to fetch them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType
from typing import Any

from palate_recipes.errors import HyperparameterError, UnknownModelError
from palate_recipes.hyperparameters import METHODS, check_method

KINDS = ("instruct", "thinking", "base", "moe")
TASKS = ("text-generation", "chat")

# What PAI scripts pass for "wherever it comes from": every row answers to them.
_ANY_PROVIDER = frozenset({"pai", "huggingface"})

# Bytes that one weight takes. 16 bits: 2. 8 and 4 bits: the weight, its scales, and a part for embeddings
# and head, which bitsandbytes leaves in 16 bits. Full: fp32 weight, gradient and two AdamW moments (16), and
# the reference model of DPO in 16 bits (2).
_BYTES = {16: 2.0, 8: 1.2, 4: 0.7}
_BYTES_FULL = 18.0
_WORKING_SHARE = 1.1  # fragmentation, the adapter with its optimizer state, and activations that grow with the model
_WORKING_GIB = 1.5  # CUDA context, kernels' workspace, logits


@dataclass(frozen=True)
class Model:
    """One model of the catalog. `catalog.toml` says what each field means and in which unit."""

    name: str
    aliases: tuple[str, ...]
    family: str
    hub_id: str
    provider: str
    kind: str
    parameters_b: float
    active_parameters_b: float | None
    licence: str
    context: int
    chat_template: str
    default_system_prompt: str
    dated: bool
    system_role: bool
    gated: bool
    package: str
    guidance: str
    min_gpu_memory_gib: Mapping[str, float] = field(hash=False)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The parts of `kind`: `("moe", "instruct")` for a mixture of experts that follows instructions."""
        return tuple(self.kind.split("+"))

    @property
    def tasks(self) -> tuple[str, ...]:
        """What it can be deployed for: every model generates text, all but base models chat."""
        return TASKS[:1] if "base" in self.kinds else TASKS

    def min_gpu_memory(self, method: str, *, bits: int | None = None) -> float:
        """The least GPU memory, in GiB, that a training needs at batch size 1 and seq_length 128.

        An estimate: weights x bytes a weight x 1.1 + 1.5 GiB, rounded up to 0.1 (this module's constants
        name the parts), unless the row has a measured value.

        Args:
            method: one of `METHODS`. LoRA_LLM counts 16-bit weights, QLoRA_LLM 4-bit ones.
            bits: 16, 8 or 4, where the resolved hyperparameters hold the frozen weights otherwise: LoRA_LLM
                at its default load_in_4bit=true needs what 4 bits need. Without effect on Standard_LLM.

        Raises:
            HyperparameterError: unknown method or number of bits.
        """
        check_method(method)
        if bits is not None and bits not in _BYTES:
            raise HyperparameterError(f"bits = {bits!r}: must be one of 16, 8, 4")
        usual = {"LoRA_LLM": 16, "QLoRA_LLM": 4}.get(method)
        if bits is None or usual is None or bits == usual:
            return self.min_gpu_memory_gib[method]
        return _memory_gib(self.parameters_b, bits, moe="moe" in self.kinds)


def models(task: str | None = None, kind: str | None = None) -> tuple[Model, ...]:
    """The catalog in its own order: families by name, models by size.

    Args:
        task: "text-generation" (every model) or "chat" (all but base models); None is every model.
        kind: "instruct", "thinking", "base" or "moe"; "moe" includes mixtures of experts of every other kind.

    Raises:
        UnknownModelError: unknown task or kind.
    """
    if task is not None and task not in TASKS:
        raise UnknownModelError(f"task = {task!r}: must be one of {', '.join(TASKS)}")
    if kind is not None and kind not in KINDS:
        raise UnknownModelError(f"kind = {kind!r}: must be one of {', '.join(KINDS)}")
    return tuple(
        model for model in _load() if (task is None or task in model.tasks) and (kind is None or kind in model.kinds)
    )


def find_model(name: str, *, provider: str | None = None) -> Model:
    """The row with this name, alias or hub id; upper and lower case are one.

    Args:
        name: such as "qwen2-0.5b-instruct" or "Qwen/Qwen2-0.5B-Instruct".
        provider: the publisher it must be from; "pai" and "huggingface", which PAI scripts pass, are any.

    Raises:
        UnknownModelError: no such row, or one of another provider; names the nearest rows and what to do.
    """
    model = _index().get(str(name).strip().casefold())
    if model is None:
        raise UnknownModelError(
            f"model {str(name)[:200]!r} is not in the catalog; the nearest names are {', '.join(_nearest(str(name)))}. "
            "`palate models` lists them all; for any other model, give its folder as model_uri=."
        )
    if provider is not None and provider.strip().casefold() not in _ANY_PROVIDER | {model.provider}:
        raise UnknownModelError(
            f"model {name!r} is not from provider {provider!r} but from {model.provider!r}; "
            f'give model_provider="{model.provider}" or leave it out.'
        )
    return model


def describe() -> str:
    """The catalog in Markdown: a line for each kind, then a row for each model; docs/models.md holds it."""
    lines = [
        *(f"- **{kind}**: {line}" for kind, line in _kinds().items()),
        "",
        "| name | kind | weights | context | licence | LoRA | QLoRA | full | chat template | remarks |",
        "| --- | --- | ---: | ---: | --- | ---: | ---: | ---: | --- | --- |",
    ]
    for model in models():
        memory = " | ".join(f"{model.min_gpu_memory(method):.1f}" for method in METHODS)
        weights = f"{model.parameters_b:g} B"
        if model.active_parameters_b:
            weights += f" ({model.active_parameters_b:g} B active)"
        lines.append(
            f"| [`{model.name}`](https://huggingface.co/{model.hub_id}) | {model.kind} | {weights} "
            f"| {model.context:,} | {model.licence} | {memory} | {model.chat_template or 'none'} "
            f"| {_remarks(model)} |"
        )
    return "\n".join(lines) + "\n"


def _remarks(model: Model) -> str:
    remarks = [] if model.guidance in _kinds().values() else [model.guidance]
    if model.default_system_prompt:
        text = model.default_system_prompt.replace("\n", "\\n")
        remarks.append(f"Without a system prompt its template says `{text}`.")
    if model.dated:
        remarks.append("Its template writes the present day into the system prompt.")
    if not model.system_role:
        remarks.append("Its template takes no system prompt.")
    if model.package:
        remarks.append(f"Weights also from the package `{model.package}`.")
    if model.gated:
        remarks.append("The hub asks you to accept its terms first.")
    if model.aliases:
        remarks.append("Also " + ", ".join(f"`{alias}`" for alias in model.aliases) + ".")
    return " ".join(remarks)


@cache
def _toml() -> dict[str, Any]:
    import tomllib  # with importlib.resources some milliseconds that only a reader of the catalog should pay
    from importlib.resources import files

    return tomllib.loads(files("palate_recipes").joinpath("catalog.toml").read_text("utf-8"))


def _kinds() -> dict[str, str]:
    """The line of guidance of each kind."""
    return dict(_toml()["kinds"])


@cache
def _load() -> tuple[Model, ...]:
    rows = []
    for family, table in _toml().items():
        if family != "kinds":
            shared = {key: value for key, value in table.items() if key != "models"}
            rows += [_model(family, {**shared, **row}) for row in table["models"]]
    return tuple(rows)


def _model(family: str, row: dict[str, Any]) -> Model:
    """One row as `Model`; a key that no field has fails here."""
    kinds = row["kind"].split("+")
    if "base" in kinds:  # never trained on the family's markup
        row.update(chat_template="", default_system_prompt="", dated=False, system_role=True, guidance="")
    moe = "moe" in kinds
    memory = {
        "LoRA_LLM": _memory_gib(row["parameters_b"], 16, moe=moe),
        "QLoRA_LLM": _memory_gib(row["parameters_b"], 4, moe=moe),
        "Standard_LLM": _memory_gib(row["parameters_b"], None, moe=moe),
    }
    defaults: dict[str, Any] = {
        "active_parameters_b": None,
        "default_system_prompt": "",
        "dated": False,
        "system_role": True,
        "gated": False,
        "package": "",
    }
    return Model(
        **{
            **defaults,
            **row,
            "family": family,
            "name": row["hub_id"].split("/")[1].lower(),
            "aliases": tuple(row.get("aliases", ())),
            "guidance": row.get("guidance") or _kinds()[kinds[0]],
            "min_gpu_memory_gib": MappingProxyType({**memory, **row.get("min_gpu_memory_gib", {})}),
        }
    )


def _memory_gib(parameters_b: float, bits: int | None, *, moe: bool) -> float:
    """GiB by the formula of `Model.min_gpu_memory`; `bits` None trains every weight."""
    if moe and bits is not None:
        bits = 16  # bitsandbytes quantises linear layers; transformers 5 keeps experts in tensors of their own
    per_weight = _BYTES_FULL if bits is None else _BYTES[bits]
    gib = per_weight * parameters_b * 1e9 / 2**30 * _WORKING_SHARE + _WORKING_GIB
    return math.ceil(gib * 10) / 10


@cache
def _index() -> Mapping[str, Model]:
    index: dict[str, Model] = {}
    for model in _load():
        for key in (model.name, model.hub_id.casefold(), *model.aliases):
            index[key] = model
    return index


def _nearest(name: str) -> list[str]:
    import difflib  # only a mistake needs it

    wanted = name.strip().casefold().split("/")[-1][:100]  # of a long text every place would be compared
    found = difflib.get_close_matches(wanted, [key for key in _index() if "/" not in key], n=6, cutoff=0.0)
    return list(dict.fromkeys(_index()[key].name for key in found))[:3]
