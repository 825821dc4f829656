"""Training and held-out rows of a data set, as examples and as tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from llama_lab.choices import DataFormat, LossOn, TrainerName
from llama_lab.data.examples import Store, store_examples
from llama_lab.data.lengths import Counts
from llama_lab.data.sources import open_sources
from llama_lab.data.tokens import Drawn, Split, tokenise
from llama_lab.dataset_config import DatasetSettings
from llama_lab.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Split", "Splits", "build_splits", "resolve_loss_on"]


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


def build_splits(
    dataset: DatasetSettings,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    trainer: TrainerName = TrainerName.sft,
) -> Splits:
    """Read, convert and tokenise the rows, or take what a run before has made of the same; no row stays in memory.

    Raises:
        DataError: rows that cannot be read or converted, named by number; or nothing is left to train on.
    """
    drawn, form = _draw(dataset, seed, trainer)
    loss_on = resolve_loss_on(dataset.loss_on, form)
    (train, valid), fingerprint = tokenise(drawn, form, loss_on, dataset, tokenizer)
    stores = {split.store.digest: split.store for split in drawn}
    notes = [line.rstrip(".") for store in stores.values() for line in store.breaks]
    if form is DataFormat.prompt:
        notes.append("the rows are prompts alone, so there is no held-out loss; objective=reward ranks such runs")
    notes += [*_notes(train.counts, "training", dataset), *_notes(valid.counts, "held-out", dataset)]
    return Splits(train=train, valid=valid, format=form, fingerprint=fingerprint, notes=notes)


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


def _draw(dataset: DatasetSettings, seed: int, trainer: TrainerName) -> tuple[list[Drawn], DataFormat]:
    """The rows of both splits, in file order and cut to the wanted numbers."""
    source, held_out = open_sources(dataset)
    if held_out is None:
        store = valid_store = store_examples(source, dataset, trainer)
        train, valid = _hold_out(store, dataset, seed)
    else:
        store = store_examples(source.first(dataset.max_train_rows), dataset, trainer)
        valid_store = store_examples(held_out.first(dataset.max_eval_rows), dataset, trainer, store.format)
        train, valid = np.arange(len(store.rows)), np.arange(len(valid_store.rows))
    if not len(train) or not len(valid):
        raise DataError(
            f"The data set leaves {len(train)} rows to train on and {len(valid)} held out. Give it more rows, or type "
            "another dataset.eval_fraction."
        )
    return [
        Drawn(kind="training", store=store, indices=train[: dataset.max_train_rows]),
        Drawn(kind="held-out", store=valid_store, indices=valid[: dataset.max_eval_rows]),
    ], store.format


def _hold_out(store: Store, dataset: DatasetSettings, seed: int) -> tuple[np.ndarray, np.ndarray]:
    num_rows = len(store.rows)
    num_valid = max(1, round(num_rows * dataset.eval_fraction))
    is_held = np.zeros(num_rows, dtype=bool)
    is_held[np.random.default_rng(seed).permutation(num_rows)[:num_valid]] = True
    return np.flatnonzero(~is_held), np.flatnonzero(is_held)


def _notes(counts: Counts, kind: str, dataset: DatasetSettings) -> list[str]:
    """What a person should know of a split; nothing where all of its rows are whole."""
    longer = f"longer than dataset.max_length={dataset.max_length}"
    told = {
        "cut": f"are {longer} and were cut",
        "dropped": f"are {longer} and were left out",
        "split": f"are {longer} and go on in further rows, {counts.num_pieces} in all",
        "unlabelled": "had no token to learn after the cut and were left out",
        "empty": "are empty and were left out",
        "trimmed": "lost their last turn, a question without an answer, or their first, an answer without a question",
        "bad": f"cannot be used and were left out. The first: {''.join(counts.faults[:1])}",
    }
    numbers = {head: getattr(counts, f"num_{head}") for head in told}
    return [f"{numbers[head]} {kind} rows {said}" for head, said in told.items() if numbers[head]]
