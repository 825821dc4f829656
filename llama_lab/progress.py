"""What a person sees while a run works: a live bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

SPARKS = 16
"""Logged losses that the bar draws."""
BARS = "▁▂▃▄▅▆▇█"


class Display:
    """Stages as they begin, and training as a bar. A listener of training."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar: Progress | None = None
        self.num_steps = self.start_step = 0
        self.began = 0.0
        self.losses: list[float] = []
        self.tokens_per_s: float | None = None

    def note(self, text: str) -> None:
        """One line that stays."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def stage(self, text: str) -> Iterator[None]:
        """A stage of the run, with the seconds it took."""
        began = time.monotonic()
        if self.console.is_terminal:
            with self.console.status(text):
                yield
        else:
            yield
        self.note(f"{text}: {time.monotonic() - began:.1f} s")

    def started(self, start_step: int, num_steps: int) -> None:
        self.start_step, self.num_steps, self.began = start_step, num_steps, time.monotonic()
        if start_step:
            self.note(f"Going on from the checkpoint of step {start_step}.")
        if not self.console.is_terminal:
            return
        self.bar = Progress(
            TextColumn("Training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=self.console,
        )
        self.task = self.bar.add_task("", total=num_steps, completed=start_step, numbers="", left="")
        self.bar.start()

    def stepped(self, step: int) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=step, numbers=self._numbers(), left=self._left(step))

    def logged(self, step: int, metrics: dict[str, float]) -> None:
        if "train/loss" in metrics:
            self.losses.append(metrics["train/loss"])
        self.tokens_per_s = metrics.get("train/tokens_per_s", self.tokens_per_s)
        held_out = f", held-out loss {metrics['eval/loss']:.3f}" if "eval/loss" in metrics else ""
        if self.bar is not None:
            self.bar.update(self.task, completed=step, numbers=self._numbers(), left=self._left(step))
            if held_out:
                self.note(f"step {step}{held_out}")
        elif self.num_steps:
            self.note(f"step {step}/{self.num_steps}  {self._numbers()}{held_out}  {self._left(step)}")

    def saved(self, step: int, checkpoint: Path) -> None:
        pass

    def ended(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
        self.num_steps = 0

    def _numbers(self) -> str:
        parts = [f"loss {self.losses[-1]:.3f}"] if self.losses else []
        if self.bar is not None:
            parts += filter(None, [sparkline(self.losses[-SPARKS:]), _gpu_memory()])
        return "  ".join(parts + ([f"{self.tokens_per_s:.0f} tokens/s"] if self.tokens_per_s else []))

    def _left(self, step: int) -> str:
        done = step - self.start_step
        if not done:
            return ""
        left = (time.monotonic() - self.began) / done * (self.num_steps - step)
        return f"{int(left) // 60}:{int(left) % 60:02d} left"


def sparkline(values: list[float]) -> str:
    """One character a value, the higher the larger; empty for less than two values."""
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < 2:
        return ""
    low, span = min(finite), max(finite) - min(finite) or 1.0
    return "".join(BARS[round((value - low) / span * (len(BARS) - 1))] for value in finite)


def _gpu_memory() -> str:
    import torch

    if not torch.cuda.is_available():
        return ""
    free, total = torch.cuda.mem_get_info()
    return f"{(total - free) / 2**30:.1f} of {total / 2**30:.0f} GiB"
