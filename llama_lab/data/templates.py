"""Chat to tokens and labels: one path for training and for inference."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from llama_lab.choices import LossOn
from llama_lab.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]
"""Turns, each with `role` and `content`; what people typed, so that special tokens in it are only text.

A user's turn may also carry its `instruction` and `input` apart, for Alpaca's prompt; its content then holds both.
"""

IGNORED = -100
"""The label of a token that is not learned (transformers' convention)."""

_FOLDER = Path(__file__).parent / "templates"
TEMPLATE_NAMES = tuple(sorted(path.stem for path in _FOLDER.glob("*.jinja")))

_BOS = "{{- bos_token -}}"
"""How every shipped template writes the BOS."""


def read_template(name: str) -> str:
    """The Jinja text of a shipped chat template, its answers marked by {% generation %}."""
    return (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8").strip()


def set_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Give the tokenizer a shipped template whose texts begin behind the BOS as they do at the start of a row.

    Meta's code tokenises every turn by itself, and SentencePiece puts a space before its first word. The Llama
    tokenizers of transformers 5 put it at the start of a row only, where a template has its BOS; for them the template
    writes the space. It belongs to the template since such a tokenizer, saved and loaded again, is as it was.
    """
    template, bos, word = read_template(name), tokenizer.bos_token, "[INST]"
    if bos is not None:
        alone, behind, spaced = (_ids(text, tokenizer) for text in (word, f"{bos}{word}", f"{bos} {word}"))
        if behind[1:] != alone == spaced[1:]:
            template = template.replace(_BOS, "{{- bos_token + ' ' -}}")
    tokenizer.chat_template = template


def encode(example: dict[str, Any], tokenizer: PreTrainedTokenizerBase, loss_on: LossOn) -> dict[str, list[int]]:
    """Token ids of one example and, of equal length, its labels; IGNORED marks what is not learned.

    The ids are those of tokenizer.apply_chat_template, but that a special token which somebody typed into a message
    stays text.

    Args:
        example: {"messages": [...]} ending with an answer, or {"text": ...}, which is learned whole.
        tokenizer: with the chat template of the run.
        loss_on: `completion` learns the last answer and its EOS, `assistant` every answer, `all` every token but BOS;
            `auto` is `completion` for messages.
    Raises:
        DataError: the template refuses the conversation, renders a prompt differently when it is alone, or ends an
            answer without the EOS; or a typed special token cannot be kept as text.
    """
    if "text" in example:
        ids = _text_ids(example["text"], tokenizer)
        return {"input_ids": ids, "labels": _labels(ids, [True] * len(ids), tokenizer)}
    messages = example["messages"]
    ids = _chat_ids(messages, tokenizer)
    learned = [loss_on is LossOn.all] * len(ids)
    for i, message in enumerate(messages):
        is_last = i == len(messages) - 1
        if is_last or (message["role"] == "assistant" and loss_on is LossOn.assistant):
            upto = ids if is_last else _chat_ids(messages[: i + 1], tokenizer)
            start, end = _answer_span(ids, encode_prompt(messages[:i], tokenizer), upto, tokenizer)
            learned[start:end] = [True] * (end - start)
    return {"input_ids": ids, "labels": _labels(ids, learned, tokenizer)}


def encode_prompt(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids up to where the answer begins: in training the very same ids stand before the answer."""
    return _chat_ids(messages, tokenizer, add_generation_prompt=True)


def expected_bos(example: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> int:
    """How many BOS tokens the row of an example has.

    Of messages, as many as the template writes: Llama-2's and Code Llama's one a turn (each turn was a text of its own
    in their training), Alpaca's and Guanaco's one a row, ChatML's one a message where <|im_start|> is the BOS, else
    none. Of a text, those written out, and one more where the tokenizer adds it and the text does not begin with it.
    """
    bos = tokenizer.bos_token
    if bos is None:
        return 0
    if "text" in example:
        text = example["text"]
        return text.count(bos) + (adds_bos(tokenizer) and not text.lstrip().startswith(bos))
    marked, _ = _mark(example["messages"], _special_tokens(tokenizer))
    return _special_tokens(tokenizer).findall(_apply(marked, tokenizer, tokenize=False)).count(bos)


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself begins a text with its BOS: Llama-2's does, SmolLM2's does not."""
    return tokenizer.bos_token is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def _text_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # special tokens written out in the text are parsed; only what the text lacks is added
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    if bos is not None and text.lstrip().startswith(bos):
        text = text.lstrip()
    if text.rstrip().endswith(eos):
        text = text.rstrip()
    # what follows a BOS is tokenised as tokenizer(text) does it: as the beginning of a text
    first, *rest = text.split(bos) if bos is not None else [text]
    ids = _ids(first, tokenizer)
    for piece in rest:
        ids += [tokenizer.bos_token_id, *_ids(piece, tokenizer)]
    if adds_bos(tokenizer) and ids[:1] != [tokenizer.bos_token_id]:
        ids = [tokenizer.bos_token_id, *ids]
    return ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]


def _labels(ids: list[int], learned: list[bool], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that are learned; never a pad token, nor a BOS unless it is the EOS as well and does not come first."""
    never = {tokenizer.bos_token_id, tokenizer.pad_token_id} - {tokenizer.eos_token_id}
    labels = [t if wanted and t not in never else IGNORED for t, wanted in zip(ids, learned, strict=True)]
    if ids[:1] == [tokenizer.bos_token_id]:
        labels[0] = IGNORED
    return labels


def _answer_span(
    ids: list[int], prompt: list[int], upto: list[int], tokenizer: PreTrainedTokenizerBase
) -> tuple[int, int]:
    """Where in `ids` the answer to `prompt` begins, and where its EOS ends; `upto` are prompt and answer.

    The template's {% generation %} markers are not asked: most templates have none, and transformers loses an answer
    whose first character the tokenizer drops.
    """
    if ids[: len(prompt)] != prompt or ids[: len(upto)] != upto:
        raise DataError(
            "the chat template renders a prompt alone and in a conversation differently, so training and inference "
            f"would differ. Type model.chat_template={'|'.join(TEMPLATE_NAMES)}"
        )
    eos = tokenizer.eos_token_id
    ends = [i for i in range(len(prompt), len(upto)) if ids[i] == eos]
    if not ends:
        raise DataError(
            f"the chat template ends an answer without the tokenizer's EOS {tokenizer.eos_token}, so the model would "
            "never stop. Type model.chat_template=llama2"
        )
    return len(prompt), ends[-1] + 1


def _apply(messages: Messages, tokenizer: PreTrainedTokenizerBase, **kwargs: Any) -> Any:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, **kwargs)
    except TemplateError as error:
        raise DataError(f"the chat template refuses this conversation: {error}") from None


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


# Special tokens that somebody typed. A tokenizer takes them for its own wherever they stand, so marks take their place
# while the template is rendered: U+FDD0, a number and U+FDD1, code points that Unicode keeps for use inside programs.


def _chat_ids(messages: Messages, tokenizer: PreTrainedTokenizerBase, **kwargs: Any) -> list[int]:
    special = _special_tokens(tokenizer)
    if not any(special.search(text) for text in _typed(messages)):
        return list(_apply(messages, tokenizer, return_dict=True, **kwargs)["input_ids"])
    marked, found = _mark(messages, special)
    rendered = _apply(marked, tokenizer, tokenize=False, **kwargs)
    ids = _rendered_ids(rendered, found, tokenizer)
    # a letter in their place must give what the tokenizer gives, and no special token less or more
    letters = ["x"] * len(found)
    harmless = [{key: _unmark(text, letters) for key, text in message.items()} for message in marked]
    control = _rendered_ids(rendered, letters, tokenizer)
    is_kept = _specials(ids, tokenizer) == _specials(control, tokenizer)
    if not is_kept or control != _chat_ids(harmless, tokenizer, **kwargs):
        raise DataError(
            f"a message spells the special token {found[0]}, and this tokenizer or chat template cannot keep it as "
            "text. Write it differently, or leave the row out"
        )
    return ids


def _typed(messages: Messages) -> Iterator[str]:
    return (text for message in messages for key, text in message.items() if key != "role" and text is not None)


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Finds every special token of the tokenizer; `split` gives texts and tokens in turn."""
    tokens = tokenizer.added_tokens_decoder.values()
    return _any_of(tuple(sorted((token.content for token in tokens if token.special), key=len, reverse=True)))


@lru_cache
def _any_of(words: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(f"({'|'.join(map(re.escape, words))})")


def _mark(messages: Messages, special: re.Pattern[str]) -> tuple[Messages, list[str]]:
    """The messages with a mark in place of each special token, and what the marks stand for."""
    found: list[str] = []

    def mark(match: re.Match[str]) -> str:
        found.append(match[0])
        return f"\ufdd0{len(found) - 1}\ufdd1"

    either = re.compile(f"{special.pattern}|\ufdd0")
    filled = ([(key, text) for key, text in message.items() if text is not None] for message in messages)
    return [{key: text if key == "role" else either.sub(mark, text) for key, text in m} for m in filled], found


def _unmark(text: str, found: list[str]) -> str:
    return re.sub("\ufdd0(\\d+)\ufdd1", lambda match: found[int(match[1])], text)


def _rendered_ids(rendered: str, found: list[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a rendered conversation: its special tokens are the template's, its marks are `found` as text."""
    ids: list[int] = []
    for i, piece in enumerate(_special_tokens(tokenizer).split(rendered)):
        if i % 2:
            ids.append(cast(int, tokenizer.convert_tokens_to_ids(piece)))
        elif piece:
            ids += _plain_ids(_unmark(piece, found), tokenizer, behind_special=bool(ids))
    return ids


def _specials(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # <unk> may stand for any letter that the tokenizer does not know
    added = tokenizer.added_tokens_decoder
    return [t for t in ids if t in added and added[t].special and t != tokenizer.unk_token_id]


def _plain_ids(text: str, tokenizer: PreTrainedTokenizerBase, *, behind_special: bool) -> list[int]:
    def plain(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    eos = tokenizer.eos_token
    if not behind_special or _ids(f"{eos}a", tokenizer)[1:] == plain("a"):
        return plain(text)
    # Llama's tokenizer in transformers 5 puts a space before the first text of a row, and before no other: behind a
    # line break, which it joins with nothing, there is none
    return plain(f"\n{text}")[len(plain("\n")) :]
