"""Preference rows to tokens: the same path as of rows of one answer (templates.py), for each of the answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llama_lab.choices import LongRows, LossOn
from llama_lab.data.lengths import fit, has_label
from llama_lab.data.templates import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAIRED = ("rejected_ids", "rejected_labels")
"""Columns of the worse answer of a pair; input_ids and labels are those of the better one, or of the only one."""


def chat_of(example: dict[str, Any]) -> list[dict[str, str]]:
    """The conversation of an example, ending with its answer, of preferences with the better one; of a prompt alone
    with the question; empty for a text."""
    if "prompt" in example:
        return [*example["prompt"], *example.get("completion", example.get("chosen", ()))]
    return list(example.get("messages", ()))


def asked_and_wanted(example: dict[str, Any]) -> tuple[list[dict[str, str]], str]:
    """The conversation up to its last question, and the answer to that, empty where there is a prompt alone; of a text
    neither."""
    chat = chat_of(example)
    return (chat[:-1], chat[-1]["content"]) if chat and chat[-1]["role"] == "assistant" else (chat, "")


def encode_answers(example: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The tokens of {"prompt", "chosen", "rejected"} or of {"prompt", "completion", "label"}.

    Returns:
        input_ids and labels of prompt and (better) answer, the labels marking the answer with its EOS; of a pair also
        rejected_ids and rejected_labels, of a single answer `is_good`.
    Raises:
        DataError: see `encode`.
    """

    def whole(answer: str) -> dict[str, list[int]]:
        return encode({"messages": [*example["prompt"], *example[answer]]}, tokenizer, LossOn.completion)

    if "completion" in example:
        return whole("completion") | {"is_good": example["label"]}
    worse = whole("rejected")
    return whole("chosen") | dict(zip(PAIRED, (worse["input_ids"], worse["labels"]), strict=True))


def fit_answers(
    row: dict[str, Any], max_length: int, long_rows: LongRows
) -> tuple[dict[str, Any] | None, str | None, int]:
    """A row whose answers are cut to max_length, under which head it is counted (None: it is not too long), and how
    many tokens it lost; no row where long rows are dropped, or where nothing is left to tell the answers by.
    """
    sides = [("input_ids", "labels"), *([PAIRED] if PAIRED[0] in row else [])]
    kept, heads, lost = dict(row), set(), 0
    for ids, labels in sides:
        pieces, head = fit({"input_ids": row[ids], "labels": row[labels]}, max_length, long_rows, None)
        heads.add(head)
        if head is None:
            continue
        piece = pieces[0] if pieces else {"input_ids": [], "labels": []}
        kept |= {ids: piece["input_ids"], labels: piece["labels"]}
        lost += len(row[ids]) - len(piece["input_ids"])
    head = next((found for found in heads if found is not None), None)
    if head == "dropped":
        return None, head, sum(len(row[ids]) for ids, _ in sides)
    is_told = all(has_label({"labels": kept[labels]}) for _, labels in sides)
    is_same = PAIRED[0] in row and kept["input_ids"] == kept[PAIRED[0]]
    return (kept if is_told and not is_same else None), head, lost
