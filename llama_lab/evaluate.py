"""Held-out loss, and what greedy answers to held-out prompts are worth."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from llama_lab.config import EvaluateSettings, GenerationSettings
from llama_lab.data.answers import chat_of
from llama_lab.data.batches import Collator
from llama_lab.data.splits import Split
from llama_lab.errors import LlamaLabError
from llama_lab.generate import answer
from llama_lab.loss import summed_loss
from llama_lab.results import Score

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
    tick(f"answers to {len(valid.examples)} held-out prompts")
    chats = [chat_of(example) for example in valid.examples]
    greedy = GenerationSettings(max_new_tokens=settings.max_new_tokens, do_sample=False)
    prompts, wanted = [chat[:-1] for chat in chats], [chat[-1]["content"].strip() for chat in chats]
    given = answer(model, tokenizer, prompts, greedy, batch_size=8 * settings.batch_size)
    return {name: METRICS[name](given, wanted) for name in metrics}, given


@torch.no_grad()
def held_out_loss(model: PeftModel, tokenizer: PreTrainedTokenizerBase, valid: Split, batch_size: int) -> float:
    """Mean next-token loss over all learned tokens of the held-out rows, nats a token; every token weighs the same."""
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
