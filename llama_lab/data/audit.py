"""What is wrong with tokenised rows, found before anything is paid for: most failed fine-tunes are silent."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from llama_lab.choices import DataFormat
from llama_lab.data.answers import asked_and_wanted, chat_of
from llama_lab.data.findings import Finding, Level, some
from llama_lab.data.ghost import ghost_attention
from llama_lab.data.pairs import pair_findings
from llama_lab.data.templates import IGNORED, encode_prompt, expected_bos
from llama_lab.dataset_config import DatasetSettings
from llama_lab.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from llama_lab.data.splits import Split, Splits

TRIED = 50
"""So many rows are rendered again to compare training with inference."""


@dataclass(kw_only=True)
class SplitNumbers:
    """What one split holds; one number a row where an array."""

    lengths: NDArray[np.int64]
    num_learned: NDArray[np.int64]
    """Tokens whose label is not IGNORED."""
    hashes: NDArray[np.uint64]
    """Of the whole row."""
    prompt_hashes: NDArray[np.uint64]
    """Of what comes before the first learned token; of the whole row where all of it is learned."""
    max_id: int = 0
    faults: dict[str, list[int]] = field(default_factory=dict)
    """Rows, counted from 0, by what is wrong with them."""


def audit(
    splits: Splits, tokenizer: PreTrainedTokenizerBase, dataset: DatasetSettings, vocab_size: int
) -> list[Finding]:
    """Check the rows as they will be trained on, the template, and the tokens against the model.

    Args:
        vocab_size: rows of the base model's embedding.
    Returns:
        One finding a check, the good ones too, in the order in which a person should read them.
    """
    train, valid = (numbers_of(split.tokens, tokenizer) for split in (splits.train, splits.valid))
    names = ["bos"] if splits.format is DataFormat.prompt else list(TOKEN_CHECKS)  # nothing is learned of a prompt
    findings = [
        *_token_findings(train, splits.train, "training", names),
        *_token_findings(valid, splits.valid, "held-out", names),
        *pair_findings(splits.train, "training", tokenizer, vocab_size),
        *pair_findings(splits.valid, "held-out", tokenizer, vocab_size),
        _template(splits.train, tokenizer, dataset),
        _vocabulary(max(train.max_id, valid.max_id), len(tokenizer), vocab_size),
        *_shares(splits, train, valid, dataset),
    ]
    return findings


def stop_on_failure(findings: list[Finding]) -> None:
    """Refuse to train on data that failed.

    Raises:
        DataError: the first failure, and how many more there are.
    """
    failures = [finding for finding in findings if finding.level is Level.failure]
    if failures:
        more = f" ({len(failures) - 1} more checks failed.)" if failures[1:] else ""
        raise DataError(
            f"The data cannot be trained on: {failures[0].message}.{more} See the rows: type python -m llama_lab data "
            "and the same words."
        )


def numbers_of(tokens: Dataset, tokenizer: PreTrainedTokenizerBase) -> SplitNumbers:
    """Count a split in one pass over its memory-mapped columns."""
    lengths, learned, hashes, prompts = [], [], [], []
    faults: dict[str, list[int]] = {"no_label": [], "no_eos": [], "pad": [], "bos": []}
    max_id = start = 0
    for ids, labels, offsets in _batches(tokens):
        starts = offsets[:-1]
        lengths.append(np.diff(offsets))
        learned.append(_per_row(labels != IGNORED, starts))
        max_id = max(max_id, int(ids.max(initial=0)))
        for name, bad in _faulty(ids, labels, starts, tokenizer).items():
            faults[name] += (np.flatnonzero(bad) + start).tolist()
        for begin, end in zip(starts, offsets[1:], strict=True):
            hashes.append(_hash(ids[begin:end]))
            first = int(np.argmax(labels[begin:end] != IGNORED))
            prompts.append(_hash(ids[begin : begin + first]) if first > 1 else hashes[-1])
        start += len(starts)
    return SplitNumbers(
        lengths=np.concatenate(lengths),
        num_learned=np.concatenate(learned),
        hashes=np.array(hashes, dtype=np.uint64),
        prompt_hashes=np.array(prompts, dtype=np.uint64),
        max_id=max_id,
        faults=faults,
    )


def _batches(tokens: Dataset) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
    """(ids, labels, offsets) of a thousand rows at a time, their tokens one behind the other."""
    for table in tokens.with_format("arrow").iter(batch_size=1000):
        ids, labels = (table.column(name).combine_chunks() for name in ("input_ids", "labels"))
        offsets = np.asarray(ids.offsets, dtype=np.int64)
        flat = (np.asarray(column.flatten(), dtype=np.int64) for column in (ids, labels))
        yield *flat, offsets - offsets[0]


def _per_row(flags: NDArray[np.bool_], starts: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.add.reduceat(flags.astype(np.int64), starts)


def _faulty(
    ids: NDArray[np.int64], labels: NDArray[np.int64], starts: NDArray[np.int64], tokenizer: PreTrainedTokenizerBase
) -> dict[str, NDArray[np.bool_]]:
    """Which rows have a fault, by its name."""
    learned = labels != IGNORED
    bos = ids == (-1 if tokenizer.bos_token_id is None else tokenizer.bos_token_id)
    if tokenizer.bos_token_id == tokenizer.eos_token_id:
        bos[:] = False
    twice = bos & np.append(bos[1:], False)
    twice[starts[1:] - 1] = False  # the last token of a row has no next one
    return {
        "no_label": _per_row(learned, starts) == 0,
        "no_eos": _per_row(learned & (ids == tokenizer.eos_token_id), starts) == 0,
        "pad": _per_row(learned & (ids == tokenizer.pad_token_id), starts) > 0,
        "bos": _per_row(twice, starts) > 0,
    }


def _hash(ids: NDArray[np.int64]) -> int:
    return int.from_bytes(hashlib.blake2b(ids.tobytes(), digest_size=8).digest())


TOKEN_CHECKS = {
    "no_label": ("labels", "have a token to learn", "have none"),
    "no_eos": ("EOS", "learn to stop", "never learn the EOS, so the model would not stop"),
    "pad": ("padding", "learn no pad token", "learn the pad token"),
    "bos": ("BOS", "have one BOS at a time", "have two BOS in a row"),
}
"""By the name of a fault: what is checked, and what is said of rows without it and with it."""


def _token_findings(numbers: SplitNumbers, split: Split, kind: str, names: list[str]) -> list[Finding]:
    findings = []
    for name in names:
        check, good, bad = TOKEN_CHECKS[name]
        faulty, total = numbers.faults[name], len(numbers.lengths)
        if not faulty:
            findings.append(Finding(level=Level.ok, check=check, message=f"all {total:,} {kind} rows {good}"))
            continue
        # a row that was cut or goes on in the next one has no EOS, which is counted with those rows
        lost = split.num_cut + total - split.counts.num_kept if name == "no_eos" else 0
        level = Level.failure if len(faulty) > min(lost, total - 1) else Level.warning
        message = f"{some(split.numbers[faulty], total, kind)} {bad}"
        findings.append(Finding(level=level, check=check, message=message))
    return findings


def _template(split: Split, tokenizer: PreTrainedTokenizerBase, dataset: DatasetSettings) -> Finding:
    """Template trained on = template saved = template at inference; and as many BOS as it writes."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        saved = AutoTokenizer.from_pretrained(folder)
    if saved.chat_template != tokenizer.chat_template:
        return _template_finding(Level.failure, "the saved tokenizer has another chat template")
    firsts = np.unique(split.numbers, return_index=True)[1][:TRIED]  # a long row may go on in the next ones
    for example, number in zip(split.examples, firsts, strict=False):
        ids, row = split.tokens[int(number)]["input_ids"], f"training row {split.numbers[number]}"
        if "text" not in example:
            asked, wanted_answer = asked_and_wanted(example)
            example = {"messages": chat_of(example)}
            if dataset.ghost_attention:
                example["messages"] = ghost_attention(example["messages"])
                asked = example["messages"][:-1]
            prompt = encode_prompt(asked, saved)
            if ids[: len(prompt)] != prompt[: len(ids)]:
                return _template_finding(Level.failure, f"{row} begins otherwise than its prompt does at inference")
            if not wanted_answer:  # the row is its prompt, whose BOS are those of inference
                continue
        found, wanted = ids.count(saved.bos_token_id), expected_bos(example, saved)
        if found != wanted and len(ids) < dataset.max_length:
            return _template_finding(Level.failure, f"{row} has {found} BOS, and its template writes {wanted}")
    return _template_finding(Level.ok, f"as saved and at inference: {len(firsts)} rows rendered again")


