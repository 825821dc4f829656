"""The process of one trial: trains, tells the study how it goes, and ends when told to or when its study is gone.

It is forked from a process that has imported the libraries and done nothing else, so it starts in milliseconds and
shares no state with any other trial.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path

from llama_lab.config import RunConfig
from llama_lab.errors import LlamaLabError, RunError
from llama_lab.events import Pruned
from llama_lab.rundir import RunDir
from llama_lab.sweep.methods import PrunerSettings

OUTPUT = "output.log"
"""What a trial prints, in its folder."""
FREE_FOLDER_S = 30.0
"""So long a process that was killed may take to let its folder go."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a trial's process is to do."""

    config: RunConfig
    folder: Path
    overrides: list[str]
    env: dict[str, str] = field(default_factory=dict)
    """Set before anything is computed, such as CUDA_VISIBLE_DEVICES."""
    num_threads: int | None = None
    """Threads on the CPU; null leaves it to the libraries."""
    pruner: PrunerSettings | None = None
    """Who may end the trial; its held-out loss is measured for it where trainer.eval_steps is null."""


class Reporter:
    """A listener that tells the study each held-out loss, and ends the training when the study says so.

    It asks once the step is over: trials of a stack that were measured after the same step are all known by then.
    """

    def __init__(self, pipe: Connection, eval_steps: int | None, pruner: PrunerSettings | None) -> None:
        self.pipe, self.eval_steps, self.pruner = pipe, eval_steps, pruner
        self.measured: float | None = None
        """After the step that is not over yet."""

    def started(self, start_step: int, num_steps: int) -> Collection[int]:
        first = self.pruner.first_step(num_steps) if self.pruner else num_steps
        self.pipe.send(("started", self.eval_steps or first, num_steps))
        return self.pruner.measured_steps(num_steps) if self.pruner else ()

    def stepped(self, step: int) -> None:
        if self.measured is None:
            return
        loss, self.measured = self.measured, None
        self.pipe.send(("judged",))
        if self.pipe.recv():
            raise Pruned(step, f"held-out loss {loss:.4g} at step {step}")

    def logged(self, step: int, metrics: dict[str, float]) -> None:
        if "eval/loss" not in metrics or step == 0:
            return
        self.measured = metrics["eval/loss"]
        self.pipe.send(("measured", step, self.measured))
        self.pipe.recv()  # it is written down

    def saved(self, step: int, checkpoint: Path) -> None:
        pass

    def ended(self) -> None:
        pass


def work(order: Order, pipe: Connection) -> None:
    """Do one trial in this process; the outcome is result.json and the exit code."""
    _prepare(order)
    try:
        wait_until_free(RunDir(order.folder))
        train(order, pipe)
    except Pruned:
        return
    except LlamaLabError as error:
        logging.getLogger(__name__).exception("The trial failed")
        print(f"llama_lab: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception:
        logging.getLogger(__name__).exception("The trial failed")
        raise


def train(order: Order, pipe: Connection) -> None:
    """The run itself."""
    from llama_lab.app import run_in

    if order.num_threads:
        import torch

        torch.set_num_threads(order.num_threads)
    reporter = Reporter(pipe, order.config.trainer.eval_steps, order.pruner)
    run_in(order.config, order.folder, order.overrides, [reporter])


def _prepare(order: Order) -> None:
    order.folder.mkdir(parents=True, exist_ok=True)
    begin_process(order.env, order.folder / OUTPUT, order.folder / "llama_lab.log")


def begin_process(env: Mapping[str, str], output: Path, log: Path) -> None:
    """Make this process one of a study's: what it prints and logs goes into files, and it ends with the study."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the study, which ends its trials
    os.environ.update(env)
    _forget_what_read(env)
    print_into(output, log)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def print_into(output: Path, log: Path) -> None:
    """What this process prints goes into one file from now on, its log lines into another, or into the same."""
    printed = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(printed, stream)
    os.close(printed)
    logging.basicConfig(filename=log, level=logging.INFO, force=True)


def _forget_what_read(env: Mapping[str, str]) -> None:
    """Trackio reads its variables as it is imported, and the process that this one is forked from has imported it."""
    if any(name.startswith("TRACKIO_") for name in env):
        for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
            del sys.modules[name]


def _end_with_parent() -> None:
    """A trial whose study was killed must not go on: the next start of the study takes it up."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def wait_until_free(run_dir: RunDir) -> None:
    """Wait for a process that was killed to let its folder go.

    Raises:
        RunError: it does not.
    """
    deadline = time.monotonic() + FREE_FOLDER_S
    while True:
        try:
            with run_dir.held():
                return
        except RunError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
