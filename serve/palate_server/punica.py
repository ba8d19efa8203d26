"""vLLM's LoRA layers on a CPU, with one matrix product per adapter. Imported by vLLM only; `cpu_lora` puts it in place.

vLLM's own CPU code copies the adapter once per token (`weights[indices]`) and multiplies the copies. Here the tokens of a batch are
grouped by adapter once per step, and each layer multiplies a group with the adapter's weights where they are.

The values are those of vLLM's code: the first product is accumulated in float32 and rounded to the output's type before the second.

In a decoding step the products take as long as the calls around them. There a layer's A matrices are one matrix, and both products use
the kernel that vLLM has for small weights, which needs a packed copy of them.

vLLM compiles a model for one batch and drops the guards, so these groups would be those of that batch forever. In a compiled model
(an option on a CPU) vLLM's own code computes instead.

There is one difference. A token without an adapter has the index -1: it is skipped here, as on a GPU, while vLLM's CPU code reads -1
as the last slot.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.compiler import is_compiling
from torch.nn.functional import pad
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from palate_recipes.device import cpu_has_bf16

Rows = slice | torch.Tensor | None
"""The tokens of one adapter: a run of them, their numbers if they are scattered, or None for the whole batch."""
Groups = list[tuple[int, Rows]]
"""Slots of adapters with their tokens. Tokens without an adapter are in none."""

_FEW = 32
"""Below this number of rows, the fixed cost of torch's bfloat16 products exceeds that of the ways in `_Packed` and `_Converted`."""
_COPIES_BYTES = 512 * 1024**2
"""Limit of the copies of weights that are kept, of all layers together."""
_JOINED_BYTES = 512 * 1024
"""Up to this size, one matrix with the B of all slices, zeros included, is read faster than a further product is called."""
_TILE_K, _TILE_N = 32, 16
"""vLLM's kernel needs multiples of these as the inner and the outer width."""
_HAS_BF16 = cpu_has_bf16()


