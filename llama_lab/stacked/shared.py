"""What the runs of a stack share: one frozen base with an adapter for each, the stack that trains them, and kept.py."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llama_lab.backend import Adapted, LoadedRows
from llama_lab.choices import Engine, Memory
from llama_lab.config import RunConfig
from llama_lab.continued import continue_adapter
from llama_lab.engine.choose import unsuited_machine, unsuited_model
from llama_lab.engine.loop import SHORT_RUN
from llama_lab.engine.row import Row
from llama_lab.engine.stack import Stack
from llama_lab.lora import add_adapter
from llama_lab.micro_batch import memory_level
from llama_lab.model import base_shape, load_base, set_special_tokens
from llama_lab.results import FitResult
from llama_lab.stacked.kept import Kept
from llama_lab.stacked.turns import Turn

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llama_lab.events import Listener
    from llama_lab.training import FitSettings


class NotStackable(Exception):
    """What a stack does not compute, found once the model was there: such runs are to be trained by themselves."""


class CannotJoin(Exception):
    """Why a run does not go with the others of this stack: it is to be trained by itself."""


@dataclass(kw_only=True)
class SharedBase:
    """The base and the stack, made by the first run that needs them."""

    num_rows: int
    rank: int
    """Of the stack: smaller adapters are padded to it."""
    dropout: bool
    """Some row may drop activations."""
    kept: Kept = field(default_factory=Kept)
    model: PeftModel | None = None
    stack: Stack | None = None
    level: Memory | None = None
    done_with: str | None = None
    """The last adapter, where nobody needs it any more."""
    waiting: dict[int, Turn] = field(default_factory=dict)
    """The runs whose rows are being trained, by the identity of the row."""

    def adapted(self, config: RunConfig, name: str, tokenizer: PreTrainedTokenizerBase) -> PeftModel:
        """The shared model with one more adapter, which is the active one."""
        if self.model is None:
            base = load_base(config.model, config.quant)
            set_special_tokens(base, tokenizer)
            self.model = self._first(base, config, name)
        elif config.model.adapter:
            continue_adapter(self.model, config.model.adapter, name)
        else:
            self.kept.add_adapter(self.model, name, config)
        self.model.set_adapter(name)
        if self.done_with is not None:
            self.model.delete_adapter(self.done_with)
            self.done_with = None
        return self.model

    def _first(self, base: PreTrainedModel, config: RunConfig, name: str) -> PeftModel:
        start = config.model.adapter
        if start:
            return continue_adapter(base, start, name)
        model = add_adapter(base, config.lora, seed=config.seed, name=name)
        self.kept.remember(model, name, config)
        return model

    def drop(self, name: str) -> None:
        """Take an adapter out again, if it is there."""
        if self.model is None or name not in self.model.peft_config:
            return
        if len(self.model.peft_config) == 1:
            self.done_with = name  # PEFT keeps one at least; the next one takes its place
        else:
            self.model.delete_adapter(name)

    def memory(self, config: RunConfig, longest: int) -> tuple[Memory, str | None]:
        """What the stack keeps for its backward pass."""
        if not torch.cuda.is_available():
            return Memory.balanced, None
        level, note = memory_level(config, base_shape(config.model), longest, num_rows=self.num_rows, rank=self.rank)
        self.level = self.level or level  # a stack that has begun keeps its own
        return self.level, note

    def join(self, row: Row, turn: Turn) -> None:
        """Give a row to the stack and wait until its training has ended."""
        if self.stack is None:
            self.stack = Stack(
                row.model,
                num_rows=self.num_rows,
                rank=self.rank,
                memory=row.settings.memory,
                dropout=self.dropout,
                paid=torch.cuda.is_available() and row.schedule.num_steps > SHORT_RUN,
                note=row.settings.note,
            )
        try:
            self.stack.join(row)
        except ValueError as error:
            raise CannotJoin(str(error)) from error
        self.waiting[id(row)] = turn
        turn.wait()

    def step(self) -> None:
        """One optimizer step of all rows; the runs of those that have ended go on."""
        assert self.stack is not None
        for row in self.stack.step():
            self.waiting.pop(id(row)).resume()


@dataclass(frozen=True, kw_only=True)
class StackBackend:
    """What a run of a stack has instead of a base and a loop of its own (backend.py)."""

    shared: SharedBase
    name: str
    """Of the run's adapter."""
    turn: Turn

    def rows(self, config: RunConfig) -> LoadedRows:
        return self.shared.kept.rows(config)

    def adapted(self, config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Adapted:
        model = self.shared.adapted(config, self.name, tokenizer)
        if len(model.peft_config) == 1 and (reason := _unsuited(model)):  # the others are like the first
            raise NotStackable(reason)
        return Adapted(
            model=model,
            adapter_name=self.name,
            engine=Engine.fast,
            note=f"Trained in a stack of up to {self.shared.num_rows} rows that share this base",
        )

    def memory(self, config: RunConfig, adapted: Adapted, longest: int) -> tuple[Memory, str | None]:
        return self.shared.memory(config, longest)

    def fit(
        self,
        adapted: Adapted,
        tokenizer: PreTrainedTokenizerBase,
        train: Dataset,
        settings: FitSettings,
        listener: Listener,
        evaluate: Callable[[], dict[str, float]],
    ) -> FitResult:
        def measured() -> dict[str, float]:
            with self.turn.at_hand():
                return evaluate()

        told = _InTurn(listener, self.turn)
        row = Row(adapted.model, self.name, tokenizer, train, settings, told, measured)
        self.shared.join(row, self.turn)
        if row.error is not None:
            raise row.error
        assert row.result is not None
        return row.result


class _InTurn:
    """A run's listener, told by the stack: what it logs, and what libraries draw for it, is the run's own."""

    def __init__(self, listener: Listener, turn: Turn) -> None:
        self.listener, self.turn = listener, turn

    def started(self, start_step: int, num_steps: int) -> Collection[int] | None:
        return self.listener.started(start_step, num_steps)

    def stepped(self, step: int) -> None:
        self.listener.stepped(step)

    def logged(self, step: int, metrics: dict[str, float]) -> None:
        with self.turn.at_hand():
            self.listener.logged(step, metrics)

    def saved(self, step: int, checkpoint: Path) -> None:
        with self.turn.at_hand():
            self.listener.saved(step, checkpoint)

    def ended(self) -> None:
        with self.turn.at_hand():
            self.listener.ended()


def _unsuited(model: PeftModel) -> str | None:
    return (unsuited_machine() if torch.cuda.is_available() else None) or unsuited_model(model)
