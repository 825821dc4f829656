"""Held-out preferences: how often, and by how much, the model likes the better answer more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from llama_lab.data.answers import PAIRED
from llama_lab.data.batches import Collator
from llama_lab.data.templates import IGNORED
from llama_lab.preference_batches import single_answers

if TYPE_CHECKING:
    from datasets import Dataset

REFERENCE = "ref"
"""TRL's name of the frozen adapter that training began with."""


@torch.no_grad()
def rewards_of(
    model: Any, tokenizer: Any, tokens: Dataset, *, beta: float, refers: bool, batch_size: int
) -> dict[str, float]:
    """reward_accuracy and reward_margin of held-out rows.

    The reward of an answer is beta times the log-probability that the model gives it, in nats: less that of the
    reference model where the trainer has one (arXiv 2305.18290), else averaged over its tokens (ORPO). Of pairs the
    accuracy is the share in which the better answer has the greater reward, the margin the mean difference. Of single
    answers it is the share whose reward is above 0 where they are good and below where not; the margin is the
    difference of the means, and is left out where all are good or all are bad.
    """
    rows = [dict(row) for row in single_answers(tokens)]
    found = log_probabilities(model, tokenizer, rows, batch_size)
    if refers:
        with reference(model):
            found = found - log_probabilities(model, tokenizer, rows, batch_size)
    else:
        found = found / torch.tensor([sum(label != IGNORED for label in row["labels"]) for row in rows])
    rewards = beta * found
    if PAIRED[0] in tokens.column_names:
        margins = rewards[::2] - rewards[1::2]
        return {"reward_accuracy": float((margins > 0).float().mean()), "reward_margin": float(margins.mean())}
    good = torch.tensor([row["is_good"] for row in rows])
    numbers = {"reward_accuracy": float(((rewards > 0) == good).float().mean())}
    if good.any() and not good.all():
        numbers["reward_margin"] = float(rewards[good].mean() - rewards[~good].mean())
    return numbers


@contextmanager
def reference(model: Any) -> Iterator[None]:
    """The model that training began with: the frozen copy of its adapter, the base where there is none."""
    if REFERENCE not in model.peft_config:
        with model.disable_adapter():
            yield
        return
    model.set_adapter(REFERENCE, inference_mode=True)
    try:
        yield
    finally:
        model.set_adapter("default")


@torch.no_grad()
def log_probabilities(model: Any, tokenizer: Any, encoded: list[dict[str, Any]], batch_size: int) -> torch.Tensor:
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
