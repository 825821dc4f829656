"""The fast way to train on a GPU: a loop that never waits for the device between two logged steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from llama_lab.data.batches import LENGTHS
from llama_lab.engine import checkpoint
from llama_lab.engine.dropout import step_keys
from llama_lab.engine.network import Network
from llama_lab.engine.optimizer import FlatAdamW
from llama_lab.engine.replay import Replay
from llama_lab.engine.stream import Stream, StreamCollator, as_it_is, chosen_sizes, made_ahead, next_size
from llama_lab.results import FitResult
from llama_lab.trainer import build_trainer
from llama_lab.training import FitSettings, Recorder, check_written_by, last_checkpoint, recording

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from llama_lab.events import Listener

SHORT_RUN = 20
"""Steps up to which a run is neither compiled nor recorded: it would be over before that pays."""


def fit(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
    settings: FitSettings,
    listener: Listener,
    evaluate: Callable[[], dict[str, float]],
) -> FitResult:
    """What trainer.fit does, for models and settings that choose.unsuited_model lets through.

    Raises:
        RunError: the loss is no longer finite.
    """
    check_written_by(last_checkpoint(settings.checkpoints), flat=True)
    with recording(settings, listener, evaluate) as (start, recorder):
        loop = _Loop(model, tokenizer, train, settings, recorder)
        try:
            if start is not None:
                checkpoint.load(start, model, loop.network.adapter, loop.optimizer)
            loop.run()
        finally:
            loop.network.adapter.release()
    return recorder.result(loop.num_steps)


class _Loop:
    """The loop and what it works with."""

    def __init__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        train: Dataset,
        settings: FitSettings,
        recorder: Recorder,
    ) -> None:
        self.model, self.train, self.settings, self.recorder = model, train, settings, recorder
        t = settings.trainer
        trainer = build_trainer(model, tokenizer, train, settings)
        self.loader: Any = trainer.get_train_dataloader()  # for the order of its rows alone
        self.batches_per_epoch = len(self.loader)
        self.steps_per_epoch = max(1, math.ceil(self.batches_per_epoch / t.gradient_accumulation_steps))
        wanted = t.max_steps if t.max_steps > 0 else math.ceil(t.num_train_epochs * self.steps_per_epoch)
        self.num_steps = wanted
        self.learning_rates = _learning_rates(trainer.args, wanted)
        self.windows = [
            window
            for epoch in range(math.ceil(self.num_steps / self.steps_per_epoch))
            for window in self._order(epoch, t.gradient_accumulation_steps)
        ][: self.num_steps]
        self.pin = torch.cuda.is_available()
        paid = self.pin and self.num_steps - recorder.start_step > SHORT_RUN
        self.network = Network(model, settings.memory, compiled=paid)
        self.optimizer = FlatAdamW(self.network.adapter, t, compiled=paid)
        self.collate = self._collator(_row_lengths(train), tokenizer.pad_token_id, record=paid)
        self.replay = Replay(self.network, longest=self.collate.longest, record=paid)
        self.writer = checkpoint.Writer(model, self.network.adapter, self.optimizer, recorder)
        self.total_KS = self._total()
        if self.pin:
            settings.note(self._said(paid))

    def run(self) -> None:
        """All steps that are left."""
        t, recorder = self.settings.trainer, self.recorder
        step = recorder.start_step
        since = step
        recorder.begin(self.num_steps)
        for streams in self._windows(step):
            self._step(streams, step)
            step += 1
            recorder.num_tokens += sum(stream.num_tokens for stream in streams)
            if step % t.logging_steps == 0 or step == self.num_steps:
                self._log(step, since)
                since = step
            if recorder.wants_eval(step):
                self._measure(step)
            recorder.listener.stepped(step)
            if t.save_steps and (step % t.save_steps == 0 or step == self.num_steps):
                self.writer.save(step)
            self.writer.poll()
        self.writer.wait()
        if self.pin:
            torch.cuda.synchronize()
        recorder.end()

    def _step(self, streams: list[Stream], step: int) -> None:
        """One optimizer step over the micro-batches of `streams`."""
        num_learned = max(1, sum(stream.num_learned for stream in streams))
        adapter = self.network.adapter
        for i, stream in enumerate(streams):
            keys = step_keys(self.settings.seed, step, i, self.network.num_keys)
            self.replay.run(stream, keys, 1 / num_learned)
            if self.total_KS is not None:
                self.total_KS.copy_(adapter.grad_KS) if i == 0 else self.total_KS.add_(adapter.grad_KS)
        grad = adapter.grad_KS if self.total_KS is None else self.total_KS
        self.optimizer.step(step + 1, self.learning_rates[step], grad)

    def _windows(self, start_step: int) -> Iterator[list[Stream]]:
        """The micro-batches of each step that is left; the last step of an epoch may have fewer."""
        wanted = self.windows[start_step:]
        ready = made_ahead(self._made, (batch for window in wanted for batch in window))
        for window in wanted:
            yield [next(ready) for _ in window]

    def _collator(self, lengths: list[list[int]], pad_token_id: int, *, record: bool) -> StreamCollator:
        """Makes streams of few lengths where they are recorded.

        Args:
            lengths: tokens of the rows in each line of the data set.
        """
        batches = [batch for window in self.windows for batch in window]
        self.totals = totals = [sum(sum(lengths[i]) for i in batch) for batch in batches]
        sizes = chosen_sizes(totals) if record else []
        longest = max(map(max, lengths))
        most_padding = max((next_size(sizes, total) - total for total in totals), default=0) if record else 0
        return StreamCollator(
            pad_token_id=pad_token_id,
            max_rows=max(sum(len(lengths[i]) for i in batch) for batch in batches) + 1 + most_padding // longest,
            longest=longest,
            sizes=partial(next_size, sizes) if record else as_it_is,
        )

    def _said(self, paid: bool) -> str:
        """What is done before the first step, and why."""
        steps = self.num_steps - self.recorder.start_step
        if not paid:
            return f"Not compiled: {steps} steps are over before that pays (from {SHORT_RUN + 1} steps on it does)."
        sizes = sorted({self.collate.sizes(total) for total in self.totals})
        return f"Compiled, and recorded for micro-batches of {', '.join(map(str, sizes))} tokens, at their first use."

    def _order(self, epoch: int, size: int) -> list[list[list[int]]]:
        """The rows of each micro-batch of each step of an epoch, as TRL's trainer draws them."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed + epoch)  # grouping by length draws from the global generator
            self.loader.set_epoch(epoch)
            batches = [list(batch) for batch in self.loader.batch_sampler]
        return [batches[i : i + size] for i in range(0, len(batches), size)]

    def _made(self, batch: list[int]) -> Stream:
        stream = self.collate([self.train[i] for i in batch])
        return stream.pinned() if self.pin else stream

    def _log(self, step: int, since: int) -> None:
        (loss,) = self.replay.take_losses()
        numbers = {
            "grad_norm": float(self.optimizer.norm_K1),
            "learning_rate": self.learning_rates[step - 1],
            "epoch": self._epoch(step),
        }
        self.recorder.log(step, loss / (step - since), numbers)

    def _epoch(self, step: int) -> float:
        """Passes over the rows after this step; the last step of an epoch may have fewer micro-batches."""
        epoch, before = divmod(step - 1, self.steps_per_epoch)
        done = (before + 1) * self.settings.trainer.gradient_accumulation_steps
        return epoch + min(1.0, done / self.batches_per_epoch)

    def _measure(self, step: int) -> None:
        if self.pin:
            torch.cuda.synchronize()  # else the steps before would count as measuring
        self.recorder.measure(step)
        self.model.train()

    def _total(self) -> Any:
        """Where gradients are added up; not needed where a step is one micro-batch."""
        adapter = self.network.adapter
        return torch.zeros_like(adapter.master_KS) if self.settings.trainer.gradient_accumulation_steps > 1 else None


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
    """Tokens of the rows in each line of the data set."""
    if LENGTHS in train.column_names:
        return [list(lengths) for lengths in train[LENGTHS]]
    return [[len(ids)] for ids in train["input_ids"]]
