"""The parts of the fast forward pass, each against the plain computation that it replaces, and all of it against TRL's."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow


def sequences(seed: int, count: int = 9, *, stem: int = 6, longest: int = 14) -> tuple[list[list[int]], list[int]]:
    """Sequences that share beginnings by chance: few token ids, one stem for all; one is a part of another, one comes twice."""
    draw = random.Random(seed)
    head = [draw.randrange(3) for _ in range(stem)]
    found = [head + [draw.randrange(2) for _ in range(draw.randint(1, longest))] for _ in range(count)]
    found += [found[0] + [1, 0], list(found[1])]
    return found, [draw.randint(1, len(one) - 1) for one in found]


@pytest.mark.parametrize("seed", range(5))
def test_a_tree_holds_every_sequence_once_and_shows_each_token_its_path(seed: int) -> None:
    import torch

    from palate_trainer.fast.tree import plant, visible

    found, starts = sequences(seed)
    tree = plant(found, starts)
    seen = visible(tree.ends, slice(None), slice(None))
    prefixes = {tuple(one[:end]) for one in found for end in range(1, len(one) + 1)}
    paths = [tuple(tree.ids[seen[token]].tolist()) for token in range(len(tree.ids))]
    assert len(paths) == len(prefixes)
    assert set(paths) == prefixes  # a token sees its own prefix, whole and in order, and nothing else
    assert tree.positions.tolist() == [len(path) - 1 for path in paths]

    slots = iter(tree.slots.tolist())
    for one, start in zip(found, starts, strict=True):
        for depth in range(start, len(one)):
            edge = next(slots)
            row = int(tree.score_rows[tree.edge_rows[edge]])
            assert paths[row] == tuple(one[:depth])
            assert int(tree.edge_targets[edge]) == one[depth]
    assert next(slots, None) is None
    assert len(set(tree.score_rows.tolist())) == len(tree.score_rows)
    assert torch.equal(tree.score_rows, tree.score_rows.sort().values)


@pytest.mark.parametrize("stem", [6, 700])
def test_grouped_attention_is_masked_attention(stem: int) -> None:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    from palate_trainer.fast.attention import as_mask, groups, tree_attention_forward
    from palate_trainer.fast.tree import plant, visible

    tree = plant(*sequences(1, stem=stem, longest=300))
    assert len(groups(tree.ends)) > 2
    torch.manual_seed(0)
    tokens = len(tree.ids)
    q, k, v = (torch.randn(1, heads, tokens, 8, requires_grad=True) for heads in (6, 2, 2))
    weight = torch.randn(1, tokens, 6, 8)
    out, _ = tree_attention_forward(torch.nn.Identity(), q, k, v, as_mask(tree.ends), scaling=0.3)
    mask = visible(tree.ends, slice(None), slice(None))
    plain = scaled_dot_product_attention(
        q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), attn_mask=mask, scale=0.3
    ).transpose(1, 2)
    torch.testing.assert_close(out, plain, atol=2e-6, rtol=1e-5)
    ours = torch.autograd.grad((out * weight).sum(), (q, k, v))
    theirs = torch.autograd.grad((plain * weight).sum(), (q, k, v))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


def test_the_gpus_attention_gets_the_same_mask() -> None:
    """FlexAttention's block mask, run uncompiled on CPU tensors."""
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    from palate_trainer.fast.attention import as_mask, flex_mask, tree_attention_forward
    from palate_trainer.fast.tree import plant

    tree = plant(*sequences(2, longest=90))
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4, len(tree.ids), 16) for _ in range(3))
    expected, _ = tree_attention_forward(torch.nn.Identity(), q, k, v, as_mask(tree.ends))
    found = flex_attention(q, k, v, block_mask=flex_mask(tree.ends)).transpose(1, 2)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "atol"), [("float32", 2e-5), ("bfloat16", 6e-2)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_one_pass_head_is_log_softmax(dtype: str, atol: float, with_bias: bool) -> None:
    import torch

    from palate_trainer.fast.head import score_edges

    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    hidden = torch.randn(13, 24).to(kind).requires_grad_()
    weight = torch.randn(20_000, 24).to(kind) * 0.5  # three blocks of the vocabulary
    bias = torch.randn(20_000).to(kind) if with_bias else None
    rows, targets = torch.tensor([0, 0, 5, 12, 7]), torch.tensor([3, 19_999, 8_191, 8_192, 3])
    logits = (hidden.float() @ weight.float().T + (0 if bias is None else bias.float()))[rows]
    targets[4] = int(logits[4].argmax())
    logps = logits.log_softmax(-1)
    scores = score_edges(hidden, weight, bias, rows, targets)
    expected = logps.gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(scores.log_probs, expected, atol=atol, rtol=1e-2)
    torch.testing.assert_close(scores.entropy, -(logps.exp() * logps).sum(-1), atol=atol, rtol=1e-2)
    torch.testing.assert_close(scores.mean_logits, logits.mean(-1), atol=atol, rtol=1e-2)
    assert scores.is_top1.tolist() == (logits.argmax(-1) == targets).tolist()
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0, 1.0])
    (ours,) = torch.autograd.grad((scores.log_probs * weights).sum(), hidden)
    (theirs,) = torch.autograd.grad((expected * weights).sum(), hidden)
    torch.testing.assert_close(ours.float(), theirs.float(), atol=atol, rtol=1e-2)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_fused_lora_is_pefts_lora(tiny: Path, dropout: float) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from palate_trainer.fast.lora import fuse_lora

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=12, lora_dropout=dropout, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(base, config)
    ids = torch.randint(0, 1000, (2, 9))

    def run() -> tuple[Any, dict[str, Any]]:
        torch.manual_seed(1)
        logits = model(input_ids=ids).logits
        logits.square().mean().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return logits.detach(), gradients

    model.train()
    expected, expected_gradients = run()
    with torch.no_grad(), model.disable_adapter():
        plain = model(input_ids=ids).logits
    assert len(fuse_lora(model)) == 14
    found, found_gradients = run()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert set(found_gradients) == set(expected_gradients)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(found_gradients[name], gradient, atol=1e-6, rtol=1e-4)
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, plain)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_norms_and_gates_keep_less_and_give_the_same(tiny: Path, dtype: str, tolerance: float) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from palate_trainer.fast.elementwise import fuse_elementwise

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=getattr(torch, dtype)).requires_grad_(False)
    layer, norm = model.model.layers[0].mlp, model.model.norm
    torch.manual_seed(0)
    norm.weight.uniform_(0.5, 2.0)
    x = torch.randn(2, 5, 64).to(norm.weight.dtype).requires_grad_()

    def run() -> list[Any]:
        out = norm(x) + layer(x)
        (gradient,) = torch.autograd.grad((out * torch.linspace(-1, 1, 64)).sum(), x)
        return [out.detach().float(), gradient.float()]

    expected = run()
    assert len(fuse_elementwise(model)) == 7  # two layers with two norms and a gate each, and the last norm
    for found, plain in zip(run(), expected, strict=True):
        torch.testing.assert_close(found, plain, atol=tolerance * float(plain.abs().max()), rtol=tolerance)


