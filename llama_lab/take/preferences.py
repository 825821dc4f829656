"""Preference rows: does the adapter like the better answer more than the base does."""

from __future__ import annotations

from typing import Any

import torch

from llama_lab.choices import LossOn
from llama_lab.data.splits import Split
from llama_lab.data.templates import encode
from llama_lab.preference_score import log_probabilities


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
