"""The next-token loss of the learned tokens, without the logits of the others."""

from __future__ import annotations

from typing import Any

import torch

from llama_lab.data.templates import IGNORED


def summed_loss(
    model: Any,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the next-token losses over the learned tokens in nats, and their number.

    Args:
        model: a causal language model of transformers, with or without PEFT around it.
        input_ids: (B, T) token ids.
        labels: (B, T); IGNORED marks what is not learned.
        attention_mask: (B, T), 0 on padding; None where position_ids tell the rows apart.
        position_ids: (B, T), of packed rows: each row counts from 0.
    """
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)  # each place predicts the next token
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
    if attention_mask is not None and _pays_to_flatten(attention_mask, model.config.hidden_size):
        real = attention_mask.bool()
        # rows one behind the other: where the positions start again at 0, transformers lets no row see another
        positions = (attention_mask.cumsum(dim=1) - 1)[real].unsqueeze(0)
        inputs = {"input_ids": input_ids[real].unsqueeze(0), "position_ids": positions}
        targets = targets[real].unsqueeze(0)
    learned = targets != IGNORED
    # only places that some row learns get logits: with 49,152 words they are the largest tensor of the step
    places = learned.any(dim=0).nonzero().flatten()
    logits = model(**inputs, logits_to_keep=places, use_cache=False).logits
    learned = learned[:, places]
    kept = logits.flatten(0, 1) if bool(learned.all()) else logits[learned]
    losses = torch.nn.functional.cross_entropy(kept.float(), targets[:, places][learned], reduction="sum")
    return losses, learned.sum()


def _pays_to_flatten(attention_mask: torch.Tensor, hidden_size: int) -> bool:
    """Whether rows without padding, one behind the other, are less work than padded rows side by side.

    A Llama layer does about 24 h^2 operations a token outside of attention and 4 h for each pair of tokens in it.
    """
    num_rows, length = attention_mask.shape
    num_real = int(attention_mask.sum())
    saved = 6 * hidden_size * (num_rows * length - num_real)
    return saved > num_real**2 - num_rows * length**2
