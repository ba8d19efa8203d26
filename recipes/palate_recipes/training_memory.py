"""Expected peak memory of a training, and how many batches share a forward pass. Knows shapes and sizes, no model and no data.

The terms are those of the trainer's fast path: packed rows, fused LoRA layers, norms and gates, and a head that never holds all
logits. Measured with SmolLM2-135M on a CPU; see docs/training.md. On a GPU the same terms are not calibrated.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from msgspec.structs import replace

from palate_recipes.schema import Hyperparameters
from palate_recipes.servability import DTYPE_BYTES, GIB, adapter_bytes, planned_adapter, text_config
from palate_recipes.specs.train import TrainSpec

_WANTED_TOKENS = {"cpu": 1024, "cuda": 4096}
"""Tokens per batch beyond which matrix products get no faster."""
_MEMORY_SHARE = 0.2
"""Share of free memory for the activations of a joined batch. The user did not choose its size, so keep it small."""
_ACTIVATION_FACTOR = 17
"""Values kept per token and layer, in units of the hidden size, without recomputation (arXiv 2205.05198, table 2: 34 bytes
in 16 bits)."""

_OF_ONE_BATCH = {"sft", "aot", "aot_unpaired"}
"""Losses whose value depends on which rows share a batch."""


def may_join(values: Hyperparameters) -> bool:
    """Whether a step's batches can be joined, or split, without changing the loss."""
    if values.training_strategy == "kto":  # the KL divergence is estimated per batch
        return False
    return values.training_strategy != "dpo" or not compares_rows(values.loss_type.split(","))


def compares_rows(loss_types: Iterable[str]) -> bool:
    """Whether the value of a mix of losses depends on which rows share a batch."""
    return not _OF_ONE_BATCH.isdisjoint(loss_types)


def batches_at_once(
    batch_size: int,
    accumulation: int,
    tokens: Sequence[int],
    *,
    device: str,
    layers: int,
    hidden: int,
    free_bytes: float,
    width: int,
) -> int:
    """How many of a step's micro-batches to run as one forward pass. Changes the speed, not the result.

    Small batches are bound by memory bandwidth. Batches are joined up to the size at which the device computes efficiently,
    within a share of the free memory, and never across optimizer steps.

    Args:
        batch_size: Rows per micro-batch, as configured.
        accumulation: Micro-batches per optimizer step.
        tokens: Tokens of each row, as packed.
        device: `cpu` or `cuda`.
        layers: Number of the model's layers.
        hidden: Its hidden size.
        free_bytes: Free memory of the device.
        width: Bytes per value.

    Returns:
        A divisor of `accumulation`; 1 to join nothing.
    """
    long = sorted(tokens)[int(0.9 * len(tokens))]  # 90th percentile
    a_token = _ACTIVATION_FACTOR * width * layers * hidden
    most = min(_WANTED_TOKENS[device], _MEMORY_SHARE * free_bytes / a_token)
    fitting = [n for n in range(1, accumulation + 1) if accumulation % n == 0 and n * batch_size * long <= most]
    return max(fitting, default=1)


# ── rows ──────────────────────────────────────────────────────────────────────────────────────────────────────────

_CHARACTERS_A_TOKEN = 4.0
"""Of English text. Other languages have fewer, so their trainings need more than is said."""
_TEMPLATE_TOKENS = 12
"""What a chat template adds to a conversation of two turns."""
_TAIL = 1.645
"""Standard deviations from mean to 95th percentile of a normal distribution."""
_P90 = 1.282


@dataclass(frozen=True)
class RowTokens:
    """Tokens of training rows after truncation: of both answers of a pair, with the prompt once.

    Attributes:
        count: Number of rows.
        mean, deviation, largest: Of the tokens per row.
    """

    count: int
    mean: float
    deviation: float
    largest: float

    def batch(self, size: int, batches: float, *, padded: bool) -> float:
        """Expected tokens of the largest of several random batches.

        Args:
            size: Rows per batch.
            batches: Their number.
            padded: Whether every row of a batch is as long as its longest.
        """
        size = min(size, self.count)
        if padded:
            return size * min(self.largest, self.mean + self.deviation * _highest(size * batches))
        return min(size * self.largest, size * self.mean + self.deviation * math.sqrt(size) * _highest(batches))

    def cut(self, share: float) -> RowTokens:
        """The rows if none may be longer than a share of the longest."""
        top = self.largest * share
        return RowTokens(self.count, min(self.mean, top), min(self.deviation, top), top)