def test_a_norm_of_another_kind_is_left_alone() -> None:
    import torch

    from palate_trainer.fast.elementwise import fuse_elementwise

    class OneMore(torch.nn.Module):
        """Gemma's: the weight is what is added to 1."""

        def __init__(self) -> None:
            super().__init__()
            self.weight, self.variance_epsilon = torch.nn.Parameter(torch.full((8,), 0.5), requires_grad=False), 1e-6

        def forward(self, x: Any) -> Any:
            return x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt() * (1 + self.weight)

    assert fuse_elementwise(torch.nn.Sequential(OneMore())) == []


def test_a_norm_with_a_gate_and_a_block_with_more_arguments_keep_their_own_computation() -> None:
    """Those of Mamba-2 layers: alone they are the common form, and with further arguments another."""
    import torch

    from palate_trainer.fast.elementwise import fuse_elementwise

    class Norm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.variance_epsilon = torch.nn.Parameter(torch.full((8,), 0.5), requires_grad=False), 1e-6

        def forward(self, x: Any, gate: Any = None) -> Any:
            x = x if gate is None else x * torch.nn.functional.silu(gate)
            return self.weight * (x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt())

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = (torch.nn.Linear(8, 8) for _ in range(3))
            self.act_fn = torch.nn.SiLU()

        def forward(self, x: Any, scale: float = 1.0) -> Any:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) * scale)

    torch.manual_seed(0)
    norm, block, x = Norm(), Block(), torch.randn(3, 8)
    expected = norm(x), norm(x, x + 1), norm(x, gate=x + 1), block(x), block(x, 2.0), block(x, scale=2.0)
    assert len(fuse_elementwise(torch.nn.Sequential(norm, block))) == 2
    found = norm(x), norm(x, x + 1), norm(x, gate=x + 1), block(x), block(x, 2.0), block(x, scale=2.0)
    torch.testing.assert_close(found, expected)


