"""Runs that share a process: each in a thread of its own, and never two at the same time.

A run works when it is resumed, until it waits for its training or has ended. What libraries keep once a process, such
as the random numbers and the log file, changes hands with the turn, so that a run finds it as it left it.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch


@dataclass(kw_only=True)
class Globals:
    """What is kept once a process and belongs to one run: random numbers, and where log lines go."""

    torch_state: Any
    cuda_state: Any
    numpy_state: Any
    python_state: Any
    handlers: list[logging.Handler] = field(default_factory=list)

    @classmethod
    def taken(cls) -> Globals:
        """As they are now."""
        return cls(
            torch_state=torch.get_rng_state(),
            cuda_state=torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
            numpy_state=np.random.get_state(),
            python_state=random.getstate(),
            handlers=list(logging.getLogger().handlers),
        )

    def put(self) -> None:
        """Make them what they were."""
        torch.set_rng_state(self.torch_state)
        if self.cuda_state is not None:
            torch.cuda.set_rng_state(self.cuda_state)
        np.random.set_state(self.numpy_state)
        random.setstate(self.python_state)
        logging.getLogger().handlers[:] = self.handlers


class Turn:
    """A run's thread. `resume` is the host's, `wait` the run's own."""

    def __init__(self, work: Callable[[], None], began: Globals) -> None:
        """
        Args:
            began: what the run finds at its first turn.
        """
        self.own, self.has_ended = began, False
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.stopped: BaseException | None = None
        self.thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self.thread.start()

    def resume(self) -> None:
        """Let the run work until it waits or has ended."""
        with self.at_hand():
            self.go.release()
            self.done.acquire()

    def wait(self) -> None:
        """Let others work until the host resumes this run.

        Raises:
            BaseException: what the host stops it with.
        """
        self.done.release()
        self.go.acquire()
        if self.stopped is not None:
            raise self.stopped

    def stop(self, error: BaseException) -> None:
        """Resume a run that waits so that it ends with this error."""
        self.stopped = error
        self.resume()

    @contextmanager
    def at_hand(self) -> Iterator[None]:
        """What is kept once a process is the run's own within the block."""
        before = Globals.taken()
        self.own.put()
        try:
            yield
        finally:
            self.own = Globals.taken()
            before.put()

    def _run(self, work: Callable[[], None]) -> None:
        self.go.acquire()
        try:
            work()
        finally:
            self.has_ended = True
            self.done.release()
