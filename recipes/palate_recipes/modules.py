"""Which layers may carry an adapter by their names, and why others may not. Knows names, no model.

vLLM 0.32 serves LoRA on linear layers; on embeddings and the output head for some architectures only, on norms never.
"""

from __future__ import annotations

_HEADS = ("lm_head", "embed_out", "output_projection")
_EMBEDDINGS = ("embed_tokens", "tok_embeddings", "word_embeddings", "wte", "wpe", "embed_in", "embed_positions")
_ROUTERS = ("gate", "router", "shared_expert_gate")


def why_not_served(module: str) -> str | None:
    """Returns why an adapter on the layers of that name would not be served, or None when nothing speaks against it.

    Args:
        module: As in `target_modules`: `q_proj`, or a path that ends with such a name.
    """
    name = module.rpartition(".")[2].casefold()
    if name in _HEADS:
        # TRL's DPO computes log-probabilities from the head's weight itself, and refuses an adapter there, too.
        return "is the output head, where vLLM serves an adapter for some architectures only, and DPO trains none"
    if name in _EMBEDDINGS:
        return "is an embedding, where vLLM serves an adapter for some architectures only"
    if "norm" in name or name in ("ln_1", "ln_2", "ln_f"):
        return "is a normalisation, which has no matrix that an adapter could be added to"
    if name in _ROUTERS:
        return (
            "chooses between experts: an adapter there changes which weights answer, and engines do not serve it alike"
        )
    return None
