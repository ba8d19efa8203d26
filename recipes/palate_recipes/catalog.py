"""The model catalog: typed rows of `catalog.toml`, found by name, alias or hub id.
Knows models, not where weights are on this machine or how to fetch them.
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

# PAI scripts pass these for "any provider", so they match every row.
_ANY_PROVIDER = frozenset({"pai", "huggingface"})

# Bytes per weight. 16 bits: 2. 8 and 4 bits: the weight, its scales, and a share for embeddings and head, which
# bitsandbytes keeps in 16 bits. Full: fp32 weight, gradient and two AdamW moments (16), and DPO's reference model
# in 16 bits (2).
_BYTES = {16: 2.0, 8: 1.2, 4: 0.7}
_BYTES_FULL = 18.0
_WORKING_SHARE = 1.1  # fragmentation, the adapter with its optimizer state, and activations, which grow with the model
_WORKING_GIB = 1.5  # CUDA context, kernels' workspace, logits


@dataclass(frozen=True)
class Model:
    """One model of the catalog. `catalog.toml` documents each field and its unit."""

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
    tool_parser: str
    reasoning_parser: str
    gated: bool
    package: str
    guidance: str
    min_gpu_memory_gib: Mapping[str, float] = field(hash=False)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The parts of `kind`, such as `("moe", "instruct")`."""
        return tuple(self.kind.split("+"))

    @property
    def tasks(self) -> tuple[str, ...]:
        """Supported tasks: all models generate text, all except base models chat."""
        return TASKS[:1] if "base" in self.kinds else TASKS

    def min_gpu_memory(self, method: str, *, bits: int | None = None) -> float:
        """The minimum GPU memory, in GiB, for training at batch size 1 and seq_length 128.

        The row's measured value if it has one. Otherwise an estimate: weights x bytes per weight x 1.1 + 1.5 GiB, rounded up to
        0.1 (see this module's constants).

        Args:
            method: One of `METHODS`. LoRA_LLM counts 16-bit weights, QLoRA_LLM 4-bit weights.
            bits: 16, 8 or 4, if the resolved hyperparameters store the frozen weights differently: LoRA_LLM with its default
                load_in_4bit=true needs as much as 4 bits. No effect on Standard_LLM.

        Raises:
            HyperparameterError: Unknown method or number of bits.
        """
        check_method(method)
        if bits is not None and bits not in _BYTES:
            raise HyperparameterError(f"bits = {bits!r}: expected 16, 8 or 4")
        usual = {"LoRA_LLM": 16, "QLoRA_LLM": 4}.get(method)
        if bits is None or usual is None or bits == usual:
            return self.min_gpu_memory_gib[method]
        return _memory_gib(self.parameters_b, bits, moe="moe" in self.kinds)


def models(task: str | None = None, kind: str | None = None) -> tuple[Model, ...]:
    """Returns the models of the catalog: families by name, models by size.

    Args:
        task: "text-generation" (all models) or "chat" (all except base models); None: all.
        kind: "instruct", "thinking", "base" or "moe"; "moe" includes mixtures of experts of the other kinds.

    Raises:
        UnknownModelError: Unknown task or kind.
    """
    if task is not None and task not in TASKS:
        raise UnknownModelError(f"task = {task!r}: must be one of {', '.join(TASKS)}")
    if kind is not None and kind not in KINDS:
        raise UnknownModelError(f"kind = {kind!r}: must be one of {', '.join(KINDS)}")
    return tuple(
        model for model in _load() if (task is None or task in model.tasks) and (kind is None or kind in model.kinds)
    )


def find_model(name: str, *, provider: str | None = None) -> Model:
    """Returns the row with this name, alias or hub id, ignoring case.

    Args:
        name: Such as "qwen2-0.5b-instruct" or "Qwen/Qwen2-0.5B-Instruct".
        provider: Required publisher. "pai" and "huggingface", which PAI scripts pass, match any.

    Raises:
        UnknownModelError: No such row, or its provider differs. The message suggests similar names.
    """
    model = _index().get(str(name).strip().casefold())
    if model is None:
        raise UnknownModelError(
            f"model {str(name)[:200]!r} is not in the catalog; the most similar names are {', '.join(nearest_names(str(name)))}. "
            "`palate models` lists all. For any other model, give its hub id (OWNER/NAME), or its folder as model_uri."
        )
    check_provider(name, model.provider, provider)
    return model


def check_provider(name: str, publisher: str, provider: str | None) -> None:
    """Raises UnknownModelError if a model's publisher is not the provider that was asked for."""
    if provider is not None and provider.strip().casefold() not in _ANY_PROVIDER | {publisher.casefold()}:
        raise UnknownModelError(
            f"model {name!r} is from provider {publisher!r}, not {provider!r}: "
            f'set model_provider="{publisher}" or omit it.'
        )


def describe() -> str:
    """Returns the catalog in Markdown, as in docs/models.md: a line per kind, then a row per model."""
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
    import tomllib  # imported here to keep `import palate` fast
    from importlib.resources import files

    return tomllib.loads(files("palate_recipes").joinpath("catalog.toml").read_text("utf-8"))


def _kinds() -> dict[str, str]:
    """The guidance line of each kind."""
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
    """Builds a `Model`. A key without a field raises TypeError."""
    kinds = row["kind"].split("+")
    if "base" in kinds:  # base models are not trained on the family's chat template
        row.update(chat_template="", default_system_prompt="", dated=False, system_role=True, guidance="")
        row.update(tool_parser="", reasoning_parser="")
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
        "tool_parser": "",
        "reasoning_parser": "",
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
    """GiB by the formula of `Model.min_gpu_memory`. `bits` None: full fine-tuning."""
    if moe and bits is not None:
        bits = 16  # bitsandbytes quantises linear layers, but transformers 5 stores experts in plain tensors
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


def nearest_names(name: str) -> list[str]:
    """Returns the three names of the catalog that are most similar to a name."""
    import difflib  # imported here, because only error messages need it

    wanted = name.strip().casefold().split("/")[-1][:100]  # cut to bound the time: the comparison is quadratic
    found = difflib.get_close_matches(wanted, [key for key in _index() if "/" not in key], n=6, cutoff=0.0)
    return list(dict.fromkeys(_index()[key].name for key in found))[:3]