def _highest(draws: float) -> float:
    """Expected maximum of normal draws, in standard deviations."""
    return math.sqrt(2 * math.log(draws)) if draws > 1 else 0.0


def tokens_of_characters(
    lengths: Mapping[str, Mapping[str, int]], count: int, *, strategy: str, seq_length: int
) -> RowTokens | None:
    """Returns roughly the tokens of rows that are not tokenized; None for rows without lengths.

    Args:
        lengths: `lengths` of a data report: characters of `prompt`, `chosen` and `rejected`.
        count: Number of rows.
        strategy: Of the training.
        seq_length: Maximum tokens of prompt and answer.
    """
    answers = [lengths[name] for name in ("chosen", "rejected") if name in lengths]
    if not answers or not count:
        return None
    if strategy != "dpo":
        answers = answers[:1]
    parts = [*([lengths["prompt"]] if "prompt" in lengths else []), *answers]

    def tokens(name: str) -> float:
        return sum(part[name] for part in parts) / _CHARACTERS_A_TOKEN + _TEMPLATE_TOKENS

    top = float(seq_length * len(answers))
    mean = min(top, tokens("mean"))
    return RowTokens(
        count * (2 if strategy == "kto" and len(lengths) == 3 else 1),
        mean,
        max(0.0, min(top, tokens("p95")) - mean) / _TAIL,
        min(top, tokens("max")),
    )


# ── the peak ──────────────────────────────────────────────────────────────────────────────────────────────────────

_PROCESS_GIB = {"cpu": 0.58, "cuda": 0.7}
"""Python, torch and the libraries. On a GPU the CUDA context and the workspaces of libraries, not measured."""
_ALLOCATOR = 1.03
"""Peak resident memory of what a step allocates over the sum of its tensors: fragments and buffers of kernels."""
_TRAINED_BYTES = 16
"""Per trained value: weight, gradient and two Adam moments in float32."""
_BLOCK, _SMALLEST_BLOCK, _LOGITS = 8192, 1024, 2**24
"""Vocabulary rows per block of the head, at least and at most, and the logits of one block (palate_trainer.fast.head)."""
_TRL_BLOCK, _TRL_TOKENS = 32768, 4096
"""Vocabulary rows and tokens per block of TRL's head, which scores batches that are not packed."""


@dataclass(frozen=True)
class Shape:
    """Widths of a dense decoder, in values per token."""

    layers: int
    hidden: int
    query: int
    key: int
    inner: int
    vocabulary: int

    @classmethod
    def of(cls, config: Mapping[str, Any] | None) -> Shape | None:
        """Reads config.json. None if it is not here, or of another kind: experts, or a field that is missing."""
        config = text_config(config or {})
        if any("expert" in name and config[name] for name in config):
            return None
        names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
        values = [config.get(name) for name in names]
        if not all(isinstance(value, int) and 0 < value < 2**40 for value in values):
            return None
        layers, hidden, heads, inner, vocabulary = (int(value) for value in values if value)
        wide, keys = config.get("head_dim") or hidden // heads, config.get("num_key_value_heads") or heads
        if not all(isinstance(value, int) and 0 < value < 2**40 for value in (wide, keys)):
            return None
        return cls(layers, hidden, heads * wide, keys * wide, inner, vocabulary)


@dataclass(frozen=True)
class Peak:
    """The terms of a training's expected peak memory, in bytes.

    Attributes:
        process: Libraries.
        weights: Of base and reference.
        trained: The trained values with gradients and moments; under full fine-tuning the weights are part of it.
        activations: What a forward pass keeps for the backward pass.
        working: Buffers of one layer, of the head, and of the pass that scores the reference.
    """

    process: float
    weights: float
    trained: float
    activations: float
    working: float

    @property
    def gib(self) -> float:
        step = (self.activations + self.working) * _ALLOCATOR
        return (self.process + self.weights + self.trained + step) / GIB


