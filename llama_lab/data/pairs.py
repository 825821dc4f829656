"""What is wrong with pairs of answers as tokens; what is checked of the better answers alone is audit.py's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from llama_lab.data.answers import PAIRED
from llama_lab.data.findings import Finding, Level, some
from llama_lab.data.templates import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llama_lab.data.splits import Split

LONGER_SHARE = 0.9
"""Where the better answer is the longer one in more pairs than this, length alone tells them apart."""
FEW = 20
"""Of fewer pairs, that says nothing."""


def pair_findings(split: Split, kind: str, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[Finding]:
    """Whether both answers of a pair follow one prompt, differ, stop, and are told apart by more than length."""
    if PAIRED[0] not in split.tokens.column_names:
        return []
    faults: dict[str, list[int]] = {"prompt": [], "same": [], "eos": [], "id": []}
    num_longer = num_shorter = 0
    for number, row in enumerate(split.tokens):
        (prompt, better), (other_prompt, worse) = _split(row, "input_ids", "labels"), _split(row, *PAIRED)
        if prompt != other_prompt:
            faults["prompt"].append(number)
        if better == worse:
            faults["same"].append(number)
        if tokenizer.eos_token_id not in worse:
            faults["eos"].append(number)
        if max(row[PAIRED[0]]) >= vocab_size:
            faults["id"].append(number)
        num_longer += len(better) > len(worse)
        num_shorter += len(better) < len(worse)
    told = {
        "prompt": ("prompts", "ask the same of both answers", "have another prompt before the worse answer"),
        "same": ("pairs", "have two answers", "have the same answer twice"),
        "eos": ("EOS", "end their worse answer", "end their worse answer without EOS, so the end tells them apart"),
        "id": ("vocabulary", "have ids that the model knows", "have ids in the worse answer that the model lacks"),
    }
    total = len(split.tokens)
    findings = [_finding(faults[name], split, total, kind, *words) for name, words in told.items()]
    return [*findings, _lengths(num_longer, num_shorter, total, kind)]


def _finding(faulty: list[int], split: Split, total: int, kind: str, check: str, good: str, bad: str) -> Finding:
    if not faulty:
        return Finding(level=Level.ok, check=check, message=f"all {total:,} {kind} pairs {good}")
    # an answer that was cut has no EOS, and how many may be cut is audit.py's to say; of answers of several turns all
    # but the last are taken for a prompt
    may_be = {"EOS": len(faulty) <= min(split.num_cut, total - 1), "prompts": len(faulty) < total}
    level = Level.warning if may_be.get(check) else Level.failure
    return Finding(level=level, check=check, message=f"{some(split.numbers[faulty], total, kind)} {bad}")


def _lengths(num_longer: int, num_shorter: int, total: int, kind: str) -> Finding:
    message = f"the better answer is longer in {num_longer:,} of {total:,} {kind} pairs, and shorter in {num_shorter:,}"
    if total >= FEW and max(num_longer, num_shorter) > LONGER_SHARE * total:
        return Finding(level=Level.warning, check="lengths", message=f"{message}: length alone may be what is learned")
    return Finding(level=Level.ok, check="lengths", message=message)


def _split(row: dict[str, Any], ids: str, labels: str) -> tuple[list[int], list[int]]:
    """What comes before the first learned token, and the rest."""
    start = int(np.argmax(np.asarray(row[labels]) != IGNORED))
    return row[ids][:start], row[ids][start:]
