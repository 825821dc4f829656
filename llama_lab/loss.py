"""The next-token loss of the learned tokens, without the logits of the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llama_lab.data.templates import IGNORED
from llama_lab.engine.attention import MAX_LENGTH
from llama_lab.engine.install import TAKES_ROWS
from llama_lab.engine.layers import HeadLoss


def summed_loss(
    model: Any,
    input_ids: Tensor,
    labels: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum of the next-token losses over the learned tokens in nats, and their number.

    Args:
        model: a causal language model of transformers, with or without PEFT around it.
        input_ids: (B, T) token ids.
        labels: (B, T); IGNORED marks what is not learned.
        attention_mask: (B, T), 0 on padding; None where position_ids tell the rows apart.
        position_ids: (B, T), of packed rows: each row counts from 0.
    """
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)  # each place predicts the next token
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
    if attention_mask is not None:
        rows = _short_rows(model, attention_mask)
        if rows or _pays_to_flatten(attention_mask, model.config.hidden_size):
            real = attention_mask.bool()
            # rows one behind the other: where the positions start again at 0, transformers lets no row see another
            positions = (attention_mask.cumsum(dim=1) - 1)[real].unsqueeze(0)
            inputs = {"input_ids": input_ids[real].unsqueeze(0), "position_ids": positions}
            targets = targets[real].unsqueeze(0)
            if rows:
                inputs["rows"] = rows
    if (head := _frozen_head(model)) is not None:
        hidden = _causal_lm(model).model(**inputs, use_cache=False).last_hidden_state
        learned = targets != IGNORED
        return HeadLoss.apply(hidden[learned], head, targets[learned]), learned.sum()
    return _by_logits(model, inputs, targets)


def _by_logits(model: Any, inputs: dict[str, Any], targets: Tensor) -> tuple[Tensor, Tensor]:
    learned = targets != IGNORED
    # only places that some row learns get logits: with 49,152 words they are the largest tensor of the step
    places = learned.any(dim=0).nonzero().flatten()
    logits = model(**inputs, logits_to_keep=places, use_cache=False).logits
    learned = learned[:, places]
    kept = logits.flatten(0, 1) if bool(learned.all()) else logits[learned]
    losses = torch.nn.functional.cross_entropy(kept.float(), targets[:, places][learned], reduction="sum")
    return losses, learned.sum()


def _short_rows(model: Any, attention_mask: Tensor) -> list[tuple[int, int]]:
    """(start, end) of each row when they lie one behind the other; empty where the model does not take them so."""
    if model not in TAKES_ROWS:
        return []
    lengths = attention_mask.sum(dim=1)
    if int(lengths.max()) > MAX_LENGTH:
        return []
    ends = lengths.cumsum(dim=0).tolist()
    return list(zip([0, *ends], ends, strict=False))


def _frozen_head(model: Any) -> Tensor | None:
    """The weight that makes hidden states logits, where a model that was sped up does nothing else with them."""
    if model not in TAKES_ROWS:
        return None
    head = _causal_lm(model).lm_head
    is_frozen = type(head) is torch.nn.Linear and head.bias is None and not head.weight.requires_grad
    return head.weight if is_frozen else None


def _causal_lm(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _pays_to_flatten(attention_mask: Tensor, hidden_size: int) -> bool:
    """Whether rows without padding, one behind the other, are less work than padded rows side by side.

    A Llama layer does about 24 h^2 operations a token outside of attention and 4 h for each pair of tokens in it.
    """
    num_rows, length = attention_mask.shape
    num_real = int(attention_mask.sum())
    saved = 6 * hidden_size * (num_rows * length - num_real)
    return saved > num_real**2 - num_rows * length**2
