"""Held-out loss, and what greedy answers to held-out prompts are worth."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from llama_lab.config import EvaluateSettings, GenerationSettings
from llama_lab.data.splits import Split
from llama_lab.data.templates import IGNORED
from llama_lab.errors import LlamaLabError
from llama_lab.generate import answer
from llama_lab.loss import summed_loss
from llama_lab.results import Score

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


def score(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    valid: Split,
    settings: EvaluateSettings,
    metrics: list[str],
    tick: Callable[[str], None] = lambda what: None,
) -> Score:
    """Held-out loss and the data set's own metrics on greedy answers."""
    tick("held-out loss")
    loss = held_out_loss(model, tokenizer, valid, settings.batch_size)
    if not metrics:
        return Score(eval_loss=loss)
    tick(f"answers to {len(valid.examples)} held-out prompts")
    prompts = [example["messages"][:-1] for example in valid.examples]
    wanted = [example["messages"][-1]["content"].strip() for example in valid.examples]
    greedy = GenerationSettings(max_new_tokens=settings.max_new_tokens, do_sample=False)
    given = answer(model, tokenizer, prompts, greedy, batch_size=8 * settings.batch_size)
    return Score(eval_loss=loss, metrics={name: METRICS[name](given, wanted) for name in metrics}, answers=given)


@torch.no_grad()
def held_out_loss(model: PeftModel, tokenizer: PreTrainedTokenizerBase, valid: Split, batch_size: int) -> float:
    """Mean next-token loss over all learned tokens of the held-out rows, nats a token; every token weighs the same."""
    was_training = model.training
    model.eval()
    rows = sorted(valid.tokens, key=lambda row: len(row["input_ids"]))
    total, count = 0.0, 0
    for start in range(0, len(rows), batch_size):
        batch = pad_batch(rows[start : start + batch_size], tokenizer.pad_token_id, model.device)
        losses, learned = summed_loss(model, **batch)
        total, count = total + losses.item(), count + int(learned)
    model.train(was_training)
    return total / count if count else math.nan


def pad_batch(rows: list[dict[str, list[int]]], pad_token_id: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Rows padded on the right to the longest: input_ids, attention_mask and labels, each (B, T)."""
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(lists: list[list[int]], value: int) -> torch.Tensor:
        return torch.tensor([ids + [value] * (longest - len(ids)) for ids in lists], device=device)

    return {
        "input_ids": padded([row["input_ids"] for row in rows], pad_token_id),
        "attention_mask": padded([[1] * len(row["input_ids"]) for row in rows], 0),
        "labels": padded([row["labels"] for row in rows], IGNORED),
    }


def exact_match(given: list[str], wanted: list[str]) -> float:
    """Share of answers that are the wanted text, white space around it aside."""
    return sum(g.strip() == w for g, w in zip(given, wanted, strict=True)) / len(wanted)


def composes(given: list[str], wanted: list[Any]) -> float:
    """Share of answers that are a llama_lab command which Hydra composes and llama_lab accepts."""
    return sum(map(is_valid_command, given)) / len(given)


def is_valid_command(text: str) -> bool:
    """Whether `python -m llama_lab ...` would start a run; nothing is started."""
    from llama_lab.compose import compose_words

    prefix = "python -m llama_lab"
    if not text.strip().startswith(prefix):
        return False
    try:
        compose_words(shlex.split(text.strip().removeprefix(prefix)))
    except (LlamaLabError, ValueError):
        return False
    return True


METRICS: dict[str, Callable[[list[str], list[str]], float]] = {"exact_match": exact_match, "composes": composes}