PAIRS = [
    # prompts of two lengths with one beginning, answers with one beginning, an answer that begins the other
    {"prompt_ids": [1, 5, 6, 7], "chosen_ids": [9, 9, 2], "rejected_ids": [9, 8, 2]},
    {"prompt_ids": [1, 5, 6], "chosen_ids": [4, 2], "rejected_ids": [4, 2, 3, 3, 3, 2]},
    {"prompt_ids": [1, 5, 6, 7], "chosen_ids": [2], "rejected_ids": [30, 31, 32, 33, 2]},
    {"prompt_ids": [40], "chosen_ids": [41, 2], "rejected_ids": [42, 2]},
]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("bfloat16", 3e-2)])
def test_a_packed_batch_scores_and_learns_as_trls_does(
    tiny: Path, precision: str, tolerance: float, checkpointing: bool
) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from trl.trainer.dpo_trainer import DataCollatorForPreference
    from trl.trainer.utils import add_fused_lm_head

    from palate_trainer.fast.forward import add_tree_forward
    from palate_trainer.fast.lora import fuse_lora
    from palate_trainer.fast.tree import TreeCollator, pair_sequences

    collator = TreeCollator(DataCollatorForPreference(pad_token_id=2), pair_sequences)
    collator.enabled = True
    batch = collator(PAIRS)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    outcomes = []
    for packed in (False, True):
        torch.manual_seed(0)
        network = AutoModelForCausalLM.from_pretrained(tiny, dtype=getattr(torch, precision))
        config = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(network, config).train()
        if checkpointing:
            model.enable_input_require_grads()
            network.gradient_checkpointing_enable({"use_reentrant": False})
        add_fused_lm_head(network, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
        add_tree_forward(network)
        fuse_lora(model)
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            output = model(**inputs, fused_lm_head=True, use_cache=False, **({"tree": batch["tree"]} if packed else {}))
        (output.log_probs * torch.linspace(-1, 1, output.log_probs.shape[1])).sum().backward()
        gradients = torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])
        outcomes.append((output, gradients))
    (theirs, their_gradients), (ours, our_gradients) = outcomes
    for name in ("log_probs", "entropy", "mean_logits"):
        torch.testing.assert_close(ours[name], theirs[name].float(), atol=tolerance, rtol=tolerance)
    assert torch.equal(ours.is_top1, theirs.is_top1.bool()) or precision == "bfloat16"
    assert torch.equal(ours.label_mask, theirs.label_mask)
    torch.testing.assert_close(ours.loss, theirs.loss.float(), atol=tolerance, rtol=tolerance)
    assert (our_gradients - their_gradients).norm() <= tolerance * their_gradients.norm()


