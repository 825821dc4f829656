"""The next-token loss of the learned tokens, without the logits of the others."""

from __future__ import annotations

from typing import Any

import torch

from llama_lab.data.templates import IGNORED


def summed_loss(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the next-token losses over the learned tokens in nats, and their number.

    Args:
        model: a causal language model of transformers, with or without PEFT around it.
        input_ids: (B, T) token ids.
        attention_mask: (B, T), 0 on padding.
        labels: (B, T); IGNORED marks what is not learned.
    """
    targets = labels[:, 1:]
    learned = targets != IGNORED
    # only positions that some row learns get logits: with 49,152 words they are the largest tensor of the step
    positions = learned.any(dim=0).nonzero().flatten()
    logits = model(input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=positions, use_cache=False).logits
    learned = learned[:, positions]
    losses = torch.nn.functional.cross_entropy(logits[learned].float(), targets[:, positions][learned], reduction="sum")
    return losses, learned.sum()