def peak_of_batch(
    spec: TrainSpec, parameters: float, config: Mapping[str, Any], shape: Shape, tokens: float, *, cuda: bool, gpus: int
) -> Peak:
    """Returns the expected peak of a training whose largest forward pass has this many tokens.

    Args:
        spec: The training.
        parameters: Number of parameters of the model.
        config: config.json of the model.
        shape: Its widths.
        tokens: Of the largest batch, as packed.
        cuda: Whether it runs on a GPU.
        gpus: Number of GPUs, which share the weights with `fsdp=full_shard`.
    """
    values = spec.hyperparameters
    width = DTYPE_BYTES[spec.precision]
    shards = gpus if values.fsdp == "full_shard" else 1
    mixed = not spec.trains_adapter and spec.precision != "float32"
    packed = values.training_strategy != "kto"
    # Without packing, keys and values are kept once per query head.
    attention = 2 * shape.query + 2 * (shape.key if packed else shape.query)
    hidden, inner = shape.hidden, 3 * shape.inner
    if spec.trains_adapter:
        a_value = 0.6 if values.load_in_4bit else 1.1 if values.load_in_8bit else width
        weights = parameters * a_value
        small = 7 * values.lora_dim
        trained = adapter_bytes(config, planned_adapter(values, config)) / 2 * _TRAINED_BYTES
        # Per layer: both residuals and both norms; query, keys, values and their result; gate, up and their product.
        a_layer = (4 * hidden + attention + inner + small) * width
        if values.lora_dropout:  # each adapter keeps its own input, and what was dropped
            a_layer += (4 * hidden + shape.query + shape.inner) * (width + 1)
    else:
        trained = parameters * _TRAINED_BYTES
        weights = parameters * 4 if values.training_strategy == "kto" else 0.0
        # Autocast keeps a copy of the weights in 16 bits during a step.
        weights += parameters * width if mixed else 0.0
        # A trained norm also keeps its normalised input, in float32.
        a_layer = 4 * hidden * 4 + (2 * hidden + attention + inner) * width
    activations = tokens * a_layer * shape.layers
    if values.gradient_checkpointing:  # the input of every layer, and one layer that is computed again
        activations = tokens * (hidden * width * shape.layers + a_layer)
    working = _buffers(shape, tokens, width, packed=packed)
    if values.training_strategy != "sft":
        # The reference is scored too: under DPO before, in batches of twice the size. The C library's heap keeps those buffers, in
        # pieces that a backward pass cannot fill; torch's allocator on a GPU reuses them.
        scoring = _buffers(shape, tokens * (2 if packed else 1), width, packed=packed)
        working = max(working, scoring) if cuda else working + scoring
    return Peak(
        process=_PROCESS_GIB["cuda" if cuda else "cpu"] * GIB,
        weights=weights / shards,
        trained=trained / shards,
        activations=activations,
        working=working,
    )


def _buffers(shape: Shape, tokens: float, width: int, *, packed: bool) -> float:
    """Bytes of one layer's intermediate values and of the head, which holds logits of one block of the vocabulary only."""
    layer = tokens * (4 * shape.inner + 2 * shape.hidden) * width
    block = min(_BLOCK, max(_SMALLEST_BLOCK, _LOGITS / max(1.0, tokens))) if packed else _TRL_BLOCK
    at_once = tokens if packed else min(tokens, _TRL_TOKENS)
    head = 3 * (at_once * min(shape.vocabulary, block) + tokens * shape.hidden) * 4
    if width < 4:  # the mean over the head's weights is computed from a float32 copy of them
        head = max(head, shape.vocabulary * shape.hidden * 4)
    return layer + head


