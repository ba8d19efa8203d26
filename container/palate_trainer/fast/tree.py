"""Packs sequences with common prefixes into one row: shared tokens once, no padding. Knows token ids, no model.

The tokens of a batch form a trie: the system turn is the root, prompts branch off, chosen and rejected answers are the
leaves. Laid out depth first, a token sees exactly the tokens on its path. One number per token encodes that:

    position   0 1 2 3 4 5 6 7 8         row      S S P P c c r r r
    token k is seen by token q   <=>   k <= q < ends[k]

So `ends` is the full attention mask. An *edge* leads from a token to a scored next token. Sequences that share an edge share
its log-probability, and their gradients add up.
(Prefix sharing for preference pairs: arXiv 2410.20305.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class PrefixTree:
    """A packed batch. All fields are int64 tensors. `as_dict` and `PrefixTree(**...)` carry it through a collator.

    Attributes:
        ids: Token ids, depth first.  # (tokens,)
        positions: Depth of each token, which is its position in its sequences.  # (tokens,)
        ends: One past the last token of each token's subtree.  # (tokens,)
        score_rows: Tokens whose next token is scored, ascending and unique.  # (rows,)
        edge_rows: Index into `score_rows` of each scored edge.  # (edges,)
        edge_targets: Token id that each scored edge leads to.  # (edges,)
        slots: Edge of each scored token, sequence after sequence.  # (scored tokens,)
        counts: Number of sequences that contain each token.  # (tokens,)
    """

    ids: torch.Tensor
    positions: torch.Tensor
    ends: torch.Tensor
    score_rows: torch.Tensor
    edge_rows: torch.Tensor
    edge_targets: torch.Tensor
    slots: torch.Tensor
    counts: torch.Tensor

    def as_dict(self) -> dict[str, torch.Tensor]:
        return dict(vars(self))


def plant(sequences: list[list[int]], scored_from: list[int]) -> PrefixTree:
    """Builds the tree of a batch.

    Args:
        sequences: Token ids of each sequence, at least two tokens.
        scored_from: Index of the first scored token of each sequence (the prompt's length), at least 1.

    Returns:
        The tree; `slots` follow the order of `sequences`.
    """
    ids: list[int] = []
    positions: list[int] = []
    ends: list[int] = []
    counts: list[int] = []
    path: list[int] = []  # packed index of each token of the current sequence
    previous: list[int] = []
    edges: dict[int, int] = {}  # packed index of the token an edge leads to -> edge
    edge_parents: list[int] = []
    paths: list[list[int]] = [[] for _ in sequences]
    # Sorted, so that sequences with a common prefix are neighbours: comparing each with the previous one then finds every
    # shared token, and each subtree is complete before the next begins.
    for turn, number in enumerate(sorted(range(len(sequences)), key=sequences.__getitem__)):
        sequence = sequences[number]
        shared = _common(previous, sequence)
        for left in path[shared:]:
            ends[left] = len(ids)
            counts[left] += turn
        grown = range(len(ids), len(ids) + len(sequence) - shared)
        path = [*path[:shared], *grown]
        ids += sequence[shared:]
        positions += range(shared, len(sequence))
        ends += [0] * len(grown)
        counts += [-turn] * len(grown)  # plus the turn of the first sequence without it
        paths[number] = path
        previous = sequence
    for left in path:
        ends[left] = len(ids)
        counts[left] += len(sequences)
    # In the order of the input, not of the tree: TRL's labels and masks have the order of the input.
    slots = []
    for number, path in enumerate(paths):
        for depth in range(scored_from[number], len(path)):
            node = path[depth]
            if node not in edges:
                edges[node] = len(edges)
                edge_parents.append(path[depth - 1])
            slots.append(edges[node])
    rows = sorted(set(edge_parents))
    place = {row: index for index, row in enumerate(rows)}
    return PrefixTree(
        ids=torch.tensor(ids),
        positions=torch.tensor(positions),
        ends=torch.tensor(ends),
        score_rows=torch.tensor(rows),
        edge_rows=torch.tensor([place[parent] for parent in edge_parents]),
        edge_targets=torch.tensor([ids[node] for node in edges]),
        slots=torch.tensor(slots),
        counts=torch.tensor(counts),
    )


def visible(ends: torch.Tensor, queries: slice, keys: torch.Tensor | slice) -> torch.Tensor:
    """The attention mask between two slices of a tree.  # bool (queries, keys), True where attention is allowed"""
    index = torch.arange(len(ends), device=ends.device)
    asked, held = index[queries, None], index[keys][None]
    return (held <= asked) & (asked < ends[keys][None])


def _common(one: list[int], other: list[int]) -> int:
    # Bisection over slices: list comparison runs in C, which beats a Python loop over thousands of tokens.
    length = min(len(one), len(other))
    if one[:length] == other[:length]:
        return length
    low, high = 0, length  # one[:low] == other[:low], one[:high] != other[:high]
    while high - low > 1:
        middle = (low + high) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    return low


class TreeCollator:
    """Adds the batch's tree to the output of TRL's collator.

    Args:
        stock: TRL's collator.
        sequences: Returns a batch's token ids and the index of each sequence's first scored token, in the order in which
            the stock collator stacks the sequences.
    """

    def __init__(
        self,
        stock: Callable[[list[dict[str, Any]]], dict[str, Any]],
        sequences: Callable[[list[dict[str, Any]]], tuple[list[list[int]], list[int]]],
    ) -> None:
        self.stock, self.sequences = stock, sequences
        self.enabled = False

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.stock(rows)
        if self.enabled:
            # A plain dict, because Trainer moves only tensors in plain containers to the device.
            batch["tree"] = plant(*self.sequences(rows)).as_dict()
        return batch


def pair_sequences(rows: list[dict[str, Any]]) -> tuple[list[list[int]], list[int]]:
    """Sequences of preference rows, all chosen answers first: the order of `DataCollatorForPreference`."""
    sequences = [row["prompt_ids"] + row[answer] for answer in ("chosen_ids", "rejected_ids") for row in rows]
    return sequences, [max(1, len(row["prompt_ids"])) for row in rows] * 2


def answer_sequences(rows: list[dict[str, Any]]) -> tuple[list[list[int]], list[int]]:
    """Sequences of SFT rows. Scoring starts at the first label other than -100."""
    starts = [next(index for index, label in enumerate(row["labels"]) if label != -100) for row in rows]
    return [row["input_ids"] for row in rows], [max(1, start) for start in starts]
