"""Held-out loss, and what greedy answers to held-out prompts are worth."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from llama_lab.config import EvaluateSettings, GenerationSettings
from llama_lab.data.answers import asked_and_wanted
from llama_lab.data.batches import Collator
from llama_lab.data.splits import Split
from llama_lab.data.templates import Messages
from llama_lab.generate import answer
from llama_lab.loss import summed_loss
from llama_lab.results import Score
from llama_lab.rewards import find_reward

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


MAX_TOKENS = 2048
"""Of a batch of held-out rows, padding included: the logits of so many tokens of a Llama-2 take 0.3 GiB."""


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
    found, answers = answer_metrics(model, tokenizer, valid, settings, metrics, tick)
    return Score(eval_loss=loss, metrics=found, answers=answers)


@dataclass(kw_only=True)
class Answers:
    """Greedy answers to the held-out prompts, in their order."""

    prompts: list[Messages]
    given: list[str]
    wanted: list[str]
    """The answers of the rows, of preferences the better ones; empty for prompts alone."""

    def metrics(self, names: list[str]) -> dict[str, float]:
        """The mean of each reward of these names (rewards.py)."""
        asked = [chat[-1]["content"] for chat in self.prompts]
        return {name: sum(map(find_reward(name), asked, self.given, self.wanted)) / len(self.given) for name in names}


def answer_metrics(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    valid: Split,
    settings: EvaluateSettings,
    metrics: list[str],
    tick: Callable[[str], None],
) -> tuple[dict[str, float], list[str]]:
    """What greedy answers to the held-out prompts are worth, and these answers; nothing is asked without a metric."""
    if not metrics:
        return {}, []
    answers = greedy_answers(model, tokenizer, valid, settings, tick)
    return answers.metrics(metrics), answers.given


def greedy_answers(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    valid: Split,
    settings: EvaluateSettings,
    tick: Callable[[str], None],
) -> Answers:
    """Ask all held-out prompts."""
    tick(f"answers to {len(valid.examples)} held-out prompts")
    asked = [asked_and_wanted(example) for example in valid.examples]
    greedy = GenerationSettings(max_new_tokens=settings.max_new_tokens, do_sample=False)
    prompts, wanted = [chat for chat, _ in asked], [text.strip() for _, text in asked]
    given = answer(model, tokenizer, prompts, greedy, batch_size=8 * settings.batch_size)
    return Answers(prompts=prompts, given=given, wanted=wanted)


@torch.no_grad()
def held_out_loss(model: PeftModel, tokenizer: PreTrainedTokenizerBase, valid: Split, batch_size: int) -> float:
    """Mean next-token loss over all learned tokens of the held-out rows, nats a token; every token weighs the same.

    NaN of prompts alone, of which nothing is learned.
    """
    if not valid.counts.num_supervised:
        return math.nan
    was_training = model.training
    model.eval()
    collate = Collator(pad_token_id=tokenizer.pad_token_id)
    tokens = valid.tokens
    total, count = 0.0, 0
    for indices in _batches([len(ids) for ids in tokens["input_ids"]], batch_size):
        batch = collate([tokens[i] for i in indices])
        losses, learned = summed_loss(model, **{name: tensor.to(model.device) for name, tensor in batch.items()})
        total, count = total + losses.item(), count + int(learned)
    model.train(was_training)
    return total / count if count else math.nan


def _batches(lengths: list[int], batch_size: int) -> Iterator[list[int]]:
    """Rows of like length together; long ones fewer at once, since their logits are the largest tensor of a run."""
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) == batch_size or (len(batch) + 1) * lengths[row] > MAX_TOKENS):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
