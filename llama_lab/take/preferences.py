"""Preference rows: does the adapter like the better answer more than the base does."""

from __future__ import annotations

from typing import Any

import torch

from llama_lab.choices import LossOn
from llama_lab.data.batches import Collator
from llama_lab.data.splits import Split
from llama_lab.data.templates import IGNORED, encode


@torch.no_grad()
def score_preferences(model: Any, tokenizer: Any, valid: Split, batch_size: int) -> dict[str, float]:
    """Accuracy and mean margin of the implicit reward of DPO, arXiv 2305.18290, with beta = 1.

    The reward of an answer is log p(answer) of the adapter less that of the base, in nats. The margin is the reward of
    the chosen answer less that of the rejected one; the accuracy is the share of rows whose margin is above 0.
    """
    rows = [dict(example) for example in valid.examples]
    rewards = {}
    for name in ("chosen", "rejected"):
        encoded = [encode({"messages": [*row["prompt"], *row[name]]}, tokenizer, LossOn.completion) for row in rows]
        trained = log_probabilities(model, tokenizer, encoded, batch_size)
        with model.disable_adapter():
            rewards[name] = trained - log_probabilities(model, tokenizer, encoded, batch_size)
    margins = rewards["chosen"] - rewards["rejected"]
    return {"preference_accuracy": float((margins > 0).float().mean()), "preference_margin": float(margins.mean())}


def log_probabilities(model: Any, tokenizer: Any, encoded: list[dict[str, list[int]]], batch_size: int) -> torch.Tensor:
    """Summed log-probability of each row's learned tokens, (N,), nats."""
    collate = Collator(pad_token_id=tokenizer.pad_token_id)
    found = []
    for start in range(0, len(encoded), batch_size):
        batch = {key: value.to(model.device) for key, value in collate(encoded[start : start + batch_size]).items()}
        targets = torch.nn.functional.pad(batch.pop("labels")[:, 1:], (0, 1), value=IGNORED)
        log_p = model(**batch, use_cache=False).logits.float().log_softmax(-1)
        picked = log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        found.append((picked * (targets != IGNORED)).sum(-1).cpu())
    return torch.cat(found)