def peak_memory_gib(
    spec: TrainSpec,
    parameters: float,
    config: Mapping[str, Any] | None,
    rows: RowTokens | None,
    *,
    available_gib: float,
    cuda: bool,
    gpus: int = 1,
) -> float | None:
    """Returns the expected peak memory of a training in GiB, per GPU or for the machine if it has none.

    Args:
        spec: The training.
        parameters: Number of parameters of the model; 0 if unknown.
        config: Its config.json, or None if it is not at hand.
        rows: Tokens of the training rows, or None if unknown.
        available_gib: Memory of the device. Small batches of a step are joined only within a share of it.
        cuda: Whether it runs on a GPU, where the formula is not calibrated.
        gpus: Number of GPUs.

    Returns:
        None if a fact is unknown: size, shape or rows, or for a model with experts, whose activations depend on the router.
    """
    shape = Shape.of(config)
    if not parameters or shape is None or config is None or rows is None or not rows.count:
        return None
    values = spec.hyperparameters
    size, accumulation, width = values.per_device_train_batch_size, values.gradient_accumulation_steps, 4
    if spec.precision != "float32":
        width = 2
    batches = math.ceil(rows.count / (size * gpus)) * max(1.0, values.num_train_epochs)
    if values.max_steps:
        batches = values.max_steps * accumulation
    if may_join(values) and accumulation > 1:
        joined = batches_at_once(
            size,
            accumulation,
            [math.ceil(min(rows.largest, rows.mean + _P90 * rows.deviation))],
            device="cuda" if cuda else "cpu",
            layers=shape.layers,
            hidden=shape.hidden,
            free_bytes=max(0.0, available_gib) * GIB,
            width=width,
        )
        size, batches = size * joined, batches / joined
    tokens = rows.batch(size, batches, padded=values.training_strategy == "kto")
    return peak_of_batch(spec, parameters, config, shape, tokens, cuda=cuda, gpus=gpus).gib


def memory_warning(
    spec: TrainSpec,
    parameters: float,
    config: Mapping[str, Any] | None,
    rows: RowTokens | None,
    *,
    available_gib: float,
    cuda: bool,
    gpus: int = 1,
) -> str:
    """Returns a warning if a training is expected to need more memory than there is, with the settings that fit; else "".

    Args:
        spec, parameters, config, rows, available_gib, cuda, gpus: As in `peak_memory_gib`.
    """

    def expected(values: Hyperparameters, rows: RowTokens) -> float:
        changed = replace(spec, hyperparameters=values)
        found = peak_memory_gib(changed, parameters, config, rows, available_gib=available_gib, cuda=cuda, gpus=gpus)
        return found or 0.0

    if rows is None or not available_gib or (peak := expected(spec.hyperparameters, rows)) <= available_gib:
        return ""
    kinds: dict[str, str] = {}
    for kind, text, values, changed in _smaller(spec.hyperparameters, rows):
        if kind not in kinds and expected(values, changed) <= available_gib:
            kinds[kind] = text
    alone = [text for kind, text in kinds.items() if kind != "together"]
    found = alone or list(kinds.values())
    remedy = f"set {', or '.join(found)}" if found else "use a smaller model, or a machine with more memory"
    where = " (a formula that is not calibrated on GPUs)" if cuda else ""
    return (
        f"the training is expected to need {peak:.1f} GiB of memory at its peak{where}, and {available_gib:.1f} GiB are free: it may "
        f"run out of memory. {remedy[0].upper()}{remedy[1:]}"
    )


def _smaller(values: Hyperparameters, rows: RowTokens) -> Iterator[tuple[str, str, Hyperparameters, RowTokens]]:
    """Yields settings that need less memory: their kind, what to set, and rows and hyperparameters with it, the nearest first."""
    size, accumulation = values.per_device_train_batch_size, values.gradient_accumulation_steps
    smallest, text = values, ""
    for part in range(size - 1, 0, -1):
        if size % part == 0 and may_join(values):
            more = accumulation * size // part
            text = f"per_device_train_batch_size={part} with gradient_accumulation_steps={more}"
            smallest = replace(values, per_device_train_batch_size=part, gradient_accumulation_steps=more)
            yield "batch", text, smallest, rows
    if not values.gradient_checkpointing:
        smallest = replace(smallest, gradient_checkpointing=True)
        text = ", ".join(filter(None, [text, "gradient_checkpointing=true"]))
        yield "checkpointing", "gradient_checkpointing=true", replace(values, gradient_checkpointing=True), rows
        yield "together", text, smallest, rows
    # Of a pair, the prompt counts once: its tokens can be nearly twice the length of its longer answer.
    answers = 2 if values.training_strategy == "dpo" else 1
    longest = min(values.seq_length, math.ceil(rows.largest))
    length = 2 ** math.ceil(math.log2(max(2, longest)) - 1)
    while length >= 16:
        shorter = rows.cut(min(1.0, answers * length / rows.largest))
        yield "length", f"seq_length={length}", replace(values, seq_length=length), shorter
        both = ", ".join(filter(None, [text, f"seq_length={length}"]))
        yield "together", both, replace(smallest, seq_length=length), shorter
        length //= 2
