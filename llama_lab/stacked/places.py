"""The places that a GPU, or the CPU, has: the process of a stack, seen from the sweep, or one for a lone run."""

from __future__ import annotations

import signal
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from llama_lab.config import RunConfig
from llama_lab.stacked.host import BEGUN, MEMORY_FULL, StackSettings, serve
from llama_lab.stacked.kind import Kind
from llama_lab.sweep import child
from llama_lab.sweep.processes import CHILDREN, Hear, fork_server, started

CLOSE_S = 20.0
"""So long a stack without rows may take to end."""


def may_drop(config: RunConfig) -> bool:
    """Whether a point may drop activations; an adapter that it goes on with has a dropout of its own."""
    return config.lora.dropout > 0 or config.model.adapter is not None


@dataclass(frozen=True, kw_only=True)
class Left:
    """The process of a stack whose rows have ended, for the next one; until that begins it holds the base."""

    process: Any
    channel: Connection
    env: dict[str, str]
    waiting_for: threading.Lock
    """As of the place that had the process."""

    def is_alive(self) -> bool:
        """Whether its process has not ended."""
        with self.waiting_for:
            return bool(self.process.is_alive())

    def has_begun(self) -> bool:
        """Whether the process has begun with another stack; asked once it has ended."""
        try:
            return self.channel.poll() and self.channel.recv() == BEGUN
        except (OSError, EOFError):
            return False

    def close(self) -> None:
        """End it."""
        with suppress(OSError):  # it has ended already
            self.channel.send(None)
        self.channel.close()
        with self.waiting_for:
            self.process.join(CLOSE_S)
            if self.process.is_alive():
                self.process.kill()
                self.process.join()
        CHILDREN.discard(self.process)


@dataclass(kw_only=True, eq=False)
class LonePlace:
    """A place for one point in a process of its own."""

    num_points: int = 0

    def takes(self, kind: Kind, config: RunConfig, num_rows: int | None, env: Mapping[str, str]) -> bool:
        """Nothing beside its one point."""
        return False

    def leave(self) -> None:
        """Nothing: its process has ended."""

    def close(self) -> None:
        """Nothing: its process has ended."""


@dataclass(kw_only=True, eq=False)
class StackPlace:
    """The process of a stack, seen from the sweep."""

    kind: Kind
    settings: StackSettings
    num_points: int = 0
    """That are in it."""
    left: Left | None = None
    """A process to begin in."""
    has_begun: bool | None = None
    """Whether it did; None while that is not asked."""
    process: Any = None
    channel: Connection | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)
    waiting_for: threading.Lock = field(default_factory=threading.Lock)
    """One thread at a time may ask whether the process has ended: its exit code can be read once."""
    was_told: bool = False
    """That it has ended has been said."""

    def __post_init__(self) -> None:
        if self.left is not None:
            self.waiting_for = self.left.waiting_for

    def takes(self, kind: Kind, config: RunConfig, num_rows: int | None, env: Mapping[str, str]) -> bool:
        """Whether a point can come in now; a process has one environment."""
        s, lora = self.settings, config.lora
        fits = kind == self.kind and s.env == env and lora.r <= s.rank and (s.dropout or not may_drop(config))
        return fits and self.num_points < min(num_rows or 0, s.num_rows) and not self._has_ended()

    def do(self, order: child.Order, hear: Hear) -> tuple[str, Any] | None:
        """Train one point; its last word, None where the process ended first."""
        ours, theirs = fork_server().Pipe()
        try:
            with self.lock:
                self._start()
                assert self.channel is not None
                self.channel.send((order, theirs))
            theirs.close()
            return hear(ours, self.process.sentinel)
        except (BrokenPipeError, ConnectionResetError):
            return None
        finally:
            ours.close()

    def exit_code(self) -> int:
        """Of the process, which has ended or is about to; negative is the signal that killed it."""
        with self.waiting_for:
            self.process.join(CLOSE_S)
            return int(self.process.exitcode or 0)

    def how_it_ended(self) -> str:
        """... of `rows` rows ran out of memory, or was killed."""
        code, rows = self.exit_code(), self.settings.num_rows
        if code == MEMORY_FULL:
            return f"ran out of memory with {rows} rows"
        if code < 0 or code == 128 + signal.SIGTERM:
            return f"of {rows} rows was killed by {signal.Signals(-code if code < 0 else code - 128).name}"
        return f"of {rows} rows ended with exit code {code} ({self.settings.log} says why)"

    def is_to_begin_again(self) -> bool:
        """Whether its process has ended for what another stack had left in it: a new process is to have its rows.

        Either it could not let go of that stack, or memory was full, and it is not known of how much else.
        """
        if self.left is None:
            return False
        code = self.exit_code()
        with self.waiting_for:
            if self.has_begun is None:
                self.has_begun = self.left.has_begun()
        return not self.has_begun or code == MEMORY_FULL

    def leave(self) -> Left | None:
        """Its process, which has no rows any more, for the next stack; this place is given up."""
        if self.process is None or self.channel is None or self._has_ended():
            self.close()
            return None
        with suppress(OSError, EOFError):
            while self.channel.poll():
                self.channel.recv()  # that it had begun
        return self._left(self.channel)

    def _left(self, channel: Connection) -> Left:
        return Left(process=self.process, channel=channel, env=self.settings.env, waiting_for=self.waiting_for)

    def close(self) -> None:
        """End the process."""
        if self.process is not None and self.channel is not None:
            self._left(self.channel).close()

    def _has_ended(self) -> bool:
        if self.process is None:
            return False
        with self.waiting_for:
            return not self.process.is_alive()

    def _start(self) -> None:
        if self.process is None and self.left is not None:
            self.process, self.channel = self.left.process, self.left.channel
            with suppress(OSError):  # it has ended meanwhile, as `do` finds out
                self.channel.send(self.settings)
        if self.process is None:
            self.channel, theirs = fork_server().Pipe()
            self.process = started(serve, (self.settings, theirs), "stack")
            theirs.close()