def test_a_row_alone_equals_the_row_in_a_ragged_batch(tiny: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM
    from trl.trainer.dpo_trainer import DataCollatorForPreference
    from trl.trainer.utils import add_fused_lm_head

    from palate_trainer.fast.forward import add_tree_forward
    from palate_trainer.fast.tree import TreeCollator, pair_sequences

    network = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval().requires_grad_(False)
    add_fused_lm_head(network)
    add_tree_forward(network)
    collator = TreeCollator(DataCollatorForPreference(pad_token_id=2), pair_sequences)
    collator.enabled = True

    def logps(rows: list[dict[str, Any]]) -> Any:
        batch = collator(rows)
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        out = network(input_ids=batch["input_ids"], labels=labels, tree=batch["tree"], fused_lm_head=True)
        return out.log_probs.sum(1).view(2, -1)  # (chosen and rejected, pairs)

    together = logps(PAIRS)
    for number, row in enumerate(PAIRS):
        torch.testing.assert_close(logps([row])[:, 0], together[:, number], atol=1e-5, rtol=1e-5)


def test_small_batches_of_a_step_are_joined_as_far_as_memory_and_gain_go() -> None:
    from palate_recipes.training_memory import batches_at_once

    def joined(size: int, accumulation: int, long: int, free: int = 2**40) -> int:
        tokens = [10] * 90 + [long] * 10
        # 68,000 bytes a token in float32
        return batches_at_once(
            size, accumulation, tokens, device="cpu", layers=10, hidden=100, free_bytes=free, width=4
        )

    assert joined(1, 8, 100) == 8
    assert joined(1, 8, 200) == 4  # 1,024 tokens are enough
    assert joined(1, 6, 200) == 3  # a divisor of what was asked for
    assert joined(8, 4, 200) == 1
    assert joined(1, 8, 100, free=5 * 400 * 68_000) == 4  # a fifth of the memory holds 400 tokens
    assert joined(1, 8, 5000) == 1


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("kind", ["softcap", "convolutions"])
def test_a_model_that_cannot_be_packed_is_trained_trls_way_and_says_so(
    small: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Gemma-2 changes its attention scores; LFM-2's convolutions mix neighbours in the row, whatever a mask says."""
    import torch
    from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM, Lfm2Config, Lfm2ForCausalLM

    from tests.trainer.support import losses, spec, train

    tokenizer = AutoTokenizer.from_pretrained(small)
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(0)
    if kind == "softcap":
        model: Any = Gemma2ForCausalLM(Gemma2Config(head_dim=16, **shape))
    else:
        model = Lfm2ForCausalLM(Lfm2Config(layer_types=["conv", "full_attention"], **shape))
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    curve = losses(train(spec(folder, tmp_path / "run", max_steps=2)))
    assert curve[0] == pytest.approx(0.6931, abs=1e-3)
    assert "this model cannot share a prompt" in capsys.readouterr().out


def test_a_packed_row_that_lets_answers_see_each_other_is_found_out_before_training(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The trial's own numbers decide: a mask that is causal alone shows the rejected answer what was chosen."""
    from dataclasses import replace

    import torch

    from palate_trainer.fast import packing, tree
    from tests.trainer.support import losses, spec, train

    planted = tree.plant

    def leaky(sequences: list[list[int]], scored_from: list[int]) -> tree.PrefixTree:
        right = planted(sequences, scored_from)
        return replace(right, ends=torch.full_like(right.ends, len(right.ids)))

    with monkeypatch.context() as changed:
        changed.setattr(packing, "why_not", lambda *_, **__: "the test says so")
        expected = losses(train(spec(small, tmp_path / "unpacked", max_steps=3)))
    monkeypatch.setattr(tree, "plant", leaky)
    found = losses(train(spec(small, tmp_path / "leaky", max_steps=3)))
    assert "its log-probabilities differ by" in capsys.readouterr().out
    assert found == pytest.approx(expected, abs=1e-6)


def test_in_bfloat16_the_final_margin_is_trls_within_the_noise_of_seeds(small: Path, tmp_path: Path) -> None:
    """Three seeds each: the packed run against the same program on TRL's own path."""
    import statistics

    from palate_trainer.fast import packing
    from tests.trainer.support import spec, train

    settings = {"rows": 16, "num_train_epochs": 3, "learning_rate": 2e-3, "precision": "bfloat16"}

    def margins(folder: Path) -> list[float]:
        return [
            train(spec(small, folder / str(seed), seed=seed, **settings))[-1]["train"]["rewards/margins"]
            for seed in (1, 2, 3)
        ]

    packed = margins(tmp_path / "packed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "why_not", lambda model, *, longest: "of this test")
        padded = margins(tmp_path / "padded")
    noise = statistics.stdev(padded)
    assert abs(statistics.mean(packed) - statistics.mean(padded)) < noise
    assert min(packed) > 0.1


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("strategy", ["dpo", "sft"])
def test_all_weights_train_packed_in_both_precisions(
    small: Path, tmp_path: Path, strategy: str, precision: str, tolerance: float
) -> None:
    """Under autocast rotary embeddings of float32 weights leave queries and keys wider than values."""
    from tests.trainer.support import losses, spec, train

    settings = {"method": "Standard_LLM", "training_strategy": strategy, "precision": precision, "rows": 4}
    metrics = train(spec(small, tmp_path / "fast", **settings))
    assert metrics[0]["packed"]
    assert metrics[0]["fused"]
    plain = train(spec(small, tmp_path / "plain", fast=False, **settings))
    assert not plain[0]["packed"]
    assert losses(metrics) == pytest.approx(losses(plain), abs=tolerance)


@pytest.mark.parametrize(
    ("strategy", "precision"),
    [
        ("dpo", "float32"),
        ("dpo", "bfloat16"),
        ("sft", "bfloat16"),
        ("kto", "float32"),
        pytest.param("sft", "float32", marks=pytest.mark.thorough),
        pytest.param("kto", "bfloat16", marks=pytest.mark.thorough),
    ],
)
@pytest.mark.parametrize("where", ["trial", "first step", "no number in the first step"])
def test_a_fast_path_that_fails_gives_way_to_trls_own(
    small: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    where: str,
    strategy: str,
    precision: str,
) -> None:
    """And leaves no trace: the run equals one that was TRL's from the start, losses, gradients and adapter bit for bit."""
    import torch
    from safetensors.torch import load_file

    from palate_trainer.fast import lora
    from tests.trainer.support import spec, train

    settings: dict[str, Any] = {"training_strategy": strategy, "precision": precision, "lora_dropout": 0.1, "rows": 12}
    plain_spec = spec(small, tmp_path / "plain", fast=False, **settings)
    plain = train(plain_spec)

    # In training dropout sends every layer through _AddLowRank, in the trial, without dropout, through the other.
    if where == "trial":
        monkeypatch.setattr(lora._FrozenWithLowRank, "backward", staticmethod(_raise))
    elif where == "first step":
        monkeypatch.setattr(lora._AddLowRank, "backward", staticmethod(_raise))
    else:
        monkeypatch.setattr(lora._AddLowRank, "forward", staticmethod(_no_number(lora._AddLowRank.forward)))
    fallen_spec = spec(small, tmp_path / "fallen", **settings)
    fallen = train(fallen_spec)
    said = capsys.readouterr().out
    assert "WARNING: the fast path failed" in said
    assert ("failed its trial" in said) == (where == "trial")
    start = [entry for entry in fallen if entry["kind"] == "start"][-1]
    assert any("WARNING: the fast path failed" in note for note in start["notes"])
    assert not start["packed"]
    assert not start["fused"]
    for one, other in zip(_steps(fallen), _steps(plain), strict=True):
        assert one["loss"] == other["loss"]
        assert one["grad_norm"] == other["grad_norm"]
    one, other = (
        load_file(Path(s.files.output_dir) / "model/adapter_model.safetensors") for s in (fallen_spec, plain_spec)
    )
    assert all(torch.equal(one[name], other[name]) for name in other)


def _raise(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError("a kernel that does not compile")


def _no_number(forward: Any) -> Any:
    def changed(ctx: Any, *arguments: Any) -> Any:
        return forward(ctx, *arguments) * float("nan")

    return changed


def _steps(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [entry for entry in metrics if entry["kind"] == "train"]


@pytest.mark.usefixtures("precision")
def test_what_fails_without_the_fast_path_too_fails_as_itself(small: Path, tmp_path: Path) -> None:
    """TRL's own path meets the same loss, and its message is the one that stays."""
    import torch
    from safetensors.torch import load_file, save_file

    from tests.trainer.support import refusal, spec

    folder = tmp_path / "model"
    shutil.copytree(small, folder)
    weights = {
        name: torch.full_like(value, float("nan")) for name, value in load_file(small / "model.safetensors").items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "The loss is nan at step 1" in refusal(spec(folder, tmp_path / "run", max_steps=2))


@pytest.mark.parametrize("turned", [False, True])
def test_a_tree_counts_the_sequences_of_each_token(turned: bool) -> None:
    """The packed row has a common token once; the load-balancing loss counts it in each sequence."""
    from palate_trainer.fast.tree import plant

    rows = [[1, 2, 3], [1, 2, 4, 5], [1, 2, 3], [6]]
    tree = plant(rows[::-1] if turned else rows, [1] * 4)
    counted: dict[tuple[int, int], int] = {}
    for sequence in rows:
        for depth, token in enumerate(sequence):
            counted[depth, token] = counted.get((depth, token), 0) + 1
    found = dict(zip(zip(tree.positions.tolist(), tree.ids.tolist(), strict=True), tree.counts.tolist(), strict=True))
    assert found == counted
