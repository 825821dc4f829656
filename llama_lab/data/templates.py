"""Chat to tokens and labels: one path for training and for inference."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from llama_lab.choices import LossOn
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
        DataError: the template refuses the conversation, renders a prompt differently when it is alone, or ends an
            answer without the EOS.
    """
    if "text" in example:
        ids = _text_ids(example["text"], tokenizer)
        return {"input_ids": ids, "labels": _labels(ids, [True] * len(ids), tokenizer)}
    messages = example["messages"]
    ids = _apply(messages, tokenizer)["input_ids"]
    learned = [loss_on is LossOn.all] * len(ids)
    for i, message in enumerate(messages):
        is_last = i == len(messages) - 1
        if is_last or (message["role"] == "assistant" and loss_on is LossOn.assistant):
            start, end = _answer_span(ids, messages[: i + 1], tokenizer)
            learned[start:end] = [True] * (end - start)
    return {"input_ids": ids, "labels": _labels(ids, learned, tokenizer)}


def encode_prompt(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids up to where the answer begins: in training the very same ids stand before the answer."""
    return _apply(messages, tokenizer, add_generation_prompt=True)["input_ids"]


def _text_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # special tokens written out in the text are parsed; only what the text lacks is added
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    if bos is not None and text.lstrip().startswith(bos):
        text = text.lstrip()
    if text.rstrip().endswith(eos):
        text = text.rstrip()
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if bos is not None and ids[:1] != [tokenizer.bos_token_id]:
        ids = [tokenizer.bos_token_id, *ids]
    return ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]


def _labels(ids: list[int], learned: list[bool], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that are learned; never a pad token, nor a BOS unless it is the EOS as well and does not come first."""
    never = {tokenizer.bos_token_id, tokenizer.pad_token_id} - {tokenizer.eos_token_id}
    labels = [t if wanted and t not in never else IGNORED for t, wanted in zip(ids, learned, strict=True)]
    if ids[:1] == [tokenizer.bos_token_id]:
        labels[0] = IGNORED
    return labels


def _answer_span(ids: list[int], messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Where in `ids` the last answer of `messages` begins, and where its EOS ends.

    An answer is what follows its prompt. The template's {% generation %} markers are not asked: most templates have
    none, and transformers loses an answer whose first character the tokenizer drops.
    """
    prompt, upto = encode_prompt(messages[:-1], tokenizer), _apply(messages, tokenizer)["input_ids"]
    if ids[: len(prompt)] != prompt or ids[: len(upto)] != upto:
        raise DataError(
            "the chat template renders a prompt alone and in a conversation differently, so training and inference "
            f"would differ. Type model.chat_template={'|'.join(TEMPLATE_NAMES)}"
        )
    ends = [i for i in range(len(prompt), len(upto)) if ids[i] == tokenizer.eos_token_id]
    if not ends:
        raise DataError(
            f"the chat template ends an answer without the tokenizer's EOS {tokenizer.eos_token}, so the model would "
            "never stop. Type model.chat_template=llama2"
        )
    return len(prompt), ends[-1] + 1


def _apply(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, **kwargs: Any) -> dict[str, list[int]]:
    from jinja2 import TemplateError

    try:
        return cast(
            dict[str, list[int]], tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **kwargs)
        )
    except TemplateError as error:
        raise DataError(f"the chat template refuses this conversation: {error}") from None
