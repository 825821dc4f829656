"""What training tells, and who listens. Both engines tell the same; tracking, progress and pruning only listen."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Protocol


class Pruned(Exception):
    """What a listener raises to end the training early; the run is then pruned, which is no failure."""

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(reason)
        self.step = step


class Listener(Protocol):
    """Hears what happens in training. Steps are optimizer steps, counted from 1."""

    def started(self, start_step: int, num_steps: int) -> Collection[int] | None:
        """Training begins after `start_step` steps (0, or the step of the checkpoint it resumes from).

        Returns:
            Steps after which the listener wants the held-out loss where trainer.eval_steps is null; None for none.
        """

    def stepped(self, step: int) -> None:
        """One optimizer step is done."""

    def logged(self, step: int, metrics: dict[str, float]) -> None:
        """Numbers of a step, such as train/loss, train/tokens_per_s, eval/loss."""

    def saved(self, step: int, checkpoint: Path) -> None:
        """A complete checkpoint lies in `checkpoint`."""

    def ended(self) -> None:
        """Training is over, also when it failed."""


class Listeners:
    """Tells every listener, in order."""

    def __init__(self, *listeners: Listener) -> None:
        self.listeners = listeners

    def started(self, start_step: int, num_steps: int) -> Collection[int] | None:
        wanted = [listener.started(start_step, num_steps) for listener in self.listeners]
        return {step for steps in wanted for step in steps or ()}

    def stepped(self, step: int) -> None:
        for listener in self.listeners:
            listener.stepped(step)

    def logged(self, step: int, metrics: dict[str, float]) -> None:
        for listener in self.listeners:
            listener.logged(step, metrics)

    def saved(self, step: int, checkpoint: Path) -> None:
        for listener in self.listeners:
            listener.saved(step, checkpoint)

    def ended(self) -> None:
        for listener in self.listeners:
            listener.ended()
