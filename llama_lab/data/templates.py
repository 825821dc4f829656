"""Chat to tokens and labels: one path for training and for inference."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from llama_lab.config import LossOn
from llama_lab.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token that is not learned (transformers' convention)."""

_FOLDER = Path(__file__).parent / "templates"
TEMPLATE_NAMES = tuple(sorted(path.stem for path in _FOLDER.glob("*.jinja")))


def read_template(name: str) -> str:
    """The Jinja text of a shipped chat template, its answers marked by {% generation %}."""
    return (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8").strip()


def encode(example: dict[str, Any], tokenizer: PreTrainedTokenizerBase, loss_on: LossOn) -> dict[str, list[int]]:
    """Token ids of one example and, of equal length, its labels; IGNORED marks what is not learned.

    Args:
        example: {"messages": [...]} ending with an answer, or {"text": ...}.
        tokenizer: with the chat template of the run.
        loss_on: `completion` learns the last answer and its EOS, `assistant` every answer, `all` every token but BOS.
    Raises:
        DataError: the template refuses the conversation, or marks no token of an answer.
    """
    if "text" in example:
        return _encode_text(example["text"], tokenizer)
    ids, answered = _encode_chat(example["messages"], tokenizer)
    if loss_on is LossOn.all:
        labels = [IGNORED if i == 0 and token == tokenizer.bos_token_id else token for i, token in enumerate(ids)]
        return {"input_ids": ids, "labels": labels}
    if loss_on is not LossOn.assistant:
        answered = _last_span(answered)
    if not any(answered):
        raise DataError("the chat template marks no token of the answer")
    return {"input_ids": ids, "labels": [t if a else IGNORED for t, a in zip(ids, answered, strict=True)]}


def encode_prompt(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids up to where the answer begins: in training the very same ids stand before the answer."""
    return _apply(messages, tokenizer, add_generation_prompt=True)["input_ids"]


def _encode_text(text: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    # special tokens written out in the text are parsed; only what the text lacks is added
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if tokenizer.bos_token_id is not None and ids[:1] != [bos]:
        ids = [bos, *ids]
    if ids[-1] != eos:
        ids = [*ids, eos]
    return {"input_ids": ids, "labels": [IGNORED if i == 0 and t == bos else t for i, t in enumerate(ids)]}


def _encode_chat(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    if "{% generation %}" in str(tokenizer.chat_template):
        encoded = _apply(messages, tokenizer, return_assistant_tokens_mask=True)
        return encoded["input_ids"], [bool(m) for m in encoded["assistant_masks"]]
    return _encode_by_prefix(messages, tokenizer)


def _encode_by_prefix(
    messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[bool]]:
    """For a template without markers: an answer is what follows its prompt, up to and with its EOS."""
    ids = _apply(messages, tokenizer)["input_ids"]
    answered = [False] * len(ids)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = encode_prompt(messages[:i], tokenizer)
        upto = _apply(messages[: i + 1], tokenizer)["input_ids"]
        if ids[: len(prompt)] != prompt or ids[: len(upto)] != upto:
            raise DataError(
                "the tokenizer's chat template renders a prompt alone and in a conversation differently, so training "
                f"and inference would differ. Type model.chat_template={'|'.join(TEMPLATE_NAMES)}"
            )
        end = max((j for j in range(len(prompt), len(upto)) if ids[j] == tokenizer.eos_token_id), default=-1) + 1
        if end == 0:
            raise DataError("the tokenizer's chat template ends an answer without the EOS, so it would never stop")
        answered[len(prompt) : end] = [True] * (end - len(prompt))
    return ids, answered


def _apply(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, **kwargs: Any) -> dict[str, list[int]]:
    from jinja2 import TemplateError

    try:
        return cast(
            dict[str, list[int]], tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **kwargs)
        )
    except TemplateError as error:
        raise DataError(f"the chat template refuses this conversation: {error}") from None


def _last_span(answered: list[bool]) -> list[bool]:
    """Keep the last unbroken run of True."""
    end = len(answered) - 1
    while end >= 0 and not answered[end]:
        end -= 1
    start = end
    while start >= 0 and answered[start]:
        start -= 1
    return [start < i <= end for i in range(len(answered))]
