"""Which rows make up each micro-batch of each step of a run, and its learning rates: as TRL's trainer has them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from llama_lab.arguments import shared_arguments
from llama_lab.data.batches import LENGTHS
from llama_lab.training import FitSettings

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

Window = list[list[int]]
"""The lines of the data set in each micro-batch of a step."""


class Schedule:
    """The steps of a run."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, train: Dataset, settings: FitSettings) -> None:
        t = settings.trainer
        self.accumulation = t.gradient_accumulation_steps
        trainer = _orderer(tokenizer, train, settings)
        loader = trainer.get_train_dataloader()
        self.batches_per_epoch = len(loader)
        self.steps_per_epoch = max(1, math.ceil(self.batches_per_epoch / self.accumulation))
        wanted = t.max_steps if t.max_steps > 0 else math.ceil(t.num_train_epochs * self.steps_per_epoch)
        t.check_warmup(wanted)
        self.num_steps = wanted
        self.learning_rates = _learning_rates(trainer.args, wanted)
        self.windows: list[Window] = [
            window
            for epoch in range(math.ceil(wanted / self.steps_per_epoch))
            for window in _order(loader, epoch, settings.seed, self.accumulation)
        ][:wanted]
        self.lengths = _row_lengths(train)
        """Tokens of the rows in each line of the data set."""

    def batches(self, start_step: int) -> list[list[int]]:
        """The lines of each micro-batch after this step."""
        return [batch for window in self.windows[start_step:] for batch in window]

    def sizes(self, start_step: int) -> list[tuple[int, int]]:
        """Tokens and rows of each of these."""
        lengths = [[self.lengths[i] for i in batch] for batch in self.batches(start_step)]
        return [(sum(map(sum, lines)), sum(map(len, lines))) for lines in lengths]

    def epoch(self, step: int) -> float:
        """Passes over the rows after this step; the last step of an epoch may have fewer micro-batches."""
        epoch, before = divmod(step - 1, self.steps_per_epoch)
        return epoch + min(1.0, (before + 1) * self.accumulation / self.batches_per_epoch)


def _orderer(tokenizer: PreTrainedTokenizerBase, train: Dataset, settings: FitSettings) -> Any:
    """transformers' trainer, which TRL's is; it never sees the model, since it is asked for the order alone."""
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(**shared_arguments(settings), remove_unused_columns=False)
    return Trainer(model=torch.nn.Linear(1, 1), args=args, train_dataset=train, processing_class=tokenizer)


def _order(loader: Any, epoch: int, seed: int, size: int) -> list[Window]:
    """The rows of each micro-batch of each step of an epoch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + epoch)  # grouping by length draws from the global generator
        loader.set_epoch(epoch)
        batches = [list(batch) for batch in loader.batch_sampler]
    return [batches[i : i + size] for i in range(0, len(batches), size)]


def _learning_rates(args: Any, num_steps: int) -> list[float]:
    """The learning rate of each step, by transformers' schedules."""
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
    scheduler = get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        num_warmup_steps=args.get_warmup_steps(num_steps),
        num_training_steps=num_steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    rates = []
    for _ in range(num_steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


def _row_lengths(train: Dataset) -> list[list[int]]:
    """Asked of Arrow, since the tokens themselves would all become Python's."""
    from pyarrow import compute

    column = LENGTHS if LENGTHS in train.column_names else "input_ids"
    lists: Any = train.select_columns([column]).with_format("arrow")[:]
    if column == LENGTHS:
        return lists[column].to_pylist()
    return [[length] for length in compute.list_value_length(lists[column]).to_pylist()]
