"""What a verb is doing, for a person who waits: a line that changes in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.status import Status

from llama_lab.process import end_if_told

EVERY_S = 2.0
"""Seconds between two lines outside of a terminal."""


class Ticker:
    """Tells on the error output, so that the standard output holds results alone."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.status: Status | None = None
        self.last = time.monotonic()

    def __enter__(self) -> Ticker:
        if self.console.is_terminal:
            self.status = self.console.status("")
            self.status.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.status is not None:
            self.status.stop()

    def __call__(self, what: str) -> None:
        """Say what begins now, unless the process has been told to end."""
        end_if_told()
        if self.status is not None:
            self.status.update(what)
        elif time.monotonic() - self.last >= EVERY_S:
            print(f"llama_lab: {what} ...", file=sys.stderr, flush=True)
            self.last = time.monotonic()