class PunicaWrapperProducts(PunicaWrapperCPU):
    """Replaces PunicaWrapperCPU. vLLM makes one per model and calls `update_metadata` when the batch changes."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._by_token: Groups = []
        self._by_sample: Groups = []
        self._layers: dict[int, _Layer] = {}
        self._scratch: dict[tuple[Any, ...], dict[int, _Scratch]] = {}
        self._room_bytes = _COPIES_BYTES

    def update_metadata(self, *arguments: Any, **options: Any) -> None:
        super().update_metadata(*arguments, **options)
        self._by_token = _groups(self.token_lora_indices)
        self._by_sample = _groups(self.sampler_indices)

    def add_shrink(
        self,
        y: tuple[torch.Tensor, ...] | torch.Tensor,  # per slice (tokens, rank)
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        scale: float,
        **options: Any,
    ) -> None:
        """Writes scale * x @ A into y. Only tensor-parallel layers with sharded adapters call it."""
        x = x.view(-1, x.shape[-1])
        if is_compiling() or len(x) != self.indices_len[0]:
            super().add_shrink(y, x, lora_a_stacked, scale, **options)
            return
        for slot, rows in self._by_token:
            for out, stacked in zip(y, lora_a_stacked, strict=False):
                a = _weights(stacked, slot)
                shrunk = _shrunk(_take(x, rows), a, scale, out.dtype)
                out.view(-1, out.shape[-1])[slice(None) if rows is None else rows, : a.shape[1]] = shrunk

    def add_expand(
        self,
        y: torch.Tensor,
        x: tuple[torch.Tensor, ...] | torch.Tensor,  # per slice (tokens, rank)
        lora_b_stacked: tuple[torch.Tensor, ...],
        output_slices: tuple[int, ...],
        offset_start: int = 0,
        add_inputs: bool = True,
        **options: Any,
    ) -> None:
        """Adds x @ B to the slices of y, or writes it there. Only tensor-parallel layers with sharded adapters call it."""
        y = y.view(-1, y.shape[-1])
        if is_compiling() or not len(y) == len(x[0]) == self.indices_len[0]:
            super().add_expand(y, x, lora_b_stacked, output_slices, offset_start, add_inputs, **options)
            return
        for slot, rows in self._by_token:
            y_rows, start = _take(y, rows), offset_start
            for part, stacked, size in zip(x, lora_b_stacked, output_slices, strict=False):
                out = y_rows[:, start : start + size]
                _expand(out, _take(part, rows).to(y.dtype), _weights(stacked, slot), add_inputs=add_inputs)
                start += size
            _put_back(y, rows, y_rows)

    def add_lora_embedding(
        self,
        y: torch.Tensor,  # (tokens, hidden), changed in place
        x: torch.Tensor,  # (tokens, rank)
        lora_b_stacked: torch.Tensor,
        add_inputs: bool = True,
        **options: Any,
    ) -> None:
        if is_compiling() or not len(y) == len(x) == self.indices_len[0]:
            super().add_lora_embedding(y, x, lora_b_stacked, add_inputs, **options)
            return
        for slot, rows in self._by_token:
            y_rows, b = _take(y, rows), _weights(lora_b_stacked, slot)
            width = min(y.shape[1], b.shape[1])  # adapter and model may be padded differently
            _expand(y_rows[:, :width], _take(x, rows).to(y.dtype), b[:, :width], add_inputs=add_inputs)
            _put_back(y, rows, y_rows)

    def add_lora_linear(
        self,
        y: torch.Tensor,  # (tokens, out), changed in place
        x: torch.Tensor,  # (tokens, in)
        lora_a_stacked: tuple[torch.Tensor, ...],  # per slice (slots, 1, rank, in)
        lora_b_stacked: tuple[torch.Tensor, ...],  # per slice (slots, 1, size, rank)
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[torch.Tensor, ...] | None = None,
        **options: Any,
    ) -> None:
        """The layers of a model: adds scale * x @ A @ B to the slices of y."""
        by_vllm = is_compiling() or buffer is not None or options or y.dim() != 2
        if by_vllm or not y.shape[0] == x.shape[0] == self.indices_len[0]:
            super().add_lora_linear(
                y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, buffer=buffer, **options
            )
            return
        if not self._by_token:
            return
        layer = self._layer(lora_a_stacked, lora_b_stacked)
        fits = scale == 1.0 and x.dtype == y.dtype != torch.float32 and y.shape[1] == layer.width
        for slot, rows in self._by_token:
            x_rows, y_rows, start = _take(x, rows), _take(y, rows), 0
            if fits and x_rows.shape[0] < _FEW and (copies := self._copies(layer, slot, y.dtype)):
                copies.add(y_rows, x_rows)
            else:
                for (a, b), size in zip(layer.weights(slot), output_slices, strict=True):
                    _expand(y_rows[:, start : start + size], _shrunk(x_rows, a, scale, y.dtype), b)
                    start += size
            _put_back(y, rows, y_rows)

    def add_lora_logits(
        self,
        y: torch.Tensor,  # (requests, vocabulary), changed in place
        x: torch.Tensor,  # (requests, hidden)
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        *,
        buffer: torch.Tensor | None = None,
        **options: Any,
    ) -> None:
        y = y.view(-1, y.shape[-1])
        x = x.view(-1, x.shape[-1])
        if len(x) != self.indices_len[1]:
            # The tokens of a prompt whose log-probs were asked for. vLLM does not tell whose prompt it is, and its own code fails on
            # them, which ends the engine. As on a GPU, these log-probs omit an adapter on the head (vLLM issue 51594).
            return
        if buffer is not None or len(y) != len(x):
            super().add_lora_logits(y, x, lora_a_stacked, lora_b_stacked, scale, buffer=buffer, **options)
            return
        for slot, rows in self._by_sample:
            y_rows, b = _take(y, rows), _weights(lora_b_stacked, slot)
            width = min(y.shape[1], b.shape[1])
            shrunk = _shrunk(_take(x, rows), _weights(lora_a_stacked, slot), scale, y.dtype)
            _expand(y_rows[:, :width], shrunk, b[:, :width])
            _put_back(y, rows, y_rows)

    def _copies(self, layer: _Layer, slot: int, dtype: torch.dtype) -> _Copies | None:
        """Returns a slot's weights in a form for few rows, or None where they cannot be kept.

        They are kept until vLLM writes to the layer's tensors, which it does when it loads an adapter.
        """
        version = layer.version()
        if version is None:
            return None
        if version != layer.copies_version:
            self._room_bytes += layer.drop_copies()
            layer.copies_version = version
        copies = layer.copies.get(slot)
        if copies is None and self._room_bytes > 0:
            weights = layer.weights(slot)
            packs = dtype == torch.bfloat16 and _Packed.can_hold(weights)
            copies = layer.copies[slot] = _Packed(weights) if packs else _Converted(weights, dtype)
            copies.scratch = self._scratch.setdefault(copies.shape, {})
            self._room_bytes -= copies.bytes
        return copies

    def _layer(self, a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> _Layer:
        layer = self._layers.get(id(a))
        if layer is None or layer.a is not a or layer.b is not b:
            if layer is not None:
                self._room_bytes += layer.drop_copies()
            layer = self._layers[id(a)] = _Layer(a, b)
        return layer


class _Layer:
    """Views of a layer's weights by slot. To make them for each token would take as long as the products of one token.

    vLLM copies an adapter into these same tensors, so the views always have the current values.
    """

    def __init__(self, a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> None:
        self.a, self.b = a, b
        self.width = sum(stacked.shape[-2] for stacked in b)
        self.copies: dict[int, _Copies] = {}
        self.copies_version: list[int] | None = None
        self._slots: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._tensors = [*a, *b]
        # Tensors made in inference mode do not count their changes.
        self._counts = not any(tensor.is_inference() for tensor in self._tensors)

    def version(self) -> list[int] | None:
        """Returns a value that differs after each change of the weights; None if that cannot be known."""
        return [tensor._version for tensor in self._tensors] if self._counts else None

    def drop_copies(self) -> int:
        """Returns the bytes that become free."""
        freed = sum(copies.bytes for copies in self.copies.values())
        self.copies.clear()
        return freed

    def weights(self, slot: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Returns for each slice A (in, rank) and B (rank, size)."""
        views = self._slots.get(slot)
        if views is None:
            views = [(_weights(a, slot), _weights(b, slot)) for a, b in zip(self.a, self.b, strict=True)]
            self._slots[slot] = views
        return views


