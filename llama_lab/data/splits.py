"""Training and held-out rows of a data set, as examples and as tokens."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_lab.choices import DataFormat, LossOn
from llama_lab.config import DatasetSettings
from llama_lab.data.files import read_rows
from llama_lab.data.formats import detect_format, to_example
from llama_lab.data.templates import IGNORED, encode
from llama_lab.errors import DataError
from llama_lab.hub import dataset_snapshot, explain_hub

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

Rows = list[tuple[int, dict[str, Any]]]
"""Rows with their numbers in the file or split that they come from, counted from 1."""

SAMPLE_FILES = {split: Path(__file__).parent / f"sample_{split}.jsonl" for split in ("train", "valid")}


@dataclass(kw_only=True)
class Split:
    """Rows of one kind: as the person wrote them, and as the model reads them."""

    examples: list[dict[str, Any]]
    """{"messages": [...]} or {"text": ...}, one a row."""
    tokens: Dataset
    """Columns input_ids and labels, lists of equal length; rows without a label are left out."""
    num_cut: int = 0
    """Rows longer than dataset.max_length that were cut at their end."""
    num_dropped: int = 0
    """Rows left with no token to learn after the cut."""


@dataclass(kw_only=True)
class Splits:
    """The data of a run."""

    train: Split
    valid: Split
    format: DataFormat
    fingerprint: str
    """Of the tokens and labels: equal where two runs learn from the same data in the same way."""
    notes: list[str] = field(default_factory=list)
    """What a person should know: rows that were cut or left out."""


def build_splits(dataset: DatasetSettings, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> Splits:
    """Read, convert and tokenise the rows.

    Raises:
        DataError: rows that cannot be read or converted, named by number; or nothing is left to train on.
    """
    train_rows, valid_rows = _read(dataset, seed)
    if not train_rows or not valid_rows:
        raise DataError(f"The data set leaves {len(train_rows)} rows to train on and {len(valid_rows)} held out.")
    form = detect_format(train_rows[0][1], dataset)
    loss_on = resolve_loss_on(dataset.loss_on, form)
    train = _encode_rows(train_rows, form, loss_on, dataset, tokenizer, "training")
    valid = _encode_rows(valid_rows, form, loss_on, dataset, tokenizer, "held-out")
    notes = [*_notes(train, "training", dataset), *_notes(valid, "held-out", dataset)]
    return Splits(train=train, valid=valid, format=form, fingerprint=_fingerprint(train, valid), notes=notes)


def resolve_loss_on(loss_on: LossOn, form: DataFormat) -> LossOn:
    """What `auto` means for a format.

    Raises:
        DataError: answers are to be learned, and the rows are plain text.
    """
    if loss_on is LossOn.auto:
        return LossOn.all if form is DataFormat.text else LossOn.completion
    if form is DataFormat.text and loss_on is not LossOn.all:
        raise DataError(
            f"dataset.loss_on={loss_on} needs rows with marked answers; these are text. Type dataset.loss_on=all."
        )
    return loss_on


def _read(dataset: DatasetSettings, seed: int) -> tuple[Rows, Rows]:
    """Training and held-out rows, in file order and cut to the wanted numbers."""
    if dataset.name == "sample":
        train, valid = (list(enumerate(read_rows(SAMPLE_FILES[split]), 1)) for split in ("train", "valid"))
    elif dataset.path is not None:
        train, valid = _hold_out(list(enumerate(read_rows(Path(dataset.path).expanduser()), 1)), dataset, seed)
    else:
        train, valid = _read_hub(dataset, seed)
    return train[: dataset.max_train_rows], valid[: dataset.max_eval_rows]


def _read_hub(dataset: DatasetSettings, seed: int) -> tuple[Rows, Rows]:
    from datasets import load_dataset
    from huggingface_hub.constants import HF_HUB_OFFLINE

    name = str(dataset.name)

    def load(split: str) -> Rows:
        try:
            # offline, `datasets` only knows what it has prepared itself; a downloaded copy is as good
            local = dataset_snapshot(name, dataset.revision) if HF_HUB_OFFLINE else None
            rows = load_dataset(
                local or name, dataset.subset, split=split, revision=None if local else dataset.revision
            )
        except Exception as error:
            raise explain_hub(error, name, "dataset.name") from error
        return list(enumerate(rows.to_list(), 1))

    if dataset.eval_split is not None:
        return load(dataset.split), load(dataset.eval_split)
    return _hold_out(load(dataset.split), dataset, seed)


def _hold_out(rows: Rows, dataset: DatasetSettings, seed: int) -> tuple[Rows, Rows]:
    import numpy

    num_valid = max(1, round(len(rows) * dataset.eval_fraction))
    held = set(numpy.random.default_rng(seed).permutation(len(rows))[:num_valid].tolist())
    return [r for i, r in enumerate(rows) if i not in held], [r for i, r in enumerate(rows) if i in held]


def _encode_rows(
    rows: Rows,
    form: DataFormat,
    loss_on: LossOn,
    dataset: DatasetSettings,
    tokenizer: PreTrainedTokenizerBase,
    kind: str,
) -> Split:
    from datasets import Dataset

    examples, encoded, num_cut, num_dropped = [], [], 0, 0
    for number, row in rows:
        try:
            example = to_example(row, form, dataset)
            tokens = encode(example, tokenizer, loss_on)
        except DataError as error:
            raise DataError(f"{kind} row {number}: {error}") from None
        num_cut += len(tokens["input_ids"]) > dataset.max_length
        tokens = {column: ids[: dataset.max_length] for column, ids in tokens.items()}
        if all(label == IGNORED for label in tokens["labels"]):
            num_dropped += 1
            continue
        examples.append(example)
        encoded.append(tokens)
    if not encoded:
        raise DataError(
            f"No {kind} row has a token to learn within dataset.max_length={dataset.max_length}. Type a larger one."
        )
    return Split(examples=examples, tokens=Dataset.from_list(encoded), num_cut=num_cut, num_dropped=num_dropped)


def _notes(split: Split, kind: str, dataset: DatasetSettings) -> list[str]:
    notes = []
    if split.num_cut:
        notes.append(
            f"{split.num_cut} {kind} rows are longer than dataset.max_length={dataset.max_length} and were cut"
        )
    if split.num_dropped:
        notes.append(f"{split.num_dropped} {kind} rows had no token to learn after the cut and were left out")
    return notes


def _fingerprint(*splits: Split) -> str:
    digest = hashlib.sha256()
    for split in splits:
        digest.update(f"{len(split.tokens)} rows".encode())  # where one split ends and the next begins
        for row in split.tokens:
            digest.update(json.dumps([row["input_ids"], row["labels"]]).encode())
    return digest.hexdigest()[:16]
