"""The process of a stack: holds a base, takes orders from the process that sweeps, and trains their adapters together.

Each order is an ordinary run (runner.run) in a turn of its own. While a run loads its rows or measures, the stack
waits; once all runs that are there wait for their training, the stack takes a step.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import weakref
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_lab.errors import LlamaLabError
from llama_lab.events import Pruned
from llama_lab.process import terminated
from llama_lab.rundir import RunDir
from llama_lab.sweep.child import OUTPUT, Order, Reporter, begin_process, print_into, wait_until_free
from llama_lab.sweep.outcome import is_out_of_memory

if TYPE_CHECKING:
    from llama_lab.stacked.kept import Kept
    from llama_lab.stacked.shared import SharedBase
    from llama_lab.stacked.turns import Globals, Turn

log = logging.getLogger(__name__)

MEMORY_FULL = 77
"""Exit code of a stack that ran out of memory: its rows are to be started again, fewer at a time."""
BEGUN = "begun"
"""Said through the channel by a process that has let go of the last stack and begins with another."""
FIRST_S = 5.0
"""So long a stack waits for the next of the rows that it is to begin with."""
MAX_KEPT = 2**29
"""Bytes on a GPU that a process without a base may hold, such as cuBLAS's."""
ENDED, ALONE, APART = "ended", "alone", "apart"
"""The last word of an order: its exit code; what stacks do not take of points like it; why it does not go with the
others of this stack."""


@dataclass(frozen=True, kw_only=True)
class StackSettings:
    """What a stack is made for."""

    num_rows: int
    rank: int
    """The largest lora.r of its rows."""
    dropout: bool
    """Some row may drop activations."""
    log: Path
    """What libraries print, and the log lines of the stack itself."""
    env: dict[str, str]
    num_first: int = 1
    """Rows that are on their way as the stack begins: they take their first step together, so that a study measures
    and judges them together."""


class Full(BaseException):
    """Memory is full. No Exception, so that nothing on the way takes it for a failure of its own."""


def serve(settings: StackSettings, channel: Connection) -> None:
    """Train what comes through `channel` as pairs of an order and its pipe, until None comes.

    Where other StackSettings come, once all runs have ended, it begins with another stack in the same environment, and
    says BEGUN; or ends where it cannot.
    """
    settings.log.parent.mkdir(parents=True, exist_ok=True)
    begin_process(settings.env, settings.log, settings.log)
    signal.signal(signal.SIGTERM, terminated)
    host = _Host(settings, channel)
    try:
        host.run()
    except Full:
        log.exception("Memory is full")
        sys.stdout.flush()
        os._exit(MEMORY_FULL)  # the other runs have nothing to say: they go on elsewhere from their checkpoints
    except SystemExit as stop:
        log.info("Terminated")
        if host.settings.num_rows > 1:  # of the stack that it has now
            host.forsake(stop)
        else:
            host.stop(stop)
        raise
    except BaseException as error:
        log.exception("The stack ends")
        host.stop(error)
        raise