class _Copies:
    """A slot's weights in a form for few rows.

    Attributes:
        shape: Layers that are equal in it share their scratch.
        scratch: Intermediate results by the number of rows.
        bytes: Size of the copies.
    """

    def __init__(self, a: torch.Tensor, bs: list[torch.Tensor], *, ranks: list[int], sizes: list[int]) -> None:
        self._a, self._bs = a, bs
        self._ranks, self._sizes = ranks, sizes
        self.shape = (a.dtype, *ranks, *sizes)
        self.scratch: dict[int, _Scratch] = {}
        self.bytes = a.itemsize * (a.numel() + sum(b.numel() for b in bs))

    def add(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """Adds x @ A @ B to y."""
        raise NotImplementedError

    def _scratch_for(self, rows: int) -> _Scratch:
        found = self.scratch.get(rows)
        if found is None:
            found = self.scratch[rows] = _Scratch(rows, self._ranks, self._sizes, self._a.dtype)
        return found


class _Packed(_Copies):
    """Copies for vLLM's kernel for small weights: two products and a sum are all that a layer computes."""

    def __init__(self, weights: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        parts = [_without_zeros(a.t(), b.t()) for a, b in weights]  # A (rank, in), B (size, rank)
        ranks, sizes = sum(len(a) for a, _ in parts), sum(len(b) for _, b in parts)
        if len(parts) > 1 and ranks * sizes * parts[0][0].itemsize <= _JOINED_BYTES:
            joined: torch.Tensor = torch.block_diag(*(b for _, b in parts))  # type: ignore[no-untyped-call]
            parts = [(torch.cat([a for a, _ in parts]), joined)]
        parts = [(pad(a, (0, 0, 0, -len(a) % _TILE_K)), pad(b, (0, -len(a) % _TILE_K))) for a, b in parts]
        super().__init__(
            _packed(torch.cat([a for a, _ in parts])),
            [_packed(b.contiguous()) for _, b in parts],
            ranks=[len(a) for a, _ in parts],
            sizes=[len(b) for _, b in parts],
        )
        self._product = torch.ops._C.weight_packed_linear.default  # looked up once: a step has hundreds of calls

    @staticmethod
    def can_hold(weights: list[tuple[torch.Tensor, torch.Tensor]]) -> bool:
        # vLLM registers the kernel where it was compiled for the processor: with AVX-512 and its bfloat16 instructions.
        return hasattr(torch.ops._C, "weight_packed_linear") and all(
            a.dtype == b.dtype == torch.bfloat16 and a.shape[0] % _TILE_K == 0 and b.shape[1] % _TILE_N == 0
            for a, b in weights
        )

    def add(self, y: torch.Tensor, x: torch.Tensor) -> None:
        if not self._a.shape[0]:
            return
        scratch, product = self._scratch_for(y.shape[0]), self._product
        product(scratch.shrunk, x.contiguous(), self._a, None, True)
        for b, (shrunk, out) in zip(self._bs, scratch.parts, strict=True):
            if b.numel():  # else the adapter leaves this slice alone; the kernel would divide by its rank
                product(out, shrunk, b, None, True)
        y.add_(scratch.out)


def _packed(weights: torch.Tensor) -> torch.Tensor:
    return torch.ops._C.convert_weight_packed(weights) if weights.numel() else weights


def _without_zeros(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns A (rank, in) and B (size, rank) without the ranks that vLLM adds, which are all of a module without an adapter."""
    used = a.any(dim=1)
    return a[used], b[:, used]


class _Converted(_Copies):
    """Copies in float32, where vLLM has no such kernel."""

    def __init__(self, weights: list[tuple[torch.Tensor, torch.Tensor]], dtype: torch.dtype) -> None:
        super().__init__(
            torch.cat([a.t().float() for a, _ in weights]).t(),
            [b.to(dtype).float().contiguous() for _, b in weights],
            ranks=[a.shape[1] for a, _ in weights],
            sizes=[b.shape[1] for _, b in weights],
        )

    def add(self, y: torch.Tensor, x: torch.Tensor) -> None:
        scratch = self._scratch_for(y.shape[0])
        torch.mm(x.float(), self._a, out=scratch.shrunk)
        scratch.shrunk.copy_(scratch.shrunk.to(y.dtype))  # vLLM rounds here
        for b, (shrunk, out) in zip(self._bs, scratch.parts, strict=True):
            torch.mm(shrunk, b, out=out)
        y.add_(scratch.out)


class _Scratch:
    """Intermediate results for some rows, with their views by slice."""

    def __init__(self, rows: int, ranks: list[int], sizes: list[int], dtype: torch.dtype) -> None:
        with torch.inference_mode(False):  # else they could not be written outside of it later
            self.shrunk = torch.empty(rows, sum(ranks), dtype=dtype)
            self.out = torch.zeros(rows, sum(sizes), dtype=dtype)  # slices without a rank are never written
        shrunk, out = self.shrunk.split_with_sizes(ranks, dim=1), self.out.split_with_sizes(sizes, dim=1)
        self.parts = list(zip(shrunk, out, strict=True))


def _weights(stacked: torch.Tensor, slot: int) -> torch.Tensor:
    """Returns a slot's matrix, transposed, of (slots, 1, rows, columns) or (slots, rows, columns)."""
    return (stacked[slot, 0] if stacked.dim() == 4 else stacked[slot]).t()


def _groups(indices: torch.Tensor) -> Groups:
    slots, lengths = torch.unique_consecutive(indices, return_counts=True)
    runs: dict[int, list[slice]] = {}
    start = 0
    for slot, length in zip(slots.tolist(), lengths.tolist(), strict=True):
        runs.setdefault(slot, []).append(slice(start, start + length))
        start += length
    groups: Groups = []
    for slot, found in runs.items():
        if slot < 0:
            continue
        if len(runs) == 1:
            groups.append((slot, None))
        elif len(found) == 1:
            groups.append((slot, found[0]))
        else:
            groups.append((slot, torch.nonzero(indices == slot).view(-1)))
    return groups


def _take(tensor: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Returns the rows: a view, or a copy if they are scattered."""
    if rows is None:
        return tensor
    return tensor[rows] if isinstance(rows, slice) else tensor.index_select(0, rows)


def _put_back(y: torch.Tensor, rows: Rows, y_rows: torch.Tensor) -> None:
    """Completes a change of what `_take` returned."""
    if isinstance(rows, torch.Tensor):
        y.index_copy_(0, rows, y_rows)


def _in_bf16(rows: int, *tensors: torch.Tensor) -> bool:
    return _HAS_BF16 and rows >= _FEW and all(tensor.dtype == torch.bfloat16 for tensor in tensors)


def _shrunk(x: torch.Tensor, a: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """Returns scale * x @ a, accumulated in float32 and rounded to dtype."""
    if scale == 1.0 and dtype == torch.bfloat16 and _in_bf16(len(x), x, a):
        return torch.mm(x, a)  # accumulates in float32, too
    shrunk = torch.mm(x.float(), a.float())
    if scale != 1.0:
        shrunk.mul_(scale)
    return shrunk.to(dtype)


def _expand(y: torch.Tensor, shrunk: torch.Tensor, b: torch.Tensor, *, add_inputs: bool = True) -> None:
    """Adds shrunk @ b to y, or writes it there. `shrunk` has y's type."""
    if y.dtype == b.dtype == torch.float32 or _in_bf16(len(y), y, b):
        y.addmm_(shrunk, b, beta=1 if add_inputs else 0)
        return
    product = torch.mm(shrunk.float(), b.to(y.dtype).float())
    if add_inputs:
        y.add_(product)
    else:
        y.copy_(product)
