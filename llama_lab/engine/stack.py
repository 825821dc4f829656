"""K runs trained together on one frozen base; a run alone is a stack of one.

One micro-step computes one micro-batch of every row. Rows share the base and the operations, and nothing else: each has
its own data, losses, gradients, optimizer steps and end.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import torch

from llama_lab.choices import Memory
from llama_lab.engine.adapter import lora_layers
from llama_lab.engine.batch import Batch, joined
from llama_lab.engine.dropout import KEY_WORDS
from llama_lab.engine.network import Network
from llama_lab.engine.optimizer import NOTHING, FlatAdamW, Update
from llama_lab.engine.replay import Replay
from llama_lab.engine.row import Row
from llama_lab.engine.shapes import Shapes

if TYPE_CHECKING:
    from peft import PeftModel


class Stack:
    """The slots, and what is computed with."""

    def __init__(
        self,
        model: PeftModel,
        *,
        num_rows: int,
        rank: int,
        memory: Memory,
        dropout: bool,
        paid: bool,
        note: Callable[[str], None] = lambda said: None,
    ) -> None:
        """
        Args:
            model: its LoRA layers are those of every row that is going to join.
            num_rows: slots.
            rank: the largest of any row that is going to join.
            dropout: whether any of them may have dropout.
            paid: compile, and record CUDA graphs: only on a GPU, and where there are steps enough that it pays.
            note: tells the user one line.
        """
        self.network = Network(model, memory, num_rows=num_rows, rank=rank, dropout=dropout, compiled=paid)
        self.optimizer = FlatAdamW(self.network.adapter, compiled=paid)
        self.replay = Replay(self.network, record=paid)
        self.shapes = Shapes(num_rows, record=paid)
        self.model, self.rank, self.note = model, rank, note
        self.rows: list[Row | None] = [None] * num_rows
        self.ending: list[Row] = []
        """Out of their slots; their last checkpoint may be under way, which holds up nobody else."""
        self.is_planned = False
        self.left_at = 0.0

    @property
    def live(self) -> list[Row]:
        """The rows in training, by their slots."""
        return [row for row in self.rows if row is not None]

    @property
    def num_free(self) -> int:
        """Slots for rows to join."""
        return self.rows.count(None)

    @property
    def is_empty(self) -> bool:
        """Nothing is left to be trained or told of."""
        return not self.live and not self.ending

    def join(self, row: Row) -> None:
        """Give a row a free slot; it begins, or goes on from its checkpoint.

        What goes wrong while it begins is the row's own `error`, and `step` returns it.

        Raises:
            ValueError: no slot is free, or the stack was not made for its rank, dropout or layers.
        """
        self._check(row)
        k = self.rows.index(None)
        self.rows[k], row.slot = row, k
        try:
            row.open()
            self.network.adapter.take(k, row.name)
            if row.schedule.accumulation > 1:
                self.optimizer.add_up()
            row.begin(self.network.adapter, self.optimizer)
        except Exception as error:
            self._end(row, error)
        except BaseException:
            self._abandon()
            raise
        else:
            self.is_planned = False
            if row.is_done:
                self._end(row)

    def step(self) -> list[Row]:
        """One micro-step of all rows.

        Returns:
            The rows that are over, each with its result or its error; PEFT's parameters have memory of their own again.
            A slot may be free some steps before, while the row's last checkpoint is being written. Rows that ended as
            they joined are returned at once; nothing is computed then.
        """
        try:
            self._pause()
            over = self._over()
            if self.live and not over:
                batch, updates = self._next()
                self.replay.run(batch)
                self.optimizer.step(updates)
                self._tell()
                over = self._over()
        except BaseException:
            self._abandon()
            raise
        self.left_at = time.monotonic()
        return over

    def _next(self) -> tuple[Batch, list[Update]]:
        """One micro-batch of each row, and what the optimizer does with its gradient."""
        width = self._settle()
        rows = self.rows[:width]
        micros = [row.micro if row else None for row in rows]
        streams = [micro.stream if micro else None for micro in micros]
        shapes, pin = self.shapes, self.replay.device.type == "cuda"
        size = shapes.size(max(stream.num_tokens for stream in streams if stream))
        for stream in streams:
            num_tokens, num_rows = (stream.num_tokens, len(stream.lengths)) if stream else (0, 0)
            shapes.hold(num_rows + shapes.num_cuts(size - num_tokens))
        tokens_3KN, starts, spans = joined(
            streams, size=size, longest=shapes.longest, num_starts=shapes.num_starts(), pin=pin
        )
        keys_PKW = torch.zeros(self.network.num_keys, width, KEY_WORDS, dtype=torch.int32, pin_memory=pin)
        for k, row in enumerate(rows):
            if row and self.network.dropout:
                row.put_keys(keys_PKW[:, k])
        shares = [micro.share if micro else 0.0 for micro in micros]
        batch = Batch(
            tokens_3KN=tokens_3KN,
            starts=starts,
            spans=spans,
            longest=shapes.longest,
            keys_PKW=keys_PKW,
            share_K=torch.tensor(shares, dtype=self.replay.losses_K.dtype, pin_memory=pin),
        )
        return batch, [row.update() if row else NOTHING for row in rows]

    def _tell(self) -> None:
        """Rows log, measure and write what is due; what one of them raises ends that one alone."""
        read = _Readback(self.replay.losses_K, self.optimizer.norm_K1)
        for row in self.live:
            before = row.recorder.paused_s
            self._do(row, partial(row.computed, read))
            paused = row.recorder.paused_s - before
            for other in self.live:
                if other is not row:
                    other.recorder.paused_s += paused
        for row in self.live:  # all that were measured are known when the first of them is judged
            self._do(row, row.stepped)
            if row.error is None and row.is_done:
                self._end(row)

    def _do(self, row: Row, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self._end(row, error)

    def _settle(self) -> int:
        """Plan for rows that are new; how many slots are computed, with all rows in the first of them."""
        live = self.live
        if not self.is_planned:
            self.is_planned = True
            if sizes := self.shapes.plan(max(row.longest for row in live), [row.sizes_left for row in live]):
                said = ", ".join(map(str, sizes))
                self.note(f"Compiled, and recorded for micro-batches of {said} tokens, at their first use.")
        width = self.shapes.settle(len(live), max(row.num_left for row in live))
        for row in reversed(live):
            if row.slot >= width:
                self._move(row, self.rows.index(None))
        return width

    def _move(self, row: Row, slot: int) -> None:
        self.network.adapter.move(row.name, row.slot, slot)
        self.optimizer.move(row.slot, slot)
        losses_K = self.replay.losses_K
        losses_K[slot] = losses_K[row.slot]
        losses_K[row.slot] = 0
        self.rows[slot], self.rows[row.slot] = row, None
        row.slot = slot

    def _end(self, row: Row, error: Exception | None = None) -> None:
        """Take a row out; it has done all its steps unless there is an error."""
        row.error = error
        self._release(row)
        self.ending.append(row)

    def _over(self) -> list[Row]:
        """The rows that are over: of those that write their last checkpoint, none while others train."""
        over = [row for row in self.ending if not (self.live and row.is_writing)]
        for row in over:
            self.ending.remove(row)
            for close in (row.finish, row.close) if row.error is None else (row.close,):
                try:
                    close()
                except Exception as error:
                    row.error = row.error or error
        return over

    def _release(self, row: Row) -> None:
        """The slot is empty again, whatever was in it."""
        self.network.adapter.release(row.slot, row.name)
        self.optimizer.clear(row.slot)
        self.replay.losses_K[row.slot] = 0
        self.rows[row.slot] = None

    def _abandon(self) -> None:
        """What is raised now ends all rows."""
        for row in self.live:
            self._end(row)
        for row in self.ending:
            with suppress(Exception):
                row.close()
        self.ending.clear()

    def _pause(self) -> None:
        """What was done since the last step, such as measuring another model, is no training time of any row."""
        now = time.monotonic()
        for row in self.live:
            row.recorder.paused_s += now - max(self.left_at, row.recorder.started_at)

    def _check(self, row: Row) -> None:
        layers = {id(layer) for layers in self.network.lora for layer in layers}
        known = all(id(layer) in layers for layer in lora_layers(self.model, row.name).values())
        reasons = {
            "no slot is free": not self.num_free,
            f"its rank is {row.rank}, the stack's {self.rank}": row.rank > self.rank,
            "it has dropout, the stack has none": row.dropout > 0 and not self.network.dropout,
            "it adapts layers that the stack does not": not known,
        }
        for reason, holds in reasons.items():
            if holds:
                raise ValueError(f"The adapter {row.name} cannot join: {reason}.")


class _Readback:
    """Losses and norms of all rows, read from the device once a micro-step at most."""

    def __init__(self, losses_K: torch.Tensor, norm_K1: torch.Tensor) -> None:
        self.losses_K, self.norm_K1 = losses_K, norm_K1
        self.found: list[list[float]] | None = None

    def __call__(self, slot: int) -> tuple[float, float]:
        """The sum of the losses of a row since it was last asked for, and its last norm; waits for the device."""
        if self.found is None:
            self.found = torch.stack([self.losses_K, self.norm_K1[:, 0]]).tolist()
        self.losses_K[slot] = 0
        return self.found[0][slot], self.found[1][slot]
