"""Compares Palate's LoRA products with vLLM's own code on random batches: `python -m tests.support.lora_values`.

A program, since importing vLLM changes torch for what runs after it. Prints one JSON object per case. `difference` is the largest
one relative to the largest value; `untouched` says that the rows without an adapter kept every bit.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from palate_server.punica import PunicaWrapperProducts

CASES = 240
KINDS = ("linear", "logits", "embedding", "sharded")


@dataclass
class Case:
    """One batch: which token has which adapter, and the sizes of a layer."""

    seed: int
    draw: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.draw = draw = random.Random(self.seed)
        torch.manual_seed(self.seed)
        self.kind = KINDS[self.seed % len(KINDS)]
        self.dtype = draw.choice([torch.float32, torch.bfloat16])
        self.adapters = draw.randint(1, 4)
        self.layout = draw.choice(["one", "runs", "scattered"])
        self.with_base = draw.random() < 0.5
        self.tokens = draw.choice([1, 2, 7, 8, 31, 32, 64, 150])
        self.rank = draw.choice([1, 8, 16, 32])
        self.is_empty = self.kind == "linear" and draw.random() < 0.1  # the adapter does not have this layer
        self.used_rank = draw.choice([self.rank, self.rank, self.rank // 2, 0])  # vLLM fills up with zeros
        # Those of vLLM's kernel for small weights, with B as one matrix or as several, and those that it does not take.
        self.width, sizes = draw.choice(
            [(64, (16, 48, 96)), (160, (2432, 3200)), (200, (16, 24, 96)), (48, (16, 24, 96))]
        )
        self.slices = tuple(draw.choice(sizes) for _ in range(draw.randint(2, 3)))
        self.scale = draw.choice([1.0, 1.0, 0.25])
        self.add_inputs = draw.random() < 0.5
        self.is_prefill = draw.random() < 0.5
        self.padding = draw.choice([-3, 0, 5])
        if self.seed % 40 == 0:  # an adapter for some of a layer's slices, with matrices too large to be joined
            self.dtype, self.tokens, self.is_empty = torch.bfloat16, draw.choice([1, 8]), False
            self.rank, self.used_rank, self.width, self.slices = 32, 0, 160, (3200, 2432, 3200)
        ids = list(range(0 if self.with_base else 1, self.adapters + 1))  # 0: no adapter
        if self.layout == "one":
            self.ids = [draw.choice(ids)] * self.tokens
        else:
            self.ids = [draw.choice(ids) for _ in range(self.tokens)]
            if self.layout == "runs":
                self.ids.sort()

    def tensor(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape).to(self.dtype)

    def stacked(self, *shape: int) -> torch.Tensor:
        """Returns weights of all slots. The last slot is empty: vLLM's code applies it to tokens without an adapter."""
        weights = self.tensor(self.adapters + 1, 1, *shape)
        weights[-1] = 0
        return weights

    def prepared(self, kind: type[PunicaWrapperCPU]) -> PunicaWrapperCPU:
        wrapper = kind(256, 256, "cpu")
        mapping = LoRAMapping(tuple(self.ids), tuple(self.ids), is_prefill=self.is_prefill)
        wrapper.update_metadata(mapping, [*range(1, self.adapters + 1)], self.adapters + 2, 1000)
        return wrapper

    def run_with_other_weights(
        self, wrapper: PunicaWrapperCPU, x: torch.Tensor, a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]
    ) -> None:
        """Another adapter comes first, in the same tensors: what was kept of it would show in the values."""
        kept = [weights.clone() for weights in (*a, *b)]
        for weights in (*a, *b):
            weights.normal_()
        with torch.inference_mode():
            wrapper.add_lora_linear(
                torch.zeros(self.tokens, sum(self.slices), dtype=self.dtype), x, a, b, 1.0, self.slices
            )
            for weights, values in zip((*a, *b), kept, strict=True):
                weights[:].copy_(values)

    def run(self) -> dict[str, Any]:
        own, ours = self.prepared(PunicaWrapperCPU), self.prepared(PunicaWrapperProducts)
        y = self.tensor(self.tokens, sum(self.slices))
        x = self.tensor(self.tokens, self.width)
        shrunk = self.tensor(self.tokens, self.rank)
        a = tuple(self.stacked(self.rank, self.width) for _ in self.slices)
        if self.kind == "linear":
            for weights in a if self.is_empty else a[-1:]:
                weights[:, :, 0 if self.is_empty else self.used_rank :] = 0
        b = tuple(self.stacked(size, self.rank) for size in self.slices)
        results = []
        self.run_with_other_weights(ours, x, a, b)
        with torch.inference_mode():
            for wrapper in (own, ours):
                out = y.clone()
                if self.kind == "linear":
                    wrapper.add_lora_linear(out, x, a, b, self.scale, self.slices)
                elif self.kind == "logits":
                    out = y[:, : self.slices[0]].clone()
                    wrapper.add_lora_logits(out, x, a[0], b[0], self.scale)
                elif self.kind == "embedding":
                    out = y[:, : self.slices[0] + self.padding].clone()
                    wrapper.add_lora_embedding(out, shrunk, b[0], self.add_inputs)
                else:
                    buffers = torch.zeros(len(self.slices), self.tokens, self.rank)
                    wrapper.add_shrink(buffers, x, a, self.scale)
                    out = y.clone()
                    wrapper.add_expand(out, buffers[1:], b[1:], self.slices[1:], self.slices[0], self.add_inputs)
                results.append(out)
        expected, found = (result.float() for result in results)
        tuned = torch.tensor(self.ids) > 0
        start = y[:, : found.shape[1]]
        largest = expected[tuned].abs().max().item() if tuned.any() else 1.0
        return {
            "seed": self.seed,
            "kind": self.kind,
            "dtype": str(self.dtype).removeprefix("torch."),
            "layout": self.layout,
            "tuned": 0 if self.is_empty else int(tuned.sum()),
            "difference": (expected - found)[tuned].abs().max().item() / largest if tuned.any() else 0.0,
            "changed": bool((found[tuned] != start[tuned].float()).any()),
            "untouched": torch.equal(found[~tuned], start[~tuned].float()),
        }


if __name__ == "__main__":
    for seed in range(CASES):
        print(json.dumps(Case(seed).run()))
