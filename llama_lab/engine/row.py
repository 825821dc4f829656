"""One run among those that are trained together: its data, its steps, and what is told and written of it."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llama_lab.checkpoints import check_written_by, last_checkpoint, step_of
from llama_lab.engine import checkpoint
from llama_lab.engine.adapter import Adapter, lora_layers
from llama_lab.engine.dropout import step_keys
from llama_lab.engine.optimizer import FlatAdamW, Update
from llama_lab.engine.schedule import Schedule
from llama_lab.engine.stream import Stream, made_ahead, stream_of
from llama_lab.results import FitResult
from llama_lab.training import FitSettings, recording

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from llama_lab.events import Listener


@dataclass(kw_only=True)
class Micro:
    """One micro-batch of a row."""

    stream: Stream
    step: int
    """The optimizer step that it belongs to, counted from 0."""
    place: int
    """Among the micro-batches of that step."""
    is_last: bool
    share: float
    """What one learned token counts in the loss: 1 / learned tokens of the step."""


class Row:
    """A run; a stack gives it a slot, asks it for its micro-batches, and says when a step is done."""

    def __init__(
        self,
        model: PeftModel,
        adapter_name: str,
        tokenizer: PreTrainedTokenizerBase,
        train: Dataset,
        settings: FitSettings,
        listener: Listener,
        evaluate: Callable[[], dict[str, float]],
    ) -> None:
        """
        Args:
            adapter_name: PEFT's name of its adapter in `model`.
            evaluate: held-out numbers of the model as it is; its adapter is the active one then.
        Raises:
            ConfigError: the checkpoint to go on from was written by the other engine.
        """
        self.model, self.name, self.train, self.settings = model, adapter_name, train, settings
        self.listener, self.evaluate = listener, evaluate
        self.checkpoint: Path | None = last_checkpoint(settings.checkpoints)
        check_written_by(self.checkpoint, flat=True)
        self.start_step = step_of(self.checkpoint)
        self.schedule = Schedule(tokenizer, train, settings)
        layers = lora_layers(model, adapter_name).values()
        self.rank = max(layer.r[adapter_name] for layer in layers)
        self.dropout = max(_dropout_of(layer, adapter_name) for layer in layers)
        self.longest = max(map(max, self.schedule.lengths))
        """Tokens of its longest row."""
        self._sizes = self.schedule.sizes(self.start_step)
        self._num_done, self.logged_step = 0, self.start_step
        self.slot = -1
        """Where the stack has put it."""
        self.writer: checkpoint.Writer | None = None
        self.micro: Micro | None = None
        self.result: FitResult | None = None
        """Once it has ended well."""
        self.error: Exception | None = None
        """What ended it before: Pruned, RunError, or what a listener, an evaluation or a checkpoint raised."""
        self._scope = ExitStack()

    @property
    def num_steps_left(self) -> int:
        """Optimizer steps from its checkpoint, or the start, to its end."""
        return self.schedule.num_steps - self.start_step

    def open(self) -> None:
        """The run begins or goes on: PEFT's parameters are those of its checkpoint."""
        scope = recording(self.settings, self.listener, self.evaluate)
        _, self.recorder = self._scope.enter_context(scope)
        if self.checkpoint is not None:
            checkpoint.load_weights(self.checkpoint, self.model, self.name)

    def begin(self, adapter: Adapter, optimizer: FlatAdamW) -> None:
        """Its adapter is in its slot: training begins."""
        if self.checkpoint is not None:
            checkpoint.load_moments(self.checkpoint, adapter, optimizer, self.slot, self.name)
        self.writer = checkpoint.Writer(self.model, self.name, adapter, optimizer, self.recorder)
        own = {i: layer for i, layer in enumerate(_flat(adapter.layers)) if self.name in layer.lora_A}
        self.layers, self.scales = list(own), [float(layer.scaling[self.name]) for layer in own.values()]
        self._micros = self._made()
        self._scope.callback(self._micros.close)
        self.recorder.begin(self.schedule.num_steps)
        self.advance()

    @property
    def is_done(self) -> bool:
        """No micro-batch is left."""
        return self.micro is None

    @property
    def is_writing(self) -> bool:
        """A checkpoint is under way."""
        return self.writer is not None and self.writer.is_busy

    def advance(self) -> None:
        """The next micro-batch becomes `micro`."""
        self.micro = next(self._micros, None)

    @property
    def sizes_left(self) -> list[tuple[int, int]]:
        """Tokens and rows of `micro` and of every micro-batch after it."""
        return self._sizes[self._num_done :]

    @property
    def num_left(self) -> int:
        """How many these are."""
        return len(self._sizes) - self._num_done

    def put_keys(self, keys_PW: Tensor) -> None:
        """The dropout keys of this micro-batch, those of its own layers."""
        assert self.micro is not None
        own = step_keys(self.settings.seed, self.micro.step, self.micro.place, self.scales, self.dropout)
        if len(own) == len(keys_PW):
            keys_PW.copy_(own)
        else:
            keys_PW[self.layers] = own

    def update(self) -> Update:
        """What the optimizer does after this micro-batch."""
        micro, t = self.micro, self.settings.trainer
        assert micro is not None
        return Update(
            is_first=micro.place == 0,
            number=micro.step + 1 if micro.is_last else None,
            learning_rate=self.schedule.learning_rates[micro.step],
            weight_decay=t.weight_decay,
            max_norm=t.max_grad_norm,
        )

    def computed(self, read: Callable[[int], tuple[float, float]]) -> None:
        """The micro-batch is done, and the step where it was the last one: tell and measure what is due.

        Args:
            read: the sum of the losses since it was last called, and the gradient's norm, of a slot.
        Raises:
            Exception: what ends the run: RunError, or what else a listener or the evaluation raises.
        """
        micro, recorder = self.micro, self.recorder
        assert micro is not None
        recorder.num_tokens += micro.stream.num_tokens
        if micro.is_last:
            step = micro.step + 1
            if step % self.settings.trainer.logging_steps == 0 or step == self.schedule.num_steps:
                self._log(step, *read(self.slot))
            if recorder.wants_eval(step):
                self._measure(step)

    def stepped(self) -> None:
        """What comes once all rows have measured: the listener says whether the row ends, checkpoints are written.

        Raises:
            Exception: what ends the run: Pruned, or what else a listener or a checkpoint raises.
        """
        micro, t, writer = self.micro, self.settings.trainer, self.writer
        assert micro is not None
        assert writer is not None
        if micro.is_last:
            step = micro.step + 1
            self.recorder.listener.stepped(step)
            if t.save_steps and (step % t.save_steps == 0 or step == self.schedule.num_steps):
                writer.save(step, self.slot)
            writer.poll()
        self._num_done += 1
        self.advance()

    def finish(self) -> None:
        """All steps are done: waits for the last checkpoint.

        Raises:
            Exception: what went wrong with that.
        """
        if self.writer is not None:
            self.writer.wait()
        self.recorder.end()
        self.result = self.recorder.result(self.schedule.num_steps)

    def close(self) -> None:
        """The listener hears of the end, however it came."""
        if self.writer is not None:
            self.writer.abandon()
        self._scope.close()

    def _made(self) -> Generator[Micro, None, None]:
        wanted = self.schedule.windows[self.start_step :]
        ready = made_ahead(
            lambda batch: stream_of([self.train[i] for i in batch]), self.schedule.batches(self.start_step)
        )
        try:
            for step, window in enumerate(wanted, start=self.start_step):
                streams = [next(ready) for _ in window]
                share = 1 / max(1, sum(stream.num_learned for stream in streams))
                for place, stream in enumerate(streams):
                    is_last = place == len(streams) - 1
                    yield Micro(stream=stream, step=step, place=place, is_last=is_last, share=share)
        finally:
            ready.close()

    def _log(self, step: int, loss: float, norm: float) -> None:
        numbers = {
            "grad_norm": norm,
            "learning_rate": self.schedule.learning_rates[step - 1],
            "epoch": self.schedule.epoch(step),
        }
        self.recorder.log(step, loss / (step - self.logged_step), numbers)
        self.logged_step = step

    def _measure(self, step: int) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # else the steps before would count as measuring
        if self.model.active_adapter != self.name:
            self.model.set_adapter(self.name)
        self.recorder.measure(step)


def _flat(projections: list[list[Any]]) -> list[Any]:
    return [layer for layers in projections for layer in layers]


def _dropout_of(layer: Any, name: str) -> float:
    return float(getattr(layer.lora_dropout[name], "p", 0.0))
