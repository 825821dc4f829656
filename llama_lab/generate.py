"""Answers of a model: a batch at a time, or streamed to a person."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from llama_lab.config import GenerationSettings
from llama_lab.data.templates import Messages, encode_prompt
from llama_lab.errors import DataError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


def answer(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Messages],
    settings: GenerationSettings,
    *,
    batch_size: int = 8,
) -> list[str]:
    """The model's answers, in the order of the prompts; each stops at its EOS or at the length limit.

    Args:
        prompts: conversations that end with a user's turn.
    """
    encoded = [encode_prompt(messages, tokenizer) for messages in prompts]
    return answer_encoded(model, tokenizer, encoded, settings, batch_size=batch_size)


def answer_encoded(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: list[list[int]],
    settings: GenerationSettings,
    *,
    batch_size: int = 8,
) -> list[str]:
    """The same to prompts that are tokens already."""
    answers = [""] * len(encoded)
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))  # like lengths together: little padding
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        for i, text in zip(indices, _generate(model, tokenizer, [encoded[i] for i in indices], settings), strict=True):
            answers[i] = text
    return answers


@torch.no_grad()
def _generate(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: list[list[int]],
    settings: GenerationSettings,
    streamer: Any = None,
) -> list[str]:
    was_training = model.training
    model.eval()
    longest = max(map(len, encoded))
    # padded on the left, so that every answer begins at the same place
    ids = [[tokenizer.pad_token_id] * (longest - len(e)) + e for e in encoded]
    mask = [[0] * (longest - len(e)) + [1] * len(e) for e in encoded]
    with whole_head_input(model):
        out = model.generate(
            input_ids=torch.tensor(ids, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            streamer=streamer,
            use_cache=True,
            **generation_kwargs(settings, longest),
        )
    model.train(was_training)
    return tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)


@contextmanager
def whole_head_input(model: PeftModel) -> Iterator[None]:
    """Let the model's head read whole tensors while it answers."""
    # The last places of the prompts are a slice of all places, and the product of a slice with the head's weight copies
    # the weight once a row: of SmolLM2 with 48 prompts that is 2.7 GB and half of the time.
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
    try:
        yield
    finally:
        hook.remove()


def stream(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompt: list[int], settings: GenerationSettings
) -> str:
    """Print the answer to a prompt of tokens as it comes, and return it."""
    from transformers import TextStreamer

    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    return _generate(model, tokenizer, [prompt], settings, streamer)[0].strip()


def encode_within(messages: Messages, tokenizer: PreTrainedTokenizerBase, context: int | None, name: str) -> list[int]:
    """The tokens of a prompt; refused where they leave no place for an answer, which would be nonsense after minutes.

    Args:
        context: tokens for which the model has places; None where it does not say.
        name: of the prompt, for the message.
    Raises:
        DataError: says how many tokens there are, and how many places.
    """
    encoded = encode_prompt(messages, tokenizer)
    if context is not None and len(encoded) >= context:
        raise DataError(
            f"{name} has {len(encoded):,} tokens, and the model has places for {context:,}, its answer included. "
            "Shorten it."
        )
    return encoded


def generation_kwargs(settings: GenerationSettings, prompt_length: int) -> dict[str, Any]:
    """transformers' words for our settings.

    Raises:
        DataError: the prompt alone fills generation.max_length.
    """
    limit = settings.max_new_tokens
    if limit is None:
        limit = int(settings.max_length or 0) - prompt_length
        if limit < 1:
            raise DataError(
                f"The prompt has {prompt_length} tokens and generation.max_length is {settings.max_length}. "
                "Type a larger generation.max_length, or generation.max_new_tokens=64."
            )
    kwargs: dict[str, Any] = {
        "max_new_tokens": limit,
        "do_sample": settings.do_sample,
        "repetition_penalty": settings.repetition_penalty,
    }
    if settings.do_sample:
        kwargs |= {"temperature": settings.temperature, "top_p": settings.top_p}
    return kwargs