def _template_finding(level: Level, message: str) -> Finding:
    return Finding(level=level, check="template", message=message)


def _vocabulary(max_id: int, num_tokens: int, vocab_size: int) -> Finding:
    if max_id >= vocab_size or num_tokens > vocab_size:
        message = (
            f"the tokenizer has {num_tokens} tokens, the rows use ids up to {max_id}, and the model's embedding "
            f"holds {vocab_size}: take the tokenizer that belongs to the model"
        )
        return Finding(level=Level.failure, check="vocabulary", message=message)
    message = f"ids up to {max_id} of {vocab_size} that the model knows"
    return Finding(level=Level.ok, check="vocabulary", message=message)


def _shares(splits: Splits, train: SplitNumbers, valid: SplitNumbers, dataset: DatasetSettings) -> list[Finding]:
    total, counts = len(train.lengths), splits.train.counts
    num_copies = total - len(np.unique(train.hashes))
    leaking = int(np.isin(valid.prompt_hashes, train.prompt_hashes).sum())
    lost = counts.num_tokens_cut / max(counts.num_tokens + counts.num_tokens_cut, 1)
    cut = f"are cut ({lost:.1%} of the tokens)" if counts.num_cut else "are cut"
    shares = (
        ("empty rows", counts.num_empty, counts.num_read, "max_empty_share", "training rows are empty"),
        ("cut rows", counts.num_cut, total, "max_cut_share", f"training rows {cut}"),
        ("duplicates", num_copies, total, "max_duplicate_share", "training rows come again"),
        ("leaks", leaking, len(valid.lengths), "max_leak_share", "held-out rows ask what a training row asks"),
    )
    return [_share(check, num, of, key, getattr(dataset, key), what) for check, num, of, key, what in shares]


def _share(check: str, num: int, total: int, key: str, limit: float, what: str) -> Finding:
    level = Level.ok if not num else Level.failure if num > limit * total else Level.warning
    message = f"{num:,} of {total:,} {what}"
    if level is Level.failure:
        message += f", more than dataset.{key}={limit:g} allows"
    return Finding(level=level, check=check, message=message)
