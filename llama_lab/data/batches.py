"""Tokenised rows to batches: packed or one by one, padded, ready for the model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llama_lab.data.templates import IGNORED
from llama_lab.dataset_config import DatasetSettings
from llama_lab.trainer_config import TrainerSettings

if TYPE_CHECKING:
    from datasets import Dataset
    from numpy.typing import NDArray

LENGTHS = "seq_lengths"
"""The column of a packed row that says how long its rows are (TRL's name)."""


def training_rows(tokens: Dataset, dataset: DatasetSettings) -> Dataset:
    """What the trainer draws its batches from: the rows themselves, or rows packed into blocks of dataset.max_length.

    Packing is best-fit decreasing (arXiv 2404.10830), by TRL: no row is cut, and a block holds whole rows only.
    """
    if not dataset.packing:
        return tokens
    from trl import pack_dataset

    return pack_dataset(tokens, dataset.max_length, strategy="bfd")


@dataclass(kw_only=True)
class Collator:
    """Rows of unequal length to one batch, padded on the right."""

    pad_token_id: int
    multiple_of: int | None = None
    """Batches are padded to a multiple of so many tokens: GPUs multiply multiples of 8 faster."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """input_ids and labels, each (B, T), and attention_mask; packed rows have position_ids in its stead.

        Where positions start again at 0, transformers lets no token attend to what lies before (if use_cache is off, as
        in all training): rows of one block, and the padding behind them, never see each other.
        """
        longest = max(len(row["input_ids"]) for row in rows)
        if self.multiple_of:
            longest = -(-longest // self.multiple_of) * self.multiple_of

        def padded(lists: list[list[int]], value: int) -> torch.Tensor:
            return torch.tensor([[*ids, *[value] * (longest - len(ids))] for ids in lists])

        batch = {
            "input_ids": padded([row["input_ids"] for row in rows], self.pad_token_id),
            "labels": padded([labels_of(row) for row in rows], IGNORED),
        }
        if LENGTHS not in rows[0]:
            return batch | {"attention_mask": padded([[1] * len(row["input_ids"]) for row in rows], 0)}
        return batch | {"position_ids": torch.tensor([_positions(row[LENGTHS], longest) for row in rows])}


def lengths_of(row: dict[str, Any]) -> list[int]:
    """Tokens of each row of a packed block; of any other row its own."""
    return row.get(LENGTHS) or [len(row["input_ids"])]


def labels_of(row: dict[str, Any]) -> list[int]:
    """The labels, but for the first of every row: nothing before it says anything about it.

    So it does not count as learned either, whatever version of transformers counts.
    """
    labels, start = list(row["labels"]), 0
    for length in lengths_of(row):
        labels[start] = IGNORED
        start += length
    return labels


def _positions(lengths: list[int], longest: int) -> list[int]:
    padding = longest - sum(lengths)
    return [position for length in (*lengths, padding) for position in range(length)]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How the rows of an epoch go through the model."""

    num_batches: int
    """Forward passes an epoch."""
    num_real_tokens: int
    num_padded_tokens: int
    """With the padding of the batches."""
    steps_per_epoch: int
    num_steps: int
    """Optimizer steps of the run, as transformers counts them."""
    num_warmup_steps: int

    @property
    def num_epochs(self) -> float:
        """Passes over the rows."""
        return self.num_steps / self.steps_per_epoch


def schedule(lengths: NDArray[np.int64], trainer: TrainerSettings, dataset: DatasetSettings, *, seed: int) -> Schedule:
    """Count batches, padding and steps for rows of these lengths (blocks, where rows are packed).

    Raises:
        ConfigError: the warm-up leaves no step to the schedule that needs one.
    """
    size, accumulation = trainer.per_device_train_batch_size, trainer.gradient_accumulation_steps
    order = np.random.default_rng(seed).permutation(len(lengths))
    if trainer.group_by_length:
        # as transformers does: 50 batches' worth of mixed rows, sorted
        chunks = np.split(order, range(50 * size, len(order), 50 * size))
        order = np.concatenate([chunk[np.argsort(-lengths[chunk], kind="stable")] for chunk in chunks])
    starts = np.arange(0, len(order), size)
    longest = np.maximum.reduceat(lengths[order], starts)
    multiple = dataset.pad_to_multiple_of or 1
    longest = -(-longest // multiple) * multiple
    rows = np.diff(np.append(starts, len(order)))
    per_epoch = max(1, math.ceil(len(starts) / accumulation))
    num_steps = trainer.max_steps if trainer.max_steps > 0 else math.ceil(trainer.num_train_epochs * per_epoch)
    trainer.check_warmup(num_steps)
    return Schedule(
        num_batches=len(starts),
        num_real_tokens=int(lengths.sum()),
        num_padded_tokens=int((longest * rows).sum()),
        steps_per_epoch=per_epoch,
        num_steps=num_steps,
        num_warmup_steps=math.ceil(num_steps * trainer.warmup_ratio),
    )