class _Host:
    """The runs of a stack, and who has the turn."""

    def __init__(self, settings: StackSettings, channel: Connection) -> None:
        self.settings, self.channel = settings, channel
        self.runs: list[_Run] = []
        self.is_open = True
        self.shared: SharedBase | None = None
        self.kept: Kept | None = None
        self.began: Globals | None = None
        self.num_begun = 0
        self.num_awaited = settings.num_first
        """Rows without which the stack does not take its first step."""

    def run(self) -> None:
        """Take orders and steps by turns."""
        while self.is_open or self.runs:
            while self.is_open and (not self.runs or self.channel.poll(FIRST_S if self.num_awaited > 0 else 0.0)):
                self._take()
            self._settle()
            if self.runs:
                self._step()

    def stop(self, error: BaseException) -> None:
        """End all runs that wait for their training."""
        for run in self._waiting():
            run.turn.stop(error)
            run.tell()

    def forsake(self, error: BaseException) -> None:
        """End them without a result or a last word, as a kill would: they go on elsewhere from their checkpoints."""
        for run in self._waiting():
            run.turn.stop(error)
            RunDir(run.order.folder).result.unlink(missing_ok=True)

    def _waiting(self) -> list[_Run]:
        waiting = list(self.shared.waiting.values()) if self.shared is not None else []
        return [run for run in self.runs if not run.turn.has_ended and run.turn in waiting]

    def _take(self) -> None:
        try:
            found = self.channel.recv()
        except EOFError:
            found = None
        if found is None:
            self.is_open = False
            return
        if isinstance(found, StackSettings):
            self._begin_again(found)
            return
        order, pipe = found
        if self.shared is None:
            self._prepare(order)
        assert self.shared is not None
        assert self.began is not None
        self.num_begun += 1
        self.num_awaited -= 1
        run = _Run(order, pipe, f"row{self.num_begun}", self.shared, self.began)
        self.runs.append(run)
        run.turn.resume()
        self._check(run)

    def _prepare(self, order: Order) -> None:
        """Imports, once the environment is that of the runs."""
        from llama_lab.process import prepare, quiet_libraries

        prepare(order.config)
        from llama_lab.stacked.kept import Kept
        from llama_lab.stacked.shared import SharedBase
        from llama_lab.stacked.turns import Globals

        quiet_libraries(order.config)
        s, self.kept = self.settings, self.kept or Kept()
        self.shared = SharedBase(num_rows=s.num_rows, rank=s.rank, dropout=s.dropout, kept=self.kept)
        self.began = Globals.taken()

    def _begin_again(self, settings: StackSettings) -> None:
        """Forget the base and its stack; imports and kernels stay, and what other runs may need (kept.py).

        Raises:
            RuntimeError: the base is still in memory.
        """
        from llama_lab.training import forget_peak

        model = weakref.ref(self.shared.model) if self.shared is not None and self.shared.model is not None else None
        self.settings, self.shared, self.num_awaited = settings, None, settings.num_first
        print_into(settings.log, settings.log)
        gc.collect()
        held = _gpu_bytes()
        if (model is not None and model() is not None) or held > MAX_KEPT:
            raise RuntimeError(f"The base of the last stack is still in memory: {held} bytes on the GPU")
        forget_peak()
        log.info("Another stack in process %d", os.getpid())
        self.channel.send(BEGUN)

    def _step(self) -> None:
        assert self.shared is not None
        self.num_awaited = 0
        try:
            self.shared.step()
        except Exception as error:
            if is_out_of_memory(error) and self.settings.num_rows > 1:
                raise Full from error
            raise
        for run in self.runs:
            self._check(run)

    def _check(self, run: _Run) -> None:
        """Raise Full where a run has ended for want of memory: with fewer rows beside it, it may go through."""
        if run.memory_error is not None and self.settings.num_rows > 1:
            RunDir(run.order.folder).result.unlink(missing_ok=True)
            raise Full from run.memory_error

    def _settle(self) -> None:
        """Say what became of the runs that have ended, and make room."""
        for run in [run for run in self.runs if run.turn.has_ended]:
            self.runs.remove(run)
            assert self.shared is not None
            self.shared.drop(run.name)
            run.tell()


class _Run:
    """One order on its way."""

    def __init__(self, order: Order, pipe: Connection, name: str, shared: SharedBase, began: Globals) -> None:
        from llama_lab.stacked.shared import StackBackend
        from llama_lab.stacked.turns import Turn

        self.order, self.pipe, self.name = order, pipe, name
        self.last_word: tuple[str, Any] = (ENDED, 1)
        self.memory_error: BaseException | None = None
        order.folder.mkdir(parents=True, exist_ok=True)
        self.handler = logging.FileHandler(order.folder / "llama_lab.log")
        self.handler.setFormatter(logging.Formatter(logging.BASIC_FORMAT))
        self.turn: Turn = Turn(self._work, replace(began, handlers=[self.handler]))
        self.backend = StackBackend(shared=shared, name=name, turn=self.turn)

    def tell(self) -> None:
        """The last word."""
        self.handler.close()
        try:
            self.pipe.send(self.last_word)
        except OSError:
            log.info("Nobody hears of the end of %s.", self.order.folder)
        self.pipe.close()

    def _work(self) -> None:
        with (self.order.folder / OUTPUT).open("a", encoding="utf-8") as output:
            self.last_word = self._ended(output)

    def _ended(self, output: Any) -> tuple[str, Any]:
        """Do the run; its last word."""
        from rich.console import Console

        from llama_lab.runner import run
        from llama_lab.stacked.shared import CannotJoin, NotStackable

        order = self.order
        reporter = Reporter(self.pipe, order.config.trainer.eval_steps, order.pruner)
        try:
            wait_until_free(RunDir(order.folder))
            run(order.config, order.folder, order.overrides, Console(file=output), [reporter], self.backend)
        except Pruned:
            pass
        except NotStackable as error:
            return ALONE, str(error)
        except CannotJoin as error:
            return APART, str(error)
        except SystemExit as stop:
            return ENDED, stop.code
        except Exception as error:
            if is_out_of_memory(error):
                self.memory_error = error
            log.exception("The run failed")
            print(f"llama_lab: {error}", file=output)
            return ENDED, error.exit_code if isinstance(error, LlamaLabError) else 1
        return ENDED, 0


def _gpu_bytes() -> int:
    import torch

    if not torch.cuda.is_initialized():
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()
