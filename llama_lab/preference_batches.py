"""Preference rows to the batches that TRL's trainers compute with; the tokens are those of data/answers.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from llama_lab.choices import TrainerName
from llama_lab.data.answers import PAIRED
from llama_lab.data.batches import Collator
from llama_lab.data.templates import IGNORED
from llama_lab.errors import DataError
from llama_lab.own_settings import SAMPLING
from llama_lab.trainer_config import TrainerSettings

if TYPE_CHECKING:
    from datasets import Dataset

Rows = list[dict[str, Any]]
Batch = dict[str, torch.Tensor]


def single_answers(tokens: Dataset) -> Dataset:
    """Columns input_ids, labels, is_good: both answers of each pair in turn, or single ones as they are."""
    from datasets import concatenate_datasets

    if PAIRED[0] not in tokens.column_names:
        return tokens
    good = tokens.select_columns(["input_ids", "labels"])
    bad = tokens.select_columns(list(PAIRED)).rename_columns(dict(zip(PAIRED, ("input_ids", "labels"), strict=True)))
    both = [part.add_column("is_good", [verdict] * len(part)) for part, verdict in ((good, True), (bad, False))]
    return concatenate_datasets(both).select([i for row in range(len(good)) for i in (row, row + len(good))])


def lengths_at_once(tokens: Dataset, trainer: TrainerSettings) -> list[int]:
    """Tokens that go through the model together for one row of a batch: of a pair both answers, padded alike; where the
    model answers itself, the prompt and the longest answer that it may give."""
    whole = [len(ids) for ids in tokens["input_ids"]]
    if trainer.name in SAMPLING:
        answers = [sum(label != IGNORED for label in labels) for labels in tokens["labels"]]
        longest = trainer.max_completion_length or 0
        return [num - answer + longest for num, answer in zip(whole, answers, strict=True)]
    if PAIRED[0] not in tokens.column_names:
        return whole
    worse = [len(ids) for ids in tokens[PAIRED[0]]]
    if trainer.name is TrainerName.kto:
        return whole + worse
    return [2 * max(pair) for pair in zip(whole, worse, strict=True)]


def lengths_of_pass(lengths: list[int], trainer: TrainerSettings) -> list[int]:
    """The lengths of all rows of one pass.

    Where the model answers itself, each prompt stands once an answer, and prompts that fill no step are left out, as
    TRL leaves them out.

    Raises:
        DataError: there are fewer prompts than one step takes.
    """
    if trainer.name not in SAMPLING:
        return lengths
    check_num_prompts(len(lengths), trainer)
    times = trainer.num_generations or 1
    prompts_of_step = trainer.effective_batch_size // times
    whole = len(lengths) // prompts_of_step * prompts_of_step
    return [length for length in lengths[:whole] for _ in range(times)]


def check_num_prompts(num_prompts: int, trainer: TrainerSettings) -> None:
    """Refuse fewer prompts than one step takes, of which TRL would make no step at all.

    Raises:
        DataError: says how many a step takes.
    """
    needed = trainer.effective_batch_size // (trainer.num_generations or 1)
    if num_prompts < needed:
        raise DataError(
            f"A step takes {needed} prompts ({trainer.effective_batch_size} answers, trainer.num_generations="
            f"{trainer.num_generations} each), and there are {num_prompts} to train on. Type "
            f"trainer.per_device_train_batch_size={trainer.num_generations} trainer.gradient_accumulation_steps=1."
        )


def worse_answers(rows: Rows) -> Rows:
    """The rows of the rejected answers, as columns input_ids and labels."""
    return [{"input_ids": row[PAIRED[0]], "labels": row[PAIRED[1]]} for row in rows]


@dataclass(kw_only=True)
class PairCollator(Collator):
    """For DPO: the better answers above the worse ones, (2B, T)."""

    def __call__(self, rows: Rows) -> Batch:
        return _marked(super().__call__([*rows, *worse_answers(rows)]))


@dataclass(kw_only=True)
class SideCollator(Collator):
    """For ORPO: better and worse answers by name, each (B, T)."""

    def __call__(self, rows: Rows) -> Batch:
        sides = {"chosen": super().__call__(rows), "rejected": super().__call__(worse_answers(rows))}
        batch = {f"{side}_{name}": value for side, batch in sides.items() for name, value in batch.items()}
        # what counts tokens looks here
        return batch | {name: sides["chosen"][name] for name in ("input_ids", "attention_mask")}


@dataclass(kw_only=True)
class SingleCollator(Collator):
    """For KTO: answers with their verdict, (B, T); and as KL_... each prompt with the answer of the row before it."""

    with_kl: bool = True

    def __call__(self, rows: Rows) -> Batch:
        batch = _marked(super().__call__(rows)) | {"label": torch.tensor([row["is_good"] for row in rows])}
        if not self.with_kl:
            return batch
        mixed = [_swapped(row, other) for row, other in zip(rows, [rows[-1], *rows[:-1]], strict=True)]
        return batch | {f"KL_{name}": value for name, value in _marked(super().__call__(mixed)).items()}


def _marked(batch: Batch) -> Batch:
    """The answers marked by a mask, as TRL's trainers want them, instead of by labels."""
    return batch | {"completion_mask": (batch.pop("labels") != IGNORED).long()}


def _swapped(row: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The prompt of one row with the answer of another."""
    start, begin = (next(i for i, t in enumerate(r["labels"]) if t != IGNORED) for r in (row, other))
    return {
        "input_ids": [*row["input_ids"][:start], *other["input_ids"][begin:]],
        "labels": [*row["labels"][:start], *other["labels"][begin:]],
    }
